"""Every method and learner on the device against the same computation in float64 on the CPU.

A difference is |found - expected| / |expected| of the logits, and of all gradients of a cross-entropy as one vector.
TOLERANCES are what must not be exceeded: five to fifty times what a CPU shows in the same precision, through which a
wrong formula, a tensor in the wrong place or a lost scale does not pass.
"""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import visionpeft as vp
from visionpeft import methods
from visionpeft.clip import learners
from visionpeft.models.create_clip import create_clip

from .running import Cell, Setting, Wrong, distance

# largest differences of logits and of gradients
TOLERANCES = {"float32": (2e-5, 1e-4), "bfloat16": (0.06, 0.15), "float16": (0.01, 0.03)}
# TPT tunes at each image by a step of AdamW, whose length does not depend on that of the gradient: a rounded sign of a
# gradient near zero is a whole step. Its text gradients are computed in float32.
SIGNS = {"TPT": {"float32": 0.02, "bfloat16": 0.25, "float16": 0.1}}
OF_CLIPS = ("STAdapter", "AIM")
TINY = ("LoRA", "VPT", "SPT", "AIM", "CoOp")
CLASSES, BATCH = 7, 4
NAMES = ["dog", "red kite", "sports car", "yo-yo", "church", "fish", "bus"]


def methods_listed(setting: Setting) -> list[str]:
    """Names of all methods; if tiny, of some that differ in kind, as the tests have them all."""
    listed = [name for name in methods.__all__ if name != "Method"]
    return [name for name in listed if name in TINY] if setting.tiny else listed


def learners_listed(setting: Setting) -> list[str]:
    """Names of all learners; likewise."""
    listed = [name for name in learners.__all__ if name != "Learner"]
    return [name for name in listed if name in TINY] if setting.tiny else listed


def cells(setting: Setting) -> list[Cell]:
    """One for each method, and for the forms of blocks at whose sites nothing acts."""
    named = [Cell(f"exact: {name}", "exactness", partial(method, name)) for name in methods_listed(setting)]
    return [Cell("exact: sited forward", "exactness", sited), *named]


def learner_cells(setting: Setting) -> list[Cell]:
    """One for each learner."""
    return [Cell(f"exact: learner {name}", "exactness", partial(learner, name)) for name in learners_listed(setting)]


def plain(setting: Setting) -> nn.Module:
    """A small ViT."""
    torch.manual_seed(0)
    size = {"depth": 1, "embed_dim": 64, "num_heads": 2} if setting.tiny else {"depth": 3}
    return timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=CLASSES, **size).eval()


def adapted(name: str, setting: Setting) -> tuple[nn.Module, Tensor]:
    """A ViT with a method moved off its start, in float32 on the CPU, and images for it."""
    model, frames = plain(setting), []
    if name in OF_CLIPS:
        frames = [2]
        model = vp.VideoClassifier(model, num_frames=2, num_classes=CLASSES).eval()
    options = {"num_frames": 2} if name == "AIM" else {}
    vp.attach(model, getattr(methods, name)(**options))
    images = torch.randn(BATCH, 3, *frames, 64, 64)
    if model.peft["default"].pending:
        vp.allocate(model, [(images, labels())])
    with torch.no_grad():
        for parameter in model.peft.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval(), images


def labels() -> Tensor:
    """One for each image."""
    return torch.arange(BATCH) % CLASSES


def made_learner(name: str) -> tuple[nn.Module, Tensor]:
    """A learner on the small CLIP in the package, that has seen what it is fitted on, and images for it."""
    torch.manual_seed(0)
    clip, tokenizer = create_clip("nano_clip")
    options = {"num_views": 4} if name == "TPT" else {}
    made = getattr(learners, name)(clip, tokenizer, NAMES, **options)
    width = clip.text_projection.shape[1]
    made.fit_features((F.normalize(torch.randn(CLASSES, width), dim=-1), torch.arange(CLASSES)))
    with torch.no_grad():
        for parameter in made.trainable_parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    shape = (2, 4) if name == "TPT" else (BATCH,)
    return made.eval(), torch.randn(*shape, 3, 64, 64)


