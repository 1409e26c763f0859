"""Improving Visual Prompt Tuning for Self-supervised Vision Transformers (Yoo et al., 2023).

https://arxiv.org/abs/2306.05067
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn

from visionpeft.backbones.tower import Tower
from visionpeft.errors import UnsupportedError
from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.parts.base import Method, require
from visionpeft.methods.parts.prompts import Prompts, RemovePrompts
from visionpeft.methods.vpt import VPT
from visionpeft.sites import Placement

TEMPERATURES = (0.01, 10.0)
POOLINGS = ("model", "mean")


class PromptGate(nn.Module):
    """A branch around a block: the prompts become sigmoid(logit) * after + (1 - sigmoid(logit)) * before.

    Args:
        prompts: the module whose prompts it gates; other tokens stay as they are.
        logit: where the one trained number starts.
    """

    stackable = True

    def __init__(self, prompts: Prompts, logit: float):
        super().__init__()
        self.logit = nn.Parameter(torch.full((1,), float(logit)))
        self._prompts = (prompts,)  # in a tuple, because it has its own place in the adapter

    @property
    def located_at(self) -> nn.Module:
        """The module whose prompts it gates."""
        return self._prompts[0]

    def forward(self, x: torch.Tensor, first: int) -> torch.Tensor:
        """The prompts (batch, num_tokens, width) among tokens (batch, tokens, width), the first of them at `first`."""
        return x[:, first : first + self.located_at.num_tokens]

    def join(self, x: torch.Tensor, before: torch.Tensor, first: int) -> torch.Tensor:
        """Mix the prompts among the tokens x after the block with those before it."""
        after = self(x, first)
        mixed = (before + self.logit.sigmoid() * (after - before)).to(x.dtype)
        return torch.cat((x[:, :first], mixed, x[:, first + after.shape[1] :]), dim=1)


class Temperature(nn.Module):
    """Attention softmax(q k^T / (temperature sqrt(d))) v with one trained number, one at the start.

    It is kept within `TEMPERATURES`; beyond, the gradient is that of the border.
    """

    stackable = True

    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(1))

    def forward(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map k and v (batch, heads, tokens, head width) to the same shapes."""
        with torch.no_grad():
            excess = self.temperature - self.temperature.clamp(*TEMPERATURES)
        return (k / (self.temperature - excess)).to(k.dtype), v


class PooledPrompts(RemovePrompts):
    """Puts the mean of prompts and patches in the place of the class token, then removes the prompts.

    What follows in a tower that reads its class token is its own norm of that mean. Other prompts that are still there,
    because they travel around these, are part of it.
    """

    stackable = True
    tokenwise = False
    reads_all_patches = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens (batch, tokens + num_tokens, width) to (batch, tokens, width)."""
        mean = x[:, self.at :].mean(dim=1, keepdim=True)
        return super().forward(torch.cat((mean, x[:, 1:]), dim=1))


@dataclass(frozen=True)
class GatedVPT(Method):
    """Shallow prompts that each block may change as far as its gate lets it, and a temperature for every attention.

    Prompts enter before the first chosen block as those of `VPT(deep=False)`. After every block but the last they
    become g P_out + (1 - g) P_in with g = sigmoid(logit); as the logit starts at -gate, they first reach the last block
    almost as they are. The attention of each block, of all tokens, is softmax(q k^T / (t sqrt(d))) v with t = 1 at the
    start, kept within 0.01 and 10. Not mergeable: it adds tokens.
    The authors' results with MAE pool the mean of prompts and patches and normalise it with the pretrained norm: that
    is `pooling="mean"`, for towers that otherwise read their class token. (timm's own average pooling, of patches only,
    has a norm after pooling that is not the pretrained one, or with fc_norm=False normalises first.)
    Trainable on L blocks of width D: num_tokens D + (L - 1) + L; 76,823 on ViT-B/16 for 100 prompts.
    Source: Yoo et al., Improving Visual Prompt Tuning for Self-supervised Vision Transformers, 2023.

    Args:
        num_tokens: prompts.
        gate: the logits of all gates start at -gate; the authors use 10, and 5 in their example.
        dropout: dropout on the prompts; 0.1 in the paper.
        pooling: "model" for what the model reads anyway, or "mean" of prompts and patches, as the authors have with
            MAE.
        init: of the prompts, "uniform" as in `VPT`, or "normal" with standard deviation 0.02 (towers without patches).
        blocks: which blocks, consecutive, such as "all", "last:4" or "3:9".
        towers: which towers, "visual" or "text" or both; by default the image tower.
    """

    name = "gated_vpt"  # no word boundary in the capitals

    num_tokens: int = 100
    gate: float = 10.0
    dropout: float = 0.1
    init: str = "uniform"
    pooling: str = "model"
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        require(self.num_tokens > 0, self, "num_tokens must be a positive integer")
        require(0 <= self.dropout < 1, self, f"dropout must be in [0, 1), not {self.dropout}")
        require(self.pooling in POOLINGS, self, f"pooling must be 'model' or 'mean', not {self.pooling!r}")
        self._prompts()

    def _prompts(self) -> VPT:
        return VPT(self.num_tokens, deep=False, dropout=self.dropout, init=self.init, blocks=self.blocks)

    def place(self, tower: Tower) -> Iterator[Placement]:
        """The prompts of `VPT`, a `PromptGate` around every block but the last, a `Temperature` at every `kv`."""
        enter, leave = self._prompts().place(tower)
        if self.pooling == "mean":
            last = leave.block == tower.depth - 1
            require(last, self, f"pooling='mean' needs the prompts to reach the last block, not blocks={self.blocks!r}")
            if not tower.pools_class_token:
                raise UnsupportedError(
                    "GatedVPT: pooling='mean' takes the place of the class token, but this model reads other tokens "
                    "after the last block; use pooling='model', or for timm create the model with global_pool='token'"
                )
            pooled = PooledPrompts(leave.module.num_tokens, leave.module.at, spanning=True)
            leave = dataclasses.replace(leave, module=pooled)
        yield from (enter, leave)
        for index in range(enter.block, leave.block + 1):
            yield Placement(tower.name, index, "kv", Temperature())
            if index < leave.block:
                gate = PromptGate(enter.module, -self.gate)
                yield Placement(tower.name, index, "stream_in", gate, add="stream_out", name="gate")
