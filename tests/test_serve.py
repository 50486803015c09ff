"""The web service: formats, limits, the queue, batching, metrics, the page. The networks are stand-ins."""

import asyncio
import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import PIL.Image
import pytest

pytest.importorskip("fastapi")
from fastapi.testclient import TestClient

from enfilade import labels, viz
from enfilade.camera import Camera
from enfilade.complete import Room
from enfilade.errors import UserError
from enfilade.ops.voxels import VoxelGrid
from enfilade.serve.app import STATIC, create_app, negotiate
from enfilade.serve.limits import Settings
from enfilade.serve.worker import Full, Job, Worker
from enfilade.types import LabelVolume, Prediction

BED, FLOOR = (labels.get("nyu40").names.index(name) for name in ("bed", "floor"))


def photo(width=12, height=8, kind="PNG", seed=0) -> bytes:
    data = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    PIL.Image.fromarray(pixels).save(data, kind)
    return data.getvalue()


def depth_png(millimetres) -> bytes:
    data = io.BytesIO()
    PIL.Image.fromarray(np.asarray(millimetres, np.uint16)).save(data, "PNG")
    return data.getvalue()


class Stub:
    """The left half is bed, the right half floor; depth rises by column from one metre. Records what it was asked."""

    meta = {"space": "nyu40"}  # noqa: RUF012

    def __init__(self):
        self.calls = []
        self.asked = []
        self.begun = threading.Event()
        self.gate = threading.Event()
        self.gate.set()
        self.error = None

    def batch(self, sources, *, camera=None, fov=None, given=None, batch_size=8):
        self.calls.append(len(sources))
        self.asked.append((camera, fov, given))
        self.begun.set()
        assert self.gate.wait(10)
        if self.error is not None:
            raise self.error
        found = []
        for image in sources:
            height, width = image.rgb.shape[:2]
            chosen = np.full((height, width), FLOOR, np.uint8)
            chosen[:, : width // 2] = BED
            depth = np.broadcast_to(1 + np.arange(width, dtype=np.float32) / 100, (height, width)).copy()
            own = camera or Camera.from_fov(width, height, 60.0)
            source = "assumed" if camera is None and fov is None else "given"
            found.append(
                Prediction(image.rgb, chosen, depth, np.ones_like(depth), camera=own, camera_source=source, name="x")
            )
        return found

    def predict(self, image, *, camera=None, fov=None):
        return self.batch([image], camera=camera, fov=fov)[0]


class Rooms:
    """A room with a floor."""

    def __init__(self):
        self.asked = []

    def complete(self, source, depth=None, camera=None, *, fov=None, height=None, estimator=None):
        self.asked.append((depth, camera, fov, height, estimator))
        h, w = source.rgb.shape[:2]
        grid = VoxelGrid(np.zeros(3), np.eye(4), 0.02, (8, 8, 8))
        volume = np.zeros((2, 2, 2), np.uint8)
        volume[:, 0] = labels.get("ssc12").names.index("floor")
        pinhole = Camera.from_fov(w, h, 60.0, np.eye(4))
        seen = volume > 0
        return Room(
            volume=LabelVolume(volume, np.zeros(3), 0.08),
            observed=seen,
            confidence=np.ones(volume.shape, np.float32),
            image=source.rgb,
            depth=np.ones((h, w), np.float32),
            depth_source="given",
            camera=pinhole,
            grid=grid,
            camera_source="given",
            name=source.name,
        )


@contextmanager
def service(stub=None, rooms=None, **settings):
    settings = {"threads": 1, "patience": 0.0, "timeout": 10.0} | settings
    predictors = {"gad-nyuv2": stub or Stub(), "other": Stub()}
    app = create_app(Settings(**settings), predictors=predictors, completer=rooms)
    with TestClient(app, raise_server_exceptions=False) as client:
        client.app = app
        yield client


@pytest.fixture(scope="module")
def client():
    with service(rooms=Rooms()) as client:
        yield client


def post(client, path="/predict", accept="application/json", image=None, depth=None, name="photo.png", **fields):
    files = {"image": (name, photo() if image is None else image)}
    if depth is not None:
        files["depth"] = ("depth.png", depth)
    return client.post(path, files=files, data=fields, headers={"Accept": accept})


def sentence(answer, status) -> str:
    """The error's one sentence; nothing else may be in the answer."""
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["error"]
    assert "Traceback" not in answer.text
    assert "\n" not in answer.json()["error"]
    return answer.json()["error"]


def until(condition):
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError("it never came to that")


# --- formats ----------------------------------------------------------------------------------------------------------


def test_json_tells_shares_depth_and_camera_and_holds_the_maps(client):
    told = post(client).json()
    assert told["classes"] == {"bed": 0.5, "floor": 0.5}
    assert told["depth"]["min"] == pytest.approx(1.0)
    assert told["depth"]["max"] == pytest.approx(1.11)
    assert 1.0 <= told["depth"]["near"] < told["depth"]["far"] < 1.1101
    assert (told["model"], told["width"], told["height"]) == ("gad-nyuv2", 12, 8)
    assert told["camera"]["source"] == "assumed"
    assert told["seconds"] >= 0
    maps = {k: np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(v)))) for k, v in told["images"].items()}
    assert (maps["labels"][:, :6] == BED).all()
    assert (maps["labels"][:, 6:] == FLOOR).all()
    np.testing.assert_array_equal(maps["depth"][3], 1000 + 10 * np.arange(12))


