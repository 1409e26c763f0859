"""Average precision of boxes and masks over a whole split, as COCO computes it, by faster-coco-eval."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from visionpeft.data.detection.objects import Objects
from visionpeft.data.detection.outlines import encoded
from visionpeft.errors import ConfigurationError

STATISTICS = {"ap": 0, "ap50": 1, "ap75": 2, "ap_small": 3, "ap_medium": 4, "ap_large": 5}


class AveragePrecision:
    """What there is and what was found in the images of a split.

    For each class and each IoU of .50, .55, ... .95, detections are gone through from the highest score down. Each is
    right if an object of its class that is not taken yet overlaps it by the IoU; one that lies in a crowd, beside no
    such object, counts nowhere. The average precision is the mean over 101 recalls 0, .01, ... 1 of the largest
    precision at that recall or a higher one. "ap" is the mean over classes that have objects and IoUs, "ap50" and
    "ap75" those at one IoU. At most 100 detections of an image count.

    Annotations are numbered here, from 1 on, whatever their files say: 0 is what the evaluation takes for no match.

    Args:
        class_names: names of the classes.
        masks: measure masks as well.

    Raises:
        ConfigurationError: faster-coco-eval is not installed.
    """

    def __init__(self, class_names: Sequence[str], masks: bool):
        evaluation()
        self.class_names = list(class_names)
        self.masks = masks
        self.images: list[dict] = []

    def add(self, truth: Objects, size: tuple[int, int], found: dict[str, Tensor]) -> None:
        """Add an image of a height and width in pixels, with "boxes", "scores", "labels" (and "masks") found in it."""
        arrays = {name: value.detach().cpu().numpy() for name, value in found.items()}
        own = [
            {"category_id": int(label) + 1, "bbox": _sides(box), "iscrowd": int(crowd), "area": float(area)}
            for label, box, crowd, area in zip(truth.labels, truth.boxes, truth.crowd, truth.areas, strict=True)
        ]
        results = [
            {"category_id": int(label) + 1, "bbox": _sides(box), "score": float(score)}
            for label, box, score in zip(arrays["labels"], arrays["boxes"], arrays["scores"], strict=True)
        ]
        if self.masks:
            for entries, masks in ((own, truth.masks), (results, arrays["masks"])):
                for entry, mask in zip(entries, masks, strict=True):
                    entry["segmentation"] = encoded(mask)
        self.images.append({"size": tuple(size), "truth": own, "found": results})

    def compute(self) -> dict[str, float | None]:
        """The statistics by name, of masks with "mask_" before it; None where there are no such objects."""
        return {name: value for name, value in self.detail().items() if not isinstance(value, dict)}

    def detail(self) -> dict:
        """The statistics, and "ap_by_class" (and "mask_ap_by_class"): each class by its name."""
        found = self._of("bbox", "")
        return found | self._of("segm", "mask_") if self.masks else found

    def _of(self, kind: str, before: str) -> dict:
        coco, evaluate = evaluation()
        annotations = [
            entry | {"image_id": number} for number, image in enumerate(self.images, 1) for entry in image["truth"]
        ]
        results = [
            entry | {"image_id": number} for number, image in enumerate(self.images, 1) for entry in image["found"]
        ]
        # findings/coco_evaluation_takes_the_area_of_a_box_for_that_of_its_mask.sh
        if kind == "segm":
            results = [{name: value for name, value in entry.items() if name != "bbox"} for entry in results]
        sizes = enumerate((image["size"] for image in self.images), 1)
        whole = {
            "images": [{"id": number, "height": height, "width": width} for number, (height, width) in sizes],
            "categories": [{"id": number, "name": name} for number, name in enumerate(self.class_names, 1)],
            "annotations": [entry | {"id": number} for number, entry in enumerate(annotations, 1)],
        }
        truth = coco(whole)
        done = evaluate(truth, truth.loadRes(results), kind, print_function=lambda *_: None)
        done.run()
        values = {before + name: _number(done.stats[place]) for name, place in STATISTICS.items()}
        precision = done.eval["precision"][:, :, :, 0, -1]  # (IoUs, recalls, classes), of objects of all sizes
        by_class = [_number(precision[:, :, index].mean()) for index in range(len(self.class_names))]
        return values | {f"{before}ap_by_class": dict(zip(self.class_names, by_class, strict=True))}


def evaluation() -> tuple[type, type]:
    """faster-coco-eval's COCO and COCOeval_faster.

    Raises:
        ConfigurationError: it is not installed.
    """
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            "average precision needs faster-coco-eval; install it with pip install 'visionpeft[detection]'"
        ) from error
    return COCO, COCOeval_faster


def _number(value: float) -> float | None:
    """None of -1, which stands for no objects."""
    return None if value < 0 else float(value)


def _sides(box: np.ndarray) -> list[float]:
    """x, y, width, height."""
    x0, y0, x1, y1 = (float(value) for value in box)
    return [x0, y0, x1 - x0, y1 - y0]
