"""Methods on a real pretrained ViT: clip art and rendered sprites at 112 pixels, each with the best of three rates.

The backbone is `dinov2_small_focus`, made by `python -m visionpeft.prepare backbone dinov2_small`. Every method has the
same trials: AdamW with three learning rates, chosen on validation with one seed, then three seeds trained on train and
validation and tested after the last epoch. What the linear probe chooses on a task is the rate of the head of all other
methods there. All by the protocol `vtab1k` of the package, so that what is finished is kept, what was interrupted goes
on, and several machines may share the folder. Of methods that are in `results/real_backbone.csv` nothing is trained.

    TIMM_FUSED_ATTN=0 nice python benchmarks/real_backbone.py --output runs/real_backbone
    python benchmarks/real_backbone.py --output runs/real_backbone --write    # the file, the table in docs, the picture

A training takes two to ten CPU minutes, and there are six of a method on a task. Attention written as products is a
quarter of a training faster here (findings/torch_attention_backward_in_bfloat16_is_slow_on_a_cpu.sh). What is kept
and the time of a step are measured when the table is written.
"""

import argparse
import csv
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from measuring import clock, filled, kept_rows, table

from visionpeft import protocol
from visionpeft.costs.saved_bytes import saved_bytes, storages
from visionpeft.protocols.method_candidates import configs_of_methods
from visionpeft.protocols.method_protocols import collect
from visionpeft.runs.cli import CLI

PAGE = Path(__file__).parents[1] / "docs/results.md"
PICTURE = Path(__file__).parents[1] / "docs/pictures/real_backbone.png"
KEPT = Path(__file__).parent / "results/real_backbone.csv"
FIELDS = ["task", "method", "seed", "top1", "hyper_parameters", "adapter_parameters"]
TASKS = {"clipart": "clip art", "dsprites_loc": "dsprites_loc"}
FIRST = [
    "linear_probe",
    "lora",
    "vpt",
    "ssf",
    "adaptformer",
    "bitfit",
    "adapter_plus",
    "vpt_shallow",
    "layer_norm_tuning",
    "convpass",
    "dora",
    "ia3",
]
ALL = [config.removeprefix("vtab_").removesuffix(".yaml") for config in configs_of_methods(["all"], "vtab_")]
METHODS = [*FIRST, *(name for name in ALL if name not in FIRST)]
HEAD = "linear_probe"
HEAD_RATES = ["2e-3", "8e-3", "3.2e-2"]
RATES = ["5e-4", "2e-3", "8e-3"]
OPTIONS = {
    "model.backbone": "dinov2_small_focus",
    "model.backbone_kwargs": "{img_size: 112}",
    "model.optimisation.optimizer": "adamw",  # some recipes have SGD, for which these are no learning rates
    "model.optimisation.scale_lr_by_batch": "null",
    "model.optimisation.weight_decay": "1e-4",
    "model.optimisation.warmup_epochs": "1",
    "trainer.max_epochs": "10",
    "trainer.precision": "bf16-mixed",
    "trainer.accelerator": "cpu",
    "data.batch_size": "32",
    "data.test_batch_size": "100",
    "data.test_samples": "1000",
}
SETTINGS = [part for option, value in OPTIONS.items() for part in (f"--{option}", value)]
SEEDS = 3
ROUNDS = 5


