"""Compose and Kubernetes files against their schemas, Prometheus' files with its own tool, and what
every container is held to.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import yaml

from tests.docker.files import (
    ALERTS,
    COMPOSE,
    COMPOSE_GPU,
    DOCKER,
    KUBERNETES,
    RESOURCES,
    dashboard_expressions,
    load,
    pod,
    services,
)


def run(*command, **options):
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


@pytest.mark.parametrize("path", [COMPOSE, COMPOSE_GPU], ids=lambda path: path.name)
def test_compose_files_fit_the_compose_specification(path):
    pytest.importorskip("check_jsonschema")
    schema = ("--builtin-schema", "vendor.compose-spec")
    result = run(sys.executable, "-m", "check_jsonschema", *schema, str(path))
    assert result.returncode == 0, result.stdout


def validate(resource):
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    kubernetes_validate.validate(resource, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("path", RESOURCES, ids=lambda path: path.name)
def test_kubernetes_resources_fit_their_schemas(path):
    validate(load(path))


@pytest.mark.parametrize("folder", ["base", "gpu"])
def test_kustomize_makes_resources_that_fit_their_schemas(folder):
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    result = run("kubectl", "kustomize", str(KUBERNETES / folder))
    assert result.returncode == 0, result.stderr
    made = list(yaml.safe_load_all(result.stdout))
    assert len(made) == len(RESOURCES)
    for resource in made:
        validate(resource)
    deployment = next(one for one in made if one["kind"] == "Deployment")
    containers = deployment["spec"]["template"]["spec"]["containers"]
    server = containers[0]["resources"]["limits"]
    assert ("nvidia.com/gpu" in server) == (folder == "gpu")
    assert [one["name"] for one in containers] == (
        ["server"] if folder == "gpu" else ["server", "worker"]
    )


@pytest.mark.parametrize("name", list(services()))
def test_every_service_is_locked_down(name):
    service = services()[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in service
    for port in service.get("ports", []):
        assert port.startswith("127.0.0.1:") or name == "nginx"


@pytest.mark.parametrize("index", [0, 1])
def test_every_container_of_the_pod_is_locked_down(index):
    assert pod()["securityContext"]["runAsNonRoot"] is True
    # Service links would set GRAFTWORK_PORT, to what is no port.
    assert pod()["enableServiceLinks"] is False
    assert pod()["automountServiceAccountToken"] is False
    locked = pod()["containers"][index]["securityContext"]
    assert locked["readOnlyRootFilesystem"] is True
    assert locked["allowPrivilegeEscalation"] is False
    assert locked["capabilities"] == {"drop": ["ALL"]}


def test_threads_are_the_whole_cores_that_a_container_may_use():
    server = services()["server"]
    assert int(server["environment"]["GRAFTWORK_THREADS"]) == server["cpus"]
    for container in pod()["containers"]:
        assert container["resources"]["limits"]["cpu"].isdecimal()


needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed"
)


@needs_promtool
def test_prometheus_takes_its_configuration_and_the_alerts_fire_as_they_should():
    configuration = run("promtool", "check", "config", str(DOCKER / "prometheus/prometheus.yaml"))
    assert configuration.returncode == 0, configuration.stderr
    fired = run("promtool", "test", "rules", "alerts_test.yaml", cwd=ALERTS.parent)
    assert fired.returncode == 0, fired.stdout + fired.stderr


@needs_promtool
def test_prometheus_has_nothing_to_say_against_alerts_and_metrics(server):
    linted = run("promtool", "check", "rules", "--lint=all", "--lint-fatal", str(ALERTS))
    assert linted.returncode == 0, linted.stdout + linted.stderr
    metrics = run("promtool", "check", "metrics", input=server.get("/metrics").text)
    said = [line for line in (metrics.stdout + metrics.stderr).splitlines() if line]
    # The colon is vLLM's, and meant for rules; dashboards look for these names.
    colons = {line for line in said if line.endswith("metric names should not contain ':'")}
    assert [line for line in said if line not in colons] == []
    assert all(line.startswith("vllm:") for line in colons)
    assert len(colons) > 10  # it has looked


@needs_promtool
def test_prometheus_can_parse_every_expression_of_the_dashboard(tmp_path):
    rules = [
        {"record": f"panel:{i}", "expr": one.replace("$__rate_interval", "1m")}
        for i, one in enumerate(dashboard_expressions())
    ]
    assert len(rules) > 30
    path = tmp_path / "rules.json"
    path.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    result = run("promtool", "check", "rules", str(path))
    assert result.returncode == 0, result.stderr
