"""One adapter: the module tree that attaching a method creates, and what stands in it."""

import copy
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase

import torch
import torch.nn as nn

from visionpeft.adapters.gradient_masks import mask_at_steps
from visionpeft.backbones.made_tensors import made_of_others
from visionpeft.backbones.quantised import is_quantised
from visionpeft.backbones.tower import Backbone, Tower
from visionpeft.errors import ConfigurationError, UnsupportedError, near_names
from visionpeft.methods.parts.base import Method, select_towers
from visionpeft.methods.parts.several_features import SeveralFeatures
from visionpeft.sites import Placement


class AttachedAdapter(nn.Module):
    """The trained modules and parameters of one adapter.

    Parameter paths: `<method>.<tower>.<block>.<site>.<parameter>`, `<method>.<tower>.<layer>.<parameter>` outside the
    blocks, `trained.<name in the model>` for trained copies of the backbone's own parameters, and the path of each
    head. A path is the same in `state_dict`, in the saved file and in error messages.

    Args:
        methods: the methods of the adapter, in order.
        backbone: the described model.
        head: whether the adapter has its own copies of the model's heads, to be trained.
        train: names of further parameters of the model to train: a parameter, a module, or a pattern such as "*.norm1".
    """

    def __init__(self, methods: tuple[Method, ...], backbone: Backbone, head: bool, train: tuple[str, ...] = ()):
        super().__init__()
        self.methods = methods
        self.train_names = tuple(train)
        self.placements: list[tuple[int, Placement]] = []  # (index of the method, placement)
        self.method_keys = method_keys(methods)
        self.masking: dict[str, Method] = {}  # parameter of the backbone -> the method that masks its gradient
        trained: dict[str, None] = dict.fromkeys(_named_to_train(train, backbone))
        for index, (key, method) in enumerate(zip(self.method_keys, methods, strict=True)):
            towers = select_towers(method, backbone)
            if method.pending:
                self.placements.append((index, Placement(towers[0].name, 0, "stream_in", Pending(method))))
                continue
            self._place(index, key, method, towers)
            for tower in towers:
                names = [join(tower.path, name) for name in method.trains(tower)]
                trained |= dict.fromkeys(names)
                if method.masks_gradients:
                    self.masking |= dict.fromkeys(names, method)
        self.trained_names = tuple(trained)
        for name in self.trained_names:
            value = _trainable(backbone.model, name).detach()
            nest(self, f"trained.{name}", nn.Parameter(value.to(training_dtype(value), copy=True)))
        self.hosts: dict[str, tuple[nn.Module]] = {}  # path of a head -> the model's own, when this one was attached
        self.head_paths = backbone.heads if head else ()
        gathered = sum(method.gathers(tower) for method in methods for tower in select_towers(method, backbone))
        for path in self.head_paths:
            for name, _ in backbone.model.get_submodule(path).named_parameters():
                _trainable(backbone.model, f"{path}.{name}")
            nest(self, path, own_copy(backbone.model.get_submodule(path)))
            if gathered:
                self.set_submodule(path, SeveralFeatures.over(self.get_submodule(path), gathered))
        if self.masking:
            mask_at_steps(self)

    def __setstate__(self, state: dict):
        super().__setstate__(state)
        if self.masking:  # of a copy, too
            mask_at_steps(self)

    @property
    def masked(self) -> dict[str, Method]:
        """Which method masks the gradient of which parameter here: of trained copies, and then of the heads, too."""
        found = {f"trained.{name}": method for name, method in self.masking.items()}
        for path in self.head_paths if found else ():
            names = [f"{path}.{name}" for name, _ in self.get_submodule(path).named_parameters()]
            found |= dict.fromkeys(names, next(iter(self.masking.values())))
        return found

    def _place(self, index: int, key: str, method: Method, towers: list[Tower]) -> None:
        references = {tower.name: next(tower.module.parameters()) for tower in towers}
        for item in method.place_all(towers):
            reference = references[item.tower]
            item.module.to(reference.device, training_dtype(reference))
            if isinstance(item, Placement):
                name = item.name or item.site
                where = [name] if item.block is None else [str(item.block), name]
                self.placements.append((index, item))
            else:
                where = [item.name]
            nest(self, ".".join([key, item.tower, *where]), item.module)
        self._check_owners(key, method)

    def _check_owners(self, key: str, method: Method) -> None:
        """Refuse a tensor with two paths: it would be in the file twice, which safetensors refuses after training.

        Raises:
            ConfigurationError: there is one.
        """
        part = getattr(self, key, None)
        owners: dict[int, str] = {}
        for path, parameter in () if part is None else part.named_parameters(remove_duplicate=False):
            if (first := owners.setdefault(id(parameter), path)) != path:
                raise ConfigurationError(
                    f"{type(method).__name__} has one parameter at two paths, {first} and {path}; let one module own "
                    "it, such as that of a Shared, and the others keep that module in a tuple: self._shared = (module,)"
                )

    def trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names in the model and trained copies of parameters of the backbone."""
        for name in self.trained_names:
            yield name, self.get_parameter(f"trained.{name}")

    def head_parameters(self) -> list[nn.Parameter]:
        """Parameters of the adapter's heads."""
        return [parameter for path in self.head_paths for parameter in self.get_submodule(path).parameters()]

    @property
    def pending(self) -> bool:
        """Whether one of the methods waits for data."""
        return any(method.pending for method in self.methods)

    def num_parameters(self) -> int:
        """Number of trained values without the heads."""
        return sum(p.numel() for p in self.parameters()) - sum(p.numel() for p in self.head_parameters())


