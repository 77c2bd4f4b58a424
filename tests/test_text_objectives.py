"""What text encoders are trained for, against the same sums written out caption by caption."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from nova.training.text_objectives import LabelObjective, NextTokenObjective

HIDDEN, VOCABULARY = 8, 11
IDS = torch.tensor([[4, 2, 9, 7], [5, 1, 0, 0], [3, 6, 8, 0]])
LENGTHS = torch.tensor([4, 2, 3])


@pytest.fixture
def hidden():
    return torch.randn(3, 4, HIDDEN, generator=torch.Generator().manual_seed(0))


def captions(hidden):
    """Every caption's hidden states and token ids, without padding."""
    return [(h[:n], ids[:n]) for h, ids, n in zip(hidden, IDS, LENGTHS.tolist(), strict=True)]


def test_next_tokens(hidden):
    objective = NextTokenObjective(HIDDEN, VOCABULARY)
    losses = [
        cross_entropy(objective.head(state), token)
        for states, ids in captions(hidden)
        for state, token in zip(states[:-1], ids[1:], strict=True)
    ]
    loss = objective(hidden, IDS, LENGTHS, torch.arange(3))
    torch.testing.assert_close(loss, torch.stack(losses).mean())


def test_answers_of_captions(hidden):
    labels = torch.tensor([[0, 4], [1, 2], [1, 0], [0, 1]])
    rows = torch.tensor([2, 0, 3])
    noise = torch.Generator().manual_seed(1)
    objective = LabelObjective(HIDDEN, VOCABULARY, labels, (2, 5), noise)

    def wrong(layer: nn.Linear, state, answers):
        first, second = layer(state).split((2, 5))
        return cross_entropy(first, answers[0]) + cross_entropy(second, answers[1])

    noisy = hidden + 0.3 * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    last, early, token = [], [], []
    for (states, ids), row in zip(captions(noisy), rows, strict=True):
        last.append(wrong(objective.last, states[-1], labels[row]))
        early += [wrong(objective.early, state, labels[row]) for state in states]
        token += [cross_entropy(objective.token(s), i) for s, i in zip(states, ids, strict=True)]
    last, early, token = (torch.stack(losses).mean() for losses in (last, early, token))
    torch.testing.assert_close(objective(hidden, IDS, LENGTHS, rows), last + 0.2 * early + token)
