"""`graftwork train` and `graftwork eval` on a tiny base on disk.

What matters to a terminal (output streams, exit status, Ctrl-C) runs as a process of its own.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

from adapters.checkpoint.folder import load_serving_form
from adapters.parts import ActivationScales
from adapters.training.packed import PackedBase
from adapters.training.plan import make_plan
from adapters.training.provenance import read_provenance
from adapters.training.ranking import rank, score
from adapters.training.rows import read_rows
from server.base.load import load_base
from server.base.tokenizer import load_tokenizer
from server.cli.evaluation import Contestant, Wording, evaluate
from server.cli.main import app
from server.engine.offline import GenerationFailed, OfflineEngine
from server.store.registry import Registry
from server.text.tokenizer import TextTokenizer, read_eos_token_ids
from tests.adapters.training.jobs import request
from tests.server.api.training.test_train_to_serve import LABELS, ROWS
from tests.server.http_server import byte_level_tokenizer, save_prefix_adapter, save_tiny_base

TEMPLATE = "Tweet text : {tweet} Label :"
WORDS = ["--template", TEMPLATE, "--target", "Label", "--labels", ",".join(LABELS)]
FILES = {"adapter_config.json", "adapter_model.safetensors", "graftwork.json"}
METHODS = {
    "prefix_tuning": '{"num_virtual_tokens": 4}',
    "p_tuning": '{"num_virtual_tokens": 3, "encoder_hidden_size": 8}',
    "ia3": "{}",
    "cpt": "{}",
    "prompt_tuning": '{"num_virtual_tokens": 3}',
}


def run(*arguments: object):
    words = [str(argument) for argument in arguments]
    return CliRunner().invoke(app, words, env={"COLUMNS": "200"})


def start(*arguments: object, cwd: Path) -> subprocess.Popen[str]:
    """The console script, in a process of its own."""
    words = [str(Path(sys.executable).with_name("graftwork"))]
    words += [str(argument) for argument in arguments]
    return subprocess.Popen(
        words,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    with path.open("w") as file:
        for number, row in enumerate(ROWS):
            split = "held_out" if number % 4 == 3 else "train"
            file.write(json.dumps({**row, "split": split}) + "\n")
    return path


@pytest.fixture(scope="module")
def command(tiny_base, data) -> list[object]:
    """The options that every training here has."""
    options = ["--data", data, "--base", tiny_base, "--dtype", "float32", "--threads", "1"]
    return ["train", "--method", "ia3", *options, *WORDS]


@pytest.fixture(scope="module")
def folders(tiny_base, data, tmp_path_factory) -> dict[str, Path]:
    """A folder of every method, far enough from the base to be told from it."""
    home = tmp_path_factory.mktemp("trained")
    for method, config in METHODS.items():
        made = run(
            *("train", "--method", method, "--data", data, "--base", tiny_base, *WORDS),
            *("--dtype", "float32", "--max-steps", "3", "--batch-size", "4", "--lr", "0.05"),
            *("--hyperparameters", '{"warmup_ratio": 0.0}', "--config", config),
            *("--out", home / method),
        )
        assert made.exit_code == 0, made.output
    return {method: home / method for method in METHODS}


# --- train -----------------------------------------------------------------------------------


def test_every_method_makes_a_folder_that_peft_loads_without_a_warning(folders, tiny_base):
    for method, folder in folders.items():
        assert {file.name for file in folder.iterdir()} == FILES
        assert not folder.with_name(f"{method}.partial").exists()
        model = AutoModelForCausalLM.from_pretrained(tiny_base)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            # transformers' word to PEFT, whatever the adapter is
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
            peft.PeftModel.from_pretrained(model, folder)


def test_the_commands_that_train_prints_name_the_base(command, tiny_base, tmp_path):
    made = run(*command, "--max-steps", "1", "--out", tmp_path / "my folder")
    first, second = made.stdout.splitlines()[-2:]
    words = shlex.split(first.partition("serve it with: graftwork ")[2])
    assert words == ["adapters", "add", str(tmp_path / "my folder"), "--base", str(tiny_base)]
    assert run(*words, "--data-dir", tmp_path / "data", "--name", "mine").exit_code == 0
    assert shlex.split(second) == ["and:", "graftwork", "serve", "--base", str(tiny_base)]


def test_the_folder_says_how_it_was_made(folders, tiny_base):
    provenance = read_provenance(folders["ia3"])
    job = provenance.job
    assert (job.template, job.labels, job.target_separator) == (TEMPLATE, LABELS, " ")
    assert (job.method, job.append_eos, job.num_rows) == ("ia3", True, len(ROWS))
    assert (job.hyperparameters.max_steps, job.hyperparameters.learning_rate) == (3, 0.05)
    assert job.base_digest == load_base(tiny_base).spec.digest
    assert provenance.metrics["steps"] == 3
    assert {"python", "torch", "graftwork"} <= provenance.versions.keys()
    assert str(folders["ia3"].parent) not in (folders["ia3"] / "graftwork.json").read_text()


def test_adapters_add_takes_the_words_that_the_folder_has(folders, tiny_base, tmp_path):
    options = ["--base", tiny_base, "--data-dir", tmp_path]
    assert run("adapters", "add", folders["cpt"], *options).exit_code == 0
    assert run("adapters", "add", folders["ia3"], "--template", "{x}", *options).exit_code == 0
    registry = Registry(tmp_path)
    cpt, ia3 = registry.resolve("cpt"), registry.resolve("ia3")
    registry.close()
    assert (cpt.template, cpt.labels, cpt.append_eos) == (TEMPLATE, tuple(LABELS), True)
    assert cpt.recipe["hyperparameters"]["max_steps"] == 3
    assert cpt.metrics["steps"] == 3
    assert cpt.base_digest == load_base(tiny_base).spec.digest
    assert (ia3.template, ia3.labels) == ("{x}", tuple(LABELS))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("{", "not JSON"),
        ('{"method": "ia3"}', "missing: job, metrics and versions"),
        (
            '{"job": {}, "metrics": {}, "versions": {}, "more": 1}',
            "unknown field 'more'; known are job, ",
        ),
    ],
)
def test_adapters_add_refuses_a_foreign_note(folders, tiny_base, tmp_path, text, fault):
    folder = tmp_path / "changed"
    folder.mkdir()
    for name in FILES:
        (folder / name).write_bytes((folders["ia3"] / name).read_bytes())
    (folder / "graftwork.json").write_text(text)
    refused = run("adapters", "add", folder, "--base", tiny_base, "--data-dir", tmp_path / "data")
    assert refused.exit_code == 2
    assert "graftwork.json: " in refused.output
    assert fault in refused.output


def test_an_adapter_of_another_base_is_refused(folders, tmp_path, data):
    other = save_tiny_base(tmp_path / "other", bos=True)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    added = run("adapters", "add", folders["ia3"], "--base", other, "--data-dir", tmp_path / "d")
    evaluated = run("eval", "--adapters", folders["ia3"], "--data", data, "--base", other)
    assert (added.exit_code, evaluated.exit_code) == (2, 2)
    assert "was trained on" in added.output
    assert "was trained on" in evaluated.output


def test_register_publishes_with_or_without_a_folder(command, tmp_path):
    options = ["--data-dir", tmp_path / "data", "--max-steps", "1", "--json"]
    both = run(*command, *options, "--register", "tweets", "--out", tmp_path / "folder")
    assert json.loads(both.stdout)["registered"]["version"] == 1
    again = run(*command, *options, "--register", "tweets", "--lr", "0.5", "--seed", "1")
    told = json.loads(again.stdout)
    # The first step's rate is 0: the same bytes with another recipe are a version of their own.
    assert (told["registered"]["name"], told["registered"]["version"], told["out"]) == (
        "tweets",
        2,
        None,
    )
    registry = Registry(tmp_path / "data")
    record = registry.resolve("tweets")
    registry.close()
    assert record.recipe == {**told["job"], "default_temperature": 0.0}
    assert record.metrics == told["metrics"]
    assert record.job_id is None
    assert [path.name for path in tmp_path.glob("**/*.partial")] == []
    refused = run(*command, *options, "--register", "tweets", "--if-exists", "error")
    assert refused.exit_code == 2
    assert "tweets" in refused.output


def test_where_takes_a_part_of_the_rows(command, data, tmp_path):
    options = ["--max-steps", "1", "--json", "--where", "split=train", "--out", tmp_path / "a"]
    made = run(*command, *options)
    assert json.loads(made.stdout)["metrics"]["num_rows"] == 9
    none = run(*command, "--where", "split=test", "--out", tmp_path / "b")
    assert "none of the 12 rows has split=test" in none.output
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    rows[8]["Label"] = "neither"
    changed = tmp_path / "changed.jsonl"
    changed.write_text("".join(json.dumps(row) + "\n" for row in rows))
    wrong = run(*command, "--data", changed, "--where", "split=train", "--out", tmp_path / "b")
    assert wrong.exit_code == 2
    assert "row 7: " in wrong.output
    assert "(row 9 of the file)" in wrong.output


def test_labels_may_be_repeated_and_values_put_into_words(command, tmp_path):
    data = tmp_path / "rows.csv"
    data.write_text("tweet,Label\nlate,1\nlovely,2\nlost,1\nquick,2\n")
    names = ["--label-name", "1=bad, very", "--label-name", "2=good"]
    labels = ["--labels", "bad, very", "--labels", "good"]
    plain = [word for word in command if word not in ("--labels", ",".join(LABELS))]
    shown = run(*plain, "--data", data, *names, *labels, "--dry-run", "--json")
    plan = json.loads(shown.stdout)
    assert plan["labels"] == ["bad, very", "good"]
    assert [row["target"] for row in plan["preview"]] == [" bad, very", " good", " bad, very"]


def test_a_dry_run_shows_what_was_understood_of_a_file(tiny_base, tmp_path):
    data = tmp_path / "rows.json"
    rows = [
        {"instruction": "介绍地球", "input": "", "output": "行星", "history": []},
        {"instruction": "翻译", "input": "hello", "output": "你好", "history": [["a", "b"]]},
    ]
    data.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-16")
    words = ["train", "--method", "ia3", "--base", tiny_base, "--dry-run", "--data", data]
    table = run(*words).output
    assert "JSON array, UTF-16, format alpaca" in table
    assert "instruction, input, output; not read: history" in table
    assert '"### Instruction:\\n介绍地球\\n\\n### Response:\\n行星"' in table
    assert "|\\xe4|" in table
    data.write_text("text;label\n" + "gut, ja;1\n;0\n" * 4, encoding="utf-8-sig")
    table = run(*words, "--template", "{text} :", "--target", "label").output
    assert "CSV, UTF-8 with a byte order mark, semicolon" in table
    assert "warning: column 'text' is empty in 4 of 8 rows" in table
    assert "warning: labels were not given" in table
    assert "--no-infer-labels takes none" in table
    chats = [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}]
    data.write_text(json.dumps(chats))
    refused = run(*words)
    assert refused.exit_code == 2
    assert "the base has no chat template" in refused.output
    data.write_text("text,label\na,x\n")
    refused = run(*words)
    assert "--template and --target are needed; the columns" in refused.output
    assert "if it is data, put a line with the names before it" in refused.output


def test_a_dry_run_shows_the_plan_and_leaves_nothing(command, tmp_path):
    out = tmp_path / "never"
    shown = run(
        *command, "--out", out, "--dry-run", "--json", "--config", '{"fan_in_fan_out": null}'
    )
    plan = json.loads(shown.stdout)
    assert (plan["num_train"], plan["num_held_out"], len(plan["preview"])) == (12, 0, 3)
    assert plan["preview"][0]["text"] == "Tweet text : it was late today Label : complaint"
    table = run(*command, "--out", out, "--dry-run").output
    assert "12 to train on" in table
    assert "|<special>" in table
    assert list(tmp_path.iterdir()) == []


REFUSED = {
    "no place": ([], "expected --out DIR, --register NAME or both"),
    "config is no JSON": (["--out", "x", "--config", "{"], "--config: expected a JSON object"),
    "unknown config": (["--out", "x", "--config", '{"rank": 8}'], "config"),
    "no rate": (["--out", "x", "--lr", "-1"], "--learning-rate: expected a number greater than 0"),
    "unknown hyperparameter": (
        ["--out", "x", "--hyperparameters", '{"lr": 1}'],
        "--hyperparameters: unknown field 'lr'; did you mean",
    ),
    "twice": (["--out", "x", "--lr", "1", "--hyperparameters", '{"learning_rate": 2}'], "twice"),
    "epochs and steps": (["--out", "x", "--epochs", "1", "--max-steps", "1"], "contradict"),
    "one label": (
        ["--out", "x", "--labels", "complaint"],
        "--labels: expected at least 2 values, came 1",
    ),
    "template": (["--out", "x", "--template", "{tweet"], "template: a lone"),
    "no column": (
        ["--out", "x", "--template", "{text}"],
        "the column 'text' is missing; the row has",
    ),
    "label name": (["--out", "x", "--label-name", "1"], "--label-name: expected KEY=VALUE"),
    "data": (["--out", "x", "--data", "no.jsonl"], "no.jsonl: No such file"),
    "kind of data": (["--out", "x", "--data", sys.executable], "it is a program, expected text"),
    "name": (["--register", "Not A Name"], "Not A Name"),
    "resume": (["--out", "x", "--resume"], "holds no run to resume"),
    "address": (
        ["--out", "x", "--data", "https://host/rows.csv"],
        "an address (https) is not fetched; download the file",
    ),
    "Python dict": (
        ["--out", "x", "--hyperparameters", "{'weight_decay': 0}"],
        """it is a Python dict, in JSON: '{"weight_decay": 0}'""",
    ),
    "too long": (
        ["--out", "x", "--max-length", "8"],
        "8; --on-too-long truncate drops the prompt's beginning",
    ),
    "method": (["--out", "x", "--method", "lora"], "lora"),
    "base": (["--out", "x", "--base", "nowhere/at all"], "nowhere/at all"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_a_refusal_is_a_sentence_and_leaves_nothing(
    command, tmp_path, monkeypatch, options, message
):
    monkeypatch.chdir(tmp_path)
    plain = command[:-2] if "--labels" in options else command
    refused = run(*plain, "--data-dir", tmp_path / "data", *options)
    assert refused.exit_code == 2
    assert message in refused.output
    assert "Traceback" not in refused.output
    assert {path.name for path in tmp_path.iterdir()} <= {"data"}


def test_missing_options_name_the_columns(tiny_base, data):
    bare = ["train", "--method", "ia3", "--data", data, "--base", tiny_base, "--out", "x"]
    refused = run(*bare)
    assert refused.exit_code == 2
    assert "--template and --target are needed" in refused.output
    assert "'tweet', 'Label', 'split'" in refused.output
    assert "--target is needed" in run(*bare, "--template", "{tweet}").output


def test_a_folder_with_files_is_refused_before_anything_is_read(command, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    # Neither the base nor the data is there: they would be refused if they were looked at.
    absent = ["--base", tmp_path / "no-base", "--data", tmp_path / "no.jsonl"]
    refused = run(*command, *absent, "--out", tmp_path / "mine")
    assert refused.exit_code == 2
    assert "is not empty" in refused.output
    assert "is no folder" in run(*command, *absent, "--out", tmp_path / "mine/thesis.txt").output
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_an_empty_folder_is_filled(command, tmp_path):
    (tmp_path / "mine").mkdir()
    made = run(*command, "--max-steps", "1", "--out", tmp_path / "mine")
    assert made.exit_code == 0
    assert {file.name for file in (tmp_path / "mine").iterdir()} == FILES


def test_a_run_that_diverges_says_so_and_leaves_nothing(command, tmp_path):
    # GPT-2's norms make NaN of what is too large; those of Llama make 0 of it.
    base, out = tmp_path / "base", tmp_path / "out"
    tokenizer = byte_level_tokenizer()
    size = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **size)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    failed = run(*command, "--base", base, "--lr", "1e30", "--max-steps", "20", "--out", out)
    assert failed.exit_code == 2
    assert "a learning rate below" in failed.output
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("split", ["0.0", "0.25"])
def test_ctrl_c_saves_and_resume_ends_in_the_same_bits(command, tmp_path, split):
    options = [*command, "--validation-split", split, "--batch-size", "4"]
    options += ["--max-steps", "400", "--json", "--out"]
    disturbed, undisturbed = tmp_path / "disturbed", tmp_path / "undisturbed"
    with start(*options, disturbed, cwd=tmp_path) as process:
        lines = iter(process.stderr.readline, "")
        assert any(line.startswith("step 1/400") for line in lines)
        process.send_signal(signal.SIGINT)
        printed, told = process.communicate(timeout=60)
    assert (process.returncode, printed) == (130, "")
    assert [path.name for path in tmp_path.iterdir()] == ["disturbed.partial"]
    again = shlex.split(told.splitlines()[-1])
    assert again == ["graftwork", *map(str, [*options, disturbed]), "--resume"]

    # Another run in its place, and one that forgets that it is there.
    other = run(*options, disturbed, "--lr", "0.5", "--resume")
    assert "learning_rate was 0.01, came 0.5" in other.output
    forgetful = run(*options, disturbed)
    assert "go on with --resume" in forgetful.output
    assert (other.exit_code, forgetful.exit_code) == (2, 2)

    resumed = run(*again[1:])
    assert json.loads(resumed.stdout)["metrics"]["steps"] == 400
    assert " from step " in resumed.stderr
    assert run(*options, undisturbed).exit_code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"disturbed", "undisturbed"}
    first, second = (
        load_file(out / "adapter_model.safetensors") for out in (disturbed, undisturbed)
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    notes = [read_provenance(out) for out in (disturbed, undisturbed)]
    assert notes[0].metrics == notes[1].metrics


# --- eval ------------------------------------------------------------------------------------


def attach_scales(model: torch.nn.Module, scales: ActivationScales) -> None:
    """IA3 as hooks on the base's modules."""
    for path, vector in scales.inputs.items():
        model.get_submodule(path).register_forward_pre_hook(
            lambda _module, given, vector=vector: (given[0] * vector,)
        )
    for path, vector in scales.outputs.items():
        model.get_submodule(path).register_forward_hook(
            lambda _module, _given, output, vector=vector: output * vector
        )


