"""XPrompt: Exploring the Extreme of Prompt Tuning (Ma et al., 2022), https://arxiv.org/abs/2210.04457."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn as nn

from visionpeft.backbones.tower import Tower
from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.parts.base import Measure, Method, require
from visionpeft.methods.parts.pruned_prompts import importances, pruned_module, pruned_tensors, require_equal_pieces
from visionpeft.methods.vpt import VPT
from visionpeft.sites import Placement


@dataclass(frozen=True)
class XPrompt(Method):
    """Prompts trained, pruned by tokens and by pieces of tokens, and trained again from their start.

    Two stages (`visionpeft.stages`; the command line does both). The first trains the prompts of `VPT`. Then a gate of
    1 is put before each token, gamma_k, and before each of the pieces of its channels, zeta_ke: P_k becomes
    gamma_k (zeta_k * P_k). Their importance is the mean over training samples of |d loss / d gamma_k| and
    |d loss / d zeta_ke|, measured in one pass with all gates at 1. The most important tokens of each set of prompts
    stay, the others are removed, so that nothing attends to them, and of the pieces of those that stay the most
    important are trained; the others are zero. Everything goes back to where it began and is trained again. Not
    mergeable: it adds tokens.
    Trained in the end, for n tokens of width D in each set: round(piece_share pieces round(token_share n)) D / pieces;
    3,840 on ViT-B/16 by default.
    Source: Ma et al., XPrompt: Exploring the Extreme of Prompt Tuning, 2022, whose code is not published; the formulas
    and the 16 pieces are recalled, not checked, and the shares are searched there between 0.1 and 0.9.

    Args:
        num_tokens: prompts of a set, before they are pruned.
        token_share: share of the tokens that stay.
        piece_share: share of the pieces of these that are trained.
        pieces: into how many pieces the channels of a token are cut.
        samples: how many training samples are measured, each by a backward pass of its own.
        deep: a set for every block, or one that travels through all, as in the paper.
        dropout: dropout on the prompts.
        init: "uniform" as in `VPT`, or "normal" with standard deviation 0.02 (towers without patches).
        pruned: whether they are pruned; found after the first stage, not to be given.
        blocks: which blocks, such as "all", "last:4", "3:9" or a list of indices.
        towers: which towers, "visual" or "text" or both; by default the image tower.
    """

    found: ClassVar[tuple[str, ...]] = ("pruned",)

    num_tokens: int = 20
    token_share: float = 0.5
    piece_share: float = 0.5
    pieces: int = 16
    samples: int = 1024
    deep: bool = False
    dropout: float = 0.0
    init: str = "uniform"
    pruned: bool = False
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        for name in ("token_share", "piece_share"):
            share = getattr(self, name)
            require(0 < share <= 1, self, f"{name} must be above 0 and at most 1, not {share}")
        require(self.pieces > 0, self, "pieces must be a positive integer")
        require(self.samples > 0, self, "samples must be a positive integer")
        require(self.num_tokens > 0, self, "num_tokens must be a positive integer")
        self._prompts()  # refuses what is wrong with the rest

    @property
    def stages_after(self) -> int:
        """One, until they are pruned."""
        return 0 if self.pruned else 1

    @property
    def tokens_kept(self) -> int:
        """How many tokens of a set stay."""
        return max(1, round(self.token_share * self.num_tokens))

    @property
    def pieces_kept(self) -> int:
        """How many pieces of these are trained."""
        return max(1, round(self.piece_share * self.tokens_kept * self.pieces))

    def place(self, tower: Tower) -> Iterator[Placement]:
        """Prompts at `stream_in`, their removal at `stream_out`, as `VPT` places them."""
        require_equal_pieces(self, tower, self.pieces)
        kept = self.tokens_kept, self.pieces_kept, self.pieces, self.dropout, not self.deep
        for placement in self._prompts().place(tower):
            module = pruned_module(placement.module, tower, *kept) if self.pruned else placement.module
            yield dataclasses.replace(placement, module=module)

    def next_stage(
        self,
        towers: Sequence[Tower],
        part: nn.Module,
        start: Mapping[str, torch.Tensor],
        trained: Mapping[str, torch.Tensor],
        measure: Measure,
    ) -> tuple[Method, dict[str, torch.Tensor]]:
        """Choose tokens and pieces by what the loss makes of their gates."""
        of_tokens, of_pieces = importances(self, part, self.pieces, self.samples, measure)
        tensors = {}
        for path in of_tokens:
            tokens = of_tokens[path].topk(self.tokens_kept).indices.sort().values
            index = of_pieces[path][tokens].flatten().topk(self.pieces_kept).indices.sort().values
            tensors |= pruned_tensors(path, start, tokens, index, self.pieces)
        return dataclasses.replace(self, pruned=True), tensors

    def _prompts(self) -> VPT:
        return VPT(self.num_tokens, deep=self.deep, dropout=self.dropout, init=self.init, blocks=self.blocks)
