"""Features of the parts of an image, in the space of the texts: of every patch, or place of a ResNet's last grid."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from open_clip.modified_resnet import AttentionPool2d, ModifiedResNet
from open_clip.transformer import VisionTransformer

from visionpeft.errors import UnsupportedError


def check_local(clip: nn.Module) -> None:
    """Refuse an image tower whose parts have no features of their own in the space of the texts.

    Raises:
        UnsupportedError: it is no ResNet or ViT of OpenCLIP's own, or pools by a learned attention.
    """
    visual = clip.visual
    if isinstance(visual, ModifiedResNet) and isinstance(visual.attnpool, AttentionPool2d):
        return
    if isinstance(visual, VisionTransformer) and visual.attn_pool is None and visual.pool_type in ("tok", "avg"):
        return
    raise UnsupportedError(
        f"local image features need a ResNet or ViT of OpenCLIP's own whose parts are projected as the whole image is, "
        f"not {type(visual).__name__}" + (" with attention pooling" if isinstance(visual, VisionTransformer) else "")
    )


def with_local_features(clip: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Features (batch, 1 + parts, features), not normalised: of the images (batch, 3, height, width), then their parts.

    A ViT's patches pass the last norm and the projection as the class token does; of a ResNet all outputs of the
    attention pool are taken, of which the first is the image's.
    """
    visual = clip.visual
    if isinstance(visual, ModifiedResNet):
        maps: list[torch.Tensor] = []
        hook = visual.attnpool.register_forward_pre_hook(lambda module, inputs: maps.append(inputs[0]))
        try:
            clip.encode_image(images)
        finally:
            hook.remove()
        return _all_outputs(visual.attnpool, maps[0])
    before = visual.output_tokens
    visual.output_tokens = True
    try:
        pooled, tokens = visual(images)
    finally:
        visual.output_tokens = before
    if visual.final_ln_after_pool:
        tokens = visual.ln_post(tokens)
    if visual.proj is not None:
        tokens = tokens @ visual.proj
    return torch.cat((pooled[:, None], tokens), dim=1)


def _all_outputs(pool: AttentionPool2d, grid: torch.Tensor) -> torch.Tensor:
    """What the attention pool gives (batch, 1 + places, features) of a grid (batch, channels, height, width)."""
    places = grid.flatten(2).permute(2, 0, 1)
    places = torch.cat((places.mean(dim=0, keepdim=True), places))
    places = places + pool.positional_embedding[:, None].to(places.dtype)
    outputs, _ = F.multi_head_attention_forward(
        *(places, places, places),
        embed_dim_to_check=places.shape[-1],
        num_heads=pool.num_heads,
        in_proj_weight=None,
        in_proj_bias=torch.cat((pool.q_proj.bias, pool.k_proj.bias, pool.v_proj.bias)),
        bias_k=None,
        bias_v=None,
        add_zero_attn=False,
        dropout_p=0.0,
        out_proj_weight=pool.c_proj.weight,
        out_proj_bias=pool.c_proj.bias,
        training=False,
        need_weights=False,
        use_separate_proj_weight=True,
        q_proj_weight=pool.q_proj.weight,
        k_proj_weight=pool.k_proj.weight,
        v_proj_weight=pool.v_proj.weight,
    )
    return outputs.transpose(0, 1)
