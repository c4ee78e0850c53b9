# %% [markdown]
# # 41 Free drafts
#
# **Guess first, and write your three answers down.** A second, smaller model must be trained, stored and run. Can the guesses come from something that is there anyway?
#
# 1. Find the last four bytes of the text earlier in the same text, and guess that it goes on as it did there. Does that pay at temperature 1? At temperature 0?
# 2. From one and the same hidden state, which says what the *next* token may be, a further matrix is to read the one after it. It does not know which
#    next token will be drawn. How much worse can its guesses be than those of a model that knows?
# 3. Draw a guess from the first layer of the target. If that layer finds it improbable, draw another one from the second layer, and tell the verifier the second layer's $q$.
#    Both draws are honest. Is the output still exact?
#
# Lesson 40 has the rule that makes any guess safe: $x\sim q$ stays with $\min(1,p(x)/q(x))$, else the residual is drawn from. Here are five sources of $x$ and $q$; all but the mask tokens
# are then proved by enumeration, as in the script.

# %%
import sys
sys.path[:0] = ["..", "../.."]  # the repository, seen from lessons/ and from lessons/solutions/
import copy, functools, matplotlib.pyplot as plt, torch, torch.nn as nn, torch.nn.functional as F, nano_spec
from types import SimpleNamespace
from lessons.checks import band, lesson_41 as check, put, steps

# %% [markdown]
# ## The target
#
# Three blocks, 120 steps on Python's help texts.

# %%
train_text, test_text = nano_spec.load_text("pydoc")
rows = SimpleNamespace(train=nano_spec.windows(train_text, 128, 16), test=nano_spec.windows(test_text, 128, 128)[:steps(48)])
settings = SimpleNamespace(steps=steps(120), batch=8, lr=0.02, seed=0)
torch.manual_seed(0)
model = nano_spec.GPT(256, 144, 64, 3, 2)
with_exits = copy.deepcopy(model)  # the same first weights, for later
nano_spec.train(settings, nn.ModuleDict({"target": model}), rows)
model.requires_grad_(False)

# %%
prompts = [test_text[i * 3000:i * 3000 + 80].tolist() for i in range(steps(12, few=1))]

class Seen(nano_spec.Stream):
    """A Stream that shows the hidden states (g + 1, C) of its last call, too."""
    def distributions(self, text, draft=()):
        new = [*text[self.length:], *draft]
        x = self.model.hidden(torch.tensor([new]), self.cache, self.length)[0]
        self.length, self.rows = self.length + len(new), x[-len(draft) - 1:]
        return nano_spec.warp(self.model.head(nano_spec.norm(self.rows)), **self.settings)

def tau(make, by=None, temperature=1.0):
    """Tokens per call of the target `by`, over all prompts; make(target) gives the drafter of one text."""
    calls, new = 0, steps(64, few=4)
    for i, prompt in enumerate(prompts):
        target = Seen(by or model, 144, temperature)
        dice = nano_spec.Dice(nano_spec.rng_at(0, i))
        calls += len(nano_spec.speculate(target, make(target), prompt, new, 4, dice)[1])  # gamma 4
    return len(prompts) * new / calls

table, mine = {}, SimpleNamespace(f=None)

def report(name, make, drafting=0.0, **more):
    """drafting: what the guesses of a round cost, in target calls; a call on five tokens counts as one."""
    table[name] = [tau(make, temperature=t, **more) for t in (0, 1)]
    cold, warm = table[name]
    print(f"{name:26} tokens per call, temperature 0: {cold:.2f}, 1: {warm:.2f}   "
          f"speed-up at most {cold / (1 + drafting):.2f}, {warm / (1 + drafting):.2f}")

