"""Exported files against torch, at sizes and batches that the exporter never saw, and used by one who has no torch."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import cv2
import jaxtyping
import numpy as np
import pytest
import torch
from timm.layers import Conv2dSame
from torch import nn

import enfilade
from enfilade import checkpoint, export, export_check, export_graph, export_onnx, export_torch, labels
from enfilade.checkpoint import Loaded
from enfilade.cli import main
from enfilade.errors import UserError
from enfilade.predict import Predictor
from enfilade.types import Output

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

SMALL = {"classes": 40, "weights": None}
GAD = SMALL | {"encoder": "mobilenetv2_035", "bottleneck": 8, "widths": (8, 8), "embedding": 8}
META = {"model": "gad", "space": "nyu40", "size": [48, 64], "focal": 50.0, "license": "free, as air"}
# Rounding: torch itself is half as far from float64 with these weights. Depth in metres
NEAR = {"probabilities": 2e-4, "depth": 2e-3}


def build(model: str, **arguments) -> nn.Module:
    """Random weights that answer with different classes at different places: a wrong cut or padding would show."""
    torch.manual_seed(0)
    network = checkpoint.build(model, arguments)
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.out_channels in (1, 40):  # depth, labels
            gain = 2.0 if module.out_channels == 40 else 0.5
            nn.init.normal_(module.weight, std=gain / module.weight[0].numel() ** 0.5)
    return network.eval()


def noise(channels: int, batch: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(7).random((batch, channels, height, width), dtype=np.float32)


def open_session(path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def agree(session, network: nn.Module, inputs: dict[str, np.ndarray]) -> None:
    """The session answers what the network does, and not the same everywhere."""
    with torch.no_grad():
        output = network(**{k: torch.from_numpy(v) for k, v in inputs.items()})
    want = {"probabilities": output.logits.softmax(1), "depth": output.depth}
    want = {k: v.numpy() for k, v in want.items() if v is not None}
    names = [o.name for o in session.get_outputs()]
    assert names == list(want)
    for name, have in zip(names, session.run(None, inputs)):
        np.testing.assert_allclose(have, want[name], atol=NEAR[name], rtol=NEAR[name])
        if have[0].size > 1000:
            assert have.std(axis=(-2, -1)).max() > 10 * NEAR[name]


@pytest.fixture(scope="module", autouse=True)
def _unchecked_while_traced():
    """Annotations are enforced in tests. While torch traces a network, sizes are symbols, and no `int`."""

    def trace(predictor):
        jaxtyping.config.update("jaxtyping_disable", True)
        try:
            return export_graph.trace(predictor)
        finally:
            jaxtyping.config.update("jaxtyping_disable", False)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_onnx, "trace", trace)
        patch.setattr(export_torch, "trace", trace)
        yield


@pytest.fixture(scope="module")
def gad() -> Loaded:
    return Loaded(build("gad", **GAD), META)


@pytest.fixture(scope="module")
def exported(gad, tmp_path_factory):
    """The one full network that is exported here, and its report."""
    path = tmp_path_factory.mktemp("export") / "gad.onnx"
    report = export.export(gad, path, size=(40, 60), runs=1)
    return path, report


@pytest.fixture(scope="module")
def session(exported):
    return open_session(exported[0])


@pytest.fixture
def quick(monkeypatch, exported):
    """Exports of the network `gad` that take no time."""
    import onnx

    monkeypatch.setattr(export, "to_onnx", lambda predictor, opset: onnx.load(exported[0]))


# --- the same answers -------------------------------------------------------------------------------------------------

SIZES = [(1, 240, 320), (3, 250, 331), (1, 97, 65), (2, 128, 96), (1, 32, 32), (2, 31, 33), (5, 33, 64), (1, 1, 1)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_any_size_and_batch(session, gad, size):
    agree(session, gad.network, {"image": noise(3, *size)})


def test_hha_is_a_second_input_and_no_depth_no_output(tmp_path):
    small = GAD | {"encoder": "test_resnet", "widths": (8,), "depth": False, "skip": False, "hha": True}
    network = build("gad", **small)
    network.classifier.weight.data *= 100  # untrained, it answers all but the same everywhere
    report = export.export(Loaded(network, META), tmp_path / "hha.onnx", opset=19, runs=1)
    assert report.opset == 19
    free = ["batch", 3, "height", "width"]
    assert report.inputs == {"image": free, "hha": free}
    assert report.outputs == {"probabilities": ["batch", 40, "probabilities_height", "probabilities_width"]}
    session = open_session(tmp_path / "hha.onnx")
    for batch, height, width in [(1, 97, 65), (2, 64, 96)]:
        both = noise(6, batch, height, width)
        agree(session, network, {"image": both[:, :3], "hha": both[:, 3:]})
    (exchanged,) = session.run(None, {"image": both[:, 3:], "hha": both[:, :3]})
    (right,) = session.run(None, {"image": both[:, :3], "hha": both[:, 3:]})
    assert np.abs(exchanged - right).max() > 100 * NEAR["probabilities"]  # each input has its place


LABEL_NETWORKS = {
    "lrn": {"widths": (4, 4, 4, 4, 4)},
    "segnet": {"depth": (1, 1, 1, 1)},  # its unpooling scatters
    "fcn8s": {"hidden": 8},
}


@pytest.mark.parametrize("name", LABEL_NETWORKS)
def test_networks_of_the_label_refinement_paper(tmp_path, name):
    network = build(name, **SMALL, encoder="test_resnet", **LABEL_NETWORKS[name])
    if name == "segnet":
        network.label.weight.data *= 100  # untrained, it answers all but the same everywhere
    report = export.export(Loaded(network, META), tmp_path / "m.onnx", check=False)
    assert report.differences == ()
    assert report.latency is None
    session = open_session(tmp_path / "m.onnx")
    for size in [(1, 64, 96), (2, 97, 65), (1, 31, 33)]:
        agree(session, network, {"image": noise(3, *size)})


def test_a_crf_is_left_out_on_request(tmp_path):
    network = build(
        "joint", classes=40, encoder="test_resnet", widths=(4,) * 5, bins=4, bin_length=1.0, crf="rgb", crf_stride=2
    )
    for head in network.depth:
        head.weight.data *= 100  # untrained, it answers all but the same everywhere
    with pytest.raises(UserError, match="ends in a dense CRF, whose permutohedral lattice has no operator in ONNX"):
        export.export(Loaded(network, META), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())
    export.export(Loaded(network, META), tmp_path / "m.onnx", check=False, crf=False)
    assert network.crf is not None  # the caller's keeps it
    plain = copy.deepcopy(network)
    plain.crf = None
    session = open_session(tmp_path / "m.onnx")
    for size in [(1, 64, 96), (2, 97, 65)]:
        agree(session, plain, {"image": noise(3, *size)})


@pytest.mark.parametrize(
    "options", [{"fusion": "vanilla"}, {"affinity": "softmax"}, {"affinity": "window", "window": 3}]
)
def test_every_fusion(tmp_path, options):
    network = build("gad", **GAD | {"encoder": "test_resnet", "widths": (8,), **options})
    export.export(Loaded(network, META), tmp_path / "m.onnx", check=False)
    session = open_session(tmp_path / "m.onnx")
    for size in [(1, 64, 96), (2, 97, 65)]:
        agree(session, network, {"image": noise(3, *size)})


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("stride", [1, 2, 4])
@pytest.mark.parametrize("kernel", [1, 2, 3, 5])
def test_constant_padding_is_that_of_timm_for_whole_strides(kernel, stride, dilation):
    conv = Conv2dSame(4, 6, kernel, stride=stride, dilation=dilation, groups=2)
    for height, width in [(8, 16), (20, 12)]:
        x = torch.randn(2, 4, height, width)
        assert torch.equal(export_graph.convolve_same(conv, x), conv(x))


def test_export_leaves_the_network_as_it_was(exported, gad):
    conv = next(m for m in gad.network.modules() if isinstance(m, Conv2dSame))
    with torch.no_grad():  # of an odd map, where the constant padding gives a row less
        assert conv(torch.rand(1, 3, 33, 35)).shape[-2:] == (17, 18)
        assert export_graph.convolve_same(conv, torch.rand(1, 3, 33, 35)).shape[-2:] == (16, 17)


# --- what is in the file ----------------------------------------------------------------------------------------------


def test_report(exported):
    path, report = exported
    assert report.file == str(path)
    assert report.format == "onnx"
    assert report.bytes == path.stat().st_size
    assert report.opset == 20
    assert report.inputs == {"image": ["batch", 3, "height", "width"]}
    assert report.outputs["probabilities"][:2] == ["batch", 40]
    assert len(report.outputs["depth"]) == 3
    assert [(d.batch, d.height, d.width) for d in report.differences] == [(1, 40, 60)] + [
        (c.batch, c.height, c.width) for c in export_check.CHECKS
    ]
    for difference in report.differences:
        assert all(0 < difference.outputs[name] <= export_check.TOLERANCE[name] for name in ("probabilities", "depth"))
    latency = report.latency
    assert (latency.height, latency.width, latency.runs, latency.threads) == (40, 60, 1, torch.get_num_threads())
    assert min(latency.torch, latency.exported) > 0
    assert json.loads(json.dumps(report.as_dict()))["differences"][0]["outputs"]["depth"] > 0
    text = export.table(report)
    assert "probabilities [batch, 40," in text
    assert "  2 x 65x97 " in text  # width x height, as on the command line
    assert "one frame of 60x40, 1 thread, median of 1" in text


def test_metadata_tells_all_that_is_needed(session):
    told = session.get_modelmeta().custom_metadata_map
    space = labels.get("nyu40")
    assert tuple(json.loads(told["names"])) == space.names
    colours = [tuple(bytes.fromhex(c[1:])) for c in json.loads(told["colours"])]
    np.testing.assert_array_equal(colours, space.colours)
    assert json.loads(told["size"]) == META["size"]
    assert float(told["focal"]) == META["focal"]
    assert told["license"] == META["license"]
    assert told["space"] == "nyu40"
    assert told["enfilade"] == enfilade.__version__
    assert session.get_modelmeta().producer_name == "enfilade"


def test_the_file_is_whole_and_tells_nothing_of_this_machine(exported):
    path, _ = exported
    data = path.read_bytes()
    for secret in (b".py", b"site-packages", b"Traceback", str(Path(export.__file__).parent).encode()):
        assert secret not in data
    assert [p.name for p in path.parent.iterdir()] == ["gad.onnx"]  # no weights beside it, nothing temporary


# --- without Enfilade and torch ---------------------------------------------------------------------------------------

GUIDE = Path(__file__).parents[1] / "docs" / "deploy.md"


def test_with_onnxruntime_alone(exported, gad, tmp_path):
    (tmp_path / "gad.onnx").write_bytes(exported[0].read_bytes())
    height, width = META["size"]
    rgb = cv2.resize(np.random.default_rng(3).integers(0, 256, (6, 8, 3), np.uint8), (width, height))
    cv2.imwrite(str(tmp_path / "photo.png"), rgb[..., ::-1])
    deployed, *_ = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    program = f"""{deployed}
