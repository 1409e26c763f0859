"""MaPLe: Multi-modal Prompt Learning (Khattak et al., 2022), https://arxiv.org/abs/2210.03117."""

from collections.abc import Callable, Sequence

import torch
import torch.nn as nn

from visionpeft.clip.layout import Tokens
from visionpeft.clip.learner import Learner
from visionpeft.clip.phrase import Phrase, depth_within
from visionpeft.errors import ConfigurationError
from visionpeft.methods.parts.coupled_prompts import CoupledPrompts


class MaPLe(Learner):
    """Learns text prompts p_i of the first blocks, from which linear maps make the image prompts: W_i p_i + b_i.

    p_0 takes the place of the first words of "a photo of a {name}."; p_i of a later block overwrites the same tokens
    before that block. Image prompts stand beside the patches. After block `depth` - 1, what came out of the last
    prompts goes on as ordinary tokens.
    p_0 starts from the words, all others N(0, 0.02^2); see `CoupledPrompts` for the linear maps.
    Trainable, with text width d and image width D: depth * (num_tokens * d + d * D + D); 3,555,072 on ViT-B/16.
    Source: Khattak et al., MaPLe: Multi-modal Prompt Learning, 2022.

    Args:
        clip: an OpenCLIP model whose towers are transformers. It gets an adapter named "maple".
        tokenizer: its tokenizer.
        class_names: names of the classes.
        num_tokens: prompts per block in each tower.
        depth: number of blocks with prompts of their own; None for 9, or all blocks of a shallower tower.
        init: words before the class name, of which the first `num_tokens` are learned. If they are fewer, or None,
            p_0 starts at random and no fixed words follow.
        allow_duplicates: accept two classes of one name.

    Raises:
        UnsupportedError: a tower is no transformer with sited blocks, such as a ResNet.
        ConfigurationError: more depth than blocks, a prompt longer than the text tower, or an adapter of that name.
    """

    frozen_images = False
    adapter_name = "maple"
    default_depth = 9

    def __init__(
        self,
        clip: nn.Module,
        tokenizer: Callable,
        class_names: Sequence[str],
        num_tokens: int = 2,
        depth: int | None = None,
        init: str | None = "a photo of a",
        allow_duplicates: bool = False,
    ):
        options = {"num_tokens": num_tokens, "depth": depth, "init": init}
        super().__init__(clip, tokenizer, class_names, options=options, allow_duplicates=allow_duplicates)
        if num_tokens == 0:
            raise ConfigurationError("MaPLe needs num_tokens of at least 1")
        self.phrase = Phrase(self, num_tokens, init)
        self.set_class_names(class_names)
        self.depth = depth_within(self, depth, self.default_depth, "text", "visual")
        self.adapt(CoupledPrompts(num_tokens, self.depth, text_start=len(self.tokenizer.start)))
        if not self.phrase.random:
            with torch.no_grad():
                self.context()[0].copy_(self.phrase.vectors())

    def prompts(self, names: Sequence[str]) -> list[Tokens]:
        """[p_0, further words of `init`, name, "."]."""
        return self.phrase.prompts(names)

    def context(self) -> torch.Tensor:
        """The text prompt of block 0, (1, num_tokens, width)."""
        return self.clip.peft[self.adapter_name].get_parameter("coupled_prompts.text.context.prompts")[None]
