"""What adapting a ViT costs: step time, bytes kept for backward, peak memory; ours, HF peft and full fine-tuning.

A step is forward, cross-entropy, backward and AdamW on one batch of images and 100 classes, in train mode; inference is
a forward without gradients. All cases of a backbone take turns, and ratios to the forward of the frozen backbone are
taken turn by turn: their median [least, most]. On a CPU, seconds are of this process's CPU time. "D" is one float32
tensor as wide as the tokens for each block. "peak" is how far two steps in a fresh process go above the loaded model.

    python benchmarks/adaptation.py --models vit_base_patch16_224 --batch-size 4 --rounds 3 --peak
    python benchmarks/adaptation.py --device cuda --precisions float32 bfloat16 --batch-size 32 --rounds 10 --peak
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from measuring import clock, saved_bytes, storages, table, write
from torch import nn

import visionpeft as vp

try:
    import peft
except ImportError:
    peft = None

CLASSES = 100
EVERY_MATRIX = ("q", "k", "v", "proj", "fc1", "fc2")
MIB = 2**20


def plain(name: str) -> nn.Module:
    """The backbone as timm makes it, frozen."""
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=CLASSES).requires_grad_(False)


def attached(method: vp.Method) -> Callable[[str], nn.Module]:
    """Makes the backbone with one of our methods, following every token to the end as the library does."""
    return lambda name: vp.attach(plain(name), method)


def adapted(method: vp.Method) -> Callable[[str], nn.Module]:
    """Makes the backbone with one of our methods as `fit` does by default: in the last block the class token alone."""
    return lambda name: vp.economise(attached(method)(name), class_token_only=True)


def full(name: str) -> nn.Module:
    """The backbone with everything trained, as timm makes it."""
    return plain(name).requires_grad_(True)


def sited(name: str) -> nn.Module:
    """The backbone with its blocks in their sited form, at whose sites nothing acts."""
    return vp.economise(vp.attach(plain(name), vp.LinearProbe()), recompute="mlp")


def merged(name: str) -> nn.Module:
    """The backbone with a LoRA merged into it."""
    return vp.merge(vp.attach(plain(name), vp.LoRA(rank=8, targets=EVERY_MATRIX)))


def hf_peft(*targets: str) -> Callable[[str], nn.Module]:
    """Makes the backbone with HF peft's LoRA."""

    def make(name: str) -> nn.Module:
        config = peft.LoraConfig(r=8, lora_alpha=8, target_modules=list(targets), modules_to_save=["head"])
        return peft.get_peft_model(plain(name), config)

    return make


INFERENCE: dict[str, Callable[[str], nn.Module]] = {
    "frozen forward": plain,
    "sited forward, nothing attached": sited,
    "LoRA r8 on all linears, merged": merged,
    "LoRA r8 on all linears, not merged": attached(vp.LoRA(rank=8, targets=EVERY_MATRIX)),
    "LoRA r8 on all linears, not merged, class token only": adapted(vp.LoRA(rank=8, targets=EVERY_MATRIX)),
}
STEPS: dict[str, Callable[[str], nn.Module]] = {
    "linear probe": adapted(vp.LinearProbe()),
    "full fine-tuning": full,
    "LoRA r8 on q k v": adapted(vp.LoRA(rank=8, targets=("q", "k", "v"))),
    "LoRA r8 on all linears": adapted(vp.LoRA(rank=8, targets=EVERY_MATRIX)),
    "LoRA r8 on all linears, every token to the end": attached(vp.LoRA(rank=8, targets=EVERY_MATRIX)),
    "VPT-deep, 10 prompts": adapted(vp.VPT(num_tokens=10, deep=True)),
    "VPT-deep, 50 prompts": adapted(vp.VPT(num_tokens=50, deep=True)),
    "SSF": adapted(vp.SSF()),
    "AdaptFormer-64": adapted(vp.AdaptFormer(bottleneck=64)),
    "VQT": adapted(vp.VQT()),
    "LST": adapted(vp.LST()),
    "DTL": adapted(vp.DTL(pooling="mean")),
    "DTL+": adapted(vp.DTL(convolution=True, pooling="mean")),
}
if peft is not None:
    INFERENCE["HF peft LoRA r8 on all linears, not merged"] = hf_peft("qkv", "attn.proj", "fc1", "fc2")
    STEPS["HF peft LoRA r8 on q k v"] = hf_peft("qkv")
    STEPS["HF peft LoRA r8 on all linears"] = hf_peft("qkv", "attn.proj", "fc1", "fc2")