def test_a_picture_arrays_and_points(client):
    picture = post(client, accept="image/png")
    assert picture.headers["content-type"] == "image/png"
    assert PIL.Image.open(io.BytesIO(picture.content)).width > 300
    for accept in ("application/x-npz", "application/octet-stream"):
        answer = post(client, accept=accept)
        assert answer.headers["content-type"] == accept
        with np.load(io.BytesIO(answer.content)) as arrays:
            assert arrays["depth"].shape == (8, 12)
            assert arrays["depth"][0, 5] == pytest.approx(1.05)
            assert str(arrays["names"][arrays["labels"][0, 0]]) == "bed"
    points = post(client, accept="application/x-ply").content
    head, _, body = points.partition(b"end_header\n")
    count = int(re.search(rb"element vertex (\d+)", head)[1])
    assert 0 < count <= 96
    assert len(body) == count * (3 * 4 + 3)


@pytest.mark.parametrize(
    ("accept", "want"),
    [
        ("", "a/one"),
        ("*/*", "a/one"),
        ("b/two", "b/two"),
        ("a/*;q=0.5, b/two", "b/two"),
        ("a/one;q=0.1, */*;q=0.9", "b/two"),
        ("text/html, b/*;q=0.2, a/one;q=0.3", "a/one"),
        ("a/one;q=0, */*", "b/two"),
    ],
)
def test_the_format_that_the_client_likes_best(accept, want):
    assert negotiate(accept, ["a/one", "b/two"]) == want


def test_no_format_that_the_client_takes(client):
    assert "image/png" in sentence(post(client, accept="audio/ogg"), 406)
    assert sentence(post(client, accept="text/html"), 406)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_image_formats(client, kind):
    assert post(client, image=photo(kind=kind)).status_code == 200


