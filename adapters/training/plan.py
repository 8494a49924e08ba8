"""Resolves and validates a training request and its rows.

    request -> settings -> rendered rows -> adapter -> fitted examples -> job

Each step takes the frozen results of those before it and fixes some of the job's fields; the job is made
at the end. A dry run shows the result, and a worker trains from it. No weights are read here.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from adapters.base_model import BaseModelSpec
from adapters.method import AdapterMethod, PeftConfig
from adapters.template import Column, Row, Template, default_separator, is_empty
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
from adapters.training.labels import infer_labels
from adapters.training.method_config import Start, wrong
from adapters.training.recipes import RECIPES, Recipe
from adapters.training.rendering import Renderer, RowFormat, listed_rows
from adapters.training.selection import (
    ContextSettings,
    alternating,
    by_label,
    context_of,
    split,
    without_context,
)

# Longer rows are rarely intended, and memory grows with every token.
DEFAULT_MAX_LENGTH = 2048
PREVIEW_ROWS = 3
# 4 GiB in float32 with gradients and AdamW's two states.
MAX_TRAINABLE_PARAMS = 2**28
_SHOWN = 80
_LABELS_SHOWN = 5
# Targets of more values than this are texts, not labels.
_MAX_ALIKE = 100
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")
# What programs write for a cell without a value, unlike pandas, which leaves it empty.
_WORDS_FOR_NOTHING = frozenset(("NaN", "nan", "NULL", "null", "None", "<NA>", "#N/A"))


@dataclass(frozen=True)
class Plan:
    r"""A validated job with its examples.

    Attributes:
        job: the job with every default resolved.
        examples: its training and validation examples.
        preview: the first training rows as rendered: `row`; `text`, `prompt` and `target` (with its
            separator); `tokens`, the characters of each token, None for a token without characters;
            their `ids`; `num_prompt_tokens`, `num_target_tokens`, and `truncated`.
            Bytes of a token that are no whole character are written as `\xe6`.
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
    notes: Sequence[str] = (),
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
        notes: what was found while the rows were read; they become the job's first warnings.

    Raises:
        JobInvalid: a field is wrong, or two of them disagree.
        DataInvalid: the rows cannot be trained on.
        TemplateInvalid: the template does not parse.
        CheckpointError: the config does not fit the base.
    """
    _check_texts(request)
    settings = _settings(request, rows, num_validation_rows, prompts)
    rendered = _rendered(settings, rows, encoder)
    adapter = _adapter(settings, rendered, base, base_name)
    count = adapter.num_virtual_tokens
    if max_virtual_tokens is not None:
        _at_most(max_virtual_tokens, count, "config.num_virtual_tokens", "too many virtual tokens")
    init_token_ids = _init_ids(settings, rendered, count, base)
    max_length = _max_length(request, base, count)
    trainable_params = adapter.method.num_trainable(adapter.config, base)
    _at_most(MAX_TRAINABLE_PARAMS, trainable_params, "config", "it has too many numbers to train")
    train, context = rendered.train, rendered.context
    if context.train_on_context is False:
        train = without_context(train, context)
    examples = Examples(train, rendered.held_out, rendered.label_ids)
    examples = fit(examples, max_length, request.on_too_long)
    job = TrainingJob(
        **vars(settings.row_format),
        **vars(context),
        adapter=request.adapter,
        method=adapter.method.name,
        peft_type=settings.peft_type,
        config=adapter.config.model_dump(mode="json"),
        max_length=max_length,
        on_too_long=request.on_too_long,
        init_text=settings.start.text,
        init_token_ids=init_token_ids,
        if_exists=request.if_exists,
        description=request.description,
        hyperparameters=_long_enough(settings, request, len(train)),
        base_digest=base.digest,
        base_name=base_name,
        num_rows=len(rows),
        num_validation_rows=len(rendered.held_out),
        format=request.format or "columns",
        labels_inferred=settings.labels_inferred,
        warnings=[*notes, *adapter.warnings, *_warnings(settings, rendered)],
        trainable_params=trainable_params,
    )
    preview = [_preview(example, rendered) for example in examples.train[:PREVIEW_ROWS]]
    return Plan(job, examples, preview, _lengths(examples))


def _check_texts(request: TrainingRequest) -> None:
    # JSON allows a lone surrogate such as "\ud800"; tokenizers, database and replies cannot encode it.
    for name in TrainingRequest.model_fields:
        try:
            json.dumps(getattr(request, name), ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError:
            raise wrong(name, "it is no text", "text", "half a surrogate pair") from None


# --- the request with its defaults -------------------------------------------------------------


@dataclass(frozen=True)
class _Settings:
    """A request with every default that does not depend on the base."""

    peft_type: str
    recipe: Recipe
    config: dict[str, Any]
    config_warnings: tuple[str, ...]
    start: Start
    context: ContextSettings
    default_context: bool
    row_format: RowFormat
    labels_inferred: bool
    hyperparameters: Hyperparameters
    num_validation_rows: int


def _settings(
    request: TrainingRequest, rows: Sequence[Row], num_validation_rows: int, prompts: Prompts
) -> _Settings:
    peft_type = METHOD_NAMES[request.method]
    recipe = RECIPES[peft_type]
    config, start = method_config.resolve(request, recipe)
    context = _context_settings(request, recipe)
    labels = _labels(request)
    inferred = None
    if labels is None and request.infer_labels and not request.label_names and prompts != "chat":
        inferred = infer_labels(rows, request.target)
    separator = request.target_separator
    if separator is None:
        separator = default_separator(request.template, request.tokenization)
    row_format = RowFormat(
        template=request.template,
        target=request.target,
        labels=labels or inferred,
        label_names=request.label_names,
        target_separator=separator,
        append_eos=request.append_eos,
        tokenization=request.tokenization,
        prompts=prompts,
    )
    options = _hyperparameters(request, recipe, num_validation_rows)
    return _Settings(
        peft_type=peft_type,
        recipe=recipe,
        config=config,
        config_warnings=method_config.ignored(request),
        start=start,
        context=context,
        default_context=request.context_examples is None,
        row_format=row_format,
        labels_inferred=inferred is not None,
        hyperparameters=options,
        num_validation_rows=num_validation_rows,
    )


def _labels(request: TrainingRequest) -> list[str] | None:
    labels, names = request.labels, request.label_names
    if labels is not None and (twice := _first_twice(labels)) is not None:
        raise wrong("labels", f"{twice[:_SHOWN]!r} is given twice", "different labels", repr(twice))
    if names is None:
        return labels
    named = list(dict.fromkeys(names.values()))
    if not named:
        raise wrong("label_names", "it is empty", "a name for every value", "{}")
    if labels is None:
        return named if len(named) > 1 else None
    for label in named:
        if label not in labels:
            listed = ", ".join(repr(one[:_SHOWN]) for one in labels[:10])
            came = repr(label[:_SHOWN])
            raise wrong("label_names", "a name is no label", f"one of {listed}", came)
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
        raise wrong(
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
        raise wrong(
            "hyperparameters.validation_split",
            "rows to hold out came with the job",
            "0",
            str(resolved["validation_split"]),
        )
    held_out = num_validation_rows or resolved["validation_split"]
    if resolved["early_stopping_patience"] is not None and not held_out:
        raise wrong(
            "hyperparameters.early_stopping_patience",
            "it watches held-out rows, and there are none",
            "validation_split above 0",
            str(resolved["validation_split"]),
        )
    return Hyperparameters(**resolved)


def _context_settings(request: TrainingRequest, recipe: Recipe) -> ContextSettings:
    count, seed, train_on = request.context_examples, request.context_seed, request.train_on_context
    if request.method == "cpt":
        return ContextSettings(
            recipe.context_examples if count is None else count,
            0 if seed is None else seed,
            recipe.train_on_context if train_on is None else train_on,
        )
    context = ContextSettings(count, seed, train_on)
    for name, value in vars(context).items():
        if value is not None:
            raise wrong(name, f"{request.method} has no context", f"no {name}", repr(value))
    return context


# --- what depends on the rows and the base -----------------------------------------------------


@dataclass(frozen=True)
class _Rendered:
    """The rows as token ids, split, without a length limit; `train` includes CPT's context."""

    rows: Sequence[Row]
    renderer: Renderer
    label_ids: list[tuple[int, ...]] | None
    train: list[Example]
    held_out: list[Example]
    context: ContextSettings


