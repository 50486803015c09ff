"""The likeliest class of each pixel, from probabilities on a coarser grid."""

from typing import no_type_check

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, UInt8
from numba import njit
from torch import Tensor


def decide(
    probabilities: Float32[np.ndarray, "k h2 w2"], height: int, width: int
) -> tuple[UInt8[np.ndarray, "h w"], Float32[np.ndarray, "h w"]]:
    """The likeliest class and its probability at each pixel of a `height` x `width` image, by bilinear up-sampling
    (align_corners=False) and arg max; ties go to the lower class.

    All classes at full size are never held (12 megapixels times 40 classes are 1.9 GB) and rarely computed: between
    four nodes of the grid that agree on the likeliest class, no other can win, for it is lower at each of them.
    """
    last = np.ascontiguousarray(probabilities.transpose(1, 2, 0))
    return _decide(last, last.argmax(2), *_nodes(height, last.shape[0]), *_nodes(width, last.shape[1]))


def _nodes(size: int, nodes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each of `size` pixels the two nodes of the small grid it lies between, and the second one's weight."""
    position = ((np.arange(size) + 0.5) * (nodes / size) - 0.5).clip(0, nodes - 1)
    first = position.astype(np.int64)
    return first, np.minimum(first + 1, nodes - 1), (position - first).astype(np.float32)


@njit(cache=True, nogil=True)
@no_type_check  # a checked function cannot be compiled
def _decide(p, top, y0, y1, wy, x0, x1, wx):
    classes = np.empty((len(y0), len(x0)), np.uint8)
    best = np.empty((len(y0), len(x0)), np.float32)
    one = np.float32(1)
    for y in range(len(y0)):
        i, j, w = y0[y], y1[y], wy[y]
        for x in range(len(x0)):
            l, r, v = x0[x], x1[x], wx[x]
            a, b, c, d = (one - w) * (one - v), (one - w) * v, w * (one - v), w * v
            k = top[i, l]
            if k == top[i, r] and k == top[j, l] and k == top[j, r]:
                value = a * p[i, l, k] + b * p[i, r, k] + c * p[j, l, k] + d * p[j, r, k]
            else:
                value = np.float32(-1)
                for n in range(p.shape[2]):
                    q = a * p[i, l, n] + b * p[i, r, n] + c * p[j, l, n] + d * p[j, r, n]
                    if q > value:
                        k, value = n, q
            classes[y, x] = k
            best[y, x] = min(value, one)
    return classes, best


def decide_reference(probabilities: Float[Tensor, "k h2 w2"], height: int, width: int) -> tuple[Tensor, Tensor]:
    """`decide` in one line, holding everything at full size."""
    full = F.interpolate(probabilities[None], (height, width), mode="bilinear")[0].max(0)
    return full.indices.to(torch.uint8), full.values
