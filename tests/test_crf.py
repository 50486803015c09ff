"""Mean field on the lattice against exact Gaussians, and its compiled loops against torch operations."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from enfilade.errors import UserError
from enfilade.ops import crf, mean_field_loops
from enfilade.ops.crf import DenseCRF, Kernel, build_lattices, mean_field, mean_field_reference, potts, refine

KERNELS = (Kernel(xy=8.0, rgb=30.0), Kernel(xy=6.0, depth=0.4), Kernel(xy=3.0))


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def smooth(*shape, seed=0):
    """Soft areas in [0, 1]."""
    b, c, h, w = shape
    coarse = torch.rand(b, c, max(h // 6, 2), max(w // 6, 2), generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, (h, w), mode="bilinear").mul(3).round().div(3) * 0.9 + 0.1 * torch.rand(
        shape, generator=torch.Generator().manual_seed(seed + 1)
    )


def problem(batch=1, classes=5, height=12, width=14, kernels=KERNELS):
    """Logits that follow the image's areas with noise, the image, its depth."""
    image = smooth(batch, 3, height, width, seed=3)
    depth = 3 * smooth(batch, 1, height, width, seed=5)[:, 0]
    level = (image.mean(1) * 3 * classes).long() % classes
    unary = 2 * F.one_hot(level, classes).permute(0, 3, 1, 2) + random(batch, classes, height, width)
    return unary, image, depth


def matrices(classes, seed=0, kernels=3):
    """Weights and compatibilities without any symmetry."""
    start = torch.tensor([4.0, 2.0, 3.0])[:kernels, None, None] * torch.eye(classes)
    weights = start + 0.3 * random(kernels, classes, classes, seed=seed)
    return weights, potts(classes) + 0.2 * random(classes, classes, seed=seed + 9)


def identity(classes, *weights):
    return torch.tensor(weights)[:, None, None] * torch.eye(classes)


def test_features_are_divided_by_their_deviations():
    image, depth = torch.rand(2, 3, 4, 5).requires_grad_(), torch.rand(2, 4, 5).requires_grad_()
    found = Kernel(xy=2.0, rgb=10.0, depth=0.5).features(image, depth)
    assert found.shape == (2, 6, 4, 5)
    assert not found.requires_grad  # features are data
    b, y, x = 1, 3, 2
    expected = [x / 2, y / 2, *(image[b, :, y, x].detach() * 255 / 10).tolist(), depth[b, y, x].item() / 0.5]
    assert found[b, :, y, x].tolist() == pytest.approx(expected)
    assert Kernel(xy=3.0).features(image).shape == (2, 2, 4, 5)


@pytest.mark.parametrize("normalise", ["symmetric", "row"])
@pytest.mark.parametrize("remove_self", [True, False])
@pytest.mark.parametrize("learned", [True, False])
def test_mean_field_approximates_exact_gaussians(normalise, remove_self, learned):
    """Within the lattice's own error, up to a tenth in five dimensions, of the messages."""
    unary, image, depth = problem(batch=2, height=21, width=25)
    weights, mu = matrices(5) if learned else (identity(5, 4.0, 2.0, 3.0), potts(5))
    options = {"normalise": normalise, "remove_self": remove_self}
    for iterations in (1, 4):
        found = mean_field(unary, build_lattices(KERNELS, image, depth), weights, mu, iterations, **options)
        features = [k.features(image, depth) for k in KERNELS]
        exact = mean_field_reference(unary, features, weights, mu, iterations, **options)
        assert (found - exact).norm() < 0.1 * (exact - unary).norm()
        assert (found.softmax(1) - exact.softmax(1)).abs().mean() < 0.02


