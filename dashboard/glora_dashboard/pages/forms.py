"""What pages with forms and lists of actions share: fields, confirmations, secrets that are shown once, row buttons."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

from markupsafe import Markup
from nicegui import ui
from nicegui.element import Element
from nicegui.events import GenericEventArguments

from glora_dashboard.pages.parts import Block, button, sheet
from glora_wire.errors import GloraError

RowAction = Callable[[str, str], Awaitable[None]]
"""Called with the name of the action and what it is to be done to."""
_PICK: Final = (
    "(e) => { const b = e.target.closest('button[data-act]'); "
    "if (b && !b.disabled) emit(b.dataset.act, b.dataset.of); }"
)
# Without https a browser has no clipboard for pages; then the text is selected and copied the old way.
_COPY: Final = """async (e) => {
  const b = e.target.closest('button[data-copy]');
  if (!b) return;
  const field = b.parentElement.querySelector('textarea, input');
  field.focus();
  field.select();
  let done = false;
  try {
    await navigator.clipboard.writeText(field.value);
    done = true;
  } catch {
    done = document.execCommand('copy');
  }
  b.textContent = done ? 'Copied' : 'Press Ctrl+C';
  setTimeout(() => { b.textContent = 'Copy'; }, 4000);
}"""


def row_button(words: str, act: str, of: str, *, kind: str = "", label: str = "") -> Markup:
    """A button inside of markup; `on_rows` hears it. `label` says what it does where the words alone do not."""
    return Markup(
        '<button type="button" class="button small {}" data-act="{}" data-of="{}" aria-label="{}">{}</button>'
    ).format(kind, act, of, label or words, words)


def on_rows(container: Element, act: RowAction) -> None:
    """Call `act` for every row button that is pressed within `container`."""

    async def pressed(event: GenericEventArguments) -> None:
        match event.args:
            case [str() as name, str() as of]:
                await act(name, of)
            case _:
                return

    container.on("click", pressed, js_handler=_PICK)


def copyable(text: str, *, label: str, rows: int = 1) -> Element:
    """Text that cannot be changed, with a button that copies it."""
    markup = Markup(
        '<label class="copy-label">{}</label><div class="copy"><textarea class="mono" readonly rows="{}" '
        'aria-label="{}" spellcheck="false">{}</textarea><button type="button" class="button" data-copy '
        'aria-live="polite">Copy</button></div>'
    ).format(label, rows, label, text)
    block = Block(markup)
    block.on("click", js_handler=_COPY)
    return block


class Trouble:
    """The place in a form where the server's sentences stand, and the fields that they belong to."""

    def __init__(self) -> None:
        self._block = Block(Markup(""), tag="div").props('role="alert"')

    def show(self, error: GloraError | None) -> None:
        """Show what was refused; None clears it."""
        self.say("" if error is None else error.message)

    def say(self, message: str) -> None:
        """Show this; an empty message clears it."""
        shown = Markup('<div class="form-problem">{}</div>').format(message) if message else Markup("")
        self._block.show(shown)


def text_field(label: str, value: str = "", *, hint: str = "", password: bool = False) -> ui.input:
    """A line of text."""
    field = ui.input(label, value=value, password=password).props("outlined").classes("wide")
    if hint:
        field.props["hint"] = hint
    field.props["autocomplete"] = "new-password" if password else "off"
    return field


def text_of(field: ui.input) -> str:
    """What stands in a field; empty where it was cleared."""
    return field.value or ""


def number_field(label: str, value: float | None, *, hint: str = "", least: float = 0, whole: bool = True) -> ui.number:
    """A number."""
    field = ui.number(label, value=value, min=least, step=1 if whole else None).props("outlined").classes("wide")
    if hint:
        field.props["hint"] = hint
    return field


def choice_field(label: str, choices: dict[str, str], value: str, *, hint: str = "") -> ui.select:
    """One of some words."""
    field = ui.select(choices, value=value, label=label).props("outlined options-dense").classes("wide")
    if hint:
        field.props["hint"] = hint
    return field


def confirm(
    title: str,
    explanation: str | Markup,
    act: Callable[[], Awaitable[GloraError | None]],
    *,
    words: str,
    name: str = "",
    what: str = "",
    danger: bool = True,
    keep: str = "Cancel",
) -> None:
    """Ask before something is done; with a `name` it has to be written first. `act` answers why it was not done."""
    with sheet(title) as dialog:
        Block(Markup("<p>{}</p>").format(explanation))
        typed = None
        if name:
            Block(Markup("<p>To confirm, write <b>{}</b></p>").format(name))
            typed = text_field(what or "Name").props("autofocus")

        async def go() -> None:
            if await act() is None:
                dialog.close()

        with ui.element("div").classes("actions end"):
            button(keep, dialog.close)
            go_on = button(words, go, kind="danger solid" if danger else "primary")
        if typed is not None:
            only_when_same(typed, name, go_on)
    dialog.open()


def only_when_same(typed: ui.input, name: str, go_on: Element) -> None:
    """Let the button be pressed only while this name is written in the field."""
    go_on.props["disabled"] = True

    def compare() -> None:
        go_on.props["disabled"] = text_of(typed).strip() != name
        go_on.update()

    typed.on_value_change(compare)


def show_secret(title: str, explanation: str | Markup, secrets: tuple[tuple[str, str], ...], *, rows: int = 2) -> None:
    """A dialog with texts that are shown this once, each with a label; it closes by its button only."""
    with sheet(title) as dialog:
        dialog.props("persistent")
        Block(Markup("<p>{}</p>").format(explanation))
        for label, text in secrets:
            copyable(text, label=label, rows=rows)
        Block(Markup('<p class="muted small">It is not kept here and cannot be shown again.</p>'))
        with ui.element("div").classes("actions end"):
            button("I have it", dialog.close, kind="primary")
    dialog.open()


def tags_of(text: str) -> tuple[str, ...]:
    """The tags that somebody wrote with commas between them, each once."""
    return tuple(dict.fromkeys(tag.strip() for tag in text.split(",") if tag.strip()))


def whole(value: float | None) -> int | None:
    """What a number field holds, as a whole number; None where it holds none."""
    return int(value) if value is not None and float(value).is_integer() else None
