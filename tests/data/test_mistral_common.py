"""mistral-common's tokenizers, which give conversations as ids: compared with that package's own encoding."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest

from orpo_plugins import ORPOCollator, setup_chat_format
from orpo_plugins.data.cache import tokenizer_identity
from orpo_plugins.data.chat_id_pairs import gives_chats_as_ids
from orpo_plugins.errors import ConfigError, RowError
from orpo_plugins.integrations import cli_chat as chat
from tests.kit import tiny
from tests.kit.mistral import CALLS, DIALOGUE, FILES, MODES, ROW, STRINGS, TOOLS, file, prepared, saved, tokenizer, turn
from tests.kit.training import trainer

pytestmark = pytest.mark.slow


def encoded(messages: list[dict[str, Any]], name: str, mode: str, tools: list[Any] | None = None) -> list[int]:
    """A request, or with mode "finetuning" a whole conversation, as mistral-common itself encodes it."""
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.protocol.instruct.validator import ValidationMode
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    inner = MistralTokenizer.from_file(str(file(name)), mode=ValidationMode[mode])
    request = ChatCompletionRequest.from_openai(messages=messages, tools=tools)
    return list(inner.encode_chat_completion(request).tokens)


def parts(row: dict[str, Any], side: str) -> list[list[int]]:
    """The runs of labelled tokens."""
    runs: list[list[int]] = [[]]
    for label in row[f"{side}_labels"]:
        if label != -100:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FILES)
def test_an_answer_is_what_the_conversation_has_behind_the_request(name: str, mode: str) -> None:
    row = prepared(ROW, tokenizer(name, mode))
    request = encoded(ROW["prompt"], name, "test")
    for side in ("chosen", "rejected"):
        whole = encoded([*ROW["prompt"], *ROW[side]], name, "finetuning")
        assert whole[: len(request)] == request
        assert row[f"{side}_input_ids"] == whole
        assert row[f"{side}_labels"] == [-100] * len(request) + whole[len(request) :]
    assert whole[0] == tokenizer(name).bos_token_id
    assert whole[-1] == tokenizer(name).eos_token_id


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("system", [False, True])
def test_of_several_turns_the_assistants_are_labelled_and_no_others(name: str, mode: str, system: bool) -> None:
    # Some write a system message before the last question, so that what precedes a turn is no request of its own.
    given = {**DIALOGUE, "prompt": [*([turn("system", "be kind")] if system else []), *DIALOGUE["prompt"]]}
    row = prepared(given, tokenizer(name, mode))
    assert row["chosen_input_ids"] == encoded([*given["prompt"], *given["chosen"]], name, "finetuning")
    decode = tokenizer(name).decode
    assert [decode(part).strip(" ▁") for part in parts(row, "chosen")] == [
        "which▁one</s>" if "model" in FILES[name] else "which one</s>",
        "tomorrow</s>",
    ]
    last = prepared(given, tokenizer(name, mode), train_on="last")
    assert last["chosen_input_ids"] == row["chosen_input_ids"]
    assert parts(last, "chosen") == parts(row, "chosen")[-1:]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["v3", "v7", "tekken"])
def test_calls_are_labelled_and_what_tools_answer_is_not(name: str, mode: str) -> None:
    row = prepared(CALLS, tokenizer(name, mode))
    whole = encoded([*CALLS["prompt"], *CALLS["chosen"]], name, "finetuning", TOOLS)
    assert row["chosen_input_ids"] == whole
    first, second = parts(row, "chosen")
    assert first[0] == tokenizer(name).convert_tokens_to_ids("[TOOL_CALLS]")
    assert first[-1] == second[-1] == tokenizer(name).eos_token_id
    request = encoded(CALLS["prompt"], name, "test", TOOLS)
    assert whole[: len(request) + len(first)] == request + first
    assert tokenizer(name).decode(second).replace("▁", " ").strip() == "at the depot</s>"


def test_an_answer_that_goes_on_with_the_assistants_last_message_begins_with_its_own_text() -> None:
    row = {**ROW, "prompt": [*ROW["prompt"], turn("assistant", "well")]}
    made = prepared(row, tokenizer())
    assert made["chosen_input_ids"] == encoded([*row["prompt"], *row["chosen"]], "tekken", "finetuning")
    assert tokenizer().decode(parts(made, "chosen")[0]).strip() == "it will reach you tomorrow</s>"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FILES)
def test_strings_are_joined_with_bos_and_eos_once(name: str, mode: str) -> None:
    made = tokenizer(name, mode)
    inner = made.tokenizer.instruct_tokenizer.tokenizer
    row = prepared(STRINGS, made)
    whole = inner.encode(STRINGS["prompt"] + STRINGS["chosen"], bos=True, eos=True)
    assert row["chosen_input_ids"] == whole
    (answer,) = parts(row, "chosen")
    assert answer == whole[len(inner.encode(STRINGS["prompt"], bos=True, eos=False)) :]


@pytest.mark.parametrize("mode", MODES)
def test_strings_and_their_system_message_become_a_conversation(mode: str) -> None:
    messages = {"prompt": [turn("user", "order")], "chosen": "gladly", "rejected": "never"}
    strings = {**messages, "prompt": "order"}
    made = tokenizer(mode=mode)
    assert prepared(strings, made, template_strings=True) == prepared(messages, made)
    assert prepared(strings | {"system": "be kind"}, made) == prepared(messages | {"system": "be kind"}, made)


def test_text_parts_without_a_type_are_not_passed_over() -> None:
    row = {**ROW, "chosen": [turn("assistant", "") | {"content": [{"text": "it will reach you tomorrow"}]}]}
    assert prepared(row, tokenizer()) == prepared(ROW, tokenizer())


def test_rows_without_a_rejected_answer() -> None:
    row = prepared({**ROW, "rejected": None}, tokenizer(), sft_rows=True)
    assert row["chosen_labels"] == prepared(ROW, tokenizer())["chosen_labels"]
    assert row["rejected_input_ids"] == []


@pytest.mark.parametrize(
    ("row", "name", "message"),
    [
        ({**STRINGS, "prompt": "<s>[INST]where[/INST]"}, "tekken", "column 'prompt' has a special token at the beg"),
        ({**STRINGS, "chosen": "tomorrow</s>"}, "v3", "column 'chosen' has a special token at the beginning or end"),
        ({**ROW, "chosen": [turn("assistant", "[TOOL_CALLS] tomorrow")]}, "v3", "column 'chosen' has a special token"),
        ({**ROW, "chosen": [turn("narrator", "so"), *ROW["chosen"]]}, "v3", "refuses the messages .*narrator"),
        ({**ROW, "tools": TOOLS}, "v1", "row 0: the row has tools, but the tokenizer leaves them out"),
        ({**CALLS, "chosen": [*CALLS["chosen"], turn("user", "so"), turn("assistant", "no")]}, "v2", "leaves out some"),
        ({**ROW, "prompt": [turn("user", "hi"), turn("tool", "x"), turn("user", "y")]}, "v3", "tool_call_id"),
    ],
)  # fmt: skip
def test_what_cannot_be_right_is_refused(row: dict[str, Any], name: str, message: str) -> None:
    with pytest.raises(RowError, match=message):
        prepared(row, tokenizer(name))


def test_what_cannot_be_set_up_is_refused() -> None:
    with pytest.raises(ConfigError, match="MistralCommonBackend has a chat format of its own, .* do not call"):
        setup_chat_format(tiny.model(), tokenizer())
    with pytest.raises(ConfigError, match="MistralCommonBackend does not encode special tokens that stand in text"):
        prepared(STRINGS, tokenizer(), encoder_decoder=True)


def test_other_tokenizers_are_told_apart_by_what_they_do() -> None:
    assert gives_chats_as_ids(tokenizer())
    for template in (tiny.CHAT_TEMPLATE, None):
        assert not gives_chats_as_ids(tiny.tokenizer(template))


def test_its_identity_is_that_of_its_file(tmp_path: Path) -> None:
    from transformers.tokenization_mistral_common import MistralCommonBackend

    copied = MistralCommonBackend(str(shutil.copy(file("v3"), tmp_path)))
    assert tokenizer_identity(copied) == tokenizer_identity(tokenizer("v3"))
    assert all(tokenizer_identity(tokenizer(other)) != tokenizer_identity(copied) for other in ("v2", "v7"))
    json.dumps(tokenizer_identity(copied))


@pytest.mark.parametrize("name", ["v3", "tekken"])
def test_the_collator_pads_and_travels_to_workers(name: str) -> None:
    collator = ORPOCollator(tokenizer(name))
    batch = collator([ROW, DIALOGUE])
    collator._read = pickle.loads(pickle.dumps(collator._read))
    assert collator([ROW, DIALOGUE])["input_ids"].equal(batch["input_ids"])
    shorter = batch["attention_mask"].sum(1).argmin()
    padding = batch["input_ids"][shorter][batch["attention_mask"][shorter] == 0]
    assert set(padding.tolist()) == {tokenizer(name).pad_token_id}


@pytest.mark.parametrize("name", ["v3", "tekken"])
def test_trainer_evaluation_saving_and_chat(name: str, tmp_path: Path) -> None:
    rows = [ROW, DIALOGUE, STRINGS, CALLS] * 2
    made = trainer(
        tmp_path / "out",
        model=saved(tmp_path / "model", name),
        rows=rows,
        eval_dataset=rows[:2],
        tokenizer=None,
        generate_during_eval=True,
        max_steps=1,
    )
    assert made.train_dataset[0]["chosen_labels"] == prepared(ROW, tokenizer(name))["chosen_labels"]
    made.train()
    made.evaluate()
    (table,) = (tmp_path / "out" / "generations").iterdir()
    assert all("where is my parcel" in row["Prompt"].replace("▁", " ") for row in json.loads(table.read_text()))
    assert "⁇" not in table.read_text()
    made.save_model()
    model, loaded = chat.load(str(tmp_path / "out"), device="cpu")
    assert type(loaded) is type(tokenizer())
    question = [turn("user", "where is my parcel")]
    assert chat._prompt(loaded, question, encoder=False) == encoded(question, name, "test")
    said = chat.chat(model, loaded, ["where is my parcel", "hello"], chat.ChatOptions(max_new_tokens=2, temperature=0))
    assert [message["role"] for message in said] == ["user", "assistant"] * 2
    unheard = [*question, turn("assistant", ""), turn("user", "hello")]
    assert chat._prompt(loaded, unheard, encoder=False)[-1] == encoded(question, name, "test")[-1]
