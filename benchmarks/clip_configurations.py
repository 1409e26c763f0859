"""Every learner on every configuration of OpenCLIP: accepted and exact, or refused with one sentence.

Each configuration is built small, in float64, with random weights: its own pooling, mask, class token, kind of image
tower, bias and context length, but two narrow blocks, and in ViTamin's stem one of each kind of convolutional block.
Configurations that are then made of the same modules with the same options are walked once. Trunks of timm that are no
ViTs are stood for by the smallest of their family; text towers of Hugging Face, whose weights have to be downloaded, by
a tiny one; tokenizers of Hugging Face by one of words with their start, end and padding ids.

A learner that accepts a configuration is exact if
- its text features are those that OpenCLIP's own `encode_text` gives of ordinary token ids, after every context vector
  has been made the embedding of an id that was free;
- its image features, if its image tower is frozen, are those of OpenCLIP's own `encode_image`;
- its logits with and without the exact economies of the text tower are the same, after training has moved it;
- every tensor that it trains gets a gradient;
- and of zero-shot, its logits are OpenCLIP's own, with their scale and bias.

    python benchmarks/clip_configurations.py --output results   # all of them; writes clip_configurations.md and .csv
    python benchmarks/clip_configurations.py --configurations ViT-B-16-SigLIP2 coca_ViT-B-32 --learners CoOp MaPLe
"""

import argparse
import copy
import functools
import json
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import open_clip
import timm
import torch
import torch.nn.functional as F
from measuring import table, write
from timm.models.vitamin import VitCfg, VitConvCfg
from torch import Tensor, nn

from visionpeft.clip import learners
from visionpeft.clip.learner import Learner
from visionpeft.clip.stages import InTwoStages
from visionpeft.errors import UserError

NAMES = ["dog", "red kite", "car", "green passion flower"]
WORDS = 400  # of the tokenizers that stand in for those of Hugging Face
SMALL_TRUNK = {"depth": 2, "embed_dim": 128, "num_heads": 2, "img_size": 32, "patch_size": 8, "mlp_ratio": 4.0}
VITS = (
    "vision_transformer",
    "vision_transformer_hybrid",
    "vision_transformer_relpos",
    "eva",
    "beit",
    "deit",
    "vitamin",
)
SMALLEST = {"convnext": "convnext_atto", "fastvit": "fastvit_t8"}
SMALL_STEM = {  # of ViTamin
    "embed_cfg": VitCfg(
        embed_dim=(16, 24, SMALL_TRUNK["embed_dim"]),
        depths=(1, 2, 1),  # the second block of a stage keeps its width
        stem_width=16,
        conv_cfg=VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6),
        head_type="1d",
    )
}
SMALL_SWIN = {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (2, 2, 2, 2)}
OPTIONS = {
    **{name: {"num_views": 4} for name in ("TPT", "CTPT", "DiffTPT", "TPS", "ZERO", "MTA", "PromptAlign")},
    "CLIPLinearProbe": {"solver": "gradient"},
    "TipAdapter": {"train_keys": True},
    "ProDA": {"num_contexts": 4},
    "PromptSRC": {"template": "a photo of a {}."},
}
OPTIONS["PromptAlign"] |= {"weight": 0.0}
TOLERANCE = 1e-9


class Words:
    """A tokenizer of words, with the start, end and padding ids of one of Hugging Face.

    Args:
        start: ids before the text.
        end: ids after it.
        pad: id after those.
        length: of the rows.
    """

    def __init__(self, start: list[int], end: list[int], pad: int, length: int):
        self.start, self.end, self.pad, self.length, self.ids = start, end, pad, length, {}

    def __call__(self, texts: list[str], context_length: int | None = None) -> Tensor:
        """Ids (texts, length)."""
        length = context_length or self.length
        rows = torch.full((len(texts), length), self.pad)
        for row, text in zip(rows, texts, strict=True):
            words = text.lower().replace(".", " .").split()
            tokens = [*self.start, *(self.ids.setdefault(word, 110 + len(self.ids)) for word in words), *self.end]
            row[: len(tokens)] = torch.tensor(tokens[:length])
        return rows


