"""How `layout="auto"` decides: the layout of highest priority that the model supports.

Of the built-in ones these are *shared* (20), *packed* (10), *padded* (0) and, for encoder-decoder models, *seq2seq*.
*shared* and *packed* support the same models (`layouts/support.py`), so *packed* is used where it is asked for by name.
"""

from torch import nn

from orpo_plugins.hooks import plugins
from orpo_plugins.hooks.layout import Layout


def best_layout(name: str, model: nn.Module) -> tuple[Layout, dict[str, str]]:
    """The layout of that name, or for "auto" the best one, and why each better one was passed over (by name).

    Raises `ConfigError` where `model` cannot run in the layout of that name, and for an unknown name.
    """
    return plugins.first_supported("layout", name, plugins.layouts(), model, where="here")
