"""Train nano_clip.distilled, a small CLIP for drawings, on emoji and icons, their names, and a larger transformer.

The model is OpenCLIP's ``CLIP`` with its own image and text towers (https://arxiv.org/abs/2103.00020). It sees the
views that ``teacher_views.py`` has shown to a DINOv2 ViT-S/14. An image has one caption per step: its name, a keyword,
or a general word such as "bird" from the subgroup of the emoji, in one of many templates. A caption is a positive of
every image of the batch for which it is true, as in UniCL (https://arxiv.org/abs/2204.03610); pairs of which it is
unknown are left out, and so are plain shapes and pictograms in any pose. On all images, linear maps of the image
tower's tokens are drawn to the tokens of the teacher. Half of the patches are dropped until the last part of the run,
as in FLIP (https://arxiv.org/abs/2212.00794). Texts are cut to the longest of the batch. The matrices of the blocks are
trained with Muon (https://arxiv.org/abs/2502.16982), everything else with AdamW.

    python nano_clip.py --data emoji --views views --output nano_clip --minutes 120

writes ``open_clip_config.json`` and ``model.safetensors``, which ``visionpeft.models.nano_clip`` loads. The run
continues from its checkpoint when it is started again.
"""

import argparse
import copy
import json
import math
import random
import time
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from captions import Captions
from drawings import Drawings
from kept_views import KeptViews, TeacherHeads, only
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import save
from start_values import start_attention, waves, whitening
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

TEACHER_WEIGHTS = {"class_token": 2.0, "patches": 1.0}
MODEL = {
    "embed_dim": 192,
    "vision_cfg": {"image_size": 64, "patch_size": 8, "width": 192, "layers": 6, "head_width": 64},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 192, "heads": 3, "layers": 4},
}


class CaptionTokens:
    """Tokens of captions; the text tower is trained with the numbers of those that occur.

    Args:
        captions: all that can be said.
    """

    def __init__(self, captions: Captions):
        self.tokenizer = SimpleTokenizer()
        ids = {token for text in captions.all_texts() for token in self.tokenizer.encode(text)}
        special = {self.tokenizer.sot_token_id, self.tokenizer.eot_token_id}
        self.ids = sorted(ids | special)
        self.number = {token: number for number, token in enumerate(self.ids)}

    def of(self, texts: list[str]) -> Tensor:
        """Token numbers (texts, length), with zeros after the end."""
        first, last = self.tokenizer.sot_token_id, self.tokenizer.eot_token_id
        rows = [
            [first, *self.tokenizer.encode(text)[: MODEL["text_cfg"]["context_length"] - 2], last] for text in texts
        ]
        tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        for row, ids in zip(tokens, rows, strict=True):
            row[: len(ids)] = torch.tensor([self.number[token] for token in ids])
        return tokens


