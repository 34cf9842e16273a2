"""Rows to batches, and a row that cannot be used inside a batch."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from orpo_plugins import ORPOCollator
from orpo_plugins.data.dataset import prepare_dataset
from orpo_plugins.errors import BatchError, ConfigError, RowError
from orpo_plugins.options import PairOptions
from orpo_plugins.targets import Targets
from tests.kit import tiny
from tests.kit.tokenizers import chatml_tokenizer, gpt2_tokenizer

TOKENIZER = chatml_tokenizer()
USER = {"role": "user", "content": "the dog"}
RAW: list[dict[str, Any]] = [
    {"prompt": "the quick brown fox", "chosen": " jumps over", "rejected": " sleeps"},
    {
        "chosen": [USER, {"role": "assistant", "content": "it"}],
        "rejected": [USER, {"role": "assistant", "content": "no"}],
    },
    {
        "conversations": [{"from": "human", "value": "the dog"}],
        "chosen": {"from": "gpt", "value": "sleeps"},
        "rejected": {"from": "gpt", "value": "jumps"},
    },
    {"instruction": "the dog", "input": "", "output": "it", "chosen": "it jumps", "rejected": "it sleeps"},
]
EQUAL = {"prompt": "it", "chosen": " jumps", "rejected": " jumps"}


def assert_equal(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def test_raw_rows_of_any_format_give_the_same_batch_as_tokenized_ones() -> None:
    tokenized, _ = prepare_dataset(RAW, TOKENIZER)
    assert_equal(ORPOCollator(TOKENIZER)(RAW), ORPOCollator(TOKENIZER)(list(tokenized)))


def test_a_padded_batch_has_chosen_rows_first_and_pad_tokens_at_the_end() -> None:
    batch = ORPOCollator(TOKENIZER)(RAW[:2])
    lengths = batch["attention_mask"].sum(1)
    assert batch["input_ids"].shape == (4, int(lengths.max()))
    assert [TOKENIZER.decode(row[:n]) for row, n in zip(batch["input_ids"], lengths, strict=True)][0::2] == [
        "<s>the quick brown fox jumps over<|im_end|>",
        "<s>the quick brown fox sleeps<|im_end|>",
    ]
    padding = batch["input_ids"][batch["attention_mask"] == 0]
    assert padding.unique().tolist() == [TOKENIZER.pad_token_id]


def predicted(batch: dict[str, Tensor]) -> list[tuple[int, str, bool, bool]]:
    """Sequence, token, and whether it counts as answer and in the NLL, with each row checked against the token."""
    table = Targets.from_table(batch["labels"], batch["input_ids"].shape[0] // 2)
    assert torch.equal(batch["input_ids"].flatten()[table.positions + 1], table.token_ids)
    columns = (table.sequence_ids.tolist(), table.token_ids.tolist(), table.in_answer.tolist(), table.in_nll.tolist())
    return [(s, TOKENIZER.decode([t]), a, n) for s, t, a, n in zip(*columns, strict=True)]


def test_the_nll_covers_the_sequence_or_the_completion() -> None:
    over = {
        nll_over: predicted(ORPOCollator(TOKENIZER, nll_over=nll_over)(RAW[:1]))
        for nll_over in ("sequence", "completion")
    }
    for lines in over.values():
        assert "".join(token for s, token, answer, _ in lines if answer and s == 0) == " jumps over<|im_end|>"
        assert "".join(token for s, token, answer, _ in lines if answer and s == 1) == " sleeps<|im_end|>"
        assert not any(nll for s, _, _, nll in lines if s == 1)
    assert "".join(t for _, t, _, nll in over["sequence"] if nll) == "the quick brown fox jumps over<|im_end|>"
    assert "".join(t for _, t, _, nll in over["completion"] if nll) == " jumps over<|im_end|>"


def test_padding_to_a_multiple_changes_nothing_but_the_width() -> None:
    plain, wide = (ORPOCollator(TOKENIZER, pad_to_multiple_of=m)(RAW[:2]) for m in (None, 16))
    width = plain["input_ids"].shape[1]
    assert width % 16
    assert wide["input_ids"].shape[1] == -(-width // 16) * 16
    assert torch.equal(wide["input_ids"][:, :width], plain["input_ids"])
    assert wide["attention_mask"][:, width:].sum() == 0
    assert wide["input_ids"][:, width:].unique().tolist() == [TOKENIZER.pad_token_id]
    assert predicted(wide) == predicted(plain)
    assert torch.equal(wide["shift_labels"], plain["shift_labels"])


def test_layouts_are_taken_by_name() -> None:
    packed = ORPOCollator(TOKENIZER, layout="packed")(RAW[:2])
    padded = ORPOCollator(TOKENIZER, layout="padded")(RAW[:2])
    assert packed["input_ids"].shape == (1, int(padded["attention_mask"].sum()))
    assert torch.equal(packed["labels"][:, 1], padded["labels"][:, 1])


def test_auto_means_what_it_means_to_a_trainer_and_needs_the_model() -> None:
    assert ORPOCollator(TOKENIZER, layout="auto", model=tiny.model()).layout.name == "shared"
    assert ORPOCollator(TOKENIZER, layout="auto", model=tiny.model("StableLm")).layout.name == "padded"
    with pytest.raises(ConfigError, match=r"layout='auto' depends on the model: pass it too, ORPOCollator\("):
        ORPOCollator(TOKENIZER, layout="auto")
    with pytest.raises(ConfigError, match="layout 'seq2seq' cannot be used here: LlamaForCausalLM has no enc"):
        ORPOCollator(TOKENIZER, layout="seq2seq", model=tiny.model())
    collator = ORPOCollator(TOKENIZER)
    with pytest.raises(ConfigError, match="layout='auto' depends on the model"):
        collator.layout = "auto"


def test_lengths_are_honoured() -> None:
    collator = ORPOCollator(TOKENIZER, 12, max_prompt_length=4, max_completion_length=3, truncation_mode="keep_start")
    assert collator(RAW)["input_ids"].shape[1] <= 7


def test_a_row_that_cannot_be_used_is_left_out_counted_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    collator = ORPOCollator(TOKENIZER, show_example=False)
    with caplog.at_level(logging.WARNING, logger="orpo_plugins.data.collator"):
        for _ in range(2):
            assert_equal(collator([EQUAL, *RAW, EQUAL]), collator(RAW))
    assert collator.left_out == {"chosen equals rejected": 4}
    assert [record.getMessage().split(" (")[0] for record in caplog.records] == [
        "a row was left out of its batch: chosen equals rejected"
    ]


def test_a_batch_of_which_nothing_is_left_is_refused() -> None:
    empty = {"prompt": "it", "chosen": "", "rejected": " jumps"}
    message = (
        r"none of the 3 rows of the batch can be used: chosen equals rejected \(2\), the chosen answer is empty \(1\)"
    )
    with pytest.raises(BatchError, match=message):
        ORPOCollator(TOKENIZER)([EQUAL, empty, EQUAL])


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(BatchError, match="the batch has no rows"):
        ORPOCollator(TOKENIZER)([])


def test_a_malformed_row_is_named_by_its_number_in_the_batch() -> None:
    with pytest.raises(RowError, match=r"row 1 of the batch \(strings\): column 'chosen' is None"):
        ORPOCollator(TOKENIZER)([RAW[0], {**EQUAL, "chosen": None}])


def test_eos_pads_where_there_is_no_pad_token() -> None:
    tokenizer = gpt2_tokenizer()
    batch = ORPOCollator(tokenizer)(RAW[:1])
    assert tokenizer.pad_token_id is None
    assert batch["input_ids"][batch["attention_mask"] == 0].unique().tolist() == [tokenizer.eos_token_id]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "pakced"}, "unknown layout 'pakced'; known: auto, .*padded"),
        ({"nll_over": "answer"}, "unknown nll_over 'answer'; known: sequence, completion"),
        ({"truncation_mode": "left"}, "unknown truncation_mode 'left'"),
        ({"max_length": 0}, "max_length is 0"),
        ({"layout": "packed", "pad_to_multiple_of": 8}, "pad_to_multiple_of=8 needs layout='padded'"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of=0 needs layout='padded' and a positive number"),
    ],
)
def test_unknown_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ORPOCollator(TOKENIZER, **options)


def test_a_tokenizer_without_eos_is_refused() -> None:
    tokenizer = gpt2_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="the tokenizer has no EOS token"):
        ORPOCollator(tokenizer)


def test_a_conversation_without_a_chat_template_is_refused() -> None:
    with pytest.raises(ConfigError, match="no chat template: .*setup_chat_format"):
        ORPOCollator(gpt2_tokenizer())(RAW[1:2])


def test_the_collator_and_the_preparation_have_the_same_defaults() -> None:
    assert ORPOCollator(TOKENIZER)._read.builder.options == PairOptions()
