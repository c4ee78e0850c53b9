"""Attention and sampling in Triton, each op beside the plain torch that it must equal.

    op                 what it does                                      kernel   gradient
    attention          one kernel for every mask of the course           yes      yes
    decode_attention   few new queries against a long KV cache           yes      no
    scan_attention     "Attention as an RNN": all prefixes at once       yes      torch only
    sample             temperature, top-k, top-p, exponential race       yes      -
    verify             accept / resample / bonus of drafted tokens       yes      -
    nearest_code       argmin_k |x - c_k|^2, and the residual            yes      -

CPU tensors take the torch path, CUDA tensors the Triton kernel; `use("reference")` or `use("triton")` overrides that, `path(tensor)` says
which path runs and why. Nothing here needs a GPU or Triton to be imported, and no shape is silently handled wrong: what a kernel does
not support raises a ValueError that says what to do.

One idea carries the first three ops. A set of keys, seen from one query, is summarised by three numbers: m, the largest score; u, the sum
of e^(s-m); w, the sum of e^(s-m) v. Two summaries of disjoint sets merge into one (see `merge`), and attention is w / u of the whole set:

    flash attention       fold over tiles          ((tile 0 + tile 1) + tile 2) + ...         one program per query tile
    split-K decoding      tree over chunks         (chunk 0 + chunk 1) + (chunk 2 + ...)      many programs per query
    attention as an RNN   scan over single keys    k0, k0 + k1, k0 + k1 + k2, ...             every prefix is an answer

Papers: FlashAttention (2205.14135, 2307.08691), Online softmax (1805.02867), Flash-Decoding (Dao et al. 2023), Attention as an RNN
(2405.13956), VAR (2404.02905) and HMAR for the scale masks, speculative sampling (2211.17192, 2302.01318).

    python kernels.py                   errors of every op against float64; on a GPU also times and ratios to torch   (10 s on a CPU)
    python kernels.py --plot out.png    the same, drawn
    TRITON_INTERPRET=1 pytest tests/test_kernels.py      the kernels themselves, run on the CPU by Triton's interpreter

Read in order: merge, masks, attention. Each op: torch reference with its memory traffic, kernel, wrapper with checks, limits.
Left out on purpose: dropout, paged caches, fp8, tensor descriptors and warp specialisation (faster on Hopper, unreadable here).
"""

import argparse
import functools
import os
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # a * b + c in one instruction; Triton 3.9 warns unless this is said
try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:  # macOS, Windows: every op still runs, by its torch path
    triton, jit, tl = None, lambda fn: fn, SimpleNamespace(constexpr=None)

INF, LOG2_E, LN_2 = float("inf"), 1.4426950408889634, 0.6931471805599453

# --------------------------------------------------------------------------------------------------------------------------------------
# Which path runs
# --------------------------------------------------------------------------------------------------------------------------------------


class Path(NamedTuple):
    name: str  # "reference" (plain torch) or "triton"
    reason: str


class use:
    """Choose the path: `use("reference")` from here on, or `with use("triton"): ...` for a block. "auto" is the default."""

    choice = "auto"

    def __init__(self, choice):
        _check(choice in ("auto", "reference", "triton"), f'use({choice!r}): choose "auto", "reference" or "triton"')
        self.before, use.choice = use.choice, choice

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        use.choice = self.before


def interpreting():
    """True where Triton was imported under TRITON_INTERPRET=1: kernels then run on CPU tensors, slowly, for tests."""
    return triton is not None and triton.knobs.runtime.interpret


def path(x):
    """Path(name, reason) that an op takes for tensor `x` under the present `use` choice. Raises ValueError if that is impossible."""
    if use.choice == "reference":
        return Path("reference", 'chosen by use("reference")')
    if x.is_cuda and triton is not None:
        major, minor = torch.cuda.get_device_capability(x.device)
        if major >= 8 or use.choice == "triton":
            return Path("triton", f"CUDA tensor, sm_{major}{minor}")
        return Path("reference", f"sm_{major}{minor} is older than sm_80, which the kernels are written for")
    why = "triton is not installed" if triton is None else f"tensor on {x.device.type}"
    if use.choice == "triton":
        if not x.is_cuda and interpreting():
            return Path("triton", "CPU tensor, Triton's interpreter (slow, for tests)")
        raise ValueError(f'use("triton"): {why}; move the tensors to a CUDA device, or set TRITON_INTERPRET=1 before the import')
    return Path("reference", why)


def _check(ok, message):
    if not ok:
        raise ValueError(message)


# --------------------------------------------------------------------------------------------------------------------------------------
# The merge operator
# --------------------------------------------------------------------------------------------------------------------------------------


def summarize(scores, values):
    """Summary (m, u, w) of a set of keys: scores (..., N, M), values (..., M, D) -> (..., N), (..., N), (..., N, D). Empty: (-inf, 0, 0).

    >>> summarize(torch.tensor([[0., 0.]]), torch.tensor([[1.], [3.]]))      # largest score 0, two keys of weight e^0, and 1 + 3
    (tensor([0.]), tensor([2.]), tensor([[4.]]))
    """
    m = scores.detach().amax(-1)  # a shift, no more: it drops out of w / u, so no gradient needs to pass
    p = torch.exp(scores - _finite(m)[..., None])
    return m, p.sum(-1), p @ values


def merge(a, b):
    """Summary of the union of two disjoint sets of keys. Associative and commutative, with (-inf, 0, 0) as neutral element.

    (m, u, w) + (m', u', w') = (M, u e^(m-M) + u' e^(m'-M), w e^(m-M) + w' e^(m'-M)),   M = max(m, m')        (2405.13956, section 3.2)
    """
    (m1, u1, w1), (m2, u2, w2) = a, b
    m = torch.maximum(m1.detach(), m2.detach())
    x, y = torch.exp(m1 - _finite(m)), torch.exp(m2 - _finite(m))
    return m, u1 * x + u2 * y, w1 * x[..., None] + w2 * y[..., None]


def finish(state):
    """Output w / u and log-sum-exp m + log u of a summary; the empty set gives 0 and -inf."""
    m, u, w = state
    return w / torch.where(u == 0, 1.0, u)[..., None], m + u.log()


def _finite(m):
    return torch.where(m == -INF, 0.0, m)  # -inf - -inf is nan; 0 lets the weights of an empty set come out as e^-inf = 0


@jit
def _merge(m1, u1, w1, m2, u2, w2):
    """`merge` for kernels, with scores in base 2 (times log2 e): exp2 is the instruction that the hardware has."""
    m = tl.maximum(m1, m2)
    shift = tl.where(m == float("-inf"), 0.0, m)
    x, y = tl.exp2(m1 - shift), tl.exp2(m2 - shift)
    return m, u1 * x + u2 * y, w1 * x + w2 * y


