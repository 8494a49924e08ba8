"""The store of uploaded files on a real disk: kept, listed, limited, swept, a full disk."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from adapters.errors import StorageFull
from server.errors import FilesFull, UploadNotFound
from server.store.files import FileRecord, FileStore
from tests.full_disk import run_on_a_small_disk
from tests.server.jobs.clock import Clock
from tests.server.store.callers import caller


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def store(root: Path) -> Iterator[FileStore]:
    opened = FileStore(root, max_files=3, max_bytes=100, clock=Clock())
    yield opened
    opened.close()


def add(store: FileStore, tmp_path: Path, data: bytes = b"x", name: str = "a.jsonl") -> FileRecord:
    staged = tmp_path / f"staged-{name.replace('/', '_')[:20]}"
    staged.write_bytes(data)
    return store.add(staged, name, "fine-tune")


def on_disk(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "files").iterdir())


def test_a_restart_keeps_what_was_added(store: FileStore, root: Path, tmp_path: Path) -> None:
    record = add(store, tmp_path, b"12345", "../" * 200 + "é.jsonl")
    assert record.num_bytes == 5
    assert len(record.filename) == 255
    assert record.filename.endswith("/é.jsonl")
    again = FileStore(root)
    assert again.get(record.id) == record
    assert again.path(record.id).read_bytes() == b"12345"
    assert again.sweep() == ()
    again.close()
    assert on_disk(root) == [record.id]


def test_the_number_and_the_bytes_of_files_are_limited(
    store: FileStore, root: Path, tmp_path: Path
) -> None:
    add(store, tmp_path, b"x" * 60)
    with pytest.raises(FilesFull, match=r"60 bytes, this one has 41, .* 100;") as caught:
        add(store, tmp_path, b"x" * 41)
    assert (caught.value.expected, caught.value.came) == ("at most 100 bytes in all", "101")
    add(store, tmp_path, b"x" * 40)
    last = add(store, tmp_path, b"")
    with pytest.raises(FilesFull, match="3 files are stored"):
        add(store, tmp_path, b"")
    assert len(on_disk(root)) == 3
    store.delete(last.id)
    assert add(store, tmp_path, b"").id != last.id


def test_each_owner_has_a_share_and_hears_of_no_other(root: Path, tmp_path: Path) -> None:
    store = FileStore(root, max_files=4, max_bytes=100, max_bytes_per_owner=60)
    mine, yours, third = (store.seen_by(caller(name)) for name in ("mine", "yours", "third"))
    add(mine, tmp_path, b"x" * 50)
    with pytest.raises(FilesFull, match="your stored files have 50 bytes, this one has 11"):
        add(mine, tmp_path, b"x" * 11)
    add(mine, tmp_path)
    with pytest.raises(
        FilesFull, match="2 files are stored, and the limit for a caller's"
    ) as caught:
        add(mine, tmp_path)
    assert caught.value.came == "2"
    add(yours, tmp_path)
    add(yours, tmp_path)
    for one, data in ((yours, b""), (third, b""), (third, b"x" * 60)):
        with pytest.raises(FilesFull) as caught:
            add(one, tmp_path, data)
        if one is third:  # its own share is empty
            assert not re.search("[0-9]", str(caught.value))
            assert (caught.value.came, caught.value.expected) == (None, None)
    with pytest.raises(FilesFull, match="4 files are stored"):
        add(store, tmp_path)
    assert len(on_disk(root)) == 4
    store.close()


def test_ids_are_no_paths(store: FileStore, root: Path) -> None:
    for name in (
        "",
        ".",
        "..",
        "../registry.db",
        "file-" + "0" * 24,
        "file-" + "A" * 24,
        "é\ud800",
    ):
        for call in (store.get, store.path, store.delete, store.list):
            with pytest.raises(UploadNotFound):
                call(name)
    assert (root / "registry.db").is_file()


def test_a_sweep_removes_what_has_no_row(store: FileStore, root: Path, tmp_path: Path) -> None:
    kept = add(store, tmp_path)
    orphan = "file-" + "1" * 24
    (root / "files" / orphan).write_bytes(b"half")
    assert store.sweep() == (orphan,)
    assert on_disk(root) == [kept.id]


def test_a_file_without_its_bytes_can_be_deleted(
    store: FileStore, root: Path, tmp_path: Path
) -> None:
    record = add(store, tmp_path)
    (root / "files" / record.id).unlink()
    store.delete(record.id)
    with pytest.raises(UploadNotFound):
        store.get(record.id)


def test_many_at_once_stay_within_the_limit(store: FileStore, root: Path, tmp_path: Path) -> None:
    def one(number: int) -> bool:
        try:
            add(store, tmp_path, b"x" * 10, str(number))
        except FilesFull:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(one, range(12))) == 3
    assert on_disk(root) == sorted(record.id for record in store.list())


def test_a_full_database_is_storage_full_and_keeps_nothing(
    store: FileStore, root: Path, tmp_path: Path
) -> None:
    with store._database.read() as session:
        session.connection().exec_driver_sql("PRAGMA max_page_count = 1")
    staged = tmp_path / "staged"
    staged.write_bytes(b"x")
    with pytest.raises(StorageFull):
        store.add(staged, "a.jsonl", "x" * 1_000_000)
    assert on_disk(root) == sorted(record.id for record in store.list())


_ON_A_FULL_DISK = """
    import sys
    from pathlib import Path
    from adapters.errors import StorageFull
    from server.store.files import FileStore

    root = Path(sys.argv[1])
    store = FileStore(root / "data")
    kept = 0
    try:
        while kept < 1000:
            staged = root / "staged"
            staged.write_bytes(b"x" * 4096)
            store.add(staged, "a.jsonl", "fine-tune")
            kept += 1
    except (StorageFull, OSError):
        assert 0 < kept < 1000
    assert len(store.list(limit=2000)) == len(list((root / "data" / "files").iterdir())) == kept
    print("held")
"""


def test_a_full_disk_keeps_rows_and_files_together(tmp_path: Path) -> None:
    run_on_a_small_disk(_ON_A_FULL_DISK, tmp_path, "2m")
