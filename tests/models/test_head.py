"""The intercepted head: same loss and gradients as the model's own logits, in every family, or a clear refusal."""

import shutil
import subprocess
import sys
from typing import Any

import pytest
import torch
import transformers
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn

from orpo_plugins import errors, orpo_forward
from orpo_plugins.denominators import own_denominators
from orpo_plugins.forward import forward_with_options
from orpo_plugins.hooks import plugins
from orpo_plugins.hooks.types import Kernel, Pair, TokenSequence
from orpo_plugins.layouts.padded import Padded
from orpo_plugins.models.head import head_options, output_head, unwrap_model
from orpo_plugins.models.state import state_of
from orpo_plugins.options import ORPOOptions
from orpo_plugins.targets import targets_of
from tests.kit.compare import assert_all_within, assert_within
from tests.kit.two_devices import CPU, OTHER, TwoDevices, put_on_other

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": ("LlamaForCausalLM", {}),
    "tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "soft-capped": ("Gemma2ForCausalLM", {"head_dim": 8, "final_logit_softcapping": 5.0}),
    "scaled up": ("CohereForCausalLM", {"logit_scale": 0.0625}),
    "scaled down": ("GraniteForCausalLM", {"logits_scaling": 4.0}),
    "biased": ("PhiForCausalLM", {"resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "experts": ("MixtralForCausalLM", {"output_router_logits": True, "num_local_experts": 4}),
}


def build(name: str, **changes: Any) -> nn.Module:
    cls_name, extra = FAMILIES[name]
    cls = getattr(transformers, cls_name)
    torch.manual_seed(0)
    model: nn.Module = cls(cls.config_class(**{**SIZES, **extra, **changes}))
    # Far from initialization, where soft-caps and scales make a visible difference.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    return model


def batch(num_pairs: int = 3) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)

    def sequence(prompt: int, answer: int) -> TokenSequence:
        ids = torch.randint(3, 97, (prompt + answer,), generator=generator).tolist()
        return TokenSequence(input_ids=ids, labels=[-100] * prompt + ids[prompt:])

    pairs = [Pair(chosen=sequence(4 + i, 3 + i), rejected=sequence(4 + i, 6 - i)) for i in range(num_pairs)]
    return Padded().collate(pairs, pad_token_id=0, nll_over="sequence")


def loss_and_gradients(model: nn.Module, kernel: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    out = orpo_forward(model, batch(), kernel=kernel)
    out.loss.backward()
    return out.loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", FAMILIES)
def test_fused_equals_the_models_own_logits(name: str) -> None:
    model = build(name)
    loss, gradients = loss_and_gradients(model, "reference")
    fused_loss, fused_gradients = loss_and_gradients(model, "chunked")
    # 1e-6 relative: both sum a few hundred fp32 terms, in another order.
    torch.testing.assert_close(fused_loss, loss, rtol=1e-6, atol=0)
    assert fused_gradients.keys() == gradients.keys()
    for parameter, gradient in gradients.items():
        error = (fused_gradients[parameter] - gradient).norm() / gradient.norm()
        assert error < 2e-6, f"{parameter}: {error:.1e}"


def test_the_probe_finds_scale_and_soft_cap() -> None:
    ids = torch.tensor([[5, 6, 7]])
    assert head_options(build("llama"), ids).softcap is None
    assert head_options(build("llama"), ids).logit_scale == 1.0
    assert head_options(build("soft-capped"), ids).softcap == 5.0
    assert head_options(build("scaled up"), ids).logit_scale == 0.0625
    assert head_options(build("scaled down"), ids).logit_scale == 0.25


def test_the_head_is_left_as_it_was() -> None:
    model = build("llama")
    before = model.training
    orpo_forward(model, batch(), kernel="chunked")
    assert "forward" not in model.lm_head.__dict__
    assert model.training == before
    assert model(input_ids=torch.tensor([[5, 6]])).logits.shape == (1, 2, 97)


def test_the_head_is_left_as_it_was_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> None:
        raise RuntimeError("out of memory")

    model = build("llama")
    monkeypatch.setattr(plugins, "kernel", lambda name, hidden, weight: Kernel(name=name, compute=broken))
    with pytest.raises(RuntimeError, match="out of memory"):
        orpo_forward(model, batch(), kernel="chunked")
    assert "forward" not in model.lm_head.__dict__


def test_a_token_beyond_the_vocabulary_is_named() -> None:
    beyond = batch()
    beyond["input_ids"][0, 1] = 97
    with pytest.raises(errors.BatchError, match=r"token 97 is outside the model's vocabulary of 97.*resize_token_emb"):
        orpo_forward(build("llama"), beyond)


def test_no_logits_are_made() -> None:
    model = build("llama")
    shapes: list[torch.Size] = []
    model.register_forward_hook(lambda module, args, output: shapes.append(output.logits.shape))
    orpo_forward(model, batch(), kernel="chunked")
    assert shapes[-1] == (1, 1, 1)


def test_unknown_post_processing_is_refused() -> None:
    model = build("llama")

    class Masked(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.module = inner

        def forward(self, **inputs: Any) -> Any:
            outputs = self.module(**inputs)
            outputs.logits[..., 11] = -1e4
            return outputs

    with pytest.raises(errors.ModelError, match=r"vocabulary entry 11 became -10000.*Use kernel='reference'"):
        orpo_forward(Masked(model), batch(), kernel="chunked")
    assert orpo_forward(Masked(model), batch(), kernel="reference").loss.isfinite()


def test_bf16_autocast_gives_fp32_gradients_close_to_the_reference() -> None:
    model = build("llama")
    _, exact = loss_and_gradients(model, "reference")
    errors_by_kernel = {}
    for kernel in ("reference", "chunked"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            _, gradients = loss_and_gradients(model, kernel)
        assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
        errors_by_kernel[kernel] = sum(float((gradients[n] - exact[n]).norm()) for n in exact)
    # No worse than the same-dtype reference; a tenth on top, since both are a few roundings of 2**-9.
    assert errors_by_kernel["chunked"] <= 1.1 * errors_by_kernel["reference"]


def test_wrappers_are_looked_through() -> None:
    peft = pytest.importorskip("peft", reason="PEFT is an optional extra")
    model = build("llama")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2))
    assert unwrap_model(wrapped) is model
    assert unwrap_model(torch.compile(model)) is model
    assert output_head(wrapped) is model.lm_head


def test_the_head_in_modules_to_save_is_the_copy_in_use() -> None:
    """Not the wrapper around it, during whose call alone the copy's weights may still be cut (ZeRO-3)."""
    peft = pytest.importorskip("peft", reason="PEFT is an optional extra")
    model = build("llama")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], r=2))
    wrapper = model.lm_head
    assert output_head(wrapped) is wrapper.modules_to_save["default"]
    with wrapped.disable_adapter():
        assert output_head(wrapped) is wrapper.original_module


