"""Tests of kernels.py, in three layers:

1. the torch paths against closed forms, brute force and float64 (everywhere);
2. the kernels against the torch references: in Triton's interpreter on a CPU, or with TRITON_INTERPRET=0 on a GPU;
3. what the wrappers launch, compiled for sm_80 and sm_90 without a GPU.

The interpreter computes bf16 wrongly, sees no races, and accepts what the compiler refuses; layer 3 is for the last.
"""

import doctest
import inspect
import json
import math
import os
import re
import subprocess
import sys

os.environ.setdefault("TRITON_INTERPRET", "1")      # before triton is imported; conftest.py does it for the suite

import pytest
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import kernels

GPU = torch.cuda.is_available() and kernels.triton is not None and not kernels.interpreting()
DEVICE = "cuda" if GPU else "cpu"                   # of everything that a kernel is tested with
EXACT = 1e-3 if GPU else 1e-5                       # float32; a GPU rounds factors, powers and quotients more coarsely
needs_kernels = pytest.mark.skipif(not GPU and not kernels.interpreting(), reason="no GPU and no interpreter")
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero")    # log2(0) = -inf of rows that see nothing, in numpy
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
    "some rows see nothing": kernels.Mask(
        *(torch.tensor(x, dtype=torch.int32) for x in ([0] * 40, [0, 30] * 20, [40] * 70))
    ),
}
every_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    yield
    assert kernels.use.choice == "auto", "a test left the path switched"


def scattered(*shape, dtype=torch.float32):
    """Random tensor with reversed dimensions in a buffer of NaN: what is read beside it, or in its wrong order, shows."""
    buffer = torch.full([n + 3 for n in reversed(shape)], math.nan, dtype=dtype, device=DEVICE)
    inner = buffer[tuple(slice(1, 1 + n) for n in reversed(shape))].permute(*reversed(range(len(shape))))
    return inner.copy_(torch.randn(shape, dtype=dtype, device=DEVICE))


def relative(ours, truth):
    return float((ours.detach().double() - truth.detach()).norm() / truth.detach().norm().clamp(min=1e-6))


def attention_error(mask, heads=(2, 2), size=16, dtype=torch.float32, scale=None, batch=2):
    """Largest relative error of the output and the three gradients against the float64 reference."""
    n, m = mask.shape
    shapes = (batch, heads[0], n, size), (batch, heads[1], m, size), (batch, heads[1], m, size)
    x = [scattered(*shape, dtype=dtype).requires_grad_() for shape in shapes]
    double = [t.detach().double().requires_grad_() for t in x]
    ours, truth = kernels.attention(*x, mask, scale), kernels.attention_reference(*double, mask, scale)[0]
    do = scattered(*ours.shape, dtype=dtype)
    assert ours.dtype == dtype
    errors = [relative(ours, truth)]
    if n * m > 1:       # with one key dq = dk = 0, and a relative error means nothing
        pairs = zip(torch.autograd.grad(ours, x, do), torch.autograd.grad(truth, double, do.double()))
        errors += [relative(a, b) for a, b in pairs]
    return float(torch.tensor(errors).max())        # not max(): that loses a NaN


def chi_square(counts, law):
    """p-value of Pearson's test that `counts` were drawn from `law`."""
    law, counts = law.double()[law > 0], counts.double()[law > 0]
    expected = law / law.sum() * counts.sum()
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(law) - 1) / 2, dtype=torch.double), statistic / 2))


# --- 1. the torch paths -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, pictures", [("causal", 2), ("window", 1), ("scales", 1), ("markov", 2), ("tree", 1)])
def test_masks_look_as_drawn_in_their_docstrings(name, pictures):
    lines, drawn = inspect.getdoc(getattr(kernels, name)).splitlines(), 0
    for k, line in enumerate(lines):
        for call in re.finditer(rf"{name}\([^)]*\)(?= )", line):
            at = call.end() + re.search("[.#]{2,}", line[call.end():]).start()
            rows = eval(call.group(), vars(kernels)).draw().splitlines()
            assert [text[at:at + len(rows[0])] for text in lines[k:k + len(rows)]] == rows
            drawn += 1
    assert drawn == pictures


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
    older = level[:, None] - level
    assert torch.equal(kernels.scales(counts).dense()[0, 0], older >= 0)
    assert torch.equal(kernels.markov(counts).dense()[0, 0], older == 0)
    assert torch.equal(kernels.markov(counts, 1).dense()[0, 0], (older >= 0) & (older <= 1))


