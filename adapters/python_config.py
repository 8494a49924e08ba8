"""PEFT's config classes as PEFT's users call them: positional arguments, ValueErrors, methods.

`adapter_config.json` is not read here: `adapters.method.parse_config` validates it, without any of these
rules. Independent of the fields of a config, of methods and of checkpoints.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Self

from pydantic import BaseModel, ValidationError
from pydantic._internal._model_construction import ModelMetaclass
from pydantic.fields import FieldInfo

from adapters.field_errors import close_to, explain
from adapters.peft_types import TaskType

CONFIG_FILE = "adapter_config.json"


class ConfigMeta(ModelMetaclass):
    """Makes a call of a config class what it is in PEFT.

    A metaclass, because an `__init__` of its own would run for checkpoints too.
    """

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 (a metaclass)
        """An instance, as PEFT's dataclass makes it.

        Raises:
            TypeError: an argument that is unknown, given twice, or one too many.
            ValueError: a value that PEFT's class refuses, or one of the wrong kind.
        """
        fields: dict[str, FieldInfo] = cls.model_fields  # type: ignore[attr-defined]
        given = _named(cls.__name__, list(fields), args, kwargs)
        if "task_type" in given:
            given["task_type"] = task_type(given["task_type"])
        kept = {
            name: plain(value)
            for name, value in given.items()
            # None stands for the default, as a null does in a file.
            if value is not None or fields[name].default is None
        }
        try:
            config = super().__call__(**kept)
        except ValidationError as error:
            found = explain(error.errors(include_url=False), cls)
            raise ValueError(f"{cls.__name__}: {found.message}") from error
        config.check_as_peft()
        return config


def _named(
    owner: str, fields: list[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """All arguments by name; positional ones in the order of PEFT's fields."""
    if len(args) > len(fields):
        raise TypeError(f"{owner} takes at most {len(fields)} arguments, {len(args)} were given")
    given = dict(zip(fields, args, strict=False))
    for name, value in kwargs.items():
        if name in given:
            raise TypeError(f"{owner} got multiple values for argument {name!r}")
        if name not in fields:
            near = close_to(name, fields)
            hint = f"did you mean {near!r}?" if near else f"it has {', '.join(fields)}"
            raise TypeError(f"{owner} got an unexpected keyword argument {name!r}; {hint}")
        given[name] = value
    return given


def task_type(value: Any) -> str | None:
    """PEFT's name of a task, as plain text.

    Raises:
        ValueError: no such task, as PEFT raises it.
    """
    if value is None or value in list(TaskType):
        return None if value is None else str(TaskType(value))
    tasks = list(TaskType)
    letters = "".join(char for char in str(value).upper() if char.isalnum())
    near = {"".join(task.split("_")): task for task in tasks}.get(letters.removeprefix("TASKTYPE"))
    hint = f"did you mean {near.value!r}?" if near else f"expected one of {', '.join(tasks)}"
    raise ValueError(f"invalid task type {value!r}; {hint}")


def plain(value: Any) -> Any:
    """The value as a file would hold it: an enumeration member, a path, a tuple or an array as such."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if callable(listed := getattr(value, "tolist", None)):  # of numpy and torch
        return listed()
    return list(value) if isinstance(value, tuple) else value


class PythonConfig(BaseModel, metaclass=ConfigMeta):
    """The methods of PEFT's config classes. Source: peft/config.py, `PeftConfigMixin`."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        # PEFT's configs are dataclasses: asdict, fields and replace of the standard library work.
        named = [
            (name, Any, dataclasses.field(default=info.default))
            for name, info in cls.model_fields.items()
        ]
        like = dataclasses.make_dataclass(cls.__name__, named)
        cls.__dataclass_fields__ = vars(like)["__dataclass_fields__"]

    def check_as_peft(self) -> None:
        """Refuse what PEFT's class refuses when it is called, and this library has no need to.

        Raises:
            ValueError: with the field and what PEFT expects.
        """

    def __str__(self) -> str:
        return repr(self)

    @property
    def is_prompt_learning(self) -> bool:
        """Whether the method has virtual tokens."""
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        """False: adaption prompts are not served."""
        return False

    def to_dict(self) -> dict[str, Any]:
        """Every field by PEFT's name."""
        return self.model_dump()

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write `adapter_config.json`, as PEFT reads it, into a folder that is made if needed.

        Args:
            save_directory: the folder.
            kwargs: `auto_mapping_dict`, written as the field `auto_mapping`.

        Raises:
            NotADirectoryError: a file is there.
            TypeError: another argument, such as `push_to_hub`: nothing is uploaded here.
        """
        written = {**self.model_dump(mode="json")}
        if (auto_mapping := kwargs.pop("auto_mapping_dict", None)) is not None:
            written["auto_mapping"] = auto_mapping
        if kwargs:
            raise TypeError(
                f"save_pretrained takes no {next(iter(kwargs))!r}: it writes a folder and uploads nothing"
            )
        folder = Path(save_directory)
        if folder.is_file():
            raise NotADirectoryError(f"{folder} is a file, expected a folder or a new path")
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(written, indent=2, sort_keys=True)
        (folder / CONFIG_FILE).write_text(text, encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, subfolder: str | None = None, **kwargs: Any
    ) -> Self:
        """The config of a folder, as the class of its `peft_type`.

        Args:
            pretrained_model_name_or_path: the folder. Hub ids are not downloaded.
            subfolder: of that folder.
            kwargs: PEFT's options of a download, which a folder does not need; they have no effect.

        Raises:
            ValueError: the folder has no `adapter_config.json`, or PEFT refuses its values.
            AdapterError: it is not a config of a served method.
        """
        folder = Path(pretrained_model_name_or_path) / (subfolder or "")
        path = folder / CONFIG_FILE
        if not path.is_file():
            raise ValueError(
                f"no {CONFIG_FILE} at {str(folder)!r}, expected a folder that holds one; an adapter "
                "on the hub is downloaded with `hf download NAME --local-dir FOLDER` first"
            )
        return cls.from_peft_type(**cls.from_json_file(path))

    @classmethod
    def from_json_file(cls, path_json_file: str | Path, **kwargs: Any) -> dict[str, Any]:
        """The fields of an `adapter_config.json` as they stand there.

        Raises:
            AdapterError: not one JSON object.
        """
        raw: dict[str, Any] = _loading().read_fields(Path(path_json_file))
        return raw

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> Self:
        """The config of these fields, as the class of their `peft_type`, else as this class.

        Raises:
            AdapterError: another method than the served ones, or a field of it is wrong.
            ValueError: PEFT's class refuses the values.
        """
        config: Self = _loading().config_of(cls, kwargs)
        return config

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """The arguments unchanged, as in PEFT for these methods."""
        return kwargs

    def push_to_hub(self, *_: Any, **__: Any) -> NoReturn:
        """Not offered.

        Raises:
            NotImplementedError: always, with what to do instead.
        """
        raise NotImplementedError(
            "nothing is uploaded from here: write the folder with save_pretrained, then "
            "`hf upload NAME FOLDER`"
        )


def _loading() -> Any:
    # PEFT puts loaders on the class that they load. The table of methods lies above this file, so it is
    # imported when one of them is called.
    return importlib.import_module("adapters.config_loading")
