# %% [markdown]
# # 60 Attention kernels
#
# **Guess first, and write your two numbers down.**
#
# 1. A tile of 128 queries has 8,192 scores each, too many for the fast memory of a processor. Softmax needs the largest score (so that no
#    exponential overflows), the sum of the exponentials, and a division for every key; then the values are summed with these weights. How
#    many times must the scores be read?
# 2. A next-scale model attends over a pyramid of 680 tokens; its mask leaves 62 % of all pairs of query and key. A kernel works on tiles of
#    128 queries by 64 keys and skips what the mask hides. How much of the work does it save?
#
# This lesson builds the kernel of `kernels.py` from its parts: one pass over the keys, masks that are a few integers, tiles, two Triton
# kernels of your own, and the backward pass. Triton runs in its interpreter here, on CPU tensors: slow, but the same program.

# %%
import os, sys
os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported: its kernels then run on CPU tensors
sys.path[:0] = ["..", "../.."]  # the repository, seen from lessons/ and from lessons/solutions/
import matplotlib.pyplot as plt, torch, kernels
from lessons.checks import band, lesson_60 as check, put, steps

# %% [markdown]
# ## Why the maximum cannot be left out
#
# Softmax does not change when a number is subtracted from all scores. Why not subtract nothing, and sum as the scores come along?

# %%
s = torch.tensor([0.0, 50.0, 100.0])
print(f"float32 ends at e^{torch.tensor(torch.finfo().max).log():.1f}")
print("exponentials:    ", s.exp())
print("without maximum: ", s.exp() / s.exp().sum())
print("with maximum:    ", (s - s.max()).exp() / (s - s.max()).exp().sum())

# %% [markdown]
# The third exponential is infinite, and the quotient is not a number. The maximum is needed, and it is
# known only after the last score. So: one pass for the maximum, one for the sum, one for the weights? The way out is to
# start with the largest score **so far**, and to correct when a larger one turns up.
#
# ## One pass
#
# All that matters of the keys seen so far are three things: $m$, their largest score; $u=\sum e^{s_j-m}$; and the row
# $w=\sum e^{s_j-m}v_j$. When a tile of further keys arrives, with scores $s_j$ and values $v_j$,
#
# $$m'=\max(m,\ \max_j s_j),\qquad u'=u\,e^{m-m'}+\sum_j e^{s_j-m'},\qquad w'=w\,e^{m-m'}+\sum_j e^{s_j-m'}v_j .$$
#
# The old sums were taken relative to $m$; the factor $e^{m-m'}$, at most 1, takes them relative to $m'$. After the last tile the output is
# $w/u$. Milakov and Gimelshein (arXiv:1805.02867, Algorithm 3) found this for the softmax; FlashAttention (arXiv:2205.14135, Algorithm 1)
# carries $w$ along.
#
# Worked: the scores are $\log 1, \log 2, \log 4$ and the values 1, 3, 5, so the answer is $(1\cdot1+2\cdot3+4\cdot5)/7$. Take two keys first,
# then the third.

# %%
scores, values = torch.tensor([[1.0, 2.0, 4.0]]).log(), torch.tensor([[1.0], [3.0], [5.0]])
first = kernels.summarize(scores[:, :2], values[:2])
both = kernels.merge(first, kernels.summarize(scores[:, 2:], values[2:]))
for name, (m, u, w) in (("two keys", first), ("all three", both)):
    print(f"{name}: m = {m.item():.3f}, u = {u.item():.2f}, w = {w.item():.2f}, w / u = {(w / u).item():.3f}")
print(f"written out: {27 / 7:.3f}")

# %% [markdown]
# The third key halves what was there, $e^{\log 2-\log 4}=1/2$: its own 1 is added to $1.50/2$.
#
# **Exercise 1.** `online(s, v, tile)`: scores `s` (N, M), values `v` (M, D) -> outputs (N, D), reading the scores tile by tile, `tile` keys at
# a time, each once. The last tile may be shorter. A score of -inf is a hidden key; a row that sees no key gives 0. No softmax of torch.
#
# *Hint:* start with $m=-\infty$. What is $-\infty-(-\infty)$, and in which rows does it occur?

