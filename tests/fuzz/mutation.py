"""Mutations of bytes, as Hypothesis strategies."""

from __future__ import annotations

from hypothesis import strategies as st

_INTERESTING = st.sampled_from(
    [b"", b"\0", b"\xff", b"\xff" * 8, b"{" * 40, b"[" * 40, b'"', b"\\", b"NaN", b"1e999", b"\n"]
)


@st.composite
def mutated(draw: st.DrawFn, *seeds: bytes) -> bytes:
    """One of the seeds with a few pieces cut, put in, doubled or written over."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(0, 6))):
        at = draw(st.integers(0, len(data)))
        end = min(len(data), at + draw(st.integers(0, 40)))
        piece = draw(_INTERESTING | st.binary(max_size=12) | st.just(bytes(data[at:end]) * 2))
        data[at : end if draw(st.booleans()) else at] = piece
    return bytes(data)
