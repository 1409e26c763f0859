"""`python -m visionpeft.serve RUN_OR_FOLDER...`: answer requests over HTTP with what was trained."""

import argparse
import contextlib
import socket as socketlib
from pathlib import Path
from typing import TYPE_CHECKING

from visionpeft.errors import ConfigurationError
from visionpeft.runs.command import Options

if TYPE_CHECKING:
    import uvicorn

MEGABYTE = 2**20
BACKLOG = 2048  # connections that wait to be accepted
# An idle connection is closed by the side that sends: a server that closes first does so while a request is under way,
# which then gets no answer. httpx keeps one for 5 seconds, requests for as long as it is open, load balancers for 60.
IDLE_SECONDS = 75


def serve(arguments: list[str]) -> None:
    """Load what is named and serve it until the process is stopped."""
    options = parse(arguments)
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigurationError(
            f"serving needs {error.name}, which is not installed; pip install 'visionpeft[serve]'"
        ) from None
    # imported here, because --help needs none of it
    from visionpeft.serving.application import application
    from visionpeft.serving.limits import Limits
    from visionpeft.serving.service import Service, Settings

    limits = Limits(
        body=int(options.max_body_mb * MEGABYTE),
        pixels=options.max_pixels,
        queue=options.queue,
        seconds=options.timeout,
    )
    settings = Settings(
        max_batch=options.max_batch,
        max_wait=options.max_wait_ms / 1000,
        capacity=int(options.capacity_mb * MEGABYTE),
        checkpoint=options.checkpoint,
        limits=limits,
    )
    socket = listening(options.host, options.port)  # before the models are loaded, which takes longer
    host, port = socket.getsockname()[:2]
    service = Service(options.places, settings)
    for remark in service.remarks:
        print(f"warning: {remark}", flush=True)
    server = server_of(application(service), options.timeout)
    shown = f"[{host}]" if ":" in host else host
    socket.listen(BACKLOG)  # whoever reads the next line may connect at once
    print(f"serving {', '.join(service.names()[:8])} on http://{shown}:{port}", flush=True)
    with contextlib.suppress(KeyboardInterrupt):  # raised again when everything has been answered
        server.run(sockets=[socket])


def server_of(application, seconds: float) -> "uvicorn.Server":
    """The HTTP server of an application that answers within so many seconds."""
    import uvicorn

    config = uvicorn.Config(
        application,
        log_level="warning",
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=max(1, round(seconds)),
        server_header=False,
        backlog=BACKLOG,
    )
    return uvicorn.Server(config)


def listening(host: str, port: int) -> socketlib.socket:
    """A socket at an address; port 0 is any that is free.

    Raises:
        ConfigurationError: there is no such address here, or the port is taken.
    """
    try:
        (family, kind, *_, address), *_ = socketlib.getaddrinfo(host, port, type=socketlib.SOCK_STREAM)
        made = socketlib.socket(family, kind)
        made.setsockopt(socketlib.SOL_SOCKET, socketlib.SO_REUSEADDR, 1)  # at once after another one has ended
        made.bind(address)
    except OSError as error:
        raise ConfigurationError(
            f"nothing can listen on {host}, port {port} ({error.strerror}); choose others with --host and --port"
        ) from None
    return made


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options of the command line.

    Raises:
        ConfigurationError: there is no such option, or it has another value.
    """
    parser = Options("python -m visionpeft.serve", description="Serve runs, adapters and learners over HTTP.")
    parser.add_argument(
        "places",
        nargs="+",
        metavar="RUN_OR_FOLDER",
        help="run directories, saved adapters or learners, or folders of such",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1, this machine alone)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (8000)")
    parser.add_argument("--max-batch", type=int, default=16, help="images computed at a time (16)")
    parser.add_argument(
        "--max-wait-ms", type=float, default=5, help="milliseconds an image waits for others to share its batch (5)"
    )
    parser.add_argument(
        "--capacity-mb", type=float, default=1024, help="most megabytes of adapters in memory, for each backbone (1024)"
    )
    parser.add_argument("--checkpoint", type=Path, help="weights of a backbone that was trained on from a local file")
    parser.add_argument("--max-body-mb", type=float, default=10, help="most megabytes of a request (10)")
    parser.add_argument("--max-pixels", type=int, default=32_000_000, help="most pixels of an image (32 million)")
    parser.add_argument("--queue", type=int, default=256, help="most requests at a time; others get 429 (256)")
    parser.add_argument("--timeout", type=float, default=30, help="seconds within which a request is answered (30)")
    options = parser.parse_args(arguments)
    if not 0 <= options.port < 65536:
        raise ConfigurationError(f"--port must be from 0, which is any, to 65535, not {options.port}")
    return options
