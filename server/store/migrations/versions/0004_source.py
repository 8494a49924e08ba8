"""The source of a version, and the operator's folder it came from, if any."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add two columns to versions."""
    op.add_column(
        "versions", sa.Column("source", sa.String(), nullable=False, server_default="uploaded")
    )
    op.add_column("versions", sa.Column("source_path", sa.Text()))
    op.execute("UPDATE versions SET source = 'trained' WHERE job_id IS NOT NULL")
