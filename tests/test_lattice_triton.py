"""The lattice's kernels in Triton's interpreter, against torch operations, dense matrices and exact Gaussians; compiled
for GPUs without one; and on a GPU against the CPU.

This file is also the program that runs the kernels: `python test_lattice_triton.py CASES RESULTS`, with
TRITON_INTERPRET=1, which must be set before anything imports Triton, as other tests may have done.
"""

import os
import subprocess
import sys

import pytest
import torch

import enfilade.ops
from enfilade.ops import crf, lattice
from enfilade.ops.lattice import Lattice, filter

triton = pytest.importorskip("triton", reason="needs Triton, which comes with torch for GPUs")
from enfilade.ops import lattice_triton  # noqa: E402

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

SIZE = (2, 3, 4)  # b h w
CASES = [(d, c) for d in (2, 3, 5) for c in (1, 3, 40, 65)] + [(2, 130)]  # 130: more than a program takes at once


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def features(dimension):
    """Of two images whose points share some of their vertices."""
    b, h, w = SIZE
    return 0.9 / dimension**0.5 * random(b, dimension, h, w, seed=dimension)


def walls():
    """Two uniform walls: three vertices with 600 corners each, in three pieces, and three with 20."""
    out = torch.full((1, 2, 20, 31), 0.3)
    out[:, 0, :, 30:] = 9
    return out


def parts(grid):
    return {"size": grid.size, "offsets": grid.offsets, "weights": grid.weights, "neighbours": grid.neighbours}


def problem(f, channels):
    """A lattice and what goes through it; `table` has values in empty space too, which no splat puts there."""
    grid = Lattice.build(f)
    b, h, w = grid.size
    x, y = random(b, channels, h, w), random(b, channels, h, w, seed=1)
    return {"grid": parts(grid), "x": x, "y": y, "table": random(grid.vertices, channels, seed=2)}


def problems():
    out = {f"{d} {c}": problem(features(d), c) for d, c in CASES} | {"walls": problem(walls(), 3)}
    for i in range(2):
        alone = problem(features(3)[i : i + 1], 3)
        out[f"image {i}"] = {**alone, **{name: out["3 3"][name][i : i + 1] for name in ("x", "y")}}
    for d in (2, 3, 5):
        one = torch.eye(12).view(1, 12, *SIZE[1:]).expand(2, -1, -1, -1)
        out[f"matrix {d}"] = {**problem(features(d), 12), "x": one, "y": one}
    return out


def solve(x, y, table, grid):
    """What the kernels make of a problem."""
    grid = Lattice(**grid)
    n, c = len(grid.offsets), x.shape[1]
    rows = x.permute(0, 2, 3, 1).reshape(n, c)
    found = {
        "splat": lattice_triton.splat(rows, grid.corners, grid.weights, grid.vertices),
        "blur": lattice_triton.blur(table, grid.neighbours[0]),
        "slice": lattice_triton.slice_rows(table, grid.offsets, grid.weights, 0.75),
        "filter": lattice_triton.filter(x, grid, False),
        "adjoint": lattice_triton.filter(y, grid, True),
    }
    if c == 3:  # the public function, its gradient and that of a sum, which comes in as one number for all
        x = x.clone().requires_grad_()
        out = filter(x, grid, normalise="symmetric")
        found["public"], found["ones"] = out.detach(), filter(torch.ones(()).expand(x.shape), grid)
        (found["gradient"],) = torch.autograd.grad((out * y).sum(), x, retain_graph=True)
        (found["sum"],) = torch.autograd.grad(out.sum(), x)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert lattice_triton.available(torch.device("cpu"))
    lattice._filter_compiled = lattice_triton.filter  # so that a CPU takes the GPU's way
    torch.save({name: solve(**case) for name, case in torch.load(sys.argv[1]).items()}, sys.argv[2])
    sys.exit()


@pytest.fixture(scope="module")
def cases():
    return problems()


@pytest.fixture(scope="module")
def found(cases, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernels")
    torch.save(cases, folder / "cases.pt")
    command = [sys.executable, __file__, str(folder / "cases.pt"), str(folder / "results.pt")]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "results.pt")


NAMES = [f"{d} {c}" for d, c in CASES] + ["walls"]


def close(found, exact):
    """Sums of some tens to hundreds of terms about 1 in size, in another order and precision."""
    torch.testing.assert_close(found.double(), exact.double(), rtol=1e-5, atol=1e-4 if len(exact) == 1 else 1e-5)


def dense(grid):
    """S, n m, and the B_j, m m each: the operator of the module's docstring, term by term."""
    n, m = len(grid.offsets), grid.vertices
    s, blurs = torch.zeros(n, m, dtype=torch.float64), []
    for i in range(n):
        for vertex, weight in zip(grid.offsets[i].tolist(), grid.weights[i].tolist()):
            s[i, vertex] += weight
    for neighbours in grid.neighbours:
        b = torch.eye(m, dtype=torch.float64)
        for vertex, beside in enumerate(neighbours.tolist()):
            for other in beside:
                b[vertex, other] += 0.5
        blurs.append(b)
    return s, blurs


