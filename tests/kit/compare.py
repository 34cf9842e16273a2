"""One way to compare numbers, used by every test."""

from collections.abc import Mapping

import torch
from torch import Tensor


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected| in the Euclidean norm, computed in fp64; 0 where both are 0."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    distance, size = (actual - expected).norm().item(), expected.norm().item()
    return distance / size if size else distance


def assert_within(actual: Tensor | float, expected: Tensor | float, relative: float, what: str = "value") -> None:
    """Asserts that `actual` lies within `relative` of `expected`, and that neither holds a NaN."""
    actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    difference = relative_difference(actual, expected)
    assert difference <= relative, f"{what} differs by {difference:.2e}, allowed {relative:.0e}"


def assert_all_within(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], relative: float) -> None:
    """`assert_within` for every entry of two mappings with the same keys."""
    assert actual.keys() == expected.keys()
    for name in expected:
        assert_within(actual[name], expected[name], relative, name)
