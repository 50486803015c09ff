"""HHA: planes and rooms whose geometry is known in closed form, and the reference images."""

import cv2
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from enfilade.camera import Camera
from enfilade.ops.hha import gravity, hha, normals

CAMERA = Camera(260.0, 262.0, 158.0, 121.0, 320, 240)
NYU_CAMERA = Camera(518.8579, 519.4696, 325.5824, 253.7362, 640, 480)
FRAMES = ("0003", "0004", "0005", "0006", "0007", "0008", "0010", "0011", "0012", "0013")


def plane(normal, distance, camera=CAMERA):
    """Depth of the plane n . X = distance; 0 where the ray does not meet it in front of the camera."""
    slope = camera.rays() @ np.asarray(normal, float)
    return np.where(slope * distance > 1e-6, distance / np.where(slope == 0, 1, slope), 0.0)


def room(rotation, camera=CAMERA, height=1.4):
    """Depth inside a box-shaped room, seen by a camera `height` m above its floor. `rotation` takes the room's frame
    (x right, y down, z forward) to the camera's."""
    faces = [((0, 1, 0), height), ((0, -1, 0), 1.3), ((1, 0, 0), 1.8), ((-1, 0, 0), 2.1), ((0, 0, 1), 3.5)]
    depths = [plane(rotation.apply(n), d, camera) for n, d in faces]
    return np.min([np.where(d > 0, d, np.inf) for d in depths], axis=0)


def angle(a, b):
    return np.degrees(np.arccos(np.clip(np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b), -1, 1)))


@pytest.mark.parametrize("radius", [1, 3, 10])
@pytest.mark.parametrize("normal", [(0, 0, 1), (0.3, -0.2, 1), (-0.6, 0.5, 0.8)])
def test_normals_of_a_plane(normal, radius):
    normal = np.array(normal) / np.linalg.norm(normal)
    depth = plane(normal, 2.0)
    found = normals(depth, CAMERA, radius)
    assert (depth > 0).all()
    # The fit is exact for a plane, up to the borders: what remains is float32.
    np.testing.assert_allclose(found, np.broadcast_to(-normal, found.shape), atol=2e-6)
    assert ((found * CAMERA.rays()).sum(-1) < 0).all()  # facing the camera


def test_normals_agree_with_a_plain_least_squares_fit():
    rng = np.random.default_rng(0)
    depth = rng.uniform(1, 4, (40, 50))
    depth[rng.random(depth.shape) < 0.3] = 0
    camera = Camera(60.0, 55.0, 22.0, 21.0, 50, 40)
    found, rays = normals(depth, camera, radius=2), camera.rays()
    for y, x in [(0, 0), (20, 25), (39, 49), (11, 0), *rng.integers(0, 40, (20, 2))]:
        window = slice(max(y - 2, 0), y + 3), slice(max(x - 2, 0), x + 3)
        known = depth[window] > 0
        fit = np.linalg.lstsq(rays[window][known], 1 / depth[window][known], rcond=None)[0]
        expected = -fit / np.linalg.norm(fit) * np.sign(fit @ rays[y, x])
        np.testing.assert_allclose(found[y, x], expected if depth[y, x] > 0 else 0, atol=1e-5)  # float32 result


def test_unknown_depth_and_points_without_a_plane_have_no_normal():
    depth = np.zeros((240, 320))
    depth[50, 60] = 2.0  # alone
    depth[100, 100:140] = 2.0  # a line
    depth[np.arange(150, 170), np.arange(150, 170)] = 1.5  # a diagonal
    depth[200:203, 200:203] = 3.0
    depth[201, 201] = np.nan
    found = np.linalg.norm(normals(depth, CAMERA, radius=2), axis=-1)
    expected = np.zeros_like(found)
    expected[200:203, 200:203] = 1
    expected[201, 201] = 0
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_normals_turn_with_the_scene():
    """Turning the world about the optical axis turns the image and the normals: a quarter turn is exact."""
    depth = room(Rotation.from_euler("xyz", [12, 5, -8], degrees=True))
    side = Camera(262.0, 260.0, 239 - 121.0, 158.0, 240, 320)  # (u, v) -> (239 - v, u)
    turned = normals(np.rot90(depth, -1).copy(), side)
    found = normals(depth, CAMERA)
    quarter = np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1]])
    np.testing.assert_allclose(turned, np.rot90(found, -1) @ quarter.T, atol=1e-5)


@pytest.mark.parametrize("tilt", [(0, 0, 0), (20, 0, 0), (-15, 30, 10), (10, -40, -25)])
def test_gravity_of_a_tilted_room(tilt):
    rotation = Rotation.from_euler("xyz", tilt, degrees=True)
    rng = np.random.default_rng(1)
    depth = room(rotation)
    depth += 0.003 * depth**2 * rng.standard_normal(depth.shape)  # a Kinect's noise
    depth[rng.random(depth.shape) < 0.1] = 0
    found = gravity(depth, CAMERA)
    assert np.linalg.norm(found) == pytest.approx(1)
    assert angle(found, rotation.apply([0, 1, 0])) < 1


def test_gravity_keeps_its_start_without_depth():
    empty = np.zeros((240, 320))
    np.testing.assert_array_equal(gravity(empty, CAMERA), [0, 1, 0])
    np.testing.assert_allclose(gravity(empty, CAMERA, start=np.array([0, 0, 2.0])), [0, 0, 1])