import sys
assert not {{"torch", "enfilade", "timm"}} & sys.modules.keys()
np.savez("out.npz", labels=labels, metres=metres, names=names)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    have = np.load(tmp_path / "out.npz")
    want = Predictor(gad.network, META, device="cpu", flip=False).predict(rgb)
    assert tuple(have["names"]) == labels.get("nyu40").names
    assert np.mean(have["labels"] == want.labels) > 0.999  # between two classes, rounding decides
    assert len(np.unique(want.labels)) > 3
    np.testing.assert_allclose(have["metres"], want.depth, atol=1e-3)


# --- what is refused --------------------------------------------------------------------------------------------------


class Plain(nn.Module):
    """Label maps of the image's size; `rule` makes of image and logits what a careless author might."""

    def __init__(self, rule):
        super().__init__()
        self.conv = nn.Conv2d(3, 40, 3, padding=1)
        self.rule = rule

    def forward(self, image):
        return Output(logits=self.rule(image, self.conv(image)))


def test_a_file_that_answers_otherwise_is_not_written(tmp_path):
    """A branch on the size is frozen by the export as the example had it; only another size shows that."""
    network = Plain(lambda image, logits: 3 * logits if image.shape[-1] > 100 else logits)
    with pytest.raises(
        UserError, match=r"probabilities for 1 x 60x40 pixels differs from torch's by 0\.\d+, more than"
    ):
        export.export(Loaded(network, META), tmp_path / "m.onnx", size=(40, 60))
    cut = Plain(lambda image, logits: logits[..., : logits.shape[-1] - 1] if image.shape[-1] < 100 else logits)
    with pytest.raises(UserError, match=r"probabilities for 1 x 64x48 pixels is \[1, 40, 48, 64\] instead of .* 63\]"):
        export.export(Loaded(cut, META), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_a_network_that_torch_cannot_trace(tmp_path):
    network = Plain(lambda image, logits: logits if image.mean() > 0.25 else -logits)
    with pytest.raises(UserError, match=r"this network \(Plain\) cannot be exported to ONNX: "):
        export.export(Loaded(network, META), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"format": "onx"}, "no export format 'onx'; did you mean 'onnx'"),
        ({"opset": 18}, "the opset is one of 19 to 23, not 18"),
        ({"runs": 0}, "at least 1, not 0"),
        ({"size": (0, 64)}, "not 0 x 64"),
        ({"size": (64,)}, "not 64"),
        ({"int8": "statik"}, "no kind of 8-bit numbers 'statik'; did you mean 'static'"),
        ({"int8": "static", "format": "torch"}, "8-bit numbers are for ONNX files"),
        ({"photos": ["a.png"]}, "photos calibrate 8-bit numbers: give --int8 too"),
        ({"model": "gad-nyu2"}, "did you mean 'gad-nyuv2'"),
    ],
    ids=str,
)
def test_wrong_options(tmp_path, options, sentence):
    with pytest.raises(UserError, match=sentence):
        export.export(**({"model": "gad-nyuv2", "out": tmp_path / "m.onnx"} | options))
    assert not list(tmp_path.iterdir())