def ranked_by_training(tiny_base: Path, data: Path, folder: Path | None):
    """The scores that evaluation in training gives, by another path through the base."""
    loaded = load_base(tiny_base, dtype="float32")
    directory = loaded.tokenizer_dir
    encoder = TextTokenizer(load_tokenizer(directory), read_eos_token_ids(directory))
    asked = request(template=TEMPLATE, target="Label", labels=LABELS, append_eos=folder is not None)
    plan = make_plan(asked, read_rows(data), encoder, loaded.spec, base_name="tiny")
    prompts = [example.prompt_ids for example in plan.examples.train]
    right = [example.label for example in plan.examples.train]
    base, virtual = PackedBase(loaded.model, loaded.spec), None
    if folder is not None:
        with tempfile.TemporaryDirectory() as two_files:
            for name in FILES - {"graftwork.json"}:
                shutil.copy(folder / name, two_files)
            virtual = load_serving_form(Path(two_files), loaded.spec)
        if isinstance(virtual, ActivationScales):
            attach_scales(loaded.model, virtual)
            virtual = None
    return rank(base, virtual, prompts, plan.examples.label_ids), right


def test_scores_are_those_of_training(folders, tiny_base, data):
    engine = OfflineEngine(tiny_base, dtype="float32", threads=1, kv_bytes=1 << 24)
    wording = Wording(TEMPLATE, "Label", LABELS, append_eos=True)
    contestants = [Contestant(None, Wording(TEMPLATE, "Label", LABELS))]
    for method, folder in folders.items():
        facts = engine.add_adapter(method, folder).facts
        contestants.append(Contestant(method, wording, facts.num_virtual_tokens))
    encoder = TextTokenizer(engine.tokenizer, read_eos_token_ids(engine.tokenizer_dir))
    rows = read_rows(data)
    told: list[int] = []
    try:
        found = evaluate(
            engine, encoder, contestants, rows, on_progress=lambda done, _: told.append(done)
        )
        means = evaluate(engine, encoder, contestants, rows, normalization="mean")
    finally:
        engine.close()
    assert told == list(range(1, len(rows) * len(contestants) * len(LABELS) + 1))
    distinct = set()
    for result, mean in zip(found.results, means.results, strict=True):
        expected, right = ranked_by_training(tiny_base, data, folders.get(result.name))
        torch.testing.assert_close(torch.tensor(result.logprobs), expected, rtol=0, atol=1e-4)
        assert result.scores == score(expected.argmax(dim=1).tolist(), right)
        distinct.add(round(result.logprobs[0][0], 3))
        eos = 0 if result.name is None else 1
        lengths = [
            len(encoder.encode(f" {label}", add_special_tokens=False)) + eos for label in LABELS
        ]
        for summed, averaged in zip(result.logprobs, mean.logprobs, strict=True):
            assert [a * n for a, n in zip(averaged, lengths, strict=True)] == pytest.approx(summed)
    # Each adapter answered for itself.
    assert len(distinct) == len(contestants)


