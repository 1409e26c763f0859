"""What `torch.compile` makes of a training step: time, bytes kept for backward, seconds of compiling; ours and HF peft.

The cases are those of `adaptation.py`: as they are, compiled by PyTorch's defaults, and ours also as `--model.compile
true` of `fit` compiles them, which computes cheap results again in the backward pass. All take turns.

    python benchmarks/compiled.py --models vit_small_patch16_224 --batch-size 4 --rounds 3
    python benchmarks/compiled.py --device cuda --precisions bfloat16 --batch-size 64 --rounds 10
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from adaptation import MIB, STEPS, Case
from measuring import clock, table, write
from torch._inductor.utils import fresh_cache

from visionpeft.tasks.compiling import compile_in_place

CASES = ["LoRA r8 on all linears", "HF peft LoRA r8 on all linears", "VPT-deep, 10 prompts", "SSF"]


class Compiled(Case):
    """A case whose model is compiled by PyTorch's defaults.

    Attributes:
        compiling: seconds of the first step above those of a later one, by the clock; set by `warm_up`.
    """

    how = ", torch.compile"
    compiling: float | None = None

    def __init__(self, *args):
        super().__init__(*args)
        self.compile()

    def compile(self) -> None:
        """Compile the model in place."""
        self.model.compile(fullgraph=True, isolate_recompiles=True)

    def warm_up(self) -> None:
        """The step in which the compiler runs, and one more."""
        seconds = []
        with fresh_cache():  # the compiler would find what it made in an earlier run
            for _ in range(2):
                before = time.perf_counter()
                self.run()
                clock(self.images.device.type)
                seconds.append(time.perf_counter() - before)
        self.compiling = seconds[0] - seconds[1]


class CompiledByFit(Compiled):
    """A case whose model is compiled as `fit` does it."""

    how = ", --model.compile true"

    def compile(self) -> None:
        """Compile the model in place."""
        compile_in_place(self.model)


def kinds(name: str) -> list[type[Case]]:
    """How a case is run."""
    return [Case, Compiled] if name.startswith(("HF peft", "full")) else [Case, Compiled, CompiledByFit]


def measure(model: str, precision: str, args: argparse.Namespace) -> list[dict]:
    """The rows of one backbone in one precision."""
    options = (model, precision, args.batch_size, args.device)
    forward = Case("frozen forward", *options)
    cases = [kind(name, *options) for name in args.only for kind in kinds(name)]
    for case in [forward, *cases]:
        if isinstance(case, Compiled):
            case.warm_up()
        else:
            case.run()
    saved = [case.saved() for case in cases]
    for _ in range(args.rounds):
        for case in [forward, *cases]:
            before = clock(args.device)
            case.run()
            case.seconds.append(clock(args.device) - before)
    rows = []
    for case, kept in zip(cases, saved, strict=True):
        ratios = [own / other for own, other in zip(case.seconds, forward.seconds, strict=True)]
        compiling = getattr(case, "compiling", None)
        rows.append(
            {
                "case": case.name + getattr(case, "how", ""),
                "backbone": model,
                "precision": precision,
                "seconds": f"{statistics.median(case.seconds):.3f}",
                "/ frozen forward": f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]",
                "kept, MiB": f"{kept / MIB:.1f}",
                "to compile, seconds": "" if compiling is None else f"{compiling:.0f}",
            }
        )
    return rows


def main() -> None:
    """Measure every backbone in every precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vit_small_patch16_224"])
    parser.add_argument("--precisions", nargs="+", choices=["float32", "bfloat16"], default=["float32"])
    parser.add_argument("--only", nargs="+", choices=list(STEPS), default=[name for name in CASES if name in STEPS])
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("results"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    rows = []
    for model in args.models:
        for precision in args.precisions:
            rows += measure(model, precision, args)
            write(args.output / "compiled.csv", rows)
    print(table(rows))


if __name__ == "__main__":
    main()