@pytest.mark.parametrize("given", [True, False])
def test_encoding_of_a_room(given):
    """Every channel against the room's closed form, with gravity given and estimated."""
    rotation = Rotation.from_euler("xyz", [14, -10, 6], degrees=True)
    camera = Camera(130.0, 131.0, 158.0, 121.0, 320, 240)  # wide enough to see floor and ceiling
    depth, down = room(rotation, camera), rotation.apply([0, 1, 0])
    encoded = hha(depth, camera, gravity=down if given else None).astype(float)

    points = rotation.inv().apply(camera.unproject(depth).reshape(-1, 3).astype(float)).reshape(*depth.shape, 3)
    slack = 0.51 if given else 3.0  # rounding; and half a degree of gravity over three metres
    np.testing.assert_allclose(encoded[..., 0], np.minimum(310 / np.maximum(depth, 1), 255), atol=0.51)
    np.testing.assert_allclose(encoded[..., 1], np.clip(100 * (1.4 - points[..., 1]), 0, 255), atol=slack)

    floor, ceiling = points[..., 1] > 1.4 - 1e-3, points[..., 1] < -1.3 + 1e-3
    wall = (np.abs(points[..., 0] + 2.1) < 1e-3) | (np.abs(points[..., 2] - 3.5) < 1e-3)
    inside = np.ones((7, 7), np.uint8)
    for mask, level in ((floor, 38), (ceiling, 218), (wall & ~floor & ~ceiling, 128)):
        away_from_edges = cv2.erode(mask.astype(np.uint8), inside, borderValue=1).astype(bool)
        assert away_from_edges.sum() > 500
        np.testing.assert_allclose(encoded[away_from_edges, 2], level, atol=1 if given else 2)


def test_floor_out_of_view_puts_the_camera_at_130_cm():
    depth = plane((0, 0, 1), 1.0)  # a wall one metre away: its lowest point lies 45 cm below the camera
    encoded = hha(depth, CAMERA, gravity=np.array([0.0, 1.0, 0.0]))
    assert encoded[121, 0, 1] == 130
    assert encoded[-1, 0, 1] == round(130 - 100 * (239 - 121) / 262)


def test_unknown_depth_is_all_zero_and_defined():
    depth = room(Rotation.identity())
    holes = depth.copy()
    holes[60:90, 100:140] = 0
    holes[5, 7] = np.nan
    encoded, whole = hha(holes, CAMERA), hha(depth, CAMERA)
    unknown = ~(holes > 0)
    assert (encoded[unknown] == 0).all()
    assert (encoded[~unknown][:, 2] >= 38).all()
    far = cv2.dilate(unknown.astype(np.uint8), np.ones((9, 9))) == 0  # no window there sees a hole
    # Gravity is estimated from fewer normals, so levels may move by one.
    assert np.abs(encoded[far].astype(int) - whole[far]).max() <= 1
    assert (hha(np.zeros((240, 320)), CAMERA) == 0).all()
    single = np.zeros((240, 320))
    single[10, 10] = 2.0
    assert hha(single, CAMERA)[10, 10].tolist()[::2] == [155, 128]


def test_depth_of_another_size_is_refused():
    with pytest.raises(ValueError, match="depth is 10x20, its camera 320x240"):
        normals(np.ones((20, 10)), CAMERA)


def official_rotation(shared_data, name):
    """The frame's block in the official file: x right, y forward, z up."""
    blocks = np.loadtxt(shared_data / "nyuv2/meta/camera_rotations_NYU.txt").reshape(-1, 3, 3)
    return blocks[int(name) - 1]


def metres(shared_data, name):
    return cv2.imread(str(shared_data / f"nyuv2/depth_mm/{name}.png"), cv2.IMREAD_UNCHANGED) / 1000


@pytest.mark.shared
def test_gravity_agrees_with_the_official_one(shared_data):
    apart = []
    for name in FRAMES:
        r = official_rotation(shared_data, name)
        apart.append(angle(gravity(metres(shared_data, name), NYU_CAMERA), (-r[2, 0], r[2, 2], -r[2, 1])))
        print(name, f"{apart[-1]:.2f} degrees")
    # Two estimates of one direction, neither the truth: both claim about a degree. A mixed-up axis would show 5-10.
    assert np.median(apart) < 1
    assert max(apart) < 2


@pytest.mark.shared
@pytest.mark.parametrize("name", FRAMES)
def test_reference_images(shared_data, name):
    """The reference camera is the rotation block taken for a camera matrix (see `hha`); MATLAB counts pixels from 1."""
    k = 1000 * official_rotation(shared_data, name)
    camera = Camera(k[0, 0], k[1, 1], k[0, 2] - 1, k[1, 2] - 1, 640, 480)
    reference = cv2.imread(str(shared_data / f"nyuv2/hha/{name}.png"))[..., ::-1].astype(int)
    depth = metres(shared_data, name)
    ours = hha(depth, camera)
    error = np.abs(ours - reference).mean((0, 1))
    # The depth at hand is cut to whole millimetres, the reference's was not. Undo it with a random fraction of one and
    # see what it moves; real truncation is not as random as that on smooth walls, hence half as much again.
    cut = np.random.default_rng(0).uniform(0, 1e-3, depth.shape)
    noise = np.abs(hha(depth + cut, camera).astype(int) - ours).mean((0, 1))
    print(name, "disparity, height, angle:", error.round(3), "; a fraction of a millimetre:", noise.round(3))
    # Plus .01 for a pixel in a hundred that rounds the other way, and .1 cm in height: all heights hang on the lowest
    # point, and it too is cut to a millimetre.
    assert (error <= 1.5 * noise + [0.01, 0.1, 0.01]).all()