@functools.cache
def simple_tokenizer(length: int) -> Callable:
    """OpenCLIP's own."""
    return open_clip.tokenizer.SimpleTokenizer(context_length=length)


def tokenizer_of(config: dict) -> Callable:
    """OpenCLIP's own tokenizer, or one that stands in for that of Hugging Face."""
    text = config["text_cfg"]
    name = text.get("hf_tokenizer_name")
    length = text.get("context_length", 77)
    if name is None:
        return simple_tokenizer(length)
    if text.get("tokenizer_kwargs", {}).get("strip_sep_token"):  # BERT's, whose end is made padding
        return Words([101], [], 0, length)
    if "SigLIP" in name:
        return Words([], [1], 0 if "SigLIP2" in name else 1, length)
    if "mt5" in name:
        return Words([], [1], 0, length)
    return Words([0], [2], 1, length)  # RoBERTa, XLM and NLLB


def small(config: dict) -> dict:
    """The configuration with few and narrow blocks."""
    config = copy.deepcopy(config)
    vision, text = config["vision_cfg"], config["text_cfg"]
    config["embed_dim"] = 128  # of which CoCoOp's hidden layer has a sixteenth
    trunk = vision.get("timm_model_name")
    if trunk is not None:
        found = [name for start, name in SMALLEST.items() if trunk.startswith(start)]
        vision["timm_model_name"] = found[0] if found else trunk
        vision["image_size"] = 64 if found else 224 if trunk.startswith("swin") else 32
    elif isinstance(vision["layers"], int):
        vision |= {"layers": 2, "width": 32, "head_width": 16, "image_size": 32, "patch_size": 16}
    else:
        vision |= {"layers": [1, 1, 1, 1], "width": 8, "head_width": 16, "image_size": 64}
    # Without a projection the text is as wide as the image's features.
    text |= {"width": 128 if text.get("proj_type") == "none" else 32, "heads": 2, "layers": 2}
    if "hf_tokenizer_name" in text:
        text["vocab_size"] = WORDS
    if "multimodal_cfg" in config:
        config["multimodal_cfg"] |= {"layers": 1, "width": 32, "heads": 2}
    return config


def is_vit(trunk: str) -> bool:
    """Whether a trunk of timm is a ViT, which can be built small."""
    return timm.model_entrypoint(trunk.partition(".")[0]).__module__.rpartition(".")[2] in VITS


@contextmanager
def small_trunks():
    """Within the context timm creates ViTs with few and narrow blocks."""
    create = timm.create_model
    fixed = ((), ("patch_size",), ("embed_dim", "num_heads", "patch_size"), ("patch_size", "img_size"))
    choices = [{key: value for key, value in SMALL_TRUNK.items() if key not in drop} for drop in fixed]
    choices.append(SMALL_TRUNK | {"num_kv_heads": (1, 2)})

    def create_small(name: str, **options) -> nn.Module:
        options |= SMALL_STEM if name.startswith("vitamin") else {}
        for choice in choices if is_vit(name) else [SMALL_SWIN if name.startswith("swin") else {}]:
            try:
                return create(name, **options, **choice)
            except (TypeError, AssertionError, RuntimeError, ValueError) as error:
                reason = error
        raise AssertionError(f"{name} cannot be built small: {reason}")

    timm.create_model = create_small
    try:
        yield
    finally:
        timm.create_model = create


def construct(config: dict) -> nn.Module:
    """The CLIP of a small configuration, with OpenCLIP's own text tower in the place of one of Hugging Face."""
    config = copy.deepcopy(config)
    foreign = "hf_model_name" in config["text_cfg"]
    if foreign:
        few = {"width": 32, "heads": 2, "layers": 2, "vocab_size": WORDS}
        config["text_cfg"] = few | {"output_tokens": "multimodal_cfg" in config}
    custom = config.pop("custom_text", False) or foreign
    cls = open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP if custom else open_clip.CLIP
    with small_trunks():
        return cls(**config)


def build(config: dict) -> nn.Module:
    """A lively CLIP of a small configuration, in float64."""
    torch.manual_seed(0)
    clip = construct(config).double().eval()
    if "hf_model_name" in config["text_cfg"]:  # only its class matters, which no learner takes
        clip.text = type("HFTextEncoder", (nn.Module,), {})()
    with torch.no_grad():
        for name, parameter in clip.named_parameters():
            if name not in ("logit_scale", "logit_bias"):
                parameter.add_(0.08 * torch.randn_like(parameter))
        for module in clip.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
    return clip


