"""The registry on a real disk: versions, aliases, restarts, races, kills, damage and a full disk."""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy.exc import OperationalError

from adapters import errors
from adapters.checkpoint.folder import (
    CONFIG_FILE,
    FILES,
    TENSORS_FILE,
    digest_of,
    load_serving_form,
)
from adapters.metadata import AdapterMetadata
from server.errors import TooManyAliases
from server.store.database import Database, is_full
from server.store.registry import Registry
from server.store.tables import AdapterRow
from tests.adapters import checkpoints
from tests.adapters.checkpoints import BASE, soft_prompt
from tests.full_disk import run_on_a_small_disk
from tests.server.store.callers import caller

OTHER_BASE = BASE.from_dict({**BASE.to_dict(), "digest": "c" * 64})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def registry(root: Path) -> Iterator[Registry]:
    opened = Registry(root, reserved=("Base-Model",))
    yield opened
    opened.close()


@pytest.fixture
def one(tmp_path: Path) -> Path:
    return soft_prompt(tmp_path / "one", seed=1)


@pytest.fixture
def two(tmp_path: Path) -> Path:
    return soft_prompt(tmp_path / "two", seed=2)


def _blobs(root: Path) -> set[str]:
    return {path.name for path in (root / "blobs").iterdir()}


def _staging(root: Path) -> list[Path]:
    return list((root / "staging").iterdir())


# --- publishing -----------------------------------------------------------------------------


def test_what_is_published_can_be_resolved(registry: Registry, root: Path, one: Path) -> None:
    before = datetime.now(UTC)
    published = registry.publish(
        "mine",
        one,
        BASE,
        AdapterMetadata(
            description="é😀",
            template="Text : {t} Label :",
            labels=("a", "b"),
            target_separator="",
            append_eos=True,
            base_digest=BASE.digest,
            recipe={"learning_rate": 0.1, "é😀": [1, None, (2, 3)]},
            job_id="job-1",
            metrics={"accuracy": 1 / 3},
            tokenization="as_written",
        ),
        base_names=("somebody/base",),
    )
    record = published.record
    assert published.created
    assert record == registry.resolve("mine") == registry.resolve("mine@1")
    assert (record.name, record.version, record.digest) == ("mine", 1, digest_of(one))
    assert (record.peft_type, record.num_virtual_tokens, record.uses_scales) == (
        "P_TUNING",
        3,
        False,
    )
    assert (record.description, record.template) == ("é😀", "Text : {t} Label :")
    assert (record.labels, record.target_separator, record.append_eos) == (("a", "b"), "", True)
    assert record.recipe == {"learning_rate": 0.1, "é😀": [1, None, [2, 3]]}
    assert (record.job_id, record.metrics) == ("job-1", {"accuracy": 1 / 3})
    assert record.tokenization == "as_written"
    assert (record.base_digest, record.base_name) == (BASE.digest, "somebody/base")
    assert (record.status, record.aliases, record.is_default) == ("ok", (), True)
    assert record.warnings == ()
    assert record.num_bytes == sum(path.stat().st_size for path in one.iterdir())
    assert before <= record.created_at <= datetime.now(UTC)
    assert {path.name for path in registry.blob_path(record.digest).iterdir()} == FILES
    assert _staging(root) == []
    load_serving_form(registry.blob_path(record.digest), BASE, digest=record.digest)


def test_defaults_say_nothing(registry: Registry, tmp_path: Path) -> None:
    ia3 = checkpoints.ia3(tmp_path / "ia3", ["k_proj", "v_proj"])
    record = registry.publish("x", ia3, BASE).record
    assert (record.num_virtual_tokens, record.uses_scales) == (0, True)
    assert (record.description, record.template, record.labels) == (None, None, None)
    assert (record.target_separator, record.append_eos, record.base_digest) == (" ", None, None)
    assert (record.recipe, record.job_id, record.metrics) == (None, None, None)
    assert record.tokenization == "boundary"


def test_the_given_folder_stays_unless_it_is_staged(
    registry: Registry, root: Path, one: Path, two: Path
) -> None:
    registry.publish("a", one, BASE)
    assert {path.name for path in one.iterdir()} == FILES
    with registry.staging_dir() as staged:
        for name in FILES:
            shutil.copy(two / name, staged)
        registry.publish("b", staged, BASE)
        assert not staged.exists()
    assert _staging(root) == []