def _rendered(settings: _Settings, rows: Sequence[Row], encoder: Encoder) -> _Rendered:
    renderer = Renderer(settings.row_format, encoder)
    label_ids = renderer.label_ids()
    examples = renderer.examples(rows)
    train, held_out = split(examples, settings.hyperparameters, settings.num_validation_rows)
    context = settings.context
    if settings.default_context and context.context_examples is not None:
        # The recipe's number assumes data with at least as many rows.
        context = replace(context, context_examples=min(context.context_examples, len(train)))
    return _Rendered(rows, renderer, label_ids, train, held_out, context)


@dataclass(frozen=True)
class _Adapter:
    """What is trained: a method, its complete config, and sentences about fields that change nothing."""

    method: AdapterMethod[Any]
    config: PeftConfig
    warnings: tuple[str, ...]

    @property
    def num_virtual_tokens(self) -> int:
        return getattr(self.config, "num_virtual_tokens", None) or 0


def _adapter(
    settings: _Settings, rendered: _Rendered, base: BaseModelSpec, base_name: str
) -> _Adapter:
    from adapters.methods import METHODS

    raw = {**settings.config, "base_model_name_or_path": base_name}
    if settings.peft_type == "CPT":
        raw |= _context_fields(rendered, base, base_name)
    completed = method_config.complete(raw, settings.peft_type, base)
    warnings = (*settings.config_warnings, *completed.warnings)
    return _Adapter(METHODS[settings.peft_type], completed.config, warnings)


