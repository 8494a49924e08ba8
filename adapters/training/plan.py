"""Resolves and validates a training request and its rows.

`make_plan` resolves every default, checks the fields against one another, the rows and the base, and
fixes every token id. A dry run shows its result and a worker executes it. No weights are read here.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from adapters.base_model import BaseModelSpec
from adapters.errors import JobInvalid
from adapters.template import default_separator
from adapters.training import method_config
from adapters.training.batches import Steps
from adapters.training.encoding import Encoder
from adapters.training.examples import Example, Examples, fit, kept_tokens
from adapters.training.job import (
    METHOD_NAMES,
    Hyperparameters,
    Prompts,
    TrainingJob,
    TrainingRequest,
)
from adapters.training.method_config import Start
from adapters.training.recipes import RECIPES, Recipe
from adapters.training.rendering import Renderer
from adapters.training.rows import Row
from adapters.training.selection import alternating, by_label, context_of, split, without_context

# Longer rows are rarely intended, and memory grows with every token.
DEFAULT_MAX_LENGTH = 2048
PREVIEW_ROWS = 3
# 4 GiB in float32 with gradients and AdamW's two states.
MAX_TRAINABLE_PARAMS = 2**28
_SHOWN = 80


@dataclass(frozen=True)
class Plan:
    """A validated job with its examples.

    Attributes:
        job: the job with every default resolved.
        examples: its training and validation examples.
        preview: the first training rows as rendered: `row`; `text`, `prompt` and `target` (with its
            separator); `tokens`, the characters of each token, None for a token without characters;
            their `ids`; `num_prompt_tokens`, `num_target_tokens`, and `truncated`.
        lengths: `min`, `mean` and `max` tokens of prompt and target.
    """

    job: TrainingJob
    examples: Examples
    preview: list[dict[str, Any]]
    lengths: dict[str, float]


def make_plan(
    request: TrainingRequest,
    rows: Sequence[Row],
    encoder: Encoder,
    base: BaseModelSpec,
    *,
    base_name: str,
    num_validation_rows: int = 0,
    prompts: Prompts = "template",
    max_virtual_tokens: int | None = None,
) -> Plan:
    """Resolve and check a request.

    The registry checks the adapter's name.

    Args:
        request: the training request.
        rows: as returned by `rows.check_rows` or `rows.read_rows`.
        encoder: the base's tokenizer.
        base: the base.
        base_name: name of the base, recorded in the config.
        num_validation_rows: number of validation rows at the end of `rows`; fewer than `rows` has.
        prompts: see `TrainingJob.prompts`.
        max_virtual_tokens: limit on an adapter's virtual tokens.

    Raises:
        JobInvalid: a field is wrong, or two of them disagree.
        DataInvalid: the rows cannot be trained on.
        TemplateInvalid: the template does not parse.
        CheckpointError: the config does not fit the base.
    """
    _check_texts(request)
    peft_type = METHOD_NAMES[request.method]
    recipe = RECIPES[peft_type]
    raw, start = method_config.resolve(request, recipe)
    raw["base_model_name_or_path"] = base_name
    job = _draft(request, recipe, base, base_name, len(rows), start, num_validation_rows)
    job = job.model_copy(update={"prompts": prompts})
    renderer = Renderer(job, encoder)
    label_ids = renderer.label_ids()
    train, held_out = split(job, renderer.examples(rows))
    if peft_type == "CPT":
        if request.context_examples is None:
            # The recipe's number assumes data with at least as many rows.
            fewer = min(job.context_examples or 0, len(train))
            job = job.model_copy(update={"context_examples": fewer})
        raw |= _context_fields(job, train, renderer, base)
    from adapters.methods import METHODS

    method = METHODS[peft_type]
    config = method.complete_config(method_config.parse(raw, peft_type), base)
    count = getattr(config, "num_virtual_tokens", None) or 0
    if max_virtual_tokens is not None and count > max_virtual_tokens:
        expected = f"at most {max_virtual_tokens}"
        raise _wrong("config.num_virtual_tokens", "too many virtual tokens", expected, str(count))
    job = job.model_copy(
        update={
            "config": config.model_dump(mode="json"),
            "init_token_ids": _init_ids(start, count, job, train, rows, renderer, base),
            "max_length": _max_length(request, base, count),
            "trainable_params": _bounded(method.num_trainable(config, base)),
        }
    )
    if job.train_on_context is False:
        train = without_context(job, train)
    examples = fit(job, Examples(train, held_out, label_ids))
    job = job.model_copy(
        update={"hyperparameters": _long_enough(job.hyperparameters, request, recipe, len(train))}
    )
    preview = [_preview(example, rows, renderer) for example in examples.train[:PREVIEW_ROWS]]
    return Plan(job, examples, preview, _lengths(examples))


def _check_texts(request: TrainingRequest) -> None:
    # JSON allows a lone surrogate such as "\ud800"; tokenizers, database and replies cannot encode it.
    for name in TrainingRequest.model_fields:
        try:
            json.dumps(getattr(request, name), ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError:
            raise _wrong(name, "it is no text", "text", "half a surrogate pair") from None


# --- defaults --------------------------------------------------------------------------------


def _draft(
    request: TrainingRequest,
    recipe: Recipe,
    base: BaseModelSpec,
    base_name: str,
    num_rows: int,
    start: Start,
    num_validation_rows: int,
) -> TrainingJob:
    """The job without the fields that depend on the rows' tokens: config, ids, length, parameters."""
    from adapters.methods import METHODS

    context = _context_settings(request, recipe)
    labels = _labels(request)
    separator = request.target_separator
    if separator is None:
        separator = default_separator(request.template, request.tokenization)
    return TrainingJob(
        adapter=request.adapter,
        method=METHODS[METHOD_NAMES[request.method]].name,
        peft_type=METHOD_NAMES[request.method],
        config={},
        template=request.template,
        target=request.target,
        labels=labels,
        label_names=request.label_names,
        target_separator=separator,
        append_eos=request.append_eos,
        tokenization=request.tokenization,
        max_length=0,
        on_too_long=request.on_too_long,
        init_text=start.text,
        init_token_ids=None,
        **context,
        if_exists=request.if_exists,
        description=request.description,
        hyperparameters=_hyperparameters(request, recipe, num_validation_rows),
        base_digest=base.digest,
        base_name=base_name,
        num_rows=num_rows,
        num_validation_rows=num_validation_rows,
        trainable_params=0,
    )


