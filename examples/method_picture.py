"""Draws a picture of docs/results.md: accuracy of every method against trained parameters and against memory.

    python examples/method_picture.py
    python examples/method_picture.py --table runs/vtab1k/table.csv --output mine.png

The committed table is the one of docs/results.md, which `python -m visionpeft.protocol vtab1k` regenerates with the
arguments given there; the `table.csv` that such a run leaves has the same columns and can be drawn, too.
"""

import argparse
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
COSTS = {
    "trained parameters": "trained parameters, without the head",
    "saved MiB per image": "MiB kept for the backward pass, for each image",
}
WELL_KNOWN = ("linear_probe", "full", "lora", "vpt", "adaptformer", "bitfit", "ssf")


def main(table: Path, output: Path) -> None:
    methods = read(table)
    figure = Figure(figsize=(11, 4.3), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (column, label) in zip(panels, COSTS.items(), strict=True):
        draw(axes, methods, column)
        axes.set_xlabel(label)
    panels[0].set_xscale("symlog", linthresh=2000)
    panels[0].set_xlim(-400, 8e6)
    panels[0].set_ylabel("mean test accuracy of three tasks (%)")
    figure.suptitle(f"{len(methods)} methods on nano_vit, two epochs, three seeds; orange: none cheaper is better")
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110)
    print(f"{output}: {len(methods)} methods of {table}")


def read(table: Path) -> pd.DataFrame:
    """Name, costs and mean accuracy over the tasks of each method."""
    frame = pd.read_csv(table)
    tasks = [name for name in frame if name.endswith(" mean") and not name.startswith("mean of ")]
    # The number of trained parameters of a method that chooses by the data is a range, whose start is drawn.
    trained = frame["trained parameters"].astype(str).str.split().str[0].astype(int)
    return pd.DataFrame(
        {
            "method": frame["method"],
            "trained parameters": trained,
            "saved MiB per image": frame["saved MiB per image"].astype(float),
            "accuracy": frame[tasks].mean(axis=1),
        }
    )


def best_for_its_cost(methods: pd.DataFrame, column: str) -> pd.DataFrame:
    """The methods that are more accurate than all that cost no more."""
    ordered = methods.sort_values([column, "accuracy"], ascending=[True, False])
    return ordered[ordered["accuracy"] > ordered["accuracy"].cummax().shift(fill_value=float("-inf"))]


def draw(axes: Axes, methods: pd.DataFrame, column: str) -> None:
    """A point for each method, the best for their cost joined, and names where there is room for them."""
    best = best_for_its_cost(methods, column)
    axes.plot(best[column], best["accuracy"], drawstyle="steps-post", color="C1", linewidth=1)
    axes.scatter(methods[column], methods["accuracy"], color="0.6", s=22)
    axes.scatter(best[column], best["accuracy"], color="C1", s=34, zorder=3)
    for line in methods.to_dict("records"):
        if line["method"] in (*best["method"], *WELL_KNOWN):
            place = line[column], line["accuracy"]
            axes.annotate(line["method"], place, (4, 4), textcoords="offset points", size=8)
    axes.grid(alpha=0.3)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", type=Path, default=ROOT / "benchmarks" / "results" / "embedded_tasks.csv")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "pictures" / "methods.png")
    main(**vars(parser.parse_args()))
