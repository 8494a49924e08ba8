"""Databases of older code, of newer code, of nobody's code, and several processes at once."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, inspect

from adapters import errors
from adapters.metadata import AdapterMetadata
from server.store.database import Database
from server.store.migrations import configuration
from server.store.registry import Registry
from server.store.schema import HEAD
from server.store.tables import Base
from tests.adapters.checkpoints import BASE, soft_prompt

# What the code of schema 1 made, word for word.
SCHEMA_1 = """
CREATE TABLE meta (
    "key" VARCHAR NOT NULL,
    value INTEGER NOT NULL,
    PRIMARY KEY ("key")
);
CREATE TABLE adapters (
    name VARCHAR NOT NULL,
    last_version INTEGER NOT NULL,
    pinned_version INTEGER,
    PRIMARY KEY (name)
);
CREATE TABLE blobs (
    digest VARCHAR NOT NULL,
    peft_type VARCHAR NOT NULL,
    num_virtual_tokens INTEGER NOT NULL,
    uses_scales BOOLEAN NOT NULL,
    num_bytes INTEGER NOT NULL,
    status VARCHAR NOT NULL,
    PRIMARY KEY (digest)
);
CREATE TABLE versions (
    name VARCHAR NOT NULL,
    version INTEGER NOT NULL,
    digest VARCHAR NOT NULL,
    description TEXT,
    template TEXT,
    labels JSON,
    target_separator TEXT NOT NULL,
    append_eos BOOLEAN,
    base_digest VARCHAR,
    base_name TEXT,
    warnings JSON NOT NULL,
    created_at DATETIME NOT NULL,
    PRIMARY KEY (name, version),
    FOREIGN KEY(name) REFERENCES adapters (name),
    FOREIGN KEY(digest) REFERENCES blobs (digest)
);
CREATE INDEX ix_versions_digest ON versions (digest);
CREATE TABLE aliases (
    name VARCHAR NOT NULL,
    alias VARCHAR NOT NULL,
    version INTEGER NOT NULL,
    PRIMARY KEY (name, alias),
    FOREIGN KEY(name, version) REFERENCES versions (name, version) ON DELETE CASCADE
);
CREATE INDEX ix_aliases_alias ON aliases (alias);
INSERT INTO meta VALUES ('schema', 1);
INSERT INTO adapters VALUES ('a', 3, 1), ('gone', 7, NULL);
"""
DIGESTS = ("1" * 64, "2" * 64)
ROWS_1 = "".join(
    f"""
    INSERT INTO blobs VALUES ('{digest}', 'IA3', 0, 1, 1234, 'ok');
    INSERT INTO versions VALUES ('a', {version}, '{digest}', 'd', 'Text : {{t}}', '["x", "y"]', ' ',
        1, NULL, 'somebody/base', '[]', '2026-11-20 10:11:12.131415');
    INSERT INTO aliases VALUES ('a', 'alias{version}', {version});
    """
    for version, digest in ((1, DIGESTS[0]), (3, DIGESTS[1]))
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A data directory as the code of schema 1 left it; its name means something to a config file."""
    root = tmp_path / "100%(here)s data"
    root.mkdir()
    execute(root, SCHEMA_1 + ROWS_1)
    return root


def execute(root: Path, script: str) -> None:
    database = sqlite3.connect(root / "registry.db")
    database.executescript("PRAGMA journal_mode = WAL;" + script)
    database.close()


def fetch(root: Path, query: str) -> list:
    database = sqlite3.connect(root / "registry.db")
    rows = database.execute(query).fetchall()
    database.close()
    return rows


def test_a_database_of_schema_1_keeps_everything(root: Path, tmp_path: Path) -> None:
    registry = Registry(root)
    first, third = registry.versions("a")
    assert registry.resolve("a") == registry.resolve("alias1") == first  # it is rolled back
    assert registry.resolve("a@alias3") == third
    assert [record.digest for record in (first, third)] == list(DIGESTS)
    assert (first.template, first.labels, first.append_eos) == ("Text : {t}", ("x", "y"), True)
    assert first.created_at.isoformat() == "2026-11-20T10:11:12.131415+00:00"
    assert (first.recipe, first.job_id, first.metrics) == (None, None, None)
    assert first.tokenization == "boundary"
    published = registry.publish(
        "gone", soft_prompt(tmp_path / "new"), BASE, AdapterMetadata(job_id="job-1")
    )
    assert published.record.version == 8  # numbers are not used again, migrated or not
    records = (first, third)
    registry.close()
    again = Registry(root)
    assert again.versions("a") == records
    again.close()


def test_code_from_before_migrations_refuses_what_it_cannot_read(root: Path) -> None:
    Registry(root).close()
    assert fetch(root, "SELECT value FROM meta WHERE key = 'schema'") == [(2,)]
    assert fetch(root, "SELECT version_num FROM alembic_version") == [(HEAD,)]


