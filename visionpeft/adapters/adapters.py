"""All adapters of a model: the container on its root, what it has replaced there, and how it is found."""

from collections.abc import Callable

import torch.nn as nn
from torch.nn.utils.parametrize import is_parametrized

from visionpeft.adapters.attached_adapter import join
from visionpeft.adapters.economies import Economies
from visionpeft.adapters.installation import ATTRIBUTES, Anatomy, Installation, Rested, Swapped
from visionpeft.backbones.tower import Backbone
from visionpeft.errors import ConfigurationError, UnsupportedError, nearest
from visionpeft.sites.routing import Routing


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


def has_adapters(model: nn.Module) -> bool:
    """Whether adapters are attached to this model."""
    return isinstance(getattr(model, "peft", None), Adapters)


def attached(model: nn.Module) -> Adapters:
    """The adapters of a model.

    Raises:
        ConfigurationError: if it has none, or they are merged.
    """
    if has_adapters(model):
        return model.peft
    if "merged_peft" in model.__dict__:
        raise ConfigurationError("the adapters are merged; call unmerge first")
    raise ConfigurationError(f"no adapter is attached to this model{elsewhere(model)}")


def elsewhere(model: nn.Module) -> str:
    """The end of a sentence that refuses a model without adapters: which part of it has some."""
    for path, part in model.named_modules():
        if path and (has_adapters(part) or "merged_peft" in vars(part)):
            return f"; its part {path!r} has some: give that part"
    return ""


def known(peft: Adapters, name: str) -> str:
    """The name, if an adapter has it.

    Raises:
        ConfigurationError: if none has.
    """
    if name not in peft:
        raise ConfigurationError(f"there is no adapter {name!r}; attached are {nearest(name, peft)}")
    return name


def chosen_name(peft: Adapters, name: str | None, to: str) -> str:
    """The name of an adapter: the one that is given, or that of the only one.

    Args:
        peft: the adapters of the model.
        name: the given name, None where it may be left out.
        to: what is to be done with it, for an error: "to save".

    Raises:
        ConfigurationError: no adapter has the name; or none is given, and there is not just one adapter.
    """
    if name is None and len(peft) != 1:
        raise ConfigurationError(f"the model has adapters {', '.join(peft)}; say which one {to} with name=")
    return known(peft, name) if name is not None else next(iter(peft))
