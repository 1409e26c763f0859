"""Requests and answers as JSON, and how a request for a prediction is read."""

import base64
import binascii
import json

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from visionpeft.serving.refusals import Refusal

MOST_FIELDS = 2000


class PredictionRequest(BaseModel):
    """A request for a prediction, as JSON."""

    model_config = ConfigDict(extra="forbid")

    image: str = Field(description="the image file in base64; no URL")
    adapter: str | None = Field(None, description="may be left out if only one is served")
    top_k: int = Field(5, ge=1, description="how many classes")
    class_names: list[str] | None = Field(None, description="classes to tell apart, for a learner that takes any")


class ClassProbability(BaseModel):
    """A class and its probability."""

    name: str
    probability: float


class Prediction(BaseModel):
    """What is on an image: a class, labels of which several may apply, or a number.

    Probabilities of classes sum to 1, except of a learner with loss "sigmoid", which judges each class by itself.
    """

    adapter: str
    labels: str = Field(description='"classes", "several" or "number"')
    classes: list[ClassProbability] | None = Field(None, description="the most probable first")
    number: float | None = None


class ListedAdapter(BaseModel):
    """An adapter or a learner that can be asked."""

    name: str
    kind: str = Field(description='"adapter" or "learner"')
    loaded: bool
    bytes: int | None = Field(description="of an adapter in memory")


class AdapterDetails(BaseModel):
    """What an adapter or a learner tells apart."""

    name: str
    kind: str
    labels: str
    class_names: list[str] | None
    takes_class_names: bool


class AdapterName(BaseModel):
    """Which adapter to load."""

    model_config = ConfigDict(extra="forbid")

    name: str


class Health(BaseModel):
    """Whether the service answers."""

    status: str
    adapters_loaded: int
    waiting: int


class Error(BaseModel):
    """Why there is no answer, in one sentence."""

    error: str


# In OpenAPI a body of two kinds has to be written out.
PREDICTION_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": PredictionRequest.model_json_schema()},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["image"],
                    "properties": {
                        "image": {"type": "string", "format": "binary", "description": "the image file"},
                        "adapter": {"type": "string"},
                        "top_k": {"type": "integer", "minimum": 1, "default": 5},
                        "class_names": {"type": "array", "items": {"type": "string"}},
                    },
                }
            },
        },
    }
}


async def read_prediction(request: Request) -> tuple[bytes, PredictionRequest]:
    """The image file, and what is asked about it.

    Raises:
        Refusal: 415 for another kind of body, 422 for what cannot be read.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        asked = parsed(PredictionRequest, await request.body())
        try:
            return base64.b64decode(asked.image, validate=True), asked
        except (binascii.Error, ValueError):
            raise Refusal(422, "image is not base64 of an image file (URLs are not fetched)") from None
    if kind == "multipart/form-data":
        return await _read_form(request)
    raise Refusal(415, "send multipart/form-data with the image file, or application/json with it in base64")


def parsed(kind: type[BaseModel], content: bytes) -> BaseModel:
    """A request out of its JSON.

    Raises:
        Refusal: 422, with what is wrong.
    """
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        raise Refusal(422, _sentence(error)) from None


async def _read_form(request: Request) -> tuple[bytes, PredictionRequest]:
    try:
        form = await request.form(max_files=1, max_fields=MOST_FIELDS)
    except HTTPException as error:
        raise Refusal(422, f"the form cannot be read ({error.detail})") from None
    image = form.get("image")
    if not isinstance(image, UploadFile):
        raise Refusal(422, "the form has no file called image")
    if wrong := sorted(form.keys() - {"image", "adapter", "top_k", "class_names"}):
        raise Refusal(422, f"the form has a field {wrong[0]!r}; it can have image, adapter, top_k and class_names")
    fields: dict = {key: form[key] for key in ("adapter", "top_k") if form.get(key)}
    if names := [name for name in form.getlist("class_names") if name]:
        fields["class_names"] = names
    try:
        asked = PredictionRequest.model_validate(fields | {"image": ""})
    except ValidationError as error:
        raise Refusal(422, _sentence(error)) from None
    return await image.read(), asked


def _sentence(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(map(str, first["loc"]))
    return f"{where}: {first['msg']}" if where else json.dumps(first["msg"])[1:-1]
