#!/usr/bin/env bash
# faster-coco-eval (as pycocotools) measures AP of small, medium and large masks by the area of the box that a result
# also has.
#
# A model of instances writes results with "bbox" and "segmentation". Read by `loadRes`, each gets the area of its box,
# also for the evaluation of masks. A thin diagonal mask is small and has a large box: a false positive of that kind
# counts as large, and no longer lowers the AP of small masks. Expected: where all masks are small, the AP of small
# masks is the AP of all, as it is when "bbox" is left out of the same results.
# Seen with faster-coco-eval 1.8.0 on Python 3.11, 2026-11-30.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q "faster-coco-eval==1.8.0" "numpy==2.4.6"
cd "$work"
seen=$("$work/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.core import mask as masks

SIZE = 128


def instance(image, start, falling, score=None):
    """A diagonal line of 60 pixels, 5 wide: 300 pixels, in a box of more than 3,600."""
    drawn = np.zeros((SIZE, SIZE), np.uint8)
    for step in range(60):
        column = start + (step if falling else 59 - step)
        drawn[start + step, column - 2 : column + 3] = 1
    rows, columns = drawn.nonzero()
    box = [int(columns.min()), int(rows.min()), int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1]
    outline = masks.encode(np.asfortranarray(drawn))
    outline["counts"] = outline["counts"].decode()
    about = {"image_id": image, "category_id": 1, "bbox": box, "segmentation": outline}
    return about | ({"area": int(drawn.sum()), "iscrowd": 0} if score is None else {"score": score})


truth, found = [], []
for image in range(1, 11):
    truth.append(instance(image, 5 + image, True) | {"id": image})
    found.append(instance(image, 5 + image, True, score=0.5))  # right
    found.append(instance(image, 30 + image, False, score=0.9))  # nothing is there
coco = COCO(
    {
        "images": [{"id": image, "height": SIZE, "width": SIZE} for image in range(1, 11)],
        "categories": [{"id": 1, "name": "line"}],
        "annotations": truth,
    }
)


def measured(results):
    evaluation = COCOeval_faster(coco, coco.loadRes(results), "segm", print_function=lambda *_: None)
    evaluation.run()
    return f"AP {evaluation.stats[0]:.3f}, of small masks {evaluation.stats[3]:.3f}"


without = [{name: value for name, value in entry.items() if name != "bbox"} for entry in found]
print("faster-coco-eval", version("faster-coco-eval"), "largest mask", max(each["area"] for each in truth))
print("without boxes:", measured(without))
print("with boxes:", measured(found))
PYTHON
)
echo "$seen"
expected="faster-coco-eval 1.8.0 largest mask 300
without boxes: AP 0.500, of small masks 0.500
with boxes: AP 0.500, of small masks 1.000"
[ "$seen" = "$expected" ] || { echo "changed: expected"; echo "$expected"; exit 1; }
