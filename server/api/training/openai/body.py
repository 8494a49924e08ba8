"""The body of `POST /v1/fine_tuning/jobs`, and what it comes to as a request for training.

OpenAI's fields, with our methods beside its `supervised`, which means IA3 here. Everything that a job
of `/train` may say can stand in the method's block. Knows no files, no rows and no jobs.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from adapters.training.job import (
    METHOD_NAMES,
    HyperparameterRequest,
    MethodName,
    TrainingOptions,
    TrainingRequest,
    method_name,
    why_no_method,
)
from adapters.training.recipes import RECIPES
from adapters.training.shapes import Format
from server.api.error_replies import describe_validation, quoted
from server.api.openapi.constraints import (
    NAME,
    NO_STRAY_ADAPTERS,
    NULL,
    Schema,
    constrained,
    not_both,
    nullable,
)
from server.api.schemas import Text
from server.errors import Contradiction, RequestInvalid

# What OpenAI's own name of a method means here: the method whose recipe measured best.
SUPERVISED = "supervised"
DEFAULT_METHOD: MethodName = "ia3"
METHOD_TYPES: dict[str, MethodName] = {
    SUPERVISED: DEFAULT_METHOD,
    **{name: name for name in get_args(MethodName)},
}
MAX_METADATA = 16

Auto = Literal["auto"]
Epochs = Annotated[int, Field(ge=1, le=10_000)]
BatchSize = Annotated[int, Field(ge=1, le=1024)]
Multiplier = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]
MetadataName = Annotated[Text, StringConstraints(max_length=64)]
MetadataValue = Annotated[Text, StringConstraints(max_length=512)]


class TuningHyperparameters(HyperparameterRequest):
    """OpenAI's three, and those of `/train`; "auto" is the same as left out."""

    model_config = ConfigDict(json_schema_extra=constrained(anyOf=not_both("epochs", "max_steps")))

    n_epochs: Auto | Epochs | None = Field(
        None, description="Passes over the data; the recipe's if left out."
    )
    batch_size: Auto | BatchSize | None = Field(  # type: ignore[assignment]
        None, description="Rows a step; the recipe's if left out."
    )
    learning_rate_multiplier: Auto | Multiplier | None = Field(
        None, description="Times the learning rate of the method's recipe."
    )


class MethodBlock(TrainingOptions):
    """Options of a method: its optimisation, PEFT's fields and those of `/train`."""

    template: Annotated[str, Field(min_length=1)] | None = Field(
        None,
        description="Makes a prompt of a row's columns; for data in neither of OpenAI's forms.",
    )
    target: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="The column to answer; given where template is."
    )
    hyperparameters: TuningHyperparameters | None = Field(None, description="The optimisation.")


_BLOCK = nullable({"$ref": "#/components/schemas/MethodBlock"})


def _only_of_its_type(name: str) -> Schema:
    """A method's block is left out, or null, unless its name is the type."""
    chosen: Schema = {"properties": {"type": {"const": name}}}
    if name != SUPERVISED:
        chosen["required"] = ["type"]
    return {"anyOf": [chosen, {"properties": {name: NULL}}]}


class MethodChoice(BaseModel):
    """OpenAI's `method`: a type, and under the type's own name what there is to say about it."""

    model_config = ConfigDict(
        extra="allow",
        strict=True,
        json_schema_extra=constrained(
            properties={
                "type": {"enum": list(METHOD_TYPES)},
                **{name: {**_BLOCK, "description": f"Options of {name}."} for name in METHOD_TYPES},
            },
            additionalProperties=NULL,
            allOf=[_only_of_its_type(name) for name in METHOD_TYPES],
        ),
    )

    type: Text = Field(
        SUPERVISED,
        description=f"One of {', '.join(METHOD_TYPES)}; supervised is {DEFAULT_METHOD}.",
    )


class TuningBody(BaseModel):
    """Body of `POST /v1/fine_tuning/jobs`."""

    model_config = ConfigDict(
        extra="allow",
        strict=True,
        allow_inf_nan=False,
        json_schema_extra=constrained(
            **NO_STRAY_ADAPTERS,
            properties={"suffix": NAME},
            example={
                "model": "SmolLM2-135M-Instruct",
                "training_file": "file-0123456789abcdef01234567",
                "suffix": "complaints",
                "method": {
                    "type": "ia3",
                    "ia3": {"hyperparameters": {"n_epochs": 3, "learning_rate_multiplier": 1.0}},
                },
            },
        ),
    )

    model: Text = Field(description="The base; adapters are not trained further.")
    training_file: Text = Field(description="Id of an uploaded file.")
    validation_file: Text | None = Field(
        None,
        description="Id of another one, whose rows are held out and evaluated after each epoch.",
    )
    suffix: Text | None = Field(
        None, description="The adapter's name. Left out, one is made of random digits."
    )
    seed: int | None = Field(None, ge=0, lt=2**63, description="Of weights, order and dropout.")
    hyperparameters: TuningHyperparameters | None = Field(
        None, description="As those in the method's block; where both speak they must agree."
    )
    method: MethodChoice | None = Field(
        None,
        description="The method, and under its own name a block with hyperparameters, config (PEFT's "
        "fields), template, target, labels and the rest of what POST /train takes.",
    )
    metadata: (
        Annotated[dict[MetadataName, MetadataValue], Field(max_length=MAX_METADATA)] | None
    ) = Field(None, description="Up to 16 texts, by which jobs can be listed.")


