"""Trainings that end by an error: found before they begin where it can be, else with what to do."""

import re
import shutil
from pathlib import Path

import pytest
from data_layouts import truncate
from PIL import Image
from small_mask_runs import draw_masked, mask_arguments
from small_runs import arguments, copied_in, draw_images, results

from visionpeft import fit
from visionpeft.data import ImageFolder
from visionpeft.runs.history import EpochHistory

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    return draw_images(tmp_path_factory.mktemp("data") / "squares")


@pytest.fixture
def images(squares, tmp_path):
    return shutil.copytree(squares, tmp_path / "squares")


def of_split(images: Path, split: str) -> Path:
    return ImageFolder(images).sources[split].paths[0]


def damage_inside(path: Path) -> Path:
    """Change bytes in the middle of a PNG, which only its decoder finds."""
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 20] = bytes(20)
    path.write_bytes(content)
    return path


def refused(capsys, arguments) -> str:
    assert fit.main(arguments) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_cut_image_is_found_before_training(images, tmp_path, capsys, split):
    path = truncate(of_split(images, split))
    said = refused(capsys, [*arguments(images), "--output", str(tmp_path / "runs")])
    assert f"image file {path} cannot be read" in said
    assert "set skip_corrupt to leave it out" in said
    assert not (tmp_path / "runs").exists()


def test_a_mask_of_another_size_is_found_before_training(tmp_path, capsys):
    masked = draw_masked(tmp_path / "scenes")
    Image.new("L", (31, 32)).save(masked / "masks" / "03.png")
    said = refused(capsys, [*mask_arguments(masked), "--output", str(tmp_path / "runs")])
    assert "31 x 32 pixels, but its image" in said
    assert "or set skip_corrupt to leave it out" in said
    assert not (tmp_path / "runs").exists()


def test_a_training_before_a_damaged_test_image_is_not_lost(images, tmp_path, capsys):
    path = damage_inside(of_split(images, "test"))
    said = refused(capsys, [*arguments(images, epochs=1), "--output", str(tmp_path / "runs")])
    assert f"image file {path} cannot be read" in said
    (run,) = (tmp_path / "runs").iterdir()
    (command,) = re.findall(r"python -m visionpeft\.fit (.*) goes on", said)
    assert command == f"--resume {run} --data.skip_corrupt true"
    assert fit.main(command.split()) == 0
    assert results(run)["data"]["skipped_images"] == {"train": 0, "val": 0, "test": 1}


def test_nothing_is_left_of_a_run_without_a_finished_epoch(images, tmp_path, capsys):
    damage_inside(of_split(images, "train"))
    output = tmp_path / "runs"
    said = refused(capsys, [*arguments(images, epochs=1), "--output", str(output)])
    assert "cannot be read" in said
    assert "--resume" not in said
    assert not list(output.iterdir())


def test_what_somebody_else_has_put_into_it_stays(images, tmp_path, capsys, monkeypatch):
    def note(self, trainer, pl_module):
        (self.path.parent / "mine.txt").write_text("mine")

    monkeypatch.setattr(EpochHistory, "on_train_epoch_start", note)
    damage_inside(of_split(images, "train"))
    refused(capsys, [*arguments(images, epochs=1), "--output", str(tmp_path / "runs")])
    assert [path.name for path in (tmp_path / "runs").rglob("*") if path.is_file()] == ["mine.txt"]


def test_a_run_that_was_there_before_stays(squares, images, tmp_path, capsys):
    """Also where it has no finished epoch, as one that was killed in the first."""
    with copied_in(0, tmp_path / "killed"):
        assert fit.main([*arguments(images, epochs=1), "--output", str(tmp_path / "runs")]) == 0
    damage_inside(of_split(images, "train"))
    before = {path.name for path in (tmp_path / "killed").iterdir()}
    refused(capsys, ["--resume", str(tmp_path / "killed")])
    assert before <= {path.name for path in (tmp_path / "killed").iterdir()}


@pytest.mark.parametrize("report", ["last", "best"])
def test_a_training_without_an_end_is_refused_before_there_is_a_run(squares, tmp_path, capsys, report):
    options = ["--trainer.max_epochs", "-1", "--report", report, "--output", str(tmp_path / "runs")]
    said = refused(capsys, [*arguments(squares), *options])
    assert "--trainer.max_epochs -1 has no end" in said
    assert not (tmp_path / "runs").exists()
