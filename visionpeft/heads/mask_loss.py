"""The loss of heads that predict masks and their classes: matching, and what matched pairs cost at sampled points."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from visionpeft.errors import ConfigurationError
from visionpeft.heads.mask_classification import MaskPredictions


@dataclass(frozen=True)
class MaskLoss:
    """Weights and points of `mask_classification_loss`, with the values of Mask2Former, EoMT and PMT.

    Args:
        classes: weight of the cross-entropy of classes, in the loss and in the costs of pairs.
        masks: weight of the binary cross-entropy of masks, likewise.
        dice: weight of the dice loss of masks, likewise.
        nothing: weight of "nothing" among the classes of the cross-entropy.
        points: P, at which masks are compared.
        oversample: so many times P points are drawn, of which the least certain are taken.
        important: share of the points that are taken for being the least certain; the others are drawn anew.
    """

    classes: float = 2.0
    masks: float = 5.0
    dice: float = 5.0
    nothing: float = 0.1
    points: int = 12_544
    oversample: float = 3.0
    important: float = 0.75

    def __post_init__(self):
        if min(self.classes, self.masks, self.dice, self.nothing) < 0 or self.points < 1:
            raise ConfigurationError(f"weights must not be negative, and points at least 1: {self}")
        if not 0 <= self.important <= 1 <= self.oversample:
            raise ConfigurationError(f"important must be from 0 to 1, and oversample at least 1: {self}")


MASK_LOSS = MaskLoss()


def mask_classification_loss(
    predictions: MaskPredictions,
    labels: Tensor,
    ignored: int = -1,
    shares: tuple[float, float] = (1.0, 1.0),
    weights: MaskLoss = MASK_LOSS,
) -> Tensor:
    """Sum over predictions of w_c CE + w_m BCE + w_d dice, (), of queries matched with the classes of an image.

    Each class that an image shows is one mask t; its pixels are sampled bilinearly at points p. In each prediction and
    image, queries q and classes c are matched one to one with the least sum of
    -w_c softmax(classes_q)_c + w_m BCE(x_q, t_c) + w_d dice(x_q, t_c) over P points that are drawn evenly. Then CE is
    the cross-entropy of all queries, those without a class being "nothing", as a mean weighted by class; BCE and dice
    are sums over matched pairs divided by their number in the batch, over P points of which most are those with the
    least |x| of 3 P. dice(x, t) = 1 - (2 sum s t + 1) / (sum s + sum t + 1) with s = sigmoid(x).
    Points where a pixel is ignored have no weight, while in the published code such pixels are outside of every mask.

    Cheng et al. 2022, "Masked-attention Mask Transformer for Universal Image Segmentation" (arXiv 2112.01527), and
    Kerssies et al. 2025, "Your ViT is Secretly an Image Segmentation Model" (arXiv 2503.19108).

    Args:
        predictions: what the head gives in training mode.
        labels: class indices (batch, height, width).
        ignored: the label of pixels that do not count.
        shares: of the extent of the predicted masks that the labels cover.
        weights: weights and points.

    Raises:
        ConfigurationError: SciPy, which matches, is not installed.
    """
    with torch.autocast(labels.device.type, enabled=False):
        predictions = predictions if predictions.masks[0].dtype == torch.float64 else predictions.to(torch.float32)
        targets = [_Targets(each, ignored, predictions.masks[0].dtype) for each in labels]
        pairs = _matched(predictions, targets, shares, weights)
        losses = [
            _loss(masks, classes, targets, matched, shares, weights)
            for masks, classes, matched in zip(predictions.masks, predictions.classes, pairs, strict=True)
        ]
        return torch.stack(losses).sum()


class _Targets:
    """The classes of an image as masks.

    Args:
        labels: class indices (height, width).
        ignored: the label of pixels that do not count.
        dtype: of the masks.
    """

    def __init__(self, labels: Tensor, ignored: int, dtype: torch.dtype):
        found = labels.unique()
        self.classes = found[found != ignored]
        self.masks = (labels == self.classes[:, None, None]).to(dtype)
        self.valid = (labels != ignored).to(dtype)[None]

    def at(self, points: Tensor, chosen: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Masks of these classes, and weights, (n, P) each, at points (n or 1, P, 2)."""
        valid = sampled(self.valid.expand(len(points), -1, -1), points, outside="border")  # half a pixel is no end
        return sampled(self.masks[chosen], points), valid


def sampled(values: Tensor, points: Tensor, outside: str = "zeros") -> Tensor:
    """Values (n, h, w) between the centres of pixels at points (n or 1, P, 2) = (x, y) from 0 to 1: (n, P).

    Outside of the outermost centres they fade to zeros, or stay as they are for `outside="border"`.
    """
    grid = (2 * points - 1)[:, :, None].expand(len(values), -1, -1, -1).to(values.dtype)
    return F.grid_sample(values[:, None], grid, padding_mode=outside, align_corners=False)[:, 0, :, 0]


