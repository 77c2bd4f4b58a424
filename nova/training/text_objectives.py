"""What a small text encoder is trained for: the next token, or what captions say.

Both map the hidden states (B, n, hidden_size) of token ids (B, n), with lengths (B,), to a loss.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_NOISE = 0.3  # beside hidden states of unit variance
_EARLY_WEIGHT = 0.2


class NextTokenObjective(nn.Module):
    """Language modelling: cross entropy of each next token, in nats a token."""

    def __init__(self, hidden_size: int, vocab_size: int):
        super().__init__()
        self.head = nn.Linear(hidden_size, vocab_size)

    def forward(self, hidden: Tensor, ids: Tensor, lengths: Tensor, rows: Tensor) -> Tensor:
        known = torch.arange(1, ids.shape[1]) < lengths[:, None]
        return F.cross_entropy(self.head(hidden[:, :-1][known]), ids[:, 1:][known])


class LabelObjective(nn.Module):
    """The last token answers questions about its caption: cross entropy, in nats a caption.

    Text tokens have no positions in NOVA, and small models do not work out which word belongs to
    which. Here the last token, the end of the text, holds what the whole caption says; every
    token answers as far as the caption goes (with a smaller weight) and says which it is. The
    answers are read by one linear layer from noisy states, so that they stand well apart.

    Args:
        labels: (captions, questions), the number of the right answer.
        sizes: how many answers each question has.
    """

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        labels: Tensor,
        sizes: Sequence[int],
        generator: torch.Generator,
    ):
        super().__init__()
        self.last = nn.Linear(hidden_size, sum(sizes))
        self.early = nn.Linear(hidden_size, sum(sizes))
        self.token = nn.Linear(hidden_size, vocab_size)
        self.register_buffer("labels", labels)
        self._sizes = list(sizes)
        self._generator = generator

    def forward(self, hidden: Tensor, ids: Tensor, lengths: Tensor, rows: Tensor) -> Tensor:
        """rows (B,): which captions these are."""
        hidden = hidden + _NOISE * torch.randn(
            hidden.shape, generator=self._generator, dtype=hidden.dtype
        )
        labels = self.labels[rows]
        last = hidden[torch.arange(len(rows)), lengths - 1]
        real = torch.arange(ids.shape[1]) < lengths[:, None]
        repeated = labels[:, None].expand(-1, ids.shape[1], -1)[real]
        return (
            self._answers(self.last(last), labels)
            + _EARLY_WEIGHT * self._answers(self.early(hidden[real]), repeated)
            + F.cross_entropy(self.token(hidden[real]), ids[real])
        )

    def _answers(self, logits: Tensor, labels: Tensor) -> Tensor:
        parts = logits.split(self._sizes, dim=-1)
        return sum(F.cross_entropy(part, labels[:, k]) for k, part in enumerate(parts))
