"""The CRF after any network: what it is given, what it makes of it, and files of one who has only probabilities."""

import json

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from enfilade import labels
from enfilade.camera import Camera
from enfilade.cli import main
from enfilade.errors import UserError
from enfilade.ops.crf import Kernel
from enfilade.ops.crf import refine as refine_reference
from enfilade.predict import Predictor
from enfilade.refine import CRF, MEASURED, read_depth, read_probabilities, refine_files
from enfilade.types import Output
from enfilade.verbs_predict import Refine

H, W = 48, 64
META = {"space": "nyu40", "size": [H, W], "focal": 52.0}
TRUTH = np.where(np.arange(W) < W // 2, 3, 7)[None].repeat(H, 0)  # two walls
SHARP = CRF(kernels=(Kernel(xy=80.0, rgb=13.0), Kernel(xy=50.0, depth=0.2), Kernel(xy=3.0)), weights=(3.0, 2.0, 1.0))


def photo() -> np.ndarray:
    """Two plain halves."""
    return np.where((np.arange(W) < W // 2)[None, :, None], 0.2, 0.8).repeat(H, 0).repeat(3, 2).astype(np.float32)


def noisy(classes=40, size=(H // 4, W // 4), strength=1.5) -> torch.Tensor:
    """Logits at a quarter of the photo's size that are right more often than not."""
    noise = torch.randn(1, classes, *size, generator=torch.Generator().manual_seed(0))
    truth = torch.from_numpy(cv2.resize(TRUTH.astype(np.uint8), size[::-1], interpolation=cv2.INTER_NEAREST)).long()
    return strength * noise + 4 * nn.functional.one_hot(truth, classes).movedim(-1, 0)[None]


class Fixed(nn.Module):
    """Answers with the same maps for every image."""

    def __init__(self, logits, depth=None):
        super().__init__()
        self.logits, self.depth_map = logits, depth

    def forward(self, image):
        b = len(image)
        depth = None if self.depth_map is None else self.depth_map.expand(b, -1, -1)
        return Output(logits=self.logits.expand(b, -1, -1, -1), depth=depth)


def wrong(prediction) -> float:
    return float((prediction.labels != TRUTH).mean())


def test_labels_follow_the_photo():
    network = Fixed(noisy())
    plain = Predictor(network, META, flip=False).predict(photo())
    refined = Predictor(network, META, flip=False, crf=True).predict(photo())
    assert wrong(plain) > 0.03
    assert wrong(refined) < wrong(plain) / 2
    assert refined.confidence.min() > 0
    np.testing.assert_array_equal(refined.image, plain.image)


def test_depth_is_compared_in_metres_of_the_camera():
    """A step in depth where the photo has none parts the labels; farther cameras make the same step larger."""
    step = torch.where(torch.arange(W // 4) < W // 8, 2.0, 2.1).expand(1, H // 4, W // 4)
    grey = np.full((H, W, 3), 0.5, np.float32)
    only_depth = CRF(kernels=(Kernel(xy=500.0, depth=0.2),), weights=(6.0,))

    def scored(focal):
        predictor = Predictor(Fixed(noisy(strength=3.0), step), META, flip=False, crf=only_depth)
        return wrong(predictor.predict(grey, camera=Camera(focal, focal, W / 2, H / 2, W, H)))

    assert scored(52.0 * 20) < scored(52.0) / 2  # steps of 2 m and of 0.1 m
    flat = Predictor(Fixed(noisy()), META, flip=False, crf=only_depth).predict(grey)  # without depth no kernel is left
    np.testing.assert_array_equal(flat.labels, Predictor(Fixed(noisy()), META, flip=False).predict(grey).labels)


def test_it_is_the_crf_of_ops_at_the_photos_size():
    probabilities, image = noisy().softmax(1), torch.from_numpy(photo()).permute(2, 0, 1)[None]
    got = SHARP(probabilities, image)
    full = nn.functional.interpolate(probabilities, (H, W), mode="bilinear", align_corners=False)
    ratio = 0.1  # sqrt(48 x 64 / (480 x 640))
    kernels = [Kernel(xy=80 * ratio, rgb=13.0), Kernel(xy=3 * ratio)]
    want = refine_reference(full, image, kernels=kernels, weights=[3.0, 1.0], iterations=5)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got.sum(1), torch.ones(1, H, W))


def test_nothing_to_weigh_changes_nothing():
    probabilities, image = noisy(size=(H, W)).softmax(1), torch.rand(1, 3, H, W)
    for crf in (CRF(weights=(0.0, 0.0)), CRF(iterations=0)):
        torch.testing.assert_close(crf(probabilities, image), probabilities, atol=1e-5, rtol=1e-4)


def test_the_command_line_has_the_same_defaults():
    """They stand in both places, because the command line must not import torch to show its help."""
    words, crf = Refine("p.npy", "photo.jpg"), MEASURED
    colour, depth, place = crf.kernels
    assert CRF() == CRF((colour, place), (crf.weights[0], crf.weights[2]))  # the same where there is no depth
    assert words.xy == (colour.xy, depth.xy, place.xy)
    assert (words.rgb, words.metres) == (colour.rgb, depth.depth)
    assert (words.weights, words.iterations) == (crf.weights, crf.iterations)


def test_a_report_names_the_crf():
    assert SHARP.describe() == "5 iterations of 3 x (xy 80, rgb 13) + 2 x (xy 50, depth 0.2) + 1 x (xy 3)"


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    cv2.imwrite(str(tmp_path / "room.png"), (photo() * 255).astype(np.uint8))
    np.save(tmp_path / "p.npy", noisy().softmax(1)[0].numpy())
    depth = np.where(TRUTH == 3, 2000, 3000).astype(np.uint16)
    cv2.imwrite(str(tmp_path / "room.depth.png"), depth)
    return tmp_path


@pytest.mark.parametrize("form", ["k h w", "h w k", "npz", "half"])
def test_probabilities_in_any_usual_form(folder, form):
    want = np.load(folder / "p.npy")
    file = folder / ("q.npz" if form == "npz" else "q.npy")
    if form == "npz":
        np.savez(file, names=np.array(["a"]), probabilities=want)
    else:
        np.save(file, {"k h w": want, "h w k": want.transpose(1, 2, 0), "half": want.astype(np.float16)}[form])
    np.testing.assert_allclose(read_probabilities(file, 40), want, atol=1e-3)


def test_from_the_command_line(folder, capsys):
    words = ["refine", "--labels-prob", str(folder / "p.npy"), "--image", str(folder / "room.png")]
    words += ["--depth", str(folder / "room.depth.png"), "--space", "nyu40", "--out", str(folder / "out")]
    assert main(words) == 0
    names = [line.rsplit("/", 1)[-1] for line in capsys.readouterr().out.split()]
    assert names == ["room.labels.png", "room.overlay.png", "room.npz"]
    assert sorted(p.name for p in (folder / "out").iterdir()) == sorted(names)
    found = cv2.imread(str(folder / "out/room.labels.png"), cv2.IMREAD_UNCHANGED)
    assert (found != TRUTH).mean() < 0.01
    with np.load(folder / "out/room.npz") as arrays:
        np.testing.assert_array_equal(arrays["labels"], found)
        np.testing.assert_allclose(arrays["probabilities"].max(0), arrays["confidence"])
        assert arrays["probabilities"].shape == (40, H, W)


def test_unknown_depth_takes_the_nearest(tmp_path):
    depth = np.zeros((4, 6), np.uint16)
    depth[:, 0], depth[:, 5] = 1000, 3000
    cv2.imwrite(str(tmp_path / "d.png"), depth)
    found = read_depth(tmp_path / "d.png", (4, 6))
    np.testing.assert_allclose(found, np.array([[1, 1, 1, 3, 3, 3]]).repeat(4, 0))


@pytest.mark.parametrize(
    ("array", "sentence"),
    [
        (np.zeros((4, 5)), "probabilities are k h w"),
        (np.full((40, 4, 4), np.nan), "NaN, infinite or negative"),
        (np.full((40, 4, 4), -1.0), "NaN, infinite or negative"),
        (np.full((40, 4, 4), 1.0), "sum to 40 to 40 a pixel"),
        (np.full((7, 4, 5), 1 / 7), "neither its first nor its last axis has 40 classes"),
        (np.array([[["a"]]]), "probabilities are k h w"),
    ],
)
def test_what_are_no_probabilities(folder, array, sentence):
    np.save(folder / "bad.npy", array)
    with pytest.raises(UserError, match=sentence):
        read_probabilities(folder / "bad.npy", 40)


def test_bad_files_get_one_sentence(folder, capsys):
    (folder / "broken.npy").write_bytes(b"\x93NUMPY, or not")
    np.savez(folder / "two.npz", a=np.zeros(3), b=np.zeros(3))
    space = labels.get("nyu40")
    for name, sentence in {
        "broken.npy": "no readable",
        "two.npz": "holds a, b",
        "none.npy": "no probabilities at",
    }.items():
        with pytest.raises(UserError, match=sentence):
            refine_files(folder / name, folder / "room.png", folder / "out", space=space)
    with pytest.raises(UserError, match="no 16-bit depth image"):
        refine_files(folder / "p.npy", folder / "room.png", folder / "out", depth=folder / "room.png")
    cv2.imwrite(str(folder / "empty.png"), np.zeros((4, 4), np.uint16))
    with pytest.raises(UserError, match="holds no depth"):
        refine_files(folder / "p.npy", folder / "room.png", folder / "out", depth=folder / "empty.png")
    assert main(["refine", "--labels-prob", str(folder / "none.npy"), "--image", str(folder / "room.png")]) == 2
    assert "no probabilities at" in capsys.readouterr().err
    with pytest.raises(UserError, match="2 kernels take as many weights"):
        CRF(weights=(1.0,))


def test_evaluate_takes_the_crf(folder, capsys, monkeypatch):
    """The option reaches the predictor, and the report says so."""
    seen = {}

    def load(*_, **options):
        seen.update(options)
        return Predictor(Fixed(noisy()), META, flip=False, crf=options["crf"])

    monkeypatch.setattr("enfilade.load", load)
    words = ["evaluate", "--data", "rooms", "--option", "length=1", "--option", "height=48", "--option", "width=64"]
    for option, crf in ((["--no-crf"], False), ([], None), (["--crf"], True)):
        assert main([*words, *option, "--json"]) == 0
        assert seen["crf"] is crf
        protocol = json.loads(capsys.readouterr().out)["protocol"]
        assert ("crf" in protocol) is bool(crf)
    assert protocol["crf"].startswith("5 iterations of 4 x (xy 80, rgb 8) + ")
    assert main([*words, "--crf", "--no-crf"]) == 2
    assert "--crf and --no-crf exclude each other" in capsys.readouterr().err
