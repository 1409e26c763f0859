"""What training a method on a backbone costs, measured on random images."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import nn

from visionpeft.adapters.allocate import allocate
from visionpeft.adapters.attach import attach
from visionpeft.adapters.merge import merge, unmerge
from visionpeft.adapters.stages import check_last_stage
from visionpeft.adapters.storage import save
from visionpeft.adapters.switch import use
from visionpeft.adapters.trained import trainable_parameters
from visionpeft.backbones.preprocessing import preprocessing_of
from visionpeft.costs.counts import Summary, summary
from visionpeft.costs.multiply_adds import giga_multiply_adds
from visionpeft.costs.saved_bytes import saved_bytes, storages
from visionpeft.errors import UnsupportedError
from visionpeft.methods import Method


@dataclass(frozen=True)
class MethodCost:
    """What a step on a batch of images costs, and what comes out of it.

    Args:
        counts: trained values, site by site.
        batch_size: images in a batch.
        gflops: giga multiply-adds of the forward of one image in matrix products and convolutions.
        backbone_gflops: those of the backbone without the method.
        saved: bytes kept for backward in a step, without parameters and images.
        step: seconds of forward, backward and AdamW.
        forward: seconds of the forward of the backbone without the method and without gradients.
        file: bytes of the saved adapter with its head.
        merged: "yes", or why the method cannot be merged.
        device: where it was measured.
    """

    counts: Summary
    batch_size: int
    gflops: float
    backbone_gflops: float
    saved: int
    step: float
    forward: float
    file: int
    merged: str
    device: str

    def __rich__(self) -> Table:
        share = 100 * self.counts.trainable / self.counts.total
        rows = {
            "trained values": f"{self.counts.trainable:,} ({share:.2f} %), {self.counts.adapter:,} without the head",
            "multiply-adds of an image": f"{self.gflops:.2f} G, backbone alone {self.backbone_gflops:.2f} G",
            f"kept for backward, batch of {self.batch_size}": f"{self.saved / 2**20:,.1f} MiB",
            f"step, batch of {self.batch_size}": f"{self.step:.3f} s on {self.device}, "
            f"{self.step / self.forward:.2f} forwards of the backbone",
            "saved file": f"{self.file / 2**20:.2f} MiB",
            "mergeable": self.merged,
        }
        table = Table(title=self.counts.backbone, show_header=False)
        for name, value in rows.items():
            table.add_row(name, value)
        return table


def measure(
    model: nn.Module,
    method: Method | Sequence[Method],
    *,
    batch_size: int = 8,
    rounds: int = 3,
    device: str = "cpu",
) -> MethodCost:
    """Attach a method and measure it; the model keeps it. One that chooses by data is shown the random images.

    Times are medians over rounds in which the step and the frozen forward take turns: process CPU time on a CPU, which
    other programs hardly disturb, wall time on a GPU.

    Args:
        model: a backbone with a head, without adapters.
        method: one method, or several that are stacked.
        batch_size: images in a batch.
        rounds: measurements of the times.
        device: where to measure.
    """
    attach(model.to(device).eval(), method)
    check_last_stage(model.peft["default"])
    model.peft.train()  # as a task does: the frozen rest stays in evaluation mode
    images = torch.randn(batch_size, 3, *preprocessing_of(model).input_size, device=device)
    labels = torch.zeros(batch_size, dtype=torch.long, device=device)
    if model.peft["default"].pending:
        allocate(model, [(images, labels)])
    trained = trainable_parameters(model)
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0) if trained else None

    def step() -> torch.Tensor:
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    saved, _ = saved_bytes(step, storages(model) | {images.untyped_storage().data_ptr()})  # warms up, too
    gflops = giga_multiply_adds(model, images[:1])
    with use(model, None):
        backbone_gflops = giga_multiply_adds(model, images[:1])
    steps, forwards = [], []
    for _ in range(rounds):
        steps.append(seconds(step, device))
        with use(model, None), torch.no_grad():
            forwards.append(seconds(lambda: model(images), device))
    return MethodCost(
        counts=summary(model),
        batch_size=batch_size,
        gflops=gflops,
        backbone_gflops=backbone_gflops,
        saved=saved,
        step=statistics.median(steps),
        forward=statistics.median(forwards),
        file=_file_bytes(model),
        merged=_merged(model),
        device=device,
    )


def seconds(run: Callable[[], object], device: str) -> float:
    """Seconds of a call: of this process on "cpu", which other programs hardly disturb, else of the clock."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    if device != "cpu":
        torch.cuda.synchronize()
    before = clock()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - before


def _file_bytes(model: nn.Module) -> int:
    with TemporaryDirectory() as folder:
        save(model, folder)
        return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


def _merged(model: nn.Module) -> str:
    try:
        unmerge(merge(model))
    except UnsupportedError as error:
        return f"no: {error}"
    return "yes"
