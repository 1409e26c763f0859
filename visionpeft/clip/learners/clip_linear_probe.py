"""Linear probe of CLIP: Learning Transferable Visual Models From Natural Language Supervision, arXiv 2103.00020."""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from visionpeft.clip.fitted_splits import check_splits
from visionpeft.clip.layout import Tokens
from visionpeft.clip.learner import Learner
from visionpeft.errors import ConfigurationError, UnsupportedError

SWEEP = (1e-6, 1e-4, 1e-2, 1.0, 1e2, 1e4, 1e6)
BISECTIONS = 8


class CLIPLinearProbe(Learner):
    """Logistic regression on frozen image features: logits = f W^T + b with unit features f (batch, features).

    The solver "lbfgs" minimises C sum_i CE_i + |W|^2 / 2 over the training images in `fit_features`. With a validation
    split, C is swept over 10^-6, 10^-4 .. 10^6; then the range from a tenth to ten times the best is halved
    geometrically 8 times towards its better end. Of equally accurate ones that of the lowest cross-entropy is better.
    Features have length 1 here, where recipes for scikit-learn take CLIP's own of about 10: their C is a hundredth of
    this one. The solver "gradient" leaves W and b to an optimiser. Both start at zero. The texts are not used.
    Trainable: classes * (e + 1) for e features.
    Source: Radford et al., Learning Transferable Visual Models From Natural Language Supervision, 2021.

    Args:
        clip: an OpenCLIP model.
        tokenizer: its tokenizer.
        class_names: names of the classes.
        solver: "lbfgs" or "gradient".
        inverse_strength: C where there is no validation split.
        max_iterations: most L-BFGS iterations for each C.
        allow_duplicates: accept two classes of one name.

    Raises:
        ConfigurationError: an unknown solver, a C that is not positive, or no iterations.
    """

    class_bound = True
    reads_names = False

    def __init__(
        self,
        clip: nn.Module,
        tokenizer: Callable,
        class_names: Sequence[str],
        solver: Literal["lbfgs", "gradient"] = "lbfgs",
        inverse_strength: float = 100.0,
        max_iterations: int = 1000,
        allow_duplicates: bool = False,
    ):
        options = {"solver": solver, "inverse_strength": inverse_strength, "max_iterations": max_iterations}
        super().__init__(clip, tokenizer, class_names, options=options, allow_duplicates=allow_duplicates)
        if solver not in ("lbfgs", "gradient"):
            raise ConfigurationError(f"solver {solver!r} must be lbfgs or gradient")
        if max_iterations < 1:
            raise ConfigurationError(f"max_iterations must be at least 1, not {max_iterations}")
        if not inverse_strength > 0:
            raise ConfigurationError(f"inverse_strength must be positive, but is {inverse_strength}")
        self.by_gradient = solver == "gradient"
        self.inverse_strength, self.max_iterations = inverse_strength, max_iterations
        self.set_class_names(class_names)
        device, dtype = self.text.device, torch.float64 if self.text.dtype == torch.float64 else torch.float32
        self.weight = nn.Parameter(
            torch.zeros(len(self.class_names), self.text.num_features, dtype=dtype, device=device)
        )
        self.bias = nn.Parameter(torch.zeros(len(self.class_names), dtype=dtype, device=device))

    def prompts(self, names: Sequence[str]) -> list[Tokens]:
        """Empty texts: the names only name the outputs."""
        return [()] * len(names)

    def text_features(self) -> torch.Tensor:
        """Refused: there are none.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError("a linear probe has no text features; its classifier is weight and bias")

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """Logits (batch, classes) of unit image features (batch, features)."""
        with torch.autocast(features.device.type, enabled=False):
            return F.linear(features.to(self.weight.dtype), self.weight, self.bias)

    @torch.no_grad()
    def fit_features(
        self,
        train: tuple[torch.Tensor, torch.Tensor],
        validation: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> dict:
        """Solve the regression; the solver "gradient" does nothing here.

        Args:
            train: unit image features (images, features), or (images, views, features) of several augmented views,
                each of which counts as an image; labels (images,).
            validation: the same of the images on which C is chosen.

        Returns:
            The C that was used and, if it was chosen, its accuracy on the validation split.

        Raises:
            ConfigurationError: a split without images, or a label that no class has.
        """
        if self.by_gradient:
            return {}
        check_splits(self, train, validation)
        with torch.inference_mode(False), torch.no_grad():
            train = self._prepared(train)
            if validation is None:
                solution = self._solve(train, self.inverse_strength)
                record = {"inverse_strength": self.inverse_strength}
            else:
                solution, record = self._sweep(train, self._prepared(validation))
            self.weight.copy_(solution[:, :-1])
            self.bias.copy_(solution[:, -1])
        return record

    def _prepared(self, split: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Features of every view, with a column of ones for the bias, in float64 if the device has it; and labels."""
        device = self.weight.device
        features = split[0].to(device, torch.float32 if device.type == "mps" else torch.float64, copy=True)
        labels = split[1].to(device, copy=True)
        if features.ndim == 3:
            labels = labels.repeat_interleave(features.shape[1])
        return F.pad(features.flatten(0, -2), (0, 1), value=1.0), labels

    def _sweep(self, train: tuple, validation: tuple) -> tuple[torch.Tensor, dict]:
        solutions: dict[float, torch.Tensor] = {}
        qualities: dict[float, tuple[float, float]] = {}

        def quality(strength: float) -> tuple[float, float]:
            """Accuracy and negative cross-entropy on the validation split."""
            if strength not in qualities:
                # The problem is convex, so that the nearest solution is only a shorter way.
                nearest = min(solutions, key=lambda other: abs(math.log(other / strength)), default=None)
                solutions[strength] = self._solve(train, strength, solutions.get(nearest))
                logits, labels = validation[0] @ solutions[strength].T, validation[1]
                accuracy = (logits.argmax(dim=1) == labels).double().mean().item()
                qualities[strength] = accuracy, -F.cross_entropy(logits, labels).item()
            return qualities[strength]

        peak = max(SWEEP, key=quality)
        low, high = peak / 10, peak * 10
        for _ in range(BISECTIONS):
            middle = math.sqrt(low * high)
            low, high = (low, middle) if quality(low) >= quality(high) else (middle, high)
        quality(math.sqrt(low * high))
        best = max(qualities, key=qualities.__getitem__)
        return solutions[best], {"inverse_strength": best, "validation_accuracy": qualities[best][0]}

    def _solve(self, train: tuple, inverse_strength: float, start: torch.Tensor | None = None) -> torch.Tensor:
        """Weight and bias (classes, features + 1) that minimise mean_i CE_i + |W|^2 / (2 C images)."""
        features, labels = train
        first = features.new_zeros(len(self.class_names), features.shape[1]) if start is None else start
        solution = first.clone().requires_grad_()
        optimizer = torch.optim.LBFGS(
            [solution],
            max_iter=self.max_iterations,
            max_eval=2 * self.max_iterations,
            history_size=20,
            tolerance_grad=1e-7,
            tolerance_change=1e-12,
            line_search_fn="strong_wolfe",
        )

        def closure() -> torch.Tensor:
            with torch.enable_grad():
                penalty = solution[:, :-1].square().sum() / (2 * inverse_strength * len(labels))
                loss = F.cross_entropy(features @ solution.T, labels) + penalty
                (solution.grad,) = torch.autograd.grad(loss, solution)
            return loss.detach()

        optimizer.step(closure)
        return solution.detach()