# --------------------------------------------------------------------------------------------------------------------------------------
# Masks: every mask of the course is three lists of integers
# --------------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Mask:
    """Query i sees key j  iff  row_start[i] <= j < row_end[i]  and  i < col_end[j]        (all int32, on the CPU)

    row_start, row_end: (1 or B, N); col_end: (1 or B, M). O(N + M) memory instead of N x M, and whole tiles can be skipped or
    left unmasked by comparing a few integers. `a & b` is the intersection. Build a mask once and pass it to every layer.
    """

    row_start: torch.Tensor
    row_end: torch.Tensor
    col_end: torch.Tensor
    name: str = "mask"
    cache: dict = field(default_factory=dict, repr=False)  # dense forms and tile tables, by device

    @property
    def columns(self):
        """Whether any col_end hides anything (trees): the kernels skip that comparison otherwise."""
        return self.cached("columns", lambda: bool((self.col_end < self.shape[0]).any()))

    @property
    def shape(self):
        return self.row_start.shape[-1], self.col_end.shape[-1]

    def __and__(self, other):
        _check(self.shape == other.shape, f"cannot intersect masks of shapes {self.shape} and {other.shape}")
        start, end = torch.maximum(self.row_start, other.row_start), torch.minimum(self.row_end, other.row_end)
        return Mask(start, end, torch.minimum(self.col_end, other.col_end), f"{self.name} & {other.name}")

    def cached(self, key, make):
        if key not in self.cache:
            self.cache[key] = make()
        return self.cache[key]

    def dense(self, device="cpu"):
        """Boolean (1 or B, 1, N, M), True where query i sees key j."""
        return self.cached(("dense", str(device)), lambda: self._dense().to(device))

    def _dense(self):
        i, j = torch.arange(self.shape[0])[:, None], torch.arange(self.shape[1])
        seen = (self.row_start[..., None] <= j) & (j < self.row_end[..., None]) & (i < self.col_end[:, None, :])
        return seen[:, None]

    def tensors(self, device):
        """row_start, row_end, col_end on a device, and 1 if there is one mask per sample, 0 if one serves all."""

        def move():
            per_sample = max(len(self.row_start), len(self.col_end))
            return *(x.expand(per_sample, -1).contiguous().to(device) for x in (self.row_start, self.row_end, self.col_end)), int(per_sample > 1)

        return self.cached(("tensors", str(device)), move)

    def tiles(self, block_m, block_n, device="cpu"):
        """Which tiles a kernel visits, per query tile and per key tile: each (bounds (1 or B, tiles, 4), first, last).

        The four int32 are positions lo <= full_lo <= full_hi <= hi: lo..hi holds every tile with something to see, full_lo..full_hi are seen
        whole. causal(8).tiles(2, 2): query tile 2 (rows 4, 5) has [0, 0, 4, 6]: keys 0..3 unmasked, 4..5 masked, 6..7 never touched.
        """

        def make():
            n, m = self.shape
            start, end, col = (_edges(x, b, size) for x, b, size in ((self.row_start, block_m, n), (self.row_end, block_m, n), (self.col_end, block_n, m)))
            i0, j0 = torch.arange(0, n, block_m)[:, None], torch.arange(0, m, block_n)
            i1, j1 = i0 + block_m, j0 + block_n
            some = (start[0][..., None] < j1) & (end[1][..., None] > j0) & (col[1][:, None, :] > i0)
            whole = (start[1][..., None] <= j0) & (end[0][..., None] >= j1) & (col[0][:, None, :] >= i1) & (i1 <= n) & (j1 <= m)
            return _runs(some, whole, block_n, device), _runs(some.mT, whole.mT, block_m, device)

        return self.cached(("tiles", block_m, block_n, str(device)), make)

    def draw(self):
        """Text picture, `#` where a query (row) sees a key (column)."""
        return "\n\n".join("\n".join("".join(".#"[x] for x in row) for row in one[0].tolist()) for one in self.dense())


def _edges(x, block, size):
    """Smallest and largest entry of every block of x (.., size) -> two (.., blocks)."""
    low, high = (F.pad(x, (0, -size % block), value=fill).unflatten(-1, (-1, block)) for fill in (2**31 - 1, -1))
    return low.amin(-1), high.amax(-1)


def _runs(some, whole, block, device):
    """Flags per tile (.., rows, tiles) -> positions (.., rows, 4), and which of the three runs between them occur at all: (first, last)."""
    tiles = some.shape[-1]
    t = torch.arange(tiles)
    lo, hi = torch.where(some, t, tiles).amin(-1), torch.where(some, t + 1, 0).amax(-1)
    lo, full_lo = torch.minimum(lo, hi), torch.where(whole, t, tiles).amin(-1)
    full_hi = torch.where(~whole & (t > full_lo[..., None]), t, tiles).amin(-1)
    none = full_lo == tiles
    at = torch.stack([lo, torch.where(none, lo, full_lo), torch.where(none, lo, full_hi), hi], -1)
    before, after = bool((at[..., 0] < at[..., 1]).any()), bool((at[..., 2] < at[..., 3]).any())
    return (at * block).int().contiguous().to(device), 0 if before else 1, 3 if after else 2


def _mask(name, row_start, row_end, m, col_end=None):
    row_start, row_end = torch.broadcast_tensors(torch.as_tensor(row_start), torch.as_tensor(row_end))
    n = row_end.shape[-1]
    col_end = torch.full((m,), n) if col_end is None else torch.as_tensor(col_end)
    return Mask(*(x.clamp(0, hi).int().reshape(-1, x.shape[-1]).contiguous() for x, hi in ((row_start, m), (row_end, m), (col_end, n))), name)


@functools.lru_cache(maxsize=256)
def full(n, m=None):
    """Everything: n queries see all m (default n) keys. What `mask=None` means."""
    m = n if m is None else m
    return _mask("full", torch.zeros(n), torch.full((n,), m), m)


@functools.lru_cache(maxsize=256)
def causal(n, m=None):
    """Every token sees itself and the past. With m > n keys the queries are the last n tokens (a chunk after a cached prefix).

    causal(4)  #...      causal(2, 5)  ####.
               ##..                    #####
               ###.
               ####
    """
    m = n if m is None else m
    _check(m >= n, f"causal({n}, {m}): needs at least as many keys as queries")
    return _mask("causal", torch.zeros(n), torch.arange(n) + 1 + m - n, m)


@functools.lru_cache(maxsize=256)
def window(n, w):
    """Sliding window: every token sees itself and the w - 1 tokens before.

    window(4, 2)  #...
                  ##..
                  .##.
                  ..##
    """
    _check(w >= 1, f"window({n}, {w}): the window must hold at least the token itself")
    return _mask("window", torch.arange(n) - w + 1, torch.arange(n) + 1, n)


def scales(counts):
    """Block-causal, next-scale prediction (VAR): a token of scale k sees all tokens of scales <= k. counts: tokens per scale.

    scales([1, 2, 3])  #.....
                       ###...
                       ###...
                       ######
                       ######
                       ######
    """
    return _scales("scales", tuple(counts), len(counts))


def markov(counts, previous=0):
    """Scales without memory (HMAR, M-VAR): a token of scale k sees scales k - previous .. k only. counts: tokens per scale.

    markov([1, 2, 3])  #.....        markov([1, 2, 3], previous=1)  #.....
                       .##...                                       ###...
                       .##...                                       ###...
                       ...###                                       .#####
                       ...###                                       .#####
                       ...###                                       .#####
    """
    return _scales("markov", tuple(counts), previous)


@functools.lru_cache(maxsize=256)
def _scales(name, counts, previous):
    _check(counts and min(counts) > 0, f"{name}({list(counts)}): needs a positive number of tokens for every scale")
    count = torch.tensor(counts)
    end = count.cumsum(0)
    start = end - count
    first = start[(torch.arange(len(counts)) - previous).clamp(min=0)]
    return _mask(name, first.repeat_interleave(count), end.repeat_interleave(count), sum(counts))


def tree(parents, prefix=0):
    """Tree of drafted tokens (SpecInfer): a node sees the prefix, its ancestors and itself. parents[i] is the parent of node i, -1 for a
    root. Nodes are numbered depth first, so that a subtree is a run of columns: the N x N mask is one integer per column.

    tree([-1, 0, 1, 0])   0      #...
                         / \\     ##..
                        1   3    ###.
                        |        #..#
                        2
    """
    parents = [int(x) for x in parents]
    n = len(parents)
    end, path_to_root = list(range(1, n + 1)), []
    for i, parent in enumerate(parents):
        while path_to_root and path_to_root[-1] != parent:
            path_to_root.pop()
        _check(parent == -1 or path_to_root, f"tree: node {i} does not follow its parent {parent} depth first; renumber the nodes in pre-order")
        path_to_root.append(i)
    for i in reversed(range(n)):
        if parents[i] >= 0:
            end[parents[i]] = max(end[parents[i]], end[i])
    return _mask("tree", torch.zeros(n), torch.arange(n) + 1 + prefix, prefix + n, [n] * prefix + end)


def padding(lengths, n, m=None):
    """Ragged batch: the n queries of sample b see its first lengths[b] keys (of m, default n). Combine: `causal(n) & padding(lengths, n)`.

    padding([2, 3], 3)  ##.   ###
                        ##.   ###
                        ##.   ###
    """
    lengths, m = torch.as_tensor(lengths).cpu().reshape(-1, 1), n if m is None else m
    _check(bool((lengths <= m).all()), f"padding: length {int(lengths.max())} exceeds the {m} keys")
    return _mask("padding", torch.zeros(len(lengths), n), lengths.expand(-1, n), m)


# --------------------------------------------------------------------------------------------------------------------------------------
# attention
# --------------------------------------------------------------------------------------------------------------------------------------


