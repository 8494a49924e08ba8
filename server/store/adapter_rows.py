"""Versions of adapters as rows of the database: lookup of references, insertion, records.

Functions of an open session, whose transaction is the caller's. Independent of files; names that a caller
may see come as `visible`, and None is all.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, NoReturn

from sqlalchemy import ColumnElement, Select, func, or_, select, true
from sqlalchemy.orm import Session

from adapters.checkpoint.folder import CheckedCheckpoint, shorten
from adapters.errors import AdapterExists, AdapterNotFound, NameInvalid, VersionNotFound
from adapters.field_errors import quoted
from adapters.metadata import METADATA_FIELDS, AdapterMetadata
from server.errors import TooManyAliases
from server.store.adapter_names import (
    MOST_COMPARED,
    did_you_mean,
    is_name,
    near_names,
    slug_of,
    what_there_is,
)
from server.store.tables import AdapterRow, AliasRow, BlobRow, VersionRow

_VERSION = re.compile(r"[1-9][0-9]{0,8}")

Status = Literal["ok", "corrupt"]


@dataclass(frozen=True, kw_only=True)
class AdapterRecord(AdapterMetadata):
    """One version of one adapter: its metadata, and what the registry knows of it.

    Attributes:
        name: the adapter.
        version: from 1.
        digest: content digest (hex), the name of its blob and the key of every cache.
        peft_type: PEFT's name of the method, such as "IA3".
        num_virtual_tokens: positions taken before the prompt.
        uses_scales: True for IA3.
        num_bytes: both files together.
        warnings: sentences for the uploader.
        base_name: `base_model_name_or_path` of its config.
        created_at: aware UTC time.
        status: "corrupt" if the stored bytes no longer match the digest.
        aliases: aliases of this version, sorted.
        is_default: whether a bare NAME resolves to this version.
    """

    name: str
    version: int
    digest: str
    peft_type: str
    num_virtual_tokens: int
    uses_scales: bool
    num_bytes: int
    warnings: tuple[str, ...]
    base_name: str | None
    created_at: datetime
    status: Status
    aliases: tuple[str, ...]
    is_default: bool


# --- lookup -----------------------------------------------------------------------------------


def no_adapter(
    name: str, session: Session | None = None, visible: Collection[str] | None = ()
) -> NoReturn:
    """Raise AdapterNotFound, which depends on the text and on the adapters that are visible alone.

    Args:
        name: what was asked for.
        session: for names that resemble it; None suggests none.
        visible: see above.
    """
    asked = name.partition("@")[0]
    slug = slug_of(asked)
    known = _likely_names(session, asked, visible) if session is not None and slug else []
    near = near_names(asked, known)
    if not near and slug and not is_name(asked):
        hint = f"; as a name it would be {slug!r}"
    else:
        hint = did_you_mean(near) or what_there_is(
            sorted(known), "GET /adapters lists the adapters"
        )
    raise AdapterNotFound(
        f"there is no adapter {quoted(shorten(name))}{hint}",
        field="adapter",
        expected=near[0] if near else None,
        came=shorten(name),
    )


def _likely_names(session: Session, asked: str, visible: Collection[str] | None) -> Sequence[str]:
    """Some visible names, those with the same beginning first."""
    alike = VersionRow.name.startswith(asked[:1].lower(), autoescape=True)
    statement = select(VersionRow.name).where(among(visible)).distinct()
    return session.scalars(
        statement.order_by(alike.desc(), VersionRow.name).limit(MOST_COMPARED)
    ).all()


def _no_version(name: str, version: str) -> NoReturn:
    raise VersionNotFound(
        f"adapter {name!r} has no version or alias {shorten(version)!r}",
        field="adapter",
        came=shorten(f"{name}@{version}"),
    )


def newest(session: Session, name: str) -> int | None:
    """The newest version of a name; None if it has none."""
    return session.scalar(select(func.max(VersionRow.version)).where(VersionRow.name == name))


def require_version(
    session: Session, name: str, version: int, visible: Collection[str] | None
) -> None:
    """Raise AdapterNotFound or VersionNotFound unless the version exists."""
    if session.get(VersionRow, (name, version)) is None:
        if newest(session, name) is None:
            no_adapter(name, session, visible)
        _no_version(name, str(version))


def default_versions() -> Select[str, int]:
    """(name, version) that each bare name resolves to: the pinned version, else the newest."""
    version = func.coalesce(AdapterRow.pinned_version, func.max(VersionRow.version))
    return (
        select(AdapterRow.name, version.label("version"))
        .join(VersionRow, VersionRow.name == AdapterRow.name)
        .group_by(AdapterRow.name)
    )


def is_among(name: str, visible: Collection[str] | None) -> bool:
    """Whether a name matches one of these names or `*` prefixes; None matches all."""
    return visible is None or any(
        name.startswith(one[:-1]) if one.endswith("*") else name == one for one in visible
    )


def among(visible: Collection[str] | None) -> ColumnElement[bool]:
    """`is_among` as a filter on rows of versions."""
    if visible is None:
        return true()
    beginnings = [one[:-1] for one in visible if one.endswith("*")]
    return or_(
        VersionRow.name.in_([one for one in visible if not one.endswith("*")]),
        *(VersionRow.name.startswith(one, autoescape=True) for one in beginnings),
    )


def locate(session: Session, reference: str, visible: Collection[str] | None) -> tuple[str, int]:
    """(name, version) of NAME, NAME@VERSION, NAME@ALIAS or a bare alias."""
    name, at, which = reference.partition("@")
    default = None
    if is_among(name, visible):
        default = session.execute(default_versions().where(AdapterRow.name == name)).first()
    if default is None:
        return (
            no_adapter(reference, session, visible)
            if at
            else _locate_bare_alias(session, name, visible)
        )
    if not at:
        if others := alias_of(session, name, visible):
            _ambiguous(name, [f"{name}@{default.version}", *(f"{one}@{name}" for one in others)])
        return name, default.version
    found: VersionRow | AliasRow | None
    if _VERSION.fullmatch(which):
        found = session.get(VersionRow, (name, int(which)))
    else:
        found = session.get(AliasRow, (name, which))
    return (name, found.version) if found is not None else _no_version(name, which)


def _locate_bare_alias(
    session: Session, alias: str, visible: Collection[str] | None
) -> tuple[str, int]:
    found = alias_of(session, alias, visible)
    if not found:
        no_adapter(alias, session, visible)
    if len(found) > 1:
        _ambiguous(alias, [f"{name}@{alias}" for name in found])
    return found[0], session.get_one(AliasRow, (found[0], alias)).version


def _ambiguous(name: str, meanings: Sequence[str]) -> NoReturn:
    full = ", ".join(meanings[:5])
    raise AdapterNotFound(
        f"{name!r} means {len(meanings)} adapters, by its name or as an alias; say which: {full}",
        field="adapter",
        expected=full,
        came=name,
    )


def alias_of(session: Session, alias: str, visible: Collection[str] | None) -> Sequence[str]:
    """The visible adapters that have this alias, sorted."""
    names = session.scalars(select(AliasRow.name).where(AliasRow.alias == alias))
    return sorted(name for name in names if is_among(name, visible))


def check_free(
    session: Session, name: str, visible: Collection[str] | None, *, create_only: bool
) -> None:
    """Raise AdapterExists or NameInvalid if a new version of the name cannot be published.

    An alias of an adapter that is not visible is no reason.
    """
    if newest(session, name) is not None:
        if create_only:
            raise AdapterExists(f"there is an adapter {name!r} already", field="name", came=name)
    elif others := alias_of(session, name, visible):
        raise NameInvalid(
            f"{name!r} is an alias of the adapter {others[0]!r}; choose another name, or remove the alias",
            field="name",
            expected="a name that is no alias",
            came=name,
        )


def check_alias_fits(session: Session, name: str, alias: str, max_aliases: int) -> None:
    """Raise TooManyAliases if an adapter cannot have one more; moving one of its own adds none."""
    if session.get(AliasRow, (name, alias)) is not None:
        return
    mine = select(func.count()).select_from(AliasRow).where(AliasRow.name == name)
    count = session.scalar(mine) or 0
    if count >= max_aliases:
        raise TooManyAliases(
            f"{name!r} has {count} aliases, and the limit is {max_aliases}; remove or move one of them",
            field="alias",
            expected=f"fewer than {max_aliases} aliases",
            came=str(count),
        )


def remove_alias(session: Session, name: str, alias: str, visible: Collection[str] | None) -> int:
    """Remove an alias; the version that it named.

    Raises:
        AdapterNotFound, VersionNotFound: no such adapter, or it has no such alias.
    """
    row = session.get(AliasRow, (name, alias))
    if row is None:
        if newest(session, name) is None:
            no_adapter(name, session, visible)
        _no_version(name, alias)
    version = row.version
    session.delete(row)
    session.flush()
    return version


def insert(
    session: Session,
    name: str,
    checked: CheckedCheckpoint,
    metadata: AdapterMetadata,
    warnings: Sequence[str],
) -> tuple[int, bool]:
    """The version number of these bytes and metadata under a name, and whether it is new."""
    session.merge(
        BlobRow(
            digest=checked.digest,
            peft_type=checked.peft_type,
            num_virtual_tokens=checked.facts.num_virtual_tokens,
            uses_scales=checked.facts.uses_scales,
            num_bytes=checked.num_bytes,
            status="ok",
        )
    )
    adapter = session.get(AdapterRow, name)
    if adapter is None:
        adapter = AdapterRow(name=name, last_version=0)
        session.add(adapter)
    last = session.get(VersionRow, (name, newest(session, name) or 0))
    if (
        last is not None
        and last.digest == checked.digest
        and not _metadata(last).differs_from(metadata)
    ):
        return last.version, False
    adapter.last_version += 1
    adapter.pinned_version = None
    session.flush()  # parents first: the tables have foreign keys, the classes no relationships
    session.add(
        VersionRow(
            name=name,
            version=adapter.last_version,
            digest=checked.digest,
            base_name=checked.base_name,
            created_at=datetime.now(UTC),
            warnings=[*warnings],
            **metadata.columns(),
        )
    )
    return adapter.last_version, True


def _metadata(row: VersionRow) -> AdapterMetadata:
    return AdapterMetadata.from_columns({name: getattr(row, name) for name in METADATA_FIELDS})


def used(session: Session, digests: Collection[str]) -> set[str]:
    """The subset of digests that a version uses."""
    return set(session.scalars(select(VersionRow.digest).distinct())).intersection(digests)


def versions() -> Select[VersionRow, BlobRow]:
    """A query for versions and their blobs, to be narrowed."""
    return select(VersionRow, BlobRow).join(BlobRow, BlobRow.digest == VersionRow.digest)


def records(session: Session, statement: Select[VersionRow, BlobRow]) -> tuple[AdapterRecord, ...]:
    """The results of a query of `versions`, with aliases and defaults."""
    rows = session.execute(statement).all()
    names = {row.name for row, _ in rows}
    statement_defaults = default_versions().where(AdapterRow.name.in_(names))
    defaults = {row.name: row.version for row in session.execute(statement_defaults)}
    aliases: dict[tuple[str, int], list[str]] = {}
    for alias in session.scalars(select(AliasRow).where(AliasRow.name.in_(names))):
        aliases.setdefault((alias.name, alias.version), []).append(alias.alias)
    return tuple(
        _record(
            row,
            blob,
            aliases=tuple(sorted(aliases.get((row.name, row.version), ()))),
            is_default=defaults[row.name] == row.version,
        )
        for row, blob in rows
    )


def one(session: Session, name: str, version: int) -> AdapterRecord:
    """A version that is known to exist, including the session's pending changes."""
    statement = versions().where(VersionRow.name == name, VersionRow.version == version)
    return records(session, statement)[0]


def _record(
    row: VersionRow, blob: BlobRow, *, aliases: tuple[str, ...], is_default: bool
) -> AdapterRecord:
    return AdapterRecord(
        **vars(_metadata(row)),
        name=row.name,
        version=row.version,
        digest=row.digest,
        peft_type=blob.peft_type,
        num_virtual_tokens=blob.num_virtual_tokens,
        uses_scales=blob.uses_scales,
        num_bytes=blob.num_bytes,
        warnings=tuple(row.warnings),
        base_name=row.base_name,
        created_at=row.created_at,
        status="ok" if blob.status == "ok" else "corrupt",
        aliases=aliases,
        is_default=is_default,
    )
