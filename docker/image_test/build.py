"""The image, from the real Dockerfile, on a stand-in for the Python image that debootstrap makes.

Knows no container. Standard library only.
"""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from machine import REPO, WORK, Failed, output, podman, run, say, storage

IMAGE = "localhost/graftwork:image-test"
# What a tool is called, and Debian's package of it.
TOOLS = {"buildah": "buildah", "podman": "podman", "runc": "runc", "debootstrap": "debootstrap"}
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
PIP_CONFIGS = ("/etc/pip.conf", "~/.config/pip/pip.conf", "~/.pip/pip.conf")
PIP_VARIABLES = ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_TRUSTED_HOST", "TORCH_INDEX_URL")


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
