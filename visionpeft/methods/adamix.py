"""AdaMix: Mixture-of-Adaptations for Parameter-efficient Model Tuning (Wang et al., 2022).

https://arxiv.org/abs/2205.12410
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from visionpeft.backbones.tower import Tower
from visionpeft.methods.adapter import Adapter
from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.parts.base import Method, blocks_of, require, to_parameter_dtype
from visionpeft.methods.parts.bottleneck import ACTIVATIONS, INITS, Bottleneck
from visionpeft.methods.parts.trees import tree_of
from visionpeft.sites import Placement


class MixedBottleneck(nn.Module):
    """x + up_j(dropout(act(down_i x))): while training i and j are drawn in every pass, otherwise weights are averaged.

    down (experts, bottleneck, width) and up (experts or 1, width, bottleneck) start as so many `Bottleneck`, each drawn
    for itself.
    """

    tokenwise = True

    def __init__(
        self, width: int, bottleneck: int, experts: int, shared_up: bool, activation: str, dropout: float, init: str
    ):
        super().__init__()
        self.settings = {"width": width, "bottleneck": bottleneck, "activation": activation, "dropout": dropout}
        self.settings |= {"scale": 1.0, "drop_path": 0.0, "init": init, "serial": True}
        numbers = {"down": experts, "up": 1 if shared_up else experts}
        for side, (rows, columns) in {"down": (bottleneck, width), "up": (width, bottleneck)}.items():
            # All at once, so that a number no memory holds is refused before any is drawn.
            self.register_parameter(f"{side}_weight", nn.Parameter(torch.empty(numbers[side], rows, columns)))
            self.register_parameter(f"{side}_bias", nn.Parameter(torch.empty(numbers[side], rows)))
        for index in range(experts):
            drawn = Bottleneck(**self.settings)
            for side in ("down", "up"):
                if index < numbers[side]:
                    getattr(self, f"{side}_weight").data[index] = getattr(drawn, side).weight.detach()
                    getattr(self, f"{side}_bias").data[index] = getattr(drawn, side).bias.detach()
        self.act = ACTIVATIONS[activation]()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens (batch, tokens, width) to the same shape."""
        h = F.linear(to_parameter_dtype(x, self.down_weight), *self.acting("down"))
        return x + F.linear(self.dropout(self.act(h)), *self.acting("up")).to(x.dtype)

    def acting(self, side: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias of one side, drawn or averaged."""
        tensors = getattr(self, f"{side}_weight"), getattr(self, f"{side}_bias")
        number = len(tensors[0])
        if not self.training or number == 1:
            return tuple(tensor.mean(dim=0) for tensor in tensors)
        # Picked from all of them, so that those not drawn have a gradient of zero and processes wait for none.
        index = torch.randint(number, (1,), device=tensors[0].device)
        return tuple(tensor.index_select(0, index)[0] for tensor in tensors)

    def collapsed(self) -> Bottleneck:
        """The bottleneck with the averaged weights."""
        single = Bottleneck(**self.settings).to(self.down_weight)
        for side in ("down", "up"):
            layer = getattr(single, side)
            for part in ("weight", "bias"):
                getattr(layer, part).data = getattr(self, f"{side}_{part}").detach().mean(dim=0)
        return single


@dataclass(frozen=True)
class AdaMix(Method):
    """Adapters of several down- and up-projections, drawn at random while training, and averaged afterwards.

    m + up_j(act(down_i m)) on the output m of the MLP, before layer scale and residual: in every training pass each
    block draws i and j for the whole batch. To the loss is added consistency * (KL(p || q) + KL(q || p)) / 2 for the
    class probabilities p of the pass and q of a second one with other draws, each KL with its target detached, mean
    over the batch; so a step costs two passes. In evaluation mode the mean of the projections acts, and `save` writes
    it as an `Adapter` of placement pfeiffer: the same to the bit, by definition and not by algebra, as the mean is none
    of the networks that were trained. The projections are drawn each for itself, near identity; in published code they
    are copies of one, which stay equal where nothing draws them anew. Not mergeable: it is not linear.
    The tasks do this by themselves. A training loop of your own adds `penalty(model, logits, again=lambda:
    model(images))` to the loss.
    Trainable on L blocks of width D and bottleneck h: L (experts (D h + h) + D h + D); 747,264 on ViT-B/16, of which
    304,320 are saved.
    Source: Wang et al., AdaMix: Mixture-of-Adaptations for Parameter-efficient Model Tuning, 2022, and the authors'
    code (microsoft/AdaMix), whose numbers the defaults are.

    Args:
        experts: number of projections.
        bottleneck: width h.
        shared_up: whether there is a single up-projection.
        consistency: factor of the symmetric divergence; 0 for none, and a single pass.
        activation: gelu, relu, silu or identity.
        dropout: dropout in the bottleneck.
        init: "houlsby" (near identity), "lora" (identity at the start) or "bert".
        blocks: which blocks, such as "all", "last:4", "3:9" or a list of indices.
        towers: which towers, "visual" or "text" or both; by default the image tower.
    """

    experts: int = 4
    bottleneck: int = 16
    shared_up: bool = True
    consistency: float = 1.0
    activation: str = "gelu"
    dropout: float = 0.0
    init: str = "houlsby"
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        for name in ("experts", "bottleneck"):
            value = getattr(self, name)
            require(value > 0, self, f"{name} must be a positive integer")
        require(self.consistency >= 0, self, f"consistency must not be negative, but is {self.consistency}")
        require(0 <= self.dropout < 1, self, f"dropout must be in [0, 1), not {self.dropout}")
        for name, allowed in (("activation", ACTIVATIONS), ("init", INITS)):
            value = getattr(self, name)
            require(value in allowed, self, f"{name} must be one of {', '.join(allowed)}, not {value!r}")

    def place(self, tower: Tower) -> Iterator[Placement]:
        """One `MixedBottleneck` at `mlp_out` of every chosen block."""
        for index in blocks_of(self, tower):
            module = MixedBottleneck(
                *(tower.blocks[index].width, self.bottleneck, self.experts, self.shared_up),
                *(self.activation, self.dropout, self.init),
            )
            yield Placement(tower.name, index, "mlp_out", module)

    @property
    def compares_passes(self) -> bool:
        """Whether there is a consistency loss."""
        return self.consistency > 0

    def compare_passes(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """consistency * (KL(p || q) + KL(q || p)) / 2, mean over the batch; p and q are the softmax of the logits."""
        logs = [logits.float().log_softmax(dim=-1) for logits in (first, second)]
        both = sum(
            F.kl_div(log_own, log_target.detach(), reduction="batchmean", log_target=True)
            for log_own, log_target in (logs, logs[::-1])
        )
        return self.consistency * both / 2

    def fold(self, part: nn.Module) -> tuple[Adapter, nn.Module]:
        """An `Adapter` of the averaged projections."""
        mixed = {path: module for path, module in part.named_modules() if isinstance(module, MixedBottleneck)}
        adapter = Adapter(
            bottleneck=self.bottleneck,
            placement="pfeiffer",
            activation=self.activation,
            dropout=self.dropout,
            init=self.init,
            blocks=self.blocks,
            towers=self.towers,
        )
        return adapter, tree_of({path: module.collapsed() for path, module in mixed.items()})
