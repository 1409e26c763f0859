"""`python -m visionpeft.search`: a whole search in seconds, killed at any trial, and what it refuses."""

import csv
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from small_protocols import write_config
from small_runs import BACKBONE, draw_images

from visionpeft import search
from visionpeft.protocols import cells
from visionpeft.searching import trials
from visionpeft.searching.front import on_front
from visionpeft.searching.report import found_table, verdicts

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_front_is_what_nothing_is_better_than():
    generator = np.random.default_rng(0)
    for dimensions in (2, 4):
        points = generator.integers(0, 4, (40, dimensions)).tolist()
        expected = []
        for own in points:
            better = False
            for other in points:
                no_worse = all(b <= a for a, b in zip(own, other, strict=True))
                better = better or (no_worse and other != own)
            expected.append(not better)
        assert on_front(points) == expected
        assert 0 < sum(expected) < 40
    assert on_front([(1, 1), (1, 1)]) == [True, True]


def row(method, top1, seed, steps=10, task="a", searched=0):
    costs = {"adapter_parameters": 5, "saved_bytes_per_image": 2**20, "step_forwards": 2.5}
    return {
        "task": task,
        "method": method,
        "seed": seed,
        "top1": top1,
        "steps": steps,
        "search_steps": searched,
    } | costs


def test_the_table_says_whether_what_was_found_is_better():
    rows = [row("lora", top1, seed) for seed, top1 in enumerate((0.30, 0.32))]
    rows += [row("vpt", top1, seed) for seed, top1 in enumerate((0.20, 0.22))]
    rows += [row("noah, found", top1, seed, searched=30) for seed, top1 in enumerate((0.33, 0.35))]
    rows += [row("lora", top1, seed, task="b") for seed, top1 in enumerate((0.30, 0.36))]
    rows += [row("noah, found", top1, seed, task="b", searched=30) for seed, top1 in enumerate((0.33, 0.37))]
    rows += [row(method, 0.5, 0, task="c") for method in ("lora", "noah, found")]
    table = found_table(rows)
    first = table.frame.iloc[0]
    assert (first["method"], first["steps"]) == ("noah, found", "30 + 10")
    assert first["test top-1 mean"] == pytest.approx(34)
    assert first["test top-1 std"] == pytest.approx(1)
    above, below, unknown = verdicts(table)
    assert above.startswith("a: noah, found is above the best single method, lora")
    assert "+3.00 points, deviation 1.00" in above
    assert below.startswith("b: noah, found is not above the best single method, lora")
    assert "+2.00 points, deviation 3.00" in below
    assert "one seed has no deviation" in unknown


# Whole searches


def arguments(folder, config, *more, budget="5"):
    return [
        *("--space", "noah", "--space_options", "{sizes: [1, 2]}", "--base", config, "--tasks", "dsprites_ori"),
        *("--budget", budget, "--seeds", "1", "--search_epochs", "2", "--output", str(folder), *more),
    ]


def read(folder):
    """What is the same whenever it is measured."""
    rows = read_exactly(folder / "results.csv").drop(columns=["training_seconds", "run_directory", "step_forwards"])
    rows = rows[rows["method"] == "noah, found"]
    judged = read_exactly(folder / "trials.csv")[["task", "member", "val_top1", "parameters", "saved_bytes"]]
    return rows.to_csv(index=False), judged.to_csv(index=False)


