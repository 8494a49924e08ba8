"""The image's health check: status 0 when the server would take a generation now.

Standard library only, and never through a proxy.
"""

from __future__ import annotations

import os
import sys
import urllib.error
import urllib.request

port = os.environ.get("GRAFTWORK_PORT", "8000")
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
try:
    with opener.open(f"http://127.0.0.1:{port}/readyz", timeout=4) as reply:
        sys.exit(0 if reply.status == 200 else 1)
except urllib.error.HTTPError as error:
    sys.exit(f"/readyz: {error.code} {error.read(300).decode(errors='replace')}")
except OSError as error:
    sys.exit(f"/readyz: {error}")
