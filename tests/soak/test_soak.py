"""The short form of the soak: all of it but the judgement of memory, which needs minutes to settle."""

from __future__ import annotations

import pytest

from tests.soak.run import Plan, report, soak

pytestmark = [pytest.mark.soak, pytest.mark.filterwarnings("default")]


def test_everything_at_once(tmp_path):
    outcome = soak(
        Plan(
            10,
            None,
            tmp_path,
            calibration_seconds=2,
            memory_after_seconds=3,
            memory_share=None,
            train_seconds=30,
        )
    )
    assert not outcome.faults, report(outcome)
    assert not outcome.tally.num_faults, report(outcome)
    assert outcome.tally.compared > 0
    assert any(how == "429" for _, how in outcome.tally.outcomes), report(outcome)
