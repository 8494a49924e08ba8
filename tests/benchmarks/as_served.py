"""torch, with its threads as the server's engine has them; imported before anything else imports torch.

libgomp reads its settings when torch is loaded. Other contestants run in processes of their own, which
must not inherit them.
"""

from __future__ import annotations

import os

from server.engine.process import spin_briefly

_given = "GOMP_SPINCOUNT" in os.environ
spin_briefly()

import torch  # noqa: E402

if not _given:
    del os.environ["GOMP_SPINCOUNT"]

__all__ = ["torch"]
