"""Encoders at any size, and no doubt about which weights they hold."""

import copy

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from enfilade.errors import UserError
from enfilade.models.encoders import Encoder, SideBySide, in_fp32, pad_to_multiple

NAMES = ["mobilenetv2_035", "test_resnet", "test_efficientnet"]


def weight_file(path, name, **changes):
    """A file with timm's keys, from a seed that no test uses otherwise."""
    torch.manual_seed(77)
    extra = {"pad_type": "same"} if name.startswith("mobilenetv2") else {}
    state = timm.create_model(name, pretrained=False, **extra).state_dict()
    for v in state.values():
        if v.is_floating_point():  # running statistics, too, must come from the file
            v += 0.01 + 0.05 * torch.rand_like(v)
    save_file({k: v.contiguous() for k, v in state.items()} | changes, path)
    return path


@pytest.mark.parametrize("size", [(97, 131), (64, 64), (1, 1), (33, 200)])
@pytest.mark.parametrize("name", NAMES)
def test_any_size(name, size):
    encoder = Encoder(name).eval()
    h, w = size
    with torch.no_grad():
        features = encoder(torch.rand(1, 3, h, w))
    assert len(features) == len(encoder.channels) == len(encoder.strides)
    assert list(encoder.strides) == sorted(encoder.strides)
    for f, c, s in zip(features, encoder.channels, encoder.strides):
        assert tuple(f.shape) == (1, c, -(-h // s), -(-w // s))
        assert f.isfinite().all()


def test_encoders_side_by_side_join_their_maps(tmp_path):
    torch.manual_seed(0)
    both = SideBySide("mobilenetv2_035", count=2).eval()
    x = torch.rand(1, 3, 40, 56)
    with torch.no_grad():
        one, other = both.nets[0](x), both.nets[1](x)
        found = both(x)
    assert not torch.equal(one[0], other[0])  # each has weights of its own
    for have, a, b, channels in zip(found, one, other, both.channels, strict=True):
        assert torch.equal(have, torch.cat([a, b], 1))
        assert have.shape[1] == channels
    assert both.loaded.startswith("2 times encoder mobilenetv2_035: random weights")
    path = weight_file(tmp_path / "w.safetensors", "mobilenetv2_035")
    alike = SideBySide("mobilenetv2_035", count=2, weights=str(path)).state_dict()
    for name, value in Encoder("mobilenetv2_035", weights=str(path)).state_dict().items():
        assert torch.equal(alike[f"nets.0.{name}"], value)
        assert torch.equal(alike[f"nets.1.{name}"], value)


def test_padding_continues_the_border():
    image = torch.arange(12.0).view(1, 1, 3, 4)
    padded = pad_to_multiple(image, 8)
    assert padded.shape[-2:] == (8, 8)
    assert torch.equal(padded[..., :3, :4], image)
    assert (padded[0, 0, 3:, :4] == image[0, 0, 2]).all()
    assert (padded[0, 0, :3, 4:] == image[0, 0, :, 3:]).all()
    assert pad_to_multiple(image, 1) is image


@pytest.mark.parametrize("name", NAMES)
def test_a_local_file_really_loads(tmp_path, name):
    path = weight_file(tmp_path / "w.safetensors", name)
    torch.manual_seed(0)
    encoder = Encoder(name, weights=str(path))
    assert str(path) in encoder.loaded
    assert name in encoder.loaded
    extra = {"pad_type": "same"} if name.startswith("mobilenetv2") else {}
    plain = timm.create_model(name, pretrained=False, features_only=True, **extra).eval()
    plain.load_state_dict({k: v for k, v in load_file(path).items() if k in plain.state_dict()})  # strict
    for key, v in plain.state_dict().items():
        assert torch.equal(encoder.net.state_dict()[key], v), key
    x = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        for have, want in zip(encoder.eval()(x), plain((x - encoder.mean) / encoder.std), strict=True):
            torch.testing.assert_close(have, want)


def test_what_was_loaded_is_said():
    encoder = Encoder("mobilenetv2_035")
    count = sum(p.numel() for p in encoder.net.parameters()) / 1e6
    assert "random" in encoder.loaded
    assert f"{count:.2f} M" in encoder.loaded


def test_unknown_names_are_corrected():
    with pytest.raises(UserError, match=r"did you mean.*'mobilenetv2_100'"):
        Encoder("mobilenetv2_10")
    with pytest.raises(UserError, match="'resnet50'"):
        Encoder("resnet-50")


def test_missing_and_misfit_files(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.safetensors"):
        Encoder("mobilenetv2_035", weights=str(tmp_path / "nowhere.safetensors"))
    other = weight_file(tmp_path / "other.safetensors", "test_resnet")
    with pytest.raises(UserError, match="mobilenetv2_035"):
        Encoder("mobilenetv2_035", weights=str(other))
    (tmp_path / "cut.safetensors").write_bytes(weight_file(tmp_path / "w.safetensors", NAMES[0]).read_bytes()[:5000])
    with pytest.raises(UserError, match=r"cut\.safetensors"):
        Encoder("mobilenetv2_035", weights=str(tmp_path / "cut.safetensors"))


@pytest.mark.parametrize("name", NAMES)
def test_no_silent_random_weights(tmp_path, name):
    """timm loads feature extractors leniently: a file without one of the keys, or with none, must not pass."""
    path = tmp_path / "w.safetensors"
    save_file({"nothing.of.use": torch.zeros(3)}, path)
    with pytest.raises(UserError, match=r"does not fit|cannot load"):
        Encoder(name, weights=str(path))
    state = load_file(weight_file(path, name))
    lost = next(k for k, v in state.items() if v.ndim == 4 and k in Encoder(name).net.state_dict())
    del state[lost]
    save_file(state, path)
    with pytest.raises(UserError, match=r"does not fit|cannot load"):
        Encoder(name, weights=str(path))


def test_loading_leaves_the_random_state_alone(tmp_path):
    path = weight_file(tmp_path / "w.safetensors", "test_resnet")
    draws = []
    for _ in range(2):
        torch.manual_seed(5)
        Encoder("test_resnet", weights=str(path))
        draws.append(torch.rand(3))
    assert torch.equal(*draws)


def test_six_channels(tmp_path):
    path = weight_file(tmp_path / "w.safetensors", "mobilenetv2_035")
    for weights in (None, str(path)):
        encoder = Encoder("mobilenetv2_035", weights=weights, in_channels=6).eval()
        x = torch.rand(1, 6, 40, 56, requires_grad=True)
        encoder(x)[0].sum().backward()
        assert (x.grad.abs().sum((0, 2, 3)) > 0).all()  # every channel counts
    with pytest.raises(Exception, match=r"size|shape|channels|expand"):
        encoder(torch.rand(1, 3, 40, 56))


def test_colours_are_normalised_as_the_weights_want():
    resnet = Encoder("test_resnet")
    config = timm.create_model("test_resnet").pretrained_cfg
    torch.testing.assert_close(resnet.mean.flatten(), torch.tensor(config["mean"]))
    torch.testing.assert_close(resnet.std.flatten(), torch.tensor(config["std"]))
    grey = Encoder("mobilenetv2_035")  # [-1, 1]
    x = torch.tensor([0.0, 0.5, 1.0]).view(1, 1, 1, 3).expand(1, 3, 1, 3)
    assert ((x - grey.mean) / grey.std)[0, 0, 0].tolist() == [-1, 0, 1]


@pytest.mark.parametrize("autocast", [False, True])
def test_strided_depthwise_convolutions_in_fp32(autocast):
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8)
    x = torch.randn(2, 8, 9, 11, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        have = in_fp32(conv, x)
    want = conv(y)
    assert have.dtype == torch.float32
    torch.testing.assert_close(have, want, rtol=0, atol=0)
    have.sum().backward()
    want.sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=0)
    half = in_fp32(conv, x.detach().bfloat16())  # the type of the input is kept
    assert half.dtype == torch.bfloat16


def test_the_fp32_path_is_used_and_survives_copies():
    encoder = Encoder("mobilenetv2_035").eval()
    twin = copy.deepcopy(encoder)
    strided = [m for m in twin.modules() if isinstance(m, nn.Conv2d) and m.groups > 1 and m.stride[0] > 1]
    assert strided
    assert all(m.forward.args[0] is m for m in strided)  # the copy's forward is about the copy's weights
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(2)
        x = torch.rand(1, 3, 32, 32)
        assert not torch.allclose(encoder(x)[-1], twin(x)[-1])


@pytest.mark.shared
def test_shared_mobilenet_weights_equal_plain_timm(shared_data):
    path = shared_data.parent / "weights" / "mobilenetv2_100.imagenet.safetensors"
    encoder = Encoder("mobilenetv2_100", weights=str(path)).eval()
    plain = timm.create_model("mobilenetv2_100", pretrained=False, features_only=True, pad_type="same").eval()
    state = {k: v for k, v in load_file(path).items() if k in plain.state_dict()}
    plain.load_state_dict(state)  # strict
    x = torch.rand(1, 3, 96, 128)
    with torch.no_grad():
        for have, want in zip(encoder(x), plain(2 * x - 1), strict=True):
            torch.testing.assert_close(have, want)
