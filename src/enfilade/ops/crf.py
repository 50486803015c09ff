"""The fully connected CRF with Gaussian edges: mean field on the permutohedral lattice, with every weight learned.

* Mousavian, Pirsiavash, Kosecka: Joint semantic segmentation and depth estimation with deep convolutional networks,
  3DV 2016 (Eq. 5-7: three kernels, each with a matrix of weights, and a matrix of compatibilities)
* Krähenbühl, Koltun: Efficient inference in fully connected CRFs with Gaussian edge potentials, NeurIPS 2011
* Zheng et al.: Conditional random fields as recurrent neural networks, ICCV 2015 (mean field as layers of a network)

The energy of a labelling x of the pixels i, Eq. (5)-(7), with logits u_i = -psi_u as unary term::

    E(x) = sum_i -u_i(x_i) + sum_(i, j) psi_p(x_i, x_j)
    psi_p(l, l') = sum_k (mu w_k)(l, l') K_k(i, j),  K_k(i, j) = exp(-|f_i - f_j|^2 / 2) of the features of kernel k

A compatibility mu(l, l') above 0 is a *penalty* on l beside l'; that of Potts is [l != l']. Each w_k is a C x C matrix
that acts on the labels before mu does, a product of matrices as in CRF-as-RNN; the paper starts it at a multiple of
the identity. Mean field repeats

    Q = softmax(z)          z_i <- u_i - mu sum_k w_k sum_(j != i) K_k(i, j) Q_j

from z = u. The kernels are normalised, `normalise="symmetric"` unless told otherwise, so that their sums are about 1.

Differs from paper: Eq. (7) prints the exponents without their minus sign, and does not say whether kernels are
normalised.

float32 tensors on a CPU run compiled loops, which keep the work memory of their last call for the next, and whose
gradients can be taken once; every other type and device runs torch operations, on a GPU between the lattice's kernels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from enfilade.errors import UserError
from enfilade.ops.lattice import Lattice, Normalise, filter
from enfilade.ops.mean_field import MeanField, join


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
        self, image: Float[Tensor, "b 3 h w"], depth: Float[Tensor, "_ _ _"] | None = None
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
    kernels: Sequence[Kernel], image: Float[Tensor, "b 3 h w"], depth: Float[Tensor, "_ _ _"] | None = None
) -> list[Lattice]:
    """A lattice for each kernel, for `mean_field`. That of a kernel of place alone depends on the size of the images
    only, and the last ones are kept: a video, a folder and a training have many images of one size."""

    def build(kernel: Kernel) -> Lattice:
        if kernel.rgb is None and kernel.depth is None:
            return _of_place(kernel, image.shape[0], *image.shape[2:], image.device)
        return Lattice.build(kernel.features(image, depth))

    return [build(kernel) for kernel in kernels]


@lru_cache(maxsize=2)
def _of_place(kernel: Kernel, b: int, h: int, w: int, device: torch.device) -> Lattice:
    return Lattice.build(kernel.features(torch.empty(b, 3, h, w, device=device)))


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
        joint = join(lattices, normalise, remove_self)
        return MeanField.apply(unary, matrices, joint, iterations, keep, checkpoint)
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
    own = [own_weight(lattice, normalise).to(unary.dtype) for lattice in lattices] if remove_self else None

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


def own_weight(lattice: Lattice, normalise: Normalise) -> Float[Tensor, "b 1 h w"]:
    """K_ii after normalisation, which is the same for "row" and "symmetric". No more than the whole sum of the kernel,
    which it comes to for a pixel that is alone."""
    own = torch.minimum(lattice.self_weight, lattice.norm)
    return own if normalise == "none" else own / lattice.norm


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
        z = u
        for kernel, w in zip(kernels, weights):
            z = z - kernel @ q @ (compatibility @ w).mT
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
        image: Float[Tensor, "b 3 _ _"],
        depth: Float[Tensor, "_ _ _"] | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """Refined logits. `image` is RGB in [0, 1] and `depth` metres, both of the logits' size and taken as data."""
        if logits.shape[2:] != image.shape[2:]:
            raise UserError(
                f"the logits are {tuple(logits.shape[2:])}, the image {tuple(image.shape[2:])}: resize one to the other"
            )
        lattices = build_lattices(self.kernels, image, depth)
        iterations = self.train_iterations if self.training else self.iterations
        return mean_field(logits, lattices, self.weights, self.compatibility, iterations, checkpoint=self.checkpoint)


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
        z = mean_field(u, build_lattices(kernels, image, depth), matrices.to(u), potts(u.shape[1]).to(u), iterations)
        q = z.softmax(1)
    q = q[0] if single else q
    return q.numpy() if is_array else q
