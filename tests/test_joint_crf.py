"""The joint network: its branches, expected depth, what the CRF sees, and the three stages of its training."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from enfilade import losses
from enfilade.errors import UserError
from enfilade.models.joint_crf import VGG_16, JointCRF, TableOne, expected_depth, paper_kernels, summed
from enfilade.ops.crf import PAPER_KERNELS
from enfilade.optim import freeze, part_of
from enfilade.recipes import joint_row
from enfilade.types import Batch

K = 5
SMALL = {"classes": K, "encoder": "test_efficientnet", "widths": (4, 5, 6, 7, 8), "bins": 6, "bin_length": 1.0}
CRF = {"crf": "rgbd", "theta": ((8, 13), (6, 0.5), (2,)), "crf_stride": 2}


def make(**options) -> JointCRF:
    torch.manual_seed(0)
    return JointCRF(**SMALL | options)


def image(h=64, w=96, b=2, seed=0):
    return torch.rand(b, 3, h, w, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [(64, 96), (65, 33), (31, 50)])
@pytest.mark.parametrize("options", [{}, {"depth": False}, CRF, CRF | {"crf": "rgb", "crf_stride": 1}])
def test_shapes_at_any_size(size, options):
    network = make(**options).eval()
    with torch.no_grad():
        output = network(image(*size))
    h, w = size
    half = (2, K, -(-h // 2), -(-w // 2))
    assert output.logits.shape == ((2, K, h, w) if options.get("crf_stride") == 1 else half)
    assert (output.depth is None) == (options.get("depth") is False)
    if output.depth is not None:
        assert output.depth.shape == (2, *half[2:])
        assert 1.0 <= output.depth.min() <= output.depth.max() <= 6.0  # metres: the bins' first and last
    assert [s.shape for s in output.side_logits] == ([half] if "crf" in options else [])


def test_table_1():
    """The paper's own branches: channels and strides of Table 1, heads of 40 and 50."""
    trunk = TableOne().eval()
    with torch.no_grad():
        features = trunk(image(48, 64, 1))
    assert tuple(f.shape[1] for f in features) == TableOne.channels
    assert [64 // f.shape[3] for f in features] == list(TableOne.strides)
    network = JointCRF()
    assert [(h.in_channels, h.out_channels) for h in network.semantic] == [(c, 40) for c in TableOne.channels]
    assert [(h.in_channels, h.out_channels) for h in network.depth] == [(c, 50) for c in TableOne.channels]


def vgg_file(path, **changes) -> str:
    """Random weights with the keys and shapes of timm's VGG-16 (its convolutions)."""
    import timm

    tensors = {k: v for k, v in timm.create_model("vgg16").state_dict().items() if k.startswith("features.")}
    save_file(tensors | changes, path)
    return str(path)


def test_table_1_starts_from_a_vgg_file(tmp_path):
    from safetensors.torch import load_file

    file = vgg_file(tmp_path / "vgg.safetensors")
    trunk, tensors = TableOne(file), load_file(file)
    own = trunk.state_dict()
    for name, layer in VGG_16.items():
        torch.testing.assert_close(own[f"{name}.0.weight"], tensors[f"features.{layer}.weight"])
    assert "11 of 17 convolutions" in trunk.loaded
    assert sum(isinstance(m, torch.nn.Conv2d) for m in trunk.modules()) == 17
    broken = vgg_file(tmp_path / "other.safetensors", **{"features.5.weight": torch.zeros(3)})
    with pytest.raises(UserError, match=r"features\.5\.weight is missing or different"):
        TableOne(broken)
    with pytest.raises(UserError, match="no VGG-16 weights at nowhere"):
        TableOne("nowhere")


def test_expected_depth_by_hand():
    responses = torch.randn(1, 4, 2, 3, dtype=torch.float64)
    got = expected_depth(responses, 0.25)
    for y in range(2):
        for x in range(3):
            p = responses[0, :, y, x].exp()
            want = sum(0.25 * (b + 1) * p[b] for b in range(4)) / p.sum()
            assert got[0, y, x].item() == pytest.approx(want.item(), rel=1e-5)


def test_scores_of_all_branches_count_alike():
    """A sum of the branches: each adds its own score, resized, whatever the others are."""
    sizes = [(8, 12), (4, 6), (2, 3), (1, 2)]
    maps = [torch.randn(1, K, *s) for s in sizes]
    got = summed(maps)
    assert got.shape == (1, K, 8, 12)
    zeros = [torch.zeros_like(m) for m in maps]
    alone = sum(summed([*zeros[:i], m, *zeros[i + 1 :]]) for i, m in enumerate(maps))
    torch.testing.assert_close(got, alone)
    torch.testing.assert_close(summed([torch.full_like(m, 2.0) for m in maps]), torch.full((1, K, 8, 12), 8.0))


def test_kernels_are_the_papers():
    assert paper_kernels(((160, 3), (50, 0.2), (3,))) == PAPER_KERNELS
    halved = paper_kernels(((160, 3), (50, 0.2), (3,)), 2)
    assert [k.xy for k in halved] == [80, 25, 1.5]  # pixels of a grid half as fine
    assert [(k.rgb, k.depth) for k in halved] == [(3, None), (None, 0.2), (None, None)]
    with pytest.raises(UserError, match="theta is"):
        paper_kernels(((160, 3), (50,), (3,)))


def test_depth_enters_the_crf_as_data_and_moves_its_answer():
    """Sem-CRF+ sees the estimated depth; no gradient of the labels' loss goes into it."""
    network = make(**CRF).train()
    network(image()).logits.square().sum().backward()
    assert all(head.weight.grad is None for head in network.depth)
    assert all(head.weight.grad.any() for head in network.semantic)
    network.eval()
    with torch.no_grad():
        before = network(image()).logits
        for head in network.depth:
            head.weight.mul_(50)
        after = network(image())
        assert not torch.allclose(before, after.logits, atol=1e-4)
    plain = make(**CRF | {"crf": "rgb"}).eval()
    with torch.no_grad():
        before = plain(image()).logits
        for head in plain.depth:
            head.weight.mul_(50)
        torch.testing.assert_close(before, plain(image()).logits)


def test_a_crf_without_weights_leaves_the_unaries():
    network = make(**CRF).eval()
    with torch.no_grad():
        network.crf.weights.zero_()
        output = network(image())
    torch.testing.assert_close(output.logits, output.side_logits[0], atol=1e-5, rtol=1e-5)


def test_the_crf_gathers_what_looks_alike():
    """Two plain halves, unaries with noise: the CRF's answer has each half nearer to one label."""
    network = make(classes=2, **CRF | {"crf": "rgb", "crf_stride": 1}).eval()
    picture = torch.zeros(1, 3, 24, 32)
    picture[..., 16:] = 1
    truth = (torch.arange(32) >= 16).long().expand(1, 24, 32)
    noise = torch.randn(1, 2, 24, 32, generator=torch.Generator().manual_seed(1))
    unary = F.one_hot(truth, 2).movedim(-1, 1) + 1.5 * noise
    with torch.no_grad():
        refined = network.refine(unary, picture, None)
    wrong = [(x.argmax(1) != truth).float().mean().item() for x in (unary, refined)]
    assert wrong[0] > 0.15
    assert wrong[1] < 0.05


def test_stages_go_past_a_frozen_crf():
    """Stages 1 and 2 train the unaries alone; stage 3 the CRF's answer and everything."""
    network = make(**CRF)
    recipe = joint_row("joint-crf-depth")
    batch = Batch(image(), labels=torch.randint(0, K, (2, 64, 96)), depth=torch.rand(2, 64, 96) + 1)
    for stage, trained, sides in zip(
        recipe.stages, [{"trunk", "semantic"}, {"trunk", "semantic", "depth"}, set(network.parts)], [0, 0, 1]
    ):
        freeze(network, stage)
        output = network(batch.image)
        assert len(output.side_logits) == sides
        network.zero_grad()
        total, _ = losses.objective(output, batch, stage.losses)
        total.backward()
        owner = part_of(network)
        moved = {owner[n] for n, p in network.named_parameters() if p.grad is not None and p.grad.any()}
        assert moved == trained


def test_training_the_crf_lowers_its_loss():
    network = make(**CRF | {"crf": "rgb"})
    for head in network.semantic:
        head.weight.data *= 30  # unaries that differ: from equal ones, mean field goes where rounding sends it
    freeze(network, joint_row("joint-crf").stages[2])
    batch = Batch(image(32, 32), labels=torch.randint(0, K, (2, 32, 32)))
    optimiser = torch.optim.Adam(network.crf.parameters(), lr=0.02)
    values = []
    for _ in range(8):
        loss, _ = losses.objective(network(batch.image), batch, {"cross_entropy": 1.0})
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        values.append(loss.item())
    assert values[-1] < values[0]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"crf": "rgbd", "depth": False}, "needs a network that estimates depth"),
        ({"widths": (1, 2)}, "five branches"),
        ({"crf_stride": 0}, "crf_stride is at least 1"),
        ({"encoder": "vgg11_bn"}, "needs 2, 4, 8, 16, 32"),
    ],
)
def test_wrong_arguments(options, sentence):
    with pytest.raises(UserError, match=sentence):
        make(**options)
