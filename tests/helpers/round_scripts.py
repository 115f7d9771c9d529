"""Plays a scenario of a round: lines that start with ">" are events, the others say what follows from them.

> policy quorum=2 deadline=100 grace=50        the policy that the round is planned with, or edited to
> at 95                                        the clock, in seconds
> open a b c target=2                          Opened
> a accept | deliver | start | receive | ok | bad | decline | fail | prolong UNTIL
> deadline | extend UNTIL | done | broken | abort
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from round_cases import BAD, BUSY, Driver, planned

from glora_server.rounds.assignment import (
    Accept,
    AcceptUpdate,
    AssignmentEvent,
    Decline,
    Deliver,
    Fail,
    Prolong,
    Receive,
    RejectUpdate,
    StartUpload,
)
from glora_server.rounds.policy import RoundPolicy, TooFew
from glora_server.rounds.round import (
    Aborted,
    AggregationDone,
    AggregationFailed,
    DeadlinePassed,
    Effect,
    Extended,
    PolicyChanged,
    Round,
    RoundEvent,
    RoundPhase,
    Validate,
)
from glora_wire.errors import GloraError, Reason, Refusal

_ROUND_EVENTS: dict[str, RoundEvent] = {
    "deadline": DeadlinePassed(),
    "done": AggregationDone(),
    "broken": AggregationFailed(Refusal(reason=Reason.AGGREGATION_FAILED, message="The worker died three times.")),
    "abort": Aborted(Refusal(reason=Reason.RUN_ABORTED, message="The run was aborted by admin.")),
}
_DEVICE_EVENTS: dict[str, AssignmentEvent] = {
    "accept": Accept(),
    "deliver": Deliver(),
    "start": StartUpload(),
    "receive": Receive(10),
    "ok": AcceptUpdate(),
    "bad": RejectUpdate(BAD),
    "decline": Decline(BUSY),
    "fail": Fail(BUSY),
}
_POLICY_WORDS = {
    "quorum": ("quorum", int),
    "deadline": ("deadline_seconds", float),
    "grace": ("grace_seconds", float),
    "longest": ("max_round_seconds", float),
    "too_few": ("too_few", TooFew),
}


def play(text: str) -> str:
    """The transcript: comments and events as they stand in `text`, after each event what followed from it."""
    driver = Driver(planned())
    lines: list[str] = []
    for line in text.splitlines():
        if line.startswith("> "):
            lines += [line, *(f"    {said}" for said in _perform(driver, line[2:].split()))]
        elif not line.startswith("    "):
            lines.append(line)
    return "\n".join(lines) + "\n"


def _perform(driver: Driver, words: list[str]) -> Iterator[str]:
    before = driver.round
    try:
        effects = _event(driver, words)
    except GloraError as error:
        yield f"refused: {error.message}"
        return
    yield from _changes(before, driver.round)
    if effects:
        yield f"owes {', '.join(_name(effect) for effect in effects)}"
    if driver.round == before and not effects and words[0] != "at":
        yield "nothing changes"


def _event(driver: Driver, words: list[str]) -> tuple[Effect, ...]:
    match words:
        case ["at", seconds]:
            driver.now = float(seconds)
            return ()
        case ["policy", *settings]:
            return _edit(driver, settings)
        case ["open", *rest]:
            options = [word for word in rest if "=" in word]
            devices = [word for word in rest if "=" not in word]
            target = int(options[0].partition("=")[2]) if options else 0
            count = len(driver.effects)
            driver.open(*devices, target=target)
            return tuple(driver.effects[count:])
        case ["extend", until]:
            return driver.give(Extended(float(until)))
        case [device, "prolong", until]:
            return driver.move(device, Prolong(float(until)))
        case [device, word]:
            return driver.move(device, _DEVICE_EVENTS[word])
        case [word]:
            return driver.give(_ROUND_EVENTS[word])
        case _:
            raise ValueError(f"a scenario has no event {' '.join(words)!r}")


def _edit(driver: Driver, settings: list[str]) -> tuple[Effect, ...]:
    policy: RoundPolicy = driver.round.policy
    for setting in settings:
        word, _, value = setting.partition("=")
        field, kind = _POLICY_WORDS[word]
        policy = replace(policy, **{field: kind(value)})
    return driver.give(PolicyChanged(policy))


def _changes(before: Round, after: Round) -> Iterator[str]:
    if (before.phase, before.deadline_at) != (after.phase, after.deadline_at):
        live = after.phase in {RoundPhase.COLLECTING, RoundPhase.GRACE}
        yield f"round {after.phase.value}" + (f" until {after.deadline_at:g}" if live else "")
    if after.message and after.message != before.message:
        yield f"because {after.reason}: {after.message}"
    known = {a.id: a for a in before.assignments}
    for assignment in after.assignments:
        old = known.get(assignment.id)
        if old is None or old.phase is not assignment.phase:
            why = f" ({assignment.reason})" if assignment.reason else ""
            yield f"{assignment.id} {assignment.phase.value}{why}"
        elif old.deadline_at != assignment.deadline_at:
            yield f"{assignment.id} has until {assignment.deadline_at:g}"


def _name(effect: Effect) -> str:
    if isinstance(effect, Validate):
        return f"validate {effect.assignment_id}"
    return type(effect).__name__.lower()