# %% [markdown]
# ## Copy what followed last time
#
# Prompt lookup (Saxena 2023; in transformers as `prompt_lookup_num_tokens`): take the last $n$ tokens, find them earlier in the text, propose what followed there. The longest $n$ that
# occurs counts, and among its places the most recent. Nothing is drawn,
# so $q$ is a point mass: 1 at the guess. The rule then says: keep $x$ with probability $p(x)$, else draw from $p$ without $x$.
#
# **Exercise 1.** `lookup(text, gamma, longest)` -> up to `gamma` tokens, a list, empty if not even the last token occurs earlier. Worked: text 1 2 3 9 1 2 3 4 5 1 2 3 with `longest` 3 and
# `gamma` 2: 1 2 3 occurs at places 0 and 4; the later one went on with 4 5.
#
# *Hint:* the occurrence must end before the end of the text, or nothing follows. It may overlap the last $n$ tokens: after 7 7 7, another 7 is a good guess.

# %%
def lookup(text, gamma, longest):
    """What followed the last tokens when they occurred before."""
    # SOLUTION (about 6 lines, 10 minutes)
    for n in range(min(longest, len(text) - 1), 0, -1):
        for i in range(len(text) - n - 1, -1, -1):
            if text[i:i + n] == text[-n:]:
                return text[i + n:i + n + gamma]
    return []
    # END


check.check_lookup(lookup)

# %%
class Certain:
    """A drafter from a function: (text, gamma) -> guesses; each q is a point mass."""
    def __init__(self, guess, vocab=256):
        self.guess, self.vocab = guess, vocab

    def propose(self, text, gamma, dice):
        draft = self.guess(text, gamma)
        return draft, list(F.one_hot(torch.tensor(draft, dtype=torch.long), self.vocab).double())

    def update(self, text, start, p):
        """Nothing to learn: the text itself is the memory."""

with put(mine, "f", lookup):
    report("prompt lookup", lambda target: Certain(functools.partial(lookup, longest=4)))

# %% [markdown]
# ## Keep what the target has said
#
# Each call gives $\gamma+1$ distributions, and most are used once or not at all. Token recycling (Luo et al., arXiv:2408.08696) keeps them: a table holds, for each token $v$, what the target said *the
# last time it stood behind a $v$*, wherever that was. A guess after $v$ is then a look into row $v$. Every row of every call is written down, **also those behind refused guesses**: the
# target has read them, and what it said after them is worth as much.
#
# The paper keeps the eight best of each row and makes a tree of them. We keep the whole row and draw from it (lesson 40: at temperature 1 drawn guesses are the better ones).
#
# **Exercise 2.** The class `Recycling(vocab)` with `table`, (V, V) in float64, uniform rows at first; `propose(text, gamma, dice)` -> `draft, q`, `gamma` guesses in a row, each from the row of the token
# before it; `update(text, start, p)`, where `p[0]` was said behind `text[start - 1]`, and `p[i]` behind the guess number $i-1$ of the last draft, kept or not.
#
# *Hint:* `propose` must remember its draft. And `q` must be what each guess was really drawn from: a view of a row that `update` writes into is no memory.

# %%
class Recycling:
    """A table of what the target said last behind each token."""
    def __init__(self, vocab):
        self.table, self.draft = torch.full((vocab, vocab), 1 / vocab, dtype=torch.float64), []

    def propose(self, text, gamma, dice):
        # SOLUTION (about 6 lines, 10 minutes)
        last, self.draft, q = text[-1], [], []
        for _ in range(gamma):
            q.append(self.table[last].clone())
            last = dice.choose(q[-1])
            self.draft.append(last)
        return self.draft, q
        # END

    def update(self, text, start, p):
        # SOLUTION (about 2 lines, 5 minutes)
        for token, said in zip([text[start - 1], *self.draft], p):
            self.table[token] = said
        # END


check.check_Recycling(Recycling)

# %%
with put(mine, "f", Recycling):
    report("recycling, new each text", lambda target: Recycling(256))
    kept = {0: Recycling(256), 1: Recycling(256)}
    report("recycling, table kept", lambda target: kept[target.settings["temperature"]])

