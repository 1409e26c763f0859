"""Models inside something that computes with them as they were when it was made: it has to be made after attaching."""

from torch import jit, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from visionpeft.errors import UnsupportedError

# By names, as no model of theirs is there where the package is not installed.
AVERAGES = ("ModelEma", "ModelEmaV2", "ModelEmaV3")  # of timm


def check_not_wrapped(model: nn.Module) -> None:
    """Refuse a model that was compiled, sharded, replicated, copied for an average or written out before attaching.

    What is attached inside of it would not be trained, averaged or computed: DDP averages the gradients of the
    parameters that it found, an average has a copy of the model, and a trace knows no modules.

    Raises:
        UnsupportedError: so it is; the sentence says what comes first.
    """
    if hasattr(model, "_orig_mod"):
        raise UnsupportedError(
            f"{type(model._orig_mod).__name__} is already compiled; attach before torch.compile (compile the result)"
        )
    name = type(model).__name__
    if any(cls.__name__ == "FSDPModule" for cls in type(model).__mro__):
        raise UnsupportedError(f"{name} is already sharded; attach before fully_shard")
    if isinstance(model, jit.ScriptModule):
        raise UnsupportedError(
            f"{name} is TorchScript, which nothing can be attached to or taken off; use the model that it was made of"
        )
    if name == "_FabricModule" and type(model).__module__.partition(".")[0] in ("lightning", "lightning_fabric"):
        raise UnsupportedError(
            f"{_within(model.module)} is already set up by Lightning Fabric; attach before fabric.setup (set up "
            "the result)"
        )
    if isinstance(model, DistributedDataParallel):
        raise UnsupportedError(
            f"{_within(model.module)} is already within DistributedDataParallel, which would not average the gradients "
            "of what is attached now; attach first, then wrap the result"
        )
    if isinstance(model, DataParallel):
        raise UnsupportedError(
            f"{_within(model.module)} is within DataParallel, in whose copies adapters cannot act; attach to the "
            "model itself, and train on several devices with torchrun and DistributedDataParallel"
        )
    if isinstance(model, AveragedModel) or name in AVERAGES:
        raise UnsupportedError(
            f"{name} holds a copy of {_within(model.module)} for an average; attach to the model first, then make its "
            f"{name} again"
        )


def _within(model: nn.Module) -> str:
    """The class of a model that is wrapped, perhaps more than once."""
    while isinstance(inner := getattr(model, "_orig_mod", None) or getattr(model, "module", None), nn.Module):
        model = inner
    return type(model).__name__
