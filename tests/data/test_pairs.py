"""A preference becomes a pair: where the answer begins, BOS and EOS, what is repaired, refused or dropped."""

from typing import Any

import pytest
from tokenizers import normalizers

from orpo_plugins.data.pairs import BuiltPair, Dropped, PairBuilder
from orpo_plugins.data.row_formats import parse_row
from orpo_plugins.errors import ConfigError, RowError
from orpo_plugins.hooks.types import TokenSequence
from orpo_plugins.options import PairOptions
from tests.kit.tokenizers import chatml_tokenizer, gpt2_tokenizer, inst_tokenizer

CHATML = chatml_tokenizer()
INST = inst_tokenizer()
GPT2 = gpt2_tokenizer()


def built(row: dict[str, Any], tokenizer: Any = CHATML, **options: Any) -> BuiltPair:
    result = PairBuilder(tokenizer, PairOptions(**options))(parse_row(row, 0))
    assert isinstance(result, BuiltPair), result
    return result


def dropped(row: dict[str, Any], tokenizer: Any = CHATML, **options: Any) -> str:
    result = PairBuilder(tokenizer, PairOptions(**options))(parse_row(row, 0))
    assert isinstance(result, Dropped), result
    return result.reason


def split(sequence: TokenSequence, tokenizer: Any = CHATML) -> tuple[str, str]:
    """The text that is not labelled, and the text that is."""
    pairs = list(zip(sequence.input_ids, sequence.labels, strict=True))
    assert all(label in (token, -100) for token, label in pairs)
    hidden = [token for token, label in pairs if label == -100]
    return tokenizer.decode(hidden), tokenizer.decode([token for token, label in pairs if label != -100])


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


# ---- what is labelled


def test_strings_are_joined_as_they_are_between_bos_and_eos() -> None:
    pair = built({"prompt": "the dog", "chosen": " sleeps", "rejected": " jumps"}).pair
    assert split(pair.chosen) == ("<s>the dog", " sleeps<|im_end|>")
    assert split(pair.rejected) == ("<s>the dog", " jumps<|im_end|>")


def test_a_token_that_merges_prompt_and_answer_belongs_to_the_answer() -> None:
    assert CHATML.tokenize("the dog jumps")[-1] == "Ġjumps"
    pair = built({"prompt": "the dog jum", "chosen": "ps", "rejected": " over"}).pair
    assert split(pair.chosen) == ("<s>the dog", " jumps<|im_end|>")
    assert split(pair.rejected) == ("<s>the dog jum", " over<|im_end|>")


def test_a_conversation_goes_through_the_chat_template() -> None:
    pair = built({"prompt": [user("the dog")], "chosen": [assistant("sleeps")], "rejected": [assistant("jumps")]}).pair
    prompt, answer = split(pair.chosen)
    assert prompt == "<s><|im_start|>user\nthe dog<|im_end|>\n<|im_start|>assistant\n"
    assert answer == "sleeps<|im_end|>"


def test_repeat_eos_ends_an_answer_as_trl_does() -> None:
    row = {"prompt": [user("the dog")], "chosen": [assistant("sleeps")], "rejected": [assistant("jumps")]}
    pair = built(row, repeat_eos=True).pair
    assert split(pair.chosen)[1] == "sleeps<|im_end|>\n<|im_end|>"
    turns = [user("Q"), assistant("the fox"), user("and"), assistant("the dog")]
    pair = built({"chosen": turns, "rejected": [user("Q"), assistant("it")]}, repeat_eos=True).pair
    assert split(pair.chosen)[1] == "the fox<|im_end|>\nthe dog<|im_end|>\n<|im_end|>"


def test_a_template_that_ends_answers_with_another_token_than_eos_is_warned_of_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tokenizer = chatml_tokenizer()
    row = {"prompt": [user("the dog")], "chosen": [assistant("sleeps")], "rejected": [assistant("jumps")]}
    built(row, tokenizer)
    assert caplog.messages == []
    tokenizer.eos_token = "<|im_start|>"
    builder = PairBuilder(tokenizer)
    for _ in range(2):
        result = builder(parse_row(row, 0))
    assert isinstance(result, BuiltPair)
    assert split(result.pair.chosen, tokenizer)[1] == "sleeps<|im_end|>\n<|im_start|>"
    (message,) = caplog.messages
    assert message.startswith(
        "the chat template ends an answer with '<|im_end|>', but the EOS token of the tokenizer is '<|im_start|>'"
    )
    assert "Set tokenizer.eos_token to '<|im_end|>' before training" in message
    assert message.endswith(f"eos_token_id={tokenizer.convert_tokens_to_ids('<|im_end|>')}")


