"""What a trainer does before its first step: the layout is checked as it will be trained, and its tokens are told."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from orpo_plugins import ORPOTrainer, errors, fuse_head
from orpo_plugins.data.lengths import token_costs
from orpo_plugins.hooks import plugins
from orpo_plugins.integrations import hf_run_start as before_training
from tests.kit import tiny
from tests.kit.laid_out import WithoutContext
from tests.kit.launching import run_worker
from tests.kit.stock import losses, stock
from tests.kit.training import logged, trainer

ROWS = tiny.rows(12)
UNUSABLE = [{"prompt": "desk", "chosen": " call", "rejected": " call"}]


def wrong(made: Any) -> Any:
    """The trainer, with *shared* in its collator cutting rejected answers off from their prompts."""
    made.data_collator.layout = WithoutContext()
    return made


def whole_or_cut(made: ORPOTrainer, cut: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As FSDP and DeepSpeed have it, the model can only be checked once it is wrapped."""
    if cut:
        early = made.check_layout

        def late_only(model: Any, *, batches_are_planned: bool) -> None:
            if batches_are_planned:
                early(model, batches_are_planned=True)

        monkeypatch.setattr(made, "check_layout", late_only)


# ---- when and what


def test_a_second_call_of_train_does_not_go_on_unchecked(tmp_path: Path) -> None:
    made = wrong(trainer(tmp_path, layout="shared"))
    for _ in range(2):
        with pytest.raises(errors.ModelError, match="'wrong' differs from 'padded' on the first batch"):
            made.train()
    assert made.state.global_step == 0


def test_the_check_is_made_once_per_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    check = before_training.check_layout
    monkeypatch.setattr(before_training, "check_layout", lambda *a, **k: asked.append(a) or check(*a, **k))
    made = trainer(tmp_path, layout="shared", max_steps=1)
    made.train()
    made.train()
    assert len(asked) == 1


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
def test_auto_goes_on_with_padded(
    cut: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = wrong(trainer(tmp_path / "auto", layout="auto", dataloader_num_workers=1))
    whole_or_cut(made, cut, monkeypatch)
    made.train()
    plain = trainer(tmp_path / "padded", layout="padded")
    plain.train()
    assert made.data_collator.layout.name == "padded"
    assert "layout='auto' goes on with 'padded'" in caplog.text
    assert logged(made, "loss") == pytest.approx(logged(plain, "loss"), rel=1e-6)


def test_auto_stops_where_batches_of_a_cut_model_are_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = wrong(trainer(tmp_path, layout="auto", max_tokens_per_batch=400))
    whole_or_cut(made, True, monkeypatch)
    with pytest.raises(errors.ModelError, match=r"max_tokens_per_batch=400 has been planned .* set layout='padded'"):
        made.train()


def test_a_dataloader_of_ones_own_does_not_go_round_the_check(tmp_path: Path) -> None:
    class Own(ORPOTrainer):
        def get_train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(
                self.train_dataset, batch_size=2, collate_fn=self.data_collator, shuffle=False
            )

    made = trainer(tmp_path, layout="shared")
    made.__class__ = Own
    with pytest.raises(errors.ModelError, match="'wrong' differs from 'padded'"):
        wrong(made).train()


@pytest.mark.parametrize("which", ["norms", "head"])
def test_mixed_precision_is_checked_as_it_is_trained(which: str, tmp_path: Path) -> None:
    def mixed() -> Any:
        made = tiny.model().bfloat16()
        for name, parameter in made.named_parameters():
            if {"norms": "norm", "head": "lm_head"}[which] in name:
                parameter.data = parameter.data.float()
        return made

    runs = [trainer(tmp_path / layout, layout=layout, model=mixed(), bf16=True) for layout in ("padded", "shared")]
    for made in runs:
        made.train()
    assert runs[1].data_collator.layout.name == "shared"
    assert logged(runs[1], "loss") == pytest.approx(logged(runs[0], "loss"), rel=2e-2)


def test_a_wrong_layout_is_found_under_autocast(tmp_path: Path) -> None:
    with pytest.raises(errors.ModelError, match=r"torch.bfloat16, tolerance 8e-02"):
        wrong(trainer(tmp_path, layout="shared", bf16=True)).train()


# ---- which rows


def test_rows_that_cannot_be_used_are_passed_over(tmp_path: Path) -> None:
    runs = [
        fuse_head(stock(tmp_path, rows=UNUSABLE * 3 + ROWS, layout=name, per_device_train_batch_size=4))
        for name in ("padded", "shared")
    ]
    for made in runs:
        made.train()
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=1e-5)


