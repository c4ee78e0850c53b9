# %% [markdown]
# # 22 Speed
#
# **Guess first, and write your four answers down.**
#
# 1. Drawing 64 tokens without a cache computes up to 64 times as many slots as with one. How many times as long does it take?
# 2. bf16 has half the bits of fp32. How many times faster is a training step on a laptop?
# 3. Muon replaces the singular values of each update by 1. How many singular value decompositions does it take a step?
# 4. Requests come at random. Is it better to wait for a full batch, or to start at once?
#
# Every time here is a **ratio** of two things measured in turn, on your machine, now: whatever else is running disturbs both alike.

# %%
import sys
sys.path[:0] = ["..", "../.."]  # the repository, seen from lessons/ and from lessons/solutions/
import contextlib, io, os, statistics, subprocess, time, matplotlib.pyplot as plt, torch, torch.nn as nn, torch.nn.functional as F
import kernels, nano_ar; from types import SimpleNamespace; from lessons.checks import band, lesson_22 as check, put, steps
mine = SimpleNamespace(without_cache=None, fuse=None, serve=None)  # your functions go here

# %%
def side_by_side(functions, rounds=5):
    """{name: function} -> {name: median seconds}. One after the other, round by round, after one round to warm up."""
    seconds = {name: [] for name in functions}
    for _ in range(1 + steps(rounds, few=1)):
        for name, function in functions.items():
            begun = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - begun)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}

images, labels = nano_ar.glyphs(steps(5000, few=300), 0)
codebook = nano_ar.fit_codebook(images, 256, torch.Generator().manual_seed(0))
tokens, last = nano_ar.encode(images, codebook), steps(500, few=40)
data = SimpleNamespace(train_tokens=tokens[:-last], train_labels=labels[:-last], test_tokens=tokens[-last:], test_labels=labels[-last:],
                       codebook_size=len(codebook), classes=10)

# %% [markdown]
# ## The cache
#
# The keys and values of a slot depend on the slots before it, and never change. So `generate` keeps them: each of the 64 calls computes one slot. Without
# a cache, one calls the training forward pass on all 64 slots and uses one row of it.
#
# **Exercise 1.** `without_cache(model, labels, rng)`: labels (B,) -> tokens (B, 64), drawn from the plain model with `model(tokens, labels)` -> (B, 64, V) alone, and
# `kernels.sample(logits, generator=rng)`. With the same `rng` it must give the very tokens of `nano_ar.generate(model, labels, rng)`.
#
# *Hint:* row t has read the class and the tokens *before* t. What stands in the places not yet drawn does not matter; why?

# %%
@torch.no_grad()
def without_cache(model, labels, rng):
    """Draw tokens by calling the whole model for each of them."""
    # SOLUTION (about 5 lines, 10 minutes)
    tokens = torch.zeros(len(labels), model.length, dtype=torch.long)
    for t in range(model.length):
        logits = model(tokens, labels)[:, t]
        tokens[:, t] = kernels.sample(logits, generator=rng)
    return tokens
    # END


check.check_without_cache(without_cache)

# %%
torch.manual_seed(0)
model = nano_ar.GPT(len(codebook), 10, 8, 8, dim=96, depth=2, heads=3)
with put(mine, "without_cache", without_cache):
    for B in (1, 16)[:steps(2, few=1)]:
        some = torch.arange(B) % 10
        s = side_by_side({"cache": lambda: nano_ar.generate(model, some, None), "none": lambda: mine.without_cache(model, some, None)}, 3)
        print(f"batch {B:2}: 64 x 64 slots instead of 64, and {s['none'] / s['cache']:.1f} times as long")