def test_a_room_as_facts_arrays_mesh_and_page():
    rooms = Rooms()
    with service(rooms=rooms) as client:
        facts = post(client, "/complete").json()
        assert (facts["observed"], facts["completed"], facts["voxels"]) == (4, 0, [2, 2, 2])
        assert rooms.asked[-1][0] is None
        assert rooms.asked[-1][4] is not None  # else each request would load a model
        depth = np.arange(96).reshape(8, 12)
        depth[0, 1] = 65535
        arrays = post(client, "/complete", "application/x-npz", depth=depth_png(depth), fx=9.5, height=1.5)
        with np.load(io.BytesIO(arrays.content)) as found:
            assert found["labels"].shape == (2, 2, 2)
        metres, camera, _, height, _ = rooms.asked[-1]
        assert metres[0, :3].tolist() == [0, 0, pytest.approx(0.002)]
        assert metres[7, 11] == pytest.approx(0.095)
        assert (camera.fx, camera.fy, camera.cx, camera.cy, height) == (9.5, 9.5, 5.5, 3.5, 1.5)
        page = post(client, "/complete", "text/html,application/xml;q=0.9,*/*;q=0.8", name="<b>&.png")
        assert page.headers["content-type"].startswith("text/html")
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert "<!DOCTYPE html>" in page.text
        assert "<b>&" not in page.text
        assert post(client, "/complete", "application/x-ply").content.startswith(b"ply")


def test_no_completion_model():
    with service() as client:
        assert "--completion" in sentence(post(client, "/complete"), 404)
        assert client.get("/models").json()["completion"] is None


# --- input ------------------------------------------------------------------------------------------------------------


def test_the_camera_reaches_the_network():
    stub = Stub()
    with service(stub) as client:
        post(client, fx=10, cy=4)
        camera, fov, _ = stub.asked[-1]
        assert (camera.fx, camera.fy, camera.cx, camera.cy) == (10, 10, 5.5, 4)
        assert fov is None
        assert post(client, fov=70).json()["camera"]["source"] == "given"
        assert stub.asked[-1][:2] == (None, 70)


@pytest.mark.parametrize(
    ("fields", "want"),
    [
        ({"fy": 10}, "fx"),
        ({"fx": 10, "fov": 60}, "once"),
        ({"fov": 175}, "between 1 and 170"),
        ({"fx": "nan"}, "finite"),
        ({"fx": "inf"}, "finite"),
        ({"fx": 1e6}, "no lens"),
        ({"fx": -5}, "no lens"),
        ({"fx": 10, "cx": 1e9}, "outside"),
        ({"fx": "wide"}, "fx does not fit"),
        ({"model": "gad-nyu2"}, "did you mean 'gad-nyuv2'?"),
        ({"model": "/etc/passwd"}, "no model"),
    ],
)
def test_fields_that_do_not_fit(client, fields, want):
    assert want in sentence(post(client, **fields), 422)


def gif() -> bytes:
    data = io.BytesIO()
    PIL.Image.new("RGB", (4, 4)).save(data, "GIF")
    return data.getvalue()


@pytest.mark.parametrize(
    ("image", "want"),
    [
        (b"", "empty"),
        (b"no image at all", "neither PNG nor JPEG nor WebP"),
        (gif(), "neither PNG nor JPEG nor WebP"),
        (photo(200, 100)[:3000], "damaged"),
        (b"\x89PNG\r\n\x1a\nrubbish", "the image"),
        (b"file:///etc/passwd", "neither"),
    ],
)
def test_bad_images(client, image, want):
    assert want in sentence(post(client, image=image), 422)


def test_a_missing_image(client):
    assert "image is missing" in sentence(client.post("/predict", files={"other": b"x"}), 422)
    assert "image" in sentence(client.post("/predict", files={"image": (None, "/etc/passwd")}), 422)


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("", 415),
        ("application/json", 415),
        ("application/x-www-form-urlencoded", 415),
        ("multipart/mixed; boundary=x", 415),
        ("multipart/form-data; boundary=x; charset=punycode", 415),  # takes minutes for a field of a megabyte
        ("multipart/form-data; boundary=x; charset=utf-8; charset=punycode", 415),
        ("multipart/form-data; boundary=x; charset*=utf-8''punycode", 415),
        ("multipart/form-data", 400),
        ("multipart/form-data; boundary=x; charset=utf-8", 200),
        ('Multipart/Form-Data; Charset="UTF-8"; boundary=x', 200),
    ],
)
def test_bodies_that_are_no_forms(client, kind, status):
    body = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n' + photo() + b"\r\n--x--\r\n"
    answer = client.post("/predict", content=body, headers={"Content-Type": kind})
    assert answer.status_code == status
    if status != 200:
        assert sentence(answer, status)
    assert client.post("/metrics", content=body, headers={"Content-Type": kind}).status_code == 405


