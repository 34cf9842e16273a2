"""The script behind `orpo-plugins trl orpo`; it takes the options of `trl dpo`, with ORPOConfig's in place of DPO's.

It can be launched directly as well: `accelerate launch -m orpo_plugins.integrations.trl_script orpo ...`
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from orpo_plugins.errors import ConfigError, ORPOError
from orpo_plugins.integrations.hf_config import ORPOConfig
from orpo_plugins.integrations.hf_legacy_arguments import is_legacy, translate

FILE_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}


class ORPOParser(TrlParser):
    """`TrlParser` that also reads the old names of options, on the command line and in the YAML file."""

    @property
    def _known(self) -> frozenset[str]:
        return frozenset(action.dest for action in self._actions)

    def set_defaults_with_config(self, **config: Any) -> list[str]:
        """TRL's, after old names are translated."""
        remaining: list[str] = super().set_defaults_with_config(**translate(config, self._known))
        return remaining

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """argparse's, after old names are translated."""
        arguments = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(translate_flags(arguments, self._known), namespace)


def translate_flags(arguments: list[str], known: frozenset[str]) -> list[str]:
    """Command-line `arguments` with old flags (`--name value`, `--name=value`, `--name`) replaced by those of today."""
    groups: list[list[str]] = [[]]
    for argument in arguments:
        if argument.startswith("--"):
            groups.append([])
        groups[-1].append(argument)
    given: dict[str, Any] = dict(_name_and_value(group) for group in groups[1:])
    old = {name: yaml.safe_load(value) for name, value in given.items() if name not in known and is_legacy(name)}
    new = translate({**given, **old}, known) if old else {}
    kept = [argument for group in groups if not group or _name_and_value(group)[0] not in old for argument in group]
    return kept + [text for name in new if name not in given for text in (f"--{name}", str(new[name]))]


def _name_and_value(group: list[str]) -> tuple[str, str]:
    name, equals, value = group[0].partition("=")
    return name.lstrip("-").replace("-", "_"), value if equals else " ".join(group[1:]) or "true"


def make_parser() -> ORPOParser:
    """The parser of all options."""
    types = (ScriptArguments, ORPOConfig, ModelConfig, DatasetMixtureConfig)
    return ORPOParser(types, prog="orpo-plugins trl orpo")


def without_method(arguments: Sequence[str]) -> list[str]:
    """The options alone: the method's name may stand before them, as in `trl dpo`, and there is one method."""
    if not arguments or arguments[0].startswith("-"):
        return list(arguments)
    if arguments[0] != "orpo":
        raise ConfigError(f"unknown method {arguments[0]!r}; known: orpo")
    return list(arguments[1:])


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, saves, and pushes where asked to."""
    # Here, since the command that launches this reads the options alone.
    from orpo_plugins.integrations.hf_trainer import ORPOTrainer

    options = without_method(sys.argv[1:] if arguments is None else arguments)
    script, args, model, mixture = make_parser().parse_args_and_config(options, fail_with_unknown_args=False)
    if not model.model_name_or_path:
        raise ConfigError("--model_name_or_path is missing: pass a model's name or path")
    args.model_init_kwargs = model_arguments(model, args)
    evaluates = str(getattr(args.eval_strategy, "value", args.eval_strategy)) != "no"
    train_dataset, eval_dataset = datasets_of(script, mixture, evaluates)
    trainer = ORPOTrainer(
        model=model.model_name_or_path,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=get_peft_config(model),
    )
    if script.ignore_bias_buffers:
        ignored = [name for name, buffer in trainer.model.named_buffers() if buffer.dtype.is_floating_point is False]
        cast(Any, trainer.model)._ddp_params_and_buffers_to_ignore = ignored
    resume = args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if str(resume).lower() == "true" else resume)
    trainer.save_model(args.output_dir)
    trainer.accelerator.print(f"Model saved to {args.output_dir}")
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)
    if hasattr(trainer, "end"):  # ours, and any since transformers 5.18: closes trackers and the process group
        trainer.end()


def model_arguments(model: ModelConfig, args: Any) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained`: TRL's model options, overridden by `--model_init_kwargs`."""
    arguments = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        "trust_remote_code": args.trust_remote_code,
    }
    if quantization := get_quantization_config(model):
        arguments["quantization_config"] = quantization
        arguments["device_map"] = {"": args.device}
    return {**arguments, **(args.model_init_kwargs or {})}


def datasets_of(script: ScriptArguments, mixture: DatasetMixtureConfig, evaluates: bool) -> tuple[Any, Any]:
    """(training set, evaluation set or None) from a mixture, the hub, a file, or a folder."""
    if mixture.datasets:
        from trl import get_dataset

        splits = get_dataset(mixture)
        return _split(splits, script.dataset_train_split), (
            _split(splits, script.dataset_test_split) if evaluates else None
        )
    if not script.dataset_name:
        raise ConfigError("no dataset: pass --dataset_name (a name, file or folder), or `datasets` in the YAML file")
    return load_split(script, script.dataset_train_split), (
        load_split(script, script.dataset_test_split) if evaluates else None
    )


def load_split(script: ScriptArguments, split: str) -> Any:
    """One split of a named dataset; slices such as "train[:90%]" work as in `datasets`."""
    from datasets import load_dataset, load_from_disk

    path = Path(str(script.dataset_name))
    if (path / "dataset_dict.json").exists():
        return _split(load_from_disk(str(path)), split)
    if (path / "state.json").exists():
        return load_from_disk(str(path))
    options = {"split": split, "streaming": script.dataset_streaming}
    try:
        if path.suffix in FILE_FORMATS and path.is_file():
            return load_dataset(FILE_FORMATS[path.suffix], data_files=str(path), **options)
        return load_dataset(str(script.dataset_name), name=script.dataset_config, **options)
    except ValueError as error:
        if "split" not in str(error).lower():
            raise
        raise ConfigError(
            f"{script.dataset_name} has no split {split!r} ({error}). Name another with --dataset_train_split and "
            "--dataset_test_split; a slice such as 'train[:90%]' works too"
        ) from error


def _split(splits: Mapping[str, Any], name: str) -> Any:
    if name not in splits:
        raise ConfigError(
            f"the dataset has no split {name!r} but {', '.join(splits)}: name another with --dataset_train_split and "
            "--dataset_test_split, or set test_split_size in the YAML file"
        )
    return splits[name]


if __name__ == "__main__":
    try:
        main()
    except ORPOError as error:
        sys.exit(f"orpo-plugins: error: {error}")
