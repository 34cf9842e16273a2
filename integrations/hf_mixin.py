"""The methods of transformers' `Trainer` that ORPO changes, as a mixin.

`ORPOTrainer`, Axolotl's trainer and `fuse_head` for a stock `Trainer` all are this mixin over their own base.
"""

import itertools
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers.trainer_utils import has_length

from orpo_plugins.data.dataset import are_several, as_rows, is_tokenized
from orpo_plugins.denominators import Denominators, own_denominators, step_totals
from orpo_plugins.errors import ConfigError, ModelError
from orpo_plugins.forward import STEP_TOTALS, forward_with_options
from orpo_plugins.integrations.hf_changed_options import LOSS_OPTIONS, Option, changed, differences, values_at
from orpo_plugins.integrations.hf_loader import check_batches, loader, pair_batches
from orpo_plugins.integrations.hf_metrics import MetricSums, metric_sums
from orpo_plugins.integrations.hf_run_start import (
    BeforeTraining,
    batch_cost,
    check_rows,
    checked_layout,
    epoch_cost,
    without_checkpointing,
)
from orpo_plugins.integrations.hf_search import checked_space, evaluation_loss
from orpo_plugins.models.checks import check_trainable
from orpo_plugins.models.head import keep_four_bit_trainable
from orpo_plugins.models.router import router_coefficient
from orpo_plugins.objective import ORPOOutput
from orpo_plugins.options import ORPOOptions
from orpo_plugins.targets import targets_of

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


def overridden(trainer: type, name: str, *, all_of: bool = False) -> str | None:
    """The method of that name which a class behind `ORPOMethods` (or any) has of its own, as "Class.method".

    Classes of transformers are what the mixin was written for, and are no classes of one's own.
    """
    bases = trainer.__mro__ if all_of else trainer.__mro__[trainer.__mro__.index(ORPOMethods) + 1 :]
    own = (
        base for base in bases if name in vars(base) and not base.__module__.startswith(("transformers.", __package__))
    )
    return next((f"{base.__name__}.{name}" for base in own), None)


