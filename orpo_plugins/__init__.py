"""ORPO (Odds Ratio Preference Optimization) for Axolotl, TRL and the transformers Trainer.

Importing this package imports torch and pluggy; every name below loads on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "FusedLinearORPOLoss": "orpo_plugins.kernels.liger_compatible",
    "ORPOCollator": "orpo_plugins.data.collator",
    "ORPOConfig": "orpo_plugins.integrations.hf_config",
    "ORPOLoss": "orpo_plugins.integrations.hf_stock_trainer",
    "ORPOPlugin": "orpo_plugins.integrations.axolotl_plugin",
    "ORPOTrainer": "orpo_plugins.integrations.hf_trainer",
    "fuse_head": "orpo_plugins.integrations.hf_stock_trainer",
    "get_plugin_manager": "orpo_plugins.hooks.manager",
    "hookimpl": "orpo_plugins.hooks.specs",
    "linear_orpo_loss": "orpo_plugins.kernels.linear",
    "orpo_forward": "orpo_plugins.forward",
    "orpo_loss": "orpo_plugins.objective",
    "setup_chat_format": "orpo_plugins.data.chat_format",
    "step_totals": "orpo_plugins.denominators",
}
__version__ = "0.1.0"

if TYPE_CHECKING:
    from orpo_plugins.data.chat_format import setup_chat_format as setup_chat_format
    from orpo_plugins.data.collator import ORPOCollator as ORPOCollator
    from orpo_plugins.denominators import step_totals as step_totals
    from orpo_plugins.forward import orpo_forward as orpo_forward
    from orpo_plugins.hooks.manager import get_plugin_manager as get_plugin_manager
    from orpo_plugins.hooks.specs import hookimpl as hookimpl
    from orpo_plugins.integrations.axolotl_plugin import ORPOPlugin as ORPOPlugin
    from orpo_plugins.integrations.hf_config import ORPOConfig as ORPOConfig
    from orpo_plugins.integrations.hf_stock_trainer import ORPOLoss as ORPOLoss
    from orpo_plugins.integrations.hf_stock_trainer import fuse_head as fuse_head
    from orpo_plugins.integrations.hf_trainer import ORPOTrainer as ORPOTrainer
    from orpo_plugins.kernels.liger_compatible import FusedLinearORPOLoss as FusedLinearORPOLoss
    from orpo_plugins.kernels.linear import linear_orpo_loss as linear_orpo_loss
    from orpo_plugins.objective import orpo_loss as orpo_loss


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return _loadable()
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__dir__())}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def _loadable() -> list[str]:
    """The names for `import *`, without those of a framework that is not installed: these would make it fail."""
    names = []
    for name in __dir__():
        try:
            __getattr__(name)
        except ImportError:
            continue  # `from orpo_plugins import` that name says what to install
        names.append(name)
    return names


def __dir__() -> list[str]:
    return sorted(_HOME)
