"""The room as a mesh and as a page: geometry in closed form, files parsed back, a real browser where there is one."""

import base64
import io
import json
import re
import shutil
import subprocess
import zlib
from html.parser import HTMLParser

import cv2
import numpy as np
import pytest
from PIL import Image

from enfilade import labels as label_spaces
from enfilade.camera import Camera
from enfilade.data.rooms import room
from enfilade.errors import UserError
from enfilade.ops.voxels import downsample_labels
from enfilade.room_page import STATIC, room_mesh, room_page, write_mesh_ply, write_room_page
from enfilade.types import LabelVolume

SSC = label_spaces.get("ssc12")
ORIGIN = np.array([-1.0, 0.5, -0.05])
POSE = np.array([[1.0, 0, 0, 0.1], [0, 0, 1, 0.2], [0, -1, 0, 1.3], [0, 0, 0, 1]])
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def volume(shape, voxels, size=0.5):
    labels = np.zeros(shape, np.uint8)
    for place, label in voxels.items():
        labels[place] = label
    return LabelVolume(labels, ORIGIN, size)


def scattered(seed=0, shape=(9, 6, 7)):
    """Voxels of three classes, empty ones and unknown ones, at the borders too."""
    labels = np.random.default_rng(seed).choice(
        np.array([0, 255, 2, 3, 11], np.uint8), shape, p=[0.3, 0.1, 0.3, 0.2, 0.1]
    )
    return LabelVolume(labels, ORIGIN, 0.08)


def areas_and_normals(vertices, faces):
    a, b, c = (vertices[faces[:, n]].astype(np.float64) for n in range(3))
    cross = np.cross(b - a, c - a)
    areas = np.linalg.norm(cross, axis=1) / 2
    return areas, cross / (2 * areas[:, None])


def enclosed(vertices, faces):
    """The volume inside, by the divergence theorem: positive only where triangles face outwards."""
    a, b, c = (vertices[faces[:, n]].astype(np.float64) for n in range(3))
    return np.einsum("ij,ij->", a, np.cross(b, c)) / 6


# --------------------------------------------------------------------------------------------------------------- mesh


def test_one_voxel_is_a_closed_cube_where_the_conventions_say():
    vertices, faces, colours = room_mesh(volume((3, 4, 5), {(1, 2, 3): 5}))
    assert faces.shape == (12, 3)
    assert len(vertices) == len(colours) == 24
    # Array axes x, y (up), z (away) are the world's X, Z, Y.
    low = ORIGIN + 0.5 * np.array([1, 3, 2])
    np.testing.assert_allclose(vertices.min(0), low, rtol=1e-6)
    np.testing.assert_allclose(vertices.max(0), low + 0.5, rtol=1e-6)
    assert (colours == SSC.colours[5]).all()
    areas, normals = areas_and_normals(vertices, faces)
    np.testing.assert_allclose(areas, 0.125, rtol=1e-5)  # float32
    outwards = vertices[faces].mean(1) - (low + 0.25)
    assert (np.einsum("ij,ij->i", normals, outwards) > 0).all()
    assert len(np.unique(normals.round(6), axis=0)) == 6


