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
import math
import sys
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows: every op still runs, by its torch path
    triton = None

INF = float("inf")

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

    def draw(self):
        """Text picture, `#` where a query (row) sees a key (column)."""
        return "\n\n".join("\n".join("".join(".#"[x] for x in row) for row in one[0].tolist()) for one in self.dense())


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
    """torch's own fused attention: is_causal where it applies, else a dense boolean mask. On a CPU always in float32, because torch's
    bfloat16 backward is several times slower there."""
    k, v, dtype = _repeat_heads(q, k), _repeat_heads(q, v), q.dtype
    if not q.is_cuda and dtype in (torch.bfloat16, torch.float16):
        q, k, v = q.float(), k.float(), v.float()
    if mask is None or mask.name == "full":
        out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    elif mask.name == "causal" and q.shape[2] == k.shape[2]:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.dense(q.device), scale=scale)
    return out.to(dtype)


def attention(q, k, v, mask=None, scale=None, return_lse=False):
    """Masked attention with gradients. q (B, H, N, D), k and v (B, Hkv, M, D), Hkv divides H (grouped queries); mask: a `Mask` or None.

    Returns (B, H, N, D) in q's dtype, and with return_lse the log-sum-exp of the scores (B, H, N), float32, without gradient.
    scale: default D^-0.5. Rows that see no key give 0 (and -inf). Under autocast the inputs are cast to the autocast dtype on a GPU.

    >>> x = torch.randn(1, 2, 5, 16)
    >>> y = attention(x, x, x, causal(5))       # y[:, :, 0] == x[:, :, 0]: the first token sees only itself
    """
    if q.is_cuda and torch.is_autocast_enabled("cuda"):
        q, k, v = (x.to(torch.get_autocast_dtype("cuda")) for x in (q, k, v))
    _check_attention(q, k, v, mask, scale)
    with torch.autocast(q.device.type, enabled=False):
        if return_lse:
            with torch.autocast(q.device.type, enabled=False):
                out, lse = attention_reference(q, k, v, mask, scale)
            return out, lse.detach().float()
        return _attention_torch(q, k, v, mask, scale)


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


def decode_attention(q, k_cache, v_cache, lengths, scale=None, causal=True):
    """Attention of R new tokens against a preallocated cache. No gradient.

    q (B, H, R, D); caches (B, Hkv, S, D), of which row b holds lengths[b] tokens, *the R new ones included*; lengths: int or (B,) integers.
    The new tokens are the last R: query r sees keys j < lengths[b] - (R - 1 - r), or with causal=False all lengths[b] (the tokens of a scale
    see one another). R > 1 verifies a drafted chain in one call. Returns (B, H, R, D).
    """
    B, H, R, D = q.shape
    _check_attention(q, k_cache, v_cache, None, scale)
    S, one_length = k_cache.shape[2], isinstance(lengths, int)
    if one_length:
        _check(0 <= lengths <= S, f"decode_attention: length {lengths} exceeds the cache of {S}")
    else:
        lengths = torch.as_tensor(lengths, device=q.device)
        _check(lengths.shape == (B,), f"decode_attention: lengths {tuple(lengths.shape)} must be an int or ({B},)")
    if one_length:  # the usual case: one prefix length for the whole batch, so the filled part is a slice
        mask = _causal(R, lengths) if causal and R > 1 else None
        return _attention_torch(q, k_cache[:, :, :lengths], v_cache[:, :, :lengths], mask, scale)
    end = lengths[:, None] - torch.arange(R - 1, -1, -1, device=q.device) if causal else lengths[:, None].expand(B, R)
    seen = torch.arange(S, device=q.device) < end[:, None, :, None]
    k, v = _repeat_heads(q, k_cache), _repeat_heads(q, v_cache)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)


_causal = causal  # decode_attention has a parameter of that name


# --------------------------------------------------------------------------------------------------------------------------------------
# scan_attention
# --------------------------------------------------------------------------------------------------------------------------------------


def scan_reference(s, v):
    """Softmax over every prefix, written out: s (..., N), v (..., N, D) -> (..., N, D). Traffic: N x N weights, which the scan never forms."""
    n = s.shape[-1]
    past = torch.ones(n, n, dtype=torch.bool, device=s.device).tril()
    return s[..., None, :].expand(*s.shape, n).masked_fill(~past, -INF).softmax(-1) @ v


