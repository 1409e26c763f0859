"""What cannot act in a block that gets fewer tokens than there are, or whose MLP gets every token more than once."""

from collections.abc import Mapping

import torch.nn as nn

from visionpeft.errors import UnsupportedError


def check_multiplied(acting: Mapping[tuple[str, str | None], list[nn.Module]]) -> None:
    """Refuse what would meet more tokens than it has read, or fewer.

    Args:
        acting: what acts in a block, by site and where it is added.

    Raises:
        UnsupportedError: two modules choose the tokens of the block; or two multiply those of the MLP, or one does and
            a branch reads what the MLP reads or is added to what it gives.
    """
    if sum(getattr(module, "narrows_tokens", False) for module in acting.get(("stream_in", None), [])) > 1:
        raise UnsupportedError(
            "two adapters choose the tokens that pass one block (CoDA), each by itself; activate one of them, or "
            "choose other blocks"
        )
    multiplying = sum(getattr(module, "multiplies_tokens", False) for module in acting.get(("mlp_in", None), []))
    if multiplying > 1:
        raise UnsupportedError(
            "two adapters send the tokens of one MLP to experts of their own, which have no common form; activate one "
            "of them, or choose other blocks"
        )
    if multiplying and any(
        add and modules and (site == "mlp_in" or add == "mlp_out") for (site, add), modules in acting.items()
    ):
        raise UnsupportedError(
            "where tokens are sent to several experts of an MLP, no branch can read what the MLP reads (Convpass), or "
            "be added to what it gives; choose other blocks for one of the two"
        )
