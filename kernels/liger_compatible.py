"""liger-kernel's `LigerFusedLinearORPOLoss`, by one changed import."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orpo_plugins.hooks.types import HeadOptions, Objective
from orpo_plugins.kernels.linear import check_labels, check_shapes
from orpo_plugins.kernels.run import run_kernel
from orpo_plugins.objective import log_odds, odds_ratio_loss
from orpo_plugins.targets import Targets


class FusedLinearORPOLoss(nn.Module):
    """ORPO with the constructor, call and return values of liger-kernel 0.8.5's `LigerFusedLinearORPOLoss`.

        from orpo_plugins import FusedLinearORPOLoss as LigerFusedLinearORPOLoss

    The differences are those of the kernel beneath: ignored tokens cost nothing, `compiled` and `chunk_size` have no
    effect (nothing is compiled and tiles are cut by tokens and vocabulary), and a bad batch raises `BatchError` where
    liger-kernel returns NaN.

    Args:
        ignore_index: marks positions that predict nothing.
        beta: weight of the odds-ratio term.
        compute_nll_loss: whether the NLL of the chosen rows is part of the loss.
        compiled: accepted, without effect.
        chunk_size: accepted, without effect.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        chunk_size: int = 1,
    ) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.beta = beta
        self.compute_nll_loss = compute_nll_loss
        self.compiled = compiled
        self.chunk_size = chunk_size

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        nll_target: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss and its metrics.

        Args:
            lin_weight: [V, H].
            _input: [2B, T, H], chosen rows first.
            target: [2B, T], already shifted.
            bias: [V] or None.
            nll_target: [2B, T] or [B, T]; the NLL of the chosen rows is taken over its first B rows.

        Returns:
            (loss, (chosen_logps [B], rejected_logps [B], chosen_logits_mean, rejected_logits_mean, nll_loss,
            chosen_rewards [B], rejected_rewards [B], log_odds_ratio, log_odds_chosen)); what has no shape here is a
            scalar.  Logit means are over all B * T positions, ignored ones included.

        Raises:
            BatchError: shapes, dtypes or devices that do not fit together, a token outside 0..V-1, an empty answer.
        """
        pairs = target.shape[0] // 2
        nll_target = (target if nll_target is None else nll_target)[:pairs]
        names = ("_input", "lin_weight", "target", "nll_target")
        check_shapes(_input, lin_weight, target, nll_target, bias, names=names)
        targets = self._targets(target, nll_target)
        check_labels(targets, target.shape[1], lin_weight.shape[0])
        result = run_kernel(
            "auto", _input.flatten(0, 1), lin_weight, bias, targets, self._objective(targets), HeadOptions()
        )
        chosen, rejected = result.logps.view(2, -1)
        odds = log_odds(chosen, rejected)
        metrics = (
            chosen,
            rejected,
            *_logit_means(_input, lin_weight, bias),
            result.nll_loss,
            self.beta * chosen,
            self.beta * rejected,
            F.logsigmoid(odds).mean(),
            odds.mean(),
        )
        return result.loss, metrics

    def _objective(self, targets: Targets) -> Objective:
        in_nll = targets.in_nll.float()
        return Objective(
            nll_weights=in_nll / in_nll.sum().clamp(min=1),
            pair_loss=lambda pairs: odds_ratio_loss(pairs, beta=self.beta, odds_temperature=1.0).mean(),
        )

    def _targets(self, target: Tensor, nll_target: Tensor) -> Targets:
        """The table of targets.

        Unlike `linear_orpo_loss`, liger-kernel lets the NLL expect another token of a position than the answer does.
        Such a position has two targets.
        """
        pairs, length = target.shape[0] // 2, target.shape[1]
        nll = torch.full_like(target, self.ignore_index)
        if self.compute_nll_loss:
            nll[:pairs] = nll_target
        in_both = (nll == target) & (nll != self.ignore_index)
        nll_alone = torch.where(nll == target, self.ignore_index, nll)
        order = torch.arange(2 * pairs, device=target.device).view(2, pairs).T.reshape(-1)
        tokens = torch.stack([target, nll_alone], dim=1)[order]  # [2B, 2, T], pair by pair
        row, kind, position = (tokens != self.ignore_index).nonzero(as_tuple=True)
        sequence = order[row]
        return Targets(
            positions=sequence * length + position,
            token_ids=tokens[row, kind, position],
            sequence_ids=sequence,
            in_answer=kind == 0,
            in_nll=(kind == 1) | in_both[sequence, position],
            num_pairs=pairs,
        )


@torch.no_grad()
def _logit_means(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The mean logit over all positions of the chosen and of the rejected rows: linear, so no logits are needed."""
    mean_row = weight.mean(0, dtype=torch.float32)
    offset = 0.0 if bias is None else bias.mean(dtype=torch.float32)
    chosen, rejected = hidden.reshape(2, -1, hidden.shape[-1]).mean(1, dtype=torch.float32) @ mean_row + offset
    return chosen, rejected
