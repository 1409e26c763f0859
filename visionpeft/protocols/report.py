"""What a protocol leaves behind: rows, table and figure."""

from pathlib import Path

from visionpeft.reports.protocol_figures import draw_accuracy_against_shots, draw_base_to_new, draw_transfer
from visionpeft.reports.protocol_tables import (
    base_to_new_table,
    few_shot_table,
    print_table,
    transfer_table,
    write_rows,
    write_table,
)


def report(protocol: str, rows: list[dict], folder: Path) -> None:
    """Write `results.csv` (a line for each accuracy), `table.csv`, `table.md` and `figure.png`, and print the table.

    Args:
        protocol: "few_shot", "base_to_new", "cross_dataset" or "domain_shift".
        rows: what it returned.
        folder: where to write.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(rows, folder / "results.csv")
    if protocol == "few_shot":
        table, draw = few_shot_table(rows), draw_accuracy_against_shots
    elif protocol == "base_to_new":
        table, draw = base_to_new_table(rows), draw_base_to_new
    else:
        table, draw = transfer_table(rows), draw_transfer
    write_table(table, folder)
    draw(table, folder / "figure.png")
    print_table(table)
    print(f"results.csv, table.csv, table.md and figure.png are in {folder}")
