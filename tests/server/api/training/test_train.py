"""`/train` on a real server whose jobs wait: what is taken, refused, followed and cancelled.

The store is the real one, so that a test can do a worker's part of a job by hand.
"""

from __future__ import annotations

import asyncio
import json
import threading

import pytest
import sqlalchemy

from server.api.training.train import event_frames
from server.store.job_feed import JobFeed
from server.store.job_limits import QueueLimits
from server.store.jobs import Claim, JobStore
from tests.server.conftest import make_settings
from tests.server.http_server import running_server, save_prefix_adapter, upload
from tests.server.jobs.examples import EXAMPLES, a_job

ROWS = [
    {"text": f"the tweet number {n}", "label": "complaint" if n % 2 else "no complaint"}
    for n in range(12)
]
JOB = {
    "adapter": "tweets",
    "method": "ia3",
    "template": "Tweet text : {text} Label :",
    "target": "label",
    "labels": ["complaint", "no complaint"],
    "hyperparameters": {"epochs": 2},
}
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def waiting(tiny_base, tmp_path_factory):
    """A server that runs no job by itself, with one adapter."""
    home = tmp_path_factory.mktemp("train")
    settings = make_settings(
        tiny_base, home / "data", train_workers=0, max_body_mib=1, max_data_mib=1
    )
    with running_server(settings) as client:
        assert upload(client, save_prefix_adapter(home / "a"), "taken").status_code == 201
        yield client


def assert_stored(waiting, job_id):
    """Every row of `ROWS` is stored as the tokens of its prompt and target."""
    services = waiting.app_services()
    decode = services.need_generator().tokenizer.decode
    found = services.jobs.examples(job_id).train
    assert [decode(example.prompt_ids) for example in found] == [
        f"Tweet text : {row['text']} Label :" for row in ROWS
    ]
    assert [decode(example.target_ids) for example in found] == [
        f" {row['label']}</s>" for row in ROWS
    ]


@pytest.fixture
def job(waiting):
    """The id of a queued job; ended and deleted afterwards."""
    job_id = waiting.post("/train", json={**JOB, "rows": ROWS}).json()["id"]
    yield job_id
    store = waiting.app_services().jobs
    for record, token, _ in store.running():
        store.finish(Claim(record.id, token), "cancelled")
    waiting.post(f"/train/{job_id}/cancel")
    waiting.delete(f"/train/{job_id}")


def post(client, job, query=""):
    """Not httpx's own JSON, which cannot say everything that JSON can."""
    content = job if isinstance(job, bytes) else json.dumps(job).encode()
    return client.post(f"/train{query}", content=content, headers=JSON)


def events_of(text):
    """(id, event, data) of every frame that is not a comment."""
    found = []
    for frame in text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in frame.splitlines() if not line.startswith(":"))
        if lines:
            found.append((int(lines["id"]), lines["event"], json.loads(lines["data"])))
    return found


# --- asking --------------------------------------------------------------------------------


def test_a_job_has_every_default_resolved(waiting, job):
    shown = waiting.get(f"/train/{job}").json()
    assert shown["id"] == job
    assert shown["state"] == "queued"
    assert (shown["adapter"], shown["method"], shown["peft_type"]) == ("tweets", "ia3", "IA3")
    assert shown["config"]["peft_type"] == "IA3"
    assert shown["config"]["target_modules"]
    assert shown["hyperparameters"]["epochs"] == 2
    assert shown["hyperparameters"]["learning_rate"] > 0
    assert shown["trainable_params"] > 0
    assert shown["num_rows"] == 12
    assert shown["target_separator"] == " "
    assert shown["append_eos"] is True
    assert shown["metrics"] is shown["error"] is shown["started_at"] is None
    assert_stored(waiting, job)


def test_the_reply_is_202_with_its_place(waiting, job):
    reply = waiting.post("/train", json={**JOB, "rows": ROWS})
    assert reply.status_code == 202
    assert reply.headers["location"] == f"/train/{reply.json()['id']}"
    assert waiting.get(reply.headers["location"]).json() == reply.json()
    assert waiting.post(f"/train/{reply.json()['id']}/cancel").status_code == 200
    assert waiting.delete(f"/train/{reply.json()['id']}").status_code == 200