def test_versions_from_before_sources_say_whether_they_were_trained(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    for number, job in enumerate((None, "job-1"), 1):
        registry.publish(
            "a", soft_prompt(tmp_path / str(number), seed=number), BASE, AdapterMetadata(job_id=job)
        )
    registry.close()
    columns = (
        "ALTER TABLE versions DROP COLUMN source; ALTER TABLE versions DROP COLUMN source_path;"
        "ALTER TABLE jobs DROP COLUMN owner; ALTER TABLE files DROP COLUMN owner; DROP TABLE keys;"
    ) + "".join(
        f"ALTER TABLE jobs DROP COLUMN {name};"
        for name in ("holder", "num_lost", "num_interrupted", "num_bytes")
    )
    execute(tmp_path, f"{columns} UPDATE alembic_version SET version_num = '0003';")
    again = Registry(tmp_path)
    assert [(one.source, one.source_path) for one in again.versions("a")] == [
        ("uploaded", None),
        ("trained", None),
    ]
    again.close()


def shape(path: Path) -> dict:
    """Everything that SQLite knows about the tables of a file, apart from how it was written."""
    engine = create_engine(f"sqlite:///{path}")
    tables = inspect(engine)
    found = {}
    for table in tables.get_table_names():
        columns = tables.get_columns(table)
        found[table] = (
            [{**column, "type": str(column["type"])} for column in columns],
            sorted(map(str, tables.get_foreign_keys(table))),
            sorted(map(str, tables.get_indexes(table))),
            sorted(map(str, tables.get_unique_constraints(table))),
        )
    engine.dispose()
    return found


def test_made_migrated_and_built_step_by_step_are_the_same(root: Path, tmp_path: Path) -> None:
    made, stepped = tmp_path / "made.db", tmp_path / "stepped.db"
    Database(made).close()
    Database(root / "registry.db").close()
    config = configuration()
    engine = create_engine(f"sqlite:///{stepped}")
    with engine.begin() as connection:
        config.attributes.update(connection=connection, came=None)
        command.upgrade(config, "head")
    engine.dispose()
    assert shape(made) == shape(root / "registry.db") == shape(stepped)
    assert {"jobs", "job_events", "versions"} < shape(made).keys()


def test_the_migrated_tables_are_those_of_the_code(root: Path) -> None:
    Database(root / "registry.db").close()
    engine = create_engine(f"sqlite:///{root / 'registry.db'}")
    with engine.connect() as connection:
        options = {"compare_type": True, "compare_server_default": True}
        context = MigrationContext.configure(connection, opts=options)
        assert compare_metadata(context, Base.metadata) == []
    engine.dispose()


def test_head_is_the_newest_migration() -> None:
    assert ScriptDirectory.from_config(configuration()).get_heads() == [HEAD]


def test_a_database_that_is_up_to_date_opens_without_alembic(root: Path) -> None:
    Database(root / "registry.db").close()
    script = (
        "import sys; from pathlib import Path; from server.store.registry import Registry\n"
        "registry = Registry(Path(sys.argv[1])); print(registry.count(), 'alembic' in sys.modules)"
    )
    command_line = [sys.executable, "-c", script, str(root)]
    result = subprocess.run(command_line, capture_output=True, text=True, check=True)
    assert result.stdout == "1 False\n"


@pytest.mark.parametrize(
    ("change", "came"),
    [
        ("UPDATE meta SET value = 7", "schema 7"),
        ("DELETE FROM meta", "schema None"),
        ("DROP TABLE meta", "schema None"),
        (
            "CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL);"
            "INSERT INTO alembic_version VALUES ('0099')",
            "schema 0099",
        ),
    ],
)
def test_a_database_that_this_code_does_not_know_is_refused(
    change: str, came: str, root: Path
) -> None:
    execute(root, change)
    before = shape(root / "registry.db")
    with pytest.raises(errors.RegistryError, match=f"{came}, .* up to {HEAD}") as caught:
        Registry(root)
    assert (caught.value.expected, caught.value.came) == (HEAD, came.removeprefix("schema "))
    assert shape(root / "registry.db") == before


def test_a_migration_that_fails_changes_nothing(root: Path) -> None:
    # The columns are added before this stands in the way.
    execute(root, "CREATE TABLE job_events (x INTEGER)")
    before = shape(root / "registry.db")
    with pytest.raises(errors.RegistryError, match="job_events already exists"):
        Registry(root)
    assert shape(root / "registry.db") == before
    execute(root, "DROP TABLE job_events")
    registry = Registry(root)
    assert len(registry.versions("a")) == 2
    registry.close()


def test_a_row_without_its_parent_is_found_before_the_commit(root: Path) -> None:
    execute(root, "PRAGMA foreign_keys = OFF; DELETE FROM blobs")
    before = shape(root / "registry.db")
    with pytest.raises(errors.RegistryError, match="versions lacks a parent row"):
        Registry(root)
    assert shape(root / "registry.db") == before


@pytest.mark.parametrize("new", [False, True])
def test_many_open_one_directory_at_once(new: bool, root: Path, tmp_path: Path) -> None:
    if new:
        root = tmp_path / "new"
    script = (
        "import sys; from pathlib import Path; from server.store.registry import Registry\n"
        "print('ready', flush=True); sys.stdin.read()\n"
        "print(Registry(Path(sys.argv[1])).count())"
    )
    openers = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for opener in openers:
        assert opener.stdout is not None
        assert opener.stdout.readline() == "ready\n"
    with ThreadPoolExecutor(len(openers)) as pool:
        said = list(pool.map(lambda opener: opener.communicate(timeout=60)[0], openers))
    assert said == ["0\n" if new else "1\n"] * len(openers)
    assert [opener.returncode for opener in openers] == [0] * len(openers)
    assert fetch(root, "SELECT * FROM alembic_version") == [(HEAD,)]


def test_threads_migrate_several_directories_at_once(tmp_path: Path) -> None:
    roots = [tmp_path / str(number) for number in range(4)]
    for root in roots:
        root.mkdir()
        execute(root, SCHEMA_1 + ROWS_1)
    with ThreadPoolExecutor(len(roots)) as pool:
        for registry in pool.map(Registry, roots):
            assert len(registry.versions("a")) == 2
            registry.close()
