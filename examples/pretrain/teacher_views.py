"""What a larger vision transformer makes of augmented drawings, kept for the training of nano_vit and nano_clip.

The teacher is ``dinov2_small_focus`` (``python -m visionpeft.prepare backbone dinov2_small``), a DINOv2 ViT-S/14
(https://arxiv.org/abs/2304.07193) that its publisher fine-tuned for saliency. It sees the 64-pixel views enlarged to
112 pixels, so that its 8 x 8 patches are those of the small models.

    python teacher_views.py --data emoji --output views --rounds 4

shows each drawing and each plain shape once a round and writes ``views/round-0-0.safetensors`` and so on:

- ``images`` (views, 3, 64, 64) uint8, RGB, and ``pose``, ``any_pose`` and ``styles`` of ``augmentation.augment``,
- ``drawing`` (views,), the number of the drawing,
- ``class_token`` (views, 384) after the teacher's last norm,
- ``patches`` (views, 64, 64), its patch tokens along the 64 directions in which the patch tokens of the first views
  vary most, and ``views/directions.safetensors`` with these.

Files that exist are kept; ``--part 0/2`` and ``--part 1/2`` share the rounds between two processes.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from augmentation import Views, augment
from drawings import Drawings, images_of
from safetensors.torch import load_file, save_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from visionpeft.models.create import create_backbone

TEACHER, TEACHER_SIDE = "dinov2_small_focus", 112
DIRECTIONS = 64
FILE_VIEWS = 4096


@torch.inference_mode()
def tokens_of(teacher: nn.Module, images: Tensor, batch: int = 64) -> Tensor:
    """Tokens (views, 65, 384) of images (views, 3, 64, 64) from 0 to 1, after the last norm."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    found = []
    with torch.autocast("cpu", torch.bfloat16):
        for part in images.split(batch):
            enlarged = F.interpolate(part, size=(TEACHER_SIDE, TEACHER_SIDE), mode="bicubic").clamp(0, 1)
            found.append(teacher.forward_features((enlarged - mean) / std).float())
    return torch.cat(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder that prepare_emoji.py --icons wrote")
    parser.add_argument("--output", type=Path, required=True, help="the folder of the views")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--part", default="0/1", help="which files of how many: those with this number modulo that")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    number, parts = map(int, args.part.split("/"))

    data = Drawings(args.data)
    drawings = images_of(args.data, data.table)
    teacher = create_backbone(TEACHER, img_size=TEACHER_SIDE).eval()
    args.output.mkdir(parents=True, exist_ok=True)

    def views_of(of_round: int, of_file: int) -> tuple[Tensor, Views]:
        torch.manual_seed(of_round)
        drawing = torch.randperm(len(drawings)).split(FILE_VIEWS)[of_file]
        torch.manual_seed(1000 * of_round + of_file)
        return drawing, augment(drawings[drawing], data.flip[drawing])

    directions_file = args.output / "directions.safetensors"
    if not directions_file.exists():
        tokens = tokens_of(teacher, views_of(0, 0)[1].images[:1024])[:, 1:].flatten(0, 1)
        _, directions = torch.linalg.eigh(tokens.T.cov())
        found = {"mean": tokens.mean(0), "directions": directions[:, -DIRECTIONS:].contiguous()}
        save_file(found, directions_file)
    basis = load_file(directions_file)

    files = -(-len(drawings) // FILE_VIEWS)
    for step in range(number, args.rounds * files, parts):
        of_round, of_file = divmod(step, files)
        path = args.output / f"round-{of_round}-{of_file}.safetensors"
        if path.exists():
            continue
        drawing, views = views_of(of_round, of_file)
        tokens = tokens_of(teacher, views.images)
        found = {
            "images": (views.images * 255).round().byte(),
            "pose": views.pose,
            "any_pose": views.any_pose,
            "styles": views.styles,
            "drawing": drawing,
            "class_token": tokens[:, 0].half().contiguous(),
            "patches": ((tokens[:, 1:] - basis["mean"]) @ basis["directions"]).half(),
        }
        save_file(found, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)
        print(path, flush=True)


if __name__ == "__main__":
    main()
