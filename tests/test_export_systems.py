"""Every system in every format against torch, at sizes and batches that the exporter never saw. What the networks of
pixels alone do in ONNX is in test_export.py."""

import functools
import importlib.util
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch
from torch import nn

import enfilade
from enfilade import checkpoint, export, export_check, export_graph, export_onnx, export_torch, labels
from enfilade.checkpoint import Loaded
from enfilade.errors import UserError
from enfilade.export_graph import Size
from enfilade.models import region_support
from enfilade.models.completion3d import Hourglass, SketchNet
from enfilade.models.mutual_enhancement import ContextPyramid, Correction, IMENet, SegDecoder
from enfilade.models.region_support import Generation, Refinement
from enfilade.predict import Predictor

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

ENCODER = {"encoder": "test_resnet"}
VOLUMES = {"width": 0.125, "classes": 12}
# Each with what makes its answers differ from place to place, so that a wrong cut or interpolation would show
SYSTEMS: dict[str, tuple[str, dict]] = {
    "gad": ("gad", ENCODER | {"classes": 40, "bottleneck": 8, "widths": (8,), "embedding": 8}),
    "rsn": ("rsn", ENCODER | {"width": 12, "refine_width": 6, "iterations": 1, "semantic": True}),
    "rsn-guided": ("rsn", {"generation": False, "refine_width": 6, "iterations": 2}),
    "sscnet": ("completion", VOLUMES | {"backbone": "sscnet"}),
    "sketch": ("completion", VOLUMES | {"backbone": "sketch"}),
    "imenet": ("imenet", VOLUMES | ENCODER | {"stride": 4, "context": 4, "iterations": 1}),
}
INPUTS = {
    "gad": ("image",),
    "rsn": ("image", "labels"),
    "rsn-guided": ("image", "support"),
    "sscnet": ("tsdf",),
    "sketch": ("tsdf",),
    "imenet": ("image", "tsdf", "voxels"),
}
SIZES = [Size(1, 64, 96, (24, 20, 32)), Size(3, 97, 65, (20, 28, 12)), Size(1, 31, 33, (36, 16, 24))]
# Rounding: float64 and float32 in torch itself are as far apart with these weights
NEAR = {"probabilities": 2e-4, "volume_probabilities": 2e-4, "depth": 2e-3, "depth_spread": 2e-3}


def build(system: str) -> nn.Module:
    """Random weights whose answers are decided: logits of some units, offsets of some voxels, depths of some metres."""
    torch.manual_seed(0)
    model, arguments = SYSTEMS[system]
    network = checkpoint.build(model, arguments | {"weights": None})
    thin(network)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            module.running_var.uniform_(0.5, 2)
        if isinstance(module, nn.Conv2d | nn.Conv3d) and module.out_channels in (1, 12, 40):
            gain = 1 if module.out_channels == 1 else 3  # depth, labels
            nn.init.normal_(module.weight, std=gain / module.weight[0].numel() ** 0.5)
        if isinstance(module, ContextPyramid):
            for conv in module.offsets:
                nn.init.normal_(conv.weight, std=0.5)
    return network.eval()


class Coarse(nn.Module):
    """Stands for IMENet's 3-D backbone, which is exported by itself (`sscnet`, `sketch`)."""

    def __init__(self):
        super().__init__()
        self.classify = nn.Conv3d(1, VOLUMES["classes"], 1)

    def forward(self, tsdf):
        return self.classify(nn.functional.avg_pool3d(tsdf, 4))


def thin(network: nn.Module) -> None:
    """Leave out what is there again, layers that others are alike but for their dilation: the exporter takes as long
    for each as for the first."""
    for module in network.modules():
        if isinstance(module, IMENet):
            module.backbone = Coarse()
        if isinstance(module, SegDecoder):
            del module.pyramid[1:3]
        if isinstance(module, Correction):
            rank = module.pyramid.rank
            module.pyramid = ContextPyramid(VOLUMES["classes"], rank, {2: (1, 3), 3: (2,)}[rank])
        if isinstance(module, SketchNet):
            module.semantic = module.semantic.classify  # its hourglass is that of the sketch
        if isinstance(module, Hourglass):
            for level in (module.upper, module.lower):
                del level[1:3]
        if isinstance(module, Generation | Refinement):
            del module.regress[2:-1]
        if isinstance(module, Refinement):
            del module.units[1:]


