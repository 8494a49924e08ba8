"""Builds the image and uses it, without a Docker engine: `make image-test`, as root on Debian.

debootstrap makes a stand-in for the image that the Dockerfile begins with, buildah builds the real
Dockerfile on it, podman runs the result as docker/README.md says, and this script talks to it over
loopback. All of it lies in .graftwork/image-test, and layers are kept for the next time.

Standard library only: it runs before anything is installed.
"""

from __future__ import annotations

import argparse
import configparser
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import image_use

REPO = Path(__file__).resolve().parents[1]
WORK = REPO / ".graftwork" / "image-test"
IMAGE = "localhost/graftwork:image-test"
CONTAINER = "graftwork-image-test"
# What a tool is called, and Debian's package of it.
TOOLS = {"buildah": "buildah", "podman": "podman", "runc": "runc", "debootstrap": "debootstrap"}
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
PIP_CONFIGS = ("/etc/pip.conf", "~/.config/pip/pip.conf", "~/.pip/pip.conf")
PIP_VARIABLES = ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_TRUSTED_HOST", "TORCH_INDEX_URL")
READY_SECONDS = 240
SHUT_DOWN = "Application shutdown complete."


class Failed(Exception):
    """A step went wrong; the message is for the person who ran this."""


def main() -> int:
    """Run all steps; the exit status."""
    parser = argparse.ArgumentParser(prog="image_test.py", description=__doc__.splitlines()[0])
    parser.add_argument("--keep", action="store_true", help="leave the container running")
    parser.add_argument("--fresh", action="store_true", help="build everything anew")
    options = parser.parse_args()
    try:
        check_tools()
        if options.fresh:
            remove_work()
        WORK.mkdir(parents=True, exist_ok=True)
        with_time("stand-in for the Python image", make_base)
        with_time("build", build)
        show_sizes()
        use(keep=options.keep)
    except (Failed, image_use.Wrong) as error:
        say(f"image-test: FAILED: {error}")
        return 1
    say("image-test: passed")
    return 0


def check_tools() -> None:
    """Say which tools are missing, all at once."""
    if os.geteuid() != 0:
        raise Failed("it needs root: debootstrap and containers without a daemon do")
    missing = sorted(package for tool, package in TOOLS.items() if shutil.which(tool) is None)
    if missing:
        raise Failed(f"missing tools; on Debian: apt-get install {' '.join(missing)}")


def base_image() -> str:
    """The image that the Dockerfile begins with."""
    for line in (REPO / "Dockerfile").read_text(encoding="utf-8").splitlines():
        if line.startswith("ARG PYTHON_IMAGE="):
            return "docker.io/library/" + line.split("=", 1)[1]
    raise Failed("the Dockerfile has no ARG PYTHON_IMAGE")


def make_base() -> None:
    """Debian with its own Python 3.11, under the name that the Dockerfile asks for."""
    image = base_image()
    if run([*podman(), "image", "exists", image], check=False).returncode == 0:
        return
    root = WORK / "rootfs"
    shutil.rmtree(root, ignore_errors=True)
    packages = "python3,python3-venv,ca-certificates"
    run(["debootstrap", "--variant=minbase", f"--include={packages}", "bookworm", str(root)])
    for archive in (root / "var/cache/apt/archives").glob("*.deb"):
        archive.unlink()
    packing = ["tar", "-C", str(root), "-c", "."]
    with subprocess.Popen(packing, stdout=subprocess.PIPE) as tar:  # noqa: S603
        run([*podman(), "import", "-", image], stdin=tar.stdout)
    shutil.rmtree(root)


def build() -> None:
    """The real Dockerfile. What pip needs to know of this machine is mounted, never copied in."""
    command = ["buildah", *storage(), "bud", "--isolation", "chroot", "--pull=never"]
    command += ["--format", "docker", "--layers", "--tag", IMAGE]
    for path in dict.fromkeys(pip_needs()):
        command += ["--volume", f"{path}:{path}:ro"]
    for name in PIP_VARIABLES:
        if os.environ.get(name):
            command += ["--build-arg", name]
    run([*command, str(REPO)], log=WORK / "build.log")


def pip_needs() -> Iterator[Path]:
    """The certificates, pip's configuration, and the local folders that it names."""
    if CERTIFICATES.exists():
        yield CERTIFICATES
    for name in PIP_CONFIGS:
        path = Path(name).expanduser()
        if not path.exists():
            continue
        yield path
        config = configparser.RawConfigParser()
        config.read(path)
        for section in config.sections():
            for option in ("find-links", "index-url", "extra-index-url"):
                for place in config.get(section, option, fallback="").split():
                    folder = Path(place.removeprefix("file://"))
                    # An index is a folder `simple` beside the files that it points to.
                    folder = folder.parent if folder.name == "simple" else folder
                    if folder.is_absolute() and folder.is_dir():
                        yield folder


def show_sizes() -> None:
    """The image's size, with the stand-in and without."""
    whole, base = (
        int(output([*podman(), "image", "inspect", "--format", "{{.Size}}", image]))
        for image in (IMAGE, base_image())
    )
    say(f"image-test: the image has {whole >> 20} MiB, {(whole - base) >> 20} of them ours")


