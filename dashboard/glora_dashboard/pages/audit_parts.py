"""Rows of the audit as people read them: what was changed from what to what. Pure functions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Final

from markupsafe import Markup

from glora_dashboard.pages import format as fmt
from glora_dashboard.pages.lists import Cell, wide_table
from glora_dashboard.pages.parts import anchor, join
from glora_server.coordinator.model import AuditEntry

_WORDS: Final[Mapping[str, str]] = {
    "api-token.create": "made an API token",
    "api-token.revoke": "revoked an API token",
    "device.enrol": "joined with a device",
    "device.approve": "approved a device",
    "device.revoke": "revoked a device",
    "device.set-rank": "changed a device's rank",
    "device.suspend": "suspended a device",
    "round.extend": "extended a round",
    "run.abort": "aborted a run",
    "run.create": "created a run",
    "run.edit": "edited a run's policy",
    "run.export": "exported a version",
    "run.pause": "paused a run",
    "run.resume": "resumed a run",
    "run.start": "started a run",
    "session.end": "ended an own session",
    "session.refused": "could not sign in",
    "session.sign-in": "signed in",
    "session.sign-out": "signed out",
    "token.create": "made a join token",
    "token.revoke": "revoked a join token",
    "user.change-password": "changed the own password",
    "user.create": "made a user",
    "user.disable": "disabled a user",
    "user.enable": "enabled a user",
    "user.remove": "removed a user",
    "user.set-password": "set a user's password",
    "user.set-role": "changed a user's role",
}
_MOST_LETTERS: Final = 120
_MISSING: Final = object()


def action_words(action: str) -> str:
    """What somebody did, in words; the action itself where there are none."""
    return _WORDS.get(action, action)


def audit_table(entries: tuple[AuditEntry, ...]) -> Markup:
    """Rows of the audit, newest first."""
    if not entries:
        return Markup('<p class="muted">Nothing like that was done. Change what is looked for above.</p>')
    return wide_table(("When", "Who", "Did", "To", "Change"), map(_row, entries), label="Audit")


def _row(entry: AuditEntry) -> Sequence[Cell]:
    origin = Markup("<small>from {}</small>").format(entry.origin) if entry.origin else ""
    return (
        Markup('<span class="nowrap">{}</span><small>{}</small>').format(
            fmt.moment(entry.at, mode="time"), fmt.moment(entry.at)
        ),
        Markup("<b>{}</b>{}").format(entry.actor or "somebody unknown", origin),
        Markup('{}<small class="mono">{}</small>').format(action_words(entry.action), entry.action),
        _target(entry),
        change(entry),
    )


def _target(entry: AuditEntry) -> Cell:
    kind, _, _ = entry.action.partition(".")
    if kind == "device":
        return anchor(entry.target, f"/devices/{entry.target}")
    if kind == "run":
        return anchor(entry.target, f"/runs/{entry.target}")
    if kind == "round" and "/" in entry.target:
        name, _, number = entry.target.rpartition("/")
        return anchor(f"{name}, round {number}", f"/runs/{name}/rounds/{number}")
    if kind == "token":
        return Markup('<span class="mono">{}</span>').format(entry.target)
    return entry.target


def change(entry: AuditEntry) -> Markup:
    """What the entry changed: each key with its old and new value, then what else was said."""
    before, after, details = (_table(text) for text in (entry.before_json, entry.after_json, entry.details_json))
    lines = [_line(key, before.get(key, _MISSING), after.get(key, _MISSING)) for key in {**before, **after}]
    lines += [_line(key, _MISSING, value) for key, value in details.items()]
    shown = [line for line in lines if line]
    return Markup('<ul class="changes">{}</ul>').format(join(shown)) if shown else Markup("")


def _table(text: str) -> dict[str, object]:
    found = json.loads(text)
    return {str(key): value for key, value in found.items()} if isinstance(found, dict) else {}


def _line(key: str, before: object, after: object) -> Markup:
    name = key.replace("_", " ").removesuffix(" at")
    if before is _MISSING or before == after:
        return Markup("<li><span>{}</span> {}</li>").format(name, _value(key, after))
    if after is _MISSING:
        return Markup("<li><span>{}</span> <del>{}</del></li>").format(name, _value(key, before))
    return Markup('<li><span>{}</span> <del>{}</del> <span aria-label="became">→</span> <b>{}</b></li>').format(
        name, _value(key, before), _value(key, after)
    )


def _value(key: str, value: object) -> Cell:
    match value:
        case None:
            return fmt.NONE
        case bool():
            return "yes" if value else "no"
        case int() | float() if key.endswith("_at"):
            return fmt.moment(float(value), mode="time")
        case float():
            return f"{value:g}"
        case int():
            return f"{value:,}"
        case str():
            return _cut(value) or fmt.NONE
        case list():
            return _cut(", ".join(map(str, value))) or fmt.NONE
        case _:
            return _cut(json.dumps(value, ensure_ascii=False))


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_LETTERS else f"{text[:_MOST_LETTERS]}…"
