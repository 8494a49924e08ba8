"""A group of commands that says what was meant where a command line is wrong.

Typer looks for options of similar letters; people also bring the names of other programs. It checks values
with pydantic, whose words are replaced. Knows no command.
"""

from __future__ import annotations

import re
import shlex
from typing import Any

import typer
from pydantic import ValidationError
from typer.core import TyperGroup

from adapters.field_errors import close_to, explain, listed, quoted

# What every error of a command line is.
UsageError: type[Any] = typer.BadParameter.__mro__[1]

# Option of other programs -> ours; only those that the command has are suggested.
_OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "--model": ("--adapter", "--adapters", "--base"),
    "--model-name": ("--adapter", "--base"),
    "--model-path": ("--base",),
    "--base-model": ("--base",),
    "--lora": ("--adapter",),
    "--adapter": ("--adapters", "--register", "--name"),
    "--adapter-name": ("--register", "--name", "--adapter"),
    "--adapter-path": ("--adapter",),
    "--name": ("--register", "--adapter"),
    "--output": ("--out",),
    "--output-dir": ("--out",),
    "--save": ("--out",),
    "--input": ("--prompt", "--data"),
    "--inputs": ("--prompt",),
    "--text": ("--prompt",),
    "--file": ("--data",),
    "--dataset": ("--data",),
    "--train-file": ("--data",),
    "--rows": ("--data",),
    "--label": ("--labels", "--target"),
    "--label-column": ("--target",),
    "--column": ("--target",),
    "--prompt": ("--template",),
    "--peft-type": ("--method",),
    "--type": ("--method",),
    "--peft-config": ("--config",),
    "--num-epochs": ("--epochs",),
    "--num-train-epochs": ("--epochs",),
    "--steps": ("--max-steps",),
    "--max-tokens": ("--max-new-tokens",),
    "--server": ("--url",),
    "--endpoint": ("--url",),
    "--address": ("--host", "--url"),
    "--dir": ("--data-dir", "--out"),
    "--force": ("--yes",),
    "--num-virtual-tokens": ("--config",),
}


# Command of other programs -> ours, where the group has it.
_OTHER_COMMANDS = {
    "delete": "remove",
    "rm": "remove",
    "ls": "list",
    "get": "show",
    "describe": "show",
    "info": "show",
    "upload": "add",
    "register": "add",
    "load": "preload",
    "stop": "cancel",
    "kill": "cancel",
    "logs": "log",
    "follow": "events",
    "watch": "events",
    "diff": "compare",
    "start": "serve",
    "run": "serve",
    "server": "serve",
    "predict": "generate",
    "infer": "generate",
    "complete": "generate",
    "evaluate": "eval",
    "test": "eval",
    "fit": "train",
    "finetune": "train",
    "config": "settings",
    "check": "doctor",
    "benchmark": "bench",
    "version": "--version",
    "help": "--help",
}
# What a word without an option is meant for, by the first one that the command has.
_OF_BARE_WORDS = ("--prompt", "--data")
_EXTRA = re.compile(r"argument\S* \((.*)\)\.?$", re.DOTALL)
_KINDS = "arguments and options:"
_NOT_ONE_OF = re.compile(r"(?:Value error, )?'(.*)' is not one of (.+?)\.?")


class CommandGroup(TyperGroup):
    """As typer's, with better words about what was typed wrongly."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; a wrong command line is refused with what was probably meant."""
        try:
            return super().invoke(ctx)
        except UsageError as error:
            _explain(error, self)
            raise


def _explain(error: Any, group: TyperGroup) -> None:
    """Put better words into an error of the command line; typer's classes for them are private."""
    if isinstance(error.__cause__, ValidationError):
        error.message = _about_a_value(error.__cause__)
    elif hasattr(error, "param_type") and error.ctx is not None and error.param is not None:
        # The given ones were read before: all missing required ones are reported at once.
        lacking = [one for one in error.ctx.command.params if _lacks(one, error.ctx.params)]
        if len(lacking) > 1:
            error.param_hint = listed([one.get_error_hint() for one in lacking])
            error.param_type = _KINDS if _kinds(lacking) > 1 else f"{lacking[0].param_type_name}s"
    elif hasattr(error, "possibilities") and error.ctx is not None:
        name = error.option_name.replace("_", "-")
        has = {flag for one in error.ctx.command.params for flag in one.opts}
        named = [one for one in _OTHER_NAMES.get(name, ()) if one in has]
        near = [one for one in error.possibilities or () if one not in ("--help", "-h", *named)]
        error.possibilities = named or near
    elif error.message.startswith("Got unexpected extra argument") and error.ctx is not None:
        error.message += _as_option_of(error)
    elif error.message.startswith("No such command") and "Did you mean" not in error.message:
        words = error.message.split("'")
        meant = _OTHER_COMMANDS.get(words[1]) if len(words) > 1 else None
        if meant and (
            meant in group.commands or (meant.startswith("-") and "serve" in group.commands)
        ):
            error.message += f" Did you mean {meant!r}?"


def _as_option_of(error: Any) -> str:
    """The option that a word without one was probably meant for; empty where none is known."""
    has = {flag for one in error.ctx.command.params for flag in one.opts}
    words = _EXTRA.search(error.message)
    option = next((one for one in _OF_BARE_WORDS if one in has), None)
    return f"; did you mean {option} {shlex.quote(words[1])}?" if option and words else ""


def _lacks(parameter: Any, given: dict[str, Any]) -> bool:
    return bool(parameter.required) and parameter.name not in given


def _kinds(parameters: list[Any]) -> int:
    return len({one.param_type_name for one in parameters})


def _about_a_value(error: ValidationError) -> str:
    found = error.errors(include_url=False)
    if choice := _NOT_ONE_OF.fullmatch(str(found[0]["msg"])):
        close = close_to(choice[1], [one.strip("' ") for one in choice[2].split(",")])
        hint = f" (did you mean {close!r}?)" if close else ""
        return f"expected {choice[2]}{hint}, came {quoted(choice[1])}"
    said = explain(found)
    return f"expected {said.expected}, came {said.came}"
