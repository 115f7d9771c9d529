"""What operators do; every change leaves an audit entry in the same transaction."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import structlog

from glora_server.coordinator.audit import note
from glora_server.coordinator.engine import Engine, one
from glora_server.coordinator.errors import unchanged
from glora_server.coordinator.exports import Exporter, Flavour
from glora_server.coordinator.hub import Hub
from glora_server.coordinator.model import Device, DeviceState, Run, TokenRecord
from glora_server.coordinator.opening import Opener
from glora_server.coordinator.people import Principal
from glora_server.coordinator.ports import Authority, Store, UnitOfWork
from glora_server.coordinator.run_spec import RunSpec
from glora_server.coordinator.starting import RunStarter
from glora_server.coordinator.token_secrets import secret_sha256
from glora_server.coordinator.transitions import Transition, step
from glora_server.coordinator.views import ExportRecord
from glora_server.rounds import run as run_machine
from glora_server.rounds.assignment import Fail, advance
from glora_server.rounds.ids import TokenId
from glora_server.rounds.round import GATHERING, LIVE, Aborted, Extended, Moved, PolicyChanged, Round
from glora_server.rounds.run import RunEvent
from glora_wire.errors import GloraError, Reason, Refusal
from glora_wire.join_token import JoinToken
from glora_wire.manifest import Manifest

log = structlog.get_logger(__name__)

MAX_TOKEN_SECONDS = 365 * 86400.0


@dataclass(slots=True, kw_only=True)
class Commands:
    """Every command of the command line and the browser; runs, devices and tokens by name or id."""

    store: Store
    engine: Engine
    opener: Opener
    hub: Hub
    authority: Authority
    starter: RunStarter
    exporter: Exporter
    clock: Callable[[], float]

    # --- tokens and devices

    async def create_token(
        self,
        actor: Principal,
        *,
        description: str = "",
        uses: int = 1,
        ttl_seconds: float,
        max_rank: int,
        tags: Sequence[str] = (),
        approve: bool = True,
    ) -> tuple[TokenRecord, str]:
        """A new join token: its record, and the text that is shown this once."""
        for name, value, least, most in (
            ("uses", uses, 1, 1_000_000),
            ("ttl_seconds", ttl_seconds, 1, MAX_TOKEN_SECONDS),
            ("max_rank", max_rank, 1, 4096),
        ):
            if not least <= value <= most:
                raise GloraError(Reason.SPEC_INVALID, f"{name} must be between {least} and {most:.0f}, not {value}.")
        token = JoinToken.new(self.authority.pin)
        now = self.clock()
        record = TokenRecord(
            id=TokenId(token.token_id),
            secret_sha256=secret_sha256(token.secret.hex()),
            description=description,
            created_at=now,
            expires_at=now + ttl_seconds,
            max_uses=uses,
            max_rank=max_rank,
            tags=tuple(tags),
            approve=approve,
        )
        await self.store.write(partial(self._add_token, actor, record))
        return record, token.format()

    def _add_token(self, actor: Principal, record: TokenRecord, uow: UnitOfWork) -> None:
        uow.tokens.add(record)
        self._note(uow, actor, "token.create", record.id, after=_token(record))

    async def revoke_token(self, actor: Principal, token_id: str) -> TokenRecord:
        """No device may join with it any more."""

        def work(uow: UnitOfWork) -> TokenRecord:
            token = uow.tokens.get(TokenId(token_id))
            saved = uow.tokens.save(replace(token, revoked=True))
            self._note(uow, actor, "token.revoke", token_id, before=_token(token), after=_token(saved))
            return saved

        return await self.store.write(work)

    async def approve_device(self, actor: Principal, name: str, *, expected: int | None = None) -> Device:
        """It may work."""
        return await self._set_state(actor, name, DeviceState.APPROVED, "device.approve", expected)

    async def suspend_device(self, actor: Principal, name: str, *, expected: int | None = None) -> Device:
        """It may not work until it is approved again."""
        return await self._set_state(actor, name, DeviceState.SUSPENDED, "device.suspend", expected)

    async def revoke_device(self, actor: Principal, name: str, *, expected: int | None = None) -> Device:
        """It is refused for good, at once; its open assignments end."""
        return await self._set_state(actor, name, DeviceState.REVOKED, "device.revoke", expected)

    async def _set_state(
        self, actor: Principal, name: str, state: DeviceState, action: str, expected: int | None
    ) -> Device:
        def work(uow: UnitOfWork) -> tuple[Device, list[Transition]]:
            device = unchanged(uow.devices.by_name(name), expected)
            if device.state is DeviceState.REVOKED and state is not DeviceState.REVOKED:
                raise GloraError(
                    Reason.DEVICE_REVOKED, f"Device {name} was revoked for good; let it join again with a new token."
                )
            saved = uow.devices.save(replace(device, state=state))
            self._note(uow, actor, action, saved.name, before={"state": device.state}, after={"state": state})
            return saved, [] if state is DeviceState.APPROVED else self._drop_work(uow, saved)

        device, _ = await self.engine.commit(work, moved=lambda made: made[1])
        if state is DeviceState.APPROVED:
            self.hub.device_changed(device.id)
            await self.opener.device_arrived()
        else:
            self.hub.forget_device(device.id)
        log.info("device_state", device=device.id, name=device.name, state=state.value, actor=actor.name)
        return device

    def _drop_work(self, uow: UnitOfWork, device: Device) -> list[Transition]:
        """Ends what the device was doing; an update that was received whole stays."""
        reason = Reason.DEVICE_REVOKED if device.state is DeviceState.REVOKED else Reason.DEVICE_SUSPENDED
        refusal = Refusal(reason=reason, message=f"Device {device.name} was {device.state.value} by an operator.")
        moved = []
        for assignment in uow.rounds.open_for(device.id):
            if assignment.round_id is None:
                uow.rounds.save_assignment(advance(assignment, Fail(refusal), at=self.clock()))
            elif assignment.received_at is None:
                moved.append(step(uow, assignment.round_id, Moved(assignment.id, Fail(refusal)), at=self.clock()))
        return moved

    async def set_device_rank(self, actor: Principal, name: str, rank: int, *, expected: int | None = None) -> Device:
        """Grant another rank, from the next assignment on."""
        if not 1 <= rank <= 4096:
            raise GloraError(Reason.SPEC_INVALID, f"A rank is between 1 and 4096, not {rank}.")

        def work(uow: UnitOfWork) -> Device:
            device = unchanged(uow.devices.by_name(name), expected)
            saved = uow.devices.save(replace(device, granted_rank=rank))
            before, after = {"granted_rank": device.granted_rank}, {"granted_rank": rank}
            self._note(uow, actor, "device.set-rank", saved.name, before=before, after=after)
            return saved

        device = await self.store.write(work)
        self.hub.device_changed(device.id)
        await self.opener.device_arrived()
        return device

    # --- runs

    async def create_run(self, actor: Principal, spec: RunSpec, manifest: Manifest, *, start: bool) -> Run:
        """A new run; raises STRATEGY_UNKNOWN, STRATEGY_OPTIONS or MANIFEST_INVALID when it could not work."""
        run = await self.starter.draft(spec, manifest)

        def work(uow: UnitOfWork) -> None:
            uow.runs.add(run)
            after = {"phase": run.phase, "strategy": spec.strategy.name, "max_rank": spec.lora.max_rank}
            self._note(uow, actor, "run.create", run.name, after=after)

        await self.store.write(work)
        return await self.start_run(actor, run.id) if start else run

    async def start_run(self, actor: Principal, name: str, *, expected: int | None = None) -> Run:
        """Make the first state and open rounds."""
        found = await self.store.read(lambda uow: uow.runs.by_name(name))
        run_machine.advance(found.phase, RunEvent.START)
        version_id = await self.starter.first_version(found)

        def work(uow: UnitOfWork) -> Run:
            run = unchanged(uow.runs.get(found.id), expected)
            phase = run_machine.advance(run.phase, RunEvent.START)
            uow.versions.publish(version_id, "{}")
            self._note(uow, actor, "run.start", run.name, before={"phase": run.phase}, after={"phase": phase})
            return uow.runs.save(replace(run, phase=phase, version_id=version_id, started_at=self.clock()))

        return await self._changed(await self.store.write(work))

    async def pause_run(self, actor: Principal, name: str, *, expected: int | None = None) -> Run:
        """Open no further round; a round that is open goes on."""
        return await self._advance(actor, name, RunEvent.PAUSE, expected)

    async def resume_run(self, actor: Principal, name: str, *, expected: int | None = None) -> Run:
        """Open rounds again."""
        return await self._advance(actor, name, RunEvent.RESUME, expected)

    async def _advance(self, actor: Principal, name: str, event: RunEvent, expected: int | None) -> Run:
        def work(uow: UnitOfWork) -> Run:
            run = unchanged(uow.runs.by_name(name), expected)
            phase = run_machine.advance(run.phase, event)
            self._note(uow, actor, f"run.{event}", run.name, before={"phase": run.phase}, after={"phase": phase})
            return uow.runs.save(replace(run, phase=phase))

        return await self._changed(await self.store.write(work))

    async def abort_run(self, actor: Principal, name: str, reason: str, *, expected: int | None = None) -> Run:
        """End the run and its round; what was aggregated stays and can be exported."""
        message = reason or f"The run was aborted by {actor.name}."

        def work(uow: UnitOfWork) -> tuple[Run, Transition | None]:
            run = unchanged(uow.runs.by_name(name), expected)
            phase = run_machine.advance(run.phase, RunEvent.ABORT)
            latest = uow.rounds.latest(run.id)
            ended = None
            if latest is not None and latest.phase in LIVE:
                refusal = Refusal(reason=Reason.RUN_ABORTED, message=message)
                ended = step(uow, latest.id, Aborted(refusal), at=self.clock())
            before, after = {"phase": run.phase}, {"phase": phase}
            self._note(uow, actor, "run.abort", run.name, before=before, after=after, reason=message)
            saved = uow.runs.save(
                replace(run, phase=phase, reason=Reason.RUN_ABORTED, message=message, ended_at=self.clock())
            )
            return saved, ended

        run, _ = await self.engine.commit(work, moved=lambda made: one(made[1]))
        return await self._changed(run)

    async def extend_round(self, actor: Principal, name: str, seconds: float, *, expected: int | None = None) -> Round:
        """Move the deadline of the run's open round by `seconds`."""
        if not 1.0 <= seconds <= 30 * 86400:
            raise GloraError(Reason.SPEC_INVALID, f"seconds must be between 1 and 2592000, not {seconds:g}.")

        def work(uow: UnitOfWork) -> Transition:
            run = unchanged(uow.runs.by_name(name), expected)
            latest = uow.rounds.latest(run.id)
            if latest is None or latest.phase not in GATHERING or latest.deadline_at is None:
                raise GloraError(Reason.ILLEGAL_TRANSITION, f"Run {run.name} has no round that collects updates now.")
            deadline = max(latest.deadline_at, self.clock()) + seconds
            before, after = {"deadline_at": latest.deadline_at}, {"deadline_at": deadline}
            self._note(uow, actor, "round.extend", f"{run.name}/{latest.number}", before=before, after=after)
            return step(uow, latest.id, Extended(deadline), at=self.clock())

        done = await self.engine.commit(work, moved=one)
        return done.after

    async def edit_policy(
        self, actor: Principal, name: str, changes: Mapping[str, object], *, expected: int | None = None
    ) -> Run:
        """Change keys of the run's policy; they count for the open round too, except what was decided already.

        Raises SPEC_INVALID, also when devices of other ranks would come in that the strategy cannot mix.
        """
        before = RunSpec.from_json((await self.store.read(lambda uow: uow.runs.by_name(name))).spec_json)
        after = before.with_policy(changes)
        if after.policy.min_rank < before.policy.min_rank:
            await self.starter.check_strategy(after)

        def work(uow: UnitOfWork) -> tuple[Run, Transition | None]:
            run = unchanged(uow.runs.by_name(name), expected)
            old = RunSpec.from_json(run.spec_json)
            spec = old.with_policy(changes)
            latest = uow.rounds.latest(run.id)
            moved = None
            if latest is not None and latest.phase in LIVE:
                moved = step(uow, latest.id, PolicyChanged(spec.policy), at=self.clock())
            was, now = _differences(old, spec)
            self._note(uow, actor, "run.edit", run.name, before=was, after=now)
            return uow.runs.save(replace(run, spec_json=spec.to_json())), moved

        run, _ = await self.engine.commit(work, moved=lambda made: one(made[1]))
        return await self._changed(run)

    async def _changed(self, run: Run) -> Run:
        log.info("run_phase", run=run.name, phase=run.phase.value, message=run.message)
        self.opener.soon(run.id)
        self.hub.run_changed(run.id)
        self.hub.wake_all()
        return run

    # --- exports

    async def export(
        self, actor: Principal, run_name: str, *, rank: int, version_number: int | None, flavour: Flavour, folder: Path
    ) -> ExportRecord:
        """Write a PEFT folder."""
        record = await self.exporter.export(
            run_name, rank=rank, version_number=version_number, flavour=flavour, folder=folder
        )

        def work(uow: UnitOfWork) -> None:
            self._note(uow, actor, "run.export", run_name, version=record.version_number, rank=rank, flavour=flavour)

        await self.store.write(work)
        return record

    def _note(
        self,
        uow: UnitOfWork,
        actor: Principal,
        action: str,
        target: str,
        *,
        before: Mapping[str, object] | None = None,
        after: Mapping[str, object] | None = None,
        **details: object,
    ) -> None:
        note(uow, actor, action, target, at=self.clock(), before=before, after=after, **details)


def _token(record: TokenRecord) -> dict[str, object]:
    """What the audit tells of a join token."""
    return {
        "description": record.description,
        "max_uses": record.max_uses,
        "max_rank": record.max_rank,
        "tags": record.tags,
        "approve": record.approve,
        "expires_at": record.expires_at,
        "revoked": record.revoked,
    }


def _differences(before: RunSpec, after: RunSpec) -> tuple[dict[str, object], dict[str, object]]:
    """The keys of the policy that differ, with their values before and after."""
    was, now = (json.loads(spec.to_json())["policy"] for spec in (before, after))
    changed = sorted(key for key in was.keys() | now.keys() if was.get(key) != now.get(key))
    return {key: was.get(key) for key in changed}, {key: now.get(key) for key in changed}