# %% [markdown]
# 64 times as many slots, and far less than 64 times the time: a call for one slot of one image is not limited by arithmetic. In each block it starts dozens of small operations, each of which costs
# microseconds before it multiplies anything; so does the call without a cache. In a batch of 16 the multiplications begin to count, and the ratio moves towards the slots'.
#
# The cache buys this with memory, 2 x 2 x 64 x 96 numbers an image here (layers, keys and values, slots, width), and stands on one property of the model: no slot looks ahead. Otherwise every
# new token would change all keys, and nothing could be kept.
#
# Without a cache one may still pass only the t slots that are there: 64 * 65 / 2 = 2,080, not 4,096. The baseline is half of a claim.
#
# ## Numbers of 16 bits, and the machine below
#
# Three switches leave the model alone: `torch.compile` (which needs a C++ compiler), bf16 autocast, and where the C library puts large tensors. The first call of a compiled block waits for the compiler;
# one block is compiled here, and serves all layers. For the other two each
# variant runs in a process of its own. `ONEDNN_MAX_CPU_ISA=AVX2` forbids the instructions that most laptops lack.
# `MALLOC_TRIM_THRESHOLD_` and `MALLOC_MMAP_THRESHOLD_` tell Linux's C library (glibc) to keep freed memory, which else is often asked of the system anew and filled with zeros.

# %%
def one_block(block):
    """Forward and backward pass of 64 images through one block."""
    block(x, model.cos, model.sin, kernels.causal(64)).square().mean().backward()

x = torch.randn(64, 64, 96, generator=torch.Generator().manual_seed(0))
try:
    assert steps(2, few=1) == 2, "left out in the tests"
    compiled, begun = torch.compile(model.blocks[0]), time.perf_counter()
    one_block(compiled)
    waited = time.perf_counter() - begun
    s = side_by_side({"plain": lambda: one_block(model.blocks[0]), "compiled": lambda: one_block(compiled)}, 20)
    print(f"compiled: {s['plain'] / s['compiled']:.2f} times as fast; the first call took as long as {waited / s['plain']:.0f} plain ones")
except Exception as error:
    print("torch.compile is skipped:", type(error).__name__, (str(error).splitlines() or [""])[0][:80])
model.zero_grad()

# %%
PROGRAM = """
import sys; sys.path[:0] = ["..", "../.."]
import torch, nano_ar
torch.manual_seed(0)
model = nano_ar.GPT(256, 10, 8, 8, 96, 2, 3)
G = [torch.randn_like(p) for p in model.blocks.parameters()]
x, c, dtype = torch.randint(256, (64, 64)), torch.zeros(64, dtype=torch.long), getattr(torch, sys.argv[1])
def step():
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = nano_ar.loss_of(model, x, c)
    loss.backward(); model.zero_grad()
print(nano_ar.milliseconds(step), nano_ar.milliseconds(lambda: [nano_ar.orthogonalize(g, dtype) for g in G]))
"""
LAPTOP = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
KEEP = {"MALLOC_TRIM_THRESHOLD_": "536870912", "MALLOC_MMAP_THRESHOLD_": "33554432"}
variants = {"fp32": {}, "fp32, memory kept": KEEP, "bf16": {}, "fp32, a laptop's instructions": LAPTOP, "bf16, a laptop's instructions": LAPTOP}

# %%
took = {name: [] for name in variants}
for turn in range(steps(2, few=0)):  # in turn, twice, a laptop's once; not in the tests
    for name, environment in list(variants.items())[:None if turn == 0 else 3]:
        dtype = "bfloat16" if name.startswith("bf16") else "float32"
        done = subprocess.run([sys.executable, "-c", PROGRAM, dtype], env={**os.environ, **environment}, capture_output=True, text=True)
        took[name].append([float(number) for number in done.stdout.split()])
for name, runs in took.items():
    if all(took.values()) and runs[0]:
        ratio = [min(fast) / min(slow) for fast, slow in zip(zip(*took["fp32"]), zip(*runs))]
        step, muon = map(min, zip(*runs))
        print(f"{name:32} speed of a step {ratio[0]:5.2f}, of Muon's products {ratio[1]:5.2f}; products / step {muon / step:.2f}")

