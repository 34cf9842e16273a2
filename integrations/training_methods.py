"""The methods of transformers' `Trainer` that ORPO changes, as a mixin.

`ORPOTrainer`, Axolotl's trainer and `fuse_head` for a stock `Trainer` all are this mixin over their own base.
"""

import itertools
import logging
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers.trainer_utils import has_length

from orpo_plugins.errors import ConfigError, ModelError
from orpo_plugins.forward import (
    Denominators,
    ORPOOptions,
    counts_of,
    forward_with_options,
    own_denominators,
    predictions_of,
    router_coefficient,
)
from orpo_plugins.head import keep_four_bit_trainable
from orpo_plugins.integrations.before_training import (
    BeforeTraining,
    check_rows,
    checked_layout,
    tokens_of_a_batch,
    tokens_of_an_epoch,
    without_checkpointing,
)
from orpo_plugins.integrations.metrics import MetricSums, figures_of
from orpo_plugins.integrations.pair_loader import loader, pair_batches
from orpo_plugins.model_checks import check_trainable
from orpo_plugins.objective import ORPOOutput

logger = logging.getLogger(__name__)


_LOSS = "a loss term or a metric of a plugin (docs/plugins.md), or compute_loss"
_NOT_CALLED = {
    "build_tokenized_answer": "tokenized rows, or a row format of a plugin (docs/plugins.md)",
    "tokenize_row": "tokenized rows, or a row format of a plugin (docs/plugins.md)",
    "concatenated_inputs": "data_collator",
    "concatenated_forward": _LOSS,
    "get_batch_logps": _LOSS,
    "get_batch_loss_metrics": _LOSS,
    "odds_ratio_loss": _LOSS,
    "generate_from_model": "evaluation_loop",
}
"""Methods of TRL's trainer that people override and that nothing here calls: what does the same."""


