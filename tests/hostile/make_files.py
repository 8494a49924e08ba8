"""Makes the corpus in `files`: `python -m tests.hostile.make_files` writes it anew.

    tensors/    adapter_model.safetensors, sent with a sound config
    configs/    adapter_config.json, sent with sound weights
    archives/   sent as the only file
    rows/       data to train on
    bodies/     bodies of JSON routes, as bytes
    http/       whole requests, as bytes on a socket

The same bytes every time; `test_corpus.py` holds the files to it. Knows nothing of the replies.
"""

from __future__ import annotations

import gzip
import io
import json
import pickle
import stat
import struct
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.server.http_server import HEAD_DIM, KV_HEADS, LAYERS

FILES = Path(__file__).parent / "files"
NUM_TOKENS, WIDTH = 4, LAYERS * 2 * KV_HEADS * HEAD_DIM
NUM_BYTES = NUM_TOKENS * WIDTH * 4
ZEROS = bytes(NUM_BYTES)
ENTRY = {"dtype": "F32", "shape": [NUM_TOKENS, WIDTH], "data_offsets": [0, NUM_BYTES]}


def good_config(**changes: Any) -> dict[str, Any]:
    """PEFT's fields of a prefix of the tiny base that the tests serve."""
    return {
        "peft_type": "PREFIX_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny-base",
        "inference_mode": True,
        "num_virtual_tokens": NUM_TOKENS,
        "token_dim": KV_HEADS * HEAD_DIM,
        "num_transformer_submodules": 1,
        "num_attention_heads": KV_HEADS,
        "num_layers": LAYERS,
        "prefix_projection": False,
        "encoder_hidden_size": KV_HEADS * HEAD_DIM,
        **changes,
    }


def tensors(header: Mapping[str, Any] | bytes, data: bytes = ZEROS, length: int = -1) -> bytes:
    """A safetensors file with a header of any kind, and any length said of it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length < 0 else length) + text + data


def good_tensors() -> bytes:
    """Weights that fit `good_config`."""
    return tensors({"prompt_embeddings": ENTRY})


def pair() -> dict[str, bytes]:
    """The two files of a sound adapter."""
    return {
        "adapter_config.json": json.dumps(good_config()).encode(),
        "adapter_model.safetensors": good_tensors(),
    }


def zip_of(files: Mapping[str, bytes], *, mode: int = 0, method: int = zipfile.ZIP_STORED) -> bytes:
    """A zip, dated 1980; `mode` is the first member's kind of file."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in files.items():
            member = zipfile.ZipInfo(name)
            member.compress_type = method
            if mode:
                member.create_system, member.external_attr, mode = 3, mode << 16, 0
            archive.writestr(member, data)
    return out.getvalue()


def tar_of(files: Mapping[str, bytes], *extra: tarfile.TarInfo) -> bytes:
    """A tar with members that have no bytes before its files."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for member in extra:
            archive.addfile(member)
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def gzip_of(data: bytes) -> bytes:
    """Compressed, without a date."""
    return gzip.compress(data, 9, mtime=0)


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    """A tar's link, device or pipe."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def _changed(**changes: Any) -> bytes:
    return tensors({"prompt_embeddings": {**ENTRY, **changes}})


def _with_value(bits: bytes) -> bytes:
    return tensors({"prompt_embeddings": ENTRY}, ZEROS[: -len(bits)] + bits)


def _shaped(shape: list[int], dtype: str = "F32", element: int = 4) -> bytes:
    size = element
    for length in shape:
        size *= length
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}
    return tensors({"prompt_embeddings": entry}, bytes(size))


def _pickle_in_a_zip() -> bytes:
    # As torch.save lays it out; what would run on loading is harmless here.
    return zip_of(
        {"archive/data.pkl": b"\x80\x02cos\nsystem\nX\x04\0\0\0trueR.", "archive/data/0": b""}
    )


