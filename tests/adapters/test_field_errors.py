"""Wrong fields are told in our words: what was expected, what came, and what was probably meant."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from adapters.field_errors import close_to, explain, quoted
from adapters.methods import METHODS, OTHER_PEFT_TYPES
from adapters.peft_names import why_not_trained
from adapters.training.job import METHOD_NAMES, TrainingRequest

GOOD = {"adapter": "mine", "method": "ia3", "template": "{text}", "target": "label"}


def told(raw: object) -> str:
    with pytest.raises(ValidationError) as caught:
        TrainingRequest.model_validate(raw)
    return explain(caught.value.errors(), TrainingRequest).message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hyperparameters": {"lr": 1}},
         "hyperparameters: unknown field 'lr'; did you mean 'learning_rate'?"),
        ({"lr": 1}, "unknown field 'lr'; did you mean 'hyperparameters.learning_rate'?"),
        ({"epochs": 1}, "unknown field 'epochs'; did you mean 'hyperparameters.epochs'?"),
        ({"num_virtual_tokens": 1},
         "unknown field 'num_virtual_tokens'; did you mean 'config.num_virtual_tokens'?"),
        ({"Max-Length": 9}, "unknown field 'Max-Length'; did you mean 'max_length'?"),
        ({"hyperparameters": {"epochs": "3"}},
         "hyperparameters.epochs: expected a whole number, came '3'"),
        ({"hyperparameters": {"learning_rate": True}},
         "hyperparameters.learning_rate: expected a number, came true"),
        ({"hyperparameters": {"seed": -1}},
         "hyperparameters.seed: expected a number of at least 0, came -1"),
        ({"labels": "a,b"}, "labels: expected a list, came 'a,b'"),
        ({"labels": ["投诉"]}, 'labels: expected at least 2 values, came 1'),
        *(
            (
                {"method": name},
                "method: expected 'prefix_tuning', 'p_tuning_v2', 'p_tuning', 'ia3', 'cpt' or "
                f"'prompt_tuning' ({words} is a method of PEFT that is neither trained nor served "
                f"here{more}), came {name!r}",
            )
            for name, words, more in (
                ("LoRA", "LoRA", "; serve a base that has it merged in"),
                ("PeftType.LORA", "LoRA", "; serve a base that has it merged in"),
                ("qlora", "QLoRA", "; serve a base that has it merged in"),
                ("ADAPTION_PROMPT", "adaption prompt tuning", ""),
                ("LoKrConfig", "LoKr", ""),
            )
        ),
        ({"template": ""}, "template: expected text that is not empty, came ''"),
        ({"target": None}, "target: expected text, came null"),
        (
            {"hyperparameters": {"optimizer": "sdg"}},
            "hyperparameters.optimizer: expected 'adamw' or 'sgd' (did you mean 'sgd'?), came 'sdg'",
        ),
    ],
)  # fmt: skip
def test_one_wrong_field(fields, message):
    assert told({**GOOD, **fields}) == message


def test_all_missing_fields_and_all_unknown_ones_are_told_together():
    assert told({}) == "missing: adapter, method, template and target"
    message = told({"lr": 1, "num_epochs": 2, "adapter": "mine"})
    assert "'hyperparameters.learning_rate'" in message
    assert "'hyperparameters.epochs'" in message
    assert message.endswith("missing: method, template and target")


def test_a_name_that_resembles_none_gets_the_list():
    message = told({**GOOD, "zzz": 1})
    assert message.startswith("unknown field 'zzz'; known are adapter, append_eos,")
    several = told({**GOOD, "zzz": 1, "qqq": 1, "hyperparameters": {"zzz": 1, "lr": 1, "qqq": 1}})
    assert several.count("known are") == 2  # once for each place
    assert several.endswith(f"; {message}; unknown field 'qqq'")
    assert "; hyperparameters: unknown field 'qqq'; " in several


def test_no_suggestion_names_a_field_that_is_not_there():
    assert close_to("lr", ["epochs"]) is None
    assert close_to("max_token", ["max_tokens", "temperature"]) == "max_tokens"
    assert close_to("max_token", ["max_new_tokens", "temperature"]) == "max_new_tokens"


def test_values_are_quoted_as_people_write_them():
    assert quoted({"a": None, "b": [True]}) == '{"a": null, "b": [true]}'
    assert quoted("投诉\x1b[31m\u202e") == r"'投诉\x1b[31m\u202e'"
    assert quoted(["\u202e"]) == r'["\u202e"]'
    assert quoted("x" * 5_000_000).endswith("...")
    assert len(quoted([["x"] * 100] * 100_000)) == 80


def test_a_hundred_thousand_wrong_fields_are_counted_and_a_few_told():
    said = told({**GOOD, **{f"field {n}": n for n in range(100_000)}})
    assert said.startswith("unknown field 'field 0'")
    assert said.endswith("; and 99994 more")


def test_every_other_method_of_peft_is_known_not_to_be_trained():
    assert all(why_not_trained(one) for one in OTHER_PEFT_TYPES)
    assert not any(why_not_trained(one) for one in (*METHODS, *METHOD_NAMES, "", "sft"))
