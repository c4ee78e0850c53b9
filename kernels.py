"""kernels: attention and sampling written in Triton, each op beside the plain torch that it must equal.

    attention          softmax(q k^T) v under every mask of the course: causal, scales, Markov, window, tree
    decode_attention   a few new queries against a long cache of keys and values
    scan_attention     the attention output of every prefix ("Attention as an RNN")
    sample             temperature, top-k, top-p and the draw of a token, in one pass over the logits
    verify             speculative sampling: which drafted tokens stay, and which token follows them
    nearest_code       the nearest row of a codebook (plain torch only)

One idea carries the first three. Seen from one query with scores s_j = q . k_j, a set of keys is summed up by
m, its largest score; u, its total weight, the sum of e^(s_j - m); and w, its weighted values, the sum of
e^(s_j - m) v_j. The summaries of two disjoint sets add up to the summary of their union (`merge`), and w / u
of all keys is softmax attention:

    flash attention      ((tile 0 + tile 1) + tile 2) + ...   a fold: one program walks along the keys
    split-K decoding     chunk 0 + chunk 1 + chunk 2 + ...    a program for each chunk, then all at once
    attention as an RNN  k0,  k0 + k1,  k0 + k1 + k2,  ...    a scan: every prefix is an answer

Read `merge`, then `_fold`, the same for tiles. Most ops stand in one order: reference, kernel, the function
to call.

    B samples        N queries, number i    R new tokens (decode)            V vocabulary
    H query heads    M keys, number j       S places of a cache (decode)     K codes (nearest_code)
    Hkv key heads    D numbers a head       g or gamma drafted tokens (verify)
    a tile is I = BLOCK_Q queries x J = BLOCK_K keys (attention)

Which one runs: tensors on a CPU take torch; on an NVIDIA GPU the kernel, if its generation is sm_80 or later
(2020: A100, RTX 30; the free T4 is sm_75). Three things take torch anyway: what torch.compile compiles, which
makes kernels of its own from torch ops; scan_attention when a gradient is asked for, as its kernel has no
backward pass; and decode_attention, where its own kernel does not fit and each sample has its own length.
What no kernel is made for (D > 128 or float64 in attention, V > 32768 in `sample`) is an error on a GPU, not
a silent detour. `path(tensor)` says which runs and why; `use("reference")` and `use("triton")` override.
Without Triton (macOS, Windows) all is torch.

This torch path is called "reference" as a whole, although it takes torch's fused attention where that gives
the same numbers sooner. The functions named .._reference are definitions: both paths are tested against them.

The kernels ran on one GPU, an H200 (sm_90; Triton 3.6), and `TRITON_INTERPRET=0 pytest tests/test_kernels.py`
passed there; for sm_80 they were compiled only. The device showed three faults that Triton's interpreter, in
which they are tested on a CPU, had not: a copy of the whole cache at every token and tiles a fifth slower
than others, both mended and timed there; and a crash (`decode_attention`), whose mending was compiled only.
`python tests/bench_kernels.py` times all of them.

Papers: online softmax (arXiv:1805.02867), FlashAttention (2205.14135) and FlashAttention-2 (2307.08691),
Attention as an RNN (2405.13956), VAR (2404.02905), SpecInfer (2305.09781), speculative sampling (2211.17192,
2302.01318), Flash-Decoding (Dao et al. 2023). Left out: dropout, paged caches, fp8, what only new GPUs do.
"""

import functools
import itertools
import math
import os
from collections import namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # a * b + c in one step; Triton 3.9 warns if unsaid
try:
    import triton
    import triton.language as tl

    jit = triton.jit                                    # for a function that kernels call
    # For a kernel. Triton compiles another version of it when an integer argument becomes 1, or a multiple of
    # 16: good for sizes that stay, but these change from call to call. (A kernel need not have all of them.)
    changing = ["N", "M", "R", "S", "rows", "chunks", "gamma"]
    kernel = functools.partial(triton.jit, do_not_specialize=changing)
except ImportError:                                     # every op still runs, by its torch path
    triton, tl = None, SimpleNamespace(constexpr=None)
    jit = kernel = lambda function: function

INF = float("inf")
LOG2_E, LN_2 = math.log2(math.e), math.log(2)           # e^x = 2^(x LOG2_E) and log x = LN_2 log2 x


# --- the merge operator -------------------------------------------------------------------------------------


def summarize(scores, values):
    """Summary m (.., N), u (.., N), w (.., N, D) of M keys, from scores (.., N, M) and values (.., M, D)."""
    m = scores.detach().amax(-1)                    # only a shift: it cancels in w / u, so no gradient passes
    p = torch.exp(scores - _finite(m)[..., None])   # (.., N, M), at most 1, where e^90 would overflow float32
    return m, p.sum(-1), p @ values


def merge(a, b):
    """Summary of the union of two disjoint sets of keys.

    (m1, u1, w1) + (m2, u2, w2) = (m, u1 e^(m1-m) + u2 e^(m2-m), w1 e^(m1-m) + w2 e^(m2-m)),  m = max(m1, m2)

    Both sides are brought to the larger maximum, then added. The order of merging does not matter, and
    (-inf, 0, 0), the summary of no keys, changes nothing. Two keys, score 0 and value 1, score log 2 and
    value 3: at the maximum log 2 the first is worth 1/2, and w / u = 3.5 / 1.5 = (1 . 1 + 2 . 3) / (1 + 2).

    >>> a = summarize(torch.tensor([[0.]]), torch.tensor([[1.]]))
    >>> b = summarize(torch.tensor([[2.]]).log(), torch.tensor([[3.]]))
    >>> merge(a, b)
    (tensor([0.6931]), tensor([1.5000]), tensor([[3.5000]]))
    """
    (m1, u1, w1), (m2, u2, w2) = a, b               # m, u (.., N) and w (.., N, D)
    # The new maximum is only a shift: no gradient, as in `summarize`. But m1 and m2 themselves keep theirs:
    # in a scan they are the scores of single keys, and u = 1 there knows nothing of the score.
    m = torch.maximum(m1.detach(), m2.detach())
    x = torch.exp(m1 - _finite(m))                  # what the old sums are worth at the new maximum
    y = torch.exp(m2 - _finite(m))
    return m, u1 * x + u2 * y, w1 * x[..., None] + w2 * y[..., None]


def finish(state):
    """Output w / u (.., N, D), and log-sum-exp m + log u = log sum_j e^(s_j) (.., N). No keys: 0 and -inf."""
    m, u, w = state
    return w / torch.where(u == 0, 1.0, u)[..., None], m + u.log()


def _finite(m):
    """m as a shift. Of no keys it is -inf, and -inf - -inf is nan; shifted by 0 they weigh e^-inf = 0."""
    return torch.where(m == -INF, 0.0, m)


# How to read a kernel. It looks like numpy, but its arrays are tiles: small, with sides that are powers of
# two and known when it is compiled (`tl.constexpr`), held in the registers of one processor of the GPU.
# Launching a kernel starts many copies of it, "programs", roughly in the order of their numbers, though none
# may count on that; tl.program_id(0) tells each its number, and so its part of the result. A tensor arrives
# as a pointer to its first number: tl.load(pointer + offsets) fetches a tile, tl.store writes one. `mask`
# marks the places that may be touched; the others read as `other`. A kernel cannot see the globals of this
# file, so 1.4426950408889634 is log2 e and 0.6931471805599453 is log 2.


@jit
def _merge(m1, u1, w1, m2, u2, w2):
    """`merge` of six tiles of one shape, m in base 2 (times log2 e): a GPU makes e^x from 2^x anyway."""
    m = tl.maximum(m1, m2)
    shift = tl.where(m == float("-inf"), 0.0, m)
    x, y = tl.exp2(m1 - shift), tl.exp2(m2 - shift)
    return m, u1 * x + u2 * y, w1 * x + w2 * y


# --- masks: every mask of the course is three lists of integers ---------------------------------------------

_arange = functools.partial(torch.arange, device="cpu")     # masks are made there, always