# %% [markdown]
# Compiled: if it is r times as fast, the wait w is paid back after w / (1 - 1/r) passes through a block. At first use w is several times larger than here: torch keeps the result on disk. So nano_ar, whose run has some
# hundred steps, does not compile; thousands of steps on a GPU are another matter.
#
# The others: read your own five lines. Keeping memory is worth some percent on Linux, for the price of typing
#
#     MALLOC_TRIM_THRESHOLD_=536870912 MALLOC_MMAP_THRESHOLD_=33554432 python nano_ar.py
#
# And **bf16 is not "half the bits, twice the speed"**. It is fast where the hardware has an instruction for it (`avx512_bf16`, AMX, a GPU), and even there large products gain and small ones,
# like Muon's, hardly. Without the instruction, as on most laptops, each number is converted on the way in and out, and bf16 is *several times slower* than fp32. So
# `pick_device` asks the processor first.
#
# The column of Muon's products is why nano_ar has a Muon of its own: `torch.optim.Muon` always takes them in bf16, a trap on a laptop, where the
# loss still falls and nobody sees why the fan runs. Ours takes the products in the dtype that it is told.
#
# ## Muon by hand
#
# A gradient matrix $G=USV^\top$ has a few large singular values and many small ones: a step along $G$ moves a few directions and hardly the rest. Muon (Jordan et al. 2024) steps along
# $UV^\top$: all directions equally. An SVD for each matrix and step would be slow. The way around it:
#
# $$XX^\top X=(USV^\top)(VSU^\top)(USV^\top)=US^3V^\top,$$
#
# since $V^\top V$ and $U^\top U$ are the identity; each further factor $XX^\top$ raises the power by two. An **odd polynomial of the matrix is the same polynomial of each singular value, and leaves $U$ and $V$ alone**:
#
# $$aX+b\,XX^\top X+c\,(XX^\top)^2X=U\,(aS+bS^3+cS^5)\,V^\top .$$
#
# Even powers would not do: $XX^\top=US^2U^\top$ has lost $V$. Now choose $a,b,c$ so that the polynomial, applied again and again, drives every number in $(0,1]$ towards 1. Dividing
# $X$ by its Frobenius norm brings all singular values into that interval, because that norm is the root of the sum of their squares.
#
# **Exercise 2.** `odd_polynomial(X, coefficients)`: X (m, n), coefficients $(a_1,a_3,a_5,\dots)$, any number of them -> $a_1X+a_3XX^\top X+a_5(XX^\top)^2X+\dots$, without an SVD. For a 1 x 1 matrix (2) and (1, 1): $2+2^3=10$.

# %%
def odd_polynomial(X, coefficients):
    """The polynomial a1 s + a3 s^3 + a5 s^5 + ... of every singular value s of X."""
    # SOLUTION (about 6 lines, 10 minutes)
    power, total = X, torch.zeros_like(X)
    for a in coefficients:
        total = total + a * power
        power = X @ X.mT @ power
    return total
    # END


check.check_odd_polynomial(odd_polynomial)

# %% [markdown]
# Five numbers through five rounds of Muon's polynomial $3.4445\,s-4.7750\,s^3+2.0315\,s^5$:

# %%
s = torch.tensor([0.001, 0.01, 0.1, 0.5, 1.0], dtype=torch.double)
for rounds in range(6):
    print(f"after {rounds} rounds:", "  ".join(f"{x:.4f}" for x in s.tolist()))
    s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5

# %%
figure, axes = plt.subplots(1, 2, figsize=(8, 2.5), layout="constrained")
x = s = torch.linspace(0, 1, 2000, dtype=torch.double)
for rounds in range(5):
    s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    if rounds in (0, 1, 4):
        axes[0].plot(x, s, label=f"{rounds + 1} rounds")
