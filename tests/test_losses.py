"""Each loss against the formula written out in loops over pixels, in float64."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from enfilade import losses
from enfilade.errors import UserError
from enfilade.types import IGNORE, Batch, Output

B, K, H, W = 2, 4, 5, 6


def logits(seed=0, **options) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(B, K, H, W, generator=generator, dtype=torch.float64) * 2).requires_grad_(**options)


def labels(seed=1, size=(H, W)) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    values = rng.integers(0, K, (B, *size))
    values[rng.random(values.shape) < 0.2] = IGNORE
    return torch.from_numpy(values)


def depth(seed=2, holes=0.3) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    values = rng.uniform(0.5, 6, (B, H, W))
    values[rng.random(values.shape) < holes] = 0
    return torch.from_numpy(values)


def predicted(seed=3) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).uniform(0.5, 6, (B, H, W))).requires_grad_()


def pixels(scores, truth):
    """(probabilities, label) of each labelled pixel."""
    for b, y, x in np.ndindex(B, H, W):
        label = int(truth[b, y, x])
        if label != IGNORE:
            e = [math.exp(v) for v in scores[b, :, y, x].tolist()]
            yield [v / sum(e) for v in e], label


@pytest.mark.parametrize("weight", [None, torch.tensor([0.5, 2.0, 1.0, 0.0], dtype=torch.float64)])
@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0])
def test_focal_and_cross_entropy_by_hand(weight, gamma):
    scores, truth = logits(), labels()
    total = norm = 0.0
    for p, c in pixels(scores, truth):
        w = 1.0 if weight is None else weight[c].item()
        total += -w * (1 - p[c]) ** gamma * math.log(p[c])
        norm += w
    assert losses.focal(scores, truth, weight, gamma).item() == pytest.approx(total / norm, rel=1e-10)
    if gamma == 0:
        assert losses.cross_entropy(scores, truth, weight).item() == pytest.approx(total / norm, rel=1e-10)


def test_focal_without_gamma_is_cross_entropy_in_its_gradient_too():
    a, b = logits(), logits()
    losses.focal(a, labels(), gamma=0.0).backward()
    losses.cross_entropy(b, labels()).backward()
    torch.testing.assert_close(a.grad, b.grad)


def test_focal_weighs_easy_pixels_less():
    """The paper's example: at p = 0.9 the factor is 0.01."""
    easy = torch.tensor([math.log(0.9), math.log(0.1)], dtype=torch.float64).view(1, 2, 1, 1)
    truth = torch.zeros(1, 1, 1, dtype=torch.int64)
    ratio = losses.focal(easy, truth) / losses.cross_entropy(easy, truth)
    assert ratio.item() == pytest.approx(0.01)


def berhu_by_hand(errors):
    threshold = 0.2 * max(abs(e) for e in errors)
    return [abs(e) if abs(e) <= threshold else (e * e + threshold**2) / (2 * threshold) for e in errors]


def test_depth_berhu_by_hand():
    d, t = predicted(), depth()
    errors = [(d[i] - t[i]).item() for i in np.ndindex(B, H, W) if t[i] > 0]  # the threshold is the batch's
    wanted = berhu_by_hand(errors)
    assert any(abs(e) <= 0.2 * max(map(abs, errors)) for e in errors)  # both pieces are in use
    assert losses.depth_berhu(d, t).item() == pytest.approx(sum(wanted) / len(wanted), rel=1e-10)


def test_berhu_is_smooth_at_its_threshold():
    c = torch.tensor(0.7, dtype=torch.float64)
    step = 1e-7
    x = torch.tensor([-0.7 - step, -0.7 + step, 0.7 - step, 0.7, 0.7 + step], dtype=torch.float64, requires_grad=True)
    y = losses.berhu(x, c)
    y.sum().backward()
    torch.testing.assert_close(y, torch.full_like(y, 0.7), atol=2e-7, rtol=0)  # continuous: y moves by the step
    torch.testing.assert_close(x.grad.abs(), torch.ones_like(y), atol=2e-7, rtol=0)  # x / c beyond, 1 before
    assert torch.autograd.gradcheck(
        lambda e: losses.berhu(e, c), torch.tensor([-2.0, -0.3, 0.2, 0.9, 3.0]).double().requires_grad_()
    )


def test_berhu_of_a_perfect_prediction():
    t = depth()
    d = t.clone().requires_grad_()
    loss = losses.depth_berhu(d, t)
    loss.backward()
    assert loss.item() == 0
    assert (d.grad == 0).all()


