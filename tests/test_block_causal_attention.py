import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_testing import (
    DTYPES,
    assert_as_exact_as_torch,
    in_float64,
    needs_triton,
    opcheck,
    poisoned,
    randn,
)

from nova_kernels import BackendError, block_causal_attention
from nova_kernels.block_layout import BlockLayout
from nova_kernels.ops.block_causal_attention import reference, reference_with_lse

# Block lengths, bidirectional, head_dim, length of the prefix.
CASES = [
    ([1], True, 32, 0),
    ([5, 3, 4], True, 64, 0),
    ([17], False, 32, 3),
    ([40, 30, 0, 33], [True, False, True, True], 32, 7),
    ([33, 16, 16], True, 96, 0),
    ([9, 130], [False, True], 128, 70),
    ([[20, 15], [37], [3, 1, 3]], True, 32, 0),
    ([[5], [64, 1]], [[False], [False, True]], 64, 0),
]


def inputs(lengths, head_dim, prefix, dtype=torch.float32, batch=1, heads=2):
    tokens = BlockLayout.of(lengths).num_tokens

    def leaf(tokens, seed):
        shape = (batch, heads, tokens, head_dim)
        return randn(*shape, dtype=dtype, seed=seed).requires_grad_()

    qkv = [leaf(tokens, seed) for seed in (1, 2, 3)]
    return qkv, [leaf(prefix, seed) for seed in (4, 5)] if prefix else []


def dense_mask(lengths, bidirectional):
    """Who sees whom, token by token, as the contract says it."""
    layout = BlockLayout.of(lengths, bidirectional)
    owner = []
    for sequence, blocks in enumerate(layout.lengths):
        for block, length in enumerate(blocks):
            owner += [(sequence, block, layout.bidirectional[sequence][block])] * length
    return torch.tensor(
        [
            [
                a[0] == b[0] and (b[1] < a[1] or (b[1] == a[1] and (a[2] or j <= i)))
                for j, b in enumerate(owner)
            ]
            for i, a in enumerate(owner)
        ]
    ).view(len(owner), len(owner))


def definition(q, k, v, lengths, bidirectional, prefix):
    mask = dense_mask(lengths, bidirectional).to(q.device)
    if prefix:
        k, v = (torch.cat(pair, dim=2) for pair in zip(prefix, (k, v), strict=True))
        mask = torch.cat([mask.new_ones(len(mask), prefix[0].shape[2]), mask], dim=1)
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


@pytest.mark.parametrize("lengths, bidirectional, head_dim, prefix", CASES)
def test_references_are_the_definition(lengths, bidirectional, head_dim, prefix):
    (q, k, v), prefix_kv = (in_float64(*ts) for ts in inputs(lengths, head_dim, prefix))
    expected, expected_lse = definition(q, k, v, lengths, bidirectional, prefix_kv)
    options = {"bidirectional": bidirectional, "prefix_kv": prefix_kv or None}
    assert torch.allclose(block_causal_attention(q, k, v, lengths, **options), expected)
    out, lse = block_causal_attention(q, k, v, lengths, **options, return_lse=True)
    assert torch.allclose(out, expected) and torch.allclose(lse, expected_lse)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths, bidirectional, head_dim, prefix", CASES)
@needs_triton
def test_triton_is_as_exact_as_torch(lengths, bidirectional, head_dim, prefix, dtype):
    check(lengths, bidirectional, head_dim, prefix, dtype)


def check(lengths, bidirectional, head_dim, prefix, dtype):
    """Forward and backward of Triton, against the definition in float64."""
    qkv, prefix_kv = inputs(lengths, head_dim, prefix, dtype)
    leaves = qkv + prefix_kv
    exact_leaves = in_float64(*leaves)
    exact, exact_lse = definition(*exact_leaves[:3], lengths, bidirectional, exact_leaves[3:])
    by_torch, _ = definition(*qkv, lengths, bidirectional, prefix_kv)
    with poisoned():
        result, lse = block_causal_attention(
            *qkv,
            lengths,
            bidirectional=bidirectional,
            prefix_kv=tuple(prefix_kv) or None,
            return_lse=True,
            backend="triton",
        )
    assert_as_exact_as_torch(result, by_torch, exact)
    assert torch.allclose(lse.double(), exact_lse.detach(), atol=2e-3)
    grad = randn(*result.shape, dtype=dtype, seed=9)
    with poisoned():
        gradients = torch.autograd.grad(result, leaves, grad)
    exact_gradients = torch.autograd.grad(exact, exact_leaves, grad.double())
    torch_gradients = torch.autograd.grad(by_torch, leaves, grad)
    for ours, theirs, right in zip(gradients, torch_gradients, exact_gradients, strict=True):
        if right.norm() > 1e-9:  # the scores of a lone key have no gradient
            assert_as_exact_as_torch(ours, theirs, right)


@needs_triton
@settings(max_examples=15, deadline=None)
@given(
    sequences=st.lists(
        st.lists(st.tuples(st.integers(0, 40), st.booleans()), min_size=1, max_size=4),
        min_size=1,
        max_size=3,
    ),
    prefix=st.integers(0, 40),
)
def test_triton_on_any_layout(sequences, prefix):
    lengths = [[length for length, _ in blocks] for blocks in sequences]
    if not sum(map(sum, lengths)):
        return
    flags = [[flag for _, flag in blocks] for blocks in sequences]
    check(lengths, flags, 32, prefix if len(lengths) == 1 else 0, torch.float32)


