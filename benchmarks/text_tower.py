"""The text side of CLIP learners, straightforward against ours, side by side in one run.

Straightforward is what the published implementations do: all 77 positions of every class through every block, image by
image where the context depends on the image. Both sides use the same frozen weights, class names and inputs; random
weights serve as well as trained ones. A step is text features, logits against given image features, backward. Saved
bytes are those kept for backward, without parameters. The variants take turns, and ratios are taken turn by turn.

    python benchmarks/text_tower.py --output results   # the table of docs/learners.md; half an hour on two CPU cores
    python benchmarks/text_tower.py --cases coop --rounds 5
    python benchmarks/text_tower.py --device cuda --rounds 10
    python benchmarks/text_tower.py --plot --output results   # cost against the number of classes
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from measuring import clock, saved_bytes, storages, table, write
from torch import Tensor, nn

import visionpeft as vp
from visionpeft.caching.feature_cache import FeatureCache
from visionpeft.data.few_shot.definitions import few_shot_class_names

PHRASE = "a photo of a"


# ---- straightforward


def transformer_features(
    clip: nn.Module, prompts: Tensor, ids: Tensor, deep: list[Tensor] = (), own: tuple[int, Tensor | None] = (-1, None)
) -> Tensor:
    """Unit text features (classes, features) of embedded prompts (classes, 77, width)."""
    x = prompts + clip.positional_embedding
    for index, block in enumerate(clip.transformer.resblocks):
        if index == own[0]:  # TCP: before this block each class gets tokens of its own
            x = torch.cat((x[:, :1], own[1], x[:, 1 + own[1].shape[1] :]), dim=1)
        if 0 < index <= len(deep):  # MaPLe: the learned tokens of every class are replaced before the block
            fresh = deep[index - 1].expand(len(x), -1, -1)
            x = torch.cat((x[:, :1], fresh, x[:, 1 + fresh.shape[1] :]), dim=1)
        x = block(x, attn_mask=clip.attn_mask)
    x = clip.ln_final(x)
    x = x[torch.arange(len(x)), ids.argmax(dim=-1)] @ clip.text_projection
    return F.normalize(x, dim=-1)


class Prompts:
    """Tokens of "X .. X <rest> name." for all classes, and the embeddings around the learned vectors."""

    def __init__(self, clip: nn.Module, tokenizer: Callable, names: list[str], learned: int, rest: str = ""):
        text = " ".join(["X"] * learned + ([rest] if rest else []))
        self.ids = tokenizer([f"{text} {name}." for name in names]).to(clip.positional_embedding.device)
        with torch.no_grad():
            embedded = clip.token_embedding(self.ids)
        self.start, self.end = embedded[:, :1], embedded[:, 1 + learned :]

    def with_context(self, context: Tensor) -> Tensor:
        """Embedded prompts (classes, 77, width) around a context (vectors, width)."""
        return torch.cat((self.start, context.expand(len(self.ids), -1, -1), self.end), dim=1)


# ---- what is measured


@dataclass
class Case:
    """Two ways to one step.

    Attributes:
        name: row of the table.
        straightforward: a step; returns a tensor to compare with that of ours.
        ours: the same step.
        rounds: turns at most after the first, because a turn takes minutes.
        times: seconds of each turn, by side.
        saved: bytes kept for backward, by side.
        difference: relative difference of the gradients, or of the logits where nothing is trained.
    """

    name: str
    straightforward: Callable[[], Tensor]
    ours: Callable[[], Tensor]
    rounds: int = 99
    times: dict[str, list[float]] = field(default_factory=lambda: {"straightforward": [], "ours": []})
    saved: dict[str, int] = field(default_factory=dict)
    difference: float = 0.0


def measure(case: Case, clip: nn.Module, rounds: int, device: str) -> None:
    """Let the two sides take turns."""
    frozen = storages(clip)
    results = {}
    for turn in range(min(rounds, case.rounds) + 1):
        for side in ("straightforward", "ours"):
            step = getattr(case, side)
            before = clock(device)
            if turn == 0:  # warms up, too; where a turn takes minutes it is the only one
                case.saved[side], results[side] = saved_bytes(step, frozen)
            else:
                step()
            case.times[side].append(clock(device) - before)
    if len(case.times["ours"]) > 1:
        case.times = {side: times[1:] for side, times in case.times.items()}
    expected = results["straightforward"]
    case.difference = ((results["ours"] - expected).norm() / expected.norm()).item()


def gradient(loss: Tensor, *parameters: Tensor) -> Tensor:
    """All gradients of a loss as one vector."""
    return torch.cat([each.flatten() for each in torch.autograd.grad(loss, parameters)])


def coop(clip, tokenizer, names, features, labels) -> Case:
    """CoOp, 16 vectors."""
    learner = vp.CoOp(clip, tokenizer, names, context_length=16)
    prompts = Prompts(clip, tokenizer, names, 16)

    def straightforward() -> Tensor:
        text = transformer_features(clip, prompts.with_context(learner.vectors), prompts.ids)
        return gradient(F.cross_entropy(clip.logit_scale.exp() * features @ text.T, labels), learner.vectors)

    def ours() -> Tensor:
        return gradient(learner.loss(None, labels, features)[0], learner.vectors)

    return Case(f"CoOp step, M=16, {len(names)} classes", straightforward, ours)


def cocoop(clip, tokenizer, names, features, labels, batch: int, rounds: int) -> Case:
    """CoCoOp, 4 vectors, a context for each image."""
    learner = vp.CoCoOp(clip, tokenizer, names)
    prompts = Prompts(clip, tokenizer, names, 4)
    features, labels = features[:batch], labels[:batch]

    def straightforward() -> Tensor:
        contexts = learner.vectors + learner.meta_net(features)[:, None]
        logits = torch.stack(
            [
                clip.logit_scale.exp()
                * feature
                @ transformer_features(clip, prompts.with_context(context), prompts.ids).T
                for feature, context in zip(features, contexts, strict=True)
            ]
        )
        return gradient(F.cross_entropy(logits, labels), *learner.trainable_parameters())

    def ours() -> Tensor:
        return gradient(learner.loss(None, labels, features)[0], *learner.trainable_parameters())

    return Case(f"CoCoOp step, M=4, batch {batch}, {len(names)} classes", straightforward, ours, rounds)


def maple(clip, tokenizer, names, features, labels) -> Case:
    """MaPLe's text side: 2 vectors in the prompt, fresh ones before blocks 1 to 8."""
    learner = vp.MaPLe(clip, tokenizer, names)
    prompts = Prompts(clip, tokenizer, names, 2, "of a")
    text_part = clip.peft["maple"].coupled_prompts.text
    prompts_of_blocks = [text_part.context.prompts, *(text_part[str(i)].stream_in.prompts for i in range(1, 9))]

    def straightforward() -> Tensor:
        with vp.use(clip, None):  # the library's own blocks
            text = transformer_features(
                clip, prompts.with_context(prompts_of_blocks[0]), prompts.ids, prompts_of_blocks[1:]
            )
            return gradient(F.cross_entropy(clip.logit_scale.exp() * features @ text.T, labels), *prompts_of_blocks)

    def ours() -> Tensor:
        return gradient(F.cross_entropy(learner.classify(features), labels), *prompts_of_blocks)

    return Case(f"MaPLe text step, n=2, J=9, {len(names)} classes", straightforward, ours)


