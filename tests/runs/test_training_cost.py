"""Memory of one training, whatever the process needed before; means over classes."""

import mmap

import pytest
import torch
from small_runs import draw_images, results, run
from torchmetrics.classification import MulticlassAccuracy

from visionpeft.runs.test_record import TestRecord
from visionpeft.runs.training_cost import TrainingCost, forget_peak, peak_resident

MIB = 2**20


def touch(mebibytes):
    """Write to memory that is mapped anew and given back: an allocator may have some that the process holds anyway."""
    with mmap.mmap(-1, mebibytes * MIB) as area:
        for page in range(0, len(area), mmap.PAGESIZE):
            area[page] = 1


@pytest.mark.skipif(not forget_peak(), reason="this system cannot forget a peak")
def test_the_peak_of_a_later_training_is_its_own(tmp_path):
    """A gibibyte that was needed and freed before a training does not count; one that it needs does."""
    images = draw_images(tmp_path / "squares")
    first = results(run(tmp_path / "runs", images, epochs=1))
    touch(1024)
    assert peak_resident() > 2**30  # the process's own peak has it
    second = results(run(tmp_path / "runs", images, epochs=1))
    assert second["memory_kind"] == "process memory"
    assert abs(second["peak_memory_bytes"] - first["peak_memory_bytes"]) < 300 * MIB


def test_the_peak_within_a_training_counts_and_a_test_does_not():
    cost, module = TrainingCost(), torch.nn.Linear(1, 1)
    module.device = torch.device("cpu")
    cost.on_fit_start(None, module)
    touch(512)
    kept = cost.state_dict()
    cost.on_fit_end(None, module)
    peak = cost.peak_memory
    assert kept["peak_memory"] == peak
    touch(1024)
    assert cost.peak_memory == peak
    assert cost.state_dict()["peak_memory"] == peak
    if forget_peak():
        assert peak - peak_resident() > 400 * MIB
    # What was killed and resumed has the larger of both parts.
    resumed = TrainingCost()
    resumed.load_state_dict({"seconds": 1.0, "peak_memory": 2**50})
    resumed.on_fit_start(None, module)
    resumed.on_fit_end(None, module)
    assert resumed.peak_memory == 2**50


def recorded(labels, predictions, num_classes):
    record = TestRecord(num_classes)
    record.num_mistakes = 0
    for label, prediction in zip(labels, predictions, strict=True):
        record.confusion[label, prediction] += 1
    return record


@pytest.mark.parametrize(
    ("labels", "predictions", "occurring", "mean", "macro"),
    [
        ([0, 1, 2], [0, 1, 3], 3, 2 / 3, 2 / 4),  # class 3 is predicted and never occurs
        ([0, 1, 2, 3], [0, 1, 3, 3], 4, 3 / 4, 3 / 4),
        ([0, 0, 0, 1], [0, 0, 1, 1], 2, (2 / 3 + 1) / 2, (2 / 3 + 1) / 2),  # classes 2 and 3 are nowhere
        ([0, 0], [4, 4], 1, 0.0, 0.0),
    ],
)
def test_means_over_classes(labels, predictions, occurring, mean, macro):
    """By hand, and the second by torchmetrics itself."""
    record = recorded(labels, predictions, 5)
    assert record.occurring == occurring
    assert record.mean_per_class == pytest.approx(mean)
    assert record.macro_top1 == pytest.approx(macro)
    theirs = MulticlassAccuracy(5, average="macro")(torch.tensor(predictions), torch.tensor(labels))
    assert record.macro_top1 == pytest.approx(theirs.item())


def test_results_say_over_which_classes(tmp_path):
    found = results(run(tmp_path / "runs", draw_images(tmp_path / "squares"), epochs=1))
    assert (found["classes_tested"]["occurring"], found["classes_tested"]["of"]) == (3, 3)
    assert "balanced accuracy" in found["classes_tested"]["mean_per_class"]
    assert {"top1", "mean_per_class", "macro_top1"} <= found["test"].keys()
