"""What holds for every test."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# The machine may be busy: how long an example takes says nothing about the code.
settings.register_profile("graftwork", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("graftwork")
