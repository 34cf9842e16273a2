"""Names that tutorials still pass: each is translated and named once, or refused with the reason."""

import warnings
from pathlib import Path
from typing import Any

import pytest

from orpo_plugins import ORPOConfig, errors
from tests.kit.training import config


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"evaluation_strategy": "steps"}, {"eval_strategy": "steps"}),
        ({"orpo_alpha": 0.7}, {"beta": 0.7}),
        ({"orpo_beta": 0.3}, {"odds_temperature": 0.3}),
        ({"per_gpu_train_batch_size": 3}, {"per_device_train_batch_size": 3}),
        ({"per_gpu_eval_batch_size": 5}, {"per_device_eval_batch_size": 5}),
        ({"no_cuda": True}, {"use_cpu": True}),
        ({"warmup_ratio": 0.1}, {"warmup_steps": 0.1}),
        ({"group_by_length": True}, {"train_sampling_strategy": "group_by_length"}),
    ],
)
def test_an_old_name_is_translated_and_named_once(old: dict[str, Any], new: dict[str, Any], tmp_path: Path) -> None:
    ((old_name, _),), ((new_name, value),) = old.items(), new.items()
    with pytest.warns(FutureWarning, match=f"{old_name} is now {new_name}") as found:
        made = ORPOConfig(output_dir=str(tmp_path), report_to="none", **old)
    assert len(found) == 1
    assert found[0].filename == __file__
    assert getattr(made, new_name) == value


@pytest.mark.parametrize(
    ("old", "reason"),
    [
        ({"overwrite_output_dir": True}, "never emptied"),
        ({"save_safetensors": True}, "always safetensors"),
        ({"logging_dir": "logs"}, "TENSORBOARD_LOGGING_DIR"),
        ({"is_encoder_decoder": False}, "read from the model"),
        ({"label_pad_token_id": -100}, "always -100"),
    ],
)
def test_an_old_name_without_effect_says_why(old: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.warns(FutureWarning, match=f"{next(iter(old))}.* has no effect any more.*{reason}") as found:
        ORPOConfig(output_dir=str(tmp_path), report_to="none", **old)
    assert len(found) == 1
    assert found[0].filename == __file__


@pytest.mark.parametrize("old", [{"warmup_ratio": 0.0}, {"group_by_length": False}])
def test_an_old_default_is_nothing_to_talk_about(old: dict[str, Any], tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config(tmp_path, **old)


def test_a_ratio_gives_way_to_steps_that_are_given(tmp_path: Path) -> None:
    assert config(tmp_path, warmup_ratio=0.1, warmup_steps=20).warmup_steps == 20


@pytest.mark.parametrize(
    "both",
    [
        {"evaluation_strategy": "steps", "eval_strategy": "no"},
        {"orpo_alpha": 0.7, "beta": 0.1},
        {"orpo_beta": 0.7, "odds_temperature": 1.0},
        {"group_by_length": True, "train_sampling_strategy": "random"},
    ],
)
def test_old_and_new_name_together_are_an_error(both: dict[str, Any], tmp_path: Path) -> None:
    old, new = both
    with pytest.raises(errors.ConfigError, match=f"{old}=.* and {new}=.* are the same option: pass {new} alone"):
        config(tmp_path, **both)


def test_another_ignored_label_cannot_be_honoured(tmp_path: Path) -> None:
    with pytest.raises(errors.ConfigError, match="label_pad_token_id=0 is not supported"):
        config(tmp_path, label_pad_token_id=0)


def test_checkpointing_is_on_by_default_and_off_by_either_name(tmp_path: Path) -> None:
    assert ORPOConfig(output_dir=str(tmp_path)).gradient_checkpointing is True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ORPOConfig(output_dir=str(tmp_path), gradient_checkpointing=False).gradient_checkpointing is False
        kwargs = {"use_reentrant": True}
        made = ORPOConfig(output_dir=str(tmp_path), gradient_checkpointing_kwargs=kwargs)
        assert made.gradient_checkpointing_kwargs == kwargs


def test_a_copy_with_a_change_keeps_the_rest(tmp_path: Path) -> None:
    import dataclasses

    made = dataclasses.replace(config(tmp_path, beta=0.3, gradient_checkpointing=False), learning_rate=1e-3)
    assert (made.beta, made.learning_rate, made.gradient_checkpointing) == (0.3, 1e-3, False)


def test_defaults_are_those_of_trl(tmp_path: Path) -> None:
    made = ORPOConfig(output_dir=str(tmp_path))
    assert (made.learning_rate, made.logging_steps, made.max_length, made.beta) == (1e-6, 10, 1024, 0.1)
    assert made.disable_dropout
