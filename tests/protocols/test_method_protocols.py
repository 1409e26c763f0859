"""VTAB-1k and FGVC: recipes, searches, both means by hand, and whole tables with a tiny backbone."""

import csv
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from data_layouts import write_fgvc, write_vtab_task
from small_protocols import Piece, measured, read_rows, write_config
from without_config import VTAB_BY_DEFAULT

from visionpeft import protocol
from visionpeft.data import ClipArt
from visionpeft.data.vtab import vtab1k_tasks
from visionpeft.errors import ConfigurationError
from visionpeft.files import shipped
from visionpeft.protocols import cells, work
from visionpeft.protocols.method_candidates import MethodCandidate, configs_of_methods, method_candidates
from visionpeft.protocols.method_protocols import collect
from visionpeft.protocols.method_runs import Benchmark, available
from visionpeft.protocols.method_table import method_table
from visionpeft.protocols.recipes import find_recipe, paper_recipe
from visionpeft.protocols.search import best, choose, grid_points
from visionpeft.runs.cli import CLI
from visionpeft.runs.config_files import find_config, shipped_configs
from visionpeft.runs.history import read_history

RECIPES = sorted(f"{path.parts[-3]}_{path.name}" for path in shipped("configs").glob("*/recipes/*.yaml"))


# Recipes


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_say_what_their_configuration_understands(name):
    benchmark = Benchmark("vtab1k" if name.startswith("vtab_") else "fgvc", None, paper=True)
    candidate = MethodCandidate("it", name, "")
    recipe = find_recipe(candidate.path)
    rules = (True, False) if recipe.paper else (False,)  # some are only a grid of our own
    if not recipe.paper:
        with pytest.raises(ConfigurationError, match="no paper's rule is known"):
            paper_recipe(candidate.path)
    tasks = set(vtab1k_tasks()) if benchmark.name == "vtab1k" else set(recipe.tasks)
    assert set(recipe.tasks) <= tasks
    assert not recipe.tasks or len(recipe.tasks) == (19 if benchmark.name == "vtab1k" else 5)
    assert recipe.seeds or not recipe.paper
    if benchmark.name == "fgvc":
        return  # its data are not here
    for paper in rules:
        rule = Benchmark("vtab1k", None, paper=paper)
        values = grid_points(rule.grid(candidate, "dsprites_ori"))[-1]
        cli = CLI(rule.arguments(candidate, "dsprites_ori", values, 5, "trial"))
        assert cli.model.optimisation.lr == values.get("model.optimisation.lr", cli.model.optimisation.lr)
        assert cli.config.seed_everything == 5
        assert len(cli.datamodule.sources["train"]) == 800
        if paper:
            assert cli.config.trainer.max_epochs == 100


def test_grids_and_rules_of_the_papers():
    def size(name, **options):
        benchmark = Benchmark(name.partition("_")[0].replace("vtab", "vtab1k"), None, **options)
        return len(grid_points(benchmark.grid(MethodCandidate("it", f"{name}.yaml", ""), "svhn")))

    assert size("vtab_vpt") == size("vtab_vpt", paper=True) == 40
    assert size("fgvc_vpt") == 36
    assert size("vtab_bitfit", paper=True) == 4
    assert size("vtab_ssf") == 5
    assert size("vtab_ssf", paper=True) == size("vtab_lora", paper=True) == 1  # the authors say what it is
    rules = {name: paper_recipe(find_config(f"vtab_{name}.yaml")) for name in ("vpt", "adapter_plus", "ssf")}
    assert [rules[name].report for name in rules] == ["last", "last", "best_test"]
    assert rules["vpt"].seeds == (42, 44, 82, 100, 800)
    assert rules["ssf"].tasks["svhn"]["model.optimisation.lr"] == 0.01
    convpass = paper_recipe(find_config("vtab_convpass.yaml"))
    assert convpass.paper["model.method.drop_path"] == 0.1  # its bypasses are dropped, too
    assert "bypasses" in convpass.differs
    lengths = [entry["model.method.num_tokens"] for entry in rules["vpt"].tasks.values()]
    assert np.mean(lengths) == pytest.approx(60.9, abs=0.05)  # 0.56 M on average, as published

    def ranks(name):
        tasks = find_recipe(find_config(f"vtab_{name}.yaml")).tasks.values()
        return np.array([entry["model.method.rank"] for entry in tasks])

    # parameters on ViT-B/16 by the paper's formulas, on average over the tasks
    tt, tk = ranks("fact_tt"), ranks("fact_tk")
    assert np.mean(2 * 768 * tt + 144 * tt**2) == pytest.approx(39_734, abs=0.5)
    assert np.mean(2 * 768 * tk + 144 * tk + tk**3) == pytest.approx(68_985, abs=0.5)