def test_reference_is_the_sum_over_pairs():
    """Two iterations, pixel by pixel: z_i = u_i - mu sum_k w_k sum_(j != i) K_ij softmax(z_j)."""
    unary, image, depth = problem(classes=3, height=3, width=4)
    weights, mu = matrices(3)
    f = [k.features(image, depth)[0].flatten(1).T.double().numpy() for k in KERNELS]
    u = unary[0].flatten(1).T.double().numpy()
    z = u
    for _ in range(2):
        q = np.exp(z) / np.exp(z).sum(1, keepdims=True)
        z = u.copy()
        for i in range(12):
            for k in range(3):
                message = np.zeros(3)
                for j in range(12):
                    if j != i:
                        message += math.exp(-0.5 * ((f[k][i] - f[k][j]) ** 2).sum()) * q[j]
                z[i] -= mu.double().numpy() @ weights[k].double().numpy() @ message
    features = [k.features(image, depth) for k in KERNELS]
    found = mean_field_reference(unary.double(), features, weights.double(), mu.double(), 2, normalise="none")
    np.testing.assert_allclose(found[0].flatten(1).T.numpy(), z, rtol=1e-5)


# (batch, classes, height, width): one vector and several, whole and not, more than one tile, tiles across images
# And logits as they are, or so sharp that all but a few labels are out of the question.
SHAPES = [(2, 3, 13, 9), (1, 40, 7, 11), (1, 21, 9, 8), (1, 45, 5, 6), (1, 1, 3, 4), (1, 4, 1, 1)]


@pytest.mark.parametrize("normalise", ["symmetric", "row", "none"])
@pytest.mark.parametrize(("shape", "sharpness"), [*((shape, 1.0) for shape in SHAPES), ((1, 40, 7, 11), 8.0)])
def test_compiled_loops_and_their_gradients_agree_with_torch(shape, sharpness, normalise):
    unary, image, depth = problem(*shape)
    unary = unary * sharpness
    lattices = build_lattices(KERNELS, image, depth)
    scale = 0.05 if normalise == "none" else 1.0
    for remove_self in (True, False):
        for weights, mu in (matrices(shape[1]), (identity(shape[1], 4.0, 2.0, 3.0), potts(shape[1]))):
            found = []
            for compiled in (True, False):
                leaves = [x.clone().requires_grad_() for x in (unary, weights * scale, mu)]
                if compiled:
                    options = {"normalise": normalise, "remove_self": remove_self}
                    out = mean_field(leaves[0], lattices, leaves[1], leaves[2], 3, **options)
                else:
                    m = leaves[2] @ leaves[1]
                    out = crf._mean_field_torch(leaves[0], lattices, m, 3, normalise, remove_self, False)
                found.append((out.detach(), *torch.autograd.grad((out * unary.sin()).sum(), leaves)))
            for fast, slow in zip(*found):
                # Messages to oneself of less than 0.004 of a logit are left out, and Q is rounded to 16 bits there.
                assert (fast - slow).abs().max() <= 1.5e-3 * slow.abs().max() + 2e-3


def test_gradients_of_the_torch_path():
    unary, image, depth = problem(classes=3, height=3, width=4)
    lattices = build_lattices(KERNELS, image, depth)
    leaves = [x.double().requires_grad_() for x in (unary, *matrices(3))]
    assert gradcheck(lambda u, w, mu: mean_field(u, lattices, w, mu, 2), leaves)
    assert gradcheck(lambda u, w, mu: mean_field(u, lattices, w, mu, 2, checkpoint=True), leaves)


