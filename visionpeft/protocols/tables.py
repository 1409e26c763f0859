"""Tables of a protocol: unrounded means and deviations, printed with two decimals.

A row is one measured accuracy: a dictionary with, at least, `learner`, `dataset` (trained on), `shots`, `seed`,
`tested_on`, `classes` ("all", "base" or "new"), `template` and `top1`, a share.
"""

from dataclasses import dataclass
from numbers import Integral
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table as RichTable

from visionpeft.files import write_whole

AVERAGE = "average"


@dataclass(frozen=True)
class Table:
    """Numbers in percent, with what has to be said about them.

    Args:
        title: what the numbers are.
        frame: one line for each data set and learner. Columns "<what> mean" and "<what> std" belong together.
    """

    title: str
    frame: pd.DataFrame


def harmonic_mean(base: float, new: float) -> float:
    """H = 2 base new / (base + new), 0 where both are 0."""
    return 2 * base * new / (base + new) if base + new else 0.0


def few_shot_table(rows: list[dict]) -> Table:
    """Accuracy for each data set, learner and number of shots; 0 shots are learners that use no training images.

    The average over data sets is taken for each seed, then its mean and deviation over the seeds.
    """
    scores = _percent(rows)
    shots = sorted(scores["shots"].unique())
    lines = []
    for dataset, learner, own in _groups(_with_average(scores, ["learner", "shots", "seed"])):
        line = {"dataset": dataset, "learner": learner, "template": _templates(own)}
        for number in shots:
            line |= mean_and_std(str(number), own[own["shots"] == number])
        lines.append(line)
    return Table(f"{_what(rows)} for each number of shots", pd.DataFrame(lines))


def base_to_new_table(rows: list[dict]) -> Table:
    """Accuracy on the base classes, on the new classes, and the harmonic mean of the two seed averages.

    H of the average line is that of the two averages over data sets, not the average of the data sets' H.
    """
    scores = _percent(rows)
    lines = []
    for dataset, learner, own in _groups(_with_average(scores, ["learner", "classes", "seed"])):
        line = {"dataset": dataset, "learner": learner, "template": _templates(own)}
        for classes in ("base", "new"):
            line |= mean_and_std(classes, own[own["classes"] == classes])
        lines.append(line | {"H": harmonic_mean(line["base mean"], line["new mean"])})
    return Table(
        f"{_what(rows)}; trained on the base classes{_shots(scores)}, base and new classes scored among themselves; "
        "H: harmonic mean",
        pd.DataFrame(lines),
    )


def transfer_table(rows: list[dict]) -> Table:
    """Accuracy on the source and on each target, and the average over the targets."""
    scores = _percent(rows)
    (source,) = scores["dataset"].unique()
    targets = [name for name in scores["tested_on"].unique() if name != source]
    on_targets = scores[scores["tested_on"] != source]
    averages = on_targets.groupby(["learner", "seed"], sort=False, as_index=False)["score"].mean()
    lines = []
    for learner in scores["learner"].unique():
        own = scores[scores["learner"] == learner]
        line = {"learner": learner, "template": _templates(own)} | mean_and_std(source, own[own["tested_on"] == source])
        for target in targets:
            line |= mean_and_std(target, own[own["tested_on"] == target])
        lines.append(line | mean_and_std(f"{AVERAGE} of targets", averages[averages["learner"] == learner]))
    return Table(f"{_what(rows)}; trained on {source}{_shots(scores)}", pd.DataFrame(lines))


# Column of a row -> what it is called.
OF_PROBABILITIES = {
    "top1": "top-1",
    "mean_per_class": "mean per class",
    "confidence": "confidence",
    "ece": "ECE",
    "top1_without_adaptation": "top-1 without adaptation",
    "confidence_without_adaptation": "confidence without adaptation",
    "ece_without_adaptation": "ECE without adaptation",
}


def calibration_table(rows: list[dict]) -> Table:
    """Accuracy over images and over classes, mean confidence and calibration error of whatever was tested.

    Of learners that adapt while testing also what they would reach without. Values that no row has, as those written by
    an older version, have no column.
    """
    scores = pd.DataFrame(rows)
    known = {
        column: name for column, name in OF_PROBABILITIES.items() if column in scores and scores[column].notna().any()
    }
    lines = []
    keys = ["dataset", "tested_on", "classes", "learner", "shots"]
    for (dataset, tested_on, classes, learner, shots), own in scores.groupby(keys, sort=False):
        where = tested_on if classes == "all" else f"{tested_on}, {classes}"
        line = {"dataset": dataset, "tested on": where, "learner": learner, "shots": int(shots)}
        for column, name in known.items():
            line |= mean_and_std(name, own.assign(score=100 * own[column].astype(float)))
        lines.append(line)
    what = _what(rows).replace(
        "Top-1 accuracy (%)", "Accuracy, mean confidence and expected calibration error (ECE), in %,", 1
    )
    return Table(what, pd.DataFrame(lines))


