"""Our static files: where they lie, and at which address browsers find them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

STATIC: Final = Path(__file__).parent / "static"


def _version() -> str:
    digest = hashlib.sha256()
    for path in sorted(STATIC.iterdir()):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


STATIC_PREFIX: Final = f"/_glora/{_version()}"
"""Changes whenever one of the files does, so that browsers may keep what they have."""
MARK: Final = (STATIC / "mark.svg").read_text(encoding="utf-8").strip()
"""The project's mark."""
