"""A new method costs two files: its module, and its line in the list of `visionpeft/methods/__init__.py`.

Everything else finds it there: public names, the command line, a configuration, the protocols, the matrix of tests.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from without_config import VTAB_BY_DEFAULT

import visionpeft as vp

ROOT = Path(__file__).parents[1]
METHOD = '''"""A learned vector on what the MLP gives."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn

from visionpeft.backbones.tower import Tower
from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.parts.base import Method, blocks_of
from visionpeft.sites import Placement


class Shift(nn.Module):
    """x + b."""

    tokenwise = True

    def __init__(self, width: int):
        super().__init__()
        self.b = nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens (batch, tokens, width) to the same shape."""
        return x + self.b.to(x.dtype)


@dataclass(frozen=True)
class BranchShift(Method):
    """x + b after the MLP of every block, b zero at the start.

    Args:
        blocks: which blocks.
        towers: which towers.
    """

    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def place(self, tower: Tower) -> Iterator[Placement]:
        """One `Shift` at `mlp_out` of each block."""
        for index in blocks_of(self, tower):
            yield Placement(tower.name, index, "mlp_out", Shift(tower.width))
'''


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the project with one method more."""
    folder = tmp_path_factory.mktemp("copy")
    ignored = shutil.ignore_patterns("written_by_0_1_0")
    for part in ("visionpeft", "configs", "datasets", "tests", "docs"):
        shutil.copytree(ROOT / part, folder / part, ignore=ignored)
    for file in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / file, folder / file)
    (folder / "visionpeft/methods/branch_shift.py").write_text(METHOD)
    listed = folder / "visionpeft/methods/__init__.py"
    text = listed.read_text().replace(
        "\n__all__ = [", '\nfrom visionpeft.methods.branch_shift import BranchShift\n\n__all__ = [\n    "BranchShift",'
    )
    listed.write_text(text)
    return folder


def run(folder, *command):
    """What a command prints that runs in the copy."""
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-2000:]
    return process.stdout


# Every process imports Lightning anew, so one answers all questions, and then runs some of the tests.
COMMAND_LINE = """
import contextlib, io, json
import visionpeft as vp
from visionpeft import fit
from visionpeft.protocols.method_candidates import configs_of_methods

printed = {}
for config in ("vtab_branch_shift.yaml", "fgvc_branch_shift.yaml"):
    with contextlib.redirect_stdout(io.StringIO()) as page, contextlib.suppress(SystemExit):
        fit.main(["--config", config, "--print_config"])
    printed[config] = page.getvalue()
print(json.dumps({
    "printed": printed,
    "name": vp.BranchShift().name,
    "configs": [str(config) for config in configs_of_methods(["BranchShift"], "vtab_")],
    "all": configs_of_methods(["all"], "vtab_"),
    "other": hasattr(vp, "BranchShifts"),
}))
import pytest, sys
sys.exit(pytest.main(sys.argv[1:]))
"""
TESTS = ("-n", "0", "-q", "-p", "no:cacheprovider", "tests/adapters/test_invariants.py")


@pytest.fixture(scope="module")
def printed(copy):
    chosen = "branchshift and (vit_cls or clip_whole)"
    return run(copy, "-W", "ignore", "-c", COMMAND_LINE, *TESTS, "-k", chosen).splitlines()


def test_it_is_on_the_command_line(printed):
    (found,) = [json.loads(line) for line in printed if line.startswith('{"printed"')]
    for page in found["printed"].values():
        assert yaml.safe_load(page)["model"]["init_args"]["method"]["class_path"].endswith("BranchShift")
    assert (found["name"], found["configs"]) == ("branch_shift", ["vtab_branch_shift.yaml"])
    here = {f"vtab_{path.name}" for path in (ROOT / "configs/vtab").glob("*.yaml") if path.stem != "default"}
    assert set(found["all"]) == here | VTAB_BY_DEFAULT | {"vtab_branch_shift.yaml"}
    assert not found["other"]


def test_it_is_in_the_matrix(printed):
    """And every property of a method holds for it on a host, without a word in the tests."""
    assert "failed" not in printed[-1]
    assert int(re.search(r"(\d+) passed", printed[-1])[1]) > 20


def test_it_is_not_in_the_package():
    """The negative control: the copy has the method because of its two files."""
    assert not hasattr(vp, "BranchShift")
