"""What Alembic runs around the changes: on the caller's connection, or on `-x database=FILE`."""

from __future__ import annotations

from alembic import context
from sqlalchemy import create_engine
from sqlalchemy.engine import URL, Connection

from server.store.tables import Base


def _run(connection: Connection, came: str | None = None) -> None:
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        render_as_batch=True,
    )
    migrations = context.get_context()
    if came is not None and not migrations.get_current_heads():
        # A file from before migrations: it has the tables of this revision, and no mark of it.
        migrations.stamp(context.script, came)
    with context.begin_transaction():
        context.run_migrations()


def _run_by_hand() -> None:
    file = context.get_x_argument(as_dictionary=True)["database"]
    with create_engine(URL.create("sqlite", database=str(file))).begin() as connection:
        _run(connection)


_given = context.config.attributes.get("connection")
if _given is None:
    _run_by_hand()
else:
    _run(_given, context.config.attributes["came"])
