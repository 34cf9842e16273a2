"""Axolotl's ORPO trainer: its own mixins over our `ORPOTrainer` instead of TRL's.

Imported by Axolotl's builder through the config key `trainer_cls`, which `ORPOPlugin.register` sets.
"""

import logging
from typing import Any

from axolotl.core.trainers.mixins import DistributedParallelMixin, RngLoaderMixin
from axolotl.core.trainers.mixins.optimizer import OptimizerInitMixin, OptimizerMixin
from axolotl.core.trainers.mixins.scheduler import SchedulerMixin

from orpo_plugins.integrations.axolotl_wording import yaml_words
from orpo_plugins.integrations.hf_trainer import ORPOTrainer

logger = logging.getLogger("axolotl.orpo_plugins")


class AxolotlORPOTrainer(
    RngLoaderMixin, SchedulerMixin, OptimizerMixin, OptimizerInitMixin, DistributedParallelMixin, ORPOTrainer
):
    """`ORPOTrainer` with Axolotl's optimizers, schedulers, RNG restoring and parallel saving.

    The mixins, in this order, are those of Axolotl's own `AxolotlORPOTrainer`; without them `optimizer: muon`,
    `lr_scheduler: rex` and others fail.
    """

    _tag_names = ("axolotl", "orpo")  # type: ignore[assignment]  # one tag more than the base class

    @yaml_words()
    def __init__(self, *args: Any, data_collator: Any = None, **kwargs: Any) -> None:
        if data_collator is not None:
            # Axolotl's builder makes one for `pad_to_multiple_of`, for the columns that TRL's tokenization has.
            logger.warning("pad_to_multiple_of has no effect: batches are padded by the layout")
        super().__init__(*args, **kwargs)

    @yaml_words()
    def train(self, *args: Any, **kwargs: Any) -> Any:
        """`Trainer`'s; errors name the keys of the config."""
        return super().train(*args, **kwargs)

    @yaml_words()
    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """`Trainer`'s; errors name the keys of the config."""
        return super().evaluate(*args, **kwargs)
