"""Lightning checkpoints of what is trained only: adapters, heads, learners and extra parameters, no frozen backbone."""

from collections.abc import Set

import torch
from lightning.pytorch.utilities import CombinedLoader

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


def within_epoch(checkpoint: dict) -> bool:
    """Whether a checkpoint was taken in the middle of an epoch; one without the state of Lightning's loops was not."""
    batches = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress")
    return batches is not None and batches["current"]["ready"] > 0 and not batches["is_last_batch"]


def go_on_within_epoch(checkpoint: dict) -> list[dict]:
    """Let Lightning go on in the epoch in whose middle a training has ended, by steps, by time or by early stopping.

    Lightning counts it among those that it has been through before the last checkpoint is written: it would take the
    rest of its batches from the order of the epoch after it, and leave that one out.

    Returns:
        What the loaders of the training have delivered of the epoch, as their `state_dict` said; nothing at the end of
        an epoch.
    """
    if not within_epoch(checkpoint):
        return []
    loop = checkpoint["loops"]["fit_loop"]
    for progress in loop["epoch_progress"].values():
        if progress["processed"] == progress["started"]:
            progress["processed"] -= 1
    return loop["state_dict"].get("combined_loader", [])


def skip_delivered(iterables: object, delivered: list[dict]) -> None:
    """Let loaders leave out what they have delivered of an epoch that goes on.

    Lightning tells them where it makes them, and it has made them before it reads the checkpoint, because the length of
    an epoch was asked for.

    Args:
        iterables: the `train_dataloader` of a trainer.
        delivered: what `go_on_within_epoch` has given.
    """
    loaders = [each for each in CombinedLoader(iterables).flattened if hasattr(each, "load_state_dict")]
    for loader, state in zip(loaders, delivered, strict=False):
        loader.load_state_dict(state)


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
