"""Models that training would not change, that see the tokens they predict, or that have no position for them."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from torch import nn

from orpo_plugins import ORPOCollator, errors, fuse_head, orpo_forward
from orpo_plugins.hooks import plugins
from orpo_plugins.models.checks import check_model, examine
from tests.kit import tiny
from tests.kit.compare import assert_within
from tests.kit.encoder_decoder import batch as encoder_decoder_batch
from tests.kit.encoder_decoder import build as encoder_decoder
from tests.kit.encoder_decoder import tokenizer as encoder_decoder_tokenizer
from tests.kit.stock import losses, stock
from tests.kit.training import logged, trainer

peft = pytest.importorskip("peft")


def batch(**options: Any) -> dict[str, Any]:
    return ORPOCollator(tiny.tokenizer(), **options)(tiny.rows(4))


def build(name: str, **changes: Any) -> nn.Module:
    """A tiny model of a class of transformers, in training mode."""
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    made: nn.Module = cls(cls.config_class(**{**tiny.SIZES, **changes}))
    with torch.no_grad():  # far from initialization, where attention matters
        for parameter in made.parameters():
            parameter.mul_(2.0)
    return made.train()


# ---- nothing to train


def saved_adapter(folder: Path) -> str:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(tiny.model(), config).save_pretrained(folder / "adapter", save_embedding_layers=False)
    return str(folder / "adapter")


def loaded(folder: Path, **options: Any) -> Any:
    return peft.PeftModel.from_pretrained(tiny.model(), saved_adapter(folder), **options)


def frozen(folder: Path) -> nn.Module:
    del folder
    return tiny.model().requires_grad_(False)


def disabled(folder: Path) -> nn.Module:
    made = loaded(folder, is_trainable=True)
    made.base_model.disable_adapter_layers()
    return made


def with_unused_module(folder: Path) -> nn.Module:
    """Trainable is only what the loss does not depend on."""
    made: Any = frozen(folder)
    made.score = nn.Linear(32, 1)
    return made


NOTHING_TO_TRAIN: dict[str, tuple[Callable[[Path], nn.Module], str]] = {
    "loaded": (loaded, r"no parameter of LlamaForCausalLM requires a gradient.*is_trainable=True"),
    "frozen": (frozen, r"no parameter of LlamaForCausalLM requires a gradient.*unfreeze what is to be trained"),
    "disabled": (disabled, r"no parameter of LlamaForCausalLM requires a gradient.*enable it if it was disabled"),
    "unused": (with_unused_module, r"the loss depends on none of the 2 trainable parameters \(score.weight, …\)"),
}


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", NOTHING_TO_TRAIN)
def test_a_model_with_nothing_to_train_is_refused_before_the_first_step(
    name: str, checkpointing: bool, tmp_path: Path
) -> None:
    make, message = NOTHING_TO_TRAIN[name]
    options = {"gradient_checkpointing": checkpointing}
    made = trainer(tmp_path, model=make(tmp_path), eval_dataset=tiny.rows(3), **options)
    assert made.evaluate()["eval_loss"] > 0
    assert made.predict(made.eval_dataset).predictions.shape == (3, 2)
    with pytest.raises(errors.ModelError, match=message):
        made.train()
    assert made.state.global_step == 0
    fused = stock(tmp_path, **options)
    fused.model = fused.model_wrapped = make(tmp_path)
    assert fuse_head(fused).evaluate()["eval_loss"] > 0
    with pytest.raises(errors.ModelError, match=message):
        fused.train()


@pytest.mark.parametrize("kernel", ["chunked", "reference"])
@pytest.mark.parametrize("name", NOTHING_TO_TRAIN)
def test_a_loop_of_ones_own_is_told_so_in_training_mode(name: str, kernel: str, tmp_path: Path) -> None:
    make, message = NOTHING_TO_TRAIN[name]
    model: Any = make(tmp_path)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner.enable_input_require_grads()
    with pytest.raises(errors.ModelError, match=message):
        orpo_forward(model.train(), batch(), kernel=kernel)
    assert orpo_forward(model.eval(), batch(), kernel=kernel).loss.isfinite()
    with torch.no_grad():
        assert orpo_forward(model.train(), batch(), kernel=kernel).loss.isfinite()


@pytest.mark.parametrize("name", NOTHING_TO_TRAIN)
def test_the_loss_function_alone_is_told_so_by_the_graph(name: str, tmp_path: Path) -> None:
    make, _ = NOTHING_TO_TRAIN[name]
    made = stock(tmp_path, gradient_checkpointing=True)
    made.model = made.model_wrapped = make(tmp_path)
    assert made.evaluate()["eval_loss"] > 0
    with pytest.raises(errors.ModelError, match="the loss depends on no parameter.*is_trainable=True"):
        made.train()


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [False, True])
def test_following_the_advice_trains_the_adapter(reentrant: bool, tmp_path: Path) -> None:
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    made = trainer(tmp_path, model=loaded(tmp_path, is_trainable=True), **options)
    made.train()
    assert all(norm > 0 for norm in logged(made, "grad_norm"))
    plain = stock(tmp_path, **options)
    plain.model = plain.model_wrapped = loaded(tmp_path, is_trainable=True)
    plain.train()
    assert len(losses(plain)) == 2


# ---- causal


def paligemma(implementation: str = "sdpa", **text: Any) -> nn.Module:
    vision = {"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    sizes = {**tiny.SIZES, "model_type": "gemma", "head_dim": 8, **text}
    config = transformers.PaliGemmaConfig(
        vision_config={**vision, "num_attention_heads": 2, "image_size": 28, "patch_size": 14},
        text_config=sizes,
        projection_dim=32,
        image_token_index=319,
    )
    torch.manual_seed(0)
    return transformers.PaliGemmaForConditionalGeneration._from_config(config, attn_implementation=implementation)


class SeesAllInTraining(transformers.LlamaForCausalLM):
    """Attends in both directions as long as it is trained."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for layer in self.model.layers:
            layer.self_attn.is_causal = not self.training
        return super().forward(*args, **kwargs)


