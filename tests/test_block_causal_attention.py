from collections import Counter

import numpy as np
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
from torch._subclasses.fake_tensor import FakeTensorMode

from nova_kernels import BackendError, block_causal_attention, block_layout
from nova_kernels.block_layout import BlockLayout
from nova_kernels.dispatch import is_interpreting
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
# The released video model: prompt and frame 0, then a frame; and that frame behind a cache.
REAL_CASES = [([618, 360], 0), ([360], 618)]
# Absolute error of the log-sum-exp, which is computed in float32 of exact products.
LSE_ERRORS = {torch.float32: 1e-5, torch.float16: 2e-5, torch.bfloat16: 2e-5}


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


@pytest.mark.parametrize("head_dim", [64, 96])
@pytest.mark.parametrize("lengths, prefix", REAL_CASES)
@needs_triton
def test_triton_at_real_sizes(lengths, prefix, head_dim):
    check(lengths, True, head_dim, prefix, torch.float16, heads=1, backward=False)


@pytest.mark.parametrize("scale", [-0.7, 0.0, 3.0])
@needs_triton
def test_other_scales(scale):
    qkv, _ = inputs([7, 40], 64, 0, torch.float32)
    grad = randn(*qkv[0].shape, seed=9)

    def run(*leaves, backend):
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        out, lse = block_causal_attention(
            *leaves, [7, 40], scale=scale, return_lse=True, backend=backend
        )
        gradients = torch.autograd.grad(out, leaves, grad.to(out.dtype))
        return [out.detach(), *gradients], lse.detach()

    exact, exact_lse = run(*in_float64(*qkv), backend="reference")
    by_torch, _ = run(*qkv, backend="reference")
    with poisoned():
        ours, lse = run(*qkv, backend="triton")
    # Gradients compute the weights again, as exp(score - lse), from scores and lse of float32.
    rounding = float(exact_lse.abs().max()) * torch.finfo(torch.float32).eps
    for case in zip(ours, by_torch, exact, [0.0] + 3 * [rounding], strict=True):
        assert_as_exact_as_torch(*case)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=1e-5)


@needs_triton
def test_triton_gradients_at_a_real_size():
    check([618, 360], True, 64, 0, torch.float16, heads=1)


def check(lengths, bidirectional, head_dim, prefix, dtype, heads=2, backward=True):
    """Forward and backward of Triton, against the definition in float64."""
    qkv, prefix_kv = inputs(lengths, head_dim, prefix, dtype, heads=heads)
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
    torch.testing.assert_close(lse.double(), exact_lse.detach(), rtol=1e-6, atol=LSE_ERRORS[dtype])
    if not backward:
        return
    grad = randn(*result.shape, dtype=dtype, seed=9)
    with poisoned():
        gradients = torch.autograd.grad(result, leaves, grad)
    exact_gradients = torch.autograd.grad(exact, exact_leaves, grad.double())
    torch_gradients = torch.autograd.grad(by_torch, leaves, grad)
    for ours, theirs, right in zip(gradients, torch_gradients, exact_gradients, strict=True):
        assert ours.isfinite().all()
        if right.norm() > 1e-9:  # the scores of a lone key have no gradient
            assert_as_exact_as_torch(ours, theirs, right)