def _long_enough(settings: _Settings, request: TrainingRequest, num_train: int) -> Hyperparameters:
    """Raise the epochs to reach the recipe's `min_steps` if the request does not set a duration."""
    given, options = request.hyperparameters, settings.hyperparameters
    if given.epochs is not None or given.max_steps is not None:
        return options
    steps = Steps.of(num_train, options)
    epochs = math.ceil(settings.recipe.min_steps / steps.steps_per_epoch)
    return options.model_copy(update={"epochs": max(options.epochs or 1, epochs)})


def _context_fields(rendered: _Rendered, base: BaseModelSpec, base_name: str) -> dict[str, Any]:
    """The config fields that hold CPT's context."""
    context = rendered.context
    ids, types = rendered.renderer.context_ids(context_of(rendered.train, context))
    if len(ids) >= base.max_positions:
        raise wrong(
            "context_examples",
            f"{context.context_examples} examples have {len(ids)} tokens, and the base has "
            f"{base.max_positions} positions",
            "fewer or shorter examples",
            str(context.context_examples),
        )
    return {
        "cpt_token_ids": ids,
        "cpt_mask": [1] * len(ids),
        "cpt_tokens_type_mask": types,
        "num_virtual_tokens": len(ids),
        "tokenizer_name_or_path": base_name,
    }


def _init_ids(
    settings: _Settings, rendered: _Rendered, count: int, base: BaseModelSpec
) -> list[int] | None:
    """Initial tokens, one per virtual token; None without initialisation from tokens."""
    start, renderer = settings.start, rendered.renderer
    draw = random.Random(settings.hyperparameters.seed)  # noqa: S311 (a draw, not a secret)
    if start.kind == "default":
        return None
    if start.kind == "vocabulary":
        return [draw.randrange(base.vocab_size) for _ in range(count)]
    if start.kind == "rows":
        return _last_tokens(_texts(rendered, draw), count, renderer)
    ids = renderer.text_ids(start.text or "")
    if not ids:
        raise wrong("init_text", "it has no tokens", "at least one token", repr(start.text))
    return list(itertools.islice(itertools.cycle(ids), count))


def _texts(rendered: _Rendered, draw: random.Random) -> Iterator[str]:
    """Cycle through training rows as text, one line each: labels alternate, short rows first."""
    groups = list(by_label(rendered.train).values())
    for group in groups:
        draw.shuffle(group)
        group.sort(key=lambda example: example.num_tokens)
    for example in itertools.cycle(alternating(groups)):
        yield rendered.renderer.text(rendered.rows[example.row - 1], example.row) + "\n"


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
    fault = f"the base has {base.max_positions} positions, {num_virtual_tokens} of them for virtual tokens"
    return _at_most(room, request.max_length, "max_length", fault)


def _at_most(most: int, value: int, field: str, fault: str) -> int:
    """The value, unless it is over its bound."""
    if value > most:
        raise wrong(field, fault, f"at most {most}", str(value))
    return value


# --- what may not be intended ------------------------------------------------------------------


def _warnings(settings: _Settings, rendered: _Rendered) -> list[str]:
    """Sentences about cells without a value, labels, and the learning rate."""
    row_format, rows = settings.row_format, rendered.rows
    template = Template.parse(row_format.template)
    found = _empty_cells(template, rows)
    if settings.labels_inferred:
        listed = ", ".join(repr(label[:_SHOWN]) for label in row_format.labels or ())
        found.append(
            f"labels were not given: the values of {row_format.target[:_SHOWN]!r} are taken, {listed}; "
            "infer_labels false takes none"
        )
    if row_format.prompts == "template":
        found += _words_for_nothing(template, row_format, rows)
        found += _doubtful_labels(row_format, rendered)
    return found + _high_rate(settings)


