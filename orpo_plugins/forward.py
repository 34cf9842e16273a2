"""One ORPO step: it runs a model on a batch and computes the objective.  All trainers and a user's own loop use it.

out = orpo_forward(model, collator(rows), beta=0.1)
out.loss.backward()
"""

import functools
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
from orpo_plugins.models.state import state_of
from orpo_plugins.models.virtual_tokens import own_positions
from orpo_plugins.objective import ORPOOutput, PairLogps, odds_ratio_loss, output_of
from orpo_plugins.options import NLLNormalization, ORPOOptions
from orpo_plugins.targets import Targets, targets_of

STEP_TOTALS = "orpo_step_totals"
"""The key under which a batch of a Trainer's loop carries the `Denominators` of its optimizer step."""
_NOT_FOR_THE_MODEL = ("labels", "shift_labels", STEP_TOTALS)


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

        loss = sum(NLL of the chosen sequences) / nll_tokens
             + sum over pairs of -beta * log sigmoid(odds_temperature * log_odds - margin) / num_pairs

    A pair of weight w counts as w equal pairs, in sums and denominators.  A pair without a rejected answer counts in
    the NLL only.

    Args:
        model: a causal LM or encoder-decoder model of transformers, bare or wrapped (PEFT, DDP, FSDP2, DeepSpeed,
            torch.compile).
        batch: what `ORPOCollator` returned, on the model's device: `input_ids` [R, S], masks or positions, `labels`
            [N, 4] (or [N, 5]) and `shift_labels` [2B, L].
        beta: the paper's lambda, >= 0.
        odds_temperature: multiplies the log odds ratio inside the sigmoid, > 0.
        kernel: "auto", "reference" (the model's own logits, all at once), "chunked", "chunked_fp32" (16-bit operands
            multiplied in fp32), "triton" or the name of a plugin's kernel.
        nll_normalization: "batch" and "microbatch" divide by tokens; "pair" takes the mean of each chosen sequence, and
            divides by pairs.
        loss_terms: per-pair terms of plugins to add, {name: weight}.
        nll_tokens: the NLL's denominator; default: the NLL tokens of this batch.
        num_pairs: the denominator of pairs that have a rejected answer; default: their number in this batch.
        num_examples: the denominator of all pairs, for `nll_normalization="pair"`; default: `num_pairs` if given, else
            their number in this batch.
        totals: these three of a whole optimizer step, from `step_totals`, for gradient accumulation and data
            parallelism.
        memory_budget: bytes that the kernel may hold beyond inputs and gradients.

    Returns:
        `ORPOOutput`; `metrics` holds `chosen_lengths`, `rejected_lengths`, `weights` [B] and `nll_tokens`.  For a
        mixture of experts with `output_router_logits` it also holds `aux_loss`, which the loss contains times its
        coefficient.

    Raises:
        BatchError: the batch does not come from `ORPOCollator`, a row is longer than the model's table of positions, or
            the model returns another number of positions than it was given (virtual tokens of PEFT do not count).
        ConfigError: an unknown kernel, term or normalization.
        ModelError: the head cannot be fused, the model cannot run in the batch's layout or is not causal, or (in
            training mode) the loss reaches no parameter.
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
        raise ConfigError("totals holds nll_tokens, num_pairs and num_examples: pass it alone, or these three")
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
    """`orpo_forward` with its arguments resolved; adapters call this."""
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
    # Outside of the layout's context: these checks run the model on a few tokens, without the layout's inputs.
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

    Checked on a CPU only, where reading values costs nothing; on an accelerator the embedding itself fails.
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
    """The layout whose `batch_key` is in a batch; the reference layout where no key is."""
    marked = (layout for layout in plugins.layouts() if layout.batch_key in inputs)
    return next(marked, None) or plugins.layout(plugins.REFERENCE_LAYOUT)


def check_support(model: nn.Module, layout: Layout) -> None:
    """Raises `ModelError` for a model that cannot run in a batch's layout.

    The layout is asked once per model, and again when the model has another attention implementation.
    """
    supported = state_of(model).layouts
    asked = (layout.name, attention_implementation(model))
    if asked in supported:
        return
    if reason := layout.unsupported(model):
        kind = type(unwrap_model(model)).__name__
        raise ModelError(f"{kind} cannot run in the layout of this batch: {reason}. Use layout='padded'")
    supported.add(asked)


