"""Numbers, sizes, spans and times as people read them. Pure functions of values; no page is needed to call them."""

from __future__ import annotations

import math
from typing import Final

from markupsafe import Markup

NONE: Final = "–"
"""What stands where nothing is known."""
_UNITS: Final = ("B", "kB", "MB", "GB", "TB", "PB")


def size(count: float) -> str:
    """A number of bytes, in powers of 1000: "0 B", "1.2 MB"."""
    value, unit = float(count), 0
    while value >= 999.5 and unit < len(_UNITS) - 1:
        value /= 1000.0
        unit += 1
    return f"{value:.0f} {_UNITS[unit]}" if unit == 0 or value >= 99.5 else f"{value:.1f} {_UNITS[unit]}"


def percent(share: float | None, digits: int = 1) -> str:
    """A share of 1 in per cent; a dash where it is not known or not a number."""
    if share is None or not math.isfinite(share):
        return NONE
    return f"{100 * share:.{digits}f} %"


def number(value: float | None, digits: int = 3) -> str:
    """A number with that many significant digits; a dash where it is not known or not a number."""
    if value is None or not math.isfinite(value):
        return NONE
    return f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:,.0f}"


def loss(value: float | None) -> str:
    """A loss with three digits after the point, so that several can be compared at a glance; a dash where unknown."""
    return NONE if value is None or not math.isfinite(value) else f"{value:.3f}"


def span(seconds: float | None) -> str:
    """A duration in its two largest units: "45 s", "3 min 20 s", "2 h 5 min", "4 d"; a dash for None."""
    if seconds is None or not math.isfinite(seconds):
        return NONE
    whole = max(0, round(seconds))
    for size_, name, smaller, smaller_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size_:
            rest = whole % size_ // smaller
            return f"{whole // size_} {name} {rest} {smaller_name}" if rest else f"{whole // size_} {name}"
    return f"{seconds:.1f} s" if 0 < seconds < 9.95 and seconds != round(seconds) else f"{whole} s"


def count(how_many: int, one: str, many: str = "") -> str:
    """ "1 device", "3 devices", "1,024 devices"."""
    return f"{how_many:,} {one if how_many == 1 else many or one + 's'}"


def moment(at: float | None, *, mode: str = "ago") -> Markup:
    """Markup of a time that the browser writes in the viewer's zone; a dash for None.

    `mode` is "ago" (relative, with the time as its title), "time" (clock, with the day where it is another one),
    "until" (what is left) or "since" (the span up to now). The script site.js keeps it up to date.
    """
    if at is None:
        return Markup("{}").format(NONE)
    return Markup('<g-time at="{:.3f}" mode="{}"></g-time>').format(at, mode)
