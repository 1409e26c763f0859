"""The documentation is true: its Python runs, its tables are made from the classes, and nothing public is missing."""

import importlib
import inspect
import os
import pkgutil
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from forked import start, wait
from small_runs import draw_images

import visionpeft as vp
from visionpeft.methods.vpt import Prompts, RemovePrompts
from visionpeft.runs.config_files import find_config

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
GUIDES = sorted(DOCS.glob("add_*.md"))
PAGES = sorted(DOCS.glob("*.md"))


def follow(folder, steps):
    """Run the steps of a page, (language, text), in a folder, as a reader would in one process."""
    os.chdir(folder)
    warnings.simplefilter("ignore")
    sys.path.insert(0, str(folder))
    names = {"__name__": "page"}
    for language, text in steps:
        if language == "python":
            exec(compile(text, "page", "exec"), names)
            continue
        for line in text.strip().splitlines():
            python, option, module, *arguments = shlex.split(line, comments=True)
            assert (python, option) == ("python", "-m"), line
            assert importlib.import_module(module).main(arguments) == 0, line
    return 0


def blocks(text, *languages):
    """(language, text) of the fenced blocks in a page."""
    return [match for match in re.findall(r"```(\w+)\n(.*?)```", text, flags=re.DOTALL) if match[0] in languages]


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_guide(page, tmp_path):
    """A block that begins with `# NAME.py` is that file; the other Python and the commands run as they stand."""
    draw_images(tmp_path / "photos", per_class=6)
    steps = []
    for language, text in blocks(page.read_text(encoding="utf-8"), "python", "bash"):
        named = re.match(r"# (\w+\.py)\n", text)
        if named:
            (tmp_path / named[1]).write_text(text, encoding="utf-8")
        else:
            steps.append((language, text))
    assert len(steps) >= 2
    printed = tmp_path / "printed.txt"
    assert wait(start(follow, tmp_path, steps, output=printed), 500) == 0, printed.read_text()[-3000:]


def test_there_are_four_guides():
    assert [page.stem for page in GUIDES] == ["add_data_set", "add_family", "add_learner", "add_method"]


@pytest.mark.slow
def test_tables(monkeypatch):
    """The tables of methods and learners are what `docs/tables.py` makes of the classes."""
    monkeypatch.syspath_prepend(str(DOCS))
    tables = importlib.import_module("tables")
    assert tables.main(["--check"]) == 0
    for name, lines in (("methods", vp.methods), ("learners", importlib.import_module("visionpeft.clip.learners"))):
        public = {each for each in lines.__all__ if each not in ("Method", "Learner")}
        shown = set(re.findall(r"`(\w+)\(.*?\)` \|", (DOCS / f"{name}.md").read_text(encoding="utf-8")))
        assert shown == public
        readme = marked((ROOT / "README.md").read_text(encoding="utf-8"), name)
        assert public <= set(re.findall(r"`(\w+)`", readme))


@pytest.mark.slow
def test_a_new_method_is_in_the_table(tmp_path, monkeypatch):
    """The one of the guide, from outside the package: its line follows from its class."""
    (text,) = [
        text
        for _, text in blocks((DOCS / "add_method.md").read_text(encoding="utf-8"), "python")
        if "# offset.py" in text
    ]
    (tmp_path / "offset_of_the_guide.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(DOCS))
    module = importlib.import_module("offset_of_the_guide")
    (line,) = importlib.import_module("tables").method_lines(["Offset"], module)
    assert (line.call, line.acts_at, line.trained, line.last) == ("Offset()", "`proj`", f"{12 * 768:,}", "yes")
    assert line.does.startswith("Learned offset of the attention's output projection")


def marked(text, name):
    return re.search(rf"<!-- {name}:begin -->\n(.*?)<!-- {name}:end -->", text, flags=re.DOTALL)[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The documentation, built; strict, so that a broken link or an unknown name ends the build."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


def described(site):
    """Every object that some page of the site describes, by the path under which it does."""
    paths = {
        path for page in site.rglob("*.html") for path in re.findall(r'id="(visionpeft\.[\w.]+)"', page.read_text())
    }
    return {path: inspect.unwrap(pkgutil.resolve_name(path)) for path in paths}


def test_every_public_name_is_described(site):
    """By object, so that a name counts wherever it is described. `visionpeft.sites` is not on the site: a control."""
    shown = described(site).values()
    missing = [name for name in vp.__all__ if not any(value is inspect.unwrap(getattr(vp, name)) for value in shown)]
    assert not missing
    assert not any(value is importlib.import_module("visionpeft.sites").Flow for value in shown)


def test_nothing_is_in_the_menu_twice_or_not_at_all():
    menu = re.findall(r"^  - [^:]+: (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert sorted(menu) == [page.name for page in PAGES]


def test_every_file_of_the_largest_room_is_named():
    text = (DOCS / "design.md").read_text(encoding="utf-8")
    table = text[text.index("the largest of the rooms") : text.index("## One block and its sites")]
    files = {path.stem for path in (ROOT / "visionpeft" / "adapters").glob("*.py")} - {"__init__"}
    assert set(re.findall(r"`(\w+)`", table)) == files


def test_the_two_commands_of_ci():
    """The README's, and those of CI, are the same."""
    steps = re.findall(r'^step "(.*)"$', (ROOT / ".ci" / "run").read_text(encoding="utf-8"), flags=re.MULTILINE)
    (_, shown), *_ = blocks((ROOT / "README.md").read_text(encoding="utf-8"), "bash")
    assert [line.partition("   #")[0] for line in shown.splitlines()] == steps[:2]


def test_readme_fits_a_page():
    assert 100 <= len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.stem)
def test_commands_name_what_exists(page):
    """Modules, scripts and configurations in the commands of a page."""
    text = page.read_text(encoding="utf-8")
    for module in re.findall(r"python -m (visionpeft\.\w+)", text):
        assert callable(importlib.import_module(module).main)
    for script in re.findall(r"python ((?:examples|benchmarks|docs)/\w+\.py)", text):
        assert (ROOT / script).is_file()
    for _, commands in blocks(text, "bash"):
        words = shlex.split(commands.replace("\\\n", " "), comments=True)
        for name in (word for word in words if word.endswith(".yaml") and word != "mine.yaml"):
            assert find_config(name).is_file()


@pytest.mark.parametrize(("method", "ran"), [(vp.VPT(dropout=0.1), "prompts_for"), (vp.VPT(deep=False), "forward")])
@pytest.mark.parametrize("training", [False, True])
def test_where_a_breakpoint_in_vpt_hits(method, ran, training, monkeypatch):
    """As its docstring says: deep prompts are keys and values, shallow ones tokens of the stream."""
    called = set()

    def spy(original):
        def run(module, x):
            called.add((type(module), original.__name__))
            return original(module, x)

        return run

    for kind, name in ((Prompts, "forward"), (RemovePrompts, "forward"), (Prompts, "prompts_for")):
        monkeypatch.setattr(kind, name, spy(getattr(kind, name)))
    model = vp.attach(vp.create_backbone("nano_vit", num_classes=3), method)
    called.clear()  # of the self-check
    model.train(training)(torch.randn(2, 3, 64, 64))
    assert (Prompts, "prompts_for") in called  # `forward` calls it, too
    assert ((Prompts, "forward") in called) == ((RemovePrompts, "forward") in called) == (ran == "forward")