def test_the_same_again_is_the_same_version(registry: Registry, one: Path, two: Path) -> None:
    words = AdapterMetadata(template="{a}", labels=("x",))
    assert registry.publish("a", one, BASE, words).created
    again = registry.publish("a", one, BASE, words)
    assert (again.created, again.record.version) == (False, 1)
    new_bytes = registry.publish("a", two, BASE, words)
    assert (new_bytes.created, new_bytes.record.version) == (True, 2)
    back = registry.publish("a", one, BASE, words)  # what was sent last is what is served
    assert (back.created, back.record.version) == (True, 3)
    assert back.record.digest == again.record.digest


@pytest.mark.parametrize(
    "change",
    [
        {"description": "d"},
        {"template": "{b}"},
        {"labels": ()},
        {"target_separator": ""},
        {"append_eos": False},
        {"base_digest": BASE.digest},
        {"recipe": {"epochs": (8,)}},
        {"job_id": "job-1"},
        {"metrics": {}},
        {"tokenization": "as_written"},
    ],
)
def test_other_words_are_a_new_version_of_one_digest(
    change: dict, registry: Registry, root: Path, one: Path
) -> None:
    first = registry.publish("a", one, BASE).record
    second = registry.publish("a", one, BASE, AdapterMetadata(**change))
    assert (second.created, second.record.version) == (True, 2)
    assert second.record.digest == first.digest
    assert _blobs(root) == {first.digest}
    assert not registry.publish("a", one, BASE, AdapterMetadata(**change)).created


def test_where_a_version_came_from_is_kept_and_makes_it_no_other(
    registry: Registry, one: Path, two: Path
) -> None:
    assert registry.publish("a", one, BASE).record.source == "uploaded"
    trained = registry.publish(
        "a", two, BASE, AdapterMetadata(job_id="job-1", source="trained")
    ).record
    assert (trained.source, trained.source_path) == ("trained", None)
    said = registry.publish(
        "a", one, BASE, AdapterMetadata(source="watched", source_path=str(one)), warnings=["w"]
    )
    assert (said.record.source, said.record.source_path) == ("watched", str(one))
    assert said.record.warnings[0] == "w"
    again = registry.publish("a", one, BASE, AdapterMetadata(source="loaded"))
    assert (again.created, again.record) == (False, said.record)


def test_create_only(registry: Registry, root: Path, one: Path, two: Path) -> None:
    assert registry.publish("a", one, BASE, create_only=True).created
    for directory in (one, two):
        with pytest.raises(errors.AdapterExists):
            registry.publish("a", directory, BASE, create_only=True)
    assert _blobs(root) == {digest_of(one)}
    assert _staging(root) == []


@pytest.mark.parametrize(
    "name",
    ["", ".a", "-a", "A", "a/b", "a b", "a..b", "a@1", "é", "a\n", "a" * 64, "../a", "base-model"],
)
def test_bad_names(name: str, registry: Registry, root: Path, one: Path) -> None:
    with pytest.raises(errors.NameInvalid):
        registry.publish(name, one, BASE)
    assert (registry.count(), _blobs(root)) == (0, set())
    with pytest.raises(errors.AdapterNotFound):
        registry.resolve(name)


@pytest.mark.parametrize("name", ["a", "0", "a.b-c_d", "a" * 63])
def test_good_names(name: str, registry: Registry, one: Path) -> None:
    assert registry.publish(name, one, BASE).record.name == name


def test_a_refused_checkpoint_leaves_nothing(
    registry: Registry, root: Path, tmp_path: Path
) -> None:
    wrong = soft_prompt(tmp_path / "wrong", num_virtual_tokens=7)
    with pytest.raises(errors.CheckpointError):
        registry.publish("a", wrong, BASE)
    (wrong / "README.md").touch()
    with pytest.raises(errors.FileSetInvalid):
        registry.publish("a", wrong, BASE)
    assert (registry.count(), _blobs(root), _staging(root)) == (0, set(), [])