# %% [markdown]
# Lookup brings 2.73 tokens at temperature 0, where this small model soon repeats itself, and next to nothing (1.13) at temperature 1: a guess that is not drawn stays with $p(x)$, which is rarely large. (What makes it strong
# elsewhere are texts that repeat their input: summaries, edits of code.) Recycling brings 2.45 and, with the table kept, 3.57. Its $q$ knows no more than the last token, but it was
# said by the target itself. A kept table goes on learning from text to text, and what it has seen of other prompts it uses: legal, as the script's n-grams with a memory are. (Lookahead of Alipay, arXiv:2312.12728, keeps whole branches, a tree of
# what followed what, with counts.)
#
# ## More heads on one state
#
# Medusa (Cai et al., arXiv:2401.10774): the hidden state $h_i$ behind token $i$ gives the law of token $i+1$ through the head of the model. Head $j=1..k$ is a small block, $\hat h+\mathrm{SiLU}(W_j\hat h)$ with $\hat h$ the normed
# state, and reads through the same matrix (in the paper through one of its own) the token $i+1+j$. The target is frozen, only the $W_j$ learn, with
#
# $$\mathcal L=\sum_{j=1}^{k} d^{\,j}\ \Big(\text{mean over all places } i \text{ that have a token } i+1+j \text{ of } -\log q_j(x_{i+1+j}\mid h_i)\Big),\qquad d=0.8 .$$
#
# **Exercise 3.** `medusa_loss(logits, tokens, decay)`: logits (k, B, N, V) of the heads, read at tokens 0 .. N - 1 of `tokens` (B, N + 1) -> the loss. Worked: N = 3, so tokens 0 .. 3. Head 1 is asked at places
# 0 and 1, for tokens 2 and 3. Head 2 at place 0 alone, for token 3. A head that has no place left adds nothing.
#
# *Hint:* the trap is the shift: the model's own head has $i+1$, the first Medusa head $i+2$.

# %%
def medusa_loss(logits, tokens, decay):
    """How badly the heads foresee the tokens after the next one."""
    # SOLUTION (about 6 lines, 10 minutes)
    loss = 0.0
    for j, one in enumerate(logits, 1):
        goal = tokens[:, 1 + j:]
        if goal.shape[1]:
            loss = loss + decay ** j * F.cross_entropy(one[:, :goal.shape[1]].flatten(0, 1), goal.flatten())
    return loss
    # END


check.check_medusa_loss(medusa_loss)

# %%
class Heads(nn.Module):
    def __init__(self, dim, k):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(k))
        for layer in self.layers:
            nn.init.zeros_(layer.weight)  # at first each head says what the model says

    def forward(self, x):
        """States (.., C) -> (k, .., C)"""
        x = nano_spec.norm(x)
        return torch.stack([x + F.silu(layer(x)) for layer in self.layers])

class Medusa:
    def __init__(self, target, heads):
        self.target, self.heads, self.q = target, heads, []  # before the first call there is no state

    def propose(self, text, gamma, dice):
        q = self.q[:gamma]
        return [dice.choose(one) for one in q], q

    def update(self, text, start, p):
        x = self.target.rows[len(text) - start - 1]  # the state that the last token came from: i + 1 is that token
        self.q = list(nano_spec.warp(self.target.model.head(self.heads(x)), **self.target.settings))

# %%
heads = Heads(64, 4)
with put(mine, "f", medusa_loss):
    optimizer = torch.optim.AdamW(heads.parameters(), 3e-3, weight_decay=0.0)
    for step in range(steps(120)):
        tokens = rows.train[nano_spec.batch_at(step, len(rows.train), 8, 1)]
        loss = medusa_loss(model.head(heads(model.hidden(tokens[:, :-1]))), tokens, 0.8)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    heads.requires_grad_(False)
    report("Medusa heads", lambda target: Medusa(target, heads))

