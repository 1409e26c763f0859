"""What a training step on clips costs: trained values, seconds, bytes kept for backward, GFLOPs of a view.

A step is loss, backward and AdamW on the same batch of clips, in float32, on 400 classes. The methods take turns, and a
step is also given as a share of a step of full fine-tuning in the same turn, with the range over the turns.
GFLOPs are multiply-adds of a forward of one clip, as papers count them, in matrix products and convolutions.

    python benchmarks/video_step.py --output results
    python benchmarks/video_step.py --device cuda --batch-size 8 --frames 8 --rounds 10
    python benchmarks/video_step.py --model nano_vit --rounds 5
"""

import argparse
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F
from measuring import clock, saved_bytes, storages, table, write

import visionpeft as vp
from visionpeft.costs.multiply_adds import giga_multiply_adds

CLASSES = 400


def methods(width: int, frames: int) -> dict[str, vp.Method]:
    """What is compared, with the widths of the papers."""
    before, both = ("before_mlp",), ("before_attention", "before_mlp")
    return {
        "linear probe": vp.LinearProbe(),
        "LoRA in each frame, rank 8": vp.LoRA(rank=8),
        "ST-Adapter, before MLP": vp.STAdapter(bottleneck=width // 2, positions=before),
        "ST-Adapter, both": vp.STAdapter(bottleneck=width // 2, positions=both),
        "ST-Adapter, before MLP, 3 x 3 x 3": vp.STAdapter(width // 2, (3, 3, 3), before),
        "AIM": vp.AIM(num_frames=frames),
        "full fine-tuning": vp.FullFineTuning(),
    }


class Step:
    """One training step of a method."""

    def __init__(self, name: str, method: vp.Method, model: str, clips: torch.Tensor, labels: torch.Tensor):
        self.name = name
        torch.manual_seed(0)
        images = vp.create_backbone(model, pretrained=False)
        self.model = vp.VideoClassifier(images, method, num_frames=clips.shape[2], num_classes=CLASSES, dropout=0.0)
        self.model.to(clips.device).eval()
        self.clips, self.labels = clips, labels
        self.optimizer = torch.optim.AdamW(vp.trainable_parameters(self.model), lr=1e-4)
        self.seconds: list[float] = []
        self.saved = 0

    def run(self) -> torch.Tensor:
        """A step."""
        loss = F.cross_entropy(self.model(self.clips), self.labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def row(self, full: "Step") -> dict:
        """The row of the table, with a step of full fine-tuning to compare with."""
        ratios = [own / other for own, other in zip(self.seconds, full.seconds, strict=True)]
        return {
            "method": self.name,
            "trained": f"{vp.summary(self.model).adapter:,}",
            "step": f"{statistics.median(self.seconds):.3f} s",
            "of full fine-tuning": f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
            "kept for backward": f"{self.saved / 2**20:,.0f} MiB",
            "GFLOPs of a view": f"{giga_multiply_adds(self.model, self.clips[:1]):.1f}",
        }


def main() -> None:
    """Measure all methods in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="open_clip/ViT-B-16", help="a backbone; its weights are random")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("results"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    backbone = vp.create_backbone(args.model, pretrained=False)
    size = vp.backbones.preprocessing.preprocessing_of(backbone).input_size
    (tower,) = vp.describe(backbone).towers.values()
    clips = torch.randn(args.batch_size, 3, args.frames, *size, device=args.device)
    labels = torch.arange(args.batch_size, device=args.device)
    chosen = methods(tower.width, args.frames)
    steps = [Step(name, method, args.model, clips, labels) for name, method in chosen.items()]
    for turn in range(args.rounds + 1):
        for step in steps:
            if turn == 0:  # warms up, too
                step.saved, _ = saved_bytes(step.run, storages(step.model))
                continue
            before = clock(args.device)
            step.run()
            step.seconds.append(clock(args.device) - before)
    (full,) = (step for step in steps if step.name == "full fine-tuning")
    rows = [step.row(full) for step in steps]
    args.output.mkdir(parents=True, exist_ok=True)
    write(args.output / "video_step.csv", rows)
    (args.output / "video_step.md").write_text(table(rows) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
