"""The ORPO trainer for Axolotl: Axolotl's mixins over our `ORPOTrainer` instead of TRL's.

Axolotl's builder imports it by the config key `trainer_cls`, which `ORPOPlugin.register` sets.
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

    The mixins and their order are those of Axolotl's own `AxolotlORPOTrainer`.  Without them `optimizer: muon`,
    `lr_scheduler: rex` and others fail.
    """

    _tag_names = ("axolotl", "orpo")

    @yaml_words()
    def __init__(self, *args: Any, data_collator: Any = None, **kwargs: Any) -> None:
        if data_collator is not None:
            # Axolotl's builder makes one for `pad_to_multiple_of`.  It reads the columns of TRL's tokenization.
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
