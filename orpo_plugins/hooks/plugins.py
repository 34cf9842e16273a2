"""What plugins offer, looked up by name; an unknown name is an error that lists the known ones."""

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from orpo_plugins.errors import ConfigError
from orpo_plugins.hooks.layout import Layout
from orpo_plugins.hooks.manager import get_plugin_manager as get_plugin_manager
from orpo_plugins.hooks.offers import offered
from orpo_plugins.hooks.types import Kernel, Metric, RowFormat
from orpo_plugins.objective import LossTerm

REFERENCE_LAYOUT = "padded"
"""The layout that every decoder can run, with which others are compared and by which they are replaced."""


class _Named(Protocol):
    @property
    def name(self) -> str: ...


NamedT = TypeVar("NamedT", bound=_Named)
SupportedT = TypeVar("SupportedT", Layout, Kernel)


def row_formats() -> Sequence[RowFormat]:
    """All row formats, in the order in which they are tried."""
    return offered("orpo_row_formats")


def metrics() -> Sequence[Metric]:
    """All metrics that plugins add."""
    return offered("orpo_metrics")


def loss_term(name: str) -> LossTerm:
    """The per-pair term of that name."""
    known: Sequence[LossTerm] = offered("orpo_loss_terms")
    return _by_name("loss term", name, known)


def layouts() -> Sequence[Layout]:
    """All layouts."""
    return offered("orpo_layouts")


def layout(name: str) -> Layout:
    """The layout of that name."""
    return _by_name("layout", name, layouts(), also=("auto",))


def kernels() -> Sequence[Kernel]:
    """All head kernels."""
    return offered("orpo_kernels")


def known_kernel(name: str) -> Kernel:
    """The kernel of that name, whatever it can run on."""
    return _by_name("kernel", name, kernels(), also=("auto",))


def kernel(name: str, hidden: Tensor, weight: Tensor) -> Kernel:
    """The kernel of that name, or for "auto" the one of highest priority that supports these tensors.

    Raises `ConfigError` for an unknown name, a kernel that does not support them, and where none does.
    """
    where = f"for {str(hidden.dtype).removeprefix('torch.')} on {hidden.device.type}"
    return first_supported("kernel", name, kernels(), hidden, weight, where=where)[0]


def stand_ins(
    dtype: torch.dtype, device: torch.device, *, width: int = 1, vocabulary: int = 1
) -> tuple[Tensor, Tensor]:
    """(hidden [1, H], weight [V, H]) to ask for a kernel before there is a batch; they share one number of memory."""
    number = torch.zeros((1, 1), dtype=dtype, device=device)
    return number.expand(1, width), number.expand(vocabulary, width)


def first_supported(
    kind: str, name: str, known: Sequence[SupportedT], *asked: Any, where: str
) -> tuple[SupportedT, dict[str, str]]:
    """The one of that name, or for "auto" the first by priority, and why others were passed over, by their names."""
    chosen = [_by_name(kind, name, known, also=("auto",))] if name != "auto" else []
    passed_over: dict[str, str] = {}
    for candidate in chosen or sorted(known, key=lambda candidate: -candidate.priority):
        reason = candidate.unsupported(*asked)
        if reason is None:
            return candidate, passed_over
        passed_over[candidate.name] = reason
    if chosen:
        raise ConfigError(f"{kind} {name!r} cannot be used {where}: {passed_over[name]}. Use {kind}='auto'")
    raise ConfigError(f"no {kind} can be used {where}: {passed_over}")


def _by_name(kind: str, name: str, known: Sequence[NamedT], also: tuple[str, ...] = ()) -> NamedT:
    for item in known:
        if item.name == name:
            return item
    names = ", ".join(sorted({*also, *(item.name for item in known)})) or "none"
    raise ConfigError(f"unknown {kind} {name!r}; known: {names}")
