"""Make one model file of several trained models.

    combine(["gad-nyuv2", "joint-nyuv2"], "both.safetensors")
    enfilade.load("both.safetensors").predict("photo.jpg")

`load(also=...)` has each network see the image at the size that it was trained at. Here all see it at the first's, so
that the file is one network of one input; what that costs, docs/experiments.md tells.
"""

from collections.abc import Sequence
from pathlib import Path

from enfilade import checkpoint
from enfilade.errors import UserError
from enfilade.predict import Predictor

SHARED = ("space", "scale", "size", "focal", "ignored")  # of the first's header, for all


def combine(models: Sequence[str | Path], out: str | Path, *, half: bool = False, crf: bool = False) -> Path:
    """Write `models`, shipped ones, files or run folders, as one model that answers as they do together.

    The first says at which size they all see an image, and in whose camera's metres they answer. A dense CRF at the
    end of one of them is left out. With `crf` the file says that one stands behind them all, unless `load` is told
    otherwise. `half` writes fp16.

    Raises:
        UserError: fewer than two models, one that cannot be read, of another label space or with more input than RGB,
            or a file that cannot be written.
    """
    if len(models) < 2:
        raise UserError(f"two models or more make one, not {len(models)}: name another")
    loaded = [checkpoint.load(name) for name in models]
    for name, one in zip(models, loaded):
        if one.meta["model"] in checkpoint.COMPLETES:
            raise UserError(f"{name} completes rooms, and such a model answers alone: leave it out")
    # a predictor complains of what cannot answer together
    first, *others = (Predictor(one.network, one.meta, device="cpu") for one in loaded)
    Predictor(first.network, first.meta, device="cpu", also=others)
    if uses := getattr(first.network, "uses", ()):
        raise UserError(f"models that become one see RGB alone, and {models[0]} takes {uses[0]} too")
    members = []
    for one, predictor in zip(loaded, (first, *others)):
        arguments = dict(one.meta["arguments"])
        if "crf" in arguments:
            arguments["crf"] = "none"
            checkpoint.leave_out_crf(one.network)
        member = {"model": one.meta["model"], "arguments": arguments}
        if predictor.focal != first.focal:
            member["depth"] = first.focal / predictor.focal
        members.append(member)
    network = checkpoint.build("ensemble", {"members": members})
    for own, one in zip(network.networks, loaded):  # type: ignore[arg-type]
        own.load_state_dict(one.network.state_dict())
    meta = {k: loaded[0].meta[k] for k in SHARED if k in loaded[0].meta}
    meta |= {"model": "ensemble", "arguments": {"members": members}}
    meta["recipe"] = " and ".join(str(one.meta.get("recipe") or one.meta["model"]) for one in loaded)
    if licences := list(dict.fromkeys(one.meta["license"] for one in loaded if "license" in one.meta)):
        meta["license"] = "; ".join(licences)
    if data := list(dict.fromkeys(name for one in loaded for name in one.meta.get("data", ()))):
        meta["data"] = data
    if crf:
        meta["crf"] = True
    checkpoint.save_model(Path(out), network, meta, half)
    return Path(out)
