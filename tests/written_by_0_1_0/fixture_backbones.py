"""The backbones of the fixtures, with the weights in `backbones/`, whatever a random generator would draw now."""

import json
from pathlib import Path

import open_clip
import torch
from safetensors.torch import load_file

import visionpeft as vp

FOLDER = Path(__file__).parent
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "mlp_ratio": 2.0}
CLIP_NAME = "open_clip/fixture_clip"
CLASS_NAMES = ["red kite", "buzzard", "heron"]

open_clip.add_model_config(FOLDER / "clip_configs")


def weights(name):
    """Stored in bfloat16, to which they were rounded before anything was trained on them; used in float32."""
    return {
        key: value.float() if value.is_floating_point() else value
        for key, value in load_file(FOLDER / "backbones" / f"{name}.safetensors").items()
    }


def build_vit():
    """A timm ViT of two blocks with five classes."""
    model = vp.create_backbone("vit_tiny_patch16_224", pretrained=False, num_classes=5, **VIT)
    model.load_state_dict(weights("vit"))
    return model.eval()


def build_clip():
    """An OpenCLIP model and its tokenizer; only the tokens that the fixtures need have an embedding, others zero."""
    clip, tokenizer = vp.create_clip(CLIP_NAME, pretrained=False)
    state = weights("clip")
    embedding = torch.zeros_like(clip.token_embedding.weight)
    embedding[state.pop("token_embedding.ids")] = state.pop("token_embedding.rows")
    clip.load_state_dict(state | {"token_embedding.weight": embedding})
    return clip.eval(), tokenizer


def build_clip_visual():
    """The image tower of that CLIP with a head for five classes, as `create_backbone` makes it."""
    model = vp.create_backbone(CLIP_NAME, pretrained=False, num_classes=5)
    state = {key: value for key, value in weights("clip").items() if key.startswith("visual.") and key != "visual.proj"}
    generator = torch.Generator().manual_seed(11)
    state["head.weight"] = 0.1 * torch.randn(model.head.weight.shape, generator=generator)
    state["head.bias"] = torch.zeros_like(model.head.bias)
    model.load_state_dict(state)
    return model.eval()


@torch.no_grad()
def clip_outputs(clip, images, tokens):
    """Unit image features and unit text features side by side, (batch, 2 * 16)."""
    return torch.cat(clip(images, tokens)[:2], dim=-1)


def recipe(folder):
    """What `recipe.json` says of a fixture."""
    return json.loads((Path(folder) / "recipe.json").read_text())
