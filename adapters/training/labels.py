"""Labels that were not given: the values of the target column, where they are few.

Knows no tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from adapters.template import Row, text_of

# More values than this, longer ones, or values that hardly repeat are answers, not labels.
MAX_INFERRED = 20
MAX_LABEL_CHARACTERS = 60
ROWS_PER_LABEL = 3


def infer_labels(rows: Sequence[Row], target: str) -> list[str] | None:
    """The values of the target column as labels, sorted; None where they do not look like labels.

    Args:
        rows: all rows.
        target: the column to answer.
    """
    found: set[str] = set()
    for row in rows:
        if target not in row:
            return None
        found.add(text_of(row[target]))
        if len(found) > MAX_INFERRED:
            return None
    if len(found) < 2 or len(rows) < ROWS_PER_LABEL * len(found):
        return None
    # Values that differ in white space only would be hard to tell apart.
    if len({value.strip() for value in found}) < len(found) or not all(map(_is_label, found)):
        return None
    return sorted(found)


def _is_label(value: str) -> bool:
    return 0 < len(value.strip()) <= MAX_LABEL_CHARACTERS and len(value.splitlines()) == 1
