"""QLoRA on a CPU: an evaluation between steps must not cost gradients."""

from typing import Any

import pytest
import torch

from orpo_plugins.models.head import keep_four_bit_trainable
from tests.kit import tiny
from tests.kit.compare import assert_all_within

pytest.importorskip("bitsandbytes")
pytest.importorskip("peft")
IDS = torch.arange(3, 27).reshape(2, 12)


def four_bit_model(folder: Any) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    path = tiny.saved(folder, hidden_size=64, intermediate_size=128)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    base = AutoModelForCausalLM.from_pretrained(path, quantization_config=config)
    torch.manual_seed(0)
    return get_peft_model(base, LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "up_proj"]))


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.train()
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def evaluate(model: Any) -> None:
    model.eval()
    with torch.no_grad():
        model(input_ids=IDS)


@pytest.mark.filterwarnings("default::UserWarning")  # bitsandbytes looks for kernels on the hub
@pytest.mark.parametrize("evaluated_before", [False, True])
def test_an_evaluation_leaves_all_gradients_of_a_four_bit_model(tmp_path: Any, evaluated_before: bool) -> None:
    expected = gradients(four_bit_model(tmp_path))
    model = four_bit_model(tmp_path)
    if evaluated_before:
        evaluate(model)
    keep_four_bit_trainable(model)
    evaluate(model)
    found = gradients(model)
    assert len(expected) == 8
    # Packing had rounded the blocks' scales to bfloat16.
    assert_all_within(found, expected, 5e-3 if evaluated_before else 0.0)