@pytest.mark.parametrize("name", [f"{d} {c}" for d, c in CASES])
def test_each_kernel_is_its_matrix(cases, found, name):
    case = cases[name]
    grid = Lattice(**case["grid"])
    s, blurs = dense(grid)
    rows = case["x"].permute(0, 2, 3, 1).flatten(0, 2).double()
    close(found[name]["splat"], s.T @ rows)
    close(found[name]["blur"], blurs[0] @ case["table"].double())
    close(found[name]["slice"], 0.75 * s @ case["table"].double())
    assert (found[name]["splat"][0] == 0).all()  # empty space


@pytest.mark.parametrize("name", NAMES)
def test_the_whole_filter_agrees_with_torch_operations(cases, found, name):
    case = cases[name]
    grid = Lattice(**case["grid"])
    close(found[name]["filter"], lattice._filter_torch(case["x"].double(), grid, False))
    close(found[name]["adjoint"], lattice._filter_torch(case["y"].double(), grid, True))


@pytest.mark.parametrize("name", NAMES)
def test_the_transposed_filter_is_the_adjoint(cases, found, name):
    x, y = (cases[name][k].double() for k in "xy")
    one, other = (found[name]["filter"] * y).sum(), (x * found[name]["adjoint"]).sum()
    size = found[name]["filter"].norm() * y.norm()
    assert abs(one - other) <= 1e-6 * size


@pytest.mark.parametrize("dimension", [2, 3, 5])
def test_the_kernels_approximate_the_gaussian(found, dimension):
    """As test_lattice.py has it for the compiled loops, with the same bound."""
    f = features(dimension).flatten(2).mT
    exact = torch.exp(-0.5 * torch.cdist(f, f).square())
    exact = exact / exact.sum(2, keepdim=True)
    result = found[f"matrix {dimension}"]
    k, adjoint = result["filter"].flatten(2).mT, result["adjoint"].flatten(2)
    torch.testing.assert_close(k, adjoint, rtol=1e-5, atol=1e-6)
    k = k / k.sum(2, keepdim=True)
    for i in range(2):
        assert (k[i] - exact[i]).norm() / exact[i].norm() < 0.05 + 0.03 * dimension


def test_a_batch_is_its_images(found):
    for name in ("filter", "adjoint"):
        alone = torch.cat([found[f"image {i}"][name] for i in range(2)])
        torch.testing.assert_close(found["3 3"][name], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["2 3", "3 3", "5 3", "walls"])
def test_the_public_filter_and_its_gradient(cases, found, name):
    case = cases[name]
    grid = Lattice(**case["grid"])
    x = case["x"].double().requires_grad_()
    out = filter(x, grid, normalise="symmetric")
    torch.testing.assert_close(found[name]["public"].double(), out, rtol=1e-4, atol=1e-5)
    for what, loss in (("gradient", (out * case["y"]).sum()), ("sum", out.sum())):
        (gradient,) = torch.autograd.grad(loss, x, retain_graph=True)
        torch.testing.assert_close(found[name][what].double(), gradient, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[name]["ones"], torch.ones_like(case["x"]))  # a weighted mean


@pytest.mark.parametrize("piece", [1, 7, 256])
def test_corners_come_in_pieces_of_a_vertex(monkeypatch, piece):
    monkeypatch.setattr(lattice_triton, "PIECE", piece)
    for f in (features(5), walls()[:, :, ::6]):
        grid = Lattice.build(f)
        corners = grid.corners
        flat, owner = grid.offsets.flatten(), {i: i for i in range(grid.vertices)}
        for vertex, start, stop in corners.long.tolist():
            owner |= dict.fromkeys(range(start, stop), vertex)
        seen = []
        for i, (start, stop) in enumerate(corners.pieces.tolist()):
            part = corners.order[start:stop]
            assert len(part) <= piece
            assert (flat[part] == owner[i]).all()
            seen += part.tolist()
        assert len(owner) == len(corners.pieces)
        assert sorted(seen) == list(range(len(flat)))  # each corner once


