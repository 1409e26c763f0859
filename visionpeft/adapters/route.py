"""One adapter per sample: rows of a batch go through the modules of the adapter that serves them."""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn as nn

from visionpeft.backbones.frames import Frames
from visionpeft.errors import ConfigurationError, UnsupportedError
from visionpeft.sites import act_on_kv, join
from visionpeft.sites.stand_ins import in_own_precision


def rows_of(route: Sequence[str | None], device: torch.device) -> dict[str | None, torch.Tensor]:
    """For each name of a route, the samples of the batch it names, as indices on the device of the model.

    They are made once, when the route is chosen: made where they are used, they would be copied to the device at every
    site of every batch.
    """
    samples: dict[str | None, list[int]] = {}
    for sample, name in enumerate(route):
        samples.setdefault(name, []).append(sample)
    with torch.inference_mode(False):  # a batch with gradients may be routed by what a batch without them has chosen
        return {name: torch.tensor(group, device=device) for name, group in samples.items()}


class Routed:
    """Acts at one site on each group of rows with the modules of the group's adapter; other rows stay as they are.

    Args:
        groups: for each group, the modules that act here, in order.
        branch: whether the site is a branch, which `join` ends.
        rows: for each group, the samples of the batch it serves, as `rows_of` gives them.
        batch: size of the batch.
        frames: for clips, how many rows make one sample.
    """

    def __init__(
        self,
        groups: list[list[nn.Module]],
        branch: bool,
        rows: list[torch.Tensor],
        batch: int,
        frames: Frames | None = None,
    ):
        self.groups = groups
        self.branch = branch
        self.samples = rows
        self.batch = batch
        self.frames = frames

    @property
    def reads_attention_input(self) -> bool:
        """Whether one of the modules at `kv` does."""
        return any(getattr(module, "reads_attention_input", False) for group in self.groups for module in group)

    @property
    def rows(self) -> list[torch.Tensor]:
        """For each group, the rows of the tokens it serves."""
        if self.frames is None:
            return self.samples
        number = self.frames.number
        within = torch.arange(number, device=self.samples[0].device)
        return [(number * group[:, None] + within).flatten() for group in self.samples]

    def __call__(self, *inputs):
        """Apply to (x), to (x, y, weight, bias) of a layer, or to (k, v) or (k, v, h)."""
        batched = [value for value in inputs if isinstance(value, torch.Tensor)]
        _check_batch(self.batch, len(batched[0]) // (1 if self.frames is None else self.frames.number))
        if len(inputs) in (2, 3):
            k, v, *read = inputs
            parts = [self._chain(modules, k[r], v[r], *(h[r] for h in read)) for r, modules in self._parts(k)]
            return tuple(self._gather(x, [p[i] for p in parts]) for i, x in enumerate((k, v)))
        if len(inputs) == 4:
            x, y, weight, bias = inputs
            return self._gather(y, [self._layer(m, x[r], y[r], weight, bias) for r, m in self._parts(y)])
        (x,) = inputs
        if self.branch:
            return [[module(x[rows]) for module in modules] for rows, modules in self._parts(x)]
        return self._gather(x, [self._tokens(m, x[r]) for r, m in self._parts(x)])

    def join(self, x: torch.Tensor, deltas: list[list[torch.Tensor]]) -> torch.Tensor:
        """End the branches of each group in its rows of the tokens x."""
        parts = []
        for (rows, modules), carried in zip(self._parts(x), deltas, strict=True):
            part = x[rows]
            for module, delta in zip(modules, carried, strict=True):
                part = join(module, part, delta)
            parts.append(part)
        return self._gather(x, parts)

    def _parts(self, x: torch.Tensor):
        return [(rows.to(x.device), modules) for rows, modules in zip(self.rows, self.groups, strict=True)]

    @staticmethod
    def _chain(modules: list[nn.Module], k: torch.Tensor, v: torch.Tensor, h: torch.Tensor | None = None) -> tuple:
        for module in modules:
            k, v = act_on_kv(module, k, v, h)
        return k, v

    @staticmethod
    def _layer(modules: list[nn.Module], x, y, weight, bias) -> torch.Tensor:
        for module in modules:
            y = module(x, y, weight, bias)
        return y

    @staticmethod
    def _tokens(modules: list[nn.Module], x: torch.Tensor) -> torch.Tensor:
        for module in modules:
            x = module(x)
        return x

    def _gather(self, x: torch.Tensor, parts: list[torch.Tensor]) -> torch.Tensor:
        """Put the groups' results back in the order of the batch."""
        shapes = {part.shape[1:] for part in parts}
        (shape,) = shapes
        if shape == x.shape[1:]:
            result = x
        else:
            result = x.new_zeros(len(x), *shape)
        for rows, part in zip(self.rows, parts, strict=True):
            result = result.index_copy(0, rows.to(x.device), part.to(result.dtype))
        return result


class RoutedHead:
    """The head of each sample's adapter.

    Args:
        head_of: gives the head for the name of an adapter, or None for the model's own.
        rows: for each name, the samples of the batch, as `rows_of` gives them.
        batch: size of the batch.
    """

    def __init__(
        self,
        head_of: Callable[[str | None], nn.Module | None],
        rows: Mapping[str | None, torch.Tensor],
        batch: int,
    ):
        self._heads = tuple((head_of(name), own_rows) for name, own_rows in rows.items())
        self._names = tuple(rows)
        self._batch = batch

    def __call__(self, x: torch.Tensor, own: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Map pooled features (batch, width) to logits (batch, classes); `own` is the model's own head."""
        _check_batch(self._batch, len(x))
        heads = [(head, rows.to(x.device)) for head, rows in self._heads]
        parts = [own(x[rows]) if head is None else in_own_precision(head, x[rows]) for head, rows in heads]
        classes = {part.shape[-1] for part in parts}
        if len(classes) > 1:
            raise UnsupportedError(
                f"the heads of {', '.join(map(str, self._names))} have {sorted(classes)} classes, which is no one "
                "tensor; route adapters with equally many classes, or attach them with head=False"
            )
        result = x.new_zeros(len(x), classes.pop(), dtype=parts[0].dtype)
        for (_, rows), part in zip(heads, parts, strict=True):
            result = result.index_copy(0, rows, part)
        return result


def _check_batch(named: int, samples: int) -> None:
    if samples != named:
        raise ConfigurationError(f"route names an adapter for each of {named} samples, but the batch has {samples}")


def check_routable(peft, plans: list[dict], groups: list[tuple[str, ...]]) -> None:
    """Refuse adapters that cannot act on single rows exactly.

    Raises:
        UnsupportedError: if one trains parameters of the backbone itself, acts on the text tower, or inserts tokens
            that other rows do not have.
    """
    for (name,) in groups:
        adapter = peft[name]
        methods = ", ".join(type(method).__name__ for method in adapter.methods)
        if adapter.trained_names:
            raise UnsupportedError(
                f"adapter {name!r} ({methods}) trains {adapter.trained_names[0]!r} and others of the backbone, which "
                "all samples of a batch share; use it for a whole batch"
            )
        if any(placement.tower == "text" for _, placement in adapter.placements):
            raise UnsupportedError(f"adapter {name!r} ({methods}) acts on the text tower, whose batch is not images")
    tokens = [_inserted(plan) for plan in plans]
    if None in peft.route:
        tokens.append({})
    if any(inserted != tokens[0] for inserted in tokens):
        names = ", ".join(name for (name,), inserted in zip(groups, tokens, strict=False) if inserted)
        raise UnsupportedError(
            f"{names} inserts tokens or keys, so that the samples of this batch would differ in length; "
            "use it for a whole batch, or with adapters that insert equally many"
        )


def _inserted(plan: dict) -> dict:
    """How many tokens are inserted or removed at each site."""
    counts = {key: sum(getattr(module, "num_tokens", 0) for module in modules) for key, modules in plan.items()}
    return {key: count for key, count in counts.items() if count}
