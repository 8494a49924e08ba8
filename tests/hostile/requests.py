"""Hostile requests to every other route: bodies, parameters, paths, headers, and bare sockets."""

from __future__ import annotations

import json
from typing import Any

from tests.hostile.case import Case, names, raw, read, request
from tests.hostile.make_files import gzip_of
from tests.hostile.served import MIB

_JSON = {"content-type": "application/json"}
# A million million million levels once it is unfolded.
_LAUGHS: dict[str, Any] = {
    "$defs": {
        f"a{level}": {
            "type": "object",
            "properties": {key: {"$ref": f"#/$defs/a{level + 1}"} for key in "xyz"},
            "required": ["x", "y", "z"],
        }
        for level in range(40)
    }
    | {"a40": {"type": "string"}},
    "$ref": "#/$defs/a0",
}
_TRAIN: dict[str, Any] = {
    "adapter": "evil",
    "method": "prompt_tuning",
    "config": {"num_virtual_tokens": 2},
    "rows": [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}],
    "template": "{text} :",
    "target": "label",
    "hyperparameters": {"max_steps": 1},
}
_CHAT = {"model": "tiny-base", "messages": [{"role": "user", "content": "a"}]}


def post(path: str, body: Any) -> Any:
    """A JSON body, as an object or as bytes."""
    content = body if isinstance(body, bytes) else _dumped(body)
    return request("POST", path, content=content, headers=_JSON)


def generate(**parameters: Any) -> Any:
    return post("/generate", {"inputs": "a", "parameters": parameters})


def complete(**changes: Any) -> Any:
    return post(
        "/v1/completions", {"model": "tiny-base", "prompt": "a", "max_tokens": 1, **changes}
    )


def chat(**changes: Any) -> Any:
    return post("/v1/chat/completions", {**_CHAT, **changes})


def schema(value: Any) -> Any:
    return complete(response_format={"type": "json_schema", "json_schema": {"schema": value}})


def train(**changes: Any) -> Any:
    return post("/train", {**_TRAIN, **changes})


def rows(name: str) -> Any:
    """A file of rows, in a form with a sound job."""
    job = {key: value for key, value in _TRAIN.items() if key != "rows"}
    return request(
        "POST",
        "/train",
        data={"job": json.dumps(job)},
        files={"data": (name, read(f"rows/{name}"))},
    )


def _dumped(body: Any) -> bytes:
    return json.dumps(body).encode()  # NaN as Python writes it


def _deep(depth: int = 100_000) -> bytes:
    return b'{"inputs":' + b"[" * depth + b"]" * depth + b"}"


def _nested(levels: int) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        found = {"type": "object", "properties": {"a": found}}
    return found


_JSON_ROUTES = (
    "/",
    "/generate",
    "/generate_stream",
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/responses",
    "/classify",
    "/tokenize",
    "/detokenize",
    "/train",
    "/adapters/combine",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/v1/fine_tuning/jobs",
    "/adapters/complaints/rollback",
)

# One of each shape of error.
_FEW = ("/generate", "/v1/completions", "/adapters/combine", "/train")

