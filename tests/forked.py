"""Processes that have everything imported already: importing Lightning takes longer than most trainings here."""

import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path


def start(function, *arguments, environment=(), output=os.devnull):
    """Call a function in a forked process; returns its id.

    Args:
        function: returns the exit code.
        arguments: of the function.
        environment: variables of that process.
        output: file for what it prints.
    """
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.environ.update(environment)
        # A shell's background jobs ignore Ctrl-C, and so would their children.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        if output != os.devnull:
            os.dup2(file, 2)
            sys.stdout = sys.stderr = os.fdopen(file, "w")  # pytest has put others in their places
        code = function(*arguments)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(child, seconds=None):
    """Its exit code; after some seconds it is killed, and there is none."""
    deadline = None if seconds is None else time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if deadline is not None and time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(0.005)


def start_together(folder: Path, function, *arguments, processes=2):
    """Call a function in processes that find each other as those of `torchrun` do; returns their ids.

    What process r prints is in `folder / "r.txt"`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    size = str(processes)
    here = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    here |= {"GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test"}
    return [
        start(
            function,
            *arguments,
            environment=here | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            output=folder / f"{rank}.txt",
        )
        for rank in range(processes)
    ]
