"""kernels: attention and sampling in Triton, each op beside the plain torch that it must equal.

    attention          one kernel for every mask of the course: causal, next-scale, Markov, window, tree, padding
    decode_attention   a few new queries against a long KV cache, split over the keys
    scan_attention     "Attention as an RNN": the attention output of every prefix, streaming or all at once
    sample             temperature, top-k, top-p and the draw in one pass over the logits
    verify             speculative sampling: accept, resample or bonus for a batch of drafted chains
    nearest_code       argmin_k |x - c_k|^2 without the matrix of distances

One idea carries the first three. Seen from one query, a set of keys is summed up by three numbers: m, its largest
score; u, the sum of e^(s-m); w, the sum of e^(s-m) v. The summaries of two disjoint sets merge into the summary of
their union, and attention is w / u of all keys:

    flash attention      ((tile 0 + tile 1) + tile 2) + ...           a fold: one program walks over its queries' keys
    split-K decoding     (chunk 0 + chunk 1) + (chunk 2 + chunk 3)    a tree: many programs share one query
    attention as an RNN  k0,  k0 + k1,  k0 + k1 + k2,  ...            a scan: every prefix is an answer

CPU tensors take the torch path, CUDA tensors the kernel; `use("reference")` or `use("triton")` overrides that, and
`path(tensor)` says which runs and why. Nothing here needs a GPU, or Triton, to be imported. What a kernel does not
support is a ValueError that says what to do.

    python kernels.py                      errors of every op against float64; on a GPU also times, beside torch's own
    python kernels.py --plot kernels.png   the same, drawn
    pytest tests/test_kernels.py           the kernels without a GPU: interpreted, and compiled for sm_80 and sm_90

Each op in the same order: torch reference with its memory traffic, kernel, wrapper with checks, numerics and limits.
Read `merge`, then `_fold`. Papers: online softmax (1805.02867), FlashAttention (2205.14135, 2307.08691), Flash-Decoding
(Dao et al. 2023), Attention as an RNN (2405.13956), VAR (2404.02905), SpecInfer (2305.09781), speculative sampling
(2211.17192, 2302.01318). Left out on purpose: dropout, paged caches, fp8; tensor descriptors and warp specialisation
(faster on Hopper, but hard to read).
"""

import argparse
import functools
import itertools
import math
import os
from collections import namedtuple
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
import torch.nn.functional as F

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # a * b + c in one instruction; Triton 3.9 warns if unsaid
try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:  # macOS, Windows: every op still runs, by its torch path
    triton, jit, tl = None, lambda fn: fn, SimpleNamespace(constexpr=None)

INF, LOG2_E, LN_2 = float("inf"), math.log2(math.e), math.log(2)


def _check(ok, message):
    if not ok:
        raise ValueError(message)


# --- the merge operator -----------------------------------------------------------------------------------------------


def summarize(scores, values):
    """Summary (m, u, w) of a set of keys: scores (.., N, M), values (.., M, D) -> (.., N), (.., N), (.., N, D).

    >>> summarize(torch.tensor([[0., 0.]]), torch.tensor([[1.], [3.]]))      # largest score 0; e^0 + e^0; 1 e^0 + 3 e^0
    (tensor([0.]), tensor([2.]), tensor([[4.]]))
    """
    m = scores.detach().amax(-1)  # only a shift: it cancels in w / u, so no gradient has to pass
    p = torch.exp(scores - _finite(m)[..., None])
    return m, p.sum(-1), p @ values


def merge(a, b):
    """Summary of the union of two disjoint sets. Associative and commutative; (-inf, 0, 0), the empty set, is neutral.

    (m, u, w) + (m', u', w') = (M, u e^(m-M) + u' e^(m'-M), w e^(m-M) + w' e^(m'-M)),   M = max(m, m')
    """
    (m1, u1, w1), (m2, u2, w2) = a, b
    m = torch.maximum(m1.detach(), m2.detach())
    x, y = torch.exp(m1 - _finite(m)), torch.exp(m2 - _finite(m))
    return m, u1 * x + u2 * y, w1 * x[..., None] + w2 * y[..., None]


def finish(state):
    """Output w / u and log-sum-exp m + log u; for the empty set 0 and -inf."""
    m, u, w = state
    return w / torch.where(u == 0, 1.0, u)[..., None], m + u.log()


def _finite(m):
    return torch.where(m == -INF, 0.0, m)  # -inf - -inf would be nan; with 0 an empty set weighs e^-inf = 0


@jit
def _merge(m1, u1, w1, m2, u2, w2):
    """`merge` in a kernel. Scores are in base 2 there (times log2 e): exp2 is the instruction that the hardware has."""
    m = tl.maximum(m1, m2)
    shift = tl.where(m == float("-inf"), 0.0, m)
    x, y = tl.exp2(m1 - shift), tl.exp2(m2 - shift)
    return m, u1 * x + u2 * y, w1 * x + w2 * y


# --- masks: every mask of the course is three lists of integers -------------------------------------------------------

Rule = namedtuple("Rule", "start end col bounds per_sample")  # a mask inside a kernel; per_sample 0: one for the batch
_arange = functools.partial(torch.arange, device="cpu")  # masks are built on the CPU, whatever the default device


@dataclass(frozen=True, eq=False)
class Mask:
    """Query i sees key j  iff  row_start[i] <= j < row_end[i]  and  i < col_end[j].

    row_start, row_end (1 or B, N), col_end (1 or B, M): int32, on the CPU. O(N + M) numbers instead of N x M, and
    comparing a few tells whether a whole tile is empty or full. `a & b` intersects. Build once, use in every layer.
    """

    row_start: torch.Tensor
    row_end: torch.Tensor
    col_end: torch.Tensor
    name: str = "mask"
    cache: dict = field(default_factory=dict, repr=False)  # what is derived from it, by device

    @property
    def shape(self):
        return self.row_start.shape[-1], self.col_end.shape[-1]

    @property
    def batch(self):
        return max(len(self.row_start), len(self.col_end))

    def __and__(self, other):
        _check(self.shape == other.shape, f"cannot intersect masks of shapes {self.shape} and {other.shape}")
        start, end = torch.maximum(self.row_start, other.row_start), torch.minimum(self.row_end, other.row_end)
        return Mask(start, end, torch.minimum(self.col_end, other.col_end), f"{self.name} & {other.name}")

    def cached(self, make, *key):
        if key not in self.cache:
            self.cache[key] = make()
        return self.cache[key]

    def dense(self, device="cpu"):
        """Boolean (1 or B, 1, N, M), True where query i sees key j."""

        def make():
            i, j = _arange(self.shape[0])[:, None], _arange(self.shape[1])
            seen = (self.row_start[..., None] <= j) & (j < self.row_end[..., None]) & (i < self.col_end[:, None])
            return seen[:, None].to(device)

        return self.cached(make, "dense", str(device))

    def draw(self):
        """Text picture, `#` where a query (row) sees a key (column); one per sample."""
        return "\n\n".join("\n".join("".join(".#"[x] for x in row) for row in one[0].tolist()) for one in self.dense())

    def tiles(self, block_m, block_n):
        """Which tiles a kernel visits, per query tile and per key tile: (bounds (1 or B, tiles, 4), first, last).

        bounds lo <= full_lo <= full_hi <= hi: tiles within full_lo..full_hi are seen whole, those before and after
        partly, others not at all. first, last: which of these three runs occur anywhere.
        causal(8).tiles(2, 2): the queries 4, 5 have [0, 0, 4, 6]: keys 0..3 need no mask, 4..5 do, 6..7 are not read.
        """
        (n, m), (start, end, col) = self.shape, (self.row_start, self.row_end, self.col_end)
        (start_min, start_max), (end_min, end_max) = _extremes(start, block_m), _extremes(end, block_m)
        col_min, col_max = (x[:, None] for x in _extremes(col, block_n))
        i0, j0 = _arange(0, n, block_m)[:, None], _arange(0, m, block_n)
        i1, j1 = i0 + block_m, j0 + block_n
        some = (start_min[..., None] < j1) & (end_max[..., None] > j0) & (col_max > i0)
        whole = (start_max[..., None] <= j0) & (end_min[..., None] >= j1) & (col_min >= i1) & (i1 <= n) & (j1 <= m)
        return _runs(some, whole, block_n), _runs(some.mT, whole.mT, block_m)

    def rule(self, device, block_m, block_n, by_keys):
        """The mask as kernels take it, `first` and `last` of `tiles`, and whether col_end hides anything at all."""

        def make():
            lists = (x.expand(self.batch, -1).contiguous() for x in (self.row_start, self.row_end, self.col_end))
            bounds, first, last = self.tiles(block_m, block_n)[by_keys]
            rule = Rule(*(x.to(device) for x in (*lists, bounds)), int(self.batch > 1))
            return rule, first, last, bool((self.col_end < self.shape[0]).any())

        return self.cached(make, "rule", str(device), block_m, block_n, by_keys)


def _extremes(x, block):
    """Smallest and largest entry of each block of x (.., n), the last of which may be shorter -> two (.., blocks)."""
    low, high = (F.pad(x, (0, -x.shape[-1] % block), value=v).unflatten(-1, (-1, block)) for v in (2**31 - 1, -1))
    return low.amin(-1), high.amax(-1)


