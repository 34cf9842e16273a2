"""`ORPOPlugin`: ORPO by orpo-plugins in Axolotl.

    plugins:
      - orpo_plugins.ORPOPlugin
    rl: orpo
    orpo_alpha: 0.1

Where a plugin has `get_trainer_cls`, Axolotl (0.19.0) builds preference trainers without a model.  So the plugin sets
the config key `trainer_cls` instead.  A process may run several configs, with this plugin and without it: the plugin
keeps nothing of any of them.
"""

import logging
from typing import TYPE_CHECKING, Any

from orpo_plugins import __version__
from orpo_plugins.errors import ConfigError, missing_extra
from orpo_plugins.integrations.axolotl_arguments import (
    add_training_arguments,
    check_beta,
    check_keys,
    check_steps,
    is_ours,
    training_arguments,
)

try:
    from axolotl.integrations.base import BasePlugin
except ImportError as error:
    raise missing_extra("axolotl", "axolotl") from error

if TYPE_CHECKING:
    from axolotl.common.datasets import TrainDatasetMeta
    from axolotl.utils.dict import DictDefault

# Axolotl shows INFO lines of loggers below its own name only.
logger = logging.getLogger("axolotl.orpo_plugins")

TRAINER = "orpo_plugins.integrations.axolotl_trainer.AxolotlORPOTrainer"
WITHOUT_EFFECT = {
    "cut_cross_entropy": "orpo-plugins computes the head, see orpo_kernel",
    "chunked_cross_entropy": "orpo-plugins computes the head, see orpo_kernel",
    "liger_cross_entropy": "orpo-plugins computes the head, see orpo_kernel",
    "liger_fused_linear_cross_entropy": "orpo-plugins computes the head, see orpo_kernel",
    "flash_attn_cross_entropy": "orpo-plugins computes the head, see orpo_kernel",
    "train_on_inputs": "the prompt is in the NLL with orpo_nll_over: sequence and not with completion",
    "pad_to_sequence_len": "batches are padded by the layout, see orpo_layout",
    "eval_sample_packing": "pairs are packed by the layout, see orpo_layout",
}
"""Config keys that ORPO does not read; the log gives the reason where one of them is set."""


class ORPOPlugin(BasePlugin):
    """Trains configs with `rl: orpo`; with any other `rl` it does nothing."""

    def register(self, cfg: dict[str, Any]) -> None:
        """Checks the raw config and sets its `trainer_cls` to our trainer.

        Raises:
            ConfigError: an unknown `orpo_*` key, another `trainer_cls`, `sample_packing`, or keys that disagree.
        """
        if not is_ours(cfg):
            if cfg.get("rl") != "orpo":
                logger.warning("orpo-plugins does nothing: rl is %r, not 'orpo'", cfg.get("rl"))
            return
        check_keys(list(cfg))
        check_beta(cfg)
        check_steps(cfg)
        if cfg.get("trainer_cls") not in (None, TRAINER):
            raise ConfigError(
                f"trainer_cls is {cfg['trainer_cls']!r}, but orpo-plugins brings the trainer for rl: orpo: "
                "remove trainer_cls, or remove orpo_plugins.ORPOPlugin from plugins"
            )
        if cfg.get("sample_packing"):
            raise ConfigError(
                "sample_packing does not apply to pairs: remove it; orpo_layout: packed packs them, "
                "and orpo_max_tokens_per_batch says how full a batch may be"
            )
        for key, reason in WITHOUT_EFFECT.items():
            if cfg.get(key):
                logger.warning("%s: %s has no effect under rl: orpo: %s", key, cfg[key], reason)
        cfg["trainer_cls"] = TRAINER
        from orpo_plugins.integrations import axolotl_data

        axolotl_data.keep_column_names(cfg)
        axolotl_data.serve_evaluate()
        logger.info("orpo-plugins %s takes over rl: orpo", __version__)

    def get_input_args(self) -> str | None:
        """The path of the schema of our YAML keys."""
        return "orpo_plugins.integrations.axolotl_arguments.ORPOInputArgs"

    def pre_model_load(self, cfg: "DictDefault") -> None:
        """Adds our fields to the training arguments.  Axolotl makes these right after this call."""
        if is_ours(cfg):
            add_training_arguments()

    def get_training_args(self, cfg: "DictDefault") -> dict[str, Any] | None:
        """The values of our YAML keys."""
        return training_arguments(cfg) if is_ours(cfg) else None

    def load_datasets(self, cfg: "DictDefault", preprocess: bool = False) -> "TrainDatasetMeta | None":
        """Tokenized pairs for `axolotl train` and `axolotl preprocess`; any row format, any dataset type."""
        del preprocess  # cfg.is_preprocess says the same
        if not is_ours(cfg):
            return None
        from orpo_plugins.integrations import axolotl_data

        return axolotl_data.dataset_meta(cfg)
