"""Label spaces: the tables against the official files, the colours against what a reader can tell apart."""

import subprocess
import sys

import cv2
import numpy as np
import pytest
import scipy.io
from scipy.spatial.distance import pdist

from enfilade import labels
from enfilade.errors import UserError

SIZES = {"nyu40": 40, "nyu13": 13, "sun37": 37, "ssc12": 12, "camvid11": 11, "voc21": 21}


def test_spaces_have_their_sizes_and_unique_names():
    assert {name: len(space) for name, space in labels.SPACES.items()} == SIZES
    for name, space in labels.SPACES.items():
        assert space.name == name
        assert len(set(space.names)) == len(space) == len(space.colours)
        assert len({tuple(c) for c in space.colours.tolist()}) == len(space)


@pytest.mark.parametrize("name", ["nyu40", "nyu13", "sun37", "ssc12"])
def test_indoor_colours_can_be_told_apart(name):
    # CIELAB distance: about 2 is just noticeable; patches far apart in a legend need some ten times that.
    rgb = np.concatenate([labels.get(name).colours, np.zeros((1, 3), np.uint8)])  # black is "ignored"
    lab = cv2.cvtColor((rgb[:, None] / 255).astype(np.float32), cv2.COLOR_RGB2LAB)[:, 0]
    assert pdist(lab[:-1]).min() > 20
    assert pdist(lab).min() > 15


def test_same_class_same_colour():
    seen = {}
    for name in ("nyu40", "nyu13", "sun37", "ssc12"):
        space = labels.get(name)
        for label, colour in zip(space.names, space.colours.tolist()):
            assert seen.setdefault(label, colour) == colour


def test_voc_palette_first_colours():
    # from the VOC development kit: background, aeroplane, bicycle, bird, boat, and tvmonitor
    colours = labels.get("voc21").colours
    assert colours[:5].tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128]]
    assert colours[20].tolist() == [0, 64, 128]


def test_colourise():
    space = labels.get("nyu40")
    image = np.array([[0, 39, 255], [7, 40, 254]], np.uint8)
    drawn = space.colourise(image)
    assert drawn.shape == (2, 3, 3)
    assert (drawn[0, 0] == space.colours[0]).all()
    assert (drawn[0, 1] == space.colours[39]).all()
    assert (drawn[1, 0] == space.colours[7]).all()
    assert not drawn[[0, 1, 1], [2, 1, 2]].any()
    assert space.colourise(np.zeros((0, 0), np.uint8)).shape == (0, 0, 3)


def test_colours_cannot_be_changed_by_accident():
    with pytest.raises(ValueError, match="read-only"):
        labels.get("nyu40").colours[0] = 0
    with pytest.raises(ValueError, match="read-only"):
        labels.mapping("nyu40", "nyu13")[0] = 0


def test_typing_errors_get_a_suggestion():
    assert labels.get("nyu40").index("night stand") == 31
    with pytest.raises(UserError, match="did you mean 'sofa'"):
        labels.get("nyu40").index("soffa")
    with pytest.raises(UserError, match="did you mean 'nyu40'"):
        labels.get("nyu400")
    with pytest.raises(UserError, match=r"no mapping .* 'voc21' to 'nyu40'"):
        labels.mapping("voc21", "nyu40")
    with pytest.raises(UserError, match="no label space 'kitti'"):
        labels.mapping("nyu40", "kitti")


@pytest.mark.parametrize(("source", "target"), labels.MAPPINGS)
def test_mappings_stay_in_their_spaces(source, target):
    table = labels.mapping(source, target)
    assert table.shape == (256,)
    assert (table[SIZES[source] :] == 255).all()
    assert ((table < SIZES[target]) | (table == 255)).all()
    if source == target:
        assert (table[: SIZES[source]] == np.arange(SIZES[source])).all()


def test_coarser_spaces_agree_with_each_other():
    # nyu40 -> sun37 -> X is nyu40 -> X on the classes that sun37 has
    to37 = labels.mapping("nyu40", "sun37")
    assert [n for n, t in zip(labels.get("nyu40").names, to37) if t == 255] == [
        "otherstructure",
        "otherfurniture",
        "otherprop",
    ]
    for target in ("nyu13", "ssc12", "nyu40"):
        direct = labels.mapping("nyu40", target)
        assert (labels.mapping("sun37", target)[to37][:37] == direct[:37]).all()


def test_empty_is_never_a_pixels_class():
    for source in ("nyu40", "sun37"):
        assert labels.get("ssc12").index("empty") not in labels.mapping(source, "ssc12")


def test_import_needs_no_torch():
    code = "import sys, enfilade.labels; sys.exit(any(m in sys.modules for m in ('torch', 'cv2', 'scipy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_894_from_file(tmp_path):
    raw = np.random.default_rng(0).integers(1, 41, 894)
    scipy.io.savemat(tmp_path / "map.mat", {"mapClass": raw.astype(np.uint8)[None]})
    table = labels.nyu894_to_40(tmp_path / "map.mat")
    assert table[0] == 255
    assert (table[1:] == raw - 1).all()