def test_a_configuration_without_recipe_has_the_default_grid(tmp_path):
    path = Path(write_config(tmp_path))
    assert find_recipe(path).source == "two rates"
    (tmp_path / "recipes/vtab_small.yaml").unlink()
    assert find_recipe(path).grid == {"model.optimisation.lr": [5e-4, 1e-3, 2e-3, 5e-3, 1e-2]}
    with pytest.raises(ConfigurationError, match=r"no paper's rule is known for vtab_small\.yaml"):
        paper_recipe(path)
    (tmp_path / "recipes/vtab_small.yaml").write_text("source: mine\ngrit: {}\n")
    with pytest.raises(ConfigurationError, match="is not a recipe"):
        find_recipe(path)


def test_learning_rates_of_the_command_line_are_the_whole_grid(tmp_path, capsys):
    """Of a recipe with other options, too, so that all methods have as many trials."""
    recipe = "source: both\ngrid: {model.optimisation.lr: [1.0e-3], model.optimisation.weight_decay: [0, 1]}"
    (candidate,) = method_candidates([write_config(tmp_path, recipe=recipe)], "vtab_", ["VTAB1k"])
    assert len(Benchmark("vtab1k").grid(candidate, "dsprites_ori")) == 2
    rates = Benchmark("vtab1k", learning_rates=(2e-3, 0.5))
    assert rates.grid(candidate, "dsprites_ori") == {"model.optimisation.lr": [2e-3, 0.5]}
    (found,) = run(tmp_path / "out", candidate.config, more=["--learning_rates", "0.5", "2e-3"])
    assert {path.parent.name for path in (tmp_path / "out").glob("search/*/*/score.json")} == {"lr-0.5", "lr-0.002"}
    assert found["chosen_by"] == "learning rates of the command line, 2 trials"
    assert run(tmp_path / "out", candidate.config, code=2) is None
    assert "was made with learning_rates [0.5, 0.002], not None" in capsys.readouterr().err


def test_the_same_learning_rates_are_of_one_optimiser(tmp_path, capsys):
    """The recipes of VPT have SGD with rates up to 50, in which a rate of AdamW trains nothing."""
    recipe = "source: sgd\nsettings: {model.optimisation.optimizer: sgd, model.optimisation.scale_lr_by_batch: 256}"
    slow = write_config(tmp_path / "a", recipe=f"{recipe}\ngrid: {{model.optimisation.lr: [5.0]}}", name="slow")
    quick = write_config(tmp_path / "b", name="quick")
    both, rates = [slow, quick], ["--learning_rates", "1e-3"]
    assert run(tmp_path / "out", *both, code=2, more=rates) is None
    assert "train slow with sgd, times batch size / 256 and quick with adamw; add --model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    one = ["--model.optimisation.optimizer", "adamw", "--model.optimisation.scale_lr_by_batch", "null"]
    assert len(run(tmp_path / "out", *both, more=[*rates, *one])) == 2
    run(tmp_path / "apart", slow, more=rates)
    assert run(tmp_path / "apart", quick, code=2, more=rates) is None
    assert "was made with optimiser sgd, times batch size / 256, not adamw" in capsys.readouterr().err


