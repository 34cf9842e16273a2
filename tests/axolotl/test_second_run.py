"""Several runs in one process, as in a notebook, in every order of methods and imports."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.kit import tiny
from tests.kit.axolotl_runs import (
    argilla,
    dataset,
    folder_with_model,
    logged,
    needs_axolotl,
    write_config,
    write_rows,
)
from tests.kit.launching import environment

needs_axolotl()

RUN = """
import sys
if sys.argv[1] == "imported":
    import axolotl.core.training_args, axolotl.core.builders
from axolotl.cli.train import do_cli

for path in sys.argv[2:]:
    print("=== " + path, flush=True)
    do_cli(config=path)
from axolotl.core import training_args
from axolotl.core.trainers.dpo.args import AxolotlDPOConfig
from orpo_plugins.options import ORPOOwnFields
import torch
for path in sys.argv[2:]:
    saved = torch.load(path.removesuffix(".yml") + "/checkpoint-1/training_args.bin", weights_only=False)
    print("saved", path.rpartition("/")[2], vars(saved).get("layout"))
print("dpo has our fields:", issubclass(AxolotlDPOConfig, ORPOOwnFields))
"""


@pytest.mark.parametrize(
    ("before", "order"),
    [("imported", ["orpo", "dpo", "orpo"]), ("not imported", ["dpo", "orpo"]), ("not imported", ["native", "orpo"])],
)
def test_each_run_has_its_own_arguments(before: str, order: list[str], tmp_path: Path) -> None:
    folder = folder_with_model(tmp_path)
    common = {"val_set_size": 0, "max_steps": 1}
    rows = [dataset(write_rows(folder / "rows.jsonl", tiny.rows(4)), type="passthrough")]
    messages = [
        dataset(write_rows(folder / "messages.jsonl", map(argilla, tiny.rows(4))), type="chat_template.argilla")
    ]
    methods: dict[str, dict[str, Any]] = {
        "orpo": {"datasets": messages, "orpo_layout": "packed", "orpo_kernel": "reference"},
        "dpo": {"datasets": rows, "rl": "dpo"},
        "native": {"datasets": messages, "plugins": None},  # Axolotl's own ORPO
    }
    paths = [
        write_config(folder / f"{number}.yml", **{**common, "output_dir": str(folder / str(number)), **methods[name]})
        for number, name in enumerate(order)
    ]
    run = subprocess.run(
        [sys.executable, "-c", RUN, before, *map(str, paths)],
        cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=500,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-4000:]
    for number, name in enumerate(order):
        ours = name == "orpo"
        assert f"saved {number}.yml {'packed' if ours else None}" in run.stdout
        log = run.stdout.split(f"=== {paths[number]}\n")[1].split("=== ")[0]
        assert ("is active: kernel=reference, layout=packed" in log) == ours
        assert any("loss" in entry for entry in logged(folder / str(number)))
    assert "dpo has our fields: False" in run.stdout
