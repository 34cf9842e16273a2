"""Models that ORPO, or a fused head, cannot handle: one clear error each."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from orpo_plugins import ORPOCollator, errors, orpo_forward
from tests.kit import tiny
from tests.kit.training import trainer


def batch() -> dict[str, Any]:
    return ORPOCollator(tiny.tokenizer(), max_length=128)(tiny.rows(2))


def build(name: str, **changes: Any) -> nn.Module:
    cls = getattr(transformers, name)
    made: nn.Module = cls(cls.config_class(**{**tiny.SIZES, **changes}))
    return made


@pytest.mark.parametrize("name", ["BertForMaskedLM", "RobertaForMaskedLM", "ModernBertForMaskedLM", "BertLMHeadModel"])
def test_an_encoder_only_model_is_refused(name: str, tmp_path: Path) -> None:
    message = rf"{name} is not a causal language model .*AutoModelForCausalLM"
    with pytest.raises(errors.ModelError, match=message):
        orpo_forward(build(name), batch())
    with pytest.raises(errors.ModelError, match=message):
        trainer(tmp_path, model=build(name))


def test_an_encoder_that_is_told_to_decode_is_a_causal_model() -> None:
    out = orpo_forward(
        build("BertLMHeadModel", is_decoder=True, tie_word_embeddings=False), batch(), kernel="reference"
    )
    assert torch.isfinite(out.loss)


@pytest.mark.parametrize("name", ["LlamaModel", "LlamaForSequenceClassification"])
def test_a_model_without_a_language_head_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(errors.ModelError, match=f"{name} is not a causal language model with an output head"):
        trainer(tmp_path, model=build(name))


class Sharpened(transformers.LlamaForCausalLM):
    """Does something to its logits that is neither a scale nor a soft-cap."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits.abs()
        return out


class Sliced(transformers.LlamaForCausalLM):
    """Leaves out a part of its logits."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits[..., :-8]
        return out


@pytest.mark.parametrize(
    ("cls", "message"), [(Sharpened, "post-processes its logits in an unknown way"), (Sliced, "reshapes its logits")]
)
def test_logits_that_are_bent_in_an_unknown_way_are_refused(cls: Any, message: str, tmp_path: Path) -> None:
    model = cls(transformers.LlamaConfig(**tiny.SIZES))
    with pytest.raises(errors.ModelError, match=rf"{cls.__name__} .*{message}.*Use kernel='reference'"):
        orpo_forward(model, batch())
    with pytest.raises(errors.ModelError, match=message):
        trainer(tmp_path, model=model).train()


def test_the_reference_kernel_takes_such_a_model() -> None:
    model = Sharpened(transformers.LlamaConfig(**tiny.SIZES))
    out = orpo_forward(model, batch(), kernel="reference")
    inputs = {key: value for key, value in batch().items() if key not in ("labels", "shift_labels")}
    logps = model(**inputs).logits[0, 0].log_softmax(-1)
    assert torch.isfinite(out.loss)
    assert (model(**inputs).logits >= 0).all()
    assert logps.shape == (320,)


def test_a_tokenizer_with_more_tokens_than_the_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(errors.BatchError, match=r"outside the model's vocabulary of 64.*resize_token_embeddings"):
        trainer(tmp_path, model=tiny.model(vocab_size=64)).train()


@pytest.mark.parametrize("kernel", ["reference", "chunked"])
def test_weights_that_are_not_finite_end_the_run_or_the_step(kernel: str, tmp_path: Path) -> None:
    model = tiny.model()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(errors.ORPOError, match=r"(?i)nan|not finite"):
        trainer(tmp_path, model=model, kernel=kernel, layout_check=False).train()


def test_an_unknown_kernel_or_layout_lists_the_known_ones() -> None:
    known = "auto, chunked, chunked_fp32, reference"
    with pytest.raises(errors.ConfigError, match=f"unknown kernel 'quick'; known: {known}"):
        orpo_forward(tiny.model(), batch(), kernel="quick")
    with pytest.raises(errors.ConfigError, match="unknown layout 'stacked'; known: auto, packed, padded, "):
        ORPOCollator(tiny.tokenizer(), layout="stacked")


def test_a_batch_from_another_collator_is_named() -> None:
    with pytest.raises(errors.BatchError, match=r"the batch has keys \['input_ids'\]: make it with ORPOCollator"):
        orpo_forward(tiny.model(), {"input_ids": torch.ones(2, 4, dtype=torch.long)})
