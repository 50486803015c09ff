"""One's own labels: every layout and kind of label PNG gives the same samples, and every mistake its sentence."""

import json
import logging
import shutil

import cv2
import numpy as np
import PIL.Image
import pytest

from enfilade import labels
from enfilade.data import Reader, open_dataset
from enfilade.data.class_list import read_classes
from enfilade.data.folder import Folder, draw
from enfilade.data.inspect import check
from enfilade.errors import UserError

HEIGHT, WIDTH = 12, 16
COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)


def truth(seed):
    """Numbers 0..2 and a strip of void."""
    found = np.random.default_rng(seed).integers(0, 3, (HEIGHT, WIDTH)).astype(np.uint8)
    found[:2] = 255
    return found


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    if array.ndim == 3:
        array = array[..., ::-1]
    assert cv2.imwrite(str(path), array)


def fill(
    root, stems=("a", "b", "c", "d", "e"), images="images", masks="labels", classes: str | None = "wall\nmug\nplate\n"
):
    for seed, stem in enumerate(stems):
        write(root / images / f"{stem}.png", np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8))
        write(root / masks / f"{stem}.png", truth(seed))
    if classes is not None:
        (root / "classes.txt").write_text(classes)
    return root


def only(root, array, mode=None, **options):
    """The labels of a folder whose one label PNG is `array`."""
    (root / "labels").mkdir(parents=True, exist_ok=True)
    if mode is None:
        write(root / "labels" / "a.png", array)
    else:
        PIL.Image.fromarray(array).convert(mode).save(root / "labels" / "a.png")
    write(root / "images" / "a.png", np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    return Folder(root, "all", **options).labels(0)


# --- layouts ----------------------------------------------------------------------------------------------------------


def test_a_folder_without_splits(tmp_path):
    reader = open_dataset("folder", fill(tmp_path / "mugs"), "all")
    assert isinstance(reader, Reader)
    assert reader.name == "mugs/all"
    assert reader.names == ("a", "b", "c", "d", "e")
    assert reader.space.names == ("wall", "mug", "plate")
    assert labels.get(reader.space.name).names == reader.space.names
    for seed, sample in enumerate(reader[i] for i in range(5)):
        assert (sample.labels == truth(seed)).all()
        assert sample.image.shape == (HEIGHT, WIDTH, 3)
        assert sample.depth is None
        assert sample.camera is None


@pytest.mark.parametrize(
    ("images", "masks"),
    [
        ("{s}/images", "{s}/labels"),
        ("{s}/image", "{s}/masks"),
        ("images/{s}", "labels/{s}"),
        ("rgb/{s}", "annotations/{s}"),
    ],
)
@pytest.mark.parametrize("val", ["val", "validation"])
def test_splits_above_and_below(tmp_path, images, masks, val):
    fill(tmp_path, ("a", "b", "c"), images.format(s="train"), masks.format(s="train"))
    fill(tmp_path, ("d",), images.format(s=val), masks.format(s=val))
    assert Folder(tmp_path, "train").names == ("a", "b", "c")
    assert Folder(tmp_path, "val").names == ("d",)
    assert Folder(tmp_path, "all").names == ("train/a", "train/b", "train/c", "val/d")
    with pytest.raises(FileNotFoundError, match="has no split 'test': it has train, val"):
        Folder(tmp_path, "test")


def test_a_train_folder_alone_is_divided(tmp_path):
    fill(tmp_path, [f"{i}" for i in range(10)], "train/images", "train/labels")
    train, val = Folder(tmp_path, "train"), Folder(tmp_path, "val")
    assert len(val) == 2
    assert sorted(train.names + val.names, key=int) == [f"{i}" for i in range(10)]


@pytest.mark.parametrize("count", [2, 3, 4, 5, 9, 40])
def test_the_draw_is_a_partition_of_about_the_share(count):
    names = [f"{i}.jpg" for i in range(count)]
    val = draw(names, 0.2)
    assert val == draw(names[::-1], 0.2)
    assert len(val) == max(1, round(0.2 * count))
    assert len({frozenset(draw(names, 0.2, seed)) for seed in range(40)}) > 1
    # what is drawn is a matter of each name's hash: another image does not shuffle the rest
    assert len(draw([*names, "new.jpg"], 0.2) ^ val) <= 2


def test_whole_scenes_are_drawn():
    names = [f"{scene}/{i}" for scene in ("kitchen", "hall", "bath", "attic") for i in range(10)]
    for seed in range(5):
        val = draw(names, 0.2, seed)
        scenes = {name.split("/")[0] for name in val}
        assert len(scenes) == 1
        assert len(val) == 10
    assert draw(names[:20], 0.9) in ({*names[:10]}, {*names[10:20]})  # one scene is left to learn from


def test_scenes_in_folders_are_read(tmp_path):
    stems = [f"{scene}/{i}" for scene in ("hall", "attic") for i in (1, 2, 10)]
    fill(tmp_path, stems)
    assert Folder(tmp_path, "all").names == ("attic/1", "attic/2", "attic/10", "hall/1", "hall/2", "hall/10")
    assert {name.split("/")[0] for name in Folder(tmp_path, "val").names} < {"hall", "attic"}


# --- label PNGs -------------------------------------------------------------------------------------------------------


def test_all_kinds_of_png_are_the_same_labels(tmp_path):
    wanted, coloured = truth(0), np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    for value, colour in enumerate(COLOURS):
        coloured[wanted == value] = colour
    lines = ["wall #ff0000", "mug #00ff00", "plate #0000ff", "void #000000"]
    (tmp_path / "classes.txt").write_text("\n".join(lines))
    assert (only(tmp_path, wanted) == wanted).all()
    assert (only(tmp_path, wanted.astype(np.uint16)) == wanted).all()
    assert (only(tmp_path, coloured) == wanted).all()
    assert (only(tmp_path, coloured, "RGBA") == wanted).all()
    assert (only(tmp_path, np.where(wanted == 255, 3, wanted)) == wanted).all()  # void's own number
    assert (only(tmp_path, np.repeat(wanted[..., None], 3, 2)) == wanted).all()  # numbers saved in colour


@pytest.mark.parametrize("listed", [False, True])
def test_palettes(tmp_path, listed):
    numbers = np.random.default_rng(0).integers(0, 3, (HEIGHT, WIDTH)).astype(np.uint8)
    picture = PIL.Image.fromarray(numbers).convert("P")
    picture.putpalette(COLOURS[::-1].tobytes())  # number 0 is drawn in the last class's colour
    (tmp_path / "labels").mkdir()
    picture.save(tmp_path / "labels" / "a.png")
    write(tmp_path / "images" / "a.png", np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    third = "#0000ff" if listed else "#0000fe"
    (tmp_path / "classes.txt").write_text(f"wall #ff0000\nmug #00ff00\nplate {third}\n")
    found = Folder(tmp_path, "all").labels(0)
    assert (found == (2 - numbers if listed else numbers)).all()


def test_class_lists_in_three_forms(tmp_path):
    forms = {
        "classes.txt": "# a remark\nwall #ff0000\nnight stand #00FF00\n\nglass ignore #0000ff\n",
        "labelmap.txt": "# label:color_rgb:parts:actions\nwall:255,0,0::\nnight stand:0,255,0::\nignore:0,0,255::\n",
        "classes.json": json.dumps(
            {
                "classes": [
                    {"name": "wall", "colour": "#ff0000"},
                    {"name": "night stand", "color": [0, 255, 0]},
                    {"name": "glass", "color": [0, 0, 255], "ignore": True},
                ]
            }
        ),
    }
    for name, text in forms.items():
        (tmp_path / name).write_text(text)
        entries = read_classes(tmp_path / name)
        assert [e.name for e in entries][:2] == ["wall", "night stand"]
        assert [e.value for e in entries] == [0, 1, 2]
        assert [e.colour for e in entries] == [tuple(c) for c in COLOURS.tolist()]
        assert [e.void for e in entries] == [False, False, True]


def test_void_classes_are_not_of_the_space_and_others_move_up(tmp_path):
    (tmp_path / "classes.json").write_text(
        json.dumps(["Void", {"name": "background", "value": 7}, {"name": "mug", "id": 300}])
    )
    picture = np.array([[0, 7], [300, 255]], np.uint16).repeat(HEIGHT // 2, 0).repeat(WIDTH // 2, 1)
    found = only(tmp_path, picture)
    assert Folder(tmp_path, "all").space.names == ("background", "mug")
    assert found[[0, 0, -1, -1], [0, -1, 0, -1]].tolist() == [255, 0, 1, 255]


def test_depth_camera_and_a_photo_lying_on_its_side(tmp_path):
    fill(tmp_path, ("a", "b"))
    depth = np.arange(HEIGHT * WIDTH, dtype=np.uint16).reshape(HEIGHT, WIDTH)
    depth[0, 0] = 65535
    write(tmp_path / "depth" / "a.png", depth)
    (tmp_path / "camera.json").write_text('{"fx": 20, "fy": 21, "cx": 8, "cy": 6, "width": 16, "height": 12}')
    a, b = (Folder(tmp_path, "all")[i] for i in (0, 1))
    assert a.depth is not None
    assert a.depth[0, :3].tolist() == pytest.approx([0, 0.001, 0.002])
    assert b.depth is None
    assert a.camera is not None
    assert a.camera.fx == 20

    rgb = np.random.default_rng(5).integers(0, 256, (WIDTH, HEIGHT, 3), np.uint8)  # stored upright, 12 wide
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "images" / "a.png").unlink()
    PIL.Image.fromarray(rgb).save(tmp_path / "images" / "a.jpg", exif=exif, quality=100)
    shutil.rmtree(tmp_path / "depth")
    turned = Folder(tmp_path, "all")[0]
    assert turned.image.shape == (HEIGHT, WIDTH, 3)
    write(tmp_path / "labels" / "a.png", np.zeros((WIDTH, HEIGHT), np.uint8))
    assert Folder(tmp_path, "all")[0].image.shape == (WIDTH, HEIGHT, 3)  # labels of the file as it is stored


def test_data_check_reads_it(tmp_path, caplog):
    fill(tmp_path / "mugs")
    (tmp_path / "mugs" / "labels" / "b.png").unlink()
    write(tmp_path / "mugs" / "labels" / "c.png", np.full((HEIGHT, WIDTH), 9, np.uint8))
    with caplog.at_level(logging.WARNING):
        reader = open_dataset("folder", tmp_path / "mugs", "all")
    assert "mugs/all: 1 images have no label PNG and are left out, the first is b" in caplog.text
    assert reader.left_out == ("b",)  # type: ignore[attr-defined]
    report = check(reader)
    assert report.samples == 4 - len(report.broken) == 3
    assert [name for name, _ in report.broken] == ["c"]


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", r"classes.txt lists no class: write one name a line"),
        ("# only a remark\n", r"lists no class"),
        ("void\nignore\n", r"lists only void classes: there is nothing to learn"),
        ("wall\nNight_Stand\nnight stand\n", r"two classes are called 'Night_Stand' and 'night stand'"),
        ("wall #ff0000\nmug #FF0000\n", r"classes 'wall' and 'mug' both have the colour #ff0000"),
        ("wall #ff0000\nglass #ff0000 ignore\n", r"'glass' has the colour of another class"),
        ("wall #ff00\n", r"line 'wall #ff00' has the colour '#ff00': write it as #rrggbb"),
        ("\n".join(f"c{i}" for i in range(255)), r"a label space has 1 to 254 classes, not 255"),
    ],
)
def test_bad_class_lists(tmp_path, text, sentence):
    fill(tmp_path, classes=text)
    with pytest.raises(UserError, match=sentence):
        Folder(tmp_path, "all")


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("classes.json", "{", "is no JSON"),
        ("classes.json", "{}", "expected a list of names"),
        ("classes.json", "[1]", "expected a list of names .* not 1"),
        ("classes.json", '[{"name": "a", "value": 3}, {"name": "b", "value": 3}]', "the number 3 to two classes"),
        ("classes.json", '[{"name": "a", "value": -1}]', "numbers lie between 0 and 65534"),
        ("classes.json", '[{"name": "a", "value": "x"}]', "has the number 'x'"),
        ("classes.json", '[{"name": "a", "colour": [1, 2]}]', r"has the colour \[1, 2\]"),
        ("labelmap.txt", "wall 255,0,0", "is not of the form name:r,g,b::"),
        ("labelmap.txt", "wall:256,0,0::", "is not of the form name:r,g,b::"),
    ],
)
def test_bad_lists_of_the_other_forms(tmp_path, name, text, sentence):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=sentence):
        read_classes(tmp_path / name)


