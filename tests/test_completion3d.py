"""The 3-D backbones: SSCNet's layers counted and its reach measured, the sketch network's stages, and their losses."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from jaxtyping import TypeCheckError
from scipy import ndimage
from torch import nn

from enfilade import losses_volume as lv
from enfilade.errors import UserError
from enfilade.models.completion3d import (
    CVAE,
    DDR,
    Completion3d,
    Pointwise,
    SketchNet,
    SSCNet,
    sketch_of,
    strongest,
)
from enfilade.optim import freeze, part_of
from enfilade.stages import Stage
from enfilade.train import extra_inputs
from enfilade.types import IGNORE, Batch, Output

GRID = (24, 16, 20)  # 6 x 4 x 5 voxels of output: the sketch network must pad them
COARSE = tuple(n // 4 for n in GRID)
K = 5
SMALL = {"sscnet": {"width": 0.25}, "sscnet-bn": {"width": 0.25, "bn": True}, "sketch": {"width": 0.1, "samples": 2}}


def make(name="sscnet", **options) -> Completion3d:
    torch.manual_seed(0)
    return Completion3d(**{"backbone": name.split("-")[0], "classes": K} | SMALL[name] | options)


def inputs(b=2, grid=GRID, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tsdf = torch.rand(b, 1, *grid, generator=generator) * 2 - 1
    volume = torch.randint(0, K, (b, *(n // 4 for n in grid)), generator=generator)
    volume[:, 0] = IGNORE
    return tsdf, volume


def batch(**more) -> Batch:
    tsdf, volume = inputs()
    return Batch(torch.zeros(2, 3, 2, 2), tsdf=tsdf, volume=volume, **more)


# SSCNet


def test_sscnet_has_the_published_layers():
    """Weights and biases counted by hand from the layers' table (channels in, out, taps, biases)."""
    table = [(1, 16, 343, 16), (16, 32, 1, 0), (16, 32, 27, 32), (32, 32, 27, 32), (32, 64, 1, 0), (32, 64, 27, 64)]
    table += [(64, 64, 27, 64)] * 7 + [(256, 128, 1, 128), (128, 128, 1, 128), (128, 12, 1, 12)]
    network = SSCNet()
    assert sum(p.numel() for p in network.parameters()) == sum(a * b * taps + bias for a, b, taps, bias in table)
    convs = [m for m in network.modules() if isinstance(m, nn.Conv3d)]
    assert sorted((m.in_channels, m.out_channels, m.weight[0, 0].numel()) for m in convs) == sorted(
        row[:3] for row in table
    )
    assert [b.one[0].dilation[0] for b in network.third] == [1, 1, 2, 2]