@pytest.mark.parametrize("iterations", [1, 2, 5, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_checkpoints_change_no_gradient(iterations, dtype):
    unary, image, depth = problem(height=6, width=7)
    lattices, found = build_lattices(KERNELS, image, depth), []
    for checkpoint in (False, True):
        leaves = [x.to(dtype).requires_grad_() for x in (unary, *matrices(5))]
        out = mean_field(leaves[0], lattices, leaves[1], leaves[2], iterations, checkpoint=checkpoint)
        found.append((out.detach(), *torch.autograd.grad(out.sin().sum(), leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize("checkpoint", [False, True])
def test_calls_in_between_do_not_touch_what_a_backward_pass_waits_for(checkpoint):
    """Work memory goes from call to call; a graph that is kept gives its gradients as often as asked."""
    unary, image, depth = problem(height=6, width=7)
    lattices, (weights, mu) = build_lattices(KERNELS, image, depth), matrices(5)
    leaves = [x.clone().requires_grad_() for x in (unary, weights, mu)]
    out = mean_field(leaves[0], lattices, leaves[1], leaves[2], 3, checkpoint=checkpoint).sin().sum()
    first = torch.autograd.grad(out, leaves, retain_graph=True)
    other = (-unary).requires_grad_()
    mean_field(other, lattices, weights, mu, 2).sum().backward()
    with torch.no_grad():
        mean_field(other, lattices, weights, mu, 2)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(out, leaves)))


@pytest.mark.parametrize("values", [0.0, 1e-3, 1e3])
def test_gradients_are_linear_in_what_comes_in(values):
    """What is left out is a share of the incoming gradient, of which there may be none."""
    unary, image, depth = problem(height=6, width=7)
    lattices, (weights, mu) = build_lattices(KERNELS, image, depth), matrices(5)
    leaves = [x.clone().requires_grad_() for x in (unary, weights, mu)]
    out = mean_field(leaves[0], lattices, leaves[1], leaves[2], 3)
    along = random(*unary.shape, seed=8)
    one = torch.autograd.grad(out, leaves, along, retain_graph=True)
    many = torch.autograd.grad(out, leaves, values * along)
    for a, b in zip(one, many):
        torch.testing.assert_close(b, values * a, rtol=1e-3, atol=1e-5 * values * a.abs().max().item())


def test_only_what_needs_a_gradient_gets_one():
    unary, image, depth = problem()
    lattices, (weights, mu) = build_lattices(KERNELS, image, depth), matrices(5)
    leaf = unary.clone().requires_grad_()
    (alone,) = torch.autograd.grad(mean_field(leaf, lattices, weights, mu, 3).sin().sum(), leaf)
    w = weights.clone().requires_grad_()
    both = torch.autograd.grad(mean_field(leaf, lattices, w, mu, 3).sin().sum(), (leaf, w))
    torch.testing.assert_close(alone, both[0], rtol=1e-5, atol=1e-6)
    (only,) = torch.autograd.grad(mean_field(unary, lattices, w, mu, 3).sin().sum(), w)
    torch.testing.assert_close(only, both[1], rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert not mean_field(leaf, lattices, w, mu, 3).requires_grad


def test_a_batch_is_its_images():
    unary, image, depth = problem(batch=3, height=9, width=15)
    weights, mu = matrices(5)
    together = mean_field(unary, build_lattices(KERNELS, image, depth), weights, mu, 4)
    for i in range(3):
        one = slice(i, i + 1)
        alone = mean_field(unary[one], build_lattices(KERNELS, image[one], depth[one]), weights, mu, 4)
        torch.testing.assert_close(together[one], alone, rtol=1e-5, atol=1e-4)


def test_the_shortcut_for_potts_is_the_general_path(monkeypatch):
    """Potts and multiples of the identity skip the products with matrices."""
    unary, image, depth = problem()
    lattices = build_lattices(KERNELS, image, depth)
    short = mean_field(unary, lattices, identity(5, 4.0, 2.0, 3.0), potts(5), 4)
    products = []
    original = mean_field_loops.multiply
    monkeypatch.setattr("enfilade.ops.mean_field.multiply", lambda *a: products.append(original(*a)))
    again = mean_field(unary, lattices, identity(5, 4.0, 2.0, 3.0), potts(5), 4)
    assert torch.equal(short, again)
    assert not products
    # A trace of something else in one kernel's matrix, which changes nothing by itself
    weights = identity(5, 4.0, 2.0, 3.0)
    weights[1, 0, 3] += 2e-5
    general = mean_field(unary, lattices, weights, potts(5), 4)
    assert products
    torch.testing.assert_close(general, short, rtol=1e-4, atol=1e-3)


def test_threads_change_nothing_but_rounding():
    unary, image, depth = problem(batch=2, height=13, width=15)
    lattices, (weights, mu) = build_lattices(KERNELS, image, depth), matrices(5)
    found = []
    try:
        for threads in (1, 3, 3):
            torch.set_num_threads(threads)
            leaves = [x.clone().requires_grad_() for x in (unary, weights, mu)]
            out = mean_field(leaves[0], lattices, leaves[1], leaves[2], 3)
            found.append((out.detach(), *torch.autograd.grad(out.sin().sum(), leaves)))
    finally:
        torch.set_num_threads(1)
    for one, three, again in zip(*found):
        assert torch.equal(three, again)
        assert (one - three).abs().max() <= 4e-4 * one.abs().max()  # tiles differ in what they leave out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_pixel_sends_itself_nothing(dtype):
    """One pixel alone has no neighbour: its logits stay."""
    unary, image, depth = problem(height=1, width=1)
    lattices, (weights, mu) = build_lattices(KERNELS, image, depth), matrices(5)
    unary = unary.to(dtype)
    assert (mean_field(unary, lattices, weights, mu, 3, remove_self=False) - unary).abs().max() > 1
    # What rounding to 16 bits and small shares leave of messages to oneself.
    torch.testing.assert_close(mean_field(unary, lattices, weights, mu, 3), unary, rtol=0, atol=4e-4)


def test_messages_of_uniform_images_are_the_mean_of_the_others():
    """Where all features are equal, each pixel hears the sum of all others over n, whatever the lattice does."""
    unary = random(1, 4, 5, 6)
    flat = crf.Lattice.build(torch.zeros(1, 3, 5, 6))
    weights, mu = matrices(4, kernels=1)
    q = unary.softmax(1)
    others = (q.sum((2, 3), keepdim=True) - q) / 30
    expected = unary - torch.einsum("lm,bmhw->blhw", mu @ weights[0], others)
    found = mean_field(unary, [flat], weights, mu, 1)
    # K_ii counts neighbours that are missing here: an eighth too much, of M q_i / 30.
    own = torch.einsum("lm,bmhw->blhw", mu @ weights[0], q) / 30
    assert ((found - expected).abs() <= 0.13 * own.abs() + 1e-4).all()
    assert own.abs().mean() > 0.03


def test_impossible_labels_stay_impossible():
    unary, image, depth = problem()
    unary[:, 2] = -math.inf
    found = mean_field(unary, build_lattices(KERNELS, image, depth), *matrices(5), 3)
    assert (found[:, 2] == -math.inf).all()
    assert found[:, [0, 1, 3, 4]].isfinite().all()


def test_no_iteration_and_no_kernel_change_nothing():
    unary, image, depth = problem()
    assert torch.equal(mean_field(unary, build_lattices(KERNELS, image, depth), *matrices(5), 0), unary)
    assert torch.equal(mean_field(unary, [], torch.zeros(0, 5, 5), potts(5), 3), unary)


def test_half_precision_is_computed_in_float32():
    unary, image, depth = problem()
    lattices = build_lattices(KERNELS, image, depth)
    half = unary.bfloat16()
    found = mean_field(half, lattices, *matrices(5), 3)
    assert found.dtype == torch.float32
    assert torch.equal(found, mean_field(half.float(), lattices, *matrices(5), 3))


def test_the_layer_starts_as_the_papers_and_learns():
    torch.manual_seed(0)
    layer = DenseCRF(5, KERNELS, iterations=4, train_iterations=2)
    unary, image, depth = problem(batch=2)
    lattices = build_lattices(KERNELS, image, depth)
    for iterations, training in ((2, True), (4, False)):
        layer.train(training)
        expected = mean_field(unary, lattices, identity(5, 7.0, 4.0, 3.0), potts(5), iterations)
        torch.testing.assert_close(layer(unary, image, depth), expected, rtol=1e-5, atol=1e-5)
    truth = problem(batch=2)[0].argmax(1)  # as the noisy logits have it: the paper's start smooths too much
    optimiser, losses = torch.optim.Adam(layer.train().parameters(), 0.1), []
    for _ in range(8):
        loss = F.cross_entropy(layer(unary, image, depth), truth)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert {name for name, _ in layer.named_parameters()} == {"weights", "compatibility"}


def test_refine_takes_arrays_and_tensors():
    unary, image, depth = problem()
    options = {"kernels": KERNELS, "weights": (4.0, 2.0, 3.0), "iterations": 3}
    expected = mean_field(unary, build_lattices(KERNELS, image, depth), identity(5, 4.0, 2.0, 3.0), potts(5), 3)
    expected = expected.softmax(1)
    for scores, logits in ((unary, True), (unary.softmax(1), False)):
        found = refine(scores, image, depth, logits=logits, **options)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
        array = refine(scores[0].numpy(), image[0].permute(1, 2, 0).numpy(), depth[0].numpy(), logits=logits, **options)
        assert isinstance(array, np.ndarray)
        np.testing.assert_allclose(array, expected[0].numpy(), rtol=1e-3, atol=1e-4)
    bytes_ = (image[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    array = refine(unary[0].numpy(), bytes_, depth[0].numpy(), logits=True, **options)
    assert np.abs(array - expected[0].numpy()).mean() < 0.02  # the image is rounded
    single = refine(unary[0], image[0], depth[0], logits=True, **options)
    torch.testing.assert_close(single, expected[0], rtol=1e-3, atol=1e-4)
    # Without depth the kernel that needs it is left out.
    plain = refine(unary, image, logits=True, iterations=2)
    pair = (crf.PAPER_KERNELS[0], crf.PAPER_KERNELS[2])
    by_hand = mean_field(unary, build_lattices(pair, image), identity(5, 7.0, 3.0), potts(5), 2).softmax(1)
    torch.testing.assert_close(plain, by_hand, rtol=1e-4, atol=1e-5)


def test_bad_input_gets_a_sentence():
    unary, image, depth = problem()
    lattices, (weights, mu) = build_lattices(KERNELS, image, depth), matrices(5)
    with pytest.raises(UserError, match="compares depths, and there is no depth: give it, or leave it out"):
        build_lattices(KERNELS, image)
    with pytest.raises(UserError, match=r"the depth is \(1, 11, 14\), its image \(1, 12, 14\): resize"):
        build_lattices(KERNELS, image, depth[:, 1:])
    with pytest.raises(UserError, match=r"a kernel's depth is a standard deviation above 0, not 0\.0"):
        Kernel(xy=3.0, depth=0.0)
    with pytest.raises(UserError, match=r"3 kernels over 5 classes take weights of \(3, 5, 5\)"):
        mean_field(unary, lattices, weights[:2], mu, 3)
    with pytest.raises(UserError, match="the number of iterations is 0 or more, not -1"):
        mean_field(unary, lattices, weights, mu, -1)
    with pytest.raises(UserError, match=r"5 classes of \(1, 11, 14\), and a lattice was built for \(1, 12, 14\)"):
        mean_field(unary[:, :, 1:], lattices, weights, mu, 3)
    with pytest.raises(UserError, match="3 kernels take as many initial weights, not 2"):
        DenseCRF(5, KERNELS, (7.0, 4.0))
    with pytest.raises(UserError, match=r"the logits are \(11, 14\), the image \(12, 14\): resize one to the other"):
        DenseCRF(5, KERNELS)(unary[:, :, 1:], image, depth)
    with pytest.raises(UserError, match="3 kernels take as many weights, not 0"):
        refine(unary, image, depth, kernels=KERNELS)
    with pytest.raises(UserError, match=r"scores are k h w, not \(1, 5, 12, 14\)"):
        refine(unary.numpy(), image[0].permute(1, 2, 0).numpy())
    with pytest.raises(UserError, match=r"an image array is h w 3, not \(3, 12, 14\)"):
        refine(unary[0].numpy(), image[0].numpy())
    with pytest.raises(UserError, match=r"scores are \(1, 5, 12, 14\), the image \(1, 3, 11, 14\): resize"):
        refine(unary, image[:, :, 1:])