# %%
def online(s, v, tile):
    """Attention output w / u of every row of s, in one pass over the keys."""
    # SOLUTION (about 10 lines, 15 minutes)
    m = torch.full(s.shape[:1], -torch.inf)
    u, w = torch.zeros(len(s)), torch.zeros(len(s), v.shape[1])
    for j in range(0, s.shape[1], tile):
        part = s[:, j:j + tile]
        m_new = torch.maximum(m, part.amax(1))
        shift = torch.where(m_new == -torch.inf, 0.0, m_new)  # nothing seen yet: e^(-inf - 0) = 0, and not nan
        p, old = torch.exp(part - shift[:, None]), torch.exp(m - shift)
        u = u * old + p.sum(1)
        w = w * old[:, None] + p @ v[j:j + tile]
        m = m_new
    return w / torch.where(u == 0, 1.0, u)[:, None]
    # END


check.check_online(online)

# %% [markdown]
# Here is one row of 64 scores on its way, key by key. Where the maximum jumps, the old sum shrinks and the output leaps towards the
# newcomer's value; in the end it is where it must be.

# %%
rng = torch.Generator().manual_seed(4)
s, v = 2 * torch.randn(1, 64, generator=rng), torch.randn(64, 1, generator=rng)
state, path = kernels.summarize(s[:, :1], v[:1]), []
for j in range(1, 64):
    state = kernels.merge(state, kernels.summarize(s[:, j:j + 1], v[j:j + 1]))
    path.append([x.item() for x in (*state, state[2] / state[1])])
m, u, _, out = zip(*path)
print(f"after 64 keys {out[-1]:.6f}, softmax {(s.softmax(1) @ v).item():.6f}")

# %%
figure, axes = plt.subplots(1, 3, figsize=(9, 2.2), layout="constrained")
axes[0].plot(s[0, 1:], ".", color="0.6")
axes[0].plot(m)
axes[1].plot(u)
axes[2].plot(out)
for axis, title in zip(axes, ("scores and their maximum m", "the sum u", "the output w / u")):
    axis.set(title=title, xlabel="keys read")
plt.show()

# %% [markdown]
# So the answer to the first question is **once**, and the weights are never stored. That is what the kernel is for. The arithmetic
# stays the same; what changes is what has to travel between the chip and its memory. Written out, N queries and M keys write the N x M scores, read
# them, write the weights, read them: 4 N M numbers a head. The kernel reads q, k, v and writes the output: (2 N + 2 M) D.

# %%
N, M, D = 4096, 4096, 64
written, kernel = 4 * N * M, (2 * N + 2 * M) * D
print(f"written out {written / 1e6:.1f} million numbers, one pass {kernel / 1e6:.1f} million: {written / kernel:.0f} times less")

# %% [markdown]
# (The keys are read again for every tile of queries, but a whole head of them fits the L2 cache of a GPU.)
#
# ## Masks are a few integers
#
# A dense mask would bring the N x M numbers back. Look at the masks of the course: in each, what a query sees is **one run of keys**. Two integers a
# query, `row_start[i] <= j < row_end[i]`, say it all. (Trees need a third list: a node numbered depth first is seen by the run of its
# descendants.)

# %%
for mask in (kernels.causal(5), kernels.window(5, 2), kernels.scales([1, 2, 2]), kernels.markov([1, 2, 2], previous=1)):
    print(f"{mask.name}\n{mask.draw()}\n")

# %% [markdown]
# **Exercise 2.** `intervals(counts, previous)`: scale k of a pyramid has `counts[k]` tokens, and a token sees all tokens of its own scale and of the
# `previous` scales before it (as far as there are any). Return the two lists `start` and `end`, one integer a token, `end` one past the last
# key seen. `intervals([1, 2, 1], 1)` is `([0, 0, 0, 1], [1, 3, 3, 4])`.
#
# *Hint:* first the edges 0, 1, 3, 4 between the scales.

# %%
def intervals(counts, previous):
    """What each token of a pyramid sees: two lists of integers."""
    # SOLUTION (about 8 lines, 8 minutes)
    edges = [0]
    for count in counts:
        edges.append(edges[-1] + count)
    start, end = [], []
    for k, count in enumerate(counts):
        start += [edges[max(k - previous, 0)]] * count
        end += [edges[k + 1]] * count
    return start, end
    # END


check.check_intervals(intervals)

