# %% [markdown]
# # 33 Search at test time
#
# A trained model draws a picture for the price of its tokens. If the picture is bad we may draw another, let a **verifier** choose, or stop bad beginnings early
# and spend what they save. No weight changes; only sampling gets dearer. What does a token that is drawn for nothing buy?
#
# **Guess first, and write your guess down.** A picture of nano_var has 1 + 4 + 16 + 64 = 85 tokens. You may draw 680, and must give one digit of a class that is
# asked for. Which of these gets most digits right?
#
# * A: eight whole pictures; the verifier takes the best.
# * B: 20 beginnings of three maps (21 tokens each); the verifier looks at their previews; the best 4 are finished, the best of these is taken: 676 tokens.
# * C: 26 beginnings, the best 2 are finished: 674 tokens.
#
# And by how many points is the best of the three ahead of the second?

# %%
import sys, math, torch, torch.nn.functional as F, matplotlib.pyplot as plt
sys.path[:0] = ["..", "../.."]  # the repository, seen from lessons/ and from lessons/solutions/
import kernels, nano_ar, nano_tok, nano_var
from lessons.checks import band, lesson_33 as check, put, steps
torch.manual_seed(0)

# %% [markdown]
# Three small models of the same digits, which cut a picture in three ways: maps (nano_var), rows of patches (nano_ar), and 16 *ordered* tokens (nano_tok with
# `--queries 16`, then nano_ar on these tokens), where the first few say roughly what the whole picture is.

