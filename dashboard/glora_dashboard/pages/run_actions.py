"""What operators do with a run: start, pause, resume, extend, abort, edit its policy."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

from markupsafe import Markup
from nicegui import ui
from nicegui.element import Element

from glora_dashboard.pages import format as fmt
from glora_dashboard.pages.forms import only_when_same
from glora_dashboard.pages.parts import Block, button, sheet
from glora_dashboard.pages.policy_form import edit_policy
from glora_dashboard.pages.site import Site
from glora_server.coordinator.people import Principal, Role
from glora_server.coordinator.views import RunView
from glora_server.rounds.round import GATHERING
from glora_server.rounds.run import RunPhase

_OPEN: Final = frozenset({RunPhase.CREATED, RunPhase.ACTIVE, RunPhase.PAUSED})
_EXTENSIONS: Final = {300: "5 minutes", 900: "15 minutes", 3600: "1 hour", 14400: "4 hours", 86400: "1 day"}


class RunActions:
    """The row of buttons above a run; `show` changes which there are, and none loses its focus by it."""

    def __init__(self, site: Site, view: RunView) -> None:
        self._site = site
        self._name = view.run.name
        self._view = view
        with ui.element("div").classes("actions").props('role="group" aria-label="Actions"'):
            self._buttons: dict[str, Element] = {
                "start": button("Start", self._start, kind="primary"),
                "resume": button("Resume", self._resume, kind="primary"),
                "pause": button("Pause", self._pause),
                "extend": button("Extend the deadline", self._extend),
                "edit": button("Edit policy", self._edit),
                "abort": button("Abort", self._abort, kind="danger"),
            }
        self.show(view)

    def show(self, view: RunView) -> None:
        """Offer what is possible now."""
        self._view = view
        possible = possible_actions(view)
        for name, element in self._buttons.items():
            element.set_visibility(name in possible)

    async def _start(self) -> None:
        await self._do(lambda who: self._site.commands.start_run(who, self._name), f"{self._name} is started.")

    async def _pause(self) -> None:
        done = f"{self._name} is paused; an open round goes on to its end."
        await self._do(lambda who: self._site.commands.pause_run(who, self._name), done)

    async def _resume(self) -> None:
        await self._do(lambda who: self._site.commands.resume_run(who, self._name), f"{self._name} goes on.")

    async def _do(self, action: Callable[[Principal], Awaitable[object]], done: str) -> None:
        if await self._site.act(Role.OPERATOR, action, done=done) is None:
            self.show(await self._site.queries.run(self._name))

    async def _edit(self) -> None:
        await edit_policy(self._site, self._view)

    async def _extend(self) -> None:
        with sheet("Extend the deadline") as dialog:
            Block(Markup("<p>Devices of the open round get this much more time.</p>"))
            longer = ui.select(dict(_EXTENSIONS), value=900, label="More time").props("outlined").classes("wide")

            async def extend() -> None:
                seconds = float(longer.value)
                done = f"The deadline is {fmt.span(seconds)} later."
                refused = await self._site.act(
                    Role.OPERATOR,
                    lambda who: self._site.commands.extend_round(who, self._name, seconds),
                    done=done,
                )
                if refused is None:
                    dialog.close()

            with ui.element("div").classes("actions end"):
                button("Cancel", dialog.close)
                button("Extend", extend, kind="primary")
        dialog.open()

    async def _abort(self) -> None:
        with sheet(f"Abort {self._name}?") as dialog:
            Block(
                Markup(
                    "<p>The run and its open round end for good; what devices are doing for it is lost. Its versions "
                    "stay and can be exported. To confirm, write the run's name: <b>{}</b></p>"
                ).format(self._name)
            )
            typed = ui.input("Name of the run").props("outlined autocomplete=off").classes("wide")
            reason = ui.input("Why (for the audit)").props("outlined maxlength=500").classes("wide")

            async def abort() -> None:
                refused = await self._site.act(
                    Role.OPERATOR,
                    lambda who: self._site.commands.abort_run(who, self._name, (reason.value or "").strip()),
                    done=f"{self._name} is aborted.",
                )
                if refused is None:
                    dialog.close()

            with ui.element("div").classes("actions end"):
                button("Keep it running", dialog.close)
                confirm = button("Abort the run", abort, kind="danger solid")
            only_when_same(typed, self._name, confirm)
        dialog.open()


def possible_actions(view: RunView) -> frozenset[str]:
    """Names of the actions that the run's state allows."""
    phase = view.run.phase
    possible = {
        RunPhase.CREATED: {"start"},
        RunPhase.ACTIVE: {"pause"},
        RunPhase.PAUSED: {"resume"},
    }.get(phase, set())
    if phase in _OPEN:
        possible |= {"edit", "abort"}
    if view.round is not None and view.round.round.phase in GATHERING and phase in _OPEN:
        possible |= {"extend"}
    return frozenset(possible)