class Asked:
    """A body that is right in itself.

    Attributes:
        body: as it came.
        type: the method's name in the body.
        block: what it says about the method.

    Raises:
        RequestInvalid: an unknown method, or a block that is not what it must be.
        Contradiction: a block of another method, or hyperparameters that disagree.
    """

    def __init__(self, body: TuningBody) -> None:
        self.body = body
        choice = body.method or MethodChoice()
        self.type = _known_type(choice.type)
        self.block = _block(choice)
        self._hyperparameters = _hyperparameters(self)

    @property
    def place(self) -> str:
        """Where the method's block stands, for messages."""
        return f"method.{self.type}"

    def request(
        self, adapter: str, template: str, target: str, separator: str | None, format: Format
    ) -> TrainingRequest:
        """The request for training.

        Args:
            adapter: the name of the adapter to be.
            template: makes prompts.
            target: the column to answer.
            separator: stands between the two, unless the block says otherwise; None leaves it open.
            format: the shape of the rows.
        """
        fields = self.block.model_dump(exclude={"hyperparameters", "template", "target", "format"})
        if fields["target_separator"] is None:
            fields["target_separator"] = separator
        return TrainingRequest(
            **fields,
            adapter=adapter,
            method=METHOD_TYPES[self.type],
            template=template,
            target=target,
            format=format,
            hyperparameters=self._hyperparameters,
        )


def _known_type(name: str) -> str:
    name = method_name(name)
    if name not in METHOD_TYPES:
        listed = ", ".join(METHOD_TYPES)
        raise RequestInvalid(
            f"method.type: expected one of {listed}; came {quoted(name)}{why_no_method(name)}",
            field="method.type",
            expected=listed,
            came=quoted(name),
        )
    return name


def _block(choice: MethodChoice) -> MethodBlock:
    kind, extra = _known_type(choice.type), choice.model_extra or {}
    given = {method_name(name): value for name, value in extra.items() if value is not None}
    for name in given:
        if name != kind:
            raise Contradiction(
                f"method: its type is {kind!r}, and it has a block {quoted(name)}",
                field="method",
                expected=f"a block {kind!r}, or none",
                came=quoted(name),
            )
    try:
        return MethodBlock.model_validate(given.get(kind, {}))
    except ValidationError as error:
        report = describe_validation(error.errors(include_url=False), MethodBlock)
        field = f"method.{kind}" + (f".{report.field}" if report.field else "")
        raise RequestInvalid(
            f"method.{kind}: {report.message}",
            field=field,
            expected=report.expected,
            came=report.came,
        ) from error


# --- hyperparameters -----------------------------------------------------------------------------


def _hyperparameters(asked: Asked) -> HyperparameterRequest:
    """Those of the block and those beside it, by the names of `/train`."""
    field = f"{asked.place}.hyperparameters"
    given = _said(asked.block.hyperparameters)
    for name, value in _said(asked.body.hyperparameters).items():
        _agree(field, given, name, value)
    if asked.body.seed is not None:
        _agree(field, given, "seed", asked.body.seed)
    if (epochs := given.pop("n_epochs", None)) is not None:
        _agree(field, given, "epochs", epochs)
    if (multiplier := given.pop("learning_rate_multiplier", None)) is not None:
        recipe = RECIPES[METHOD_NAMES[METHOD_TYPES[asked.type]]]
        _agree(field, given, "learning_rate", multiplier * recipe.hyperparameters.learning_rate)
    return HyperparameterRequest(**given)


def _said(options: TuningHyperparameters | None) -> dict[str, Any]:
    if options is None:
        return {}
    fields = options.model_dump(exclude_none=True)
    return {name: value for name, value in fields.items() if value != "auto"}


def _agree(field: str, given: dict[str, Any], name: str, value: Any) -> None:
    """Add a value, which may have been given in another place or under another name as well."""
    if given.setdefault(name, value) != value:
        raise Contradiction(
            f"{field}.{name}: {given[name]} and {value} are both given",
            field=f"{field}.{name}",
            expected="one value",
            came=f"{given[name]} and {value}",
        )