@needs_triton
@settings(max_examples=15, deadline=None)
@given(
    sequences=st.lists(
        st.lists(st.tuples(st.integers(0, 24), st.booleans()), min_size=1, max_size=3),
        min_size=1,
        max_size=3,
    ),
    prefix=st.integers(0, 24),
    head_dim=st.sampled_from([32, 64]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)
def test_triton_on_any_layout(sequences, prefix, head_dim, dtype):
    lengths = [[length for length, _ in blocks] for blocks in sequences]
    if not sum(map(sum, lengths)):
        return
    flags = [[flag for _, flag in blocks] for blocks in sequences]
    check(lengths, flags, head_dim, prefix if len(lengths) == 1 else 0, dtype)


# Lengths, flags; rows that hold what is not finite, in which tensors; which results of which rows
# have to stay as they are.
ALL_RESULTS = ("out", "lse", "q", "k", "v")
UNSEEN = [
    ([[20], [20]], True, slice(20, 40), "qkvg", slice(0, 20), ALL_RESULTS),
    ([[20], [20]], True, slice(0, 20), "qkvg", slice(20, 40), ALL_RESULTS),
    ([[9, 70], [33]], False, slice(79, 112), "qkvg", slice(0, 79), ALL_RESULTS),
    # A block sees no later one; gradients of its keys come from later queries all the same.
    ([20, 30, 7], True, slice(50, 57), "qkvg", slice(0, 50), ("out", "lse", "q")),
    ([20, 30, 7], [True, False, False], slice(50, 57), "qkvg", slice(0, 50), ("out", "lse", "q")),
    # Nothing of earlier queries is of any use to later blocks.
    ([20, 30, 7], True, slice(0, 20), "qg", slice(20, 57), ALL_RESULTS),
    ([20, 30, 7], False, slice(0, 20), "qg", slice(20, 57), ALL_RESULTS),
]


# The interpreter computes with numpy, which warns of NaN.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "backend", ["reference", "reference_with_lse", pytest.param("triton", marks=needs_triton)]
)
@pytest.mark.parametrize("lengths, flags, bad, names, clean, unchanged", UNSEEN)
def test_what_is_unseen_has_no_influence(
    lengths, flags, bad, names, clean, unchanged, backend, dtype, value
):
    def results(value):
        tokens = BlockLayout.of(lengths).num_tokens
        given = {n: randn(1, 1, tokens, 32, dtype=dtype, seed=i) for i, n in enumerate("qkvg")}
        for name in names:
            given[name][:, :, bad] = given[name][:, :, bad] if value is None else value
        qkv = [given[name].requires_grad_() for name in "qkv"]
        out = block_causal_attention(
            *qkv,
            lengths,
            bidirectional=flags,
            return_lse=backend != "reference",
            backend=backend.removesuffix("_with_lse"),
        )
        out, lse = out if isinstance(out, tuple) else (out, None)
        gradients = torch.autograd.grad(out, qkv, given["g"])
        return dict(zip(ALL_RESULTS, (out, lse, *gradients), strict=True))

    before, after = results(None), results(value)
    for name in unchanged:
        if before[name] is not None:
            assert torch.equal(after[name][:, :, clean], before[name][:, :, clean]), name
    assert not after["out"][:, :, bad].isfinite().all()


@pytest.fixture
def loads(monkeypatch):
    """Counts (address of the head, first row, masked or not) of all tiles that kernels load."""
    from nova_kernels.triton_kernels import block_causal_attention as kernels

    counts, load = Counter(), kernels._load

    def counting_load(base, row, stride, start, stop, masked, *constants):
        is_masked = bool(getattr(masked, "value", masked))
        counts[int(base.handle.data[0]), int(row.handle.data[0]), is_masked] += 1
        return load(base, row, stride, start, stop, masked, *constants)

    monkeypatch.setattr(kernels, "_load", counting_load)
    return counts


def visible_tiles(x, mask, own_tiles, size):
    """What `loads` counts for x, if own tiles (rows of mask) load what they see, and no more."""
    counts = Counter()
    for start, stop in own_tiles.T.tolist():
        for other in range(0, mask.shape[1], size):
            seen = mask[start:stop, other : other + size]
            if seen.any():
                is_whole = seen.shape[1] == size and bool(seen.all())
                counts[x.data_ptr(), other, not is_whole] += 1
    return counts


