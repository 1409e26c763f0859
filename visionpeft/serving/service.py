"""Everything that is served, without HTTP: what there is, and the prediction of one image."""

import asyncio
import json
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

import torch

from visionpeft.adapters.attach import detach
from visionpeft.data.images import decode_foreign
from visionpeft.errors import ConfigurationError, UserError, did_you_mean
from visionpeft.runs.environment import usable_cores
from visionpeft.serving.batches import Batches, Job, Lane
from visionpeft.serving.catalogue import Catalogue, Saved
from visionpeft.serving.lanes import AdaptersLane, LearnerLane, LearnerModel, Replaced, Served
from visionpeft.serving.limits import Limits
from visionpeft.serving.metrics import Metrics
from visionpeft.serving.refusals import Refusal, refusal_of
from visionpeft.sharing.adapter_pool import AdapterPool
from visionpeft.sharing.trained_model import (
    TrainedModel,
    as_described,
    described_classifier,
    open_saved,
    read_description,
)


@dataclass(frozen=True)
class Settings:
    """How a service works.

    Args:
        max_batch: most images of a batch; no bit of an answer depends on how many there are, see `AdapterPool`.
        max_wait: seconds for which a request waits for others to share its batch.
        capacity: most bytes of the adapters in memory, for each backbone.
        checkpoint: file with the weights of backbones whose description names a file of another machine.
        limits: what requests may cost.
    """

    max_batch: int = 16
    max_wait: float = 0.005
    capacity: int = 2**30
    checkpoint: Path | None = None
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self):
        if self.max_batch < 1 or self.max_wait < 0 or self.capacity < 1:
            raise ConfigurationError(
                "a batch has at least 1 row, a wait at least 0 seconds, a capacity at least 1 byte"
            )


