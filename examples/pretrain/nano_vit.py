"""Train nano_vit, a small vision transformer for 64-pixel drawings, from scratch on emoji.

The model is timm's ``VisionTransformer`` (https://arxiv.org/abs/2010.11929). From the class token after the final norm,
linear heads predict which emoji an image shows, its subgroup, its keywords, and its layout: the pose (rotation,
position, size) that the augmentation gave it and a thumbnail of 4 x 4 pixels. The design families of one emoji are the
images of one class. Half of the patches are dropped at random until the last part of the run, which doubles the number
of images seen (https://arxiv.org/abs/2212.00794). The matrices of the blocks are trained with Muon
(https://arxiv.org/abs/2502.16982), everything else with AdamW. The start is closer to a trained transformer than usual:
see ``initialize``.

    python nano_vit.py --data emoji --output nano_vit --minutes 60

writes ``config.json`` and ``model.safetensors``, a folder that ``timm.create_model("local-dir:...")`` loads. The run
continues from its checkpoint when it is started again.
"""

import argparse
import copy
import json
import math
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import timm
import torch
import torch.nn.functional as F
from augmentation import augment
from PIL import Image
from safetensors.torch import save
from start_values import start_attention, waves, whitening
from torch import Tensor, nn

ARCHITECTURE = "vit_tiny_patch16_224"
MODEL_ARGS = {"img_size": 64, "patch_size": 8, "embed_dim": 192, "depth": 6, "num_heads": 3}
PATCH_DROP = [(0.85, 0.5), (1.0, 0.0)]  # until this share of the run, this share of the patches


class EmojiData:
    """All images in memory, with the index of the emoji and of the subgroup and the keyword distribution of each.

    Args:
        folder: what ``prepare_emoji.py`` wrote.
        min_keyword_count: keywords of fewer emoji than this are ignored.
    """

    def __init__(self, folder: Path, min_keyword_count: int = 4):
        table = pd.read_csv(folder / "emoji.csv", dtype=str, keep_default_na=False)
        table = table[~table["code"].str.contains("-200d-")].reset_index(drop=True)  # no combinations such as families
        self.images = torch.from_numpy(np.stack([np.array(Image.open(folder / path)) for path in table["path"]]))
        self.images = self.images.permute(0, 3, 1, 2).contiguous()  # (images, 4, 64, 64) uint8, RGBA
        self.emoji = torch.from_numpy(table["code"].astype("category").cat.codes.to_numpy(np.int64, copy=True))
        self.subgroup = torch.from_numpy(table["subgroup"].astype("category").cat.codes.to_numpy(np.int64, copy=True))
        words = table.drop_duplicates("code")["keywords"].str.split(";")
        counts = Counter(word for row in words for word in row)
        vocabulary = sorted(word for word, count in counts.items() if count >= min_keyword_count)
        index = {word: i for i, word in enumerate(vocabulary)}
        self.keywords = torch.zeros(len(table), len(vocabulary))
        for row, text in enumerate(table["keywords"]):
            for word in text.split(";"):
                if word in index:
                    self.keywords[row, index[word]] = 1
        self.keywords /= self.keywords.sum(1, keepdim=True).clamp_min(1)


class EmojiModel(nn.Module):
    """The backbone with its four training heads."""

    def __init__(self, data: EmojiData):
        super().__init__()
        self.backbone = timm.create_model(ARCHITECTURE, num_classes=0, patch_drop_rate=0.5, **MODEL_ARGS)
        width = self.backbone.num_features
        self.emoji = nn.Linear(width, int(data.emoji.max()) + 1)
        self.subgroup = nn.Linear(width, int(data.subgroup.max()) + 1)
        self.keywords = nn.Linear(width, data.keywords.shape[1])
        self.layout = nn.Linear(width, 5 + 3 * 4 * 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Scores of emoji, subgroups and keywords, and layouts, of images (batch, 3, 64, 64)."""
        features = self.backbone(x)
        return self.emoji(features), self.subgroup(features), self.keywords(features), self.layout(features)


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


def loss_function(outputs: tuple[Tensor, ...], data: EmojiData, index: Tensor, layout: Tensor) -> Tensor:
    """Cross-entropy of emoji, subgroup and keywords (a soft target) plus the squared error of the layout."""
    emoji, subgroup, keywords, predicted_layout = outputs
    loss = F.cross_entropy(emoji, data.emoji[index], label_smoothing=0.05)
    loss = loss + F.cross_entropy(subgroup, data.subgroup[index])
    loss = loss + 0.5 * F.cross_entropy(keywords, data.keywords[index])
    return loss + 3 * F.mse_loss(predicted_layout, layout) + F.mse_loss(predicted_layout[:, :5], layout[:, :5])


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
            "tag": "emoji",
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
    parser.add_argument("--data", type=Path, required=True, help="the folder that prepare_emoji.py wrote")
    parser.add_argument("--output", type=Path, required=True, help="the folder for the weights and the checkpoint")
    parser.add_argument("--minutes", type=float, default=60, help="training time; the learning rate follows it")
    parser.add_argument("--batch-size", type=int, default=96)
    parser.add_argument("--lr", type=float, default=1e-3, help="highest learning rate of AdamW")
    parser.add_argument("--muon-lr", type=float, default=3e-3, help="highest learning rate of Muon")
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)  # tiny gradients make a CPU several times slower
    torch.manual_seed(args.seed)

    data = EmojiData(args.data)
    model = EmojiModel(data)
    initialize(model.backbone, augment(data.images[torch.randperm(len(data.images))[:512]])[0])
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

    print(f"{len(data.images)} images, {model.emoji.out_features} emoji, {model.keywords.out_features} keywords")
    model.train()
    budget, running, order = args.minutes * 60, None, torch.empty(0, dtype=torch.long)
    while seconds < budget:
        start = time.perf_counter()
        progress = seconds / budget
        share = min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * progress))
        for optimizer, highest in zip(optimizers, (args.muon_lr, args.lr), strict=True):
            optimizer.param_groups[0]["lr"] = share * highest
        model.backbone.patch_drop.prob = next(share for until, share in PATCH_DROP if progress < until)
        if len(order) < args.batch_size:
            order = torch.randperm(len(data.images))
        index, order = order[: args.batch_size], order[args.batch_size :]
        images, layout = augment(data.images[index])
        outputs = model(images)
        loss = loss_function(outputs, data, index, layout)
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        with torch.no_grad():  # an average over about the last 50 steps
            for mean, value in zip(average.parameters(), model.backbone.parameters(), strict=True):
                mean.lerp_(value, max(1 / 50, 2 / (step + 1)))
        accuracy = (outputs[0].argmax(1) == data.emoji[index]).float().mean().item()
        layout_error = F.mse_loss(outputs[3], layout).item()
        current = torch.tensor([loss.item(), accuracy, layout_error])
        running = current if running is None else running.lerp(current, 0.05)
        seconds += time.perf_counter() - start
        if step % 50 == 0:
            values = "loss {:.3f} accuracy {:.3f} layout {:.3f}".format(*running.tolist())
            print(f"step {step} minute {seconds / 60:.1f} lr {share * args.lr:.1e} {values}", flush=True)
            save_checkpoint()
    save_checkpoint()


if __name__ == "__main__":
    main()
