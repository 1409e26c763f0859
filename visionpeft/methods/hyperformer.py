"""HyperFormer++: Parameter-efficient Multi-task Fine-tuning via Shared Hypernetworks (Karimi Mahabadi et al., 2021).

https://arxiv.org/abs/2106.04489
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from visionpeft.backbones.tower import Tower
from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.parts.base import blocks_of, require, to_parameter_dtype
from visionpeft.methods.parts.by_task import ByTask
from visionpeft.sites import Placement, Shared
from visionpeft.sites.tasks_of_rows import rows_of

SITES = ("attn_out", "mlp_out")
STD = 0.01  # of what generates weights


class HyperNetwork(nn.Module):
    """Generates the weights of all adapters: linear in I = h([z_task; l_layer; p_position]), h two layers with ReLU.

    Embeddings are N(0, 1), what is linear in I is N(0, 0.01), and h has PyTorch's start.
    """

    def __init__(self, width: int, bottleneck: int, embedding: int, tasks: int, layers: int):
        super().__init__()
        self.tasks = nn.Parameter(torch.randn(tasks, embedding))
        self.layers = nn.Parameter(torch.randn(layers, embedding))
        self.positions = nn.Parameter(torch.randn(len(SITES), embedding))
        self.project = nn.Sequential(nn.Linear(3 * embedding, embedding), nn.ReLU(), nn.Linear(embedding, embedding))
        sizes = {"down": (bottleneck, width), "up": (width, bottleneck), "scale": (width,), "shift": (width,)}
        for name, size in sizes.items():
            setattr(self, name, nn.Parameter(nn.init.normal_(torch.empty(*size, embedding), std=STD)))
        self.width = width

    def generated(self, layer: int, position: int) -> tuple[torch.Tensor, ...]:
        """Of every task the entries of down and up (tasks, bottleneck * width), and scale and shift (tasks, width)."""
        place = torch.cat([self.layers[layer], self.positions[position]]).expand(len(self.tasks), -1)
        embedded = self.project(torch.cat([self.tasks, place], dim=-1))
        return tuple(F.linear(embedded, each.flatten(0, -2)) for each in (self.down, self.up, self.scale, self.shift))


class GeneratedAdapter(nn.Module):
    """x + scale * norm(up(gelu(down(x)))) + shift, with weights that a `HyperNetwork` generates for an image's task."""

    tokenwise = True

    def __init__(self, network: HyperNetwork, layer: int, position: int, tasks: Sequence[str]):
        super().__init__()
        self._network = (network,)  # in a tuple, because the adapter owns it once for all places
        self.place = layer, position
        self.tasks = tuple(tasks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens (rows, ..., width) to the same shape."""
        (network,) = self._network
        rows = rows_of(self.tasks, x, "HyperFormer")
        # (rows, ...) each; without the rows where all images have one task.
        down, up, scale, shift = (F.embedding(rows, each) for each in network.generated(*self.place))
        tokens = to_parameter_dtype(x.flatten(1, -2), network.down)
        hidden = F.gelu(tokens @ down.unflatten(-1, (-1, network.width)).transpose(-2, -1))
        change = F.layer_norm(hidden @ up.unflatten(-1, (network.width, -1)).transpose(-2, -1), (network.width,))
        return x + (scale.unsqueeze(-2) * change + shift.unsqueeze(-2)).view(x.shape).to(x.dtype)


@dataclass(frozen=True)
class HyperFormer(ByTask):
    """Adapters whose weights one network generates for each task, layer and place: x + s * norm(U gelu(D x)) + b.

    D (h, width), U (width, h), s and b are W_D I, W_U I, W_s I and W_b I of I = MLP([z; l; p]) (t), with embeddings z
    of the task, l of the block, and p for after the attention or after the MLP. All tasks and places share the W, which
    are N(0, 0.01), so that the change is small at the start, and the MLP (3t to t, ReLU, t to t). This is
    HyperFormer++; the plain one has networks of its own for each block. `visionpeft.of_tasks` says the task of an
    image, in a run of `MultiTask` data its label; with one task it need not be named. Not mergeable: it is not linear.
    Trainable on L blocks for T tasks: t (2 h D + 2 D + 4 t + T + L + 2) + 2 t; 902,208 on ViT-B/16 with one task.
    Source: Karimi Mahabadi, Ruder, Dehghani and Henderson, Parameter-efficient Multi-task Fine-tuning for Transformers
    via Shared Hypernetworks, 2021, as recalled, not read in its code; bottleneck and starts are those of adapters here.

    Args:
        bottleneck: width h of the adapters.
        embedding: length t of the embeddings.
        blocks: which blocks, such as "all", "last:4", "3:9" or a list of indices.
        towers: which towers, "visual" or "text" or both; by default the image tower.
        tasks: names of the tasks; those of the data are filled in by `visionpeft.fit`. With none there is one task,
            which need not be said.
    """

    bottleneck: int = 8
    embedding: int = 64
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        for name in ("bottleneck", "embedding"):
            require(getattr(self, name) > 0, self, f"{name} must be a positive integer")

    def place(self, tower: Tower) -> Iterator[Placement | Shared]:
        """The network, and an adapter after the attention and after the MLP of the chosen blocks."""
        blocks = blocks_of(self, tower)
        network = HyperNetwork(
            tower.width_of(blocks), self.bottleneck, self.embedding, self.number_of_tasks, len(blocks)
        )
        yield Shared(tower.name, "network", network)
        for layer, index in enumerate(blocks):
            for position, site in enumerate(SITES):
                yield Placement(tower.name, index, site, GeneratedAdapter(network, layer, position, self.tasks))