def nll_weights(targets: Targets, options: ORPOOptions, totals: Denominators) -> Tensor:
    """fp32 [N]: the weight of each target's NLL in the loss."""
    in_nll = targets.in_nll.float()
    weighted = in_nll if targets.weights is None else in_nll * targets.weights
    if options.nll_normalization == "pair":
        per_sequence = targets.sum_by_sequence(in_nll).clamp(min=1)
        return weighted / (per_sequence[targets.sequence_ids] * totals.num_examples)
    return weighted / totals.nll_tokens


def pair_loss(pairs: PairLogps, *, options: ORPOOptions, targets: Targets, totals: Denominators) -> Tensor:
    """The odds-ratio term and the chosen terms of plugins: a weighted sum over pairs, divided by `num_pairs`."""
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
    """`pairs`, with constants for pairs that have no rejected answer.

    The value of a term for such a pair is not used.  But its gradient must not be NaN, and must not reach the chosen
    answer.
    """
    return PairLogps(
        chosen=torch.where(paired, pairs.chosen, -1.0),
        rejected=torch.where(paired, pairs.rejected, -1.0),
        chosen_lengths=pairs.chosen_lengths.clamp(min=1),
        rejected_lengths=pairs.rejected_lengths.clamp(min=1),
    )


def loss_term_values(logps: Tensor, targets: Targets, options: ORPOOptions) -> dict[str, Tensor]:
    """{"loss_terms/<name>": [B]} for the chosen terms of plugins, from detached `logps` [2B]."""
    (chosen, rejected), lengths = logps.view(2, -1), targets.answer_lengths().view(2, -1)
    pairs = PairLogps(chosen=chosen, rejected=rejected, chosen_lengths=lengths[0], rejected_lengths=lengths[1])
    pairs = stand_ins(pairs, lengths[1] > 0)
    return {f"loss_terms/{name}": plugins.loss_term(name).compute(pairs).detach() for name in options.loss_terms}


Run = tuple[HeadResult, Any, Tensor | None]


def run_reference(
    model: nn.Module, inputs: Mapping[str, Any], targets: Targets, objective: Objective, options: ORPOOptions
) -> Run:
    """The objective from the model's own logits, with everything that the model does to them."""
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
    """The objective from a kernel that replaces `lm_head` during the forward pass."""
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
    # The model has scaled or softcapped the loss that the head returned, so that value is not used.  But its backward
    # must run: wrappers (FSDP2, ZeRO-3) have their hooks on the model's outputs.  So it is added with weight zero.
    return replace(result, loss=result.loss + 0.0 * returned), outputs, means


@torch.no_grad()
def _linear_means(hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: HeadOptions) -> Tensor:
    """[R, S]: the mean over the vocabulary of the logits at every position, for logits without a soft-cap."""
    # A mean of linear functions is linear: one product with the mean row of the weight.
    mean_row = weight.mean(0, dtype=torch.float32)
    offset = 0.0 if bias is None else bias.mean(dtype=torch.float32)
    return (hidden.detach().float() @ mean_row + offset) * transform.logit_scale


def _by_side(means: Tensor, targets: Targets, inputs: Mapping[str, Any]) -> Tensor:
    """[2]: mean over all positions of chosen and of rejected rows, as in TRL.

    Padding counts.  The last position of a row does not, except in the decoder of an encoder.
    """
    if means.shape[0] == 2 * targets.num_pairs:
        last = None if "decoder_input_ids" in inputs else -1
        return means[:, :last].reshape(2, -1).mean(1)
    return _by_side_of_targets(means.flatten()[targets.positions], targets)


def _by_side_of_targets(means: Tensor, targets: Targets) -> Tensor:
    """[2]: mean over the targets of chosen and of rejected sequences, for layouts without padding."""
    rejected = (targets.sequence_ids >= targets.num_pairs).float()
    sides = torch.stack([1.0 - rejected, rejected])
    return (sides @ means.to(sides.dtype)) / sides.sum(1).clamp(min=1)


def make_output(result: HeadResult, targets: Targets, options: ORPOOptions, logit_means: Tensor | None) -> ORPOOutput:
    """The output of a step, from the result of its head."""
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
