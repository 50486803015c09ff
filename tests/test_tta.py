"""Scales, windows and mirror images, on networks whose right answer is known: what must not change, does not."""

import itertools
import json

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import enfilade
from enfilade import checkpoint, tta
from enfilade.camera import Camera
from enfilade.cli import main
from enfilade.errors import UserError
from enfilade.evaluate import score
from enfilade.images import Image
from enfilade.ops.decide import decide_reference
from enfilade.predict import Predictor
from enfilade.tta import Augmentation, blend, cover, parse_window, slide, slide_reference
from enfilade.types import Output, Sample

META = {"space": "nyu13", "size": [48, 64], "focal": 50.0, "scale": 0.5}


class Constant(nn.Module):
    """The same answer everywhere, at a quarter of the image."""

    def forward(self, image) -> Output:
        b, _, h, w = image.shape
        logits = torch.arange(13.0).view(1, 13, 1, 1).expand(b, 13, -(-h // 4), -(-w // 4))
        return Output(logits=logits / 4, depth=torch.full((b, -(-h // 2), -(-w // 2)), 2.5))


class Pixelwise(nn.Module):
    """Answers for each pixel by itself, then averages over squares of `pitch` pixels; side logits must not matter."""

    def __init__(self, pitch=1, logits=True, depth=True):
        super().__init__()
        self.pitch, self.give_logits, self.give_depth, self.batches = pitch, logits, depth, []
        self.mix = nn.Conv2d(3, 13, 1, bias=False).requires_grad_(False)
        self.mix.weight.copy_(8 * torch.randn(13, 3, 1, 1, generator=torch.Generator().manual_seed(0)))

    def forward(self, image) -> Output:
        self.batches.append(tuple(image.shape))
        small = F.avg_pool2d(image, self.pitch, ceil_mode=True) if self.pitch > 1 else image
        logits = self.mix(small) if self.give_logits else None
        side = (torch.full((len(image), 13, 2, 2), float("nan")),)
        return Output(logits=logits, depth=1 + 3 * small[:, 2] if self.give_depth else None, side_logits=side)


class Lopsided(nn.Module):
    """Answers with the column, whatever the image: the worst case for mirrors and for seams."""

    def forward(self, image) -> Output:
        b, _, h, w = image.shape
        ramp = torch.linspace(0, 1, w).expand(b, h, w)
        return Output(logits=torch.stack([3 * ramp] + 12 * [1 - ramp], 1), depth=1 + ramp)


class Slope(nn.Module):
    """Depth from the texture of a plane whose brightness rises by `rise` a metre. A camera of f pixels at distance z
    sees it rise by rise * z / f a pixel; the network knows only its canonical camera's f."""

    def __init__(self, rise, focal):
        super().__init__()
        self.factor = focal / rise

    def forward(self, image) -> Output:
        rise = F.pad((image[:, 0, :, 2:] - image[:, 0, :, :-2]) / 2, (1, 1), mode="replicate")
        return Output(depth=rise * self.factor)


class Guided(nn.Module):
    """Takes HHA, and answers with it."""

    uses = ("hha",)

    def forward(self, image, hha) -> Output:
        return Output(depth=hha[:, 1] + image[:, 0])


def photo(height, width, seed=0) -> np.ndarray:
    """Blurred noise in [0, 1]: colourful, without symmetry."""
    noise = np.random.default_rng(seed).random((6, 8, 3), np.float32)
    return cv2.resize(noise, (width, height), interpolation=cv2.INTER_LINEAR)


def tensor(height, width, batch=1) -> torch.Tensor:
    return torch.stack([torch.from_numpy(photo(height, width, i)).movedim(-1, 0) for i in range(batch)])


def predictor(network, meta=META, **options) -> Predictor:
    return Predictor(network, meta, device="cpu", precision="fp32", **options)


# --- windows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [0.0, 0.3, 0.5, 0.9])
def test_windows_cover_every_pixel_and_their_shares_add_up_to_one(overlap):
    for size, window in itertools.product((1, 7, 32, 33, 40, 63, 64, 65, 200, 517), (32, 40, 50, 64, 312)):
        starts = cover(size, window, overlap)
        assert starts[0] == 0
        assert all(start % 8 == 0 for start in starts)
        steps = np.diff(starts)
        assert (steps > 0).all()
        # overlapping as asked, but for windows so small that the next multiple of 8 is farther
        assert (steps <= max(8, window * (1 - overlap))).all()
        assert size <= starts[-1] + window
        if size > window:
            assert starts[-1] + window < size + 8
        shares = blend(starts, window)
        total = torch.zeros(starts[-1] + window)
        for start, share in zip(starts, shares):
            assert (share > 0).all()
            total[start : start + window] += share
        torch.testing.assert_close(total, torch.ones_like(total))


def test_no_more_windows_than_needed():
    for size, window, overlap, count in ((64, 64, 0.5, 1), (96, 64, 0.5, 2), (128, 64, 0.5, 3), (128, 64, 0.0, 2)):
        assert len(cover(size, window, overlap)) == count


@pytest.mark.parametrize("size", [(1, 1), (5, 90), (64, 96), (70, 131), (33, 32), (200, 40)])
@pytest.mark.parametrize("window", [(32, 32), (48, 40), (35, 51)])
def test_windows_of_a_pixelwise_network_are_the_whole_image(size, window):
    image, network = tensor(*size, batch=2), Pixelwise()
    whole = network(image)
    for overlap in (0.0, 0.5, 0.8):
        blended = slide(network, image, window, overlap)
        # float32 products with shares that add up to 1 within rounding; logits reach 20
        torch.testing.assert_close(blended.logits, whole.logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(blended.depth, whole.depth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pitch", [2, 4, 8])
def test_windows_of_a_coarse_network_are_the_whole_image_on_its_own_grid(pitch):
    image, network = tensor(96, 136), Pixelwise(pitch)
    whole, blended = network(image), slide(network, image, (48, 40), 0.5)
    assert blended.logits.shape == whole.logits.shape
    torch.testing.assert_close(blended.logits, whole.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(blended.depth, whole.depth, rtol=1e-5, atol=1e-5)


def test_a_coarse_grid_ends_where_the_image_ends():
    height, width = 67, 97  # no multiples of 4
    ramp = ((torch.arange(width) + 0.5) / width).expand(1, 3, height, width).clone()
    blended = slide(Pixelwise(4), ramp, (40, 40), 0.5).depth
    assert blended.shape == (1, 17, 25)
    wanted = 1 + 3 * (torch.arange(25) + 0.5) / 25
    # the cells at the ends: at the first the ramp has no neighbour on the left, at the last it is continued flat
    torch.testing.assert_close(blended[0, 8, 1:-1], wanted[1:-1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(blended[0, 8, [0, -1]], wanted[[0, -1]], rtol=0, atol=3 * 4 / width)


@pytest.mark.parametrize("network", [Pixelwise(), Lopsided(), Pixelwise(logits=False), Pixelwise(depth=False)])
@pytest.mark.parametrize("size", [(41, 50), (80, 121), (30, 100)])
def test_slide_equals_its_reference(network, size):
    image = tensor(*size, batch=2)
    for window, overlap in (((32, 40), 0.5), ((40, 33), 0.2)):
        fast, slow = slide(network, image, window, overlap), slide_reference(network, image, window, overlap)
        for a, b in ((fast.logits, slow.logits), (fast.depth, slow.depth)):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # fp32 sums against fp64


def test_slide_on_a_coarse_grid_is_near_the_reference_on_pixels():
    def coarse(image):
        """At a quarter, with answers that depend on the place in the window."""
        return Output(depth=F.avg_pool2d(Lopsided()(image).depth, 4))

    image = tensor(64, 96)
    fast, slow = slide(coarse, image, (32, 40), 0.5).depth, slide_reference(coarse, image, (32, 40), 0.5).depth
    fast = F.interpolate(fast[None], slow.shape[-2:], mode="bilinear")[0]
    # Hann weights between four pixels against their straight line: the second derivative, (2 pi / 40)² / 2, times
    # 4² / 8, is 0.025 of answers that spread over 1
    torch.testing.assert_close(fast, slow, rtol=0, atol=0.025)


def test_blending_leaves_no_seams():
    def jump(overlap):
        depth = slide(Lopsided(), tensor(64, 192), (64, 64), overlap).depth
        return float((depth[..., 1:] - depth[..., :-1]).abs().max())

    assert jump(0.0) > 0.9  # from 2 to 1 at once
    # the answer's own slope, 1 / 63; that of the Hann weights, at most pi / 64, times the difference of answers half a
    # window apart, 1 / 2; and as much of that as a new window's first weight, 1 %, brings in at once
    assert jump(0.5) < 1 / 63 + np.pi / 64 / 2 + 0.01


def test_few_windows_at_once_and_each_once():
    network = Pixelwise()
    slide(network, tensor(100, 140, batch=2), (32, 40), 0.5)
    count = 2 * len(cover(100, 32, 0.5)) * len(cover(140, 40, 0.5))
    assert sum(shape[0] for shape in network.batches) == count
    assert max(shape[0] for shape in network.batches) == 8
    assert {shape[2:] for shape in network.batches} == {(32, 40)}


def test_what_a_window_holds_goes_through_whole():
    network = Pixelwise()
    slide(network, tensor(30, 37), (32, 40), 0.5)
    slide(network, tensor(30, 100), (48, 48), 0.5)
    assert network.batches[0] == (1, 3, 30, 37)
    assert {shape[2:] for shape in network.batches[1:]} == {(32, 48)}  # not padded to 48 rows


# --- scales -----------------------------------------------------------------------------------------------------------

WAYS = [
    {},
    {"flip": False},
    {"scales": (0.5, 1.0, 1.7)},
    {"scales": [1.3]},
    {"window": 1.0},
    {"window": (40, 32), "overlap": 0.25},
    {"window": "32x40", "scales": (1.0, 2.0), "overlap": 0.0},
    {"window": 0.75, "scales": (0.7, 1.3), "flip": False},
    {"resolution": "source", "window": 1.0},
    {"resolution": "source", "scales": (1.5,)},
]


@pytest.mark.parametrize("options", WAYS)
@pytest.mark.parametrize("size", [(1, 1), (61, 79), (48, 64), (20, 300)])
def test_a_constant_answer_stays_the_same(options, size):
    # scales show the network cameras of other focal lengths: constant depth is only constant at one of them
    p = predictor(Constant(), **options)
    (h, w), *seen = (p.input_size(*size, s) for s in (1.0, *options.get("scales", (1.0,))))
    wanted = 2.5 * np.mean([np.sqrt(a * b / (h * w)) for a, b in seen])
    answer = p.predict(photo(*size))
    assert answer.labels.shape == answer.depth.shape == size
    assert (answer.labels == 12).all()
    np.testing.assert_allclose(answer.confidence, torch.arange(13.0).div(4).softmax(0)[12], rtol=1e-5)
    np.testing.assert_allclose(answer.depth, wanted, rtol=1e-5)


@pytest.mark.parametrize("flip", [False, True])
def test_scales_are_the_mean_of_their_answers(flip):
    """The definition, written out: resize, ask, resize to the largest answer's grid, scale depth, take the mean."""
    scales, network, image = (0.8, 1.0, 1.5), Pixelwise(4), photo(90, 120)
    probabilities, depths = [], []
    for scale, mirrored in itertools.product(scales, (False, True) if flip else (False,)):
        height, width = round(48 * scale), round(64 * scale)
        how = cv2.INTER_AREA  # 90 x 120 shrinks at every scale
        seen = torch.from_numpy(cv2.resize(image, (width, height), interpolation=how)).movedim(-1, 0)[None]
        output = network(seen.flip(-1) if mirrored else seen)
        p, z = output.logits.softmax(1), output.depth[:, None] * scale
        p, z = (F.interpolate(x.flip(-1) if mirrored else x, (18, 24), mode="bilinear") for x in (p, z))
        probabilities.append(p)
        depths.append(z)
    answer = predictor(network, scales=scales, flip=flip).predict(image)
    labels, confidence = decide_reference(torch.cat(probabilities).mean(0), 90, 120)
    depth = F.interpolate(torch.cat(depths).mean(0, keepdim=True), (90, 120), mode="bilinear")[0, 0]
    # 0.8 * 48 is no whole number: the factor is that of the rounded sizes, 38 x 51 against 48 x 64
    np.testing.assert_allclose(answer.depth, depth, rtol=0.005)
    np.testing.assert_allclose(answer.confidence, confidence, atol=1e-5)
    assert (answer.labels == labels.numpy()).mean() > 0.999  # ties to rounding


@pytest.mark.parametrize("options", WAYS)
@pytest.mark.parametrize(("width", "focal"), [(160, 130.0), (160, 260.0), (300, 200.0)])
def test_depth_is_metres_whatever_the_network_saw(options, width, focal):
    # A plane 3 m away, seen by a camera of `focal` pixels; brightness fills [0, 1] over the image's width
    distance, height = 3.0, width * 3 // 4
    rise = focal / distance / width
    ramp = ((np.arange(width, dtype=np.float32) + 0.5) / width)[None, :, None]
    image = np.broadcast_to(ramp, (height, width, 3)).copy()
    camera = Camera(focal, focal, (width - 1) / 2, (height - 1) / 2, width, height)
    # The mirror image falls: a mirrored slope is a negative depth, which this network alone answers with
    options = options | {"flip": False}
    meta = META | {"size": [96, 128], "focal": 100.0}  # at half of it, still above the least side
    answer = predictor(Slope(rise, meta["focal"]), meta, **options).predict(image, camera=camera)
    middle = answer.depth[height // 4 : -height // 4, width // 4 : -width // 4]
    # Windows lose half the slope at their first and last pixel, where their weight is about 1 % if they overlap.
    # Shrunk by no whole number, a ramp is slightly uneven, but its mean slope is right within the rounding of sizes.
    if options.get("overlap") != 0.0:
        np.testing.assert_allclose(middle, distance, rtol=0.05)
    assert np.median(middle) == pytest.approx(distance, rel=0.035)
    assert middle.mean() == pytest.approx(distance, rel=0.015)


def test_a_factor_of_depth_would_be_noticed():
    """The check of the check above: averaged without the factor, depth would be off by the mean of 1 / s."""
    answers = [(Output(depth=torch.full((1, 4, 4), 2.0 / s)), s) for s in (2.0, 1.0, 0.5)]
    np.testing.assert_allclose(tta.average(answers).depth, 2.0)
    assert float(tta.average([(output, 1.0) for output, _ in answers]).depth.mean()) == pytest.approx(7 / 3)


@pytest.mark.parametrize("options", [o for o in WAYS if o.get("flip", True)])
@pytest.mark.parametrize("network", [Pixelwise(4), Lopsided()])
def test_predictions_follow_the_mirror(options, network):
    image = photo(61, 83)
    p = predictor(network, **options)
    a, b = p.predict(image), p.predict(np.ascontiguousarray(image[:, ::-1]))
    np.testing.assert_allclose(b.depth[:, ::-1], a.depth, atol=1e-4)
    np.testing.assert_allclose(b.confidence[:, ::-1], a.confidence, atol=1e-4)
    assert (b.labels[:, ::-1] == a.labels).mean() > 0.995  # ties to rounding


def test_windows_as_large_as_the_image_change_nothing():
    image = photo(90, 120)
    plain, windowed = (predictor(Pixelwise(4), **o).predict(image) for o in ({}, {"window": 1.0}))
    np.testing.assert_array_equal(plain.depth, windowed.depth)
    np.testing.assert_array_equal(plain.confidence, windowed.confidence)
    larger = {"scales": (1.0, 2.0)}
    plain, windowed = (predictor(Pixelwise(4), **o).predict(image) for o in (larger, larger | {"window": 1.0}))
    np.testing.assert_allclose(plain.depth, windowed.depth, rtol=1e-5)
    np.testing.assert_allclose(plain.confidence, windowed.confidence, atol=1e-5)


def test_the_network_sees_what_was_asked_for():
    network = Pixelwise()
    predictor(network, scales=(0.75, 1.0, 1.5), flip=False).predict(photo(96, 128))
    assert network.batches == [(1, 3, 72, 96), (1, 3, 48, 64), (1, 3, 36, 48)]
    network.batches.clear()
    predictor(network, scales=(2.0,), window=1.0, overlap=0.5).predict(photo(96, 128))
    assert network.batches == [(8, 3, 48, 64), (8, 3, 48, 64), (2, 3, 48, 64)]  # 3 x 3 windows, and their mirrors
    for size in ((96, 128), (200, 90), (500, 700)):
        network.batches.clear()
        p = predictor(network, resolution="source", flip=False)
        answer = p.predict(photo(*size))
        assert network.batches == [(1, 3, size[0] // 2, size[1] // 2)]
        assert answer.camera.fx == pytest.approx(META["focal"] / 0.5)  # the training camera's, in source pixels


def test_one_task_and_hha():
    for options in WAYS:
        only_labels = predictor(Pixelwise(depth=False), **options).predict(photo(61, 79))
        assert only_labels.depth is None
        assert only_labels.labels.shape == (61, 79)
        only_depth = predictor(Pixelwise(logits=False), **options).predict(photo(61, 79))
        assert only_depth.labels is None
        assert only_depth.depth.shape == (61, 79)
        maps = photo(61, 79, seed=1)
        guided = predictor(Guided(), **options).predict(photo(61, 79), hha=maps)
        plain = predictor(Guided(), flip=False, resolution=options.get("resolution", "area"))
        if options.get("scales", (1.0,)) == (1.0,):
            np.testing.assert_allclose(guided.depth, plain.predict(photo(61, 79), hha=maps).depth, rtol=1e-4)


def test_batches_agree_with_single_images():
    sources = [photo(60, 80, 0), photo(60, 80, 1), photo(80, 60, 2), photo(61, 80, 3)]
    for options in ({"scales": (0.8, 1.25)}, {"window": (32, 40), "scales": (1.0, 1.5)}):
        p = predictor(Pixelwise(4), **options)
        for source, b in zip(sources, p.batch(sources)):
            a = p.predict(source)
            np.testing.assert_allclose(b.depth, a.depth, rtol=1e-5)
            np.testing.assert_allclose(b.confidence, a.confidence, atol=1e-5)


def test_a_larger_scale_shows_more():
    """Stripes of two pixels: gone at the training scale, plain at four times of it, and still there in the mean."""
    image = np.zeros((192, 256, 3), np.float32)
    image[:, ::4, 2] = image[:, 1::4, 2] = 1
    contrast = {}
    for scales in ((1.0,), (4.0,), (1.0, 4.0)):
        depth = predictor(Pixelwise(), scales=scales, window=1.0, flip=False).predict(image).depth
        contrast[scales] = float((depth[:, 2:] - depth[:, :-2])[:, 20:-20].std())
    assert contrast[(1.0,)] < 0.01 * contrast[(4.0,)]
    # the mean of the stripes and of nothing, on the finer grid
    assert contrast[(1.0, 4.0)] == pytest.approx(contrast[(4.0,)] / 2, rel=0.02)


# --- options ----------------------------------------------------------------------------------------------------------

BAD = [
    ({"scales": ()}, "not none"),
    ({"scales": (1.0, 0.0)}, "between 0.1 and 10, such as 0.75 1 1.25, not 1 0"),
    ({"scales": (-1.0,)}, "not -1"),
    ({"scales": (75.0,)}, "not 75"),
    ({"scales": (float("nan"),)}, "not nan"),
    ({"overlap": 1.0}, "from 0 to 0.9, not 1"),
    ({"overlap": -0.1}, "not -0.1"),
    ({"window": 0.0}, "0.1 to 10 times as wide as the training input, not 0 times"),
    ({"window": float("nan")}, "not nan"),
    ({"window": (240,)}, "two sides of at least 32 whole network pixels, not 240"),
    ({"window": (240, 16)}, "not 240 x 16"),
    ({"window": "320x16"}, "not 16 x 320"),
    ({"window": "wide"}, "WIDTHxHEIGHT in network pixels, .* not 'wide'"),
    ({"window": "320x"}, "not '320x'"),
    ({"window": "1x2x3"}, "not '1x2x3'"),
]


@pytest.mark.parametrize(("options", "sentence"), BAD)
def test_bad_options_get_a_sentence(options, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        predictor(Constant(), **options)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=sentence):
        enfilade.load("no such model", **options)  # before anything is read


def test_source_resolution_needs_a_scale():
    with pytest.raises(UserError, match="does not tell its training scale"):
        predictor(Constant(), {k: v for k, v in META.items() if k != "scale"}, resolution="source")


def test_windows_in_words_and_factors():
    assert parse_window("320x240") == (240, 320)
    assert parse_window("0.75") == 0.75
    assert Augmentation(window="320X240") == Augmentation(window=[240, 320]) == Augmentation(window=(240, 320))
    size = Augmentation(window=1.0).window_size((313, 418))
    assert size == (312, 416)  # answers at a quarter fit
    assert Augmentation(window=0.1).window_size((48, 64)) == (32, 32)
    assert Augmentation(window=(33, 47)).window_size((48, 64)) == (33, 47)
    assert Augmentation().window_size((48, 64)) is None
    assert hash(Augmentation(scales=[1.0, 2.0], window=[48, 64]))


class Frames:
    """A reader of two frames."""

    name, ignored, score_crop, space = "frames", (), None, enfilade.labels.get("nyu13")

    def __len__(self):
        return 2

    def __getitem__(self, i):
        truth = np.full((48, 64), 12, np.uint8)
        return Sample(photo(48, 64, i), str(i), truth, np.full((48, 64), 2.5, np.float32))


def test_the_protocol_tells_how_images_were_seen():
    plain = score(predictor(Constant()), Frames(), quiet=True)
    assert plain["segmentation"]["miou"] == 1
    told = {k: plain["protocol"][k] for k in ("flip", "scales", "resolution", "window", "overlap")}
    assert told == {"flip": True, "scales": "1", "resolution": "area", "window": None, "overlap": None}
    much = predictor(Constant(), flip=False, scales=(0.75, 1.0), window=1.0, overlap=0.25, resolution="source")
    told = score(much, Frames(), quiet=True)["protocol"]
    assert (told["flip"], told["scales"], told["window"], told["overlap"]) == (False, "0.75 1", "64x48", 0.25)
    assert told["resolution"] == "source"
    json.dumps(told)


# --- the command line -------------------------------------------------------------------------------------------------

TINY = {"classes": 40, "encoder": "test_resnet", "weights": None}
TINY |= {"bottleneck": 8, "widths": (8, 8), "embedding": 8}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A real network of random weights, from its file."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    meta = {"model": "gad", "arguments": TINY, "space": "nyu40", "size": [48, 64], "focal": 50.0, "scale": 0.5}
    checkpoint.save_model(path, checkpoint.build("gad", TINY), meta)
    return str(path)


@pytest.fixture
def picture(tmp_path, monkeypatch) -> str:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    path = str(tmp_path / "photo.png")
    assert cv2.imwrite(path, (255 * photo(90, 130)).astype(np.uint8))
    return path


def test_predict_on_the_command_line(capsys, model, picture, tmp_path):
    words = ["predict", picture, "--model", model, "--files", "arrays", "--json"]
    more = ["--scales", "0.75", "1.5", "--window", "48x40", "--overlap", "0.25", "--resolution", "source", "--no-flip"]
    answers = []
    for name, extra in (("plain", []), ("more", more)):
        assert main([*words, "--out", str(tmp_path / name), *extra]) == 0
        assert json.loads(capsys.readouterr().out)["failed"] == []
        with np.load(tmp_path / name / "photo.npz") as arrays:
            answers.append(arrays["depth"])
    options = {"scales": (0.75, 1.5), "window": (40, 48), "overlap": 0.25, "resolution": "source", "flip": False}
    np.testing.assert_array_equal(answers[0], enfilade.load(model).predict(picture).depth)
    np.testing.assert_array_equal(answers[1], enfilade.load(model, **options).predict(picture).depth)
    assert not np.allclose(answers[0], answers[1])
    lists = options | {"scales": [0.75, 1.5], "window": [40, 48]}  # what cannot be hashed
    np.testing.assert_array_equal(answers[1], enfilade.predict(picture, model, **lists).depth)


def test_evaluate_on_the_command_line(capsys, model, picture, tmp_path):
    rng = np.random.default_rng(0)
    for kind in ("rgb", "depth", "label40"):
        (tmp_path / "nyu" / kind).mkdir(parents=True)
    for name in ("0001", "0002"):
        cv2.imwrite(str(tmp_path / f"nyu/rgb/{name}.jpg"), rng.integers(0, 256, (48, 64, 3), np.uint8))
        cv2.imwrite(str(tmp_path / f"nyu/depth/{name}.png"), rng.integers(1000, 5000, (48, 64), np.uint16))
        cv2.imwrite(str(tmp_path / f"nyu/label40/{name}.png"), rng.integers(0, 41, (48, 64)).astype(np.uint8))
    (tmp_path / "nyu/train.txt").write_text("0001\n0002")
    words = ["evaluate", "--data", "nyuv2", "--root", str(tmp_path / "nyu"), "--model", model]
    assert main([*words, "--scales", "1", "1.25", "--window", "0.75", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["protocol"]
    assert (told["flip"], told["scales"], told["window"], told["overlap"]) == (True, "1 1.25", "48x32", 0.5)
    assert main([*words, "--scales", "1", "1.25", "--window", "0.75"]) == 0
    table = capsys.readouterr().out
    assert "scales: 1 1.25" in table
    assert "window: 48x32" in table


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--scales", "0"], "between 0.1 and 10"),
        (["--window", "wide"], "WIDTHxHEIGHT"),
        (["--window", "20x20"], "at least 32"),
        (["--overlap", "2"], "from 0 to 0.9"),
    ],
)
def test_bad_options_on_the_command_line(capsys, model, picture, tmp_path, words, sentence):
    assert main(["predict", picture, "--model", model, "--out", str(tmp_path), *words]) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err
    assert captured.err.count("\n") == 1


def test_the_cameras_focal_length_scales_depth_however_the_image_was_seen(model):
    rgb = photo(90, 130)
    for options in WAYS:
        p = enfilade.load(model, "cpu", **options)
        near, far = (p.predict(Image(rgb, focal)).depth for focal in (100.0, 200.0))
        np.testing.assert_allclose(far, 2 * near, rtol=1e-5)