def kind_of(config: dict) -> str:
    """What there is to walk: the modules of a small configuration, its further options, and how texts begin and end."""
    names = ("timm_model_name", "image_size", "hf_model_name", "hf_tokenizer_name", "hf_proj_type", "hf_pooler_type")
    options = [{k: v for k, v in config[part].items() if k not in names} for part in ("vision_cfg", "text_cfg")]
    tokenizer = tokenizer_of(config)
    ends = [getattr(tokenizer, name, None) for name in ("start", "end", "pad")]
    foreign = "hf_model_name" in config["text_cfg"]
    if foreign:  # no learner gets further than to its class
        return "text tower of Hugging Face"
    with torch.device("meta"):
        modules = repr(construct(config))
    return json.dumps([modules, options, ends, config.get("init_logit_bias")], sort_keys=True)


def library_features(learner: Learner, context: Tensor | None) -> Tensor:
    """Unit text features (groups, texts, features) by OpenCLIP's own `encode_text`, of token ids alone.

    Each vector of the context (groups, vectors, width) becomes the embedding of an id that no text has.
    """
    layout, embedding = learner.layout, learner.text.module.token_embedding
    rows = torch.tensor([(*text, *[layout.pad] * (layout.length - len(text))) for text in layout.texts])
    kept = embedding.weight.detach().clone()
    found = []
    for own in [None] if context is None else context:
        ids = rows.clone()
        if own is not None:
            free = sorted(set(range(3, len(kept))) - set(rows.flatten().tolist()))[: len(own)]
            assert max(free) < rows.max() or learner.text.pool != "argmax"
            ids = torch.where(rows < 0, torch.tensor(free)[(-1 - rows).clamp(min=0)], rows)
            embedding.weight.data[free] = own.detach().to(kept)
        found.append(learner.clip.encode_text(ids))
        embedding.weight.data.copy_(kept)
    return F.normalize(torch.stack(found), dim=-1)


def images_of(clip: nn.Module) -> Tensor:
    """Three random images."""
    size = clip.visual.image_size
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 3, *(size if isinstance(size, tuple) else (size, size)), generator=generator).double()


