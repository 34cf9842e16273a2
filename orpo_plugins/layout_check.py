"""The self-check of a layout: one batch through it and through *padded*, before a run trusts it.

report = check_layout(model, pairs, layout, pad_token_id=0)
if not report.passed:
    raise ModelError(report.message())        # or fall back to padded, where the user asked for "auto"
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from orpo_plugins import plugins
from orpo_plugins.forward import check_vocabulary, orpo_forward, predictions_of
from orpo_plugins.head import evaluating, head_options, output_head, unwrap_model
from orpo_plugins.interfaces import Layout, Pair

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}
"""By the dtype of the last hidden states: what a row may differ by, relative to its length.

About ten times what right layouts show, since other kernels and shapes add up in another order.
"""
_QUANTILE = 0.9
"""A router near a tie may send a few rows to other experts in low precision, and those rows differ in earnest."""


@dataclass(frozen=True, kw_only=True)
class LayoutReport:
    """How far a layout is from *padded* on one batch."""

    layout: str
    dtype: torch.dtype
    """Of the last hidden states."""
    row_difference: float
    """|difference| / |row| of the last hidden states that predict something, nine rows in ten are below."""
    loss_difference: float
    """Absolute."""
    tolerance: float
    """For both."""
    first_layer: str | None = None
    """The first layer whose output differs, with its kind; None where none does."""

    @property
    def passed(self) -> bool:
        """Whether the layout may be used.  NaN does not pass."""
        return self.row_difference <= self.tolerance and self.loss_difference <= self.tolerance

    def message(self) -> str:
        """The finding and the remedy, for the log or an error."""
        verdict = "agrees with" if self.passed else "differs from"
        text = (
            f"layout {self.layout!r} {verdict} 'padded' on the first batch: hidden states by {self.row_difference:.1e} "
            f"relative, the loss by {self.loss_difference:.1e} ({self.dtype}, tolerance {self.tolerance:.0e})"
        )
        if self.passed:
            return text
        where = "no single layer" if self.first_layer is None else self.first_layer
        return f"{text}. It first shows in {where}. Use layout='padded' for this model, and please report it"


def check_layout(
    model: nn.Module,
    pairs: Sequence[Pair],
    layout: Layout,
    *,
    pad_token_id: int,
    nll_over: str = "sequence",
    kernel: str = "auto",
) -> LayoutReport:
    """Compares `layout` with *padded* on `pairs`, without gradient and dropout; two forward passes.

    `model` may be wrapped; the layout must have been prepared for it.  Two more passes follow where they differ, to
    find the layer.  On several ranks call it on all, each with pairs of its own.
    """
    layouts = (plugins.layout("padded"), layout)
    device = next(model.parameters()).device
    batches = [_to(one.collate(pairs, pad_token_id=pad_token_id, nll_over=nll_over), device) for one in layouts]
    check_vocabulary(model, batches[0]["input_ids"], predictions_of(batches[0]))
    with torch.no_grad(), evaluating(model):
        if kernel != "reference":
            head_options(model, batches[0]["input_ids"])  # its probe must not pass by the hooks below
        runs = [_run(model, one, batch, kernel) for one, batch in zip(layouts, batches, strict=True)]
        (expected, loss), (found, other_loss) = runs
        report = LayoutReport(
            layout=layout.name,
            dtype=found.dtype,
            row_difference=row_difference(found, expected),
            loss_difference=abs(float(other_loss) - float(loss)),
            tolerance=TOLERANCES.get(found.dtype, TOLERANCES[torch.bfloat16]),
        )
        if report.passed:
            return report
        first = _first_layer(model, layouts, batches, report.tolerance, kernel)
    return LayoutReport(**{**vars(report), "first_layer": first})


def row_difference(found: Tensor, expected: Tensor) -> float:
    """The 0.9 quantile over rows [N, H] of |found - expected| / |expected|; NaN where either is."""
    found, expected = found.double(), expected.double()
    relative = (found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-30)
    return float(relative.quantile(_QUANTILE))


def _run(model: nn.Module, layout: Layout, batch: dict[str, Any], kernel: str) -> tuple[Tensor, Tensor]:
    """(hidden states that predict something [N, H], loss); both layouts list their predictions in one order."""
    seen: list[Tensor] = []
    rows = predictions_of(batch).rows
    with _listening(output_head(model), lambda hidden: seen.append(hidden.flatten(0, -2)[rows]), to_inputs=True):
        loss = _forward(model, layout, batch, kernel)
    return seen[-1], loss


def _forward(model: nn.Module, layout: Layout, batch: dict[str, Any], kernel: str) -> Tensor:
    with layout.forward_context(model):
        return orpo_forward(model, batch, kernel=kernel).loss


def _first_layer(
    model: nn.Module, layouts: Sequence[Layout], batches: Sequence[dict[str, Any]], tolerance: float, kernel: str
) -> str | None:
    """Name, class and `layer_types` entry of the first layer that differs."""
    named = list(_layers(unwrap_model(model)))
    outputs: list[list[Tensor]] = []
    for layout, batch in zip(layouts, batches, strict=True):
        seen: dict[str, Tensor] = {}
        rows = predictions_of(batch).rows
        with ExitStack() as stack:
            for name, layer in named:
                stack.enter_context(_listening(layer, _recorder(seen, name, rows), to_inputs=False))
            _forward(model, layout, batch, kernel)
        outputs.append([seen[name] for name, _ in named if name in seen])
    kinds = getattr(getattr(unwrap_model(model), "config", None), "layer_types", None) or ()
    for index, ((name, layer), expected, found) in enumerate(zip(named, *outputs, strict=False)):
        if not row_difference(found, expected) <= tolerance:
            kind = f", {kinds[index]}" if index < len(kinds) else ""
            return f"{name} ({type(layer).__name__}{kind})"
    return None


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The entries of the longest list of modules: a decoder's layers."""
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    name, layers = max(lists, key=lambda item: len(item[1]), default=("", nn.ModuleList()))
    return ((f"{name}.{index}", layer) for index, layer in enumerate(layers))


def _recorder(seen: dict[str, Tensor], name: str, rows: Tensor) -> Callable[[Tensor], None]:
    def record(hidden: Tensor) -> None:
        seen[name] = hidden.flatten(0, -2)[rows]

    return record


@contextmanager
def _listening(module: nn.Module, listener: Callable[[Tensor], None], *, to_inputs: bool) -> Iterator[None]:
    """Calls `listener` with the first input or output of `module` that is a tensor."""

    def first(values: Any) -> Tensor:
        tensor: Tensor = values[0] if isinstance(values, tuple) else values
        return tensor

    if to_inputs:
        handle = module.register_forward_pre_hook(lambda _, inputs: listener(first(inputs)))
    else:
        handle = module.register_forward_hook(lambda _, __, output: listener(first(output)))
    try:
        yield
    finally:
        handle.remove()


def _to(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
