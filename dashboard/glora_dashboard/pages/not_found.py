"""What stands at addresses where nothing is."""

from __future__ import annotations

from nicegui import context

from glora_dashboard.pages.frame import frame
from glora_dashboard.pages.parts import empty


def show_missing_page() -> None:
    """The page for an address that no page has."""
    path = context.client.request.url.path
    context.client.status_code = 404
    show_missing(f"There is no page at {path}.")


def show_missing(sentence: str) -> None:
    """The frame with what is missing, and where to go on."""
    context.client.status_code = 404
    with frame("Not found", heading=False):
        empty("Not found", sentence, link=("Go to the overview", "/"))