axes[0].set(xlabel="singular value", title="Muon's polynomial")
axes[0].legend(fontsize=7)
G = torch.randn(96, 96, generator=torch.Generator().manual_seed(0)) @ torch.diag(torch.logspace(0, -3, 96))
print(f"after five rounds, what started in 0.1 .. 1 lies in {s[x >= 0.1].min():.2f} .. {s[x >= 0.1].max():.2f}")
for what, matrix in (("gradient / norm", G / G.norm()), ("after orthogonalize", nano_ar.orthogonalize(G))):
    axes[1].semilogy(torch.linalg.svdvals(matrix), label=what)
axes[1].set(title="96 singular values")
axes[1].legend(fontsize=7)
plt.show()

# %% [markdown]
# The slope $a=3.4445$ at 0 lifts small values fast; the price is that the large ones never settle at 1 but wander around it, as the printed range says. It does not matter: the
# directions need steps of the same *order*. A value of 0.001 is still at 0.47 after five rounds, and smaller ones are left behind: the right end of the second picture, made from a random matrix whose columns shrink by a factor of 1,000.
#
# The cost: three products of the size of the weight matrix in each round, once a step, while training multiplies each matrix with all 4,096 slots of the batch: a small share of a step (last column of the
# table above), and smaller for larger batches.
#
# Does it pay? The same model, 100 steps, AdamW alone at three rates against Muon at the script's own.

# %%
config = nano_ar.read_settings(["train", "--steps", str(steps(100))])[1]

def fit(network=None, **changes):
    """Train a small model -> the model, its nats per held-back image."""
    torch.manual_seed(0)
    network = network or nano_ar.GPT(len(codebook), 10, 8, 8, dim=96, depth=2, heads=3)
    with contextlib.redirect_stdout(io.StringIO()):  # without its five reports
        history = nano_ar.train(SimpleNamespace(**{**vars(config), **changes}), network, data)
    return network, history[-1]["test"]

def adamw_alone(model, config, dtype):
    return [torch.optim.AdamW(model.parameters(), config.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)]

begun = time.perf_counter()
raster, muon_nats = fit()
muon_seconds = time.perf_counter() - begun
print(f"Muon at {config.lr:<5} {muon_nats:6.1f} nats per held-back image after {config.steps} steps")

# %%
with put(nano_ar, "make_optimizers", adamw_alone):
    for lr in (0.003, 0.01, 0.03)[:steps(3, few=1)]:
        print(f"AdamW at {lr:<5} {fit(lr=lr)[1]:6.1f} nats")

# %% [markdown]
# Two traps in such comparisons. A rival at one rate is no rival: see how far the three lie apart, and whether the best is at the edge of those tried (then try more). And "after 100 steps" is not "in the end": what is left after ten thousand
# was not measured here. Muon is for the matrices *inside* the blocks: the rows of an embedding are separate vectors, of which a batch touches a few. `make_optimizers` leaves these, the slot vectors and the head to AdamW.
#
# ## Fewer calls: Token-Shuffle
#
# Token-Shuffle (arXiv:2504.17789) lays 2 x 2 neighbouring tokens side by side into one wide vector, runs the transformer on 16 slots instead of 64, and predicts four
# tokens at once from each. The four are drawn **independently of each other** given the past; but they do depend on each other.
#
# **Exercise 3.** `fuse(x, rows, columns, s)`: (B, rows * columns, C) in raster order -> (B, rows * columns / s^2, s * s * C): the s x s square of cells of each slot, row by row; slots in raster order, too. For a 2 x 4 grid of the numbers 0 .. 7, with s = 2: (0, 1, 4, 5), (2, 3, 6, 7). *Hint:* six axes.

