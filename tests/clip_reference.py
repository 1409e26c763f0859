"""Tiny lively CLIP models, and CLIP with learned context written out in float64, one text at a time at 77 positions."""

import copy
import functools

import open_clip
import torch
import torch.nn.functional as F
from open_clip import CLIP, CustomTextCLIP

NAMES = ["dog", "red kite", "2012 Lamborghini Gallardo LP 570-4", "Yo_Yo"]
VISION = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 2, "head_width": 16}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 3}
CUSTOM = dict.fromkeys(("qk_norm", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc"), True)
RESNET = {"image_size": 32, "layers": (1, 1, 1, 1), "width": 8, "head_width": 16}
SIGLIP = {"context_length": 12, "vocab_size": 60, "no_causal_mask": True, "pool_type": "last", "proj_bias": True}


@functools.cache
def tokenizer():
    """OpenCLIP's own."""
    return open_clip.get_tokenizer("ViT-B-16")


@torch.no_grad()
def lively_clip(model):
    """Freshly built weights have zero biases and small effects, behind which errors hide."""
    for parameter in model.parameters():
        parameter.add_(0.08 * torch.randn(parameter.shape))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
    return model.eval()


@functools.cache
def _pristine(kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "siglip":
            model = CustomTextCLIP(64, VISION, TEXT | SIGLIP, init_logit_bias=-3.0)
        else:
            vision, text = RESNET if kind == "resnet" else VISION, TEXT | (CUSTOM if kind == "custom" else {})
            model = CLIP(64, vision, text, quick_gelu=kind == "quick")
        return lively_clip(model)


def clip_model(kind="plain", dtype=torch.float64):
    """A fresh copy: plain, quick (QuickGELU), custom (attention), resnet or siglip."""
    return copy.deepcopy(_pristine(kind)).to(dtype)


class WordTokenizer:
    """Words to ids without a start token; the end token is also the padding, as SigLIP's tokenizers have it."""

    def __init__(self):
        self.ids = {}

    def __call__(self, texts, context_length=12):
        rows = torch.ones(len(texts), context_length, dtype=torch.long)
        for row, text in zip(rows, texts, strict=True):
            words = text.lower().replace(".", " .").split()[: context_length - 1]
            for index, word in enumerate(words):
                row[index] = self.ids.setdefault(word, len(self.ids) + 2)
        return rows


def images(batch=3, dtype=torch.float64, seed=0, size=32):
    """Random images (batch, 3, size, size)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, size, size, generator=generator, dtype=torch.float64).to(dtype)


def lively_(learner, seed=5):
    """Moves what is trained off its start, so that zeros and equal rows hide nothing; returns the learner."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in learner.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.add_(0.3 * noise.to(parameter.dtype))
    return learner


# The reference


def layer_norm(x, norm):
    """Layer norm of rows."""
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).square().mean(-1, keepdim=True)
    return (x - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias


def text_feature(clip, embedded, end, overwritten=(None, None)):
    """`raw_text_feature`, at length 1."""
    feature = raw_text_feature(clip, embedded, end, overwritten)
    return feature / feature.square().sum().sqrt()


def raw_text_feature(clip, embedded, end, overwritten=(None, None)):
    """Feature (e,) of embedded tokens (77, d), read at position `end`.

    `overwritten` is a block and the tokens (M, d) that stand after the start token when it begins.
    """
    x = embedded + clip.positional_embedding
    length, width = x.shape
    for index, block in enumerate(clip.transformer.resblocks):
        if index == overwritten[0]:
            x = torch.cat((x[:1], overwritten[1], x[1 + len(overwritten[1]) :]))
        h = layer_norm(x, block.ln_1)
        q, k, v = (h @ block.attn.in_proj_weight.T + block.attn.in_proj_bias).split(width, dim=1)
        size = width // block.attn.num_heads
        heads = []
        for i in range(block.attn.num_heads):
            part = slice(i * size, (i + 1) * size)
            scores = q[:, part] @ k[:, part].T / size**0.5
            visible = torch.arange(length)[:, None] >= torch.arange(length)
            weights = torch.where(visible, (scores - scores.max()).exp(), 0)
            heads.append(weights / weights.sum(1, keepdim=True) @ v[:, part])
        x = x + torch.cat(heads, 1) @ block.attn.out_proj.weight.T + block.attn.out_proj.bias
        h = layer_norm(x, block.ln_2) @ block.mlp.c_fc.weight.T + block.mlp.c_fc.bias
        quick = "QuickGELU" in type(block.mlp.gelu).__name__
        h = h / (1 + (-1.702 * h).exp()) if quick else 0.5 * h * (1 + torch.erf(h / 2**0.5))
        x = x + h @ block.mlp.c_proj.weight.T + block.mlp.c_proj.bias
    return layer_norm(x[end], clip.ln_final) @ clip.text_projection


def plain_features(clip, texts):
    """Unit features (texts, e) of plain texts."""
    ids = tokenizer()(texts)
    return torch.stack([text_feature(clip, clip.token_embedding.weight[row], int(row.argmax())) for row in ids])


def prompt_features(clip, names, context, position="end", overwritten=(None, None), feature=text_feature):
    """Unit features (classes, e) of prompts with a context (M, d), or one for each class (classes, M, d).

    `overwritten` is a block and the tokens (classes, M, d) that stand after the start tokens when it begins.
    """
    features = []
    for index, name in enumerate(names):
        own = context if context.ndim == 2 else context[index]
        count = len(own)
        name = name.replace("_", " ")
        row = tokenizer()([" ".join(["X"] * count) + f" {name}."])[0]
        num_name = int(tokenizer()([name])[0].argmax()) - 1
        rows = clip.token_embedding.weight[row]
        start, words, rest = rows[:1], rows[1 + count : 1 + count + num_name], rows[1 + count + num_name :]
        before = {"end": count, "middle": count // 2, "front": 0}[position]
        embedded = torch.cat((start, own[:before], words, own[before:], rest))
        tokens = None if overwritten[0] is None else overwritten[1][index]
        features.append(feature(clip, embedded, int(row.argmax()), (overwritten[0], tokens)))
    return torch.stack(features)


def image_features(clip, pictures):
    """Unit features (batch, e) by OpenCLIP."""
    features = clip.encode_image(pictures).detach()
    return features / features.norm(dim=1, keepdim=True)


def cross_entropy(logits, labels):
    """Mean of -log softmax at the label."""
    return -logits.log_softmax(1)[torch.arange(len(labels)), labels].mean()


def scaled(clip, features, texts):
    """Logits (batch, classes)."""
    return clip.logit_scale.detach().exp() * features @ texts.T


def relative(actual, expected):
    """Largest difference in units of the largest expected value."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def mlp(weights, x):
    """Layers (weight, bias) with ReLU between them."""
    (w1, b1), (w2, b2) = weights
    return F.relu(x @ w1.T + b1) @ w2.T + b2


def transport_plan(s, epsilon=0.1):
    """PLOT's plan T (parts, contexts) of similarities (parts, contexts), by Sinkhorn's iterations written out."""
    k = (-(1 - s) / epsilon).exp()
    r, c = torch.ones(len(s), dtype=s.dtype), torch.ones(s.shape[1], dtype=s.dtype)
    for _ in range(100):
        before, r = r, 1 / len(s) / (k @ c)
        c = 1 / s.shape[1] / (k.T @ r)
        if (r - before).abs().mean() < 1e-2:
            break
    return torch.diag(r) @ k @ torch.diag(c)
