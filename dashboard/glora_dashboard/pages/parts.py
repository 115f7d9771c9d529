"""Small parts that pages are put together from; all text that goes into Markup is escaped by it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from markupsafe import Markup, escape
from nicegui import context, ui
from nicegui.element import Element

Link = tuple[str, str]
"""Words and address."""
_ICONS: Final = {
    "active": '<circle cx="8" cy="8" r="4"/>',
    "good": '<path d="M3.5 8.5 6.5 11.5 12.5 5" fill="none" stroke="currentColor" stroke-width="2"/>',
    "bad": '<path d="M4.5 4.5l7 7m0-7l-7 7" fill="none" stroke="currentColor" stroke-width="2"/>',
    "wait": '<path d="M5 4v8M11 4v8" fill="none" stroke="currentColor" stroke-width="2.4"/>',
    "warn": '<path d="M8 2.5 14.5 13.5h-13zM8 6.5v3.5M8 11.6v.4" fill="none" stroke="currentColor" '
    'stroke-width="1.6"/>',
    "idle": '<circle cx="8" cy="8" r="3.6" fill="none" stroke="currentColor" stroke-width="1.8"/>',
}
TONES: Final = tuple(_ICONS)
"""What a sign can say; each has a shape of its own besides its colour."""


class Block(Element, component="block.js"):
    """Markup that can be set anew; the browser changes only what differs."""

    def __init__(self, markup: Markup, *, tag: str = "div") -> None:
        super().__init__()
        self._props["tag"] = tag
        self._props["markup"] = str(markup)

    def show(self, markup: Markup) -> None:
        """Show this from now on."""
        if self._props["markup"] != str(markup):
            self._props["markup"] = str(markup)
            self.update()


def icon(tone: str) -> Markup:
    """A sign of 16 pixels; the words beside it say the same."""
    return Markup(  # noqa: S704 - a constant of this module
        f'<svg class="icon" viewBox="0 0 16 16" fill="currentColor" aria-hidden="true">{_ICONS[tone]}</svg>'
    )


def pill(tone: str, words: str) -> Markup:
    """A state: a sign and a word."""
    return Markup('<span class="pill {}">{}{}</span>').format(tone, icon(tone), words)


def bar(share: float | None, *, label: str, tone: str = "active") -> Markup:
    """How much of something is done, 0 to 1; None shows that it is not known how much there is."""
    if share is None:
        return Markup('<span class="bar unknown {}" role="progressbar" aria-label="{}"><i></i></span>').format(
            tone, label
        )
    part = min(1.0, max(0.0, share))
    return Markup(
        '<span class="bar {}" role="progressbar" aria-label="{}" aria-valuemin="0" aria-valuemax="100" '
        'aria-valuenow="{:.0f}"><i style="width:{:.1f}%"></i></span>'
    ).format(tone, label, 100 * part, 100 * part)


def facts(pairs: Iterable[tuple[str, str | Markup]], *, kind: str = "facts") -> Markup:
    """A description list: what it is, and its value; `kind` "tiles" shows the values large."""
    rows = (Markup("<div><dt>{}</dt><dd>{}</dd></div>").format(name, value) for name, value in pairs)
    return Markup('<dl class="{}">{}</dl>').format(kind, join(rows))


def join(parts: Iterable[str | Markup], between: str = "") -> Markup:
    """The parts one after the other with `between` between them, all escaped where they are no Markup."""
    return escape(between).join(parts)


def anchor(words: str | Markup, address: str, *, classes: str = "") -> Markup:
    """A link."""
    return Markup('<a href="{}" class="{}">{}</a>').format(address, classes, words)


def empty(title: str, sentence: str, *, link: Link | None = None) -> Element:
    """What stands where there is nothing yet: why, and the next step."""
    step = anchor(*link, classes="button primary") if link else Markup("")
    return Block(Markup('<div class="empty"><h2>{}</h2><p>{}</p>{}</div>').format(title, sentence, step))


def card(title: str, *, note: str = "") -> Element:
    """A section with a heading, to be filled as a context."""
    section = ui.element("section").classes("card")
    with section:
        heading = Markup("<h2>{}</h2><p>{}</p>") if note else Markup("<h2>{}</h2>")
        Block(heading.format(title, note), tag="header").classes("card-head")
    return section


def sparkline(values: Sequence[float], *, label: str) -> Markup:
    """A line of 120 by 32 pixels through the values, lowest at the bottom; nothing below two values."""
    if len(values) < 2:
        return Markup("")
    low, high = min(values), max(values)
    reach = (high - low) or 1.0
    step = 114.0 / (len(values) - 1)
    points = [(3 + step * i, 28 - 24 * (value - low) / reach) for i, value in enumerate(values)]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    x, y = points[-1]
    return Markup(
        '<svg class="spark" viewBox="0 0 120 32" role="img" aria-label="{}"><polyline points="{}"/>'
        '<circle cx="{:.1f}" cy="{:.1f}" r="2.6"/></svg>'
    ).format(label, line, x, y)


def button(words: str, action: Callable[[], object], *, kind: str = "") -> Element:
    """A button; `kind` is "primary", "danger" or "danger solid"."""
    element = Block(escape(words), tag="button").classes(f"button {kind}").props('type="button"')
    element.on("click", action)
    return element


@contextmanager
def sheet(title: str) -> Iterator[ui.dialog]:
    """A dialog with a heading, to be filled as a context and then opened; it is gone once it is closed.

    It belongs to the page, not to the dialog whose button opened it and which may be closed before it.
    """
    with context.client.content, ui.dialog() as dialog, ui.element("div").classes("sheet"):
        dialog.props["aria-label"] = title
        Block(escape(title), tag="h2")
        yield dialog
    dialog.on("hide", dialog.delete)
