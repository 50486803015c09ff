"""Models on the Hugging Face hub: a folder with a model card, sent there and fetched back.

    predictor.push_to_hub("user/name")
    predictor = enfilade.Predictor.from_pretrained("user/name")     # or enfilade.load("hf://user/name")

A folder holds `model.safetensors`, which is a model file like any other and all that loading reads, and beside it, for
people and for the hub, `config.json` and the card `README.md`. Both are made from the model file's header. Of a
repository only `model.safetensors` is ever fetched, and a file that is a pickle is refused.
"""

import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import nn

import enfilade
from enfilade import checkpoint, images, labels, viz
from enfilade.errors import UserError, unknown
from enfilade.types import Prediction

SCHEME = "hf://"
WEIGHTS = "model.safetensors"
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")

# What a model file's recipe or "data" may tell of its data: a word in it, and the data set's name.
DATA = {
    "nyuv2": "NYU Depth v2",
    "camvid": "CamVid",
    "sunrgbd": "SUN RGB-D",
    "voc2012": "PASCAL VOC 2012",
    "rooms": "rooms rendered by Enfilade",
    "ssc": "NYU Depth v2 (label volumes)",
}
# Scores in a model file's header: their name for people, and what the hub calls them.
SCORES = {
    "miou": ("mIoU", "mean_iou"),
    "pixel_accuracy": ("pixel accuracy", "accuracy"),
    "mean_accuracy": ("mean accuracy", "mean_accuracy"),
    "rmse": ("depth RMSE, metres", "rmse"),
    "abs_rel": ("depth, relative error", "abs_rel"),
    "delta1": ("depth, share within a factor of 1.25", "delta1"),
    "ssc_miou": ("mIoU of the voxels", "mean_iou"),
    "sc_iou": ("IoU of full and empty voxels", "iou"),
}


