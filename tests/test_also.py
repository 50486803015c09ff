"""Several networks that answer as one: their mean, in one camera's metres, and what they cannot do together."""

import copy
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
from enfilade.ops.decide import decide_reference
from enfilade.predict import Predictor
from enfilade.predict_files import fingerprint, portable
from enfilade.types import Output

META = {"space": "nyu13", "size": [48, 64], "focal": 50.0, "recipe": "first"}
OTHER = META | {"size": [60, 80], "focal": 90.0, "recipe": "second"}


class Pixelwise(nn.Module):
    """Answers for squares of `pitch` pixels by their mean colour alone."""

    def __init__(self, seed, pitch, logits=True, depth=True):
        super().__init__()
        self.pitch, self.logits, self.depth = pitch, logits, depth
        generator = torch.Generator().manual_seed(seed)
        self.mix = nn.Parameter(8 * torch.randn(13, 3, 1, 1, generator=generator), requires_grad=False)

    def forward(self, image) -> Output:
        small = F.avg_pool2d(image, self.pitch, ceil_mode=True)
        logits = F.conv2d(small, self.mix) if self.logits else None
        return Output(logits=logits, depth=1 + 3 * small[:, 2] if self.depth else None)


class Far(nn.Module):
    """As far as something of `metres` looks to a canonical camera of `focal` pixels, when the real one's focal length
    is `real` widths of the image."""

    def __init__(self, metres, focal, real):
        super().__init__()
        self.metres, self.focal, self.real = metres, focal, real

    def forward(self, image) -> Output:
        b, _, h, w = image.shape
        return Output(depth=torch.full((b, h, w), self.metres * self.focal / (self.real * w)))


def photo(height=90, width=120, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).random((height, width, 3), np.float32)


@pytest.mark.parametrize("flip", [False, True])
def test_the_answer_is_the_mean(flip):
    """The definition, written out: each network at its own size, the mean over mirror images; then the geometric mean
    of probabilities, and the mean of depth, the second one's brought from its camera to the first's."""
    first, second, image = Pixelwise(0, 4), Pixelwise(1, 2), photo()
    both = Predictor(first, META, flip=flip, also=[Predictor(second, OTHER, flip=flip)])
    answer = both.predict(image)
    logarithms, depths = [], []
    for network, (h, w), factor in ((first, (48, 64), 1.0), (second, (60, 80), 60 / 48 * 50 / 90)):
        seen = torch.from_numpy(cv2.resize(image, (w, h), interpolation=cv2.INTER_AREA)).movedim(-1, 0)[None]
        outputs = [(network(x), x is not seen) for x in ((seen, seen.flip(-1)) if flip else (seen,))]
        p = sum(o.logits.softmax(1).flip(-1) if mirrored else o.logits.softmax(1) for o, mirrored in outputs)
        z = sum(o.depth.flip(-1) if mirrored else o.depth for o, mirrored in outputs)
        for found, x in (
            (logarithms, (p / len(outputs)).clamp(min=tta.LEAST).log()),
            (depths, factor * z[:, None] / len(outputs)),
        ):
            found.append(F.interpolate(x, (12, 16), mode="bilinear"))
    together = torch.cat(logarithms).mean(0).exp()
    labels, confidence = decide_reference(together / together.sum(0), 90, 120)
    depth = F.interpolate(torch.cat(depths).mean(0, keepdim=True), (90, 120), mode="bilinear")[0, 0]
    np.testing.assert_allclose(answer.depth, depth, rtol=1e-4)
    np.testing.assert_allclose(answer.confidence, confidence, atol=1e-5)
    assert (answer.labels == labels.numpy()).mean() > 0.999  # ties to rounding


@pytest.mark.parametrize("scales", [(1.0,), (0.75, 1.5)])
def test_depth_stays_in_metres(scales):
    """Two networks of other sizes and cameras that see the same 3 metres say 3 metres together."""
    camera = Camera(110.0, 110.0, 59.5, 44.5, 120, 90)
    members = [Predictor(Far(3.0, meta["focal"], 110 / 120), meta, scales=scales, flip=False) for meta in (META, OTHER)]
    for scale in scales:  # the answers themselves differ: it is the factors that make them agree
        one, two = (m.infer(torch.zeros(1, 3, *m.input_size(90, 120, scale))).depth for m in members)
        assert abs(float(one.mean() / two.mean()) - 1) > 0.2
    together = Predictor(members[0].network, META, scales=scales, flip=False, also=members[1:])
    np.testing.assert_allclose(together.predict(photo(), camera=camera).depth, 3.0, rtol=0.02)


def test_what_one_lacks_the_others_answer():
    """Where only one network has depth, it is its depth, and not a share of it."""
    labelled, measured = Pixelwise(0, 4, depth=False), Pixelwise(1, 4, logits=False)
    alone = Predictor(measured, META).predict(photo())
    both = Predictor(labelled, META, also=[Predictor(measured, META)]).predict(photo())
    np.testing.assert_allclose(both.depth, alone.depth, rtol=1e-6)
    np.testing.assert_array_equal(both.labels, Predictor(labelled, META).predict(photo()).labels)


