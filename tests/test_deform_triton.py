"""The GPU kernels of 3-D deformable convolution against its definition: run by Triton's interpreter on the CPU,
compiled for cards that are not here, and on a card where there is one.

The interpreter is a switch that Triton reads when it is imported, and torch may have imported it: these runs are
processes of their own, this file as a program.
"""

import inspect
import os
import subprocess
import sys
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from enfilade.ops import deform
from enfilade.ops.deform import deform_conv3d, deform_conv3d_reference
from test_deform import gradients, problem

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton, which torch for Linux brings")

# The interpreter takes a tenth of a second for a tap: few taps, of few positions.
CASES = {
    "every axis of its own": (
        (1, 3, 5, 4, 6),
        (2, 3, 2, 3, 2),
        {"stride": (2, 1, 3), "padding": (0, 2, 1), "dilation": (3, 1, 2)},
    ),
    "batch": ((2, 4, 3, 2, 3), (5, 4, 1, 2, 1), {"padding": (0, 1, 0)}),
    "groups that cross": ((1, 6, 3, 3, 2), (4, 3, 1, 1, 2), {"groups": 2, "offset_groups": 3, "dilation": 2}),
    "more than a block of each": ((1, 20, 5, 4, 4), (70, 20, 1, 1, 2), {"padding": 0, "dilation": 1}),
    "one voxel": ((1, 1, 1, 1, 1), (1, 1, 1, 1, 1), {}),
}
SMALL = CASES["batch"]
FAR = (-1e9, float("inf"))
HALF = (torch.bfloat16, torch.float16)
NAMES = ("x", "offsets", "weight", "bias")


def far_away(far):
    (x, offsets, weight, bias), _ = problem(*SMALL, spread=0.0)
    return x, offsets + far, weight, bias


def with_nan():
    (x, offsets, weight, bias), _ = problem(*SMALL)
    offsets[1, 4, 1, 1, 2] = float("nan")
    return x, offsets, weight, bias


def in_half(dtype):
    """All but the bias, which a network in mixed precision keeps."""
    (x, offsets, weight, bias), _ = problem(*SMALL)
    return x.to(dtype), offsets.to(dtype), weight.to(dtype), bias


def asked_for(i):
    """The gradient of one tensor alone."""
    tensors, _ = problem(*SMALL)
    one = [t.requires_grad_(i == j) for j, t in enumerate(tensors)]
    out = deform_conv3d(*one, **SMALL[2])
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return torch.autograd.grad(out, one[i], direction)[0]


# -------------------------------------------------------------------------------------------- the interpreter's answers


