"""What is measured of pixels: by torchmetrics, and by hand where nothing counts."""

import pytest
import torch
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from visionpeft.errors import DataError
from visionpeft.tasks.pixel_metrics import MeanIoU, PixelAccuracy
from visionpeft.tasks.segmentation_objective import ClassOfPixels


def test_pixels_of_all_batches_together_are_measured_as_by_torchmetrics():
    """With ignored pixels, a class that is only predicted, and one that does not occur at all."""
    generator = torch.Generator().manual_seed(0)
    ours, accuracy = MeanIoU(5, -1), PixelAccuracy(-1)
    theirs = MulticlassJaccardIndex(5, ignore_index=-1)
    theirs_accuracy = MulticlassAccuracy(5, average="micro", ignore_index=-1)
    for size in ((2, 7, 9), (1, 1, 30), (3, 4, 4)):
        labels = torch.randint(-1, 3, size, generator=generator)
        found = torch.where(torch.rand(size, generator=generator) < 0.5, labels, 3 * labels % 4).clamp(min=0)
        for metric in (ours, accuracy, theirs, theirs_accuracy):
            metric.update(found, labels)
    ours.update(torch.zeros(1, 2, 2, dtype=torch.long), torch.full((1, 2, 2), -1))  # counts nowhere
    assert torch.allclose(ours.compute(), theirs.compute())
    assert torch.allclose(accuracy.compute(), theirs_accuracy.compute())
    assert 0.2 < ours.compute() < 0.9


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_split_without_a_labelled_pixel_is_refused(split):
    """Its mean IoU is no number, which JSON does not have. While training, such an epoch goes by."""
    objective = ClassOfPixels(3)
    nothing = torch.zeros(1, 4, 4, dtype=torch.long), torch.full((1, 4, 4), -1)
    measured, trained = (objective.metrics(each)["miou"] for each in (split, "train"))
    for metric in (measured, trained):
        metric.update(*nothing)
    with pytest.raises(DataError, match=f"no pixel measured of the {split} split has a class"):
        measured.compute()
    assert trained.compute().isnan()
    measured.update(torch.zeros(1, 4, 4, dtype=torch.long), torch.zeros(1, 4, 4, dtype=torch.long))
    assert measured.compute() == 1
