"""Uploads that wait on a GPU for their round: copied there when they are judged, which is as they arrive.

The copy then overlaps with what other devices still send, and a round that closes finds its numbers where they are
folded. Files stay the truth: a tensor that is not here is read from its file.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

_SHARE_OF_FREE = 4


class ResidentUploads:
    """Tensors by upload and name, at most `capacity` bytes of them; the oldest upload makes room for a new one."""

    def __init__(self, capacity: int) -> None:
        """Capacity 0 keeps nothing."""
        self._capacity = capacity
        self._bytes = 0
        self._uploads: dict[str, dict[str, Tensor]] = {}

    @classmethod
    def on(cls, device: torch.device) -> ResidentUploads:
        """A quarter of what a CUDA device has free now; nothing on a CPU, where the system keeps files in memory."""
        if device.type != "cuda":
            return cls(0)
        free, _ = torch.cuda.mem_get_info(device)
        return cls(free // _SHARE_OF_FREE)

    @property
    def size(self) -> int:
        """Bytes held."""
        return self._bytes

    def keep(self, digest: str | None, key: str, tensor: Tensor) -> None:
        """Hold a tensor of the upload with that digest until it is taken or others need its room."""
        if digest is None or not self._capacity or tensor.nbytes > self._capacity:
            return
        held = self._uploads.setdefault(digest, {})
        self._bytes += tensor.nbytes - (held[key].nbytes if key in held else 0)
        held[key] = tensor
        while self._bytes > self._capacity:
            self.drop(next(iter(self._uploads)))

    def take(self, digest: str | None, key: str) -> Tensor | None:
        """The tensor, which is held no longer; None where there is none."""
        if digest is None or key not in self._uploads.get(digest, {}):
            return None
        held = self._uploads[digest]
        tensor = held.pop(key)
        self._bytes -= tensor.nbytes
        if not held:
            del self._uploads[digest]
        return tensor

    def drop(self, digest: str | None) -> None:
        """Forget an upload."""
        if digest is not None:
            self._bytes -= sum(tensor.nbytes for tensor in self._uploads.pop(digest, {}).values())


NOWHERE: Final = ResidentUploads(0)
"""Keeps nothing, for callers without a GPU."""
