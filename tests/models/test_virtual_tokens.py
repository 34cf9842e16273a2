"""Adapters with virtual tokens: every path reads the batch's own positions, and refuses any others."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from orpo_plugins import ORPOCollator, ORPOLoss, errors, fuse_head, orpo_forward, orpo_loss
from orpo_plugins.hooks import plugins
from orpo_plugins.models.virtual_tokens import virtual_tokens
from tests.kit import tiny
from tests.kit.compare import assert_all_within, assert_within
from tests.kit.encoder_decoder import batch as encoder_decoder_batch
from tests.kit.encoder_decoder import build as encoder_decoder
from tests.kit.stock import losses, stock
from tests.kit.training import logged, trainer

peft = pytest.importorskip("peft")
# PEFT 0.21 passes what transformers 5.24 calls otherwise.
pytestmark = pytest.mark.filterwarnings("default:`past_key_values` is deprecated:FutureWarning")

VIRTUAL = 5
ADAPTERS: dict[str, Callable[..., Any]] = {
    "prompt tuning": lambda **more: peft.PromptTuningConfig(num_virtual_tokens=VIRTUAL, **more),
    "p-tuning": lambda **more: peft.PromptEncoderConfig(
        num_virtual_tokens=VIRTUAL, encoder_hidden_size=16, encoder_dropout=0.0, **more
    ),
    "multitask": lambda **more: peft.MultitaskPromptTuningConfig(num_virtual_tokens=VIRTUAL, num_tasks=3, **more),
    "cpt": lambda **more: peft.CPTConfig(
        cpt_token_ids=[7, 8, 9, 10, 11], cpt_mask=[1] * 5, cpt_tokens_type_mask=[1, 2, 2, 3, 4], **more
    ),
    "prefix tuning": lambda **more: peft.PrefixTuningConfig(num_virtual_tokens=VIRTUAL, **more),
    "cartridge": lambda **more: peft.CartridgeConfig(num_virtual_tokens=VIRTUAL, num_frozen_tokens=0, **more),
}
BEFORE_THE_ROWS = ("prompt tuning", "p-tuning", "multitask", "cpt")


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": 320}
    return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: tiny.model(num_key_value_heads=4),  # prefix tuning knows of one number of heads
    "gpt2": gpt2,
    "opt": lambda: tiny.model("OPT", num_key_value_heads=4, dropout=0.0, ffn_dim=48, word_embed_proj_dim=32),
}


def adapted(model: str, adapter: str) -> nn.Module:
    """A model under an adapter whose virtual tokens matter; the base's norms and head are trained too."""
    torch.manual_seed(1)
    made: Any = peft.get_peft_model(MODELS[model](), ADAPTERS[adapter](task_type="CAUSAL_LM"))
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or "norm" in name or "ln_" in name)
        if "prompt_encoder" in name and parameter.ndim > 1:
            parameter.data.normal_(0.0, 0.5)
    return made.train()


def batch(adapter: str, **options: Any) -> dict[str, Any]:
    made = ORPOCollator(tiny.tokenizer(), max_length=100, **options)(tiny.rows(3))
    return {**made, "task_ids": torch.tensor([0, 1, 2, 0, 1, 2])} if adapter == "multitask" else made


