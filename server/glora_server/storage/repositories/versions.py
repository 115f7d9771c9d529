"""Versions, the tensors of their parts, what was measured for them, and their readouts."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

from sqlalchemy import delete, exists, select, update
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
    Order,
    Session,
    add_row,
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

    def put_part(self, version_id: VersionId, part: StatePart) -> None:
        """Store one part, replacing one of that name; raises ILLEGAL_TRANSITION once the version is published."""
        self._require_unpublished(version_id)
        key = {"version_id": version_id, "name": part.name}
        put_rows(self._session, PartRow, [key | {"kind": part.kind}])
        self._session.connection.execute(
            delete(TensorRow).where(TensorRow.version_id == version_id, TensorRow.part == part.name)
        )
        for name, tensor in part.tensors.items():
            add_row(
                self._session,
                TensorRow,
                {
                    "version_id": version_id,
                    "part": part.name,
                    "tensor": name,
                    "dtype": tensor.dtype,
                    "shape": tensor.shape,
                    "sha256": hashlib.sha256(tensor.data).hexdigest(),
                    "data": tensor.data,
                },
            )

    def part(self, version_id: VersionId, name: str) -> StatePart:
        """One part with its tensors; raises VERSION_UNKNOWN, and DIGEST_MISMATCH when a tensor was damaged."""
        row = self._session.first(select(PartRow.kind).where(PartRow.version_id == version_id, PartRow.name == name))
        if row is None:
            raise self._no_such_part(version_id, name)
        tensors = self._session.rows(
            select(TensorRow.tensor, TensorRow.dtype, TensorRow.shape, TensorRow.sha256, TensorRow.data)
            .where(TensorRow.version_id == version_id, TensorRow.part == name)
            .order_by(TensorRow.tensor)
        )
        found: dict[str, TensorData] = {}
        for tensor in tensors:
            if hashlib.sha256(tensor.data).hexdigest() != tensor.sha256:
                raise GloraError(
                    Reason.DIGEST_MISMATCH,
                    f"Tensor {tensor.tensor} of {name} in version {version_id} is damaged in the database; "
                    "restore the database from a backup.",
                    version=version_id,
                    part=name,
                    tensor=tensor.tensor,
                )
            found[tensor.tensor] = TensorData(dtype=tensor.dtype, shape=tensor.shape, data=bytes(tensor.data))
        return StatePart(name=name, kind=TensorKind(row.kind), tensors=found)

    def part_names(self, version_id: VersionId) -> tuple[str, ...]:
        """Names of the parts that are stored, in the order of their names."""
        rows = self._session.rows(select(PartRow.name).where(PartRow.version_id == version_id))
        return tuple(sorted(row.name for row in rows))

    def put_diagnostics(self, diagnostics: ModuleDiagnostics) -> None:
        """Store or replace what was measured for one module."""
        put_rows(self._session, DiagnosticsRow, [values_of(diagnostics)])

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
