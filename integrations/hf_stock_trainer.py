"""ORPO for a stock `transformers.Trainer`: a collator, a loss function, and one call for the fused head.

trainer = Trainer(
    model, args, train_dataset=rows, data_collator=ORPOCollator(tokenizer, max_length=1024),
    compute_loss_func=ORPOLoss(beta=0.1),      # args need remove_unused_columns=False
)
fuse_head(trainer)                             # optional: no logits in memory, exact pair weights, metrics

`ORPOLoss` computes the loss from the model's logits.  `fuse_head` changes the trainer's class instead, to one that runs
the model with a fused head.
"""

import functools
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Trainer

from orpo_plugins.data.collator import ORPOCollator
from orpo_plugins.data.dataset import prepare_dataset
from orpo_plugins.denominators import Denominators, counts_of
from orpo_plugins.errors import BatchError, ConfigError
from orpo_plugins.forward import nll_weights, pair_loss
from orpo_plugins.hooks.types import Objective
from orpo_plugins.integrations.hf_changed_options import FIXED_OPTIONS, LOSS_OPTIONS, RUN_OPTIONS, Option
from orpo_plugins.integrations.hf_legacy_arguments import is_legacy
from orpo_plugins.integrations.hf_mixin import ORPOMethods
from orpo_plugins.integrations.hf_run_start import announce
from orpo_plugins.kernels.reference import objective_of_logits
from orpo_plugins.models.checks import check_causal_by_gradient, check_gradient
from orpo_plugins.models.head import logits_of
from orpo_plugins.options import NLLNormalization, ORPOOptions
from orpo_plugins.targets import IN_DECODER, Targets, width_of

logger = logging.getLogger(__name__)

_OPTIONS = frozenset([*LOSS_OPTIONS, *RUN_OPTIONS, *FIXED_OPTIONS])


