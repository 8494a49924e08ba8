"""What changes while others generate: adapters come, change, add up, move and go; jobs train.

Each change is one request with the statuses that are in order; anything else is a fault. Knows the
routes of management; nothing of generation.
"""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import httpx

from tests.soak.tally import Tally

NAMES = tuple(f"changing-{number}" for number in range(6))
_SUMS = ("sum-0", "sum-1")
_ROWS = [
    {"text": f"{word} {number}", "label": label}
    for number in range(6)
    for word, label in (("lovely", "no complaint"), ("broken", "complaint"))
]
_ENDED = ("succeeded", "failed", "cancelled")


class Gardener:
    """Makes changes, one after the other; several may work side by side.

    Args:
        http: to the server.
        tally: where outcomes go.
        draw: the source of chance.
        folders: PEFT folders by method.
    """

    def __init__(
        self,
        http: httpx.AsyncClient,
        tally: Tally,
        draw: random.Random,
        folders: dict[str, list[Path]],
    ) -> None:
        self.http = http
        self.tally = tally
        self.draw = draw
        self._bytes = {
            method: [_read(folder) for folder in of_method] for method, of_method in folders.items()
        }

    async def change(self) -> None:
        """Some change."""
        makers = (self.upload, self.refused_upload, self.delete, self.combine, self.move, self.look)
        await self.draw.choices(makers, (30, 5, 20, 10, 20, 15))[0]()

    async def each_once(self) -> None:
        """Every kind of change, so that what is made on first use is there."""
        for name in NAMES:
            await self.upload(name)
        for maker in (self.combine, self.look, self.move, self.refused_upload, self.delete):
            await maker()

    async def upload(self, name: str | None = None) -> None:
        """A new adapter, a new version of one, or bytes that are there already."""
        name = name or self.draw.choice(NAMES)
        files = self.draw.choice(self._bytes[self.draw.choice(sorted(self._bytes))])
        await self.ask(
            "upload",
            ("POST", "/adapters"),
            "/adapters",
            (200, 201),
            data={"name": name},
            files=[("files", file) for file in files],
        )

    async def refused_upload(self) -> None:
        """Bytes that are no adapter."""
        (config, _), *_ = self._bytes["ia3"]
        cut = ("adapter_model.safetensors", self.draw.randbytes(300))
        await self.ask(
            "upload, damaged",
            ("POST", "/adapters"),
            "/adapters",
            (422,),
            data={"name": self.draw.choice(NAMES)},
            files=[("files", config), ("files", cut)],
        )

    async def delete(self) -> None:
        """A whole adapter, or its first version."""
        name = self.draw.choice((*NAMES, *_SUMS))
        query = self.draw.choice(["", "?version=1"])
        route = ("DELETE", "/adapters/{name}")
        await self.ask("delete", route, f"/adapters/{name}{query}", (200, 404))

    async def combine(self) -> None:
        """Two adapters that may or may not fit one another."""
        body = {
            "adapters": self.draw.sample(NAMES, 2),
            "weights": [round(self.draw.random(), 3), 0.5],
            "name": self.draw.choice(_SUMS),
        }
        route = ("POST", "/adapters/combine")
        await self.ask("combine", route, "/adapters/combine", (201, 404, 412, 422), json=body)

    async def move(self) -> None:
        """Onto the device, off it, or to another version."""
        name = self.draw.choice(NAMES)
        what = self.draw.choice(["preload", "unload", "rollback"])
        body: dict[str, Any] = {"json": {"version": 1}} if what == "rollback" else {}
        route = ("POST", f"/adapters/{{name}}/{what}")
        await self.ask(what, route, f"/adapters/{name}/{what}", (200, 202, 404), **body)

    async def look(self) -> None:
        """At one adapter, or all."""
        if self.draw.random() < 0.5:
            await self.ask("list", ("GET", "/adapters"), "/adapters", (200,))
            return
        name = self.draw.choice(NAMES)
        await self.ask("show", ("GET", "/adapters/{name}"), f"/adapters/{name}", (200, 404))

    async def train(self, number: int) -> None:
        """A job, to its end; every third is cancelled on its way."""
        body = {
            "adapter": f"trained-{number % 2}",
            "method": "ia3",
            "rows": _ROWS,
            "template": "{text} Label :",
            "target": "label",
            "hyperparameters": {"max_steps": 6},
        }
        reply = await self.ask("train", ("POST", "/train"), "/train", (202, 429), json=body)
        if reply is None or reply.status_code != 202:
            return
        job, path = reply.json()["id"], f"/train/{reply.json()['id']}"
        if number % 3 == 2:
            await asyncio.sleep(self.draw.random() * 4)
            cancel = ("POST", "/train/{job_id}/cancel")
            await self.ask("cancel training", cancel, f"{path}/cancel", (200, 202))
        state = await self._end_of(path)
        if state not in ("succeeded", "cancelled"):
            self.tally.fault("train", f"the job {job} {state}")
        await self.ask("delete job", ("DELETE", "/train/{job_id}"), path, (200, 204))

    async def _end_of(self, path: str) -> str:
        while True:
            reply = await self.ask("look at job", ("GET", "/train/{job_id}"), path, (200,))
            if reply is None:
                return "cannot be looked at"
            state: str = reply.json()["state"]
            if state in _ENDED:
                return state if state != "failed" else json.dumps(reply.json()["error"])
            await asyncio.sleep(0.5)

    async def unload_all(self) -> None:
        """Every adapter off the device; for the end, when nobody asks for any."""
        reply = await self.ask("list", ("GET", "/adapters"), "/adapters", (200,))
        for one in [] if reply is None else reply.json()["adapters"]:
            route = ("POST", "/adapters/{name}/unload")
            for version in one.get("versions") or [one]:
                path = f"/adapters/{one['name']}/unload?version={version['version']}"
                await self.ask("unload", route, path, (202,))

    async def delete_all(self) -> None:
        """Everything that came during the load."""
        for name in (*NAMES, *_SUMS, "trained-0", "trained-1"):
            route = ("DELETE", "/adapters/{name}")
            await self.ask("delete", route, f"/adapters/{name}", (200, 404))

    async def ask(
        self, kind: str, route: tuple[str, str], path: str, expected: tuple[int, ...], **body: Any
    ) -> httpx.Response | None:
        """One request; None where it got no reply."""
        method = route[0]
        self.tally.sent[route] += 1
        try:
            reply = await self.http.request(method, path, **body)
        except httpx.HTTPError as error:
            self.tally.left[route] += 1
            self.tally.fault(kind, f"{type(error).__name__}: {error}")
            return None
        self.tally.replies[*route, reply.status_code] += 1
        if reply.status_code not in expected:
            self.tally.fault(kind, f"{reply.status_code} {reply.text}")
        else:
            self.tally.outcomes[kind, str(reply.status_code)] += 1
        return reply


def _read(folder: Path) -> list[tuple[str, bytes]]:
    names = ("adapter_config.json", "adapter_model.safetensors")
    return [(name, (folder / name).read_bytes()) for name in names]