def test_best_trial():
    low, high = ({"model.optimisation.lr": lr} for lr in (0.1, 5.0))
    assert best([(high, 0.5), (low, 0.5), (high, 0.4)]) == (low, 0.5)  # of equal ones the smaller rate
    assert best([(low, 0.5), (high, 0.6)]) == (high, 0.6)
    assert best([(low, 0.1), (high, -1.0)]) == (low, 0.1)
    with pytest.raises(ConfigurationError, match="all 2 trials diverged"):
        best([(low, -1.0), (high, -1.0)])


def test_what_a_paper_leaves_open_is_not_said_to_be_its_choice(tmp_path):
    def by(name, **options):
        benchmark = Benchmark("vtab1k", None, **options)
        return choose(benchmark, MethodCandidate(name, f"vtab_{name}.yaml", ""), "svhn", 1, 1, tmp_path).by

    assert by("ssf", paper=True) == "the paper"
    assert by("vpt", paper=True, search="none") == by("vpt", search="none") == "not searched: as configured"


def test_methods_by_name():
    assert configs_of_methods(["VPT", "vpt_shallow"], "vtab_") == ["vtab_vpt.yaml", "vtab_vpt_shallow.yaml"]
    assert configs_of_methods(["LoRA", "FullFineTuning"], "fgvc_") == ["fgvc_lora.yaml", "fgvc_full.yaml"]
    assert {*configs_of_methods(["all"], "vtab_")} == {*shipped_configs("vtab_")} | VTAB_BY_DEFAULT
    with pytest.raises(ConfigurationError, match="did you mean sora or lora"):
        configs_of_methods(["Lorra"], "vtab_")


# Tables

# VPT-deep and full fine-tuning on VTAB-1k (Jia et al. 2022), in the order of the tasks; mean of the groups as printed
# there, mean over the tasks as papers after it cite them.
NATURAL = {"vpt": [78.8, 90.8, 65.8, 98.0, 88.3, 78.1, 49.6], "full": [68.9, 87.7, 64.3, 97.2, 86.9, 87.4, 38.8]}
SPECIALIZED = {"vpt": [81.8, 96.1, 83.4, 68.4], "full": [79.7, 95.7, 84.2, 73.9]}
STRUCTURED = {
    "vpt": [68.5, 60.0, 46.5, 72.8, 73.6, 47.9, 32.9, 37.8],
    "full": [56.3, 58.6, 41.7, 65.5, 57.5, 46.7, 25.7, 29.1],
}
MEANS = {"vpt": (71.96, 69.43), "full": (68.96, 65.57)}


def row(method, task, top1, seed=1, group="", rule="last epoch", **more):
    return {
        "protocol": "vtab1k",
        "method": method,
        "task": task,
        "group": group,
        "seed": seed,
        "top1": top1,
        "rule": rule,
        "chosen_by": "nobody",
        "adapter_parameters": 1234567,
        "saved_bytes_per_image": 2**20,
        "test_images": 10,
        "of_test_images": 10,
        "checkpoint": "a",
        "input_size": "[8, 8]",
        "normalisation": "pretrained",
        "mean": "[0.5]",
        "std": "[0.5]",
        "data": "VTAB-1k",
        **more,
    }


def test_both_means_are_those_of_the_paper():
    order = "cifar caltech101 dtd oxford_flowers102 oxford_iiit_pet svhn sun397 patch_camelyon eurosat resisc45"
    order += " diabetic_retinopathy clevr_count clevr_dist dmlab kitti dsprites_loc dsprites_ori"
    order += " smallnorb_azi smallnorb_ele"
    tasks = vtab1k_tasks()
    rows = [
        row(method, task, score / 100, group=tasks[task]["group"])
        for method in MEANS
        for task, score in zip(
            order.split(), [*NATURAL[method], *SPECIALIZED[method], *STRUCTURED[method]], strict=True
        )
    ]
    frame = method_table(rows).frame.set_index("method")
    for method, (of_groups, of_tasks) in MEANS.items():
        assert frame.loc[method, "mean of groups mean"] == pytest.approx(of_groups, abs=0.02)  # of rounded scores
        assert frame.loc[method, "mean of tasks mean"] == pytest.approx(of_tasks, abs=0.02)
        assert np.isnan(frame.loc[method, "mean of tasks std"])  # of one seed


