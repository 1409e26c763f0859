"""Tables of the journal, as Markdown for `docs/performance.md`."""

from collections.abc import Callable

import measuring
from measuring import table

from .exactness import TOLERANCES
from .running import FAILED, Journal
from .steps import REFERENCE

MIB = 2**20


def page(journal: Journal, unfinished: list[str]) -> str:
    """All tables, with what they depend on, what failed and what there was no time for."""
    machine = journal.machine
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "timm", "peft"))
    parts = [f"Measured on {machine['device']} with {versions} (`python benchmarks/gpu.py`)."]
    makers: dict[str, tuple[str, Callable]] = {
        "steps": (steps_said(), steps),
        "mixed": ("A batch of images that go through adapters of their own, seconds:", mixed),
        "text": ("The text side of learners, ours against the straightforward way:", text),
        "exactness": (exactness_said(), rows_of),
        "waiting": ("How often the host waits for the device in a training step:", rows_of),
    }
    for part, (said, make) in makers.items():
        cells = [cell["row"] for cell in journal.cells.values() if cell["part"] == part and cell["row"]]
        if cells:
            parts += [said, table(make(cells))]
    for name, cell in journal.cells.items():
        if cell["status"] == FAILED:
            parts.append(f"**{name} failed**: {cell['error']}")
    if unfinished:
        parts.append(f"Not measured yet: {len(unfinished)} of {len(unfinished) + len(journal.cells)}.")
    return "\n\n".join(parts) + "\n"


def filled(text: str, tables: str) -> str:
    """A page with what stands between its marks replaced by the tables.

    Raises:
        SystemExit: it has no such marks.
    """
    return measuring.filled(text, "gpu", f"\n{tables}")


def exactness_said() -> str:
    """What the table of differences means."""
    allowed = ", ".join(f"{most[0]:g} and {most[1]:g} in {name}" for name, most in TOLERANCES.items())
    return (
        "Every method and learner against the same in float64 on a CPU: |difference| / |expected| of logits and of all "
        f"gradients; allowed are {allowed}."
    )


def steps_said() -> str:
    """What the table of steps means."""
    return (
        "A step is forward, cross-entropy, backward and AdamW; peak is above the loaded model; ratios are to the "
        "frozen forward in the same precision, medians with the range of the steps:"
    )


def steps(rows: list[dict]) -> list[dict]:
    """Rows of the table of steps."""
    forwards = {(r["backbone"], r["precision"]): r["seconds"] for r in rows if r["case"] == REFERENCE}

    def line(row: dict) -> dict:
        forward = forwards.get((row["backbone"], row["precision"]))
        ratio = "" if forward is None else f"{row['seconds'] / forward:.2f}"
        if forward is not None:
            ratio += f" [{row['fastest'] / forward:.2f}, {row['slowest'] / forward:.2f}]"
        peak = row["peak, MiB"]
        return {
            "case": row["case"],
            "backbone": f"{row['backbone']}, {row['precision']}, {row['batch']} images",
            "ms": f"{1000 * row['seconds']:.1f}",
            "images / s": f"{row['images per second']:.0f}",
            "/ frozen forward": ratio,
            "kept, MiB": f"{row['kept, MiB']:.0f}",
            "peak, MiB": "" if peak is None else f"{peak:.0f}",
            "first step, s": f"{row['first step']:.1f}",
        }

    order = {key: index for index, key in enumerate(dict.fromkeys((r["backbone"], r["precision"]) for r in rows))}
    return [line(row) for row in sorted(rows, key=lambda row: order[row["backbone"], row["precision"]])]


def mixed(rows: list[dict]) -> list[dict]:
    """Rows of the table of mixed batches."""
    return [
        {
            "batch": row["batch"],
            **{key: f"{row[key]:.4f}" for key in ("routed", "one adapter", "one after another")},
            "largest difference": f"{row['largest difference']:.1e}",
        }
        for row in rows
    ]


def text(rows: list[dict]) -> list[dict]:
    """Rows of the table of the text side."""
    return [
        {
            "step": row["step"],
            "straightforward": f"{1000 * row['straightforward']:.1f} ms, {row['kept, straightforward'] / MIB:,.0f} MiB",
            "ours": f"{1000 * row['ours']:.1f} ms, {row['kept, ours'] / MIB:,.1f} MiB",
            "faster": f"{row['straightforward'] / row['ours']:.1f}x",
            "difference": f"{row['difference']:.1e}",
        }
        for row in rows
    ]


def rows_of(rows: list[dict]) -> list[dict]:
    """Rows with the same columns, empty where one has nothing to say."""
    columns = [*dict.fromkeys(key for row in rows for key in row)]
    return [{column: row.get(column, "") for column in columns} for row in rows]