def test_a_template_that_writes_bos_and_eos_has_each_once() -> None:
    row = {"prompt": [user("the dog")], "chosen": [assistant("sleeps")], "rejected": [assistant("jumps")]}
    sequence = built(row, INST).pair.chosen
    assert sequence.input_ids.count(INST.bos_token_id) == sequence.input_ids.count(INST.eos_token_id) == 1
    assert split(sequence, INST)[1].strip() == "sleeps</s>"


def test_a_tokenizer_that_adds_bos_itself_adds_it_once() -> None:
    sequence = built({"prompt": "the dog", "chosen": " sleeps", "rejected": " jumps"}, INST).pair.chosen
    assert sequence.input_ids[0] == INST.bos_token_id
    assert sequence.input_ids.count(INST.bos_token_id) == 1


def test_user_messages_inside_an_answer_are_not_labelled() -> None:
    row = {
        "chosen": [user("Q"), assistant("the fox"), user("and"), user("then"), assistant("the dog")],
        "rejected": [user("Q"), assistant("jumps"), user("why"), assistant("it sleeps")],
    }
    pair = built(row).pair
    opening, closing = "<|im_start|>assistant\n", "<|im_end|>\n"
    asked = f"<s><|im_start|>user\nQ{closing}{opening}"
    assert split(pair.chosen) == (
        f"{asked}\n<|im_start|>user\nand{closing}<|im_start|>user\nthen{closing}{opening}",
        "the fox<|im_end|>the dog<|im_end|>",
    )
    assert split(pair.rejected) == (
        f"{asked}\n<|im_start|>user\nwhy{closing}{opening}",
        "jumps<|im_end|>it sleeps<|im_end|>",
    )


def test_histories_that_differ_from_a_user_message_on_are_masked_up_to_the_answer() -> None:
    shared = [user("Q"), assistant("the fox")]
    row = {
        "chosen": [*shared, user("and"), assistant("the dog")],
        "rejected": [*shared, user("why"), assistant("it sleeps"), user("well")],
    }
    pair = built(row).pair
    assert split(pair.chosen)[1] == "the dog<|im_end|>"
    assert split(pair.rejected)[1] == "it sleeps<|im_end|>"
    assert split(pair.rejected)[0].endswith("<|im_start|>user\nwell<|im_end|>")


def test_turns_are_found_where_the_template_rewrites_earlier_ones() -> None:
    # As reasoning models' templates do: reasoning is kept in the last turn alone.
    tokenizer = chatml_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ message['content'] }}",
        "{{ message['content'] if loop.last else message['content'].split('</think>')[-1] }}",
    )
    row = {
        "chosen": [
            user("Q"),
            assistant("<think>fox</think>the dog"),
            user("and"),
            assistant("<think>it</think>sleeps"),
        ],
        "rejected": [user("Q"), assistant("<think>dog</think>the fox"), user("why"), assistant("jumps")],
    }
    assert split(built(row, tokenizer).pair.chosen, tokenizer)[1] == (
        "the dog<|im_end|><think>it</think>sleeps<|im_end|>"
    )


def test_rows_of_strings_with_a_system_column_use_the_template_where_there_is_one() -> None:
    row = {"system": "well", "prompt": "the dog", "chosen": "sleeps", "rejected": "jumps"}
    assert split(built(row).pair.chosen)[0].startswith(
        "<s><|im_start|>system\nwell<|im_end|>\n<|im_start|>user\nthe dog"
    )
    assert split(built(row, GPT2).pair.chosen, GPT2)[0] == "<|endoftext|>well\n\nthe dog"


def test_alpaca_rows_use_the_template_where_there_is_one() -> None:
    row = {"instruction": "the dog", "input": "fox", "chosen": "sleeps", "rejected": "jumps"}
    assert "<|im_start|>user\nthe dog\nfox<|im_end|>" in split(built(row).pair.chosen)[0]
    assert split(built(row, GPT2).pair.chosen, GPT2)[0].endswith("### Input:\nfox\n\n### Response:\n")


# ---- templated text beside a raw prompt


def templated(text: str, question: str = "the quick brown fox jumps") -> str:
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{text}<|im_end|>\n"


def test_templated_answers_beside_a_raw_prompt_do_not_repeat_it() -> None:
    row = {"prompt": "the quick brown fox jumps", "chosen": templated("over it"), "rejected": templated("over the dog")}
    result = built(row)
    assert result.repaired
    prompt, answer = split(result.pair.chosen)
    assert prompt == "<s><|im_start|>user\nthe quick brown fox jumps<|im_end|>\n<|im_start|>assistant\n"
    assert answer == "over it<|im_end|>"


