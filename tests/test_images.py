"""Every kind of picture comes in upright and in [0, 1]; every kind of damage is told in one sentence."""

import io
import math
import os
import subprocess
import sys
import zlib

import cv2
import numpy as np
import PIL.Image
import pytest

from enfilade import images
from enfilade.errors import UserError


def smooth(height=40, width=60) -> np.ndarray:
    """A gradient without symmetry, so that every turn and mirror of it differs, and JPEG keeps it well."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 / width, y * 255 / height, (x + y) * 120 / (height + width)], -1).astype(np.uint8)


def encoded(image: PIL.Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_lossless_formats_come_back_exactly(kind):
    array = smooth()
    data = encoded(PIL.Image.fromarray(array), kind, **({"lossless": True} if kind == "WEBP" else {}))
    rgb = images.read(data).rgb
    assert rgb.dtype == np.float32
    np.testing.assert_array_equal(np.rint(rgb * 255), array)


def test_every_source_gives_the_same_picture(tmp_path):
    array = smooth()
    path = tmp_path / "room.one.png"
    path.write_bytes(encoded(PIL.Image.fromarray(array), "PNG"))
    wanted = array / np.float32(255)
    with path.open("rb") as file, PIL.Image.open(path) as opened:
        data = path.read_bytes()
        sources = [path, str(path), data, bytearray(data), memoryview(data), io.BytesIO(data), file, opened, array]
        sources += [wanted, wanted.astype(np.float64), array.astype(np.uint16) * 257]
        for source in sources:
            # 1 ulp: uint16 divides by 65535 = 255 * 257, so both quotients round the same real number
            np.testing.assert_allclose(images.read(source).rgb, wanted, atol=1e-7)
    image = images.read(path)
    assert (image.name, image.path) == ("room.one", path)
    assert images.read(image) is image
    with path.open("rb") as file:
        assert images.read(file).name == "room.one"


def test_a_stream_that_cannot_seek(tmp_path):
    read, write = os.pipe()
    with open(write, "wb") as file:
        file.write(encoded(PIL.Image.fromarray(smooth()), "PNG"))
    with open(read, "rb") as file:
        assert images.read(file).rgb.shape == (40, 60, 3)
    with pytest.raises(UserError, match="binary"):
        images.read(io.StringIO("text"))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation(orientation, kind):
    # The stored picture for each orientation, by its definition: which stored row and column is the upright (0, 0).
    upright = smooth()
    stored = {
        1: upright,
        2: upright[:, ::-1],  # 0th row top, 0th column right
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),  # rows are columns: 0th row left, 0th column top
        6: upright.swapaxes(0, 1)[::-1],  # 0th row right, 0th column top
        7: upright.swapaxes(0, 1)[::-1, ::-1],
        8: upright.swapaxes(0, 1)[:, ::-1],  # 0th row left, 0th column bottom
    }[orientation]
    image = PIL.Image.fromarray(np.ascontiguousarray(stored))
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    exif.get_ifd(0x8769)[0xA405] = 28
    image_read = images.read(encoded(image, kind, exif=exif.tobytes(), quality=95))
    assert image_read.rgb.shape == (40, 60, 3)
    # JPEG and WebP lose up to ~10 of 255 on this gradient's chroma; a wrong turn differs by more than 40 on average
    assert np.abs(image_read.rgb * 255 - upright).mean() < 5
    assert image_read.focal == pytest.approx(28 * math.hypot(40, 60) / math.hypot(36, 24))


def test_focal_from_exif():
    # a 4000 x 3000 phone photo, 26 mm equivalent: the diagonal's angle is that of 26 mm on film, whatever the size
    for width, height in ((4000, 3000), (3000, 4000), (1000, 750)):
        focal = images.focal_from_exif({0xA405: 26}, width, height)
        angle = 2 * math.atan(math.hypot(width, height) / 2 / focal)
        assert angle == pytest.approx(2 * math.atan(math.hypot(36, 24) / 2 / 26))
    # 50 mm on a 22.3 mm wide sensor of 5184 pixels, stated per inch, in a picture scaled to half
    plane = {0x920A: 50.0, 0xA20E: 5184 / 22.3 * 25.4, 0xA210: 2, 0xA002: 5184, 0xA003: 3456}
    assert images.focal_from_exif(plane, 5184, 3456) == pytest.approx(50 * 5184 / 22.3)
    assert images.focal_from_exif(plane, 2592, 1728) == pytest.approx(50 * 2592 / 22.3)
    per_mm = plane | {0xA20E: 5184 / 22.3, 0xA210: 4}
    assert images.focal_from_exif(per_mm, 5184, 3456) == pytest.approx(50 * 5184 / 22.3)
    assert images.focal_from_exif(plane, 3456, 3456) is None  # cropped to a square
    for nothing in ({}, {0xA405: 0}, {0xA405: "?"}, {0x920A: 4.2}, {0xA405: 1e9}, {0xA405: float("nan")}):
        assert images.focal_from_exif(nothing, 640, 480) is None


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_does_not_hide_the_picture():
    data = encoded(PIL.Image.fromarray(smooth()), "JPEG", exif=b"Exif\0\0" + b"MM\0*\0\0\0\x08\xff\xff" + b"\xfe" * 40)
    image = images.read(data)
    assert image.rgb.shape == (40, 60, 3)
    assert image.focal is None


def test_sixteen_bit_grey_is_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 40 * 60).astype(np.uint16).reshape(40, 60)
    pil = PIL.Image.fromarray(ramp)
    for kind in ("PNG", "TIFF"):
        rgb = images.read(encoded(pil, kind)).rgb
        np.testing.assert_allclose(rgb, np.repeat(ramp[..., None] / 65535, 3, 2), atol=1e-7)
    big_endian_pgm = b"P5 60 40 65535\n" + ramp.astype(">u2").tobytes()
    np.testing.assert_allclose(images.read(big_endian_pgm).rgb[..., 1], ramp / 65535, atol=1e-7)
    np.testing.assert_allclose(images.read(ramp).rgb[..., 2], ramp / 65535, atol=1e-7)


@pytest.mark.parametrize("kind", [".png", ".tiff"])
def test_sixteen_bit_colour(kind):
    array = np.random.default_rng(0).integers(0, 65536, (20, 30, 3), dtype=np.uint16)
    ok, data = cv2.imencode(kind, array[..., ::-1])
    assert ok
    rgb = images.read(data.tobytes()).rgb
    assert np.abs(rgb - array / 65535).max() < 1 / 255  # eight bits are kept


def test_grey_bilevel_and_palette():
    grey = smooth()[..., 0]
    rgb = images.read(encoded(PIL.Image.fromarray(grey), "PNG")).rgb
    np.testing.assert_array_equal(rgb, np.repeat(grey[..., None] / np.float32(255), 3, 2))
    bits = grey > 100
    np.testing.assert_array_equal(images.read(encoded(PIL.Image.fromarray(bits), "PNG")).rgb[..., 0], bits)
    np.testing.assert_array_equal(images.read(bits).rgb[..., 0], bits)
    palette = PIL.Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3), "P")
    colours = np.random.default_rng(0).integers(0, 256, (6, 3), dtype=np.uint8)
    palette.putpalette(colours.tobytes())
    for kind in ("PNG", "GIF", "TIFF"):
        np.testing.assert_array_equal(np.rint(images.read(encoded(palette, kind)).rgb * 255), colours.reshape(2, 3, 3))


def test_alpha_is_laid_over_white():
    rgba = np.dstack([smooth(), np.tile(np.linspace(0, 255, 60).astype(np.uint8), (40, 1))])
    a = rgba[..., 3:] / 255
    wanted = rgba[..., :3] / 255 * a + (1 - a)
    np.testing.assert_allclose(images.read(encoded(PIL.Image.fromarray(rgba), "PNG")).rgb, wanted, atol=1e-6)
    np.testing.assert_allclose(images.read(rgba).rgb, wanted, atol=1e-6)
    grey_alpha = PIL.Image.fromarray(rgba).convert("LA")
    assert images.read(encoded(grey_alpha, "PNG")).rgb[:, 0].min() == 1  # transparent column: white
    palette = PIL.Image.new("P", (2, 1), 0)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    rgb = images.read(encoded(palette, "PNG", transparency=0)).rgb
    np.testing.assert_allclose(rgb[0] * 255, [[255, 255, 255], [40, 50, 60]], atol=1e-4)


def test_cmyk():
    array = smooth()
    cmyk = np.dstack([255 - array, np.zeros(array.shape[:2], np.uint8)])  # no black: exactly the complement
    image = PIL.Image.frombytes("CMYK", (60, 40), cmyk.tobytes())
    np.testing.assert_array_equal(np.rint(images.read(encoded(image, "TIFF")).rgb * 255), array)
    rgb = images.read(encoded(image, "JPEG", quality=98)).rgb
    assert np.abs(rgb * 255 - array).mean() < 3  # compression


def test_first_frame_of_an_animation():
    pages = [PIL.Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "PNG", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(pages[0], kind, save_all=True, append_images=pages[1:], **options)
        np.testing.assert_array_equal(images.read(data).rgb[4, 4], [1, 0, 0])


def test_one_pixel():
    for kind in ("PNG", "JPEG", "GIF", "BMP"):
        assert images.read(encoded(PIL.Image.new("RGB", (1, 1), "white"), kind)).rgb.shape == (1, 1, 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM"])
def test_truncated_files_are_refused(tmp_path, kind):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(PIL.Image.fromarray(noise), kind)
    for keep in (0.02, 0.3, 0.6, 0.9):
        path = tmp_path / f"cut.{kind.lower()}"
        path.write_bytes(data[: int(len(data) * keep)])
        with pytest.raises(UserError, match="cut") as caught:
            images.read(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_any_damage_is_a_user_error_or_a_picture():
    """Flipped bytes anywhere: never another exception."""
    generator = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "TIFF", "GIF", "BMP", "WEBP"):
        good = np.frombuffer(encoded(PIL.Image.fromarray(smooth()), kind), np.uint8)
        for _ in range(40):
            bad = good.copy()
            where = generator.integers(0, min(len(bad), 400), 3)
            bad[where] = generator.integers(0, 256, 3)
            try:
                rgb = images.read(bad.tobytes(), limit=1_000_000).rgb
            except UserError:
                continue
            assert rgb.ndim == 3
            assert 0 <= rgb.min() <= rgb.max() <= 1


def test_bad_paths(tmp_path):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("this is no picture, whatever its name says\n" * 20)
    (tmp_path / "folder.png").mkdir()
    for name, sentence in (
        ("empty.jpg", "empty"),
        ("text.jpg", "not an image"),
        ("folder.png", "is a folder"),
        ("missing.jpg", "does not exist"),
    ):
        with pytest.raises(UserError, match=sentence) as caught:
            images.read(tmp_path / name)
        assert name in str(caught.value)
    with pytest.raises(UserError, match="empty"):
        images.read(b"")
    with pytest.raises(UserError, match="int: give"):
        images.read(3)
    if os.path.exists("/dev/null"):
        with pytest.raises(UserError, match="regular"):
            images.read("/dev/null")


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds almost nothing: the classic bomb."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    body = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [10_001, 12_000, 30_000])  # below, between and above Pillow's own two limits
def test_decompression_bombs(side, recwarn):
    with pytest.raises(UserError, match="too large"):
        images.read(png_header(side, side))
    assert not recwarn.list
    with pytest.raises(UserError, match=r"limit 0\.002 megapixels"):
        images.read(encoded(PIL.Image.fromarray(smooth()), "PNG"), limit=2000)


def test_bad_arrays():
    for array, sentence in (
        (np.zeros((3, 20, 30), np.uint8), "channels last"),
        (np.zeros((2, 2, 2, 3), np.uint8), r"\[2, 2, 2, 3\]"),
        (np.zeros((0, 5, 3), np.uint8), "at least one pixel"),
        (np.full((2, 2, 3), 200.0), r"\[0, 1\]"),
        (np.full((2, 2, 3), np.nan), r"\[0, 1\]"),
        (np.zeros((2, 2, 3), np.int64), "int64"),
    ):
        with pytest.raises(UserError, match=sentence):
            images.read(array)


def test_find(tmp_path):
    for name in ("b.jpg", "a.PNG", "sub/c.webp", "sub/.hidden.jpg", ".dir/d.jpg", "notes.txt", "clip.mp4", "x [1].jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def names(*paths):
        return [p.relative_to(tmp_path).as_posix() for p in images.find([str(tmp_path / p) for p in paths])]

    assert names("") == ["a.PNG", "b.jpg", "clip.mp4", "x [1].jpg", "sub/c.webp"]
    assert names("*.jpg") == ["b.jpg", "x [1].jpg"]
    assert names("**/*") == ["a.PNG", "b.jpg", "clip.mp4", "sub/c.webp", "x [1].jpg"]
    assert names("x [1].jpg", "notes.txt") == ["x [1].jpg", "notes.txt"]  # named files come as they are
    assert names("b.jpg", "", "b.jpg") == ["b.jpg", "a.PNG", "clip.mp4", "x [1].jpg", "sub/c.webp"]  # each once
    relative = {f.relative.as_posix() for f in images.find_relative(tmp_path)}
    assert "sub/c.webp" in relative
    with pytest.raises(UserError, match=r"nope\.jpg, .*gone") as caught:
        names("b.jpg", "nope.jpg", "gone")
    assert "b.jpg," not in str(caught.value)
    (tmp_path / "void").mkdir()
    for barren in ("void", "*.xyz"):
        with pytest.raises(UserError, match="no images"):
            names(barren)


def test_video_frames(tmp_path):
    path = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, (64, 48))
    for i in range(7):
        writer.write(np.full((48, 64, 3), (0, 0, 30 * i), np.uint8))  # BGR: red grows
    writer.release()
    seen = list(images.frames(path))
    assert [i for i, _ in seen] == list(range(7))
    for i, rgb in seen:
        assert rgb.shape == (48, 64, 3)
        np.testing.assert_allclose(rgb.mean((0, 1)), [30 * i, 0, 0], atol=4)  # MJPG rounds
    assert [i for i, _ in images.frames(path, every=3)] == [0, 3, 6]
    assert images.frame_count(path) == 7
    assert images.is_video(path)
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"not a video" * 100)
    for wrong, sentence in ((bad, "decoded"), (tmp_path / "none.mp4", "no file"), (tmp_path, "folder")):
        with pytest.raises(UserError, match=sentence):
            images.frames(wrong)
    with pytest.raises(ValueError, match="every"):
        images.frames(path, every=0)


def test_write_atomic(tmp_path):
    path = tmp_path / "file.bin"
    images.write_atomic(path, b"old")
    images.write_atomic(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"

    def fails(file):
        file.write(b"half")
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        images.write_atomic(path, fails)
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["file.bin"]
    if os.name == "posix":  # as any other file, not only for its owner
        (tmp_path / "plain").touch()
        assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_unwritable_output_is_named(tmp_path):
    (tmp_path / "taken").touch()  # a file in the place of a folder fails for root, too
    for call in (
        lambda: images.write_atomic(tmp_path / "absent" / "a.png", b""),
        lambda: images.write_atomic(tmp_path / "taken" / "a.png", b""),
        lambda: images.make_folder(tmp_path / "taken"),
        lambda: images.make_folder(tmp_path / "taken" / "below"),
    ):
        with pytest.raises(UserError, match=r"cannot (write|create)") as caught:
            call()
        assert str(tmp_path) in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [None, 3])
def test_png_round_trip(tmp_path, dtype, channels):
    shape = (13, 17) if channels is None else (13, 17, channels)
    array = np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)
    images.write_png(tmp_path / "a.png", array)
    back = cv2.imread(str(tmp_path / "a.png"), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(back if channels is None else back[..., ::-1], array)
    with pytest.raises(ValueError, match="float"):
        images.write_png(tmp_path / "a.png", array.astype(float))


def test_import_is_light():
    code = "import sys, enfilade.images; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
