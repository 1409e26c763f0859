"""SPT: Learning to Selectively Insert Prompts for Better Prompt Tuning (Zhu and Tan, 2023).

https://aclanthology.org/2023.emnlp-main.727
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn as nn

from visionpeft.backbones.tower import Tower
from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.parts.base import Measure, Method, blocks_of, require
from visionpeft.methods.parts.prompts import uniform_prompts
from visionpeft.methods.parts.propagation import FromSource, LearnedPrompts, Propagation, travelling
from visionpeft.sites import Placement


class GatedPropagation(Propagation):
    """Before a block, x_P <- (1 - g) x_P + g source(x) with g = sigmoid(gate); the gate starts at zero, g at 1/2."""

    stackable = False

    def __init__(self, source: nn.Module, prompts: FromSource):
        super().__init__(source, prompts, keep=0.0, add=1.0)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor, first: int) -> torch.Tensor:
        """Map tokens (batch, tokens, width), the first prompt of them at index `first`, to the same shape."""
        stop, share = first + self.located_at.num_tokens, self.gate.sigmoid()
        changed = (1 - share) * x[:, first:stop] + share * self.source(x, stop)
        return torch.cat((x[:, :first], changed.to(x.dtype), x[:, stop:]), dim=1)


@dataclass(frozen=True)
class SelectivePrompts(Method):
    """Prompts that travel through all blocks, and new ones in their place before the blocks where that helps most.

    Two stages (`visionpeft.stages`; the command line does both). In the first, before every block but the first chosen
    one, the prompts that the block before has left become (1 - g_l) x_P + g_l P_l, with learned P_l and a gate g_l =
    sigmoid(a_l), 1/2 at the start. Prompts are trained on a part of the training data, and a by `visionpeft.Selection`
    on the rest, the share `held_out`, never on validation or test data. Then the `share` of these blocks with the
    largest gates get new prompts in the place of those that travel; before the others these stay as they are.
    Everything goes back to where it began and is trained again on all data. With none of them it is `VPT(deep=False)`,
    with all `VPT(deep=True)`. P start as those of VPT. Not mergeable: it adds tokens.
    Trained in the end, with k such blocks, for width D: (1 + k) num_tokens D; 38,400 on ViT-B/16 for k = 4 of 11. In
    the first stage L (num_tokens D + 1) - 1.
    Source: Zhu, Tan, SPT: Learning to Selectively Insert Prompts for Better Prompt Tuning, 2023, whose code is not
    published; the formulas are recalled, not checked, as is that the gates are learnt as in DARTS. Two parts of it that
    are recalled less well, a gate drawn again in training and a loss of consistency between two of them, are left out.
    It is not `SPT`, which shares its name.

    Args:
        num_tokens: prompts.
        share: share of the blocks after the first before which prompts are new, at least one of them.
        held_out: share of the training data on which the gates are learnt.
        selection_lr: learning rate of the gates.
        dropout: dropout on the prompts, drawn for each sample.
        renewed: names of the blocks with new prompts; found after the first stage, not to be given.
        blocks: which blocks, consecutive, such as "all", "last:4" or "3:9".
        towers: which towers; by default the image tower.
    """

    found: ClassVar[tuple[str, ...]] = ("renewed",)

    num_tokens: int = 10
    share: float = 0.4
    held_out: float = 0.3
    selection_lr: float = 0.01
    dropout: float = 0.0
    renewed: list[str] | None = None
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        require(self.num_tokens > 0, self, "num_tokens must be a positive integer")
        require(0 < self.share < 1, self, f"share must be between 0 and 1, not {self.share}; VPT has none, or all")
        require(0 < self.held_out < 1, self, f"held_out must be between 0 and 1, not {self.held_out}")
        require(self.selection_lr > 0, self, f"selection_lr must be positive, not {self.selection_lr}")
        require(0 <= self.dropout < 1, self, f"dropout must be in [0, 1), not {self.dropout}")

    @property
    def stages_after(self) -> int:
        """One, until the blocks are selected."""
        return 1 if self.renewed is None else 0

    def place(self, tower: Tower) -> Iterator[Placement]:
        """Prompts that enter the first chosen block and leave the last, and what changes them on their way."""
        require(tower.patch_size is not None, self, f"the {tower.name} tower has no patches to start prompts from")
        blocks = blocks_of(self, tower)
        require(len(blocks) > 1, self, "there is one block alone, so that nothing can be selected; use VPT")
        sources = [LearnedPrompts(uniform_prompts(tower, self.num_tokens), self.dropout) for _ in blocks]
        for placement in travelling(self, tower, blocks, sources, self.num_tokens, keep=0.0, add=1.0):
            module = placement.module
            if type(module) is Propagation and self.renewed is None:
                module = GatedPropagation(module.source, module.located_at)
            elif type(module) is Propagation and f"{tower.name}.{placement.block}" not in self.renewed:
                continue
            yield dataclasses.replace(placement, module=module)

    def selects(self, part: nn.Module) -> list[nn.Parameter]:
        """In the first stage, the gates."""
        return [module.gate for module in _gated(part).values()]

    def next_stage(
        self,
        towers: Sequence[Tower],
        part: nn.Module,
        start: Mapping[str, torch.Tensor],
        trained: Mapping[str, torch.Tensor],
        measure: Measure,
    ) -> tuple[Method, dict[str, torch.Tensor]]:
        """Keep the new prompts of the blocks with the largest gates, in each tower for itself."""
        gates = {path: module.gate.item() for path, module in _gated(part).items()}
        renewed = []
        for tower in towers:
            own = [path for path in gates if path.startswith(f"{tower.name}.")]
            kept = max(1, round(self.share * len(own)))
            differ = len({gates[path] for path in own}) > 1 or len(own) == kept
            require(differ, self, "its gates are all equal, so that no block is better than another")
            best = sorted(own, key=lambda path: gates[path], reverse=True)[:kept]
            renewed += [path.rpartition(".")[0] for path in own if path in best]
        return dataclasses.replace(self, renewed=renewed), {}


def _gated(part: nn.Module) -> dict[str, GatedPropagation]:
    """By path, <tower>.<block>.stream_in."""
    return {path: module for path, module in part.named_modules() if isinstance(module, GatedPropagation)}
