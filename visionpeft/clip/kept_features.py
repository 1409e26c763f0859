"""Features that are computed again only when something they depend on has changed."""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import nn

from visionpeft.clip.model import acting_adapters
from visionpeft.clip.text import TextEncoder
from visionpeft.sites.tensor_versions import version_of

Kept = TypeVar("Kept")


class KeptFeatures:
    """Features of one learner, each with what it was computed from; a copy of the learner begins with none."""

    def __init__(self):
        self._kept: dict[str, tuple] = {}

    def clear(self) -> None:
        """Keep nothing."""
        self._kept.clear()

    def get(
        self, key: str, state: tuple, values: Sequence[torch.Tensor], compute: Callable[[], Kept], with_graph: bool
    ) -> Kept:
        """What `compute` gave last, if since then neither `state` nor any of `values` has changed; else computed anew.

        Args:
            key: what the features are.
            state: what is compared as it is.
            values: tensors of which the values are compared, and for that copied.
            compute: computes the features.
            with_graph: compute them with gradients.
        """
        current = [tensor.detach() for tensor in values]
        if key in self._kept:
            features, old_state, old = self._kept[key]
            if old_state == state and _same_values(old, current):
                return features
        # What was computed in inference mode could not take part in a training step later.
        with torch.inference_mode(False), torch.set_grad_enabled(with_graph):
            features = compute()
            self._kept[key] = (features, state, [tensor.clone() for tensor in current])
        return features

    def __deepcopy__(self, memo: dict) -> "KeptFeatures":
        """None: they are known by the tensors that they were computed from, and may belong to a graph."""
        return KeptFeatures()


def state_of_texts(
    clip: nn.Module, text: TextEncoder, adapters: Iterable[str] | None = None
) -> tuple[tuple, list[nn.Parameter]]:
    """What text features depend on: how the text tower computes, and with what.

    Args:
        clip: the CLIP.
        text: its text tower.
        adapters: those that act when the features are computed; by default those that act now.

    Returns:
        What is compared as it is, in which frozen tensors have their versions: it is noticed that they were replaced or
        written to, but not through `.data`; and the tensors that an optimiser may have written to, which are compared
        by their values, because PyTorch's fused optimisers count no versions.
    """
    acting = acting_adapters(clip)
    own, added = _parameters_of_text(clip, text.module, acting if adapters is None else adapters)
    state = {id(p): None if p.requires_grad else version_of(p) for p in own} | {id(p): None for p in added}
    device = text.device
    autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
    return (state, acting, autocast, text.dtype, device), [*(p for p in own if p.requires_grad), *added]


def _parameters_of_text(
    clip: nn.Module, text: nn.Module, adapters: Iterable[str]
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Those of the text tower, and what these adapters have in it; nothing of the images."""
    # A plain CLIP is its own text tower.
    own = [parameter for name, parameter in text.named_parameters() if not name.startswith(("visual.", "peft."))]
    added = [
        parameter
        for adapter in adapters
        for name, parameter in clip.peft[adapter].named_parameters()
        if not name.partition(".")[2].startswith("visual.")  # <method>.<tower>. ...
    ]
    return own, added


def _same_values(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> bool:
    """Whether two lists of tensors are equal, for which their device is waited for once and not for each of them."""
    pairs = list(zip(left, right, strict=False))
    if len(left) != len(right) or any(a.shape != b.shape for a, b in pairs):
        return False
    return not pairs or bool(torch.stack([(a == b).all() for a, b in pairs]).all())
