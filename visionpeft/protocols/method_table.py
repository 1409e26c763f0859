"""The table of VTAB-1k and FGVC: methods, what they cost, their accuracy on each task, and both means."""

import pandas as pd
from rich.console import Console
from rich.table import Table as RichTable

from visionpeft.protocols.tables import Table, as_text, mean_and_std

MEAN_OF_TASKS = "mean of tasks"
MEAN_OF_GROUPS = "mean of groups"


def method_table(rows: list[dict]) -> Table:
    """A line for each method and rule; means are taken for each seed, then mean and deviation over the seeds.

    The mean of the tasks weighs tasks alike; the mean of the groups is that of the group means. Both are left out for
    a method that lacks a task or, on a task, a seed. Trained parameters and memory are means over the tasks, too, as
    papers give them where the number of prompts or the rank is another on each task.

    Args:
        rows: one for each final training: `method`, `task`, `group`, `seed`, `top1`, a share, `rule`, `chosen_by`,
            `adapter_parameters`, `saved_bytes_per_image`, and what the data and the backbone were.
    """
    scores = pd.DataFrame(rows)
    scores = scores.assign(score=100 * scores["top1"])
    tasks = list(dict.fromkeys(scores["task"]))
    lines = []
    for (method, rule), own in scores.groupby(["method", "rule"], sort=False):
        line = {
            "method": method,
            "rule": rule,
            "chosen by": "; ".join(dict.fromkeys(own["chosen_by"])),
            "seeds": ", ".join(map(str, sorted(own["seed"].unique()))),
            "trained parameters": round(_over_tasks(own, "adapter_parameters")),
            "saved MiB per image": _over_tasks(own, "saved_bytes_per_image") / 2**20,
        }
        for task in tasks:
            line |= mean_and_std(task, own[own["task"] == task])
        line |= mean_and_std(MEAN_OF_TASKS, _whole(own, tasks, own.groupby("seed", as_index=False)["score"].mean()))
        if any(own["group"]):
            groups = own.groupby(["seed", "group"], as_index=False)["score"].mean()
            means = groups.groupby("seed", as_index=False)["score"].mean()
            line |= mean_and_std(MEAN_OF_GROUPS, _whole(own, tasks, means))
        lines.append(line)
    return Table(_title(scores, tasks), pd.DataFrame(lines))


def print_method_table(table: Table) -> None:
    """Print what fits a terminal: costs and means, and below them how the lines were trained and chosen."""
    text = as_text(table)
    means = [name for name in (MEAN_OF_TASKS, MEAN_OF_GROUPS) if name in text]
    shown = RichTable()
    for name in ("method", "trained parameters", "saved MiB per image", *means):
        shown.add_column(name, no_wrap=name == "method", justify="left" if name == "method" else "right")
    for line in text.to_dict("records"):
        shown.add_row(line["method"], line["trained parameters"], line["saved MiB per image"], *map(line.get, means))
    console = Console()
    console.print(f"{table.title}.", highlight=False)
    console.print(shown, highlight=False)
    for (rule, chosen, seeds), own in text.groupby(["rule", "chosen by", "seeds"], sort=False):
        how = f"{', '.join(own['method'])}: {rule}; hyper-parameters: {chosen}; seeds {seeds}"
        console.print(how, highlight=False, markup=False, soft_wrap=True)


def _whole(own: pd.DataFrame, tasks: list[str], means: pd.DataFrame) -> pd.DataFrame:
    """The means of all seeds, or none where a task is missing for one."""
    return means if len(own) == len(tasks) * own["seed"].nunique() else means.iloc[:0]


def _over_tasks(own: pd.DataFrame, column: str) -> float:
    """The mean over tasks, each of which counts once."""
    return float(own.groupby("task")[column].mean().mean())


def _title(scores: pd.DataFrame, tasks: list[str]) -> str:
    groups = scores.groupby("group", sort=False)["task"].unique()
    of_groups = "; ".join(f"{group}: {', '.join(names)}" for group, names in groups.items() if group)
    name = {"vtab1k": "VTAB-1k", "fgvc": "FGVC"}[scores["protocol"].iloc[0]]
    parts = [
        f"{name}, top-1 accuracy (%) on {len(tasks)} task{'' if len(tasks) == 1 else 's'}"
        + (f" ({of_groups})" if of_groups else "")
        + ", mean and population standard deviation over seeds",
        f"backbone {_all(scores['checkpoint'])} at {_all(scores['input_size'])}",
        f"normalisation {_all(scores['normalisation'])} (mean {_all(scores['mean'])}, std {_all(scores['std'])})",
        f"data {_all(scores['data'])}",
    ]
    costs = scores.groupby(["method", "rule"])[["adapter_parameters", "saved_bytes_per_image"]]
    if (costs.nunique() > 1).to_numpy().any():
        parts.append("trained parameters and saved MiB are means over the tasks")
    if (scores["test_images"] < scores["of_test_images"]).any():
        parts.append("tested on fixed random subsets: " + _subsets(scores))
    return "; ".join(parts)


def _all(values: pd.Series) -> str:
    return " or ".join(dict.fromkeys(map(str, values)))


def _subsets(scores: pd.DataFrame) -> str:
    own = scores[scores["test_images"] < scores["of_test_images"]].drop_duplicates("task")
    sizes = zip(own["task"], own["test_images"], own["of_test_images"], strict=True)
    return ", ".join(f"{task} {images:,} of {of:,}" for task, images, of in sizes)
