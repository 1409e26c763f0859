"""What it costs to send the rows of a batch through different adapters, against the plain backbone.

    python benchmarks/routing.py --model vit_small_patch16_224 --repetitions 30

Every repetition runs all variants one after another in one process, on one thread; the CPU time of each of them is
divided by that of the plain forwards around it. Prints a table in Markdown: the median of these ratios over
the repetitions with the quartiles, and the ratio of the fastest runs, which is what other work on the machine disturbs
least. Adapters have random weights. With `--peft` the same batch also goes through Hugging Face PEFT's `adapter_names`,
if it is installed.
"""

import argparse
import contextlib
import signal
import statistics
from collections.abc import Callable

import timm
import torch
from measuring import clock

import visionpeft as vp

METHODS = {
    "LoRA 8 on q and v": vp.LoRA(rank=8),
    "VPT-deep, 10": vp.VPT(num_tokens=10, deep=True),
    "AdaptFormer 8": vp.AdaptFormer(bottleneck=8),
    "SSF": vp.SSF(),
}


def adapted(name: str, method: vp.Method, number: int, **options) -> torch.nn.Module:
    """A model with so many adapters, none of which acts, with random weights and without heads of their own."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=100, **options).eval()
    for index in range(number):
        vp.attach(model, method, f"n{index}", head=False)
        with torch.no_grad():
            for parameter in model.peft[f"n{index}"].parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        vp.disable(model)
    return model


def routed(model: torch.nn.Module, names: list[str], images: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A forward within a route that is opened for it."""

    def run() -> torch.Tensor:
        with vp.route(model, names):
            return model(images)

    return run


def by_peft(name: str, number: int, batch: int, images: torch.Tensor, **options) -> Callable[[], torch.Tensor]:
    """The same with PEFT's mixed batches, of LoRA on the rows of q, k and v together, which it cannot tell apart."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=8, target_modules=["qkv"], init_lora_weights=False)
    model = get_peft_model(timm.create_model(name, num_classes=100, **options).eval(), config, adapter_name="n0")
    for index in range(1, number):
        model.add_adapter(f"n{index}", config)
    model.eval()
    names = [f"n{index % number}" for index in range(batch)]
    return lambda: model(images, adapter_names=names)


@torch.inference_mode()
def measure(variants: dict[str, Callable], repetitions: int) -> dict[str, tuple[list[float], float]]:
    """For each variant its ratios to the runs of "plain" around it, and the ratio of the fastest runs.

    "plain" runs before every third variant and after the last. An interrupt ends the measurement early.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    ratios: dict[str, list[float]] = {name: [] for name in variants if name != "plain"}

    def timed(name: str) -> float:
        start = clock("cpu")
        variants[name]()
        seconds[name].append(clock("cpu") - start)
        return seconds[name][-1]

    for run in variants.values():
        run()
    with contextlib.suppress(KeyboardInterrupt):
        for _ in range(repetitions):
            before = timed("plain")
            for few in ([*ratios][index : index + 3] for index in range(0, len(ratios), 3)):
                own = [timed(name) for name in few]
                after = timed("plain")
                for name, each in zip(few, own, strict=True):
                    ratios[name].append(2 * each / (before + after))
                before = after
    return {name: (each, min(seconds[name]) / min(seconds["plain"])) for name, each in ratios.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_small_patch16_224", help="name of a timm model")
    parser.add_argument("--depth", type=int, help="so many of its blocks, which are alike; by default all")
    parser.add_argument("--batch-size", type=int, default=16, help="images in a batch")
    parser.add_argument("--repetitions", type=int, default=30, help="runs of each variant")
    parser.add_argument("--attached", type=int, default=256, help="adapters of LoRA for one variant, 0 for none")
    parser.add_argument("--peft", action="store_true", help="run PEFT, too")
    parser.add_argument("--only", default="", help="variants whose name contains this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a process in the background does not have
    depth = {} if options.depth is None else {"depth": options.depth}
    batch = options.batch_size
    plain = adapted(options.model, METHODS["SSF"], 0, **depth)
    images = torch.randn(batch, 3, *plain.patch_embed.img_size)
    variants: dict[str, Callable] = {}
    for label, method in METHODS.items():
        model = adapted(options.model, method, batch, **depth)
        for number in (batch, 4) if isinstance(method, vp.LoRA) else (batch,):
            names = [f"n{index % number}" for index in range(batch)]
            variants[f"{label}: {number} adapters"] = routed(model, names, images)
    if options.attached:
        model = adapted(options.model, METHODS["LoRA 8 on q and v"], options.attached, **depth)
        names = [f"n{index * options.attached // batch}" for index in range(batch)]
        variants[f"LoRA 8 on q and v: {batch} of {options.attached} attached adapters"] = routed(model, names, images)
    if options.peft:
        for number in (batch, 4):
            variants[f"PEFT, LoRA 8 on qkv: {number} adapters"] = by_peft(options.model, number, batch, images, **depth)
    variants = {name: run for name, run in variants.items() if options.only in name}
    found = measure({"plain": lambda: plain(images)} | variants, options.repetitions)
    done = len(next(iter(found.values()))[0])
    print(f"| {options.model}, batch {batch}, {done} repetitions | median [quartiles] / plain | fastest / plain |")
    print("| --- | ---: | ---: |")
    for name, (ratios, fastest) in found.items():
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        print(f"| {name} | {middle:.3f} [{low:.3f}, {high:.3f}] | {fastest:.3f} |", flush=True)


if __name__ == "__main__":
    main()
