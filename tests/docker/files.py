"""What lies in docker/, read for the tests: services, containers, expressions. Knows no assertion."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
COMPOSE = DOCKER / "compose.yaml"
COMPOSE_GPU = DOCKER / "compose.gpu.yaml"
KUBERNETES = DOCKER / "kubernetes"
RESOURCES = sorted(
    path for path in (KUBERNETES / "base").glob("*.yaml") if path.name != "kustomization.yaml"
)
DASHBOARD = DOCKER / "grafana" / "dashboards" / "graftwork.json"
ALERTS = DOCKER / "prometheus" / "alerts.yaml"
DOCKERFILE = ROOT / "Dockerfile"
# What the documentation says to operators, in this order.
GUIDE = (
    ROOT / "docs" / "deploy" / "containers.md",
    ROOT / "docs" / "deploy" / "sizing.md",
    ROOT / "docs" / "deploy" / "settings.md",
    *sorted((ROOT / "docs" / "operate").glob("*.md")),
)


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def services() -> dict[str, dict[str, Any]]:
    return load(COMPOSE)["services"]


def pod() -> dict[str, Any]:
    return load(KUBERNETES / "base" / "deployment.yaml")["spec"]["template"]["spec"]


def environments() -> Iterator[tuple[str, dict[str, str]]]:
    """(where, variables of ours with the values they are given), of every container of ours."""
    for path in (COMPOSE, COMPOSE_GPU):
        for name, service in load(path)["services"].items():
            yield f"{path.name} {name}", ours(service.get("environment", {}))
    for folder in ("base", "gpu"):
        path = KUBERNETES / folder / "deployment.yaml"
        for container in load(path)["spec"]["template"]["spec"]["containers"]:
            # What the cluster fills in is a number of cores.
            given = {one["name"]: one.get("value", "4") for one in container.get("env", [])}
            yield f"{folder} {container['name']}", ours(given)
    yield "Dockerfile", dict(re.findall(r"(GRAFTWORK_\w+)=(\S+)", DOCKERFILE.read_text()))


def ours(given: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in given.items() if name.startswith("GRAFTWORK_")}


def dashboard_expressions() -> list[str]:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", [])]


def alert_expressions() -> list[str]:
    return [rule["expr"] for group in load(ALERTS)["groups"] for rule in group["rules"]]


def alert_names() -> list[str]:
    return [rule["alert"] for group in load(ALERTS)["groups"] for rule in group["rules"]]
