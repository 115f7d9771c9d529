"""Records survive being text; rows of the release before and after can be read."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from sqlalchemy import inspect
from sqlalchemy.dialects import sqlite
from storage_records import digest, manifest

from glora_server.coordinator.model import (
    AuditEntry,
    Device,
    Measurement,
    ModuleDiagnostics,
    Owed,
    Profile,
    Readout,
    Run,
    TokenRecord,
    Upload,
    Version,
)
from glora_server.rounds.assignment import Assignment
from glora_server.rounds.policy import RoundPolicy, Sampling, TooFew
from glora_server.rounds.round import Round
from glora_server.storage import column_types as types
from glora_server.storage import models
from glora_wire.errors import Reason

_DIALECT = sqlite.dialect()


@pytest.mark.parametrize(
    ("column", "value"),
    [
        (types.WordsTuple(), ("a", 'b"', "")),
        (types.WordsTuple(), ()),
        (types.NumbersTuple(), (3, 0, 2**40)),
        (types.DigestText(), digest("x")),
        (types.ReasonText(), Reason.OUT_OF_MEMORY),
        (types.ReasonText(), None),
        (types.ManifestText(), manifest()),
        (types.ProfileText(), Profile(accelerators=("a", "b"), trains=False, max_rank=3, fingerprint="f")),
        (types.PolicyText(), RoundPolicy(too_few=TooFew.WAIT, sampling=Sampling.WEIGHTED, tags=("x",), quorum=4)),
        (types.Measured(), 0.1),
        (types.Measured(), -math.inf),
    ],
)
def test_a_value_comes_back_as_it_went(column: Any, value: object) -> None:
    assert column.process_result_value(column.process_bind_param(value, _DIALECT), _DIALECT) == value


def test_what_postgresql_cannot_store_is_replaced() -> None:
    column = types.Words()
    assert column.process_bind_param("a\x00b\ud800ö", _DIALECT) == "a\ufffdb?ö"
    assert column.process_bind_param("plain", _DIALECT) == "plain"
    assert column.process_bind_param(None, _DIALECT) is None


def test_not_a_number_is_null_in_the_database() -> None:
    column = types.Measured()
    assert column.process_bind_param(math.nan, _DIALECT) is None
    assert math.isnan(column.process_result_value(None, _DIALECT))


@pytest.mark.parametrize(
    ("column", "record"), [(types.ProfileText(), Profile(max_rank=4)), (types.PolicyText(), RoundPolicy(quorum=3))]
)
def test_fields_that_another_release_has_more_or_less_do_no_harm(column: Any, record: Profile | RoundPolicy) -> None:
    values = json.loads(str(column.process_bind_param(record, _DIALECT)))
    newer = json.dumps(values | {"from_the_future": 1})
    assert column.process_result_value(newer, _DIALECT) == record
    for missing in set(values) - {"max_rank", "quorum"}:
        older = json.dumps({name: value for name, value in values.items() if name != missing})
        assert column.process_result_value(older, _DIALECT) == record


@pytest.mark.parametrize(
    ("row", "record", "extra"),
    [
        (models.TokenRow, TokenRecord, set()),
        (models.DeviceRow, Device, set()),
        (models.RunRow, Run, set()),
        (models.VersionRow, Version, set()),
        (models.DiagnosticsRow, ModuleDiagnostics, set()),
        (models.ReadoutRow, Readout, set()),
        (models.RoundRow, Round, {"-assignments"}),
        (models.AssignmentRow, Assignment, {"position"}),
        (models.UploadRow, Upload, set()),
        (models.MeasurementRow, Measurement, set()),
        (models.AuditRow, AuditEntry, set()),
        (models.OwedRow, Owed, set()),
    ],
)
def test_columns_are_the_fields_of_the_record(row: type[models.Base], record: type, extra: set[str]) -> None:
    """What makes `values_of` and `built` right: a field without a column would not be stored."""
    columns = {column.key for column in inspect(row).columns}
    names = set(record.__dataclass_fields__)  # type: ignore[attr-defined]
    assert columns - extra == names - {name.removeprefix("-") for name in extra}
