"""ZERO: Frustratingly Easy Test-Time Adaptation of Vision-Language Models (Farina et al., 2024), arXiv 2405.18330."""

from collections.abc import Callable, Sequence

import torch
import torch.nn as nn

from visionpeft.clip.templates import PHOTO
from visionpeft.clip.views import FromViews, by_confidence, check_selection, check_views, number_chosen


class ZERO(FromViews):
    """Zero-shot CLIP at temperature zero: the most confident views of an image vote, each for the class it prefers.

    Of the views, the share `selection` whose zero-shot predictions have the lowest entropy is kept. Each has one vote,
    which classes of equal logit (to rounding) share. If several classes have most votes, the most confident of the
    other views whose class is among them has one more vote; if there is none, the first of the others (of all views,
    where all were kept) decides between them. The logits are the logarithm of the share of votes, so that softmax gives
    it back; a class without votes has that of the smallest number. Nothing is trained, tuned or differentiated; the
    image tower is run once on all views, and the texts are kept. Images do not see each other.
    Source: Farina et al., Frustratingly Easy Test-Time Adaptation of Vision-Language Models, 2024. To break a tie the
    authors' code asks the views in the order in which they were drawn, of those that were kept some, too.

    The learner takes views (batch, views, 3, height, width), view 0 being plain. For images it draws the other views
    itself as `TPT` does.

    Args:
        clip: an OpenCLIP model.
        tokenizer: its tokenizer.
        class_names: names of the classes.
        num_views: views of an image if they are drawn here.
        selection: share of the views that is kept; at least one is.
        template: one template or several for the texts, with {} for the class name; None is the data set's own in a
            run, and "a photo of a {}." otherwise.
        allow_duplicates: accept two classes of one name.

    Raises:
        ConfigurationError: a number out of range, or class names or templates that cannot be used.
    """

    def __init__(
        self,
        clip: nn.Module,
        tokenizer: Callable,
        class_names: Sequence[str],
        num_views: int = 64,
        selection: float = 0.3,
        template: str | list[str] | None = None,
        allow_duplicates: bool = False,
    ):
        check_selection(selection, num_views)
        super().__init__(
            clip,
            tokenizer,
            class_names,
            options={"num_views": num_views, "selection": selection, "template": template},
            templates=PHOTO if template is None else template,
            allow_duplicates=allow_duplicates,
        )
        self.num_views, self.selection = num_views, selection
        self.set_class_names(class_names)

    @torch.no_grad()
    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """Logarithm of the share of votes (batch, classes), from unit features (batch, views, features).

        Raises:
            ConfigurationError: features of one view only.
        """
        check_views(self, features)
        logits = self.logits(features, self.text_features())
        order = by_confidence(logits)
        logits = logits.take_along_dim(order[..., None], dim=1)
        kept = number_chosen(logits.shape[1], self.selection)
        highest = logits[:, :kept].amax(dim=-1, keepdim=True)
        # Two classes of one name have texts that differ by rounding.
        rounding = 8 * torch.finfo(logits.dtype).eps * highest.abs()
        preferred = (logits[:, :kept] >= highest - rounding).to(logits.dtype)
        votes = (preferred / preferred.sum(dim=-1, keepdim=True)).sum(dim=1)
        tied = votes == votes.amax(dim=-1, keepdim=True)
        further = logits[:, kept:] if kept < logits.shape[1] else logits
        votes = votes + _casting_vote(further, tied)
        share = votes / votes.sum(dim=-1, keepdim=True)
        return share.clamp(min=torch.finfo(share.dtype).tiny).log()


def _casting_vote(logits: torch.Tensor, tied: torch.Tensor) -> torch.Tensor:
    """One vote (batch, classes) between tied classes (batch, classes), none where one class stands alone.

    Args:
        logits: of the views (batch, views, classes) that are asked, the most confident first.
        tied: which classes have most votes.
    """
    classes = logits.argmax(dim=-1)
    among = tied.gather(1, classes)
    first = among.to(torch.uint8).argmax(dim=1, keepdim=True)  # the first of those that are among them
    between = logits[:, 0].masked_fill(~tied, -torch.inf).argmax(dim=1, keepdim=True)
    winner = torch.where(among.any(dim=1, keepdim=True), classes.gather(1, first), between)
    needed = tied.sum(dim=1, keepdim=True) > 1
    return torch.zeros_like(logits[:, 0]).scatter(1, winner, needed.to(logits.dtype))
