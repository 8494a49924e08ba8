"""Publishes a weighted sum of stored adapters as a new adapter, with its origin recorded.

Metadata (template, labels and so on) comes from the caller, or from the adapters where they agree. Where
they differ it is left out, with a warning. Independent of HTTP and the engine.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from adapters.base_model import BaseModelSpec
from adapters.checkpoint.folder import write_checkpoint
from adapters.combine import CombinationType, Parent, combine, stored
from adapters.errors import AdapterNotFound
from adapters.template import Template
from server.store.registry import AdapterRecord, Published, Registry

# Metadata field -> its value if it is left out.
_INHERITED: dict[str, Any] = {
    "template": None,
    "labels": None,
    "tokenization": "boundary",
    "target_separator": " ",
    "append_eos": None,
}


def combine_stored(
    registry: Registry,
    base: BaseModelSpec,
    references: Sequence[str],
    weights: Sequence[float],
    name: str,
    *,
    combination_type: CombinationType = "linear",
    words: Mapping[str, Any] | None = None,
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
        words: description, template, labels, tokenization, target_separator and append_eos of the
            sum; None for a field that is left out.
        base_names: see `Registry.publish`.

    Raises:
        AdapterExists, NameInvalid: for `name`.
        AdapterNotFound, VersionNotFound, AdapterCorrupt: for one of the references.
        BaseMismatch: an adapter was trained here on another base.
        CombineInvalid: see `adapters.combine.combine`.
        TemplateInvalid: the template in `words` does not parse.
        StorageFull: the disk is full; nothing was stored.
    """
    registry.require_free(name, create_only=True)
    parents = [registry.resolve(reference) for reference in references]
    for parent in parents:
        parent.require_base(base)
    given = {key: value for key, value in (words or {}).items() if value is not None}
    said, warnings = _words(parents, given)
    adapters = [_read(registry, parent) for parent in parents]
    warnings += _differing_contexts(adapters)
    try:
        config, tensors = combine(adapters, weights, combination_type)
    except FileNotFoundError as error:
        raise _gone(parents) from error
    with registry.staging_dir() as staged:
        write_checkpoint(staged, config, tensors)
        return registry.publish(
            name,
            staged,
            base,
            base_digest=next((one.base_digest for one in parents if one.base_digest), None),
            recipe=_recipe(parents, weights, combination_type),
            source="combined",
            warnings=warnings,
            create_only=True,
            base_names=base_names,
            **said,
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


def _words(
    parents: Sequence[AdapterRecord], given: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Metadata of the sum, and a warning for each field on which the adapters differ."""
    said: dict[str, Any] = {"description": given.get("description")}
    warnings: list[str] = []
    for word, left_out in _INHERITED.items():
        values = [getattr(one, word) for one in parents]
        if word in given:
            said[word] = given[word]
        elif word == "target_separator" and "template" in given:
            said[word] = _separator(given["template"], said["tokenization"])
        elif all(value == values[0] for value in values):
            said[word] = values[0]
        else:
            said[word] = left_out
            warnings.append(_differ(word, parents, left_out))
    if said["template"] is not None:
        Template.parse(said["template"])
    return said, warnings


def _separator(template: str, tokenization: str) -> str:
    """The default separator between prompt and target, as for uploads."""
    return "" if tokenization == "as_written" else Template.parse(template).dropped or " "


def _differ(word: str, parents: Sequence[AdapterRecord], left_out: Any) -> str:
    names = ", ".join(sorted({f"{one.name}@{one.version}" for one in parents}))
    instead = "it was left out" if left_out is None else f"it is {left_out!r}"
    return f"{word}: {names} do not agree, so {instead}; say what it is to be"


def _differing_contexts(adapters: Sequence[Parent]) -> list[str]:
    """Warn where CPT contexts differ: the sum's config has the context tokens of the first adapter."""
    first = adapters[0][0]
    if first.get("peft_type") != "CPT":
        return []
    fields = ("cpt_token_ids", "cpt_tokens_type_mask")
    if all(config.get(field) == first.get(field) for config, _ in adapters for field in fields):
        return []
    return ["the adapters' contexts differ: cpt_token_ids and the types are those of the first"]
