"""MoA: Mixture-of-LoRAs: An Efficient Multitask Tuning for Large Language Models (Feng et al., 2024).

https://arxiv.org/abs/2403.03432
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F

from visionpeft.errors import ConfigurationError
from visionpeft.methods.lora import LoRA, LowRank
from visionpeft.methods.parts.base import Method, require, to_parameter_dtype
from visionpeft.methods.parts.by_task import ByTask
from visionpeft.methods.parts.frozen_sources import Frozen, OverAdapters, weighted
from visionpeft.methods.parts.router import Router
from visionpeft.sites import Order, Placement
from visionpeft.sites.tasks_of_rows import known_rows


class ChosenChange(nn.Module):
    """y + d_n of one n for all tokens of an image, of the frozen low-rank changes d_n = s_n B_n A_n x.

    n has the largest share of p = router(mean token of x). While training, n is the task of the image where that is
    known, and `seen` holds p and the tasks of the last pass.
    """

    tokenwise = False
    reads_all_patches = True
    order = Order.WEIGHT

    def __init__(self, changes: Sequence[LowRank], tasks: Sequence[str]):
        super().__init__()
        self.frozen = Frozen(changes)
        self.router = Router(changes[0].A.shape[1], len(changes))
        self.tasks_in_training = tuple(tasks)
        self.seen: tuple[torch.Tensor, torch.Tensor] | None = None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"seen": None}  # of a copy: it belongs to one pass

    def forward(self, x: torch.Tensor, y: torch.Tensor, weight, bias) -> torch.Tensor:
        """Map input x (rows, ..., in) and output y (rows, ..., out) of the layer to the changed output."""
        x = to_parameter_dtype(x, self.frozen[0].A)
        shares = self.router(x.flatten(1, -2).mean(dim=1))
        tasks = known_rows(self.tasks_in_training, x, "MoA") if self.training else None
        self.seen = None if tasks is None or not torch.is_grad_enabled() else (shares, tasks)
        chosen = shares.argmax(dim=-1) if tasks is None else tasks
        # Its value is one or zero, and its gradient that of the shares.
        kept = F.one_hot(chosen, len(self.frozen)).to(shares.dtype) + (shares - shares.detach())
        changes = [each.scaling * F.linear(F.linear(x, each.A), each.B) for each in self.frozen]
        return y + weighted(changes, kept.view(len(x), *[1] * (x.ndim - 2), -1)).to(y.dtype)

    def mistaken(self) -> torch.Tensor:
        """-log p of the task, the mean over the images of the last pass in training mode.

        Raises:
            ConfigurationError: there was no such pass, or the tasks were not known in it.
        """
        if self.seen is None:
            raise ConfigurationError(
                "MoA's routers learn from the tasks of images: call penalty after model.train() and a forward pass "
                "within visionpeft.of_tasks, or set routing to 0"
            )
        (shares, tasks), self.seen = self.seen, None
        return F.nll_loss(shares.log(), tasks)


@dataclass(frozen=True)
class MoA(OverAdapters, ByTask):
    """One of several trained LoRAs for an image, chosen at every layer by a router: W x + s_n B_n A_n x.

    One LoRA was trained on each task, and all stay frozen. A router reads the mean token of the layer's input h:
    n = argmax softmax(G mean(h)), G (N, in) N(0, 0.02). While training, n is the task of the image, which
    `visionpeft.of_tasks` says, in a run of `MultiTask` data its label; to the loss is added routing * the mean over
    layers of -log softmax(G mean(h)) of that task. The tasks do this by themselves, a training loop of your own with
    `penalty(model)`. Afterwards no task need be said: an image of an unknown domain has the LoRA it resembles. The loss
    of the classes also reaches the routers, by a straight-through gradient, which is our choice.

    The paper trains the LoRAs on together with the routers; here they stay as they are, so that for an image whose
    routers are right the model is the one with its domain's LoRA, exactly. In a backbone of windows every window is
    routed by itself. The adapters are `LoRA` of the same targets and blocks, of any rank and scale. They are copied:
    the new adapter is saved with them, and they need not stay attached, nor act beside it. Not mergeable: the choice
    depends on the image.
    Trainable: sum over target layers of N * in; 36,864 on ViT-B/16 for two adapters on q and v.
    Source: Feng, Hao, Zhang, Han and Wang, Mixture-of-LoRAs, 2024, of which no code was read; the factor as recalled.

    Args:
        adapters: names of the attached LoRAs, one for each task; on the command line, the folders of saved ones.
        routing: factor of the routers' loss, 0 for none.
        towers: which towers; by default the image tower.
        sources: class and fields of the adapters' methods; found by `attach`, not to be given.
        tasks: names of the tasks in the order of the adapters; those of the data are filled in by `visionpeft.fit`, and
            without any they are the names of the adapters.
    """

    kinds: ClassVar[tuple[type[Method], ...]] = (LoRA,)

    routing: float = 1.0
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        require(self.routing >= 0, self, f"routing must not be negative, but is {self.routing}")
        number = len(self.sources or self.adapters)
        fits = not self.tasks or not number or len(self.tasks) == number
        require(fits, self, f"there are {number} adapters for {len(self.tasks)} tasks ({', '.join(self.tasks)})")

    def over(self, methods: Mapping[str, Method]) -> "MoA":
        """As for all such methods; the tasks are those that were named, or as many as there are adapters."""
        found = super().over(methods)
        return found if found.tasks else dataclasses.replace(found, tasks=tuple(methods))

    def mix(self, modules: Sequence[nn.Module], placement: Placement) -> ChosenChange:
        """One `ChosenChange` at every target layer."""
        linear = placement.site != "patch_embed"
        require(linear, self, "LoRA on patch_embed is a convolution, which has no router; train it without")
        return ChosenChange(modules, self.tasks)

    def penalty(self, part: nn.Module) -> torch.Tensor | float:
        """routing * the mean over layers of what the routers have mistaken."""
        if self.routing == 0:
            return 0.0
        routed = [module for module in part.modules() if isinstance(module, ChosenChange)]
        return self.routing * torch.stack([each.mistaken() for each in routed]).mean()
