"""What is wrong in one of several processes, or differs between them, is said once, before anything is trained."""

import os
import shutil

import pytest
from forked import start_together, wait
from small_runs import arguments, draw_splits

from visionpeft import fit
from visionpeft.runs import agreement

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return draw_splits(tmp_path_factory.mktemp("images"), train=4, val=1, test=1)


def same(images, given):
    return given


def without_an_image(images, given):
    (images / "train" / "red" / "3.png").unlink()
    return given


def another_name(images, given):
    (images / "train" / "red" / "3.png").rename(images / "train" / "red" / "30.png")
    return given


def other_packages(images, given):
    known = agreement.environment()
    agreement.environment = lambda: {"packages": known["packages"] | {"timm": "0.9.0"}}
    return given


def no_data(images, given):
    return [*given, "--data.root", str(images / "elsewhere")]


def other_method(images, given):
    return [*given, "--model.method", "BitFit"]


CASES = {
    "all the same": (same, [], None),
    "fewer images": (without_an_image, [], "differ in the number of train images: 12 in process 1"),
    "other images": (another_name, [], "differ in the names of the train images"),
    "another version": (other_packages, [], "differ in the version of timm: "),
    "no data": (no_data, [], "(in process 2 of 2, on "),
    "another method": (other_method, [], "differ in what is trained: LoRA in process 1"),
    "wrong in all": (same, ["--data.batch_size", "0"], "batch_size 0 must be 1 or more"),
    "one device": (same, ["--trainer.devices", "1"], "2 processes were started, 2 of them on this machine"),
    "two machines": (same, ["--trainer.num_nodes", "2"], "give --trainer.devices 2 --trainer.num_nodes 1"),
    "no folder to write in": (same, ["--output", __file__], "no run directory can be made"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_one_process_says_it_and_all_end(tmp_path, images, case):
    change, options, sentence = CASES[case]
    folders = [shutil.copytree(images, tmp_path / f"data{rank}" / "images") for rank in range(2)]
    given = [*("--trainer.devices", "2", "--output", str(tmp_path / "runs")), *options, "--trainer.fast_dev_run", "1"]
    given += ["--report", "last"]

    def train():
        rank = int(os.environ["RANK"])
        own = arguments(folders[rank], *given)
        return fit.main(change(folders[rank], own) if rank else own)

    codes = [wait(child, 120) for child in start_together(tmp_path / "said", train)]
    text = "".join(path.read_text() for path in (tmp_path / "said").glob("*.txt"))
    assert "Traceback" not in text
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    if sentence is None:  # the negative control
        assert (codes, errors) == ([0, 0], [])
        assert (tmp_path / "runs").exists()
        return
    assert codes == [2, 2]
    assert len(errors) == 1
    assert sentence in errors[0]
    assert not (tmp_path / "runs").exists()
