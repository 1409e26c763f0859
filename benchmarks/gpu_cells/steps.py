"""Step time, images per second and peak memory of real models, ours beside HF peft, full fine-tuning and a probe.

The cases are those of `adaptation.py`. A step is forward, cross-entropy, backward and AdamW on one batch of images and
100 classes, in train mode, with a scaled loss in float16; an inference is a forward without gradients. Ratios are to
the frozen forward of the same backbone in the same precision. The peak is how far the steps go above the loaded model.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from unittest import mock

import timm
import torch
import torch.nn.functional as F
from adaptation import INFERENCE, MIB, STEPS
from measuring import saved_bytes, storages
from torch import nn

from visionpeft.tasks import compiling

from .running import Cell, Setting

REFERENCE = "frozen forward"
LORA = "LoRA r8 on all linears"
# in the order of what a user asks first
FIRST = [REFERENCE, LORA, f"HF peft {LORA}", "full fine-tuning", "linear probe", "VPT-deep, 10 prompts", "SSF"]
COMPILED = [LORA, f"HF peft {LORA}", "VPT-deep, 10 prompts", "SSF"]


@dataclass(frozen=True)
class Backbone:
    """A model in a real size.

    Args:
        title: how it is called in the table.
        timm_name: its name in timm.
        batch_size: images in a batch.
        precisions: in which it is measured; the first one is what one would use.
    """

    title: str
    timm_name: str
    batch_size: int
    precisions: tuple[str, ...]


BACKBONES = [
    Backbone("ViT-B/16", "vit_base_patch16_224", 64, ("bfloat16", "float32", "float16")),
    Backbone("ViT-L/14 of CLIP", "vit_large_patch14_clip_224", 32, ("bfloat16",)),
    Backbone("ViT-g/14, 1.0 B parameters", "vit_giant_patch14_224", 16, ("bfloat16",)),
]
TINY = [Backbone("a small ViT", "test_vit", 2, ("float32", "bfloat16", "float16"))]
TINY_CASES = [REFERENCE, LORA, f"HF peft {LORA}"]


def cells(setting: Setting) -> list[Cell]:
    """Each backbone in the precision one would use, of each the cases that are asked for first."""
    backbones = TINY if setting.tiny else BACKBONES
    return [cell for backbone in backbones for cell in cells_of(backbone, backbone.precisions[0], setting)]


def further_cells(setting: Setting) -> list[Cell]:
    """The other precisions."""
    backbones = TINY if setting.tiny else BACKBONES
    pairs = [(backbone, precision) for backbone in backbones for precision in backbone.precisions[1:]]
    return [cell for backbone, precision in pairs for cell in cells_of(backbone, precision, setting)]


def cells_of(backbone: Backbone, precision: str, setting: Setting) -> list[Cell]:
    """All cases of a backbone in a precision."""
    names = TINY_CASES if setting.tiny else [*FIRST, *(name for name in (*INFERENCE, *STEPS) if name not in FIRST)]
    return [cell_of(backbone, precision, name) for name in names]


def cell_of(backbone: Backbone, precision: str, name: str, compile_model=None, how: str = "") -> Cell:
    """One case, as it is or compiled."""
    title = name + how
    run = partial(measure, backbone, precision, name, compile_model, title)
    return Cell(f"step: {backbone.title}, {precision}, {title}", "steps", run)


def compiled_cells(setting: Setting) -> list[Cell]:
    """The same steps with the model compiled: by PyTorch's defaults, and ours as `fit` does it."""
    backbone = (TINY if setting.tiny else BACKBONES)[0]
    backend = "eager" if setting.tiny else "inductor"  # which traces alike, and makes no code

    def as_fit_does(model: nn.Module) -> None:
        with mock.patch.object(compiling, "BACKEND", backend):
            compiling.compile_in_place(model)

    ways: dict[str, Callable] = {
        ", torch.compile": lambda model: model.compile(fullgraph=True, backend=backend),
        ", --model.compile true": as_fit_does,
    }
    return [
        cell_of(backbone, backbone.precisions[0], name, compile_model, how)
        for name in ([LORA] if setting.tiny else COMPILED)
        for how, compile_model in ([*ways.items()][1:] if setting.tiny else ways.items())
        if compile_model is not as_fit_does or not name.startswith("HF peft")
    ]


class Step:
    """A training step or an inference of one case.

    Args:
        backbone: the model.
        precision: "float32", or that of autocast.
        name: the case.
        setting: where.
        compile_model: compiles the model in place; None leaves it as it is.
    """

    def __init__(self, backbone: Backbone, precision: str, name: str, setting: Setting, compile_model=None):
        self.trains = name in STEPS
        with torch.device(setting.device):  # random weights are drawn there, which takes a CPU long
            self.model = (STEPS | INFERENCE)[name](backbone.timm_name).to(setting.device).train(self.trains)
        if compile_model is not None:
            compile_model(self.model)
        enabled = precision != "float32"
        dtype = getattr(torch, precision) if enabled else torch.bfloat16
        self.autocast = torch.autocast(setting.device, dtype, enabled=enabled)
        self.scaler = torch.amp.GradScaler(setting.device, enabled=precision == "float16")
        torch.manual_seed(1)
        size = timm.get_pretrained_cfg(backbone.timm_name).input_size
        self.images = torch.randn(backbone.batch_size, *size, device=setting.device)
        self.labels = torch.arange(backbone.batch_size, device=setting.device)
        self.optimizer = None
        if self.trains:
            trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            self.optimizer = torch.optim.AdamW(trained, lr=1e-5)

    def forward(self) -> torch.Tensor:
        """The loss, or the logits of an inference."""
        with self.autocast, torch.set_grad_enabled(self.trains):
            logits = self.model(self.images)
            return F.cross_entropy(logits.float(), self.labels) if self.trains else logits

    def run(self) -> None:
        """A step or an inference."""
        result = self.forward()
        if self.trains:
            self.scaler.scale(result).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()

    def kept(self) -> int:
        """Bytes kept for backward."""
        given = {tensor.untyped_storage().data_ptr() for tensor in (self.images, self.labels)}
        return saved_bytes(self.forward, storages(self.model) | given)[0]


def measure(backbone: Backbone, precision: str, name: str, compile_model, title: str, setting: Setting) -> dict:
    """Numbers of one case, from which the table is made.

    Raises:
        ArithmeticError: the loss or the logits are not finite after the steps.
    """
    step = Step(backbone, precision, name, setting, compile_model)
    before = time.perf_counter()
    step.run()
    setting.wait()
    first = time.perf_counter() - before
    kept = step.kept() if step.trains else 0
    for _ in range(1 if setting.tiny else 2):
        step.run()
    setting.wait()
    loaded = torch.cuda.memory_allocated() if setting.on_gpu else 0
    if setting.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(2 if setting.tiny else setting.rounds):
        before = time.perf_counter()
        step.run()
        setting.wait()
        seconds.append(time.perf_counter() - before)
    peak = torch.cuda.max_memory_allocated() - loaded if setting.on_gpu else None
    if not torch.isfinite(step.forward()).all():
        raise ArithmeticError("what is computed after the steps is not finite")
    middle = statistics.median(seconds)
    return {
        "backbone": backbone.title,
        "precision": precision,
        "case": title,
        "batch": backbone.batch_size,
        "seconds": middle,
        "fastest": min(seconds),
        "slowest": max(seconds),
        "images per second": backbone.batch_size / middle,
        "first step": first,
        "kept, MiB": kept / MIB,
        "peak, MiB": None if peak is None else peak / MIB,
        "loaded, MiB": loaded / MIB,
    }
