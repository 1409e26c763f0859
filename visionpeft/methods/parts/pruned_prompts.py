"""Prompts of which only some pieces are trained, and what the loss makes of gates before tokens and pieces."""

from collections.abc import Mapping

import torch
import torch.nn as nn

from visionpeft.backbones.tower import Tower
from visionpeft.methods.parts.base import Measure, Method, require
from visionpeft.methods.parts.prompts import Prompts, RemovePrompts
from visionpeft.sites import Order


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


def pruned_module(
    module: nn.Module, tower: Tower, tokens: int, number: int, pieces: int, dropout: float, spanning: bool
) -> nn.Module:
    """What acts in the second stage in the place of a module of the first: prompts, or what removes them.

    Args:
        module: that of the first stage.
        tower: where it acts.
        tokens: prompts that are kept.
        number: pieces of these that are trained.
        pieces: into how many pieces the channels of a token are cut.
        dropout: dropout on the prompts.
        spanning: whether they stay for several blocks.
    """
    if isinstance(module, RemovePrompts):
        return RemovePrompts(tokens, module.at, spanning)
    return PrunedPrompts(tokens, tower.width, number, tower.width // pieces, module.at, dropout, spanning)


def importances(
    method: Method, part: nn.Module, pieces: int, samples: int, measure: Measure
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Sums over samples of |d loss / d gate| of gates of 1 before tokens (n,) and before their pieces (n, pieces).

    By the path of each set of prompts. A gate's gradient is the product of what it multiplies and of that one's
    gradient, so that one pass is enough for all of them.

    Args:
        method: the method, for what is said in an error.
        part: its modules.
        pieces: into how many pieces the channels of a token are cut.
        samples: how many training samples are measured.
        measure: gradients of the loss of training samples.

    Raises:
        ConfigurationError: the gradients are zero, or not finite.
    """
    prompts = {path: module.prompts for path, module in part.named_modules() if isinstance(module, Prompts)}
    of_tokens = {path: torch.zeros(len(each), dtype=torch.float64) for path, each in prompts.items()}
    of_pieces = {path: torch.zeros(len(each), pieces, dtype=torch.float64) for path, each in prompts.items()}

    def see(gradients: tuple[torch.Tensor, ...]) -> None:
        for (path, each), gradient in zip(prompts.items(), gradients, strict=True):
            products = (each.detach() * gradient).double().cpu().view(len(each), pieces, -1).sum(dim=2)
            of_pieces[path] += products.abs()
            of_tokens[path] += products.sum(dim=1).abs()

    measure(list(prompts.values()), samples, see)
    require(
        all(each.isfinite().all() and each.any() for each in of_tokens.values()),
        method,
        "the gradients of its prompts are all zero, or not finite, so that none is more important than another",
    )
    return of_tokens, of_pieces


def pruned_tensors(
    path: str, start: Mapping[str, torch.Tensor], tokens: torch.Tensor, index: torch.Tensor, pieces: int
) -> dict[str, torch.Tensor]:
    """Tensors of `PrunedPrompts` that are where a set of prompts was at its start.

    Args:
        path: of the set.
        start: the tensors of the method, as they were before the first stage.
        tokens: the tokens that are kept, ascending.
        index: the pieces that are kept, counted through these tokens.
        pieces: into how many pieces the channels of a token are cut.
    """
    begun = start[f"{path}.prompts"].cpu()[tokens]
    kept = begun.reshape(-1, begun.shape[1] // pieces)[index]
    return {f"{path}.pieces": kept, f"{path}.piece_index": index.to(torch.int32)}


def require_equal_pieces(method: Method, tower: Tower, pieces: int) -> None:
    """Refuse a tower whose channels are not so many pieces of one size.

    Raises:
        ConfigurationError: so it is.
    """
    require(
        tower.width % pieces == 0,
        method,
        f"the {tower.name} tower has {tower.width} channels, which are not {pieces} equal pieces; "
        "give another number of pieces",
    )
