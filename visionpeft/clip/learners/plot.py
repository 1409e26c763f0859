"""PLOT: Prompt Learning with Optimal Transport for Vision-Language Models (Chen et al., 2023), arXiv 2210.01253."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn as nn

from visionpeft.clip.layout import Tokens
from visionpeft.clip.learner import Learner
from visionpeft.clip.learners.coop import check_context_length, context_prompts
from visionpeft.clip.local_features import check_local, with_local_features
from visionpeft.clip.text import unit
from visionpeft.errors import ConfigurationError

ITERATIONS = 100
STANDS_STILL = 1e-2


class PLOT(Learner):
    """Learns several contexts for each class, and matches them with the parts of an image by optimal transport.

    With unit local features f_m of the image (M of them: patches of a ViT, or places of a ResNet's last grid), unit
    text features t_kn of class k with context n of N, and S_mn = f_m t_kn,

        logits_k = scale sum_mn T_mn S_mn,  T = diag(r) exp(-(1 - S) / epsilon) diag(c),

    where Sinkhorn's iteration r = (1 / M) / (K c), c = (1 / N) / (K^T r) makes T's column sums 1 / N and, in the end,
    its row sums 1 / M; there is no gradient through T. It stops after 100 rounds, or where the mean change of r is
    below 0.01. With `pooled`, the logits of the whole image and the mean text feature of each class are added. The
    contexts are shared by all classes, stand before the name, and start at N(0, 0.02^2).
    Trainable: N M d, with context length M and text width d.
    Source: Chen et al., PLOT: Prompt Learning with Optimal Transport for Vision-Language Models, 2023. The authors stop
    all images and classes of a batch together, by the mean over them; here each stops by itself, so that what is
    predicted for an image does not depend on its batch. `PLOTPlusPlus` has image prompts in the place of parts.

    Args:
        clip: an OpenCLIP model whose image tower is a ViT or ResNet of OpenCLIP's own.
        tokenizer: its tokenizer.
        class_names: names of the classes.
        num_contexts: number N of contexts.
        context_length: number M of vectors of each.
        epsilon: how far the transport is spread out; positive.
        pooled: add the logits of the whole image, as the authors do on ImageNet.
        allow_duplicates: accept two classes of one name.

    Raises:
        UnsupportedError: an image tower without local features.
        ConfigurationError: a number out of range, or a prompt longer than the text tower.
    """

    def __init__(
        self,
        clip: nn.Module,
        tokenizer: Callable,
        class_names: Sequence[str],
        num_contexts: int = 4,
        context_length: int = 16,
        epsilon: float = 0.1,
        pooled: bool = False,
        allow_duplicates: bool = False,
    ):
        check_context_length(context_length)
        if not isinstance(num_contexts, int) or num_contexts < 1 or not 0 < epsilon < math.inf:
            raise ConfigurationError(
                f"num_contexts must be an integer of at least 1 and epsilon positive, not {num_contexts} and {epsilon}"
            )
        options = {"num_contexts": num_contexts, "context_length": context_length, "epsilon": epsilon, "pooled": pooled}
        super().__init__(clip, tokenizer, class_names, options=options, allow_duplicates=allow_duplicates)
        check_local(clip)
        self.context_length, self.epsilon, self.pooled = context_length, epsilon, pooled
        self.set_class_names(class_names)
        dtype = torch.float64 if self.text.dtype == torch.float64 else torch.float32
        vectors = torch.randn(num_contexts, context_length, self.text.width, dtype=dtype) * 0.02
        self.vectors = nn.Parameter(vectors.to(self.text.device))

    def prompts(self, names: Sequence[str]) -> list[Tokens]:
        """[v_1 .. v_M, name, "."]."""
        return context_prompts(self.tokenizer, names, self.context_length)

    def context(self) -> torch.Tensor:
        """Context vectors (contexts, vectors, width)."""
        return self.vectors

    def run_image_tower(self, images: torch.Tensor) -> torch.Tensor:
        """Features (batch, 1 + parts, features) of images and their parts, not normalised."""
        return with_local_features(self.clip, images)

    def raw_text_features(self) -> torch.Tensor:
        """Text features (contexts, classes, features) of their own length; kept where there are no gradients."""

        def compute() -> torch.Tensor:
            return self.encode(self.layout, self.context())

        return compute() if torch.is_grad_enabled() else self.kept("raw", compute, self.trained_state().values())

    def text_features(self) -> torch.Tensor:
        """Unit text features (classes, features), each the mean over the contexts, normalised; see `pooled`."""
        return unit(self.raw_text_features().mean(dim=0))

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """Logits (batch, classes) of unit features (batch, 1 + parts, features) of images and their parts.

        Raises:
            ConfigurationError: features of images alone.
        """
        if features.ndim != 3 or features.shape[1] < 2:
            raise ConfigurationError(
                f"PLOT matches parts of an image; pass features (batch, 1 + parts, features), not "
                f"{tuple(features.shape)}"
            )
        raw = self.raw_text_features()
        with torch.autocast(features.device.type, enabled=False):
            texts = unit(raw)
            features = features.to(torch.promote_types(features.dtype, texts.dtype))
            similarities = torch.einsum("bmd,nkd->bkmn", features[:, 1:], texts.to(features.dtype))
            plan = transport(similarities.detach(), self.epsilon)
            logits = self.scale.to(features.dtype) * (plan * similarities).sum(dim=(-2, -1))
            if self.pooled:
                whole = unit(raw.mean(dim=0)).to(features.dtype)
                logits = logits + self.scale.to(features.dtype) * features[:, 0] @ whole.mT
        return self.with_bias(logits)


@torch.no_grad()
def transport(similarities: torch.Tensor, epsilon: float) -> torch.Tensor:
    """T (..., parts, contexts) of similarities of the same shape, by Sinkhorn's iteration.

    It computes with logarithms, as a kernel of a small epsilon is below all numbers. Only the change of the rows is
    taken of their values; where those are above all numbers, it is infinite, and the iteration goes on.
    """
    kernel = -(1 - similarities) / epsilon
    parts, contexts = kernel.shape[-2:]
    rows, columns = torch.zeros_like(kernel[..., 0]), torch.zeros_like(kernel[..., 0, :])
    running = torch.ones_like(rows[..., :1], dtype=torch.bool)
    for _ in range(ITERATIONS):
        new_rows = -math.log(parts) - (kernel + columns[..., None, :]).logsumexp(dim=-1)
        new_columns = -math.log(contexts) - (kernel + new_rows[..., None]).logsumexp(dim=-2)
        change = (new_rows.exp() - rows.exp()).abs().mean(dim=-1, keepdim=True)
        rows, columns = torch.where(running, new_rows, rows), torch.where(running, new_columns, columns)
        running = running & ~(change < STANDS_STILL)
        # Another device would be waited for; what stands still does not change there, either.
        if running.device.type == "cpu" and not running.any():
            break
    return (rows[..., None] + kernel + columns[..., None, :]).exp()
