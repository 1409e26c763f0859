"""2SFS: Rethinking Few-Shot Adaptation of Vision-Language Models in Two Stages (Farina et al., 2025).

https://arxiv.org/abs/2503.11609
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn as nn

from visionpeft.clip.layout import places_among
from visionpeft.clip.learners.tuned_clip import TunedCLIP
from visionpeft.clip.stages import InTwoStages, check_share
from visionpeft.clip.templates import PHOTO
from visionpeft.clip.text import unit
from visionpeft.methods.parts.base import Method


class TwoStageFewShot(InTwoStages, TunedCLIP):
    """Tunes both towers first, then freezes them and trains a classifier that starts at the texts: 2SFS.

    Stage 1 is `TunedCLIP`: logits_k = scale f t_k with unit features of the changed towers, and cross-entropy. After
    the share `first_stage` of the epochs, row w_k of a classifier (classes, features) becomes t_k, and stage 2 trains
    logits_k = scale f unit(w_k) alone, with f of the towers as they are. From then on a name that was trained is
    answered by its row, and another one by the changed text tower, so that new names leave the logits of the others as
    they are. Before any step it is zero-shot CLIP. In stage 2 image features do not change, and can be kept.
    How the method starts says the method; the classifier is not used in stage 1. Trainable: that of the method +
    classes * e, with e features; on ViT-B/16 65,536 with the LayerNorms, + 51,200 for 100 classes.
    Source: Farina et al., Rethinking Few-Shot Adaptation of Vision-Language Models in Two Stages, 2025. Stages change
    between epochs here, with one optimiser and one schedule for both; theirs are by steps, and each has its own
    optimiser and its own cosine. In their code the norms before the first and after the last block of a tower are
    frozen again after they were chosen, which leaves 61,440 of ViT-B/16; here all are trained, as they say.

    Args:
        clip: an OpenCLIP model. It gets an adapter named "two_stage_few_shot".
        tokenizer: its tokenizer.
        class_names: names of the classes.
        method: what is trained in stage 1, or what `describe_method` gives of it; None is `LayerNormTuning` of both
            towers.
        first_stage: share of the epochs that stage 1 has, from 0 to 1.
        template: the prompt, with {} for the class name.
        trained_names: the classes of the rows of the classifier; None for `class_names`.
        allow_duplicates: accept two classes of one name.

    Raises:
        UnsupportedError: a tower lacks what the method needs.
        ConfigurationError: a share outside 0 to 1, or as `TunedCLIP`.
    """

    adapter_name = "two_stage_few_shot"
    trained_names: Sequence[str] = ()

    def __init__(
        self,
        clip: nn.Module,
        tokenizer: Callable,
        class_names: Sequence[str],
        method: Method | dict | None = None,
        first_stage: float = 0.6,
        template: str | list[str] = PHOTO,
        trained_names: list[str] | None = None,
        allow_duplicates: bool = False,
    ):
        names = class_names if trained_names is None else trained_names
        check_share(first_stage)
        super().__init__(clip, tokenizer, names, method, template, allow_duplicates)
        self.keep_stage(first_stage)
        self.frozen_in_first_stage = self.frozen_images
        self.trained_names = self.class_names
        self.options |= {"first_stage": first_stage, "trained_names": self.trained_names}
        self.classifier = nn.Parameter(self._start())
        if first_stage == 0:
            self.begin_second_stage()
        if trained_names is not None:
            self.set_class_names(class_names)

    @torch.no_grad()
    def _start(self) -> torch.Tensor:
        """Text features (classes, features) of the towers as they are."""
        dtype = torch.float64 if self.text.dtype == torch.float64 else torch.float32
        if self.text.device.type == "meta":  # there are none without memory
            return torch.empty(len(self.trained_names), self.text.num_features, dtype=dtype, device="meta")
        return self.encode_text().to(dtype)

    @torch.no_grad()
    def begin_second_stage(self) -> None:
        """Freeze the towers as they are, and let the classifier start at their text features of the trained names."""
        names, training = self.class_names, self.training
        self.eval()  # what is drawn while the towers are trained is no part of them
        if names != self.trained_names:
            self.set_class_names(self.trained_names)
        self.classifier.copy_(self._start())
        if names != self.trained_names:
            self.set_class_names(names)
        super().begin_second_stage()
        self.train(training)

    def follow_stage(self) -> None:
        """Read the stage that was loaded; in the second, image features do not change."""
        super().follow_stage()
        self.frozen_images = self.second_stage or self.frozen_in_first_stage

    def train(self, mode: bool = True):
        """Training mode for what is trained; in stage 2 that is the classifier alone."""
        super().train(mode)
        if self.second_stage:
            self.clip.peft.eval()
        return self

    def text_features(self) -> torch.Tensor:
        """Unit text features (classes, features): rows of the classifier for trained names, in stage 2."""
        if not self.second_stage:
            return super().text_features()
        rows = unit(self.classifier)
        if self.class_names == self.trained_names:
            return rows
        return self.kept("text", self._rows_and_texts, self.trained_state().values())

    def _rows_and_texts(self) -> torch.Tensor:
        rows, texts = unit(self.classifier), self.encode_text()
        for place, own in enumerate(places_among(self.class_names, self.trained_names)):
            if own is not None:
                texts[place] = rows[own]
        return texts
