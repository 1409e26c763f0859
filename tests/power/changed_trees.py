"""A copy of a working tree whose package can be changed for the time of a run of its tests."""

import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]

# What nearly every test imports, loaded once: runs are forked from the process that has it.
_LOADED_ONCE = (
    "numpy",
    "scipy.special",
    "torch",
    "torchvision",
    "timm",
    "open_clip",
    "safetensors.torch",
    "hypothesis",
)


class Tree:
    """A copy of the package and the tests of a working tree; everything else in it is a link to the original.

    Args:
        root: the working tree.
        folder: where the copy is made.
    """

    def __init__(self, root: Path, folder: Path):
        self.root = root.resolve()
        self.folder = folder
        for entry in self.root.iterdir():
            if entry.name in ("visionpeft", "tests"):
                shutil.copytree(entry, folder / entry.name, ignore=shutil.ignore_patterns("__pycache__"))
            elif not entry.name.startswith("."):
                (folder / entry.name).symlink_to(entry)

    def holding(self, text: str) -> list[Path]:
        """The modules of the package that hold a text, each as often as it does."""
        modules = sorted((self.folder / "visionpeft").rglob("*.py"))
        return [path for path in modules for _ in range(path.read_text().count(text))]

    @contextmanager
    def changed(self, old: str, new: str) -> Iterator[None]:
        """Within the context `new` is in the place of `old`, which must occur once in the package."""
        (path,) = self.holding(old)
        before = path.read_text()
        try:
            _write(path, before.replace(old, new))
            yield
        finally:
            _write(path, before)

    def failures(self, files: Iterable[str], keyword: str = "", limit: float = 600, every: bool = False) -> list[str]:
        """Run tests and say which fail: the first one alone, or `every` one.

        Args:
            files: names of test files without folder and ending, or test ids; names that the tree lacks count as empty.
            keyword: which of their tests, as pytest's -k.
            limit: seconds after which the run is stopped, which counts as a failure.
            every: go on after the first failure.
        """
        found: list[str] = []
        for name in files:
            if "::" in name:
                found.append(f"tests/{name}")
            else:
                found += [str(path.relative_to(self.folder)) for path in (self.folder / "tests").rglob(f"{name}.py")]
        if not found:
            return []
        options = ["-q", "-n", "0", "-m", "not slow and not walk_all", "-p", "no:cacheprovider"]
        options += ["-k", keyword] if keyword else []
        return _in_fork(
            lambda send: _run_pytest(self.folder, [*options, *([] if every else ["-x"]), *found], send), limit
        )


@contextmanager
def copies(*roots: Path | None) -> Iterator[list[Tree]]:
    """Copies of working trees, whose tests run there, removed after the context."""
    with tempfile.TemporaryDirectory() as folder:
        made = []
        for index, root in enumerate(root for root in roots if root is not None):
            (Path(folder) / str(index)).mkdir()
            made.append(Tree(root, Path(folder) / str(index)))
            if found := made[-1].failures(["test_selfcheck"]):
                raise SystemExit(f"the tests of {root} do not run as they are: {', '.join(found)}")
        yield made


class Outcomes:
    """What was found so far, in a JSON file if one is named, so that a run that was stopped can be continued."""

    def __init__(self, path: Path | None):
        self.path = path
        self.found: dict[str, list[str]] = json.loads(path.read_text()) if path is not None and path.exists() else {}

    def of(self, key: str, find: Callable[[], list[str]]) -> list[str]:
        """The outcome of this key, looked for if it is not known."""
        if key not in self.found:
            self.found[key] = find()
            if self.path is not None:
                self.path.write_text(json.dumps(self.found, indent=1))
        return self.found[key]


def failing_unchanged(tree: Tree, failures: Iterable[str]) -> list[str]:
    """Those of the tests that also fail in the tree as it is, so that their failing says nothing about a change."""
    tests = sorted({test for test in failures if "::" in test})
    return tree.failures(tests, every=True) if tests else []


def _write(path: Path, text: str) -> None:
    path.write_text(text)
    # Compiled code is taken to be current by second and size, which a change may leave as they were.
    for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*"):
        compiled.unlink()


def _in_fork(call: Callable[[Callable[[str], None]], None], limit: float) -> list[str]:
    """Run something in a fork of this process, and give back the words it sends."""
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in _LOADED_ONCE:
        __import__(name)
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)

    def run() -> None:
        os.setsid()
        call(sending.send)

    process = context.Process(target=run)
    process.start()
    sending.close()
    words, until = [], time.monotonic() + limit
    try:
        while receiving.poll(max(0, until - time.monotonic())):
            words.append(receiving.recv())
        os.killpg(process.pid, signal.SIGKILL)
        words.append(f"not done after {limit:.0f} s")
    except EOFError:  # it has ended
        process.join()
        if process.exitcode != 0:
            words.append(f"pytest stopped with {process.exitcode}")
    process.join()
    return list(dict.fromkeys(words))


def _run_pytest(folder: Path, options: list[str], send: Callable[[str], None]) -> None:
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = str(folder)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    import pytest

    class Failures:
        def pytest_configure(self, config) -> None:
            config.addinivalue_line("markers", "walk_all: known to no earlier tree, and asked for above")

        def pytest_runtest_logreport(self, report) -> None:
            if report.failed:
                send(report.nodeid.removeprefix("tests/"))

        def pytest_collectreport(self, report) -> None:
            if report.failed:
                send(f"{report.nodeid.removeprefix('tests/')} cannot be collected")

    status = pytest.main(options, plugins=[Failures()])
    # 5: no test has this keyword
    os._exit(0 if status in (0, 1, 2, 5) else int(status))
