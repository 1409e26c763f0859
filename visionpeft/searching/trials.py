"""Trials: members that are judged on validation, once, and whose costs are measured."""

import functools
import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import lightning.pytorch as pl
import torch

from visionpeft.adapters.switch import use
from visionpeft.costs.cost import seconds
from visionpeft.costs.saved_bytes import saved_bytes, storages
from visionpeft.files import write_json
from visionpeft.protocols.cells import Training, find_run
from visionpeft.protocols.method_runs import Trial
from visionpeft.runs.cli import CLI
from visionpeft.runs.history import read_history
from visionpeft.runs.stages import CHOICE
from visionpeft.searching.space import Member, Space
from visionpeft.searching.supernet import described
from visionpeft.sharing.run_directory import RunDirectory
from visionpeft.tasks import ImageTask

IMAGES = 16  # of a step whose costs are measured
ROUNDS = 5


@dataclass(frozen=True)
class Costs(Training):
    """What a training costs, measured without training, in `costs.json`."""

    def done(self, folder: Path) -> bool:
        """Whether it was measured."""
        return (folder / "costs.json").is_file()

    def do(self, folder: Path) -> None:
        """Measure."""
        write_json(folder / "costs.json", step_costs(self.arguments))

    def costs(self, output: Path) -> dict[str, float]:
        """What was measured; see `step_costs`."""
        return json.loads((output / self.name / "costs.json").read_text())


@dataclass(frozen=True)
class MemberTrial(Costs):
    """A member that is trained and judged by its accuracy on validation, with what its training costs.

    Args:
        member: what is judged.
        space: its space.
    """

    member: Member = field(default_factory=dict)
    space: Space | None = None

    def done(self, folder: Path) -> bool:
        """Whether score and costs are there."""
        return super().done(folder) and self.scored.done(folder)

    def do(self, folder: Path) -> None:
        """Judge it if that is not done, and measure."""
        if not self.scored.done(folder):
            self.judge(folder)
        super().do(folder)

    @property
    def scored(self) -> Trial:
        """Its training."""
        return Trial(self.name, self.text, self.arguments)

    def judge(self, folder: Path) -> None:
        """Write the accuracy on validation."""
        self.scored.do(folder)

    def score(self, output: Path) -> float:
        """Accuracy on validation; below all others where training diverged."""
        return self.scored.score(output)

    def judged(self, output: Path) -> Member:
        """The member that was judged."""
        return self.member

    def steps(self, output: Path) -> int:
        """Optimiser steps of its training."""
        return json.loads((output / self.name / "score.json").read_text()).get("steps", 0)


@dataclass(frozen=True)
class TwoStages(Trial):
    """A training in two stages, of which the score keeps what the first has chosen, and the steps of both."""

    def kept(self, run: RunDirectory) -> dict:
        """The methods of the second stage, and all steps."""
        first = RunDirectory(run.path / "stages" / "1")
        choice = first.path / f"{CHOICE}.json"
        if not choice.is_file():  # it diverged before
            return {}
        rows = [read_history(each.metrics) for each in (first, run)]
        steps = sum(round(each[-1]["step"]) for each in rows if each)
        return {"methods": json.loads(choice.read_text())["methods"], "steps": steps}


class StructureTrial(MemberTrial):
    """A member that its own training finds; costs are those of what was found."""

    @property
    def scored(self) -> Trial:
        """Its training."""
        return TwoStages(self.name, self.text, self.arguments)

    def do(self, folder: Path) -> None:
        """Train it if that is not done, and measure what was found."""
        if not self.scored.done(folder):
            self.judge(folder)
        arguments = list(self.arguments)
        method = arguments.index("--model.method") + 1
        arguments[method] = json.dumps(described(self.space.methods(self._found(folder))))
        write_json(folder / "costs.json", step_costs(tuple(arguments)))

    def judged(self, output: Path) -> Member:
        """What was found."""
        return self._found(output / self.name)

    def _found(self, folder: Path) -> Member:
        methods = json.loads((folder / "score.json").read_text()).get("methods")
        return self.member if methods is None else self.space.found(self.member, methods)


@dataclass(frozen=True)
class SupernetTrial(MemberTrial):
    """A member that is judged with the weights of a supernet.

    Args:
        supernet: folder of the supernet's cell in the output.
    """

    supernet: str = ""

    def judge(self, folder: Path) -> None:
        """Let the member act in the supernet and validate."""
        output = folder.parents[len(Path(self.name).parts) - 1]
        task, datamodule, trainer = _opened(find_run(output / self.supernet).path)
        self.space.use(task.adapter.get_submodule(self.space.supernet(0).name), self.member)
        trainer.validate(task, datamodule, verbose=False)
        write_json(folder / "score.json", {"val_top1": float(trainer.callback_metrics["val/top1"])})


@functools.lru_cache(maxsize=1)  # a process judges one member of a supernet after the other
def _opened(run: Path) -> tuple[ImageTask, pl.LightningDataModule, pl.Trainer]:
    """Task, data and trainer of a finished run, with what it has trained."""
    cli = CLI(["--config", str(run / "config.yaml")])
    task, datamodule = cli.model, cli.datamodule
    task.load(run / task.folder)
    task.connect(datamodule)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return task, datamodule, cli.build_trainer([], **options)


def step_costs(arguments: tuple[str, ...]) -> dict[str, float]:
    """What a training step costs, on random images: trained values, kept memory and time are measured, not counted.

    Step and frozen forward take turns; their times are medians, of process CPU time on a CPU.

    Args:
        arguments: command line of the training.

    Returns:
        `parameters`, trained values outside the head; `saved_bytes`, kept for the backward pass for each image;
        `step_seconds` of forward, backward and AdamW on a batch of 16; `step_forwards`, the same in forwards of the
        frozen backbone, which other machines and other work disturb less.
    """
    cli = CLI(list(arguments))
    cli.datamodule.setup()
    task, device = cli.model.to(cli.trainer.strategy.root_device), cli.trainer.strategy.root_device
    images = torch.randn(IMAGES, 3, *task.preprocessing.input_size, device=device)
    labels = torch.arange(IMAGES, device=device) % len(task.class_names)
    task.train()
    optimizer = torch.optim.AdamW(task.trained_parameters(), lr=0.0, weight_decay=0.0)

    def step() -> torch.Tensor:
        loss, _ = task.training_loss(images, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    known = storages(task) | {images.untyped_storage().data_ptr()}
    saved, _ = saved_bytes(step, known)  # warms up, too
    steps, forwards = [], []
    for _ in range(ROUNDS):
        steps.append(seconds(step, device.type))
        with use(task.model, None), torch.no_grad():
            forwards.append(seconds(lambda: task.model(images), device.type))
    return {
        "parameters": task.adapter.num_parameters(),
        "saved_bytes": saved / IMAGES,
        "step_seconds": statistics.median(steps),
        "step_forwards": statistics.median(steps) / statistics.median(forwards),
    }
