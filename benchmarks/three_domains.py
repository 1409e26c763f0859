"""What several adapters are worth on three domains: clip art, drawings and the location of rendered sprites.

Compared are adapters trained on one domain alone; what is made of the finished adapters of all three (soup, LoRAHub,
MoLE, AdapterFusion, for each domain anew); and one training on all three at once. The data, and how it is treated, is
that of `multi_task_lora.yaml`; every training sees as many images of a domain, all with one recipe.

    nice python benchmarks/three_domains.py --output runs/three_domains
    python benchmarks/three_domains.py --output runs/three_domains --write    # the table, into docs/results.md

A cell that is done is kept, and a training that was interrupted goes on from its last epoch, so that the same command
may be given again. The table says of how many seeds it is made.
"""

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
import yaml
from measuring import filled

import visionpeft as vp
from visionpeft import fit
from visionpeft.errors import ConfigurationError
from visionpeft.files import write_json
from visionpeft.runs.cli import CLI
from visionpeft.runs.command import silence
from visionpeft.runs.config_files import config_content
from visionpeft.sharing.run_directory import RunDirectory

PAGE = Path(__file__).parents[1] / "docs/results.md"
CONFIG = "multi_task_lora.yaml"
DOMAINS = ("clipart", "drawings", "dsprites_loc")
TOGETHER = "together"
BATCHES = 4  # of 32 training images, on which LoRAHub compares weights


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Args:
        name: what it is called.
        kind: "alone" trains on one domain, "over" on one domain over the adapters of all, "together" on all at once;
            "soup" and "lorahub" train nothing by gradients.
        method: class of the method.
        options: its fields.
        sources: of those that are made of other adapters, the row that trained these.
    """

    name: str
    kind: str
    method: str = ""
    options: dict = field(default_factory=dict)
    sources: str = ""


ROWS = (
    Row("linear probe", "alone", "LinearProbe"),
    Row("LoRA", "alone", "LoRA", {"rank": 8}),
    Row("Adapter", "alone", "Adapter", {"bottleneck": 8}),
    Row("MoLORA", "alone", "MoLORA", {"experts": 3, "rank": 8, "alpha": 8, "targets": ["q", "v"]}),
    Row("MoV", "alone", "MoV", {"experts": 3}),
    Row("MixLoRA", "alone", "MixLoRA", {"experts": 3, "rank": 8, "alpha": 8}),
    Row("soup of the LoRAs", "soup", sources="LoRA"),
    Row("LoRAHub over the LoRAs", "lorahub", sources="LoRA"),
    Row("MoLE over the LoRAs", "over", "MoLE", sources="LoRA"),
    Row("AdapterFusion over the Adapters", "over", "AdapterFusion", sources="Adapter"),
    Row("LoRA, shared by all", TOGETHER, "LoRA", {"rank": 8}),
    Row("HyperFormer++", TOGETHER, "HyperFormer", {"bottleneck": 8}),
    Row("MoA over the LoRAs", TOGETHER, "MoA", sources="LoRA"),
    Row("MOELoRA", TOGETHER, "MOELoRA", {"experts": 3, "rank": 24, "alpha": 24, "dropout": 0.0}),
)
BY_NAME = {row.name: row for row in ROWS}
WORDS = {
    "alone": "one domain alone",
    "over": "each domain, over the adapters of all",
    "soup": "nothing further",
    "lorahub": "nothing further; 40 evaluations on 128 images",
    TOGETHER: "all domains together",
}


@dataclass(frozen=True)
class Bench:
    """Where the cells are, and how they are trained.

    Args:
        output: folder of all cells.
        epochs: of a training on one domain.
        size: of images, in pixels.
        lr: learning rate of all.
    """

    output: Path
    epochs: int
    size: int
    lr: float

    def folder(self, row: Row, domain: str, seed: int) -> Path:
        """That of a cell."""
        name = "".join(letter if letter.isalnum() else "_" for letter in row.name)
        return self.output / name / domain / f"seed_{seed}"

    def result(self, row: Row, domain: str, seed: int) -> dict[str, float] | None:
        """Test accuracy by domain of a cell that is done, None of another."""
        file = self.folder(row, domain, seed) / "top1.json"
        return json.loads(file.read_text()) if file.is_file() else None

    def adapter(self, row: Row, domain: str, seed: int) -> Path:
        """The adapter that a finished training has left."""
        return self.run(row, domain, seed).adapter

    def run(self, row: Row, domain: str, seed: int) -> RunDirectory:
        """The run of a training that is done."""
        (config,) = (self.folder(row, domain, seed) / "runs").glob("*/config.yaml")
        return RunDirectory(config.parent)

    def config(self, row: Row, domain: str, seed: int) -> dict:
        """The configuration of a training."""
        content = config_content(CONFIG)
        options = dict(row.options)
        if row.sources:
            options["adapters"] = [str(self.adapter(BY_NAME[row.sources], each, seed)) for each in DOMAINS]
        content["data"]["init_args"]["tasks"]["dsprites_loc"]["init_args"]["test_samples"] = 1000
        model = content["model"]["init_args"]
        model |= {
            "backbone_kwargs": {"img_size": self.size},
            "method": {"class_path": row.method, "init_args": options},
            "optimisation": {"optimizer": "adamw", "lr": self.lr, "weight_decay": 1e-4, "warmup_epochs": 1},
        }
        if domain != TOGETHER:
            data = content["data"]["init_args"]["tasks"][domain]
            data["init_args"] |= {"batch_size": 32}
            content["data"] = data
        else:
            content["data"]["init_args"]["batch_size"] = 32
        content["trainer"] = {"max_epochs": self.epochs, "accelerator": "auto", "limit_val_batches": 0}
        return content | {"seed_everything": seed, "figures": False, "report": "last"}

    def train(self, row: Row, domain: str, seed: int) -> dict[str, float]:
        """Train a cell, or go on, and give its test accuracies."""
        folder = self.folder(row, domain, seed)
        begun = [*(folder / "runs").glob("*/config.yaml")]
        if begun:
            arguments = ["--resume", str(begun[0].parent)]
        else:
            (folder / "cell.yaml").write_text(yaml.safe_dump(self.config(row, domain, seed), sort_keys=False))
            arguments = ["--config", str(folder / "cell.yaml"), "--output", str(folder / "runs")]
        if fit.main(arguments) != 0:
            raise SystemExit(f"{row.name} on {domain} with seed {seed} could not be trained")
        test = self.run(row, domain, seed).read_results()["test"]
        if domain != TOGETHER:
            return {domain: test["top1"]}
        return {each: test[f"{each}/top1"] for each in DOMAINS}

    def mix(self, row: Row, domain: str, seed: int) -> dict[str, float]:
        """Test accuracy of a soup or of what LoRAHub finds, with the head of the domain's own adapter."""
        source = BY_NAME[row.sources]
        silence()
        cli = CLI(["--config", str(self.folder(source, domain, seed) / "cell.yaml")])
        data, task = cli.datamodule, cli.model
        data.setup()
        task.load(self.adapter(source, domain, seed))
        model, own = task.model, task.adapter_name
        (path,) = model.peft[own].head_paths
        head = {key: value.clone() for key, value in model.peft[own].get_submodule(path).state_dict().items()}
        vp.detach(model)
        model.get_submodule(path).load_state_dict(head)
        for each in DOMAINS:
            vp.load(model, self.adapter(source, each, seed), each)
        if row.kind == "soup":
            vp.combine(model, dict.fromkeys(DOMAINS, 1 / len(DOMAINS)), "mixed", head=False)
        else:
            weights = vp.lorahub(model, DOMAINS, islice(data.train_dataloader(), BATCHES), "mixed", seed=seed)
            write_json(self.folder(row, domain, seed) / "weights.json", weights)
        model.eval()
        with torch.inference_mode():
            right = [model(images).argmax(dim=-1) == labels for images, labels in data.test_dataloader()]
        return {domain: torch.cat(right).double().mean().item()}


