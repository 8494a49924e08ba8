"""Runs of lm-eval in a process of their own: its imports take long, and its warnings are its own.

Reads a JSON list of runs from standard input, `{"model", "model_args", "tasks", "batch_size",
"apply_chat_template"}` each, and writes to the file named on the command line, a list a run: every
sample with its task, what was asked and what the model answered. Knows nothing of the server.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager

TASKS = Path(__file__).parent / "lm_eval_tasks"


def main() -> None:
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    runs = [_run(manager, plan) for plan in json.load(sys.stdin)]
    Path(sys.argv[1]).write_text(json.dumps(runs))


def _run(manager: TaskManager, plan: dict[str, Any]) -> list[dict[str, Any]]:
    result = lm_eval.simple_evaluate(
        model=plan["model"],
        model_args=plan["model_args"],
        tasks=plan["tasks"],
        batch_size=plan.get("batch_size", 1),
        apply_chat_template=plan.get("apply_chat_template", False),
        task_manager=manager,
        log_samples=True,
        bootstrap_iters=0,
    )
    return [
        {"task": task, "arguments": asked, "answer": answer, "text": sample["doc"]["text"]}
        for task, samples in result["samples"].items()
        for sample in samples
        for asked, answer in zip(sample["arguments"], _answers(sample), strict=True)
    ]


def _answers(sample: dict[str, Any]) -> list[Any]:
    """One a request: a text, a log-likelihood, or a log-likelihood with `is_greedy`."""
    return [response[0] for response in sample["resps"]]


if __name__ == "__main__":
    main()
