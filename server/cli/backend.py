"""What commands do with adapters, training jobs and generations: one client of the HTTP routes.

A `Backend` works the same over the network and on an application in this process
(`server.cli.in_process`); records are dicts as the routes reply. Refusals are `ServerRefused`, and the
library's errors where they are found on this side. Prints nothing.
"""

from __future__ import annotations

import errno
import json
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeAlias
from urllib.parse import quote

from adapters.errors import AdapterNotFound, VersionNotFound
from server.cli.http_client import RemoteServer, ServerRefused
from server.store.job_files import no_job
from server.store.job_states import FINISHED

if TYPE_CHECKING:
    from adapters.checkpoint.archive import Staged
    from adapters.training.job import JobRequest

Json: TypeAlias = dict[str, Any]

# Requests in flight at a running server, where there are many prompts.
_AT_ONCE = 16
_PAGE = 1000
# Before a stream of events that ended without its job is opened again.
_AGAIN_SECONDS = 0.5
# A server sends the events it has at once, and then looks four times a second: after so long a silence
# there are no more yet.
_QUIET_SECONDS = 1.5


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter on this machine that is to be added.

    Attributes:
        path: a PEFT folder, or a .zip or .tar of one.
        name: the adapter's name.
        metadata: stored with it, in the fields of `AdapterMetadata`.
    """

    path: Path
    name: str
    metadata: Json = field(default_factory=dict)


@dataclass(frozen=True)
class GenerationInput:
    """One input: a text as it is, or a row for the adapter's own template."""

    text: str | None = None
    row: dict[str, str] | None = None

    def body(self) -> Json:
        """The input as TGI's routes take it."""
        return {"inputs": self.text} if self.row is None else {"row": self.row}


@dataclass(frozen=True)
class Answer:
    """One output.

    Attributes:
        text: the output.
        finish_reason: "length", "eos_token" or "stop_sequence".
        num_tokens: tokens of the output, the end of sequence among them.
        seed: of a sampled output.
    """

    text: str
    finish_reason: str
    num_tokens: int
    seed: int | None