def test_a_jpeg_of_endless_scans(client):
    """Each costs a pass over the picture, and 20 bytes."""
    data = io.BytesIO()
    PIL.Image.fromarray(np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3)).save(data, "JPEG", progressive=True)
    jpeg = data.getvalue()
    assert post(client, image=jpeg).status_code == 200
    scan = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    assert post(client, image=jpeg[:-2] + 100 * scan + jpeg[-2:]).status_code == 200
    assert "500 scans" in sentence(post(client, image=jpeg[:-2] + 501 * scan + jpeg[-2:]), 422)


def test_a_long_name_is_not_told_back(client):
    assert len(sentence(post(client, model="x" * 100_000), 422)) < 300


@pytest.mark.parametrize(
    ("depth", "want"),
    [
        (photo(), "16-bit grey PNG"),
        (b"", "16-bit grey PNG"),
        (depth_png(np.ones((4, 4))), "4 x 4"),
        (depth_png(np.zeros((8, 12))), "no depth"),
        (depth_png(np.full((8, 12), 65535)), "no depth"),
        (depth_png(np.random.default_rng(0).integers(1, 9999, (80, 120)))[:500], "damaged"),
    ],
)
def test_bad_depth_maps(client, depth, want):
    assert want in sentence(post(client, "/complete", depth=depth), 422)


def test_a_model_without_hha_takes_no_depth(client):
    assert "takes no depth" in sentence(post(client, depth=depth_png(np.ones((8, 12)))), 422)


def test_depth_becomes_hha_for_a_model_that_takes_it(monkeypatch):
    import enfilade.ops.hha

    asked = []

    def hha(depth, camera):
        asked.append((depth, camera))
        return np.repeat((50 * depth).astype(np.uint8)[..., None], 3, 2)

    monkeypatch.setattr(enfilade.ops.hha, "hha", hha)
    stub = Stub()
    stub.network = type("Network", (), {"uses": ("hha",)})()
    depth = np.random.default_rng(0).integers(1000, 3000, (8, 12))
    with service(stub) as client:
        assert "takes depth" in sentence(post(client), 422)
        assert "camera" in sentence(post(client, depth=depth_png(depth)), 422)
        assert post(client, depth=depth_png(depth), fx=11).status_code == 200
    (metres, camera), *more = asked
    np.testing.assert_allclose(metres, depth / 1000, rtol=1e-6)
    assert (camera, more) == (Camera(11.0, 11.0, 5.5, 3.5, 12, 8), [])
    np.testing.assert_allclose(stub.asked[-1][2][0]["hha"], hha(metres, camera) / 255, atol=1e-6)


def test_the_name_of_the_file_is_never_looked_at(client, tmp_path):
    """Neither read, nor written to, nor told."""
    for name in ("../../etc/passwd", str(tmp_path / "x.png"), "C:\\photo.png", "a\r\nb"):
        answer = post(client, name=name)
        assert answer.status_code == 200
        assert "passwd" not in answer.text
        assert "name" not in answer.json()
    assert 'filename="photo.png"' in post(client, accept="image/png", name="../x").headers["content-disposition"]
    assert not list(tmp_path.iterdir())


def test_too_many_pixels():
    stub = Stub()
    with service(stub, pixels=90) as client:
        assert "12 x 8 pixels, too large" in sentence(post(client), 422)
        assert post(client, image=photo(10, 9)).status_code == 200
    assert stub.calls == [1]


def test_too_many_bytes_are_counted_as_they_come():
    """With Content-Length the body is not read; without, not beyond the limit."""
    sent = []

    def body():
        yield b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
        for _ in range(1000):
            sent.append(1)
            yield b"\0" * 1000

    with service(bytes=5000) as client:
        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        answer = client.post("/predict", content=body(), headers=headers)
        assert "0.005 MB" in sentence(answer, 413)
        assert answer.headers["connection"] == "close"
        assert "content-length" not in answer.request.headers
        assert "0.005 MB" in sentence(post(client, image=b"\0" * 6000), 413)
        assert post(client).status_code == 200