@pytest.mark.parametrize("variance", [0.0, 0.5, 0.85, 1.0])
def test_scale_invariant_by_hand(variance):
    d, t = predicted().detach(), depth()
    per_image = []
    for b in range(B):
        g = [math.log(d[i]) - math.log(t[i]) for i in np.ndindex(B, H, W) if i[0] == b and t[i] > 0]
        # the double sum over pairs, as Eigen et al. write it in Eq. 4: mean(g^2) - variance * sum_ij g_i g_j / n^2
        pairs = sum(a * c for a in g for c in g) / len(g) ** 2
        per_image.append(math.sqrt(sum(v * v for v in g) / len(g) - variance * pairs))
    assert losses.depth_scale_invariant(d, t, variance).item() == pytest.approx(np.mean(per_image), rel=1e-9)


def test_pairwise_by_hand():
    """The double sum of Eq. (4), over truth that is clipped and rounded."""
    d, t = predicted().detach(), depth()
    per_image = []
    for b in range(B):
        at = [i for i in np.ndindex(B, H, W) if i[0] == b and t[i] > 0]
        bins = [max(1, round(min(t[i].item(), 2.5) / 0.25)) * 0.25 for i in at]
        g = [(math.log(d[i]), math.log(truth)) for i, truth in zip(at, bins)]
        per_image.append(sum(((a - c) - (e - f)) ** 2 for a, e in g for c, f in g) / len(g) ** 2)
    assert losses.depth_pairwise(d, t, 2.5, 0.25).item() == pytest.approx(np.mean(per_image), rel=1e-9)
    assert losses.depth_pairwise(3 * d, t).item() == pytest.approx(losses.depth_pairwise(d, t).item(), rel=1e-9)
    assert losses.depth_pairwise(d, t * 0).item() == 0


def test_scale_invariance():
    d, t = predicted().detach(), depth()
    one, three = (losses.depth_scale_invariant(s * d, t, 1.0).item() for s in (1.0, 3.0))
    assert one == pytest.approx(three, rel=1e-9)
    assert losses.depth_scale_invariant(3 * d, t, 0.5).item() != pytest.approx(one, rel=0.01)
    # the gradients of logs do not see the scale either
    assert losses.depth_gradient(3 * d, t).item() == pytest.approx(losses.depth_gradient(d, t).item(), rel=1e-9)
    assert losses.depth_scale_invariant(3 * t.clamp(min=0.1), t, 1.0).item() == pytest.approx(0, abs=1e-3)


def test_depth_gradient_by_hand():
    d, t = predicted().detach(), depth()
    means = []
    for step in (1, 2, 4):
        for dy, dx in ((step, 0), (0, step)):
            values = []
            for b, y, x in np.ndindex(B, H - dy, W - dx):
                i, j = (b, y, x), (b, y + dy, x + dx)
                if t[i] > 0 and t[j] > 0:
                    rise = math.log(d[j]) - math.log(d[i])
                    values.append(abs(rise - (math.log(t[j]) - math.log(t[i]))))
            means.append(sum(values) / max(1, len(values)))
    assert losses.depth_gradient(d, t).item() == pytest.approx(np.mean(means), rel=1e-9)


@pytest.mark.parametrize("name", ["depth_berhu", "depth_scale_invariant", "depth_gradient", "depth_pairwise"])
def test_depth_gradients(name):
    # berHu's threshold is held constant (detached), which numerical differentiation would see: keep the largest fixed
    d, t = predicted().detach(), depth()
    d[0, 0, 0], t[0, 0, 0] = 30.0, 1.0
    mask = torch.ones_like(d)
    mask[0, 0, 0] = 0
    x = d.clone().requires_grad_()
    term = getattr(losses, name)
    assert torch.autograd.gradcheck(lambda x: term(x * mask + d * (1 - mask), t), x)


@pytest.mark.parametrize("name", ["focal", "cross_entropy", "cross_entropy_sum"])
def test_semantic_gradients(name):
    weight = torch.tensor([0.5, 2.0, 1.0, 0.3], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: getattr(losses, name)(x, labels(), weight), logits())


