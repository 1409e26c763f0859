"""PLOT++: several text prompts matched with several image prompts by optimal transport (Chen et al., 2023).

https://arxiv.org/abs/2210.01253
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn as nn

from visionpeft.clip.layout import Tokens
from visionpeft.clip.learner import Learner
from visionpeft.clip.learners.coop import context_prompts
from visionpeft.clip.learners.plot import transport
from visionpeft.clip.stages import InTwoStages, check_share
from visionpeft.clip.text import unit
from visionpeft.errors import ConfigurationError
from visionpeft.methods.parts.prompt_sets import PromptSets

PHRASES = ("a photo of a", "this is a photo", "one picture of a", "an image of a")


class PLOTPlusPlus(InTwoStages, Learner):
    """PLOT for ViTs: each image is seen with several sets of prompts, and their features are matched with the contexts.

    With unit image features f_m, one for each set of prompts (see `PromptSets`), unit text features t_kn of class k
    with context n, and S_mn = f_m t_kn, logits_k = scale sum_mn T_mn S_mn with T of `PLOT`. The image tower runs once
    for each set. The contexts stand before the name and are shared by all classes; they start at phrases of the kind of
    "a photo of a" (M = 4 tokens; where a tokenizer reads more, at the last M of each, with M those of the shortest),
    those after the fourth at N(0, 0.02^2). In the first stage the image prompts learn alone, in the second both.
    Trainable, with text width d and image width D: num_contexts * M * d + num_sets * num_visual * D; 14,336 on
    ViT-B/16.
    Source: Chen et al., PLOT: Prompt Learning with Optimal Transport for Vision-Language Models, 2023, the variant of
    its repository. The phrases are ours, and so is that the stages are parts of one run; the authors train the image
    prompts in a run before, with the logits of the mean image and mean text feature added.

    Args:
        clip: an OpenCLIP model whose image tower is a transformer. It gets an adapter named "plot_plus_plus".
        tokenizer: its tokenizer.
        class_names: names of the classes.
        num_contexts: number of contexts.
        num_sets: number of sets of image prompts.
        num_visual: image prompts of each set.
        epsilon: how far the transport is spread out; positive.
        first_stage: share of the epochs in which the image prompts learn alone.
        allow_duplicates: accept two classes of one name.

    Raises:
        UnsupportedError: the image tower is no transformer with sited blocks, such as a ResNet.
        ConfigurationError: a number out of range, a prompt longer than the text tower, or an adapter of that name.
    """

    frozen_images = False
    adapter_name = "plot_plus_plus"

    def __init__(
        self,
        clip: nn.Module,
        tokenizer: Callable,
        class_names: Sequence[str],
        num_contexts: int = 4,
        num_sets: int = 4,
        num_visual: int = 2,
        epsilon: float = 0.1,
        first_stage: float = 0.5,
        allow_duplicates: bool = False,
    ):
        if not isinstance(num_contexts, int) or num_contexts < 1 or not 0 < epsilon < math.inf:
            raise ConfigurationError(
                f"num_contexts must be an integer of at least 1 and epsilon positive, not {num_contexts} and {epsilon}"
            )
        check_share(first_stage)
        options = {"num_contexts": num_contexts, "num_sets": num_sets, "num_visual": num_visual}
        options |= {"epsilon": epsilon, "first_stage": first_stage}
        super().__init__(clip, tokenizer, class_names, options=options, allow_duplicates=allow_duplicates)
        self.keep_stage(first_stage)
        self.epsilon, self.num_sets = epsilon, num_sets
        phrases = self.tokenizer.contents(PHRASES)
        self.context_length = min(map(len, phrases))
        self.set_class_names(class_names)
        dtype = torch.float64 if self.text.dtype == torch.float64 else torch.float32
        vectors = torch.randn(num_contexts, self.context_length, self.text.width, dtype=dtype).to(self.text.device)
        vectors *= 0.02
        for index, phrase in enumerate(phrases[:num_contexts]):
            vectors[index] = self.text.embed(phrase[-self.context_length :]).to(dtype)
        self.vectors = nn.Parameter(vectors)
        self.adapt(PromptSets(num_sets, num_visual))
        if first_stage == 0:
            self.begin_second_stage()

    def prompts(self, names: Sequence[str]) -> list[Tokens]:
        """[v_1 .. v_M, name, "."]."""
        return context_prompts(self.tokenizer, names, self.context_length)

    def context(self) -> torch.Tensor:
        """Context vectors (contexts, vectors, width)."""
        return self.vectors

    def run_image_tower(self, images: torch.Tensor) -> torch.Tensor:
        """Image features (batch, sets, features), not normalised."""
        return self.clip.encode_image(images).unflatten(0, (len(images), self.num_sets))

    def encode_text(self) -> torch.Tensor:
        """Unit text features (contexts, classes, features), computed anew."""
        return unit(self.encode(self.layout, self.context()))

    def text_features(self) -> torch.Tensor:
        """Unit text features (contexts, classes, features); without a gradient in the first stage."""
        if self.second_stage or not torch.is_grad_enabled():
            return super().text_features()
        # Nothing moves the context now. Its values are not compared in each step, for which a device would be waited
        # for; that it was written to is known by its version, as of frozen tensors.
        return self.kept(f"text of version {self.vectors._version}", self.encode_text)

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """Logits (batch, classes) of unit image features (batch, sets, features)."""
        texts = self.text_features()
        features = features.to(torch.promote_types(features.dtype, texts.dtype))
        with torch.autocast(features.device.type, enabled=False):
            similarities = torch.einsum("bmd,nkd->bkmn", features, texts.to(features.dtype))
            plan = transport(similarities.detach(), self.epsilon)
            logits = self.scale.to(features.dtype) * (plan * similarities).sum(dim=(-2, -1))
        return self.with_bias(logits)
