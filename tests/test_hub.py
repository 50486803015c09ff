"""Models go to the Hugging Face hub and come back: its real client, against a small hub on this machine."""

import hashlib
import inspect
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

import enfilade
from enfilade import checkpoint, hub, labels
from enfilade.cli import main
from enfilade.errors import UserError
from enfilade.types import Prediction

huggingface_hub = pytest.importorskip("huggingface_hub")

ARGUMENTS = {"classes": 40, "encoder": "test_resnet", "weights": None}
ARGUMENTS |= {"bottleneck": 8, "widths": (8, 8), "embedding": 8}
META = {"model": "gad", "arguments": ARGUMENTS, "space": "nyu40", "size": [48, 64], "focal": 50.0, "ignored": [39]}
META |= {"recipe": "gad-nyuv2", "scores": {"miou": 0.25, "rmse": 0.75, "names": ["wall"]}, "scale": 0.1}


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return checkpoint.build("gad", ARGUMENTS).eval()


@pytest.fixture
def predictor(network):
    return enfilade.Predictor(network, META, device="cpu", flip=False)


@pytest.fixture(scope="module")
def photo():
    return np.random.default_rng(0).random((48, 64, 3), np.float32)


class Hub(BaseHTTPRequestHandler):
    """Serves `files` of the repository user/name at its only commit, as the hub's API documents it."""

    files: dict[str, bytes] = {}  # noqa: RUF012
    asked: list[str] = []  # noqa: RUF012
    COMMIT = "c0ffee" * 6 + "c0ff"

    def answer(self, body: bool) -> None:
        self.asked.append(self.path)
        user, name, resolve, revision, file = [*self.path.strip("/").split("/", 4), *[""] * 5][:5]
        error, status = None, 200
        if (user, name, resolve) != ("user", "name", "resolve"):
            error = "RepoNotFound"
        elif revision not in ("main", "v1", self.COMMIT):
            error = "RevisionNotFound"
        elif file not in self.files:
            error = "EntryNotFound"
        if name == "gated":
            error, status = "GatedRepo", 403
        self.send_response(status if error is None or status != 200 else 404)
        data = b"" if error else self.files[file]
        if error:
            self.send_header("X-Error-Code", error)
        else:
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.COMMIT)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def log_message(self, *_):
        pass


@pytest.fixture
def served(monkeypatch, tmp_path):
    """A hub, empty as yet, and an empty cache."""
    monkeypatch.setattr(Hub, "files", {})
    monkeypatch.setattr(Hub, "asked", [])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    elsewhere(monkeypatch, f"http://127.0.0.1:{server.server_port}", tmp_path / "cache")
    yield Hub
    server.shutdown()
    server.server_close()


def elsewhere(monkeypatch, endpoint, cache):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)


