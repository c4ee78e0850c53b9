# %% [markdown]
# # 40 Trees and many drafts
#
# **Guess first, and write your three answers down.** A target model checks guesses of a cheaper one, the draft, as in `nano_spec.py`. Read that
# file's `accept` before you begin.
#
# 1. Why only one guess for a place? Take two, drawn independently from the draft's $q$. Test the first with $\min(1,p/q)$; if it is refused, test
#    the second the same way; if that is refused too, draw from $\mathrm{norm}(\max(p-q,0))$, norm: scaled to the sum 1. Is what comes out still distributed as $p$?
# 2. A call of the target may check 14 guesses. A chain of 14 after each other? A tree with two guesses everywhere, three deep? Or one that is
#    wide at the top?
# 3. Your friend proves a decoder correct: all probabilities enumerated, no difference to the truth. Which mistakes can have survived?
#
# In this lesson **you write the proof**, and wrong decoders grade it: two of the five exercises are exams that you set.

# %%
import sys
sys.path[:0] = ["..", "../.."]  # the repository, seen from lessons/ and from lessons/solutions/
import functools, matplotlib.pyplot as plt, torch, torch.nn.functional as F, nano_spec
from types import SimpleNamespace
from lessons.checks import band, lesson_40 as check, put, steps

# %% [markdown]
# ## Two guesses for one place
#
# The rule of the first question, written down. `dice.choose(p)` draws a token, `dice.coin(a)` is true with probability $a$. As all chance goes through
# these two, `enumerate_outcomes` can run a program once for every way the dice may fall, and add up the probabilities.

# %%
def each_against_p(p, q, guesses, dice):
    for x in guesses:
        if dice.coin(min(1.0, float(p[x] / q[x]))):
            return x
    return dice.choose(nano_spec.residual(p, q))

p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
q = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
for k in (1, 2, 3):
    law = nano_spec.enumerate_outcomes(lambda dice: each_against_p(p, q, [dice.choose(q) for _ in range(k)], dice))
    print(f"{k} guesses:", " ".join(f"{law[x]:.4f}" for x in range(3)), f"  wanted: {p.tolist()}")

# %% [markdown]
# One guess is the rule you know, and exact. With two, token 2 comes out too often and token 0 too seldom. Only a 2 is ever refused
# (of 0 and 1 the target wants more than $q$ gives); so after a refusal 2 has had its share, and the second guess gives it another. What is still missing then is no longer $p$ but the
# residual.
#
# **Exercise 1, an exam that you set.** `exam(rule)` -> the largest total variation, over cases that you choose, between $p$ and the law of the token
# that `rule(p, q, guesses, dice)` returns, where `guesses` are $k$ independent draws from $q$. It must be 0 (below $10^{-12}$) for every exact rule, fast or slow, and clearly
# above it for every wrong one. The check hands your exam two exact rules and ten wrong ones, and names those that passed.
# Worked: "take the first guess" has total variation .4 for the $p$ and $q$ above.
#
# *Hint:* three tokens are enough, and so are a handful of cases. But which $k$? Which $p$?
# `nano_spec.total_variation(a, b)` takes two dictionaries {token: probability}.

# %%
def exam(rule):
    """How far from p is what the rule returns, at worst?"""
    # SOLUTION (about 10 lines, 15 minutes)
    worst = 0.0
    for p, q in (([0.5, 0.3, 0.2], [0.2, 0.2, 0.6]), ([0.6, 0.4, 0.0], [0.1, 0.3, 0.6])):
        p, q = (torch.tensor(law, dtype=torch.float64) for law in (p, q))
        truth = dict(enumerate(p.tolist()))
        for k in (1, 2, 3):
            def decode(dice):
                guesses = [dice.choose(q) for _ in range(k)]
                return rule(p, q, guesses, dice)
            law = nano_spec.enumerate_outcomes(decode)
            worst = max(worst, nano_spec.total_variation(law, truth))
    return worst
    # END


