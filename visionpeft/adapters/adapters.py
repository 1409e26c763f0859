"""What attaching creates: one module tree for each adapter, and the container of all of them on the model's root."""

import copy
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase

import torch
import torch.nn as nn
from torch.nn.utils.parametrize import is_parametrized

from visionpeft.adapters.economies import Economies
from visionpeft.adapters.gradient_masks import mask_at_steps
from visionpeft.adapters.installation import ATTRIBUTES, Anatomy, Installation, Rested, Swapped
from visionpeft.backbones.made_tensors import made_of_others
from visionpeft.backbones.quantised import is_quantised
from visionpeft.backbones.tower import Backbone, Tower
from visionpeft.errors import ConfigurationError, UnsupportedError, nearest
from visionpeft.methods.parts.base import Method, select_towers
from visionpeft.methods.parts.several_features import SeveralFeatures
from visionpeft.sites import Placement
from visionpeft.sites.routing import Routing


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


class Adapters(nn.ModuleDict):
    """All adapters of a model, which of them act, and what was replaced in the model to make them act.

    While adapters act, modules of the model have other classes, and their own parameters and heads stay where they are.
    While adapters are merged, the originals live here and nowhere else, so they move between devices with this module.
    """

    def __init__(self):
        super().__init__()
        self.chosen: tuple[str, ...] = ()  # the adapters that are active where no route is open
        self.routing = Routing()
        self.was_trainable: tuple[str, ...] = ()
        self.resting: dict[str, frozenset[str]] = {}  # parameters of adapters, frozen until they are used again
        self.rested: dict[str, Rested] = {}  # what was trained of adapters that came to rest as a whole
        self.backbone: Backbone | None = None  # the model as it was described when adapters were put in force
        self.installations: dict[tuple, Installation] = {}  # what has been put in force before
        self.anatomies: dict[str, Anatomy] = {}
        self.used: frozenset[str] = frozenset()  # the adapters whose parameters are in use
        self.economies = Economies()
        self.recomputing: list[nn.Module] = []
        self.swapped: list[Swapped] = []
        # (owner, name, original, what is there now)
        self.replaced: list[tuple[nn.Module, str, nn.Parameter | nn.Module, nn.Parameter | nn.Module]] = []

    def __getstate__(self) -> dict:
        # A copy decides anew what acts where, in the modules of its own model.
        return self.__dict__ | {
            "backbone": None,
            "installations": {},
            "anatomies": {},
            "rested": {},
            "routing": Routing(),
        }

    @property
    def route(self) -> tuple[str | None, ...] | None:
        """The adapter of each sample by the route that is open in this context, None if none is."""
        opened = self.routing.current()
        return None if opened is None else opened.names

    @property
    def active(self) -> tuple[str, ...]:
        """The adapters that act here on a whole batch: none within a route."""
        return self.chosen if self.route is None else ()

    def anatomy(self, name: str) -> Anatomy:
        """The modules of an adapter."""
        known = self.anatomies.get(name)
        if known is None or known.root is not self._modules[name] or not known.holds():
            known = self.anatomies[name] = Anatomy(self._modules[name])
        return known

    def forget(self) -> None:
        """Put adapters in force anew from now on, and let go of those that are gone."""
        self.installations.clear()
        self.anatomies.clear()
        self.rested.clear()
        if self.routing.routes is not None:
            self.routing.routes.forget()

    def _replicate_for_data_parallel(self):
        """What `nn.DataParallel` calls on several devices.

        Raises:
            UnsupportedError: always; what acts in a model belongs to its own modules, not to copies of them.
        """
        raise UnsupportedError(
            "nn.DataParallel copies the model for each device, and adapters act in the original; start a process for "
            "each device (torchrun and DistributedDataParallel), or let PyTorch see one (CUDA_VISIBLE_DEVICES=0)"
        )

    def _apply(self, fn: Callable, recurse: bool = True):
        """What moves and casts a model (`to`, `float`, `to_empty`).

        Raises:
            UnsupportedError: memory without values takes the place of tensors that no state dict has.
        """
        drawn = [
            (module, key, join(path, key))
            for path, module in self.named_modules()
            for key in module._non_persistent_buffers_set
            if module._buffers[key] is not None and module._buffers[key].is_meta
        ]
        super()._apply(fn, recurse)
        if lost := next((path for module, key, path in drawn if not module._buffers[key].is_meta), None):
            raise UnsupportedError(
                f"{lost} of the adapter is drawn when it is attached and is in no state dict, so that a model without "
                "values (device 'meta') never gets it; attach once the model has values (to_empty, load_state_dict)"
            )
        for _, _, original, _ in self.replaced:
            if isinstance(original, nn.Parameter):
                original.data = fn(original.data)
            else:
                original._apply(fn)
        return self

    def replace(self, owner: nn.Module, name: str, new: nn.Parameter | nn.Module) -> None:
        """Put a parameter or module in the place of another and keep the original."""
        slots = owner._modules if name in owner._modules else owner._parameters
        self.replaced.append((owner, name, slots[name], new))
        slots[name] = new

    def recompute_blocks(self, model: nn.Module) -> None:
        """Let the library compute blocks again in the backward pass, if that is asked for."""
        for module in model.modules() if self.economies.recompute == "block" else ():
            if getattr(module, "grad_checkpointing", None) is False:
                module.grad_checkpointing = True
                self.recomputing.append(module)

    def restore(self) -> None:
        """Give the model back its own classes, parameters and heads."""
        self.restore_classes()
        while self.replaced:
            owner, name, original, new = self.replaced.pop()
            if isinstance(original, nn.Parameter):
                owner._parameters[name] = original
            elif owner._modules.get(name) is new:  # and no other head, which somebody has given the model since
                owner._modules[name] = original.train(new.training)

    def require_whole(self) -> None:
        """Refuse a model whose modules must keep the classes that they have now.

        Raises:
            UnsupportedError: `fully_shard` or a parametrisation has given them classes of its own, or somebody has put
                a forward around that of their class, as the hooks of accelerate do.
        """
        for module, original, forward in self.swapped:
            if is_parametrized(module) and not original.__name__.startswith("Parametrized"):
                raise UnsupportedError(
                    f"{' and '.join(module.parametrizations)} of a {original.__name__} was parametrised while adapters "
                    "act, so that they cannot be changed; call torch.nn.utils.parametrize.remove_parametrizations, and "
                    "parametrise the model before you attach"
                )
            # A forward that is the library's own under both classes, as that of the model itself, may stay where it is:
            # accelerate puts one around it that chooses the precision.
            own = getattr(type(module), "forward", None) is getattr(original, "forward", None)
            if vars(module).get("forward") is not forward and not own:
                raise UnsupportedError(
                    f"the forward of a {original.__name__} was replaced on the object itself while adapters act, so "
                    "that they cannot be changed; take it off first (accelerate: remove_hook_from_submodules)"
                )
        classes = {type(module) for module, _, _ in self.swapped}
        if any(cls.__name__ == "FSDPModule" for each in classes for cls in each.__mro__):
            raise UnsupportedError(
                "the model is sharded, so that its adapters cannot be changed; do it before fully_shard, or load the "
                "full state dict into a model that is not sharded"
            )

    def restore_classes(self) -> None:
        """Give the modules of the model back their own classes, and keep activations as the model did."""
        self.require_whole()
        while self.recomputing:
            self.recomputing.pop().grad_checkpointing = False
        while self.swapped:
            module, original, _ = self.swapped.pop()
            object.__setattr__(module, "__class__", original)  # that of modules first asks whether it is a parameter
            for attribute in ATTRIBUTES:
                module.__dict__.pop(attribute, None)
        self.routing.installed = False


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
            near = nearest(name, {*parameters, *(p.rpartition(".")[0] for p in parameters)} - {""})
            raise ConfigurationError(f"train={name!r} matches no parameter of the backbone; near names are {near}")
        yield from matches
