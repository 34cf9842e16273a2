"""Samples during evaluation: the model answers the prompts of one batch, and the log gets a table of them.

ORPOConfig(generate_during_eval=True, report_to="wandb")
"""

import itertools
import json
import logging
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from orpo_plugins.data.collator import pad_token_id
from orpo_plugins.integrations import hf_tokenizer as text_tokenizer
from orpo_plugins.models.head import is_encoder_decoder
from orpo_plugins.targets import prompt_length

logger = logging.getLogger(__name__)
NEW_TOKENS = 128
"""Length limit of an answer where neither the model's generation config nor max_completion_length sets one."""
NAME = "game_log"
"""The name of the table in trackers, as in TRL."""


def log_generations(trainer: Trainer, dataset: Any, prefix: str) -> None:
    """Answers one batch of `dataset` (tokenized rows); "Prompt" and "Policy" go to W&B, trackio and Comet as a table.

    Where `report_to` names none of these, the table goes to `<output_dir>/generations/step-<n>.json`.  Each step draws
    other rows; all ranks draw the same.  The model's generation config says whether answers are sampled.
    """
    args: Any = trainer.args
    prompts = sample_prompts(dataset, args.eval_batch_size, seed=args.seed + trainer.state.global_step)
    tokenizer = text_tokenizer.of(trainer.processing_class)
    pad = pad_token_id(tokenizer)
    answers = generate(trainer, prompts, pad)
    if not trainer.is_world_process_zero():
        return
    # Some tokenizers pad with the unknown token, which is text to them.
    whole = [_without_padding(ids, pad) for ids in answers.tolist()]
    texts = (tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in (prompts, whole))
    rows = [{"Prompt": prompt, "Policy": answer} for prompt, answer in zip(*texts, strict=True)]
    step = trainer.state.global_step
    _start_trackers(trainer)
    if not _track(rows, args.report_to):
        name = f"step-{step}.json" if prefix == "eval" else f"step-{step}-{prefix.removeprefix('eval_')}.json"
        path = Path(args.output_dir) / "generations" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")


def sample_prompts(dataset: Any, count: int, *, seed: int) -> list[list[int]]:
    """Token ids of the prompts of `count` random rows; of the first rows, where `dataset` is a stream."""
    if hasattr(dataset, "__len__"):
        rows = [dataset[i] for i in random.Random(seed).sample(range(len(dataset)), min(count, len(dataset)))]
    else:
        rows = list(itertools.islice(dataset, count))
    return [list(row["chosen_input_ids"])[: prompt_length(row["chosen_labels"])] for row in rows]


def generate(trainer: Trainer, prompts: list[list[int]], pad: int) -> Tensor:
    """[B, new tokens]: the answers, generated with the key-value cache.

    Prompts are padded on the left for a decoder, which continues them, and on the right for an encoder.
    """
    width = max(map(len, prompts))
    args: Any = trainer.args
    model, device = trainer.accelerator.unwrap_model(trainer.model), args.device
    encoder = is_encoder_decoder(model)
    side = 1 if encoder else -1
    input_ids = torch.tensor([_joined(prompt, [pad] * (width - len(prompt)), side) for prompt in prompts])
    mask = torch.tensor([_joined([1] * len(prompt), [0] * (width - len(prompt)), side) for prompt in prompts])
    # Generation needs no router loss, and transformers (5.16 to 5.23) cannot compute it with a cache.
    routers = {"output_router_logits": False} if getattr(model.config, "output_router_logits", False) else {}
    with torch.no_grad(), trainer.compute_loss_context_manager():
        whole = model.generate(
            input_ids=input_ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=model.generation_config.max_new_tokens or args.max_completion_length or NEW_TOKENS,
            pad_token_id=pad,
            use_cache=True,
            # All ranks gather sharded weights together, so no rank may stop before the others.
            synced_gpus=trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled,
            **routers,
        )
    answers: Tensor = whole[:, 1 if encoder else width :]  # the decoder of an encoder returns its start token first
    return answers


def _without_padding(ids: list[int], pad: int) -> list[int]:
    while ids and ids[-1] == pad:
        ids.pop()
    return ids


def _joined(ids: list[int], padding: list[int], side: int) -> list[int]:
    return ids + padding if side > 0 else padding + ids


def _start_trackers(trainer: Trainer) -> None:
    """Starts a run in each of the trainer's trackers that has none.

    Outside of training, their callbacks would start it only at the next log, which comes after this table.
    """
    from transformers.integrations import CometCallback, TrackioCallback, WandbCallback

    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, CometCallback | TrackioCallback | WandbCallback) and not callback._initialized:
            callback.setup(trainer.args, trainer.state, trainer.model)  # type: ignore[no-untyped-call]  # transformers'


def _track(rows: list[dict[str, str]], report_to: list[str]) -> bool:
    """Gives the table to every active tracker; returns whether there was one."""
    active = [tracker for name, tracker in _TRACKERS.items() if name in report_to and tracker(rows)]
    return bool(active)


def _wandb(rows: list[dict[str, str]]) -> bool:
    import wandb

    if wandb.run is None:
        return False
    table = wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
    wandb.log({NAME: table})
    return True


def _trackio(rows: list[dict[str, str]]) -> bool:
    import pandas
    import trackio

    if trackio.context_vars.current_run.get() is None:
        return False
    trackio.log({NAME: trackio.Table(dataframe=pandas.DataFrame(rows))})
    return True


def _comet(rows: list[dict[str, str]]) -> bool:
    import comet_ml

    experiment = comet_ml.get_running_experiment()
    if experiment is None:
        return False
    experiment.log_table(f"{NAME}.csv", tabular_data=[list(row.values()) for row in rows], headers=list(rows[0]))
    return True


_TRACKERS = {"wandb": _wandb, "trackio": _trackio, "comet_ml": _comet}