@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=4),
        min_size=1,
        max_size=3,
    )
)
def test_intervals_of_a_layout(sequences):
    lengths = [[length for length, _ in blocks] for blocks in sequences]
    flags = [[flag for _, flag in blocks] for blocks in sequences]
    layout, mask = BlockLayout.of(lengths, flags), dense_mask(lengths, flags)
    assert torch.equal(layout.mask("cpu"), mask)
    first, end = layout.intervals("cpu")[2:]
    query = torch.arange(layout.num_tokens)[:, None]
    assert torch.equal((query >= first) & (query < end), mask)
    assert layout.visible_pairs() == mask.sum()


@needs_triton
def test_pieces_add_up():
    """Prefill in one call, or block after block with what came before as the prefix."""
    lengths = [7, 20, 5]
    (q, k, v), _ = inputs(lengths, 32, 0)
    with torch.no_grad():
        whole = block_causal_attention(q, k, v, lengths, backend="triton")
        start, pieces = 0, []
        for length in lengths:
            now = slice(start, start + length)
            pieces.append(
                block_causal_attention(
                    *(x[:, :, now] for x in (q, k, v)),
                    [length],
                    prefix_kv=(k[:, :, :start], v[:, :, :start]),
                    backend="triton",
                )
            )
            start += length
    assert torch.allclose(torch.cat(pieces, dim=2), whole, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_triton)])
def test_rope_scale_and_strides(backend):
    """Queries, keys and values as views of a packed qkv tensor, the way models have them."""
    lengths, heads, head_dim = [4, 9], 2, 32
    packed = randn(2, 13, 3, heads, head_dim, seed=1)
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    angles = randn(1, 13, head_dim // 2, seed=2)
    pairs = torch.polar(torch.ones_like(angles), angles)

    def turned(x):
        complex_pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(complex_pairs * pairs[:, None]).flatten(-2)

    expected, _ = definition(turned(q) * 0.5 * head_dim**0.5, turned(k), v, lengths, True, [])
    with torch.no_grad():
        result = block_causal_attention(
            q, k, v, lengths, rope=(angles.cos(), angles.sin()), scale=0.5, backend=backend
        )
    assert torch.allclose(result, expected, atol=1e-5)


@needs_triton
def test_operator_contract_and_compile():
    qkv, prefix = inputs([4, 9], 32, 5)
    numbers = ([4, 9], [True, False], [2], 0.3, "triton")
    operator = torch.ops.nova_kernels.block_causal_attention.default
    opcheck(operator, (*qkv, *prefix, *numbers))
    opcheck(operator, (*qkv, None, None, *numbers))

    def run(q, k, v):
        return block_causal_attention(q, k, v, [4, 9], backend="triton")

    result = torch.compile(run, fullgraph=True, backend="aot_eager")(*qkv)
    expected = reference(*qkv, BlockLayout.of([4, 9]), None, None, 32**-0.5)
    assert torch.allclose(result, expected, atol=1e-5)
    result.sum().backward()
    assert all(leaf.grad is not None for leaf in qkv)
    with torch.inference_mode():
        assert torch.equal(run(*qkv), result)


@needs_triton
def test_nothing_to_attend_from():
    (q, k, v), prefix = inputs([0], 32, 3)
    result = block_causal_attention(q, k, v, [0], prefix_kv=tuple(prefix), backend="triton")
    assert result.shape == q.shape
    assert all((g == 0).all() for g in torch.autograd.grad(result.sum(), prefix))


def test_arguments_that_do_not_fit():
    (q, k, v), prefix = inputs([4, 9], 32, 5)
    with pytest.raises(ValueError, match="must all be"):
        block_causal_attention(q, k[:, :, 1:], v, [4, 9])
    with pytest.raises(ValueError, match="add up to 12"):
        block_causal_attention(q, k, v, [4, 8])
    with pytest.raises(ValueError, match="non-negative"):
        block_causal_attention(q, k, v, [14, -1])
    with pytest.raises(ValueError, match="flag for every block"):
        block_causal_attention(q, k, v, [4, 9], bidirectional=[True])
    with pytest.raises(ValueError, match="one dtype"):
        block_causal_attention(q, k.half(), v, [4, 9])
    with pytest.raises(ValueError, match="packed"):
        block_causal_attention(q, k, v, [[4], [9]], prefix_kv=tuple(prefix))
    with pytest.raises(ValueError, match="prefix_kv must be"):
        block_causal_attention(q, k, v, [4, 9], prefix_kv=(prefix[0], prefix[1][:, :1]))


@needs_triton
def test_what_the_kernel_does_not_take():
    (q, k, v), _ = inputs([4], 16, 0)
    with pytest.raises(BackendError, match="head_dim"), torch.no_grad():
        block_causal_attention(q, k, v, [4], backend="triton")
    out, _ = reference_with_lse(q, k, v, BlockLayout.of([4]), None, None, 0.25)
    assert torch.allclose(block_causal_attention(q, k, v, [4]), out, atol=1e-6)