def test_deviation_is_that_of_the_means_of_each_seed():
    scores = {("a", 1): 0.2, ("b", 1): 0.4, ("a", 2): 0.4, ("b", 2): 0.2, ("a", 3): 0.6, ("b", 3): 0.6}
    rows = [row("it", task, top1, seed=seed, group=task) for (task, seed), top1 in scores.items()]
    line = method_table(rows).frame.iloc[0]
    assert line["mean of tasks mean"] == pytest.approx(40)  # seed means 30, 30, 60
    assert line["mean of tasks std"] == pytest.approx(np.sqrt(200))
    assert line["a std"] == pytest.approx(100 * np.std([0.2, 0.4, 0.6]))
    assert line["seeds"] == "1, 2, 3"


def test_no_mean_where_a_task_or_a_seed_is_missing():
    rows = [row("whole", task, 0.5, seed=seed) for task in "ab" for seed in (1, 2)]
    rows += [row("part", "a", 0.9, seed=1), row("part", "a", 0.9, seed=2), row("part", "b", 0.9, seed=1)]
    frame = method_table(rows).frame.set_index("method")
    assert frame.loc["whole", "mean of tasks mean"] == 50
    assert np.isnan(frame.loc["part", "mean of tasks mean"])
    assert frame.loc["part", "a mean"] == pytest.approx(90)
    assert "mean of groups mean" not in frame


def test_rules_are_never_averaged():
    rows = [row("it", "a", 0.5), row("it", "a", 0.9, seed=2, rule="best test epoch")]
    assert [(line["rule"], line["a mean"]) for line in method_table(rows).frame.to_dict("records")] == [
        ("last epoch", 50),
        ("best test epoch", 90),
    ]


def test_subsets_are_told():
    title = method_table([row("it", "a", 0.5, test_images=10, of_test_images=5000)]).title
    assert "tested on fixed random subsets: a 10 of 5,000" in title
    assert "fixed random subsets" not in method_table([row("it", "a", 0.5)]).title


# Whole tables


def run(folder, *configs, tasks=("dsprites_ori",), seeds=("1",), code=0, more=()):
    seeds = ["--seeds", *seeds] if seeds else []
    arguments = ["vtab1k", "--configs", *configs, "--tasks", *tasks, *seeds, "--output", str(folder), *more]
    assert protocol.main(arguments) == code
    return read_rows(folder) if code == 0 else None


def refuse(arguments):
    raise AssertionError(f"trained again: {arguments}")


