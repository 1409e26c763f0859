"""Lightning checkpoints of what is trained only: adapters, heads and extra parameters, never the frozen backbone."""

import torch

from visionpeft.errors import StorageError, UserError

TRAINED = "model.peft."


class DivergedError(UserError, ArithmeticError):
    """Training produced a loss or a parameter that is not a finite number."""


def keep_trained(checkpoint: dict) -> None:
    """Drop the backbone from a checkpoint that is being saved.

    Raises:
        DivergedError: a trained tensor is not finite; the checkpoint on disk is left as it was.
    """
    trained = {key: value for key, value in checkpoint["state_dict"].items() if key.startswith(TRAINED)}
    for key, value in trained.items():
        if not torch.isfinite(value).all():
            raise DivergedError(
                f"{key.removeprefix(TRAINED)} is not finite after epoch {checkpoint['epoch']}; the last good "
                "checkpoint is kept. Lower the learning rate (--model.optimisation.lr)"
            )
    checkpoint["state_dict"] = trained


def check_trained(checkpoint: dict, module: torch.nn.Module) -> None:
    """Check that a checkpoint has exactly the trained tensors of a module, with their shapes.

    Raises:
        StorageError: the checkpoint belongs to another method, head or backbone.
    """
    own = {key: value.shape for key, value in module.state_dict().items() if key.startswith(TRAINED)}
    saved = {key: value.shape for key, value in checkpoint["state_dict"].items()}
    differing = sorted(key for key in own.keys() | saved.keys() if own.get(key) != saved.get(key))
    if differing:
        shown = ", ".join(key.removeprefix(TRAINED) for key in differing[:4])
        raise StorageError(
            f"the checkpoint does not belong to this method, head and backbone: {len(differing)} tensors differ in "
            f"name or shape, among them {shown}"
        )
