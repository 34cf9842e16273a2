"""The self-check of a layout: it must give the same results as *padded* on a first batch.

    report = check_layout(model, pairs, layout, pad_token_id=0)
    if not report.passed:
        raise ModelError(report.message())        # or use padded, if the user asked for "auto"

1. Run the model on the same pairs in both layouts, without gradient and dropout.
2. Compare the last hidden states of every token, and the loss.  If they agree, the layout has passed.
3. If not, find out whether a layer is wrong or whether rounding errors have grown from layer to layer.  Record the
   input of each layer under *padded*.  Then run the other layout, compare each layer's input with the recorded one, and
   replace it by the recorded one:

       padded   embeddings ── layer 0 ── layer 1 ── head
                           x0         x1         x2          recorded
       layout   embeddings ── layer 0 ── layer 1 ── head
                           y0         y1         y2          y1 is compared with x1, then x1 goes on into layer 1

   A right layer now differs by its own rounding alone.  The first layer that differs by more is the wrong one.
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
"""How much hidden states may differ, relative to their norm, by the lowest precision in the model.

About ten times the differences of right layouts, because other kernels and shapes add numbers in another order.
"""
LOW_PRECISION_TOLERANCE = 1e-3
"""Larger tolerances are those of dtypes with 16 bits or fewer."""
LAYER_SHARE = 0.25
"""How much one layer may differ, as a share of the tolerance of the whole model.