def test_grid_on_the_embedded_tasks(tmp_path, monkeypatch, capsys):
    configs = [write_config(tmp_path / "configs"), write_config(tmp_path / "configs", "probe", "LinearProbe")]
    output = tmp_path / "out"
    tasks = ("dsprites_loc", "clipart")
    rows = run(output, *configs, tasks=tasks, seeds=("1", "2"))
    assert {(r["method"], r["task"], r["seed"]) for r in rows} == {
        (method, task, seed) for method in ("small", "probe") for task in tasks for seed in "12"
    }
    assert "tasks: dsprites_loc, clipart; 8 trials and 8 final trainings" in capsys.readouterr().out
    for r in rows:
        assert (r["chosen_by"], r["rule"]) == ("two rates, 2 trials", "last epoch")
        assert r["trained_on"] == {"clipart": "train+val", "dsprites_loc": "train800val200"}[r["task"]]
        assert (r["backbone"], r["checkpoint"]) == ("test_vit", "none: random weights")
        assert (r["normalisation"], r["mean"]) == ("pretrained", "[0.5, 0.5, 0.5]")
        assert (r["test_images"], r["of_test_images"]) == (
            "40",
            {"clipart": "1103", "dsprites_loc": "73728"}[r["task"]],
        )
        # what was chosen is what was best on validation, and what the final training used
        trials = output / f"search/{r['method']}-{r['task']}-seed-1"
        scores = {path.parent.name: json.loads(path.read_text())["val_top1"] for path in trials.glob("*/score.json")}
        assert scores.keys() == {"lr-0.001", "lr-0.01"}
        lr = json.loads(r["hyper_parameters"])["model.optimisation.lr"]
        assert scores[f"lr-{lr}"] == max(scores.values()) == float(r["val_top1"])
        config = yaml.safe_load((Path(r["run_directory"]) / "config.yaml").read_text())
        assert config["model"]["init_args"]["optimisation"]["lr"] == lr
        # trials leave no runs, and never saw the test split
        assert {path.name for path in trials.glob("*/*")} == {"cell.json", "lock", "score.json"}
        arguments = json.loads(next(trials.glob("*/cell.json")).read_text())["arguments"]
        assert arguments[arguments.index("--test") + 1] == "false"
    probe, small = ({r["method"]: r for r in rows}[name] for name in ("probe", "small"))
    assert probe["adapter_parameters"] == "0"
    assert float(probe["saved_bytes_per_image"]) < float(small["saved_bytes_per_image"])
    assert {path.name for path in output.iterdir() if path.is_file()} == {
        *("protocol.json", "results.csv", "table.csv", "table.md", "figure.png")
    }
    assert "clip art: clipart; structured: dsprites_loc" in (output / "table.md").read_text()

    with monkeypatch.context() as patch:
        patch.setattr(cells, "fit", refuse)
        assert run(output, *configs, tasks=tasks, seeds=("1", "2")) == rows
    # one method alone keeps the others in the table
    assert run(output, configs[0], tasks=tasks, seeds=("1",)) == rows
    assert run(output, configs[0], tasks=tasks, code=2, more=["--search", "none"]) is None
    assert "was made with search grid, not none" in capsys.readouterr().err


def test_paper_preset_selects_on_test_and_says_so(tmp_path):
    config = write_config(tmp_path / "configs")
    (paper,) = run(tmp_path / "paper", config, seeds=None, more=["--paper"])
    assert paper["seed"] == "7"
    assert paper["rule"] == "best test epoch: selected on the test split, as the paper did (preset of the paper)"
    assert paper["differs_from_paper"] == "it has no authors"
    history = read_history(Path(paper["run_directory"]) / "metrics.csv")
    seen = [epoch["val/top1"] for epoch in history]  # the test split, after each epoch
    assert len(seen) == 3
    assert float(paper["top1"]) == pytest.approx(max(seen))
    results = json.loads((Path(paper["run_directory"]) / "results.json").read_text())
    assert results["data"]["selected_on"] == "test"
    assert results["reported"].endswith("of 3, best on the test split")
    assert "best test epoch" in (tmp_path / "paper/table.md").read_text()
    honest = run(tmp_path / "honest", config, seeds=("7",))[0]
    assert honest["rule"] == "last epoch"


def test_costs_are_those_of_what_is_trained_and_the_table_has_their_means(tmp_path):
    """A paper may give each task a number of prompts of its own, and a grid may choose it."""
    tasks = ("dsprites_loc", "dsprites_ori")
    lengths = dict(zip(tasks, (1, 9), strict=True))
    paper = "source: mine\nseeds: [7]\npaper: {}\ntasks:\n"
    paper += "".join(f"  {task}: {{model.method.num_tokens: {length}}}\n" for task, length in lengths.items())
    config = write_config(tmp_path, "paper", method="VPT", recipe=paper, depth=2)
    rows = {row["task"]: row for row in run(tmp_path / "1", config, tasks=tasks, seeds=(), more=["--paper"])}
    depth, width = 2, 64  # of its backbone
    trained = {task: depth * width * length for task, length in lengths.items()}
    assert {task: int(row["adapter_parameters"]) for task, row in rows.items()} == trained
    kept = {task: float(row["saved_bytes_per_image"]) for task, row in rows.items()}
    assert kept["dsprites_ori"] > kept["dsprites_loc"]
    with (tmp_path / "1/table.csv").open(newline="") as file:
        (line,) = csv.DictReader(file)
    assert int(line["trained parameters"]) == depth * width * 5
    assert float(line["saved MiB per image"]) == pytest.approx(np.mean([*kept.values()]) / 2**20)
    assert "are means over the tasks" in (tmp_path / "1/table.md").read_text()

    grid = "source: mine\ngrid: {model.method.num_tokens: [9]}"
    config = write_config(tmp_path, "grid", method="VPT", recipe=grid, depth=2)
    rows = run(tmp_path / "2", config, tasks=tasks)
    assert [int(row["adapter_parameters"]) for row in rows] == [trained["dsprites_ori"]] * 2
    assert [float(row["saved_bytes_per_image"]) for row in rows] == pytest.approx([kept["dsprites_ori"]] * 2, rel=0.02)
    assert "are means over the tasks" not in (tmp_path / "2/table.md").read_text()