@pytest.mark.slow
def test_nothing_that_compiles_is_imported_before_something_is_compiled() -> None:
    code = (
        "import sys, torch, orpo_plugins as o\n"
        "h, w = torch.randn(2, 3, 8, requires_grad=True), torch.randn(9, 8)\n"
        "o.linear_orpo_loss(h, w, torch.ones(2, 3, dtype=torch.int64)).loss.backward()\n"
        "assert 'torch._dynamo' not in sys.modules and 'sympy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on a CPU")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo, looking at inputs
def test_a_model_compiled_by_inductor_trains_through_the_fused_head() -> None:
    torch._dynamo.reset()
    model = build("llama")
    expected_loss, expected = loss_and_gradients(model, "chunked")
    model.zero_grad()
    loss = orpo_forward(torch.compile(model), batch(), kernel="chunked").loss
    loss.backward()
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    for name, parameter in model.named_parameters():
        assert (parameter.grad - expected[name]).norm() < 1e-5 * expected[name].norm(), name


def dispatched(model: nn.Module) -> nn.Module:
    """The model as `device_map` places it: hooks that move inputs, the head on a device of its own."""
    head = output_head(model)
    parameters = dict(head._parameters)
    add_hook_to_module(head, AlignDevicesHook(execution_device=OTHER))
    head._parameters.update(parameters)  # the hook has copied them, and knows no pretended devices
    put_on_other(head)
    return add_hook_to_module(model, AlignDevicesHook(execution_device=CPU, io_same_device=True))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "tied"])
def test_the_head_may_be_on_another_device_than_the_batch(name: str) -> None:
    model = build(name, tie_word_embeddings=False)  # Accelerate gives each device a copy of its own of a tied weight
    expected = loss_and_gradients(model, "chunked")
    state_of(model).head_options = None  # so that the probe runs again
    model = dispatched(model)
    with TwoDevices():
        loss, gradients = loss_and_gradients(model, "chunked")
        labels, options = targets_of(batch()), ORPOOptions(kernel="chunked", logit_means=True)
        out = forward_with_options(model, batch(), options, labels, own_denominators(labels))
        assert all(figure.device == CPU for figure in (loss, out.loss, out.chosen_logps, *out.metrics.values()))
    assert_within(loss, expected[0], 1e-6)
    assert_all_within(gradients, expected[1], 1e-5)


def test_the_pretended_devices_do_not_mix() -> None:
    one = torch.ones(2)
    with TwoDevices():
        other = one.to(OTHER)
        assert (one.device, other.device, (other + 1).device) == (CPU, OTHER, OTHER)
        assert torch.equal(other.to(CPU) + one, torch.full((2,), 2.0))
        with pytest.raises(RuntimeError, match="two"):
            one + other
        with pytest.raises(RuntimeError, match="two"):
            one.sum() * other.sum() + one * other.sum()


@pytest.mark.parametrize("trainable", [False, True])
def test_an_offloaded_head_is_brought_back_for_the_forward_pass_if_it_needs_no_gradient(trainable: bool) -> None:
    model = build("llama")
    output_head(model).requires_grad_(trainable)
    expected = loss_and_gradients(model, "chunked") if not trainable else None
    model.zero_grad()
    cpu_offload(output_head(model), CPU)
    assert next(output_head(model).parameters()).device.type == "meta"
    if expected is None:
        with pytest.raises(errors.ModelError, match="lm_head is trainable and offloaded"):
            loss_and_gradients(model, "chunked")
        return
    loss, gradients = loss_and_gradients(model, "chunked")
    assert_within(loss, expected[0], 1e-6)
    assert_all_within(gradients, expected[1], 1e-5)
