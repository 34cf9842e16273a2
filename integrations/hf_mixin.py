"""The methods of transformers' `Trainer` that ORPO changes.

`ORPOTrainer`, Axolotl's trainer, and the class that `fuse_head` gives to a stock `Trainer` all derive from it.
"""

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from orpo_plugins.data.dataset import as_rows
from orpo_plugins.denominators import Denominators, own_denominators, step_totals
from orpo_plugins.errors import ConfigError
from orpo_plugins.forward import STEP_TOTALS, forward_with_options
from orpo_plugins.integrations.hf_changed_options import Option, OptionChanges
from orpo_plugins.integrations.hf_evaluation import loss_of_set, number_that_count, tokenized
from orpo_plugins.integrations.hf_loader import check_batches, has_length, keep_batches_whole, loader, pair_batches
from orpo_plugins.integrations.hf_metrics import MetricSums, check_finite, metric_sums
from orpo_plugins.integrations.hf_overrides import LOSS, check_loader, check_subclass, overridden
from orpo_plugins.integrations.hf_run_start import (
    BeforeTraining,
    batch_cost,
    check_label_smoothing,
    check_rows,
    checked_layout,
    epoch_cost,
    log_example,
    without_checkpointing,
)
from orpo_plugins.integrations.hf_search import checked_space, evaluation_loss
from orpo_plugins.models.checks import check_trainable
from orpo_plugins.models.head import keep_four_bit_trainable
from orpo_plugins.objective import ORPOOutput
from orpo_plugins.options import NLLNormalization, ORPOOptions
from orpo_plugins.targets import targets_of

logger = logging.getLogger(__name__)


