"""`orpo-plugins chat`: what training saved can be talked to."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch

from orpo_plugins import ORPOConfig, ORPOTrainer, setup_chat_format
from orpo_plugins.data.dataset import prepare_dataset
from orpo_plugins.errors import ConfigError
from orpo_plugins.integrations import cli as command_line
from orpo_plugins.integrations import cli_chat as chat
from orpo_plugins.options import PairOptions
from tests.kit import tiny
from tests.kit.encoder_decoder import build as encoder_decoder
from tests.kit.encoder_decoder import tokenizer as encoder_decoder_tokenizer

GREEDY = chat.ChatOptions(max_new_tokens=4, temperature=0)


def talk(model: Any, tokenizer: Any, *lines: str, options: chat.ChatOptions = GREEDY) -> tuple[list[Any], str]:
    """(messages, what was written) after `lines`."""
    written = io.StringIO()
    return chat.chat(model, tokenizer, lines, options, output=written), written.getvalue()


def test_an_answer_is_what_generate_gives_after_the_template(tmp_path: Path) -> None:
    model, tokenizer = chat.load(tiny.saved(tmp_path))
    messages, written = talk(model, tokenizer, "refund please\n")
    ids = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_tensors="pt")["input_ids"]
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
    assert messages[0] == {"role": "user", "content": "refund please"}
    assert messages[1] == {"role": "assistant", "content": tokenizer.decode(expected, skip_special_tokens=True)}
    assert written == messages[1]["content"] + "\n"


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_decoder_model_reads_what_it_was_trained_on(name: str, tmp_path: Path) -> None:
    tokenizer = encoder_decoder_tokenizer(bos=name == "bart")
    encoder_decoder(name).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, loaded = chat.load(str(tmp_path), device="cpu")
    messages, written = talk(model, loaded, "refund please")
    row = {"prompt": messages[:1], "chosen": "gladly", "rejected": "never"}
    pairs, _ = prepare_dataset([row], tokenizer, PairOptions(encoder_decoder=True))
    prompt = pairs[0]["chosen_input_ids"][: pairs[0]["chosen_labels"].count(-100)]
    assert prompt[-1] == tokenizer.eos_token_id
    expected = encoder_decoder(name).eval().generate(torch.tensor([prompt]), max_new_tokens=4, do_sample=False)
    assert messages[1]["content"] == tokenizer.decode(expected[0], skip_special_tokens=True)
    assert written == messages[1]["content"] + "\n"


def test_a_conversation_goes_on_until_it_is_cleared(tmp_path: Path) -> None:
    model, tokenizer = chat.load(tiny.saved(tmp_path))
    options = chat.ChatOptions(max_new_tokens=2, temperature=0, system="sorry")
    roles = [message["role"] for message in talk(model, tokenizer, "order", "", "parcel", options=options)[0]]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    cleared, _ = talk(model, tokenizer, "order", "clear", "parcel", "exit", "invoice", options=options)
    assert [message["content"] for message in cleared[:2]] == ["sorry", "parcel"]
    assert len(cleared) == 3


def test_without_a_template_a_line_is_continued(tmp_path: Path) -> None:
    model, tokenizer = tiny.model(), tiny.tokenizer(None)
    _, written = talk(model.eval(), tokenizer, "refund")
    assert written.startswith("The tokenizer has no chat template: each line is continued as plain text.\n")


def test_the_end_of_a_turn_that_only_the_tokenizer_knows_ends_an_answer() -> None:
    model, tokenizer = tiny.model().eval(), tiny.tokenizer()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.generation_config.eos_token_id = 5
    tokenizer.eos_token = "<pad>"  # the likeliest token, where all are alike
    messages, _ = talk(model, tokenizer, "order")
    assert messages[-1]["content"] == ""


@pytest.mark.filterwarnings("default:Setting `save_embedding_layers`:UserWarning")
def test_an_adapter_with_new_tokens_is_loaded_with_its_base(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    tiny.model().save_pretrained(tmp_path / "base")
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model, tokenizer = setup_chat_format(base, tiny.tokenizer(None))
    args = ORPOConfig(output_dir=str(tmp_path / "out"), max_steps=1, learning_rate=0.1, report_to="none", use_cpu=True)
    adapter = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    trainer = ORPOTrainer(
        model, args, train_dataset=tiny.conversations(4), processing_class=tokenizer, peft_config=adapter
    )
    trainer.save_model()
    loaded, tokenizer = chat.load(str(tmp_path / "out"), device="cpu")
    ids = torch.arange(len(tokenizer) - 8, len(tokenizer)).reshape(1, -1)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, trainer.model.eval()(input_ids=ids).logits)
    assert talk(loaded, tokenizer, "order")[0][-1]["role"] == "assistant"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "--max_new_tokens is 0: it must be at least 1"),
        ({"temperature": -1.0}, "--temperature is -1.0: it must be 0 or more"),
        ({"top_p": 0.0}, "--top_p is 0.0: it must be above 0 and at most 1"),
    ],
)
def test_a_bad_option_is_one_clear_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        chat.ChatOptions(**options)
    assert str(error.value) == message


def test_the_command_reads_its_input_to_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny.saved(tmp_path)
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO("order\nparcel\n"))
    assert command_line.main(["chat", "--model_name_or_path", model, "--max_new_tokens", "2", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.endswith("\n")


def test_a_folder_without_a_model_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["chat", "--model_name_or_path", str(tmp_path / "nothing")]) == 2
    assert f"no model can be loaded from '{tmp_path / 'nothing'}'" in capsys.readouterr().err