def pair_by_pair(model: nn.Module, adapter: str) -> Tensor:
    """ORPO's loss from the model's logits for one sequence at a time, without padding."""
    pairs = ORPOCollator(tiny.tokenizer(), max_length=100).pairs(tiny.rows(3))
    means: list[list[Tensor]] = [[], []]
    nll, tokens = torch.zeros(()), 0
    for index, pair in enumerate(pairs):
        for side, sequence in enumerate((pair.chosen, pair.rejected)):
            ids, labels = torch.tensor(sequence.input_ids), torch.tensor(sequence.labels)
            task = {"task_ids": torch.tensor([index])} if adapter == "multitask" else {}
            logits = model(input_ids=ids[None], attention_mask=torch.ones(1, len(ids)), **task).logits[0, -len(ids) :]
            logps = logits[:-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
            means[side].append(logps[labels[1:] != -100].mean())
            if side == 0:
                nll, tokens = nll - logps.sum(), tokens + len(logps)
    return orpo_loss(torch.stack(means[0]), torch.stack(means[1]), nll / tokens).loss


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# ---- numbers


@pytest.mark.parametrize("kernel", ["chunked", "reference"])
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("model", MODELS)
def test_loss_and_gradients_are_those_of_each_sequence_alone(model: str, adapter: str, kernel: str) -> None:
    made = adapted(model, adapter)
    expected = pair_by_pair(made, adapter)
    expected_gradients = gradients(made, expected)
    assert any("prompt_encoder" in name for name in expected_gradients)
    for options in ({}, {"pad_to_multiple_of": 16}):
        loss = orpo_forward(made, batch(adapter, **options), kernel=kernel).loss
        assert_within(loss.detach(), expected.detach(), 1e-6)
        assert_all_within(gradients(made, loss), expected_gradients, 1e-5)


@pytest.mark.parametrize("adapter", ["prompt tuning", "p-tuning", "cpt"])
def test_evaluation_and_its_figures_do_not_depend_on_the_kernel(adapter: str, tmp_path: Path) -> None:
    metrics = []
    for kernel in ("chunked", "reference"):
        options = {"layout": "auto", "eval_dataset": tiny.rows(5), "kernel": kernel}
        made = trainer(tmp_path, model=adapted("llama", adapter), **options)
        assert made.data_collator.layout.name == "padded"
        metrics.append(made.evaluate())
    for key in ("eval_loss", "eval_logits/chosen", "eval_logits/rejected", "eval_logps/rejected"):
        assert metrics[0][key] == pytest.approx(metrics[1][key], rel=1e-5), key


@pytest.mark.parametrize("adapter", ["prompt tuning", "multitask"])
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_decoder_model_reads_the_answers_positions(name: str, adapter: str) -> None:
    torch.manual_seed(1)
    config = ADAPTERS[adapter](task_type="SEQ_2_SEQ_LM")
    model: Any = peft.get_peft_model(encoder_decoder(name), config).eval()
    made = encoder_decoder_batch()
    if adapter == "multitask":
        made["task_ids"] = torch.tensor([0, 1, 2, 0, 1, 2])
        # PEFT builds the decoder's inputs from labels alone, and fails without them.
        with pytest.raises((TypeError, ValueError)):
            orpo_forward(model, made)
        return
    out = orpo_forward(model, made)
    labels = made["decoder_labels"]
    logits = model(input_ids=made["input_ids"], attention_mask=made["attention_mask"], labels=labels).logits
    logps = -nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    means = logps.sum(1) / (labels != -100).sum(1)
    assert_within(torch.cat([out.chosen_logps, out.rejected_logps]), means.detach(), 1e-5)


def test_a_disabled_adapter_has_no_virtual_tokens() -> None:
    made = adapted("llama", "prompt tuning").eval()
    with made.disable_adapter():
        off = orpo_forward(made, batch("prompt tuning")).loss
    assert_within(off.detach(), orpo_forward(MODELS["llama"](), batch("prompt tuning")).loss.detach(), 1e-6)


@pytest.mark.parametrize(("adapter", "number"), [("prompt tuning", VIRTUAL), ("prefix tuning", VIRTUAL), (None, 0)])
def test_the_number_of_virtual_tokens_is_the_active_adapters(adapter: str | None, number: int) -> None:
    model = tiny.model() if adapter is None else adapted("llama", adapter)
    assert virtual_tokens(model) == (0, number)


# ---- any other number of positions


class Longer(nn.Module):
    """Returns more positions than it was given, or fewer."""

    def __init__(self, inner: Any, more: int) -> None:
        super().__init__()
        self.module, self.more = inner, more

    def forward(self, **inputs: Any) -> Any:
        for key in {"input_ids", "attention_mask"} & inputs.keys():
            columns = inputs[key][:, :1].expand(-1, max(self.more, 0))
            inputs[key] = torch.cat([columns, inputs[key]], dim=1)[:, max(-self.more, 0) :]
        return self.module(**inputs)


@pytest.mark.parametrize("kernel", ["chunked", "reference"])
@pytest.mark.parametrize("more", [1, VIRTUAL, -1])
@pytest.mark.parametrize("adapter", [None, "prompt tuning", "prefix tuning"])
def test_another_number_of_positions_is_an_error_that_says_both(adapter: str | None, more: int, kernel: str) -> None:
    model = tiny.model() if adapter is None else adapted("llama", adapter)
    made = batch("")
    rows, width = made["input_ids"].shape
    found = rows * (width + more + (VIRTUAL if adapter in BEFORE_THE_ROWS else 0))
    with pytest.raises(errors.BatchError, match=rf"returned {found} positions for {rows} rows of {width} tokens"):
        orpo_forward(Longer(model, more), made, kernel=kernel)


@pytest.mark.parametrize("more", [1, -1])
@pytest.mark.parametrize("layout", ["packed", "shared"])
def test_it_is_in_layouts_of_one_row(layout: str, more: int) -> None:
    model = tiny.model()
    made = ORPOCollator(tiny.tokenizer(), layout=layout)(tiny.rows(2))
    plugins.layout(layout).prepare(model)
    model.model.norm.register_forward_hook(lambda *a: torch.cat([a[2], a[2][:, :1]], 1) if more > 0 else a[2][:, :-1])
    with pytest.raises(errors.BatchError, match=rf"returned {made['input_ids'].shape[1] + more} positions for 1 rows"):
        orpo_forward(model, made, kernel="chunked")


# ---- ORPOLoss


def test_the_loss_function_alone_refuses_positions_that_it_cannot_tell(tmp_path: Path) -> None:
    model = adapted("llama", "prompt tuning")
    made = batch("prompt tuning")
    outputs = model(input_ids=made["input_ids"], attention_mask=made["attention_mask"])
    width = made["input_ids"].shape[1]
    message = rf"returned {width + VIRTUAL} positions for rows of {width} tokens.*call fuse_head\(trainer\)"
    with pytest.raises(errors.BatchError, match=message):
        ORPOLoss()(outputs, made["labels"])
    plain = stock(tmp_path)
    plain.model = plain.model_wrapped = adapted("llama", "prompt tuning")
    with pytest.raises(errors.BatchError, match=r"call fuse_head\(trainer\)"):
        plain.train()
    fuse_head(plain).train()
    assert len(losses(plain)) == 2


@pytest.mark.parametrize("options", [{}, {"pad_to_multiple_of": 16}])
def test_the_loss_function_knows_the_width_of_a_batch(options: dict[str, Any]) -> None:
    model, made = tiny.model(), batch("", **options)
    outputs = model(input_ids=made["input_ids"], attention_mask=made["attention_mask"])
    loss = ORPOLoss(beta=0.1)(outputs, made["labels"])
    assert_within(loss.detach(), orpo_forward(model, made, beta=0.1).loss.detach(), 1e-6)


def test_a_table_without_a_width_is_refused() -> None:
    made = batch("")
    made["labels"][:, 3] %= 8
    outputs = tiny.model()(input_ids=made["input_ids"])
    with pytest.raises(errors.BatchError, match="does not say how wide its rows are: make it with ORPOCollator"):
        ORPOLoss()(outputs, made["labels"])


# ---- checkpointing


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["prefix tuning", "cartridge"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_an_adapter_in_the_cache_trains_without_checkpointing(
    wrapped: bool, adapter: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {"max_steps": 2, "optim": "adamw_torch", "learning_rate": 0.05}
    weights = []
    for checkpointing in (True, False):
        model = MODELS["llama"]()
        if checkpointing and not wrapped:
            model.gradient_checkpointing_enable()
        config = ADAPTERS[adapter](task_type="CAUSAL_LM")
        torch.manual_seed(42)
        given = {"model": peft.get_peft_model(model, config)} if wrapped else {"model": model, "peft_config": config}
        made = trainer(tmp_path, gradient_checkpointing=checkpointing, **given, **options)
        before = {name: p.detach().clone() for name, p in made.model.named_parameters()}
        made.train()
        assert len(logged(made, "loss")) == 2
        changed = {name: p.detach() for name, p in made.model.named_parameters() if not torch.equal(p, before[name])}
        assert changed
        weights.append(changed)
    assert_all_within(weights[0], weights[1], 1e-6)
    assert caplog.text.count("gradient checkpointing is off: it runs layers without the cache") == 1


def test_a_stock_trainer_turns_checkpointing_off_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    made = stock(tmp_path, gradient_checkpointing=True)
    made.model = made.model_wrapped = adapted("llama", "prefix tuning")
    fuse_head(made).train()
    assert len(losses(made)) == 2
    assert "gradient checkpointing is off" in caplog.text


def test_a_loop_of_ones_own_is_told_to_turn_checkpointing_off() -> None:
    made: Any = adapted("llama", "prefix tuning")
    made.get_base_model().gradient_checkpointing_enable()
    with pytest.raises(errors.ModelError, match=r"prefix tuning puts .* call model.gradient_checkpointing_disable\(\)"):
        orpo_forward(made, batch(""))
    assert orpo_forward(made.eval(), batch("")).loss.isfinite()
    made.train().gradient_checkpointing_disable()
    orpo_forward(made, batch("")).loss.backward()


@pytest.mark.parametrize("adapter", BEFORE_THE_ROWS)
def test_other_adapters_train_under_checkpointing(adapter: str) -> None:
    made: Any = adapted("llama", adapter)
    expected = gradients(made, orpo_forward(made, batch(adapter)).loss)
    made.get_base_model().gradient_checkpointing_enable()
    assert_all_within(gradients(made, orpo_forward(made, batch(adapter)).loss), expected, 1e-6)


@pytest.mark.parametrize("number", [3, 4, 7])
@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
@pytest.mark.parametrize("model", ["llama", "t5"])
def test_a_table_of_as_many_virtual_tokens_as_were_examined_is_no_table_of_positions(
    number: int, kind: str, model: str
) -> None:
    made = encoder_decoder("t5") if model == "t5" else tiny.model(num_key_value_heads=4)
    task = "SEQ_2_SEQ_LM" if model == "t5" else "CAUSAL_LM"
    wrapped = peft.get_peft_model(made, getattr(peft, kind)(num_virtual_tokens=number, task_type=task))
    batch = encoder_decoder_batch() if model == "t5" else ORPOCollator(tiny.tokenizer())(tiny.rows(3))
    assert orpo_forward(wrapped, batch).loss.isfinite()
