"""Answers that may be asked for again, in memory."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class MemoryAnswers:
    """What `AnswerBook` does, without a database and without an end."""

    kept: dict[tuple[str, str], tuple[str, bytes]] = field(default_factory=dict)

    async def find(self, who: str, key_sha256: str) -> tuple[str, bytes] | None:
        return self.kept.get((who, key_sha256))

    async def keep(self, who: str, key_sha256: str, request_sha256: str, sealed: bytes) -> None:
        self.kept[who, key_sha256] = (request_sha256, sealed)
