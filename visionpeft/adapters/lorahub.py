"""LoraHub: Efficient Cross-Task Generalization via Dynamic LoRA Composition (Huang et al., 2024).

https://arxiv.org/abs/2307.13269
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn as nn

from visionpeft.adapters.access import on_model
from visionpeft.adapters.adapters import attached, known
from visionpeft.adapters.allocate import Batch, cross_entropy, evaluating
from visionpeft.adapters.attach import detach, register
from visionpeft.adapters.attached_adapter import AttachedAdapter
from visionpeft.adapters.storage import folded
from visionpeft.adapters.switch import activate, plain
from visionpeft.backbones.whole_model import describe
from visionpeft.errors import ConfigurationError, DataError
from visionpeft.methods.lora import LoRA
from visionpeft.methods.parts.base import require_same, weighted_sum

FIRST_STEP = 0.5  # of the search: about a third of the published bound


@on_model
@torch.no_grad()
def lorahub(
    model: nn.Module,
    names: Sequence[str],
    batches: Iterable[Batch],
    name: str = "lorahub",
    *,
    loss: Callable[[nn.Module, Batch], torch.Tensor] = cross_entropy,
    form: Literal["factors", "changes"] = "factors",
    evaluations: int = 40,
    bound: float = 1.5,
    regularisation: float = 0.05,
    seed: int = 42,
) -> dict[str, float]:
    """Make one LoRA out of several, with weights that are found on a few images without gradients; activate it alone.

    Minimised is the mean loss over the images + regularisation * mean |w|, over |w_n| <= bound, by the evolution
    strategy CMA-ES from w = 0 on; the best weights that were tried count. The new adapter has no head: the model's own
    is used, which must tell the classes of the images apart, or give a `loss` of your own, such as that of image and
    text features. Neither NumPy's nor PyTorch's global generator is touched.

    What the weights mean:

    * "factors", as published: A = sum_n w_n A_n and B = sum_n w_n B_n apart, of equal ranks and scales s, so that the
      change s B A has products of different adapters in it, w enters squared, and w and -w are the same;
    * "changes": sum_n w_n s_n B_n A_n, exactly, as `combine` has it, of any ranks.

    The authors' code divides the loss of each batch by the number of all examples once more; here every image counts
    the same. Source: Huang et al., LoraHub, 2024, and the authors' code (sail-sg/lorahub), which searches with
    nevergrad; the number of evaluations as recalled.

    Args:
        model: a model with these adapters.
        names: two or more of its adapters, each a `LoRA` alone (or an `AdaLoRA`) of the same targets and blocks.
        batches: a few labelled batches, such as (images, labels); all are kept in memory.
        name: name of the new adapter.
        loss: maps model and batch to the mean loss of the batch, a scalar.
        form: what the weights mean.
        evaluations: how many weights are tried, w = 0 among them.
        bound: the largest |w_n|.
        regularisation: factor of mean |w|.
        seed: of the search.

    Returns:
        The weight of each adapter.

    Raises:
        ConfigurationError: if the adapters do not fit each other, or cma is not installed; nothing is changed.
        DataError: if there are no batches, or no loss is finite; nothing is changed.
    """
    peft = attached(model)
    parts = _parts({each: peft[known(peft, each)] for each in names}, form)
    if form not in ("factors", "changes") or evaluations < 1 or not bound > 0 or not regularisation >= 0:
        raise ConfigurationError(
            "lorahub needs form 'factors' or 'changes', at least one evaluation, a positive bound and a regularisation "
            f"that is not negative, not {form!r}, {evaluations}, {bound} and {regularisation}"
        )
    shown = [tuple(batch) for batch in batches]
    if not shown:
        raise DataError("lorahub got no batch")
    method, _ = _combined(parts, [0.0] * len(parts), form)
    with plain(model), torch.random.fork_rng(devices=[]):
        backbone = describe(model)
        made = AttachedAdapter((method,), backbone, head=False)
    before = peft.active
    register(model, name, made, backbone, alone=True)
    try:

        def value_of(weights: Sequence[float]) -> float:
            _put(made, _combined(parts, weights, form)[1])
            sizes = [len(batch[0]) for batch in shown]
            losses = [float(loss(model, batch)) for batch in shown]
            mean = sum(each * size for each, size in zip(losses, sizes, strict=True)) / sum(sizes)
            return mean + regularisation * sum(map(abs, weights)) / len(weights)

        with evaluating(model):
            found = _search(value_of, len(parts), evaluations, bound, seed)
        _put(made, _combined(parts, found, form)[1])
    except BaseException:
        detach(model, name)
        activate(model, before)
        raise
    return dict(zip(names, found, strict=True))


Part = tuple[LoRA, Mapping[str, torch.Tensor]]


def _parts(adapters: Mapping[str, AttachedAdapter], form: str) -> list[Part]:
    """Method and tensors of each adapter, without the name of the method, if they fit each other."""
    if len(adapters) < 2:
        raise ConfigurationError(f"lorahub needs at least two adapters, not {', '.join(adapters) or 'none'}")
    parts = []
    for name, adapter in adapters.items():
        methods, tensors = folded(adapter)
        if [type(method) for method in methods] != [LoRA] or adapter.trained_names:
            words = " and ".join(type(method).__name__ for method in methods)
            more = f" that trains {adapter.trained_names[0]!r}, too" if adapter.trained_names else ""
            raise ConfigurationError(f"lorahub takes adapters of LoRA alone, but {name!r} is {words}{more}")
        own = {key.removeprefix("lora."): value for key, value in tensors.items() if key.startswith("lora.")}
        parts.append((methods[0], own))
    # of the published form, where matrices are added, also the ranks and the scale must be the same
    require_same([method for method, _ in parts], but=("dropout",) if form == "factors" else _FREE)
    return parts


_FREE = ("rank", "alpha", "overrides", "dropout")


def _combined(parts: Sequence[Part], weights: Sequence[float], form: str) -> tuple[LoRA, dict[str, torch.Tensor]]:
    methods, tensors = [method for method, _ in parts], [own for _, own in parts]
    if form == "factors":
        return methods[0], weighted_sum(tensors, weights)
    with torch.random.fork_rng(devices=[]):  # what a layer does not use of its rank is drawn
        torch.manual_seed(0)
        return methods[0].combine(methods, tensors, weights)


def _put(adapter: AttachedAdapter, tensors: Mapping[str, torch.Tensor]) -> None:
    own = dict(adapter.named_parameters())
    for path, value in tensors.items():
        own[f"lora.{path}"].copy_(value)


def _search(
    value_of: Callable[[Sequence[float]], float], number: int, evaluations: int, bound: float, seed: int
) -> list[float]:
    """The best of so many weights, from 0 on, by CMA-ES."""
    try:
        import cma
    except ImportError:
        raise ConfigurationError("lorahub needs cma; install it with pip install 'visionpeft[lorahub]'") from None
    best, least = [0.0] * number, value_of([0.0] * number)
    generator, tried = np.random.default_rng(seed), 1
    strategy = cma.CMAEvolutionStrategy(
        [0.0] * number,
        FIRST_STEP * bound / 1.5,
        # By themselves they would seed NumPy's global generator.
        {
            "bounds": [-bound, bound],
            "seed": math.nan,
            "randn": lambda *shape: generator.standard_normal(shape),
            "verbose": -9,
        },
    )
    while tried < evaluations:
        candidates = [[float(weight) for weight in candidate] for candidate in strategy.ask()]
        values = []
        for candidate in candidates[: evaluations - tried]:
            values.append(value_of(candidate))
            # also where the least so far is no number
            if math.isfinite(values[-1]) and not least <= values[-1]:
                best, least = candidate, values[-1]
        tried += len(values)
        if len(values) == len(candidates):
            strategy.tell(candidates, [value if math.isfinite(value) else math.inf for value in values])
    if not math.isfinite(least):
        raise DataError("lorahub found no weights with a finite loss; look at the images and at the loss")
    return best