@pytest.mark.parametrize("name", ["focal", "cross_entropy", "cross_entropy_sum"])
def test_nothing_labelled_is_zero_with_zero_gradients(name):
    term = getattr(losses, name)
    nothing = torch.full((B, H, W), IGNORE)
    unweighted = torch.full((B, H, W), 3)  # labelled, but of a class with weight 0
    for truth, weight in ((nothing, None), (nothing, torch.ones(K)), (unweighted, torch.tensor([1.0, 1, 1, 0]))):
        x = logits(requires_grad=True)
        loss = term(x, truth, weight if weight is None else weight.double())
        loss.backward()
        assert loss.item() == 0
        assert (x.grad == 0).all()


@pytest.mark.parametrize("name", ["depth_berhu", "depth_scale_invariant", "depth_gradient"])
def test_no_depth_is_zero_with_zero_gradients(name):
    d = predicted()
    loss = getattr(losses, name)(d, torch.zeros(B, H, W, dtype=torch.float64))
    loss.backward()
    assert loss.item() == 0
    assert (d.grad == 0).all()


@pytest.mark.parametrize("name", ["depth_berhu", "depth_scale_invariant", "depth_gradient"])
def test_unknown_depth_gets_no_gradient(name):
    """Not even where the prediction there is absurd: masking comes before logarithms."""
    d, t = predicted().detach(), depth()
    d[t == 0] = 0.0
    d.requires_grad_()
    getattr(losses, name)(d, t).backward()
    assert d.grad.isfinite().all()
    assert (d.grad[t == 0] == 0).all()
    assert (d.grad[t > 0] != 0).any()


def test_truth_is_resized_by_the_nearest_pixel():
    truth = labels(size=(4 * H, 4 * W))
    small = losses.nearest(truth, (H, W))
    assert small.dtype == truth.dtype
    # centres of the 5 x 6 grid on the 20 x 24 one: (i + 0.5) * 4 - 0.5 = 4i + 1.5, either neighbour is nearest
    candidates = torch.stack([truth[:, a::4, b::4] for a in (1, 2) for b in (1, 2)])
    assert (candidates == small).any(0).all()
    torch.testing.assert_close(losses.focal(logits(), truth), losses.focal(logits(), small))
    same = losses.nearest(truth, (4 * H, 4 * W))
    assert same is truth


def output(requires_grad=True):
    x, d = logits(requires_grad=requires_grad), predicted()
    return Output(logits=x, depth=d, side_logits=(logits(7), logits(8)[..., ::2, ::2].contiguous()))


def batch(with_depth=True):
    ids = torch.arange(B * H * W).view(B, H, W) % 7 + 1
    truth = depth() if with_depth else None
    told = torch.log_softmax(logits(9).detach(), 1)
    return Batch(image=torch.zeros(B, 3, H, W), labels=labels(), depth=truth, support=truth, regions=ids, taught=told)


def test_distillation_by_hand():
    own, told = logits(4).detach(), torch.log_softmax(logits(5), 1).detach()
    total, t = 0.0, 2.0
    for b, y, x in np.ndindex(B, H, W):
        p, q = ([math.exp(float(v[b, k, y, x]) / t) for k in range(K)] for v in (told, own))
        p, q = ([v / sum(row) for v in row] for row in (p, q))
        total += t * t * sum(a * math.log(a / c) for a, c in zip(p, q))
    assert losses.distillation(own, told).item() == pytest.approx(total / (B * H * W), rel=1e-9)


def test_distillation_is_nothing_for_who_agrees_and_leaves_out_what_nobody_learned():
    own = logits(4)
    assert losses.distillation(own, torch.log_softmax(own, 1)).item() == pytest.approx(0, abs=1e-12)
    weight = torch.tensor([1.0, 0.5, 0.0, 2.0], dtype=torch.float64)
    shifted = own.clone()
    shifted[:, 2] += 5  # all that they differ in
    assert losses.distillation(own, shifted.log_softmax(1), weight).item() == pytest.approx(0, abs=1e-12)
    assert losses.distillation(own, shifted.log_softmax(1)).item() > 1e-3


def test_distillation_resizes_what_the_teachers_say():
    told = torch.log_softmax(logits(5), 1)
    coarse = torch.zeros(B, K, 3, 4, dtype=torch.float64)
    small = F.interpolate(told, (3, 4), mode="bilinear")
    assert losses.distillation(coarse, told).item() == pytest.approx(
        losses.distillation(coarse, small).item(), rel=1e-9
    )


