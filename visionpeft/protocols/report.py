"""What a protocol leaves behind: rows, table and figure."""

from pathlib import Path

from visionpeft.protocols.figures import (
    draw_accuracy_against_cost,
    draw_accuracy_against_shots,
    draw_base_to_new,
    draw_transfer,
)
from visionpeft.protocols.method_table import method_table, print_method_table
from visionpeft.protocols.tables import (
    base_to_new_table,
    calibration_table,
    few_shot_table,
    print_table,
    transfer_table,
    write_rows,
    write_table,
)

REPORT_FILES = ("results.csv", "table.csv", "table.md", "calibration.csv", "calibration.md", "figure.png")
OF_METHODS = ("vtab1k", "fgvc")


def report(protocol: str, rows: list[dict], folder: Path) -> None:
    """Write `results.csv` (a line for each accuracy), `table.csv`, `table.md` and `figure.png`, and print the table.

    Of learners also `calibration.csv` and `calibration.md`: accuracy by class, confidence and calibration error.

    Args:
        protocol: "vtab1k", "fgvc", "few_shot", "base_to_new", "cross_dataset" or "domain_shift".
        rows: what it returned.
        folder: where to write.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(rows, folder / "results.csv")
    if protocol in OF_METHODS:
        table, draw = method_table(rows), draw_accuracy_against_cost
    elif protocol == "few_shot":
        table, draw = few_shot_table(rows), draw_accuracy_against_shots
    elif protocol == "base_to_new":
        table, draw = base_to_new_table(rows), draw_base_to_new
    else:
        table, draw = transfer_table(rows), draw_transfer
    write_table(table, folder)
    draw(table, folder / "figure.png")
    (print_method_table if protocol in OF_METHODS else print_table)(table)
    if protocol not in OF_METHODS:
        probabilities = calibration_table(rows)
        write_table(probabilities, folder, "calibration")
        print_table(probabilities)
    made = [name for name in REPORT_FILES if protocol not in OF_METHODS or not name.startswith("calibration")]
    print(f"{', '.join(made[:-1])} and {made[-1]} are in {folder}")
