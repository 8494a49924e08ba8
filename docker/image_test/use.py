"""What the image test does with a running container: looks inside, generates, uploads, trains.

Knows no podman and no build. Standard library only.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

TEMPLATE = "Tweet text : {text} Label :"
LABELS = ["complaint", "no complaint"]
TEXT = "The fridge you delivered has a dent the size of my fist."
UPLOADED, TRAINED = "uploaded", "trained"
TRAINING_SECONDS = 300
NO_CAPABILITIES = "0000000000000000"

# Nothing here goes through a proxy.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_headers: dict[str, str] = {}


class Wrong(Exception):
    """The container did not do what it should."""


def is_ready(port: int) -> bool:
    """Whether /readyz says so."""
    try:
        with _opener.open(f"http://127.0.0.1:{port}/readyz", timeout=5) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def take_key(key: str) -> None:
    """Send this API key from now on."""
    _headers["authorization"] = f"Bearer {key}"


def look_inside(execute: Callable[..., CompletedProcess[str]]) -> None:
    """User, pid 1, capabilities, read-only root, and what must not be there.

    Args:
        execute: runs words in the container.
    """
    expect("user", execute("id", "-u").stdout.strip(), "10001")
    expect("pid 1", execute("cat", "/proc/1/comm").stdout.strip(), "tini")
    status = dict(
        line.split(":", 1) for line in execute("cat", "/proc/1/status").stdout.splitlines()
    )
    for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb"):
        expect(name, status[name].strip(), NO_CAPABILITIES)
    expect("NoNewPrivs", status["NoNewPrivs"].strip(), "1")
    for place in ("/", "/opt/app", "/opt/venv", "/base"):
        if execute("touch", f"{place}/written").returncode == 0:
            raise Wrong(f"{place} can be written, expected a read-only root file system")
    for place in ("/data", "/tmp"):  # noqa: S108
        if execute("sh", "-c", f"touch {place}/written && rm {place}/written").returncode != 0:
            raise Wrong(f"{place} cannot be written")
    for tool in ("gcc", "cc", "/opt/venv/bin/pip"):
        if execute("sh", "-c", f"command -v {tool}").returncode == 0:
            raise Wrong(f"{tool} is in the image")


def use_it(port: int, repo: Path) -> None:
    """Generate, stream, upload an adapter and use it, train one and use that."""
    try:
        with _opener.open(f"http://127.0.0.1:{port}/info", timeout=30):
            raise Wrong("/info answers without a key, expected 401")
    except urllib.error.HTTPError as error:
        expect("status of /info without a key", error.code, 401)
    base = call(port, "/generate", {"inputs": "Once upon a time", **greedy(8, ignore_eos=True)})
    if not base["generated_text"]:
        raise Wrong("the base generated nothing")
    streamed = stream(
        port, "/generate_stream", {"inputs": "Once upon a time", **greedy(8, ignore_eos=True)}
    )
    expect("streamed text", streamed[-1]["generated_text"], base["generated_text"])
    expect("streamed events", len(streamed), 8)

    folder = repo / "server/demo/adapters/complaints"
    fields = {"name": UPLOADED, "template": TEMPLATE, "labels": json.dumps(LABELS)}
    files = [("files", path.name, path.read_bytes()) for path in sorted(folder.glob("adapter_*"))]
    made = send_form(port, "/adapters", fields, files)
    expect("uploaded version", made["version"], 1)
    answer = call(port, f"/generate?adapter={UPLOADED}", {"row": {"text": TEXT}, **greedy(8)})
    expect("the adapter's answer", answer["generated_text"].strip(), "complaint")

    train(port, repo / "server/demo/messages.jsonl")
    use_again(port)


def train(port: int, data: Path) -> None:
    """A short job, followed until its adapter is served."""
    job = {
        "adapter": TRAINED,
        "method": "ia3",
        "template": TEMPLATE,
        "target": "label",
        "labels": LABELS,
        "hyperparameters": {"max_steps": 6, "validation_split": 0.1},
    }
    rows = [("data", "messages.jsonl", data.read_bytes())]
    queued = send_form(port, "/train", {"job": json.dumps(job)}, rows)
    end = time.monotonic() + TRAINING_SECONDS
    while (now := call(port, f"/train/{queued['id']}"))["state"] in ("queued", "running"):
        if time.monotonic() > end:
            raise Wrong(f"the job was {now['state']} after {TRAINING_SECONDS} seconds")
        time.sleep(0.5)
    if now["state"] != "succeeded":
        raise Wrong(f"the job {now['state']}: {now['error']}")


def use_again(port: int) -> None:
    """Both adapters answer."""
    names = {one["name"] for one in call(port, "/adapters")["adapters"]}
    expect("adapters", names, {UPLOADED, TRAINED})
    for name in (UPLOADED, TRAINED):
        ranked = call(port, f"/classify?adapter={name}", {"row": {"text": TEXT}})
        expect(f"scores of {name}", set(ranked["scores"]), set(LABELS))


def greedy(tokens: int, **more: Any) -> dict[str, Any]:
    """Parameters of a generation that is always the same."""
    return {"parameters": {"max_new_tokens": tokens, "do_sample": False, **more}}


def call(port: int, path: str, body: Mapping[str, Any] | None = None) -> Any:
    """GET, or POST of a JSON body."""
    data = None if body is None else json.dumps(body).encode()
    return json.loads(_send(port, path, data, "application/json"))


def stream(port: int, path: str, body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The events of a stream."""
    text = _send(port, path, json.dumps(body).encode(), "application/json").decode()
    return [
        json.loads(line.removeprefix("data:")) for line in text.splitlines() if line[:5] == "data:"
    ]


def send_form(
    port: int, path: str, fields: Mapping[str, str], files: list[tuple[str, str, bytes]]
) -> Any:
    """POST of a multipart form; files are (field, name, bytes)."""
    boundary = uuid.uuid4().hex
    parts = [
        f'--{boundary}\r\ncontent-disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in fields.items()
    ]
    for field, name, content in files:
        head = f'--{boundary}\r\ncontent-disposition: form-data; name="{field}"; filename="{name}"'
        parts.append(f"{head}\r\n\r\n".encode() + content + b"\r\n")
    body = b"".join(parts) + f"--{boundary}--\r\n".encode()
    return json.loads(_send(port, path, body, f"multipart/form-data; boundary={boundary}"))


def expect(what: str, came: object, expected: object) -> None:
    """Raise Wrong unless the two are equal."""
    if came != expected:
        raise Wrong(f"{what}: expected {expected!r}, came {came!r}")


def _send(port: int, path: str, body: bytes | None, content_type: str) -> bytes:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}",
        data=body,
        headers={"content-type": content_type, **_headers},
    )
    try:
        with _opener.open(request, timeout=120) as reply:
            return bytes(reply.read())
    except urllib.error.HTTPError as error:
        raise Wrong(f"{path}: {error.code} {error.read().decode(errors='replace')}") from None
