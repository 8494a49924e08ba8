"""Which adapter is where: residency, pins and the order of eviction.

    DISK -> LOADING -> HOST -> DEVICE         a KV prefix is copied into blocks, scales into a row
                        |        ^
                        `-> FOLDING           a soft prompt runs through the base once

An adapter on the device holds a slot: KV blocks, or a row of the scale tables. It is pinned by every
running sequence that uses it and by its own fold, and only unpinned ones are evicted, least recently
used first. Pure: tensors and files are somebody else's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from server.engine.blocks import BlockPool, blocks_for
from server.engine.request import AdapterRef


class Residency(Enum):
    """Where an adapter is."""

    DISK = "disk"
    LOADING = "loading"
    HOST = "host"
    FOLDING = "folding"
    DEVICE = "device"


@dataclass(eq=False)
class AdapterEntry:
    """One adapter that the engine has heard of.

    Attributes:
        residency: where it is; set by `AdapterSlots.move`, which records the change.
        needs_fold: True while its host form is a soft prompt that was not folded yet.
        block_ids: the shared KV segment, while FOLDING or DEVICE.
        scale_slot: its row in the scale tables, from 1; row 0 is all ones.
        on_host: its host form is in memory.
        pins: running sequences that use it.
        leaves: it gives its slot back when the last of them ends, unless it is requested again.
        last_used: a counter, higher is later.
        num_loads: times its host form was read.
        num_evictions: times it had to leave the device for another.
    """

    ref: AdapterRef
    residency: Residency = Residency.DISK
    needs_fold: bool = False
    block_ids: list[int] = field(default_factory=list)
    scale_slot: int = 0
    on_host: bool = False
    pins: int = 0
    leaves: bool = False
    last_used: int = 0
    num_loads: int = 0
    num_evictions: int = 0


class AdapterSlots:
    """All adapters and the slots that they hold.

    Args:
        pool: blocks, shared with the sequences.
        block_size: tokens a block holds.
        max_adapter_blocks: blocks that adapters may hold together.
        num_scale_slots: rows of the scale tables, row 0 not counted.
    """

    def __init__(
        self, pool: BlockPool, block_size: int, max_adapter_blocks: int, num_scale_slots: int
    ) -> None:
        self.entries: dict[str, AdapterEntry] = {}
        self.max_adapter_blocks = max_adapter_blocks
        self.num_evictions = 0
        self._pool = pool
        self._block_size = block_size
        self._free_scale_slots = list(range(num_scale_slots, 0, -1))
        self._clock = 0
        self._moved: dict[str, None] = {}

    def entry(self, ref: AdapterRef) -> AdapterEntry:
        """The entry of `ref`, made on first sight."""
        return self.entries.setdefault(ref.digest, AdapterEntry(ref))

    @property
    def num_adapter_blocks(self) -> int:
        """Blocks that adapters hold now."""
        return sum(len(entry.block_ids) for entry in self.entries.values())

    def move(self, entry: AdapterEntry, residency: Residency) -> None:
        """Note where `entry` is from now on."""
        entry.residency = residency
        self._moved[entry.ref.digest] = None

    def take_moved(self) -> list[AdapterEntry]:
        """Adapters that moved since the last call, each once; usually none."""
        moved = [self.entries[digest] for digest in self._moved if digest in self.entries]
        self._moved.clear()
        return moved

    def touch(self, entry: AdapterEntry) -> None:
        """Note that it was used just now."""
        self._clock += 1
        entry.last_used = self._clock

    def take_slot(self, entry: AdapterEntry) -> bool:
        """Give `entry` its blocks or its row of the scale tables, evicting idle adapters for them.

        False, with nothing changed but evictions, when everything left is pinned.
        """
        if entry.ref.uses_scales:
            while not self._free_scale_slots:
                if not self._evict_one(scales=True, keep=entry):
                    return False
            entry.scale_slot = self._free_scale_slots.pop()
        else:
            need = blocks_for(entry.ref.num_virtual_tokens, self._block_size)
            while self.num_adapter_blocks + need > self.max_adapter_blocks:
                if not self._evict_one(scales=False, keep=entry):
                    return False
            if not self.make_room(need, keep=entry):
                return False
            entry.block_ids = self._pool.allocate(need) or []
        self.touch(entry)
        return True

    def make_room(self, num_blocks: int, keep: AdapterEntry | None = None) -> bool:
        """Evict idle prefixes until `num_blocks` are free; False when that cannot be."""
        while self._pool.num_free < num_blocks:
            if not self._evict_one(scales=False, keep=keep):
                return False
        return True

    def release(self, entry: AdapterEntry) -> None:
        """Take the slot of an unpinned adapter back; its host form stays if it was kept."""
        if entry.pins:
            raise RuntimeError("a pinned adapter cannot be released")
        self._pool.free(entry.block_ids)
        entry.block_ids = []
        if entry.scale_slot:
            self._free_scale_slots.append(entry.scale_slot)
            entry.scale_slot = 0
        self.move(entry, Residency.HOST if entry.on_host else Residency.DISK)

    def _evict_one(self, *, scales: bool, keep: AdapterEntry | None) -> bool:
        idle = [
            entry
            for entry in self.entries.values()
            if entry.residency is Residency.DEVICE
            and entry.pins == 0
            and entry is not keep
            and entry.ref.uses_scales == scales
        ]
        if not idle:
            return False
        victim = min(idle, key=lambda entry: entry.last_used)
        self.release(victim)
        victim.num_evictions += 1
        self.num_evictions += 1
        return True
