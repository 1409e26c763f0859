"""Tiny random backbones which between them meet every branch of the supported families.

A freshly built backbone hides errors: LayerScale of 1e-5, zero biases and a head near zero push every effect under the
tolerance of a test. `lively` redraws all parameters so that each of them matters.
"""

import copy
import functools
import io
import math
import pickle
from dataclasses import dataclass, replace

import timm.layers
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from torch import nn

CLASSES = 5
VOCABULARY = 40
CONTEXT = 9


@dataclass(frozen=True)
class Host:
    """A backbone under test.

    Attributes:
        name: shown in the name of a test.
        make: builds it.
        takes: `images`, `text` or `both`.
        size: height and width of the images it is called on.
    """

    name: str
    make: object
    takes: str = "images"
    size: tuple[int, int] = (32, 32)

    def __repr__(self):
        return self.name

    @property
    def towers(self):
        """The towers of the backbone."""
        return {"images": ("visual",), "text": ("text",), "both": ("visual", "text")}[self.takes]

    def build(self, dtype=torch.float32):
        """A fresh model in eval mode, the same at every call."""
        return mould(self, dtype).cast()

    def inputs(self, batch=2, dtype=torch.float32, seed=0):
        """Random inputs: images, token ids, or both."""
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(batch, 3, *self.size, generator=generator, dtype=torch.float64).to(dtype)
        text = torch.randint(1, VOCABULARY - 1, (batch, CONTEXT), generator=generator)
        # the highest id is the end of text, at another place in each row
        text[torch.arange(batch), CONTEXT - 1 - torch.arange(batch) % 4] = VOCABULARY - 1
        return {"images": images, "text": text, "both": (images, text)}[self.takes]

    def run(self, model, inputs):
        """The model's output as one tensor (batch, features)."""
        if self.takes != "both":
            return model(inputs)
        output = model(*inputs)
        return torch.cat(output[:2], dim=-1)

    def head_paths(self):
        """Names of the classification heads, none for CLIP."""
        return () if self.name.startswith("clip") else ("head",)


@functools.cache
def shallow(host, depth):
    """The host with so many blocks: tracing takes time for each of them, and all of them run the same lines."""

    def make():
        model = host.make()
        for part in model.modules():
            for name in ("blocks", "resblocks"):
                if isinstance(getattr(part, name, None), nn.ModuleList | nn.Sequential):
                    setattr(part, name, getattr(part, name)[:depth])
        return model

    return replace(host, make=make)


@functools.cache
def pristine(host):
    """One lively model per host, never attached to."""
    with torch.random.fork_rng():
        torch.manual_seed(len(host.name))
        return lively(host.make()).eval().requires_grad_(True)


class Mould:
    """Makes copies of a module like `copy.deepcopy`, in a fifth of the time: it is pickled once, without its tensors.

    Args:
        module: the module; what is made of it later changes no copy.
    """

    def __init__(self, module):
        self.tensors = {}

        class Pickler(pickle.Pickler):
            def persistent_id(pickler, value):
                if not isinstance(value, torch.Tensor):
                    return None
                self.tensors.setdefault(id(value), (value, value.detach().clone()))
                return id(value)

        file = io.BytesIO()
        Pickler(file, protocol=5).dump(module)
        self.pickled = file.getvalue()

    def cast(self):
        """A copy; tensors that are one in the module are one in it."""
        made = {}

        class Unpickler(pickle.Unpickler):
            def persistent_load(unpickler, key):
                if key not in made:
                    original, values = self.tensors[key]
                    made[key] = values.clone()
                    if isinstance(original, nn.Parameter):
                        made[key] = nn.Parameter(made[key], original.requires_grad)
                return made[key]

        return Unpickler(io.BytesIO(self.pickled)).load()


@functools.cache
def mould(host, dtype):
    """That of a host in a precision."""
    return Mould(copy.deepcopy(pristine(host)).to(dtype))


@torch.no_grad()
def lively(model):
    """Redraw every parameter so that none is without effect."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape)
        module = model.get_submodule(name.rpartition(".")[0])
        last = name.rpartition(".")[2]
        if "gamma" in last or "head_scale" in last or ("Norm" in type(module).__name__ and last == "weight"):
            parameter.copy_(1 + 0.2 * noise)
        elif last in ("logit_scale", "freqs"):
            continue
        elif (isinstance(module, nn.Linear | nn.Conv2d) and last == "weight") or last == "in_proj_weight":
            parameter.copy_(noise / math.sqrt(parameter[0].numel()))
        elif last in ("proj", "text_projection"):
            parameter.copy_(noise / math.sqrt(parameter.shape[0]))
        else:
            parameter.copy_(0.3 * noise)
    return model


def vit(**options):
    """A timm VisionTransformer of 16 patches."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4, "mlp_ratio": 2.0}
    return VisionTransformer(**(sizes | {"num_classes": CLASSES} | options))


