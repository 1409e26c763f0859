"""Figures of a protocol: accuracy against cost, against shots, on base and new classes, on targets."""

from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from visionpeft.protocols.tables import Table

MARKERS = "osD^vP*X<>"


def draw_accuracy_against_shots(table: Table, path: Path) -> None:
    """A panel for each data set: one line for each learner, its band one deviation wide.

    Args:
        table: a `few_shot_table`. Learners without training images are dashed lines, as they do not depend on shots.
        path: the PNG.
    """
    frame = table.frame
    figure, panels = _panels(frame["dataset"].unique(), width=4.6, height=3.7)
    shots = sorted(int(name.removesuffix(" mean")) for name in frame.columns if name.endswith(" mean"))
    trained = [number for number in shots if number]
    learners = list(frame["learner"].unique())
    for dataset, axes in panels.items():
        for line in frame[frame["dataset"] == dataset].to_dict("records"):
            index = learners.index(line["learner"])
            measured = [number for number in trained if not pd.isna(line[f"{number} mean"])]
            if not pd.isna(line.get("0 mean")):
                axes.axhline(line["0 mean"], color=f"C{index}", linestyle="--", label=line["learner"])
            if measured:
                means = [line[f"{number} mean"] for number in measured]
                low, high = (
                    [mean + sign * line[f"{number} std"] for number, mean in zip(measured, means, strict=True)]
                    for sign in (-1, 1)
                )
                style = {"color": f"C{index}", "marker": MARKERS[index % 10], "linestyle": "-" if index < 10 else ":"}
                axes.plot(measured, means, **style, label=line["learner"])
                axes.fill_between(measured, low, high, color=f"C{index}", alpha=0.15, linewidth=0)
        axes.set_xscale("log", base=2)
        axes.set_xticks(trained, [str(number) for number in trained])
        axes.minorticks_off()
        axes.set(title=dataset, xlabel="labelled images for each class", ylabel="top-1 accuracy (%)")
        axes.grid(alpha=0.3)
    _legend(figure, next(iter(panels.values())))
    figure.savefig(path, dpi=110)


def draw_base_to_new(table: Table, path: Path) -> None:
    """A panel for each data set: for each learner a bar on base and one on new classes, and a line at their H.

    Args:
        table: a `base_to_new_table`.
        path: the PNG.
    """
    frame = table.frame
    learners = frame["learner"].nunique()
    figure, panels = _panels(frame["dataset"].unique(), width=max(4.2, 0.95 * learners), height=3.7)
    for dataset, axes in panels.items():
        lines = frame[frame["dataset"] == dataset]
        places = range(len(lines))
        for offset, name, colour in ((-0.2, "base", "C0"), (0.2, "new", "C1")):
            axes.bar(
                [place + offset for place in places],
                lines[f"{name} mean"],
                width=0.38,
                yerr=lines[f"{name} std"],
                color=colour,
                error_kw={"elinewidth": 1, "ecolor": "0.25"},
                label=f"{name} classes",
            )
        axes.hlines(
            lines["H"], [place - 0.42 for place in places], [place + 0.42 for place in places], "black", label="H"
        )
        axes.set_xticks(places, lines["learner"], rotation=30, ha="right", rotation_mode="anchor")
        axes.set(title=dataset, ylabel="top-1 accuracy (%)")
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    _legend(figure, next(iter(panels.values())))
    figure.savefig(path, dpi=110)


def draw_transfer(table: Table, path: Path) -> None:
    """For the source, each target and the average of the targets, a bar for each learner.

    Args:
        table: a `transfer_table`.
        path: the PNG.
    """
    frame = table.frame
    places = [name.removesuffix(" mean") for name in frame.columns if name.endswith(" mean")]
    figure = Figure(figsize=(max(5.0, 0.35 * len(places) * (len(frame) + 1)), 4.0), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(frame)
    for index, line in enumerate(frame.to_dict("records")):
        axes.bar(
            [place + (index - (len(frame) - 1) / 2) * width for place in range(len(places))],
            [line[f"{place} mean"] for place in places],
            width=0.92 * width,
            yerr=[line[f"{place} std"] for place in places],
            color=f"C{index}",
            error_kw={"elinewidth": 1, "ecolor": "0.25"},
            label=line["learner"],
        )
    axes.set_xticks(range(len(places)), [f"{places[0]}\n(source)", *places[1:]])
    axes.set(ylabel="top-1 accuracy (%)")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    _legend(figure, axes)
    figure.savefig(path, dpi=110)


def draw_accuracy_against_cost(table: Table, path: Path) -> None:
    """Mean accuracy of each method against what it trains and against what it keeps in memory for the backward pass.

    Args:
        table: a `method_table`.
        path: the PNG.
    """
    frame = table.frame
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    costs = (
        ("trained parameters", "trained parameters without the head", "symlog"),
        ("saved MiB per image", "MiB kept for the backward pass, for each image (float32)", "linear"),
    )
    for axes, (column, label, scale) in zip(figure.subplots(1, 2), costs, strict=True):
        for index, line in enumerate(frame.to_dict("records")):
            axes.errorbar(
                line[column], line["mean of tasks mean"], yerr=line["mean of tasks std"], fmt="o", color=f"C{index}"
            )
            axes.annotate(
                line["method"], (line[column], line["mean of tasks mean"]), (4, 4), textcoords="offset points", size=8
            )
        axes.set_xscale(scale)
        axes.set(xlabel=label, ylabel="mean top-1 accuracy over the tasks (%)")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def _panels(names, width: float, height: float, columns: int = 4) -> tuple[Figure, dict[str, Axes]]:
    columns = min(columns, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(width * columns, height * rows + 0.4), layout="constrained")
    every = figure.subplots(rows, columns, squeeze=False).flat
    panels = dict(zip(names, every, strict=False))
    for axes in every[len(names) :]:
        axes.set_visible(False)
    return figure, panels


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)), frameon=False)
