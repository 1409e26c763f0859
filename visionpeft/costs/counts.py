"""A table of what is attached to a model and how much of it is trained."""

from dataclasses import dataclass

import torch.nn as nn
from rich.console import Console
from rich.table import Table

from visionpeft.adapters.access import on_model
from visionpeft.adapters.adapters import AttachedAdapter
from visionpeft.adapters.attach import attached, trainable_parameters
from visionpeft.adapters.install import stood_in_for
from visionpeft.backbones.dispatch import describe
from visionpeft.methods.parts.sparse_delta import entries_of


@dataclass(frozen=True)
class Summary:
    """Counts of a model with adapters; `print` shows them as a table.

    Args:
        backbone: name of the architecture.
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

    def __rich__(self) -> Table:
        share = 100 * self.trainable / self.total
        size = f"{self.bytes / 2**20:.2f} MiB"
        if self.indices:
            size += f"; with them {self.indices:,} indices are saved"
        table = Table(
            title=self.backbone,
            caption=f"trainable {self.trainable:,} of {self.total:,} ({share:.2f} %), {size}",
        )
        for column in ("adapter", "method", "site", "tensors", "trainable"):
            table.add_column(column, justify="right" if column in ("tensors", "trainable") else "left")
        for adapter, method, site, tensors, values in self.rows:
            table.add_row(adapter, method, site, str(tensors), f"{values:,}")
        return table

    def __str__(self) -> str:
        console = Console(width=100, color_system=None)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


@on_model
def summary(model: nn.Module) -> Summary:
    """Count what is trained, site by site."""
    peft = attached(model)
    trainable = trainable_parameters(model)
    unused = stood_in_for(model)
    own = [p for name, p in model.named_parameters() if not name.startswith("peft.") and p not in unused]
    heads = {id(p) for name in peft.active for p in peft[name].head_parameters()}
    count = sum(p.numel() for p in trainable)
    return Summary(
        backbone=describe(model).name,
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
