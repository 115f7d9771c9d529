"""A list in parts: shows one part, leads to the others, and can be asked to look again."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from markupsafe import Markup
from nicegui import ui

from glora_dashboard.pages.parts import Block, button
from glora_server.coordinator.model import Listing, Page

T = TypeVar("T")


class Pager(Generic[T]):
    """The part of a list that is shown, and buttons for the parts before and after it.

    `ask` answers a part, `draw` makes it markup (also of an empty part). Make it, then await `refresh`.
    """

    def __init__(
        self,
        ask: Callable[[Page], Awaitable[Listing[T]]],
        draw: Callable[[tuple[T, ...]], Markup],
        *,
        size: int,
        newer: str = "Newer",
        older: str = "Older",
    ) -> None:
        self._ask, self._draw, self._size = ask, draw, size
        self._tokens = [""]
        self._next = ""
        self._block = Block(Markup(""))
        with ui.element("div").classes("pager") as self._bar:
            self._back = button(newer, self._to_back)
            self._where = Block(Markup(""), tag="span").classes("muted small")
            self._forth = button(older, self._to_forth)

    async def refresh(self) -> None:
        """Look again at the part that is shown."""
        listing = await self._ask(Page(size=self._size, token=self._tokens[-1]))
        self._next = listing.next_token
        self._block.show(self._draw(listing.items))
        first = (len(self._tokens) - 1) * self._size
        self._where.show(Markup("{:,} to {:,}").format(first + 1, first + len(listing.items)))
        for element, possible in ((self._back, len(self._tokens) > 1), (self._forth, bool(self._next))):
            if bool(element.props.get("disabled")) == possible:
                element.props["disabled"] = not possible
                element.update()
        self._bar.set_visibility(len(self._tokens) > 1 or bool(self._next))

    async def restart(self) -> None:
        """Show the first part, as when what is asked for has changed."""
        self._tokens = [""]
        await self.refresh()

    async def _to_back(self) -> None:
        if len(self._tokens) > 1:
            self._tokens.pop()
            await self.refresh()

    async def _to_forth(self) -> None:
        if self._next:
            self._tokens.append(self._next)
            await self.refresh()
