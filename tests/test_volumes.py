"""Encoded frames: against the references of `ops`, the mirror's geometry, and SSCNet's own frame."""

import dataclasses
import json

import cv2
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from enfilade.camera import Camera
from enfilade.cli import main
from enfilade.data import open_dataset, ssc
from enfilade.data.volumes import encode, grid_of, mirror, resized, sscnet_masks, torchssc_masks
from enfilade.errors import UserError
from enfilade.labels import mapping
from enfilade.ops import voxels
from enfilade.ops.tsdf import tsdf_reference, visibility
from enfilade.ops.voxels import VoxelGrid
from enfilade.types import LabelVolume, Sample, collate

SHAPE, SIZE = (40, 24, 44), 0.06
ORIGIN = np.array([-1.1, 0.3, -0.05])


def posed(angles=(-12, 9, 4), height=0.8):
    """A camera that looks along Y, turned by `angles`."""
    pose = np.eye(4)
    pose[:3, :3] = np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]]) @ Rotation.from_euler("xyz", angles, True).as_matrix()
    pose[:3, 3] = 0.05, 0.02, height
    return Camera(70.0, 72.0, 38.0, 31.5, 80, 60, pose)


def frame(seed=0, **changes):
    """A wavy wall with boxes before it and holes, in a volume of boxes of every class."""
    rng = np.random.default_rng(seed)
    v, u = np.mgrid[:60, :80]
    depth = 1.7 + 0.3 * np.sin(u / 9) + 0.2 * np.cos(v / 7)
    labels = (u // 8 + 3 * (v // 10)).astype(np.uint8)  # 0..24 of nyu40
    for i in range(4):
        top, left = rng.integers(0, 45), rng.integers(0, 60)
        depth[top : top + 15, left : left + 20] = rng.uniform(0.6, 1.4)
        labels[top : top + 15, left : left + 20] = 30 + i
    depth[rng.random(depth.shape) < 0.05] = 0
    labels[rng.random(depth.shape) < 0.05] = 255
    volume = np.zeros(SHAPE, np.uint8)
    volume[:, :, 30:] = 255
    for label in range(1, 12):
        low = rng.integers(0, [30, 16, 34])
        high = low + rng.integers(2, 14, 3)
        volume[tuple(slice(a, b) for a, b in zip(low, high))] = label
    normals = rng.normal(size=(60, 80, 3))
    fields = {
        "image": rng.random((60, 80, 3), np.float32),
        "name": "f",
        "labels": labels,
        "depth": depth.astype(np.float32),
        "camera": posed(),
        "instances": np.arange(4800, dtype=np.int32).reshape(60, 80),  # tells where a pixel comes from
        "normals": (normals / np.linalg.norm(normals, axis=-1, keepdims=True)).astype(np.float32),
        "hha": rng.random((60, 80, 3), np.float32),
        "voxels": LabelVolume(volume, ORIGIN, SIZE),
    }
    return Sample(**{**fields, **changes})


# ------------------------------------------------------------------------------------------------------------ encode


@pytest.mark.parametrize("size", [None, (30, 40), (45, 61), (90, 120)])
def test_every_field_is_that_of_the_references(size):
    sample = frame()
    found = encode(sample, image_size=size)
    c, grid = found.completion, grid_of(sample)
    # The fine grid keeps the depth map's own size.
    np.testing.assert_allclose(c.tsdf, tsdf_reference(sample.depth, sample.camera, grid), atol=1e-6)  # float32
    np.testing.assert_array_equal(c.volume, voxels.downsample_labels_reference(sample.voxels.labels))
    masks = voxels.score_masks(c.volume, visibility(sample.depth, sample.camera, grid))
    np.testing.assert_array_equal(c.scored, masks.scored)
    np.testing.assert_array_equal(c.occluded, masks.completion)
    assert 0 < c.occluded.sum() < c.scored.sum() < c.volume.size
    # Pictures and maps are those of the resized frame.
    height, width = size or (60, 80)
    assert found.image.shape == (height, width, 3)
    assert found.hha.shape == (height, width, 3)
    assert (found.camera.height, found.camera.width) == (height, width)
    # Each pixel is the one whose centre is nearest to where its own falls; of two that are equally near, either.
    row, column = np.divmod(found.instances, 80)
    for chosen, source, target in ((row[:, 0], 60, height), (column[0], 80, width)):
        place = (np.arange(target) + 0.5) * source / target - 0.5
        nearest = np.abs(np.arange(source)[:, None] - place).min(0)
        assert (np.abs(chosen - place) <= nearest + 1e-9).all()
    assert (row == row[:, :1]).all()
    assert (column == column[0]).all()
    for kind in ("labels", "depth", "normals"):
        expected = getattr(sample, kind)[row, column]
        expected = mapping("nyu40", "ssc12")[expected] if kind == "labels" else expected
        np.testing.assert_array_equal(getattr(found, kind), expected)
    coarse, camera = grid.coarse(), sample.camera.resized(width, height)
    np.testing.assert_array_equal(c.voxels, voxels.pixel_voxels_reference(found.depth, camera, coarse))
    np.testing.assert_array_equal(c.pixels, voxels.voxel_pixels_reference(camera, coarse, at=0.5)[0])
    assert (c.voxels >= 0).mean() > 0.5
    assert (c.pixels >= 0).mean() > 0.2


def test_pixels_of_a_resized_frame_meet_their_voxels():
    """A pixel of half the size finds the voxel of one of the four that it covers, or one beside it: its depth is one of
    theirs, its ray runs between theirs."""
    full, half = (encode(frame(), image_size=size).completion.voxels for size in (None, (30, 40)))
    shape = tuple(n // 4 for n in SHAPE)
    four = np.stack([full[a::2, b::2] for a in (0, 1) for b in (0, 1)])
    known = (half >= 0) & (four >= 0).all(0)
    assert known.mean() > 0.4
    here = np.stack(np.unravel_index(half[known], shape), -1)
    there = np.stack(np.unravel_index(four[:, known], shape), -1)
    assert (np.abs(there - here).max(-1).min(0) <= 1).all()
    assert (there == here).all(-1).any(0).mean() > 0.95


def test_labels_come_from_their_space():
    sample = frame()
    direct = encode(sample.replace(labels=mapping("nyu40", "ssc12")[sample.labels]), space="ssc12")
    np.testing.assert_array_equal(direct.labels, encode(sample).labels)
    assert (encode(sample).labels == 255).sum() == (sample.labels == 255).sum()


def test_a_frame_without_volume_or_labels():
    """The same TSDF and maps, at a grid that is given; nothing to score."""
    sample = frame()
    whole = encode(sample).completion
    bare = encode(sample.replace(voxels=None, labels=None), grid=grid_of(sample))
    assert bare.labels is None
    assert bare.completion.volume is bare.completion.scored is bare.completion.occluded is None
    for kind in ("tsdf", "voxels", "pixels"):
        np.testing.assert_array_equal(getattr(bare.completion, kind), getattr(whole, kind))


def test_encoded_samples_make_a_batch():
    batch = collate([encode(frame(seed), image_size=(30, 40)) for seed in (0, 1)])
    assert batch.tsdf.shape == (2, 1, *SHAPE)
    assert batch.volume.shape == batch.scored.shape == batch.occluded.shape == batch.pixels.shape == (2, 10, 6, 11)
    assert batch.voxels.shape == batch.labels.shape == batch.depth.shape == (2, 30, 40)
    assert batch.volume.dtype == batch.voxels.dtype == torch.int64


@pytest.mark.parametrize(
    ("change", "options", "sentence"),
    [
        ({"depth": None}, {}, "f: completion needs depth and a camera"),
        ({"camera": None}, {}, "f: completion needs depth and a camera"),
        ({"voxels": None}, {}, "f: without a label volume the grid is not known: place one"),
        ({"camera": dataclasses.replace(posed(), pose=None)}, {}, "f: a label volume needs the pose of the camera"),
        ({}, {"grid": VoxelGrid(ORIGIN, np.eye(4))}, "give a grid for samples without a label volume only"),
        ({}, {"space": "camvid11"}, "no mapping from label space 'camvid11' to 'ssc12'"),
        ({}, {"image_size": (0, 5)}, r"a height and a width of at least 1, not \(0, 5\)"),
        ({"camera": posed().resized(40, 30)}, {}, "depth is 80x60, its camera 40x30"),
        ({"voxels": LabelVolume(np.full(SHAPE, 12, np.uint8), ORIGIN, SIZE)}, {}, r"holds label 12, expected ssc12"),
        ({"voxels": LabelVolume(np.zeros((40, 22, 40), np.uint8), ORIGIN, SIZE)}, {}, "cannot be divided by 4"),
    ],
)
def test_what_cannot_be_encoded_is_told(change, options, sentence):
    with pytest.raises(UserError, match=sentence):
        encode(frame(**change), **options)


# ------------------------------------------------------------------------------------------------------------- masks


def test_masks_of_any_states_are_those_of_score_masks():
    rng = np.random.default_rng(0)
    shape = (6, 5, 7)
    for block in (1, 2, 4):
        share = rng.dirichlet([0.4] * 4, shape)
        states = np.empty([n * block for n in shape], np.uint8)
        for i, j, k in np.ndindex(shape):
            part = tuple(slice(n * block, (n + 1) * block) for n in (i, j, k))
            states[part] = rng.choice(4, (block,) * 3, p=share[i, j, k])
        labels = rng.choice([0, 1, 5, 255], shape).astype(np.uint8)
        scored, occluded = torchssc_masks(labels, states)
        expected = voxels.score_masks(labels, states)
        np.testing.assert_array_equal(scored, expected.scored)
        np.testing.assert_array_equal(occluded, expected.completion)
    with pytest.raises(UserError, match="does not divide into labels"):
        torchssc_masks(labels, states[:-1])


def test_masks_of_the_official_script():
    """By whole arrays, from the plain distance: not free is what is nearer than the truncation, or behind."""
    sample = frame()
    found = encode(sample, masks="sscnet").completion
    plain = tsdf_reference(sample.depth, sample.camera, grid_of(sample), flipped=False)

    def most(mask):
        x, y, z = (n // 4 for n in SHAPE)
        return mask.reshape(x, 4, y, 4, z, 4).mean((1, 3, 5)) > 0.5

    np.testing.assert_array_equal(found.scored, most(plain < 1))
    np.testing.assert_array_equal(found.occluded, most(plain < 0))
    assert (found.occluded <= found.scored).all()
    assert 0 < found.occluded.sum() < found.scored.sum()
    with pytest.raises(UserError, match="no rule for masks 'sscnte'; did you mean 'sscnet'"):
        getattr(encode, "__wrapped__", encode)(sample, masks="sscnte")


def test_masks_of_an_empty_view():
    scored, occluded = sscnet_masks(np.full((8, 8, 8), 0.001, np.float32))
    assert not scored.any()
    assert not occluded.any()


# ------------------------------------------------------------------------------------------------------------ mirror


def test_twice_mirrored_is_as_before():
    sample = encode(frame())
    again = mirror(mirror(sample))
    for kind in ("image", "labels", "depth", "instances", "normals", "hha"):
        np.testing.assert_array_equal(getattr(again, kind), getattr(sample, kind))
    for kind in ("tsdf", "volume", "scored", "occluded", "voxels", "pixels"):
        a, b = getattr(again.completion, kind), getattr(sample.completion, kind)
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(again.camera.pose, sample.camera.pose, atol=1e-12)
    assert again.camera.matrix.tolist() == sample.camera.matrix.tolist()
    np.testing.assert_array_equal(again.voxels.labels, sample.voxels.labels)


def test_the_mirrored_world_is_the_world_mirrored():
    sample, found = frame(), mirror(frame())
    rotation = found.camera.pose[:3, :3]
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(rotation) == pytest.approx(1)  # a camera, not its mirror image
    there = sample.camera.to_world(sample.camera.unproject(sample.depth))
    here = found.camera.to_world(found.camera.unproject(found.depth))[:, ::-1]
    middle = ORIGIN[0] + SIZE * SHAPE[0] / 2
    np.testing.assert_allclose(here[..., 0], 2 * middle - there[..., 0], atol=1e-6)  # points are float32
    np.testing.assert_allclose(here[..., 1:], there[..., 1:], atol=1e-6)
    turned = (found.normals @ rotation.T)[:, ::-1]
    np.testing.assert_allclose(turned, (sample.normals @ sample.camera.pose[:3, :3].T) * [-1, 1, 1], atol=1e-6)
    # So points meet the labels that they met.
    index = [voxels.pixel_voxels(s.depth, s.camera, grid_of(s)) for s in (sample, found)]
    labels = [s.voxels.labels.reshape(-1)[np.maximum(i, 0)] for s, i in zip((sample, found), index)]
    assert ((index[0] >= 0) == (index[1] >= 0)[:, ::-1]).mean() > 0.999  # but for points on the border of voxels
    assert (labels[0] == labels[1][:, ::-1]).mean() > 0.999


def test_mirror_and_encode_in_either_order():
    first, last = encode(mirror(frame())), mirror(encode(frame()))
    np.testing.assert_array_equal(first.completion.volume, last.completion.volume)
    np.testing.assert_array_equal(first.labels, last.labels)
    np.testing.assert_array_equal(first.image, last.image)
    for kind, share in (("voxels", 0.999), ("pixels", 0.995)):  # borders of voxels and of pixels
        assert (getattr(first.completion, kind) == getattr(last.completion, kind)).mean() > share, kind
    # A voxel's sign is taken at its lowest corner, which is another one in the mirror: on borders of what is seen the
    # two differ, and many of these large voxels are on one. Distances are between voxels and do not.
    a, b = first.completion.tsdf, last.completion.tsdf
    assert (np.sign(a) == np.sign(b)).mean() > 0.9
    seen = (np.abs(a) > 0.0011) & (np.abs(b) > 0.0011)
    assert np.isclose(np.abs(a), np.abs(b), atol=1e-6)[seen].mean() > 0.999
    assert (first.completion.scored == last.completion.scored).mean() > 0.9


def test_mirror_of_what_has_little():
    bare = mirror(Sample(image=frame().image))
    np.testing.assert_array_equal(bare.image, frame().image[:, ::-1])
    assert bare.camera is bare.depth is bare.voxels is None
    sample = frame(voxels=None)
    about = mirror(sample).camera.pose
    np.testing.assert_allclose(about[:3, 3], sample.camera.pose[:3, 3])  # about the camera
    unposed = mirror(frame(voxels=None, camera=dataclasses.replace(posed(), pose=None)))
    assert unposed.camera.pose is None
    assert unposed.camera.cx == 79 - 38.0


def test_resizing_to_its_own_size_changes_nothing():
    sample = frame()
    assert resized(sample, (60, 80)) is sample
    assert resized(sample, None) is sample


# ------------------------------------------------------------------------------------------------------ the reader ssc


def small_tree(root, labels):
    from test_ssc import make_tree

    make_tree(root, train=6)
    (root / "nyuv2/label40").mkdir(parents=True)
    for i in (*range(1, 7), 101, 102):
        cv2.imwrite(str(root / f"nyuv2/label40/{i:04d}.png"), labels)
    return root / "nyuv2/label40"


def test_the_reader_takes_pixel_labels_of_nyuv2(tmp_path):
    """0 is void, n is class n - 1 of nyu40; 40 is void too where the files do not tell them apart."""
    stored = np.random.default_rng(0).integers(0, 41, (24, 32)).astype(np.uint8)
    folder = small_tree(tmp_path, stored)
    expected = np.where(stored == 0, 255, mapping("nyu40", "ssc12")[np.maximum(stored, 1) - 1])
    mixed = np.where(stored == 40, 255, expected)
    assert open_dataset("ssc", tmp_path, "trainval")[0].labels is None
    np.testing.assert_array_equal(open_dataset("ssc", tmp_path, "trainval", labels=folder)[2].labels, mixed)
    np.testing.assert_array_equal(open_dataset("ssc", tmp_path, "test", labels=folder)[0].labels, expected)
    (tmp_path / "nyuv2/dataset.json").write_text(json.dumps({"void": "exact"}))
    np.testing.assert_array_equal(open_dataset("ssc", tmp_path, "trainval", labels=folder)[2].labels, expected)
    (tmp_path / "nyuv2/dataset.json").write_text("[")
    with pytest.raises(UserError, match=r"dataset\.json cannot be read"):
        open_dataset("ssc", tmp_path, "trainval", labels=folder)
    (tmp_path / "nyuv2/dataset.json").unlink()
    reader = open_dataset("ssc", tmp_path, "test", labels=folder)
    cv2.imwrite(str(folder / "0101.png"), np.full((24, 32), 41, np.uint8))
    with pytest.raises(UserError, match=r"0101\.png holds label 41: expected 8 bits, 0 \(void\) and 1\.\.40"):
        reader[0]
    cv2.imwrite(str(folder / "0102.png"), stored[:12])
    with pytest.raises(UserError, match=r"0102\.png is 32x12, but .* 32x24"):
        reader[1]
    (folder / "0102.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"label40/0102\.png not found"):
        open_dataset("ssc", tmp_path, "test", labels=folder)


def test_data_check_of_ssc(tmp_path, capsys):
    small_tree(tmp_path, np.full((24, 32), 3, np.uint8))
    assert main(["data", "check", "ssc", "--root", str(tmp_path), "--split", "test"]) == 0
    assert "nyu-ssc/test: 2 samples, 0 broken" in capsys.readouterr().out
    assert main(["data", "check", "ssc", "--root", str(tmp_path), "--option", "source=nyucad"]) == 2
    assert "holds no folder NYUCADtrain" in capsys.readouterr().err


@pytest.mark.shared
def test_the_real_frame(shared_data, capsys):
    (sample,) = open_dataset("ssc", shared_data / "nyu_ssc", "all", depth_only=True)
    stored = ssc.read_npz(shared_data / "nyu_ssc/NYU0003_0000_TSDF.npz")
    c = encode(sample, space="ssc12", image_size=(240, 320)).completion
    assert np.abs(c.tsdf - stored.tsdf).max() < 1e-6  # float32
    known = c.volume != 255
    np.testing.assert_array_equal(np.where(known, c.volume, 0), stored.labels)  # the file has 0 for unknown
    expected = stored.weights & known
    assert (c.scored & expected).sum() / (c.scored | expected).sum() > 0.98  # its rule is not published
    words = ["data", "check", "ssc", "--root", str(shared_data / "nyu_ssc"), "--split", "all"]
    assert main([*words, "--option", "depth_only=true"]) == 0
    assert "1 samples, 0 broken" in capsys.readouterr().out
