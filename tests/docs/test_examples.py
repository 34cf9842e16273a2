"""The examples of examples/trainer and examples/trl run as their first lines say."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kit import ROOT
from tests.kit.launching import environment

pytestmark = pytest.mark.slow

COMMAND = "from orpo_plugins.integrations.cli import main; import sys; sys.exit(main())"


def run(arguments: list[str], folder: Path) -> str:
    """Runs Python from the repository's root, with paths below build/ put into `folder`."""
    placed = [argument.replace("build/", f"{folder}/") for argument in arguments]
    done = subprocess.run(
        [sys.executable, *placed], env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("build")
    run(["examples/demo/prepare.py", "--model", "tiny", "--output", "build/demo"], folder)
    return folder


def test_the_stock_trainer_learns_the_preference(build: Path) -> None:
    options = ["--model", "build/demo/base", "--output_dir", "build/stock", "--max_steps", "60"]
    shown = run(["examples/trainer/stock_trainer.py", *options], build)
    found = re.search(r"preferred in (\d+)% of held-out pairs", shown)
    assert found is not None
    assert int(found[1]) >= 70


def test_the_command_trains_from_its_yaml(build: Path) -> None:
    pytest.importorskip("trl")
    run(["examples/trl/add_chat_format.py", "build/demo/base", "build/trl/model"], build)
    config = (ROOT / "examples" / "trl" / "orpo.yml").read_text().replace("build/", f"{build}/")
    (build / "orpo.yml").write_text(config)
    steps = ["--max_steps", "2", "--use_cpu", "True"]
    run(["-c", COMMAND, "trl", "orpo", "--config", str(build / "orpo.yml"), *steps], build)
    assert (build / "trl" / "orpo" / "model.safetensors").exists()
