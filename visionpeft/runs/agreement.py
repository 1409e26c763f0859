"""What several processes say to each other before they train, so that what is wrong is said once, and at once.

They meet at the store at which PyTorch lets them find each other, which needs no process group: also a process that
could not even read its command line comes there, and the others need not wait for it until their patience ends.
"""

import hashlib
import json
import logging
import os
import socket
from collections.abc import Callable, Sequence
from datetime import timedelta

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import ParallelStrategy

from visionpeft.adapters.fingerprint import fingerprint
from visionpeft.data import ImageDataModule
from visionpeft.data.records import Files, size_of
from visionpeft.errors import UserError
from visionpeft.runs.command import PeerLost, said
from visionpeft.runs.environment import environment
from visionpeft.runs.sharding import ShardedBackbone

PATIENCE = timedelta(minutes=30)  # as long as Lightning waits for processes
_LAST_WORD = timedelta(seconds=10)


class Peers:
    """All processes of a training that has not begun.

    Args:
        address: of the machine with the store.
        port: of the store.
        rank: which of the processes this is.
        processes: how many there are.
    """

    _meetings = 0  # of this process, in which one training may follow another

    def __init__(self, address: str, port: int, rank: int, processes: int):
        self.rank, self.processes = rank, processes
        Peers._meetings += 1
        logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
        where = f"tcp://{address}:{port}?rank={rank}&world_size={processes}"
        try:
            store, _, _ = next(dist.rendezvous(where, timeout=PATIENCE))
        except (dist.DistError, RuntimeError, TimeoutError) as error:
            raise PeerLost(f"the processes of this training cannot meet at {address}:{port}: {error}") from error
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # the store outlives processes that are restarted
        self.store = dist.PrefixStore(f"visionpeft/{restarts}/{Peers._meetings}", store)

    @classmethod
    def started(cls) -> "Peers | None":
        """Those that `torchrun` or this command has started, None if it is not so."""
        if not TorchElasticEnvironment.detect():
            return None
        around = TorchElasticEnvironment()
        if around.world_size() == 1:
            return None
        return cls(around.main_address, around.main_port, around.global_rank(), around.world_size())

    @classmethod
    def of(cls, trainer: pl.Trainer) -> "Peers | None":
        """Those that another program has started, as a trainer finds them; None if it is alone."""
        strategy = trainer.strategy
        if not isinstance(strategy, ParallelStrategy) or trainer.world_size == 1:
            return None
        around = strategy.cluster_environment
        if not around.creates_processes_externally:
            return None
        return cls(around.main_address, around.main_port, trainer.global_rank, trainer.world_size)

    def exchange(self, topic: str, own: dict) -> list[dict]:
        """Say something and hear what each process says, in the order of their ranks.

        Raises:
            PeerLost: one says nothing.
        """
        self.store.set(f"{topic}/{self.rank}", json.dumps(own))
        keys = [f"{topic}/{rank}" for rank in range(self.processes)]
        try:
            self.store.wait(keys, PATIENCE)
            return [json.loads(self.store.get(key)) for key in keys]
        except (dist.DistError, RuntimeError) as error:
            raise PeerLost("another process of this training has ended before it began") from error

    def compare(self, own: dict[str, str], failure: str | None = None) -> None:
        """Go on if no process has failed and all say the same; else one says what is wrong, and all end with code 2.

        Args:
            own: by what it is, what must be the same in all processes; empty with a failure.
            failure: why this process cannot train.
        """
        heard = self.exchange("about", {"failure": failure, "own": own, "host": socket.gethostname()})
        for rank, one in enumerate(heard):
            if one["failure"] is not None:
                self._end(rank, one["failure"] + self._whose(rank, heard))
        for what in dict.fromkeys(each for one in heard for each in one["own"]):
            values = [one["own"].get(what, "none") for one in heard]
            rank = next((rank for rank, value in enumerate(values) if value != values[0]), None)
            if rank is not None:
                self._end(
                    0,
                    f"the processes of this training differ in {what}: {values[0]} in process 1 (on "
                    f"{heard[0]['host']}), {values[rank]} in process {rank + 1} of {self.processes} (on "
                    f"{heard[rank]['host']}); give all the same data, packages and options",
                )

    def _whose(self, rank: int, heard: Sequence[dict]) -> str:
        """In which process alone it went wrong, if it did not go wrong in all of them."""
        if all(one["failure"] is not None for one in heard):
            return ""
        return f" (in process {rank + 1} of {self.processes}, on {heard[rank]['host']})"

    def _end(self, speaker: int, sentence: str) -> None:
        """End all processes; one says why, and the others wait until it has, as their end might end it."""
        heard = [f"heard/{rank}" for rank in range(self.processes) if rank != speaker]
        try:
            if self.rank == speaker:
                said(sentence, 2)
                self.store.set("spoken", "")
                self.store.wait(heard, _LAST_WORD)  # the store may be in this process
            else:
                self.store.wait(["spoken"], _LAST_WORD)
                self.store.set(f"heard/{self.rank}", "")
        except (dist.DistError, RuntimeError):
            pass  # the other one has gone already
        raise SystemExit(2)

    def first_does(self, act: Callable[[], str]) -> str:
        """What a function gives in the first process; if it fails there, all end."""
        result, failure = None, None
        if self.rank == 0:
            try:
                result = act()
            except UserError as error:
                failure = str(error)
        first = self.exchange("first", {"result": result, "failure": failure})[0]
        if first["failure"] is not None:
            self._end(0, first["failure"])
        return first["result"]


