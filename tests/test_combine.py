"""Several models in one file: the answer is that of all, by the definition, wherever the file is used."""

import json
import math

import jaxtyping
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import enfilade
from enfilade import checkpoint, export, hub
from enfilade.cli import main
from enfilade.combine import combine
from enfilade.errors import UserError
from enfilade.finetune import demand_teachable
from enfilade.refine import CRF

GAD = {"classes": 40, "encoder": "test_resnet", "weights": None, "bottleneck": 8, "widths": (8, 8), "embedding": 8}
JOINT = {"classes": 40, "encoder": "mobilenetv2_035", "weights": None, "widths": (8,) * 5, "bins": 4, "crf": "rgb"}


def photo(height=48, width=64) -> np.ndarray:
    return np.random.default_rng(0).random((height, width, 3), np.float32)


def made(path, kind, arguments, seed, **meta):
    """A model file with opinions."""
    torch.manual_seed(seed)
    network = checkpoint.build(kind, arguments)
    for name, parameter in network.named_parameters():
        if name.endswith("side.weight") or (name.startswith("semantic.") and parameter.shape[:1] == (40,)):
            nn.init.normal_(parameter, std=0.5)
    usual = {"model": kind, "arguments": arguments, "space": "nyu40", "size": [48, 64], "focal": 50.0, "scale": 0.1}
    checkpoint.save_model(path, network, usual | {"ignored": [39], "license": f"of {kind}", "data": ["nyuv2"]} | meta)
    return str(path)


@pytest.fixture
def models(tmp_path):
    first = made(tmp_path / "first.safetensors", "gad", GAD, 0)
    second = made(tmp_path / "second.safetensors", "joint", JOINT, 1, size=[96, 128], focal=80.0)
    return first, second


def test_the_answer_is_the_mean_on_the_grid_of_the_first(models, tmp_path):
    path = combine(models, tmp_path / "both.safetensors")
    found = checkpoint.load(path)
    a, b = (checkpoint.load(m).network for m in models)
    b.crf = None
    image = torch.rand(2, 3, 50, 70)
    with torch.no_grad():
        both, one, other = found.network(image), a(image), b(image)

    def onto(x):
        return F.interpolate(x, one.logits.shape[-2:], mode="bilinear")

    least = math.log(1e-6)
    logits = (one.logits.log_softmax(1).clamp(least) + onto(other.logits.log_softmax(1).clamp(least))) / 2
    torch.testing.assert_close(both.logits, logits)
    deep = F.interpolate(other.depth[:, None], one.depth.shape[-2:], mode="bilinear")[:, 0]
    torch.testing.assert_close(both.depth, (one.depth + 50 / 80 * deep) / 2)  # the other camera's metres
    assert not torch.allclose(both.logits.argmax(1), one.logits.argmax(1))  # two opinions
    told = {"space": "nyu40", "size": [48, 64], "focal": 50.0, "ignored": [39], "data": ["nyuv2"]}
    assert found.meta.items() >= told.items()
    assert found.meta["license"] == "of gad; of joint"


def test_it_is_also_at_one_size(models, tmp_path):
    """Where both were trained at one size, the file says what `also` says."""
    same = made(tmp_path / "same.safetensors", "joint", JOINT | {"crf": "none"}, 1, focal=80.0)
    path = combine([models[0], same], tmp_path / "both.safetensors")
    one = enfilade.load(path, flip=False).predict(photo())
    two = enfilade.load(models[0], also=[same], flip=False).predict(photo())
    np.testing.assert_allclose(one.confidence, two.confidence, atol=2e-6)
    np.testing.assert_allclose(one.depth, two.depth, rtol=1e-5)
    assert (one.labels != two.labels).mean() < 1e-3  # ties


def test_a_crf_stands_behind_them_all(models, tmp_path):
    path = combine(models, tmp_path / "both.safetensors")
    assert not any("crf" in name for name in checkpoint.read(path)[0])
    plain, refined = (enfilade.load(path, crf=crf, flip=False).predict(photo()) for crf in (False, True))
    assert not np.allclose(plain.confidence, refined.confidence, atol=1e-3)


def test_a_file_says_whether_its_labels_are_refined(models, tmp_path):
    says = combine(models, tmp_path / "says.safetensors", crf=True)
    silent = combine(models, tmp_path / "silent.safetensors")

    def answer(path, **options):
        return enfilade.load(path, flip=False, **options).predict(photo()).confidence

    refined, plain = answer(silent, crf=True), answer(silent)
    assert not np.allclose(plain, refined, atol=1e-3)
    np.testing.assert_array_equal(answer(says), refined)
    np.testing.assert_array_equal(answer(says, crf=False), plain)
    np.testing.assert_array_equal(answer(says, also=[silent]), answer(silent, also=[says], crf=True))
    np.testing.assert_array_equal(answer(silent, also=[says]), answer(silent, also=[silent]))  # the first one says