check.check_exam(exam)

# %% [markdown]
# One of the ten, "equal guesses are dropped", is natural in a tree, where two equal branches would be read twice; but then the
# guesses are no longer draws from $q$. And nobody who tries two guesses sees a mistake in the third.
#
# ## Rules that are exact
#
# **Recursive rejection** (SpecInfer, Miao et al., arXiv:2305.09781). Start with $P=p$. A guess $x$ stays with probability
# $\min(1,P(x)/q(x))$; if it is refused, $P\leftarrow\mathrm{norm}(\max(P-q,0))$, and the next guess is tested against the new $P$. When all are refused, draw
# from the last $P$. By induction from the back: the rest of the procedure draws from $P$ exactly, so one step before it draws from $p$ exactly.
#
# **Without replacement** (EAGLE, arXiv:2401.15077). Why guess a token twice that was just refused? Draw the guesses one after the other, each from the $q$
# in which the earlier ones are struck out. Then after a refusal of $x$ also $q(x)\leftarrow0$, $q\leftarrow q/\sum q$; for the next guess was drawn from that.
#
# **Exercise 2.** `recursive(p, q, guesses, dice, distinct=False)` -> a token. `distinct`: the guesses were drawn without replacement. With no guesses at all
# it draws from $p$. Worked: the $p$ and $q$ above and guesses 2, 2: the first stays with probability 1/3; then $P=(.75,.25,0)$, and the second 2
# is refused for sure.
#
# *Hint:* `nano_spec.residual(P, q)`; work on a copy of q.

# %%
def recursive(p, q, guesses, dice, distinct=False):
    """Test the guesses in turn, each against what the ones before have left."""
    # SOLUTION (about 8 lines, 10 minutes)
    for x in guesses:
        if dice.coin(min(1.0, float(p[x] / q[x]))):
            return x
        p = nano_spec.residual(p, q)
        if distinct:
            q = q.clone()
            q[x] = 0
            q = q / q.sum()
    return dice.choose(p)
    # END


check.check_recursive(recursive)

# %% [markdown]
# **K-SEQ** (SpecTr, Sun et al., arXiv:2310.15141) treats the $k$ independent guesses alike: each stays with probability
# $\min(1,\,p(x)/(\rho\,q(x)))$. One guess brings $x$ with probability $m(x)=\min(q(x),p(x)/\rho)$, and something with $\beta=\sum m$. One of $k$ guesses stays with
# probability $a=1-(1-\beta)^k$, and is then distributed as $m/\beta$. If none stays, draw from what is left,
# $\mathrm{norm}(p-a\,m/\beta)$. That is only possible if nothing in it is negative, that is $a\le\rho\,\beta$. Small $\rho$ accepts more; so find the
# smallest allowed one in $[1,k]$. $\rho=k$ is always allowed.
#
# **Exercise 3.** `kseq(p, q, guesses, dice)` -> a token. Worked: $p=(.5,.5)$, $q=(1,0)$, two guesses. $\rho=1$ has $\beta=.5$ and $a=.75>.5$: both guesses are
# token 0, and accepted too often. The root is where $\beta=.5/\rho$ and $a=.5$, so $1-\beta=\sqrt{.5}$ and $\rho=1.707$.
#
# *Hint:* bisection: 40 halvings of $[1,k]$; keep the upper end, which is allowed. If $\beta=0$ nothing can be kept: return a draw from $p$.

# %%
def kseq(p, q, guesses, dice):
    """All guesses meet the same test, made stricter by rho."""
    # SOLUTION (about 15 lines, 20 minutes)
    k = len(guesses)
    low, high = 1.0, float(max(k, 1))
    for _ in range(40):
        rho = (low + high) / 2
        beta = float(torch.minimum(q, p / rho).sum())
        if 1 - (1 - beta) ** k <= rho * beta:
            high = rho
        else:
            low = rho
    kept = torch.minimum(q, p / high)
    beta = float(kept.sum())
    if beta == 0 or k == 0:
        return dice.choose(p)
    for x in guesses:
        if dice.coin(float(kept[x] / q[x])):
            return x
    return dice.choose(nano_spec.residual(p, kept * (1 - (1 - beta) ** k) / beta))
    # END


