"""Whether probabilities are as often right as they say: expected calibration error and its reliability diagram.

Guo et al. 2017, "On Calibration of Modern Neural Networks" (arXiv 1706.04599).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

BINS = 15
ROUNDING = 1e-5


class Calibration:
    """Probabilities in equal-width bins, with what came true in each.

    Args:
        of: what the probabilities are of, in words.

    Attributes:
        counts: how many probabilities are in each bin, (bins,).
        confidences: their sum, (bins,).
        hits: how many came true, (bins,).
    """

    def __init__(self, of: str):
        self.of = of
        # Sums in double precision do not drift with the number of images.
        self.counts, self.confidences, self.hits = (torch.zeros(BINS, dtype=torch.float64) for _ in range(3))

    def add(self, confidences: Tensor, hits: Tensor) -> None:
        """Add probabilities (n,), and whether each came true, (n,)."""
        confidences, hits = confidences.cpu().double(), hits.cpu().double()
        # Bin b holds b / 15 <= p < (b + 1) / 15, the last one 1, too. Shares of votes lie on such bounds, and softmax
        # in single precision gives each of them by rounding just below its bound or on it.
        bins = (confidences * BINS + ROUNDING).nan_to_num().long().clamp(0, BINS - 1)
        self.counts += torch.bincount(bins, minlength=BINS)
        self.confidences += torch.bincount(bins, confidences, minlength=BINS)
        self.hits += torch.bincount(bins, hits, minlength=BINS)

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
            "bins": BINS,
            "counts": [int(count) for count in self.counts.tolist()],
            "mean_probability": means(self.confidences),
            "came_true": means(self.hits),
        }
