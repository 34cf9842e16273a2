"""One ORPO step: a batch through a model, the objective out of it.  Every adapter and every hand-written loop is here.

out = orpo_forward(model, collator(rows), beta=0.1)
out.loss.backward()
"""

import functools
import weakref
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from orpo_plugins.denominators import Denominators, counts_of, own_denominators
from orpo_plugins.errors import BatchError, ConfigError, ModelError
from orpo_plugins.hooks import plugins
from orpo_plugins.hooks.layout import Layout
from orpo_plugins.hooks.types import HeadOptions, HeadResult, Objective
from orpo_plugins.kernels.reference import objective_of_logits
from orpo_plugins.kernels.run import run_kernel
from orpo_plugins.models.checks import check_gradient, check_model
from orpo_plugins.models.head import (
    attention_implementation,
    config_of,
    final_bias_taken_out,
    head_options,
    head_parameters,
    is_encoder_decoder,
    logits_of,
    output_head,
    replaced_forward,
    row_numbers,
    unwrap_model,
)
from orpo_plugins.models.router import add_router_loss
from orpo_plugins.models.virtual_tokens import own_positions
from orpo_plugins.objective import ORPOOutput, PairLogps, odds_ratio_loss, output_of
from orpo_plugins.options import NLLNormalization, ORPOOptions
from orpo_plugins.targets import Targets, targets_of

STEP_TOTALS = "orpo_step_totals"
"""The key under which a batch of a Trainer's loop carries the `Denominators` of its optimizer step."""
_NOT_FOR_THE_MODEL = ("labels", "shift_labels", STEP_TOTALS)
_supported: "weakref.WeakKeyDictionary[nn.Module, set[tuple[str, str | None]]]" = weakref.WeakKeyDictionary()
"""Of every model, the layouts that it was found to run, each with the attention implementation it had then."""


def orpo_forward(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    beta: float = 0.1,
    odds_temperature: float = 1.0,
    kernel: str = "auto",
    nll_normalization: NLLNormalization = "batch",
    loss_terms: Mapping[str, float] | None = None,
    nll_tokens: Tensor | float | None = None,
    num_pairs: Tensor | float | None = None,
    num_examples: Tensor | float | None = None,
    totals: Denominators | None = None,
    memory_budget: int | None = None,
) -> ORPOOutput:
    """Runs `model` on a batch of `ORPOCollator` with a fused head and returns the objective.

        loss = sum(NLL of the chosen rows) / nll_tokens
             + sum over pairs of -beta * log sigmoid(odds_temperature * log_odds - margin) / num_pairs

    A pair of weight w counts as w pairs that are alike, in sums and denominators; one without a rejected answer counts
    in the NLL alone.

    Args:
        model: a causal LM or encoder-decoder model of transformers, bare or wrapped (PEFT, DDP, FSDP2, DeepSpeed,
            torch.compile).
        batch: what `ORPOCollator` returned, on the model's device: `input_ids` [R, S], masks or positions, `labels`
            [N, 4] (or [N, 5]) and `shift_labels` [2B, L].
        beta: the paper's lambda, >= 0.
        odds_temperature: multiplies the log odds ratio inside the sigmoid, > 0.
        kernel: "auto", "reference" (the model's own logits, all at once), "chunked", "chunked_fp32" (16-bit operands
            multiplied in fp32), "triton" or a plugin's name.
        nll_normalization: "batch" and "microbatch" divide by tokens, "pair" means per answer and divides by pairs.
        loss_terms: per-pair terms of plugins to add, {name: weight}.
        nll_tokens: the NLL's denominator; default: this batch's NLL tokens.
        num_pairs: the same for pairs that have a rejected answer; default: this batch's.
        num_examples: the same for all pairs, for `nll_normalization="pair"`; default: `num_pairs`, or this batch's.
        totals: these three at once, from `step_totals`: under gradient accumulation and data parallelism, those of the
            whole optimizer step.
        memory_budget: bytes that the kernel may hold beyond inputs and gradients.

    Returns:
        `ORPOOutput`; `metrics` holds `chosen_lengths`, `rejected_lengths`, `weights` [B], `nll_tokens` and, for a
        mixture of experts with `output_router_logits`, `aux_loss`, whose multiple is in the loss.

    Raises:
        BatchError: a batch that does not come from `ORPOCollator`, rows longer than the model's table of positions, or
            a model that returns another number of positions than it was given (virtual tokens of PEFT are left out).
        ConfigError: an unknown kernel, term or normalization.
        ModelError: a head that cannot be fused, a model that cannot run in the batch's layout or is not causal, and in
            training mode one whose loss reaches no parameter; the message says what to do.
    """
    options = ORPOOptions(
        beta=beta,
        odds_temperature=odds_temperature,
        kernel=kernel,
        nll_normalization=nll_normalization,
        loss_terms=loss_terms or {},
        memory_budget=memory_budget,
    )
    targets = targets_of(batch)
    given = (nll_tokens, num_pairs, num_examples)
    if totals is not None and given != (None, None, None):
        raise ConfigError("totals holds nll_tokens, num_pairs and num_examples: pass it alone, or these")
    own = own_denominators(targets) if totals is None else totals
    totals = Denominators(
        nll_tokens=own.nll_tokens if nll_tokens is None else nll_tokens,
        num_pairs=own.num_pairs if num_pairs is None else num_pairs,
        num_examples=num_examples if num_examples is not None else own.num_examples if num_pairs is None else num_pairs,
    )
    return forward_with_options(model, batch, options, targets, totals)