def test_a_trial_that_diverges_is_not_chosen(tmp_path):
    recipe = "source: two rates\ngrid: {model.optimisation.lr: [1.0e-3, 1.0e+30]}\n"
    (found,) = run(tmp_path / "out", write_config(tmp_path, recipe=recipe))
    assert json.loads(found["hyper_parameters"]) == {"model.optimisation.lr": 0.001}
    scores = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("search/*/*/score.json")]
    assert sorted("diverged" in score for score in scores) == [False, True]


def test_no_search_takes_the_configuration(tmp_path):
    (found,) = run(tmp_path / "out", write_config(tmp_path), more=["--search", "none"])
    assert (found["chosen_by"], found["val_top1"]) == ("not searched: as configured", "")
    assert not (tmp_path / "out/search").exists()


def test_optuna_goes_on_where_it_was_killed(tmp_path, monkeypatch):
    optuna = pytest.importorskip("optuna")
    config = write_config(tmp_path, recipe="source: a range\ngrid: {model.optimisation.lr: [1.0e-3, 2.0e-3, 1.0e-1]}\n")
    more = ["--search", "optuna", "--budget", "4"]
    (whole,) = run(tmp_path / "whole", config, more=more)
    assert whole["chosen_by"] == "Optuna, 4 trials in the ranges of the a range"
    fit, calls = cells.fit, []

    def killed(arguments):
        calls.append(arguments)
        if len(calls) in (1, 4):
            raise KeyboardInterrupt
        fit(arguments)

    with monkeypatch.context() as patch:
        patch.setattr(cells, "fit", killed)
        for _ in range(2):
            run(tmp_path / "parts", config, more=more, code=130)
        assert measured(run(tmp_path / "parts", config, more=more)) == measured([whole])
    trials = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*/search/*/optuna/trials.json"))]
    assert trials[0] == trials[1]
    rates = [values["model.optimisation.lr"] for values, _ in trials[0]]
    assert len(set(rates)) == 4
    assert all(1e-3 <= rate <= 1e-1 for rate in rates)
    (study,) = (tmp_path / "parts").glob("search/*/optuna/study.db")
    stored = optuna.load_study(study_name=None, storage=f"sqlite:///{study}")
    assert len(stored.get_trials(states=[optuna.trial.TrialState.COMPLETE])) == 4