class Backend:
    """The routes of one server. Close it, or use it as a context.

    Args:
        server: closed together with this.
        at_once: generations in flight at most.
    """

    def __init__(self, server: RemoteServer, *, at_once: int = _AT_ONCE) -> None:
        self.server = server
        self._at_once = at_once

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self.server.close()

    # --- adapters --------------------------------------------------------------------------------

    def adapters(self) -> list[Json]:
        """The default version of every adapter, by name."""
        found: list[Json] = []
        while True:
            page = self.server.get("/adapters", offset=len(found), limit=_PAGE)
            found += page["adapters"]
            if not page["adapters"] or len(found) >= page["total"]:
                return found

    def adapter(self, reference: str) -> Json:
        """One version, with `recipe`, `counters` and all `versions` of its adapter.

        `config` is None for a version that is not the default one.

        Args:
            reference: NAME, NAME@VERSION or NAME@ALIAS.
        """
        name, which = split_reference(reference)
        shown: Json = self.server.get(_adapter_path(name))
        if which is None:
            return shown
        for one in shown["versions"]:
            if which in (str(one["version"]), *one["aliases"]):
                config = shown["config"] if one["is_default"] else None
                return {**shown, **one, "config": config}
        raise VersionNotFound(f"adapter {name!r} has no version or alias {which!r}")

    def add(self, source: AdapterFiles) -> Json:
        """Upload an adapter; its record, with `created` and `ignored_files`.

        Raises:
            BaseMismatch: it was trained on another base than the server's.
            CheckpointError: its files are not there, or refused.
        """
        self._require_base(source.metadata)
        with staged(source.path) as (directory, found):
            paths = [*sorted(directory.iterdir()), *_token_files(source.path)]
            files = [("files", path.name, path) for path in paths]
            fields = {"name": source.name, **_form(source.metadata)}
            status, shown = self.server.upload("/adapters", fields, files)
        return {**shown, "created": status == 201, "ignored_files": [*found.ignored]}

    def remove(self, name: str, version: int | None) -> Json:
        """Remove a version, or all of them; `name` and `deleted_versions`."""
        gone: Json = self.server.delete(_adapter_path(name), version=version)
        return gone

    def rollback(self, name: str, version: int) -> Json:
        """Make a bare name mean an older version; its record."""
        record: Json = self.server.post(f"{_adapter_path(name)}/rollback", {"version": version})
        return record

    def set_alias(self, name: str, alias: str, version: int) -> Json:
        """Name a version; its record."""
        route = f"{_adapter_path(name)}/aliases/{quote(alias, safe='')}"
        record: Json = self.server.put(route, {"version": version})
        return record

    def remove_alias(self, name: str, alias: str) -> Json:
        """Remove an alias; the record of the version that it named."""
        route = f"{_adapter_path(name)}/aliases/{quote(alias, safe='')}"
        record: Json = self.server.delete(route)
        return record

    def download(self, reference: str, out: Path) -> Json:
        """Write the PEFT folder of a version, or its zip where `out` ends in .zip; the record.

        It appears whole or not at all.

        Raises:
            FileExistsError: `out` is there already, and is no empty folder.
        """
        if out.exists() and (out.suffix == ".zip" or not out.is_dir() or any(out.iterdir())):
            raise FileExistsError(
                errno.EEXIST, "is there already; name a new one, or an empty folder", str(out)
            )
        parent = out.absolute().parent
        parent.mkdir(parents=True, exist_ok=True)
        # Beside `out`: a rename is atomic only within one file system.
        with tempfile.TemporaryDirectory(prefix=".graftwork-", dir=parent) as work:
            archive = Path(work) / "adapter.zip"
            record = self.adapter(reference)
            route = f"{_adapter_path(record['name'])}/download"
            self.server.download(route, archive, version=record["version"])
            if out.suffix == ".zip":
                os.replace(archive, out)
            else:
                folder = Path(work) / "folder"
                folder.mkdir()
                stage(archive, folder)
                os.replace(folder, out)
        return record

    def combine(self, parts: Sequence[tuple[str, float]], name: str, **options: Any) -> Json:
        """Register a weighted sum of adapters; its record with `recipe`.

        Args:
            parts: NAME, NAME@VERSION or NAME@ALIAS, and a weight, each.
            name: of the sum.
            options: other fields of `POST /adapters/combine`.
        """
        references, weights = [part[0] for part in parts], [part[1] for part in parts]
        body = {**options, "adapters": references, "weights": weights, "name": name}
        record: Json = self.server.post("/adapters/combine", body)
        return record

    def move(self, reference: str, direction: str) -> Json:
        """Bring an adapter to the device ("preload") or let it leave ("unload"); its record."""
        name, which = split_reference(reference)
        version = None if which is None else self.adapter(reference)["version"]
        record: Json = self.server.post(f"{_adapter_path(name)}/{direction}", version=version)
        return record

    def base_digest(self) -> str:
        """Digest of the base that is served."""
        return str(self.server.get("/info")["base"]["digest"])

    def _require_base(self, metadata: Json) -> None:
        from adapters.metadata import AdapterMetadata

        if metadata.get("base_digest") is not None:
            AdapterMetadata(**metadata).require_digest(self.base_digest())

    # --- training jobs ---------------------------------------------------------------------------

    def train(
        self,
        request: JobRequest,
        path: Path,
        selected: Iterable[Json] | None,
        *,
        dry_run: bool,
    ) -> Json:
        """Start a training job; the job, or the plan of it where nothing is to be stored.

        Args:
            request: the job.
            path: the file of its rows.
            selected: its rows, where they are not all of the file.
            dry_run: store nothing.
        """
        job = request.model_dump(mode="json", exclude_unset=True)
        with tempfile.TemporaryDirectory(prefix="graftwork-") as work:
            data = path
            if selected is not None:
                data = Path(work) / "rows.jsonl"
                with data.open("w", encoding="utf-8") as file:
                    file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in selected)
            files = [("data", "rows", data)]
            query = "true" if dry_run else None
            _, reply = self.server.upload("/train", {"job": json.dumps(job)}, files, dry_run=query)
        received: Json = reply
        return received

    def jobs(self, offset: int, limit: int) -> list[Json]:
        """Jobs without their longer fields, the newest first; at most 1000."""
        page = self.server.get("/train", offset=offset, limit=min(limit, _PAGE))
        jobs: list[Json] = page["jobs"]
        return jobs

    def job(self, job_id: str) -> Json:
        """A job as it is now."""
        job: Json = self.server.get(_job_path(job_id))
        return job

    def cancel_job(self, job_id: str) -> Json:
        """End a job that waits, ask one that runs to end; the job as it is then."""
        job: Json = self.server.post(f"{_job_path(job_id)}/cancel")
        return job

    def remove_job(self, job_id: str) -> str:
        """Remove a job that has ended, with its rows and log; its id."""
        return str(self.server.delete(_job_path(job_id))["id"])

    def job_log(self, job_id: str, tail: int | None) -> str:
        """Output of the job's worker, or the last lines of it."""
        return self.server.text(f"{_job_path(job_id)}/log", tail=tail)

    def job_events(self, job_id: str, after: int, *, follow: bool) -> Iterator[Json]:
        """Events after an id, with `id`, `kind`, `data` and `at`: until now, or until the job's end."""
        asked_at = datetime.now(UTC)
        route = f"{_job_path(job_id)}/events"
        while True:
            # The state first: what is read after it ended is all there will be.
            ended = self.job(job_id)["state"] in FINISHED
            quiet = None if follow or ended else _QUIET_SECONDS
            for fields, data in self.server.events("GET", route, quiet_seconds=quiet, after=after):
                at = data.pop("at")
                after = int(fields["id"])
                yield {"id": after, "kind": fields["event"], "data": data, "at": at}
                if quiet is not None and datetime.fromisoformat(at) > asked_at:
                    return  # a job may report steps faster than they can be waited for
            if ended or not follow:
                return
            # The stream ends with the job, or with the server, which may come back.
            time.sleep(_AGAIN_SECONDS)

    # --- generation ------------------------------------------------------------------------------

    def answers(
        self, adapter: str | None, prompts: Sequence[GenerationInput], parameters: Mapping[str, Any]
    ) -> Iterator[Answer]:
        """Generate from all prompts together; the outputs in their order.

        Args:
            adapter: NAME, NAME@VERSION or NAME@ALIAS; None is the base.
            prompts: at least one.
            parameters: those of `POST /generate`, such as {"max_new_tokens": 8}.
        """

        def answer(prompt: GenerationInput) -> Answer:
            body = {**prompt.body(), "parameters": {**parameters, "details": True}}
            reply = self.server.post("/generate", body, adapter=adapter)
            text, details = reply["generated_text"], reply["details"]
            num_tokens = details["generated_tokens"]
            return Answer(text, details["finish_reason"], num_tokens, details["seed"])

        with ThreadPoolExecutor(min(self._at_once, len(prompts))) as pool:
            try:
                yield from pool.map(answer, prompts)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def pieces(
        self, adapter: str | None, prompt: GenerationInput, parameters: Mapping[str, Any]
    ) -> Iterator[str]:
        """Generate one text, piece by piece; arguments as `answers`."""
        body = {**prompt.body(), "parameters": {**parameters, "details": True}}
        for _, frame in self.server.events("POST", "/generate_stream", body, adapter=adapter):
            if "error" in frame:
                raise ServerRefused(str(frame["error"]))
            if not frame["token"]["special"]:
                yield frame["token"]["text"]


