"""Train nano_clip, a small CLIP for 64-pixel drawings, from scratch on emoji and icons with their names.

The model is OpenCLIP's ``CLIP`` with its own image and text towers (https://arxiv.org/abs/2103.00020). An image has one
caption per step: its name, a keyword, or a general word such as "bird" from the subgroup of the emoji, in one of many
templates. A caption is a positive of every image of the batch for which it is true, as in UniCL
(https://arxiv.org/abs/2204.03610); pairs of which it is unknown are left out. Half of the patches are dropped until the
last part of the run, as in FLIP (https://arxiv.org/abs/2212.00794). Texts are cut to the longest of the batch. The
matrices of the blocks are trained with Muon (https://arxiv.org/abs/2502.16982), everything else with AdamW.

    python nano_clip.py --data emoji --output nano_clip --minutes 60

writes ``open_clip_config.json`` and ``model.safetensors``, which ``visionpeft.models.nano_clip`` loads. The run
continues from its checkpoint when it is started again.
"""

import argparse
import copy
import json
import math
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import open_clip
import pandas as pd
import torch
import torch.nn.functional as F
from augmentation import augment_with_styles
from captions import Captions
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image
from safetensors.torch import save
from start_values import start_attention, waves, whitening
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

HELD_OUT = {"noto-v1"}  # the design family of datasets/drawings
UNMASKED = 0.88  # from this share of the run on, no patches are dropped
MODEL = {
    "embed_dim": 192,
    "vision_cfg": {"image_size": 64, "patch_size": 8, "width": 192, "layers": 6, "head_width": 64},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 192, "heads": 3, "layers": 4},
}


class DrawingData:
    """All drawings in memory: images (images, 4, 64, 64), their captions, and what is needed to choose them.

    Args:
        folder: what ``prepare_emoji.py --icons`` wrote.
    """

    def __init__(self, folder: Path):
        tables = [pd.read_csv(folder / name, dtype=str, keep_default_na=False) for name in ("emoji.csv", "icons.csv")]
        table = pd.concat(tables, ignore_index=True)
        # no combinations such as families; of the icons, no abstract ones
        left_out = table["family"].isin(HELD_OUT) | table["code"].str.contains("-200d-|abstract-")
        table = table[~left_out].reset_index(drop=True)
        self.images = torch.from_numpy(np.stack([np.array(Image.open(folder / path)) for path in table["path"]]))
        self.images = self.images.permute(0, 3, 1, 2).contiguous()  # uint8, RGBA
        self.captions = Captions(table)
        self.code = torch.tensor([self.captions.codes[code] for code in table["code"]])
        self.family = table["family"].tolist()
        self.flip = torch.from_numpy(~table["name"].str.contains("left|right").to_numpy(bool))

        # token ids of the captions only; the text tower is trained with the numbers of these
        self.tokenizer = SimpleTokenizer()
        ids = {token for text in self.captions.all_texts() for token in self.tokenizer.encode(text)}
        special = {self.tokenizer.sot_token_id, self.tokenizer.eot_token_id}
        self.token_ids = sorted(ids | special)
        self.token_number = {token: number for number, token in enumerate(self.token_ids)}

    def tokens(self, texts: list[str]) -> Tensor:
        """Token numbers (texts, length), with zeros after the end."""
        first, last = self.tokenizer.sot_token_id, self.tokenizer.eot_token_id
        rows = [
            [first, *self.tokenizer.encode(text)[: MODEL["text_cfg"]["context_length"] - 2], last] for text in texts
        ]
        tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        for row, ids in zip(tokens, rows, strict=True):
            row[: len(ids)] = torch.tensor([self.token_number[token] for token in ids])
        return tokens