@dataclass(eq=False)                                     # eq=False: a mask is its own key in the caches below
class Mask:
    """Query i sees key j  iff  row_start[i] <= j < row_end[i]  and  i < col_end[j].

    row_start, row_end (N,) and col_end (M,), int32 on the CPU. A query sees one run of keys, less those that
    have ended: queries from number col_end[j] on do not see key j. Only a tree needs that, elsewhere it is N.
    2 N + M numbers instead of N x M, and a few of them tell whether a whole tile is empty or full. The
    functions below make masks, and all but `tree` remember them; use one mask in every layer.
    """

    row_start: torch.Tensor
    row_end: torch.Tensor
    col_end: torch.Tensor
    name: str = "mask"                  # "causal" and "full" choose masks built into torch: not for others

    @property
    def shape(self):
        return len(self.row_start), len(self.col_end)

    @functools.lru_cache(maxsize=64)
    def dense(self, device="cpu"):
        """Boolean (1, 1, N, M), True where query i sees key j; the ones stand for batch and heads."""
        i = _arange(self.shape[0])[:, None]                 # (N, 1)
        j = _arange(self.shape[1])                          # (M,)
        seen = (self.row_start[:, None] <= j) & (j < self.row_end[:, None]) & (i < self.col_end)
        return seen[None, None].to(device)

    def draw(self):
        """Text picture: a line for each query, `#` where it sees a key."""
        return "\n".join("".join(".#"[seen] for seen in row) for row in self.dense()[0, 0].tolist())

    def tiles(self, block_q, block_k):
        """Which tiles of block_q queries x block_k keys are visited: bounds by query tiles and by key tiles.

        causal(8) in tiles of 2 x 2, W = seen whole, P = partly, - = not at all:

            keys   0 1  2 3  4 5  6 7    lo  full_lo  full_hi  hi
            0, 1    P    -    -    -     0      0        0      2
            2, 3    W    P    -    -     0      0        2      4
            4, 5    W    W    P    -     0      0        4      6
            6, 7    W    W    W    P     0      0        6      8

        From full_lo to before full_hi lies the first run of whole tiles, where nothing is compared; from lo
        to full_lo and from full_hi to hi pairs are compared one by one (in a tree also whole tiles behind a
        gap). The others are never read: nearly half, if there are many tiles. Both results are int32
        (1, 1, tiles, 4), ones as in `dense`.
        """
        n, m = self.shape
        start_min, start_max = _extremes(self.row_start, block_q)               # (query tiles, 1)
        end_min, end_max = _extremes(self.row_end, block_q)
        col_min, col_max = _extremes(self.col_end, block_k)                     # (key tiles, 1)
        i0, j0 = _arange(0, n, block_q)[:, None], _arange(0, m, block_k)        # where each tile starts ...
        i1, j1 = i0 + block_q, j0 + block_k                                     # ... and ends
        # (query tiles, key tiles). `some` may hold a tile too many, as the least start and the greatest end
        # may be of two different queries; it is then compared in vain
        some = (start_min < j1) & (end_max > j0) & (col_max.T > i0)
        whole = (start_max <= j0) & (end_min >= j1) & (col_min.T >= i1)
        whole &= (i1 <= n) & (j1 <= m)                   # a tile that sticks out of the matrix is never whole
        by_queries, by_keys = _runs(some, whole) * block_k, _runs(some.T, whole.T) * block_q
        return by_queries[None, None], by_keys[None, None]

    @functools.lru_cache(maxsize=64)
    def for_kernel(self, device, block_q, block_k, by_keys):
        """row_start, row_end, col_end, and the bounds by query tiles (or by key tiles), on the device."""
        bounds = self.tiles(block_q, block_k)[1 if by_keys else 0]
        return [x.to(device).contiguous() for x in (self.row_start, self.row_end, self.col_end, bounds)]