def tcp(clip, tokenizer, names, features, labels) -> Case:
    """TCP's text side: 4 vectors in the prompt, overwritten before block 8 by tokens made of each class's template."""
    learner = vp.TCP(clip, tokenizer, names)
    prompts = Prompts(clip, tokenizer, names, 4)
    learner.template_features()  # frozen: both sides have them

    def straightforward() -> Tensor:
        own = (learner.layer, learner.class_tokens())
        text = transformer_features(clip, prompts.with_context(learner.vectors), prompts.ids, own=own)
        logits = clip.logit_scale.exp() * features @ text.T
        return gradient(F.cross_entropy(logits, labels) + learner.text_penalty(text), *learner.trainable_parameters())

    def ours() -> Tensor:
        return gradient(learner.loss(None, labels, features)[0], *learner.trainable_parameters())

    return Case(f"TCP step, M=4, own tokens from block 8 on, {len(names)} classes", straightforward, ours)


def tpt(clip, tokenizer, names, views: Tensor, rounds: int) -> Case:
    """TPT's text part: features, entropy of the kept views, one step, features again.

    The straightforward side runs 100 classes at a time, as the graph of 1,000 would take 18 GiB. It is given the
    gradient of the loss with respect to the text features, which it could then only get by another pass.
    """
    learner = vp.TPT(clip, tokenizer, names, allow_duplicates=True)
    parts = [Prompts(clip, tokenizer, names[first : first + 100], 4) for first in range(0, len(names), 100)]
    start = learner.text.embed(learner.tokenizer.contents([PHRASE])[0])
    with torch.no_grad():
        initial = vp.CoOp(clip, tokenizer, names, init=PHRASE, allow_duplicates=True).text_features()
    initial.requires_grad_()
    (upstream,) = torch.autograd.grad(tpt_loss(clip.logit_scale.exp() * views @ initial.T), initial)

    def straightforward() -> Tensor:
        context = start.clone().requires_grad_()
        optimizer = torch.optim.AdamW([context], lr=5e-3)
        for prompts, gradients in zip(parts, upstream.split(100), strict=True):
            transformer_features(clip, prompts.with_context(context), prompts.ids).backward(gradients)
        optimizer.step()
        with torch.no_grad():
            text = [transformer_features(clip, prompts.with_context(context), prompts.ids) for prompts in parts]
            return clip.logit_scale.exp() * views[:1] @ torch.cat(text).T

    def ours() -> Tensor:
        return learner.classify(views[None])

    chunks = ", straightforward 100 at a time" if len(parts) > 1 else ""
    return Case(f"TPT text part, {len(views)} views, {len(names)} classes{chunks}", straightforward, ours, rounds)