def test_another_bases_name_is_a_warning_its_digest_a_refusal(
    registry: Registry, one: Path
) -> None:
    record = registry.publish("a", one, BASE, base_names=("this/base",)).record
    assert "somebody/base" in record.warnings[0]
    assert "this/base" in record.warnings[0]
    with pytest.raises(errors.BaseMismatch) as caught:
        registry.publish("b", one, BASE, AdapterMetadata(base_digest=OTHER_BASE.digest))
    assert (caught.value.expected, caught.value.came) == (BASE.digest, OTHER_BASE.digest)
    ours = registry.publish("c", one, BASE, AdapterMetadata(base_digest=BASE.digest)).record
    ours.require_base(BASE)
    record.require_base(OTHER_BASE)
    with pytest.raises(errors.BaseMismatch):
        ours.require_base(OTHER_BASE)


def test_text_that_no_file_can_hold_is_refused(registry: Registry, one: Path) -> None:
    words = [
        {"template": "\ud800"},
        {"labels": ["a", "\udfff"]},
        {"recipe": {"\udfff": 1}},
        {"metrics": {"a": ["\udfff"]}},
    ]
    for said in words:
        with pytest.raises(errors.ConfigInvalid, match="surrogate"):
            registry.publish("a", one, BASE, AdapterMetadata(**said))


def test_words_that_are_not_json_are_refused(registry: Registry, one: Path) -> None:
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    for value in (float("nan"), {1, 2}, deep):
        with pytest.raises(errors.ConfigInvalid, match="metrics") as caught:
            registry.publish("a", one, BASE, AdapterMetadata(metrics={"a": value}))
        assert caught.value.field == "metrics"
    with pytest.raises(errors.ConfigInvalid, match=r"boundary, as_written, came 'x'"):
        registry.publish("a", one, BASE, AdapterMetadata(tokenization="x"))
    assert registry.count() == 0


# --- references -----------------------------------------------------------------------------


def test_aliases(registry: Registry, one: Path, two: Path) -> None:
    registry.publish("a", one, BASE)
    registry.publish("a", two, BASE)
    assert registry.set_alias("a", "prod", 1).aliases == ("prod",)
    registry.set_alias("a", "blue", 1)
    assert registry.resolve("a@prod").version == registry.resolve("prod").version == 1
    assert registry.resolve("a@1").aliases == ("blue", "prod")
    assert registry.set_alias("a", "prod", 2).version == 2
    assert registry.resolve("prod").version == 2
    assert registry.resolve("a@1").aliases == ("blue",)


def test_an_alias_is_removed_and_their_number_is_limited(tmp_path: Path, one: Path) -> None:
    registry = Registry(tmp_path / "data", max_aliases=2)
    registry.publish("a", one, BASE)
    for alias in ("prod", "blue", "prod"):  # the third moves the first
        registry.set_alias("a", alias, 1)
    with pytest.raises(TooManyAliases, match="'a' has 2 aliases, and the limit is 2"):
        registry.set_alias("a", "green", 1)
    record = registry.remove_alias("a", "prod")
    assert (record.version, record.aliases) == (1, ("blue",))
    with pytest.raises(errors.AdapterNotFound):
        registry.resolve("prod")
    registry.publish("prod", one, BASE)  # the name is free again
    registry.set_alias("a", "green", 1)
    for name, error in (("a", errors.VersionNotFound), ("z", errors.AdapterNotFound)):
        with pytest.raises(error):
            registry.remove_alias(name, "prod")
    assert registry.resolve("a@1").aliases == ("blue", "green")
    registry.close()


def test_an_alias_that_a_caller_cannot_see_is_no_reason(registry: Registry, one: Path) -> None:
    """Who sees both is asked which is meant: nobody is answered by another adapter in silence."""
    registry.publish("other", one, BASE)
    registry.set_alias("other", "team-x", 1)
    limited = registry.seen_by(caller("team", "team-*"))
    limited.require_free("team-x")
    assert limited.publish("team-x", one, BASE).created
    assert limited.resolve("team-x").name == "team-x"
    with pytest.raises(errors.AdapterNotFound, match="say which: team-x@1, other@team-x"):
        registry.resolve("team-x")
    assert registry.resolve("team-x@1").name == "team-x"
    assert registry.resolve("other@team-x").name == "other"
    # One that it can see is a reason, and is named.
    limited.set_alias("team-x", "team-y", 1)
    with pytest.raises(errors.NameInvalid, match="'team-y' is an alias of the adapter 'team-x'"):
        limited.require_free("team-y")
    # What was admitted for a caller is published by a worker, who sees every alias.
    registry.set_alias("other", "team-z", 1)
    with pytest.raises(errors.NameInvalid):
        registry.publish("team-z", one, BASE)
    assert registry.publish("team-z", one, BASE, admitted=True).created


