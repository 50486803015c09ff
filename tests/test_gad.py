"""GAD's blocks against the equations written out, and the network in every row of its ablation."""

import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from jaxtyping import TypeCheckError
from torch import nn

from enfilade import losses
from enfilade.errors import UserError
from enfilade.models import geometry_distillation as gad
from enfilade.models.geometry_distillation import GAD, GeometryAwarePropagation, UpConv
from enfilade.models.peers import Peer
from enfilade.optim import part_of
from enfilade.recipes import ABLATION
from enfilade.types import IGNORE, Batch

SMALL = {"classes": 5, "encoder": "test_efficientnet", "bottleneck": 8, "widths": (8, 8, 8), "embedding": 8}


def small(**changes) -> GAD:
    torch.manual_seed(0)
    return GAD(**(SMALL | changes))


def inputs(model, size=(64, 64), batch=2, seed=0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.rand(batch, 3, *size, generator=generator) for k in ("image", *model.uses)}


def triple(h=4, w=5, m=3, d=2, seed=0, **options):
    """eta, phi and delta of two small maps, float64."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, c, h, w, generator=generator, dtype=torch.float64, **options) for c in (m, m, d))


# Propagation, Eq. (3)-(5)


def softplus(x: float) -> float:
    return float(np.log1p(np.exp(x)))


def by_loops(eta, phi, delta, weight, neighbours):
    """Eq. (3) position by position: q_i = sum_j W_ij delta_j / sum_j W_ij over the neighbours of i."""
    b, d, h, w = delta.shape
    q = torch.zeros_like(delta)
    for n, y, x in np.ndindex(b, h, w):
        total, norm = torch.zeros(d, dtype=delta.dtype), 0.0
        for v, u in np.ndindex(h, w):
            if neighbours(y, x, v, u):
                wij = weight(eta[n, :, y, x].tolist(), phi[n, :, v, u].tolist())
                total += wij * delta[n, :, v, u]
                norm += wij
        q[n, :, y, x] = total / norm
    return q


def dot(e, f):
    return sum(softplus(a) * softplus(b) for a, b in zip(e, f))


def everywhere(*_):
    return True


def test_dot_softmax_and_reference_by_loops():
    maps = triple()
    want = by_loops(*maps, dot, everywhere)
    torch.testing.assert_close(gad.propagate_dot(*maps), want)
    torch.testing.assert_close(gad.propagate_reference(*maps), want)
    want = by_loops(*maps, lambda e, f: np.exp(np.dot(e, f)), everywhere)
    torch.testing.assert_close(gad.propagate_softmax(*maps), want)


@pytest.mark.parametrize("window", [1, 3, 5, 9])
def test_window_by_loops(window):
    maps = triple()
    r = window // 2
    want = by_loops(*maps, dot, lambda y, x, v, u: abs(y - v) <= r and abs(x - u) <= r)
    torch.testing.assert_close(gad.propagate_window(*maps, window), want)


def test_window_that_covers_all_is_dot():
    maps = triple()
    torch.testing.assert_close(gad.propagate_window(*maps, 11), gad.propagate_dot(*maps))


def test_even_windows_are_refused():
    with pytest.raises(ValueError, match="odd"):
        GeometryAwarePropagation(8, affinity="window", window=4)
    with pytest.raises((ValueError, TypeCheckError), match="cosine"):  # tests check annotations, users run the check
        GeometryAwarePropagation(8, affinity="cosine")  # type: ignore[arg-type]


FORMS = {
    "dot": gad.propagate_dot,
    "softmax": gad.propagate_softmax,
    "window": lambda *maps: gad.propagate_window(*maps, 3),
    "reference": gad.propagate_reference,
}


@pytest.mark.parametrize("name", FORMS)
def test_propagation_gradients(name):
    assert torch.autograd.gradcheck(FORMS[name], triple(3, 3, requires_grad=True))


def test_dot_gradients_equal_the_reference():
    a, b = triple(6, 7, requires_grad=True), triple(6, 7, requires_grad=True)
    direction = torch.randn(2, 2, 6, 7, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    (gad.propagate_dot(*a) * direction).sum().backward()
    (gad.propagate_reference(*b) * direction).sum().backward()
    for x, y in zip(a, b):
        torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("name", FORMS)
def test_constant_features_stay_constant(name):
    """The rows of W / sum W add up to 1."""
    eta, phi, _ = triple()
    constant = torch.tensor([2.5, -1.0], dtype=torch.float64).view(1, 2, 1, 1).expand(2, 2, 4, 5)
    torch.testing.assert_close(FORMS[name](eta, phi, constant), constant.clone())


@pytest.mark.parametrize("name", ["dot", "softmax", "reference"])
def test_all_positions_are_equal(name):
    """Shuffling the positions shuffles the result: nothing depends on where a neighbour is."""
    maps = triple()
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    shuffled = [x.flatten(2)[..., order].view_as(x) for x in maps]
    torch.testing.assert_close(FORMS[name](*shuffled), FORMS[name](*maps).flatten(2)[..., order].view_as(maps[2]))


def test_dot_in_fp32_over_many_positions_and_large_scores():
    """A full-resolution map: 76,800 positions, in fp32 and under autocast, against float64."""
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(1, 4, 240, 320, generator=generator) * s for s in (20, 20, 1)]
    exact = gad.propagate_dot(*(x.double() for x in maps))
    torch.testing.assert_close(gad.propagate_dot(*maps).double(), exact, atol=1e-5, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        have = gad.propagate_dot(*(x.bfloat16() for x in maps))
    assert have.dtype == torch.float32
    rounded = gad.propagate_dot(*(x.bfloat16().double() for x in maps))
    torch.testing.assert_close(have.double(), rounded, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("affinity", ["dot", "softmax", "window"])
def test_gap_adds_the_propagated_feature_to_its_input(affinity):
    """Eq. (5): with a zero last projection only the input p is left."""
    block = GeometryAwarePropagation(8, inner=4, affinity=affinity, window=3).eval()
    p, embedding = torch.randn(2, 2, 8, 6, 5).unbind(0)
    assert not torch.allclose(block(p, embedding), p)
    nn.init.zeros_(block.out[0].weight)
    torch.testing.assert_close(block(p, embedding), p)


def test_gap_is_equation_5():
    """Which projection takes which map: η and φ the depth embedding, at i and at j; δ the label feature."""
    torch.manual_seed(0)
    block = GeometryAwarePropagation(8, inner=4).eval()
    p, embedding = torch.randn(2, 2, 8, 6, 5).unbind(0)
    eta, phi, delta = (F.softplus(block.eta(embedding)), F.softplus(block.phi(embedding)), block.delta(p))
    w = torch.einsum("bmyx,bmvu->byxvu", eta, phi)
    q = torch.einsum("byxvu,bdvu->bdyx", w, delta) / w.sum((3, 4))[:, None]
    torch.testing.assert_close(block(p, embedding), block.out(q) + p, atol=1e-5, rtol=1e-4)


# Up-projection


def test_upconv_can_be_the_5x5_convolution_of_the_stuffed_map():
    """Laina et al.: stuff zeros between the values, convolve 5x5. UpConv's taps can be set to give just that."""
    torch.manual_seed(0)
    cin, cout, h, w = 3, 2, 4, 5
    kernel = torch.randn(cout, cin, 5, 5)
    x = torch.randn(2, cin, h, w)
    stuffed = torch.zeros(2, cin, 2 * h, 2 * w)
    stuffed[..., ::2, ::2] = x
    want = F.conv2d(stuffed, kernel, padding=2)

    up = UpConv(cin, cout)
    up.bn = nn.Identity()  # type: ignore[assignment]
    taps = torch.zeros_like(up.conv.weight)
    used = 0
    for c in range(cout):
        for py, px in np.ndindex(2, 2):  # output pixel (2y + py, 2x + px)
            for ky, kx in np.ndindex(5, 5):
                # it sees stuffed pixel (2y + py + ky - 2, ...), which holds a value where that is even
                if (py + ky) % 2 == 0 and (px + kx) % 2 == 0:
                    dy, dx = (py + ky - 2) // 2, (px + kx - 2) // 2  # of x, in -1..1
                    taps[4 * c + 2 * py + px, :, dy + 1, dx + 1] = kernel[c, :, ky, kx]
                    used += 1
    assert used == 25 * cout  # each tap of the kernel has one place among the 36
    up.conv.weight = nn.Parameter(taps)
    torch.testing.assert_close(up(x), want, atol=1e-5, rtol=1e-5)


