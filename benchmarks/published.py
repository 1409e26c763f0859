"""Numbers that papers print and that can be checked without their data: trained values, operations, sizes of files.

    python benchmarks/published.py            # prints the table
    python benchmarks/published.py --write    # and puts it into docs/results.md

Each row is a printed number, where it stands, and the number that this package gives for the same, computed here. Of a
"recalled" one the paper was not looked up again; that ours rounds to it is what speaks for it.
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import open_clip
import timm
import torch
from measuring import filled, table

import visionpeft as vp
from visionpeft.clip.learner import Learner
from visionpeft.costs.multiply_adds import giga_multiply_adds
from visionpeft.data.vtab import vtab1k_tasks

PAGE = Path(__file__).parents[1] / "docs/results.md"
BOTH = ("before_attention", "before_mlp")
# Of the 19 tasks of VTAB-1k, in the authors' code.
TENSOR_TRAIN_RANKS = [8, 16, 8, 16, 8, 16, 8, 8, 8, 8, 8, 16, 4, 16, 16, 16, 16, 16, 8]
TUCKER_RANKS = [32] * 13 + [16] * 6
VPT = "log of the authors' demonstration"
GUIDE = "guide of HF peft to image classification"
BENCH = "README of V-PETL Bench"


def vit(classes: int = 0) -> torch.nn.Module:
    """timm's ViT-B/16 with random weights."""
    return timm.create_model("vit_base_patch16_224", num_classes=classes)


def clips(architecture: str) -> vp.VideoClassifier:
    """A classifier of clips of 8 frames on OpenCLIP's image tower, with 400 classes."""
    clip = open_clip.CLIP(**open_clip.get_model_config(architecture))
    return vp.VideoClassifier(clip.visual, num_frames=8, num_classes=400)


def million(value: float) -> str:
    """Such as "0.28 M"."""
    return f"{value / 1e6:.2f} M"


def adapter(model: torch.nn.Module, method: vp.Method) -> str:
    """Trained values without the head."""
    return million(vp.summary(vp.attach(model, method)).adapter)


def with_head(method: vp.Method, classes: int, architecture: str = "vit_base_patch16_224") -> int:
    """Trained values with the head, of a model that is made without memory."""
    with torch.device("meta"):
        model = vp.attach(timm.create_model(architecture, num_classes=classes), method)
    return sum(parameter.numel() for parameter in vp.trainable_parameters(model))


def exactly(method: vp.Method, classes: int) -> str:
    """Trained values on ViT-B/16 with the head, to the last one."""
    return f"{with_head(method, classes):,}"


def swin(size: str, method: vp.Method) -> str:
    """Trained values without the head on a Swin of windows of 7."""
    with torch.device("meta"):
        return adapter(timm.create_model(f"swin_{size}_patch4_window7_224", num_classes=0), method)


def fact(kind: str, ranks: list[int]) -> str:
    """Mean of FacT's trained values without the heads over tasks of these ranks."""
    with torch.device("meta"):
        counts = [vp.summary(vp.attach(vit(), vp.FacT(rank, kind))).adapter for rank in ranks]
    return f"{statistics.mean(counts) / 1e6:.3f} M"


def operations(method: vp.Method, views: int) -> str:
    """Giga multiply-adds of all views of a clip of 8 frames at 224 pixels."""
    model = vp.attach(clips("ViT-B-16"), method).eval()
    with torch.no_grad():
        return f"{views * giga_multiply_adds(model, torch.zeros(1, 3, 8, 224, 224)):.0f}"


def learner(kind: type[Learner]) -> int:
    """Trained values of a learner on CLIP ViT-B/16, made without memory."""
    with torch.device("meta"):
        clip = open_clip.CLIP(**open_clip.get_model_config("ViT-B-16"))
    made = kind(clip, open_clip.get_tokenizer("ViT-B-16"), ["cat", "dog"])
    return sum(parameter.numel() for parameter in made.parameters() if parameter.requires_grad)


def convpass_files() -> str:
    """Mean size of what Convpass saves in float32 for a task of VTAB-1k, head included."""
    own = vp.summary(vp.attach(vit(), vp.Convpass())).adapter
    classes = statistics.mean(task["classes"] for task in vtab1k_tasks().values())
    return f"{4 * (own + classes * 769) / 2**20:.1f} MB"


@dataclass(frozen=True)
class Row:
    """A printed number.

    Args:
        what: it is of.
        printed: as it is printed.
        where: the source.
        ours: computes ours.
    """

    what: str
    printed: str
    where: str
    ours: Callable[[], str]