def test_templated_answers_are_recognised_by_the_template_where_the_prompt_is_written_otherwise() -> None:
    system = "<|im_start|>system\nwell<|im_end|>\n"
    row = {
        "system": "well",
        "prompt": "well/nthe quick fox",
        "chosen": system + templated("jumps", "the quick fox"),
        "rejected": system + templated("sleeps", "the quick fox"),
    }
    result = built(row)
    assert result.repaired
    assert (
        split(result.pair.chosen)[0]
        == f"<s>{system}{templated('', 'the quick fox').removesuffix('<|im_end|>' + chr(10))}"
    )


def test_answers_that_repeat_a_long_prompt_without_markers_do_not_train_it_twice() -> None:
    prompt = "Human: please cancel my order Assistant:"
    result = built({"prompt": prompt, "chosen": f"{prompt} of course", "rejected": f"{prompt} never"}, GPT2)
    assert result.repaired
    assert split(result.pair.chosen, GPT2) == (f"<|endoftext|>{prompt}", " of course<|endoftext|>")


def with_special_tokens(*tokens: str, chat_template: bool = True) -> Any:
    tokenizer = chatml_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    if not chat_template:
        tokenizer.chat_template = None
    return tokenizer


@pytest.mark.parametrize("chat_template", [True, False])
@pytest.mark.parametrize("token", ["<think>", "<|python_tag|>", "[TOOL_CALLS]", "<tool_call>"])
def test_answers_may_begin_with_special_tokens_that_open_no_turn(token: str, chat_template: bool) -> None:
    tokenizer = with_special_tokens(token, chat_template=chat_template)
    row = {"prompt": "what is the price", "chosen": f"{token} easy", "rejected": f"{token} hard"}
    result = built(row, tokenizer)
    assert not result.repaired
    assert split(result.pair.chosen, tokenizer) == ("<s>what is the price", f"{token} easy<|im_end|>")
    alone = built({**row, "rejected": "hard"}, tokenizer)
    assert split(alone.pair.chosen, tokenizer)[1] == f"{token} easy<|im_end|>"


@pytest.mark.parametrize("row", [{"instruction": "the price"}, {"system": "well", "prompt": "the price"}])
def test_special_tokens_at_the_start_of_answers_do_not_switch_the_template_off(row: dict[str, Any]) -> None:
    tokenizer = with_special_tokens("<think>")
    result = built({**row, "chosen": "<think>easy", "rejected": "<think>hard"}, tokenizer)
    prompt, answer = split(result.pair.chosen, tokenizer)
    assert prompt.endswith("<|im_start|>user\nthe price<|im_end|>\n<|im_start|>assistant\n")
    assert answer == "<think>easy<|im_end|>"


def test_turns_whose_template_opens_them_with_text_alone_are_found() -> None:
    answers = {name: f"[INST] the quick brown fox [/INST] {name}" for name in ("chosen", "rejected")}
    result = built({"prompt": "the quick brown fox", **answers}, INST)
    assert result.repaired
    assert split(result.pair.chosen, INST)[0].endswith("[INST] the quick brown fox [/INST]")


@pytest.mark.parametrize("prompt", ["hi", "the dog"])
def test_a_prompt_that_answers_of_the_template_happen_to_hold_stays(prompt: str) -> None:
    opening = "<|im_start|>assistant\n"
    result = built({"prompt": prompt, "chosen": f"{opening}{prompt} there", "rejected": f"{opening}{prompt} you"})
    assert not result.repaired
    assert split(result.pair.chosen) == (f"<s>{prompt}", f"{opening}{prompt} there<|im_end|>")


@pytest.mark.parametrize(
    ("before", "behind"),
    [("\n\nHuman: ", "\n\nAssistant:"), ("[INST] ", " [/INST]"), ("### Instruction:\n", "\n\n### Response:\n")],
)
@pytest.mark.parametrize("question", ["where is my parcel", "hi"])
def test_answers_that_hold_a_conversation_as_text_do_not_repeat_its_question(
    before: str, behind: str, question: str
) -> None:
    text = f"{before}{question}{behind}"
    for prompt in (question, text, f"{before}{question}"):
        result = built({"prompt": prompt, "chosen": f"{text} gladly", "rejected": f"{text} never"})
        assert result.repaired
        assert split(result.pair.chosen) == (f"<s>{text.rstrip(' ')}", " gladly<|im_end|>")