def forward_with_options(
    model: nn.Module,
    batch: Mapping[str, Any],
    options: ORPOOptions,
    targets: Targets,
    totals: Denominators,
) -> ORPOOutput:
    """`orpo_forward` with everything decided: what adapters call."""
    objective = Objective(
        nll_weights=nll_weights(targets, options, totals),
        pair_loss=functools.partial(pair_loss, options=options, targets=targets, totals=totals),
    )
    inputs = {key: value for key, value in batch.items() if key not in _NOT_FOR_THE_MODEL}
    check_vocabulary(model, inputs["input_ids"], targets.token_ids)
    layout = layout_of(inputs)
    inputs = layout.model_inputs(model, inputs)
    if is_encoder_decoder(model) and "decoder_input_ids" not in inputs:
        raise BatchError(
            f"{type(unwrap_model(model)).__name__} is an encoder-decoder model, but the batch has no inputs for its "
            "decoder: make it with ORPOCollator(..., layout='seq2seq')"
        )
    if layout.batch_key is not None:
        check_support(model, layout)
    # These run the model on a few tokens without the layout's inputs: not in its context.
    check_model(model, inputs, layout.longest_sequence(inputs))
    run = run_reference if options.kernel == "reference" else run_fused
    if run is run_fused:
        head_options(model, inputs["input_ids"], row_numbers(inputs))
    with layout.forward_context(model):
        result, outputs, logit_means = run(model, inputs, targets, objective, options)
    if model.training and torch.is_grad_enabled():
        check_gradient(result.loss, model)
    return add_router_loss(make_output(result, targets, options, logit_means), outputs, model, targets, totals)


def check_vocabulary(model: nn.Module, *tokens: Tensor) -> None:
    """Raises `BatchError` for a token that the model has no embedding for.

    On a CPU, where looking costs nothing; an accelerator asserts in the embedding itself.
    """
    size = getattr(config_of(model), "vocab_size", None)
    if size is None or tokens[0].device.type != "cpu":
        return
    largest = int(torch.cat([ids.flatten() for ids in tokens]).max())
    if largest >= size:
        raise BatchError(
            f"token {largest} is outside the model's vocabulary of {size}: the tokenizer has more tokens than the "
            "model. Call model.resize_token_embeddings(len(tokenizer)), or use the tokenizer that belongs to the model"
        )


def layout_of(inputs: Mapping[str, Any]) -> Layout:
    """The layout whose `batch_key` a batch has, or else the one that asks nothing of the forward pass."""
    marked = (layout for layout in plugins.layouts() if layout.batch_key in inputs)
    return next(marked, None) or plugins.layout(plugins.REFERENCE_LAYOUT)


