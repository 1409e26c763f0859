"""Bytes kept for the backward pass of segmentation at 512 pixels: the table of docs/segmentation.md.

    python benchmarks/segmentation_memory.py

ViT-B/16 with random weights, `LinearSegmentation()`, one image in float32. What autograd saves is counted, and what the
recomputations hold as their arguments: the maps of the last block, and the logits at their resolution.
"""

import argparse
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F

import visionpeft as vp
from visionpeft.costs.saved_bytes import saved_bytes, storages
from visionpeft.models import strips

LORA = vp.LoRA(rank=8, targets=("q", "k", "v", "proj", "fc1", "fc2"))
IGNORED = -1
# method, whether head and loss are computed again, economy of the backbone
ROWS = {
    "full fine-tuning, as usual": (vp.FullFineTuning(), False, None),
    "full fine-tuning, head and loss again": (vp.FullFineTuning(), True, None),
    "LoRA, as usual": (LORA, False, None),
    "LoRA, head and loss again": (LORA, True, None),
    "LoRA, head, loss and MLPs again": (LORA, True, "mlp"),
    "the head alone, head and loss again": (vp.LinearProbe(), True, None),
}


def kept(method: vp.Method, again: bool, recompute: str | None, size: int, classes: int) -> int:
    """Bytes that one step keeps."""
    torch.manual_seed(0)
    backbone = timm.create_model("vit_base_patch16_224", num_classes=0, dynamic_img_size=True)
    model = vp.DensePredictor(backbone, classes=classes, method=method, recompute_head=again).eval()
    model.peft.train()
    if recompute:
        vp.economise(model, recompute=recompute)
    images, labels = torch.randn(1, 3, size, size), torch.randint(classes, (1, size, size))
    counted, _ = saved_bytes(lambda: loss(again)(model.coarse_logits(images), labels), storages(model))
    places = (size // 16) ** 2
    return counted + again * 4 * places * (classes + model.backbone.embed_dim)


def loss(again: bool) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Cross-entropy at the size of the labels, in strips that are computed again or as usual."""
    if again:
        return lambda logits, labels: strips.cross_entropy(logits, labels, IGNORED)[0]
    return lambda logits, labels: F.cross_entropy(
        F.interpolate(logits, size=labels.shape[-2:], mode="bilinear"), labels, ignore_index=IGNORED
    )


def main(size: int, classes: int) -> None:
    """Measure every row."""
    first = None
    for name, row in ROWS.items():
        found = kept(*row, size, classes)
        first = first or found
        print(f"{name}: {found / 2**20:.1f} MiB, {found / first:.2f} of the first", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--classes", type=int, default=150)
    main(**vars(parser.parse_args()))