def cells(seeds: int) -> Iterator[tuple[Row, str, int]]:
    """All cells, seed by seed, what others are made of before them."""
    for seed in range(seeds):
        for row in ROWS:
            for domain in [TOGETHER] if row.kind == TOGETHER else DOMAINS:
                yield row, domain, seed


def lines(bench: Bench, seeds: int) -> list[str]:
    """The table, of the cells that are done."""
    found = [
        "| | trained on | values | clip art | drawings | sprites | mean |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in ROWS:
        by_domain: dict[str, list[float]] = {domain: [] for domain in DOMAINS}
        values = set()
        for each, domain, seed in cells(seeds):
            if each is not row or (done := bench.result(row, domain, seed)) is None:
                continue
            for name, top1 in done.items():
                by_domain[name].append(100 * top1)
            if row.method:
                values.add(bench.run(row, domain, seed).read_results()["parameters"]["adapter"])
        if not all(by_domain.values()):
            continue
        measured = by_domain.values()
        scores = [f"{statistics.mean(each):.1f} ± {statistics.pstdev(each):.1f}" for each in measured]
        mean = statistics.mean(statistics.mean(each) for each in measured)
        fewest = min(map(len, measured))
        name = row.name if fewest == seeds else f"{row.name} ({fewest} of {seeds} seeds)"
        over = ", over the adapters of each" if row.kind == TOGETHER and row.sources else ""
        trained_on = f"{WORDS[row.kind]}{over}"
        count = f"{max(values):,}" if values else ""
        found.append(f"| {name} | {trained_on} | {count} | {' | '.join(scores)} | {mean:.1f} |")
    return found


def write(table: list[str]) -> None:
    """Put the table where the page has its marks."""
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), "three_domains", "\n".join(table)), encoding="utf-8")


def main() -> None:
    """Compute the cells that are missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/three_domains"), help="folder of the cells")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=5, help="of every training")
    parser.add_argument("--size", type=int, default=32, help="of the images, in pixels")
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate of all trainings")
    parser.add_argument(
        "--rows",
        nargs="+",
        choices=BY_NAME,
        default=[*BY_NAME],
        metavar="ROW",
        help="rows to compute, and what they are made of",
    )
    parser.add_argument("--write", action="store_true", help="only put the table of what is done into docs/results.md")
    options = parser.parse_args()
    bench = Bench(options.output.resolve(), options.epochs, options.size, options.lr)
    setting = {"epochs": bench.epochs, "size": bench.size, "lr": bench.lr}
    file = bench.output / "setting.json"
    if file.is_file() and json.loads(file.read_text()) != setting:
        raise ConfigurationError(f"{bench.output} has cells of another setting ({file}); name another --output")
    if not options.write:
        wanted = {*options.rows, *(BY_NAME[name].sources for name in options.rows)}
        bench.output.mkdir(parents=True, exist_ok=True)
        write_json(file, setting)
        for row, domain, seed in cells(options.seeds):
            if row.name not in wanted or bench.result(row, domain, seed) is not None:
                continue
            bench.folder(row, domain, seed).mkdir(parents=True, exist_ok=True)
            top1 = (bench.mix if row.kind in ("soup", "lorahub") else bench.train)(row, domain, seed)
            write_json(bench.folder(row, domain, seed) / "top1.json", top1)
            print(f"{row.name}, seed {seed}: {top1}", flush=True)
    table = lines(bench, options.seeds)
    print("\n".join(table))
    if options.write:
        write(table)


if __name__ == "__main__":
    main()
