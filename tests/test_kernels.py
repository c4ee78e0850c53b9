"""Tests of kernels.py, in four layers:

1. the torch paths against closed forms, brute force and float64 references (everywhere);
2. the Triton kernels in Triton's interpreter, on CPU tensors (where triton is installed);
3. every launch of the wrappers compiled for sm_80 and sm_90 (no GPU needed), with bounds on spills and shared memory;
4. the kernels on a GPU, in bf16: TRITON_INTERPRET=0 pytest tests/test_kernels.py.

The interpreter computes bf16 wrongly, does not see races, and accepts what the compiler refuses; layer 3 is for that.
"""

import doctest
import inspect
import json
import math
import os
import re
import subprocess
import sys

os.environ.setdefault(
    "TRITON_INTERPRET", "1"
)  # before the first import of triton; tests/conftest.py does it for the whole suite

import pytest
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import kernels

GPU = torch.cuda.is_available() and kernels.triton is not None and not kernels.interpreting()
DEVICE = "cuda" if GPU else "cpu"


@kernels.jit
def count(n, out):
    for _ in range(0, kernels.tl.load(n)):
        kernels.tl.store(out, kernels.tl.load(out) + 1)


def why_no_interpreter():
    """Reason, or "". The interpreter of Triton 3.6 fails at loops with NumPy 2.4: not a fault of the kernels."""
    if not kernels.interpreting():
        return "triton is not installed, or TRITON_INTERPRET is not 1"
    n, out = torch.tensor([3]), torch.tensor([0])
    try:
        count[(1,)](n, out)
    except kernels.triton.runtime.errors.InterpreterError as error:
        return f"Triton {kernels.triton.__version__} cannot interpret a loop with this NumPy: {error}"
    return "" if int(out) == 3 else "the interpreter cannot count"


needs_interpreter = pytest.mark.skipif(bool(why_no_interpreter()), reason=why_no_interpreter() or "it works")
needs_gpu = pytest.mark.skipif(not GPU, reason="no CUDA device, or TRITON_INTERPRET is 1")
needs_triton = pytest.mark.skipif(kernels.triton is None, reason="triton is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero")  # log2(0) = -inf of rows that see nothing, in numpy
MASKS = {
    "full": kernels.full(40, 70),
    "causal": kernels.causal(129),
    "causal, after a prefix": kernels.causal(17, 100),
    "scales": kernels.scales([1, 4, 16, 64]),
    "markov": kernels.markov([1, 4, 16, 64]),
    "markov, one before": kernels.markov([1, 4, 16, 64], previous=1),
    "window": kernels.window(129, 40),
    "tree": kernels.tree([-1, 0, 1, 1, 0, 4, -1, 6], prefix=60),
    "forest": kernels.tree([i - 1 if i % 48 else -1 for i in range(144)]),
    "padding": kernels.padding([70, 0], 40, 70),
    "causal & padding": kernels.causal(100) & kernels.padding([100, 33], 100),
    "tree & window": kernels.tree(range(-1, 79)) & kernels.window(80, 30),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    yield
    assert kernels.use.choice == "auto", "a test left the path switched"


@pytest.fixture
def poison():
    """torch.empty gives NaN (or the largest integer): whatever a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def scattered(*shape, dtype=torch.float32):
    """Random tensor stored with reversed dimensions in a buffer of NaN: whatever a kernel reads beside it shows."""
    buffer = torch.full([n + 3 for n in reversed(shape)], math.nan, dtype=dtype, device=DEVICE)
    inner = buffer[tuple(slice(1, 1 + n) for n in reversed(shape))].permute(*reversed(range(len(shape))))
    return inner.copy_(torch.randn(shape, dtype=dtype, device=DEVICE))


def relative(ours, truth):
    return float((ours.detach().double() - truth.detach()).norm() / truth.detach().norm().clamp(min=1e-6))


def attention_error(mask, heads=(2, 2), size=16, dtype=torch.float32, scale=None, batch=2):
    """Largest relative error of output, log-sum-exp and the three gradients against the float64 reference."""
    n, m = mask.shape
    x = [
        scattered(batch, h, length, size, dtype=dtype).requires_grad_()
        for h, length in zip((heads[0], heads[1], heads[1]), (n, m, m))
    ]
    double = [t.detach().double().requires_grad_() for t in x]
    (ours, lse), (truth, true_lse) = (
        kernels.attention(*x, mask, scale, True),
        kernels.attention_reference(*double, mask, scale),
    )
    do = scattered(*ours.shape, dtype=dtype)
    assert ours.dtype == dtype and lse.dtype == torch.float32 and not lse.requires_grad
    assert torch.equal(lse.isinf(), true_lse.isinf())
    errors = [relative(ours, truth), relative(lse.nan_to_num(neginf=0), true_lse.nan_to_num(neginf=0))]
    pairs = zip(torch.autograd.grad(ours, x, do), torch.autograd.grad(truth, double, do.double()))
    errors += (
        [relative(a, b) for a, b in pairs] if n * m > 1 else []
    )  # one key: dq = dk = 0, and the relative error means nothing
    return float(torch.tensor(errors).max())  # not max(): that loses a NaN


def chi_square(counts, law):
    """p-value of Pearson's test that `counts` were drawn from `law`."""
    law, counts = law.double()[law > 0], counts.double()[law > 0]
    expected = law / law.sum() * counts.sum()
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(law) - 1) / 2, dtype=torch.double), statistic / 2))


# --- 1. the torch paths -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["causal", "window", "scales", "markov", "tree", "padding"])
def test_masks_look_as_drawn_in_their_docstrings(name):
    lines, drawn = inspect.getdoc(getattr(kernels, name)).splitlines(), 0
    for k, line in enumerate(lines):
        calls = list(re.finditer(rf"{name}\([^)]*\)(?= )", line))
        for call, stop in zip(calls, [*(after.start() for after in calls[1:]), len(line)]):
            pictures = [picture.splitlines() for picture in eval(call.group(), vars(kernels)).draw().split("\n\n")]
            columns = [call.end() + found.start() for found in re.finditer("[.#]{2,}", line[call.end() : stop])]
            assert len(columns) == len(pictures)
            for at, rows in zip(columns, pictures):
                assert [text[at : at + len(rows[0])] for text in lines[k : k + len(rows)]] == rows
                drawn += 1
    assert drawn == {"causal": 2, "markov": 2, "padding": 2}.get(name, 1)


