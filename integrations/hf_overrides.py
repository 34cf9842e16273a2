"""Methods of a user's trainer class that would never be called: each is an error, and the error says what to do."""

from collections.abc import Iterable

from orpo_plugins.errors import ConfigError

LOSS = "a loss term or a metric of a plugin (docs/plugins.md), or compute_loss"
_METHODS_OF_TRL = {
    "build_tokenized_answer": "tokenized rows, or a row format of a plugin (docs/plugins.md)",
    "tokenize_row": "tokenized rows, or a row format of a plugin (docs/plugins.md)",
    "concatenated_inputs": "data_collator",
    "concatenated_forward": LOSS,
    "get_batch_logps": LOSS,
    "get_batch_loss_metrics": LOSS,
    "odds_ratio_loss": LOSS,
    "generate_from_model": "evaluation_loop",
}
"""Methods of TRL's trainer that people override and that nothing here calls: what to use instead."""


def check_subclass(trainer: type, bases: Iterable[type]) -> None:
    """Raises `ConfigError` where one of the trainer's `bases` overrides a method of TRL's trainer."""
    for base in bases:
        for name in _METHODS_OF_TRL.keys() & vars(base).keys():
            raise ConfigError(
                f"{base.__name__}.{name} would never be called: {trainer.__name__} is not built on TRL's trainer. In "
                f"its place: {_METHODS_OF_TRL[name]}"
            )


def check_loader(trainer: type, behind: Iterable[type]) -> None:
    """Raises `ConfigError` where the trainer has a training loader or sampler of its own, and `PairBatches` is used.

    `behind` are the bases that come after our own `get_train_dataloader`, which would call theirs.
    """
    if own := overridden("get_train_dataloader", behind) or overridden("_get_train_sampler", trainer.__mro__):
        raise ConfigError(
            f"{own} would never be called: max_tokens_per_batch and train_sampling_strategy='group_by_length' make "
            "batches of their own. Leave these options out, or the method"
        )


def overridden(name: str, bases: Iterable[type]) -> str | None:
    """The first method of that name in `bases`, as "Class.method"; transformers' classes and ours do not count."""
    ours = ("transformers.", "orpo_plugins.integrations")
    found = (base for base in bases if name in vars(base) and not base.__module__.startswith(ours))
    return next((f"{base.__name__}.{name}" for base in found), None)
