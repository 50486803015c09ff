"""Weights survive the way to disk and back, and nothing else is mistaken for them."""

import json
import os
import pickle
import struct

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from enfilade import checkpoint
from enfilade.errors import UserError

ARGUMENTS = {"classes": 5, "encoder": "test_efficientnet", "weights": None, "bottleneck": 8}
ARGUMENTS |= {"widths": (8, 8), "embedding": 8}
META = {"model": "gad", "arguments": ARGUMENTS, "space": "nyu40", "scores": {"miou": 1 / 3}}


def network(seed=0) -> nn.Module:
    torch.manual_seed(seed)
    net = checkpoint.build("gad", ARGUMENTS)
    for m in net.modules():  # running statistics that no constructor makes
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.running_mean)
            m.num_batches_tracked += 7
    return net


def only(folder, *names) -> bool:
    return sorted(p.name for p in folder.iterdir()) == sorted(names)


def test_round_trip(tmp_path):
    path, net = tmp_path / "m.safetensors", network()
    checkpoint.save_model(path, net, META)
    assert only(tmp_path, "m.safetensors")
    loaded = checkpoint.load(path)
    assert not any(m.training for m in loaded.network.modules())
    want, have = net.state_dict(), loaded.network.state_dict()
    assert want.keys() == have.keys()
    assert all(torch.equal(want[k], have[k]) for k in want)
    assert loaded.meta["scores"] == META["scores"]  # floats too, to the last bit
    image = torch.rand(1, 3, 40, 50)
    with torch.no_grad():
        assert torch.equal(net.eval()(image).logits, loaded.network(image).logits)


def test_half_precision(tmp_path):
    net = network()
    checkpoint.save_model(tmp_path / "full.safetensors", net, META)
    checkpoint.save_model(tmp_path / "half.safetensors", net, META, half=True)
    full, half = ((tmp_path / f"{n}.safetensors").stat().st_size for n in ("full", "half"))
    assert half < 0.6 * full  # the header is not halved
    loaded = checkpoint.load(tmp_path / "half.safetensors").network
    for k, v in net.state_dict().items():
        have = loaded.state_dict()[k]
        assert have.dtype == v.dtype
        torch.testing.assert_close(have, v, rtol=2**-11, atol=6e-8)  # fp16: 11 bits, subnormal below 6e-5


def test_the_encoders_own_weight_file_is_not_needed_again(tmp_path):
    """A model is saved with what it was trained from; the file must load where that is absent."""
    meta = META | {"arguments": ARGUMENTS | {"weights": str(tmp_path / "gone.safetensors")}}
    checkpoint.save_model(tmp_path / "m.safetensors", network(), meta)
    assert checkpoint.load(tmp_path / "m.safetensors").meta["arguments"]["weights"] is None


def test_channels_last_and_tied_tensors(tmp_path):
    a = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    checkpoint.write(tmp_path / "t.safetensors", {"a": a, "again": a, "step": torch.tensor(3.0)}, {"x": [1, None]})
    tensors, meta = checkpoint.read(tmp_path / "t.safetensors")
    assert torch.equal(tensors["a"], a)
    assert torch.equal(tensors["again"], a)
    assert tensors["step"].shape == ()
    assert meta == {"x": [1, None]}


