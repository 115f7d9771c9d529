"""Answers that are given again when a request is repeated; kept for a day."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from glora_server.coordinator.ports import KeptAnswer, Store

KEPT_SECONDS: Final = 86400.0


@dataclass(slots=True, kw_only=True)
class AnswerBook:
    """Finds and keeps answers; what they say is sealed by whoever keeps them."""

    store: Store
    clock: Callable[[], float]

    async def find(self, who: str, key_sha256: str) -> tuple[str, bytes] | None:
        """The digest of the request and its sealed answer; None when there is none of the last day."""
        since = self.clock() - KEPT_SECONDS
        kept = await self.store.read(lambda uow: uow.answers.find(who, key_sha256, since))
        return None if kept is None else (kept.request_sha256, kept.sealed)

    async def keep(self, who: str, key_sha256: str, request_sha256: str, sealed: bytes) -> None:
        """Keep an answer, durably, and forget those that are older than a day."""
        now = self.clock()
        answer = KeptAnswer(request_sha256=request_sha256, sealed=sealed, created_at=now)
        await self.store.write(lambda uow: uow.answers.keep(who, key_sha256, answer, forget_before=now - KEPT_SECONDS))