def test_tree_mask_is_the_ancestor_closure():
    parents = [-1, 0, 1, 2, 1, 0, 5, 5, -1, 8]
    dense = kernels.tree(parents, prefix=3).dense()[0, 0]
    for i in range(len(parents)):
        ancestors, node = set(), i
        while node >= 0:
            ancestors.add(node)
            node = parents[node]
        assert dense[i, :3].all() and set(dense[i, 3:].nonzero().flatten().tolist()) == ancestors


def test_scale_masks_equal_their_definition():
    counts = [1, 4, 9, 16]
    level = torch.arange(4).repeat_interleave(torch.tensor(counts))
    assert torch.equal(kernels.scales(counts).dense()[0, 0], level[:, None] >= level)
    assert torch.equal(kernels.markov(counts).dense()[0, 0], level[:, None] == level)
    assert torch.equal(
        kernels.markov(counts, 1).dense()[0, 0], (level[:, None] >= level) & (level[:, None] - level <= 1)
    )


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("block_m, block_n", [(16, 16), (64, 32), (8, 128)])
def test_tile_bounds_cover_what_is_seen_and_trust_only_whole_tiles(mask, block_m, block_n):
    dense = mask.dense()[:, 0]
    for flip, (bounds, first, last) in enumerate(mask.tiles(block_m, block_n)):
        seen, rows, cols = (dense.mT, block_n, block_m) if flip else (dense, block_m, block_n)
        assert bounds.shape == (len(dense), -(-seen.shape[1] // rows), 4) and bool((bounds.diff(dim=-1) >= 0).all())
        assert not bool((bounds.diff(dim=-1)[..., [k for k in range(3) if not first <= k < last]] > 0).any())
        for b in range(len(dense)):
            for tile, (lo, full_lo, full_hi, hi) in enumerate(bounds[b].tolist()):
                part = seen[b, tile * rows : (tile + 1) * rows]
                assert not part[:, :lo].any() and not part[:, hi:].any(), "a tile with something to see is skipped"
                assert part[:, full_lo:full_hi].all(), "a masked tile is taken as whole"
                inside = full_hi <= seen.shape[2] and len(part) == rows
                assert full_hi == full_lo or inside, "a tile that sticks out of the matrix is taken as whole"


def test_causal_tiles_are_skipped():
    bounds, first, last = kernels.causal(8).tiles(2, 2)[0]
    assert bounds[0].tolist() == [[0, 0, 0, 2], [0, 0, 2, 4], [0, 0, 4, 6], [0, 0, 6, 8]] and (first, last) == (1, 3)


@pytest.mark.parametrize("mask", [*MASKS.values(), kernels.causal(300)], ids=[*MASKS, "long"])
def test_attention_torch_path(mask):
    x = [
        torch.randn(2, h, n, 8, requires_grad=True)
        for h, n in zip((4, 2, 2), (mask.shape[0], mask.shape[1], mask.shape[1]))
    ]
    double = [t.detach().double().requires_grad_() for t in x]
    ours, truth = kernels.attention(*x, mask), kernels.attention_reference(*double, mask)[0]
    do = torch.randn_like(ours)
    assert relative(ours, truth) < 1e-6
    for a, b in zip(torch.autograd.grad(ours, x, do), torch.autograd.grad(truth, double, do.double())):
        assert relative(a, b) < 1e-6
    assert relative(kernels.attention(*x, mask, return_lse=True)[0], truth) < 1e-6


def test_attention_reference_against_loops_and_finite_differences():
    q, k, v = (torch.randn(1, 2, 5, 4, dtype=torch.double, requires_grad=True) for _ in range(3))
    mask = kernels.window(5, 3) & kernels.padding([4], 5)
    out, lse = kernels.attention_reference(q, k, v, mask, 0.3)
    for h in range(2):
        for i in range(5):
            seen = [j for j in range(5) if i - 3 < j <= i and j < 4]
            weights = [math.exp(0.3 * float(q[0, h, i].detach() @ k[0, h, j].detach())) for j in seen]
            want = sum(w * v[0, h, j] for w, j in zip(weights, seen)) / sum(weights)
            assert torch.allclose(out[0, h, i], want)
            assert math.isclose(float(lse[0, h, i].detach()), math.log(sum(weights)))
    assert torch.autograd.gradcheck(lambda *x: kernels.attention_reference(*x, mask), (q, k, v))
    empty = kernels.padding([0], 5)
    assert torch.autograd.gradcheck(lambda *x: kernels.attention_reference(*x, empty)[0], (q, k, v))
    out, lse = kernels.attention_reference(q, k, v, empty)
    assert (out == 0).all() and (lse == -math.inf).all()


def test_short_attention_on_a_cpu_in_bfloat16():
    q, k, v = (torch.randn(2, 2, 85, 16) for _ in range(3))
    for mask in (None, kernels.scales([1, 4, 16, 64])):
        ours = kernels.attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), mask)
        assert (
            ours.dtype == torch.bfloat16
            and relative(ours, kernels.attention_reference(q.double(), k.double(), v.double(), mask)[0]) < 2e-2
        )