class OnHub:
    """What a predictor and a completer share: their way to the hub. Of `network` and its header `meta`."""

    network: nn.Module
    meta: dict[str, Any]

    def save_pretrained(self, folder: str | Path, **options: Any) -> list[str]:
        """Write model, config and model card to a folder, for `from_pretrained`; see `hub.save`."""
        return save(folder, self.network, self.meta, **options)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Send what `save_pretrained` writes to "user/name" on the Hugging Face hub; see `hub.push`. Returns the
        address of its page."""
        return push(repo_id, self.network, self.meta, **options)


# --- from the hub -----------------------------------------------------------------------------------------------------


def locate(name: str | Path, *, revision: str | None = None, token: str | None = None) -> Path:
    """The model file of a shipped model's name, a file or folder on this machine, or else a repository of the hub,
    "user/name" or "hf://user/name@revision", which is fetched.

    Raises:
        UserError: none of these; a revision of what is not on the hub; a hub that does not answer.
    """
    text = str(name)
    local = text in checkpoint.SHIPPED or (not text.startswith(SCHEME) and Path(name).exists())
    if local:
        if revision is not None:
            raise UserError(f"{name} lies on this machine and has no revisions: leave {revision!r} out")
        return checkpoint.resolve(name)
    if text.startswith(SCHEME) or (isinstance(name, str) and REPOSITORY.fullmatch(text)):
        return fetch(text, revision=revision, token=token)
    raise unknown("model file, shipped model or repository (user/name)", text, checkpoint.SHIPPED)


def fetch(address: str, *, revision: str | None = None, token: str | None = None) -> Path:
    """Fetch the model file of "user/name", "hf://user/name" or "hf://user/name@revision" to the hub's cache, unless it
    is there. A token is needed only for a private model; by default that of `hf auth login` is used.

    Raises:
        UserError: no such model, an address that is none, a hub that does not answer.
    """
    repository, at = parse(address)
    if revision is not None and at is not None and revision != at:
        raise UserError(f"{address} names one revision and revision={revision!r} another: give one")
    api = client(token)
    with telling(f"fetch {WEIGHTS} of {repository}", repository):
        return Path(api.hf_hub_download(repo_id=repository, filename=WEIGHTS, revision=revision or at))


def parse(address: str) -> tuple[str, str | None]:
    """Repository and revision of "hf://user/name@revision"; both "hf://" and the revision may be absent."""
    repository, at, revision = address.removeprefix(SCHEME).partition("@")
    if not REPOSITORY.fullmatch(repository) or (at and not revision):
        raise UserError(f"{address!r} is no model of the hub: write hf://user/name, or hf://user/name@revision")
    return repository, revision or None


def client(token: str | None = None) -> Any:
    """A `huggingface_hub.HfApi`. Raises UserError where that package is missing."""
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise UserError("the hub needs the package huggingface_hub: pip install 'enfilade[hub]'") from error
    return HfApi(token=token, library_name="enfilade", library_version=enfilade.__version__)


@contextmanager
def telling(doing: str, repository: str) -> Iterator[None]:
    """Turn whatever the hub's client raises into one sentence."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise UserError(
            f"cannot {doing}: its terms must be accepted on its page first, then `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"cannot {doing}: the hub has no {repository}, or does not show it to you; check the name, "
            f"or run `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"cannot {doing}: it has no such revision; give a branch, a tag or a commit") from error
    except errors.LocalEntryNotFoundError as error:
        raise UserError(f"cannot {doing}: the hub does not answer, and the cache has no copy; try again") from error
    except errors.EntryNotFoundError as error:
        raise UserError(f"cannot {doing}: it has no {WEIGHTS}, so it is none of Enfilade's models") from error
    except (errors.HTTPError, OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise UserError(f"cannot {doing}: the hub refuses; run `hf auth login` with a token that may") from error
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(f"cannot {doing}: {reason}; check the connection and try again") from error


# --- to the hub -------------------------------------------------------------------------------------------------------


def push(
    repository: str,
    network: nn.Module,
    meta: dict[str, Any],
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    token: str | None = None,
    **options: Any,
) -> str:
    """Make the repository "user/name" where it does not exist, and put into it what `save` writes with `options`, in
    one commit. Returns the address of its page.

    Raises:
        UserError: see `save`; a name that is none, a hub that does not answer or refuses.
    """
    repository, at = parse(repository)
    if at is not None:
        raise UserError("give the branch to push to as revision, not in the name")
    api = client(token)
    with tempfile.TemporaryDirectory() as folder:
        save(folder, network, meta, name=repository, **options)
        with telling(f"push to {repository}", repository):
            page = api.create_repo(repo_id=repository, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(repo_id=repository, branch=revision, exist_ok=True)
            api.upload_folder(
                repo_id=repository,
                folder_path=folder,
                revision=revision,
                commit_message=message or f"Model of Enfilade {enfilade.__version__}",
            )
    return str(page)


def save(
    folder: str | Path,
    network: nn.Module,
    meta: dict[str, Any],
    *,
    half: bool = False,
    license: str | None = None,
    datasets: Sequence[str] = (),
    example: Prediction | None = None,
    name: str | None = None,
) -> list[str]:
    """Write `model.safetensors`, `config.json` and the card `README.md` to a folder; returns their paths.

    Args:
        meta: the model file's header (see `checkpoint`), of which the card tells.
        half: write the weights in fp16, at half the size.
        license: of the weights, as the hub spells it ("apache-2.0"); default: what the header says, in its words.
        datasets: what the model was trained on; default: as far as the header tells.
        example: a prediction of this model, to show in the card.
        name: "user/name" of the repository, for the card's first example.

    Raises:
        UserError: a header that does not say how to build the network; an unwritable folder.
    """
    if "model" not in meta or "arguments" not in meta:
        raise UserError(
            "this network's meta lacks 'model' and 'arguments', by which it could be built again: give them, "
            "or load the model from a file"
        )
    folder = images.make_folder(folder)
    written = [folder / WEIGHTS, folder / "config.json", folder / "README.md"]
    meta = dict(meta) | ({"license": license} if license else {}) | ({"data": list(datasets)} if datasets else {})
    checkpoint.save_model(written[0], network, meta, half=half)
    meta["arguments"] = checkpoint.without_files(meta["arguments"])  # as `save_model` has it
    parameters = sum(p.numel() for p in network.parameters())
    told = config(meta, parameters)
    images.write_atomic(written[1], (json.dumps(told, indent=1) + "\n").encode())
    if example is not None:
        written.append(folder / "example.png")
        images.write_png(written[-1], np.asarray(viz.panel(example)))
    text = card(meta, parameters, name=name, example=None if example is None else written[-1].name)
    images.write_atomic(written[2], text.encode())
    return [str(path) for path in written]


def config(meta: dict[str, Any], parameters: int) -> dict[str, Any]:
    """What config.json says: the header, and the versions that wrote it. Nothing reads it back."""
    versions = {"enfilade": enfilade.__version__, "torch": torch.__version__}
    return {"library_name": "enfilade", **meta, "parameters": parameters, "versions": versions}


# --- the card ---------------------------------------------------------------------------------------------------------


def answers(meta: dict[str, Any]) -> tuple[str, ...]:
    """What a model of this header gives, in the hub's words; the first is what it is listed under."""
    model, arguments = meta["model"], meta["arguments"]
    if model == "ensemble":
        return tuple(dict.fromkeys(answer for member in arguments["members"] for answer in answers(member)))
    if model in checkpoint.COMPLETES:
        return ("image-to-3d", "semantic-scene-completion")
    if model == "rsn":
        return ("depth-estimation",)
    depth = model in ("gad", "joint") and arguments.get("depth", True)
    return ("image-segmentation", "semantic-segmentation", *(["depth-estimation"] if depth else []))


def trained_on(meta: dict[str, Any]) -> list[str]:
    """The data sets that a header tells of, by name: its "data", or else words in its recipe's name."""
    data = meta.get("data")
    if data:
        found = [data] if isinstance(data, str) else list(data)
        return [DATA.get(str(name).split("/")[0], str(name)) for name in found]
    words = str(meta.get("recipe", "")).split("-")
    return [name for word, name in DATA.items() if word in words]


def identifier(data: str) -> str:
    """A data set's name without spaces, or "user/name" on the hub as it is."""
    return data if REPOSITORY.fullmatch(data) else re.sub(r"[^a-z0-9]+", "-", data.lower()).strip("-")


def front_matter(meta: dict[str, Any], name: str) -> dict[str, Any]:
    """The card's metadata, as the hub reads them."""
    listed, *more = answers(meta)
    licence = meta.get("license")
    if licence is None:
        front: dict[str, Any] = {"license": "unknown"}
    elif re.fullmatch(r"[a-z0-9.-]+", str(licence)):
        front = {"license": licence}
    else:  # a sentence: the card has it in full
        front = {"license": "other", "license_name": "see-the-card"}
    datasets = trained_on(meta)
    front |= {"library_name": "enfilade", "pipeline_tag": listed}
    front |= {"tags": ["enfilade", "safetensors", meta["model"], *more]}
    if datasets:
        front["datasets"] = [identifier(data) for data in datasets]
    if scores := numbers(meta):
        front["metrics"] = list(dict.fromkeys(SCORES.get(k, (k, k))[1] for k in scores))
        results = {
            "task": {"type": listed},
            "dataset": {"name": ", ".join(datasets) or "validation data of the training", "type": "other"},
            "metrics": [
                {"type": SCORES.get(k, (k, k))[1], "name": SCORES.get(k, (k, k))[0], "value": v}
                for k, v in scores.items()
            ],
        }
        front["model-index"] = [{"name": name, "results": [results]}]
    return front


def card(meta: dict[str, Any], parameters: int, *, name: str | None = None, example: str | None = None) -> str:
    """The model card: what a header says, as metadata for the hub and as text for people. `example` is the name of a
    picture beside it."""
    title = (name or str(meta.get("recipe") or meta["model"])).split("/")[-1]
    front = yaml.safe_dump(front_matter(meta, title), sort_keys=False, allow_unicode=True, width=1000)
    parts = [f"---\n{front}---\n", f"# {title}\n", f"{sentence(meta, parameters)}\n"]
    if example is not None:
        parts.append(f"![A photo, and what the model says of it]({example})\n")
    parts += [f"## Use\n\n{usage(meta, name)}\n", f"## Model\n\n{table(facts(meta))}\n"]
    if scores := numbers(meta):
        shown = {SCORES.get(k, (k, k))[0]: f"{v:.4g}" for k, v in scores.items()}
        told = f"Measured in training, on {validated_on(meta)}, without test-time augmentation."
        parts.append(f"## Scores\n\n{told}\n\n{table(shown)}\n")
    if own := shipped_card(meta):
        parts.append(f"## About\n\n{own}\n")
    parts.append(f"## Licence of the weights\n\n{licence_text(meta)}\n")
    return "\n".join(parts)


def sentence(meta: dict[str, Any], parameters: int) -> str:
    """What the model is for."""
    listed, *more = answers(meta)
    space = labels.get(meta.get("space", "nyu40"))
    if listed == "image-to-3d":
        what = f"Completes a room behind one RGB-D frame: voxels of 8 cm with {len(space)} labels ({space.name})"
    elif listed == "depth-estimation":
        what = "Estimates metric depth from one RGB image"
    else:
        what = f"Labels every pixel of one RGB image ({space.name}, {len(space)} classes)"
        what += " and estimates metric depth" if "depth-estimation" in more else ""
    return f"{what}. {parameters / 1e6:.1f} M parameters."


def usage(meta: dict[str, Any], name: str | None) -> str:
    where = f"{SCHEME}{name}" if name else "FOLDER"
    if answers(meta)[0] == "image-to-3d":
        call = f'from enfilade import complete\n\nroom = complete.load("{where}").complete("photo.jpg")'
        verb = "complete"
    else:
        call = f'import enfilade\n\nprediction = enfilade.load("{where}").predict("photo.jpg")\nprediction.show()'
        verb = "predict"
    return f"```python\n{call}\n```\n\n```console\n$ enfilade {verb} photo.jpg --model {where}\n```"


def facts(meta: dict[str, Any]) -> dict[str, str]:
    """Header entries that say how the model was built and trained."""
    found = {"Network": str(meta["model"]), "Encoder": str(meta["arguments"].get("encoder", ""))}
    found |= {"Recipe": str(meta.get("recipe") or ""), "Trained on": ", ".join(trained_on(meta))}
    if size := meta.get("size"):
        found["Input of the training"] = f"{size[1]} x {size[0]} pixels"
    if meta.get("focal"):
        found["Depth"] = f"metres for a focal length of {meta['focal']:.1f} pixels at that input"
    space = labels.get(meta.get("space", "nyu40"))
    found["Labels"] = f"{space.name}: {', '.join(space.names)}"
    if meta.get("crf"):
        found["Refined by"] = "a dense CRF of the photo's colours, unless `crf=False`"
    if ignored := meta.get("ignored"):
        found["Never trained"] = ", ".join(space.names[int(k)] for k in ignored)
    return {k: v for k, v in found.items() if v}


def table(rows: dict[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {k} | {v.replace('|', '/')} |" for k, v in rows.items())])


def numbers(meta: dict[str, Any]) -> dict[str, float]:
    return {k: float(v) for k, v in (meta.get("scores") or {}).items() if isinstance(v, int | float)}


def validated_on(meta: dict[str, Any]) -> str:
    found = trained_on(meta)
    return f"validation frames of {' and '.join(found)}" if found else "the training's validation data"


def shipped_card(meta: dict[str, Any]) -> str | None:
    """The hand-written card of a model that ships with Enfilade, without its title."""
    name = str(meta.get("card") or "")
    if name not in {f"{model}.md" for model in checkpoint.SHIPPED}:
        return None
    path = Path(__file__).parent / "weights" / name
    return path.read_text().partition("\n")[2].strip() if path.is_file() else None


def licence_text(meta: dict[str, Any]) -> str:
    told = meta.get("license")
    return f"{str(told).rstrip('.')}." if told else "The model file does not say: ask whoever trained it."
