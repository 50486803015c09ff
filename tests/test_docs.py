"""The documentation says what is so: commands parse, links lead somewhere, numbers are those of the runs.

`make check-docs` runs the commands as well; here they are only parsed.
"""

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import numpy as np
import pytest

from enfilade.verbs import VERBS

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in (*DOCS.glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"))
if not DOCS.is_dir():
    pytest.skip("the documentation is not in this copy", allow_module_level=True)


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def check() -> ModuleType:
    return script("check")


@pytest.fixture(scope="module")
def figures() -> ModuleType:
    return script("figures")


def prose(page: Path) -> str:
    """A page without its code: fenced blocks and `spans`."""
    text = re.sub(r"^( *)(`{3,}).*?^\1\2 *$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", text)


# ------------------------------------------------------------------------------------------------- what is extracted

PAGE = """# Title

```console
$ enfilade predict photos/ \\
      --out out       # with a remark
photos/0.jpg: what it prints
$ enfilade train gad-nyuv2 --data nyuv2 --root DIR --out runs/gad
$ # only a remark
```

<!-- check: skip takes hours -->

```console
$ enfilade info
```

```console
$ enfilade info
```

<!-- check: skip of no block -->
Words between.

  ```python
  x = 1
    # indented
  ```

````markdown
```console
$ rm -rf all
```
````
"""


def test_steps_of_a_page(check):
    found = check.steps("page.md", PAGE)
    assert [(s.line, s.language, s.skip) for s in found] == [
        (4, "console", None),
        (7, "console", "needs DIR"),
        (14, "console", "takes hours"),
        (18, "console", None),
        (25, "python", None),
    ]
    assert found[0].text == "enfilade predict photos/ --out out       # with a remark"
    assert found[0].title == "enfilade predict photos/ --out out"
    assert found[-1].text == "x = 1\n  # indented"


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("enfilade evaluate --data nyuv2 --root DIR --split val", "needs DIR"),
        ("enfilade evaluate --data nyuv2 --root=DIR", "needs DIR"),
        ("accelerate launch -m enfilade.cli train gad-nyuv2 ...", "needs ..."),
        ("pip install 'enfilade[onnx]'", "installs"),
        ("make test", "has a run of its own"),
        ("make demo IMAGE=photo.jpg", None),
        ("OMP_NUM_THREADS=1 enfilade info  # NUMBERS", None),
        ("enfilade data render rooms --out R/a --count 3", None),
    ],
)
def test_what_cannot_be_run(check, command, reason):
    assert check.unfit(command) == reason


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("enfilade info | head -3", ["info"]),
        ("OMP_NUM_THREADS=1 enfilade predict 'a b.jpg' > log", ["predict", "a b.jpg"]),
        ("torchrun --nproc-per-node 2 -m enfilade.cli train x --out r  # two", ["train", "x", "--out", "r"]),
        ("python benchmarks/gap.py", None),
        ('enfilade train x --set "stages.*.lr=1e-4" && ls', ["train", "x", "--set", "stages.*.lr=1e-4"]),
    ],
)  # fmt: skip
def test_words_after_enfilade(check, command, words):
    assert check.verb_words(command) == words


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        ("enfilade predict photo.jpg --no-flip", None),
        ("enfilade predict photo.jpg --flop", "--flop"),
        ("enfilade predict photo.jpg --every often", "often"),
        ("enfilade foretell photo.jpg", "no verb 'foretell'"),
        ("enfilade data", "no verb 'data'"),
        ("enfilade train gad-nyu --data nyuv2 --out r", "no recipe 'gad-nyu'"),
        ("enfilade reproduce gad-table9 --data nyuv2 --out r", "no table 'gad-table9'"),
        ("enfilade evaluate --data nyuv3", "no data 'nyuv3'"),
        ("enfilade data check nyuv3", "no name 'nyuv3'"),
        ("enfilade train NAME --data nyuv2 --out r", None),
        ("enfilade train gad-nyuv2 --data nyuv2 ...", None),
        ("enfilade predict --help", None),
        ("ls photos", None),
    ],
)
def test_complaints(check, command, complaint):
    found = check.complaint(command)
    assert (found is None) if complaint is None else (found is not None and complaint in found)