check.check_kseq(kseq)

# %% [markdown]
# Now your exam meets your rules.

# %%
mine = SimpleNamespace(exam=None, recursive=None, kseq=None, best=None, exam_tree=None)
for name, rule in (("recursive", recursive), ("kseq", kseq)):
    with put(mine, "exam", exam), put(mine, name, rule):
        print(f"{name}: total variation at worst {mine.exam(rule):.1e}")
with put(mine, "exam", exam):
    print(f"each_against_p: total variation at worst {mine.exam(each_against_p):.4f}")

# %% [markdown]
# ## The best that any rule can do
#
# Exact rules differ in how often the token is one of the guesses. How often could it be, for $n$ independent guesses and *any* exact rule? Take a set $H$ of
# tokens. A token of $H$ comes out with probability $P(H)$, however it is made. A token outside $H$ can only be a kept guess if some guess lies outside $H$, which has
# probability $1-Q(H)^n$. So the acceptance is at most $P(H)+1-Q(H)^n$, for each of the $2^V$ sets. By max-flow = min-cut the smallest of these bounds is reached:
#
# $$\alpha^*=\min_H\ P(H)+1-Q(H)^n .$$
#
# And the smallest is among $V+1$ sets: those that contain the tokens with the largest $q/p$, none, one, two, ... of them (Hu et al., arXiv:2502.18779).
#
# **Exercise 4.** `best(p, q, n)` -> $\alpha^*$, a float, from these $V+1$ sets. Worked: the $p$ and $q$ above, $n=1$: $H=\{2\}$ gives $.2+1-.6=.6$, which is
# $\sum\min(p,q)$, as it must be. For $n=2$ the same set gives $.84$.
#
# *Hint:* $p$ may be 0 where $q$ is not, and both may be.

# %%
def best(p, q, n):
    """The largest acceptance that n independent guesses allow."""
    # SOLUTION (about 5 lines, 10 minutes)
    order = (q / p).nan_to_num(0.0, posinf=torch.inf).argsort(descending=True)
    zero = torch.zeros(1, dtype=p.dtype)
    P = torch.cat([zero, p[order].cumsum(0)])
    Q = torch.cat([zero, q[order].cumsum(0)])
    return float((P + 1 - Q ** n).min())
    # END


check.check_best(best)

# %% [markdown]
# The bound is for independent guesses; nothing forces us to draw them so. **Greedy drafts** (same paper) take the $n-1$ most probable tokens of $q$ as they are, and
# draw one more from the rest, $\tilde q$. The rule is the plain one, $\tilde q$ against $p$: accept, or draw from the residual. If the residual gives one of
# the sure tokens, so much the better: its branch was checked as well. And the simplest of all: take the $n$ most probable tokens, draw from $p$, and **look
# whether the token is among them**. (EAGLE-2's code, `SafeAILab/EAGLE`, tests them one by one with $q=1$: the same law, by a longer way.)

# %%
def independent(q, n, dice):
    return [dice.choose(q) for _ in range(n)]

def distinct(q, n, dice):
    """n guesses without replacement, each from the q in which the earlier ones are struck out."""
    guesses, q = [], q.clone()
    while len(guesses) < n and q.sum() > 0:
        guesses.append(dice.choose(q / q.sum()))
        q[guesses[-1]] = 0
    return guesses

def top(q, n, dice):
    return q.topk(min(n, len(q))).indices.tolist()

def look(p, q, guesses, dice):
    return dice.choose(p)  # the guesses decide nothing: they only were, or were not, checked in advance

