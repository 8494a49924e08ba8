"""A kernel that fails is not taken for one that has done its work."""

from __future__ import annotations

import ctypes
import sys

import numpy as np
import pytest
import torch
from numba import carray, cfunc, types

from server.engine.openmp import Kernel


def failing() -> Kernel:
    """A kernel that wants more memory than there is when its table says so."""

    @cfunc(types.void(types.voidptr))
    def run(table_at):
        table = carray(table_at, (2,), np.int64)
        room = np.empty(table[0], np.int64)
        room[0] = 1
        table[1] += room[0]

    return Kernel(run)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_kernel_without_memory_says_so_and_works_again(threads, monkeypatch):
    heard = []
    monkeypatch.setattr(sys, "unraisablehook", heard.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    kernel = failing()
    table = (ctypes.c_int64 * 2)(1 << 58, 0)
    with pytest.raises(MemoryError):
        kernel.run(ctypes.addressof(table), threads)
    assert table[1] == 0
    table[0] = 8
    kernel.run(ctypes.addressof(table), 1)
    assert table[1] == 1
    assert heard == []


def test_other_exceptions_that_nobody_catches_are_told_to_who_listened_before(monkeypatch):
    heard = []
    monkeypatch.setattr(sys, "unraisablehook", lambda said: heard.append(type(said.exc_value)))
    failing()
    failing()  # listening twice is listening once

    class Careless:
        def __del__(self):
            raise ValueError("nobody catches this")

    Careless()
    assert heard == [ValueError]
