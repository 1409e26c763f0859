"""LP++: A Surprisingly Strong Linear Probe for Few-Shot CLIP (Huang et al., 2024), https://arxiv.org/abs/2404.02285."""

from collections.abc import Callable, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F

from visionpeft.clip.fitted_splits import check_splits
from visionpeft.clip.template_texts import TemplateTexts
from visionpeft.clip.templates import PHOTO
from visionpeft.errors import ConfigurationError

MOMENTUM = 0.9
STRENGTH_EVERY = 10
FIRST_STRENGTH = 250


class LPPlusPlus(TemplateTexts):
    """A linear probe that also weighs zero-shot CLIP, class by class: logits_k = f w_k + b_k + a_k f t_k.

    f and t_k are unit features; there is no scale. `fit_features` starts w_k at the sum of the features of class k, b
    at zero and every a at 250 times the mean over the classes of the mean of f t_k over the images of class k. Then
    come `steps` steps over all n training images at once: w and b by SGD with momentum 0.9 and the rate 4 n / (largest
    eigenvalue of F^T F), a after every tenth step by a plain gradient step of the rate n / (4 max_k sum_i (f_i t_k)^2).
    Where there is a validation split, the last of the steps that classify it best is kept, as by the authors, otherwise
    the last one of all.
    No optimiser of a run is needed. Learnt: classes * (e + 2), with e features.
    Source: Huang et al., LP++: A Surprisingly Strong Linear Probe for Few-Shot CLIP, 2024. The authors' code never
    clears the gradient of a, so that each of its steps adds all gradients so far; here it is cleared, as in the paper.
    It has b start as `nn.Linear` does, at random within 1 / sqrt(e).

    Args:
        clip: an OpenCLIP model.
        tokenizer: its tokenizer.
        class_names: names of the classes.
        steps: of the solver.
        template: one template or several for the texts, with {} for the class name; None is the data set's own in a
            run, "tip_7" for ImageNet, and "a photo of a {}." otherwise.
        allow_duplicates: accept two classes of one name.

    Raises:
        ConfigurationError: steps that are no integer of at least 1, or class names or templates that cannot be used.
    """

    class_bound = True
    by_gradient = False
    template_style = "tip_adapter"

    def __init__(
        self,
        clip: nn.Module,
        tokenizer: Callable,
        class_names: Sequence[str],
        steps: int = 300,
        template: str | list[str] | None = None,
        allow_duplicates: bool = False,
    ):
        if not isinstance(steps, int) or steps < 1:
            raise ConfigurationError(f"steps must be an integer of at least 1, not {steps}")
        super().__init__(
            clip,
            tokenizer,
            class_names,
            options={"steps": steps, "template": template},
            templates=PHOTO if template is None else template,
            allow_duplicates=allow_duplicates,
        )
        self.steps = steps
        self.set_class_names(class_names)
        options = {
            "dtype": torch.float64 if self.text.dtype == torch.float64 else torch.float32,
            "device": self.text.device,
        }
        classes = len(self.class_names)
        self.weight = nn.Parameter(torch.zeros(classes, self.text.num_features, **options))
        self.bias = nn.Parameter(torch.zeros(classes, **options))
        # Before it is fitted it ranks as zero-shot CLIP.
        self.strength = nn.Parameter(torch.ones(classes, **options))

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """Logits (batch, classes) of unit image features (batch, features)."""
        texts = self.text_features().to(self.weight.dtype)
        features = features.to(self.weight.dtype)
        with torch.autocast(features.device.type, enabled=False):
            return _logits(features, features @ texts.T, self.weight, self.bias, self.strength)

    @torch.no_grad()
    def fit_features(
        self,
        train: tuple[torch.Tensor, torch.Tensor],
        validation: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> dict:
        """Solve for w, b and a.

        Args:
            train: unit image features (images, features), or (images, views, features) of several augmented views,
                each of which counts as an image; labels (images,).
            validation: the same of the images on which the step is chosen.

        Returns:
            The step that was kept and, if it was chosen, its accuracy on the validation split.

        Raises:
            ConfigurationError: a class without training images, of which nothing can be learnt; a validation split
                without images, or a label that no class has.
        """
        check_splits(self, train, validation)
        with torch.inference_mode(False), torch.no_grad():
            features, labels = self._prepared(train)
            held_out = None if validation is None else self._prepared(validation)
            classes = len(self.class_names)
            if int(torch.bincount(labels, minlength=classes).min()) == 0:
                raise ConfigurationError(
                    f"LP++ starts from the features of each class; it needs training images of all its {classes} "
                    f"classes, with labels 0 to {classes - 1}"
                )
            solution, record = self._solve(features, labels, held_out)
            for own, found in zip((self.weight, self.bias, self.strength), solution, strict=True):
                own.copy_(found)
        return record

    def _prepared(self, split: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Features of every view, and labels."""
        features = split[0].to(self.weight.device, self.weight.dtype, copy=True)
        labels = split[1].to(self.weight.device, copy=True)
        if features.ndim == 3:
            labels = labels.repeat_interleave(features.shape[1])
        return features.flatten(0, -2), labels

    def _solve(self, features: torch.Tensor, labels: torch.Tensor, held_out: tuple | None) -> tuple[tuple, dict]:
        texts = self.text_features().to(features.dtype)
        responses = features @ texts.T
        counts = torch.bincount(labels, minlength=len(texts)).to(features.dtype)
        one_hot = F.one_hot(labels, len(texts)).to(features.dtype)
        weight = one_hot.T @ features  # sums, and not means: the authors took the division out
        bias = torch.zeros_like(counts)
        own = (one_hot * responses).sum(dim=0) / counts
        strength = torch.full_like(counts, FIRST_STRENGTH) * own.mean()
        rate = 4 * len(labels) / torch.linalg.matrix_norm(features, ord=2).square()
        rate_of_strength = len(labels) / (4 * responses.square().sum(dim=0).max())
        moving_weight, moving_bias = torch.zeros_like(weight), torch.zeros_like(bias)
        best, kept = -1, None
        for step in range(1, self.steps + 1):
            # Of the mean cross-entropy with respect to the logits.
            upstream = (_logits(features, responses, weight, bias, strength).softmax(dim=-1) - one_hot) / len(labels)
            moving_weight = MOMENTUM * moving_weight + upstream.T @ features
            moving_bias = MOMENTUM * moving_bias + upstream.sum(dim=0)
            weight, bias = weight - rate * moving_weight, bias - rate * moving_bias
            if step % STRENGTH_EVERY == 0:
                strength = strength - rate_of_strength * (upstream * responses).sum(dim=0)
            if held_out is not None:
                found = _logits(held_out[0], held_out[0] @ texts.T, weight, bias, strength).argmax(dim=-1)
                correct = int((found == held_out[1]).sum())
                if correct >= best:
                    best, kept = correct, (step, (weight, bias, strength))
        if kept is None:
            return (weight, bias, strength), {"step": self.steps}
        return kept[1], {"step": kept[0], "validation_accuracy": best / len(held_out[1])}


def _logits(features, responses, weight, bias, strength) -> torch.Tensor:
    """f w^T + b + a f t^T (images, classes) of features (images, features) and responses f t^T (images, classes)."""
    return features @ weight.T + bias + strength * responses
