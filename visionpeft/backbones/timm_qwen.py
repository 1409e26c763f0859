"""timm's vision towers of Qwen3-VL: patches with learned and rotary positions, timm's `EvaBlock`, and a merger.

The merger, which joins 2 x 2 patches for a language model, is made of layers outside the blocks.
"""

import torch.nn as nn
from timm.models.qwen3_vit import Qwen3VitClassifier, Qwen3VitEncoder

from visionpeft.backbones.dispatch import architecture, describe_block, describe_model, norm_layers
from visionpeft.backbones.layer import Layer
from visionpeft.backbones.tower import Backbone, Tower


@describe_model.register
def _(model: Qwen3VitEncoder) -> Backbone:
    return Backbone("timm", architecture(model), model, {"visual": _tower(model, "", model)})


@describe_model.register
def _(model: Qwen3VitClassifier) -> Backbone:
    heads = () if isinstance(model.head, nn.Identity) else ("head",)
    return Backbone("timm", architecture(model), model, {"visual": _tower(model.encoder, "encoder", model)}, heads)


def _tower(encoder: Qwen3VitEncoder, path: str, model: nn.Module) -> Tower:
    layers = {"patch_embed": Layer("patch_embed", "conv", encoder.patch_embed.proj)}
    merger, final = encoder.merger, ()
    if merger is not None:
        layers |= norm_layers(merger_norm=merger.norm) | {"merger_fc1": Layer("merger_fc1", "linear", merger.fc1)}
        if isinstance(merger.fc2, nn.Linear):
            layers["merger_fc2"] = Layer("merger_fc2", "linear", merger.fc2)
        final = ("merger_norm",)
    return Tower(
        name="visual",
        path=path,
        module=encoder,
        blocks=[describe_block(block) for block in encoder.blocks],
        common_width=encoder.embed_dim,
        num_prefix_tokens=0,
        layers=layers,
        patch_size=tuple(encoder.patch_embed.patch_size),
        spanning=tuple(dict.fromkeys((encoder, model))),
        final_norms=final,
    )
