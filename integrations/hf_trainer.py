"""`ORPOTrainer`: TRL's constructor on transformers' `Trainer`, independent of TRL.

trainer = ORPOTrainer(model=model, args=ORPOConfig(output_dir="out"), train_dataset=rows, processing_class=tokenizer)
trainer.train()
"""

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedTokenizerBase,
    TrainerCallback,
    enable_full_determinism,
    set_seed,
)
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction, number_of_arguments

from orpo_plugins.data.collator import ORPOCollator
from orpo_plugins.data.dataset import are_several, prepare_dataset
from orpo_plugins.errors import ConfigError, missing_extra
from orpo_plugins.hooks.layout import Layout
from orpo_plugins.integrations import hf_tokenizer as text_tokenizer
from orpo_plugins.integrations.hf_changed_options import FIXED_OPTIONS, LOSS_OPTIONS, RUN_OPTIONS, cannot_change
from orpo_plugins.integrations.hf_config import ORPOConfig
from orpo_plugins.integrations.hf_generation import log_generations
from orpo_plugins.integrations.hf_legacy_arguments import is_legacy, todays_name
from orpo_plugins.integrations.hf_loader import check_batches
from orpo_plugins.integrations.hf_mixin import ORPOMethods
from orpo_plugins.integrations.hf_run_start import announce
from orpo_plugins.layouts.auto import best_layout
from orpo_plugins.models.head import config_of, is_encoder_decoder, output_head
from orpo_plugins.models.virtual_tokens import checkpointed, is_in_the_cache, stop_checkpointing
from orpo_plugins.options import ORPOFields, ORPOOptions, PairOptions

if TYPE_CHECKING:
    from peft import PeftConfig

logger = logging.getLogger(__name__)


