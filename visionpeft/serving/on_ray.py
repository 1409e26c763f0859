"""The service on the machines of a Ray cluster: replicas of it behind the same HTTP application.

Ray's multiplexing sends a request to a replica that has its adapter in memory, if there is one that is not too busy.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve import Application
from ray.serve.handle import DeploymentResponse

from visionpeft.serving.application import application
from visionpeft.serving.limits import Limits
from visionpeft.serving.metrics import Metrics
from visionpeft.serving.refusals import LOG, Refusal
from visionpeft.serving.service import Service, Settings

MODELS = "visionpeft_models"


class Replica:
    """A `Service` in a process of the cluster; gives refusals as values, which keep their code on the way.

    Args:
        places: as for `Service`; every node sees these folders under these paths.
        settings: as for `Service`.
    """

    def __init__(self, places: Sequence[str], settings: Settings):
        self.service = Service(places, settings)

    @serve.multiplexed(max_num_models_per_replica=-1)  # how many are in memory, the pool decides
    async def adapter_here(self, name: str) -> str:
        """Have an adapter in memory; Ray learns that it is here."""
        await self.service.load(name)
        return name

    async def predict(
        self, content: bytes, name: str | None, top_k: int, class_names: Sequence[str] | None
    ) -> dict | Refusal:
        """As `Service.predict`."""
        try:
            if name:
                await self.adapter_here(name)
            return await self.service.predict(content, name, top_k, class_names)
        except Refusal as refusal:
            return refusal

    async def load(self, name: str) -> Refusal | None:
        """As `Service.load`."""
        try:
            await self.service.load(name)
        except Refusal as refusal:
            return refusal

    async def unload(self, name: str) -> Refusal | None:
        """As `Service.unload`."""
        try:
            await self.service.unload(name)
        except Refusal as refusal:
            return refusal

    def ask(self, method: str, *arguments: str) -> object:
        """What `adapters`, `adapter` or `health` of the service say."""
        try:
            return getattr(self.service, method)(*arguments)
        except Refusal as refusal:
            return refusal

    def check_health(self) -> None:
        """Ray starts a replica anew for which this raises."""
        self.service.health()


class Replicas:
    """The replicas, with what the HTTP application asks of a service.

    Args:
        limits: what a request may cost.
    """

    def __init__(self, limits: Limits):
        self.limits, self.metrics = limits, Metrics()
        self.handle = serve.get_deployment_handle(MODELS)

    async def predict(self, content: bytes, name: str | None, top_k: int, class_names: Sequence[str] | None) -> dict:
        """By a replica that has the adapter, if there is one."""
        return await _awaited(self._with(name).predict.remote(content, name, top_k, class_names))

    async def load(self, name: str) -> None:
        """On one replica."""
        await _awaited(self._with(name).load.remote(name))

    async def unload(self, name: str) -> None:
        """On the replica that has it."""
        await _awaited(self._with(name).unload.remote(name))

    def adapters(self) -> list[dict]:
        """Everything that can be asked; what is in memory is that of one replica."""
        return _waited(self.handle.ask.remote("adapters"))

    def adapter(self, name: str) -> dict:
        """What one tells apart."""
        return _waited(self.handle.ask.remote("adapter", name))

    def health(self) -> dict:
        """Of one replica; Ray asks all of them itself."""
        return _waited(self.handle.ask.remote("health"))

    def close(self) -> None:
        """Nothing: Ray ends the replicas."""

    def _with(self, name: str | None):
        return self.handle.options(multiplexed_model_id=name) if name else self.handle


def ray_application(
    places: Sequence[str | Path], settings: Settings | None = None, *, replicas: int = 1
) -> Application:
    """The service as an application of Ray Serve, for `ray.serve.run`.

    Args:
        places: as for `Service`; every node of the cluster must see these folders under these paths.
        settings: as for `Service`.
        replicas: processes with the models; each has a GPU where the cluster has any.
    """
    settings = settings or Settings()
    limits = settings.limits

    def build():
        return application(Replicas(limits))

    gpus = ray.cluster_resources().get("GPU", 0) if ray.is_initialized() else 0
    models = serve.deployment(
        Replica,
        name=MODELS,
        num_replicas=replicas,
        max_ongoing_requests=2 * settings.max_batch,  # one batch that is computed, and the next one
        ray_actor_options={"num_cpus": 1, "num_gpus": 1 if gpus else 0},
    )
    # More than are let in, so that it is the application that refuses, with 429.
    ingress = serve.deployment(serve.ingress(build)(), name="visionpeft", max_ongoing_requests=2 * limits.queue)
    return ingress.bind(models.bind([str(Path(place).resolve()) for place in places], settings))


async def _awaited(response: DeploymentResponse):
    with _lost():
        return _answer(await response)


def _waited(response: DeploymentResponse):
    with _lost():
        return _answer(response.result())


@contextmanager
def _lost() -> Iterator[None]:
    try:
        yield
    except RayError as error:
        LOG.error("%s", error)
        raise Refusal(503, "the replica that had this request has ended; ask again") from error


def _answer(value: object):
    if isinstance(value, Refusal):
        raise value
    return value