def test_a_name_is_drawn_from_what_a_caller_may_use(registry: Registry, one: Path) -> None:
    def drawn(*names: str) -> str:
        return registry.seen_by(caller("team", *names)).free_name("ft-")

    assert re.fullmatch("ft-[0-9a-f]{24}", registry.free_name("ft-"))
    assert re.fullmatch("team-ft-[0-9a-f]{24}", drawn("mine", "team-*"))
    assert drawn("ft-*").startswith("ft-")
    long = "x" * 50
    assert re.fullmatch(f"{long}[0-9a-f]{{8}}", drawn(f"{long}*"))
    assert drawn("mine", "yours") == "mine"
    registry.publish("mine", one, BASE)
    assert drawn("mine", "yours") == "yours"
    with pytest.raises(errors.NameInvalid, match="only some names") as caught:
        drawn("mine")
    assert caught.value.expected == "mine"


def test_a_bare_alias_of_two_adapters_is_no_answer(registry: Registry, one: Path) -> None:
    for name in ("a", "b"):
        registry.publish(name, one, BASE)
        registry.set_alias(name, "prod", 1)
    assert registry.resolve("b@prod").name == "b"
    with pytest.raises(errors.AdapterNotFound, match="a@prod, b@prod"):
        registry.resolve("prod")


def test_an_alias_and_an_adapter_never_share_a_name(registry: Registry, one: Path) -> None:
    registry.publish("a", one, BASE)
    registry.publish("b", one, BASE)
    registry.set_alias("a", "prod", 1)
    with pytest.raises(errors.NameInvalid, match="alias"):
        registry.publish("prod", one, BASE)
    for alias in ("b", "a", "12", "Prod", "base-model", "x..y"):
        with pytest.raises(errors.NameInvalid):
            registry.set_alias("a", alias, 1)


def test_the_adapter_that_was_meant_is_named_where_the_caller_sees_it(
    registry: Registry, one: Path
) -> None:
    for name in ("complaints", "team-secret", "team-a", "b", "c", "d"):
        registry.publish(name, one, BASE)
    near = "there is no adapter {!r}; did you mean 'complaints'?"
    for asked in ("complaint", "Complaints", "complaint@2"):
        with pytest.raises(errors.AdapterNotFound, match=re.escape(near.format(asked))) as found:
            registry.resolve(asked)
        assert found.value.expected == "complaints"
    for call in (registry.versions, registry.delete):
        with pytest.raises(errors.AdapterNotFound, match="did you mean 'complaints'"):
            call("complaint")
    with pytest.raises(errors.AdapterNotFound, match="; GET /adapters lists the adapters"):
        registry.resolve("zzz")

    theirs = registry.seen_by(caller("a", "complaints", "mine-*"))
    for asked in ("team-secret", "team-secre"):  # hidden and missing: the same words
        with pytest.raises(errors.AdapterNotFound) as found:
            theirs.resolve(asked)
        assert str(found.value) == f"there is no adapter {asked!r}; there is 'complaints'"
        with pytest.raises(errors.AdapterNotFound) as found:
            theirs.versions(asked)
        assert str(found.value) == f"there is no adapter {asked!r}; there is 'complaints'"
        with pytest.raises(errors.AdapterNotFound) as found:
            theirs.require_free(asked)
        assert str(found.value) == f"there is no adapter {asked!r}"


def test_what_is_not_there_is_said(registry: Registry, one: Path) -> None:
    for reference in ("a", "a@1", "a@x", "", "@", "@1"):
        with pytest.raises(errors.AdapterNotFound):
            registry.resolve(reference)
    registry.publish("a", one, BASE)
    for reference in ("a@2", "a@0", "a@01", "a@-1", "a@x", "a@", "a@1@1", "a@99999999999999999999"):
        with pytest.raises(errors.VersionNotFound):
            registry.resolve(reference)
    for call in (registry.rollback, registry.delete, lambda n, v: registry.set_alias(n, "x", v)):
        with pytest.raises(errors.VersionNotFound):
            call("a", 2)
        with pytest.raises(errors.AdapterNotFound):
            call("b", 1)
    for call in (registry.versions, registry.delete):
        with pytest.raises(errors.AdapterNotFound):
            call("b")
    with pytest.raises(errors.AdapterNotFound):
        registry.verify("0" * 64)


