"""A class for every pixel by the texts of a CLIP, whose last block is computed in another way; nothing is trained."""

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from open_clip.transformer import CustomResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn

from visionpeft.backbones.open_clip import join_heads, project, sites_of
from visionpeft.clip.layout import clean_class_names
from visionpeft.clip.learner import Learner
from visionpeft.clip.local_features import check_local
from visionpeft.clip.model import image_dtype
from visionpeft.clip.text import unit
from visionpeft.errors import ConfigurationError, UnsupportedError
from visionpeft.models.strips import resized

Attention = Literal["query", "query_key", "value", "plain"]
AT_LAYERS = ("q", "k", "v")  # where adapters may act in the last block: what they do elsewhere is left out there


class OpenVocabulary(nn.Module):
    """Logits of texts at every patch: scale cos(W LN(a), t) with a the attention of the last block alone.

    With h = LN_1(x) of all tokens x before the last block and q, k, v = its projections, a is the output projection of
    softmax(q q^T / sqrt(d)) v for each head, without the residual stream and without the MLP, in which CLIP keeps what
    an image is as a whole; LN and W are the last norm and the projection of the tower. So in ClearCLIP. The other ways
    are those it compares: `attention="value"` (MaskCLIP) takes v, "query_key" (SCLIP) the sum of softmax(q q^T) and
    softmax(k k^T), "plain" CLIP's softmax(q k^T), each with `residual` and `mlp` kept. With everything plain the
    features are those that CLIP's own forward gives its patches.

    A model for `predict_masks`, with windows of the size of the tower's images; smaller images are filled up with zeros
    on the right and at the bottom. Adapters of the CLIP act; in the last block those at q, k, v, the output projection
    and the first norm do, as its MLP is not computed, and those that act on its tokens are refused.

    Source: Lan et al., ClearCLIP: Decomposing CLIP Representations for Dense Vision-Language Inference, 2024 (arXiv
    2407.12442); no code of it is here. Its numbers are for images whose shorter side is 336, windows of 224 and a
    stride of 112; of where it has a background class, names of backgrounds and threshold decide several points.

    Args:
        learner: gives the texts, such as `ZeroShot` with several templates, or `CoOp`.
        classes: which names of the learner make which class, such as {"background": ["sky", "wall"], "cat": ["cat"]};
            a pixel has that of its name with the largest probability. One class for each name when absent.
        attention: what the attention of the last block is made of.
        residual: add the residual stream to it.
        mlp: add the MLP branch of what that gives.
        threshold: pixels whose class is less probable are of the first class, the background; 0 for none.
        scale: of the cosines, on which probabilities depend; CLIP's own when absent (ClearCLIP's code takes 50).

    Raises:
        UnsupportedError: the image tower is not one of OpenCLIP's own ViTs, pools by a learned attention, or has a
            single block.
        ConfigurationError: a learner that adapts to test images, classes that are not those of the learner, or a
            threshold that is no probability.
    """

    def __init__(
        self,
        learner: Learner,
        classes: Mapping[str, Sequence[str]] | None = None,
        *,
        attention: Attention = "query",
        residual: bool = False,
        mlp: bool = False,
        threshold: float = 0.0,
        scale: float | None = None,
    ):
        super().__init__()
        check_local(learner.clip)
        visual = learner.clip.visual
        if not isinstance(visual, VisionTransformer) or len(visual.transformer.resblocks) < 2:
            raise UnsupportedError(
                "an OpenVocabulary needs an image tower of OpenCLIP's own with at least two transformer blocks, not "
                f"{type(visual).__name__}"
            )
        if learner.adapts_while_testing:
            raise ConfigurationError(
                f"{type(learner).__name__} adapts to whole test images and cannot classify patches; use ZeroShot, "
                "CoOp or another learner whose texts are fixed"
            )
        if attention not in get_args(Attention):
            raise ConfigurationError(f"attention must be one of {', '.join(get_args(Attention))}, not {attention!r}")
        if not 0 <= threshold < 1 or (scale is not None and scale <= 0):
            raise ConfigurationError(f"threshold {threshold} must be in [0, 1), and scale {scale} positive")
        self.learner = learner
        self.attention, self.residual, self.mlp = attention, residual, mlp
        self.threshold, self.scale = threshold, scale
        self.class_names, owners = _grouped(learner.class_names, classes)
        self.register_buffer("owners", torch.tensor(owners), persistent=False)
        self.eval()

    def coarse_logits(self, images: Tensor) -> Tensor:
        """Logits (batch, names, rows, columns) at the patches of images filled up to the size that the tower takes.

        Raises:
            ConfigurationError: larger images.
        """
        visual = self.learner.clip.visual
        missing = [full - side for full, side in zip(visual.image_size, images.shape[-2:], strict=True)]
        if min(missing) < 0:
            height, width = visual.image_size
            raise ConfigurationError(
                f"images are {images.shape[-2]} x {images.shape[-1]}, and this CLIP takes {height} x {width}; use "
                f"windows (window={min(height, width)}), or create it with force_image_size"
            )
        images = F.pad(images, (0, missing[1], 0, missing[0]))
        self.learner.check_images(images)
        features = self._features(images.to(image_dtype(self.learner.clip)))
        logits = self.learner.classify(unit(features).flatten(0, 1)).unflatten(0, features.shape[:2])
        if self.scale is not None:
            logits = logits * (self.scale / self.learner.scale)
        return logits.transpose(1, 2).unflatten(2, visual.grid_size)

    def shares(self, size: Sequence[int]) -> tuple[float, float]:
        """Which part of the extent of `coarse_logits` an image of this height and width covers."""
        height, width = (side / full for side, full in zip(size, self.learner.clip.visual.image_size, strict=True))
        return height, width

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, names, height, width) of images."""
        size = tuple(images.shape[-2:])
        return resized(self.coarse_logits(images), size, self.shares(size))

    def decide(self, logits: Tensor) -> Tensor:
        """Class indices (batch, height, width) of logits (batch, names, height, width)."""
        probabilities, names = logits.softmax(1).max(1)
        return torch.where(probabilities < self.threshold, 0, self.owners[names])

    def _features(self, images: Tensor) -> Tensor:
        """Features (batch, patches, features) in the space of the texts, of images of the tower's own size."""
        visual = self.learner.clip.visual
        block = visual.transformer.resblocks[-1]
        _check_last(block)
        found = visual.forward_intermediates(
            images,
            indices=[len(visual.transformer.resblocks) - 2],
            stop_early=True,
            intermediates_only=True,
            output_fmt="NLC",
            output_extra_tokens=True,
        )
        x = torch.cat([found["image_intermediates_prefix"][0], found["image_intermediates"][0]], dim=1)
        h = self._attended(block, block.ln_1(x))
        x = x + h if self.residual else h
        if self.mlp:
            x = x + block.ls_2(block.mlp(block.ln_2(x)))
        x = visual.ln_post(x[:, 1:])
        return x if visual.proj is None else x @ visual.proj

    def _attended(self, block: nn.Module, h: Tensor) -> Tensor:
        q, k, v = project(block.attn, h)
        pairs = {"query": [(q, q)], "query_key": [(q, q), (k, k)], "plain": [(q, k)], "value": []}[self.attention]
        if pairs:
            v = sum(F.scaled_dot_product_attention(one, other, v) for one, other in pairs)
        h = join_heads(block.attn, v)
        if isinstance(block, CustomResidualAttentionBlock):
            h = block.ln_attn(h)
        return block.ls_1(h)