def of_model(model: nn.Module, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and logits."""
    logits = model(images)
    return F.cross_entropy(logits.float() if logits.dtype != torch.float64 else logits, targets), logits


def of_learner(made: nn.Module, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of the learner, or what it gives where nothing is trained, and logits."""
    if made.trainable_parameters():
        return made.loss(images, targets)
    logits = made(images)
    return logits.sum(), logits


def results(
    run: Callable, module: nn.Module, images: Tensor, trained: list[nn.Parameter], scaler=None
) -> tuple[Tensor, Tensor | None]:
    """Logits, and the gradients of all that is trained as one vector; None where nothing is."""
    targets = labels()[: len(images)].to(images.device)
    loss, logits = run(module, images, targets)
    if not trained:
        return logits.detach(), None
    for parameter in trained:
        parameter.grad = None
    (loss if scaler is None else scaler.scale(loss)).backward()
    if scaler is not None:
        scaler.unscale_(torch.optim.SGD(trained))
    return logits.detach(), torch.cat([each.grad.flatten() for each in trained if each.grad is not None])


def compare(
    name: str, run: Callable, module: nn.Module, images: Tensor, of: Callable, setting: Setting
) -> dict[str, str]:
    """Differences in each precision.

    Raises:
        Wrong: one is too large, or not finite.
    """
    exact = copy.deepcopy(module).double()
    expected = results(run, exact, images.double(), of(exact))
    row, wrong = {"what": name}, []
    for precision, tolerances in TOLERANCES.items():
        here = copy.deepcopy(module).to(setting.device)
        dtype = getattr(torch, precision)
        autocast = nullcontext() if precision == "float32" else torch.autocast(setting.device, dtype)
        scaler = torch.amp.GradScaler(setting.device, init_scale=1024.0) if precision == "float16" else None

        def under_autocast(*given, autocast=autocast):
            with autocast:
                return run(*given)

        found = results(under_autocast, here, images.to(setting.device), of(here), scaler)
        allowed = (SIGNS[name][precision],) * 2 if name in SIGNS else tolerances
        for what, own, right, most in zip(("logits", "gradients"), found, expected, allowed, strict=True):
            if right is None:
                continue
            far = distance(own, right)
            row[f"{precision}, {what}"] = f"{far:.1e}"
            if not far <= most:
                wrong.append(f"{what} in {precision} differ by {far:.1e}, more than {most:g}")
    if wrong:
        raise Wrong("; ".join(wrong), row)
    return row


def method(name: str, setting: Setting) -> dict:
    """A method."""
    model, images = adapted(name, setting)
    return compare(name, of_model, model, images, vp.trainable_parameters, setting)


def learner(name: str, setting: Setting) -> dict:
    """A learner."""
    made, images = made_learner(name)
    return compare(name, of_learner, made, images, lambda module: module.trainable_parameters(), setting)


def sited(setting: Setting) -> dict:
    """The sited form of blocks, at whose sites nothing acts, against the library's own on the same device.

    Raises:
        Wrong: they differ by more than roundings.
    """
    model = plain(setting).to(setting.device)
    images = torch.randn(BATCH, 3, 64, 64, device=setting.device)
    with torch.no_grad():
        expected = model(images)
        vp.attach(model, vp.LinearProbe())
        vp.economise(model, recompute="mlp")
        with vp.use(model, "default"):
            features = model.forward_features(images)
        vp.disable(model)
        far = distance(features, model.forward_features(images))
        logits = distance(model(images), expected)
    row = {"what": "sited forward, nothing attached", "float32, logits": f"{max(far, logits):.1e}"}
    if not max(far, logits) <= 1e-5:  # the order of sums may differ, and no more
        raise Wrong(f"the sited forward differs from the library's by {max(far, logits):.1e}", row)
    return row