def test_flash_split_and_scan_are_one_operator():
    s, v = torch.randn(6, 12, dtype=torch.double) * 4, torch.randn(12, 3, dtype=torch.double)
    truth = s.softmax(-1) @ v
    tiles = [kernels.summarize(s[:, a : a + 3], v[a : a + 3]) for a in (0, 3, 6, 9)]
    empty = (
        torch.full((6,), -math.inf, dtype=torch.double),
        torch.zeros(6, dtype=torch.double),
        torch.zeros(6, 3, dtype=torch.double),
    )
    fold = kernels.merge(kernels.merge(kernels.merge(kernels.merge(empty, tiles[0]), tiles[1]), tiles[2]), tiles[3])
    split = kernels.merge(kernels.merge(tiles[2], tiles[0]), kernels.merge(tiles[3], kernels.merge(empty, tiles[1])))
    for state in (fold, split, kernels.summarize(s, v)):
        assert torch.allclose(kernels.finish(state)[0], truth) and torch.allclose(
            kernels.finish(state)[1], s.logsumexp(-1)
        )
    for row in range(6):
        assert torch.allclose(kernels.scan_attention(s[row], v)[-1], truth[row])


@pytest.mark.parametrize("n", [1, 2, 17, 64])
def test_scan_is_softmax_over_prefixes_and_streams(n):
    s, v = 3 * torch.randn(2, 3, n, dtype=torch.double), torch.randn(2, 3, n, 5, dtype=torch.double)
    out, whole = kernels.scan_attention(s, v, return_state=True)
    assert torch.allclose(out, kernels.scan_reference(s, v))
    state, steps = None, []
    for t in range(n):
        step, state = kernels.scan_attention(s[..., t : t + 1], v[..., t : t + 1, :], state, return_state=True)
        steps.append(step)
    assert torch.allclose(torch.cat(steps, -2), out)
    assert all(torch.allclose(a, b) for a, b in zip(kernels.finish(state), kernels.finish(whole)))


@pytest.mark.parametrize("choice", ["reference", pytest.param("triton", marks=needs_interpreter)])
def test_scan_of_a_prefix_that_sees_nothing_is_zero(choice):
    s, v = torch.randn(2, 40), torch.randn(2, 40, 3)
    s[0, :5], s[1, 7] = -math.inf, -math.inf
    truth = kernels.scan_reference(s.double(), v.double()).nan_to_num()
    with kernels.use(choice):
        assert relative(kernels.scan_attention(s, v), truth) < 1e-5


def test_scan_gradients():
    s, v = (
        torch.randn(2, 7, dtype=torch.double, requires_grad=True),
        torch.randn(2, 7, 3, dtype=torch.double, requires_grad=True),
    )
    assert torch.autograd.gradcheck(kernels.scan_attention, (s, v))
    state = kernels.scan_attention(s[:, :4], v[:, :4], return_state=True)[1]
    pieces = kernels.scan_attention(s[:, 4:], v[:, 4:], state)[:, -1].sum()
    for a, b in zip(
        torch.autograd.grad(pieces, (s, v)), torch.autograd.grad(kernels.scan_reference(s, v)[:, -1].sum(), (s, v))
    ):
        assert torch.allclose(a, b)


@pytest.mark.parametrize("lengths", [11, [5, 20], [3, 11]])
@pytest.mark.parametrize("rows, causal", [(1, True), (3, True), (3, False)])
def test_decode_torch_path(lengths, rows, causal):
    q, k, v = torch.randn(2, 4, rows, 8), torch.randn(2, 2, 20, 8), torch.randn(2, 2, 20, 8)
    lengths = torch.tensor(lengths) if isinstance(lengths, list) else lengths
    truth = kernels.decode_reference(q.double(), k.double(), v.double(), lengths, causal=causal)
    assert relative(kernels.decode_attention(q, k, v, lengths, causal=causal), truth) < 1e-6


def test_decoding_step_by_step_is_causal_attention():
    q, k, v = (torch.randn(1, 2, 9, 8) for _ in range(3))
    whole = kernels.attention(q, k, v, kernels.causal(9))
    for n in range(1, 10):
        assert torch.allclose(kernels.decode_attention(q[:, :, n - 1 : n], k, v, n), whole[:, :, n - 1 : n], atol=1e-6)
    assert torch.allclose(kernels.decode_attention(q[:, :, 5:], k, v, 9), whole[:, :, 5:], atol=1e-6)


