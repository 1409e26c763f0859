"""CLIP-LoRA: Low-Rank Few-Shot Adaptation of Vision-Language Models (Zanella and Ben Ayed, 2024).

https://arxiv.org/abs/2405.18541
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn as nn

from visionpeft.clip.layout import Tokens
from visionpeft.clip.learner import Learner
from visionpeft.clip.templates import PHOTO, check_templates, fill
from visionpeft.errors import ConfigurationError
from visionpeft.methods.lora import LoRA
from visionpeft.methods.parts.addressing import Blocks


class CLIPLoRA(Learner):
    """Low-rank changes of q, k and v in both towers: W + (alpha / sqrt(rank)) B A; the prompt is a fixed template.

    A is Kaiming-uniform with a = sqrt(5), B is zero: at the start it is the CLIP with this template.
    Trainable, with text width d and image width D: 3 * rank * (text blocks * 2 d + image blocks * 2 D); 184,320 on
    ViT-B/16.
    Source: Zanella and Ben Ayed, Low-Rank Few-Shot Adaptation of Vision-Language Models, 2024.

    Args:
        clip: an OpenCLIP model; the towers named must be transformers. It gets an adapter named "cliplora".
        tokenizer: its tokenizer.
        class_names: names of the classes.
        rank: rank of the changes.
        alpha: numerator of the scale alpha / sqrt(rank).
        dropout: dropout on the input of A.
        targets: which matrices, out of q k v proj fc1 fc2.
        towers: which towers, "visual" or "text" or both.
        blocks: which blocks, such as "all", "last:4", "3:9" or a list of indices.
        template: the prompt, with {} for the class name. The authors use this one for every data set.
        allow_duplicates: accept two classes of one name.

    Raises:
        UnsupportedError: dropout with an image tower whose weights are changed as they are read: of CLIP's ResNets,
            where q, k and v are those of the attention pool.
        ConfigurationError: towers, blocks or targets that do not exist, a prompt longer than the text tower, or an
            adapter of that name.
    """

    adapter_name = "cliplora"

    def __init__(
        self,
        clip: nn.Module,
        tokenizer: Callable,
        class_names: Sequence[str],
        rank: int = 2,
        alpha: float = 1.0,
        dropout: float = 0.25,
        targets: Sequence[str] = ("q", "k", "v"),
        towers: Sequence[str] = ("visual", "text"),
        blocks: Blocks = "all",
        template: str | list[str] = PHOTO,
        allow_duplicates: bool = False,
    ):
        targets, towers = ([each] if isinstance(each, str) else list(each) for each in (targets, towers))
        options = {"rank": rank, "alpha": alpha, "dropout": dropout, "targets": targets, "towers": towers}
        options |= {"blocks": blocks, "template": template}
        super().__init__(clip, tokenizer, class_names, options=options, allow_duplicates=allow_duplicates)
        templates = check_templates(template)
        if len(templates) > 1:
            raise ConfigurationError(f"CLIP-LoRA trains with one template, not with {len(templates)}")
        (self.template,) = templates
        self.towers = tuple(dict.fromkeys(towers))
        if not self.towers or not set(self.towers) <= {"visual", "text"}:
            raise ConfigurationError(f"towers must be 'visual' or 'text' or both, not {towers}")
        if not isinstance(rank, int) or rank < 1:
            raise ConfigurationError(f"rank must be a positive integer, not {rank!r}")
        self.set_class_names(class_names)
        method = LoRA(
            rank=rank,
            alpha=alpha * math.sqrt(rank),
            targets=tuple(targets),
            dropout=dropout,
            blocks=blocks,
            towers=list(self.towers),
        )
        self.frozen_images = "visual" not in self.towers
        self.adapt(method)

    def prompts(self, names: Sequence[str]) -> list[Tokens]:
        """The template with each name."""
        return self.tokenizer.contents(fill(self.template, name) for name in names)

    def text_features(self) -> torch.Tensor:
        """Unit text features (classes, features)."""
        return super().text_features() if "text" in self.towers else self.kept("text", self.encode_text)