@functools.cache
def predictor_of(system: str) -> Predictor:
    volumes = SYSTEMS[system][0] in ("completion", "imenet")
    meta = {"model": SYSTEMS[system][0], "space": "ssc12" if volumes else "nyu40", "size": [48, 64]}
    return Predictor(build(system), meta, device="cpu", flip=False, precision="fp32")


@pytest.fixture(scope="module", autouse=True)
def _traced_once():
    """One trace of a network for all its files. Without annotations, which tests enforce: its sizes are no `int`."""
    traced: dict[int, tuple] = {}

    def trace(predictor):
        if id(predictor.network) not in traced:
            jaxtyping.config.update("jaxtyping_disable", True)
            try:
                traced[id(predictor.network)] = (*export_graph.trace(predictor), predictor)
            finally:
                jaxtyping.config.update("jaxtyping_disable", False)
        return traced[id(predictor.network)][:2]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_onnx, "trace", trace)
        patch.setattr(export_torch, "trace", trace)
        yield


@pytest.fixture(scope="module", autouse=True)
def _two_scales():
    """Of the pyramid unit, for the time's sake: the map itself, and one that is pooled, of small maps to one cell."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(region_support, "SCALES", (2, 40))
        yield


@pytest.fixture(scope="module", params=SYSTEMS)
def system(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def predictor(system) -> Predictor:
    return predictor_of(system)


@pytest.fixture(scope="module")
def graph(predictor) -> bytes:
    return export_onnx.to_onnx(predictor, 20).SerializeToString()


@functools.cache
def archive_of(system: str) -> tuple[bytes, dict]:
    return export_torch.to_archive(predictor_of(system))


@pytest.fixture(scope="module")
def archive(system, graph) -> tuple[bytes, dict]:
    """After the graph: making an archive strips what the trace notes."""
    return archive_of(system)


def own_answers(system: str, network: nn.Module, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the network itself says, by its own names."""
    given = {name: torch.from_numpy(x) for name, x in feed.items()}
    with torch.no_grad():
        output = network(**({"image": None} if SYSTEMS[system][0] == "completion" else {}), **given)
    found = {}
    if output.logits is not None:
        found["probabilities"] = output.logits.softmax(1)
    if output.depth is not None:
        found["depth"] = output.depth
    if system == "rsn-guided":
        found["depth_spread"] = torch.stack([*output.side_depths, output.depth]).std(0, correction=0)
    if output.volume_logits is not None:
        found["volume_probabilities"] = output.volume_logits.softmax(1)
    return {name: x.numpy() for name, x in found.items()}


@pytest.fixture(scope="module")
def loaded(archive) -> tuple[torch.export.ExportedProgram, export_check.Run]:
    """What torch makes of the archive, and what runs it."""
    load, programs = torch.export.load, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.export, "load", lambda file: programs.append(load(file)) or programs[-1])
        run = export_torch.runner(archive[0])
    (program,) = programs
    return program, run


@pytest.fixture(scope="module")
def runs(graph, loaded) -> dict:
    return {"onnx": export_onnx.runner(graph), "torch": loaded[1]}


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s.batch}x{s.width}x{s.height}")
@pytest.mark.parametrize("format", export.FORMATS)
def test_files_answer_as_the_network(system, predictor, runs, format, size):
    feed = export_graph.example(predictor, size)
    assert tuple(feed) == INPUTS[system]
    want = own_answers(system, predictor.network, feed)
    for (name, expected), have in zip(want.items(), runs[format](feed), strict=True):
        assert have.shape == expected.shape
        far = ~(np.abs(have - expected) <= NEAR[name] * (1 + np.abs(expected)))
        # Where a network takes an arg max on its way, rounding decides between two equal classes
        share = {"sketch": 0.02, "imenet": 0.02}.get(system, 0)
        assert far.mean() <= share, f"{name}: {far.mean():.3%}"
        assert expected.std(axis=(-2, -1)).max() > 10 * NEAR[name]  # not the same everywhere


