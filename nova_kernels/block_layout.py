"""Who sees whom in block-causal attention, as intervals: a query sees one range of keys.

A sequence is cut into blocks; a token sees every token of its sequence up to the end of its own
block (bidirectional block) or up to itself (causal block). So every query sees an interval of keys,
and every key is seen by an interval of queries: all that kernels need to know.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

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

        Raises:
            ValueError: negative lengths, no blocks, or flags of another form than the lengths.
        """
        lengths = _nested(lengths)
        if not lengths or any(not blocks or min(blocks) < 0 for blocks in lengths):
            raise ValueError(f"block_lengths must be non-negative integers, got {lengths}")
        if isinstance(bidirectional, bool):
            flags = tuple((bidirectional,) * len(blocks) for blocks in lengths)
        else:
            flags = _nested(bidirectional)
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

    def intervals(self, device: torch.device) -> Tensor:
        """int32 (4, tokens): first key and end of keys of a query; the same of queries of a key.

        Made once for a layout and device, so that CUDA graphs can capture their use.
        """
        return _intervals(self, torch.device(device))

    def mask(self, device: torch.device) -> Tensor:
        """(tokens, tokens) bool: whether a query (row) sees a key (column)."""
        first, end = self.intervals(device)[:2, :, None]
        key = torch.arange(self.num_tokens, device=device)
        return (key >= first) & (key < end)


def _nested(values: Sequence) -> tuple[tuple, ...]:
    values = list(values)
    if any(isinstance(value, Sequence) for value in values):
        return tuple(tuple(value) for value in values)
    return (tuple(values),)


# CUDA graphs keep these addresses, so there is room for all layouts of a recorded run: 94 for the
# released video model at A = 64.
@lru_cache(maxsize=1024)
def _intervals(layout: BlockLayout, device: torch.device) -> Tensor:
    result = torch.empty(4, layout.num_tokens, dtype=torch.int32)
    ends = {block.sequence_start: block.stop for block in layout.blocks()}  # the last one stays
    for block in layout.blocks():
        tokens = slice(block.start, block.stop)
        itself = torch.arange(block.start, block.stop)
        result[0, tokens] = block.sequence_start
        result[1, tokens] = block.stop if block.bidirectional else (itself + 1).int()
        result[2, tokens] = block.start if block.bidirectional else itself.int()
        result[3, tokens] = ends[block.sequence_start]
    return result.to(device)