def eva(**options):
    """A timm Eva of 16 patches."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4, "mlp_ratio": 2.0}
    return Eva(**(sizes | {"num_classes": CLASSES, "use_rot_pos_emb": True} | options))


def beit():
    """A BEiT with relative positions of its own in each block and shared ones."""
    return Beit(
        img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=4, mlp_ratio=2.0, num_classes=CLASSES,
        init_values=0.1, use_abs_pos_emb=False, use_rel_pos_bias=True, use_shared_rel_pos_bias=True,
    )  # fmt: skip


def clip_configurations(**vision):
    """Vision and text configurations of a small CLIP."""
    images = {"layers": 3, "width": 32, "head_width": 8, "mlp_ratio": 2.0, "patch_size": 8, "image_size": 32}
    text = {"context_length": CONTEXT, "vocab_size": VOCABULARY, "width": 24, "heads": 3, "layers": 3, "mlp_ratio": 2.0}
    return images | vision, text


def clip(text_options=None, custom_text=False, **vision):
    """An OpenCLIP model with both towers."""
    images, text = clip_configurations(**vision)
    kind = CustomTextCLIP if custom_text else CLIP
    return kind(16, CLIPVisionCfg(**images), CLIPTextCfg(**(text | (text_options or {}))), quick_gelu=not custom_text)


CUSTOM_ATTENTION = {
    "qk_norm": True, "scale_heads": True, "scale_attn_inner": True, "scale_attn": True, "scale_fc": True,
}  # fmt: skip


def clip_with_trunk():
    """A CustomTextCLIP with a timm trunk (attention pooling) and a bidirectional text tower, as SigLIP has."""
    text = {"no_causal_mask": True, "pool_type": "last", "proj_bias": True}
    model = clip(text, custom_text=True, timm_model_name="test_vit", timm_pool="", timm_proj="linear", layers=0)
    model.visual.trunk = vit(class_token=False, global_pool="map", num_classes=0)
    model.visual.head.proj = nn.Linear(32, 16, bias=False)
    return model


HOSTS = [
    Host("vit_cls", vit),
    Host("vit_registers", functools.partial(vit, reg_tokens=2, no_embed_class=True, init_values=1e-5)),
    Host("vit_avg", functools.partial(vit, global_pool="avg")),
    Host("vit_map", functools.partial(vit, global_pool="map", class_token=False, act_layer="gelu_tanh")),
    Host("vit_pre_norm", functools.partial(vit, pre_norm=True, act_layer="quick_gelu", norm_layer=nn.LayerNorm)),
    Host("vit_qk_norm", functools.partial(vit, qk_norm=True, scale_attn_norm=True, scale_mlp_norm=True)),
    Host("vit_swiglu", functools.partial(vit, mlp_layer=timm.layers.SwiGLUPacked, init_values=1e-5, reg_tokens=1)),
    Host("vit_res_post", functools.partial(vit, block_fn=ResPostBlock, init_values=1e-5)),
    Host("vit_dynamic", functools.partial(vit, dynamic_img_size=True), size=(40, 24)),
    Host("beit", beit),
    Host("eva_fused", functools.partial(eva, swiglu_mlp=True, ref_feat_shape=(4, 4))),
    Host(
        "eva_split",
        functools.partial(
            eva, swiglu_mlp=True, qkv_fused=False, scale_mlp=True, scale_attn_inner=True, global_pool="token"
        ),
    ),
    Host("eva_post_norm", functools.partial(eva, use_post_norm=True, swiglu_mlp=True)),
    Host(
        "eva_rope_mixed",
        functools.partial(
            eva, attn_type="rope", rope_type="mixed", use_abs_pos_emb=False, global_pool="map",
            use_pre_transformer_norm=True, init_values=1e-5,
        ),
    ),
    Host(
        "dinov3",
        functools.partial(
            eva, dynamic_img_size=True, qkv_bias=False, init_values=1e-5, rope_type="dinov3", rope_temperature=100,
            rope_rotate_half=True, use_abs_pos_emb=False, num_reg_tokens=4, use_fc_norm=False,
        ),
        size=(32, 24),
    ),
    Host(
        "eva_grouped",
        functools.partial(
            eva, attn_type="rope", qkv_fused=False, num_kv_heads=2, qk_norm=True, attn_only_layer_scale=True,
            init_values=1e-5,
        ),
    ),
    Host("clip_whole", clip, takes="both"),
    Host("clip_visual", lambda: clip(ls_init_value=1e-5, pool_type="avg", final_ln_after_pool=True).visual),
    Host("clip_custom", lambda: clip(dict(CUSTOM_ATTENTION), **CUSTOM_ATTENTION), takes="both"),
    Host("clip_text", lambda: clip(custom_text=True).text, takes="text"),
    Host("clip_trunk", clip_with_trunk, takes="both"),
]  # fmt: skip
