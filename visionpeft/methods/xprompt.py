"""XPrompt: Exploring the Extreme of Prompt Tuning (Ma et al., 2022), https://arxiv.org/abs/2210.04457."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn

from visionpeft.backbones.tower import Tower
from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.parts.base import Measure, Method, require
from visionpeft.methods.parts.prompts import Prompts, RemovePrompts
from visionpeft.methods.vpt import VPT
from visionpeft.sites import Order, Placement


class PrunedPrompts(Prompts):
    """Prompts of which only some pieces are trained; the other channels are zero.

    `pieces` (number, width / pieces of a token) are those that are kept, `piece_index` (number,) where they are among
    the pieces of all tokens.

    Args:
        num_tokens: tokens.
        width: their width.
        number: pieces that are kept.
        size: width of a piece.
        at: number of prefix tokens.
        dropout: dropout on the prompts.
        spanning: whether they stay for several blocks.
    """

    stackable = False

    def __init__(self, num_tokens: int, width: int, number: int, size: int, at: int, dropout: float, spanning: bool):
        nn.Module.__init__(self)  # the prompts are no parameter here
        self.pieces = nn.Parameter(torch.zeros(number, size))
        self.register_buffer("piece_index", torch.arange(number, dtype=torch.int32))
        self.num_tokens, self.width, self.at = num_tokens, width, at
        self.dropout = nn.Dropout(dropout)
        self.order = Order.ENTER_SPAN if spanning else Order.ENTER
        self._projection = (None,)

    @property
    def prompts(self) -> torch.Tensor:
        """The tokens (num_tokens, width)."""
        size = self.pieces.shape[1]
        every = self.pieces.new_zeros(self.num_tokens * self.width // size, size)
        return every.index_copy(0, self.piece_index.long(), self.pieces).view(self.num_tokens, self.width)


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
        require(
            tower.width % self.pieces == 0,
            self,
            f"the {tower.name} tower has {tower.width} channels, which are not {self.pieces} equal pieces; "
            "give another number of pieces",
        )
        size = tower.width // self.pieces
        for placement in self._prompts().place(tower):
            module = placement.module
            spanning = not self.deep
            if self.pruned and isinstance(module, RemovePrompts):
                placement = dataclasses.replace(placement, module=RemovePrompts(self.tokens_kept, module.at, spanning))
            elif self.pruned:
                pruned = PrunedPrompts(
                    self.tokens_kept, tower.width, self.pieces_kept, size, module.at, self.dropout, spanning
                )
                placement = dataclasses.replace(placement, module=pruned)
            yield placement

    def next_stage(
        self,
        towers: Sequence[Tower],
        part: nn.Module,
        start: Mapping[str, torch.Tensor],
        trained: Mapping[str, torch.Tensor],
        measure: Measure,
    ) -> tuple[Method, dict[str, torch.Tensor]]:
        """Choose tokens and pieces by what the loss makes of their gates."""
        sets = {path: module for path, module in part.named_modules() if isinstance(module, Prompts)}
        prompts = {path: module.prompts for path, module in sets.items()}
        of_tokens = {path: torch.zeros(len(each), dtype=torch.float64) for path, each in prompts.items()}
        of_pieces = {path: torch.zeros(len(each), self.pieces, dtype=torch.float64) for path, each in prompts.items()}

        def see(gradients: tuple[torch.Tensor, ...]) -> None:
            for (path, each), gradient in zip(prompts.items(), gradients, strict=True):
                products = (each.detach() * gradient).double().cpu().view(len(each), self.pieces, -1).sum(dim=2)
                of_pieces[path] += products.abs()
                of_tokens[path] += products.sum(dim=1).abs()

        measure(list(prompts.values()), self.samples, see)
        require(
            all(each.isfinite().all() and each.any() for each in of_tokens.values()),
            self,
            "the gradients of its prompts are all zero, or not finite, so that none is more important than another",
        )
        tensors = {}
        for path in sets:
            tokens = of_tokens[path].topk(self.tokens_kept).indices.sort().values
            index = of_pieces[path][tokens].flatten().topk(self.pieces_kept).indices.sort().values
            begun = start[f"{path}.prompts"].cpu()[tokens]  # where the prompts were before the first stage
            tensors[f"{path}.pieces"] = begun.reshape(-1, begun.shape[1] // self.pieces)[index]
            tensors[f"{path}.piece_index"] = index.to(torch.int32)
        return dataclasses.replace(self, pruned=True), tensors

    def _prompts(self) -> VPT:
        return VPT(self.num_tokens, deep=self.deep, dropout=self.dropout, init=self.init, blocks=self.blocks)