# %%
def greedy(p, q, n, dice):
    """-> token; whether its branch was checked."""
    sure = top(q, n - 1, dice)
    rest = q.index_fill(0, torch.tensor(sure, dtype=torch.long), 0.0)
    rest = rest / rest.sum()
    x = dice.choose(rest)
    y = x if dice.coin(min(1.0, float(p[x] / rest[x]))) else dice.choose(nano_spec.residual(p, rest))
    return y, y == x or y in sure

def method(pick, rule):
    def draw(p, q, n, dice):
        guesses = pick(q, n, dice)
        y = rule(p, q, guesses, dice)
        return y, y in guesses
    return draw

def acceptance(draw, n, V=4, pairs=steps(6, few=1)):
    """Mean acceptance over random p and q, and the worst total variation to p; by enumeration."""
    total, worst = 0.0, 0.0
    for i in range(pairs):
        p, q = nano_spec.Table(V, 2 * i).law([]), nano_spec.Table(V, 2 * i + 1).law([])
        joint = nano_spec.enumerate_outcomes(lambda dice: draw(p, q, n, dice))
        total += sum(chance for (y, hit), chance in joint.items() if hit) / pairs
        law = {y: joint.get((y, True), 0) + joint.get((y, False), 0) for y in range(V)}
        worst = max(worst, nano_spec.total_variation(law, dict(enumerate(p.tolist()))))
    return total, worst

# %%
methods = {"K-SEQ": method(independent, kseq), "recursive": method(independent, recursive),
           "recursive, distinct": method(distinct, functools.partial(recursive, distinct=True)),
           "greedy drafts": greedy, "top of q": method(top, look)}
numbers, table = (1, 2, 3)[:steps(3)], {}
for name, draw in methods.items():
    with put(mine, "recursive", draw):  # so an unwritten rule costs one line, not the cell
        cells = [acceptance(draw, n) for n in numbers]
        table[name] = [a for a, _ in cells]
        print(f"{name:26}", " ".join(f"{a:.3f}" for a, _ in cells), f"  total variation at most {max(tv for _, tv in cells):.0e}")
with put(mine, "best", best):
    laws = [(nano_spec.Table(4, 2 * i).law([]), nano_spec.Table(4, 2 * i + 1).law([])) for i in range(steps(6))]
    table["bound, independent guesses"] = [sum(best(p, q, n) for p, q in laws) / len(laws) for n in numbers]
    print(f"{'bound, independent guesses':26}", " ".join(f"{a:.3f}" for a in table["bound, independent guesses"]))

# %%
figure, axis = plt.subplots(figsize=(6, 2.8), layout="constrained")
for (name, values), marker in zip(table.items(), "osD^vx"):
    axis.plot(numbers, values, marker=marker, label=name, linestyle="--" if "bound" in name else "-")
axis.set(xlabel="guesses for one place", ylabel="acceptance", xticks=numbers)
axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %% [markdown]
# Means over six pairs, $p$ and $q$ random and unrelated, so every rule starts low; and of four tokens, so three guesses are nearly all there are. Read the last column. Among independent guesses K-SEQ (.741)
# beats recursive rejection (.707), and neither reaches the bound, .820. But distinct guesses (.905) and greedy drafts (.970) pass it: the bound is for independent
# guesses only. **How the guesses are drawn matters more than how cleverly they are tested.** The most probable tokens alone are poor
# with one guess (.180, where a drawn one has .517) and good with three of four. The total variation is 0 for all: the rules differ in speed alone.
#
# ## Trees
#
# A tree has several guesses behind each guess. Node 0 is the last token of the text; `tokens[i]` and `parents[i]` describe node $i$, and parents come before their children. The target reads the
# whole tree in one call: a node sees the text, its ancestors and itself, and stands at the place its depth says, so siblings share one place.
# Here with a GPT: the method `look(text, tokens, parents)` (not the rule `look`) reads what its cache does not hold yet, and gives the distribution after each newly read node.

