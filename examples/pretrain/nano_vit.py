"""Train nano_vit.distilled, a small vision transformer for drawings, from a larger one and from the drawings' names.

The model is timm's ``VisionTransformer`` (https://arxiv.org/abs/2010.11929). It sees the views that
``teacher_views.py`` has shown to its teacher, a DINOv2 ViT-S/14, and linear heads predict

- from the class token after the final norm: the teacher's class token (every value standardised over the views), which
  emoji is shown, its subgroup, its keywords, and its layout, which is the pose (rotation, position, size) and a
  thumbnail of 4 x 4 pixels. The design families of one emoji are the images of one class;
- from each patch token: the teacher's token of the same patch, along the 64 directions of most variance.

Half of the patches are dropped at random until the last part of the run, which doubles the number of images seen
(https://arxiv.org/abs/2212.00794). The matrices of the blocks are trained with Muon (https://arxiv.org/abs/2502.16982),
everything else with AdamW. The start is closer to a trained transformer than usual: see ``initialize``.

    python nano_vit.py --data emoji --views views --output nano_vit --minutes 120

writes ``config.json`` and ``model.safetensors``, a folder that ``timm.create_model("local-dir:...")`` loads. The run
continues from its checkpoint when it is started again.
"""

import argparse
import copy
import json
import math
import time
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from drawings import UNKNOWN, Drawings
from kept_views import KeptViews, TeacherHeads, only
from safetensors.torch import save
from start_values import start_attention, waves, whitening
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

ARCHITECTURE = "vit_tiny_patch16_224"
MODEL_ARGS = {"img_size": 64, "patch_size": 8, "embed_dim": 192, "depth": 6, "num_heads": 3}
WEIGHTS = {
    "class_token": 4.0,
    "patches": 2.0,
    "emoji": 0.5,
    "subgroup": 0.5,
    "keywords": 0.5,
    "layout": 2.0,
    "pose": 1.0,
}


class Student(nn.Module):
    """The backbone with its training heads."""

    def __init__(self, data: Drawings, views: KeptViews):
        super().__init__()
        self.backbone = timm.create_model(ARCHITECTURE, num_classes=0, **MODEL_ARGS)
        width = self.backbone.num_features
        self.teacher = TeacherHeads(width, views)
        self.emoji = nn.Linear(width, int(data.emoji.max()) + 1)
        self.subgroup = nn.Linear(width, int(data.subgroup.max()) + 1)
        self.keywords = nn.Linear(width, data.keywords.shape[1])
        self.layout = nn.Linear(width, 5 + 3 * 4 * 4)

    def tokens(self, x: Tensor, seen: Tensor | None) -> Tensor:
        """Tokens after the final norm of images (batch, 3, 64, 64) of which only patches ``seen`` are shown."""
        backbone = self.backbone
        x = only(backbone.patch_embed(x) + backbone.pos_embed[:, 1:], seen)
        first = (backbone.cls_token + backbone.pos_embed[:, :1]).expand(len(x), -1, -1)
        return backbone.norm(backbone.blocks(torch.cat([first, x], 1)))

    def forward(self, data: Drawings, views: KeptViews, rows: Tensor, seen: Tensor | None) -> dict[str, Tensor]:
        """Losses: squared errors of tokens, thumbnail and pose; cross-entropies of emoji, subgroup and keywords."""
        images = views.images[rows].float() / 127.5 - 1
        tokens = self.tokens(images, seen)
        features, drawing = tokens[:, 0], views.drawing[rows]
        layout = self.layout(features).float()
        pose = (layout[:, :5] - views.pose[rows]).square()
        drawn = data.drawn[drawing].float()[:, None]  # plain shapes have no upright pose
        emoji, subgroup, keywords = (head(features).float() for head in (self.emoji, self.subgroup, self.keywords))
        return self.teacher(tokens, views, rows, seen) | {
            "emoji": F.cross_entropy(emoji, data.emoji[drawing], ignore_index=UNKNOWN, label_smoothing=0.05),
            "subgroup": F.cross_entropy(subgroup, data.subgroup[drawing], ignore_index=UNKNOWN),
            "keywords": F.cross_entropy(keywords, data.keywords[drawing]),
            "layout": F.mse_loss(layout[:, 5:], F.avg_pool2d(images, 16).flatten(1)),
            "pose": (pose[:, :2] * drawn).mean() + pose[:, 2:].mean(),
        }


