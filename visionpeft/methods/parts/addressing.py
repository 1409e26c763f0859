"""How a method says where it acts: ranges of blocks, and values that differ by block or target."""

from collections.abc import Iterable, Mapping

from visionpeft.errors import ConfigurationError

Blocks = str | int | list[int]


def select_blocks(blocks: Blocks, depth: int) -> list[int]:
    """Indices of the blocks that a specification names, ascending.

    Args:
        blocks: "all"; "last:4" or "first:4"; a slice in words, "3:9" or "::2"; an index; or a list of indices.
            Negative indices count from the last block.
        depth: number of blocks.

    Raises:
        ConfigurationError: if the specification cannot be read or names no block.
    """
    allowed = (
        f"allowed are 'all', 'first:4', 'last:4', a slice such as '3:9', an index or a list of indices below {depth}"
    )
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

    A key is a block range ("last:4"), a target ("q"), or both ("last:4/q"); a later key wins over an earlier one.

    Args:
        default: the value where no key matches.
        overrides: keys and values.
        depth: number of blocks.
        targets: targets of the method, empty if it has none.
        field: name of the field, for error messages.
    """

    def __init__(self, default, overrides: Mapping[str, float], depth: int, targets: Iterable[str], field: str):
        self.default = default
        self.rules = []
        targets = set(targets)
        for key, value in overrides.items():
            blocks, _, target = key.rpartition("/")
            if not blocks and target not in targets:
                blocks, target = target, ""
            try:
                selected = select_blocks(blocks or "all", depth)
            except ConfigurationError:
                selected = []
            if not selected or (target and target not in targets):
                raise ConfigurationError(
                    f"{field} key {key!r} matches nothing; keys are block ranges below {depth}, targets "
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
