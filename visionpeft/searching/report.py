"""What a search leaves behind: trials, fronts, table and figure."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from rich.console import Console

from visionpeft.protocols.tables import Table, mean_and_std, print_table, write_rows, write_table
from visionpeft.searching.front import on_front
from visionpeft.searching.plan import FOUND, Judged

# Cost -> its column in a table, its label in the figure, and how many of its unit a unit of the column is.
COSTS = {
    "parameters": ("trained parameters", "trained parameters without the head", 1),
    "saved_bytes": ("kept MiB an image", "MiB kept for the backward pass, for each image", 2**20),
    "step_forwards": ("step, forwards", "time of a step, in forwards of the frozen backbone", 1),
}
REPORT_FILES = ("results.csv", "trials.csv", "front.csv", "front.md", "table.csv", "table.md", "figure.png")


def report(space: str, judged: Sequence[Judged], rows: Sequence[dict], folder: Path) -> None:
    """Write and print what was found.

    `trials.csv` has all trials, `front.md` those on a front, `table.md` the final trainings, `results.csv` a line for
    each of them, `figure.png` accuracy on validation against each cost.

    Args:
        space: its name.
        judged: all trials.
        rows: one for each final training.
        folder: where to write.
    """
    trials = trial_frame(judged)
    table, front = found_table(rows), front_table(space, trials)
    write_rows(list(rows), folder / "results.csv")
    write_rows(trials.to_dict("records"), folder / "trials.csv")
    write_table(front, folder, "front")
    write_table(table, folder)
    draw_fronts(trials, folder / "figure.png")
    for line in front_lines(front):
        Console().print(line, highlight=False, soft_wrap=True)
    print_table(table)
    for sentence in verdicts(table):
        Console().print(sentence, highlight=False, soft_wrap=True)
    print(f"{', '.join(REPORT_FILES[:-1])} and {REPORT_FILES[-1]} are in {folder}")


def trial_frame(judged: Sequence[Judged]) -> pd.DataFrame:
    """A line for each trial, and for each cost whether it is on the front of accuracy and that cost.

    `front of all` is the front of accuracy and all three costs. Trials that diverged are on none.
    """
    frames = []
    for task in dict.fromkeys(each.task for each in judged):
        own = [each for each in judged if each.task == task and each.val_top1 >= 0]
        frame = pd.DataFrame(
            [{"task": task, "member": each.text, "val_top1": each.val_top1, **each.costs} for each in own]
        )
        for cost in COSTS:
            frame[f"front of {cost}"] = on_front([[-each.val_top1, each.costs[cost]] for each in own])
        frame["front of all"] = on_front([[-each.val_top1, *(each.costs[cost] for cost in COSTS)] for each in own])
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def front_table(space: str, trials: pd.DataFrame) -> Table:
    """The trials on the front of accuracy and at least one cost, by accuracy."""
    lines = []
    for task, own in trials.groupby("task", sort=False):
        for line in own.sort_values("val_top1", ascending=False, kind="stable").to_dict("records"):
            fronts = [COSTS[cost][0] for cost in COSTS if line[f"front of {cost}"]]
            if fronts:
                costs = {COSTS[cost][0]: _in_unit(line[cost], cost) for cost in COSTS}
                accuracy = {"validation top-1 mean": 100 * line["val_top1"], "validation top-1 std": float("nan")}
                lines.append(
                    {"dataset": task, "member": line["member"], **costs, **accuracy, "front of": ", ".join(fronts)}
                )
    counts = ", ".join(f"{task} {len(own)}" for task, own in trials.groupby("task", sort=False))
    title = f"Space {space}: no trial is more accurate (%, on validation) and cheaper; trials: {counts}"
    return Table(title, pd.DataFrame(lines))


def front_lines(front: Table) -> list[str]:
    """The front in lines for a terminal, as members are long."""
    lines = [f"{front.title}."]
    for line in front.frame.to_dict("records"):
        costs = (
            f"{line['trained parameters']:,} parameters, {line['kept MiB an image']:.2f} MiB an image, "
            f"{line['step, forwards']:.2f} forwards a step"
        )
        accuracy = line["validation top-1 mean"]
        lines.append(f"{line['dataset']}: {accuracy:.2f} %, {costs} (front of {line['front of']}): {line['member']}")
    return lines


def found_table(rows: Sequence[dict]) -> Table:
    """What was found and the methods it is compared with, on test, mean and population deviation over the seeds."""
    frame = pd.DataFrame(rows)
    frame = frame.assign(score=100 * frame["top1"], alone=~frame["method"].str.endswith(FOUND))
    frame = frame.sort_values(["task", "alone", "method"], kind="stable")
    lines = []
    for (task, method), own in frame.groupby(["task", "method"], sort=False):
        first = own.iloc[0]
        lines.append(
            {
                "dataset": task,
                "method": method,
                "steps": _steps(first),
                "trained parameters": round(own["adapter_parameters"].mean()),  # some are found anew for each seed
                "kept MiB an image": first["saved_bytes_per_image"] / 2**20,
                "step, forwards": float(first["step_forwards"]),
                **mean_and_std("test top-1", own),
            }
        )
    seeds = ", ".join(map(str, sorted(frame["seed"].unique())))
    title = f"Top-1 accuracy (%) on test after the last epoch, mean and population standard deviation, seeds {seeds}"
    return Table(title, pd.DataFrame(lines))


def verdicts(table: Table) -> list[str]:
    """For each task whether what was found is above the best single method by more than one deviation."""
    sentences = []
    for task, own in table.frame.groupby("dataset", sort=False):
        found, single = (own[own["method"].str.endswith(FOUND) == each] for each in (True, False))
        if not len(single):
            continue
        best = single.loc[single["test top-1 mean"].idxmax()]
        found = found.iloc[0]
        gain = found["test top-1 mean"] - best["test top-1 mean"]
        deviation = max(found["test top-1 std"], best["test top-1 std"])
        if pd.isna(deviation):
            sentences.append(f"{task}: one seed has no deviation to compare {found['method']} and {best['method']} by")
            continue
        is_above = "above" if gain > deviation else "not above"
        sentences.append(
            f"{task}: {found['method']} is {is_above} the best single method, {best['method']}, by more than one "
            f"deviation ({gain:+.2f} points, deviation {deviation:.2f})"
        )
    return sentences


def draw_fronts(trials: pd.DataFrame, path: Path) -> None:
    """A row for each task, a panel for each cost: all trials, and the front as steps.

    Args:
        trials: a `trial_frame`.
        path: the PNG.
    """
    tasks = list(dict.fromkeys(trials["task"]))
    figure = Figure(figsize=(13, 3.8 * len(tasks)), layout="constrained")
    panels = figure.subplots(len(tasks), len(COSTS), squeeze=False)
    for task, row in zip(tasks, panels, strict=True):
        own = trials[trials["task"] == task]
        for axes, (cost, (_, label, unit)) in zip(row, COSTS.items(), strict=True):
            accuracy, costs = 100 * own["val_top1"], own[cost] / unit
            axes.plot(costs, accuracy, "o", color="0.7", markersize=4, label="trial")
            front = own[own[f"front of {cost}"]].sort_values([cost, "val_top1"])
            axes.step(front[cost] / unit, 100 * front["val_top1"], "o-", where="post", color="C0", label="front")
            axes.set(xlabel=label, ylabel="top-1 on validation (%)", title=task)
            axes.grid(alpha=0.3)
    panels[0][0].legend(frameon=False)
    figure.savefig(path, dpi=110)


def _in_unit(value: float, cost: str) -> int | float:
    return int(value) if cost == "parameters" else value / COSTS[cost][2]


def _steps(row: pd.Series) -> str:
    own = f"{round(row['steps']):,}"
    return f"{round(row['search_steps']):,} + {own}" if row["search_steps"] else own
