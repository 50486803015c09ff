"""3-D deformable convolution: against its definition, plain convolutions, shifts, differences, and itself."""

import inspect

import pytest
import torch
import torch.nn.functional as F

from enfilade.errors import UserError
from enfilade.ops.deform import _geometry, _reference, deform_conv3d, deform_conv3d_reference

# Sums of some hundred products of numbers around one: rounding in another order moves the sixth digit.
CLOSE = {"rtol": 1e-5, "atol": 3e-5}
CASES = {
    "plain": ((2, 12, 6, 5, 7), (12, 12, 3, 3, 3), {}),
    "one voxel": ((1, 3, 1, 1, 1), (2, 3, 3, 3, 3), {}),
    "flat": ((1, 20, 9, 1, 5), (17, 20, 3, 1, 2), {"padding": (1, 0, 1)}),
    "strides": ((1, 4, 7, 8, 9), (5, 4, 3, 3, 3), {"stride": (2, 1, 3), "padding": (0, 2, 1)}),
    "dilated": ((1, 4, 9, 8, 10), (5, 4, 3, 2, 3), {"dilation": (3, 1, 2), "stride": 2}),
    "groups": ((2, 12, 5, 4, 6), (8, 3, 3, 3, 3), {"groups": 4}),
    "offset groups": ((1, 6, 5, 4, 6), (4, 6, 3, 3, 3), {"offset_groups": 3}),
    "groups that cross": ((2, 12, 5, 4, 6), (8, 3, 3, 1, 3), {"groups": 4, "offset_groups": 3, "dilation": 2}),
    "depthwise": ((1, 4, 5, 4, 6), (4, 1, 3, 3, 3), {"groups": 4, "offset_groups": 2}),
}


