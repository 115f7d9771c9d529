"""A run: where it stands, whether it gets better, whether its devices agree, what it costs, and what to do with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from markupsafe import Markup
from nicegui import ui

from glora_dashboard.pages import run_charts
from glora_dashboard.pages.charts import Chart
from glora_dashboard.pages.frame import frame, page
from glora_dashboard.pages.live import keep_fresh
from glora_dashboard.pages.pager import Pager
from glora_dashboard.pages.parts import Block, card, pill
from glora_dashboard.pages.run_actions import RunActions
from glora_dashboard.pages.run_parts import ancestry, export_link, rounds_table, sentence, settings, this_round, tiles
from glora_dashboard.pages.signs import RUN_TONES
from glora_dashboard.pages.site import Site, may
from glora_server.coordinator.model import Listing, Page
from glora_server.coordinator.people import Role
from glora_server.coordinator.views import RoundView, RunView
from glora_server.coordinator.views_plots import Ancestor, RunSeries, SpectrumMap
from glora_server.rounds.ids import DeviceId

ROUNDS_SHOWN: Final = 10
ANCESTORS_SHOWN: Final = 8


@page("/runs/{name}", title="Run")
async def run_page(site: Site, name: str) -> None:
    """One run."""
    view = await site.queries.run(name)
    series, spectrum = await site.queries.series(name), await site.queries.spectrum(name)
    with frame(name, crumbs=(("Overview", "/"),), heading=False):
        shown = _Shown.build(site, view)
        plots = _Plots(series, spectrum, view)
        lists = await _lists(site, name)
        with card("Settings"):
            policy = Block(settings(view))

        async def refresh() -> None:
            fresh = await site.queries.run(name)
            shown.show(fresh)
            policy.show(settings(fresh))
            if plots.is_old(fresh):
                plots.show(await site.queries.series(name), await site.queries.spectrum(name), fresh)
            for pager in lists:
                await pager.refresh()

        keep_fresh(site, refresh, run=name)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shown:
    """What changes with every step of the run."""

    title: Block
    actions: RunActions | None
    export: Block
    why: Block
    tiles: Block
    round: Block

    @classmethod
    def build(cls, site: Site, view: RunView) -> _Shown:
        with ui.element("div").classes("head"):
            title = Block(_title(view)).classes("head-title")
            with ui.element("div").classes("actions"):
                actions = RunActions(site, view) if may(Role.OPERATOR) else None
                export = Block(export_link(view))
        why = Block(_why(view), tag="p").classes("lead").props('role="status"')
        numbers = Block(tiles(view))
        with card("This round"):
            current = Block(this_round(view))
        return cls(title=title, actions=actions, export=export, why=why, tiles=numbers, round=current)

    def show(self, view: RunView) -> None:
        self.title.show(_title(view))
        if self.actions is not None:
            self.actions.show(view)
        self.export.show(export_link(view))
        self.why.show(_why(view))
        self.tiles.show(tiles(view))
        self.round.show(this_round(view))


def _title(view: RunView) -> Markup:
    state = pill(RUN_TONES[view.run.phase], view.run.phase.value)
    return Markup("<h1>{}</h1>{}").format(view.run.name, state)


def _why(view: RunView) -> Markup:
    return Markup("{}").format(sentence(view))


class _Plots:
    """The charts; drawn anew when there is a new version, or something new was measured."""

    def __init__(self, series: RunSeries, spectrum: SpectrumMap, view: RunView) -> None:
        self._drawn_for = _drawn_for(view)
        with ui.element("div").classes("grid"):
            with card("Accuracy", note="on devices' held-out rows, by version"):
                self._accuracy = Chart(run_charts.quality_options(series, loss=False), label="Accuracy by version")
            with card("Loss", note="the same rows"):
                self._loss = Chart(run_charts.quality_options(series, loss=True), label="Loss by version")
        note = "mean cosine between each device's change and the mean change, by module and version"
        with card("Consensus", note=note):
            self._consensus = Chart(
                run_charts.spectrum_options(spectrum),
                label="Agreement of devices by module and version",
                height=_heat_height(spectrum),
            )
        with ui.element("div").classes("grid"):
            with card("Kept of the mean update", note="captured energy, and the distance that truncation leaves"):
                self._energy = Chart(run_charts.energy_options(series), label="Captured energy and truncation error")
            with card("Size of updates", note="Frobenius norm of devices' updates"):
                self._norms = Chart(run_charts.norm_options(series), label="Norms of updates by round")
            with card("Bytes moved", note="megabytes, by round"):
                self._bytes = Chart(run_charts.bytes_options(series), label="Bytes moved by round")
            with card("Where time goes", note="seconds, median over devices, by round"):
                self._seconds = Chart(run_charts.seconds_options(series), label="Seconds of each stage by round")

    def is_old(self, view: RunView) -> bool:
        """Whether the run has more to show than when it was drawn."""
        return self._drawn_for != _drawn_for(view)

    def show(self, series: RunSeries, spectrum: SpectrumMap, view: RunView) -> None:
        """Draw anew."""
        self._drawn_for = _drawn_for(view)
        self._accuracy.show(run_charts.quality_options(series, loss=False))
        self._loss.show(run_charts.quality_options(series, loss=True))
        self._consensus.show(run_charts.spectrum_options(spectrum), height=_heat_height(spectrum))
        self._energy.show(run_charts.energy_options(series))
        self._norms.show(run_charts.norm_options(series))
        self._bytes.show(run_charts.bytes_options(series))
        self._seconds.show(run_charts.seconds_options(series))


def _drawn_for(view: RunView) -> object:
    return view.version_number, view.run.rounds_done, view.scores


def _heat_height(spectrum: SpectrumMap) -> int:
    return 100 + min(560, 22 * max(4, len(spectrum.modules)))


async def _lists(site: Site, name: str) -> tuple[Pager[RoundView], Pager[Ancestor]]:
    with card("Rounds"):
        rounds = Pager(lambda part: site.queries.rounds(name, part), rounds_table(name), size=ROUNDS_SHOWN)
    with card("Lineage", note="every version and the devices whose updates made it"):
        names: dict[DeviceId, str] = {}

        async def ask(part: Page) -> Listing[Ancestor]:
            found = await site.queries.lineage(name, part)
            wanted = frozenset(made.device_id for item in found.items for made in item.largest)
            names.update(await site.queries.device_names(wanted - names.keys()))
            return found

        versions = Pager(ask, lambda found: ancestry(found, names), size=ANCESTORS_SHOWN)
    await rounds.refresh()
    await versions.refresh()
    return rounds, versions
