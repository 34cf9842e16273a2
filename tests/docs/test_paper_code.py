"""The paper's code restated: its quirks are what docs/how-to/migrate.md says; and the presets."""

import pytest
import torch

from orpo_plugins import ORPOConfig, orpo_loss
from orpo_plugins.errors import ConfigError
from orpo_plugins.presets import PRESETS, preset
from tests.kit import ROOT
from tests.kit.compare import assert_within

EOS = PAD = 2
PROMPT = [5, 6, 7]
ANSWERS = {"chosen": [8, 9, 10, EOS], "rejected": [11, EOS]}
WIDTH = 9
VOCABULARY = 16


def padded(tokens: list[int], fill: int) -> torch.Tensor:
    return torch.tensor(tokens + [fill] * (WIDTH - len(tokens)))


def log_probabilities(name: str) -> torch.Tensor:
    """[WIDTH, VOCABULARY], the same at each call."""
    generator = torch.Generator().manual_seed(len(name))
    return torch.randn(WIDTH, VOCABULARY, generator=generator, dtype=torch.float64).log_softmax(-1)


def predicted(name: str, positions: list[int]) -> torch.Tensor:
    """Log-probability of the token at each of `positions`."""
    tokens = padded(PROMPT + ANSWERS[name], PAD)
    return torch.stack([log_probabilities(name)[t - 1, tokens[t]] for t in positions])


def mask_of_the_paper(name: str) -> torch.Tensor:
    whole = padded([1] * (len(PROMPT) + len(ANSWERS[name])), 0)
    return whole[:-1] - padded([1] * len(PROMPT), 0)[1:]


@pytest.mark.parametrize("name", ANSWERS)
def test_its_mask_holds_the_answer_and_one_token_of_padding(name: str) -> None:
    end = len(PROMPT) + len(ANSWERS[name])
    targets = [t + 1 for t in mask_of_the_paper(name).nonzero().flatten().tolist()]
    assert targets == [*range(len(PROMPT), end), end]
    assert padded(PROMPT + ANSWERS[name], PAD)[end] == PAD


def test_its_nll_leaves_out_the_end_of_the_answer() -> None:
    labels = padded(PROMPT + ANSWERS["chosen"], PAD)
    labels[labels == PAD] = -100
    assert labels[len(PROMPT) + len(ANSWERS["chosen"]) - 1] == -100
    assert (labels != -100).sum() == len(PROMPT) + len(ANSWERS["chosen"]) - 1


def test_without_both_it_is_our_loss() -> None:
    ends = {name: len(PROMPT) + len(answer) for name, answer in ANSWERS.items()}
    means = {name: predicted(name, [*range(len(PROMPT), end)]).mean() for name, end in ends.items()}
    nll = -predicted("chosen", [*range(1, ends["chosen"])]).mean()
    odds = {name: torch.exp(mean) / (1 - torch.exp(mean)) for name, mean in means.items()}
    expected = nll - 0.25 * torch.log(torch.sigmoid(torch.log(odds["chosen"] / odds["rejected"])))
    found = orpo_loss(means["chosen"].reshape(1), means["rejected"].reshape(1), nll, beta=0.25).loss
    assert_within(found, expected, 1e-6, "loss")
    longer = predicted("chosen", [*range(len(PROMPT), ends["chosen"] + 1)]).mean()
    assert abs(longer - means["chosen"]) > 0.1


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_makes_a_config_and_stands_in_the_document(name: str, tmp_path: object) -> None:
    arguments = preset(name)
    config = ORPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", **arguments)
    assert {key: getattr(config, key) for key in ("beta", "learning_rate")} == {
        key: arguments[key] for key in ("beta", "learning_rate")
    }
    assert PRESETS[name].source
    table = (ROOT / "docs" / "how-to" / "migrate.md").read_text()
    assert f"| `{name}` | {config.beta} | {config.learning_rate} |" in table


def test_a_preset_may_be_changed_without_changing_it_for_others() -> None:
    preset("mistral-orpo-beta")["beta"] = 7.0
    assert preset("mistral-orpo-beta")["beta"] == 0.1


def test_an_unknown_preset_is_named_with_those_known() -> None:
    with pytest.raises(ConfigError, match=r"unknown preset 'mistral-orpo'; known: .*did you mean 'mistral-orpo-"):
        preset("mistral-orpo")
