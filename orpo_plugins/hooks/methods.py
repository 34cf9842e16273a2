"""ORPO, announced to each framework through the `orpo_methods` hook."""

from orpo_plugins.hooks.specs import hookimpl
from orpo_plugins.hooks.types import Method


@hookimpl
def orpo_methods() -> list[Method]:
    """The one method this package is for, under its name in each framework."""
    trainer, config = (
        "orpo_plugins.integrations.hf_trainer.ORPOTrainer",
        "orpo_plugins.integrations.hf_config.ORPOConfig",
    )
    return [
        Method(name="orpo", framework="transformers", trainer=trainer, config=config),
        Method(name="orpo", framework="trl", trainer=trainer, config=config),
        Method(
            name="orpo",
            framework="axolotl",
            trainer="orpo_plugins.integrations.axolotl_trainer.AxolotlORPOTrainer",
            config="axolotl.core.training_args.AxolotlORPOConfig",
        ),
    ]
