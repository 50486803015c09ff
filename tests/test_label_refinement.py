"""LRN, SegNet and FCN-8s: what crosses from encoder to decoder, shapes at any size, and learning."""

import pytest
import torch
import torch.nn.functional as F

from enfilade import losses
from enfilade.checkpoint import build
from enfilade.errors import UserError
from enfilade.models import label_refinement
from enfilade.models.label_refinement import LRN, FCN8s, Refinement, SegNet, Stage, double
from enfilade.optim import part_of
from enfilade.recipes_lrn import CAMVID_ROWS, camvid_row, scales
from enfilade.types import IGNORE, Batch

K = 5
PLAIN = {"classes": K, "encoder": "test_efficientnet"}  # strides 2 .. 32
VGG = {"classes": K, "encoder": "vgg11_bn"}  # strides 1 .. 32
KINDS = {
    "lrn": lambda **o: LRN(**PLAIN | o),
    "lrn-wide": lambda **o: LRN(**PLAIN | {"widths": (9, 8, 7, 6, 4)} | o),
    "lrn-vgg": lambda **o: LRN(**VGG | o),
    "segnet": lambda **o: SegNet(**PLAIN | {"depth": (2, 1, 1, 2)} | o),
    "segnet-ds": lambda **o: SegNet(**PLAIN | {"depth": (1, 1, 1, 1), "supervise": True} | o),
    "segnet-vgg-ds": lambda **o: SegNet(**VGG | {"depth": (1, 1, 1, 1, 1), "supervise": True} | o),
    "fcn8s": lambda **o: FCN8s(**PLAIN | {"hidden": 0} | o),
    "fcn8s-vgg": lambda **o: FCN8s(**VGG | {"hidden": 16} | o),
}
SIDES = {"lrn": 5, "lrn-wide": 5, "lrn-vgg": 5, "segnet-ds": 4, "segnet-vgg-ds": 4}
SMALL = [k for k in KINDS if "vgg" not in k]


def make(kind: str, **options):
    torch.manual_seed(0)
    return KINDS[kind](**options)


def image(h=64, w=96, b=2, seed=0):
    return torch.rand(b, 3, h, w, generator=torch.Generator().manual_seed(seed))