def same_weights(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- a folder ---------------------------------------------------------------------------------------------------------


def test_a_completer_goes_the_same_way(tmp_path):
    from enfilade.complete import Completer

    completer = Completer.from_pretrained("imenet-rooms", device="cpu")
    completer.save_pretrained(tmp_path)
    assert same_weights(Completer.from_pretrained(tmp_path, device="cpu").network, completer.network)
    assert "complete.load" in (tmp_path / "README.md").read_text()
    with pytest.raises(UserError, match="completes no rooms"):
        Completer.from_pretrained("gad-nyuv2")


def test_a_saved_folder_is_the_same_predictor(tmp_path, predictor, photo):
    written = predictor.save_pretrained(tmp_path / "m")
    assert [p.name for p in sorted((tmp_path / "m").iterdir())] == ["README.md", "config.json", "model.safetensors"]
    assert sorted(written) == sorted(str(p) for p in (tmp_path / "m").iterdir())
    again = enfilade.Predictor.from_pretrained(tmp_path / "m", device="cpu", flip=False)
    assert same_weights(again.network, predictor.network)
    a, b = predictor.predict(photo), again.predict(photo)
    assert np.array_equal(a.labels, b.labels)
    assert np.array_equal(a.depth, b.depth)
    assert again.meta["scores"] == META["scores"]
    assert enfilade.load(str(tmp_path / "m"), device="cpu").focal == 50.0


def test_half_precision_is_half_the_size(tmp_path, predictor):
    full, half = (predictor.save_pretrained(tmp_path / str(h), half=h)[0] for h in (False, True))
    sizes = [Path(path).stat().st_size for path in (full, half)]
    assert sizes[1] < 0.6 * sizes[0]  # the header is not halved


def test_config_says_what_the_header_says(tmp_path, predictor, network):
    predictor.save_pretrained(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    assert told["parameters"] == sum(p.numel() for p in network.parameters())
    assert told["versions"] == {"enfilade": enfilade.__version__, "torch": torch.__version__}
    _, header = checkpoint.read(tmp_path / "model.safetensors")
    assert {k: told[k] for k in header} == header


def test_shipped_names_and_files_are_taken(predictor, tmp_path):
    checkpoint.save_model(tmp_path / "m.safetensors", predictor.network, META)
    again = enfilade.Predictor.from_pretrained(str(tmp_path / "m.safetensors"), device="cpu")
    assert same_weights(again.network, predictor.network)
    assert hub.locate("gad-nyuv2") == checkpoint.resolve("gad-nyuv2")
    with pytest.raises(UserError, match="gad-nyuv2 lies on this machine and has no revisions: leave 'v1' out"):
        enfilade.Predictor.from_pretrained("gad-nyuv2", revision="v1")
    with pytest.raises(UserError, match="did you mean 'gad-nyuv2'"):
        enfilade.Predictor.from_pretrained("gad-nyuv3")


def test_a_network_that_cannot_be_built_again_is_refused(tmp_path, network):
    bare = enfilade.Predictor(network, device="cpu")
    with pytest.raises(UserError, match=r"lacks 'model' and 'arguments'.*load the model from a file"):
        bare.save_pretrained(tmp_path / "m")
    assert not (tmp_path / "m").exists()


# --- the card, as the hub's own reader sees it ------------------------------------------------------------------------


def card_of(meta, **options):
    return huggingface_hub.ModelCard(hub.card(meta, 1_250_000, **options))


def test_the_card_tells_the_hub(tmp_path, predictor):
    predictor.save_pretrained(tmp_path, license="cc-by-4.0")
    card = huggingface_hub.ModelCard.load(tmp_path / "README.md")
    data = card.data
    assert (data.library_name, data.pipeline_tag, data.license) == ("enfilade", "image-segmentation", "cc-by-4.0")
    assert data.datasets == ["nyu-depth-v2"]
    assert {"enfilade", "gad", "depth-estimation"} <= set(data.tags)
    assert {(e.metric_type, e.metric_value) for e in data.eval_results} == {("mean_iou", 0.25), ("rmse", 0.75)}
    assert {e.dataset_name for e in data.eval_results} == {"NYU Depth v2"}
    assert all(name in card.text for name in labels.get("nyu40").names)
    assert "otherprop" in card.text.split("Never trained")[1].splitlines()[0]
    assert checkpoint.read(tmp_path / "model.safetensors")[1]["license"] == "cc-by-4.0"


@pytest.mark.parametrize(
    ("change", "task", "tags"),
    [
        ({"arguments": {"depth": False}}, "image-segmentation", {"semantic-segmentation"}),
        ({"model": "lrn"}, "image-segmentation", {"semantic-segmentation"}),
        ({"model": "joint"}, "image-segmentation", {"semantic-segmentation", "depth-estimation"}),
        ({"model": "rsn"}, "depth-estimation", set()),
        ({"model": "imenet", "space": "ssc12", "ignored": []}, "image-to-3d", {"semantic-scene-completion"}),
    ],
)
def test_what_a_model_answers_is_what_its_card_says(change, task, tags):
    card = card_of(META | change, name="user/name")
    assert card.data.pipeline_tag == task
    assert set(card.data.tags) == {"enfilade", "safetensors", (META | change)["model"], *tags}
    assert ("complete.load" in card.text) == (task == "image-to-3d")
    assert ("metric depth" in card.text) == (task == "depth-estimation" or "depth-estimation" in tags)
    assert "hf://user/name" in card.text


def test_a_licence_in_words_stands_in_the_card():
    card = card_of(META | {"license": "research only: ask its owners"})
    assert card.data.license == "other"
    assert "research only: ask its owners." in card.text
    assert card_of(META).data.license == "unknown"


def test_strange_headers_cannot_break_the_front_matter():
    """A header is anyone's: what it says is quoted, not obeyed."""
    words = "---\npipeline_tag: text-generation\n---"
    card = card_of(META | {"recipe": words, "license": words, "data": [words]})
    assert card.data.pipeline_tag == "image-segmentation"
    assert hub.shipped_card(META | {"card": "../../README.md"}) is None


def test_without_scores_there_are_no_results():
    card = card_of(META | {"scores": {}, "recipe": "mine"})
    assert card.data.eval_results is None
    assert card.data.datasets is None
    assert "## Scores" not in card.text


def test_shipped_models_have_their_own_words():
    for name in checkpoint.SHIPPED:
        _, meta = checkpoint.read(checkpoint.resolve(name))
        own = hub.shipped_card(meta)
        assert (own is not None) == ("card" in meta)
        assert own is None or own in card_of(meta).text


def test_the_card_says_that_labels_are_refined():
    assert "dense CRF" not in card_of(META).text
    assert "dense CRF of the photo's colours" in card_of(META | {"crf": True}).text


def test_an_example_is_shown(tmp_path, network, photo):
    shown = Prediction(image=photo, labels=np.zeros((48, 64), np.uint8), space="nyu40")
    written = hub.save(tmp_path, network, META, example=shown)
    assert str(tmp_path / "example.png") in written
    assert "](example.png)" in (tmp_path / "README.md").read_text()
    assert (tmp_path / "example.png").read_bytes().startswith(b"\x89PNG")


# --- fetching ---------------------------------------------------------------------------------------------------------


def test_a_model_is_fetched_once_and_only_its_weights(served, tmp_path, predictor, photo, capsys):
    for path in predictor.save_pretrained(tmp_path / "m"):
        served.files[Path(path).name] = Path(path).read_bytes()
    again = enfilade.Predictor.from_pretrained("user/name", device="cpu", flip=False)
    assert same_weights(again.network, predictor.network)
    assert np.array_equal(again.predict(photo).labels, predictor.predict(photo).labels)
    assert {path.rpartition("/")[2] for path in served.asked if "/resolve/" in path} == {"model.safetensors"}
    served.asked.clear()
    for address in ("hf://user/name", "hf://user/name@v1"):
        assert enfilade.load(address, device="cpu").meta["recipe"] == "gad-nyuv2"
    assert {path.split("/")[4] for path in served.asked if "/resolve/" in path} == {"main", "v1"}
    assert main(["info", "--model", "hf://user/name@v1"]) == 0
    assert "miou 0.25" in capsys.readouterr().out


def test_without_the_hub_the_cache_answers(served, tmp_path, predictor, monkeypatch):
    path = predictor.save_pretrained(tmp_path / "m")[0]
    served.files["model.safetensors"] = Path(path).read_bytes()
    fetched = hub.fetch("user/name")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert hub.fetch("user/name") == fetched
    with pytest.raises(UserError, match="the hub does not answer, and the cache has no copy"):
        hub.fetch("user/other")


def test_what_goes_wrong_is_one_sentence(served):
    served.files["pytorch_model.bin"] = b"PK a pickle"
    for address, sentence in (
        ("user/nobody", "the hub has no user/nobody, or does not show it to you; check the name"),
        ("user/gated", "its terms must be accepted on its page first"),
        ("user/name@v2", "it has no such revision"),
        ("user/name", "it has no model.safetensors, so it is none of Enfilade's models"),
    ):
        with pytest.raises(UserError, match=sentence) as error:
            hub.fetch(address)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("data", [b"\x80\x04\x95 pickled", b"PK\x03\x04 zipped pickle"])
def test_a_pickle_is_refused_whatever_its_name(served, data, capsys):
    served.files["model.safetensors"] = data
    with pytest.raises(UserError, match="is a pickle"):
        enfilade.load("hf://user/name")


def test_a_hub_that_is_away_is_one_sentence(tmp_path, monkeypatch):
    elsewhere(monkeypatch, "http://127.0.0.1:9", tmp_path)  # the discard port: nobody listens
    monkeypatch.setattr("time.sleep", lambda _: None)  # its client waits between attempts
    with pytest.raises(UserError, match=r"cannot fetch model.safetensors of user/name: .*try again") as error:
        hub.fetch("user/name")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("address", ["hf://name", "hf://", "hf://a/b/c", "hf://user/name@", "hf://user/na me"])
def test_an_address_that_is_none(address):
    with pytest.raises(UserError, match="no model of the hub: write hf://user/name"):
        hub.parse(address)
    with pytest.raises(UserError, match="no model of the hub"):
        checkpoint.resolve(address)


def test_one_revision_at_a_time():
    assert hub.parse("hf://a/b@v1") == ("a/b", "v1")
    assert hub.parse("a/b") == ("a/b", None)
    with pytest.raises(UserError, match="names one revision and revision='v2' another"):
        hub.fetch("hf://a/b@v1", revision="v2")


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install 'enfilade\[hub\]'"):
        hub.fetch("user/name")


# --- pushing ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pushed(monkeypatch):
    """What is sent, with every call checked against the signature of the installed client."""
    calls = []

    def stand_in(name, result):
        signature = inspect.signature(getattr(huggingface_hub.HfApi, name))

        def call(*args, **kwargs):
            arguments = signature.bind(*args, **kwargs).arguments
            folder = arguments.get("folder_path")
            files = {p.name: p.read_bytes() for p in Path(folder).iterdir()} if folder else {}
            calls.append((name, {k: v for k, v in arguments.items() if k != "self"} | {"files": files}))
            return result

        monkeypatch.setattr(huggingface_hub.HfApi, name, call)

    for name in ("create_repo", "create_branch", "upload_folder"):
        stand_in(name, "https://hub.example/user/name")
    return calls


def test_a_push_makes_the_repository_and_sends_one_commit(pushed, predictor, tmp_path):
    page = predictor.push_to_hub("user/name", private=True, half=True, message="first", license="mit")
    assert page == "https://hub.example/user/name"
    (made, how), (sent, what) = pushed
    assert (made, sent) == ("create_repo", "upload_folder")
    assert (how["repo_id"], how["private"], how["exist_ok"]) == ("user/name", True, True)
    assert (what["repo_id"], what["commit_message"]) == ("user/name", "first")
    assert set(what["files"]) == {"model.safetensors", "config.json", "README.md"}
    assert b"hf://user/name" in what["files"]["README.md"]
    for name, data in what["files"].items():
        (tmp_path / name).write_bytes(data)
    again = enfilade.Predictor.from_pretrained(tmp_path, device="cpu")
    assert again.meta["license"] == "mit"


def test_a_push_to_a_branch(pushed, predictor):
    predictor.push_to_hub("user/name", revision="v2")
    assert [name for name, _ in pushed] == ["create_repo", "create_branch", "upload_folder"]
    assert pushed[1][1]["branch"] == pushed[2][1]["revision"] == "v2"
    with pytest.raises(UserError, match="give the branch to push to as revision"):
        predictor.push_to_hub("user/name@v2")


def test_a_refused_push_is_one_sentence(served, predictor):
    """The small hub takes nothing."""
    with pytest.raises(UserError, match="cannot push to user/name: ") as error:
        predictor.push_to_hub("user/name", token="hf_none")
    assert "\n" not in str(error.value)