def test_objective_is_the_weighted_sum():
    out, b = output(), batch()
    terms = {"focal": 1.0, "depth_berhu": 0.5, "side_focal": 0.25}
    total, values = losses.objective(out, b, terms)
    assert values.keys() == terms.keys()
    assert total.item() == pytest.approx(sum(f * values[k].item() for k, f in terms.items()), rel=1e-9)
    # L = L_s + L_d + sum_k L_sk, Eq. (8)
    sides = sum(losses.focal(side, b.labels).item() for side in out.side_logits)
    assert values["side_focal"].item() == pytest.approx(sides, rel=1e-9)
    assert not any(v.requires_grad for v in values.values())
    total.backward()
    assert out.logits.grad.abs().sum() > 0
    assert out.depth.grad.abs().sum() > 0


@pytest.mark.parametrize("name", sorted(losses.TERMS))
def test_every_term_takes_an_output_and_class_weights(name):
    weight = torch.linspace(0.5, 2, K, dtype=torch.float64)
    value = losses.TERMS[name](output(), batch(), weight)
    assert value.ndim == 0
    assert value.item() > 0


@pytest.mark.parametrize("name", [n for n in losses.TERMS if n.startswith("depth")])
def test_a_batch_without_depth_costs_nothing(name):
    out = output()
    value = losses.TERMS[name](out, batch(with_depth=False), None)
    value.backward()
    assert value.item() == 0
    assert (out.depth.grad == 0).all()


def test_a_term_without_its_input_is_named():
    with pytest.raises(UserError, match="depth"):
        losses.objective(Output(logits=logits()), batch(), {"depth_berhu": 1.0})
    with pytest.raises(UserError, match="labels"):
        losses.objective(output(), Batch(image=torch.zeros(B, 3, H, W), depth=depth()), {"focal": 1.0})
    with pytest.raises(UserError, match="teachers in the stage"):
        losses.objective(output(), Batch(image=torch.zeros(B, 3, H, W), labels=labels()), {"distillation": 1.0})
    with pytest.raises(UserError, match="side"):
        losses.objective(Output(logits=logits()), batch(), {"side_focal": 1.0})


@pytest.mark.parametrize("name", ["focal", "cross_entropy"])
def test_half_precision_logits_lose_nothing_in_the_sum(name):
    """bf16 has 8 bits: a mean over many pixels must be taken in fp32."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, K, 200, 300, generator=generator).bfloat16()
    truth = torch.randint(0, K, (1, 200, 300), generator=generator)
    term = getattr(losses, name)
    assert term(x, truth).item() == pytest.approx(term(x.double(), truth).item(), rel=1e-5)


# label maps of several scales


def test_a_coarse_map_covers_whole_cells():
    """360 rows are 11.25 cells of 32: the last cell's centre lies beyond the image, and so it is void."""
    truth = torch.arange(360)[None, :, None].expand(1, 360, 64) // 32
    small = losses.nearest(truth, (12, 2), IGNORE)
    assert small[0, :11, 0].tolist() == list(range(11))
    assert small[0, 11].tolist() == [IGNORE] * 2
    assert losses.nearest(torch.ones(1, 360, 64), (12, 2))[0, 11].tolist() == [0, 0]  # depth: unknown


