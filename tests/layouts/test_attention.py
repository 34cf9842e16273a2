"""The span attention against one softmax per row, and inside models: windows, soft-caps, sinks, checkpointing."""

import functools
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from transformers import modeling_flash_attention_utils

from orpo_plugins.errors import ModelError
from orpo_plugins.forward import orpo_forward
from orpo_plugins.hooks import plugins
from orpo_plugins.hooks.types import Pair, TokenSequence
from orpo_plugins.layouts import attention
from orpo_plugins.layouts import support as layout_support
from orpo_plugins.layouts.auto import best_layout
from orpo_plugins.layouts.spans import Span, Spans
from orpo_plugins.models.router import router_coefficient
from tests.kit.compare import assert_all_within, assert_within
from tests.kit.laid_out import VOCABULARY, assert_equal_to_padded, model, random_pairs, step

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"  # peft 0.21 asks transformers 5.23 for it
)
SPANS = (Span(0, 9, 0, 0), Span(9, 5, 0, 4), Span(14, 1, 0, 0), Span(15, 6, 14, 1), Span(21, 3, 0, 0))
LAYOUTS = ("padded", "packed", "shared")


def one_row_at_a_time(query, key, value, *, spans=SPANS, window=None, softcap=None, sinks=None, scale=None):
    """The definition: each row's softmax over what it sees."""
    groups = query.shape[1] // key.shape[1]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    out = torch.zeros(1, query.shape[2], query.shape[1], value.shape[-1], dtype=query.dtype)
    for span in spans:
        for row in range(span.start, span.start + span.length):
            seen = [*range(span.context_start, span.context_start + span.context_length), *range(span.start, row + 1)]
            seen = seen if window is None else seen[-window:]
            for head in range(query.shape[1]):
                scores = key[0, head, seen] @ query[0, head, row] * scale
                scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
                if sinks is not None:
                    scores = torch.cat([scores, sinks[head : head + 1]])
                out[0, row, head] = scores.softmax(-1)[: len(seen)] @ value[0, head, seen]
    return out


def qkv(dtype=torch.float64, heads=4, groups=2, rows=24):
    torch.manual_seed(0)
    return [torch.randn(1, h, rows, 8, dtype=dtype) for h in (heads, groups, groups)]


@pytest.mark.parametrize("window", [None, 1, 2, 3, 5, 100])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_spans_are_one_softmax_per_row(window, groups):
    query, key, value = qkv(groups=groups)
    found = attention.attend(query, key, value, Spans(spans=SPANS), window=window)
    assert_within(found, one_row_at_a_time(query, key, value, window=window), 1e-12)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("options", [{"softcap": 2.0}, {"sinks": True}, {"softcap": 2.0, "sinks": True, "scale": 0.7}])
def test_soft_capped_scores_and_sinks(options, window):
    query, key, value = qkv()
    if "sinks" in options:
        options = {**options, "sinks": torch.randn(4, dtype=torch.float64)}
    found = attention.attend(query, key, value, Spans(spans=SPANS), window=window, **options)
    assert_within(found, one_row_at_a_time(query, key, value, window=window, **options), 1e-12)


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}])
@pytest.mark.parametrize("window", [None, 5, 64, 100])
def test_a_span_of_several_calls_is_one_softmax_per_row(options, window):
    spans = (Span(0, 150, 0, 0), Span(150, 80, 0, 100), Span(230, 64, 0, 0))
    tensors = [x.requires_grad_() for x in qkv(groups=2, rows=294)]
    found = attention.attend(*tensors, Spans(spans=spans), window=window, **options)
    expected = one_row_at_a_time(*tensors, spans=spans, window=window, **options)
    assert_within(found, expected, 1e-12)
    weights = torch.randn_like(found)
    gradients = torch.autograd.grad((found * weights).sum(), tensors)
    for gradient, other in zip(gradients, torch.autograd.grad((expected * weights).sum(), tensors), strict=True):
        assert_within(gradient, other, 1e-11)