def saved(folder):
    path = folder / "m.safetensors"
    checkpoint.save_model(path, network(), META)
    return path


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 100, 0.5, -1])
def test_truncated_files(tmp_path, keep):
    path = saved(tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(UserError, match=r"m\.safetensors"):
        checkpoint.load(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_are_refused_unread(tmp_path, zipped):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    torch.save({"w": torch.zeros(3), "b": Bomb()}, tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="pickle"):
        checkpoint.load(tmp_path / "m.pt")
    for protocol in (2, 3, 4, 5):
        (tmp_path / "m.pkl").write_bytes(pickle.dumps(Bomb(), protocol=protocol))
        with pytest.raises(UserError, match="pickle"):
            checkpoint.load(tmp_path / "m.pkl")
    assert not (tmp_path / "exploded").exists()


def test_a_header_whose_length_looks_like_a_pickle(tmp_path):
    """safetensors files begin with the header's length; 640 is 80 02, and so a pickle of protocol 2 begins."""
    path, pad = tmp_path / "m.safetensors", 0
    for wanted in (640, 896, 1152, 1408):  # 80 02, 80 03, 80 04, 80 05
        length = 0
        while length != wanted:
            pad += wanted - length if length else 0
            checkpoint.write(path, {"w": torch.ones(1)}, {"pad": "x" * pad})
            length = struct.unpack("<Q", path.read_bytes()[:8])[0]
        assert checkpoint.read(path)[1] == {"pad": "x" * pad}


def test_foreign_safetensors(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file({"w": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="names no model"):
        checkpoint.load(path)
    for text in ("[1]", "7", '{"recipe": "x"}', "not json", "null"):
        save_file({"w": torch.zeros(2)}, path, {"enfilade": text})
        with pytest.raises(UserError, match=r"m\.safetensors"):
            checkpoint.load(path)
    checkpoint.write(path, {"model.w": torch.zeros(2)}, {"progress": {}})
    with pytest.raises(UserError, match="training state"):
        checkpoint.load(path)


def test_other_bytes_and_folders(tmp_path):
    (tmp_path / "m.safetensors").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    with pytest.raises(UserError, match="damaged"):
        checkpoint.load(tmp_path / "m.safetensors")
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match=r"best\.safetensors"):
        checkpoint.load(tmp_path / "run")


def test_weights_of_another_model(tmp_path):
    path = tmp_path / "m.safetensors"
    other = META | {"arguments": ARGUMENTS | {"bottleneck": 12}}
    checkpoint.save_model(path, network(), other)
    with pytest.raises(UserError, match=r"another model than gad.*differ"):
        checkpoint.load(path)
    checkpoint.save_model(path, network(), META | {"model": "gda"})
    with pytest.raises(UserError, match="did you mean 'gad'"):
        checkpoint.load(path)


def test_names(tmp_path):
    with pytest.raises(UserError, match="did you mean 'gad-nyuv2'"):
        checkpoint.resolve("gad-nyu2")
    with pytest.raises(UserError, match="gad-nyuv2"):
        checkpoint.resolve("resnet")
    assert checkpoint.resolve("gad-nyuv2").suffix == ".safetensors"
    run = tmp_path / "run"
    checkpoint.save_model(run / "final.safetensors", network(), META)  # makes the folder
    assert checkpoint.resolve(run).name == "final.safetensors"
    checkpoint.save_model(run / "best.safetensors", network(), META)
    assert checkpoint.resolve(run).name == "best.safetensors"
    assert checkpoint.resolve(str(run / "final.safetensors")) == run / "final.safetensors"


@pytest.mark.parametrize("name", checkpoint.MODELS)
def test_every_model_name_can_be_imported(name):
    import importlib

    module, attribute = checkpoint.MODELS[name].split(":")
    assert issubclass(getattr(importlib.import_module(module), attribute), nn.Module)


class Crash(BaseException):
    """Neither an Exception nor an OSError, like a KeyboardInterrupt: nobody may swallow it."""


@pytest.mark.parametrize("where", ["save_file", "fsync", "replace"])
def test_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch, where):
    path = saved(tmp_path)
    before = path.read_bytes()

    def crash(*arguments):
        if where == "save_file":
            arguments[1].write_bytes(b"half of a fi")
        raise Crash

    target = checkpoint if where == "save_file" else os
    monkeypatch.setattr(target, where, crash)
    with pytest.raises(Crash):
        checkpoint.save_model(path, network(1), META)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert only(tmp_path, "m.safetensors")
    checkpoint.save_model(path, network(1), META)
    assert path.read_bytes() != before


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error: disk full")])
def test_a_full_disk_is_told(tmp_path, monkeypatch, error):
    path = saved(tmp_path)
    before = path.read_bytes()

    def full(*_):
        raise error

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match=r"cannot write .*m\.safetensors: .*(No space|disk full)"):
        checkpoint.save_model(path, network(1), META)
    assert path.read_bytes() == before
    assert only(tmp_path, "m.safetensors")


def test_unwritable_places_are_told(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "m.safetensors", tmp_path / "file" / "sub" / "m.safetensors"):
        with pytest.raises(UserError, match="cannot write"):
            checkpoint.save_model(path, network(), META)
    if os.getuid() != 0:  # root may write anywhere
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(UserError, match="cannot write"):
            checkpoint.save_model(tmp_path / "locked" / "m.safetensors", network(), META)


def test_the_header_is_plain_json(tmp_path):
    """Other programs can read what a file is: eight bytes of length, then JSON."""
    data = saved(tmp_path).read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    meta = json.loads(header["__metadata__"]["enfilade"])
    assert meta["model"] == "gad"
    assert meta["arguments"]["widths"] == [8, 8]
