"""Learners on the embedded CLIP and the two embedded sets: few-shot, base to new, across sets, and at test time.

`nano_clip.distilled`, 16 shots, seeds 1, 2, 3, the last epoch of each configuration's recipe, nothing chosen on the
test split. By the protocols of the package, so that what was interrupted goes on, and several machines may share the
folder. What is finished goes into `results/embedded_clip.csv`, and of learners that are there nothing is trained.

    nice python benchmarks/embedded_clip.py --output runs/embedded_clip
    python benchmarks/embedded_clip.py --output runs/embedded_clip --write    # tables, and headers of configurations

A training of a learner takes from ten seconds to ten CPU minutes, and of ProVP, which has 100 epochs, 18; learners come
in the order of their cost.
"""

import argparse
import csv
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from measuring import filled, kept_rows, table

from visionpeft.protocols.learner_protocols import base_to_new, cross_dataset, few_shot
from visionpeft.protocols.tables import harmonic_mean

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/results.md"
KEPT = Path(__file__).parent / "results/embedded_clip.csv"
SETS = {"clipart": "clip art", "drawings": "drawings"}
SCORES = ["top1", "mean_per_class", "confidence", "ece"]
FIELDS = ["table", "configuration", "learner", "dataset", "seed", "classes", *SCORES]
WORDS = {"tip_adapter_f": "TipAdapter, trained keys"}  # where the class alone does not say it
FEATURES = ["zero_shot", "tip_adapter", "tip_adapter_f", "linear_probe", "clip_adapter", "task_res", "lp_plus_plus"]
FEATURES += ["clap", "tda"]
TEXTS = ["coop", "kgcoop", "prograd", "tcp", "proda", "plot", "2sfs"]
TOWERS = [
    "clip_lora",
    "tuned_clip",
    "maple",
    "ivlp",
    "dept",
    "dapt",
    "promptsrc",
    "plot_plus_plus",
    "rpo",
    "cocoop",
    "provp",
]


@dataclass(frozen=True)
class Table:
    """Some learners by one protocol.

    Args:
        run: the protocol with its data sets and shots.
        folder: of the configurations.
        prefix: of their names.
        learners: the names without it.
        options: further arguments.
    """

    run: Callable[..., list[dict]]
    folder: str
    prefix: str
    learners: list[str]
    options: tuple[str, ...] = ()


# Those that take new class names, for which tuned_clip has no configurations.
NEW_NAMES = ["zero_shot", *TEXTS, *(name for name in TOWERS if name != "tuned_clip")]
TABLES = {
    "few_shot": Table(
        partial(few_shot, datasets=[*SETS], shots=[16]), "few_shot", "fewshot_", [*FEATURES, *TEXTS, *TOWERS]
    ),
    "base_to_new": Table(partial(base_to_new, datasets=[*SETS], shots=16), "base_to_new", "base_to_new_", NEW_NAMES),
    "test_time": Table(
        partial(few_shot, datasets=["clipart"], shots=[16]),
        "few_shot",
        "fewshot_",
        ["zero_shot", "tps", "mta", "zero", "tpt", "c_tpt"],
        ("--data.test_samples", "300"),
    ),
    "cross_dataset": Table(
        partial(cross_dataset, source="clipart", targets=["drawings"], shots=16),
        "cross_dataset",
        "cross_dataset_",
        NEW_NAMES,
    ),
}


def train(output: Path, name: str, learner: str) -> None:
    """Train and test what is missing of a learner, and keep its rows."""
    here = TABLES[name]
    arguments = [*here.options, "--trainer.accelerator", "cpu"]
    rows = here.run([f"{here.prefix}{learner}.yaml"], seeds=(1, 2, 3), output=output / name, arguments=arguments)
    new = not KEPT.is_file()
    with KEPT.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, extrasaction="ignore")
        if new:
            writer.writeheader()
        writer.writerows(row | {"table": name, "dataset": row["tested_on"]} for row in rows)


def kept(name: str, learner: str) -> list[dict]:
    """The rows of a learner that is done."""
    return kept_rows(KEPT, table=name, configuration=f"{TABLES[name].prefix}{learner}.yaml")


@dataclass(frozen=True)
class Score:
    """Mean and population standard deviation over the seeds, in percent."""

    mean: float
    deviation: float | None

    def __str__(self) -> str:
        return f"{self.mean:.1f}" + ("" if self.deviation is None else f" ± {self.deviation:.1f}")


def score(rows: list[dict], dataset: str, name: str = "top1", classes: str | None = None) -> Score:
    """Of some rows."""
    rows = [row for row in rows if row["dataset"] == dataset and classes in (None, row["classes"])]
    values = [100 * float(row[name]) for row in rows]
    return Score(statistics.mean(values), statistics.pstdev(values) if len(values) > 1 else None)