ROWS = (
    Row("VPT-deep, 100 prompts, dmlab, with head", "926,214", VPT, lambda: exactly(vp.VPT(100, deep=True), 6)),
    Row("VPT-deep, 100 prompts, EuroSAT, with head", "929,290", VPT, lambda: exactly(vp.VPT(100, deep=True), 10)),
    Row("VPT-deep, 5 prompts, SUN397, with head", "351,373", VPT, lambda: exactly(vp.VPT(5, deep=True), 397)),
    Row("LoRA, rank 16, q v, Food-101, with head", "667,493", GUIDE, lambda: exactly(vp.LoRA(16), 101)),
    Row(
        "AdaLoRA, from rank 12, q v, Food-101, with head",
        "520,325",
        GUIDE,
        lambda: exactly(vp.AdaLoRA(8, initial_rank=12, targets=("q", "v")), 101),
    ),
    Row("SSF, CIFAR-100, with head", "0.28 M", "SSF, recalled", lambda: million(with_head(vp.SSF(), 100))),
    Row("SSF, ImageNet-1k, with head", "0.97 M", "SSF, recalled", lambda: million(with_head(vp.SSF(), 1000))),
    Row(
        "SSF, Swin-B, CIFAR-100, with head",
        "0.37 M",
        "SSF, recalled",
        lambda: million(with_head(vp.SSF(), 100, "swin_base_patch4_window7_224")),
    ),
    Row(
        "AdaptFormer-64, CIFAR-100, with head",
        "1.26 M",
        "AdaptFormer, recalled",
        lambda: million(with_head(vp.AdaptFormer(64), 100)),
    ),
    Row("AdaptFormer-8", "0.16 M", "V-PETL Bench", lambda: adapter(vit(), vp.AdaptFormer(8))),
    Row("FacT-TT, mean of 19 tasks", "0.037 M", "FacT", lambda: fact("tt", TENSOR_TRAIN_RANKS)),
    Row("FacT-TK, mean of 19 tasks", "0.069 M", "FacT", lambda: fact("tk", TUCKER_RANKS)),
    Row("RepAdapter, both positions", "0.22 M", "RepAdapter", lambda: adapter(vit(), vp.RepAdapter())),
    Row("Convpass, a file of VTAB-1k, mean of 19", "1.4 MB", "README of the authors' code", convpass_files),
    Row("full, Swin-B", "86.75 M", BENCH, lambda: swin("base", vp.FullFineTuning())),
    Row("norms, Swin-B", "0.06 M", BENCH, lambda: swin("base", vp.LayerNormTuning())),
    Row("BitFit, Swin-B", "0.20 M", BENCH, lambda: swin("base", vp.BitFit())),
    Row("Adapter-64, two a block, Swin-B", "3.11 M", BENCH, lambda: swin("base", vp.Adapter(64, "houlsby"))),
    Row("Mona, Swin-B", "4.16 M", BENCH, lambda: swin("base", vp.Mona())),
    Row("Mona, Swin-L", "5.08 M", BENCH, lambda: swin("large", vp.Mona())),
    Row(
        "AIM, CLIP ViT-B/16, 8 frames, 3 views, giga multiply-adds",
        "606",
        "AIM, quoted by later papers",
        lambda: operations(vp.AIM(num_frames=8), 3),
    ),
    Row(
        "ST-Adapter, one a block, the same",
        "455",
        "ST-Adapter, quoted by later papers",
        lambda: operations(vp.STAdapter(), 3),
    ),
    Row("AIM, CLIP ViT-B/16", "11 M", "AIM, recalled", lambda: adapter(clips("ViT-B-16"), vp.AIM(num_frames=8))),
    Row("AIM, CLIP ViT-L/14", "38 M", "AIM, recalled", lambda: adapter(clips("ViT-L-14"), vp.AIM(num_frames=8))),
    Row(
        "AIM, two over time, CLIP ViT-L/14",
        "50 M",
        "AIM, recalled",
        lambda: adapter(clips("ViT-L-14"), vp.AIM(num_frames=8, num_temporal=2)),
    ),
    Row("ST-Adapter, one a block", "7.2 M", "ST-Adapter", lambda: adapter(clips("ViT-B-16"), vp.STAdapter())),
    Row(
        "ST-Adapter, two a block",
        "14.3 M",
        "ST-Adapter",
        lambda: adapter(clips("ViT-B-16"), vp.STAdapter(positions=BOTH)),
    ),
    Row("MaPLe, CLIP ViT-B/16", "3.55 M", "MaPLe, recalled", lambda: million(learner(vp.MaPLe))),
    Row("IVLP in MaPLe's comparison", "31,488", "MaPLe, recalled", lambda: f"{learner(vp.IVLP):,}"),
)


def main() -> None:
    """Compute the numbers of this package, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/results.md, too")
    write = parser.parse_args().write
    shown = table([{"what": r.what, "printed": r.printed, "here": r.ours(), "source": r.where} for r in ROWS])
    print(shown)
    if write:
        PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), "published", shown), encoding="utf-8")


if __name__ == "__main__":
    main()
