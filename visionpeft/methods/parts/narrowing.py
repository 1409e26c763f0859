"""The blocks of a tower as narrow ones: those rows and columns of their weights that are largest."""

import torch

from visionpeft.backbones.tower import BlockSites, Tower
from visionpeft.errors import UnsupportedError

READING, WRITING = ("q", "k", "v", "fc1"), ("proj", "fc2")  # from the stream, to the stream


def narrowed(tower: Tower, width: int, heads: int, hidden: int) -> list[dict[str, torch.Tensor]]:
    """For each block, the state of a timm `Block` of this width cut out of it.

    Kept are, by the sum of their squared weights: of the stream the same channels in all blocks; of each head as many
    rows of q and k together, and of v with the columns of proj, as a narrow head has; of the MLP the hidden units.
    Biases and norms go with them. Layer scales and what normalises queries and keys are left out.

    Args:
        tower: the tower.
        width: width of the narrow blocks.
        heads: number of heads of both.
        hidden: hidden units of the narrow MLP.

    Raises:
        UnsupportedError: the blocks of the tower are of another kind.
    """
    for block in tower.blocks:
        _require_plain(block, heads)
    size = torch.zeros(tower.width, dtype=torch.float64)
    for block in tower.blocks:
        size += sum(_squares(block, site).sum(0) for site in READING)
        size += sum(_squares(block, site).sum(1) for site in WRITING)
    channels = _largest(size, width)
    return [_cut(block, channels, heads, width // heads, hidden) for block in tower.blocks]


def _require_plain(block: BlockSites, heads: int) -> None:
    layers = block.layers
    plain = {"norm1", "q", "k", "v", "proj", "norm2", "fc1", "fc2"} <= layers.keys()
    plain = plain and layers["fc1"].out_features == layers["fc2"].in_features
    if not plain or len({layers[site].out_features for site in ("q", "k", "v")}) > 1:
        raise UnsupportedError(
            f"narrow blocks are cut out of blocks with a plain MLP, and as many keys as queries, which a "
            f"{type(block.module).__name__} here does not have; start them at random"
        )


def _squares(block: BlockSites, site: str) -> torch.Tensor:
    return block.layers[site].weight_tensor.detach().cpu().double().square()


def _largest(size: torch.Tensor, number: int) -> torch.Tensor:
    """Indices of the largest values, in their order."""
    return size.topk(number).indices.sort().values


def _cut(block: BlockSites, channels: torch.Tensor, heads: int, each: int, hidden: int) -> dict[str, torch.Tensor]:
    def within_heads(size: torch.Tensor) -> torch.Tensor:
        rows = size.view(heads, -1)
        starts = range(0, len(size), rows.shape[1])
        return torch.cat([start + _largest(row, each) for start, row in zip(starts, rows, strict=True)])

    asking = within_heads(sum(_squares(block, site).sum(1) for site in ("q", "k")))
    given = within_heads(_squares(block, "v").sum(1) + _squares(block, "proj").sum(0))
    units = _largest(_squares(block, "fc1").sum(1) + _squares(block, "fc2").sum(0), hidden)

    def part(site: str, rows: torch.Tensor, columns: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        layer = block.layers[site]
        weight, bias = layer.weight_tensor.detach().cpu(), layer.bias_tensor
        bias = weight.new_zeros(layer.out_features) if bias is None else bias.detach().cpu()
        weight = weight[rows] if columns is None else weight[rows][:, columns]
        return weight, bias[rows]

    parts = {"norm1": part("norm1", channels, None), "norm2": part("norm2", channels, None)}
    of_qkv = [part(site, rows, channels) for site, rows in (("q", asking), ("k", asking), ("v", given))]
    parts["attn.qkv"] = tuple(torch.cat(each) for each in zip(*of_qkv, strict=True))
    parts["attn.proj"] = part("proj", channels, given)
    parts["mlp.fc1"] = part("fc1", units, channels)
    parts["mlp.fc2"] = part("fc2", channels, units)
    state = {f"{name}.weight": weight for name, (weight, _) in parts.items()}
    return state | {f"{name}.bias": bias for name, (_, bias) in parts.items()}
