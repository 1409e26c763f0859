"""nano_clip, the small CLIP whose weights are in the package."""

import json

import open_clip
import torch
from safetensors.torch import load_file

from visionpeft.models.embedded import NANO_CLIPS


def load_nano_clip(name: str = "nano_clip") -> open_clip.CLIP:
    """The model in float32 and evaluation mode; embeddings of words it has never seen are zero.

    Args:
        name: which weights, one of `visionpeft.models.embedded.NANO_CLIPS`.
    """
    folder = NANO_CLIPS[name]
    config = json.loads((folder / "open_clip_config.json").read_text())
    clip = open_clip.CLIP(**config["model_cfg"])
    state = {key: tensor.float() for key, tensor in load_file(folder / "model.safetensors").items()}
    ids = state.pop("token_embedding.ids").long()
    embedding = torch.zeros_like(clip.token_embedding.weight)
    embedding[ids] = state.pop("token_embedding.rows")
    clip.load_state_dict({**state, "token_embedding.weight": embedding})
    open_clip.factory.set_model_preprocess_cfg(clip, config["preprocess_cfg"])
    return clip.eval()
