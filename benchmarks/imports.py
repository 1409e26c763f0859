"""What importing costs: process CPU time of fresh processes that take turns, as ratios to `import timm`.

python benchmarks/imports.py --rounds 5
python benchmarks/imports.py --rounds 5 --beside ../another-checkout     # and the same of another version
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from measuring import table

HERE = Path(__file__).parents[1]
USE = "import visionpeft as vp; vp.attach, vp.LoRA, vp.save, vp.merge, vp.summary"
CASES = {
    "import timm": ["-c", "import timm"],
    "import visionpeft": ["-c", "import visionpeft"],
    "import visionpeft and use attach, LoRA, save, merge, summary": ["-c", USE],
    "python -m visionpeft.fit --help": ["-m", "visionpeft.fit", "--help"],
    "python -m visionpeft.fit with a wrong option": [
        *("-m", "visionpeft.fit", "--config", "vtab_vpt.yaml", "--model.lr", "1"),
    ],
}


def seconds(arguments: list[str], checkout: Path) -> float:
    """CPU seconds of a process of its own."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, *arguments],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(checkout.resolve()), "OMP_NUM_THREADS": "1"},
            capture_output=True,
        )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="processes of each case (5)")
    parser.add_argument("--beside", type=Path, help="another checkout, measured in the same turns")
    options = parser.parse_args()
    checkouts = {"this": HERE} | ({"beside": options.beside} if options.beside else {})
    times = {(name, case): [] for case in CASES for name in checkouts}
    for _ in range(options.rounds):
        for (name, case), measured in times.items():
            measured.append(seconds(CASES[case], checkouts[name]))
    timm = times["this", "import timm"]
    rows = []
    for (name, case), measured in times.items():
        ratios = sorted(value / reference for value, reference in zip(measured, timm, strict=True))
        rows.append(
            {
                "case": case if name == "this" else f"{case} ({options.beside})",
                "CPU s": f"{statistics.median(measured):.2f}",
                "/ import timm": f"{statistics.median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]",
            }
        )
    print(table(rows))


if __name__ == "__main__":
    main()