class ORPOLoss:
    """A `compute_loss_func` for `Trainer`: ORPO from full logits.

        loss = sum(NLL of the chosen rows) / num_items_in_batch
             + (share of the step's NLL tokens) * mean over pairs of -beta * log sigmoid(odds_temperature * log_odds)

    Of a whole step, the Trainer gives a loss function the number of tokens and nothing else.  So with several
    micro-batches or ranks per step, the NLL is the exact mean over tokens, but the odds-ratio terms of micro-batches
    are averaged with token weights.  With one micro-batch per step both are exact.

    `fuse_head(trainer)` makes both exact always.  It is needed for batches in another layout than *padded*, for
    encoder-decoder models, and for adapters with virtual tokens.  It also finds every model that is not causal; a loss
    function does not see the model, and finds one only by the gradient of the embeddings, where they have one.

    Args:
        beta: the paper's lambda, >= 0.
        odds_temperature: multiplies the log odds ratio inside the sigmoid, > 0.

    Both are attributes that may be set between steps (`ConfigError` for a value out of range).
    """

    beta, odds_temperature = Option[float]("options"), Option[float]("options")

    def __init__(self, beta: float = 0.1, *, odds_temperature: float = 1.0) -> None:
        self.options = ORPOOptions(beta=beta, odds_temperature=odds_temperature)
        self._warned = False
        self._checked = self._causal = False

    def __setattr__(self, name: str, value: Any) -> None:
        """Raises `ConfigError` for an option that a loss function does not have."""
        if name not in ("beta", "odds_temperature") and (name in _OPTIONS or is_legacy(name)):
            raise ConfigError(
                f"{name}={value!r} would have no effect on an ORPOLoss, which has beta and odds_temperature: "
                "fuse_head(trainer) has kernel and nll_normalization, ORPOTrainer and ORPOConfig have all options"
            )
        super().__setattr__(name, value)

    def __call__(self, outputs: Any, labels: Tensor | None, num_items_in_batch: Any = None) -> Tensor:
        """The loss of one micro-batch; `labels` is the table that `ORPOCollator` makes."""
        if labels is None:
            raise BatchError("the batch has no labels: pass data_collator=ORPOCollator(...) to the Trainer")
        logits = logits_of(outputs)
        if logits is None:
            raise BatchError(
                "the model returned no logits, as models patched by use_liger_kernel=True do in training: "
                "switch it off, or call fuse_head(trainer)"
            )
        if logits.shape[0] == 1:
            # One row holds several sequences, which would attend to each other without the layout's attention.
            raise BatchError(
                "the batch is packed into one row, whose attention needs more than a loss function: "
                "call fuse_head(trainer), or use ORPOCollator(..., layout='padded')"
            )
        targets = Targets.from_table(labels, logits.shape[0] // 2)
        if not self._checked:
            _check_model(outputs, labels)
            self._checked = True
        _check_positions(logits, labels)
        if num_items_in_batch is not None and torch.is_grad_enabled():  # a Trainer's training step
            check_gradient(logits)
            if not self._causal:
                check_causal_by_gradient(logits)
            self._causal = True
        own_tokens = targets.in_nll.sum().clamp(min=1).float()
        tokens = own_tokens if num_items_in_batch is None else torch.as_tensor(num_items_in_batch).float()
        tokens = tokens.to(own_tokens.device).reshape(-1)[0] if tokens.ndim else tokens.to(own_tokens.device)
        if not self._warned and bool(tokens > own_tokens):
            self._warned = True
            logger.warning(
                "a step has several micro-batches: their odds-ratio terms are weighted by tokens; "
                "call orpo_plugins.fuse_head(trainer) for exact pair weights"
            )
        # The Trainer counts tokens without weights.  The step's weighted count is estimated from this micro-batch.
        totals = Denominators.of(counts_of(targets) * (tokens / own_tokens))
        objective = Objective(
            nll_weights=nll_weights(targets, self.options, totals),
            pair_loss=functools.partial(pair_loss, options=self.options, targets=targets, totals=totals),
        )
        return objective_of_logits(logits.flatten(0, -2)[targets.positions], targets, objective).loss


def _check_model(outputs: Any, labels: Tensor) -> None:
    """Raises `BatchError` for an encoder-decoder model, and for a batch of one that a decoder-only model was given.

    Without an error, some models (BART) would make decoder inputs from the prompt, and train on nonsense.
    """
    if "encoder_last_hidden_state" in outputs:
        raise BatchError(
            "an encoder-decoder model's decoder needs inputs that only the fused head makes: use "
            "ORPOCollator(..., layout='seq2seq') and call fuse_head(trainer)"
        )
    if bool((labels[:, 3] & IN_DECODER).any()):
        raise BatchError(
            "the batch is for an encoder-decoder model, but this one has no encoder: use "
            "ORPOCollator(..., layout='padded')"
        )


def _check_positions(logits: Tensor, labels: Tensor) -> None:
    """Raises `BatchError` where the model returned more or fewer positions than the rows of the batch have."""
    width = width_of(labels)
    if width is None:
        raise BatchError("the batch does not say how wide its rows are: make it with ORPOCollator")
    if logits.shape[1] != width:
        raise BatchError(
            f"the model returned {logits.shape[1]} positions for rows of {width} tokens, as it does with an adapter "
            "that has virtual tokens (prompt tuning, P-tuning, CPT): call fuse_head(trainer), which knows the adapter"
        )


class FusedHead(ORPOMethods):
    """`ORPOMethods` for a stock Trainer.  The options are those of its `ORPOLoss` and of `fuse_head`."""

    orpo_loss: ORPOLoss
    _fused: dict[str, Any]

    @property
    def orpo_options(self) -> ORPOOptions:
        """What defines the loss: `ORPOLoss.options` as they are now, and the trainer's own two options.

        Raises `ConfigError` where `ORPOLoss.options` has another value for one of these two.
        """
        options = self.orpo_loss.options
        for name, value in self._fused.items():
            if getattr(options, name) not in (getattr(ORPOOptions(), name), value):
                raise ConfigError(
                    f"ORPOLoss.options has {name}={getattr(options, name)!r} and the trainer {value!r}, which counts: "
                    f"set trainer.{name}"
                )
        return replace(options, **self._fused, logit_means=True)

    @orpo_options.setter
    def orpo_options(self, options: ORPOOptions) -> None:
        self._fused = {name: getattr(options, name) for name in self._fused}
        own = {name: getattr(self.orpo_loss.options, name) for name in (*self._fused, "logit_means")}
        self.orpo_loss.options = replace(options, **own)

    @property
    def compute_loss_func(self) -> None:
        """None, as for `ORPOMethods`.  Another `ORPOLoss` may be set."""
        return None

    @compute_loss_func.setter
    def compute_loss_func(self, function: Callable[..., Any] | None) -> None:
        if not isinstance(function, ORPOLoss):
            raise ConfigError(f"compute_loss_func={function!r} would never be called: set an ORPOLoss")
        self.orpo_loss = function

    def __setattr__(self, name: str, value: Any) -> None:
        """Raises `ConfigError` for an option that a stock trainer does not have."""
        if name in _OPTIONS and name not in LOSS_OPTIONS:
            raise ConfigError(
                f"trainer.{name}={value!r} would have no effect: it is an option of ORPOCollator or fuse_head, "
                "read when they are called"
            )
        super().__setattr__(name, value)

    def follow_options(self) -> None:
        """Raises `ConfigError` for an option of ours among the arguments, where a stock trainer would not read it."""
        for name in _OPTIONS & vars(self.args).keys():
            where = f"set trainer.{name}" if name in LOSS_OPTIONS else "pass it to ORPOCollator or fuse_head"
            raise ConfigError(f"args.{name}={getattr(self.args, name)!r} would have no effect under fuse_head: {where}")
        super().follow_options()

    def prepare_rows(self, rows: Any, name: str) -> Any:
        """Tokenizes rows with the tokenizer and the options of the collator."""
        collator = cast(ORPOCollator, self.data_collator)
        return prepare_dataset(rows, collator.tokenizer, collator.options, name=name)[0]


_NOT_CALLED = {
    "compute_loss": "ORPO's loss and its metrics take its place",
    "prediction_step": "ORPO's loss and both log-probabilities take its place",
    "_get_num_items_in_batch": "ORPO counts tokens and pairs itself",
}
"""Methods of a Trainer that `FusedHead` replaces without calling them."""


def fuse_head(
    trainer: Trainer, *, kernel: str = "auto", nll_normalization: NLLNormalization = "batch", layout_check: bool = True
) -> FusedHead:
    """Replaces the class of a stock Trainer by a subclass that computes ORPO's loss with the fused head.

    The trainer then also normalizes over whole optimizer steps and logs ORPO's metrics.  The model stays as it is: its
    head is replaced only while a forward pass runs.

    Args:
        trainer: built with `data_collator=ORPOCollator(...)` and `compute_loss_func=ORPOLoss(...)`.  The loss's `beta`
            and `odds_temperature` are read at each step.
        kernel: "auto", "chunked", "chunked_fp32", "triton", "reference" or a plugin's name; then `trainer.kernel`.
        nll_normalization: "batch", "microbatch" or "pair"; then `trainer.nll_normalization`.
        layout_check: whether the collator's layout is compared with *padded* on two pairs before training.

    Returns:
        The same object.

    Raises:
        ConfigError: the trainer has another loss or collator, it has the fused head already, or it has methods of its
            own that would never be called.
    """
    _check_fusable(trainer)
    loss, collator = trainer.compute_loss_func, trainer.data_collator
    if not isinstance(loss, ORPOLoss) or not isinstance(collator, ORPOCollator):
        raise ConfigError(
            f"the trainer has compute_loss_func={loss!r} and data_collator={type(collator).__name__}: build it with "
            "compute_loss_func=ORPOLoss(...) and data_collator=ORPOCollator(...) first"
        )
    fused: dict[str, Any] = {"kernel": kernel, "nll_normalization": nll_normalization}
    options = replace(loss.options, **fused)  # raises for a value that is unknown
    announce(cast(torch.nn.Module, trainer.model), trainer.args, options, collator.layout, nll_over=collator.nll_over)
    trainer.__class__ = type(f"ORPO{type(trainer).__name__}", (FusedHead, type(trainer)), {})
    changed = cast(FusedHead, trainer)
    changed.orpo_loss, changed._fused = loss, fused
    changed.set_up_orpo(layout_check=layout_check)
    return changed


def _check_fusable(trainer: object) -> None:
    """Raises `ConfigError` for a trainer that has something which `fuse_head` would ignore."""
    kind = type(trainer)
    if not isinstance(trainer, Trainer):
        raise ConfigError(f"{kind.__name__} is no transformers.Trainer: in a loop of your own, call orpo_forward")
    if isinstance(trainer, ORPOMethods):
        raise ConfigError(
            f"{kind.__name__} has the fused head already: leave fuse_head out. trainer.kernel and "
            "trainer.nll_normalization may be set between steps"
        )
    for base in kind.__mro__:
        own = () if base.__module__.startswith("transformers.") else _NOT_CALLED.keys() & vars(base).keys()
        for name in sorted(own):
            raise ConfigError(
                f"{base.__name__}.{name} would never be called: {_NOT_CALLED[name]}. Call fuse_head on a "
                "transformers.Trainer without it, or derive from orpo_plugins.ORPOTrainer, whose methods may be "
                "overridden"
            )
    names = {name for base in (FusedHead, ORPOMethods) for name in vars(base) if not name.startswith("__")}
    for name in sorted(names & vars(trainer).keys() - {"compute_loss_func"}):
        raise ConfigError(
            f"trainer.{name} is set on the trainer itself, where it would hide the one that fuse_head brings: remove "
            "it. Set an option on ORPOLoss or in fuse_head(trainer, ...); for a method derive from "
            "orpo_plugins.ORPOTrainer"
        )
    if getattr(trainer.args, "predict_with_generate", False):
        raise ConfigError(
            "predict_with_generate=True has no effect: an evaluation step computes both answers' log-probabilities. "
            "Leave it out, and call trainer.model.generate after training"
        )
