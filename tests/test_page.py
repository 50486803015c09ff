"""The page of `enfilade serve` in a browser: what it shows, what it sends and where, by mouse, keyboard and phone. The
networks are stand-ins, but in the last test."""

import io
import re
import shutil
import threading
import time
from contextlib import contextmanager

import numpy as np
import PIL.Image
import pytest

pytest.importorskip("fastapi")

from enfilade import labels
from enfilade.camera import Camera
from enfilade.complete import Room
from enfilade.ops.voxels import VoxelGrid
from enfilade.serve.app import create_app
from enfilade.serve.limits import Settings
from enfilade.types import LabelVolume, Prediction

httpx = pytest.importorskip("httpx")
uvicorn = pytest.importorskip("uvicorn")
api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
SPACE = labels.get("nyu40")
WIDTH, HEIGHT = 64, 48
PHONE = {"width": 360, "height": 740}


class Stub:
    """Blocks of eight pixels, each of another class than its neighbours. No two neighbours have the same depth, none
    lies half way between two centimetres, and in one corner it is unknown."""

    meta = {"space": "nyu40"}  # noqa: RUF012

    def __init__(self, first=0):
        self.first = first

    def batch(self, sources, *, camera=None, fov=None, given=None, batch_size=8):
        return [self.predict(image, camera=camera, fov=fov) for image in sources]

    def predict(self, image, *, camera=None, fov=None):
        height, width = image.rgb.shape[:2]
        y, x = np.mgrid[:height, :width]
        depth = (1.003 + x / 20 + y / 100).astype(np.float32)
        depth[:4, :4] = 0
        return Prediction(
            image=image.rgb,
            labels=((x // 8 + 3 * (y // 8)) % 7 + self.first).astype(np.uint8),
            depth=depth,
            confidence=np.ones_like(depth),
            camera=camera or Camera.from_fov(width, height, float(fov or 60)),
            camera_source="assumed" if camera is None and fov is None else "given",
        )


class Rooms:
    """A floor, and a box on it."""

    def complete(self, source, depth=None, camera=None, *, fov=None, height=None, estimator=None):
        h, w = source.rgb.shape[:2]
        volume = np.zeros((12, 6, 12), np.uint8)
        volume[:, 0] = labels.get("ssc12").names.index("floor")
        volume[4:8, 1:4, 4:8] = labels.get("ssc12").names.index("bed")
        return Room(
            volume=LabelVolume(volume, np.zeros(3), 0.08),
            observed=volume > 0,
            confidence=np.ones(volume.shape, np.float32),
            image=source.rgb,
            depth=np.ones((h, w), np.float32),
            depth_source="given",
            camera=Camera.from_fov(w, h, 60.0, np.eye(4)),
            grid=VoxelGrid(np.zeros(3), np.eye(4), 0.02, (48, 24, 48)),
            camera_source="given",
            name=source.name,
        )


def photo(seed=0) -> bytes:
    data = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    PIL.Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


@contextmanager
def running(app):
    """Its address, on this machine."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def address():
    settings = Settings(threads=1, patience=0.0, bytes=100_000)
    predictors = {"first": Stub(), "second": Stub(20)}
    with running(create_app(settings, predictors=predictors, completer=Rooms())) as address:
        yield address


@pytest.fixture(scope="module")
def chromium():
    # Names lead nowhere, so that nothing leaves the machine even where a test fails
    options = ["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@contextmanager
def opened(chromium, address, told="the server responded with a status of 4", **options):
    """The page. Whatever it asks of another host, and any error in its code, fails the test; but not what the browser
    itself says of requests that are meant to fail, `told`."""
    context = chromium.new_context(**options)
    context.set_default_timeout(30_000)
    strange, faults = [], []
    context.on("request", lambda r: None if r.url.startswith((address, "data:", "blob:")) else strange.append(r.url))
    context.on("weberror", lambda error: faults.append(str(error.error)))
    context.on("console", lambda m: faults.append(m.text) if m.type == "error" and told not in m.text else None)
    page = context.new_page()
    page.goto(address)
    page.wait_for_selector("#model option", state="attached")
    yield page
    context.close()
    assert not strange
    assert not faults


@pytest.fixture
def page(chromium, address):
    with opened(chromium, address) as page:
        yield page


def choose(page, data: bytes, name="room.png", kind="image/png") -> None:
    """By the file input; returns once the answer is shown, or an error."""
    page.locator("#file").set_input_files({"name": name, "mimeType": kind, "buffer": data})
    page.wait_for_selector("#main:not([aria-busy])")


def arrays(address, data: bytes, **fields) -> dict[str, np.ndarray]:
    answer = ask(address, "application/x-npz", data, **fields)
    with np.load(io.BytesIO(answer)) as found:
        return dict(found)


def ask(address, accept: str, data: bytes, **fields) -> bytes:
    answer = httpx.post(f"{address}/predict", files={"image": data}, data=fields, headers={"Accept": accept})
    assert answer.status_code == 200
    return answer.content


def pixels(page, name: str) -> np.ndarray:
    code = "id => { const c = $(id); return [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]; }"
    height, width = page.evaluate("id => [$(id).height, $(id).width]", name)
    return np.array(page.evaluate(code, name), np.uint8).reshape(height, width, 4)


def reading(found: dict[str, np.ndarray], x: int, y: int) -> str:
    """What the page should say of a pixel. Depth comes to it in whole millimetres."""
    millimetres = round(1000 * float(found["depth"][y, x]))
    depth = f"{millimetres / 1000:.2f} m" if millimetres else "depth unknown"
    return f"{SPACE.names[found['labels'][y, x]]}, {depth}"


# --- photo ------------------------------------------------------------------------------------------------------------


def test_labels_and_depth_are_shown(page, address):
    assert page.locator("#result").is_hidden()
    choose(page, photo())
    found = arrays(address, photo())
    np.testing.assert_array_equal(pixels(page, "photo")[..., :3], PIL.Image.open(io.BytesIO(photo())))
    np.testing.assert_array_equal(pixels(page, "labels")[..., :3], SPACE.colours[found["labels"]])
    depth = pixels(page, "depth")[..., :3]
    assert len(np.unique(depth[10:].reshape(-1, 3), axis=0)) > 100  # the ramp, not a few steps
    assert (depth[:4, :4] == depth[0, 0]).all()  # unknown
    assert not (depth[8:] == depth[0, 0]).all(-1).any()
    shares = {SPACE.names[k]: n / found["labels"].size for k, n in enumerate(np.bincount(found["labels"].flat)) if n}
    told = [re.fullmatch(r"(.+?)\s*(\d+) %", text).groups() for text in page.locator("#legend li").all_inner_texts()]
    assert {name: int(share) for name, share in told} == pytest.approx(
        {name: 100 * share for name, share in shares.items()}, abs=0.51
    )
    near, far = (float(page.locator(where).inner_text().removesuffix(" m")) for where in ("#near", "#far"))
    known = found["depth"][found["depth"] > 0]
    assert known.min() - 0.01 <= near < far <= known.max() + 0.01


def test_what_is_under_the_pointer(page, address):
    choose(page, photo())
    found = arrays(address, photo())
    for name in ("photo", "labels", "depth"):
        box = page.locator(f"#{name}").bounding_box()
        for x, y in ((0, 0), (5, 0), (63, 47), (17, 33), (40, 9)):
            page.mouse.move(box["x"] + (x + 0.5) * box["width"] / WIDTH, box["y"] + (y + 0.5) * box["height"] / HEIGHT)
            assert page.locator("#here").inner_text() == reading(found, x, y)


def test_a_photo_is_dropped(page, tmp_path):
    """By the browser's own events of dragging a file."""
    path = tmp_path / "room.png"
    path.write_bytes(photo())
    session = page.context.new_cdp_session(page)
    box = page.locator("#drop").bounding_box()
    data = {"items": [], "files": [str(path)], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        session.send("Input.dispatchDragEvent", {"type": kind, "x": box["x"] + 20, "y": box["y"] + 20, "data": data})
        if kind == "dragOver":
            page.wait_for_selector("#drop.over")
    page.wait_for_selector("#result:not([hidden])")
    assert page.locator("#drop.over").count() == 0
    assert page.evaluate("[shown.width, shown.height]") == [WIDTH, HEIGHT]
    path.with_suffix(".txt").write_text("no photo")
    data["files"] = [str(path.with_suffix(".txt"))]
    for kind in ("dragEnter", "dragOver", "drop"):
        session.send("Input.dispatchDragEvent", {"type": kind, "x": box["x"] + 20, "y": box["y"] + 20, "data": data})
    page.wait_for_selector("#state.bad")
    assert "neither PNG nor JPEG nor WebP" in page.locator("#state").inner_text()


def test_another_model_and_field_of_view(page, address):
    choose(page, photo())
    assert page.locator("#model option").all_inner_texts() == ["first", "second"]
    assert "assumed" in page.locator("#facts").inner_text()
    assert "up to a factor" in page.locator("#state").inner_text()
    page.locator("#model").select_option("second")
    other = arrays(address, photo(), model="second")["labels"]
    api.expect(page.locator("#legend")).to_contain_text(SPACE.names[other[0, 0]])
    np.testing.assert_array_equal(pixels(page, "labels")[..., :3], SPACE.colours[other])
    page.locator("#fov").fill("75")
    page.locator("#fov").press("Enter")
    api.expect(page.locator("#facts")).to_contain_text("as given")
    assert "75° across" in page.locator("#facts").inner_text()
    assert page.locator("#state").inner_text() == ""
    asked = page.evaluate("asked")
    page.locator("#fov").blur()
    page.locator("#model").select_option("second")  # nothing new: nothing is asked
    assert page.evaluate("asked") == asked
    page.locator("#fov").fill("200")
    page.locator("#fov").press("Enter")
    page.wait_for_selector("#state.bad")
    assert "between 1 and 170" in page.locator("#state").inner_text()


def test_downloads_are_what_the_service_answers(page, address):
    """Of the photo that is shown, also after another one that was refused."""
    page.locator("#model").select_option("second")
    choose(page, photo())
    choose(page, b"no photo")
    assert page.locator("#state.bad").count() == 1
    kinds = {"PNG": "image/png", "NPZ": "application/x-npz", "PLY": "application/x-ply"}
    for kind, accept in kinds.items():
        with page.expect_download() as download:
            page.get_by_role("button", name=f"({kind})").click()
        assert download.value.suggested_filename == f"photo.{kind.lower()}"
        content = open(download.value.path(), "rb").read()  # noqa: SIM115
        assert content == ask(address, accept, photo(), model="second")


@pytest.mark.parametrize(
    ("data", "want"),
    [
        (b"no photo", "neither PNG nor JPEG nor WebP"),
        (b"", "is empty"),
        (photo()[:2000], "cut off or damaged"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100_000), "larger than 0.1 MB"),
    ],
)
def test_a_file_that_is_no_photo(page, data, want):
    choose(page, data)
    state = page.locator("#state.bad")
    assert want in state.inner_text()
    assert state.get_attribute("role") == "status"  # is read out
    assert page.locator("#result").is_hidden()
    choose(page, photo())  # and on it goes
    assert page.locator("#result").is_visible()
    assert page.locator("#state.bad").count() == 0


def test_a_service_that_has_gone(chromium, address):
    with opened(chromium, address, told="ERR_CONNECTION_REFUSED") as page:
        page.route("**/predict", lambda route: route.abort("connectionrefused"))
        choose(page, photo())
        assert page.locator("#state.bad").inner_text() == "The service cannot be reached."


# --- people -----------------------------------------------------------------------------------------------------------

FOCUSED = """() => {
  const e = document.activeElement;
  const seen = [e, e.parentElement].some((x) => {
    const s = getComputedStyle(x);
    return s.outlineStyle !== "none" && parseFloat(s.outlineWidth) >= 2;
  });
  return [e.id || e.textContent.trim(), seen];
}"""


def test_the_keyboard_reaches_everything(page):
    choose(page, photo())
    order = []
    while len(order) < 30:
        page.keyboard.press("Tab")
        name, seen = page.evaluate(FOCUSED)
        if page.evaluate("document.activeElement === document.body") or name in order:
            break
        assert seen, f"the focus on {name} cannot be seen"
        order.append(name)
    downloads = ["Download picture (PNG)", "Download arrays (NPZ)", "Download points (PLY)", "Open the room in 3-D"]
    assert order == ["choose", "camera", "model", "fov", "photo", "labels", "depth", *downloads]


def test_the_keyboard_does_everything(page, address, tmp_path):
    path = tmp_path / "room.png"
    path.write_bytes(photo())
    page.on("filechooser", lambda _: None)  # or the browser learns too late that it should tell
    page.keyboard.press("Tab")
    api.expect(page.locator("#choose")).to_be_focused()
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files(path)
    page.wait_for_selector("#result:not([hidden])")
    found = arrays(address, photo())
    page.locator("#labels").focus()
    x, y = WIDTH // 2, HEIGHT // 2
    for key, dx, dy in (("ArrowRight", 1, 0), ("ArrowDown", 0, 1), ("ArrowLeft", -1, 0), ("Shift+ArrowUp", 0, -6)):
        page.keyboard.press(key)
        x, y = x + dx, y + dy
        assert page.locator("#here").inner_text() == reading(found, x, y)
    page.get_by_role("button", name="(NPZ)").focus()
    with page.expect_download() as download:
        page.keyboard.press("Enter")
    with np.load(download.value.path()) as mine:
        np.testing.assert_array_equal(mine["labels"], found["labels"])


@pytest.mark.parametrize("size", [PHONE, {"width": 320, "height": 568}, {"width": 1280, "height": 800}])
def test_nothing_is_cut_off(chromium, address, size):
    with opened(chromium, address, viewport=size) as page:
        for step in range(3):
            if step:
                choose(page, photo() if step == 1 else b"no photo" * 20)
            assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
            for control in page.locator("button:visible, select:visible, input:visible, canvas:visible").all():
                box = control.bounding_box()
                assert box["x"] >= 0
                assert box["x"] + box["width"] <= size["width"]
                assert box["height"] >= 40  # a thumb


AUDIT = """() => {
  const faults = [];
  const shown = (e) => e.offsetParent !== null;
  const name = (e) => e.getAttribute("aria-label") || (e.labels && [...e.labels].map((l) => l.textContent).join(" ")) ||
    e.textContent;
  for (const e of document.querySelectorAll("button, input, select, canvas, ul, section")) {
    if ((shown(e) || e.type === "file" || e.tagName === "SECTION") && !name(e).trim()) faults.push(`${e.id}: no name`);
  }
  for (const e of document.querySelectorAll("img")) if (!e.hasAttribute("alt")) faults.push(`${e.outerHTML}: no alt`);
  for (const e of document.querySelectorAll("[aria-describedby], [for]")) {
    const to = e.getAttribute("aria-describedby") || e.getAttribute("for");
    if (!document.getElementById(to)) faults.push(`${to} is nowhere`);
  }
  const ids = [...document.querySelectorAll("[id]")].map((e) => e.id);
  if (new Set(ids).size !== ids.length) faults.push("an id comes twice");
  if (!document.documentElement.lang) faults.push("no language");
  if (!document.title) faults.push("no title");
  for (const part of ["main", "h1", "header"]) {
    if (document.querySelectorAll(part).length !== 1) faults.push(`not one ${part}`);
  }
  // WCAG 2.2, 1.4.3: text against what lies behind it, at least 4.5 to 1
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (colour) => numbers(colour).slice(0, 3).map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor;
      if (numbers(colour)[3] !== 0) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !shown(e) || e.disabled) continue;
    const [a, b] = [light(getComputedStyle(e).color), light(behind(e))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) faults.push(`${e.textContent.trim()}: ${ratio.toFixed(2)} to 1`);
  }
  return faults;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_names_and_contrast(chromium, address, scheme):
    with opened(chromium, address, color_scheme=scheme) as page:
        assert page.evaluate(AUDIT) == []
        choose(page, photo())
        assert page.evaluate(AUDIT) == []
        choose(page, b"no photo")
        assert page.evaluate(AUDIT) == []


# --- rooms ------------------------------------------------------------------------------------------------------------


def colours(locator) -> int:
    """Of what can be seen there, the page's ground among them."""
    picture = PIL.Image.open(io.BytesIO(locator.screenshot())).convert("RGB")
    return len(picture.getcolors(picture.width * picture.height))


def open_room(page):
    with page.context.expect_page() as room:
        page.get_by_role("button", name="Open the room").click()
    room.value.wait_for_selector("canvas")
    return room.value


def test_the_room_opens_in_a_tab(page):
    choose(page, photo())
    room = open_room(page)
    assert colours(room.locator("canvas").first) > 10
    room.close()
    assert page.locator("#result").is_visible()


@pytest.mark.slow
def test_the_shipped_models_complete_a_room(chromium):
    pytest.importorskip("numba")
    from enfilade.checkpoint import resolve
    from enfilade.data.rooms import room as rendered

    if not resolve("imenet-rooms").is_file():
        pytest.skip("imenet-rooms is not here")
    view = rendered(12, width=320, height=240)
    data = io.BytesIO()
    PIL.Image.fromarray((255 * view.image).round().astype(np.uint8)).save(data, "PNG")
    settings = Settings(completion="imenet-rooms", flip=False, threads=1, timeout=300.0)
    with running(create_app(settings)) as address, opened(chromium, address) as page:
        page.context.set_default_timeout(300_000)
        page.locator("#fov").fill(f"{view.camera.fov_degrees:.1f}")
        choose(page, data.getvalue())
        share = (arrays(address, data.getvalue(), fov=view.camera.fov_degrees)["labels"] == view.labels).mean()
        assert share > 0.3  # the network saw the room, not noise
        assert colours(open_room(page).locator("canvas").first) > 100