def _empty_cells(template: Template, rows: Sequence[Row]) -> list[str]:
    found = []
    for name in template.required:
        empty = [number for number, row in enumerate(rows, start=1) if is_empty(row[name])]
        if not empty:
            continue
        hint = ""
        if any(_stands_alone(line, name) for line in template.lines):
            hint = f", which leaves a blank line in the prompt; {{?{name}}} leaves the line out"
        found.append(
            f"column {name[:_SHOWN]!r} is empty in {len(empty)} of {len(rows)} rows "
            f"({listed_rows(empty)}){hint}"
        )
    return found


def _words_for_nothing(template: Template, row_format: RowFormat, rows: Sequence[Row]) -> list[str]:
    """Sentences about columns with texts such as "NaN", except in a target whose values are named."""
    names = [*template.columns]
    if row_format.label_names is None and not _WORDS_FOR_NOTHING & {*(row_format.labels or ())}:
        names.append(row_format.target)
    found = []
    for name in names:
        cells = [(number, row.get(name)) for number, row in enumerate(rows, start=1)]
        numbers = [number for number, value in cells if value in _WORDS_FOR_NOTHING]
        if not numbers:
            continue
        words = sorted({str(value) for _, value in cells if value in _WORDS_FOR_NOTHING})
        found.append(
            f"column {name[:_SHOWN]!r} is {' or '.join(map(repr, words))} in {len(numbers)} of "
            f"{len(rows)} rows ({listed_rows(numbers)}); it is read as text: leave the cell empty "
            "if it stands for a missing value"
        )
    return found


def _doubtful_labels(row_format: RowFormat, rendered: _Rendered) -> list[str]:
    """Sentences about labels that are numbers, and about targets that are hard to tell apart."""
    found = []
    labels = row_format.labels or []
    if labels and row_format.label_names is None and all(map(_NUMBER.fullmatch, labels)):
        listed = ", ".join(repr(label) for label in labels[:_LABELS_SHOWN])
        found.append(
            f"the labels are numbers, {listed}: a base knows words, not what these numbers mean; "
            f'label_names puts them into words, such as {{{json.dumps(labels[0])}: "complaint"}}'
        )
    alike = _alike(rendered)
    if alike:
        found.append(
            f"values of {row_format.target[:_SHOWN]!r} differ only in case or in spaces around them: "
            f"{' and '.join(repr(text[:_SHOWN]) for text in alike[:_LABELS_SHOWN])}; they are learned "
            "as different answers: write them alike"
        )
    return found


def _alike(rendered: _Rendered) -> list[str]:
    """The first targets that differ only in case or in spaces around them; none where all are texts."""
    groups: dict[str, dict[str, None]] = {}
    known: set[str] = set()
    for number, row in enumerate(rendered.rows, start=1):
        text = rendered.renderer.target_text(row, number)
        if text in known:
            continue
        known.add(text)
        if len(known) > _MAX_ALIKE:
            return []
        groups.setdefault(text.strip().casefold(), {})[text] = None
    return next((list(group) for group in groups.values() if len(group) > 1), [])


def _high_rate(settings: _Settings) -> list[str]:
    rate = settings.hyperparameters.learning_rate
    if rate <= 1:
        return []
    usual = settings.recipe.hyperparameters.learning_rate
    return [
        f"hyperparameters.learning_rate is {rate:g}, which is likely to ruin the adapter; the "
        f"method's recipe has {usual:g}"
    ]


def _stands_alone(line: Sequence[str | Column], name: str) -> bool:
    return [part for part in line if isinstance(part, Column) or part.strip()] == [Column(name)]


# --- what a dry run shows --------------------------------------------------------------------


def _preview(example: Example, rendered: _Rendered) -> dict[str, Any]:
    row, renderer = rendered.rows[example.row - 1], rendered.renderer
    prompt, types = renderer.prompt(row, example.row)
    target = renderer.target(renderer.target_text(row, example.row))
    kept = [prompt.spans[index] for index in kept_tokens(types, len(example.prompt_ids))]
    ids = zip(kept, example.prompt_ids, strict=True)
    tokens = [renderer.token_text(one, prompt.text[slice(*span)]) for span, one in ids]
    tokens += [
        renderer.token_text(one, target.text[slice(*span)])
        for span, one in zip(target.spans, target.ids, strict=True)
    ]
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
