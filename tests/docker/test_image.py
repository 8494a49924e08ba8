"""What the Dockerfile copies is there, and enough; the scripts of the image do their work."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.docker.files import DOCKER, DOCKERFILE, ROOT

IMPORTED = (
    "import sys, server.base.__main__\n"
    "print(*(m.__file__ for n, m in sys.modules.items() if n.split('.')[0] in ('adapters', 'server')))"
)


def copied():
    """(what, where) of every COPY from the context."""
    for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE.read_text(), re.MULTILINE):
        *sources, target = line.split()
        yield from ((source, target) for source in sources)


def allowed(path):
    """Whether .dockerignore lets a path into the context."""
    kept = re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    return any(path == one or path.startswith(f"{one}/") for one in kept)


def test_everything_that_is_copied_is_there_and_in_the_context():
    sources = [source for source, _ in copied() if source != "."]
    assert len(sources) > 8
    for source in sources:
        assert (ROOT / source).exists(), source
        assert allowed(source), source


def test_the_layer_of_the_base_has_all_that_its_making_imports():
    ran = subprocess.run(
        [sys.executable, "-c", IMPORTED], cwd=ROOT, capture_output=True, text=True, check=True
    )
    sources = [source for source, _ in copied()]
    for path in ran.stdout.split():
        name = str(path).removeprefix(f"{ROOT}/")
        assert any(name == one or name.startswith(f"{one}/") for one in sources), name


def test_images_are_pinned():
    text = DOCKERFILE.read_text()
    base = re.search(r"^ARG PYTHON_IMAGE=(\S+)$", text, re.MULTILINE)
    assert base is not None
    assert re.fullmatch(r"python:3\.11-slim-\w+", base.group(1))
    named = re.findall(r"image: ([\w./-]+:\S+)", (DOCKER / "compose.yaml").read_text())
    assert len(named) == 3
    assert not [one for one in named if one.endswith(":latest")]


def test_the_requirements_are_those_of_the_package():
    script = [sys.executable, str(DOCKER / "requirements.py"), "otel"]
    ran = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = ran.stdout.splitlines()
    assert any(line.startswith("torch") for line in lines)
    assert any(line.startswith("opentelemetry-sdk") for line in lines)
    assert not any(line.startswith("pytest") for line in lines)


def test_the_health_check_says_what_readyz_says(server, unused_tcp_port_factory):
    def check(port):
        script = [sys.executable, str(DOCKER / "healthcheck.py")]
        environment = {"GRAFTWORK_PORT": str(port), "http_proxy": "http://127.0.0.1:1"}
        return subprocess.run(script, env=environment, capture_output=True, text=True, check=False)

    assert check(server.base_url.port).returncode == 0
    gone = check(unused_tcp_port_factory())
    assert gone.returncode == 1
    assert "/readyz" in gone.stderr


@pytest.mark.parametrize("build", ["cpu", "cuda", "rocm"])
def test_torch_comes_in_the_build_that_was_asked_for(build, tmp_path):
    """The real script, with a pip that writes down what it was asked and has no +cpu build."""
    asked = tmp_path / "asked"
    pip = tmp_path / "pip"
    pip.write_text(f'#!/bin/sh\necho "$@" >> {asked}\ncase "$*" in *+cpu) exit 1;; esac\n')
    pip.chmod(0o755)
    ran = subprocess.run(
        ["sh", str(DOCKER / "install_torch.sh"), build],
        cwd=ROOT,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "TORCH_INDEX_URL": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    words = [line.split()[-1] for line in asked.read_text().splitlines()] if asked.exists() else []
    version = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert version is not None
    if build == "cpu":
        assert words == [f"torch=={version[1]}+cpu", f"torch=={version[1]}"]
        assert "TORCH_INDEX_URL" in ran.stderr
    elif build == "cuda":
        assert words == [f"torch==={version[1]}"]
    else:
        assert ran.returncode == 2
        assert words == []
