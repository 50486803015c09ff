"""RSN: Table 1 layer by layer, the two modules' hand-over of depth, what learns when, and guidance in metres."""

import json

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from enfilade import experiments, losses, recipes, recipes_rsn
from enfilade.camera import Camera
from enfilade.data.epochs import with_regions
from enfilade.errors import UserError
from enfilade.evaluate import score
from enfilade.models.region_support import RSN, SCALES, HalfResNet, PyramidUnit, filled
from enfilade.ops.regions import region_support, regions
from enfilade.optim import freeze
from enfilade.predict import Predictor
from enfilade.train import extra_inputs
from enfilade.types import Batch, Output, Prediction, Sample

SMALL = {"encoder": "mobilenetv2_035", "width": 16, "refine_width": 4}


def make(**options) -> RSN:
    torch.manual_seed(0)
    return RSN(**SMALL | options)


def image(h=64, w=96, b=2, seed=0):
    return torch.rand(b, 3, h, w, generator=torch.Generator().manual_seed(seed))


def truth(h=64, w=96, b=2):
    """Region support of patches 16 pixels wide, void in one of them."""
    patches = 1 + 4 * torch.rand(b, 1, -(-h // 16), -(-w // 16), generator=torch.Generator().manual_seed(1))
    patches[:, :, 0, 0] = 0
    return F.interpolate(patches, scale_factor=16, mode="nearest")[:, 0, :h, :w].contiguous()


# --- the network ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 96), (65, 33), (31, 50)])
@pytest.mark.parametrize(
    ("options", "sides"),
    [
        ({}, 3),
        ({"refinement": False}, 0),
        ({"generation": False}, 2),
        ({"residual": True, "iterations": 1}, 1),
        ({"encoder": "resnet34-half", "width": 16}, 3),
        ({"generation": False, "refinement": False}, 0),
    ],
)
def test_shapes_at_any_size(size, options, sides):
    h, w = size
    network = make(**options).eval()
    with torch.no_grad():
        given = {"support": truth(*size)} if network.uses else {}
        output = network(image(*size), **given)
    stride = 1 if options.get("encoder") == "resnet34-half" else 2
    assert output.logits is None
    assert output.depth.shape == (2, -(-h // stride), -(-w // stride))
    assert [d.shape for d in output.side_depths] == [output.depth.shape] * sides
    assert output.depth.min() > 0


def test_table_1():
    """Channels in and out and strides of the printed layers; the first twenty from ResNet-34 (see `HalfResNet`)."""
    network = RSN()
    wide = [(m.in_channels, m.out_channels) for m in network.generation.modules() if isinstance(m, nn.Conv2d)]
    levels = [(512, 64)] * len(SCALES)
    assert wide[:2] == [(64, 128), (128, 128)]  # 5, 6
    assert wide[2 : 2 + len(SCALES)] == levels  # 21
    assert wide[2 + len(SCALES) :] == [
        *((512, 512), (1024, 512), (256, 128)),  # 22, 23, 25; 24 is the transposed one
        *((256, 128), (128, 128), (128, 128), (128, 128), (128, 1)),  # 26-30
    ]
    (up,) = [m for m in network.generation.modules() if isinstance(m, nn.ConvTranspose2d)]
    assert (up.in_channels, up.out_channels, up.stride) == (512, 256, (2, 2))
    narrow = [(m.in_channels, m.out_channels) for m in network.refinement.modules() if isinstance(m, nn.Conv2d)]
    assert narrow[:6] == [(5, 64), *[(64, 64)] * 3, (64, 128), (128, 128)]  # 1-6
    assert narrow[6:14] == [(128, 16)] * len(SCALES)  # 7
    assert narrow[14:] == [(128, 128), (256, 128), *[(128, 128)] * 5, (128, 1)]  # 8, 9, 10-15


def test_the_trunk_is_sub_sampled_once():
    trunk = HalfResNet().eval()
    with torch.no_grad():
        fine, coarse = trunk(image(32, 48, 1))
    assert fine.shape == (1, 64, 32, 48)
    assert coarse.shape == (1, 512, 16, 24)
    assert (
        sum(isinstance(m, nn.Conv2d) and m.stride != (1, 1) for m in trunk.modules()) == 2
    )  # a unit and its short cut


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_pyramid_averages_over_cells(stride):
    """One level by hand: the mean over a cell of `scale` pixels, the 1x1 convolution, bilinear enlargement."""
    torch.manual_seed(0)
    unit = PyramidUnit(8, stride).eval()
    x = torch.randn(1, 8, 320 // stride, 160 // stride)
    got = unit(x)
    assert got.shape == x.shape
    for level, scale in enumerate(SCALES):
        if scale % stride and scale > stride:
            continue  # cells that share pixels: adaptive pooling's own business
        cells = max(scale // stride, 1)
        assert x.shape[2] % cells == 0
        means = x.view(1, 8, x.shape[2] // cells, cells, x.shape[3] // cells, cells).mean((3, 5))
        want = F.interpolate(unit.tops[level](means), x.shape[2:], mode="bilinear", align_corners=False)
        torch.testing.assert_close(got[:, level : level + 1], want, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="divides its channels by 8: 12 do not"):
        PyramidUnit(12, 2)


def test_each_iteration_takes_the_last_ones_depth():
    """Three iterations are one, three times, by the same weights and guidance."""
    network = make().eval()
    with torch.no_grad():
        output = network(image())
        generated, *steps = [*output.side_depths, output.depth]
        small, depth = F.avg_pool2d(image(), 2), generated
        for step in steps:
            depth = network.refinement(small, generated, depth)
            torch.testing.assert_close(step, depth)
    assert len(steps) == 3
    assert not torch.allclose(steps[0], steps[1])


def test_a_residual_refinement_that_changes_nothing_returns_its_start():
    network = make(residual=True, generation=False).eval()
    nn.init.zeros_(network.refinement.regress[-1].weight)
    support = truth()
    with torch.no_grad():
        output = network(image(), support=support)
    torch.testing.assert_close(output.depth, filled(support[:, 1::2, 1::2]))


def test_void_starts_from_the_mean_of_the_image():
    support = torch.tensor([[[0.0, 2.0], [4.0, 0.0]], [[0.0, 0.0], [0.0, 5.0]]])
    assert filled(support).tolist() == [[[3.0, 2.0], [4.0, 3.0]], [[5.0, 5.0], [5.0, 5.0]]]
    assert (filled(torch.zeros(1, 2, 2)) > 0).all()  # an image without any support still has a logarithm


def test_a_true_support_takes_the_place_of_the_generated_one():
    network = make(residual=True).eval()
    with torch.no_grad():
        told, other = network(image(), support=truth()), network(image(), support=2 * truth())
        own = network(image())
    assert len(told.side_depths) == 2  # nothing is generated
    assert len(own.side_depths) == 3
    assert not torch.allclose(told.depth, own.depth)
    assert (other.depth / told.depth).median() > 1.5


def test_labels_guide_by_numbers_that_are_learned():
    network = make(semantic=True)
    labels = torch.zeros(2, 64, 96, dtype=torch.int64)
    labels[:, :, 48:] = 255  # void has a number of its own
    output = network(image(), labels=labels)
    output.depth.sum().backward()
    seen = network.numbers.weight.grad.abs().sum(1) > 0
    assert seen.nonzero().flatten().tolist() == [0, 40]
    with pytest.raises(ValueError, match="guided by labels: give it"):
        network(image())
    with pytest.raises(UserError, match="semantic needs both modules"):
        make(semantic=True, generation=False)
    with pytest.raises(UserError, match="at least one iteration, not 0"):
        make(iterations=0)


@pytest.mark.parametrize(
    ("stage", "learning", "given"),
    [
        ("support-log", {"trunk", "generation"}, False),
        ("refinement", {"refinement"}, True),
        ("freeze-generation", {"refinement"}, False),
        ("freeze-refinement", {"trunk", "generation"}, False),  # the gradient passes through the frozen refinement
        ("both-log", {"trunk", "generation", "refinement"}, False),
    ],
)
def test_what_learns_in_each_stage(stage, learning, given):
    (chosen,) = [s for s in recipes.rsn_row("rsn-end-to-end").stages if s.name == stage]
    network = make(residual=True)
    nn.init.normal_(network.refinement.regress[-1].weight, std=0.1)  # a first step from 1e-3 is too small to see
    freeze(network, chosen)
    before = {k: v.clone() for k, v in network.named_buffers()}
    batch = with_truth(Batch(image=image(), depth=truth() + 0.5))
    assert (chosen.inputs == ("support",)) == given
    output = network(batch.image, **extra_inputs(network, batch, chosen.inputs))
    losses.objective(output, batch, chosen.losses)[0].backward()
    for part, modules in network.parts.items():
        for module in modules:
            gradients = [p.grad is not None and bool(p.grad.any()) for p in module.parameters()]
            assert all(gradients) if part in learning else not any(p.grad is not None for p in module.parameters())
            moved = [not torch.equal(b, before[f"{part}.{k}"]) for k, b in module.named_buffers()]
            assert any(moved) == (part in learning)  # a frozen module's batch norms stand still


def with_truth(batch: Batch) -> Batch:
    support = truth()
    ids = torch.stack([torch.from_numpy(regions((1000 * s).int().numpy(), void=-1)[0]) for s in support]).long()
    return Batch(image=batch.image, depth=batch.depth, support=support, regions=ids)


def test_a_recipe_without_region_support_says_so():
    with pytest.raises(UserError, match="needs support in its data: choose data with labels and depth"):
        extra_inputs(make(), Batch(image=image()), ("support",))
    with pytest.raises(UserError, match="made from labels and depth, and one of them is missing"):
        with_regions(Sample(image=np.zeros((4, 4, 3), np.float32), name="x"))


# --- losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["region_l2", "region_l1", "region_l2_log", "region_l1_log"])
def test_region_loss_by_loops(name):
    """Eq. (2) as written: for each region the mean error inside it, then the mean over regions, then over images."""
    g = torch.Generator().manual_seed(0)
    predicted = 1 + 3 * torch.rand(2, 6, 8, generator=g, dtype=torch.float64)
    target = 1 + 3 * torch.rand(2, 6, 8, generator=g, dtype=torch.float64)
    target[torch.rand(2, 6, 8, generator=g) < 0.2] = 0
    ids = torch.randint(0, 5, (2, 6, 8), generator=g)
    total = 0.0
    for b in range(2):
        means = []
        for region in range(1, 5):
            where = (ids[b] == region) & (target[b] > 0)
            p, t = predicted[b][where], target[b][where]
            error = p.log() - t.log() if name.endswith("log") else p - t
            means.append((error**2 if "l2" in name else error.abs()).mean().item())
        total += sum(means) / len(means) / 2
    output = Output(depth=predicted)
    batch = Batch(image=torch.zeros(2, 3, 6, 8), depth=target, regions=ids, support=2 * target)
    got = losses.objective(output, batch, {name: 1.0})[0]
    assert got.item() == pytest.approx(total, rel=1e-6)
    # the same error against the region support
    doubled = losses.objective(Output(depth=2 * predicted), batch, {name.replace("region", "support"): 1.0})[0]
    scale = 1 if name.endswith("log") else 4 if "l2" in name else 2
    assert doubled.item() == pytest.approx(scale * total, rel=1e-6)


def test_a_small_region_counts_as_much_as_a_large_one():
    target, ids = torch.full((1, 10, 10), 2.0), torch.ones(1, 10, 10, dtype=torch.int64)
    ids[0, 0, 0] = 2
    predicted = target.clone()
    predicted[0, 0, 0] = 3.0  # an error of 1 m in one of two regions
    assert losses.depth_region(predicted, target, ids).item() == pytest.approx(0.5)
    assert losses.depth_l2(predicted, target).item() == pytest.approx(0.01)
    assert losses.depth_region(predicted, torch.zeros_like(target), ids).item() == 0


def test_iterations_and_combination_weigh_as_printed():
    output = Output(
        depth=torch.full((1, 4, 4), 4.0), side_depths=tuple(torch.full((1, 4, 4), d) for d in (1.0, 2.0, 3.0))
    )
    batch = Batch(
        image=torch.zeros(1, 3, 4, 4),
        depth=torch.full((1, 4, 4), 1.0),
        support=torch.full((1, 4, 4), 3.0),
        regions=torch.ones(1, 4, 4, dtype=torch.int64),
    )
    iterated = 0.2 * 1 + 0.3 * 4 + 0.5 * 9  # Eq. (3): of 2, 3 and 4 m against 1 m
    assert losses.objective(output, batch, recipes_rsn.iterations("region_l2"))[0].item() == pytest.approx(iterated)
    combined = 0.3 * 4 + 0.7 * iterated  # Eq. (4): 1 m against a support of 3 m
    assert losses.objective(output, batch, recipes_rsn.combined("l2"))[0].item() == pytest.approx(combined)
    with pytest.raises(UserError, match="depth map d5, but this model makes 4"):
        losses.objective(output, batch, {"region_l2/d5": 1.0})


def test_void_is_a_region_of_the_loss_but_has_no_support():
    labels = np.full((6, 6), 3, np.uint8)
    labels[2:4, 2:4] = 255
    sample = with_regions(
        Sample(image=np.zeros((6, 6, 3), np.float32), labels=labels, depth=np.ones((6, 6), np.float32))
    )
    assert len(np.unique(sample.regions)) == 2
    assert (sample.regions > 0).all()
    assert (sample.support[labels == 255] == 0).all()
    assert (sample.support[labels == 3] == 1).all()


# --- prediction -------------------------------------------------------------------------------------------------------

META = {"space": "nyu40", "size": [48, 64], "focal": 50.0, "scale": 0.5}


@pytest.mark.parametrize("options", [{}, {"scales": (0.75, 1.0, 1.25)}, {"window": 0.5}])
@pytest.mark.parametrize("focal", [50.0, 180.0])
def test_guidance_is_metres_whatever_the_lens(options, focal):
    """A network that returns the support it is given answers with the very depth, at any focal length and scale."""
    predictor = Predictor(RSN(generation=False, refinement=False, encoder="mobilenetv2_035"), META, **options)
    support = np.full((96, 128), 2.5, np.float32)
    rgb = np.random.default_rng(0).random((96, 128, 3), np.float32)
    camera = Camera(focal, focal, 63.5, 47.5, 128, 96)
    got = predictor.predict(rgb, camera=camera, support=support)
    np.testing.assert_allclose(got.depth, 2.5, rtol=1e-5)
    with pytest.raises(UserError, match="takes region support beside RGB: give support"):
        predictor.predict(rgb, camera=camera)
    with pytest.raises(UserError, match="support is 64 x 48 pixels, the image 128 x 96"):
        predictor.predict(rgb, camera=camera, support=support[::2, ::2])


class Guide:
    """Answers with two labels and a depth for each."""

    class space:
        name = "nyu40"

    def __init__(self):
        self.meta = {"recipe": "a guide"}

    def predict(self, rgb, camera=None):
        labels = np.zeros(rgb.shape[:2], np.uint8)
        labels[:, labels.shape[1] // 2 :] = 7
        return Prediction(image=rgb, labels=labels, depth=np.where(labels == 7, 4.0, 1.5).astype(np.float32))


def test_a_guide_stands_in_for_the_truth():
    predictor = Predictor(RSN(generation=False, refinement=False, encoder="mobilenetv2_035"), META, guide=Guide())
    rgb = np.random.default_rng(0).random((48, 64, 3), np.float32)
    camera = Camera(50.0, 50.0, 31.5, 23.5, 64, 48)
    got = predictor.predict(rgb, camera=camera).depth
    np.testing.assert_allclose(got[:, :28], 1.5, rtol=1e-5)
    np.testing.assert_allclose(got[:, 36:], 4.0, rtol=1e-5)

    class Other(Guide):
        class space:
            name = "nyu13"

    with pytest.raises(UserError, match="the guide answers in nyu13"):
        Predictor(make(), META, guide=Other())


def test_spread_is_that_of_the_iterations():
    network = make().eval()
    predictor = Predictor(network, META, flip=False)
    rgb = np.random.default_rng(0).random((48, 64, 3), np.float32)
    camera = Camera(100.0, 100.0, 31.5, 23.5, 64, 48)  # twice the canonical focal length
    got = predictor.predict(rgb, camera=camera)
    with torch.no_grad():
        output = network(torch.from_numpy(rgb).permute(2, 0, 1)[None])
    steps = torch.stack([*output.side_depths[1:], output.depth])  # the generated support is no iteration
    want = 2 * F.interpolate(steps.std(0, correction=0)[None], (48, 64), mode="bilinear", align_corners=False)[0, 0]
    np.testing.assert_allclose(got.depth_spread, want.numpy(), rtol=1e-3, atol=1e-5)
    assert Predictor(make(refinement=False), META).predict(rgb).depth_spread is None


def test_scoring_gives_the_true_support_where_asked():
    rgb = np.random.default_rng(0).random((48, 64, 3), np.float32)
    labels = np.repeat(np.arange(4, dtype=np.uint8), 16)[None].repeat(48, 0)
    depth = (1 + labels).astype(np.float32)
    camera = Camera(50.0, 50.0, 31.5, 23.5, 64, 48)

    class Reader:
        from enfilade.labels import get

        space, name, names, ignored, score_crop = get("nyu40"), "made/val", ("0",), (), None

        def __len__(self):
            return 1

        def __getitem__(self, index):
            return Sample(image=rgb, name="0", labels=labels, depth=depth, camera=camera)

    support = RSN(generation=False, refinement=False, encoder="mobilenetv2_035")
    report = score(Predictor(support, META), Reader(), quiet=True)
    assert report["protocol"]["given"] == ["support"]
    assert report["depth"]["rmse"] < 0.35  # the truth, but for the edges of a map half as large
    network = make(residual=True)
    told = score(Predictor(network, META), Reader(), given=("support",), quiet=True)
    own = score(Predictor(network, META), Reader(), quiet=True)
    assert "given" not in own["protocol"]
    assert told["depth"]["rmse"] < 0.5 < own["depth"]["rmse"]
    guided = score(Predictor(support, META, guide=Guide()), Reader(), quiet=True)
    assert guided["protocol"]["guide"] == "a guide"
    np.testing.assert_equal(region_support(labels, depth), depth)


# --- the table --------------------------------------------------------------------------------------------------------


def test_rows_go_on_from_what_they_share():
    """Baseline1 is the beginning of Baseline3, and that of the rows with one module frozen."""
    stages = {name: recipes.rsn_row(name).stages for name in recipes.RSN_ROWS}
    first = stages["rsn-generation"]
    assert stages["rsn-initialised"][:2] == first == stages["rsn-semantic"][:2]
    assert stages["rsn-freeze-refinement"][:3] == stages["rsn-initialised"] == stages["rsn-freeze-generation"][:3]
    assert stages["rsn-end-to-end"][:4] == stages["rsn-freeze-generation"]
    assert stages["rsn-coarse"][:2] == stages["rsn-depth"] != first


def test_table_3_scores_one_model_with_and_without_the_truth(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for kind in ("rgb", "depth", "label40"):
        (tmp_path / kind).mkdir()
    for i in ("0001", "0002", "0003"):
        cv2.imwrite(str(tmp_path / f"rgb/{i}.jpg"), rng.integers(0, 256, (96, 128, 3), np.uint8))
        cv2.imwrite(
            str(tmp_path / f"depth/{i}.png"), rng.integers(1000, 4000, (6, 8), np.uint16).repeat(16, 0).repeat(16, 1)
        )
        cv2.imwrite(
            str(tmp_path / f"label40/{i}.png"), rng.integers(1, 5, (6, 8), np.uint8).repeat(16, 0).repeat(16, 1)
        )
    (tmp_path / "train.txt").write_text("0001\n0002")
    (tmp_path / "val.txt").write_text("0003")

    def tiny(name, weights=None):
        recipe = recipes.RECIPES[name](weights)
        return recipe.replace(arguments=recipe.arguments | SMALL).with_stages(size=(32, 32), batch=2)

    monkeypatch.setattr(experiments.recipes, "get", tiny)
    options = {"root": str(tmp_path), "out": tmp_path / "out", "epochs": 1, "workers": 0, "quiet": True}
    rows = ("rsn-generation", "rsn-support", "rsn-initialised")
    text = experiments.reproduce("rsn-table3", rows=rows, **options)
    saved = json.loads((tmp_path / "out/rsn-table3.json").read_text())["rows"]
    assert [r["recipe"] for r in saved] == ["rsn-generation", "rsn-support", "rsn-initialised", "rsn-initialised"]
    _, alone, whole, told = (r["ours"]["depth rmse"] for r in saved)
    assert alone != whole != told
    assert "| Refinement, true region support | 0.085 | 0.106 | 0.292 |" in text
