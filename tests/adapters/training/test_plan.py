"""Every default is resolved and every contradiction refused before anything is trained."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import peft
import pytest
import torch

from adapters.errors import (
    AdapterError,
    ConfigInvalid,
    DataInvalid,
    JobInvalid,
    TargetNotFound,
    TemplateInvalid,
    TensorMismatch,
)
from adapters.method import parse_config
from adapters.methods import METHODS
from adapters.methods.cpt import CPTConfig, with_context
from adapters.training.job import METHOD_NAMES, TrainingJob, TrainingRequest
from adapters.training.plan import make_plan
from adapters.training.recipes import RECIPES
from tests.adapters.training.jobs import (
    LABELS,
    ROWS,
    plan,
    request,
    spec,
    stored_and_read,
    tokenizer,
)

METHOD_LIST = list(METHOD_NAMES)
EOS, NEWLINE = 2, "\n"


def refusal(**fields):
    with pytest.raises(AdapterError) as caught:
        plan(**fields)
    assert caught.value.message.isprintable()
    return caught.value


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("IA3", "ia3"),
        ("(IA)³", "ia3"),
        ("prefix-tuning", "prefix_tuning"),
        ("PREFIX_TUNING", "prefix_tuning"),
        ("PeftType.PREFIX_TUNING", "prefix_tuning"),
        ("P-Tuning v2", "p_tuning_v2"),
        ("ptuning", "p_tuning"),
        ("Prompt Tuning", "prompt_tuning"),
        ("CPT", "cpt"),
    ],
)
def test_a_method_in_any_usual_spelling(spelling, name):
    asked = {"adapter": "a", "template": "{text}", "target": "label", "method": spelling}
    assert TrainingRequest.model_validate(asked).method == name


# --- defaults --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHOD_LIST)
def test_data_and_a_method_name_are_enough(method):
    made = plan(method=method)
    job, recipe = made.job, RECIPES[METHOD_NAMES[method]]
    # Six rows are a step an epoch here: they are seen until the recipe's least steps are done.
    often = recipe.hyperparameters.model_copy(update={"epochs": recipe.min_steps})
    assert job.hyperparameters == often
    assert (job.method, job.peft_type) == (METHODS[job.peft_type].name, METHOD_NAMES[method])
    assert job.num_rows == len(ROWS)
    assert job.trainable_params > 0
    for name, value in recipe.config.items():
        assert job.config[name] == value
    # It crosses processes as JSON, and the other side makes the same of it.
    again = TrainingJob.model_validate_json(job.model_dump_json())
    assert again == job
    assert stored_and_read(again, made) == made.examples


def peft_path_of_config(job, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(job.config))
    return str(tmp_path)


@pytest.mark.parametrize("method", METHOD_LIST)
def test_peft_reads_the_config_without_a_warning(method, tmp_path):
    job = plan(method=method).job
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = peft.PeftConfig.from_pretrained(peft_path_of_config(job, tmp_path))
    assert config.peft_type == job.peft_type
    assert config.base_model_name_or_path == "tiny"
    assert config.task_type == "CAUSAL_LM"
    assert config.inference_mode is True


def test_many_rows_are_seen_as_often_as_the_recipe_says_and_few_rows_oftener():
    recipe = RECIPES["IA3"]
    many = [{**ROWS[n % 2], "ID": n} for n in range(8 * recipe.min_steps)]
    assert plan(many).job.hyperparameters.epochs == recipe.hyperparameters.epochs
    few = plan(many[:80]).job.hyperparameters  # ten steps an epoch
    assert few.epochs == recipe.min_steps // 10
    assert plan(many[:80], hyperparameters={"epochs": 2}).job.hyperparameters.epochs == 2
    stepped = plan(many[:80], hyperparameters={"max_steps": 3}).job.hyperparameters
    assert (stepped.epochs, stepped.max_steps) == (None, 3)


def test_what_was_asked_for_goes_before_the_recipe():
    made = plan(
        method="p_tuning",
        config={"num_virtual_tokens": 5, "encoder_reparameterization_type": "LSTM"},
        hyperparameters={"max_steps": 7, "learning_rate": 0.5, "seed": 3},
        max_length=100,
        if_exists="error",
        description="d",
    )
    job = made.job
    assert (job.hyperparameters.max_steps, job.hyperparameters.epochs) == (7, None)
    assert (job.hyperparameters.learning_rate, job.hyperparameters.seed) == (0.5, 3)
    assert job.config["num_virtual_tokens"] == 5
    assert job.config["encoder_hidden_size"] == RECIPES["P_TUNING"].config["encoder_hidden_size"]
    assert (job.max_length, job.if_exists, job.description) == (100, "error", "d")


@pytest.mark.parametrize("method", ["ia3", "prefix_tuning", "prompt_tuning"])
def test_trainable_params(method):
    config = {} if method == "ia3" else {"num_virtual_tokens": 5}
    want = {"ia3": 2 * (16 + 16 + 48), "prefix_tuning": 5 * 2 * 2 * 16, "prompt_tuning": 5 * 32}
    assert plan(method=method, config=config).job.trainable_params == want[method]


def test_max_length_is_what_the_base_holds_beside_virtual_tokens():
    assert plan(method="prompt_tuning").job.max_length == 512 - 20
    assert plan(base=spec(100_000)).job.max_length == 2048
    assert plan(method="prompt_tuning", max_length=492).job.max_length == 492
    error = refusal(method="prompt_tuning", max_length=493)
    assert (error.field, error.expected) == ("max_length", "at most 492")


# --- refusals --------------------------------------------------------------------------------

# name -> (fields, error, its field)
REFUSED = {
    "epochs_and_max_steps": (
        {"hyperparameters": {"epochs": 1, "max_steps": 1}},
        JobInvalid,
        "hyperparameters.max_steps",
    ),
    "patience_without_held_out_rows": (
        {"hyperparameters": {"early_stopping_patience": 1}},
        JobInvalid,
        "hyperparameters.early_stopping_patience",
    ),
    "label_twice": ({"labels": ["a", "b", "a"]}, JobInvalid, "labels"),
    "label_without_tokens": ({"labels": [*LABELS, ""]}, JobInvalid, "labels"),
    "label_of_half_a_pair": ({"labels": [*LABELS, "\ud800"]}, JobInvalid, "labels"),
    "name_that_is_no_label": (
        {"labels": LABELS, "label_names": {"1": "complaints"}},
        JobInvalid,
        "label_names",
    ),
    "no_names": ({"label_names": {}}, JobInvalid, "label_names"),
    "name_of_half_a_pair": ({"label_names": {"\udc00": "a"}}, JobInvalid, "label_names"),
    "target_in_the_template": ({"template": "{text} {label}"}, JobInvalid, "template"),
    "template_without_a_column": ({"template": "Label :"}, JobInvalid, "template"),
    "template_with_a_lone_brace": ({"template": "{text} }"}, TemplateInvalid, "template"),
    "unknown_config_field": ({"config": {"r": 8}}, JobInvalid, "config.r"),
    "config_of_another_kind": (
        {"method": "p_tuning", "config": {"num_virtual_tokens": "20"}},
        JobInvalid,
        "config.num_virtual_tokens",
    ),
    "no_virtual_tokens": (
        {"method": "p_tuning", "config": {"num_virtual_tokens": 0}},
        JobInvalid,
        "config.num_virtual_tokens",
    ),
    "more_virtual_tokens_than_positions": (
        {"method": "p_tuning", "config": {"num_virtual_tokens": 512}},
        ConfigInvalid,
        "num_virtual_tokens",
    ),
    "twenty_million_virtual_tokens": (
        {"method": "prefix_tuning", "config": {"num_virtual_tokens": 20_000_000}},
        JobInvalid,
        "config.num_virtual_tokens",
    ),
    "negative_width": (
        {"method": "p_tuning", "config": {"encoder_hidden_size": -1}},
        JobInvalid,
        "config.encoder_hidden_size",
    ),
    "enormous_network": (
        {
            "method": "p_tuning",
            "config": {
                "encoder_hidden_size": 65_536,
                "encoder_num_layers": 64,
                "encoder_reparameterization_type": "LSTM",
            },
        },
        JobInvalid,
        "config",
    ),
    "billion_layers": (
        {"method": "p_tuning", "config": {"encoder_num_layers": 10**9}},
        JobInvalid,
        "config.encoder_num_layers",
    ),
    "another_bases_dimension": (
        {"method": "prefix_tuning", "config": {"num_layers": 24}},
        TensorMismatch,
        "num_layers",
    ),
    "unknown_target": ({"config": {"target_modules": ["k"]}}, TargetNotFound, "target_modules"),
    "regular_expression": (
        {"config": {"target_modules": ".*k_proj"}},
        ConfigInvalid,
        "target_modules",
    ),
    "modules_to_save": (
        {"config": {"modules_to_save": ["lm_head"]}},
        JobInvalid,
        "config.modules_to_save",
    ),
    "another_method": ({"config": {"peft_type": "LORA"}}, JobInvalid, "config.peft_type"),
    "another_task": ({"config": {"task_type": "SEQ_CLS"}}, JobInvalid, "config.task_type"),
    "context_of_ones_own": (
        {"method": "cpt", "config": {"cpt_token_ids": [1, 2]}},
        JobInvalid,
        "config.cpt_token_ids",
    ),
    "context_without_cpt": ({"context_examples": 3}, JobInvalid, "context_examples"),
    "context_seed_without_cpt": ({"context_seed": 0}, JobInvalid, "context_seed"),
    "context_trained_without_cpt": ({"train_on_context": True}, JobInvalid, "train_on_context"),
    "more_context_than_rows": (
        {"method": "cpt", "context_examples": 7},
        JobInvalid,
        "context_examples",
    ),
    "context_past_the_base": (
        {"method": "cpt", "context_examples": 4, "base": spec(64)},
        JobInvalid,
        "context_examples",
    ),
    "nothing_but_context": (
        {"method": "cpt", "context_examples": 6, "train_on_context": False},
        JobInvalid,
        "train_on_context",
    ),
    "text_without_tokens": (
        {"method": "p_tuning", "init_text": "a"},
        JobInvalid,
        "init_text",
    ),
    "text_for_ia3": ({"init_text": "a"}, JobInvalid, "init_text"),
    "text_for_cpt": ({"method": "cpt", "init_text": "a"}, JobInvalid, "init_text"),
    "text_with_projection": (
        {"method": "prefix_tuning", "init_text": "a", "config": {"prefix_projection": True}},
        JobInvalid,
        "init_text",
    ),
    "text_with_zeros": (
        {"method": "prefix_tuning", "init_text": "a", "config": {"init_weights": "zero"}},
        JobInvalid,
        "init_text",
    ),
    "text_with_random": (
        {
            "method": "prompt_tuning",
            "init_text": "a",
            "config": {"prompt_tuning_init": "RANDOM"},
        },
        JobInvalid,
        "init_text",
    ),
    "text_start_without_text": (
        {"method": "prompt_tuning", "config": {"prompt_tuning_init": "TEXT"}},
        JobInvalid,
        "config.prompt_tuning_init",
    ),
    "two_texts": (
        {
            "method": "prompt_tuning",
            "init_text": "a",
            "config": {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "b"},
        },
        JobInvalid,
        "init_text",
    ),
    "text_that_changes_nothing": (
        {"method": "prompt_tuning", "config": {"prompt_tuning_init_text": "b"}},
        JobInvalid,
        "config.prompt_tuning_init_text",
    ),
    "tokenizer_options": (
        {
            "method": "prompt_tuning",
            "init_text": "a",
            "config": {"prompt_tuning_init": "TEXT", "tokenizer_kwargs": {"a": 1}},
        },
        JobInvalid,
        "config.tokenizer_kwargs",
    ),
    "unknown_start": (
        {"method": "prompt_tuning", "config": {"prompt_tuning_init": ["TEXT"]}},
        JobInvalid,
        "config.prompt_tuning_init",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_field(name):
    fields, error, field = REFUSED[name]
    came = refusal(**fields)
    assert type(came) is error
    assert came.field == field
    assert came.expected


def test_no_rows():
    assert isinstance(refusal(rows=[]), DataInvalid)


def test_what_peft_writes_by_itself_passes():
    written = peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3).to_dict()
    written = {name: getattr(value, "value", value) for name, value in written.items()}
    assert plan(method="p_tuning", config=written).job.config["num_virtual_tokens"] == 3


@pytest.mark.parametrize(
    ("method", "given", "words"),
    [
        (
            "prefix_tuning",
            {"num_attention_heads": 4, "token_dim": 32, "num_layers": 2},
            "config.token_dim is 32, this base has 16: ignored",
        ),
        ("prefix_tuning", {"num_attention_heads": 4}, "config.num_attention_heads is 4"),
        ("prefix_tuning", {"token_dim": 5, "num_attention_heads": 7}, "config.token_dim is 5"),
        ("p_tuning", {"num_layers": 12, "num_attention_heads": 12}, "config.num_layers is 12"),
        ("prompt_tuning", {"num_layers": 12, "num_attention_heads": 3}, "config.num_layers is 12"),
        ("cpt", {"num_layers": 12, "token_dim": 7}, "config.token_dim is 7, this base has 32"),
        ("ia3", {"num_layers": None, "use_dora": False}, "num_layers (null), use_dora (false)"),
        ("p_tuning", {"encoder_dropout": None, "future_field": None}, "future_field (null)"),
        ("ia3", {"peft_version": "0.4.0"}, "config.peft_version is '0.4.0': ignored"),
        ("ia3", {"base_model_name_or_path": "gpt2", "revision": "main"}, "the one that is served"),
        ("ia3", {"inference_mode": True, "auto_mapping": {}}, "config.inference_mode is true"),
        ("ia3", {"fan_in_fan_out": None, "inference_mode": False}, None),
    ],
)
def test_fields_that_change_nothing_are_ignored(method, given, words):
    """A saved config comes with dimensions of another base, of all heads, or of another version."""
    plain, job = plan(method=method).job, plan(method=method, config=given).job
    assert job.config == plain.config
    found = [one for one in job.warnings if one not in plain.warnings]
    assert any(words in one for one in found) if words else not found


# --- starts ----------------------------------------------------------------------------------


def init_text(job):
    return tokenizer().decode(job.init_token_ids)


@pytest.mark.parametrize("method", ["prefix_tuning", "prompt_tuning"])
def test_a_text_is_repeated_or_trimmed_to_the_virtual_tokens(method):
    own = list(tokenizer().encode("the tweet"))
    for count in (1, len(own), 2 * len(own) + 1):
        job = plan(method=method, init_text="the tweet", config={"num_virtual_tokens": count}).job
        assert job.init_token_ids == (own * 3)[:count]
        assert job.init_text == "the tweet"


def test_pefts_own_fields_name_a_text_too():
    fields = {
        "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": "the tweet",
        "tokenizer_name_or_path": "somebody/base",
        "num_virtual_tokens": 4,
    }
    job = plan(method="prompt_tuning", config=fields).job
    direct = plan(
        method="prompt_tuning", init_text="the tweet", config={"num_virtual_tokens": 4}
    ).job
    assert job == direct
    assert job.config["prompt_tuning_init"] == "RANDOM"
    assert job.config["tokenizer_name_or_path"] is None


def test_random_tokens_follow_the_seed():
    def ids(seed):
        config = {"prompt_tuning_init": "SAMPLE_VOCAB"}
        made = plan(method="prompt_tuning", config=config, hyperparameters={"seed": seed})
        return made.job.init_token_ids

    assert ids(0) == ids(0) != ids(1)
    assert len(ids(0)) == 20
    assert set(ids(0)) <= set(range(tokenizer().vocab_size))


@pytest.mark.parametrize(
    ("method", "config"),
    [
        ("prefix_tuning", {"init_weights": "zero"}),
        ("prefix_tuning", {"init_weights": None}),
        ("prefix_tuning", {"prefix_projection": True}),
        ("prompt_tuning", {"prompt_tuning_init": "RANDOM"}),
        ("p_tuning", {}),
        ("ia3", {}),
    ],
)
def test_starts_that_are_not_tokens(method, config):
    assert plan(method=method, config=config).job.init_token_ids is None


@pytest.mark.parametrize("method", ["prefix_tuning", "prompt_tuning"])
def test_the_default_start_is_the_rows_own_text(method):
    job = plan(method=method, labels=LABELS, config={"num_virtual_tokens": 30}).job
    # The last example is whole; the shortest of each label come first.
    shortest = "Tweet text : no Label : complaint\n", "Tweet text : =1+1 Label : no complaint\n"
    text = init_text(job)
    assert len(job.init_token_ids) == 30
    assert text.endswith(shortest)
    assert "".join(shortest).endswith(text) or "".join(reversed(shortest)).endswith(text)


def test_few_rows_are_used_again():
    job = plan(ROWS[:2], method="prompt_tuning", config={"num_virtual_tokens": 200}).job
    assert len(job.init_token_ids) == 200
    assert init_text(job).count("Label : complaint\n") > 1


def test_the_start_never_shows_a_row_that_is_held_out():
    rows = [{"text": f"w{index}", "label": f"x{index % 2}"} for index in range(10)]
    made = plan(
        rows,
        method="prompt_tuning",
        labels=["x0", "x1"],
        config={"num_virtual_tokens": 200},
        hyperparameters={"validation_split": 0.4},
    )
    text = init_text(made.job)
    for example in made.examples.held_out:
        assert f" w{example.row - 1} " not in text
    for example in made.examples.train:
        assert f" w{example.row - 1} " in text


# --- CPT's context ---------------------------------------------------------------------------


def context(job):
    return list(zip(job.config["cpt_token_ids"], job.config["cpt_tokens_type_mask"], strict=True))


@pytest.mark.parametrize("bos", [False, True])
def test_the_context_is_what_training_renders(bos):
    encoder = tokenizer(bos=bos)
    made = plan(method="cpt", context_examples=4, labels=LABELS, encoder=encoder)
    separator = encoder.encode(NEWLINE, add_special_tokens=False)
    found = context(made.job)
    rows_by_ids = {example.prompt_ids[bos:]: example for example in made.examples.train}
    labels = []
    position = int(bos)
    assert found[:bos] == [(1, 0)] * bos
    for k in range(4):
        example = next(
            example
            for prompt, example in rows_by_ids.items()
            if tuple(token for token, _ in found[position : position + len(prompt)]) == prompt
        )
        labels.append(example.label)
        ids = example.prompt_ids[bos:] + example.target_ids + separator
        types = [kind + 4 * k for kind in example.types[bos:-1]] + [0] * (1 + len(separator))
        assert found[position : position + len(ids)] == list(zip(ids, types, strict=True))
        position += len(ids)
    assert position == len(found)
    assert all(one != other for one, other in pairwise(labels))


def test_the_configs_of_a_context():
    job = plan(method="cpt", context_examples=2).job
    count = len(job.config["cpt_token_ids"])
    assert job.config["cpt_mask"] == [1] * count
    assert job.config["num_virtual_tokens"] == count
    assert job.config["tokenizer_name_or_path"] == "tiny"
    assert job.max_length == 512 - count
    assert (job.context_examples, job.context_seed, job.train_on_context) == (2, 0, True)


def test_the_labels_of_a_context_are_what_the_loss_counts():
    made = plan(method="cpt", context_examples=3, labels=LABELS)
    config = parse_config(CPTConfig, made.job.config)
    example = made.examples.train[0]
    ids = torch.tensor([[*example.prompt_ids, *example.target_ids]])
    labels, types = with_context(config, ids, torch.tensor([example.types]))
    counted = Counter(types[labels != -100].tolist())
    own = len(example.target_ids)
    assert set(counted) == {4, 8, 12, 16}
    assert counted[16] == own
    targets = [tokenizer().encode(f" {label}", add_special_tokens=False) for label in LABELS]
    assert {counted[4], counted[8], counted[12]} == {len(target) for target in targets}


def test_the_context_follows_its_seed_and_not_the_trainings():
    def ids(**fields):
        return plan(method="cpt", context_examples=3, **fields).job.config["cpt_token_ids"]

    assert ids() == ids(context_seed=0) == ids(hyperparameters={"seed": 5})
    assert len({tuple(ids(context_seed=seed)) for seed in range(6)}) > 1


def test_the_recipes_context_takes_no_more_rows_than_there_are():
    most = RECIPES["CPT"].context_examples
    rows = [{"text": f"w{index}", "label": f"x{index}"} for index in range(most + 1)]
    assert plan(rows, method="cpt").job.context_examples == most
    assert plan(rows[:3], method="cpt").job.context_examples == 3


def test_rows_of_the_context_can_be_left_out_of_training():
    made = plan(method="cpt", context_examples=2, labels=LABELS, train_on_context=False)
    assert len(made.examples.train) == len(ROWS) - 2
    ids = made.job.config["cpt_token_ids"]
    for row in {*range(1, 7)} - {example.row for example in made.examples.train}:
        text = f"Tweet text : {ROWS[row - 1]['text']} Label : {ROWS[row - 1]['label']}"
        assert text in tokenizer().decode(ids)
    assert stored_and_read(made.job, made) == made.examples


def test_the_context_shows_no_row_that_is_held_out():
    made = plan(method="cpt", context_examples=4, hyperparameters={"validation_split": 0.3})
    text = tokenizer().decode(made.job.config["cpt_token_ids"])
    for example in made.examples.held_out:
        assert f"Tweet text : {ROWS[example.row - 1]['text']} Label" not in text


# --- the dry run -----------------------------------------------------------------------------


def test_the_preview_shows_what_is_trained():
    made = plan(encoder=tokenizer(bos=True), labels=LABELS)
    assert [shown["row"] for shown in made.preview] == [1, 2, 3]
    for shown, example in zip(made.preview, made.examples.train, strict=False):
        assert shown["ids"] == [*example.prompt_ids, *example.target_ids]
        assert len(shown["tokens"]) == len(shown["ids"])
        assert shown["text"] == shown["prompt"] + shown["target"]
        assert shown["num_prompt_tokens"] == len(example.prompt_ids)
        assert (shown["tokens"][0], shown["tokens"][-1]) == (None, None)
        assert shown["truncated"] is False
    assert "".join(filter(None, made.preview[0]["tokens"])) == made.preview[0]["text"]
    lengths = [example.num_tokens for example in made.examples.train]
    assert made.lengths["min"] == min(lengths)
    assert made.lengths["max"] == max(lengths)
    assert made.lengths["mean"] == pytest.approx(sum(lengths) / len(lengths), abs=0.01)


def test_the_preview_of_a_truncated_row():
    made = plan(encoder=tokenizer(bos=True), max_length=10, on_too_long="truncate")
    shown = made.preview[0]
    assert shown["truncated"] is True
    assert len(shown["tokens"]) == len(shown["ids"]) == 10
    assert shown["text"].endswith("".join(filter(None, shown["tokens"])))


def test_another_base_is_another_job():
    other = replace(spec(), digest="other")
    assert plan(base=other).job.base_digest == "other"
    assert plan().job.base_name == "tiny"


# --- what may not be intended ------------------------------------------------------------------


def labelled(*values):
    return [{"text": f"t {number}", "label": value} for number, value in enumerate(values)]


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        (["x", "y"] * 3, ["x", "y"]),
        ([1, 0] * 3, ["0", "1"]),
        ([True, False] * 3, ["false", "true"]),
        (["x", "y", "x", "y", "x"], None),  # hardly repeated
        ([str(number) for number in range(21)] * 3, None),
        (["x" * 61, "y"] * 3, None),
        (["x\ny", "y"] * 3, None),
        (["x", "x "] * 3, None),
    ],
)
def test_labels_that_were_not_given_are_the_few_values_of_the_target(values, labels):
    made = plan(labelled(*values))
    assert (made.job.labels, made.job.labels_inferred) == (labels, labels is not None)
    assert ("labels were not given" in " ".join(made.job.warnings)) is (labels is not None)
    assert plan(labelled(*values), infer_labels=False).job.labels is None
    given = plan(labelled("x", "y", "x", "y", "x", "y"), labels=["y", "x"])
    assert (given.job.labels, given.job.labels_inferred, given.job.warnings) == (
        ["y", "x"],
        False,
        [],
    )


def test_empty_cells_are_counted():
    rows = [{"text": "" if n % 2 else "t", "in": "x", "label": f"answer {n}"} for n in range(14)]
    assert plan(rows).job.warnings == [
        "column 'text' is empty in 7 of 14 rows (rows 2, 4, 6, 8, 10, …)"
    ]
    assert "leaves a blank line" in plan(rows, template="{in}\n{text}\n:").job.warnings[0]
    assert plan(rows, template="{in}\n{?text}\n:").job.warnings == []
    unanswered = [*labelled("x", "y"), *[{"text": "t", "label": ""}] * 6]
    for options in ({}, {"labels": ["x", "y"]}, {"label_names": {"x": "a", "y": "b"}}):
        with pytest.raises(DataInvalid, match=r"is empty in 6 of 8 rows \(rows 3, 4, 5, 6, 7, …\)"):
            plan(unanswered, **options)
    named = plan(unanswered, label_names={"x": "a", "y": "b", "": "none"})
    assert named.job.labels == ["a", "b", "none"]
    made = make_plan(
        request(), ROWS, tokenizer(), spec(), base_name="tiny", notes=["first", "second"]
    )
    assert made.job.warnings[:2] == ["first", "second"]


def test_words_for_a_missing_value_are_counted():
    rows = [{"text": word, "label": f"answer {word}"} for word in ("a", "NaN", "b", "NULL")]
    assert plan(rows).job.warnings == [
        "column 'text' is 'NULL' or 'NaN' in 2 of 4 rows (rows 2, 4); it is read as text: leave the "
        "cell empty if it stands for a missing value"
    ]
    assert plan(rows, template="{?text} :").job.warnings == plan(rows).job.warnings
    unanswered = labelled("x", "None", "y")
    assert "column 'label' is 'None' in 1 of 3 rows (row 2)" in plan(unanswered).job.warnings[0]
    assert plan(unanswered, labels=["x", "y", "None"]).job.warnings == []


def test_labels_that_are_numbers_are_a_warning():
    told = " ".join(plan(labelled(*[0, 1] * 3)).job.warnings)
    assert "the labels are numbers, '0', '1'" in told
    assert 'label_names puts them into words, such as {"0": "complaint"}' in told
    assert "numbers" in plan(labelled("-1", "2.5"), labels=["-1", "2.5"]).job.warnings[0]
    named = plan(labelled(*[0, 1] * 3), label_names={"0": "no", "1": "yes"})
    assert named.job.warnings == []


def test_labels_that_differ_in_case_or_space_are_a_warning():
    values = ["Complaint", "complaint", "complaint ", "praise"]
    told = " ".join(plan(labelled(*values)).job.warnings)
    assert "'Complaint' and 'complaint' and 'complaint '; they are learned as different" in told
    names = {"Complaint": "c", "complaint": "c", "complaint ": "c", "praise": "p"}
    assert plan(labelled(*values), label_names=names).job.warnings == []
    texts = [*labelled("Yes", "yes"), *labelled(*[f"answer {n}" for n in range(100)])]
    assert plan(texts).job.warnings == []


def test_a_learning_rate_above_1_is_a_warning():
    assert "learning_rate" not in " ".join(
        plan(hyperparameters={"learning_rate": 1.0}).job.warnings
    )
    assert plan(hyperparameters={"learning_rate": 5.0}).job.warnings[1:] == [
        "hyperparameters.learning_rate is 5, which is likely to ruin the adapter; the method's recipe "
        f"has {RECIPES['IA3'].hyperparameters.learning_rate:g}"
    ]


def test_held_out_rows_are_counted_as_they_are():
    made = plan(hyperparameters={"validation_split": 0.34})
    assert made.job.num_validation_rows == len(made.examples.held_out) == 2
    assert plan().job.num_validation_rows == 0


@pytest.mark.parametrize("value", [1, 1.0, "1.0", True])
def test_label_names_know_how_pandas_writes_a_value(value):
    rows = [{"text": "a", "label": value}, {"text": "b", "label": "0"}]
    names = {"1": "yes", "0": "no", "True": "yes"}
    assert plan(rows, label_names=names).preview[0]["target"] == " yes"


def test_a_token_that_is_part_of_a_character_is_shown_as_bytes():
    tokens = plan().preview[1]["tokens"]  # "a naïve 漢字 🙂"
    assert {" na\\xc3", "\\xafve", " 漢\\xe5", "\\xad\\x97", "\\x99\\x82", " complaint"} <= {
        *tokens
    }
    assert not any("ï" in token or "字" in token for token in tokens if token)