# ------------------------------------------------------------------------------------------------------ what it runs


def test_a_page_is_run_in_order_and_failures_count(check, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(check, "prepare", lambda folder: (folder / "photo.jpg").write_text("here"))
    page = tmp_path / "page.md"
    page.write_text(
        "```python\nfrom pathlib import Path\ntext = Path('photo.jpg').read_text()\n```\n"
        "```console\n$ echo there > made.txt\n$ false | true\n```\n"
        "```python\nassert (text, Path('made.txt').read_text()) == ('here', 'there\\n')\n```\n"
        "```python\nraise SystemError('no such thing')\n```\n"
    )
    before = Path.cwd()
    assert check.main([str(page)]) == 1
    assert Path.cwd() == before
    assert not (tmp_path / "made.txt").exists()  # a folder of its own
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == ["ok", "ok", "FAILED", "ok", "FAILED"]
    assert "exit code 1" in lines[3]
    assert "no such thing" in lines[5]
    assert lines[-1].startswith("5 run, 0 skipped, 2 failed")
    page.write_text("```console\n$ true\n$ enfilade train gad-nyuv2 --data nyuv2 --root DIR --out r\n```\n")
    assert check.main([str(page)]) == 0
    assert "1 run, 1 skipped, 0 failed" in capsys.readouterr().out


def test_a_stale_command_fails_even_where_it_is_skipped(check, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("<!-- check: skip takes hours -->\n```console\n$ enfilade predict photo.jpg --flop\n```\n")
    assert check.main([str(page), "--list"]) == 1
    assert "--flop" in capsys.readouterr().out


def test_commands_get_this_checkout(check, tmp_path):
    env = check.environment(tmp_path)
    runner = check.Runner(tmp_path, env)
    code = f"import enfilade, sys; sys.exit(not enfilade.__file__.startswith({str(ROOT)!r}))"
    assert runner.shell(f'python -c "{code}"') is None
    assert runner.shell("enfilade --version > version.txt") is None
    assert (tmp_path / "version.txt").read_text().startswith("enfilade ")


def test_make_runs_with_the_makefile_of_this_checkout(check, tmp_path):
    runner = check.Runner(tmp_path, check.environment(tmp_path))
    command = runner.rewritten("make --just-print demo IMAGE=photo.jpg > said.txt")
    assert runner.shell(command) is None
    said = (tmp_path / "said.txt").read_text()
    assert "enfilade demo" in said
    assert "'photo.jpg'" in said
    assert "pip install" not in said  # the environment is taken as it is


def test_the_folder_holds_what_pages_take_for_granted(check, tmp_path):
    from enfilade import images, open_dataset
    from enfilade.data.voxel_files import read_depth
    from enfilade.options import camera_of, read_camera
    from enfilade.refine import read_probabilities

    check.prepare(tmp_path)
    named = re.findall(r"[\w-]+\.(?:jpg|png|mp4|npy|json)|photos/|scan/", check.__doc__.split("What cannot")[0])
    assert {*named} >= {"photo.jpg", "clip.mp4", "scan/", "depth.npy"}
    assert [name for name in named if not (tmp_path / name).exists() and not (tmp_path / "scan" / name).exists()] == []
    assert len(images.find(tmp_path / "photos")) == 3
    assert len([*images.frames(tmp_path / "clip.mp4")]) == 3
    assert len(read_probabilities(tmp_path / "p.npy", 40)) == 40
    metres = read_depth(tmp_path / "depth.png")
    np.testing.assert_allclose(metres, np.load(tmp_path / "depth.npy"), atol=0.00051)  # rounded to millimetres
    sample = open_dataset("frames", tmp_path / "scan", "all")[0]
    np.testing.assert_array_equal(sample.depth, metres)
    assert sample.camera == camera_of(read_camera(tmp_path / "camera.json"), 640, 480)


# --------------------------------------------------------------------------------------------------------- the pages


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_parse(check, page):
    found = [(step.text, check.complaint(step.text)) for step in check.steps(page.name, page.read_text())
             if step.language == "console"]  # fmt: skip
    assert [pair for pair in found if pair[1] is not None] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_compiles(check, page):
    for step in check.steps(page.name, page.read_text()):
        if step.language == "python":
            compile(step.text, f"{page.name}:{step.line}", "exec")


def test_every_verb_is_shown():
    text = "\n".join(page.read_text() for page in PAGES)
    assert [verb for verb in VERBS if not re.search(rf"enfilade {verb}\b", text)] == []


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MyST make them."""
    heads = re.findall(r"^#+ +(.+?) *$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    lost = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        place = page.parent / file if file else page
        if not place.exists() or (anchor and place.suffix == ".md" and anchor not in anchors(place)):
            lost.append(target)
    assert lost == []


def test_the_notebook_links_to_pages_that_are_there():
    cells = json.loads((DOCS / "first-room.ipynb").read_text())["cells"]
    text = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    assert targets
    assert [target for target in targets if not (DOCS / target).exists()] == []


def test_no_page_is_missing_from_the_index():
    tree = re.findall(r"```\{toctree\}\n(.*?)```", (DOCS / "index.md").read_text(), re.DOTALL)
    named = [line.strip() for part in tree for line in part.splitlines() if line.strip() and line[0] != ":"]
    assert len(named) == len(set(named))
    assert set(named) == {path.stem for path in (*DOCS.glob("*.md"), *DOCS.glob("*.ipynb"))} - {"index"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_formulas_become_mathml(page):
    latex = pytest.importorskip("docutils.utils.math.latex2mathml")
    text = prose(page)
    blocks = re.findall(r"\$\$(.+?)\$\$", text, re.DOTALL)
    rest = re.sub(r"\$\$.+?\$\$", "", text, flags=re.DOTALL)
    spans = re.findall(r"(?<![\w$\\])\$([^$\s](?:[^$\n]*[^$\s])?)\$(?!\d)", rest)
    for formula in (*blocks, *spans):
        ElementTree.fromstring(latex.tex2mathml(formula).replace("&ApplyFunction;", ""))


# ------------------------------------------------------------------------------------------------ numbers and pictures


@pytest.mark.parametrize("name", ["gad", "lrn", "joint", "rsn", "imenet"])
def test_tables_beside_the_paper_are_those_of_the_experiments(name):
    """A row with numbers under "The numbers" stands in the log of experiments, word for word."""
    text = (DOCS / f"{name}.md").read_text()
    assert "## The numbers" in text
    rows = [line for line in text.split("## The numbers")[1].splitlines() if line.startswith("|")]
    log = {line.strip() for line in (DOCS / "experiments.md").read_text().splitlines()}
    assert len(rows) >= 4
    assert [row for row in rows if row not in log] == []


def test_tables_of_inference_are_those_of_the_benchmark():
    plots = json.loads((DOCS / "benchmarks/inference.json").read_text())
    names = {"LRN": "lrn-camvid", "SegNet": "segnet-camvid", "GAD": "gad-nyuv2", "FPN (smp)": "fpn-peer"}
    names |= {"U-Net (smp)": "unet-camvid"}
    modes = ("eager", "channels-last", "bf16", "compile", "compile-bf16", "onnx")
    text = (DOCS / "performance.md").read_text()
    for size in ("480x360", "640x480"):
        rows = {(row["model"], row["mode"]): row["ms"] for row in plots[size]["rows"]}
        table = text.split(f"**{size}**")[1].split("\n\n")[1]
        for shown, model in names.items():
            (line,) = (line for line in table.splitlines() if line.startswith(f"| {shown} |"))
            told = [int(cell.split()[0]) for cell in line.split("|")[4:10]]
            assert told == [round(rows[model, mode]) for mode in modes], (size, shown)


def test_table_of_the_crf_is_that_of_the_benchmark():
    found = json.loads((DOCS / "benchmarks/crf.json").read_text())
    text = (DOCS / "performance.md").read_text()
    shown_as = {"both lattices built": "build both lattices", "**10 iterations**": "fused"}
    shown_as |= {"10 iterations, Potts": "fused, Potts", "the same with checkpoints": "train, checkpoints"}
    for shown, key in shown_as.items():
        (line,) = (line for line in text.splitlines() if line.startswith(f"| {shown} |"))
        told = [int(cell.strip(" *").replace(",", "")) for cell in line.split("|")[2:6]]
        runs = [found[f"threads_{n}"]["thetas"][k]["rows"][key]["ms"] for k in (0, 1) for n in (1, 2)]
        assert told == [round(ms) for ms in runs], shown


def test_second_table_of_the_crf_is_that_of_its_benchmark():
    found = json.loads((DOCS / "benchmarks/crf-2026-11-22.json").read_text())
    text = (DOCS / "performance.md").read_text()
    shown_as = {"both lattices built, none kept": "build both lattices", "**10 iterations, again**": "fused"}
    shown_as |= {"10 iterations, Potts, again": "fused, Potts", "10 iterations, batch of 4": "fused, batch"}
    shown_as |= {"forward and backward with checkpoints": "train, checkpoints"}
    for shown, key in shown_as.items():
        line = [line for line in text.splitlines() if line.startswith(f"| {shown} |")][-1]
        told = [[int(ms.replace(",", "")) for ms in cell.strip(" *").split(", ")] for cell in line.split("|")[2:6]]
        runs = [found[f"threads_{n}"]["thetas"][k]["rows"][key] for k in (0, 1) for n in (1, 2)]
        assert told == [[round(run["ms"]), round(run["min_ms"])] for run in runs], shown


def test_benchmark_files_tell_no_paths():
    for path in (DOCS / "benchmarks").glob("*.json"):
        content = json.loads(path.read_text())
        assert {"hardware", "date"} <= content.keys()
        assert not re.search(r'"[^"]*/(home|root|work|tmp|Users)/', path.read_text())


def test_diagrams_are_what_the_script_draws(figures):
    for name, draw in figures.NETWORKS.items():
        svg = draw().svg()
        assert (DOCS / "images" / f"{name}.svg").read_text(encoding="utf-8") == svg, "python docs/figures.py networks"
        root = ElementTree.fromstring(svg)
        assert (root.findtext("{http://www.w3.org/2000/svg}title") or "").lower().startswith(name)
        assert len(svg) < 8000


def contrast(first: str, second: str) -> float:
    """WCAG 2's ratio of two colours."""

    def luminance(colour: str) -> float:
        values = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def test_diagrams_are_legible_by_day_and_by_night(figures):
    for shade in (0, 1):
        assert all(contrast(figures.TEXT[shade], fill[shade]) > 7 for fill in figures.PALETTE.values())
        assert contrast(figures.LINE[shade], figures.PALETTE["ground"][shade]) > 3


@pytest.mark.parametrize(
    ("place", "text", "words"),
    [((0, 0, 60), "far too long a name", "does not fit"), ((0, 0, 60), "a\nb\nc", "does not fit"),
     ((70, 0, 60), "out", "leaves the picture")],
)  # fmt: skip
def test_a_box_that_cannot_hold_its_text(figures, place, text, words):
    with pytest.raises(ValueError, match=words):
        figures.Diagram(100, 100, "test").box("net", *place, text)


def test_plots_repeat(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    plots = script("performance_plots")
    (tmp_path / "images").mkdir()
    (tmp_path / "benchmarks").symlink_to(DOCS / "benchmarks")
    monkeypatch.setattr(plots, "FOLDER", tmp_path)
    made = []
    for _ in range(2):
        plots.main("inference")
        made.append((tmp_path / "images/performance-inference.svg").read_bytes())
    assert made[0] == made[1]
    assert b"AMD EPYC, 2 cores; 1 thread; 2026-11-21" in made[0]
    assert (DOCS / "images/performance-inference.svg").is_file()


# -------------------------------------------------------------------------------------------------------- the notebook


def test_the_notebook_is_kept_without_outputs():
    cells = json.loads((DOCS / "first-room.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 5
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    notebook = nbformat.read(DOCS / "first-room.ipynb", 4)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    outputs = [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]
    said = "".join(out.text for out in outputs if out.output_type == "stream" and out.name == "stdout")
    pictures = [out for out in outputs if "image/png" in out.get("data", {})]
    assert len(pictures) == 4
    right, error = (int(n) for n in re.findall(r"(\d+)%", said))
    assert right > 30  # chance is below five: the room has some twenty classes
    assert error < 30
    assert re.search(r"camera 1\.\d\d m above the floor; \d{3,} voxels seen, \d{3,} completed", said)