def test_both_formats_name_inputs_and_outputs(system, graph, archive):
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    told = archive[1]
    for ports, have in ((told["inputs"], session.get_inputs()), (told["outputs"], session.get_outputs())):
        assert [(port["name"], port["shape"]) for port in ports] == [(p.name, p.shape) for p in have]
        assert all(port["about"] == export_graph.ABOUT[port["name"]] for port in ports)
    assert tuple(port["name"] for port in told["inputs"]) == INPUTS[system]
    space = labels.get("ssc12" if "tsdf" in INPUTS[system] else "nyu40")
    for meta in (told, dict(session.get_modelmeta().custom_metadata_map)):
        names, size = (meta[k] if isinstance(meta[k], list) else json.loads(meta[k]) for k in ("names", "size"))
        assert tuple(names) == space.names
        assert size == [48, 64]
        assert ("focal" in meta) == ("tsdf" not in INPUTS[system])
        assert meta["enfilade"] == enfilade.__version__


def test_files_tell_nothing_of_this_machine(graph, archive):
    folder = str(enfilade.__path__[0]).encode()
    for data in (graph, archive[0]):
        for secret in (b'.py"', b"site-packages", b"Traceback", folder):
            assert secret not in data


def test_a_voxel_map_of_another_frame_gives_another_answer(predictor, system, runs):
    """The projection is in the file: what the pixels say reaches the voxels that they are said to lie in."""
    if system != "imenet":
        pytest.skip("has no projection")
    feed = export_graph.example(predictor, SIZES[0])
    voxels = np.full_like(feed["voxels"], -1)
    voxels[..., ::5, ::5] = feed["voxels"][..., ::5, ::5]  # about one pixel a voxel, of more the mean hardly changes
    answers = [runs["onnx"](feed | {"voxels": x.copy()})[1] for x in (voxels, voxels[..., ::-1])]
    assert np.abs(answers[0] - answers[1]).max() > 0.05


# --- archives ---------------------------------------------------------------------------------------------------------


def test_an_archive_holds_torch_operators_only(loaded):
    targets = {str(n.target) for n in loaded[0].graph.nodes if isinstance(n.target, torch._ops.OpOverload)}
    assert targets
    assert {name.split(".")[0] for name in targets} <= {"aten", "prim", "higher_order"}


GUIDE = Path(__file__).parents[1] / "docs" / "deploy.md"


