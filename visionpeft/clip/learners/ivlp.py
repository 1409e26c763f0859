"""Independent vision-language prompts (IVLP), and prompts in one tower alone: the baselines of MaPLe (2022).

Khattak et al., MaPLe: Multi-modal Prompt Learning, https://arxiv.org/abs/2210.03117.
"""

from collections.abc import Callable, Sequence

import torch.nn as nn

from visionpeft.clip.learners.independent_prompts import IndependentPrompts


class IVLP(IndependentPrompts):
    """Learns prompts in the first blocks of both towers, each tower with its own.

    The text prompt v of block 0 takes the place of the first words of "a photo of a {name}."; those of later blocks
    overwrite the same tokens before their block. Image prompts stand beside the patches. After the last block
    with its own prompts, what came out of them goes on as ordinary tokens.
    Deep language prompting (LP) is `num_visual=0`, VPT on CLIP is `num_text=0`.
    v starts from the words, all others N(0, 0.02^2).
    Trainable, with text width d and image width D: depth_text * num_text * d + depth_visual * num_visual * D; 30,720 on
    ViT-B/16.
    Source: Khattak et al., MaPLe: Multi-modal Prompt Learning, 2022.

    Args:
        clip: an OpenCLIP model; a tower that gets prompts must be a transformer. It gets an adapter named "ivlp".
        tokenizer: its tokenizer.
        class_names: names of the classes.
        num_text: text prompts per block; 0 for none, so that the text features are fixed.
        num_visual: image prompts per block; 0 for none, so that the image features are fixed.
        depth_text: number of text blocks with their own prompts; None for 12, or all blocks of a shallower tower.
        depth_visual: the same for the image tower.
        init: words before the class name, of which the first `num_text` are learned. If they are fewer, or None,
            v starts at random and no fixed words follow.
        allow_duplicates: accept two classes of one name.

    Raises:
        UnsupportedError: a tower that would get prompts is no transformer with sited blocks, such as a ResNet.
        ConfigurationError: no prompts at all, more depth than blocks, a prompt longer than the text tower, or an
            adapter of that name.
    """

    def __init__(
        self,
        clip: nn.Module,
        tokenizer: Callable,
        class_names: Sequence[str],
        num_text: int = 2,
        num_visual: int = 2,
        depth_text: int | None = None,
        depth_visual: int | None = None,
        init: str | None = "a photo of a",
        allow_duplicates: bool = False,
    ):
        own = {"num_text": num_text, "num_visual": num_visual, "depth_text": depth_text, "depth_visual": depth_visual}
        own["init"] = init
        super().__init__(
            clip, tokenizer, class_names, **own, default_depth=12, options=own, allow_duplicates=allow_duplicates
        )
