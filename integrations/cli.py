"""The console command `orpo-plugins`.

orpo-plugins trl orpo --model_name_or_path ... --dataset_name ...    TRL's command line, for ORPO (see `trl dpo`)
orpo-plugins chat --model_name_or_path ...                         talk to what was trained, adapters included
orpo-plugins info                                                  versions, and what is registered
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
    """Runs a command and returns its exit status; an error of ours becomes one line on stderr and status 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="orpo-plugins", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{trl,chat,info}")
    commands.add_parser("trl", help="train as `trl dpo` does; --help lists every option")
    commands.add_parser("chat", help="talk to a trained model; --help lists every option")
    commands.add_parser("info", help="show versions, kernels, layouts, row formats and plugins")
    try:
        if arguments[:1] == ["trl"]:  # its options are the training script's, whose imports take seconds
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
    """Launches the training script through Accelerate; flags that only Accelerate knows go to it."""
    try:
        from accelerate.commands.launch import launch_command, launch_command_parser
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from trl.cli.accelerate_config import resolve_accelerate_config_argument
    except ImportError as error:
        raise missing_extra("trl", "trl") from error
    from orpo_plugins.integrations.trl_script import make_parser, without_method

    options = without_method(arguments)
    # Reading the options here, in one process, prints help and names a bad value before anything is launched.
    parser = make_parser()
    _, training, *_, from_config, from_flags = parser.parse_args_and_config(
        options, return_remaining_strings=True, separate_remaining_strings=True
    )
    launcher = launch_command_parser()
    for_launcher = resolve_accelerate_config_argument(from_config + from_flags)
    _refuse_unknown(for_launcher, parser, launcher)
    for_script = _without(options, from_flags)
    launch = launcher.parse_args([*for_launcher, "--module", SCRIPT, *for_script])
    if starts_too_few(launch, use_cpu=training.use_cpu):
        launch.training_script_args += [] if training.use_cpu else ["--use_cpu", "True"]
        launch.cpu, launch.multi_gpu = False, True  # torchrun, whatever the device
    try:
        launch_command(launch)
    except subprocess.CalledProcessError as error:
        return error.returncode
    except ChildFailedError as error:  # the process has said why
        return int(error.get_first_failure()[1].exitcode)
    return 0


def starts_too_few(launch: argparse.Namespace, *, use_cpu: bool) -> bool:
    """Whether `accelerate launch` would start one process though several are asked for.

    It does so on CPUs (tried with 1.13), unless MPI starts the others, and says nothing.
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
    """`arguments` less `taken`, which is an ordered subsequence of them."""
    left = list(taken)
    return [argument for argument in arguments if not (left and argument == left[0] and left.pop(0))]


def print_info() -> None:
    """Prints installed versions and everything that the hooks offer here."""
    import torch

    from orpo_plugins.hooks import plugins

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for package in PACKAGES.split():
        try:
            print(f"{package:15} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"{package:15} not installed")
    print(f"\nkernels for bf16 on {device}")
    operands = plugins.stand_ins(torch.bfloat16, device)
    for kernel in sorted(plugins.kernels(), key=lambda kernel: -kernel.priority):
        print(f"  {kernel.name:13} {kernel.unsupported(*operands) or 'available'}")
    print("layouts\n  " + ", ".join(layout.name for layout in plugins.layouts()))
    print("row formats")
    for row_format in plugins.row_formats():
        print(f"  {row_format.name:31} {row_format.columns}")
    print("plugins")
    manager = plugins.get_plugin_manager()
    for name, _ in manager.list_name_plugin():
        print(f"  {manager.label(name)}")