def _runs(some, whole, block):
    """Flags per tile (.., rows, tiles) -> what `Mask.tiles` returns. Whole tiles count up to the first gap."""
    tiles = some.shape[-1]
    t = _arange(tiles)
    hi = torch.where(some, t + 1, 0).amax(-1)
    lo = torch.where(some, t, tiles).amin(-1).minimum(hi)
    full_lo = torch.where(whole, t, tiles).amin(-1)
    full_hi = torch.where(~whole & (t > full_lo[..., None]), t, tiles).amin(-1)
    none = full_lo == tiles  # nothing whole: all goes to the run after, if others need it too, else to the one before
    place = lo if bool((~none & (full_hi < hi)).any()) else hi
    bounds = torch.stack([lo, torch.where(none, place, full_lo), torch.where(none, place, full_hi), hi], -1)
    occurs = [k for k in range(3) if bool((bounds[..., k] < bounds[..., k + 1]).any())] or [0]
    return (bounds * block).int(), occurs[0], occurs[-1] + 1


def _mask(name, start, end, m, col_end=None):
    """Row i sees start[i] <= j < end[i] of m keys; `end` may be a list for each sample."""
    lists = start, end, col_end or [len(start)] * m
    start, end, col_end = (torch.atleast_2d(torch.tensor(x, dtype=torch.int32, device="cpu")) for x in lists)
    return Mask(start.clamp(0, m).expand_as(end), end.clamp(0, m), col_end, name)


@functools.lru_cache(maxsize=256)
def full(n, m=None):
    """Everything: n queries see all m (default n) keys. The same as mask=None."""
    m = n if m is None else m
    return _mask("full", [0] * n, [m] * n, m)


@functools.lru_cache(maxsize=256)
def causal(n, m=None):
    """Every token sees itself and the past. With m > n keys the queries are the last n of m tokens (cached prefix).

    causal(4)  #...      causal(2, 5)  ####.
               ##..                    #####
               ###.
               ####
    """
    m = n if m is None else m
    _check(m >= n, f"causal({n}, {m}): needs at least as many keys as queries")
    return _mask("causal", [0] * n, list(range(m - n + 1, m + 1)), m)


@functools.lru_cache(maxsize=256)
def window(n, w):
    """Sliding window: every token sees itself and the w - 1 tokens before it.

    window(4, 2)  #...
                  ##..
                  .##.
                  ..##
    """
    _check(w >= 1, f"window({n}, {w}): the window must hold at least the token itself")
    return _mask("window", list(range(1 - w, n + 1 - w)), list(range(1, n + 1)), n)


def scales(counts):
    """Next-scale prediction (VAR): a token sees all tokens of its own and earlier scales. counts: tokens per scale.

    scales([1, 2, 1])  #...
                       ###.
                       ###.
                       ####
    """
    return _scales("scales", tuple(counts), len(counts))


def markov(counts, previous=0):
    """Scales with a short memory (HMAR, M-VAR): a token sees its own scale and `previous` scales before it.

    markov([1, 2, 1])  #...      markov([1, 2, 1], previous=1)  #...
                       .##.                                     ###.
                       .##.                                     ###.
                       ...#                                     .###
    """
    return _scales("markov", tuple(counts), previous)


@functools.lru_cache(maxsize=256)
def _scales(name, counts, previous):
    _check(counts and min(counts) > 0, f"{name}({list(counts)}): every scale needs a positive number of tokens")
    edges = [0, *itertools.accumulate(counts)]  # scale k holds the tokens edges[k] .. edges[k + 1]
    scale = [k for k, count in enumerate(counts) for _ in range(count)]
    return _mask(name, [edges[max(k - previous, 0)] for k in scale], [edges[k + 1] for k in scale], edges[-1])


def tree(parents, prefix=0):
    r"""Drafted tokens as a tree (SpecInfer): a node sees the prefix, its ancestors and itself.

    parents[i]: parent of node i, -1 for a root. Nodes are numbered depth first (pre-order), so that a subtree is a run
    of columns and the N x N mask is one integer per column.

    tree([-1, 0, 1, 0])    0       #...
                          / \      ##..
                         1   3     ###.
                         2         #..#
    """
    n, ancestors = len(parents), []
    end = list(range(1, n + 1))  # one past the subtree of each node
    for i, parent in enumerate(parents):
        while ancestors and ancestors[-1] != parent:
            ancestors.pop()
        follows = parent == -1 or ancestors
        _check(follows, f"tree: node {i} does not follow its parent {parent}; renumber the nodes in pre-order")
        ancestors.append(i)
        for node in ancestors:
            end[node] = i + 1
    return _mask("tree", [0] * n, list(range(prefix + 1, prefix + n + 1)), prefix + n, [n] * prefix + end)


def padding(lengths, n, m=None):
    """Ragged batch: sample b has lengths[b] real keys of m (default n). Combine: `causal(n) & padding(lengths, n)`.

    padding([2, 3], 3)  ##.   ###
                        ##.   ###
                        ##.   ###
    """
    lengths, m = torch.as_tensor(lengths, device="cpu").flatten().tolist(), n if m is None else m
    _check(max(lengths) <= m, f"padding: length {max(lengths)} exceeds the {m} keys")
    return _mask("padding", [0] * n, [[length] * n for length in lengths], m)


# --- attention --------------------------------------------------------------------------------------------------------


def attention_reference(q, k, v, mask=None, scale=None):
    """softmax(q k^T scale) v written out, in any float dtype. Returns output (B, H, N, D) and log-sum-exp (B, H, N).

    Traffic: writes and reads the N x M scores twice, 4 N M elements a head, where the kernel moves (2 N + 2 M) D:
    64 times less at N = M = 4096, D = 64. Rows that see nothing give 0 and -inf.
    """
    k, v = _share_heads(q, k), _share_heads(q, v)
    scores = (q @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask.dense(q.device), -INF)
    return finish(summarize(scores, v))


def _share_heads(q, k):
    return k if k.shape[1] == q.shape[1] else k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # grouped queries


def _attention_torch(q, k, v, mask, scale):
    """torch's fused attention: is_causal where it applies, else a dense mask. Its bf16 backward is slow on a CPU: there
    short 16-bit sequences are written out (at 64 tokens a third faster than float32), long ones cast to float32.
    """
    k, v, dtype, name = _share_heads(q, k), _share_heads(q, v), q.dtype, "full" if mask is None else mask.name
    if q.device.type == "cpu" and dtype in (torch.bfloat16, torch.float16):
        no_empty_rows = name in ("full", "causal", "scales", "markov")
        if no_empty_rows and 32**2 <= q.shape[2] * k.shape[2] <= 256**2:
            scores = (q * scale) @ k.mT
            if name != "full":
                scores = scores + mask.cached(lambda: mask.dense()[0, 0].to(dtype).log(), dtype)  # 0 or -inf
            return scores.softmax(-1) @ v  # softmax sums in float32 whatever the dtype
        q, k, v = q.float(), k.float(), v.float()
    lower = name == "causal" and q.shape[2] == k.shape[2]
    dense = None if lower or name == "full" else mask.dense(q.device)
    return F.scaled_dot_product_attention(q, k, v, dense, is_causal=lower, scale=scale).to(dtype)


View = namedtuple("View", "ptr batch head row dim")  # a (batch, head, row, dim) tensor in a kernel, with its strides
# What an attention kernel is compiled for: query heads a key head; head size D, and the power of two that holds it;
# queries and keys of a tile; how float32 is multiplied; has the mask column ends; which runs of tiles (`Mask.tiles`)
Consts = namedtuple("Consts", "GROUP D BLOCK_D BLOCK_M BLOCK_N PRECISION COLS FIRST LAST")


def _view(x):
    return View(x, *x.stride()) if x.dim() == 4 else x


@jit
def _load(x, b, h, rows, n, C, CHECK):
    """Tile of the given rows of head h of sample b; 0 outside its n x D matrix. CHECK False: the rows are inside."""
    d = tl.arange(0, C.BLOCK_D)
    at = x.ptr + b * x.batch + h * x.head + rows[:, None] * x.row + d[None, :] * x.dim
    if CHECK or C.BLOCK_D != C.D:
        return tl.load(at, mask=(rows[:, None] < n) & (d[None, :] < C.D), other=0.0)
    return tl.load(at)


@jit
def _store(x, tile, b, h, rows, n, C):
    d = tl.arange(0, C.BLOCK_D)
    at = x.ptr + b * x.batch + h * x.head + rows[:, None] * x.row + d[None, :] * x.dim
    tl.store(at, tile.to(x.ptr.dtype.element_ty), mask=(rows[:, None] < n) & (d[None, :] < C.D))


@jit
def _seen(i, start, end, j, col, C):
    """The mask of one tile, from integers; i, start, end broadcast against j, col."""
    seen = (start <= j) & (j < end)
    if C.COLS:
        seen = seen & (i < col)
    return seen


