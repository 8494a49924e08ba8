"""The table of routes: what each answers with and refuses, and what a request looks like.

One entry a route; a test fails where one is missing, too many, or untrue. Descriptions of what a route
takes stand with the route.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from adapters import errors as library
from server import errors as ours
from server.api.error_replies import FAILED
from server.api.openapi import generation, management, training, tuning
from server.api.openapi.refusals import Kind
from server.engine import client as engine

JSON = "application/json"
EVENTS = "text/event-stream"
_BASE = "SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Answer:
    """One successful response.

    Attributes:
        description: when it comes.
        model: what its JSON holds; None where it is no JSON.
        media: its type where it is no JSON; None for no body at all.
        frame: where it may be a stream of events instead, what the data of one holds.
        example: of what is no JSON, or of the events.
    """

    description: str
    model: type[BaseModel] | None = None
    media: str | None = None
    frame: type[BaseModel] | None = None
    example: str | None = None


@dataclass(frozen=True)
class Doc:
    """What is to be said about one route.

    Attributes:
        answers: by status.
        refused: kinds of errors; what nobody foresaw is added.
        example: a body that it takes, where its schema shows none.
        timed: whether the timing headers are on the reply.
    """

    answers: Mapping[int, Answer]
    refused: tuple[Kind, ...] = ()
    example: dict[str, Any] | None = None
    timed: bool = False
    parameters: Mapping[str, str] = field(default_factory=dict)


def _ok(model: type[BaseModel], description: str = "Done.", status: int = 200) -> dict[int, Answer]:
    return {status: Answer(description, model)}


# --- kinds of errors that come together --------------------------------------------------------

_QUERY: tuple[Kind, ...] = (ours.UnknownParameter, ours.Contradiction)
_NUMBERS: tuple[Kind, ...] = (*_QUERY, ours.RequestInvalid)
_BODY: tuple[Kind, ...] = (
    ours.RequestInvalid,
    ours.RequestTimeout,
    ours.BodyTooLarge,
    ours.WrongContentType,
)
_NAMED: tuple[Kind, ...] = (
    library.AdapterNotFound,
    library.VersionNotFound,
    library.StorageUnavailable,
)
_STORED: tuple[Kind, ...] = (library.StorageFull, library.StorageUnavailable)
_SERVED: tuple[Kind, ...] = (*_QUERY, *_NAMED, library.AdapterCorrupt, ours.NotReady)
_GENERATED: tuple[Kind, ...] = (
    *_SERVED,
    *_BODY,
    library.BaseMismatch,
    library.TemplateInvalid,
    ours.TooLong,
    ours.QuotaExceeded,
    engine.EngineOverloaded,
    engine.AdapterOverloaded,
    engine.EngineUnavailable,
    *FAILED,
)
_CHECKPOINT: tuple[Kind, ...] = (
    library.ConfigInvalid,
    library.MethodUnsupported,
    library.TensorMismatch,
    library.TargetNotFound,
    library.NonFinite,
    library.HeaderInvalid,
    library.FileSetInvalid,
    library.CheckpointTooLarge,
    library.BaseMismatch,
    library.NameInvalid,
    library.AdapterExists,
    *_STORED,
)
_PLANNED: tuple[Kind, ...] = (
    library.JobInvalid,
    library.DataInvalid,
    library.TemplateInvalid,
    library.ConfigInvalid,
    library.NameInvalid,
    library.AdapterExists,
    ours.TooManyJobs,
    ours.NotReady,
    *_STORED,
)
_JOB: tuple[Kind, ...] = (*_QUERY, ours.JobNotFound)
_FILE: tuple[Kind, ...] = (*_QUERY, ours.UploadNotFound)

# --- examples of streams -----------------------------------------------------------------------

_TGI_EVENTS = (
    'data: {"index": 1, "token": {"id": 253, "text": " complaint", "logprob": -0.25, '
    '"special": false}, "generated_text": " complaint", "details": null}\n\n'
)
_COMPLETION_EVENTS = (
    'data: {"id": "cmpl-4f1a", "object": "text_completion", "created": 1795376932, "model": '
    '"complaints", "system_fingerprint": "fp_1a45f6bea123", "choices": [{"index": 0, "text": '
    '" complaint", "logprobs": null, "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'
)
_CHAT_EVENTS = (
    'data: {"id": "chatcmpl-4f1a", "object": "chat.completion.chunk", "created": 1795376932, '
    '"model": "complaints", "system_fingerprint": "fp_1a45f6bea123", "choices": [{"index": 0, '
    '"delta": {"content": "complaint"}, "logprobs": null, "finish_reason": "stop"}]}\n\n'
    "data: [DONE]\n\n"
)
_JOB_EVENTS = (
    'id: 3\nevent: step\ndata: {"step": 1, "max_steps": 30, "epoch": 1, "loss": 1.9, '
    '"learning_rate": 0.0, "tokens_per_second": 540.0, "seconds_left": 12.5, '
    '"at": "2026-11-22T20:16:04+00:00"}\n\n'
)

_GENERATE_EXAMPLE: dict[str, Any] = {
    "inputs": "Tweet text : Late again. Label :",
    "parameters": {"max_new_tokens": 8, "details": True, "adapter_id": "complaints"},
}
_GENERATE = Doc(
    {
        200: Answer(
            "The output; events where the body says stream.",
            generation.Generated,
            frame=generation.GenerateFrame,
            example=_TGI_EVENTS,
        )
    },
    _GENERATED,
    _GENERATE_EXAMPLE,
    timed=True,
)

ROUTES: dict[tuple[str, str], Doc] = {
    # --- generation ----------------------------------------------------------------------------
    ("POST", "/generate"): _GENERATE,
    ("POST", "/generate_stream"): Doc(
        {
            200: Answer(
                "A token an event.",
                frame=generation.GenerateFrame,
                example=_TGI_EVENTS,
            )
        },
        _GENERATED,
        _GENERATE_EXAMPLE,
        timed=True,
    ),
    ("POST", "/"): Doc(
        {
            200: Answer(
                "The output, in a list; events where the body says stream.",
                generation.GeneratedList,
                frame=generation.GenerateFrame,
                example=_TGI_EVENTS,
            )
        },
        _GENERATED,
        _GENERATE_EXAMPLE,
        timed=True,
    ),
    ("POST", "/v1/completions"): Doc(
        {
            200: Answer(
                "Every choice; events where the body says stream.",
                generation.Completion,
                frame=generation.CompletionChunk,
                example=_COMPLETION_EVENTS,
            )
        },
        _GENERATED,
        {"model": "complaints", "prompt": "Tweet text : Late again. Label :", "max_tokens": 8},
        timed=True,
    ),
    ("POST", "/v1/chat/completions"): Doc(
        {
            200: Answer(
                "Every choice; events where the body says stream.",
                generation.ChatCompletion,
                frame=generation.ChatChunk,
                example=_CHAT_EVENTS,
            )
        },
        _GENERATED,
        {"model": "complaints", "messages": [{"role": "user", "content": "Late again."}]},
        timed=True,
    ),
    ("POST", "/classify"): Doc(
        _ok(generation.RankedInputs, "The labels of every input."),
        _GENERATED,
        {
            "inputs": ["Tweet text : Late again. Label :", "Tweet text : Lovely! Label :"],
            "labels": ["complaint", "no complaint"],
        },
    ),
    # --- the tokenizer -------------------------------------------------------------------------
    ("POST", "/tokenize"): Doc(
        _ok(generation.Tokenized), (*_QUERY, *_BODY, ours.NotReady), {"prompt": "Tweet text"}
    ),
    ("POST", "/detokenize"): Doc(
        _ok(generation.Detokenized), (*_QUERY, *_BODY, ours.NotReady), {"tokens": [65, 66]}
    ),
    ("GET", "/tokenizer_info"): Doc(_ok(generation.TokenizerInfo), (*_QUERY, ours.NotReady)),
    # --- adapters ------------------------------------------------------------------------------
    ("POST", "/adapters"): Doc(
        {
            201: Answer("A new version.", management.Published),
            200: Answer("The newest version is just this already.", management.Published),
        },
        (
            *_QUERY,
            *_BODY,
            ours.NotReady,
            library.UnsupportedFile,
            library.ArchiveInvalid,
            library.TemplateInvalid,
            *_CHECKPOINT,
        ),
    ),
    ("GET", "/adapters"): Doc(_ok(management.AdapterList), _NUMBERS),
    ("GET", "/adapters/{name}"): Doc(_ok(management.Adapter), (*_QUERY, library.AdapterNotFound)),
    ("DELETE", "/adapters/{name}"): Doc(_ok(management.Deleted), (*_NUMBERS, *_NAMED, *_STORED)),
    ("GET", "/adapters/{name}/download"): Doc(
        {200: Answer("A zip of the folder.", media="application/zip")},
        (*_NUMBERS, *_NAMED, library.AdapterCorrupt),
    ),
    ("POST", "/adapters/{name}/preload"): Doc(
        _ok(management.Version, "On its way.", 202), (*_SERVED, ours.RequestInvalid)
    ),
    ("POST", "/adapters/{name}/unload"): Doc(
        _ok(management.Version, "On its way.", 202), (*_SERVED, ours.RequestInvalid)
    ),
    ("POST", "/adapters/{name}/rollback"): Doc(
        _ok(management.Version), (*_QUERY, *_BODY, *_NAMED, *_STORED), {"version": 1}
    ),
    ("PUT", "/adapters/{name}/aliases/{alias}"): Doc(
        _ok(management.Version),
        (*_QUERY, *_BODY, *_NAMED, library.NameInvalid, *_STORED),
        {"version": 1},
    ),
    ("POST", "/adapters/combine"): Doc(
        _ok(management.Combined, "The new adapter.", 201),
        (*_SERVED, *_BODY, library.CombineInvalid, *_CHECKPOINT),
    ),
    ("POST", "/v1/load_lora_adapter"): Doc(
        {
            200: Answer(
                "Loaded.",
                media="text/plain",
                example="Success: LoRA adapter 'refunds' added successfully.",
            )
        },
        (
            *_QUERY,
            *_BODY,
            ours.NotReady,
            ours.LoadingDisabled,
            ours.FolderNotFound,
            *_CHECKPOINT,
        ),
    ),
    ("POST", "/v1/unload_lora_adapter"): Doc(
        {
            200: Answer(
                "Unloaded.",
                media="text/plain",
                example="Success: LoRA adapter 'refunds' removed successfully.",
            )
        },
        (*_QUERY, *_BODY, library.AdapterNotFound, ours.LoadingDisabled, ours.NotLoaded),
    ),
    # --- models --------------------------------------------------------------------------------
    ("GET", "/v1/models"): Doc(_ok(management.ModelList), (*_QUERY, ours.NotReady)),
    ("GET", "/v1/models/{name}"): Doc(
        _ok(management.Model),
        _SERVED,
        parameters={"name": "The base, or an adapter: NAME, NAME@VERSION or NAME@ALIAS."},
    ),
    ("GET", "/info"): Doc(_ok(management.Info), (*_QUERY, ours.NotReady)),
    ("GET", "/methods"): Doc(_ok(management.Methods), _QUERY),
    # --- training ------------------------------------------------------------------------------
    ("POST", "/train"): Doc(
        {
            202: Answer("The job waits.", training.Job),
            200: Answer("A dry run: nothing was stored.", training.Preview),
        },
        (*_QUERY, *_BODY, library.UnsupportedFile, *_PLANNED),
        {
            "adapter": "mine",
            "method": "ia3",
            "template": "Tweet text : {text} Label :",
            "target": "label",
            "rows": [
                {"text": "Late again.", "label": "complaint"},
                {"text": "Lovely!", "label": "no complaint"},
            ],
            "hyperparameters": {"epochs": 1},
        },
    ),
    ("GET", "/train"): Doc(_ok(training.JobList), _NUMBERS),
    ("GET", "/train/{job_id}"): Doc(_ok(training.Job), _JOB),
    ("DELETE", "/train/{job_id}"): Doc(_ok(training.JobDeleted), (*_JOB, ours.JobActive)),
    ("GET", "/train/{job_id}/events"): Doc(
        {
            200: Answer(
                "What happened and what happens, to the job's end.",
                frame=training.JobEvent,
                example=_JOB_EVENTS,
            ),
            204: Answer("The job has ended, and its last event was had."),
        },
        (*_JOB, ours.RequestInvalid),
    ),
    ("GET", "/train/{job_id}/log"): Doc(
        {200: Answer("What its workers printed.", media="text/plain", example="claimed …")},
        (*_JOB, ours.RequestInvalid),
    ),
    ("POST", "/train/{job_id}/cancel"): Doc(
        {
            200: Answer("It has ended.", training.Job),
            202: Answer("It runs, and is about to stop.", training.Job),
        },
        (*_JOB, *_STORED),
    ),
    # --- fine-tuning by OpenAI's names ---------------------------------------------------------
    ("POST", "/v1/files"): Doc(
        _ok(tuning.File, "The file is kept."), (*_QUERY, *_BODY, ours.FilesFull, *_STORED)
    ),
    ("GET", "/v1/files"): Doc(_ok(tuning.FileList), (*_NUMBERS, ours.UploadNotFound)),
    ("GET", "/v1/files/{file_id}"): Doc(_ok(tuning.File), _FILE),
    ("DELETE", "/v1/files/{file_id}"): Doc(_ok(tuning.FileDeleted), (*_FILE, *_STORED)),
    ("GET", "/v1/files/{file_id}/content"): Doc(
        {200: Answer("The bytes as they came.", media="application/octet-stream")}, _FILE
    ),
    ("POST", "/v1/fine_tuning/jobs"): Doc(
        _ok(tuning.TuningJob, "The job waits."),
        (*_QUERY, *_BODY, ours.UploadNotFound, *_PLANNED),
    ),
    ("GET", "/v1/fine_tuning/jobs"): Doc(_ok(tuning.TuningJobList), (*_NUMBERS, ours.JobNotFound)),
    ("GET", "/v1/fine_tuning/jobs/{job_id}"): Doc(_ok(tuning.TuningJob), _JOB),
    ("POST", "/v1/fine_tuning/jobs/{job_id}/cancel"): Doc(
        _ok(tuning.TuningJob, "As it stands now."), (*_JOB, *_STORED)
    ),
    ("GET", "/v1/fine_tuning/jobs/{job_id}/events"): Doc(
        _ok(tuning.TuningEventList), (*_JOB, ours.RequestInvalid)
    ),
    ("GET", "/v1/fine_tuning/jobs/{job_id}/checkpoints"): Doc(
        _ok(tuning.CheckpointList), (*_JOB, ours.RequestInvalid)
    ),
    # --- operations ----------------------------------------------------------------------------
    ("GET", "/livez"): Doc(_ok(management.Status, "It lives."), (ours.NotReady,)),
    ("GET", "/readyz"): Doc(_ok(management.Status, "It is ready."), (ours.NotReady,)),
    ("GET", "/health"): Doc(_ok(management.Status, "It is ready."), (ours.NotReady,)),
    ("POST", "/drain"): Doc(_ok(management.Drain, "As it stands now."), (ours.RequestInvalid,)),
    ("DELETE", "/drain"): Doc(_ok(management.Drain, "As it stands now.")),
    ("GET", "/metrics"): Doc(
        {
            200: Answer(
                "Every metric.",
                media="text/plain",
                example='vllm:num_requests_running{engine="0",model_name="base"} 0.0\n',
            )
        },
        (ours.UnknownParameter,),
    ),
}