class Case:
    """One line of the table."""

    def __init__(self, name: str, model: str, precision: str, batch_size: int, device: str):
        self.name = name
        self.trains = name in STEPS
        self.model = (STEPS | INFERENCE)[name](model).to(device).train(self.trains)
        self.autocast = torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16")
        torch.manual_seed(1)
        size = timm.get_pretrained_cfg(model).input_size
        self.images = torch.randn(batch_size, *size, device=device)
        self.labels = torch.arange(batch_size, device=device)
        self.optimizer = None
        if self.trains:
            parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            self.optimizer = torch.optim.AdamW(parameters, lr=1e-4)
        self.seconds: list[float] = []

    def forward(self) -> torch.Tensor:
        """The loss, or the logits of an inference."""
        with self.autocast, torch.set_grad_enabled(self.trains):
            logits = self.model(self.images)
            return F.cross_entropy(logits, self.labels) if self.trains else logits

    def run(self) -> None:
        """A step or an inference."""
        result = self.forward()
        if self.trains:
            result.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def saved(self) -> int:
        """Bytes kept for backward."""
        given = {tensor.untyped_storage().data_ptr() for tensor in (self.images, self.labels)}
        return saved_bytes(self.forward, storages(self.model) | given)[0]

    def peak(self) -> float:
        """MiB by which two steps go above the loaded model."""
        if self.images.is_cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.run()
            self.run()
            return (torch.cuda.max_memory_allocated() - before) / MIB
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of loading
        before = _resident("VmRSS")
        self.run()
        self.run()
        return _resident("VmHWM") - before


def _resident(kind: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(kind):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {kind}")


def peak_in_fresh_process(name: str, model: str, precision: str, args: argparse.Namespace) -> float:
    """`Case.peak` in a process of its own, whose freed memory goes back at once."""
    command = [sys.executable, __file__, "--models", model, "--precisions", precision, "--device", args.device]
    command += ["--batch-size", str(args.batch_size), "--threads", str(args.threads), "--peak-of", name]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def measure(model: str, precision: str, args: argparse.Namespace) -> list[dict]:
    """The rows of one backbone in one precision."""
    names = [name for name in (*INFERENCE, *STEPS) if not args.only or name in (*args.only, "frozen forward")]
    cases = [Case(name, model, precision, args.batch_size, args.device) for name in names]
    saved = {case.name: case.saved() for case in cases}  # warms up, too
    for case in cases:
        case.run()
    for _ in range(args.rounds):
        for case in cases:
            before = clock(args.device)
            case.run()
            case.seconds.append(clock(args.device) - before)
    reference = cases[0]
    blocks, tokens, width = len(reference.model.blocks), reference.model.pos_embed.shape[1], reference.model.embed_dim
    unit = blocks * args.batch_size * tokens * width * 4
    rows = []
    for case in cases:
        ratios = [own / other for own, other in zip(case.seconds, reference.seconds, strict=True)]
        row = {
            "case": case.name,
            "backbone": model,
            "precision": precision,
            "seconds": f"{statistics.median(case.seconds):.3f}",
            "/ frozen forward": f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]",
            "kept, D": f"{saved[case.name] / unit:.2f}",
            "kept, MiB": f"{saved[case.name] / MIB:.1f}",
        }
        if args.peak:
            row["peak, MiB"] = f"{peak_in_fresh_process(case.name, model, precision, args):.0f}"
        rows.append(row)
    return rows


def main() -> None:
    """Measure every backbone in every precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vit_small_patch16_224", "vit_base_patch16_224"])
    parser.add_argument("--precisions", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--only", nargs="+", help="names of cases; by default all")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peak", action="store_true", help="peak memory, too, each case in a process of its own")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=Path("results"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak_of:
        case = Case(args.peak_of, args.models[0], args.precisions[0], args.batch_size, args.device)
        print(json.dumps(case.peak()))
        return
    rows = []
    args.output.mkdir(parents=True, exist_ok=True)
    for model in args.models:
        for precision in args.precisions:
            rows += measure(model, precision, args)
            write(args.output / "adaptation.csv", rows)
            (args.output / "adaptation.md").write_text(table(rows) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