@pytest.mark.skipif(not is_interpreting(), reason="counts in Triton's interpreter")
@pytest.mark.parametrize(
    "lengths, flags, prefix",
    [
        ([40, 70, 33], True, 0),
        ([16, 32, 16], True, 32),
        ([50, 60], [False, True], 37),
        ([[50, 20], [64], [5]], [[True, False], [False], [True]], 0),
    ],
)
@needs_triton
def test_only_visible_tiles_are_computed(lengths, flags, prefix, loads):
    """And masks are applied only to tiles that are not wholly visible."""
    from nova_kernels.triton_kernels import block_causal_attention as kernels

    size = kernels.EXACT.block_keys
    assert size == kernels.EXACT.block_queries
    layout = BlockLayout.of(lengths, flags)
    tiles, mask = layout.tiles(size, "cpu"), layout.mask("cpu")
    with torch.no_grad():
        (q, k, v), prefix_kv = inputs(lengths, 32, prefix, heads=1)
        grad = randn(*q.shape, seed=9)
        own = (q, k, v, *(prefix_kv or (None, None)))

        def counted(launch, *tensors):
            loads.clear()
            launch.run()
            wanted = {tensor.data_ptr() for tensor in tensors}
            return Counter({key: n for key, n in loads.items() if key[0] in wanted})

        of_keys = Counter()
        for x in (k, v):
            of_keys += visible_tiles(x, mask, tiles, size)
        for x in prefix_kv:
            of_keys += visible_tiles(x, mask.new_ones(len(mask), prefix), tiles, size)
        forward = kernels.plan_forward(*own, layout, 0.1)
        assert counted(forward, k, v, *prefix_kv) == of_keys

        out, lse = forward.arguments["out"], forward.arguments["lse"]
        delta, query_gradient, key_gradient, *prefix_gradient = kernels.plan_backward(
            grad, *own, out, lse, layout, 0.1
        )
        delta.run()
        assert counted(query_gradient, k, v, *prefix_kv) == of_keys
        of_queries = visible_tiles(q, mask.T, tiles, size)
        of_queries += visible_tiles(grad, mask.T, tiles, size)
        assert counted(key_gradient, q, grad) == of_queries
        for launch in prefix_gradient:
            prefix_tiles = BlockLayout.of([prefix]).tiles(size, "cpu")
            everything = mask.new_ones(prefix, len(mask))
            of_queries = visible_tiles(q, everything, prefix_tiles, size)
            of_queries += visible_tiles(grad, everything, prefix_tiles, size)
            assert counted(launch, q, grad) == of_queries


@needs_triton
def test_batches_of_any_size_fit_a_grid():
    """CUDA takes 65,535 programs at most on any axis but the first."""
    from nova_kernels.triton_kernels import block_causal_attention as kernels

    q = torch.empty(70_000, 2, 20, 32, dtype=torch.float16, device="meta")
    prefix = torch.empty(70_000, 2, 5, 32, dtype=torch.float16, device="meta")
    lse = torch.empty(70_000, 2, 20, device="meta")
    layout = BlockLayout.of([15, 5])
    own = (q, q, q, prefix, prefix)
    launches = kernels.plan_backward(q, *own, q, lse, layout, 0.1)
    for launch in [kernels.plan_forward(*own, layout, 0.1), *launches]:
        assert launch.grid[0] >= 140_000
        assert all(extent <= 65_535 for extent in launch.grid[1:])


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


