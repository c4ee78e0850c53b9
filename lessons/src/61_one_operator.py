# %% [markdown]
# # 61 One operator three times
#
# **Three statements. Which of them are true?**
#
# 1. A recurrent network carries a state of fixed size; attention must keep every key it has seen.
# 2. Sixty-four processors can share the keys of one query, but the answer is then an approximation, because each part is normalised by its own sum.
# 3. To sample from the likeliest tokens that hold nine tenths of the mass (top-p), the probabilities must be sorted.
#
# Decide before you go on. One addition settles the first two; a race and a binary search settle the third.

# %%
import sys
sys.path[:0] = ["..", "../.."]  # the repository, seen from lessons/ and from lessons/solutions/
import math, matplotlib.pyplot as plt, torch, kernels
import torch.nn.functional as F
from lessons.checks import band, lesson_61 as check, put, steps

# %% [markdown]
# ## An addition for sets of keys
#
# Seen from one query, a set of keys is three things: $m$, the largest score; $u=\sum e^{s_j-m}$; $w=\sum e^{s_j-m}v_j$. Its attention is $w/u$. The summary of the
# union of two disjoint sets follows from their summaries, whatever is in them (arXiv:2405.13956, section 3.2):
#
# $$(m,u,w)\oplus(m',u',w')=\big(M,\ u\,e^{m-M}+u'e^{m'-M},\ w\,e^{m-M}+w'e^{m'-M}\big),\qquad M=\max(m,m').$$
#
# Worked: the set {score log 2, value 3} is (log 2, 1, 3), the set {log 4, 5} is (log 4, 1, 5). The larger maximum is log 4, and the first set counts half: the
# union is (log 4, 1.5, 6.5), with attention 6.5 / 1.5.

# %%
a, b = (torch.tensor([math.log(x), 1.0]).unbind() + (torch.tensor([y]),) for x, y in ((2.0, 3.0), (4.0, 5.0)))
m, u, w = kernels.merge(a, b)
print(f"m = {m.item():.3f} (log 4 = {math.log(4):.3f}), u = {u.item():.1f}, w = {w.item():.1f}, w / u = {(w / u).item():.3f}")
print(f"softmax: {(2 * 3 + 4 * 5) / 6:.3f}")

# %% [markdown]
# **Exercise 1.** `merge(a, b)`: two summaries, each (m, u, w) with m and u of any shape (..) and w (.., D) -> their sum. The empty set is $(-\infty,0,0)$ and must
# change nothing, also when added to itself.
#
# *Hint:* only the subtraction must not see $-\infty$ twice; the m that you return may be $-\infty$.

# %%
def merge(a, b):
    """The summary of the union of two disjoint sets of keys."""
    # SOLUTION (about 5 lines, 8 minutes)
    (m1, u1, w1), (m2, u2, w2) = a, b
    m = torch.maximum(m1, m2)
    shift = torch.where(m == -torch.inf, 0.0, m)  # two empty sets: e^(-inf - 0) = 0
    x, y = torch.exp(m1 - shift), torch.exp(m2 - shift)
    return m, u1 * x + u2 * y, w1 * x[..., None] + w2 * y[..., None]
    # END


check.check_merge(merge)

# %% [markdown]
# Like every sum, $a\oplus b\oplus c\oplus d$ may be bracketed as you like. Three ways have names:
#
# | order | who adds | name |
# |---|---|---|
# | $((a\oplus b)\oplus c)\oplus d$ | one worker, n - 1 steps | a **fold**: flash attention (lesson 60) |
# | $(a\oplus b)\oplus(c\oplus d)$ | many workers, $\log_2 n$ steps | a **tree**: split-K decoding |
# | $a,\ a\oplus b,\ a\oplus b\oplus c,\dots$ | all partial sums are wanted | a **scan**: attention as an RNN |
#
# A summary of n keys at once is a tuple (n,), (n,), (n, D); a single key is $(s_j,1,v_j)$.

# %%
def fold(state, add):
    """One after the other."""
    total = [x[0] for x in state]
    for j in range(1, len(state[0])):
        total = add(total, [x[j] for x in state])
    return total


def tree(state, add):
    """In pairs; an odd one waits for the next round."""
    while len(state[0]) > 1:
        n = len(state[0]) // 2 * 2
        pairs = add([x[0:n:2] for x in state], [x[1:n:2] for x in state])
        state = [torch.cat([pair, x[n:]]) for pair, x in zip(pairs, state)]
    return [x[0] for x in state]


