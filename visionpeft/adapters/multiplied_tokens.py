"""What cannot act in a block whose MLP gets every token more than once."""

from collections.abc import Mapping

import torch.nn as nn

from visionpeft.errors import UnsupportedError


def check_multiplied(acting: Mapping[tuple[str, str | None], list[list[nn.Module]]]) -> None:
    """Refuse what would meet more tokens than it has read, or fewer.

    Args:
        acting: what acts in a block by site and where it is added, one list for each group of rows.

    Raises:
        UnsupportedError: two modules multiply the tokens of the MLP, or one does and a branch reads what the MLP reads
            or is added to what it gives.
    """
    groups = acting.get(("mlp_in", None), [])
    most = max((sum(getattr(module, "multiplies_tokens", False) for module in group) for group in groups), default=0)
    if most > 1:
        raise UnsupportedError(
            "two adapters send the tokens of one MLP to experts of their own, which have no common form; activate one "
            "of them, or choose other blocks"
        )
    crossing = any(
        any(groups) for (site, add), groups in acting.items() if add and (site == "mlp_in" or add == "mlp_out")
    )
    if most and crossing:
        raise UnsupportedError(
            "where tokens are sent to several experts of an MLP, no branch can read what the MLP reads (Convpass), or "
            "be added to what it gives; choose other blocks for one of the two"
        )
