"""Checks of lesson 60. Oracles: float64 softmax, scores that notice how they are read, masks pair by pair, torch's autograd."""

import math

import torch

import kernels
from lessons.checks import Skip, close, exercise, need


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def softmax_rows(s):
    """Softmax in float64; a row that sees nothing has no weights at all."""
    return torch.softmax(s.double(), -1).nan_to_num(0.0)


COPIES = "split", "chunk", "unbind", "narrow", "select", "float", "double", "to", "clone", "contiguous", "detach", "__get__"


def streamed(online, s, v, tile):
    """Call `online` with scores that notice how they are read: a part at a time, and never back to earlier keys."""
    last = {}

    class Scores(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            out, name = super().__torch_function__(function, types, args, kwargs or {}), function.__name__
            if not isinstance(out, torch.Tensor) or not any(isinstance(x, cls) and x.shape == s.shape for x in args):
                return out
            if name == "__getitem__":
                row, key = divmod(out.storage_offset(), s.shape[1])
                need(key >= last.get(row, 0), f"after key {last.get(row, 0)} you read key {key} again: one pass, please")
                last[row] = key
            else:
                need(name in COPIES or name.startswith("new_"), f"{name} of all scores at once: read {tile} keys at a time")
            return out

    return online(s.as_subclass(Scores), v, tile).as_subclass(torch.Tensor)


def softmax_of_torch(s, v, tile):
    return torch.softmax(s, 1).nan_to_num(0.0) @ v


def two_passes(s, v, tile):
    """Right values: the maximum first, then the sums."""
    parts = range(0, s.shape[1], tile)
    m = torch.stack([s[:, j:j + tile].amax(1) for j in parts]).amax(0)
    m = torch.where(m == -math.inf, 0.0, m)[:, None]
    u = sum(torch.exp(s[:, j:j + tile] - m).sum(1) for j in parts)
    w = sum(torch.exp(s[:, j:j + tile] - m) @ v[j:j + tile] for j in parts)
    return w / torch.where(u == 0, 1.0, u)[:, None]


@exercise(
    ("all scores at once", softmax_of_torch),
    ("two passes", two_passes),
    ("the sum is not rescaled", "u = u * old + p.sum(1)", "u = u + p.sum(1)"),
    ("the output is not rescaled", "w = w * old[:, None] + p", "w = w + p"),
    ("the largest score of this tile alone", "torch.maximum(m, part.amax(1))", "part.amax(1)"),
    ("-inf minus -inf", "torch.where(m_new == -torch.inf, 0.0, m_new)", "m_new"),
    ("the last, shorter tile forgotten", "range(0, s.shape[1], tile)", "range(0, s.shape[1] - tile + 1, tile)"),
    ("the maximum starts at 0", "torch.full(s.shape[:1], -torch.inf)", "torch.zeros(s.shape[:1])"),
    ("0 / 0 where nothing is seen", "w / torch.where(u == 0, 1.0, u)[:, None]", "w / u[:, None]"),
    ("the maximum not kept", "        m = m_new\n", ""),
)
def check_online(online):
    for n, m, d, tile in ((1, 1, 1, 1), (3, 7, 2, 3), (5, 64, 16, 16), (4, 9, 3, 100)):
        s, v = 3 * normal(n, m), normal(m, d, seed=1)
        close(online(s, v, tile), (softmax_rows(s) @ v.double()), f"{m} keys in tiles of {tile}")
    falling, v = torch.tensor([[200.0, 199.0, 0.0, -200.0, -400.0]]), normal(5, 2)
    hint = "scores from 200 down to -400: the running maximum must never fall"
    close(online(falling, v, 2), softmax_rows(falling) @ v.double(), hint)
    low = falling - 500
    close(online(low, v, 2), softmax_rows(low) @ v.double(), "scores below -300: where does your maximum start?")
    hidden = normal(3, 6)
    hidden[0, :4], hidden[1] = -math.inf, -math.inf  # row 0 sees nothing in two tiles, row 1 nothing at all
    hint = "a row whose first tiles are all -inf, and one that sees nothing (wanted: 0)"
    close(online(hidden, v[[0, 1, 2, 3, 4, 0]], 2), softmax_rows(hidden) @ v[[0, 1, 2, 3, 4, 0]].double(), hint)
    s, v = normal(4, 9), normal(9, 2, seed=1)
    close(streamed(online, s, v, 3), softmax_rows(s) @ v.double(), "9 keys in tiles of 3")


@exercise(
    ("causal inside a scale", "end += [edges[k + 1]] * count", "end += list(range(edges[k] + 1, edges[k + 1] + 1))"),
    ("the own scale unseen", "edges[k + 1]] * count", "edges[k]] * count"),
    ("below zero the list wraps around", "edges[max(k - previous, 0)]", "edges[k - previous]"),
    ("one scale too many", "max(k - previous, 0)", "max(k - previous - 1, 0)"),
    ("one entry a scale", "end += [edges[k + 1]] * count", "end += [edges[k + 1]]"),
    ("the end included", "edges[k + 1]] * count", "edges[k + 1] - 1] * count"),
    ("scales counted, not tokens", "start += [edges[max(k - previous, 0)]] * count", "start += [max(k - previous, 0)] * count"),
)
def check_intervals(intervals):
    for counts, previous in (([1], 0), ([1, 2, 1], 1), ([1, 2, 1], 3), ([1, 2, 1], 0), ([1, 4, 9, 16], 1), ([3, 1, 2, 5, 2], 2)):
        scale = []
        for k, count in enumerate(counts):
            scale += [k] * count
        start, end = intervals(counts, previous)
        n, case = len(scale), f"counts {counts}, previous {previous}"
        need(len(start) == len(end) == n, f"{case}: one start and one end for each of the {n} tokens")
        for i in range(n):
            seen = [j for j in range(n) if scale[i] - previous <= scale[j] <= scale[i]]
            ours = list(range(start[i], end[i]))
            need(ours == seen, f"{case}: token {i} of scale {scale[i]} sees {ours}, wanted {seen}")


@exercise(
    ("every row must see something", "min(s) < j + block_n", "max(s) < j + block_n"),
    ("some row for every row", "max(s) <= j", "min(s) <= j"),
    ("the longest row speaks for all", "min(e) >= j + block_n", "max(e) >= j + block_n"),
    ("one tile too many", "max(e) > j", "max(e) >= j"),
    ("a tile seen whole counts as partly", "min(e) >= j + block_n", "min(e) > j + block_n"),
    ("only the end looked at", "max(s) <= j and ", ""),
    ("juts out of the matrix", " and len(s) == block_m", ""),
    ("the first row stands for its tile", "end[i:i + block_m]", "end[i:i + 1]"),
)
def check_tile_kinds(tile_kinds):
    cases = (
        ([0], [1], 1, 1, 1),
        ([0] * 4, [1, 2, 3, 4], 4, 2, 2),  # causal
        ([0] * 7, list(range(1, 8)), 7, 2, 3),
        ([0, 0, 1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6, 7, 8], 8, 2, 2),  # a window of two
        ([0] * 1 + [1] * 4 + [5] * 9, [1] * 1 + [5] * 4 + [14] * 9, 14, 4, 2),  # each scale alone
        ([0] * 6, [12] * 6, 12, 4, 4),  # everything, and a last tile of two rows
        ([4] * 8 + [0] * 8, [8] * 8 + [4] * 8, 16, 8, 4),
    )
    for start, end, m, block_m, block_n in cases:
        kinds = tile_kinds(start, end, m, block_m, block_n)
        rows, columns = -(-len(start) // block_m), -(-m // block_n)
        shape = (len(kinds), len(kinds[0]))
        need(shape == (rows, columns), f"{len(start)} x {m} in tiles of {block_m} x {block_n}: {shape} tiles, wanted {(rows, columns)}")
        for a in range(rows):
            for b in range(columns):
                pairs = []  # does query i see key j? A pair outside the matrix is seen by nobody
                for i in range(a * block_m, (a + 1) * block_m):
                    inside = i < len(start)
                    pairs += [inside and start[i] <= j < end[i] for j in range(b * block_n, (b + 1) * block_n)]
                wanted = 2 if all(pairs) else 1 if any(pairs) else 0
                where = f"tile ({a}, {b}) of {len(start)} x {m} in tiles of {block_m} x {block_n}"
                need(kinds[a][b] == wanted, f"{where} is {int(kinds[a][b])}, wanted {wanted}; the rows are {start}, {end}")


@kernels.jit
def _count(n, out):
    for _ in range(0, kernels.tl.load(n)):
        kernels.tl.store(out, kernels.tl.load(out) + 1)


def need_interpreter():
    if kernels.triton is None:
        raise Skip("it needs triton, which exists for Linux only")
    if not kernels.interpreting():
        raise Skip("it needs TRITON_INTERPRET=1 before triton is imported")
    try:
        _count[(1,)](torch.tensor([3]), torch.tensor([0]))
    except kernels.triton.runtime.errors.InterpreterError:
        raise Skip(f"triton {kernels.triton.__version__} cannot interpret a loop with this numpy: update triton")


@exercise(
    ("zeros beyond the row", 'other=float("-inf")', "other=0.0"),
    ("every program reads row 0", "x + row * N + j", "x + j"),
    ("the sum is not rescaled", "u * tl.exp(m - m_new) + ", "u + "),
    ("rescaled the wrong way round", "tl.exp(m - m_new)", "tl.exp(m_new - m)"),
    ("the maximum not added back", "m + tl.log(u)", "tl.log(u)"),
    ("the last tile forgotten", "range(0, N, BLOCK)", "range(0, N - BLOCK + 1, BLOCK)"),
    ("the largest score of this tile alone", "tl.maximum(m, tl.max(s, 0))", "tl.max(s, 0)"),
    ("base 2 and base e mixed", "tl.log(u)", "tl.log2(u)"),
)
def check_row_lse(row_lse):
    need_interpreter()
    for rows, n, block in ((1, 1, 16), (3, 37, 16), (2, 64, 32)):
        x, out = 4 * normal(rows, n) - 20, torch.full((rows,), math.nan)
        row_lse[(rows,)](x, out, n, BLOCK=block)
        close(out, torch.logsumexp(x.double(), 1), f"{rows} rows of {n} in tiles of {block}", 1e-4)
    x, out = torch.linspace(300, -300, 40)[None], torch.zeros(1)
    row_lse[(1,)](x, out, 40, BLOCK=16)
    close(out, torch.logsumexp(x.double(), 1), "scores falling from 300 to -300", 1e-4)


@exercise(
    ("the mask transposed", "j[None, :] <= i[:, None]", "j[None, :] >= i[:, None]"),
    ("no token sees itself", "j[None, :] <= i[:, None]", "j[None, :] < i[:, None]"),
    ("the scale forgotten", " * scale", ""),
    ("the diagonal tile left out", "range(0, first + BLOCK, BLOCK)", "range(0, tl.maximum(first, 1), BLOCK)"),
    ("the output is not rescaled", "w = w * old[:, None] + ", "w = w + "),
    ("the sum is not rescaled", "u = u * old + ", "u = u + "),
    ("summed over the queries", "tl.sum(p, 1)", "tl.sum(p, 0)"),
    ("rows beyond N written", "w / u[:, None], mask=i[:, None] < N)", "w / u[:, None])"),
    ("never divided", "w / u[:, None]", "w"),
)
def check_flash(flash):
    need_interpreter()
    for n, block in ((1, 16), (16, 16), (37, 16)):
        q, k, v = 2 * normal(n, 16), 2 * normal(n, 16, seed=1), normal(n, 16, seed=2)
        out = torch.full((n + block, 16), 7.0)  # more room than the kernel may touch
        flash[(-(-n // block),)](q, k, v, out, n, 0.25, D=16, BLOCK=block)
        scores = (q.double() @ k.double().T / 4).masked_fill(torch.ones(n, n).triu(1) > 0, -math.inf)
        close(out[:n], torch.softmax(scores, -1) @ v.double(), f"{n} tokens in tiles of {block}", 1e-4)
        need(bool((out[n:] == 7).all()), f"{n} tokens: rows beyond the {n}th were written; mask the store")


@exercise(
    ("delta forgotten", "p * (dp - delta)", "p * dp"),
    ("delta from dp alone", "(do * o).sum(-1, keepdim=True)", "dp.sum(-1, keepdim=True)"),
    ("the weights forgotten", "ds = p * (dp - delta)", "ds = dp - delta"),
    ("hidden keys get a gradient", ".masked_fill(~seen, 0.0)", ""),
    ("no scale in dk", "scale * ds.mT @ q", "ds.mT @ q"),
    ("no scale in dq", "scale * ds @ k", "ds @ k"),
    ("dv from the scores' gradient", "dv = p.mT @ do", "dv = (p * (do @ v.mT)).mT @ do"),
    ("the scale missing when p is recomputed", "(q @ k.mT) * scale", "q @ k.mT"),
)
def check_backward(backward):
    for batch, heads, n, m, d in ((1, 1, 1, 1, 2), (2, 3, 5, 7, 4), (1, 2, 33, 33, 16)):
        q, k, v, do = (normal(batch, heads, rows, d, seed=s).double() for s, rows in enumerate((n, m, m, n)))
        x = [t.requires_grad_() for t in (q, k, v)]
        seen, scale = torch.ones(n, m).tril(m - n) > 0, 0.3
        scores = (q @ k.mT * scale).masked_fill(~seen, -math.inf)
        o = torch.softmax(scores, -1) @ v
        truth = torch.autograd.grad(o, x, do)
        q, k, v, o, lse = (t.detach() for t in (q, k, v, o, torch.logsumexp(scores, -1)))
        ours = backward(q, k, v, o, lse, do, seen, scale)
        need(isinstance(ours, tuple) and len(ours) == 3, "return the three gradients dq, dk, dv")
        for name, a, b in zip(("dq", "dk", "dv"), ours, truth):
            close(a, b, f"{name} for {n} queries and {m} keys", 1e-8)