Measured in bf16 on random models of up to 24 layers: right layers differ by at most 0.11 of that tolerance, wrong
layers by at least 3.6 times as much as it.
"""
_QUANTILE = 0.9
"""In low precision, a router near a tie may send a few tokens to other experts.  These differ in right layouts too."""


@dataclass(frozen=True, kw_only=True)
class LayoutReport:
    """How much a layout differs from *padded* on one batch."""

    layout: str
    dtype: torch.dtype
    """The lowest precision among hidden states, weights and autocast."""
    row_difference: float
    """Relative difference of the last hidden states (see the function `row_difference`)."""
    loss_difference: float
    """Absolute difference of the loss."""
    tolerance: float
    """Limit of both differences."""
    layer_difference: float | None = None
    """The largest difference of a single layer that gets its inputs from *padded*, the loss included.  None if the two
    differences above are within the tolerance on all ranks."""
    first_layer: str | None = None
    """Name and class of the first layer that differs by itself; None if no layer does."""

    @property
    def passed(self) -> bool:
        """Whether the layout may be used.  NaN does not pass."""
        return self._agrees or self._agrees_by_layers

    @property
    def _agrees(self) -> bool:
        return self.row_difference <= self.tolerance and self.loss_difference <= self.tolerance

    @property
    def _agrees_by_layers(self) -> bool:
        """For 16 bits only: rounding may change the experts of some tokens, and then later layers differ a lot."""
        if self.layer_difference is None or not math.isfinite(self.row_difference + self.loss_difference):
            return False
        return self.tolerance > LOW_PRECISION_TOLERANCE and self.layer_difference <= LAYER_SHARE * self.tolerance

    def message(self) -> str:
        """The result and what to do about it, for the log or an error."""
        verdict = "agrees with" if self.passed else "differs from"
        text = (
            f"layout {self.layout!r} {verdict} 'padded' on the first batch: the hidden states differ by "
            f"{self.row_difference:.1e} (relative), the loss by {self.loss_difference:.1e} ({self.dtype}, tolerance "
            f"{self.tolerance:.0e})"
        )
        if self._agrees:
            return text
        if self.passed:
            return (
                f"{text}. These differences are rounding errors of {self.dtype} that grow from layer to layer: with "
                f"the inputs of 'padded', no layer differs by more than {self.layer_difference:.1e} (tolerance "
                f"{LAYER_SHARE * self.tolerance:.0e})"
            )
        first = self.first_layer
        cause = "No layer differs by itself" if first is None else f"The first layer that differs by itself is {first}"
        return f"{text}. {cause}. Use layout='padded' for this model, and please report it"


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
    """Compares `layout` with *padded* on `pairs`: two forward passes, and two more if the results differ.

    Args:
        model: may be wrapped.  `layout.prepare(model)` must have been called.
        pairs: a few short ones are enough.  At least one needs a rejected answer, which layouts treat differently.
        layout: `plugins.layout(name)`.
        pad_token_id, nll_over, kernel: as in training.  Call this function under the autocast of training, too.
        on_any_rank: for several ranks, a collective that tells whether a value is true on any rank.  All ranks must
            call `check_layout`, because a sharded model needs the same forward passes everywhere.
    """
    layouts = (plugins.layout(plugins.REFERENCE_LAYOUT), layout)

    def collated(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
        device = next(model.parameters()).device
        return [_to(one.collate(pairs, pad_token_id=pad_token_id, nll_over=nll_over), device) for one in layouts]

    # Batches in which every token has a target say where each token stands in the hidden states.
    batches, full_batches = collated(pairs), collated([_all_answer(pair) for pair in pairs])
    rejected_starts = _rejected_starts(pairs)
    if any(not torch.equal(b["input_ids"], full["input_ids"]) for b, full in zip(batches, full_batches, strict=True)):
        # This layout (a plugin's) arranges tokens by their labels.  Compare only the tokens that have a target.
        full_batches, rejected_starts = batches, []
    check_vocabulary(model, batches[0]["input_ids"], targets_of(batches[0]).token_ids)
    with torch.no_grad(), evaluating(model):
        # These two run the model on a few tokens and cache the result.  The hooks below must not see such runs.
        examine(model, batches[0])
        if kernel != "reference":
            head_options(model, batches[0]["input_ids"])
        expected, found = (
            _run(model, one, batch, targets_of(full).positions, kernel)
            for one, batch, full in zip(layouts, batches, full_batches, strict=True)
        )
        report = LayoutReport(
            layout=layout.name,
            dtype=found.dtype,
            row_difference=row_difference(found.hidden, expected.hidden, rejected_starts),
            loss_difference=abs(found.loss - expected.loss),
            tolerance=_tolerance(found.dtype),
        )
        if not on_any_rank(not report.passed):
            return report
        by_layers = _layer_by_layer(model, layouts, full_batches, rejected_starts, kernel)
    limit = LAYER_SHARE * report.tolerance
    return replace(
        report,
        layer_difference=max(by_layers.values(), key=lambda value: math.inf if math.isnan(value) else value),
        first_layer=next((name for name, value in by_layers.items() if name != _LOSS and not value <= limit), None),
    )


def row_difference(found: Tensor, expected: Tensor, rejected_starts: Sequence[Sequence[int]] = ()) -> float:
    """|found - expected| / |expected| for N hidden states [N, H], as one number; NaN if any of them is NaN.

    The largest of these:

    - the 0.9 quantile over all N;
    - for each list in `rejected_starts`, the smallest over its indices.  A list has one index per pair.  A wrong layout
      is wrong there in all pairs, while a router near a tie changes one of them.
    """
    found, expected = found.double(), expected.double()
    relative = (found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-30)
    values = [relative.quantile(_QUANTILE), *(relative[list(start)].amin() for start in rejected_starts if start)]
    return float(torch.stack(values).amax())


@dataclass(frozen=True, kw_only=True, eq=False)
class _Run:
    hidden: Tensor
    """[N, H]: the last hidden states of all tokens but the last of each sequence, in the order of the targets."""
    loss: float
    dtype: torch.dtype


def _run(model: nn.Module, layout: Layout, batch: dict[str, Any], positions: Tensor, kernel: str) -> _Run:
    head_inputs: list[tuple[Tensor, torch.dtype]] = []

    def record(_: Any, inputs: tuple[Tensor, ...]) -> None:
        head_inputs.append((inputs[0].flatten(0, -2)[positions], _lowest_precision(model, inputs[0])))

    with output_head(model).register_forward_pre_hook(record), layout.forward_context(model):
        loss = orpo_forward(model, batch, kernel=kernel).loss
    hidden, dtype = head_inputs[-1]
    return _Run(hidden=hidden, loss=float(loss), dtype=dtype)


def _lowest_precision(model: nn.Module, hidden: Tensor) -> torch.dtype:
    """The dtype with the largest tolerance of all that take part: a norm in fp32 does not make bf16 layers exact."""
    dtypes = [hidden.dtype, *(p.dtype for p in model.parameters() if p.is_floating_point())]
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtypes.append(torch.get_autocast_dtype(device))
    # The weights of quantized layers are integers; such layers name the dtype of their products.
    compute_dtypes = (getattr(module, "compute_dtype", None) for module in model.modules())
    dtypes += [dtype for dtype in compute_dtypes if isinstance(dtype, torch.dtype)]
    return max(dtypes, key=_tolerance)


def _tolerance(dtype: torch.dtype) -> float:
    return TOLERANCES.get(dtype, TOLERANCES[torch.bfloat16])


# ---- each layer by itself

_LOSS = "the loss"


def _all_answer(pair: Pair) -> Pair:
    """The pair with a label on every token, so that there is a target for each token but the first."""
    chosen, rejected = pair.chosen.input_ids, pair.rejected.input_ids
    return Pair(
        chosen=TokenSequence(input_ids=chosen, labels=chosen),
        rejected=TokenSequence(input_ids=rejected, labels=rejected),
    )


def _rejected_starts(pairs: Sequence[Pair]) -> list[list[int]]:
    """Two lists of target numbers, in batches where every token has a target.

    One is of the pairs' first rejected targets, the other of the first rejected targets behind the shared prefix.  If a
    short convolution reads on from the sequence before, only these differ, and they are too few for a quantile.
    """
    first, after_prefix, target = [], [], 0
    for pair in pairs:
        chosen, rejected = pair.chosen.input_ids, pair.rejected.input_ids
        target += len(chosen) - 1
        prefix, rejected_targets = common_prefix(chosen, rejected), max(0, len(rejected) - 1)
        first += [target] if rejected_targets else []
        after_prefix += [target + prefix] if prefix < rejected_targets else []
        target += rejected_targets
    return [first, after_prefix]


def _layer_by_layer(
    model: nn.Module,
    layouts: Sequence[Layout],
    batches: Sequence[dict[str, Any]],
    rejected_starts: Sequence[Sequence[int]],
    kernel: str,
) -> dict[str, float]:
    """Step 3 above: how much each layer differs from *padded* if it gets the inputs of *padded*; and the loss.

    A layer's output is compared where it enters the next layer or the head.  The last token of a sequence has no
    target, so it is neither compared nor replaced; no other token attends to it.
    """
    layers = _named_layers(model)
    stages = [*(layer for _, layer in layers), output_head(model)]
    names = ["the embeddings", *(name for name, _ in layers)]  # of what makes the input of each stage
    inputs: dict[int, Tensor] = {}
    differences: dict[str, float] = {}

    def record(stage: int, positions: Tensor, total: int) -> Callable[..., Any]:
        def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = _hidden_states(args, kwargs, total)
            if hidden is not None:
                inputs[stage] = hidden.flatten(0, -2)[positions]

        return hook

    def compare_and_replace(stage: int, positions: Tensor, total: int) -> Callable[..., Any]:
        def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = _hidden_states(args, kwargs, total)
            if hidden is None or stage not in inputs:
                return None
            flat = hidden.flatten(0, -2).clone()
            differences[names[stage]] = row_difference(flat[positions], inputs[stage], rejected_starts)
            flat[positions] = inputs[stage].to(flat.dtype)
            replaced = flat.view_as(hidden)
            return (
                tuple(replaced if value is hidden else value for value in args),
                {key: replaced if value is hidden else value for key, value in kwargs.items()},
            )

        return hook

    losses = []
    for layout, batch, make_hook in zip(layouts, batches, (record, compare_and_replace), strict=True):
        positions, total = targets_of(batch).positions, batch["input_ids"].numel()
        with ExitStack() as stack:
            for stage, module in enumerate(stages):
                hook = make_hook(stage, positions, total)
                stack.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
            stack.enter_context(layout.forward_context(model))
            losses.append(float(orpo_forward(model, batch, kernel=kernel).loss))
    return {**differences, _LOSS: abs(losses[1] - losses[0])}


def _hidden_states(args: tuple[Any, ...], kwargs: dict[str, Any], total: int) -> Tensor | None:
    """The hidden states among a module's arguments: [R, S, H] or [R * S, H], with `total` = R * S."""
    for value in (*args, kwargs.get("hidden_states")):
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1:
            return value if value.shape[:-1].numel() == total else None
    return None


def _named_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers of the text decoder, each with its name, its class and its entry in `layer_types`."""
    kinds = getattr(text_config_of(model), "layer_types", None) or ()
    return [
        (f"{name} ({type(layer).__name__}{f', {kinds[index]}' if index < len(kinds) else ''})", layer)
        for index, (name, layer) in enumerate(_layers(unwrap_model(model)))
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