def tpt_image(clip, tokenizer, names, views: Tensor, rounds: int) -> Case:
    """TPT's whole image: the image tower on all views, then the text part as in `tpt`."""
    case = tpt(clip, tokenizer, names, encode(clip, views), rounds)
    learner = vp.TPT(clip, tokenizer, names, allow_duplicates=True)
    text_part = case.straightforward

    def straightforward() -> Tensor:
        encode(clip, views)
        return text_part()

    def ours() -> Tensor:
        return learner(views[None])

    return Case(f"TPT's whole image, {len(views)} views, {len(names)} classes", straightforward, ours, rounds)


def tpt_bfloat16(clip, tokenizer, names, views: Tensor, rounds: int) -> Case:
    """TPT's whole image, ours in float32 (on the straightforward side) and ours under autocast in bfloat16."""
    learner = vp.TPT(clip, tokenizer, names, allow_duplicates=True)

    def ours() -> Tensor:
        with torch.autocast(views.device.type, torch.bfloat16):
            return learner(views[None])

    name = f"TPT's whole image, {len(views)} views, {len(names)} classes, ours in float32 and in bfloat16"
    return Case(name, lambda: learner(views[None]), ours, rounds)


def tpt_loss(logits: Tensor) -> Tensor:
    """Entropy of the mean prediction of the most certain tenth of the views (views, classes)."""
    entropy = -(logits.log_softmax(1) * logits.softmax(1)).sum(1)
    kept = logits[entropy.argsort()[: int(0.1 * len(logits))]].softmax(1).mean(0)
    return -(kept * kept.log()).sum()


def coop_epoch(clip, tokenizer, names, images: Tensor, labels: Tensor, rounds: int) -> Case:
    """A whole CoOp step on a batch of images, against one with kept image features."""
    case = coop(clip, tokenizer, names, encode(clip, images), labels)
    learner, cache = vp.ZeroShot(clip, tokenizer, names), FeatureCache()
    step, fast_step = case.straightforward, case.ours
    cache.image_features(learner, images)

    def straightforward() -> Tensor:
        encode(clip, images)
        return step()

    def ours() -> Tensor:
        cache.image_features(learner, images)
        return fast_step()

    name = f"CoOp step with images, batch {len(images)}, features kept, {len(names)} classes"
    return Case(name, straightforward, ours, rounds)


@torch.no_grad()
def encode(clip: nn.Module, images: Tensor) -> Tensor:
    """Unit image features."""
    return F.normalize(clip.encode_image(images), dim=-1)


# ---- tables and figure


def make_cases(args, clip, tokenizer) -> dict[str, Callable[[], Case]]:
    """Builders of the cases by name, in the order of the table."""
    generator = torch.Generator().manual_seed(0)
    hundred, thousand = few_shot_class_names("caltech101"), list(few_shot_class_names("imagenet").values())
    features = F.normalize(torch.randn(64, clip.text_projection.shape[1], generator=generator), dim=-1).to(args.device)
    labels = torch.arange(64, device=args.device) % 100
    images = torch.randn(32, 3, *clip.visual.image_size, generator=generator).to(args.device)
    few = features[:32], labels[:32]
    return {
        "coop": lambda: coop(clip, tokenizer, hundred, *few),
        "cocoop": lambda: cocoop(clip, tokenizer, hundred, *few, batch=1, rounds=99),
        "cocoop4": lambda: cocoop(clip, tokenizer, hundred, *few, batch=4, rounds=0),
        "maple": lambda: maple(clip, tokenizer, hundred, *few),
        "tcp": lambda: tcp(clip, tokenizer, hundred, *few),
        "tpt": lambda: tpt(clip, tokenizer, hundred, features, rounds=99),
        "tpt_image": lambda: tpt_image(clip, tokenizer, hundred, images.repeat(2, 1, 1, 1), rounds=2),
        "tpt_bfloat16": lambda: tpt_bfloat16(clip, tokenizer, hundred, images.repeat(2, 1, 1, 1), rounds=2),
        "tpt1000": lambda: tpt(clip, tokenizer, thousand, features, rounds=0),
        "epoch": lambda: coop_epoch(clip, tokenizer, hundred, images, labels[:32], rounds=2),
    }


