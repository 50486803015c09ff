"""One job on several processes: the files are those of one process, and a process that dies costs one picture."""

import multiprocessing
import os
import signal
import socket
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from enfilade import cluster, images, manifest, predict_files
from enfilade.errors import UserError
from test_predict_files import KINDS, folder, results, run, stub, told, write_photo


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with a picture that a process may die of, and the results of one process."""
    source, out = folder(tmp_path_factory.mktemp("in"), frames=2), tmp_path_factory.mktemp("out")
    cv2.imwrite(str(source / "c.png"), np.zeros((30, 40, 3), np.uint8))
    summary = run(source, out)
    return source, out, [i.place for i in predict_files.places(images.find_relative(source))], summary


def check_one_lost(source: Path, out: Path, wanted: Path, places: list[str], summary) -> None:
    """All but the deadly picture are as one process makes them; it is named, and made by the next run."""
    assert {Path(path).name for path, _ in summary.failed} == {"c.png", "cut.png", "y.mp4"}
    (reason,) = (reason for path, reason in summary.failed if path.endswith("c.png"))
    assert reason.startswith(str(source / "c.png"))
    assert "run again" in reason
    lost = {name for name in results(wanted) if name.startswith("c.")}
    assert len(lost) == len(KINDS)
    assert results(out) == {name: data for name, data in results(wanted).items() if name not in lost}
    again = run(source, out)
    assert (again.made, again.before) == (1, summary.made)
    assert results(out) == results(wanted)
    assert told(out, places) == told(wanted, places)


@pytest.mark.skipif(os.name != "posix", reason="kill -9")
def test_a_worker_that_is_killed_costs_its_picture(whole, tmp_path, monkeypatch):
    source, wanted, places, alone = whole
    monkeypatch.setenv("STUB_DEADLY", "1")
    summary = run(source, tmp_path, workers=2)
    monkeypatch.undo()
    assert any("SIGKILL" in reason for _, reason in summary.failed)
    assert [d["source"] for d in summary.done] == [d["source"] for d in alone.done if "c.png" not in d["source"]]
    assert multiprocessing.active_children() == []
    check_one_lost(source, tmp_path, wanted, places, summary)


def test_an_interrupt_ends_the_workers(whole, tmp_path):
    def interrupt(*_):
        assert multiprocessing.active_children()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(whole[0], tmp_path, workers=2, on_result=interrupt)
    assert multiprocessing.active_children() == []
    assert run(whole[0], tmp_path).before >= 1


def test_workers_inherit_few_threads_and_no_interrupt(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("NUMBA_NUM_THREADS", raising=False)
    handler = signal.getsignal(signal.SIGINT)
    with cluster._inherited(3):
        assert (os.environ["OMP_NUM_THREADS"], os.environ["NUMBA_NUM_THREADS"]) == ("3", "3")
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert "NUMBA_NUM_THREADS" not in os.environ
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_portable_predictor_is_a_copy():
    first = stub(guide=stub())
    second = predict_files.portable(first)
    assert predict_files.fingerprint(second) == predict_files.fingerprint(first)
    with torch.no_grad():
        second.network.mix.bias += 1
        second.guide.network.mix.bias += 1
    assert predict_files.fingerprint(first) == predict_files.fingerprint(stub(guide=stub()))


def test_a_fault_costs_its_picture(whole, tmp_path, monkeypatch):
    """What a worker and an actor do with one picture."""
    predictor = stub()
    job = predict_files.Job(tmp_path, ("labels",), None, None, 1, "")
    photo = write_photo(tmp_path / "a.png", 0)
    item = predict_files.Item(photo, "a")
    ((picture, source),) = predict_files.pictures([item], 1)
    assert job.answer(predictor, picture, source)["state"] == "done"
    monkeypatch.setattr(predictor.network, "forward", lambda image: 1 / 0)
    line = job.answer(predictor, picture, source)
    assert line["state"] == "failed"
    assert line["error"].startswith(f"{photo}: a fault")
    assert "ZeroDivisionError" in line["error"]


def test_where_nothing_listens_is_said_at_once():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        for address in (f"127.0.0.1:{port}", f"ray://localhost:{port}"):  # bound, but nobody listens
            with pytest.raises(UserError, match=f"no Ray at {address}: .+; start one, or leave the address out"):
                cluster._knock(address)
        taken.listen()
        cluster._knock(f"127.0.0.1:{port}")
    for word in ("auto", "local"):
        cluster._knock(word)


def test_ray_is_named_where_it_is_missing(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs ray and pyarrow: pip install 'enfilade\[cluster\]'"):
        run(whole[0], tmp_path / "out", engine="ray")
    assert not (tmp_path / "out").exists()


# --- Ray --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def local_ray():
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:  # which the processes inherit that Ray starts
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")
        patch.setenv("STUB_DEADLY", "1")
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        memory = 80 * 2**20
        ray.init("local", num_cpus=1, include_dashboard=False, object_store_memory=memory, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.mark.slow
def test_ray_does_the_same_job(local_ray, whole, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    source, wanted, places, _ = whole
    summary = run(source, tmp_path, engine="ray", workers=1, index=True)
    assert local_ray.is_initialized()  # who started it ends it
    assert [p.name for p in tmp_path.glob("manifest*")] == ["manifest.jsonl"]  # the actors' have been joined
    rows = parquet.read_table(tmp_path / "index.parquet").to_pylist()
    assert {row["source"]: row["error"] for row in rows if row["error"]} == dict(summary.failed)
    (tmp_path / "index.parquet").unlink()
    check_one_lost(source, tmp_path, wanted, places, summary)


@pytest.mark.slow
def test_ray_goes_on_from_what_actors_left(local_ray, whole, tmp_path):
    """A killed run leaves the manifests of its actors: what they say is done is done."""
    source, wanted, _, _ = whole
    run(source / "b.png", tmp_path)
    (tmp_path / "manifest.jsonl").rename(tmp_path / "manifest-ray-00-01.jsonl")
    with manifest.Manifest(tmp_path, "ray-00-02") as log:
        begun = predict_files.Item(source / "z.png", "z")
        log.add(manifest.entry("begun", begun.place, None, manifest.stat(begun.path), ""))
    summary = run([source / "b.png", source / "z.png"], tmp_path, engine="ray", workers=1)
    assert (summary.made, summary.before) == (1, 1)
    assert results(tmp_path) == {k: v for k, v in results(wanted).items() if k.split(".")[0] in ("b", "z")}