# %%
def tree_mask(parents, prefix):
    """(N, prefix + N), True where node i sees the column: all of the prefix, itself, what its parent sees."""
    seen = torch.zeros(len(parents), prefix + len(parents), dtype=torch.bool)
    for i, parent in enumerate(parents):
        seen[i, :prefix] = True
        if parent >= 0:
            seen[i] |= seen[parent]
        seen[i, prefix + i] = True
    return seen

def call(model, cache, start, tokens, places, mask):
    """Logits (N, V) of N tokens at any places, with any mask; their keys and values go to rows start, start + 1, ..."""
    def attend(q, k, v, cache, start):
        end = start + q.shape[2]
        cache[0, :, :, start:end], cache[1, :, :, start:end] = k, v
        return F.scaled_dot_product_attention(q, cache[0, :, :, :end], cache[1, :, :, :end], mask)
    x = nano_spec.norm(model.token(torch.tensor([tokens])))
    for block, layer in zip(model.blocks, cache):
        block.attend = attend
        x = block(x, model.cos[places], model.sin[places], layer, start)
        del block.attend  # the block has its own again
    return model.head(nano_spec.norm(x))[0]

# %%
class TreeStream(nano_spec.Stream):
    """A text whose guesses are a tree. Rows of the cache: the text but its last token, then node 0, 1, 2, ..."""
    first = 0  # rows before this one are seen by all that follow

    def look(self, text, tokens, parents):
        base, held = len(text) - 1 - self.first, self.length - self.first  # counted from row `first`
        above = [*range(-1, base), *(base + parent for parent in parents[1:])]  # the text is a tree without branches
        places = []
        for parent in above:
            places.append(self.first + (0 if parent < 0 else places[parent] - self.first + 1))
        new = [*text[self.first:-1], *tokens][held:]
        mask = tree_mask(above, self.first)[held:]
        logits = call(self.model, self.cache, self.length, new, places[held:], mask)
        self.length += len(new)
        return nano_spec.warp(logits[max(0, base - held):], **self.settings)

    def keep(self, text, path):
        """Of the tree behind this text keep the nodes of `path`: their rows move together, the rest is overwritten."""
        base = len(text) - 1
        rows = [base + node for node in path if base + node < self.length]  # a draft has not read its leaves
        self.cache[..., base:base + len(rows), :] = self.cache[..., rows, :]
        self.length = self.first = base + len(rows)

# %% [markdown]
# **Each level is fed to the draft once**: its ancestors lie in the cache. (Feeding the whole tree again for each level
# gives the right tree, too, and a draft so slow that a chain wins; then the tree is blamed.)

# %%
def draft_tree(draft, text, widths, dice, pick):
    """widths[d] guesses behind each node of depth d -> tokens, parents of all nodes, q of all but the leaves."""
    tokens, parents, q = [text[-1]], [-1], []
    for width in widths:
        begun = len(q)
        q += draft.look(text, tokens, parents)  # the newest level, and nothing else
        for node in range(begun, len(q)):
            guesses = pick(q[node], width, dice)
            tokens += guesses
            parents += [node] * len(guesses)
    return tokens, parents, q

def walk(p, q, tokens, parents, rule, dice):
    """From the root down: choose a token at each node; go on if it is a child -> new tokens, the nodes passed."""
    node, new, path = 0, [], []
    while node is not None:
        path.append(node)
        below = [i for i, parent in enumerate(parents) if parent == node]
        law = q[node] if below else None  # below a leaf nothing was guessed, and the rule draws from p
        x = rule(p[node], law, [tokens[i] for i in below], dice)
        new.append(x)
        node = next((i for i in below if tokens[i] == x), None)
    return new, path

