"""Every causal family of transformers through the layouts, tiny and random: the model families of docs/support.md.

    python benchmarks/families.py                       # to the terminal, one line of JSON per family
    python benchmarks/families.py --write               # and to results/families-<version of transformers>.json
    python benchmarks/families.py --only llama gemma2   # some families

A family is "equal" where loss and every gradient of *packed* and *shared* are those of *padded* in fp32, and a control
(the rejected answer without its prompt) is not; else it is "padded, because ...".  A family that `unsupported` lets
through and that differs is an error, and so is the exit status.
"""

import argparse
import contextlib
import io
import json
import logging
import random
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from orpo_plugins.forward import orpo_forward
from orpo_plugins.hooks import Layout, Pair, TokenSequence, plugins
from orpo_plugins.layouts import support as layout_support
from orpo_plugins.layouts.shared import Shared
from orpo_plugins.layouts.spans import SPANS, Spans

LOSS_TOLERANCE = 1e-6
GRADIENT_TOLERANCE = 1e-5
EXACT_TOLERANCE = 1e-6  # in float64: some families compute norms and angles in fp32 all the same
CONTROL = 1e-4
"""What leaving the prompt out must change the loss by at least, for the comparison to mean something."""
VOCABULARY = 96
LAYERS = 4
LENGTHS = ((9, 5, 8), (2, 12, 1), (14, 4, 6))
"""(prompt, chosen, rejected) tokens of the three pairs; all longer than the sliding windows, which are 6."""
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "embed_dim": 32,
    "word_embed_proj_dim": 32,
    "dim": 32,
    "hidden_size_per_layer_input": 8,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "n_inner": 48,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "expert_hidden_size": 16,
    "num_hidden_layers": LAYERS,
    "n_layer": LAYERS,
    "n_layers": LAYERS,
    "num_layers": LAYERS,
    "decoder_layers": LAYERS,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 8,
    "swa_head_dim": 8,
    "swa_v_head_dim": 8,
    "v_head_dim": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 16,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "query_pre_attn_scalar": 8,
    "rotary_dim": 8,
    "n_routed_experts": 4,
    "num_experts": 4,
    "num_local_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "zero_expert_num": 2,
    "expert_ffn_hidden_size": 16,
    "ffn_hidden_size": 48,
    "max_position_embeddings": 128,
    "n_positions": 128,
    "n_ctx": 128,
    "max_seq_len": 128,
    "sliding_window": 6,
    "sliding_window_size": 6,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_kv_shared_layers": 0,
    "laurel_rank": 4,
    "altup_num_inputs": 2,
    "use_cache": False,
    "use_sliding_window": True,
}
"""Set wherever a configuration has the field."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One line of the table."""

    family: str
    verdict: str
    """"equal", "padded, because ...", "not tried: ..." or what fails the run: "DIFFERENT", "ERROR", "not built"."""
    kind: str = ""
    """What its layers are: windows, experts, soft-capping, …"""
    loss: float = 0.0
    gradient: float = 0.0
    """The largest relative difference of any parameter's gradient."""


def main() -> int:
    """Command line; 1 where a family is silently different."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", help="model types; default: all")
    parser.add_argument("--write", action="store_true", help="results/families-<version of transformers>.json")
    arguments = parser.parse_args()
    results = [check_family(name) for name in arguments.only or families()]
    text = ",\n".join(json.dumps(asdict(result)) for result in results)
    print(f"[\n{text}\n]")
    if arguments.write:
        import transformers

        folder = Path(__file__).parent / "results"
        (folder / f"families-{transformers.__version__}.json").write_text(f"[\n{text}\n]\n")
    return int(any(result.verdict.startswith(("DIFFERENT", "ERROR", "not built")) for result in results))


def families() -> list[str]:
    """Model types that `AutoModelForCausalLM` knows."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def check_family(family: str) -> Result:
    """Builds the family small and compares the layouts, or says why not."""
    if family in NOT_TEXT:
        return Result(family=family, verdict=f"not tried: {NOT_TEXT[family]}")
    with _quiet():
        try:
            model, note = tiny_model(family), ""
        except Exception as error:  # sizes that do not fit together, a missing package: reported, never hidden
            return not_built(family, error)
        reason = layout_support.unsupported(model)
        if reason and "only in its mask" in reason:
            with contextlib.suppress(Exception):  # a family that always has a window
                model = tiny_model(family, sliding_window=None, use_sliding_window=False)
                note = "without a window (with one: padded)"
                reason = layout_support.unsupported(model)
        if reason:
            return Result(family=family, verdict=f"padded, because {reason}")
        try:
            result = compare(family, model)
        except Exception as error:  # shown as an error, which fails the run
            return Result(family=family, verdict=f"ERROR {type(error).__name__}: {_first_line(error)}")
        return replace(result, kind=", ".join(filter(None, (result.kind, note))))


