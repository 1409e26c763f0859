"""timm `NaFlexVit`: SigLIP 2 NaFlex, C-RADIO and others, whose blocks are timm's `Block` or `EvaBlock`.

They take images of any size, also several sizes in one batch as a dictionary of patches with a mask of the valid ones.
"""

import torch.nn as nn
from timm.models.naflexvit import NaFlexVit

from visionpeft.backbones.dispatch import architecture, describe_block, describe_model, norm_layers
from visionpeft.backbones.layer import Layer
from visionpeft.backbones.tower import Backbone, Tower


@describe_model.register
def _(model: NaFlexVit) -> Backbone:
    projection = model.embeds.proj
    patch_embed = Layer(
        "patch_embed",
        "linear" if isinstance(projection, nn.Linear) else "conv",
        projection,
        # Patches of another size are multiplied with a resampled weight, without a call of the layer.
        changed="always" if model.embeds.enable_patch_interpolator else "never",
        overwritten=True,  # positions are added in place
    )
    tower = Tower(
        name="visual",
        path="",
        module=model,
        blocks=[describe_block(block) for block in model.blocks],
        common_width=model.embed_dim,
        num_prefix_tokens=model.num_prefix_tokens,
        layers={"patch_embed": patch_embed}
        | norm_layers(norm_pre=model.norm_pre, norm=model.norm, fc_norm=model.fc_norm),
        patch_size=tuple(model.embeds.patch_size),
        spanning=(model,),
        excluded=("head.",),
        pools_class_token=model.global_pool == "token" and model.attn_pool is None,
        class_token=model.embeds.cls_token is not None,
        masks_padding=True,
    )
    heads = () if isinstance(model.head, nn.Identity) else ("head",)
    return Backbone("timm", architecture(model), model, {"visual": tower}, heads)
