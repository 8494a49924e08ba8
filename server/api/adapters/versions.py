"""Replies about adapters and their versions.

Most fields are those of the registry's record, which a reply reads by their names. Knows no route.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field

from server.api.reply_fields import Moment, ReplyModel, shows
from server.store.registry import AdapterRecord

Residency = Literal["disk", "host", "device"]
_DIGEST = "6e0e5b0c1d22a7f0…"


class AdapterVersion(ReplyModel):
    """One version of an adapter."""

    name: str = shows("complaints", "The adapter's name.")
    version: int = shows(1, "Counts from 1; a number is never used again.")
    digest: str = shows(_DIGEST, "Of the stored bytes.")
    peft_type: str = shows("PREFIX_TUNING", "PEFT's name of the method.")
    num_virtual_tokens: int = shows(20, "Positions that it takes before the prompt.")
    num_bytes: int = Field(
        serialization_alias="bytes", description="Size of the checkpoint.", examples=[460880]
    )
    status: Literal["ok", "corrupt"] = shows("ok", "Whether the stored bytes match their digest.")
    residency: Residency = Field(
        "disk", description="Where it is now: device, host or disk.", examples=["device"]
    )
    is_default: bool = shows(True, "Whether the bare name means this version.")
    aliases: list[str] = shows(["stable"], "Other names of this version.")
    description: str | None = shows(None, "Free text.")
    template: str | None = shows("Tweet text : {text} Label :", "Makes prompts of rows.")
    labels: list[str] | None = shows(["complaint", "no complaint"], "What it may answer.")
    target_separator: str = shows(" ", "Stands between prompt and target.")
    append_eos: bool | None = shows(True, "Whether targets ended with the end of sequence.")
    tokenization: Literal["boundary", "as_written"] = shows(
        "boundary", "Whether white space at the template's end belongs to the target."
    )
    source: str = shows("trained", "How it came: uploaded, trained, combined, loaded or watched.")
    job_id: str | None = shows("job-a1ab28fe4d34fda420b6c479", "The job that trained it here.")
    metrics: dict[str, Any] | None = shows({"loss": 0.17, "steps": 30}, "What training measured.")
    base_name: str | None = Field(
        serialization_alias="base_model_name_or_path",
        description="As its config says.",
        examples=["SmolLM2-135M-Instruct"],
    )
    base_digest: str | None = shows("1a45f6bea123…", "The base that it was trained on, if known.")
    created_at: Moment = shows("2026-11-22T20:15:58+00:00", "When it was published.")
    warnings: list[str] = shows([], "What its publisher should know.")

    @classmethod
    def of(cls, record: AdapterRecord, residency: Residency = "disk") -> Self:
        """A record of the registry, and where its weights are now."""
        return cls.model_validate(record).model_copy(update={"residency": residency})


class UploadedVersion(AdapterVersion):
    """A version that was just published, or was there already."""

    ignored_files: list[str] = shows(["README.md"], "Files of the upload that were not needed.")


class VersionWithRecipe(AdapterVersion):
    """A version, and how it was made."""

    recipe: dict[str, Any] | None = shows({"method": "ia3"}, "Every setting of its training.")


class CombinedVersion(VersionWithRecipe):
    """A weighted sum that was just published."""

    recipe: dict[str, Any] | None = shows({"combination_type": "linear"}, "What was added up.")
    ignored_files: list[str] = shows([], "Always empty.")


class AdapterCounters(ReplyModel):
    """Requests for an adapter, all versions together, since the server's start."""

    requests: int = shows(12, "Requests of any route; one of many prompts or labels counts once.")
    labels_ranked: int = shows(8, "Labels that /classify has ranked, for each input.")
    last_used_at: Moment | None = shows(
        "2026-11-22T20:15:58+00:00", "When the last request began; null if there was none."
    )


class ListedAdapter(AdapterVersion):
    """An adapter in the list: the version that its bare name means."""

    counters: AdapterCounters = shows({}, "Since the server's start.")


class AdapterList(ReplyModel):
    """Adapters, each at its default version."""

    adapters: list[ListedAdapter] = shows([], "In the order of their names.")
    total: int = shows(1, "How many there are in all.")


class AdapterDetails(VersionWithRecipe):
    """An adapter: the version that its bare name means, and all versions."""

    config: dict[str, Any] | None = shows({"peft_type": "IA3"}, "Its adapter_config.json.")
    counters: AdapterCounters = shows({}, "Since the server's start.")
    versions: list[VersionWithRecipe] = shows([], "Every one, the oldest first.")


class AdapterDeleted(ReplyModel):
    """What was deleted."""

    name: str = shows("complaints", "The adapter.")
    deleted_versions: list[int] = shows([1, 2], "Which of its versions.")
