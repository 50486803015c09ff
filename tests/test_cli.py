"""The command line, mostly in this process: exit codes, what stands on which stream, and a line for each bad input."""

import json
import pickle
import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from typing import get_args

import cv2
import numpy as np
import pytest
import torch

import enfilade
from enfilade import checkpoint, experiments, options, recipes, verbs
from enfilade.cli import main
from enfilade.errors import UserError
from enfilade.overrides import override
from enfilade.stages import Recipe
from enfilade.verbs import VERBS

TINY = {"classes": 40, "encoder": "test_resnet", "weights": None}
TINY |= {"bottleneck": 8, "widths": (8, 8), "embedding": 8}
META = {"model": "gad", "arguments": TINY, "space": "nyu40", "size": [48, 64], "focal": 50.0}
SMALL = ["arguments.encoder=test_resnet", "arguments.bottleneck=8", "arguments.widths=8,8", "arguments.embedding=8"]
SMALL += ["stages.*.epochs=1", "stages.*.size=32,32", "stages.*.batch=2", "scale=1.0", "focal=50"]
SET = [word for assignment in SMALL for word in ("--set", assignment)]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("ENFILADE_DEBUG", raising=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A network of random weights: the command line cares for files, not for scores."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    checkpoint.save_model(path, checkpoint.build("gad", TINY), META)
    return str(path)


def write_photo(path: Path, seed: int = 0, size: tuple[int, int] = (30, 40)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    assert cv2.imwrite(str(path), cv2.resize(pixels, size[::-1]))
    return path


@pytest.fixture
def photo(tmp_path) -> str:
    return str(write_photo(tmp_path / "in" / "photo.jpg"))


@pytest.fixture
def nyu(tmp_path) -> Path:
    """Eleven small frames in the folder layout of NYUv2: nine to train on, two to validate."""
    root, rng = tmp_path / "nyu", np.random.default_rng(0)
    ids = [f"{i:04d}" for i in range(1, 12)]
    for kind in ("rgb", "depth", "label40"):
        (root / kind).mkdir(parents=True)
    for i, name in enumerate(ids):
        write_photo(root / f"rgb/{name}.jpg", seed=i, size=(48, 64))
        cv2.imwrite(str(root / f"depth/{name}.png"), rng.integers(1000, 5000, (48, 64), np.uint16))
        cv2.imwrite(str(root / f"label40/{name}.png"), rng.integers(0, 41, (48, 64)).astype(np.uint8))
    (root / "train.txt").write_text("\n".join(ids))
    return root


def fails(capsys, words, *parts: str, code: int = 2) -> str:
    """Run, and check that it ends with `code` and a single line on stderr that has all `parts`."""
    assert main([str(word) for word in words]) == code
    captured = capsys.readouterr()
    lines = captured.err.strip().split("\n")
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("enfilade: ")
    for part in parts:
        assert part in lines[0], lines[0]
    assert captured.out == ""
    return lines[0]


# --- help, imports, typos ---------------------------------------------------------------------------------------------


def test_help_and_version_import_nothing_heavy():
    program = """
import contextlib, io, sys
import enfilade
assert "torch" not in sys.modules, "import enfilade"
from enfilade.cli import main
from enfilade.verbs import VERBS
for words in [["--help"], ["--version"], ["data", "--help"], *([*verb.split(), "--help"] for verb in VERBS)]:
    with contextlib.redirect_stdout(io.StringIO()) as text:
        assert main(words) == 0, words
    assert "enfilade" in text.getvalue(), words
print(sorted({"torch", "numpy", "cv2", "timm", "PIL", "numba", "accelerate"} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_top_level_help_names_every_verb(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {verb} " in text for verb in VERBS)


def test_no_words_show_the_help_and_are_an_error(capsys):
    assert main([]) == 2
    assert "predict" in capsys.readouterr().out
    assert main(["data"]) == 2


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["predct"], "'predict'"),
        (["evalute"], "'evaluate'"),
        (["data", "chek"], "'data check'"),
        (["train", "gad-nyu", "--data", "rooms", "--out", "x"], "'gad-nyuv2'"),
        (["reproduce", "gad-tabel4", "--data", "rooms", "--out", "x"], "'gad-table4'"),
        (["evaluate", "--data", "nyuv", "--root", "x"], "'nyuv2'"),
        (["data", "show", "room"], "'rooms'"),
        (["data", "prepare", "nyu", "--mat", "x.mat", "--out", "x"], "'nyuv2'"),
        (["info", "--model", "gad-nyu2"], "'gad-nyuv2'"),
        (["predict", "x.jpg", "--model", "gad-nyv2"], "'gad-nyuv2'"),
    ],
)
def test_a_typo_is_answered_with_the_nearest_name(capsys, words, hint):
    assert hint in fails(capsys, words, "did you mean")


def test_wrong_options_end_with_2(capsys):
    assert main(["predict", "x.jpg", "--modle", "y"]) == 2
    assert "--model" in capsys.readouterr().err
    assert main(["train"]) == 2
    assert main(["evaluate", "--data", "rooms", "--depth-average", "frame"]) == 2
    assert main(["predict", "x.jpg", "--every", "often"]) == 2


def test_choices_of_the_command_line_are_those_of_the_library():
    from enfilade.outputs import FILES

    assert get_args(options.File) == FILES


def test_module_can_be_run():
    done = subprocess.run([sys.executable, "-m", "enfilade", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"enfilade {enfilade.__version__}\n")


def test_public_names_are_there_whatever_was_imported_first(model, photo):
    import enfilade.evaluate
    import enfilade.predict
    import enfilade.train

    assert enfilade.predict(photo, model).labels.shape == (30, 40)
    assert enfilade.load(model).predict(photo).depth.shape == (30, 40)
    for name in enfilade.__all__:
        assert callable(getattr(enfilade, name))
    assert isinstance(enfilade.train.train, type(main))  # the module of the same name still is one
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = enfilade.lod


# --- predict ----------------------------------------------------------------------------------------------------------


def test_predict_writes_what_was_asked_for(capsys, model, photo, tmp_path):
    out = tmp_path / "out"
    assert main(["predict", photo, "--out", str(out), "--model", model, "--files", "labels", "depth"]) == 0
    assert sorted(p.name for p in out.iterdir()) == ["manifest.jsonl", "photo.depth.png", "photo.labels.png"]
    assert cv2.imread(str(out / "photo.depth.png"), cv2.IMREAD_UNCHANGED).dtype == np.uint16
    captured = capsys.readouterr()
    assert "camera assumed" in captured.out
    assert captured.err == ""


def test_json_is_all_that_stdout_has(capsys, model, photo, tmp_path):
    assert main(["predict", photo, "--out", str(tmp_path / "out"), "--model", model, "--json", "--no-flip"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["failed"] == []
    (done,) = told["done"]
    assert (done["width"], done["height"], done["camera"]["source"]) == (40, 30, "assumed")
    assert all(Path(file).is_file() for file in done["files"])
    assert sum(done["classes"].values()) == pytest.approx(1)


def test_predict_goes_on_where_it_stopped(capsys, model, photo, tmp_path):
    write_photo(tmp_path / "in" / "second.jpg", seed=1)
    words = ["predict", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--model", model, "--files", "labels"]
    assert main([*words, "--shard", "1/2"]) == 0
    assert "1 done, in " in capsys.readouterr().out
    assert main(words) == 0
    first, _, last = capsys.readouterr().out.strip().split("\n")
    assert first == "1 done before"
    assert last.startswith("1 done, 1 before, in ")
    assert main(words) == 0
    assert capsys.readouterr().out.startswith("2 done before")
    assert main([*words, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["before"] == 2
    assert [Path(d["source"]).name for d in again["done"]] == ["photo.jpg", "second.jpg"]
    assert main([*words, "--no-flip", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["before"] == 0
    assert told["done"][0].keys() == again["done"][0].keys()
    assert main([*words, "--no-resume", "--no-flip"]) == 0
    assert capsys.readouterr().out.strip().split("\n")[-1].startswith("2 done, in ")


def test_shards_and_workers_that_make_no_sense(capsys, model, photo, tmp_path):
    base = ["predict", photo, "--out", tmp_path / "out", "--model", model]
    for shard in ("2", "two/8", "1/", "-1/2", "²/3"):
        fails(capsys, [*base, f"--shard={shard}"], "--shard is I/N")
    for shard in ("0/2", "3/2"):
        fails(capsys, [*base, "--shard", shard], f"shard {shard}", "1/8 to 8/8")
    fails(capsys, [*base, "--workers", "0"], "--workers")
    fails(capsys, [*base, "--address", "auto"], "engine ray")


def bomb(path: Path) -> None:
    """A PNG that says it has 40000 x 40000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def spoil(path: Path, kind: str) -> Path:
    whole = write_photo(path, size=(60, 80)).read_bytes()
    match kind:
        case "empty":
            path.write_bytes(b"")
        case "truncated":
            path.write_bytes(whole[: len(whole) // 2])
        case "text":
            path.write_text("a letter, not a picture\n" * 20)
        case "weights":
            path.write_bytes(pickle.dumps({"weight": list(range(100))}))
        case "bomb":
            bomb(path)
    return path


BAD = ("empty", "truncated", "text", "weights", "bomb")


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_image_is_named(capsys, model, tmp_path, kind):
    path = spoil(tmp_path / "bad.png", kind)
    fails(capsys, ["predict", path, "--out", tmp_path / "out", "--model", model], str(path))


def test_good_images_come_out_from_among_bad_ones(capsys, model, tmp_path):
    for i in range(2):
        write_photo(tmp_path / f"in/good{i}.jpg", seed=i)
    write_photo(tmp_path / "in/dot.png", size=(1, 1))
    for kind in BAD:
        spoil(tmp_path / f"in/{kind}.png", kind)
    out = tmp_path / "out"
    words = ["predict", str(tmp_path / "in"), "--out", str(out), "--model", model, "--files", "labels", "panel"]
    assert main(words) == 1
    captured = capsys.readouterr()
    names = {p.name for p in out.glob("*.png")}
    assert names == {f"{stem}.{kind}.png" for stem in ("good0", "good1", "dot") for kind in ("labels", "panel")}
    complaints = captured.err.strip().split("\n")
    assert len(complaints) == len(BAD)
    assert all(any(f"{kind}.png" in line for line in complaints) for kind in BAD)

    assert main([*words, "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert len(told["done"]) == 3
    assert {Path(f["source"]).stem for f in told["failed"]} == set(BAD)


def test_paths_that_lead_nowhere(capsys, model, tmp_path):
    (tmp_path / "empty").mkdir()
    base = ["--out", tmp_path / "out", "--model", model]
    fails(capsys, ["predict", *base], "at least one PATH")
    fails(capsys, ["predict", tmp_path / "none.jpg", *base], "none.jpg")
    fails(capsys, ["predict", tmp_path / "empty", *base], "no images")
    fails(capsys, ["predict", tmp_path / "*.gif", *base], "*.gif")
    fails(capsys, ["predict", tmp_path / "x.jpg", *base, "--every", "0"], "--every")


def test_weight_files_that_are_none(capsys, photo, model, tmp_path):
    whole = Path(model).read_bytes()
    tensors, meta = checkpoint.read(Path(model))
    bad = {name: tmp_path / f"{name}.safetensors" for name in ("cut", "short", "pickle", "other", "foreign", "state")}
    bad["cut"].write_bytes(whole[: len(whole) // 2])
    bad["short"].write_bytes(whole[:5])
    torch.save({"weight": torch.zeros(3)}, bad["pickle"])
    changed = meta | {"arguments": meta["arguments"] | {"embedding": 4}}
    checkpoint.write(bad["other"], tensors, changed)
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(3)}, bad["foreign"])
    checkpoint.write(bad["state"], tensors, {"progress": {}, "groups": []})
    expected = {"cut": "truncated", "short": "", "pickle": "pickle", "other": "another model"}
    expected |= {"foreign": "not one of Enfilade's", "state": "training state"}
    for name, part in expected.items():
        fails(capsys, ["predict", photo, "--out", tmp_path / "out", "--model", bad[name]], str(bad[name]), part)
        if name in ("short", "foreign", "pickle"):
            fails(capsys, ["info", "--model", bad[name]], str(bad[name]))
    fails(capsys, ["predict", photo, "--model", tmp_path / "none.safetensors"], "none.safetensors")
    fails(capsys, ["predict", photo, "--model", tmp_path], str(tmp_path))


@pytest.mark.parametrize("verb", ["predict", "evaluate", "train", "show", "demo", "prepare"])
def test_a_file_where_the_output_should_go(capsys, model, photo, nyu, tmp_path, verb):
    (tmp_path / "taken").write_text("not a folder")
    out = tmp_path / "taken" / "out"
    words = {
        "predict": ["predict", photo, "--model", model, "--out", out],
        "evaluate": ["evaluate", "--data", "nyuv2", "--root", nyu, "--model", model, "--out", out],
        "train": ["train", "gad-gap", "--data", "nyuv2", "--root", nyu, "--out", out, "--quiet", *SET],
        "show": ["data", "show", "nyuv2", "--root", nyu, "--out", f"{out}.png", "--count", "1"],
        "demo": ["demo", "--out", out, "--model", model],
        "prepare": ["data", "prepare", "nyuv2", "--mat", tmp_path / "no.mat", "--out", out],
    }[verb]
    fails(capsys, words, "taken" if verb != "prepare" else "no.mat")


def test_a_given_camera_is_used(capsys, model, photo, tmp_path):
    def depth_with(*options) -> np.ndarray:
        out = tmp_path / "out"
        words = ["predict", photo, "--out", str(out), "--model", model, "--files", "arrays", *map(str, options)]
        assert main(words) == 0
        assert "camera given" in capsys.readouterr().out
        return np.load(out / "photo.npz")["depth"]

    near, far = depth_with("--fx", 40), depth_with("--fx", 80)
    np.testing.assert_allclose(far, 2 * near, rtol=1e-5)  # twice the focal length, twice as far: linear, float32
    file = tmp_path / "camera.json"
    file.write_text(json.dumps({"fx": 80, "fy": 80, "cx": 39.5, "cy": 29.5, "width": 80, "height": 60}))
    np.testing.assert_allclose(depth_with("--camera", file), near, rtol=1e-5)  # of the image at twice the size
    fov = np.degrees(2 * np.arctan(20 / 40))
    np.testing.assert_allclose(depth_with("--fov", fov), near, rtol=1e-5)


def test_cameras_that_make_no_sense(capsys, model, photo, tmp_path):
    base = ["predict", photo, "--out", tmp_path / "out", "--model", model]
    file = tmp_path / "camera.json"
    fails(capsys, [*base, "--fx", "50", "--fov", "60"], "once")
    fails(capsys, [*base, "--cx", "50"], "--fx")
    fails(capsys, [*base, "--fx", "-50"], "positive")
    fails(capsys, [*base, "--fov", "190"], "170")
    fails(capsys, [*base, "--camera", file], "camera.json")
    for text in ("fx = 5", "[1, 2]", '{"fy": 3}', '{"fx": "wide"}'):
        file.write_text(text)
        fails(capsys, [*base, "--camera", file], "camera.json", "fx")
    file.write_text('{"fx": 50, "width": 50, "height": 50}')
    fails(capsys, [*base, "--camera", file], "50 x 50")


def test_device_that_is_not_there(capsys, model, photo, tmp_path):
    fails(capsys, ["predict", photo, "--out", tmp_path, "--model", model, "--device", "warp:3"], "warp:3")


# --- data, evaluate, train --------------------------------------------------------------------------------------------


def test_data_check_and_show(capsys, nyu, tmp_path):
    assert main(["data", "check", "nyuv2", "--root", str(nyu), "--split", "val", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 2
    (nyu / "depth/0003.png").write_bytes(b"")
    assert main(["data", "check", "nyuv2", "--root", str(nyu)]) == 1
    assert "0003.png" in capsys.readouterr().out
    sheet = tmp_path / "sheet.png"
    assert main(["data", "show", "nyuv2", "--root", str(nyu), "--out", str(sheet), "--count", "2"]) == 0
    assert cv2.imread(str(sheet)) is not None


def test_data_show_and_check_of_rooms(tmp_path):
    options = ["--option", "length=1", "--option", "width=64", "--option", "height=48"]
    sheet = tmp_path / "rooms.png"
    assert main(["data", "show", "rooms", "--out", str(sheet), *options]) == 0
    assert main(["data", "check", "rooms", *options]) == 0
    assert cv2.imread(str(sheet)) is not None


def test_data_sets_that_are_not_whole(capsys, nyu, model, tmp_path):
    base = ["evaluate", "--data", "nyuv2", "--model", model]
    fails(capsys, base, "folder")
    fails(capsys, [*base, "--root", tmp_path / "none"], "none")
    fails(capsys, [*base, "--root", nyu, "--split", "vall"], "did you mean 'val'")
    fails(capsys, [*base, "--root", nyu, "--split", "test"], "test.txt")
    fails(capsys, [*base, "--root", nyu, "--option", "hah=true"], "hah")
    fails(capsys, [*base, "--root", nyu, "--option", "hha"], "KEY=VALUE")
    fails(capsys, ["data", "show", "rooms", "--root", nyu], "no folder")
    fails(capsys, ["data", "prepare", "nyuv2", "--mat", tmp_path / "no.mat", "--out", tmp_path / "o"], "no.mat")
    write_photo(nyu / "rgb/0011.jpg", size=(24, 32))
    assert "0011" in fails(capsys, [*base, "--root", nyu])
    (nyu / "label40/0011.png").unlink()
    fails(capsys, [*base, "--root", nyu], "label40/0011.png")


def test_evaluate_prints_and_writes_a_report(capsys, nyu, model, tmp_path):
    out = tmp_path / "scores"
    words = ["evaluate", "--data", "nyuv2", "--root", str(nyu), "--model", model, "--out", str(out), "--no-flip"]
    assert main(words) == 0
    table = capsys.readouterr().out
    assert "mean IoU" in table
    assert (out / "report.txt").read_text().strip() == table.strip()
    assert cv2.imread(str(out / "confusion.png")) is not None
    assert not (out / "comparison.png").exists()
    assert main([*words, "--pictures", "2"]) == 0
    capsys.readouterr()
    assert cv2.imread(str(out / "comparison.png")).shape[1] > 7 * 240  # photo, three of labels, three of depth
    fails(capsys, [*words[:-3], "--no-flip", "--pictures", "2"], "give --out DIR")
    saved = json.loads((out / "report.json").read_text())
    assert saved["protocol"]["frames"] == 2
    assert saved["protocol"]["flip"] is False

    assert main([*words[:-3], "--json", "--limit", "1", "--crop", "none"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["protocol"]["frames"] == 1
    assert told["depth"]["rmse"] > 0
    fails(capsys, [*words, "--limit", "0"], "--limit")
    fails(capsys, [*words, "--crop", "nuy"], "nuy")


def test_train_then_use_the_run_folder(capsys, nyu, photo, tmp_path):
    run = tmp_path / "run"
    words = ["train", "gad-gap", "--data", "nyuv2", "--root", str(nyu), "--out", str(run), "--workers", "0", *SET]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "random weights" in out
    assert "best_miou" in out
    recipe = json.loads((run / "recipe.json").read_text())
    assert recipe["stages"][0]["size"] == [32, 32]

    assert main([*words, "--quiet"]) == 0  # finished: returns at once
    assert "complete True" in capsys.readouterr().out
    fails(capsys, [*words, "--set", "seed=3"], "another recipe")
    assert main(["predict", photo, "--model", str(run), "--out", str(tmp_path / "out")]) == 0
    base = ["--data", "nyuv2", "--root", str(nyu), "--model", str(run)]
    assert main(["evaluate", *base, "--limit", "1"]) == 0
    capsys.readouterr()
    assert main(["info", "--model", str(run)]) == 0
    assert "test_resnet" in capsys.readouterr().out


def test_training_refuses_at_once(capsys, nyu, tmp_path):
    base = ["train", "gad-gap", "--data", "nyuv2", "--root", nyu, "--out", tmp_path / "run"]
    fails(capsys, [*base, "--set", "stages.0.epohs=3"], "did you mean 'epochs'")
    fails(capsys, [*base, "--threads", "0"], "--threads")
    fails(capsys, [*base, "--encoder-weights", tmp_path / "none.safetensors"], "none.safetensors")
    fails(capsys, [*base, "--set", "arguments.encoder=mobilenetv2_10"], "mobilenetv2_100")
    fails(capsys, [*base, "--split", "trian"], "did you mean 'train'")


def test_reproduce_hands_its_options_on(capsys, monkeypatch, tmp_path):
    seen = {}

    def reproduce(table, **options):
        seen.update(options, table=table)
        return "| row |"

    monkeypatch.setattr(experiments, "reproduce", reproduce)
    words = ["reproduce", "gad-table4", "--data", "rooms", "--out", str(tmp_path), "--rows", "gad-gap", "gad-spf"]
    assert main([*words, "--epochs", "2"]) == 0
    assert "| row |" in capsys.readouterr().out
    assert (seen["table"], seen["rows"], seen["epochs"]) == ("gad-table4", ("gad-gap", "gad-spf"), 2)
    fails(capsys, [*words, "--epochs", "0"], "--epochs")


def test_reproduce_knows_its_rows(capsys, nyu, tmp_path):
    words = ["reproduce", "gad-table4", "--data", "nyuv2", "--root", nyu, "--out", tmp_path / "t", "--rows", "gad-gpa"]
    fails(capsys, words, "gad-gap")


def test_info(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("torch", "gad-nyuv2", "gad-table4", "rooms", "cores"))
    assert [line.split()[0] for line in text.splitlines() if line.endswith("the default")] == ["gad-joint-nyuv2"]
    assert main(["info", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {r["name"] for r in told["recipes"]} == set(recipes.RECIPES)
    assert told["versions"]["torch"] == torch.__version__.split("+")[0]


# --- how errors end ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "part"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (PermissionError(13, "Permission denied", "/locked"), 2, "/locked: Permission denied"),
        (FileNotFoundError("the file x is missing"), 2, "the file x is missing"),
        (ValueError("two\nlines"), 2, "two lines"),
        (IndexError("oops"), 70, "IndexError: oops"),
    ],
)
def test_exit_codes(capsys, monkeypatch, error, code, part):
    def run(self):
        raise error

    monkeypatch.setattr(verbs.Info, "run", run)
    fails(capsys, ["info"], part, code=code)


def test_debug_shows_where(capsys, monkeypatch, tmp_path):
    words = ["predict", str(tmp_path / "none.jpg"), "--model", str(tmp_path)]
    assert main([*words, "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("ENFILADE_DEBUG", "1")
    assert main(words) == 2
    assert "Traceback" in capsys.readouterr().err


def test_only_the_first_of_many_processes_prints(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert main(["--version"]) == 0
    assert main(["predct"]) == 2
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("LOCAL_RANK", "0")  # the first on another machine: it may be the only one that fails
    fails(capsys, ["predct"], "predict")


# --- overrides --------------------------------------------------------------------------------------------------------


def three_stages() -> Recipe:
    recipe = recipes.get("gad-nyuv2")
    return recipe.replace(stages=tuple(replace(recipe.stages[0], name=name) for name in ("small", "full", "again")))


def test_overrides_reach_every_place():
    recipe = three_stages()
    changed = override(
        recipe,
        [
            *("seed=7", "precision=no", "focal=null", "scale=1", "arguments.fusion=vanilla", "arguments.widths=[8, 8]"),
            *("stages.*.batch=2", "stages.0.epochs=3", "stages.full.size=96,128", "stages.full.train=semantic,spf"),
            *("stages.small.losses.focal=0.5", 'stages.1.losses={"focal": 1}', "stages.0.flip=0"),
        ],
    )
    small, full, again = changed.stages
    assert (changed.seed, changed.precision, changed.focal, changed.scale) == (7, "no", None, 1.0)
    assert changed.arguments == recipe.arguments | {"fusion": "vanilla", "widths": (8, 8)}
    assert (small.batch, full.batch, again.batch) == (2, 2, 2)
    assert (small.epochs, full.epochs) == (3, recipe.stages[1].epochs)
    assert (full.size, full.train) == ((96, 128), ("semantic", "spf"))
    assert small.losses == recipe.stages[0].losses | {"focal": 0.5}
    assert full.losses == {"focal": 1.0}
    assert isinstance(small.flip, float)
    assert recipe == three_stages()  # a change makes a new recipe
    assert override(recipe, []) == recipe


@pytest.mark.parametrize(
    ("assignment", "part"),
    [
        ("seed", "PATH=VALUE"),
        ("sed=1", "did you mean 'seed'"),
        ("seed=one", "whole number"),
        ("seed=true", "whole number"),
        ("seed.low=1", "nothing below"),
        ("stages=3", "name a stage"),
        ("stages.7.epochs=1", "no stage '7'"),
        ("stages.smal.epochs=1", "did you mean 'small'"),
        ("stages.0.epochs=0", "larger than 0"),
        ("stages.0.epochs=1.5", "whole number"),
        ("stages.0.lr=NaN", "larger than 0"),
        ("stages.0.size=5", "2 values"),
        ("stages.0.optimiser=adamm", "did you mean 'adam'"),
        ("stages.0.losses.focl=1", "did you mean 'focal'"),
        ("stages.0.losses=3", "names and numbers"),
        ("arguments.widht=3", "did you mean 'widths'"),
        ("arguments.skip=1", "true or false"),
        ("arguments.fusion=gapp", "did you mean 'gap'"),
        ("arguments=3", "one argument at a time"),
        ("model=gadd", "no model 'gadd'"),
        ("space=nyu41", "nyu40"),
    ],
)
def test_overrides_are_checked(assignment, part):
    with pytest.raises(UserError, match=part):
        override(three_stages(), [assignment])