def test_neighbours_hide_what_lies_between_them():
    """Two voxels of a class become one box of six rectangles; of two classes they share no face either."""
    same = room_mesh(volume((4, 4, 4), {(1, 1, 1): 4, (1, 1, 2): 4}))
    assert len(same[1]) == 12
    other = room_mesh(volume((4, 4, 4), {(1, 1, 1): 4, (1, 1, 2): 6}))
    assert len(other[1]) == 20
    for vertices, faces, _ in (same, other):
        np.testing.assert_allclose(areas_and_normals(vertices, faces)[0].sum(), 10 * 0.25, rtol=1e-5)
        np.testing.assert_allclose(enclosed(vertices, faces), 2 * 0.125, rtol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_surface_and_volume_are_those_of_the_voxels(seed):
    """Of each class and each side, against faces counted one by one."""
    scene = scattered(seed)
    vertices, faces, colours = room_mesh(scene)
    areas, normals = areas_and_normals(vertices, faces)
    solid = (scene.labels > 0) & (scene.labels < 255)
    padded = np.pad(solid, 1)
    inner = tuple(slice(1, -1) for _ in range(3))
    for label in (2, 3, 11):
        own = (colours[faces] == SSC.colours[label]).all((1, 2))
        for axis, world_axis in ((0, 0), (1, 2), (2, 1)):
            for step in (-1, 1):
                beyond = np.roll(padded, -step, axis)[inner]
                expected = ((scene.labels == label) & ~beyond).sum() * scene.size**2
                facing = own & (normals[:, world_axis] * step > 0.5)
                np.testing.assert_allclose(areas[facing].sum(), expected, rtol=1e-4)
    np.testing.assert_allclose(enclosed(vertices, faces), solid.sum() * scene.size**3, rtol=1e-4)
    assert len(faces) < 2 * sum(  # some faces were merged
        ((np.roll(padded, step, axis)[inner] == 0) & solid).sum() for axis in range(3) for step in (-1, 1)
    )


def test_a_flat_floor_is_one_box():
    labels = np.zeros((20, 3, 30), np.uint8)
    labels[:, 0] = 2
    assert len(room_mesh(LabelVolume(labels, ORIGIN, 0.08))[1]) == 12


def test_a_room_without_labels_has_an_empty_mesh():
    labels = np.full((3, 3, 3), 255, np.uint8)
    vertices, faces, colours = room_mesh(LabelVolume(labels, ORIGIN, 0.08))
    assert vertices.shape == (0, 3) == faces.shape == colours.shape


def test_mesh_ply_parses_back(tmp_path):
    vertices, faces, colours = room_mesh(scattered())
    write_mesh_ply(tmp_path / "room.ply", vertices, faces, colours)
    header, body = (tmp_path / "room.ply").read_bytes().split(b"end_header\n")
    lines = header.decode().splitlines()
    assert lines[:2] == ["ply", "format binary_little_endian 1.0"]
    counts = {line.split()[1]: int(line.split()[2]) for line in lines if line.startswith("element")}
    assert counts == {"vertex": len(vertices), "face": len(faces)}
    kinds = {"float": "<f4", "uchar": "u1"}
    columns = [line.split() for line in lines if line.startswith("property") and "list" not in line]
    point = np.dtype([(name, kinds[kind]) for _, kind, name in columns])
    assert "property list uchar int vertex_indices" in lines
    points = np.frombuffer(body, point, counts["vertex"])
    triangles = np.frombuffer(body, [("n", "u1"), ("v", "<i4", 3)], counts["face"], len(vertices) * point.itemsize)
    assert len(body) == points.nbytes + triangles.nbytes
    np.testing.assert_array_equal(np.stack([points[c] for c in "xyz"], -1), vertices)
    np.testing.assert_array_equal(np.stack([points[c] for c in ("red", "green", "blue")], -1), colours)
    assert (triangles["n"] == 3).all()
    np.testing.assert_array_equal(triangles["v"], faces)


def test_wrong_input_is_told_in_a_sentence(tmp_path):
    good = scattered()
    image = np.zeros((6, 8, 3), np.float32)
    with pytest.raises(UserError, match=r"the volume holds label 12, ssc12 has 0\.\.11 and 255 for unknown"):
        room_mesh(volume((2, 2, 2), {(0, 0, 0): 12}))
    with pytest.raises(UserError, match="label space 'nyu40' has no label for an empty voxel"):
        room_page(good, space="nyu40")
    with pytest.raises(UserError, match="the camera has no pose, or one with NaN"):
        room_page(good, camera=Camera.from_fov(8, 6))
    with pytest.raises(UserError, match=r"observed has .* voxels, the volume .*: they are of one grid"):
        room_page(good, observed=np.zeros((1, 2, 3), bool))
    with pytest.raises(UserError, match="labels are laid over the photo: give an image of the same height and width"):
        room_page(good, image=image, labels=np.zeros((5, 8), np.uint8))
    with pytest.raises(UserError, match=r"a mesh is written as \.ply, not as room\.obj"):
        write_mesh_ply(tmp_path / "room.obj", *room_mesh(good))
    with pytest.raises(UserError, match=r"a room's page is written as \.html, not as room\.txt"):
        write_room_page(tmp_path / "room.txt", good)
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------------------- page


class Page(HTMLParser):
    """The scripts of a page by their id, its heading texts, and every attribute that could ask the network."""

    def __init__(self, text):
        super().__init__()
        self.scripts, self.asks, self.tags, self.title, self._in = {}, [], [], "", None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        attributes = dict(attrs)
        self.asks += [attributes[name] for name in ("src", "href", "srcset", "action") if name in attributes]
        if tag in ("script", "title"):
            self._in = attributes.get("id", f"script{len(self.scripts)}") if tag == "script" else tag

    def handle_endtag(self, tag):
        if tag in ("script", "title"):
            self._in = None

    def handle_data(self, data):
        if self._in == "title":
            self.title += data
        elif self._in:
            self.scripts[self._in] = self.scripts.get(self._in, "") + data


def data_of(text):
    return json.loads(Page(text).scripts["room"])


def picture_of(url, kind):
    head, data = url.split(",")
    assert head == f"data:image/{kind};base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))


def test_the_voxels_in_the_page_are_those_of_the_volume():
    scene = scattered()
    observed = np.random.default_rng(1).random(scene.labels.shape) < 0.4
    found = data_of(room_page(scene, observed=observed))
    cells = np.frombuffer(zlib.decompress(base64.b64decode(found["voxels"])), np.uint8).reshape(found["shape"])
    np.testing.assert_array_equal(np.where(cells & 127 == 127, 255, cells & 127), scene.labels)
    np.testing.assert_array_equal(cells >> 7, observed)
    assert found["observed"]
    assert found["origin"] == ORIGIN.tolist()
    assert found["size"] == scene.size
    assert [c["name"] for c in found["classes"]] == list(SSC.names)
    assert [c["colour"] for c in found["classes"]] == SSC.colours.tolist()
    assert [SSC.names[label] for label in found["hidden"]] == ["ceiling"]
    plain = data_of(room_page(scene))
    assert not plain["observed"]
    assert (np.frombuffer(zlib.decompress(base64.b64decode(plain["voxels"])), np.uint8) < 128).all()


def test_photo_labels_camera_and_facts_are_in_the_page():
    v, u = np.mgrid[:600, :800]
    image = np.stack([u / 800, v / 600, 0.5 + 0 * u], -1).astype(np.float32)
    labels = np.where(u < 400, 2, 255).astype(np.uint8)
    camera = Camera(500.0, 510.0, 399.5, 299.5, 800, 600, POSE)
    facts = {"Network": "a & b < c"}
    found = data_of(room_page(scattered(), image=image, labels=labels, camera=camera, facts=facts, title="Täst"))
    photo, tint = picture_of(found["photo"], "jpeg"), picture_of(found["labels"], "png")
    assert photo.shape == tint.shape == (540, 720, 3)
    expected = cv2.resize(image, (720, 540), interpolation=cv2.INTER_AREA) * 255
    assert np.abs(photo - expected).mean() < 3  # JPEG
    assert (tint[:, :350] == SSC.colours[2]).all()
    assert (tint[:, 370:] == 0).all()
    assert found["camera"].pop("pose") == POSE.tolist()
    assert found["camera"] == {"fx": 500, "fy": 510, "cx": 399.5, "cy": 299.5, "width": 800, "height": 600}
    assert found["facts"] == facts
    assert found["title"] == "Täst"


def test_the_page_asks_the_network_for_nothing():
    text = room_page(scattered(), image=np.zeros((6, 8, 3), np.float32), title="a room")
    page = Page(text)
    assert [ask for ask in page.asks if not ask.startswith("data:")] == []
    assert set(re.findall(r"https?://[^\s\"'`)]+", text)) <= {"http://www.w3.org/1999/xhtml"}  # a name, no address
    code = (STATIC / "room.js").read_text() + (STATIC / "room.html").read_text()
    assert not re.search(r"\bfetch\(|XMLHttpRequest|\bimport\b|url\(|sendBeacon|WebSocket", code)
    assert "Permission is hereby granted" in text  # three.js's licence goes where its code goes
    assert (STATIC / "THREE-LICENSE").is_file()
    assert len((STATIC / "three.bundle.min.js").read_bytes()) < 900_000


@pytest.mark.parametrize(
    "hostile", ["</script><script>alert(1)</script>", "{{three}} {{room}}", '"><img src=x onerror=alert(1)>']
)
def test_a_title_stays_a_title(hostile):
    """Whatever a file is called: same elements, same scripts, and the text comes out as it went in."""
    calm = Page(room_page(scattered(), title="calm", facts={"File": "calm"}))
    text = room_page(scattered(), title=hostile, facts={"File": hostile, hostile: "x"})
    page = Page(text)
    assert page.tags == calm.tags
    assert page.scripts.keys() == calm.scripts.keys()
    assert all(page.scripts[name] == calm.scripts[name] for name in page.scripts if name != "room")
    assert page.title == hostile
    assert data_of(text)["title"] == data_of(text)["facts"]["File"] == hostile


def test_a_page_is_written_as_utf8_even_with_a_broken_file_name(tmp_path):
    write_room_page(tmp_path / "room.html", scattered(), title="Küche \udcff")
    assert "Küche ?" in (tmp_path / "room.html").read_text("utf-8")
    assert [p.name for p in tmp_path.iterdir()] == ["room.html"]


# ------------------------------------------------------------------------------------------------------------ browser


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_draws_the_room(tmp_path):
    """The page counts the faces it draws as numpy does, reports no error, and its picture shows the classes."""
    assert CHROMIUM is not None
    sample = room(11, width=160, height=120, voxels=True, threads=1)
    assert sample.voxels is not None
    labels = downsample_labels(sample.voxels.labels, threads=1)
    scene = LabelVolume(labels, sample.voxels.origin, 0.08)
    write_room_page(tmp_path / "room.html", scene, image=sample.image, camera=sample.camera, title="A room")
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader"]
    command += ["--enable-unsafe-swiftshader", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1000,700"]
    command += ["--enable-logging=stderr", "--virtual-time-budget=8000", "--hide-scrollbars", "--dump-dom"]
    command += [f"--screenshot={tmp_path / 'room.png'}", (tmp_path / "room.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert "CONSOLE" not in done.stderr, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    root = re.search(r"<html[^>]*>", done.stdout)
    assert root, done.stderr[-2000:]
    assert "data-error" not in root[0]
    drawn = np.pad((labels > 1) & (labels < 255), 1)  # without the ceiling, 1
    faces = sum(int((drawn & ~np.roll(drawn, step, axis)).sum()) for axis in range(3) for step in (-1, 1))
    assert f'data-faces="{faces}"' in root[0]
    picture = np.asarray(Image.open(tmp_path / "room.png").convert("RGB"))[:500, :600].reshape(-1, 3)
    hues = picture / np.maximum(picture.max(1, keepdims=True), 1)
    for name in ("wall", "floor", "furniture"):  # shading darkens a colour but keeps its hue
        hue = SSC.colours[SSC.index(name)] / SSC.colours[SSC.index(name)].max()
        assert (np.abs(hues - hue).max(1) < 0.04).mean() > 0.01, name
