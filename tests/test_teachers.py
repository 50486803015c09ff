"""Teachers answer for the student's own crop, together, and do not learn."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from enfilade import checkpoint
from enfilade.errors import UserError
from enfilade.teachers import Teachers
from enfilade.train import model_meta, train
from test_train import Boards, stage, tiny

QUIET = {"quiet": True, "workers": 0, "track": "none"}


def teacher(path: Path, seed: int = 0, **changes) -> Path:
    """A small network of random weights, as a model file."""
    recipe = tiny(stage(), **changes)
    torch.manual_seed(seed)
    network = checkpoint.build(recipe.model, recipe.arguments)
    with torch.no_grad():  # else its last layers answer the same for all classes
        for name, parameter in network.named_parameters():
            if name.endswith(("classifier.weight", "side.weight")):
                parameter.mul_(30)
    checkpoint.save_model(path, network, model_meta(recipe, (), {}))
    return path


def said(path: Path, image: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return checkpoint.load(path).network(image).logits.log_softmax(1)


def test_several_answer_by_the_mean_of_their_log_probabilities(tmp_path):
    first, second = teacher(tmp_path / "a.safetensors", 1), teacher(tmp_path / "b.safetensors", 2)
    image = torch.rand(2, 3, 32, 64, generator=torch.Generator().manual_seed(0))
    told = Teachers([str(first), str(second)], tiny(stage()))(image)
    one, other = said(first, image), said(second, image)
    assert told.shape == (2, 5, 8, 16) == one.shape
    assert (one - other).abs().max() > 0.1
    torch.testing.assert_close(told, (one + other) / 2, atol=1e-5, rtol=1e-4)


def test_a_teacher_sees_the_crop_at_its_own_scale(tmp_path):
    path = teacher(tmp_path / "a.safetensors")
    image = torch.rand(1, 3, 32, 64, generator=torch.Generator().manual_seed(0))
    told = Teachers([str(path)], tiny(stage()).replace(scale=0.5))(image)  # the teacher's pixels are half as large
    large = torch.nn.functional.interpolate(image, (64, 128), mode="bilinear", antialias=True)
    wanted = torch.nn.functional.interpolate(said(path, large), (8, 16), mode="bilinear")
    torch.testing.assert_close(told, wanted, atol=1e-5, rtol=1e-4)


def test_a_student_comes_nearer_to_its_teacher_and_the_teacher_stays(tmp_path):
    path = teacher(tmp_path / "t.safetensors", 3, arguments={"dropout": 0.0})
    before = load_file(path)
    losses = {"distillation": 1.0}
    recipe = tiny(stage(epochs=6, losses=losses, teachers=(str(path),), zoom=(1.0, 1.0)), arguments={"dropout": 0.0})
    image = torch.stack([torch.from_numpy(Boards()[i].image).movedim(-1, 0) for i in range(4)])

    def distance(folder: Path) -> float:
        own, told = said(folder / "final.safetensors", image), said(path, image)
        return (told.exp() * (told - own)).sum(1).mean().item()

    train(recipe.with_stages(epochs=1, lr=1e-9), Boards(), out=tmp_path / "start", **QUIET)
    train(recipe, Boards(), out=tmp_path / "run", **QUIET)
    assert distance(tmp_path / "run") < 0.5 * distance(tmp_path / "start")
    assert all(torch.equal(v, load_file(path)[k]) for k, v in before.items())


def test_teachers_that_cannot_teach_are_told(tmp_path):
    path = teacher(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"speaks of nyu40, the recipe of camvid11"):
        Teachers([str(path)], tiny(stage(), space="camvid11"))
    needy = teacher(tmp_path / "hha.safetensors", arguments={"hha": True})
    with pytest.raises(UserError, match=r"takes hha beside RGB"):
        Teachers([str(needy)], tiny(stage()))
    with pytest.raises(UserError, match="nowhere"):
        Teachers([str(tmp_path / "nowhere.safetensors")], tiny(stage()))
    recipe = tiny(stage(losses={"distillation": 1.0}))
    with pytest.raises(UserError, match="teachers in the stage"):
        train(recipe, Boards(), out=tmp_path / "run", **QUIET)
