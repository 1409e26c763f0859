"""What all heads for dense prediction have in common: which blocks they read, and how a saved one is described."""

import dataclasses
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal, get_type_hints

import torch
from timm.layers import LayerNorm2d
from torch import nn

from visionpeft.errors import ConfigurationError, UnsupportedError
from visionpeft.methods.parts.field_types import checked_field

Layers = int | tuple[int, ...] | Literal["quarters"]


class DenseHead:
    """Base of heads for dense prediction, which are frozen dataclasses of hyper-parameters, as methods are.

    A head knows neither backbone nor method: it is given the maps of some blocks, each after the backbone's final norm,
    as one tensor (batch, maps, channels, rows, columns), a row and a column for each patch. What it gives is
    resized bilinearly to the image by whoever calls it. Every head has a field `layers`, and a head that checks more of
    its fields does so in a `__post_init__` that begins with this one.

    Of a backbone in stages (Swin, ConvNeXt, Hiera) it reads stages in the place of blocks, each of its own width and
    resolution, and is given a list of their maps (batch, channels, rows, columns) as the stages leave them. All but DPT
    begin with a layer normalisation over the channels of each, new and trained with the head, as in the code that Swin
    and ConvNeXt are published with for segmentation and detection; the backbone's own final norm is not computed there.

    Args:
        layers: whose maps are read: of the last so many blocks; of the blocks of these numbers, in order, negative ones
            counted from the end; or "quarters", the last block of each quarter of the depth (2, 5, 8, 11 of 12; all
            stages of four). The last block must be among them, or what is trained after the last one that is read would
            never learn.

    Raises:
        ConfigurationError: layers that are none of these.
    """

    layers: Layers
    number_of_maps: ClassVar[int | None] = None  # of heads that take a certain number
    gives_scores: ClassVar[bool] = False  # see `DenseModule`

    def __post_init__(self):
        types = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            checked_field(self, field, types[field.name])
        layers = self.layers
        if layers is None:  # of heads that allow it
            return
        if isinstance(layers, list):
            object.__setattr__(self, "layers", layers := tuple(layers))
        several = isinstance(layers, tuple) and layers and all(_is_integer(each) for each in layers)
        if not (several or layers == "quarters" or (_is_integer(layers) and layers > 0)):
            raise ConfigurationError(
                f"{type(self).__name__}: layers must be a number of blocks, a list of blocks, or 'quarters', not "
                f"{layers!r}"
            )

    def blocks(self, depth: int, called: str = "blocks") -> tuple[int, ...]:
        """Numbers of the blocks that are read, of a backbone of so many.

        Args:
            depth: how many it has.
            called: what they are, for errors.

        Raises:
            ConfigurationError: the backbone has not that many blocks, the last one is not read, one comes twice, or
                there are more or fewer than the head takes.
        """
        name, layers = type(self).__name__, self.layers
        if layers == "quarters":
            layers = tuple(depth * quarter // 4 - 1 for quarter in (1, 2, 3, 4))
        elif isinstance(layers, int):
            layers = tuple(range(depth - layers, depth))
            if layers[0] < 0:
                raise ConfigurationError(f"{name} reads the last {len(layers)} {called} of a backbone that has {depth}")
        chosen = tuple(block + depth if block < 0 else block for block in layers)
        if any(not 0 <= block < depth for block in chosen):
            raise ConfigurationError(f"{name} reads {called} {list(layers)} of a backbone that has 0 to {depth - 1}")
        if list(chosen) != sorted(set(chosen)) or chosen[-1] != depth - 1:
            raise ConfigurationError(
                f"{name} must read {called} in order, each once, the last one ({depth - 1}) among them, not "
                f"{list(layers)}; what is trained after the last one that is read would never learn"
            )
        if self.number_of_maps not in (None, len(chosen)):
            number = self.number_of_maps
            fitting = "'quarters', or to 4" if number == 4 else number
            raise ConfigurationError(f"{name} reads {number} {called}, not {len(chosen)}; set its layers to {fitting}")
        return chosen

    def stages(self, number: int) -> tuple[int, ...]:
        """Numbers of the stages that are read, of a backbone in so many; as `blocks`."""
        return self.blocks(number, "stages")

    @abstractmethod
    def build(self, channels: int, maps: int, num_classes: int) -> "DenseModule":
        """The head for so many maps of so many channels, newly initialised."""

    def build_on_stages(self, channels: Sequence[int], num_classes: int) -> "DenseModule":
        """The head for maps of stages with these channels, newly initialised.

        A head that does not say how is built on the map of one stage as on that of a block.

        Raises:
            UnsupportedError: a head that does not say how is to read several.
        """
        if len(channels) > 1:
            raise UnsupportedError(
                f"{type(self).__name__} takes maps of one width and resolution, which the stages of a backbone such as "
                "Swin or ConvNeXt do not have; use UPerNet, DPT or LinearSegmentation there"
            )
        return _OnLastStage(channels[0], self.build(channels[0], 1, num_classes))

    def make(self, channels: int | Sequence[int], maps: int, num_classes: int, **more) -> "DenseModule":
        """As `build`, or `build_on_stages` for several numbers of channels, with what else these take.

        The module knows how to describe itself.
        """
        if isinstance(channels, int):
            made = self.build(channels, maps, num_classes, **more)
        else:
            channels = list(channels)
            made = self.build_on_stages(channels, num_classes, **more)
        made.layout = {
            "class": type(self).__name__,
            "fields": dataclasses.asdict(self),
            "arguments": {"channels": channels, "maps": maps, "num_classes": num_classes, **more},
        }
        return made


class DenseModule(nn.Module):
    """A built head: maps (batch, maps, channels, rows, columns) -> logits (batch, classes, rows', columns').

    Of a backbone in stages maps are a list, for each stage (batch, channels, rows, columns).

    Attributes:
        layout: description that a saved head is built from again.
        needs_several_images: whether it takes statistics that one training image does not have.
        gives_scores: whether it gives scores in the place of logits, not negative, whose share is the probability, and
            in training mode `MaskPredictions`.
        queried_blocks: through how many of the backbone's last blocks its `queries` go.
    """

    layout: dict
    needs_several_images = False
    gives_scores = False
    queried_blocks = 0

    @abstractmethod
    def forward(self, maps: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
        """Logits, at the resolution of the head."""


class _OnLastStage(DenseModule):
    """A head of one map on that of a stage, after a norm."""

    def __init__(self, channels: int, head: DenseModule):
        super().__init__()
        self.norm = LayerNorm2d(channels)
        self.head = head
        self.needs_several_images, self.gives_scores = head.needs_several_images, head.gives_scores

    def forward(self, maps: list[torch.Tensor]) -> torch.Tensor:
        (last,) = maps
        return self.head(self.norm(last)[:, None])


def stage_norms(channels: Sequence[int]) -> nn.ModuleList:
    """A layer normalisation over the channels of the map of each stage: scale 1, shift 0, epsilon 1e-6."""
    return nn.ModuleList(LayerNorm2d(each) for each in channels)


def checked_share(head: DenseHead, name: str) -> None:
    """Refuse a rate that is no share.

    Raises:
        ConfigurationError: not from 0 to below 1.
    """
    if not 0 <= getattr(head, name) < 1:
        raise ConfigurationError(f"{type(head).__name__}: {name} must be in [0, 1), not {getattr(head, name)!r}")


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
