"""What computes batches: the adapters of one backbone together, or a learner for certain class names."""

import contextlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from visionpeft.backbones.preprocessing import preprocessing_of
from visionpeft.data.transforms import ImageTransform
from visionpeft.errors import ConfigurationError, UnsupportedError
from visionpeft.serving.batches import Job
from visionpeft.serving.refusals import Refusal
from visionpeft.sharing.adapter_pool import AdapterPool
from visionpeft.sharing.batch_sizes import filled
from visionpeft.sharing.trained_model import TrainedModel


@dataclass(eq=False)
class Served:
    """What can be asked, and how its images are prepared.

    Args:
        name: how it is asked for.
        trained: its model and what the outputs mean.
        description: what was saved with it.
    """

    name: str
    trained: TrainedModel
    description: dict

    def __post_init__(self):
        if self.trained.sampling is not None:
            raise UnsupportedError(f"{self.name} classifies videos, and images are served")
        if self.trained.labels in ("masks", "objects"):
            raise UnsupportedError(
                f"{self.name} predicts {self.trained.labels}, and classes, labels and numbers are served"
            )
        preprocessing = self.trained.preprocessing or preprocessing_of(self.trained.model)
        self.transform = ImageTransform(preprocessing, self.trained.resize or "squash")

    def answer(self, logits: torch.Tensor) -> torch.Tensor:
        """Probabilities (classes,), or a number (), of the logits (outputs,) of one image."""
        return self.trained.answers(logits[None])[0].cpu()


class AdaptersLane:
    """All adapters of one backbone.

    Args:
        pool: the adapters; its batch size makes the answers independent of one another.
    """

    def __init__(self, pool: AdapterPool):
        self.pool = pool
        self.device = next(pool.model.parameters()).device

    def compute(self, jobs: Sequence[Job]) -> list[torch.Tensor | Exception]:
        """The answer of each job, or why it has none: an adapter that fails does so alone.

        Where a batch fails, as when its adapters are too large together, each half of its adapters is a batch.
        """
        names = [*dict.fromkeys(job.name for job in jobs)]
        try:
            return self._together(jobs)
        except Exception as error:
            if len(names) == 1:
                return [error] * len(jobs)
        first = set(names[: len(names) // 2])
        halves = [[job for job in jobs if (job.name in first) is chosen] for chosen in (True, False)]
        results = {id(job): result for half in halves for job, result in zip(half, self.compute(half), strict=True)}
        return [results[id(job)] for job in jobs]

    def _together(self, jobs: Sequence[Job]) -> list[torch.Tensor | Exception]:
        with self.pool.hold(dict.fromkeys(job.name for job in jobs)) as held:
            descriptions = {adapter.name: adapter.description for adapter in held}
            replaced = {job.name for job in jobs if job.about.description != descriptions[job.name]}
            going = [job for job in jobs if job.name not in replaced]
            rows = self._answers(going) if going else []
        for name in replaced:  # whichever of the two is older is read anew
            with contextlib.suppress(ConfigurationError):  # somebody else holds it
                self.pool.unload(name)
        answers = dict(zip(map(id, going), rows, strict=True))
        return [Replaced(job.name) if job.name in replaced else answers[id(job)] for job in jobs]

    def _answers(self, jobs: Sequence[Job]) -> list[torch.Tensor]:
        images = torch.stack([job.about.transform.normalise(job.image) for job in jobs]).to(self.device)
        logits = self.pool.logits(images, [job.name for job in jobs])
        return [job.about.answer(row) for job, row in zip(jobs, logits, strict=True)]


class Replaced(Refusal):
    """An adapter whose files were replaced after its class names and preprocessing had been read."""

    def __init__(self, name: str):
        super().__init__(503, f"adapter {name!r} was replaced by another one just now; ask again")
        self.name = name


class LearnerModel:
    """A learner on a CLIP, which classifies into any class names, or its own ones alone.

    Args:
        served: the learner.
        batch_size: rows of each batch, which is filled up.
        kept: for how many lists of class names text features are kept.

    Raises:
        UnsupportedError: it is an online learner.
    """

    def __init__(self, served: Served, batch_size: int, kept: int):
        if served.trained.model.online:
            raise UnsupportedError(
                f"{type(served.trained.model).__name__} answers by the images before, of whoever sent them, and a "
                "service answers each image by itself; use python -m visionpeft.predict"
            )
        self.served = served
        self.batch_size = batch_size
        self.kept = kept
        self.device = next(served.trained.model.parameters()).device
        self._views: OrderedDict[tuple[str, ...], torch.nn.Module] = OrderedDict()

    def view(self, names: tuple[str, ...] | None) -> torch.nn.Module:
        """The learner with these class names; all of them share what was learnt, and the CLIP."""
        if names is None:
            return self.served.trained.model
        if names not in self._views:
            self._views[names] = self.served.trained.model.with_class_names(names)
            if len(self._views) > self.kept:
                self._views.popitem(last=False)
        self._views.move_to_end(names)
        return self._views[names]


@dataclass(frozen=True)
class LearnerLane:
    """A learner for certain class names.

    Args:
        model: the learner.
        names: the names; None for those it was trained for.
    """

    model: LearnerModel
    names: tuple[str, ...] | None

    def compute(self, jobs: Sequence[Job]) -> list[torch.Tensor | Exception]:
        """The answer of each job."""
        served, model = self.model.served, self.model.view(self.names)
        images = torch.stack([served.transform.normalise(job.image) for job in jobs]).to(self.model.device)
        with torch.inference_mode():
            if model.adapts_while_testing:
                return [served.answer(_drawn_alike(model, image)) for image in images]
            # Always full: the last product, of features and few classes, has other bits for one row than for several.
            logits = model(filled(images, self.model.batch_size))
            return [served.answer(row) for row in logits[: len(jobs)]]


def _drawn_alike(model: torch.nn.Module, image: torch.Tensor) -> torch.Tensor:
    """Logits (classes,) of an image (3, height, width) by a learner that draws views of it, as for every other image.

    An image by itself: which views it gets follows neither from its row in a batch nor from what was drawn before.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model(image[None])[0]
