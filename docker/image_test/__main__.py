"""Builds the image and uses it, without a Docker engine: `make image-test`, as root on Debian.

debootstrap makes a stand-in for the image that the Dockerfile begins with, buildah builds the real
Dockerfile on it, podman runs the result as docs/deploy/containers.md says: a server, and a worker without a
network beside it. This script talks to them over loopback, stops them, starts them again, and restores
a back-up of theirs. All of it lies in .graftwork/image-test, and layers are kept for the next time.

Standard library only: it runs before anything is installed.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time

import use
from build import IMAGE, build, check_tools, make_base, show_sizes
from machine import REPO, WORK, Failed, free_port, output, podman, run, say, with_time

SERVER, WORKER = "graftwork-image-test", "graftwork-image-test-worker"
DATA, RESTORED = f"{SERVER}-data", f"{SERVER}-restored"
BACKUP = WORK / "backup.tar"
READY_SECONDS = 240
SHUT_DOWN = "Application shutdown complete."


def main() -> int:
    """Run all steps; the exit status."""
    parser = argparse.ArgumentParser(prog="image_test", description=__doc__.splitlines()[0])
    parser.add_argument("--keep", action="store_true", help="leave the containers running")
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
        run_and_use(keep=options.keep)
    except (Failed, use.Wrong) as error:
        say(f"image-test: FAILED: {error}")
        return 1
    say("image-test: passed")
    return 0


def run_and_use(*, keep: bool) -> None:
    """Start a server and a worker as the guide says, use them, and what they leave."""
    remove()
    for volume in (DATA, RESTORED):
        run([*podman(), "volume", "create", volume])
    port = free_port()
    inside = [*podman(), "exec", SERVER]
    try:
        with_time("an API key", lambda: use.take_key(make_key()))
        with_time("start", lambda: start(server_on(DATA, port), port))
        run([*detached(WORKER, DATA, "--network=none"), IMAGE, "worker"])
        use.look_inside(lambda *words: run([*inside, *words], check=False))
        with_time("health check", lambda: run([*podman(), "healthcheck", "run", SERVER]))
        with_time("generate, upload, train", lambda: use.use_it(port, REPO))
        with_time("back-up", back_up)
        with_time("stop", stop)
        with_time("start again", lambda: start([*podman(), "start", SERVER], port))
        with_time("the same adapters", lambda: use.use_again(port))
        with_time("restore", restore)
        with_time("start on the restored", lambda: start(server_on(RESTORED, port), port))
        with_time("the same adapters", lambda: use.use_again(port))
    except BaseException:
        for container in (SERVER, WORKER):
            logs = run([*podman(), "logs", "--tail", "12", container], check=False)
            say(f"{logs.stdout}{logs.stderr}")
        raise
    finally:
        if not keep:
            remove()


def make_key() -> str:
    """A key that may do everything: the image listens on every address, and asks for one."""
    words = ["keys", "create", "--name", "image-test", "--scope", "generate", "--scope", "train"]
    words += ["--scope", "adapters:read", "--scope", "adapters:write", "--scope", "admin"]
    return output([*at_once(DATA), IMAGE, *words])


def server_on(volume: str, port: int) -> list[str]:
    """The command that runs the image as it is, jobs left to the worker."""
    variables = {"PORT": port, "KV_MIB": 256, "TRAIN_WORKERS": 0}
    given = [f"--env=GRAFTWORK_{name}={value}" for name, value in variables.items()]
    return [*detached(SERVER, volume, "--network=host"), *given, IMAGE]


def detached(name: str, volume: str, network: str) -> list[str]:
    """podman's words for a container that stays."""
    return [*podman(), "run", "--detach", f"--name={name}", *hardening(volume), network]


def at_once(volume: str) -> list[str]:
    """podman's words for a container that does one thing."""
    return [*podman(), "run", "--rm", "--interactive", *hardening(volume), "--network=none"]


def hardening(volume: str) -> list[str]:
    """What docs/deploy/containers.md tells people to run the image with."""
    words = ["--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges"]
    words += ["--tmpfs=/tmp:rw,nosuid,nodev,size=512m", f"--volume={volume}:/data"]
    return [*words, "--ulimit=nofile=8192:8192", "--ulimit=nproc=4096:4096"]


def start(command: list[str], port: int) -> None:
    """Run a command that starts the server, and wait until it is ready."""
    run(command)
    end = time.monotonic() + READY_SECONDS
    while not use.is_ready(port):
        state = [*podman(), "inspect", "--format", "{{.State.Running}}", SERVER]
        if output(state) != "true":
            raise Failed("the container ended before it was ready")
        if time.monotonic() > end:
            raise Failed(f"the container was not ready within {READY_SECONDS} seconds")
        time.sleep(0.5)


def stop() -> None:
    """SIGTERM reaches the server through tini, and it ends in good order."""
    run([*podman(), "stop", "--time", "60", SERVER, WORKER])
    code = output([*podman(), "inspect", "--format", "{{.State.ExitCode}}", SERVER])
    logs = run([*podman(), "logs", "--tail", "20", SERVER])
    # 143: it shut down, and then let the signal end it.
    if code not in ("0", "143") or SHUT_DOWN not in logs.stdout + logs.stderr:
        raise Failed(f"the server ended with status {code} on SIGTERM, and did not shut down")
    code = output([*podman(), "inspect", "--format", "{{.State.ExitCode}}", WORKER])
    if code != "0":
        raise Failed(f"the worker ended with status {code} on SIGTERM, expected 0")


def back_up() -> None:
    """The image's own script, while the server runs."""
    with BACKUP.open("wb") as file:
        command = [*podman(), "exec", SERVER, "python3", "/opt/backup.py"]
        made = subprocess.run(command, check=False, stdout=file, stderr=subprocess.PIPE)  # noqa: S603
    if made.returncode != 0:
        raise Failed(f"backup.py: exit status {made.returncode}\n{made.stderr.decode()}")


def restore() -> None:
    """Into an empty volume, with the tar that is in the image."""
    run([*podman(), "rm", "--force", SERVER])
    command = [*at_once(RESTORED), "--entrypoint=tar", IMAGE, "-x", "-f", "-", "-C", "/data"]
    with BACKUP.open("rb") as file:
        run(command, stdin=file)


def remove() -> None:
    """End and remove the containers and their volumes, if they are there."""
    run([*podman(), "rm", "--force", "--ignore", SERVER, WORKER], check=False)
    run([*podman(), "volume", "rm", "--force", DATA, RESTORED], check=False)


def remove_work() -> None:
    """Remove the images, the stand-in too."""
    if WORK.exists():
        remove()
        run([*podman(), "image", "rm", "--force", "--all"], check=False)
        # podman mounts its storage on itself.
        run(["umount", str(WORK / "storage" / "overlay")], check=False)
        shutil.rmtree(WORK)


if __name__ == "__main__":
    sys.exit(main())