def _labels(request: TrainingRequest) -> list[str] | None:
    labels, names = request.labels, request.label_names
    if labels is not None and (twice := _first_twice(labels)) is not None:
        raise _wrong(
            "labels", f"{twice[:_SHOWN]!r} is given twice", "different labels", repr(twice)
        )
    if names is None:
        return labels
    words = list(dict.fromkeys(names.values()))
    if not words:
        raise _wrong("label_names", "it is empty", "a name for every value", "{}")
    if labels is None:
        return words if len(words) > 1 else None
    for word in words:
        if word not in labels:
            listed = ", ".join(repr(label[:_SHOWN]) for label in labels[:10])
            came = repr(word[:_SHOWN])
            raise _wrong("label_names", "a name is no label", f"one of {listed}", came)
    return labels


def _first_twice(labels: Sequence[str]) -> str | None:
    seen: set[str] = set()
    for label in labels:
        if label in seen:
            return label
        seen.add(label)
    return None


def _hyperparameters(
    request: TrainingRequest, recipe: Recipe, num_validation_rows: int
) -> Hyperparameters:
    given = request.hyperparameters.model_dump(exclude_none=True)
    if "epochs" in given and "max_steps" in given:
        raise _wrong(
            "hyperparameters.max_steps",
            "epochs and max_steps contradict each other",
            "one of the two",
            "both",
        )
    resolved = {**recipe.hyperparameters.model_dump(), **given}
    if "max_steps" in given:
        resolved["epochs"] = None
    if "epochs" in given:
        resolved["max_steps"] = None
    if num_validation_rows and resolved["validation_split"]:
        raise _wrong(
            "hyperparameters.validation_split",
            "rows to hold out came with the job",
            "0",
            str(resolved["validation_split"]),
        )
    held_out = num_validation_rows or resolved["validation_split"]
    if resolved["early_stopping_patience"] is not None and not held_out:
        raise _wrong(
            "hyperparameters.early_stopping_patience",
            "it watches held-out rows, and there are none",
            "validation_split above 0",
            str(resolved["validation_split"]),
        )
    return Hyperparameters(**resolved)


def _long_enough(
    options: Hyperparameters, request: TrainingRequest, recipe: Recipe, num_train: int
) -> Hyperparameters:
    """Raise the epochs to reach the recipe's `min_steps` if the request does not set a duration."""
    given = request.hyperparameters
    if given.epochs is not None or given.max_steps is not None:
        return options
    steps = Steps.of(num_train, options)
    epochs = math.ceil(recipe.min_steps / steps.steps_per_epoch)
    return options.model_copy(update={"epochs": max(options.epochs or 1, epochs)})


def _context_settings(request: TrainingRequest, recipe: Recipe) -> dict[str, Any]:
    names = ("context_examples", "context_seed", "train_on_context")
    given = {name: getattr(request, name) for name in names}
    if request.method == "cpt":
        defaults = {
            "context_examples": recipe.context_examples,
            "context_seed": 0,
            "train_on_context": recipe.train_on_context,
        }
        return {name: defaults[name] if given[name] is None else given[name] for name in names}
    for name, value in given.items():
        if value is not None:
            raise _wrong(name, f"{request.method} has no context", f"no {name}", repr(value))
    return given


# --- what depends on the rows ----------------------------------------------------------------


