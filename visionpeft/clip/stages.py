"""Training in two stages: in which of them a learner is, kept with what it has learnt."""

from collections.abc import Mapping
from typing import Any

import torch

from visionpeft.clip.kept_features import KeptFeatures
from visionpeft.errors import ConfigurationError


def check_share(first_stage: float) -> None:
    """Refuse what is no share of the epochs; to be asked before anything is attached to a CLIP.

    Raises:
        ConfigurationError: a share outside 0 to 1.
    """
    if not 0 <= first_stage <= 1:
        raise ConfigurationError(f"first_stage must be a share from 0 to 1, not {first_stage}")


class InTwoStages:
    """Mixed into a learner whose second stage begins after a share of the epochs.

    Attributes:
        second_stage: it has begun.
        first_stage: share of the epochs that the first stage has.
        stage: 1 or 2, as it is saved.
    """

    second_stage = False
    first_stage: float
    stage: torch.Tensor
    _kept: KeptFeatures

    def keep_stage(self: Any, first_stage: float) -> None:
        """Begin in the first stage."""
        self.first_stage = first_stage
        self.register_buffer("stage", torch.ones((), dtype=torch.uint8, device=self.text.device))
        self.register_load_state_dict_post_hook(_follow)

    def begin_training(self) -> None:
        """Begin in the first stage, if it has a share: a further training has both, too."""
        self._kept.clear()  # of texts that a fused optimiser has changed since without counting it
        if self.second_stage and self.first_stage > 0:
            self.stage.fill_(1)
            self.follow_stage()

    def end_epoch(self, epoch: int, num_epochs: int) -> None:
        """Begin the second stage where the first has had its share of the epochs."""
        if not self.second_stage and epoch + 1 >= self.first_stage * num_epochs:
            self.begin_second_stage()

    def begin_second_stage(self) -> None:
        """Begin it now."""
        self.stage.fill_(2)
        self.follow_stage()

    def follow_stage(self) -> None:
        """Read the stage that was loaded; in a step it is not read, for which a device would be waited for."""
        self.second_stage = self.stage.device.type != "meta" and self.stage.item() == 2

    def trained_state(self) -> dict[str, torch.Tensor]:
        """What is trained, and the stage."""
        return super().trained_state() | {"stage": self.stage}  # type: ignore[misc]

    def load_trained_state(self, tensors: Mapping[str, torch.Tensor], what: str) -> None:
        """Take over saved tensors.

        Raises:
            StorageError: they differ in name or shape; nothing is changed.
        """
        super().load_trained_state(tensors, what)  # type: ignore[misc]
        self.follow_stage()


def _follow(learner: InTwoStages, incompatible: object) -> None:
    learner.follow_stage()
