"""Encoder-decoder models: the encoder reads the prompt, the decoder the answers, with the numbers of TRL."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from orpo_plugins import ORPOCollator, ORPOConfig, ORPOTrainer, errors, orpo_forward
from orpo_plugins.data.dataset import prepare_dataset
from orpo_plugins.layouts.auto import best_layout
from orpo_plugins.options import PairOptions
from orpo_plugins.targets import targets_of
from tests.kit import tiny
from tests.kit.beside_trl import compare
from tests.kit.compare import assert_all_within, assert_within
from tests.kit.encoder_decoder import EOS, MODELS, batch, build, tokenizer


def loss_and_gradients(model: PreTrainedModel, kernel: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    model.eval()
    loss = orpo_forward(model, batch(), kernel=kernel).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# ---- numbers


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", ["t5", "t5 1.1", "bart"])
def test_loss_gradients_and_metrics_are_those_of_trl(name: str, accumulation: int, tmp_path: Path) -> None:
    compare(
        lambda: build(name),
        tiny.rows(12),
        tmp_path,
        "auto",
        make_tokenizer=lambda: tokenizer(bos=name == "bart"),
        gradient_accumulation_steps=accumulation,
        max_completion_length=16,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        learning_rate=0.1,  # at 0.5 the third step of T5 1.1 differs by 1.6e-5: rounding, amplified by the weights
    )


@pytest.mark.slow
def test_conversations_are_those_of_trl(tmp_path: Path) -> None:
    conversations = tiny.conversations(8)
    compare(lambda: build("t5"), conversations, tmp_path, "auto", make_tokenizer=tokenizer, max_completion_length=128)


@pytest.mark.parametrize("name", MODELS)
def test_the_fused_head_equals_the_models_own_logits(name: str) -> None:
    model = build(name)
    loss, gradients = loss_and_gradients(model, "reference")
    fused, fused_gradients = loss_and_gradients(model, "chunked")
    assert_within(fused, loss, 1e-6)
    assert_all_within(fused_gradients, gradients, 5e-6)


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_is_what_the_model_itself_computes_for_the_answers(name: str) -> None:
    model, made = build(name).eval(), batch()
    out = orpo_forward(model, made)
    labels = made["decoder_labels"]
    with torch.no_grad():
        own = model(input_ids=made["input_ids"], attention_mask=made["attention_mask"], labels=labels)
    losses = torch.nn.functional.cross_entropy(own.logits.flatten(0, 1), labels.flatten(), reduction="none")
    means = -losses.view(labels.shape).sum(1) / (labels != -100).sum(1)
    assert_within(torch.cat([out.chosen_logps, out.rejected_logps]), means, 1e-5)
    chosen = labels[:3] != -100
    assert_within(out.nll_loss, losses.view(labels.shape)[:3].sum() / chosen.sum(), 1e-5)


def test_a_model_without_a_rule_of_its_own_reads_answers_behind_its_start_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build("t5").eval()
    own = orpo_forward(model, batch()).loss
    monkeypatch.delattr(type(model), "prepare_decoder_input_ids_from_labels")
    assert_within(orpo_forward(model, batch()).loss, own.detach(), 0.0)


# ---- rows


def test_a_template_that_writes_bos_and_eos_itself_gets_each_once() -> None:
    own = tokenizer(bos=True)
    own.chat_template = tiny.CHAT_TEMPLATE
    made = ORPOCollator(own, layout="seq2seq")(tiny.conversations(2))
    for row in (*made["input_ids"], *made["decoder_labels"]):
        ids = row[(row != -100) & (row != 0)].tolist()
        assert [token == 1 for token in ids[:2]] == [True, False]
        assert [token == EOS for token in ids[-2:]] == [False, True]


def test_prompts_and_answers_each_have_the_tokenizers_special_tokens() -> None:
    made = batch()
    for row in (*made["input_ids"], *made["decoder_labels"]):
        ids = row[(row != -100) & (row != 0)]
        assert ids[-1] == EOS
        assert (ids == EOS).sum() == 1
    table = targets_of(made)
    assert table.num_pairs == 3
    assert torch.equal(table.token_ids, made["decoder_labels"].flatten()[table.positions])
    assert torch.equal(table.in_nll, table.sequence_ids < 3)


def test_eos_is_added_to_answers_where_the_tokenizer_adds_none() -> None:
    made = ORPOCollator(tiny.tokenizer(), layout="seq2seq")(tiny.rows(2))
    assert all(row[row != -100][-1] == EOS for row in made["decoder_labels"])
    assert (made["input_ids"] != EOS).all()


def test_each_side_has_a_limit_of_its_own_and_keeps_its_special_tokens() -> None:
    row = {"prompt": "today order refund number", "chosen": "please sorry desk later", "rejected": "never"}
    whole = tokenizer(bos=True)([row["prompt"], row["chosen"]])["input_ids"]
    for mode, prompt in (("keep_end", [1, *whole[0][-3:]]), ("keep_start", [*whole[0][:3], EOS])):
        options = PairOptions(
            max_length=9, max_prompt_length=4, max_completion_length=3, truncation_mode=mode, encoder_decoder=True
        )
        dataset, report = prepare_dataset([row], tokenizer(bos=True), options)
        assert dataset[0]["chosen_input_ids"] == [*prompt, *whole[1][:2], EOS]
        assert dataset[0]["chosen_labels"] == [-100] * 4 + [*whole[1][:2], EOS]
        assert (report.prompt_truncated, report.chosen_truncated) == (1, 1)


def test_a_limit_without_room_for_text_drops_the_row() -> None:
    options = PairOptions(max_completion_length=1, encoder_decoder=True)
    with pytest.raises(errors.ConfigError, match="truncation leaves no token of the chosen answer"):
        prepare_dataset(tiny.rows(1), tokenizer(), options)


def test_tokenized_rows_pass_through() -> None:
    dataset, _ = prepare_dataset(tiny.rows(3), tokenizer(), PairOptions(encoder_decoder=True))
    again = ORPOCollator(tokenizer(), layout="seq2seq")(list(dataset))
    made = batch()
    assert again.keys() == made.keys()
    for key, value in made.items():
        assert torch.equal(again[key], value), key


# ---- which layout


def test_auto_takes_seq2seq_and_says_why_not_the_others() -> None:
    layout, passed_over = best_layout("auto", build("t5"))
    assert layout.name == "seq2seq"
    assert passed_over.keys() == {"shared", "packed", "padded"}
    assert all("T5ForConditionalGeneration is an encoder-decoder model" in reason for reason in passed_over.values())


def test_auto_says_nothing_of_seq2seq_for_a_decoder() -> None:
    layout, passed_over = best_layout("auto", tiny.model())
    assert layout.name == "shared"
    assert not passed_over


@pytest.mark.parametrize(
    ("name", "model", "message"),
    [
        ("padded", lambda: build("t5"), "T5ForConditionalGeneration is an encoder-decoder model, whose prompts belong"),
        ("seq2seq", tiny.model, "LlamaForCausalLM has no encoder for the prompts"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(name: str, model: Any, message: str) -> None:
    with pytest.raises(errors.ConfigError, match=f"layout '{name}' cannot be used here: {message}"):
        best_layout(name, model())


def test_a_batch_of_another_layout_is_refused() -> None:
    padded = ORPOCollator(tokenizer())(tiny.rows(2))
    with pytest.raises(errors.BatchError, match=r"no inputs for its decoder: make it with ORPOCollator.*'seq2seq'"):
        orpo_forward(build("t5"), padded)
    with pytest.raises(errors.BatchError, match=r"LlamaForCausalLM is none: make it with ORPOCollator.*'padded'"):
        orpo_forward(tiny.model(), batch())


def test_a_configuration_without_a_pad_token_is_named() -> None:
    model = build("t5")
    model.config.pad_token_id = None
    with pytest.raises(errors.ModelError, match=r"model\.config\.pad_token_id is None"):
        orpo_forward(model, batch())


def test_an_answer_token_beyond_the_vocabulary_is_named() -> None:
    made = batch()
    made["labels"][0, 1] = 320
    with pytest.raises(errors.BatchError, match="token 320 is outside the model's vocabulary of 320"):
        orpo_forward(build("t5"), made)


# ---- the trainer


def test_a_path_is_enough(tmp_path: Path) -> None:
    build("t5").save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    args = ORPOConfig(
        output_dir=str(tmp_path / "out"), max_steps=2, use_cpu=True, report_to="none", bf16=False, disable_tqdm=True,
        generate_during_eval=True, max_completion_length=8, eval_strategy="steps", eval_steps=2,
    )  # fmt: skip
    rows = tiny.rows(8)
    trainer = ORPOTrainer(str(tmp_path / "model"), args, train_dataset=rows, eval_dataset=rows[:2])
    trainer.train()
    assert trainer.data_collator.layout.name == "seq2seq"
    assert type(trainer.model).__name__ == "T5ForConditionalGeneration"
    assert any("eval_rewards/accuracies" in entry for entry in trainer.state.log_history)
    assert list((tmp_path / "out" / "generations").iterdir())
