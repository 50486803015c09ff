"""Every recipe names things that exist, and the ablation's rows differ by what the paper's tables say."""

from dataclasses import asdict

import pytest
import torch

from enfilade import checkpoint, losses, recipes
from enfilade.errors import UserError
from enfilade.labels import SPACES
from enfilade.optim import freeze, learning_rate, make_optimiser, part_of
from enfilade.train import extra_inputs
from enfilade.types import Batch

NAMES = sorted(recipes.RECIPES)


def substitute(recipe) -> torch.nn.Module:
    """The recipe's model around a tiny encoder, decoders of the same number of blocks."""
    tiny = {"encoder": "test_efficientnet", "weights": None}
    if recipe.model == "gad":
        tiny |= {"bottleneck": 8, "widths": (8,) * len(recipe.arguments.get("widths", (0,) * 4)), "embedding": 8}
    elif recipe.model == "rsn":
        tiny |= {"width": 16, "refine_width": 4}
    elif recipe.model == "completion":
        del tiny["encoder"]
    elif recipe.model == "peer":
        pytest.importorskip("segmentation_models_pytorch")
    torch.manual_seed(0)
    network = checkpoint.build(recipe.model, recipe.arguments | tiny)
    if recipe.model == "fcn8s":
        for score in network.score:
            torch.nn.init.normal_(score.weight)  # at 0, as it starts, it passes no gradient on
    return network


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_can_take_a_step(name):
    """Its parts, terms and rates exist, all its losses are finite, and each trained parameter gets a gradient."""
    recipe = recipes.get(name)
    assert recipe.name == name
    assert recipe.model in checkpoint.MODELS
    classes = recipe.arguments.get("classes", 12 if recipe.volumes else 40)
    assert classes == len(SPACES[recipe.space])
    network = substitute(recipe)
    parts = set(network.parts)
    batch = Batch(
        image=torch.rand(2, 3, 64, 64),
        labels=torch.randint(0, 40, (2, 64, 64)),
        depth=torch.rand(2, 64, 64) * 3 + 1,
        hha=torch.rand(2, 3, 64, 64),
        support=torch.rand(2, 64, 64) * 3 + 1,
        regions=torch.randint(1, 9, (2, 64, 64)),
        tsdf=torch.rand(2, 1, 32, 16, 32) * 2 - 1,
        volume=torch.randint(0, 12, (2, 8, 4, 8)),
        voxels=torch.randint(-1, 256, (2, 64, 64)),
        pixels=torch.randint(-1, 4096, (2, 8, 4, 8)),
        taught=torch.randn(2, classes, 16, 16).log_softmax(1),
    )
    batch.labels[batch.labels >= classes] = 255
    assert recipe.stages or name == "rsn-support"  # whose answer is what it is given
    for stage in recipe.stages:
        assert all(losses.resolve(name) for name in stage.losses)
        assert set(stage.train) <= parts | {"*"}
        assert set(stage.clip) <= parts
        assert set(stage.lr_parts) <= parts
        assert stage.epochs > 0
        assert stage.batch > 1  # batch norms need it at the deepest level of a small crop
        assert 0 < stage.zoom[0] <= stage.zoom[1]
        assert learning_rate(stage, 0, 100, 10) > 0
        freeze(network, stage)
        assert make_optimiser(network, stage).param_groups
        output = network(batch.image, **extra_inputs(network, batch, stage.inputs))
        total, values = losses.objective(output, batch, stage.losses)
        assert all(v.isfinite() for v in values.values())
        network.zero_grad()
        total.backward()
        lost = [n for n, p in network.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
        assert not lost, f"{stage.name} trains {lost[:3]} without a loss that sees it"
    assert part_of(network) or not recipe.stages


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_passed_on(name):
    assert recipes.get(name, "some/file.safetensors").arguments["weights"] == "some/file.safetensors"
    assert recipes.get(name).arguments["weights"] in (None, "timm")


def test_typos_are_corrected():
    with pytest.raises(UserError, match=r"did you mean .*'gad-nyuv2'"):
        recipes.get("gad-nyu")
    with pytest.raises(UserError, match=r"did you mean .*'gad-vanconv'"):
        recipes.get("gad-vancov")
    with pytest.raises(UserError, match="fpn-peer"):
        recipes.get("zzz")


# What Table 4 of the paper writes in its first column
TABLE4 = {
    "sem-only": "sem",
    "Ls": "sem+Ls",
    "Ls-hha": "sem+Ls+HHA",
    "depem": "sem+Ls+DepEm",
    "featprop": "sem+Ls+DepEm+FeatProp",
    "vanconv": "sem+Ls+DepEm+FeatProp+VanConv",
    "gap": "sem+Ls+DepEm+FeatProp+GAP",
    "spf": "sem+Ls+DepEm+FeatProp+GAP+SPF",
}


def contents(recipe) -> str:
    """The row's label, read off the recipe and its network."""
    network, terms = substitute(recipe), recipe.stages[0].losses
    label = ["sem"]
    assert ("focal" in terms) != ("cross_entropy" in terms)
    label += ["Ls"] * ("focal" in terms)
    label += ["HHA"] * ("hha" in network.uses)
    assert (network.depth is not None) == ("depth_berhu" in terms)
    label += ["DepEm"] * (network.depth is not None)
    label += ["FeatProp"] * network.propagate
    kind = type(network.fusion).__name__
    label += {"NoneType": [], "VanillaFusion": ["VanConv"], "GeometryAwarePropagation": ["GAP"]}[kind]
    assert (network.spf is not None) == ("side_focal" in terms)
    label += ["SPF"] * (network.spf is not None)
    return "+".join(label)


def test_table_4():
    assert list(recipes.ABLATION) == list(TABLE4)
    for row, label in TABLE4.items():
        assert contents(recipes.get(f"gad-{row}")) == label


def test_rows_share_everything_else():
    rows = [recipes.get(f"gad-{row}") for row in TABLE4]
    base = asdict(rows[0])
    for recipe in rows:
        other = asdict(recipe)
        for field in base.keys() - {"name", "arguments", "stages"}:
            assert other[field] == base[field]
        (stage,), (first,) = other["stages"], base["stages"]
        assert {k: v for k, v in stage.items() if k not in ("losses", "clip")} == {
            k: v for k, v in first.items() if k not in ("losses", "clip")
        }
        for key in ("classes", "encoder", "weights", "bottleneck", "widths"):
            assert recipe.arguments[key] == rows[0].arguments[key]


def test_table_5():
    """0 % is the row without depth; the others are the whole model, with a share of its depth."""
    whole = recipes.get("gad-spf")
    for percent in (20, 40, 60, 80, 100):
        recipe = recipes.get(f"gad-depth-{percent}")
        assert recipe.depth_fraction == percent / 100
        assert recipe.replace(name=whole.name, depth_fraction=1.0) == whole
    nothing = recipes.get("gad-depth-0")
    assert nothing.replace(name="gad-Ls", depth_fraction=1.0) == recipes.get("gad-Ls")


def test_the_paper_recipe_is_the_papers():
    recipe = recipes.get("gad-paper")
    (stage,) = recipe.stages
    assert recipe.arguments["encoder"] == "resnet50"
    assert "bottleneck" not in recipe.arguments  # the constructor's defaults are the paper's
    assert stage.size == (240, 320)
    assert (stage.batch, stage.optimiser) == (8, "adam")
    assert stage.lr == 1e-2
    assert stage.lr * stage.lr_parts["trunk"] == pytest.approx(1e-5)
    per_epoch = 99
    assert learning_rate(stage, 40 * per_epoch - 1, 0, per_epoch) == 1.0
    assert learning_rate(stage, 40 * per_epoch, 0, per_epoch) == pytest.approx(0.1)
    assert set(stage.clip) == {"semantic", "spf"}  # "on the semantic branch and SPF only"
    assert stage.losses == {"focal": 1.0, "depth_berhu": 1.0, "side_focal": 1.0}  # Eq. (8)


def test_a_short_budget_leaves_the_rest_alone():
    recipe = recipes.get("gad-nyuv2")
    short = recipe.with_stages(epochs=1)
    assert [s.epochs for s in short.stages] == [1] * len(recipe.stages)
    assert short.with_stages(epochs=7) == recipe.with_stages(epochs=7)
    assert recipes.get("gad-nyuv2") == recipe


def test_rows_of_the_joint_table_share_their_stages():
    """Table 3 of Mousavian et al.: each row is the one before, and goes on from it."""
    rows = [recipes.get(name) for name in recipes.JOINT_ROWS]
    assert [len(r.stages) for r in rows] == [1, 2, 3, 3]
    for row in rows:
        assert row.stages == rows[-1].stages[: len(row.stages)]
        shared = {"name": "", "arguments": {}, "stages": ()}
        assert row.replace(**shared) == rows[0].replace(**shared)
    assert [r.arguments.get("depth", True) for r in rows] == [False, True, True, True]
    assert [r.arguments.get("crf", "none") for r in rows] == ["none", "none", "rgb", "rgbd"]
    first, second, third = rows[-1].stages
    assert not any("depth" in term for term in first.losses)
    assert "depth" not in first.train
    assert "crf" not in second.train
    assert third.train == ("*",)


def test_the_joint_papers_recipe():
    recipe = recipes.get("joint-paper")
    assert recipe.arguments["encoder"] == "table1"
    semantic, depth, crf = recipe.stages
    assert [s.size for s in recipe.stages] == [(513, 513)] * 3
    assert {s.augmentation for s in recipe.stages} == {"offline"}
    assert depth.losses == {"cross_entropy_sum": 1e-6, "depth_pairwise": 1.0}
    assert (semantic.lr, semantic.momentum, semantic.weight_decay) == (1e-10, 0.99, 5e-4)
    assert crf.lr == 1e-16
    assert crf.lr * crf.lr_parts["crf"] == pytest.approx(1e-13)
    updates = [s.epochs * (6 * 795 // s.batch) for s in recipe.stages]
    assert updates == pytest.approx([160_000, 10_000, 10_000], rel=0.01)
