"""Every code block of README and docs runs, or is read by the program that would read it."""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from orpo_plugins import hooks
from tests.kit import ROOT, tiny
from tests.kit.axolotl_runs import environment, write_config, write_rows
from tests.kit.tutorial_programs import SIZES, conversations, dataset

pytestmark = pytest.mark.slow

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r'^( *)```(\w*)(?: title="([^"]+)")?\n(.*?)^\1```$', re.MULTILINE | re.DOTALL)
MODEL, DATASET = "Qwen/Qwen2.5-0.5B-Instruct", "trl-lib/ultrafeedback_binarized"


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: Path
    line: int
    language: str
    title: str
    """The file that the reader is to put it into, or nothing."""
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(page, text[: found.start()].count("\n") + 1, found[2], found[3] or "", found[4])
        for found in FENCE.finditer(text)
    ]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
LANGUAGES = {"python", "yaml", "bash", "toml", "text"}
"""Those that a test below takes; `text` is output, drawings and formulas, which nobody runs."""


def of(language: str) -> list[Block]:
    return [block for block in BLOCKS if block.language == language]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_is_of_a_language_that_is_tested(page: Path) -> None:
    assert page.read_text().count("```") == 2 * len(blocks_of(page)), "a fence that FENCE does not read"
    assert not [f"{block} is {block.language!r}" for block in blocks_of(page) if block.language not in LANGUAGES]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the names of the documents' models and datasets are small local ones."""
    folder = tmp_path_factory.mktemp("documents")
    tiny.saved(folder / MODEL, **SIZES)
    (folder / DATASET).parent.mkdir()
    dataset(folder / DATASET, conversations(8))
    write_rows(folder / "pairs.jsonl", tiny.rows(8))
    for block in BLOCKS:
        if block.title:
            (folder / block.title).write_text(block.text)
    return folder


# ---- Python

