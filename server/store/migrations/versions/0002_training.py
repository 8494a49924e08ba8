"""How an adapter was trained, and the jobs that train."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add four columns to versions, and the tables of jobs and their events."""
    op.add_column("versions", sa.Column("recipe", sa.JSON()))
    op.add_column("versions", sa.Column("job_id", sa.String()))
    op.add_column("versions", sa.Column("metrics", sa.JSON()))
    op.add_column(
        "versions",
        sa.Column("tokenization", sa.String(), nullable=False, server_default="boundary"),
    )
    op.create_table(
        "jobs",
        sa.Column("number", sa.Integer(), primary_key=True),
        sa.Column("id", sa.String(), nullable=False, unique=True),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("job", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.Column("started_at", sa.DateTime()),
        sa.Column("finished_at", sa.DateTime()),
        sa.Column("progress", sa.JSON(), nullable=False),
        sa.Column("metrics", sa.JSON()),
        sa.Column("error", sa.JSON()),
        sa.Column("adapter_version", sa.Integer()),
        sa.Column("cancel_requested", sa.Boolean(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("token", sa.Integer(), nullable=False),
        sa.Column("lease_until", sa.Float()),
        sa.Column("last_event", sa.Integer(), nullable=False),
        sa.Column("skipped_steps", sa.Integer(), nullable=False),
    )
    op.create_index("ix_jobs_state_number", "jobs", ["state", "number"])
    op.create_table(
        "job_events",
        sa.Column(
            "job",
            sa.Integer(),
            sa.ForeignKey("jobs.number", ondelete="CASCADE"),
            primary_key=True,
        ),
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("data", sa.JSON(), nullable=False),
        sa.Column("at", sa.DateTime(), nullable=False),
    )
    # Code from before migrations reads this row alone, and refuses the file by it.
    op.execute("UPDATE meta SET value = 2 WHERE key = 'schema'")