def _extremes(x, block):
    """Smallest and largest entry of each block of the list x (n,) -> two columns (blocks, 1)."""
    blocks = -(-len(x) // block)                            # n / block, rounded up
    inside = _arange(blocks * block).clamp(max=len(x) - 1)  # the last block is filled up with the last entry
    x = x[inside].view(blocks, block)
    return x.amin(1, keepdim=True), x.amax(1, keepdim=True)


def _runs(some, whole):
    """Flags (rows, tiles) -> lo, full_lo, full_hi, hi of each row, counted in tiles: (rows, 4) int32."""
    t = _arange(some.shape[1])
    hi = torch.where(some, t + 1, 0).amax(1)                # one past the last tile with something to see
    lo = torch.where(some, t, hi[:, None]).amin(1)          # the first one; hi where there is nothing
    full_lo = torch.where(whole.any(1), whole.int().argmax(1), lo)      # the first whole one, or lo
    after = ~whole & (t >= full_lo[:, None])
    full_hi = torch.where(after, t, hi[:, None]).amin(1)    # the first one behind it that is not whole
    return torch.stack([lo, full_lo, full_hi, hi], 1).int()


def _mask(name, start, end, m, col_end=None):
    """Query i sees start[i] <= j < end[i] of m keys; lists of integers. No col_end: it hides nothing."""
    lists = start, end, col_end or [len(start)] * m
    start, end, col_end = (torch.tensor(x, dtype=torch.int32, device="cpu") for x in lists)
    return Mask(start.clamp(0, m), end.clamp(0, m), col_end, name)


@functools.lru_cache(maxsize=256)
def full(n, m=None):
    """n queries see all m (default n) keys; what mask=None means."""
    m = n if m is None else m
    return _mask("full", [0] * n, [m] * n, m)


@functools.lru_cache(maxsize=256)
def causal(n, m=None):
    """Every token sees itself and the past. With m > n keys the queries are the last n of m tokens.

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
    """Next-scale prediction (VAR): a token sees its own scale and all before. counts: tokens of each scale.

    scales([1, 2, 1])  #...
                       ###.
                       ###.
                       ####
    """
    return _scales("scales", tuple(counts), len(counts))


def markov(counts, previous=0):
    """Scales with a short memory (HMAR, arXiv:2506.04421): the own scale and `previous` scales before it.

    markov([1, 2, 1])  #...      markov([1, 2, 1], previous=1)  #...
                       .##.                                     ###.
                       .##.                                     ###.
                       ...#                                     .###
    """
    return _scales("markov", tuple(counts), previous)


@functools.lru_cache(maxsize=256)
def _scales(name, counts, previous):
    _check(counts and min(counts) > 0, f"{name}({list(counts)}): every scale needs at least one token")
    edges = [0, *itertools.accumulate(counts)]         # scale k holds the tokens edges[k] .. edges[k + 1] - 1
    start, end = [], []
    for k, count in enumerate(counts):
        start += [edges[max(k - previous, 0)]] * count
        end += [edges[k + 1]] * count
    return _mask(name, start, end, edges[-1])


def tree(parents, prefix=0):
    r"""Drafted tokens as a tree (SpecInfer): a node sees the prefix, its ancestors and itself.

    parents[i] is the parent of node i, -1 for a root. Nodes are numbered depth first (pre-order): then j and
    all nodes below it are the run j .. end - 1, and "j is i, or an ancestor of i" is j <= i < end. In the
    mask node j is key prefix + j, with this end as its col_end.

    tree([-1, 0, 1, 0])    0       #...
                          / \      ##..
                         1   3     ###.
                         2         #..#
    """
    n = len(parents)
    col_end = list(range(1, n + 1))                         # so far each node is seen by itself alone
    branch = []                                             # from the root down to the node before
    for i, parent in enumerate(parents):
        while branch and branch[-1] != parent:
            branch.pop()
        ordered = parent == -1 or branch
        _check(ordered, f"tree: node {i} does not follow its parent {parent}; number the nodes in pre-order")
        branch.append(i)
        for node in branch:
            col_end[node] = i + 1
    start, end = [0] * n, list(range(prefix + 1, prefix + n + 1))
    return _mask("tree", start, end, prefix + n, [n] * prefix + col_end)


# --- attention ----------------------------------------------------------------------------------------------


def attention_reference(q, k, v, mask=None, scale=None):
    """softmax(scale q k^T) v written out, any float dtype -> output (B, H, N, D), log-sum-exp (B, H, N).

    N M scores a head go to the GPU's main memory and come back, then N M weights: 4 N M numbers. The kernel
    moves q and o, N D each, and k and v, M D each (every tile of queries reads these again, but the GPU's
    cache has them by then): 64 times fewer at N = M = 4096, D = 64. Written out, attention waits for memory.
    """
    k, v = _share_heads(q, k), _share_heads(q, v)           # (B, H, M, D)
    scores = (q @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)     # (B, H, N, M)
    if mask is not None:
        scores = scores.masked_fill(~mask.dense(q.device), -INF)
    return finish(summarize(scores, v))


def _share_heads(q, k):
    """Grouped queries: H / Hkv query heads in a row share one key head, repeated here -> (B, H, M, D)."""
    return k if k.shape[1] == q.shape[1] else k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)


def _attention_torch(q, k, v, mask, scale):
    """torch's fused attention. But 16-bit inputs on a CPU are written out if short, else made float32 first.

    For torch's own bf16 backward is slow there. Forward and backward at (B, H, N, D) = (64, 4, 64, 32),
    causal, on one core with bf16 products: written out 5.5 ms, by way of float32 12 ms, as they are 34 ms.
    """
    k, v, dtype = _share_heads(q, k), _share_heads(q, v), q.dtype
    if q.device.type == "cpu" and dtype in (torch.bfloat16, torch.float16):
        seen = mask.dense()
        # over no keys this softmax would be nan; the fused attention gives 0 then, as the kernel does
        if seen.numel() <= 256**2 and bool(seen.any(-1).all()):
            scores = (q * scale) @ k.mT + seen.to(dtype).log()          # log 1 = 0, log 0 = -inf
            return scores.softmax(-1) @ v                               # softmax sums in float32 inside
        q, k, v = q.float(), k.float(), v.float()
    lower = mask.name == "causal" and q.shape[2] == k.shape[2]          # torch has this mask built in
    dense = None if lower or mask.name == "full" else mask.dense(q.device)
    return F.scaled_dot_product_attention(q, k, v, dense, is_causal=lower, scale=scale).to(dtype)


# The kernels. All tensors are contiguous: (B, H, n, D) is B H matrices n x D in a row, matrix z = b H + h
# starting at z n D. A program takes a tile of I queries of one head and walks along the keys, J at a time.
# tl.dot is the product of two tiles on the tensor cores. They know float32 only with 10 bits of mantissa
# (tf32): "tf32x3" splits each number into a large and a small part of 10 bits and adds three of the four
# products, all but small x small; 16-bit inputs do not need it. Sums are always float32. tl.static_range is
# unrolled by the compiler, for which `run` then is a number: it leaves the comparisons of whole tiles out.


@jit
def _load(matrix, rows, n, D: tl.constexpr, CHECK: tl.constexpr):
    """The given rows (I,) of the n x D matrix at this pointer -> (I, D). CHECK: rows from n on are 0."""
    at = matrix + rows[:, None] * D + tl.arange(0, D)[None, :]
    if CHECK:
        return tl.load(at, mask=rows[:, None] < n, other=0.0)
    return tl.load(at)


@jit
def _store(matrix, tile, rows, n, D: tl.constexpr):
    """Write a tile (I, D) to the given rows of the n x D matrix, in its dtype."""
    at = matrix + rows[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(at, tile.to(matrix.dtype.element_ty), mask=rows[:, None] < n)


@jit
def _fold(m, u, w, q, k, v, i, start, end, col_end, lo, hi, M, scale, D: tl.constexpr, BLOCK: tl.constexpr,
          MASKED: tl.constexpr):
    """Merge the keys lo .. hi - 1 into the summaries of a tile of I queries. This loop is flash attention.

    m, u (I,), w (I, D): the summaries so far. q (I, D): the queries. k, v: pointers to the head's keys and
    values, M x D each. i, start, end (I,): numbers of the queries, and which keys they see. scale holds the
    factor log2 e. MASKED: compare every pair, with col_end too unless it is None.

    `_merge` is not called: the sums of a tile are made at the new maximum at once, and only the old ones must
    be brought there.
    """
    for j0 in range(lo, hi, BLOCK):
        j = j0 + tl.arange(0, BLOCK)                                # (J,) the keys of this tile
        keys = _load(k, j, M, D, MASKED)                            # (J, D)
        s = tl.dot(q, tl.trans(keys), input_precision="tf32x3")     # (I, J) scores, not yet scaled
        if MASKED:
            seen = (start[:, None] <= j[None, :]) & (j[None, :] < end[:, None])
            if col_end is not None:
                seen = seen & (i[:, None] < tl.load(col_end + j, mask=j < M, other=0)[None, :])
            s = tl.where(seen, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1) * scale)                 # (I,) scale > 0: order stays
        # a query that has seen no key has m_new = -inf, and -inf - -inf is nan: shift by 0, so p = 2^-inf = 0
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)        # (I,)
        p = tl.exp2(s * scale - shift[:, None])                     # (I, J) relative to the new maximum
        old = tl.exp2(m - shift)                                    # (I,) at most 1: the old sums shrink so
        values = _load(v, j, M, D, MASKED)                          # (J, D)
        # p is rounded to the dtype of v, because the tensor cores want two factors of one dtype: an error of
        # at most 2^-9 of each weight in bf16, which has 8 bits. u sums p as it was before
        w = w * old[:, None]
        w = tl.dot(p.to(values.dtype), values, w, input_precision="tf32x3")     # (I, D): w + p v
        u = u * old + tl.sum(p, 1)                                  # (I,)
        m = m_new
    return m, u, w


@kernel
def _attention_forward(q, k, v, o, lse, row_start, row_end, col_end, bounds, N, M, scale,
                       GROUP: tl.constexpr, D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """A program for each tile of queries of each head: output (I, D), log-sum-exp (I,) for the backward."""
    tiles = tl.cdiv(N, BLOCK_Q)
    z = (tl.program_id(0) // tiles).to(tl.int64)        # which of the B H matrices; z N D may exceed 32 bits
    tile = tiles - 1 - tl.program_id(0) % tiles         # causal: the last rows see most, so they start first
    i = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)          # (I,)
    start = tl.load(row_start + i, mask=i < N, other=0)
    end = tl.load(row_end + i, mask=i < N, other=0)     # rows from N on: start = end = 0, they see nothing
    queries = _load(q + z * N * D, i, N, D, True)       # (I, D)
    # GROUP = H / Hkv query heads in a row share a key head: z = b H + h needs b Hkv + h // GROUP = z // GROUP
    keys, values = k + (z // GROUP) * M * D, v + (z // GROUP) * M * D   # pointers
    # 1. the summary of no keys
    m = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    u = tl.zeros([BLOCK_Q], tl.float32)
    w = tl.zeros([BLOCK_Q, D], tl.float32)
    # 2. the three runs of `Mask.tiles`: partly seen, whole, partly seen
    for run in tl.static_range(3):
        lo, hi = tl.load(bounds + tile * 4 + run), tl.load(bounds + tile * 4 + run + 1)
        m, u, w = _fold(m, u, w, queries, keys, values, i, start, end, col_end, lo, hi, M, scale, D, BLOCK_K,
                        MASKED=run != 1)
    # 3. finish; a query that saw no key has u = 0 and gives 0
    _store(o + z * N * D, w / tl.where(u == 0, 1.0, u)[:, None], i, N, D)
    tl.store(lse + z * N + i, m + tl.log2(u), mask=i < N)               # in base 2, as the backward wants it


# The backward pass. The forward keeps o, and for each query one number, lse_i = log sum_j e^(s_ij) (in the
# kernels log2 sum_j 2^(..), as all is in base 2). From it every weight comes back, tile by tile: p_ij =
# e^(s_ij - lse_i), the finished softmax, without looking for a maximum. Write dx for dL/dx, and go through
# the forward from its end, where do is given (FlashAttention-2, Algorithm 2):
#
#     o = p v              dv = p^T do                     a value receives what it was weighted with
#                          dp = do v^T                     dp_ij = do_i . v_j
#     p = softmax(s)       ds_ij = p_ij (dp_ij - delta_i)  delta_i = sum_j p_ij dp_ij
#     s = scale q k^T      dq = scale ds k,  dk = scale ds^T q
#
# The third line: raising s_ij takes weight from all other keys in proportion, ∂p_ik/∂s_ij = p_ik ([j = k] -
# p_ij), so a key gains only if its dp is above the average, delta_i. That seems to need all keys before the
# first can be used, but sum_j p_ij (do_i . v_j) = do_i . (sum_j p_ij v_j) = do_i . o_i, the product of two
# rows at hand. Two keys with equal scores, values 1 and 3, do = 1: p = .5 .5, o = 2, dp = 1 3, delta = 2,
# ds = -.5 +.5.
#
# Two kernels, because dq sums over keys, and dk and dv over queries: each program owns the rows that it sums,
# nobody adds to memory that others write, and the result never depends on who comes first. The price: p is
# computed twice. A query that sees no key has lse = -inf, so p = 2^inf until the comparison puts 0 in its
# place.


@kernel
def _attention_dq(q, k, v, do, dq, lse, delta, row_start, row_end, col_end, bounds, N, M, scale,
                  GROUP: tl.constexpr, D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """A program for each tile of queries of each head: dq (I, D)."""
    tiles = tl.cdiv(N, BLOCK_Q)
    z = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tiles - 1 - tl.program_id(0) % tiles
    i = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)                      # (I,)
    start = tl.load(row_start + i, mask=i < N, other=0)[:, None]    # (I, 1), to be compared with (1, J)
    end = tl.load(row_end + i, mask=i < N, other=0)[:, None]
    queries = _load(q + z * N * D, i, N, D, True)                   # (I, D)
    grads = _load(do + z * N * D, i, N, D, True)                    # (I, D): do
    row_lse = tl.load(lse + z * N + i, mask=i < N, other=0.0)       # (I,)
    row_delta = tl.load(delta + z * N + i, mask=i < N, other=0.0)   # (I,)
    acc = tl.zeros([BLOCK_Q, D], tl.float32)
    for run in tl.static_range(3):
        for j0 in range(tl.load(bounds + tile * 4 + run), tl.load(bounds + tile * 4 + run + 1), BLOCK_K):
            j = j0 + tl.arange(0, BLOCK_K)                          # (J,)
            keys = _load(k + (z // GROUP) * M * D, j, M, D, run != 1)           # (J, D)
            values = _load(v + (z // GROUP) * M * D, j, M, D, run != 1)         # (J, D)
            s = tl.dot(queries, tl.trans(keys), input_precision="tf32x3")       # (I, J)
            p = tl.exp2(s * scale - row_lse[:, None])                           # (I, J)
            if run != 1:
                col = tl.load(col_end + j, mask=j < M, other=0)[None, :]
                p = tl.where((start <= j[None, :]) & (j[None, :] < end) & (i[:, None] < col), p, 0.0)
            dp = tl.dot(grads, tl.trans(values), input_precision="tf32x3")      # (I, J)
            ds = p * (dp - row_delta[:, None])                                  # (I, J)
            acc = tl.dot(ds.to(keys.dtype), keys, acc, input_precision="tf32x3")            # (I, D)
    _store(dq + z * N * D, acc * (scale * 0.6931471805599453), i, N, D)     # scale holds log2 e: times log 2


@kernel
def _attention_dkv(q, k, v, do, dk, dv, lse, delta, row_start, row_end, col_end, bounds, N, M, scale,
                   GROUP: tl.constexpr, D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """A program for each tile of keys of each key head: dk, dv (J, D), over the queries of GROUP heads."""
    tiles = tl.cdiv(M, BLOCK_K)
    z = (tl.program_id(0) // tiles).to(tl.int64)                    # which of the B Hkv matrices
    tile = tl.program_id(0) % tiles                           # the first keys are seen most: start them first
    j = tile * BLOCK_K + tl.arange(0, BLOCK_K)                      # (J,)
    keys = _load(k + z * M * D, j, M, D, True)                      # (J, D)
    values = _load(v + z * M * D, j, M, D, True)                    # (J, D)
    col = tl.load(col_end + j, mask=j < M, other=0)[:, None]        # (J, 1): here tiles are (keys, queries)
    acc_k = tl.zeros([BLOCK_K, D], tl.float32)
    acc_v = tl.zeros([BLOCK_K, D], tl.float32)
    for head in range(z * GROUP, z * GROUP + GROUP):
        for run in tl.static_range(3):
            for i0 in range(tl.load(bounds + tile * 4 + run), tl.load(bounds + tile * 4 + run + 1), BLOCK_Q):
                i = i0 + tl.arange(0, BLOCK_Q)                      # (I,)
                queries = _load(q + head * N * D, i, N, D, run != 1)            # (I, D)
                grads = _load(do + head * N * D, i, N, D, run != 1)             # (I, D)
                row_lse = tl.load(lse + head * N + i, mask=i < N, other=0.0)
                row_delta = tl.load(delta + head * N + i, mask=i < N, other=0.0)
                s = tl.dot(keys, tl.trans(queries), input_precision="tf32x3")   # (J, I)
                p = tl.exp2(s * scale - row_lse[None, :])                       # (J, I)
                if run != 1:
                    start = tl.load(row_start + i, mask=i < N, other=0)[None, :]
                    end = tl.load(row_end + i, mask=i < N, other=0)[None, :]
                    p = tl.where((start <= j[:, None]) & (j[:, None] < end) & (i[None, :] < col), p, 0.0)
                acc_v = tl.dot(p.to(grads.dtype), grads, acc_v, input_precision="tf32x3")       # (J, D)
                dp = tl.dot(values, tl.trans(grads), input_precision="tf32x3")  # (J, I)
                ds = p * (dp - row_delta[None, :])                              # (J, I)
                acc_k = tl.dot(ds.to(queries.dtype), queries, acc_k, input_precision="tf32x3")  # (J, D)
    _store(dk + z * M * D, acc_k * (scale * 0.6931471805599453), j, M, D)
    _store(dv + z * M * D, acc_v, j, M, D)


# BLOCK_Q, BLOCK_K, warps, stages for 16-bit inputs. A program is run by that many warps, of 32 threads each;
# stages is how many loads run ahead of the arithmetic, each with a tile of its own in the shared memory of
# the processor. "large" GPUs have 227 KB of that: sm_90 (H100), sm_100 (B200); "small" ones, all others, at
# least 99 KB. All this changes the speed and not the result: any powers of two from 16 on would do. "large":
# the fastest of eight to eleven tried on an H200 (bf16, batch 4, 1024 / D heads, 4,096 tokens, causal); the
# slowest of those took 1.5 to 4.4 times as long. "small": chosen by what the compiler reports (no registers
# spilled into memory), never timed.
TILES = {  # large, D <= 64   large, D <= 128  small, D <= 64   small, D <= 128
    "forward": [(64, 64, 4, 3), (128, 64, 8, 3), (128, 64, 8, 3), (128, 32, 8, 3)],
    "dq": [(64, 64, 4, 3), (128, 64, 8, 3), (128, 64, 8, 2), (128, 32, 8, 2)],
    "dkv": [(64, 64, 4, 2), (64, 64, 4, 2), (32, 128, 8, 2), (64, 64, 8, 2)],
}


def _capability(x):
    """(9, 0) means sm_90; (0, 0) a CPU, where kernels are interpreted."""
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else (0, 0)


def _tiles(name, q):
    major = _capability(q)[0]
    if major == 0:                                          # the interpreter: anything will do
        return 64, 32, 4, 1
    if q.dtype == torch.float32:    # twice as wide, three products for one; 64 can fail, see decode_attention
        return 32, 32, 8, 2
    return TILES[name][(0 if major in (9, 10) else 2) + (0 if q.shape[-1] <= 64 else 1)]


def _launch_attention(function, name, q, k, v, *tensors, mask, scale):
    (B, H, N, D), (Hkv, M) = q.shape, k.shape[1:3]
    block_q, block_k, warps, stages = _tiles(name, q)
    programs = B * Hkv * -(-M // block_k) if name == "dkv" else B * H * -(-N // block_q)
    lists = mask.for_kernel(q.device, block_q, block_k, name == "dkv")
    _launch(q, function, programs, q, k, v, *tensors, *lists, N, M, scale * LOG2_E, GROUP=H // Hkv, D=D,
            BLOCK_Q=block_q, BLOCK_K=block_k, num_warps=warps, num_stages=stages)


class _Attention(torch.autograd.Function):
    """The three kernels as one differentiable function of contiguous tensors."""

    @staticmethod
    def forward(ctx, q, k, v, mask, scale):
        o = torch.empty_like(q)
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        _launch_attention(_attention_forward, "forward", q, k, v, o, lse, mask=mask, scale=scale)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.how = {"mask": mask, "scale": scale}
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable          # a second derivative is an error, not silently zero
    def backward(ctx, do):
        q, k, v, o, lse = ctx.saved_tensors
        do = do.contiguous()                                # after a .sum() it is one number, repeated
        delta = (do.float() * o.float()).sum(-1)            # (B, H, N)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        _launch_attention(_attention_dq, "dq", q, k, v, do, dq, lse, delta, **ctx.how)
        _launch_attention(_attention_dkv, "dkv", q, k, v, do, dk, dv, lse, delta, **ctx.how)
        return dq, dk, dv, None, None


def attention(q, k, v, mask=None, scale=None):
    """Masked attention with gradients: q (B, H, N, D), k and v (B, Hkv, M, D) -> (B, H, N, D). Hkv divides H.

    mask: a Mask, or None for all. scale: D^-0.5 unless given. A query that sees no key gives 0. Autocast
    casts the inputs to its dtype. Kernels: float32, bf16, fp16; D <= 128, padded with zeros to a power of
    two; q, k, v are copied unless contiguous; a head holds fewer than 2^31 numbers; no second derivatives.

    >>> x = torch.randn(1, 2, 5, 16)
    >>> torch.allclose(attention(x, x, x, causal(5))[:, :, 0], x[:, :, 0])    # token 0 sees only itself
    True
    """
    device = q.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    scale = _check_attention("attention", q, k, v, scale)
    N, M, D = q.shape[2], k.shape[2], q.shape[3]
    mask = full(N, M) if mask is None else mask
    _check(isinstance(mask, Mask), "attention: mask must come from causal(), scales(), ..., or be None")
    _check(mask.shape == (N, M), f"attention: mask {mask.name} is {mask.shape}, the scores are {(N, M)}")
    with torch.autocast(device, enabled=False):
        if path(q).name == "reference":
            return _attention_torch(q, k, v, mask, scale)
        return _Attention.apply(*_for_kernel("attention", q, k, v), mask, scale)[..., :D].to(q.dtype)


def _check_attention(op, q, k, v, scale):
    """What both paths need; returns the scale."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    wanted = f"{op}: {shapes} must be (B, H, N, D), twice (B, Hkv, M, D), Hkv divides H, none empty"
    _check(q.dim() == k.dim() == 4 and k.shape == v.shape and min(*q.shape[1:], *k.shape[1:]) > 0, wanted)
    B, H, N, D = q.shape
    _check((k.shape[0], k.shape[3]) == (B, D) and H % k.shape[1] == 0, wanted)
    _check(q.dtype == k.dtype == v.dtype, f"{op}: q, k, v are {q.dtype}, {k.dtype}, {v.dtype}, not one dtype")
    scale = D ** -0.5 if scale is None else scale
    _check(scale > 0, f"{op}: scale {scale} must be positive, or the largest q . k is not the largest score")
    return scale


def _for_kernel(op, *tensors):
    """The tensors as kernels read them: contiguous, last dimension a power of two, at least 16.

    Zeros behind q and k add nothing to their product; zeros behind v give zeros, which the caller cuts off.
    """
    D = tensors[0].shape[-1]
    _check(D <= 128, f'{op}: no kernel for head size {D} > 128; use("reference")')
    ready = []
    for x in tensors:
        known = x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        _check(known, f'{op}: no kernel for {x.dtype}; cast to float32, or use("reference")')
        x = x.float() if interpreting() else x         # the interpreter computes bf16 wrongly, without a word
        if D < _power_of_two(D):                        # else F.pad would copy, a whole cache at every token
            x = F.pad(x, (0, _power_of_two(D) - D))
        ready.append(x.contiguous())
    return ready


def _power_of_two(n):
    return max(16, 1 << (n - 1).bit_length())               # 17 -> 32; tl.dot wants sides of at least 16


# --- decode_attention ---------------------------------------------------------------------------------------


def _seen_by_new(q, k_cache, length, causal):
    """Boolean (B, 1, R, S), or (1, 1, R, S) for one length: which places of the cache each new token sees."""
    R, S = q.shape[2], k_cache.shape[2]
    later = torch.arange(R - 1, -1, -1, device=q.device) * int(causal)         # (R,) new ones it must not see
    end = torch.as_tensor(length, device=q.device).view(-1, 1) - later          # (B, R)
    return torch.arange(S, device=q.device) < end[:, None, :, None]


def decode_reference(q, k_cache, v_cache, length, scale=None, causal=True):
    """`attention_reference` where each sample has a length of its own; arguments as in `decode_attention`.

    A step reads every cached key and value once, 2 S D numbers a head, for a handful of queries. One program
    for each head would leave most of a GPU idle meanwhile; hence the split over the keys below.
    """
    k, v = _share_heads(q, k_cache), _share_heads(q, v_cache)                       # (B, H, S, D)
    scores = (q @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)         # (B, H, R, S)
    return finish(summarize(scores.masked_fill(~_seen_by_new(q, k, length, causal), -INF), v))[0]


@kernel
def _decode_chunks(q, k, v, part_o, part_lse, lengths, R, S, rows, chunks, scale, HEADS: tl.constexpr,
                   CAUSAL: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """A program for each chunk of keys of each key head: output and log-sum-exp for all queries of the head.

    The queries of the H / Hkv heads that share a key head lie one after the other, R tokens each: rows =
    R H / Hkv, row x is token x % R. One tile of ROWS >= rows holds them: tl.dot wants 16 rows or more anyway.
    """
    z = (tl.program_id(0) // chunks).to(tl.int64)       # which of the B Hkv matrices; HEADS = Hkv
    chunk = tl.program_id(0) % chunks
    x = tl.arange(0, ROWS)
    length = tl.minimum(tl.load(lengths + z // HEADS), S)               # beyond S lies somebody else's memory
    # (ROWS,): one past the last key that each sees; + x * 0 makes a tile of a number
    end = length - (R - 1 - x % R) if CAUSAL else length + x * 0
    size = tl.cdiv(tl.cdiv(length, chunks), BLOCK) * BLOCK              # equal parts, but in whole tiles
    lo = chunk * size
    hi = tl.minimum(lo + size, length)
    queries = _load(q + z * rows * D, x, rows, D, True)                 # (ROWS, D)
    m = tl.full([ROWS], float("-inf"), tl.float32)
    u = tl.zeros([ROWS], tl.float32)
    w = tl.zeros([ROWS, D], tl.float32)
    m, u, w = _fold(m, u, w, queries, k + z * S * D, v + z * S * D, x, x * 0, end, None, lo, hi, length,
                    scale, D, BLOCK, MASKED=True)
    part = tl.program_id(0).to(tl.int64) * rows         # part_lse (B Hkv, chunks, rows), part_o (.., rows, D)
    _store(part_o + part * D, w / tl.where(u == 0, 1.0, u)[:, None], x, rows, D)
    tl.store(part_lse + part + x, m + tl.log2(u), mask=x < rows)        # in base 2; -inf if it saw no key


@kernel
def _decode_merge(part_o, part_lse, o, rows, chunks, D: tl.constexpr, CHUNKS: tl.constexpr):
    """A program for each query: its outputs from all chunks become one (D,).

    A finished chunk is like one key with score lse and value o: its summary is m = lse, u = 1, w = o. So this
    is `summarize` with chunks for keys; a chunk in which the query saw no key weighs 2^-inf = 0.
    """
    x = tl.program_id(0)                                # query x % rows of matrix x // rows, as stored
    c = tl.arange(0, CHUNKS)                            # CHUNKS >= chunks, a power of two
    at = ((x // rows).to(tl.int64) * chunks + c) * rows + x % rows      # (CHUNKS,)
    lse = tl.load(part_lse + at, mask=c < chunks, other=float("-inf"))
    m = tl.max(lse, 0)
    weight = tl.exp2(lse - tl.where(m == float("-inf"), 0.0, m))        # (CHUNKS,)
    d = tl.arange(0, D)
    values = tl.load(part_o + at[:, None] * D + d[None, :], mask=c[:, None] < chunks, other=0.0)
    w, u = tl.sum(weight[:, None] * values, 0), tl.sum(weight, 0)       # (D,) and a number
    tl.store(o + x.to(tl.int64) * D + d, (w / tl.where(u == 0, 1.0, u)).to(o.dtype.element_ty))


def _decode_triton(q, k, v, lengths, scale, causal):
    (B, H, R, D), (Hkv, S) = q.shape, k.shape[1:3]
    rows = R * H // Hkv
    block, stages = (16, 2) if q.dtype == torch.float32 else (64, 3)    # keys of a tile
    chunks = min(64, -(-S // 256))              # of 256 keys or, as 64 a head fill a GPU, of S / 64
    part_o = torch.empty(B * Hkv, chunks, rows, D, dtype=torch.float32, device=q.device)
    part_lse = torch.empty(B * Hkv, chunks, rows, dtype=torch.float32, device=q.device)
    _launch(q, _decode_chunks, B * Hkv * chunks, q, k, v, part_o, part_lse, lengths, R, S, rows, chunks,
            scale * LOG2_E, HEADS=Hkv, CAUSAL=causal, D=D, ROWS=_power_of_two(rows), BLOCK=block,
            num_warps=4, num_stages=stages)
    if chunks == 1:
        return part_o.view(q.shape).to(q.dtype)
    o = torch.empty_like(q)
    _launch(q, _decode_merge, B * Hkv * rows, part_o, part_lse, o, rows, chunks, D=D,
            CHUNKS=1 << (chunks - 1).bit_length(), num_warps=4)
    return o


_causal = causal                                        # which the argument `causal` hides below


def decode_attention(q, k_cache, v_cache, length, scale=None, causal=True):
    """R new tokens against a cache of S places: q (B, H, R, D), caches (B, Hkv, S, D) -> (B, H, R, D).

    length: how many tokens the cache holds, *the R new ones included*; an int, or (B,) integers. The new
    tokens are the last R of them: query r sees the keys j < length - (R - 1 - r), or with causal=False all
    (the tokens of one scale see one another). No mask is needed: what a new token sees is a prefix of the
    cache, one number. An int above S is an error; a tensor is not looked at (the CPU would have to wait for
    the GPU), and the kernel reads S places then.

    Kernel: dtypes and D as for `attention`. It has no gradient, and takes R H / Hkv <= 32 queries of a key
    head. Else `attention` runs or, with lengths in a tensor, torch. A cache that is not contiguous, or whose
    D is not 16, 32, 64 or 128, is copied at every call.
    """
    op, S = "decode_attention", k_cache.shape[2]
    if torch.is_autocast_enabled(q.device.type):
        q = q.to(k_cache.dtype)                         # the cache is what it is
    scale = _check_attention(op, q, k_cache, v_cache, scale)
    B, H, R, D = q.shape
    if isinstance(length, int):
        _check(R <= length <= S, f"{op}: length {length} must be from {R} (new) to {S} (places)")
    else:
        length = torch.as_tensor(length, device=q.device)
        _check(length.shape == (B,), f"{op}: length {tuple(length.shape)} must be one int or of shape ({B},)")
    # The queries of a key head share one tile; more than 32 would need one of 64 rows. There, with 8 warps,
    # Triton multiplied float32 on sm_90 in pieces 8 wide (wgmma m64n8k8): the likely cause of an illegal
    # memory access on an H200
    few = R * H // k_cache.shape[1] <= 32
    with torch.autocast(q.device.type, enabled=False):
        if path(q).name == "triton" and few and not _needs_gradient(q, k_cache, v_cache):
            if isinstance(length, int):                 # filled by the GPU: nothing is copied to it
                lengths = torch.full((B,), length, dtype=torch.int32, device=q.device)
            else:
                lengths = length.to(torch.int32).contiguous()
            tensors = _for_kernel(op, q, k_cache, v_cache)
            return _decode_triton(*tensors, lengths, scale, causal)[..., :D].to(q.dtype)
        if not isinstance(length, int):
            seen = _seen_by_new(q, k_cache, length, causal)
            k, v = _share_heads(q, k_cache), _share_heads(q, v_cache)
            return F.scaled_dot_product_attention(q, k, v, seen, scale=scale)
        mask = _causal(R, length) if causal and R > 1 else full(R, length)
        k_filled, v_filled = k_cache[:, :, :length], v_cache[:, :, :length]
        if path(q).name == "triton":                    # many new tokens, such as a prompt
            return attention(q, k_filled, v_filled, mask, scale)
        return _attention_torch(q, k_filled, v_filled, mask, scale)


# --- scan_attention -----------------------------------------------------------------------------------------


def scan_reference(s, v):
    """Softmax over every prefix, written out with N x N weights: s (.., N), v (.., N, D) -> (.., N, D)."""
    past = torch.ones(s.shape[-1], s.shape[-1], dtype=torch.bool, device=s.device).tril()
    return s[..., None, :].masked_fill(~past, -INF).softmax(-1) @ v


def _scan_torch(s, v, before):
    """Parallel scan (Hillis and Steele): log2 N rounds, not N steps -> outputs (.., N, D), last summary.

    Place t starts as the summary of key t alone, and merges with the place 1, then 2, then 4, ... before it:

        at first    0     1      2      3      4          a-b: the summary of the keys a .. b
        round 1     0     0-1    1-2    2-3    3-4
        round 2     0     0-1    0-2    0-3    1-4
        round 3     0     0-1    0-2    0-3    0-4

    `before`, the summary of what came earlier, stands in front as one more place.
    """
    dim, places, step = s.dim() - 1, s.shape[-1] + 1, 1
    own = s, torch.ones_like(s), v                      # of a single key: m = s, u = e^0, w = e^0 v
    now = [torch.cat([x.unsqueeze(dim), y], dim) for x, y in zip(before, own)]
    while step < places:
        left = [x.narrow(dim, 0, places - step) for x in now]           # narrow: a slice, here of the places
        right = [x.narrow(dim, step, places - step) for x in now]
        now = [torch.cat([x.narrow(dim, 0, step), y], dim) for x, y in zip(now, merge(left, right))]
        step *= 2
    return finish(now)[0].narrow(dim, 1, places - 1), tuple(x.select(dim, places - 1) for x in now)


@kernel
def _scan_prefixes(s, v, o, m0, u0, w0, m1, u1, w1, N, D: tl.constexpr, BLOCK: tl.constexpr):
    """A program for each row of scores: scan a chunk of BLOCK keys, merge it with all before, go on.

    m0, u0, w0: the summary of what came earlier; m1, u1, w1: of everything. The scan of a triple wants three
    tiles of one shape, so m and u are repeated along D.
    """
    row, d = tl.program_id(0).to(tl.int64), tl.arange(0, D)
    m = tl.load(m0 + row) * 1.4426950408889634 + d * 0.0            # (D,): + d * 0.0 repeats it; in base 2
    u = tl.load(u0 + row) + d * 0.0                                 # (D,)
    w = tl.load(w0 + row * D + d)                                   # (D,)
    one = tl.full([BLOCK, D], 1.0, tl.float32)
    for j0 in range(0, N, BLOCK):
        j = j0 + tl.arange(0, BLOCK)                                # (BLOCK,)
        score = tl.load(s + row * N + j, mask=j < N, other=float("-inf")).to(tl.float32) * 1.4426950408889634
        value = _load(v + row * N * D, j, N, D, True).to(tl.float32)            # (BLOCK, D)
        pm, pu, pw = tl.associative_scan((score[:, None] * one, one, value), 0, _merge)
        pm, pu, pw = _merge(m[None, :], u[None, :], w[None, :], pm, pu, pw)     # (BLOCK, D): of keys 0 .. j
        _store(o + row * N * D, pw / tl.where(pu == 0, 1.0, pu), j, N, D)
        last = (j == j0 + BLOCK - 1)[:, None]           # the summary so far; keys from N on add nothing
        m = tl.sum(tl.where(last, pm, 0.0), 0)
        u = tl.sum(tl.where(last, pu, 0.0), 0)
        w = tl.sum(tl.where(last, pw, 0.0), 0)
    tl.store(m1 + row, tl.max(m, 0) * 0.6931471805599453)        # one of the D equal numbers, in base e again
    tl.store(u1 + row, tl.max(u, 0))
    tl.store(w1 + row * D + d, w)


def scan_attention(s, v, state=None, return_state=False):
    """Attention as an RNN (Aaren): scores s (.., N), values v (.., N, D) -> every prefix (.., N, D).

    s are the scores of one fixed query. state: the summary (m, u, w) of everything before, as return_state
    gives it back. A sequence fed in pieces, or token by token in constant memory, gives the same outputs as
    fed whole. Where a gradient is asked for, the torch path runs also on a GPU. Kernel: D <= 128, in float32.

    >>> s, v = torch.randn(2, 9), torch.randn(2, 9, 3)
    >>> out, state = scan_attention(s[:, :7], v[:, :7], return_state=True)
    >>> rest = scan_attention(s[:, 7:], v[:, 7:], state)
    >>> torch.allclose(rest, scan_attention(s, v)[:, 7:], atol=1e-6)
    True
    """
    shapes = f"s {tuple(s.shape)} and v {tuple(v.shape)}"
    _check(s.shape == v.shape[:-1] and s.numel() > 0, f"scan_attention: {shapes} must be (.., N), (.., N, D)")
    if state is None:                                   # the summary of no keys
        state = torch.full_like(s[..., 0], -INF), torch.zeros_like(s[..., 0]), torch.zeros_like(v[..., 0, :])
    if path(s).name == "reference" or _needs_gradient(s, v, *state):
        out, state = _scan_torch(s, v, state)
    else:
        N, D = v.shape[-2:]
        values, w = _for_kernel("scan_attention", v, state[2])
        before = [x.float().contiguous() for x in (state[0], state[1], w)]
        out, after = torch.empty_like(values), [torch.empty_like(x) for x in before]
        block = max(16, 1024 // values.shape[-1])       # 1024 numbers a tile
        _launch(s, _scan_prefixes, s.numel() // N, s.contiguous(), values, out, *before, *after, N,
                D=values.shape[-1], BLOCK=block)
        out, state = out[..., :D].to(v.dtype), (after[0], after[1], after[2][..., :D])
    return (out, state) if return_state else out


# --- sample -------------------------------------------------------------------------------------------------


def truncate(logits, top_k=0, top_p=1.0):
    """Logits (.., V), all but the likeliest at -inf: first top-k, then top-p on what remains. 0 and 1.0: off.

    top-k keeps the k largest; top-p keeps a token iff the tokens *strictly* likelier than it hold less than
    top_p of the mass, so at least one. Tokens tied with the last one kept are all kept (torch.topk would pick
    one).

    >>> truncate(torch.tensor([0.5, 0.25, 0.125, 0.125]).log(), top_p=0.7).exp()        # 0.5 < 0.7: two stay
    tensor([0.5000, 0.2500, 0.0000, 0.0000])
    """
    if 0 < top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, dim=-1).values[..., -1:]          # (.., 1) of those to keep
        logits = logits.masked_fill(logits < smallest, -INF)
    if top_p < 1:
        ordered = logits.sort(dim=-1, descending=True).values           # (.., V)
        p = ordered.float().softmax(-1)
        likelier = p.cumsum(-1) - p                                     # mass of the tokens before each
        kept = (likelier < top_p).sum(-1, keepdim=True).clamp(min=1)    # (.., 1); the sum is 0 if p is nan
        logits = logits.masked_fill(logits < ordered.gather(-1, kept - 1), -INF)
    return logits


def sample_reference(logits, temperature, top_k, top_p, noise):
    """Divide, truncate, race: token j arrives at the time noise_j / p_j, where noise_j is a unit exponential.

    So it arrives later than t with probability e^(-p_j t), and is the first with probability

        integral over t >= 0 of  p_j e^(-p_j t)  prod_{i != j} e^(-p_i t)  =  p_j / sum_i p_i.

    A draw is an argmax, and p need not sum to one.
    """
    logits = truncate(logits.float() / temperature, top_k, top_p)
    p = (logits - logits.amax(-1, keepdim=True)).exp()      # (.., V), 1 for the likeliest
    return (p / noise).argmax(-1)


@jit
def _keep_likeliest(p, weight, need):
    """p (V,) >= 0, with 0 below t, the largest t such that the weights of all p >= t sum to `need` or more.

    Exact and without a sort, by halving an interval of integers that holds t. Five probabilities in per cent,
    p = 50, 20, 15, 10, 5, weight = p, need = 80 (top-p 0.8):

        t in  0 .. 50: try 25, 50 is too little                   t in 12 .. 17: try 15, 85 is enough
        t in  0 .. 24: try 12, 50 + 20 + 15 = 85 is enough        t in 15 .. 17: try 16, 70 is too little
        t in 12 .. 24: try 18, 50 + 20 = 70 is too little         t = 15: the three likeliest stay

    Weight 1 and need k is top-k. Floats >= 0 are ordered like their bits read as an integer (bitcast): 0.25,
    0.5, 0.75, 1 are 3E800000, 3F000000, 3F400000, 3F800000. So 31 rounds find t among all 2^31 of them.
    """
    lo, hi = 0, tl.max(p, 0).to(tl.int32, bitcast=True)
    for _ in range(31):
        middle = lo + ((hi - lo + 1) >> 1)
        enough = tl.sum(tl.where(p >= middle.to(tl.float32, bitcast=True), weight, 0.0), 0) >= need
        lo, hi = tl.where(enough, middle, lo), tl.where(enough, hi, middle - 1)
    return tl.where(p >= lo.to(tl.float32, bitcast=True), p, 0.0)


@kernel
def _sample(logits, noise, out, V, temperature, top_k, top_p, TOP_K: tl.constexpr, TOP_P: tl.constexpr,
            BLOCK: tl.constexpr):
    """A program for each row, which stays in registers: logits and noise are read once, a token written."""
    row, j = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    x = tl.load(logits + row * V + j, mask=j < V, other=float("-inf")).to(tl.float32) / temperature
    p = tl.exp2((x - tl.max(x, 0)) * 1.4426950408889634)    # (BLOCK,)
    p = tl.where(p > 0, p, 0.0)                            # nan is never drawn: it could point beyond the row
    if TOP_K:
        p = _keep_likeliest(p, 1.0, top_k)
    if TOP_P:
        p = _keep_likeliest(p, p, top_p * tl.sum(p, 0))
    race = p / tl.load(noise + row * V + j, mask=j < V, other=1.0)
    tl.store(out + row, tl.argmax(race, 0))


def sample(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None, noise=None):
    """A token a row: logits (.., V) -> (..) int64 from softmax(truncate(logits / temperature, top_k, top_p)).

    temperature 0 is argmax. noise: (.., V) unit exponentials, for exact tests; else drawn from `generator`.
    One on the CPU gives the same noise on every device, at the price of a copy. Kernel: V <= 32768, what
    registers hold; probabilities that round to one float32 are tied.
    """
    V = logits.shape[-1]
    _check(temperature >= 0, f"sample: temperature {temperature} must not be negative")
    _check(top_k >= 0, f"sample: top_k {top_k} must be 0 (off) or positive")
    _check(0 < top_p <= 1, f"sample: top_p {top_p} must be above 0 and at most 1 (off)")
    _check(noise is None or noise.shape == logits.shape, f"sample: noise must be {tuple(logits.shape)}")
    if temperature == 0:
        return logits.argmax(-1)
    if noise is None:
        where = logits.device if generator is None else generator.device
        noise = torch.empty(logits.shape, dtype=torch.float32, device=where).exponential_(generator=generator)
        noise = noise.clamp_(min=1e-30).to(logits.device)   # an exponential of 0 would win against any p
    if path(logits).name == "reference":
        return sample_reference(logits, temperature, top_k, top_p, noise)
    _check(V <= 32768, f'sample: no kernel for {V} logits a row; take at most 32768, or use("reference")')
    out = torch.empty(logits.shape[:-1], dtype=torch.long, device=logits.device)
    block = max(128, _power_of_two(V))
    _launch(logits, _sample, out.numel(), logits.contiguous(), noise.contiguous(), out, V, float(temperature),
            float(top_k), float(top_p), TOP_K=0 < top_k < V, TOP_P=top_p < 1, BLOCK=block,
            num_warps=min(32, max(4, block // 1024)))
    return out


# --- verify -------------------------------------------------------------------------------------------------


def verify_reference(p_target, p_draft, drafts, uniforms, noise):
    """Algorithm 1 of arXiv:2211.17192 for B chains of g drafted tokens at once; shapes as in `verify`.

    Why x comes out with probability p(x): it is drafted and stays with q(x) min(1, p(x)/q(x)) = min(p, q)(x);
    a draft is refused with 1 - sum min(p, q) = sum max(p - q, 0), and then x is drawn with max(p - q, 0)(x)
    over that same sum. Together min(p, q)(x) + max(p - q, 0)(x) = p(x).
    """
    g = drafts.shape[1]
    p = p_target[:, :g].gather(-1, drafts[..., None]).squeeze(-1)       # (B, g) p of each drafted token
    q = p_draft.gather(-1, drafts[..., None]).squeeze(-1)               # (B, g)
    n = (uniforms * q < p).long().cumprod(-1).sum(-1)                 # (B,) how many before the first refusal
    row = torch.arange(len(drafts), device=drafts.device)
    p_next = p_target[row, n]                                           # (B, V)
    q_next = F.pad(p_draft, (0, 0, 0, 1))[row, n]                       # (B, V) 0 if all g were accepted
    residual = (p_next - q_next).clamp(min=0)
    empty = residual.sum(-1, keepdim=True) == 0                         # p == q, refused by rounding only
    token = (torch.where(empty, p_next, residual) / noise).argmax(-1)   # (B,) the race of `sample_reference`
    place = torch.arange(g + 1, device=drafts.device)
    after = torch.where(place == n[:, None], token[:, None], -1)        # (B, g + 1)
    return torch.where(place < n[:, None], F.pad(drafts, (0, 1)), after), n


@kernel
def _verify(p, q, drafts, uniforms, noise, tokens, accepted, gamma, V, GAMMA: tl.constexpr,
            BLOCK: tl.constexpr):
    """A program for each chain of gamma drafted tokens, which lie in a tile of GAMMA >= gamma."""
    row = tl.program_id(0).to(tl.int64)
    p, q = p + row * (gamma + 1) * V, q + row * gamma * V               # the distributions of this chain
    t = tl.arange(0, GAMMA)
    # 1. as many tokens stay as there are before the first refusal
    draft = tl.load(drafts + row * gamma + t, mask=t < gamma, other=0)  # (GAMMA,)
    inside = (t < gamma) & (draft >= 0) & (draft < V)             # a token that does not exist has p = q = 0,
    p_t = tl.load(p + t * V + draft, mask=inside, other=0.0)            # and 0 >= 0 below: it is refused
    q_t = tl.load(q + t * V + draft, mask=inside, other=0.0)
    u_t = tl.load(uniforms + row * gamma + t, mask=t < gamma, other=0.0)
    refused = (t < gamma) & (u_t * q_t >= p_t)
    n = tl.min(tl.where(refused, t, gamma), 0)
    tl.store(tokens + row * (gamma + 1) + t, draft, mask=t < n)    # the places after the last hold -1 already
    # 2. a race over max(p - q, 0), block by block, and beside it one over p, should p - q be empty
    best, best_p, index, index_p = 0.0, 0.0, 0, 0
    for j0 in range(0, V, BLOCK):
        j = j0 + tl.arange(0, BLOCK)
        p_j = tl.load(p + n * V + j, mask=j < V, other=0.0)                     # (BLOCK,)
        q_j = tl.load(q + n * V + j, mask=j < tl.where(n < gamma, V, 0), other=0.0)     # q has no row gamma
        e_j = tl.load(noise + row * V + j, mask=j < V, other=1.0)
        race, race_p = tl.maximum(p_j - q_j, 0.0) / e_j, p_j / e_j
        top, top_p = tl.max(race, 0), tl.max(race_p, 0)
        index = tl.where(top > best, j0 + tl.argmax(race, 0), index)
        index_p = tl.where(top_p > best_p, j0 + tl.argmax(race_p, 0), index_p)
        best, best_p = tl.maximum(best, top), tl.maximum(best_p, top_p)
    tl.store(tokens + row * (gamma + 1) + n, tl.where(best > 0, index, index_p))
    tl.store(accepted + row, n)


def verify(p_target, p_draft, drafts, uniforms, noise):
    """Speculative sampling of drafted chains: the tokens that come out follow p_target exactly.

    p_target (B, g+1, V), p_draft (B, g, V): probabilities, after temperature and truncation; drafts (B, g)
    int64, drawn from p_draft; uniforms u (B, g) in [0, 1); noise (B, V) unit exponentials. Draft d_t stays if
    u_t q(d_t) < p(d_t), so with probability min(1, p / q). After the first refusal one token is drawn from
    max(p - q, 0), after none a bonus token from the last row of p. Returns tokens (B, g+1), -1 after the
    last, and n_accepted (B,). Any V, any g, also 0. A draft outside 0 .. V - 1 is an index error of torch;
    the kernel, which cannot raise one, refuses it.

    >>> p = torch.tensor([[[.5, .5], [0., 1.]]])        # g = 1, V = 2; p == q: 0 stays, then 1 from [0, 1]
    >>> verify(p, p[:, :1], torch.tensor([[0]]), torch.tensor([[.9]]), torch.ones(1, 2))
    (tensor([[0, 1]]), tensor([1]))
    """
    _check(drafts.dim() == 2, f"verify: drafts must be (batch, gamma), not {tuple(drafts.shape)}")
    (B, g), V = drafts.shape, p_target.shape[-1]
    wanted = {"p_target": (B, g + 1, V), "p_draft": (B, g, V), "uniforms": (B, g), "noise": (B, V)}
    for (name, shape), x in zip(wanted.items(), (p_target, p_draft, uniforms, noise)):
        _check(x.shape == shape, f"verify: {name} is {tuple(x.shape)}, beside drafts {(B, g)} not {shape}")
    if path(p_target).name == "reference":
        return verify_reference(p_target, p_draft, drafts, uniforms, noise)
    tokens, n = drafts.new_full((B, g + 1), -1), drafts.new_empty(B)
    x = [t.contiguous() for t in (p_target.float(), p_draft.float(), drafts, uniforms.float(), noise.float())]
    block = min(4096, max(128, _power_of_two(V)))
    _launch(drafts, _verify, B, *x, tokens, n, g, V, GAMMA=_power_of_two(g), BLOCK=block, num_warps=8)
    return tokens, n


# --- nearest_code -------------------------------------------------------------------------------------------


@torch.no_grad()
def nearest_code(points, codebook, return_distance=False):
    """Index of the nearest code, the lowest among equals: points (N, D), codebook (K, D) -> (N,) int64.

    |x - c|^2 = |x|^2 + 2 (|c|^2 / 2 - x . c), and |x|^2 does not change which c is nearest: the search is one
    matrix product instead of N K D differences. No gradient: quantizers pass one straight through. In
    float32; codes whose distances agree to about 1e-6 |x| |c| may swap. return_distance: also |x - c|^2 (N,).

    >>> nearest_code(torch.tensor([[0.2], [0.9]]), torch.tensor([[0.], [1.]]))
    tensor([0, 1])
    """
    fits = points.dim() == codebook.dim() == 2 and points.shape[1] == codebook.shape[1]
    shapes = f"points {tuple(points.shape)} and codebook {tuple(codebook.shape)}"
    _check(fits and len(codebook) > 0, f"nearest_code: {shapes} must be (N, D) and (K, D), K at least 1")
    points, codebook = points.detach().float(), codebook.detach().float()
    half = 0.5 * codebook.square().sum(1)                               # (K,)
    index = torch.empty(len(points), dtype=torch.long, device=points.device)
    # 8 MB of distances at a time stay in a CPU's cache. One block, used again: new ones left gaps
    # in the heap, 2.5 GB in all
    rows = max(1, 2**21 // len(codebook))
    distances = torch.empty(rows, len(codebook), device=points.device)
    with torch.autocast(points.device.type, enabled=False):             # in bf16 neighbours would swap
        for i in range(0, len(points), rows):
            part = points[i:i + rows]
            d = torch.addmm(half, part, codebook.T, alpha=-1, out=distances[:len(part)])  # |c|^2 / 2 - x . c
            torch.argmin(d, dim=1, out=index[i:i + rows])
    if return_distance:
        return index, (points - codebook[index]).square().sum(1)
    return index


# --- which path runs ----------------------------------------------------------------------------------------

Path = namedtuple("Path", "name reason")                # name: "reference" (plain torch) or "triton"


class use:
    """`use("reference")` chooses the path from here on, `with use("triton"): ...` for a block. At the start
    "auto", or what the environment variable NANO_KERNELS says."""

    choice = "auto"

    def __init__(self, choice):
        _check(choice in ("auto", "reference", "triton"), f'use({choice!r}): "auto", "reference" or "triton"')
        self.before, use.choice = use.choice, choice

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        use.choice = self.before


def interpreting():
    """True if Triton was imported under TRITON_INTERPRET=1: kernels run on CPU tensors, slowly, for tests."""
    return triton is not None and triton.knobs.runtime.interpret


def path(x):
    """Path(name, reason) that an op takes for the tensor x; ValueError if use("triton") is impossible."""
    if use.choice == "reference":
        return Path("reference", 'chosen by use("reference") or NANO_KERNELS=reference')
    forced = use.choice == "triton"
    if x.is_cuda and triton is not None:
        generation = "sm_%d%d" % _capability(x)
        if torch.compiler.is_compiling() and not forced:
            return Path("reference", "inside torch.compile, which makes kernels of its own")
        if _capability(x)[0] < 8 and not forced:
            return Path("reference", f"{generation} is older than sm_80, which the kernels are made for")
        return Path("triton", f"GPU, {generation}")
    why = "Triton is not installed" if triton is None else f"tensor on {x.device.type}"
    if not forced:
        return Path("reference", why)
    _check(interpreting(), f'use("triton"): {why}; move it to a GPU, or import under TRITON_INTERPRET=1')
    return Path("triton", "CPU tensor, Triton's interpreter (slow, for tests)")


def _needs_gradient(*tensors):
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _launch(x, function, programs, *arguments, **constants):
    """Start that many programs. Triton launches on the current device: make that the one of x."""
    with torch.cuda.device_of(x):
        function[(programs,)](*arguments, **constants)


def _check(ok, message):
    if not ok:
        raise ValueError(message)


use(os.environ.get("NANO_KERNELS", "auto"))
