"""Checks for `Trainer.hyperparameter_search`: the names in its space, and the loss that it compares trials by.

`Trainer` only warns of a name that is not among the arguments, and by default compares the sum of all metrics.
"""

from collections.abc import Callable, Mapping
from typing import Any

from orpo_plugins.errors import ConfigError
from orpo_plugins.integrations.hf_changed_options import LOSS_OPTIONS
from orpo_plugins.integrations.hf_legacy_arguments import RENAMED
from orpo_plugins.options import did_you_mean


def checked_space(space: Callable[[Any], dict[str, Any]], args: object) -> Callable[[Any], dict[str, Any]]:
    """The space, which now raises `ConfigError` where a trial sets a name that is not among the arguments."""

    def checked(trial: Any) -> dict[str, Any]:
        values = space(trial)
        for name in values:
            if not hasattr(args, name):
                raise ConfigError(
                    f"the search sets {name!r}, which {type(args).__name__} does not have{_hint(name, args)}"
                )
        return values

    return checked


def _hint(name: str, args: object) -> str:
    if name in LOSS_OPTIONS:
        return ": search with ORPOTrainer and ORPOConfig, which does"
    return f"; did you mean {RENAMED[name]!r}?" if name in RENAMED else did_you_mean(name, vars(args))


def evaluation_loss(metrics: Mapping[str, float], eval_dataset: Any) -> float:
    """The default objective: `eval_loss`, and for several sets the mean of their losses, `eval_<name>_loss`.

    Raises `ConfigError` where the evaluation has no such loss.
    """
    names = [f"eval_{name}_loss" for name in eval_dataset] if isinstance(eval_dataset, Mapping) else ["eval_loss"]
    if missing := [name for name in names if name not in metrics]:
        raise ConfigError(
            f"the evaluation has no {' and no '.join(missing)} to compare trials by: pass compute_objective, a "
            "function of its metrics"
        )
    return sum(metrics[name] for name in names) / len(names)