_PARAMETERS: dict[str, dict[str, Any]] = {
    "temperature_negative": {"temperature": -1},
    "temperature_text": {"temperature": "hot"},
    "max_new_tokens_10_9": {"max_new_tokens": 10**9},
    "max_new_tokens_2_63": {"max_new_tokens": 2**63},
    "max_new_tokens_negative": {"max_new_tokens": -1},
    "max_new_tokens_half": {"max_new_tokens": 1.5},
    "top_k_2_70": {"top_k": 2**70},
    "top_p_2": {"top_p": 2},
    "top_n_tokens_10_9": {"top_n_tokens": 10**9},
    "best_of_10_9": {"best_of": 10**9},
    "seed_2_70": {"seed": 2**70},
    "stop_10000": {"stop": ["x"] * 10_000},
    "stop_empty": {"stop": [""]},
    "stop_1_mib": {"stop": ["x" * MIB]},
    "repetition_penalty_none": {"repetition_penalty": 0},
    "adapter_id_way_out": {"adapter_id": "../../etc/passwd"},
    "adapter_id_nul": {"adapter_id": "a\0b"},
    "adapter_id_url": {"adapter_id": "https://169.254.169.254/latest"},
    "adapter_id_list": {"adapter_id": ["complaints"]},
    "grammar_regex_bomb": {"grammar": {"type": "regex", "value": "((a{1000}){1000}){1000}"}},
    "grammar_regex_broken": {"grammar": {"type": "regex", "value": "(" * 4000}},
    "grammar_python": {"grammar": {"type": "python", "value": "import os"}},
}
_PROMPTS: dict[str, Any] = {
    "of_no_tokens": [],
    "of_an_empty_list": [[]],
    "empty_text": "",
    "id_10_9": [10**9],
    "id_negative": [-1],
    "id_2_63": [2**63],
    "id_5000_digits": None,  # filled in below
    "mixed": ["a", 1],
    "object": {"a": 1},
    "100000_prompts": ["a"] * 100_000,
    "100000_tokens": [5] * 100_000,
    "half_a_surrogate": "\ud800",
}
_SCHEMAS: dict[str, Any] = {
    "laughs": _LAUGHS,
    "depth_400": _nested(400),
    "reference_to_a_url": {"$ref": "http://127.0.0.1:1/schema.json"},
    "reference_to_a_file": {"$ref": "file:///etc/passwd"},
    "reference_to_itself": {"$ref": "#"},
    "items_10_9": {"type": "array", "minItems": 10**9, "items": {"type": "string"}},
    "pattern_bomb": {"type": "string", "pattern": "(((a{500}){500}){500}){500}"},
    "pattern_looks_ahead": {"type": "string", "pattern": "(?=(a+)+)b"},
    "enum_of_100000": {"enum": [str(number) for number in range(100_000)]},
    "length_10_12": {"type": "string", "minLength": 10**12},
    "nothing_fits": {"allOf": [{"type": "string"}, {"type": "integer"}]},
    "list": [],
}
_TRAININGS: dict[str, dict[str, Any]] = {
    "name_way_out": {"adapter": "../../etc/evil"},
    "name_right_to_left": {"adapter": "a\u202eb"},
    "name_300_characters": {"adapter": "a" * 300},
    "name_case_twin": {"adapter": "Complaints"},
    "name_of_the_base": {"adapter": "tiny-base"},
    "method_unknown": {"method": "__import__"},
    "virtual_tokens_10_9": {"config": {"num_virtual_tokens": 10**9}},
    "virtual_tokens_nan": {"config": {"num_virtual_tokens": float("nan")}},
    "config_unknown": {"config": {"tokenizer_name_or_path": "/etc", "trust_remote_code": True}},
    "template_attribute": {"template": "{text.__class__}"},
    "template_jinja": {"template": "{% for x in range(10**9) %}{% endfor %}"},
    "template_1_million": {"template": "{text}" + "a" * 1_000_000},
    "target_missing": {"target": "nowhere"},
    "rows_none": {"rows": []},
    "rows_nested": {"rows": [{"text": {"a": [1]}, "label": "x"}]},
    "rows_half_a_surrogate": {"rows": [{"text": "\ud800", "label": "x"}]},
    "rows_too_long": {"rows": [{"text": "a " * 5_000, "label": "x"}]},
    "rows_2_70": {"rows": [{"text": 2**70, "label": "x"}]},
    "learning_rate_nan": {"hyperparameters": {"learning_rate": float("nan")}},
    "epochs_10_9": {"hyperparameters": {"epochs": 10**9}},
    "batch_10_9": {"hyperparameters": {"batch_size": 10**9}},
    "seed_2_70": {"hyperparameters": {"seed": 2**70}},
    "labels_twice": {"labels": ["x", "x"]},
    "unknown_field": {"callback_url": "http://127.0.0.1:1/"},
}
_COMBINE: dict[str, dict[str, Any]] = {
    "weights_nan": {"weights": [float("nan"), 1]},
    "weights_1e308": {"weights": [1e308, 1e308]},
    "weights_too_few": {"weights": [1]},
    "adapters_10000": {"adapters": ["complaints"] * 10_000, "weights": [1] * 10_000},
    "adapters_none": {"adapters": [], "weights": []},
    "adapter_way_out": {"adapters": ["../../x", "complaints"]},
    "name_way_out": {"name": "../evil"},
    "name_taken": {"name": "other"},
    "type_unknown": {"combination_type": "svd; rm"},
    "unknown_field": {"path": "/etc"},
}
_LOADS: dict[str, Any] = {
    "etc": "/etc",
    "dots": "../../../etc",
    "url": "http://169.254.169.254/latest/meta-data",
    "hub_id": "somebody/adapter",
    "nul": "a\0b",
    "link_out": "way-out",
    "10000_characters": "a" * 10_000,
    "half_a_surrogate": "\ud800",
    "file_url": "file:///etc/passwd",
    "list": ["/etc"],
    "home": "~root",
}
_CLASSIFY: dict[str, dict[str, Any]] = {
    "inputs_none": {"inputs": []},
    "inputs_100000": {"inputs": ["a"] * 100_000},
    "labels_none": {"labels": []},
    "labels_100000": {"labels": [str(number) for number in range(100_000)]},
    "label_empty": {"labels": ["", "a"]},
    "label_twice": {"labels": ["a", "a"]},
    "half_a_surrogate": {"inputs": "\ud800"},
    "too_long": {"inputs": "a " * 5_000},
    "normalization_unknown": {"normalization": "eval"},
    "column_attribute": {"inputs": None, "row": {"Tweet text.__class__": "a"}},
    "value_nested": {"inputs": None, "row": {"Tweet text": {"a": {}}}},
}
# method and target -> as they are sent; what is not printable is quoted
_PATHS: dict[str, tuple[str, str]] = {
    "way_out": ("GET", "/adapters/..%2f..%2fetc%2fpasswd"),
    "way_out_in_download": ("GET", "/adapters/..%2f../download"),
    "nul": ("GET", "/adapters/a%00b"),
    "line_break": ("GET", "/adapters/a%0d%0alevel=error%20event=forged"),
    "escape": ("GET", "/adapters/%1b%5b31mred"),
    "right_to_left": ("GET", "/adapters/a%e2%80%aeb"),
    "not_utf8": ("GET", "/adapters/%ff%fe"),
    "300_characters": ("GET", "/adapters/" + "a" * 300),
    "case_twin": ("GET", "/adapters/COMPLAINTS"),
    "script": ("GET", "/%3Cscript%3Ealert(1)%3C/script%3E"),
    "delete_dots": ("DELETE", "/adapters/%2e%2e"),
    "alias_way_out": ("PUT", "/adapters/complaints/aliases/..%2f..%2fx"),
    "version_negative": ("GET", "/adapters/complaints/download?version=-1"),
    "version_5000_digits": ("GET", "/adapters/complaints/download?version=" + "9" * 4300),
    "version_2_63": ("GET", f"/adapters/complaints/download?version={2**63}"),
    "offset_2_63": ("GET", f"/adapters?offset={2**63}"),
    "limit_10_9": ("GET", "/adapters?limit=1000000000"),
    "query_unknown": ("GET", "/adapters?sort=%3Cscript%3E"),
    "query_line_break": ("GET", "/adapters?%0aforged=1"),
    "model_way_out": ("GET", "/v1/models/..%2f..%2fetc%2fpasswd"),
    "job_way_out": ("GET", "/train/..%2f..%2fetc%2fpasswd"),
    "job_log_way_out": ("GET", "/train/..%2f../log"),
    "job_sql": ("GET", "/train/'%20OR%201=1%20--"),
    "file_way_out": ("GET", "/v1/files/..%2f..%2fregistry.db/content"),
    "file_delete_way_out": ("DELETE", "/v1/files/..%2fregistry.db"),
    "trace": ("TRACE", "/generate"),
    "unknown_method": ("PROPFIND", "/adapters"),
    "slash_at_the_end": ("GET", "/adapters/"),
}