SCOPE = {
    "type": "http",
    "http_version": "1.1",
    "scheme": "http",
    "server": ("x", 80),
    "method": "POST",
    "path": "/predict",
    "query_string": b"",
    "headers": [(b"content-type", b"multipart/form-data; boundary=x")],
}


def test_the_count_stops_at_the_limit():
    """The application asks for no more of a body than the limit and one piece."""
    asked = []

    async def receive():
        asked.append(1)
        head = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n' if len(asked) == 1 else b""
        return {"type": "http.request", "body": head + b"\0" * 1000, "more_body": True}

    told = []

    async def send(message):
        told.append(message)

    app = create_app(Settings(bytes=5000, threads=1), predictors={"a": Stub()})
    asyncio.run(app(dict(SCOPE), receive, send))
    assert told[0]["status"] == 413
    assert len(asked) == 5


def test_a_body_that_never_comes():
    async def receive():
        await asyncio.sleep(60)

    told = []

    async def send(message):
        told.append(message)

    app = create_app(Settings(timeout=0.05, threads=1), predictors={"a": Stub()})
    asyncio.run(app(dict(SCOPE), receive, send))
    assert told[0]["status"] == 408


def test_too_many_uploads_at_once():
    """The second is refused while the first still arrives, and the place is free again afterwards."""
    told = []

    async def send(message):
        if message["type"] == "http.response.start":
            told.append(message["status"])

    async def never():
        await asyncio.sleep(60)

    async def at_once():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def both(app):
        first = asyncio.create_task(app(dict(SCOPE), never, send))
        await asyncio.sleep(0.05)
        await app(dict(SCOPE), at_once, send)
        await first
        await app(dict(SCOPE), at_once, send)

    settings = Settings(timeout=0.5, uploads=1, threads=1)
    asyncio.run(both(create_app(settings, predictors={"a": Stub()})))
    assert told[:2] == [503, 408]
    assert told[2] in (400, 422)  # read, and found to be empty


# --- queue ------------------------------------------------------------------------------------------------------------


def test_a_full_queue_turns_away():
    stub = Stub()
    stub.gate.clear()
    with service(stub, waiting=2, batch=1) as client, ThreadPoolExecutor(3) as many:
        worker = client.app.state.worker
        answers = [many.submit(post, client)]
        assert stub.begun.wait(10)
        answers += [many.submit(post, client) for _ in range(2)]
        until(lambda: len(worker.queue) == 2)
        assert client.get("/health").json()["waiting"] == 2
        assert "enfilade_queue_length 2" in client.get("/metrics").text
        refused = post(client)
        assert "2 requests wait" in sentence(refused, 503)
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        stub.gate.set()
        assert [answer.result().status_code for answer in answers] == [200] * 3
        assert 'enfilade_rejected_total{reason="queue"} 1' in client.get("/metrics").text
        assert post(client).status_code == 200


def test_images_of_one_kind_go_together():
    """While one runs, four of one size and one of another come: batches of three (the limit), one, one."""
    stub = Stub()
    stub.gate.clear()
    with service(stub, batch=3) as client, ThreadPoolExecutor(6) as many:
        worker = client.app.state.worker
        answers = [many.submit(post, client)]
        assert stub.begun.wait(10)
        for k, size in enumerate([(12, 8), (10, 9), (12, 8), (12, 8), (12, 8)]):
            answers.append(many.submit(post, client, image=photo(*size, seed=k)))
            until(lambda k=k: len(worker.queue) == k + 1)
        stub.gate.set()
        told = [answer.result().json() for answer in answers]
        assert [(t["width"], t["height"]) for t in told] == [(12, 8), (12, 8), (10, 9), (12, 8), (12, 8), (12, 8)]
        assert stub.calls == [1, 3, 1, 1]
        until(lambda: "enfilade_network_images_sum 6" in client.get("/metrics").text)
        assert "enfilade_network_images_count 4" in client.get("/metrics").text