def test_autocast_on_a_cpu_keeps_attention_in_float32():
    q, k = torch.randn(1, 2, 8, 16), torch.randn(1, 2, 8, 16, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert kernels.attention(q, k, k, kernels.causal(8)).dtype == torch.float32
        step = kernels.decode_attention(k[:, :, :1], q, q, 5)
    assert step.dtype == torch.float32
    truth = kernels.attention_reference(k[:, :, :1].double(), q[:, :, :5].double(), q[:, :, :5].double())[0]
    assert relative(step, truth) < 1e-6


def test_truncate_by_its_definition():
    for _ in range(50):
        logits = torch.randint(-4, 5, (7,)) / 2.0  # many ties
        k, p = int(torch.randint(0, 9, ())), float(torch.rand(()) * 0.98 + 0.01)
        kept = [t for t in range(7) if k == 0 or int((logits > logits[t]).sum()) < k]
        mass = {t: math.exp(float(logits[t])) for t in kept}
        kept = [t for t in kept if sum(m for s, m in mass.items() if logits[s] > logits[t]) < p * sum(mass.values())]
        assert kernels.truncate(logits, k, p).isfinite().nonzero().flatten().tolist() == kept


def test_truncate_keeps_all_ties_and_at_least_one():
    assert kernels.truncate(torch.tensor([1.0, 1.0, 1.0, 0.0]), top_k=1).isfinite().tolist() == [
        True,
        True,
        True,
        False,
    ]
    assert kernels.truncate(torch.tensor([0.0, 3.0, 0.0]), top_p=1e-6).isfinite().tolist() == [False, True, False]
    expected = torch.tensor([0.5, 0.25, 0.0, 0.0])
    assert torch.allclose(kernels.truncate(torch.tensor([0.5, 0.25, 0.125, 0.125]).log(), top_p=0.7).exp(), expected)


def test_sample_temperature_zero_and_generator():
    logits = torch.randn(3, 4, 9)
    assert torch.equal(kernels.sample(logits, 0), logits.argmax(-1)) and torch.equal(
        kernels.sample(logits, top_k=1), logits.argmax(-1)
    )
    a, b = (kernels.sample(logits, generator=torch.Generator().manual_seed(7)) for _ in range(2))
    assert a.shape == (3, 4) and a.dtype == torch.int64 and torch.equal(a, b)


@pytest.mark.parametrize("temperature, top_k, top_p", [(1.0, 0, 1.0), (0.7, 4, 1.0), (1.3, 0, 0.8), (1.0, 5, 0.7)])
def test_sample_draws_from_the_truncated_law(temperature, top_k, top_p):
    logits = torch.randn(8) * 1.5
    law = kernels.truncate(logits / temperature, top_k, top_p).softmax(-1)
    tokens = kernels.sample(logits.expand(200_000, 8), temperature, top_k, top_p, torch.Generator().manual_seed(1))
    counts = tokens.bincount(minlength=8)
    assert (counts[law == 0] == 0).all() and chi_square(counts, law) > 1e-4


def drafted(rows, g, V, generator=None):
    p, q = (torch.randn(n, V, generator=generator).mul(1.5).softmax(-1) for n in (g + 1, g))
    drafts = (
        torch.stack([q[t].multinomial(rows, True, generator=generator) for t in range(g)], 1)
        if g
        else torch.zeros(rows, 0, dtype=torch.long)
    )
    uniforms, noise = torch.rand(rows, g, generator=generator), torch.empty(rows, V).exponential_(generator=generator)
    return p.expand(rows, g + 1, V), q.expand(rows, g, V), drafts, uniforms, noise


def test_verified_tokens_follow_the_target():
    """Three conditional laws: first token, second given that the first draft stayed, bonus given that both did."""
    p, q, *rest = drafted(400_000, 2, 5, torch.Generator().manual_seed(3))
    tokens, n = kernels.verify(p, q, *rest)
    assert chi_square(tokens[:, 0].bincount(minlength=5), p[0, 0]) > 1e-4
    assert chi_square(tokens[n >= 1, 1].bincount(minlength=5), p[0, 1]) > 1e-4
    assert chi_square(tokens[n == 2, 2].bincount(minlength=5), p[0, 2]) > 1e-4
    alpha = torch.minimum(p[0, 0], q[0, 0]).sum()
    assert abs(float((n >= 1).double().mean() - alpha)) < 4 * 0.5 / math.sqrt(len(n))
    assert (tokens.ne(-1).sum(-1) == n + 1).all()


def test_verify_corner_cases():
    p = torch.tensor([[[0.5, 0.5], [0.0, 1.0]]])
    one = torch.ones(1, 2)
    tokens, n = kernels.verify(p, p[:, :1], torch.tensor([[0]]), torch.tensor([[0.9]]), one)  # p == q stays
    assert tokens.tolist() == [[0, 1]] and n.tolist() == [1]
    apart = (
        torch.tensor([[[1.0, 0.0], [0.5, 0.5]]]),
        torch.tensor([[[0.0, 1.0]]]),
    )  # disjoint supports: refused, resampled from p
    assert kernels.verify(*apart, torch.tensor([[1]]), torch.tensor([[0.0]]), one)[0].tolist() == [[0, -1]]
    tokens, n = kernels.verify(
        p[:, 1:], p[:, :0], torch.zeros(1, 0, dtype=torch.long), torch.zeros(1, 0), one
    )  # nothing drafted
    assert tokens.tolist() == [[1]] and n.tolist() == [0]


@pytest.mark.parametrize("n, k, d", [(1, 1, 1), (70, 100, 16), (300, 7, 3), (0, 5, 4)])
def test_nearest_code_torch_path(n, k, d):
    x, codes = torch.randn(n, d), torch.randn(k, d)
    if k > 60:
        codes[60] = codes[3]  # equal codes: the lower index
    index, distance, residual = kernels.nearest_code(x, codes, True, True)
    assert torch.equal(index, kernels.nearest_reference(x.double(), codes.double())) and index.dtype == torch.int64
    assert torch.allclose(residual, x - codes[index]) and torch.allclose(distance, (x - codes[index]).square().sum(-1))
    assert torch.equal(kernels._nearest_torch(x, codes, elements=3 * k), index) if n else True


def bad_calls():
    x, cache = torch.zeros(1, 4, 6, 8), torch.zeros(1, 4, 6, 8)
    p = torch.zeros(2, 3, 5)
    a, d, s = kernels.attention, kernels.decode_attention, kernels.sample
    yield "one dtype", lambda: a(x, x.double(), x.double())
    yield "take a multiple", lambda: a(x, x[:, :3], x[:, :3])
    yield "one shape", lambda: a(x, x, x[..., :4])
    yield "batch and head size", lambda: a(x, x[..., :4], x[..., :4])
    yield "is empty", lambda: a(x[:, :, :0], x, x)
    yield "must be (batch", lambda: a(x[0], x[0], x[0])
    yield "mask causal is (5, 5)", lambda: a(x, x, x, kernels.causal(5))
    yield "must come from causal()", lambda: a(x, x, x, torch.ones(6, 6, dtype=torch.bool))
    yield "for a batch of 3", lambda: a(x, x, x, kernels.padding([1, 2, 3], 6))
    yield "must be a positive number", lambda: a(x, x, x, scale=-1.0)
    yield "pre-order", lambda: kernels.tree([-1, 0, 0, 1])
    yield "as many keys", lambda: kernels.causal(5, 3)
    yield "positive number of tokens", lambda: kernels.scales([1, 0])
    yield "exceeds the 4 keys", lambda: kernels.padding([5], 4)
    yield "cannot intersect", lambda: kernels.causal(5) & kernels.causal(6)
    yield "6 places of the cache", lambda: d(x[:, :, :1], cache, cache, 7)
    yield "of shape (1,)", lambda: d(x[:, :, :1], cache, cache, torch.tensor([1, 2]))
    yield "without its last dimension", lambda: kernels.scan_attention(torch.zeros(2, 3), torch.zeros(2, 4, 5))
    yield "must not be negative", lambda: s(torch.zeros(2, 5), -1.0)
    yield "top_k -1", lambda: s(torch.zeros(2, 5), top_k=-1)
    yield "top_p 0", lambda: s(torch.zeros(2, 5), top_p=0)
    yield "shape of the logits", lambda: s(torch.zeros(2, 5), noise=torch.zeros(5))
    yield (
        "uniforms is (2, 3)",
        lambda: kernels.verify(p, p[:, :2], torch.zeros(2, 2, dtype=torch.long), torch.zeros(2, 3), torch.zeros(2, 5)),
    )
    yield "must be (batch, gamma)", lambda: kernels.verify(p, p, torch.zeros(2), torch.zeros(2), torch.zeros(2, 5))
    yield "must be (N, D) and (K, D)", lambda: kernels.nearest_code(torch.zeros(3, 4), torch.zeros(3, 5))
    yield "codebook is empty", lambda: kernels.nearest_code(torch.zeros(3, 4), torch.zeros(0, 4))
    yield 'choose "auto"', lambda: kernels.use("fast")


def unsupported_by_kernels():
    a, d = kernels.attention, kernels.decode_attention
    yield "no kernel for head size 160", lambda: a(*(torch.zeros(1, 1, 4, 160) for _ in range(3)))
    yield "no kernel for torch.float64", lambda: a(*(torch.zeros(1, 1, 4, 16).double() for _ in range(3)))
    far = torch.empty(1, 1, 3, 2**30, device="meta")[..., :16]
    yield "make the tensor contiguous", lambda: kernels._for_kernel("attention", far)
    yield (
        "use attention(mask=causal(65",
        lambda: d(torch.zeros(1, 1, 65, 16), torch.zeros(1, 1, 99, 16), torch.zeros(1, 1, 99, 16), 80),
    )
    yield "split batch and heads below 65536", lambda: kernels._launch(far, kernels._verify, (1, 1, 65536))
    yield "take at most 32768", lambda: kernels.sample(torch.zeros(1, 40000))
    yield "no kernel for head size 200", lambda: kernels.scan_attention(torch.zeros(1, 3), torch.zeros(1, 3, 200))


@pytest.mark.parametrize("message, call", list(bad_calls()), ids=[message for message, _ in bad_calls()])
def test_user_errors_are_one_readable_line(message, call):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value) and "\n" not in str(error.value)


