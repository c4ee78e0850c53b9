# %% [markdown]
# # 00 Autoregression
#
# **Guess first, and write your three answers down.**
#
# 1. A picture is cut into 64 tokens, each one of 64 kinds. A model reads the tokens from left to right and gives every token of a real picture the
#    probability 1/2. What is the probability of the whole picture, and is such a model good or bad?
# 2. Draw a picture by taking the most probable token, 64 times. Do you get the most probable picture?
# 3. A table counts which token follows which; on new pictures it predicts far better than one that only counts tokens. Look two tokens back,
#    three, four: where does it end?
#
# All of this course rests on one line, the chain rule of probability. This lesson takes it from a table of counts to a small GPT, and ends with a map of the
# other lessons.

# %%
import sys
sys.path[:0] = ["..", "../.."]  # the repository, seen from lessons/ and from lessons/solutions/
import functools, math, matplotlib.pyplot as plt, torch, torch.nn.functional as F, kernels, nano_ar
from lessons.checks import band, lesson_00 as check, put, steps
torch.manual_seed(0)

# %% [markdown]
# ## A picture as a sequence
#
# Text comes in symbols; a picture must be cut into some. The simplest way: cut 32 x 32 pixels into 64 patches of 4 x 4, find the 64 most typical
# patches (k-means; lesson 11 does better), and write down for each patch the number of the typical one nearest to it. Row by row, that is a
# sequence of 64 integers below V = 64: the **tokens**. The data are digits from fonts, 4,000 to learn from and 1,000 to be examined on.

# %%
V = 64
flags = ["--codebook", "64", "--dim", "64", "--depth", "3", "--batch", "32", "--steps", str(steps(500))]
config = nano_ar.read_settings(flags)[1]
data = nano_ar.SimpleNamespace(classes=10, codebook_size=V)
data.train_images, data.train_labels = nano_ar.glyphs(steps(4000, few=400), seed=0)
data.test_images, data.test_labels = nano_ar.glyphs(steps(1000, few=200), seed=1)
codebook = nano_ar.fit_codebook(data.train_images, V, torch.Generator().manual_seed(0))
data.train_tokens, data.test_tokens = (nano_ar.encode(x, codebook) for x in (data.train_images, data.test_images))
data.decode = functools.partial(nano_ar.decode, codebook=codebook)
print("tokens:", tuple(data.train_tokens.shape), " third row of the first picture:", data.train_tokens[0, 16:24].tolist())