def test_without_a_row_to_compare_the_run_stops_and_says_what_to_set(tmp_path: Path) -> None:
    rows = UNUSABLE * 64 + ROWS
    with pytest.raises(errors.ConfigError, match=r"none of the first 64 rows can be used.*set layout_check=False"):
        fuse_head(stock(tmp_path, rows=rows, layout="shared")).train()
    made = fuse_head(
        stock(tmp_path, rows=rows, layout="shared", per_device_train_batch_size=70, max_steps=1), layout_check=False
    )
    made.train()
    assert made.state.global_step == 1


def test_rows_with_a_rejected_answer_go_before_those_without(tmp_path: Path) -> None:
    rows = [{**row, "rejected": None} if index < 5 else row for index, row in enumerate(ROWS)]
    made = wrong(trainer(tmp_path, rows=Dataset.from_list(rows), layout="shared", sft_rows=True))
    with pytest.raises(errors.ModelError, match="'wrong' differs"):
        made.train()


def test_datasets_that_end_with_another_error_are_read_by_number(tmp_path: Path) -> None:
    class Map(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> Any:
            return {0: ROWS[0]}[index]

    made = fuse_head(stock(tmp_path, layout="shared"))
    made.train_dataset = Map()
    made.train()
    assert made.state.global_step == 2


# ---- tokens


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [text for text in caplog.messages if text.startswith("layout=")]


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_an_epochs_tokens_are_told_once(layout: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = trainer(tmp_path, layout=layout, max_steps=2, train_sampling_strategy="sequential")
    rows = list(made.train_dataset)
    longest = [max(len(row["chosen_input_ids"]), len(row["rejected_input_ids"])) for row in rows]
    padded = sum(4 * max(pair) for pair in zip(longest[::2], longest[1::2], strict=True))
    counted = plugins.layout("packed" if layout == "padded" else layout)
    distinct = sum(tokens for (tokens,) in token_costs(made.train_dataset, counted))
    made.train()
    made.train()
    assert told(caplog) == [
        f"layout=padded: {padded:,} tokens per epoch, {padded - distinct:,} of them padding"
        if layout == "padded"
        else f"layout={layout}: {distinct:,} tokens per epoch, {padded:,} as padded in batches of 2 pairs"
    ]


def test_of_many_rows_the_tokens_are_estimated(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orpo_plugins.integrations import hf_loader as pair_loader

    made = trainer(tmp_path, rows=Dataset.from_list(ROWS * 4), layout="shared", max_steps=1)
    exact = sum(tokens for (tokens,) in token_costs(made.train_dataset, made.data_collator.layout))
    monkeypatch.setattr(pair_loader, "_COUNTED_ROWS", 10)
    made.train()
    (text,) = told(caplog)
    assert text.startswith("layout=shared: about ")
    assert int(text.split()[2].replace(",", "")) == pytest.approx(exact, rel=0.3)


def test_the_layout_that_a_run_fell_back_to_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wrong(trainer(tmp_path, layout="auto", max_steps=1)).train()
    (text,) = told(caplog)
    assert text.startswith("layout=padded: ")


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_of_rows_tokenized_on_the_way_the_first_batch_is_told(
    layout: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = fuse_head(stock(tmp_path, layout=layout))
    first, padded = (collate(made, name)["input_ids"].numel() for name in (layout, "padded"))
    made.train()
    saved = "" if layout == "padded" else f", {padded:,} as padded"
    assert told(caplog) == [f"layout={layout}: {first:,} tokens in the first batch, of 2 pairs{saved}"]


def collate(made: Any, layout: str) -> dict[str, Any]:
    """The first two rows in a layout."""
    pairs = made.data_collator.pairs(list(itertools.islice(made.train_dataset, 2)))
    return plugins.layout(layout).collate(pairs, pad_token_id=0, nll_over="sequence")


# ---- ranks


def test_ranks_decide_alike(tmp_path: Path) -> None:
    """The layout is wrong on the second rank alone."""
    stopped, fell_back, cut = run_worker(
        "check_layout.py", [{"layout": "shared"}, {"layout": "auto"}, {"sharded": True}], tmp_path / "results", ranks=2
    )
    assert "but not with the rows of another rank" in stopped["errors"][0]
    assert "layout 'wrong' differs from 'padded'" in stopped["errors"][1]
    assert fell_back["layouts"] == ["padded", "padded"]
    assert len(fell_back["losses"]) == 2
    assert cut == [(True, None), (False, "layers.0 ")]  # and neither has waited for the other for ever
