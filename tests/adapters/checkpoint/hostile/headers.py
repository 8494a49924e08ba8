"""Forged safetensors files and configs: each function gives the bytes of one attack."""

from __future__ import annotations

import io
import json
import pickle
import struct
from typing import Any

import torch

from adapters import errors

F32 = 4
DATA = bytes(3 * 8 * F32)
GOOD = {"dtype": "F32", "shape": [3, 8], "data_offsets": [0, len(DATA)]}


def with_header(header: bytes, data: bytes = DATA, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entries(data: bytes = DATA, **named: Any) -> bytes:
    return with_header(json.dumps(named).encode(), data)


def good() -> bytes:
    return entries(prompt_embeddings=GOOD)


def many_tensors(count: int) -> bytes:
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    return entries(b"", **{f"t{i}": empty for i in range(count)})


def torch_zip() -> bytes:
    file = io.BytesIO()
    torch.save({"prompt_embeddings": torch.zeros(3, 8)}, file)
    return file.getvalue()


def old_pickle() -> bytes:
    return pickle.dumps({"prompt_embeddings": [0.0] * 64}, protocol=4)


def _text(body: str, data: bytes = DATA) -> bytes:
    return with_header(body.encode(), data)


def _changed(**changes: Any) -> bytes:
    return entries(prompt_embeddings={**GOOD, **changes})


_ENTRY = json.dumps(GOOD)

# name -> (bytes of adapter_model.safetensors, the error that must come, words it must hold)
ATTACKS: dict[str, tuple[bytes, type[errors.CheckpointError], str]] = {
    "empty": (b"", errors.HeaderInvalid, "not a safetensors file"),
    "seven_bytes": (b"\1\0\0\0\0\0\0", errors.HeaderInvalid, "not a safetensors file"),
    "length_2_63": (with_header(b"{}", length=2**63), errors.HeaderInvalid, str(2**63)),
    "length_all_ones": (with_header(b"{}", length=2**64 - 1), errors.HeaderInvalid, "header"),
    "length_past_end": (with_header(b"{}", b"", length=3), errors.HeaderInvalid, "header"),
    "length_zero": (with_header(b"", b"{}"), errors.HeaderInvalid, "header"),
    "header_cut_short": (with_header(b'{"a":', b""), errors.HeaderInvalid, "not JSON"),
    "header_not_object": (with_header(b"[]"), errors.HeaderInvalid, "not a safetensors"),
    "header_leading_space": (with_header(b" {}", b""), errors.HeaderInvalid, "not a safetensors"),
    "header_not_utf8": (with_header(b'{"\xff":1}'), errors.HeaderInvalid, "UTF-8"),
    "header_over_limit": (
        with_header(b"{" + b" " * 3_000_000 + b"}"),
        errors.CheckpointTooLarge,
        "header",
    ),
    "300000_tensors": (many_tensors(300_000), errors.CheckpointTooLarge, "header"),
    "10000_tensors": (many_tensors(10_000), errors.CheckpointTooLarge, "10000 tensors"),
    "deep_nesting": (_text('{"a":' * 100_000), errors.HeaderInvalid, "nested"),
    "deep_lists": (_text('{"a":' + "[" * 100_000), errors.HeaderInvalid, "nested"),
    "duplicate_tensor": (_text(f'{{"a":{_ENTRY},"a":{_ENTRY}}}'), errors.HeaderInvalid, "twice"),
    "duplicate_field": (
        _text('{"a":{"dtype":"F32","dtype":"F32","shape":[3,8],"data_offsets":[0,96]}}'),
        errors.HeaderInvalid,
        "twice",
    ),
    "duplicate_by_escape": (
        _text(f'{{"a":{_ENTRY},"\\u0061":{_ENTRY}}}'),
        errors.HeaderInvalid,
        "twice",
    ),
    "nan": (
        _text('{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,96]}}'),
        errors.HeaderInvalid,
        "NaN",
    ),
    "surrogate_name": (_text(f'{{"\\ud800":{_ENTRY}}}'), errors.HeaderInvalid, "surrogate"),
    "metadata_not_object": (
        entries(__metadata__=["pt"], a=GOOD),
        errors.HeaderInvalid,
        "__metadata__",
    ),
    "metadata_number": (
        entries(__metadata__={"a": 1}, b=GOOD),
        errors.HeaderInvalid,
        "__metadata__",
    ),
    "entry_not_object": (entries(a=[1]), errors.HeaderInvalid, "exactly"),
    "entry_extra_field": (_changed(extra=1), errors.HeaderInvalid, "exactly"),
    "entry_field_missing": (
        entries(a={"dtype": "F32", "shape": []}),
        errors.HeaderInvalid,
        "exactly",
    ),
    "dtype_int": (_changed(dtype="I32"), errors.TensorMismatch, "I32"),
    "dtype_int64": (_changed(dtype="I64"), errors.TensorMismatch, "I64"),
    "dtype_bool": (_changed(dtype="BOOL"), errors.TensorMismatch, "BOOL"),
    "dtype_fp8": (_changed(dtype="F8_E4M3"), errors.TensorMismatch, "F8_E4M3"),
    "dtype_complex": (_changed(dtype="C64"), errors.TensorMismatch, "C64"),
    "dtype_unknown": (_changed(dtype="F33"), errors.TensorMismatch, "F33"),
    "dtype_list": (_changed(dtype=["F32"]), errors.TensorMismatch, "F32"),
    "dtype_huge": (_changed(dtype="F" * 100_000), errors.TensorMismatch, "..."),
    "shape_negative": (_changed(shape=[-3, -8]), errors.HeaderInvalid, "negative"),
    "shape_float": (_changed(shape=[3.0, 8]), errors.HeaderInvalid, "whole"),
    "shape_bool": (_changed(shape=[True, 24]), errors.HeaderInvalid, "whole"),
    "shape_string": (_changed(shape="38"), errors.HeaderInvalid, "list"),
    "shape_wrong_product": (_changed(shape=[3, 9]), errors.HeaderInvalid, "108 bytes"),
    "shape_wraps_64_bits": (_changed(shape=[2**31 - 1] * 8), errors.HeaderInvalid, "bytes"),
    "shape_empty_but_huge": (
        entries(b"", a={"dtype": "F32", "shape": [0, 10**12], "data_offsets": [0, 0]}),
        errors.CheckpointTooLarge,
        "limit",
    ),
    "shape_integer_of_5000_digits": (
        _text('{"a":{"dtype":"F32","shape":[' + "9" * 5000 + '],"data_offsets":[0,96]}}'),
        errors.HeaderInvalid,
        "64 bits",
    ),
    "rank_100000": (_changed(shape=[1] * 100_000), errors.CheckpointTooLarge, "limit"),
    "offsets_three": (_changed(data_offsets=[0, 96, 96]), errors.HeaderInvalid, "two"),
    "offsets_negative": (_changed(data_offsets=[-96, 0]), errors.HeaderInvalid, "negative"),
    "offsets_backwards": (_changed(data_offsets=[96, 0]), errors.HeaderInvalid, "-96"),
    "offsets_past_end": (entries(DATA[:-1], a=GOOD), errors.HeaderInvalid, "holds 95"),
    "trailing_bytes": (entries(DATA + b"x", a=GOOD), errors.HeaderInvalid, "holds 97"),
    "gap_at_start": (
        entries(DATA + b"0000", a={**GOOD, "data_offsets": [4, 100]}),
        errors.HeaderInvalid,
        "gap",
    ),
    "overlap": (entries(a=GOOD, b=GOOD), errors.HeaderInvalid, "overlaps"),
    "partial_overlap": (
        entries(DATA * 2, a=GOOD, b={**GOOD, "data_offsets": [92, 188]}),
        errors.HeaderInvalid,
        "overlaps",
    ),
    "pickle_of_torch": (torch_zip(), errors.UnsupportedFile, "torch.load('adapter_model.bin'"),
    "pickle_old": (old_pickle(), errors.UnsupportedFile, "torch.load('adapter_model.bin'"),
    "git_lfs_pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        errors.UnsupportedFile,
        "git lfs pull",
    ),
    "html": (b"<!DOCTYPE html><html></html>", errors.HeaderInvalid, "not a safetensors"),
}