def not_built(family: str, error: Exception) -> Result:
    """The verdict of a family that cannot be made small, from its full size without memory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.for_model(family, **EXTRA.get(family, {}))
        if reason := layout_support.unsupported_layer_types(config.get_text_config()):
            return Result(family=family, verdict=f"padded, because {reason}")
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        if reason := layout_support.unsupported(model):
            return Result(family=family, verdict=f"padded, because {reason}")
    except Exception as other:
        error = other
    return Result(family=family, verdict=f"not built: {_first_line(error)}")


def tiny_model(family: str, **overrides: Any) -> nn.Module:
    """Four layers of random weights, large enough for attention to matter."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = shrink(AutoConfig.for_model(family), overrides)
    torch.manual_seed(0)
    soft_capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    # transformers' sdpa drops soft-capping (5.16) or refuses it (5.23).
    kind = {"attn_implementation": "eager"} if soft_capped else {}
    model = AutoModelForCausalLM.from_config(config, **kind)
    randomize(model)
    return model.float().eval()  # no dropout, no router noise: both would differ between two runs of one layout


def shrink(config: Any, overrides: dict[str, Any]) -> Any:
    """The same configuration class with every size in it replaced."""
    from transformers import PretrainedConfig

    wanted = {key: value for key, value in {**SIZES, **overrides}.items() if _is_set(config, key)}
    nested = {k: shrink(v, overrides).to_dict() for k, v in vars(config).items() if isinstance(v, PretrainedConfig)}
    types = () if _is_property(config, "layer_types") else getattr(config, "layer_types", None) or ()
    kinds = list(dict.fromkeys(types))
    if overrides and kinds:
        kinds = [kind for kind in kinds if kind != "sliding_attention"] or ["full_attention"]
    elif kinds == ["full_attention"] and hasattr(config, "sliding_window"):
        kinds = ["full_attention", "sliding_attention"]
    if kinds:
        wanted["num_hidden_layers"] = max(LAYERS, len(kinds))
        wanted["layer_types"] = (kinds * LAYERS)[: wanted["num_hidden_layers"]]
    if getattr(config, "kv_lora_rank", None):  # latent attention has as many key as query heads
        wanted["num_key_value_heads"] = wanted["num_attention_heads"]
    return type(config)(**{**wanted, **nested, **EXTRA.get(config.model_type, {})})


_MIXTURE = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
EXTRA: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")
        }
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": _MIXTURE,
    "dots1": {**_MIXTURE, "first_k_dense_replace": 1},
    "lfm2_moe": {"layer_types": ["full_attention", "conv", "full_attention", "conv"]},
    "reformer": {"is_decoder": True},
}
"""What single families need on top."""
NOT_TEXT = {
    "gemma3n": "a wrapper around gemma3n_text whose vision tower needs timm",
    "gemma4_assistant": "a draft model that reads another model's caches",
    "gemma4_unified_assistant": "a draft model that reads another model's caches",
    "musicgen": "a decoder of audio codes",
    "musicgen_melody": "a decoder of audio codes",
}
"""Families that cannot be built or run from a configuration alone, and what they are."""


def _is_property(config: Any, key: str) -> bool:
    return isinstance(getattr(type(config), key, None), property)


def _is_set(config: Any, key: str) -> bool:
    """Whether a size applies to a configuration."""
    if _is_property(config, key):
        return False
    try:
        current = getattr(config, key, None)
    except Exception:  # a value that differs by layer
        return True
    if key.startswith("sliding_window") or key in ("num_key_value_heads", "head_dim", "n_inner", "pad_token_id"):
        return hasattr(config, key)
    return current is not None and not isinstance(current, list | tuple | dict)


