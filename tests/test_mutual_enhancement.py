"""IMENet: its two corrections against the equations, what crosses between the branches, and the rows of its table."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from enfilade import losses
from enfilade.errors import UserError
from enfilade.losses_volume import VOLUME_TERMS
from enfilade.models import mutual_enhancement as me
from enfilade.models.completion3d import Completion3d
from enfilade.models.mutual_enhancement import ContextPyramid, Correction, IMENet, SegDecoder
from enfilade.ops.deform import deform_conv3d_reference
from enfilade.ops.projection import to_pixels, to_voxels
from enfilade.optim import freeze, part_of
from enfilade.stages import Stage
from enfilade.train import extra_inputs, start_from
from enfilade.types import IGNORE, Batch

K, GRID, COARSE = 5, (24, 16, 24), (6, 4, 6)
SMALL = {"classes": K, "encoder": "test_efficientnet", "stride": 4, "context": 8, "width": 0.25, "bn": True}
ROWS = {
    "A": {"iterations": 1, "dcp": False, "dda": False},
    "C": {"dda": False},
    "D": {"dcp": False},
    "E": {},
    "2dgt": {"truth": "2d"},
    "3dgt": {"truth": "3d"},
    "rays": {"project": "rays"},
    "sketch": {"backbone_3d": "sketch", "width": 0.1, "samples": 1},
}


def make(row="E", **options) -> IMENet:
    torch.manual_seed(0)
    network = IMENet(**SMALL | ROWS[row] | options)
    for module in network.modules():  # as after some training: answers differ between places, taps have moved
        if isinstance(module, ContextPyramid):
            nn.init.normal_(module.out.weight, std=0.5)
            for layer in module.offsets:
                nn.init.normal_(layer.weight, std=0.3)
        elif isinstance(module, SegDecoder):
            nn.init.normal_(module.classify.weight, std=0.5)
    nn.init.normal_(network.backbone.classify.weight, std=0.5) if row != "sketch" else None
    return network


def batch(size=(34, 45), b=2, seed=0) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def integers(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator)

    voxels, pixels = integers(-1, 144, b, *size), integers(-1, size[0] * size[1], b, *COARSE)
    voxels[:, :3] = -1  # no depth at the top
    labels, volume = integers(0, K, b, *size), integers(0, K, b, *COARSE)
    labels[:, -4:], volume[:, :1] = IGNORE, IGNORE
    tsdf = torch.rand(b, 1, *GRID, generator=generator) * 2 - 1
    image = torch.rand(b, 3, *size, generator=generator)
    return Batch(image, labels=labels, tsdf=tsdf, volume=volume, voxels=voxels, pixels=pixels)


def run(network, data, **changes):
    return network(data.image, **extra_inputs(network, data) | changes)


# The 2-D network


def test_seg2dnet_has_the_published_layers():
    """Liu et al.: DUCs 2048 -> 4096, 1024 -> 2048, 512 -> 1024, then 320 -> 128 by 1x1, 128 -> 256, 64 -> 128, and
    dilations 1, 3, 5, 7 from 32 to 64 channels, 12 classes. Here with an eighth of all channels."""
    decoder = SegDecoder((8, 32, 64, 128, 256), 12, 1, 8)
    shapes = [tuple(m.weight.shape[:3]) for m in decoder.modules() if isinstance(m, nn.Conv2d)]
    table = [(4096, 2048, 3), (2048, 1024, 3), (1024, 512, 3), (128, 320, 1), (256, 128, 3), (128, 64, 3)]
    table += [(64, 32, 3)] * 4
    assert shapes == [*((cout // 8, cin // 8, kernel) for cout, cin, kernel in table), (12, 8, 1)]
    assert [m[0].dilation for m in decoder.pyramid] == [(d, d) for d in (1, 3, 5, 7)]


@pytest.mark.parametrize("stride", [1, 2, 4])
@pytest.mark.parametrize("size", [(32, 64), (34, 45)])
def test_scores_at_each_stride(stride, size):
    network = make("A", stride=stride).eval()
    with torch.no_grad():
        output = run(network, batch(size))
    assert output.logits.shape == (2, K, -(-size[0] // stride), -(-size[1] // stride))
    assert output.volume_logits.shape == (2, K, *COARSE)


# Eq. (1)


@pytest.mark.parametrize("dilation", [1, 2, 3])
def test_deformable_convolution_is_torchvisions(dilation):
    from torchvision.ops import deform_conv2d

    generator = torch.Generator().manual_seed(dilation)

    def random(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).requires_grad_()

    args = random(2, 3, 5, 7), random(2, 18, 5, 7, scale=2), random(4, 3, 3, 3), random(4)
    got = me.deform_conv2d(*args, dilation=dilation)
    want = deform_conv2d(*args, padding=dilation, dilation=dilation)
    torch.testing.assert_close(got, want)
    direction = random(*got.shape).detach()
    grads = [torch.autograd.grad((out * direction).sum(), args) for out in (got, want)]
    for one, other in zip(*grads):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("rank", [2, 3])
def test_the_pyramid_starts_as_dilated_convolutions(rank):
    """Offsets start at 0: D_i is then the plain convolution of dilation i."""
    torch.manual_seed(0)
    pyramid = ContextPyramid(K, rank)
    p = torch.rand(2, K, *(5, 6, 7)[:rank])
    conv = {2: F.conv2d, 3: F.conv3d}[rank]
    total = sum(conv(p, w, padding=d, dilation=d) for w, d in zip(pyramid.weights, (1, 2, 3)))
    torch.testing.assert_close(pyramid(p), pyramid.out(total.relu()), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rank", [2, 3])
def test_correction_is_equation_1(rank):
    from torchvision.ops import deform_conv2d

    torch.manual_seed(0)
    block = Correction(K, rank)
    for layer in block.pyramid.offsets:
        nn.init.normal_(layer.weight, std=0.3)
    size = (5, 6, 4)[:rank]
    f, p = torch.randn(2, K, *size), torch.rand(2, K, *size)
    p[:, :, 0] = 0  # nothing was projected there
    total = 0
    for offsets, weight, d in zip(block.pyramid.offsets, block.pyramid.weights, (1, 2, 3)):
        deform = deform_conv2d if rank == 2 else deform_conv3d_reference
        total = total + deform(p, offsets(p), weight, padding=d, dilation=d)
    h = torch.zeros_like(p)
    for b, *at in np.ndindex(2, *size):
        if at[0] > 0:
            h[b, p[b, :, *at].argmax(), *at] = 1
    torch.testing.assert_close(block(f, p), f + h + block.pyramid.out(total.relu()), atol=1e-5, rtol=1e-4)


# Eq. (2)


@pytest.mark.parametrize("product", ["mean", "sum"])
def test_depth_attention_is_equation_2(product):
    f = torch.randn(2, 3, 4, 2, 5, dtype=torch.float64) / 2
    want = torch.zeros_like(f)
    for b, j in np.ndindex(2, 5):
        dots = torch.stack([(f[b, ..., i] * f[b, ..., j]).sum() for i in range(5)])
        weights = (dots / (8 if product == "mean" else 1)).exp()
        weights = weights / weights.sum()
        want[b, ..., j] = sum(weights[i] * f[b, ..., i] for i in range(5)) + f[b, ..., j]
    torch.testing.assert_close(me.depth_attention(f, product), want)


def test_the_printed_product_picks_each_slice_itself():
    """Why the mean is taken: slices that share all but a little noise are doubled by the sum, mixed by the mean."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(1, 12, 20, 12, 1, generator=generator)
    f = common + 0.3 * torch.randn(1, 12, 20, 12, 20, generator=generator)
    torch.testing.assert_close(me.depth_attention(f, "sum"), 2 * f)
    mixed = me.depth_attention(f, "mean") - f
    assert (mixed - common).std() < 0.5 * (f - common).std()