def encode_text(clip: nn.Module, tokens: Tensor) -> Tensor:
    """Text features (texts, embed_dim) of tokens (texts, length) of any length up to the context length.

    Texts of similar length are encoded together, cut after the longest.
    """
    ends = tokens.argmax(1)  # the end token has the highest number
    order, features = ends.argsort(), []
    for part in order.chunk(3):
        length = int(ends[part[-1]]) + 1
        x = clip.token_embedding(tokens[part, :length]) + clip.positional_embedding[:length]
        x = clip.ln_final(clip.transformer(x, attn_mask=clip.attn_mask[:length, :length]))
        features.append(x[torch.arange(len(part)), ends[part]] @ clip.text_projection)
    return torch.cat(features)[order.argsort()]


def contrastive_loss(
    image: Tensor, text: Tensor, scale: Tensor, true: Tensor, unknown: Tensor
) -> tuple[Tensor, Tensor]:
    """Cross-entropy in both directions, over all captions that are true for an image and the reverse.

    Args:
        image: features (images, embed_dim) of length one.
        text: features (texts, embed_dim) of length one.
        scale: the inverse temperature.
        true: which caption is true for which image (images, texts).
        unknown: pairs that are left out.

    Returns:
        The loss, and the share of images whose nearest caption is true.
    """
    logits = (scale * image @ text.T).masked_fill(unknown, -1e4)
    target = true.float()
    images = -(target / target.sum(1, keepdim=True) * logits.log_softmax(1)).sum(1).mean()
    texts = -(target / target.sum(0, keepdim=True) * logits.log_softmax(0)).sum(0).mean()
    accuracy = true.gather(1, logits.argmax(1, keepdim=True)).float().mean()
    return (images + texts) / 2, accuracy