def test_the_same_network_twice_changes_nothing():
    network = Pixelwise(0, 4)
    one, two = (Predictor(network, META, also=also) for also in ([], [Predictor(network, META)]))
    batch = [photo(90, 120, 1), photo(61, 83, 2), photo(61, 83, 3)]
    for a, b in zip(one.batch(batch), two.batch(batch)):
        np.testing.assert_array_equal(a.labels, b.labels)
        np.testing.assert_allclose(a.depth, b.depth, rtol=1e-6)


def test_what_cannot_be_averaged():
    network = Pixelwise(0, 4)
    with pytest.raises(UserError, match="one answers in nyu13, one in nyu40: take models of the same labels"):
        Predictor(network, META, also=[Predictor(network, META | {"space": "nyu40"})])
    guided = copy.copy(network)
    guided.uses = ("support",)
    with pytest.raises(UserError, match="sees RGB alone, and one takes support too"):
        Predictor(network, META, also=[Predictor(guided, META)])


def test_copies_for_other_processes_and_the_manifest():
    first, second = Pixelwise(0, 4), Pixelwise(1, 2)
    both = Predictor(first, META, also=[Predictor(second, OTHER)])
    sent = portable(both)
    assert sent.also[0].network is not second
    np.testing.assert_array_equal(sent.predict(photo()).depth, both.predict(photo()).depth)
    alone, other = Predictor(first, META), Predictor(first, META, also=[Predictor(Pixelwise(2, 2), OTHER)])
    assert len({json.dumps(fingerprint(p), sort_keys=True) for p in (both, sent, alone, other)}) == 3


TINY = {"classes": 40, "encoder": "test_resnet", "weights": None}
TINY |= {"bottleneck": 8, "widths": (8, 8), "embedding": 8}


def test_on_the_command_line(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    models = []
    for seed, size in ((0, [48, 64]), (1, [64, 96])):
        torch.manual_seed(seed)
        meta = {"model": "gad", "arguments": TINY, "space": "nyu40", "size": size, "focal": 50.0, "scale": 0.5}
        checkpoint.save_model(tmp_path / f"{seed}.safetensors", checkpoint.build("gad", TINY), meta)
        models.append(str(tmp_path / f"{seed}.safetensors"))
    picture = str(tmp_path / "photo.png")
    assert cv2.imwrite(picture, (255 * photo()).astype(np.uint8))
    words = ["predict", picture, "--model", models[0], "--files", "arrays", "--out", str(tmp_path / "out")]
    depths = []
    for extra in ([], ["--also", models[1]]):  # the second run does not take the first one's answer for its own
        assert main([*words, *extra]) == 0
        with np.load(tmp_path / "out/photo.npz") as arrays:
            depths.append(arrays["depth"])
    assert not np.allclose(*depths)
    wanted = enfilade.load(models[0], also=[models[1]]).predict(picture).depth
    np.testing.assert_array_equal(depths[1], wanted)
    capsys.readouterr()
    scored = ["evaluate", "--data", "rooms", "--option", "length=1", "--model", models[0], "--also", models[1]]
    assert main([*scored, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["protocol"]["also"]) == 1
    rooms = ["evaluate", "--data", "rooms", "--option", "length=1", "--model", "sscnet-rooms"]
    assert main([*rooms, "--also", models[0]]) == 2
    assert "answers alone: leave --also out" in capsys.readouterr().err
    assert main([*rooms, "--crf"]) == 2
    assert "sscnet-rooms completes rooms: leave --crf out" in capsys.readouterr().err
    assert main([*words, "--also", str(tmp_path / "none.safetensors")]) == 2
    assert "none.safetensors" in capsys.readouterr().err


def test_one_crf_stands_behind_all_networks_in_the_place_of_their_own(tmp_path):
    """The answer is that of networks that never had one, refined once."""
    arguments = {"classes": 40, "encoder": "mobilenetv2_035", "weights": None, "widths": (8,) * 5, "bins": 4}
    files = {}
    for seed, kind in ((0, "rgb"), (1, "none")):
        torch.manual_seed(seed)
        network = checkpoint.build("joint", {**arguments, "crf": kind})
        for head in network.semantic:
            nn.init.normal_(head.weight, std=0.5)  # opinions
        meta = {"model": "joint", "space": "nyu40", "size": [48, 64], "focal": 50.0}
        for made in {kind, "none"}:
            files[seed, made] = tmp_path / f"{seed}-{made}.safetensors"
            same = checkpoint.build("joint", {**arguments, "crf": made})
            same.load_state_dict(network.state_dict(), strict=False)
            checkpoint.save_model(files[seed, made], same, meta | {"arguments": {**arguments, "crf": made}})

    def answer(first, *also, crf):
        found = enfilade.load(files[first], also=[files[o] for o in also], crf=crf, flip=False).predict(photo())
        return found.confidence

    own, bare, other = (0, "rgb"), (0, "none"), (1, "none")
    assert not np.allclose(answer(own, crf=False), answer(bare, crf=False), atol=1e-3)  # it has one, and it counts
    np.testing.assert_array_equal(answer(own, crf=True), answer(bare, crf=True))
    np.testing.assert_array_equal(answer(other, own, crf=True), answer(other, bare, crf=True))
    assert not np.allclose(answer(other, own, crf=True), answer(other, own, crf=False), atol=1e-3)
