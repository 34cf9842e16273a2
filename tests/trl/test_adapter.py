"""ORPO back in `trl`, by one explicit call."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from orpo_plugins import ORPOConfig, ORPOTrainer, errors
from tests.kit.launching import environment
from tests.kit.training import config

pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'")


def test_after_the_call_trl_exports_the_names_that_it_dropped(tmp_path: Path) -> None:
    program = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "import trl, orpo_plugins\n"
        "assert not any(hasattr(trl, name) for name in ('ORPOTrainer', 'ORPOConfig', 'setup_chat_format'))\n"
        "from orpo_plugins.integrations.trl_adapter import restore_in_trl\n"
        "assert not hasattr(trl, 'ORPOTrainer')\n"
        "restore_in_trl(); restore_in_trl()\n"
        "from trl import ORPOConfig, ORPOTrainer, setup_chat_format\n"
        "assert ORPOTrainer is orpo_plugins.ORPOTrainer and ORPOConfig is orpo_plugins.ORPOConfig\n"
        "assert setup_chat_format is orpo_plugins.setup_chat_format\n"
        "from trl.experimental.orpo import ORPOTrainer as theirs\n"
        "assert theirs is not ORPOTrainer and trl.SFTConfig\n"
    )
    done = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_without_trl_the_error_holds_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    from orpo_plugins.integrations.trl_adapter import restore_in_trl

    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(errors.MissingExtraError, match=r"this needs trl, .*pip install 'orpo-plugins\[trl\]'"):
        restore_in_trl()


def test_nothing_of_trl_is_loaded_by_the_trainer() -> None:
    program = (
        "import sys, orpo_plugins; orpo_plugins.ORPOTrainer\n"
        "print([name for name in sys.modules if name == 'trl' or name.startswith(('trl.', 'axolotl'))])"
    )
    done = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True, text=True)
    assert json.loads(done.stdout.replace("'", '"')) == []


def test_every_field_of_trls_config_is_accepted(tmp_path: Path) -> None:
    import dataclasses

    from trl.experimental.orpo import ORPOConfig as TheirConfig

    ours = {field.name for field in dataclasses.fields(ORPOConfig)} | {"is_encoder_decoder"}
    assert {field.name for field in dataclasses.fields(TheirConfig)} <= ours
    assert config(tmp_path).max_length == 1024


def test_every_argument_of_trls_trainer_is_accepted() -> None:
    import inspect

    from trl.experimental.orpo import ORPOTrainer as TheirTrainer

    theirs = list(inspect.signature(TheirTrainer.__init__).parameters)
    ours = list(inspect.signature(ORPOTrainer.__init__).parameters)
    assert ours[: len(theirs)] == theirs