def _adapter_queries() -> list[Case]:
    body = _dumped({"inputs": "a", "parameters": {"max_new_tokens": 1}})
    queries = {
        "empty": "adapter=",
        "twice": "adapter=complaints&adapter=other",
        "way_out": "adapter=..%2f..%2fetc",
        "nul": "adapter=a%00b",
        "line_break": "adapter=a%0d%0ax-admin:%201",
        "case_twin": "adapter=Complaints",
        "version_5000_digits": "adapter=complaints@" + "9" * 5000,
        "version_zero": "adapter=complaints@0",
        "unknown": "adaptor=complaints",
        "upper_case": "ADAPTER=complaints",
        "not_utf8": "adapter=%ff",
        "half_a_surrogate": "adapter=%ed%a0%80",
        "10000_parameters": "&".join(f"p{n}=1" for n in range(5_000)),
    }
    return [
        Case(f"query/{name}", request("POST", f"/generate?{q}", content=body, headers=_JSON))
        for name, q in queries.items()
    ]


def _http_cases() -> list[Case]:
    post_head = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    post_head += b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    body = b'{"inputs": "a", "parameters": {"max_new_tokens": 1}}'
    made = {
        "length_too_large": post_head % (len(body) + 1) + body,
        "length_too_small": post_head % (len(body) - 1) + body,
        "length_of_4_gib": post_head % 2**32 + body,
    }
    made |= {name: read(f"http/{name}") for name in names("http")}
    return [
        Case(f"http/{name}", raw(data, close_early=name in _WAITS)) for name, data in made.items()
    ]


