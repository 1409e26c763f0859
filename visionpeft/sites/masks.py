"""Attention masks and biases: which keys are padding, and how a mask makes room for prompts."""

import torch

CLOSED = torch.finfo(torch.float16).min  # or less in a bias: a token does not see the key, whatever its score


def widened(mask: torch.Tensor | None, extra: int, at: int, causal: bool) -> torch.Tensor | None:
    """A mask with rows and columns for `extra` tokens from index `at` on; see `Sites.widen`."""
    if mask is None:
        return None
    boolean = mask.dtype == torch.bool
    opened, closed = (True, False) if boolean else (0.0, float("-inf"))
    columns = mask.new_full((*mask.shape[:-1], extra), opened)
    if mask.shape[-2] == 1 < mask.shape[-1]:  # one row for all tokens that ask
        return torch.cat((mask[..., :at], columns, mask[..., at:]), dim=-1)
    # Where no token sees a key, prompts would hand on what the padding holds: their rows are those of that key.
    own = torch.where(padding(mask), mask[..., :1, :], torch.full_like(mask[..., :1, :], opened))
    own = torch.cat((own[..., :at], columns[..., :1, :], own[..., at:]), dim=-1)
    rows = own.repeat(*(1 for _ in mask.shape[:-2]), extra, 1)
    if causal:
        columns[..., :at, :] = closed
        rows[..., at + extra :] = closed
        future = torch.ones(extra, extra, dtype=torch.bool, device=mask.device).triu(1)
        rows[..., at : at + extra].masked_fill_(future, closed)
    mask = torch.cat((mask[..., :at], columns, mask[..., at:]), dim=-1)
    return torch.cat((mask[..., :at, :], rows, mask[..., at:, :]), dim=-2)


def padding(mask: torch.Tensor) -> torch.Tensor:
    """Which keys no token sees by a mask or bias (..., N, N): (..., 1, N)."""
    if mask.dtype == torch.bool:
        return ~mask.any(dim=-2, keepdim=True)
    return mask.amax(dim=-2, keepdim=True) <= CLOSED