def speculate_tree(target, draft, prompt, n, widths, pick, rule, dice):
    text, given = list(prompt), []
    while (left := len(prompt) + n - len(text)) > 0:
        tokens, parents, q = draft_tree(draft, text, widths[:left - 1], dice, pick)
        p = target.look(text, tokens, parents)  # the one call of the target
        new, path = walk(p, q, tokens, parents, rule, dice)
        target.keep(text, path)
        draft.keep(text, path)
        text += new
        given.append(len(new))
    return text, given

# %% [markdown]
# **Exercise 5, the second exam.** `exam_tree(walk, rule)` -> the largest total variation, over your cases, between the law of the first few tokens of a
# text written with `walk` and the chain rule. `rule` is exact for independent guesses. The check hands you walks with mistakes: one takes the $q$ of another
# node, one reads the $p$ of another branch, one goes on below a refused guess ... So the *joint* law counts: the first token alone may be perfect.
#
# `Grown(table)` below is a `nano_spec.Table` that answers `look`. Draw a tree from one table, look at it with another, walk, then go on by plain draws from
# `target.law(text)` until the text has $n$ new tokens; enumerate; compare with `nano_spec.chain_rule(target.law, [0], n)`. Keep it small: two tokens of vocabulary,
# widths (2, 1) or (1, 2), $n=3$: some hundred runs.
#
# *Hint:* a walk may return more than $n$ tokens, or fewer: cut, or go on.

# %%
class Grown:
    """A Table asked at the nodes of a tree."""
    def __init__(self, table):
        self.table, self.laws = table, []

    def look(self, text, tokens, parents):
        texts, had = [list(text)], len(self.laws)
        for x, parent in zip(tokens[1:], parents[1:]):
            texts.append(texts[parent] + [x])
        self.laws += [self.table.law(one) for one in texts[had:]]
        return self.laws[had:]

def exam_tree(walk, rule):
    """How far from the chain rule is what the walk writes, at worst?"""
    # SOLUTION (about 15 lines, 20 minutes)
    target, draft, worst, n = nano_spec.Table(2), nano_spec.Table(2, 1), 0.0, 3
    truth = nano_spec.chain_rule(target.law, [0], n)
    for widths in ((2, 1), (1, 2)):
        def decode(dice):
            text = [0]
            tokens, parents, q = draft_tree(Grown(draft), text, widths, dice, independent)
            p = Grown(target).look(text, tokens, parents)
            text += walk(p, q, tokens, parents, rule, dice)[0]
            while len(text) < 1 + n:
                text.append(dice.choose(target.law(text)))
            return tuple(text[1:1 + n])
        law = nano_spec.enumerate_outcomes(decode)
        worst = max(worst, nano_spec.total_variation(law, truth))
    return worst
    # END


check.check_exam_tree(exam_tree)

# %% [markdown]
# A table has no cache, so your exam cannot see what goes wrong there. For that the whole program runs on a tiny GPT in 64 bits, through the prover of the script. The truth is
# `nano_spec.truth_of`, the training forward: no cache, no mask of ours. Then five mistakes are made on purpose, one at a time.

# %%
net, small = nano_spec.tiny_gpt(0), nano_spec.tiny_gpt(1, depth=1)

def tree_case(widths, pick, rule, n=3):
    def decode(dice):
        text, _ = speculate_tree(TreeStream(net, 8), TreeStream(small, 8), [0], n, widths, pick, rule, dice)
        return tuple(text[1:])
    return decode, lambda: nano_spec.chain_rule(nano_spec.truth_of(net), [0], n)