def use(*, keep: bool) -> None:
    """Start the image as the guide says, use it, stop it, start it again on the same data."""
    remove_container()
    volume = f"{CONTAINER}-data"
    run([*podman(), "volume", "rm", "--force", volume], check=False)
    run([*podman(), "volume", "create", volume])
    port = free_port()
    started = [*podman(), "run", "--detach", "--name", CONTAINER, *hardening(), "--network=host"]
    started += ["--volume", f"{volume}:/data", "--env", f"GRAFTWORK_PORT={port}"]
    started += ["--env", "GRAFTWORK_KV_MIB=256", IMAGE]
    inside = [*podman(), "exec", CONTAINER]
    with_time("an API key", lambda: image_use.take_key(make_key(volume)))
    try:
        with_time("start", lambda: start(started, port))
        image_use.look_inside(lambda *words: run([*inside, *words], check=False))
        with_time("health check", lambda: run([*podman(), "healthcheck", "run", CONTAINER]))
        with_time("generate, upload, train", lambda: image_use.use_it(port, REPO))
        with_time("stop", stop)
        with_time("start again", lambda: start([*podman(), "start", CONTAINER], port))
        with_time("the same adapters", lambda: image_use.use_again(port))
    except BaseException:
        logs = run([*podman(), "logs", "--tail", "12", CONTAINER], check=False)
        say(f"{logs.stdout}{logs.stderr}")
        raise
    finally:
        if not keep:
            remove_container()
            run([*podman(), "volume", "rm", "--force", volume], check=False)


def make_key(volume: str) -> str:
    """A key that may do everything: the image listens on every address, and asks for one."""
    words = ["keys", "create", "--name", "image-test", "--scope", "generate", "--scope", "train"]
    words += ["--scope", "adapters:read", "--scope", "adapters:write", "--scope", "admin"]
    command = [*podman(), "run", "--rm", *hardening(), "--network=none", f"--volume={volume}:/data"]
    return output([*command, IMAGE, *words])


def hardening() -> list[str]:
    """What docker/README.md tells people to run the image with."""
    words = ["--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges"]
    words += ["--tmpfs=/tmp:rw,nosuid,nodev,size=512m"]
    return [*words, "--ulimit=nofile=8192:8192", "--ulimit=nproc=4096:4096"]


def start(command: list[str], port: int) -> None:
    """Run a command that starts the container, and wait until it is ready."""
    run(command)
    end = time.monotonic() + READY_SECONDS
    while not image_use.is_ready(port):
        state = [*podman(), "inspect", "--format", "{{.State.Running}}", CONTAINER]
        if output(state) != "true":
            raise Failed("the container ended before it was ready")
        if time.monotonic() > end:
            raise Failed(f"the container was not ready within {READY_SECONDS} seconds")
        time.sleep(0.5)


def stop() -> None:
    """SIGTERM reaches the server through tini, and it ends in good order."""
    run([*podman(), "stop", "--time", "60", CONTAINER])
    code = output([*podman(), "inspect", "--format", "{{.State.ExitCode}}", CONTAINER])
    logs = run([*podman(), "logs", "--tail", "20", CONTAINER])
    # 143: it shut down, and then let the signal end it.
    if code not in ("0", "143") or SHUT_DOWN not in logs.stdout + logs.stderr:
        raise Failed(f"the server ended with status {code} on SIGTERM, and did not shut down")


# --- the machine --------------------------------------------------------------------------------


def storage() -> list[str]:
    """Images of our own, away from the machine's."""
    return ["--root", str(WORK / "storage"), "--runroot", str(WORK / "run")]


def podman() -> list[str]:
    """podman as it runs without systemd."""
    return ["podman", *storage(), "--cgroup-manager=cgroupfs", "--runtime=runc"]


def remove_container() -> None:
    """End and remove the container, if there is one."""
    run([*podman(), "rm", "--force", "--ignore", CONTAINER], check=False)


def remove_work() -> None:
    """Remove the images, the stand-in too."""
    if WORK.exists():
        remove_container()
        run([*podman(), "image", "rm", "--force", "--all"], check=False)
        shutil.rmtree(WORK, ignore_errors=True)


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run(
    command: list[str],
    *,
    check: bool = True,
    stdin: IO[bytes] | None = None,
    log: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command; Failed with the end of what it said if it fails and `check`."""
    result = subprocess.run(  # noqa: S603 - our own words
        command, check=False, capture_output=True, text=True, stdin=stdin
    )
    said = f"{result.stdout}{result.stderr}"
    if log is not None:
        log.write_text(said, encoding="utf-8")
    if check and result.returncode != 0:
        raise Failed(f"{shlex.join(command)}: exit status {result.returncode}\n{said[-3000:]}")
    return result


def output(command: list[str]) -> str:
    """What a command printed, without white space at its ends."""
    return run(command).stdout.strip()


def with_time(what: str, step: Callable[[], object]) -> None:
    """Run a step and say how long it took."""
    began = time.monotonic()
    step()
    say(f"image-test: {what}: {time.monotonic() - began:.1f} s")


def say(line: str) -> None:
    """One line for the person who ran this."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