def test_optuna_that_is_not_installed(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    run(tmp_path / "out", write_config(tmp_path), more=["--search", "optuna"], code=2)
    assert "pip install 'visionpeft[search]'" in capsys.readouterr().err


def test_data_of_a_root(tmp_path):
    """Published data are scored whole, whatever the configuration's `test_samples` says."""
    sizes = {"train800": 32, "val200": 16, "train800val200": 48, "test": 60}
    write_vtab_task(tmp_path / "data", "eurosat", 10, sizes)
    config = write_config(tmp_path)
    assert available("vtab1k", str(tmp_path / "data")) == ["eurosat"]
    arguments = ["vtab1k", "--configs", config, "--seeds", "1", "--root", str(tmp_path / "data"), "--search", "none"]
    assert protocol.main([*arguments, "--output", str(tmp_path / "out")]) == 0
    (found,) = read_rows(tmp_path / "out")
    assert (found["task"], found["group"], found["test_images"]) == ("eurosat", "specialized", "60")
    assert "train: 48 images found, 1,000 published" in found["data_notes"]


def test_fgvc(tmp_path):
    splits = {
        split: {f"{split}/{label}_{i}.png": label for label in (3, 5, 9) for i in range(count)}
        for split, count in (("train", 6), ("val", 3), ("test", 4))
    }
    write_fgvc(tmp_path / "data/CUB", "images", splits)
    config = Path(write_config(tmp_path))
    content = yaml.safe_load(config.read_text())
    content["data"] = {"class_path": "FGVC", "init_args": {"dataset": "cub", "root": "nowhere", "batch_size": 8}}
    config = config.with_name("fgvc_small.yaml")
    config.write_text(yaml.safe_dump(content))
    shutil.copy(tmp_path / "recipes/vtab_small.yaml", tmp_path / "recipes/fgvc_small.yaml")
    arguments = ["fgvc", "--configs", str(config), "--seeds", "1", "2", "--root", str(tmp_path / "data")]
    assert protocol.main([*arguments, "--output", str(tmp_path / "out")]) == 0
    rows = read_rows(tmp_path / "out")
    assert [(r["task"], r["trained_on"], r["test_images"]) for r in rows] == [("cub", "train+val", "12")] * 2
    table = (tmp_path / "out/table.md").read_text()
    assert table.startswith("FGVC, top-1 accuracy (%) on 1 task, mean")
    assert "mean of groups" not in table


def test_clip_art_of_a_final_training():
    whole, part = ClipArt(train_on="train+val"), ClipArt()
    assert {split: len(source) for split, source in whole.sources.items()} == {"train": 767, "test": 1103}
    assert set(whole.sources["train"].paths) == {
        path for split in ("train", "val") for path in part.sources[split].paths
    }
    assert (whole.description()["trained_on"], whole.description()["selected_on"]) == ("train+val", None)


# Work


def test_a_failure_does_not_stop_the_others(tmp_path):
    pieces = [Piece("a"), Piece("b", "b is wrong"), Piece("c")]
    with pytest.raises(ConfigurationError, match="b is wrong"):
        work.finish(pieces, tmp_path)
    assert [piece.name for piece in pieces if piece.done(tmp_path / piece.name)] == ["a", "c"]


def test_each_worker_sees_one_gpu_in_turn(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)

    def seen(number):
        with work._one_gpu(number):
            return os.environ.get("CUDA_VISIBLE_DEVICES")

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [seen(number) for number in range(4)] == ["0", "1", "2", "0"]
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert [seen(number) for number in range(3)] == ["5", "7", "5"]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5,7"


@pytest.mark.slow
def test_workers_share_the_pieces(tmp_path, capsys):
    pieces = [Piece(str(number)) for number in range(5)]
    pieces.insert(2, Piece("wrong", "it is wrong"))
    with pytest.raises(ConfigurationError, match="it is wrong"):
        work.finish(pieces, tmp_path, workers=2)
    assert [piece.name for piece in pieces if not piece.done(tmp_path / piece.name)] == ["wrong"]
    assert len(list((tmp_path / "workers").glob("*.log"))) == 2
    assert "5 of 6 finished" in capsys.readouterr().out
    by = {(tmp_path / str(number) / "done").read_text().split()[0] for number in range(5)}
    assert str(os.getpid()) not in by


@pytest.mark.parametrize(("address", "asked"), [(None, "local"), ("head:6379", "head:6379")])
def test_a_ray_cluster_that_does_not_answer(address, asked, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray", reason="Ray, an extra, is not installed")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address:
        monkeypatch.setenv("RAY_ADDRESS", address)

    def init(address, **options):
        raise ConnectionError(f"nobody at {address}\nmore")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ConfigurationError, match=rf"no Ray cluster answers at {asked} \(nobody at {asked}\)"):
        work.finish([Piece("a")], tmp_path, workers="ray")


def test_ray_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigurationError, match=r"visionpeft\[ray\]"):
        work.finish([Piece("a")], tmp_path, workers="ray")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--configs", "CONFIG", "--method", "VPT"], "not allowed with argument"),
        ([], "one of the arguments --configs --method is required; see python -m visionpeft.protocol vtab1k --help"),
        (["--configs", "fewshot_coop.yaml"], "compares methods of ImageClassification on VTAB1k"),
        (["--configs", "fgvc_lora.yaml"], "compares methods of ImageClassification on VTAB1k"),
        (["--configs", "CONFIG", "CONFIG"], "needs a name of its own"),
        (["--configs", "CONFIG", "--tasks", "dsprite_ori"], "did you mean dsprites_ori"),
        (["--configs", "CONFIG", "--tasks", "cifar"], "'cifar' needs root"),
        (["--configs", "CONFIG", "--tasks", "clipart", "ClipArt"], "each task may be named once"),
        (["--configs", "CONFIG", "--seeds", "1", "1"], "each seed may be named once"),
        (["--configs", "CONFIG", "--root", "nowhere"], "no task folder of vtab1k is in nowhere"),
        (["--configs", "CONFIG", "--data.train_on", "train800"], "use the protocol's splits"),
        (["--configs", "CONFIG", "--data.task", "cifar"], "use --tasks"),
        (["--configs", "CONFIG", "--data.init_args.task=cifar"], "--data.init_args.task is decided by the protocol"),
        (["--configs", "CONFIG", "--model.method", "SSF"], "--model.method is decided by the protocol; use --method"),
        (["--configs", "CONFIG", "--model.init_args.method=SSF"], "--model.init_args.method is decided by"),
        (["--method", "LoRA", "SSF", "--config", "vtab_vpt.yaml"], "vtab_vpt.yaml names a method, which would take"),
        (["--method", "LoRA", "SSF", "--config=vtab_krona.yaml"], "vtab_krona.yaml names a method, which would take"),
        (["--configs", "CONFIG", "--paper", "--search", "optuna"], "leave out --search optuna"),
        (["--configs", "CONFIG", "--paper", "--learning_rates", "1"], "not with --paper, which has the paper's"),
        (["--configs", "CONFIG", "--search", "none", "--learning_rates", "1"], "not with --search none, which leaves"),
        (["--configs", "CONFIG", "--learning_rates", "1", "0"], "different numbers above 0, but got [1.0, 0.0]"),
        (["--configs", "CONFIG", "--workers", "0"], "workers must be 1 or more processes"),
        (
            ["--configs", "CONFIG", "--workers", "two"],
            "workers must be 1 or more processes, or 'ray', not 'two'",
        ),
        (["--configs", "CONFIG", "--model.optimization.lr", "1"], "optimization"),
        (
            ["--configs", "CONFIG", "--trainer.limit_val_batches", "0"],
            "--trainer.limit_val_batches 0 leaves no epoch validated, by which a trial is judged",
        ),
        (["--method", "prefix_tuning", "--paper"], "no paper's rule is known for vtab_prefix_tuning.yaml"),
    ],
)
def test_bad_input_is_one_sentence(arguments, said, tmp_path, monkeypatch, capsys):
    config = write_config(tmp_path / "configs")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert protocol.main(["vtab1k", *(config if a == "CONFIG" else a for a in arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert error.count("\n") == 1
    assert not list((tmp_path / "here").iterdir())


def test_fgvc_without_a_root_is_refused(capsys):
    assert protocol.main(["fgvc", "--method", "LoRA"]) == 2
    assert "fgvc needs --root" in capsys.readouterr().err


def test_nothing_is_collected_from_what_has_not_finished(tmp_path):
    (tmp_path / "final/a").mkdir(parents=True)
    (tmp_path / "final/a/cell.json").write_text("{}")
    assert collect(tmp_path) == []