def test_long_spans_in_calls_of_512_rows_are_those_of_one_call(monkeypatch):
    spans = (Span(0, 1100, 0, 0), Span(1100, 30, 0, 1000))
    tensors = qkv(heads=2, groups=1, rows=1130)
    for options in ({}, {"window": 300}, {"softcap": 2.0}):
        found = attention.attend(*tensors, Spans(spans=spans), **options)
        with monkeypatch.context() as patch:
            patch.setattr(attention, "_block_size", lambda length, *_: length)
            assert_within(found, attention.attend(*tensors, Spans(spans=spans), **options), 1e-12)


def test_the_softmax_with_sinks_is_in_fp32_for_bf16_inputs():
    query, key, value = qkv()
    sinks = torch.randn(4, dtype=torch.float64)
    low = [x.bfloat16() for x in (query, key, value, sinks)]
    found = attention.attend(*low[:3], Spans(spans=SPANS), sinks=low[3])
    assert found.dtype == torch.bfloat16
    assert_within(found, one_row_at_a_time(*(x.double() for x in low[:3]), sinks=low[3].double()), 1e-2)


def test_dropout_keeps_the_mean():
    query, key, value = qkv(dtype=torch.float32)
    torch.manual_seed(1)
    runs = [attention.attend(query, key, value, Spans(spans=SPANS), dropout=0.2) for _ in range(600)]
    assert not torch.equal(runs[0], runs[1])
    assert_within(torch.stack(runs).mean(0), attention.attend(query, key, value, Spans(spans=SPANS)), 0.05)