def attention_reference(q, k, v, mask=None, scale=None):
    """softmax(q k^T scale, masked) v written out; any float dtype. Returns output (B, H, N, D) and log-sum-exp (B, H, N).

    Traffic: writes and reads the N x M scores twice, 4 N M elements a head, against 2 (N + M) D for the kernel: at N = M = 4096, D = 64
    sixty-four times as much. Source of truth for tests; rows that see nothing give 0 and -inf.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k, v = _repeat_heads(q, k), _repeat_heads(q, v)
    scores = (q @ k.transpose(-1, -2)) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask.dense(q.device), -INF)
    return finish(summarize(scores, v))


def _repeat_heads(q, k):
    return k if k.shape[1] == q.shape[1] else k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # grouped queries


def _attention_torch(q, k, v, mask, scale):
    """The torch path. On a CPU and for short sequences scores written out in the inputs' dtype: there the backward of torch's fused
    attention is slow, several times so in bfloat16. Else torch's own fused attention."""
    k, v, dtype = _repeat_heads(q, k), _repeat_heads(q, v), q.dtype
    if not q.is_cuda and q.shape[2] * k.shape[2] <= 256**2 and (mask is None or mask.name in ("full", "causal", "scales", "markov")):
        scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-1, -2)
        if mask is not None and mask.name != "full":
            seen = mask.dense(q.device)
            scores = scores + torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -INF)
        return scores.softmax(-1) @ v  # softmax adds up in float32 whatever the dtype
    if not q.is_cuda and dtype in (torch.bfloat16, torch.float16):
        q, k, v = q.float(), k.float(), v.float()
    if mask is None or mask.name == "full":
        out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    elif mask.name == "causal" and q.shape[2] == k.shape[2]:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.dense(q.device), scale=scale)
    return out.to(dtype)


# The kernels. Strides are tuples (batch, head, row, dim). `scale` holds log2 e. Key tiles come in three runs (Mask.tiles): partly seen,
# seen whole (no comparison at all), partly seen; tiles that nobody sees are never loaded.


@jit
def _load(ptr, rows, dims, strides, n, D: tl.constexpr, CHECK: tl.constexpr):
    """Tile (rows, dims) of an (n, D) matrix; reads 0 outside. CHECK is False where the rows are known to be inside."""
    at = ptr + rows[:, None] * strides[2] + dims[None, :] * strides[3]
    if CHECK or dims.shape[0] != D:
        return tl.load(at, mask=(rows[:, None] < n) & (dims[None, :] < D), other=0.0)
    return tl.load(at)


@jit
def _store(ptr, x, rows, dims, strides, n, D: tl.constexpr):
    at = ptr + rows[:, None] * strides[2] + dims[None, :] * strides[3]
    tl.store(at, x.to(ptr.dtype.element_ty), mask=(rows[:, None] < n) & (dims[None, :] < D))


@jit
def _seen(i, j, start, end, col_end, M, COLS: tl.constexpr):
    """The mask of one tile, from integers. Queries beyond N come with start = end = 0 and see nothing."""
    seen = (start[:, None] <= j[None, :]) & (j[None, :] < end[:, None])
    if COLS:
        seen = seen & (i[:, None] < tl.load(col_end + j, mask=j < M, other=0)[None, :])
    return seen


@jit
def _fold(state, q, k, v, sk, sv, lo, hi, M, scale, rule, D: tl.constexpr, BLOCK_N: tl.constexpr, COLS: tl.constexpr,
          PRECISION: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """Merge the key tiles lo..hi into the summaries of a tile of queries. This loop is flash attention."""
    m, u, w = state
    i, start, end, col_end = rule
    d = tl.arange(0, w.shape[1])
    for j0 in range(lo, hi, BLOCK_N):
        j = j0 + tl.arange(0, BLOCK_N)
        s = tl.dot(q, tl.trans(_load(k, j, d, sk, M, D, MASKED)), input_precision=PRECISION)
        if MASKED:
            s = tl.where(_seen(i, j, start, end, col_end, M, COLS), s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1) * scale)
        shift = tl.where(m_new == float("-inf"), 0.0, m_new) if MASKED else m_new
        # `merge`, with the tile's own u' = sum(p) and w' = p v computed relative to the new maximum at once
        p, old = tl.exp2(s * scale - shift[:, None]), tl.exp2(m - shift)
        values = _load(v, j, d, sv, M, D, MASKED)
        m, u, w = m_new, u * old + tl.sum(p, 1), tl.dot(p.to(values.dtype), values, w * old[:, None], input_precision=PRECISION)
    return m, u, w