class ORPOTrainer(ORPOMethods):
    """Trains a causal LM, or an encoder-decoder model, on preference pairs with ORPO.

    Args:
        model: the model, a name or path for its `from_pretrained`, or None with `model_init`.
        args: `ORPOConfig`; None takes its defaults with `output_dir="orpo_output"`.
        data_collator: makes batches from tokenized rows; default `ORPOCollator`.
        train_dataset, eval_dataset: rows in any registered format (docs/data.md): `datasets.Dataset`,
            `IterableDataset`, a list of dicts, a DataFrame, or a dict of columns; `eval_dataset` may be a dict of them
            or a `DatasetDict`.
        processing_class: the tokenizer (or a processor that has one); default: the model's. `tokenizer=` is accepted.
        model_init, callbacks, optimizers, preprocess_logits_for_metrics, compute_metrics: as in `Trainer`;
            predictions are [pairs, 2] mean log-probabilities of chosen and rejected answers.
        peft_config: a PEFT configuration; the model is wrapped with it before training.

    Raises:
        ConfigError, RowError, ModelError: each names the option, row or module and the remedy.
    """

    args: ORPOConfig  # Axolotl's own arguments have the same fields
    _tag_names: tuple[str, ...] = ("orpo",)

    def __init__(
        self,
        model: nn.Module | str | None = None,
        args: ORPOConfig | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable[..., nn.Module] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        peft_config: "PeftConfig | None" = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        args = ORPOConfig(output_dir="orpo_output") if args is None else args
        # Adapters get random values here, before Trainer sets the seed.
        enable_full_determinism(args.seed) if args.full_determinism else set_seed(args.seed)
        model_init = _prepared_model_init(model_init, args, peft_config)
        if model is None and model_init is not None:
            example = model_init(*[None] * number_of_arguments(model_init))  # a search passes its trial
        else:
            example = prepare_model(load_model(model, args), args, peft_config)
        if processing_class is None:
            processing_class = load_tokenizer(example, args) if tokenizer is None else tokenizer
        tokenizer = text_tokenizer.of(processing_class)
        args.remove_unused_columns = False
        check_batches(args, train_dataset)
        layout, passed_over = chosen_layout(example, args, data_collator)
        nll_over = getattr(data_collator, "nll_over", args.nll_over)
        announce(example, args, args.options(), layout, nll_over=nll_over, passed_over=passed_over)
        options = pair_options(args, encoder_decoder=is_encoder_decoder(example))
        prepare = self._prepare = functools.partial(prepared, tokenizer=tokenizer, options=options, args=args)
        if train_dataset is not None:
            with args.main_process_first(desc="tokenizing the training set"):
                train_dataset = prepare(train_dataset, name="train")
        with args.main_process_first(desc="tokenizing the evaluation set"):
            if are_several(eval_dataset):
                eval_dataset = {name: prepare(rows, name=name) for name, rows in eval_dataset.items()}
            elif eval_dataset is not None:
                eval_dataset = prepare(eval_dataset, name="eval")
        self._own_collator = data_collator is not None
        super().__init__(
            model=None if model is None else example,
            args=args,
            data_collator=data_collator or collator(tokenizer, args, layout.name),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            model_init=model_init if model is None else None,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        self.set_up_orpo(layout_check=args.layout_check)
        add_model_tags = getattr(self.model, "add_model_tags", None)
        if add_model_tags is not None:
            add_model_tags(list(self._tag_names))

    @property
    def orpo_options(self) -> ORPOOptions:
        """What defines the loss, from the arguments as they are now.

        Raises `ConfigError` for a value out of range.
        """
        return self.args.options()

    @orpo_options.setter
    def orpo_options(self, options: ORPOOptions) -> None:
        for name in LOSS_OPTIONS:
            setattr(self.args, name, getattr(options, name))

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets an option in `args`, where it is read; TRL's trainer has its options as attributes.

        Raises `ConfigError` for an option that would have no effect any more.
        """
        if name in FIXED_OPTIONS:
            raise cannot_change(name, value, getattr(vars(self).get("args"), name, None))
        if is_legacy(name):
            raise ConfigError(f"trainer.{name}={value!r} would have no effect: {todays_name(name)}")
        if name in RUN_OPTIONS:
            before = getattr(self.args, name)
            setattr(self.args, name, value)
            try:
                self.args.check()
            except ConfigError:
                setattr(self.args, name, before)
                raise
            return
        super().__setattr__(name, value)

    def prepare_rows(self, rows: Any, name: str) -> Any:
        """Prepared as the constructor prepares its sets."""
        return self._prepare(rows, name=name)

    def apply_options(self, new: dict[str, Any]) -> None:
        """Also gives the collator the new layout, or the new choice of tokens in the NLL."""
        self.args.check()
        super().apply_options(new)
        made = self.data_collator
        given = {"layout", "nll_over"} & new.keys()
        if given and (self._own_collator or not isinstance(made, ORPOCollator)):
            raise ConfigError(
                f"{' and '.join(sorted(given))} changed in the arguments, but data_collator, which was given to the "
                "trainer, decides: build a new trainer with another collator"
            )
        if not isinstance(made, ORPOCollator):
            return
        made.nll_over = new.get("nll_over", made.nll_over)
        made.show_example = new.get("show_example", made.show_example)
        if "layout" in new:
            made.layout, _ = best_layout(new["layout"], self.model)
            made.layout.prepare(self.model)
            self._layout_is_checked = not self.args.layout_check

    def create_model_card(  # type: ignore[override]  # TRL's order of arguments
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """`Trainer`'s, with TRL's names of arguments; "orpo" is added to the tags."""
        given = [tags] if isinstance(tags, str) else list(tags or [])
        if dataset_name is not None:
            kwargs["dataset"] = dataset_name
        super().create_model_card(model_name=model_name, tags=[*given, *self._tag_names], **kwargs)

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Also generates from one batch of prompts where `generate_during_eval` is set."""
        output = super().evaluation_loop(dataloader, *args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        if self.args.generate_during_eval and prefix.startswith("eval"):
            log_generations(self, dataloader.dataset, prefix)
        return output


def load_model(model: nn.Module | str | None, args: ORPOConfig) -> nn.Module:
    """The model itself, or the model of that name or path."""
    if isinstance(model, nn.Module):
        if args.model_init_kwargs:
            raise ConfigError(
                "model_init_kwargs is set but model is already instantiated: pass the model's name, or drop it"
            )
        return model
    if not isinstance(model, str):
        raise ConfigError(f"model is {model!r}: pass a model, the name of one, or model_init")
    given: Any = args.model_init_kwargs or {}
    arguments = {"dtype": "auto", "trust_remote_code": args.trust_remote_code, **given}
    config_arguments = {key: arguments[key] for key in ("revision", "trust_remote_code") if key in arguments}
    config = AutoConfig.from_pretrained(model, **config_arguments)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    loaded: nn.Module = kind.from_pretrained(model, **arguments)
    return loaded


def prepare_model(model: nn.Module, args: ORPOConfig, peft_config: "PeftConfig | None") -> nn.Module:
    """Switches dropout off, adds the PEFT adapter, and makes the inputs require gradients, in this order."""
    output_head(model)
    if args.disable_dropout:
        # Before PEFT wraps the model: the user has chosen the adapter's own dropout.
        disable_dropout(model)
    if peft_config is not None:
        model = add_adapter(model, args, peft_config)
    enable_input_require_grads = getattr(model, "enable_input_require_grads", None)
    if args.gradient_checkpointing and enable_input_require_grads is not None:
        # Reentrant checkpointing gives adapters no gradient at all unless the inputs require one.
        enable_input_require_grads()
    return model


def disable_dropout(model: nn.Module) -> None:
    """Sets every dropout of the base model to 0; layers of adapters keep theirs."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and "lora_dropout" not in name:
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # a plain number in transformers' attention layers


def add_adapter(model: nn.Module, args: ORPOConfig, peft_config: "PeftConfig | None") -> nn.Module:
    """Wraps the model with PEFT; a quantized model is prepared for k-bit training first."""
    try:
        from peft import PeftConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
    except ImportError as error:
        raise missing_extra("peft", "peft") from error
    if not isinstance(peft_config, PeftConfig):
        raise ConfigError(f"peft_config is {peft_config!r}: pass a configuration of PEFT, such as LoraConfig(...)")
    if isinstance(model, PeftModel):
        raise ConfigError(
            "peft_config is set but the model already carries an adapter: merge it first, or drop peft_config"
        )
    if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
        model = prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=args.gradient_checkpointing,
            gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs,
        )
    if is_in_the_cache(peft_config) and checkpointed(model):
        stop_checkpointing(model)  # PEFT refuses the model otherwise
    wrapped: nn.Module = get_peft_model(model, peft_config)
    return wrapped


def _prepared_model_init(
    model_init: Callable[..., nn.Module] | None, args: ORPOConfig, peft_config: "PeftConfig | None"
) -> Callable[..., Any] | None:
    if model_init is None:
        return None

    @functools.wraps(model_init)  # Trainer passes a trial where the signature has an argument
    def prepared_init(*trial: Any) -> nn.Module:
        return prepare_model(model_init(*trial), args, peft_config)

    return prepared_init


def load_tokenizer(model: nn.Module, args: ORPOConfig) -> PreTrainedTokenizerBase:
    """The tokenizer saved beside the model."""
    name = getattr(config_of(model), "_name_or_path", None)
    if not name:
        raise ConfigError("the model was not loaded from a path, so its tokenizer is unknown: pass processing_class")
    given = args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}
    revision = {"revision": given["revision"]} if given.get("revision") else {}
    return text_tokenizer.load(name, trust_remote_code=args.trust_remote_code, **revision)


def pair_options(args: ORPOFields, *, encoder_decoder: bool = False) -> PairOptions:
    """The arguments that decide how rows become pairs."""
    names = (option.name for option in dataclasses.fields(PairOptions) if option.name != "encoder_decoder")
    return PairOptions(encoder_decoder=encoder_decoder, **{name: getattr(args, name) for name in names})


def prepared(rows: Any, tokenizer: PreTrainedTokenizerBase, options: PairOptions, args: ORPOConfig, name: str) -> Any:
    """The tokenized dataset.  `prepare_dataset` logs a warning with the report where rows were cut or dropped."""
    dataset, report = prepare_dataset(rows, tokenizer, options, num_proc=args.dataset_num_proc, name=name)
    if report.all_whole():
        logger.info("%s", report.summary())
    return dataset


def collator(tokenizer: PreTrainedTokenizerBase, args: ORPOConfig, layout: str) -> ORPOCollator:
    """The collator that belongs to the arguments."""
    lengths = dataclasses.asdict(pair_options(args))
    del lengths["encoder_decoder"]  # the layout says it
    return ORPOCollator(
        tokenizer,
        layout=layout,
        nll_over=args.nll_over,
        padding_value=args.padding_value,
        show_example=args.show_example,
        **lengths,
    )


def chosen_layout(model: nn.Module, args: ORPOConfig, data_collator: object) -> tuple[Layout, dict[str, str]]:
    """The layout to train in, ready for the model, and why preferred ones were passed over.

    A collator of the user's own has chosen already.
    """
    if isinstance(data_collator, ORPOCollator):
        layout, passed_over = data_collator.layout, dict[str, str]()
        if args.layout not in ("auto", layout.name):
            raise ConfigError(
                f"layout={args.layout!r} in the arguments, and data_collator has the layout {layout.name!r}: make them "
                "agree, or leave one of them out"
            )
        if reason := layout.unsupported(model):
            raise ConfigError(
                f"data_collator has the layout {layout.name!r}, which cannot be used here: {reason}. Leave "
                "data_collator out, and the trainer takes a layout that can"
            )
    else:
        layout, passed_over = best_layout(args.layout, model)
    layout.prepare(model)
    return layout, passed_over
