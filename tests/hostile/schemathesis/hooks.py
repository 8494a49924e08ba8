"""Read by schemathesis: files that are worth sending, and refusals that no JSON Schema can foresee.

`UNSAYABLE` is the list of exclusions from "what the schema allows is taken": each a pattern of the
refusal's sentence and the reason. The schema says all the rest.
"""

from __future__ import annotations

import re

import schemathesis
from hypothesis import strategies as st
from schemathesis.core.failures import Failure
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from tests.hostile.make_files import pair, zip_of

ROWS = b'{"text": "late", "label": "complaint"}\n{"text": "fine", "label": "no complaint"}\n'
TUNING_ROWS = b'{"prompt": "late", "completion": "complaint"}\n' * 2

_TWO_PLACES = "JSON Schema cannot say that two fields are equal"
_STORED = "depends on what is stored, which the page does not know"
_TEXT = "the text is in a language of its own, which JSON Schema cannot say"
_DATA = "template, target, labels and rows must fit one another"
_FILES = "OpenAPI cannot say names of files, nor what is in them"
_OPERATOR = "the operator's limit, or the base's size: not the same on every server"
_FLOATS = "the tool counts with floats here: to it 2^63 + 190 is 2^63"
_WHOLE = "JSON Schema takes 1.0 for an integer; bodies are strict"

# Refusals of well-formed requests: what their sentences match, and why the schema cannot foresee them.
UNSAYABLE: dict[str, str] = {
    r"\?adapter= says .* and parameters.adapter_id says": _TWO_PLACES,
    r"hyperparameters\.\w+: .* are both given": _TWO_PLACES,
    r"\w+ and \w+ are both given; an output follows one of them": _TWO_PLACES,
    r"max_tokens says \d+ and max_completion_tokens says": _TWO_PLACES,
    r"best_of: expected (at least n|1 )": _TWO_PLACES,
    r"weights: expected": _TWO_PLACES,
    r"there is an adapter '.*' already": _STORED,
    r"has already been loaded": _STORED,
    r"adapter '.*' was \w+, not loaded": _STORED,
    r"row: (the base|the adapter '.*') has no stored template": _STORED,
    r"labels: (the base|the adapter '.*') has no stored labels": _STORED,
    r"model: expected the base": _STORED,
    r"cannot be an alias": _STORED,
    r"has \d+ aliases, and the limit is": _STORED,
    r"is an alias of the adapter": _STORED,
    r"'.*' is reserved": _STORED,
    r"after: expected the id of an event of": _STORED,
    r"is (queued|running); cancel it": _STORED,
    r"guided_json: expected the text of a JSON Schema": _TEXT,
    r"labels: expected 2 to 1000 different texts": _TEXT,
    r"job: expected a JSON object": _TEXT,
    r"template: ": _TEXT,
    r"structured_outputs: expected one of .* came none of them": "all of its fields are null",
    r"(the target column|a column of the template), .* is missing": _DATA,
    r"the column .* is missing; the row has": _DATA,
    r"row \d+, column .*: expected a text, a number or a boolean": _DATA,
    r"row \d+(, [\w.]+)?: expected .*; came": "what a conversation must be depends on the format",
    r"template and target are given together": _DATA,
    r"format: \w+ has ": _DATA,
    r"decides it for conversations": _DATA,
    r"labels: .* is given twice": _DATA,
    r"row: the template takes the columns": _DATA,
    r"training_file: row \d+": _FILES,
    r"(grammar|response_format)\.(value|json_schema|schema)": "what it must be depends on the type",
    r"text\.format": "what it must be depends on the type",
    r"row \d+: mixed types in column": _DATA,
    r"row \d+: expected a column name": "white space alone is no name",
    r"does not fit 64 bits": _FLOATS,
    r"labels: expected different texts": "different once white space is not counted",
    r"messages\.\d+\.content": "the base's chat template takes texts only",
    r"(data|training_file|validation_file): it is .*, expected text": _FILES,
    r"the first line names the columns": _FILES,
    r"target are missing; give both": _FILES,
    r"row \d+ \(line \d+\)": _FILES,
    r"line \d+, the header": _FILES,
    r"the upload is refused: .* is there twice": _FILES,
    r"expected adapter_config.json and adapter_model.safetensors": _FILES,
    r"(best_of|n): expected at most": _OPERATOR,
    r"tokens: expected ids from 0 to \d+": _OPERATOR,
    r"token ids from 0 to \d+": _OPERATOR,
    r"a number less than 9223372036854775808, came 9223372036854775\d{3}\b": _FLOATS,
    r"a number of at least -9223372036854775808, came -9223372036854775": _FLOATS,
    r"expected ('auto' or )?a whole number( of at most 18 digits)?, came -?[0-9.e+]+": _WHOLE,
    r"a list of such lists[;,] came:? \[.*\.0": _WHOLE,
}


def _reason(text: str) -> str | None:
    return next((why for what, why in UNSAYABLE.items() if re.search(what, text)), None)


schemathesis.openapi.format("binary", st.sampled_from([zip_of(pair()), ROWS, TUNING_ROWS]))


@schemathesis.check
def well_formed_is_taken(ctx, response, case) -> bool | None:
    """What the schema allows is not refused, but for a reason that no schema can say."""
    try:
        return positive_data_acceptance(ctx, response, case)
    except Failure:
        if _reason(response.text) is None:
            raise
        return None


@schemathesis.check
def malformed_is_refused(ctx, response, case) -> bool | None:
    """What the schema forbids is refused, if it was sent: a form has no way to say an empty list."""
    try:
        return negative_data_rejection(ctx, response, case)
    except Failure:
        form = case.media_type == "multipart/form-data" and isinstance(case.body, dict)
        if not form or [] not in case.body.values():
            raise
        return None
