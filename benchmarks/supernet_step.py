"""What a step of NOAH's supernet costs beside a step of the largest member by itself.

A step is forward, cross-entropy, backward, AdamW and, of the supernet, the draw of the next member. Both and the
forward of the frozen backbone take turns in one process; ratios are taken turn by turn: their median [least, most].
Seconds are of this process's CPU time on a CPU.

    python benchmarks/supernet_step.py
    python benchmarks/supernet_step.py --models vit_base_patch16_224 --size 224 --batch-size 32 --device cuda
"""

import argparse
import statistics

import torch
import torch.nn.functional as F
from measuring import clock, table
from torch import nn

import visionpeft as vp
from visionpeft.searching.supernet import KINDS, NOAH, stand_alone

CLASSES = 10


def step(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, optimizer, number: int, device: str) -> float:
    """Seconds of a training step."""
    before = clock(device)
    F.cross_entropy(model(images), labels).backward()
    optimizer.step()
    vp.after_step(model, number, 10_000)
    optimizer.zero_grad()
    return clock(device) - before


def measure(name: str, options: argparse.Namespace) -> dict:
    """A row of the table: ratios of both steps, and each in forwards of the backbone."""
    device = options.device
    images = torch.randn(options.batch_size, 3, options.size, options.size, device=device)
    labels = torch.arange(options.batch_size, device=device) % CLASSES
    noah = NOAH(sizes=tuple(options.sizes))
    models = {}
    for case in ("supernet", "largest"):
        torch.manual_seed(0)
        model = vp.create_backbone(name, pretrained=False, num_classes=CLASSES, img_size=options.size).to(device).eval()
        depth = len(model.blocks)
        largest = {kind: [max(noah.sizes)] * depth for kind in KINDS}
        vp.attach(model, noah if case == "supernet" else stand_alone(largest, noah))
        vp.economise(model, class_token_only=True)  # as `fit` does
        model.peft.train()
        models[case] = model, torch.optim.AdamW(vp.trainable_parameters(model), lr=1e-3)
    seconds = {"supernet": [], "largest": [], "forward": []}
    for number in range(1, options.rounds + 3):
        for case, (model, optimizer) in models.items():
            seconds[case].append(step(model, images, labels, optimizer, number, device))
        model = models["largest"][0]
        with vp.use(model, None), torch.no_grad():
            before = clock(device)
            model(images)
            seconds["forward"].append(clock(device) - before)
    supernet, largest, forward = (seconds[case][2:] for case in seconds)  # without those that warm up
    return {
        "backbone": name,
        "supernet / largest": _ratios(supernet, largest),
        "supernet, forwards": _ratios(supernet, forward),
        "largest, forwards": _ratios(largest, forward),
    }


def _ratios(above: list[float], below: list[float]) -> str:
    each = [one / other for one, other in zip(above, below, strict=True)]
    return f"{statistics.median(each):.2f} [{min(each):.2f}, {max(each):.2f}]"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["nano_vit", "vit_tiny_patch16_224"])
    parser.add_argument("--size", type=int, default=64, help="pixels of a side")
    parser.add_argument("--sizes", nargs="+", type=int, default=[1, 5, 10], help="of prompts, ranks and bottlenecks")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    print(table([measure(name, options) for name in options.models]))


if __name__ == "__main__":
    main()
