"""What several tests share: where things are, numbers to compare, tiny models and tokenizers, trainers, processes."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHARED_DATA = Path(os.environ.get("ORPO_SHARED_DATA", ROOT.parent / "shared" / "data"))
"""Folder of real preference data, which is not in the repository."""
