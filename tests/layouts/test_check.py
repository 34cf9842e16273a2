"""The self-check finds a layout that computes something else, and names the layer."""

from dataclasses import replace

import pytest
import torch

from orpo_plugins import forward
from orpo_plugins.hooks import plugins
from orpo_plugins.layouts.check import LayoutReport, check_layout
from orpo_plugins.layouts.shared import Shared
from tests.kit.laid_out import WithoutContext, model, random_pairs


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
    assert not check_layout(made, random_pairs(), WithoutContext(), pad_token_id=0).passed


def test_a_wrong_layout_names_the_first_layer():
    wrong = WithoutContext()
    report = check_layout(model(), random_pairs(), wrong, pad_token_id=0)
    assert not report.passed
    assert report.first_layer == "model.layers.0 (LlamaDecoderLayer)"
    assert "differs from 'padded' on the first batch" in report.message()
    found = "The first layer that differs by itself is model.layers.0 (LlamaDecoderLayer). Use layout='padded'"
    assert found in report.message()


def test_the_layer_type_is_named_where_the_configuration_knows_it():
    made = model("Qwen3", layer_types=["full_attention"] * 3)
    report = check_layout(made, random_pairs(), WithoutContext(), pad_token_id=0)
    assert report.first_layer == "model.layers.0 (Qwen3DecoderLayer, full_attention)"


MIXTURES = {
    "GptOss": {"num_hidden_layers": 24, "hidden_size": 64, "sliding_window": 16, "num_local_experts": 8},
    "Mixtral": {"num_hidden_layers": 24, "hidden_size": 64, "num_local_experts": 8},
}


def mixture(name):
    """A random mixture of experts in bf16, of which rounding makes another one within two dozen layers."""
    made = model(name, "eager", num_experts_per_tok=2, **MIXTURES[name])
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.1)
    return made.bfloat16()


LONG = random_pairs(((60, 25, 40), (12, 90, 30)))


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXTURES)
def test_rounding_that_moves_routers_is_told_from_a_wrong_layout_layer_by_layer(name):
    report = check_layout(mixture(name), LONG, plugins.layout("shared"), pad_token_id=0)
    assert report.row_difference > report.tolerance
    assert report.layer_difference < 0.02
    assert report.passed
    assert "with the inputs of 'padded', no layer differs by more than" in report.message()


@pytest.mark.parametrize("name", MIXTURES)
def test_a_wrong_layout_of_a_mixture_fails_in_bf16(name):
    report = check_layout(mixture(name), LONG, WithoutContext(), pad_token_id=0)
    assert not report.passed
    assert report.layer_difference > 0.05
    assert "DecoderLayer" in report.first_layer


@pytest.mark.parametrize("name", MIXTURES)
def test_a_late_layer_that_carries_a_state_fails_in_bf16_and_is_the_one_named(name):
    made = mixture(name)

    def carry(module, inputs, outputs):
        """Half of what stood in the row before, as a convolution would have it."""
        hidden = outputs[0]
        return hidden + 0.5 * torch.nn.functional.pad(hidden[:, :-1], (0, 0, 1, 0)), *outputs[1:]

    made.model.layers[10].self_attn.register_forward_hook(carry)
    report = check_layout(made, LONG, plugins.layout("shared"), pad_token_id=0)
    assert not report.passed
    assert report.first_layer.startswith("model.layers.10 ")


@pytest.mark.parametrize("layout", ["packed", "shared"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_short_convolutions_are_named(layout, dtype, monkeypatch):
    monkeypatch.setattr(forward, "check_support", lambda *_: None)  # which would refuse them by their names
    made = model("Lfm2", layer_types=["full_attention", "conv", "full_attention"]).to(dtype)
    report = check_layout(made, LONG, plugins.layout(layout), pad_token_id=0)
    assert not report.passed
    assert report.first_layer == "model.layers.1 (Lfm2DecoderLayer, conv)"


@pytest.mark.parametrize("right", [True, False])
def test_a_layout_that_goes_by_the_labels_is_compared_where_something_is_predicted(right):
    class ByLabels(Shared if right else WithoutContext):
        def collate(self, pairs, **options):
            return super().collate(pairs if pairs[0].chosen.labels[0] == -100 else pairs[::-1], **options)

    report = check_layout(model(), random_pairs(), ByLabels(), pad_token_id=0)
    assert report.passed == right


def test_a_quiet_first_comparison_takes_no_further_passes():
    report = check_layout(model().bfloat16(), random_pairs(), plugins.layout("shared"), pad_token_id=0)
    assert report.passed
    assert report.layer_difference is None


def test_in_fp32_right_layers_do_not_excuse_a_wrong_whole():
    report = LayoutReport(
        layout="x", dtype=torch.float32, row_difference=0.3, loss_difference=0.0, tolerance=1e-4, layer_difference=1e-7
    )
    assert not report.passed
    assert replace(report, dtype=torch.bfloat16, tolerance=8e-2).passed
    assert not replace(report, dtype=torch.bfloat16, tolerance=8e-2, row_difference=float("nan")).passed


def test_the_coarsest_dtype_that_computes_sets_the_tolerance():
    shared, fp32 = plugins.layout("shared"), model()
    assert check_layout(fp32, random_pairs(), shared, pad_token_id=0).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert check_layout(fp32, random_pairs(), shared, pad_token_id=0).dtype == torch.bfloat16
        norms_in_fp32 = model().bfloat16()
        for name, parameter in norms_in_fp32.named_parameters():
            if "norm" in name:
                parameter.data = parameter.data.float()
        report = check_layout(norms_in_fp32, random_pairs(), shared, pad_token_id=0)
    assert report.dtype == torch.bfloat16
    assert report.passed


def test_on_several_ranks_all_look_at_layers_where_one_differs():
    asked = []

    def another_differs(value):
        asked.append(value)
        return True

    report = check_layout(
        model(), random_pairs(), plugins.layout("shared"), pad_token_id=0, on_any_rank=another_differs
    )
    assert asked == [False]
    assert report.layer_difference < 1e-5
    assert report.first_layer is None


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
