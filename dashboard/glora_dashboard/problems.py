"""Errors as application/problem+json (RFC 9457): the reason for scripts, the sentence for people."""

from __future__ import annotations

import http
from collections.abc import Mapping
from typing import Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, JsonValue
from pydantic_core import ErrorDetails
from starlette.exceptions import HTTPException
from starlette.responses import Response

from glora_server.validation_text import Problem as Mistake
from glora_server.validation_text import sentence_of
from glora_wire.errors import GloraError, Kind, Reason

MEDIA_TYPE: Final = "application/problem+json"
TYPE_PREFIX: Final = "urn:glora:problem:"
_STATUS: Final[Mapping[Kind, int]] = {
    Kind.INVALID: 400,
    Kind.OUT_OF_RANGE: 400,
    Kind.UNAUTHENTICATED: 401,
    Kind.FORBIDDEN: 403,
    Kind.NOT_FOUND: 404,
    Kind.CONFLICT: 409,
    Kind.PRECONDITION: 409,
    Kind.FENCED: 409,
    Kind.EXHAUSTED: 429,
    Kind.DATA_LOSS: 500,
    Kind.UNAVAILABLE: 503,
    Kind.INTERNAL: 500,
}
_EXCEPTIONS: Final[Mapping[Reason, int]] = {Reason.TOKEN_UNKNOWN: 404}
"""A join token that is not there says nothing about who is asking."""


_EXAMPLE: Final[dict[str, JsonValue]] = {
    "type": f"{TYPE_PREFIX}RUN_UNKNOWN",
    "title": "Not Found",
    "status": 404,
    "reason": "RUN_UNKNOWN",
    "detail": "There is no run 'news'; the newest are news-topics, sentiment.",
    "details": {"run": "news"},
}


class Problem(BaseModel):
    """Why a request was refused."""

    model_config = ConfigDict(json_schema_extra={"examples": [_EXAMPLE]})

    type: str = Field(default="about:blank", description="urn:glora:problem:REASON; docs/rest.md says what each means.")
    title: str
    status: int
    reason: str = Field(description="Stable name, for scripts.")
    detail: str = Field(description="What was wrong and what to do.")
    details: dict[str, str] = Field(default_factory=dict, description="The variables of the sentence, by name.")


def status_of(error: GloraError) -> int:
    """The HTTP status of an error."""
    return _EXCEPTIONS.get(error.reason, _STATUS[error.kind])


def problem_response(error: GloraError, status: int | None = None) -> Response:
    """The answer that tells `error`; `status` where HTTP has a better word than the error's kind."""
    code = status or status_of(error)
    problem = Problem(
        type=f"{TYPE_PREFIX}{error.reason.value}",
        title=http.HTTPStatus(code).phrase,
        status=code,
        reason=error.reason.value,
        detail=error.message,
        details=error.details,
    )
    headers = {"Cache-Control": "no-store"}
    if code == http.HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, round(error.retry_after)))
    return Response(problem.model_dump_json(), code, headers, MEDIA_TYPE)


def add_problem_handlers(app: FastAPI) -> None:
    """Make `app` answer every error with a problem."""
    app.add_exception_handler(GloraError, _on_glora_error)
    app.add_exception_handler(RequestValidationError, _on_wrong_request)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_bug)


def _on_glora_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, GloraError):
        raise error
    if error.reason is Reason.STALE_STATE and "if-match" in request.headers:
        return problem_response(error, http.HTTPStatus.PRECONDITION_FAILED)
    return problem_response(error)


def _on_wrong_request(_request: Request, error: Exception) -> Response:
    if not isinstance(error, RequestValidationError):
        raise error
    sentences = "\n".join(_mistake(details) for details in error.errors())
    return problem_response(GloraError(Reason.REQUEST_INVALID, sentences), 422)


def _mistake(details: ErrorDetails) -> str:
    place, *path = details["loc"]
    location = () if details["type"] == "json_invalid" else tuple(path)
    return Mistake(location=location, text=sentence_of(details)).sentence(str(place))


def _on_http_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    sentence = str(error.detail)
    if error.status_code == http.HTTPStatus.NOT_FOUND:
        sentence = f"There is nothing at {request.url.path}; /api/v1/openapi.json lists what there is."
    elif error.status_code == http.HTTPStatus.METHOD_NOT_ALLOWED:
        sentence = f"{request.method} is not possible at {request.url.path}; /api/v1/openapi.json says what is."
    return problem_response(GloraError(Reason.REQUEST_INVALID, sentence), error.status_code)


def _on_bug(_request: Request, _error: Exception) -> Response:
    """Say nothing of what broke: the server's log has it."""
    return problem_response(GloraError(Reason.INTERNAL, "The server failed at this; its log says why."))
