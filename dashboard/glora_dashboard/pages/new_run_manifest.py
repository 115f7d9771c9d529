"""Where the manifest of a new run comes from: a file, or a run with the same base model."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from typing import Final

from markupsafe import Markup
from nicegui import ui
from nicegui.events import UploadEventArguments

from glora_dashboard.pages import format as fmt
from glora_dashboard.pages.forms import Trouble, copyable
from glora_dashboard.pages.parts import Block, facts
from glora_server.coordinator.views import RunView
from glora_wire.errors import GloraError, Reason
from glora_wire.manifest import Manifest

MAX_FILE_BYTES: Final = 16 * 1024 * 1024
_NONE: Final = ""


class ManifestField:
    """The choice of a manifest; `taken` is called with it when there is another one."""

    def __init__(self, runs: Sequence[RunView], taken: Callable[[Manifest], None]) -> None:
        self._runs = {view.run.name: view.run.manifest for view in runs}
        self._taken = taken
        self.manifest: Manifest | None = None
        words = (
            "The manifest says which tensors the base model has, so that the server needs no copy of it. "
            "It is made once, on a machine that has the model."
        )
        Block(Markup('<p class="muted">{}</p>').format(words))
        with ui.element("div").classes("form three"):
            if self._runs:
                choices = {_NONE: "none: a file"} | {name: name for name in self._runs}
                self._like = ui.select(choices, value=_NONE, label="The one of a run").props("outlined").classes("wide")
                self._like.props["hint"] = "A run with the same base model and the same modules."
                self._like.on_value_change(self._pick)
            upload = ui.upload(label="manifest.json", auto_upload=True, max_files=1, max_file_size=MAX_FILE_BYTES)
            upload.props('flat bordered accept=".json,application/json"').classes("wide")
            upload.on_upload(self._read)
        self._trouble = Trouble()
        self._shown = Block(Markup("")).props('role="status"')
        with ui.element("details"):
            Block(Markup("How to make it"), tag="summary")
            self._how = ui.element("div")
        self.show_command("MODEL", "sequence_classification", ("query", "value"), ())

    def take(self, manifest: Manifest) -> None:
        """Use this one."""
        self.manifest = manifest
        self._trouble.say("")
        self._shown.show(_facts(manifest))
        self._taken(manifest)

    def required(self) -> Manifest:
        """The manifest; raises MANIFEST_INVALID while there is none."""
        if self.manifest is None:
            sentence = "The manifest of the base model is missing: give its file, or choose a run that has the same."
            self._trouble.say(sentence)
            raise GloraError(Reason.MANIFEST_INVALID, sentence)
        return self.manifest

    def show_command(self, model: str, task: str, targets: Sequence[str], labels: Sequence[str]) -> None:
        """Show the command that makes the manifest of this model."""
        words = ["python", "-m", "glora_client.manifest_builder", "--model", model, "--task", task]
        words += [part for name in targets for part in ("--target", name)]
        words += [part for label in labels for part in ("--label", label)]
        command = shlex.join([*words, "--out", "manifest.json"])
        self._how.clear()
        with self._how:
            copyable(command, label="Where the base model is", rows=3)

    def _pick(self) -> None:
        found = self._runs.get(str(self._like.value))
        if found is not None:
            self.take(found)

    async def _read(self, event: UploadEventArguments) -> None:
        event.sender.run_method("reset")
        try:
            text = (await event.file.read()).decode("utf-8")
            self.take(Manifest.from_json(text))
        except UnicodeDecodeError:
            self._trouble.say(f"{event.file.name} is not text: a manifest is JSON in UTF-8.")
        except GloraError as error:
            self._trouble.say(f"{event.file.name}: {error.message}")


def _facts(manifest: Manifest) -> Markup:
    labels = ", ".join(manifest.labels[:8]) + (" …" if len(manifest.labels) > 8 else "")
    return facts(
        (
            ("Base model", Markup('<span class="mono">{}</span>').format(manifest.base_model_name)),
            ("Task", manifest.task.replace("_", " ")),
            ("Adapted", fmt.count(len(manifest.modules), "module")),
            ("Classes", labels or fmt.NONE),
            ("Fingerprint", Markup('<span class="mono">{}</span>').format(manifest.base_model_fingerprint[:16])),
        )
    )
