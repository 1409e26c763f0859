"""Protocols: averages by hand, tables, figures, cells that are made once, and whole tables with a tiny CLIP."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from PIL import Image

from visionpeft import evaluate, fit, protocol
from visionpeft.clip.storage import load_learner
from visionpeft.data.few_shot.definitions import few_shot_class_names
from visionpeft.errors import ConfigurationError
from visionpeft.protocols import cells
from visionpeft.protocols import learner_protocols as benchmarks
from visionpeft.protocols.cells import Cell, finish, plan
from visionpeft.protocols.figures import draw_accuracy_against_shots, draw_base_to_new, draw_transfer
from visionpeft.protocols.learner_candidates import LearnerCandidate
from visionpeft.protocols.tables import (
    Table,
    base_to_new_table,
    calibration_table,
    few_shot_table,
    harmonic_mean,
    print_table,
    transfer_table,
    write_table,
)

# Base and new accuracy of CLIP on eleven data sets, and CoOp's from ImageNet to ten others (Zhou et al., 2022).
CLIP_BASE = [72.43, 96.84, 91.17, 63.37, 72.08, 90.10, 27.19, 69.36, 53.24, 56.48, 70.53]
CLIP_NEW = [68.14, 94.00, 97.26, 74.89, 77.80, 91.22, 36.29, 75.35, 59.90, 64.05, 77.50]
COOP_TARGETS = [93.70, 89.14, 64.51, 68.71, 85.30, 18.47, 64.15, 41.92, 46.39, 66.55]


def row(top1, learner="CoOp", dataset="pets", shots=16, seed=1, tested_on=None, classes="all", template=""):
    return {
        "learner": learner,
        "dataset": dataset,
        "shots": shots,
        "seed": seed,
        "tested_on": tested_on or dataset,
        "classes": classes,
        "template": template,
        "top1": top1,
    }


def line(table, **where):
    frame = table.frame
    for column, value in where.items():
        frame = frame[frame[column] == value]
    assert len(frame) == 1
    return frame.iloc[0]


@pytest.mark.parametrize(
    ("base", "new", "expected"),
    [(69.34, 74.22, 71.70), (82.69, 63.22, 71.66), (80.47, 71.69, 75.83), (82.28, 75.14, 78.55), (50, 50, 50)],
)
def test_harmonic_mean(base, new, expected):
    assert round(harmonic_mean(base, new), 2) == expected


def test_harmonic_mean_of_nothing_right():
    assert harmonic_mean(0.0, 0.0) == 0.0
    assert harmonic_mean(80.0, 0.0) == 0.0


def test_average_h_is_that_of_the_averages():
    rows = [
        row(score / 100, "ZeroShot", f"set {index}", shots=0, classes=classes)
        for classes, scores in (("base", CLIP_BASE), ("new", CLIP_NEW))
        for index, score in enumerate(scores)
    ]
    table = base_to_new_table(rows)
    average = line(table, dataset="average")
    assert round(average["base mean"], 2) == 69.34
    assert round(average["new mean"], 2) == 74.22
    assert round(average["H"], 2) == 71.70
    others = table.frame[table.frame["dataset"] != "average"]
    assert round(others["H"].mean(), 2) == 71.59  # what it must not be


def test_h_is_that_of_the_seed_averages():
    scores = {"base": [0.9, 0.5, 0.7], "new": [0.2, 0.6, 0.4]}
    rows = [row(v, seed=seed, classes=c) for c, values in scores.items() for seed, v in enumerate(values, start=1)]
    found = line(base_to_new_table(rows), learner="CoOp")
    assert found["base mean"] == pytest.approx(70)
    assert found["new mean"] == pytest.approx(40)
    assert found["H"] == pytest.approx(2 * 70 * 40 / 110)  # the mean over seeds of H would be 46.4
    assert found["base std"] == pytest.approx(100 * (0.08 / 3) ** 0.5)  # population: divided by 3 seeds, not by 2


def test_few_shot_averages_by_hand():
    rows = [row(top1, dataset="a", shots=1, seed=seed) for seed, top1 in ((1, 0.1), (2, 0.3))]
    rows += [row(top1, dataset="b", shots=1, seed=seed) for seed, top1 in ((1, 0.5), (2, 0.5))]
    rows += [row(0.4, "ZeroShot", name, shots=0, template=f"{name} {{}}.") for name in ("a", "b")]
    table = few_shot_table(rows)
    a, average = (line(table, dataset=name, learner="CoOp") for name in ("a", "average"))
    assert (a["1 mean"], a["1 std"]) == (pytest.approx(20), pytest.approx(10))
    assert (average["1 mean"], average["1 std"]) == (pytest.approx(35), pytest.approx(5))  # of 30 and 40
    zero_shot = line(table, dataset="b", learner="ZeroShot")
    assert zero_shot["0 mean"] == pytest.approx(40)
    assert np.isnan([zero_shot["0 std"], zero_shot["1 mean"], a["0 mean"]]).all()
    assert zero_shot["template"] == "b {}."


def test_transfer_average_leaves_the_source_out():
    rows = [row(0.7151, dataset="imagenet")]
    rows += [row(top1 / 100, dataset="imagenet", tested_on=f"t{i}") for i, top1 in enumerate(COOP_TARGETS)]
    found = line(transfer_table(rows), learner="CoOp")
    assert round(found["average of targets mean"], 2) == 63.88
    assert round(found["imagenet mean"], 2) == 71.51


def test_transfer_names_the_template_of_each_target():
    rows = [row(0.5, "ZeroShot", "a", 0, tested_on=name, template=t) for name, t in (("a", "x {}."), ("b", "{} y."))]
    assert line(transfer_table(rows), learner="ZeroShot")["template"] == "x {}. (a); {} y. (b)"


def test_subsets_are_told():
    rows = [row(0.5, shots=0) | {"test_images": 30, "of_test_images": 1103}, row(0.5, dataset="cars")]
    for table in (few_shot_table(rows), calibration_table([each | {"ece": 0.1} for each in rows])):
        assert "on fixed random subsets (pets 30 of 1,103 images) after the last epoch" in table.title
    rows = [row(0.5, classes=classes) | {"test_images": 9, "of_test_images": 10} for classes in ("base", "new")]
    assert "(pets base 9 of 10, pets new 9 of 10 images)" in base_to_new_table(rows).title
    assert "subset" not in few_shot_table([row(0.5) | {"test_images": 10, "of_test_images": 10}]).title


def test_calibration_beside_accuracy():
    """By hand: means over seeds of each place that was tested; without adaptation only of those that adapt."""
    numbers = {"mean_per_class": 0.4, "confidence": 0.7, "ece": 0.2}
    rows = [row(0.5, seed=1, classes=c) | numbers for c in ("base", "new")]
    rows += [row(0.7, seed=2, classes=c) | numbers | {"ece": 0.4} for c in ("base", "new")]
    rows.append(row(0.6, "TPT", shots=0) | numbers | {"top1_without_adaptation": 0.55, "ece_without_adaptation": 0.1})
    table = calibration_table(rows)
    base = line(table, learner="CoOp", **{"tested on": "pets, base"})
    assert (base["top-1 mean"], base["ECE mean"], base["ECE std"]) == pytest.approx((60, 30, 10))
    assert (base["mean per class mean"], base["confidence mean"], base["shots"]) == pytest.approx((40, 70, 16))
    assert np.isnan(base["ECE without adaptation mean"])
    tpt = line(table, learner="TPT")
    assert (tpt["top-1 without adaptation mean"], tpt["ECE without adaptation mean"]) == pytest.approx((55, 10))
    assert "mean confidence and expected calibration error (ECE), in %, after the last epoch" in table.title
    # rows of a version that did not write them
    assert list(calibration_table([row(0.5)]).frame) == [
        "dataset",
        "tested on",
        "learner",
        "shots",
        "top-1 mean",
        "top-1 std",
    ]


def small_tables():
    shots = [row(0.1 * k**0.5 + 0.01 * s, shots=k, seed=s) for k in (1, 4, 16) for s in (1, 2)]
    shots += [row(0.25, "ZeroShot", shots=0, template="a photo of a {}.")]
    halves = [row(0.5 + 0.1 * s, dataset=d, seed=s, classes=c) for d in "ab" for s in (1, 2) for c in ("base", "new")]
    targets = [row(0.5 + 0.1 * s, seed=s, tested_on=name) for s in (1, 2) for name in ("pets", "cars", "food")]
    return {
        draw_accuracy_against_shots: few_shot_table(shots),
        draw_base_to_new: base_to_new_table(halves),
        draw_transfer: transfer_table(targets),
    }


@pytest.mark.parametrize("draw", small_tables(), ids=lambda draw: draw.__name__)
def test_tables_and_figures_are_written(draw, tmp_path, capsys):
    table = small_tables()[draw]
    write_table(table, tmp_path)
    draw(table, tmp_path / "figure.png")
    print_table(table)
    assert "CoOp" in capsys.readouterr().out
    unrounded = pd.read_csv(tmp_path / "table.csv")
    numbers = table.frame.select_dtypes("number")
    assert np.allclose(unrounded[numbers.columns], numbers, rtol=1e-12, equal_nan=True)
    markdown = (tmp_path / "table.md").read_text()
    assert "population standard deviation over seeds 1, 2" in markdown
    assert "last epoch" in markdown
    lines = [text for text in markdown.splitlines() if text.startswith("|")]
    assert len(lines) == len(table.frame) + 2
    assert len({text.count("|") for text in lines}) == 1
    with Image.open(tmp_path / "figure.png") as image:
        assert min(image.size) > 300
        assert len(image.convert("RGB").getcolors(2**20)) > 20  # not an empty sheet
    assert {path.name for path in tmp_path.iterdir()} == {"table.csv", "table.md", "figure.png"}


def test_markdown_shows_two_decimals_and_the_template(tmp_path):
    frame = pd.DataFrame([{"dataset": "a|b", "learner": "L", "template": "{}.", "1 mean": 12.346, "1 std": 0.5}])
    write_table(Table("Title", frame), tmp_path)
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[0] == "Title."
    assert lines[-3:] == [
        "| dataset | learner | template | 1 |",
        "| --- | --- | --- | --- |",
        r"| a\|b | L | {}. | 12.35 ±0.50 |",
    ]


# Cells


def cell(seed=1, shots=4, **learner):
    return Cell(LearnerCandidate("CoOp", str(learner.pop("config")), **learner), "pets", "all", shots, seed)


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "coop.yaml"
    path.write_text("model: {}\n")
    return path


class FakeFit:
    """Makes run directories as `fit` does; is killed in the middle of the run number `killed`."""

    def __init__(self, killed=None):
        self.calls = []
        self.killed = killed

    def __call__(self, arguments):
        self.calls.append(arguments)
        if arguments[0] == "--resume":
            run = Path(arguments[1])
        else:
            run = Path(arguments[arguments.index("--output") + 1]) / "pets-CoOp-1"
            run.mkdir()
            (run / "config.yaml").write_text("data: {}\n")
        if len(self.calls) == self.killed:
            raise KeyboardInterrupt
        (run / "results.json").write_text(json.dumps({"made_by": len(self.calls)}))


def test_killed_protocol_resumes_one_cell_and_skips_the_finished(tmp_path, config, monkeypatch):
    wanted = [cell(seed, config=config) for seed in (1, 2, 3)]
    first, second, third = FakeFit(killed=2), FakeFit(), FakeFit()
    monkeypatch.setattr(cells, "fit", first)
    with pytest.raises(KeyboardInterrupt):
        finish(wanted, [], tmp_path / "out")
    assert len(first.calls) == 2
    results = tmp_path / "out" / wanted[0].name / "pets-CoOp-1" / "results.json"
    before = results.stat().st_mtime_ns
    monkeypatch.setattr(cells, "fit", second)
    runs = finish(wanted, [], tmp_path / "out")
    assert [call[0] for call in second.calls] == ["--resume", "--config"]
    assert f"/{wanted[1].name}/" in second.calls[0][1]
    assert results.stat().st_mtime_ns == before
    monkeypatch.setattr(cells, "fit", third)
    assert finish(wanted, [], tmp_path / "out") == runs
    assert third.calls == []
    assert [c for c, _ in runs] == wanted


def test_cell_killed_before_its_configuration_starts_again(tmp_path, config, monkeypatch):
    one = cell(config=config)
    (tmp_path / one.name / "pets-CoOp-7").mkdir(parents=True)
    fake = FakeFit()
    monkeypatch.setattr(cells, "fit", fake)
    finish([one], [], tmp_path)
    assert [call[0] for call in fake.calls] == ["--config"]


def test_cells_of_other_settings_are_refused_before_any_training(tmp_path, config, monkeypatch):
    monkeypatch.setattr(cells, "fit", FakeFit())
    finish([cell(config=config)], ["--trainer.max_epochs", "3"], tmp_path)
    fake = FakeFit()
    monkeypatch.setattr(cells, "fit", fake)
    both = [cell(seed=9, config=config), cell(config=config)]
    with pytest.raises(ConfigurationError, match=r"max_epochs 3 .*, not .*max_epochs 4"):
        finish(both, ["--trainer.max_epochs", "4"], tmp_path)
    config.write_text("model: {changed: 1}\n")
    with pytest.raises(ConfigurationError, match="a configuration that has changed since"):
        finish(both, ["--trainer.max_epochs", "3"], tmp_path)
    assert fake.calls == []


def test_a_training_without_results_is_an_error(tmp_path, config, monkeypatch):
    monkeypatch.setattr(cells, "fit", lambda arguments: None)
    with pytest.raises(ValueError, match="left no results"):
        finish([cell(config=config)], [], tmp_path)


def test_cell_says_all_that_it_is_trained_with(config):
    arguments = cell(seed=3, shots=2, config=config).arguments(["--data.root", "somewhere"])
    pairs = dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert pairs == {
        "--config": str(config),
        "--data.root": "somewhere",
        "--data.dataset": "pets",
        "--data.classes": "all",
        "--data.shots": "2",
        "--data.seed": "3",
        "--seed_everything": "3",
    }


def test_plan_trains_nothing_twice():
    learners = [
        LearnerCandidate("CoOp", "coop.yaml"),
        LearnerCandidate("TPT", "tpt.yaml", uses_images=False),
        LearnerCandidate("ZeroShot", "zero.yaml", uses_images=False, uses_chance=False),
    ]
    planned = plan(learners, ["a", "b"], "all", [1, 2], [1, 2, 3])
    found = {
        name: [(c.dataset, c.shots, c.seed) for c in planned if c.learner.name == name] for name in ("TPT", "CoOp")
    }
    assert len(planned) == len({c.name for c in planned}) == 2 * (6 + 3 + 1)
    assert found["TPT"] == [(d, 0, s) for d in "ab" for s in (1, 2, 3)]
    assert found["CoOp"] == [(d, k, s) for d in "ab" for k in (1, 2) for s in (1, 2, 3)]
    assert plan(learners, ["a", "b"], "all", [1, 2], [1, 2, 3]) == planned


# Whole tables with a tiny CLIP

COLOURS = {
    "black": (20, 20, 20),
    "blue": (0, 0, 255),
    "green": (0, 255, 0),
    "red": (255, 0, 0),
    "white": (250, 250, 250),
    "yellow": (255, 255, 0),
}
BASE, NEW = ["black", "blue", "green"], ["red", "white", "yellow"]
OTHERS = {"night": "black", "sky": "blue"}  # the data set `list`, of other names
TOKENIZER = open_clip.tokenizer.SimpleTokenizer()


def small_clip(name="small", **options):
    torch.manual_seed(0)
    vision = CLIPVisionCfg(image_size=16, patch_size=8, width=32, layers=2, head_width=16)
    clip = CLIP(24, vision, CLIPTextCfg(context_length=77, vocab_size=49408, width=32, heads=2, layers=2))
    clip.visual.preprocess_cfg = {"size": (16, 16), "mean": (0.5,) * 3, "std": (0.3,) * 3, "interpolation": "bicubic"}
    clip.backbone_source = {"library": "open_clip", "name": name, "pretrained": False, "kwargs": {}, "checkpoint": None}
    return clip.eval(), TOKENIZER


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr("visionpeft.tasks.prompt_learning.create_clip", small_clip)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data set `folder` of six colours, and in the same place a data set `list` of two, named otherwise."""
    root = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    for split, number in (("train", 3), ("test", 4)):
        for name, colour in COLOURS.items():
            (root / split / name).mkdir(parents=True)
            for index in range(number):
                pixels = np.clip(np.array(colour) * 0.7 + 40 + generator.integers(-60, 60, (16, 16, 3)), 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{index}.png")
        lines = [f"{split}/{colour}/{i}.png,{name}" for name, colour in OTHERS.items() for i in range(number)]
        (root / f"{split}.csv").write_text("\n".join(["path,label", *lines]) + "\n")
    return root


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("configs")
    learners = {
        "coop": "{class_path: CoOp, init_args: {context_length: 2}}",
        "own": "{class_path: CoOp, init_args: {context_length: 2, class_specific: true}}",
        "zero_shot": "{class_path: ZeroShot}",
    }
    for name, learner in learners.items():
        (folder / f"{name}.yaml").write_text(
            f"model: {{class_path: PromptLearning, init_args: {{learner: {learner}, optimisation: {{lr: 0.5}}}}}}\n"
            "data: {class_path: FewShot, init_args: {augmentation: none}}\n"
            "trainer: {max_epochs: 1, accelerator: cpu}\n"
        )
    return {name: str(folder / f"{name}.yaml") for name in learners}


def run_protocol(name, data, output, *more):
    arguments = [name, *more, "--root", str(data), "--output", str(output)]
    assert protocol.main(arguments) == 0
    with (output / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def by_hand(run, names, data):
    """Accuracy among some classes of what a run has learnt, image by image."""
    learner = load_learner(Path(run) / "learner", small_clip()[0], TOKENIZER, class_names=names)
    right = []
    for label, name in enumerate(names):
        for path in sorted((data / "test" / OTHERS.get(name, name)).iterdir()):
            pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1).float() / 255
            with torch.no_grad():
                right.append(learner(((pixels - 0.5) / 0.3)[None]).argmax().item() == label)
    return sum(right) / len(right)


def test_base_to_new(small, data, configs, tmp_path, monkeypatch):
    options = ["--configs", configs["zero_shot"], configs["coop"], "--datasets", "folder", "--shots", "2"]
    options += ["--seeds", "1", "2"]
    rows = run_protocol("base_to_new", data, tmp_path, *options)
    assert [(r["learner"], r["shots"], r["seed"], r["classes"]) for r in rows] == [
        *(("ZeroShot", "0", "1", classes) for classes in ("base", "new")),
        *(("CoOp", "2", seed, classes) for seed in "12" for classes in ("base", "new")),
    ]
    for found in rows:
        names = BASE if found["classes"] == "base" else NEW
        assert (found["number_of_classes"], found["test_images"]) == ("3", "12")
        assert float(found["top1"]) == pytest.approx(by_hand(found["run_directory"], names, data), abs=1e-6)
        assert bool(found["template"]) == (found["learner"] == "ZeroShot")
    contexts = {(Path(r["run_directory"]) / "learner" / "learner.safetensors").read_bytes() for r in rows[2:]}
    assert len(contexts) == 2  # the seeds differ

    def refuse(arguments):
        raise AssertionError(f"trained again: {arguments}")

    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*/**/*") if path.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(cells, "fit", refuse)
        assert run_protocol("base_to_new", data, tmp_path, *options) == rows
    assert {path: path.stat().st_mtime_ns for path in files} == files

    run = rows[2]["run_directory"]
    assert evaluate.main([run, "--protocol", "base_to_new"]) == 0
    with (Path(run) / "base_to_new" / "results.csv").open(newline="") as file:
        again = list(csv.DictReader(file))
    assert [(r["classes"], r["top1"]) for r in again] == [(r["classes"], r["top1"]) for r in rows[2:4]]


def test_few_shot(small, data, configs, tmp_path):
    options = ["--configs", configs["zero_shot"], configs["coop"], configs["own"], "--datasets", "folder"]
    rows = run_protocol("few_shot", data, tmp_path, *options, "--shots", "1", "3", "--seeds", "1")
    names = [r["learner"] for r in rows]
    assert names == ["ZeroShot", "coop", "coop", "own", "own"]  # two are called CoOp
    assert all(float(r["top1"]) == pytest.approx(by_hand(r["run_directory"], list(COLOURS), data)) for r in rows)
    assert {r["reported"] for r in rows[1:]} == {"last of 1 epochs"}
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {
        *("results.csv", "table.csv", "table.md", "calibration.csv", "calibration.md", "figure.png")
    }


def test_the_last_epoch_is_reported_whatever_a_configuration_says(small, data, configs, tmp_path):
    """The table says so; what the configuration says of report and test is for `fit`."""
    text = Path(configs["coop"]).read_text()
    (tmp_path / "best.yaml").write_text(f"{text}report: best\ntest: false\n")
    (tmp_path / "last.yaml").write_text(f"{text}report: last\n")
    chosen = ["--configs", str(tmp_path / "best.yaml"), str(tmp_path / "last.yaml"), "--datasets", "folder"]
    rows = run_protocol("few_shot", data, tmp_path / "out", *chosen, "--shots", "1", "--seeds", "1")
    assert [row["reported"] for row in rows] == ["last of 1 epochs"] * 2
    given = [json.loads(file.read_text())["arguments"] for file in sorted((tmp_path / "out").glob("*/cell.json"))]
    assert [("--report" in arguments, "--test" in arguments) for arguments in given] == [(True, True), (False, False)]


@pytest.mark.parametrize("name", ["cross_dataset", "domain_shift"])
def test_transfer_to_another_data_set(name, small, data, configs, tmp_path):
    options = ["--configs", configs["coop"], "--source", "folder", "--datasets", "list", "--shots", "2", "--seeds", "1"]
    source, target = run_protocol(name, data, tmp_path, *options)
    assert [r["tested_on"] for r in (source, target)] == ["folder", "list"]
    assert (target["number_of_classes"], target["test_images"]) == ("2", "8")
    assert float(target["top1"]) == pytest.approx(by_hand(target["run_directory"], list(OTHERS), data))
    run = source["run_directory"]
    assert evaluate.main([run, "--protocol", name, "--datasets", "list"]) == 0
    with (Path(run) / name / "results.csv").open(newline="") as file:
        assert [r["top1"] for r in csv.DictReader(file)] == [source["top1"], target["top1"]]


def test_learner_of_its_own_classes_is_refused(small, data, configs, tmp_path, capsys):
    more = ["--root", str(data), "--output", str(tmp_path / "out"), "--shots", "1", "--seeds", "1"]
    options = ["--configs", configs["coop"], configs["own"], "--datasets", "folder"]
    assert protocol.main(["base_to_new", *options, *more]) == 2
    error = capsys.readouterr().err
    assert "knows only the classes it was trained on" in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()

    assert protocol.main(["few_shot", "--configs", configs["own"], "--datasets", "folder", *more]) == 0
    (run,) = (tmp_path / "out").glob("own-*/folder-*")
    assert evaluate.main([str(run), "--protocol", "base_to_new"]) == 2
    assert "was trained on all classes" in capsys.readouterr().err
    assert evaluate.main([str(run), "--protocol", "cross_dataset", "--datasets", "list"]) == 2
    assert "takes no other class names" in capsys.readouterr().err
    assert not (run / "cross_dataset").exists()


def test_a_run_that_stored_its_draw_can_be_tested_elsewhere(small, data, configs, tmp_path):
    own = ["--data.dataset", "folder", "--data.classes", "base", "--data.root", str(data), "--data.shots", "1"]
    store = ["--data.store", str(tmp_path / "draw.json"), "--output", str(tmp_path)]
    assert fit.main(["--config", configs["coop"], *own, *store]) == 0
    (run,) = tmp_path.glob("folder-*")
    assert evaluate.main([str(run), "--protocol", "base_to_new"]) == 0


def test_names_given_for_the_source_are_not_those_of_a_target(small, data, configs, tmp_path):
    names = ["--data.class_names", "[a, b, c, d, e, f]"]
    own = ["--data.dataset", "folder", "--data.root", str(data), "--data.shots", "1", *names]
    assert fit.main(["--config", configs["coop"], *own, "--output", str(tmp_path)]) == 0
    (run,) = tmp_path.glob("folder-*")
    assert evaluate.main([str(run), "--protocol", "cross_dataset", "--datasets", "list"]) == 0
    with (run / "cross_dataset" / "results.csv").open(newline="") as file:
        source, target = csv.DictReader(file)
    assert float(source["top1"]) == json.loads((run / "results.json").read_text())["test"]["top1"]
    assert float(target["top1"]) == pytest.approx(by_hand(run, list(OTHERS), data))


def test_options_of_the_source_are_not_those_of_a_target(small, configs, tmp_path, capsys):
    """Split file, folders and template of the source are reset for a target, of which the command may say others."""
    for key, folder, images, file in (
        ("dtd", "dtd", "pictures", "mine.json"),
        ("eurosat", "eurosat", "2750", "split_zhou_EuroSAT.json"),
    ):
        names = few_shot_class_names(key)
        rows = {
            split: [[f"{split}_{label}.png", label, name] for label, name in enumerate(names)]
            for split in ("train", "val", "test")
        }
        for number, path in enumerate(path for members in rows.values() for path, *_ in members):
            (tmp_path / key / folder / images).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (number, 99, 255 - number)).save(tmp_path / key / folder / images / path)
        (tmp_path / key / folder / file).write_text(json.dumps(rows))
    source, target = tmp_path / "dtd", tmp_path / "eurosat"
    own = ["--data.dataset", "dtd", "--data.root", str(source), "--data.folder", "dtd", "--data.shots", "1"]
    own += ["--data.image_folder", "pictures", "--data.split_file", "mine.json", "--data.template", "{} texture seen."]
    assert fit.main(["--config", configs["zero_shot"], *own, "--output", str(tmp_path / "runs")]) == 0
    (run,) = (tmp_path / "runs").glob("dtd-*")
    shutil.rmtree(source)  # what the run measured there is known
    transfer = [str(run), "--protocol", "cross_dataset", "--datasets", "eurosat", "--data.root", str(target)]
    assert evaluate.main(transfer) == 0
    with (run / "cross_dataset" / "results.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert float(first["top1"]) == json.loads((run / "results.json").read_text())["test"]["top1"]
    assert (first["template"], first["tested_on"]) == ("{} texture seen.", "dtd")
    assert second["template"] == "a centered satellite photo of {}."
    assert second["test_images"] == "10"
    assert evaluate.main([*transfer, "--data.template", "{} from above."]) == 0
    with (run / "cross_dataset" / "results.csv").open(newline="") as file:
        assert [found["template"] for found in csv.DictReader(file)] == ["{} texture seen.", "{} from above."]
    assert evaluate.main([*transfer, "--data.split_file", "none.json"]) == 2
    assert "split file none.json does not exist" in capsys.readouterr().err


def test_ctrl_c_says_how_to_go_on(small, data, configs, tmp_path, monkeypatch, capsys):
    fake = FakeFit(killed=2)
    monkeypatch.setattr(cells, "fit", fake)
    options = ["--configs", configs["coop"], "--datasets", "folder", "--root", str(data), "--output", str(tmp_path)]
    assert protocol.main(["few_shot", *options, "--shots", "1", "--seeds", "1", "2"]) == 130
    assert "Give the same command again to go on" in capsys.readouterr().err
    assert not (tmp_path / "results.csv").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "name the protocol first"),
        (["few_shots"], "did you mean few_shot?"),
        (["few_shot"], "--configs"),
        (["few_shot", "--configs", "none.yaml"], "there is no configuration"),
        (["few_shot", "--configs", "CONFIG", "--data.shots", "3"], "use --shots"),
        (["few_shot", "--configs", "CONFIG", "--test", "false"], "use one test after each training"),
        (["few_shot", "--configs", "CONFIG", "--model.learner", "ZeroShot"], "--model.learner is decided by"),
        (
            ["base_to_new", "--configs", "CONFIG", "--config", "fewshot_cocoop.yaml"],
            "fewshot_cocoop.yaml names a learn",
        ),
        (["few_shot", "--configs", "CONFIG", "--source", "clipart"], "use --datasets, not --source"),
        (["few_shot", "--configs", "CONFIG", "--shots", "0"], "shots must be 1 or more"),
        (["few_shot", "--configs", "CONFIG", "--seeds", "1", "1"], "each seed may be named once"),
        (["few_shot", "--configs", "CONFIG", "CONFIG"], "needs a name of its own"),
        (["few_shot", "--configs", "CONFIG", "--datasets", "clipard"], "clipart"),
        (["base_to_new", "--configs", "CONFIG", "--shots", "1", "2"], "one number of shots"),
        (["cross_dataset", "--configs", "CONFIG", "--datasets", "clipart"], "leave it out of the targets"),
        (["cross_dataset", "--configs", "CONFIG", "--datasets", "ClipArt"], "leave it out of the targets"),
        (["few_shot", "--configs", "CONFIG", "--datasets", "clipart", "ClipArt"], "each data set may be named once"),
        (["few_shot", "--configs", "vtab_vpt.yaml"], "vtab_vpt.yaml trains no learner on CLIP"),
        (["base_to_new", "--configs", "CONFIG", "video_aim.yaml"], "video_aim.yaml trains no learner on CLIP"),
        (["few_shot", "--configs", "CONFIG", "--trainer.max_epoch", "1"], "max_epoch"),
    ],
)
def test_bad_input_is_one_sentence(arguments, said, small, configs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert protocol.main([configs["coop"] if a == "CONFIG" else a for a in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_targets_where_none_are_named():
    assert benchmarks.default_targets("cross_dataset", "clipart") == ("drawings",)
    assert len(benchmarks.default_targets("cross_dataset", "imagenet")) == 10
    assert benchmarks.default_targets("domain_shift", "imagenet")[-1] == "imagenet_r"
