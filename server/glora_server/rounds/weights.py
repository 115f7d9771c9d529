"""How much each device counts in a mean."""

from __future__ import annotations

from collections.abc import Sequence


def weights(rows: Sequence[int], *, max_rows: int = 0, max_share: float = 1.0) -> tuple[float, ...]:
    """p_i >= 0 with sum 1, proportional to min(rows, max_rows) with no share above `max_share` where that is possible.

    What the cap cuts off is spread over the others in proportion, until no one is above it (water filling). With n
    devices and max_share <= 1/n everyone gets 1/n. Raises ValueError for no devices or rows that are not positive.
    """
    if not rows or min(rows) <= 0:
        raise ValueError("weights need at least one device, and rows above zero")
    counts = [float(min(r, max_rows) if max_rows else r) for r in rows]
    if max_share * len(counts) <= 1.0:
        return tuple(1.0 / len(counts) for _ in counts)
    capped: set[int] = set()
    while True:
        free = 1.0 - max_share * len(capped)
        total = sum(c for i, c in enumerate(counts) if i not in capped)
        shares = [max_share if i in capped else free * c / total for i, c in enumerate(counts)]
        above = {i for i, share in enumerate(shares) if share > max_share * (1 + 1e-12)} - capped
        if not above:
            return tuple(shares)
        capped |= above