def test_places_that_cannot_be_written_to_are_told_before_the_work(tmp_path, gad, monkeypatch):
    monkeypatch.setattr(export, "to_onnx", lambda *_: pytest.fail("exported all the same"))
    with pytest.raises(UserError, match=r"is a folder: give the file to write"):
        export.export(gad, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot create the folder"):
        export.export(gad, tmp_path / "file" / "m.onnx")
    monkeypatch.setattr(export.tempfile, "TemporaryFile", lambda **_: (_ for _ in ()).throw(OSError(13, "Denied")))
    with pytest.raises(UserError, match=r"cannot write m\.onnx to .*: Denied"):
        export.export(gad, tmp_path / "m.onnx")


@pytest.mark.parametrize("package", export.PACKAGES)
def test_missing_packages(tmp_path, gad, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"needs {package}: pip install 'enfilade\[onnx\]'"):
        export.export(gad, tmp_path / "m.onnx")


def test_onnxruntime_is_for_the_check(tmp_path, gad, monkeypatch, quick):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert export.export(gad, tmp_path / "m.onnx", check=False).bytes == (tmp_path / "m.onnx").stat().st_size


def test_a_graph_that_onnx_finds_invalid(tmp_path, gad, monkeypatch, exported):
    import onnx

    broken = onnx.load(exported[0])
    broken.graph.node[0].input[0] = "nowhere"
    monkeypatch.setattr(export, "to_onnx", lambda *_: broken)
    with pytest.raises(UserError, match=r"graph is not valid, and was not written: .*nowhere"):
        export.export(gad, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_the_old_file_stays_where_the_new_one_fails(tmp_path, gad, monkeypatch, quick):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")
    monkeypatch.setitem(export_check.TOLERANCE, "depth", 0.0)
    with pytest.raises(UserError, match=r"depth for 1 x 64x48 pixels differs"):
        export.export(gad, path, runs=1)
    assert path.read_bytes() == b"old"
    monkeypatch.undo()


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(gad, tmp_path) -> str:
    checkpoint.save_model(tmp_path / "tiny.safetensors", gad.network, META | {"arguments": GAD})
    return str(tmp_path / "tiny.safetensors")


def test_export_from_the_command_line(capsys, saved, tmp_path, quick, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "new" / "gad.onnx"
    assert main(["export", "--model", saved, "--out", str(out), "--size", "60x40"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "opset 20" in captured.out
    assert "one frame of 60x40" in captured.out
    assert out.is_file()
    assert main(["export", "--model", saved, "--out", str(out), "--no-check", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["latency"] is None
    assert told["file"] == str(out)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--format", "onxn"], "did you mean 'onnx'"),
        (["--format", "torhc"], "did you mean 'torch'"),
        (["--int8", "dinamic"], "did you mean 'dynamic'"),
        (["--int8", "static", "dynamic"], "--int8 is static or dynamic, not static and dynamic"),
        (["--calibrate", "photos"], "give --int8 too"),
        (["--size", "60"], "--size is WIDTHxHEIGHT in pixels"),
        (["--size", "60x-1"], "--size is WIDTHxHEIGHT in pixels"),
        (["--size", "60x0"], "at least one pixel"),
        (["--opset", "7"], "19 to 23"),
        (["--threads", "0"], "--threads must be at least 1"),
    ],
    ids=str,
)
def test_wrong_words(capsys, saved, tmp_path, words, sentence):
    assert main(["export", "--model", saved, "--out", str(tmp_path / "m.onnx"), *words]) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err
    assert len(captured.err.strip().split("\n")) == 1
    assert not (tmp_path / "m.onnx").exists()
