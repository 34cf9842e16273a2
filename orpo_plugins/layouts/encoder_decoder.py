"""The layout of encoder-decoder models (T5, BART and their relatives): prompts in the encoder, answers in the decoder.

*seq2seq*: `input_ids` [2B, P] hold the prompts, chosen rows first, and `DECODER_LABELS` [2B, A] the answers, each with
the special tokens that the tokenizer gives a text of its own.  What the decoder reads is the answers shifted to the
right behind the model's start token, which only the model knows: `model_inputs` makes it.  So position a of the decoder
predicts token a of the answer, its first one included.  The NLL is that of the chosen answer whatever `nll_over` says,
since nothing predicts a prompt.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from orpo_plugins.errors import BatchError, ModelError
from orpo_plugins.hooks.layout import Layout, PairLengths
from orpo_plugins.hooks.specs import hookimpl
from orpo_plugins.hooks.types import Pair, TokenSequence
from orpo_plugins.layouts.target_table import labels_and_shift_labels, target_table
from orpo_plugins.models.head import is_encoder_decoder, unwrap_model
from orpo_plugins.targets import IGNORE_INDEX, IN_ANSWER, IN_DECODER, IN_NLL, prompt_length

DECODER_LABELS = "decoder_labels"
"""The key under which a batch carries the answers, -100 where there are none."""


@hookimpl
def orpo_layouts() -> list[Layout]:
    """This layout."""
    return [EncoderDecoder()]


class EncoderDecoder(Layout):
    """See the module's docstring."""

    name = "seq2seq"
    batch_key = DECODER_LABELS
    encoder_decoder = True
    # Below the others: what is said of each layout that "auto" passes over is of no use to a decoder's user.
    priority = -1

    def collate(self, pairs: Sequence[Pair], *, pad_token_id: int, nll_over: str) -> dict[str, Any]:
        chosen = [split(pair.chosen) for pair in pairs]
        # Where a rejected answer is not there, the encoder reads the chosen one's prompt: attention to nothing is NaN.
        rejected = [
            split(pair.rejected) if pair.rejected.input_ids else (chosen[index][0], [], [])
            for index, pair in enumerate(pairs)
        ]
        parts = chosen + rejected
        answers = [answer for _, answer, _ in parts]
        width = max(map(len, answers))
        tables = [
            _targets(parts[row][1], parts[row][2], row, width, chosen=row < len(pairs))
            for pair in range(len(pairs))
            for row in (pair, len(pairs) + pair)
        ]
        return {
            "input_ids": _padded([prompt for prompt, _, _ in parts], pad_token_id),
            "attention_mask": _padded([[1] * len(prompt) for prompt, _, _ in parts], 0),
            DECODER_LABELS: _padded(answers, IGNORE_INDEX),
            **labels_and_shift_labels(tables, len(pairs)),
        }

    def unsupported(self, model: nn.Module) -> str | None:
        if is_encoder_decoder(model):
            return None
        return f"{type(unwrap_model(model)).__name__} has no encoder for the prompts"

    def model_inputs(self, model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
        """`decoder_input_ids` in place of `DECODER_LABELS`."""
        inner: Any = unwrap_model(model)
        if not is_encoder_decoder(model):
            raise BatchError(
                f"the batch is for an encoder-decoder model and {type(inner).__name__} is none: make it with "
                "ORPOCollator(..., layout='padded')"
            )
        rest = {key: value for key, value in inputs.items() if key != DECODER_LABELS}
        return {**rest, "decoder_input_ids": shifted(inner, inputs[DECODER_LABELS])}

    def token_cost(self, lengths: PairLengths) -> Tensor:
        """[B, 2]: the encoder's table and the decoder's."""
        prompts, rejected_prompts = lengths.chosen_prompt, lengths.rejected_prompt
        answers = torch.maximum(lengths.chosen - prompts, lengths.rejected - rejected_prompts)
        return torch.stack([torch.maximum(prompts, rejected_prompts), answers], dim=1)


def split(sequence: TokenSequence) -> tuple[list[int], list[int], list[int]]:
    """(prompt, answer, answer's labels): the answer begins with the first token that has a label."""
    start = prompt_length(sequence.labels)
    if start == 0:
        raise BatchError(
            f"a sequence of {len(sequence.labels)} tokens has no prompt, so there is nothing for the encoder to read: "
            f"give it a prompt whose labels are {IGNORE_INDEX}"
        )
    return sequence.input_ids[:start], sequence.input_ids[start:], sequence.labels[start:]


def shifted(model: Any, labels: Tensor) -> Tensor:
    """[2B, A]: what the decoder reads, by the model's own rule where it has one.

    Otherwise `decoder_start_token_id` and all labels but the last, with `pad_token_id` in place of -100.

    Raises:
        ModelError: the configuration names no start or pad token.
    """
    config = model.config
    missing = [name for name in ("decoder_start_token_id", "pad_token_id") if getattr(config, name, None) is None]
    own = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if "pad_token_id" in missing or (missing and own is None):
        raise ModelError(
            f"model.config.{' and model.config.'.join(missing)} is None, so the decoder's inputs cannot be made: set "
            "it to the tokenizer's (the start token of T5 is its pad token)"
        )
    if own is not None:
        made: Tensor = own(labels=labels.clone())
        return made
    start = labels.new_full((labels.shape[0], 1), config.decoder_start_token_id)
    return torch.cat([start, labels[:, :-1].masked_fill(labels[:, :-1] == IGNORE_INDEX, config.pad_token_id)], dim=1)


def _targets(answer: list[int], labels: list[int], row: int, width: int, *, chosen: bool) -> Tensor:
    token_ids, in_answer = torch.tensor(answer, dtype=torch.long), torch.tensor(labels) != IGNORE_INDEX
    terms = (IN_DECODER | IN_ANSWER | IN_NLL * chosen) * in_answer
    return target_table(torch.arange(row * width, row * width + len(answer)), token_ids, row, terms)


def _padded(rows: list[list[int]], value: int) -> Tensor:
    table = torch.full((len(rows), max(map(len, rows))), value, dtype=torch.long)
    for index, row in enumerate(rows):
        table[index, : len(row)] = torch.tensor(row, dtype=torch.long)
    return table
