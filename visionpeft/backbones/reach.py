"""Which layers of a model its forward calls, and which parameters reach its output.

A copy of the model without storage (device "meta") is run once on images of its own size, with gradients. A parameter
reaches the output if the graph leads to it. That does not depend on values, so that a layer scale or a norm that
starts at zero hides nothing behind it.
"""

import copy
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from visionpeft.backbones.unwatched import HOOKS, without_global_hooks
from visionpeft.errors import UnsupportedError, one_line
from visionpeft.sites.stand_ins import own_class

OURS = ("peft", "merged_peft")  # what adapters add to a model
IMAGES = 2  # some models treat a single image in another way


@dataclass
class Reach:
    """What one pass of a model has met.

    Args:
        calls: paths of the modules in the order of their first call, each with the number of calls.
        reads: by path, how often the weight of a module was read.
        reached: names of the parameters that reach the output.
    """

    calls: Counter[str]
    reads: Counter[str]
    reached: frozenset[str]


def reach(model: nn.Module) -> Reach:
    """Run a copy of a model without storage.

    Raises:
        UnsupportedError: it cannot be run so, on no image size that it names.
    """
    calls, reads, failure = Counter(), Counter(), None
    for shape in _image_shapes(model):
        skeleton = without_storage(model)
        for path, module in skeleton.named_modules():
            module.register_forward_pre_hook(lambda _, args, path=path: calls.update([path]))
            if module._parameters.get("weight") is not None:
                _note_reads(module, reads, path)
        try:
            with torch.enable_grad(), without_global_hooks(), torch.random.fork_rng(devices=[]):
                output = skeleton(torch.empty(IMAGES, *shape, device="meta"))
        except Exception as error:  # whatever a model raises for images it does not take
            failure = failure or error
            calls.clear()
            reads.clear()
            continue
        return Reach(calls, reads, frozenset(_reached(skeleton, list(_tensors(output)))))
    raise UnsupportedError(f"{type(model).__name__} cannot be run to see what it calls ({one_line(failure)})")


def _image_shapes(model: nn.Module) -> Iterator[tuple[int, ...]]:
    """Channels, height and width that the model may take: those it was made for, then those of its weights."""
    config = getattr(model, "pretrained_cfg", None) or {}
    channels, *size = config.get("input_size") or (3, 224, 224)
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    channels = getattr(model, "in_chans", channels if first is None else first.in_channels * first.groups)
    sizes = [getattr(part, "img_size", None) for part in (getattr(model, "patch_embed", None), model)]
    sizes.append(getattr(model, "image_size", None))  # as OpenCLIP calls it
    inner = [getattr(part, "patch_embed", None) for part in model.children()]  # of timm's wrapper for features alone
    sizes += [getattr(part, "img_size", None) for part in inner]
    sizes = [(each, each) if isinstance(each, int) else each for each in sizes]
    for height, width in dict.fromkeys(tuple(each) for each in (*sizes, size) if each):
        for number in dict.fromkeys((channels, config.get("input_size", (3,))[0])):
            yield number, height, width


def without_storage(model: nn.Module) -> nn.Module:
    """A copy of a model as it is without adapters, whose tensors have shapes and no values."""
    memo: dict[int, object] = {id(vars(model)[name]): None for name in OURS if name in vars(model)}
    memo |= {id(model._modules[name]): nn.Identity() for name in OURS if name in model._modules}
    modules = [part for name, child in model.named_children() if name not in OURS for part in child.modules()]
    modules = [model, *dict.fromkeys(modules)]
    for part in modules:
        memo |= {id(getattr(part, name)): OrderedDict() for name in HOOKS}
        memo |= {id(vars(part)[name]): () for name in ("acting", "entering", "copies", "sites") if name in vars(part)}
        for tensor in (*part._parameters.values(), *part._buffers.values()):
            if tensor is not None:
                # float32, whatever the model is kept in: quantised tensors have no arithmetic there
                kind = torch.float32 if tensor.is_floating_point() else tensor.dtype
                bare = torch.empty(tensor.shape, dtype=kind, device="meta")
                memo[id(tensor)] = nn.Parameter(bare) if isinstance(tensor, nn.Parameter) else bare
    originals = [(part, own_class(part)) for part in modules]
    skeleton = copy.deepcopy(model, memo)
    for part, kind in originals:
        object.__setattr__(memo[id(part)], "__class__", kind)
    return skeleton.eval()


def _note_reads(module: nn.Module, reads: Counter[str], path: str) -> None:
    """Count how often the weight of a module is asked for."""

    def read(self):
        reads.update([path])
        return self._parameters["weight"]

    kind = type(module)
    object.__setattr__(module, "__class__", type(kind.__name__, (kind,), {"weight": property(read)}))


def _tensors(output: object) -> Iterator[torch.Tensor]:
    """The tensors of an output, which may be a list or dictionary of them."""
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, dict | list | tuple):
        for each in output.values() if isinstance(output, dict) else output:
            yield from _tensors(each)


def _reached(skeleton: nn.Module, outputs: list[torch.Tensor]) -> Iterator[str]:
    """Names of the parameters that the graph of the outputs leads to; a tied one under each of its names."""
    outputs = [each for each in outputs if each.requires_grad]
    parameters = list(dict.fromkeys(p for p in skeleton.parameters() if p.is_floating_point()))
    grads = torch.autograd.grad(outputs, parameters, [torch.ones_like(each) for each in outputs], allow_unused=True)
    live = {id(parameter) for parameter, grad in zip(parameters, grads, strict=True) if grad is not None}
    yield from (name for name, p in skeleton.named_parameters(remove_duplicate=False) if id(p) in live)