# %%
def fuse(x, rows, columns, s):
    """Squares of s x s cells, side by side."""
    # SOLUTION (about 3 lines, 10 minutes)
    cut = x.reshape(len(x), rows // s, s, columns // s, s, -1)
    cut = cut.transpose(2, 3)  # (B, slot row, slot column, row in it, column in it, C)
    return cut.reshape(len(x), rows * columns // s**2, -1)
    # END


check.check_fuse(fuse)

# %%
class Shuffled(nano_ar.GPT):
    """16 slots of four tokens: the vectors of the four are a quarter as wide, so that together they are as wide as a slot."""

    def __init__(self, codebook_size, classes, dim, depth, heads):
        super().__init__(codebook_size, classes, 4, 4, dim, depth, heads)
        self.length = 64  # tokens of an image: `train` reports nats by it
        self.token = nn.Embedding(codebook_size, dim // 4)
        self.head = nn.Linear(dim, 4 * codebook_size, bias=False)
        nn.init.zeros_(self.head.weight)
        cells = torch.arange(64).view(4, 2, 4, 2).transpose(1, 2).flatten()
        self.register_buffer("cells", cells, persistent=False)  # (64,) the raster cells, slot by slot

    def forward(self, tokens, labels):
        vectors = self.token(tokens[:, self.cells]).view(len(tokens), 16, -1)
        x = torch.cat([self.label(labels)[:, None], vectors[:, :-1]], dim=1) + self.slot
        for block in self.blocks:
            x = block(x, self.cos, self.sin, kernels.causal(16))
        logits = self.head(nano_ar.norm(x)).view(len(tokens), 64, -1)
        return logits[:, self.cells.argsort()]  # raster order again, as the loss expects

    @torch.no_grad()
    def draw(self, labels, rng):
        x, cache, drawn = self.label(labels)[:, None], self.new_cache(len(labels)), []
        for t in range(16):
            drawn.append(kernels.sample(self.step(x, t, cache).view(len(labels), 4, -1), generator=rng))
            x = self.token(drawn[-1]).view(len(labels), 1, -1)
        return torch.cat(drawn, 1)[:, self.cells.argsort()]

# %%
torch.manual_seed(0)
shuffled, shuffled_nats = fit(Shuffled(len(codebook), 10, dim=96, depth=2, heads=3))
judge, some = nano_ar.train_judge(images[:-last], labels[:-last], 10, "cpu", 0), labels[-last:]
few = some[:16]
s = side_by_side({"raster": lambda: nano_ar.generate(raster, few, None), "shuffled": lambda: shuffled.draw(few, None),
                  "learn raster": lambda: nano_ar.loss_of(raster, tokens[:64], labels[:64]).backward(),
                  "learn shuffled": lambda: nano_ar.loss_of(shuffled, tokens[:64], labels[:64]).backward()})
print(f"drawing {s['raster'] / s['shuffled']:.1f}, training {s['learn raster'] / s['learn shuffled']:.1f} times as fast")
figure, axes = plt.subplots(2, 1, figsize=(7, 1.5), layout="constrained")
for name, nats, drawn, axis in (("raster", muon_nats, nano_ar.generate(raster, some, torch.Generator().manual_seed(0)), axes[0]),
                                ("shuffled", shuffled_nats, shuffled.draw(some, torch.Generator().manual_seed(0)), axes[1])):
    m = nano_ar.image_metrics(judge, nano_ar.decode(drawn, codebook), some, images[-last:])
    print(f"{name:9} {nats:6.1f} nats, gFD {m['gfd']:6.2f}, accuracy {m['class_accuracy']:.3f}")
    axis.imshow(torch.cat(list(nano_ar.decode(drawn[:14], codebook)), 1), cmap="gray")
    axis.set(xticks=[], yticks=[], ylabel=name)
plt.show()

# %% [markdown]
# A quarter of the calls, each a little dearer, as the head is four times as large. The price stands in nats: both models give a probability to the *same tokens*, so their
# likelihoods may be compared, and the shuffled one is behind. Where a stroke crosses the border between two of the four cells, each guesses alone whether it does.
# More training does not cure it: a product of four laws cannot say that the four depend on each other. (Accuracy is the wrong witness: after 100 steps both draw poor digits, and a judge
# may recognise the worse ones as often.)
#
# Lesson 20 has other ways to call less often; lesson 42 asks what an exact one needs.
#
# ## Batches that never end
#
# What does a call for B images cost?

# %%
@torch.no_grad()
def ten_calls(B):
    cache, x = raster.new_cache(B), raster.label(torch.zeros(B, dtype=torch.long))[:, None]
    return lambda: [raster.step(x, t, cache) for t in range(20, 30)]

with torch.no_grad():
    cost = side_by_side({B: ten_calls(B) for B in (1, 2, 4, 8, 16, 32)})
print("cost of a call, batch 1 = 1: ", "  ".join(f"{B}: {c / cost[1]:.2f}" for B, c in cost.items()))

# %% [markdown]
# So batches pay. But requests come when they like, and some need fewer calls: the lower half for a given upper one takes 32. A **static** server takes what waits, up to `slots` requests,
# and no new one until all of them are done. A **continuous** one (Orca; Flover, arXiv:2305.13484) decides before every call: whoever is done leaves, whoever waits joins.
#
# **Exercise 4.** `serve(arrivals, lengths, slots)`: request i may take part in calls from number `arrivals[i]` on (sorted integers) and needs `lengths[i]` calls. At most `slots` take part in a call; first come, first served; nobody is interrupted. Return the number of the call
# after which each is done, plus one: `serve([0, 0, 1], [3, 1, 2], 2)` is `[3, 1, 3]`.

# %%
def serve(arrivals, lengths, slots):
    """Continuous batching -> when each request is finished, in calls."""
    # SOLUTION (about 12 lines, 20 minutes)
    left, done = list(lengths), [0] * len(lengths)
    waiting, active, now = list(range(len(lengths))), [], 0
    while waiting or active:
        while waiting and len(active) < slots and arrivals[waiting[0]] <= now:
            active.append(waiting.pop(0))
        now += 1
        for i in active:
            left[i] -= 1
            if left[i] == 0:
                done[i] = now
        active = [i for i in active if left[i] > 0]
    return done
    # END


check.check_serve(serve)

# %%
def serve_static(arrivals, lengths, slots):
    done, now, first = [], 0, 0
    while first < len(arrivals):
        now = max(now, arrivals[first])
        group = [i for i in range(first, min(first + slots, len(arrivals))) if arrivals[i] <= now]
        done += [now + lengths[i] for i in group]
        now, first = max(done[i] for i in group), group[-1] + 1
    return done

rng = torch.Generator().manual_seed(0)
lengths = (32 * torch.randint(1, 3, (300,), generator=rng)).tolist()  # half-given and whole images
with put(mine, "serve", serve):
    for rate in (0.05, 0.1, 0.3, 0.15):  # requests a call; 8 slots can do 8 / 48 = 0.17
        arrivals, spent = torch.empty(300).exponential_(rate, generator=rng).cumsum(0).int().tolist(), {}
        for name, function in (("static", serve_static), ("continuous", mine.serve)):
            spent[name] = [end - begin for begin, end in zip(arrivals, function(arrivals, lengths, 8))]
        print(f"{rate:.2f} requests a call: mean time until done", {name: round(statistics.mean(calls)) for name, calls in spent.items()})
    figure, axis = plt.subplots(figsize=(6, 2.2), layout="constrained")
    for name, calls in spent.items():
        axis.plot(arrivals, calls, label=name)
    axis.set(xlabel=f"call of arrival ({rate} requests a call)", ylabel="calls until done")
    axis.legend(fontsize=7)
    plt.show()

# %% [markdown]
# With a static server, who comes one call late waits for up to 64. And a half image that is done after 32 calls keeps its place empty until the whole ones
# are done: fewer are served in the same calls, and the queue grows (the picture) at a rate that the continuous server still bears. Above 0.17 requests a call both queues grow, and only more slots help.
#
# What does this ask of the model? The rows of one call stand at different slots: each needs its own position (slot vector, angles of RoPE) and its own length of the cache. Rows of a batch never mix, so that is
# all; but `GPT.step` takes one t for all rows.

# %% [markdown]
# ## Beside nanoGPT
#
# Give the path of nanoGPT's `model.py` (github.com/karpathy/nanoGPT) in the environment variable `NANOGPT`, and the next cell trains it on the same tokens, with its own AdamW
# and the class as a first token, as long as our 100 steps took (looks at held-back images included). In full, 300 seconds of nanoGPT at the size of the script, then how soon nano_ar reaches that loss:
#
#     python tests/bench_ar.py nanoGPT/model.py

# %%
if os.environ.get("NANOGPT"):
    from tests.bench_ar import load_module, nanogpt
    small = SimpleNamespace(seed=0, dim=96, depth=2, batch=64)
    with contextlib.redirect_stdout(io.StringIO()):
        nats, count, _ = nanogpt(load_module(os.environ["NANOGPT"]), small, data, torch.float32, muon_seconds, lr=3e-3)
    print(f"in the same time: nanoGPT {count / steps(100):.2f} times as many steps, {nats:.1f} nats; nano_ar {muon_nats:.1f} nats")
else:
    print("NANOGPT names no model.py: left out")

# %% [markdown]
# If you gave the path: nanoGPT's step is the cheaper one (positions in one dimension, no norm of queries and keys, no Muon), it takes more of them in the same time, and is behind. Tokens per second is not the goal; *seconds to a loss* is.
# But this rival has one rate, 0.003, at which AdamW did worst above. Change one difference at a time, and see.
#
# ## Put it into the script
#
# The classic Newton-Schulz iteration $\frac32X-\frac12XX^\top X$ converges to exactly 1 from everywhere in $(0,\sqrt3)$, but lifts small values by 1.5 a round only: 0.001 needs 17 rounds and more.
#
# **Exercise 5.** `polar(G, dtype=torch.float32)`: like `nano_ar.orthogonalize`, (m, n) -> (m, n), but with 20 rounds of the classic iteration, starting from $G$ over its Frobenius norm (plus 1e-7, as a gradient may be 0). Products in `dtype`, the result in the dtype of G.

# %%
def polar(G, dtype=torch.float32):
    """U V^T of G = U S V^T, by the classic iteration."""
    # SOLUTION (about 4 lines, 8 minutes)
    X = (G / (G.norm() + 1e-7)).to(dtype)
    for _ in range(20):
        X = 1.5 * X - 0.5 * (X @ X.mT @ X)
    return X.to(G.dtype)
    # END


check.check_polar(polar)

# %%
five, G = nano_ar.orthogonalize, torch.randn(384, 96, generator=torch.Generator().manual_seed(0))
with put(nano_ar, "orthogonalize", polar):
    nats = fit()[1]
    s = side_by_side({"five": lambda: five(G), "twenty": lambda: polar(G)}, 20)
    print(f"Muon's five rounds {muon_nats:.1f} nats; twenty classic ones {nats:.1f}, and {s['twenty'] / s['five']:.1f} times the products' time")
    band("nats", nats, muon_nats - 5, muon_nats + 5)

# %% [markdown]
# The loss moves by a nat or so, which one seed and 100 steps cannot tell from noise. Set that beside the distance to AdamW: what helps is that all directions are of
# *one order*. The five rounds give away next to nothing, and take 15 products, not 40 (and smaller ones: `orthogonalize` works on the short side of a tall matrix).
#
# ## Your four guesses, and what did not work
#
# 1. Printed above: far from 64 for one image, nearer for a batch. 2. With a laptop's instructions: several times *slower*. 3. None; fifteen products a matrix. 4. Start at once, if others may join before every call.
#
# What did not work: compiling a short run; bf16 as a habit; Token-Shuffle as a gift (it drops a dependence that is there); exact orthogonality, fifteen more rounds for a difference in the noise.
#
# **Read on.** Jordan et al., *Muon* (2024, kellerjordan.github.io/posts/muon), with the search for the three coefficients; Higham, *Functions of Matrices* (2008), chapter 8, for the classic iteration; Yu et al., *Orca* (OSDI 2022), and Flover. Lesson 60 looks inside one attention call.