def test_sscnet_reaches_as_far_as_its_layers():
    """To each side: 3 voxels by the 7^3 kernel, twice 1 at stride 2, four times 1 and four times 2 at stride 4. Weights
    of one sign and a positive input let no path cancel."""
    network = SSCNet(classes=2, width=0.05)
    for p in network.parameters():
        p.data.abs_().add_(1e-3)
    steps = [(1, 3)] + 2 * [(2, 1)] + 4 * [(4, 1)] + 4 * [(4, 2)]
    reach = sum(stride * taps for stride, taps in steps)
    n = 2 * (reach // 4 * 4) + 12
    x = torch.ones(1, 1, n, 4, 4, requires_grad=True)
    middle = n // 8
    network(x)[0, 0, middle, 0, 0].backward()
    seen = x.grad[0, 0, :, 0, 0].nonzero()[:, 0]
    # Pooling adds the pair 0..1 of stride 2; an output's own voxel starts at 4 x its number. Of each pair the larger
    # value alone carries a gradient, so only the far ends are certain to within one step of stride 2.
    assert abs((4 * middle - int(seen.min())) - reach) <= 2
    assert abs((int(seen.max()) - 4 * middle) - (reach + 2)) <= 2


def test_pointwise_is_a_convolution():
    layer = Pointwise(6, 4)
    x = torch.randn(2, 6, 3, 4, 5)
    torch.testing.assert_close(layer(x), F.conv3d(x, layer.weight, layer.bias))


# The sketch network


def test_the_sketch_is_sobels():
    """Against SciPy's separable filters, with the published taps: smooth 1 2 1, plain 1 1 1, change 1 0 -1."""
    _, volume = inputs()
    volume[:, 2:4] = 3  # some of it uniform
    got = sketch_of(volume)
    smooth, plain, change = [1, 2, 1], [1, 1, 1], [-1, 0, 1]
    for one, sketch in zip(volume.numpy(), got.numpy()):
        labels = np.where(one == IGNORE, 0, one).astype(float)
        count = 0
        for taps in ((change, plain, smooth), (smooth, change, plain), (smooth, plain, change)):
            found = labels
            for axis, weights in enumerate(taps):
                found = ndimage.correlate1d(found, weights, axis, mode="constant")
            count = count + (found != 0)
        np.testing.assert_array_equal(sketch, np.where(one == IGNORE, IGNORE, count > 1))


def test_a_box_is_sketched_along_its_edges_only():
    volume = torch.zeros(1, 12, 12, 12, dtype=torch.int64)
    volume[0, 3:9, 3:9, 3:9] = 7
    sketch = sketch_of(volume)[0]
    assert sketch[3, 3, 5] == 1  # an edge
    assert sketch[3, 5, 6] == 0  # the middle of a face: it changes along x alone
    assert sketch[5, 5, 5] == sketch[0, 0, 0] == 0


def test_strongest_keeps_the_value_nearest_to_a_surface():
    tsdf, _ = inputs(1)
    got = strongest(tsdf)[0, 0]
    for i, j, k in np.ndindex(*COARSE):
        block = tsdf[0, 0, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4, 4 * k : 4 * k + 4].flatten()
        assert got[i, j, k] == block[block.abs().argmax()]


@pytest.mark.parametrize(("halve", "dilation"), [(False, 3), (True, 1)])
def test_ddr_is_the_sum_that_the_paper_draws(halve, dilation):
    """Its three anisotropic convolutions, and the sums between them, written out."""
    torch.manual_seed(0)
    block = DDR(8, 2, 8, dilation, halve).eval()
    given = x = torch.randn(1, 8, 6, 4, 8)

    def run(layer, value, **options):
        conv, norm = layer
        out = F.conv3d(value, conv.weight, **options)
        return F.batch_norm(out, norm.running_mean, norm.running_var, norm.weight, norm.bias)

    step, d = 1 + halve, dilation
    z = run(block.z, run(block.squeeze, x).relu(), stride=(1, 1, step), padding=(0, 0, d), dilation=(1, 1, d))
    y = run(block.y, z.relu(), stride=(1, step, 1), padding=(0, d, 0), dilation=(1, d, 1))
    if halve:
        z = run(block.z_over_y, (z[:, :, :, ::2] + z[:, :, :, 1::2]) / 2)
    y = y + z
    last = run(block.x, y.relu(), stride=(step, 1, 1), padding=(d, 0, 0), dilation=(d, 1, 1))
    if halve:
        z, y = (run(o, (t[:, :, ::2] + t[:, :, 1::2]) / 2) for o, t in ((block.z_over_x, z), (block.y_over_x, y)))
        x = run(block.shortcut, F.avg_pool3d(x, 2))
    want = (run(block.expand, (last + y + z).relu()) + x).relu()
    torch.testing.assert_close(block(given), want, atol=1e-5, rtol=1e-4)


def test_the_sketch_is_trained_with_the_truth_and_made_without():
    network = make("sketch")
    tsdf, volume = inputs()
    assert network.uses == ("tsdf", "volume")
    sketch = network(None, tsdf, volume).sketch
    assert sketch.posterior.shape == sketch.raw.shape == (2, 2, *COARSE)
    assert sketch.mean.shape == sketch.log_variance.shape == (2, 16, 2, 1, 2)  # of 8 x 4 x 8, padded
    torch.testing.assert_close(sketch.truth, sketch_of(volume))
    network.eval()
    assert network.uses == ("tsdf",)
    with torch.no_grad():
        sketch = network(None, tsdf).sketch
    assert sketch.posterior is sketch.mean is sketch.log_variance is sketch.truth is None


def test_the_encoder_is_told_the_truth():
    """The code's mean moves with the labels; the prior's sketch, of the same seed, does not."""
    network = make("sketch")
    tsdf, volume = inputs()
    for module in network.modules():
        if isinstance(module, nn.Dropout3d | nn.BatchNorm3d):
            module.eval()

    def run(volume):
        torch.manual_seed(3)
        with torch.no_grad():
            return network(None, tsdf, volume).sketch

    one, other = run(volume), run(volume.roll(1, 3))
    assert not torch.allclose(one.mean, other.mean)
    torch.testing.assert_close(one.prior, other.prior)


def test_latent_codes_are_averaged_and_drawn_only_on_demand():
    torch.manual_seed(0)
    cvae = CVAE(16, 3, deterministic=True).eval()
    raw = torch.randint(0, 2, (1, 1, 8, 4, 8)).float()
    with torch.no_grad():
        torch.testing.assert_close(cvae(raw, None)["prior"], cvae(raw, None)["prior"], rtol=0, atol=0)
        cvae.deterministic = False
        torch.manual_seed(1)
        got = cvae(raw, None)["prior"]
        torch.manual_seed(1)
        condition = cvae.condition(raw)
        want = sum(cvae.decode(condition, torch.randn_like(condition)) for _ in range(3)) / 3
        torch.testing.assert_close(got, want)
        assert not torch.equal(cvae(raw, None)["prior"], got)


def test_the_latent_code_and_the_paper_widths():
    """At width 1: 128 channels, 256 at a quarter, a code of 16 (Chen et al., Sections 3.2 and 3.3)."""
    network = SketchNet()
    assert network.stem[-3].out_channels == network.sketch.up[1][0].out_channels == 128
    assert [c.in_channels for c, *_ in network.sketch.up] == [256, 128]
    assert [b.x[0].dilation[0] for b in network.sketch.lower] == [1, 1, 2, 3]
    assert [b.x[0].in_channels for b in network.sketch.lower] == [32, 64, 64, 64]
    assert network.cvae.mean.out_channels == 16


# Both


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("grid", [GRID, (16, 12, 28)])
def test_shapes_and_repeatable_answers(name, grid):
    network = make(name).eval()
    tsdf, _ = inputs(grid=grid)
    with torch.no_grad():
        first, again = network(None, tsdf), network(None, tsdf)
    assert first.volume_logits.shape == (2, K, *(n // 4 for n in grid))
    assert first.logits is None
    assert torch.equal(first.volume_logits, again.volume_logits)


@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_gets_a_gradient(name):
    network, data = make(name), batch()
    terms = {"volume": 1.0}
    if name == "sketch":
        terms |= {"sketch": 1.0, "sketch_prior": 1.5, "sketch_kl": 2.0}
    output = network(data.image, **extra_inputs(network, data))
    sum(w * lv.VOLUME_TERMS[t](output, data) for t, w in terms.items()).backward()
    lost = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert not lost
    assert part_of(network).keys() == dict(network.named_parameters()).keys()


@pytest.mark.parametrize("name", ["sscnet-bn", "sketch"])
def test_overfits_two_volumes(name):
    network, data = make(name), batch()
    optimiser = torch.optim.Adam(network.parameters(), lr=0.01)
    values = []
    for _ in range(25):
        loss = lv.VOLUME_TERMS["volume"](network(data.image, **extra_inputs(network, data)), data)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        values.append(loss.item())
    assert values[-1] < 0.5 * values[0]


def test_a_frozen_backbone_answers_as_in_evaluation():
    """Its batch norms stand still, and the sketch network asks for no truth."""
    network = make("sketch")
    freeze(network, Stage(name="s", epochs=1, losses={}, train=()))
    assert network.uses == ("tsdf",)
    tsdf, _ = inputs()
    frozen = network(None, tsdf).volume_logits
    torch.testing.assert_close(frozen, network.eval()(None, tsdf).volume_logits, rtol=0, atol=0)
    assert not frozen.requires_grad


def test_training_loops_may_ask_for_channels_last():
    network = make("sketch").to(memory_format=torch.channels_last)
    weights = [p for p in network.parameters() if p.ndim == 5]
    assert all(p.is_contiguous(memory_format=torch.channels_last_3d) for p in weights)
    tsdf, _ = inputs()
    with torch.no_grad():
        last = network.eval()(None, tsdf).volume_logits
        first = make("sketch").eval()(None, tsdf).volume_logits
    torch.testing.assert_close(last, first, atol=1e-4, rtol=1e-3)  # fp32 sums in another order, through 40 layers


def test_wrong_arguments():
    with pytest.raises(UserError, match="sides that 4 divides"):
        make()(None, torch.zeros(1, 1, 24, 15, 24))
    with pytest.raises(UserError, match="3-D backbone"):
        Completion3d(backbone="ssc-net")


# Losses


def test_which_voxels_count():
    generator = torch.Generator().manual_seed(0)
    volume = torch.randint(0, 3, (2, 6, 5, 7), generator=generator)
    volume = volume.where(torch.rand(volume.shape, generator=generator) < 0.3, 0)
    volume[:, :, 0] = IGNORE
    scored = torch.rand(volume.shape, generator=generator) < 0.7
    occluded = scored & (torch.rand(volume.shape, generator=generator) < 0.8)
    known, taken = volume != IGNORE, {}
    for empty in ("known", "scored", "removed", "balanced"):
        labels = lv.training_labels(volume, empty=empty, scored=scored, occluded=occluded)
        taken[empty] = labels != IGNORE
        assert (labels == volume)[taken[empty]].all()
    full = known & (volume != 0)
    assert torch.equal(taken["known"], known)
    assert torch.equal(taken["scored"], known & scored)
    assert torch.equal(taken["removed"], full & scored)
    drawn = taken["balanced"] & (volume == 0)
    assert torch.equal(taken["balanced"] & (volume != 0), full & scored)
    assert not (drawn & ~occluded).any()
    for one, mask, candidates in zip(full & scored, drawn, occluded & (volume == 0)):
        assert mask.sum() == min(2 * one.sum(), candidates.sum())
    again = lv.training_labels(volume, empty="balanced", scored=scored, occluded=occluded)
    assert not torch.equal(again == 0, drawn)  # drawn anew
    with pytest.raises((UserError, TypeCheckError)):  # tests check annotations, users run the check
        lv.training_labels(volume, empty="dropped")


def test_volume_cross_entropy_by_hand():
    _, volume = inputs()
    logits = torch.randn(2, K, *COARSE, dtype=torch.float64)
    weight = torch.tensor([0.5, 1, 2, 0, 3], dtype=torch.float64)
    total = norm = 0.0
    for b, *at in np.ndindex(*volume.shape):
        label = int(volume[b, *at])
        if label != IGNORE:
            scores = logits[b, :, *at]
            total += float(weight[label] * (scores.logsumexp(0) - scores[label]))
            norm += float(weight[label])
    assert lv.volume_cross_entropy(logits, volume, weight).item() == pytest.approx(total / norm)
    nothing = torch.full_like(volume, IGNORE)
    logits.requires_grad_()
    lv.volume_cross_entropy(logits, nothing).backward()
    assert not logits.grad.any()


def test_sketch_loss_is_a_binary_cross_entropy():
    _, volume = inputs()
    truth = sketch_of(volume)
    logits = torch.randn(2, 2, *COARSE)
    known = truth != IGNORE
    want = F.binary_cross_entropy_with_logits((logits[:, 1] - logits[:, 0])[known], truth[known].float())
    torch.testing.assert_close(lv.sketch_cross_entropy(logits, truth), want)


def test_kl_divergence_is_torchs():
    mean, log_variance = torch.randn(2, 1, 16, 2, 2, 2)
    normal = torch.distributions.Normal
    want = torch.distributions.kl_divergence(normal(mean, (0.5 * log_variance).exp()), normal(0.0, 1.0)).mean()
    torch.testing.assert_close(lv.kl_divergence(mean, log_variance), want)


def test_terms():
    network = make("sketch")
    scored = torch.zeros(2, *COARSE, dtype=torch.bool)
    scored[:, :4] = True
    data = batch(scored=scored)
    output = network(data.image, **extra_inputs(network, data))
    labels = data.volume.where(scored, IGNORE)
    torch.testing.assert_close(
        lv.VOLUME_TERMS["volume"](output, data), lv.volume_cross_entropy(output.volume_logits, labels)
    )
    truth = sketch_of(data.volume).where(scored, IGNORE)
    want = sum(lv.sketch_cross_entropy(logits, truth) for logits in (output.sketch.raw, output.sketch.posterior))
    torch.testing.assert_close(lv.VOLUME_TERMS["sketch"](output, data), want)
    sides = Output(side_volume_logits=(output.volume_logits, 2 * output.volume_logits))
    want = sum(lv.volume_cross_entropy(side, labels) for side in sides.side_volume_logits)
    torch.testing.assert_close(lv.VOLUME_TERMS["side_volume"](sides, data), want)
    with pytest.raises(UserError, match="need volume logits"):
        lv.VOLUME_TERMS["volume"](Output(), data)
    with pytest.raises(UserError, match="need a sketch"):
        lv.VOLUME_TERMS["sketch"](Output(), data)


def test_what_lies_behind_the_walls_counts_as_empty():
    """Unknown voxels behind surfaces become empty, as many as there are labels; before surfaces they stay unknown."""
    volume = torch.full((1, 4, 4, 8), 255)
    volume[:, :, :, :2] = 3
    tsdf = torch.ones(1, 1, 16, 16, 32)
    tsdf[..., 16:] = -0.001  # the far half lies behind
    labels = lv.with_outside(volume, volume, tsdf)
    assert (labels[..., :2] == 3).all()
    assert (labels[..., 2:4] == 255).all()  # in view, unknown
    behind = labels[..., 4:]
    assert set(behind.unique().tolist()) == {0, 255}
    assert 12 <= (behind == 0).sum() <= 52  # 32 labels, 64 voxels: about half of them (four standard deviations)
    none = lv.with_outside(volume, volume, tsdf.abs())
    assert torch.equal(none, volume)  # nothing is hidden