def varlen_by_definition(
    query, key, value, queries, keys, longest_query, longest_key, *, scale=None, left=-1, softcap=0.0
):
    """What flash attention promises: [T, heads, d], causal from the end of both lengths."""
    assert longest_query == int(queries.diff().max())
    assert longest_key == int(keys.diff().max())
    assert queries.dtype == keys.dtype == torch.int32
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    parts = []
    for q0, q1, k0, k1 in zip(queries[:-1], queries[1:], keys[:-1], keys[1:], strict=True):
        distance = torch.arange(k1 - k0 - (q1 - q0), k1 - k0)[:, None] - torch.arange(k1 - k0)[None]
        seen = (distance >= 0) & (distance <= (10**9 if left < 0 else left))
        q, k, v = (x.transpose(0, 1) for x in (query[q0:q1], key[k0:k1], value[k0:k1]))
        k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
        scores = q @ k.mT * scale
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        parts.append((scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("window", [None, 3])
def test_one_variable_length_call_gets_the_right_lengths_and_keys(monkeypatch, window):
    inputs = [x.requires_grad_() for x in qkv()]
    expected = attention.attend(*inputs, Spans(spans=SPANS), window=window)
    gradients = torch.autograd.grad(expected.square().sum(), inputs)
    varlen = functools.partial(varlen_by_definition, left=-1 if window is None else window - 1)
    monkeypatch.setattr(attention, "_varlen", lambda *_: varlen)
    found = attention.attend(*inputs, Spans(spans=SPANS), window=window)
    assert_within(found, expected, 1e-12)
    for one, other in zip(torch.autograd.grad(found.square().sum(), inputs), gradients, strict=True):
        assert_within(one, other, 1e-12)


# The signatures of every version, computed by definition.


def torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    assert is_causal
    assert query.shape[1] == key.shape[1]
    return varlen_by_definition(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)


def torch_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    assert window_size[1] == 0
    assert query.shape[1] == key.shape[1]
    left = window_size[0]
    return varlen_by_definition(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, left=left)


def torch_2_12(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    seqused_k=None,
    block_table=None,
    num_splits=None,
):
    assert window_size[1] == 0
    assert enable_gqa or query.shape[1] == key.shape[1]
    left = window_size[0]
    return varlen_by_definition(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, left=left)


def flash_attn_2(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    assert causal
    assert not (dropout_p and softcap)  # "Softcapping does not support dropout for now"
    options = {"scale": softmax_scale, "left": window_size[0], "softcap": softcap}
    return varlen_by_definition(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options)


def flash_attn_3(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    seqused_q=None,
    seqused_k=None,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_attn_probs=False,
):
    assert causal
    options = {"scale": softmax_scale, "left": window_size[0], "softcap": softcap}
    return varlen_by_definition(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options)


def flash_attn_4(
    q,
    k,
    v,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    seqused_q=None,
    seqused_k=None,
    page_table=None,
    softmax_scale=None,
    causal=False,
    window_size=(None, None),
    learnable_sink=None,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    score_mod=None,
    mask_mod=None,
    block_sparse_tensors=None,
    cu_total_m_blocks=None,
    cu_total_n_blocks=None,
    aux_tensors=None,
    return_lse=False,
):
    assert causal
    assert not softcap
    options = {"scale": softmax_scale, "left": -1 if window_size[0] is None else window_size[0]}
    out = varlen_by_definition(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options)
    return out, None


def on_a_gpu(monkeypatch, *, own=None, flash_attn=None, chosen=None):
    """A device with these functions for variable lengths; returns the list of those that are called."""
    calls = []

    def counted(function):
        @functools.wraps(function)  # keeps the signature
        def call(*args, **kwargs):
            calls.append(function)
            return function(*args, **kwargs)

        return function and call

    modules = {"torch.nn.attention.varlen": counted(own), "flash_attn": counted(flash_attn)}
    monkeypatch.setattr(attention, "_runs_flash_attention", lambda device: True)
    monkeypatch.setattr(attention, "_import", lambda module, name: modules[module])
    if chosen is not None:
        place = {flash_attn_3: "flash_attn_interface", flash_attn_4: "flash_attn.cute"}[chosen]
        functions = dict.fromkeys(("flash_attn_func", "flash_attn_with_kvcache"))
        for name in {place, place.partition(".")[0]}:
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        vars(sys.modules[place]).update(functions, flash_attn_varlen_func=counted(chosen))
        monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)
    return calls


def in_bf16(**options):
    """Attention and gradients in bf16, beside the definition of the same numbers in fp64."""
    implementation = {"implementation": options.pop("implementation")} if "implementation" in options else {}
    inputs = [x.bfloat16().requires_grad_() for x in qkv(groups=options.pop("groups", 2))]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    found = attention.attend(*inputs, Spans(spans=SPANS), **implementation, **options)
    expected = one_row_at_a_time(*wide, **options)
    assert_within(found, expected, 2e-2)
    found_gradients = torch.autograd.grad(found.double().square().sum(), inputs)
    for one, other in zip(found_gradients, torch.autograd.grad(expected.square().sum(), wide), strict=True):
        assert_within(one, other, 0.1)


@pytest.mark.parametrize(
    "options", [{}, {"scale": 8**-0.5}, {"groups": 4}, {"window": 3}, {"scale": 0.7}, {"window": 3, "scale": 0.7}]
)
@pytest.mark.parametrize("version", [torch_2_10, torch_2_11, torch_2_12])
def test_every_version_of_torchs_function_is_called_with_what_it_has(monkeypatch, version, options):
    calls = on_a_gpu(monkeypatch, own=version)
    in_bf16(**options)
    missing = version is torch_2_10 and ("window" in options or options.get("scale") == 0.7)
    assert calls == ([] if missing else [version])


def test_the_installed_torch_has_a_function_that_takes_everything():
    varlen = pytest.importorskip("torch.nn.attention.varlen", reason="torch has had it since 2.10")
    settings = attention._VarlenOptions(scale=0.7, dropout=0.0, window=3, softcap=None)
    call = attention.torch_varlen(varlen.varlen_attn, 8, settings, grouped=True)
    assert call.keywords == {"scale": 0.7, "window_size": (2, 0), "enable_gqa": True}


@pytest.mark.parametrize("version", [torch_2_10, torch_2_11])
def test_flash_attn_comes_before_a_function_that_needs_repeated_heads(monkeypatch, version):
    calls = on_a_gpu(monkeypatch, own=version, flash_attn=flash_attn_2)
    in_bf16()
    in_bf16(groups=4)
    assert calls == [flash_attn_2, version]


@pytest.mark.parametrize(
    ("options", "called"),
    [
        ({}, torch_2_12),
        ({"softcap": 2.0}, flash_attn_2),
        ({"softcap": 2.0, "window": 3, "scale": 0.7}, flash_attn_2),
    ],
)
def test_soft_capped_scores_take_flash_attn(monkeypatch, options, called):
    calls = on_a_gpu(monkeypatch, own=torch_2_12, flash_attn=flash_attn_2)
    in_bf16(**options)
    assert calls == [called]


def test_soft_capped_scores_without_flash_attn_are_written_out(monkeypatch):
    calls = on_a_gpu(monkeypatch, own=torch_2_12)
    in_bf16(softcap=2.0)
    assert calls == []


@pytest.mark.parametrize("options", [{}, {"dropout": 0.1, "softcap": 2.0}, {"dropout": 0.1}])
def test_attention_dropout_takes_flash_attn(monkeypatch, options):
    calls = on_a_gpu(monkeypatch, own=torch_2_12, flash_attn=flash_attn_2)
    attention.attend(*(x.bfloat16() for x in qkv()), Spans(spans=SPANS), **options)
    assert calls == {0: [torch_2_12], 1: [flash_attn_2], 2: []}[len(options)]


@pytest.mark.parametrize("options", [{}, {"window": 3}, {"scale": 0.7, "groups": 4}, {"softcap": 2.0}])
@pytest.mark.parametrize("chosen", [flash_attn_3, flash_attn_4])
def test_the_flash_attention_that_the_user_chose_comes_first(monkeypatch, chosen, options):
    calls = on_a_gpu(monkeypatch, own=torch_2_12, chosen=chosen)
    in_bf16(**options, implementation=f"flash_attention_{chosen.__name__[-1]}")
    assert calls == ([] if "softcap" in options and chosen is flash_attn_4 else [chosen])


def test_spans_that_stand_alone_need_no_gathering():
    alone = Spans(spans=(Span(0, 4, 0, 0), Span(4, 2, 0, 0)))
    assert attention._offsets(alone, torch.device("cpu")).gathered_keys is None


def test_masks_are_made_once_per_batch():
    spans = Spans(spans=SPANS)
    query, key, value = qkv()
    attention.attend(query, key, value, spans)
    made = dict(spans.cache)
    attention.attend(query, key, value, spans)
    assert len(made) == 2
    assert all(spans.cache[name] is mask for name, mask in made.items())


def test_a_cache_or_virtual_tokens_are_refused():
    query, key, value = qkv()
    with pytest.raises(ModelError, match="layout='padded'"):
        attention.attend(query, torch.cat([key, key], 2), torch.cat([value, value], 2), Spans(spans=SPANS))


def test_llama_with_grouped_heads():
    assert_equal_to_padded(model())


@pytest.mark.parametrize("window", [3, 6, 64])
def test_mistral_with_a_sliding_window(window):
    assert_equal_to_padded(model("Mistral", sliding_window=window))


def test_gemma2_with_soft_capping_and_alternating_windows():
    assert_equal_to_padded(model("Gemma2", "eager", sliding_window=5, query_pre_attn_scalar=8))


def test_gemma2_with_sdpa_is_refused_since_sdpa_does_not_soft_cap():
    made = model("Gemma2", "eager")
    made.config._attn_implementation = "sdpa"  # transformers 5.16 loads it so by default, 5.23 refuses
    reason = layout_support.unsupported(made)
    assert reason == "its attention is soft-capped, which 'sdpa' leaves out: load it with attn_implementation='eager'"


def test_an_eager_model_stays_exact():
    assert_equal_to_padded(model("Qwen3", "eager"))


def test_answers_that_begin_alike_and_prompts_that_differ():
    first, second, third = random_pairs()
    beginning = TokenSequence(input_ids=first.chosen.input_ids[:-2], labels=first.chosen.labels[:-2])
    alike = Pair(chosen=first.chosen, rejected=beginning)
    differing = Pair(chosen=second.chosen, rejected=third.rejected)
    assert_equal_to_padded(model(), pairs=[alike, differing])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_runs_the_same_attention_again(use_reentrant):
    made = model("Mistral", sliding_window=5).train()
    _, expected = step(made, "padded")
    made.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    made.enable_input_require_grads()
    for layout in ("packed", "shared"):
        assert_all_within(step(made, layout)[1], expected, 1e-5)


def test_lora():
    from peft import LoraConfig, get_peft_model

    made = get_peft_model(model(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    assert_equal_to_padded(made)


def test_qlora(tmp_path):
    pytest.importorskip("bitsandbytes", reason="4-bit weights need bitsandbytes")
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    model(hidden_size=64).save_pretrained(tmp_path)
    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    made = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=four_bit, dtype=torch.float32)
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    assert_equal_to_padded(get_peft_model(prepare_model_for_kbit_training(made), adapter))


def test_prompt_learning_is_refused():
    from peft import PromptTuningConfig, TaskType, get_peft_model

    made = get_peft_model(model(), PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3))
    assert layout_support.unsupported(made) == "the prompt tuning adapter puts virtual tokens before every sequence"
    assert best_layout("auto", made)[0].name == "padded"


def test_auto_takes_shared_where_the_model_allows_it():
    layout, passed_over = best_layout("auto", model())
    assert (layout.name, passed_over) == ("shared", {})


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_prepared_model_answers_others_as_before(implementation):
    made = model("Mistral", implementation, sliding_window=5).eval()
    inputs = torch.randint(3, VOCABULARY, (2, 12))
    padding = torch.ones_like(inputs)
    padding[0, :4] = 0
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    calls = [
        lambda: made(inputs, attention_mask=padding).logits,
        lambda: made(inputs[:1]).logits,
        lambda: made.generate(inputs, attention_mask=padding, **settings),
    ]
    with torch.no_grad():
        expected = [call() for call in calls]
        attention.prepare(made)
        for call, one in zip(calls, expected, strict=True):
            assert torch.equal(call(), one)


def test_an_eager_layer_whose_class_was_replaced_by_a_subclass_is_still_found():
    made = model("Llama", "eager").eval()
    inputs = torch.arange(3, 15)[None]
    with torch.no_grad():
        expected = made(inputs).logits
        attention.prepare(made)
        for layer in made.model.layers:  # as fully_shard does it
            layer.self_attn.__class__ = type("Sharded", (type(layer.self_attn),), {"__module__": __name__})
        assert torch.equal(made(inputs).logits, expected)


def test_preparing_twice_changes_nothing_and_nothing_of_it_is_saved(tmp_path):
    made = model()
    attention.prepare(made)
    attention.prepare(made)
    assert made.config._attn_implementation == "orpo_sdpa"
    made.config.save_pretrained(tmp_path)
    assert "orpo" not in (tmp_path / "config.json").read_text()


def test_a_layer_that_drops_the_keyword_fails_loudly():
    made = model()

    def drop(module, args, kwargs):  # a hook, since the source of a forward would be read beforehand
        return args, {name: value for name, value in kwargs.items() if name != "orpo_spans"}

    made.model.layers[1].self_attn.register_forward_pre_hook(drop, with_kwargs=True)
    with pytest.raises(ModelError, match="LlamaAttention did not get the keyword 'orpo_spans'"):
        step(made, "shared")


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("Llama", {"attn_implementation": "flex_attention"}, None),
        ("Bloom", {}, "BloomForCausalLM takes no position_ids"),
        ("Falcon", {}, "FalconAttention does not go through transformers' AttentionInterface (layer 0)"),
        ("Mamba", {}, "MambaForCausalLM takes no position_ids"),
        (
            "Qwen3Next",
            {"layer_types": ["linear_attention"] * 2},
            "its linear attention layers are not softmax attention",
        ),
        ("StableLm", {}, "StableLmDecoderLayer does not pass keyword arguments on to its attention"),
        ("Phimoe", {"sliding_window": 4}, "PhimoeAttention has a sliding window only in its mask"),
        ("Qwen2Moe", {"use_sliding_window": True, "max_window_layers": 2}, "Qwen2MoeAttention has a sliding window"),
    ],
)
def test_reasons_against_a_model(kind, changes, reason):
    import transformers

    config = getattr(transformers, f"{kind}Config")(num_hidden_layers=2, **changes)
    with torch.device("meta"):
        made = getattr(transformers, f"{kind}ForCausalLM")(config)
    found = layout_support.unsupported(made)
    assert (found is None) if reason is None else found.startswith(reason)