class SeesTheNext(transformers.LlamaForCausalLM):
    """Mixes a little of every next position in."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hook = self.model.norm.register_forward_hook(
            lambda module, given, out: out + 0.1 * nn.functional.pad(out[:, 1:], (0, 0, 0, 1))
        )
        try:
            return super().forward(*args, **kwargs)
        finally:
            hook.remove()


BIDIRECTIONAL: dict[str, Callable[[], nn.Module]] = {
    "paligemma": paligemma,
    "gemma": lambda: build("GemmaForCausalLM", head_dim=8, use_bidirectional_attention=True),
    "gemma3": lambda: build("Gemma3ForCausalLM", head_dim=8, use_bidirectional_attention=True),
    "xlm": lambda: build("XLMWithLMHeadModel", emb_dim=32, n_layers=2, n_heads=4),
    "in training alone": lambda: SeesAllInTraining(transformers.LlamaConfig(**tiny.SIZES)),
    "one position ahead": lambda: SeesTheNext(transformers.LlamaConfig(**tiny.SIZES)),
}
MESSAGE = r"is not causal: its logits change by .* with the tokens behind them .* Take a causal language model"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", ["chunked", "reference"])
@pytest.mark.parametrize("name", BIDIRECTIONAL)
def test_a_model_that_sees_what_it_predicts_is_refused(name: str, kernel: str, dtype: torch.dtype) -> None:
    with pytest.raises(errors.ModelError, match=MESSAGE):
        orpo_forward(BIDIRECTIONAL[name]().train().to(dtype), batch(), kernel=kernel)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["auto", "padded"])
@pytest.mark.parametrize("name", ["paligemma", "in training alone"])
def test_the_trainers_refuse_it_before_the_first_step(name: str, layout: str, tmp_path: Path) -> None:
    made = trainer(tmp_path, model=BIDIRECTIONAL[name](), layout=layout)
    with pytest.raises(errors.ModelError, match=MESSAGE):
        made.train()
    assert made.state.global_step == 0
    fused = stock(tmp_path)
    fused.model = fused.model_wrapped = BIDIRECTIONAL[name]()
    with pytest.raises(errors.ModelError, match=MESSAGE):
        fuse_head(fused).train()


EQUALLY_LONG = [{"prompt": "order today", "chosen": " gladly please", "rejected": " never later"}] * 4


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["paligemma", "gemma", "gemma3", "xlm", "in training alone"])
def test_a_loss_function_refuses_it_by_the_gradient_of_its_first_logits(
    name: str, checkpointing: bool, tmp_path: Path
) -> None:
    made = stock(tmp_path)
    made.model = made.model_wrapped = model = BIDIRECTIONAL[name]()
    made.train_dataset = EQUALLY_LONG  # PaliGemma is causal in batches with padding
    if checkpointing:
        if not model.supports_gradient_checkpointing:
            pytest.skip(f"{name} knows no gradient checkpointing")
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(errors.ModelError, match="its first logits have a gradient at later tokens .* Take a causal"):
        made.train()


@pytest.mark.parametrize("kind", ["plain", "dropout", "tied", "mixture", "frozen embeddings", "lora", "checkpointing"])
def test_a_loss_function_lets_causal_models_train(kind: str, tmp_path: Path) -> None:
    made = stock(tmp_path)
    changes: dict[str, Any] = {"dropout": {"attention_dropout": 0.5}, "tied": {"tie_word_embeddings": True}}
    model = tiny.mixture_of_experts() if kind == "mixture" else tiny.model(**changes.get(kind, {}))
    if kind == "frozen embeddings":
        model.get_input_embeddings().requires_grad_(False)
    if kind in ("lora", "checkpointing"):
        config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
        model.enable_input_require_grads()
        model = peft.get_peft_model(model, config)
    if kind == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": True})
    made.model = made.model_wrapped = model
    made.train()
    assert made.state.global_step > 0


def test_evaluation_does_not_hide_what_training_does() -> None:
    model = BIDIRECTIONAL["in training alone"]().eval()
    assert orpo_forward(model, batch()).loss.isfinite()
    with pytest.raises(errors.ModelError, match=MESSAGE):
        orpo_forward(model.train(), batch())


@pytest.mark.slow
def test_following_the_advice_makes_it_causal(tmp_path: Path) -> None:
    for model in (
        paligemma("eager"),
        build("GemmaForCausalLM", head_dim=8, use_bidirectional_attention=False),
        build("XLMWithLMHeadModel", emb_dim=32, n_layers=2, n_heads=4, causal=True),
        build("BertLMHeadModel", is_decoder=True),
    ):
        assert orpo_forward(model.train(), batch(), kernel="reference").loss.isfinite()
    made = trainer(tmp_path, model=paligemma())
    with pytest.raises(errors.ModelError, match=MESSAGE):
        made.train()
    made.model.set_attn_implementation("eager")
    made.train()
    assert len(logged(made, "loss")) == 3


CAUSAL: dict[str, Callable[[], nn.Module]] = {
    "llama": tiny.model,
    "mixtral": tiny.mixture_of_experts,
    "gemma2": lambda: tiny.model("Gemma2", head_dim=8),
    "mamba": lambda: tiny.model("Mamba", hidden_size=32),
    "gpt-oss": lambda: tiny.model("GptOss", num_local_experts=4, head_dim=8, sliding_window=3),
    "git": lambda: build(
        "GitForCausalLM", vision_config={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ),
    "t5": lambda: encoder_decoder("t5"),
    "bart": lambda: encoder_decoder("bart"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CAUSAL)
def test_causal_models_are_taken_with_dropout_and_checkpointing(name: str, dtype: torch.dtype) -> None:
    model: Any = CAUSAL[name]().train().to(dtype)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    if model.supports_gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": True})
    inputs = encoder_decoder_batch() if model.config.is_encoder_decoder else batch()
    assert examine(model, inputs).leak < 1e-6


def test_mixtures_whose_rounding_moves_routers_are_taken() -> None:
    """Two dozen layers in bf16 on random weights, whose routers stand near ties."""
    for seed in range(4):
        model = tiny.model("Mixtral", seed=seed, num_local_experts=8, num_hidden_layers=24)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(std=0.1)
        check_model(model.bfloat16().train(), batch())


def test_inputs_of_the_batchs_maker_say_themselves_what_attends_to_what() -> None:
    made = batch()
    made["token_type_ids"] = torch.ones_like(made["input_ids"])  # PaliGemma attends causally to ones
    assert orpo_forward(paligemma().train(), made).loss.isfinite()


def test_a_trainer_takes_them_from_a_collator_of_ones_own(tmp_path: Path) -> None:
    class WithTokenTypes(ORPOCollator):
        def __call__(self, rows: Any) -> dict[str, Any]:
            made = super().__call__(rows)
            return {**made, "token_type_ids": torch.ones_like(made["input_ids"])}

    made = trainer(tmp_path, model=paligemma(), data_collator=WithTokenTypes(tiny.tokenizer()))
    made.train()
    assert len(logged(made, "loss")) == 3


def test_looking_leaves_no_trace() -> None:
    model = tiny.model().train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    calls: list[None] = []
    model.register_forward_hook(lambda *_: calls.append(None))
    examine(model, batch())
    examine(model.eval(), batch())
    assert len(calls) == 3
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.train().modules()][:1] == modes[:1]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_batch_of_one_token_repeated_is_enough() -> None:
    made = batch()
    made["input_ids"].fill_(7)
    assert examine(tiny.model(), made).leak == 0.0


# ---- positions

POSITIONS = 48
LEARNED: dict[str, dict[str, Any]] = {
    "GPT2LMHeadModel": {"max_position_embeddings": POSITIONS},
    "OPTForCausalLM": {"max_position_embeddings": POSITIONS, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "GPTNeoForCausalLM": {
        "max_position_embeddings": POSITIONS,
        "attention_types": [[["global", "local"], 1]],
        "num_layers": 2,
    },
    "GPTBigCodeForCausalLM": {"max_position_embeddings": POSITIONS},
    "BioGptForCausalLM": {"max_position_embeddings": POSITIONS},
    "OpenAIGPTLMHeadModel": {"max_position_embeddings": POSITIONS},
}
LONG = [
    *tiny.rows(6, longest=4),
    {"prompt": "refund" + " desk" * 40, "chosen": " gladly" + " call" * 30, "rejected": " never"},
    *tiny.rows(5, longest=4, seed=2),
]
"""The seventh row is longer than the tables of positions."""


def longest(rows: Any, **options: Any) -> int:
    return int(ORPOCollator(tiny.tokenizer(), **options)(list(rows))["input_ids"].shape[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNED)
def test_a_row_beyond_learned_positions_is_named_before_the_first_step(name: str, tmp_path: Path) -> None:
    made = trainer(tmp_path, model=build(name, **LEARNED[name]), rows=LONG, layout="padded")
    message = rf"row 6 of the tokenized training set has {longest(LONG)} tokens, and {name} has positions for "
    with pytest.raises(errors.ConfigError, match=message) as raised:
        made.train()
    assert made.state.global_step == 0
    advised = re.search(r"set max_length=(\d+)", str(raised.value))
    assert advised is not None
    assert int(advised[1]) == POSITIONS
    followed = trainer(
        tmp_path, model=build(name, **LEARNED[name]), rows=LONG, layout="padded", max_length=int(advised[1])
    )
    followed.train()
    assert len(logged(followed, "loss")) == 3


def test_an_evaluation_row_beyond_them_is_named_too(tmp_path: Path) -> None:
    options: dict[str, Any] = {"eval_dataset": {"short": tiny.rows(2, longest=4), "long": LONG}, "rows": LONG[:6]}
    name = "GPT2LMHeadModel"
    made = trainer(tmp_path, model=build(name, **LEARNED[name]), eval_strategy="steps", eval_steps=3, **options)
    with pytest.raises(errors.ConfigError, match="row 6 of the tokenized long set has"):
        made.train()


@pytest.mark.slow
def test_rows_that_fit_may_have_a_larger_max_length(tmp_path: Path) -> None:
    for name, changes in LEARNED.items():
        made = trainer(tmp_path, model=build(name, **changes), rows=LONG[:6], max_length=4096)
        made.train()
        assert len(logged(made, "loss")) == 3


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_a_batch_beyond_learned_positions_is_an_error_in_every_layout(layout: str) -> None:
    model = build("OPTForCausalLM", **LEARNED["OPTForCausalLM"])
    plugins.layout(layout).prepare(model)
    many = ORPOCollator(tiny.tokenizer(), layout=layout)(LONG[:6])  # one row of more tokens than positions
    assert orpo_forward(model, many).loss.isfinite()
    made = ORPOCollator(tiny.tokenizer(), layout=layout)(LONG)
    message = rf"a row of the batch has {longest(LONG)} tokens, and OPT.* for {POSITIONS}: set max_length={POSITIONS} "
    with pytest.raises(errors.BatchError, match=message):
        orpo_forward(model, made)
    orpo_forward(model, ORPOCollator(tiny.tokenizer(), max_length=POSITIONS, layout=layout)(LONG))


def test_streams_and_stock_trainers_are_checked_batch_by_batch(tmp_path: Path) -> None:
    name = "GPT2LMHeadModel"
    stream = Dataset.from_list(LONG).to_iterable_dataset()
    made = trainer(tmp_path, model=build(name, **LEARNED[name]), rows=stream, max_steps=6, layout="padded")
    with pytest.raises(errors.BatchError, match=rf"has {longest(LONG)} tokens, and {name} has positions for 48"):
        made.train()
    fused = stock(tmp_path, rows=LONG, max_steps=6)
    fused.model = fused.model_wrapped = build(name, **LEARNED[name])
    with pytest.raises(errors.BatchError, match=rf"has {longest(LONG)} tokens, and {name} has positions for 48"):
        fuse_head(fused).train()


@pytest.mark.slow
@pytest.mark.filterwarnings("default:`past_key_values` is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "OPTForCausalLM"])
def test_virtual_tokens_take_positions(name: str, kind: str, tmp_path: Path) -> None:
    changes = {**LEARNED[name], "num_key_value_heads": 4}
    adapter = getattr(peft, kind)(num_virtual_tokens=5, task_type="CAUSAL_LM")
    made = trainer(tmp_path, model=build(name, **changes), rows=LONG, peft_config=adapter)
    message = rf"{name} has positions for {POSITIONS - 5} beside 5 virtual ones: set max_length={POSITIONS - 5} "
    with pytest.raises(errors.ConfigError, match=message):
        made.train()
    followed = trainer(tmp_path, model=build(name, **changes), rows=LONG, peft_config=adapter, max_length=POSITIONS - 5)
    followed.train()
    assert len(logged(followed, "loss")) == 3


def test_rotary_models_go_beyond_their_max_position_embeddings(tmp_path: Path) -> None:
    made = trainer(tmp_path, model=tiny.model(max_position_embeddings=16), rows=LONG)
    made.train()
    assert len(logged(made, "loss")) == 3


@pytest.mark.slow
@pytest.mark.parametrize(("side", "option"), [("prompt", "max_prompt_length"), ("chosen", "max_completion_length")])
def test_encoder_and_decoder_have_positions_of_their_own(side: str, option: str, tmp_path: Path) -> None:
    def bart() -> nn.Module:
        made = encoder_decoder("bart")
        return type(made)(type(made.config)(**{**made.config.to_dict(), "max_position_embeddings": POSITIONS}))

    long = {**tiny.rows(1, longest=2)[0], side: " desk" * 80}
    rows = [*tiny.rows(5, longest=2), long]
    options: dict[str, Any] = {"rows": rows, "tokenizer": encoder_decoder_tokenizer()}
    with pytest.raises(errors.ConfigError, match=rf"row 5 of the tokenized training set .*: set {option}={POSITIONS} "):
        trainer(tmp_path, model=bart(), **options).train()
    followed = trainer(tmp_path, model=bart(), **options, **{option: POSITIONS})
    followed.train()
    assert len(logged(followed, "loss")) == 3
    made = ORPOCollator(encoder_decoder_tokenizer(), layout="seq2seq")(rows)
    with pytest.raises(errors.BatchError, match=rf"set {option}={POSITIONS} "):
        orpo_forward(bart(), made)


def test_losses_are_what_they_were_without_looking() -> None:
    """Nothing of a step depends on whether the model was looked at before."""
    results = []
    for looked in (False, True):
        model = tiny.model(attention_dropout=0.3).train()
        if looked:
            examine(model, batch())
        torch.manual_seed(3)
        results.append(orpo_forward(model, batch()).loss.detach())
    assert_within(results[1], results[0], 0.0)