def split_reference(reference: str) -> tuple[str, str | None]:
    """NAME, and the version or alias after an @; None where there is no @."""
    name, at, which = reference.partition("@")
    return name, which if at else None


@contextmanager
def staged(path: Path) -> Iterator[tuple[Path, Staged]]:
    """A fresh folder with the two files of a PEFT folder or an archive, and what lay beside them.

    Raises:
        CheckpointError: they are not there, or refused.
    """
    with tempfile.TemporaryDirectory(prefix="graftwork-") as work:
        directory = Path(work)
        yield directory, stage(path, directory)


def _token_files(path: Path) -> list[Path]:
    """The small files of a folder by which the server finds tokens that its base does not have."""
    from adapters.checkpoint import added_tokens

    found = [path / name for name in sorted(added_tokens.FILES)] if path.is_dir() else []
    return [one for one in found if one.is_file() and one.stat().st_size <= added_tokens.MAX_BYTES]


def stage(path: Path, directory: Path) -> Staged:
    """Fill an empty folder from a PEFT folder or an archive. Returns what lay beside the two files.

    Raises:
        CheckpointError: as `adapters.checkpoint.archive.stage_upload`, which uploads use too.
    """
    from adapters.checkpoint.archive import stage_upload

    files = sorted(one for one in path.iterdir() if one.is_file()) if path.is_dir() else [path]
    return stage_upload([(file.name, file) for file in files], directory)


def _adapter_path(name: str) -> str:
    if not _is_segment(name):
        raise AdapterNotFound(f"there is no adapter {name!r}", field="adapter", came=name)
    return f"/adapters/{quote(name, safe='')}"


def _job_path(job_id: str) -> str:
    if not _is_segment(job_id):
        raise no_job(job_id)
    return f"/train/{quote(job_id, safe='')}"


def _is_segment(name: str) -> bool:
    """Whether a name can be one part of a route's path; any other would be another route."""
    return bool(name) and "/" not in name and name not in (".", "..")


def _form(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Metadata as an upload's form fields: texts as they are, the others as JSON."""
    from adapters.metadata import SETTABLE_FIELDS

    given = {name: metadata[name] for name in SETTABLE_FIELDS if metadata.get(name) is not None}
    return {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in given.items()
    }
