"""How a learner is built: from arguments of the types that its constructor names, and whole or not at all."""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import get_type_hints

from torch import nn

from visionpeft.adapters.adapters import has_adapters
from visionpeft.adapters.attach import detach
from visionpeft.adapters.switch import activate
from visionpeft.clip.model import acting_adapters
from visionpeft.errors import ConfigurationError
from visionpeft.methods.parts.field_types import as_python, fits, in_words


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


def checked(build: Callable) -> Callable:
    """The constructor of a learner, which checks types, and leaves the CLIP as it was where the learner is refused."""

    @functools.wraps(build)
    def __init__(self, clip, *args, **options):
        args, options = as_python(args), as_python(options)
        check_types(build, (self, clip, *args), options)
        with left_as_it_was(clip):
            build(self, clip, *args, **options)

    return __init__


def check_types(build: Callable, given: tuple, options: Mapping[str, object]) -> None:
    """Refuse arguments of a learner that are not of the types of their annotations, as fields of methods are refused.

    Args:
        build: the constructor.
        given: its positional arguments, the learner first.
        options: the others.

    Raises:
        ConfigurationError: one does not fit; a number that is not finite fits none.
    """
    try:
        types, signature = get_type_hints(build), inspect.signature(build)
        values = signature.bind(*given, **options).arguments
    except (NameError, TypeError):  # strings that only its file can read; arguments that the constructor refuses itself
        return
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    for name, value in values.items():
        if name in types and signature.parameters[name].kind not in several and not fits(value, types[name]):
            raise ConfigurationError(
                f"{type(given[0]).__name__}: {name} must be {in_words(types[name])}, not {value!r}"
            )


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
