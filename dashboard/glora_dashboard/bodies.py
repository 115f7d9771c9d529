"""What the REST API takes; keys that it does not know are refused."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Depends, Path, Query
from pydantic import BaseModel, ConfigDict, Field

from glora_dashboard.ports import Flavour
from glora_server.coordinator.model import DeviceState, Page
from glora_server.coordinator.run_sections import MAX_RANK
from glora_server.coordinator.views_history import AuditFilter, DeviceFilter, DeviceOrder

Name = Annotated[str, Path(min_length=1, max_length=128, description="Name or id.")]
Tag = Annotated[str, Field(min_length=1, max_length=64)]
Rank = Annotated[int, Field(ge=1, le=MAX_RANK)]


def _page(
    page_size: Annotated[int, Query(ge=1, le=1000, description="Items at most.")] = 100,
    page_token: Annotated[str, Query(max_length=512, description="next_page_token of the part before.")] = "",
) -> Page:
    """The part of a list that the query asks for."""
    return Page(size=page_size, token=page_token)


PageQuery = Annotated[Page, Depends(_page)]


def _devices(
    state: Annotated[
        DeviceState | None, Query(description="Only devices in this state. Without it, all but the revoked ones.")
    ] = None,
    tag: Annotated[str, Query(max_length=64, description="Only devices with this tag.")] = "",
    text: Annotated[str, Query(max_length=128, description="Part of the name, the id or the platform.")] = "",
    online: Annotated[bool | None, Query(description="Only devices that are there, or that are not.")] = None,
    order: Annotated[DeviceOrder, Query(description="What the list is sorted by.")] = DeviceOrder.ENROLMENT,
) -> DeviceFilter:
    """The devices that the query asks for."""
    return DeviceFilter(state=state, tag=tag, text=text, online=online, order=order)


def _audit(
    actor: Annotated[str, Query(max_length=128, description="Who did it.")] = "",
    action: Annotated[str, Query(max_length=64, description='What was done: "run.pause", or "run." for all.')] = "",
    target: Annotated[str, Query(max_length=256, description="What it was done to.")] = "",
    since: Annotated[float | None, Query(ge=0, le=1e11, description="From this time on, Unix seconds.")] = None,
    until: Annotated[float | None, Query(ge=0, le=1e11, description="Before this time, Unix seconds.")] = None,
) -> AuditFilter:
    """The rows of the audit that the query asks for."""
    return AuditFilter(actor=actor, action=action, target=target, since=since, until=until)


DevicesQuery = Annotated[DeviceFilter, Depends(_devices)]
AuditQuery = Annotated[AuditFilter, Depends(_audit)]


class Body(BaseModel):
    """Strict about types and keys."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class NewToken(Body):
    """A join token to be made."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"description": "berlin lab", "uses": 12, "ttl_seconds": 86400, "max_rank": 16, "tags": ["berlin"]}
            ]
        }
    )

    description: str = Field(default="", max_length=200)
    uses: int = Field(default=1, ge=1, le=100_000, description="Devices that may join with it.")
    ttl_seconds: float = Field(default=86400.0, ge=1, le=366 * 86400, description="Seconds that it is valid.")
    max_rank: Rank = Field(default=16, description="Largest rank that is granted to devices that join with it.")
    tags: list[Tag] = Field(default_factory=list, max_length=64, description="Tags that these devices get.")
    approve: bool = Field(default=True, description="They may work at once.")


class NewRun(Body):
    """A run to be created: its description (as TOML text or as JSON) and the manifest of its base model."""

    spec_toml: str | None = Field(default=None, max_length=1_000_000)
    spec: dict[str, Any] | None = None
    manifest: dict[str, Any]
    start: bool = False


class GrantedRank(Body):
    """A rank to be granted."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"rank": 8}]})

    rank: Rank


class Abort(Body):
    """Why a run is ended."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"reason": "wrong labels"}]})

    reason: str = Field(default="", max_length=500)


class Extension(Body):
    """How much later a deadline is to be."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"seconds": 600}]})

    seconds: float = Field(gt=0, le=30 * 86400)


class PolicyChanges(Body):
    """Keys of a run's policy with their new values."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"changes": {"quorum": 4, "deadline_seconds": 1800}}]})

    changes: dict[str, Any] = Field(min_length=1, max_length=50)


class ExportOrder(Body):
    """An adapter to be exported."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"rank": 8, "flavour": "serving", "version_number": 12}]})

    rank: Rank
    flavour: Flavour = "peft"
    version_number: int | None = Field(default=None, ge=0, description="Left out: the current version.")
