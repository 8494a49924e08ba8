"""A group of commands that says which option was meant where one is not there.

Typer looks for options of similar letters; people also bring the names of other programs. Knows no command.
"""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup

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


class CommandGroup(TyperGroup):
    """As typer's, with better suggestions for options."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; an option that it lacks is told with the one that was meant."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            # Typer's class for it is private; these two attributes are what makes it one.
            name, command = getattr(error, "option_name", None), getattr(error, "ctx", None)
            if name is not None and hasattr(error, "possibilities") and command is not None:
                has = {flag for one in command.command.params for flag in one.opts}
                named = [one for one in _OTHER_NAMES.get(name.replace("_", "-"), ()) if one in has]
                near = [one for one in error.possibilities or () if one not in ("--help", *named)]
                error.possibilities = named or near
            raise
