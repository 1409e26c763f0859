"""Drawing a few images of each class as CoOp does, and restricting a draw to the base or the new classes.

The rule (Zhou et al. 2022, arXiv 2109.01134): one generator of Python's `random` seeded with the run's seed samples k
images of each class from the train split, classes in the order in which they first appear there, then goes on to sample
min(k, 4) of each from the val split. Only then are classes left out.

CLIP-LoRA's authors (Zanella and Ben Ayed 2024, arXiv 2405.18541) sample from the val split first, so that one seed
gives other training images, and k times with replacement from a class with fewer than k images.
"""

import hashlib
import json
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from visionpeft.data.annotations import read_json
from visionpeft.data.few_shot.splits import Splits
from visionpeft.data.records import Row
from visionpeft.errors import DataError
from visionpeft.files import write_json

Classes = Literal["all", "base", "new"]
Rule = Literal["coop", "clip_lora"]
VAL_SHOTS = 4


def draw_indices(splits: dict[str, Sequence[int]], shots: int, seed: int, rule: Rule = "coop") -> dict[str, list[int]]:
    """Positions drawn in each split.

    Args:
        splits: labels of the images of "train" and, where there is one, "val".
        shots: images of each class in train; val gets min(shots, 4).
        seed: of the draw.
        rule: "coop": train before val, and a class with fewer images gives all it has, in order; "clip_lora": val
            before train, and such a class gives as many as the others, drawn with replacement.
    """
    generator = random.Random(seed)
    drawn: dict[str, list[int]] = {}
    counts = [("train", shots), ("val", min(shots, VAL_SHOTS))]
    for split, count in counts if rule == "coop" else reversed(counts):
        if split not in splits:
            continue
        groups: dict[int, list[int]] = {}
        for position, label in enumerate(splits[split]):
            groups.setdefault(label, []).append(position)
        drawn[split] = []
        for members in groups.values():
            if len(members) >= count:
                drawn[split] += generator.sample(members, count)
            else:
                drawn[split] += members if rule == "coop" else generator.choices(members, k=count)
    return drawn


def class_subset(classes: int, part: Classes) -> range:
    """Labels of "all" classes, of the "base" half (the first ceil(K / 2)) or of the "new" half (the others)."""
    base = math.ceil(classes / 2)
    return {"all": range(classes), "base": range(base), "new": range(base, classes)}[part]


def restrict(rows: Sequence[Row], kept: range) -> list[Row]:
    """Rows of the labels in `kept`, numbered from 0."""
    return [Row(row.path, row.label - kept.start, row.where) for row in rows if row.label in kept]


@dataclass(frozen=True)
class Draw:
    """Which images were drawn.

    Args:
        dataset: key of the data set.
        shots: images of each class.
        seed: of the draw.
        split_sha256: hash of the split drawn from.
        train: paths of the training images, relative to the image folder, in the order of drawing.
        val: paths of the images for selection.
        rule: by whose rule they were drawn; draws of older versions are CoOp's.
    """

    dataset: str
    shots: int
    seed: int
    split_sha256: str
    train: list[str]
    val: list[str]
    rule: str = "coop"

    @property
    def sha256(self) -> str:
        """Hash of the paths drawn."""
        return hashlib.sha256(json.dumps([self.train, self.val]).encode()).hexdigest()

    def rows(self, splits: Splits) -> dict[str, list[Row]]:
        """The rows drawn, by split."""
        chosen = {}
        for split, paths in (("train", self.train), ("val", self.val)):
            if split in splits.rows:
                known = {row.path: row for row in splits.rows[split]}
                chosen[split] = [known[path] for path in paths]
        return chosen

    def write(self, file: str | Path) -> None:
        """Write as JSON, at once; raises StorageError when the file cannot be written."""
        write_json(Path(file), asdict(self))


def draw(dataset: str, splits: Splits, shots: int, seed: int, rule: Rule = "coop") -> Draw:
    """Draw `shots` images of each class by `seed` and a rule; see `draw_indices`."""
    labels = {split: [row.label for row in rows] for split, rows in splits.rows.items() if split != "test"}
    drawn = draw_indices(labels, shots, seed, rule)
    paths = {split: [splits.rows[split][position].path for position in chosen] for split, chosen in drawn.items()}
    return Draw(dataset, shots, seed, splits.sha256, paths["train"], paths.get("val", []), rule)


def read_draw(file: Path, dataset: str, splits: Splits, shots: int, seed: int, rule: Rule = "coop") -> Draw:
    """The draw stored in a file.

    Raises:
        DataError: it is malformed, or of another data set, split, seed, number of shots or rule.
    """
    content = read_json(file)
    try:
        stored = Draw(**content)
    except TypeError as error:
        raise DataError(f"{file} is not a stored draw (dataset, shots, seed, split_sha256, train, val)") from error
    wanted = {"dataset": dataset, "shots": shots, "seed": seed, "split_sha256": splits.sha256, "rule": rule}
    for key, asked in wanted.items():
        if getattr(stored, key) != asked:
            raise DataError(
                f"{file} is a draw with {key} {getattr(stored, key)!r}, but {asked!r} is asked for; name another file "
                "in store, or remove this one"
            )
    for split in ("train", "val"):
        listed = {row.path for row in splits.rows.get(split, ())}
        strangers = [path for path in getattr(stored, split) if path not in listed]
        if strangers:
            raise DataError(f"{file}: image '{strangers[0]}' is not in the {split} split; remove the file to draw anew")
    return stored