def randomize(model: nn.Module) -> None:
    """Matrices that neither explode nor vanish: with the usual 0.02 a wrong attention would hardly show."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim < 2:
                parameter.add_(0.1 * noise)
            elif "embed" in name or "wte" in name:
                parameter.copy_(noise)
            else:
                parameter.copy_(noise * 1.0 / parameter.shape[-1] ** 0.5)


def pairs() -> list[Pair]:
    """Three random pairs of different lengths."""
    random_tokens = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [random_tokens.randrange(3, VOCABULARY) for _ in range(count)]

    result = []
    for prompt_length, chosen, rejected in LENGTHS:
        prompt = tokens(prompt_length)
        sides = [
            TokenSequence(input_ids=prompt + answer, labels=[-100] * prompt_length + answer)
            for answer in (tokens(chosen), tokens(rejected))
        ]
        result.append(Pair(chosen=sides[0], rejected=sides[1]))
    return result


def compare(family: str, model: nn.Module) -> Result:
    """Loss and gradients of the layouts against those of *padded*.

    In fp32, whose rounding differs from CPU to CPU; where it is more than usual, float64 tells it from an error.
    """
    loss, gradient, control = differences(model)
    result = Result(family=family, verdict="equal", kind=kind_of(model), loss=loss, gradient=gradient)
    if control <= CONTROL:
        return replace(result, verdict="DIFFERENT")
    if loss <= LOSS_TOLERANCE and gradient <= GRADIENT_TOLERANCE:
        return result
    exact = max(differences(model.double())[:2])
    return result if exact <= EXACT_TOLERANCE else replace(result, verdict="DIFFERENT")


def differences(model: nn.Module) -> tuple[float, float, float]:
    """The worst relative difference of a loss, of a gradient, and what the loss changes by without the context."""
    expected_loss, expected = loss_and_gradients(model, plugins.layout("padded"))
    scales = module_norms(expected)
    worst_loss = worst_gradient = 0.0
    for name in ("packed", "shared"):
        loss, found = loss_and_gradients(model, plugins.layout(name))
        worst_loss = max(worst_loss, abs(loss - expected_loss) / max(1.0, abs(expected_loss)))
        for key, gradient in expected.items():
            difference = float((found[key] - gradient).norm())
            worst_gradient = max(worst_gradient, difference / scales[key.rpartition(".")[0]])
    return worst_loss, worst_gradient, abs(loss_and_gradients(model, Control())[0] - expected_loss)


def module_norms(gradients: dict[str, torch.Tensor]) -> dict[str, float]:
    """Norm of the gradient of each module's own parameters.

    A key bias without rotary positions has a gradient of zero in exact arithmetic: measured by itself it is noise,
    measured with its weight it is not.
    """
    squares: dict[str, float] = {}
    for key, gradient in gradients.items():
        module = key.rpartition(".")[0]
        squares[module] = squares.get(module, 0.0) + float(gradient.double().square().sum())
    return {module: max(square, 1e-30) ** 0.5 for module, square in squares.items()}


def loss_and_gradients(model: nn.Module, layout: Layout) -> tuple[float, dict[str, torch.Tensor]]:
    """One step of the reference kernel in a layout."""
    batch = layout.collate(pairs(), pad_token_id=0, nll_over="sequence")
    model.zero_grad()
    layout.prepare(model)
    with layout.forward_context(model):
        output = orpo_forward(model, batch, kernel="reference")
    output.loss.backward()
    return output.loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


class Control(Shared):
    """*shared* with the context taken away, which must not go unnoticed."""

    name = "control"

    def collate(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        batch = super().collate(*args, **kwargs)
        spans = tuple(span._replace(context_length=0) for span in batch[SPANS].spans)
        return {**batch, SPANS: Spans(spans=spans)}


def kind_of(model: nn.Module) -> str:
    """What a reader wants to know of a family's layers."""
    config: Any = model.config.get_text_config()
    types = list(dict.fromkeys(getattr(config, "layer_types", None) or ()))
    words = [str(kind).replace("_attention", "") for kind in types]
    if not types and getattr(config, "sliding_window", None):
        words.append("sliding")
    experts = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    if any(getattr(config, key, None) for key in experts):
        words.append("experts")
    if getattr(config, "attn_logit_softcapping", None):
        words.append("soft-capped")
    names = [type(module).__name__ for module in model.modules()]
    if any("sinks" in name for name, _ in model.named_parameters()):
        words.append("sinks")
    if not any("Rotary" in name for name in names):
        words.append("no rotary")
    if float(getattr(config, "partial_rotary_factor", 1.0) or 1.0) != 1.0:
        words.append("partial rotary")
    if getattr(config, "kv_lora_rank", None):
        words.append("latent")
    return ", ".join(words)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


if __name__ == "__main__":
    sys.exit(main())