# What crosses


def test_projections_agree():
    """A volume seen in the image and put back is itself, in the voxels that are seen; unseen ones stay 0."""
    data = batch((16, 24))
    volume = torch.rand(2, K, *COARSE)
    image = me.seen(volume, data.voxels, 1)
    torch.testing.assert_close(image, to_pixels(volume, data.voxels))
    back = to_voxels(image, data.voxels, COARSE)
    for b in range(2):
        found = torch.zeros(144, dtype=torch.bool)
        found[data.voxels[b][data.voxels[b] >= 0]] = True
        torch.testing.assert_close(back[b].flatten(1)[:, found], volume[b].flatten(1)[:, found])
        assert not back[b].flatten(1)[:, ~found].any()


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_cells_have_the_mean_of_their_pixels(stride):
    data = batch((10, 13), b=1)
    volume = torch.rand(1, K, *COARSE)
    got = me.seen(volume, data.voxels, stride)
    rows, columns = -(-10 // stride), -(-13 // stride)
    assert got.shape == (1, K, rows, columns)
    for y, x in np.ndindex(rows, columns):
        inside = data.voxels[0, y * stride : (y + 1) * stride, x * stride : (x + 1) * stride].flatten()
        found = volume[0].flatten(1)[:, inside[inside >= 0]]
        torch.testing.assert_close(got[0, :, y, x], found.sum(1) / stride**2)


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_enlarged_maps_lie_where_their_cells_do(stride):
    """A linear ramp over cell centres is the same ramp over pixel centres, away from the border."""
    columns = (torch.arange(6.0) + 0.5) * stride
    got = me.enlarged(columns.expand(1, 1, 5, 6), (5 * stride - stride // 2, 6 * stride - stride // 2), stride)
    assert got.shape[-2:] == (5 * stride - stride // 2, 6 * stride - stride // 2)
    inside = got[0, 0, 0, stride : 5 * stride]
    torch.testing.assert_close(inside, torch.arange(stride, 5 * stride) + 0.5)


def test_no_gradient_crosses():
    """The labels' loss trains the 2-D parts alone, the volume's the 3-D parts: "with the 3D SSC weights fixed"."""
    for answer, trained in (("logits", {"trunk", "2d", "dcp"}), ("volume_logits", {"3d", "dda"})):
        network = make()
        getattr(run(network, batch()), answer).square().sum().backward()
        owner = part_of(network)
        assert {owner[n] for n, p in network.named_parameters() if p.grad is not None and p.grad.any()} == trained


@pytest.mark.parametrize(
    ("trained", "answers"), [(("trunk", "2d", "dcp"), "logits"), (("3d", "dda"), "volume_logits"), (("*",), "both")]
)
def test_stages_train_one_branch_with_the_other_fixed(trained, answers):
    network = make()
    freeze(network, Stage(name="s", epochs=1, losses={}, train=trained))
    output = run(network, batch())
    assert output.logits.requires_grad == (answers != "volume_logits")
    assert output.volume_logits.requires_grad == (answers != "logits")


# Rows


@pytest.mark.parametrize("row", ROWS)
def test_shapes_and_repeatable_answers(row):
    network, data = make(row).eval(), batch()
    with torch.no_grad():
        first, again = run(network, data), run(network, data)
    quarter = (2, K, 9, 12)
    both = {"E": 3, "rays": 3, "sketch": 3}.get(row, 1)
    assert first.logits.shape == quarter
    assert first.volume_logits.shape == (2, K, *COARSE)
    assert [s.shape for s in first.side_logits] == [quarter] * (0 if network.dcp is None else both)
    assert [s.shape for s in first.side_volume_logits] == [(2, K, *COARSE)] * (0 if network.dda is None else both)
    assert torch.equal(first.logits, again.logits)
    assert torch.equal(first.volume_logits, again.volume_logits)


@pytest.mark.parametrize("row", ROWS)
def test_every_parameter_gets_a_gradient(row):
    network, data = make(row), batch()
    output = run(network, data)
    total, _ = losses.objective(output, data, {"cross_entropy": 1.0})
    total = total + VOLUME_TERMS["volume"](output, data)
    if row == "sketch":
        total = total + VOLUME_TERMS["sketch"](output, data) + VOLUME_TERMS["sketch_kl"](output, data)
    total.backward()
    lost = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert not lost
    assert part_of(network).keys() == dict(network.named_parameters()).keys()


def test_without_corrections_each_branch_is_on_its_own():
    """Row A, and B's network whatever T is: the 3-D answer is that of the backbone alone, and no input of one branch
    moves the other's answer."""
    network, data = make("A").eval(), batch()
    alone = Completion3d(classes=K, width=SMALL["width"], bn=True).eval()
    alone.backbone.load_state_dict(network.backbone.state_dict())
    with torch.no_grad():
        output = run(network, data)
        torch.testing.assert_close(output.volume_logits, alone(None, data.tsdf).volume_logits)
        torch.testing.assert_close(output.logits, network.segment(data.image))
        network.iterations = 4
        again = run(network, data, tsdf=data.tsdf.flip(2))
        torch.testing.assert_close(again.logits, output.logits, rtol=0, atol=0)
        assert (again.side_logits, again.side_volume_logits) == ((), ())


def test_the_first_scores_are_row_a_and_each_iteration_builds_on_the_last():
    """The whole network with T = 1 is one correction of row A's scores; T = 3 goes through the same scores."""
    network, plain, data = make().eval(), make("A").eval(), batch()
    plain.load_state_dict(network.state_dict(), strict=False)
    with torch.no_grad():
        a, three = run(plain, data), run(network, data)
        network.iterations = 1
        one = run(network, data)
        torch.testing.assert_close(one.side_logits[0], a.logits)
        torch.testing.assert_close(one.side_volume_logits[0], a.volume_logits)
        torch.testing.assert_close(one.logits, three.side_logits[1])
        torch.testing.assert_close(one.volume_logits, three.side_volume_logits[1])
        # By hand: the second 2-D scores from the first 3-D ones
        p = me.seen(one.volume_logits.softmax(1), data.voxels, 4)
        torch.testing.assert_close(three.side_logits[2], network.dcp(a.logits, p))
        image = me.enlarged(three.side_logits[2], (34, 45), 4).softmax(1)
        put = to_voxels(image, data.voxels, COARSE)
        want = me.depth_attention(network.dda(a.volume_logits, put))
        torch.testing.assert_close(three.side_volume_logits[2], want)
    assert not torch.allclose(three.logits, one.logits, atol=1e-4)


def test_rows_c_and_d_correct_one_branch():
    data = batch()
    networks = [make(row).eval() for row in "ECD"]
    for network in networks:
        network.load_state_dict(networks[0].state_dict(), strict=False)
    with torch.no_grad():
        e, c, d = (run(network, data) for network in networks)
        torch.testing.assert_close(c.volume_logits, e.side_volume_logits[0])
        torch.testing.assert_close(d.logits, e.side_logits[0])
        torch.testing.assert_close(c.logits, e.side_logits[1])
    assert not torch.allclose(d.volume_logits, d.side_volume_logits[0], atol=1e-3)


@pytest.mark.parametrize(("row", "field", "moved"), [("2dgt", "labels", "volume_logits"), ("3dgt", "volume", "logits")])
def test_upper_bounds_use_the_truth(row, field, moved):
    """Other labels, another answer of the other branch; unknown labels tell nothing, whatever the prediction was."""
    network, data = make(row).eval(), batch()
    truth = getattr(data, field)
    with torch.no_grad():
        before = getattr(run(network, data), moved)
        changed = run(network, data, **{field: truth.where(truth == IGNORE, (truth + 1) % K)})
        assert not torch.allclose(getattr(changed, moved), before, atol=1e-3)
        # The branch whose truth is told is not asked for its prediction
        other = {"2d": {"image": data.image.flip(3)}, "3d": {"tsdf": data.tsdf.flip(2)}}[network.truth]
        inputs = {"image": data.image, **extra_inputs(network, data)} | other
        torch.testing.assert_close(getattr(network(**inputs), moved), before)


def test_unknown_truth_is_no_vote():
    labels = torch.tensor([[[0, 3, IGNORE]]])
    got = me.labels_one_hot(labels, 4)
    assert got[0, :, 0].T.tolist() == [[1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]
    assert me.one_hot(got)[0, :, 0].T.tolist() == got[0, :, 0].T.tolist()


def test_rays_tell_hidden_voxels_too():
    data = batch()
    with torch.no_grad():
        surface, rays = (run(make(row).eval(), data).volume_logits for row in ("E", "rays"))
    assert not torch.allclose(surface, rays, atol=1e-3)
    with pytest.raises(UserError, match="needs pixels"):
        make("rays")(data.image, data.tsdf, data.voxels)


def test_a_backbone_trained_alone_can_be_started_from(tmp_path):
    from enfilade import checkpoint

    arguments = {"classes": K, "width": SMALL["width"], "bn": True, "weights": None}
    alone = Completion3d(**arguments)
    checkpoint.save_model(tmp_path / "3d.safetensors", alone, {"model": "completion", "arguments": arguments})
    network = make()
    start_from(network, tmp_path / "3d.safetensors")
    for name, tensor in alone.state_dict().items():
        assert torch.equal(network.state_dict()[name], tensor)


def test_bf16_answers_like_fp32():
    network, data = make().eval(), batch()
    with torch.no_grad():
        exact = run(network, data)
        with torch.autocast("cpu", torch.bfloat16):
            rough = run(network, data)
    for name in ("logits", "volume_logits"):
        one, other = getattr(exact, name), getattr(rough, name).float()
        agree = (one.argmax(1) == other.argmax(1)).float().mean()
        assert agree > 0.85  # 8 bits of mantissa through random layers, whose scores are close


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"stride": 8}, "stride is 1, 2 or 4, not 8"),
        ({"iterations": 0}, "iterations is at least 1"),
        ({"encoder": "vgg11_bn"}, "needs 2, 4, 8, 16, 32"),
        ({"backbone_3d": "ssc"}, "3-D backbone"),
    ],
)
def test_wrong_arguments(options, sentence):
    with pytest.raises(UserError, match=sentence):
        make(**options)


def test_wrong_inputs():
    network, data = make(), batch()
    with pytest.raises(UserError, match="resize both alike"):
        network(data.image, data.tsdf, data.voxels[:, ::2])
    with pytest.raises(UserError, match="needs volume, because truth is 3d"):
        make("3dgt")(data.image, data.tsdf, data.voxels)