def test_894_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.mat"):
        labels.nyu894_to_40(tmp_path / "none.mat")
    (tmp_path / "bad.mat").write_bytes(b"no mat file")
    with pytest.raises(UserError, match=r"bad\.mat"):
        labels.nyu894_to_40(tmp_path / "bad.mat")
    scipy.io.savemat(tmp_path / "other.mat", {"x": np.zeros(3)})
    with pytest.raises(UserError, match=r"other\.mat"):
        labels.nyu894_to_40(tmp_path / "other.mat")
    scipy.io.savemat(tmp_path / "range.mat", {"mapClass": np.zeros(894)})
    with pytest.raises(UserError, match=r"894 numbers in 1\.\.40"):
        labels.nyu894_to_40(tmp_path / "range.mat")


# --- against the official files ---------------------------------------------------------------------------------------


@pytest.mark.shared
def test_nyu40_is_the_official_one(shared_data):
    path = shared_data / "nyuv2/meta/classMapping40.mat"
    content = scipy.io.loadmat(path, simplify_cells=True)
    assert tuple(content["className"]) == labels.get("nyu40").names
    table = labels.nyu894_to_40(path)
    assert table.shape == (895,)
    assert table[0] == 255
    assert set(table[1:].tolist()) == set(range(40))
    raw = [str(name) for name in content["allClassName"]]
    for name in ("cabinet", "ceiling", "chair", "television", "night stand"):  # raw names that are classes themselves
        assert labels.get("nyu40").names[table[raw.index(name) + 1]] == name


@pytest.mark.shared
def test_nyu13_is_the_official_one(shared_data):
    content = scipy.io.loadmat(shared_data / "nyuv2/meta/class13Mapping.mat", simplify_cells=True)["classMapping13"]
    assert tuple(content["classNames"]) == labels.get("nyu13").names
    assert (labels.mapping("nyu40", "nyu13")[:40] == content["labels13"] - 1).all()


@pytest.mark.shared
def test_ssc12_is_the_official_one(shared_data):
    content = scipy.io.loadmat(shared_data / "nyu_ssc/meta/ClassMapping.mat", simplify_cells=True)
    assert tuple(content["nyu40class"]) == labels.get("nyu40").names
    eleven = list(content["elevenClass"])
    to11 = dict(zip(content["p5d36class"], content["map36to11"]))
    expected = [eleven.index(to11[name]) + 1 for name in content["mapNYU40to36"]]
    assert (labels.mapping("nyu40", "ssc12")[:40] == expected).all()
    same = {"furn": "furniture", "objs": "objects"}
    assert ("empty", *(same.get(n, n) for n in eleven)) == labels.get("ssc12").names


# --- classes of one's own ---------------------------------------------------------------------------------------------


def test_a_space_of_ones_own_is_written_in_its_name():
    names = ["wall", "a, b", "50 % #1", "Straße", "night_stand"]
    colours = [None, "#FF8000", None, "#00ff01", None]
    space = labels.own(names, colours)
    again = labels.get(space.name)
    assert again.names == tuple(names)
    assert (again.colours == space.colours).all()
    assert again.colours[[1, 3]].tolist() == [[255, 128, 0], [0, 255, 1]]
    assert (again.colours[0] == labels.get("nyu40").colours[0]).all()  # an indoor class is drawn as ever
    code = "import sys; from enfilade import labels; print(labels.get(sys.argv[1]).names == eval(sys.argv[2]))"
    told = subprocess.run([sys.executable, "-c", code, space.name, repr(tuple(names))], capture_output=True, check=True)
    assert told.stdout.strip() == b"True"


@pytest.mark.parametrize("count", [1, 20, 254])
def test_own_colours_can_be_told_apart(count):
    colours = labels.own([f"c{i}" for i in range(count)]).colours
    lab = cv2.cvtColor(
        (np.concatenate([colours, np.zeros((1, 3))])[:, None] / 255).astype(np.float32), cv2.COLOR_RGB2LAB
    )[:, 0]
    assert pdist(lab).min() > (20 if count <= 20 else 8)


def test_own_spaces_map_by_name():
    table = labels.mapping("nyu40", "own:Night_Stand,mug,wall")
    assert table[labels.get("nyu40").index("wall")] == 2
    assert table[labels.get("nyu40").index("night stand")] == 0
    assert (np.delete(table, [0, labels.get("nyu40").index("night stand")]) == 255).all()
    assert labels.mapping("own:a,b", "own:b,c,a")[:3].tolist() == [2, 0, 255]
    assert labels.mapping("own:a,b", "own:a,b")[[0, 1, 255]].tolist() == [0, 1, 255]
    with pytest.raises(UserError, match="no class of label space 'own:mug' is called as one of 'nyu40'"):
        labels.mapping("own:mug", "nyu40")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("own:", "a class has an empty name"),
        ("own:a,,b", "a class has an empty name"),
        ("own:a,A", "two classes are called 'a' and 'A'"),
        ("own:a#12", "class 'a' has the colour '#12'"),
        ("own:a#ff8000,b#FF8000", "classes 'a' and 'b' both have the colour #ff8000"),
    ],
)
def test_bad_own_spaces(name, sentence):
    with pytest.raises(UserError, match=sentence):
        labels.get(name)


def test_long_names_are_short_in_sentences():
    assert labels.short("own:a,b,c,d,e,f") == "own:a,b,c and 3 more"
    assert labels.short("nyu40") == "nyu40"
