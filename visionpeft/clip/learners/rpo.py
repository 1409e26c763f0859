"""RPO: Read-only Prompt Optimization for Vision-Language Few-shot Learning (Lee et al., 2023), arXiv 2308.14960."""

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from visionpeft.clip.layout import Tokens
from visionpeft.clip.learner import Learner
from visionpeft.clip.model import image_dtype
from visionpeft.clip.read_only import KeysAndValues, check_readable, image_tokens, ordinary, read, text_keys
from visionpeft.clip.templates import PHOTO, check_templates, fill
from visionpeft.clip.text import unit
from visionpeft.errors import ConfigurationError, UnsupportedError

NOISE = 0.1


class RPO(Learner):
    """Learns pairs of tokens that read the frozen towers and that nothing reads: logits_k = scale mean_i f_i t_ki.

    Of pair i, the text token p_i attends to the tokens of each class's template up to the end token, and the image
    token u_i to the class token and the patches; neither attends to other pairs nor to itself. f_i and t_ki are what
    comes out of the last blocks, through the last norms and the projections, at length 1. p_i has no position; u_i
    passes the norm before the blocks. p_i starts at the embedding of the end token and u_i at that of the class token,
    each with noise of length 0.1 in a direction of its own.

    The towers' own tokens are those of the frozen CLIP, exactly. They run without a gradient, those of the texts once
    for all steps, and only their keys and values are kept; see `read_only`. `chunk_size` runs the text tokens of so
    many classes at a time, and again for the gradient. The features of all pairs, one after the other, are the features
    of this learner: (batch, pairs * e) and (classes, pairs * e), at length 1.
    Trainable, with text width d and image width D: num_pairs * (d + D); 30,720 on ViT-B/16.
    Source: Lee et al., Read-only Prompt Optimization for Vision-Language Few-shot Learning, 2023. In the authors' code
    the sizes of ViT-B/16 are constants, and all tokens run under a mask for each class.

    Args:
        clip: an OpenCLIP model whose image tower is a ViT of OpenCLIP's own, without adapters that act.
        tokenizer: its tokenizer.
        class_names: names of the classes.
        num_pairs: number of pairs.
        template: the prompt, with {} for the class name; None is the data set's own in a run, and "a photo of a {}."
            otherwise.
        allow_duplicates: accept two classes of one name.

    Raises:
        UnsupportedError: towers whose own tokens cannot be run apart, or adapters act on the CLIP.
        ConfigurationError: no pairs, several templates, or a text longer than the text tower reads.
    """

    frozen_images = False
    compares_pairs = True

    def __init__(
        self,
        clip: nn.Module,
        tokenizer: Callable,
        class_names: Sequence[str],
        num_pairs: int = 24,
        template: str | list[str] | None = None,
        allow_duplicates: bool = False,
    ):
        if not isinstance(num_pairs, int) or num_pairs < 1:
            raise ConfigurationError(f"num_pairs must be an integer of at least 1, not {num_pairs!r}")
        super().__init__(
            clip,
            tokenizer,
            class_names,
            options={"num_pairs": num_pairs, "template": template},
            templates=_one(PHOTO if template is None else template),
            allow_duplicates=allow_duplicates,
        )
        self.causal = check_readable(clip, self.text.module)
        if self.acting:
            raise UnsupportedError(
                "RPO runs the towers as they were trained and keeps their keys, and adapters act on this CLIP; take "
                "them off (visionpeft.detach) or merge them (visionpeft.merge)"
            )
        self.set_class_names(class_names)
        dtype = torch.float64 if self.text.dtype == torch.float64 else torch.float32
        starts = self.text.embed([self.tokenizer.end])[0], clip.visual.class_embedding.detach()
        self.text_tokens, self.image_tokens = (
            nn.Parameter(start.to(dtype) + NOISE * F.normalize(torch.randn(num_pairs, len(start)), dim=-1).to(start))
            for start in starts
        )

    def set_template(self, template: str | Sequence[str]) -> None:
        """Use the template of a data set where none was given.

        Raises:
            ConfigurationError: several templates, one without {}, or one that makes a text too long; nothing is
                changed.
        """
        super().set_template(_one(template))

    # Images

    def run_image_tower(self, images: torch.Tensor) -> torch.Tensor:
        """What the pairs read in images that have been checked, (batch, pairs * e), each at length 1."""
        return self._read_images(self._image_keys(images))

    def _image_keys(self, images: torch.Tensor) -> Iterable[KeysAndValues]:
        visual = self.clip.visual
        with torch.no_grad():
            x = image_tokens(visual, images)
        return ordinary(visual.transformer.resblocks, x, causal=False)

    def _read_images(self, keys_and_values: Iterable[KeysAndValues]) -> torch.Tensor:
        visual = self.clip.visual
        tokens = visual.ln_pre(self.image_tokens.to(image_dtype(self.clip))[None])
        x = visual.ln_post(read(visual.transformer.resblocks, tokens, keys_and_values))
        return unit(x if visual.proj is None else x @ visual.proj).flatten(1)

    @torch.no_grad()
    def image_keys(self, images: torch.Tensor) -> torch.Tensor:
        """Keys and values (batch, blocks, 2, heads, tokens, head width), with which `loss` needs no images again.

        They are large: 14 MiB for an image on ViT-B/16 in float32.

        Raises:
            ConfigurationError: images that the tower does not take, or other adapters act.
        """
        self.check_images(images)
        pairs = self._image_keys(images.to(image_dtype(self.clip)))
        return torch.stack([torch.stack(pair, dim=1) for pair in pairs], dim=1)

    # Texts

    def prompts(self, names: Sequence[str]) -> list[Tokens]:
        """The template with each name."""
        return self.tokenizer.contents(fill(self.templates[0], name) for name in names)

    def encode_text(self) -> torch.Tensor:
        """Unit text features (classes, pairs * e), computed anew from the kept keys of the templates."""
        self.check_acting()
        text = self.text
        (layout,) = self.frozen_layouts
        visible, keys_and_values = self.kept(
            "keys", lambda: text_keys(text.module, layout, text.dtype, self.causal, self.fast_text)
        )

        def run(visible: torch.Tensor, *keys_and_values: torch.Tensor) -> torch.Tensor:
            pairs = zip(keys_and_values[::2], keys_and_values[1::2], strict=True)
            x = read(text.blocks, self.text_tokens.to(text.dtype)[None], pairs, visible)
            return unit(text.to_features(text.module.ln_final(x))).flatten(1)

        tensors = (visible, *(tensor for pair in keys_and_values for tensor in pair))
        parts = list(zip(*(tensor.split(self.chunk_size or len(layout)) for tensor in tensors), strict=True))
        if len(parts) == 1 or not torch.is_grad_enabled():
            return unit(torch.cat([run(*part) for part in parts]))
        return unit(torch.cat([checkpoint(run, *part, use_reentrant=False) for part in parts]))

    def loss(
        self, images: torch.Tensor | None, labels: torch.Tensor, features: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy and logits (batch, classes).

        Args:
            images: (batch, 3, height, width); may be None if `features` are given.
            labels: (batch,).
            features: what `image_keys` gives of the images, if it has been kept.

        Raises:
            ConfigurationError: features of another shape, or as `encode_images`.
        """
        if features is None:
            own = self.image_features(images)
        else:
            if features.ndim != 6:
                raise ConfigurationError(
                    "RPO learns from what its image_keys gives, (batch, blocks, 2, heads, tokens, head width), not "
                    f"from features {tuple(features.shape)}"
                )
            own = unit(self._read_images(pair.unbind(1) for pair in features.unbind(1)))
        logits = self.classify(own)
        return self.class_loss(logits, labels), logits


def _one(template: str | Sequence[str]) -> tuple[str, ...]:
    templates = check_templates(template)
    if len(templates) > 1:
        raise ConfigurationError(f"RPO reads one template, not {len(templates)}")
    return templates
