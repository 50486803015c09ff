"""Large jobs: stopped anywhere and run again, or cut into shards, they end with the files of one whole run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from enfilade import images, manifest, predict_files
from enfilade.errors import UserError
from enfilade.predict import Predictor
from enfilade.predict_files import predict_many
from enfilade.types import Output

META = {"model": "stub", "arguments": {}, "space": "nyu13", "size": [24, 32], "focal": 26.0}
KINDS = ("labels", "depth", "arrays")


class Stub(nn.Module):
    """Each pixel by itself, so that every picture has an answer of its own. Slow, or deadly for black pictures, where
    the environment says so."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Conv2d(3, 13, 1)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)

    def forward(self, image) -> Output:
        if os.environ.get("STUB_DEADLY") and image.max() == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(float(os.environ.get("STUB_SECONDS", "0")))
        return Output(logits=self.mix(image), depth=1 + image[:, 2])


def stub(**options) -> Predictor:
    return Predictor(Stub(), META, device="cpu", **options)


def write_photo(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    assert cv2.imwrite(str(path), cv2.resize(pixels, (40, 30)))
    return path


def write_video(path: Path, frames: int) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, (40, 30))
    for seed in range(frames):
        pixels = np.random.default_rng(100 + seed).integers(0, 256, (6, 8, 3), np.uint8)
        writer.write(cv2.resize(pixels, (40, 30)))
    writer.release()
    return path


def folder(root: Path, frames: int = 4) -> Path:
    """Names that clash, a sub-folder, a video in the middle, a bad picture and a bad video."""
    for seed, name in enumerate(("a.png", "a.jpg", "b.png", "z.png", "sub/a.png")):
        write_photo(root / name, seed)
    write_video(root / "clip.avi", frames)
    (root / "cut.png").write_bytes((root / "a.png").read_bytes()[:40])
    (root / "y.mp4").write_text("no video")
    return root


def results(out: Path) -> dict[str, bytes]:
    """Every file but the manifests, hidden ones too."""
    files = [p for p in out.rglob("*") if p.is_file() and not p.name.startswith("manifest")]
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in files}


def told(out: Path, places: list[str]) -> list[dict]:
    """What the manifests say in the end, but for times."""
    lines = manifest.History(out).answers(places)
    return [{k: v for k, v in line.items() if k not in ("time", "seconds")} for line in lines]


