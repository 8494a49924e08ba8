"""The command line's HTTP client: httpx with refusals, files and server-sent events as commands need them.

Every refusal becomes one `ServerRefused` with the server's own sentence, whatever the shape of its body;
files are streamed in both directions. Knows no command, and of the API only errors and event streams.
"""

from __future__ import annotations

import ipaddress
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import httpx

# A generation or an upload may keep silent for long; connecting must not.
_PATIENCE_SECONDS = 600.0
_CONNECT_SECONDS = 10.0
_MOST_CHARACTERS = 300
# A server that loads its base answers so; commands wait for it so long, and ask so often.
_LOADING = "still loading"
_LOADING_SECONDS = 180.0
_ASK_AGAIN_SECONDS = 1.0


@dataclass(frozen=True)
class Words:
    """How the caller's own means are called in refusals that are made on this side.

    Attributes:
        url: what the URL was given by.
        nobody_there: what to do where nothing answers.
        no_key: where the key comes from.
    """

    url: str
    nobody_there: str
    no_key: str


COMMAND_WORDS = Words(
    url="--url",
    nobody_there="start it with graftwork serve, or name the data directory with --data-dir",
    no_key="commands send the one in GRAFTWORK_API_KEY",
)


class ServerRefused(Exception):
    """The server refused a request, or did not reply.

    Attributes:
        message: one sentence for a person.
        status: HTTP status; None where there was no reply at all.
        code: the server's name for it, where its body has one.
    """

    def __init__(self, message: str, status: int | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.code = code


class RemoteServer:
    """A server at a URL; close it, or use it as a context.

    Args:
        url: http://HOST:PORT, perhaps with a path before the routes.
        patience_seconds: how long a reply may take.
        api_key: sent with every request; None sends none.
        transport: what answers instead of the network, however long it takes.
        on_loading: called once if a request has to wait until the server has loaded its base; None
            lets such a request fail.
        words: for refusals.

    Raises:
        ServerRefused: not such a URL. Every method raises it too: no reply, or a refusal.
    """

    def __init__(
        self,
        url: str,
        *,
        patience_seconds: float = _PATIENCE_SECONDS,
        api_key: str | None = None,
        transport: httpx.BaseTransport | None = None,
        on_loading: Callable[[], None] | None = None,
        words: Words = COMMAND_WORDS,
    ) -> None:
        self.url = checked_url(url, words)
        self._words = words
        self._on_loading = on_loading
        self._timeout = httpx.Timeout(
            None if transport else patience_seconds, connect=min(patience_seconds, _CONNECT_SECONDS)
        )
        self._client = httpx.Client(
            base_url=self.url,
            timeout=self._timeout,
            trust_env=uses_proxy(self.url),
            headers=key_headers(api_key),
            transport=transport,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self._client.close()

    def get(self, path: str, **query: Any) -> Any:
        """GET; the reply's JSON."""
        return self._call("GET", path, params=_known(query))

    def post(self, path: str, body: Any = None, **query: Any) -> Any:
        """POST a JSON body, or none; the reply's JSON."""
        return self._call("POST", path, json=body, params=_known(query))

    def put(self, path: str, body: Any) -> Any:
        """PUT a JSON body; the reply's JSON."""
        return self._call("PUT", path, json=body)

    def delete(self, path: str, **query: Any) -> Any:
        """DELETE; the reply's JSON."""
        return self._call("DELETE", path, params=_known(query))

    def text(self, path: str, **query: Any) -> str:
        """GET; the reply's text."""
        with self._reply("GET", path, params=_known(query)) as reply:
            reply.read()
            return reply.text

    def upload(
        self,
        path: str,
        fields: Mapping[str, str],
        files: Sequence[tuple[str, str, Path]],
        **query: Any,
    ) -> tuple[int, Any]:
        """POST a form; files are read while they are sent.

        Args:
            path: the route.
            fields: the form's plain fields.
            files: (field, file name, path of its bytes).
            query: query parameters.

        Returns:
            The reply's status and JSON.
        """
        with ExitStack() as stack:
            parts = [
                (field, (name, stack.enter_context(place.open("rb"))))
                for field, name, place in files
            ]
            params = _known(query)
            with self._reply("POST", path, data=fields, files=parts, params=params) as reply:
                return reply.status_code, _json(reply)

    def download(self, path: str, target: Path, **query: Any) -> None:
        """GET into a new file, block by block.

        Raises:
            OSError: the file is there already, or cannot be written.
        """
        with (
            self._reply("GET", path, params=_known(query)) as reply,
            target.open("xb") as file,
        ):
            for block in reply.iter_bytes(1 << 16):
                file.write(block)

    def events(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        quiet_seconds: float | None = None,
        **query: Any,
    ) -> Iterator[tuple[dict[str, str], Any]]:
        """The server-sent events of a stream: their fields but for `data`, and that as JSON.

        Args:
            method: of the request.
            path: the route.
            body: JSON.
            quiet_seconds: stop after so long a silence; None waits for the stream's end.
            query: query parameters.
        """
        timeout = self._timeout
        if quiet_seconds is not None:
            timeout = httpx.Timeout(_CONNECT_SECONDS, read=quiet_seconds)
        options = {"json": body, "params": _known(query), "timeout": timeout}
        with self._reply(method, path, **options) as reply:
            fields: dict[str, str] = {}
            for line in _lines(reply, until_quiet=quiet_seconds is not None):
                name, _, value = line.partition(":")
                if name == "data":
                    if value.strip() == "[DONE]":
                        return
                    yield fields, _parsed(value)
                    fields = {}
                elif name:
                    fields[name] = value.strip()

    def _call(self, method: str, path: str, **options: Any) -> Any:
        with self._reply(method, path, **options) as reply:
            return _json(reply)

    @contextmanager
    def _reply(self, method: str, path: str, **options: Any) -> Iterator[httpx.Response]:
        """A reply whose body is unread; a refusal is raised."""
        if options.get("json", ...) is None:
            del options["json"]
        try:
            self._wait_until_loaded()
            with self._client.stream(method, path, **options) as reply:
                if not reply.is_success:
                    reply.read()
                    raise refusal_of(reply, self.url, self._words)
                yield reply
        except httpx.HTTPError as error:
            raise unreachable(self.url, error, self._words) from error

    def _wait_until_loaded(self) -> None:
        """Before the first request: wait while the server loads its base."""
        on_loading, self._on_loading = self._on_loading, None
        end, is_announced = time.monotonic() + _LOADING_SECONDS, False
        while on_loading is not None and time.monotonic() < end:
            reply = self._client.get("/readyz")
            if reply.is_success or _LOADING not in refusal_of(reply, self.url).message:
                return
            if not is_announced:
                on_loading()
            is_announced = True
            time.sleep(_ASK_AGAIN_SECONDS)


def checked_url(url: str, words: Words = COMMAND_WORDS) -> str:
    """The URL, if it can be a server's.

    Raises:
        ServerRefused: it cannot.
    """
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ServerRefused(
            f"{words.url}: {error}; expected http://HOST:PORT, came {url!r}"
        ) from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ServerRefused(f"{words.url}: expected http://HOST:PORT, came {url!r}")
    return url.rstrip("/")


def key_headers(api_key: str | None) -> dict[str, str]:
    """The headers that carry a key."""
    return {} if api_key is None else {"authorization": f"Bearer {api_key}"}


def is_segment(name: str) -> bool:
    """Whether a name can be one part of a route's path; another would be another route."""
    return bool(name) and "/" not in name and name not in (".", "..")


def uses_proxy(url: str) -> bool:
    """Whether the environment's proxy settings hold for a URL: not on this machine itself."""
    host = httpx.URL(url).host
    if host == "localhost":
        return False
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return True


def unreachable(url: str, error: httpx.HTTPError, words: Words = COMMAND_WORDS) -> ServerRefused:
    """The refusal that stands for no reply."""
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return ServerRefused(f"nothing answers at {url}: {error}; {words.nobody_there}")
    return ServerRefused(f"{url}: {type(error).__name__}: {error}")


def refusal_of(reply: httpx.Response, url: str, words: Words = COMMAND_WORDS) -> ServerRefused:
    """A reply that is no success, with the server's own sentence; its body has been read."""
    try:
        body = reply.json()
    except ValueError:
        body = None
    message, code = error_of(body)
    if message is None:
        text = " ".join(reply.text.split())[:_MOST_CHARACTERS]
        message = f"{url} answered {reply.status_code} {text}; is it a Graftwork server?"
    if reply.status_code == httpx.codes.UNAUTHORIZED:
        message += f"; {words.no_key}"
    return ServerRefused(message, reply.status_code, code)


def error_of(body: Any) -> tuple[str | None, str | None]:
    """Message and code of an error's body in any of the three shapes; None where there is none."""
    if not isinstance(body, dict) or "error" not in body:
        return None, None
    error = body["error"]
    if isinstance(error, dict):  # OpenAI's
        return str(error.get("message")), error.get("code")
    return str(error), body.get("code")


def _lines(reply: httpx.Response, *, until_quiet: bool) -> Iterator[str]:
    try:
        yield from reply.iter_lines()
    except httpx.ReadTimeout:
        if not until_quiet:
            raise


def _known(query: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in query.items() if value is not None}


def _json(reply: httpx.Response) -> Any:
    reply.read()
    return _parsed(reply.text) if reply.text else None


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ServerRefused(
            f"expected JSON, came {text[:80]!r}; is it a Graftwork server?"
        ) from error