def export(clip: nn.Module, token_ids: list[int], folder: Path) -> None:
    """Write the weights in half precision, with the trained rows of the token embedding only."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().half().contiguous() for name, tensor in clip.state_dict().items()}
    weights["token_embedding.rows"] = weights.pop("token_embedding.weight")
    weights["token_embedding.ids"] = torch.tensor(token_ids, dtype=torch.int32)
    weights["logit_scale"] = clip.logit_scale.detach().clone()
    partial = folder / "model.safetensors.tmp"
    partial.write_bytes(save(weights, metadata={"format": "pt"}))
    partial.replace(folder / "model.safetensors")
    preprocess = {"size": [64, 64], "mode": "RGB", "mean": OPENAI_DATASET_MEAN, "std": OPENAI_DATASET_STD}
    preprocess |= {"interpolation": "bicubic", "resize_mode": "shortest"}
    config = {"model_cfg": MODEL, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder that prepare_emoji.py --icons wrote")
    parser.add_argument("--output", type=Path, required=True, help="the folder for the weights and the checkpoint")
    parser.add_argument("--minutes", type=float, default=60, help="training time; the learning rate follows it")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-3, help="highest learning rate of AdamW")
    parser.add_argument("--muon-lr", type=float, default=3e-3, help="highest learning rate of Muon")
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # tiny gradients make a CPU several times slower
    torch.manual_seed(args.seed)
    random.seed(args.seed)

    data = DrawingData(args.data)
    captions = data.captions
    config = copy.deepcopy(MODEL)
    config["vision_cfg"]["patch_dropout"] = 0.5
    config["text_cfg"]["vocab_size"] = len(data.token_ids)
    clip = open_clip.CLIP(**config)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD))

    sample = torch.randperm(len(data.images))[:512]
    images = (augment_with_styles(data.images[sample], data.flip[sample])[0] - mean) / std
    clip.visual.conv1.weight.data = whitening(images, 8)[0]
    clip.visual.conv1.weight.requires_grad_(False)
    clip.visual.positional_embedding.data[1:] = waves(8, 192)
    for block in clip.visual.transformer.resblocks:
        start_attention(block.attn.in_proj_weight, block.attn.out_proj.weight, 3)

    average = copy.deepcopy(clip).eval()
    hidden = [p for tower in (clip.visual.transformer, clip.transformer) for p in tower.parameters() if p.ndim == 2]
    hidden_ids = {id(p) for p in hidden}
    other = [p for p in clip.parameters() if p.requires_grad and id(p) not in hidden_ids]
    groups = [
        {"params": [p for p in other if p.ndim > 1], "weight_decay": args.weight_decay},
        {"params": [p for p in other if p.ndim < 2], "weight_decay": 0},
    ]
    optimizers = [
        torch.optim.Muon(hidden, lr=args.muon_lr, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98)),
    ]
    step, seconds = 0, 0.0
    checkpoint = args.output / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint)
        clip.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        for optimizer, optimizer_state in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(optimizer_state)
        step, seconds = state["step"], state["seconds"]
        torch.manual_seed(args.seed + step)
        random.seed(args.seed + step)

    def save_checkpoint() -> None:
        args.output.mkdir(parents=True, exist_ok=True)
        state = {"model": clip.state_dict(), "average": average.state_dict(), "step": step, "seconds": seconds}
        state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
        torch.save(state, checkpoint.with_suffix(".tmp"))
        checkpoint.with_suffix(".tmp").replace(checkpoint)
        export(average, data.token_ids, args.output)

    def encode(images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        # on a CPU, plain attention is faster backwards than the fused one
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            return clip.visual(images).float(), encode_text(clip, tokens).float()

    # every thread has its part of the batch, so that threads wait for each other only twice a step
    pool = ThreadPoolExecutor(args.threads)
    print(f"{len(data.images)} images, {len(captions.forms)} phrases, {len(data.token_ids)} tokens")
    clip.train()
    budget, running, order = args.minutes * 60, None, torch.empty(0, dtype=torch.long)
    while seconds < budget:
        start = time.perf_counter()
        progress = seconds / budget
        share = min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * progress))
        for optimizer, highest in zip(optimizers, (args.muon_lr, args.lr), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = share * highest
        clip.visual.patch_dropout.prob = 0.5 if progress < UNMASKED else 0.0
        if len(order) < args.batch_size:
            order = torch.randperm(len(data.images))
        index, order = order[: args.batch_size], order[args.batch_size :]
        images, styles = augment_with_styles(data.images[index], data.flip[index])
        code = data.code[index]
        long = step % 8 == 7  # a few batches of longer texts, so that later positions are trained too
        pairs = [
            captions.sample(code, data.family[row], style, long)
            for row, code, style in zip(index.tolist(), code.tolist(), styles.tolist(), strict=True)
        ]
        phrase_of = dict(pairs)
        phrases = torch.tensor(list(phrase_of.values()))
        true, unknown = captions.true[code][:, phrases], captions.unknown[code][:, phrases]
        for style, number in enumerate(captions.styles):
            true[:, phrases == number] |= styles[:, style, None]
        clip.zero_grad()
        tokens = data.tokens(list(phrase_of))
        features = list(pool.map(encode, ((images - mean) / std).chunk(args.threads), tokens.chunk(args.threads)))
        image, text = (torch.cat([part[side].detach() for part in features]).requires_grad_() for side in (0, 1))
        scale = clip.logit_scale.exp()
        loss, accuracy = contrastive_loss(
            F.normalize(image, dim=1), F.normalize(text, dim=1), scale, true, unknown & ~true
        )
        loss.backward()
        gradients = zip(image.grad.chunk(args.threads), text.grad.chunk(args.threads), strict=True)
        list(pool.map(torch.autograd.backward, features, gradients))
        nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        with torch.no_grad():
            clip.logit_scale.clamp_(0, math.log(100))
            for mean_value, value in zip(average.parameters(), clip.parameters(), strict=True):
                mean_value.lerp_(value, max(1 / 100, 2 / (step + 1)))  # over about the last 100 steps
        current = torch.tensor([loss.item(), accuracy.item()])
        running = current if running is None else running.lerp(current, 0.05)
        seconds += time.perf_counter() - start
        if step % 50 == 0:
            values = "loss {:.3f} accuracy {:.3f}".format(*running.tolist())
            print(f"step {step} minute {seconds / 60:.1f} {values} scale {clip.logit_scale.exp():.1f}", flush=True)
        if step % 100 == 0:
            save_checkpoint()
    save_checkpoint()


if __name__ == "__main__":
    main()