def test_a_header_answers_yes_or_no_to_the_crf(models, tmp_path):
    path = combine(models, tmp_path / "both.safetensors", crf=True)
    tensors, meta = checkpoint.read(path)
    checkpoint.write(path, tensors, meta | {"crf": {"iterations": 10**9}})
    with pytest.raises(UserError, match="header's 'crf' makes no sense"):
        checkpoint.load(path)


def test_what_is_combined_can_be_combined_again_in_16_bits(models, tmp_path):
    both = combine(models, tmp_path / "both.safetensors")
    three = combine([both, models[0]], tmp_path / "three.safetensors", half=True)
    image = torch.rand(1, 3, 48, 64)
    with torch.no_grad():
        logits = checkpoint.load(three).network(image).logits
        a, b = (checkpoint.load(m).network(image).logits for m in (both, models[0]))
    expected = (a.log_softmax(1) + b.log_softmax(1)) / 2
    torch.testing.assert_close(logits, expected, atol=0.1, rtol=0.05)
    floats = {v.dtype for v in checkpoint.read(three)[0].values() if v.is_floating_point()}
    assert floats == {torch.float16}


def test_it_is_exported_as_any_other(models, tmp_path):
    path = combine(models, tmp_path / "both.safetensors")
    jaxtyping.config.update("jaxtyping_disable", True)  # a symbol for a size is no int
    try:
        report = export.export(path, tmp_path / "both.onnx", runs=1)  # compares both before it writes
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
    assert set(report.as_dict()["outputs"]) == {"probabilities", "depth"}


def test_a_file_of_members_reads_no_other_file(models, tmp_path):
    path = combine(models, tmp_path / "both.safetensors")
    tensors, meta = checkpoint.read(path)
    for member in meta["arguments"]["members"]:
        member["arguments"]["weights"] = str(tmp_path / "secret.safetensors")  # would be missed if it were read
    checkpoint.write(path, tensors, meta)
    assert checkpoint.load(path).meta["model"] == "ensemble"
    meta["arguments"]["members"] = meta["arguments"]["members"][:1]
    checkpoint.write(path, tensors, meta)
    with pytest.raises(UserError, match="has two members or more, not 1"):
        checkpoint.load(path)


def test_on_the_command_line(models, tmp_path, capsys):
    out = tmp_path / "both.safetensors"
    assert main(["combine", *models, "--out", str(out), "--crf"]) == 0
    assert f"{out.stat().st_size / 1e6:.1f} MB" in capsys.readouterr().out
    assert main(["info", "--model", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["model"]
    assert (told["recipe"], told["crf"]) == ("gad and joint", True)


@pytest.mark.parametrize("which", ["alone", "space", "hha", "rooms", "out"])
def test_what_cannot_be_combined(which, models, tmp_path, capsys):
    first = models[0]
    words, sentence = {
        "alone": ([first], "two models or more make one, not 1"),
        "space": ([first, "lrn-camvid"], "one answers in nyu40, one in camvid11"),
        "hha": ([made(tmp_path / "hha.safetensors", "gad", GAD | {"hha": True}, 2), first], "takes hha too"),
        "rooms": ([first, "sscnet-rooms"], "sscnet-rooms completes rooms, and such a model answers alone"),
        "out": ([first, first], "cannot write"),
    }[which]
    (tmp_path / "file").write_text("")
    out = tmp_path / ("file/both.safetensors" if which == "out" else "both.safetensors")
    assert main(["combine", *words, "--out", str(out)]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "both.safetensors").exists()


def test_it_cannot_be_taught_classes_and_says_so(models, tmp_path):
    path = combine(models, tmp_path / "both.safetensors")
    with pytest.raises(UserError, match="is of kind ensemble and cannot be taught classes"):
        demand_teachable(checkpoint.load(path), path)


def test_the_default_model_is_the_one_that_ships_with_its_crf():
    default = enfilade.load()
    assert default.meta["card"] == "gad-joint-nyuv2.md"
    assert default.crf == CRF()
    assert enfilade.load(crf=False).crf is None


def test_the_one_that_ships_holds_what_its_card_says():
    """12 MB; the joint network as it ships, and a smaller GAD over the encoder of gad-nyuv2."""
    path = checkpoint.resolve("gad-joint-nyuv2")
    assert path.stat().st_size <= 12e6
    tensors = checkpoint.read(path)[0]
    joint, gad = (checkpoint.read(checkpoint.resolve(name))[0] for name in ("joint-nyuv2", "gad-nyuv2"))
    same = {f"networks.1.{k}": v for k, v in joint.items() if not k.startswith("crf.")}
    same |= {f"networks.0.{k}": v for k, v in gad.items() if k.startswith("trunk.")}
    assert all(torch.equal(tensors[k], v) for k, v in same.items())
    rest = [k for k in tensors.keys() - same.keys() if not k.startswith("networks.0.")]
    assert not rest
    prediction = enfilade.load("gad-joint-nyuv2", flip=False).predict(photo(96, 128))
    assert prediction.space == "nyu40"
    meta = checkpoint.read(path)[1]
    assert hub.answers(meta) == ("image-segmentation", "semantic-segmentation", "depth-estimation")
    assert np.isfinite(prediction.depth).all()
