"""Adds `ORPOTrainer` and `ORPOConfig` to `trl` again, for programs that import them from there.

import orpo_plugins.integrations.trl_adapter as adapter
adapter.restore_in_trl()
from trl import ORPOConfig, ORPOTrainer
"""

from orpo_plugins.errors import missing_extra

NAMES = ("ORPOConfig", "ORPOTrainer", "setup_chat_format")


def restore_in_trl() -> None:
    """Sets trl.ORPOConfig, trl.ORPOTrainer and trl.setup_chat_format to ours; nothing else in trl changes.

    TRL has removed all three from its top level, the first two in 0.29.  The classes in `trl.experimental.orpo` stay
    TRL's own.

    Raises:
        MissingExtraError: trl is not installed.
    """
    try:
        import trl
    except ImportError as error:
        raise missing_extra("trl", "trl") from error
    import orpo_plugins

    for name in NAMES:
        setattr(trl, name, getattr(orpo_plugins, name))
