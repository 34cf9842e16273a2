"""One pair as text at the start of every run: what it shows, where it is logged, and how it is switched off."""

import logging
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, IterableDataset
from transformers import Trainer, TrainingArguments

from orpo_plugins import ORPOCollator, ORPOLoss, fuse_head
from orpo_plugins.data.dataset import prepare_dataset
from orpo_plugins.data.example import example_text
from orpo_plugins.hooks.types import Pair
from orpo_plugins.options import PairOptions
from tests.kit import tiny
from tests.kit.tokenizers import chatml_tokenizer, gpt2_tokenizer
from tests.kit.training import trainer

BEGINNING = "one pair as it is trained. Tokens in [[...]] count"
ROW = {"prompt": "the dog", "chosen": " sleeps", "rejected": " jumps"}


def pair(row: dict[str, Any], tokenizer: Any, **options: Any) -> Pair:
    return ORPOCollator(tokenizer, **options).pairs([row])[0]


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines()][1:]


def test_strings() -> None:
    tokenizer = gpt2_tokenizer()
    text = example_text(pair(ROW, tokenizer), tokenizer)
    assert text.splitlines()[0].endswith("log-probability. The NLL counts the prompt and the chosen answer:")
    prompt, chosen, rejected = lines(text)
    assert prompt.endswith("tokens): <|endoftext|>the dog")
    assert chosen.endswith("tokens): [[ sleeps<|endoftext|>]]")
    assert rejected.endswith("tokens): [[ jumps<|endoftext|>]]")
    completion = example_text(pair(ROW, tokenizer), tokenizer, nll_over="completion")
    assert completion.splitlines()[0].endswith("log-probability. The NLL counts the chosen answer:")


def test_answers_of_several_turns_show_which_are_labelled() -> None:
    def turns(*contents: str) -> list[dict[str, str]]:
        return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]

    tokenizer = chatml_tokenizer()
    row = {"chosen": turns("Q", "the fox", "and", "the dog"), "rejected": turns("Q", "jumps", "why", "it sleeps")}
    prompt, chosen, _ = lines(example_text(pair(row, tokenizer), tokenizer))
    assert prompt.endswith(r"<s><|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n")
    assert r"[[the fox<|im_end|>]]\n<|im_start|>user\nand<|im_end|>\n<|im_start|>assistant\n[[the dog" in chosen


def test_a_prompt_of_the_rejected_answer_alone_and_no_rejected_answer() -> None:
    tokenizer = chatml_tokenizer()
    row = {"weight": 1.0, **ROW}
    without = example_text(pair({**row, "rejected": None}, tokenizer, sft_rows=True), tokenizer)
    assert lines(without)[-1] == "rejected: none, trained with the NLL alone"
    made = pair(row, tokenizer)
    other = pair({**row, "prompt": "a fox"}, tokenizer)
    text = example_text(Pair(chosen=made.chosen, rejected=other.rejected), tokenizer)
    assert lines(text)[2].startswith("prompt of the rejected answer (")
    assert lines(text)[2].endswith("<s>a fox")


def test_long_texts_are_cut_to_a_screen() -> None:
    tokenizer = gpt2_tokenizer()
    row = {"prompt": "the quick fox " * 400, "chosen": " sleeps" * 300, "rejected": " jumps" * 300}
    text = example_text(pair(row, tokenizer, max_length=None), tokenizer)
    assert len(text) < 2500
    assert " characters ... " in text
    assert lines(text)[1].endswith("sleeps<|endoftext|>]]")


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.getMessage().startswith(BEGINNING)]


@pytest.mark.parametrize("layout", ["padded", "shared"])
def test_every_run_of_the_trainer_shows_one_pair_before_its_first_step(
    layout: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = trainer(tmp_path, layout=layout, max_steps=1)
    assert logged(caplog) == []
    made.train()
    (text,) = logged(caplog)
    assert tiny.rows(12)[0]["prompt"] in text
    made.train()
    assert len(logged(caplog)) == 2


def test_a_stream_shows_the_first_pair_of_its_first_batch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stream = Dataset.from_list(tiny.rows(12)).to_iterable_dataset()
    assert isinstance(stream, IterableDataset)
    trainer(tmp_path, rows=stream, max_steps=2, layout="padded").train()
    assert len(logged(caplog)) == 1
    assert tiny.rows(12)[0]["prompt"] in logged(caplog)[0]


@pytest.mark.parametrize("fused", [False, True])
def test_a_stock_trainer_shows_one_pair(fused: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    arguments = TrainingArguments(
        str(tmp_path), remove_unused_columns=False, max_steps=2, use_cpu=True, report_to="none", save_strategy="no"
    )
    made = Trainer(
        tiny.model(),
        arguments,
        train_dataset=tiny.rows(8),  # type: ignore[arg-type]
        data_collator=ORPOCollator(tiny.tokenizer()),
        compute_loss_func=ORPOLoss(),
    )
    (fuse_head(made) if fused else made).train()
    assert len(logged(caplog)) == 1


def test_a_loop_of_ones_own_shows_the_first_pair(caplog: pytest.LogCaptureFixture) -> None:
    collator = ORPOCollator(tiny.tokenizer())
    collator(tiny.rows(2))
    collator(tiny.rows(2, seed=1))
    assert len(logged(caplog)) == 1


def test_another_rank_shows_nothing(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("RANK", "1")
    ORPOCollator(tiny.tokenizer())(tiny.rows(2))
    assert logged(caplog) == []


def test_it_can_be_switched_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer(tmp_path, max_steps=1, show_example=False).train()
    ORPOCollator(tiny.tokenizer(), show_example=False)(tiny.rows(2))
    assert logged(caplog) == []


def test_it_can_be_switched_between_runs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = trainer(tmp_path, max_steps=1)
    made.args.show_example = False
    made.train()
    assert logged(caplog) == []
    made.args.show_example = True
    made.train()
    assert len(logged(caplog)) == 1


def test_tokenized_rows_are_shown_too(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tiny.tokenizer()
    prepared, _ = prepare_dataset(tiny.rows(2), tokenizer, PairOptions())
    with caplog.at_level(logging.WARNING):
        ORPOCollator(tokenizer)(prepared.to_list())
    assert tiny.rows(2)[0]["prompt"] in logged(caplog)[0]
