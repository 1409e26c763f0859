"""The frozen trunk of an adapted model: what comes before everything that is trained, and what it makes of an image."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import takewhile

from torch import Tensor, nn

from visionpeft.adapters.adapters import attached
from visionpeft.adapters.attached_adapter import AttachedAdapter, own_parameter
from visionpeft.adapters.storage import package_versions
from visionpeft.backbones.tower import Tower
from visionpeft.backbones.whole_model import describe
from visionpeft.caching.content_cache import ContentCache, Fingerprint, arithmetic
from visionpeft.errors import ConfigurationError, UnsupportedError
from visionpeft.sites import is_drawn


class FrozenTrunk:
    """Runs a classifier of images from where its active adapters begin, on what the trunk before that gave.

    It begins at the first block in which an adapter acts or trains something, after the last block if that is only the
    norm there, and at the head if there is nothing but the head. The trunk is run by the library's own forward, which
    is left where the trunk ends.

    Args:
        model: a model with adapters and one head.

    Raises:
        ConfigurationError: an active adapter acts before the second block, so that there is no trunk.
        UnsupportedError: the model has several towers or heads.
    """

    def __init__(self, model: nn.Module):
        backbone = describe(model)
        self.model = model
        self.acting = self._acting()
        heads = [*dict.fromkeys((*backbone.heads, *(path for adapter in self.acting for path in adapter.head_paths)))]
        if list(backbone.towers) != ["visual"] or len(heads) != 1:
            raise UnsupportedError("a frozen trunk is kept of image classifiers with one head only")
        self.head = heads[0]
        tower = backbone.towers["visual"]
        self.blocks = [block.module for block in tower.blocks]
        starts = [start for adapter in self.acting for start in _starts(adapter, model, tower)]
        self.first = min(starts, default=None)
        if tower.layers_only is not None and self.first is not None:
            raise UnsupportedError(
                "of a model that has layer sites only, a frozen trunk is kept where nothing but the head is trained; "
                "leave cache out"
            )
        if self.first == 0:
            raise ConfigurationError(
                "the method acts from the first block on, so that there is no frozen trunk whose tokens could be kept; "
                "choose later blocks (blocks: last:4), or leave cache out"
            )

    def tensors(self) -> Mapping[str, Tensor]:
        """What the trunk's output depends on besides the images: its parameters and buffers by name.

        Raises:
            ConfigurationError: other adapters act than when the trunk was made, or a weight of the trunk is trained.
        """
        self._check_same_adapters()
        self._check_frozen()
        after = {id(t) for t in (*self.model.get_submodule(self.head).parameters(), *self.model.peft.parameters())}
        after |= {id(t) for t in (*self.model.get_submodule(self.head).buffers(), *self.model.peft.buffers())}
        later = [] if self.first is None else self.blocks[self.first :]
        after |= {id(t) for block in later for t in (*block.parameters(), *block.buffers())}
        every = (*self.model.named_parameters(), *self.model.named_buffers())
        return {name: t for name, t in every if id(t) not in after and not t.requires_grad}

    def options(self) -> str:
        """A hash of what the trunk's output depends on besides its tensors: classes and options of its modules."""
        digest = hashlib.sha256()
        for name, module in self._modules():
            simple = {key: v for key, v in vars(module).items() if isinstance(v, bool | int | float | str | tuple)}
            simple.pop("training", None)
            digest.update(f"{name} {type(module).__name__} {sorted(simple.items())}".encode())
        return digest.hexdigest()[:32]

    def output(self, images: Tensor) -> Tensor:
        """What the trunk gives: tokens (batch, tokens, width), or features (batch, features) before the head.

        Raises:
            ConfigurationError: dropout or stochastic depth is at work in the trunk.
        """
        end = self.model.get_submodule(self.head) if self.first is None else self.blocks[self.first - 1]
        self._check_not_random()

        def leave(*inputs, **options):
            raise _Reached(inputs[0] if self.first is None else original(*inputs, **options))

        original = end.forward
        try:
            with _instead({end: leave}):
                self.model(images)
        except _Reached as reached:
            return reached.value
        raise UnsupportedError(f"{type(self.model).__name__} gives an output without passing {type(end).__name__}")

    def logits(self, images: Tensor, output: Tensor) -> Tensor:
        """Logits (batch, classes) of images from what the trunk gave for them."""
        self._check_same_adapters()
        if self.first is None:
            return self.model.get_submodule(self.head)(output)
        passed = {block: lambda x, *_, **__: x for block in self.blocks[: self.first - 1]}
        with _instead({**passed, self.blocks[self.first - 1]: lambda *_, **__: output}):
            return self.model(images)

    def _acting(self) -> list[AttachedAdapter]:
        peft = attached(self.model)
        return [peft[name] for name in peft.active]

    def _check_same_adapters(self) -> None:
        if self._acting() != self.acting:
            raise ConfigurationError("other adapters act than when the frozen trunk was made; make a new one")

    def _modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Those of the model's modules that are in the trunk; before the blocks are those registered before."""
        named = [*self.model.named_modules()]
        after = set(self.model.get_submodule(self.head).modules()) | set(self.model.peft.modules())
        if self.first is not None:
            before = {m for _, m in takewhile(lambda entry: entry[1] is not self.blocks[0], named)}
            before |= {module for block in self.blocks[: self.first] for module in block.modules()}
            after |= {module for _, module in named if module not in before}
        return ((name, module) for name, module in named if module not in after)

    def _check_frozen(self) -> None:
        adapters = {id(parameter) for parameter in self.model.peft.parameters()}
        for path, module in self._modules():
            for name, parameter in module.named_parameters(path, recurse=False):
                if parameter.requires_grad and id(parameter) not in adapters:
                    raise ConfigurationError(
                        f"{name} has requires_grad=True, but lies in the frozen trunk, whose output is kept and gives "
                        "it no gradient; freeze it, train it with attach(..., train=[...]), or leave cache out"
                    )

    def _check_not_random(self) -> None:
        for _, module in self._modules():
            if is_drawn(module):
                raise ConfigurationError(
                    f"{type(module).__name__} is at work in the frozen trunk, so that its output is another one each "
                    "time; set drop_path to 0 and leave the backbone in evaluation mode, or leave cache out"
                )