def _context_fields(
    job: TrainingJob, train: Sequence[Example], renderer: Renderer, base: BaseModelSpec
) -> dict[str, Any]:
    """The config fields that hold CPT's context."""
    ids, types = renderer.context_ids(context_of(job, train))
    if len(ids) >= base.max_positions:
        raise _wrong(
            "context_examples",
            f"{job.context_examples} examples have {len(ids)} tokens, and the base has "
            f"{base.max_positions} positions",
            "fewer or shorter examples",
            str(job.context_examples),
        )
    return {
        "cpt_token_ids": ids,
        "cpt_mask": [1] * len(ids),
        "cpt_tokens_type_mask": types,
        "num_virtual_tokens": len(ids),
        "tokenizer_name_or_path": job.base_name,
    }


def _init_ids(
    start: Start,
    count: int,
    job: TrainingJob,
    train: Sequence[Example],
    rows: Sequence[Row],
    renderer: Renderer,
    base: BaseModelSpec,
) -> list[int] | None:
    """Initial tokens, one per virtual token; None without initialisation from tokens."""
    draw = random.Random(job.hyperparameters.seed)  # noqa: S311 (a draw, not a secret)
    if start.kind == "default":
        return None
    if start.kind == "vocabulary":
        return [draw.randrange(base.vocab_size) for _ in range(count)]
    if start.kind == "rows":
        return _last_tokens(_texts(train, rows, renderer, draw), count, renderer)
    ids = renderer.text_ids(start.text or "")
    if not ids:
        raise _wrong("init_text", "it has no tokens", "at least one token", repr(start.text))
    return list(itertools.islice(itertools.cycle(ids), count))


def _texts(
    train: Sequence[Example], rows: Sequence[Row], renderer: Renderer, draw: random.Random
) -> Iterator[str]:
    """Cycle through training rows as text, one line each: labels alternate, short rows first."""
    groups = list(by_label(train).values())
    for group in groups:
        draw.shuffle(group)
        group.sort(key=lambda example: example.num_tokens)
    for example in itertools.cycle(alternating(groups)):
        yield renderer.text(rows[example.row - 1], example.row) + "\n"


def _last_tokens(texts: Iterator[str], count: int, renderer: Renderer) -> list[int]:
    """The last `count` tokens of as many texts as needed.

    Truncates on the left, so that complete examples are adjacent to the input.
    """
    text = ""
    num_tokens = 0
    while num_tokens < count:
        for more in texts:
            text += more
            num_tokens += len(renderer.text_ids(more, rendered=True))
            if num_tokens >= count:
                break
        # Joined texts may have fewer tokens than the separate texts.
        num_tokens = len(renderer.text_ids(text, rendered=True))
    return list(renderer.text_ids(text, rendered=True)[-count:])


def _max_length(request: TrainingRequest, base: BaseModelSpec, num_virtual_tokens: int) -> int:
    room = base.max_positions - num_virtual_tokens
    if request.max_length is None:
        return min(DEFAULT_MAX_LENGTH, room)
    if request.max_length > room:
        raise _wrong(
            "max_length",
            f"the base has {base.max_positions} positions, {num_virtual_tokens} of them for virtual "
            "tokens",
            f"at most {room}",
            str(request.max_length),
        )
    return request.max_length


def _bounded(trainable_params: int) -> int:
    if trainable_params > MAX_TRAINABLE_PARAMS:
        raise _wrong(
            "config",
            "it has too many numbers to train",
            f"at most {MAX_TRAINABLE_PARAMS}",
            str(trainable_params),
        )
    return trainable_params


# --- what a dry run shows --------------------------------------------------------------------


def _preview(example: Example, rows: Sequence[Row], renderer: Renderer) -> dict[str, Any]:
    row = rows[example.row - 1]
    prompt, types = renderer.prompt(row, example.row)
    target = renderer.target(renderer.target_text(row, example.row))
    kept = [prompt.spans[index] for index in kept_tokens(types, len(example.prompt_ids))]
    tokens = [prompt.text[start:stop] or None for start, stop in kept]
    tokens += [target.text[start:stop] or None for start, stop in target.spans]
    tokens += [None] * (len(example.target_ids) - len(target.ids))  # the end of sequence
    return {
        "row": example.row,
        "text": prompt.text + target.text,
        "prompt": prompt.text,
        "target": target.text,
        "tokens": tokens,
        "ids": [*example.prompt_ids, *example.target_ids],
        "num_prompt_tokens": len(example.prompt_ids),
        "num_target_tokens": len(example.target_ids),
        "truncated": len(example.prompt_ids) < len(prompt.ids),
    }


def _lengths(examples: Examples) -> dict[str, float]:
    lengths = [example.num_tokens for example in (*examples.train, *examples.held_out)]
    return {
        "min": min(lengths),
        "mean": round(sum(lengths) / len(lengths), 2),
        "max": max(lengths),
    }


def _wrong(field: str, fault: str, expected: str, came: str) -> JobInvalid:
    return JobInvalid(
        f"{field}: {fault}; expected {expected}, came {came}",
        field=field,
        expected=expected,
        came=came[:200],
    )