cases = {"top children": tree_case((2, 1), top, look)}
mutants = {
    "siblings at places of their own": (TreeStream.look, "places[parent] - self.first + 1", "len(places)", "top children"),
    "nodes see all earlier nodes": (tree_mask, "seen[i] |= seen[parent]", "seen[i, :prefix + i] = True", "top children"),
    "nodes do not see themselves": (tree_mask, "seen[i, prefix + i] = True", "pass", "top children"),
    "kept rows do not move": (TreeStream.keep, "self.cache[..., rows, :]", "self.cache[..., base:base + len(rows), :]", "top children"),
    "nodes do not see the first token": (tree_mask, "seen[i, :prefix] = True", "seen[i, 1:prefix] = True", "top children"),
}
_ = nano_spec.prove(cases, dict(list(mutants.items())[:steps(5, few=1)]))

# %%
with put(mine, "recursive", recursive):
    rule = functools.partial(recursive, distinct=True)
    _ = nano_spec.prove({"distinct children": tree_case((2,), distinct, rule, n=2)}, {})

# %% [markdown]
# Look at the sizes: a sample of a thousand texts would not see .002 and .001; the enumeration's own error is $10^{-16}$. And "kept rows do not move" is the classic: after the walk the accepted nodes are scattered over the cache, and must be moved side by
# side. With a chain they lie right already, so a program that was tested on chains passes. Question 3: what survives a proof is what its cases cannot show, the third guess with two,
# the cache with a table, the moved rows with a chain.
#
# ## On a trained pair
#
# A target of three blocks and a draft of one, both narrow, 120 steps on the help texts of Python. Then: what does one call of the target bring, $\tau$ tokens, if it may check 14 guesses? The children of a node are the
# most probable ones, and the rule is `look`.

# %%
train_text, test_text = nano_spec.load_text("pydoc")
rows = SimpleNamespace(train=nano_spec.windows(train_text, 64, 16), test=nano_spec.windows(test_text, 64, 64)[:64])
torch.manual_seed(0)
pair = torch.nn.ModuleDict({"target": nano_spec.GPT(256, 96, 64, 3, 2), "draft": nano_spec.GPT(256, 96, 32, 1, 1)})
nano_spec.train(SimpleNamespace(steps=steps(120), batch=16, lr=0.02, seed=0), pair, rows)
pair.requires_grad_(False)

# %%
prompts = [test_text[i * 2000:i * 2000 + 24].tolist() for i in range(steps(16, few=1))]

def tau(widths, pick, rule, temperature=1.0):
    """Tokens per target call, over all prompts."""
    calls, new = 0, steps(48, few=4)
    for i, prompt in enumerate(prompts):
        target, draft = TreeStream(pair["target"], 96, temperature), TreeStream(pair["draft"], 96)
        dice = nano_spec.Dice(nano_spec.rng_at(0, i))
        calls += len(speculate_tree(target, draft, prompt, new, widths, pick, rule, dice)[1])
    return len(prompts) * new / calls

def nodes(widths):
    """Guesses of a tree, and how many of its nodes the draft must read: all but the leaves."""
    level, total = 1, 1
    for width in widths:
        level *= width
        total += level
    return total - 1, total - level

shapes = [(1,) * 14, (1, 1, 1), (2, 1, 1, 1, 1, 1, 1), (2, 2, 2), (4, 1, 1), (7, 1), (14,)]
for widths in shapes:
    again = sum(nodes(widths[:depth])[0] + 1 for depth in range(len(widths)))  # the whole tree once more for each level
    print(f"{str(widths):44} {nodes(widths)[0]} guesses; the draft reads {nodes(widths)[1]:2} nodes, or {again:3} if fed again")

# %%
taus = {}
for widths in shapes[:steps(7, few=2)]:
    taus[widths] = [tau(widths, top, look, temperature=0), tau(widths, top, look)]
    print(f"most probable children, {str(widths):44} temperature 0: tau {taus[widths][0]:.2f}   temperature 1: {taus[widths][1]:.2f}")

# %%
with put(mine, "recursive", recursive):
    for widths in list(taus):
        taus[widths] += [tau(widths, distinct, functools.partial(recursive, distinct=True))]
        print(f"distinct children, drawn, {str(widths):44} temperature 1: tau {taus[widths][2]:.2f}")