# %% [markdown]
# ## Tiles
#
# A kernel works on a tile of queries and a tile of keys at a time, because the units that multiply matrices do, and because a tile read once serves
# many products. So a mask is asked about whole tiles: **skip** it (nobody sees anything), take it **whole** (everybody sees everything: no
# comparison needed), or **compare** pair by pair. The extremes of the two lists tell, without looking at a single pair. For queries
# $i_0\dots i_1-1$ and keys $j_0\dots j_1-1$:
#
# * something may be seen iff $\min start<j_1$ and $\max end>j_0$;
# * all is seen iff $\max start\le j_0$ and $\min end\ge j_1$, and the tile does not jut out of the matrix.
#
# **Exercise 3.** `tile_kinds(start, end, m, block_m, block_n)`: the lists of N queries, m keys, tiles of block_m queries by block_n keys -> a list of lists,
# one row for each tile of queries: 0 skip, 1 compare, 2 whole. For `causal(4)` in tiles of 2 x 2: `[[1, 0], [2, 1]]`.

# %%
def tile_kinds(start, end, m, block_m, block_n):
    """0, 1 or 2 for each tile of the mask: skip, compare, whole."""
    # SOLUTION (about 9 lines, 12 minutes)
    kinds = []
    for i in range(0, len(start), block_m):
        s, e = start[i:i + block_m], end[i:i + block_m]  # the last tile may hold fewer rows
        row = []
        for j in range(0, m, block_n):
            some = min(s) < j + block_n and max(e) > j
            whole = max(s) <= j and min(e) >= j + block_n and len(s) == block_m
            row.append(some + whole)
        kinds.append(row)
    return kinds
    # END


check.check_tile_kinds(tile_kinds)

# %% [markdown]
# Now the second question, with the script's own `Mask.tiles`, which returns the same as runs: a kernel visits the tiles from `lo` to `hi`.

# %%
def shares(mask, block_m=128, block_n=64):
    """Share of the pairs that are seen, and of the pairs in tiles that are visited."""
    bounds = mask.tiles(block_m, block_n)[0][0, 0]  # query tiles x (lo, full_lo, full_hi, hi)
    visited = (bounds[:, 3] - bounds[:, 0]).sum() * block_m
    return mask.dense().float().mean(), visited / (len(bounds) * block_m * -(-mask.shape[1] // block_n) * block_n)


counts = [side * side for side in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)]  # VAR's pyramid
masks = {"causal": kernels.causal(680), "next-scale": kernels.scales(counts), "own scale and one before": kernels.markov(counts, 1)}
masks |= {"own scale": kernels.markov(counts), "window of 128": kernels.window(680, 128)}
for name, mask in masks.items():
    seen, visited = shares(mask)
    print(f"{name:26} seen {seen:.3f}   visited {visited:.3f}   at most {1 / visited:.1f} times faster")

# %% [markdown]
# The next-scale mask leaves 62 % of the pairs, and a kernel visits 76 %: at most 1.3 times faster than no skipping at all. Causal attention
# over 680 tokens gains 1.6, not 2. Tiles on the edge are computed in full and then thrown away in part; in a longer sequence, or with
# smaller tiles, the edge is a smaller share. The picture shows where the work goes.

# %%
figure, axes = plt.subplots(1, 3, figsize=(9, 3), layout="constrained")
for axis, name in zip(axes, ("causal", "next-scale", "own scale and one before")):
    mask, colour = masks[name], torch.zeros(6 * 128, 11 * 64)
    for tile, (lo, full_lo, full_hi, hi) in enumerate(mask.tiles(128, 64)[0][0, 0].tolist()):
        rows = colour[tile * 128:(tile + 1) * 128]
        rows[:, lo:hi], rows[:, full_lo:full_hi] = 1, 2
    colour[:680, :680] += 0.35 * mask.dense()[0, 0]
    axis.imshow(colour, cmap="Blues", aspect="auto")
    axis.set(title=name, xlabel="keys", ylabel="queries")
plt.show()

# %% [markdown]
# White is never visited; dark is taken whole; in between pairs are compared, and what is pale was computed for nothing.
#
# ## Your first kernel
#
# A Triton kernel is a function that is started once for each cell of a **grid**. These *programs* run side by side, in no promised order. A
# program asks for its number, computes the addresses of a block of numbers (pointer plus offsets), loads it, works on it, stores. Blocks
# are powers of two; a mask keeps loads and stores inside the tensor. This one doubles a vector, four numbers a program:

# %%
from kernels import jit, tl  # triton.jit and triton.language, where triton is installed


@jit
def double(x, out, N, BLOCK: tl.constexpr):
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + j, 2 * tl.load(x + j, mask=j < N, other=0.0), mask=j < N)