@given(st.lists(st.integers(0, 9), min_size=1, max_size=4), st.integers(1, 5))
def test_tiles_of_a_layout_lie_inside_blocks(lengths, size):
    starts, stops = BlockLayout.of(lengths).tiles(size, "cpu").tolist()
    covered = [token for pair in zip(starts, stops, strict=True) for token in range(*pair)]
    assert covered == list(range(sum(lengths)))
    owner = [block for block, length in enumerate(lengths) for _ in range(length)]
    for start, stop in zip(starts, stops, strict=True):
        assert 0 < stop - start <= size and owner[start] == owner[stop - 1]
    assert len(starts) == sum(-(-length // size) for length in lengths)


@pytest.mark.parametrize(
    "lengths, flags",
    [
        (torch.tensor([5, 7, 12]), torch.tensor([True, False, True])),
        (np.array([5, 7, 12]), np.array([True, False, True])),
        ([torch.tensor(5), np.int64(7), 12], [np.bool_(True), torch.tensor(False), True]),
        ([torch.tensor([5, 7, 12])], [torch.tensor([True, False, True])]),
        ([[torch.tensor(5), 7, np.int32(12)]], [[True, np.bool_(False), True]]),
    ],
)
def test_lengths_and_flags_as_tensors_and_arrays(lengths, flags):
    layout = BlockLayout.of(lengths, flags)
    assert layout == BlockLayout.of([5, 7, 12], [True, False, True])
    numbers = [*layout.lengths[0], *layout.bidirectional[0]]
    assert list(map(type, numbers)) == [int, int, int, bool, bool, bool]
    expected = dense_mask([5, 7, 12], [True, False, True])
    assert torch.equal(layout.mask("cpu"), expected)


def test_one_flag_as_a_tensor():
    assert BlockLayout.of([3, 4], torch.tensor(False)) == BlockLayout.of([3, 4], False)
    assert BlockLayout.of([3, 4], np.bool_(False)) == BlockLayout.of([3, 4], False)


@pytest.mark.parametrize(
    "lengths, message",
    [
        ([5.0], "non-negative integers, got 5.0"),
        (torch.tensor([5.0]), "non-negative integers, got 5.0"),
        ([[3], [np.float64(2)]], "non-negative integers, got 2.0"),
        ([True], "non-negative integers, got True"),
        (torch.tensor([True]), "non-negative integers, got True"),
        ([None], "non-negative integers, got None"),
        ([[3], 4], "a list of lists"),
        (13, "a list of lists"),
        ([], "a length for every sequence"),
        ([[3], []], "a length for every sequence"),
    ],
)
def test_lengths_that_are_none(lengths, message):
    with pytest.raises(ValueError, match=message):
        BlockLayout.of(lengths)


@pytest.mark.parametrize("flags", [1, [1, 0], ["yes", "no"], torch.tensor([1.0, 0.0])])
def test_flags_that_are_none(flags):
    with pytest.raises(ValueError, match="bidirectional must be"):
        BlockLayout.of([3, 4], flags)


def test_tables_do_not_depend_on_modes(monkeypatch):
    """Made first under a default device or FakeTensorMode, they are right there and afterwards."""
    monkeypatch.setattr(block_layout, "_KEPT", {})
    layout = BlockLayout.of([5, 3], [False, True])
    with FakeTensorMode():
        fake = [layout.intervals("cpu"), layout.tiles(4, "cpu"), layout.mask("cpu")]
    assert [tuple(x.shape) for x in fake] == [(4, 8), (2, 3), (8, 8)]
    with torch.device("meta"):
        intervals, tiles, mask = (
            layout.intervals("cpu"),
            layout.tiles(4, "cpu"),
            layout.mask("cpu"),
        )
    assert tiles.tolist() == [[0, 4, 5], [4, 5, 8]]
    assert torch.equal(mask, dense_mask([5, 3], [False, True]))
    assert intervals[1].tolist() == [1, 2, 3, 4, 5, 8, 8, 8]
    assert layout.intervals("cpu") is intervals and layout.tiles(4, "cpu") is tiles
    with FakeTensorMode():
        assert layout.mask("cpu").shape == (8, 8)  # also when intervals are kept


def test_tables_are_not_kept_for_ever(monkeypatch):
    monkeypatch.setattr(block_layout, "_KEPT", {})
    monkeypatch.setattr(block_layout, "_MAX_KEPT", 3)
    tables = [BlockLayout.of([n]).intervals("cpu") for n in range(5)]
    assert len(block_layout._KEPT) == 3
    assert BlockLayout.of([4]).intervals("cpu") is tables[4]


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


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_triton)])
def test_rope_tables_have_no_gradient(backend):
    qkv, _ = inputs([4, 9], 32, 0)
    cos, sin = (randn(1, 13, 16, seed=seed).requires_grad_() for seed in (6, 7))
    result = block_causal_attention(*qkv, [4, 9], rope=(cos, sin), backend=backend)
    gradients = torch.autograd.grad(result.sum(), [*qkv, cos, sin], allow_unused=True)
    assert [gradient is None for gradient in gradients] == [False] * 3 + [True] * 2


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
@pytest.mark.parametrize("return_lse", [False, True])
def test_no_tokens_have_a_gradient_of_nothing(return_lse):
    q = randn(1, 2, 0, 32).requires_grad_()
    result = block_causal_attention(q, q, q, [0], return_lse=return_lse)
    (result[0] if return_lse else result).sum().backward()
    assert q.grad.shape == q.shape


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


@needs_triton
def test_what_backward_subtracts_is_summed_in_float32():
    """The sum over a head of out times its gradient, also of float16."""
    from nova_kernels.triton_kernels import block_causal_attention as kernels

    q, k, v, grad = (randn(1, 2, 20, 64, dtype=torch.float16, seed=seed) for seed in range(4))
    layout = BlockLayout.of([20])
    forward = kernels.plan_forward(q, k, v, None, None, layout, 0.1)
    forward.run()
    out, lse = forward.arguments["out"], forward.arguments["lse"]
    launch, *_ = kernels.plan_backward(grad, q, k, v, None, None, out, lse, layout, 0.1)
    launch.run()
    right = (out.double() * grad.double()).sum(-1)
    torch.testing.assert_close(launch.arguments["delta"].double(), right, rtol=1e-5, atol=1e-5)