def test_every_method_is_taken(waiting):
    for method, more in (
        ("prefix_tuning", {}),
        ("prefix_tuning", {"config": {"prefix_projection": True, "encoder_hidden_size": 8}}),
        ("p_tuning_v2", {"init_text": "the tweet"}),
        ("p_tuning", {}),
        ("ia3", {}),
        ("cpt", {"context_examples": 4}),
        ("prompt_tuning", {"config": {"num_virtual_tokens": 3}}),
    ):
        job = {**JOB, "method": method, "rows": ROWS, **more}
        reply = waiting.post("/train?dry_run=true", json=job)
        assert reply.status_code == 200, reply.text
        expected = "prefix_tuning" if method == "p_tuning_v2" else method
        assert reply.json()["method"] == expected


def test_a_dry_run_shows_three_rows_and_stores_nothing(waiting):
    before = waiting.get("/train").json()["total"]
    reply = waiting.post("/train?dry_run=true", json={**JOB, "rows": ROWS})
    assert reply.status_code == 200
    body = reply.json()
    assert "id" not in body
    assert len(body["preview"]) == 3
    first = body["preview"][0]
    assert first["text"] == "Tweet text : the tweet number 0 Label : no complaint"
    assert len(first["tokens"]) == len(first["ids"])
    assert "".join(token for token in first["tokens"] if token) == first["text"]
    assert body["lengths"]["min"] <= body["lengths"]["mean"] <= body["lengths"]["max"]
    assert body["trainable_params"] > 0
    assert body["config"]["peft_type"] == "IA3"
    assert waiting.get("/train").json()["total"] == before