def test_other_cameras_and_models_do_not_share_a_batch():
    stub = Stub()
    stub.gate.clear()
    with service(stub, batch=8) as client, ThreadPoolExecutor(5) as many:
        worker = client.app.state.worker
        answers = [many.submit(post, client)]
        assert stub.begun.wait(10)
        for k, fields in enumerate([{"fx": 10}, {"fx": 11}, {"fov": 60}, {"model": "other"}]):
            answers.append(many.submit(post, client, **fields))
            until(lambda k=k: len(worker.queue) == k + 1)
        stub.gate.set()
        told = [answer.result().json() for answer in answers]
    assert stub.calls == [1, 1, 1, 1]
    assert told[1]["camera"]["fx"] == 10
    assert told[2]["camera"]["fx"] == 11
    assert told[4]["model"] == "other"


def test_the_worker_waits_for_company_for_as_long_as_it_is_told():
    calls = []
    worker = Worker(waiting=8, batch=2, patience=5.0)
    worker.start()

    def call(items):
        calls.append(items)
        return items

    first = worker.place().put(Job(call, 1, "a"))
    second = worker.place().put(Job(call, 2, "a"))  # the batch is full: nobody waits five seconds
    assert (first.result(3), second.result(3)) == (1, 2)
    assert calls == [[1, 2]]
    worker.stop()


def test_one_bad_item_leaves_its_neighbours_alone():
    worker = Worker(waiting=8, batch=3, patience=0.0)

    def call(items):
        if "bad" in items:
            raise UserError("this one is bad")
        return items

    futures = [worker.place().put(Job(call, item, "a")) for item in ("x", "bad", "y")]
    worker.start()
    assert futures[0].result(5) == "x"
    assert futures[2].result(5) == "y"
    with pytest.raises(UserError, match="this one is bad"):
        futures[1].result(5)
    worker.stop()


def test_a_place_is_given_back_and_cancelled_jobs_are_not_run():
    ran = []
    worker = Worker(waiting=1, batch=1, patience=0.0)
    with worker.place(), pytest.raises(Full):
        worker.place()
    gone = worker.place().put(Job(lambda items: ran.append(items) or items, "gone"))
    gone.cancel()
    worker.start()
    until(lambda: not worker.queue)
    assert worker.place().put(Job(lambda items: items, "next")).result(5) == "next"
    assert not ran
    worker.stop()


def test_stopping_finishes_what_runs_and_refuses_the_rest():
    gate, begun = threading.Event(), threading.Event()

    def call(items):
        begun.set()
        assert gate.wait(10)
        return items

    worker = Worker(waiting=4, batch=1, patience=0.0)
    worker.start()
    running = worker.place().put(Job(call, "runs"))
    assert begun.wait(10)
    waiting, late = worker.place().put(Job(call, "waits")), worker.place()
    stopping = threading.Thread(target=worker.stop)
    stopping.start()
    until(lambda: worker.stopping)
    with pytest.raises(Full, match="stopping"):
        worker.place()
    with pytest.raises(Full, match="stopping"):
        late.put(Job(call, "late"))
    with pytest.raises(Full, match="stopping"):
        waiting.result(5)
    gate.set()
    stopping.join(10)
    assert running.result(0) == "runs"
    assert not worker.alive


def test_an_answer_that_takes_too_long():
    stub = Stub()
    stub.gate.clear()
    with service(stub, timeout=0.2) as client:
        assert "0.2 seconds" in sentence(post(client), 504)
        sentence(post(client), 504)  # waited behind the first, and is never run
        stub.gate.set()
        until(lambda: not client.app.state.worker.queue)
        assert post(client, image=photo(9, 9)).status_code == 200
        assert "enfilade_timeouts_total 2" in client.get("/metrics").text
    assert stub.calls == [1, 1]


