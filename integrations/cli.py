"""The console command `orpo-plugins`.

orpo-plugins trl orpo --model_name_or_path ... --dataset_name ...    TRL's command line, for ORPO (see `trl dpo`)
orpo-plugins chat --model_name_or_path ...                         talk to a trained model or adapter
orpo-plugins info                                                  versions, kernels, layouts, plugins
"""

import argparse
import importlib.metadata
import subprocess
import sys
from collections.abc import Sequence

from orpo_plugins.errors import ConfigError, ORPOError, missing_extra

PACKAGES = (
    "orpo-plugins torch transformers trl axolotl accelerate datasets peft bitsandbytes liger-kernel deepspeed triton"
)
SCRIPT = "orpo_plugins.integrations.trl_script"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status.  An `ORPOError` becomes one line on stderr, with status 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="orpo-plugins", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{trl,chat,info}")
    commands.add_parser("trl", help="train as `trl dpo` does; --help lists every option")
    commands.add_parser("chat", help="talk to a trained model; --help lists every option")
    commands.add_parser("info", help="show versions, kernels, layouts, row formats, methods and plugins")
    try:
        if arguments[:1] == ["trl"]:  # its parser is that of the training script, whose imports take seconds
            return train(arguments[1:])
        if arguments[:1] == ["chat"]:
            from orpo_plugins.integrations import cli_chat as chat

            return chat.main(arguments[1:])
        parser.parse_args(arguments)
        print_info()
    except ORPOError as error:
        print(f"orpo-plugins: error: {error}", file=sys.stderr)
        return 2
    return 0


def train(arguments: list[str]) -> int:
    """Launches the training script with Accelerate, which gets the flags that only Accelerate knows.

    The first argument may be the name of a method that a plugin has for TRL; the default is `orpo`.
    """
    try:
        from accelerate.commands.launch import launch_command, launch_command_parser
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from trl.cli.accelerate_config import resolve_accelerate_config_argument
    except ImportError as error:
        raise missing_extra("trl", "trl") from error
    from orpo_plugins.integrations.trl_script import make_parser

    named = bool(arguments) and not arguments[0].startswith("-")
    method, options = (arguments[0], arguments[1:]) if named else ("orpo", arguments)
    # The options are read here first, in one process, for --help and for errors before anything is launched.
    parser = make_parser(method)
    _, training, *_, from_config, from_flags = parser.parse_args_and_config(
        options, return_remaining_strings=True, separate_remaining_strings=True
    )
    launcher = launch_command_parser()
    for_launcher = resolve_accelerate_config_argument(from_config + from_flags)
    _refuse_unknown(for_launcher, parser, launcher)
    for_script = _without(options, from_flags)
    launch = launcher.parse_args([*for_launcher, "--module", SCRIPT, method, *for_script])
    if starts_too_few(launch, use_cpu=training.use_cpu):
        launch.training_script_args += [] if training.use_cpu else ["--use_cpu", "True"]
        launch.cpu, launch.multi_gpu = False, True  # torchrun, whatever the device
    try:
        launch_command(launch)
    except subprocess.CalledProcessError as error:
        return error.returncode
    except ChildFailedError as error:  # that process has printed its error
        return int(error.get_first_failure()[1].exitcode)
    return 0


def starts_too_few(launch: argparse.Namespace, *, use_cpu: bool) -> bool:
    """Whether `accelerate launch` would start only one process where several are asked for.

    It does so silently on CPUs (seen in 1.13), unless MPI starts the others.
    """
    import torch

    starts_all = ("multi_gpu", "use_deepspeed", "use_fsdp", "use_megatron_lm", "tpu", "mpirun_hostfile")
    on_cpu = use_cpu or launch.cpu or not torch.accelerator.is_available()
    return (launch.num_processes or 1) > 1 and on_cpu and not any(getattr(launch, name, None) for name in starts_all)


def _refuse_unknown(arguments: list[str], parser: argparse.ArgumentParser, launcher: argparse.ArgumentParser) -> None:
    for_launch = {option for action in launcher._actions for option in action.option_strings}
    from orpo_plugins.options import did_you_mean

    for_script = {option for action in parser._actions for option in action.option_strings}
    for name in (argument.split("=")[0] for argument in arguments if argument.startswith("--")):
        if name not in for_launch:
            hint = did_you_mean(name, for_launch | for_script, form="; did you mean {}?")
            raise ConfigError(f"{name} is an option of neither the training script nor accelerate launch{hint}")


def _without(arguments: list[str], taken: list[str]) -> list[str]:
    """`arguments` without `taken`, which is a subsequence of them in the same order."""
    left = list(taken)
    return [argument for argument in arguments if not (left and argument == left[0] and left.pop(0))]


def print_info() -> None:
    """Prints the versions of packages and everything that plugins have registered."""
    import torch

    from orpo_plugins.hooks import plugins

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for package in PACKAGES.split():
        try:
            print(f"{package:15} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"{package:15} not installed")
    print(f"\nkernels on {device}")
    for kernel in sorted(plugins.kernels(), key=lambda kernel: -kernel.priority):
        print(f"  {kernel.name:13} {kernel.unsupported(device) or 'available'}")
    print("layouts\n  " + ", ".join(layout.name for layout in plugins.layouts()))
    print("row formats")
    for row_format in plugins.row_formats():
        print(f"  {row_format.name:31} {row_format.columns}")
    print("methods")
    for framework in ("transformers", "trl", "axolotl"):
        for method in plugins.methods(framework):
            print(f"  {framework:13} {method.name}: {method.trainer}")
    print("plugins")
    distributions = {id(plugin): found.metadata["name"] for plugin, found in _distributions()}
    for name, plugin in plugins.get_plugin_manager().list_name_plugin():
        print(f"  {name} ({distributions.get(id(plugin), 'built in')})")


def _distributions() -> list[tuple[object, importlib.metadata.Distribution]]:
    from orpo_plugins.hooks import plugins

    return [(plugin, facade._dist) for plugin, facade in plugins.get_plugin_manager().list_plugin_distinfo()]
