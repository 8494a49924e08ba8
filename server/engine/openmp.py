"""The OpenMP library that torch itself has loaded, for what torch does not expose.

Knows nothing of what runs on its threads.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch


@cache
def torch_openmp() -> Any:
    """libgomp as torch ships it, or None where torch was built on another one."""
    path = Path(torch.__file__).parent / "lib" / "libgomp.so.1"
    if not path.exists():
        return None
    library = ctypes.CDLL(str(path))
    library.GOMP_parallel.argtypes = [
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_uint,
        ctypes.c_uint,
    ]
    library.GOMP_parallel.restype = None
    return library


# numba's report of an exception in a function without a Python caller: it goes to the interpreter, and
# the function returns as if it had succeeded.
_RAISED_IN = "<numba."
_failures: list[BaseException] = []


def _listen() -> None:
    """Hear of exceptions in kernels from now on, and leave all others to who heard of them before."""
    before = sys.unraisablehook
    if getattr(before, "hears_kernels", False):
        return

    def hook(report: sys.UnraisableHookArgs) -> None:
        if isinstance(report.object, str) and report.object.startswith(_RAISED_IN):
            _failures.append(report.exc_value or MemoryError("a kernel failed"))
        else:
            before(report)

    hook.hears_kernels = True  # type: ignore[attr-defined]
    sys.unraisablehook = hook


class Kernel:
    """A compiled function of one pointer.

    Args:
        compiled: numba's `cfunc`. It is held, since its code goes with it.

    Attributes:
        address: where its code begins.
    """

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled
        self.address = int(compiled.address)
        self._call = compiled.ctypes
        _listen()

    def run(self, argument: int, most: int) -> None:
        """Call it once on each thread that torch may use.

        Args:
            argument: the pointer. What is there says how the threads share the work.
            most: threads that have anything to do.

        Raises:
            MemoryError: there was none for what the kernel keeps besides; what it should have written is
                not to be read.
        """
        threads = min(torch.get_num_threads(), most) if most > 1 else 1
        openmp = torch_openmp() if threads > 1 else None
        if openmp is None:
            self._call(argument)
        else:
            openmp.GOMP_parallel(self.address, argument, threads, 0)
        if _failures:
            failure = _failures[0]
            _failures.clear()
            raise failure


def one_thread_here() -> None:
    """Let operations of the calling thread use no other thread.

    `torch.set_num_threads` would do so for the whole process. A second team of threads makes libgomp
    count more threads than cores and stop spinning between operations: every step of the engine
    then took half as long again.
    """
    library = torch_openmp()
    if library is not None:
        torch.get_num_threads()  # torch sets a new thread's number on first use: let it do so now
        library.omp_set_num_threads(1)
