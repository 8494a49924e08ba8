"""Who runs a job, what it lost, and how much room it takes."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Add four columns to jobs."""
    op.add_column("jobs", sa.Column("holder", sa.String()))
    for name in ("num_lost", "num_interrupted", "num_bytes"):
        op.add_column("jobs", sa.Column(name, sa.Integer(), nullable=False, server_default="0"))
    # Until now every attempt without a checkpoint counted as a lost worker.
    op.execute("UPDATE jobs SET num_lost = attempts - 1 WHERE state = 'running' AND attempts > 1")