@jit
def _queries(rule, N, M, C):
    """What a program of the two query-wise kernels works on: sample, head, rows, their mask, their tile bounds."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the last rows see most under a causal mask: they start first
    h, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)  # batch x heads x rows x size exceeds 32 bits
    i, sample = tile * C.BLOCK_M + tl.arange(0, C.BLOCK_M), b * rule.per_sample
    start = tl.load(rule.start + sample * N + i, mask=i < N, other=0)
    end = tl.load(rule.end + sample * N + i, mask=i < N, other=0)  # rows beyond N: start = end = 0, they see nothing
    bounds = rule.bounds + (sample * tl.num_programs(0) + tile) * 4
    return b, h, i, (i[:, None], start[:, None], end[:, None], rule.col + sample * M), bounds


@jit
def _fold(m, u, w, q, k, v, b, h, rows, lo, hi, M, scale, C, MASKED):
    """Merge the key tiles lo..hi into the summaries of a tile of queries. This loop is flash attention."""
    i, start, end, col = rows
    for j0 in range(lo, hi, C.BLOCK_N):
        j = j0 + tl.arange(0, C.BLOCK_N)
        s = tl.dot(q, tl.trans(_load(k, b, h, j, M, C, MASKED)), input_precision=C.PRECISION)
        if MASKED:
            c = tl.load(col + j, mask=j < M, other=0) if C.COLS else j
            s = tl.where(_seen(i, start, end, j[None, :], c[None, :], C), s, float("-inf"))
        # `merge`, only that the tile's own u' = sum(p) and w' = p v come out relative to the common maximum at once
        m_new = tl.maximum(m, tl.max(s, 1) * scale)
        shift = tl.where(m_new == float("-inf"), 0.0, m_new) if MASKED else m_new
        p, old = tl.exp2(s * scale - shift[:, None]), tl.exp2(m - shift)
        values = _load(v, b, h, j, M, C, MASKED)
        w = tl.dot(p.to(values.dtype), values, w * old[:, None], input_precision=C.PRECISION)
        m, u = m_new, u * old + tl.sum(p, 1)
    return m, u, w


@jit
def _attention_forward(q, k, v, o, lse, rule, N, M, scale, C: tl.constexpr):
    """Grid (query tiles, heads, batch). scale holds log2 e."""
    b, h, i, rows, bounds = _queries(rule, N, M, C)
    queries = _load(q, b, h, i, N, C, True)
    # 1. the empty summary
    m, u = tl.full(i.shape, float("-inf"), tl.float32), tl.zeros(i.shape, tl.float32)
    w = tl.zeros(queries.shape, tl.float32)
    # 2. all key tiles that somebody sees: a partly masked run, a whole one without any comparison, a partly masked one
    for run in tl.static_range(C.FIRST, C.LAST):
        lo, hi = tl.load(bounds + run), tl.load(bounds + run + 1)
        m, u, w = _fold(m, u, w, queries, k, v, b, h // C.GROUP, rows, lo, hi, M, scale, C, run != 1)
    # 3. finish; a query that saw nothing has u = 0 and gives 0
    _store(o, w / tl.where(u == 0, 1.0, u)[:, None], b, h, i, N, C)
    tl.store(lse + (b * tl.num_programs(1) + h) * N + i, m + tl.log2(u), mask=i < N)  # in base 2, as backward wants it


@jit
def _attention_dq(q, k, v, o, do, dq, lse, delta, rule, N, M, scale, C: tl.constexpr):
    """Grid (query tiles, heads, batch). With p = e^(s - lse) recomputed, dp = do v^T and delta = rowsum(do o):
    ds = p (dp - delta), dq = scale ds k. Stores delta for _attention_dkv, which runs after it."""
    b, h, i, rows, bounds = _queries(rule, N, M, C)
    row, start, end, col = rows
    at = (b * tl.num_programs(1) + h) * N + i
    queries, grads, out = _load(q, b, h, i, N, C, True), _load(do, b, h, i, N, C, True), _load(o, b, h, i, N, C, True)
    rowsum = tl.sum(grads.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta + at, rowsum, mask=i < N)
    row_lse, acc = tl.load(lse + at, mask=i < N, other=0.0), tl.zeros(queries.shape, tl.float32)
    for run in tl.static_range(C.FIRST, C.LAST):
        for j0 in range(tl.load(bounds + run), tl.load(bounds + run + 1), C.BLOCK_N):
            j = j0 + tl.arange(0, C.BLOCK_N)
            keys = _load(k, b, h // C.GROUP, j, M, C, run != 1)
            p = tl.exp2(tl.dot(queries, tl.trans(keys), input_precision=C.PRECISION) * scale - row_lse[:, None])
            if run != 1:
                c = tl.load(col + j, mask=j < M, other=0) if C.COLS else j
                p = tl.where(_seen(row, start, end, j[None, :], c[None, :], C), p, 0.0)
            values = _load(v, b, h // C.GROUP, j, M, C, run != 1)
            ds = p * (tl.dot(grads, tl.trans(values), input_precision=C.PRECISION) - rowsum[:, None])
            acc = tl.dot(ds.to(keys.dtype), keys, acc, input_precision=C.PRECISION)
    _store(dq, acc * (scale * 0.6931471805599453), b, h, i, N, C)  # ln 2 takes the log2 e out of scale again


@jit
def _attention_dkv(q, k, v, do, dk, dv, lse, delta, rule, N, M, scale, C: tl.constexpr):
    """Grid (key tiles, key heads, batch). dv = p^T do, dk = scale ds^T q, summed here over the query heads of the
    group: no atomics, so the result does not depend on the order in which programs run."""
    tile, h, b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    j, sample = tile * C.BLOCK_N + tl.arange(0, C.BLOCK_N), b * rule.per_sample
    keys, values = _load(k, b, h, j, M, C, True), _load(v, b, h, j, M, C, True)
    col = tl.load(rule.col + sample * M + j, mask=j < M, other=0)[:, None]
    bounds = rule.bounds + (sample * tl.num_programs(0) + tile) * 4
    acc_k, acc_v = tl.zeros(keys.shape, tl.float32), tl.zeros(keys.shape, tl.float32)
    for g in range(C.GROUP):
        head = h * C.GROUP + g
        row = (b * tl.num_programs(1) * C.GROUP + head) * N
        for run in tl.static_range(C.FIRST, C.LAST):
            for i0 in range(tl.load(bounds + run), tl.load(bounds + run + 1), C.BLOCK_M):
                i = i0 + tl.arange(0, C.BLOCK_M)
                queries, row_lse = _load(q, b, head, i, N, C, run != 1), tl.load(lse + row + i, mask=i < N, other=0.0)
                s = tl.dot(keys, tl.trans(queries), input_precision=C.PRECISION)  # transposed: (keys, queries)
                p = tl.exp2(s * scale - row_lse[None, :])
                if run != 1:
                    start = tl.load(rule.start + sample * N + i, mask=i < N, other=0)[None, :]
                    end = tl.load(rule.end + sample * N + i, mask=i < N, other=0)[None, :]
                    p = tl.where(_seen(i[None, :], start, end, j[:, None], col, C), p, 0.0)
                grads, rowsum = _load(do, b, head, i, N, C, run != 1), tl.load(delta + row + i, mask=i < N, other=0.0)
                acc_v = tl.dot(p.to(grads.dtype), grads, acc_v, input_precision=C.PRECISION)
                ds = p * (tl.dot(values, tl.trans(grads), input_precision=C.PRECISION) - rowsum[None, :])
                acc_k = tl.dot(ds.to(queries.dtype), queries, acc_k, input_precision=C.PRECISION)
    _store(dk, acc_k * (scale * 0.6931471805599453), b, h, j, M, C)
    _store(dv, acc_v, b, h, j, M, C)


# (BLOCK_M, BLOCK_N, num_warps, num_stages) by head size, for 16-bit inputs. "sm_90" is Hopper, with 227 KB of shared
# memory; "sm_80" all others, the smallest of which have 99 KB. Chosen from compile reports, not by timing: no spills,
# and on Hopper wgmma in every product and two programs a multiprocessor at head size 64.
TILES = {
    ("forward", "sm_90"): {64: (128, 64, 8, 3), 128: (128, 64, 8, 3)},
    ("forward", "sm_80"): {64: (128, 64, 8, 3), 128: (128, 32, 8, 3)},
    ("dq", "sm_90"): {64: (128, 64, 8, 3), 128: (128, 64, 8, 2)},
    ("dq", "sm_80"): {64: (128, 64, 8, 2), 128: (128, 32, 8, 2)},
    ("dkv", "sm_90"): {64: (64, 128, 8, 2), 128: (32, 128, 8, 2)},
    ("dkv", "sm_80"): {64: (32, 128, 8, 2), 128: (64, 64, 8, 2)},
}


def _arch(x):
    if not x.is_cuda:
        return "interpreter"
    return "sm_90" if torch.cuda.get_device_capability(x.device)[0] == 9 else "sm_80"


def _tiles(kernel, q):
    if _arch(q) == "interpreter":
        return 64, 32, 4, 1
    if q.dtype == torch.float32:  # three tensor-core products for one, and twice the registers
        return 32, 32, 8, 2
    return TILES[kernel, _arch(q)][64 if q.shape[-1] <= 64 else 128]


def _padded(n):
    return max(16, 1 << (n - 1).bit_length())  # tl.arange wants a power of two, tl.dot at least 16


def _consts(q, k, block_m, block_n, cols=False, first=0, last=3):
    group, D, precision = q.shape[1] // k.shape[1], q.shape[-1], "tf32x3" if q.dtype == torch.float32 else "tf32"
    return Consts(*map(tl.constexpr, (group, D, _padded(D), block_m, block_n, precision, cols, first, last)))


def _launch(x, kernel, grid, *args, **constants):
    """Triton launches on the current device: make that the one of x."""
    _check(max(grid[1:], default=0) < 2**16, f"{kernel.__name__}: grid {grid}: split batch and heads below 65536 each")
    with torch.cuda.device_of(x):
        kernel[grid](*args, **constants)


def _launch_attention(kernel, name, q, k, v, *tensors, mask, scale):
    (B, H, N, _), (Hkv, M) = q.shape, k.shape[1:3]
    block_m, block_n, warps, stages = _tiles(name, q)
    rule, first, last, cols = mask.rule(q.device, block_m, block_n, name == "dkv")
    grid, tensors = (rule.bounds.shape[1], Hkv if name == "dkv" else H, B), [_view(x) for x in (q, k, v, *tensors)]
    consts = _consts(q, k, block_m, block_n, cols, first, last)
    _launch(q, kernel, grid, *tensors, rule, N, M, scale * LOG2_E, consts, num_warps=warps, num_stages=stages)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, mask, scale):
        o, lse = torch.empty_like(q), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        _launch_attention(_attention_forward, "forward", q, k, v, o, lse, mask=mask, scale=scale)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.how = {"mask": mask, "scale": scale}
        ctx.mark_non_differentiable(lse)
        return o, lse

    @staticmethod
    @torch.autograd.function.once_differentiable  # a second derivative is an error, not silently zero
    def backward(ctx, do, _):
        q, k, v, o, lse = ctx.saved_tensors
        dq, dk, dv, delta = (torch.empty_like(x) for x in (q, k, v, lse))
        _launch_attention(_attention_dq, "dq", q, k, v, o, do, dq, lse, delta, **ctx.how)
        _launch_attention(_attention_dkv, "dkv", q, k, v, do, dk, dv, lse, delta, **ctx.how)
        return dq, dk, dv, None, None


def attention(q, k, v, mask=None, scale=None, return_lse=False):
    """Masked attention with gradients. q (B, H, N, D), k and v (B, Hkv, M, D), Hkv divides H; mask: a Mask or None.

    Returns (B, H, N, D), and with return_lse the log-sum-exp of the scores (B, H, N): float32, without gradient.
    scale: D^-0.5 unless given. A row that sees no key gives 0 (and -inf). Under autocast the inputs are cast to its
    dtype, on a CPU to float32.
    Numerics: scores, softmax and sums in float32, the weights rounded to v's dtype before the second product; float32
    inputs are multiplied as three tf32 products.
    Kernel limits: float32, bf16, fp16; D <= 128, padded inside to a power of two; a head spans < 2^31 elements; at
    most 65535 samples and heads; no second derivatives.

    >>> x = torch.randn(1, 2, 5, 16)
    >>> torch.allclose(attention(x, x, x, causal(5))[:, :, 0], x[:, :, 0])          # the first token sees only itself
    True
    """
    device = q.device.type
    if torch.is_autocast_enabled(device):
        q, k, v = (x.to(torch.float32 if device == "cpu" else torch.get_autocast_dtype(device)) for x in (q, k, v))
    scale = _check_attention("attention", q, k, v, scale)
    (B, _, N, _), M = q.shape, k.shape[2]
    mask = full(N, M) if mask is None else mask
    _check(isinstance(mask, Mask), "attention: mask must come from causal(), scales(), ...; None is full attention")
    _check(mask.shape == (N, M), f"attention: mask {mask.name} is {mask.shape}, but there are {N} queries and {M} keys")
    _check(mask.batch in (1, B), f"attention: mask {mask.name} is for a batch of {mask.batch}, q holds {B}")
    with torch.autocast(device, enabled=False):
        if path(q).name == "triton":
            out, lse = _Attention.apply(*_for_kernel("attention", q, k, v), mask, scale)
            out, lse = out.to(q.dtype), lse * LN_2
        elif return_lse:
            out, lse = attention_reference(q, k, v, mask, scale)
        else:
            return _attention_torch(q, k, v, mask, scale)
    return (out, lse.detach().float()) if return_lse else out


def _check_attention(op, q, k, v, scale):
    Q, K, V = (tuple(x.shape) for x in (q, k, v))
    _check(q.dim() == k.dim() == v.dim() == 4, f"{op}: q {Q}, k {K}, v {V} must be (batch, heads, length, head size)")
    _check(K == V, f"{op}: k {K} and v {V} must have one shape; pad the smaller head size")
    _check(K[0] == Q[0] and K[3] == Q[3], f"{op}: q {Q} and k {K} must agree in batch and head size")
    _check(q.numel() > 0 and k.numel() > 0, f"{op}: q {Q} or k {K} is empty")
    _check(Q[1] % K[1] == 0, f"{op}: {Q[1]} query heads cannot share {K[1]} key heads; take a multiple of them")
    _check(q.dtype == k.dtype == v.dtype, f"{op}: q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; cast them to one dtype")
    _check(q.device == k.device == v.device, f"{op}: q, k, v are on {q.device}, {k.device}, {v.device}; move them")
    scale = Q[3] ** -0.5 if scale is None else scale
    positive = isinstance(scale, (int, float)) and scale > 0
    _check(positive, f"{op}: scale {scale} must be a positive number; multiply q by any other scale")
    return scale


def _for_kernel(op, *tensors):
    """Check what the kernels cannot do; the interpreter gets float32, because it computes bf16 wrongly, silently."""
    for x in tensors:
        known = x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        _check(known, f'{op}: no kernel for {x.dtype}; cast to float32, or use("reference")')
        _check(x.shape[-1] <= 128, f'{op}: no kernel for head size {x.shape[-1]} > 128; use("reference")')
        span = sum((n - 1) * stride for n, stride in zip(x.shape[2:], x.stride()[2:]))
        _check(span < 2**31, f"{op}: one head spans {span} elements, 2^31 is the limit; make the tensor contiguous")
    return [x.float() if interpreting() else x for x in tensors]


# --- decode_attention -------------------------------------------------------------------------------------------------


def decode_reference(q, k_cache, v_cache, lengths, scale=None, causal=True):
    """`attention_reference` with a mask for what each row of the cache holds, and each new token may see.

    Traffic: every cached key and value is read once, 2 S D elements a head, for a handful of queries: memory is the
    limit, not arithmetic.
    """
    (B, _, R, _), lengths = q.shape, torch.as_tensor(lengths).expand(len(q)).tolist()
    end = [[n - (R - 1 - r if causal else 0) for r in range(R)] for n in lengths]
    return attention_reference(q, k_cache, v_cache, _mask("decode", [0] * R, end, k_cache.shape[2]), scale)[0]


@jit
def _decode_chunks(q, k, v, part_m, part_u, part_w, lengths, R, S, scale, CAUSAL: tl.constexpr, C: tl.constexpr):
    """Grid (chunks, key heads, batch): the summary of one chunk of a cache row, for all queries that share the head."""
    chunk, h, b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    x, d = tl.arange(0, C.BLOCK_M), tl.arange(0, C.BLOCK_D)
    head, token, used = h * C.GROUP + x // R, x % R, x < C.GROUP * R  # row x of the tile: a head of the group, a token
    length = tl.minimum(tl.load(lengths + b), S)
    end = tl.where(used, length - (R - 1 - token) if CAUSAL else length, 0)
    size = tl.cdiv(tl.cdiv(length, tl.num_programs(0)), C.BLOCK_N) * C.BLOCK_N  # equal parts of what this row holds
    lo, hi = chunk * size, tl.minimum(chunk * size + size, length)
    at = b * q.batch + head[:, None] * q.head + token[:, None] * q.row + d[None, :] * q.dim
    queries = tl.load(q.ptr + at, mask=used[:, None] & (d[None, :] < C.D), other=0.0)
    m, u = tl.full(x.shape, float("-inf"), tl.float32), tl.zeros(x.shape, tl.float32)
    w = tl.zeros(queries.shape, tl.float32)
    rows = (x[:, None], x[:, None] * 0, end[:, None], lengths)
    m, u, w = _fold(m, u, w, queries, k, v, b, h, rows, lo, hi, length, scale, C, True)
    row = ((b * tl.num_programs(1) * C.GROUP + head) * R + token) * tl.num_programs(0) + chunk
    tl.store(part_m + row, m, mask=used)
    tl.store(part_u + row, u, mask=used)
    tl.store(part_w + row[:, None] * C.D + d[None, :], w, mask=used[:, None] & (d[None, :] < C.D))


@jit
def _decode_merge(part_m, part_u, part_w, o, chunks, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Grid (batch * heads * tokens): the operator once more, over the chunks of one query."""
    d, row = tl.arange(0, BLOCK_D), tl.program_id(0).to(tl.int64)
    part_m, part_u, part_w = part_m + row * chunks, part_u + row * chunks, part_w + row * chunks * D + d
    m, u, w = tl.load(part_m), tl.load(part_u), tl.load(part_w, mask=d < D, other=0.0)
    for c in range(1, chunks):
        wc = tl.load(part_w + c * D, mask=d < D, other=0.0)
        m, u, w = _merge(m, u, w, tl.load(part_m + c), tl.load(part_u + c), wc)
    tl.store(o + row * D + d, (w / tl.where(u == 0, 1.0, u)).to(o.dtype.element_ty), mask=d < D)


