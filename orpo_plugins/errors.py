"""The errors of this package.

Each message says what is wrong, where, and what to do about it.  All errors are also `ValueError`s, and that for a
missing package is an `ImportError`, so that code which catches these works.
"""


class ORPOError(ValueError):
    """Base class of the package's own errors."""


class RowError(ORPOError):
    """A dataset row that cannot be read: names the row, the column, the value and the remedy."""


class ConfigError(ORPOError):
    """An option, or a combination of options, that cannot be used."""


class BatchError(ORPOError):
    """Tensors whose shapes, labels or values do not fit together."""


class ModelError(ORPOError):
    """A model whose head or attention cannot be handled without changing what it computes."""


class PluginError(ORPOError):
    """A third-party plugin that cannot be loaded, raised an error, or returned what its hook does not ask for.

    The message names the plugin, the hook or function, and how to keep the plugin out; `__cause__` is the plugin's own
    error, where it raised one.
    """


class MissingExtraError(ORPOError, ImportError):
    """An optional dependency is not installed; the message holds the pip command."""


def missing_extra(package: str, extra: str) -> MissingExtraError:
    """The error for an optional `package` that is not installed; `pip install orpo-plugins[extra]` installs it."""
    return MissingExtraError(f"this needs {package}, which is not installed: pip install 'orpo-plugins[{extra}]'")
