"""A client of a running Graftwork server. Does not load torch.

    with Client("http://127.0.0.1:8000") as client:
        client.add_adapter("complaints", "path/to/peft_folder")
        print(client.generate("Tweet text : late again Label :", adapter="complaints"))

Replies are the server's JSON as dicts; `/docs` of the server describes every field.
"""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec, Self, TypeVar

from adapters.field_errors import unknown_name
from server.cli.backend import AdapterFiles, Backend, GenerationInput
from server.cli.http_client import RemoteServer, ServerRefused, Words
from server.store.job_states import FINISHED

__all__ = ["Client", "JobFailed", "ServerRefused"]

Json = dict[str, Any]
_P = ParamSpec("_P")
_R = TypeVar("_R")
_HOW_TO_TRAIN = (
    "expected the adapter's name, then the rows, such as train('mine', [{'text': 'Late.', 'label': "
    "'bad'}, ...], method='ia3', template='{text}', target='label')"
)
# A prompt as it is, or a row for the adapter's stored template.
Input = str | Mapping[str, str]


_WORDS = Words(
    url="url",
    nobody_there="start the server there with graftwork serve, or give another url",
    no_key="give yours with Client(url, api_key=...)",
)


class JobFailed(Exception):
    """A training job ended without an adapter.

    Attributes:
        job: the job as the server shows it.
    """

    def __init__(self, job: Json) -> None:
        error = job.get("error") or {}
        reason = error.get("message") or f"it is {job['state']}"
        super().__init__(f"training job {job['id']} made no adapter: {reason}")
        self.job = job


def _explained(method: Callable[_P, _R]) -> Callable[_P, _R]:
    """A method that says how it is called where its arguments do not fit."""
    signature = inspect.signature(method)

    @functools.wraps(method)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"Client.{method.__name__}: {error}; {_HOW_TO_TRAIN}") from None
        return method(*args, **kwargs)

    return call


