"""How a method says where it acts: ranges of blocks, and values that differ by block or target."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate

from visionpeft.backbones.tower import Tower
from visionpeft.errors import ConfigurationError

Blocks = str | int | list[int]


def select_blocks(blocks: Blocks, depth: int, stages: Sequence[int] = ()) -> list[int]:
    """Indices of the blocks that a specification names, ascending.

    Args:
        blocks: "all"; "last:4" or "first:4"; a slice in words, "3:9" or "::2"; an index; or a list of indices.
            Negative indices count from the last block. After "stage:" the same is said of stages, counted from 0:
            "stage:3", "stage:last:2", "stage:1:3".
        depth: number of blocks.
        stages: how many of them each stage has, none if the tower has no stages.

    Raises:
        ConfigurationError: if the specification cannot be read or names no block.
    """
    allowed = (
        f"allowed are 'all', 'first:4', 'last:4', a slice such as '3:9', an index or a list of indices below {depth}"
    )
    if isinstance(blocks, str) and blocks.startswith("stage:"):
        return _of_stages(blocks, stages)
    if isinstance(blocks, str):
        try:
            indices = _read(blocks, depth)
        except (ValueError, TypeError):  # no number, or more than three
            raise ConfigurationError(f"blocks={blocks!r} cannot be read; {allowed}") from None
    else:
        indices = [blocks] if isinstance(blocks, int) else list(blocks)
    outside = [index for index in indices if not -depth <= index < depth]
    if outside or not indices:
        raise ConfigurationError(f"blocks={blocks!r} names no block of a tower of {depth} blocks; {allowed}")
    return sorted({index % depth for index in indices})


def _of_stages(text: str, stages: Sequence[int]) -> list[int]:
    if not stages:
        raise ConfigurationError(f"blocks={text!r} names stages, of which this tower has none")
    try:
        chosen = select_blocks(text.removeprefix("stage:"), len(stages))
    except ConfigurationError:
        raise ConfigurationError(
            f"blocks={text!r} names no stage; allowed are 'stage:0' to 'stage:{len(stages) - 1}', 'stage:last:1', "
            "'stage:first:2' and slices such as 'stage:1:3'"
        ) from None
    ends = [*accumulate(stages)]
    return [index for stage in chosen for index in range(ends[stage] - stages[stage], ends[stage])]


def _read(text: str, depth: int) -> list[int]:
    everything = list(range(depth))
    if text == "all":
        return everything
    word, _, count = text.partition(":")
    if word in ("first", "last"):
        number = int(count)
        if not 0 < number <= depth:
            return []
        return everything[:number] if word == "first" else everything[-number:]
    if ":" in text:
        return everything[slice(*(int(part) if part else None for part in text.split(":")))]
    return [int(text)]


class Overrides:
    """Values of one hyper-parameter that differ by block or target.

    A key is a block range ("last:4", "stage:2"), a target ("q"), or both ("last:4/q"); a later key wins over an earlier
    one.

    Args:
        default: the value where no key matches.
        overrides: keys and values.
        tower: the tower whose blocks they name.
        targets: targets of the method, empty if it has none.
        field: name of the field, for error messages.
    """

    def __init__(self, default, overrides: Mapping[str, float], tower: Tower, targets: Iterable[str], field: str):
        self.default = default
        self.rules = []
        targets = set(targets)
        for key, value in overrides.items():
            blocks, _, target = key.rpartition("/")
            if not blocks and target not in targets:
                blocks, target = target, ""
            try:
                selected = select_blocks(blocks or "all", tower.depth, tower.stages)
            except ConfigurationError:
                selected = []
            if not selected or (target and target not in targets):
                raise ConfigurationError(
                    f"{field} key {key!r} matches nothing; keys are block ranges below {tower.depth}, targets "
                    f"({', '.join(sorted(targets)) or 'none here'}), or both joined by '/'"
                )
            self.rules.append((selected, target, value))

    def at(self, block: int | None, target: str = ""):
        """The value for a block (None outside the blocks) and target."""
        value = self.default
        for blocks, rule_target, rule_value in self.rules:
            if (block is None or block in blocks) and (not rule_target or rule_target == target):
                value = rule_value
        return value
