"""E^2VPT: An Effective and Efficient Approach for Visual Prompt Tuning (Han et al., 2023).

https://arxiv.org/abs/2307.13770
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn as nn

from visionpeft.backbones.tower import Tower
from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.parts.base import Measure, Method, blocks_of, require
from visionpeft.methods.parts.pruned_prompts import importances, pruned_module, pruned_tensors, require_equal_pieces
from visionpeft.methods.prefix_tuning import prepend
from visionpeft.methods.vpt import VPT
from visionpeft.sites import Placement

FEWEST_PIECES = 4  # of a token, as in the authors' code


class KeyValuePrompts(nn.Module):
    """Learned keys and values (num_tokens, width) before those of the tokens: [K; k] and [V; v], or [K; v] if shared.

    Kaiming-uniform over (heads, num_tokens, head width): evenly within sqrt(6 / (num_tokens * head width)). Their
    dropout is drawn for each sample.
    """

    stackable = True

    def __init__(self, num_tokens: int, width: int, head_width: int, shared: bool, dropout: float):
        super().__init__()
        self.num_tokens = num_tokens
        bound = math.sqrt(6 / (num_tokens * head_width))
        self.keys = nn.Parameter(torch.empty(num_tokens, width).uniform_(-bound, bound))
        self.values = None if shared else nn.Parameter(torch.empty(num_tokens, width).uniform_(-bound, bound))
        self.dropout = nn.Dropout(dropout)

    def forward(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map k and v (batch, heads, tokens, head width) to (batch, heads, num_tokens + tokens, head width)."""
        values = self.keys if self.values is None else self.values
        return self._before(self.keys, k), self._before(values, v)

    def _before(self, prompts: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        alone = prepend(prompts, x[:, :, :0])  # one for each sample, so that dropout draws for each
        return torch.cat((self.dropout(alone), x), dim=2)


@dataclass(frozen=True)
class E2VPT(Method):
    """Deep prompts of `VPT`, and learned keys and values in every attention: softmax(q [K; k]^T) [V; v].

    The prompts enter and leave every block and start as those of VPT; keys and values start Kaiming-uniform, evenly
    within sqrt(6 / (num_keys * head width)). Keys are not rotated and get no relative position bias.
    With a `token_share` or `piece_share` below 1 there are two stages (`visionpeft.stages`; the command line does
    both). After the first, gates of 1 are put before the tokens of each block, gamma_k, and before each of the 16
    pieces of their channels, zeta_ke: P_k becomes gamma_k (zeta_k * P_k). Their importance is the mean over training
    samples of |d loss / d gamma_k| and |d loss / d zeta_ke|. The most important tokens of a block stay, the others are
    removed, so that nothing attends to them; of each token that stays the most important pieces are trained, the others
    are zero. Prompts, keys, values and head go back to where they began and are trained again. Keys and values are not
    pruned. Not mergeable: it adds tokens.
    In published code the importance is the signed gradient, so that what would help most goes first, that of a piece is
    that of its token, every sixteenth channel is one piece, removed tokens stay as zeros, and steps of the optimiser
    are taken while it is measured. One set of gates is shared by all blocks there. There, too, one tensor is both keys
    and values by default, although the paper draws two: that is `shared`; the default here is two.
    Trainable on L blocks of width D: L (n D + 2 num_keys D), with shared L (n D + num_keys D), where n is num_tokens,
    or in the second stage round(token_share num_tokens) round(piece_share pieces) / pieces; 138,240 on ViT-B/16 for 5
    of each, as for 10 prompts and 5 shared.
    Source: Han et al., E^2VPT: An Effective and Efficient Approach for Visual Prompt Tuning, 2023, and the authors'
    code.

    Args:
        num_tokens: prompts per block; 0 for keys and values alone.
        num_keys: keys and values per block; 0 for `VPT`.
        shared: one tensor for both keys and values.
        dropout: dropout on prompts, keys and values; the paper's runs use 0.1.
        token_share: share of the prompts of a block that stay, at least one of them; searched in the paper from 0.1 to
            0.9.
        piece_share: share of the pieces of each of these that are trained, at least four of them, as published;
            searched likewise.
        pieces: into how many pieces the channels of a prompt are cut.
        samples: how many training samples are measured, each by a backward pass of its own.
        pruned: whether they are pruned; found after the first stage, not to be given.
        blocks: which blocks, such as "all", "last:4", "3:9" or a list of indices.
        towers: which towers; by default the image tower.
    """

    found: ClassVar[tuple[str, ...]] = ("pruned",)

    num_tokens: int = 5
    num_keys: int = 5
    shared: bool = False
    dropout: float = 0.0
    token_share: float = 1.0
    piece_share: float = 1.0
    pieces: int = 16
    samples: int = 1024
    pruned: bool = False
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        counts = (self.num_tokens, self.num_keys)
        require(all(n >= 0 for n in counts), self, "num_tokens and num_keys must be integers from 0 on")
        require(any(counts), self, "num_tokens and num_keys are both 0, so that nothing would be learned")
        require(0 <= self.dropout < 1, self, f"dropout must be in [0, 1), not {self.dropout}")
        for name in ("token_share", "piece_share"):
            share = getattr(self, name)
            require(0 < share <= 1, self, f"{name} must be above 0 and at most 1, not {share}")
        for name in ("pieces", "samples"):
            require(getattr(self, name) > 0, self, f"{name} must be a positive integer")
        require(
            self.num_tokens > 0 or not self._prunes, self, "there are no prompts to prune; leave out the two shares"
        )

    @property
    def _prunes(self) -> bool:
        return self.pruned or min(self.token_share, self.piece_share) < 1

    @property
    def stages_after(self) -> int:
        """One if prompts are to be pruned, until they are."""
        return int(self._prunes and not self.pruned)

    @property
    def tokens_kept(self) -> int:
        """How many prompts of a block stay."""
        return max(1, round(self.token_share * self.num_tokens))

    @property
    def pieces_kept(self) -> int:
        """How many pieces of each of these are trained."""
        return max(min(FEWEST_PIECES, self.pieces), round(self.piece_share * self.pieces))

    def place(self, tower: Tower) -> Iterator[Placement]:
        """The prompts of `VPT`, and `KeyValuePrompts` at the `kv` site of every chosen block."""
        require(tower.patch_size is not None, self, f"the {tower.name} tower has no patches to start prompts from")
        if self._prunes:
            require_equal_pieces(self, tower, self.pieces)
        kept = self.tokens_kept, self.tokens_kept * self.pieces_kept, self.pieces, self.dropout, False
        for placement in self._prompts(tower):
            module = pruned_module(placement.module, tower, *kept) if self.pruned else placement.module
            yield replace(placement, module=module)
        if self.num_keys:
            for index in blocks_of(self, tower):
                block = tower.blocks[index]
                head_width = block.layer("q").out_features // block.num_heads
                module = KeyValuePrompts(self.num_keys, block.attention_width, head_width, self.shared, self.dropout)
                yield Placement(tower.name, index, "kv", module)

    def _prompts(self, tower: Tower) -> Iterable[Placement]:
        return VPT(self.num_tokens, dropout=self.dropout, blocks=self.blocks).place(tower) if self.num_tokens else ()

    def next_stage(
        self,
        towers: Sequence[Tower],
        part: nn.Module,
        start: Mapping[str, torch.Tensor],
        trained: Mapping[str, torch.Tensor],
        measure: Measure,
    ) -> tuple[Method, dict[str, torch.Tensor]]:
        """Choose the tokens of each block, and the pieces of each token, by what the loss makes of their gates."""
        of_tokens, of_pieces = importances(self, part, self.pieces, self.samples, measure)
        tensors = {}
        for path in of_tokens:
            tokens = of_tokens[path].topk(self.tokens_kept).indices.sort().values
            kept = of_pieces[path][tokens].topk(self.pieces_kept, dim=1).indices.sort(dim=1).values
            index = (kept + self.pieces * torch.arange(self.tokens_kept)[:, None]).flatten()
            tensors |= pruned_tensors(path, start, tokens, index, self.pieces)
        return replace(self, pruned=True), tensors