@pytest.mark.parametrize(("size", "stride"), [((16, 24), 2), ((16, 24), 4), ((13, 22), 4), ((7, 7), 8)])
def test_majority_counts_the_votes_of_each_cell(size, stride):
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 4, (2, *size), generator=generator)
    truth[truth == 3] = IGNORE
    rows, columns = (-(-n // stride) for n in size)
    got = losses.majority(truth, (rows, columns))
    for b in range(2):
        for i in range(rows):
            for j in range(columns):
                cell = truth[b, i * stride : (i + 1) * stride, j * stride : (j + 1) * stride].flatten().tolist()
                cell += [IGNORE] * (stride * stride - len(cell))  # beyond the image
                # most votes; among equals the lowest class, void last
                assert got[b, i, j] == max(set(cell), key=lambda c: (cell.count(c), -c))


def test_majority_of_one_class_is_nearest():
    truth = torch.full((1, 20, 20), 2)
    assert torch.equal(losses.majority(truth, (5, 5)), losses.nearest(truth, (5, 5), IGNORE))
    assert torch.equal(losses.majority(truth, (7, 7)), losses.nearest(truth, (7, 7), IGNORE))  # no whole cells


def test_a_term_may_name_its_scale():
    out, b = output(), batch()
    maps = [*out.side_logits, out.logits]
    terms = {"cross_entropy/s1": 0.5, "focal/s3": 2.0}
    total, values = losses.objective(out, b, terms)
    assert values["cross_entropy/s1"] == losses.cross_entropy(maps[0], b.labels)
    assert values["focal/s3"] == losses.focal(maps[2], b.labels)
    assert total.item() == pytest.approx((0.5 * values["cross_entropy/s1"] + 2 * values["focal/s3"]).item())
    # all scales at weight 1 are the answer's loss and Σ_k of the sides
    deep = losses.objective(out, b, {f"cross_entropy/s{k}": 1.0 for k in (1, 2, 3)})[0]
    both = losses.objective(out, b, {"cross_entropy": 1.0, "side_cross_entropy": 1.0})[0]
    assert deep.item() == pytest.approx(both.item(), rel=1e-12)


def test_scales_that_do_not_exist_are_named():
    with pytest.raises(UserError, match="label map s9, but this model makes 3"):
        losses.objective(output(), batch(), {"focal/s9": 1.0})
    with pytest.raises(UserError, match="s1 for the coarsest, or a depth map, d1 for the first, not '16'"):
        losses.objective(output(), batch(), {"focal/16": 1.0})
    with pytest.raises(UserError, match="did you mean 'focal'"):
        losses.objective(output(), batch(), {"focl/s1": 1.0})


def test_the_way_to_resize_reaches_the_term():
    truth = torch.zeros(1, 4, 4, dtype=torch.int64)
    truth[:, 2, 2] = 1  # the pixel that nearest takes
    x = torch.zeros(1, 2, 1, 1, dtype=torch.float64)
    x[:, 0] = 3.0
    b = Batch(image=torch.zeros(1, 3, 4, 4), labels=truth)
    near, most = (losses.objective(Output(logits=x), b, {"cross_entropy": 1.0}, None, how)[0] for how in losses.RESIZE)
    assert near.item() == pytest.approx(3 + math.log1p(math.exp(-3)))
    assert most.item() == pytest.approx(math.log1p(math.exp(-3)))


# Lovász-softmax


def test_lovasz_at_corners_is_the_jaccard_loss():
    """At hard predictions the extension equals the set function: mean over classes of 1 - IoU."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 3, (1, 8, 8), generator=generator)
    answer = torch.randint(0, 3, (1, 8, 8), generator=generator)
    x = F.one_hot(answer, 3).movedim(-1, 1).double() * 1e3
    expected = []
    for c in range(3):
        both, either = ((truth == c) & (answer == c)).sum(), ((truth == c) | (answer == c)).sum()
        expected.append(1 - (both / either).item())
    assert losses.lovasz(x, truth).item() == pytest.approx(sum(expected) / 3, rel=1e-6)


def test_lovasz_leaves_out_void_and_classes_of_weight_0():
    x, truth = logits().detach(), labels()
    changed = x.clone()
    changed.movedim(1, -1)[truth == IGNORE] += 5.0
    assert losses.lovasz(changed, truth) == losses.lovasz(x, truth)
    weight = torch.ones(K, dtype=torch.float64)
    each = []
    for c in truth[truth != IGNORE].unique().tolist():
        only = torch.zeros_like(weight)
        only[c] = 1.0
        each.append(losses.lovasz(x, truth, only).item())
    assert losses.lovasz(x, truth, weight).item() == pytest.approx(sum(each) / len(each), rel=1e-12)
    assert losses.lovasz(x, torch.full_like(truth, IGNORE)) == 0


def test_lovasz_of_many_pixels_is_that_of_a_spread_sample(monkeypatch):
    x, truth = torch.randn(1, K, 64, 64).double(), torch.randint(0, K, (1, 64, 64))
    whole = losses.lovasz(x, truth).item()
    monkeypatch.setattr(losses, "LOVASZ_PIXELS", 2048)
    # half of 4096 pixels: the mean of K IoUs, each of some 800 pixels, moves by a few hundredths at most
    assert losses.lovasz(x, truth).item() == pytest.approx(whole, abs=0.05)


def test_lovasz_gradient():
    x = logits(requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: losses.lovasz(v, labels()), (x,))


def test_a_sum_is_the_mean_times_the_labelled_pixels():
    y = labels()
    count = int((y != IGNORE).sum())
    mean, total = losses.cross_entropy(logits(), y), losses.cross_entropy_sum(logits(), y)
    assert total.item() == pytest.approx(count * mean.item())
