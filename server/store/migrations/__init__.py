"""Changes to the tables, one file each under `versions/`, run by Alembic.

`server.store.database` decides when, and keeps the transaction; this package is imported only where
there is something to change. To add one, change `server.store.tables`, then

    alembic -x database=FILE revision --autogenerate --rev-id 0006 -m "what it does"

on a FILE of the version before, and set `HEAD` in `server.store.schema`. SQLite alters a table by
copying it where it must (`op.batch_alter_table`).
"""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy.engine import Connection

from server.store.schema import unknown_schema


def upgrade(connection: Connection, came: str) -> None:
    """Run every change after `came` on a connection whose transaction the caller ends.

    Args:
        connection: in a transaction that holds the write lock; foreign keys are not enforced.
        came: the revision that the database has reached.

    Raises:
        RegistryError: no such revision is known here.
    """
    config = configuration()
    try:
        ScriptDirectory.from_config(config).get_revision(came)
    except CommandError as error:
        raise unknown_schema(came) from error
    config.attributes["connection"] = connection
    config.attributes["came"] = came
    command.upgrade(config, "head")


def configuration() -> Config:
    """What alembic.ini would say."""
    config = Config()
    folder = str(Path(__file__).parent).replace("%", "%%")
    config.set_main_option("script_location", folder)
    return config