def test_eval_shows_names_folders_and_the_base_side_by_side(folders, tiny_base, data, tmp_path):
    base = ["--base", tiny_base, "--data-dir", tmp_path, "--dtype", "float32", "--threads", "1"]
    assert run("adapters", "add", folders["cpt"], "--name", "tweets", *base[:4]).exit_code == 0
    adapters = f"tweets,{folders['ia3']},tweets@1"
    arguments = ["eval", "--adapters", adapters, "--data", data, *base]
    with start(*arguments, "--json", cwd=tmp_path) as process:
        printed, _ = process.communicate(timeout=120)
    report = json.loads(printed)
    assert (report["num_rows"], report["normalization"]) == (12, "sum")
    names = [(one["adapter"], one["method"]) for one in report["results"]]
    assert names == [
        (None, "base"),
        ("tweets@1", "cpt"),
        (str(folders["ia3"]), "ia3"),
        ("tweets@1", "cpt"),
    ]
    for one, folder in zip(report["results"], (None, folders["cpt"], folders["ia3"]), strict=False):
        scores, right = ranked_by_training(tiny_base, data, folder)
        expected = score(scores.argmax(dim=1).tolist(), right)
        assert one["accuracy"] == pytest.approx(expected.accuracy)
        assert one["macro_f1"] == pytest.approx(expected.macro_f1)
    table = run(*arguments, "--where", "split=held_out").output
    assert "(the base)" in table
    assert "of 3" in table
    assert "rows/s" in table