# The server waits for more of these, as it should.
_WAITS = {"length_too_large", "length_of_4_gib", "chunk_of_2_64.http"}
_FILE = {"file": ("a.jsonl", b"{}\n")}
_PROMPTS["id_5000_digits"] = b'{"model": "tiny-base", "prompt": [' + b"9" * 5000 + b"]}"

CASES = [
    *(
        Case(f"bodies/{name}", post("/generate", read(f"bodies/{name}")))
        for name in names("bodies")
        if not name.startswith("chat")
    ),
    Case("bodies/chat_nan.json", post("/v1/chat/completions", read("bodies/chat_nan.json"))),
    *(Case(f"depth{path}", post(path, _deep())) for path in _JSON_ROUTES),
    *(Case(f"not_utf8{path}", post(path, b'{"a": "\xff"}')) for path in _FEW),
    *(Case(f"digits{path}", post(path, b'{"a": ' + b"9" * 5000 + b"}")) for path in _FEW),
    *(
        Case(
            f"gzip{path}",
            request(
                "POST",
                path,
                content=gzip_of(b'{"inputs": "a"}'),
                headers={**_JSON, "content-encoding": "gzip"},
            ),
        )
        for path in _FEW
    ),
    *(Case(f"generate/{name}", generate(**changes)) for name, changes in _PARAMETERS.items()),
    *(
        Case(
            f"prompt/{name}",
            post("/v1/completions", prompt)
            if isinstance(prompt, bytes)
            else complete(prompt=prompt),
        )
        for name, prompt in _PROMPTS.items()
    ),
    Case("generate/no_tokens", post("/generate", {"inputs": ""})),
    Case("generate/too_long", post("/generate", {"inputs": "a " * 100_000})),
    Case("generate/9_mib", post("/generate", {"inputs": "a" * 9 * MIB})),
    Case("generate/row_attribute", post("/generate?adapter=complaints", {"row": {"a.b": "x"}})),
    Case("generate/text_type", request("POST", "/generate", content=b"a")),
    Case("openai/max_tokens_10_9", complete(max_tokens=10**9)),
    Case("openai/n_10_9", complete(n=10**9)),
    Case("openai/logprobs_10_9", complete(logprobs=10**9)),
    Case("openai/temperature_infinity", complete(temperature=float("inf"))),
    Case("openai/bias_of_10000", chat(logit_bias={str(n): 1 for n in range(10_000)})),
    Case("openai/bias_of_a_far_token", chat(logit_bias={"1000000000": 1})),
    Case("openai/bias_nan", chat(logit_bias={"1": float("nan")})),
    Case("openai/messages_none", chat(messages=[])),
    Case("openai/role_unknown", chat(messages=[{"role": "root\x1b[31m", "content": "a"}])),
    Case("openai/image_url", chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}])),
    Case("openai/chat_template", chat(chat_template="{{ ''.__class__.__mro__ }}")),
    Case("openai/model_way_out", chat(model="../../etc/passwd")),
    Case("openai/model_nul", chat(model="a\0b")),
    *(Case(f"schema/{name}", schema(value)) for name, value in _SCHEMAS.items()),
    *(Case(f"train/{name}", train(**changes)) for name, changes in _TRAININGS.items()),
    *(Case(f"rows/{name}", rows(name)) for name in names("rows")),
    *(
        Case(
            f"combine/{name}",
            post(
                "/adapters/combine",
                {
                    "name": "evil",
                    "adapters": ["complaints", "other"],
                    "weights": [1, 1],
                    "combination_type": "linear",
                    **changes,
                },
            ),
        )
        for name, changes in _COMBINE.items()
    ),
    *(
        Case(
            f"load/{name}", post("/v1/load_lora_adapter", {"lora_name": "evil", "lora_path": path})
        )
        for name, path in _LOADS.items()
    ),
    Case(
        "load/name_way_out",
        post("/v1/load_lora_adapter", {"lora_name": "../evil", "lora_path": "a"}),
    ),
    *(
        Case(f"classify/{name}", post("/classify?adapter=complaints", {"inputs": "a", **changes}))
        for name, changes in _CLASSIFY.items()
    ),
    Case("tokenize/object", post("/tokenize", {"inputs": {"a": 1}})),
    Case("tokenize/half_a_surrogate", post("/tokenize", {"inputs": "\ud800"})),
    Case("detokenize/id_10_9", post("/detokenize", {"tokens": [10**9]})),
    Case("detokenize/id_negative", post("/detokenize", {"tokens": [-1]})),
    Case("detokenize/id_2_70", post("/detokenize", {"tokens": [2**70]})),
    Case("files/no_purpose", request("POST", "/v1/files", files=_FILE)),
    Case(
        "files/purpose_unknown",
        request("POST", "/v1/files", data={"purpose": "evil\n"}, files=_FILE),
    ),
    Case("files/none", request("POST", "/v1/files", files={"purpose": (None, "fine-tune")})),
    Case("files/form", request("POST", "/v1/files", data={"purpose": "fine-tune"})),
    Case(
        "tuning/file_way_out",
        post("/v1/fine_tuning/jobs", {"model": "tiny-base", "training_file": "../../registry.db"}),
    ),
    Case(
        "tuning/webhook",
        post(
            "/v1/fine_tuning/jobs",
            {"model": "tiny-base", "training_file": "file-0", "integrations": [{"type": "wandb"}]},
        ),
    ),
    Case("rollback/version_2_63", post("/adapters/complaints/rollback", {"version": 2**63})),
    *_adapter_queries(),
    *(Case(f"paths/{name}", request(*target)) for name, target in _PATHS.items()),
    *_http_cases(),
]