def single(config):
    """The configuration of a method to compare with."""
    return str(Path(config).parent / "vtab_bit.yaml")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A configuration and the folder of an uninterrupted search."""
    folder = tmp_path_factory.mktemp("whole")
    config = write_config(folder / "configs")
    write_config(folder / "configs", "bit")
    assert search.main(arguments(folder / "out", config, "--max_parameters", "4000", "--against", single(config))) == 0
    return config, folder / "out"


def read_exactly(path):
    """A table as it was written: pandas 2 rounds a third of all numbers by default (2.3.0; 3.1.1 does not)."""
    return pd.read_csv(path, float_precision="round_trip")


def test_a_search_selects_on_validation_and_measures(whole):
    _, folder = whole
    judged = read_exactly(folder / "trials.csv")
    assert len(judged) == 5
    assert judged["parameters"].max() <= 4000
    rows = {line["method"]: line for line in csv.DictReader((folder / "results.csv").open())}
    found = rows["noah, found"]
    best = judged[judged["val_top1"] == judged["val_top1"].max()].sort_values("parameters", kind="stable").iloc[0]
    assert found["member"] == best["member"]
    assert float(found["val_top1"]) == best["val_top1"]
    # the run that was tested trained what was chosen, and only it was tested
    assert int(found["adapter_parameters"]) == best["parameters"]
    assert float(found["saved_bytes_per_image"]) == best["saved_bytes"] > 0
    assert found["trained_on"] == "train800val200"
    for cell in [*folder.glob("supernet/*/cell.json"), *folder.glob("trials/*/*/cell.json")]:
        given = json.loads(cell.read_text())["arguments"]
        assert given[given.index("--test") + 1] == "false"
        assert given[given.index("--data.train_on") + 1] == "train800"
    assert not [file for file in folder.glob("supernet/*/*/results.json") if "test" in json.loads(file.read_text())]
    # what it is compared with has made as many steps as search and training together, or one epoch more
    assert (int(found["search_steps"]), int(found["steps"])) == (6, 9)
    assert (rows["bit"]["steps"], rows["bit, all steps"]["steps"]) == ("9", "15")
    front = read_exactly(folder / "front.csv")
    assert front["validation top-1 mean"].max() == 100 * judged["val_top1"].max()
    assert (folder / "figure.png").stat().st_size > 10_000


def test_a_search_killed_at_any_trial_ends_as_if_it_had_not_been(whole, tmp_path, monkeypatch, capsys):
    config, folder = whole
    command = arguments(tmp_path, config, "--max_parameters", "4000")
    fit, judge, calls = cells.fit, trials.SupernetTrial.judge, []

    def killed(part, before):
        def run(*given):
            calls.append(part)
            if calls.count(part) in before:
                raise KeyboardInterrupt
            (fit if part == "fit" else judge)(*given)

        return run

    with monkeypatch.context() as patch:
        patch.setattr(cells, "fit", killed("fit", (2,)))
        patch.setattr(trials.SupernetTrial, "judge", killed("judge", (1, 4)))
        assert [search.main(command) for _ in range(3)] == [130] * 3
        assert search.main(command) == 0
    assert read(tmp_path) == read(folder)
    assert calls.count("judge") == 5 + 2  # nothing was judged twice
    # the negative control: with another score another member is chosen, which is not the one that was trained
    chosen = json.loads(next(tmp_path.glob("final/noah-found-*/cell.json")).read_text())["about"]["val_top1"]
    scores = {file: json.loads(file.read_text())["val_top1"] for file in tmp_path.glob("trials/*/*/score.json")}
    least = min(scores, key=scores.get)
    assert scores[least] < chosen
    least.write_text(json.dumps({"val_top1": 0.99}))
    assert search.main(command) == 2
    assert "was made with" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (["--budget", "0"], "--budget 0 is below one trial"),
        (["--space", "noa"], "there is no space 'noa'; did you mean noah?"),
        (["--space_options", "{size: [1]}"], "space noah has no option 'size'; did you mean sizes?"),
        (["--space_options", "{depths: [99]}"], "no member"),
        (["--max_parameters", "10"], "no member with at most 10 values on this backbone"),
        (["--seeds", "1", "1"], "name at least one seed, each once"),
        (["--model.method", "LoRA"], "--model.method is decided by the protocol; use --space"),
        (["--model.method.rank", "3"], "--model.method.rank is decided by the protocol; use --space"),
        (["--config", "vtab_vpt.yaml"], "vtab_vpt.yaml names a method, which would take the place"),
        (["--against", "fgvc_vpt.yaml"], "dataset"),
        (["--tasks", "dsprites"], "dsprites"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_training(change, sentence, whole, tmp_path, capsys):
    config, _ = whole
    assert search.main([*arguments(tmp_path / "out", config), *change]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_search_is_refused(whole, capsys):
    config, folder = whole
    assert search.main(arguments(folder, config, "--max_parameters", "3000")) == 2
    assert "was made with max_parameters 4000, not 3000; give another --output" in capsys.readouterr().err
    settings = json.loads((folder / "search.json").read_text())
    (folder / "search.json").write_text(json.dumps(settings | {"space": "another"}))
    assert search.main(arguments(folder, config, "--max_parameters", "4000")) == 2
    assert "was made with space another, not noah" in capsys.readouterr().err
    (folder / "search.json").write_text(json.dumps(settings))


def test_own_images_need_a_validation_split(tmp_path, capsys):
    images = draw_images(tmp_path / "images")
    own = [
        *("--space", "noah", "--space_options", "{sizes: [1]}", "--base", "images_lora.yaml", "--budget", "1"),
        *("--root", str(images), "--seeds", "1", "--output", str(tmp_path / "out"), *BACKBONE),
        *("--trainer.max_epochs", "1", "--trainer.accelerator", "cpu", "--data.batch_size", "8"),
        *("--model.optimisation.warmup_epochs", "0"),
    ]
    assert search.main([*own, "--data.val_fraction", "0"]) == 2
    assert "has no validation split; give one" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert search.main(own) == 0
    (line,) = csv.DictReader((tmp_path / "out/results.csv").open())
    assert (line["task"], line["test_images"]) == ("images_lora", "6")