def program(task, path, **environment):
    done = subprocess.run(
        [sys.executable, __file__, task, str(path)],
        env={**os.environ, "TRITON_CACHE_DIR": str(path.parent / "triton"), **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return torch.load(path)


def interpret(path):
    """The program's part: the public function with the kernels in the place of the loops, all cases."""
    from enfilade.ops import deform_triton

    deform_triton._PROGRAMS = 8  # so that one share of some cases has several blocks, and some have several shares
    calls = []

    def counted(function):
        return lambda *args: (calls.append(function.__name__), function(*args))[1]

    library = torch.library.Library("enfilade", "IMPL")
    library.impl("deform_conv3d", counted(deform_triton.forward), "CPU", allow_override=True)
    library.impl("deform_conv3d_backward", counted(deform_triton.backward), "CPU", allow_override=True)
    found = {name: gradients(deform_conv3d, problem(*case)[0], case[2]) for name, case in CASES.items()}
    found |= {far: gradients(deform_conv3d, far_away(far), SMALL[2]) for far in FAR}
    found |= {f"only {NAMES[i]}": asked_for(i) for i in range(4)}
    found["nan"] = deform_conv3d(*with_nan(), **SMALL[2])
    deform.has_kernels = lambda x: True  # of a CPU's tensors only float32 would go to the operator
    found |= {dtype: gradients(deform_conv3d, in_half(dtype), SMALL[2]) for dtype in HALF}
    torch.save({**found, "calls": calls}, path)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    return program("interpret", tmp_path_factory.mktemp("deform") / "found.pt", TRITON_INTERPRET="1")


def test_it_was_the_kernels(interpreted):
    pairs = len(CASES) + len(FAR) + 4 + len(HALF)
    assert interpreted["calls"].count("forward") == pairs + 1
    assert interpreted["calls"].count("backward") == pairs


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_the_reference_s(case, interpreted):
    options = CASES[case][2]
    tensors, _ = problem(*CASES[case])
    out, found = interpreted[case]
    expected, references = gradients(deform_conv3d_reference, tensors, options)
    # Sums of some hundred products of numbers around one, in another order
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=3e-5)
    for name, ours, reference in zip(NAMES, found, references):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_samples_leave_the_volume():
    """What the cases are for: places inside, across each border and beyond it."""
    (x, offsets, weight, _), _ = problem(*CASES["every axis of its own"])
    inside = deform_conv3d_reference(
        torch.ones_like(x), offsets, weight.abs(), None, **CASES["every axis of its own"][2]
    )
    whole = weight.abs().sum((1, 2, 3, 4))[:, None, None, None]
    assert (inside < 0.9 * whole).any()
    assert (inside > 0.1 * whole).any()


@pytest.mark.parametrize("far", FAR)
def test_far_outside_is_only_the_bias(far, interpreted):
    out, (to_x, to_offsets, to_weight, _) = interpreted[far]
    bias = far_away(far)[3]
    torch.testing.assert_close(out, bias[:, None, None, None].expand_as(out), rtol=0, atol=0)
    assert not to_x.any()
    assert not to_offsets.any()
    assert not to_weight.any()


def test_nan_stays_where_it_is(interpreted):
    expected = deform_conv3d_reference(*with_nan(), **SMALL[2])
    assert expected.isnan().sum() == expected.shape[1]
    torch.testing.assert_close(interpreted["nan"], expected, rtol=1e-5, atol=3e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_summed_in_single(dtype, interpreted):
    """The same rounded inputs in float32; results are rounded once, and the output's gradient is what autograd sees."""
    out, found = interpreted[dtype]
    tensors = in_half(dtype)
    assert out.dtype == dtype
    assert [t.dtype for t in found] == [t.dtype for t in tensors]

    def rounded(*args, **options):
        return deform_conv3d_reference(*args, **options).to(dtype)

    expected, references = gradients(rounded, [t.float() for t in tensors], SMALL[2])
    once = {"rtol": torch.finfo(dtype).eps, "atol": 3e-5}
    torch.testing.assert_close(out, expected, **once)
    for name, ours, reference in zip(NAMES, found, references):
        torch.testing.assert_close(ours, reference.to(ours.dtype), **once, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("name", NAMES)
def test_only_what_is_asked_is_differentiated(name, interpreted):
    all_four = interpreted["batch"][1][NAMES.index(name)]
    torch.testing.assert_close(interpreted[f"only {name}"], all_four, rtol=1e-6, atol=1e-6)


# --------------------------------------------------------------------------------------------- compiled, without a card


class Card:
    """What Triton asks of a driver before it compiles for one."""

    def __init__(self, capability):
        self.capability = capability

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return self.capability  # by its number Triton keeps what it compiled

    def get_current_stream(self, device):
        return 0


def compile_all(path):
    """The program's part: the launches as they are, of tensors on the CPU, but each stops when it is compiled."""
    import triton
    from triton.runtime import driver

    import conftest  # noqa: F401 - with the checks of shapes, as tests on a card have them
    from enfilade.ops import deform_triton

    made = []

    def launch(kernel, grid):
        def compiled(*args, **options):
            assembly = kernel.warmup(*args, grid=grid, **options).asm
            made.append((kernel.fn.__name__, assembly["ptx"], assembly["cubin"]))

        return compiled

    triton.KernelInterface.__getitem__ = launch
    torch.cuda.device_of = lambda x: nullcontext()
    for capability, name, dtype, needed in (
        (90, "more than a block of each", torch.float32, [True, True, True]),
        # Every number that may become a constant of a kernel does.
        (80, "one voxel", torch.bfloat16, [False, True, True]),
    ):
        driver.set_active(Card(capability))
        (x, offsets, weight, bias), given = problem(*CASES[name])
        x, offsets, weight, given = (t.to(dtype) for t in (x, offsets, weight, given))
        shape = (1,) * 3, (0,) * 3, (1,) * 3, 1, 1
        deform_triton.forward(x, offsets, weight, bias, *shape)
        deform_triton.backward(given, x, offsets, weight, *shape, needed)
    torch.save(made, path)


def test_the_kernels_compile_for_cards(tmp_path):
    made = program("compile", tmp_path / "made.pt", TRITON_INTERPRET="0")
    assert [name for name, _, _ in made] == ["_forward", "_backward", "_to_weight"] * 2
    for i, (_, ptx, cubin) in enumerate(made):
        assert f".target sm_{90 if i < 3 else 80}" in ptx
        assert cubin[:4] == b"\x7fELF"  # PTX that ptxas took
        assert "tf32" not in ptx  # products of whole float32 numbers
    # Only the gradient of x, which the second did not ask for, is summed in memory.
    atomic = ["atom.global" in ptx or "red.global" in ptx for _, ptx, _ in made]
    assert atomic == [False, True, False, False, False, False]


# -------------------------------------------------------------------------------------------------- which form is taken


def test_when_the_kernels_are_taken(monkeypatch):
    """With tensors that have a card's name and no numbers."""
    monkeypatch.setattr(deform, "_triton_works", lambda device: True)
    with FakeTensorMode():
        x = torch.empty(1, 2, 3, 3, 3, device="cuda")
        assert all(deform.has_kernels(x.to(dtype)) for dtype in (torch.float32, *HALF))
        assert not deform.has_kernels(x.double())
        assert not deform.has_kernels(x.cpu())
        torch.use_deterministic_algorithms(True)
        try:
            assert not deform.has_kernels(x)
        finally:
            torch.use_deterministic_algorithms(False)
        monkeypatch.setattr(deform, "_triton_works", lambda device: False)
        assert not deform.has_kernels(x)


def test_where_triton_fails_it_is_told():
    """It does on a CPU, unless interpreted."""
    with pytest.warns(
        UserWarning, match=r"deformable convolutions run torch operations on cpu: Triton fails there \(.+\)"
    ):
        assert not inspect.unwrap(deform._triton_works)(torch.device("cpu"))


@pytest.mark.parametrize("kernels", [True, False])
def test_the_public_function_asks(kernels, monkeypatch):
    """The operator with kernels, and else the torch operations, as far as fake tensors show it."""
    monkeypatch.setattr(deform, "has_kernels", lambda x: kernels)
    reference, calls = deform._reference, []
    monkeypatch.setattr(deform, "_reference", lambda *args, **kw: (calls.append(kw), reference(*args, **kw))[1])
    with FakeTensorMode():
        tensors = [torch.empty_like(t, device="cuda", dtype=torch.bfloat16) for t in problem(*SMALL)[0]]
        out = deform_conv3d(*tensors, **SMALL[2])
    assert out.dtype == torch.bfloat16
    assert out.shape == (2, 5, 3, 3, 3)
    assert calls == ([] if kernels else [{"frugal": True}])


# ------------------------------------------------------------------------------------------------------------ on a card

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_a_card_gives_what_the_cpu_gives(case, dtype):
    tensors, _ = problem(*CASES[case])
    tensors, options = [t.to(dtype) for t in tensors], CASES[case][2]
    assert deform.has_kernels(tensors[0].cuda()), "Triton should work here"

    def on_card(*args, **options):
        return deform_conv3d(*(t.cuda() for t in args), **options).cpu()

    out, found = gradients(on_card, tensors, options)
    expected, references = gradients(deform_conv3d, tensors, options)
    once = {"rtol": max(1e-4, torch.finfo(dtype).eps), "atol": max(1e-4, torch.finfo(dtype).eps)}
    torch.testing.assert_close(out, expected, **once)
    for name, ours, reference in zip(NAMES, found, references):
        torch.testing.assert_close(ours, reference, **once, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.gpu
@gpu
def test_a_card_takes_a_whole_room():
    """IMENet's volume; only the gradient of x may differ between runs."""
    tensors, _ = problem((1, 12, 60, 36, 60), (12, 12, 3, 3, 3), {})
    tensors = [t.cuda() for t in tensors]

    def plain(x, offsets, weight, bias):
        g = deform._geometry(x, offsets, weight, bias, 1, None, 1, 1, 1)
        return deform._reference(x, offsets, weight, bias, g, 1, 1, frugal=True)

    out = deform_conv3d(*tensors)
    torch.testing.assert_close(out, plain(*tensors), rtol=1e-3, atol=1e-3)
    first, second = (
        torch.autograd.grad(deform_conv3d(*(t.requires_grad_() for t in tensors)).square().sum(), tensors)
        for _ in range(2)
    )
    torch.testing.assert_close(first[0], second[0], rtol=1e-3, atol=1e-3)
    for one, other in zip(first[1:3], second[1:3]):
        assert torch.equal(one, other)


if __name__ == "__main__":
    {"interpret": interpret, "compile": compile_all}[sys.argv[1]](Path(sys.argv[2]))
