"""`enfilade info --profile`: times nest and add up, arithmetic is that of the formula, and nothing stays behind."""

import itertools
import json

import numpy as np
import pytest
import torch
from torch import nn

from enfilade import checkpoint, complete, outputs, predict, profiling, room_output
from enfilade.cli import main
from enfilade.errors import UserError
from enfilade.profiling import Clock, Part, parts_of, profile, tell, text
from enfilade.types import Output, Prediction

ARGUMENTS = {"classes": 40, "encoder": "test_resnet", "weights": None}
ARGUMENTS |= {"bottleneck": 8, "widths": (8, 8), "embedding": 8}
META = {"model": "gad", "arguments": ARGUMENTS, "space": "nyu40", "size": [48, 64], "focal": 50.0}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    checkpoint.save_model(path, checkpoint.build("gad", ARGUMENTS), META)
    return str(path)


@pytest.fixture(scope="module")
def found(model):
    return profile(model, size=(64, 48), device="cpu", crf=True, runs=2)


def walk(part, path=()):
    """Every part, with the names on the way to it."""
    yield (*path, part["name"]), part
    for inner in part.get("parts", ()):
        yield from walk(inner, (*path, part["name"]))


def at(found, *names):
    part = found["total"]
    for name in names:
        (part,) = (p for p in part["parts"] if p["name"].partition(":")[0].partition(" (")[0] == name)
    return part


@pytest.fixture
def ticking(monkeypatch):
    """A clock of the machine that goes on by one second at each look."""
    seconds = itertools.count()
    monkeypatch.setattr(profiling.time, "perf_counter", lambda: float(next(seconds)))


# --- the clock --------------------------------------------------------------------------------------------------------


def test_steps_nest_and_repeat(ticking):
    clock = Clock(CPU)
    with clock.part("a"):  # 0
        for _ in range(2):
            with clock.part("b"):  # 1 to 2, 3 to 4
                pass
    # 5
    (a,) = clock.root.parts.values()
    assert (a.seconds, a.calls) == (5.0, 1)
    assert (a.parts["b"].seconds, a.parts["b"].calls) == (2.0, 2)
    assert a.rest().seconds == 3.0


def test_a_step_that_fails_is_left_all_the_same(ticking):
    clock = Clock(CPU)
    with pytest.raises(ZeroDivisionError), clock.part("a"), clock.part("b"):
        raise ZeroDivisionError
    assert clock.stack == [clock.root]


def test_functions_run_on_the_clock_and_are_put_back():
    class Thing:
        def method(self, x):
            return 2 * x

    thing = Thing()
    thing.own = lambda x: 3 * x
    own = thing.own
    clock = Clock(CPU)
    with clock.around(thing, {"method": "m", "own": "o"}):
        assert thing.method(4) == 8
        assert thing.own(x=4) == 12
    assert vars(thing) == {"own": own}
    assert [p.calls for p in clock.root.parts.values()] == [1, 1]
    with pytest.raises(AttributeError), clock.around(thing, {"renamed": "r"}):
        pass


class Nested(nn.Module):
    """`a` calls `b`, which the network calls too; `rows` are a list; `unused` never runs."""

    def __init__(self):
        super().__init__()
        self.b = nn.Linear(4, 4)
        self.a = nn.Sequential(self.b, nn.ReLU())
        self.rows = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.unused = nn.Linear(4, 4)

    def forward(self, x):
        x = self.b(self.a(x))
        for row in self.rows:
            x = row(x)
        return x


def test_a_networks_parts_are_timed_where_they_are_called():
    network = Nested()
    clock = Clock(CPU)
    with clock.inside(network):
        network(torch.zeros(1, 4))
    network(torch.zeros(1, 4))  # the hooks are gone
    told = clock.root.parts["network"]
    calls = {name: part.calls for name, part in told.parts.items()}
    assert calls == {"a (Sequential)": 1, "b (Linear)": 1, "rows (3 x Linear)": 3}
    assert not told.parts["a (Sequential)"].parts
    assert "forward" not in vars(network)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
    assert set(parts_of(network)) == {*calls, "unused (Linear)"}


def test_arithmetic_is_given_to_the_part_that_did_it():
    network = Nested()
    with profiling.FlopCounterMode(display=False) as counter:
        clock = Clock(CPU, counter)
        with clock.inside(network):
            network(torch.zeros(5, 4))
    one = 2 * 5 * 4 * 4
    told = clock.root.parts["network"]
    assert told.flops == 5 * one
    assert {k: v.flops for k, v in told.parts.items()} == {
        "a (Sequential)": one,
        "b (Linear)": one,
        "rows (3 x Linear)": 3 * one,
    }