# shapes and parameters


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(64, 96), (65, 33), (31, 50), (1, 1)])
def test_maps_halve_down_to_stride_32_at_any_size(kind, size):
    network = make(kind).eval()
    with torch.no_grad():
        output = network(image(*size, b=1))
    assert output.logits.shape == (1, K, *size)
    strides = [32, 16, 8, 4, 2] if kind.startswith("lrn") else [16, 8, 4, 2]
    assert len(output.side_logits) == SIDES.get(kind, 0)
    for side, stride in zip(output.side_logits, strides):
        assert side.shape == (1, K, *(-(-n // stride) for n in size))


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_gradient_and_has_one_part(kind):
    network = make(kind).train()
    output = network(image())
    weights = [torch.randn(m.shape, generator=torch.Generator().manual_seed(1)) for m in (output.logits,)]
    total = (output.logits * weights[0]).sum() + sum(side.square().sum() for side in output.side_logits)
    total.backward()
    owners = part_of(network)
    assert {"trunk", "decoder"} == set(owners.values())
    lost = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    # FCN's scores start at 0, so that in the first step nothing below them learns, as its authors have it
    if kind.startswith("fcn8s"):
        lost = [n for n in lost if n.startswith("score")]
    # a convolution before a batch norm of one position per image has no say; none of ours is
    assert lost == []


def test_other_pyramids_are_refused():
    with pytest.raises(UserError, match=r"strides .*mobilenetv2_100"):
        LRN(classes=K, encoder="convnext_atto")
    with pytest.raises(UserError, match="five widths, not 3"):
        LRN(**PLAIN, widths=(4, 4, 4))
    with pytest.raises(UserError, match=r"4 stages here.*not 2"):
        SegNet(**PLAIN, depth=(1, 1))


# LRN


def test_a_refinement_is_figure_2():
    torch.manual_seed(0)
    refine = Refinement(6, 4, K).double().eval()
    coarse, skip = torch.randn(1, K, 7, 9).double(), torch.randn(1, 6, 7, 9).double()
    conv, norm, _ = refine.skip
    m = F.conv2d(skip, conv.weight, padding=1)
    m = (m - norm.running_mean[:, None, None]) / (norm.running_var[:, None, None] + norm.eps).sqrt()
    m = (m * norm.weight[:, None, None] + norm.bias[:, None, None]).clamp(min=0)
    expected = F.conv2d(torch.cat([coarse, m], 1), refine.label.weight, refine.label.bias, padding=1)
    torch.testing.assert_close(refine(coarse, skip), expected)


def test_a_new_refinement_hardly_changes_the_map():
    torch.manual_seed(0)
    refine = Refinement(6, 4, K)
    torch.nn.init.zeros_(refine.label.bias)
    refine.start()
    coarse = torch.randn(2, K, 12, 16)
    # std .01 over 9 taps of K + 4 channels of unit size: about .01 * sqrt(81) = .09 a position
    assert (refine.eval()(coarse, torch.randn(2, 6, 12, 16)) - coarse).std() < 0.2


def test_each_map_depends_on_its_own_skip_and_the_coarser_ones_only():
    network = make("lrn").eval()
    x = image(64, 64, b=1)
    before = network(x)
    maps = [*before.side_logits, before.logits]
    with torch.no_grad():
        network.refine[2].label.weight.add_(0.5)  # makes s_4
    after = network(x)
    for k, (a, b) in enumerate(zip(maps, [*after.side_logits, after.logits]), 1):
        assert torch.equal(a, b) == (k < 4), f"s_{k}"


def test_the_image_stands_in_for_a_missing_first_map():
    """With stride 2 as the finest feature, s_6 sees single pixels of the image all the same."""
    network = make("lrn").eval()
    x = image(64, 64, b=1).requires_grad_()
    with torch.no_grad():
        for refine in network.refine[:-1]:
            refine.label.weight.zero_()
        network.first.weight.zero_()
    network(x).logits[0, :, 20, 30].sum().backward()
    seen = x.grad[0].abs().sum(0).nonzero()
    assert len(seen) > 0
    # two 3x3 convolutions: at most two pixels away
    assert ((seen - torch.tensor([20, 30])).abs() <= 2).all()


def test_with_vgg_the_first_map_is_the_encoders():
    network = make("lrn-vgg")
    assert [r.skip[0].in_channels for r in network.refine] == [512, 512, 256, 128, 64]
    assert [r.skip[0].out_channels for r in network.refine] == [K] * 5


def test_doubling_twice_aligns_with_the_image():
    """A ramp stays a ramp: the centre of a coarse position is the centre of the pixels it covers."""
    x = torch.arange(8.0).expand(1, 1, 8, 8)
    fine = double(x)[0, 0, 4]
    torch.testing.assert_close(fine[1:-1], (torch.arange(16.0)[1:-1] + 0.5) / 2 - 0.5)


@pytest.mark.parametrize("index", range(6))
def test_a_stage_is_one_map_in_its_place(index):
    """Also where the coarse cells reach beyond the image: what it says of a pixel does not depend on the image's size
    being whole cells."""
    network = make("lrn").eval()
    x = image(80, 72, b=1)
    with torch.no_grad():
        stage = Stage(network, index)(x)
        padded = F.pad(x, (0, 96 - 72, 0, 96 - 80), mode="replicate")
        whole = network(padded)
    chosen = (*whole.side_logits, whole.logits)[index]
    expected = F.interpolate(chosen, (96, 96), mode="bilinear")[..., :80, :72]
    torch.testing.assert_close(stage.logits, expected)
    assert stage.side_logits == ()


# SegNet


def test_segnet_puts_features_where_the_maxima_were(monkeypatch):
    network = make("segnet").eval()
    placed = []
    real = F.max_unpool2d

    def watch(x, positions, *args, **options):
        out = real(x, positions, *args, **options)
        placed.append((positions, out))
        return out

    monkeypatch.setattr(label_refinement.F, "max_unpool2d", watch)
    x = image(64, 96, b=1)
    with torch.no_grad():
        network(x)
        maps = network.trunk(x)
    assert len(placed) == 4
    for source, (positions, out) in zip(reversed(maps[:-1]), placed):
        assert out.shape == source.shape
        # one value in each 2x2 window, at the encoder's maximum
        blocks = F.unfold(source.reshape(-1, 1, *source.shape[-2:]), 2, stride=2)
        best = blocks.max(1).values.view(*source.shape[:2], -1)
        torch.testing.assert_close(source.flatten(2).gather(2, positions.flatten(2)), best)
        elsewhere = torch.ones_like(out).flatten(2).scatter(2, positions.flatten(2), 0.0).bool()
        assert (out.flatten(2)[elsewhere] == 0).all()


def test_segnet_on_vgg_uses_the_positions_of_the_encoders_own_pooling():
    network = make("segnet-vgg-ds").eval()
    x = image(64, 64, b=1)
    with torch.no_grad():
        *maps, top = network.trunk(x)
    torch.testing.assert_close(F.max_pool2d(maps[-1], 2), top)  # so these maps are the last before each pooling
    assert isinstance(network.adapt, torch.nn.Identity)


# FCN-8s


def test_fcn_starts_as_bilinear_up_sampling():
    network = make("fcn8s")
    x = torch.randn(1, K, 6, 7)
    inside = network.up[0](x)[..., 2:-2, 2:-2]
    torch.testing.assert_close(inside, double(x)[..., 2:-2, 2:-2])


def test_fcn_adds_three_scores():
    network = make("fcn8s-vgg").eval()
    x = image(64, 64, b=1)
    with torch.no_grad():
        f = network.trunk(x)
        for score in network.score:
            score.weight.normal_()
        coarse = network.up[0](network.score[0](network.dense(f[5]))) + network.score[1](F.max_pool2d(f[3], 2))
        fine = network.up[1](coarse) + network.score[2](F.max_pool2d(f[2], 2))
        expected = F.interpolate(fine, scale_factor=8.0, mode="bilinear")
        torch.testing.assert_close(network(x).logits, expected)


# learning


@pytest.mark.parametrize("kind", SMALL)
def test_overfits_two_samples(kind):
    network = make(kind, classes=3).train()
    x = image(64, 64)
    labels = torch.zeros(2, 64, 64, dtype=torch.int64)
    labels[0, :32], labels[1, :, 32:] = 1, 2
    labels[:, :4] = IGNORE
    batch = Batch(image=x, labels=labels)
    terms = scales(SIDES.get(kind, 0) + 1)
    optimiser = torch.optim.Adam(network.parameters(), lr=3e-3)
    first = None
    for _ in range(60):
        loss, values = losses.objective(network(x), batch, terms)
        first = first or values
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    for name, value in values.items():
        assert value < 0.5 * first[name], name
    valid = labels != IGNORE
    assert (network(x).logits.argmax(1) == labels)[valid].float().mean() > 0.9


@pytest.mark.parametrize("name", CAMVID_ROWS)
def test_rows_differ_only_in_model_and_losses(name):
    recipe = camvid_row(name)
    plain = camvid_row("lrn-camvid-plain")
    same = ("epochs", "size", "zoom", "lr", "lr_parts", "batch", "ema", "weight_decay", "colour", "optimiser")
    assert all(getattr(recipe.stages[0], f) == getattr(plain.stages[0], f) for f in same)
    assert (recipe.seed, recipe.class_weighting, recipe.arguments["encoder"]) == (0, 0.5, "mobilenetv2_100")
    if recipe.model != "peer":
        small = {"encoder": "test_efficientnet"}
        network = build(recipe.model, recipe.arguments | small)
        output = network(image(32, 32, b=1).repeat(2, 1, 1, 1))
        batch = Batch(image=image(32, 32), labels=torch.zeros(2, 32, 32, dtype=torch.int64))
        losses.objective(output, batch, recipe.stages[0].losses, None, recipe.stages[0].resize)  # every map exists
