"""What `python -m visionpeft.prepare` leaves in a folder it has built."""

from pathlib import Path

from visionpeft.data.annotations import read_json
from visionpeft.errors import DataError


def prepared_notes(folder: Path) -> list[str]:
    """Remarks for the record of a run: whose split it is, and what was left out; none for a folder of others.

    Raises:
        DataError: `prepared.json` is not what `prepare` writes.
    """
    file = folder / "prepared.json"
    if not file.is_file():
        return []
    content = read_json(file)
    if not isinstance(content, dict) or not {"split", "rule"} <= content.keys():
        raise DataError(f"{file} is not what visionpeft.prepare writes; build the folder again, or remove that file")
    left_out = content.get("left_out") or []
    damaged = [f"damaged images left out: {', '.join(map(str, left_out))}"] if left_out else []
    return [f"split: {content['split']} ({content['rule']})", *damaged]
