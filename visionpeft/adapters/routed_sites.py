"""What acts at a site, at keys and values, or as the head, while the rows of a batch go to several adapters."""

from collections.abc import Callable

import torch
import torch.nn as nn

from visionpeft.adapters.alike import alike_heads
from visionpeft.adapters.route import Group, Key, Route, inner
from visionpeft.adapters.together import Together
from visionpeft.backbones.frames import Frames
from visionpeft.errors import UnsupportedError
from visionpeft.sites import UNSEEN, act_on_kv, join
from visionpeft.sites.frozen_layers import is_hooked, traced
from visionpeft.sites.routing import Routing
from visionpeft.sites.stand_ins import in_own_precision


class RoutedSite:
    """Acts at one site on each row with the modules of the row's adapter; other rows stay as they are.

    Args:
        routing: says which route is open.
        key: the site.
        frames: for clips, how many rows make one sample.
    """

    def __init__(self, routing: Routing, key: Key, frames: Frames | None = None):
        self.routing = routing
        self.key = key
        self.frames = frames

    @property
    def reads_attention_input(self) -> bool:
        """Whether one of the modules at `kv` does."""
        groups = self._route().groups(self.key)
        return any(getattr(inner(acts), "reads_attention_input", False) for g in groups for acts in g.chains[0])

    def _route(self) -> Route:
        opened = self.routing.current()
        if torch.is_grad_enabled():
            opened.differentiated = True
        return opened.route

    def _rows_each(self, x: torch.Tensor, route: Route) -> int:
        """How many rows of x one sample has, one after another."""
        return 1 if self.frames is None else self.frames.number

    def _served(self, x: torch.Tensor, route: Route):
        """Of each group: itself, the rows of x that it serves, None for all, its members and number of samples."""
        number = self._rows_each(x, route)
        route.check(len(x) // number)
        for group in route.groups(self.key):
            rows, index = group.rows(x.device)
            samples = len(route.names) if rows is None else len(rows)
            if rows is not None and number > 1:
                rows = (number * rows[:, None] + torch.arange(number, device=rows.device)).flatten()
            yield group, rows, index, samples

    def _parts(self, x: torch.Tensor, route: Route):
        """For each group, the rows of x that it serves, None for all, and what acts on them."""
        for group, rows, index, samples in self._served(x, route):
            yield rows, group.acting(index, samples)

    def __call__(self, *inputs):
        """Apply to (x), to (x, y, weight, bias) of a layer, or to (k, v) or (k, v, h)."""
        route = self._route()
        if len(inputs) in (2, 3):
            k, v, *read = inputs
            results = []
            for rows, acting in self._parts(k, route):
                own = [taken(value, rows) for value in (k, v, *read)]
                for acts in acting:
                    own[:2] = act_on_kv(acts, own[0], own[1], *(own[2:] or [None]))
                results.append((rows, own))
            return tuple(gathered(x, [(rows, own[i]) for rows, own in results]) for i, x in enumerate((k, v)))
        if len(inputs) == 4:
            x, y, weight, bias = inputs
            results = []
            for rows, acting in self._parts(y, route):
                own_x, own_y = taken(x, rows), taken(y, rows)
                for acts in acting:
                    own_y = acts(own_x, own_y, weight, bias)
                results.append((rows, own_y))
            return gathered(y, results)
        (x,) = inputs
        return self._on_tokens(x, route)

    def _on_tokens(self, x: torch.Tensor, route: Route, *grid: tuple[int, int]):
        """Act on tokens x, or begin branches; what reads the grid is told it, if there is one."""
        if self.key[3] is not None:
            return [[_told(acts, taken(x, rows), grid) for acts in acting] for rows, acting in self._parts(x, route)]
        results = []
        for rows, acting in self._parts(x, route):
            own = taken(x, rows)
            for acts in acting:
                own = _told(acts, own, grid)
            results.append((rows, own))
        return gathered(x, results)

    def join(self, x: torch.Tensor, deltas: list[list[torch.Tensor]]) -> torch.Tensor:
        """End the branches of each group in its rows of the tokens x."""
        route = self._route()
        results = []
        for (rows, acting), carried in zip(self._parts(x, route), deltas, strict=True):
            own = taken(x, rows)
            for acts, delta in zip(acting, carried, strict=True):
                own = join(acts, own, delta)
            results.append((rows, own))
        return gathered(x, results)

    def low_rank_by_row(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """A (samples, rank, in) and B (samples, out, rank), if that B A x is added to each row is all that is done.

        None where that is not so, or where gradients are computed.
        """
        if torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
            return None
        route = self._route()
        groups = route.groups(self.key)
        if len(groups) != 1 or any(len(chain) != 1 for chain in groups[0].chains):
            return None
        (group,) = groups
        modules = [chain[0] for chain in group.chains]
        # Alike modules differ in what they say of themselves only where some of them are trained and others not.
        asked = modules if any(module.training for module in modules) else modules[:1]
        if any(_low_rank_change(module) is None for module in asked) or modules[0].A.dtype != x.dtype:
            return None
        route.check(len(x) // (1 if self.frames is None else self.frames.number))
        if not group.together:
            group.together = (Together(modules, [route.adapters[group.names[0]].owned]),)
        rows, index = group.rows(x.device)
        if rows is not None or (index is None and len(route.names) != len(modules)):
            index = route.members(group.names, x.device)
        values = group.together[0].gathered(index, missing=rows is not None)
        return values["A"] * values["scaling"][:, None, None], values["B"]


class RoutedPixels(RoutedSite):
    """A routed site of tokens that are the pixels of a map."""

    reads_grid = True

    def __call__(self, x: torch.Tensor, grid: tuple[int, int]):
        """Apply to pixels x (batch, rows * columns, width) of a map of so many rows and columns."""
        return self._on_tokens(x, self._route(), grid)


def _told(acts: Callable, x: torch.Tensor, grid: tuple):
    return acts(x, *grid) if getattr(acts, "reads_grid", False) else acts(x)


class RoutedWindows(RoutedSite):
    """A routed site inside windows, of which every sample has as many rows."""

    def _rows_each(self, x: torch.Tensor, route: Route) -> int:
        return max(1, len(x) // len(route.names))


class RoutedKeyPrompts(RoutedSite):
    """Prompts of one block that are keys and values of its attention and no tokens, of each row its adapter's.

    Args:
        routing: says which route is open.
        key: stands for the prompts of the block.
        block: the sited block, which says what its attention reads of the stream.
        frames: for clips, how many rows make one sample.
    """

    def __init__(self, routing: Routing, key: Key, block: nn.Module, frames: Frames | None):
        super().__init__(routing, key, frames)
        self.block = block

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """What the attention reads of the prompts (rows, prompts, width), where x is what it reads of tokens."""
        route, results = self._route(), []
        for group, rows, index, samples in self._served(x, route):
            own, parts = taken(x, rows), []
            for number, module in enumerate(group.chains[0]):
                if group.together:
                    prompts = group.together[number].act("prompts_for", index, samples, (own,))
                    prompts = prompts.repeat_interleave(len(own) // len(prompts), 0)  # those of a clip, of its frames
                else:
                    prompts = module.prompts_for(own).expand(len(own), -1, -1)
                parts.append(prompts)
            results.append((rows, torch.cat(parts, dim=1)))
        return self.block.attention_input(gathered(x, results), UNSEEN)


def _low_rank_change(module) -> tuple | None:
    own = next((kind.__dict__ for kind in type(module).__mro__ if "forward" in kind.__dict__), {})
    if "low_rank_change" not in own or "by_row" not in own or is_hooked(module):
        return None
    return module.low_rank_change()


def taken(x: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """These rows of x, None for all."""
    return x if rows is None else x.index_select(0, rows)


def gathered(x: torch.Tensor, results: list[tuple[torch.Tensor | None, torch.Tensor]]) -> torch.Tensor:
    """Put the groups' results back in the order of the batch."""
    if not results:
        return x
    if results[0][0] is None:
        return results[0][1]
    (shape,) = {result.shape[1:] for _, result in results}
    whole = x if shape == x.shape[1:] else x.new_zeros(len(x), *shape)
    for rows, result in results:
        whole = whole.index_copy(0, rows, result.to(whole.dtype))
    return whole


class RoutedHead:
    """The head of each sample's adapter.

    Args:
        routing: says which route is open.
        path: the model's head.
    """

    def __init__(self, routing: Routing, path: str):
        self.routing = routing
        self.path = path

    def __call__(self, x: torch.Tensor | list[torch.Tensor], own: Callable, *more) -> torch.Tensor | list:
        """Map pooled features (batch, width) to logits (batch, classes); `own` is the model's own head.

        Maps (batch, ...) go to a head for maps, those of several stages as a list; a head that takes more than them
        gives a list of what it finds in each image.

        Raises:
            UnsupportedError: heads give tensors of several shapes, or the losses of a whole batch.
        """
        apart = isinstance(x, list) or bool(more)  # these do not act together
        like = x[0] if isinstance(x, list) else x
        route = self.routing.current().route
        route.check(len(like))
        results = []
        for group in route.heads(self.path):
            rows, index = group.rows(like.device)
            part = _rows_of(x, rows)
            head = group.chains[0][0]
            together = bool(group.together) and head is not None
            if together and (apart or group.together[0].hooked() or alike_heads(head) is None or traced()):
                for number, name in enumerate(group.names):
                    own_rows, _ = route.rows((name,), like.device)
                    results.append((own_rows, in_own_precision(group.chains[number][0], _rows_of(x, own_rows), *more)))
            elif together:
                results.append((rows, _heads_on_rows(group, head, index, part)))
            else:
                results.append((rows, own(part, *more) if head is None else in_own_precision(head, part, *more)))
        if not isinstance(results[0][1], torch.Tensor):
            return _found_in_each(results, len(like))
        shapes = {part.shape[1:] for _, part in results}
        if len(shapes) > 1:
            classes = sorted({shape[0] for shape in shapes})
            raise UnsupportedError(
                f"the heads of {', '.join(map(str, route.samples))} have {classes} classes, which is no one "
                "tensor; route adapters with equally many classes, or attach them with head=False"
            )
        if results[0][0] is None:
            return results[0][1]
        result = like.new_zeros(len(like), *shapes.pop(), dtype=results[0][1].dtype)
        for rows, part in results:
            result = result.index_copy(0, rows, part)
        return result


def _rows_of(x: torch.Tensor | list[torch.Tensor], rows: torch.Tensor | None) -> torch.Tensor | list[torch.Tensor]:
    return [taken(each, rows) for each in x] if isinstance(x, list) else taken(x, rows)


def _found_in_each(results: list[tuple[torch.Tensor | None, list]], number: int) -> list:
    """What heads have found in each of so many images, in the order of the batch."""
    found: list = [None] * number
    for rows, images in results:
        if not isinstance(images, list):
            raise UnsupportedError(
                "a head that gives the losses of a batch cannot be trained in a route; train one adapter at a time"
            )
        for row, image in zip(range(number) if rows is None else rows.tolist(), images, strict=True):
            found[row] = image
    return found


def _heads_on_rows(group: Group, head: nn.Module, index: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """The logits of heads that act together, in the dtype of x, each computed in the precision of the head."""
    dtype = next((t.dtype for t in (*head.parameters(), *head.buffers()) if t.is_floating_point()), x.dtype)
    if dtype == x.dtype or torch.is_autocast_enabled(x.device.type):
        return group.together[0].act("forward", index, len(x), (x,))
    return group.together[0].act("forward", index, len(x), (x.to(dtype),)).to(x.dtype)
