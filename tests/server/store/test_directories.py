"""Folders of the operator's: which paths count, and what a watched directory does over time."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from adapters.checkpoint.folder import TENSORS_FILE
from server.errors import FolderNotFound
from server.store.directories import AdapterDirectory, Changes, find_folder, publish_folder
from server.store.registry import Registry
from tests.adapters.checkpoints import BASE, ia3, soft_prompt
from tests.full_disk import run_on_a_small_disk


@pytest.fixture(autouse=True)
def every_line_is_logged() -> Iterator[None]:
    """A server that ran in this process before may have set a higher level."""
    before = structlog.get_config()
    structlog.reset_defaults()
    yield
    structlog.configure(**before)


# --- paths -----------------------------------------------------------------------------------


@pytest.fixture
def allowed(tmp_path: Path) -> Path:
    """An allowed directory with the adapter `inner/good`, beside one that is not allowed."""
    (tmp_path / "allowed" / "inner").mkdir(parents=True)
    soft_prompt(tmp_path / "allowed" / "inner" / "good")
    soft_prompt(tmp_path / "secret")
    return tmp_path / "allowed"


def test_a_path_is_absolute_or_relative_to_an_allowed_directory(allowed: Path) -> None:
    good = allowed / "inner" / "good"
    other = allowed.parent / "other"
    other.mkdir()
    for path in (str(good), "inner/good", "inner/../inner/good/", f"{allowed}/./inner//good"):
        assert find_folder(path, [other, allowed]) == good.resolve()
    (allowed / "linked").symlink_to(good)
    assert find_folder("linked", [allowed]) == good.resolve()


def test_what_lies_elsewhere_and_what_does_not_exist_are_told_alike(allowed: Path) -> None:
    secret = allowed.parent / "secret"
    (allowed / "out").symlink_to(secret)
    (allowed / "loop").symlink_to(allowed / "loop")
    (allowed / "file").touch()
    told = set()
    for path in (
        str(secret),
        "../secret",
        "inner/../../secret",
        "out",
        "nowhere",
        str(allowed) + "-evil",
        "loop",
        "file",
        "inner/good/adapter_config.json",
        "a\0b",
        "x" * 5000,
        "~",
    ):
        with pytest.raises(FolderNotFound) as caught:
            find_folder(path, [allowed])
        told.add((caught.value.message, caught.value.came))
    assert len(told) == 1
    with pytest.raises(FolderNotFound):
        find_folder(str(secret), [])


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    registry = Registry(tmp_path / "data", reserved=("the-base",))
    yield registry
    registry.close()


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
@pytest.mark.parametrize(
    "name", ["adapter_config.json", "adapter_model.safetensors", "graftwork.json"]
)
def test_every_file_must_be_plain_and_inside(
    allowed: Path, registry: Registry, kind: str, name: str
) -> None:
    folder, secret = allowed / "inner" / "good", allowed.parent / "secret" / name
    secret.touch()
    (folder / name).unlink(missing_ok=True)
    {
        "link": lambda path: path.symlink_to(secret),
        "pipe": os.mkfifo,
        "folder": Path.mkdir,
    }[kind](folder / name)
    with pytest.raises(FolderNotFound):
        publish_folder(registry, BASE, "x", folder, source="loaded", allowed=[allowed])
    assert registry.count() == 0


def test_links_inside_are_followed_and_other_files_are_nobodys_business(
    allowed: Path, registry: Registry
) -> None:
    folder = allowed / "snapshot"
    folder.mkdir()
    for file in (allowed / "inner" / "good").iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "training_args.bin").write_bytes(b"pickle")
    (folder / "README.md").symlink_to("/nowhere")
    published = publish_folder(registry, BASE, "x", folder, source="loaded", allowed=[allowed])
    assert (published.record.source, published.record.source_path) == ("loaded", str(folder))


# --- the watched directory -------------------------------------------------------------------


class Watched:
    """A watched directory, its registry and what was logged."""

    def __init__(self, directory: Path, registry: Registry) -> None:
        self.directory = directory
        self.registry = registry
        self.watcher = AdapterDirectory(directory, registry)
        self.logs: list = []

    def sync(self, times: int = 1) -> Changes:
        with structlog.testing.capture_logs() as logs:
            for _ in range(times):
                changes = self.watcher.sync(BASE)
        self.logs = [(entry["event"], entry.get("folder")) for entry in logs]
        return changes

    def names(self) -> dict[str, list[int]]:
        return {
            record.name: [one.version for one in self.registry.versions(record.name)]
            for record in self.registry.list()
        }

    def replace(self, name: str, seed: int) -> None:
        shutil.rmtree(self.directory / name)
        soft_prompt(self.directory / name, seed=seed)


@pytest.fixture
def watched(tmp_path: Path, registry: Registry) -> Watched:
    (tmp_path / "watched").mkdir()
    return Watched(tmp_path / "watched", registry)


REFUSED = "adapter_folder_refused"


def test_a_folder_is_taken_when_two_looks_agree(watched: Watched) -> None:
    soft_prompt(watched.directory / "one")
    assert watched.sync().published == []
    (record,) = watched.sync().published
    assert (record.name, record.version, record.source) == ("one", 1, "watched")
    assert record.source_path == str(watched.directory / "one")
    assert watched.sync(3) == Changes()
    assert watched.names() == {"one": [1]}


def test_a_first_look_counts(watched: Watched) -> None:
    soft_prompt(watched.directory / "one")
    watched.watcher.look()
    assert [record.name for record in watched.sync().published] == ["one"]


def test_changed_files_are_a_new_version_once_they_have_settled(watched: Watched) -> None:
    soft_prompt(watched.directory / "one")
    watched.sync(2)
    watched.replace("one", seed=1)
    assert watched.sync().published == []
    watched.replace("one", seed=2)  # still changing
    assert watched.sync().published == []
    (record,) = watched.sync().published
    assert record.version == 2
    os.utime(watched.directory / "one" / "adapter_config.json")  # touched, not changed
    assert watched.sync(3) == Changes()
    assert watched.names() == {"one": [1, 2]}


def test_a_half_copied_folder_is_told_once_and_taken_when_it_is_whole(watched: Watched) -> None:
    whole = soft_prompt(watched.directory.parent / "whole")
    folder = watched.directory / "one"
    folder.mkdir()
    shutil.copy(whole / "adapter_config.json", folder)
    watched.sync(4)
    assert watched.logs == [(REFUSED, "one")]
    data = (whole / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(data[:-7])
    watched.sync(4)
    assert watched.logs == [(REFUSED, "one")]
    assert watched.names() == {}
    (folder / "adapter_model.safetensors").write_bytes(data)
    watched.sync(2)
    assert (watched.names(), watched.logs) == ({"one": [1]}, [])


def test_a_version_that_breaks_leaves_the_last_good_one(watched: Watched) -> None:
    soft_prompt(watched.directory / "one")
    watched.sync(2)
    (watched.directory / "one" / "adapter_config.json").write_text("{")
    watched.sync(4)
    assert watched.logs == [(REFUSED, "one")]
    assert watched.names() == {"one": [1]}


def test_what_is_no_adapter_is_passed_over_and_what_has_no_name_is_told(watched: Watched) -> None:
    (watched.directory / "notes.txt").touch()
    (watched.directory / "empty").mkdir()
    soft_prompt(watched.directory / ".hidden")
    soft_prompt(watched.directory / "!!!")
    soft_prompt(watched.directory / "the-base")
    soft_prompt(watched.directory / "fine", seed=3)
    watched.sync(3)
    assert sorted(watched.logs) == [(REFUSED, "!!!"), (REFUSED, "the-base")]
    assert watched.names() == {"fine": [1]}


def test_a_folder_is_named_as_adapters_add_names_it(watched: Watched) -> None:
    soft_prompt(watched.directory / "My Adapter")
    soft_prompt(watched.directory / "投诉", seed=1)
    watched.sync(2)
    assert watched.names() == {"my-adapter": [1], "tou-su": [1]}
    assert sorted(watched.logs) == [
        ("adapter_folder_named", "My Adapter"),
        ("adapter_folder_named", "投诉"),
    ]
    soft_prompt(watched.directory / "my adapter", seed=2)  # its name is another folder's
    watched.sync(3)
    assert watched.logs == [(REFUSED, "my adapter")]
    watched.replace("My Adapter", seed=3)
    watched.sync(3)
    assert watched.names() == {"my-adapter": [1, 2], "tou-su": [1]}
    shutil.rmtree(watched.directory / "My Adapter")
    watched.sync(3)
    assert watched.names() == {"tou-su": [1]}


def test_an_archive_is_told_once(watched: Watched) -> None:
    (watched.directory / "one.zip").touch()
    watched.sync(3)
    assert watched.logs == [("adapter_archive_skipped", None)]
    watched.sync(2)
    assert watched.logs == []


def test_refused_folders_that_are_gone_are_forgotten(watched: Watched) -> None:
    for number in range(20):
        folder = watched.directory / f"broken-{number}"
        soft_prompt(folder)
        (folder / "adapter_config.json").write_text("{")
        watched.sync(2)
        shutil.rmtree(folder)
        watched.sync(2)
    assert len(watched.logs) == 0
    assert watched.watcher._dealt_with == {}


def test_a_folder_that_is_gone_takes_its_versions_along(watched: Watched) -> None:
    soft_prompt(watched.directory / "one")
    soft_prompt(watched.directory / "two", seed=1)
    watched.sync(2)
    watched.replace("one", seed=5)
    watched.sync(2)
    digests = {record.digest for record in watched.registry.versions("one")}
    shutil.rmtree(watched.directory / "one")
    assert watched.sync() == Changes()  # perhaps it is being replaced
    changes = watched.sync()
    assert (changes.removed, set(changes.unused)) == (["one"], digests)
    assert watched.names() == {"two": [1]}
    soft_prompt(watched.directory / "one")
    watched.sync(2)
    assert watched.names() == {"one": [3], "two": [1]}  # numbers are not used again


def test_a_folder_that_is_replaced_between_looks_is_not_removed(watched: Watched) -> None:
    soft_prompt(watched.directory / "one")
    watched.sync(2)
    (watched.directory / "one").rename(watched.directory / ".old")
    watched.sync()
    (watched.directory / ".old").rename(watched.directory / "one")
    watched.sync(3)
    assert watched.names() == {"one": [1]}


def test_names_of_others_are_left_alone(watched: Watched, tmp_path: Path) -> None:
    theirs = soft_prompt(tmp_path / "theirs", seed=9)
    watched.registry.publish("taken", theirs, BASE)
    soft_prompt(watched.directory / "taken")
    soft_prompt(watched.directory / "mine")
    watched.sync(3)
    assert watched.logs == [(REFUSED, "taken")]
    assert watched.names() == {"mine": [1], "taken": [1]}
    # A version that somebody uploads on top of a watched one stays on top, and stays at the end.
    watched.registry.publish("mine", theirs, BASE)
    again = Watched(watched.directory, watched.registry)  # the server starts anew
    again.sync(3)
    assert again.names() == {"mine": [1, 2], "taken": [1]}
    shutil.rmtree(watched.directory / "mine")
    shutil.rmtree(watched.directory / "taken")
    again.sync(3)
    assert again.names() == {"mine": [2], "taken": [1]}
    assert again.registry.resolve("mine").source == "uploaded"


def test_a_new_start_finds_what_changed_and_what_is_gone(watched: Watched) -> None:
    for seed, name in enumerate(("same", "changed", "gone")):
        soft_prompt(watched.directory / name, seed=seed)
    watched.sync(2)
    watched.replace("changed", seed=7)
    shutil.rmtree(watched.directory / "gone")
    again = Watched(watched.directory, watched.registry)
    again.sync(3)
    assert again.names() == {"same": [1], "changed": [1, 2]}
    # Another directory is another matter.
    (watched.directory.parent / "elsewhere").mkdir()
    Watched(watched.directory.parent / "elsewhere", watched.registry).sync(3)
    assert again.names() == {"same": [1], "changed": [1, 2]}


def test_a_new_start_reads_no_folder_that_it_took_before(watched: Watched, tmp_path: Path) -> None:
    record = tmp_path / "watched.json"

    def start() -> set[str]:
        """The folders whose weights the first two scans of a start open."""
        opened: set[str] = set()

        def note(event: str, args: tuple[object, ...]) -> None:
            path = Path(str(args[0])) if noting and event == "open" else Path()
            if path.parent.parent == watched.directory and path.name == TENSORS_FILE:
                opened.add(path.parent.name)

        watcher = AdapterDirectory(watched.directory, watched.registry, record=record)
        noting = True
        sys.addaudithook(note)
        for _ in range(2):
            watcher.sync(BASE)
        noting = False
        return opened

    for seed, name in enumerate(("same", "changed", "removed", "damaged")):
        soft_prompt(watched.directory / name, seed=seed)
    assert start() == {"same", "changed", "removed", "damaged"}
    assert start() == set()
    watched.replace("changed", seed=7)
    watched.registry.delete("removed")
    watched.registry.mark_corrupt(watched.registry.lookup("damaged").digest)
    assert start() == {"changed", "removed", "damaged"}
    assert watched.registry.resolve("damaged").status == "ok"
    assert watched.names() == {"same": [1], "changed": [1, 2], "removed": [2], "damaged": [1]}
    for lost in (b"", b"[]", b"{", None):
        record.unlink() if lost is None else record.write_bytes(lost)
        assert start() == {"same", "changed", "removed", "damaged"}


def test_a_directory_that_cannot_be_read_removes_nothing(watched: Watched) -> None:
    soft_prompt(watched.directory / "one")
    watched.sync(2)
    watched.directory.rename(watched.directory.parent / "unmounted")
    watched.sync(5)
    assert watched.logs == [("adapter_dir_unreadable", None)]
    assert watched.names() == {"one": [1]}
    (watched.directory.parent / "unmounted").rename(watched.directory)
    watched.sync(5)
    assert (watched.names(), watched.logs) == ({"one": [1]}, [])


def test_links_may_lead_into_directories_that_are_allowed(watched: Watched, tmp_path) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    soft_prompt(runs / "a")
    soft_prompt(tmp_path / "b", seed=1)
    (watched.directory / "linked").symlink_to(runs / "a")
    (watched.directory / "outside").symlink_to(tmp_path / "b")
    watched.watcher = AdapterDirectory(watched.directory, watched.registry, also_allowed=[runs])
    watched.sync(3)
    assert watched.logs == [(REFUSED, "outside")]
    assert watched.names() == {"linked": [1]}


def test_another_method_under_the_same_name_is_a_new_version(watched: Watched) -> None:
    soft_prompt(watched.directory / "one")
    watched.sync(2)
    shutil.rmtree(watched.directory / "one")
    ia3(watched.directory / "one", ["k_proj", "v_proj"])
    watched.sync(2)
    assert [one.peft_type for one in watched.registry.versions("one")] == ["P_TUNING", "IA3"]


def test_a_full_disk_is_tried_again(tmp_path: Path) -> None:
    source = tmp_path / "watched"
    source.mkdir()
    soft_prompt(source / "one")
    script = """
    import sys
    from pathlib import Path
    from adapters.errors import StorageFull
    from server.store.registry import Registry
    from server.store.directories import AdapterDirectory
    from tests.adapters.checkpoints import BASE
    disk, source = map(Path, sys.argv[1:])
    registry = Registry(disk / "data")
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
    watcher = AdapterDirectory(source, registry)
    watcher.look()
    try:
        watcher.sync(BASE)
    except StorageFull:
        filler.unlink()
        again = watcher.sync(BASE)
        print("held" if [one.name for one in again.published] == ["one"] else again)
    """
    run_on_a_small_disk(script, tmp_path, "2m", str(source))
