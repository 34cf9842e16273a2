"""The adapter of docs/how-to/adapter.md takes the same steps on one process and on two."""

import re
from pathlib import Path

import pytest
import torch

from tests.kit import ROOT
from tests.kit.compare import assert_all_within
from tests.kit.launching import run_python

pytestmark = pytest.mark.slow

PAGE = (ROOT / "docs" / "how-to" / "adapter.md").read_text()
TRAIN = """
import sys
sys.path.insert(0, {root!r})
from tests.kit import tiny

model = tiny.model(initializer_range=0.2)
before = {{name: p.detach().clone() for name, p in model.named_parameters()}}
engine = ORPOEngine(model, tiny.tokenizer(), torch.optim.SGD(model.parameters(), lr=0.5), beta=0.5)
rows = tiny.skewed_rows(24)
for start in range(0, 24, 8):
    engine.train_step(rows[start : start + 8])
accuracy = torch.tensor(engine.accuracy(rows))
if engine.accelerator.is_main_process:
    change = {{name: p.detach() - before[name] for name, p in model.named_parameters()}}
    torch.save({{**change, "accuracy": accuracy}}, {output!r})
engine.accelerator.end_training()
"""


def change(folder: Path, ranks: int) -> dict[str, torch.Tensor]:
    (adapter,) = re.findall(r'```python title="orpo_accelerate.py"\n(.*?)```', PAGE, re.DOTALL)
    assert len(adapter.splitlines()) <= 45
    script, output = folder / f"train{ranks}.py", folder / f"change{ranks}.pt"
    script.write_text(adapter + TRAIN.format(root=str(ROOT), output=str(output)))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    run_python([*launcher, str(script)], folder)
    found: dict[str, torch.Tensor] = torch.load(output)
    return found


def test_one_process_and_two_change_the_weights_alike(tmp_path: Path) -> None:
    one, two = change(tmp_path, 1), change(tmp_path, 2)
    assert all(float(each.norm()) > 0 for each in one.values())
    assert_all_within(two, one, 1e-5)
