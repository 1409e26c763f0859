"""What a run may be resumed with: its own data and options, and only what does not change what is trained."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import yaml
from small_runs import BACKBONE, COLOURS, draw_images, results, run

from visionpeft import evaluate, fit
from visionpeft.runs.carried import as_carried, with_carried
from visionpeft.runs.history import read_history

pytestmark = pytest.mark.usefixtures("one_thread")
ORDER = ["red", "blue", "green"]


def in_words(names):
    return f"[{', '.join(names)}]"


def write_lists(folder: Path, left_out: int = -1) -> Path:
    """Images of three colours, in a list for each split."""
    for split, numbers in {"train": range(6), "val": range(6, 8), "test": range(8, 10)}.items():
        with (folder / f"{split}.csv").open("w", newline="") as file:
            rows = [(f"images/{name}/{n}.png", name) for name in COLOURS for n in numbers if n != left_out]
            csv.writer(file).writerows([("path", "label"), *rows])
    return folder


def files_of(run: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in run.rglob("*") if file.is_file() and file.name != ".lock"}


@pytest.fixture(scope="module")
def lists(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    draw_images(folder / "images")
    return write_lists(folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, lists):
    """A finished run on three lists, with class names in an order of their own."""
    output = tmp_path_factory.mktemp("runs")
    splits = [part for split in ("train", "val", "test") for part in (f"--data.{split}", str(lists / f"{split}.csv"))]
    options = [
        *("--config", "images_lora.yaml", *BACKBONE, "--data", "ImageList", *splits, "--data.root", "auto"),
        *("--data.class_names", in_words(ORDER), "--data.batch_size", "8", "--model.optimisation.warmup_epochs", "1"),
        *("--trainer.max_epochs", "2", "--trainer.accelerator", "cpu", "--figures", "false", "--output", str(output)),
    ]
    assert fit.main(options) == 0
    (made,) = output.iterdir()
    return made


@pytest.fixture
def refused(finished, capsys):
    """Resume the finished run with some options, see that nothing is written, and return what is said."""

    def resume(*options: str, run: Path = finished) -> str:
        before = files_of(run)
        assert fit.main(["--resume", str(run), *options]) == 2
        said = capsys.readouterr().err
        assert before == files_of(run)
        assert said.count("\n") == 1
        return said

    return resume


@pytest.mark.parametrize("known", ["record", "adapter"])
def test_other_classes_are_refused(finished, refused, tmp_path, known):
    """Also those of a run of an earlier version, which has no record of its data."""
    run = finished
    if known == "adapter":
        run = shutil.copytree(finished, tmp_path / "earlier")
        (run / "data.json").unlink()
    said = refused("--data.class_names", in_words(sorted(ORDER)), run=run)
    assert "tells other classes apart than the data has (class 0 is 'red', not 'blue')" in said
    assert f"--config {run / 'config.yaml'}" in said
    assert "(class 0 is 'red', not 'blue')" in refused("--data.class_names", "null", run=run)
    assert json.loads((run / "adapter" / "adapter.json").read_text())["class_names"] == ORDER
    assert fit.main(["--resume", str(run), "--data.class_names", in_words(ORDER)]) == 0


def test_other_images_are_refused_and_the_same_elsewhere_are_not(lists, finished, refused, tmp_path):
    def places(folder):
        return [part for split in ("train", "val", "test") for part in (f"--data.{split}", f"{folder}/{split}.csv")]

    moved, run = shutil.copytree(lists, tmp_path / "moved"), shutil.copytree(finished, tmp_path / "run")
    assert fit.main(["--resume", str(run), *places(moved)]) == 0
    write_lists(moved, left_out=3)
    said = refused(*places(moved))
    assert "begun with other data, which differ in the number of train images (18, not 15)" in said
    (moved / "train.csv").write_text((lists / "train.csv").read_text().replace("red/3", "red/6"))
    (moved / "val.csv").write_text((lists / "val.csv").read_text().replace("red/6", "red/3"))
    assert "differ in the names of the train images" in refused(*places(moved))


def test_damaged_images_are_left_out_of_a_resumed_run(lists, finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    damaged = shutil.copytree(lists, tmp_path / "damaged")
    (damaged / "images" / "red" / "9.png").write_bytes(b"no image")
    places = [part for split in ("train", "val", "test") for part in (f"--data.{split}", f"{damaged}/{split}.csv")]
    assert fit.main(["--resume", str(run), *places, "--data.skip_corrupt", "true"]) == 0
    assert results(run)["data"]["skipped_images"] == {"train": 0, "val": 0, "test": 1}


@pytest.mark.parametrize(
    ("option", "value", "before"),
    [
        ("--model.method.alpha", "3.0", "null"),
        ("--model.method", "BitFit", "LoRA"),
        ("--model.optimisation.weight_decay", "0.5", "0.0001"),
        ("--model.label_smoothing", "0.1", "0.0"),
        ("--data.augmentation", "none", "crop_flip"),
        ("--seed_everything", "5", "0"),
        ("--output", "elsewhere", None),
    ],
)
def test_options_that_change_what_is_trained_are_refused(finished, refused, option, value, before):
    said = refused(option, value)
    assert f"{option} {value} cannot be changed while {finished} goes on" in said
    assert before is None or f"begun with {before}; leave it out, or start a new run: " in said


def test_what_a_run_goes_on_with_is_in_its_configuration(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    before = (run / "config.yaml").read_bytes()
    assert fit.main(["--resume", str(run), "--trainer.max_epochs", "2"]) == 0  # as it was
    assert (run / "config.yaml").read_bytes() == before
    changes = ["--trainer.max_epochs", "4", "--data.batch_size", "6", "--model.optimisation.lr", "0.002"]
    assert fit.main(["--resume", str(run), *changes]) == 0
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["trainer"]["max_epochs"] == 4
    assert config["data"]["init_args"]["batch_size"] == 6
    assert config["model"]["init_args"]["optimisation"]["lr"] == 0.002
    old = yaml.safe_load(before)
    for part, name in (("trainer", "max_epochs"), ("data", "batch_size"), ("model", "optimisation")):
        for each in (config, old):
            each[part].get("init_args", each[part]).pop(name)
    assert config == old
    history = read_history(run / "metrics.csv")
    assert len(history) == 4
    assert history[2]["lr"] == pytest.approx(0.25 * 0.002)  # the rate that was given acts: 6 of 9 steps down the cosine
    (run / "results.json").unlink()
    assert fit.main(["--resume", str(run)]) == 0
    assert len(read_history(run / "metrics.csv")) == 4


def test_a_run_on_copies_of_adapters_is_still_configured_by_their_names(tmp_path):
    folder = tmp_path / "carried"
    folder.mkdir()
    (folder / "names.json").write_text('{"mine/lora": "0"}')
    content = {"model": {"init_args": {"start": "mine/lora"}}}
    copied = yaml.safe_dump(with_carried(content, folder))
    assert yaml.safe_load(copied)["model"]["init_args"]["start"] == str(folder / "0")
    assert yaml.safe_load(as_carried(copied, folder)) == content
    assert as_carried(copied, tmp_path) == copied  # where nothing was copied


def test_data_named_by_a_path_from_another_folder(tmp_path, monkeypatch, capsys):
    draw_images(tmp_path / "squares", per_class=5)
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        run_here = run(Path("runs"), Path("squares"), "--data.val_fraction", "0.2", epochs=1)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    made = Path("..") / run_here
    for main, options in ((evaluate.main, [str(made)]), (fit.main, ["--resume", str(made)])):
        assert main(options) == 2
        said = capsys.readouterr().err
        assert "image folder squares does not exist; in ../runs/" in said
        assert "go there, or say where it is now with --data.root" in said
        assert main([*options, "--data.root", "nowhere"]) == 2
        assert capsys.readouterr().err == "error: image folder nowhere does not exist\n"
        assert main([*options, "--data.root", "../squares"]) == 0
