"""Publishes a weighted sum of stored adapters as a new adapter, with its origin recorded.

Metadata (template, labels and so on) comes from the caller, or from the adapters where they agree. Where
they differ it is left out, with a warning. Independent of HTTP and the engine.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from adapters.base_model import BaseModelSpec
from adapters.checkpoint.folder import write_checkpoint
from adapters.combine import CombinationType, Parent, combine, stored
from adapters.errors import AdapterNotFound
from adapters.metadata import AdapterMetadata
from adapters.template import Template, default_separator
from server.store.registry import AdapterRecord, Published, Registry

_INHERITED = ("template", "labels", "tokenization", "target_separator", "append_eos")
_LEFT_OUT = AdapterMetadata()


def combine_stored(
    registry: Registry,
    base: BaseModelSpec,
    references: Sequence[str],
    weights: Sequence[float],
    name: str,
    *,
    combination_type: CombinationType = "linear",
    given: Mapping[str, Any] | None = None,
    base_names: Collection[str] = (),
) -> Published:
    """Combine adapters of a registry and publish the sum under a new name.

    Args:
        registry: source of the adapters and destination of the sum.
        base: the base of all adapters.
        references: NAME, NAME@VERSION or NAME@ALIAS each.
        weights: one per adapter.
        name: an unused name.
        combination_type: see `adapters.combine`.
        given: `SETTABLE_FIELDS` of the metadata; None leaves a field to the adapters.
        base_names: see `Registry.publish`.

    Raises:
        AdapterExists, NameInvalid: for `name`.
        AdapterNotFound, VersionNotFound, AdapterCorrupt: for one of the references.
        BaseMismatch: an adapter was trained here on another base.
        CombineInvalid: see `adapters.combine.combine`.
        TemplateInvalid: the given template does not parse.
        StorageFull: the disk is full; nothing was stored.
    """
    registry.require_free(name, create_only=True)
    parents = [registry.resolve(reference) for reference in references]
    for parent in parents:
        parent.require_base(base)
    metadata, warnings = _inherited(parents, given or {})
    adapters = [_read(registry, parent) for parent in parents]
    warnings += _differing_contexts(adapters)
    try:
        config, tensors = combine(adapters, weights, combination_type)
    except FileNotFoundError as error:
        raise _gone(parents) from error
    metadata = replace(
        metadata,
        base_digest=next((one.base_digest for one in parents if one.base_digest), None),
        recipe=_recipe(parents, weights, combination_type),
        source="combined",
    )
    with registry.staging_dir() as staged:
        write_checkpoint(staged, config, tensors)
        return registry.publish(
            name,
            staged,
            base,
            metadata,
            warnings=warnings,
            create_only=True,
            base_names=base_names,
        )


def _read(registry: Registry, parent: AdapterRecord) -> Parent:
    try:
        return stored(registry.blob_path(parent.digest))
    except FileNotFoundError as error:
        raise _gone([parent]) from error


def _gone(parents: Sequence[AdapterRecord]) -> AdapterNotFound:
    names = ", ".join(sorted({f"{one.name}@{one.version}" for one in parents}))
    return AdapterNotFound(
        f"{names}: deleted while it was being read", field="adapters", came=names
    )


def _recipe(
    parents: Sequence[AdapterRecord], weights: Sequence[float], combination_type: str
) -> dict[str, Any]:
    return {
        "combination_type": combination_type,
        "adapters": [
            {"name": one.name, "version": one.version, "digest": one.digest, "weight": weight}
            for one, weight in zip(parents, weights, strict=True)
        ],
    }


def _inherited(
    parents: Sequence[AdapterRecord], given: Mapping[str, Any]
) -> tuple[AdapterMetadata, list[str]]:
    """Metadata of the sum, and a warning for each field on which the adapters differ."""
    chosen = {name: value for name, value in given.items() if value is not None}
    if "labels" in chosen:
        chosen["labels"] = tuple(chosen["labels"])
    warnings: list[str] = []
    for name in _INHERITED:
        values = [getattr(one, name) for one in parents]
        if name in chosen:
            continue
        if name == "target_separator" and given.get("template") is not None:
            chosen[name] = default_separator(chosen["template"], chosen["tokenization"])
        elif all(value == values[0] for value in values):
            chosen[name] = values[0]
        else:
            chosen[name] = getattr(_LEFT_OUT, name)
            warnings.append(_differ(name, parents, chosen[name]))
    if chosen["template"] is not None:
        Template.parse(chosen["template"])
    return AdapterMetadata(**chosen), warnings


def _differ(name: str, parents: Sequence[AdapterRecord], left_out: Any) -> str:
    names = ", ".join(sorted({f"{one.name}@{one.version}" for one in parents}))
    instead = "it was left out" if left_out is None else f"it is {left_out!r}"
    return f"{name}: {names} do not agree, so {instead}; say what it is to be"


def _differing_contexts(adapters: Sequence[Parent]) -> list[str]:
    """Warn where CPT contexts differ: the sum's config has the context tokens of the first adapter."""
    first = adapters[0][0]
    if first.get("peft_type") != "CPT":
        return []
    fields = ("cpt_token_ids", "cpt_tokens_type_mask")
    if all(config.get(field) == first.get(field) for config, _ in adapters for field in fields):
        return []
    return ["the adapters' contexts differ: cpt_token_ids and the types are those of the first"]