class Step:
    """A training step of a method as `fit` makes it, on 16 images.

    Args:
        config: configuration of the method.
    """

    def __init__(self, config: str):
        self.task = CLI(["--config", config, *SETTINGS]).model
        size, classes = self.task.preprocessing.input_size, len(self.task.class_names)
        torch.manual_seed(0)
        self.images, self.labels = torch.randn(16, 3, *size), torch.arange(16) % classes
        self.task.train()
        trained = [parameter for parameter in self.task.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5)

    def forward(self) -> None:
        """A forward pass of the network in which nothing is kept."""
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            self.task.model(self.images)

    def kept(self) -> int:
        """Bytes that are kept for the backward pass, for each image."""
        with torch.autocast("cpu", torch.bfloat16):
            kept, _ = saved_bytes(lambda: self.task.training_loss(self.images, self.labels)[0], storages(self.task))
        return kept // len(self.images)

    def run(self) -> None:
        """Forward, backward and optimiser."""
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = self.task.training_loss(self.images, self.labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


@dataclass(frozen=True)
class Costs:
    """Of a training step.

    Args:
        kept: bytes that are kept for the backward pass, for each image.
        step: CPU time in forward passes of the frozen backbone.
    """

    kept: int
    step: float


def costs(configs: dict[str, str]) -> dict[str, Costs]:
    """Costs of a step of each method, the median of interleaved turns."""
    steps = {name: Step(config) for name, config in configs.items()}
    frozen = Step(config_of("linear_probe"))
    frozen.task.eval()
    ratios: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(ROUNDS + 1):
        before = clock("cpu")
        frozen.forward()
        forward = clock("cpu") - before
        for name, step in steps.items():
            before = clock("cpu")
            step.run()
            if turn:  # the first warms up
                ratios[name].append((clock("cpu") - before) / forward)
    return {name: Costs(steps[name].kept(), statistics.median(found)) for name, found in ratios.items()}


def lines(rows: list[dict], cost: dict[str, Costs]) -> list[dict]:
    """A line for each method that is done on a task."""
    found = []
    for method in METHODS:
        own = [row for row in rows if row["method"] == method]
        line = {"method": method}
        for task, words in TASKS.items():
            of_task = [row for row in own if row["task"] == task]
            scores = [100 * row["top1"] for row in of_task]
            line[words] = (
                f"{statistics.mean(scores):.1f} ± {statistics.pstdev(scores):.1f} ({rate_of(of_task[0]):g})"
                if scores
                else ""
            )
        if own:
            line["trained, without head"] = f"{own[0]['adapter_parameters']:,}"
            line["kept, MiB an image"] = f"{cost[method].kept / 2**20:.1f}"
            line["step"] = f"{cost[method].step:.2f}"
            found.append(line)
    return found


def draw(rows: list[dict], cost: dict[str, Costs]) -> None:
    """The picture on the front page: accuracy on clip art, with its deviation, against what a method costs."""
    scores = {
        method: [100 * row["top1"] for row in rows if (row["task"], row["method"]) == ("clipart", method)]
        for method in cost
    }
    trained = {row["method"]: row["adapter_parameters"] for row in rows}
    figure = Figure(figsize=(11, 4.3), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    draw_against(panels[0], scores, trained, "trained parameters, without the head")
    panels[0].set_xscale("symlog", linthresh=2000)
    panels[0].set_xlim(-400, 1e6)
    panels[0].set_ylabel("test accuracy on clip art (%)")
    kept = {method: each.kept / 2**20 for method, each in cost.items()}
    draw_against(panels[1], scores, kept, "MiB kept for the backward pass, for each image")
    figure.suptitle("DINOv2 ViT-S/14 (dinov2_small_focus), 112 px, the best of three rates, three seeds with deviation")
    figure.savefig(PICTURE, dpi=110)


def draw_against(axes: Axes, scores: dict[str, list[float]], costs: dict[str, float], label: str) -> None:
    """A point with its deviation and its name for each method."""
    means = {method: statistics.mean(found) for method, found in scores.items() if found}
    for method, mean in means.items():
        axes.errorbar(
            costs[method], mean, statistics.pstdev(scores[method]), fmt="o", color="C1", ecolor="0.6", capsize=3
        )
        # The name stands on the side where no other point of about the same height is near.
        level = [costs[other] for other in means if other != method and abs(means[other] - mean) < 1]
        nearest = min(level, key=lambda cost: abs(cost - costs[method]), default=max(costs.values()))
        at_edge = costs[method] < 0.05 * max(costs.values())
        side, align = (-1, "right") if nearest > costs[method] and not at_edge else (1, "left")
        axes.annotate(method, (costs[method], mean), (5 * side, 4), textcoords="offset points", size=8, ha=align)
    axes.set_xlabel(label)
    axes.margins(x=0.2)
    axes.grid(alpha=0.3)


def train(output: Path, task: str, method: str, rates: list[str], more: Sequence[str] = ()) -> None:
    """Train what is missing of a method on a task; the protocol has a folder for each choice of rates."""
    if not kept(task, method):
        folder = output / task / ("head" if method == HEAD else "methods")
        where = ["--output", str(folder), "--tasks", task, "--configs", config_of(method)]
        if code := protocol.main(["vtab1k", *where, "--learning_rates", *rates, *SETTINGS, *more]):
            raise SystemExit(code)


def kept(task: str, method: str) -> list[dict]:
    """The rows that were finished on another machine."""
    numbers = {"top1": float, "adapter_parameters": int}
    rows = kept_rows(KEPT, task=task, method=method)
    return [row | {name: of(row[name]) for name, of in numbers.items()} for row in rows]


def finished(output: Path, task: str) -> dict[str, list[dict]]:
    """The rows of the methods of which all seeds are done."""
    new = [row for folder in ("head", "methods") for row in collect(output / task / folder)]
    found = {method: kept(task, method) or [row for row in new if row["method"] == method] for method in METHODS}
    return {method: rows for method, rows in found.items() if len(rows) == SEEDS}


def rate_of(row: dict) -> float:
    """The learning rate that was chosen."""
    (rate,) = json.loads(row["hyper_parameters"]).values()
    return rate


def config_of(method: str) -> str:
    """Its shipped configuration."""
    return f"vtab_{method}.yaml"


def main() -> None:
    """Train what is missing, or write the table of what is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/real_backbone"), help="folder of the protocol")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="METHOD")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=[*TASKS], metavar="TASK")
    parser.add_argument(
        "--write", action="store_true", help="only keep what is done, and put the table into docs/results.md"
    )
    options = parser.parse_args()
    if not options.write:
        for task in options.tasks:
            train(options.output, task, HEAD, HEAD_RATES, ["--model.cache", "memory"])  # the same numbers, sooner
            head = ["--model.optimisation.head_lr", str(rate_of(finished(options.output, task)[HEAD][0]))]
            for method in options.methods:  # one by one: a method is done early
                if method != HEAD:
                    train(options.output, task, method, RATES, head)
        return
    rows = [row for task in TASKS for some in finished(options.output, task).values() for row in some]
    with KEPT.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    methods = [method for method in METHODS if any(row["method"] == method for row in rows)]
    measured = costs({method: config_of(method) for method in methods})
    draw(rows, measured)
    made = table(lines(rows, measured))
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), "real_backbone", made), encoding="utf-8")


if __name__ == "__main__":
    main()
