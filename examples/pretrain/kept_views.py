"""The views that ``teacher_views.py`` keeps, and how far a student is from its teacher on them."""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

UNMASKED = 0.85  # from this share of a run on, all patches are shown
NAMES = ("images", "pose", "any_pose", "styles", "drawing", "class_token", "patches")


class KeptViews:
    """All views in memory.

    Attributes:
        images: (views, 3, 64, 64) uint8.
        pose, any_pose, styles: see ``augmentation.Views``.
        drawing: number of the drawing of each (views,).
        class_token: the teacher's class token (views, 384), each value with mean 0 and variance 1 over the views.
        patches: its patch tokens (views, 64, 64) along 64 directions, with mean 0 and a mean variance of 1.

    Args:
        folder: what ``teacher_views.py`` wrote.
    """

    def __init__(self, folder: Path):
        files = [load_file(path) for path in sorted(folder.glob("round-*.safetensors"))]
        columns = [torch.cat([file.pop(name) for file in files]) for name in NAMES]
        self.images, self.pose, self.any_pose, self.styles, self.drawing, class_token, self.patches = columns
        class_token = class_token.float()
        self.class_token = ((class_token - class_token.mean(0)) / class_token.std(0)).half()
        some = self.patches[:4096].float()
        self.patches -= some.mean((0, 1)).half()
        self.patches /= some.var((0, 1)).mean().sqrt().half()

    def __len__(self) -> int:
        return len(self.images)

    def shown(self, count: int, progress: float) -> Tensor | None:
        """Half of the patches, in random order, for each of ``count`` images: (count, patches / 2); None is all.

        Args:
            count: number of images.
            progress: which share of the run is over.
        """
        if progress >= UNMASKED:
            return None
        patches = self.patches.shape[1]
        return torch.rand(count, patches).argsort(1)[:, : patches // 2]


def only(tokens: Tensor, seen: Tensor | None) -> Tensor:
    """The tokens (batch, patches, width) of the patches ``seen`` (batch, kept), or all."""
    return tokens if seen is None else tokens.gather(1, seen[:, :, None].expand(-1, -1, tokens.shape[2]))


class TeacherHeads(nn.Module):
    """Linear maps from a student's tokens after its last norm to those of the teacher.

    Args:
        width: of the student's tokens.
        views: of the teacher.
    """

    def __init__(self, width: int, views: KeptViews):
        super().__init__()
        self.class_token = nn.Linear(width, views.class_token.shape[1])
        self.patches = nn.Linear(width, views.patches.shape[2])

    def forward(self, tokens: Tensor, views: KeptViews, rows: Tensor, seen: Tensor | None) -> dict[str, Tensor]:
        """Mean squared errors of class token and patch tokens.

        Args:
            tokens: (batch, 1 + kept, width), the class token first.
            views: of the teacher.
            rows: numbers of the views (batch,).
            seen: numbers of the patches (batch, kept) that the student saw, or None for all.
        """
        patches = only(views.patches[rows], seen).float()
        return {
            "class_token": F.mse_loss(self.class_token(tokens[:, 0]).float(), views.class_token[rows].float()),
            "patches": F.mse_loss(self.patches(tokens[:, 1:]).float(), patches),
        }