# tests/hooks/test_plugins.py runs each example of docs/plugins.md by itself.
PYTHON_PAGES = sorted({block.page for block in of("python")} - {ROOT / "docs" / "plugins.md"})


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set:UserWarning")  # readers have an accelerator,
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")  # and so paged optimizers
@pytest.mark.parametrize("page", PYTHON_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_python_of_a_page_runs(page: Path, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Block after block, in one namespace that has a `model`, its `tokenizer`, and `rows`."""
    monkeypatch.chdir(world)
    monkeypatch.syspath_prepend(world)
    names: dict[str, Any] = {"model": tiny.model(**SIZES), "tokenizer": tiny.tokenizer(), "rows": tiny.rows(8)}
    manager = hooks.get_plugin_manager()
    before = dict(manager.list_name_plugin())
    try:
        for block in blocks_of(page):
            if block.language == "python":
                exec(compile(block.text, str(block), "exec"), names)
    finally:
        for name, plugin in manager.list_name_plugin():
            if plugin is not None and before.get(name) is not plugin:
                manager.unregister(plugin)
        for name, plugin in before.items():
            if plugin is not None and not manager.is_registered(plugin):
                manager.register(plugin, name=name)


# ---- YAML and TOML

READ_AXOLOTL = """
import json, shlex, sys
from axolotl.cli.config import load_cfg
from axolotl.cli.main import cli

for path in sys.argv[2:]:
    try:
        load_cfg(path)
        print(json.dumps({"name": path, "error": None}))
    except Exception as error:
        print(json.dumps({"name": path, "error": f"{type(error).__name__}: {error}"}))
for command in json.loads(sys.argv[1]):
    _, name, *words = shlex.split(command)
    try:
        cli.commands[name].make_context(name, words)
        print(json.dumps({"name": command, "error": None}))
    except Exception as error:
        print(json.dumps({"name": command, "error": f"{type(error).__name__}: {error}"}))
"""


def is_axolotls(block: Block) -> bool:
    """Whether a YAML block is a config of Axolotl, whole or in part; TRL's has a title that says so."""
    return block.language == "yaml" and not block.title.startswith("trl")


@pytest.fixture(scope="module")
def axolotl_says(world: Path) -> dict[str, str | None]:
    """What Axolotl's own loader says to every config, over a base that completes it, and to every command."""
    paths = []
    for block in filter(is_axolotls, BLOCKS):
        given = yaml.safe_load(block.text)
        base = {"base_model": MODEL, "datasets": [{"path": "pairs.jsonl", "ds_type": "json", "split": "train"}]}
        held_out = {} if "test_datasets" in given or "val_set_size" in given else {"val_set_size": 0}
        on_a_cpu = {"bf16": False, "tf32": False}
        paths.append(str(write_config(config_path(world, block), **{**base, **held_out, **given, **on_a_cpu})))
    commands = [command for block in of("bash") for command in commands_of(block) if command.startswith("axolotl ")]
    run = subprocess.run(
        [sys.executable, "-c", READ_AXOLOTL, json.dumps(commands), *paths],
        cwd=world,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=500,
    )
    found = [json.loads(line) for line in run.stdout.splitlines() if line.startswith('{"name"')]
    assert len(found) == len(paths) + len(commands), run.stdout[-3000:] + run.stderr[-3000:]
    return {each["name"]: each["error"] for each in found}


def config_path(world: Path, block: Block) -> Path:
    return world / f"{block}.yml".replace("/", "-")


@pytest.mark.parametrize("block", list(filter(is_axolotls, BLOCKS)), ids=str)
def test_axolotl_accepts_a_config(block: Block, world: Path, request: pytest.FixtureRequest) -> None:
    assert isinstance(yaml.safe_load(block.text), dict)
    if importlib.util.find_spec("axolotl") is None:
        pytest.skip("Axolotl is not installed: pip install 'orpo-plugins[axolotl]'")
    assert request.getfixturevalue("axolotl_says")[str(config_path(world, block))] is None


@pytest.mark.parametrize("block", of("toml"), ids=str)
def test_toml_is_valid(block: Block) -> None:
    tomllib.loads(block.text)


# ---- commands


def commands_of(block: Block) -> list[str]:
    """The commands of a block, without comments and assignments, continuation lines joined."""
    lines = [shlex.split(line, comments=True) for line in block.text.replace("\\\n", " ").splitlines()]
    commands = [shlex.join(word for word in words if not re.match(r"[A-Z_]+=", word)) for words in lines]
    return [command for command in commands if command]


COMMANDS = [(str(block), command) for block in of("bash") for command in commands_of(block)]


@pytest.mark.parametrize(("where", "command"), COMMANDS, ids=[f"{where} {command}" for where, command in COMMANDS])
def test_a_command_is_one_that_its_program_takes(
    where: str, command: str, world: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    words = shlex.split(command)
    monkeypatch.chdir(world)
    if words[0] == "axolotl":
        if importlib.util.find_spec("axolotl") is None:
            pytest.skip("Axolotl is not installed: pip install 'orpo-plugins[axolotl]'")
        assert request.getfixturevalue("axolotl_says")[command] is None
    else:
        assert words[0] in PROGRAMS, f"{where}: no test knows {words[0]!r}"
        PROGRAMS[words[0]](words[1:], monkeypatch)


def make(words: list[str], _: pytest.MonkeyPatch) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {word for word in words if "=" not in word} <= set(targets)


def pip(words: list[str], _: pytest.MonkeyPatch) -> None:
    """Extras of ours exist; what else is installed is among what an extra of ours asks for."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert words[0] == "install"
    for package in (word for word in words[1:] if not word.startswith("-")):
        name, _, names = package.rstrip("]").partition("[")
        if name in (".", "orpo-plugins"):
            assert set(filter(None, names.split(","))) <= set(extras), package
        else:
            assert any(wanted.startswith(package) for extra in extras.values() for wanted in extra), package


def python(words: list[str], _: pytest.MonkeyPatch) -> None:
    """A program of the repository, or of a page, with options that it names."""
    program, *options = words[2:] if words[0] == "-m" else words
    if words[0] == "-m":
        assert importlib.util.find_spec(words[1]) is not None
        return
    path = ROOT / program if (ROOT / program).exists() else Path(program)
    named = set(re.findall(r'"(--[\w-]+)"', path.read_text()))
    if "HfArgumentParser" in path.read_text():
        pytest.importorskip("trl")
        from orpo_plugins.integrations.trl_script import make_parser

        named |= {name for action in make_parser()._actions for name in action.option_strings}
    assert {option.split("=")[0] for option in options if option.startswith("--")} <= named


def accelerate(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.commands.launch import launch_command_parser

    assert words[0] == "launch"
    launch = launch_command_parser().parse_args(words[1:])
    python([launch.training_script, *launch.training_script_args], monkeypatch)


def orpo_plugins(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the command itself, up to the launch of the training or the loading of the model."""
    from orpo_plugins.integrations import cli, cli_chat

    if words[0] == "trl":
        pytest.importorskip("trl")
        monkeypatch.setattr("accelerate.commands.launch.launch_command", lambda launch: None)
        assert words[-1] == "--help" or cli.main(words) == 0
    elif words[0] == "chat":
        cli_chat.make_parser().parse_args(words[1:])
    else:
        assert cli.main(words) == 0


PROGRAMS = {"make": make, "pip": pip, "python": python, "accelerate": accelerate, "orpo-plugins": orpo_plugins}
