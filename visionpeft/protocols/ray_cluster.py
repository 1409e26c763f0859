"""Work shared by the nodes of a Ray cluster, which must see the same folders under the same paths."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from visionpeft.errors import ConfigurationError, one_line


def map_on_cluster(function: Callable, pieces: Sequence, arguments: Sequence) -> None:
    """Call function(piece, *arguments) for each piece, as many at a time as the cluster has GPUs, or else CPUs.

    The cluster is the one that the variable RAY_ADDRESS names, or one of this machine alone that ends with the call.

    Raises:
        ConfigurationError: Ray is not installed, there is no cluster at that address, or, when the other calls have
            ended, one that failed.
    """
    try:
        import ray
    except ImportError:
        raise ConfigurationError(
            "--workers ray needs Ray; install it with pip install 'visionpeft[ray]', or give a number of processes"
        ) from None
    started = not ray.is_initialized()
    address = os.environ.get("RAY_ADDRESS") or "local"
    try:
        ray.init(address=address, ignore_reinit_error=True, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigurationError(
            f"no Ray cluster answers at {address} ({one_line(error)}); start one of this version with ray start, "
            "correct RAY_ADDRESS, or unset it for a cluster of this machine alone"
        ) from None
    try:
        gpus = ray.cluster_resources().get("GPU", 0)
        call = ray.remote(num_cpus=1, num_gpus=1 if gpus else 0)(_in_folder)
        calls = [call.remote(Path.cwd(), function, piece, *arguments) for piece in pieces]
        waiting = calls
        while waiting:
            print(f"{len(calls) - len(waiting)} of {len(calls)} finished", flush=True)
            _, waiting = ray.wait(waiting)
        ray.get(calls)
    except ray.exceptions.RayError as error:
        raise ConfigurationError(
            f"the Ray cluster could not do a part of the work ({str(error).strip().splitlines()[-1]}); its nodes need "
            "the packages and folders of this machine, and the same command again goes on with what is left"
        ) from None
    finally:
        if started:
            ray.shutdown()


def _in_folder(folder: Path, function: Callable, *arguments) -> None:
    os.chdir(folder)  # paths of the command line may be relative
    function(*arguments)
