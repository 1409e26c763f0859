"""nano_clip, the small CLIP whose weights are in the package."""

import json
from pathlib import Path

import open_clip
import torch
from safetensors.torch import load_file

NANO_CLIP = Path(__file__).parent.parent / "weights" / "nano_clip"


def load_nano_clip() -> open_clip.CLIP:
    """The model in float32 and evaluation mode; embeddings of words it has never seen are zero."""
    config = json.loads((NANO_CLIP / "open_clip_config.json").read_text())
    clip = open_clip.CLIP(**config["model_cfg"])
    state = {name: tensor.float() for name, tensor in load_file(NANO_CLIP / "model.safetensors").items()}
    ids = state.pop("token_embedding.ids").long()
    embedding = torch.zeros_like(clip.token_embedding.weight)
    embedding[ids] = state.pop("token_embedding.rows")
    clip.load_state_dict({**state, "token_embedding.weight": embedding})
    open_clip.factory.set_model_preprocess_cfg(clip, config["preprocess_cfg"])
    return clip.eval()
