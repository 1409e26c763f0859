"""Everything that is to be known on a GPU, in one run of at most so many minutes, which a later run continues.

In order of worth: every method against float64 on the CPU, in float32, bfloat16 and float16 with a scaled loss; how
often the host waits for the device; step time, images per second and peak memory of ViT-B/16, of CLIP's ViT-L/14 and of
a ViT of 1 billion parameters, beside HF peft, full fine-tuning, a linear probe and the frozen forward; every learner as
every method; mixed batches; the text side of learners; other precisions; compiled models.

Each cell is written to `gpu.json` as soon as it is measured, and not measured again; one that fails is written with its
error, and tried again by the next run. The exit code is 0 if all is measured and right, 1 if a cell failed, and 3 if
the time was not enough for all.

    python benchmarks/gpu.py --minutes 8 --docs docs/performance.md
    python benchmarks/gpu.py --device cpu --tiny   # that everything runs, in seconds, without a GPU
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from gpu_cells import exactness, serving, steps, waiting
from gpu_cells.running import Cell, Journal, Setting, machine, run
from gpu_cells.tables import filled, page


def cells(setting: Setting) -> list[Cell]:
    """All of them, in order of worth."""
    return [
        *exactness.cells(setting),
        *waiting.cells(setting),
        *steps.cells(setting),
        *exactness.learner_cells(setting),
        *waiting.learner_cells(setting),
        *serving.cells(setting),
        *steps.further_cells(setting),
        *steps.compiled_cells(setting),
    ]


def main(arguments: list[str] | None = None) -> int:
    """Measure, write, and say how it went."""
    start = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="most time of this run; a later one goes on")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="sizes that take a CPU seconds")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--only", nargs="+", help="beginnings of names of cells; by default all")
    parser.add_argument("--output", type=Path, default=Path("results"))
    parser.add_argument("--docs", type=Path, help="a page in which the tables are written between their marks")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("this machine has no usable CUDA GPU; --device cpu --tiny shows that everything runs")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # float32 is to be float32
    setting = Setting(args.device, args.tiny, args.rounds)
    args.output.mkdir(parents=True, exist_ok=True)
    journal = Journal(args.output / "gpu.json", machine(setting))
    chosen = [cell for cell in cells(setting) if not args.only or cell.name.startswith(tuple(args.only))]
    unfinished = run(chosen, journal, setting, 60 * args.minutes - (time.monotonic() - start))
    tables = page(journal, unfinished)
    (args.output / "gpu.md").write_text(tables)
    if args.docs is not None:
        args.docs.write_text(filled(args.docs.read_text(), tables))
    failed = [cell.name for cell in chosen if cell.name in journal.failed()]
    print(
        f"{len(chosen) - len(failed) - len(unfinished)} measured, {len(failed)} failed, {len(unfinished)} not reached"
    )
    return 1 if failed else 3 if unfinished else 0


if __name__ == "__main__":
    sys.exit(main())
