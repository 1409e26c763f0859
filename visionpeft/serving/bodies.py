"""Around the application: bodies of requests are read here, within their bounds, before anything parses them."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable

from visionpeft.serving.limits import Limits
from visionpeft.serving.refusals import Refusal

Receive = Callable[[], Awaitable[dict]]


class Bodies:
    """ASGI middleware: no body larger than allowed, none that takes too long, no more predictions than allowed.

    Args:
        app: the application.
        limits: the bounds.
        answered: called with path, status code and seconds of each request.
        paths: paths with names of their own in the metrics; others are "other".
    """

    def __init__(self, app, limits: Limits, answered: Callable[[str, int, float], None], paths: frozenset[str]):
        self.app, self.limits, self.answered, self.paths = app, limits, answered, paths
        self.predicting = 0

    async def __call__(self, scope: dict, receive: Receive, send: Callable) -> None:
        """Answer a request, or have the application answer it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, code = time.monotonic(), 500
        path = scope["path"] if scope["path"] in self.paths else "other"

        async def sending(message: dict) -> None:
            nonlocal code
            if message["type"] == "http.response.start":
                code = message["status"]
            await send(message)

        predicts = path == "/predict" and scope["method"] == "POST"
        self.predicting += predicts
        try:
            full = predicts and self.predicting > self.limits.queue
            receive = await self._read(scope, receive, keep=not full)
            if full:
                raise Refusal(429, f"{self.limits.queue} requests are being answered already; ask again later")
            await self.app(scope, receive, sending)
        except Refusal as refusal:
            await refuse(refusal, sending)
        except ConnectionError:  # the client has gone; there is nobody to answer
            code = 499
        finally:
            self.predicting -= predicts
            self.answered(path, code, time.monotonic() - began)

    async def _read(self, scope: dict, receive: Receive, keep: bool) -> Receive:
        """Read the whole body; gives what the application receives in its place.

        Also a body that is of no use is read, but not kept: a client that is still sending would not see the answer.
        """
        too_large = Refusal(413, f"the request is larger than {self.limits.body:,} bytes")
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > 2 * self.limits.body:
            raise too_large
        body, size = bytearray(), 0
        try:
            async with asyncio.timeout(self.limits.seconds):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ConnectionError
                    size += len(message.get("body", b""))
                    more = message.get("more_body", False)
                    if size <= self.limits.body:
                        body += message.get("body", b"") if keep else b""
                    elif size > 2 * self.limits.body or not more:
                        raise too_large
        except TimeoutError:
            raise Refusal(408, f"the request was not sent within {self.limits.seconds:g} seconds") from None
        whole: list[dict] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def received() -> dict:
            return whole.pop() if whole else await receive()

        return received


async def refuse(refusal: Refusal, send: Callable) -> None:
    """Send a refusal; the rest of a body that was too large is not read, so the connection ends with it."""
    content = json.dumps({"error": str(refusal)}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    headers.append((b"connection", b"close"))
    if refusal.code == 429:
        headers.append((b"retry-after", b"1"))
    await send({"type": "http.response.start", "status": refusal.code, "headers": headers})
    await send({"type": "http.response.body", "body": content})
