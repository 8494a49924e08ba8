"""The image's preStop hook: no new requests, and the running ones may end. Status 0 in any case.

`POST /drain` needs a key with the scope "admin" where the server asks for keys: $DRAIN_KEY.
Without one this only waits until nobody sends anything here any more; SIGTERM then does the rest.
Standard library only, and never through a proxy.
"""

from __future__ import annotations

import os
import sys
import time
import urllib.request

# Until every proxy has heard that this server is going.
SETTLE_SECONDS = 5
DRAIN_SECONDS = 30

port = os.environ.get("GRAFTWORK_PORT", "8000")
key = os.environ.get("DRAIN_KEY", "")
request = urllib.request.Request(
    f"http://127.0.0.1:{port}/drain?seconds={DRAIN_SECONDS}",
    method="POST",
    headers={"authorization": f"Bearer {key}"} if key else {},
)
began = time.monotonic()
try:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=DRAIN_SECONDS + 5) as reply:
        reply.read()
except OSError as error:
    sys.stderr.write(f"/drain: {error}\n")
time.sleep(max(0.0, SETTLE_SECONDS - (time.monotonic() - began)))