def test_what_steps_leave_is_the_rest():
    whole = Part("all", 10.0, 8.0, 100, 1, {"a": Part("a", 4.0, 3.0, 60, 2), "b": Part("b", 5.0, 5.0, 0, 1)})
    first = Part("all", 20.0, 20.0, 0, 1, {"a": Part("a", 20.0, 20.0, 0, 1)})  # b ran in the warm call alone
    told = tell(whole, first, whole, 10.0)
    a, b, rest = told["parts"]
    assert [p["name"] for p in told["parts"]] == ["a", "b", "rest"]
    assert (a["ms"], a["first_ms"], a["share"], a["calls"]) == (4000.0, 20000.0, 0.4, 2)
    assert (a["gflop"], a["gflop_per_s"]) == (60e-9, 15e-9)
    assert (b["first_ms"], "gflop" in b) == (None, False)
    assert (rest["ms"], rest["busy_ms"], rest["first_ms"], rest["gflop"]) == (1000.0, 0.0, 0.0, 40e-9)


# --- a prediction -----------------------------------------------------------------------------------------------------


def test_parts_add_up_to_the_whole(found):
    assert found["total"]["ms"] == found["ms"]
    for path, part in walk(found["total"]):
        inner = part.get("parts")
        for key in ("first_ms", "ms", "busy_ms", "share", "gflop"):
            assert part.get(key, 0) >= -1e-9, (path, key)
            if inner:  # sums of floats
                assert sum(p.get(key) or 0 for p in inner) == pytest.approx(part.get(key, 0)), (path, key)
                assert all((p.get(key) or 0) <= part[key] * (1 + 1e-9) + 1e-9 for p in inner if key in p), (path, key)
    low, high = found["spread_ms"]
    assert low <= found["ms"] <= high


def test_every_step_is_there(found, model):
    assert [p["name"] for p in found["total"]["parts"]] == ["read the photo", "predict", "save", "rest"]
    steps = {p["name"].partition(":")[0] for p in at(found, "predict")["parts"]}
    assert steps == {"prepare", "infer", "finish", "rest"}
    assert at(found, "predict", "finish", "CRF")["calls"] == 1
    assert at(found, "predict", "finish", "decide")["calls"] == 1
    network = checkpoint.load(model).network
    told = {p["name"]: p for p in at(found, "predict", "infer", "network")["parts"]}
    assert told.keys() == {*parts_of(network), "rest"}
    assert told["spf (4 x SkipPyramidFusion)"]["calls"] == 4
    kinds = {p["name"] for p in at(found, "save")["parts"]} - {"rest"}
    assert kinds == set(outputs.FILES) - {"spread"}  # which this network does not give


def test_arithmetic_is_that_of_the_convolutions(found, model):
    """2 x inputs of a window x outputs, summed over the convolutions of each part, for the image and its mirror."""
    network = checkpoint.load(model).network
    counts = dict.fromkeys(parts_of(network), 0)

    def count(name):
        def hook(conv, _, out):
            kernel = conv.in_channels // conv.groups * conv.kernel_size[0] * conv.kernel_size[1]
            counts[name] += 2 * kernel * out.numel()

        return hook

    for name, modules in parts_of(network).items():
        for conv in (m for module in modules for m in module.modules() if isinstance(m, nn.Conv2d)):
            conv.register_forward_hook(count(name))
    width, height = found["input"]
    with torch.no_grad():
        network(torch.zeros(2, 3, height, width))
    told = {p["name"]: p.get("gflop", 0.0) for p in at(found, "predict", "infer", "network")["parts"]}
    for name, flops in counts.items():
        if not name.startswith("fusion"):  # which multiplies matrices too
            assert told[name] == pytest.approx(flops / 1e9)
    assert told["fusion (GeometryAwarePropagation)"] > counts["fusion (GeometryAwarePropagation)"] / 1e9
    assert at(found, "predict", "infer", "network")["gflop"] == pytest.approx(sum(told.values()))


def test_a_profile_tells_where_it_was_made(found):
    assert (found["photo"], found["input"]) == ([64, 48], [64, 48])
    assert (found["flip"], found["crf"], found["device"], found["precision"]) == (True, True, "cpu", "fp32")
    memory = found["memory"]
    assert memory["peak_megabytes"] > 50  # Python and torch
    assert memory["before_megabytes"] is None or memory["before_megabytes"] <= memory["peak_megabytes"]
    assert json.loads(json.dumps(found)) == found