class Client:
    """A running server; close it, or use it as a context.

    Args:
        url: http://HOST:PORT, with a path in front of the routes where a proxy adds one.
        api_key: sent with every request; None sends none.
        timeout_seconds: how long a reply may take.

    Raises:
        ServerRefused: not such a URL. Every method raises it too: no reply, or a refusal.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        timeout_seconds: float = 600.0,
    ) -> None:
        self._server = RemoteServer(
            url, patience_seconds=timeout_seconds, api_key=api_key, words=_WORDS
        )
        self._backend = Backend(self._server)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self._backend.close()

    # --- generation ------------------------------------------------------------------------------

    def generate(self, prompt: Input, *, adapter: str | None = None, **parameters: Any) -> str:
        """Generate one text.

        Args:
            prompt: a text, or columns for the adapter's stored template.
            adapter: NAME, NAME@VERSION or NAME@ALIAS; None is the base.
            parameters: those of `POST /generate`, such as `max_new_tokens`.

        Raises:
            TypeError: a parameter that the route does not have.
        """
        _check_parameters(parameters)
        reply = self._server.post(
            "/generate", {**_prompt(prompt).body(), "parameters": parameters}, adapter=adapter
        )
        return str(reply["generated_text"])

    def stream(
        self, prompt: Input, *, adapter: str | None = None, **parameters: Any
    ) -> Iterator[str]:
        """Generate one text, piece by piece; arguments as `generate`."""
        _check_parameters(parameters)
        return self._backend.pieces(adapter, _prompt(prompt), parameters)

    def classify(
        self,
        prompt: Input,
        *,
        adapter: str | None = None,
        labels: Sequence[str] | None = None,
        raw: bool = False,
    ) -> Json:
        """Rank labels by their likelihood after a prompt.

        Args:
            prompt: a text, or columns for the adapter's stored template. A text fills the template
                where that has one column, unless it stands in the template's words already.
            adapter: NAME, NAME@VERSION or NAME@ALIAS; None is the base.
            labels: what to choose from; None takes those stored with the adapter.
            raw: take a text as the prompt, whatever the adapter's template.

        Returns:
            `label`, the most likely one; `scores` and `logprobs` of each.
        """
        body = _prompt(prompt).body()
        if labels is not None:
            body["labels"] = list(labels)
        if raw:
            body["raw"] = True
        reply: Json = self._server.post("/classify", body, adapter=adapter)
        return reply

    # --- what is served --------------------------------------------------------------------------

    def info(self) -> Json:
        """The base, the limits and the version."""
        reply: Json = self._server.get("/info")
        return reply

    def models(self) -> list[str]:
        """Names that a request may give as its model: the base first, then the adapters."""
        return [str(one["id"]) for one in self._server.get("/v1/models")["data"]]

    # --- adapters --------------------------------------------------------------------------------

    def adapters(self) -> list[Json]:
        """Every adapter at its default version, by name."""
        return self._backend.adapters()

    def adapter(self, reference: str) -> Json:
        """One adapter with all its versions: NAME, NAME@VERSION or NAME@ALIAS."""
        return self._backend.adapter(reference)

    def add_adapter(self, name: str, path: str | Path, **metadata: Any) -> Json:
        """Upload a PEFT folder, or a .zip or .tar of one; the adapter's record.

        Args:
            name: what the adapter will be called.
            path: where it is on this machine.
            metadata: what to store with it, such as `template`, `labels` and `description`.

        Raises:
            TypeError: metadata that the server does not store.
            FileNotFoundError: there is nothing at `path`.
        """
        from adapters.metadata import SETTABLE_FIELDS

        _check_names("add_adapter", metadata, SETTABLE_FIELDS)
        return self._backend.add(AdapterFiles(Path(path), name, metadata))

    def remove_adapter(self, name: str, version: int | None = None) -> Json:
        """Remove a version, or all of them."""
        return self._backend.remove(name, version)

    def download_adapter(self, reference: str, out: str | Path) -> Json:
        """Write a PEFT folder, or a zip where the name ends in .zip; the adapter's record."""
        return self._backend.download(reference, Path(out))

    # --- training --------------------------------------------------------------------------------

    @_explained
    def train(
        self,
        adapter: str,
        rows: Sequence[Mapping[str, str | bool | int | float]],
        *,
        method: str,
        template: str,
        target: str,
        **options: Any,
    ) -> str:
        """Start a training job; its id.

        Args:
            adapter: name of the adapter that it makes.
            rows: the data, column by column.
            method: such as "prefix_tuning" or "ia3".
            template: makes prompts of rows: `Tweet text : {text} Label :`.
            target: the column to learn.
            options: other fields of `POST /train`, such as `labels` and `hyperparameters`.

        Raises:
            TypeError: arguments that are missing or given twice; rows that are a file's name.
        """
        sent = [] if isinstance(rows, str | Path) else list(rows)
        if isinstance(rows, str | Path) or not all(isinstance(row, Mapping) for row in sent):
            raise TypeError(
                f"Client.train: rows: expected a list of dicts, came {type(rows).__name__}; read the "
                "file first, or run graftwork train --data FILE --url URL --register NAME"
            )
        body = {
            "adapter": adapter,
            "method": method,
            "template": template,
            "target": target,
            "rows": [dict(row) for row in sent],
            **options,
        }
        return str(self._server.post("/train", body)["id"])

    def job(self, job_id: str) -> Json:
        """A training job as it is now."""
        return self._backend.job(job_id)

    def cancel_job(self, job_id: str) -> Json:
        """End a job that waits, ask one that runs to end; the job as it is then."""
        return self._backend.cancel_job(job_id)

    def wait_for_job(self, job_id: str, *, poll_seconds: float = 0.5) -> Json:
        """Wait until a training job has made its adapter; the job.

        Raises:
            JobFailed: it failed, or was cancelled.
        """
        while (job := self._backend.job(job_id))["state"] not in FINISHED:
            time.sleep(poll_seconds)
        if job["state"] != "succeeded":
            raise JobFailed(job)
        return job


def _prompt(prompt: Input) -> GenerationInput:
    return GenerationInput(prompt) if isinstance(prompt, str) else GenerationInput(row=dict(prompt))


def _check_parameters(parameters: Mapping[str, Any]) -> None:
    # The route takes and ignores what other servers have; a caller of this client would not see that.
    from server.api.schemas import GenerateParameters

    _check_names("generate", parameters, GenerateParameters.model_fields)


def _check_names(method: str, given: Mapping[str, Any], known: Collection[str]) -> None:
    for name in given:
        if name not in known:
            raise TypeError(f"Client.{method}: {unknown_name(name, known, 'parameter')}")