@torch.no_grad()
def initialize(backbone: nn.Module, images: Tensor) -> None:
    """Start values that shorten the training: see ``start_values``.

    The patch embedding whitens the patches of ``images`` (batch, 3, 64, 64) and stays as it is.
    """
    projection = backbone.patch_embed.proj
    weight, bias = whitening(images, 8)
    projection.weight.copy_(weight)
    projection.bias.copy_(bias)
    projection.requires_grad_(False)
    backbone.pos_embed[:, 1:].copy_(waves(8, backbone.num_features))
    for block in backbone.blocks:
        start_attention(block.attn.qkv.weight, block.attn.proj.weight, block.attn.num_heads)


def export(backbone: nn.Module, folder: Path) -> None:
    """Write the backbone in half precision, with the configuration from which timm rebuilds it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architecture": ARCHITECTURE,
        "num_classes": 0,
        "num_features": backbone.num_features,
        "global_pool": "token",
        "model_args": MODEL_ARGS,
        "pretrained_cfg": {
            "tag": "distilled",
            "custom_load": False,
            "input_size": [3, 64, 64],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    weights = {name: tensor.detach().half().contiguous() for name, tensor in backbone.state_dict().items()}
    partial = folder / "model.safetensors.tmp"
    partial.write_bytes(save(weights, metadata={"format": "pt"}))
    partial.replace(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder that prepare_emoji.py --icons wrote")
    parser.add_argument("--views", type=Path, required=True, help="the folder that teacher_views.py wrote")
    parser.add_argument("--output", type=Path, required=True, help="the folder for the weights and the checkpoint")
    parser.add_argument("--minutes", type=float, default=120, help="training time; the learning rate follows it")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-3, help="highest learning rate of AdamW")
    parser.add_argument("--muon-lr", type=float, default=3e-3, help="highest learning rate of Muon")
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)  # tiny gradients make a CPU several times slower
    torch.manual_seed(args.seed)

    data, views = Drawings(args.data), KeptViews(args.views)
    model = Student(data, views)
    initialize(model.backbone, views.images[torch.randperm(len(views))[:512]].float() / 127.5 - 1)
    average = copy.deepcopy(model.backbone).eval()
    hidden = [p for p in model.backbone.blocks.parameters() if p.ndim == 2]
    hidden_ids = {id(p) for p in hidden}
    other = [p for p in model.parameters() if p.requires_grad and id(p) not in hidden_ids]
    optimizers = [
        torch.optim.Muon(hidden, lr=args.muon_lr, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(other, lr=args.lr, weight_decay=args.weight_decay),
    ]
    step, seconds = 0, 0.0
    checkpoint = args.output / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        for optimizer, optimizer_state in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(optimizer_state)
        torch.set_rng_state(state["random"])
        step, seconds = state["step"], state["seconds"]

    def save_checkpoint() -> None:
        args.output.mkdir(parents=True, exist_ok=True)
        state = {"model": model.state_dict(), "average": average.state_dict(), "step": step, "seconds": seconds}
        state |= {"optimizers": [o.state_dict() for o in optimizers], "random": torch.get_rng_state()}
        torch.save(state, checkpoint.with_suffix(".tmp"))
        checkpoint.with_suffix(".tmp").replace(checkpoint)
        export(average, args.output)

    print(f"{len(data.drawn)} drawings, {len(views)} views, {data.keywords.shape[1]} keywords")
    model.train()
    budget, running, order = args.minutes * 60, {}, torch.empty(0, dtype=torch.long)
    while seconds < budget:
        start = time.perf_counter()
        progress = seconds / budget
        share = min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * progress))
        for optimizer, highest in zip(optimizers, (args.muon_lr, args.lr), strict=True):
            optimizer.param_groups[0]["lr"] = share * highest
        if len(order) < args.batch_size:
            order = torch.randperm(len(views))
        rows, order = order[: args.batch_size], order[args.batch_size :]
        seen = views.shown(len(rows), progress)
        # on a CPU, plain attention is faster backwards than the fused one
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            losses = model(data, views, rows, seen)
        model.zero_grad()
        sum(WEIGHTS[name] * loss for name, loss in losses.items()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        with torch.no_grad():  # an average over about the last 50 steps
            for mean, value in zip(average.parameters(), model.backbone.parameters(), strict=True):
                mean.lerp_(value, max(1 / 50, 2 / (step + 1)))
        for name, loss in losses.items():
            running[name] = 0.95 * running.get(name, loss.item()) + 0.05 * loss.item()
        seconds += time.perf_counter() - start
        if step % 50 == 0:
            values = " ".join(f"{name} {value:.3f}" for name, value in running.items())
            print(f"step {step} minute {seconds / 60:.1f} {values}", flush=True)
        if step % 200 == 0:
            save_checkpoint()
    save_checkpoint()


if __name__ == "__main__":
    main()