class ORPOMethods(Trainer):
    """Loss, step totals, evaluation and logging of ORPO, for `Trainer` or a subclass that follows in the bases."""

    train_dataset: Any  # rows in every form that docs/data.md lists
    eval_dataset: Any
    model: nn.Module

    beta, odds_temperature = Option[float]("orpo_options"), Option[float]("orpo_options")
    nll_normalization, kernel = Option[NLLNormalization]("orpo_options"), Option[str]("orpo_options")
    loss_terms, memory_budget = Option[Mapping[str, float]]("orpo_options"), Option[int | None]("orpo_options")

    @property
    def orpo_options(self) -> ORPOOptions:
        """What defines the loss.  It is read at every use, so that a change holds from the next step on.

        Raises `ConfigError` for a value out of range.
        """
        raise NotImplementedError

    @orpo_options.setter
    def orpo_options(self, options: ORPOOptions) -> None:
        raise NotImplementedError

    @property
    def compute_loss_func(self) -> None:
        """None: `compute_loss` computes the whole loss.  Setting a function raises `ConfigError`."""
        return None

    @compute_loss_func.setter
    def compute_loss_func(self, function: Callable[..., Any] | None) -> None:
        if function is not None:
            raise ConfigError(f"compute_loss_func={function!r} would never be called. In its place: {LOSS}")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Raises `ConfigError` for a subclass with a method of TRL's trainer that would never be called."""
        super().__init_subclass__(**kwargs)
        check_subclass(cls, itertools.takewhile(lambda base: base is not ORPOMethods, cls.__mro__))

    def set_up_orpo(self, *, layout_check: bool = True) -> None:
        """Called once, when the base class is initialized.  Raises `ConfigError` for arguments without an effect."""
        check_label_smoothing(self.args)
        keep_batches_whole(self)
        self._sums = {"train": MetricSums(), "eval": MetricSums()}
        self._step_totals: Denominators | None = None
        self._unfinished_step: list[dict[str, Any]] = []
        self._running = False
        self._changes = OptionChanges(self.args, self.orpo_options)
        self._layout_is_checked = not layout_check
        self._examined_rows: Any = None
        self._token_cost_is_logged = False
        self.add_callback(BeforeTraining(self._before_training))
        self.loss_is_scaled_for_ga = self.model_accepts_loss_kwargs = self.nll_normalization != "microbatch"
        keep_four_bit_trainable(self.model)
        without_checkpointing(self.model, self.args)

    def create_accelerator_and_postprocess(self) -> None:
        """Called again by every trial of a search."""
        super().create_accelerator_and_postprocess()
        keep_batches_whole(self)

    # ---- options that change

    def follow_options(self) -> None:
        """Applies the arguments that have changed since the last run.  Raises `ConfigError` for a change too late."""
        check_label_smoothing(self.args)
        new = self._changes.to_apply(self.args, running=self._running)
        if new:
            self.apply_options(new)
            self._changes.applied(self.args)

    def apply_options(self, new: dict[str, Any]) -> None:
        """Applies new values of `RUN_OPTIONS`.  Options of batches are read when the batches are made."""
        check_batches(self.args, self.train_dataset)
        if "layout_check" in new:
            self._layout_is_checked = not new["layout_check"]
        vars(self).pop("_eval_dataloaders", None)  # persistent workers have a copy of the old collator

    def announce_changes(self) -> None:
        """Logs on the main process which options have changed since the log last showed them."""
        changes = self._changes.to_log(self.orpo_options)
        if changes and self.is_world_process_zero():
            logger.warning("ORPO by orpo-plugins is active: %s", changes)

    def hyperparameter_search(
        self,
        hp_space: Callable[[Any], dict[str, Any]] | None = None,
        compute_objective: Callable[[dict[str, float]], float] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """`Trainer`'s; the default objective is the loss on the evaluation set, or the mean over several sets.

        Raises `ConfigError` for a name in the space that is not among the arguments, which `Trainer` only warns of.
        """
        return super().hyperparameter_search(
            None if hp_space is None else checked_space(hp_space, self.args),
            compute_objective or (lambda metrics: evaluation_loss(metrics, self.eval_dataset)),
            *args,
            **kwargs,
        )

    # ---- before the first step

    def _before_training(self) -> None:
        """The model is wrapped here, and no batch has been made yet."""
        self.begin_run()
        self.check_layout(self.model_wrapped, batches_are_planned=True)
        self.log_token_cost()
        log_example(self)

    def begin_run(self) -> None:
        """Called before the first batch is read, and again for each attempt of `auto_find_batch_size`."""
        self._forget_the_run()
        self._running = True
        self.announce_changes()

    def _forget_the_run(self) -> None:
        self._sums["train"] = MetricSums()
        self._unfinished_step = []
        self._running = False

    def check_layout(self, model: nn.Module, *, batches_are_planned: bool) -> None:
        """Examines the model and the rows, and compares the layout with *padded*; each once per run.

        Raises `ModelError` or `ConfigError`; see `check_rows` and `checked_layout`.
        """
        if self._examined_rows is not self.train_dataset and check_rows(self, model):
            self._examined_rows = self.train_dataset
        if not self._layout_is_checked:
            checked_layout(self, model, kernel=self.kernel, batches_are_planned=batches_are_planned)
        self._layout_is_checked = True  # last: after an error, the next call of train() has to check again

    def log_token_cost(self, first_batch: dict[str, Any] | None = None) -> None:
        """Logs once, on the main process, how many tokens an epoch costs in this layout, or else its first batch."""
        if self._token_cost_is_logged or not self.is_world_process_zero():
            return
        text = epoch_cost(self) if first_batch is None else batch_cost(self, first_batch)
        if text is not None:
            logger.warning("%s", text)  # the level of the line that says that ORPO is active
        self._token_cost_is_logged = text is not None or first_batch is not None

    # ---- training

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """`Trainer`'s.  When a run ends or is interrupted, sums that it has not logged are dropped."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self._forget_the_run()

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Cuts batches by tokens or by length where the arguments ask for that.

        The layout is checked first, because the number of tokens of a pair depends on it.  A model that FSDP or
        DeepSpeed will cut can only run later: see `_before_training`.
        """
        self.follow_options()
        if self.train_dataset is None:
            return super().get_train_dataloader()  # raises the error of `Trainer`
        self.train_dataset = as_rows(self.train_dataset)
        check_trainable(self.model)
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            self.check_layout(self.model, batches_are_planned=False)
        batches = pair_batches(self)
        if batches is None:
            return super().get_train_dataloader()
        check_loader(type(self), self._classes_behind())
        return loader(self, batches)

    def _classes_behind(self) -> tuple[type, ...]:
        """The trainer's classes whose methods the ones of `ORPOMethods` call."""
        classes = type(self).__mro__
        return classes[classes.index(ORPOMethods) + 1 :]

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Any]:
        """Also counts the NLL tokens and pairs of the whole optimizer step, over all ranks, with one reduction.

        Each batch carries these totals, so that no other batch is ever divided by them.

        Where a stream ends in the middle of a step, the next pass over it fills the step up.  `Trainer` takes no step
        at the end of the stream: it would add the gradient of these batches, divided by their own totals, to that of
        the next step.

        Raises `ConfigError` for a stream that ends inside the first step, because no step would ever be taken.
        """
        self.follow_options()
        batches, self._unfinished_step = self._unfinished_step, []
        more, _ = super().get_batch_samples(epoch_iterator, num_batches - len(batches), device)
        batches = [*batches, *more]
        if len(batches) < num_batches:
            if batches and not self.state.global_step:
                raise ConfigError(
                    f"the training set, a stream, ends after {len(batches)} batches, and gradient_accumulation_steps "
                    f"is {num_batches}: lower it or the batch size, or load the set whole (without streaming=True)"
                )
            self._unfinished_step = batches
            return [], None
        self.log_token_cost(batches[0])
        step = step_totals(batches, lambda counts: self.accelerator.reduce(counts.to(device), reduction="mean"))
        for batch in batches:
            batch[STEP_TOTALS] = step
        return batches, step.nll_tokens

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """`Trainer`'s; a batch that `get_batch_samples` did not return is a step of its own."""
        totals = inputs.get(STEP_TOTALS)
        # Who divides by the number of micro-batches: `Trainer` for "microbatch", otherwise our denominators.
        # transformers reads loss_is_scaled_for_ga since 5.19, and model_accepts_loss_kwargs with a token count before.
        scaled = totals is None or self.nll_normalization != "microbatch"
        self.loss_is_scaled_for_ga = self.model_accepts_loss_kwargs = scaled
        if totals is None:
            num_items_in_batch = own_denominators(targets_of(inputs)).nll_tokens
        # A user's compute_loss may give the whole batch to the model, which does not take the totals.
        inputs = type(inputs)({key: value for key, value in inputs.items() if key != STEP_TOTALS})
        self._step_totals = totals
        try:
            return super().training_step(model, inputs, num_items_in_batch)
        finally:
            self._step_totals = None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss of one micro-batch; its metrics are added to the running sums."""
        output = self.orpo_output(model, inputs, "train")
        loss = output.loss.to(self.args.device)
        return (loss, output) if return_outputs else loss

    def orpo_output(self, model: nn.Module, inputs: dict[str, Any], split: str) -> ORPOOutput:
        """One forward pass.  Its metrics are summed under `split`, except for a training batch outside of the loop."""
        options = self.orpo_options
        step: Denominators | None = inputs.get(STEP_TOTALS, self._step_totals) if split == "train" else None
        targets = targets_of(inputs)
        pairs = targets.num_pairs if split == "train" else number_that_count(self.accelerator, targets.num_pairs)
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

    # ---- evaluation

    def prepare_rows(self, rows: Any, name: str) -> Any:
        """Tokenizes rows as the trainer's own sets are: it drops rows that cannot be used, and logs that."""
        raise NotImplementedError

    def _tokenized(self, dataset: Any, name: str) -> Any:
        return tokenized(dataset, name, self.args, self.prepare_rows)

    def _evaluated(self, dataset: Any) -> Any:
        """A dataset, tokenized.  None and the name of a set stand for the trainer's own sets: these are tokenized."""
        if dataset is not None and not isinstance(dataset, str):
            return self._tokenized(dataset, "eval")
        if self.eval_dataset is not None:
            self.eval_dataset = self._tokenized(self.eval_dataset, "eval")
        return dataset

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """`Trainer`'s, on rows in every form that the constructor takes."""
        return super().evaluate(self._evaluated(eval_dataset), *args, **kwargs)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """`Trainer`'s, on rows in every form."""
        return super().get_eval_dataloader(self._evaluated(eval_dataset))

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """`Trainer`'s, on rows in every form."""
        return super().get_test_dataloader(self._tokenized(as_rows(test_dataset, "test"), "test"))

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler[Any] | None:
        """The order of the set.  `Trainer` would group it by length as the training set, and so mix up predictions."""
        grouped = self.args.train_sampling_strategy == "group_by_length"
        if not grouped or overridden("_get_eval_sampler", self._classes_behind()):
            return super()._get_eval_sampler(eval_dataset)
        return SequentialSampler(eval_dataset) if has_length(eval_dataset) else None

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(loss, [B, 2] mean log-probabilities of chosen and rejected, [B] zeros: the index of the better answer)."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            output = self.orpo_output(model, inputs, "eval")
        loss = output.loss.detach()
        if prediction_loss_only:
            return loss, None, None
        logps = torch.stack([output.chosen_logps, output.rejected_logps], dim=1)
        return loss, logps, torch.zeros_like(logps[:, 0])

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """`Trainer`'s loop; our metrics are added to its own, so that `metric_for_best_model` finds them.

        Unless the normalization is per micro-batch, `{prefix}_loss` is computed from sums over the whole set, and so
        does not depend on how the set was cut into batches.
        """
        self.follow_options()
        sums = self._sums["eval"] = MetricSums()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        metrics = sums.pop(self.accelerator)
        options = self.orpo_options
        assert output.metrics is not None
        if metrics and options.nll_normalization != "microbatch":
            output.metrics[f"{metric_key_prefix}_loss"] = loss_of_set(metrics, options, self.model)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    # ---- the log, and the end

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means since the last training log.  Logs of evaluation have their metrics already."""
        if "loss" in logs:
            metrics = self._sums["train"].pop(self.accelerator)
            # Under fp16 the gradient scaler leaves out steps that overflow.
            scaled = getattr(self.accelerator, "scaler", None) is not None
            check_finite(metrics, self.state.global_step, warn_only=scaled)
            logs.update(metrics)
            self.announce_changes()
        super().log(logs, start_time)

    def end(self) -> None:
        """Closes trackers and the process group, as `Trainer.end` does since transformers 5.18.  Call it last.

        The wrapper that DDP puts around the model is dropped first.  As the last owner of a gloo group it would hold
        the interpreter's lock while it waits for the group's thread, which may itself be waiting for the lock.
        """
        self.model_wrapped = self.model
        self.accelerator.free_memory()
        getattr(super(), "end", self.accelerator.end_training)()