class CachedTrunk:
    """A classifier whose frozen trunk runs once for each image. Outputs and gradients are those of the whole model.

    What the trunk gave is found again by the bytes of the image and of the trunk's weights, and the precision.

    Args:
        model: a model with adapters.
        cache: where it is kept.
    """

    def __init__(self, model: nn.Module, cache: ContentCache):
        self.trunk = FrozenTrunk(model)
        self.cache = cache
        self._weights = Fingerprint()
        self._options = self.trunk.options()
        self._software = " ".join(package_versions().values())

    def __call__(self, images: Tensor) -> Tensor:
        """Logits (batch, classes) of images (batch, 3, height, width)."""
        return self.trunk.logits(images, self.output(images))

    def hash_again(self) -> None:
        """Hash the weights at the next use even if they do not say that they were written to."""
        self._weights.forget()

    def output(self, images: Tensor) -> Tensor:
        """What the trunk gives for images, without a graph."""
        weights = self._weights.of(self.trunk.tensors())
        form = f"{self.trunk.first} {self._options} {attached(self.trunk.model).economies.class_token_only}"
        source = f"trunk {form} {weights} {arithmetic(images.device)} {self._software}"
        return self.cache.rows(source, images, self.trunk.output)


class _Reached(Exception):
    """The end of the trunk has been reached."""

    def __init__(self, value: Tensor):
        super().__init__()
        self.value = value


@contextmanager
def _instead(forwards: dict[nn.Module, Callable]) -> Iterator[None]:
    """Within the context, these modules are called with other functions."""
    for module, forward in forwards.items():
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module in forwards:
            del module.__dict__["forward"]


def _starts(adapter: AttachedAdapter, model: nn.Module, tower: Tower) -> Iterator[int]:
    """Where an adapter acts or trains: indices of blocks, the number of blocks for the norms after them, else 0."""
    places = {id(p): index for index, block in enumerate(tower.blocks) for p in block.module.parameters()}
    norms = [tower.layers[site].owner for site in tower.final_norms if site in tower.layers]
    places |= {id(p): tower.depth for norm in norms for p in norm.parameters()}
    for _, placement in adapter.placements:
        outside = tower.depth if placement.site in tower.final_norms else tower.between_stages(placement.site) or 0
        yield outside if placement.block is None else placement.block
    for name in adapter.trained_names:
        yield places.get(id(own_parameter(model, name)), 0)
