"""Adapters, their versions and aliases: the tables of schema 1."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "meta",
        sa.Column("key", sa.String(), primary_key=True),
        sa.Column("value", sa.Integer(), nullable=False),
    )
    op.create_table(
        "adapters",
        sa.Column("name", sa.String(), primary_key=True),
        sa.Column("last_version", sa.Integer(), nullable=False),
        sa.Column("pinned_version", sa.Integer()),
    )
    op.create_table(
        "blobs",
        sa.Column("digest", sa.String(), primary_key=True),
        sa.Column("peft_type", sa.String(), nullable=False),
        sa.Column("num_virtual_tokens", sa.Integer(), nullable=False),
        sa.Column("uses_scales", sa.Boolean(), nullable=False),
        sa.Column("num_bytes", sa.Integer(), nullable=False),
        sa.Column("status", sa.String(), nullable=False),
    )
    op.create_table(
        "versions",
        sa.Column("name", sa.String(), sa.ForeignKey("adapters.name"), primary_key=True),
        sa.Column("version", sa.Integer(), primary_key=True),
        sa.Column("digest", sa.String(), sa.ForeignKey("blobs.digest"), nullable=False),
        sa.Column("description", sa.Text()),
        sa.Column("template", sa.Text()),
        sa.Column("labels", sa.JSON()),
        sa.Column("target_separator", sa.Text(), nullable=False),
        sa.Column("append_eos", sa.Boolean()),
        sa.Column("base_digest", sa.String()),
        sa.Column("base_name", sa.Text()),
        sa.Column("warnings", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(), nullable=False),
    )
    op.create_index("ix_versions_digest", "versions", ["digest"])
    op.create_table(
        "aliases",
        sa.Column("name", sa.String(), primary_key=True),
        sa.Column("alias", sa.String(), primary_key=True),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(
            ["name", "version"], ["versions.name", "versions.version"], ondelete="CASCADE"
        ),
    )
    op.create_index("ix_aliases_alias", "aliases", ["alias"])
