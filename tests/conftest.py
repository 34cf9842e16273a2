import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # more threads make models this small slower; torch reads it on import
pytest.register_assert_rewrite("tests.kit")