def test_docstring_examples_hold():
    s, v = torch.randn(2, 9), torch.randn(2, 9, 3)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for example in doctest.DocTestFinder().find(kernels, globs={**vars(kernels), "s": s, "v": v}):
        runner.run(example)
    assert runner.summarize().failed == 0 and runner.summarize().attempted >= 7


def test_use_and_path():
    x = torch.zeros(1)
    assert kernels.path(x) == ("reference", "Triton is not installed" if kernels.triton is None else "tensor on cpu")
    with kernels.use("reference"):
        assert kernels.path(x).name == "reference"
    assert kernels.use.choice == "auto"
    if not kernels.interpreting():
        with kernels.use("triton"), pytest.raises(ValueError, match="move it to a GPU"):
            kernels.path(x)


def test_the_environment_chooses_the_path():
    code, root = "import kernels, torch; print(kernels.path(torch.zeros(1)).reason)", os.path.dirname(kernels.__file__)
    for choice, said in (("reference", "NANO_KERNELS=reference"), ("fast", "use('fast'): choose")):
        env = {**os.environ, "NANO_KERNELS": choice}
        done = subprocess.run([sys.executable, "-c", code], cwd=root, env=env, capture_output=True, text=True)
        assert said in done.stdout + done.stderr


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_no_op_breaks_the_graph_of_torch_compile():
    def ops(x, noise):
        y = kernels.attention(x, x, x, kernels.causal(9)) + kernels.attention(x, x, x, mask)
        y = y + kernels.decode_attention(x[:, :, :1], x, x, 7) + kernels.scan_attention(x[..., 0], x)
        tokens, laws = kernels.sample(x[0, 0], 0.8, 5, 0.9, noise=noise), x[0].softmax(-1)
        verified = kernels.verify(laws, laws[:, 1:], tokens[None, :8].expand(2, -1), noise[:2, :8], noise[:2])[0]
        return y, tokens, verified, kernels.nearest_code(x[0, 0], x[0, 1])

    x, noise, mask = torch.randn(1, 2, 9, 16), torch.rand(9, 16) + 0.01, kernels.scales([1, 3, 5])
    for ours, truth in zip(torch.compile(ops, backend="eager", fullgraph=True)(x, noise), ops(x, noise)):
        assert torch.equal(ours, truth)


def test_masks_stay_on_the_cpu_whatever_the_default_device():
    with torch.device("meta"):
        mask = kernels.window(37, 6) & kernels.padding([20], 37)
        tiles, dense = mask.tiles(16, 16), mask.dense()
    assert {x.device.type for x in (mask.row_start, mask.row_end, mask.col_end, dense, tiles[0][0])} == {"cpu"}
    assert int(dense.sum()) > 0


def test_import_is_silent_and_works_without_triton(tmp_path):
    (tmp_path / "triton.py").write_text("raise ImportError('not for this platform')", encoding="utf-8")
    code = (
        "import kernels, torch; assert kernels.triton is None and not torch.cuda.is_initialized();"
        "x = torch.randn(1, 2, 5, 8);"
        "kernels.attention(x, x, x, kernels.causal(5)); kernels.sample(x); kernels.nearest_code(x[0, 0], x[0, 1])"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.path.dirname(kernels.__file__)])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "" and done.stderr == "", done.stderr


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_benchmarks_compare_functions_that_agree(monkeypatch):
    """At tiny shapes, on whatever device is here: what is timed runs, and both sides compute the same."""
    small = {"causal": [(1, 2, 17, 16)], "scales": [(1, 2, (1, 2, 3), 16)], "decode": [(2, 2, 40, 16)],
             "tokens": [(3, 50)], "nearest": [(30, 20, 4)], "scan": [(3, 20, 4)]}  # fmt: skip
    assert small.keys() == kernels.SHAPES.keys()
    monkeypatch.setattr(kernels, "SHAPES", small)
    rows = 0
    for case, work, unit, ours, peer, theirs in kernels.benchmarks(DEVICE, compiled=lambda f: f):
        assert work > 0 and unit in ("TFLOP/s", "GB/s")
        ours, theirs = (x if isinstance(x, tuple) else (x,) for x in (ours(), theirs()))
        rows += 1
        if not case.startswith("sample"):  # which draws its own noise
            assert len(ours) == len(theirs), case
            assert all(torch.allclose(a.float(), b.float(), atol=5e-2) for a, b in zip(ours, theirs)), case
    assert rows == 2 + 4 + 1 + 2 + 1 + 1