def test_up_projection_doubles():
    assert gad.UpProjection(6, 4)(torch.randn(2, 6, 3, 5)).shape == (2, 4, 6, 10)


# The network


ROWS = {name: dict(row) for name, row in ABLATION.items()}
ROWS["window"] = {"affinity": "window", "window": 3}
ROWS["softmax"] = {"affinity": "softmax"}
ROWS["wide"] = {"widths": (8, 8, 8, 8)}  # the paper's four blocks: decoders end at a half, SPF at a quarter
ROWS["tapered"] = {"spf_widths": (16, 12, 8, 4)}
ROWS["twins"] = {"encoders": 2}
ROWS["finer"] = {"spf_widths": (16, 12, 8, 6, 4)}
ROWS["pooled"] = {"average": True, "context": 2}  # as in gad-after-rooms


@pytest.mark.parametrize("size", [(97, 131), (64, 96), (31, 33)])
@pytest.mark.parametrize("row", ROWS)
def test_shapes_at_odd_sizes(row, size):
    model = small(**ROWS[row]).eval()
    with torch.no_grad():
        out = model(**inputs(model, size))
    h, w = size
    blocks = len(model.semantic.blocks)
    decoder = (-(-h * 2**blocks // 32), -(-w * 2**blocks // 32))
    spf = [(-(-h // s), -(-w // s)) for s in (32, 16, 8, 4, 2)][: len(model.spf or ())]
    assert out.logits.shape == (2, 5, *(spf[-1] if model.spf else decoder))
    if model.depth is None:
        assert out.depth is None
    else:
        assert out.depth.shape == (2, *decoder)
        assert (out.depth > 0).all()
    if model.spf:
        assert [tuple(s.shape[-2:]) for s in out.side_logits] == [decoder, *spf[:-1]]
    else:
        assert out.side_logits == ()


@pytest.mark.parametrize("row", ROWS)
def test_every_parameter_gets_a_gradient(row):
    model = small(**ROWS[row])
    out = model(**inputs(model))
    total = out.logits.square().mean() + sum(s.square().mean() for s in out.side_logits)
    if out.depth is not None:
        total = total + out.depth.square().mean()
    total.backward()
    # a bias before a batch norm would get none; there are no such biases, so all must have one
    lost = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not lost


@pytest.mark.parametrize("row", ROWS)
def test_parts_cover_every_parameter_once(row):
    model = small(**ROWS[row])
    counted = [id(p) for modules in model.parts.values() for m in modules for p in m.parameters()]
    assert len(counted) == len(set(counted)) == len(list(model.parameters()))
    assert part_of(model).keys() == dict(model.named_parameters()).keys()


def test_rows_differ_by_what_the_table_says():
    models = {row: small(**arguments) for row, arguments in ABLATION.items()}
    parts = {row: set(model.parts) for row, model in models.items()}
    assert parts["sem-only"] == parts["Ls"] == parts["Ls-hha"] == {"trunk", "semantic"}
    assert parts["depem"] == parts["featprop"] == {"trunk", "semantic", "depth"}
    assert parts["vanconv"] == parts["gap"] == {"trunk", "semantic", "depth", "fusion"}
    assert parts["spf"] == {"trunk", "semantic", "depth", "fusion", "spf"}
    assert models["Ls-hha"].uses == ("hha",)
    assert not models["depem"].propagate
    assert models["featprop"].propagate
    assert isinstance(models["vanconv"].fusion, gad.VanillaFusion)
    assert isinstance(models["gap"].fusion, GeometryAwarePropagation)


def leak(row) -> float:
    """How far label scores move when the depth decoder's weights do."""
    model = small(**ABLATION[row]).eval()
    x = inputs(model)
    with torch.no_grad():
        before = model(**x).logits
        for p in model.depth.parameters():
            p.add_(0.3)
        return (model(**x).logits - before).abs().max().item()


def test_depth_reaches_labels_only_where_it_is_propagated():
    assert leak("depem") == 0
    for row in ("featprop", "vanconv", "gap", "spf"):
        assert leak(row) > 0


def test_featprop_adds_the_depth_features_before_the_next_block():
    decoder = gad.Decoder(6, (8, 8, 8), 8).eval()
    x = torch.randn(1, 6, 3, 4)
    added = [torch.randn(1, 8, 3 * s, 4 * s) for s in (2, 4, 8)]
    with torch.no_grad():
        _, levels = decoder(x, added)
        want = decoder.blocks[0](x)
        torch.testing.assert_close(levels[0], want)
        want = decoder.blocks[1](want + added[0])
        torch.testing.assert_close(levels[1], want)
        torch.testing.assert_close(levels[2], decoder.blocks[2](want + added[1]))  # the last level adds nothing


@pytest.mark.parametrize("widths", [(16, 12), (16, 12, 8, 4), (16, 12, 8, 6, 4)])
def test_spf_widths_are_those_of_the_blocks_that_meet_as_many_levels(widths):
    model = small(spf_widths=widths)
    assert tuple(block.side.in_channels for block in model.spf) == widths  # deep to shallow
    levels = model.trunk.channels[::-1][: len(widths)]
    assert [block.reduce[0].in_channels for block in model.spf] == levels


def test_more_spf_blocks_than_levels():
    with pytest.raises(UserError, match="has 5: give at most so many spf_widths, not 6"):
        small(spf_widths=(8,) * 6)


def seen_by_first_side(average: bool) -> torch.Tensor:
    """Which positions of the GAP output the first SPF block looks at: where its side output has a gradient."""
    model = small(average=average).eval()
    seen = {}

    def keep(module, arguments, output):
        output.retain_grad()
        seen["p"] = output

    model.fusion.register_forward_hook(keep)
    model(**inputs(model, batch=1)).side_logits[1].square().sum().backward()
    return seen["p"].grad.abs().sum((0, 1)) > 0


def test_average_lets_spf_see_every_position():
    sampled, averaged = seen_by_first_side(False), seen_by_first_side(True)
    assert averaged.all()  # 16x16 positions for 2x2 cells of 8x8
    assert sampled.sum() == 4 * 4  # bilinear: the four about the centre of each cell


def test_context_widens_the_view_before_the_decoders():
    for context, reach in ((0, 0), (1, 1), (2, 2)):
        model = small(context=context).eval()
        x = torch.zeros(1, model.trunk.channels[-1], 7, 7, requires_grad=True)
        model.squeeze(x)[0, :, 3, 3].sum().backward()
        rows = x.grad.abs().sum((0, 1, 3)).nonzero().flatten()
        assert (rows.min(), rows.max()) == (3 - reach, 3 + reach)


def test_hha_is_required_where_it_was_asked_for():
    model = small(hha=True)
    assert model.trunk.mean.shape[1] == 6
    with pytest.raises(ValueError, match="hha"):
        model(torch.rand(1, 3, 64, 64))
    with pytest.raises((ValueError, TypeCheckError), match="fusion"):
        small(fusion="sum")


@pytest.mark.parametrize("row", ["spf", "Ls-hha", "softmax", "window"])
def test_samples_do_not_see_each_other(row):
    model = small(**ROWS[row]).eval()
    x = inputs(model, (50, 70), batch=3)
    with torch.no_grad():
        together = model(**x)
        for i in range(3):
            alone = model(**{k: v[i : i + 1] for k, v in x.items()})
            torch.testing.assert_close(alone.logits[0], together.logits[i], atol=1e-4, rtol=1e-4)
            if alone.depth is not None:
                torch.testing.assert_close(alone.depth[0], together.depth[i], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("row", ["featprop", "vanconv", "gap", "spf"])
def test_samples_without_depth_do_not_train_the_depth_decoder(row):
    """Section 4.5. The label loss of one sample alone, through FeatProp and fusion, in both roles of the sample."""
    decoder = ("depth.", "depth_head.")

    def gradients(has_depth):
        model = small(**ABLATION[row])
        out = model(**inputs(model), has_depth=torch.tensor(has_depth))
        known = torch.tensor(has_depth).view(-1, 1, 1).float()
        truth = torch.full(out.depth.shape, 2.0) * known
        scores = out.logits.square()[0].mean()  # the first sample's
        (scores + losses.depth_berhu(out.depth, truth)).backward()
        return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}

    nobody = gradients([False, False])
    assert not any(g.any() for n, g in nobody.items() if n.startswith(decoder))
    assert any(g.any() for n, g in nobody.items() if n.startswith("trunk."))
    everybody = gradients([True, True])
    assert all(g.any() for n, g in everybody.items() if n.startswith(decoder))

    # Only the second sample has depth: the first one's label loss must not reach the decoder at all
    model = small(**ABLATION[row]).eval()  # batch norms would tie the samples together
    out = model(**inputs(model), has_depth=torch.tensor([False, True]))
    out.logits.square()[0].mean().backward()
    assert not any(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if n.startswith(decoder))
    model.zero_grad()
    out = model(**inputs(model), has_depth=torch.tensor([False, True]))
    out.logits.square()[1].mean().backward()
    assert any(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if n.startswith(decoder))


def test_has_depth_changes_gradients_and_never_values():
    model = small().eval()
    x = inputs(model)
    with torch.no_grad():
        plain, marked = model(**x), model(**x, has_depth=torch.tensor([True, False]))
    assert torch.equal(plain.logits, marked.logits)
    assert torch.equal(plain.depth, marked.depth)


def test_dropout_only_in_training():
    model = small(dropout=0.5).eval()
    x = inputs(model)
    with torch.no_grad():
        assert torch.equal(model(**x).logits, model(**x).logits)
        model.train()
        assert not torch.equal(model(**x).logits, model(**x).logits)


def test_the_first_depth_is_a_rooms():
    with torch.no_grad():
        depth = small().eval()(torch.rand(2, 3, 64, 64)).depth
    assert depth.mean().item() == pytest.approx(2.7, abs=0.7)


def test_overfits_two_samples():
    torch.manual_seed(0)
    model = small(bottleneck=16, widths=(16, 16, 16), embedding=16)
    rng = np.random.default_rng(0)
    labels = torch.from_numpy(np.kron(rng.integers(0, 5, (2, 4, 4)), np.ones((16, 16))).astype(np.int64))
    labels[:, 30:34] = IGNORE
    depth = 1 + 0.7 * labels.where(labels != IGNORE, 0).float()
    image = torch.rand(2, 3, 64, 64)  # noise: each sample can only be learned by heart
    batch = Batch(image=image, labels=labels, depth=depth)
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    begun = time.monotonic()
    for _ in range(200):
        out = model(image, has_depth=batch.has_depth)
        loss, _ = losses.objective(out, batch, {"focal": 1.0, "side_focal": 0.5, "depth_berhu": 0.5})
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        answer = losses.nearest(labels, out.logits.shape[-2:])
        known = answer != IGNORE
        right = (out.logits.argmax(1) == answer)[known].float().mean()
        error = (out.depth - losses.nearest(depth, out.depth.shape[-2:])).abs().median()
        if right > 0.95 and error < 0.2:
            break
        assert time.monotonic() - begun < 60
    assert right > 0.95
    assert error < 0.2


@pytest.mark.parametrize("architecture", ["FPN", "Unet"])
def test_peers(architecture):
    pytest.importorskip("segmentation_models_pytorch")
    model = Peer(architecture=architecture, classes=5, encoder="mobilenetv2_035")
    assert "mobilenetv2_035" in model.loaded
    for size in ((97, 131), (64, 64)):
        assert model(torch.rand(2, 3, *size)).logits.shape == (2, 5, *size)
    counted = [id(p) for modules in model.parts.values() for m in modules for p in m.parameters()]
    assert len(counted) == len(set(counted)) == len(list(model.parameters()))
    model(torch.rand(2, 3, 64, 64)).logits.square().mean().backward()
    lost = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not lost
