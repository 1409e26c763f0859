"""The trainings and measurements of a search, as command lines of `visionpeft.fit` in folders of their own."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from visionpeft.methods.parts.base import Method
from visionpeft.protocols.cells import Training
from visionpeft.protocols.method_candidates import MethodCandidate
from visionpeft.protocols.method_runs import Benchmark
from visionpeft.searching.space import Member, Space
from visionpeft.searching.supernet import described
from visionpeft.searching.trials import Costs, MemberTrial, StructureTrial, SupernetTrial

FOUND = ", found"  # after the name of a space, which then stands for a method


class OwnData(Benchmark):
    """The data that a configuration names, as it is."""

    def on(self, task: str, stage: str) -> list[str]:
        """Where it lies; the configuration says the rest."""
        return [] if self.root is None else ["--data.root", self.root]

    def group(self, task: str) -> str:
        """None."""
        return ""


@dataclass(frozen=True)
class Judged:
    """A finished trial.

    Args:
        task: on what.
        member: what was judged.
        text: in words.
        val_top1: accuracy on validation; below 0 where training diverged.
        costs: as `step_costs` gives them.
        steps: of the optimiser, of its own training.
    """

    task: str
    member: Member
    text: str
    val_top1: float
    costs: dict[str, float]
    steps: int = 0


@dataclass(frozen=True)
class SearchPlan:
    """How the trainings of a search are told to `visionpeft.fit`.

    Args:
        space: the space.
        benchmark: the data.
        base: the configuration whose method is replaced.
        epochs: of the supernet or of each trial; None for those of the final training.
        seed: of the search.
        limit: most values that a member may train outside the head.
    """

    space: Space
    benchmark: Benchmark
    base: MethodCandidate
    epochs: int | None
    seed: int
    limit: int | None

    def arguments(self, task: str, methods: Method | Sequence[Method], seed: int, stage: str) -> list[str]:
        """Command line of a training of the "trial" or the "final" stage with some methods."""
        parts = described([methods] if isinstance(methods, Method) else methods)
        value = parts[0] if isinstance(methods, Method) else parts
        arguments = self.benchmark.arguments(self.base, task, {"model.method": value}, seed, stage)
        arguments += ["--report", "last"]
        if stage == "trial":
            arguments += ["--test", "false"]
            arguments += [] if self.epochs is None else ["--trainer.max_epochs", str(self.epochs)]
        return arguments

    def supernet(self, task: str) -> Training | None:
        """The training that judges all members, if there is one."""
        method = self.space.supernet(self.seed)
        if method is None:
            return None
        arguments = self.arguments(task, method, self.seed, "trial")
        name = f"supernet/{task}-seed-{self.seed}"
        return Training(name, f"supernet of {self.space.name} on {task}", tuple(arguments))

    def trial(self, task: str, member: Member) -> MemberTrial:
        """The trial of a member, in a folder of its own."""
        key = hashlib.sha256(json.dumps(member, sort_keys=True).encode()).hexdigest()[:12]
        arguments = tuple(self.arguments(task, self.space.methods(member), self.seed, "trial"))
        name, text = f"trials/{task}-seed-{self.seed}/{key}", f"{self.space.text(member)} on {task}"
        if supernet := self.supernet(task):
            return SupernetTrial(name, text, arguments, member=member, space=self.space, supernet=supernet.name)
        return (StructureTrial if self.space.finds else MemberTrial)(
            name, text, arguments, member=member, space=self.space
        )

    def final(self, task: str, seed: int, best: Judged, steps: int) -> Training:
        """A last training of the best member."""
        arguments = self.arguments(task, self.space.methods(best.member), seed, "final")
        about = self._about(task, seed, best.costs) | {
            "method": f"{self.space.name}{FOUND}",
            "hyper_parameters": best.member,
            "member": best.text,
            "val_top1": best.val_top1,
            "chosen_by": "validation",
            "search_steps": steps,
        }
        name = f"final/{self.space.name}-found-{task}-seed-{seed}"
        return Training(name, f"{best.text} on {task}, seed {seed}", tuple(arguments), about)

    def single(self, candidate: MethodCandidate, task: str, seed: int, epochs: int | None, costs: dict) -> Training:
        """A training of a method alone, of its configuration's length or of so many epochs."""
        arguments = self.benchmark.arguments(candidate, task, {}, seed, "final")
        arguments += ["--report", "last"]
        longer = "" if epochs is None else ", all steps"
        arguments += [] if epochs is None else ["--trainer.max_epochs", str(epochs)]
        about = self._about(task, seed, costs) | {
            "method": f"{candidate.name}{longer}",
            "hyper_parameters": {},
            "member": candidate.config,
            "val_top1": None,
            "chosen_by": "as configured",
            "search_steps": 0,
        }
        name = f"final/{candidate.name}{longer.replace(', ', '-').replace(' ', '-')}-{task}-seed-{seed}"
        return Training(name, f"{candidate.name}{longer} on {task}, seed {seed}", tuple(arguments), about)

    def costs(self, candidate: MethodCandidate, task: str) -> Costs:
        """What a method costs alone."""
        arguments = tuple(self.benchmark.arguments(candidate, task, {}, self.seed, "final"))
        return Costs(f"costs/{candidate.name}-{task}", f"costs of {candidate.name} on {task}", arguments)

    def _about(self, task: str, seed: int, costs: dict) -> dict:
        return {
            "protocol": self.benchmark.name,
            "task": task,
            "group": self.benchmark.group(task),
            "seed": seed,
            "rule": "last epoch",
            "differs_from_paper": "",
            "saved_bytes_per_image": costs["saved_bytes"],
            "step_forwards": costs["step_forwards"],
        }
