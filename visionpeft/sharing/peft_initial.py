"""What peft takes out of a weight when it makes an adapter, made again, so that the weight itself stays as it is.

Some initialisations of LoRA move a part P of the frozen weight W into the adapter or drop it, and files hold only what
the adapter became. The layer then computes with W - P + s B A. Where P follows from W alone it is made again here, and
the change of W is s [B, -P_B] [A; P_A] with P = s P_B P_A:

* PiSSA: the r largest singular values of W with their vectors.
* OLoRA: s Q_r R_r, the first r columns and rows of W = Q R.
* KaSA: the r smallest singular values of W with their vectors; A is multiplied by a diagonal besides.
"""

import torch

from visionpeft.errors import StorageError
from visionpeft.sharing.peft_config import WITH_PART, PeftConfig


def makes_again(config: PeftConfig) -> bool:
    """Whether the adapter is one of those that peft has taken a part of the weight for."""
    return config.kasa or config.init_lora_weights in WITH_PART


@torch.no_grad()
def with_part(
    config: PeftConfig, weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float, place: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """A (rank, in) and B (out, rank) of the change of the whole weight, of a higher rank than those of the file.

    Args:
        config: what the adapter was made with.
        weight: W (out, in), as it was before peft took something out of it.
        A: of the file, with the diagonal multiplied in.
        B: of the file.
        scale: s.
        place: the layer and the file, in words.

    Raises:
        StorageError: there is no such part of this weight.
    """
    rank = len(A)
    weight = weight.detach().float()  # in which peft decomposes, so that equal singular values are parted as it does
    if config.kasa and rank >= min(weight.shape):
        raise StorageError(f"{place} has rank {rank}, but KaSA keeps at least one of {min(weight.shape)} components")
    if config.init_lora_weights == "olora":
        q, r = torch.linalg.qr(weight)
        left, right = q[:, :rank], r[:rank]
    else:
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        which = slice(len(s) - rank, None) if config.kasa else slice(rank)
        left, right = u[:, which] * s[which] / scale, v[which]
    return torch.cat((A, right.to(A))), torch.cat((B, -left.to(B)), dim=1)