def base_and_new(rows: list[dict], dataset: str) -> tuple[Score, Score, Score]:
    """Scores of the base and of the new classes, and the harmonic mean of their means."""
    base, new = (score(rows, dataset, classes=classes) for classes in ("base", "new"))
    return base, new, Score(harmonic_mean(base.mean, new.mean), None)


def few_shot_line(rows: list[dict], told: str = "clipart") -> dict:
    """A line of the tables of all classes of a set.

    Args:
        rows: those of a learner.
        told: the data set of which more than the accuracy is told.
    """
    sets = {row["dataset"] for row in rows}
    line = {}
    for dataset in [key for key in SETS if key in sets]:
        line[SETS[dataset]] = score(rows, dataset)
        if dataset == told:
            line["mean per class"] = score(rows, dataset, "mean_per_class")
            line["confidence"] = score(rows, dataset, "confidence")
            line["calibration error"] = score(rows, dataset, "ece")
    return line


def base_to_new_line(rows: list[dict]) -> dict:
    """A line of the table of base and new classes."""
    return {
        f"{words}: {column}": value
        for dataset, words in SETS.items()
        for column, value in zip(("base", "new", "H"), base_and_new(rows, dataset), strict=True)
    }


def sentence(name: str, rows: list[dict]) -> str:
    """What the header of a configuration says."""
    seeds = "" if rows[0]["configuration"].endswith("zero_shot.yaml") else ", seeds 1, 2, 3"
    if name == "base_to_new":
        parts = [
            "{} base {}, new {}, H {}".format(words, *base_and_new(rows, dataset)) for dataset, words in SETS.items()
        ]
        return f"nano_clip.distilled{seeds}, %: {'; '.join(parts)}."
    if name == "cross_dataset":
        source, target = score(rows, "clipart"), score(rows, "drawings")
        return f"nano_clip.distilled{seeds}, %: clip art {source}, and from it on the drawings {target}."
    if name == "test_time":
        return f"nano_clip.distilled, 300 images of the clip art{seeds}: {score(rows, 'clipart')} %."
    parts = [f"{words} {score(rows, dataset)} %" for dataset, words in SETS.items()]
    return f"nano_clip.distilled{seeds}: {', '.join(parts)} (docs/results.md)."


def write(results: dict[str, dict[str, list[dict]]]) -> None:
    """The tables of the page and the headers of the configurations."""
    page = PAGE.read_text(encoding="utf-8")
    for name, some in results.items():
        page = filled(page, f"embedded_clip_{name}", lines(name, some))
        for learner, rows in some.items():
            if name != "test_time" or learner not in results["few_shot"]:
                write_header(ROOT / "configs" / TABLES[name].folder / f"{learner}.yaml", sentence(name, rows))
    PAGE.write_text(page, encoding="utf-8")


def lines(name: str, some: dict[str, list[dict]]) -> str:
    """A table, the best first."""
    line, column = few_shot_line, "clip art"
    if name == "base_to_new":
        line, column = base_to_new_line, "clip art: H"
    if name == "cross_dataset":
        line, column = partial(few_shot_line, told="drawings"), "drawings"
    found = [{"learner": WORDS.get(learner, rows[0]["learner"])} | line(rows) for learner, rows in some.items()]
    if not found:
        return "Nothing is measured yet."
    return table(sorted(found, key=lambda each: each[column].mean, reverse=True))


def write_header(path: Path, words: str) -> None:
    """Put what was measured in place of what stood below "Without a download"."""
    text = path.read_text(encoding="utf-8")
    before = re.compile(r"^#   (?:--model\.backbone )?nano_clip.*\n(?:#   \S.*\n)*", flags=re.MULTILINE)
    found, count = before.subn(f"#   {words}\n", text)
    if count != 1:
        raise SystemExit(f"{path} has {count} places for what was measured, not one")
    path.write_text(found, encoding="utf-8")


def main() -> None:
    """Train what is missing, or write what is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/embedded_clip"), help="folder of the protocols")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=[*TABLES], metavar="TABLE")
    parser.add_argument("--learners", nargs="+", metavar="LEARNER", help="names of configurations, without the prefix")
    parser.add_argument("--write", action="store_true", help="only write the tables and headers of what is done")
    options = parser.parse_args()
    if options.write:
        write(
            {
                name: {learner: rows for learner in here.learners if (rows := kept(name, learner))}
                for name, here in TABLES.items()
            }
        )
        return
    for name in options.tables:
        for learner in TABLES[name].learners:
            if (options.learners is None or learner in options.learners) and not kept(name, learner):
                train(options.output, name, learner)


if __name__ == "__main__":
    main()
