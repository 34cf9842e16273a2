"""Hooks: what is built in comes through them, an installed package adds to it, and an error names its plugin."""

import inspect
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from orpo_plugins import ORPOCollator, errors, get_plugin_manager, hookimpl, hooks, orpo_forward
from orpo_plugins.data.row_formats import parse_row
from orpo_plugins.hooks import plugins
from orpo_plugins.hooks import specs as hookspecs
from orpo_plugins.hooks.offers import _PARTS
from orpo_plugins.kernels import chunked, reference
from orpo_plugins.layouts import padded
from orpo_plugins.layouts.auto import best_layout
from tests.kit import ROOT, tiny, training
from tests.kit.kernel_cases import make_case, run_case

DOCUMENT = (ROOT / "docs" / "plugins.md").read_text()
HOOKS = [name for name in dir(hookspecs) if name.startswith("orpo_")]
CPU = torch.device("cpu")


@pytest.fixture
def register() -> Iterator[Callable[..., None]]:
    """Registers a plugin with the hooks given as name=function, until the test ends."""
    registered: list[object] = []

    def register(name: str = "mine", **implemented: Callable[[], Any]) -> None:
        plugin = type("Plugin", (), {hook: staticmethod(hookimpl(given)) for hook, given in implemented.items()})()
        get_plugin_manager().register(plugin, name=name)
        registered.append(plugin)

    yield register
    for plugin in registered:
        get_plugin_manager().unregister(plugin)


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """Installs a package of one module with an entry point, in version 1.2; the plugin manager is a new one."""
    monkeypatch.syspath_prepend(tmp_path)
    get_plugin_manager.cache_clear()

    def install(entry_point: str, code: str, *, package: str = "acme-orpo") -> None:
        module = package.replace("-", "_")
        (tmp_path / f"{module}.py").write_text(code)
        metadata = tmp_path / f"{module}-1.2.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n")
        (metadata / "entry_points.txt").write_text(f"[orpo_plugins]\n{entry_point} = {module}\n")

    yield install
    get_plugin_manager.cache_clear()
    for name in ("acme_orpo", "other_orpo"):
        sys.modules.pop(name, None)


# ---- the example package


PROGRAM = """
import json, logging, sys
from tests.kit import tiny, training
from orpo_plugins import errors
from orpo_plugins.hooks import get_plugin_manager
from orpo_plugins.data.row_formats import parse_row
rows = [
    {"question": row["prompt"], "good": row["chosen"], "bad": row["rejected"]} for row in tiny.rows(6)
]
lines = []
handler = logging.Handler()
handler.emit = lambda record: lines.append(record.getMessage())
logging.getLogger("orpo_plugins").addHandler(handler)
made = training.trainer(sys.argv[1], rows=rows, max_steps=2, **json.loads(sys.argv[2]))
made.train()
try:
    parse_row({"question": None, "good": "Yes.", "bad": "No."}, 7)
except errors.PluginError as error:
    message = str(error)
print(json.dumps({
    "logged": made.state.log_history, "active": [line for line in lines if "is active" in line],
    "message": message, "text": parse_row(rows[0], 0).prompt, "row": rows[0],
}))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the example package is really installed."""
    target = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", str(target)]
    source = tmp_path_factory.mktemp("source") / "plugin"
    source.mkdir()
    for name in ("pyproject.toml", "orpo_example_plugin.py"):
        (source / name).write_text((ROOT / "examples" / "plugin" / name).read_text())
    subprocess.run([*pip, str(source)], check=True, capture_output=True, text=True)
    return target


