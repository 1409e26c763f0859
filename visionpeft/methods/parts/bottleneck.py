"""The bottleneck that serial and parallel adapters share."""

import math
from typing import ClassVar

import torch
import torch.nn as nn
from timm.layers import DropPath

from visionpeft.methods.parts.base import to_parameter_dtype

ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU, "identity": nn.Identity}
INITS = ("houlsby", "lora", "bert")


class Bottleneck(nn.Module):
    """A(x) = scale * drop_path(up(dropout(act(down(x))))), returned as x + A(x) if `serial`, else as A(x).

    Initialisation: "houlsby", both weights normal with standard deviation 0.01 cut at two of them, biases zero;
    "lora", down Kaiming-uniform with a = sqrt(5), everything else zero, so that A(x) = 0; "bert", both weights normal
    with standard deviation 0.02, biases zero.

    Args:
        width: width D of the tokens.
        bottleneck: width h between down (h, D) and up (D, h).
        activation: a key of `ACTIVATIONS`.
        scale: a fixed number, "learned" for one trained number, "channel" for one per channel; trained ones start at 1.
        dropout: dropout in the bottleneck.
        drop_path: probability of dropping A(x) for a whole sample while training.
        init: one of `INITS`.
        serial: whether the input is added to the result.
    """

    tokenwise = True
    padded: ClassVar = {"down": 0, "down_bias": 0, "up": 1}  # all activations map zero to zero

    def __init__(
        self,
        width: int,
        bottleneck: int,
        activation: str,
        scale: float | str,
        dropout: float,
        drop_path: float,
        init: str,
        serial: bool,
    ):
        super().__init__()
        self.down = nn.Linear(width, bottleneck)
        self.act = ACTIVATIONS[activation]()
        self.dropout = nn.Dropout(dropout)
        self.up = nn.Linear(bottleneck, width)
        self.drop_path = DropPath(drop_path)
        self.scale = scale
        if isinstance(scale, str):
            self.scale = nn.Parameter(torch.ones(width if scale == "channel" else 1))
        self.serial = serial
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.bias)
        if init == "lora":
            nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
            nn.init.zeros_(self.up.weight)
        elif init == "houlsby":
            for layer in (self.down, self.up):
                nn.init.trunc_normal_(layer.weight, std=0.01, a=-0.02, b=0.02)
        else:
            for layer in (self.down, self.up):
                nn.init.normal_(layer.weight, std=0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens (batch, tokens, width) to the same shape."""
        h = self.dropout(self.act(self.down(to_parameter_dtype(x, self.down.weight))))
        delta = (self.scale * self.drop_path(self.up(h))).to(x.dtype)
        return x + delta if self.serial else delta

    def row_values(self) -> dict[str, torch.Tensor | float]:
        """Weights, biases and the scale."""
        down, up = self.down, self.up
        weights = {"down": down.weight, "down_bias": down.bias, "up": up.weight, "up_bias": up.bias}
        return weights | {"scale": self.scale}

    def by_row(self, values: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """What `forward` gives, with weights, biases and a scale of each row (rows, ...)."""
        tokens = to_parameter_dtype(x, values["down"])
        h = torch.baddbmm(values["down_bias"][:, None], tokens, values["down"].mT)
        delta = torch.baddbmm(values["up_bias"][:, None], self.dropout(self.act(h)), values["up"].mT)
        scale = values["scale"].view(len(values["scale"]), 1, -1)
        delta = (scale * self.drop_path(delta)).to(x.dtype)
        return x + delta if self.serial else delta
