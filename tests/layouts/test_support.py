"""Who may run in a layout of one row, whoever runs it: what is read from a model, and when it is read again."""

import functools
import gc
import logging
import sys
import types
import weakref

import pytest
import torch

from orpo_plugins import ORPOCollator, ORPOLoss, errors, fuse_head, get_plugin_manager, hookimpl
from orpo_plugins.forward import orpo_forward
from orpo_plugins.hooks import plugins
from orpo_plugins.layouts import attention
from orpo_plugins.layouts import support as layout_support
from orpo_plugins.layouts.auto import best_layout
from orpo_plugins.layouts.padded import Padded
from tests.kit import tiny
from tests.kit.laid_out import assert_equal_to_padded, model, random_pairs, step
from tests.kit.training import trainer

CONVOLUTIONS = {"layer_types": ["conv", "full_attention", "conv"]}
CONV_REASON = "its conv layers are not softmax attention over their sequence"


def batch(layout, pairs=None):
    return plugins.layout(layout).collate(pairs or random_pairs(), pad_token_id=0, nll_over="sequence")


# A loop of one's own.


@pytest.mark.parametrize("layout", ["packed", "shared"])
@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("Lfm2", CONVOLUTIONS, CONV_REASON),
        ("RecurrentGemma", {"lru_width": 32}, "carries state from token to token|linear attention layers are"),
        ("StableLm", {}, "StableLmDecoderLayer does not pass keyword arguments on to its attention"),
    ],
)
def test_a_loop_of_ones_own_is_told_what_its_model_cannot_run(kind, changes, reason, layout):
    made = model(kind, **changes)
    orpo_forward(made, batch("padded"), kernel="reference")
    for _ in range(2):
        with pytest.raises(errors.ModelError, match=rf"{kind}ForCausalLM cannot run .*({reason}).* layout='padded'"):
            orpo_forward(made, batch(layout), kernel="reference")


def test_gemma2_loaded_with_sdpa_is_refused_by_hand():
    made = model("Gemma2", "eager")
    made.config._attn_implementation = "sdpa"  # transformers 5.16 loads it so by default, 5.23 refuses
    with pytest.raises(errors.ModelError, match="soft-capped, which 'sdpa' leaves out.* layout='padded'"):
        orpo_forward(made, batch("shared"), kernel="reference")


@pytest.fixture
def asked():
    """The models that a plugin's layout, known by a keyword of its own, was asked about."""
    models, reasons = [], []

    class Counting(Padded):
        name = batch_key = "counting"

        def unsupported(self, model):
            models.append(model)
            return reasons[0] if reasons else None

        def model_inputs(self, model, inputs):
            return {name: value for name, value in inputs.items() if name != "counting"}

    class Plugin:
        @hookimpl
        def orpo_layouts(self):
            return [Counting()]

    plugin = Plugin()
    get_plugin_manager().register(plugin)
    models_and_reasons = types.SimpleNamespace(models=models, reasons=reasons)
    try:
        yield models_and_reasons
    finally:
        get_plugin_manager().unregister(plugin)


def test_a_plugins_layout_is_asked_once_per_model_and_implementation(asked):
    first, second = model(), model()
    given = {**batch("padded"), "counting": True}
    for made in (first, first, second, first):
        orpo_forward(made, given, kernel="reference")
    assert asked.models == [first, second]
    first.set_attn_implementation("eager")
    orpo_forward(first, given, kernel="reference")
    assert asked.models == [first, second, first]
    asked.reasons.append("it is too small")
    second.set_attn_implementation("eager")
    with pytest.raises(errors.ModelError, match="it is too small"):
        orpo_forward(second, given, kernel="reference")


def test_what_was_asked_keeps_no_model_alive():
    made = model(num_hidden_layers=1)
    orpo_forward(made, batch("shared"), kernel="reference")
    gone = weakref.ref(made)
    del made
    gc.collect()
    assert gone() is None


