"""Logits of images by adapters of their own, several adapters in one batch where that changes no bit of an answer."""

import json
from collections.abc import Callable

import torch
from torch import nn

from visionpeft.adapters.switch import route, use
from visionpeft.sharing.batch_sizes import filled, rows_agree, sizes_that_agree
from visionpeft.sharing.own_heads import filled_to
from visionpeft.sharing.pooled_adapter import PooledAdapter


class SharedBatches:
    """Puts images together whose adapters can share a batch, and computes the batches.

    Args:
        model: the model, with the adapters attached and their heads given `give_own_heads`.
        batch_size: most rows of a batch, in which a row's bits do not depend on the others; None for batches of the
            rows that are given, whose last bits may differ from one to another.
    """

    def __init__(self, model: nn.Module, batch_size: int | None):
        self.model = model
        self.batch_size = batch_size
        self._sizes: dict[str, frozenset[int]] = {}
        self._agreeing: dict[frozenset[str], bool] = {}

    def logits(self, images: torch.Tensor, adapters: list[PooledAdapter]) -> list[torch.Tensor]:
        """Logits (classes,) of each image of (batch, 3, height, width) by the adapter of its row."""
        results: list[torch.Tensor | None] = [None] * len(adapters)
        for rows in self._sharing(images, adapters):
            step = self.batch_size or len(rows)
            for start in range(0, len(rows), step):
                part = rows[start : start + step]
                outputs = self._compute(images[part], [adapters[row] for row in part])
                for row, output in zip(part, outputs, strict=True):
                    results[row] = output
        return results

    def _sharing(self, images: torch.Tensor, adapters: list[PooledAdapter]) -> list[list[int]]:
        """The rows, put together where their adapters can share a batch."""
        shared: list[tuple[object, dict[str, PooledAdapter], list[int]]] = []
        for row, adapter in enumerate(adapters):
            # Without a head there is nothing to fill up.
            key = adapter.name if adapter.alone else (adapter.inserted, adapter.classes is None)
            for other, members, rows in shared:
                if other == key and all(self._agree(adapter, member, images) for member in members.values()):
                    members[adapter.name] = adapter
                    rows.append(row)
                    break
            else:
                shared.append((key, {adapter.name: adapter}, [row]))
        return [rows for _, _, rows in shared]

    def _compute(self, images: torch.Tensor, adapters: list[PooledAdapter]) -> list[torch.Tensor]:
        """Logits of rows that can share a batch."""
        rows = len(images)
        if self.batch_size is not None:
            agree = frozenset.intersection(*(self._sizes_of(each, images) for each in adapters))
            rows = min(size for size in agree if size >= len(images))
        outputs = self._run(filled(images, rows), [*adapters, *adapters[-1:] * (rows - len(images))])
        return [output[: each.classes] for output, each in zip(outputs, adapters, strict=False)]

    def _run(self, images: torch.Tensor, adapters: list[PooledAdapter]) -> torch.Tensor:
        """Outputs of one batch, filled up to the classes of the adapter that has most."""
        alone, names = adapters[0].alone, [adapter.attached for adapter in adapters]
        acting = use(self.model, names[0]) if alone else route(self.model, names)
        with acting, filled_to(max(adapter.classes or 0 for adapter in adapters)):
            return self.model(images)

    def _sizes_of(self, adapter: PooledAdapter, images: torch.Tensor) -> frozenset[int]:
        """In which sizes of a batch its rows have the same bits; measured once for adapters of one kind."""
        kind = _kind(adapter, images)
        if kind not in self._sizes:

            def compute(batch: torch.Tensor) -> torch.Tensor:
                return self._run(batch, [adapter] * len(batch))

            self._sizes[kind] = sizes_that_agree(compute, images, self.batch_size)
        return self._sizes[kind]

    def _agree(self, one: PooledAdapter, other: PooledAdapter, images: torch.Tensor) -> bool:
        """Whether rows of the two have the bits in one batch that each has alone; measured once for two kinds.

        Several adapters of a kind may act in one product where a single one acts in another.
        """
        if self.batch_size is None or self.batch_size == 1 or one.name == other.name:
            return True
        kinds = frozenset((_kind(one, images), _kind(other, images)))
        if kinds not in self._agreeing:
            both = [one, other] * self.batch_size

            def mixed(batch: torch.Tensor) -> torch.Tensor:
                return self._run(batch, both[: len(batch)])

            def alone(adapter: PooledAdapter) -> Callable[[torch.Tensor], torch.Tensor]:
                return lambda batch: self._run(batch, [adapter] * len(batch))

            self._agreeing[kinds] = rows_agree(mixed, [alone(one), alone(other)], images, self.batch_size)
        return self._agreeing[kinds]


def _kind(adapter: PooledAdapter, images: torch.Tensor) -> str:
    """What is the same for adapters whose products have the same shapes; heads compute row by row in any case."""
    saved = adapter.description
    return json.dumps([saved["methods"], saved["train"], adapter.classes is None, images.shape[1:]])
