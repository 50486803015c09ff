"""Predicting with networks simple enough to know the right answer, from photos of every kind, good and bad."""

import dataclasses
import io
import json
import math
import os
import subprocess
import sys
import types
import zlib

import cv2
import numpy as np
import PIL.Image
import pytest
import torch
from torch import nn

from enfilade import checkpoint, images, labels, outputs, predict, predict_files, viz
from enfilade.camera import Camera
from enfilade.errors import UserError
from enfilade.ops.decide import decide, decide_reference
from enfilade.predict import Predictor
from enfilade.types import Output, Prediction

META = {"model": "stub", "arguments": {}, "space": "nyu13", "size": [24, 32], "focal": 26.0}


class Stub(nn.Module):
    """At a quarter of the input's size: class c where colour is near the c-th of 13 hues of red and green, and depth
    1 + 3 * blue. It answers for each pixel by itself, so it commutes with mirrors."""

    def __init__(self, classes=13, depth=True, logits=True):
        super().__init__()
        self.give_depth, self.give_logits = depth, logits
        self.mix = nn.Conv2d(3, classes, 1)
        generator = torch.Generator().manual_seed(0)
        self.mix.weight.data = 8 * torch.randn(self.mix.weight.shape, generator=generator)
        self.seen = []

    def forward(self, image) -> Output:
        self.seen.append(tuple(image.shape))
        small = nn.functional.adaptive_avg_pool2d(image, [max(1, s // 4) for s in image.shape[2:]])
        logits = self.mix(small) if self.give_logits else None
        return Output(logits=logits, depth=1 + 3 * small[:, 2] if self.give_depth else None)


class Lopsided(nn.Module):
    """Depth and logits that depend on the column, not on the image: the worst case for a flip."""

    def forward(self, image) -> Output:
        b, _, h, w = image.shape
        ramp = torch.linspace(0, 1, w).expand(b, h, w)
        return Output(logits=torch.stack([3 * ramp] + 12 * [1 - ramp], 1), depth=1 + ramp)


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor(Stub(), META, device="cpu")


def photo(height=60, width=80, seed=0) -> np.ndarray:
    """Blurred noise: uint8, colourful, without symmetry."""
    noise = np.random.default_rng(seed).random((6, 8, 3), np.float32)
    return viz.as_uint8(cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC))


def encoded(array: np.ndarray, kind="PNG", **options) -> bytes:
    stream = io.BytesIO()
    PIL.Image.fromarray(array).save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize("size", [(60, 80), (1, 1), (1, 50), (300, 7), (24, 32), (33, 17), (500, 900)])
def test_every_field_at_the_images_own_size(predictor, size):
    p = predictor(photo(*size))
    assert p.image.shape == (*size, 3)
    assert p.labels.shape == p.depth.shape == p.confidence.shape == size
    assert p.labels.dtype == np.uint8
    assert p.labels.max() < 13
    assert p.confidence.min() >= 1 / 13 - 1e-6
    assert p.confidence.max() <= 1
    assert (p.camera.height, p.camera.width) == size
    assert p.space == "nyu13"


def test_the_network_sees_its_training_scale():
    stub = Stub()
    predictor = Predictor(stub, META, flip=False, device="cpu")
    for height, width in ((24, 32), (480, 640), (640, 480), (12, 16), (3000, 1000)):
        predictor(np.zeros((height, width, 3), np.uint8))
        _, _, h, w = stub.seen[-1]
        # both sides are rounded to whole pixels (and are at least 32 here, where training was at 24)
        assert h == max(32, min(24, 24)) or abs(h * w - 24 * 32) < 32 + 24
    full = Predictor(Stub(), META | {"size": [240, 320]}, device="cpu")
    for height, width in ((480, 640), (640, 480), (3000, 1000), (100, 100), (37, 911)):
        h, w = full.input_size(height, width)
        assert abs(h * w - 240 * 320) <= (h + w) / 2 + 1
        assert w / h == pytest.approx(width / height, rel=1 / min(h, w))
    for extreme in ((1, 1), (1, 100_000), (100_000, 1)):
        h, w = full.input_size(*extreme)
        assert min(h, w) >= 32
        assert h * w <= 240 * 320 * 1.01


def test_depth_is_metric_in_the_focal_length(predictor):
    image = photo()
    one = predictor.predict(image, camera=Camera(70.0, 70.0, 39.5, 29.5, 80, 60))
    two = predictor.predict(image, camera=Camera(140.0, 140.0, 39.5, 29.5, 80, 60))
    np.testing.assert_allclose(two.depth, 2 * one.depth, rtol=1e-6)
    np.testing.assert_array_equal(one.labels, two.labels)
    # the canonical camera: depth is the network's own
    assumed = predictor.predict(image)
    assert assumed.camera_source == "assumed"
    h, w = predictor.input_size(60, 80)
    seen = assumed.camera.resized(w, h)
    assert math.sqrt(seen.fx * seen.fy) == pytest.approx(26.0)
    raw = predictor.infer(torch.from_numpy(predictor.prepare(images.read(image).rgb))[None])
    full = nn.functional.interpolate(raw.depth[None], (60, 80), mode="bilinear")[0, 0]
    np.testing.assert_allclose(assumed.depth, full, rtol=1e-5)
    assert 1 <= assumed.depth.min() <= assumed.depth.max() <= 4


def test_the_same_scene_at_another_resolution_has_the_same_depth(predictor):
    small = photo(60, 80)
    large = cv2.resize(small, (320, 240), interpolation=cv2.INTER_LINEAR)
    a = predictor.predict(small, fov=60.0)
    b = predictor.predict(large, fov=60.0)
    # another resampling into the network: a few percent on blurred noise; a missing zoom would be a factor of 4
    np.testing.assert_allclose(b.depth.mean(), a.depth.mean(), rtol=0.03)
    assert b.camera.fx == pytest.approx(4 * a.camera.fx)


def test_where_the_camera_comes_from(predictor):
    exif = PIL.Image.Exif()
    exif.get_ifd(0x8769)[0xA405] = 28
    data = encoded(photo(), "JPEG", exif=exif.tobytes())
    p = predictor(data)
    assert p.camera_source == "exif"
    assert p.camera.fx == pytest.approx(28 * 100 / math.hypot(36, 24))
    assert predictor(data, fov=60.0).camera_source == "given"
    assert predictor(data, fov=60.0).camera.fov_degrees == pytest.approx(60)
    doubled = predictor(data, camera=Camera.from_fov(160, 120, 50.0))  # same shape: resized
    assert doubled.camera.fov_degrees == pytest.approx(50)
    assert (doubled.camera.width, doubled.camera_source) == (80, "given")
    for options, sentence in (
        ({"camera": Camera.from_fov(60, 80, 50.0)}, "60 x 80"),
        ({"camera": Camera.from_fov(80, 60), "fov": 50.0}, "not both"),
        ({"fov": 0.0}, "field of view"),
        ({"fov": 181.0}, "field of view"),
        ({"fov": float("nan")}, "field of view"),
    ):
        with pytest.raises(UserError, match=sentence):
            predictor(data, **options)


def test_flip_makes_predictions_follow_the_mirror():
    image = photo()
    mirrored = np.ascontiguousarray(image[:, ::-1])
    for network in (Stub(), Lopsided()):
        both = Predictor(network, META, device="cpu", flip=True)
        a, b = both(image), both(mirrored)
        np.testing.assert_allclose(b.depth[:, ::-1], a.depth, atol=1e-5)
        np.testing.assert_allclose(b.confidence[:, ::-1], a.confidence, atol=1e-5)
        # where two classes tie to rounding, either may win
        assert (b.labels[:, ::-1] == a.labels).mean() > 0.999
    single = Predictor(Lopsided(), META, device="cpu", flip=False)
    assert not np.allclose(single(mirrored).depth[:, ::-1], single(image).depth, atol=0.1)
    np.testing.assert_allclose(both(image).depth, 1.5, atol=1e-5)  # the mean of a ramp and its mirror image


def test_flip_changes_nothing_for_a_network_that_commutes_with_it():
    stub = Stub()
    image = photo(24, 32)
    # 4 divides the input's width here, so the stub's pooling is symmetric
    a = Predictor(stub, META | {"size": [32, 44]}, device="cpu", flip=True)(photo(32, 44))
    b = Predictor(stub, META | {"size": [32, 44]}, device="cpu", flip=False)(photo(32, 44))
    np.testing.assert_allclose(a.depth, b.depth, atol=1e-5)
    np.testing.assert_allclose(a.confidence, b.confidence, atol=1e-5)
    assert image.shape == (24, 32, 3)


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (6, 1), (5, 8), (31, 40)])
@pytest.mark.parametrize("size", [(1, 1), (37, 53), (200, 300), (4, 4)])
@pytest.mark.parametrize("sharp", [0.1, 4.0])  # all classes compete; a few large patches
def test_decide_equals_its_reference(grid, size, sharp):
    generator = torch.Generator().manual_seed(0)
    probabilities = (sharp * torch.randn(1, 40, 4, 5, generator=generator)).softmax(1)
    probabilities = nn.functional.interpolate(probabilities, grid, mode="bilinear")[0]
    classes, best = decide(probabilities.numpy(), *size)
    wanted, values = decide_reference(probabilities, *size)
    np.testing.assert_allclose(best, values, atol=1e-6)  # sums of four float32 products in another order
    wrong = classes != wanted.numpy()
    # two classes may tie to rounding; nothing else may differ
    runner_up = nn.functional.interpolate(probabilities[None], size, mode="bilinear")[0].topk(2, 0).values
    assert (runner_up[0] - runner_up[1]).numpy()[wrong].max(initial=0) < 1e-6
    assert classes.dtype == np.uint8