@jit
def _attention_forward(q, k, v, o, lse, starts, ends, col_end, tiles, sq, sk, sv, so, N, M, per_sample, scale,
                       GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                       FIRST: tl.constexpr, LAST: tl.constexpr, COLS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One program: one tile of queries of one head. The last tiles, which see most under a causal mask, start first."""
    tile, h, b = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    i, d = tile * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    # 1. this head's rows (64-bit: batch x heads x length x size overflows 32 bits) and what its queries see
    q, k, v = q + b * sq[0] + h * sq[1], k + b * sk[0] + h // GROUP * sk[1], v + b * sv[0] + h // GROUP * sv[1]
    sample = b * per_sample  # 0 where one mask serves the whole batch
    tiles += (sample * tl.num_programs(0) + tile) * 4
    start, end = tl.load(starts + sample * N + i, mask=i < N, other=0), tl.load(ends + sample * N + i, mask=i < N, other=0)
    rule = (i, start, end, col_end + sample * M)
    # 2. from the empty summary, through all key tiles
    q = _load(q, i, d, sq, N, D, True)
    m, u = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    w = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for part in tl.static_range(FIRST, LAST):
        lo, hi = tl.load(tiles + part), tl.load(tiles + part + 1)
        m, u, w = _fold((m, u, w), q, k, v, sk, sv, lo, hi, M, scale, rule, D, BLOCK_N, COLS, PRECISION, part != 1)
    # 3. finish; a query that saw nothing has u = 0 and gives 0
    _store(o + b * so[0] + h * so[1], w / tl.where(u == 0, 1.0, u)[:, None], i, d, so, N, D)
    tl.store(lse + (b * tl.num_programs(1) + h) * N + i, m + tl.log2(u), mask=i < N)  # in base 2, as the backward kernels want it


@jit
def _fold_dq(dq, q, do, k, v, sk, sv, lse, delta, lo, hi, M, scale, rule, D: tl.constexpr, BLOCK_N: tl.constexpr, COLS: tl.constexpr,
             PRECISION: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    i, start, end, col_end = rule
    d = tl.arange(0, dq.shape[1])
    for j0 in range(lo, hi, BLOCK_N):
        j = j0 + tl.arange(0, BLOCK_N)
        keys = _load(k, j, d, sk, M, D, MASKED)
        p = tl.exp2(tl.dot(q, tl.trans(keys), input_precision=PRECISION) * scale - lse[:, None])
        if MASKED:
            p = tl.where(_seen(i, j, start, end, col_end, M, COLS), p, 0.0)
        dp = tl.dot(do, tl.trans(_load(v, j, d, sv, M, D, MASKED)), input_precision=PRECISION)
        dq = tl.dot((p * (dp - delta[:, None])).to(keys.dtype), keys, dq, input_precision=PRECISION)
    return dq


@jit
def _attention_dq(q, k, v, o, do, dq, lse, delta, starts, ends, col_end, tiles, sq, sk, sv, so, sdo, sdq, N, M, per_sample, scale,
                  GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                  FIRST: tl.constexpr, LAST: tl.constexpr, COLS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """p = e^(s - lse) is recomputed; dp = do v^T; ds = p (dp - delta), delta = rowsum(do o); dq = scale ds k. Laid out as forward."""
    tile, h, b = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    i, d = tile * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    k, v = k + b * sk[0] + h // GROUP * sk[1], v + b * sv[0] + h // GROUP * sv[1]
    sample, row = b * per_sample, (b * tl.num_programs(1) + h) * N + i
    tiles += (sample * tl.num_programs(0) + tile) * 4
    start, end = tl.load(starts + sample * N + i, mask=i < N, other=0), tl.load(ends + sample * N + i, mask=i < N, other=0)
    rule = (i, start, end, col_end + sample * M)
    q = _load(q + b * sq[0] + h * sq[1], i, d, sq, N, D, True)
    do = _load(do + b * sdo[0] + h * sdo[1], i, d, sdo, N, D, True)
    o = _load(o + b * so[0] + h * so[1], i, d, so, N, D, True)
    rowsum = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta + row, rowsum, mask=i < N)  # for _attention_dkv, which runs after this kernel
    lse = tl.load(lse + row, mask=i < N, other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for part in tl.static_range(FIRST, LAST):
        lo, hi = tl.load(tiles + part), tl.load(tiles + part + 1)
        acc = _fold_dq(acc, q, do, k, v, sk, sv, lse, rowsum, lo, hi, M, scale, rule, D, BLOCK_N, COLS, PRECISION, part != 1)
    _store(dq + b * sdq[0] + h * sdq[1], acc * (scale * 0.6931471805599453), i, d, sdq, N, D)  # ln 2 undoes log2 e


@jit
def _fold_dkv(dk, dv, k, v, q, do, sq, sdo, lse, delta, lo, hi, N, scale, rule, D: tl.constexpr, BLOCK_M: tl.constexpr,
              COLS: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    j, starts, ends, col_end = rule
    d = tl.arange(0, dk.shape[1])
    for i0 in range(lo, hi, BLOCK_M):
        i = i0 + tl.arange(0, BLOCK_M)
        queries, row_lse = _load(q, i, d, sq, N, D, MASKED), tl.load(lse + i, mask=i < N, other=0.0)
        p = tl.exp2(tl.dot(k, tl.trans(queries), input_precision=PRECISION) * scale - row_lse[None, :])  # (keys, queries)
        if MASKED:
            start, end = tl.load(starts + i, mask=i < N, other=0), tl.load(ends + i, mask=i < N, other=0)
            seen = (start[None, :] <= j[:, None]) & (j[:, None] < end[None, :])
            if COLS:
                seen = seen & (i[None, :] < col_end[:, None])
            p = tl.where(seen, p, 0.0)
        grads, row_delta = _load(do, i, d, sdo, N, D, MASKED), tl.load(delta + i, mask=i < N, other=0.0)
        dv = tl.dot(p.to(grads.dtype), grads, dv, input_precision=PRECISION)
        ds = p * (tl.dot(v, tl.trans(grads), input_precision=PRECISION) - row_delta[None, :])
        dk = tl.dot(ds.to(queries.dtype), queries, dk, input_precision=PRECISION)
    return dk, dv


@jit
def _attention_dkv(q, k, v, do, dk, dv, lse, delta, starts, ends, col_end, tiles, sq, sk, sv, sdo, sdk, sdv, N, M, per_sample, scale,
                   GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                   FIRST: tl.constexpr, LAST: tl.constexpr, COLS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """dv = p^T do, dk = scale ds^T q. One program: one tile of keys, over all query heads of its group: no atomics, so the result does not
    depend on the order in which programs run."""
    tile, h, b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    j, d = tile * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    k, v = _load(k + b * sk[0] + h * sk[1], j, d, sk, M, D, True), _load(v + b * sv[0] + h * sv[1], j, d, sv, M, D, True)
    sample = b * per_sample
    tiles += (sample * tl.num_programs(0) + tile) * 4
    rule = (j, starts + sample * N, ends + sample * N, tl.load(col_end + sample * M + j, mask=j < M, other=0))
    acc_k, acc_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32), tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for g in range(GROUP):
        head = h * GROUP + g
        qh, doh, row = q + b * sq[0] + head * sq[1], do + b * sdo[0] + head * sdo[1], (b * tl.num_programs(1) * GROUP + head) * N
        for part in tl.static_range(FIRST, LAST):
            lo, hi = tl.load(tiles + part), tl.load(tiles + part + 1)
            acc_k, acc_v = _fold_dkv(acc_k, acc_v, k, v, qh, doh, sq, sdo, lse + row, delta + row, lo, hi, N, scale, rule,
                                     D, BLOCK_M, COLS, PRECISION, part != 1)  # fmt: skip
    _store(dk + b * sdk[0] + h * sdk[1], acc_k * (scale * 0.6931471805599453), j, d, sdk, M, D)
    _store(dv + b * sdv[0] + h * sdv[1], acc_v, j, d, sdv, M, D)


# (BLOCK_M, BLOCK_N, num_warps, num_stages) by kernel and head size. sm_80 stands for sm_80 .. sm_120, whose smallest members have 99 KB of
# shared memory; sm_90 is Hopper, 227 KB. Chosen from compile reports: no spills, and where possible two programs a multiprocessor.
TILES = {
    ("forward", "sm_90"): {64: (128, 64, 8, 3), 128: (128, 64, 8, 3)},
    ("forward", "sm_80"): {64: (128, 64, 8, 3), 128: (128, 32, 8, 3)},
    ("dq", "sm_90"): {64: (128, 64, 8, 3), 128: (128, 64, 8, 2)},
    ("dq", "sm_80"): {64: (128, 64, 8, 2), 128: (128, 32, 8, 2)},
    ("dkv", "sm_90"): {64: (64, 128, 8, 2), 128: (32, 128, 8, 2)},
    ("dkv", "sm_80"): {64: (32, 128, 8, 2), 128: (64, 64, 8, 2)},
}


def _arch(x):
    """Key into the tables of tile sizes."""
    if not x.is_cuda:
        return "interpreter"
    return "sm_90" if torch.cuda.get_device_capability(x.device)[0] == 9 else "sm_80"


def _tiles(kernel, q):
    if _arch(q) == "interpreter":
        return 64, 32, 4, 1
    if q.dtype == torch.float32:  # three tensor-core products for one, and twice the registers
        return 32, 32, 8, 2
    return TILES[kernel, _arch(q)][64 if q.shape[-1] <= 64 else 128]


def _precision(x):
    return "tf32x3" if x.dtype == torch.float32 else "tf32"  # the second is ignored for 16-bit inputs


def _padded(D):
    return max(16, 1 << (D - 1).bit_length())  # tl.arange wants powers of two, tl.dot at least 16


def _plan(kernel, q, k, mask, scale):
    """Grid, mask arguments and keywords of one launch."""
    (B, H, N, D), (_, Hkv, M, _) = q.shape, k.shape
    block_m, block_n, warps, stages = _tiles(kernel, q)
    rows, cols = mask.tiles(block_m, block_n, q.device)
    tiles, first, last = cols if kernel == "dkv" else rows
    starts, ends, col_end, per_sample = mask.tensors(q.device)
    grid = (tiles.shape[1], Hkv if kernel == "dkv" else H, B)
    options = dict(N=N, M=M, per_sample=per_sample, scale=scale * LOG2_E, GROUP=H // Hkv, D=D, BLOCK_D=_padded(D), BLOCK_M=block_m, BLOCK_N=block_n,
                   FIRST=first, LAST=last, COLS=mask.columns, PRECISION=_precision(q), num_warps=warps, num_stages=stages)  # fmt: skip
    return grid, (starts, ends, col_end, tiles), options


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, mask, scale):
        o, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
        grid, rule, options = _plan("forward", q, k, mask, scale)
        _attention_forward[grid](q, k, v, o, lse, *rule, q.stride(), k.stride(), v.stride(), o.stride(), **options)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.mask, ctx.scale = mask, scale
        ctx.mark_non_differentiable(lse)
        return o, lse

    @staticmethod
    def backward(ctx, do, _):
        q, k, v, o, lse = ctx.saved_tensors
        dq, dk, dv, delta = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(lse)
        strides = q.stride(), k.stride(), v.stride()
        grid, rule, options = _plan("dq", q, k, ctx.mask, ctx.scale)
        _attention_dq[grid](q, k, v, o, do, dq, lse, delta, *rule, *strides, o.stride(), do.stride(), dq.stride(), **options)
        grid, rule, options = _plan("dkv", q, k, ctx.mask, ctx.scale)
        _attention_dkv[grid](q, k, v, do, dk, dv, lse, delta, *rule, *strides, do.stride(), dk.stride(), dv.stride(), **options)
        return dq, dk, dv, None, None


def attention(q, k, v, mask=None, scale=None, return_lse=False):
    """Masked attention with gradients. q (B, H, N, D), k and v (B, Hkv, M, D), Hkv divides H (grouped queries); mask: a `Mask` or None.

    Returns (B, H, N, D) in q's dtype, and with return_lse the log-sum-exp of the scores (B, H, N), float32, without gradient.
    scale: default D^-0.5. Rows that see no key give 0 (and -inf). Under autocast the inputs are cast to the autocast dtype on a GPU.
    Kernel limits: float32 (in three tf32 products), bf16, fp16; head size up to 128 (padded to a power of two inside).

    >>> x = torch.randn(1, 2, 5, 16)
    >>> y = attention(x, x, x, causal(5))       # y[:, :, 0] == x[:, :, 0]: the first token sees only itself
    """
    if q.is_cuda and torch.is_autocast_enabled("cuda"):
        q, k, v = (x.to(torch.get_autocast_dtype("cuda")) for x in (q, k, v))
    _check_attention(q, k, v, mask, scale)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast(q.device.type, enabled=False):
        if path(q).name == "triton":
            _check_kernel("attention", q, k, v)
            x = [x.float() if interpreting() else x for x in (q, k, v)]  # the interpreter computes bf16 wrongly, without saying so
            out, lse = _Attention.apply(*x, full(q.shape[2], k.shape[2]) if mask is None else mask, scale)
            out, lse = out.to(q.dtype), lse * LN_2
        elif return_lse:
            out, lse = attention_reference(q, k, v, mask, scale)
        else:
            return _attention_torch(q, k, v, mask, scale)
    return (out, lse.detach().float()) if return_lse else out


def _check_kernel(op, *tensors):
    q = tensors[0]
    _check(q.dtype in (torch.float32, torch.bfloat16, torch.float16), f'{op}: the kernel takes float32, bfloat16, float16, not {q.dtype}; cast, or use("reference")')
    _check(q.shape[-1] <= 128, f'{op}: the kernel takes head sizes up to 128, not {q.shape[-1]}; use("reference") or more heads')
    for x in tensors:
        _check(sum((n - 1) * s for n, s in zip(x.shape[2:], x.stride()[2:])) < 2**31, f"{op}: one head spans 2^31 elements; make the tensor contiguous")


def _check_attention(q, k, v, mask, scale):
    _check(q.dim() == k.dim() == v.dim() == 4, f"attention: q, k, v must be (batch, heads, length, head size), got {q.dim()}, {k.dim()}, {v.dim()} dimensions")
    (B, H, N, D), (_, Hkv, M, _) = q.shape, k.shape
    _check(k.shape == v.shape, f"attention: k {tuple(k.shape)} and v {tuple(v.shape)} must have one shape; pad the head size of the smaller")
    _check(k.shape[0] == B and k.shape[3] == D, f"attention: q {tuple(q.shape)} and k {tuple(k.shape)} must agree in batch and head size")
    _check(H % Hkv == 0, f"attention: {H} query heads cannot be grouped over {Hkv} key heads; make the first a multiple of the second")
    _check(q.dtype == k.dtype == v.dtype, f"attention: dtypes {q.dtype}, {k.dtype}, {v.dtype} differ; cast q, k, v to one")
    _check(q.device == k.device == v.device, f"attention: q, k, v are on {q.device}, {k.device}, {v.device}; move them to one device")
    _check(scale is None or scale > 0, f"attention: scale {scale} must be positive; flip the sign of q instead")
    if mask is not None:
        _check(isinstance(mask, Mask), "attention: mask must come from causal(), scales(), ... (or Mask), not a tensor; None means full attention")
        _check(mask.shape == (N, M), f"attention: mask {mask.name} is {mask.shape}, but there are {N} queries and {M} keys")
        _check(mask.row_start.shape[0] in (1, B), f"attention: mask {mask.name} is for a batch of {mask.row_start.shape[0]}, q has {B}")


# --------------------------------------------------------------------------------------------------------------------------------------
# decode_attention
# --------------------------------------------------------------------------------------------------------------------------------------


def decode_reference(q, k_cache, v_cache, lengths, scale=None, causal=True):
    """Row by row, float dtype of the inputs: `attention_reference` on the filled part of each cache row.

    Traffic: every cached key and value is read once for few queries, 2 S D elements a head: the op is bound by memory, never by arithmetic.
    """
    B, _, R, _ = q.shape
    out = torch.empty_like(q)
    for b, n in enumerate(torch.as_tensor(lengths).expand(B).tolist()):
        seen = torch.arange(n) < torch.arange(n - R + 1, n + 1)[:, None] if causal else torch.ones(R, n, dtype=torch.bool)
        mask = _mask("decode", torch.zeros(R), seen.sum(-1), n)
        out[b] = attention_reference(q[b : b + 1], k_cache[b : b + 1, :, :n], v_cache[b : b + 1, :, :n], mask, scale)[0][0]
    return out


@jit
def _decode_chunks(q, k, v, part_m, part_u, part_w, lengths, sq, sk, sv, R, scale, GROUP: tl.constexpr, CAUSAL: tl.constexpr,
                   D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Grid (chunks, key heads, batch): one program summarises one chunk of one cache row for all queries of a group, reading it once."""
    chunk, h, b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    x, d = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    head, token = h * GROUP + x // R, x % R  # row x of the tile; rows beyond GROUP * R are padding
    used, length = x < GROUP * R, tl.load(lengths + b)
    end = tl.where(used, length - (R - 1 - token) if CAUSAL else length, 0)
    size = tl.cdiv(tl.cdiv(length, tl.num_programs(0)), BLOCK_N) * BLOCK_N  # equal chunks of what this row really holds
    lo, hi = chunk * size, tl.minimum(chunk * size + size, length)
    at = b * sq[0] + head[:, None] * sq[1] + token[:, None] * sq[2] + d[None, :] * sq[3]
    q = tl.load(q + at, mask=used[:, None] & (d[None, :] < D), other=0.0)
    m, u, w = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, BLOCK_D], tl.float32)
    rule = (x, tl.zeros([ROWS], tl.int32), end, lengths)
    k, v = k + b * sk[0] + h * sk[1], v + b * sv[0] + h * sv[1]
    m, u, w = _fold((m, u, w), q, k, v, sk, sv, lo, hi, length, scale, rule, D, BLOCK_N, False, PRECISION, True)
    row = ((b * tl.num_programs(1) * GROUP + head) * R + token) * tl.num_programs(0) + chunk
    tl.store(part_m + row, m, mask=used)
    tl.store(part_u + row, u, mask=used)
    tl.store(part_w + row[:, None] * D + d[None, :], w, mask=used[:, None] & (d[None, :] < D))


