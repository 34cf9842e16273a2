"""*seq2seq*: the layout of encoder-decoder models (T5, BART and their relatives).

    encoder input     input_ids [2B, P]         the prompts, those of the chosen answers first
    decoder target    DECODER_LABELS [2B, A]    the answers:                        a0 a1 a2 EOS
    decoder input     made by `model_inputs`    the answers behind a start token:   start a0 a1 a2

Prompts and answers have the special tokens that the tokenizer adds to a separate text.  Only the model knows its start
token, so the decoder's input is made when there is a model.  Position t of the decoder predicts token t of the answer,
its first token included.  The decoder predicts no prompt, so the NLL is always that of the chosen answer, and
`nll_over` has no effect.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from orpo_plugins.errors import BatchError, ModelError
from orpo_plugins.hooks.layout import Layout, PairLengths
from orpo_plugins.hooks.specs import hookimpl
from orpo_plugins.hooks.types import Pair, TokenSequence
from orpo_plugins.layouts.padded import pad_right, padded_inputs
from orpo_plugins.layouts.target_table import labels_and_shift_labels, target_table
from orpo_plugins.models.head import is_encoder_decoder, unwrap_model
from orpo_plugins.targets import IGNORE_INDEX, IN_ANSWER, IN_DECODER, IN_NLL, prompt_length

DECODER_LABELS = "decoder_labels"
"""The key of the answers in a batch, padded with -100."""


@hookimpl
def orpo_layouts() -> list[Layout]:
    """This layout."""
    return [EncoderDecoder()]


class EncoderDecoder(Layout):
    """See the module's docstring."""

    name = "seq2seq"
    batch_key = DECODER_LABELS
    encoder_decoder = True
    # "auto" tries it last, because the log gives a reason for each layout that "auto" passes over.
    priority = -1

    def collate(self, pairs: Sequence[Pair], *, pad_token_id: int, nll_over: str) -> dict[str, Any]:
        chosen = [split(pair.chosen) for pair in pairs]
        # Without a rejected answer, the encoder reads the prompt of the chosen one: attention to nothing would be NaN.
        rejected = [
            split(pair.rejected) if pair.rejected.input_ids else (prompt, [], [])
            for pair, (prompt, _, _) in zip(pairs, chosen, strict=True)
        ]
        sequences = chosen + rejected
        answers = pad_right([answer for _, answer, _ in sequences], IGNORE_INDEX)
        tables = [
            _targets(answer, labels, index, answers.shape[1], chosen=index < len(pairs))
            for index, (_, answer, labels) in enumerate(sequences)
        ]
        return {
            **padded_inputs([prompt for prompt, _, _ in sequences], pad_token_id),
            DECODER_LABELS: answers,
            **labels_and_shift_labels(tables[: len(pairs)], tables[len(pairs) :]),
        }

    def unsupported(self, model: nn.Module) -> str | None:
        if is_encoder_decoder(model):
            return None
        return f"{type(unwrap_model(model)).__name__} has no encoder for the prompts"

    def model_inputs(self, model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
        """Replaces `DECODER_LABELS` by `decoder_input_ids`."""
        inner: Any = unwrap_model(model)
        if not is_encoder_decoder(model):
            raise BatchError(
                f"the batch is for an encoder-decoder model, but {type(inner).__name__} is none: make it with "
                "ORPOCollator(..., layout='padded')"
            )
        rest = {key: value for key, value in inputs.items() if key != DECODER_LABELS}
        return {**rest, "decoder_input_ids": shifted(inner, inputs[DECODER_LABELS])}

    def token_cost(self, lengths: PairLengths) -> Tensor:
        """[B, 2]: tokens in the encoder, tokens in the decoder."""
        prompts, rejected_prompts = lengths.chosen_prompt, lengths.rejected_prompt
        answers = torch.maximum(lengths.chosen - prompts, lengths.rejected - rejected_prompts)
        return torch.stack([torch.maximum(prompts, rejected_prompts), answers], dim=1)


def split(sequence: TokenSequence) -> tuple[list[int], list[int], list[int]]:
    """Prompt, answer, and the answer's labels.  The answer begins with the first token that has a label."""
    start = prompt_length(sequence.labels)
    if start == 0:
        raise BatchError(
            f"a sequence of {len(sequence.labels)} tokens has no prompt, so there is nothing for the encoder to read: "
            f"give it a prompt whose labels are {IGNORE_INDEX}"
        )
    return sequence.input_ids[:start], sequence.input_ids[start:], sequence.labels[start:]


def shifted(model: Any, labels: Tensor) -> Tensor:
    """[2B, A]: the decoder's input for these labels, made by the model's own method if it has one.

    Otherwise: `decoder_start_token_id`, then all labels but the last, with `pad_token_id` in place of -100.

    Raises:
        ModelError: the configuration names no start or pad token.
    """
    config = model.config
    missing = [name for name in ("decoder_start_token_id", "pad_token_id") if getattr(config, name, None) is None]
    own = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if "pad_token_id" in missing or (missing and own is None):
        raise ModelError(
            f"model.config.{' and model.config.'.join(missing)} is None, so the decoder's input cannot be made: set "
            "it to the token id of the tokenizer (T5 starts with its pad token)"
        )
    if own is not None:
        made: Tensor = own(labels=labels.clone())
        return made
    start = labels.new_full((labels.shape[0], 1), config.decoder_start_token_id)
    return torch.cat([start, labels[:, :-1].masked_fill(labels[:, :-1] == IGNORE_INDEX, config.pad_token_id)], dim=1)


def _targets(answer: list[int], labels: list[int], index: int, width: int, *, chosen: bool) -> Tensor:
    """int64 [n, 4]: the targets of sequence number `index`, whose decoder positions begin at index * width."""
    token_ids, in_answer = torch.tensor(answer, dtype=torch.long), torch.tensor(labels) != IGNORE_INDEX
    terms = (IN_DECODER | IN_ANSWER | IN_NLL * chosen) * in_answer
    return target_table(torch.arange(index * width, index * width + len(answer)), token_ids, index, terms)