def check_support(model: nn.Module, layout: Layout) -> None:
    """Raises `ModelError` for a model that cannot run in a batch's layout.

    Asks once per model and layout, and again where the attention implementation is another one since.
    """
    supported = _supported.setdefault(model, set())
    asked = (layout.name, attention_implementation(model))
    if asked in supported:
        return
    if reason := layout.unsupported(model):
        kind = type(unwrap_model(model)).__name__
        raise ModelError(f"{kind} cannot run in the layout of this batch: {reason}. Use layout='padded'")
    supported.add(asked)


def nll_weights(targets: Targets, options: ORPOOptions, totals: Denominators) -> Tensor:
    """fp32 [N]: what each target's NLL weighs in the loss."""
    in_nll = targets.in_nll.float()
    weighted = in_nll if targets.weights is None else in_nll * targets.weights
    if options.nll_normalization == "pair":
        per_sequence = targets.sum_by_sequence(in_nll).clamp(min=1)
        return weighted / (per_sequence[targets.sequence_ids] * totals.num_examples)
    return weighted / totals.nll_tokens


def pair_loss(pairs: PairLogps, *, options: ORPOOptions, targets: Targets, totals: Denominators) -> Tensor:
    """The odds-ratio term and the selected plugin terms, summed over pairs by weight and divided by `num_pairs`."""
    margins = targets.pair_margins()
    paired = pairs.rejected_lengths > 0
    pairs = stand_ins(pairs, paired)
    per_pair = odds_ratio_loss(
        pairs,
        beta=options.beta,
        odds_temperature=options.odds_temperature,
        margins=0.0 if margins is None else margins,
    )
    for name, weight in options.loss_terms.items():
        per_pair = per_pair + weight * plugins.loss_term(name).compute(pairs)
    return (per_pair * paired * targets.pair_weights()).sum() / totals.num_pairs


def stand_ins(pairs: PairLogps, paired: Tensor) -> PairLogps:
    """`pairs` with any number at all in place of pairs that have no rejected answer.

    What a term makes of them is thrown away, but its gradient must not be NaN, nor reach the chosen answer.
    """
    return PairLogps(
        chosen=torch.where(paired, pairs.chosen, -1.0),
        rejected=torch.where(paired, pairs.rejected, -1.0),
        chosen_lengths=pairs.chosen_lengths.clamp(min=1),
        rejected_lengths=pairs.rejected_lengths.clamp(min=1),
    )


def loss_term_values(logps: Tensor, targets: Targets, options: ORPOOptions) -> dict[str, Tensor]:
    """[B] each: the terms of plugins, by "loss_terms/" and their names, from detached `logps` [2B]."""
    (chosen, rejected), lengths = logps.view(2, -1), targets.answer_lengths().view(2, -1)
    pairs = PairLogps(chosen=chosen, rejected=rejected, chosen_lengths=lengths[0], rejected_lengths=lengths[1])
    pairs = stand_ins(pairs, lengths[1] > 0)
    return {f"loss_terms/{name}": plugins.loss_term(name).compute(pairs).detach() for name in options.loss_terms}


Run = tuple[HeadResult, Any, Tensor | None]


def run_reference(
    model: nn.Module, inputs: Mapping[str, Any], targets: Targets, objective: Objective, options: ORPOOptions
) -> Run:
    """The model's own logits, whatever it does to them."""
    output_head(model)
    outputs = model(**inputs, use_cache=False)
    logits = own_positions(logits_of(outputs), model, inputs)
    means = None
    if options.logit_means:
        means = _by_side(logits.detach().float().mean(-1), targets, inputs)
    return objective_of_logits(logits.flatten(0, -2)[targets.positions], targets, objective), outputs, means