TYPES = {torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64", int: "i32", float: "fp32"}


@pytest.mark.parametrize(("capability", "channels"), [(80, 3), (90, 40)])
def test_kernels_compile_for_a_gpu(monkeypatch, tmp_path, capability, channels):
    """As they are launched, to machine code, which takes no GPU."""
    if not isinstance(lattice_triton._blur, triton.runtime.JITFunction):
        pytest.skip("needs TRITON_INTERPRET unset: the interpreter has taken the kernels")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launches = {}
    monkeypatch.setattr(
        lattice_triton, "_launch", lambda kernel, _, *args, **constants: launches.update({kernel: (args, constants)})
    )
    lattice_triton.filter(random(*SIZE[:1], channels, *SIZE[1:]), Lattice.build(features(3)), False)
    assert len(launches) == 4
    for kernel, (args, constants) in launches.items():
        types = [TYPES[a.dtype if isinstance(a, torch.Tensor) else type(a)] for a in args]
        signature = dict(zip(kernel.arg_names, types)) | dict.fromkeys(constants, "constexpr")
        aligned = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(types) if t.startswith("*")}
        source = triton.compiler.ASTSource(kernel, signature, constants, aligned)
        target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
        compiled = triton.compile(source, target=target, options={"enable_fp_fusion": True}).asm
        ptx = compiled["ptx"]
        assert f".entry {kernel.__name__}(" in ptx
        assert f".target sm_{capability}" in ptx
        assert compiled["cubin"].startswith(b"\x7fELF")
        # Nothing is added atomically, so results repeat; and nothing is kept out of registers.
        assert not [word for word in ("atom.", "red.global", ".local") if word in ptx]
        # Rows of 40 channels begin with whole vectors.
        assert channels != 40 or kernel is lattice_triton._collect or "ld.global.v4" in ptx


def test_without_triton_torch_operations_stay(monkeypatch):
    monkeypatch.delattr(enfilade.ops, "lattice_triton")
    monkeypatch.setitem(sys.modules, "enfilade.ops.lattice_triton", None)
    assert lattice._kernels.__wrapped__(torch.device("cuda", 0)) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_where_triton_fails_torch_operations_stay():
    with pytest.warns(UserWarning, match=r"lattices run torch operations on cuda:0: Triton fails there \(.+\)$"):
        assert lattice._kernels.__wrapped__(torch.device("cuda", 0)) is None
    for other in ("cpu", "meta"):
        assert lattice._kernels(torch.device(other)) is None
        assert not lattice_triton.available(torch.device(other))


def scene(height, width, batch):
    """Features of a photo, roughly: places and colours in soft areas, with uniform ones among them."""
    y, x = torch.meshgrid(torch.arange(float(height)), torch.arange(float(width)), indexing="ij")
    areas = torch.rand(batch, 3, height // 16, width // 16, generator=torch.Generator().manual_seed(0))
    colours = torch.nn.functional.interpolate(areas, (height, width), mode="bilinear").mul(6).round() * 4
    return torch.cat([torch.stack([x, y]).expand(batch, -1, -1, -1) / 40, colours], 1)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("channels", [1, 3, 40, 65, 130])
@pytest.mark.parametrize("normalise", ["row", "symmetric", "none"])
def test_a_gpu_computes_the_same(monkeypatch, channels, normalise):
    monkeypatch.setattr(lattice, "_filter_torch", None)  # the kernels, and nothing else
    for f in (features(2), features(3), features(5), walls(), scene(96, 128, 2)):
        b, _, h, w = f.shape
        x, y = random(b, channels, h, w), random(b, channels, h, w, seed=1)
        results = []
        for device in ("cpu", "cuda", "cuda"):
            leaf, grid = x.clone().to(device).requires_grad_(), Lattice.build(f.to(device))
            out = filter(leaf, grid, normalise=normalise)
            (gradient,) = torch.autograd.grad((out * y.to(device)).sum(), leaf)
            results.append((out.detach().cpu(), gradient.cpu()))
        for cpu, gpu, again in zip(*results):
            torch.testing.assert_close(gpu, cpu, rtol=1e-4, atol=1e-5 * cpu.abs().max().item())
            assert torch.equal(gpu, again)


@pytest.mark.gpu
@needs_gpu
def test_mean_field_on_a_gpu_computes_the_same():
    image, unary = torch.rand(1, 3, 48, 64, generator=torch.Generator().manual_seed(0)), 2 * random(1, 5, 48, 64)
    kernels = (crf.Kernel(xy=8.0, rgb=60.0), crf.Kernel(xy=3.0))
    weights = torch.tensor([4.0, 3.0])[:, None, None] * torch.eye(5) + 0.3 * random(2, 5, 5)
    results = []
    for device in ("cpu", "cuda"):
        leaves = [t.clone().to(device).requires_grad_() for t in (unary, weights, crf.potts(5))]
        out = crf.mean_field(leaves[0], crf.build_lattices(kernels, image.to(device)), leaves[1], leaves[2], 3)
        results.append([t.cpu() for t in (out.detach(), *torch.autograd.grad(out.sin().sum(), leaves))])
    for cpu, gpu in zip(*results):
        # The CPU leaves small messages to oneself out and rounds Q there: see test_crf.py.
        assert (cpu - gpu).abs().max() <= 4e-4 * gpu.abs().max() + 5e-4
