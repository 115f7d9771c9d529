"""The first schema.

Revision: 0001, after nothing. Columns and keys are described in glora_server/storage/models.py.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_COUNTED = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_TABLES = (
    "tokens",
    "devices",
    "runs",
    "versions",
    "version_parts",
    "version_tensors",
    "version_diagnostics",
    "readouts",
    "rounds",
    "assignments",
    "uploads",
    "measurements",
    "audit",
    "outbox",
)


def _one_of(table: str, column: str, *values: str) -> sa.CheckConstraint:
    listed = ", ".join(f"'{value}'" for value in values)
    return sa.CheckConstraint(f"{column} IN ({listed})", name=op.f(f"ck_{table}_{column}"))


def upgrade() -> None:
    """Make all tables."""
    _people()
    _runs()
    _tensors()
    _rounds()
    _reports()
    _journal()
    if op.get_bind().dialect.name == "postgresql":
        # Factors do not compress: trying to costs time on every write.
        op.execute("ALTER TABLE version_tensors ALTER COLUMN data SET STORAGE EXTERNAL")


def downgrade() -> None:
    """Drop all tables."""
    for table in reversed(_TABLES):
        op.drop_table(table)


def _people() -> None:
    op.create_table(
        "tokens",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("secret_sha256", sa.Text(), nullable=False),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=False),
        sa.Column("max_uses", sa.BigInteger(), nullable=False),
        sa.Column("uses", sa.BigInteger(), nullable=False),
        sa.Column("max_rank", sa.BigInteger(), nullable=False),
        sa.Column("tags", sa.Text(), nullable=False),
        sa.Column("approve", sa.Boolean(), nullable=False),
        sa.Column("revoked", sa.Boolean(), nullable=False),
        sa.Column("row_version", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("uses >= 0 AND uses <= max_uses", name=op.f("ck_tokens_uses")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tokens")),
    )
    op.create_index("ix_tokens_created_at_id", "tokens", ["created_at", "id"], unique=False)
    op.create_table(
        "devices",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("state", sa.String(24), nullable=False),
        sa.Column("declared_rank", sa.BigInteger(), nullable=False),
        sa.Column("granted_rank", sa.BigInteger(), nullable=False),
        sa.Column("tags", sa.Text(), nullable=False),
        sa.Column("token_id", sa.Text(), nullable=True),
        sa.Column("key_sha256", sa.Text(), nullable=False),
        sa.Column("certificate_pem", sa.Text(), nullable=False),
        sa.Column("certificate_serial", sa.Text(), nullable=False),
        sa.Column("certificate_expires_at", sa.Double(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("last_seen_at", sa.Double(), nullable=True),
        sa.Column("profile", sa.Text(), nullable=False),
        sa.Column("row_version", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["token_id"], ["tokens.id"], name=op.f("fk_devices_token_id_tokens")),
        _one_of("devices", "state", "pending", "approved", "suspended", "revoked"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_devices")),
        sa.UniqueConstraint("key_sha256", name=op.f("uq_devices_key_sha256")),
    )
    op.create_index("ix_devices_created_at_id", "devices", ["created_at", "id"], unique=False)
    op.create_index("ix_devices_name", "devices", ["name"], unique=False)
    op.create_index(
        "uq_devices_name_active",
        "devices",
        ["name"],
        unique=True,
        sqlite_where=sa.text("state != 'revoked'"),
        postgresql_where=sa.text("state != 'revoked'"),
    )


def _runs() -> None:
    op.create_table(
        "runs",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("phase", sa.String(24), nullable=False),
        sa.Column("spec_json", sa.Text(), nullable=False),
        sa.Column("manifest", sa.Text(), nullable=False),
        sa.Column("version_id", sa.Text(), nullable=True),
        sa.Column("rounds_done", sa.BigInteger(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("started_at", sa.Double(), nullable=True),
        sa.Column("ended_at", sa.Double(), nullable=True),
        sa.Column("row_version", sa.BigInteger(), nullable=False),
        _one_of("runs", "phase", "created", "active", "paused", "completed", "failed", "aborted"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_runs")),
        sa.UniqueConstraint("name", name=op.f("uq_runs_name")),
    )
    op.create_index("ix_runs_created_at_id", "runs", ["created_at", "id"], unique=False)
    op.create_table(
        "versions",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.Column("round_id", sa.Text(), nullable=True),
        sa.Column("parent_id", sa.Text(), nullable=True),
        sa.Column("strategy", sa.Text(), nullable=False),
        sa.Column("published", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("summary_json", sa.Text(), nullable=False),
        sa.Column("pinned", sa.Boolean(), nullable=False),
        sa.Column("pruned", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(["parent_id"], ["versions.id"], name=op.f("fk_versions_parent_id_versions")),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name=op.f("fk_versions_run_id_runs")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_versions")),
    )
    op.create_index(
        "uq_versions_run_id_number_published",
        "versions",
        ["run_id", "number"],
        unique=True,
        sqlite_where=sa.text("published"),
        postgresql_where=sa.text("published"),
    )


def _tensors() -> None:
    op.create_table(
        "version_parts",
        sa.Column("version_id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("kind", sa.String(24), nullable=False),
        sa.ForeignKeyConstraint(["version_id"], ["versions.id"], name=op.f("fk_version_parts_version_id_versions")),
        _one_of("version_parts", "kind", "module", "dense"),
        sa.PrimaryKeyConstraint("version_id", "name", name=op.f("pk_version_parts")),
    )
    op.create_table(
        "version_tensors",
        sa.Column("version_id", sa.Text(), nullable=False),
        sa.Column("part", sa.Text(), nullable=False),
        sa.Column("tensor", sa.Text(), nullable=False),
        sa.Column("dtype", sa.Text(), nullable=False),
        sa.Column("shape", sa.Text(), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("data", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(
            ["version_id", "part"],
            ["version_parts.version_id", "version_parts.name"],
            name=op.f("fk_version_tensors_version_id_part_version_parts"),
        ),
        sa.PrimaryKeyConstraint("version_id", "part", "tensor", name=op.f("pk_version_tensors")),
    )
    op.create_table(
        "version_diagnostics",
        sa.Column("version_id", sa.Text(), nullable=False),
        sa.Column("module", sa.Text(), nullable=False),
        sa.Column("values_json", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["version_id"], ["versions.id"], name=op.f("fk_version_diagnostics_version_id_versions")
        ),
        sa.PrimaryKeyConstraint("version_id", "module", name=op.f("pk_version_diagnostics")),
    )
    op.create_table(
        "readouts",
        sa.Column("version_id", sa.Text(), nullable=False),
        sa.Column("rank", sa.Integer(), nullable=False),
        sa.Column("dtype", sa.Text(), nullable=False),
        sa.Column("variant", sa.Text(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["version_id"], ["versions.id"], name=op.f("fk_readouts_version_id_versions")),
        sa.PrimaryKeyConstraint("version_id", "rank", "dtype", "variant", name=op.f("pk_readouts")),
    )
    op.create_index("ix_readouts_digest", "readouts", ["digest"], unique=False)


def _rounds() -> None:
    op.create_table(
        "rounds",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.Column("attempt", sa.BigInteger(), nullable=False),
        sa.Column("version_id", sa.Text(), nullable=False),
        sa.Column("policy", sa.Text(), nullable=False),
        sa.Column("phase", sa.String(24), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("opened_at", sa.Double(), nullable=True),
        sa.Column("deadline_at", sa.Double(), nullable=True),
        sa.Column("closed_at", sa.Double(), nullable=True),
        sa.Column("target", sa.BigInteger(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("row_version", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name=op.f("fk_rounds_run_id_runs")),
        sa.ForeignKeyConstraint(["version_id"], ["versions.id"], name=op.f("fk_rounds_version_id_versions")),
        _one_of("rounds", "phase", "planned", "collecting", "grace", "aggregating", "committed", "failed", "aborted"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_rounds")),
        sa.UniqueConstraint("run_id", "number", "attempt", name=op.f("uq_rounds_run_id_number_attempt")),
    )
    op.create_index(
        "ix_rounds_live",
        "rounds",
        ["run_id"],
        unique=False,
        sqlite_where=sa.text("phase IN ('aggregating', 'collecting', 'grace', 'planned')"),
        postgresql_where=sa.text("phase IN ('aggregating', 'collecting', 'grace', 'planned')"),
    )
    op.create_table(
        "assignments",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("position", sa.BigInteger(), nullable=False),
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("round_id", sa.Text(), nullable=True),
        sa.Column("device_id", sa.Text(), nullable=False),
        sa.Column("kind", sa.String(24), nullable=False),
        sa.Column("rank", sa.BigInteger(), nullable=False),
        sa.Column("ranks", sa.Text(), nullable=False),
        sa.Column("version_id", sa.Text(), nullable=False),
        sa.Column("phase", sa.String(24), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("permanent", sa.Boolean(), nullable=False),
        sa.Column("offered_at", sa.Double(), nullable=False),
        sa.Column("accepted_at", sa.Double(), nullable=True),
        sa.Column("delivered_at", sa.Double(), nullable=True),
        sa.Column("upload_started_at", sa.Double(), nullable=True),
        sa.Column("received_at", sa.Double(), nullable=True),
        sa.Column("closed_at", sa.Double(), nullable=True),
        sa.Column("deadline_at", sa.Double(), nullable=False),
        sa.Column("training_rows", sa.BigInteger(), nullable=False),
        sa.Column("bytes_down", sa.BigInteger(), nullable=False),
        sa.Column("bytes_up", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["device_id"], ["devices.id"], name=op.f("fk_assignments_device_id_devices")),
        sa.ForeignKeyConstraint(["round_id"], ["rounds.id"], name=op.f("fk_assignments_round_id_rounds")),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name=op.f("fk_assignments_run_id_runs")),
        sa.ForeignKeyConstraint(["version_id"], ["versions.id"], name=op.f("fk_assignments_version_id_versions")),
        _one_of("assignments", "kind", "train", "evaluate"),
        _one_of(
            "assignments",
            "phase",
            "offered",
            "accepted",
            "delivered",
            "uploading",
            "received",
            "accepted_update",
            "rejected",
            "declined",
            "failed",
            "expired",
            "completed",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_assignments")),
    )
    op.create_index(
        "ix_assignments_evaluate",
        "assignments",
        ["run_id", "device_id", "version_id"],
        unique=False,
        sqlite_where=sa.text("kind = 'evaluate'"),
        postgresql_where=sa.text("kind = 'evaluate'"),
    )
    op.create_index(
        "ix_assignments_open",
        "assignments",
        ["device_id", "offered_at"],
        unique=False,
        sqlite_where=sa.text("phase IN ('accepted', 'delivered', 'offered', 'received', 'uploading')"),
        postgresql_where=sa.text("phase IN ('accepted', 'delivered', 'offered', 'received', 'uploading')"),
    )
    op.create_index(
        "ix_assignments_permanent",
        "assignments",
        ["run_id", "device_id"],
        unique=False,
        sqlite_where=sa.text("permanent"),
        postgresql_where=sa.text("permanent"),
    )
    op.create_index("ix_assignments_round_id_position", "assignments", ["round_id", "position"], unique=False)


def _reports() -> None:
    op.create_table(
        "uploads",
        sa.Column("assignment_id", sa.Text(), nullable=False),
        sa.Column("round_id", sa.Text(), nullable=False),
        sa.Column("device_id", sa.Text(), nullable=False),
        sa.Column("version_id", sa.Text(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("adapter_config_json", sa.Text(), nullable=False),
        sa.Column("training_rows", sa.BigInteger(), nullable=False),
        sa.Column("completed_steps", sa.BigInteger(), nullable=False),
        sa.Column("stopped_early", sa.Boolean(), nullable=False),
        sa.Column("training_loss", sa.Double(), nullable=True),
        sa.Column("training_seconds", sa.Double(), nullable=False),
        sa.Column("received_at", sa.Double(), nullable=False),
        sa.Column("update_norm", sa.Double(), nullable=True),
        sa.Column("shrunk_rank", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(
            ["assignment_id"], ["assignments.id"], name=op.f("fk_uploads_assignment_id_assignments")
        ),
        sa.ForeignKeyConstraint(["device_id"], ["devices.id"], name=op.f("fk_uploads_device_id_devices")),
        sa.ForeignKeyConstraint(["round_id"], ["rounds.id"], name=op.f("fk_uploads_round_id_rounds")),
        sa.ForeignKeyConstraint(["version_id"], ["versions.id"], name=op.f("fk_uploads_version_id_versions")),
        sa.PrimaryKeyConstraint("assignment_id", name=op.f("pk_uploads")),
    )
    op.create_index("ix_uploads_digest", "uploads", ["digest"], unique=False)
    op.create_index("ix_uploads_round_id", "uploads", ["round_id"], unique=False)
    op.create_table(
        "measurements",
        sa.Column("assignment_id", sa.Text(), nullable=False),
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("device_id", sa.Text(), nullable=False),
        sa.Column("version_id", sa.Text(), nullable=False),
        sa.Column("version_number", sa.BigInteger(), nullable=False),
        sa.Column("phase", sa.String(24), nullable=False),
        sa.Column("rank", sa.Integer(), nullable=False),
        sa.Column("loss", sa.Double(), nullable=True),
        sa.Column("accuracy", sa.Double(), nullable=True),
        sa.Column("rows", sa.BigInteger(), nullable=False),
        sa.Column("seconds", sa.Double(), nullable=False),
        sa.Column("measured_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["assignment_id"], ["assignments.id"], name=op.f("fk_measurements_assignment_id_assignments")
        ),
        sa.ForeignKeyConstraint(["device_id"], ["devices.id"], name=op.f("fk_measurements_device_id_devices")),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name=op.f("fk_measurements_run_id_runs")),
        sa.ForeignKeyConstraint(["version_id"], ["versions.id"], name=op.f("fk_measurements_version_id_versions")),
        _one_of("measurements", "phase", "before", "after", "version"),
        sa.PrimaryKeyConstraint("assignment_id", "phase", "rank", name=op.f("pk_measurements")),
    )
    op.create_index(
        "ix_measurements_run_id", "measurements", ["run_id", "version_number", "rank", "device_id"], unique=False
    )


def _journal() -> None:
    op.create_table(
        "audit",
        sa.Column("id", _COUNTED, nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("target", sa.Text(), nullable=False),
        sa.Column("details_json", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit")),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "outbox",
        sa.Column("id", _COUNTED, nullable=False),
        sa.Column("kind", sa.String(24), nullable=False),
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("round_id", sa.Text(), nullable=False),
        sa.Column("assignment_id", sa.Text(), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["assignment_id"], ["assignments.id"], name=op.f("fk_outbox_assignment_id_assignments")
        ),
        sa.ForeignKeyConstraint(["round_id"], ["rounds.id"], name=op.f("fk_outbox_round_id_rounds")),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name=op.f("fk_outbox_run_id_runs")),
        _one_of("outbox", "kind", "validate", "aggregate", "closed", "wake"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_outbox")),
        sqlite_autoincrement=True,
    )
