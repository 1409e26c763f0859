"""What every method is: hyper-parameters, and the modules it puts at the sites of a tower."""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from itertools import chain

import torch.nn as nn

from visionpeft.addressing import select_blocks
from visionpeft.backbones.frames import Frames
from visionpeft.backbones.tower import Backbone, Tower
from visionpeft.errors import ConfigurationError, UnsupportedError
from visionpeft.sites import Placement, Shared


class Method:
    """Base of all methods, which are frozen dataclasses of hyper-parameters.

    A method implements `place` (modules at sites), `trains` (parameters of the backbone to train) or both; one whose
    modules couple two towers implements `place_all`. Every method has the fields `towers` and, unless it has no blocks
    to choose, `blocks`.
    """

    towers: str | list[str] | None = None

    def place(self, tower: Tower) -> Iterable[Placement | Shared]:
        """Make the modules that act in one tower, initialised as the paper does."""
        return ()

    def place_all(self, towers: Sequence[Tower]) -> Iterable[Placement | Shared]:
        """Make the modules that act in all towers of the method: by default, in each tower for itself."""
        return chain.from_iterable(self.place(tower) for tower in towers)

    def trains(self, tower: Tower) -> Iterable[str]:
        """Names, as the tower knows them, of the parameters that are trained themselves."""
        return ()

    def fold(self, part: nn.Module) -> tuple["Method", nn.Module]:
        """The method and its modules as they are saved: without what only training needs."""
        return self, part

    @property
    def name(self) -> str:
        """Name in parameter paths and files: the class name in snake case."""
        return snake_case(type(self).__name__)


def snake_case(name: str) -> str:
    """`AdaptFormer` -> `adapt_former`, `VPT` -> `vpt`, `LoRA` -> `lora`, `BitFit` -> `bit_fit`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", "_", name).lower()


def select_towers(method: Method, backbone: Backbone) -> list[Tower]:
    """The towers a method names: its `towers`, or by default the image tower, or else the only one.

    Raises:
        ConfigurationError: if the model has no such tower.
        UnsupportedError: if the tower exists but has no sited blocks.
    """
    names = method.towers
    if names is None:
        every = [*backbone.towers, *backbone.refused]
        names = ["visual" if "visual" in every else every[0]]
    elif isinstance(names, str):
        names = [names]
    for name in names:
        if name in backbone.refused:
            raise UnsupportedError(f"{type(method).__name__} cannot act on the {name} tower: {backbone.refused[name]}")
        if name not in backbone.towers:
            raise ConfigurationError(
                f"{type(method).__name__}(towers={method.towers!r}): this model has no tower {name!r}, "
                f"it has {', '.join(backbone.towers)}"
            )
    return [backbone.towers[name] for name in names]


def require(condition: bool, method: Method, sentence: str) -> None:
    """Raise a ConfigurationError that names the method unless the condition holds."""
    if not condition:
        raise ConfigurationError(f"{type(method).__name__}: {sentence}")


def frames_of(method: Method, tower: Tower) -> Frames:
    """How clips lie in the batches of a tower, for methods that act across the frames of a clip.

    Raises:
        UnsupportedError: if the tower takes images that are samples of their own.
    """
    if tower.frames is None:
        raise UnsupportedError(
            f"{type(method).__name__} acts across the frames of clips, but this model takes single images; attach it "
            "to a VideoClassifier of the model"
        )
    return tower.frames


def describe_method(method: Method) -> dict:
    """Class name and fields of a method as plain values."""
    return {"class": type(method).__name__, "fields": dataclasses.asdict(method)}


def blocks_of(method: Method, tower: Tower) -> list[int]:
    """Indices of the blocks the method's `blocks` names in this tower."""
    return select_blocks(method.blocks, tower.depth)
