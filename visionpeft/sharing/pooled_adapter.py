"""What is known of an adapter that is in memory among others."""

from dataclasses import dataclass

from visionpeft.adapters.attached_adapter import AttachedAdapter


@dataclass
class PooledAdapter:
    """An adapter that is in memory.

    Args:
        name: how it is asked for.
        attached: its name on the model, for `visionpeft.route` and `visionpeft.use`.
        description: what `visionpeft.read_metadata` reads of it.
        bytes: of its parameters and buffers.
        classes: how many logits its head gives; None if it has none.
        alone: it cannot be routed among others, as it trains parameters of the backbone or acts on the text tower.
        inserted: how many tokens or keys it adds at each site; only adapters that add equally many share a batch.
    """

    name: str
    attached: str
    description: dict
    bytes: int
    classes: int | None
    alone: bool
    inserted: tuple

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes in the order of the logits, if they were saved."""
        return self.description["class_names"]


def inserted(adapter: AttachedAdapter) -> tuple:
    """How many tokens or keys an adapter inserts at each site: ((tower, block, site, where it is added), number)."""
    counts: dict[tuple, int] = {}
    for _, placed in adapter.placements:
        site = placed.tower, -1 if placed.block is None else placed.block, placed.site, placed.add or ""
        counts[site] = counts.get(site, 0) + getattr(placed.module, "num_tokens", 0)
    return tuple(sorted((site, count) for site, count in counts.items() if count))