# %%
figure, axes = plt.subplots(1, 3, figsize=(7.5, 2.5), layout="constrained")
axes[0].imshow(data.train_images[0], cmap="gray")
axes[1].imshow(torch.zeros(8, 8), cmap="gray_r")
for i, token in enumerate(data.train_tokens[0].tolist()):
    axes[1].text(i % 8, i // 8, token, ha="center", va="center", fontsize=8)
axes[2].imshow(data.decode(data.train_tokens[:1])[0], cmap="gray")
for axis, title in zip(axes, ("the picture", "its 64 tokens", "what the tokens keep")):
    axis.set_title(title)
    axis.axis("off")
plt.show()

# %% [markdown]
# ## The chain rule
#
# We want $p(x)$ for every sequence $x=(x_1,\dots,x_L)$. A table of it is out of the question:

# %%
print(f"pictures that 64 tokens of 64 kinds can write: 10^{64 * math.log10(64):.0f}; atoms in the universe: about 10^80")

# %% [markdown]
# But any law whatsoever is a product of laws of *one* token, each given those before it:
#
# $$p(x)=p(x_1)\,p(x_2\mid x_1)\,p(x_3\mid x_1,x_2)\cdots p(x_L\mid x_1,\dots,x_{L-1}).$$
#
# Nothing is approximated here, and no order is special; it is the definition of conditional probability, used L - 1 times. An **autoregressive**
# model is one function that answers all these questions, "what comes next, after this?". Each answer is only V numbers that sum to 1, and then
# the whole sums to 1 over all $64^{64}$ pictures without anybody adding them up.
#
# Products of 64 small numbers leave the range of a float, so one adds logarithms instead. $-\log p(x)$ in natural logarithms is the **negative
# log-likelihood**, in **nats**: small is good. No model can flatter itself by it: probability given to one picture is taken from another.
#
# The approximation comes with the model. The crudest with any memory is the **bigram**: it forgets all but the last token.
#
# **Exercise 1.** `sequence_nats(first, then, tokens)`: `first` (V,) holds $p(x_1)$, `then` (V, V) holds $p(b\mid a)$ in row a, column b; tokens are
# (N, L) integers. Return $-\log p$ of each sequence, (N,), in nats.
#
# Worked: first = (1/2, 1/2), then = ((3/4, 1/4), (1/2, 1/2)). The sequence 0, 0, 1 has $p=\frac12\cdot\frac34\cdot\frac14=\frac{3}{32}$, and
# $-\log\frac{3}{32}=2.367$.

# %%
def sequence_nats(first, then, tokens):
    """-log p of every row of tokens under a bigram."""
    # SOLUTION (about 3 lines, 6 minutes)
    start = first[tokens[:, 0]].log()
    moves = then[tokens[:, :-1], tokens[:, 1:]].log()  # (N, L - 1)
    return -(start + moves.sum(1))
    # END


check.check_sequence_nats(sequence_nats)

# %% [markdown]
# ## Counting
#
# Where do the tables come from? Among all tables, the one under which the training pictures are most probable is the table of
# **relative frequencies**: of the times that a was seen, how often did b follow? A pair never seen would get the probability 0, and a single such
# pair in a new picture makes $-\log p$ infinite. So a little is added to every count.
#
# **Exercise 2.** `count_bigram(tokens, V, add)`: tokens (N, L) -> `first` (V,) and `then` (V, V): the frequencies of the first token, and of b after
# a, with `add` added to every count before dividing. With V = 2, add = 1 and the one sequence 0, 0, 0, 1: first = (2/3, 1/3), then = ((3/5, 2/5),
# (1/2, 1/2)).
#
# *Hint:* `counts[a, b] += 1` with tensors a and b adds 1 *once* to a pair that occurs twice. Look up `torch.bincount` or `index_put_`.

# %%
def count_bigram(tokens, V, add):
    """Tables of a bigram: p(first token), p(next | token)."""
    # SOLUTION (about 4 lines, 12 minutes)
    first = torch.bincount(tokens[:, 0], minlength=V) + add
    pair = tokens[:, :-1] * V + tokens[:, 1:]  # a and b as one number, within a picture: never across two
    then = torch.bincount(pair.flatten(), minlength=V * V).view(V, V) + add
    return first / first.sum(), then / then.sum(1, keepdim=True)
    # END


check.check_count_bigram(count_bigram)

# %% [markdown]
# Now the third question. `ngram` counts the same for any memory: the n - 1 tokens before are read as the digits of one number, which is the row of
# the table (64 stands for "before the picture begins").

# %%
def context(tokens, n):
    """The n - 1 tokens before each token, as one number: (N, L)."""
    padded, number = F.pad(tokens, (n - 1, 0), value=V), torch.zeros_like(tokens)
    for j in range(n - 1):
        number = number * (V + 1) + padded[:, j:j + tokens.shape[1]]
    return number


def ngram(tokens, n, add=0.05):
    """Table (rows, V) of p(token | n - 1 tokens before it)."""
    rows = (V + 1) ** (n - 1)
    counts = torch.bincount((context(tokens, n) * V + tokens).flatten(), minlength=rows * V).view(rows, V) + add
    return counts / counts.sum(1, keepdim=True)


def ngram_nats(table, n, tokens):
    """Nats per picture, on average."""
    return -table[context(tokens, n), tokens].log().sum(1).mean().item()

# %%
tables = {n: ngram(data.train_tokens, n) for n in (1, 2, 3, 4)}
nats = {n: [ngram_nats(table, n, tokens) for tokens in (data.train_tokens, data.test_tokens)] for n, table in tables.items()}
for n, (train, test) in nats.items():
    print(f"looks {n - 1} tokens back: {tables[n].numel():10,} numbers, {train:6.1f} nats on its own pictures, {test:6.1f} on new ones")

# %% [markdown]
# The third answer: on the pictures that it has counted, a longer memory is always better; on new ones two tokens back gain nothing, and three lose. The table
# has one row for each possible past: 274,625 rows three tokens back, for the 256,000 tokens of 4,000 pictures. Where a new picture meets a row never seen, the
# table guesses: $\log 64=4.16$ nats. Counting does not know that pasts are *similar*. (Shannon drew English from such tables in 1948, by hand, and stopped at
# pairs of words.)
#
# ## A network instead of a table
#
# A GPT reads the whole past, however long, and turns it into V numbers (logits; softmax makes them probabilities). Similar pasts give similar numbers, so it
# need not have seen a past to judge it. It is trained on exactly the quantity above: $-\log p$ of the next token, averaged. One call gives all 64 predictions
# of a picture, since a mask hides from each place what comes after it. This one also reads the class, the digit to be drawn, in front of the first token. It is
# the script's own, made smaller. (Below, `train` is a mean since the line before, with a tenth of the classes hidden; `test`, measured at the step, may well be
# smaller.)

# %%
torch.manual_seed(0)
model = nano_ar.GPT(V, 10, 8, 8, config.dim, config.depth, config.dim // 32)
history = nano_ar.train(config, model, data)

# %% [markdown]
# Nats per picture are one of four ways to say the same. A **bit** is $\log 2$ nats: 1 nat is 1.443 bits. Divided by the tokens it
# can be compared with $\log_2 V$ = 6 bits, the cost of guessing. And $2^{\text{bits per token}}$, the **perplexity**, says among how many
# equally likely tokens the model hesitates on average.
#
# **Exercise 3.** `units(nats, L)`: nats of one picture of L tokens -> the tuple (bits per picture, bits per token, perplexity). For 64 tokens with
# probability 1/2 each, nats = $64\log 2$ = 44.36: (64, 1, 2).

# %%
def units(nats, L):
    """The same likelihood in bits per picture, bits per token, and as perplexity."""
    # SOLUTION (about 2 lines, 4 minutes)
    bits = nats / math.log(2)
    return bits, bits / L, math.exp(nats / L)
    # END


check.check_units(units)

# %%
size = sum(p.numel() for p in model.parameters())
rows = {"guessing": (0, 64 * math.log(V)), "tokens counted": (tables[1].numel(), nats[1][1])}
rows |= {f"{n - 1} back, counted": (tables[n].numel(), nats[n][1]) for n in (2, 3, 4)}
rows["counted for each cell and class"] = (10 * 64 * V, nano_ar.unigram_nats(data))
rows["GPT"] = (size, history[-1]["test"])
print(f"{'on 1,000 new pictures':33}{'numbers':>11}{'nats':>8}{'bits/token':>12}{'perplexity':>12}")
for name, (numbers, n) in rows.items():
    print(f"{name:33}{numbers:11,}{n:8.1f}{n / 64 / math.log(2):12.2f}{math.exp(n / 64):12.2f}")

# %% [markdown]
# So the first answer: a half for each of 64 tokens is $2^{-64}$ for the picture, 44.4 nats, an absurdly small number and a good model: guessing gives
# $2^{-384}$. Read the column perplexity: guessing hesitates among 64 tokens, the GPT between about two. The GPT also knows class and cell; a table of just
# these two, without any neighbour, is at 76.3 nats. From there to 42.4 it is what tokens say about each other.
#
# ## Drawing
#
# A model that answers "what comes next?" can draw: take $x_1$ at random from $p(x_1)$, then $x_2$ from $p(x_2\mid x_1)$ with the $x_1$ you got, and
# so on. By the chain rule the picture then has exactly the probability $p(x)$. This is **ancestral sampling**.
#
# **Exercise 4.** `draw(first, then, N, L, rng)`: N sequences of L tokens from a bigram -> (N, L) integers. Use `torch.multinomial(p, 1,
# generator=rng)`, which draws one column from each row of p.

# %%
def draw(first, then, N, L, rng):
    """N sequences from a bigram, token after token."""
    # SOLUTION (about 5 lines, 8 minutes)
    tokens = torch.multinomial(first.expand(N, -1), 1, generator=rng)  # (N, 1)
    for _ in range(L - 1):
        p = then[tokens[:, -1]]  # (N, V): what follows the token just drawn
        tokens = torch.cat([tokens, torch.multinomial(p, 1, generator=rng)], dim=1)
    return tokens
    # END


check.check_draw(draw)

# %%
def draw_ngram(n, N):
    """N pictures from a table with any memory."""
    tokens, rng = torch.zeros(N, 0, dtype=torch.long), torch.Generator().manual_seed(0)
    for _ in range(64):
        longer = F.pad(tokens, (0, 1))  # the place to be filled: its context does not depend on what stands there
        p = tables[n][context(longer, n)[:, -1]]
        tokens = torch.cat([tokens, torch.multinomial(p, 1, generator=rng)], dim=1)
    return tokens


def show(rows):
    """Rows of (title, images)."""
    figure, axes = plt.subplots(len(rows), 1, figsize=(7, 0.75 * len(rows)), layout="constrained")
    for axis, (title, images) in zip(axes, rows):
        axis.imshow(F.pad(images, (1, 1, 1, 1), value=90).transpose(0, 1).flatten(1), cmap="gray")
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(title, rotation=0, ha="right", va="center")
    plt.show()


labels = torch.arange(10)
gpt = nano_ar.generate(model, labels, torch.Generator().manual_seed(0))
pictures = [(f"{n - 1} back", data.decode(draw_ngram(n, 10))) for n in (1, 2, 3, 4)]
show(pictures + [("GPT", data.decode(gpt)), ("real", data.decode(torch.stack([data.test_tokens[data.test_labels == c][0] for c in labels])))])

# %% [markdown]
# Three tokens back soon meet a past that they have never seen, where all tokens are equally likely, and so it goes on:
# errors feed on errors. Only the GPT, asked for 0 to 9, draws digits: a stroke goes on in the row below, eight tokens later, and no table reaches that far.
#
# ## Bending the law
#
# Often one draws not from the model's law but from a sharper one:
#
# * **temperature** T divides the logits: $p_i^{1/T}$, up to a constant. T < 1 sharpens, T = 0 takes the most probable token always;
# * **top-k** keeps the k most probable tokens (Fan et al. 2018, arXiv:1805.04833);
# * **top-p**, or nucleus, keeps the most probable tokens until their mass reaches p, *including* the one that crosses the line
#   (Holtzman et al. 2019, arXiv:1904.09751, section 3.1). How many that is differs from place to place.
#
# What is kept is divided by its sum. The order matters: temperature, then top-k, then top-p on what remains.
#
# **Exercise 5.** `sharpen(logits, temperature, top_k, top_p)`: logits (V,) -> probabilities (V,). `top_k=0` and `top_p=1` switch off. With
# $p=(0.4,0.3,0.2,0.1)$: T = 1/2 squares them, $(16,9,4,1)/30$. Top-k 2 and top-p 0.5 both give $(4/7,3/7,0,0)$. Together, top-k 3 and top-p 0.42: the
# three are first scaled to $(4/9,3/9,2/9)$, and since $4/9>0.42$ one token is left; top-p first would leave two.
#
# *Hint:* sort; a token is kept if the tokens *before* it hold less than top_p.

# %%
def sharpen(logits, temperature=1.0, top_k=0, top_p=1.0):
    """Probabilities after temperature, top-k and top-p."""
    # SOLUTION (about 9 lines, 15 minutes)
    logits = logits / temperature
    if top_k:
        least = logits.topk(min(top_k, len(logits))).values[-1]
        logits = logits.masked_fill(logits < least, -torch.inf)
    p, place = logits.softmax(0).sort(descending=True)
    before = p.cumsum(0) - p
    p = torch.where(before < top_p, p, 0.0)
    p = torch.zeros_like(p).index_copy(0, place, p)
    return p / p.sum()
    # END


check.check_sharpen(sharpen)

# %% [markdown]
# What does it do to pictures? A small classifier, trained on the real digits, looks at 500 samples: is the digit that was asked for seen (accuracy),
# do the samples of a class differ as much as real ones do (diversity, real = 1), and how far is the whole set from real digits (gFD, a distance;
# small is good)? Nats are the model's own, at T = 1.

# %%
judge = nano_ar.train_judge(data.train_images, data.train_labels, 10, torch.device("cpu"), 0, epochs=steps(4, few=1))
N = steps(500, few=40)
asked, real = data.test_labels[:N], data.test_images[:N]
print(f"{'500 samples':17}{'nats':>7}{'different':>11}{'accuracy':>10}{'diversity':>11}{'gFD':>7}")
for name, how in (("the model's law", {}), ("T = 0.8", {"temperature": 0.8}), ("T = 0.5", {"temperature": 0.5}),
                  ("top-k 8", {"top_k": 8}), ("top-p 0.9", {"top_p": 0.9}), ("T = 0", {"temperature": 0})):
    with put(kernels, "sample", functools.partial(kernels.sample, top_k=how.pop("top_k", 0))):
        tokens = nano_ar.generate(model, asked, torch.Generator().manual_seed(0), **how)
    seen, own = nano_ar.image_metrics(judge, data.decode(tokens), asked, real), nano_ar.nats_per_image(model, tokens, asked)
    print(f"{name:17}{own:7.1f}{len(tokens.unique(dim=0)):11}{seen['class_accuracy']:10.3f}{seen['diversity']:11.2f}{seen['gfd']:7.1f}")
alone = nano_ar.image_metrics(judge, data.decode(data.train_tokens[:N]), data.train_labels[:N], real)
each = [nano_ar.nats_per_image(model, x[None], c[None]) for x, c in zip(data.test_tokens[:N], asked)]
print(f"{'real, as tokens':17}{sum(each) / N:7.1f}{'':11}{alone['class_accuracy']:10.3f}{alone['diversity']:11.2f}{alone['gfd']:7.1f}")
print(f"the most probable of these {N} real pictures has {min(each):.1f} nats")

# %% [markdown]
# All but T = 0 make digits that are recognised more often. But the distance does not follow: top-k 8 leaves it where it was; T = 0.8 and
# top-p 0.9, which take more of the nats away, raise it by more than a half, and variety goes. "Better looking" and "nearer to the data" are two
# things. (One small model, 500 samples; lesson 21 chooses with more care.)
#
# At T = 0 there are ten pictures, one a class, and on average they are more probable than the most probable of 500 real ones (17.7 nats, 20.8). That is not
# typical: throw a coin that shows heads six times in ten, and the most probable sequence of 64 throws is 64 heads, which you will never see. **Real pictures
# are not the most probable ones.**
#
# And is the picture at T = 0 at least the most probable one? Two tokens suffice to see:

# %%
first, then = torch.tensor([0.6, 0.4]), torch.tensor([[0.5, 0.5], [1.0, 0.0]])
joint = first[:, None] * then
print("p of the sequences 00 01 10 11:", [round(p, 2) for p in joint.flatten().tolist()], " sum", round(joint.sum().item(), 6))

# %% [markdown]
# The most probable first token is 0, and the most probable sequence begins with 1. So the second answer is: not in general. To find the best sequence
# one must look ahead (beam search); after the table above you may not want it.
#
# ## In the script's place
#
# **Exercise 6.** `loss_of(model, tokens, labels)`: `model(tokens, labels)` gives logits (B, L, V), where place t *has read the tokens before t*, and
# not t itself. Return the mean of $-\log p(\text{token})$ over all B L tokens: one number. Write softmax and cross-entropy out yourself
# (`logsumexp` is allowed).
#
# Worked: logits (0, log 3) and token 1: $p=3/4$, loss 0.288.

# %%
def loss_of(model, tokens, labels):
    """-log p(token | class, tokens before it), in nats, averaged over the tokens."""
    # SOLUTION (about 4 lines, 8 minutes)
    logits = model(tokens, labels).float()
    log_p = logits - logits.logsumexp(-1, keepdim=True)
    picked = log_p.gather(-1, tokens[..., None])  # (B, L, 1): no shift, the model has done it
    return -picked.mean()
    # END


check.check_loss_of(loss_of)

# %% [markdown]
# With your loss, 100 steps lead the same network well below every table above:

# %%
config.steps = steps(100)
with put(nano_ar, "loss_of", loss_of):
    torch.manual_seed(0)
    yours = nano_ar.GPT(V, 10, 8, 8, config.dim, config.depth, config.dim // 32)
    band("nats per new picture with your loss", nano_ar.train(config, yours, data)[-1]["test"], 48, 66)

# %% [markdown]
# ## What did not work: comparing models of different tokens
#
# Fewer kinds of token make lower nats at once, with the same simple table (dB: how near the pictures are, more is better; lesson 13):

# %%
for size in (16, 64, 256):
    codes = nano_ar.fit_codebook(data.train_images, size, torch.Generator().manual_seed(0))
    tokens, new = nano_ar.encode(data.train_images, codes), nano_ar.encode(data.test_images, codes)
    first = nano_ar.SimpleNamespace(classes=10, codebook_size=size, train_tokens=tokens, train_labels=data.train_labels)
    first.test_tokens, first.test_labels = new, data.test_labels
    kept = nano_ar.psnr(nano_ar.decode(new, codes), data.test_images)
    print(f"{size:4} kinds: {nano_ar.unigram_nats(first):6.1f} nats (each cell and class counted), the tokens keep {kept:.1f} dB of the picture")

# %% [markdown]
# The model of 16 kinds is not better; its tokens say less. Nats compare models of *the same tokens*. Across tokenizers only the pictures can be
# compared, or the bits that restore every pixel (lesson 23).
#
# ## The map
#
# What is a token, and in which order are they drawn? The survey *Autoregressive Models in Vision* (Xiong et al. 2024, arXiv:2411.05902) sorts the
# field by this. The chain rule allows every answer; also groups of tokens at once, if the tokens of a group are independent given the past. The
# colour says when a place is drawn, dark first.

# %%
pixels, tokens = torch.arange(32 * 32).view(32, 32), torch.arange(64).view(8, 8)
panels = {"pixels: 1024 calls": pixels, "tokens: 64 calls": tokens, "diagonals: 15 calls": tokens // 8 + tokens % 8}
panels |= {f"scale {k + 1} of 4, 1 call": torch.full((side, side), k) for k, side in enumerate((1, 2, 4, 8))}
figure, axes = plt.subplots(1, 7, figsize=(11, 2), layout="constrained")
for axis, (title, when) in zip(axes, panels.items()):
    axis.pcolormesh(when, vmin=0, vmax=max(3, when.max()), edgecolors="w", linewidth=0.5 * (len(when) < 9))
    axis.set_title(title, fontsize=8)
    axis.set(aspect="equal", xticks=[], yticks=[], ylim=(len(when), 0))
plt.show()

# %% [markdown]
# * **Pixels.** PixelRNN and PixelCNN (arXiv:1601.06759), Image GPT. Exact for the picture itself, 1,024 calls here. Lesson 23.
# * **Tokens.** A tokenizer first, then a language model: VQGAN (arXiv:2012.09841), LlamaGen (arXiv:2406.06525). `nano_tok.py`, `nano_ar.py`; lessons
#   10 to 22. Which order, and how many tokens a call, is lesson 20.
# * **Scales.** The whole picture, coarse first; one call a scale: VAR (arXiv:2404.02905). `nano_var.py`, lessons 30 to 33.
# * **Faster without changing the law.** Draft several tokens, check them in one call: `nano_spec.py`, lessons 40 to 43.
# * **Numbers instead of tokens.** A time series is predicted from its own past, and the word autoregressive comes from there: `nano_ts.py`,
#   lessons 50 to 53.
# * **The machine room.** Attention and sampling on a GPU: `kernels.py`, lessons 60 and 61; several devices, lesson 70.
#
# **Read on.** Shannon, *A Mathematical Theory of Communication* (1948), sections 2 and 3: n-grams by hand. Bengio et al., *A Neural Probabilistic
# Language Model* (2003): a network instead of the table, and why. Then `nano_ar.py`, from the top.