def test_nothing_stays_on_the_clock(model, monkeypatch, tmp_path):
    kept = {name: vars(predict)[name] for name in ("decide", "load")}
    seen = []
    real = profiling.load_any
    monkeypatch.setattr(profiling, "load_any", lambda *a: seen.append(real(*a)) or seen[-1])
    profile(model, size=(64, 48), device="cpu", runs=1)
    (predictor,) = seen
    assert not {"prepare", "infer", "_finish"} & vars(predictor).keys()
    assert "forward" not in vars(predictor.network)
    assert kept == {name: vars(predict)[name] for name in kept}


def test_the_table_shows_what_was_found(found):
    told = text(found)
    for path, part in walk(found["total"]):
        if part["name"] != "rest":
            indent = "  " * (len(path) - 1)
            assert any(line.startswith(f"{indent}{part['name']}  ") for line in told.splitlines()), part["name"]
    assert "a room of 64x48, the network sees 64x48, and its mirror image" in told
    assert all(len(line) < 120 for line in told.splitlines()[1:])  # the first names the file


# --- a completion -----------------------------------------------------------------------------------------------------


class Full(nn.Module):
    """Says something of every voxel."""

    uses = ("tsdf",)

    def __init__(self):
        super().__init__()
        self.pool = nn.MaxPool3d(4)
        self.classify = nn.Linear(1, 12)

    def forward(self, image, tsdf) -> Output:
        return Output(
            volume_logits=self.classify(self.pool(tsdf).movedim(1, -1)).movedim(-1, 1),
            logits=torch.zeros(1, 12, 15, 20),
        )


def test_a_completion_is_profiled_too(monkeypatch):
    class Estimator:
        meta = {"recipe": "told"}  # noqa: RUF012

        def predict(self, image, *, camera=None, fov=None):
            depth = np.full(image.rgb.shape[:2], 2.0, np.float32)
            return Prediction(image=image.rgb, depth=depth, camera=camera, space="nyu40")

    completer = complete.Completer(Full(), {"size": [60, 80]}, device="cpu")
    monkeypatch.setattr(profiling, "load_any", lambda *_: completer)
    monkeypatch.setattr(predict, "load", lambda *_, **__: Estimator())
    found = profile("made", size=(80, 60), runs=1)
    test_parts_add_up_to_the_whole(found)
    steps = {p["name"] for p in at(found, "complete")["parts"]}
    assert set(profiling.COMPLETE.values()) | {"estimate depth: the default model", "free space", "rest"} == steps
    network = at(found, "complete", "infer", "network")
    assert {p["name"] for p in network["parts"]} == {"pool (MaxPool3d)", "classify (Linear)", "rest"}
    assert network["gflop"] == pytest.approx(2 * 12 * 60 * 36 * 60 / 1e9)
    assert {p["name"] for p in at(found, "save")["parts"]} == {*room_output.FILES, "rest"}
    assert complete.encode.__module__ == "enfilade.data.volumes"
    assert not hasattr(complete.encode, "__wrapped__") or complete.encode.__wrapped__.__name__ == "encode"
    assert "made on cpu" in text(found)


# --- the verb ---------------------------------------------------------------------------------------------------------


def test_the_verb_prints_a_table_or_json(model, capsys):
    assert main(["info", "--profile", model, "--size", "64x48"]) == 0
    assert "infer: network, softmax, mirror average" in capsys.readouterr().out
    assert main(["info", "--profile", "--model", model, "--size", "64x48", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {
        "model",
        "photo",
        "input",
        "device",
        "threads",
        "load_ms",
        "first_ms",
        "ms",
        "memory",
        "total",
    } <= told.keys()
    assert told["model"] == model


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--profile", "gad-nyu2"], "did you mean 'gad-nyuv2'"),
        (["--profile", "a", "b"], "--profile takes one model, not a and b"),
        (["--profile", "--size", "big"], "--size is WIDTHxHEIGHT in pixels, such as 640x480, not 'big'"),
        (["--profile", "--size", "8x8"], "a photo to profile by has 32 to 8192 pixels a side, not 8x8"),
        (["--size", "64x48"], "belong to --profile"),
        (["--profile", "imenet-rooms", "--crf"], "this model completes rooms"),
        (["--no-crf"], "belong to --profile"),
    ],
)
def test_bad_input_is_one_sentence(capsys, words, sentence):
    assert main(["info", *words]) == 2
    told = capsys.readouterr()
    assert sentence in told.err
    assert (told.out, told.err.count("\n")) == ("", 1)


def test_at_least_one_warm_run(model):
    with pytest.raises(UserError, match="at least 1 warm run, not 0"):
        profile(model, runs=0)


@pytest.mark.gpu
def test_on_a_gpu(model):
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    found = profile(model, size=(64, 48), device="cuda", runs=2)
    test_parts_add_up_to_the_whole(found)
    assert found["precision"] == "bf16"
    assert found["memory"]["gpu_peak_megabytes"] > 0