# --- faults, metrics, facts -------------------------------------------------------------------------------------------


def test_faults_tell_nothing_of_the_inside():
    stub = Stub()
    with service(stub) as client:
        stub.error = RuntimeError("secret of line 42 in /srv/secret.py")
        told = sentence(post(client), 500)
        assert "secret" not in told
        stub.error = UserError("the network answers NaN")
        assert sentence(post(client), 422) == "the network answers NaN"
        stub.error = None
        assert post(client).status_code == 200  # the worker lives on


def test_wrong_addresses_and_methods(client):
    sentence(client.get("/nothing"), 404)
    sentence(client.get("/predict"), 405)
    for path in ("/docs", "/redoc", "/static/app.js", "/..%2f..%2fpyproject.toml"):
        sentence(client.get(path), 404)


def test_metrics_count():
    with service() as client:
        for _ in range(3):
            post(client)
        post(client, model="nothing")
        client.get("/a")
        client.get("/b")
        answer = client.get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    lines = dict(line.rsplit(" ", 1) for line in answer.text.splitlines() if not line.startswith("#"))
    assert lines['enfilade_requests_total{route="/predict",status="200"}'] == "3"
    assert lines['enfilade_requests_total{route="/predict",status="422"}'] == "1"
    assert lines['enfilade_requests_total{route="other",status="404"}'] == "2"
    assert lines['enfilade_request_seconds_count{route="/predict"}'] == "4"
    assert float(lines['enfilade_request_seconds_sum{route="/predict"}']) > 0
    assert lines['enfilade_rejected_total{reason="input"}'] == "1"
    assert lines["enfilade_queue_length"] == "0"
    for name in {re.match(r"[a-z_]+?(?=_sum|_count|\{|$)", line)[0] for line in lines}:
        assert f"# TYPE {name} " in answer.text


def test_health_and_models(client):
    assert client.get("/health").json()["status"] == "ok"
    told = client.get("/models").json()
    assert [model["name"] for model in told["models"]] == ["gad-nyuv2", "other"]
    assert told["models"][0]["classes"][BED]["name"] == "bed"
    assert told["completion"] == "completion"
    ramp = np.frombuffer(bytes.fromhex(told["ramp"]), np.uint8).reshape(256, 3)
    ends = viz.colour_depth(np.array([[2.0, 5.0]], np.float32), 2.0, 5.0)[0]
    np.testing.assert_array_equal(ramp[[0, -1]], ends)


def test_openapi_names_the_routes_and_fields(client):
    told = client.get("/openapi.json").json()
    assert {"/predict", "/complete", "/health", "/models", "/metrics"} <= set(told["paths"])
    assert set(told["paths"]["/predict"]["post"]["responses"]["200"]["content"]) >= {"image/png", "application/x-ply"}
    assert "fov" in json.dumps(told["components"])
    for path in ("/predict", "/complete"):
        documented = told["paths"][path]["post"]["responses"]
        assert {"400", "406", "408", "413", "415", "422", "500", "503", "504"} <= set(documented)
    assert "text/plain" in told["paths"]["/metrics"]["get"]["responses"]["200"]["content"]


def test_settings_that_make_no_sense():
    for settings, want in (
        ({"waiting": 0}, "waiting"),
        ({"models": ()}, "at least one model"),
        ({"patience": 9.0}, "patience"),
        ({"pixels": 10**9}, "megapixels"),
    ):
        with pytest.raises(UserError, match=want):
            Settings(**settings)


# --- page -------------------------------------------------------------------------------------------------------------


