"""The load-balancing loss of a mixture of experts, added to ORPO's loss."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from orpo_plugins.denominators import Denominators
from orpo_plugins.errors import ModelError
from orpo_plugins.models.head import config_of, text_config_of, unwrap_model
from orpo_plugins.objective import ORPOOutput
from orpo_plugins.targets import Targets


def add_router_loss(
    output: ORPOOutput, outputs: Any, model: nn.Module, targets: Targets, totals: Denominators
) -> ORPOOutput:
    """Adds the load-balancing loss of a mixture of experts, weighted by this micro-batch's share of pairs."""
    text = text_config_of(model)
    if not any(getattr(config, "output_router_logits", False) for config in (config_of(model), text)):
        return output
    aux_loss = outputs.get("aux_loss") if isinstance(outputs, Mapping) else None
    if aux_loss is None:
        raise ModelError(
            f"output_router_logits is set, but {type(unwrap_model(model)).__name__} returns no aux_loss, so its "
            "routers' loss would be left out: set output_router_logits=False"
        )
    weight = router_coefficient(model) * (targets.pair_weights().sum() / totals.num_examples)
    return replace(
        output, loss=output.loss + weight * aux_loss, metrics={**output.metrics, "aux_loss": aux_loss.detach()}
    )


def router_coefficient(model: nn.Module) -> float:
    """The factor by which the model itself multiplies its routers' loss."""
    # Most models have it in the configuration; others (Dbrx) copy it to an attribute of their own when they are made.
    for holder in (text_config_of(model), unwrap_model(model)):
        for name in ("router_aux_loss_coef", "aux_loss_coef"):
            if getattr(holder, name, None) is not None:
                return float(getattr(holder, name))
    raise ModelError(
        f"nothing in {type(unwrap_model(model)).__name__} says what its aux_loss is multiplied by: set "
        "model.config.router_aux_loss_coef, or output_router_logits=False"
    )
