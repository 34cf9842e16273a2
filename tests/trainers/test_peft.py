"""ORPOTrainer with PEFT: LoRA, a head trained whole, QLoRA with 8-bit optimizers."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from orpo_plugins import errors
from tests.kit import tiny
from tests.kit.compare import assert_all_within
from tests.kit.training import logged, trainer

peft = pytest.importorskip("peft")


def lora(**options: Any) -> Any:
    return peft.LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **options}
    )


def trainable(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_only_the_adapter_changes(tmp_path: Path) -> None:
    made = trainer(tmp_path, peft_config=lora(), learning_rate=1.0)
    before = {name: parameter.detach().clone() for name, parameter in made.model.named_parameters()}
    made.train()
    changed = {n for n, p in made.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    assert all("lora_" in name for name in changed)


def test_the_adapters_dropout_stays(tmp_path: Path) -> None:
    made = trainer(tmp_path, peft_config=lora(lora_dropout=0.05))
    rates = {m.p for name, m in made.model.named_modules() if "lora_dropout" in name and isinstance(m, nn.Dropout)}
    assert rates == {0.05}


def test_the_adapter_is_initialized_from_the_seed(tmp_path: Path) -> None:
    first, second, third = (trainable(trainer(tmp_path, peft_config=lora(), seed=seed).model) for seed in (7, 7, 8))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], third[name]) for name in first)


def test_gradients_equal_those_of_the_reference_kernel(tmp_path: Path) -> None:
    weights = {}
    for kernel in ("reference", "chunked"):
        made = trainer(tmp_path, peft_config=lora(), kernel=kernel, learning_rate=1.0)
        made.train()
        weights[kernel] = trainable(made.model)
    assert_all_within(weights["chunked"], weights["reference"], 1e-5)


def test_a_head_in_modules_to_save_is_trained_whole(tmp_path: Path) -> None:
    weights = {}
    for kernel in ("reference", "chunked"):
        options: dict[str, Any] = {"peft_config": lora(modules_to_save=["lm_head"]), "learning_rate": 1.0}
        made = trainer(tmp_path, kernel=kernel, **options)
        head = made.model.get_base_model().lm_head
        before = head.modules_to_save["default"].weight.detach().clone()
        made.train()
        assert not torch.equal(head.modules_to_save["default"].weight, before)
        assert torch.equal(head.original_module.weight, before)
        weights[kernel] = trainable(made.model)
    assert_all_within(weights["chunked"], weights["reference"], 1e-5)


def test_an_adapter_on_the_head_is_refused(tmp_path: Path) -> None:
    made = trainer(tmp_path, peft_config=lora(target_modules=["q_proj", "lm_head"]))
    with pytest.raises(errors.ModelError, match=r"lm_head carries an adapter .*modules_to_save=\['lm_head'\]"):
        made.train()


def test_an_adapter_on_the_head_trains_with_the_reference_kernel(tmp_path: Path) -> None:
    made = trainer(tmp_path, peft_config=lora(target_modules=["lm_head"]), kernel="reference", learning_rate=1.0)
    before = trainable(made.model)
    made.train()
    after = trainable(made.model)
    assert any(not torch.equal(after[name], before[name]) for name in before)


def test_a_second_adapter_is_refused(tmp_path: Path) -> None:
    model = peft.get_peft_model(tiny.model(), lora())
    with pytest.raises(errors.ConfigError, match="the model already carries an adapter"):
        trainer(tmp_path, model=model, peft_config=lora())


def test_a_model_that_is_wrapped_already_trains(tmp_path: Path) -> None:
    made = trainer(tmp_path, model=peft.get_peft_model(tiny.model(), lora()))
    made.train()
    assert len(logged(made, "loss")) == 3


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("adapter", [False, True])
def test_checkpointing_does_not_change_the_steps(adapter: bool, reentrant: bool, tmp_path: Path) -> None:
    weights = []
    for checkpointing in (False, True):
        options: dict[str, Any] = {"peft_config": lora()} if adapter else {}
        if checkpointing:
            options["gradient_checkpointing_kwargs"] = {"use_reentrant": reentrant}
        made = trainer(tmp_path, gradient_checkpointing=checkpointing, learning_rate=1.0, **options)
        made.train()
        weights.append(trainable(made.model))
    assert_all_within(weights[1], weights[0], 1e-6)


def test_a_saved_adapter_loads_onto_its_base(tmp_path: Path) -> None:
    base = tiny.saved(tmp_path / "base")
    made = trainer(tmp_path / "out", model=base, peft_config=lora(), learning_rate=1.0)
    made.train()
    made.save_model(str(tmp_path / "adapter"))
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "adapter"))
    ids = torch.arange(3, 20)[None]
    made.model.eval()
    torch.testing.assert_close(loaded(ids).logits, made.model(ids).logits)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, made.model(ids).logits, rtol=1e-4, atol=1e-5)


def four_bit(folder: Path) -> nn.Module:
    """A tiny model in nf4 with double quantization."""
    pytest.importorskip("bitsandbytes")
    path = tiny.saved(folder, hidden_size=64, intermediate_size=128)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bitsandbytes looks for CPU kernels on the hub and reports that there are none
        return AutoModelForCausalLM.from_pretrained(path, quantization_config=quantization)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit"])
def test_qlora_trains_four_bit_weights_on_a_cpu(optimizer: str, tmp_path: Path) -> None:
    made = trainer(
        tmp_path / "out",
        model=four_bit(tmp_path / "base"),
        peft_config=lora(lora_dropout=0.05),
        optim=optimizer,
        learning_rate=1e-2,
        gradient_checkpointing=True,
    )
    assert made.model.is_loaded_in_4bit
    before = trainable(made.model)
    made.train()
    assert all(not torch.equal(p, before[name]) for name, p in trainable(made.model).items())


@pytest.mark.parametrize("kernel", ["reference", "chunked"])
def test_evaluation_does_not_end_the_gradients_of_four_bit_weights(kernel: str, tmp_path: Path) -> None:
    made = trainer(
        tmp_path / "out",
        model=four_bit(tmp_path / "base"),
        peft_config=lora(),
        eval_dataset=tiny.rows(4),
        eval_strategy="steps",
        eval_steps=1,
        eval_on_start=True,
        kernel=kernel,
    )
    made.train()
    assert all(norm > 1e-3 for norm in logged(made, "grad_norm"))
    assert len(logged(made, "eval_loss")) == 4


def test_without_peft_the_error_holds_the_pip_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config_of_adapter = lora()
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(errors.MissingExtraError, match=r"pip install 'orpo-plugins\[peft\]'"):
        trainer(tmp_path, peft_config=config_of_adapter)