def what_must_agree(trainer: pl.Trainer, task: pl.LightningModule, datamodule: ImageDataModule) -> dict[str, str]:
    """What must be the same in all processes of a training, by what it is; the first that differs is said."""
    about = {f"the version of {name}": version for name, version in environment()["packages"].items()}
    about["the number of devices"] = f"{trainer.num_nodes} x {trainer.num_devices}"
    about |= about_data(datamodule, task.kind)
    for split, source in datamodule.sources.items() if getattr(datamodule, "streams", False) else ():
        about[f"the first of the {split} {task.kind}"] = _digest([hashlib.sha256(source.check().content).hexdigest()])
    options = {
        "what is trained": task.label,
        "the number of trained parameters": sum(parameter.numel() for parameter in task.trained_parameters()),
        "the optimisation": task.optimisation,
        "the seed": task.seed,
        "the batch size": datamodule.batch_size,
        "the number of epochs": trainer.max_epochs,
    }
    if isinstance(trainer.strategy, ShardedBackbone):  # replicas get those of the first process
        options["the weights of the backbone"] = fingerprint(task.model)
    return about | {what: str(value) for what, value in options.items()}


def about_data(datamodule: ImageDataModule, kind: str) -> dict[str, str]:
    """What makes the data what they are, wherever they lie, by what it is; nothing of it needs an image to be read.

    Args:
        datamodule: the data.
        kind: what they are called, "images" or "videos".
    """
    about = {}
    for split, source in datamodule.sources.items():
        about[f"the number of {split} {kind}"] = str(size_of(source))  # None of a stream that does not say
    about["the classes"] = _digest(datamodule.class_names)
    if getattr(datamodule, "streams", False):  # what follows the first image is known only when it is read
        return about
    for split, source in datamodule.sources.items():
        about[f"the labels of the {split} {kind}"] = _digest(source.labels)
        if isinstance(source, Files):  # their folders may be others on each machine, but not their names
            about[f"the names of the {split} {kind}"] = _digest([path.name for path in source.paths])
    return about


def _digest(values: Sequence) -> str:
    """A short hash of what is written down the same way on every machine."""
    return hashlib.blake2b(json.dumps([str(value) for value in values]).encode(), digest_size=4).hexdigest()
