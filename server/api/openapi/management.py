"""Replies about adapters, models and the server itself. Documentation only."""

from __future__ import annotations

from typing import Any, Literal

from server.api.openapi.fields import Reply, may_show, shows

_DIGEST = "6e0e5b0c1d22a7f0…"


class Version(Reply):
    """One version of an adapter."""

    name: str = shows("complaints", "The adapter's name.")
    version: int = shows(1, "Counts from 1; a number is never used again.")
    digest: str = shows(_DIGEST, "Of the stored bytes.")
    peft_type: str = shows("PREFIX_TUNING", "PEFT's name of the method.")
    num_virtual_tokens: int = shows(20, "Positions that it takes before the prompt.")
    bytes: int = shows(460880, "Size of the checkpoint.")
    status: Literal["ok", "corrupt"] = shows("ok", "Whether the stored bytes match their digest.")
    residency: str = shows("device", "Where it is now: device, host or disk.")
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
    base_model_name_or_path: str | None = shows("SmolLM2-135M-Instruct", "As its config says.")
    base_digest: str | None = shows("1a45f6bea123…", "The base that it was trained on, if known.")
    created_at: str = shows("2026-11-22T20:15:58+00:00", "When it was published.")
    warnings: list[str] = shows([], "What its publisher should know.")


class Published(Version):
    """A version that was just published, or was there already."""

    ignored_files: list[str] = shows(["README.md"], "Files of the upload that were not needed.")


class Combined(Published):
    """A weighted sum that was just published."""

    recipe: dict[str, Any] | None = shows({"combination_type": "linear"}, "What was added up.")


class AdapterList(Reply):
    """Adapters, each at its default version."""

    adapters: list[Version] = shows([], "In the order of their names.")
    total: int = shows(1, "How many there are in all.")


class VersionWithRecipe(Version):
    """A version, and how it was made."""

    recipe: dict[str, Any] | None = shows({"method": "ia3"}, "Every setting of its training.")


class Counters(Reply):
    """What was asked of an adapter since the server's start."""

    requests: int = shows(12, "Generations and rankings.")


class Adapter(VersionWithRecipe):
    """An adapter: what its bare name means now, and every version."""

    config: dict[str, Any] | None = shows({"peft_type": "IA3"}, "Its adapter_config.json.")
    counters: Counters = shows({}, "What was asked of it.")
    versions: list[VersionWithRecipe] = shows([], "Every one, the oldest first.")


class Deleted(Reply):
    """What was deleted."""

    name: str = shows("complaints", "The adapter.")
    deleted_versions: list[int] = shows([1, 2], "Which of its versions.")


class Model(Reply):
    """The base or an adapter, as OpenAI's model with our fields."""

    id: str = shows("complaints", "What `model` may say.")
    object: Literal["model"] = shows("model", "What this is.")
    created: int = shows(1795376932, "Unix time, seconds.")
    owned_by: str = shows("graftwork", "Always graftwork.")
    root: str = shows("SmolLM2-135M-Instruct", "The base.")
    parent: str | None = shows("SmolLM2-135M-Instruct", "The base; null for the base itself.")
    max_model_len: int = shows(8192, "Tokens that prompt and output may have together.")
    digest: str = shows(_DIGEST, "Of the weights.")
    residency: str = shows("device", "Where it is now.")
    notes: list[str] | None = may_show([], "Of the base: what is to be known of its weights.")
    peft_type: str | None = may_show("PREFIX_TUNING", "Of an adapter: its method.")
    version: int | None = may_show(1, "Of an adapter: what its name means now.")
    status: str | None = may_show("ok", "Of an adapter: ok or corrupt.")


class ModelList(Reply):
    """Everything that `model` may say."""

    object: Literal["list"] = shows("list", "What this is.")
    data: list[Model] = shows([], "The base first.")


class BaseInfo(Reply):
    """The base's dimensions."""

    model_type: str = shows("llama", "transformers' name of the architecture.")
    digest: str = shows("1a45f6bea123…", "Of its weights.")
    notes: list[str] = shows([], "What is to be known of them.")
    num_layers: int = shows(30, "Layers.")
    hidden_size: int = shows(576, "Width.")
    vocab_size: int = shows(49152, "Tokens of the vocabulary.")
    max_positions: int = shows(8192, "Positions.")


class EngineInfo(Reply):
    """How busy the engine is."""

    num_running: int = shows(0, "Sequences that are computed.")
    num_waiting: int = shows(0, "Sequences that wait.")
    kv_blocks_used: int = shows(0, "Blocks of keys and values in use.")
    kv_blocks_total: int = shows(1024, "Blocks there are.")


class Info(Reply):
    """TGI's fields, then ours."""

    model_id: str = shows("SmolLM2-135M-Instruct", "The base's name.")
    model_sha: str = shows("1a45f6bea123…", "Its revision, or its digest.")
    model_dtype: str = shows("bfloat16", "Number format of the weights.")
    model_device_type: str = shows("cpu", "Where it runs.")
    model_pipeline_tag: str = shows("text-generation", "Always text-generation.")
    max_concurrent_requests: int = shows(1088, "Running and waiting ones.")
    max_best_of: int = shows(8, "Samples of one request.")
    max_stop_sequences: int = shows(16, "Stop strings of one request.")
    max_top_n_tokens: int = shows(20, "Likeliest tokens that may be asked for.")
    max_input_tokens: int = shows(8191, "Tokens of a prompt.")
    max_total_tokens: int = shows(8192, "Tokens of prompt and output.")
    max_batch_total_tokens: int = shows(512, "Tokens of one step.")
    router: str = shows("graftwork", "Always graftwork.")
    version: str = shows("0.1.0", "Of the server.")
    base: BaseInfo = shows({}, "The base.")
    engine: EngineInfo = shows({}, "The engine.")


class MethodInfo(Reply):
    """A method of making adapters."""

    name: str = shows("ia3", "What `method` may say.")
    aliases: list[str] = shows([], "What it may say as well.")
    peft_type: str = shows("IA3", "PEFT's name.")
    config: dict[str, Any] = shows({"properties": {}}, "PEFT's fields as a JSON Schema.")
    training: dict[str, Any] = shows({"hyperparameters": {}}, "The recipe: what is left out.")


class Methods(Reply):
    """Every method."""

    methods: list[MethodInfo] = shows([], "One entry each.")


class Drain(Reply):
    """How far a drain is."""

    status: Literal["draining", "drained", "ready"] = shows("drained", "ready: no drain.")
    running: int = shows(0, "Requests that still run.")


class Status(Reply):
    """How the server is."""

    status: Literal["alive", "ready"] = shows("ready", "alive or ready; else the status is 503.")