def test_report(capsys, tmp_path):
    rows, times = kernels.main(["--plot", str(tmp_path / "k.png")]) if not kernels.interpreting() else (None, None)
    if rows is None:  # the table of the interpreted kernels takes ten seconds: here only that of the torch paths
        with kernels.use("reference"):
            rows = list(kernels.errors("cpu", torch.float32))
    assert len(rows) == 12 and all(row[2] < 1e-6 for row in rows)


# --- 2. the kernels, interpreted --------------------------------------------------------------------------------------


@pytest.fixture
def triton_path(poison):
    with kernels.use("triton"):
        yield


@needs_interpreter
@pytest.mark.parametrize("n", [1, 2, 17, 49, 64, 127, 128, 129])
def test_causal_kernel_at_every_length(n, triton_path):
    assert attention_error(kernels.causal(n), batch=1) < 1e-5


@needs_interpreter
@pytest.mark.parametrize(
    "mask", [m for n, m in MASKS.items() if n != "causal"], ids=[n for n in MASKS if n != "causal"]
)
def test_kernel_with_every_mask(mask, triton_path):
    assert attention_error(mask, heads=(2, 1)) < 1e-5


@needs_interpreter
@pytest.mark.parametrize("size, dtype, bound", [(24, torch.float32, 1e-5), (5, torch.float32, 1e-5),
                                                (128, torch.float32, 1e-5),
                                                (16, torch.bfloat16, 1e-2), (16, torch.float16, 2e-3)])  # fmt: skip
def test_kernel_head_sizes_and_dtypes(size, dtype, bound, triton_path):
    assert attention_error(kernels.window(49, 20), heads=(3, 3), size=size, dtype=dtype, scale=0.2, batch=1) < bound


@needs_interpreter
def test_kernel_gradients_by_finite_differences(triton_path):
    x, mask = [torch.randn(1, 1, 5, 16, requires_grad=True) for _ in range(3)], kernels.causal(5)
    weight = torch.randn(1, 1, 5, 16)
    gradients = torch.autograd.grad((kernels.attention(*x, mask) * weight).sum(), x)
    for k in range(3):
        direction, step = torch.randn_like(x[k]), 1e-2
        ends = [[t + sign * step * direction if i == k else t for i, t in enumerate(x)] for sign in (1, -1)]
        up, down = ((kernels.attention(*e, mask).detach().double() * weight).sum() for e in ends)
        assert math.isclose(
            float(up - down) / (2 * step), float((gradients[k] * direction).sum()), rel_tol=5e-3, abs_tol=5e-4
        )


