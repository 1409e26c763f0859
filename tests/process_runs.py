"""Trainings in several processes and in one, and how far apart what came out is."""

import csv
import json

from forked import start_together, wait
from safetensors.torch import load_file

from visionpeft import fit


def only_run(folder):
    (run,) = (path for path in folder.iterdir() if path.is_dir())
    return run


def together(folder, given, processes=2, function=fit.main):
    """Train in several processes; returns the run directory."""
    options = ["--trainer.devices", str(processes), "--output", str(folder / "runs")]
    started = start_together(folder, function, [*given, *options], processes=processes)
    codes = [wait(child, 300) for child in started]
    assert codes == [0] * processes, "".join(path.read_text() for path in folder.glob("*.txt"))
    return only_run(folder / "runs")


def alone(folder, given):
    assert fit.main([*given, "--output", str(folder)]) == 0
    return only_run(folder)


def rows(run):
    """metrics.csv without what takes time."""
    with (run / "metrics.csv").open() as file:
        return [{key: float(value) for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


def tensors(run):
    (file,) = (path for path in run.glob("*/*.safetensors"))
    return load_file(file)


def results(run):
    return json.loads((run / "results.json").read_text())


def furthest(run, other):
    """The largest difference of losses, accuracies and weights of two runs, of large numbers the relative one."""
    assert len(rows(run)) == len(rows(other))
    numbers = [(a[key], b[key]) for a, b in zip(rows(run), rows(other), strict=True) for key in a]
    numbers += [(results(run)["test"][key], value) for key, value in results(other)["test"].items()]
    found = [abs(a - b) / max(1, abs(b)) for a, b in numbers]
    mine, others = tensors(run), tensors(other)
    assert mine.keys() == others.keys()
    return max([*found, *((mine[name].double() - others[name].double()).abs().max().item() for name in mine)])
