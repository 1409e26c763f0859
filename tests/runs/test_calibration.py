"""Expected calibration error against its formula, and against torchmetrics."""

import numpy as np
import pytest
import torch
from torchmetrics.classification import BinaryCalibrationError, MulticlassCalibrationError

from visionpeft.runs.calibration import BINS, Calibration


def by_hand(confidences, hits):
    """Guo et al. 2017, equation 3, bin by bin in double precision."""
    error = 0.0
    for bin in range(15):
        low, high = bin / 15, (bin + 1) / 15
        inside = (confidences >= low) & ((confidences < high) | ((bin == 14) & (confidences <= 1)))
        if inside.any():
            error += inside.mean() * abs(hits[inside].mean() - confidences[inside].mean())
    return error


def calibrated(parts):
    calibration = Calibration("test")
    for confidences, hits in parts:
        calibration.add(torch.as_tensor(confidences), torch.as_tensor(hits))
    return calibration


@pytest.mark.parametrize("bins", [1, 10, 20])
def test_other_numbers_of_bins(bins):
    generator = torch.Generator().manual_seed(3)
    probabilities = torch.rand(300, generator=generator)
    labels = (torch.rand(300, generator=generator) < probabilities**2).long()
    calibration = Calibration("test", bins)
    calibration.add(probabilities, labels)
    assert calibration.error == pytest.approx(
        BinaryCalibrationError(n_bins=bins)(probabilities, labels).item(), abs=1e-5
    )
    assert calibration.describe()["bins"] == len(calibration.describe()["counts"]) == bins


@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_against_the_formula_and_torchmetrics(scale):
    generator = torch.Generator().manual_seed(1)
    logits = scale * torch.randn(500, 4, generator=generator)
    labels = torch.randint(4, (500,), generator=generator)
    probabilities = logits.softmax(-1)
    confidences, found = probabilities.max(-1)
    hits = found == labels
    ours = calibrated((confidences[i : i + 64], hits[i : i + 64]) for i in range(0, 500, 64)).error
    assert ours == pytest.approx(by_hand(confidences.double().numpy(), hits.double().numpy()), abs=1e-9)
    assert ours == pytest.approx(MulticlassCalibrationError(4, n_bins=15)(probabilities, labels).item(), abs=1e-5)


def test_of_labels_against_torchmetrics():
    generator = torch.Generator().manual_seed(2)
    probabilities = torch.rand(300, generator=generator)
    labels = (torch.rand(300, generator=generator) < probabilities**2).long()
    ours = calibrated([(probabilities, labels)]).error
    assert ours == pytest.approx(BinaryCalibrationError(n_bins=15)(probabilities, labels).item(), abs=1e-5)
    assert ours > 0.1


def test_certainty_is_in_the_last_bin():
    """torchmetrics counts probabilities of exactly 1 in a bin of their own, and so finds more error here."""
    confidences, hits = np.array([1.0, 1.0, 0.96]), np.array([1.0, 0.0, 1.0])
    assert calibrated([(confidences, hits)]).error == pytest.approx(abs(2.96 / 3 - 2 / 3))


def test_what_is_said_comes_true():
    """A calibrated predictor has none, an overconfident one as much as it is overconfident."""
    hits = np.array([1.0] * 8 + [0.0] * 2)
    assert calibrated([(np.full(10, 0.8), hits)]).error == pytest.approx(0)
    assert calibrated([(np.full(10, 0.99), hits)]).error == pytest.approx(0.19)


def test_record():
    described = calibrated([([0.01, 0.05, 0.99], [0, 1, 1])]).describe()
    assert described["counts"] == [2, *[0] * (BINS - 2), 1]
    assert described["mean_probability"][0] == pytest.approx(0.03)
    assert described["came_true"][0] == pytest.approx(0.5)
    assert described["mean_probability"][1:-1] == [None] * (BINS - 2)


def test_shares_of_votes_on_a_bound_are_in_one_bin():
    """The softmax of log(9 / 15) is, by the order of the other classes, 0.6 or the number just below it."""
    shares = torch.full((64, 10), torch.finfo(torch.float32).tiny)
    generator = torch.Generator().manual_seed(0)
    for index, row in enumerate(shares):
        others = torch.tensor([9, 1, 2, 3] if index % 2 else [9, 2, 2, 1, 1]) / 15
        row[torch.randperm(10, generator=generator)[: len(others)]] = others
    confidences = shares.log().softmax(-1).amax(-1)
    assert len((confidences.double() * BINS).long().unique()) == 2  # its negative control
    counts = calibrated([(confidences, torch.ones(64))]).describe()["counts"]
    assert counts == [64 if bin == 9 else 0 for bin in range(BINS)]