class ORPOMethods:
    """Loss, step totals, evaluation and logging of ORPO over any subclass of `transformers.Trainer`."""

    orpo_options: ORPOOptions
    args: Any
    model: Any
    model_wrapped: Any
    accelerator: Any
    model_accepts_loss_kwargs: bool
    loss_is_scaled_for_ga: bool | None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Raises `ConfigError` for a subclass with a method of TRL's trainer that would never be called."""
        super().__init_subclass__(**kwargs)
        for base in itertools.takewhile(lambda base: base is not ORPOMethods, cls.__mro__):
            for name in _NOT_CALLED.keys() & vars(base).keys():
                raise ConfigError(
                    f"{base.__name__}.{name} would never be called: {cls.__name__} is not built on TRL's trainer. In "
                    f"its place: {_NOT_CALLED[name]}"
                )

    def set_up_orpo(self, options: ORPOOptions, *, layout_check: bool = True) -> None:
        """Called once, after the base class is initialized; `ConfigError` for an argument that would be ignored."""
        if self.args.label_smoothing_factor:
            raise ConfigError(
                f"label_smoothing_factor is {self.args.label_smoothing_factor}, and ORPO's loss smooths no labels: "
                "leave it out"
            )
        self._keep_batches_whole()
        self.orpo_options = options
        self._sums = {"train": MetricSums(), "eval": MetricSums()}
        self._step_totals: Denominators | None = None
        self._of_the_last_pass: list[Any] = []
        self._layout_is_checked = not layout_check
        self._tokens_are_told = False
        self.add_callback(BeforeTraining(self))  # type: ignore[attr-defined]
        # Who divides by the number of micro-batches: for "microbatch" the Trainer, else our denominators have done it.
        # transformers reads loss_is_scaled_for_ga since 5.19 and model_accepts_loss_kwargs (with a token count) before.
        scaled = options.nll_normalization != "microbatch"
        self.loss_is_scaled_for_ga = scaled
        self.model_accepts_loss_kwargs = scaled
        self.compute_loss_func = None
        keep_four_bit_trainable(self.model)  # type: ignore[attr-defined]
        without_checkpointing(self.model, self.args)

    def _keep_batches_whole(self) -> None:
        """Nobody may cut a batch along its first dimension: it has one table for all of its rows.

        Accelerate would, where it reads a stream once for all ranks (its default, on one rank too), and so would
        DataParallel, which the Trainer takes where one process sees several GPUs.
        """
        loading = self.accelerator.dataloader_config
        if loading.dispatch_batches:
            raise ConfigError(
                "dispatch_batches=True cuts batches apart between ranks, which ORPO's cannot be: leave it out"
            )
        loading.dispatch_batches = False
        if self.args.n_gpu > 1:
            logger.warning(
                "torch.nn.DataParallel cannot split ORPO's batches: training on one of %d GPUs. Launch with "
                "`accelerate launch` or `torchrun` to use them all",
                self.args.n_gpu,
            )
            self.args._n_gpu = 1
            self._train_batch_size = self.args.train_batch_size  # which counted the GPUs

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """Also counts the NLL tokens and pairs of the whole optimizer step, over all ranks, in one reduction.

        Where a stream ends inside a step, its next pass fills the step up.  The Trainer takes no step there: it would
        add the gradient of those batches, normalized as a step of their own, to the next step's.

        Raises `ConfigError` for a stream that ends inside the first step: no step would ever be taken.
        """
        batches, self._of_the_last_pass = self._of_the_last_pass, []
        more, _ = super().get_batch_samples(epoch_iterator, num_batches - len(batches), device)  # type: ignore[misc]
        batches = [*batches, *more]
        if len(batches) < num_batches:
            if batches and not self.state.global_step:  # type: ignore[attr-defined]
                raise ConfigError(
                    f"the training set, a stream, ends after {len(batches)} batches, and gradient_accumulation_steps "
                    f"is {num_batches}: lower it or the batch size, or load the set whole (without streaming=True)"
                )
            self._of_the_last_pass = batches
            return [], None
        self.tell_tokens(batches[0])
        counts = torch.stack([counts_of(predictions_of(batch)) for batch in batches]).sum(0).to(device)
        # The mean, not the sum: data parallelism averages gradients over ranks, which divides once more.
        totals = self.accelerator.reduce(counts, reduction="mean")
        self._step_totals = Denominators.of(totals)
        return batches, totals[0]

    def get_train_dataloader(self) -> Any:
        """Batches by tokens or by length where the arguments ask for them.

        Checks the layout first, where the model is whole: what a pair costs depends on it.
        """
        self._of_the_last_pass = []  # of a run that was interrupted
        if self.train_dataset is None:  # type: ignore[attr-defined]
            return super().get_train_dataloader()  # type: ignore[misc]  # which says that one is needed
        check_trainable(self.model)
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):  # type: ignore[attr-defined]
            self.check_layout(self.model, batches_are_planned=False)
        batches = pair_batches(self)
        return super().get_train_dataloader() if batches is None else loader(self, batches)  # type: ignore[misc]

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        """The set's own order; grouped by length with the training set, predictions would not stand in the rows'."""
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_eval_sampler(eval_dataset)  # type: ignore[misc]
        return SequentialSampler(eval_dataset) if has_length(eval_dataset) else None

    def check_layout(self, model: nn.Module, *, batches_are_planned: bool) -> None:
        """Compares the layout with *padded*, once per run (see `checked_layout`), after a look at model and rows."""
        check_rows(self, model)
        if not self._layout_is_checked:
            checked_layout(self, model, batches_are_planned=batches_are_planned)
        self._layout_is_checked = True  # last: after an error, another call of train() must not go on unchecked

    def tell_tokens(self, first_batch: dict[str, Any] | None = None) -> None:
        """Says once, on the main process, what the layout costs: in an epoch, or in the first batch of it."""
        if self._tokens_are_told or not self.is_world_process_zero():  # type: ignore[attr-defined]
            return
        text = tokens_of_an_epoch(self) if first_batch is None else tokens_of_a_batch(self, first_batch)
        if text is not None:
            logger.warning("%s", text)  # as loud as the line that says that ORPO is active
        self._tokens_are_told = text is not None or first_batch is not None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss of one micro-batch; its figures go into the running sums."""
        output = self.orpo_output(model, inputs, "train")
        loss = output.loss.to(self.args.device)
        return (loss, output) if return_outputs else loss

    def orpo_output(self, model: nn.Module, inputs: dict[str, Any], split: str) -> ORPOOutput:
        """One forward pass and its figures, summed under `split`."""
        predictions = predictions_of(inputs)
        pairs = predictions.num_pairs if split == "train" else self._pairs_of_the_set(predictions.num_pairs)
        if pairs < predictions.num_pairs:
            counted = predictions.sequences % predictions.num_pairs < pairs
            weights = 1.0 if predictions.weights is None else predictions.weights
            predictions = replace(predictions, weights=counted * weights)
        totals = own_denominators(predictions)
        if split == "train" and self.orpo_options.nll_normalization != "microbatch" and self._step_totals is not None:
            totals = self._step_totals
        output = forward_with_options(model, inputs, self.orpo_options, predictions, totals)
        self._sums[split].add(figures_of(output, self.orpo_options, totals))
        return output

    def _pairs_of_the_set(self, num_pairs: int) -> int:
        """How many pairs of an evaluation batch count: a set's first ones are repeated until all ranks have some."""
        state = self.accelerator.gradient_state
        if self.accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return num_pairs
        before = self.accelerator.process_index * num_pairs
        return int(min(max(state.remainder - before, 0), num_pairs))

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(loss, [B, 2] mean log-probabilities of chosen and rejected, [B] zeros: the index of the better answer)."""
        inputs = self._prepare_inputs(inputs)  # type: ignore[attr-defined]
        with torch.no_grad(), self.compute_loss_context_manager():  # type: ignore[attr-defined]
            output = self.orpo_output(model, inputs, "eval")
        loss = output.loss.detach()
        if prediction_loss_only:
            return loss, None, None
        logps = torch.stack([output.chosen_logps, output.rejected_logps], dim=1)
        return loss, logps, torch.zeros_like(logps[:, 0])

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """The base loop, with our figures among its metrics (so that `metric_for_best_model` finds them).

        Unless the normalization is per micro-batch, `{prefix}_loss` is computed from the sums over the whole set,
        which does not depend on how it was cut into batches.
        """
        sums = self._sums["eval"] = MetricSums()
        output = super().evaluation_loop(  # type: ignore[misc]
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        figures = sums.pop(self.accelerator)
        if figures and self.orpo_options.nll_normalization != "microbatch" and not self.orpo_options.loss_terms:
            whole = figures["nll_loss"] - self.orpo_options.beta * figures["log_odds_ratio"]
            output.metrics[f"{metric_key_prefix}_loss"] = whole + self._router_share(figures)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in figures.items()})
        return output

    def _router_share(self, figures: dict[str, float]) -> float:
        return router_coefficient(self.model) * figures["aux_loss"] if "aux_loss" in figures else 0.0  # type: ignore[attr-defined]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means since the last training log; evaluation brings its own."""
        if "loss" in logs:
            figures = self._sums["train"].pop(self.accelerator)
            self._check_finite(figures)
            logs.update(figures)
        super().log(logs, start_time)  # type: ignore[misc]

    def end(self) -> None:
        """Closes trackers and the process group, as `Trainer.end` does since transformers 5.18; to be called last.

        What DDP has put around the model goes first.  As the last owner of a gloo group it would wait for the group's
        thread with the interpreter's lock in hand, while that thread may be waiting for the lock.
        """
        self.model_wrapped = self.model
        self.accelerator.free_memory()
        self.accelerator.end_training()

    def _check_finite(self, figures: dict[str, float]) -> None:
        """Raises `ModelError` once the loss has become NaN or infinite, which `logging_nan_inf_filter` would hide.

        Looked at once per log, so that no micro-batch waits for the device.  Under fp16 it is only a warning: there the
        gradient scaler leaves out steps that overflow.
        """
        bad = {name: value for name, value in figures.items() if not math.isfinite(value)}
        if not bad:
            return
        shown = ", ".join(f"{name}={value}" for name, value in sorted(bad.items()))
        message = (
            f"not finite at step {self.state.global_step}: {shown}. Some row's activations have overflowed or the "  # type: ignore[attr-defined]
            "weights are lost: resume from the last checkpoint with a lower learning rate, and with bf16 or fp32 in "
            "place of fp16"
        )
        if getattr(self.accelerator, "scaler", None) is None:
            raise ModelError(message)
        logger.warning("%s", message)
