"""Names for the identifiers that travel between the parts."""

from __future__ import annotations

from typing import NewType

DeviceId = NewType("DeviceId", str)
RunId = NewType("RunId", str)
RoundId = NewType("RoundId", str)
AssignmentId = NewType("AssignmentId", str)
VersionId = NewType("VersionId", str)
TokenId = NewType("TokenId", str)
