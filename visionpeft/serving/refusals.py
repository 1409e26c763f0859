"""Why a request is not answered: the status code and the one sentence that the client gets."""

import logging

from visionpeft.data.images import TooManyPixels
from visionpeft.errors import StorageError, UserError
from visionpeft.sharing.adapter_pool import PoolFull

LOG = logging.getLogger("visionpeft.serving")


class Refusal(UserError):
    """A request that is not answered.

    Args:
        code: status code of HTTP.
        sentence: what was wrong, for the client.
    """

    def __init__(self, code: int, sentence: str):
        super().__init__(sentence)
        self.code = code

    def __reduce__(self):
        return Refusal, (self.code, str(self))


def refusal_of(error: BaseException, adapter: str | None = None) -> Refusal:
    """What a client is told of an error; of the service's own faults the log has the whole, and the client no paths.

    Args:
        error: what was raised.
        adapter: the name of the adapter that was asked for.
    """
    if isinstance(error, Refusal):
        return error
    if isinstance(error, TooManyPixels):
        return Refusal(413, str(error))
    if isinstance(error, PoolFull):
        return Refusal(503, "the adapters in use leave no room for this one; ask again later")
    if isinstance(error, StorageError):
        LOG.error("%s", error)
        return Refusal(
            500, f"adapter {adapter!r} cannot be loaded: its files are damaged or belong to another backbone"
        )
    if isinstance(error, UserError):
        return Refusal(422, str(error))
    LOG.error("a request failed", exc_info=error)
    return Refusal(500, "the service failed at this request; its log says why")