x, out = torch.arange(5.0), torch.zeros(5)
if kernels.interpreting():
    double[(2,)](x, out, 5, BLOCK=4)  # two programs
print(out if kernels.interpreting() else "triton is not here (macOS, Windows): the two puzzles below are skipped")

# %% [markdown]
# **Exercise 4.** `row_lse`: a grid of `rows` programs; program r reads row r of x, N numbers one after another in memory, in blocks of BLOCK, and writes
# $\log\sum_j e^{x_{rj}}$ to `out + r`. It is exercise 1 without the values: m and u are single numbers here.
#
# *Hint:* what must `other` be, so that a place beyond the row adds nothing? `tl.max(s, 0)`, `tl.maximum`, `tl.sum(p, 0)`, `tl.exp`, `tl.log`.

# %%
@jit
def row_lse(x, out, N, BLOCK: tl.constexpr):
    # SOLUTION (about 9 lines, 15 minutes)
    row = tl.program_id(0)
    m, u = float("-inf"), 0.0
    for j0 in range(0, N, BLOCK):
        j = j0 + tl.arange(0, BLOCK)
        s = tl.load(x + row * N + j, mask=j < N, other=float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 0))
        u = u * tl.exp(m - m_new) + tl.sum(tl.exp(s - m_new), 0)
        m = m_new
    tl.store(out + row, m + tl.log(u))
    # END


check.check_row_lse(row_lse)

# %% [markdown]
# **Exercise 5.** `flash`: causal attention of one head. q, k, v and o are (N, D), rows one after another in memory; a program takes BLOCK queries and walks
# over the key tiles from the first to **its own**, which the mask cuts diagonally; what lies behind is never read. `scale` multiplies the
# scores.
#
# *Hint:* the address of row i, column d is `q + i[:, None] * D + d[None, :]`. `tl.dot(a, tl.trans(b))` multiplies tiles; `tl.full(shape,
# value, tl.float32)` makes one, `tl.where` chooses. m and u are (BLOCK,), w is (BLOCK, D). Every query sees key 0, so nobody stays at -inf.