@needs_interpreter
def test_a_second_derivative_is_refused_not_silently_zero(triton_path):
    x = torch.randn(1, 1, 3, 16, requires_grad=True)
    (first,) = torch.autograd.grad(kernels.attention(x, x, x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@needs_interpreter
def test_sums_are_float32_whatever_the_default_dtype(triton_path):
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert attention_error(kernels.causal(17), batch=1) < 1e-5
        q, cache = torch.randn(1, 2, 1, 16, dtype=torch.float32), torch.randn(1, 2, 20, 16, dtype=torch.float32)
        truth = kernels.decode_reference(q.double(), cache.double(), cache.double(), 20)
        assert relative(kernels.decode_attention(q, cache, cache, 20), truth) < 1e-5
    finally:
        torch.set_default_dtype(torch.float32)


@needs_interpreter
def test_expanded_gradient_and_zero_strides(triton_path):
    x = [torch.randn(1, 2, 17, 16).requires_grad_() for _ in range(3)]
    ours = torch.autograd.grad(
        kernels.attention(*x, kernels.causal(17)).sum(), x
    )  # .sum() hands back a gradient with stride 0
    with kernels.use("reference"):
        truth = torch.autograd.grad(kernels.attention(*x, kernels.causal(17)).sum(), x)
    assert all(relative(a, b.double()) < 1e-5 for a, b in zip(ours, truth))


@needs_interpreter
@pytest.mark.parametrize("heads, rows, size, cache, lengths, causal", [
    ((4, 2), 1, 16, 100, [100, 37], True), ((2, 2), 5, 24, 130, 129, True), ((4, 1), 3, 16, 70, [3, 17], False),
    ((2, 2), 1, 16, 40, 1, True),
    ((2, 1), 3, 16, 70, [2, 64], True),
])  # fmt: skip
def test_decode_kernel(heads, rows, size, cache, lengths, causal, triton_path):
    q, k, v = (scattered(2, h, n, size) for h, n in zip((heads[0], heads[1], heads[1]), (rows, cache, cache)))
    lengths = torch.tensor(lengths) if isinstance(lengths, list) else lengths
    last = int(torch.as_tensor(lengths).max())
    k[:, :, last:], v[:, :, last:] = math.nan, math.nan  # what lies beyond the filled part must not be touched
    truth = kernels.decode_reference(*(t.nan_to_num().double() for t in (q, k, v)), lengths, causal=causal)
    assert relative(kernels.decode_attention(q, k, v, lengths, causal=causal), truth) < 1e-5


@needs_interpreter
def test_decode_kernel_reads_nothing_beyond_the_cache(triton_path):
    storage = torch.full((2, 2, 70, 16), math.nan)
    q, cache = torch.randn(2, 2, 1, 16), storage[:, :, :40].copy_(torch.randn(2, 2, 40, 16))
    ours = kernels.decode_attention(q, cache, cache, torch.tensor([40, 64]))  # 64 do not fit: taken as 40
    assert relative(ours, kernels.decode_reference(q.double(), cache.double(), cache.double(), 40)) < 1e-5


@needs_interpreter
def test_scan_kernel_hands_a_gradient_to_the_torch_path(triton_path):
    s, v = torch.randn(2, 6), torch.randn(2, 6, 4)
    state = [x.requires_grad_() for x in kernels.scan_attention(s, v, return_state=True)[1]]
    assert kernels.scan_attention(s, v, state).requires_grad


@needs_interpreter
@pytest.mark.parametrize("n, size", [(1, 16), (2, 3), (17, 16), (64, 5), (129, 4)])
def test_scan_kernel(n, size, triton_path):
    s, v = 3 * scattered(2, n), scattered(2, n, size)
    out, state = kernels.scan_attention(s, v, return_state=True)
    assert relative(out, kernels.scan_reference(s.double(), v.double())) < 1e-5
    with kernels.use("reference"):
        _, truth = kernels.scan_attention(s.double(), v.double(), return_state=True)
    assert all(relative(a, b) < 1e-5 for a, b in zip(kernels.finish(state), kernels.finish(truth)))
    if n == 17:
        _, state = kernels.scan_attention(s[:, :5], v[:, :5], return_state=True)
        assert relative(kernels.scan_attention(s[:, 5:], v[:, 5:], state), out[:, 5:].double()) < 1e-5


@needs_interpreter
@pytest.mark.parametrize("V", [1, 2, 17, 129, 1000])
@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (3, 1.0), (0, 0.7), (20, 0.5)])
def test_sample_kernel_draws_the_tokens_of_the_reference(V, top_k, top_p, triton_path):
    logits, noise = 3 * scattered(8, V), torch.empty(8, V).exponential_()
    logits[0, : V // 2] = logits[0, V - 1]  # ties
    logits[1, V // 2 + 1 :] = -math.inf
    logits[2] = -logits[2].abs() - 50  # negative keys only
    ours = kernels.sample(logits, 0.7, top_k, top_p, noise=noise)
    assert torch.equal(ours, kernels.sample_reference(logits, 0.7, top_k, top_p, noise)) and ours.dtype == torch.int64


@needs_interpreter
def test_sample_kernel_tells_close_logits_apart(triton_path):
    logits, noise = torch.arange(100)[None] * 1e-6, torch.ones(1, 100)
    noise[0, 94] = 0.01  # the sixth likeliest would win, but five are kept
    assert kernels.sample(logits, 1.0, 5, noise=noise).tolist() == [99]


@needs_interpreter
@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (3, 0.7)])
def test_sample_kernel_stays_inside_the_row_whatever_the_logits(top_k, top_p, triton_path):
    logits = torch.full((3, 17), -math.inf)
    logits[0], logits[1, ::2] = math.nan, 1.0
    logits[1, 1::2] = math.nan
    tokens = kernels.sample(logits, 1.0, top_k, top_p)
    assert (tokens < 17).all() and tokens[1] % 2 == 0


@needs_interpreter
@pytest.mark.parametrize("rows, g, V", [(8, 4, 97), (4, 0, 17), (3, 3, 5000), (8, 1, 2)])
def test_verify_kernel_equals_the_reference(rows, g, V, triton_path):
    args = drafted(rows, g, V)
    ours, truth = kernels.verify(*args), kernels.verify_reference(*args)
    assert torch.equal(ours[0], truth[0]) and torch.equal(ours[1], truth[1])


@needs_interpreter
def test_verify_kernel_falls_back_to_the_target_when_the_residual_is_empty(triton_path):
    p, q, drafts, uniforms, noise = drafted(4, 2, 11)
    q = p[:, :2]
    ours, truth = (
        kernels.verify(p, q, drafts, uniforms + 1, noise),
        kernels.verify_reference(p, q, drafts, uniforms + 1, noise),
    )
    assert torch.equal(ours[0], truth[0]) and (ours[1] == 0).all() and (ours[0][:, 0] >= 0).all()


@needs_interpreter
@pytest.mark.parametrize("n, k, d", [(1, 1, 1), (2, 70, 16), (65, 64, 24), (129, 65, 3), (17, 130, 70)])
def test_nearest_kernel(n, k, d, triton_path):
    x, codes = scattered(n, d), scattered(k, d)
    if k > 67:
        codes[60], codes[67], x[0] = codes[3], codes[3], codes[3]  # equal codes: in another lane, and 64 on in the same
    index, distance, residual = kernels.nearest_code(x, codes, True, True)
    assert torch.equal(index, kernels.nearest_reference(x.double(), codes.double()))
    assert torch.equal(residual, x - codes[index]) and torch.allclose(distance, residual.square().sum(-1))
    assert torch.equal(kernels.nearest_code(x, codes), index)


@needs_interpreter
@pytest.mark.parametrize(
    "message, call", list(unsupported_by_kernels()), ids=[message for message, _ in unsupported_by_kernels()]
)
def test_what_kernels_do_not_support_is_refused(message, call, triton_path):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value) and "\n" not in str(error.value)


# --- 3. the kernels, compiled for GPUs that are not here --------------------------------------------------------------