def test_the_newest_is_the_default_unless_rolled_back(
    registry: Registry, one: Path, two: Path
) -> None:
    registry.publish("a", one, BASE)
    registry.publish("a", two, BASE)
    assert registry.resolve("a").version == 2
    assert registry.rollback("a", 1).is_default
    assert registry.resolve("a").version == 1
    assert [record.is_default for record in registry.versions("a")] == [True, False]
    assert not registry.publish("a", two, BASE).created  # nothing new: the rollback holds
    assert registry.resolve("a").version == 1
    registry.publish("a", one, BASE, AdapterMetadata(description="new"))
    assert registry.resolve("a").version == 3


def test_listing(registry: Registry, one: Path, two: Path) -> None:
    assert (registry.list(), registry.count()) == ((), 0)
    for name in ("c", "a", "b"):
        registry.publish(name, one, BASE)
    registry.publish("b", two, BASE)
    listed = registry.list()
    assert [(record.name, record.version) for record in listed] == [("a", 1), ("b", 2), ("c", 1)]
    assert [record.name for record in registry.list(offset=1, limit=1)] == ["b"]
    assert registry.list(offset=3) == ()
    assert registry.count() == 3
    assert [record.version for record in registry.versions("b")] == [1, 2]


# --- deletion -------------------------------------------------------------------------------


def test_deleting_takes_the_row_and_leaves_the_bytes(
    registry: Registry, root: Path, one: Path, two: Path
) -> None:
    for directory in (one, two):
        registry.publish("a", directory, BASE)
    registry.set_alias("a", "old", 1)
    registry.rollback("a", 1)
    gone = registry.delete("a", 1)
    assert gone == (digest_of(one),)
    assert registry.resolve("a").version == 2
    with pytest.raises(errors.AdapterNotFound):
        registry.resolve("old")
    with pytest.raises(errors.VersionNotFound):
        registry.resolve("a@1")
    # A request that resolved it before can still load it.
    load_serving_form(registry.blob_path(gone[0]), BASE, digest=gone[0])
    assert registry.collect_garbage(in_use=gone) == ()
    assert registry.collect_garbage() == gone
    assert _blobs(root) == {digest_of(two)}


def test_a_reader_that_opened_the_file_outlives_its_removal(registry: Registry, one: Path) -> None:
    digest = registry.publish("a", one, BASE).record.digest
    with (registry.blob_path(digest) / TENSORS_FILE).open("rb") as file:
        registry.delete("a")
        registry.collect_garbage()
        assert not registry.blob_path(digest).exists()
        assert file.read() == (one / TENSORS_FILE).read_bytes()


def test_bytes_that_another_version_uses_are_not_reported_as_gone(
    registry: Registry, root: Path, one: Path
) -> None:
    registry.publish("a", one, BASE)
    registry.publish("b", one, BASE)
    assert registry.delete("a") == ()
    assert registry.collect_garbage() == ()
    assert registry.resolve("b").status == "ok"


def test_a_version_number_is_never_used_again(registry: Registry, one: Path, two: Path) -> None:
    registry.publish("a", one, BASE)
    registry.delete("a")
    assert (registry.count(), registry.list()) == (0, ())
    assert registry.publish("a", two, BASE, create_only=True).record.version == 2
    with pytest.raises(errors.VersionNotFound):
        registry.resolve("a@1")


# --- restarts, races, kills -----------------------------------------------------------------


def test_everything_survives_a_restart(root: Path, one: Path, two: Path) -> None:
    first = Registry(root)
    first.publish("a", one, BASE, AdapterMetadata(labels=("x",), template="{t}"))
    first.publish("a", two, BASE)
    first.set_alias("a", "prod", 1)
    first.rollback("a", 1)
    records = first.versions("a")
    first.close()
    second = Registry(root)
    report = second.sweep()
    assert (report.removed, report.corrupt, report.staging_removed) == ((), (), 0)
    assert second.versions("a") == records
    assert second.resolve("a") == second.resolve("prod") == records[0]
    second.close()


