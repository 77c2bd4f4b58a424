"""Who sees whom in block-causal attention, as intervals: a query sees one range of keys.

A sequence is cut into blocks; a token sees every token of its sequence up to the end of its own
block (bidirectional block) or up to itself (causal block). So every query sees an interval of keys,
and every key is seen by an interval of queries: all that kernels need to know.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

Lengths = Sequence[int] | Sequence[Sequence[int]]
Flags = bool | Sequence[bool] | Sequence[Sequence[bool]]


@dataclass(frozen=True)
class Block:
    """A block of tokens start..stop-1 of the sequence that begins at `sequence_start`."""

    sequence_start: int
    start: int
    stop: int
    bidirectional: bool


@dataclass(frozen=True)
class BlockLayout:
    """All blocks of a packed batch of sequences, in order.

    Attributes:
        lengths: per sequence, the lengths of its blocks.
        bidirectional: of the same form.
    """

    lengths: tuple[tuple[int, ...], ...]
    bidirectional: tuple[tuple[bool, ...], ...]

    @classmethod
    def of(cls, lengths: Lengths, bidirectional: Flags = True) -> "BlockLayout":
        """From block lengths of one sequence, or of each of several packed ones.

        Lengths may be integers of numpy or in tensors, and flags booleans of either.

        Raises:
            ValueError: lengths that are negative or no integers, no blocks, flags that are no
                booleans or of another form than the lengths.
        """
        lengths = _nested("block_lengths", lengths, _length)
        if not all(lengths):
            raise ValueError(f"block_lengths must have a length for every sequence, got {lengths}")
        bidirectional = _plain(bidirectional)
        if isinstance(bidirectional, bool):
            flags = tuple((bidirectional,) * len(blocks) for blocks in lengths)
        else:
            flags = _nested("bidirectional", bidirectional, _flag)
        if [len(f) for f in flags] != [len(blocks) for blocks in lengths]:
            raise ValueError(f"bidirectional has no flag for every block: {flags} for {lengths}")
        return cls(lengths, flags)

    @property
    def num_tokens(self) -> int:
        return sum(map(sum, self.lengths))

    def blocks(self) -> list[Block]:
        """The blocks that are not empty."""
        result, start = [], 0
        for lengths, flags in zip(self.lengths, self.bidirectional, strict=True):
            sequence_start = start
            for length, bidirectional in zip(lengths, flags, strict=True):
                if length:
                    result.append(Block(sequence_start, start, start + length, bidirectional))
                start += length
        return result

    def visible_pairs(self) -> int:
        """Number of (query, key) pairs that attention computes: its useful work."""
        pairs = 0
        for block in self.blocks():
            length = block.stop - block.start
            inside = length * length if block.bidirectional else length * (length + 1) // 2
            pairs += length * (block.start - block.sequence_start) + inside
        return pairs

    def intervals(self, device: torch.device | str) -> Tensor:
        """int32 (4, tokens): first key and end of keys of a query; the same of queries of a key."""
        return _table(("intervals", self), lambda: _intervals(self), device)

    def tiles(self, size: int, device: torch.device | str) -> Tensor:
        """int32 (2, tiles): first token and end of tiles of up to `size` tokens, block by block.

        A tile lies inside one block, so that what one block sees cannot reach another, not even as
        0 * NaN. The last tile of a block may be short.
        """
        return _table(("tiles", self, size), lambda: _tiles(self, size), device)

    def mask(self, device: torch.device | str) -> Tensor:
        """(tokens, tokens) bool: whether a query (row) sees a key (column)."""
        # Not the kept intervals: FakeTensorMode takes none that were made outside.
        first, end = _int32(_intervals(self), device)[:2, :, None]
        key = torch.arange(self.num_tokens, device=device)
        return (key >= first) & (key < end)


def _plain(value: Any) -> Any:
    """Tensors and arrays as (lists of) Python's numbers, anything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def _nested(name: str, values: Any, convert: Callable) -> tuple[tuple, ...]:
    """A sequence, or a sequence of sequences, as tuples in a tuple, each value converted."""
    values = _plain(values)
    parts = [_plain(value) for value in values] if _is_sequence(values) else [values]
    if _is_sequence(values) and not any(map(_is_sequence, parts)):
        parts = [parts]
    if not all(map(_is_sequence, parts)):
        raise ValueError(f"{name} must be a list, or a list of lists, got {values!r}")
    return tuple(tuple(convert(_plain(value)) for value in part) for part in parts)


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _length(value: Any) -> int:
    try:
        length = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        length = -1
    if length < 0:
        raise ValueError(f"block_lengths must be non-negative integers, got {value!r}")
    return length


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"bidirectional must be True or False, one or a block, got {value!r}")
    return value


def _intervals(layout: BlockLayout) -> list[list[int]]:
    ends = {block.sequence_start: block.stop for block in layout.blocks()}  # the last one stays
    rows: list[list[int]] = [[], [], [], []]
    for block in layout.blocks():
        length, itself = block.stop - block.start, range(block.start, block.stop)
        rows[0] += [block.sequence_start] * length
        rows[1] += [block.stop] * length if block.bidirectional else [i + 1 for i in itself]
        rows[2] += [block.start] * length if block.bidirectional else itself
        rows[3] += [ends[block.sequence_start]] * length
    return rows


def _tiles(layout: BlockLayout, size: int) -> list[list[int]]:
    starts = [range(block.start, block.stop, size) for block in layout.blocks()]
    ends = [
        [min(start + size, block.stop) for start in of_block]
        for block, of_block in zip(layout.blocks(), starts, strict=True)
    ]
    return [list(chain.from_iterable(starts)), list(chain.from_iterable(ends))]


# CUDA graphs keep the addresses of these tensors, so there is room for all layouts of a recorded
# run: 94 for the released video model at A = 64, each with its intervals and its tiles.
_KEPT: dict[tuple, Tensor] = {}
_MAX_KEPT = 2048


def _table(name: tuple, make: Callable[[], list[list[int]]], device: torch.device | str) -> Tensor:
    """`make`'s rows on `device`, made once, so that CUDA graphs can capture their use."""
    key = (*name, torch.device(device))
    if key not in _KEPT:
        table = _int32(make(), device)
        if type(table) is not Tensor:  # of FakeTensorMode and the like, of no use outside them
            return table
        if len(_KEPT) >= _MAX_KEPT:
            _KEPT.pop(next(iter(_KEPT)), None)
        _KEPT[key] = table
    return _KEPT[key]


def _int32(rows: list[list[int]], device: torch.device | str) -> Tensor:
    # On the CPU, whatever torch's default device, whose memory cannot take values if it is meta.
    return torch.tensor(rows, dtype=torch.int32, device="cpu").to(device)