def test_content_in_parts_is_a_string_where_the_template_reads_no_parts() -> None:
    row = {"prompt": [user("the price")], "chosen": [assistant("easy")], "rejected": [assistant("hard")]}
    parts = {name: [m | {"content": [{"type": "text", "text": m["content"]}]} for m in row[name]] for name in row}
    assert built(parts) == built(row)
    assert "type" not in split(built(parts).pair.chosen)[0]


@pytest.mark.parametrize(
    "row",
    [
        {"system": ["half \ud83d"], "prompt": "Q", "chosen": "A", "rejected": "B"},
        {"prompt": [{"role": "half \ud83d", "content": "Q"}], "chosen": "A", "rejected": "B"},
    ],
)
def test_half_a_surrogate_pair_anywhere_in_a_conversation_is_refused(row: dict[str, Any]) -> None:
    with pytest.raises(RowError, match=r"contains '\\ud83d'.*half of a surrogate pair"):
        built(row)


def test_a_question_that_both_answers_restate_stays_and_is_reported() -> None:
    question = "what is the price of one parcel"
    row = {"prompt": question, "chosen": f"{question}? it is 12", "rejected": f"{question}? it is 46"}
    result = built(row)
    assert (result.repaired, result.restated) == (False, True)
    assert split(result.pair.chosen)[0] == f"<s>{question}"
    marked = {name: text.replace(question, f"Question: {question}") for name, text in row.items()}
    assert not built(marked).repaired
    short = {"prompt": "Q", "chosen": "User: Quick\nAssistant: yes", "rejected": "User: Quick\nAssistant: no"}
    assert split(built(short).pair.chosen)[0] == "<s>Q"
    later = {"prompt": question, "chosen": f"you ask {question}: 12", "rejected": f"you ask {question}: 46"}
    assert not built(later).repaired
    assert not built(later).restated


def test_a_short_prompt_may_stand_in_an_answer() -> None:
    result = built({"prompt": "the dog", "chosen": "the dog sleeps", "rejected": "the dog jumps"})
    assert not result.repaired
    assert split(result.pair.chosen) == ("<s>the dog", "the dog sleeps<|im_end|>")


def test_an_answer_that_is_the_prompt_and_no_more_is_an_answer() -> None:
    prompt = "please cancel my order, thank you"
    result = built({"prompt": prompt, "chosen": f"{prompt}{prompt}", "rejected": prompt}, GPT2)
    assert not result.repaired
    assert split(result.pair.rejected, GPT2) == (f"<|endoftext|>{prompt}", f"{prompt}<|endoftext|>")


def test_a_templated_prompt_with_answers_that_go_on_in_the_template_is_left_alone() -> None:
    opening = "<|im_start|>assistant\n"
    row = {"prompt": "<|im_start|>user\nfox<|im_end|>\n", "chosen": f"{opening}the dog", "rejected": f"{opening}it"}
    result = built(row)
    assert not result.repaired
    assert split(result.pair.chosen)[1] == f"{opening}the dog<|im_end|>"


@pytest.mark.parametrize(
    ("chosen", "rejected", "names"),
    [
        ("<s>sleeps", "<s>jumps", "chosen and rejected"),
        (templated("sleeps", "the dog"), "jumps", "chosen"),
        ("sleeps", templated("jumps", "the dog"), "rejected"),
        (templated("sleeps", "a dog"), templated("jumps", "the fox"), "chosen and rejected"),
    ],
)
def test_templated_text_that_cannot_be_told_from_the_prompt_is_refused(chosen: str, rejected: str, names: str) -> None:
    message = rf"^{names}: the text begins with a special token \('<.*\), the prompt \('the dog'\) does not"
    with pytest.raises(RowError, match=message):
        built({"prompt": "the dog", "chosen": chosen, "rejected": rejected})


# ---- what is dropped


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "", "chosen": "A", "rejected": "B"}, "empty prompt"),
        ({"prompt": " \n", "chosen": "A", "rejected": "B"}, "empty prompt"),
        ({"system": "S", "prompt": "", "chosen": "A", "rejected": "B"}, "empty prompt"),
        ({"instruction": "", "input": "", "chosen": "A", "rejected": "B"}, "empty prompt"),
        ({"prompt": [], "chosen": [assistant("A")], "rejected": [assistant("B")]}, "empty prompt"),
        ({"chosen": [user("P"), assistant("A")], "rejected": [user("Q"), assistant("B")]}, "empty prompt"),
        ({"prompt": "Q", "chosen": "", "rejected": "B"}, "the chosen answer is empty"),
        ({"prompt": "Q", "chosen": "A", "rejected": " \n"}, "the rejected answer is empty"),
        (
            {"prompt": [user("Q")], "chosen": [assistant("")], "rejected": [assistant("B")]},
            "the chosen answer is empty",
        ),
        ({"prompt": "Q", "chosen": "<|im_end|>", "rejected": "B"}, "the chosen answer has special tokens only"),
        (
            {"prompt": [user("Q")], "chosen": [assistant("A")], "rejected": [assistant("<s> <|im_end|>")]},
            "the rejected answer has special tokens only",
        ),
        ({"prompt": "Q", "chosen": "A", "rejected": "A"}, "chosen equals rejected"),
        ({"chosen": "Q: A", "rejected": "Q: A"}, "chosen equals rejected"),
        (
            {"chosen": [user("Q"), assistant("A")], "rejected": [user("Q"), assistant("A")]},
            "chosen equals rejected",
        ),
    ],
)
def test_a_row_that_teaches_nothing_is_dropped_with_a_reason(row: dict[str, Any], reason: str) -> None:
    assert dropped(row) == reason