class Service:
    """What was trained, ready to answer.

    Backbones and learners are loaded at once, adapters when they are asked for. Only the backbones of adapters that are
    there at the beginning are made: a file that is added later starts no download.

    Args:
        places: run directories, folders that `save` or `save_learner` wrote, or folders of such.
        settings: how it works.

    Attributes:
        remarks: what is in the folders and is not served, a sentence each.

    Raises:
        ConfigurationError: a place does not exist, or nothing there can be served.
    """

    def __init__(self, places: Sequence[str | Path], settings: Settings | None = None):
        self.settings = settings or Settings()
        self.limits = self.settings.limits
        self.catalogue = Catalogue(places)
        self.remarks: list[str] = []
        self.metrics = Metrics()
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._lanes: dict[str, AdaptersLane] = {}  # by what is saved of their backbone
        self._learners: dict[str, LearnerModel] = {}
        self._known: dict[str, Served] = {}  # adapters that have been asked for
        self._lock = Lock()
        clips: dict[str, tuple] = {}
        for name in [*self.catalogue]:
            try:
                self._open(self.catalogue.find(name), clips)
            except UserError as error:
                self.remarks.append(f"{name} is not served: {error}")
        if not self._lanes and not self._learners:
            raise ConfigurationError(
                f"nothing in {', '.join(map(str, places))} can be served"
                + (f" ({self.remarks[0]})" if self.remarks else "; name runs or folders that save wrote")
            )
        # Decoding a large image takes a hundred megabytes, so no more are decoded at a time than cores may be used.
        self._decoding = ThreadPoolExecutor(usable_cores(), thread_name_prefix="decoding")
        settings = self.settings
        self.batches = Batches(settings.max_batch, settings.max_wait, self.limits.queue, self.metrics.computed)
        self.metrics.watch(self.batches.waiting, self.number_loaded, self.bytes_loaded)

    def close(self) -> None:
        """Answer what waits, and end."""
        self._decoding.shutdown()
        self.batches.close()

    # What there is

    def names(self) -> list[str]:
        """What can be asked for: adapters that are there now, and learners that were there at the beginning."""
        adapters = [name for name in self.catalogue if self.catalogue.find(name).stem == "adapter"]
        return [*self._learners, *(name for name in adapters if name not in self._learners)]

    def adapters(self) -> list[dict]:
        """Name and kind of each, whether it is in memory, and in how many bytes."""
        loaded = {name: each.bytes for lane in self._lanes.values() for name, each in lane.pool.loaded().items()}
        kinds = [(name, "learner" if name in self._learners else "adapter") for name in self.names()]
        return [
            {"name": name, "kind": kind, "loaded": kind == "learner" or name in loaded, "bytes": loaded.get(name)}
            for name, kind in kinds
        ]

    def adapter(self, name: str) -> dict:
        """What an adapter or learner tells apart; its description is read if nobody has asked for it before.

        Raises:
            Refusal: there is none of this name, or it is damaged.
        """
        served = self._served(name)
        learner = self._learners.get(name)
        return {
            "name": name,
            "kind": "learner" if learner else "adapter",
            "labels": served.trained.labels,
            "class_names": served.trained.class_names,
            "takes_class_names": bool(learner) and not served.trained.model.class_bound,
        }

    def health(self) -> dict:
        """That it answers, how many adapters are in memory, and how many images wait.

        Raises:
            Refusal: 503 while a batch takes longer than a request may, and when nothing is computed any more.
        """
        if not self.batches.alive():
            raise Refusal(503, "the thread of the models has ended; start the service again")
        busy = self.batches.busy_for()
        if busy > self.limits.seconds:
            raise Refusal(503, f"the model has computed for {busy:.0f} seconds and has not answered")
        return {"status": "ok", "adapters_loaded": self.number_loaded(), "waiting": self.batches.waiting()}

    def bytes_loaded(self) -> int:
        """Of all adapters in memory."""
        return sum(lane.pool.bytes for lane in self._lanes.values())

    def number_loaded(self) -> int:
        """Of adapters in memory."""
        return sum(len(lane.pool.loaded()) for lane in self._lanes.values())

    async def load(self, name: str) -> None:
        """Have an adapter in memory, though others may take its place later.

        Raises:
            Refusal: there is none of this name, or it cannot be loaded.
        """

        def load() -> None:
            with lane.pool.hold([name]):
                pass

        await self._in_thread(self._served, name)
        if (lane := self._lane_of(name)) is not None:
            await self._called(load, name)

    async def unload(self, name: str) -> None:
        """Forget an adapter; it is read anew when it is next asked for.

        Raises:
            Refusal: it is not in memory, or a learner.
        """
        if name in self._learners:
            raise Refusal(409, f"{name!r} is a learner, which is in memory as long as the service runs")
        lane = self._lane_of(name)
        if lane is None or name not in lane.pool.loaded():
            raise Refusal(404, f"no adapter {name!r} is in memory")
        await self._called(lambda: lane.pool.unload(name), name)
        self._forget(name)

    # Predictions

    async def predict(
        self, content: bytes, name: str | None = None, top_k: int = 5, class_names: Sequence[str] | None = None
    ) -> dict:
        """What is on an image.

        Args:
            content: the image file.
            name: of the adapter or learner; may be left out if there is only one.
            top_k: how many classes to name.
            class_names: classes to tell apart, for a learner that takes any.

        Raises:
            Refusal: with the status code and the sentence for the client.
        """
        deadline = time.monotonic() + self.limits.seconds
        try:
            async with asyncio.timeout(self.limits.seconds):
                name = name or await self._in_thread(self._only)
                job = await self._in_thread(self._job, content, name, top_k, class_names, deadline)
                values = await asyncio.wrap_future(self.batches.submit(job))
        except TimeoutError:
            raise Refusal(504, f"the prediction was not ready within {self.limits.seconds:g} seconds") from None
        except Refusal as refusal:
            if isinstance(refusal, Replaced):
                self._forget(name)
            raise
        except Exception as error:
            self._forget(name)  # whatever it was, read again what the adapter is
            if name not in self.catalogue:
                raise Refusal(404, f"there is no adapter {name!r} any more") from error
            raise refusal_of(error, name) from error
        names = class_names or job.about.trained.class_names
        return {"adapter": name} | answer(values, job.about.trained, names, top_k)

    def _job(self, content: bytes, name: str, top_k: int, class_names: Sequence[str] | None, deadline: float) -> Job:
        served = self._served(name)
        if top_k < 1:
            raise Refusal(422, f"top_k must be at least 1, not {top_k}")
        if time.monotonic() > deadline:
            raise Refusal(504, f"the image was not decoded within {self.limits.seconds:g} seconds")
        lane = self._lane(served, class_names)
        image = served.transform.prepare(decode_foreign(content, self.limits.pixels))
        return Job(lane, name, image, served, deadline)

    def _lane(self, served: Served, class_names: Sequence[str] | None) -> Lane:
        learner = self._learners.get(served.name)
        if learner is None:
            if class_names:
                raise Refusal(422, f"{served.name!r} has a head for its own classes and knows no others")
            return self._lane_of(served.name)
        if class_names and len(class_names) > self.limits.class_names:
            raise Refusal(422, f"at most {self.limits.class_names:,} classes can be named, not {len(class_names):,}")
        if class_names and len(class_names) < 2 and not learner.served.trained.judges_each:
            raise Refusal(422, f"{served.name!r} tells classes apart; give at least two")
        return LearnerLane(learner, tuple(class_names) if class_names else None)

    def _only(self) -> str:
        names = self.names()
        if len(names) == 1:
            return names[0]
        raise Refusal(422, "several adapters are served; say which one with adapter")

    # What is known of it

    def _served(self, name: str) -> Served:
        if name in self._learners:
            return self._learners[name].served
        with self._lock:
            known = self._known.get(name)
        if known is not None:
            return known
        saved = self.catalogue.find(name)
        if saved is None or saved.stem != "adapter":
            raise Refusal(404, f"there is no adapter {name!r}{did_you_mean(name, self.names())}")
        try:
            description = read_description(saved.folder)
            lane = self._lanes.get(_key(description))
            if lane is None:
                raise Refusal(422, f"adapter {name!r} belongs to a backbone that this service has not loaded")
            served = Served(
                name, as_described(lane.pool.model, description["class_names"], description, name), description
            )
        except UserError as error:
            raise refusal_of(error, name) from error
        with self._lock:
            return self._known.setdefault(name, served)

    def _lane_of(self, name: str) -> AdaptersLane | None:
        with self._lock:
            served = self._known.get(name)
        return None if served is None else self._lanes[_key(served.description)]

    def _forget(self, name: str) -> None:
        """Read again what an adapter is, when it is next asked for."""
        with self._lock:
            self._known.pop(name, None)

    async def _in_thread(self, function, *arguments):
        """Call a function that reads files or decodes, and not in the thread that listens."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._decoding, function, *arguments)
        except Exception as error:
            raise refusal_of(error) from error

    async def _called(self, function, name: str) -> None:
        """Call a function in the thread of the models."""
        future: Future = self.batches.call(function)
        try:
            await asyncio.wait_for(asyncio.wrap_future(future), self.limits.seconds)
        except TimeoutError:
            raise Refusal(504, f"this was not done within {self.limits.seconds:g} seconds") from None
        except Exception as error:
            self._forget(name)
            code = 409 if type(error) is ConfigurationError else None  # in use, or gone meanwhile
            raise (Refusal(code, str(error)) if code else refusal_of(error, name)) from error

    # At the beginning

    def _open(self, saved: Saved, clips: dict[str, tuple]) -> None:
        """Make the backbone of what is saved, or load the learner."""
        description = read_description(saved.folder)
        key, own = _key(description), saved.run is not None
        if own:
            # A backbone without pretrained weights is drawn again.
            torch.manual_seed(saved.run.read_results()["seed"])
        if saved.stem == "learner":
            trained = self._open_learner(saved, key, own, clips)
            learner = LearnerModel(Served(saved.name, trained, description), self.settings.max_batch, self.limits.texts)
            self._learners[saved.name] = learner
        elif key not in self._lanes:
            model = described_classifier(description, saved.folder, own, self.settings.checkpoint)
            trained = as_described(model, description["class_names"], description, saved.folder)
            served = Served(saved.name, trained, description)
            settings = self.settings
            pool = AdapterPool(
                model.to(self._device), self.catalogue, capacity=settings.capacity, batch_size=settings.max_batch
            )
            # Refuses another backbone than that of the training; and what is done once is not left to a request.
            pool.logits(self._blank(served), [saved.name])
            self._lanes[key] = AdaptersLane(pool)

    def _blank(self, served: Served) -> torch.Tensor:
        """An image as the model of what is served takes it."""
        return torch.zeros(1, 3, *served.transform.size, device=self._device)

    def _open_learner(self, saved: Saved, key: str, own: bool, clips: dict[str, tuple]) -> TrainedModel:
        """The learner; those that attach nothing to their CLIP share one."""
        if key in clips:
            clip, tokenizer = clips[key]
            trained = open_saved(saved.folder, None, clip, tokenizer)
            if trained.model.adapter_name is None:
                return trained
            detach(clip, trained.model.adapter_name)
        trained = open_saved(saved.folder, own=own, checkpoint=self.settings.checkpoint)
        trained.model.to(self._device)
        if trained.model.adapter_name is None:
            clips[key] = trained.model.clip, trained.model.tokenizer.tokenize
        return trained


def answer(values: torch.Tensor, trained: TrainedModel, names: Sequence[str] | None, top_k: int) -> dict:
    """What a client is told: the most probable classes or labels with their probabilities, or a number.

    Args:
        values: probabilities (classes,), or a number ().
        trained: says what they are.
        names: names of the classes; numbers in the place of names that were not recorded.
        top_k: how many classes.
    """
    if trained.labels == "number":
        return {"labels": "number", "number": values.item()}
    ranked = sorted(enumerate(values.tolist()), key=lambda pair: (-pair[1], pair[0]))[:top_k]
    classes = [{"name": names[i] if names else str(i), "probability": value} for i, value in ranked]
    return {"labels": trained.labels, "classes": classes}


def _key(description: dict) -> str:
    """What is the same for what belongs to one backbone."""
    about = {key: value for key, value in description["backbone"].items() if key != "pooling"}  # older files lack it
    return json.dumps(about, sort_keys=True)
