"""The script for a GPU: all of it runs without one, in small; cells fail alone, and a later run goes on."""

import json
import runpy
import sys
import time
from pathlib import Path

import pytest
from forked import start, wait

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def running(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from gpu_cells import running

    return running


@pytest.fixture
def tiny(tmp_path, one_thread):
    """The files of a run on the CPU."""
    folder = tmp_path
    page = folder / "page.md"
    page.write_text("before\n\n<!-- gpu:begin -->\nold\n<!-- gpu:end -->\n\nafter\n")
    printed = folder / "printed.txt"
    given = ["--device", "cpu", "--tiny", "--output", str(folder), "--docs", str(page)]
    assert wait(start(as_script, given, output=printed)) == 0, printed.read_text()
    return folder


def as_script(given):
    """`python benchmarks/gpu.py`, in a process that has everything imported already."""
    sys.argv = ["gpu.py", *given]
    sys.path.insert(0, str(BENCHMARKS))
    runpy.run_path(str(BENCHMARKS / "gpu.py"), run_name="__main__")


def test_everything_runs_in_small(tiny):
    """Differences are those of the precision, what peft keeps is more, and the tables are where the page has them."""
    cells = json.loads((tiny / "gpu.json").read_text())["cells"]
    assert {cell["status"] for cell in cells.values()} == {"done"}
    assert {cell["part"] for cell in cells.values()} == {"exactness", "waiting", "steps", "mixed", "text"}
    lora = cells["exact: LoRA"]["row"]
    assert 1e-9 < float(lora["float32, gradients"]) < 1e-5 < float(lora["bfloat16, gradients"]) < 0.1
    assert float(lora["float16, logits"]) < float(lora["bfloat16, logits"])
    steps = {(row["precision"], row["case"]): row for row in (c["row"] for c in cells.values() if c["part"] == "steps")}
    ours, theirs = (steps["float32", f"{who}LoRA r8 on all linears"] for who in ("", "HF peft "))
    assert 0 < ours["kept, MiB"] < 0.8 * theirs["kept, MiB"]
    assert ours["images per second"] == pytest.approx(2 / ours["seconds"])
    page = (tiny / "page.md").read_text()
    assert page.startswith("before\n\n<!-- gpu:begin -->\n\nMeasured on CPU")
    assert page.endswith("<!-- gpu:end -->\n\nafter\n")
    assert "old" not in page
    assert page.count("| LoRA r8 on all linears |") == 3  # in as many precisions


def test_a_cell_that_fails_is_written_down_and_tried_again(running, tmp_path):
    """And what is done is not run again."""
    Cell, journal = running.Cell, running.Journal(tmp_path / "gpu.json", {"device": "here"})
    broken, ran = [True], []

    def fail(_):
        ran.append("fails")
        if broken:
            raise ZeroDivisionError("so it is\nand more")
        return {"what": "mended"}

    def wrong(_):
        raise running.Wrong("too far", {"what": "measured"})

    cells = [
        Cell("fails", "part", fail),
        Cell("wrong", "part", wrong),
        Cell("right", "part", lambda _: ran.append("right") or {"what": "right"}),
    ]
    setting = running.Setting("cpu", tiny=True)
    assert running.run(cells, journal, setting, 60) == []
    kept = json.loads((tmp_path / "gpu.json").read_text())["cells"]
    assert {name: cell["status"] for name, cell in kept.items()} == {
        "fails": "failed",
        "wrong": "failed",
        "right": "done",
    }
    assert kept["fails"]["error"] == "ZeroDivisionError: so it is"
    assert (kept["wrong"]["error"], kept["wrong"]["row"]) == ("too far", {"what": "measured"})
    broken.clear()
    again = running.Journal(tmp_path / "gpu.json", {"device": "here"})
    running.run(cells, again, setting, 60)
    assert ran == ["fails", "right", "fails"]
    assert again.failed() == ["wrong"]
    with pytest.raises(SystemExit, match="another machine: device 'here' instead of 'there'"):
        running.Journal(tmp_path / "gpu.json", {"device": "there"})


def test_the_time_is_kept(running, tmp_path):
    """A cell that takes too long is left, with all after it, and nothing is written of it."""
    journal = running.Journal(tmp_path / "gpu.json", {})
    cells = [
        running.Cell("quick", "part", lambda _: {"what": 1}),
        running.Cell("slow", "part", lambda _: time.sleep(30)),
        running.Cell("later", "part", lambda _: {"what": 2}),
    ]
    before = time.monotonic()
    assert running.run(cells, journal, running.Setting("cpu"), 0.5) == ["slow", "later"]
    assert time.monotonic() - before < 20
    assert list(journal.cells) == ["quick"]


def test_a_wrong_result_is_seen(running):
    """A method whose device gives other numbers than the CPU fails, whatever it was."""
    import torch
    from gpu_cells import exactness

    class Off(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) * (1.0 if x.dtype == torch.float64 else 1.01)

    def run(module, images, targets):
        logits = module(images)
        return logits.square().sum(), logits

    module, setting = Off(3, 2), running.Setting("cpu", tiny=True)
    with pytest.raises(running.Wrong, match="logits in float32 differ by"):
        exactness.compare("off", run, module, torch.randn(4, 3), lambda m: list(m.parameters()), setting)
    right = torch.nn.Linear(3, 2)
    assert exactness.compare("on", run, right, torch.randn(4, 3), lambda m: list(m.parameters()), setting)
