"""The form that edits a run's policy; what it says about wrong values is what the server says."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Final

from markupsafe import Markup
from nicegui import ui
from nicegui.elements.mixins.validation_element import ValidationElement
from nicegui.elements.mixins.value_element import ValueElement

from glora_dashboard.pages.parts import Block, button, sheet
from glora_dashboard.pages.site import Site
from glora_server.coordinator.people import Role
from glora_server.coordinator.policy_table import POLICY_KEYS, PolicyTable
from glora_server.coordinator.views import RunView
from glora_server.rounds.policy import RoundPolicy, Sampling, TooFew
from glora_wire.errors import GloraError

_LABELS: Final[Mapping[str, str]] = {
    "rounds": "Rounds",
    "target_devices": "Updates wanted per round",
    "quorum": "Quorum",
    "over_selection": "Over-selection",
    "deadline_seconds": "Deadline (seconds)",
    "grace_seconds": "Grace (seconds)",
    "max_round_seconds": "Longest round (seconds)",
    "gather_seconds": "Gathering (seconds)",
    "too_few": "When too few answered",
    "max_attempts": "Attempts of a round",
    "retry_seconds": "Rest before a retry (seconds)",
    "sampling": "Drawing devices",
    "tags": "Tags (comma between)",
    "min_rank": "Smallest rank",
}
_CHOICES: Final[Mapping[str, Mapping[str, str]]] = {
    "too_few": {TooFew.FAIL.value: "the round fails", TooFew.WAIT.value: "wait for more"},
    "sampling": {
        Sampling.UNIFORM.value: "each alike",
        Sampling.WEIGHTED.value: "by training rows",
        Sampling.RANK.value: "largest rank first",
    },
}


async def edit_policy(site: Site, view: RunView) -> None:
    """Show the form; it closes when the server took the changes."""
    name, before = view.run.name, view.spec.policy
    with sheet(f"Policy of {name}") as dialog:
        Block(Markup("<p class='muted'>Changes count from the next round on, but for its quorum at once.</p>"))
        with ui.element("div").classes("form two"):
            fields = {key: _field(key, getattr(before, key)) for key in POLICY_KEYS}

        async def save() -> None:
            changes = changes_of(before, {key: field.value for key, field in fields.items()})
            if not changes:
                dialog.close()
                return
            refused = await site.act(
                Role.OPERATOR,
                lambda who: site.commands.edit_policy(who, name, changes),
                done=f"The policy of {name} is changed.",
                show_refusal=False,
            )
            if refused is None:
                dialog.close()
            else:
                _tell(problem, fields, refused)

        with ui.element("div").classes("actions end"):
            problem = Block(Markup(""), tag="div").props('role="alert"').classes("wide")
            button("Cancel", dialog.close)
            button("Save", save, kind="primary")
    dialog.open()


def _field(key: str, value: object) -> ValueElement[Any]:
    label = _LABELS.get(key) or key.replace("_", " ").capitalize()
    hint = PolicyTable.model_fields[key].description or ""
    field: ValueElement[Any]
    if key in _CHOICES:
        field = ui.select(dict(_CHOICES[key]), value=str(value), label=label)
    elif isinstance(value, tuple):
        field = ui.input(label, value=", ".join(value))
    elif isinstance(value, int | float):
        field = ui.number(label, value=value, step=1 if isinstance(value, int) else None)
    else:
        raise TypeError(f"the form has no field for {key}: {value!r}")
    field.props("outlined")
    if key not in _CHOICES:
        field.props["hint"] = hint
    return field


def changes_of(before: RoundPolicy, entered: Mapping[str, object]) -> dict[str, object]:
    """What the form says otherwise than the policy, as JSON values; the server judges them."""
    changes: dict[str, object] = {}
    for key, value in entered.items():
        old = getattr(before, key)
        new = _value(old, value)
        if new != (list(old) if isinstance(old, tuple) else str(old) if isinstance(old, StrEnum) else old):
            changes[key] = new
    return changes


def _value(old: object, entered: object) -> object:
    if isinstance(old, tuple):
        return [tag.strip() for tag in str(entered or "").split(",") if tag.strip()]
    if isinstance(old, int) and isinstance(entered, float) and entered.is_integer():
        return int(entered)
    if isinstance(old, float) and isinstance(entered, int):
        return float(entered)
    return entered


def _tell(problem: Block, fields: Mapping[str, ValueElement[Any]], refused: GloraError) -> None:
    """Show the server's sentences, and mark the fields that they name."""
    text = refused.message
    for key, label in sorted(_LABELS.items(), key=lambda item: -len(item[0])):
        text = text.replace(f"edit, policy.{key}: ", f"{label}: ")
    problem.show(Markup('<div class="form-problem">{}</div>').format(text))
    for key, field in fields.items():
        if isinstance(field, ValidationElement):
            named = [sentence for sentence in refused.message.splitlines() if key in sentence]
            field.error = named[0].partition(f"{key}: ")[2] or named[0] if named else None
