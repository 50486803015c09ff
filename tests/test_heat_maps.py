"""Pictures of what a CRF has learned."""

import cv2
import numpy as np
import pytest
import torch

from enfilade.heat_maps import CELL, colours, crf_pictures, draw, learned, strongest
from enfilade.ops.crf import DenseCRF, Kernel

NAMES = ("wall", "floor", "pillow", "sofa")


def crf() -> DenseCRF:
    made = DenseCRF(4, kernels=(Kernel(xy=8.0, rgb=13.0), Kernel(xy=8.0, depth=0.2)), weights=(7.0, 4.0))
    with torch.no_grad():
        made.weights[1, 2, 3] += 0.6
        made.compatibility[0, 1] -= 0.25
    return made


def test_strongest_pairs_average_both_directions():
    matrix = np.zeros((4, 4))
    matrix[0, 1], matrix[1, 0], matrix[2, 3] = 1.0, 2.0, 2.5
    matrix[3, 3] = 99  # a class with itself is no pair
    assert strongest(matrix, NAMES, 3)[:2] == [("wall", "floor", 1.5), ("pillow", "sofa", 1.25)]


def test_matrices_are_named_after_what_they_compare():
    assert list(learned(crf())) == ["compatibility mu", "w of colour", "w of depth"]


def test_the_picture_shows_what_was_added(tmp_path):
    text = crf_pictures(crf(), NAMES, tmp_path / "crf.png")
    depth = next(line for line in text.splitlines() if line.startswith("| w of depth |"))
    assert depth.startswith("| w of depth | pillow - sofa +0.300")
    picture = cv2.imread(str(tmp_path / "crf.png"))[..., ::-1]
    red, blue = (178, 24, 43), (33, 102, 172)
    assert (picture == red).all(2).sum() >= (CELL - 1) ** 2  # one cell of w of depth at its largest
    assert (picture == blue).all(2).sum() >= (CELL - 1) ** 2  # one of mu at its least


def test_colours_grow_from_white():
    row = colours(np.array([[-2.0, -1.0, 0.0, 1.0, 2.0]]), 2.0)[0].astype(int)
    assert row[2].tolist() == [255, 255, 255]
    assert row[4, 0] > row[4, 2]  # red
    assert row[0, 2] > row[0, 0]  # blue
    assert (row[3] > row[4]).all()  # paler
    assert (colours(np.zeros((2, 2)), 0.0) == 255).all()


def test_names_must_fit():
    with pytest.raises(ValueError, match="there are 4 names"):
        draw({"mu": np.zeros((3, 3))}, NAMES)
