"""Whether probabilities are as often right as they say: expected calibration error and its reliability diagram.

Guo et al. 2017, "On Calibration of Modern Neural Networks" (arXiv 1706.04599).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from visionpeft.runs.options import CALIBRATION_BINS as BINS

ROUNDING = 1e-5


class Calibration:
    """Probabilities in equal-width bins, with what came true in each.

    Args:
        of: what the probabilities are of, in words.
        bins: number of bins. The error of more bins is larger, so that errors compare for one number alone.

    Attributes:
        counts: how many probabilities are in each bin, (bins,).
        confidences: their sum, (bins,).
        hits: how many came true, (bins,).
    """

    def __init__(self, of: str, bins: int = BINS):
        self.of, self.bins = of, bins
        # Sums in double precision do not drift with the number of images.
        self.counts, self.confidences, self.hits = (torch.zeros(bins, dtype=torch.float64) for _ in range(3))

    def add(self, confidences: Tensor, hits: Tensor) -> None:
        """Add probabilities (n,), and whether each came true, (n,)."""
        confidences, hits = confidences.cpu().double(), hits.cpu().double()
        # Bin b of n holds b / n <= p < (b + 1) / n, the last one 1, too. Shares of votes lie on such bounds, and
        # softmax in single precision gives each of them by rounding just below its bound or on it.
        bins = (confidences * self.bins + ROUNDING).nan_to_num().long().clamp(0, self.bins - 1)
        self.counts += torch.bincount(bins, minlength=self.bins)
        self.confidences += torch.bincount(bins, confidences, minlength=self.bins)
        self.hits += torch.bincount(bins, hits, minlength=self.bins)

    def take(self, shares: Sequence["Calibration"]) -> None:
        """Put together the shares of several processes, this one's among them."""
        for name in ("counts", "confidences", "hits"):
            setattr(self, name, sum(getattr(share, name) for share in shares))

    @property
    def error(self) -> float:
        """Expected calibration error: sum over the bins of n_b / n |mean probability - share that came true|."""
        return ((self.confidences - self.hits).abs().sum() / self.counts.sum()).item()

    @property
    def confidence(self) -> float:
        """Mean probability."""
        return (self.confidences.sum() / self.counts.sum()).item()

    def describe(self) -> dict:
        """The bins, for the record of a run; means of an empty bin are None."""

        def means(sums: Tensor) -> list[float | None]:
            pairs = zip(sums.tolist(), self.counts.tolist(), strict=True)
            return [round(total / count, 6) if count else None for total, count in pairs]

        return {
            "of": self.of,
            "bins": self.bins,
            "counts": [int(count) for count in self.counts.tolist()],
            "mean_probability": means(self.confidences),
            "came_true": means(self.hits),
        }
