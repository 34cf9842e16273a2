"""The self-check finds a layout that computes something else, and names the layer."""

from dataclasses import replace

import pytest
import torch
from test_layout_attention import model, random_pairs

from orpo_plugins import plugins
from orpo_plugins.layout_check import LayoutReport, check_layout
from orpo_plugins.packing import SPANS, Spans


def without_context(layout):
    """*shared* with the rejected answers cut off from their prompts."""

    def collate(*args, **kwargs):
        batch = layout.collate(*args, **kwargs)
        return {**batch, SPANS: Spans(spans=tuple(span._replace(context_length=0) for span in batch[SPANS].spans))}

    return replace(layout, name="wrong", collate=collate)


@pytest.mark.parametrize("layout", ["packed", "shared"])
def test_right_layouts_pass_in_fp32(layout):
    made = model("Mistral", sliding_window=5)
    report = check_layout(made, random_pairs(), plugins.layout(layout), pad_token_id=0)
    assert report.passed
    assert report.dtype == torch.float32
    assert report.row_difference < 1e-5
    assert "agrees with 'padded'" in report.message()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_right_layouts_pass_in_low_precision_and_wrong_ones_do_not(dtype):
    made, shared = model().to(dtype), plugins.layout("shared")
    assert check_layout(made, random_pairs(), shared, pad_token_id=0).passed
    assert not check_layout(made, random_pairs(), without_context(shared), pad_token_id=0).passed


def test_a_wrong_layout_names_the_first_layer():
    wrong = without_context(plugins.layout("shared"))
    report = check_layout(model(), random_pairs(), wrong, pad_token_id=0)
    assert not report.passed
    assert report.first_layer == "model.layers.0 (LlamaDecoderLayer)"
    assert "differs from 'padded' on the first batch" in report.message()
    assert "It first shows in model.layers.0 (LlamaDecoderLayer). Use layout='padded'" in report.message()


def test_the_layer_type_is_named_where_the_configuration_knows_it():
    made = model("Qwen3", layer_types=["full_attention"] * 3)
    report = check_layout(made, random_pairs(), without_context(plugins.layout("shared")), pad_token_id=0)
    assert report.first_layer == "model.layers.0 (Qwen3DecoderLayer, full_attention)"


def test_the_check_leaves_modes_and_gradients_as_they_were():
    made = model().train()
    made.model.layers[1].eval()
    modes = [module.training for module in made.modules()]
    check_layout(made, random_pairs(), plugins.layout("shared"), pad_token_id=0)
    assert [module.training for module in made.modules()] == modes
    assert all(parameter.grad is None for parameter in made.parameters())


def test_nan_does_not_pass():
    report = LayoutReport(
        layout="x", dtype=torch.float32, row_difference=float("nan"), loss_difference=0.0, tolerance=1e-4
    )
    assert not report.passed