def problem(size, kernel, options, spread=2.0, seed=0, dtype=torch.float32):
    """x, offsets, weight, bias of a case, and what F.conv3d makes of it."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    x, weight, bias = normal(*size), normal(*kernel), normal(kernel[0])
    same = tuple(d * (k - 1) // 2 for d, k in zip(dilation_of(options), kernel[2:]))
    plain = {k: v for k, v in options.items() if k != "offset_groups"}
    straight = F.conv3d(x, weight, bias, **{"padding": same} | plain)
    taps = kernel[2] * kernel[3] * kernel[4]
    offsets = spread * normal(len(x), options.get("offset_groups", 1) * taps * 3, *straight.shape[2:])
    return (x, offsets, weight, bias), straight


def dilation_of(options):
    dilation = options.get("dilation", 1)
    return (dilation,) * 3 if isinstance(dilation, int) else dilation


def gradients(function, tensors, options):
    """The output, and the gradients of its product with fixed numbers."""
    tensors = [t.detach().requires_grad_() for t in tensors]
    out = function(*tensors, **options)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return out.detach(), torch.autograd.grad(out, tensors, direction)


# ------------------------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize("case", CASES)
def test_without_offsets_it_is_a_convolution(case):
    tensors, straight = problem(*CASES[case], spread=0.0)
    for function in (deform_conv3d, deform_conv3d_reference):
        torch.testing.assert_close(function(*tensors, **CASES[case][2]), straight, **CLOSE)


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_the_reference_s(case):
    size, kernel, options = CASES[case]
    tensors, _ = problem(size, kernel, options)
    # Where a place rounds to the next voxel the derivative is another; none of these lies that near to one.
    out, found = gradients(deform_conv3d, tensors, options)
    expected, references = gradients(deform_conv3d_reference, tensors, options)
    torch.testing.assert_close(out, expected, **CLOSE)
    for name, ours, reference in zip(("x", "offsets", "weight", "bias"), found, references):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_the_order_of_taps_and_axes():
    """One offset, of tap (0, 2, 1), by (1, -2, 3) voxels along x, y, z: that tap alone looks elsewhere."""
    (x, offsets, weight, _), _ = problem((1, 2, 8, 9, 10), (3, 2, 3, 3, 3), {}, spread=0.0)
    tap, step = (0, 2, 1), (1, -2, 3)
    channel = 3 * (9 * tap[0] + 3 * tap[1] + tap[2])
    offsets[:, channel : channel + 3] = torch.tensor(step)[:, None, None, None]
    others = weight.clone()
    others[:, :, *tap] = 0
    moved = F.pad(x, (4,) * 6)
    starts = [4 - 1 + t + s for t, s in zip(tap, step)]
    moved = moved[:, :, *(slice(a, a + n) for a, n in zip(starts, x.shape[2:]))]
    expected = F.conv3d(x, others, padding=1) + torch.einsum("oc,bcxyz->boxyz", weight[:, :, *tap], moved)
    for function in (deform_conv3d, deform_conv3d_reference):
        torch.testing.assert_close(function(x, offsets, weight), expected, **CLOSE)


def test_whole_steps_shift_the_input():
    tensors, _ = problem((2, 3, 8, 7, 9), (4, 3, 3, 3, 3), {}, spread=0.0)
    x, offsets, weight, bias = tensors
    step = (2, -1, 3)
    offsets.view(2, 27, 3, *offsets.shape[2:])[:] = torch.tensor(step)[:, None, None, None]
    shifted = F.pad(x, (4,) * 6)
    shifted = shifted[:, :, *(slice(3 + s, 3 + s + n + 2) for s, n in zip(step, x.shape[2:]))]
    expected = F.conv3d(shifted, weight, bias)  # the border of one comes with the shift
    torch.testing.assert_close(deform_conv3d(*tensors), expected, **CLOSE)


def test_half_a_cell_across_the_border_counts_half():
    """Ones under a 1^3 kernel, moved along each axis: what is inside has its share, as with zero padding."""
    x, weight = torch.ones(1, 1, 4, 4, 4), torch.ones(1, 1, 1, 1, 1)
    for axis in range(3):
        for step, expected in ((-0.25, (0.75, 1, 1, 1)), (-1.5, (0, 0.5, 1, 1)), (1.75, (1, 1, 0.25, 0))):
            offsets = torch.zeros(1, 3, 4, 4, 4)
            offsets[:, axis] = step
            line = torch.tensor(expected).view([4 if a == axis else 1 for a in range(3)]).expand(1, 1, 4, 4, 4)
            torch.testing.assert_close(deform_conv3d(x, offsets, weight), line.float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("far", [50.0, -1e9, 1e30, float("inf")])
def test_far_outside_is_only_the_bias(far):
    tensors, _ = problem(*CASES["groups that cross"], spread=0.0)
    x, offsets, weight, bias = tensors
    tensors = x, offsets + far, weight, bias
    for function in (deform_conv3d, deform_conv3d_reference):
        out, (to_x, to_offsets, to_weight, _) = gradients(function, tensors, CASES["groups that cross"][2])
        torch.testing.assert_close(out, bias[:, None, None, None].expand_as(out), rtol=0, atol=0)
        assert not to_x.any()
        assert not to_offsets.any()
        assert not to_weight.any()


def test_nan_stays_where_it_is():
    """Neither hidden nor spread, and no place in memory is computed from it."""
    (x, offsets, weight, bias), _ = problem((1, 3, 5, 5, 5), (2, 3, 3, 3, 3), {})
    clean = deform_conv3d(x, offsets, weight, bias)
    offsets[0, 40, 1, 2, 3] = float("nan")
    for function in (deform_conv3d, deform_conv3d_reference):
        out = function(x, offsets, weight, bias)
        assert out[0, :, 1, 2, 3].isnan().all()
        out[0, :, 1, 2, 3] = clean[0, :, 1, 2, 3]
        torch.testing.assert_close(out, clean, **CLOSE)


def test_a_batch_is_a_loop():
    tensors, _ = problem((3, 4, 6, 5, 4), (5, 4, 3, 3, 3), {})
    x, offsets, weight, bias = tensors
    whole, found = gradients(deform_conv3d, tensors, {})
    direction = torch.randn(whole.shape, generator=torch.Generator().manual_seed(1))
    total = 0
    for i in range(3):
        image = [x[i : i + 1].requires_grad_(), offsets[i : i + 1].requires_grad_(), weight.requires_grad_()]
        out = deform_conv3d(*image, bias)
        assert torch.equal(out[0], whole[i])  # a point's sum does not know of its neighbours
        to_x, to_offsets, to_weight = torch.autograd.grad(out, image, direction[i : i + 1])
        torch.testing.assert_close(to_x[0], found[0][i], **CLOSE)
        torch.testing.assert_close(to_offsets[0], found[1][i], **CLOSE)
        total = total + to_weight
    torch.testing.assert_close(total, found[2], rtol=1e-4, atol=1e-4)


def test_threads_change_rounding_only():
    tensors, _ = problem((3, 12, 9, 7, 8), (12, 12, 3, 3, 3), {})
    try:
        results = []
        for threads in (1, 2, 2, 5):
            torch.set_num_threads(threads)
            results.append(gradients(deform_conv3d, tensors, {}))
    finally:
        torch.set_num_threads(1)
    for out, found in results[1:]:
        assert torch.equal(out, results[0][0])
        for ours, one in zip(found, results[0][1]):
            torch.testing.assert_close(ours, one, rtol=1e-4, atol=1e-4)
    for ours, again in zip(results[1][1], results[2][1]):
        assert torch.equal(ours, again)


def test_views_are_read_as_they_are():
    tensors, _ = problem((2, 4, 6, 5, 7), (6, 4, 3, 3, 3), {})
    turned = [t.movedim(1, -1).contiguous().movedim(-1, 1) if t.ndim == 5 else t for t in tensors]
    assert not turned[0].is_contiguous()
    out, found = gradients(deform_conv3d, tensors, {})
    other, same = gradients(deform_conv3d, turned, {})
    assert torch.equal(out, other)
    for ours, view in zip(found, same):
        assert torch.equal(ours, view)


def test_only_what_is_asked_is_differentiated():
    tensors, _ = problem(*CASES["groups that cross"])
    _, expected = gradients(deform_conv3d, tensors, CASES["groups that cross"][2])
    for i in range(4):
        one = [t.detach().requires_grad_(i == j) for j, t in enumerate(tensors)]
        out = deform_conv3d(*one, **CASES["groups that cross"][2])
        direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        (found,) = torch.autograd.grad(out, one[i], direction)
        torch.testing.assert_close(found, expected[i], rtol=1e-6, atol=1e-6)


# --------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("case", ["plain", "strides", "groups that cross"])
def test_derivatives_are_differences(case):
    """In double precision, by the reference, with each place a tenth of a voxel or more from the kinks at voxels."""
    size = {"plain": (1, 2, 2, 3, 2), "strides": (1, 2, 3, 2, 3), "groups that cross": (1, 6, 2, 2, 2)}[case]
    kernel = {"plain": (2, 2, 3, 1, 2), "strides": (1, 2, 2, 2, 2), "groups that cross": (4, 3, 2, 1, 2)}[case]
    options = {
        "plain": {},
        "strides": {"stride": (1, 2, 2), "padding": 1, "dilation": 2},
        "groups that cross": {"groups": 2, "offset_groups": 3},
    }[case]
    (x, offsets, weight, bias), _ = problem(size, kernel, options, dtype=torch.float64)
    within = torch.rand(offsets.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    offsets = offsets.floor() + 0.1 + 0.8 * within
    tensors = [t.requires_grad_() for t in (x, offsets, weight, bias)]
    assert torch.autograd.gradcheck(lambda *t: deform_conv3d(*t, **options), tensors, fast_mode=True)


@pytest.mark.parametrize("case", ["plain", "strides", "groups that cross", "one voxel"])
def test_the_form_for_other_devices_is_the_reference(case):
    """Run on the CPU here. torch's sampler rounds places once more, to 1e-6 of the volume."""
    size, kernel, options = CASES[case]
    tensors, _ = problem(size, kernel, options)

    def frugal(x, offsets, weight, bias, **kw):
        values = (kw.get(k, v) for k, v in (("stride", 1), ("padding", None), ("dilation", 1)))
        groups, offset_groups = kw.get("groups", 1), kw.get("offset_groups", 1)
        g = _geometry(x, offsets, weight, bias, *values, groups, offset_groups)
        return _reference(x, offsets, weight, bias, g, groups, offset_groups, frugal=True)

    out, found = gradients(frugal, tensors, options)
    expected, references = gradients(deform_conv3d_reference, tensors, options)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=3e-4)
    for ours, reference in zip(found, references):
        torch.testing.assert_close(ours, reference, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_graphics_card_gives_the_same():
    tensors, _ = problem(*CASES["groups that cross"])
    options = CASES["groups that cross"][2]
    out, found = gradients(deform_conv3d, tensors, options)
    other, same = gradients(lambda *t, **kw: deform_conv3d(*(v.cuda() for v in t), **kw).cpu(), tensors, options)
    torch.testing.assert_close(other, out, rtol=1e-3, atol=1e-3)
    for theirs, ours in zip(same, found):
        torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------------------------------------ types and operators


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_single(dtype):
    tensors, _ = problem(*CASES["plain"])
    short = [t.to(dtype) for t in tensors]
    out, found = gradients(deform_conv3d, short, {})
    # The same rounded inputs in float32; only the result is rounded, once.
    assert out.dtype == dtype
    assert torch.equal(out, deform_conv3d(*(t.float() for t in short)).to(dtype))
    assert [t.dtype for t in found] == [dtype] * 4


def test_autocast_leaves_it_in_single():
    """Offsets of a head that ran in bfloat16, a volume in float32: the result is the volume's type."""
    (x, offsets, weight, bias), _ = problem(*CASES["plain"])
    with torch.autocast("cpu", torch.bfloat16):
        out = deform_conv3d(x, offsets.bfloat16(), weight, bias)
    assert out.dtype == torch.float32
    assert torch.equal(out, deform_conv3d(x, offsets.bfloat16().float(), weight, bias))


def test_it_is_an_operator_that_torch_knows():
    """Schema, fake tensors and autograd registration, by torch's own check."""
    tensors, _ = problem((1, 4, 4, 3, 4), (4, 2, 3, 3, 3), {"groups": 2})
    tensors = [t.requires_grad_() for t in tensors]
    args = (*tensors, [1] * 3, [1] * 3, [1] * 3, 2, 1)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.enfilade.deform_conv3d.default, args, test_utils=tests)
    given = torch.randn(1, 4, 4, 3, 4)
    args = (given, *(t.detach() for t in tensors[:3]), [1] * 3, [1] * 3, [1] * 3, 2, 1, [True, False, True])
    torch.library.opcheck(
        torch.ops.enfilade.deform_conv3d_backward.default, args, test_utils=("test_schema", "test_faketensor")
    )