def run_fused(
    model: nn.Module, inputs: Mapping[str, Any], targets: Targets, objective: Objective, options: ORPOOptions
) -> Run:
    """The kernel in the place of `lm_head`."""
    transform = head_options(model, inputs["input_ids"])
    head = output_head(model)
    capped_means = options.logit_means and transform.softcap is not None
    transform = replace(transform, memory_budget=options.memory_budget, logit_means=capped_means)
    computed: list[tuple[HeadResult, Tensor | None]] = []

    def forward(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        weight, bias = head_parameters(head)
        if final_bias is not None:
            bias = final_bias.to(weight) if bias is None else (bias + final_bias.to(weight.device)).to(weight.dtype)
        hidden = own_positions(hidden, model, inputs)
        result = run_kernel(options.kernel, hidden.flatten(0, -2), weight, bias, targets, objective, transform)
        means = None
        if options.logit_means and result.logit_means is not None:
            means = _by_side_of_targets(result.logit_means, targets)
        elif options.logit_means:
            means = _linear_means(hidden, weight, bias, transform).to(targets.positions.device)
            means = _by_side(means, targets, inputs)
        computed.append((result, means))
        return result.loss.reshape(1, 1, 1)

    with replaced_forward(head, forward), final_bias_taken_out(model) as final_bias:
        outputs = model(**inputs, use_cache=False)
    if len(computed) != 1:
        raise BatchError(f"lm_head was called {len(computed)} times in one forward pass instead of once")
    result, means = computed[0]
    returned = logits_of(outputs).reshape(())
    if transform.softcap is None and transform.logit_scale == 1.0:
        return replace(result, loss=returned), outputs, means
    # The model has bent what the head returned.  Wrappers hang their backward hooks (FSDP2, ZeRO-3) on the model's
    # outputs, so the graph must pass through them: with weight zero.
    return replace(result, loss=result.loss + 0.0 * returned), outputs, means


@torch.no_grad()
def _linear_means(hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: HeadOptions) -> Tensor:
    """[R, S]: the mean over the vocabulary of every row's logits, which without a soft-cap is linear."""
    # One product with the mean row of the weight.
    mean_row = weight.mean(0, dtype=torch.float32)
    offset = 0.0 if bias is None else bias.mean(dtype=torch.float32)
    return (hidden.detach().float() @ mean_row + offset) * transform.logit_scale


def _by_side(means: Tensor, targets: Targets, inputs: Mapping[str, Any]) -> Tensor:
    """[2]: mean over the chosen and over the rejected rows, as TRL has it.

    Padding counts, and the last row of a sequence does not; a decoder with an encoder has no such row.
    """
    if means.shape[0] == 2 * targets.num_pairs:
        last = None if "decoder_input_ids" in inputs else -1
        return means[:, :last].reshape(2, -1).mean(1)
    return _by_side_of_targets(means.flatten()[targets.positions], targets)


def _by_side_of_targets(means: Tensor, targets: Targets) -> Tensor:
    """[2]: the same over the targets of the table, for layouts without padding."""
    rejected = (targets.sequence_ids >= targets.num_pairs).float()
    sides = torch.stack([1.0 - rejected, rejected])
    return (sides @ means.to(sides.dtype)) / sides.sum(1).clamp(min=1)


def make_output(result: HeadResult, targets: Targets, options: ORPOOptions, logit_means: Tensor | None) -> ORPOOutput:
    """The figures of a head's result."""
    lengths, margins = targets.answer_lengths().view(2, -1), targets.pair_margins()
    metrics = {
        "chosen_lengths": lengths[0],
        "rejected_lengths": lengths[1],
        "weights": targets.pair_weights(),
        "nll_tokens": counts_of(targets)[0],
    }
    metrics |= loss_term_values(result.logps, targets, options)
    if logit_means is not None:
        metrics |= {"chosen_logits": logit_means[0], "rejected_logits": logit_means[1]}
    return output_of(
        loss=result.loss,
        nll_loss=result.nll_loss,
        logps=torch.where(lengths.flatten() > 0, result.logps, torch.nan),
        odds_temperature=options.odds_temperature,
        margins=0.0 if margins is None else margins,
        metrics=metrics,
    )
