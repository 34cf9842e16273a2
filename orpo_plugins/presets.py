"""Settings of published ORPO runs, by name, each with its source.

ORPOConfig(output_dir="out", **preset("mistral-orpo-beta"))
ORPOConfig(output_dir="out", **preset("mistral-orpo-beta") | {"num_train_epochs": 1})

Only settings that the source gives are set; all others keep their defaults.  Batch sizes are per device.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orpo_plugins.errors import ConfigError
from orpo_plugins.options import did_you_mean

_CODE = "github.com/xfactlab/orpo"


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Settings of one published run."""

    arguments: Mapping[str, Any]
    """Keyword arguments of `ORPOConfig`."""
    source: str
    """Where the settings are published."""


PRESETS: Mapping[str, Preset] = {
    "mistral-orpo-beta": Preset(
        arguments={
            "beta": 0.1,
            "learning_rate": 5e-6,
            "lr_scheduler_type": "inverse_sqrt",
            "warmup_steps": 200,
            "num_train_epochs": 5,
            "per_device_train_batch_size": 8,
            "per_device_eval_batch_size": 8,
            "gradient_accumulation_steps": 1,
            "max_length": 2048,
            "optim": "paged_adamw_32bit",
        },
        source=f"{_CODE}, scripts/run_mistral_orpo_beta.sh (four A100; the optimizer is the default of src/args.py)",
    ),
    "mistral-orpo-capybara": Preset(
        arguments={
            "beta": 0.05,
            "learning_rate": 5e-6,
            "lr_scheduler_type": "inverse_sqrt",
            "warmup_steps": 100,
            "num_train_epochs": 3,
            "per_device_train_batch_size": 8,
            "per_device_eval_batch_size": 8,
            "gradient_accumulation_steps": 1,
            "max_length": 2048,
            "optim": "adamw_bnb_8bit",
        },
        source=f"{_CODE}, scripts/run_mistral_orpo_capybara.sh (four A100)",
    ),
    "opt-1.3b-ultrafeedback": Preset(
        arguments={
            "beta": 1.0,
            "learning_rate": 5e-6,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 100,
            "num_train_epochs": 5,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "max_length": 2048,
            "optim": "paged_adamw_32bit",
        },
        source=f"{_CODE}, scripts/run_orpo.sh (lambda, schedule and optimizer are the defaults of src/args.py)",
    ),
}


def preset(name: str) -> dict[str, Any]:
    """A copy of a preset's arguments for `ORPOConfig`; `ConfigError` for an unknown name."""
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}{did_you_mean(name, PRESETS)}")
    return dict(PRESETS[name].arguments)
