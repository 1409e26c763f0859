"""Work that is done once: each piece in a folder of its own, by one process at a time, again after any kill."""

import contextlib
import gc
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, Protocol

import torch
from rich.console import Console

from visionpeft.errors import ConfigurationError, UserError
from visionpeft.files import claim
from visionpeft.protocols.ray_cluster import map_on_cluster
from visionpeft.runs.command import silence
from visionpeft.runs.launchers import be_alone, take_gpu

Workers = int | Literal["ray"]

PAUSE = 0.5  # seconds between looks at what other processes are doing


class Work(Protocol):
    """A piece of work. Pieces are pickled where several processes share them.

    Attributes:
        name: of its folder.
        text: what it is, in words.
    """

    name: str
    text: str

    def done(self, folder: Path) -> bool:
        """Whether nothing is left to do."""

    def do(self, folder: Path) -> None:
        """Do it, or go on with what was interrupted."""


def finish(pieces: Sequence[Work], output: Path, workers: Workers = 1) -> None:
    """Do what is not done yet.

    Processes and machines that are given the same pieces and folder share them: a piece is claimed by a lock in its
    folder, which ends with its process. A piece that fails does not stop the others.

    Args:
        pieces: what is to be done, in order.
        output: folder of their folders.
        workers: processes on this machine, or "ray": the nodes of a Ray cluster.

    Raises:
        ConfigurationError: no such number of workers; see also `map_on_cluster`.
        UserError: the first piece that failed, when the others are done.
    """
    check_workers(workers)
    be_alone()
    if workers == "ray":
        left = [piece for piece in pieces if not piece.done(output / piece.name)]
        if left:
            map_on_cluster(_do_on_node, left, [output.resolve()])
    elif workers > 1 and len(pieces) > 1:
        _in_processes(pieces, output, min(workers, len(pieces)))
    work_through(pieces, output)


def check_workers(workers: Workers) -> None:
    """Refuse what is no number of workers.

    Raises:
        ConfigurationError: it is none.
    """
    if workers != "ray" and not (isinstance(workers, int) and workers >= 1):
        raise ConfigurationError(f"workers must be 1 or more processes, or 'ray', not {workers!r}")


def work_through(pieces: Sequence[Work], output: Path) -> None:
    """Do in this process what is not done yet, and wait for what others are doing; raises as `finish`."""
    failures: dict[str, UserError] = {}
    told: set[str] = set()
    while True:
        others = False
        for number, piece in enumerate(pieces, start=1):
            text = f"{number} of {len(pieces)}: {piece.text}"
            if piece.done(output / piece.name):
                if piece.name not in told:
                    Console().print(f"{text}: finished before", highlight=False, soft_wrap=True)
                told.add(piece.name)
            elif piece.name not in failures:
                try:
                    others |= not _claim_and_do(piece, output, text)
                    told.add(piece.name)
                except UserError as error:
                    failures[piece.name] = error
                    Console().print(f"failed: {error}", highlight=False, markup=False, soft_wrap=True)
        if not others:
            break
        time.sleep(PAUSE)
    if failures:
        raise next(iter(failures.values()))


def _claim_and_do(piece: Work, output: Path, text: str) -> bool:
    """Do a piece, unless another process has claimed it, which returns False."""
    folder = output / piece.name
    folder.mkdir(parents=True, exist_ok=True)
    with claim(folder / "lock") as mine:
        if mine and not piece.done(folder):  # nobody has finished it in the meantime
            Console().print(f"[bold]{text}[/bold]", highlight=False, soft_wrap=True)
            try:
                piece.do(folder)
            finally:
                # Task, data and trainer of a run refer to each other; left to chance, those of several stay in memory.
                gc.collect()
    return mine


def _in_processes(pieces: Sequence[Work], output: Path, workers: int) -> None:
    """Share the pieces between processes; each writes what it prints into `output/workers`."""
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // workers)
    processes = []
    for number in range(workers):
        log = output / "workers" / f"{os.getpid()}-{number + 1}.log"
        processes.append(context.Process(target=_worker, args=(list(pieces), output, threads, os.getpid(), log)))
        with _one_gpu(number):
            processes[-1].start()
    try:
        shown = -1
        while any(process.is_alive() for process in processes):
            count = sum(piece.done(output / piece.name) for piece in pieces)
            if count != shown:
                print(f"{count} of {len(pieces)} finished", flush=True)
                shown = count
            time.sleep(PAUSE)
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _worker(pieces: Sequence[Work], output: Path, threads: int, parent: int, log: Path) -> None:
    torch.set_num_threads(threads)
    silence()
    for piece in pieces:
        if os.getppid() == parent:  # without its parent it begins nothing new
            _do_quietly(piece, output, log)


def _do_on_node(piece: Work, output: Path) -> None:
    be_alone()  # srun may have started the nodes of the cluster
    silence()
    _do_quietly(piece, output, output / "workers" / f"{piece.name}.log")


def _do_quietly(piece: Work, output: Path, log: Path) -> None:
    """Do a piece that nobody has done or claimed; what it prints goes into a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    kept = contextlib.suppress(UserError)  # what fails is tried again, and told, by the parent
    with log.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file), kept:
        if not piece.done(output / piece.name):
            _claim_and_do(piece, output, piece.text)


@contextlib.contextmanager
def _one_gpu(number: int) -> Iterator[None]:
    """Processes started here see one of the GPUs, in turn."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    take_gpu(number)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before
