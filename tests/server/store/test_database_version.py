"""The database's version changes with every commit, and with nothing else."""

from __future__ import annotations

import subprocess
import sys

import pytest
from sqlalchemy import select

from server.store.database import Database
from server.store.tables import MetaRow

_WRITE = """
import sys; from pathlib import Path
from server.store.database import Database
from server.store.tables import MetaRow
database = Database(Path(sys.argv[1]))
with database.write() as session:
    session.add(MetaRow(key="other", value=1))
database.close()
"""


@pytest.fixture
def database(tmp_path):
    database = Database(tmp_path / "registry.db")
    yield database
    database.close()


def add(database: Database, key: str) -> None:
    with database.write() as session:
        session.add(MetaRow(key=key, value=1))


def test_it_changes_with_a_commit_of_this_process_or_another(database, tmp_path):
    seen = [database.version()]
    add(database, "a")
    seen.append(database.version())
    subprocess.run(
        [sys.executable, "-c", _WRITE, str(tmp_path / "registry.db")], check=True, timeout=60
    )
    seen.append(database.version())
    assert None not in seen
    assert len(set(seen)) == 3


def test_it_stays_while_nothing_is_committed(database):
    before = database.version()
    with database.read() as session:
        session.scalars(select(MetaRow)).all()
    with database.write() as session:
        session.add(MetaRow(key="a", value=1))
        session.flush()
        session.rollback()
    assert database.version() == before


def test_it_is_read_beside_a_writer(database):
    before = database.version()
    with database.write() as session:
        session.add(MetaRow(key="a", value=1))
        session.flush()
        assert database.version() == before
    assert database.version() != before
