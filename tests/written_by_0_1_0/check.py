"""Load every fixture with the visionpeft that can be imported now, and compare with what the old commit computed.

python check.py [--skip-videos]     from any folder; nothing in this folder is changed. One line for each check, exit
code 1 if one fails. In pytest: parametrise over `CHECKS`.
"""

import csv
import importlib
import json
import os
import shutil
import sys
import tempfile
import traceback
from contextlib import chdir
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.dont_write_bytecode = True
FOLDER = Path(__file__).parent.resolve()
sys.path.insert(0, str(FOLDER))

import fixture_backbones
import numpy as np
import torch
from fixture_backbones import CLASS_NAMES, build_clip, build_vit, clip_outputs

import visionpeft as vp

TOLERANCE = 1e-5
ADAPTERS = sorted(path.name for path in (FOLDER / "adapters").iterdir())
LEARNERS = sorted(path.name for path in (FOLDER / "learners").iterdir())
FINISHED = ["image_finished", "learner_finished", "video_finished"]
CONFIGS = {
    "config_dotted": "image_finished",
    "config_dotted_few_shot": "learner_finished",
    "config_dotted_video": "video_finished",
}
PROTOCOLS = {
    "vtab1k": "--configs vtab_small.yaml --tasks dsprites_ori --seeds 7",
    "few_shot": "--configs fewshot_small.yaml --datasets drawings --shots 1 --seeds 1 2",
}


def expected(folder):
    arrays = np.load(folder / "expected.npz")
    images = torch.from_numpy(arrays["images"].astype(np.float32))
    return images, {key: torch.from_numpy(arrays[key]) for key in arrays.files if key != "images"}


def compare(actual, wanted, what):
    assert actual.shape == wanted.shape, f"{what}: {tuple(actual.shape)}, not {tuple(wanted.shape)}"
    distance = (actual.float() - wanted).abs().max().item()
    assert distance <= TOLERANCE, f"{what}: differs by {distance:.1e}"


def compare_numbers(actual, wanted, what):
    """Numbers of two results, whatever keys have been added since."""
    for key, value in wanted.items():
        if isinstance(value, int | float):
            assert abs(actual[key] - value) <= 1e-4 * max(1, abs(value)), f"{what} {key}: {actual[key]}, not {value}"


def command(name, *arguments):
    """A command of the package, in this process and the working directory."""
    given = [*arguments, "--figures", "false"] if name == "fit" else arguments  # of which nothing is read again
    code = importlib.import_module(f"visionpeft.{name}").main([str(each) for each in given])
    assert code == 0, f"visionpeft.{name} ended with {code}"


def read(path):
    return json.loads(Path(path).read_text())


def history(run):
    with (Path(run) / "metrics.csv").open(newline="") as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


def compare_history(actual, wanted):
    assert len(actual) == len(wanted), f"{len(actual)} epochs, not {len(wanted)}"
    for left, right in zip(actual, wanted, strict=True):
        numbers = [{key: float(value) for key, value in row.items() if value} for row in (left, right)]
        compare_numbers(*numbers, f"epoch {right['epoch']}")


def check_adapter(name, work):
    folder = FOLDER / "adapters" / name
    builder = fixture_backbones.recipe(folder)["backbone"].removeprefix("fixture_backbones.").removesuffix("()")
    model = getattr(fixture_backbones, builder)()
    clip = isinstance(model, tuple)
    model = model[0] if clip else model
    images, wanted = expected(folder)
    assert vp.read_metadata(folder)["metadata"] == {"note": "fixture"}
    vp.load(model, folder)
    model.eval()
    with torch.no_grad():
        compare(clip_outputs(model, images, wanted["tokens"]) if clip else model(images), wanted["logits"], name)
    # what is written now can be read again
    vp.save(model, work / "again", class_names=vp.read_metadata(folder)["class_names"])
    fresh = getattr(fixture_backbones, builder)()
    fresh = fresh[0] if clip else fresh
    vp.load(fresh, work / "again")
    fresh.eval()
    with torch.no_grad():
        compare(clip_outputs(fresh, images, wanted["tokens"]) if clip else fresh(images), wanted["logits"], "again")


def check_learner(name, work):
    folder = FOLDER / "learners" / name
    images, wanted = expected(folder)
    assert vp.read_learner(folder)["class_names"] == CLASS_NAMES
    learner = vp.load_learner(folder, *build_clip())
    with torch.no_grad():
        compare(learner(images), wanted["logits"], name)
        if "logits_of_wren_heron" in wanted:
            other = vp.load_learner(folder, *build_clip(), class_names=["wren", "heron"])
            compare(other(images), wanted["logits_of_wren_heron"], f"{name} with other classes")
    vp.save_learner(learner, work / "again")
    with torch.no_grad():
        compare(vp.load_learner(work / "again", *build_clip())(images), wanted["logits"], "again")


def check_peft(name, work):
    folder, model = FOLDER / name, build_vit()
    images, wanted = expected(folder)
    vp.import_peft(model, folder)
    model.eval()
    with torch.no_grad():
        compare(model(images), wanted["logits"], name)
    vp.export_peft(model, work / "again")
    assert read(work / "again" / "adapter_config.json").keys() >= read(folder / "adapter_config.json").keys()


