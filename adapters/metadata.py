"""What is stored with an adapter beside its checkpoint, and what is required of it.

Independent of checkpoints, of the store and of HTTP.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from adapters.base_model import BaseModelSpec
from adapters.checkpoint.folder import shorten
from adapters.errors import BaseMismatch, ConfigInvalid
from adapters.field_errors import quoted
from adapters.template import Tokenization

Source = Literal["uploaded", "trained", "combined", "loaded", "watched"]

# Of a recipe: see `AdapterMetadata.default_temperature`.
DEFAULT_TEMPERATURE = "default_temperature"

# The fields that whoever adds an adapter may set; the others are recorded.
SETTABLE_FIELDS = (
    "description",
    "template",
    "labels",
    "target_separator",
    "append_eos",
    "tokenization",
)


@dataclass(frozen=True, kw_only=True)
class AdapterMetadata:
    """An adapter's metadata.

    Attributes:
        description: free text.
        template: `{column}` template of its prompts.
        labels: possible outputs, if it is a classifier.
        target_separator: text between prompt and target.
        append_eos: whether targets ended with the end-of-sequence token in training; None unknown.
        tokenization: treatment of the template's trailing white space: "boundary" moves it to the
            target, "as_written" leaves it.
        base_digest: digest of the base, if it was trained here; else None.
        recipe: training settings, or the parts of a sum, if it was made here (JSON).
        job_id: the training job that made it, if any.
        metrics: training metrics (JSON).
        source: origin: an upload, a training job, a sum of adapters, one of the operator's folders
            loaded by a client, or the operator's watched directory.
        source_path: the operator's folder, for the last two.
    """

    description: str | None = None
    template: str | None = None
    labels: tuple[str, ...] | None = None
    target_separator: str = " "
    append_eos: bool | None = None
    tokenization: Tokenization = "boundary"
    base_digest: str | None = None
    recipe: dict[str, Any] | None = None
    job_id: str | None = None
    metrics: dict[str, Any] | None = None
    source: Source = "uploaded"
    source_path: str | None = None

    @property
    def default_temperature(self) -> float | None:
        """The temperature of OpenAI's routes where a request gives none; None is their own, 1.

        A classifier's is 0: a drawn label is a wrong one as often as the model is unsure. The recipe of
        an adapter that was trained here has it as `DEFAULT_TEMPERATURE`.
        """
        stored = (self.recipe or {}).get(DEFAULT_TEMPERATURE)
        if isinstance(stored, int | float) and 0 <= stored <= 2:
            return float(stored)
        return 0.0 if self.labels else None

    def require_base(self, base: BaseModelSpec) -> None:
        """Raise BaseMismatch if the adapter was trained here on another base."""
        self.require_digest(base.digest)

    def require_digest(self, served: str) -> None:
        """As `require_base`, with the digest of the base that is served."""
        if self.base_digest in (None, served):
            return
        name = (self.recipe or {}).get("base_name")
        named = f"{quoted(name)} " if isinstance(name, str) else ""
        raise BaseMismatch(
            f"the adapter was trained on the base {named}(digest {str(self.base_digest)[:12]}), this is "
            f"another one ({served[:12]}); add it where its own base is served (--base)",
            field="base_digest",
            expected=served,
            came=self.base_digest,
        )

    def checked(self) -> AdapterMetadata:
        """The metadata as it is read back once it was stored as JSON.

        Raises:
            ConfigInvalid: a field is not JSON that UTF-8 can encode, or `tokenization` is unknown.
        """
        values = {name: _plain(name, value) for name, value in self.columns().items()}
        known = get_args(Tokenization)
        if values["tokenization"] not in known:
            came = shorten(values["tokenization"])
            raise ConfigInvalid(
                f"tokenization: expected one of {', '.join(known)}, came {came!r}",
                field="tokenization",
                expected=", ".join(known),
                came=came,
            )
        return AdapterMetadata.from_columns(values)

    def columns(self) -> dict[str, Any]:
        """Field name -> value, for a store that knows JSON's types only."""
        values = {name: getattr(self, name) for name in METADATA_FIELDS}
        return values | {"labels": None if self.labels is None else list(self.labels)}

    @classmethod
    def from_columns(cls, values: Mapping[str, Any]) -> AdapterMetadata:
        """Rebuild from `columns`; a source or a tokenization that is unknown here becomes the default."""
        labels = values["labels"]
        known = {
            "labels": None if labels is None else tuple(labels),
            "source": values["source"] if values["source"] in get_args(Source) else "uploaded",
            "tokenization": "as_written" if values["tokenization"] == "as_written" else "boundary",
        }
        return AdapterMetadata(**{**values, **known})

    def differs_from(self, other: AdapterMetadata) -> bool:
        """Whether any field but the origin (`source`, `source_path`) differs."""
        origin = {"source": self.source, "source_path": self.source_path}
        return self.columns() != other.columns() | origin


METADATA_FIELDS = tuple(field.name for field in fields(AdapterMetadata))


def _plain(name: str, value: Any) -> Any:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigInvalid(f"{name} holds half a surrogate pair", field=name) from error
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigInvalid(f"{name}: expected plain JSON; {error}", field=name) from error
    return json.loads(text)