def test_eval_of_an_adapter_from_elsewhere_takes_the_words_as_options(tiny_base, data, tmp_path):
    folder = save_prefix_adapter(tmp_path / "theirs")
    arguments = ["eval", "--adapters", folder, "--data", data, "--base", tiny_base, "--json"]
    refused = run(*arguments)
    assert refused.exit_code == 2
    assert "give --template" in refused.output
    plain = json.loads(run(*arguments, *WORDS).stdout)
    assert [one["method"] for one in plain["results"]] == ["base", "prefix_tuning"]
    # One class is enough to be measured on.
    one_class = run(*arguments, *WORDS, "--where", "Label=complaint")
    assert json.loads(one_class.stdout)["num_rows"] == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--adapters", "nobody"], "nobody"),
        (["--adapters", "a,a"], "given twice"),
        (["--normalization", "token"], "expected sum or mean"),
        (["--tokenization", "x"], "expected boundary or as_written"),
        (["--labels", "complaint"], "labels: expected at least two"),
        (["--labels", "late,lost"], "row 1: "),
        (["--where", "split"], "--where: expected KEY=VALUE"),
        (["--template", "{tweet} " + "x" * 600], "row 1: "),
        ([], "the base has no stored template"),
    ],
)
def test_eval_refuses_in_a_sentence(tiny_base, data, tmp_path, options, message):
    words = (WORDS[:-2] if "--labels" in options else WORDS) if options else []
    refused = run(
        *("eval", "--data", data, "--base", tiny_base, "--data-dir", tmp_path, *words, *options)
    )
    assert refused.exit_code == 2
    assert message in refused.output
    assert "Traceback" not in refused.output


def test_a_target_that_the_engine_refuses_leaves_it_usable(tiny_base):
    engine = OfflineEngine(tiny_base, dtype="float32", threads=1, kv_bytes=1 << 24)
    try:
        with pytest.raises(GenerationFailed):
            engine.score([(None, (5, 6), (7,)), (None, (5,) * 600, (6,))])
        with pytest.raises(ValueError, match="at least one token"):
            engine.score([(None, (), (6,))])
        both = engine.score([(None, (5, 6), (7,)), (None, (5, 6), (7, 8))])
        assert both[1] < both[0] < 0
    finally:
        engine.close()
