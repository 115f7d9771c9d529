"""What the OpenAPI document says beyond the routes themselves: conditions, repetitions and their answers."""

from __future__ import annotations

from typing import Any, Final

from glora_dashboard.permission import RoleApi
from glora_dashboard.problems import MEDIA_TYPE

STREAMED: Final = "x-streamed"
"""Marks an operation whose answer is written while it is sent, so that it has no ETag."""
_JSON: Final = "application/json"
_IF_NONE_MATCH: Final = {
    "name": "If-None-Match",
    "in": "header",
    "required": False,
    "description": "ETag of the answer that the client has; 304 when it still is the answer.",
    "schema": {"type": "string", "maxLength": 512},
}
_IDEMPOTENCY_KEY: Final = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": "A fresh UUID; the same request again within a day gets the first answer; nothing happens twice.",
    "schema": {"type": "string", "pattern": "^[!-~]{8,128}$"},
    "example": "6f1f0f0e-3b0e-4f0c-9a52-0a4f6e3f7f11",
}
_ETAG: Final = {"description": "Digest of the answer, for If-None-Match.", "schema": {"type": "string"}}
_REPLAYED: Final = {"description": '"true": this was answered before.', "schema": {"type": "string"}}
_UNCHANGED: Final = {"description": "The client has this answer already.", "headers": {"ETag": _ETAG}}
_PROBLEM: Final = {"schema": {"$ref": "#/components/schemas/Problem"}}
_OUTDATED: Final = {
    "description": "Somebody changed it since it had the row version of If-Match.",
    "content": {MEDIA_TYPE: _PROBLEM},
}


class RestApi(RoleApi):
    """An application whose description names ETags, If-Match and Idempotency-Key where they work."""

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document."""
        document = super().openapi()
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                if path.startswith("/api/"):
                    _describe(method, operation)
        return document


def _describe(method: str, operation: dict[str, Any]) -> None:
    parameters = operation.setdefault("parameters", [])
    known = {parameter["name"].lower() for parameter in parameters}
    responses = operation["responses"]
    for status, response in responses.items():
        _only_problems(status, response)
    if method == "get" and STREAMED not in operation and _JSON in responses.get("200", {}).get("content", {}):
        responses["200"].setdefault("headers", {})["ETag"] = _ETAG
        responses["304"] = _UNCHANGED
        if "if-none-match" not in known:
            parameters.append(_IF_NONE_MATCH)
    if method == "post":
        for status, response in responses.items():
            if status.startswith("2"):
                response.setdefault("headers", {})["Idempotency-Replayed"] = _REPLAYED
        if "idempotency-key" not in known:
            parameters.append(_IDEMPOTENCY_KEY)
    if "if-match" in known:
        responses["412"] = _OUTDATED


def _only_problems(status: str, response: dict[str, Any]) -> None:
    """Refusals come as problems and never as plain JSON, whatever FastAPI adds."""
    if status[0] in "45" and "content" in response:
        response["content"] = {MEDIA_TYPE: _PROBLEM}