def as_text(table: Table) -> pd.DataFrame:
    """The cells as they are printed: "mean ±std" with two decimals, empty where nothing was measured."""
    text = {}
    for name, column in table.frame.items():
        what, _, kind = str(name).rpartition(" ")
        if kind == "mean":
            deviations = table.frame[f"{what} std"]
            text[what] = [_number(mean, std) for mean, std in zip(column, deviations, strict=True)]
        elif kind != "std":
            text[name] = [_cell(value) for value in column]
    return pd.DataFrame(text)


def _cell(value: object) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, Integral) else _number(value)


def write_table(table: Table, folder: Path, name: str = "table") -> None:
    """Write `<name>.csv`, unrounded, and `<name>.md`."""
    text = as_text(table)
    lines = [list(text.columns), ["---"] * len(text.columns), *text.to_numpy().tolist()]
    cells = [" | ".join(str(cell).replace("|", r"\|") for cell in line) for line in lines]
    markdown = "\n".join([f"{table.title}.", "", *(f"| {line} |" for line in cells)])
    write_whole(folder / f"{name}.md", f"{markdown}\n".encode())
    write_whole(folder / f"{name}.csv", table.frame.to_csv(index=False).encode())


def write_rows(rows: list[dict], path: Path) -> None:
    """Write the rows as CSV, unrounded."""
    write_whole(path, pd.DataFrame(rows).to_csv(index=False).encode())


def print_table(table: Table) -> None:
    """Print it in the terminal, the templates below it."""
    text = as_text(table)
    templates = text.pop("template") if "template" in text else [""] * len(text)
    shown = RichTable()
    for name in text.columns:
        names = name in ("dataset", "tested on", "learner", "method")
        shown.add_column(name, no_wrap=names, justify="left" if names else "right")
    group = text.iloc[:, 0]
    for line, ends in zip(text.to_numpy().tolist(), group != group.shift(-1), strict=True):
        shown.add_row(*line, end_section="dataset" in text and ends)
    console = Console()
    console.print(f"{table.title}.", highlight=False)
    console.print(shown, highlight=False)
    for line, template in zip(text.to_dict("records"), templates, strict=True):
        if template:
            where = f" on {line['dataset']}" if "dataset" in line else ""
            console.print(f"template of {line['learner']}{where}: {template}", highlight=False, markup=False)


def _percent(rows: list[dict]) -> pd.DataFrame:
    scores = pd.DataFrame(rows)
    return scores.assign(score=100 * scores["top1"])


def _with_average(scores: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """The scores, followed by their averages over data sets where there are several."""
    if scores["dataset"].nunique() < 2:
        return scores
    averages = scores.groupby(keys, sort=False, as_index=False)["score"].mean().assign(dataset=AVERAGE)
    return pd.concat([scores, averages], ignore_index=True)


def _groups(scores: pd.DataFrame):
    for (dataset, learner), own in scores.groupby(["dataset", "learner"], sort=False):
        yield dataset, learner, own


def mean_and_std(name: str, scores: pd.DataFrame) -> dict[str, float]:
    """Columns "<name> mean" and "<name> std" of the column `score`."""
    values = scores["score"]
    # One value has no deviation; 0 would look like a measured one.
    return {f"{name} mean": values.mean(), f"{name} std": values.std(ddof=0) if len(values) > 1 else float("nan")}


def _number(mean: float, std: float = float("nan")) -> str:
    if pd.isna(mean):
        return ""
    return f"{mean:.2f}" if pd.isna(std) else f"{mean:.2f} ±{std:.2f}"


def _templates(scores: pd.DataFrame) -> str:
    """The template, or where there are several, each with the data sets it was used on."""
    used: dict[str, list[str]] = {}
    for template, dataset in zip(scores["template"], scores["tested_on"], strict=True):
        if isinstance(template, str) and template and dataset not in used.setdefault(template, []):
            used[template].append(dataset)
    if len(used) < 2:
        return "".join(used)
    return "; ".join(f"{template} ({', '.join(datasets)})" for template, datasets in used.items())


def _what(rows: list[dict]) -> str:
    seeds = sorted({row["seed"] for row in rows})
    over = ", ".join(map(str, seeds))
    if len(seeds) == 1:
        return f"Top-1 accuracy (%){_subsets(rows)} after the last epoch, seed {over}"
    return (
        f"Top-1 accuracy (%){_subsets(rows)} after the last epoch, mean and population standard deviation over seeds "
        f"{over}"
    )


def _subsets(rows: list[dict]) -> str:
    """What was tested on fewer images than the test split has; rows of older versions do not say of how many."""
    found = {}
    for row in rows:
        if row.get("of_test_images", 0) > row.get("test_images", 0):
            where = row["tested_on"] if row["classes"] == "all" else f"{row['tested_on']} {row['classes']}"
            found[where] = f"{where} {row['test_images']:,} of {row['of_test_images']:,}"
    return f" on fixed random subsets ({', '.join(found.values())} images)" if found else ""


def _shots(scores: pd.DataFrame) -> str:
    numbers = [number for number in scores["shots"].unique() if number]
    return f" with {numbers[0]} shot{'' if numbers[0] == 1 else 's'}" if len(numbers) == 1 else ""