def row_of(case: Case) -> dict:
    """One row of the table: medians, and the ratios of each turn as median [smallest, largest]."""
    slow, fast = case.times["straightforward"], case.times["ours"]
    ratios = sorted(a / b for a, b in zip(slow, fast, strict=True))
    mib = {side: size / 2**20 for side, size in case.saved.items()}
    return {
        "step": case.name,
        "straightforward": f"{statistics.median(slow):.2f} s, {mib['straightforward']:,.0f} MiB",
        "ours": f"{statistics.median(fast):.3f} s, {mib['ours']:,.1f} MiB",
        "faster": f"{statistics.median(ratios):.1f}x [{ratios[0]:.1f}, {ratios[-1]:.1f}]",
        "less saved": f"{mib['straightforward'] / mib['ours']:.1f}x",
        "relative difference": f"{case.difference:.1e}",
    }


def plot(args, clip, tokenizer) -> None:
    """Time and saved bytes of our CoOp step against the number of classes, whole and in chunks of 100."""
    from matplotlib.figure import Figure

    names, generator = list(few_shot_class_names("imagenet").values()), torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(32, clip.text_projection.shape[1], generator=generator), dim=-1).to(args.device)
    frozen = storages(clip)
    rows = []
    for count in (10, 20, 50, 100, 200, 500, 1000):
        learner = vp.CoOp(clip, tokenizer, names[:count], context_length=16, allow_duplicates=True)
        labels = torch.arange(32, device=args.device) % count
        for chunk_size in (None, 100):
            learner.chunk_size = chunk_size
            step = lambda learner=learner, labels=labels: gradient(  # noqa: E731
                learner.loss(None, labels, features)[0], learner.vectors
            )
            saved, _ = saved_bytes(step, frozen)
            seconds = []
            for _ in range(args.rounds):
                before = clock(args.device)
                step()
                seconds.append(clock(args.device) - before)
            row = {"classes": count, "chunk": chunk_size or "none", "seconds": round(statistics.median(seconds), 3)}
            rows.append(row | {"saved MiB": round(saved / 2**20, 1)})
            print(rows[-1], flush=True)
    args.output.mkdir(parents=True, exist_ok=True)
    write(args.output / "classes.csv", rows)
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for axes, key in zip(figure.subplots(1, 2), ("seconds", "saved MiB"), strict=True):
        for chunk_size in ("none", 100):
            chosen = [row for row in rows if row["chunk"] == chunk_size]
            label = "all classes at once" if chunk_size == "none" else "chunks of 100"
            axes.plot([row["classes"] for row in chosen], [row[key] for row in chosen], marker="o", label=label)
        axes.set(xlabel="classes", ylabel=key, xscale="log", yscale="log")
        axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(args.output / "classes.png", dpi=110)


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-16", help="an OpenCLIP model; its weights are random")
    known = "some of: coop cocoop cocoop4 maple tcp tpt tpt_image tpt_bfloat16 tpt1000 epoch"
    parser.add_argument("--cases", nargs="+", default=None, help=known)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plot", action="store_true", help="measure cost against the number of classes instead")
    parser.add_argument("--output", type=Path, default=Path("results"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    clip = open_clip.create_model(args.model, pretrained=None, device=args.device).eval().requires_grad_(False)
    tokenizer = open_clip.get_tokenizer(args.model)
    if args.plot:
        plot(args, clip, tokenizer)
        return
    cases = make_cases(args, clip, tokenizer)
    args.output.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in args.cases or cases:
        case = cases[name]()
        measure(case, clip, args.rounds, args.device)
        vp.detach(clip) if hasattr(clip, "peft") else None
        rows.append(row_of(case))
        print(rows[-1], flush=True)
        write(args.output / "text_tower.csv", rows)
    text = table(rows)
    (args.output / "text_tower.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