def test_the_page_asks_nobody_else(client):
    page, code = client.get("/"), client.get("/app.js")
    assert page.headers["content-type"].startswith("text/html")
    assert code.headers["content-type"].startswith("text/javascript")
    assert page.headers["x-content-type-options"] == "nosniff"
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for text in (page.text, code.text):
        assert not re.findall(r"https?://|[\"'(]//|@import|url\(", text)
    used = set(re.findall(r"\$\(\"(\w+)\"\)", code.text)) | {"photo", "labels", "depth"}
    assert used <= set(re.findall(r'id="(\w+)"', page.text))
    for control in re.findall(r"<(?:select|input(?![^>]*hidden))[^>]*>", page.text):
        name = re.search(r'id="(\w+)"', control)[1]
        assert f'for="{name}"' in page.text


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_page_reads_png_exactly(tmp_path):
    """All five row filters, at 8 and 16 bits."""
    import zlib

    rng = np.random.default_rng(3)
    code = (STATIC / "app.js").read_text()
    function = code[code.index("async function map") : code.index("function paint")]

    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    def encode(values):
        """PNG by the standard, row y with filter y % 5."""
        size = values.itemsize
        rows = values.astype(values.dtype.newbyteorder(">")).view(np.uint8).reshape(len(values), -1).astype(int)
        out = b""
        for y, row in enumerate(rows):
            up = rows[y - 1] if y else np.zeros_like(row)
            left, corner = (np.concatenate([np.zeros(size, int), r[:-size]]) for r in (row, up))
            estimate = left + up - corner
            away = np.stack([abs(estimate - left), abs(estimate - up), abs(estimate - corner)])
            paeth = np.choose(away.argmin(0), [left, up, corner])
            guess = [np.zeros_like(row), left, up, (left + up) // 2, paeth][y % 5]
            out += bytes([y % 5]) + ((row - guess) % 256).astype(np.uint8).tobytes()
        height, width = values.shape
        head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8 * size, 0, 0, 0, 0])
        packed = zlib.compress(out)
        parts = chunk(b"IDAT", packed[:20]) + chunk(b"IDAT", packed[20:])
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + parts + chunk(b"IEND", b"")

    for dtype, most in ((np.uint8, 256), (np.uint16, 65536)):
        values = rng.integers(0, most, (11, 7)).astype(dtype)
        data = encode(values)
        np.testing.assert_array_equal(np.asarray(PIL.Image.open(io.BytesIO(data))), values)  # the reference itself
        script = f"{function}\nmap('{base64.b64encode(data).decode()}').then(v => console.log(JSON.stringify([...v])))"
        done = subprocess.run(["node", "-e", script], capture_output=True, text=True, check=True)
        np.testing.assert_array_equal(json.loads(done.stdout), values.reshape(-1))


# --- the verb ---------------------------------------------------------------------------------------------------------


def test_the_verb_imports_nothing_heavy():
    code = "import sys, enfilade.verbs_serve; print(sorted({'fastapi', 'uvicorn', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_without_fastapi_the_verb_says_what_to_install(monkeypatch):
    from enfilade import verbs_serve

    monkeypatch.setattr(verbs_serve, "NEEDED", ("no_such_module",))
    with pytest.raises(UserError, match=r"^serve needs no-such-module: pip install 'enfilade\[serve\]'$"):
        verbs_serve.Serve().run()


def test_the_verb_hands_its_options_on(monkeypatch):
    import uvicorn

    from enfilade.serve import app
    from enfilade.verbs_serve import Serve

    found = {}
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setattr(app, "create_app", lambda settings: found.update(settings=settings))
    monkeypatch.setattr(uvicorn, "run", lambda app, **options: found.update(options))
    verb = Serve(port=0, models=("a", "b"), completion="none", megabytes=3.0, megapixels=2.0, patience=7.0)
    assert verb.run() == 0
    settings = found["settings"]
    assert (settings.models, settings.completion, settings.bytes, settings.pixels) == (("a", "b"), None, 3e6, 2e6)
    assert settings.patience == pytest.approx(0.007)
    assert settings.crf is None
    assert Serve(port=0, no_crf=True).run() == 0
    assert found["settings"].crf is False
    assert (found["host"], found["port"]) == ("127.0.0.1", 0)
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    with pytest.raises(UserError, match="--port"):
        Serve(port=70000).run()
