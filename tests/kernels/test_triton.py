"""The Triton head: its arithmetic through Triton's interpreter, and the device itself where there is one."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from orpo_plugins import hooks
from orpo_plugins.errors import ConfigError
from orpo_plugins.hooks import plugins
from orpo_plugins.kernels.fused_head import _FusedHead
from orpo_plugins.kernels.triton_head import unsupported
from tests.kit import ROOT
from tests.kit.compare import assert_all_within, assert_within, relative_difference
from tests.kit.kernel_cases import make_case, run_case

CASES = {
    "one pair, one token": {"pairs": 1, "length": 1, "width": 1, "vocabulary": 2},
    "odd everything": {"pairs": 2, "length": 7, "width": 33, "vocabulary": 131},
    "answers of one token": {"pairs": 3, "length": 4, "ignored": 1.0, "vocabulary": 67},
    "prompts in the NLL alone": {"pairs": 1, "length": 8, "prompt": 4, "vocabulary": 67},
    "bias": {"pairs": 1, "length": 5, "bias": True, "vocabulary": 67},
    "bf16": {"pairs": 1, "length": 6, "bias": True, "vocabulary": 67, "scale": 0.3, "dtype": torch.bfloat16},
}
TRANSFORMS = {"plain": {}, "soft-cap and scale": {"softcap": 3.0, "logit_scale": 0.5}}
KEPT = {"computed again": 0, "kept": 2**26}
NAMES = [
    *((case, "plain", "computed again") for case in CASES),
    *(("odd everything", *options) for options in [("plain", "kept"), ("soft-cap and scale", "computed again")]),
    ("bias", "soft-cap and scale", "kept"),
]


def differences(case, transform, kept):
    """Largest relative differences from the reference in float64: {name: value}."""
    from orpo_plugins.hooks.types import Kernel
    from orpo_plugins.kernels import tiling, triton_head

    class OnAnyDevice:
        @staticmethod
        @hooks.hookimpl
        def orpo_kernels():
            return [Kernel(name="interpreted", compute=triton_head.triton_head)]

    manager = plugins.get_plugin_manager()
    if not manager.has_plugin("interpreted"):
        manager.register(OnAnyDevice, name="interpreted")
        small = {"targets": 5, "columns": 64, "grad_targets": 7, "grad_columns": 24}
        plan = tiling.Tiling.plan

        def cut(count, weight, options, **named):
            planned = plan(count, weight, options, **named)
            return tiling.Tiling(**small, kept=-(-len(weight) // 64) if planned.kept else 0)

        tiling.Tiling.plan = cut
    made = make_case(**CASES[case])
    options = TRANSFORMS[transform]
    actual = run_case(made, kernel="interpreted", memory_budget=KEPT[kept], **options)
    expected = run_case(made.to(torch.float64), kernel="reference", **options)
    found = {name: relative_difference(actual[1][name], expected[1][name]) for name in expected[1]}
    for name in ("loss", "chosen_logps", "rejected_logps"):
        found[name] = relative_difference(getattr(actual[0], name), getattr(expected[0], name))
    return found


@pytest.fixture(scope="module")
def interpreted():
    """All cases in one process, because triton reads TRITON_INTERPRET when it is imported."""
    pytest.importorskip("triton", reason="triton comes with torch on Linux only")
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    code = (
        # Memory that was not written is NaN then, the padding of tiles too.
        "import json, torch; torch.use_deterministic_algorithms(True); from tests.kernels import test_triton as t; "
        "print(json.dumps({'/'.join(name): t.differences(*name) for name in t.NAMES}))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", NAMES, ids="/".join)
def test_interpreted_equals_the_reference(interpreted, name):
    allowed = 1e-2 if name[0] == "bf16" else 5e-6
    for what, difference in interpreted["/".join(name)].items():
        assert difference <= allowed, f"{what} differs by {difference:.1e}"


def test_a_cpu_is_refused_by_name_and_passed_over_by_auto():
    operands = plugins.stand_ins(torch.float32, torch.device("cpu"))
    assert unsupported(*operands) == "it needs a CUDA device, the tensors are on cpu"
    with pytest.raises(ConfigError, match="kernel 'triton' cannot be used for float32 on cpu: it needs a CUDA device"):
        run_case(make_case(), kernel="triton")
    assert plugins.kernel("auto", *operands).name == "chunked"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kernel", ["triton", "chunked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT)
def test_equals_the_reference_on_a_gpu(kernel, dtype, kept):
    made = make_case(pairs=3, length=301, width=129, vocabulary=20011, bias=True, prompt=40, scale=0.2)
    case = on_gpu(made.to(dtype))
    options = {"softcap": 20.0, "logit_scale": 0.5}
    actual = run_case(case, kernel=kernel, memory_budget=kept and 2**32, **options)
    again = run_case(case, kernel=kernel, memory_budget=kept and 2**32, **options)
    expected = run_case(on_gpu(made.to(dtype).to(torch.float64)), kernel="reference", **options)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 2e-3}[dtype]
    assert_within(actual[0].loss, expected[0].loss, min(tolerance, 1e-4))
    assert_all_within(actual[1], expected[1], tolerance)
    assert all(torch.equal(actual[1][name], again[1][name]) for name in actual[1])


@pytest.mark.parametrize("unit", [None, torch.tensor(0.25)], ids=["no unit", "fp16's unit"])
def test_an_incoming_factor_has_a_dimension_on_a_gpu_so_that_it_stays_in_fp32(unit):
    class OnGPU(torch.Tensor):
        is_cuda = True

    class Gradient:
        def mul_(self, factor):
            self.computed_in = torch.result_type(torch.empty(2, 3, dtype=torch.float16), factor)
            self.factor = factor.item()
            return self

    gradients = [Gradient(), None, Gradient()]
    ctx = SimpleNamespace(unit=unit, gradients=list(gradients))
    _FusedHead.backward(ctx, torch.tensor(2.0**17).as_subclass(OnGPU))
    for gradient in gradients[::2]:
        assert gradient.computed_in == torch.float32
        assert gradient.factor == (2.0**17 if unit is None else 2.0**15)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_incoming_factor_is_not_rounded_to_16_bits_on_a_gpu():
    case = on_gpu(make_case(pairs=2, length=60, width=64, vocabulary=1031, dtype=torch.bfloat16, scale=0.3))
    _, whole = run_case(case, kernel="triton")
    _, third = run_case(case, kernel="triton", upstream=1 / 3)
    for name, gradient in third.items():  # 1/3 in bf16 is off by 2e-3; roundings of single entries average out
        ratio = gradient.double().norm() / whole[name].double().norm()
        assert abs(3 * ratio.item() - 1) < 3e-4, name


def on_gpu(case):
    """The case's tensors moved to the current device."""
    from dataclasses import fields, replace

    tensors = {field.name: getattr(case, field.name) for field in fields(case)}
    return replace(case, **{name: None if tensor is None else tensor.cuda() for name, tensor in tensors.items()})
