"""How a learner is built: whole or not at all."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

from visionpeft.adapters.attach import activate, detach, has_adapters
from visionpeft.clip.model import acting_adapters


@contextmanager
def left_as_it_was(clip: object) -> Iterator[None]:
    """Within the context, an error leaves a CLIP as it was: its adapters, what of it is trained, and its modes."""
    if not isinstance(clip, nn.Module):
        yield
        return
    acting, names = acting_adapters(clip), set(clip.peft) if has_adapters(clip) else set()
    trained = [(parameter, parameter.requires_grad) for parameter in clip.parameters()]
    modes = [(module, module.training) for module in clip.modules()]
    try:
        yield
    except Exception:  # whatever failed
        for name in [name for name in clip.peft if name not in names] if has_adapters(clip) else ():
            detach(clip, name)
        if acting_adapters(clip) != acting:
            activate(clip, acting)
        for parameter, before in trained:
            parameter.requires_grad_(before)
        for module, before in modes:
            module.training = before
        raise


def whole_or_not_at_all(build: Callable) -> Callable:
    """The constructor of a learner, which leaves the CLIP as it was where the learner is refused."""

    @functools.wraps(build)
    def __init__(self, clip, *args, **options):
        with left_as_it_was(clip):
            build(self, clip, *args, **options)

    return __init__


def freeze(clip: nn.Module) -> None:
    """Freeze a CLIP and put it into evaluation mode, but not what adapters have in it, which others may be training."""
    adapters = clip.peft if has_adapters(clip) else nn.ModuleDict()
    trained = {id(parameter) for parameter in adapters.parameters()}
    for parameter in clip.parameters():
        if id(parameter) not in trained:
            parameter.requires_grad_(False)
    modes = [(module, module.training) for module in adapters.modules()]
    clip.eval()
    for module, before in modes:
        module.training = before