def check_evaluate(name, work):
    """An old finished run is opened again and tested."""
    run = shutil.copytree(FOLDER / "runs" / name, work / name)
    command("evaluate", run)
    compare_numbers(read(run / "evaluation.json")["test"], read(run / "results.json")["test"], name)


def check_resume_finished(name, work):
    """Resuming a finished run changes nothing."""
    run = shutil.copytree(FOLDER / "runs" / name, work / name)
    command("fit", "--resume", run)
    compare_numbers(read(run / "results.json")["test"], read(FOLDER / "runs" / name / "results.json")["test"], name)
    compare_history(history(run), history(FOLDER / "runs" / name))


def check_resume_interrupted(name, work):
    """Resumed, an interrupted run becomes what the uninterrupted one is."""
    run, whole = shutil.copytree(FOLDER / "runs" / name, work / name), FOLDER / "expected_after_resume"
    assert len(history(run)) == 2
    command("fit", "--resume", run)
    compare_history(history(run), history(whole))
    compare_numbers(read(run / "results.json")["test"], read(whole / "results.json")["test"], name)
    assert read(run / "results.json")["reported"] == read(whole / "results.json")["reported"]


def check_predict(name, work):
    """Files are classified by an old run."""
    from PIL import Image

    run = shutil.copytree(FOLDER / "runs" / name, work / name)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(work / "image.png")
    command("predict", run, work / "image.png", "--output", work / "predictions.json")
    assert len(read(work / "predictions.json")[0]["classes"]) == 5


# What a configuration must say of an option that has come since, whose default is not what was done before.
SINCE_THEN = dict.fromkeys(("config_dotted_video", "video_finished"), ("--model.method.norm_of_mean", "false"))


def check_config(name, work):
    """A configuration of old class paths trains as it did."""
    command("fit", "--config", FOLDER / f"{name}.yaml", "--output", "runs", *SINCE_THEN.get(name, ()))
    (run,) = (work / "runs").iterdir()
    old = FOLDER / "runs" / CONFIGS[name]
    compare_history(history(run), history(old))
    compare_numbers(read(run / "results.json")["test"], read(old / "results.json")["test"], name)


def check_config_of_run(name, work):
    """The configuration that an old run wrote is one with which to train again."""
    command("fit", "--config", FOLDER / "runs" / name / "config.yaml", *SINCE_THEN.get(name, ()))
    (run,) = (work / "runs").iterdir()
    compare_history(history(run), history(FOLDER / "runs" / name))


def check_protocol(name, work):
    """The old command, given again in an old folder, trains nothing and collects the same rows."""
    folder = shutil.copytree(FOLDER / "protocol", work / "protocol")
    trained = {path: path.read_bytes() for path in (folder / name).rglob("results.json")}
    assert trained
    rows = (folder / name / "results.csv").read_text()
    for file in ("results.csv", "table.csv", "table.md"):
        (folder / name / file).unlink()
    with chdir(folder):
        command("protocol", name, *PROTOCOLS[name].split(), "--output", name)
    assert {path: path.read_bytes() for path in (folder / name).rglob("results.json")} == trained, "it trained again"
    made = list(csv.DictReader((folder / name / "results.csv").read_text().splitlines()))
    for row, old in zip(made, csv.DictReader(rows.splitlines()), strict=True):
        assert {key: row[key] for key in old} == old, f"{row}, not {old}"
    old_table = (FOLDER / "protocol" / name / "table.csv").read_text()
    assert (folder / name / "table.csv").read_text() == old_table


CHECKS = [
    *((check_adapter, name) for name in ADAPTERS),
    *((check_learner, name) for name in LEARNERS),
    (check_peft, "peft_export"),
    *((check_evaluate, name) for name in FINISHED),
    (check_predict, "image_finished"),
    (check_predict, "learner_finished"),
    (check_resume_interrupted, "image_interrupted"),
    *((check_resume_finished, name) for name in FINISHED),
    *((check_config, name) for name in CONFIGS),
    *((check_config_of_run, name) for name in FINISHED),
    *((check_protocol, name) for name in PROTOCOLS),
]


def run_check(check, name):
    """One check in an empty working directory."""
    with tempfile.TemporaryDirectory() as work, chdir(work):
        check(name, Path(work).resolve())


if __name__ == "__main__":
    print(f"visionpeft in {Path(vp.__file__).parent}")
    failed = 0
    for check, name in CHECKS:
        if "video" in name and "--skip-videos" in sys.argv:
            continue
        try:
            run_check(check, name)
            print(f"ok      {check.__name__} {name}", file=sys.stderr, flush=True)
        except (Exception, SystemExit):
            failed += 1
            print(f"FAILED  {check.__name__} {name}\n{traceback.format_exc()}", file=sys.stderr, flush=True)
    print(f"{failed} of {len(CHECKS)} checks failed", file=sys.stderr)
    sys.exit(failed > 0)
