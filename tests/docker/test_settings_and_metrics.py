"""What compose, manifests, guide, dashboard and alerts name is there, under that name."""

from __future__ import annotations

import re

import pytest

from server.api import error_replies as errors
from server.config.settings import Settings
from server.engine import client
from server.telemetry.exposition import FAMILIES
from tests.docker.files import (
    DASHBOARD,
    DOCKER,
    GUIDE,
    ROOT,
    alert_expressions,
    dashboard_expressions,
    environments,
    pod,
    services,
)
from tests.documentation import hooks

SETTINGS = {f"GRAFTWORK_{name.upper()}" for name in Settings.model_fields}
METRIC = re.compile(r"\b(?:vllm:|graftwork_|process_)\w+")
EXPRESSIONS = [*dashboard_expressions(), *alert_expressions()]
# What Prometheus adds to every row, and to a histogram's.
ADDED_LABELS = {"instance", "job", "le"}
PROCESS = re.compile(r"(graftwork_engine_)?process_\w+")


@pytest.mark.parametrize(
    ("where", "given"), list(environments()), ids=lambda value: str(value)[:40]
)
def test_every_setting_that_is_given_is_one_and_takes_its_value(
    where, given, monkeypatch, tmp_path
):
    assert set(given) - SETTINGS == set()
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    settings.engine_config()
    settings.worker_config("base")
    assert set(given) <= {f"GRAFTWORK_{name.upper()}" for name in settings.model_fields_set}


def test_every_setting_that_the_guide_names_is_one():
    named = set()
    for path in (*GUIDE, ROOT / "SECURITY.md", *DOCKER.rglob("*.yaml"), *DOCKER.rglob("*.conf")):
        named |= set(re.findall(r"\bGRAFTWORK_[A-Z_]*[A-Z]", path.read_text()))
    assert len(named) > 10
    assert named - SETTINGS == set()


def test_every_metric_that_is_shown_or_watched_is_in_the_documentation():
    table = hooks().metrics()
    for expression in EXPRESSIONS:
        for metric in METRIC.findall(expression):
            if PROCESS.fullmatch(metric):
                continue
            family = re.sub("_(bucket|sum|count)$", "", metric)
            assert family in FAMILIES, expression
            assert f"`{family}`" in table, metric


def test_the_processes_are_those_that_are_scraped(server):
    scraped = set(re.findall(r"^(\w+)", server.get("/metrics").text, re.MULTILINE))
    asked = {name for one in EXPRESSIONS for name in METRIC.findall(one) if PROCESS.fullmatch(name)}
    assert len(asked) > 4
    assert asked - scraped == set()


def test_expressions_group_and_select_by_labels_that_their_metrics_have():
    for expression in EXPRESSIONS:
        families = [
            FAMILIES[re.sub("_(bucket|sum|count)$", "", name)]
            for name in METRIC.findall(expression)
            if not PROCESS.fullmatch(name)
        ]
        has = ADDED_LABELS.union(*(family.labels for family in families))
        grouped = [
            label.strip()
            for labels in re.findall(r"\bby \(([^)]*)\)", expression)
            for label in labels.split(",")
        ]
        selected = re.findall(r"(\w+)(?:=~|!=|!~|=)\"", expression)
        assert {*grouped, *selected} - has == set(), expression


def test_the_dashboard_shows_every_metric_of_adapters():
    shown = " ".join(dashboard_expressions())
    missing = [
        name for name in FAMILIES if name.startswith("graftwork_adapter_") and name not in shown
    ]
    assert set(missing) <= {
        "graftwork_adapter_prompt_tokens_total",
        "graftwork_adapter_requests_in_flight",
    }
    assert DASHBOARD.stat().st_size > 1000


def test_refusals_of_the_proxy_have_codes_of_ours():
    conf = (DOCKER / "nginx" / "nginx.conf").read_text()
    bodies = re.findall(r"return (\d+) '\{\"error\":\"[^\"]+\",.*\"code\":\"(\w+)\"\}'", conf)
    statuses = {refusal.code: refusal.status for refusal in errors.TABLE.values()}
    statuses |= {code: status for status, code in errors.HTTP_CODES.items()}
    assert len(bodies) == 7
    for status, code in bodies:
        assert code in statuses, code
        assert int(status) in (statuses[code], 504), code


def test_a_server_that_replaces_its_engine_is_not_ended_meanwhile():
    probe = pod()["containers"][0]["livenessProbe"]
    # Time to end the one that hangs, the pause, and what the next one is given to start: twice.
    once = client._STOP_SECONDS + client._LEAST_START_SECONDS
    pauses = client._PAUSE_SECONDS * (1 + 2)
    assert probe["periodSeconds"] * probe["failureThreshold"] >= 2 * once + pauses


def test_time_is_left_for_streams_and_checkpoints_to_end():
    for name in ("server", "worker"):
        service = services()[name]
        needed = int(service["environment"].get("GRAFTWORK_SHUTDOWN_SECONDS", "30"))
        assert int(service["stop_grace_period"].removesuffix("s")) > needed
    drain = re.findall(r"^\w+_SECONDS = (\d+)$", (DOCKER / "drain.py").read_text(), re.MULTILINE)
    given = {one["name"]: one.get("value") for one in pod()["containers"][0]["env"]}
    needed = int(given["GRAFTWORK_SHUTDOWN_SECONDS"]) + sum(int(seconds) for seconds in drain)
    assert pod()["terminationGracePeriodSeconds"] > needed