@jit
def _decode_merge(part_m, part_u, part_w, o, chunks, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Grid (batch * heads * tokens): the same operator once more, over the chunks of one query."""
    d, row = tl.arange(0, BLOCK_D), tl.program_id(0).to(tl.int64)
    part_m, part_u, part_w = part_m + row * chunks, part_u + row * chunks, part_w + row * chunks * D + d
    m, u, w = tl.load(part_m), tl.load(part_u), tl.load(part_w, mask=d < D, other=0.0)
    for c in range(1, chunks):
        m, u, w = _merge(m, u, w, tl.load(part_m + c), tl.load(part_u + c), tl.load(part_w + c * D, mask=d < D, other=0.0))
    tl.store(o + row * D + d, (w / tl.where(u == 0, 1.0, u)).to(o.dtype.element_ty), mask=d < D)


def _decode_triton(q, k, v, lengths, scale, causal):
    (B, H, R, D), Hkv, S = q.shape, k.shape[1], k.shape[2]
    rows, block_n = _padded(H // Hkv * R), 64 if q.dtype != torch.float32 else 16
    processors = 4 if not q.is_cuda else torch.cuda.get_device_properties(q.device).multi_processor_count
    chunks = max(1, min(-(-4 * processors // (B * Hkv)), -(-S // block_n)))  # four programs a multiprocessor, if there are that many tiles
    part_m, part_u = (torch.empty(B, H, R, chunks, device=q.device) for _ in range(2))
    part_w, o = torch.empty(B, H, R, chunks, D, device=q.device), torch.empty(B, H, R, D, dtype=q.dtype, device=q.device)
    _decode_chunks[(chunks, Hkv, B)](
        q, k, v, part_m, part_u, part_w, lengths, q.stride(), k.stride(), v.stride(), R, scale * LOG2_E, GROUP=H // Hkv, CAUSAL=causal,
        D=D, BLOCK_D=_padded(D), ROWS=rows, BLOCK_N=block_n, PRECISION=_precision(q), num_warps=4 if rows <= 16 else 8, num_stages=3,
    )  # fmt: skip
    _decode_merge[(B * H * R,)](part_m, part_u, part_w, o, chunks, D=D, BLOCK_D=_padded(D), num_warps=1)
    return o


def decode_attention(q, k_cache, v_cache, lengths, scale=None, causal=True):
    """Attention of R new tokens against a preallocated cache. No gradient.

    q (B, H, R, D); caches (B, Hkv, S, D), of which row b holds lengths[b] tokens, *the R new ones included*; lengths: int or (B,) integers.
    The new tokens are the last R: query r sees keys j < lengths[b] - (R - 1 - r), or with causal=False all lengths[b] (the tokens of a scale
    see one another). R > 1 verifies a drafted chain in one call. Returns (B, H, R, D).
    Kernel limits: those of `attention`, and R * H / Hkv <= 64 (a longer chunk is work for `attention` with causal(R, length)).
    """
    (B, H, R, D), S = q.shape, k_cache.shape[2]
    _check_attention(q, k_cache, v_cache, None, scale)
    scale = D**-0.5 if scale is None else scale
    if isinstance(lengths, int):
        _check(0 < lengths <= S, f"decode_attention: length {lengths} must be between 1 and the {S} places of the cache")
    else:
        lengths = torch.as_tensor(lengths, device=q.device)
        _check(lengths.shape == (B,), f"decode_attention: lengths {tuple(lengths.shape)} must be an int or of shape ({B},)")
    if path(q).name == "triton":
        _check_kernel("decode_attention", q, k_cache, v_cache)
        _check(R * H // k_cache.shape[1] <= 64, f"decode_attention: {R} tokens x {H // k_cache.shape[1]} heads a group exceed 64; use attention(mask=causal({R}, length))")
        lengths = torch.full((B,), lengths, dtype=torch.int32, device=q.device) if isinstance(lengths, int) else lengths.int()
        x = [t.float() if interpreting() else t for t in (q, k_cache, v_cache)]
        return _decode_triton(*x, lengths, scale, causal).to(q.dtype)
    if isinstance(lengths, int):  # the usual case: one length for the whole batch, so the filled part is a slice
        mask = _causal(R, lengths) if causal and R > 1 else None
        return _attention_torch(q, k_cache[:, :, :lengths], v_cache[:, :, :lengths], mask, scale)
    end = lengths[:, None] - torch.arange(R - 1, -1, -1, device=q.device) if causal else lengths[:, None].expand(B, R)
    seen = torch.arange(S, device=q.device) < end[:, None, :, None]
    return F.scaled_dot_product_attention(q, _repeat_heads(q, k_cache), _repeat_heads(q, v_cache), attn_mask=seen, scale=scale)


_causal = causal  # decode_attention has a parameter of that name


# --------------------------------------------------------------------------------------------------------------------------------------
# scan_attention
# --------------------------------------------------------------------------------------------------------------------------------------


def scan_reference(s, v):
    """Softmax over every prefix, written out: s (..., N), v (..., N, D) -> (..., N, D). Traffic: N x N weights, which the scan never forms."""
    n = s.shape[-1]
    past = torch.ones(n, n, dtype=torch.bool, device=s.device).tril()
    return s[..., None, :].expand(*s.shape, n).masked_fill(~past, -INF).softmax(-1) @ v


def _scan_torch(s, v, state):
    """log2 N rounds: in round r every position merges with the one 2^r before it, and so has seen 2^(r+1) keys (Hillis and Steele)."""
    m, u, w = s, torch.ones_like(s), v
    if state is not None:
        m, u, w = (torch.cat([x.unsqueeze(s.dim() - 1), y], s.dim() - 1) for x, y in zip(state, (m, u, w)))
    dim, step = s.dim() - 1, 1
    while step < m.shape[dim]:
        n = m.shape[dim] - step
        merged = merge([x.narrow(dim, 0, n) for x in (m, u, w)], [x.narrow(dim, step, n) for x in (m, u, w)])
        m, u, w = (torch.cat([x.narrow(dim, 0, step), y], dim) for x, y in zip((m, u, w), merged))
        step *= 2
    out = finish((m, u, w))[0]
    return out.narrow(dim, out.shape[dim] - s.shape[-1], s.shape[-1]), tuple(x.select(dim, -1) for x in (m, u, w))


@jit
def _scan_prefixes(s, v, o, m0, u0, w0, m1, u1, w1, N, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr):
    """Grid (rows): a scan inside each chunk of keys, then one merge with everything before it; reads and writes each value once."""
    row, d, n = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    s, v, o, state = s + row * N, v + row * N * D, o + row * N * D, row * D + d
    m = tl.load(m0 + row) * 1.4426950408889634 + tl.zeros([BLOCK_D], tl.float32)  # the scan wants equal shapes, so m and u repeat over d
    u, w = tl.load(u0 + row) + tl.zeros([BLOCK_D], tl.float32), tl.load(w0 + state, mask=d < D, other=0.0)
    for j0 in range(0, N, BLOCK_N):
        j = j0 + n
        at, inside = j[:, None] * D + d[None, :], (j[:, None] < N) & (d[None, :] < D)
        score = tl.load(s + j, mask=j < N, other=float("-inf")).to(tl.float32) * 1.4426950408889634
        value = tl.load(v + at, mask=inside, other=0.0).to(tl.float32)
        one = tl.zeros([BLOCK_N, BLOCK_D], tl.float32) + 1.0
        pm, pu, pw = tl.associative_scan((score[:, None] + one - 1.0, one, value), 0, _merge)
        pm, pu, pw = _merge(m[None, :], u[None, :], w[None, :], pm, pu, pw)
        tl.store(o + at, (pw / pu).to(o.dtype.element_ty), mask=inside)
        last = (n == BLOCK_N - 1)[:, None]  # keys beyond N weigh nothing, so the last row is the state after the chunk
        m, u, w = tl.sum(tl.where(last, pm, 0.0), 0), tl.sum(tl.where(last, pu, 0.0), 0), tl.sum(tl.where(last, pw, 0.0), 0)
    tl.store(m1 + row + d * 0, m * 0.6931471805599453, mask=d == 0)
    tl.store(u1 + row + d * 0, u, mask=d == 0)
    tl.store(w1 + state, w, mask=d < D)


def _scan_triton(s, v, state):
    lead, (N, D) = s.shape[:-1], v.shape[-2:]
    if state is None:
        state = s.new_full(lead, -INF, dtype=torch.float32), s.new_zeros(lead, dtype=torch.float32), v.new_zeros(*lead, D, dtype=torch.float32)
    before = [x.float().contiguous() for x in state]
    after, o = [torch.empty_like(x) for x in before], torch.empty(v.shape, dtype=v.dtype, device=v.device)
    block_d = _padded(D)
    _scan_prefixes[(lead.numel(),)](s.contiguous(), v.contiguous(), o, *before, *after, N, D=D, BLOCK_D=block_d, BLOCK_N=max(16, 1024 // block_d), num_warps=4 if block_d < 128 else 8)
    return o, tuple(after)


def scan_attention(s, v, state=None, return_state=False):
    """Attention as an RNN (Aaren): scores s (..., N) of one fixed query, values v (..., N, D) -> output for every prefix (..., N, D).

    state: the summary (m, u, w) of everything before, as returned with return_state; feeding a sequence in pieces, or one token at a time
    (N = 1, constant memory), gives the same outputs as feeding it whole.
    Where a gradient is needed the torch path runs, also on a GPU. Kernel limit: D <= 128.

    >>> out, state = scan_attention(s[:, :7], v[:, :7], return_state=True)
    >>> rest = scan_attention(s[:, 7:], v[:, 7:], state)             # == scan_attention(s, v)[:, 7:]
    """
    _check(s.shape == v.shape[:-1] and s.shape[-1] > 0, f"scan_attention: s {tuple(s.shape)} must be v {tuple(v.shape)} without its last dimension, not empty")
    needs_gradient = torch.is_grad_enabled() and (s.requires_grad or v.requires_grad)
    if path(s).name == "triton" and not needs_gradient:
        _check_kernel("scan_attention", v, s)
        x = [t.float() if interpreting() else t for t in (s, v)]
        out, state = _scan_triton(*x, state)
        out = out.to(v.dtype)
    else:
        out, state = _scan_torch(s, v, state)
    return (out, state) if return_state else out


# --------------------------------------------------------------------------------------------------------------------------------------
# sample
# --------------------------------------------------------------------------------------------------------------------------------------


def truncate(logits, top_k=0, top_p=1.0):
    """Logits (..., V) with all but the likeliest tokens set to -inf: first top-k, then top-p on what remains (0 and 1.0 switch them off).

    top-k keeps the k largest; top-p keeps a token iff the tokens *strictly* likelier than it hold less than top_p of the mass, so at least
    one stays. Tokens tied with the last one kept are all kept (torch.topk would pick among them).
    Traffic: a sort reads and writes V log V elements a row; the kernel reads V once.

    >>> truncate(torch.tensor([0.5, 0.25, 0.125, 0.125]).log(), top_p=0.7).exp()       # 0.5 < 0.7, so the second stays; 0.75 does not
    tensor([0.5000, 0.2500, 0.0000, 0.0000])
    """
    _check_truncation(top_k, top_p)
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -INF)
    if top_p < 1:
        ordered = logits.sort(dim=-1, descending=True).values
        probs = ordered.float().softmax(-1)
        kept = (probs.cumsum(-1) - probs < top_p).sum(-1, keepdim=True)
        logits = logits.masked_fill(logits < ordered.gather(-1, kept - 1), -INF)
    return logits


def _check_truncation(top_k, top_p):
    _check(top_k >= 0, f"sample: top_k {top_k} must be 0 (off) or positive")
    _check(0 < top_p <= 1, f"sample: top_p {top_p} must be above 0 and at most 1 (1 = off)")


def sample_reference(logits, temperature, top_k, top_p, noise):
    """Divide, truncate, race: token j arrives after an exponential time noise_j / p_j, and the first one wins with probability p_j."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = truncate(logits.float() / temperature, top_k, top_p)
    p = (logits - logits.amax(-1, keepdim=True)).exp()
    return (p / noise).argmax(-1)


@jit
def _flip(bits):
    """Bits of a float32 <-> an integer that sorts like the float: negative floats have their magnitude inverted."""
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@jit
def _threshold(key, weight, need):
    """Largest t with sum(weight where key >= t) >= need, by bisection over 32-bit integers: exact, and no sort."""
    lo, hi = tl.min(key, 0), tl.max(key, 0)
    for _ in range(32):
        mid = (lo | hi) - ((lo ^ hi) >> 1)  # ceil((lo + hi) / 2) without overflow
        enough = tl.sum(tl.where(key >= mid, weight, 0.0), 0) >= need
        lo, hi = tl.where(enough, mid, lo), tl.where(enough, hi, mid - 1)
    return lo


@jit
def _sample(logits, noise, out, stride, noise_stride, V, inv_temperature, top_k, top_p, TOP_K: tl.constexpr, TOP_P: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (rows). The row stays in registers: logits and noise are read once, one integer is written."""
    row, j = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    x = tl.load(logits + row * stride + j, mask=j < V, other=float("-inf")).to(tl.float32) * inv_temperature
    if TOP_K:
        key = _flip(x.to(tl.int32, bitcast=True))
        key = tl.where(key >= _threshold(key, 1.0, top_k), key, -2139095041)  # which is -inf
        x = _flip(key).to(tl.float32, bitcast=True)
    p = tl.exp2((x - tl.max(x, 0)) * 1.4426950408889634)
    if TOP_P:
        key = p.to(tl.int32, bitcast=True)  # non-negative floats sort as their bits
        p = tl.where(key >= _threshold(key, p, top_p * tl.sum(p, 0)), p, 0.0)
    race = p / tl.load(noise + row * noise_stride + j, mask=j < V, other=1.0)
    tl.store(out + row, tl.argmax(race, 0))


def _sample_triton(logits, temperature, top_k, top_p, noise):
    V, lead = logits.shape[-1], logits.shape[:-1]
    logits, noise = logits.reshape(-1, V), noise.reshape(-1, V)
    logits, noise = (x if x.stride(-1) == 1 else x.contiguous() for x in (logits, noise))
    out = torch.empty(len(logits), dtype=torch.long, device=logits.device)
    block = max(128, _padded(V))
    _sample[(len(logits),)](
        logits, noise, out, logits.stride(0), noise.stride(0), V, 1.0 / temperature, float(top_k), float(top_p),
        TOP_K=0 < top_k < V, TOP_P=top_p < 1, BLOCK=block, num_warps=min(32, max(4, block // 1024)),
    )  # fmt: skip
    return out.reshape(lead)


def sample(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None, noise=None):
    """One token per row: logits (..., V) -> (...) int64, drawn from softmax(truncate(logits / temperature, top_k, top_p)).

    temperature 0 is argmax. noise: (..., V) unit exponentials, for exact tests; else drawn from `generator` (which may live on the CPU:
    a seed then gives the same tokens on every device, up to rounding). Never waits for the GPU. NaN logits are not detected.
    Kernel limit: V <= 32768, a row must fit the registers of one multiprocessor.
    """
    V = logits.shape[-1]
    _check(temperature >= 0, f"sample: temperature {temperature} must not be negative")
    _check_truncation(top_k, top_p)
    _check(noise is None or noise.shape == logits.shape, f"sample: noise must have the shape of the logits, {tuple(logits.shape)}")
    if temperature == 0:
        return logits.argmax(-1)
    if noise is None:
        device = logits.device if generator is None else generator.device
        noise = torch.empty(logits.shape, device=device).exponential_(generator=generator).clamp_(min=1e-30).to(logits.device)
    if path(logits).name == "triton":
        _check(V <= 32768, f'sample: the kernel takes up to 32768 logits a row, not {V}; use("reference")')
        return _sample_triton(logits.float() if interpreting() else logits, temperature, top_k, top_p, noise)
    return sample_reference(logits, temperature, top_k, top_p, noise)


# --------------------------------------------------------------------------------------------------------------------------------------
# verify
# --------------------------------------------------------------------------------------------------------------------------------------


def verify_reference(p_target, p_draft, drafts, uniforms, noise):
    """Six lines of torch. Traffic: forms the residual of every position, 3 B g V elements; the kernel reads one position's row."""
    B, g = drafts.shape
    p = p_target[:, :g].gather(-1, drafts[..., None]).squeeze(-1)
    q = p_draft.gather(-1, drafts[..., None]).squeeze(-1)
    n = (uniforms * q < p).long().cumprod(-1).sum(-1)  # accepted: the drafts before the first refusal
    p_next = p_target[torch.arange(B, device=n.device), n]
    q_next = F.pad(p_draft, (0, 0, 0, 1))[torch.arange(B, device=n.device), n]  # all accepted: nothing to subtract, the bonus is from p
    residual = (p_next - q_next).clamp(min=0)
    residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, p_next)  # p == q and still refused: rounding only
    token = (residual / noise).argmax(-1)
    at = torch.arange(g + 1, device=n.device)
    tokens = torch.where(at < n[:, None], F.pad(drafts, (0, 1)), torch.where(at == n[:, None], token[:, None], -1))
    return tokens, n


@jit
def _verify(p, q, drafts, uniforms, noise, tokens, accepted, g, V, BLOCK: tl.constexpr):
    """Grid (batch): count the accepted drafts, then race over one row of p (and q), in pieces."""
    row = tl.program_id(0).to(tl.int64)
    p, q, drafts, uniforms, noise, tokens = p + row * (g + 1) * V, q + row * g * V, drafts + row * g, uniforms + row * g, noise + row * V, tokens + row * (g + 1)
    # 1. accept from the left until the first refusal
    n, going = row.to(tl.int32) * 0, row >= 0
    for t in range(g):
        token = tl.load(drafts + t)
        going = going & (tl.load(uniforms + t) * tl.load(q + t * V + token) < tl.load(p + t * V + token))
        tl.store(tokens + t, tl.where(going, token, -1))
        n += going.to(tl.int32)
    # 2. exponential race over max(p - q, 0), which need not be normalised, and beside it over p alone
    best, best_p, index, index_p = -1.0, -1.0, 0, 0
    for j0 in range(0, V, BLOCK):
        j = j0 + tl.arange(0, BLOCK)
        pj = tl.load(p + n * V + j, mask=j < V, other=-1.0)
        qj = tl.load(q + n * V + j, mask=j < tl.where(n < g, V, 0), other=0.0)  # all accepted: there is no row of q
        e = tl.load(noise + j, mask=j < V, other=1.0)
        ratio, ratio_p = tl.where(pj > qj, pj - qj, tl.minimum(pj, 0.0)) / e, pj / e
        top, top_p = tl.max(ratio, 0), tl.max(ratio_p, 0)
        index = tl.where(top > best, j0 + tl.argmax(ratio, 0), index)
        index_p = tl.where(top_p > best_p, j0 + tl.argmax(ratio_p, 0), index_p)
        best, best_p = tl.maximum(best, top), tl.maximum(best_p, top_p)
    # 3. an empty residual (p == q refused by rounding) falls back to p
    tl.store(tokens + n, tl.where(best > 0, index, index_p).to(tl.int64))
    tl.store(accepted + row, n.to(tl.int64))


def _verify_triton(p_target, p_draft, drafts, uniforms, noise):
    (B, g), V = drafts.shape, p_target.shape[-1]
    tokens, accepted = drafts.new_full((B, g + 1), -1), drafts.new_empty(B)
    x = [t.contiguous() for t in (p_target, p_draft, drafts, uniforms, noise)]
    _verify[(B,)](*x, tokens, accepted, g, V, BLOCK=min(4096, max(128, _padded(V))), num_warps=8)
    return tokens, accepted


def verify(p_target, p_draft, drafts, uniforms, noise):
    """Speculative sampling of a drafted chain (2211.17192, 2302.01318), batched: the emitted tokens follow p_target exactly.

    p_target (B, g+1, V), p_draft (B, g, V) probabilities (after temperature and truncation); drafts (B, g) int64, drawn from p_draft;
    uniforms (B, g) in [0, 1); noise (B, V) unit exponentials. Draft t is accepted iff u_t q(d_t) < p(d_t); after the first refusal one token is
    drawn from max(p - q, 0), after none a bonus token from the last row. Returns tokens (B, g+1) int64, -1 after the last, and n_accepted (B).

    >>> p = torch.tensor([[[.5, .5], [0., 1.]]])                           # g = 1, V = 2; p == q: u q < p always, so the draft stays
    >>> verify(p, p[:, :1], torch.tensor([[0]]), torch.tensor([[.9]]), torch.ones(1, 2))          # and the bonus comes from [0, 1]
    (tensor([[0, 1]]), tensor([1]))
    """
    _check(drafts.dim() == 2, f"verify: drafts must be (batch, gamma), got {tuple(drafts.shape)}")
    (B, g), V = drafts.shape, p_target.shape[-1]
    for name, x, want in (("p_target", p_target, (B, g + 1, V)), ("p_draft", p_draft, (B, g, V)), ("uniforms", uniforms, (B, g)), ("noise", noise, (B, V))):
        _check(x.shape == want, f"verify: {name} is {tuple(x.shape)}, but drafts {(B, g)} ask for {want}")
    if path(p_target).name == "triton":
        return _verify_triton(p_target.float(), p_draft.float(), drafts, uniforms.float(), noise.float())
    return verify_reference(p_target, p_draft, drafts, uniforms, noise)


# --------------------------------------------------------------------------------------------------------------------------------------
# nearest_code
# --------------------------------------------------------------------------------------------------------------------------------------


def nearest_reference(x, codebook):
    """All distances at once: N K elements written and read back, 4.3 GB at N = 65k, K = 16k; the kernel keeps a running best instead."""
    return (x[:, None] - codebook).square().sum(-1).argmin(-1)


def _nearest_torch(x, codebook, elements=1 << 21):
    """|x - c|^2 = |x|^2 - 2 x c + |c|^2 is a matrix product; |x|^2 does not change the order. Rows in chunks that stay in the cache."""
    half = 0.5 * codebook.square().sum(-1)
    rows = max(1, elements // max(1, len(codebook)))
    return torch.cat([torch.addmm(half, part, codebook.T, alpha=-1).argmin(-1) for part in x.split(rows)])


@jit
def _nearest(x, codebook, half, index, residual, N, K, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
             RESIDUAL: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Grid (tiles of rows). Lane (row, c) keeps the best of the codes c, c + BLOCK_K, ...; one reduction over lanes at the end."""
    n, lane = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    best, code = tl.full([BLOCK_N, BLOCK_K], float("inf"), tl.float32), tl.zeros([BLOCK_N, BLOCK_K], tl.int32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + lane
        dot = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for d0 in range(0, D, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            points = tl.load(x + n[:, None].to(tl.int64) * D + d[None, :], mask=(n[:, None] < N) & (d[None, :] < D), other=0.0)
            codes = tl.load(codebook + k[None, :] * D + d[:, None], mask=(k[None, :] < K) & (d[:, None] < D), other=0.0)
            dot = tl.dot(points, codes, dot, input_precision=PRECISION)
        distance = tl.load(half + k, mask=k < K, other=float("inf"))[None, :] - dot
        code, best = tl.where(distance < best, k[None, :], code), tl.minimum(distance, best)
    winner = tl.min(tl.where(best == tl.min(best, 1)[:, None], code, 2147483647), 1)  # lowest index among equals
    tl.store(index + n, winner.to(tl.int64), mask=n < N)
    if RESIDUAL:
        for d0 in range(0, D, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            at, inside = n[:, None].to(tl.int64) * D + d[None, :], (n[:, None] < N) & (d[None, :] < D)
            chosen = tl.load(codebook + winner[:, None] * D + d[None, :], mask=inside, other=0.0)
            tl.store(residual + at, tl.load(x + at, mask=inside, other=0.0) - chosen, mask=inside)


def _nearest_triton(x, codebook, want_residual):
    x, codebook = x.contiguous(), codebook.contiguous()
    index, residual = torch.empty(len(x), dtype=torch.long, device=x.device), torch.empty_like(x if want_residual else x[:0])
    half, D = 0.5 * codebook.square().sum(-1), x.shape[1]
    _nearest[(-(-len(x) // 64),)](x, codebook, half, index, residual, len(x), len(codebook), D=D, BLOCK_D=min(32, _padded(D)), BLOCK_N=64,
                                  BLOCK_K=64, RESIDUAL=want_residual, PRECISION="tf32x3", num_warps=8, num_stages=2)  # fmt: skip
    return index, residual


@torch.no_grad()
def nearest_code(x, codebook, return_distance=False, return_residual=False):
    """Index of the nearest code, lowest index among equals: x (N, D), codebook (K, D) -> (N,) int64.

    With return_distance also |x - c|^2 (N,); with return_residual also x - c (N, D), what a residual quantizer codes next. The N x K matrix
    of distances is never stored. No gradient: quantizers pass one straight through. Computed in float32; two codes whose distances
    agree to 1e-6 of |x| |c| may swap between the paths.

    >>> nearest_code(torch.tensor([[0.2], [0.9]]), torch.tensor([[0.], [1.]]))
    tensor([0, 1])
    """
    _check(x.dim() == codebook.dim() == 2 and x.shape[1] == codebook.shape[1], f"nearest_code: x {tuple(x.shape)} and codebook {tuple(codebook.shape)} must be (N, D) and (K, D)")
    _check(len(codebook) > 0, "nearest_code: the codebook is empty")
    want_residual, residual = return_distance or return_residual, None
    with torch.autocast(x.device.type, enabled=False):
        points, codes = x.float(), codebook.float()
        if len(x) == 0:
            index = torch.zeros(0, dtype=torch.long, device=x.device)
        elif path(x).name == "triton":
            index, residual = _nearest_triton(points, codes, want_residual)
        else:
            index = _nearest_torch(points, codes)
        if residual is None and want_residual:
            residual = points - codes[index]
    extra = ([residual.square().sum(-1)] if return_distance else []) + ([residual.to(x.dtype)] if return_residual else [])
    return (index, *extra) if extra else index