@every_mask
@pytest.mark.parametrize("block_m, block_n", [(16, 16), (64, 32), (8, 128)])
def test_tile_bounds_cover_what_is_seen_and_trust_only_whole_tiles(mask, block_m, block_n):
    dense, (by_queries, by_keys) = mask.dense()[0, 0], (x[0, 0] for x in mask.tiles(block_m, block_n))
    for seen, rows, bounds in ((dense, block_m, by_queries), (dense.T, block_n, by_keys)):
        assert bounds.shape == (-(-len(seen) // rows), 4) and bool((bounds.diff(dim=-1) >= 0).all())
        for tile, (lo, full_lo, full_hi, hi) in enumerate(bounds.tolist()):
            part = seen[tile * rows:(tile + 1) * rows]
            assert not part[:, :lo].any() and not part[:, hi:].any(), "a tile with something to see is skipped"
            assert part[:, full_lo:full_hi].all(), "a masked tile is taken as whole"
            inside = full_hi <= seen.shape[1] and len(part) == rows
            assert full_hi == full_lo or inside, "a tile that sticks out of the matrix is taken as whole"


def test_causal_tiles_are_those_drawn():
    by_queries, by_keys = (x[0, 0] for x in kernels.causal(8).tiles(2, 2))
    assert by_queries.tolist() == [[0, 0, 0, 2], [0, 0, 2, 4], [0, 0, 4, 6], [0, 0, 6, 8]]
    assert by_keys.tolist() == [[0, 2, 8, 8], [2, 4, 8, 8], [4, 6, 8, 8], [6, 6, 6, 8]]
    drawn = re.findall(r"[0-7], [0-7] .*?(\d) +(\d) +(\d) +(\d)", kernels.Mask.tiles.__doc__)
    assert [list(map(int, row)) for row in drawn] == by_queries.tolist()


@every_mask
def test_attention_torch_path(mask):
    n, m = mask.shape
    x = [torch.randn(2, h, length, 8, requires_grad=True) for h, length in ((4, n), (2, m), (2, m))]
    double = [t.detach().double().requires_grad_() for t in x]
    ours, truth = kernels.attention(*x, mask), kernels.attention_reference(*double, mask)[0]
    do = torch.randn_like(ours)
    assert relative(ours, truth) < 1e-6
    for a, b in zip(torch.autograd.grad(ours, x, do), torch.autograd.grad(truth, double, do.double())):
        assert relative(a, b) < 1e-6
    assert relative(kernels.attention_reference(*x, mask)[0], truth) < 1e-6


def test_attention_reference_against_loops_and_finite_differences():
    q, k, v = (torch.randn(1, 2, 5, 4, dtype=torch.double, requires_grad=True) for _ in range(3))
    mask = kernels.window(5, 3)
    out, lse = kernels.attention_reference(q, k, v, mask, 0.3)
    for h in range(2):
        for i in range(5):
            seen = range(max(0, i - 2), i + 1)
            weights = [math.exp(0.3 * float(q[0, h, i].detach() @ k[0, h, j].detach())) for j in seen]
            assert torch.allclose(out[0, h, i], sum(w * v[0, h, j] for w, j in zip(weights, seen)) / sum(weights))
            assert math.isclose(float(lse[0, h, i].detach()), math.log(sum(weights)))
    assert torch.autograd.gradcheck(lambda *x: kernels.attention_reference(*x, mask), (q, k, v))
    empty = kernels.Mask(torch.zeros(5), torch.zeros(5), torch.full((5,), 5))
    assert torch.autograd.gradcheck(lambda *x: kernels.attention_reference(*x, empty)[0], (q, k, v))
    out, lse = kernels.attention_reference(q, k, v, empty)
    assert (out == 0).all() and (lse == -math.inf).all()


@pytest.mark.parametrize("mask", [None, MASKS["scales"], MASKS["some rows see nothing"], kernels.causal(300)])
def test_attention_on_a_cpu_in_bfloat16(mask):
    n, m = (85, 85) if mask is None else mask.shape
    x = [torch.randn(2, 2, length, 16).bfloat16().requires_grad_() for length in (n, m, m)]
    double = [t.detach().double().requires_grad_() for t in x]
    ours, truth = kernels.attention(*x, mask), kernels.attention_reference(*double, mask)[0]
    pairs = [(ours, truth), *zip(torch.autograd.grad(ours.sum(), x), torch.autograd.grad(truth.sum(), double))]
    assert ours.dtype == torch.bfloat16 and all(relative(a, b) < 2e-2 for a, b in (pairs[0], pairs[3]))


def test_autocast_gives_attention_its_dtype_and_a_cache_keeps_its_own():
    q, k = torch.randn(1, 2, 8, 16), torch.randn(1, 2, 8, 16, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        y = kernels.attention(q, k, k, kernels.causal(8))
        exact = kernels.attention_reference(*(x.double() for x in (q.bfloat16(), k, k)), kernels.causal(8))[0]
        assert y.dtype == torch.bfloat16 and relative(y, exact) < 2e-2
        step = kernels.decode_attention(k[:, :, :1], q, q, 5)
    truth = kernels.attention_reference(k[:, :, :1].double(), q[:, :, :5].double(), q[:, :, :5].double())[0]
    assert step.dtype == torch.float32 and relative(step, truth) < 1e-6


def test_flash_split_and_scan_are_one_operator():
    s, v = torch.randn(6, 12, dtype=torch.double) * 4, torch.randn(12, 3, dtype=torch.double)
    truth, merge = s.softmax(-1) @ v, kernels.merge
    a, b, c, d = (kernels.summarize(s[:, t:t + 3], v[t:t + 3]) for t in (0, 3, 6, 9))
    empty = kernels.summarize(torch.full((6, 1), -math.inf, dtype=torch.double), v[:1])
    fold = merge(merge(merge(merge(empty, a), b), c), d)
    split = merge(merge(c, a), merge(d, merge(empty, b)))
    for state in (fold, split, kernels.summarize(s, v)):
        out, lse = kernels.finish(state)
        assert torch.allclose(out, truth) and torch.allclose(lse, s.logsumexp(-1))
    for row in range(6):
        assert torch.allclose(kernels.scan_attention(s[row], v)[-1], truth[row])


@pytest.mark.parametrize("n", [1, 2, 17, 64])
def test_scan_is_softmax_over_prefixes_and_streams(n):
    s, v = 3 * torch.randn(2, 3, n, dtype=torch.double), torch.randn(2, 3, n, 5, dtype=torch.double)
    out, whole = kernels.scan_attention(s, v, return_state=True)
    assert torch.allclose(out, kernels.scan_reference(s, v))
    state, steps = None, []
    for t in range(n):
        step, state = kernels.scan_attention(s[..., t:t + 1], v[..., t:t + 1, :], state, return_state=True)
        steps.append(step)
    assert torch.allclose(torch.cat(steps, -2), out)
    assert all(torch.allclose(a, b) for a, b in zip(kernels.finish(state), kernels.finish(whole)))


def test_scan_gradients():
    s = torch.randn(2, 7, dtype=torch.double, requires_grad=True)
    v = torch.randn(2, 7, 3, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(kernels.scan_attention, (s, v))
    state = kernels.scan_attention(s[:, :4], v[:, :4], return_state=True)[1]
    pieces = torch.autograd.grad(kernels.scan_attention(s[:, 4:], v[:, 4:], state)[:, -1].sum(), (s, v))
    whole = torch.autograd.grad(kernels.scan_reference(s, v)[:, -1].sum(), (s, v))
    assert all(torch.allclose(a, b) for a, b in zip(pieces, whole))


@pytest.mark.parametrize("length", [11, [5, 20], [3, 11]])
@pytest.mark.parametrize("rows, causal", [(1, True), (3, True), (3, False)])
def test_decoding_sees_the_filled_part_and_no_later_token(length, rows, causal):
    """On the torch path; the truth is one softmax per query over a slice."""
    q, k, v = torch.randn(2, 4, rows, 8), torch.randn(2, 2, 20, 8), torch.randn(2, 2, 20, 8)
    lengths = [length, length] if isinstance(length, int) else length
    length = length if isinstance(length, int) else torch.tensor(length)
    ours = kernels.decode_attention(q, k, v, length, causal=causal)
    double = kernels.decode_reference(q.double(), k.double(), v.double(), length, causal=causal)
    for b in range(2):
        for h in range(4):
            for r in range(rows):
                end = lengths[b] - (rows - 1 - r) * causal
                weights = (k[b, h // 2, :end].double() @ q[b, h, r].double() * 8**-0.5).softmax(0)
                truth = weights @ v[b, h // 2, :end].double()
                assert relative(ours[b, h, r], truth) < 1e-5 and relative(double[b, h, r], truth) < 1e-12


def test_decoding_step_by_step_is_causal_attention():
    q, k, v = (torch.randn(1, 2, 9, 8) for _ in range(3))
    whole = kernels.attention(q, k, v, kernels.causal(9))
    for n in range(1, 10):
        assert torch.allclose(kernels.decode_attention(q[:, :, n - 1:n], k, v, n), whole[:, :, n - 1:n], atol=1e-6)


def test_truncate_by_its_definition():
    for _ in range(50):
        logits = torch.randint(-4, 5, (7,)) / 2.0       # many ties
        k, p = int(torch.randint(0, 9, ())), float(torch.rand(()) * 0.98 + 0.01)
        kept = [t for t in range(7) if k == 0 or int((logits > logits[t]).sum()) < k]
        mass = {t: math.exp(float(logits[t])) for t in kept}
        kept = [t for t in kept if sum(m for s, m in mass.items() if logits[s] > logits[t]) < p * sum(mass.values())]
        assert kernels.truncate(logits, k, p).isfinite().nonzero().flatten().tolist() == kept


def test_sample_temperature_zero_and_generator():
    logits = torch.randn(3, 4, 9)
    assert torch.equal(kernels.sample(logits, 0), logits.argmax(-1))
    assert torch.equal(kernels.sample(logits, top_k=1), logits.argmax(-1))
    a, b = (kernels.sample(logits, generator=torch.Generator().manual_seed(7)) for _ in range(2))
    assert a.shape == (3, 4) and a.dtype == torch.int64 and torch.equal(a, b)


@pytest.mark.parametrize("temperature, top_k, top_p", [(1.0, 0, 1.0), (0.7, 4, 1.0), (1.3, 0, 0.8), (1.0, 5, 0.7)])
def test_sample_draws_from_the_truncated_law(temperature, top_k, top_p):
    logits = torch.randn(8) * 1.5
    law = kernels.truncate(logits / temperature, top_k, top_p).softmax(-1)
    tokens = kernels.sample(logits.expand(200_000, 8), temperature, top_k, top_p, torch.Generator().manual_seed(1))
    counts = tokens.bincount(minlength=8)
    assert (counts[law == 0] == 0).all() and chi_square(counts, law) > 1e-4


def drafted(rows, g, V, device="cpu"):
    """Arguments of verify: the same laws in each row, drafts drawn from them."""
    p, q = torch.randn(g + 1, V).mul(1.5).softmax(-1), torch.randn(g, V).mul(1.5).softmax(-1)
    drafts = torch.zeros(rows, 0, dtype=torch.long)
    for t in range(g):
        drafts = torch.cat([drafts, q[t].multinomial(rows, True)[:, None]], 1)
    uniforms, noise = torch.rand(rows, g), torch.empty(rows, V).exponential_()
    x = p.expand(rows, g + 1, V), q.expand(rows, g, V), drafts, uniforms, noise
    return [t.to(device) for t in x]


def test_verified_tokens_follow_the_target():
    """Three conditional laws: first token, second given that the first draft stayed, bonus given that both did."""
    p, q, *rest = drafted(400_000, 2, 5)
    tokens, n = kernels.verify(p, q, *rest)
    assert chi_square(tokens[:, 0].bincount(minlength=5), p[0, 0]) > 1e-4
    assert chi_square(tokens[n >= 1, 1].bincount(minlength=5), p[0, 1]) > 1e-4
    assert chi_square(tokens[n == 2, 2].bincount(minlength=5), p[0, 2]) > 1e-4
    alpha = torch.minimum(p[0, 0], q[0, 0]).sum()       # how often the first draft stays
    assert abs(float((n >= 1).double().mean() - alpha)) < 4 * 0.5 / math.sqrt(len(n))
    assert (tokens.ne(-1).sum(-1) == n + 1).all()


def test_verify_corner_cases():
    p, one = torch.tensor([[[0.5, 0.5], [0.0, 1.0]]]), torch.ones(1, 2)
    tokens, n = kernels.verify(p, p[:, :1], torch.tensor([[0]]), torch.tensor([[0.9]]), one)    # p == q: stays
    assert tokens.tolist() == [[0, 1]] and n.tolist() == [1]
    p, q = torch.tensor([[[1.0, 0.0], [0.5, 0.5]]]), torch.tensor([[[0.0, 1.0]]])               # nothing in common
    assert kernels.verify(p, q, torch.tensor([[1]]), torch.tensor([[0.0]]), one)[0].tolist() == [[0, -1]]
    nothing = torch.zeros(1, 0, dtype=torch.long), torch.zeros(1, 0)
    assert kernels.verify(p[:, :1], q[:, :0], *nothing, one)[0].tolist() == [[0]]


@pytest.mark.parametrize("n, k, d", [(1, 1, 1), (70, 100, 16), (300, 7, 3), (0, 5, 4), (5000, 1000, 8)])
def test_nearest_code(n, k, d):
    points, codes = torch.randn(n, d), torch.randn(k, d)
    if k > 60:
        codes[60] = codes[3]        # equal codes: the lower index
    index, distance = kernels.nearest_code(points, codes, return_distance=True)
    truth = torch.cdist(points.double(), codes.double(), compute_mode="donot_use_mm_for_euclid_dist")
    assert torch.equal(index, truth.argmin(1)) and index.dtype == torch.int64
    assert torch.allclose(distance, truth.amin(1).square().float(), atol=1e-6)


def bad_calls():
    x, p = torch.zeros(1, 4, 6, 8), torch.zeros(2, 3, 5)
    drafts, u, e = torch.zeros(2, 2, dtype=torch.long), torch.zeros(2, 2), torch.zeros(2, 5)
    a, d, s = kernels.attention, kernels.decode_attention, kernels.sample
    yield "not one dtype", lambda: a(x, x.double(), x.double())
    yield "Hkv divides H", lambda: a(x, x[:, :3], x[:, :3])
    yield "must be (B, H, N, D)", lambda: a(x, x, x[..., :4])
    yield "must be (B, H, N, D)", lambda: a(x, x[..., :4], x[..., :4])
    yield "none empty", lambda: a(x[:, :, :0], x, x)
    yield "must be (B, H, N, D)", lambda: a(x[0], x[0], x[0])
    yield "mask causal is (5, 5)", lambda: a(x, x, x, kernels.causal(5))
    yield "must come from causal()", lambda: a(x, x, x, torch.ones(6, 6, dtype=torch.bool))
    yield "must be positive", lambda: a(x, x, x, scale=-1.0)
    yield "pre-order", lambda: kernels.tree([-1, 0, 0, 1])
    yield "as many keys", lambda: kernels.causal(5, 3)
    yield "at least one token", lambda: kernels.scales([1, 0])
    yield "at least the token itself", lambda: kernels.window(3, 0)
    yield "from 1 (new) to 6 (places)", lambda: d(x[:, :, :1], x, x, 7)
    yield "of shape (1,)", lambda: d(x[:, :, :1], x, x, torch.tensor([1, 2]))
    yield "must be (.., N)", lambda: kernels.scan_attention(torch.zeros(2, 3), torch.zeros(2, 4, 5))
    yield "must not be negative", lambda: s(p, -1.0)
    yield "top_k -1", lambda: s(p, top_k=-1)
    yield "top_p 0", lambda: s(p, top_p=0)
    yield "noise must be", lambda: s(p, noise=torch.zeros(5))
    yield "uniforms is (2, 3)", lambda: kernels.verify(p, p[:, :2], drafts, torch.zeros(2, 3), e)
    yield "must be (batch, gamma)", lambda: kernels.verify(p, p[:, :2], drafts[0], u, e)
    yield "must be (N, D) and (K, D)", lambda: kernels.nearest_code(torch.zeros(3, 4), torch.zeros(3, 5))
    yield "K at least 1", lambda: kernels.nearest_code(torch.zeros(3, 4), torch.zeros(0, 4))
    yield '"auto", "reference"', lambda: kernels.use("fast")


def test_user_errors_are_one_readable_line():
    for message, call in bad_calls():
        with pytest.raises(ValueError) as error:
            call()
        assert message in str(error.value) and "\n" not in str(error.value)


def test_docstring_examples_hold():
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for example in doctest.DocTestFinder().find(kernels, globs=vars(kernels)):
        runner.run(example)
    assert runner.summarize().failed == 0 and runner.summarize().attempted >= 13


def test_use_and_path():
    x = torch.zeros(1)
    assert kernels.path(x) == ("reference", "Triton is not installed" if kernels.triton is None else "tensor on cpu")
    with kernels.use("reference"):
        assert kernels.path(x).reason.startswith("chosen by")
    assert kernels.use.choice == "auto"
    if not kernels.interpreting():
        with kernels.use("triton"), pytest.raises(ValueError, match="move it to a GPU"):
            kernels.path(x)


def test_masks_stay_on_the_cpu_whatever_the_default_device():
    with torch.device("meta"):
        mask = kernels.window(37, 6)
        by_queries, dense = mask.tiles(16, 16)[0], mask.dense()
    assert {x.device.type for x in (mask.row_start, mask.row_end, mask.col_end, dense, by_queries)} == {"cpu"}


def test_import_is_silent_and_works_without_triton(tmp_path):
    (tmp_path / "triton.py").write_text("raise ImportError('not for this platform')", encoding="utf-8")
    code = (
        "import kernels, torch; assert kernels.triton is None and not torch.cuda.is_initialized();"
        "x = torch.randn(1, 2, 5, 8); assert kernels.path(x).reason.startswith('chosen by');"
        "kernels.attention(x, x, x, kernels.causal(5)); kernels.sample(x); kernels.nearest_code(x[0, 0], x[0, 1])"
    )
    path = os.pathsep.join([str(tmp_path), os.path.dirname(kernels.__file__)])
    env = {**os.environ, "PYTHONPATH": path, "NANO_KERNELS": "reference"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "" and done.stderr == "", done.stderr


# --- 2. the kernels: interpreted, or on a GPU -------------------------------------------------------------------------


@pytest.fixture
def triton_path():
    """The kernels run, and torch.empty gives NaN or the largest integer: what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    with kernels.use("triton"):
        yield
    torch.use_deterministic_algorithms(False)


def same_tokens(ours, truth):
    """Equal; on a GPU all but one in fifty, as its powers and quotients are rounded otherwise."""
    return float((ours == truth).double().mean()) >= (0.98 if GPU else 1.0)


@needs_kernels
@pytest.mark.parametrize("n", [1, 2, 17, 64, 127, 128, 129])
def test_causal_kernel_at_every_length(n, triton_path):
    assert attention_error(kernels.causal(n), batch=1) < EXACT


@needs_kernels
@every_mask
def test_kernel_with_every_mask(mask, triton_path):
    assert attention_error(mask, heads=(2, 1)) < EXACT


@needs_kernels
@pytest.mark.parametrize("size, dtype, bound", [
    (24, torch.float32, EXACT), (5, torch.float32, EXACT), (128, torch.float32, EXACT),
    (16, torch.bfloat16, 2e-2), (64, torch.bfloat16, 2e-2), (128, torch.bfloat16, 2e-2), (64, torch.float16, 4e-3),
])  # fmt: skip
def test_kernel_head_sizes_and_dtypes(size, dtype, bound, triton_path):
    assert attention_error(kernels.window(49, 20), heads=(3, 3), size=size, dtype=dtype, scale=0.2, batch=1) < bound


@needs_kernels
def test_a_second_derivative_is_refused_not_silently_zero(triton_path):
    x = torch.randn(1, 1, 3, 16, device=DEVICE, requires_grad=True)
    (first,) = torch.autograd.grad(kernels.attention(x, x, x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@needs_kernels
def test_expanded_gradient(triton_path):
    """.sum() hands back a gradient with stride 0: one number, repeated."""
    x = [torch.randn(1, 2, 17, 16, device=DEVICE).requires_grad_() for _ in range(3)]
    double = [t.detach().double().requires_grad_() for t in x]
    ours = torch.autograd.grad(kernels.attention(*x, kernels.causal(17)).sum(), x)
    truth = torch.autograd.grad(kernels.attention_reference(*double, kernels.causal(17))[0].sum(), double)
    assert all(relative(a, b) < EXACT for a, b in zip(ours, truth))


@needs_kernels
def test_scores_that_would_overflow(triton_path):
    """Scores up to some 500, where e^88 is the largest float32, and sums that start at one maximum and end at another."""
    q, k, v = (torch.randn(1, 2, 100, 16, device=DEVICE) for _ in range(3))
    truth, lse = kernels.attention_reference(q.double(), k.double(), v.double(), kernels.causal(100), 30.0)
    ours = kernels.attention(q, k, v, kernels.causal(100), 30.0)
    assert lse.max() > 300 and relative(ours, truth) < 100 * EXACT


@needs_kernels
@pytest.mark.parametrize("heads, rows, size, cache, length, causal", [
    ((4, 2), 1, 16, 100, [100, 37], True), ((2, 2), 5, 24, 130, 129, True), ((4, 1), 3, 16, 70, [3, 17], False),
    ((2, 2), 1, 16, 40, 1, True), ((2, 1), 3, 16, 700, [2, 640], True), ((2, 1), 65, 16, 99, 80, True),
    ((2, 2), 32, 32, 85, 85, False), ((2, 2), 64, 32, 85, 85, False),
])  # fmt: skip
def test_decode_kernel(heads, rows, size, cache, length, causal, triton_path):
    q, k, v = (scattered(2, h, n, size) for h, n in zip((heads[0], heads[1], heads[1]), (rows, cache, cache)))
    last = int(torch.as_tensor(length).max())
    k[:, :, last:], v[:, :, last:] = math.nan, math.nan         # what lies beyond the filled part must not be touched
    length = length if isinstance(length, int) else torch.tensor(length, device=DEVICE)
    truth = kernels.decode_reference(*(t.nan_to_num().double() for t in (q, k, v)), length, causal=causal)
    assert relative(kernels.decode_attention(q, k, v, length, causal=causal), truth) < EXACT


@needs_kernels
def test_decoding_has_a_gradient(triton_path):
    q, k, v = (scattered(1, 2, n, 16).requires_grad_() for n in (3, 20, 20))
    ours = torch.autograd.grad(kernels.decode_attention(q, k, v, 17).square().sum(), (q, k, v))
    double = [t.detach().double().requires_grad_() for t in (q, k, v)]
    truth = torch.autograd.grad(kernels.decode_reference(*double, 17).square().sum(), double)
    assert all(relative(a, b) < EXACT for a, b in zip(ours, truth))


@needs_kernels
def test_decode_kernel_reads_nothing_beyond_the_cache(triton_path):
    q, cache = torch.randn(2, 2, 1, 16, device=DEVICE), torch.randn(2, 2, 40, 16, device=DEVICE)
    ours = kernels.decode_attention(q, cache, cache, torch.tensor([40, 64]))        # 64 do not fit: taken as 40
    assert relative(ours, kernels.decode_reference(q.double(), cache.double(), cache.double(), 40)) < EXACT


@needs_kernels
@pytest.mark.parametrize("n, size", [(1, 16), (2, 3), (17, 16), (64, 5), (129, 4)])
def test_scan_kernel(n, size, triton_path):
    s, v = 3 * scattered(2, n), scattered(2, n, size)
    s[0, 0] = -math.inf                                         # a prefix that sees nothing is zero
    out, state = kernels.scan_attention(s, v, return_state=True)
    assert relative(out, kernels.scan_reference(s.double(), v.double()).nan_to_num()) < EXACT
    truth = kernels.finish(kernels.summarize(s[:, None].double(), v.double()))
    assert relative(kernels.finish(state)[0].nan_to_num(), truth[0][:, 0].nan_to_num()) < EXACT
    assert relative(kernels.finish(state)[1].exp(), truth[1][:, 0].exp()) < EXACT
    if n == 17:
        _, state = kernels.scan_attention(s[:, :5], v[:, :5], return_state=True)
        assert relative(kernels.scan_attention(s[:, 5:], v[:, 5:], state), out[:, 5:].double()) < EXACT
        assert kernels.scan_attention(s, v.requires_grad_()).requires_grad      # by the torch path


@needs_kernels
@pytest.mark.parametrize("V", [1, 2, 17, 129, 1000])
@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (3, 1.0), (0, 0.7), (20, 0.5)])
def test_sample_kernel_draws_the_tokens_of_the_reference(V, top_k, top_p, triton_path):
    rows = 1000 if GPU else 6       # the interpreter takes them one by one
    logits, noise = 3 * scattered(rows, V), torch.empty(rows, V, device=DEVICE).exponential_()
    logits[0, :V // 2] = logits[0, V - 1]                       # ties
    logits[1, V // 2 + 1:] = -math.inf
    logits[2] = -logits[2].abs() - 50
    ours = kernels.sample(logits, 0.7, top_k, top_p, noise=noise)
    truth = kernels.sample_reference(logits, 0.7, top_k, top_p, noise)
    assert same_tokens(ours, truth) and ours.dtype == torch.int64


@needs_kernels
def test_sample_kernel_tells_close_logits_apart(triton_path):
    logits, noise = torch.arange(100, device=DEVICE)[None] * 1e-6, torch.ones(1, 100, device=DEVICE)
    noise[0, 94] = 0.01                                         # the sixth likeliest would win, but five are kept
    assert kernels.sample(logits, 1.0, 5, noise=noise).tolist() == [99]


@needs_kernels
@pytest.mark.filterwarnings("ignore:invalid value")
def test_sample_kernel_stays_inside_the_row_whatever_the_logits(triton_path):
    logits = torch.full((3, 17), -math.inf, device=DEVICE)
    logits[0], logits[1, ::2] = math.nan, 1.0
    logits[1, 1::2] = math.nan
    for top_k, top_p in ((0, 1.0), (3, 0.7)):
        tokens = kernels.sample(logits, 1.0, top_k, top_p)
        assert (tokens < 17).all() and tokens[1] % 2 == 0


@needs_kernels
@pytest.mark.parametrize("rows, g, V", [(8, 4, 97), (4, 0, 17), (3, 3, 5000), (8, 1, 2), (2, 20, 5)])
def test_verify_kernel_equals_the_reference(rows, g, V, triton_path):
    args = drafted(rows, g, V, DEVICE)
    ours, truth = kernels.verify(*args), kernels.verify_reference(*args)
    assert same_tokens(ours[0], truth[0]) and same_tokens(ours[1], truth[1])


@needs_kernels
def test_verify_kernel_falls_back_to_the_target_when_the_residual_is_empty(triton_path):
    p, _, drafts, uniforms, noise = drafted(4, 2, 11, DEVICE)
    args = p, p[:, :2], drafts, uniforms + 1, noise             # u >= 1 refuses although p == q
    ours, truth = kernels.verify(*args), kernels.verify_reference(*args)
    assert same_tokens(ours[0], truth[0]) and (ours[1] == 0).all() and (ours[0][:, 0] >= 0).all()


@needs_kernels
def test_verify_kernel_refuses_a_draft_that_does_not_exist(triton_path):
    p, q, drafts, uniforms, noise = drafted(4, 2, 11, DEVICE)
    drafts[:2, 0], drafts[2, 1], uniforms = -1, 11, uniforms * 0
    tokens, n = kernels.verify(p, q, drafts, uniforms, noise)
    assert n.tolist() == [0, 0, 1, 2] and ((0 <= tokens) | (tokens == -1)).all() and (tokens < 11).all()


@needs_kernels
def test_what_kernels_do_not_support_is_refused(triton_path):
    a = kernels.attention
    wide, double = torch.zeros(1, 1, 4, 160), torch.zeros(1, 1, 4, 16, dtype=torch.double)
    for message, call in (
        ("no kernel for head size 160", lambda: a(*[wide.to(DEVICE)] * 3)),
        ("no kernel for torch.float64", lambda: a(*[double.to(DEVICE)] * 3)),
        ("take at most 32768", lambda: kernels.sample(torch.zeros(1, 40000, device=DEVICE))),
        ("head size 160", lambda: kernels.scan_attention(wide[..., 0].to(DEVICE), wide.to(DEVICE))),
    ):
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

    reports, real = [], JITFunction.run

    def run(self, *args, grid, warmup, **kwargs):
        binary = real(self, *args, grid=grid, warmup=True, **kwargs)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary.asm["cubin"])
            file.flush()
            command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
            usage = subprocess.run(command, capture_output=True, text=True).stdout
        registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
        products = len(re.findall(r"wgmma\.mma_async|\bmma\.sync|tcgen05\.mma", binary.asm["ptx"]))
        name = self.fn.__name__
        facts = {"kernel": name, "registers": registers, "stack": stack, "shared": binary.metadata.shared}
        facts["crashes"] = "m64n8k8" in binary.asm["ptx"]   # tf32 in pieces 8 wide: the likely cause of one on an H200
        reports.append({**facts, "products": products})

    triton.runtime.driver.set_active(Driver())
    JITFunction.run = run
    kernels.path = lambda x: kernels.Path("triton", "compiled only")
    kernels._capability = lambda x: (arch // 10, arch % 10)
    for mask, heads, size, dtype in (
        (kernels.causal(512), (2, 2), 64, torch.bfloat16), (kernels.scales([1, 15, 240]), (2, 2), 128, torch.bfloat16),
        (kernels.tree(range(-1, 129)), (4, 2), 32, torch.float16), (kernels.causal(1), (2, 2), 64, torch.float32),
    ):  # fmt: skip
        q = torch.zeros(1, heads[0], mask.shape[0], size, dtype=dtype, requires_grad=True)
        k = torch.zeros(1, heads[1], mask.shape[1], size, dtype=dtype, requires_grad=True)
        kernels.attention(q, k, k, mask).backward(q.detach())
    for rows, size, dtype in ((1, 64, torch.bfloat16), (8, 128, torch.float32), (16, 32, torch.float32)):
        cache = torch.zeros(2, 2, 512, size, dtype=dtype)
        kernels.decode_attention(torch.zeros(2, 8, rows, size, dtype=dtype), cache, cache, 100)
    kernels.scan_attention(torch.zeros(4, 100), torch.zeros(4, 100, 64))
    for V in (1, 32768):
        kernels.sample(torch.zeros(4, V), 1.0, 50, 0.9)
    p, drafts = torch.zeros(4, 5, 999), torch.zeros(4, 4, dtype=torch.long)
    kernels.verify(p, p[:, :4], drafts, torch.zeros(4, 4), p[:, 0])
    return reports


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Reports of `compile_all` for both architectures; in processes of their own, because this one interprets."""
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    how = {"env": env, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    runs = {arch: subprocess.Popen([sys.executable, __file__, str(arch)], **how) for arch in (80, 90)}
    reports = {}
    for arch, run in runs.items():
        stdout, stderr = run.communicate()
        assert run.returncode == 0, stderr[-3000:]
        reports[arch] = json.loads(stdout.splitlines()[-1])
    return reports


@pytest.mark.skipif(kernels.triton is None or sys.platform != "linux", reason="ptxas comes with triton on Linux only")
@pytest.mark.parametrize("arch, shared", [(80, 99 * 1024), (90, 227 * 1024)])
def test_every_launch_compiles_and_fits_the_device(arch, shared, compiled):
    reports = compiled[arch]
    names = [r["kernel"] for r in reports]
    assert {name: names.count(name) for name in names} == {
        "_attention_forward": 5, "_attention_dq": 4, "_attention_dkv": 4, "_decode_chunks": 2, "_decode_merge": 2,
        "_scan_prefixes": 1, "_sample": 2, "_verify": 1}  # fmt: skip
    for r in reports:
        assert r["shared"] <= shared, f"more shared memory than sm_{arch} has: {r}"
        assert not r["crashes"], f"multiplies float32 in pieces 8 wide: {r}"
        if r["kernel"].startswith("_attention") or r["kernel"] == "_decode_chunks":
            assert r["products"] > 0, f"products not on the tensor cores: {r}"


if __name__ == "__main__":
    print(json.dumps(compile_all(int(sys.argv[1]))))