# %%
rng, errors, sizes = torch.Generator().manual_seed(0), {"fold": [], "tree": []}, (16, 64, 256, 1024, 4096)
for n in sizes:
    s, v = torch.randn(n, generator=rng), torch.rand(n, 16, generator=rng)
    truth = s.double().softmax(0) @ v.double()
    for way in (fold, tree):
        out = kernels.finish(way([s, torch.ones(n), v], kernels.merge))[0]
        errors[way.__name__].append(float((out - truth).norm() / truth.norm()))
    print(f"{n:5} keys: fold {n - 1:4} steps, error {errors['fold'][-1]:.0e}; tree {math.log2(n):2.0f} steps, error {errors['tree'][-1]:.0e}")

# %%
figure, axis = plt.subplots(figsize=(5, 2.3), layout="constrained")
for name, values in errors.items():
    axis.loglog(sizes, values, "o-", label=name)
axis.set(xlabel="keys", ylabel="relative error", title="float32 against float64")
axis.legend()
plt.show()

# %% [markdown]
# Both are exact up to rounding, so **statement 2 is false**: the parts carry their sums with them. The tree is even the better one, since a number goes through
# 12 roundings instead of 4,095. (A flash kernel folds tiles of 64 keys, not single keys, and so takes 64 times fewer steps.)
#
# ## The tree: one query, many processors
#
# While a model writes, there is one new query a head and a long cache. With one program a head, 16 heads keep 16 of a large GPU's 132 processors busy. So the
# cache is cut into parts, each program summarises one (`_decode_chunks` in kernels.py), and a second small kernel adds (`_decode_merge`; Flash-Decoding, 2023).
# What a part leaves behind is usually written as its *output* $o_c=w_c/u_c$ and its log-sum-exp $\ell_c=m_c+\log u_c$: that is a summary too, $(\ell_c,1,o_c)$.
#
# **Exercise 2.** `combine(o, lse)`: outputs (parts, H, D) and log-sum-exps (parts, H) -> (H, D). A part without keys has o = 0 and lse = $-\infty$; a head without any
# key gives 0. Two parts with lse 0 and log 3 and outputs 4 and 8: 7.
#
# *Hint:* how many keys' worth is each part? Do it for all parts at once, no loop.

# %%
def combine(o, lse):
    """Attention over all parts, from the attention over each."""
    # SOLUTION (about 5 lines, 8 minutes)
    m = lse.amax(0)  # (H,)
    shift = torch.where(m == -torch.inf, 0.0, m)
    weight = torch.exp(lse - shift)  # (parts, H): sums of exponentials, relative to the largest part
    total = weight.sum(0)
    return (weight[..., None] * o).sum(0) / torch.where(total == 0, 1.0, total)[:, None]
    # END


check.check_combine(combine)

# %% [markdown]
# The script's op, `kernels.decode_attention`, beside parts that were summarised one by one. Only the first 300 of the 512 places of the cache are filled; whoever cuts the room instead of
# what is in it reads rubbish.

# %%
rng = torch.Generator().manual_seed(1)
q, k, v = (torch.randn(1, 4, n, 16, generator=rng) for n in (1, 512, 512))
k[:, :, 300:], v[:, :, 300:] = torch.nan, torch.nan
parts = [kernels.summarize(q @ k[:, :, lo:lo + 50].mT / 4, v[:, :, lo:lo + 50]) for lo in range(0, 300, 50)]
total = tree([torch.stack(x) for x in zip(*parts)], kernels.merge)
print(f"largest difference: {(kernels.finish(total)[0] - kernels.decode_attention(q, k, v, 300)).abs().max():.0e}")

# %% [markdown]
# How many parts? With n keys in c parts, a program walks over n / c keys. If c summaries are then added one after another, that makes n / c + c steps in a row,
# least at $c=\sqrt n$. (A real GPU has a limited number of processors and moves whole tiles, but the shape is this. kernels.py takes a part for 256
# places, at most 64 parts, and adds them all at once, as in exercise 2.)

# %%
n, parts = 8192, [1, 8, 32, 91, 256, 1024, 8192]
for c in parts:
    print(f"{c:5} parts: {16 * c:6} programs, {n / c + c:6.0f} steps in a row")