def as_jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_csv(rows):
    return ("text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in rows)).encode()


@pytest.mark.parametrize(
    ("name", "data", "kind"),
    [
        ("rows.jsonl", as_jsonl(ROWS), "application/octet-stream"),
        ("ROWS.CSV", as_csv(ROWS), "application/octet-stream"),
        ("rows", as_jsonl(ROWS), "application/x-ndjson"),
        ("rows.txt", as_csv(ROWS), "text/csv; charset=utf-8"),
        ("rows.csv", as_jsonl(ROWS), "text/csv"),
        ("", as_csv(ROWS), "application/octet-stream"),
    ],
)
def test_rows_in_a_file_are_the_same_job(waiting, name, data, kind):
    inline = waiting.post("/train?dry_run=true", json={**JOB, "rows": ROWS})
    form = {"job": json.dumps(JOB)}
    reply = waiting.post("/train?dry_run=true", data=form, files={"data": (name, data, kind)})
    assert reply.status_code == 200, reply.text
    found = reply.json()
    assert found.pop("data")["layout"] == ("CSV" if b"text,label" in data else "JSON lines")
    told = inline.json()
    assert told.pop("data")["layout"] == "rows"
    assert found == told


def dry_run(client, data, **job):
    """A dry run of a file, without the template and the target of `JOB`."""
    words = {"adapter": "mine", "method": "ia3", **job}
    form = {"job": json.dumps(words)}
    return client.post("/train?dry_run=true", data=form, files={"data": ("data", data)})


ALPACA = [
    {"instruction": "介绍地球", "input": "", "output": "地球是行星。"},
    {"instruction": "翻译", "input": "hello", "output": "你好", "history": [["a", "b"]]},
]
SHAPES = {
    "alpaca": (ALPACA, "### Instruction:\n介绍地球\n\n### Response:", "\n地球是行星。"),
    "adgen": ([{"content": "类型#裤", "summary": "宽松"}, {"content": "a", "summary": "b"}],
              "类型#裤", "\n宽松"),
    "prompt_completion": ([{"kind": "NLI", "input": "甲", "target": "乙"},
                           {"kind": "NLI", "input": "丙", "target": "丁"}], "甲", "\n乙"),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_rows_of_a_known_shape_need_no_template(waiting, name):
    rows, prompt, target = SHAPES[name]
    found = dry_run(waiting, json.dumps(rows, ensure_ascii=False).encode())
    assert found.status_code == 200, found.text
    body = found.json()
    assert (body["format"], body["data"]["layout"]) == (name, "JSON array")
    assert (body["preview"][0]["prompt"], body["preview"][0]["target"]) == (prompt, target)
    named = post(
        waiting, {"adapter": "a", "method": "ia3", "rows": rows, "format": name}, "?dry_run=1"
    )
    assert named.json()["preview"] == body["preview"]
    wrong = dry_run(waiting, b"text,label\na,x\n", format=name)
    assert (wrong.status_code, wrong.json()["field"]) == (422, "format")
    assert "'text', 'label'" in wrong.json()["error"]


def test_a_template_is_taken_before_a_known_shape(waiting):
    words = {"template": "Human: {instruction}\n{input}\n\nAssistant: ", "target": "output"}
    data = json.dumps(ALPACA, ensure_ascii=False).encode()
    body = dry_run(waiting, data, **words).json()
    assert body["format"] == "columns"
    assert body["preview"][0]["prompt"] == "Human: 介绍地球\n\n\nAssistant:"
    assert body["warnings"] == [
        "column 'input' is empty in 1 of 2 rows (row 1), which leaves a blank line in the prompt; "
        "{?input} leaves the line out"
    ]
    words["template"] = words["template"].replace("{input}", "{?input}")
    body = dry_run(waiting, data, **words).json()
    assert body["preview"][0]["prompt"] == "Human: 介绍地球\n\nAssistant:"
    assert body["preview"][1]["prompt"] == "Human: 翻译\nhello\n\nAssistant:"
    assert body["warnings"] == []


def test_what_is_missing_for_a_prompt_is_said_with_the_columns(waiting):
    neither = dry_run(waiting, as_csv(ROWS))
    assert (neither.status_code, neither.json()["field"]) == (422, "template")
    told = neither.json()["error"]
    assert told.startswith(
        "template and target are missing; give both for the columns of the data, 'text', 'label', or"
    )
    assert told.endswith("if it is data, put a line with the names before it")
    inline = post(waiting, {"adapter": "a", "method": "ia3", "rows": ROWS}, "?dry_run=1").json()
    assert "template and target are missing" in inline["error"]
    assert "first line" not in inline["error"]
    one = dry_run(waiting, as_csv(ROWS), template="{text}")
    assert (one.status_code, one.json()["field"]) == (422, "target")
    chat = dry_run(waiting, as_jsonl([{"messages": [{"role": "user", "content": "Who?"}]}]))
    assert (chat.status_code, chat.json()["field"]) == (422, "data")
    assert "no chat template" in chat.json()["error"]


def test_a_dry_run_shows_what_was_understood(waiting):
    text = 'id;review;label\r\n1;房间;1\r\n2;;0\r\n3;"好; 很好";1\r\n4;x;0\r\n5;y;0\r\n6;z;1\r\n'
    words = {
        "template": "{review} 评价：",  # noqa: RUF001
        "target": "label",
        "label_names": {"0": "差", "1": "好"},
    }
    body = dry_run(waiting, text.encode("utf-16"), **words).json()
    assert body["data"] == {
        "format": "columns",
        "layout": "CSV",
        "encoding": "UTF-16",
        "separator": "semicolon",
        "columns_used": ["review", "label"],
        "columns_unused": ["id"],
    }
    assert body["warnings"] == ["column 'review' is empty in 1 of 6 rows (row 2)"]
    # A byte-level tokenizer: each of these characters is several tokens.
    first = body["preview"][0]
    assert "\\xe6" in first["tokens"]
    assert not {"房", "间"} & set(first["tokens"])
    named = dry_run(waiting, "问,答\n头痛怎么办,信息\n".encode("gb18030"), **words).json()
    assert "iconv -f gb18030" in named["error"]


def test_labels_that_were_not_given_are_inferred_and_said(waiting):
    rows = [{"text": f"t {n}", "label": n % 3} for n in range(12)]
    words = {"adapter": "a", "method": "ia3", "template": "{text}", "target": "label"}
    options = {"hyperparameters": {"validation_split": 0.25}}
    body = post(waiting, {**words, **options, "rows": rows}, "?dry_run=1").json()
    assert (body["labels"], body["labels_inferred"]) == (["0", "1", "2"], True)
    assert "labels were not given" in body["warnings"][0]
    assert "the labels are numbers" in body["warnings"][1]
    assert (body["num_validation_rows"], body["num_held_out"], body["num_train"]) == (3, 3, 9)
    declined = post(waiting, {**words, "rows": rows, "infer_labels": False}, "?dry_run=1").json()
    assert (declined["labels"], declined["labels_inferred"], declined["warnings"]) == (
        None,
        False,
        [],
    )


def test_a_form_that_is_stored(waiting):
    files = {"data": ("rows.csv", as_csv(ROWS))}
    reply = waiting.post("/train", data={"job": json.dumps(JOB)}, files=files)
    assert reply.status_code == 202
    assert_stored(waiting, reply.json()["id"])
    waiting.post(f"/train/{reply.json()['id']}/cancel")
    assert waiting.delete(f"/train/{reply.json()['id']}").status_code == 200


def without(*names):
    return {name: value for name, value in JOB.items() if name not in names}


HYPER = "hyperparameters"


@pytest.mark.parametrize(
    ("job", "status", "code", "field"),
    [
        ({**without("adapter"), "rows": ROWS}, 422, "invalid", "adapter"),
        ({**without("method"), "rows": ROWS}, 422, "invalid", "method"),
        ({**without("template"), "rows": ROWS}, 422, "invalid", "template"),
        ({**without("target"), "rows": ROWS}, 422, "invalid", "target"),
        (JOB, 422, "invalid", "rows"),
        ({**JOB, "rows": "x"}, 422, "invalid", "rows"),
        ({**JOB, "rows": ROWS, "epochs": 3}, 422, "invalid", "epochs"),
        ({**JOB, "rows": ROWS, "append_eos": "true"}, 422, "invalid", "append_eos"),
        ({**JOB, "rows": ROWS, "method": "lora"}, 422, "invalid", "method"),
        ({**JOB, "rows": ROWS, HYPER: {"lr": 1}}, 422, "invalid", "hyperparameters.lr"),
        ({**JOB, "rows": ROWS, HYPER: {"epochs": 0}}, 422, "invalid", "hyperparameters.epochs"),
        ({**JOB, "rows": ROWS, HYPER: {"epochs": 1, "max_steps": 1}}, 422, "job_invalid",
         "hyperparameters.max_steps"),
        ({**JOB, "rows": ROWS, "init_text": "x"}, 422, "job_invalid", "init_text"),
        ({**JOB, "rows": ROWS, "context_seed": 1}, 422, "job_invalid", "context_seed"),
        ({**JOB, "rows": ROWS, "template": "{text"}, 422, "template_invalid", "template"),
        ({**JOB, "rows": ROWS, "template": "{label}"}, 422, "job_invalid", "template"),
        ({**JOB, "rows": ROWS, "config": {"target_modules": ["nothing"]}}, 422,
         "target_not_found", "target_modules"),
        ({**JOB, "rows": ROWS, "config": {"num_virtual_tokens": 4}}, 422, "job_invalid",
         "config.num_virtual_tokens"),
        ({**JOB, "rows": ROWS, "adapter": "Bad Name"}, 422, "name_invalid", "adapter"),
        ({**JOB, "rows": ROWS, "adapter": "tiny-base"}, 422, "name_invalid", "adapter"),
        ({**JOB, "rows": ROWS, "adapter": "taken", "if_exists": "error"}, 412, "adapter_exists",
         "adapter"),
        ({**JOB, "rows": ROWS, "description": "\ud800"}, 422, "invalid", "body"),
        (b'{"adapter": "x", "adapter": "y"}', 422, "invalid", "body"),
        (b"[" * 100_000, 422, "invalid", "body"),
        (b'{"rows": [{"x": NaN}]}', 422, "invalid", "body"),
        (b"\xff", 422, "invalid", "body"),
        (b"", 422, "invalid", "body"),
        (b"[]", 422, "invalid", "body"),
        (b" " * 1_100_000, 413, "body_too_large", "body"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("query", ["", "?dry_run=true"])
def test_a_job_that_is_wrong_is_refused_with_its_field(waiting, job, status, code, field, query):
    before = waiting.get("/train").json()["total"]
    reply = post(waiting, job, query)
    told = reply.json()
    assert (reply.status_code, told["code"]) == (status, code), reply.text
    assert field in (None, told.get("field")), reply.text
    assert waiting.get("/train").json()["total"] == before


@pytest.mark.parametrize(
    ("rows", "row"),
    [
        ([], None),
        ([["x"]], 1),
        ([*ROWS, {"text": "x"}], 13),
        ([*ROWS, {"label": "complaint"}], 13),
        ([*ROWS, {"text": 5, "label": "complaint"}], 13),
        ([*ROWS, {"text": [1], "label": "complaint"}], 13),
        ([*ROWS, {"text": "x", "label": "complait"}], 13),
        ([*ROWS, {"text": "x " * 600, "label": "complaint"}], 13),
        ([ROWS[0], ROWS[2]], None),
    ],
)
def test_a_row_that_is_wrong_is_refused_with_its_number(waiting, rows, row):
    inline = post(waiting, {**JOB, "rows": rows})
    file = waiting.post(
        "/train", data={"job": json.dumps(JOB)}, files={"data": ("x.jsonl", as_jsonl(rows))}
    )
    for reply in (inline, file):
        told = reply.json()
        assert (reply.status_code, told["code"]) == (422, "data_invalid"), reply.text
        assert told.get("row") == row


def form(client, **given):
    """Post a sound form, but for what is given."""
    sound = {"job": json.dumps(JOB), "name": "rows.csv", "data": as_csv(ROWS), "more": []}
    part = {**sound, **given}
    fields = {} if part["job"] is None else {"job": part["job"]}
    files = [("data", (part["name"], part["data"])), *part["more"]]
    return client.post("/train", data=fields, files=files)


@pytest.mark.parametrize(
    ("given", "status", "code", "field"),
    [
        ({"job": None}, 422, "invalid", "job"),
        ({"job": "{"}, 422, "invalid", "job"),
        ({"job": json.dumps({**JOB, "rows": ROWS})}, 400, "contradiction", "rows"),
        ({"job": json.dumps({**JOB, "lr": 1})}, 422, "invalid", "lr"),
        ({"data": b"PAR1\x15\x04"}, 415, "unsupported_file", "data"),
        ({"more": [("data", ("b.csv", b"a"))]}, 422, "invalid", "data"),
        ({"more": [("other", (None, b"a"))]}, 422, "invalid", "'other'"),
        ({"data": b"text,label\n\xff,complaint\n"}, 422, "data_invalid", None),
        ({"data": b"text,label\n" + b"x" * 1_000_001}, 422, "data_invalid", None),
        ({"data": b"text,label\n" + b"x" * 1_048_576}, 422, "data_invalid", None),
        ({"data": b"x" * 2_200_000}, 413, "body_too_large", "body"),
        ({"data": b""}, 422, "data_invalid", "rows"),
    ],
)  # fmt: skip
def test_a_form_that_is_wrong(waiting, given, status, code, field):
    reply = form(waiting, **given)
    told = reply.json()
    assert (reply.status_code, told["code"]) == (status, code), reply.text
    assert field in (None, told.get("field")), reply.text


@pytest.mark.parametrize(
    ("job", "said"),
    [
        ({**JOB, "rows": ROWS, "dry_run": True}, "POST /train?dry_run=true"),
        ({**JOB, "data": ROWS}, "unknown field 'data'; did you mean 'rows'?"),
        (
            {**JOB, "rows": ROWS, "method": "LoRA"},
            "(LoRA is a method of PEFT that is neither trained",
        ),
    ],
)
def test_what_was_meant_is_told(waiting, job, said):
    reply = post(waiting, job)
    assert reply.status_code == 422
    assert said in reply.json()["error"]


def test_fields_of_a_job_beside_it_in_the_form_are_told_where_they_go(waiting):
    reply = waiting.post("/train", data={"adapter": "x", "method": "ia3"}, files={"data": b"{}"})
    told = reply.json()
    assert (reply.status_code, told["field"]) == (422, "'adapter'")
    assert "one JSON object in the form field job: -F 'job={" in told["error"]


def test_rows_nowhere_and_other_media_types(waiting):
    nothing = waiting.post("/train", files={"job": (None, json.dumps(JOB))})
    assert (nothing.status_code, nothing.json()["field"]) == (422, "rows")
    inside = waiting.post("/train", files={"job": (None, json.dumps({**JOB, "rows": ROWS}))})
    assert inside.status_code == 202
    waiting.post(f"/train/{inside.json()['id']}/cancel")
    for headers in ({"content-type": "text/plain"}, {}):
        reply = waiting.post("/train", content=b"x", headers=headers)
        assert (reply.status_code, reply.json()["code"]) == (415, "wrong_content_type")
    odd = waiting.post("/train?dryrun=true", json={**JOB, "rows": ROWS})
    assert (odd.status_code, odd.json()["code"]) == (400, "unknown_parameter")
    odd = waiting.post("/train?dry_run=maybe", json={**JOB, "rows": ROWS})
    assert (odd.status_code, odd.json()["field"]) == (422, "dry_run")


def test_as_many_jobs_as_may_wait(waiting, job):
    services = waiting.app_services()
    store = services.jobs
    services.jobs = JobStore(services.settings.data_dir, queue=QueueLimits(1))
    try:
        reply = waiting.post("/train", json={**JOB, "rows": ROWS})
        assert (reply.status_code, reply.json()["code"]) == (429, "too_many_jobs")
        assert int(reply.headers["retry-after"]) > 0
        dry = waiting.post("/train?dry_run=true", json={**JOB, "rows": ROWS})
        assert dry.status_code == 200
    finally:
        services.jobs.close()
        services.jobs = store


def test_nothing_of_an_upload_stays(waiting):
    assert form(waiting, data=b"PAR1").status_code == 415
    taken = form(waiting).json()["id"]
    staging = waiting.app_services().settings.data_dir / "staging"
    assert list(staging.glob("*")) == []
    assert waiting.post(f"/train/{taken}/cancel").json()["state"] == "cancelled"


# --- following -----------------------------------------------------------------------------


def test_jobs_are_listed_the_newest_first(waiting, job):
    second = waiting.post("/train", json={**JOB, "rows": ROWS}).json()["id"]
    try:
        listed = waiting.get("/train").json()
        assert [one["id"] for one in listed["jobs"]][:2] == [second, job]
        assert listed["total"] == len(listed["jobs"])
        assert "config" not in listed["jobs"][0]
        page = waiting.get("/train?offset=1&limit=1").json()
        assert [one["id"] for one in page["jobs"]] == [job]
        assert waiting.get("/train?limit=0").status_code == 422
        assert waiting.get("/train?state=queued").status_code == 400
    finally:
        waiting.post(f"/train/{second}/cancel")
        waiting.delete(f"/train/{second}")


UNKNOWN = "job-" + "0" * 24


@pytest.mark.parametrize(
    "job_id", [UNKNOWN, "job-1", "..", "%2e%2e", "..%2Fregistry.db", "JOB-" + "0" * 24, "job-%00"]
)
@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", ""), ("GET", "/events"), ("GET", "/log"), ("POST", "/cancel"), ("DELETE", "")],
)
def test_a_job_that_is_not_there(waiting, job_id, method, path):
    reply = waiting.request(method, f"/train/{job_id}{path}")
    if (method, reply.url.path) == ("GET", "/"):  # what the client made of ".."
        assert "job" not in reply.text
        return
    assert reply.status_code == (404 if job_id not in ("..", "%2e%2e") else reply.status_code)
    if job_id in (UNKNOWN, "job-1", "job-%00", "JOB-" + "0" * 24):
        assert reply.json()["code"] == "job_not_found"
    assert reply.status_code in (404, 405)


def run_a_job(waiting, job, *, steps=3, state="succeeded", **ending):
    """What a worker does to the jobs table."""
    store = waiting.app_services().jobs
    claim = store.claim(60)
    assert claim.job_id == job
    store.add_event(claim, "started", {"num_train": 12})
    for step in range(1, steps + 1):
        store.add_event(claim, "step", {"step": step, "loss": 1 / step})
    store.finish(claim, state, **ending)


def test_a_job_for_another_base_says_what_it_waits_for(waiting, job):
    store = waiting.app_services().jobs
    theirs = store.create(a_job(base_digest="f" * 64), EXAMPLES).id
    listed = {one["id"]: one for one in waiting.get("/train").json()["jobs"]}
    served = listed[job]["base_digest"][:12]
    expected = f"a server of the base somebody/base (ffffffffffff); this one serves {served}"
    assert waiting.get(f"/train/{theirs}").json()["waits_for"] == expected
    assert listed[theirs]["waits_for"] == expected
    assert "waits_for" not in listed[job]
    assert "waits_for" not in waiting.post(f"/train/{theirs}/cancel").json()
    store.delete(theirs)


def test_events_replay_from_any_id_and_end_with_the_job(waiting, job):
    metrics = {"evaluation": {"accuracy": 0.5}}
    run_a_job(waiting, job, metrics=metrics)
    reply = waiting.get(f"/train/{job}/events")
    assert reply.headers["content-type"].startswith("text/event-stream")
    everything = events_of(reply.text)
    kinds = [kind for _, kind, _ in everything]
    assert kinds[0] == kinds[-1] == "state"
    assert kinds.count("step") == 3
    assert everything[-1][2]["state"] == "succeeded"
    assert all(data["at"] for *_, data in everything)
    ids = [number for number, *_ in everything]
    assert ids == sorted(set(ids))
    for position, number in enumerate(ids):
        rest = everything[position + 1 :]
        by_query = waiting.get(f"/train/{job}/events?after={number}")
        assert (by_query.status_code, events_of(by_query.text)) == (200, rest)
        headers = {"last-event-id": str(number)}
        by_header = waiting.get(f"/train/{job}/events?after=0", headers=headers)
        # A browser would come back for ever without 204.
        assert by_header.status_code == (200 if rest else 204)
        assert events_of(by_header.text) == rest
    shown = waiting.get(f"/train/{job}").json()
    assert (shown["state"], shown["metrics"]) == ("succeeded", metrics)
    assert shown["progress"]["step"] == 3
    assert shown["started_at"] <= shown["finished_at"]


def test_events_are_followed_live(waiting, job):
    lines: list[str] = []
    first = threading.Event()

    def follow():
        with waiting.stream("GET", f"/train/{job}/events") as reply:
            for line in reply.iter_lines():
                lines.append(line)
                first.set()

    thread = threading.Thread(target=follow)
    thread.start()
    assert first.wait(10)
    assert "step" not in "".join(lines)
    error = {"code": "training_diverged", "message": "the loss is NaN"}
    run_a_job(waiting, job, state="failed", error=error)
    thread.join(10)
    assert not thread.is_alive()
    found = events_of("\n".join(lines))
    assert [data["step"] for _, kind, data in found if kind == "step"] == [1, 2, 3]
    assert found[-1][2]["state"] == "failed"
    assert waiting.get(f"/train/{job}").json()["error"] == error


async def test_a_silent_stream_is_kept_open(waiting, job):
    store = waiting.app_services().jobs
    frames = event_frames(JobFeed(), store, job, 0, ping_seconds=0.3)
    assert events_of((await anext(frames)).decode())[0][1] == "state"
    assert (await anext(frames)).startswith(b":")
    waiting.post(f"/train/{job}/cancel")
    rest = [frame async for frame in frames]
    assert events_of(b"".join(rest).decode())[-1][2]["state"] == "cancelled"


async def test_a_server_that_stops_does_not_wait_for_its_followers(waiting, job):
    stop = threading.Event()
    jobs = waiting.app_services().jobs
    frames = event_frames(JobFeed(), jobs, job, 0, stopping=stop.is_set)
    await anext(frames)
    stop.set()
    assert [frame async for frame in frames] == []


async def test_many_followers_of_a_job_share_what_is_read(waiting, job):
    jobs, feed = waiting.app_services().jobs, JobFeed()
    reads: list[str] = []

    def note(_connection, _cursor, statement, *_rest) -> None:
        reads.append(statement)

    async def follow() -> list[bytes]:
        return [frame async for frame in event_frames(feed, jobs, job, 0)]

    followers = [asyncio.create_task(follow()) for _ in range(300)]
    await asyncio.sleep(1)  # all have what there was
    sqlalchemy.event.listen(sqlalchemy.Engine, "before_cursor_execute", note)
    try:
        await asyncio.sleep(1)
        assert 0 < len(reads) < len(followers)
    finally:
        sqlalchemy.event.remove(sqlalchemy.Engine, "before_cursor_execute", note)
    await asyncio.to_thread(run_a_job, waiting, job)
    told = {b"".join(frames) for frames in await asyncio.gather(*followers)}
    assert len(told) == 1
    assert events_of(told.pop().decode())[-1][2]["state"] == "succeeded"


def test_a_job_that_is_deleted_ends_its_streams(waiting, job):
    with waiting.stream("GET", f"/train/{job}/events") as reply:
        lines = reply.iter_lines()
        next(lines)
        waiting.post(f"/train/{job}/cancel")
        waiting.delete(f"/train/{job}")
        assert not [line for line in lines if line.startswith("event: step")]


@pytest.mark.parametrize("given", ["x", "-1", "1.5", "9" * 30])
def test_an_event_id_that_is_none(waiting, job, given):
    reply = waiting.get(f"/train/{job}/events", headers={"last-event-id": given})
    assert (reply.status_code, reply.json()["field"]) == (422, "last-event-id")
    reply = waiting.get(f"/train/{job}/events?after={given}")
    assert (reply.status_code, reply.json()["field"]) == (422, "after")


def test_the_log(waiting, job):
    empty = waiting.get(f"/train/{job}/log")
    assert (empty.status_code, empty.text) == (200, "")
    assert empty.headers["content-type"].startswith("text/plain")
    directory = waiting.app_services().jobs.directory(job)
    (directory / "log.txt").write_text("one\ntwo ä\nthree\n")
    assert waiting.get(f"/train/{job}/log").text == "one\ntwo ä\nthree\n"
    assert waiting.get(f"/train/{job}/log?tail=2").text == "two ä\nthree\n"
    assert waiting.get(f"/train/{job}/log?tail=9").text == "one\ntwo ä\nthree\n"
    assert waiting.get(f"/train/{job}/log?tail=0").status_code == 422
    (directory / "log.txt").write_bytes(b"x" * 5_000_000 + b"end")
    long = waiting.get(f"/train/{job}/log").text
    assert (len(long), long[-3:]) == (4 * 1024 * 1024, "end")


# --- ending --------------------------------------------------------------------------------


def test_cancel_and_delete(waiting, job):
    store = waiting.app_services().jobs
    active = waiting.delete(f"/train/{job}")
    assert (active.status_code, active.json()["code"]) == (400, "job_active")
    claim = store.claim(60)
    running = waiting.post(f"/train/{job}/cancel")
    assert (running.status_code, running.json()["state"]) == (202, "running")
    assert running.json()["cancel_requested"] is True
    assert store.renew(claim, 60) is True
    store.finish(claim, "cancelled")
    again = waiting.post(f"/train/{job}/cancel")
    assert (again.status_code, again.json()["state"]) == (200, "cancelled")
    directory = store.directory(job)
    assert directory.exists()
    gone = waiting.delete(f"/train/{job}")
    assert gone.json() == {"id": job, "deleted": True}
    assert not directory.exists()
    assert waiting.get(f"/train/{job}").status_code == 404


def test_a_queued_job_is_cancelled_at_once(waiting, job):
    with waiting.stream("GET", f"/train/{job}/events") as reply:
        cancelled = waiting.post(f"/train/{job}/cancel")
        assert (cancelled.status_code, cancelled.json()["state"]) == (200, "cancelled")
        assert events_of(reply.read().decode())[-1][2]["state"] == "cancelled"


# --- what is said of it --------------------------------------------------------------------


def test_methods_say_how_they_are_trained(waiting):
    methods = {one["name"]: one for one in waiting.get("/methods").json()["methods"]}
    assert set(methods) == {"prefix_tuning", "p_tuning", "ia3", "cpt", "prompt_tuning"}
    assert methods["prefix_tuning"]["aliases"] == ["p_tuning_v2"]
    assert methods["ia3"]["aliases"] == []
    for one in methods.values():
        assert one["training"]["hyperparameters"]["learning_rate"] > 0
    assert methods["cpt"]["training"]["context_examples"] == 8
    dry = waiting.post("/train?dry_run=true", json={**without("hyperparameters"), "rows": ROWS})
    recipe = methods["ia3"]["training"]
    # So few rows are seen until the recipe's least steps are done.
    expected = {**recipe["hyperparameters"], "epochs": dry.json()["hyperparameters"]["epochs"]}
    assert dry.json()["hyperparameters"] == expected
    assert expected["epochs"] > recipe["hyperparameters"]["epochs"]


def test_the_docs_know_every_route_and_both_bodies(waiting):
    paths = waiting.get("/openapi.json").json()["paths"]
    body = paths["/train"]["post"]["requestBody"]["content"]
    assert set(body) == {"application/json", "multipart/form-data"}
    properties = body["application/json"]["schema"]["properties"]
    assert {"adapter", "method", "rows", "template", "hyperparameters"} <= set(properties)
    assert "$ref" not in json.dumps(body)
    assert {
        "/classify",
        "/train/{job_id}",
        "/train/{job_id}/events",
        "/train/{job_id}/log",
        "/train/{job_id}/cancel",
    } <= set(paths)
    assert "delete" in paths["/train/{job_id}"]