def test_bad_labels(tmp_path):
    wrong = truth(0)
    wrong[5, :3], wrong[6, 0] = 7, 9
    (tmp_path / "classes.txt").write_text("wall\nmug\nplate\n")
    sentence = r"a.png holds the value 7 in 3 pixels \(2 such values\), but classes.txt lists 0 to 2"
    with pytest.raises(UserError, match=sentence):
        only(tmp_path, wrong)
    coloured = np.full((HEIGHT, WIDTH, 3), [255, 0, 0], np.uint8)
    with pytest.raises(UserError, match=r"a.png is in colour, and .*classes.txt gives no class a colour"):
        only(tmp_path, coloured)
    (tmp_path / "classes.txt").write_text("wall #ff0000\nmug #00ff00\n")
    assert not only(tmp_path, coloured).any()
    coloured[3, 3:5] = 1, 2, 3
    with pytest.raises(UserError, match=r"a.png holds the colour #010203 in 2 pixels, which is no class's"):
        only(tmp_path, coloured)
    file = tmp_path / "labels" / "a.png"
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(UserError, match=r"a.png is damaged or cut off"):
        Folder(tmp_path, "all").labels(0)
    file.write_bytes(b"GIF89a")
    with pytest.raises(UserError, match=r"a.png is no readable PNG"):
        Folder(tmp_path, "all").labels(0)


