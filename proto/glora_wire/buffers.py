"""Lets the allocator keep the buffers of transfers: allocation, not copying, is what chunks of 1 MiB cost."""

from __future__ import annotations

import ctypes
import sys
from typing import Final

_TRIM_THRESHOLD: Final = (-1, 256 * 1024 * 1024)
_TOP_PAD: Final = (-2, 16 * 1024 * 1024)
_MMAP_THRESHOLD: Final = (-3, 32 * 1024 * 1024)
"""Parameters of mallopt(3); above the last one glibc maps every buffer anew, by default from 128 KiB on."""
_ARENA_MAX: Final = -8


def keep_buffers(*, arenas: int = 0) -> bool:
    """Whether glibc took the settings; elsewhere (musl, macOS) nothing changes. For a process, before its threads.

    `arenas`: how many heaps threads share, 0 = as glibc likes. Each keeps the buffers of its own, so that many threads
    which do the same in turn hold many times what one of them needs.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = [_MMAP_THRESHOLD, _TRIM_THRESHOLD, _TOP_PAD]
    if arenas:
        settings.append((_ARENA_MAX, arenas))
    return all(mallopt(parameter, value) == 1 for parameter, value in settings)