def differs(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors differ by more than rounding."""
    return found.shape != expected.shape or not (found - expected).abs().max() <= TOLERANCE * max(
        1, expected.abs().max()
    )


def examine(learner: Learner, tokenizer: Callable) -> str | None:
    """What is not exact about a learner, or None."""
    x, labels = images_of(learner.clip), torch.tensor([0, 2, 1])
    generator = torch.Generator().manual_seed(2)
    features = F.normalize(torch.randn(8, learner.text.num_features, generator=generator).double(), dim=-1)
    learner.fit_features((features, torch.arange(8) % 4))
    with torch.no_grad():
        for parameter in filter(torch.is_floating_point, learner.trained_state().values()):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))
        learner.eval()
        prompted = getattr(learner, "host", learner)  # DePT has the prompts of another one
        on_images = type(learner) is learners.CoCoOp
        context = prompted.context(features[:2]) if on_images else prompted.context()
        expected = library_features(learner, context)
        for learner.fast_text in (True, False):
            if differs(F.normalize(learner.encode(learner.layout, context), dim=-1), expected):
                return f"text features, {'fast' if learner.fast_text else 'in full'}"
        views = getattr(learner, "num_views", None)
        if learner.frozen_images or (views is not None and learner.adapter_name is None):
            found = Learner.encode_images(learner, x)
            found = found[:, 0] if found.ndim == 3 else found  # PLOT's parts come after the whole image
            if differs(found, learner.clip.encode_image(x, normalize=False)):
                return "image features"
        if type(learner) is learners.ZeroShot:
            texts = tokenizer([f"a photo of a {name}." for name in NAMES])
            clip, bias = learner.clip, getattr(learner.clip, "logit_bias", None)
            cosines = clip.encode_image(x, normalize=True) @ clip.encode_text(texts, normalize=True).T
            if differs(learner(x), clip.logit_scale.exp() * cosines + (0 if bias is None else bias)):
                return "logits of zero-shot"
    seen = x if views is None else torch.stack([x + 0.1 * index for index in range(views)], dim=1)
    by_path = []
    for learner.fast_text in (True, False):
        learner.reset()
        by_path.append(learner(seen).detach())
    if differs(*by_path):
        return "logits, fast against in full"
    learner.fast_text = True
    trained = learner.trainable_parameters()
    if trained:
        learner.train().loss(x, labels)[0].backward()
        if isinstance(learner, InTwoStages):  # each stage trains some of them
            learner.begin_second_stage()
            learner.train().loss(x, labels)[0].backward()
        if dead := [
            name for name, p in learner.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
        ]:
            return f"no gradient for {', '.join(dead)}"
    return None


def verdict(name: str, config: dict, clip: nn.Module | None = None) -> str:
    """ "exact", the sentence of a refusal, or what is wrong; of a copy of the CLIP, where it has been built."""
    clip, tokenizer = build(config) if clip is None else copy.deepcopy(clip), tokenizer_of(config)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(3)
            learner = getattr(learners, name)(clip, tokenizer, NAMES, **OPTIONS.get(name, {}))
            fault = examine(learner, tokenizer)
    except UserError as error:
        return f"refused: {error}"
    except Exception as error:
        return f"WRONG: {type(error).__name__}: {error}"
    return "exact" if fault is None else f"WRONG: {fault}"


def walk(names: list[str], of_learners: list[str], output: Path) -> list[dict]:
    """One row for each configuration, with the verdict of each learner; written as they come."""
    verdicts: dict[str, dict[str, str]] = {}
    rows = []
    for name in names:
        config = small(open_clip.get_model_config(name))
        key = kind_of(config)
        if key not in verdicts:
            clip = build(config)
            verdicts[key] = {learner: verdict(learner, config, clip) for learner in of_learners}
            print(name, dict(Counter(each.split(":")[0] for each in verdicts[key].values())), flush=True)
        rows.append({"configuration": name} | verdicts[key])
        write(output, rows)
    return rows


REASONS = {
    "a ViT of OpenCLIP's own without attention pooling": "no ViT of OpenCLIP's own, or attention pooling",
    "text tower of OpenCLIP's own": "a text tower of Hugging Face",
    "local image features need": "no local image features that are projected as the whole image is",
    "needs sited blocks": "an image tower without sited blocks (ResNet, ConvNeXt, FastViT, Swin)",
    "matches no layer": "no layers called q, k, v",
    "cannot drop inputs": "no dropout in an attention pool",
}


def by_learner(rows: list[dict]) -> list[dict]:
    """One row for each learner: how many configurations it accepts and is exact on, and the others by reason."""
    found = []
    for learner in rows[0]:
        if learner == "configuration":
            continue
        verdicts = [row[learner] for row in rows]
        reasons = Counter(reason_of(verdict) for verdict in verdicts if verdict.startswith("refused"))
        line = {"learner": f"`{learner}`", "exact": sum(verdict == "exact" for verdict in verdicts)}
        line |= {reason: reasons.pop(reason, 0) for reason in REASONS.values()}
        found.append(line | {"refused otherwise": sum(reasons.values()), "wrong": "".join(verdicts).count("WRONG")})
    return found


def reason_of(verdict: str) -> str:
    """Why a learner refuses, in the words of the table."""
    return next((reason for part, reason in REASONS.items() if part in verdict), verdict)


def main() -> None:
    """Walk over what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configurations", nargs="+", default=open_clip.list_models())
    everything = [name for name in learners.__all__ if name != "Learner"]
    parser.add_argument("--learners", nargs="+", default=everything)
    parser.add_argument("--output", type=Path, default=Path("results"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    rows = walk(args.configurations, args.learners, args.output / "clip_configurations.csv")
    text = table(by_learner(rows))
    (args.output / "clip_configurations.md").write_text(text + "\n")
    print(text)
    for row in rows:
        for learner, found in row.items():
            if found.startswith("WRONG") or (found.startswith("refused") and reason_of(found) == found):
                print(row["configuration"], learner, found)


if __name__ == "__main__":
    main()