def test_twenty_uploads_of_one_name_at_once(registry: Registry, root: Path, tmp_path: Path) -> None:
    same = soft_prompt(tmp_path / "same")
    different = [soft_prompt(tmp_path / f"d{seed}", seed=seed) for seed in range(1, 21)]
    with ThreadPoolExecutor(20) as pool:
        published = list(pool.map(lambda _: registry.publish("same", same, BASE), range(20)))
    assert sum(result.created for result in published) == 1
    assert {result.record.version for result in published} == {1}
    with ThreadPoolExecutor(20) as pool:
        published = list(pool.map(lambda d: registry.publish("many", d, BASE), different))
    assert sorted(result.record.version for result in published) == list(range(1, 21))
    for result, directory in zip(published, different, strict=True):
        assert result.record.digest == digest_of(directory)
    assert len(_blobs(root)) == 21
    assert _staging(root) == []


def test_publishing_deleting_and_collecting_at_once(registry: Registry, one: Path) -> None:
    """Collection must never take the bytes from under a version that is being published."""

    def publish(_: int) -> None:
        registry.publish("a", one, BASE)

    def delete(_: int) -> None:
        try:
            registry.delete("a")
        except errors.AdapterNotFound:
            return

    def collect(_: int) -> None:
        registry.collect_garbage()

    with ThreadPoolExecutor(9) as pool:
        work = [pool.submit(call, i) for i in range(15) for call in (publish, delete, collect)]
        for future in work:
            future.result()
    for record in registry.list():
        assert registry.verify(record.digest)


_PUBLISHER = """
    import sys
    from pathlib import Path
    from server.store.registry import Registry
    from tests.adapters.checkpoints import BASE, soft_prompt
    root, work, first, count = Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:])
    registry = Registry(root)
    print("ready", flush=True)
    for seed in range(first, first + count):
        registry.publish("shared", soft_prompt(work / f"s{seed}", seed=seed), BASE)
    registry.close()
"""