def run(program: str, site: Path, *arguments: str, **environment: str) -> dict[str, Any]:
    """The last line that a fresh interpreter prints, which sees the package."""
    path = os.pathsep.join([str(site), str(ROOT), os.environ.get("PYTHONPATH", "")])
    variables = {**os.environ, "PYTHONPATH": path, **environment}
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def trained(site: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two steps with everything that the example package adds."""
    options = {"kernel": "double", "layout": "few_widths", "loss_terms": {"simpo": 0.5}}
    folder = tmp_path_factory.mktemp("run")
    return run(PROGRAM, site, str(folder), json.dumps(options))


@pytest.mark.slow
def test_an_installed_package_is_named_with_its_version(trained: dict[str, Any]) -> None:
    (line,) = trained["active"]
    assert "kernel=double, layout=few_widths" in line
    assert line.endswith("; plugin example (orpo-example-plugin 0.1.0)")


@pytest.mark.slow
def test_an_installed_package_adds_a_row_format(trained: dict[str, Any]) -> None:
    assert trained["text"] == trained["row"]["question"] + "? "


@pytest.mark.slow
def test_an_installed_package_adds_a_kernel_a_loss_term_and_a_metric(trained: dict[str, Any]) -> None:
    for entry in trained["logged"][:2]:
        chosen, rejected = entry["logps/chosen"], entry["logps/rejected"]
        assert {"loss_terms/simpo", "length_gap"} <= entry.keys()
        whole = entry["nll_loss"] - 0.1 * entry["log_odds_ratio"] + 0.5 * entry["loss_terms/simpo"]
        assert entry["loss"] == pytest.approx(whole, rel=1e-4)
        assert entry["rewards/margins"] == pytest.approx(0.1 * (chosen - rejected), rel=1e-4)
        assert entry["length_gap"] == entry["answer_tokens/chosen"] - entry["answer_tokens/rejected"]


@pytest.mark.slow
def test_an_error_of_an_installed_package_reads_as_documented(trained: dict[str, Any]) -> None:
    assert trained["message"].startswith("row 7 (quiz): plugin example (orpo-example-plugin 0.1.0), hook orpo_row_form")
    assert trained["message"] in " ".join(DOCUMENT.split())


# ---- entry points


def test_a_blocked_entry_point_is_not_imported(install: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    install("broken", "raise OSError('no such file')")
    install("other", "", package="other-orpo")
    monkeypatch.setenv("ORPO_PLUGINS_BLOCK", " broken ,")
    assert get_plugin_manager().third_party() == ["other (other-orpo 1.2)"]
    assert "acme_orpo" not in sys.modules


def test_an_unknown_name_to_block_lists_the_installed_ones(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    install("mine", "")
    monkeypatch.setenv("ORPO_PLUGINS_BLOCK", "mnie")
    with pytest.raises(
        errors.ConfigError,
        match=r"ORPO_PLUGINS_BLOCK names the plugin 'mnie', which is not installed; installed:.* mine",
    ):
        get_plugin_manager()


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise OSError('no such file')", "OSError: no such file"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        (
            "from orpo_plugins import hookimpl\n@hookimpl\ndef orpo_kernel(): ...",
            "PluginError: unknown hook 'orpo_kernel' .* The hooks are orpo_kernels, orpo_layouts",
        ),
        ("from orpo_plugins import hookimpl\n@hookimpl\ndef orpo_metrics(model): ...", "PluginError: .*orpo_metrics"),
    ],
)
def test_an_entry_point_that_cannot_be_loaded_is_named(install: Callable[..., None], code: str, reason: str) -> None:
    install("mine", code)
    way_out = r"Fix the plugin, or keep it out with ORPO_PLUGINS_BLOCK=mine"
    message = rf"(?s)plugin mine \(acme-orpo 1.2\) cannot be loaded from 'acme_orpo': {reason}.*\. {way_out}"
    with pytest.raises(errors.PluginError, match=message) as raised:
        get_plugin_manager()
    assert type(raised.value.__cause__).__name__ == reason.partition(":")[0]


def test_two_packages_with_one_name_are_named(install: Callable[..., None]) -> None:
    install("mine", "")
    install("mine", "", package="other-orpo")
    message = r"two installed packages have a plugin named 'mine': \w+-orpo 1.2 and \w+-orpo 1.2. .*BLOCK=mine"
    with pytest.raises(errors.PluginError, match=message):
        get_plugin_manager()


def test_a_hook_that_raises_names_the_package_and_stops(install: Callable[..., None]) -> None:
    install("mine", "from orpo_plugins import hookimpl\n@hookimpl\ndef orpo_kernels(): return [][0]")
    message = (
        r"plugin mine \(acme-orpo 1.2\), hook orpo_kernels raised IndexError: list index out of range. "
        r"Fix the plugin, or keep it out with ORPO_PLUGINS_BLOCK=mine"
    )
    with pytest.raises(errors.PluginError, match=message) as raised:
        run_case(make_case())
    assert isinstance(raised.value.__cause__, IndexError)


def test_a_hook_is_reported_whatever_it_raises(register: Callable[..., None]) -> None:
    def hook() -> Any:
        raise errors.ConfigError("set ACME_HOME")

    register(orpo_layouts=hook)
    with pytest.raises(errors.PluginError, match=r"mine .*, hook orpo_layouts raised ConfigError: set ACME_HOME\. Fix"):
        plugins.layout("padded")


# ---- errors of plugins


def broken(*_: Any, **__: Any) -> Any:
    """A function of a plugin with a mistake in it."""
    raise KeyError("mistake")


def silent(*_: Any, **__: Any) -> Any:
    """A function of a plugin that forgets to return anything."""


def parts(function: Callable[..., Any]) -> dict[str, tuple[str, Any, Callable[[], Any]]]:
    """By "part.function": a hook, a part with that function, and something that calls it."""

    def layout(**members: Any) -> Any:
        return type("Layout", (padded.Padded,), {"name": "x", **members})()

    def batch(**options: Any) -> Any:
        return ORPOCollator(tiny.tokenizer(), **options)(tiny.rows(2))

    def forward(**options: Any) -> Any:
        return orpo_forward(tiny.model(), batch(), **options)

    def computed() -> Any:
        return next(metric for metric in plugins.metrics() if metric.name == "x").compute(forward())

    return {
        "matches of RowFormat": (
            "orpo_row_formats",
            hooks.RowFormat(name="x", columns="", matches=function, parse=broken),
            lambda: parse_row({}, 3),
        ),
        "parse of RowFormat": (
            "orpo_row_formats",
            hooks.RowFormat(name="x", columns="", matches=lambda row: True, parse=function),
            lambda: parse_row({}, 3),
        ),
        "compute of LossTerm": (
            "orpo_loss_terms",
            hooks.LossTerm(name="x", compute=function),
            lambda: forward(loss_terms={"x": 1.0}),
        ),
        "compute of Metric": ("orpo_metrics", hooks.Metric(name="x", compute=function), computed),
        "compute of Kernel": (
            "orpo_kernels",
            hooks.Kernel(name="x", compute=function),
            lambda: run_case(make_case(), kernel="x"),
        ),
        "unsupported of Kernel": (
            "orpo_kernels",
            hooks.Kernel(name="x", compute=broken, unsupported=function, priority=99),
            lambda: forward(),
        ),
        "collate of Layout": (
            "orpo_layouts",
            layout(collate=function),
            lambda: batch(layout="x"),
        ),
        "unsupported of Layout": (
            "orpo_layouts",
            layout(unsupported=function, priority=99),
            lambda: best_layout("auto", tiny.model()),
        ),
    }


@pytest.mark.parametrize("name", parts(broken))
def test_a_plugins_function_that_raises_is_named(register: Callable[..., None], name: str) -> None:
    hook, part, call = parts(broken)[name]
    register(**{hook: lambda: [part]})
    place = rf"plugin mine \(registered in this process\), hook {hook}: {name} 'x' raised KeyError: 'mistake'"
    way_out = r"Fix the plugin, or leave out the call of register\(\) that brings it in"
    with pytest.raises(errors.PluginError, match=rf"{place}\. {way_out}$") as raised:
        call()
    assert isinstance(raised.value.__cause__, KeyError)
    assert str(raised.value).startswith("row 3 (x): " if hook == "orpo_row_formats" else "plugin mine")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("parse of RowFormat", "Preference"),
        ("compute of LossTerm", "Tensor"),
        ("compute of Metric", "Tensor"),
        ("compute of Kernel", "HeadResult"),
        ("collate of Layout", "dict"),
    ],
)
def test_a_plugins_function_that_returns_nothing_is_named(
    register: Callable[..., None], name: str, expected: str
) -> None:
    hook, part, call = parts(silent)[name]
    register(**{hook: lambda: [part]})
    with pytest.raises(errors.PluginError, match=rf"hook {hook}: {name} 'x' returned None, not {expected}\. Fix"):
        call()


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "returned None, not list or tuple"),
        (hooks.Kernel(name="x", compute=broken), "returned a Kernel, not list or tuple"),
        ([hooks.Metric(name="x", compute=broken)], "returned a list with a Metric, not Kernel"),
        ([hooks.Kernel], "returned a list with a type, not Kernel"),
        ([hooks.Kernel(name="auto", compute=broken)], "returned a Kernel with the name 'auto'"),
        ([hooks.Kernel(name="x", compute=None)], ": compute of Kernel 'x' is None, not a function"),  # type: ignore[arg-type]
        (
            [hooks.Kernel(name="x", compute=broken)] * 2,
            r"two plugins have a Kernel named 'x': mine \(registered .* and mine",
        ),
        (
            [hooks.Kernel(name="chunked", compute=broken)],
            r"two plugins have a Kernel named 'chunked': orpo-kernel-chunked \(built in\) and mine \(registered",
        ),
    ],
)
def test_a_hook_that_returns_something_else_is_named(
    register: Callable[..., None], returned: Any, message: str
) -> None:
    register(orpo_kernels=lambda: returned)
    with pytest.raises(errors.PluginError, match=rf"{message}.*\. Fix the plugin"):
        run_case(make_case())


def test_a_loss_term_gives_one_number_per_pair(register: Callable[..., None]) -> None:
    register(orpo_loss_terms=lambda: [hooks.LossTerm(name="mean", compute=lambda pairs: pairs.chosen.mean())])
    batch = ORPOCollator(tiny.tokenizer())(tiny.rows(2))
    with pytest.raises(errors.PluginError, match=r"'mean' raised ValueError: it returned shape \(\) for 2 pairs, and"):
        orpo_forward(tiny.model(), batch, loss_terms={"mean": 1.0})


@pytest.mark.parametrize("error", [errors.BatchError, errors.ConfigError, MemoryError, torch.OutOfMemoryError])
def test_errors_that_others_look_for_pass_through(register: Callable[..., None], error: type[Exception]) -> None:
    def compute(*_: Any) -> Any:
        raise error("as it is")

    register(orpo_kernels=lambda: [hooks.Kernel(name="x", compute=compute)])
    with pytest.raises(error, match="^as it is$"):
        run_case(make_case(), kernel="x")


def test_a_row_that_a_plugins_format_refuses_is_an_error_of_the_row(register: Callable[..., None]) -> None:
    def parse(row: Any) -> Any:
        raise errors.RowError("column 'good' is empty: drop the row")

    made = hooks.RowFormat(name="x", columns="", matches=lambda row: True, parse=parse)
    register(orpo_row_formats=lambda: [made])
    with pytest.raises(errors.RowError, match=r"^row 5 \(x\): column 'good' is empty: drop the row$"):
        parse_row({}, 5)


def test_every_method_of_a_layout_is_guarded() -> None:
    methods = {name for name in dir(hooks.Layout) if name[0] != "_" and callable(getattr(hooks.Layout, name))}
    assert methods == _PARTS["orpo_layouts"][1].keys()


# ---- built-in parts


def test_everything_built_in_is_registered_through_the_hooks() -> None:
    names = {name for name, _ in get_plugin_manager().list_name_plugin()}
    assert {"orpo-row-formats", "orpo-layout-padded", "orpo-kernel-reference", "orpo-kernel-chunked"} <= names
    assert {"reference", "chunked"} <= {kernel.name for kernel in plugins.kernels()}
    assert {"padded"} <= {layout.name for layout in plugins.layouts()}


def test_built_in_functions_are_not_wrapped() -> None:
    assert plugins.known_kernel("chunked").compute is chunked.chunked_head
    assert plugins.known_kernel("reference").unsupported is reference.unsupported
    assert "collate" not in vars(plugins.layout("padded"))


def test_a_hook_is_called_once_until_plugins_change(register: Callable[..., None]) -> None:
    calls: list[str] = []

    def kernels() -> list[hooks.Kernel]:
        calls.append("")
        return [hooks.Kernel(name="x", compute=broken)]

    register(orpo_kernels=kernels)
    assert plugins.known_kernel("x") is plugins.known_kernel("x")
    assert len(calls) == 1
    register("another", orpo_kernels=lambda: [])
    plugins.known_kernel("x")
    assert len(calls) == 2


def test_an_unknown_hook_is_refused(register: Callable[..., None]) -> None:
    with pytest.raises(errors.PluginError, match="unknown hook 'orpo_kernel' .* The hooks are orpo_kernels, orpo_lay"):
        register("misspelt", orpo_kernel=lambda: [])
    assert not get_plugin_manager().has_plugin("misspelt")


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(errors.ConfigError, match=r"unknown kernel 'fast'; known: auto, chunked,.*reference"):
        plugins.known_kernel("fast")
    with pytest.raises(errors.ConfigError, match=r"unknown kernel 'fast'; known: auto, chunked,.*reference"):
        plugins.kernel("fast", *plugins.stand_ins(torch.float32, CPU))
    with pytest.raises(errors.ConfigError, match=r"unknown layout 'dense'; known: auto,.*padded"):
        plugins.layout("dense")
    with pytest.raises(errors.ConfigError, match="unknown loss term 'dpo'; known: none"):
        plugins.loss_term("dpo")


# ---- which kernel runs


def half_only(hidden: torch.Tensor, weight: torch.Tensor) -> str | None:
    """Why a kernel that multiplies in bf16 alone cannot run."""
    return None if hidden.dtype == weight.dtype == torch.bfloat16 else f"it needs bf16, not {hidden.dtype}"


def test_a_kernel_that_cannot_run_here_says_why(register: Callable[..., None]) -> None:
    register(orpo_kernels=lambda: [hooks.Kernel(name="half", compute=broken, unsupported=half_only, priority=99)])
    single, half = (plugins.stand_ins(dtype, CPU) for dtype in (torch.float32, torch.bfloat16))
    with pytest.raises(
        errors.ConfigError, match="kernel 'half' cannot be used for float32 on cpu: it needs bf16, not torch.float32. U"
    ):
        plugins.kernel("half", *single)
    assert plugins.kernel("auto", *single).name == "chunked"
    assert plugins.kernel("auto", *half).name == "half"


def test_no_kernel_at_all_says_why() -> None:
    with pytest.raises(errors.ConfigError, match=r"no kernel can be used for float32 on meta: .*'chunked': 'hidden is"):
        plugins.kernel("auto", *plugins.stand_ins(torch.float32, torch.device("meta")))


def test_eight_bits_are_refused() -> None:
    operands = plugins.stand_ins(torch.float8_e4m3fn, CPU)
    assert reference.unsupported(*operands) == "hidden is float8_e4m3fn, which is not fp16, bf16, fp32 or fp64"


def test_a_sharded_vocabulary_is_refused_by_name() -> None:
    import torch.distributed as dist
    from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        weight = distribute_tensor(torch.zeros(4, 2), DeviceMesh("cpu", [0]), [Shard(0)])
        with pytest.raises(
            errors.ConfigError, match=r"'chunked' cannot be used .*: weight is a DTensor, sharded as \(S"
        ):
            plugins.kernel("chunked", torch.zeros(3, 2), weight)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("kernel", plugins.kernels(), ids=lambda kernel: kernel.name)
def test_no_kernel_reads_a_number_to_know_whether_it_is_supported(kernel: hooks.Kernel) -> None:
    with FakeTensorMode():  # in which reading one is an error
        hidden, weight = torch.randn(3, 2), torch.randn(5, 2)
        with pytest.raises(DataDependentOutputException):
            bool(weight.isfinite().all())
        assert kernel.unsupported(hidden, weight) in (None, "it needs a CUDA device, the tensors are on cpu")


def test_under_autocast_every_kernel_gets_one_dtype(register: Callable[..., None]) -> None:
    seen: list[torch.dtype] = []

    def compute(hidden: Any, weight: Any, bias: Any, *others: Any) -> hooks.HeadResult:
        seen.extend([hidden.dtype, weight.dtype, bias.dtype])
        return reference.reference_head(hidden, weight, bias, *others)

    register(orpo_kernels=lambda: [hooks.Kernel(name="half", compute=compute, unsupported=half_only)])
    with torch.autocast("cpu", torch.bfloat16):
        _, gradients = run_case(make_case(bias=True), kernel="half")
    assert seen == [torch.bfloat16] * 3
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("adapter", ["ORPOTrainer", "fuse_head"])
def test_what_is_announced_is_what_runs(
    register: Callable[..., None], tmp_path: Path, caplog: pytest.LogCaptureFixture, adapter: str, bf16: bool
) -> None:
    from transformers import Trainer, TrainingArguments

    from orpo_plugins import ORPOLoss, fuse_head

    calls: list[str] = []

    def compute(*arguments: Any) -> hooks.HeadResult:
        calls.append("")
        return chunked.chunked_head(*arguments)

    register(orpo_kernels=lambda: [hooks.Kernel(name="half", compute=compute, unsupported=half_only, priority=99)])
    with caplog.at_level(logging.WARNING):
        if adapter == "ORPOTrainer":
            made: Any = training.trainer(tmp_path, max_steps=1, bf16=bf16)
        else:
            arguments = TrainingArguments(
                str(tmp_path), max_steps=1, bf16=bf16, report_to="none", use_cpu=True, remove_unused_columns=False
            )
            made = Trainer(
                tiny.model(),
                arguments,
                train_dataset=tiny.rows(4),
                data_collator=ORPOCollator(tiny.tokenizer()),
                compute_loss_func=ORPOLoss(),
            )
            fuse_head(made)
        made.train()
    (line,) = [message for message in caplog.messages if "ORPO by orpo-plugins is active" in message]
    assert line.startswith(f"ORPO by orpo-plugins is active: kernel={'half' if bf16 else 'chunked'}, layout=")
    assert line.endswith("; plugin mine (registered in this process)")
    assert bool(calls) == bf16


def test_a_kernel_that_cannot_be_known_beforehand_is_not_announced(tmp_path: Path) -> None:
    from orpo_plugins.integrations.hf_run_start import expected_kernel

    offloaded, args = tiny.model().to("meta"), training.config(tmp_path)
    announced = "auto (chosen at the first batch, as lm_head is sharded or offloaded now)"
    assert expected_kernel("auto", offloaded, args) == announced
    assert expected_kernel("auto", tiny.model(), args) == "chunked"
    assert expected_kernel("triton", offloaded, args) == "triton"
    with pytest.raises(errors.ConfigError, match="kernel 'triton' cannot be used for float32 on cpu: it needs a CUDA"):
        expected_kernel("triton", tiny.model(), args)


# ---- the document


def section(hook: str) -> str:
    """What docs/plugins.md says of a hook."""
    found = re.search(rf"^## [^\n]*`{hook}`.*?(?=^## |\Z)", DOCUMENT, re.MULTILINE | re.DOTALL)
    assert found, f"docs/plugins.md has no section on {hook}"
    return found[0]


def examples(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_is_documented_with_its_signature_and_all_fields(hook: str) -> None:
    specification = getattr(hookspecs, hook)
    assert specification.__doc__
    kind = _PARTS[hook][0]
    assert f"{hook}() -> Sequence[{kind.__name__}]" in section(hook)
    assert str(inspect.signature(specification)).endswith(f"Sequence[{kind.__module__}.{kind.__name__}]")
    names = {field.name for field in fields(kind)} if is_dataclass(kind) else {*dir(kind), *kind.__annotations__}
    for name in names:
        assert name.startswith("_") or f"| `{name}" in section(hook), name


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set:UserWarning")  # readers have an accelerator
@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_has_an_example_that_runs(hook: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = examples(section(hook))
    assert blocks, f"docs/plugins.md has no example for {hook}"
    manager = get_plugin_manager()
    for block in blocks:
        before = manager.get_plugins()
        try:
            exec(block, {"model": tiny.model(), "tokenizer": tiny.tokenizer(), "rows": tiny.rows(4)})
            (plugin,) = manager.get_plugins() - before
            assert [called.name for called in manager.get_hookcallers(plugin) or []] == [hook]
        finally:
            for plugin in manager.get_plugins() - before:
                manager.unregister(plugin)


def test_no_example_stands_outside_of_these_sections() -> None:
    assert sum(len(examples(section(hook))) for hook in HOOKS) == len(examples(DOCUMENT))
