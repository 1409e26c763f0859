"""AdapterFusion: Non-Destructive Task Composition for Transfer Learning (Pfeiffer et al., 2021).

https://arxiv.org/abs/2005.00247
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn as nn

from visionpeft.methods.adapter import Adapter, AfterScaling
from visionpeft.methods.adaptformer import AdaptFormer
from visionpeft.methods.parts.base import Method, require, to_parameter_dtype
from visionpeft.methods.parts.bottleneck import Bottleneck
from visionpeft.methods.parts.frozen_sources import Frozen, OverAdapters, weighted
from visionpeft.sites import Placement

OFF_DIAGONAL = 1e-6


class Fusion(nn.Module):
    """x + sum_n a_n V z_n, or without x beside a branch: attention of a token x over what frozen adapters give for it.

    z_n = A_n(x) without residual, a = softmax_n((Q x + b_q) . (K z_n + b_k) / temperature). Q and K are N(0, 0.02),
    their biases zero, V is the identity with 1e-6 off its diagonal.
    """

    stackable = True
    tokenwise = True

    def __init__(self, adapters: Sequence[Bottleneck], temperature: float | None):
        super().__init__()
        self.serial = adapters[0].serial
        for adapter in adapters:
            adapter.serial = False
        self.frozen = Frozen(adapters)
        width = adapters[0].down.in_features
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        for layer in (self.query, self.key):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.value = nn.Linear(width, width, bias=False)
        self.value.weight.data = torch.full((width, width), OFF_DIAGONAL).fill_diagonal_(1.0)
        self.temperature = math.sqrt(width) if temperature is None else temperature

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens (batch, tokens, width) to the same shape."""
        h = to_parameter_dtype(x, self.query.weight)
        outputs = [adapter(h) for adapter in self.frozen]
        query = self.query(h)
        scores = torch.stack([(query * self.key(output)).sum(dim=-1) for output in outputs], dim=-1)
        shares = (scores / self.temperature).softmax(dim=-1)
        # V is linear, so that one product is enough for all of them.
        result = self.value(weighted(outputs, shares)).to(x.dtype)
        return x + result if self.serial else result

    def distance(self) -> torch.Tensor:
        """The sum of squares of V - I."""
        identity = torch.eye(len(self.value.weight), dtype=self.value.weight.dtype, device=self.value.weight.device)
        return (self.value.weight - identity).square().sum()


@dataclass(frozen=True)
class AdapterFusion(OverAdapters):
    """Attention over several trained adapters, which stay frozen: x + sum_n a_n V A_n(x) in the place of x + A(x).

    a = softmax_n((Q x + b_q) . (K A_n(x) + b_k) / temperature) for every token, with Q, K (N(0, 0.02)) and V (identity,
    1e-6 off its diagonal) of each place of the adapters: near their mean at the start. To the loss is added
    regularisation * sum |V - I|^2. The tasks do this by themselves, a training loop of your own with `penalty(model)`.
    In published code the scores are not divided. There x is the output of a norm; in a ViT it is not, so that scores
    have no natural size: the default divides by sqrt(D), which is our choice.

    The adapters are `Adapter` or `AdaptFormer` of the same placement and blocks, of any bottleneck (`AdaMix` counts as
    the adapter it is saved as), not with `after_scaling`. They are copied: the new adapter is saved with them, and they
    need not stay attached, nor act beside it. Not mergeable: it is not linear.
    Trainable: 3 D^2 + 2 D for each place; 21,252,096 on ViT-B/16 with one place in every block.
    Source: Pfeiffer, Kamath, Rücklé, Cho and Gurevych, AdapterFusion: Non-Destructive Task Composition for Transfer
    Learning, 2021, its starts and penalty as in adapter-hub/adapters.

    Args:
        adapters: names of the attached adapters; on the command line, the folders of saved ones.
        temperature: what the scores are divided by; None for the square root of the width, 1 as published.
        regularisation: factor of the penalty.
        towers: which towers, "visual" or "text" or both; by default the image tower.
        sources: class and fields of the adapters' methods; found by `attach`, not to be given.
    """

    kinds: ClassVar[tuple[type[Method], ...]] = (Adapter, AdaptFormer)

    temperature: float | None = None
    regularisation: float = 0.01
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        positive = self.temperature is None or self.temperature > 0
        require(positive, self, f"temperature must be positive, not {self.temperature}")
        require(self.regularisation >= 0, self, f"regularisation must not be negative, but is {self.regularisation}")

    def mix(self, modules: Sequence[nn.Module], placement: Placement) -> Fusion:
        """One `Fusion` at every place of the adapters."""
        before = not any(isinstance(module, AfterScaling) for module in modules)
        require(before, self, "adapters with after_scaling read what a branch has added, over which it cannot attend")
        return Fusion(modules, self.temperature)

    def penalty(self, part: nn.Module) -> torch.Tensor | float:
        """regularisation * sum |V - I|^2 over all places."""
        return self.regularisation * sum(each.distance() for each in part.modules() if isinstance(each, Fusion))
