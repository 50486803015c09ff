"""The scoring protocol: what is scored, where, and under which name."""

from types import SimpleNamespace

import numpy as np
import pytest

from enfilade import labels
from enfilade.camera import Camera
from enfilade.errors import UserError
from enfilade.evaluate import score
from enfilade.metrics import NYU_CROP, SegmentationScore
from enfilade.types import IGNORE, Prediction, Sample


class Truth:
    """A reader of `count` seeded frames; class 39 cannot be told from void."""

    name, ignored, score_crop = "truth", (39,), None

    def __init__(self, count=3, size=(24, 32), space="nyu40"):
        self.count, self.size, self.space = count, size, labels.get(space)
        self.names = tuple(map(str, range(count)))

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        rng = np.random.default_rng(i)
        truth = rng.integers(0, len(self.space), self.size).astype(np.uint8)
        truth[:2] = IGNORE
        depth = rng.uniform(1, 5, self.size).astype(np.float32)
        h, w = self.size
        image = np.zeros((h, w, 3), np.float32)
        hha = np.full((h, w, 3), 0.5, np.float32)
        return Sample(image, str(i), truth, depth, Camera.from_fov(w, h), hha=hha)


class Oracle:
    """Answers with the frames' truth in turn, changed by `change`."""

    def __init__(self, reader, change=lambda sample: (sample.labels, sample.depth), space="nyu40", uses=()):
        self.reader, self.change, self.meta, self.next = reader, change, {"space": space}, 0
        self.network, self.asked = SimpleNamespace(uses=uses), []

    def predict(self, image, camera=None, **more):
        sample = self.reader[self.next]
        self.next += 1
        self.asked.append((camera, more))
        chosen, depth = self.change(sample)
        return Prediction(image, np.where(chosen == IGNORE, 0, chosen).astype(np.uint8), depth)


def test_the_truth_scores_perfectly_and_the_protocol_is_told():
    reader = Truth()
    result = score(Oracle(reader), reader, quiet=True)
    assert result["segmentation"]["miou"] == 1
    assert result["depth"]["rmse"] == 0
    protocol = result["protocol"]
    assert protocol["ignored_classes"] == ["otherprop"]
    assert protocol["classes_scored"] == 39
    assert protocol["crop"] == "none"
    assert (protocol["frames"], protocol["of"]) == (3, 3)


def test_scores_are_those_of_the_metric_alone():
    reader = Truth()

    def wrong(sample):
        return (sample.labels + (np.arange(32) % 3 == 0)).clip(0, 39).astype(np.uint8), sample.depth + 1

    result = score(Oracle(reader, wrong), reader, quiet=True)
    alone = SegmentationScore(reader.space.names, (39,))
    for i in range(3):
        truth = reader[i].labels
        answer = np.where(truth == IGNORE, 0, wrong(reader[i])[0]).astype(np.uint8)
        alone.update(answer, np.where(truth == 39, IGNORE, truth).astype(np.uint8))
    assert result["segmentation"]["miou"] == pytest.approx(alone.compute()["miou"], abs=1e-12)
    assert result["depth"]["rmse"] == pytest.approx(1, abs=1e-6)  # float32 truth plus 1


def test_outside_the_crop_nothing_counts():
    reader = Truth(1, (480, 640))
    reader.score_crop = NYU_CROP

    def spoilt(sample):
        chosen, depth = np.zeros((480, 640), np.uint8), np.full((480, 640), 9.0, np.float32)
        chosen[NYU_CROP], depth[NYU_CROP] = sample.labels[NYU_CROP], sample.depth[NYU_CROP]
        return chosen, depth

    inside = score(Oracle(reader, spoilt), reader, quiet=True)
    assert inside["protocol"]["crop"] == "nyu"
    assert inside["segmentation"]["miou"] == 1
    assert inside["depth"]["rmse"] == 0
    everywhere = score(Oracle(reader, spoilt), reader, crop="none", quiet=True)
    assert everywhere["segmentation"]["miou"] < 1
    assert everywhere["depth"]["rmse"] > 1


def test_another_label_space_is_mapped_and_a_class_without_counterpart_is_wrong():
    reader = Truth(2, space="nyu13")
    reader.ignored = ()
    table = labels.mapping("nyu40", "nyu13")

    def fine(sample):
        """For each of the 13 classes, one of the 40 that maps to it."""
        back = np.array([int(np.flatnonzero(table == c)[0]) for c in range(13)] + [0] * 243, np.uint8)
        return back[sample.labels], None

    assert score(Oracle(reader, fine), reader, quiet=True)["segmentation"]["pixel_accuracy"] == 1
    lost = np.flatnonzero(table[:40] == IGNORE)
    if len(lost):
        all_lost = score(Oracle(reader, lambda s: (np.full_like(s.labels, lost[0]), None)), reader, quiet=True)
        assert all_lost["segmentation"]["pixel_accuracy"] == 0


def test_the_camera_and_what_the_network_needs_are_handed_on():
    reader = Truth(1)
    plain, needy = Oracle(reader), Oracle(reader, uses=("hha",))
    score(plain, reader, quiet=True)
    score(needy, reader, quiet=True)
    assert plain.asked[0][0] == reader[0].camera
    assert plain.asked[0][1] == {}
    np.testing.assert_array_equal(needy.asked[0][1]["hha"], reader[0].hha)


def test_a_limit_is_told_and_nothing_to_score_is_an_error():
    reader = Truth(3)
    assert score(Oracle(reader), reader, limit=2, quiet=True)["protocol"]["frames"] == 2
    with pytest.raises(UserError, match="nothing to score"):
        score(Oracle(reader), Truth(0), quiet=True)
    with pytest.raises(UserError, match="no crop 'eigen'"):
        score(Oracle(reader), reader, crop="eigen", quiet=True)