def test_decide_finds_a_class_that_wins_at_no_node():
    # classes 0 and 1 win at the two nodes, class 2 is second at both and wins halfway
    probabilities = np.float32([[[0.6, 0.0]], [[0.0, 0.6]], [[0.4, 0.4]]])
    classes, best = decide(probabilities, 1, 101)
    assert classes[0, 0] == 0
    assert classes[0, 50] == 2
    assert classes[0, -1] == 1
    assert best[0, 50] == pytest.approx(0.4)
    ties, _ = decide(np.full((5, 2, 2), 0.2, np.float32), 3, 3)
    assert (ties == 0).all()


MEMORY = """
import resource, numpy as np, torch
from enfilade.predict import Predictor
from enfilade.types import Output

class Net(torch.nn.Module):
    def forward(self, image):
        b, _, h, w = image.shape
        logits = torch.randn(b, 40, h // 4, w // 4, generator=torch.Generator().manual_seed(0))
        return Output(logits=logits, depth=1 + logits[:, 0].abs())

torch.set_num_threads(1)
predictor = Predictor(Net(), device="cpu")
photo = np.zeros((3000, 4000, 3), np.uint8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
predictor(photo)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read in Linux units")
def test_a_large_photo_does_not_hold_all_classes():
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    # 12 megapixels: the image is 144 MB in float, depth and confidence 48 MB each. All classes would be 1920 MB.
    assert float(run.stdout) < 800


def test_batch_and_stream_agree_with_single(predictor):
    sources = [photo(60, 80, 0), photo(60, 80, 1), photo(80, 60, 2), photo(60, 80, 3)]
    singles = [predictor(s) for s in sources]
    for many in (predictor.batch(sources), predictor.batch(sources, batch_size=1), list(predictor.stream(sources))):
        assert len(many) == len(singles)
        for a, b in zip(singles, many):
            np.testing.assert_allclose(b.depth, a.depth, rtol=1e-5)
            assert (b.labels == a.labels).mean() > 0.999  # ties to rounding
    assert predictor.batch([]) == []
    assert list(predictor.stream([])) == []


def test_stream_gives_errors_in_their_place(predictor, tmp_path):
    good = tmp_path / "good.png"
    good.write_bytes(encoded(photo()))
    results = list(predictor.stream([good, tmp_path / "missing.png", b"junk", good]))
    assert [type(r) for r in results] == [Prediction, UserError, UserError, Prediction]


def test_exif_orientation_reaches_the_prediction(predictor):
    upright = photo(60, 80)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    turned = encoded(np.ascontiguousarray(np.rot90(upright)), "PNG", exif=exif.tobytes())  # 6: turn right to view
    a, b = predictor(upright), predictor(turned)
    np.testing.assert_array_equal(a.labels, b.labels)
    np.testing.assert_array_equal(a.image, b.image)


def test_networks_with_one_task(tmp_path):
    only_labels = Predictor(Stub(depth=False), META, device="cpu")(photo())
    assert only_labels.depth is None
    only_depth = Predictor(Stub(logits=False), META, device="cpu")(photo())
    assert only_depth.labels is None
    assert only_depth.confidence is None
    names = [os.path.basename(p) for p in outputs.save(only_labels, tmp_path, stem="a")]
    assert names == ["a.labels.png", "a.overlay.png", "a.panel.png", "a.npz"]
    names = [os.path.basename(p) for p in outputs.save(only_depth, tmp_path, stem="b")]
    assert names == ["b.depth.png", "b.colour.png", "b.panel.png", "b.npz", "b.ply"]
    for p in (only_labels, only_depth):
        json.dumps(outputs.describe(p))


def test_what_a_predictor_refuses():
    with pytest.raises(UserError, match="13 classes"):
        Predictor(Stub(), META | {"space": "nyu40"}, device="cpu")(photo())
    with pytest.raises(UserError, match="nyu13"):
        Predictor(Stub(), META | {"space": "nyu31"}, device="cpu")
    with pytest.raises(UserError, match="device"):
        Predictor(Stub(), META, device="abacus")
    broken = Stub()
    broken.mix.weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match="NaN"):
        Predictor(broken, META, device="cpu")(photo())


def test_bf16_is_close():
    stub = Stub()
    stub.mix.weight.data /= 8
    a = Predictor(stub, META, device="cpu", precision="fp32")(photo())
    b = Predictor(stub, META, device="cpu", precision="bf16")(photo())
    # inputs, weights and sums are each rounded to 8 bits (1/512): logits of up to ~5 move by up to 0.03, a
    # probability by at most half as much
    np.testing.assert_allclose(b.confidence, a.confidence, atol=0.015)
    assert not np.array_equal(a.confidence, b.confidence)
    assert Predictor(stub, META, device="cpu")(photo()).confidence.tolist() == a.confidence.tolist()  # "auto"


def test_defaults_of_the_header():
    predictor = Predictor(Stub(classes=40), device="cpu")
    assert predictor.space.name == "nyu40"
    assert predictor.area == 240 * 320
    assert predictor.focal == pytest.approx(518.8579 / 2)  # NYUv2's camera at half its size


def test_saved_files_read_back_equal(predictor, tmp_path):
    p = predictor(photo(), fov=70.0)
    p.depth[0, :4] = 0, np.nan, 70, 0.0014
    written = outputs.save(p, tmp_path / "new" / "folder", stem="room")
    names = ["labels.png", "depth.png", "colour.png", "overlay.png", "panel.png", "npz", "ply"]
    assert [os.path.basename(w) for w in written] == [f"room.{n}" for n in names]
    folder = tmp_path / "new" / "folder"
    assert sorted(os.listdir(folder)) == sorted(f"room.{n}" for n in names)  # no temporary file is left
    np.testing.assert_array_equal(cv2.imread(written[0], cv2.IMREAD_UNCHANGED), p.labels)
    millimetres = cv2.imread(written[1], cv2.IMREAD_UNCHANGED)
    assert millimetres.dtype == np.uint16
    assert millimetres[0, :4].tolist() == [0, 0, 65535, 1]
    np.testing.assert_allclose(millimetres[1:] / 1000, p.depth[1:], atol=0.0005 + 1e-6)  # half a millimetre
    drawn = viz.overlay(p.image, p.labels, labels.get("nyu13"))
    np.testing.assert_array_equal(cv2.imread(written[2])[..., ::-1], viz.depth_picture(p.depth))
    np.testing.assert_array_equal(cv2.imread(written[3])[..., ::-1], drawn)
    assert PIL.Image.open(written[4]).size == viz.panel(p).size
    with np.load(written[5], allow_pickle=False) as arrays:
        for field in ("labels", "depth", "confidence"):
            np.testing.assert_array_equal(arrays[field], getattr(p, field))
        np.testing.assert_array_equal(arrays["intrinsics"], p.camera.matrix)
        assert arrays["camera_source"] == "given"
        assert arrays["space"] == "nyu13"
        assert tuple(arrays["names"]) == labels.get("nyu13").names
    with open(written[6], "rb") as file:
        assert file.readline() == b"ply\n"
    assert p.save(tmp_path, stem="b", files=("labels",)) == [str(tmp_path / "b.labels.png")]


def test_spread_is_saved_where_there_is_one(predictor, tmp_path):
    p = predictor(photo())
    assert p.depth_confidence is None
    p = dataclasses.replace(p, depth=np.full_like(p.depth, 2.0), depth_spread=np.full_like(p.depth, 0.1236))
    (picture,) = p.save(tmp_path, stem="room", files=("spread",))
    assert picture.endswith("room.spread.png")
    assert (cv2.imread(picture, cv2.IMREAD_UNCHANGED) == 124).all()
    np.testing.assert_allclose(p.depth_confidence, np.exp(-0.618), rtol=1e-5)
    (arrays,) = p.save(tmp_path, stem="room", files=("arrays",))
    np.testing.assert_array_equal(np.load(arrays)["depth_spread"], p.depth_spread)


def test_save_refuses(predictor, tmp_path):
    p = predictor(photo())
    with pytest.raises(UserError, match=r"'mesh'.*points"):
        outputs.save(p, tmp_path, files=("labels", "mesh"))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file"):
        outputs.save(p, tmp_path / "file")
    assert os.listdir(tmp_path) == ["file"]


def test_describe(predictor):
    p = predictor(photo(), fov=70.0)
    summary = outputs.describe(p, source="x.png", files=["a"], seconds=0.5)
    assert json.loads(json.dumps(summary)) == summary
    assert (summary["width"], summary["height"]) == (80, 60)
    assert sum(summary["classes"].values()) == pytest.approx(1)
    names = labels.get("nyu13").names
    for name, share in summary["classes"].items():
        assert share == pytest.approx((p.labels == names.index(name)).mean())
    assert summary["depth"]["median"] == pytest.approx(float(np.median(p.depth)))
    assert summary["camera"]["source"] == "given"
    assert summary["camera"]["fov"] == pytest.approx(70)


def bad_folder(root) -> set[str]:
    """Good pictures among every kind of bad one; returns the names of the bad."""
    (root / "sub").mkdir(parents=True)
    good = encoded(photo())
    for name in ("a.png", "sub/a.png", "sub/b.png"):
        (root / name).write_bytes(good)
    (root / "a.jpg").write_bytes(encoded(photo(seed=1), "JPEG"))
    (root / "tiny.gif").write_bytes(encoded(np.zeros((1, 1), np.uint8), "GIF"))
    (root / "notes.txt").write_text("not looked at")
    (root / "cut.png").write_bytes(good[: len(good) // 2])
    (root / "empty.jpg").touch()
    (root / "text.jpg").write_text("words")
    (root / "movie.mp4").write_text("no movie")
    bomb = bytearray(good)  # the header claims 60000 x 60000; zlib's checksum of it follows
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bytes(bomb[12:29])).to_bytes(4, "big")
    (root / "bomb.png").write_bytes(bomb)
    return {"cut.png", "empty.jpg", "text.jpg", "movie.mp4", "bomb.png"}


def test_a_folder_with_bad_files_among_good(predictor, tmp_path):
    bad = bad_folder(tmp_path / "in")
    heard = []
    summary = predict_files.predict_many(
        tmp_path / "in",
        tmp_path / "out",
        predictor,
        files=("labels", "depth"),
        on_result=lambda path, result: heard.append((path, isinstance(result, UserError))),
    )
    assert {os.path.basename(path) for path, _ in summary.failed} == bad
    for path, reason in summary.failed:
        assert os.path.basename(path) in reason
        assert "\n" not in reason
    written = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.*")}
    stems = ("a", "a-2", "sub/a", "sub/b", "tiny")
    written.remove("manifest.jsonl")
    assert written == {f"{s}.{kind}.png" for s in stems for kind in ("labels", "depth")}
    assert {os.path.relpath(d["source"], tmp_path / "in") for d in summary.done} == {
        *("a.jpg", "a.png", "sub/a.png", "sub/b.png", "tiny.gif")
    }
    assert {f for d in summary.done for f in d["files"]} == {str(tmp_path / "out" / w) for w in written}
    assert len(heard) == 10
    assert {os.path.basename(path) for path, failed in heard if failed} == bad
    # each picture got its own answer
    jpg = cv2.imread(str(tmp_path / "out" / "a.labels.png"), -1)
    np.testing.assert_array_equal(jpg, predictor(tmp_path / "in" / "a.jpg").labels)


def test_a_second_run_does_not_predict_on_the_first_ones_pictures(predictor, tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(photo()))
    for _ in range(2):
        summary = predict_files.predict_many(tmp_path, tmp_path, predictor)
        assert [os.path.basename(d["source"]) for d in summary.done] == ["a.png"]
    named = predict_files.predict_many(tmp_path / "a.overlay.png", tmp_path / "b", predictor, files=("labels",))
    assert len(named.done) == 1


def test_video(predictor, tmp_path):
    path = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, (80, 60))
    for seed in range(5):
        writer.write(photo(seed=seed))
    writer.release()
    (tmp_path / "after.png").write_bytes(encoded(photo()))
    summary = predict_files.predict_many(
        [path, tmp_path / "after.png"], tmp_path / "out", predictor, files=("labels",), every=2
    )
    assert [d["source"] for d in summary.done] == [*(f"{path}#{i}" for i in (0, 2, 4)), str(tmp_path / "after.png")]
    names = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.png")}
    assert names == {*(f"clip/{i:06d}.labels.png" for i in (0, 2, 4)), "after.labels.png"}
    assert not summary.failed


def test_predict_many_fails_at_once_for_what_cannot_work(predictor, tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(photo()))
    (tmp_path / "taken").touch()
    for paths, out, options, sentence in (
        ([tmp_path / "a.png", tmp_path / "missing.png"], "out", {}, r"missing\.png"),
        (tmp_path / "a.png", "taken", {}, "taken"),
        (tmp_path / "a.png", "out", {"files": ("label",)}, "'label'"),
    ):
        with pytest.raises(UserError, match=sentence):
            predict_files.predict_many(paths, tmp_path / out, predictor, **options)


def test_an_output_that_breaks_midway_is_named(predictor, tmp_path):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    for name in ("a.png", "sub/b.png"):
        (tmp_path / "in" / name).write_bytes(encoded(photo()))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sub").touch()  # a file where a folder must go
    summary = predict_files.predict_many(tmp_path / "in", tmp_path / "out", predictor, files=("labels",))
    assert len(summary.done) == 1
    assert str(tmp_path / "out" / "sub") in summary.failed[0][1]


def test_load_and_predict_by_name(monkeypatch, tmp_path):
    asked = []

    def load(name, device="cpu"):
        asked.append(name)
        return types.SimpleNamespace(network=Stub(), meta=META)

    monkeypatch.setattr(checkpoint, "load", load)
    predict._loaded.cache_clear()
    a = predict.load("mine", "cpu").predict(photo())
    b = predict.predict(photo(), "mine", device="cpu", fov=60.0)
    c = predict.predict(photo(), "mine", device="cpu")
    predict._loaded.cache_clear()
    assert asked == ["mine", "mine"]  # the third call found the second one's model
    np.testing.assert_array_equal(a.depth, c.depth)
    assert b.camera_source == "given"
