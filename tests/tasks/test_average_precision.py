"""Average precision by numbers made by hand."""

import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch

import visionpeft as vp
from visionpeft.data.detection.objects import objects_of
from visionpeft.data.detection.outlines import encoded
from visionpeft.tasks.average_precision import AveragePrecision, evaluation

SIZE = (40, 40)


def measured(images, classes=("a",), masks=False):
    """Of images (boxes, labels, crowd, found boxes, labels, scores)."""
    whole = AveragePrecision(classes, masks)
    for boxes, labels, crowd, *found in images:
        names = zip(("boxes", "labels", "scores"), found, strict=True)
        tensors = {name: torch.tensor(values, dtype=torch.float64) for name, values in names}
        tensors["labels"] = tensors["labels"].long()
        whole.add(objects_of(boxes, labels, crowd), SIZE, tensors | {"boxes": tensors["boxes"].reshape(-1, 4)})
    return whole.detail()


def test_a_false_one_between_two_right_ones():
    """Precision 1 up to a recall of .5, 2/3 after it: 51 and 50 of 101 recalls."""
    boxes = [[0, 0, 10, 10], [20, 20, 30, 30]]
    found = [boxes[0], [10, 30, 15, 35], boxes[1]]
    result = measured([(boxes, [0, 0], None, found, [0, 0, 0], [0.9, 0.8, 0.7])])
    expected = (51 + 50 * 2 / 3) / 101
    assert [result[name] for name in ("ap", "ap50", "ap75", "ap_small")] == pytest.approx([expected] * 4)
    assert result["ap_large"] is None


def test_thresholds_classes_and_what_is_not_there():
    """An overlap of .625 is enough for .5, .55 and .6; a class without objects counts nowhere."""
    result = measured([([[0, 0, 8, 8]], [1], None, [[0, 0, 8, 5], [0, 0, 8, 8]], [1, 2], [0.5, 0.9])], ("x", "y", "z"))
    assert [result[name] for name in ("ap", "ap50", "ap75")] == pytest.approx([0.3, 1, 0])
    assert result["ap_by_class"] == {"x": None, "y": pytest.approx(0.3), "z": None}


@pytest.mark.parametrize(("crowd", "expected"), [(True, 1.0), (False, (51 * 1 / 3 + 0) / 101)])
def test_what_lies_in_a_crowd_is_neither_right_nor_wrong(crowd, expected):
    boxes, found = [[0, 0, 20, 20], [30, 30, 36, 36]], [[1, 1, 6, 6], [8, 8, 14, 14], [30, 30, 36, 36]]
    result = measured([(boxes, [0, 0], [crowd, False], found, [0, 0, 0], [0.9, 0.8, 0.7])])
    assert result["ap"] == pytest.approx(expected)


def test_images_without_objects_count():
    """A false one in another image, and an image where nothing is found, as in one image."""
    empty = ([], [], None, [], [], [])
    box = [[5, 5, 15, 15]]
    assert measured([(box, [0], None, box, [0], [0.5]), empty])["ap"] == pytest.approx(1)
    false = ([], [], None, box, [0], [0.9])
    assert measured([(box, [0], None, box, [0], [0.5]), false])["ap"] == pytest.approx(0.5)
    assert measured([false])["ap"] is None
    missed = (box, [0], None, [], [], [])
    assert measured([missed, empty])["ap"] == 0


def test_masks_are_measured_by_their_pixels():
    """Half of a mask is enough for .5 alone, in a box that is right."""
    mask = np.zeros((1, *SIZE), bool)
    mask[0, 4:12, 4:12] = True
    half = mask.copy()
    half[0, 8:12, 4:11] = False  # of 64 pixels 36 are left: .5625
    whole = AveragePrecision(["a"], masks=True)
    found = {"boxes": torch.tensor([[4.0, 4, 12, 12]]), "labels": torch.tensor([0]), "scores": torch.tensor([0.9])}
    whole.add(objects_of([[4, 4, 12, 12]], [0], masks=mask), SIZE, found | {"masks": torch.from_numpy(half)})
    result = whole.detail()
    assert [result[name] for name in ("ap", "mask_ap", "mask_ap50", "mask_ap75")] == pytest.approx([1, 0.2, 1, 0])


def test_masks_are_small_or_large_by_their_own_pixels():
    """Thin lines in boxes of more than 32 * 32 pixels: by masks there is nothing but small ones.

    A false one of the highest score stands before the right one, so that precision is 1/2 at every recall.
    """
    masks = np.zeros((2, 64, 64), bool)
    masks[0, range(60), range(60)] = True
    masks[1, range(60), range(60)[::-1]] = True
    boxes = [[0, 0, 60, 60]]
    whole = AveragePrecision(["a"], masks=True)
    found = {
        "boxes": torch.tensor(boxes * 2).float(),
        "labels": torch.tensor([0, 0]),
        "scores": torch.tensor([0.8, 0.9]),
    }
    whole.add(objects_of(boxes, [0], areas=[60], masks=masks[:1]), (64, 64), found | {"masks": torch.from_numpy(masks)})
    result = whole.detail()
    sizes = [result[f"mask_ap{size}"] for size in ("", "_small", "_medium", "_large")]
    assert sizes == [pytest.approx(0.5), pytest.approx(0.5), None, None]


def test_numbers_of_annotations_matter_to_the_evaluation():
    """Why annotations are numbered here: under 0, what is found is taken for missed."""
    coco, evaluate = evaluation()
    for number, expected in ((1, 1.0), (0, 0.0)):
        truth = {
            "images": [{"id": 1, "height": 40, "width": 40}],
            "categories": [{"id": 1, "name": "a"}],
            "annotations": [
                {"id": number, "image_id": 1, "category_id": 1, "bbox": [0, 0, 9, 9], "area": 81, "iscrowd": 0}
            ],
        }
        with pytest.warns(UserWarning, match="annotation id 0") if number == 0 else nullcontext():
            own = coco(truth)
        found = own.loadRes([{"image_id": 1, "category_id": 1, "bbox": [0, 0, 9, 9], "score": 0.9}])
        done = evaluate(own, found, "bbox", print_function=lambda *_: None)
        done.run()
        assert done.stats[0] == pytest.approx(expected)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(vp.ConfigurationError, match=r"pip install 'visionpeft\[detection\]'"):
        AveragePrecision(["a"], masks=False)
    monkeypatch.setitem(sys.modules, "faster_coco_eval.core", None)
    with pytest.raises(vp.ConfigurationError, match="masks of objects need faster-coco-eval"):
        encoded(np.zeros((2, 2), bool))