# %% [markdown]
# ## The scan: attention as an RNN
#
# Sometimes every partial sum is an answer: row j of causal attention is the attention over keys 0 to j. If all rows ask **the same query**, one scan gives them all (Feng
# et al., arXiv:2405.13956), in $\log_2 n$ rounds (Hillis and Steele): in the round with distance $d=1,2,4,\dots$ each position adds the summary that stands d places before it, all
# positions at once. After the rounds 1, 2, 4 position 7 holds keys 0 to 7.
#
# **Exercise 3.** `scan(s, v)`: scores (N,), values (N, D) -> outputs (N, D), row j over keys 0 to j. Call `kernels.merge` once a round, $\lceil\log_2 N\rceil$ times in all.
#
# *Hint:* the first d positions have nobody d places before them and stay as they are.

# %%
def scan(s, v):
    """Attention over every prefix."""
    # SOLUTION (about 7 lines, 15 minutes)
    state = [s, torch.ones_like(s), v]  # single keys
    step = 1
    while step < len(s):
        later = kernels.merge([x[:-step] for x in state], [x[step:] for x in state])
        state = [torch.cat([x[:step], y]) for x, y in zip(state, later)]
        step *= 2
    return kernels.finish(state)[0]
    # END


check.check_scan(scan)

# %% [markdown]
# With all scores 0, u counts the keys in a summary. So u shows who has heard of how many keys, round by round:

# %%
state, rounds = [torch.zeros(16), torch.ones(16), torch.zeros(16, 1)], [torch.ones(16)]
for step in (1, 2, 4, 8):
    later = kernels.merge([x[:-step] for x in state], [x[step:] for x in state])
    state = [torch.cat([x[:step], y]) for x, y in zip(state, later)]
    rounds.append(state[1])
plt.figure(figsize=(7, 1.9), layout="constrained")
plt.imshow(torch.stack(rounds), cmap="Blues", aspect="auto")
for (r, j), count in zip(torch.cartesian_prod(torch.arange(5), torch.arange(16)).tolist(), torch.cat(rounds)):
    plt.text(j, r, int(count), ha="center", va="center", color="white" if count > 8 else "black")
plt.gca().set(xlabel="position", ylabel="round", title="keys in the summary")
plt.show()

# %% [markdown]
# The same sum read from left to right is a recurrent network: state (m, u, w), one key in, one output out. `kernels.scan_attention` takes and returns the state, so a
# stream may come in pieces of any size.

# %%
rng = torch.Generator().manual_seed(2)
s, v = torch.randn(1, 100, generator=rng), torch.randn(1, 100, 16, generator=rng)
pieces, state = [], None
for lo in range(0, 100, 7):
    out, state = kernels.scan_attention(s[:, lo:lo + 7], v[:, lo:lo + 7], state, return_state=True)
    pieces.append(out)
print(f"in pieces of 7, or at once: {(torch.cat(pieces, 1) - kernels.scan_attention(s, v)).abs().max():.0e} apart")
print(f"kept after 100 keys: {sum(x.numel() for x in state)} numbers instead of {100 * 2 * 16}")

# %% [markdown]
# **Statement 1 is false, if the query is fixed, and true otherwise.** A token that asks its own question makes new scores with all keys, and no summary made for another
# question answers it. How much does that cost? Two tasks, one layer: say the largest token so far; say the token eight places back.

