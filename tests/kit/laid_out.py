"""Pairs of ids, models that take any layout, and one step of a model in a layout."""

import random

import torch

from orpo_plugins.forward import orpo_forward
from orpo_plugins.hooks import plugins
from orpo_plugins.hooks.types import Pair, TokenSequence
from orpo_plugins.layouts.shared import Shared
from orpo_plugins.layouts.spans import SPANS, Spans
from tests.kit.compare import assert_all_within, assert_within


def sequence(prompt: list[int], answer: list[int]) -> TokenSequence:
    return TokenSequence(input_ids=prompt + answer, labels=[-100] * len(prompt) + answer)


def pair(prompt: list[int], chosen: list[int], rejected: list[int]) -> Pair:
    return Pair(chosen=sequence(prompt, chosen), rejected=sequence(prompt, rejected))


VOCABULARY = 61


def random_pairs(lengths=((9, 5, 8), (2, 12, 1), (14, 4, 6))):
    generator = random.Random(0)

    def tokens(count):
        return [generator.randrange(3, VOCABULARY) for _ in range(count)]

    return [pair(*(tokens(count) for count in each)) for each in lengths]


def model(kind="Llama", implementation="sdpa", **changes):
    import transformers

    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **changes})
    made = getattr(transformers, f"{kind}ForCausalLM")._from_config(config, attn_implementation=implementation)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.25)
    return made.float()


def step(made, layout, pairs=None, **options):
    """(loss, gradients of what is trained) of one step."""
    chosen = plugins.layout(layout)
    assert chosen.unsupported(made) is None
    if layout != "padded":
        chosen.prepare(made)
    made.zero_grad()
    batch = chosen.collate(pairs or random_pairs(), pad_token_id=0, nll_over="sequence")
    loss = orpo_forward(made, batch, kernel="reference", **options).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}


def assert_equal_to_padded(made, layouts=("packed", "shared"), pairs=None):
    """The acceptance figures: fp32, loss within 1e-6, every gradient within 1e-5 relative."""
    expected_loss, expected = step(made, "padded", pairs)
    for layout in layouts:
        loss, found = step(made, layout, pairs)
        assert_within(loss, expected_loss, 1e-6, "loss")
        assert_all_within(found, expected, 1e-5)


class WithoutContext(Shared):
    """*shared* with the rejected answers cut off from their prompts."""

    name = "wrong"

    def collate(self, pairs, **options):
        batch = super().collate(pairs, **options)
        return {**batch, SPANS: Spans(spans=tuple(span._replace(context_length=0) for span in batch[SPANS].spans))}
