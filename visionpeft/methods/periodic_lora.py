"""PeriodicLoRA: Breaking the Low-Rank Bottleneck in LoRA Optimization (Meng et al., 2024).

https://arxiv.org/abs/2402.16141
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn

from visionpeft.backbones.tower import Tower
from visionpeft.methods.parts.base import Measure, Method, require
from visionpeft.methods.relora import ReLoRA, fresh, grown_of


@dataclass(frozen=True)
class PeriodicLoRA(ReLoRA):
    """LoRA that is unloaded into the weights after each period, whole or by a share, so that the change grows in rank.

    `restarts` + 1 stages (`visionpeft.stages`; the command line does all), each from where the last one ended and with
    a new optimiser. At a restart W becomes W + unloaded (alpha / rank) B A. Unloaded whole, A is drawn again and B is
    zero, which is `ReLoRA`; otherwise A stays and B becomes (1 - unloaded) B, "momentum" for the next period. Outputs
    stay what they are. As there, the backbone is never written: what was unloaded is kept as pairs that are no longer
    trained, and `save` writes the change, of up to (restarts + 1) rank ranks, as `LoRA` of as many: exactly, and not as
    a dense change. Mergeable.
    Trained in each stage: sum over target layers of rank * (in + out); 294,912 on ViT-B/16 for rank 8 on q and v.
    Source: Meng, Dai, Luo et al., PeriodicLoRA: Breaking the Low-Rank Bottleneck in LoRA Optimization, 2024, whose code
    is not published; its unloading with momentum is recalled, not checked. In a code of others, hhnqqq/MyTransformers,
    both A and B are multiplied by 1 - unloaded, so that outputs jump at a restart; here they do not.

    Args:
        rank: rank of the change that is trained.
        alpha: numerator of the scale alpha / rank; None for a scale of 1.
        restarts: how often it is unloaded.
        targets: layers, out of q k v proj fc1 fc2 gate; fc1 covers both halves of a gated MLP.
        dropout: dropout on the input of A.
        restarted: how often it has been unloaded; found after a stage, not to be given.
        blocks: which blocks, such as "all", "last:4", "3:9" or a list of indices.
        towers: which towers, "visual" or "text" or both; by default the image tower.
        unloaded: share of the change that is added to the weight at a restart.
    """

    unloaded: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        require(0 < self.unloaded <= 1, self, f"unloaded must be above 0 and at most 1, not {self.unloaded}")

    def next_stage(
        self,
        towers: Sequence[Tower],
        part: nn.Module,
        start: Mapping[str, torch.Tensor],
        trained: Mapping[str, torch.Tensor],
        measure: Measure,
    ) -> tuple[Method, dict[str, torch.Tensor]]:
        """Unload, and go on beside it."""
        tensors = {}
        for path, module in grown_of(part).items():
            up, down = module.up.detach(), module.down.detach()
            tensors |= {
                f"{path}.earlier_down": module.A.detach().clone(),
                f"{path}.earlier_up": torch.cat([module.earlier_up, self.unloaded * up], dim=1),
                f"{path}.down": fresh(*down.shape) if self.unloaded == 1 else down.clone(),
                f"{path}.up": (1 - self.unloaded) * up,
            }
        return dataclasses.replace(self, restarted=self.restarted + 1), tensors