def test_sizes_that_differ(tmp_path):
    fill(tmp_path, ("a", "b"))
    write(tmp_path / "labels" / "a.png", np.zeros((HEIGHT, WIDTH + 1), np.uint8))
    with pytest.raises(UserError, match=r"labels/a.png is 17x12, but a.png 16x12: the files of one image have one"):
        Folder(tmp_path, "all")[0]
    write(tmp_path / "depth" / "b.png", np.zeros((HEIGHT, WIDTH - 1), np.uint16))
    with pytest.raises(UserError, match=r"depth/b.png is 15x12"):
        Folder(tmp_path, "all")[1]
    write(tmp_path / "depth" / "b.png", np.zeros((HEIGHT, WIDTH), np.uint8))
    with pytest.raises(UserError, match=r"b.png holds uint8: depth is a PNG of 16 bits, in millimetres"):
        Folder(tmp_path, "all")[1]


def test_files_that_are_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        Folder(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"holds no class list: write classes.txt"):
        Folder(fill(tmp_path / "a", classes=None))
    with pytest.raises(FileNotFoundError, match="there is no class list"):
        Folder(tmp_path / "a", classes=tmp_path / "none.txt")
    (tmp_path / "a" / "classes.txt").write_text("wall\nmug\nplate\n")
    (tmp_path / "a" / "images" / "b.png").unlink()
    (tmp_path / "a" / "images" / "c.png").unlink()
    with pytest.raises(UserError, match=r"labels/b.png has no image of its name in .*images \(2 such files\)"):
        Folder(tmp_path / "a")
    shutil.rmtree(tmp_path / "a" / "labels")
    with pytest.raises(FileNotFoundError, match="there is no folder of labels"):
        Folder(tmp_path / "a")
    (tmp_path / "a" / "labels").mkdir()
    with pytest.raises(UserError, match=r"no image of split 'all' has a label PNG of its stem \(3 images\)"):
        Folder(tmp_path / "a", "all")
    (tmp_path / "a" / "labels" / "a.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"a.jpg: labels are PNG files, because other formats change the numbers"):
        Folder(tmp_path / "a", "all")
    shutil.rmtree(tmp_path / "a" / "images")
    with pytest.raises(FileNotFoundError, match="holds no folder of images"):
        Folder(tmp_path / "a", "all")


def test_what_cannot_be_divided(tmp_path):
    fill(tmp_path, ("a",))
    with pytest.raises(UserError, match="has one labelled image: two are needed"):
        Folder(tmp_path, "train")
    with pytest.raises(UserError, match="val_share is a share between 0 and 1, not 2"):
        Folder(tmp_path, "train", val_share=2.0)
    with pytest.raises(UserError, match="no split 'valu'; did you mean 'val'"):
        Folder(tmp_path, "valu")


def test_one_image_twice(tmp_path):
    fill(tmp_path, ("a", "b"))
    shutil.copy(tmp_path / "images" / "a.png", tmp_path / "images" / "a.webp")
    with pytest.raises(UserError, match="are one image twice: keep one of them"):
        Folder(tmp_path, "train")
