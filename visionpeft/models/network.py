"""Fail at once, not after minutes of retries, when weights are wanted and the hub cannot be reached."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from huggingface_hub import constants
from torch import nn

from visionpeft.errors import ConfigurationError, one_line


@contextmanager
def offline_if_unreachable(timeout: float = 5.0) -> Iterator[bool]:
    """Switch the Hugging Face hub to its cache while the hub cannot be reached; yields whether it is offline.

    A configured proxy is trusted to reach the hub.
    """
    before = constants.HF_HUB_OFFLINE
    offline = before or not _reachable(timeout)
    constants.HF_HUB_OFFLINE = offline
    try:
        yield offline
    finally:
        constants.HF_HUB_OFFLINE = before


def _reachable(timeout: float) -> bool:
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy") or os.environ.get("ALL_PROXY"):
        return True
    address = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((address.hostname, address.port or 443), timeout).close()
    except OSError:
        return False
    return True


def fetched(name: str, create: Callable[[], nn.Module]) -> nn.Module:
    """Run `create`, which may fetch weights; without network only weights in the cache can be had.

    Raises:
        ConfigurationError: they cannot be loaded.
    """
    with offline_if_unreachable() as offline:
        try:
            return create()
        except TypeError:
            raise
        except Exception as error:
            reason = "no network, and they are not in the cache" if offline else one_line(error)
            raise ConfigurationError(
                f"the weights of {name} could not be loaded ({reason}); give a local file of them with checkpoint=, "
                "or use the backbone nano_vit, whose weights are in the package"
            ) from error
