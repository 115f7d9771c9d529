"""What pages show of rounds and versions that are over, in few rows; answers that can be given again.

Revision: 0003, after 0002. Devices' outcomes are counted from the assignments that are there; figures, contributions
and scores exist from the rounds on that end after this (plots of older rounds stay empty).
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_OPEN = "phase IN ('accepted', 'delivered', 'offered', 'received', 'uploading')"
_INDEXES: tuple[tuple[str, str, tuple[str, ...], str | None], ...] = (
    ("ix_assignments_device_id_offered_at_id", "assignments", ("device_id", "offered_at", "id"), None),
    ("ix_assignments_round_id_phase", "assignments", ("round_id", "phase"), None),
    ("ix_assignments_rejected", "assignments", ("closed_at", "device_id"), "phase = 'rejected'"),
    ("ix_assignments_open_evaluations", "assignments", ("run_id", "offered_at"), f"round_id IS NULL AND {_OPEN}"),
    ("ix_audit_actor_id", "audit", ("actor", "id"), None),
    ("ix_audit_action_id", "audit", ("action", "id"), None),
    ("ix_audit_target_id", "audit", ("target", "id"), None),
    ("ix_audit_at", "audit", ("at",), None),
)
_TABLES = ("round_figures", "version_figures", "contributions", "device_outcomes", "version_scores", "answers")
_COUNT_OUTCOMES = """
INSERT INTO device_outcomes (device_id, outcome, number)
SELECT device_id, outcome, count(*) FROM (
    SELECT device_id, CASE
        WHEN phase = 'accepted_update' THEN 'accepted'
        WHEN phase = 'expired' AND coalesce(reason, '') != 'DEADLINE_PASSED' THEN 'not_needed'
        ELSE phase END AS outcome
    FROM assignments
    WHERE round_id IS NOT NULL AND phase IN ('accepted_update', 'rejected', 'declined', 'failed', 'expired')
) AS ended
GROUP BY device_id, outcome
"""


def upgrade() -> None:
    """Make the tables and indexes; count what is there."""
    _rounds()
    _versions()
    _devices()
    op.create_table(
        "answers",
        sa.Column("principal", sa.Text(), nullable=False),
        sa.Column("key_sha256", sa.Text(), nullable=False),
        sa.Column("request_sha256", sa.Text(), nullable=False),
        sa.Column("sealed", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("principal", "key_sha256", name=op.f("pk_answers")),
    )
    op.create_index("ix_answers_created_at", "answers", ["created_at"])
    for name, table, columns, where in _INDEXES:
        only = None if where is None else sa.text(where)
        op.create_index(name, table, list(columns), sqlite_where=only, postgresql_where=only)
    op.execute(_COUNT_OUTCOMES)


def downgrade() -> None:
    """Drop them again."""
    for name, table, _, _ in _INDEXES:
        op.drop_index(name, table)
    for table in reversed(_TABLES):
        op.drop_table(table)


def _key(table: str, column: str, other: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint([column], [f"{other}.id"], name=op.f(f"fk_{table}_{column}_{other}"))


def _rounds() -> None:
    op.create_table(
        "round_figures",
        sa.Column("round_id", sa.Text(), nullable=False),
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.Column("attempt", sa.BigInteger(), nullable=False),
        sa.Column("figures_json", sa.Text(), nullable=False),
        _key("round_figures", "round_id", "rounds"),
        _key("round_figures", "run_id", "runs"),
        sa.PrimaryKeyConstraint("round_id", name=op.f("pk_round_figures")),
    )
    op.create_index("ix_round_figures_run_id_number_attempt", "round_figures", ["run_id", "number", "attempt"])


def _versions() -> None:
    op.create_table(
        "version_figures",
        sa.Column("version_id", sa.Text(), nullable=False),
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.Column("modules_json", sa.Text(), nullable=False),
        _key("version_figures", "run_id", "runs"),
        _key("version_figures", "version_id", "versions"),
        sa.PrimaryKeyConstraint("version_id", name=op.f("pk_version_figures")),
    )
    op.create_index("ix_version_figures_run_id_number", "version_figures", ["run_id", "number"])
    op.create_table(
        "version_scores",
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("version_number", sa.Integer(), nullable=False),
        sa.Column("phase", sa.String(24), nullable=False),
        sa.Column("rank", sa.Integer(), nullable=False),
        sa.Column("devices", sa.BigInteger(), nullable=False),
        sa.Column("rows", sa.BigInteger(), nullable=False),
        sa.Column("accuracy", sa.Double(), nullable=True),
        sa.Column("loss", sa.Double(), nullable=True),
        sa.Column("spreads_json", sa.Text(), nullable=False),
        sa.CheckConstraint("phase IN ('before', 'after', 'version')", name=op.f("ck_version_scores_phase")),
        _key("version_scores", "run_id", "runs"),
        sa.PrimaryKeyConstraint("run_id", "version_number", "phase", "rank", name=op.f("pk_version_scores")),
    )


def _devices() -> None:
    op.create_table(
        "contributions",
        sa.Column("version_id", sa.Text(), nullable=False),
        sa.Column("device_id", sa.Text(), nullable=False),
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("share", sa.Double(), nullable=False),
        sa.Column("rows", sa.BigInteger(), nullable=False),
        sa.Column("update_norm", sa.Double(), nullable=True),
        sa.Column("capture", sa.Double(), nullable=True),
        sa.Column("cosine", sa.Double(), nullable=True),
        sa.Column("deviation", sa.Double(), nullable=True),
        sa.Column("outlier", sa.Boolean(), nullable=False),
        _key("contributions", "device_id", "devices"),
        _key("contributions", "run_id", "runs"),
        _key("contributions", "version_id", "versions"),
        sa.PrimaryKeyConstraint("version_id", "device_id", name=op.f("pk_contributions")),
    )
    op.create_index("ix_contributions_device_id_at", "contributions", ["device_id", "at"])
    op.create_index("ix_contributions_version_id_share", "contributions", ["version_id", "share", "device_id"])
    op.create_table(
        "device_outcomes",
        sa.Column("device_id", sa.Text(), nullable=False),
        sa.Column("outcome", sa.String(24), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.CheckConstraint(
            "outcome IN ('accepted', 'rejected', 'declined', 'failed', 'expired', 'not_needed')",
            name=op.f("ck_device_outcomes_outcome"),
        ),
        _key("device_outcomes", "device_id", "devices"),
        sa.PrimaryKeyConstraint("device_id", "outcome", name=op.f("pk_device_outcomes")),
    )