def _publisher(root: Path, work: Path, first: int, count: int) -> subprocess.Popen[str]:
    arguments = [str(root), str(work), str(first), str(count)]
    command = [sys.executable, "-c", textwrap.dedent(_PUBLISHER), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_two_processes_publish_under_one_name(root: Path, tmp_path: Path) -> None:
    workers = [_publisher(root, tmp_path, first, 10) for first in (0, 100)]
    for worker in workers:
        worker.communicate(timeout=120)
        assert worker.returncode == 0
    registry = Registry(root)
    records = registry.versions("shared")
    assert [record.version for record in records] == list(range(1, 21))
    assert registry.sweep().corrupt == ()
    registry.close()


def test_a_kill_at_any_moment_leaves_nothing_half_done(root: Path, tmp_path: Path) -> None:
    for round_, delay in enumerate((0.05, 0.2)):
        worker = _publisher(root, tmp_path, round_ * 10_000, 10_000)
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
        time.sleep(delay)
        worker.send_signal(signal.SIGKILL)
        worker.communicate()
    registry = Registry(root)
    report = registry.sweep()
    assert report.corrupt == ()
    records = registry.versions("shared") if registry.count() else ()
    assert [record.version for record in records] == list(range(1, len(records) + 1))
    assert _blobs(root) == {record.digest for record in records}
    assert _staging(root) == []
    registry.close()


def test_an_orphan_blob_is_swept(registry: Registry, root: Path, one: Path, two: Path) -> None:
    """What a kill between the rename and the row leaves behind."""
    registry.publish("a", one, BASE)
    orphan = registry.blob_path(digest_of(two))
    shutil.copytree(two, orphan)
    assert registry.sweep().removed == (orphan.name,)
    assert _blobs(root) == {digest_of(one)}
    shutil.copytree(two, orphan)
    assert registry.publish("b", two, BASE).created  # an orphan is no obstacle either
    assert registry.sweep().removed == ()


def test_staging_of_the_living_is_left_alone(registry: Registry, root: Path) -> None:
    with registry.staging_dir() as mine:
        abandoned = root / "staging" / "abandoned"
        abandoned.mkdir()
        (abandoned / "half").write_bytes(b"x")
        (root / "staging" / "stray").touch()
        other = Registry(root)
        assert other.sweep().staging_removed == 2
        other.close()
        assert _staging(root) == [mine]
    assert _staging(root) == []


# --- damage ---------------------------------------------------------------------------------


def _cut(directory: Path) -> None:
    os.truncate(directory / TENSORS_FILE, (directory / TENSORS_FILE).stat().st_size - 1)


def _empty(directory: Path) -> None:
    os.truncate(directory / TENSORS_FILE, 0)


def _flip(directory: Path) -> None:
    data = bytearray((directory / TENSORS_FILE).read_bytes())
    data[-3] ^= 64
    (directory / TENSORS_FILE).write_bytes(data)


def _config(directory: Path) -> None:
    (directory / CONFIG_FILE).write_text("{}")


DAMAGE = {
    "cut": _cut,
    "empty": _empty,
    "flip": _flip,
    "config": _config,
    "gone": shutil.rmtree,
    "file_gone": lambda directory: (directory / TENSORS_FILE).unlink(),
    "extra_file": lambda directory: (directory / "extra").touch(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_corrupt_for_that_adapter_only(
    damage: str, root: Path, one: Path, two: Path
) -> None:
    registry = Registry(root)
    registry.publish("good", one, BASE)
    bad = registry.publish("bad", two, BASE).record
    registry.close()
    DAMAGE[damage](registry.blob_path(bad.digest))
    registry = Registry(root)
    assert registry.sweep().corrupt == (bad.digest,)
    assert registry.resolve("good").status == "ok"
    assert {record.name: record.status for record in registry.list()} == {
        "good": "ok",
        "bad": "corrupt",
    }
    with pytest.raises(errors.AdapterCorrupt):
        registry.resolve("bad")
    with pytest.raises(errors.AdapterCorrupt):
        registry.download_zip("bad")
    # The same bytes again put it right, as the same version.
    again = registry.publish("bad", two, BASE)
    assert (again.created, again.record.status, again.record.version) == (False, "ok", 1)
    assert registry.verify(bad.digest)
    assert _staging(root) == []
    registry.close()


def test_a_shallow_sweep_finds_what_was_cut_short(registry: Registry, one: Path, two: Path) -> None:
    cut, flipped = (registry.publish(n, d, BASE).record for n, d in (("a", one), ("b", two)))
    _cut(registry.blob_path(cut.digest))
    _flip(registry.blob_path(flipped.digest))
    assert registry.sweep(deep=False).corrupt == (cut.digest,)
    assert set(registry.sweep().corrupt) == {cut.digest, flipped.digest}


def reads_of_blobs(root: Path, sweep: Callable[[], object]) -> int:
    """How many of a root's checkpoint files a sweep opens."""
    opened: list[str] = []

    def note(event: str, args: tuple[object, ...]) -> None:
        if noting and event == "open" and str(args[0]).startswith(str(root / "blobs")):
            opened.append(str(args[0]))

    noting = True
    sys.addaudithook(note)
    sweep()
    noting = False
    return len(opened)


def test_a_start_reads_only_what_has_changed(root: Path, one: Path, two: Path) -> None:
    first = Registry(root)
    digests = [first.publish(n, d, BASE).record.digest for n, d in (("a", one), ("b", two))]
    first.close()
    second = Registry(root)
    assert reads_of_blobs(root, lambda: second.sweep(deep=False)) == 0
    # What was touched is read, what was cut is corrupt, and what comes back is not.
    weights = second.blob_path(digests[0]) / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.touch()
    assert reads_of_blobs(root, lambda: second.sweep(deep=False)) > 0
    assert reads_of_blobs(root, lambda: second.sweep(deep=False)) == 0
    weights.write_bytes(whole[:-1])
    assert second.sweep(deep=False).corrupt == (digests[0],)
    with pytest.raises(errors.AdapterCorrupt):
        second.resolve("a")
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # of the right form only
    assert second.sweep(deep=False).corrupt == (digests[0],)
    weights.write_bytes(whole)
    assert second.sweep(deep=False).corrupt == ()
    assert second.resolve("a").status == "ok"
    # A file that is none, or says something else, costs a read.
    (root / "checked.txt").write_bytes(b"\xff one two\n" + digests[1].encode() + b" 1,2\n")
    assert reads_of_blobs(root, lambda: second.sweep(deep=False)) > 0
    assert second.sweep(deep=False).corrupt == ()
    second.close()


def test_a_blob_that_is_gone_or_has_more_files_is_corrupt_at_the_start(
    registry: Registry, one: Path, two: Path
) -> None:
    gone, more = (registry.publish(n, d, BASE).record for n, d in (("a", one), ("b", two)))
    shutil.rmtree(registry.blob_path(gone.digest))
    (registry.blob_path(more.digest) / "extra").write_text("x")
    assert set(registry.sweep(deep=False).corrupt) == {gone.digest, more.digest}


def test_a_reader_may_report_damage_and_repair_is_seen(registry: Registry, one: Path) -> None:
    digest = registry.publish("a", one, BASE).record.digest
    registry.mark_corrupt(digest)
    registry.mark_corrupt("0" * 64)
    assert registry.lookup("a").status == "corrupt"
    assert registry.verify(digest)
    assert registry.resolve("a").status == "ok"


def test_digests_are_not_paths(registry: Registry) -> None:
    for digest in ("../../etc", "", "A" * 64, "a" * 63):
        with pytest.raises(ValueError, match="not a digest"):
            registry.blob_path(digest)


def test_what_is_not_a_database_is_refused(root: Path) -> None:
    root.mkdir()
    (root / "registry.db").write_bytes(b"not a database, " * 100)
    with pytest.raises(errors.RegistryError, match="cannot be used"):
        Registry(root)


def test_the_database_is_synced_and_its_keys_hold(root: Path, registry: Registry) -> None:
    database = Database(root / "registry.db")
    with database.read() as session:
        for pragma, value in (("journal_mode", "wal"), ("synchronous", 2), ("foreign_keys", 1)):
            assert session.connection().exec_driver_sql(f"PRAGMA {pragma}").scalar() == value
    with database.write() as session:
        session.add(AdapterRow(name="x", last_version=0))
    database.close()


# --- out ------------------------------------------------------------------------------------


def test_a_download_holds_what_was_uploaded(registry: Registry, one: Path, two: Path) -> None:
    registry.publish("a", one, BASE)
    registry.publish("a", two, BASE)
    for version, directory in ((1, one), (2, two), (None, two)):
        data = b"".join(registry.download_zip("a", version))
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            assert {name: archive.read(name) for name in archive.namelist()} == {
                name: (directory / name).read_bytes() for name in FILES
            }
    with pytest.raises(errors.VersionNotFound):
        registry.download_zip("a", 3)


# --- a full disk ----------------------------------------------------------------------------

# Fills a small disk of its own to within some blocks, publishes, and looks at what is left: the
# failure strikes the copy, the folders or the database, depending on what is left.
_ON_A_FULL_DISK = """
    import sys
    from pathlib import Path
    from adapters.errors import StorageFull
    from server.store.registry import Registry
    from tests.adapters.checkpoints import BASE, soft_prompt
    disk, work = Path(sys.argv[1]), Path(sys.argv[2])
    registry = Registry(disk / "data")
    registry.publish("first", soft_prompt(work / "first", seed=999), BASE)
    outcomes, seed = set(), 0
    for free_kib in range(0, 120, 4):
        filler = disk / "filler"
        with filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass
            file.truncate(max(file.tell() - free_kib * 1024, 0))
        seed += 1
        try:
            registry.publish(f"n{seed}", soft_prompt(work / f"s{seed}", seed=seed), BASE)
            outcomes.add("published")
        except StorageFull:
            outcomes.add("full")
        filler.unlink()
        blobs = {path.name for path in (disk / "data" / "blobs").iterdir()}
        assert blobs == {record.digest for record in registry.list()}, (free_kib, blobs)
        assert not list((disk / "data" / "staging").iterdir()), free_kib
    assert registry.resolve("first").status == "ok"
    assert outcomes == {"published", "full"}, outcomes
    registry.close()
    print("held")
"""


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    run_on_a_small_disk(_ON_A_FULL_DISK, tmp_path, "1m", str(tmp_path))


def test_a_full_database_is_told_apart(root: Path, registry: Registry) -> None:
    database = Database(root / "registry.db")

    def fill() -> None:
        with database.write() as session:
            session.connection().exec_driver_sql("PRAGMA max_page_count = 1")
            session.add_all(AdapterRow(name=f"n{n}", last_version=0) for n in range(2_000))

    with pytest.raises(errors.StorageFull) as caught:
        fill()
    assert isinstance(caught.value.__cause__, OperationalError)
    assert is_full(caught.value.__cause__)
    with database.read() as session:
        assert session.get(AdapterRow, "n0") is None
    database.close()