def scan_attention(s, v, state=None, return_state=False):
    """Attention as an RNN (Aaren): scores s (..., N) of one fixed query, values v (..., N, D) -> output for every prefix (..., N, D).

    state: the summary (m, u, w) of everything before, as returned with return_state; feeding a sequence in pieces, or one token at a time
    (N = 1, constant memory), gives the same outputs as feeding it whole.

    >>> out, state = scan_attention(s[:, :7], v[:, :7], return_state=True)
    >>> rest = scan_attention(s[:, 7:], v[:, 7:], state)             # == scan_attention(s, v)[:, 7:]
    """
    _check(s.shape == v.shape[:-1], f"scan_attention: s {tuple(s.shape)} must be v {tuple(v.shape)} without its last dimension")
    out, state = _scan_torch(s, v, state)
    return (out, state) if return_state else out


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
    _check(top_k >= 0, f"sample: top_k {top_k} must be 0 (off) or positive")
    _check(0 < top_p <= 1, f"sample: top_p {top_p} must be above 0 and at most 1 (1 = off)")
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -INF)
    if top_p < 1:
        ordered = logits.sort(dim=-1, descending=True).values
        probs = ordered.float().softmax(-1)
        kept = (probs.cumsum(-1) - probs < top_p).sum(-1, keepdim=True)
        logits = logits.masked_fill(logits < ordered.gather(-1, kept - 1), -INF)
    return logits


def sample_reference(logits, temperature, top_k, top_p, noise):
    """Divide, truncate, race: token j arrives after an exponential time noise_j / p_j, and the first one wins with probability p_j."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = truncate(logits.float() / temperature, top_k, top_p)
    return (logits - noise.log()).argmax(-1)


def sample(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None, noise=None):
    """One token per row: logits (..., V) -> (...) int64, drawn from softmax(truncate(logits / temperature, top_k, top_p)).

    temperature 0 is argmax. noise: (..., V) unit exponentials, for exact tests; else drawn from `generator` (which may live on the CPU:
    a seed then gives the same tokens on every device, up to rounding). Never waits for the GPU.
    """
    _check(temperature >= 0, f"sample: temperature {temperature} must not be negative")
    _check(noise is None or noise.shape == logits.shape, f"sample: noise must have the shape of the logits, {tuple(logits.shape)}")
    if noise is None and temperature > 0:
        device = logits.device if generator is None else generator.device
        noise = torch.empty(logits.shape, device=device).exponential_(generator=generator).to(logits.device)
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


def verify(p_target, p_draft, drafts, uniforms, noise):
    """Speculative sampling of a drafted chain (2211.17192, 2302.01318), batched: the emitted tokens follow p_target exactly.

    p_target (B, g+1, V), p_draft (B, g, V) probabilities (after temperature and truncation); drafts (B, g) int64, drawn from p_draft;
    uniforms (B, g) in [0, 1); noise (B, V) unit exponentials. Draft t is accepted iff u_t q(d_t) < p(d_t); after the first refusal one token is
    drawn from max(p - q, 0), after none a bonus token from the last row. Returns tokens (B, g+1) int64, -1 after the last, and n_accepted (B).

    >>> # p == q accepts everything: n_accepted == g, and the bonus is a sample of p_target[:, g]
    """
    _check(drafts.dim() == 2, f"verify: drafts must be (batch, gamma), got {tuple(drafts.shape)}")
    (B, g), V = drafts.shape, p_target.shape[-1]
    for name, x, want in (("p_target", p_target, (B, g + 1, V)), ("p_draft", p_draft, (B, g, V)), ("uniforms", uniforms, (B, g)), ("noise", noise, (B, V))):
        _check(x.shape == want, f"verify: {name} is {tuple(x.shape)}, expected {want} from drafts {(B, g)}")
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


@torch.no_grad()
def nearest_code(x, codebook, return_distance=False, return_residual=False):
    """Index of the nearest code, lowest index among equals: x (N, D), codebook (K, D) -> (N,) int64.

    With return_distance also |x - c|^2 (N,); with return_residual also x - c (N, D), what a residual quantizer codes next. The N x K matrix
    of distances is never stored. No gradient: quantizers pass one straight through.

    >>> nearest_code(torch.tensor([[0.2], [0.9]]), torch.tensor([[0.], [1.]]))
    tensor([0, 1])
    """
    _check(x.dim() == codebook.dim() == 2 and x.shape[1] == codebook.shape[1], f"nearest_code: x {tuple(x.shape)} and codebook {tuple(codebook.shape)} must be (N, D) and (K, D)")
    _check(len(codebook) > 0, "nearest_code: the codebook is empty")
    if len(x) == 0:
        index = torch.zeros(0, dtype=torch.long, device=x.device)
    else:
        with torch.autocast(x.device.type, enabled=False):
            index = _nearest_torch(x.float(), codebook.float())
    residual = x - codebook[index]
    extra = [residual.float().square().sum(-1)] * return_distance + [residual] * return_residual
    return (index, *extra) if extra else index