class Pending(nn.Module):
    """Stands where a method will act once it has seen data, and refuses to compute.

    Args:
        method: the method.
    """

    def __init__(self, method: Method):
        super().__init__()
        self.method = type(method).__name__

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Refuse.

        Raises:
            ConfigurationError: always.
        """
        raise ConfigurationError(
            f"{self.method} chooses what it trains by the data and has seen none; call "
            "visionpeft.allocate(model, batches) first"
        )


def check_allocated(adapter: AttachedAdapter) -> None:
    """Refuse an adapter whose method waits for data.

    Raises:
        ConfigurationError: naming the method.
    """
    for _, placement in adapter.placements:
        if isinstance(placement.module, Pending):
            placement.module(None)


def check_written(adapter: AttachedAdapter) -> None:
    """Refuse an adapter some of whose tensors are not its own, or have no values, so that none can be written of them.

    Raises:
        UnsupportedError: naming the first of them.
    """
    for path, module in adapter.named_modules():
        if made := made_of_others(module):
            raise UnsupportedError(
                f"{join(path, made[0])} of the adapter is made of other tensors, which no adapter is loaded from; "
                f"write it out first, with {made[1]}"
            )
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and tensor.is_meta:
                raise UnsupportedError(
                    f"{join(path, name)} of the adapter has no values (device 'meta'); load its state dict first"
                )


def method_keys(methods: Iterable[Method]) -> list[str]:
    """First word of the parameter paths of each method of an adapter; a second method of one name gets its number."""
    keys: list[str] = []
    for index, method in enumerate(methods):
        keys.append(method.name if method.name not in keys else f"{method.name}_{index}")
    return keys


def nest(root: nn.Module, path: str, item: nn.Module | nn.Parameter) -> None:
    """Register a module or parameter under a dotted path, making the modules on the way.

    Raises:
        ConfigurationError: if the path is taken.
    """
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in root._modules:
            root.add_module(parent, nn.ModuleDict())
        root = root._modules[parent]
    if name in root._modules or name in root._parameters:
        raise ConfigurationError(f"two parts of one adapter would both be called {path!r}")
    if isinstance(item, nn.Parameter):
        root.register_parameter(name, item)
    else:
        root.add_module(name, item)


def join(path: str, name: str) -> str:
    """A dotted path of two parts, the first of which may be empty."""
    return f"{path}.{name}" if path else name


def training_dtype(of: torch.Tensor) -> torch.dtype:
    """In which precision something is trained beside a tensor of the backbone: float32, or float64 beside float64."""
    return torch.float64 if of.dtype == torch.float64 else torch.float32


def own_copy(head: nn.Module) -> nn.Module:
    """A trainable copy of a head, which nobody watches."""
    made = copy.deepcopy(head)
    for module in made.modules():
        for name, value in vars(module).items():
            if name.endswith("_hooks") and isinstance(value, dict):
                value.clear()
    dtypes = {training_dtype(tensor) for tensor in head.parameters()}
    return made.to(dtype=torch.float64 if torch.float64 in dtypes else torch.float32).requires_grad_(True)


def own_parameter(model: nn.Module, name: str) -> nn.Parameter:
    """The model's own parameter of this name, also while a copy of it acts."""
    path, _, last = name.rpartition(".")
    return model.get_submodule(path)._parameters[last]


def _trainable(model: nn.Module, name: str) -> nn.Parameter:
    """The parameter of this name, unless no copy of it can be trained."""
    parameter = model.get_parameter(name)
    if is_quantised(parameter):
        raise UnsupportedError(
            f"{name} is quantised and cannot be trained; quantise the frozen layers only, such as those of the blocks"
        )
    return parameter


def _named_to_train(names: Iterable[str], backbone: Backbone) -> Iterator[str]:
    if not (names := [*names]):
        return
    heads = tuple(f"{path}." for path in (*backbone.heads, "peft"))
    parameters = [name for name, _ in backbone.model.named_parameters() if not name.startswith(heads)]
    for name in names:
        matches = [p for p in parameters if p == name or p.startswith(f"{name}.") or fnmatchcase(p, name)]
        matches += [p for p in parameters if p not in matches and fnmatchcase(p.rpartition(".")[0], name)]
        if not matches:
            known = near_names(name, {*parameters, *(p.rpartition(".")[0] for p in parameters)} - {""})
            known = known or f"; it has {', '.join(parameters[:5])}, ..."
            raise ConfigurationError(f"train={name!r} matches no parameter of the backbone{known}")
        yield from matches
