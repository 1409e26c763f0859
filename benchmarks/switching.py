"""What switching adapters, routing a batch and loading adapters costs, in CPU time of this process.

    python benchmarks/switching.py --model vit_base_patch16_224 --adapters 100

Prints a table in Markdown: milliseconds to enter and leave `use` and `route`, this with gradients and without, with
adapters that have acted before, the median of `--rounds`; then the seconds in which many saved adapters are loaded into
one model that has none.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import timm
import torch
from measuring import clock

import visionpeft as vp


def median_ms(action, rounds: int) -> float:
    """Median duration in milliseconds, after one call to warm up."""
    action()
    durations = []
    for _ in range(rounds):
        start = clock("cpu")
        action()
        durations.append(1000 * (clock("cpu") - start))
    return statistics.median(durations)


def switching(name: str, method: vp.Method, rounds: int) -> tuple[float, float, float]:
    """Milliseconds to enter and leave `use` without adapters, and `route` over two of them and none."""
    model = timm.create_model(name, num_classes=100).eval()
    for each in ("a", "b"):
        vp.attach(model, method, each)
    vp.activate(model, "a")
    # prompts make rows longer, so that none of them may go without
    names = ["a", "b"] * 4 if isinstance(method, vp.VPT) else ["a", "b", None, "a"] * 2

    def use() -> None:
        with vp.use(model, None):
            pass

    def route() -> None:
        with vp.route(model, names):
            pass

    return median_ms(use, rounds), median_ms(route, rounds), median_ms(torch.no_grad()(route), rounds)


def loading(name: str, number: int) -> float:
    """Seconds to load so many saved adapters of LoRA of rank 8 into one model."""
    with tempfile.TemporaryDirectory() as folder:
        trained = timm.create_model(name, num_classes=100).eval()
        state = trained.state_dict()
        vp.attach(trained, vp.LoRA(rank=8))
        for index in range(number):
            vp.save(trained, Path(folder) / str(index))
        model = timm.create_model(name, num_classes=100).eval()
        model.load_state_dict({key: state[key] for key in model.state_dict()})
        start = clock("cpu")
        for index in range(number):
            vp.load(model, Path(folder) / str(index), name=f"adapter {index}")
        return clock("cpu") - start


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_base_patch16_224", help="name of a timm model")
    parser.add_argument("--rounds", type=int, default=50, help="repetitions of each switch")
    parser.add_argument("--adapters", type=int, default=100, help="adapters to load, 0 for none")
    options = parser.parse_args()
    torch.manual_seed(0)
    print(f"| {options.model}, ms | use | route | without gradients |\n| --- | ---: | ---: | ---: |", flush=True)
    for label, method in {"LoRA r8": vp.LoRA(rank=8), "VPT-deep, 10": vp.VPT(num_tokens=10)}.items():
        use, *routes = switching(options.model, method, options.rounds)
        print(f"| {label} | {use:.2f} | {' | '.join(f'{each:.2f}' for each in routes)} |", flush=True)
    if options.adapters:
        print(f"\n{options.adapters} adapters of LoRA r8 load in {loading(options.model, options.adapters):.1f} s")


if __name__ == "__main__":
    main()
