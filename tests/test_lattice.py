"""The permutohedral lattice against exact Gaussians over all pairs of pixels, and its compiled loops against torch."""

import inspect

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from enfilade.errors import UserError
from enfilade.ops.lattice import Lattice, filter, gaussian_reference


def scene(height, width, channels, seed=0, batch=1):
    """Smooth areas with soft edges between them, and a little noise: the statistics of a photo, roughly."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch, channels, max(height // 8, 2), max(width // 8, 2), generator=generator)
    areas = F.interpolate(coarse, (height, width), mode="bicubic").mul(4).round() / 4
    areas = F.avg_pool2d(areas, 3, 1, 1, count_include_pad=False)
    return (areas + 0.02 * torch.randn(areas.shape, generator=generator)).clamp(0, 1)


def features(height, width, xy, *others, batch=1):
    """x and y by `xy`, then each (channels, theta) of a scene in 0..255 by its theta."""
    y, x = torch.meshgrid(torch.arange(float(height)), torch.arange(float(width)), indexing="ij")
    parts = [torch.stack([x, y]).expand(batch, 2, height, width) / xy]
    parts += [scene(height, width, c, seed=i, batch=batch) * 255 / theta for i, (c, theta) in enumerate(others)]
    return torch.cat(parts, 1)


def values(height, width, channels=4, batch=1, seed=9):
    return scene(height, width, channels, seed, batch) + 0.1


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def matrix(grid, transpose=False):
    """K of an image, or K^T, with the rows of the matrix as rows."""
    _, h, w = grid.size
    one = torch.eye(h * w).view(1, h * w, h, w)
    return filter(one, grid, normalise="none", transpose=transpose)[0].flatten(1).T


# The lattice's own error: performance.md's figures on photographs are 1-3 % in two dimensions, 4 % in three and 4-8 %
# in five. Small images have more border, so there is some room above them.
@pytest.mark.parametrize(
    ("space", "bound"),
    [((3.0,), 0.03), ((8.0,), 0.04), ((10.0, (1, 25.0)), 0.06), ((12.0, (3, 20.0)), 0.1), ((20.0, (3, 13.0)), 0.1)],
)
@pytest.mark.parametrize("normalise", ["row", "symmetric"])
def test_filter_approximates_the_gaussian(space, bound, normalise):
    f, x = features(40, 52, *space), values(40, 52)
    found, exact = filter(x, Lattice.build(f), normalise=normalise), gaussian_reference(x, f, normalise=normalise)
    assert (found - exact).norm() / exact.norm() < bound
    # It must see the values: their mean alone, the crudest filter, is much further off.
    assert (found - exact).norm() < 0.5 * (x.mean((2, 3), keepdim=True) - exact).norm()


def test_unnormalised_sums_are_too_small_by_at_most_a_constant():
    """Why the module says to normalise."""
    for space, least, most in (((5.0,), 1.0, 1.3), ((15.0, (3, 15.0)), 1.5, 2.5)):
        f = features(32, 32, *space)
        exact = gaussian_reference(torch.ones(1, 1, 32, 32), f, normalise="none")
        assert least < (exact / Lattice.build(f).norm).mean() < most


@pytest.mark.parametrize("dimension", range(1, 9))
def test_every_dimension_is_near_the_gaussian_and_has_its_adjoint(dimension):
    f = 0.9 / dimension**0.5 * random(1, dimension, 6, 7, seed=dimension)
    grid = Lattice.build(f)
    assert grid.dimension == dimension
    assert grid.offsets.min() >= 1  # no point touches empty space
    assert grid.weights.min() >= -1e-6
    torch.testing.assert_close(grid.weights.sum(1), torch.ones(42))
    k = matrix(grid)
    torch.testing.assert_close(matrix(grid, transpose=True), k.T, rtol=1e-5, atol=1e-6)
    exact = torch.exp(-0.5 * torch.cdist(f.flatten(2)[0].T, f.flatten(2)[0].T).square())
    k, exact = k / k.sum(1, keepdim=True), exact / exact.sum(1, keepdim=True)
    # Of single entries, not of sums over an image, where errors cancel; it grows with the dimension, as in the paper.
    assert (k - exact).norm() / exact.norm() < 0.05 + 0.03 * dimension


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("normalise", ["row", "symmetric", "none"])
def test_transposed_filter_is_the_adjoint(dtype, normalise):
    grid = Lattice.build(features(9, 11, 4.0, (3, 40.0), batch=2))
    x, y = random(2, 3, 9, 11, dtype=dtype), random(2, 3, 9, 11, seed=1, dtype=dtype)
    one = (filter(x, grid, normalise=normalise) * y).sum()
    other = (x * filter(y, grid, normalise=normalise, transpose=True)).sum()
    torch.testing.assert_close(one, other, rtol=1e-4 if dtype == torch.float32 else 1e-6, atol=1e-6)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(("batch", "channels", "height", "width"), [(1, 1, 1, 1), (2, 3, 13, 17), (1, 21, 8, 33)])
def test_compiled_loops_agree_with_torch(batch, channels, height, width, transpose):
    grid = Lattice.build(features(height, width, 3.0, (3, 30.0), batch=batch))
    x = random(batch, channels, height, width)
    fast = filter(x, grid, normalise="none", transpose=transpose)
    slow = filter(x.double(), grid, normalise="none", transpose=transpose)
    torch.testing.assert_close(fast.double(), slow, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("normalise", ["row", "symmetric", "none"])
def test_gradients(normalise):
    grid = Lattice.build(features(3, 4, 2.0, (1, 60.0), batch=2))
    x = random(2, 2, 3, 4, dtype=torch.float64).requires_grad_()
    assert gradcheck(lambda x: filter(x, grid, normalise=normalise), x)
    assert gradgradcheck(lambda x: filter(x, grid, normalise=normalise), x)
    single = x.detach().float().requires_grad_()
    (fast,) = torch.autograd.grad(filter(single, grid, normalise=normalise).sin().sum(), single)
    (slow,) = torch.autograd.grad(filter(x, grid, normalise=normalise).sin().sum(), x)
    torch.testing.assert_close(fast.double(), slow, rtol=1e-4, atol=1e-6)


def test_pixels_may_come_in_any_order():
    """The vertices are numbered by first use, which must not matter."""
    f, x = features(10, 12, 4.0, (3, 30.0)), values(10, 12)
    order = torch.randperm(120, generator=torch.Generator().manual_seed(0))
    shuffled = [t.flatten(2)[:, :, order].view(t.shape) for t in (f, x)]
    found = filter(shuffled[1], Lattice.build(shuffled[0]))
    torch.testing.assert_close(
        found.flatten(2), filter(x, Lattice.build(f)).flatten(2)[:, :, order], rtol=1e-5, atol=1e-6
    )


def test_normalised_filters_keep_what_they_must():
    grid = Lattice.build(features(15, 14, 3.0, (3, 10.0)))
    constant = torch.full((1, 2, 15, 14), 0.7)
    torch.testing.assert_close(filter(constant, grid), constant)
    # The symmetric one is similar to the row one: the root of the norm stays.
    root = grid.norm.sqrt()
    torch.testing.assert_close(filter(root, grid, normalise="symmetric"), root, rtol=1e-5, atol=1e-6)
    scaled = grid.scaled(grid.norm**-0.5)
    x = values(15, 14)
    torch.testing.assert_close(filter(x, scaled, normalise="none"), filter(x, grid, normalise="symmetric"))


def test_a_batch_is_its_images():
    f, x = features(9, 13, 3.0, (3, 20.0), batch=3), values(9, 13, batch=3)
    x[1] *= 100  # what leaks from one image to another shows
    together = filter(x, Lattice.build(f))
    alone = torch.cat([filter(x[i : i + 1], Lattice.build(f[i])) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    same = Lattice.build(f[:1].expand(2, -1, -1, -1))
    assert same.vertices - 1 == 2 * (Lattice.build(f[0]).vertices - 1)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 1), (3, 129)])
def test_odd_sizes(size):
    f, x = features(*size, 2.0), random(1, 2, *size)
    found, exact = filter(x, Lattice.build(f)), gaussian_reference(x, f)
    assert (found - exact).norm() < 0.2 * x.norm()  # noise through a narrow filter: the hardest case
    assert found.shape == x.shape


def test_constant_features_average_the_image():
    x = values(6, 7)
    grid = Lattice.build(torch.full((1, 3, 6, 7), 12.25))
    torch.testing.assert_close(filter(x, grid), x.mean((2, 3), keepdim=True).expand_as(x))
    torch.testing.assert_close(filter(x, grid, normalise="symmetric"), x.mean((2, 3), keepdim=True).expand_as(x))


def test_self_weight_is_the_diagonal():
    """Equal where the simplex has all its neighbours, as in the middle of two dimensions, and else above."""
    grid = Lattice.build(features(24, 24, 3.0))
    own, diagonal = grid.self_weight[0, 0], matrix(grid).diagonal().view(24, 24)
    torch.testing.assert_close(own[9:15, 9:15], diagonal[9:15, 9:15])
    assert (own >= diagonal - 1e-5).all()
    grid = Lattice.build(features(9, 10, 4.0, (3, 15.0)))
    own, diagonal = grid.self_weight.flatten(), matrix(grid).diagonal()
    assert (own >= diagonal - 1e-5).all()
    assert (own <= 1.5 * diagonal).all()


def test_threads_change_nothing_but_rounding():
    f, x = features(24, 31, 3.0, (3, 15.0), batch=2), values(24, 31, batch=2)
    one = filter(x, Lattice.build(f))
    try:
        torch.set_num_threads(3)
        several = [filter(x, Lattice.build(f)) for _ in range(2)]
    finally:
        torch.set_num_threads(1)
    assert torch.equal(*several)
    torch.testing.assert_close(several[0], one, rtol=1e-5, atol=1e-6)


def test_a_lattice_moves():
    grid = Lattice.build(features(4, 5, 2.0))
    moved = grid.to("meta")
    assert moved.weights.device.type == moved.neighbours.device.type == "meta"
    with pytest.raises(UserError, match=r"values are on cpu, the lattice on meta: move it with \.to\(\)"):
        filter(values(4, 5), moved)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_gpu_computes_the_same():
    f, x = features(20, 31, 3.0, (3, 15.0), batch=2), values(20, 31, batch=2)
    found = filter(x.cuda(), Lattice.build(f.cuda()))
    torch.testing.assert_close(found.cpu(), filter(x, Lattice.build(f)), rtol=1e-4, atol=1e-5)


def test_bad_input_gets_a_sentence():
    f = features(4, 5, 2.0)
    with pytest.raises(UserError, match=r"d from 1 to 8 and at least one pixel, not \(1, 9, 4, 5\)"):
        Lattice.build(torch.zeros(1, 9, 4, 5))
    with pytest.raises(UserError, match=r"at least one pixel, not \(1, 2, 0, 5\)"):
        Lattice.build(f[:, :, :0])
    for bad in (np.nan, np.inf):
        holed = f.clone()
        holed[0, 1, 2, 3] = bad
        with pytest.raises(
            UserError, match="features of a lattice must be finite numbers: 1 of 40 are NaN or infinite"
        ):
            Lattice.build(holed)
    wide = random(1, 8, 4, 5)
    wide[:, 5] *= 1e9
    with pytest.raises(UserError, match=r"feature 5 alone runs over .*e\+09 of them; divide it by a larger theta"):
        Lattice.build(wide)
    grid = Lattice.build(f)
    with pytest.raises(UserError, match="normalise is row, symmetric or none, not 'rows'"):
        inspect.unwrap(filter)(values(4, 5), grid, normalise="rows")  # past the check of types in tests
    with pytest.raises(
        UserError, match=r"values are \(1, 4, 5, 5\), but the lattice was built for \(1, channels, 4, 5\)"
    ):
        filter(values(5, 5), grid)