def image_tokens(visual: nn.Module, images: Tensor, seen: Tensor | None) -> Tensor:
    """Tokens after the last norm of normalised images (batch, 3, 64, 64) of which only patches ``seen`` are shown."""
    position = visual.positional_embedding
    x = only(visual.conv1(images).flatten(2).mT + position[1:], seen)
    x = torch.cat([(visual.class_embedding + position[0]).expand(len(x), 1, -1), x], 1)
    return visual.ln_post(visual.transformer(visual.ln_pre(x)))


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
    random.seed(args.seed)

    data, views = Drawings(args.data), KeptViews(args.views)
    table, captions = data.table, Captions(data.table)
    codes, families = [captions.codes[code] for code in table["code"]], table["family"].tolist()
    tokens = CaptionTokens(captions)
    config = copy.deepcopy(MODEL)
    config["text_cfg"]["vocab_size"] = len(tokens.ids)
    clip = open_clip.CLIP(**config)
    teacher = TeacherHeads(MODEL["vision_cfg"]["width"], views)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD))

    def normalised(rows: Tensor) -> Tensor:
        return (views.images[rows].float() / 255 - mean) / std

    clip.visual.conv1.weight.data = whitening(normalised(torch.randperm(len(views))[:512]), 8)[0]
    clip.visual.conv1.weight.requires_grad_(False)
    clip.visual.positional_embedding.data[1:] = waves(8, 192)
    for block in clip.visual.transformer.resblocks:
        start_attention(block.attn.in_proj_weight, block.attn.out_proj.weight, 3)

    average = copy.deepcopy(clip).eval()
    hidden = [p for tower in (clip.visual.transformer, clip.transformer) for p in tower.parameters() if p.ndim == 2]
    hidden_ids = {id(p) for p in hidden}
    trained = [*clip.parameters(), *teacher.parameters()]
    other = [p for p in trained if p.requires_grad and id(p) not in hidden_ids]
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
        teacher.load_state_dict(state["teacher"])
        average.load_state_dict(state["average"])
        for optimizer, optimizer_state in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(optimizer_state)
        step, seconds = state["step"], state["seconds"]
        torch.manual_seed(args.seed + step)
        random.seed(args.seed + step)

    def save_checkpoint() -> None:
        args.output.mkdir(parents=True, exist_ok=True)
        state = {"model": clip.state_dict(), "average": average.state_dict(), "step": step, "seconds": seconds}
        state |= {"teacher": teacher.state_dict()}
        state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
        torch.save(state, checkpoint.with_suffix(".tmp"))
        checkpoint.with_suffix(".tmp").replace(checkpoint)
        export(average, tokens.ids, args.output)

    print(f"{len(views)} views, {len(captions.forms)} phrases, {len(tokens.ids)} tokens")
    clip.train()
    budget, running, order = args.minutes * 60, {}, torch.empty(0, dtype=torch.long)
    while seconds < budget:
        start = time.perf_counter()
        progress = seconds / budget
        share = min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * progress))
        for optimizer, highest in zip(optimizers, (args.muon_lr, args.lr), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = share * highest
        if len(order) < args.batch_size:
            order = torch.randperm(len(views))
        rows, order = order[: args.batch_size], order[args.batch_size :]
        long = step % 8 == 7  # a few batches of longer texts, so that later positions are trained too
        told = data.drawn[views.drawing[rows]] & ~views.any_pose[rows]
        drawings, styles = views.drawing[rows[told]].tolist(), views.styles[rows[told]]
        pairs = [
            captions.sample(codes[drawing], families[drawing], style, long)
            for drawing, style in zip(drawings, styles.tolist(), strict=True)
        ]
        phrase_of = dict(pairs)
        phrases, code = torch.tensor(list(phrase_of.values())), torch.tensor([codes[drawing] for drawing in drawings])
        true, unknown = captions.true[code][:, phrases], captions.unknown[code][:, phrases]
        for style, number in enumerate(captions.styles):
            true[:, phrases == number] |= styles[:, style, None]
        seen = views.shown(len(rows), progress)
        clip.zero_grad()
        teacher.zero_grad()
        # on a CPU, plain attention is faster backwards than the fused one
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            patches = image_tokens(clip.visual, normalised(rows), seen)
            image = (patches[told, 0] @ clip.visual.proj).float()
            text = encode_text(clip, tokens.of(list(phrase_of))).float()
            losses = teacher(patches, views, rows, seen)
        scale = clip.logit_scale.exp()
        contrastive, accuracy = contrastive_loss(
            F.normalize(image, dim=1), F.normalize(text, dim=1), scale, true, unknown & ~true
        )
        (contrastive + sum(TEACHER_WEIGHTS[name] * loss for name, loss in losses.items())).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        with torch.no_grad():
            clip.logit_scale.clamp_(0, math.log(100))
            for mean_value, value in zip(average.parameters(), clip.parameters(), strict=True):
                mean_value.lerp_(value, max(1 / 100, 2 / (step + 1)))  # over about the last 100 steps
        for name, value in {"contrastive": contrastive, "accuracy": accuracy, **losses}.items():
            running[name] = 0.95 * running.get(name, value.item()) + 0.05 * value.item()
        seconds += time.perf_counter() - start
        if step % 50 == 0:
            values = " ".join(f"{name} {value:.3f}" for name, value in running.items())
            print(f"step {step} minute {seconds / 60:.1f} scale {clip.logit_scale.exp():.1f} {values}", flush=True)
        if step % 100 == 0:
            save_checkpoint()
    save_checkpoint()


if __name__ == "__main__":
    main()