def test_an_archive_with_torch_alone(tmp_path):
    """The guide's own lines, in a process that cannot import Enfilade."""
    predictor = predictor_of("sscnet")
    (tmp_path / "room.pt2").write_bytes(archive_of("sscnet")[0])
    feed = export_graph.example(predictor, SIZES[1])
    np.savez(tmp_path / "feed.npz", **feed)
    (loading,) = re.findall(r"```python\n(import json\nimport torch\n.*?)```", GUIDE.read_text(), re.DOTALL)
    program = f"""
import sys
sys.modules["enfilade"] = sys.modules["timm"] = sys.modules["torchvision"] = None
import numpy as np
feed = np.load("feed.npz")
{loading}
np.savez("out.npz", **{{name: x.numpy() for name, x in answers.items()}})
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    have = np.load(tmp_path / "out.npz")
    want = own_answers("sscnet", predictor.network, feed)
    assert have.files == list(want)
    for name in want:
        np.testing.assert_allclose(have[name], want[name], atol=NEAR[name])


def test_export_writes_an_archive(tmp_path, monkeypatch):
    predictor = predictor_of("sscnet")
    monkeypatch.setattr(export_check, "SHAPE", (24, 16, 32))  # not the 8 million voxels of a room
    loaded = Loaded(predictor.network, predictor.meta)
    monkeypatch.setattr(export.copy, "deepcopy", lambda x: x)  # so that it was traced before
    report = export.export(loaded, tmp_path / "room.pt2", format="torch", runs=1)
    assert report.format == "torch"
    assert report.opset is None
    assert report.bytes == (tmp_path / "room.pt2").stat().st_size
    assert report.inputs == {"tsdf": ["batch", 1, "x", "y", "z"]}
    assert report.outputs["volume_probabilities"][:2] == ["batch", 12]
    assert [d.grid for d in report.differences] == [(24, 16, 32), *(c.grid for c in export_check.CHECKS)]
    assert all(d.outputs["volume_probabilities"] <= 1e-5 and d.beyond == 0 for d in report.differences)
    text = export.table(report)
    assert "the archive" in text
    assert "48, 24x16x32" in text
    with zipfile.ZipFile(tmp_path / "room.pt2") as archive:
        (notes,) = (name for name in archive.namelist() if Path(name).name.startswith("enfilade.json"))
        assert json.loads(archive.read(notes))["inputs"][0]["shape"] == report.inputs["tsdf"]


def test_an_archive_that_cannot_be_loaded_is_not_written(tmp_path, monkeypatch):
    predictor = predictor_of("sscnet")
    monkeypatch.setattr(export_torch, "to_archive", lambda _: (b"no archive", {"inputs": [], "outputs": []}))
    with pytest.raises(UserError, match="torch cannot load what it exported, and it was not written: "):
        export.export(Loaded(predictor.network, predictor.meta), tmp_path / "room.pt2", format="torch")
    assert not list(tmp_path.iterdir())


# --- the check --------------------------------------------------------------------------------------------------------


def fake(predictor, change):
    """A runner that answers as torch, but for what `change` does to each answer."""
    return lambda feed: [change(x) for x in export_graph.answers(predictor.network, feed).values()]


def some(share: float):
    def change(x):
        out = x.copy()
        out.ravel()[: int(share * out.size)] += 0.5
        return out

    return change


def test_single_places_may_differ_where_the_network_takes_an_arg_max():
    predictor = predictor_of("sketch")
    found = export_check.compare(predictor, fake(predictor, some(0.01)), "a file", SIZES[0])
    assert found.beyond == pytest.approx(0.01, rel=0.05)
    assert found.outputs["volume_probabilities"] == pytest.approx(0.5, rel=1e-5)
    with pytest.raises(
        UserError, match=r"a file's volume_probabilities for 1 volumes differs from torch's by 0\.5, more"
    ):
        export_check.compare(predictor, fake(predictor, some(0.03)), "a file", SIZES[0])
    plain = predictor_of("sscnet")
    with pytest.raises(UserError, match="differs"):
        export_check.compare(plain, fake(plain, some(0.01)), "a file", SIZES[0])


def test_nan_is_a_difference():
    predictor = predictor_of("sscnet")
    with pytest.raises(UserError, match="differs from torch's by nan"):
        export_check.compare(predictor, fake(predictor, lambda x: x * np.nan), "a file", SIZES[0])


# --- what no file can hold --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "arguments", "options", "sentence"),
    [
        (
            "imenet",
            ENCODER | VOLUMES | {"stride": 4, "truth": "3d"},
            {},
            "is told the true volume: it is an upper bound",
        ),
        (
            "imenet",
            ENCODER | VOLUMES | {"stride": 4, "truth": "2d"},
            {},
            "is told the true labels: it is an upper bound",
        ),
        ("completion", VOLUMES | {"backbone": "sketch", "deterministic": False}, {}, "draws random codes"),
        ("imenet", ENCODER | VOLUMES | {"stride": 4}, {"opset": 19}, "needs ONNX's GridSample of opset 20, not 19"),
    ],
    ids=("volume", "labels", "codes", "opset"),
)
def test_what_cannot_be_exported(tmp_path, model, arguments, options, sentence):
    loaded = Loaded(checkpoint.build(model, arguments).eval(), {"space": "ssc12", "size": [48, 64]})
    with pytest.raises(UserError, match=sentence):
        export.export(loaded, tmp_path / "m.onnx", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", export.FORMATS)
def test_a_crf_has_no_operators(tmp_path, format):
    arguments = ENCODER | {"classes": 40, "widths": (4,) * 5, "bins": 4, "bin_length": 1.0, "crf": "rgb"}
    loaded = Loaded(checkpoint.build("joint", arguments).eval(), {"space": "nyu40", "size": [48, 64]})
    with pytest.raises(UserError, match=r"permutohedral lattice has no operator in ONNX or torch\.export"):
        export.export(loaded, tmp_path / "m", format=format)


def test_the_rays_of_an_imenet_are_an_input():
    """With project="rays" the voxels' pixels are one more input, in the order of the network's own."""
    network = checkpoint.build("imenet", ENCODER | VOLUMES | {"stride": 4, "project": "rays"})
    assert export_graph.inputs_of(network.eval()) == ("image", "tsdf", "voxels", "pixels")
    feed = export_graph.example(Predictor(network, {"space": "ssc12"}, device="cpu"), SIZES[1])
    assert feed["pixels"].shape == (3, 5, 7, 3)
    assert set(export_graph.answers(network, feed)) == {"probabilities", "volume_probabilities"}


# --- the table of the benchmark ---------------------------------------------------------------------------------------

SCRIPT = GUIDE.parents[1] / "benchmarks" / "export.py"


@pytest.fixture(scope="module")
def benchmark():
    if not SCRIPT.is_file():
        pytest.skip("needs benchmarks/export.py, which the source archive does not hold")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)
        spec = importlib.util.spec_from_file_location("export_benchmark", SCRIPT)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


def test_the_guide_has_the_table_of_the_benchmark(benchmark):
    found = json.loads((GUIDE.parent / "benchmarks" / "export.json").read_text())
    text = GUIDE.read_text().split("## What works")[1]
    made = benchmark.table(found)
    rows = [line for line in made if line.startswith("|")]
    assert [line for line in text.splitlines() if line.startswith("|")] == rows
    assert (
        sum(bool(re.match(r"\d+\. ", line)) for line in text.splitlines()) == len(made) - len(rows) - 1
    )  # and a blank
    assert found["date"] in text


def test_cells_of_the_benchmark(benchmark, monkeypatch, tmp_path):
    """A refusal and a failure are told, each once, and leave the other cells alone."""
    report = {"bytes": 2_500_000, "inputs": {"image": []}, "outputs": {"probabilities": [], "depth": []}, "int8": None}
    report["latency"] = {"height": 48, "width": 64, "torch": 30.0, "exported": 20.0, "grid": None}
    outputs = [{"probabilities": 1e-6, "depth": 4e-6}, {"probabilities": 3e-6, "depth": 2e-6}]
    report["differences"] = [{"outputs": x, "beyond": 0.0} for x in outputs]
    judged = {"pixels": 0.0121, "voxels": None, "depth": 0.002, "onnxruntime_fp32": 30.0, "onnxruntime_int8": 20.0}
    told = {
        "onnx": report,
        "torch": {"refused": "no"},
        "static": report | {"int8": judged},
        "dynamic": {"failed": "no"},
    }
    monkeypatch.setattr(benchmark, "run", lambda name, formats, args: [(format, told[format]) for format in formats])
    out = tmp_path / "export.json"
    words = ["export.py", "--systems", "gad-nyuv2", "sscnet", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", words)
    benchmark.main()
    *_, gad, sscnet, blank, first, second = benchmark.table(json.loads(out.read_text()))
    assert gad == (
        "| `gad-nyuv2` | 64x48 | 3e-06, 4e-06 m; 2.5 MB; 1.50x | refused (1) | 1.2% labels, 0.2% depth; 2.5 MB; 2.25x "
        "| failed (1) |"
    )
    assert sscnet.endswith("| refused (1) | not run (2) | not run (2) |")
    assert (blank, first, second) == ("", "1. no", f"2. {benchmark.NOT_JUDGED}")

    assert benchmark.cell_text(report | {"outputs": {"depth": []}}, []) == "4e-06 m; 2.5 MB; 1.50x"
    volumes = report | {"inputs": {"tsdf": []}, "latency": report["latency"] | {"grid": [24, 16, 32]}}
    assert benchmark.frame_text({"onnx": {"failed": "no"}, "torch": volumes}) == "24x16x32"

    asked = []
    monkeypatch.setattr(benchmark, "run", lambda name, formats, args: asked.append((name, formats)) or ())
    benchmark.main()
    assert asked == [("gad-nyuv2", ["dynamic"]), ("sscnet", [])]  # what failed is tried again, and nothing else
    monkeypatch.setattr(sys, "argv", [*words, "--runs", "3"])
    with pytest.raises(SystemExit, match="was made with other runs: give another --out"):
        benchmark.main()
