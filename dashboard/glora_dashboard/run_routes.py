"""/api/v1/runs."""

from __future__ import annotations

import json
from typing import Annotated, Final

from fastapi import APIRouter, Query

from glora_dashboard.bodies import Abort, Extension, Name, NewRun, PageQuery, PolicyChanges
from glora_dashboard.etags import IfMatch
from glora_dashboard.history_routes import history_routes
from glora_dashboard.models import PageAnswer
from glora_dashboard.permission import Operator, least
from glora_dashboard.ports import Commands, Queries
from glora_dashboard.run_models import RoundRecordAnswer, RunAnswer
from glora_server.coordinator.people import Role
from glora_server.coordinator.run_spec import RunSpec, parse_run_toml
from glora_wire.errors import GloraError, Reason
from glora_wire.manifest import Manifest

MAX_WAIT_SECONDS: Final = 60.0


def run_routes(commands: Commands, queries: Queries) -> APIRouter:
    """Routes that show runs and change them."""
    routes = APIRouter(prefix="/runs", tags=["runs"])
    _add_questions(routes, queries)
    _add_commands(routes, commands, queries)
    both = APIRouter()
    both.include_router(routes)
    both.include_router(history_routes(queries))
    return both


def _add_questions(routes: APIRouter, queries: Queries) -> None:
    @routes.get("", dependencies=[least(Role.VIEWER)])
    async def list_runs(page: PageQuery) -> PageAnswer[RunAnswer]:
        """Runs, newest first; without the devices of their rounds."""
        listing = await queries.runs(page)
        return PageAnswer(items=[RunAnswer.of(view) for view in listing.items], next_page_token=listing.next_token)

    @routes.get("/{name}", dependencies=[least(Role.VIEWER)])
    async def show_run(
        name: Name,
        wait: Annotated[int | None, Query(ge=0, description="Answer once the revision is another one.")] = None,
        timeout: Annotated[float, Query(ge=0, le=MAX_WAIT_SECONDS, description="Seconds to wait at most.")] = 25.0,  # noqa: ASYNC109
    ) -> RunAnswer:
        """One run: where it stands, who is in its round, why it waits, how good it is."""
        if wait is not None:
            await queries.changed(name, wait, timeout)
        return RunAnswer.of(await queries.run(name))


def _add_commands(routes: APIRouter, commands: Commands, queries: Queries) -> None:
    @routes.post("", status_code=201)
    async def create_run(actor: Operator, body: NewRun) -> RunAnswer:
        """Create a run, and start it when `start` is true."""
        spec = _spec_of(body)
        manifest = Manifest.from_json(json.dumps(body.manifest))
        run = await commands.create_run(actor, spec, manifest, start=body.start)
        return RunAnswer.of(await queries.run(run.name))

    @routes.post("/{name}/start")
    async def start_run(actor: Operator, name: Name, expected: IfMatch) -> RunAnswer:
        """Make the first state and begin with the rounds."""
        await commands.start_run(actor, name, expected=expected)
        return RunAnswer.of(await queries.run(name))

    @routes.post("/{name}/pause")
    async def pause_run(actor: Operator, name: Name, expected: IfMatch) -> RunAnswer:
        """Open no further round; an open one goes on."""
        await commands.pause_run(actor, name, expected=expected)
        return RunAnswer.of(await queries.run(name))

    @routes.post("/{name}/resume")
    async def resume_run(actor: Operator, name: Name, expected: IfMatch) -> RunAnswer:
        """Open rounds again."""
        await commands.resume_run(actor, name, expected=expected)
        return RunAnswer.of(await queries.run(name))

    @routes.post("/{name}/abort")
    async def abort_run(actor: Operator, name: Name, body: Abort, expected: IfMatch) -> RunAnswer:
        """End the run and its open round for good."""
        await commands.abort_run(actor, name, body.reason, expected=expected)
        return RunAnswer.of(await queries.run(name))

    @routes.post("/{name}/extend")
    async def extend_round(actor: Operator, name: Name, body: Extension, expected: IfMatch) -> RoundRecordAnswer:
        """Move the deadline of the open round."""
        return RoundRecordAnswer.of_round(await commands.extend_round(actor, name, body.seconds, expected=expected))

    @routes.patch("/{name}/policy")
    async def edit_policy(actor: Operator, name: Name, body: PolicyChanges, expected: IfMatch) -> RunAnswer:
        """Change keys of the policy, from the next round on."""
        await commands.edit_policy(actor, name, body.changes, expected=expected)
        return RunAnswer.of(await queries.run(name))


def _spec_of(body: NewRun) -> RunSpec:
    if body.spec_toml is not None and body.spec is None:
        return parse_run_toml(body.spec_toml)
    if body.spec is not None and body.spec_toml is None:
        return RunSpec.from_json(json.dumps(body.spec), source="spec")
    raise GloraError(Reason.REQUEST_INVALID, "Give the run's description either as spec (JSON) or as spec_toml (text).")
