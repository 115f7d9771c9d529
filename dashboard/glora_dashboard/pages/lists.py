"""Tables of many columns, which become one block per row where the screen is narrow."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from markupsafe import Markup

from glora_dashboard.pages.parts import join

Cell = str | Markup


def wide_table(head: Sequence[str], rows: Iterable[Sequence[Cell]], *, label: str) -> Markup:
    """A table; the first column names the row, and an empty heading is that of buttons."""
    top = join(Markup('<th scope="col">{}</th>').format(_heading(words)) for words in head)
    body = join(Markup("<tr>{}</tr>").format(join(_cells(head, cells))) for cells in rows)
    return Markup(
        '<div class="scroll stack" tabindex="0" role="region" aria-label="{}"><table><thead><tr>{}</tr></thead>'
        "<tbody>{}</tbody></table></div>"
    ).format(label, top, body)


def _heading(words: str) -> Cell:
    return words or Markup('<span class="visually-hidden">Actions</span>')


def _cells(head: Sequence[str], cells: Sequence[Cell]) -> Iterable[Markup]:
    for words, cell in zip(head, cells, strict=True):
        yield Markup('<td data-label="{}">{}</td>').format(words, cell)
