"""The space of AutoPEFT: sizes of two adapters and a prefix, and in which blocks they act, by Bayesian optimisation.

Zhou, Wan, Vulić, Korhonen, AutoPEFT: Automatic Configuration Search for Parameter-Efficient Fine-Tuning, TACL 2024,
https://arxiv.org/abs/2301.12132.
"""

import json
from dataclasses import dataclass
from typing import ClassVar

from visionpeft.errors import ConfigurationError
from visionpeft.methods.adapter import Adapter
from visionpeft.methods.parts.base import Method
from visionpeft.methods.prefix_tuning import PrefixTuning
from visionpeft.searching.evolution import ATTEMPTS, Rounds
from visionpeft.searching.space import Host, Member, Space

HALVINGS = 10
TOGETHER = 4


@dataclass(frozen=True)
class AutoPeftSpace(Space):
    """A serial adapter, a parallel adapter and a prefix of one size each, and a switch for every block.

    A size is 0, or the width of the tokens halved up to ten times (768, 384 ... 1, 0); of the prefix, at most a
    quarter of the width. All that is there acts in the blocks that are on. Every member is trained by itself. Optuna's
    TPE optimises accuracy on validation and trained values together: the first third of the budget is drawn, of the
    rest four at a time are proposed. The paper's Gaussian process with a sparsity of axes is not in Optuna; its
    budget is 100 drawn and up to 200 proposed. The serial adapter is after the MLP, the parallel one beside it
    (`Adapter`, "pfeiffer" and "parallel"). That the prefix ends at a quarter of the width is recalled, not read.

    Args:
        largest_prefix: most keys and values of the prefix; None for a quarter of the width.
    """

    name: ClassVar[str] = "autopeft"

    largest_prefix: int | None = None

    def __post_init__(self):
        if self.largest_prefix is not None and not (isinstance(self.largest_prefix, int) and self.largest_prefix > 0):
            raise ConfigurationError(f"largest_prefix must be a positive integer or None, not {self.largest_prefix}")

    def sizes(self, width: int, largest: int | None = None) -> list[int]:
        """0 and the halved widths, ascending, up to `largest`."""
        halved = sorted({width // 2**halving for halving in range(HALVINGS + 1)} | {0})
        return [size for size in halved if largest is None or size <= largest]

    def methods(self, member: Member) -> list[Method]:
        """`Adapter` twice and `PrefixTuning`, as far as it has them."""
        blocks = [block for block, on in enumerate(member["blocks"]) if on]
        found: list[Method] = []
        if blocks and member["serial"]:
            found.append(Adapter(member["serial"], placement="pfeiffer", blocks=blocks))
        if blocks and member["parallel"]:
            found.append(Adapter(member["parallel"], placement="parallel", blocks=blocks))
        if blocks and member["prefix"]:
            found.append(PrefixTuning(member["prefix"], blocks=blocks))
        return found

    def smallest(self, host: Host) -> Member:
        """One key and value in the first block."""
        return {"serial": 0, "parallel": 0, "prefix": 1, "blocks": [block == 0 for block in range(host.tower.depth)]}

    def text(self, member: Member) -> str:
        """The sizes and the blocks."""
        blocks = " ".join(str(block) for block, on in enumerate(member["blocks"]) if on)
        sizes = ", ".join(f"{name} {member[name]}" for name in ("serial", "parallel", "prefix"))
        return f"{sizes} in blocks {blocks}"

    def rounds(self, host: Host, budget: int, seed: int) -> Rounds:
        """What the study proposes; it is told accuracy and trained values."""
        optuna = imported_optuna()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(directions=["maximize", "minimize"])
        width, depth, seen, judged = host.tower.width, host.tower.depth, set(), 0
        choices = {"serial": self.sizes(width), "parallel": self.sizes(width)}
        choices["prefix"] = self.sizes(width, self.largest_prefix or width // 4)

        def proposed(trial) -> Member:
            member: Member = {name: trial.suggest_categorical(name, sizes) for name, sizes in choices.items()}
            return member | {"blocks": [trial.suggest_categorical(f"block{i}", [False, True]) for i in range(depth)]}

        # One that is allowed, as `Host.check` has seen; where the limit is low, hardly another may be found by chance.
        least = self.smallest(host)
        blocks = {f"block{block}": on for block, on in enumerate(least["blocks"])}
        study.enqueue_trial({name: least[name] for name in choices} | blocks)
        while judged < budget:
            # A sampler of its own for each round, whose draws follow from the seed and what was judged before.
            study.sampler = optuna.samplers.TPESampler(
                n_startup_trials=max(1, budget // 3), constant_liar=True, seed=1000 * seed + judged
            )
            waiting = []
            for attempt in range(4 * ATTEMPTS):
                if len(waiting) == min(TOGETHER, budget - judged):
                    break
                if attempt == ATTEMPTS:  # what it proposes was there or does not fit, and it would go on so
                    study.sampler = optuna.samplers.RandomSampler(seed=1000 * seed + judged)
                trial = study.ask()
                member = proposed(trial)
                key = json.dumps(member)
                if key in seen or not self.methods(member) or not host.fits(member):
                    study.tell(trial, state=optuna.trial.TrialState.FAIL)
                    continue
                seen.add(key)
                waiting.append((trial, member))
            if not waiting:
                return
            scores = yield [member for _, member in waiting]
            for (trial, member), score in zip(waiting, scores, strict=True):
                study.tell(trial, [score, host.count(member)])
            judged += len(waiting)


def imported_optuna():
    """Optuna.

    Raises:
        ConfigurationError: it is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise ConfigurationError(
            "space autopeft needs Optuna; install it with pip install 'visionpeft[search]'"
        ) from None
    return optuna
