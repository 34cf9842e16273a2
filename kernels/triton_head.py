"""The fused head for CUDA devices; see `chunked` for what is computed."""

from orpo_plugins.hookspecs import hookimpl
from orpo_plugins.interfaces import Kernel


@hookimpl
def orpo_kernels() -> list[Kernel]:
    """None yet."""
    return []
