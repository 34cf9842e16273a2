import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # more threads make models this small slower; torch reads it on import
pytest.register_assert_rewrite("tests.kit")

SLOW_FOLDERS = {"axolotl", "cli", "distributed", "trainers", "trl"}
"""Where nearly every test trains a model or starts a process."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name in SLOW_FOLDERS:
            item.add_marker(pytest.mark.slow)