def run(source, out, predictor=None, files=KINDS, **options):
    return predict_many(source, out, predictor or stub(), files=files, quiet=True, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder, and the results of one run over it."""
    source, out = folder(tmp_path_factory.mktemp("in")), tmp_path_factory.mktemp("out")
    summary = run(source, out)
    assert (summary.made, summary.before, len(summary.failed)) == (9, 0, 2)
    return source, out, [i.place for i in predict_files.places(images.find_relative(source))], summary


PROGRAM = """
import sys
from test_predict_files import KINDS, run
run(sys.argv[1], sys.argv[2])
"""


def killed(source: Path, out: Path, until) -> int:
    """Run in a process of its own, slowly, and kill -9 it when `until` is true of the manifest's lines. The number of
    pictures that were done."""
    environment = os.environ | {"STUB_SECONDS": "0.2", "PYTHONPATH": str(Path(__file__).parent)}
    with subprocess.Popen([sys.executable, "-c", PROGRAM, source, out], env=environment) as process:
        lines = []
        while process.poll() is None and not until(lines):
            time.sleep(0.02)
            with_text = (out / "manifest.jsonl").read_text() if (out / "manifest.jsonl").exists() else ""
            lines = [json.loads(text) for text in with_text.split("\n")[:-1]]
        process.kill()
    assert process.returncode == -signal.SIGKILL
    return sum(line["state"] == "done" for line in lines)


@pytest.mark.skipif(os.name != "posix", reason="kill -9")
def test_killed_in_a_video_and_run_again(whole, tmp_path):
    source, wanted, places, _ = whole
    done = killed(source, tmp_path, lambda lines: any(line.get("frame") == 1 for line in lines))
    assert done < 9
    # what a process leaves that dies while it writes: half a picture, half a line
    (tmp_path / "clip" / ".0123456789ab.part").write_bytes(b"half")
    with (tmp_path / "manifest.jsonl").open("a") as file:
        file.write('{"state": "done", "place": "b", "fra')
    notes = []
    summary = run(source, tmp_path, on_note=notes.append)
    assert summary.before >= done
    assert summary.made + summary.before == 9
    assert notes[0].startswith(f"{summary.before} done before")
    assert results(tmp_path) == results(wanted)
    assert told(tmp_path, places) == told(wanted, places)
    assert [d["source"] for d in summary.done] == [d["source"] for d in whole[3].done]
    again = run(source, tmp_path)
    assert (again.made, again.before) == (0, 9)
    assert [path for path, _ in again.failed] == [path for path, _ in summary.failed]


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_stopped_anywhere_and_run_again(whole, tmp_path, stop):
    source, wanted, places, summary = whole
    heard = []

    def interrupt(path, _):
        heard.append(path)
        if len(heard) == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path, on_result=interrupt)
    again = run(source, tmp_path)
    assert again.made + again.before == 9
    assert results(tmp_path) == results(wanted)
    assert told(tmp_path, places) == told(wanted, places)
    without_seconds = [[{**d, "seconds": 0, "files": len(d["files"])} for d in s.done] for s in (again, summary)]
    assert without_seconds[0] == without_seconds[1]
    assert all(Path(file).is_file() for d in again.done for file in d["files"])


def test_only_what_differs_is_done_anew(tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    for seed in range(4):
        write_photo(source / f"{seed}.png", seed)
    assert run(source, out).made == 4
    notes = []

    def again(**options):
        notes.clear()
        summary = run(source, out, on_note=notes.append, **options)
        return summary.made, summary.before

    assert again() == (0, 4)
    assert notes == []
    assert again(files=KINDS[::-1]) == (0, 4)  # the order in which they are named is no option
    write_photo(source / "1.png", 17)
    (out / "2.labels.png").unlink()
    assert again() == (2, 2)
    assert notes == ["2 done before; 1 done anew, as the source has changed; 1 done anew, as results are gone"]
    np.testing.assert_array_equal(cv2.imread(str(out / "1.labels.png"), -1), stub().predict(source / "1.png").labels)
    assert again(files=("labels",), fov=60.0) == (4, 0)
    assert notes == ["4 done anew, as made with other files and fov"]
    assert again(files=("labels",), fov=60.0, predictor=stub(flip=False)) == (4, 0)
    assert notes == ["4 done anew, as made with other flip"]
    (source / "3.png").write_bytes(b"junk")
    assert again(files=("labels",), fov=60.0, predictor=stub(flip=False)) == (0, 3)
    write_photo(source / "3.png", 3)
    assert again(files=("labels",), fov=60.0, predictor=stub(flip=False)) == (1, 3)
    assert notes == ["3 done before"]
    assert again(files=("labels",), fov=60.0, predictor=stub(flip=False), resume=False) == (4, 0)
    assert notes == []


@pytest.mark.parametrize("options", [{"resume": False}, {"predictor": stub(flip=False)}])
def test_what_was_begun_anew_is_not_taken_for_done(tmp_path, options):
    source, out = tmp_path / "in", tmp_path / "out"
    for seed in range(3):
        write_photo(source / f"{seed}.png", seed)
    write_video(source / "clip.avi", 3)
    run(source, out)

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(source, out, on_result=interrupt, **options)
    # the interrupted run goes on with what it had left; one with the first options finds nothing that is surely its own
    summary = run(source, out)
    assert (summary.made, summary.before) == ((5, 1) if "resume" in options else (6, 0))
    run(source, tmp_path / "fresh")
    assert results(out) == results(tmp_path / "fresh")


def test_other_frames_of_a_video(tmp_path):
    clip, out = write_video(tmp_path / "clip.avi", 5), tmp_path / "out"
    assert run(clip, out, every=2).made == 3
    summary = run(clip, out, every=4)
    assert (summary.made, summary.before) == (0, 2)
    summary = run(clip, out)
    assert (summary.made, summary.before) == (2, 3)
    assert [d["source"].rpartition("#")[2] for d in summary.done] == list("01234")
    (out / "clip" / "000003.depth.png").unlink()
    assert (run(clip, out).made, run(clip, out).before) == (1, 5)
    run(clip, tmp_path / "fresh")
    assert results(out) == results(tmp_path / "fresh")


def test_names_do_not_depend_on_what_is_done(tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    write_photo(source / "a.png", 0)
    run(source, out)
    write_photo(source / "a.jpg", 1)  # it comes first, and takes the name
    summary = run(source, out)
    assert summary.made == 2
    run(source, tmp_path / "fresh")
    assert results(out) == results(tmp_path / "fresh")


def test_shards_are_the_whole_in_parts(whole, tmp_path):
    source, wanted, places, summary = whole
    parts = [run(source, tmp_path, shard=(i, 3)) for i in (1, 2, 3)]
    sources = [d["source"] for part in parts for d in part.done]
    assert sorted(sources) == sorted(d["source"] for d in summary.done)
    assert len({path for part in parts for path, _ in part.failed}) == 2
    assert all(part.done for part in parts)
    assert results(tmp_path) == results(wanted)
    assert told(tmp_path, places) == told(wanted, places)
    joined = run(source, tmp_path)
    assert (joined.made, joined.before) == (0, 9)
    more = [run(source, tmp_path, shard=(i, 20)) for i in (1, 20)]  # more shards than files
    assert [(m.made, m.before) for m in more] == [(0, 1), (0, 0)]


def test_a_foreign_or_torn_line_is_passed_over(tmp_path):
    photo, out = write_photo(tmp_path / "a.png", 0), tmp_path / "out"
    run(photo, out)
    text = (out / "manifest.jsonl").read_text()
    (out / "manifest.jsonl").write_text('[1]\n{"state": "done"}\nnull\n\0\0\n' + text + text[:-20])
    summary = run(photo, out)
    assert (summary.made, summary.before) == (0, 1)
    (out / "manifest.jsonl").write_bytes(b"\xff\xfe")
    assert run(photo, out).made == 1


def test_temporary_files_of_others_at_work_are_left(tmp_path):
    young, old = tmp_path / ".00000000000a.part", tmp_path / ".00000000000b.part"
    for path in (young, old):
        path.touch()
    (tmp_path / "photo.part").touch()  # not one of ours
    os.utime(old, (0, 0))
    with manifest.sweep(tmp_path, []), manifest.sweep(tmp_path, [tmp_path]) as names:
        assert young.exists()
        assert not old.exists()
        assert names == {tmp_path: {"photo.part"}}
    with manifest.sweep(tmp_path, [tmp_path]):
        assert not young.exists()


def test_the_fingerprint_is_of_all_that_answers():
    first = predict_files.fingerprint(stub())
    assert predict_files.fingerprint(stub()) == first
    assert json.loads(json.dumps(first)) is not None
    others = [stub(flip=False), stub(scales=(1.0, 2.0)), stub(window="32x32"), stub(crf=True), stub(precision="bf16")]
    others += [Predictor(Stub(), META | {"focal": 27.0}, device="cpu"), stub(guide=stub()), stub(overlap=0.2)]
    nudged = stub()
    nudged.network.mix.bias.data[3] += 1e-6
    digests = {manifest.digest(predict_files.fingerprint(p)) for p in [*others, nudged, stub()]}
    assert len(digests) == len(others) + 2


def test_predictions_are_handed_on_before_they_are_saved(whole, tmp_path):
    heard = []

    def listen(label, prediction):
        assert not list((tmp_path / "out").glob(f"{prediction.name}*.png"))
        heard.append((label, prediction.labels))

    photos = [whole[0] / "a.png", whole[0] / "b.png", whole[0] / "cut.png"]
    run(photos, tmp_path / "out", on_prediction=listen)
    assert [label for label, _ in heard] == [str(p) for p in photos[:2]]
    np.testing.assert_array_equal(heard[0][1], stub().predict(photos[0]).labels)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"shard": (0, 2)}, "shard 0/2"),
        ({"shard": (3, 2)}, "shard 3/2"),
        ({"workers": 0}, "at least 1"),
        ({"address": "auto"}, "engine ray"),
        ({"on_prediction": print, "workers": 2}, "one process"),
        ({"on_prediction": print, "engine": "ray"}, "one process"),
        ({"files": ("label",)}, "'label'"),
    ],
)
def test_options_that_do_not_go_together(tmp_path, options, sentence):
    photo = write_photo(tmp_path / "a.png", 0)
    with pytest.raises(UserError, match=sentence):
        run(photo, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_manifest_that_cannot_be_written(tmp_path):
    photo = write_photo(tmp_path / "a.png", 0)
    (tmp_path / "out" / "manifest.jsonl").mkdir(parents=True)
    with pytest.raises(UserError, match=r"cannot write .*manifest\.jsonl"):
        run(photo, tmp_path / "out")


# --- the index --------------------------------------------------------------------------------------------------------


def test_the_index_has_a_row_for_each_picture(whole, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    source, _, _, summary = whole
    run(source, tmp_path, shard=(1, 2), index=True)
    run(source, tmp_path, shard=(2, 2), index=True)
    parts = [row for part in (1, 2) for row in parquet.read_table(tmp_path / f"index-{part}-of-2.parquet").to_pylist()]
    run(source, tmp_path, index=True)
    rows = parquet.read_table(tmp_path / "index.parquet").to_pylist()
    assert [p.name for p in tmp_path.glob("index*")] == ["index.parquet"]
    assert sorted(parts, key=lambda r: r["source"]) == sorted(rows, key=lambda r: r["source"])
    good = {row["source"]: row for row in rows if row["error"] is None}
    assert [row["source"] for row in rows if row["error"] is None] == [d["source"] for d in summary.done]
    assert {row["source"]: row["error"] for row in rows if row["error"]} == dict(summary.failed)
    for d in summary.done:
        row = good[d["source"]]
        assert [row[k] for k in ("name", "width", "height", "space")] == [
            d[k] for k in ("name", "width", "height", "space")
        ]
        assert dict(row["classes"]) == d["classes"]
        assert [row[f"depth_{k}"] for k in ("min", "median", "max")] == list(d["depth"].values())
        assert row["camera"] == d["camera"]["source"]
        assert [row[k] for k in ("fx", "fy", "cx", "cy", "fov")] == list(d["camera"].values())[1:]
        assert all((tmp_path / file).is_file() for file in row["files"])
        assert row["frame"] == (int(d["source"].rpartition("#")[2]) if "#" in d["source"] else None)


def test_an_index_is_written_in_pieces(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    lines = [{"source": f"{i}", "classes": None, "depth": None, "camera": None, "error": None} for i in range(10)]
    manifest.write_index(tmp_path / "index.parquet", lines, rows=3)
    assert parquet.read_table(tmp_path / "index.parquet")["source"].to_pylist() == [f"{i}" for i in range(10)]
    manifest.write_index(tmp_path / "index.parquet", [])
    assert parquet.read_table(tmp_path / "index.parquet").num_rows == 0


def test_an_index_needs_pyarrow(tmp_path, monkeypatch):
    photo = write_photo(tmp_path / "a.png", 0)
    monkeypatch.setattr(manifest.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pyarrow: pip install 'enfilade\[cluster\]'"):
        run(photo, tmp_path / "out", index=True)
    assert not (tmp_path / "out").exists()