def test_an_unknown_attention_implementation_keeps_its_meaning():
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register("mine", sdpa_attention_forward)
    assert layout_support.unsupported(model(implementation="mine")).startswith(
        "its attention implementation 'mine' may not compute softmax attention"
    )


def test_other_modules_are_refused():
    assert layout_support.unsupported(torch.nn.Linear(2, 2)) == (
        "Linear is no transformers model, so its attention function cannot be replaced"
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo, looking at inputs
@pytest.mark.parametrize("kernel", ["reference", "chunked"])
def test_a_compiled_model_stays_exact_and_does_not_compile_for_every_batch(kernel):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    made = model(num_hidden_layers=1)
    layout = plugins.layout("shared")
    layout.prepare(made)
    compiled = torch.compile(made, backend="eager")
    frames = []
    for changed in range(4):
        batch = layout.collate(random_pairs(((9 + changed, 5, 8), (2, 12, 3))), pad_token_id=0, nll_over="sequence")
        loss, expected = (orpo_forward(one, batch, kernel=kernel).loss for one in (compiled, made))
        assert_within(loss, expected, 1e-6)
        frames.append(counters["frames"]["total"])
    assert frames[1] == frames[-1]


def test_a_routers_auxiliary_loss_is_that_of_padded_when_packed_and_near_it_when_shared():
    """*shared* counts a prompt's tokens once: documented, with this size of difference."""
    made = model("Mixtral", num_local_experts=4, output_router_logits=True).eval()
    batches = {n: plugins.layout(n).collate(random_pairs(), pad_token_id=0, nll_over="sequence") for n in LAYOUTS}
    found = {name: orpo_forward(made, batch).metrics["aux_loss"] for name, batch in batches.items()}
    assert_within(found["packed"], found["padded"], 1e-6)
    assert_within(found["shared"], found["padded"], 1e-2)


def test_a_routers_loss_weighs_what_the_model_says():
    made = model("Mixtral", num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.5).eval()
    batch = plugins.layout("padded").collate(random_pairs(), pad_token_id=0, nll_over="sequence")
    found = orpo_forward(made, batch)
    made.config.output_router_logits = False
    assert_within(found.loss - orpo_forward(made, batch).loss, 0.5 * found.metrics["aux_loss"], 1e-4)


def test_the_weight_of_a_routers_loss_is_found_wherever_a_model_has_it():
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    assert router_coefficient(model("JetMoe", aux_loss_coef=0.5, **experts)) == 0.5
    with_images = model()
    with_images.config.get_text_config = lambda: SimpleNamespace(router_aux_loss_coef=0.25)
    assert router_coefficient(with_images) == 0.25
    as_dbrx_has_it = model()
    as_dbrx_has_it.router_aux_loss_coef = 0.125
    assert router_coefficient(as_dbrx_has_it) == 0.125
    with pytest.raises(ModelError, match="router_aux_loss_coef"):
        router_coefficient(model())


def test_routers_whose_loss_the_model_does_not_return_are_refused():
    dense = model()
    dense.config.output_router_logits = True
    batch = plugins.layout("padded").collate(random_pairs(), pad_token_id=0, nll_over="sequence")
    with pytest.raises(ModelError, match="returns no aux_loss"):
        orpo_forward(dense, batch)