def _check_last(block: nn.Module) -> None:
    """Refuse what acts in the last block where it is computed no more.

    Raises:
        UnsupportedError: prompts, prefixes, adapters of tokens.
    """
    sites = sites_of(block.attn)
    tokens = [site for site in (*sites.acting, *sites.branches) if site not in AT_LAYERS]
    if tokens or sites.key_prompts is not None or sites.carriers is not None or sites.asking is not None:
        raise UnsupportedError(
            "what acts on the tokens of the last block cannot act in an OpenVocabulary, which computes its attention "
            "alone; leave out the last block with the method's blocks, such as blocks='0:11' of 12, or use a method at "
            "its weights"
        )


def _grouped(names: Sequence[str], classes: Mapping[str, Sequence[str]] | None) -> tuple[list[str], list[int]]:
    """Names of the classes, and the class of each name."""
    if classes is None:
        return list(names), list(range(len(names)))
    classes = {name: clean_class_names(of_class) for name, of_class in classes.items()}  # as the learner has them
    grouped = [name for of_class in classes.values() for name in of_class]
    if sorted(grouped) != sorted(names):
        missing = sorted(set(names) - set(grouped)) or sorted(set(grouped) - set(names)) or grouped
        raise ConfigurationError(
            f"classes must give each name of the learner one class, and no others; look at {missing[0]!r}"
        )
    owners = {name: index for index, of_class in enumerate(classes.values()) for name in of_class}
    return list(classes), [owners[name] for name in names]
