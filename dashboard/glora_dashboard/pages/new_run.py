"""A new run from the browser: a form with the checks of run.toml, or a run.toml that fills it; then a preview."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Final
from urllib.parse import quote

from markupsafe import Markup
from nicegui import ui
from nicegui.events import UploadEventArguments

from glora_dashboard.pages.forms import Trouble, copyable
from glora_dashboard.pages.frame import frame, page
from glora_dashboard.pages.new_run_fields import Fields
from glora_dashboard.pages.new_run_manifest import ManifestField
from glora_dashboard.pages.new_run_strategy import StrategyFields
from glora_dashboard.pages.new_run_toml import run_toml
from glora_dashboard.pages.parts import Block, button, card, sheet
from glora_dashboard.pages.site import Site
from glora_server.coordinator.model import Page
from glora_server.coordinator.people import Principal, Role
from glora_server.coordinator.policy_table import PolicyTable
from glora_server.coordinator.ports import StrategyInfo
from glora_server.coordinator.run_sections import (
    EvaluationSpec,
    LimitsSpec,
    LoraSpec,
    ModelSpec,
    RetentionSpec,
    StrategySpec,
    TrainingSpec,
    WireSpec,
)
from glora_server.coordinator.run_spec import MAX_SPEC_CHARACTERS, RunSpec, parse_run_toml
from glora_server.coordinator.views import RunView
from glora_wire.errors import GloraError, Reason
from glora_wire.manifest import Manifest

_RUNS_OFFERED: Final = 50
_COMMON_TRAINING: Final = ("steps", "epochs", "batch_size", "max_length", "learning_rate", "optimizer")
_COMMON_POLICY: Final = ("rounds", "target_devices", "quorum", "deadline_seconds", "grace_seconds", "min_rank", "tags")


@page("/runs/new", title="New run", least=Role.OPERATOR)
async def new_run_page(site: Site, like: str = "") -> None:
    """The form; `like` names a run whose settings and manifest it begins with."""
    runs = (await site.queries.runs(Page(size=_RUNS_OFFERED))).items
    strategies = await site.queries.strategies()
    model = await site.queries.run(like) if like else None
    with frame("New run", crumbs=(("Overview", "/"),)):
        _Form(site, runs, strategies, model)


class _Form:
    """The whole page; it begins with the settings and the manifest of the run `like`.

    Fields get what they begin with when they are made: a value that is set later reaches the browser as a message
    after it has connected, and would undo what somebody has typed by then.
    """

    def __init__(
        self, site: Site, runs: Sequence[RunView], strategies: Sequence[StrategyInfo], like: RunView | None
    ) -> None:
        self._site = site
        self._fields = Fields(begin_with={} if like is None else like.spec.model_dump(mode="json"))
        self._from_file()
        with card("Run"), ui.element("div").classes("form three"):
            self._fields.section("", RunSpec, only=("name", "seed"))
        with card("Base model"):
            with ui.element("div").classes("form three"):
                self._fields.section("model", ModelSpec, without=("label_file",))
            self._manifest = ManifestField(runs, self._adopt)
        with card("Adapter and strategy"):
            with ui.element("div").classes("form three"):
                self._fields.section("lora", LoraSpec)
            self._strategy = StrategyFields(strategies, StrategySpec() if like is None else like.spec.strategy)
        self._parts("Training on devices", "training", TrainingSpec, _COMMON_TRAINING)
        self._parts("Rounds", "policy", PolicyTable, _COMMON_POLICY)
        with card("More"), ui.element("details"):
            Block(Markup("Transfers, limits, evaluation, retention"), tag="summary")
            with ui.element("div").classes("form three"):
                self._fields.section("wire", WireSpec)
                self._fields.section("limits", LimitsSpec)
                self._fields.section("evaluation", EvaluationSpec)
                self._fields.section("retention", RetentionSpec)
        self._trouble = Trouble()
        with ui.element("div").classes("actions end stay"):
            button("Preview", self._preview)
            button("Create", lambda: self._create(start=False))
            button("Create and start", lambda: self._create(start=True), kind="primary")
        for place in ("model.path", "model.task", "model.target_modules", "model.labels"):
            self._fields.by_place[place].element.on("blur", self._show_command)
        if like is not None:
            self._manifest.take(like.run.manifest)
            self._show_command()

    def _parts(self, title: str, name: str, section: type[TrainingSpec | PolicyTable], common: Sequence[str]) -> None:
        """A section with the keys that most people want, and the others folded away."""
        with card(title):
            with ui.element("div").classes("form three"):
                self._fields.section(name, section, only=common)
            with ui.element("details"):
                Block(Markup("More of it"), tag="summary")
                with ui.element("div").classes("form three"):
                    self._fields.section(name, section, without=common)

    def _from_file(self) -> None:
        with card("From a file", note="optional: a run.toml fills the form below"):
            upload = ui.upload(label="run.toml", auto_upload=True, max_files=1, max_file_size=4 * MAX_SPEC_CHARACTERS)
            upload.props('flat bordered accept=".toml"').on_upload(self._read)
            self._file_trouble = Trouble()

    async def _read(self, event: UploadEventArguments) -> None:
        """Fill the form with a run.toml, or say line by line what is wrong with it."""
        event.sender.run_method("reset")
        try:
            text = (await event.file.read()).decode("utf-8")
            spec = parse_run_toml(text, source=event.file.name)
        except UnicodeDecodeError:
            self._file_trouble.say(f"{event.file.name} is not text: a run.toml is TOML in UTF-8.")
            return
        except GloraError as error:
            self._file_trouble.show(error)
            return
        self._file_trouble.say(_label_file(spec))
        self._fill(spec)
        ui.notify(f"{event.file.name} fills the form.", type="positive")

    def _fill(self, spec: RunSpec) -> None:
        """Show a description."""
        self._fields.fill(spec.model_dump(mode="json"))
        self._strategy.fill(spec.strategy)
        self._show_command()

    def _adopt(self, manifest: Manifest) -> None:
        """Take over from the manifest what the form does not say yet."""
        fields = self._fields.by_place
        fields["model.task"].fill(manifest.task)
        fields["model.target_modules"].fill(manifest.target_modules)
        if manifest.labels and not fields["model.labels"].element.value:
            fields["model.labels"].fill(manifest.labels)
        if not fields["model.path"].element.value:
            fields["model.path"].fill(manifest.base_model_name)

    def _show_command(self) -> None:
        said = self._fields.document().get("model")
        model = said if isinstance(said, dict) else {}
        self._manifest.show_command(
            str(model.get("path", "MODEL")),
            str(model.get("task", "sequence_classification")),
            model.get("target_modules", ()),
            model.get("labels", ()),
        )

    def _spec(self) -> RunSpec:
        """What the form describes; raises SPEC_INVALID."""
        document = self._fields.document() | {"strategy": self._strategy.document()}
        return RunSpec.from_json(json.dumps(document), source="form")

    def _tell(self, error: GloraError | None) -> None:
        """Show what was refused at the fields that it names, and at the end of the form."""
        rest = self._fields.tell(error)
        self._strategy.tell(rest.splitlines())
        count = 0 if error is None else len(error.message.splitlines()) - len(rest.splitlines())
        marked = (
            f"{count} of the fields above {'is' if count == 1 else 'are'} marked with what is wrong." if count else ""
        )
        self._trouble.say("\n".join(part for part in (rest, marked) if part))
        if count:
            ui.run_javascript(_SHOW_FIRST)

    def _preview(self) -> None:
        try:
            spec = self._spec()
        except GloraError as error:
            self._tell(error)
            return
        self._tell(None)
        with sheet(f"Preview of {spec.name}") as dialog:
            text = run_toml(spec)
            copyable(
                text,
                label="The same as a run.toml; what is not here has its default",
                rows=min(24, text.count("\n") + 1),
            )
            with ui.element("div").classes("actions end"):
                button("Close", dialog.close, kind="primary")
        dialog.open()

    async def _create(self, *, start: bool) -> None:
        try:
            spec, manifest = self._spec(), self._manifest.required()
        except GloraError as error:
            self._tell(error)
            return

        async def create(who: Principal) -> None:
            await self._site.commands.create_run(who, spec, manifest, start=start)

        done = f"{spec.name} is {'started' if start else 'created'}."
        refused = await self._site.act(Role.OPERATOR, create, done=done, show_refusal=False)
        self._tell(refused)
        if refused is None or await self._exists(spec.name, refused):
            ui.navigate.to(f"/runs/{quote(spec.name)}")

    async def _exists(self, name: str, refused: GloraError) -> bool:
        """Whether the run was created and only its start was refused: its page says so and offers to try again."""
        if refused.reason in {Reason.NAME_TAKEN, Reason.SPEC_INVALID, Reason.STRATEGY_OPTIONS, Reason.STRATEGY_UNKNOWN}:
            return False
        try:
            await self._site.queries.run(name)
        except GloraError:
            return False
        return True


_SHOW_FIRST: Final = """
setTimeout(() => {
  const wrong = document.querySelector('.q-field--error');
  wrong?.closest('details')?.setAttribute('open', '');
  wrong?.scrollIntoView({ block: 'center' });
  wrong?.querySelector('input, textarea')?.focus({ preventScroll: true });
}, 150)
"""


def _label_file(spec: RunSpec) -> str:
    if not spec.model.label_file:
        return ""
    path = spec.model.label_file
    return f"model.label_file ({path}) lies where the server does not see it: paste its lines into Labels."
