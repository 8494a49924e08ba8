"""What a server counted between two looks at its GET /metrics. Knows Prometheus' text format only."""

from __future__ import annotations

import time
from collections import Counter

import httpx
from prometheus_client.parser import text_string_to_metric_families


class Counted:
    """Differences since this was made, summed over labels.

    Samples that carry a label `adapter` are found under `NAME ADAPTER` too.
    """

    def __init__(self, url: str) -> None:
        self._url = f"{url}/metrics"
        self._before = self._scrape()

    def since(self, requests: int, *, seconds: float = 10.0) -> Counter[str]:
        """Once so many requests have ended: a client may read its last token before that."""
        end = time.monotonic() + seconds
        while True:
            now = self._scrape()
            now.subtract(self._before)
            if now["vllm:request_success_total"] >= requests or time.monotonic() > end:
                return now
            time.sleep(0.02)

    def _scrape(self) -> Counter[str]:
        reply = httpx.get(self._url, timeout=30)
        reply.raise_for_status()
        totals: Counter[str] = Counter()
        for family in text_string_to_metric_families(reply.text):
            for sample in family.samples:
                if sample.name.endswith(("_bucket", "_created")):
                    continue
                totals[sample.name] += sample.value
                if "adapter" in sample.labels:
                    totals[f"{sample.name} {sample.labels['adapter']}"] += sample.value
        return totals
