"""What the exact economies of blocks are worth: step time against a frozen forward, and bytes kept for backward.

A step is cross-entropy on 100 classes, backward and AdamW on a batch of random images in float32, the backbone frozen
with random weights. The variants of a backbone take turns, and ratios are taken round by round. The unit D is one
tensor of all tokens in float32 for every block. Straightforward prompts are tokens of the stream.

    python benchmarks/economies.py --output results
    python benchmarks/economies.py --part trunk --batch-size 16 --rounds 2

`--part trunk` measures epochs with the frozen trunk's output kept against epochs without, loading and hashing of images
included.
"""

import argparse
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from measuring import clock, saved_bytes, storages, table, write
from torch import Tensor, nn

import visionpeft as vp
from visionpeft.caching.content_cache import ContentCache
from visionpeft.caching.trunk import CachedTrunk
from visionpeft.methods.parts.base import Method
from visionpeft.sites import Placement


class Nothing(nn.Module):
    """Changes nothing, but does not say that it takes every token by itself."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """The tokens as they are."""
        return x


@dataclass(frozen=True)
class AllTokens(Method):
    """Forces blocks to run prompts as tokens of the stream."""

    def place(self, tower):
        """One `Nothing` in each block."""
        return [Placement(tower.name, index, "mlp_in", Nothing()) for index in range(tower.depth)]


@dataclass
class Variant:
    """One row: methods and economies."""

    name: str
    methods: list[Method] | None
    economies: dict = field(default_factory=dict)


def variants() -> list[Variant]:
    """The rows of a backbone, the frozen forward first."""
    rows = [Variant("frozen forward", None), Variant("linear probe", [vp.LinearProbe()])]
    for count in (10, 50):
        prompts = vp.VPT(count)
        rows += [
            Variant(f"VPT {count}, prompts as tokens", [prompts, AllTokens()]),
            Variant(f"VPT {count}, keys and values only", [prompts]),
        ]
    prompts, low_rank = [vp.VPT(50)], [vp.LoRA(8, targets=("q", "k", "v", "proj", "fc1", "fc2"))]
    economies = {
        "class token only": {"class_token_only": True},
        "MLPs recomputed": {"recompute": "mlp"},
        "both": {"class_token_only": True, "recompute": "mlp"},
        "blocks recomputed": {"recompute": "block"},
    }
    rows += [Variant(f"VPT 50, {words}", prompts, chosen) for words, chosen in economies.items()]
    rows += [Variant("LoRA 8 on all linears", low_rank)]
    rows += [Variant(f"LoRA 8 on all linears, {words}", low_rank, chosen) for words, chosen in economies.items()]
    return rows


class Step:
    """A training step of one variant on a model that all share, or a forward of the frozen model."""

    def __init__(self, model: nn.Module, variant: Variant, images: Tensor):
        self.model, self.variant, self.images = model, variant, images
        self.labels = torch.arange(len(images), device=images.device)
        self.seconds: list[float] = []
        self.optimizer = None
        if variant.methods is not None:
            self.name = variant.name.replace(" ", "_")
            vp.attach(model, variant.methods, self.name)
            vp.activate(model, self.name)
            self.optimizer = torch.optim.AdamW(vp.trainable_parameters(model), lr=1e-4)

    def prepare(self) -> None:
        """Let the variant act."""
        if self.optimizer is None:
            vp.disable(self.model)
        else:
            vp.activate(self.model, self.name)
            vp.economise(self.model, **self.variant.economies)

    def loss(self) -> Tensor:
        """The loss with a graph, or without one for the frozen forward."""
        with torch.set_grad_enabled(self.optimizer is not None):
            return F.cross_entropy(self.model(self.images), self.labels)

    def run(self) -> None:
        """One step."""
        loss = self.loss()
        if self.optimizer is not None:
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def saved(self) -> float:
        """Bytes kept for backward, in D."""
        self.prepare()
        kept, _ = saved_bytes(self.loss, storages(self.model))
        tokens = self.model.patch_embed.num_patches + self.model.num_prefix_tokens
        return kept / (len(self.model.blocks) * len(self.images) * tokens * self.model.embed_dim * 4)


def steps(name: str, batch_size: int, rounds: int, device: str) -> list[dict]:
    """The rows of a backbone."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=100).eval().to(device)
    images = torch.randn(batch_size, 3, 224, 224, device=device)
    turns = [Step(model, variant, images) for variant in variants()]
    for turn in range(rounds + 1):  # the first one warms up
        for step in turns:
            step.prepare()
            before = clock(device)
            step.run()
            if turn:
                step.seconds.append(clock(device) - before)
    forward = turns[0].seconds
    return [
        {
            "backbone": name,
            "variant": step.variant.name,
            "step / frozen forward": spread([a / b for a, b in zip(step.seconds, forward, strict=True)]),
            "seconds": f"{statistics.median(step.seconds):.2f}",
            "saved": f"{step.saved():.2f} D",
        }
        for step in turns
    ]


def epochs(name: str, images: int, batch_size: int, rounds: int, device: str) -> list[dict]:
    """Epochs of a linear probe and of LoRA in the last four blocks, from images kept in memory."""
    pictures = torch.randint(0, 256, (images, 3, 224, 224), dtype=torch.uint8)
    rows = []
    for words, method in (
        ("linear probe", vp.LinearProbe()),
        ("LoRA 8 in the last 4 blocks", vp.LoRA(8, blocks="last:4")),
    ):
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=100).eval().to(device)
        vp.attach(model, method)
        optimizer = torch.optim.AdamW(vp.trainable_parameters(model), lr=1e-4)
        kept = CachedTrunk(model, ContentCache(2**33))
        times: dict[str, list[float]] = {"whole": [], "kept": []}
        for turn in range(rounds + 1):  # the first one fills the cache
            for kind, run in (("whole", model), ("kept", kept)):
                before = clock(device)
                for batch in pictures.split(batch_size):
                    normalised = batch.float().sub_(127.5).div_(127.5).to(device)
                    F.cross_entropy(run(normalised), torch.arange(len(batch), device=device)).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                if turn:
                    times[kind].append(clock(device) - before)
        ratios = [a / b for a, b in zip(times["whole"], times["kept"], strict=True)]
        size = sum(row.nbytes for row in kept.cache.kept.values()) / images
        rows.append(
            {
                "backbone": name,
                "variant": f"{words}, epoch of {images} images",
                "epoch / epoch with kept trunk": spread(ratios, 1),
                "seconds": " / ".join(f"{statistics.median(times[kind]):.3f}" for kind in times),
                "kept for an image": f"{size / 1024:,.1f} KiB",
            }
        )
    return rows


def spread(values: list[float], digits: int = 2) -> str:
    """Median and range."""
    return f"{statistics.median(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def main() -> None:
    """Measure and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vit_base_patch16_224", "vit_small_patch16_224"])
    parser.add_argument("--part", choices=["steps", "trunk", "all"], default="all")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--images", type=int, default=16, help="in an epoch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("results"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    parts = {
        "economies": lambda name: steps(name, args.batch_size, args.rounds, args.device),
        "trunk_cache": lambda name: epochs(name, args.images, args.batch_size, args.rounds, args.device),
    }
    chosen = {"steps": ["economies"], "trunk": ["trunk_cache"], "all": list(parts)}[args.part]
    for part in chosen:
        rows = [row for name in args.models for row in parts[part](name)]
        write(args.output / f"{part}.csv", rows)
        (args.output / f"{part}.md").write_text(table(rows) + "\n")
        print(table(rows), flush=True)


if __name__ == "__main__":
    main()