# %%
def last_loss(fixed, task, count):
    """Train one layer; its query is one learned vector a head (fixed), or made from each token."""
    torch.manual_seed(0)
    parts = {"token": torch.nn.Embedding(16, 64), "place": torch.nn.Embedding(24, 64)}
    net = torch.nn.ModuleDict(parts | {"qkv": torch.nn.Linear(64, 192), "head": torch.nn.Linear(64, 16)})
    query = torch.nn.Parameter(torch.randn(4, 1, 16))
    optimizer = torch.optim.AdamW([*net.parameters(), query], 3e-3)
    for _ in range(steps(count)):
        x = torch.randint(16, (64, 24))
        h = net.qkv(net.token(x) + net.place.weight).view(64, 24, 3, 4, 16)  # 4 heads of 16
        q, k, v = h.permute(2, 0, 3, 1, 4)
        y = kernels.scan_attention((query * k).sum(-1) / 4, v) if fixed else kernels.attention(q, k, v, kernels.causal(24))
        logits = net.head(y.transpose(1, 2).flatten(2))
        wanted = x.cummax(1).values if task == "largest so far" else x.roll(8, 1)
        loss = F.cross_entropy(logits[:, 8:].flatten(0, 1), wanted[:, 8:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


# %%
for task in ("largest so far", "eight places back"):
    print(f"{task:18} fixed query: loss {last_loss(True, task, 150):.3f}   own query: {last_loss(False, task, 150):.3f}")
print(f"guessing among 16: {math.log(16):.3f}")

# %% [markdown]
# What a running sum can hold, the fixed query learns as well as attention does. *Where to look* it cannot change from token to token, and there it is little
# better than guessing. This does not work, and it is why key-value caches exist.
#
# ## Sampling without a sort
#
# Give token j an exponential clock that rings at time $E_j/p_j$, with independent unit exponentials $E_j$. The first clock to ring is j with probability $p_j/\sum p$. No sum, no
# normalisation, no search: a maximum of $p_j/E_j$ over the row, which a GPU finds without asking the CPU. It serves weights that do not sum to 1, and zeros never win.

# %%
weights, rng = torch.tensor([4.0, 2.0, 1.0, 1.0, 0.0]), torch.Generator().manual_seed(3)
noise = torch.empty(steps(100_000, few=1000), 5).exponential_(generator=rng)
wins = (weights / noise).argmax(1).bincount(minlength=5) / len(noise)
print("won:   ", wins)
print("wanted:", weights / weights.sum())

# %% [markdown]
# Top-p keeps a token iff the tokens *strictly* likelier than it hold less than `top_p` of the mass. Sorting is the obvious way. But one number decides: the
# largest threshold t such that the weights of at least t hold `top_p` of the mass. And a threshold can be found by halving, with sums alone: **statement 3 is
# false**. Floats are not evenly spaced; but those that are not negative are ordered like their 32 bits read as an integer, and 31 halvings find any such
# integer **exactly**.

# %%
p = torch.tensor([1e-30, 0.001, 0.5, 0.75, 1.0])
print(p.view(torch.int32).tolist())

# %% [markdown]
# **Exercise 4.** `nucleus(p, top_p)`: weights (V,), float32, none negative, not normalised -> the same with 0 where the weight is below the threshold. Tied tokens stay or go together. For
# `[4, 2, 1, 1]`: top_p 0.75 keeps `[4, 2, 0, 0]`, since 4 alone is half of the mass; 0.8 keeps all four.
#
# No sort, no topk. *Hint:* keep lo (certainly low enough) and hi (nothing above it is); which of them moves, and where must the middle round to so that the last step is made?

# %%
def nucleus(p, top_p):
    """The likeliest weights that hold top_p of the mass, by 31 halvings."""
    # SOLUTION (about 9 lines, 15 minutes)
    bits, need = p.view(torch.int32), top_p * p.sum()
    lo, hi = 0, int(bits.max())
    for _ in range(31):
        mid = (lo + hi + 1) // 2
        if p[bits >= mid].sum() >= need:
            lo = mid
        else:
            hi = mid - 1
    return torch.where(bits >= lo, p, 0.0)
    # END


check.check_nucleus(nucleus)

# %% [markdown]
# Now top-k beside top-p: the order is part of the definition. Most libraries apply top-k first and renormalise; the other order keeps other tokens.

# %%
logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
print(f"share of the first after top-k 2: {0.4 / (0.4 + 0.3):.2f}")
print("top-k 2, then top-p 0.5:", kernels.truncate(logits, top_k=2, top_p=0.5).exp())
print("top-p 0.5, then top-k 2:", kernels.truncate(kernels.truncate(logits, top_p=0.5), top_k=2).exp())

# %% [markdown]
# After top-k 2 the first token holds more than half of the mass: enough. Before it, it holds 0.4, and the second one is needed. When two programs sample
# differently from the same logits, look at this order first.
#
# ## Verifying drafts on the device
#
# Speculative sampling (arXiv:2211.17192, Algorithm 1) needs the same two tools. A small model drew g tokens from its laws q; the large one computed its laws p, g + 1 of them. Draft t stays if
# $u_t\,q_t(d_t)<p_t(d_t)$, as long as all before it stayed. After the first refusal one token is drawn from the *residual* $\max(p-q,0)$; if all stay, a bonus token from the last p. What comes
# out has exactly the law p. In a batch on a GPU: no loop over the rows, no normalisation (the race does not need it), nothing that the CPU must know.
#
# **Exercise 5.** `verify(p_target, p_draft, drafts, uniforms, noise)`: p_target (B, g + 1, V), p_draft (B, g, V), drafts (B, g), uniforms (B, g), noise (B, V) of unit exponentials -> tokens
# (B, g + 1), with -1 after the last, and the number of accepted drafts n (B,). If nothing is left of the residual (p = q, refused by a rounding), draw from p.
#
# *Hint:* `cumprod` turns "this one stays" into "all up to here stay". A row of zeros behind p_draft makes the bonus token an ordinary case.

# %%
def verify(p_target, p_draft, drafts, uniforms, noise):
    """Speculative sampling for a batch of drafted chains."""
    # SOLUTION (about 13 lines, 20 minutes)
    B, g = drafts.shape
    row, at = torch.arange(B), torch.arange(g + 1)
    p = p_target[:, :g].gather(2, drafts[..., None])[..., 0]  # (B, g): what the drafts are worth to each model
    q = p_draft.gather(2, drafts[..., None])[..., 0]
    n = (uniforms * q < p).long().cumprod(1).sum(1)
    p_next = p_target[row, n]  # (B, V): the place after the accepted drafts
    q_next = F.pad(p_draft, (0, 0, 0, 1))[row, n]  # all accepted: zeros
    residual = (p_next - q_next).clamp(min=0)
    residual = torch.where(residual.sum(1, keepdim=True) > 0, residual, p_next)
    drafts_and_room = F.pad(drafts, (0, 1))
    tokens = torch.where(at < n[:, None], drafts_and_room, -1)
    tokens[row, n] = (residual / noise).argmax(1)
    return tokens, n
    # END


check.check_verify(verify)

# %% [markdown]
# ## In the script's place
#
# Two models are tables here: the next token depends on the last one. `kernels.verify` judges two drafts a row; rows that end early are completed by the target. The law of three tokens
# can be written down, 27 numbers, so the distance of what comes out (total variation) is measured, not believed.

# %%
rng = torch.Generator().manual_seed(5)
target, draft = (1.5 * torch.randn(2, 4, 3, generator=rng)).softmax(-1)  # row 3: nothing yet; columns: the next token
rows = steps(200_000, few=500)


def choose(p):
    return kernels.sample(p.log(), generator=rng)


def three_tokens():
    """(rows, 3) tokens by drafts and kernels.verify, and the mean number of accepted drafts."""
    first = choose(draft[torch.full((rows,), 3)])
    drafts = torch.stack([first, choose(draft[first])], 1)
    before = F.pad(drafts, (1, 0), value=3)
    noise = torch.empty(rows, 3).exponential_(generator=rng)
    tokens, n = kernels.verify(target[before], draft[before[:, :2]], drafts, torch.rand(rows, 2, generator=rng), noise)
    for t in (1, 2):
        tokens[:, t] = torch.where(tokens[:, t] < 0, choose(target[tokens[:, t - 1]]), tokens[:, t])
    return tokens, n.double().mean()


# %%
law = (target[3][:, None, None] * target[:3, :, None] * target[None, :3]).flatten()


def distance(tokens):
    return 0.5 * ((tokens @ torch.tensor([9, 3, 1])).bincount(minlength=27) / len(tokens) - law).abs().sum()


tokens, n = three_tokens()
print(f"the script: total variation {distance(tokens):.4f}, accepted {n:.3f} of 2")
with put(kernels, "verify", verify):
    band("total variation with your verify", distance(three_tokens()[0]), 0.0, 0.012)

# %% [markdown]
# For comparison, a mistake that is easily made: the refused token is drawn again from p itself.

# %%
def from_p(p_target, p_draft, drafts, uniforms, noise):
    tokens, n = kernels.verify_reference(p_target, p_draft, drafts, uniforms, noise)
    row = torch.arange(len(n))
    tokens[row, n] = (p_target[row, n] / noise).argmax(1)
    return tokens, n


with put(kernels, "verify", from_p):
    print(f"redrawn from p: total variation {distance(three_tokens()[0]):.4f}")

# %% [markdown]
# Its acceptance is the same, and a text by a real model would look no worse. Only a law that is known shows it; lesson 40 makes a proof of that.
#
# On an H200 (Triton 3.6, `python tests/bench_kernels.py`) `kernels.scan_attention` is 22 times, `sample` 6 to 9 times and `verify` 5 to 7 times as fast as the
# plain torch beside them.
#
# ## Where to read on
#
# * `kernels.py`: `_decode_chunks`, `_decode_merge`, `_scan_prefixes`, `_keep_likeliest`, `_verify`: the programs of this lesson, each beside its plain torch.
# * Feng et al., arXiv:2405.13956 (attention as an RNN: section 3.2 the operator, section 3.3 the learned query); the same sum as a fold: arXiv:2205.14135; as a tree: Flash-Decoding (Dao et al., 2023).
# * Blelloch, "Prefix Sums and Their Applications" (1990): what else a scan does once an operator is associative.
# * Leviathan et al., arXiv:2211.17192, and Chen et al., arXiv:2302.01318 (speculative sampling); FlashInfer's blog on sampling without sorting.