# %%
@jit
def flash(q, k, v, o, N, scale, D: tl.constexpr, BLOCK: tl.constexpr):
    # SOLUTION (about 18 lines, 25 minutes)
    first = tl.program_id(0) * BLOCK
    i, d = first + tl.arange(0, BLOCK), tl.arange(0, D)
    at = i[:, None] * D + d[None, :]
    queries = tl.load(q + at, mask=i[:, None] < N, other=0.0)
    m, u = tl.full([BLOCK], float("-inf"), tl.float32), tl.zeros([BLOCK], tl.float32)
    w = tl.zeros([BLOCK, D], tl.float32)
    for j0 in range(0, first + BLOCK, BLOCK):
        j = j0 + tl.arange(0, BLOCK)
        there = j[:, None] * D + d[None, :]
        keys = tl.load(k + there, mask=j[:, None] < N, other=0.0)
        values = tl.load(v + there, mask=j[:, None] < N, other=0.0)
        s = tl.dot(queries, tl.trans(keys)) * scale
        s = tl.where(j[None, :] <= i[:, None], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        p, old = tl.exp(s - m_new[:, None]), tl.exp(m - m_new)
        u = u * old + tl.sum(p, 1)
        w = w * old[:, None] + tl.dot(p, values)
        m = m_new
    tl.store(o + at, w / u[:, None], mask=i[:, None] < N)
    # END


check.check_flash(flash)

# %% [markdown]
# Now open `kernels.py` at `_fold`: it is your loop, with the mask lists in place of the diagonal, base 2 in place of base e (the hardware
# has an instruction for $2^x$), and "tf32x3": on a GPU `tl.dot` keeps 10 bits of a float32's mantissa unless told otherwise.
#
# **What the interpreter does not tell.** It runs programs one after another, so two that write to the same place never collide. It accepts
# what the compiler refuses. And it computes bfloat16 wrongly, without a word:

# %%
@jit
def square(x, out, N, BLOCK: tl.constexpr):
    j = tl.arange(0, BLOCK)
    a = tl.load(x + j, mask=j < N, other=0.0)
    tl.store(out + j, a * a, mask=j < N)


for dtype in (torch.float32, torch.bfloat16) if kernels.interpreting() else ():
    x, out = torch.tensor([1.0, 2.0, 3.0], dtype=dtype), torch.zeros(3, dtype=dtype)
    square[(1,)](x, out, 3, BLOCK=4)
    print(dtype, out.tolist())

# %% [markdown]
# So `kernels.py` hands the interpreter float32, and its tests also compile every kernel for two generations of GPUs. Neither saw what a GPU did
# (measured on an H200, Triton 3.6, bfloat16, `python tests/bench_kernels.py`):
# * **A copy.** `F.pad` copies its input even if there is nothing to add. So at every new token the whole cache was copied: 0.886 ms in place of
#   0.259 at 64 x 16 heads x 4096 x 64; torch's own 0.248.
# * **Slow tiles.** Chosen by the compiler's report (no register spilled), forward and backward took 0.518 and 1.765 ms at 4 x 16 x 4096 x 64; the
#   fastest of about ten that were timed take 0.411 and 1.467, torch's own 0.334 and 0.938.
# * **A crash**, in nano_var's sampling. The likely cause: float32 products of 64 rows by 16 keys became instructions 8 wide (wgmma m64n8k8).
#   So `decode_attention` takes at most 32 queries of a key head; that this helps was not tried on a GPU.
# * **Small shapes lose.** At 64 x 4 x 64 x 32 launching from Python costs more than the work: forward 0.13 to 0.26 ms, torch's own 0.012 to 0.025.
#
# ## Backward
#
# Training needs the gradients of q, k and v, and the weights were never stored. They come back from one number a query, the log-sum-exp
# $\ell_i=m_i+\log u_i$: $p_{ij}=e^{s_{ij}-\ell_i}$. With $s_{ij}=\sigma\,q_i\cdot k_j$ ($\sigma$ is the scale), $o_i=\sum_j p_{ij}v_j$ and the incoming gradient $do$:
#
# $$dv=p^\top do,\qquad dp=do\,v^\top,\qquad ds_{ij}=p_{ij}\,(dp_{ij}-\delta_i),\qquad dq=\sigma\,ds\,k,\qquad dk=\sigma\,ds^\top q .$$
#
# $\delta_i=\sum_j p_{ij}\,dp_{ij}$ is there because the weights of a row sum to 1: raising one lowers the others. As written it needs a whole row of
# weights. But $\sum_j p_{ij}\,(do_i\cdot v_j)=do_i\cdot o_i$: a product of two rows of D numbers, known before the loop starts (arXiv:2205.14135,
# Appendix B.2; arXiv:2307.08691, Algorithm 2). Worked, for two keys:

# %%
p, dp = torch.tensor([0.5, 0.5]), torch.tensor([3.0, 1.0])
print(f"delta = {(p * dp).sum():.0f}, ds = {(p * (dp - (p * dp).sum())).tolist()}, without delta {(p * dp).tolist()}")

# %% [markdown]
# What one score gains the other must lose; without $\delta$ both would be pushed the same way.
#
# **Exercise 6.** `backward(q, k, v, o, lse, do, seen, scale)`: q, o, do (B, H, N, D), k and v (B, H, M, D), lse (B, H, N), seen (N, M) boolean, True where
# query i sees key j -> the tuple dq, dk, dv. No autograd.
#
# *Hint:* a hidden key has weight 0; its score says nothing about that.

# %%
def backward(q, k, v, o, lse, do, seen, scale):
    """Gradients of attention, from the log-sum-exp of each row."""
    # SOLUTION (about 6 lines, 12 minutes)
    p = torch.exp((q @ k.mT) * scale - lse[..., None]).masked_fill(~seen, 0.0)  # (B, H, N, M), as forward had it
    dv = p.mT @ do
    dp = do @ v.mT
    delta = (do * o).sum(-1, keepdim=True)  # (B, H, N, 1)
    ds = p * (dp - delta)
    return scale * ds @ k, scale * ds.mT @ q, dv
    # END


check.check_backward(backward)

# %% [markdown]
# ## In the script's place
#
# One layer of attention learns to say which token stood eight places back. It attends through `kernels.attention`; below, your gradient takes its
# place.

# %%
def recall(count, seed):
    """Train on random tokens; the loss starts at log 16 = 2.77."""
    torch.manual_seed(seed)
    parts = {"token": torch.nn.Embedding(16, 64), "place": torch.nn.Embedding(24, 64)}
    net = torch.nn.ModuleDict(parts | {"qkv": torch.nn.Linear(64, 192), "head": torch.nn.Linear(64, 16)})
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    for _ in range(steps(count)):
        x = torch.randint(16, (64, 24))
        h = net.qkv(net.token(x) + net.place.weight).view(64, 24, 3, 4, 16)  # 4 heads of 16
        q, k, v = h.permute(2, 0, 3, 1, 4)
        y = kernels.attention(q, k, v, kernels.causal(24)).transpose(1, 2).flatten(2)
        loss = torch.nn.functional.cross_entropy(net.head(y)[:, 8:].flatten(0, 1), x[:, :-8].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


print(f"with torch's gradient: {recall(150, 0):.4f}")

# %%
def with_gradient(rule):
    """An attention whose backward pass is `rule`."""

    class Mine(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v, mask):
            o, lse = kernels.attention_reference(q, k, v, mask)
            ctx.save_for_backward(q, k, v, o, lse)
            ctx.seen = mask.dense()[0, 0]
            return o

        @staticmethod
        def backward(ctx, do):
            q, k, v, o, lse = ctx.saved_tensors
            return *rule(q, k, v, o, lse, do, ctx.seen, q.shape[-1] ** -0.5), None

    return Mine.apply


with put(kernels, "attention", with_gradient(backward)):
    band("loss with your gradient", recall(150, 0), 0.0, 0.02)

# %% [markdown]
# ## What did not work: finding a wrong gradient by training
#
# Two wrong gradients, in the same place: one forgets $\delta$, one forgets the scale in $dk$.

# %%
def no_delta(q, k, v, o, lse, do, seen, scale):
    p = torch.exp((q @ k.mT) * scale - lse[..., None]).masked_fill(~seen, 0.0)
    ds = p * (do @ v.mT)
    return scale * ds @ k, scale * ds.mT @ q, p.mT @ do


def no_scale(q, k, v, o, lse, do, seen, scale):
    p = torch.exp((q @ k.mT) * scale - lse[..., None]).masked_fill(~seen, 0.0)
    ds = p * (do @ v.mT - (do * o).sum(-1, keepdim=True))
    return scale * ds @ k, ds.mT @ q, p.mT @ do


# %%
for rule in (no_delta, no_scale):
    with put(kernels, "attention", with_gradient(rule)):
        print(f"{rule.__name__}: loss " + ", ".join(f"{recall(150, seed):.4f}" for seed in range(3)), "from three seeds")

# %% [markdown]
# Without $\delta$ the loss falls well below 2.77, and looks like learning that needs a better learning rate. Without the scale it falls as far as with the right
# gradient: Adam divides by the size of a gradient, so a wrong factor disappears. A falling loss proves nothing about a gradient; a comparison with
# autograd, in float64, takes a second and proves it. That is what the check did.
#
# ## Where to read on
#
# * `kernels.py`: `merge`, `Mask.tiles`, `_fold`, then the two backward kernels. Lesson 61 uses the same three numbers twice more.
# * Milakov and Gimelshein, arXiv:1805.02867 (the online softmax); Dao et al., arXiv:2205.14135 (FlashAttention: Algorithm 1, and Theorem 2 on the
#   traffic); Dao, arXiv:2307.08691 (queries outside, keys inside: the loop order of exercise 5).
# * Masks as intervals: FlashMask, arXiv:2410.01359, keeps them by columns. Next-scale masks: VAR, arXiv:2404.02905; with a short memory: HMAR, arXiv:2506.04421.
# * Triton's own tutorial 06 is this kernel for a GPU; its threads tell what happens at lengths that are no multiple of the tile, which is why the checks above use 37.