# %%
pictures, digits = nano_var.glyphs(steps(5000, 200), 0)
(test, images), (asked, labels) = (part.tensor_split([len(part) // 10]) for part in (pictures, digits))
data = nano_var.SimpleNamespace(train_images=images, train_labels=labels, test_images=test, test_labels=asked, classes=10)
small = ["--dim", "96", "--depth", "2", "--precision", "fp32", "--codebook", "256"]
config = nano_var.read_settings([*small, "--width", "32", "--tok-steps", f"{steps(250)}", "--steps", f"{steps(200)}"])[1]
tokenizer, model = nano_var.build(config, 10, torch.device("cpu"))
nano_var.train_tokenizer(config, tokenizer, data)
maps = nano_var.SimpleNamespace(**vars(data))
nano_var.add_tokens(maps, tokenizer.eval().requires_grad_(False))
history = nano_var.train(config, model, tokenizer.pyramid, maps)

# %%
codebook = nano_ar.fit_codebook(images, 256, torch.Generator().manual_seed(0))
coded = {name: nano_ar.encode(part, codebook) for name, part in (("train_tokens", images), ("test_tokens", test))}
raster = nano_ar.GPT(256, 10, 8, 8, 96, 2, 3)
config_r = nano_ar.read_settings([*small, "--steps", f"{steps(200)}"])[1]
history = nano_ar.train(config_r, raster, nano_var.SimpleNamespace(**vars(data), **coded))

# %%
config_q = nano_tok.read_settings(["--queries", "16", "--width", "32", "--steps", f"{steps(300)}", "--precision", "fp32"])[1]
queries = nano_tok.build(config_q)
history = nano_tok.train(config_q, queries, data)
ordered = nano_ar.GPT(256, 10, 1, 16, 96, 2, 3)
history = nano_ar.train(nano_ar.read_settings([*small, "--steps", f"{steps(400)}"])[1], ordered, nano_tok.export(queries, data))

# %% [markdown]
# And two classifiers. The **verifier** chooses; its score is its log probability of the class asked for. The **examiner**, another network trained on other
# pictures, decides at the end. One network in both roles would mark its own homework.

# %%
fifth = len(images) // 5
verifier = nano_ar.train_judge(images[:fifth], labels[:fifth], 10, "cpu", 1, epochs=2)
examiner = nano_ar.train_judge(images[fifth:], labels[fifth:], 10, "cpu", 2)

@torch.no_grad()
def score(judge, pictures):
    """Log probability of each class: (N, 32, 32) -> (N, 10)."""
    return torch.cat([judge(part[:, None] / 255).log_softmax(1) for part in pictures.split(500)])

def reads(judge, pictures, labels):
    return (score(judge, pictures).argmax(1) == labels).double()

def show(*rows):
    figure, axes = plt.subplots(len(rows), 1, figsize=(7, 0.8 * len(rows)), layout="constrained")
    for axis, row in zip(axes, rows):
        axis.imshow(torch.cat(list(row), 1), cmap="gray")
        axis.axis("off")
    plt.show()

print(f"real digits: verifier {reads(verifier, test, asked).mean():.1%}, examiner {reads(examiner, test, asked).mean():.1%}")

# %% [markdown]
# ## A pool
#
# For each of 80 labels (eight per class) every model draws 26 candidates, all of the way. Whatever a search would have thrown away, or never have finished, we can
# strike out afterwards: candidates do not know of one another. After each stage the verifier sees what could be decoded so far: previews of the maps
# 1, 2, 3; the upper rows, the rest black; the first tokens alone.

# %%
M, y, top_p = steps(26, few=8), torch.arange(10).repeat_interleave(steps(8, few=1)), (1, 1, 1, 0.5)
many, B, rng = y.repeat(M), len(y), torch.Generator().manual_seed(0)
drawn = nano_var.generate(model, tokenizer.pyramid, many, rng, top_p=top_p)
rows, prefixes = nano_ar.generate(raster, many, rng), nano_ar.generate(ordered, many, rng)
upper = [torch.arange(32) < edge for edge in (8, 16, 24, 32)]
stages = {"maps": [nano_var.decode(drawn, tokenizer, k) for k in (1, 2, 3, 4)],
          "rows": [nano_ar.decode(rows, codebook) * mask[:, None] for mask in upper],
          "ordered": [nano_tok.decode(prefixes, queries, keep=k) for k in (2, 4, 8, 16)]}
spent = {"maps": (1, 5, 21, 85), "rows": (16, 32, 48, 64), "ordered": (2, 4, 8, 16)}  # tokens up to each stage

def of_label(judge, pictures):
    return score(judge, pictures).gather(1, many[:, None]).view(M, B)

scores = {name: torch.stack([of_label(verifier, part) for part in parts]) for name, parts in stages.items()}  # (4, M, B)
marks = {name: [reads(judge, parts[-1], many).view(M, B) for judge in (verifier, examiner)] for name, parts in stages.items()}
print("first tokens of ordered, then all of maps and rows, for the label 2:")
show(*(parts[stage][2 * B // 10 :: B][:12] for parts, stage in ((stages["ordered"], 1), (stages["maps"], 3), (stages["rows"], 3))))

# %% [markdown]
# ## Best of N
#
# If a model draws picture $x$ with probability $p(x)$, the best of $N$ has a score of at most $s$ only if all $N$ have: $P(\text{best}\le s)=F(s)^N$, where $F$ is the share of
# pictures with a score up to $s$. So
#
# $$p_N(x)=\frac{p(x)}{\ell(x)}\Big[\big(F^-(x)+\ell(x)\big)^N-F^-(x)^N\Big],$$
#
# with $F^-(x)$ the probability of a lower score and $\ell(x)$ that of the same score: equal pictures share. *Worked:* $p=(.5,.3,.2)$ with scores 1, 2, 3; best of 2: $.5^2=.25$, then $.8^2-.5^2=.39$,
# then $1-.8^2=.36$.
#
# **Exercise 1.** `best_law(p, score, N)`: p (n,), all positive, score (n,), some perhaps equal -> the law (n,) of the best of N. *Hint:* a table of comparisons (n, n).

# %%
def best_law(p, score, N):
    """The law of the best of N independent draws from p."""
    # SOLUTION (about 4 lines, 10 minutes)
    below = (p * (score < score[:, None])).sum(1)  # (n,)
    same = score == score[:, None]  # (n, n)
    level = (p * same).sum(1)
    return p / level * ((below + level) ** N - below ** N)
    # END


check.check_best_law(best_law)

# %% [markdown]
# How far does it move from the model? If all scores differ and no picture is likely, $u=F(x)$ is uniform, its density becomes $Nu^{N-1}$, and
#
# $$\mathrm{KL}(p_N\,\|\,p)=\int_0^1 Nu^{N-1}\log(Nu^{N-1})\,du=\log N-\frac{N-1}N.$$
#
# It does not matter what the score is. With lumps and ties it is less: the formula, often quoted as an equation, is a bound (Beirami et al. 2024). Ten pictures, and all their draws:

# %%
p = torch.tensor([0.3, 0.2, 0.1, 0.1, 0.08, 0.07, 0.05, 0.04, 0.03, 0.03]).double()
for N in (1, 2, 4):
    law = check.best_law_slowly(p, torch.arange(10), N)
    kl = (law * (law / p).log()).sum()
    print(f"best of {N}: KL {kl:.3f}, bound {math.log(N) - (N - 1) / N:.3f}; the best picture has {p[-1]:.2f} -> {law[-1]:.3f}")

# %% [markdown]
# The best picture gets at most $N$ times as likely, and one that the model never draws stays impossible. Now the models. `play` deals candidates from the pool, thirty times for each label, and lets
# a rule choose among them.

# %%
def play(name, start, keep, by=None, deals=30):
    """Deal `start` candidates, strike out by stages -> winners (deals * B,) as the verifier and the examiner see them."""
    dealt = torch.rand(M, deals * B, generator=torch.Generator().manual_seed(1)).argsort(0)[:start]
    seen = (scores[name] if by is None else by).repeat(1, 1, deals).gather(1, dealt.expand(4, -1, -1))
    winner = dealt.gather(0, check.prune_slowly(seen, keep)[None])
    return [mark.repeat(1, deals).gather(0, winner).mean().item() for mark in marks[name]]

numbers = (1, 2, 4, 8, 16)
figure, axes = plt.subplots(1, 3, figsize=(8, 2.4), sharey=True, layout="constrained")
for axis, name in zip(axes, marks):
    curves = [play(name, N, [N, N, N, 1]) for N in numbers]
    axis.plot(numbers, curves, "o-", label=["verifier", "examiner"])
    axis.set(title=name, xlabel="best of N", xscale="log", xticks=numbers, xticklabels=numbers)
    print(f"{name:8}", "  ".join(f"{N}: {ours:.3f} {theirs:.3f}" for N, (ours, theirs) in zip(numbers, curves)), " verifier, examiner")
axes[0].legend()
plt.show()

# %% [markdown]
# Most of the gain comes with the first four pictures. Compare the gains of the two curves from 1 on: of what the verifier sees itself gain, the examiner confirms only a part.
#
# ## Who marks the homework?
#
# The gap is no accident. The maximum over $N$ looks for high scores, and a score is high when the picture is good *or when the verifier errs in its favour*. The more you search, and the less
# the model forbids, the more you find of the second kind (Goodhart's law). Take the model away: random tokens, each of 256 with the same probability, and the best of $N$.

# %%
chance = torch.randint(256, (steps(4096, few=512), 16), generator=torch.Generator().manual_seed(0))
noise = nano_tok.decode(chance, queries)
mine, theirs = score(verifier, noise), score(examiner, noise)  # (4096, 10): one set of draws serves all ten labels
for N in (1, 8, 64, 512):
    winner = mine.view(-1, N, 10).argmax(1) + N * torch.arange(len(mine) // N)[:, None]  # (sets, 10)
    read = [(table.argmax(1)[winner] == torch.arange(10)).double().mean() for table in (mine, theirs)]
    print(f"best of {N:3} random pictures: the verifier reads {read[0]:.1%}, the examiner {read[1]:.1%}")
show(noise[mine.argmax(0)], stages["ordered"][-1][: B : B // 10])

# %% [markdown]
# Above: the best of 4,096, in which the verifier is surest to see 0 to 9. Below: drawn by the model, unsearched. Blurred as they are, most above can be read: with ordered tokens, search alone replaces a model to a surprising
# degree, as Gao et al. report. But with 512 tries the verifier reads 100 % of the pictures, and the examiner 82.5 %. Who reports the first figure has measured the verifier.
#
# ## Judging a beginning
#
# To stop early one must know early. How well does the order of candidates by their beginnings agree with their order at the end? Rank correlation among the
# 26 candidates of a label, mean over labels:

# %%
def ranks(x):
    r = x.argsort(-2).argsort(-2).double()
    return F.normalize(r - r.mean(-2, keepdim=True), dim=-2)

plt.figure(figsize=(5, 2.4))
for name, s in scores.items():
    agree = (ranks(s) * ranks(s[-1])).sum(1).mean(1).tolist()
    plt.plot([n / spent[name][-1] for n in spent[name]], agree, "o-", label=name)
    print(f"{name:8}", "  ".join(f"{n} tokens: {a:.2f}" for n, a in zip(spent[name], agree)))
plt.xlabel("share of the tokens drawn"), plt.ylabel("rank correlation"), plt.legend()
plt.show()

# %% [markdown]
# At a quarter of the tokens the upper two rows tell nothing; three maps and four ordered tokens tell something, for they are pictures of the whole. At half, ordered tokens have nearly decided;
# the upper half of a digit has not. Rows catch up at three quarters. That is the argument for search over ordered tokens.
#
# ## Pruning
#
# **Exercise 2.** `prune(scores, keep)`: scores (K, M, B) of M candidates for each of B pictures after each of K stages; after stage k the best keep[k] of those *still alive* stay;
# keep[-1] = 1 -> the winners (B,). *Hint:* `topk` and `scatter`.

# %%
def prune(scores, keep):
    """Which candidate is left at the end."""
    # SOLUTION (about 5 lines, 12 minutes)
    alive = torch.ones(scores.shape[1:], dtype=torch.bool)  # (M, B)
    for score, n in zip(scores, keep):
        best = score.masked_fill(~alive, -torch.inf).topk(n, 0).indices  # (n, B)
        alive = torch.zeros_like(alive).scatter(0, best, True)
    return alive.long().argmax(0)
    # END


check.check_prune(prune)

# %% [markdown]
# Stage k costs its tokens for all that entered it. Plans of about four and eight pictures:

# %%
def cost(name, start, keep):
    sizes = torch.tensor(spent[name]).diff(prepend=torch.tensor([0]))
    return (sizes * torch.tensor([start, *keep[:-1]])).sum().item()

plans = {"maps": [(4, 4, 4, 4), (10, 10, 10, 2), (8, 8, 8, 8), (20, 20, 20, 4), (26, 26, 26, 2)],
         "rows": [(4, 4, 4, 4), (6, 6, 3, 1), (8, 8, 8, 8), (12, 12, 5, 3), (17, 5, 5, 5)],
         "ordered": [(4, 4, 4, 4), (6, 6, 6, 2), (8, 8, 8, 8), (12, 12, 12, 4)]}
for name, all_plans in plans.items():
    for start, *keep in all_plans:
        ours, theirs = play(name, start, [*keep, 1])
        print(f"{name:8} {start:2} begun, {keep} go on: {cost(name, start, [*keep, 1]):4} tokens, verifier {ours:.3f}, examiner {theirs:.3f}")

# %% [markdown]
# The examiner's figures for "maps" answer the question at the top: A 0.952, B 0.914, C 0.900. The plain best of eight wins, by 3.8 points, and at four pictures too: 0.914 against 0.856. A preview after 21 tokens ranks the candidates
# with a correlation of 0.33; most of what decides is drawn in the last map, and there one wants several tries. Where the early look is worth something pruning stops losing: rows come out even,
# ordered tokens gain about a point (0.955 to 0.967, 0.975 to 0.984). With 80 labels that is noise (a share of .95 has a standard error of up to $\sqrt{.95\cdot.05/80}$, 2.4 points), and far from what one hopes.
#
# The plans of rows with three stages do what GridAR does, in outline: several upper parts, the bad ones stopped early, the others drawn on. (Its judge is a vision-language model that rejects what cannot become right, and it rewrites the prompt.) Pruned hard after two rows, where the verifier knows nothing, rows
# lose: 0.942 against 0.976.
#
# One rival needs no verifier: guidance (lesson 21) asks the model twice, for the price of two pictures. And a second idea: the verifier has never seen a preview, so let another network, trained on previews of three maps, judge them.

# %%
for guidance in (1.0, 3.0, 5.0):
    x = nano_var.decode(nano_var.generate(model, tokenizer.pyramid, y.repeat(2), rng, guidance, top_p=top_p), tokenizer)
    print(f"guidance {guidance:g}: the examiner reads {reads(examiner, x, y.repeat(2)).mean():.3f}")

scout = nano_ar.train_judge(nano_var.decode(maps.train_tokens[:fifth], tokenizer, 3), labels[:fifth], 10, "cpu", 3, epochs=2)
mixed = torch.cat([scores["maps"][:2], of_label(scout, stages["maps"][2])[None], scores["maps"][3:]])
print("20 begun, 4 finished, previews judged by a network of their own: verifier, examiner", play("maps", 20, [20, 20, 4, 1], mixed))

# %% [markdown]
# Guidance lifts 160 pictures from 0.750 to 0.819 (standard error some 3 points); for the same price the best of two lifts the pool from 0.689 to 0.828. With its own judge of previews plan B rises from 0.914 to 0.937 for the examiner, and *falls* from 0.956 to 0.916 for the verifier: two networks that
# err differently are harder to fool than one asked twice.
#
# ## Copies: a particle filter
#
# Pruning leaves empty places. TTS-VAR fills them with copies of the good beginnings, which then go different ways: candidate $i$ is copied with a probability proportional to $e^{\lambda r_i}$, $r_i$ the score of its preview.
# That is **sequential Monte Carlo**, and with the right weights one knows what it draws from. The target is the tilted law
#
# $$\pi(x)=\frac{p(x)\,e^{\lambda r(x)}}Z,\qquad Z=\sum_x p(x)\,e^{\lambda r(x)};$$
#
# with $r=\log v(\text{class}\mid x)$, $\lambda=1$ and a $p$ that was not told the class it is Bayes' rule. Weigh after stage $k$ by what the stage has *gained*, $w=e^{\lambda(r_k-r_{k-1})}$ with $r_0=0$: along a path the product telescopes to $e^{\lambda r_K}$.
# By the whole $r_k$ each time, the default of the official code, early previews count again and again; the law that this aims at has $e^{\lambda(r_1+\dots+r_K)}$.
#
# Early strengths may even be smaller, $w=e^{\lambda_kr_k-\lambda_{k-1}r_{k-1}}$: only the last one, $\lambda_K$, stays in the product. So early previews can be trusted little, and the target stays.
#
# Drawn independently, a candidate of weight $w$ gets $nw$ copies on average, but the count scatters. **Systematic** resampling throws one number $u$: lay the weights end to end on a line from 0 to 1, and take who lies at
# $(0+u)/n,\ (1+u)/n,\dots$ The count then is $nw$ rounded down or up, and still $nw$ in the mean. *Worked:* w = (.5, .3, .2), u = .5, n = 4: points .125, .375, .625, .875: 0, 0, 1, 2.
#
# **Exercise 3.** `systematic(w, u, n)`: w (M,) with sum 1, u from 0 to 1 -> n indices. *Hint:* `cumsum`, `torch.searchsorted(..., right=True)`; rounding may leave the last point beyond the last edge.

# %%
def systematic(w, u, n):
    """n indices; candidate i comes n w_i times, rounded down or up."""
    # SOLUTION (about 3 lines, 8 minutes)
    edges = w.cumsum(0)
    points = ((torch.arange(n) + u) / n).to(w)
    return torch.searchsorted(edges, points, right=True).clamp(max=len(w) - 1)
    # END


check.check_systematic(systematic)

# %% [markdown]
# **Exercise 4.** `particles(grow, score, resample, strengths, M)`: begin with x (M, 0) of integers. Stage k of K = len(strengths): x = grow(k, x); scores $r_k$ (M,) = score(k, x); weigh by $e^{\lambda_kr_k-\lambda_{k-1}r_{k-1}}$, $\lambda_k$ = strengths[k], nothing before the first; `index = resample(weights)`, weights (M,) with sum 1. Particles
# *and their scores* are copied. -> x (M, K) after the last copying, and $\log\hat Z$, where $\hat Z$ is the product over stages of the **mean** of the weights before they are normalised.
# $\hat Z$ has the expectation $Z$, exactly, even with two particles: the check runs through every way in which chance can fall. *Worked:* two gains, 0 and log 3: mean weight 2, resample((1/4, 3/4)).

# %%
def particles(grow, score, resample, strengths, M):
    """Sequential Monte Carlo towards p(x) exp(strengths[-1] * score)."""
    # SOLUTION (about 8 lines, 20 minutes)
    x, before, log_z = torch.zeros(M, 0, dtype=torch.long), 0.0, 0.0
    for k, strength in enumerate(strengths):
        x = grow(k, x)
        now = strength * score(k, x)
        gain = now - before
        log_z = log_z + gain.logsumexp(0) - math.log(M)
        index = resample(gain.softmax(0))
        x, before = x[index], now[index]
    return x, log_z
    # END


check.check_particles(particles)

# %% [markdown]
# A tree of three bits with known scores, 4,000 particles. Which of the two rules finds the target?

# %%
truth = check.tilted(3, 1.5)
for name, rule, strengths in (("gains, all strengths 1.5", check.by_gain, (1.5, 1.5, 1.5)),
                              ("gains, strengths 0, .5, 1.5", check.by_gain, (0.0, 0.5, 1.5)),
                              ("whole scores", check.by_value, (1.5, 1.5, 1.5))):
    law, z = check.simulate(rule, strengths, steps(4000, few=50))
    print(f"{name:28} Z {z:5.2f}  law", law.numpy().round(3))
print(f"{'target':28} Z {truth.sum():5.2f}  law", (truth / truth.sum()).numpy().round(3))

# %% [markdown]
# Weights by gains find it, early strengths full or small. Whole scores give .81 to what should have .56.
#
# ## In the script's place
#
# In `generate` a particle is a row of the cache, of the sum `total` and of the tokens. The `change` hook cannot copy rows: the cache is not its own. So we write the loop anew; the part that goes wrong in practice is yours. With guidance
# the cache holds each particle twice: the rows 0 .. B - 1 have read the class, the rows B .. 2B - 1 "none".
#
# **Exercise 5.** `pick(cache, total, tokens, index, guided)`: cache (depth, 2, B or 2B, H, L, D), total (B, C, 8, 8), tokens (B, N), index (n,) -> the three for the particles index.
# *Worked:* B = 4, index (2, 2), guided: rows 2, 2, 6, 6.

# %%
def pick(cache, total, tokens, index, guided):
    """Copy particles, with all that they remember."""
    # SOLUTION (about 2 lines, 8 minutes)
    rows = torch.cat([index, index + len(total)]) if guided else index
    return cache[:, :, rows], total[index], tokens[index]
    # END


check.check_pick(pick)

# %%
widths, strengths, survivors = (16, 16, 16, 4), (0, 0, 2, 4), 1  # particles of a label at each map; how many come out

@torch.no_grad()
def population(model, pyramid, labels, rng, guidance, *others):
    """`generate` with a small population for each label; of each, `survivors` come out."""
    B, guided, start, before = len(labels), guidance != 1, 0, 0.0
    cache, tokens = model.new_cache(B * widths[0] * (1 + guided)), torch.zeros(B * widths[0], 0, dtype=torch.long)
    total = pyramid.codes.new_zeros(len(tokens), pyramid.codes.shape[1], 8, 8)
    for k, (side, n) in enumerate(zip(model.scales, (*widths[1:], survivors))):
        asked = labels.repeat_interleave(widths[k])
        both = torch.cat([asked, torch.full_like(asked, model.null)]) if guided else asked
        logits = model(nano_var.area(total, side).repeat(1 + guided, 1, 1), both, cache, start)
        logits = nano_var.guide(*logits.chunk(2), 1 + (guidance - 1) * k / 3) if guided else logits
        new = kernels.sample(logits, 1.0, top_p=top_p[k], generator=rng)
        tokens, start, total = torch.cat([tokens, new], 1), start + side * side, total + pyramid.grow(new, side)
        preview = (255 * tokenizer.picture(total).clamp(0, 1)).round()
        now = strengths[k] * score(verifier, preview).gather(1, asked[:, None]).view(B, -1)
        chances = zip((now - before).softmax(1), torch.rand(B, generator=rng).tolist())
        index = torch.stack([check.systematic_slowly(w, u, n) for w, u in chances])  # (B, n)
        before, index = now.gather(1, index), (index + widths[k] * torch.arange(B)[:, None]).flatten()
        cache, total, tokens = pick(cache, total, tokens, index, guided)
    return tokens

config.guidance = 1.0
with put(nano_var, "generate", population):
    x = nano_var.decode(nano_var.draw(config, model, tokenizer.pyramid, y.repeat(2)), tokenizer)
    band(f"{16 * 21 + 4 * 64} tokens a picture; share that the examiner reads:", reads(examiner, x, y.repeat(2)).mean().item(), 0.75, 0.98)

# %% [markdown]
# ## What search cannot do
#
# Variety. The best of many is the same few over and over, and copies of one beginning share all that is coarse. TTS-VAR therefore does not score its coarse maps at all: it groups the previews into clusters (k-means) and keeps
# the candidate nearest to each centre. Below: four of the pool's beginnings of two maps, chosen in three ways, and then finished; and four survivors of a population, without and with selection. In the pictures the
# first two rows have strength 0, the last two strength 4; each group of four is one label.

# %%
def variety(tokens):
    """Mean distance of the pictures of a label, tokens (B, n, 85), in the examiner's features; real pictures: 1."""
    features = nano_ar.look(examiner, nano_var.decode(tokens.flatten(0, 1), tokenizer))[0].view(*tokens.shape[:2], -1)
    return torch.stack([torch.pdist(f).mean() for f in features]).mean() / nano_ar.spread(nano_ar.look(examiner, test)[0], asked)

candidates = drawn.view(M, B, 85).transpose(0, 1)  # (B, M, 85)
by_score = scores["maps"][1].T.topk(4).indices  # by the verifier, after two maps
early = nano_ar.look(examiner, stages["maps"][1])[0].float().view(M, B, 64).transpose(0, 1)  # (B, M, 64)
centres = [nano_ar.kmeans(f, 4, rng) for f in early]
by_cluster = torch.stack([torch.cdist(c, f).argmin(1) for c, f in zip(centres, early)])  # nearest to each of 4 centres
for name, chosen in (("at random", torch.arange(4).expand(B, 4)), ("by the verifier", by_score), ("by clusters", by_cluster)):
    four = candidates.gather(1, chosen[..., None].expand(-1, -1, 85))
    print(f"4 of {M} beginnings of two maps chosen {name}: variety of the finished pictures {variety(four):.3f}")
survivors, widths = 4, (12, 12, 12, 12)
for strength in (0, 4):
    strengths = (strength,) * 4
    with put(nano_var, "generate", population):
        four = nano_var.draw(config, model, tokenizer.pyramid, y[:: len(y) // 40 or 1]).view(-1, 4, 85)
        roots = sum(len(row.unique()) for row in four[:, :, 0]) / len(four)
        print(f"4 of 12 particles, strength {strength}: variety {variety(four):.3f}; {roots:.2f} different tokens in map 1")
        show(*nano_var.decode(four[1::10].flatten(0, 1), tokenizer).view(2, -1, 32, 32))

# %% [markdown]
# ## What did not work
#
# Search over maps did worse than the plain best of N with the same tokens. The particle filter did not beat it either: 0.900 with 592 tokens, where four whole pictures, 340 tokens, give 0.914. Its copies share their coarse maps, and the last map decides most. It
# pays where the early maps decide and the late ones are dear, as with the large pictures of TTS-VAR, or where one needs its law and not its best picture. Strengths that are large from the first map on
# trust previews that know nothing. Clusters kept variety (1.134; chance 1.084, the verifier's choice 0.955); whether they give more right digits we did not measure. And nothing here improved the model: what it never draws, no search finds.
#
# ## Where to read on
#
# * TTS-VAR: Chen et al. 2025, arXiv:2507.18537; GridAR: Park et al. 2025, arXiv:2511.21185; ordered tokens: Gao et al. 2026, arXiv:2604.15453.
# * Beirami et al. 2024, arXiv:2401.01879: the exact law of the best of N, and why the formula is only a bound.
# * Doucet and Johansen 2009, *A tutorial on particle filtering and smoothing*: why the estimate of Z is unbiased.