def _decode_triton(q, k, v, lengths, scale, causal):
    (B, H, R, D), (Hkv, S), device = q.shape, k.shape[1:3], q.device
    rows, (block_n, stages) = _padded(H // Hkv * R), (16, 2) if q.dtype == torch.float32 else (64, 3)
    processors = torch.cuda.get_device_properties(device).multi_processor_count if q.is_cuda else 4
    wanted = -(-16 * processors // (B * Hkv))  # sixteen programs a multiprocessor: several at once, a short last wave
    chunks = max(1, min(wanted, -(-S // (4 * block_n))))
    sizes = (B * H * R, chunks), (B * H * R, chunks), (B * H * R, chunks, D)
    part_m, part_u, part_w = (torch.empty(size, dtype=torch.float32, device=device) for size in sizes)
    o = torch.empty(B * H * R, D, dtype=q.dtype, device=device)
    _launch(q, _decode_chunks, (chunks, Hkv, B), _view(q), _view(k), _view(v), part_m, part_u, part_w, lengths, R, S,
            scale * LOG2_E, causal, _consts(q, k, rows, block_n), num_warps=4 if rows <= 16 else 8, num_stages=stages)
    _launch(q, _decode_merge, (B * H * R,), part_m, part_u, part_w, o, chunks, D, _padded(D), num_warps=1)
    return o.view(B, H, R, D)


def _decode_torch(q, k, v, lengths, scale, chain):
    R = q.shape[2]
    if isinstance(lengths, int):  # the usual case: the filled part is a slice
        mask = causal(R, lengths) if chain and R > 1 else None
        return _attention_torch(q, k[:, :, :lengths], v[:, :, :lengths], mask, scale)
    end = lengths[:, None] - torch.arange(R - 1, -1, -1, device=q.device) * int(chain)
    seen = torch.arange(k.shape[2], device=q.device) < end[:, None, :, None]
    return F.scaled_dot_product_attention(q, _share_heads(q, k), _share_heads(q, v), attn_mask=seen, scale=scale)


def decode_attention(q, k_cache, v_cache, lengths, scale=None, causal=True):
    """Attention of R new tokens against a preallocated cache. No gradient.

    q (B, H, R, D); caches (B, Hkv, S, D), of which row b holds lengths[b] tokens, *the R new ones included*; lengths:
    int or (B,) integers. The new tokens are the last R: query r sees keys j < lengths[b] - (R - 1 - r), or with
    causal=False all of them (the tokens of one scale see one another). R > 1 verifies a drafted chain in one call.
    Returns (B, H, R, D). Kernel limits: as `attention`, and R H / Hkv <= 64.
    """
    if torch.is_autocast_enabled(q.device.type):
        q = q.to(k_cache.dtype)  # the cache is what it is
    op, (B, H, R, _), S = "decode_attention", q.shape, k_cache.shape[2]
    scale = _check_attention(op, q, k_cache, v_cache, scale)
    one_length = isinstance(lengths, int)
    if one_length:
        _check(R <= lengths <= S, f"{op}: length {lengths} must hold the {R} new tokens, in {S} places of the cache")
    else:
        lengths = torch.as_tensor(lengths, device=q.device)
        _check(lengths.shape == (B,), f"{op}: lengths {tuple(lengths.shape)} must be one int or of shape ({B},)")
    if path(q).name == "triton":
        group = H // k_cache.shape[1]
        _check(R * group <= 64, f"{op}: {R} tokens x {group} heads > 64; use attention(mask=causal({R}, length))")
        lengths = torch.full((B,), lengths, dtype=torch.int32, device=q.device) if one_length else lengths.int()
        return _decode_triton(*_for_kernel(op, q, k_cache, v_cache), lengths, scale, causal).to(q.dtype)
    with torch.autocast(q.device.type, enabled=False):
        return _decode_torch(q, k_cache, v_cache, lengths, scale, causal)


# --- scan_attention ---------------------------------------------------------------------------------------------------


def scan_reference(s, v):
    """Softmax over every prefix, written out: s (.., N), v (.., N, D) -> (.., N, D). Traffic: forms N^2 weights."""
    past = torch.ones(s.shape[-1], s.shape[-1], dtype=torch.bool, device=s.device).tril()
    return s[..., None, :].masked_fill(~past, -INF).softmax(-1) @ v


def _nothing(s, v):
    """The summary of no keys."""
    return torch.full_like(s[..., 0], -INF), torch.zeros_like(s[..., 0]), torch.zeros_like(v[..., 0, :])


def _scan_torch(s, v, before):
    """log2 N rounds (Hillis and Steele): after round r every position has merged with the 2^r - 1 before it."""
    dim, n, step = s.dim() - 1, s.shape[-1] + 1, 1
    now = [torch.cat([x.unsqueeze(dim), y], dim) for x, y in zip(before, (s, torch.ones_like(s), v))]
    while step < n:
        merged = merge([x.narrow(dim, 0, n - step) for x in now], [x.narrow(dim, step, n - step) for x in now])
        now = [torch.cat([x.narrow(dim, 0, step), y], dim) for x, y in zip(now, merged)]
        step *= 2
    return finish(now)[0].narrow(dim, 1, n - 1), tuple(x.select(dim, n - 1) for x in now)


@jit
def _scan_prefixes(s, v, o, m0, u0, w0, m1, u1, w1, N, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr):
    """Grid (rows): scan a chunk of keys, merge it with all before, go on. Every value is read once and written once."""
    row, d, n = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    one = tl.zeros([BLOCK_N, BLOCK_D], tl.float32) + 1.0
    m = tl.load(m0 + row) * 1.4426950408889634 + d * 0.0  # the scan wants equal shapes: m and u are repeated over d
    u, w = tl.load(u0 + row) + d * 0.0, tl.load(w0 + row * D + d, mask=d < D, other=0.0)
    for j0 in range(0, N, BLOCK_N):
        j = j0 + n
        at, inside = (row * N + j[:, None]) * D + d[None, :], (j[:, None] < N) & (d[None, :] < D)
        score = tl.load(s + row * N + j, mask=j < N, other=float("-inf")).to(tl.float32) * 1.4426950408889634
        value = tl.load(v + at, mask=inside, other=0.0).to(tl.float32)
        pm, pu, pw = tl.associative_scan((score[:, None] * one, one, value), 0, _merge)
        pm, pu, pw = _merge(m[None, :], u[None, :], w[None, :], pm, pu, pw)
        tl.store(o + at, (pw / tl.where(pu == 0, 1.0, pu)).to(o.dtype.element_ty), mask=inside)
        last = (n == BLOCK_N - 1)[:, None]  # keys beyond N weigh nothing: the last row is the state after the chunk
        m, u = tl.sum(tl.where(last, pm, 0.0), 0), tl.sum(tl.where(last, pu, 0.0), 0)
        w = tl.sum(tl.where(last, pw, 0.0), 0)
    tl.store(m1 + row + d * 0, m * 0.6931471805599453, mask=d == 0)
    tl.store(u1 + row + d * 0, u, mask=d == 0)
    tl.store(w1 + row * D + d, w, mask=d < D)


def scan_attention(s, v, state=None, return_state=False):
    """Attention as an RNN (Aaren): scores s (.., N) of a fixed query, values v (.., N, D) -> all prefixes (.., N, D).

    state: the summary (m, u, w) of everything before, as return_state gives it back: a sequence fed in pieces, or
    token by token in constant memory, gives the same outputs as fed whole.
    Where a gradient is asked for, the torch path runs also on a GPU. Kernel limit: D <= 128. Numerics: float32.

    >>> out, state = scan_attention(s[:, :7], v[:, :7], return_state=True)
    >>> rest = scan_attention(s[:, 7:], v[:, 7:], state)                            # == scan_attention(s, v)[:, 7:]
    """
    fits = s.shape == v.shape[:-1] and s.numel() > 0
    _check(fits, f"scan_attention: s {tuple(s.shape)} must be v {tuple(v.shape)} without its last dimension, not empty")
    (*lead, N, D), state = v.shape, _nothing(s, v) if state is None else state
    gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (s, v, *state))
    if gradient or path(s).name == "reference":
        out, state = _scan_torch(s, v, state)
    else:
        _for_kernel("scan_attention", v)
        pad, before = _padded(D), [x.float().contiguous() for x in state]
        s, v = s.contiguous(), v.contiguous()
        out, state = torch.empty_like(v), tuple(torch.empty_like(x) for x in before)
        _launch(s, _scan_prefixes, (math.prod(lead),), s, v, out, *before, *state, N, D, pad,
                BLOCK_N=max(16, 1024 // pad), num_warps=4 if pad < 128 else 8)
    return (out, state) if return_state else out


# --- sample -----------------------------------------------------------------------------------------------------------


def truncate(logits, top_k=0, top_p=1.0):
    """Logits (.., V), all but the likeliest tokens at -inf: first top-k, then top-p on what remains (0 and 1.0: off).

    top-k keeps the k largest; top-p keeps a token iff the tokens *strictly* likelier than it hold less than top_p of
    the mass, so at least one. Tokens tied with the last one kept are all kept (torch.topk would pick among them).
    Traffic: a sort moves V log V elements a row; the kernel reads V.

    >>> truncate(torch.tensor([0.5, 0.25, 0.125, 0.125]).log(), top_p=0.7).exp()   # 0.5 < 0.7: keep the second, too
    tensor([0.5000, 0.2500, 0.0000, 0.0000])
    """
    _check_truncation(top_k, top_p)
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k, dim=-1).values[..., -1:], -INF)
    if top_p < 1:
        ordered = logits.sort(dim=-1, descending=True).values
        p = ordered.float().softmax(-1)
        kept = (p.cumsum(-1) - p < top_p).sum(-1, keepdim=True).clamp(min=1)  # 0 if p is NaN
        logits = logits.masked_fill(logits < ordered.gather(-1, kept - 1), -INF)
    return logits


def _check_truncation(top_k, top_p):
    _check(top_k >= 0, f"sample: top_k {top_k} must be 0 (off) or positive")
    _check(0 < top_p <= 1, f"sample: top_p {top_p} must be above 0 and at most 1 (off)")


def sample_reference(logits, temperature, top_k, top_p, noise):
    """Divide, truncate, race: token j arrives after the exponential time noise_j / p_j; first with probability p_j."""
    logits = truncate(logits.float() / temperature, top_k, top_p)
    return ((logits - logits.amax(-1, keepdim=True)).exp() / noise).argmax(-1)


@jit
def _keep_likeliest(p, weight, need):
    """p >= 0, with 0 below the largest t such that sum(weight where p >= t) >= need. Exact without a sort: floats >= 0
    are ordered like their bits, read as an integer, and 31 bisections find any 31-bit integer."""
    lo, hi = 0, tl.max(p, 0).to(tl.int32, bitcast=True)
    for _ in range(31):
        mid = lo + ((hi - lo + 1) >> 1)
        enough = tl.sum(tl.where(p >= mid.to(tl.float32, bitcast=True), weight, 0.0), 0) >= need
        lo, hi = tl.where(enough, mid, lo), tl.where(enough, hi, mid - 1)
    return tl.where(p >= lo.to(tl.float32, bitcast=True), p, 0.0)


@jit
def _sample(logits, noise, out, stride, noise_stride, V, inv_temperature, top_k, top_p, TOP_K: tl.constexpr,
            TOP_P: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (rows). The row stays in registers: logits and noise are read once, one integer is written."""
    row, j = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    x = tl.load(logits + row * stride + j, mask=j < V, other=float("-inf")).to(tl.float32) * inv_temperature
    p = tl.exp2((x - tl.max(x, 0)) * 1.4426950408889634)
    p = tl.where(p > 0, p, 0.0)  # NaN is never drawn: its index could point beyond the row
    if TOP_K:
        p = _keep_likeliest(p, 1.0, top_k)
    if TOP_P:
        p = _keep_likeliest(p, p, top_p * tl.sum(p, 0))
    race = p / tl.load(noise + row * noise_stride + j, mask=j < V, other=1.0)
    tl.store(out + row, tl.argmax(race, 0))


def sample(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None, noise=None):
    """One token per row: logits (.., V) -> (..) int64 from softmax(truncate(logits / temperature, top_k, top_p)).

    temperature 0 is argmax. noise: (.., V) unit exponentials, for exact tests; else drawn from `generator`. One on the
    CPU gives the same tokens on every device, up to rounding, for the price of a copy; else nothing waits for the GPU.
    Numerics: float32 after the load; probabilities that round to one float32 are tied; NaN is not detected, but
    never drawn by the kernel. Kernel limit: V <= 32768, a row must fit the registers.
    """
    V = logits.shape[-1]
    _check(temperature >= 0, f"sample: temperature {temperature} must not be negative")
    _check_truncation(top_k, top_p)
    fits = noise is None or noise.shape == logits.shape
    _check(fits, f"sample: noise must have the shape of the logits, {tuple(logits.shape)}")
    if temperature == 0:
        return logits.argmax(-1)
    if noise is None:
        where = logits.device if generator is None else generator.device
        noise = torch.empty(logits.shape, dtype=torch.float32, device=where)
        noise = noise.exponential_(generator=generator).clamp_(min=1e-30).to(logits.device)
    if path(logits).name == "reference":
        return sample_reference(logits, temperature, top_k, top_p, noise)
    _check(V <= 32768, f'sample: no kernel for {V} logits a row; take at most 32768, or use("reference")')
    x, noise = ((t if t.stride(-1) == 1 else t.contiguous()) for t in (logits.reshape(-1, V), noise.reshape(-1, V)))
    out, block = torch.empty(len(x), dtype=torch.long, device=x.device), max(128, _padded(V))
    _launch(x, _sample, (len(x),), x, noise, out, x.stride(0), noise.stride(0), V, 1.0 / temperature, float(top_k),
            float(top_p), 0 < top_k < V, top_p < 1, block, num_warps=min(32, max(4, block // 1024)))
    return out.view(logits.shape[:-1])


# --- verify -----------------------------------------------------------------------------------------------------------


def verify_reference(p_target, p_draft, drafts, uniforms, noise):
    """The definition, for a batch. Traffic: copies rows of V; the kernel reads two of them, and 2 g numbers."""
    g, row = drafts.shape[1], torch.arange(len(drafts), device=drafts.device)
    p, q = (x[:, :g].gather(-1, drafts[..., None]).squeeze(-1) for x in (p_target, p_draft))
    n = (uniforms * q < p).long().cumprod(-1).sum(-1)  # the drafts before the first refusal
    p_next, q_next = p_target[row, n], F.pad(p_draft, (0, 0, 0, 1))[row, n]  # all accepted: nothing to subtract from p
    residual = (p_next - q_next).clamp(min=0)
    residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, p_next)  # p == q, refused by rounding only
    at, token = torch.arange(g + 1, device=drafts.device), (residual / noise).argmax(-1)
    return torch.where(at < n[:, None], F.pad(drafts, (0, 1)), torch.where(at == n[:, None], token[:, None], -1)), n


@jit
def _verify(p, q, drafts, uniforms, noise, tokens, accepted, g, V, BLOCK: tl.constexpr):
    """Grid (batch)."""
    row = tl.program_id(0).to(tl.int64)
    p, q, drafts, uniforms = p + row * (g + 1) * V, q + row * g * V, drafts + row * g, uniforms + row * g
    tokens, noise = tokens + row * (g + 1), noise + row * V
    # 1. accept from the left, up to the first refusal
    n, going = row.to(tl.int32) * 0, row >= 0
    for t in range(g):
        token = tl.load(drafts + t)
        going = going & (tl.load(uniforms + t) * tl.load(q + t * V + token) < tl.load(p + t * V + token))
        tl.store(tokens + t, token, mask=going)  # the rest holds -1 already
        n += going.to(tl.int32)
    # 2. exponential race over max(p - q, 0), which need not be normalised, and beside it one over p
    best, best_p, index, index_p = -1.0, -1.0, 0, 0
    for j0 in range(0, V, BLOCK):
        j = j0 + tl.arange(0, BLOCK)
        pj = tl.load(p + n * V + j, mask=j < V, other=-1.0)
        qj = tl.load(q + n * V + j, mask=j < tl.where(n < g, V, 0), other=0.0)  # all accepted: q has no such row
        e = tl.load(noise + j, mask=j < V, other=1.0)
        race, race_p = tl.where(pj > qj, pj - qj, tl.minimum(pj, 0.0)) / e, pj / e
        top, top_p = tl.max(race, 0), tl.max(race_p, 0)
        index = tl.where(top > best, j0 + tl.argmax(race, 0), index)
        index_p = tl.where(top_p > best_p, j0 + tl.argmax(race_p, 0), index_p)
        best, best_p = tl.maximum(best, top), tl.maximum(best_p, top_p)
    # 3. an empty residual falls back to p
    tl.store(tokens + n, tl.where(best > 0, index, index_p).to(tl.int64))
    tl.store(accepted + row, n.to(tl.int64))


def verify(p_target, p_draft, drafts, uniforms, noise):
    """Speculative sampling of drafted chains: the emitted tokens follow p_target exactly (2211.17192, 2302.01318).

    p_target (B, g+1, V), p_draft (B, g, V): probabilities, after temperature and truncation; drafts (B, g) int64,
    drawn from p_draft; uniforms (B, g) in [0, 1); noise (B, V) unit exponentials. Draft t stays if u_t q(d_t) < p(d_t).
    After the first refusal one token is drawn from max(p - q, 0), after none a bonus token from the last row of p.
    Returns tokens (B, g+1), -1 after the last, and n_accepted (B).
    Numerics: float32; the residual is raced as it is, never normalised. Any V, any g, also 0.

    >>> p = torch.tensor([[[.5, .5], [0., 1.]]])                      # g = 1, V = 2; p == q: the draft stays,
    >>> verify(p, p[:, :1], torch.tensor([[0]]), torch.tensor([[.9]]), torch.ones(1, 2))     # bonus from [0, 1]
    (tensor([[0, 1]]), tensor([1]))
    """
    _check(drafts.dim() == 2, f"verify: drafts must be (batch, gamma), not {tuple(drafts.shape)}")
    (B, g), V = drafts.shape, p_target.shape[-1]
    wanted = {"p_target": (B, g + 1, V), "p_draft": (B, g, V), "uniforms": (B, g), "noise": (B, V)}
    for (name, shape), x in zip(wanted.items(), (p_target, p_draft, uniforms, noise)):
        _check(x.shape == shape, f"verify: {name} is {tuple(x.shape)}, but with drafts {(B, g)} it must be {shape}")
    if path(p_target).name == "reference":
        return verify_reference(p_target, p_draft, drafts, uniforms, noise)
    tokens, n = drafts.new_full((B, g + 1), -1), drafts.new_empty(B)
    x = [t.contiguous() for t in (p_target.float(), p_draft.float(), drafts, uniforms.float(), noise.float())]
    _launch(drafts, _verify, (B,), *x, tokens, n, g, V, BLOCK=min(4096, max(128, _padded(V))), num_warps=8)
    return tokens, n


# --- nearest_code -----------------------------------------------------------------------------------------------------


def nearest_reference(x, codebook):
    """All distances at once. Traffic: even as a matrix product N K numbers, 4.3 GB written and read at 65k x 16k."""
    return (x[:, None] - codebook).square().sum(-1).argmin(-1)


def _nearest_torch(x, codebook, elements=1 << 21):
    """|x - c|^2 = |x|^2 + 2 (|c|^2 / 2 - x c): without |x|^2 the order stays. In chunks of rows that fit a cache."""
    half = 0.5 * codebook.square().sum(-1)
    parts = x.split(max(1, elements // len(codebook)))
    return torch.cat([torch.addmm(half, part, codebook.T, alpha=-1).argmin(-1) for part in parts])


@jit
def _nearest(x, codebook, half, index, N, K, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
             BLOCK_K: tl.constexpr):
    """Grid (tiles of rows). Lane (row, c) keeps the best of the codes c, c + BLOCK_K, ..; one reduction at the end."""
    n, lane = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    best, code = tl.full([BLOCK_N, BLOCK_K], float("inf"), tl.float32), tl.zeros([BLOCK_N, BLOCK_K], tl.int32)
    for k0 in range(0, K, BLOCK_K):
        k, product = k0 + lane, tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for d0 in range(0, D, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            at, inside = n[:, None].to(tl.int64) * D + d[None, :], (n[:, None] < N) & (d[None, :] < D)
            points = tl.load(x + at, mask=inside, other=0.0)
            codes = tl.load(codebook + k[None, :] * D + d[:, None], mask=(k[None, :] < K) & (d[:, None] < D), other=0.0)
            product = tl.dot(points, codes, product, input_precision="tf32x3")
        distance = tl.load(half + k, mask=k < K, other=float("inf"))[None, :] - product
        code, best = tl.where(distance < best, k[None, :], code), tl.minimum(distance, best)
    winner = tl.min(tl.where(best == tl.min(best, 1)[:, None], code, 2147483647), 1)  # the lowest index among equals
    tl.store(index + n, winner.to(tl.int64), mask=n < N)


@torch.no_grad()
def nearest_code(x, codebook, return_distance=False, return_residual=False):
    """Index of the nearest code, the lowest among equals: x (N, D), codebook (K, D) -> (N,) int64.

    With return_distance also |x - c|^2 (N,); with return_residual also x - c (N, D), what a residual quantizer codes
    next. No gradient: quantizers pass one straight through. Any D, any K. Numerics: float32, three tf32 products in
    the kernel; codes whose distances agree to about 1e-6 |x| |c| may swap between the paths.

    >>> nearest_code(torch.tensor([[0.2], [0.9]]), torch.tensor([[0.], [1.]]))
    tensor([0, 1])
    """
    fits = x.dim() == codebook.dim() == 2 and x.shape[1] == codebook.shape[1]
    _check(fits, f"nearest_code: x {tuple(x.shape)} and codebook {tuple(codebook.shape)} must be (N, D) and (K, D)")
    _check(len(codebook) > 0, "nearest_code: the codebook is empty")
    (N, D), K, extra = x.shape, len(codebook), []
    with torch.autocast(x.device.type, enabled=False):
        points, codes = x.float().contiguous(), codebook.float().contiguous()
        if path(x).name == "triton":
            index, half = torch.empty(N, dtype=torch.long, device=x.device), 0.5 * codes.square().sum(-1)
            _launch(x, _nearest, (-(-N // 64),), points, codes, half, index, N, K, D, BLOCK_D=min(32, _padded(D)),
                    BLOCK_N=64, BLOCK_K=64, num_warps=8, num_stages=2)
        else:
            index = _nearest_torch(points, codes)
        if return_distance or return_residual:
            residual = points - codes[index]
            extra += [residual.square().sum(-1)] if return_distance else []
            extra += [residual.to(x.dtype)] if return_residual else []
    return (index, *extra) if extra else index


# --- which path runs --------------------------------------------------------------------------------------------------


Path = namedtuple("Path", "name reason")  # name: "reference" (plain torch) or "triton"


class use:
    """`use("reference")` chooses the path from here on, `with use("triton"): ...` for a block.
    Default: the environment's NANO_KERNELS, or "auto"."""

    choice = "auto"

    def __init__(self, choice):
        _check(choice in ("auto", "reference", "triton"), f'use({choice!r}): choose "auto", "reference" or "triton"')
        self.before, use.choice = use.choice, choice

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        use.choice = self.before


use(os.environ.get("NANO_KERNELS", "auto"))


def interpreting():
    """True where Triton was imported under TRITON_INTERPRET=1: kernels then run on CPU tensors, slowly, for tests."""
    return triton is not None and triton.knobs.runtime.interpret


def path(x):
    """Path(name, reason) that an op takes for `x` under the present `use`. ValueError if that is impossible."""
    forced = use.choice == "triton"
    if use.choice == "reference":
        return Path("reference", 'chosen by use("reference") or NANO_KERNELS=reference')
    if torch.compiler.is_compiling() and not forced:
        return Path("reference", "inside torch.compile, which has attention kernels of its own")
    if x.is_cuda and triton is not None:
        major, minor = torch.cuda.get_device_capability(x.device)
        if major >= 8 or forced:
            return Path("triton", f"CUDA tensor, sm_{major}{minor}")
        return Path("reference", f"sm_{major}{minor} is older than sm_80, which the kernels are made for")
    why = "Triton is not installed" if triton is None else f"tensor on {x.device.type}"
    if not forced:
        return Path("reference", why)
    _check(interpreting(), f'use("triton"): {why}; move it to a GPU, or set TRITON_INTERPRET=1 before the import')
    return Path("triton", "CPU tensor, Triton's interpreter (slow, for tests)")


# --- command line: errors everywhere, times on a GPU ------------------------------------------------------------------


def errors(device, dtype):
    """Rows (op, case, error) of the path in use against float64: relative Frobenius norm, or share of other tokens."""
    generator = torch.Generator(device).manual_seed(0)
    randn, rand = (functools.partial(make, device=device, generator=generator) for make in (torch.randn, torch.rand))
    relative = lambda ours, truth: float((ours.double() - truth).norm() / truth.norm().clamp(min=1e-9))
    for mask in (full(70, 49), causal(129), scales([1, 4, 16, 64]), markov([1, 4, 16, 64]), window(129, 20),
                 tree([-1, 0, 1, 1, 0], 44), causal(64) & padding([64, 20], 64)):
        n, m = mask.shape
        x = [randn(2, heads, length, 32).to(dtype).requires_grad_() for heads, length in ((4, n), (2, m), (2, m))]
        double = [t.detach().double().requires_grad_() for t in x]
        ours, truth, do = attention(*x, mask), attention_reference(*double, mask)[0], randn(2, 4, n, 32).to(dtype)
        pairs = zip(torch.autograd.grad(ours, x, do), torch.autograd.grad(truth, double, do.double()))
        worst = torch.tensor([relative(a, b) for a, b in [(ours.detach(), truth.detach()), *pairs]]).max()  # NaN, too
        yield "attention + gradients", mask.name, float(worst)
    q, (k, v), lengths = randn(2, 4, 3, 32).to(dtype), randn(2, 2, 2, 150, 32).to(dtype), torch.tensor([150, 37])
    truth = decode_reference(q.double(), k.double(), v.double(), lengths)
    yield "decode_attention", "3 tokens, lengths 150, 37", relative(decode_attention(q, k, v, lengths), truth)
    s, v = 3 * randn(4, 100), randn(4, 100, 16)
    yield "scan_attention", "4 x 100", relative(scan_attention(s, v), scan_reference(s.double(), v.double()))
    logits, noise = 3 * randn(8, 500), rand(8, 500) + 0.01
    other = sample(logits, 0.8, 50, 0.9, noise=noise) != sample_reference(logits.double(), 0.8, 50, 0.9, noise)
    yield "sample", "8 x 500, other tokens", float(other.float().mean())
    p, q, u, e = randn(8, 5, 100).softmax(-1), randn(8, 4, 100).softmax(-1), rand(8, 4), noise[:, :100]
    drafts = torch.randint(100, (8, 4), device=device, generator=generator)
    other = verify(p, q, drafts, u, e)[0] != verify_reference(p.double(), q.double(), drafts, u.double(), e.double())[0]
    yield "verify", "8 x 4 drafts, other tokens", float(other.float().mean())
    x, codes = randn(300, 24), randn(200, 24)
    nearest = (x[:, None] - codes).double().square().sum(-1).amin(-1)
    yield "nearest_code", "300 x 200, distance", relative(nearest_code(x, codes, return_distance=True)[1], nearest)


SHAPES = {  # what to time: the shapes of the scripts, and long ones
    "causal": [(64, 4, 64, 32), (8, 16, 2048, 64), (4, 16, 4096, 64), (4, 8, 4096, 128), (1, 8, 16384, 128)],  # BHND
    "scales": [(64, 4, (1, 2, 4, 8), 32), (8, 16, (1, 2, 3, 4, 5, 6, 8, 10, 13, 16), 64),
               (2, 16, (1, 2, 3, 4, 6, 9, 13, 18, 24, 32), 64)],  # B, H, sides, D
    "decode": [(64, 16, 4096, 64), (1, 16, 8192, 64), (64, 4, 256, 32)],  # B, H, S, D
    "tokens": [(64, 32768), (64, 4096), (64, 256)],  # B, V
    "nearest": [(65536, 16384, 32), (65536, 512, 16)],  # N, K, D
    "scan": [(1024, 4096, 64)],  # rows, N, D
}


def benchmarks(device="cuda", compiled=functools.partial(torch.compile, dynamic=False)):
    """Rows (case, work, unit, ours, peer's name, peer): two functions to time, and their work in TFLOP or GB."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    flex, sdpa = compiled(flex_attention), F.scaled_dot_product_attention
    rand = functools.partial(torch.rand, device=device)
    half = functools.partial(torch.randn, device=device, dtype=torch.bfloat16)
    for B, H, N, D in SHAPES["causal"]:
        (q, k, v, do), mask, case = half(4, B, H, N, D), causal(N), f"causal {B}x{H}x{N}x{D}"
        work = 2 * B * H * N * N * D / 1e12  # two products, half of which a causal mask needs
        yield case, work, "TFLOP/s", lambda: attention(q, k, v, mask), "sdpa", lambda: sdpa(q, k, v, is_causal=True)
        x = [t.clone().requires_grad_() for t in (q, k, v)]
        outputs = attention(*x, mask), sdpa(*x, is_causal=True)
        ours, theirs = (functools.partial(torch.autograd.grad, out, x, do, retain_graph=True) for out in outputs)
        yield f"{case} backward", 2.5 * work, "TFLOP/s", ours, "sdpa", theirs
    for (B, H, sides, D), make in itertools.product(SHAPES["scales"], (scales, markov)):
        mask = make([n * n for n in sides])
        N, dense = mask.shape[0], mask.dense(device)
        start, end = mask.row_start[0].to(device), mask.row_end[0].to(device)
        blocks = create_block_mask(lambda b, h, i, j: (start[i] <= j) & (j < end[i]), None, None, N, N, device=device)
        q, k, v = half(3, B, H, N, D)
        row = f"{mask.name} {B}x{H}x{N}x{D}", 4 * B * H * D * float(dense.sum()) / 1e12, "TFLOP/s"
        yield *row, lambda: attention(q, k, v, mask), "flex", lambda: flex(q, k, v, block_mask=blocks)
        yield *row, lambda: attention(q, k, v, mask), "sdpa", lambda: sdpa(q, k, v, dense)
    for B, H, S, D in SHAPES["decode"]:
        q, (k, v) = half(B, H, 1, D), half(2, B, H, S, D)
        row = f"decode {B}x{H}x{S}x{D}", 4 * B * H * S * D / 1e9, "GB/s"
        yield *row, lambda: decode_attention(q, k, v, S), "sdpa", lambda: sdpa(q, k, v)
    for B, V in SHAPES["tokens"]:
        x, p, q, u, e = (rand(*shape) for shape in ((B, V), (B, 5, V), (B, 4, V), (B, 4), (B, V)))
        drafts, work = torch.randint(V, (B, 4), device=device), (12 * B * V / 1e9, "GB/s")
        theirs = lambda: torch.multinomial(truncate(x / 0.8, 50, 0.9).softmax(-1), 1)
        yield f"sample {B}x{V}, k 50, p 0.9", *work, lambda: sample(x, 0.8, 50, 0.9), "sort, multinomial", theirs
        theirs = lambda: verify_reference(p, q, drafts, u, e)
        yield f"verify {B}x4x{V}", *work, lambda: verify(p, q, drafts, u, e), "torch", theirs
    for N, K, D in SHAPES["nearest"]:
        x, codes, row = rand(N, D), rand(K, D), (f"nearest {N}x{K}x{D}", 2 * N * K * D / 1e12, "TFLOP/s")
        yield *row, lambda: nearest_code(x, codes), "cdist + argmin", lambda: torch.cdist(x, codes).argmin(-1)
    for rows, N, D in SHAPES["scan"]:
        s, v, row = rand(rows, N), rand(rows, N, D), (f"scan {rows}x{N}x{D}", 8 * rows * N * D / 1e9, "GB/s")
        yield *row, lambda: scan_attention(s, v), "torch", lambda: _scan_torch(s, v, _nothing(s, v))[0]


def _plot(file, error_rows, time_rows):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [[(f"{op}: {case}", max(a if b is None else b, 1e-9)) for op, case, a, b in error_rows]]
    panels += [[(f"{case} ({peer})", ratio) for case, peer, ratio in time_rows]] if time_rows else []
    who = "torch path" if error_rows[0][3] is None else "kernel"
    titles = f"{who}: error against float64 (1e-9: none)", "speed relative to the peer in brackets; right of 1 = faster"
    size = 8 * len(panels), 9 if time_rows else 4
    _, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    for axis, bars, title in zip(axes[0], panels, titles):
        axis.plot([x for _, x in bars], [name for name, _ in bars], "o")
        axis.set(xscale="log", title=title)
        axis.invert_yaxis()
        axis.grid(alpha=0.3)
    plt.savefig(file, dpi=110)


def main(argv=None):
    """Print the tables; returns (error rows, time rows)."""
    parser = argparse.ArgumentParser(description="Check all ops against float64; on a GPU, time them beside torch.")
    parser.add_argument("--plot", metavar="PATH", help="also draw the tables into this picture (.png, .pdf, .svg)")
    text = "inputs of the error table (bfloat16 on a GPU, else float32)"
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help=text)
    args = parser.parse_args(argv)
    gpu = torch.cuda.is_available()
    kernels_run = triton is not None and (gpu or interpreting())
    device, name = "cuda" if gpu else "cpu", args.dtype or ("bfloat16" if gpu else "float32")
    where = torch.cuda.get_device_name() if gpu else "CPU, Triton's interpreter" if kernels_run else "CPU"
    print(f"errors against float64, {name}, {where}\n{'op':<24}{'case':<30}{'torch path':>12}{'kernel':>12}")
    rows, times = [], []
    with use("reference"):
        rows = [(*row, None) for row in errors(device, getattr(torch, name))]
    if kernels_run:
        with use("triton"):
            rows = [(*row[:3], error) for row, (*_, error) in zip(rows, errors(device, getattr(torch, name)))]
    for op, case, a, b in rows:
        print(f"{op:<24}{case:<30}{a:>12.1e}{'not run' if b is None else f'{b:.1e}':>12}")
    if gpu:
        print("\ntimes, attention in bfloat16, median; ratio = time of the peer / ours")
        print(f"{'case':<34}{'ms':>9}{'rate':>16}  {'peer':<20}{'ms':>9}{'ratio':>8}")
        for case, work, unit, ours, peer, theirs in benchmarks():
            a, b = (triton.testing.do_bench(f, return_mode="median") for f in (ours, theirs))
            times.append((case, peer, b / a))
            print(f"{case:<34}{a:>9.3f}{work / a * 1e3:>8.0f} {unit:<7}  {peer:<20}{b:>9.3f}{b / a:>8.2f}", flush=True)
    else:
        how = "interpreted only" if kernels_run else "not at all"
        print(f"\nNo CUDA device: nothing to time here, and the kernels ran {how}.")
        print("  errors of the kernels, interpreted on this machine   TRITON_INTERPRET=1 python kernels.py")
        print("  errors and times, on a machine with a GPU            python kernels.py --plot kernels.png")
    if args.plot:
        _plot(args.plot, rows, times)
        print(f"drew {args.plot}")
    return rows, times


if __name__ == "__main__":
    main()