# %% [markdown]
# ## Mask tokens, and a model that stays what it was
#
# Another way to several tokens: append $k$ learned vectors behind the text, *mask tokens*, and read a guess at each. Their states pass through all layers and attend to all of the text. Parallel prompt decoding (PPD, arXiv:2405.18628) learns the $k$ vectors alone. Apple's multi-token
# prediction (MTP, Samragh et al., arXiv:2507.11851) also adapts the matrices by low-rank products $BA$, **but only at the masks**: $Wx+g\,BAx$ with a gate $g$, 1 at a mask and 0 elsewhere. Ordinary
# places never look at later ones, so their logits stay *the same bits*, and the target is the target.
#
# **Exercise 4.** `gated(x, weight, A, B, gate)`: x (.., N, C), weight (M, C), A (r, C), B (M, r), gate (N,) of bool -> (.., N, M). Where the gate is off the result is bit for bit `F.linear(x, weight)`, even if $BAx$ is
# infinite there. *Hint:* $0\cdot\infty$ is not a number; `torch.where`.

# %%
def gated(x, weight, A, B, gate):
    """W x, and B A x on top where the gate is on."""
    # SOLUTION (about 3 lines, 5 minutes)
    base = F.linear(x, weight)
    more = F.linear(F.linear(x, A), B)
    return torch.where(gate[:, None], base + more, base)
    # END


check.check_gated(gated)

# %%
class Adapted(nn.Module):
    def __init__(self, linear, rank, gate):
        super().__init__()
        self.weight, self.gate = linear.weight, gate
        self.A = nn.Parameter(torch.randn(rank, linear.in_features) / linear.in_features ** 0.5)
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))  # B = 0: at first nothing is added

    def forward(self, x):
        return gated(x, self.weight, self.A, self.B, self.gate)

def with_masks(model, masks, tokens):
    """tokens (B, N) and k masks behind them -> logits (B, N + k, V)."""
    x = nano_spec.norm(torch.cat([model.token(tokens), masks.expand(len(tokens), -1, -1)], 1))
    for block in model.blocks:
        x = block(x, model.cos[:x.shape[1]], model.sin[:x.shape[1]])
    return model.head(nano_spec.norm(x))

N, K = 32, 3
short, held = nano_spec.windows(train_text, N + K, 37), nano_spec.windows(test_text, N + K, 97)[:steps(400, few=4)]  # N + K + 1 tokens each

