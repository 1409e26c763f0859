"""A step of RPO, straightforward against ours, side by side in one run.

Straightforward is what the published implementation does: the pairs stand among the 77 tokens of every class and after
the patches of every image, all tokens run together under masks, and are kept for the backward pass. Ours runs the
towers' own tokens without a gradient, those of the texts once for all steps, and the pairs as queries; with the keys of
the images kept, too, or with the texts in chunks that run again for the gradient. Random weights serve as well as
trained ones. A step is loss and gradients. The sides take turns, and ratios are taken turn by turn.

    python benchmarks/read_only.py --output results   # 20 minutes on one CPU core
    python benchmarks/read_only.py --cases "24 pairs, 10 classes, 8 images" --rounds 1
    python benchmarks/read_only.py --device cuda --rounds 10
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from measuring import clock, saved_bytes, storages, table, write
from torch import Tensor, nn

import visionpeft as vp
from visionpeft.data.few_shot.definitions import few_shot_class_names

CASES = {
    f"{pairs} pairs, {classes} classes, {images} images": (pairs, classes, images)
    for pairs, classes, images in ((24, 100, 4), (4, 100, 4), (24, 10, 8))
}


class Straightforward:
    """All tokens under masks, with the pairs of a learner."""

    def __init__(self, clip: nn.Module, tokenizer: Callable, names: list[str], learner: vp.RPO):
        self.clip, self.learner = clip, learner
        pairs, device = len(learner.text_tokens), clip.logit_scale.device
        ids = tokenizer([f"a photo of a {name}." for name in names]).to(device)
        with torch.no_grad():
            self.texts = clip.token_embedding(ids) + clip.positional_embedding
        self.ends = ids.argmax(dim=-1)
        positions = torch.arange(77, device=device)
        hidden = (positions > positions[:, None])[None] | (positions > self.ends[:, None, None])
        hidden = hidden.repeat_interleave(clip.transformer.resblocks[0].attn.num_heads, dim=0)
        self.text_mask = torch.zeros(hidden.shape, device=device).masked_fill(hidden, float("-inf"))
        # Where a pair's token stands, no ordinary token is read, so that what was there does not matter.
        self.places = self.ends[:, None] + 1 + torch.arange(pairs, device=device)
        tokens = len(clip.visual.positional_embedding) + pairs
        self.image_mask = torch.zeros(tokens, tokens, device=device)
        self.image_mask[:, -pairs:] = float("-inf")

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """The gradients of the pairs."""
        clip, learner = self.clip, self.learner
        rows = torch.arange(len(self.texts), device=self.ends.device)[:, None]
        x = self.texts.index_put((rows, self.places), learner.text_tokens.expand(len(rows), -1, -1))
        for block in clip.transformer.resblocks:
            x = block(x, attn_mask=self.text_mask)
        texts = F.normalize(clip.ln_final(x)[rows, self.places] @ clip.text_projection, dim=-1)
        visual, pairs = clip.visual, len(learner.image_tokens)
        x = visual.conv1(images).flatten(2).mT
        x = torch.cat((visual.class_embedding.expand(len(x), 1, -1), x), dim=1) + visual.positional_embedding
        x = visual.ln_pre(torch.cat((x, learner.image_tokens.expand(len(x), -1, -1)), dim=1))
        for block in visual.transformer.resblocks:
            x = block(x, attn_mask=self.image_mask)
        own = F.normalize(visual.ln_post(x[:, -pairs:]) @ visual.proj, dim=-1)
        logits = clip.logit_scale.exp() * torch.einsum("bpe,kpe->bk", own, texts) / pairs
        return gradients(F.cross_entropy(logits, labels), learner)


def gradients(loss: Tensor, learner: vp.RPO) -> Tensor:
    """All gradients of a loss as one vector."""
    return torch.cat([each.flatten() for each in torch.autograd.grad(loss, learner.trainable_parameters())])


def measure(name: str, clip: nn.Module, tokenizer: Callable, rounds: int, device: str) -> list[dict]:
    """The rows of a case."""
    pairs, classes, batch = CASES[name]
    names = few_shot_class_names("caltech101")[:classes]
    learner = vp.RPO(clip, tokenizer, names, num_pairs=pairs, template="a photo of a {}.")
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, *clip.visual.image_size, generator=generator).to(device)
    labels = torch.arange(batch, device=device) % classes
    slow = Straightforward(clip, tokenizer, names, learner)
    keys = learner.image_keys(images)

    def ours(kept: Tensor | None = None, chunk_size: int | None = None) -> Tensor:
        learner.chunk_size = chunk_size
        return gradients(learner.loss(images, labels, kept)[0], learner)

    chunk = max(1, classes // 10)
    sides = {
        "straightforward": lambda: slow.step(images, labels),
        "ours": ours,
        "ours, keys of the images kept": lambda: ours(keys),
        f"ours, keys kept, {chunk} classes at a time": lambda: ours(keys, chunk),
    }
    frozen = storages(clip)
    results = {side: saved_bytes(step, frozen) for side, step in sides.items()}  # warms up, too
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, step in sides.items():
            before = clock(device)
            step()
            seconds[side].append(clock(device) - before)
    saved, expected = results["straightforward"]
    rows = []
    for side in sides:
        ratios = sorted(a / b for a, b in zip(seconds["straightforward"], seconds[side], strict=True))
        own, found = results[side]
        rows.append(
            {
                "case": name,
                "side": side,
                "seconds": f"{statistics.median(seconds[side]):.2f}",
                "saved": f"{own / 2**20:,.0f} MiB",
                "faster": f"{statistics.median(ratios):.1f}x [{ratios[0]:.1f}, {ratios[-1]:.1f}]",
                "less saved": f"{saved / own:.1f}x",
                "relative difference": f"{((found - expected).norm() / expected.norm()).item():.1e}",
            }
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Measure the cases in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-16", help="an OpenCLIP model; its weights are random")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("results"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    clip = open_clip.create_model(args.model, pretrained=None, device=args.device).eval().requires_grad_(False)
    tokenizer = open_clip.get_tokenizer(args.model)
    rows = [row for name in args.cases for row in measure(name, clip, tokenizer, args.rounds, args.device)]
    args.output.mkdir(parents=True, exist_ok=True)
    write(args.output / "read_only.csv", rows)
    (args.output / "read_only.md").write_text(table(rows) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