class _Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.body = torch.nn.Conv3d(2, 81, 1), torch.nn.Conv3d(2, 3, 3)

    def forward(self, x):
        return deform_conv3d(x, self.head(x), self.body.weight, self.body.bias)


def test_export_keeps_one_operator():
    torch.manual_seed(0)
    block, x = _Block(), torch.randn(1, 2, 4, 5, 3)
    program = torch.export.export(block, (x,))
    calls = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert sum("deform_conv3d" in call for call in calls) == 1
    torch.testing.assert_close(program.module()(x), block(x), **CLOSE)


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("shapes", "options", "sentence"),
    [
        ({"x": (1, 4, 5, 5)}, {}, r"x of a 3-D deformable convolution is b c x y z, not \(1, 4, 5, 5\)"),
        ({"weight": (4, 4, 3, 3)}, {}, "weight of a 3-D deformable convolution is o c/groups kx ky kz"),
        ({"offsets": (1, 27, 5, 5, 5)}, {}, r"offset_groups=1 and an output of \(5, 5, 5\) need \(1, 81, 5, 5, 5\)"),
        ({}, {"offset_groups": 2}, r"offsets are \(1, 81, 5, 5, 5\), but .* need \(1, 162, 5, 5, 5\)"),
        ({}, {"stride": 2}, r"need \(1, 81, 3, 3, 3\)"),
        ({"offsets": (2, 81, 5, 5, 5)}, {}, r"need \(1, 81, 5, 5, 5\)"),
        ({}, {"groups": 3}, "4 input channels cannot be divided into groups=3"),
        ({}, {"offset_groups": 3}, "4 input channels cannot be divided into offset_groups=3"),
        ({"weight": (3, 2, 3, 3, 3)}, {"groups": 2}, "3 output channels cannot be divided into groups=2"),
        ({}, {"groups": 2}, r"weight is for 8 input channels \(4 x 2 groups\), but x has 4"),
        ({"bias": (3,)}, {}, r"bias is one number for each of 4 output channels, not \(3,\)"),
        ({}, {"padding": 0, "dilation": 3}, r"dilated by \(3, 3, 3\), does not fit into \(5, 5, 5\) voxels"),
        ({}, {"stride": 0}, r"stride is one number or three \(x, y, z\), of 1 or more, not 0"),
        ({}, {"dilation": (1, 2)}, r"dilation is one number or three .* not \(1, 2\)"),
    ],
)
def test_what_does_not_fit_is_told(shapes, options, sentence):
    usual = {"x": (1, 4, 5, 5, 5), "offsets": (1, 81, 5, 5, 5), "weight": (4, 4, 3, 3, 3), "bias": (4,)}
    tensors = [torch.zeros(shape) for shape in (usual | shapes).values()]
    # The checks of shape annotations, on in tests, would speak first.
    with pytest.raises(UserError, match=sentence):
        inspect.unwrap(deform_conv3d)(*tensors, **options)
