"""`step_totals`: a step of one's own loop does not depend on how it is cut; and evaluation with terms of plugins."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from orpo_plugins import ORPOCollator, hooks, orpo_forward, step_totals
from orpo_plugins.errors import ConfigError
from tests.kit import ROOT, tiny
from tests.kit.compare import assert_within
from tests.kit.training import logged, trainer

ROWS = tiny.skewed_rows(8)
DOCUMENT = (ROOT / "docs" / "start" / "loop.md").read_text()


def gradients(sizes: list[int], **options: Any) -> Tensor:
    model, collator, start = tiny.model(), ORPOCollator(tiny.tokenizer()), 0
    step = [collator(ROWS[(start := start + size) - size : start]) for size in sizes]
    totals = step_totals(step)
    for batch in step:
        orpo_forward(model, batch, totals=totals, **options).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("normalization", ["batch", "pair"])
@pytest.mark.parametrize("sizes", [[4, 4], [1, 7], [3, 2, 2, 1]])
def test_the_gradient_of_a_step_does_not_depend_on_its_micro_batches(normalization: str, sizes: list[int]) -> None:
    whole = gradients([8], nll_normalization=normalization)
    # Sums in another order, in fp32.
    assert_within(gradients(sizes, nll_normalization=normalization), whole, 1e-5)


def test_ranks_are_reduced_once() -> None:
    collator = ORPOCollator(tiny.tokenizer())
    step, other = [collator(ROWS[:3])], [collator(ROWS[3:])]
    given: list[Tensor] = []
    alone = step_totals(other, lambda counts: given.append(counts) or counts)  # type: ignore[func-returns-value]
    both = step_totals(step, lambda counts: (counts + given[0]) / 2)
    assert len(given) == 1
    assert float(both.num_pairs) == 4.0
    assert float(alone.num_pairs) == 5.0


def test_totals_and_single_denominators_are_one_option() -> None:
    batch = ORPOCollator(tiny.tokenizer())(ROWS)
    with pytest.raises(ConfigError, match="totals holds nll_tokens, num_pairs and num_examples: pass it alone"):
        orpo_forward(tiny.model(), batch, totals=step_totals([batch]), num_pairs=8)


def test_the_loop_of_the_document_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL) if "step_totals(step)" in b]
    monkeypatch.chdir(tmp_path)
    tiny.saved(tmp_path / "Qwen/Qwen2.5-0.5B-Instruct")
    exec(block, names := {"__name__": "the document"})
    trained, before = names["model"].parameters(), tiny.model().parameters()
    assert any(not torch.equal(old, new) for old, new in zip(before, trained, strict=True))


class Product:
    """A term that loses no digits, so that the sums can be compared."""

    @hooks.hookimpl
    def orpo_loss_terms(self) -> list[hooks.LossTerm]:
        return [hooks.LossTerm(name="product", compute=lambda pairs: pairs.chosen * pairs.rejected)]


@pytest.mark.parametrize("size", [1, 3, 8])
def test_the_evaluation_loss_has_the_terms_of_plugins_in_it(size: int, tmp_path: Path) -> None:
    manager = hooks.get_plugin_manager()
    manager.register(plugin := Product())
    try:
        options: dict[str, Any] = {"loss_terms": {"product": 0.7}, "per_device_eval_batch_size": size}
        made = trainer(tmp_path, rows=ROWS, eval_dataset=ROWS, max_steps=1, **options)
        found = made.evaluate()
        whole = orpo_forward(
            made.model.eval(), made.data_collator(list(made.eval_dataset)), loss_terms={"product": 0.7}
        )
        assert_within(found["eval_loss"], whole.loss.detach().item(), 1e-5)  # fp32, other shapes of tiles
        assert_within(found["eval_loss_terms/product"], whole.metrics["loss_terms/product"].mean().item(), 1e-5)
        made.train()
        assert logged(made, "loss_terms/product")
    finally:
        manager.unregister(plugin)
