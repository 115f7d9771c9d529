"""Versions, the tensors of their parts, what was measured for them, and their readouts."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sqlalchemy import delete, exists, insert, select, update
from sqlalchemy.exc import IntegrityError

from glora_server.coordinator.model import (
    Listing,
    ModuleDiagnostics,
    Page,
    Readout,
    StatePart,
    TensorData,
    TensorKind,
    Version,
)
from glora_server.rounds.ids import RunId, VersionId
from glora_server.storage.models import DiagnosticsRow, PartRow, ReadoutRow, TensorRow, UploadRow, VersionRow
from glora_server.storage.repositories.rows import (
    AnyRow,
    Order,
    Session,
    add_row,
    among,
    built,
    columns_of,
    page_of,
    put_rows,
    rows_where,
    values_of,
)
from glora_wire.errors import GloraError, Reason

_NUMBERS_SHOWN = 10


class VersionRepository:
    """States. A version's parts may be written in earlier transactions; `publish` makes it visible."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def add(self, version: Version) -> None:
        """Store an unpublished version without parts."""
        add_row(self._session, VersionRow, values_of(version))

    def get(self, version_id: VersionId) -> Version:
        """The version; raises VERSION_UNKNOWN."""
        row = self._session.first(rows_where(VersionRow, "id"), {"id": version_id}, lock=True)
        if row is None:
            raise GloraError(Reason.VERSION_UNKNOWN, f"There is no version {version_id!r}.", version=version_id)
        return built(Version, row)

    def by_number(self, run_id: RunId, number: int) -> Version:
        """The published version; raises VERSION_UNKNOWN naming the ones that exist."""
        statement = columns_of(VersionRow).where(
            VersionRow.run_id == run_id, VersionRow.number == number, VersionRow.published
        )
        row = self._session.first(statement, lock=True)
        if row is None:
            raise self._no_such_number(run_id, number)
        return built(Version, row)

    def put_parts(self, version_id: VersionId, *parts: StatePart) -> None:
        """Store parts, replacing those of their names; raises ILLEGAL_TRANSITION once the version is published."""
        self._require_unpublished(version_id)
        rows = [{"version_id": version_id, "name": part.name, "kind": part.kind} for part in parts]
        put_rows(self._session, PartRow, rows)
        replaced = among(self._session, TensorRow.part, [part.name for part in parts])
        self._session.connection.execute(delete(TensorRow).where(TensorRow.version_id == version_id, replaced))
        tensors = [values for part in parts for values in _tensors(version_id, part)]
        if tensors:
            self._session.connection.execute(insert(TensorRow), tensors)

    def parts(self, version_id: VersionId, names: Sequence[str]) -> tuple[StatePart, ...]:
        """The parts, as named; raises VERSION_UNKNOWN, and DIGEST_MISMATCH when a tensor was damaged."""
        kinds = self._session.rows(
            select(PartRow.name, PartRow.kind).where(
                PartRow.version_id == version_id, among(self._session, PartRow.name, names)
            )
        )
        found: dict[str, dict[str, TensorData]] = {row.name: {} for row in kinds}
        if missing := next((name for name in names if name not in found), None):
            raise self._no_such_part(version_id, missing)
        tensors = self._session.rows(
            select(TensorRow.part, TensorRow.tensor, TensorRow.dtype, TensorRow.shape, TensorRow.sha256, TensorRow.data)
            .where(TensorRow.version_id == version_id, among(self._session, TensorRow.part, names))
            .order_by(TensorRow.part, TensorRow.tensor)
        )
        for row in tensors:
            found[row.part][row.tensor] = _undamaged(version_id, row)
        kind = {row.name: TensorKind(row.kind) for row in kinds}
        return tuple(StatePart(name=name, kind=kind[name], tensors=found[name]) for name in names)

    def part_names(self, version_id: VersionId) -> tuple[str, ...]:
        """Names of the parts that are stored, in the order of their names."""
        rows = self._session.rows(select(PartRow.name).where(PartRow.version_id == version_id))
        return tuple(sorted(row.name for row in rows))

    def put_diagnostics(self, *diagnostics: ModuleDiagnostics) -> None:
        """Store or replace what was measured for modules."""
        put_rows(self._session, DiagnosticsRow, [values_of(measured) for measured in diagnostics])

    def diagnostics(self, version_id: VersionId) -> tuple[ModuleDiagnostics, ...]:
        """What was measured for the version, by module name."""
        rows = self._session.rows(columns_of(DiagnosticsRow).where(DiagnosticsRow.version_id == version_id))
        return tuple(sorted((built(ModuleDiagnostics, row) for row in rows), key=lambda found: found.module))

    def publish(self, version_id: VersionId, summary_json: str) -> None:
        """Mark the version as published; raises STALE_STATE when its number was published by somebody else."""
        version = self.get(version_id)
        statement = (
            update(VersionRow).where(VersionRow.id == version_id).values(published=True, summary_json=summary_json)
        )
        try:
            with self._session.connection.begin_nested():
                self._session.connection.execute(statement)
        except IntegrityError as error:
            raise GloraError(
                Reason.STALE_STATE,
                f"Version {version.number} of this run was published by somebody else in the meantime.",
                version=version_id,
            ) from error

    def drop(self, version_id: VersionId) -> None:
        """Delete an unpublished version and its parts; harmless when it is not there."""
        row = self._session.first(select(VersionRow.published).where(VersionRow.id == version_id), lock=True)
        if row is None:
            return
        if row.published:
            raise _published(version_id)
        self._drop_contents(version_id)
        connection = self._session.connection
        connection.execute(delete(DiagnosticsRow).where(DiagnosticsRow.version_id == version_id))
        connection.execute(delete(VersionRow).where(VersionRow.id == version_id))

    def list(self, run_id: RunId, page: Page) -> Listing[Version]:
        """Published versions, newest first."""
        order = Order((VersionRow.number,), (int,), descending=True)
        statement = columns_of(VersionRow).where(VersionRow.run_id == run_id, VersionRow.published)
        return page_of(self._session, statement, order, page, lambda row: built(Version, row))

    def pin(self, version_id: VersionId, *, pinned: bool) -> None:
        """Keep the version's tensors for ever, or no longer; raises VERSION_UNKNOWN."""
        self.get(version_id)
        statement = update(VersionRow).where(VersionRow.id == version_id).values(pinned=pinned)
        self._session.connection.execute(statement)

    def prune(self, run_id: RunId, *, keep: int) -> tuple[Readout, ...]:
        """Drop the tensors and readouts of all but the last `keep` (at least 1) and the pinned versions.

        Returns those of the readouts whose blob nothing else refers to.
        """
        versions = self._session.rows(
            select(VersionRow.id, VersionRow.pinned, VersionRow.pruned)
            .where(VersionRow.run_id == run_id, VersionRow.published)
            .order_by(VersionRow.number.desc())
        )
        dropped: list[Readout] = []
        for version in versions[max(keep, 1) :]:
            if version.pinned:
                continue
            readouts = self._readouts(version.id)
            if version.pruned and not readouts:
                continue
            dropped += readouts
            self._drop_contents(version.id)
            statement = update(VersionRow).where(VersionRow.id == version.id).values(pruned=True)
            self._session.connection.execute(statement)
        return tuple(readout for readout in dropped if not self._referred(readout))

    def module_ranks(self, version_id: VersionId) -> Mapping[str, int]:
        """How many directions the state of each module holds, by name; reads no tensors."""
        statement = select(TensorRow.part, TensorRow.shape).where(
            TensorRow.version_id == version_id, TensorRow.tensor == "sigma"
        )
        return {row.part: math.prod(row.shape) for row in self._session.rows(statement)}

    def readout(self, version_id: VersionId, rank: int, dtype: str, variant: str = "train") -> Readout | None:
        """The rendered adapter, where there is one."""
        statement = columns_of(ReadoutRow).where(
            ReadoutRow.version_id == version_id,
            ReadoutRow.rank == rank,
            ReadoutRow.dtype == dtype,
            ReadoutRow.variant == variant,
        )
        row = self._session.first(statement)
        return None if row is None else built(Readout, row)

    def put_readout(self, readout: Readout) -> None:
        """Note a rendered adapter; the same one again is harmless, another one replaces it."""
        put_rows(self._session, ReadoutRow, [values_of(readout)])

    def readout_digests(self) -> frozenset[str]:
        """Digest.text of every blob that a readout row refers to (for clean-up)."""
        return frozenset(row.digest.text for row in self._session.rows(select(ReadoutRow.digest).distinct()))

    def _readouts(self, version_id: str) -> Sequence[Readout]:
        rows = self._session.rows(columns_of(ReadoutRow).where(ReadoutRow.version_id == version_id))
        return [built(Readout, row) for row in rows]

    def _referred(self, readout: Readout) -> bool:
        """Whether another readout or an upload has the same content: a round can leave a state as it was."""
        still = select(
            exists().where(ReadoutRow.digest == readout.digest) | exists().where(UploadRow.digest == readout.digest)
        )
        return bool(self._session.connection.execute(still).scalar_one())

    def _drop_contents(self, version_id: str) -> None:
        connection = self._session.connection
        connection.execute(delete(TensorRow).where(TensorRow.version_id == version_id))
        connection.execute(delete(PartRow).where(PartRow.version_id == version_id))
        connection.execute(delete(ReadoutRow).where(ReadoutRow.version_id == version_id))

    def _require_unpublished(self, version_id: VersionId) -> None:
        row = self._session.first(select(VersionRow.published).where(VersionRow.id == version_id), lock=True)
        if row is None:
            raise GloraError(Reason.VERSION_UNKNOWN, f"There is no version {version_id!r}.", version=version_id)
        if row.published:
            raise _published(version_id)

    def _no_such_number(self, run_id: RunId, number: int) -> GloraError:
        statement = (
            select(VersionRow.number)
            .where(VersionRow.run_id == run_id, VersionRow.published)
            .order_by(VersionRow.number.desc())
            .limit(_NUMBERS_SHOWN)
        )
        numbers = [str(row.number) for row in self._session.rows(statement)]
        there = f"the newest are {', '.join(numbers)}" if numbers else "it has none yet"
        return GloraError(
            Reason.VERSION_UNKNOWN, f"The run has no version number {number}; {there}.", version_number=number
        )

    def _no_such_part(self, version_id: VersionId, name: str) -> GloraError:
        version = self.get(version_id)
        why = "its tensors were dropped by retention" if version.pruned else f"it has no part {name!r}"
        return GloraError(
            Reason.VERSION_UNKNOWN,
            f"Version {version.number} cannot be read: {why}.",
            version=version_id,
            part=name,
        )


def _published(version_id: VersionId) -> GloraError:
    return GloraError(
        Reason.ILLEGAL_TRANSITION,
        f"Version {version_id} is published; published versions never change.",
        version=version_id,
    )


def _tensors(version_id: VersionId, part: StatePart) -> Iterator[dict[str, Any]]:
    """The rows of the part's tensors."""
    for name, tensor in part.tensors.items():
        yield {
            "version_id": version_id,
            "part": part.name,
            "tensor": name,
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "sha256": hashlib.sha256(tensor.data).hexdigest(),
            "data": tensor.data,
        }


def _undamaged(version_id: VersionId, row: AnyRow) -> TensorData:
    if hashlib.sha256(row.data).hexdigest() != row.sha256:
        raise GloraError(
            Reason.DIGEST_MISMATCH,
            f"Tensor {row.tensor} of {row.part} in version {version_id} is damaged in the database; "
            "restore the database from a backup.",
            version=version_id,
            part=row.part,
            tensor=row.tensor,
        )
    return TensorData(dtype=row.dtype, shape=row.shape, data=bytes(row.data))
