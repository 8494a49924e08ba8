"""Logging: structlog, with the same format for the libraries' lines. Never a prompt, never an output.

Events carry names, ids, numbers and durations. Text from a request must not be logged, here or elsewhere.
"""

from __future__ import annotations

import logging
import sys
from typing import Literal

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

LogFormat = Literal["console", "json"]


def configure(log_format: LogFormat, level: str) -> None:
    """Send every log line of the process to standard error, in one format.

    Args:
        log_format: "console" for people, "json" for machines.
        level: a level's name, such as "info".
    """
    number = logging.getLevelNamesMapping()[level.upper()]
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    # In console lines, text from a request (a path) must not break or colour the line.
    escape: list[Processor] = [] if log_format == "json" else [_escape]
    renderer: Processor = (
        structlog.processors.JSONRenderer()
        if log_format == "json"
        else structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(),
            # The rich formatter prints local variables, which may hold prompts.
            exception_formatter=structlog.dev.plain_traceback,
        )
    )
    finish = [structlog.stdlib.ProcessorFormatter.remove_processors_meta, *escape]
    if log_format == "json":
        finish.append(structlog.processors.format_exc_info)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared, processors=[*finish, renderer]
        )
    )
    logging.basicConfig(handlers=[handler], level=number, force=True)
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )


def _escape(_logger: WrappedLogger, _name: str, event: EventDict) -> EventDict:
    """Escape unprintable text as Python does; tracebacks are formatted after this."""
    return {
        key: ascii(value)[1:-1] if isinstance(value, str) and not value.isprintable() else value
        for key, value in event.items()
    }