def compile_all(arch):
    """Run the wrappers on CPU tensors under a driver that reports `arch`; compile every launch and start none."""
    import tempfile

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    class Driver:
        def get_current_device(self):
            return 0

        def get_current_stream(self, device=None):
            return 0

        def get_current_target(self):
            return GPUTarget("cuda", arch, 32)

    reports, real, case = [], JITFunction.run, None

    def run(self, *args, grid, warmup, **kwargs):
        kernel = real(self, *args, grid=grid, warmup=True, **kwargs)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            usage = subprocess.run(
                [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name], capture_output=True, text=True
            ).stdout
        registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
        ptx = kernel.asm["ptx"]
        products = {"wgmma": ptx.count("wgmma.mma_async"), "mma": len(re.findall(r"\bmma\.sync", ptx))}
        facts = {"registers": registers, "stack": stack, "shared": kernel.metadata.shared, **products}
        reports.append({"kernel": self.fn.__name__, "case": case, **facts})

    triton.runtime.driver.set_active(Driver())
    JITFunction.run = run
    kernels.path = lambda x: kernels.Path("triton", "compiled only")
    kernels._arch = lambda x: f"sm_{arch}"
    bf16, f32 = torch.bfloat16, torch.float32
    for case, mask, heads, size, dtype in (
        ("causal", kernels.causal(512), (2, 2), 64, bf16), ("causal", kernels.causal(512), (2, 2), 128, bf16),
        ("scales", kernels.scales([1, 15, 240]), (2, 2), 16, bf16),
        ("tree", kernels.tree(range(-1, 129)), (2, 2), 32, bf16),
        ("grouped window", kernels.window(512, 200), (4, 2), 64, torch.float16),
        ("causal float32", kernels.causal(64), (2, 2), 64, f32),
        ("causal float32", kernels.causal(64), (2, 2), 128, f32),
    ):  # fmt: skip
        case = f"{case} {size}"
        n = mask.shape[0]
        q, k, v = (
            torch.zeros(1, n, h, size, dtype=dtype).transpose(1, 2).requires_grad_()
            for h in (heads[0], heads[1], heads[1])
        )
        out = kernels.attention(q, k, v, mask)
        out.backward(torch.zeros_like(out))
    for rows, size, dtype in ((1, 64, bf16), (16, 128, bf16), (1, 64, f32), (16, 128, f32)):
        case = f"decode {rows} {size} {dtype}"
        cache = torch.zeros(2, 2, 512, size, dtype=dtype)
        kernels.decode_attention(torch.zeros(2, 8, rows, size, dtype=dtype), cache, cache, 100)
    for size in (16, 128):
        case = f"scan {size}"
        kernels.scan_attention(torch.zeros(4, 100), torch.zeros(4, 100, size))
    for V in (256, 32768):
        case = f"sample {V}"
        kernels.sample(torch.zeros(4, V), 1.0, 50, 0.9)
    case = "verify"
    p, drafts = torch.zeros(4, 5, 999), torch.zeros(4, 4, dtype=torch.long)
    kernels.verify(p, p[:, :4], drafts, torch.zeros(4, 4), p[:, 0])
    for size in (16, 256):
        case = f"nearest {size}"
        kernels.nearest_code(torch.zeros(1000, size), torch.zeros(512, size))
    case = "everything 1"  # which is compiled in as a constant
    one = torch.zeros(1, 1, 1, 16, dtype=bf16, requires_grad=True)
    kernels.attention(one, one, one, kernels.padding([1], 1)).backward(one.detach())
    kernels.decode_attention(one, one, one, 1)
    kernels.sample(torch.zeros(1, 1), 1.0, 1, 0.9)
    kernels.verify(p[:1, :2, :1], p[:1, :1, :1], drafts[:1, :1], torch.zeros(1, 1), torch.ones(1, 1))
    kernels.nearest_code(torch.zeros(1, 1), torch.zeros(1, 1))
    return reports


@pytest.fixture(scope="module")
def compiled(request, tmp_path_factory):
    """Reports of `compile_all` for both architectures; another process, because this one interprets."""
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    runs = {
        arch: subprocess.Popen(
            [sys.executable, __file__, str(arch)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for arch in (80, 90)
    }
    out = {arch: run.communicate() for arch, run in runs.items()}
    for arch, (stdout, stderr) in out.items():
        assert runs[arch].returncode == 0, stderr[-3000:]
    return {arch: json.loads(stdout.splitlines()[-1]) for arch, (stdout, _) in out.items()}


@needs_triton
@pytest.mark.skipif(sys.platform != "linux", reason="ptxas comes with triton on Linux only")
@pytest.mark.parametrize("arch, shared", [(80, 99 * 1024), (90, 227 * 1024)])
def test_every_launch_compiles_within_bounds(arch, shared, compiled):
    reports = compiled[arch]
    assert len(reports) == 7 * 3 + 4 * 2 + 2 + 2 + 1 + 2 + 8
    for r in reports:
        # bytes a thread. The loop over the heads of a group keeps more alive: 8 with Triton 3.9, 800 with 3.6;
        # float32 heads of 128 fill the registers, 64 rows of them most
        corners = {"grouped window 64": 1024, "causal float32 128": 128, "decode 16 128 torch.float32": 512}
        allowed = corners.get(r["case"], 0)
        assert r["stack"] <= allowed, f"spills: {r}"
        assert r["shared"] <= shared, f"more shared memory than sm_{arch} has: {r}"
        assert r["registers"] <= 255, r
        if r["kernel"].startswith("_attention"):
            assert r["wgmma" if arch == 90 and "float32" not in r["case"] else "mma"] > 0, (
                f"products not on the tensor cores: {r}"
            )
        if r["kernel"] in ("_decode_chunks", "_nearest"):
            assert r["wgmma"] + r["mma"] > 0, r


# --- 4. on a GPU ------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 1e-2), (torch.float16, 2e-3), (torch.float32, 1e-3)])
def test_all_ops_on_a_gpu(dtype, bound):
    for op, case, error in kernels.errors("cuda", dtype):
        assert error < bound, (op, case)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("n", [1, 2, 17, 49, 127, 128, 129, 1000])
@pytest.mark.parametrize("size", [16, 64, 128])
def test_causal_kernel_on_a_gpu(n, size, poison):
    assert attention_error(kernels.causal(n), heads=(4, 2), size=size, dtype=torch.bfloat16) < 1e-2


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_every_mask_on_a_gpu(mask, poison):
    assert attention_error(mask, size=64, dtype=torch.bfloat16) < 1e-2


if __name__ == "__main__":
    print(json.dumps(compile_all(int(sys.argv[1]))))