def _drawn(number: int, points: int, like: Tensor) -> Tensor:
    return torch.rand(number, points, 2, device=like.device)


def _in_logits(points: Tensor, shares: tuple[float, float]) -> Tensor:
    """Points of the labels as points of the predicted masks, whose extent the labels cover in part."""
    return points if shares == (1.0, 1.0) else torch.stack([points[..., 0] * shares[1], points[..., 1] * shares[0]], -1)


def _matched(
    predictions: MaskPredictions, targets: list[_Targets], shares: tuple[float, float], weights: MaskLoss
) -> list[list[tuple[Tensor, Tensor]]]:
    """Queries and the classes (numbers among those of the image) matched with them, of each prediction and image."""
    try:
        from scipy.optimize import linear_sum_assignment  # for these heads alone
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            "matching queries with classes needs SciPy; install it with pip install scipy"
        ) from error
    with torch.no_grad():
        costs = [
            [_costs(masks[i], classes[i], target, shares, weights) for i, target in enumerate(targets)]
            for masks, classes in zip(predictions.masks, predictions.classes, strict=True)
        ]
        flat = torch.cat([each.flatten() for of_images in costs for each in of_images])
    # All at once, as the device is waited for. That a model diverges is for the loss to tell; its pairs do not matter.
    values = np.nan_to_num(flat.cpu().numpy(), nan=1e30, posinf=1e30, neginf=-1e30)

    def match(cost: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal values
        own, values = values[: cost.numel()], values[cost.numel() :]
        rows, columns = linear_sum_assignment(own.reshape(cost.shape))
        return torch.from_numpy(rows).to(cost.device), torch.from_numpy(columns).to(cost.device)

    return [[match(each) for each in of_images] for of_images in costs]


def _costs(masks: Tensor, classes: Tensor, target: _Targets, shares: tuple[float, float], weights: MaskLoss) -> Tensor:
    """What each pair of a query and a class of the image costs, (Q, classes)."""
    points = _drawn(1, weights.points, masks)
    x = sampled(masks, _in_logits(points, shares))
    t, valid = target.at(points, slice(None))
    bce = ((F.softplus(-x) * valid) @ t.T + (F.softplus(x) * valid) @ (1 - t).T) / valid.sum().clamp(min=1)
    s = x.sigmoid() * valid
    dice = 1 - (2 * s @ t.T + 1) / (s.sum(1)[:, None] + (t * valid).sum(1) + 1)
    return weights.masks * bce + weights.dice * dice - weights.classes * classes.softmax(-1)[:, target.classes]


def _loss(
    masks: Tensor,
    classes: Tensor,
    targets: list[_Targets],
    pairs: list[tuple[Tensor, Tensor]],
    shares: tuple[float, float],
    weights: MaskLoss,
) -> Tensor:
    """The loss of one prediction."""
    nothing = classes.shape[-1] - 1
    wanted = torch.full(classes.shape[:2], nothing, device=classes.device)
    for row, target, (queries, chosen) in zip(wanted, targets, pairs, strict=True):
        row[queries] = target.classes[chosen]
    by_class = torch.ones_like(classes[0, 0])
    by_class[-1] = weights.nothing
    loss = weights.classes * F.cross_entropy(classes.transpose(1, 2), wanted, by_class)
    x = torch.cat([each[queries] for each, (queries, _) in zip(masks, pairs, strict=True)])
    if len(x) == 0:
        return loss + 0 * masks.sum()  # images without a labelled pixel
    points = _points(x.detach(), shares, weights)
    places = points.split([len(queries) for queries, _ in pairs])
    of_images = [
        target.at(each, chosen)
        for target, each, (_, chosen) in zip(targets, places, pairs, strict=True)
        if len(chosen) > 0
    ]
    t, valid = (torch.cat(each) for each in zip(*of_images, strict=True))
    x = sampled(x, _in_logits(points, shares))
    bce = F.binary_cross_entropy_with_logits(x, t, valid, reduction="none").sum(1) / valid.sum(1).clamp(min=1)
    s = x.sigmoid() * valid
    dice = 1 - (2 * (s * t).sum(1) + 1) / (s.sum(1) + (t * valid).sum(1) + 1)
    number = sum(len(target.classes) for target in targets)
    return loss + (weights.masks * bce.sum() + weights.dice * dice.sum()) / number


def _points(x: Tensor, shares: tuple[float, float], weights: MaskLoss) -> Tensor:
    """Points at which the masks x (n, h, w) are compared, (n, P, 2)."""
    drawn = _drawn(len(x), int(weights.points * weights.oversample), x)
    important = int(weights.important * weights.points)
    least = sampled(x, _in_logits(drawn, shares)).abs().topk(important, dim=1, largest=False).indices
    chosen = drawn.gather(1, least[..., None].expand(-1, -1, 2))
    return torch.cat([chosen, _drawn(len(x), weights.points - important, x)], dim=1)
