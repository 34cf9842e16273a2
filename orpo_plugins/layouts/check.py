"""The self-check of a layout: one batch through it and through *padded*, before a run trusts it.

report = check_layout(model, pairs, layout, pad_token_id=0)
if not report.passed:
    raise ModelError(report.message())        # or fall back to padded, where the user asked for "auto"
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from orpo_plugins.forward import check_vocabulary, orpo_forward
from orpo_plugins.hooks import plugins
from orpo_plugins.hooks.layout import Layout
from orpo_plugins.hooks.types import Pair, TokenSequence
from orpo_plugins.layouts.shared import common_prefix
from orpo_plugins.models.checks import examine
from orpo_plugins.models.head import evaluating, head_options, output_head, text_config_of, unwrap_model
from orpo_plugins.targets import targets_of

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}
"""By the coarsest dtype of a computation: what a row may differ by, relative to its length.

About ten times what right layouts show, since other kernels and shapes add up in another order.
"""
LOW_PRECISION_TOLERANCE = 1e-3
"""Tolerances above are those of 16 bits and fewer."""
LAYER_SHARE = 0.25
"""What one layer may differ by, as a part of the tolerance for all of them.

Measured in bf16 on random models of up to 24 layers, as parts of that tolerance: right layers differ by at most 0.11,
wrong ones by 3.6 and more.
"""
_QUANTILE = 0.9
"""A router near a tie may send a few rows to other experts in low precision, and those rows differ in earnest."""


@dataclass(frozen=True, kw_only=True)
class LayoutReport:
    """How far a layout is from *padded* on one batch."""

    layout: str
    dtype: torch.dtype
    """The coarsest of hidden states, weights and autocast."""
    row_difference: float
    """|difference| / |row| of the last hidden states: nine rows in ten are below, and those where some pair's rejected
    answer begins."""
    loss_difference: float
    """Absolute."""
    tolerance: float
    """For all differences."""
    layer_difference: float | None = None
    """The same for each layer by itself, given the inputs that it has under *padded*, and for the loss of the last
    one's outputs; the largest.  None where the two differences above are within the tolerance on all ranks."""
    first_layer: str | None = None
    """The first layer that differs by itself, with its kind; None where none does."""

    @property
    def passed(self) -> bool:
        """Whether the layout may be used.  NaN does not pass."""
        return self._agrees or self._agrees_by_layers

    @property
    def _agrees(self) -> bool:
        return self.row_difference <= self.tolerance and self.loss_difference <= self.tolerance

    @property
    def _agrees_by_layers(self) -> bool:
        """In 16 bits a chain of right layers may end anywhere: routers send rows near a tie to other experts."""
        if self.layer_difference is None or not math.isfinite(self.row_difference + self.loss_difference):
            return False
        return self.tolerance > LOW_PRECISION_TOLERANCE and self.layer_difference <= LAYER_SHARE * self.tolerance

    def message(self) -> str:
        """The finding and the remedy, for the log or an error."""
        verdict = "agrees with" if self.passed else "differs from"
        text = (
            f"layout {self.layout!r} {verdict} 'padded' on the first batch: hidden states by {self.row_difference:.1e} "
            f"relative, the loss by {self.loss_difference:.1e} ({self.dtype}, tolerance {self.tolerance:.0e})"
        )
        if self._agrees:
            return text
        if self.passed:
            return (
                f"{text}. More than the tolerance is the rounding of {self.dtype} here, which grows from layer to "
                f"layer: with the inputs of 'padded', no layer differs by more than {self.layer_difference:.1e} "
                f"(tolerance {LAYER_SHARE * self.tolerance:.0e})"
            )
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
    on_any_rank: Callable[[bool], bool] = bool,
) -> LayoutReport:
    """Compares `layout` with *padded* on `pairs`, without gradient and dropout; two forward passes.

    Two more follow where they differ, with the inputs of each layer under *padded* put into the same layer under
    `layout`: so rounding does not add up from layer to layer, and the layer at fault is the first that differs.

    Args:
        model: may be wrapped; the layout must have been prepared for it.
        pairs: few and short ones do; with a rejected answer, since layouts treat it differently.
        layout: `plugins.layout(name)`.
        pad_token_id, nll_over, kernel: as in training; run it under the same autocast too.
        on_any_rank: on several ranks call this function on all of them, and tell with this one, a collective, whether
            a value is true on any.  A sharded model needs the same passes everywhere.
    """
    layouts = (plugins.layout(plugins.REFERENCE_LAYOUT), layout)

    def collated(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
        device = next(model.parameters()).device
        return [_to(one.collate(pairs, pad_token_id=pad_token_id, nll_over=nll_over), device) for one in layouts]

    batches, wholes = collated(pairs), collated([_all_answer(pair) for pair in pairs])
    beginnings = _beginnings(pairs)
    if not all(torch.equal(one["input_ids"], whole["input_ids"]) for one, whole in zip(batches, wholes, strict=True)):
        wholes, beginnings = batches, []  # a plugin's layout that goes by the labels: what predicts something, then
    check_vocabulary(model, batches[0]["input_ids"], targets_of(batches[0]).token_ids)
    with torch.no_grad(), evaluating(model):
        examine(model, batches[0])  # what runs the model on a few tokens must not pass by the hooks below
        if kernel != "reference":
            head_options(model, batches[0]["input_ids"])
        expected, found = (
            _run(model, one, batch, targets_of(whole).positions, kernel)
            for one, batch, whole in zip(layouts, batches, wholes, strict=True)
        )
        report = LayoutReport(
            layout=layout.name,
            dtype=found.dtype,
            row_difference=row_difference(found.hidden, expected.hidden, beginnings),
            loss_difference=abs(found.loss - expected.loss),
            tolerance=_tolerance(found.dtype),
        )
        if not on_any_rank(not report.passed):
            return report
        by_layers = _layer_by_layer(model, layouts, wholes, beginnings, kernel)
    limit = LAYER_SHARE * report.tolerance
    return replace(
        report,
        layer_difference=max(by_layers.values(), key=lambda value: math.inf if math.isnan(value) else value),
        first_layer=next((name for name, value in by_layers.items() if name != _LOSS and not value <= limit), None),
    )


def row_difference(found: Tensor, expected: Tensor, beginnings: Sequence[Sequence[int]] = ()) -> float:
    """The 0.9 quantile over rows [N, H] of |found - expected| / |expected|; NaN where any is.

    Or the least of one of the `beginnings`, numbers of rows of which each pair has one, where it is more: a layout that
    is wrong there is so in all pairs, a router near a tie in one of them.
    """
    found, expected = found.double(), expected.double()
    relative = (found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-30)
    values = [relative.quantile(_QUANTILE), *(relative[list(rows)].amin() for rows in beginnings if rows)]
    return float(torch.stack(values).amax())


@dataclass(frozen=True, kw_only=True, eq=False)
class _Run:
    hidden: Tensor
    """[N, H]: of every token but sequences' last ones; layouts list them in one order."""
    loss: float
    dtype: torch.dtype


def _run(model: nn.Module, layout: Layout, batch: dict[str, Any], rows: Tensor, kernel: str) -> _Run:
    seen: list[tuple[Tensor, torch.dtype]] = []

    def listen(_: Any, inputs: tuple[Tensor, ...]) -> None:
        seen.append((inputs[0].flatten(0, -2)[rows], _coarsest(model, inputs[0])))

    with output_head(model).register_forward_pre_hook(listen), layout.forward_context(model):
        loss = orpo_forward(model, batch, kernel=kernel).loss
    hidden, dtype = seen[-1]
    return _Run(hidden=hidden, loss=float(loss), dtype=dtype)


def _coarsest(model: nn.Module, hidden: Tensor) -> torch.dtype:
    """Of what takes part in a forward pass: norms in fp32 make nothing exact of linear maps in bf16."""
    dtypes = [hidden.dtype, *(p.dtype for p in model.parameters() if p.is_floating_point())]
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        dtypes.append(torch.get_autocast_dtype(kind))
    # Of quantized layers, whose weights are integers.
    computed = (getattr(module, "compute_dtype", None) for module in model.modules())
    dtypes += [dtype for dtype in computed if isinstance(dtype, torch.dtype)]
    return max(dtypes, key=_tolerance)


def _tolerance(dtype: torch.dtype) -> float:
    return TOLERANCES.get(dtype, TOLERANCES[torch.bfloat16])


# ---- each layer by itself

_LOSS = "the loss"


def _all_answer(pair: Pair) -> Pair:
    """The pair with every token in its answer, so that the table of predictions has a target for each of them."""
    chosen, rejected = pair.chosen.input_ids, pair.rejected.input_ids
    return Pair(
        chosen=TokenSequence(input_ids=chosen, labels=chosen),
        rejected=TokenSequence(input_ids=rejected, labels=rejected),
    )


def _beginnings(pairs: Sequence[Pair]) -> list[list[int]]:
    """Lines of the table for the pairs' first rejected token, and for the first that is not the chosen one's.

    A short convolution that runs on from what stands before moves these alone, which are too few for a quantile.
    """
    first, apart, target = [], [], 0
    for pair in pairs:
        chosen, rejected = pair.chosen.input_ids, pair.rejected.input_ids
        target += len(chosen) - 1
        shared, targets = common_prefix(chosen, rejected), max(0, len(rejected) - 1)
        first += [target] if targets else []
        apart += [target + shared] if shared < targets else []
        target += targets
    return [first, apart]


def _layer_by_layer(
    model: nn.Module,
    layouts: Sequence[Layout],
    batches: Sequence[dict[str, Any]],
    beginnings: Sequence[Sequence[int]],
    kernel: str,
) -> dict[str, float]:
    """How far the output of each layer is from *padded*'s, given *padded*'s inputs; and the loss, given its last.

    A layer's output is looked at where it goes into the next one, or into the head.  No target of the table has a
    sequence's last row, whose hidden states stay the layout's own: none of the other rows attends to it.
    """
    padded, other = layouts
    layers, head = list(_layers(unwrap_model(model))), output_head(model)
    stages = [*(layer for _, layer in layers), head]
    names = ["the embeddings", *_descriptions(model, layers)]
    inputs: dict[int, Tensor] = {}
    differences: dict[str, float] = {}

    def record(stage: int, rows: Tensor, total: int) -> Callable[..., Any]:
        def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = _first_tensor(args, kwargs, total)
            if hidden is not None:
                inputs[stage] = hidden.flatten(0, -2)[rows]

        return hook

    def compare(stage: int, rows: Tensor, total: int) -> Callable[..., Any]:
        def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = _first_tensor(args, kwargs, total)
            if hidden is None or stage not in inputs:
                return None
            flat = hidden.flatten(0, -2).clone()
            differences[names[stage]] = row_difference(flat[rows], inputs[stage], beginnings)
            flat[rows] = inputs[stage].to(flat.dtype)
            given = flat.view_as(hidden)
            return (
                tuple(given if value is hidden else value for value in args),
                {key: given if value is hidden else value for key, value in kwargs.items()},
            )

        return hook

    losses = []
    for layout, batch, look in ((padded, batches[0], record), (other, batches[1], compare)):
        rows, total = targets_of(batch).positions, batch["input_ids"].numel()
        with ExitStack() as stack:
            for stage, module in enumerate(stages):
                stack.enter_context(module.register_forward_pre_hook(look(stage, rows, total), with_kwargs=True))
            stack.enter_context(layout.forward_context(model))
            losses.append(float(orpo_forward(model, batch, kernel=kernel).loss))
    return {**differences, _LOSS: abs(losses[1] - losses[0])}


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any], total: int) -> Tensor | None:
    """The hidden states among a module's arguments: [R, S, H] or [R * S, H], with `total` = R * S."""
    for value in (*args, kwargs.get("hidden_states")):
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1:
            return value if value.shape[:-1].numel() == total else None
    return None


def _descriptions(model: nn.Module, layers: Sequence[tuple[str, nn.Module]]) -> list[str]:
    """Name, class and `layer_types` entry of each layer."""
    kinds = getattr(text_config_of(model), "layer_types", None) or ()
    return [
        f"{name} ({type(layer).__name__}{f', {kinds[index]}' if index < len(kinds) else ''})"
        for index, (name, layer) in enumerate(layers)
    ]


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The entries of the longest list of modules that is in no other list: a decoder's layers."""
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in lists):
            lists[name] = module
    name, layers = max(lists.items(), key=lambda item: len(item[1]), default=("", nn.ModuleList()))
    return ((f"{name}.{index}", layer) for index, layer in enumerate(layers))


def _to(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