def test_an_implementation_of_ones_own_is_refused_before_and_after_preparing():
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register("mine", sdpa_attention_forward)
    AttentionMaskInterface.register("mine", sdpa_mask)
    prepared = model()
    step(prepared, "shared")
    prepared.set_attn_implementation("mine")
    for made in (model(implementation="mine"), prepared):
        with pytest.raises(
            errors.ModelError, match=r"attention implementation 'mine' may not compute .*layout='padded'"
        ):
            orpo_forward(made, batch("shared"), kernel="reference")
        with (
            pytest.raises(errors.ModelError, match="has the attention implementation 'mine', which ignores"),
            attention.without_masks(made),
        ):
            pass


# A model that was prepared, and changed since.


def composite():
    """A small Gemma 3 with a vision tower, whose text decoder has a configuration of its own."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 5,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    torch.manual_seed(0)
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    made = Gemma3ForConditionalGeneration._from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.25)
    return made


@pytest.mark.parametrize(
    "change",
    [
        lambda made: made.set_attn_implementation({"text_config": "eager"}),
        lambda made: made.model.language_model.set_attn_implementation("eager"),
        lambda made: made.set_attn_implementation("eager"),
    ],
    ids=["by name", "by module", "whole"],
)
def test_a_part_that_was_given_another_implementation_is_prepared_again(change):
    made = composite()
    expected = orpo_forward(made, batch("padded"), kernel="reference").loss.item()
    attention.prepare(made)
    change(made)
    assert made.config.text_config._attn_implementation == "eager"
    for _ in range(2):
        loss = orpo_forward(made, batch("shared"), kernel="reference").loss.item()
        assert abs(loss - expected) < 1e-5
    assert made.config.text_config._attn_implementation == "orpo_eager"


def test_a_layer_that_was_exchanged_is_prepared_too():
    made = model()
    orpo_forward(made, batch("shared"), kernel="reference")
    made.model.layers[1] = model(num_hidden_layers=1).model.layers[0]  # with a configuration of its own
    losses = [orpo_forward(made, batch(layout), kernel="reference").loss.item() for layout in ("shared", "padded")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_further_passes_do_not_walk_over_all_modules(monkeypatch):
    made = model()
    step(made, "shared")
    walked = []
    monkeypatch.setattr(attention, "prepare", walked.append)
    orpo_forward(made, batch("shared"), kernel="reference")
    assert not walked


# What stands in a forward's place.


def ignoring(self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, **kwargs):
    """An attention that never heard of `AttentionInterface`, as libraries for speed bring it along."""
    del position_embeddings, attention_mask, past_key_values, kwargs
    q, k, v = (
        p(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        for p in (self.q_proj, self.k_proj, self.v_proj)
    )
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return self.o_proj(out.transpose(1, 2).flatten(2)), None


def assert_refused(made, reason):
    assert layout_support.unsupported(made) == reason
    assert best_layout("auto", made)[0].name == "padded"
    with pytest.raises(errors.ModelError, match="cannot run in the layout of this batch"):
        orpo_forward(made, batch("shared"), kernel="reference")


def test_a_class_that_was_patched_after_the_first_question_is_read_again(monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaAttention

    assert layout_support.unsupported(model()) is None
    monkeypatch.setattr(LlamaAttention, "forward", ignoring)
    assert_refused(model(), "LlamaAttention does not go through transformers' AttentionInterface (layer 0)")


@pytest.mark.parametrize("layers", [(0, 1, 2), (1,)])
def test_attention_that_was_patched_on_the_modules_is_refused(layers):
    made = model()
    for layer in layers:
        patched = made.model.layers[layer].self_attn
        patched.forward = types.MethodType(ignoring, patched)
    reason = "LlamaAttention.forward was replaced by one that does not go through transformers' AttentionInterface"
    assert_refused(made, f"{reason} (layer {layers[0]})")


def test_a_name_that_was_only_taken_over_is_not_believed():
    made = model()
    patched = made.model.layers[0].self_attn
    patched.forward = types.MethodType(functools.wraps(patched.forward)(ignoring), patched)
    reason = "the source of LlamaAttention.forward cannot be read (probably replaced at run time) (layer 0)"
    assert_refused(made, reason)
    del ignoring.__wrapped__


def test_attention_made_from_a_string_is_refused():
    made = model()
    space = {}
    exec("def forward(self, hidden_states, **kwargs):\n    return hidden_states, None\n", space)
    patched = made.model.layers[2].self_attn
    patched.forward = types.MethodType(space["forward"], patched)
    reason = "the source of LlamaAttention.forward cannot be read (probably replaced at run time) (layer 2)"
    assert_refused(made, reason)


def hooked(made):
    from accelerate.hooks import ModelHook, add_hook_to_module

    for module in made.modules():
        add_hook_to_module(module, ModelHook())


def compiled_layers(made):
    for index, layer in enumerate(made.model.layers):
        made.model.layers[index] = torch.compile(layer, backend="eager")


def checkpointed_layers(made):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    for index, layer in enumerate(made.model.layers):
        made.model.layers[index] = checkpoint_wrapper(layer)


def compiled_forwards(made):
    for layer in made.model.layers:
        layer.self_attn.forward = torch.compile(layer.self_attn.forward, backend="eager")


def decorated_forwards(made):
    def decorate(wrapped):
        @functools.wraps(wrapped)
        def wrapper(*args, **kwargs):
            return wrapped(*args, **kwargs)

        return wrapper

    for layer in made.model.layers:
        layer.self_attn.forward = decorate(layer.self_attn.forward)


def subclassed(made):
    for layer in made.model.layers:  # as fully_shard does it
        layer.__class__ = type(f"FSDP{type(layer).__name__}", (type(layer),), {"__module__": __name__})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo, looking at inputs
@pytest.mark.parametrize(
    "wrap", [hooked, compiled_layers, checkpointed_layers, compiled_forwards, decorated_forwards, subclassed]
)
def test_what_calls_the_forward_that_it_wraps_changes_nothing(wrap):
    torch._dynamo.reset()
    made = model(num_hidden_layers=2)
    _, expected = step(made, "padded")
    wrap(made)
    for layout in ("packed", "shared"):
        _, found = step(made, layout)
        for one, other in zip(found.values(), expected.values(), strict=True):
            assert (one - other).norm() <= 1e-5 * other.norm()


@pytest.fixture
def with_lora_kernels(monkeypatch):
    """A Llama whose attention Axolotl has rewritten for its LoRA kernels, on a class of its own."""
    pytest.importorskip("axolotl", reason="its LoRA kernels rewrite attention")
    from axolotl.monkeypatch import lora_kernels
    from transformers.models.llama import modeling_llama

    own = type("LlamaAttention", (modeling_llama.LlamaAttention,), {"__module__": modeling_llama.__name__})
    monkeypatch.setattr(lora_kernels, "get_attention_cls_from_config", lambda _: own)
    lora_kernels.patch_self_attn_lora({})
    made = model()
    for layer in made.model.layers:
        layer.self_attn.__class__ = own
        layer.self_attn.apply_qkv = types.MethodType(lora_kernels.original_apply_qkv, layer.self_attn)
        layer.self_attn.apply_o = types.MethodType(lora_kernels.original_apply_o, layer.self_attn)
    return made


def test_attention_rewritten_by_axolotls_lora_kernels_stays_exact(with_lora_kernels):
    assert type(with_lora_kernels.model.layers[0].self_attn).forward.__name__ == "axolotl_attn_forward"
    assert_equal_to_padded(with_lora_kernels)


@pytest.mark.parametrize("change", ["another rewriting", "another forward"])
def test_a_rewriting_that_is_not_the_one_known_is_refused_with_the_options(with_lora_kernels, monkeypatch, change):
    kernels, own = sys.modules["axolotl.monkeypatch.lora_kernels"], type(with_lora_kernels.model.layers[0].self_attn)
    if change == "another rewriting":
        monkeypatch.setattr(kernels, "PATCHED_O_CODE", "    attn_output = self.apply_o(attn_output) * 1\n")
    else:
        space = {"__name__": kernels.__name__}
        exec("def axolotl_attn_forward(self, hidden_states, **kwargs):\n    return hidden_states, None\n", space)
        monkeypatch.setattr(own, "forward", space["axolotl_attn_forward"])
    assert layout_support.unsupported(with_lora_kernels) == (
        "the source of LlamaAttention.forward cannot be read (probably replaced at run time): set "
        "Axolotl's lora_qkv_kernel and lora_o_kernel to false (layer 0)"
    )


# Attention that asks for its implementation.


@pytest.mark.parametrize(
    ("implementation", "upcast", "refused"),
    [("eager", True, True), ("eager", False, False), ("sdpa", True, False), ("orpo_eager", True, True)],
)
def test_gpt2_keeps_its_fp32_scores(implementation, upcast, refused):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64}
    config = GPT2Config(**sizes, reorder_and_upcast_attn=upcast)
    made = GPT2LMHeadModel._from_config(config, attn_implementation=implementation.removeprefix("orpo_")).eval()
    if implementation.startswith("orpo_"):
        attention.prepare(made)
    reason = "GPT2Attention has reorder_and_upcast_attn, whose fp32 scores no attention function computes"
    assert layout_support.unsupported(made) == (reason if refused else None)
    if not refused:
        assert_equal_to_padded(made)


# One batch, used twice.


def test_a_batch_that_was_looked_at_in_inference_mode_can_be_trained_on():
    made, given = model("Mistral", sliding_window=5), batch("shared")
    with torch.inference_mode():
        before = orpo_forward(made, given, kernel="reference").loss.item()
    loss = orpo_forward(made, given, kernel="reference").loss
    loss.backward()
    assert loss.item() == before


# Trainers.


def convolutional(**changes):
    return tiny.model("Lfm2", layer_types=["conv", "full_attention"], **changes)


def test_the_trainer_says_and_takes_the_layout_of_a_collator_of_ones_own(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        own = ORPOCollator(tiny.tokenizer(), layout="shared", nll_over="completion")
        made = trainer(tmp_path, layout="auto", data_collator=own)
    assert "layout=shared, nll_over=completion" in caplog.text
    assert attention.is_prepared(made.model)
    made.train()
    with pytest.raises(errors.ConfigError, match="layout='padded' in the arguments, and data_collator has .* 'shared'"):
        trainer(tmp_path, layout="padded", data_collator=own)


def test_the_trainer_refuses_a_collator_whose_layout_the_model_cannot_run(tmp_path):
    with pytest.raises(errors.ConfigError, match=rf"data_collator has the layout 'shared', .*{CONV_REASON}"):
        trainer(tmp_path, model=convolutional(), data_collator=ORPOCollator(tiny.tokenizer(), layout="shared"))


@pytest.mark.parametrize("call", ["train", "evaluate"])
def test_a_stock_trainer_with_the_fused_head_stops_before_its_first_step(tmp_path, call):
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    rows = Dataset.from_list(tiny.rows(4))
    arguments = TrainingArguments(
        output_dir=str(tmp_path), report_to="none", use_cpu=True, remove_unused_columns=False, disable_tqdm=True
    )
    made = Trainer(
        model=convolutional(),
        args=arguments,
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=ORPOCollator(tiny.tokenizer(), layout="shared"),
        compute_loss_func=ORPOLoss(beta=0.2),
    )
    with pytest.raises(errors.ModelError, match=rf"Lfm2ForCausalLM cannot run .*{CONV_REASON}.* layout='padded'"):
        getattr(fuse_head(made), call)()
