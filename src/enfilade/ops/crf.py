"""The fully connected CRF with Gaussian edges: mean field on the permutohedral lattice, with every weight learned.

* Mousavian, Pirsiavash, Kosecka: Joint semantic segmentation and depth estimation with deep convolutional networks,
  3DV 2016 (Eq. 5-7: three kernels, each with a matrix of weights, and a matrix of compatibilities)
* Krähenbühl, Koltun: Efficient inference in fully connected CRFs with Gaussian edge potentials, NeurIPS 2011
* Zheng et al.: Conditional random fields as recurrent neural networks, ICCV 2015 (mean field as layers of a network)

The energy of a labelling x of the pixels i, Eq. (5)-(7), with logits u_i = -psi_u as unary term:

    E(x) = sum_i -u_i(x_i) + sum_(i, j) psi_p(x_i, x_j)
    psi_p(l, l') = sum_k (mu w_k)(l, l') K_k(i, j)          K_k(i, j) = exp(-|f_i - f_j|^2 / 2), the features of kernel k

A compatibility mu(l, l') above 0 is a *penalty* on l beside l'; that of Potts is [l != l']. Each w_k is a C x C matrix
that acts on the labels before mu does, a product of matrices as in CRF-as-RNN; the paper starts it at a multiple of
the identity. Mean field repeats

    Q = softmax(z)          z_i <- u_i - mu sum_k w_k sum_(j != i) K_k(i, j) Q_j

from z = u. The kernels are normalised, `normalise="symmetric"` unless told otherwise, so that their sums are about 1.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, no_type_check

import numpy as np
import torch
from jaxtyping import Float, Float32
from numba import njit
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint as recompute

from enfilade.errors import UserError
from enfilade.ops.lattice import Lattice, Normalise, _blur, filter, run_parts
from enfilade.ops.vectors import (
    LANES,
    above,
    add,
    at,
    exp,
    fill,
    highest,
    larger,
    load,
    lowest_bit,
    madd,
    mul,
    store,
    sub,
    total,
)


@dataclass(frozen=True)
class Kernel:
    """Standard deviations of one Gaussian kernel; None leaves a feature out."""

    xy: float  # pixels
    rgb: float | None = None  # of 0..255
    depth: float | None = None  # metres

    def __post_init__(self):
        for name in ("xy", "rgb", "depth"):
            theta = getattr(self, name)
            if theta is not None and not 0 < theta < float("inf"):
                raise UserError(f"a kernel's {name} is a standard deviation above 0, not {theta}")

    def features(
        self, image: Float[Tensor, "b 3 h w"], depth: Float[Tensor, "b h w"] | None = None
    ) -> Float[Tensor, "b d h w"]:
        """The pixels' features x, y, then r, g, b, then depth, each divided by its standard deviation, detached.
        `image` is RGB in [0, 1], `depth` metres.

        Raises UserError where the kernel needs the depth and it is missing or of another size."""
        b, _, h, w = image.shape
        image = image.detach().float()
        y, x = (torch.arange(n, device=image.device, dtype=torch.float32) / self.xy for n in (h, w))
        parts = [x.expand(b, 1, h, w), y[:, None].expand(b, 1, h, w)]
        if self.rgb is not None:
            parts.append(image * (255 / self.rgb))
        if self.depth is not None:
            if depth is None:
                raise UserError(f"the kernel {self} compares depths, and there is no depth: give it, or leave it out")
            if depth.shape != (b, h, w):
                raise UserError(f"the depth is {tuple(depth.shape)}, its image {(b, h, w)}: resize one to the other")
            parts.append(depth.detach().float()[:, None].to(image.device) / self.depth)
        return torch.cat(parts, 1)


PAPER_KERNELS = (Kernel(xy=160.0, rgb=3.0), Kernel(xy=50.0, depth=0.2), Kernel(xy=3.0))  # Section 4
PAPER_WEIGHTS = (7.0, 4.0, 3.0)  # initial ones, times the identity


def potts(classes: int) -> Float[Tensor, "c c"]:
    """The compatibility [l != l']."""
    return 1 - torch.eye(classes)


def build_lattices(
    kernels: Sequence[Kernel], image: Float[Tensor, "b 3 h w"], depth: Float[Tensor, "b h w"] | None = None
) -> list[Lattice]:
    """A lattice for each kernel, for `mean_field`."""
    return [Lattice.build(kernel.features(image, depth)) for kernel in kernels]


def mean_field(
    unary: Float[Tensor, "b c h w"],
    lattices: Sequence[Lattice],
    weights: Float[Tensor, "k c c"],
    compatibility: Float[Tensor, "c c"],
    iterations: int,
    *,
    normalise: Normalise = "symmetric",
    remove_self: bool = True,
    checkpoint: bool = False,
) -> Float[Tensor, "b c h w"]:
    """Logits after some iterations of mean field: the unary logits less the last messages, whose softmax is Q.

    Gradients flow to `unary`, `weights` and `compatibility`. `remove_self` takes a pixel's message to itself off
    (j != i above). `checkpoint` keeps fewer iterations' state for the backward pass and computes the others again.
    Half-precision logits are computed in float32.

    Raises UserError where sizes do not fit together."""
    _check(unary, len(lattices), weights, compatibility, iterations)
    for lattice in lattices:
        if lattice.size != (unary.shape[0], *unary.shape[2:]):
            b, c, h, w = unary.shape
            raise UserError(f"the unary is {c} classes of {(b, h, w)}, and a lattice was built for {lattice.size}")
    dtype = unary.dtype if unary.dtype == torch.float64 else torch.float32
    unary, matrices = unary.to(dtype), compatibility.to(dtype) @ weights.to(dtype)
    if not iterations or not lattices:
        return unary
    if unary.device.type == "cpu" and unary.dtype == torch.float32:
        keep = torch.is_grad_enabled() and (unary.requires_grad or matrices.requires_grad)
        joint = _join(lattices, normalise, remove_self)
        return _MeanField.apply(unary, matrices, joint, iterations, keep, checkpoint)
    return _mean_field_torch(unary, lattices, matrices, iterations, normalise, remove_self, checkpoint)


def _check(unary, kernels: int, weights, compatibility, iterations: int) -> None:
    c = unary.shape[1]
    if tuple(weights.shape) != (kernels, c, c) or tuple(compatibility.shape) != (c, c):
        raise UserError(
            f"{kernels} kernels over {c} classes take weights of {(kernels, c, c)} and a compatibility of {(c, c)}, "
            f"not {tuple(weights.shape)} and {tuple(compatibility.shape)}"
        )
    if iterations < 0:
        raise UserError(f"the number of iterations is 0 or more, not {iterations}")


def _mean_field_torch(
    unary: Tensor,
    lattices: Sequence[Lattice],
    matrices: Tensor,
    iterations: int,
    normalise: Normalise,
    remove_self: bool,
    checkpoint: bool,
) -> Tensor:
    """`mean_field` step by step, each as torch operations or a filter: for every device and type."""
    own = [_own_weight(lattice, normalise).to(unary.dtype) for lattice in lattices] if remove_self else None

    def step(logits, unary, matrices):
        q = logits.softmax(1)
        for k, lattice in enumerate(lattices):
            message = filter(q, lattice, normalise=normalise)
            if own:
                message = message - own[k] * q
            unary = unary - torch.einsum("lm,bmhw->blhw", matrices[k], message)
        return unary

    logits = unary
    for _ in range(iterations):
        if checkpoint and torch.is_grad_enabled():
            logits: Any = recompute(step, logits, unary, matrices, use_reentrant=False)
        else:
            logits = step(logits, unary, matrices)
    return logits


def _own_weight(lattice: Lattice, normalise: Normalise) -> Float[Tensor, "b 1 h w"]:
    """K_ii after normalisation, which is the same for "row" and "symmetric"."""
    return lattice.self_weight if normalise == "none" else lattice.self_weight / lattice.norm


def mean_field_reference(
    unary: Float[Tensor, "b c h w"],
    features: Sequence[Float[Tensor, "b _ h w"]],
    weights: Float[Tensor, "k c c"],
    compatibility: Float[Tensor, "c c"],
    iterations: int,
    *,
    normalise: Normalise = "symmetric",
    remove_self: bool = True,
) -> Float[Tensor, "b c h w"]:
    """What `mean_field` approximates, with exact Gaussians over all pairs of pixels: time and memory grow with the
    square of their number. `features` holds `Kernel.features` of each kernel."""
    _check(unary, len(features), weights, compatibility, iterations)
    kernels = []
    for feature in features:
        f = feature.flatten(2).mT.to(unary.dtype)
        kernel = torch.exp(-0.5 * (f[:, :, None] - f[:, None]).square().sum(-1))
        norm = kernel.sum(2, keepdim=True)
        if normalise != "none":
            kernel = kernel / norm if normalise == "row" else kernel / (norm * norm.mT).sqrt()
        if remove_self:
            kernel = kernel * (1 - torch.eye(kernel.shape[1]).to(kernel))
        kernels.append(kernel)
    u = unary.flatten(2).mT
    z = u
    for _ in range(iterations):
        q = z.softmax(-1)  # b n c
        z = u - sum(kernel @ q @ w.mT for kernel, w in zip(kernels, weights)) @ compatibility.mT
    return z.mT.reshape(unary.shape)


class DenseCRF(nn.Module):
    """A dense CRF as the last layer of a network, its weights and compatibilities learned.

    It starts as the paper's: `weights` times the identity, compatibilities of Potts. `train_iterations` of mean field
    in training, `iterations` otherwise."""

    def __init__(
        self,
        classes: int,
        kernels: Sequence[Kernel] = PAPER_KERNELS,
        weights: Sequence[float] = PAPER_WEIGHTS,
        iterations: int = 10,
        train_iterations: int = 5,
        checkpoint: bool = False,
    ):
        super().__init__()
        if len(weights) != len(kernels):
            raise UserError(f"{len(kernels)} kernels take as many initial weights, not {len(weights)}")
        self.kernels = tuple(kernels)
        self.iterations, self.train_iterations, self.checkpoint = iterations, train_iterations, checkpoint
        self.weights = nn.Parameter(torch.tensor(weights)[:, None, None] * torch.eye(classes))
        self.compatibility = nn.Parameter(potts(classes))

    def forward(
        self,
        logits: Float[Tensor, "b c h w"],
        image: Float[Tensor, "b 3 h w"],
        depth: Float[Tensor, "b h w"] | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """Refined logits. `image` is RGB in [0, 1] and `depth` metres, both of the logits' size and taken as data."""
        if logits.shape[2:] != image.shape[2:]:
            raise UserError(
                f"the logits are {tuple(logits.shape[2:])}, the image {tuple(image.shape[2:])}: resize one to the other"
            )
        lattices = build_lattices(self.kernels, image, depth)
        iterations = self.train_iterations if self.training else self.iterations
        return mean_field(
            logits, lattices, self.weights, self.compatibility, iterations, checkpoint=self.checkpoint
        )


def refine(
    scores: Any,
    image: Any,
    depth: Any = None,
    *,
    kernels: Sequence[Kernel] | None = None,
    weights: Sequence[float] | None = None,
    iterations: int = 10,
    logits: bool = False,
) -> Any:
    """Probabilities of any network's `scores`, after the CRF with compatibilities of Potts.

    Arrays of numpy: scores k h w, image h w 3 (RGB, uint8 or float in [0, 1]), depth h w (metres). Tensors: scores
    (b) k h w, image (b) 3 h w in [0, 1], depth (b) h w. Scores are probabilities, or with `logits` the input of a
    softmax. The result has the scores' kind, shape and device, in float32.

    `kernels` are the paper's with their weights, those that need depth only where there is one."""
    if kernels is None:
        pairs = [(k, w) for k, w in zip(PAPER_KERNELS, PAPER_WEIGHTS) if depth is not None or k.depth is None]
        kernels = [k for k, _ in pairs]
        weights = [w for _, w in pairs] if weights is None else weights
    if weights is None or len(weights) != len(kernels):
        raise UserError(f"{len(kernels)} kernels take as many weights, not {0 if weights is None else len(weights)}")
    is_array = isinstance(scores, np.ndarray)
    u = torch.as_tensor(scores)
    if u.ndim not in (3, 4) or (is_array and u.ndim == 4):
        raise UserError(f"scores are k h w{'' if is_array else ' or b k h w'}, not {tuple(u.shape)}")
    single = u.ndim == 3
    u = (u[None] if single else u).float()
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3:
            raise UserError(f"an image array is h w 3, not {image.shape}")
        scale = 255 if image.dtype == np.uint8 else 1
        image = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1) / scale
    image = (image[None] if image.ndim == 3 else image).to(u)
    if depth is not None:
        depth = torch.as_tensor(depth)
        depth = (depth[None] if depth.ndim == 2 else depth).to(u)
    if image.shape[2:] != u.shape[2:] or len(image) != len(u):
        raise UserError(f"scores are {tuple(u.shape)}, the image {tuple(image.shape)}: resize one to the other")
    with torch.no_grad():
        u = u if logits else u.clamp_min(1e-7).log()
        matrices = torch.tensor(weights, dtype=u.dtype)[:, None, None] * torch.eye(u.shape[1])
        z = mean_field(
            u, build_lattices(kernels, image, depth), matrices.to(u), potts(u.shape[1]).to(u), iterations
        )
        q = z.softmax(1)
    q = q[0] if single else q
    return q.numpy() if is_array else q


# ------------------------------------------------------------------------------------------------- compiled for CPUs
#
# Points and vertices are rows of channels, padded to whole vectors. All kernels share one table of vertices and one
# list of corners of a point, so a sweep over the points does not know how many kernels there are. Messages are
# multiplied by -mu w on the vertices, of which there are several times fewer than points. A sweep takes a few points
# from the messages to Q and on to the next splat while their rows are in the first-level cache; Q goes to memory for
# a point's message to itself and for the backward pass only.

_TILE = 64  # points
_START, _RESUME, _STEP, _END = range(4)  # sweeps: Q from the unary; the given Q; Q from the messages; logits from them
_NEGLIGIBLE = 1e-5  # of a logit: what a point's message to itself leaves out, for each label
_NEGLIGIBLE_SHARE = 2e-6  # of the gradient of a point's logits: the same in the backward pass


@dataclass(frozen=True)
class _Joint:
    """Several lattices as one: n points with `corners` vertices each."""

    size: tuple[int, int, int]
    corners: int
    offsets: np.ndarray  # n * corners, numbers of rows
    inner: np.ndarray  # n * corners, the weights of the splat
    outer: np.ndarray  # and those of the slice, normalised, with the gain
    own: np.ndarray  # n k: K_ii; n 0 where it stays in
    rows: list[tuple[int, int]]  # of each kernel, the first and the one after the last
    neighbours: list[np.ndarray]  # as in Lattice, counted from the kernel's first row

    def points(self, function: Callable[[int, int, int], Any]) -> None:
        """function(thread, start, stop) over the points."""
        b, h, w = self.size
        run_parts(function, b * h * w)

    def spread(self, function: Callable[[int, int, int, int], Any]) -> None:
        """function(thread, kernel, start, stop) over the rows, where each thread takes its share of every kernel."""
        threads = torch.get_num_threads()

        def part(thread, i, j):
            for k, (start, stop) in enumerate(self.rows):
                function(thread, k, start + (stop - start) * i // threads, start + (stop - start) * j // threads)

        run_parts(part, threads)


def _join(lattices: Sequence[Lattice], normalise: Normalise, remove_self: bool) -> _Joint:
    b, h, w = lattices[0].size
    n, corners = b * h * w, sum(lattice.dimension + 1 for lattice in lattices)
    offsets, inner = np.empty((n, corners), np.int32), np.empty((n, corners), np.float32)
    outer = np.empty_like(inner) if normalise == "row" else inner
    own = np.empty((n, len(lattices) if remove_self else 0), np.float32)
    rows, corner, row = [], 0, 0
    for k, lattice in enumerate(lattices):
        norm = torch.ones(n) if normalise == "none" else lattice.norm.reshape(-1)
        after = lattice.gain / norm
        before = torch.ones(n) if normalise == "row" else after.sqrt()
        after = after if normalise == "row" else before
        arrays = [x.numpy() for x in (lattice.offsets, lattice.weights, before, after)]

        def place(_, start, stop, arrays=arrays, corner=corner, row=row):
            _place(*arrays, corner, row, offsets, inner, outer, start, stop)

        run_parts(place, n)
        if remove_self:
            own[:, k] = _own_weight(lattice, normalise).reshape(-1).numpy()
        rows.append((row, row + lattice.vertices))
        corner, row = corner + lattice.dimension + 1, row + lattice.vertices
    neighbours = [lattice.neighbours.numpy() for lattice in lattices]
    return _Joint((b, h, w), corners, offsets.reshape(-1), inner.reshape(-1), outer.reshape(-1), own, rows, neighbours)


class _MeanField(torch.autograd.Function):
    """`_mean_field_torch` as compiled loops, once differentiable."""

    @staticmethod
    @no_type_check
    def forward(ctx, unary, matrices, joint, iterations, keep, checkpoint):
        work = _Forward(unary, matrices, joint)
        # What the backward pass computes again at a time, from the Q at its start.
        segment = math.isqrt(max(iterations - 1, 0)) + 1 if checkpoint else 1
        before = scratch = None
        states = []
        for t in range(iterations):
            if keep and t % segment == 0:
                after = np.empty_like(work.unary)
            else:
                after = scratch = np.empty_like(work.unary) if scratch is None else scratch
            blurred = work.step(_STEP if t else _START, before, after, keep=keep and not checkpoint)
            if after is not scratch:
                states.append((after, blurred))
            before = after
        if keep:
            ctx.save_for_backward(unary, matrices)
            ctx.work = states, joint, iterations, segment, checkpoint
        return work.end(before)

    @staticmethod
    @once_differentiable
    @no_type_check
    def backward(ctx, gradient):
        unary, matrices = ctx.saved_tensors
        states, joint, iterations, segment, checkpoint = ctx.work
        back = _Backward(gradient, matrices, joint, learn=ctx.needs_input_grad[1])
        for i in reversed(range(len(states))):
            part = states[i : i + 1]
            if checkpoint:
                again, q = _Forward(unary, matrices, joint), states[i][0]
                part = [(q, again.step(_RESUME, q, q, keep=True))]
                for _ in range(min(segment, iterations - i * segment) - 1):
                    after = np.empty_like(q)
                    part.append((after, again.step(_STEP, part[-1][0], after, keep=True)))
            while part:
                back.step(*part.pop(), last=i == 0 and not part)
        return back.unary(), back.matrices(), None, None, None, None


class _Tables:
    """Rows of the vertices: splatted onto, blurred, and multiplied by matrices."""

    def __init__(self, joint: _Joint, channels: int):
        self.joint, self.channels, self.width = joint, channels, -(-channels // LANES) * LANES
        self.size = joint.rows[-1][1] * self.width
        self.splat = [np.zeros(self.size, np.float32) for _ in range(torch.get_num_threads())]
        self.spare, self.result = np.empty(self.size, np.float32), np.empty(self.size, np.float32)
        self.blurred = None

    def blur(self, *, keep: bool = False, reverse: bool = False) -> np.ndarray:
        """The rows after all blurs, with `keep` in an array of their own. Overwrites splat[0]."""
        if keep or self.blurred is None:
            self.blurred = np.empty(self.size, np.float32)
        for i in range(max(map(len, self.joint.neighbours))):
            source, other = (self.splat[0], self.spare) if i % 2 == 0 else (self.spare, self.splat[0])

            def part(_, k, start, stop, i=i, source=source, other=other):
                neighbours, (first, end) = self.joint.neighbours[k], self.joint.rows[k]
                if (left := len(neighbours) - 1 - i) >= 0:
                    rows, target = slice(first * self.width, end * self.width), other if left else self.blurred
                    along = neighbours[left if reverse else i]
                    _blur(source[rows], target[rows], along, self.width, start - first, stop - first)

            self.joint.spread(part)
        return self.blurred

    def collect(self) -> None:
        """Adds the threads' splats up in splat[0] and clears the others."""
        for other in self.splat[1:]:
            run_parts(lambda _, start, stop, other=other: _move(self.splat[0], other, start, stop), self.size)

    def multiply(self, matrices: np.ndarray, simple: tuple[np.ndarray, np.ndarray] | None) -> None:
        """result = blurred rows times their kernel's matrix, -(a I + b 1 1^T) where it is `simple`. Clears splat[0]."""

        def part(_, k, start, stop):
            if simple is None:
                _multiply(self.blurred, matrices[k].reshape(-1), self.channels, self.width, start, stop, self.result)
            else:
                _scale(self.blurred, -simple[0][k], -simple[1][k], self.width, start, stop, self.result)
            self.splat[0][start * self.width : stop * self.width] = 0

        self.joint.spread(part)


class _Matrices:
    """M = mu w = a I + b 1 1^T + rest. There is no rest from multiples of the identity and Potts."""

    def __init__(self, matrices: Tensor, width: int):
        m = matrices.detach().numpy()
        c = m.shape[-1]
        self.count, self.width = len(m), width
        diagonal = m.diagonal(axis1=1, axis2=2)
        self.b = (m.sum((1, 2)) - diagonal.sum(1)) / np.float32(max(c * (c - 1), 1))
        self.a = diagonal.mean(1) - self.b
        rest = m - self.a[:, None, None] * np.eye(c, dtype=np.float32) - self.b[:, None, None]
        rest[np.abs(rest).max((1, 2)) <= 1e-6 * np.abs(m).max((1, 2))] = 0
        self.reach = np.abs(rest).max((1, 2))
        self.simple = None if rest.any() else (self.a, self.b)
        self.columns, self.rest = self._padded(-m.transpose(0, 2, 1)), self._padded(-rest.transpose(0, 2, 1))
        self.rows = self._padded(-m)

    def _padded(self, m: np.ndarray) -> np.ndarray:
        return np.pad(m, ((0, 0), (0, self.width - m.shape[1]), (0, self.width - m.shape[2])))


class _Forward:
    def __init__(self, unary: Tensor, matrices: Tensor, joint: _Joint):
        self.joint, self.shape = joint, unary.shape
        self.tables = _Tables(joint, unary.shape[1])
        self.m = _Matrices(matrices, self.tables.width)
        self.unary = _rows(unary, joint, -math.inf)
        self.logits = np.empty((*unary.shape[:2], unary.shape[2] * unary.shape[3]), np.float32)

    def _sweep(self, mode: int, before: np.ndarray, after: np.ndarray) -> None:
        joint, tables, m = self.joint, self.tables, self.m

        def part(thread, start, stop):
            _sweep(
                *(mode, self.unary, before, after, tables.result, tables.splat[thread], self.logits),
                *(joint.offsets, joint.inner, joint.outer, joint.own),
                *(m.a, m.b, m.rest.reshape(-1), m.reach, start, stop),
            )

        joint.points(part)

    def step(self, mode: int, before: np.ndarray | None, after: np.ndarray, *, keep: bool) -> np.ndarray:
        """To the next Q, `after`, from the one before and its messages, and to the messages of the next. Returns the
        blurred rows, in an array of their own with `keep`."""
        self._sweep(mode, after if before is None else before, after)
        self.tables.collect()
        blurred = self.tables.blur(keep=keep)
        self.tables.multiply(self.m.columns, self.m.simple)
        return blurred

    def end(self, before: np.ndarray) -> Tensor:
        self._sweep(_END, before, before)
        return torch.from_numpy(self.logits).view(self.shape)


class _Backward:
    def __init__(self, gradient: Tensor, matrices: Tensor, joint: _Joint, learn: bool):
        self.joint, self.shape, self.learn = joint, gradient.shape, learn
        self.tables = _Tables(joint, gradient.shape[1])
        self.m = _Matrices(matrices, self.tables.width)
        self.gradient = _rows(gradient, joint, 0.0)  # of the logits, then of those one iteration before, ...
        self.sum = self.gradient.copy()
        shape = len(self.tables.splat), self.m.count, self.tables.width, self.tables.width
        self.products = np.zeros(shape, np.float32)  # of each thread; of each M the transposed gradient
        self._sweep(_RESUME, self.gradient)

    def _sweep(self, mode: int, q: np.ndarray) -> None:
        joint, tables, m = self.joint, self.tables, self.m

        def part(thread, start, stop):
            _sweep_back(
                *(mode, self.gradient, self.sum, q, tables.result, tables.splat[thread], self.shape[1]),
                *(joint.offsets, joint.inner, joint.outer, joint.corners, joint.own),
                *(m.a, m.b, m.rest.reshape(-1), m.reach, self.learn, self.products[thread].reshape(-1), start, stop),
            )

        joint.points(part)

    def step(self, q: np.ndarray, blurred: np.ndarray, last: bool) -> None:
        """From the gradient of the logits to that of the logits before, whose softmax is `q`."""
        tables, width = self.tables, self.tables.width
        tables.collect()
        if self.learn:

            def part(thread, k, start, stop):
                _correlate(blurred, tables.splat[0], width, start, stop, self.products[thread, k].reshape(-1))

            self.joint.spread(part)
        tables.blur(reverse=True)
        tables.multiply(self.m.rows, self.m.simple)
        self._sweep(_END if last else _STEP, q)

    def unary(self) -> Tensor:
        b, c, h, w = self.shape
        out = np.empty((b, c, h * w), np.float32)
        self.joint.points(lambda _, start, stop: _from_rows(self.sum, out, start, stop))
        return torch.from_numpy(out).view(self.shape)

    def matrices(self) -> Tensor | None:
        c = self.shape[1]
        return torch.from_numpy(self.products.sum(0)[:, :c, :c].transpose(0, 2, 1).copy()) if self.learn else None


def _rows(values: Tensor, joint: _Joint, padding: float) -> Float32[np.ndarray, "_"]:
    """b c h w as rows of channels."""
    b, c, h, w = values.shape
    array = np.ascontiguousarray(values.detach().reshape(b, c, h * w).numpy())
    out = np.empty(b * h * w * (-(-c // LANES) * LANES), np.float32)
    joint.points(lambda _, start, stop: _to_rows(array, np.float32(padding), out, start, stop))
    return out


@njit(cache=True, nogil=True)
@no_type_check
def _to_rows(values, padding, rows, start, stop):
    channels, p = values.shape[1:]
    width = (channels + LANES - 1) // LANES * LANES
    while start < stop:
        image = start // p
        count = min(_TILE, stop - start, (image + 1) * p - start)
        for c in range(channels):
            source = values[image, c, start - image * p : start - image * p + count]
            for i in range(count):
                rows[(start + i) * width + c] = source[i]
        for i in range(start, start + count):
            rows[i * width + channels : (i + 1) * width] = padding
        start += count


@njit(cache=True, nogil=True)
@no_type_check
def _from_rows(rows, values, start, stop):
    channels, p = values.shape[1:]
    width = (channels + LANES - 1) // LANES * LANES
    while start < stop:
        image = start // p
        count = min(_TILE, stop - start, (image + 1) * p - start)
        for c in range(channels):
            target = values[image, c, start - image * p : start - image * p + count]
            for i in range(count):
                target[i] = rows[(start + i) * width + c]
        start += count


@njit(cache=True, nogil=True)
@no_type_check
def _place(offsets, weights, before, after, corner, row, all_offsets, inner, outer, start, stop):
    """One lattice's corners among those of all."""
    for i in range(start, stop):
        for k in range(offsets.shape[1]):
            all_offsets[i, corner + k] = offsets[i, k] + row
            inner[i, corner + k] = weights[i, k] * before[i]
            outer[i, corner + k] = weights[i, k] * after[i]


@njit(cache=True, nogil=True)
@no_type_check
def _move(target, source, start, stop):
    for i in range(start, stop):
        target[i] += source[i]
        source[i] = 0


@njit(cache=True, nogil=True)
@no_type_check
def _gather(table, width, offsets, weights, corners, start, count, tile):
    """Adds to the rows of the tile what points start.. slice from the table. Five vectors at a time keep the sums in
    registers and the arithmetic busy."""
    for i in range(count):
        o, j = (start + i) * corners, i * width
        end, back = j + width, j
        while j + 5 * LANES <= end:
            a0, a1, a2 = load(tile, j), load(tile, j + LANES), load(tile, j + 2 * LANES)
            a3, a4 = load(tile, j + 3 * LANES), load(tile, j + 4 * LANES)
            for k in range(o, o + corners):
                row, weight = at(offsets, k) * width + (j - back), at(weights, k)
                a0, a1 = madd(a0, weight, load(table, row)), madd(a1, weight, load(table, row + LANES))
                a2 = madd(a2, weight, load(table, row + 2 * LANES))
                a3 = madd(a3, weight, load(table, row + 3 * LANES))
                a4 = madd(a4, weight, load(table, row + 4 * LANES))
            store(tile, j, a0)
            store(tile, j + LANES, a1)
            store(tile, j + 2 * LANES, a2)
            store(tile, j + 3 * LANES, a3)
            store(tile, j + 4 * LANES, a4)
            j += 5 * LANES
        while j + 2 * LANES <= end:
            a0, a1 = load(tile, j), load(tile, j + LANES)
            for k in range(o, o + corners):
                row, weight = at(offsets, k) * width + (j - back), at(weights, k)
                a0, a1 = madd(a0, weight, load(table, row)), madd(a1, weight, load(table, row + LANES))
            store(tile, j, a0)
            store(tile, j + LANES, a1)
            j += 2 * LANES
        if j < end:
            a0 = load(tile, j)
            for k in range(o, o + corners):
                a0 = madd(a0, at(weights, k), load(table, at(offsets, k) * width + (j - back)))
            store(tile, j, a0)


@njit(cache=True, nogil=True)
@no_type_check
def _scatter(tile, width, offsets, weights, corners, start, count, table):
    """Splats the rows of the tile."""
    for i in range(count):
        o = (start + i) * corners
        for k in range(o, o + corners):
            row, weight = at(offsets, k) * width, at(weights, k)
            for j in range(i * width, (i + 1) * width, LANES):
                store(table, row, madd(load(table, row), weight, load(tile, j)))
                row += LANES


@njit(cache=True, nogil=True)
@no_type_check
def _softmax(tile, width, count, rows, start):
    """The rows of the tile, in place, and rows start.. of the others."""
    for i in range(count):
        first, end = i * width, (i + 1) * width
        ahead = start * width
        top = load(tile, first)
        for j in range(first + LANES, end, LANES):
            top = larger(top, load(tile, j))
        top, sums = fill(highest(top)), fill(np.float32(0))
        for j in range(first, end, LANES):
            e = exp(sub(load(tile, j), top))
            store(tile, j, e)
            sums = add(sums, e)
        share = fill(np.float32(1) / total(sums))
        for j in range(first, end, LANES):
            e = mul(load(tile, j), share)
            store(tile, j, e)
            store(rows, ahead + j, e)


@njit(cache=True, nogil=True)
@no_type_check
def _return_own(tile, width, count, q, start, own, a, b, rest, reach):
    """Adds own_k M_k q to the logits in the tile, for what sum_j K_ij Q_j holds of Q_i. `rest` is negative."""
    for i in range(count):
        first, point = i * width, (start + i) * width
        along, all_ = np.float32(0), np.float32(0)
        for k in range(own.shape[1]):
            along += own[start + i, k] * a[k]
            all_ += own[start + i, k] * b[k]
        equal = fill(all_)
        for j in range(0, width, LANES):
            store(tile, first + j, madd(add(load(tile, first + j), equal), along, load(q, point + j)))
        for k in range(own.shape[1]):
            weight = own[start + i, k]
            if weight * reach[k] <= _NEGLIGIBLE:
                continue
            bound = np.float32(_NEGLIGIBLE) / (weight * reach[k])
            for c in range(0, width, LANES):
                bits = above(load(q, point + c), bound)
                while bits:
                    label = c + lowest_bit(bits)
                    bits &= bits - 1
                    factor, column = -weight * q[point + label], (k * width + label) * width
                    for j in range(first, first + width, LANES):
                        store(tile, j, madd(load(tile, j), factor, load(rest, column)))
                        column += LANES


@njit(cache=True, nogil=True)
@no_type_check
def _sweep(
    mode, unary, before, after, table, target, logits, offsets, inner, outer, own, a, b, rest, reach, start, stop
):
    channels, p = logits.shape[1:]
    width = (channels + LANES - 1) // LANES * LANES
    corners = len(offsets) // (logits.shape[0] * p)
    tile = np.empty(_TILE * width, np.float32)
    while start < stop:
        image = start // p
        count = min(_TILE, stop - start, (image + 1) * p - start)
        source = before if mode == _RESUME else unary
        for j in range(0, count * width, LANES):
            store(tile, j, load(source, start * width + j))
        if mode == _STEP or mode == _END:
            _gather(table, width, offsets, outer, corners, start, count, tile)
            if own.shape[1]:
                _return_own(tile, width, count, before, start, own, a, b, rest, reach)
        if mode == _END:
            for c in range(channels):
                out = logits[image, c, start - image * p : start - image * p + count]
                for i in range(count):
                    out[i] = tile[i * width + c]
        else:
            if mode != _RESUME:
                _softmax(tile, width, count, after, start)
            _scatter(tile, width, offsets, inner, corners, start, count, target)
        start += count


@njit(cache=True, nogil=True)
@no_type_check
def _return_own_back(tile, width, count, g, q, start, own, a, b, rest, reach, learn, products):
    """The transposed `_return_own`: from the gradient g of the logits to that of Q, in the tile, and of the M."""
    for i in range(count):
        first, point = i * width, (start + i) * width
        along, all_ = np.float32(0), np.float32(0)
        for k in range(own.shape[1]):
            along += own[start + i, k] * a[k]
            all_ += own[start + i, k] * b[k]
        sums = fill(np.float32(0))
        for j in range(point, point + width, LANES):
            sums = add(sums, load(g, j))
        equal = fill(all_ * total(sums))
        for j in range(0, width, LANES):
            store(tile, first + j, madd(add(load(tile, first + j), equal), along, load(g, point + j)))
        for k in range(own.shape[1]):
            weight = own[start + i, k]
            most = weight * max(reach[k], np.float32(1) if learn else np.float32(0))
            if most <= _NEGLIGIBLE_SHARE:
                continue
            bound = np.float32(_NEGLIGIBLE_SHARE) / most
            for c in range(0, width, LANES):
                bits = above(load(q, point + c), bound)
                while bits:
                    label = c + lowest_bit(bits)
                    bits &= bits - 1
                    column = (k * width + label) * width
                    factor = weight * q[point + label]
                    if reach[k]:
                        sums = fill(np.float32(0))
                        for j in range(0, width, LANES):
                            sums = add(sums, mul(load(rest, column + j), load(g, point + j)))
                        tile[first + label] -= weight * total(sums)
                    if learn:
                        for j in range(0, width, LANES):
                            store(products, column + j, madd(load(products, column + j), factor, load(g, point + j)))


@njit(cache=True, nogil=True)
@no_type_check
def _sweep_back(
    mode,
    g,
    sums,
    q,
    table,
    target,
    channels,
    offsets,
    inner,
    outer,
    corners,
    own,
    a,
    b,
    rest,
    reach,
    learn,
    products,
    start,
    stop,
):
    width = (channels + LANES - 1) // LANES * LANES
    tile = np.empty(_TILE * width, np.float32)
    while start < stop:
        count = min(_TILE, stop - start)
        if mode == _RESUME:
            for j in range(0, count * width, LANES):
                store(tile, j, load(g, start * width + j))
        else:
            tile[:] = 0
            _gather(table, width, offsets, inner, corners, start, count, tile)
            if own.shape[1]:
                _return_own_back(tile, width, count, g, q, start, own, a, b, rest, reach, learn, products)
            # Softmax: the gradient of the logits is q (dq - <q, dq>).
            for i in range(count):
                first, ahead = i * width, start * width
                mean = fill(np.float32(0))
                for j in range(first, first + width, LANES):
                    mean = add(mean, mul(load(q, ahead + j), load(tile, j)))
                mean = fill(total(mean))
                for j in range(first, first + width, LANES):
                    x = mul(load(q, ahead + j), sub(load(tile, j), mean))
                    store(tile, j, x)
                    store(g, ahead + j, x)
                    store(sums, ahead + j, add(load(sums, ahead + j), x))
        if mode != _END:
            _scatter(tile, width, offsets, outer, corners, start, count, target)
        start += count


@njit(cache=True, nogil=True)
@no_type_check
def _scale(source, a, b, width, start, stop, target):
    """target = source (a I + b 1 1^T), of rows."""
    for r in range(start * width, stop * width, width):
        sums = fill(np.float32(0))
        for j in range(r, r + width, LANES):
            sums = add(sums, load(source, j))
        sums = fill(b * total(sums))
        for j in range(r, r + width, LANES):
            store(target, j, madd(sums, a, load(source, j)))


@njit(cache=True, nogil=True)
@no_type_check
def _multiply(source, matrix, channels, width, start, stop, target):
    """target = source matrix, of rows: four rows by two vectors at a time, what the registers hold."""
    zero = fill(np.float32(0))
    row = start
    while row < stop:
        # Where fewer than four are left, the last stands in for those that lack.
        r0, r1, r2, r3 = row, min(row + 1, stop - 1), min(row + 2, stop - 1), min(row + 3, stop - 1)
        r0, r1, r2, r3 = r0 * width, r1 * width, r2 * width, r3 * width
        for j in range(0, width, 2 * LANES):
            two = j + LANES < width
            i = j + LANES if two else j
            a0, a1, a2, a3, b0, b1, b2, b3 = zero, zero, zero, zero, zero, zero, zero, zero
            for c in range(channels):
                x, y = load(matrix, c * width + j), load(matrix, c * width + i)
                s0, s1, s2, s3 = at(source, r0 + c), at(source, r1 + c), at(source, r2 + c), at(source, r3 + c)
                a0, a1, a2, a3 = madd(a0, s0, x), madd(a1, s1, x), madd(a2, s2, x), madd(a3, s3, x)
                if two:
                    b0, b1, b2, b3 = madd(b0, s0, y), madd(b1, s1, y), madd(b2, s2, y), madd(b3, s3, y)
            store(target, r0 + j, a0)
            store(target, r1 + j, a1)
            store(target, r2 + j, a2)
            store(target, r3 + j, a3)
            if two:
                store(target, r0 + i, b0)
                store(target, r1 + i, b1)
                store(target, r2 + i, b2)
                store(target, r3 + i, b3)
        row += 4


@njit(cache=True, nogil=True)
@no_type_check
def _correlate(first, second, width, start, stop, products):
    """products -= first^T second, of rows, over some rows at a time that stay in the first-level cache."""
    zero = fill(np.float32(0))
    while start < stop:
        end = min(start + _TILE, stop)
        for c in range(0, width, 4):
            for j in range(0, width, 2 * LANES):
                two = j + LANES < width
                i = j + LANES if two else j
                a0, a1, a2, a3, b0, b1, b2, b3 = zero, zero, zero, zero, zero, zero, zero, zero
                for row in range(start * width, end * width, width):
                    x, y = load(second, row + j), load(second, row + i)
                    s0, s1 = at(first, row + c), at(first, row + c + 1)
                    s2, s3 = at(first, row + c + 2), at(first, row + c + 3)
                    a0, a1, a2, a3 = madd(a0, s0, x), madd(a1, s1, x), madd(a2, s2, x), madd(a3, s3, x)
                    if two:
                        b0, b1, b2, b3 = madd(b0, s0, y), madd(b1, s1, y), madd(b2, s2, y), madd(b3, s3, y)
                p = c * width
                store(products, p + j, sub(load(products, p + j), a0))
                store(products, p + width + j, sub(load(products, p + width + j), a1))
                store(products, p + 2 * width + j, sub(load(products, p + 2 * width + j), a2))
                store(products, p + 3 * width + j, sub(load(products, p + 3 * width + j), a3))
                if two:
                    store(products, p + i, sub(load(products, p + i), b0))
                    store(products, p + width + i, sub(load(products, p + width + i), b1))
                    store(products, p + 2 * width + i, sub(load(products, p + 2 * width + i), b2))
                    store(products, p + 3 * width + i, sub(load(products, p + 3 * width + i), b3))
        start = end