# %%
figure, axis = plt.subplots(figsize=(6.5, 2.8), layout="constrained")
for j, name in enumerate(("most probable, temperature 0", "most probable, temperature 1", "distinct, temperature 1")):
    heights = [row[j] if j < len(row) else 0 for row in taus.values()]
    axis.bar([i + 0.27 * (j - 1) for i in range(len(taus))], heights, 0.25, label=name)
axis.set_xticks(range(len(taus)), ["-".join(map(str, widths)) if len(widths) < 9 else f"chain of {len(widths)}" for widths in taus], fontsize=8)
axis.set(ylabel="tokens per target call")
axis.legend(fontsize=7)
plt.show()

# %%
for widths, row in taus.items():  # a draft call counts a third: one block, where the target has three
    print(f"{str(widths):44} speed-up if 15 tokens cost a call on one: {row[-1] / (1 + len(widths) / 3):.2f}, two: {row[-1] / (2 + len(widths) / 3):.2f}")

# %% [markdown]
# ## What came out, and what did not
#
# **At temperature 1 the most probable children are a bad choice** (1.36 to 1.89 tokens per call), however the tree is shaped: this target is unsure, and its draws are mostly
# not the favourite. Guesses that are *drawn* bring up to 3.66. At temperature 0 only the favourite counts, and a chain of
# favourites brings 4.47.
#
# **With 14 guesses each the tree does not beat the chain in tokens.** 2-1-1-1-1-1-1 brings 3.66, as the chain of 14 does; broader trees bring less. Where most guesses
# stay, depth pays. But the chain asks the draft 14 times in a row, that tree seven times, 2-2-2 three times. If 15 tokens cost what one does, as on
# a large GPU, the long chain is slower than writing one by one (.65), the chain of three gains 1.41, and **broad trees gain most**: 2-2-2, with as many draft calls as the
# chain of three, 1.60, 7-1 1.57. If a call on 15 tokens costs two, as on many a CPU, hardly anything is left (1.07; the chain of three, whose call reads four tokens, is overcharged there). Question 2, then: the tree is a trade, longer target calls for fewer draft calls.
# And it needs the cache across levels: fed again, 2-1-1-1-1-1-1 would have its draft read 49 nodes instead of 13.
#
# Not done here: trees that fit the text (EAGLE-2, arXiv:2406.16858, grows the branch with the largest product of $q$; Sequoia, arXiv:2402.12374, finds the best fixed tree by dynamic
# programming). And 16 texts of 48 new bytes are few: differences of .1 are noise.
#
# ## Back to the script
#
# With one guess for each place your rule *is* the script's `accept`. Put it in: the script's own proof judges it. Then the tree of seven levels beside the
# chain of 14.
#
# **Read on.** SpecInfer (2305.09781); SpecTr (2310.15141); Towards optimal multi-draft speculative decoding (2502.18779). Lesson 41 gets its guesses for nothing; lesson 42 gives up exactness, and measures the price.

# %%
def accept_by_rule(draft, q, p, dice):
    """nano_spec.accept, with your rule at each place."""
    new = []
    for i, x in enumerate(draft):
        new.append(recursive(p[i], q[i], [x], dice))
        if new[-1] != x:
            return new
    return new + [recursive(p[len(draft)], None, [], dice)]

with put(nano_spec, "accept", accept_by_rule):
    script = {name: nano_spec.cases()[name] for name in ("model", "model, zeros", "GPT, n-grams")}
    distance, _ = nano_spec.prove(script, {})
    band("total variation of the script with your rule", max(distance.values()), 0, 1e-12)

# %%
widths = (2, 1, 1, 1, 1, 1, 1)
if len(taus.get(widths, [])) == 3:
    band("tau of the tree 2-1-1-1-1-1-1 over that of the chain of 14, both drawn", taus[widths][2] / taus[(1,) * 14][2], 0.9, 1.25)
