"""Hostile uploads: files, archives, names and forms at `POST /adapters`."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

from tests.hostile.case import Answer, Case, names, raw, read, request
from tests.hostile.make_files import (
    good_config,
    good_tensors,
    gzip_of,
    pair,
    tar_of,
    tensors,
    zip_of,
)
from tests.hostile.served import MIB, Served

Send = Callable[[Served], Answer]
_BOUNDARY = "boundary"
_TYPE = {"content-type": f"multipart/form-data; boundary={_BOUNDARY}"}

# name of the case -> name of the adapter
NAMES = {
    "empty": "",
    "space": " ",
    "dots": "..",
    "way_out": "../../etc/cron.d/evil",
    "dots_inside": "a..b",
    "slash": "a/b",
    "backslash": "..\\evil",
    "nul": "a\0b",
    "line_break": "a\r\nx-admin: 1",
    "escape": "a\x1b[31mred",
    "right_to_left": "a\u202egpj.exe",
    "zero_width": "complaints\u200b",
    "300_characters": "a" * 300,
    "case_twin": "Complaints",
    "letters_that_look_alike": "\u0441omplaints",
    "full_width": "\uff43omplaints",
    "script": "<script>alert(1)</script>",
    "percent": "%2e%2e%2fevil",
    "leading_dash": "-rf",
    "template": "{{7*7}}",
    "base": "tiny-base",
    "with_version": "complaints@1",
}


def upload(name: str = "evil", fields: Mapping[str, str] | None = None, **files: bytes) -> Send:
    """An adapter that is sound but for the files that are given: config, tensors, or one archive."""
    parts = {
        "adapter_config.json": files.get("config", json.dumps(good_config()).encode()),
        "adapter_model.safetensors": files.get("tensors", good_tensors()),
    }
    return request(
        "POST",
        "/adapters",
        data={"name": name, **(fields or {})},
        files=[("files", (file, data)) for file, data in parts.items()],
    )


def archive(file_name: str, make: Callable[[], bytes]) -> Send:
    """One archive; it is made when it is sent."""

    def send(served: Served) -> Answer:
        files = [("files", (file_name, make()))]
        return request("POST", "/adapters", data={"name": "evil"}, files=files)(served)

    return send


def form(body: bytes, **headers: str) -> Send:
    """A form as bytes."""
    return request("POST", "/adapters", content=body, headers={**_TYPE, **headers})


def part(disposition: str, value: bytes = b"evil") -> bytes:
    """One part of a form."""
    head = f"--{_BOUNDARY}\r\nContent-Disposition: form-data; {disposition}\r\n\r\n"
    return head.encode() + value + b"\r\n"


def _bomb() -> bytes:
    return zip_of(
        {**pair(), "adapter_model.safetensors": bytes(48 * MIB)}, method=zipfile.ZIP_DEFLATED
    )


def _lying_bomb() -> bytes:
    size, said = (48 * MIB).to_bytes(4, "little"), (10).to_bytes(4, "little")
    return _bomb().replace(size, said)


def _gzip_bomb() -> bytes:
    return gzip_of(tar_of({"README.md": bytes(48 * MIB), **pair()}))


def _many_members() -> bytes:
    out = io.BytesIO(zip_of(pair()))
    with zipfile.ZipFile(out, "a") as file:
        for number in range(5_000):
            file.writestr(zipfile.ZipInfo(f"f{number}"), b"")
    return out.getvalue()


def _many_tensors(count: int) -> bytes:
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    return tensors({f"t{number}": empty for number in range(count)}, b"")


def _deep(depth: int) -> bytes:
    return b'{"a":' * depth + b"1" + b"}" * depth


def _labels(value: Any) -> dict[str, str]:
    return {"labels": value if isinstance(value, str) else json.dumps(value)}


_END = f"--{_BOUNDARY}--\r\n".encode()
_FORMS: dict[str, Send] = {
    "10000_parts": form(part('name="name"') * 10_000 + _END),
    "10000_files": form(part('name="files"; filename="a"') * 10_000 + _END),
    "no_end": form(part('name="name"')),
    "no_boundary": request(
        "POST", "/adapters", content=b"", headers={"content-type": "multipart/form-data"}
    ),
    "boundary_of_10000_bytes": request(
        "POST",
        "/adapters",
        content=b"",
        headers={"content-type": "multipart/form-data; boundary=" + "b" * 10_000},
    ),
    "json": request("POST", "/adapters", json={"name": "evil"}),
    "name_twice": form(part('name="name"') + part('name="name"', b"good") + _END),
    "name_of_1_mib": form(part('name="name"', b"a" * MIB) + _END),
    "name_not_utf8": form(part('name="name"', b"\xff\xfe") + _END),
    "no_name": form(part('name="files"; filename="adapter_config.json"', b"{}") + _END),
    "no_files": form(part('name="name"') + _END),
    "field_unknown": form(part('name="is_admin"') + _END),
    "field_like_a_class": form(part('name="__class__"') + _END),
    "part_without_disposition": form(f"--{_BOUNDARY}\r\n\r\na\r\n".encode() + _END),
    "part_header_of_1_mib": form(f"--{_BOUNDARY}\r\nX-A: {'a' * MIB}\r\n\r\n\r\n".encode() + _END),
    "part_of_1000_headers": form(
        f"--{_BOUNDARY}\r\n".encode() + b"A: b\r\n" * 1000 + b"\r\n\r\n" + _END
    ),
    "file_name_way_out": form(
        part('name="name"') + part('name="files"; filename="../../../../etc/evil"') + _END
    ),
    "file_name_with_nul": form(
        part('name="name"') + part('name="files"; filename="a\0.safetensors"') + _END
    ),
    "gzip_body": form(gzip_of(part('name="name"') + _END), **{"content-encoding": "gzip"}),
}
_FIELDS: dict[str, dict[str, str]] = {
    "template_lone_brace": {"template": "{" * 1001},
    "template_no_name": {"template": "{ }"},
    "template_20000_characters": {"template": "a" * 20_000},
    "labels_deep": _labels("[" * 30_000),
    "labels_5000_digits": _labels("[" + "9" * 5_000 + "]"),
    "labels_numbers": _labels([1, 2]),
    "labels_10000": _labels([str(number) for number in range(10_000)]),
    "labels_half_a_surrogate": _labels('["\\ud800", "a"]'),
    "append_eos_text": {"append_eos": "yes; please"},
    "tokenization_unknown": {"tokenization": "__import__('os')"},
}


def _lying(length: int, body: bytes) -> bytes:
    head = (
        f"POST /adapters HTTP/1.1\r\nHost: localhost\r\nContent-Type: {_TYPE['content-type']}\r\n"
        f"Connection: close\r\nContent-Length: {length}\r\n\r\n"
    )
    return head.encode() + body


_BODY = part('name="name"') + part('name="files"; filename="adapter_config.json"', b"{}") + _END

CASES = [
    *(
        Case(f"tensors/{name}", upload(tensors=read(f"tensors/{name}")))
        for name in names("tensors")
    ),
    *(Case(f"configs/{name}", upload(config=read(f"configs/{name}"))) for name in names("configs")),
    *(
        Case(f"archives/{name}", archive(name, lambda name=name: read(f"archives/{name}")))
        for name in names("archives")
    ),
    *(Case(f"names/{case}", upload(name)) for case, name in NAMES.items()),
    *(Case(f"forms/{case}", send) for case, send in _FORMS.items()),
    *(Case(f"fields/{case}", upload("evil", fields)) for case, fields in _FIELDS.items()),
    Case("tensors/300000_tensors", upload(tensors=_many_tensors(300_000))),
    Case("tensors/10000_tensors", upload(tensors=_many_tensors(10_000))),
    Case("tensors/depth_100000", upload(tensors=tensors(_deep(100_000)))),
    Case("configs/depth_100000", upload(config=_deep(100_000))),
    Case("configs/2_mib", upload(config=b" " * 2 * MIB)),
    Case("archives/bomb.zip", archive("bomb.zip", _bomb)),
    Case("archives/bomb_that_lies.zip", archive("bomb.zip", _lying_bomb)),
    Case("archives/bomb.tar.gz", archive("bomb.tar.gz", _gzip_bomb)),
    Case("archives/gzip_of_gzip_bomb", archive("a.tar.gz", lambda: gzip_of(_gzip_bomb()))),
    Case("archives/5000_members.zip", archive("many.zip", _many_members)),
    Case("upload/length_too_large", raw(_lying(len(_BODY) + 100, _BODY), close_early=True)),
    Case("upload/length_of_4_gib", raw(_lying(2**32, _BODY), close_early=True)),
    Case("upload/length_too_small", raw(_lying(len(_BODY) - 20, _BODY))),
]