class ORPOMethods:
    """Loss, step totals, evaluation and logging of ORPO over any subclass of `transformers.Trainer`."""

    args: Any
    train_dataset: Any
    eval_dataset: Any
    data_collator: Any
    model: Any
    model_wrapped: Any
    accelerator: Any
    model_accepts_loss_kwargs: bool
    loss_is_scaled_for_ga: bool | None

    beta, odds_temperature, nll_normalization = Option("orpo_options"), Option("orpo_options"), Option("orpo_options")
    loss_terms, kernel, memory_budget = Option("orpo_options"), Option("orpo_options"), Option("orpo_options")

    @property
    def orpo_options(self) -> ORPOOptions:
        """What defines the loss, read from the arguments at every use: a change of them holds from the next step.

        Raises `ConfigError` for a value out of range.
        """
        options: ORPOOptions = self.args.options()
        return options

    @orpo_options.setter
    def orpo_options(self, options: ORPOOptions) -> None:
        for name in LOSS_OPTIONS:
            setattr(self.args, name, getattr(options, name))

    @property
    def compute_loss_func(self) -> None:
        """None: `compute_loss` makes the whole loss; setting another raises `ConfigError`."""
        return None

    @compute_loss_func.setter
    def compute_loss_func(self, function: Any) -> None:
        if function is not None:
            raise ConfigError(f"compute_loss_func={function!r} would never be called. In its place: {_LOSS}")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Raises `ConfigError` for a subclass with a method of TRL's trainer that would never be called."""
        super().__init_subclass__(**kwargs)
        for base in itertools.takewhile(lambda base: base is not ORPOMethods, cls.__mro__):
            for name in _NOT_CALLED.keys() & vars(base).keys():
                raise ConfigError(
                    f"{base.__name__}.{name} would never be called: {cls.__name__} is not built on TRL's trainer. In "
                    f"its place: {_NOT_CALLED[name]}"
                )

    def set_up_orpo(self, *, layout_check: bool = True) -> None:
        """Called once, after the base class is initialized; `ConfigError` for an argument that would be ignored."""
        self._check_smoothing()
        self._keep_batches_whole()
        self._sums = {"train": MetricSums(), "eval": MetricSums()}
        self._step_totals: Denominators | None = None
        self._of_the_last_pass: list[Any] = []
        self._running = False
        self._followed = values_at(self.args)
        self._announced = self._values()
        self._layout_is_checked = not layout_check
        self._token_cost_is_logged = False
        self.add_callback(BeforeTraining(self))  # type: ignore[attr-defined]
        self.loss_is_scaled_for_ga = self.model_accepts_loss_kwargs = self.nll_normalization != "microbatch"
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

    def create_accelerator_and_postprocess(self) -> None:
        """Called again by every trial of a search."""
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        self._keep_batches_whole()

    # ---- options that change

    def follow_options(self) -> None:
        """Applies what has changed in the arguments since the last run, or raises `ConfigError`."""
        self._check_smoothing()
        new = changed(self._followed, self.args, running=self._running)
        if new:
            self.apply_options(new)
            self._followed = values_at(self.args)

    def _check_smoothing(self) -> None:
        if self.args.label_smoothing_factor:
            raise ConfigError(
                f"label_smoothing_factor is {self.args.label_smoothing_factor}, and ORPO's loss smooths no labels: "
                "leave it out"
            )

    def apply_options(self, new: dict[str, Any]) -> None:
        """Applies `RUN_OPTIONS` with their new values; the batches read theirs when they are made."""
        check_batches(self.args, self.train_dataset)
        if "layout_check" in new:
            self._layout_is_checked = not new["layout_check"]
        vars(self).pop("_eval_dataloaders", None)  # persistent workers have the collator as it was

    def announce_changes(self) -> None:
        """Says on the main process which options are others than those in the log so far."""
        now = self._values()
        if now != self._announced and self.is_world_process_zero():  # type: ignore[attr-defined]
            logger.warning("ORPO by orpo-plugins is active: %s", differences(self._announced, now))
        self._announced = now

    def _values(self) -> dict[str, Any]:
        options = self.orpo_options
        return {**{name: getattr(options, name) for name in LOSS_OPTIONS}, **self._followed}

    def hyperparameter_search(
        self,
        hp_space: Callable[[Any], dict[str, Any]] | None = None,
        compute_objective: Callable[[dict[str, float]], float] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """`Trainer`'s; the default objective is the loss on the evaluation set, the mean over several sets.

        Raises `ConfigError` for a name in the space that is no argument, which `Trainer` would only warn of.
        """
        return super().hyperparameter_search(  # type: ignore[misc]
            None if hp_space is None else checked_space(hp_space, self.args),
            compute_objective or (lambda metrics: evaluation_loss(metrics, self.eval_dataset)),
            *args,
            **kwargs,
        )

    # ---- training

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """`Trainer`'s; what a run has summed up and not logged, whole or interrupted, ends with it."""
        try:
            return super().train(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._forget_the_run()

    def begin_run(self) -> None:
        """Called when the first batch is about to be read, also by a second attempt of `auto_find_batch_size`."""
        self._forget_the_run()
        self._running = True
        self.announce_changes()

    def _forget_the_run(self) -> None:
        self._sums["train"] = MetricSums()
        self._of_the_last_pass = []
        self._running = False

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """Also counts the NLL tokens and pairs of the whole optimizer step, over all ranks, in one reduction.

        Each batch carries these totals along, so that no other batch is ever divided by them.

        Where a stream ends inside a step, its next pass fills the step up.  The Trainer takes no step there: it would
        add the gradient of those batches, normalized as a step of their own, to the next step's.

        Raises `ConfigError` for a stream that ends inside the first step: no step would ever be taken.
        """
        self.follow_options()
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
        self.log_token_cost(batches[0])
        step = step_totals(batches, lambda counts: self.accelerator.reduce(counts.to(device), reduction="mean"))
        for batch in batches:
            batch[STEP_TOTALS] = step
        return batches, step.nll_tokens

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
        """`Trainer`'s; a batch that is not of the loop is a step of its own."""
        totals = inputs.get(STEP_TOTALS)
        # Who divides by the number of micro-batches: for "microbatch" the Trainer, else our denominators have done it.
        # transformers reads loss_is_scaled_for_ga since 5.19 and model_accepts_loss_kwargs (with a token count) before.
        scaled = totals is None or self.nll_normalization != "microbatch"
        self.loss_is_scaled_for_ga = self.model_accepts_loss_kwargs = scaled
        if totals is None:
            num_items_in_batch = own_denominators(targets_of(inputs)).nll_tokens
        # Out of the batch, since a compute_loss of the user's own may give all of it to the model.
        inputs = type(inputs)({key: value for key, value in inputs.items() if key != STEP_TOTALS})
        self._step_totals = totals
        try:
            return super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        finally:
            self._step_totals = None

    def get_train_dataloader(self) -> Any:
        """Batches by tokens or by length where the arguments ask for them.

        Checks the layout first, where the model is whole: what a pair costs depends on it.
        """
        self.follow_options()
        if self.train_dataset is None:  # type: ignore[attr-defined]
            return super().get_train_dataloader()  # type: ignore[misc]  # which says that one is needed
        self.train_dataset = as_rows(self.train_dataset)  # type: ignore[attr-defined]
        check_trainable(self.model)
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):  # type: ignore[attr-defined]
            self.check_layout(self.model, batches_are_planned=False)
        batches = pair_batches(self)
        if batches is None:
            return super().get_train_dataloader()  # type: ignore[misc]
        if own := overridden(type(self), "get_train_dataloader") or overridden(
            type(self), "_get_train_sampler", all_of=True
        ):
            raise ConfigError(
                f"{own} would never be called: max_tokens_per_batch and train_sampling_strategy='group_by_length' make "
                "batches of their own. Leave these options out, or the method"
            )
        return loader(self, batches)

    def prepare_rows(self, rows: Any, name: str) -> Any:
        """Rows that are not tokenized yet, as the trainer's own are: unusable ones are dropped, and the log says so."""
        raise NotImplementedError

    def _tokenized(self, dataset: Any, name: str) -> Any:
        if are_several(dataset):
            return {each: self._tokenized(rows, str(each)) for each, rows in dataset.items()}
        dataset = as_rows(dataset, name)
        if is_tokenized(dataset):
            return dataset
        with self.args.main_process_first(desc=f"tokenizing the {name} set"):
            return self.prepare_rows(dataset, name)

    def _evaluated(self, dataset: Any) -> Any:
        """What evaluation is asked for: a dataset, or the trainer's own, or that of a name among them."""
        if dataset is not None and not isinstance(dataset, str):
            return self._tokenized(dataset, "eval")
        if self.eval_dataset is not None:
            self.eval_dataset = self._tokenized(self.eval_dataset, "eval")
        return dataset

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """`Trainer`'s, on rows in every form that the constructor takes."""
        metrics: dict[str, float] = super().evaluate(self._evaluated(eval_dataset), *args, **kwargs)  # type: ignore[misc]
        return metrics

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """`Trainer`'s, on rows in every form."""
        return super().get_eval_dataloader(self._evaluated(eval_dataset))  # type: ignore[misc]

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """`Trainer`'s, on rows in every form."""
        return super().get_test_dataloader(self._tokenized(as_rows(test_dataset, "test"), "test"))  # type: ignore[misc]

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        """The set's own order; grouped by length with the training set, predictions would not stand in the rows'."""
        grouped = self.args.train_sampling_strategy == "group_by_length"
        if not grouped or overridden(type(self), "_get_eval_sampler"):
            return super()._get_eval_sampler(eval_dataset)  # type: ignore[misc]
        return SequentialSampler(eval_dataset) if has_length(eval_dataset) else None

    def check_layout(self, model: nn.Module, *, batches_are_planned: bool) -> None:
        """Compares the layout with *padded*, once per run (see `checked_layout`), after a look at model and rows."""
        check_rows(self, model)
        if not self._layout_is_checked:
            checked_layout(self, model, batches_are_planned=batches_are_planned)
        self._layout_is_checked = True  # last: after an error, another call of train() must not go on unchecked

    def log_token_cost(self, first_batch: dict[str, Any] | None = None) -> None:
        """Says once, on the main process, what the layout costs: in an epoch, or in the first batch of it."""
        if self._token_cost_is_logged or not self.is_world_process_zero():  # type: ignore[attr-defined]
            return
        text = epoch_cost(self) if first_batch is None else batch_cost(self, first_batch)
        if text is not None:
            logger.warning("%s", text)  # as loud as the line that says that ORPO is active
        self._token_cost_is_logged = text is not None or first_batch is not None

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
        """One forward pass and its figures, summed under `split`, unless they are of a batch outside of the loop."""
        options = self.orpo_options
        step: Denominators | None = inputs.get(STEP_TOTALS, self._step_totals) if split == "train" else None
        targets = targets_of(inputs)
        pairs = targets.num_pairs if split == "train" else self._pairs_of_the_set(targets.num_pairs)
        if pairs < targets.num_pairs:
            counted = targets.sequence_ids % targets.num_pairs < pairs
            weights = 1.0 if targets.weights is None else targets.weights
            targets = replace(targets, weights=counted * weights)
        totals = own_denominators(targets)
        if step is not None and options.nll_normalization != "microbatch":
            totals = step
        output = forward_with_options(model, inputs, options, targets, totals)
        if step is not None or split == "eval":
            self._sums[split].add(metric_sums(output, options, totals))
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
        self.follow_options()
        sums = self._sums["eval"] = MetricSums()
        output = super().evaluation_loop(  # type: ignore[misc]
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        metrics = sums.pop(self.accelerator)
        options = self.orpo_options
        if metrics and options.nll_normalization != "microbatch":
            terms = (weight * metrics[f"loss_terms/{name}"] for name, weight in options.loss_terms.items())
            whole = metrics["nll_loss"] - options.beta * metrics["log_odds_ratio"] + sum(terms)
            output.metrics[f"{metric_key_prefix}_loss"] = whole + self._router_share(metrics)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    def _router_share(self, metrics: dict[str, float]) -> float:
        return router_coefficient(self.model) * metrics["aux_loss"] if "aux_loss" in metrics else 0.0  # type: ignore[attr-defined]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means since the last training log; evaluation brings its own."""
        if "loss" in logs:
            metrics = self._sums["train"].pop(self.accelerator)
            self._check_finite(metrics)
            logs.update(metrics)
            self.announce_changes()
        super().log(logs, start_time)  # type: ignore[misc]

    def end(self) -> None:
        """Closes trackers and the process group, as `Trainer.end` does since transformers 5.18; to be called last.

        What DDP has put around the model goes first.  As the last owner of a gloo group it would wait for the group's
        thread with the interpreter's lock in hand, while that thread may be waiting for the lock.
        """
        self.model_wrapped = self.model
        self.accelerator.free_memory()
        getattr(super(), "end", self.accelerator.end_training)()

    def _check_finite(self, metrics: dict[str, float]) -> None:
        """Raises `ModelError` once the loss has become NaN or infinite, which `logging_nan_inf_filter` would hide.

        Looked at once per log, so that no micro-batch waits for the device.  Under fp16 it is only a warning: there the
        gradient scaler leaves out steps that overflow.
        """
        bad = {name: value for name, value in metrics.items() if not math.isfinite(value)}
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
