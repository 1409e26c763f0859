"""A table of what is attached to a model and how much of it is trained."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.nn as nn

from visionpeft.adapters.access import on_model
from visionpeft.adapters.adapters import attached
from visionpeft.adapters.attached_adapter import AttachedAdapter
from visionpeft.adapters.install import stood_in_for
from visionpeft.adapters.trained import trainable_parameters
from visionpeft.backbones.whole_model import describe
from visionpeft.methods.parts.sparse_delta import entries_of

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = ("adapter", "method", "site", "tensors", "trainable")
NUMBERS = ("tensors", "trainable")


@dataclass(frozen=True)
class Summary:
    """Counts of a model with adapters; `print` shows them as a table.

    Args:
        backbone: name of the architecture, and whether it has layer sites only.
        total: number of values in the model as it computes now, adapters included.
        trainable: number of trained values, the head included.
        adapter: number of trained values without the head.
        indices: number of indices that are saved with the values of single entries.
        rows: for each adapter and site, (adapter, method, site, number of tensors, trained values).
    """

    backbone: str
    total: int
    trainable: int
    adapter: int
    indices: int
    rows: tuple[tuple[str, str, str, int, int], ...]

    @property
    def bytes(self) -> int:
        """Size of the trained values in float32."""
        return 4 * self.trainable

    @property
    def caption(self) -> str:
        """The totals in one line."""
        share = 100 * self.trainable / self.total
        size = f"{self.bytes / 2**20:.2f} MiB"
        if self.indices:
            size += f"; with them {self.indices:,} indices are saved"
        return f"trainable {self.trainable:,} of {self.total:,} ({share:.2f} %), {size}"

    def _cells(self) -> list[tuple[str, str, str, str, str]]:
        return [
            (adapter, method, site, str(tensors), f"{values:,}") for adapter, method, site, tensors, values in self.rows
        ]

    def __rich__(self) -> "Table":
        from rich.table import Table  # only the lab shows tables in colour

        table = Table(title=self.backbone, caption=self.caption)
        for column in COLUMNS:
            table.add_column(column, justify="right" if column in NUMBERS else "left")
        for row in self._cells():
            table.add_row(*row)
        return table

    def __str__(self) -> str:
        rows = [COLUMNS, *self._cells()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        rule = "  ".join("-" * width for width in widths)
        lines = [
            "  ".join(
                cell.rjust(width) if name in NUMBERS else cell.ljust(width)
                for cell, width, name in zip(row, widths, COLUMNS, strict=True)
            ).rstrip()
            for row in rows
        ]
        return "\n".join([self.backbone, "", lines[0], rule, *lines[1:], "", self.caption])


@on_model
def summary(model: nn.Module) -> Summary:
    """Count what is trained, site by site.

    Args:
        model: a model with adapters; those that do not act are counted by themselves, and not in the sums.

    Returns:
        The numbers, which `print` shows as a table, and rich in colour.

    Raises:
        ConfigurationError: the model has no adapters, or its head was exchanged after they were attached.
    """
    peft = attached(model)
    trainable = trainable_parameters(model)
    unused = stood_in_for(model)
    own = [p for name, p in model.named_parameters() if not name.startswith("peft.") and p not in unused]
    heads = {id(p) for name in peft.active for p in peft[name].head_parameters()}
    count, backbone = sum(p.numel() for p in trainable), describe(model)
    coarse = any(tower.layers_only is not None for tower in backbone.towers.values())
    return Summary(
        backbone=backbone.name + " (layer sites only)" * coarse,
        total=sum(p.numel() for p in own) + count,
        trainable=count,
        adapter=sum(p.numel() for p in trainable if id(p) not in heads),
        indices=sum(sum(entries_of(peft[name]).values()) for name in peft.active),
        rows=tuple(row for name in peft for row in _rows(name, peft[name], name in peft.active)),
    )


def _rows(name: str, adapter: AttachedAdapter, active: bool):
    label = name if active else f"{name} (off)"
    names = {key: type(method).__name__ for key, method in zip(adapter.method_keys, adapter.methods, strict=True)}
    sites: dict[tuple[str, str], tuple[int, int]] = {}
    for path, parameter in adapter.named_parameters():
        tensors, values = sites.get(row := _site(path, names), (0, 0))
        sites[row] = tensors + 1, values + parameter.numel()
    for (method, site), (tensors, values) in sites.items():
        yield label, method, site, tensors, values


def _site(path: str, methods: dict[str, str]) -> tuple[str, str]:
    key, *rest = path.split(".")
    if key == "trained":
        return " + ".join(methods.values()), "backbone parameters"
    if key not in methods:
        return "", "head"
    tower, *place = rest
    return methods[key], f"{tower} {place[1] if place[0].isdigit() else place[0]}"
