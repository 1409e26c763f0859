"""What every method is: hyper-parameters, and the modules it puts at the sites of a tower."""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import ClassVar, Protocol, get_type_hints

import torch
import torch.fx
import torch.nn as nn

from visionpeft.backbones.frames import Frames
from visionpeft.backbones.tower import Backbone, Tower
from visionpeft.errors import ConfigurationError, UnsupportedError
from visionpeft.methods.parts.addressing import select_blocks
from visionpeft.methods.parts.field_types import checked_field
from visionpeft.methods.parts.measures import Measures, Squares
from visionpeft.sites import Placement, Shared

FACTORS = ("alpha", "scale")  # fields that are a factor of what is trained, or its numerator


class Measure(Protocol):
    """Shows training samples one by one to a method that chooses after a stage; `adapters.stages` has it.

    Attributes:
        squares: measures squared gradients of the backbone's weights, with the adapter acting.
    """

    squares: Squares

    def __call__(
        self,
        parameters: Sequence[nn.Parameter],
        samples: int,
        see: Callable[[tuple[torch.Tensor, ...]], None],
    ) -> int:
        """Give `see` the gradients in these parameters of the loss of each of so many samples; returns their number."""


class Method:
    """Base of all methods, which are frozen dataclasses of hyper-parameters.

    A method implements `place` (modules at sites), `trains` (parameters of the backbone to train) or both; one whose
    modules couple two towers implements `place_all`. Every method has the fields `towers` and, unless it has no blocks
    to choose, `blocks`. The values of its fields must be of the types they are annotated with; a method that checks
    more of them does so in a `__post_init__` that begins with this one.
    """

    towers: str | list[str] | None = None
    # Values of fields that an adapter saved by an older version does not have, where they are not the defaults.
    written_without: ClassVar[Mapping[str, object]] = {}
    # Fields that say what was found in weights or data, whose tensors only a saved adapter has: not to be given.
    found: ClassVar[tuple[str, ...]] = ("entries",)
    # Whether it needs the sites of blocks; otherwise those of layers, at which its modules `merge`, are enough.
    needs_blocks: ClassVar[bool] = True
    # Share of the training data on which `selects` is learnt, and at which learning rate; fields of methods that do.
    held_out: ClassVar[float] = 0.0
    selection_lr: ClassVar[float] = 0.0
    # Of a method that is trained in stages: whether each stage starts where the first did, or where the last one ended.
    rewinds: ClassVar[bool] = True

    def __post_init__(self):
        try:
            types = get_type_hints(type(self))  # those of a file that leaves annotations as strings, too
        except NameError:  # of a class in a function, whose strings only that function can read
            types = {}
        for field in dataclasses.fields(self):
            value = checked_field(self, field, types.get(field.name, field.type))
            if field.name in FACTORS and value == 0:
                raise ConfigurationError(
                    f"{type(self).__name__}: {field.name} must not be 0, or what it scales would never have a gradient"
                )

    def place(self, tower: Tower) -> Iterable[Placement | Shared]:
        """Make the modules that act in one tower, initialised as the paper does."""
        return ()

    def place_all(self, towers: Sequence[Tower]) -> Iterable[Placement | Shared]:
        """Make the modules that act in all towers of the method: by default, in each tower for itself."""
        return chain.from_iterable(self.place(tower) for tower in towers)

    def gathers(self, tower: Tower) -> int:
        """Width of what the head reads of the method's modules besides the pooled features (`several_features`)."""
        return 0

    def trains(self, tower: Tower) -> Iterable[str]:
        """Names, as the tower knows them, of the parameters that are trained themselves."""
        return ()

    @property
    def pending(self) -> bool:
        """Whether the method must see data before it can act, by `visionpeft.allocate`."""
        return False

    def allocate(self, towers: Sequence[Tower], measures: Measures) -> tuple["Method", dict[str, torch.Tensor]]:
        """For a pending method, the method that knows where it acts, and values of tensors of the modules it places.

        Args:
            towers: the towers of the method.
            measures: measures gradients, inputs and sizes on the data.
        """
        raise TypeError(f"{type(self).__name__} needs no data to know where it acts")

    @property
    def stages_after(self) -> int:
        """How many trainings follow the one with this method, the next with what `next_stage` gives."""
        return 0

    def next_stage(
        self,
        towers: Sequence[Tower],
        part: nn.Module,
        start: Mapping[str, torch.Tensor],
        trained: Mapping[str, torch.Tensor],
        measure: Measure,
    ) -> tuple["Method", dict[str, torch.Tensor]]:
        """For a method with `stages_after`, the one that is trained next, and tensors of the modules it places.

        Tensors that it does not give start as they did in the first stage if the method `rewinds`, or else as they are.

        Args:
            towers: the towers of the method, with the backbone's own values.
            part: its modules, as they are after the training.
            start: the tensors of its modules, as they were before the first stage.
            trained: the trained copies of parameters of the backbone, by their names in the model.
            measure: gradients of the loss of training samples.

        Raises:
            ConfigurationError: the training leaves nothing to choose by.
        """
        raise TypeError(f"{type(self).__name__} is trained in one stage")

    def selects(self, part: nn.Module) -> list[nn.Parameter]:
        """Which parameters of its modules are learnt on a held-out part of the training data; see `Selection`."""
        return []

    @property
    def masks_gradients(self) -> bool:
        """Whether the method masks gradients, by `mask_gradient`."""
        return type(self).mask_gradient is not Method.mask_gradient

    def mask_gradient(self, gradient: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """What a parameter of `trains` or of the head gets for its gradient in a step of an optimiser.

        Args:
            gradient: as it is after clipping.
            generator: for what is drawn; the same in all processes of a training.
        """
        return gradient

    def penalty(self, part: nn.Module) -> torch.Tensor | float:
        """What the method adds to the loss, given its modules of one adapter; see `visionpeft.penalty`."""
        return 0.0

    @property
    def compares_passes(self) -> bool:
        """Whether the method adds something to the loss that compares two passes of the same batch."""
        return False

    def compare_passes(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor | float:
        """What it adds for the logits (batch, classes) of two passes if `compares_passes`; see `visionpeft.penalty`."""
        return 0.0

    def after_step(self, part: nn.Module, step: int, total_steps: int) -> None:
        """Act on its modules after an optimiser step; see `visionpeft.after_step`."""

    def fold(self, part: nn.Module) -> tuple["Method", nn.Module]:
        """The method and its modules as they are saved: without what only training needs."""
        return self, part

    def combine(
        self, methods: Sequence["Method"], parts: Sequence[Mapping[str, torch.Tensor]], weights: Sequence[float]
    ) -> tuple["Method", dict[str, torch.Tensor]]:
        """Method and tensors of a weighted combination: by default, the weighted mean of the tensors.

        Args:
            methods: this method as it is in each adapter, as saved.
            parts: its tensors in each of them.
            weights: weight of each.

        Raises:
            ConfigurationError: if they cannot be combined.
        """
        require_same(methods)
        require(
            not any(parts) or math.isclose(sum(weights), 1, abs_tol=1e-6),
            self,
            f"its parameters are averaged, so the weights must add up to 1, not {sum(weights):g}",
        )
        return self, weighted_sum(parts, weights)

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
    require(len(names) > 0, method, f"towers names none; this model has {', '.join(backbone.towers)}")
    for name in names:
        if name in backbone.refused:
            raise UnsupportedError(f"{type(method).__name__} cannot act on the {name} tower: {backbone.refused[name]}")
        if name not in backbone.towers:
            raise ConfigurationError(
                f"{type(method).__name__}(towers={method.towers!r}): this model has no tower {name!r}, "
                f"it has {', '.join(backbone.towers)}"
            )
        if method.needs_blocks and backbone.towers[name].layers_only is not None:
            raise UnsupportedError(
                f"{type(method).__name__} needs sited blocks; this model has layer sites only: "
                f"{backbone.towers[name].layers_only}"
            )
    return [backbone.towers[name] for name in dict.fromkeys(names)]


def require(condition: bool, method: Method, sentence: str) -> None:
    """Raise a ConfigurationError that names the method unless the condition holds."""
    if not condition:
        raise ConfigurationError(f"{type(method).__name__}: {sentence}")


def require_same(methods: Sequence[Method], but: Sequence[str] = ()) -> None:
    """Raise a ConfigurationError unless all are the same method with the same fields, but for some of them."""
    fields = [{k: v for k, v in dataclasses.asdict(method).items() if k not in but} for method in methods]
    for name, value in fields[0].items():
        # as JSON, where the tuple of a default is the list of a file
        same = len({json.dumps(each[name]) for each in fields}) == 1
        require(same, methods[0], f"adapters that differ in {name} ({value} and others) cannot be combined")


def weighted_sum(parts: Sequence[Mapping[str, torch.Tensor]], weights: Sequence[float]) -> dict[str, torch.Tensor]:
    """Sum of the tensors of each name times their weights; whole numbers are those of the first part."""
    return {
        name: sum(w * part[name].double() for part, w in zip(parts, weights, strict=True)).to(first.dtype)
        if first.is_floating_point()
        else first
        for name, first in parts[0].items()
    }


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


def require_patches(method: Method, tower: Tower) -> None:
    """Refuse a tower without patches, for methods whose side path is made for those of images.

    Raises:
        UnsupportedError: naming the method and the tower.
    """
    if tower.patch_size is None:
        raise UnsupportedError(
            f"{type(method).__name__} is for image towers, and the {tower.name} tower has no patches"
        )


def describe_method(method: Method) -> dict:
    """Class name and fields of a method as plain values."""
    return {"class": type(method).__name__, "fields": dataclasses.asdict(method)}


def blocks_of(method: Method, tower: Tower) -> list[int]:
    """Indices of the blocks the method's `blocks` names in this tower; none where a tower of layers has none."""
    if method.blocks == "all" and tower.depth == 0:
        return []
    return select_blocks(method.blocks, tower.depth, tower.stages)


def to_parameter_dtype(x: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """x in the dtype of a float32 parameter, unless autocast chooses the dtype of each operation itself."""
    return _to_unless_autocast(x, parameter.dtype)


@torch.fx.wrap  # traced by torch.fx, tokens have no device to ask for
def _to_unless_autocast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x if torch.is_autocast_enabled(x.device.type) else x.to(dtype)
