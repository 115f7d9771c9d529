"""The form that exports one version: rank and flavour, how good that is, the download, and how to load it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Final
from urllib.parse import quote

from markupsafe import Markup
from nicegui import ui

from glora_dashboard.pages import format as fmt
from glora_dashboard.pages.forms import Trouble, choice_field, copyable, number_field, whole
from glora_dashboard.pages.parts import Block, button
from glora_dashboard.pages.site import Site
from glora_server.coordinator.model import MetricPhase, Page
from glora_server.coordinator.people import Principal, Role
from glora_server.coordinator.views import RunView
from glora_server.coordinator.views_plots import Exportable
from glora_wire.errors import GloraError, Reason

_FLAVOURS: Final = {"peft": "peft (exact)", "serving": "serving (one rank)"}
_FLAVOUR_HINT: Final = (
    "peft gives each module the rank that it really has; serving gives all modules one, as vLLM and llama.cpp want it."
)
_MEASURED: Final = {
    MetricPhase.BEFORE: "that received it",
    MetricPhase.AFTER: "that had trained it",
}
_OFFERED: Final = 50


class ExportForm:
    """Fields for one version of a run."""

    def __init__(self, site: Site, view: RunView, newest: Exportable) -> None:
        self._site = site
        self._view = view
        self._item = newest
        self._trouble = Trouble()
        with ui.element("div").classes("form three"):
            self._version = number_field(
                "Version", newest.version.number, hint="The newest, unless you choose another."
            )
            largest = newest.max_rank
            self._rank = number_field("Rank", largest, least=1, hint=f"1 to {largest}; small ranks make small files.")
            self._flavour = choice_field("Flavour", dict(_FLAVOURS), "peft", hint=_FLAVOUR_HINT)
        self._quality = Block(Markup(""))
        with ui.element("div").classes("actions"):
            self._button = button("Download the zip", self._download, kind="primary")
        with ui.element("details"):
            Block(Markup("How to load it"), tag="summary")
            copyable(loading_lines(view), label="In Python, after unpacking into the folder adapter", rows=4)
        self._version.on_value_change(self._look)
        self._rank.on_value_change(self._show)
        self._show()

    async def choose(self, number: int) -> None:
        """Export that version."""
        self._version.value = number
        ui.run_javascript(f"getHtmlElement({self._button.id}).focus()")

    def renew(self, items: Iterable[Exportable]) -> None:
        """Show what was measured since of the version that is chosen, where it is among the items."""
        self._item = next((item for item in items if item.version.id == self._item.version.id), self._item)
        self._show()

    async def _look(self) -> None:
        """Find out how good the version is that is chosen now."""
        self._trouble.say("")
        number = whole(self._version.value)
        if number is None:
            return
        found = await self._find(number)
        if found is None:
            self._trouble.say(f"Version {number} cannot be exported: its tensors are not kept, or there is none yet.")
        else:
            self._item = found
        self._show()

    async def _find(self, number: int) -> Exportable | None:
        listing = await self._site.queries.exports(self._view.run.name, Page(size=_OFFERED))
        while True:
            for item in listing.items:
                if item.version.number == number:
                    return item
            if not listing.next_token or listing.items[-1].version.number < number:
                return None
            part = Page(size=_OFFERED, token=listing.next_token)
            listing = await self._site.queries.exports(self._view.run.name, part)

    def _show(self) -> None:
        self._quality.show(quality(self._item, whole(self._rank.value)))

    async def _download(self) -> None:
        number, rank = whole(self._version.value), whole(self._rank.value)
        if number is None or rank is None:
            self._trouble.say("Version and rank are whole numbers.")
            return
        body = {"rank": rank, "flavour": self._flavour.value, "version_number": number}
        address = f"/api/v1/runs/{quote(self._view.run.name, safe='')}/export"

        async def send(_who: Principal) -> None:
            if await self._find(number) is None:
                raise GloraError(
                    Reason.VERSION_UNKNOWN, f"Version {number} of {self._view.run.name} cannot be exported."
                )
            # The browser asks for it itself, with its own session: the archive does not pass through the page's socket.
            ui.run_javascript(f"gloraDownload({json.dumps(address)}, {json.dumps(body)})")

        refused = await self._site.act(Role.OPERATOR, send, done="The export is being made.", show_refusal=False)
        self._trouble.show(refused)


def quality(item: Exportable, rank: int | None) -> Markup:
    """How good the version is at the rank, or at which ranks it was measured."""
    version = item.version.number
    found = next((score for score in item.scores if score.rank == rank), None)
    if found is not None:
        who = _MEASURED.get(found.phase, "that evaluate")
        return Markup(
            '<dl class="figures" role="status"><div><dt>Accuracy at rank {}</dt><dd>{}</dd></div>'
            "<div><dt>Loss</dt><dd>{}</dd></div>"
            "<div><dt>Measured by</dt><dd>{} <small>{}, {:,} rows</small></dd></div></dl>"
        ).format(
            rank,
            fmt.percent(found.accuracy),
            fmt.loss(found.loss),
            fmt.count(found.devices, "device"),
            who,
            found.rows,
        )
    ranks = ", ".join(str(score.rank) for score in item.scores)
    words = f"Version {version} was not measured at this rank; it was at {ranks}."
    return Markup('<p class="muted" role="status">{}</p>').format(
        words if ranks else f"No device measured version {version}."
    )


def loading_lines(view: RunView) -> str:
    """Three lines of Python that put the adapter onto its base model."""
    model = view.spec.model
    kind = "AutoModelForCausalLM" if model.task == "causal_lm" else "AutoModelForSequenceClassification"
    labels = len(view.run.manifest.labels)
    more = f", num_labels={labels}" if labels else ""
    return (
        f"from peft import PeftModel\nfrom transformers import {kind}\n"
        f'model = PeftModel.from_pretrained({kind}.from_pretrained({json.dumps(model.path)}{more}), "adapter")'
    )
