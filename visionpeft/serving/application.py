"""The service over HTTP."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from typing import Protocol

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import Request

from visionpeft.serving.bodies import Bodies
from visionpeft.serving.limits import Limits
from visionpeft.serving.metrics import Metrics
from visionpeft.serving.refusals import Refusal, refusal_of
from visionpeft.serving.requests import (
    PREDICTION_BODY,
    AdapterDetails,
    AdapterName,
    Error,
    Health,
    ListedAdapter,
    Prediction,
    parsed,
    read_prediction,
)

PATHS = frozenset({"/", "/predict", "/adapters", "/health", "/metrics", "/openapi.json"})
# The page has its script and style in it, and loads nothing from anywhere else.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class AnyService(Protocol):
    """What answers: a `Service` here, or replicas of it elsewhere. Its errors are `Refusal`s."""

    limits: Limits
    metrics: Metrics

    async def predict(self, content: bytes, name: str | None, top_k: int, class_names: Sequence[str] | None) -> dict:
        """What is on an image."""

    async def load(self, name: str) -> None:
        """Have an adapter in memory."""

    async def unload(self, name: str) -> None:
        """Forget an adapter."""

    def adapters(self) -> list[dict]:
        """Everything that can be asked."""

    def adapter(self, name: str) -> dict:
        """What one tells apart."""

    def health(self) -> dict:
        """How it is."""

    def close(self) -> None:
        """Answer what waits, and end."""


def application(service: AnyService) -> Bodies:
    """The ASGI application of a service, which ends with it."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.get_running_loop().run_in_executor(None, service.close)

    # The pages for OpenAPI that FastAPI brings load their scripts from elsewhere.
    app = FastAPI(title="visionpeft", version=version("visionpeft"), lifespan=lifespan, docs_url=None, redoc_url=None)
    add_routes(app, service)
    return Bodies(app, service.limits, service.metrics.answered, PATHS)


def add_routes(app: FastAPI, service: AnyService) -> None:
    """What can be asked of the service."""
    errors = {code: {"model": Error} for code in (404, 408, 413, 415, 422, 429, 500, 503, 504)}

    async def in_thread(function, *arguments):  # what looks at folders
        try:
            return await asyncio.get_running_loop().run_in_executor(None, function, *arguments)
        except Exception as error:
            raise refusal_of(error, arguments[0] if arguments else None) from error

    @app.exception_handler(Refusal)
    async def refused(request: Request, error: Refusal) -> JSONResponse:
        headers = {"retry-after": "1"} if error.code in (429, 503) else None
        return JSONResponse({"error": str(error)}, error.code, headers)

    @app.exception_handler(HTTPException)
    async def not_there(request: Request, error: HTTPException) -> JSONResponse:
        sentence = {404: "there is no such path", 405: "this path takes another method"}.get(error.status_code)
        return JSONResponse({"error": sentence or str(error.detail)}, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"error": str(refusal_of(error))}, 500)

    @app.post("/predict", response_model=Prediction, response_model_exclude_none=True, responses=errors,
              openapi_extra=PREDICTION_BODY)  # fmt: skip
    async def predict(request: Request) -> dict:
        """What is on an image."""
        content, asked = await read_prediction(request)
        return await service.predict(content, asked.adapter, asked.top_k, asked.class_names)

    @app.get("/adapters", response_model=list[ListedAdapter])
    async def adapters() -> list[dict]:
        """Everything that can be asked."""
        return await in_thread(service.adapters)

    @app.get("/adapters/{name}", response_model=AdapterDetails, responses=errors)
    async def adapter(name: str) -> dict:
        """What an adapter or a learner tells apart."""
        return await in_thread(service.adapter, name)

    @app.post("/adapters", status_code=204, responses=errors, openapi_extra={
        "requestBody": {"required": True, "content": {"application/json": {"schema": AdapterName.model_json_schema()}}}
    })  # fmt: skip
    async def load(request: Request) -> Response:
        """Load an adapter before it is asked for."""
        await service.load(parsed(AdapterName, await request.body()).name)
        return Response(status_code=204)

    @app.delete("/adapters/{name}", status_code=204, responses={**errors, 409: {"model": Error}})
    async def unload(name: str) -> Response:
        """Forget an adapter; it is read anew when it is next asked for."""
        await service.unload(name)
        return Response(status_code=204)

    @app.get("/health", response_model=Health, responses={503: {"model": Error}})
    async def health() -> dict:
        """Whether the service answers."""
        return await in_thread(service.health)

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> HTMLResponse:
        headers = {"content-security-policy": POLICY, "x-content-type-options": "nosniff"}
        return HTMLResponse(_page(), headers=headers)


@cache
def _page() -> str:
    return files("visionpeft.serving").joinpath("page.html").read_text(encoding="utf-8")