# name -> (bytes of adapter_config.json, words the refusal must hold)
CONFIG_ATTACKS: dict[str, tuple[bytes, str]] = {
    "comment": (b'{\n  // mine\n  "peft_type": "IA3"\n}', "JSON has no comments; remove them"),
    "hash comment": (b'# mine\n{"peft_type": "IA3"}', "JSON has no comments"),
    "trailing comma": (b'{\n "peft_type": "IA3",\n}', "no comma after the last entry"),
    "python dict": (b"{'peft_type': 'IA3'}", "write it with json.dumps"),
    "python words": (b'{"peft_type": "IA3", "inference_mode": True}', "a Python dict"),
    "yaml": (b"peft_type: IA3\n", "looks like YAML"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
    "web page": (b"<!DOCTYPE html><html></html>", "a web page"),
    "empty": (b"", "the file is empty"),
    "utf-16": ('{"peft_type": "IA3"}'.encode("utf-16"), "iconv -f UTF-16 -t UTF-8"),
    "utf16": ("{}".encode("utf-16"), "UTF-8"),
    "not_json": (b"{'peft_type': 'IA3'}", "not JSON"),
    "trailing": (b"{} {}", "not JSON"),
    "list": (b"[]", "a list came"),
    "null": (b"null", "null came"),
    "nan": (b'{"a": NaN}', "NaN"),
    "infinity": (b'{"a": -Infinity}', "Infinity"),
    "float_overflow": (b'{"a": 1e999}', "too large"),
    "duplicate": (b'{"peft_type": "IA3", "peft_type": "LORA"}', "twice"),
    "duplicate_inside": (b'{"a": {"b": 1, "b": 2}}', "twice"),
    "deep": (b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}", "nested"),
    "deep_behind_a_string": (b'{"a\\"[": "]]]]", "b":' + b"[" * 50 + b"]" * 50 + b"}", "nested"),
    "huge_int": (b'{"num_virtual_tokens": ' + b"9" * 100_000 + b"}", "64 bits"),
    "int_2_63": (b'{"num_virtual_tokens": 9223372036854775808}', "64 bits"),
    "half_surrogate": (b'{"a": "\\ud800"}', "surrogate"),
    "quotes_that_make_scanners_quadratic": (b'{"' + b'\\"' * 400_000, "not JSON"),
}
