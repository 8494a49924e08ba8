"""Checks of the machine: device and number formats, disk, port, a server that runs already."""

from __future__ import annotations

import errno
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from server.cli.doctor.finding import Finding
from server.cli.http_client import RemoteServer, ServerRefused
from server.config.settings import MIB, Settings

_GIB = 1024 * MIB
# Less than this and not even a small adapter is safe; less than that and a large upload is not.
_LEAST_FREE = 100 * MIB
_FREE_FOR_A_CHECKPOINT = 2 * _GIB
# What listens on a port may be no HTTP server at all, and say nothing.
_PATIENCE_SECONDS = 5.0


def check_device(settings: Settings) -> Iterator[Finding]:
    """Whether torch has the device, and computes in the number format that would be served."""
    import torch

    from server.base.dtypes import default_dtype

    kind = settings.device.split(":")[0]
    if kind == "cuda" and not torch.cuda.is_available():
        message = f"device {settings.device}: torch {torch.__version__} finds no CUDA device"
        hint = "install the driver and torch's CUDA build, or serve with --device cpu"
        yield Finding("device", "fail", message, hint)
        return
    try:
        torch.zeros(1, device=settings.device)
        fast = default_dtype(settings.device)
    except (RuntimeError, AssertionError) as error:
        message = f"device {settings.device}: {str(error).splitlines()[0]}"
        yield Finding("device", "fail", message, "name another with --device, such as cpu")
        return
    dtype = settings.dtype or fast
    name = torch.cuda.get_device_name(settings.device) if kind == "cuda" else f"{_cores()} cores"
    message = f"torch {torch.__version__} on {settings.device} ({name}), weights in {dtype}"
    if dtype == "bfloat16" and fast != "bfloat16":
        hint = "leave --dtype out: float32 is faster here"
        yield Finding("device", "warning", f"{message}; bfloat16 is not computed in hardware", hint)
    else:
        yield Finding("device", "ok", message)
    if settings.threads is not None and settings.threads > _cores():
        message = f"{settings.threads} threads on {_cores()} cores: they wait for one another"
        yield Finding("device", "warning", message, f"--threads {_cores()} or fewer")


def check_disk(directory: Path) -> Iterator[Finding]:
    """Free space where the data directory is, or would be made."""
    there = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    message = f"{free / _GIB:.1f} GiB free in {there}"
    hint = "make room, or name a --data-dir on another disk"
    if free < _LEAST_FREE:
        yield Finding("disk", "fail", message, hint)
    elif free < _FREE_FOR_A_CHECKPOINT:
        yield Finding("disk", "warning", f"{message}: an upload may have 1 GiB", hint)
    else:
        yield Finding("disk", "ok", message)


def check_port(host: str, port: int) -> Iterator[Finding]:
    """Whether a server could listen, and what does if it could not."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            # Bound is not enough: another process may listen on the same port of every address.
            probe.listen(1)
        except OSError as error:
            yield _port_taken(host, port, error)
            return
    yield Finding("port", "ok", f"{host}:{port} is free")


def _port_taken(host: str, port: int, error: OSError) -> Finding:
    if error.errno != errno.EADDRINUSE:
        message = f"cannot listen on {host}:{port}: {error.strerror}"
        return Finding("port", "fail", message, "name another with --host and --port")
    there = reachable(host)
    described = running_server(f"http://{there}:{port}")
    if described is not None:
        return Finding("port", "ok", f"{host}:{port}: {described}")
    message = f"{host}:{port} is in use, and no Graftwork server answers there"
    return Finding("port", "fail", message, "stop what listens there, or name another --port")


def check_server(url: str, api_key: str | None) -> Iterator[Finding]:
    """Whether a Graftwork server answers at a URL, and whether its adapters are whole."""
    hint = "start it with graftwork serve, or name another with --url"
    try:
        with RemoteServer(url, patience_seconds=_PATIENCE_SECONDS, api_key=api_key) as server:
            described = _described(server.get("/info"))
            adapters = server.get("/adapters")["adapters"]
    except ServerRefused as error:
        yield Finding("server", "fail", error.message, hint)
        return
    yield Finding("server", "ok", f"{url}: {described}")
    corrupt = [f"{one['name']}@{one['version']}" for one in adapters if one["status"] != "ok"]
    if corrupt:
        message = f"damaged on its disk: {', '.join(corrupt)}"
        yield Finding("server", "fail", message, "upload them again")


def running_server(url: str) -> str | None:
    """A sentence about what runs at a URL; None where it is no Graftwork server."""
    with RemoteServer(url, patience_seconds=_PATIENCE_SECONDS) as server:
        try:
            return _described(server.get("/info"))
        except ServerRefused as error:
            refused = error
        if refused.status is None:
            return None
        # /info speaks TGI's protocol, whose refusals have no code to know ours by.
        try:
            ours = "adapters" in server.get("/adapters")
        except ServerRefused as error:
            ours = error.code in ("not_ready", "key_required")
        return f"a Graftwork server: {refused.message}" if ours else None


def reachable(host: str) -> str:
    """A host as a client on this machine would write it in a URL."""
    own = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    return f"[{own}]" if ":" in own else own


def _described(info: Any) -> str:
    if not isinstance(info, dict) or info.get("router") != "graftwork":
        raise ServerRefused("something answers that is no Graftwork server")
    return f"Graftwork {info['version']} serves {info['model_id']}"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