def test_answers_that_the_template_makes_equal_are_dropped() -> None:
    row = {"prompt": [user("Q")], "chosen": [assistant("fox")], "rejected": [assistant("fox ")]}
    assert dropped(row, INST) == "chosen equals rejected"


def test_an_answer_that_the_tokenizer_does_not_know_at_all_is_dropped() -> None:
    tokenizer = inst_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("#", "")
    row = {"prompt": "the dog", "chosen": "##", "rejected": " jumps"}
    assert dropped(row, tokenizer) == "the chosen answer is empty after tokenization"


def test_answers_that_differ_beyond_the_limit_are_dropped() -> None:
    row = {"prompt": "the dog", "chosen": " sleeps and then it jumps", "rejected": " sleeps and then it answers"}
    assert dropped(row, max_completion_length=2) == "chosen equals rejected after truncation"


def test_a_long_history_of_its_own_may_leave_no_room_for_an_answer() -> None:
    row = {
        "chosen": [user("fox"), user("the dog " * 20), assistant("A")],
        "rejected": [user("fox"), user("it " * 20), assistant("B")],
    }
    assert dropped(row, max_length=30) == "truncation leaves no token of the chosen answer"


# ---- what is refused


def test_a_tokenizer_without_eos_is_refused() -> None:
    tokenizer = gpt2_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="the tokenizer has no EOS token.*set tokenizer.eos_token.*setup_chat_format"):
        PairBuilder(tokenizer)
    templated = chatml_tokenizer()
    templated.eos_token = None
    with pytest.raises(ConfigError, match="set tokenizer.eos_token to the token that ends answers in its template$"):
        PairBuilder(templated)  # setup_chat_format would refuse it
    templated.eos_token = "<|im_end|>"
    PairBuilder(templated)


def test_a_conversation_needs_a_chat_template() -> None:
    row = {"prompt": [user("Q")], "chosen": [assistant("A")], "rejected": [assistant("B")]}
    with pytest.raises(ConfigError, match="no chat template: set tokenizer.chat_template, or call .*setup_chat_format"):
        built(row, GPT2)


def test_a_template_that_passes_over_strings_is_refused_and_gets_parts() -> None:
    tokenizer = chatml_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for part in m['content'] %}{{ part['text'] }}"
        "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    row = {"prompt": [user("Q")], "chosen": [assistant("A")], "rejected": [assistant("B")]}
    with pytest.raises(ConfigError, match="does not write messages whose content is a string"):
        built(row, tokenizer)
    parts = {name: [m | {"content": [{"type": "text", "text": m["content"]}]} for m in row[name]] for name in row}
    assert "A" in split(built(parts, tokenizer).pair.chosen, tokenizer)[1]


def test_a_conversation_that_the_template_refuses_is_named_by_its_roles() -> None:
    row = {"system": "S", "prompt": [user("Q")], "chosen": [assistant("A")], "rejected": [assistant("B")]}
    message = r"the chat template refuses the messages \(roles: system, user, assistant\): only user and assistant"
    with pytest.raises(RowError, match=message):
        built(row, INST)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 1}, "max_length is 1: it must be None or a whole number of at least 2"),
        ({"max_length": 10.5}, "max_length is 10.5: it must be None or a whole number"),
        ({"max_prompt_length": 0}, "max_prompt_length is 0: it must be None or a whole number of at least 1"),
        ({"max_completion_length": -3}, "max_completion_length is -3"),
        ({"truncation_mode": "middle"}, "unknown truncation_mode 'middle'; known: keep_end, keep_start"),
        (
            {"max_length": 64, "max_prompt_length": 64},
            "max_prompt_length 64 leaves no room for an answer in max_length 64",
        ),
    ],
)
def test_lengths_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PairOptions(**options)