def tensor_files() -> dict[str, bytes]:
    """Weights, each with one thing wrong."""
    text = json.dumps(ENTRY)
    twice = f'{{"prompt_embeddings":{text},"prompt_embeddings":{text}}}'.encode()
    huge = {"dtype": "F32", "shape": [0, 10**12], "data_offsets": [0, 0]}
    half = {"dtype": "F32", "shape": [NUM_TOKENS, WIDTH], "data_offsets": [512, 512 + NUM_BYTES]}
    return {
        "pickle_in_a_zip": _pickle_in_a_zip(),
        "pickle_plain": pickle.dumps({"prompt_embeddings": [0.0] * 64}, protocol=4),
        "empty": b"",
        "html": b"<!DOCTYPE html><script>alert(1)</script>",
        "git_lfs_pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        "length_2_63": tensors(b"{}", length=2**63),
        "length_2_64_less_1": tensors(b"{}", length=2**64 - 1),
        "length_past_end": tensors(b"{}", b"", length=3),
        "header_not_utf8": tensors(b'{"\xff\xfe":1}'),
        "header_bom": tensors(b"\xef\xbb\xbf{}"),
        "header_nan": tensors(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}'),
        "overlap": tensors({"a": ENTRY, "b": half}, ZEROS + bytes(512)),
        "same_bytes_twice": tensors({"prompt_embeddings": ENTRY, "b": ENTRY}),
        "gap": tensors({"prompt_embeddings": half}, bytes(512) + ZEROS),
        "duplicate_key": tensors(twice),
        "trailing_bytes": tensors({"prompt_embeddings": ENTRY}, ZEROS + b"\0"),
        "cut_short": tensors({"prompt_embeddings": ENTRY}, ZEROS[:-1]),
        "shape_0_by_10_12": tensors({"prompt_embeddings": huge}, b""),
        "shape_negative": _changed(shape=[-NUM_TOKENS, -WIDTH]),
        "shape_wraps": _changed(shape=[2**31 - 1] * 8),
        "shape_5000_digits": tensors(
            b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}'
        ),
        "name_like_a_path": tensors({"../../../etc/cron.d/evil": ENTRY}),
        "name_with_control_characters": tensors({"a\nerror\x1b[31m\0b": ENTRY}),
        "name_half_a_surrogate": tensors(b'{"\\ud800":' + text.encode() + b"}"),
        "metadata_of_objects": tensors({"__metadata__": {"a": {}}, "prompt_embeddings": ENTRY}),
        "value_nan": _with_value(struct.pack("<f", float("nan"))),
        "value_infinity": _with_value(struct.pack("<f", float("inf"))),
        "value_minus_infinity": _with_value(struct.pack("<f", float("-inf"))),
        "float64_beyond_float32": tensors(
            {
                "prompt_embeddings": {
                    "dtype": "F64",
                    "shape": [NUM_TOKENS, WIDTH],
                    "data_offsets": [0, 2 * NUM_BYTES],
                }
            },
            bytes(2 * NUM_BYTES - 8) + struct.pack("<d", 1e300),
        ),
        "dtype_int32": _changed(dtype="I32"),
        "dtype_bool": _shaped([NUM_TOKENS, WIDTH], "BOOL", 1),
        "dtype_fp8": _shaped([NUM_TOKENS, WIDTH], "F8_E4M3", 1),
        "dtype_unknown": _changed(dtype="F33"),
        "width_one_more": _shaped([NUM_TOKENS, WIDTH + 1]),
        "width_of_three_layers": _shaped([NUM_TOKENS, WIDTH // LAYERS * 3]),
        "rows_one_more": _shaped([NUM_TOKENS + 1, WIDTH]),
        "rows_none": _shaped([0, WIDTH]),
        "rank_one": _shaped([NUM_TOKENS * WIDTH]),
        "tensor_of_another_method": tensors(
            {"base_model.model.model.layers.0.self_attn.k_proj.ia3_l": ENTRY}
        ),
        "tensor_too_many": tensors(
            {
                "prompt_embeddings": ENTRY,
                "z": {**ENTRY, "data_offsets": [NUM_BYTES, 2 * NUM_BYTES]},
            },
            2 * ZEROS,
        ),
        "no_tensor": tensors({}, b""),
    }


def _ia3(targets: str) -> dict[str, Any]:
    return {
        "peft_type": "IA3",
        "task_type": "CAUSAL_LM",
        "target_modules": targets,
        "feedforward_modules": [],
        "inference_mode": True,
    }


def config_files() -> dict[str, bytes]:
    """Configs, each with one thing wrong."""
    good = json.dumps(good_config()).encode()
    made = {
        "peft_type_lora": {"peft_type": "LORA"},
        "peft_type_unknown": {"peft_type": "<script>alert(1)</script>"},
        "peft_type_number": {"peft_type": 7},
        "peft_type_of_another_method": {"peft_type": "P_TUNING"},
        "task_type_other": {"task_type": "SEQ_2_SEQ_LM"},
        "layers_one_more": {"num_layers": LAYERS + 1},
        "layers_text": {"num_layers": "2; rm -rf /"},
        "field_of_a_fork": {"prefix_scale\x1b[31m": 2.0},
        "task_type_unset": {"task_type": None},
        "virtual_tokens_none": {"num_virtual_tokens": 0},
        "virtual_tokens_10_9": {"num_virtual_tokens": 10**9},
        "virtual_tokens_negative": {"num_virtual_tokens": -1},
        "virtual_tokens_text": {"num_virtual_tokens": "4; rm -rf /"},
        "modules_to_save": {"modules_to_save": ["lm_head"]},
    }
    return {name: json.dumps(good_config(**changes)).encode() for name, changes in made.items()} | {
        "ia3_for_the_tensors": json.dumps(_ia3("k_proj")).encode(),
        "ia3_regex": json.dumps(_ia3("(a+)+$")).encode(),
        "empty": b"",
        "comment": b"// mine\n" + good,
        "utf16": json.dumps(good_config()).encode("utf-16"),
        "invalid_utf8": good.replace(b"tiny-base", b"tiny\xff\xfe"),
        "list": b"[]",
        "duplicate_key": good[:-1] + b', "peft_type": "IA3"}',
        "nan": good[:-1] + b', "encoder_dropout": NaN}',
        "float_overflow": good[:-1] + b', "encoder_dropout": 1e999}',
        "integer_5000_digits": good.replace(b": 4,", b": " + b"9" * 5000 + b",", 1),
        "half_a_surrogate": good.replace(b"tiny-base", b"\\ud800"),
        "trailing": good + b"{}",
        "python_code": b"__import__('os').system('true')",
    }


def archive_files() -> dict[str, bytes]:
    """Archives that would leave their folder, or are not what they seem."""
    files = pair()
    stored = zip_of(files)
    encrypted = bytearray(stored)
    for signature, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        at = stored.find(signature)
        while at >= 0:
            encrypted[at + offset] |= 1
            at = stored.find(signature, at + 4)
    twice = zip_of({"bdapter_config.json": b"[]", **files}).replace(b"bdapter", b"adapter")
    return {
        "slip.zip": zip_of({"../../evil": b"x", **files}),
        "slip_inside.zip": zip_of({"a/../../evil": b"x", **files}),
        "slip_backslash.zip": zip_of({"..\\..\\evil": b"x", **files}),
        "absolute.zip": zip_of({"/etc/cron.d/evil": b"x", **files}),
        "drive.zip": zip_of({"C:\\evil": b"x", **files}),
        "symlink.zip": zip_of(
            {"adapter_model.safetensors": b"/etc/passwd"}, mode=stat.S_IFLNK | 0o777
        ),
        "device.zip": zip_of({"null": b"", **files}, mode=stat.S_IFCHR | 0o666),
        "encrypted.zip": bytes(encrypted),
        "name_twice.zip": twice,
        "lzma.zip": zip_of(files, method=zipfile.ZIP_LZMA),
        "cut_short.zip": stored[:-30],
        "flipped.zip": stored.replace(b"PREFIX_TUNING", b"PREFIX_TUNINH", 1),
        "two_adapters.zip": zip_of({f"{a}/{name}": d for a in "ab" for name, d in files.items()}),
        "too_deep.zip": zip_of({f"a/b/{name}": data for name, data in files.items()}),
        "pickle_only.zip": zip_of({"adapter_config.json": b"{}", "adapter_model.bin": b"\x80\2."}),
        "nothing.zip": zip_of({}),
        "slip.tar": tar_of({"../../evil": b"x", **files}),
        "absolute.tar": tar_of({"/etc/cron.d/evil": b"x", **files}),
        "symlink.tar": tar_of(files, special("a", tarfile.SYMTYPE, "/etc/passwd")),
        "symlink_as_weights.tar": tar_of(
            {}, special("adapter_model.safetensors", tarfile.SYMTYPE, "/etc/passwd")
        ),
        "hardlink.tar": tar_of(files, special("a", tarfile.LNKTYPE, "/etc/passwd")),
        "device.tar": tar_of(files, special("a", tarfile.CHRTYPE)),
        "block_device.tar": tar_of(files, special("a", tarfile.BLKTYPE)),
        "fifo.tar": tar_of(files, special("a", tarfile.FIFOTYPE)),
        "cut_short.tar": tar_of(files)[:1000],
        "broken.tar.gz": b"\x1f\x8bxxxxxxxxxxxxxxx",
        "cut_short.tar.gz": gzip_of(tar_of(files))[:-40],
        "gzip_of_no_tar.tar.gz": gzip_of(b"no tar at all" * 100),
        "seven.7z": b"7z\xbc\xaf\x27\x1c" + bytes(26),
    }


def row_files() -> dict[str, bytes]:
    """Data to train on: lines of JSON and CSV."""
    good = b'{"text": "a", "label": "x"}\n'
    return {
        "empty.jsonl": b"",
        "invalid_utf8.jsonl": good + b'{"text": "\xff", "label": "x"}\n',
        "not_json.jsonl": good + b"{'text': 'a'}\n",
        "list.jsonl": good + b"[1, 2]\n",
        "nested.jsonl": b'{"text": {"a": 1}, "label": "x"}\n',
        "deep.jsonl": b'{"text": ' + b"[" * 5000 + b"]" * 5000 + b"}\n",
        "integer_5000_digits.jsonl": b'{"text": ' + b"9" * 5000 + b', "label": "x"}\n',
        "duplicate_key.jsonl": b'{"text": "a", "text": "b", "label": "x"}\n',
        "mixed_types.jsonl": good + b'{"text": 1, "label": "x"}\n',
        "half_a_surrogate.jsonl": b'{"text": "\\ud800", "label": "x"}\n',
        "column_missing.jsonl": b'{"text": "a"}\n',
        "open_quote.csv": b'text,label\n"a,x\n',
        "nul.csv": b"text,label\na\0b,x\n",
        "too_many_cells.csv": b"text,label\na,x,y\n",
        "column_twice.csv": b"text,text\na,b\n",
    }


def body_files() -> dict[str, bytes]:
    """Bodies for JSON routes."""
    return {
        "empty": b"",
        "bom": b'\xef\xbb\xbf{"inputs": "a"}',
        "utf16": json.dumps({"inputs": "a"}).encode("utf-16"),
        "invalid_utf8": b'{"inputs": "\xff\xfe"}',
        "half_a_surrogate": b'{"inputs": "\\ud800"}',
        "list": b"[1]",
        "number": b"7",
        "null": b"null",
        "cut_short": b'{"inputs": "a"',
        "python": b"{'inputs': 'a'}",
        "temperature_nan": b'{"inputs": "a", "parameters": {"temperature": NaN}}',
        "temperature_infinity": b'{"inputs": "a", "parameters": {"temperature": Infinity}}',
        "temperature_1e999": b'{"inputs": "a", "parameters": {"temperature": 1e999}}',
        "max_tokens_5000_digits": b'{"inputs": "a", "parameters": {"max_new_tokens": '
        + b"9" * 5000
        + b"}}",
        "prototype": b'{"inputs": "a", "__proto__": {"x": 1}, "__class__": "a", "adapters": []}',
        "chat_nan": b'{"model": "tiny-base", "messages": [{"role": "user", "content": "a"}], '
        b'"temperature": NaN}',
    }


def http_files() -> dict[str, bytes]:
    """Requests that no client library would send."""
    body = b'{"inputs": "a", "parameters": {"max_new_tokens": 1}}'
    post = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    post += b"Content-Type: application/json\r\n"
    length = b"Content-Length: %d\r\n"
    get = b"GET /info HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    smuggled = b"0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n"
    return {
        "length_and_chunked": post
        + length % len(smuggled)
        + b"Transfer-Encoding: chunked\r\n\r\n"
        + smuggled,
        "two_lengths": post + length % 5 + length % len(body) + b"\r\n" + body,
        "length_negative": post + b"Content-Length: -1\r\n\r\n" + body,
        "length_with_a_sign": post + b"Content-Length: +5\r\n\r\n" + body,
        "length_hexadecimal": post + b"Content-Length: 0x34\r\n\r\n" + body,
        "length_of_30_digits": post + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n" + body,
        "encoding_unknown": post + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        "encoding_obscured": post + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
        "chunk_not_hexadecimal": post + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n" + body,
        "chunk_of_2_64": post + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n" + body,
        "no_host": b"GET /info HTTP/1.1\r\nConnection: close\r\n\r\n",
        "two_hosts": get.replace(b"Host: localhost\r\n", b"Host: localhost\r\nHost: 127.0.0.1\r\n")
        + b"\r\n",
        "header_folded": get + b"X-Request-Id: a\r\n b: c\r\n\r\n",
        "header_with_nul": get + b"X-Request-Id: a\0b\r\n\r\n",
        "header_with_lone_cr": get + b"X-Request-Id: a\rX-Admin: 1\r\n\r\n",
        "header_without_colon": get + b"nonsense\r\n\r\n",
        "target_with_nul": get.replace(b"/info", b"/inf\0o") + b"\r\n",
        "method_unknown": get.replace(b"GET", b"BREW") + b"\r\n",
        "version_9": get.replace(b"HTTP/1.1", b"HTTP/9.9") + b"\r\n",
        "tls_hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64),
        "websocket": get.replace(b"Connection: close", b"Connection: Upgrade, close")
        + b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        + b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n",
    }


def corpus() -> dict[str, bytes]:
    """Path below `files` -> bytes."""
    folders = {
        ("tensors", ".safetensors"): tensor_files(),
        ("configs", ".json"): config_files(),
        ("archives", ""): archive_files(),
        ("rows", ""): row_files(),
        ("bodies", ".json"): body_files(),
        ("http", ".http"): http_files(),
    }
    return {
        f"{folder}/{name}{suffix}": data
        for (folder, suffix), files in folders.items()
        for name, data in files.items()
    }


def main() -> None:
    """Write every file of the corpus."""
    for name, data in corpus().items():
        path = FILES / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


if __name__ == "__main__":
    main()
