"""Lightning checkpoints of what is trained only: adapters, heads, learners and extra parameters, no frozen backbone."""

from collections.abc import Set

import torch

from visionpeft.errors import StorageError, UserError

LOWER = "lower the learning rate (--model.optimisation.lr)"


class DivergedError(UserError, ArithmeticError):
    """Training produced a loss or a parameter that is not a finite number."""


def keep_trained(checkpoint: dict, keys: Set[str]) -> None:
    """Drop all but the trained tensors from a checkpoint that is being saved, also from the copies of callbacks.

    Raises:
        DivergedError: a trained tensor is not finite; the checkpoint on disk is left as it was.
    """
    for holder, name in _states(checkpoint, keys):
        trained = {key: value for key, value in holder[name].items() if key in keys}
        for key, value in trained.items():
            if not torch.isfinite(value).all():
                raise DivergedError(f"{_short(key)} is not finite after epoch {checkpoint['epoch'] + 1}; {LOWER}")
        holder[name] = trained


def complete_copies(checkpoint: dict, module: torch.nn.Module, keys: Set[str]) -> None:
    """Put the frozen tensors of a module back into the states that callbacks which copy modules will load.

    Args:
        checkpoint: a checkpoint that is being loaded.
        module: the module, whose frozen tensors are referred to and not copied.
        keys: what is trained.
    """
    states = _states(checkpoint, keys)
    if len(states) > 1:
        frozen = {key: value for key, value in module.state_dict().items() if key not in keys}
        for holder, name in states:
            holder[name] = frozen | holder[name]


def _states(checkpoint: dict, keys: Set[str]) -> list[tuple[dict, str]]:
    """Where in a checkpoint there are states of the whole module: its own, and those of callbacks that average it."""
    holders = [checkpoint, *checkpoint.get("callbacks", {}).values()]
    others = [
        (holder, name)
        for holder in holders
        if isinstance(holder, dict)
        for name, value in holder.items()
        if isinstance(value, dict) and keys and keys <= value.keys() and value is not checkpoint["state_dict"]
    ]
    return [(checkpoint, "state_dict"), *others]


def check_trained(checkpoint: dict, module: torch.nn.Module, keys: Set[str]) -> None:
    """Check that a checkpoint has exactly the trained tensors of a module, with their shapes.

    Raises:
        StorageError: the checkpoint belongs to another method, learner, head or backbone.
    """
    own = {key: value.shape for key, value in module.state_dict().items() if key in keys}
    saved = {key: value.shape for key, value in checkpoint["state_dict"].items()}
    differing = sorted(key for key in own.keys() | saved.keys() if own.get(key) != saved.get(key))
    if differing:
        shown = ", ".join(_short(key) for key in differing[:4])
        raise StorageError(
            f"the checkpoint does not belong to this method or learner, head and backbone: {len(differing)} tensors "
            f"differ in name or shape, among them {shown}"
        )


def _short(key: str) -> str:
    return key.removeprefix("model.peft.").removeprefix("learner.")
