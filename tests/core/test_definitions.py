"""The loss is what its options say, against the definitions written out from full logits."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orpo_plugins import ORPOCollator, orpo_forward
from tests.kit import tiny
from tests.kit.compare import assert_all_within, assert_within

KERNELS = ("reference", "chunked")
LAYOUTS = ("padded", "packed", "shared")


def batch(count: int = 4, **options: Any) -> dict[str, Any]:
    return ORPOCollator(tiny.tokenizer(), max_length=512, layout="padded", **options)(tiny.rows(count))


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def answer_logps(model: nn.Module, rows: list[dict[str, str]], side: str) -> list[tuple[Tensor, Tensor]]:
    """For each row, one sequence at a time: (log-probabilities of the prompt's tokens, those of the answer's)."""
    tokenizer = tiny.tokenizer()
    results = []
    for row in rows:
        prompt = [tokenizer.bos_token_id, *tokenizer(row["prompt"]).input_ids]
        ids = [tokenizer.bos_token_id, *tokenizer(row["prompt"] + row[side]).input_ids, tokenizer.eos_token_id]
        logps = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        taken = logps.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
        results.append((taken[: len(prompt) - 1], taken[len(prompt) - 1 :]))
    return results


def odds_ratio(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log sigmoid of the log odds ratio of two mean log-probabilities, in fp64 from the definition."""
    chosen, rejected = chosen.double().exp(), rejected.double().exp()
    return -F.logsigmoid((chosen / (1 - chosen)).log() - (rejected / (1 - rejected)).log())


@pytest.mark.parametrize("kernel", KERNELS)
def test_completion_and_pair_are_the_definition_of_llama_factory(kernel: str) -> None:
    """The mean over the answer's tokens per chosen answer, then over pairs; beta times the mean odds-ratio term."""
    model, beta = tiny.model(), 0.3
    chosen, rejected = (answer_logps(model, tiny.rows(4), side) for side in ("chosen", "rejected"))
    nll = torch.stack([-answer.mean() for _, answer in chosen]).mean()
    ratios = [odds_ratio(c.mean(), r.mean()) for (_, c), (_, r) in zip(chosen, rejected, strict=True)]
    expected = nll + beta * torch.stack(ratios).mean()
    expected_gradients = gradients(expected, model)

    out = orpo_forward(model, batch(nll_over="completion"), beta=beta, nll_normalization="pair", kernel=kernel)
    assert_within(out.loss.double(), expected, 1e-6, "loss")
    assert_all_within(gradients(out.loss, model), expected_gradients, 1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_sequence_and_token_mean_are_the_definition_of_the_paper(kernel: str) -> None:
    """The mean NLL over all tokens of the chosen sequences, prompts included."""
    model, beta = tiny.model(), 0.3
    chosen, rejected = (answer_logps(model, tiny.rows(4), side) for side in ("chosen", "rejected"))
    nll = -torch.cat([torch.cat(parts) for parts in chosen]).mean()
    ratios = [odds_ratio(c.mean(), r.mean()) for (_, c), (_, r) in zip(chosen, rejected, strict=True)]
    expected = nll + beta * torch.stack(ratios).mean()
    expected_gradients = gradients(expected, model)

    out = orpo_forward(model, batch(), beta=beta, kernel=kernel)
    assert_within(out.loss.double(), expected, 1e-6, "loss")
    assert_within(out.nll_loss.double(), nll.detach().double(), 1e-6, "nll_loss")
    assert_all_within(gradients(out.loss, model), expected_gradients, 1e-5)


@pytest.mark.parametrize("normalization", ["batch", "pair"])
@pytest.mark.parametrize("nll_over", ["sequence", "completion"])
def test_the_chunked_kernel_is_the_reference(nll_over: str, normalization: str) -> None:
    model = tiny.model()
    inputs = batch(6, nll_over=nll_over)
    results = {}
    for kernel in KERNELS:
        out = orpo_forward(model, inputs, kernel=kernel, nll_normalization=normalization, odds_temperature=1.5)
        results[kernel] = {
            "loss": out.loss.detach(),
            "nll": out.nll_loss,
            "chosen": out.chosen_logps,
            "rejected": out.rejected_logps,
            **gradients(out.loss, model),
        }
    assert_all_within(results["chunked"], results["reference"], 1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_has_the_same_loss_and_gradients(layout: str) -> None:
    model = tiny.model()
    expected = orpo_forward(model, batch(6))
    expected_gradients = gradients(expected.loss, model)
    from orpo_plugins.layouts.auto import best_layout

    best_layout(layout, model)[0].prepare(model)
    out = orpo_forward(model, ORPOCollator(tiny.tokenizer(), max_length=512, layout=layout)(tiny.rows(6)))
    assert_within(out.loss.detach(), expected.loss.detach(), 1e-6, "loss")
    assert_all_within(gradients(out.loss, model), expected_gradients, 1e-5)