def learn_masks(rank):
    """-> a model with adapters of this rank (0: none), and its masks, trained."""
    torch.manual_seed(0)
    ours, masks = copy.deepcopy(model), nn.Parameter(0.5 * torch.randn(K, 64))
    for block in ours.blocks if rank else []:
        for name in ("qkv", "up", "down"):
            setattr(block, name, Adapted(getattr(block, name), rank, torch.arange(N + K) >= N))
    learned = [masks] + [p for name, p in ours.named_parameters() if name[-2:] in (".A", ".B")]
    optimizer = torch.optim.AdamW(learned, 1e-2, weight_decay=0.0)
    for step in range(steps(150)):
        tokens = short[nano_spec.batch_at(step, len(short), 32, 2)]
        logits = with_masks(ours, masks, tokens[:, :N])[:, N:]  # mask j = 0, 1, .. guesses token N + 1 + j
        F.cross_entropy(logits.flatten(0, 1), tokens[:, N + 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return ours.requires_grad_(False), masks.detach()

# %%
def overlap(q):
    """Mean acceptance, sum min(p, q), of guesses q (M, K, V) for the tokens N + 1 .. N + K of held-out rows."""
    p = model(held[:, :-1])[:, N:].softmax(-1)  # row i predicts i + 1, and has read all before it, as the verifier has
    return torch.minimum(p, q).sum(-1).mean(0).tolist()

state = model.hidden(held[:, :N])[:, -1]  # (M, C); untrained, every head says what the model says of the next token
foreseen = {name: overlap(model.head(some(state))[:K].softmax(-1).transpose(0, 1)) for name, some in (("untrained heads", Heads(64, K)), ("Medusa heads", heads))}
for rank in (0, 8):
    with put(mine, "f", gated):
        ours, masks = learn_masks(rank)
        before, after = (with_masks(one, masks, held[:, :N])[:, :N] for one in (model, ours))
        name = f"masks, adapters of rank {rank}"
        foreseen[name] = overlap(with_masks(ours, masks, held[:, :N])[:, N:].softmax(-1))
        print(f"{name}: ordinary logits the same bits: {torch.equal(before, after)}")
for name, values in foreseen.items():
    print(f"{name:28} acceptance 1, 2, 3 tokens after the next one: {' '.join(f'{a:.3f}' for a in values)}")

# %% [markdown]
# The bits are the same, with adapters and without: `torch.where` never lets the sum through. But read the first row: heads that have learned nothing, and guess from the law of the *next* token three times, have .551: bytes frequent here are
# frequent there. Above that the trained heads gain .08, the masks with adapters .03, and the vectors alone lose. (Not like with like: the heads learned at every place of a row, some 25 times as many as the masks, which stand at one.) PPD's abstract reports texts 2.49 times
# as fast, with large models, in which a mask has thirty layers to think; ours has three.
#
# In decoding, masks have a second problem. They must stand behind the last accepted token, and which one that is turns out in the very call that should read them. So PPD and MTP put masks behind *every* guess of
# the draft, in a tree as in lesson 40: $k$ guesses and $k$ masks behind each, and behind the text, make $k+k(k+1)$ tokens per call.
#
#
# ## The target's own first layers
#
# An early exit: read the stream after block 1 through the model's head, and you have a draft model with no weight of its own. (Its keys and values are even those of the target's first layers.) But an ordinary model has little
# reason to put the answer there early. So train it to: the mean of the losses at several exits, all from **one** pass (sorted fine-tuning, S2D, arXiv:2407.01955; LayerSkip, arXiv:2404.16710).
#
# **Exercise 5.** `exits_loss(model, tokens, exits)`: tokens (B, N + 1), exits a tuple of depths, 1 .. number of blocks -> the mean over the exits of the mean cross-entropy of the next token, where exit $d$ is
# `model.head(nano_spec.norm(x))` of the stream after block $d$. Each block runs once.
#
# *Hint:* `GPT.hidden` shows the loop. With `exits=(3,)` of three blocks it is `nano_spec.loss_of`.

# %%
def exits_loss(model, tokens, exits):
    """The loss at several depths, from one pass."""
    # SOLUTION (about 8 lines, 10 minutes)
    x, N = nano_spec.norm(model.token(tokens[:, :-1])), tokens.shape[1] - 1
    total = 0.0
    for depth, block in enumerate(model.blocks, 1):
        x = block(x, model.cos[:N], model.sin[:N])
        if depth in exits:
            logits = model.head(nano_spec.norm(x))
            total = total + F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    return total / len(exits)
    # END


check.check_exits_loss(exits_loss)

# %% [markdown]
# The script trains with it, in place of `loss_of`.

# %%
with put(nano_spec, "loss_of", lambda model, tokens: exits_loss(model, tokens, (1, 2, 3))):
    nano_spec.train(settings, nn.ModuleDict({"mean of the exits": with_exits}), rows)
with_exits.requires_grad_(False)

def exit_of(model, depth):
    """The first blocks of a model, as a model: it shares all weights."""
    first = nano_spec.GPT(model.vocab, model.length, model.token.embedding_dim, depth, model.blocks[0].heads)
    first.token, first.head, first.blocks = model.token, model.head, model.blocks[:depth]
    return first.to(model.token.weight.dtype)

for name, one in (("ordinary", model), ("with exits", with_exits)):
    nats = [nano_spec.loss_of(exit_of(one, depth), rows.test).item() for depth in (1, 2, 3)]
    print(f"{name:12} nats per token at exits 1, 2, 3: {' '.join(f'{value:.3f}' for value in nats)}")

# %%
def early(target, depth):
    return nano_spec.ModelDrafter(nano_spec.Stream(exit_of(target.model, depth), 144, **target.settings))

report("exit 1, ordinary training", lambda target: early(target, 1), drafting=4 / 3)  # four guesses, one block of three each
for depth in (1, 2):
    report(f"exit {depth}, trained exits", lambda target: early(target, depth), drafting=4 * depth / 3, by=with_exits)

# %% [markdown]
# **Exercise 6.** Sorted exits choose the depth guess by guess: take the shallowest exit that is sure, that is, whose largest probability reaches a threshold; else the deepest. `sorted_guess(laws, threshold, dice)`: `laws` are functions without arguments,
# shallow to deep, each giving $q$ (V,); call none that is not needed -> `x, q, depth` (from 1). The third question of the beginning is the trap: whatever decides about the depth may look at $q$, never at the token drawn from it.

# %%
def sorted_guess(laws, threshold, dice):
    """A guess from the shallowest exit that is sure."""
    # SOLUTION (about 6 lines, 10 minutes)
    for depth, law in enumerate(laws, 1):
        q = law()
        if q.max() >= threshold or depth == len(laws):
            return dice.choose(q), q, depth
    # END


check.check_sorted_guess(sorted_guess)

# %%
def doubting_guess(laws, threshold, dice):
    """Wrong: judges the token that was drawn, and draws again."""
    for depth, law in enumerate(laws, 1):
        q = law()
        x = dice.choose(q)
        if q[x] >= threshold or depth == len(laws):
            return x, q, depth

class Sorted:
    def __init__(self, models, threshold, guess):
        self.models, self.threshold, self.guess, self.depths = models, threshold, guess, []

    def propose(self, text, gamma, dice):
        draft, q = [], []
        for one in self.models:
            one.length = min(one.length, len(text) - 1)
        for _ in range(gamma):
            laws = [functools.partial(lambda one: one.distributions(text + draft)[0], one) for one in self.models]
            x, law, depth = self.guess(laws, self.threshold, dice)
            draft, q = draft + [x], q + [law]
            self.depths.append(depth)
        return draft, q

    def update(self, text, start, p):
        """Nothing to learn."""

# %%
depths = []
def by_sureness(target):
    exits = [nano_spec.Stream(exit_of(target.model, depth), 144, **target.settings) for depth in (1, 2)]
    drafter = Sorted(exits, 0.3, sorted_guess)
    drafter.depths = depths
    return drafter

with put(mine, "f", sorted_guess):
    cold = tau(by_sureness, with_exits, 0)
    depths.clear()
    warm = tau(by_sureness, with_exits)
    table["sorted exits 1, 2"], first = [cold, warm], depths.count(1) / len(depths)
    print(f"sorted exits: temperature 0: {cold:.2f}, 1: {warm:.2f}; at temperature 1 exit 1 makes {first:.2f} of the guesses")
    for blocks, how in ((3, "as here, exit 2 begins anew"), (2, "if it went on from block 1")):
        drafting = 4 * (first + blocks * (1 - first)) / 3  # a guess runs 1 block, or this many
        print(f"{how}: speed-up at most {warm / (1 + drafting):.2f}")

# %% [markdown]
# ## The proof
#
# All of them on a tiny GPT in 64 bits, against the chain rule; and with mistakes, among them the doubting draft of question 3.

# %%
net = nano_spec.tiny_gpt(0)
little = Heads(8, 2).double()
for j, layer in enumerate(little.layers):
    layer.weight.data = torch.randn(8, 8, generator=nano_spec.rng_at(3, j), dtype=torch.float64) * 0.3
little.requires_grad_(False)

def on_tiny(make, n=3):
    def decode(dice):
        target = Seen(net, 8)
        return tuple(nano_spec.speculate(target, make(target), [0], n, 2, dice)[0][1:])
    return decode, lambda: nano_spec.chain_rule(nano_spec.truth_of(net), [0], n)

def sorted_on_tiny(guess, n=3):
    table = nano_spec.Table(3, 5)
    return on_tiny(lambda target: Sorted([table, nano_spec.Stream(exit_of(net, 1), 8)], 0.5, guess), n)

cases = {"prompt lookup": on_tiny(lambda target: Certain(functools.partial(lookup, longest=2), 3)),
         "recycling": on_tiny(lambda target: Recycling(3)), "Medusa": on_tiny(lambda target: Medusa(target, little)),
         "exit 1": on_tiny(lambda target: nano_spec.ModelDrafter(nano_spec.Stream(exit_of(net, 1), 8))),
         "sorted exits": sorted_on_tiny(sorted_guess)}
tv = {}
for name, case in cases.items():
    with put(mine, "f", case):
        tv |= nano_spec.prove({name: case}, {})[0]
band("the largest total variation", max(tv.values()), 0, 1e-12)

# %%
doubting = sorted_on_tiny(doubting_guess, n=2)
sharper = (Medusa.propose, "dice.choose(one)", "int(one.argmax())", "Medusa")
_ = nano_spec.prove({"Medusa": cases["Medusa"], "redrawn when in doubt": doubting}, {"heads take the favourite, tell q": sharper})

# %%
figure, axis = plt.subplots(figsize=(6.5, 3), layout="constrained")
for i, (name, (cold, warm)) in enumerate(table.items()):
    axis.barh(i - 0.2, cold, 0.4, color="C0", label="temperature 0" if i == 0 else None)
    axis.barh(i + 0.2, warm, 0.4, color="C1", label="temperature 1" if i == 0 else None)
axis.set_yticks(range(len(table)), list(table), fontsize=8)
axis.invert_yaxis()
axis.set(xlabel="tokens per target call, gamma 4")
axis.legend(fontsize=8)
plt.show()

# %% [markdown]
# ## What came out, and what did not
#
# **Knowing the last token beats knowing everything else** (question 2). Medusa's heads read a state that has seen the whole text, and bring 2.27 tokens at temperature 1; a table of one row per token, which sees nothing but the token just guessed, brings 2.45 in one text (within the noise), 3.57 if it is kept.
# For the heads guess independently: head 1 does not know which token was just drawn, head 2 not what head 1 drew. That is why EAGLE (lesson 40) feeds the drawn token back in.
# Do not carry the order of the two over to large models: with 256 bytes a table of rows is filled in a few calls; with 100,000 tokens it stays thin (the benchmark Spec-Bench has token recycling at 2.73 tokens per call, Medusa at 2.31).
#
# **Trained exits guess best and are not free.** Exit 1 brings 4.02 tokens, 3.20 without its training. The price of the training: the full model has 2.528 nats where the ordinary one has 2.509 after as many steps. And a guess costs a third of
# a target call, so at most 1.72 times as fast, while recycling, whose guesses cost nothing, gets 3.57 at most. One block in three is a dear draft; four guesses by one in sixteen would cost a quarter of a call. Exit 2 guesses best of all, and gains least of the exits at temperature 1 (1.21).
#
# **Sorted exits do not pay here.** At temperature 1 and threshold .3 exit 1 makes .40 of the guesses, and 4.24 tokens come per call, between exit 1 and exit 2. But exit 2, when asked, begins anew: at most 1.08. If it went on from the
# stream of block 1, 1.35. Exit 1 alone has 1.72. S2D's draft serves targets so large that a guess of either exit costs next to nothing. At temperature 0 sorted exits are exit 1 to the digit: the warped $q$ is a point mass there, so every exit is "sure".
# Judge sureness before the temperature, if you want more.
#
# **The doubting draft** is wrong by .038, and no drawn text would show it. Its $x$ was *kept because it was probable*: given that the second exit was asked, the first draw was an improbable one; and given that a token came from exit 1, it is
# not distributed as $q$ but as the probable part of $q$. All draws honest, and the pair $(x,q)$ a lie.
#
# Figures are from 12 prompts of 80 bytes, 64 new ones each: differences of .2 are noise. "At most", because five tokens in one call are taken for as cheap as one; lesson 40 and the script's `bench` say how far that is true for you.
#
# **Read on.** Medusa (2401.10774), whose "typical acceptance" is *not* exact; token recycling (2408.08696); parallel prompt decoding (2405.18628); "Your LLM knows the future" (2507.11851); S2D (2407.01955); Lookahead (2312.12728). Other ways to the same $q$:
# Hidden Transfer (2404.12022), Chimera (2402.15758). What is *not* exact although it sounds like it: SkipDecode, FiRST and other exits without a verifier.
