# %% [markdown]
# # 11 Codebooks
#
# **Guess first, and write your three answers down.**
#
# 1. A tokenizer may choose among 256 codes for each of 64 cells of a picture. Its codes are trained by gradient, as all other weights are. How many
#    of the 256 does it use in the end?
# 2. Two tokenizers with 256 codes each, and all codes occur. One spreads the cells over them so evenly that it uses 95 effectively, the other has
#    favourites and uses 46. Which one gives better pictures?
# 3. You have a network whose latents are real numbers, and it rebuilds pictures very well. You round the latents *afterwards*. How many bits for each
#    number until the loss is hard to see?
#
# A **codebook** is a table of V vectors; a token says which row. The network before it makes vectors $z$, the table is what they are rounded to. In
# `nano_tok` a quantizer is a small module behind one interface, the dict `QUANTIZERS`. Here you plug in fourteen, some of them ill.

# %%
import sys
sys.path[:0] = ["..", "../.."]  # the repository, seen from lessons/ and from lessons/solutions/
import contextlib, io, math, matplotlib.pyplot as plt, torch, torch.nn as nn, torch.nn.functional as F, kernels, nano_ar, nano_tok
from types import SimpleNamespace; from unittest.mock import patch
from lessons.checks import band, lesson_11 as check, put, steps

# %% [markdown]
# ## The clinic
#
# 3,000 glyphs, 1,000 more to test on, a network of 32 channels, 200 steps of 32 pictures: enough to get ill and to recover. `fit` puts a quantizer into the
# script and trains it there. Three figures, all on the test images: **PSNR**, $10\log_{10}(255^2/\text{mean squared error})$ in dB, 3 dB more for half the
# error; **usage**, the share of codes that occur at all; **perplexity** (of the codes here, not of a model as in lesson 00), $e^{\text{entropy}}$: how many are
# in *effective* use, k where k are equally frequent.

# %%
N = steps(3000, few=300)
images, labels = nano_tok.glyphs(N + steps(1000, few=60), 0)
data = SimpleNamespace(train_images=images[:N], train_labels=labels[:N], test_images=images[N:], test_labels=labels[N:])
mine, fitted, quality = SimpleNamespace(textbook=None, renew=None, entropies=None, levels=None, perturb=None), {}, {}

def fit(name, quantizer):
    """Train the script's network around a quantizer, print its health, remember it."""
    _, config, _ = nano_tok.read_settings(["train", "--width", "32", "--batch", "32", "--steps", str(steps(200)), "--precision", "fp32"])
    config.quantizer = name
    with patch.dict(nano_tok.QUANTIZERS, {name: lambda config: quantizer}), contextlib.redirect_stdout(io.StringIO()):
        model = nano_tok.build(config)  # seed 0: all have the same first weights
        m = nano_tok.train(config, model, data)[-1]
    print(f"{name:34} {m['rpsnr']:6.2f} dB   usage {m['usage']:4.0%}   perplexity {m['perplexity']:5.1f} of {quantizer.size}")
    fitted[name], quality[name] = model, m["rpsnr"]
    return model

# %% [markdown]
# ## The textbook, and how it collapses
#
# Vector quantization (van den Oord et al., arXiv:1711.00937, eq. 3), with $e$ the code nearest to $z$ and sg, "stop gradient":
#
# $$\text{loss}=\underbrace{\lVert \mathrm{sg}[z]-e\rVert^2}_{\text{codes go to their vectors}}+\beta\,\underbrace{\lVert z-\mathrm{sg}[e]\rVert^2}_{\text{vectors stay near their codes}}$$
#
# The decoder gets $e$. Its gradient goes *straight through* to $z$, as if $z$ had been given; none of it goes to the codes.
#
# **Exercise 1.** `textbook(z, codes, beta)`: z (N, C), codes (V, C) -> `q` (N, C), the chosen codes with the gradient of z; `index` (N,); the loss,
# both squares averaged over all N C numbers. Worked: codes 0 and 1, z = .9, $\beta=1$: q = 1, index 1, loss .01 + .01 = .02. A decoder whose gradient
# at q is 5 gives z the gradient 5 + 2 (.9 - 1) = 4.8, and code 1 only 2 (1 - .9) = .2; code 0 gets nothing. *Hint:* `kernels.nearest_code(z, codes)`;
# `.detach()` is sg.

# %%
def textbook(z, codes, beta):
    """Vector quantization by gradient alone."""
    # SOLUTION (about 4 lines, 12 minutes)
    index = kernels.nearest_code(z, codes)
    e = codes[index]
    loss = F.mse_loss(e, z.detach()) + beta * F.mse_loss(z, e.detach())
    return z + (e - z).detach(), index, loss
    # END


check.check_textbook(textbook)

# %%
class Learned(nano_tok.VectorQuantizer):
    """Codes that the optimizer moves. cosine: vectors and codes of length 1, so that only the direction counts."""

    def __init__(self, start, cosine=False):
        super().__init__(256, 8)
        self.cosine, self.codes = cosine, nn.Parameter(start[None])

    def forward(self, z, rng=None):
        points, codes = z.flatten(0, 1), self.codes[0]
        if self.cosine:
            points, codes = F.normalize(points, dim=1), F.normalize(codes, dim=1)
        q, index, loss = mine.textbook(points, codes, 1.0)
        return q.view_as(z), index.view(*z.shape[:2], 1), loss

    def lookup(self, index):
        return (F.normalize(self.codes[0], dim=1) if self.cosine else self.codes[0])[index[..., 0]]

# %%
torch.manual_seed(0)
small, wide = (torch.rand(256, 8) * 2 - 1) / 256, torch.randn(256, 8)  # z has mean 0 and variance 1, as `wide`
with put(mine, "textbook", textbook):
    fit("by gradient, small start", Learned(small))
    fit("by gradient, wide start", Learned(wide.clone()))
    fit("by gradient, cosine", Learned(wide.clone(), cosine=True))

# %% [markdown]
# From the customary small start: 19 % of the codes, and effectively 15 of 256. An alphabet of 8 bits that says 4. The reason is in exercise 1: *code
# 0 gets nothing*. A code that is nobody's nearest has no gradient. It stays where it is, while the vectors move on with the network. Codes that start
# spread like the vectors help a little, 32 %, and two thirds die all the same.
#
# Vectors of length 1 (LlamaGen's choice) are a real help: on a sphere nobody is far away. 76 % are used, and the pictures gain .9 dB, although the
# length, one number of eight, is lost. (A trap: without `F.normalize` in `lookup` it trains as well, and then decodes with other codes.)
#
# ## Means in place of gradients, and a second birth
#
# Codes need no gradient. The best place of a code is the mean of its vectors, so let it *be* this mean, with old vectors forgotten
# (van den Oord et al., appendix A.1): with n vectors in the batch choosing a code, s their sum, g = .95,
#
# $$\text{count}\leftarrow g\,\text{count}+(1-g)\,n,\qquad \text{total}\leftarrow g\,\text{total}+(1-g)\,s,\qquad \text{code}=\text{total}/\text{count}.$$
#
# Nobody's code still stays put: 0 vectors move no mean. So the dead are born again, on a vector that is badly served now.
#
# **Exercise 2.** `renew(codes, count, total, points, index, decay, dead)` -> new codes, count, total; points (N, C), and `index` says what each has
# chosen. After the means are moved: with fair = N / V, a code whose new count is below `dead * fair` is dead. The dead, lowest number first, get the
# points with the largest squared distance to their (old) code, largest first; count becomes fair, total becomes fair times the point.
#
# Worked: codes 0 and 9, counts 1 and .05, totals 0 and .45, points 1 and 3, both at code 0, g = .5, dead = .1. Counts 1.5 and .025; fair = 1, so code
# 9 is dead. Code 0 becomes (0 + 2) / 1.5 = 1.33, and code 9 becomes the worst served point, 3.
#
# *Hint:* `torch.bincount(.., minlength=V)`, `index_add_`, `topk`. Leave the given tensors as they are.

# %%
def renew(codes, count, total, points, index, decay, dead):
    """Running means, and a new life for codes that nobody chooses."""
    # SOLUTION (about 9 lines, 20 minutes)
    number = torch.bincount(index, minlength=len(codes)).float()
    sums = torch.zeros_like(codes).index_add_(0, index, points)
    count = decay * count + (1 - decay) * number
    total = decay * total + (1 - decay) * sums
    fair = len(points) / len(codes)
    lost = (count < dead * fair).nonzero()[:, 0]
    error = (points - codes[index]).square().sum(1)
    fresh = points[error.topk(len(lost)).indices]
    count[lost], total[lost] = fair, fair * fresh
    return total / count[:, None], count, total
    # END


check.check_renew(renew)

# %%
class Renewed(nano_tok.VectorQuantizer):
    def update(self, points, index, sums, rng):
        state = mine.renew(self.codes[0], self.count[0], self.total[0], points, index[:, 0], self.decay, self.restart)
        self.codes[0], self.count[0], self.total[0] = state

fit("means, the dead stay dead", nano_tok.VectorQuantizer(256, 8, restart=0.0))
fit("means, dead to drawn places", nano_tok.VectorQuantizer(256, 8))  # this is --quantizer vq of the script
with put(mine, "renew", renew):
    fit("means, dead to the worst served", Renewed(256, 8))

# %%
figure, axes = plt.subplots(1, 3, figsize=(10, 2.7), layout="constrained")
for name, axis in zip(("by gradient, small start", "means, dead to drawn places"), axes):
    if name in fitted:
        z, codes = fitted[name].latents(data.test_images[:100] / 255).detach().flatten(0, 1), fitted[name].quantizer.codes[0].detach()
        axis.plot(z[:, 0], z[:, 1], ".", ms=1, color="silver")
        axis.plot(codes[:, 0], codes[:, 1], "r.", ms=4)
        axis.set(title=name, xlabel="number 1", ylabel="number 2")
with put(mine, "textbook", textbook):  # the codebooks trained by gradient call it
    for name, model in fitted.items():
        counts = torch.bincount(nano_tok.encode(data.test_images, model).flatten(), minlength=256).sort(descending=True).values
        axes[2].semilogy(counts / counts.sum(), label=name)
axes[2].set(title="share of each code, frequent first", ylim=(1e-5, 1))
axes[2].legend(fontsize=6)
plt.show()

# %% [markdown]
# Left: grey vectors, red codes. A mean alone does not cure: 27 %. With a second birth every code is used, and the pictures gain .7 dB.
#
# Now look at the last two lines of the table. Born on the worst served vector, always, or drawn in proportion to the error (the script's `draw_badly_coded`):
# usage 100 % in both, PSNR the same, but perplexity 45.9 against 115.7. We think that the worst served are *outliers*: a code for each keeps it from dying, and
# hardly anyone else ever comes. "100 % of the codes in use" is a sentence that hides much.
#
# ## No codebook: signs, and the pull of an entropy
#
# If codes die, have none. FSQ rounds each number to a few levels (`nano_tok.FSQ`); lookup-free quantization (LFQ; Yu et al., arXiv:2310.05737) is its
# extreme: the *sign* of each number is one bit, eight signs are the token, and the code is the corner $(\pm1,\dots,\pm1)$ of a cube. Corners cannot
# move or die, but they can be avoided. So LFQ adds two entropies. With a soft choice $p(c\mid z)\propto e^{-|z-c|^2/T}$, make
#
# $$\mathbb{E}_z\,H\big(p(\cdot\mid z)\big)\ \text{small: each vector decides}\qquad\text{and}\qquad H\big(\mathbb{E}_z\,p(\cdot\mid z)\big)\ \text{large: all corners are used.}$$
#
# **Exercise 3.** `entropies(z, codes, temperature)`: z (N, C), codes (V, C) -> both, in nats. Worked: codes -1 and 1, z = -9 and 9, T = 1: each
# decides, 0; the mean law is (½, ½), $\log 2=.693$. Both vectors at 0: .693 and .693. *Trap:* a probability may be exactly 0. Then $0\log0$
# must be 0, and its *gradient* finite: `log_softmax` for the first, `clamp` inside the logarithm for the second.

# %%
def entropies(z, codes, temperature):
    """How undecided the vectors are, each for itself, and how evenly all of them together use the codes."""
    # SOLUTION (about 6 lines, 12 minutes)
    distance = (z[:, None] - codes).square().sum(-1)  # (N, V)
    log_p = (-distance / temperature).log_softmax(1)
    p = log_p.exp()
    mean = p.mean(0)
    each = -(p * log_p).sum(1).mean()
    return each, -(mean * mean.clamp(min=1e-9).log()).sum()
    # END


check.check_entropies(entropies)

# %%
class LFQ(nn.Module):
    """The signs of `bits` numbers are the token; weight: of the entropies."""

    def __init__(self, bits, weight):
        super().__init__()
        self.size, self.dim, self.depth, self.weight = 2**bits, bits, 1, weight
        self.codes = nn.Buffer((torch.arange(2**bits)[:, None] >> torch.arange(bits) & 1) * 2.0 - 1)

    def forward(self, z, rng=None):
        index = ((z > 0) << torch.arange(self.dim)).sum(-1, keepdim=True)
        q, loss = self.lookup(index), 0.25 * F.mse_loss(z, self.lookup(index))
        if self.training and self.weight:
            each, together = mine.entropies(z.flatten(0, 1)[::8], self.codes, 1.0)  # 256 of the 2,048 vectors will do
            loss = loss + self.weight * (each - together)
        return nano_tok.straight_through(z, q), index, loss

    def lookup(self, index):
        return self.codes[index[..., 0]]

fit("FSQ, levels 8, 6, 5", nano_tok.FSQ([8, 6, 5]))
fit("LFQ, no entropies", LFQ(8, 0.0))
with put(mine, "entropies", entropies):
    fit("LFQ, entropies", LFQ(8, 0.1))
black = (F.max_pool2d(data.test_images[:, None].float(), 4) == 0).float().mean()
print(f"cells of 4 x 4 pixels that are black and nothing else: {black:.0%}")

# %% [markdown]
# The entropies do what they promise: usage from 91 to 100 %, perplexity from 35.9 to 95.0. **And the pictures get worse**, 21.26 instead of 21.60 dB. FSQ has
# no second loss at all and 240 codes, uses 64 effectively, and is as good as the codebooks with a second birth: 23.13 dB. That tokens are evenly used is no end
# in itself: two thirds of the cells are black, and many words for black gain nothing. LFQ was made for alphabets of $2^{18}$ codes. There the entropies may
# pay; here they do not.
#
# Why is FSQ better than signs? Three numbers in 8, 6, 5 steps can say "a little more"; eight signs cannot.
#
# ## Several small codebooks
#
# One large table has a price: 16 bits a cell would be 65,536 vectors to find, to feed and to keep alive. Residual quantization (`rvq`) uses D small
# tables, each for what those before left over: two tables of 256 say 16 bits with 512 vectors, two tables of 16 say the same 8 bits as above with 32.
# The price is a longer sequence, D tokens for a cell.

# %%
fit("two codebooks of 16", nano_tok.VectorQuantizer(16, 8, depth=2))
fit("two codebooks of 256", nano_tok.VectorQuantizer(256, 8, depth=2));

# %% [markdown]
# (For several codebooks the figures are of the least used one.) At equal rate, 8 bits, two tables of 16 give 22.47 dB and one of 256 gives 23.17: the
# second table has to serve what is left over from all sixteen codes of the first, as if it looked alike everywhere. In return they hold 32
# vectors instead of 256. And at 16 bits, where one table would have 65,536 vectors, two of 256 give 23.98.
#
# ## Rounding after training
#
# Why train through a rounding at all? TokenBridge (Wang et al., arXiv:2503.16430) trains a network on real numbers, and rounds *afterwards*, every
# number for itself. The numbers look like a Gaussian, so cut it into $n=2^b$ cells of equal probability, and let each cell stand for its mean:
#
# $$\text{edges: } \Phi^{-1}(i/n),\qquad \mathbb{E}[x\mid a<x<b]=n\,\big(\varphi(a)-\varphi(b)\big),\qquad \varphi(x)=e^{-x^2/2}/\sqrt{2\pi}.$$
#
# **Exercise 4.** `levels(bits)` -> the $n-1$ inner edges and the $n$ values, both rising. Worked: one bit has the edge 0 and the values
# $\mp\sqrt{2/\pi}=\mp.798$: with edges $-\infty,0,\infty$, $2\,(0-.399)$ and $2\,(.399-0)$. *Hint:* `torch.distributions.Normal(0.0, 1.0)` has `icdf`
# and `log_prob`, and they know infinity.

# %%
def levels(bits):
    """Cells of equal mass under the Gaussian, and the mean of each."""
    # SOLUTION (about 4 lines, 12 minutes)
    n, normal = 2**bits, torch.distributions.Normal(0.0, 1.0)
    edges = normal.icdf(torch.arange(n + 1) / n)  # from -inf to inf
    density = normal.log_prob(edges).exp()
    return edges[1:-1], n * (density[:-1] - density[1:])
    # END


check.check_levels(levels)

# %%
class Bridge(nn.Module):
    """Real numbers in training, with a little noise; each rounded afterwards: C tokens of `bits` bits for a cell."""

    def __init__(self, bits, noise=0.0):
        super().__init__()
        self.size, self.dim, self.depth, self.noise = 2**bits, 8, 8, noise
        self.edges, self.values = mine.levels(bits)

    def forward(self, z, rng=None):
        if self.training:
            return z + self.noise * torch.randn(z.shape, generator=rng), z.new_zeros(*z.shape, dtype=torch.long), z.new_zeros(())
        index = torch.bucketize(z, self.edges)
        return self.values[index], index, z.new_zeros(())

    def lookup(self, index):
        return self.values[index]

curves = {}
with put(mine, "levels", levels):
    for noise in (0.0, 0.3):
        model = fit(f"rounded afterwards, noise {noise}", Bridge(8, noise))
        for bits in range(1, 8):
            model.quantizer = Bridge(bits).eval()
            curves[noise, 8 * bits] = nano_tok.health(model, data.test_images)["rpsnr"]

# %%
figure, axis = plt.subplots(figsize=(7, 3), layout="constrained")
for noise in (0.0, 0.3)[:len(curves)]:
    rates = [bits for at, bits in curves if at == noise]
    axis.semilogx(rates, [curves[noise, bits] for bits in rates], ".-", base=2, label=f"rounded afterwards, noise {noise}")
    print(f"noise {noise}:", ", ".join(f"{bits} bits {curves[noise, bits]:.1f}" for bits in rates))
for marker, (name, value) in zip("osDv^<>phP*X", quality.items()):
    if "afterwards" not in name:
        bits = fitted[name].quantizer.depth * math.log2(fitted[name].quantizer.size)
        axis.plot(bits, value, marker, label=name)
axis.set(xlabel="bits for a cell", ylabel="PSNR, dB", xticks=[4, 8, 16, 32, 56], xticklabels=[4, 8, 16, 32, 56])
axis.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %% [markdown]
# In 256 steps a number the network reaches 25.46 dB, more than any codebook here. Rounded to *signs*, 8 bits for a cell, it is at 13.6. LFQ rounds to
# the same signs and reaches 21.60: eight dB because the network was told in training. To equal the codebook of 8 bits, rounding afterwards takes 5
# bits a number, **40 bits for a cell**; at 6 bits, the authors' choice, it is still 1.0 dB below its own best.
#
# A little noise in training (their network is a VAE, whose latents are noisy) makes neighbours of $z$ mean similar pictures. It gains up to 1 dB at few bits
# and costs up to .9 dB at many. Not a cure for our small network, then. The point of the idea is another one: nothing collapses, and no rounding disturbs the
# training. You pay in tokens, eight for a cell instead of one, and a generator has to predict them all.
#
# ## A decoder that forgives
#
# Tokens are made to be *generated*, and a generator errs. How well a tokenizer gives pictures back from perfect tokens (PSNR; rFD, their Fréchet distance to
# real ones, lesson 13) does not tell how it takes wrong ones. RobustTok (Qiu et al., arXiv:2503.08354) proposes a measure and a cure. **pFD**: swap tokens for
# *near* codes, decode, and take the Fréchet distance to real images. The cure: swap in training, too, so that the decoder has seen near misses.
#
# **Exercise 5.** `perturb(index, codes, rank)`: index and rank are integers of one shape; rank 0 leaves a token as it is, rank k makes it the k-th
# nearest *other* code. Worked: codes 0, 1, 3, 7; of code 1 the nearest others are 0, 3, 7: rank 2 gives index 2. *Trap:* two codes may be equal; rank
# 0 is the token itself all the same.

# %%
def perturb(index, codes, rank):
    """Each token becomes its rank-th neighbour."""
    # SOLUTION (about 3 lines, 8 minutes)
    distance = torch.cdist(codes, codes)
    distance.fill_diagonal_(-1)  # itself first, whatever the rounding of a distance 0
    return distance.argsort(1)[index, rank]
    # END


check.check_perturb(perturb)

# %%
def ranks(shape, images, swap, rng):
    """In a share of `images`, each token is swapped with probability `swap`, for one of its 25 nearest."""
    chosen = (torch.rand(shape[0], 1, generator=rng) < images) & (torch.rand(shape, generator=rng) < swap)
    return chosen * torch.randint(1, 26, shape, generator=rng)

class Robust(nano_tok.VectorQuantizer):
    def forward(self, z, rng=None):
        q, index, loss = super().forward(z, rng)
        if self.training:  # the loss still speaks of the true codes: only the decoder sees the others
            wrong = mine.perturb(index[..., 0], self.codes[0], ranks(z.shape[:2], 0.5, 0.5, rng))
            q = nano_tok.straight_through(z, self.codes[0][wrong])
        return q, index, loss

judge = nano_ar.train_judge(data.train_images, data.train_labels, 10, "cpu", seed=0)

def look(pictures):
    return nano_ar.look(judge, pictures)[0]

print(f"floor: FD of as many training images {nano_ar.frechet_distance(look(images[:len(data.test_images)]), look(data.test_images)):.2f}")

# %%
def disturbed(model, swap):
    """Test images back from tokens of which a share `swap` is wrong -> images, Fréchet distance."""
    tokens = nano_tok.encode(data.test_images, model)
    rank = ranks(tokens.shape, 1.0, swap, torch.Generator().manual_seed(0))
    back = nano_tok.decode(mine.perturb(tokens, model.quantizer.codes[0], rank), model)
    return back, nano_ar.frechet_distance(look(back), look(data.test_images))

rows = [data.test_images[:12]]
with put(mine, "perturb", perturb):
    for name, model in (("plain", fitted["means, dead to drawn places"]), ("robust", fit("means, robust", Robust(256, 8)))):
        figures = []
        for swap in (0.0, 0.25, 0.5):
            back, distance = disturbed(model, swap)
            figures.append(nano_tok.psnr(back, data.test_images))
            rows.append(back[:12])
            print(f"{name:7} {swap:4.0%} of the tokens wrong: FD {distance:5.2f}, {figures[-1]:.2f} dB")
    band("robust: dB lost to half of the tokens", figures[0] - figures[2], 1.6, 2.4)  # the plain one loses more

# %%
plt.figure(figsize=(7, 4.2))
plt.imshow(torch.cat([torch.cat(list(row), 1) for row in rows]), cmap="gray")
plt.yticks([16 + 32 * i for i in range(len(rows))], ["original", "plain, 0", ".25", ".5", "robust, 0", ".25", ".5"][:len(rows)])
plt.xticks([])
plt.show()

# %% [markdown]
# ## Answers, and what did not work
#
# 1. A fifth, and 15 of 256 effectively. Means and a second birth bring all 256 into use; simpler still is to have nothing that can die (FSQ).
# 2. The one with 46 effective codes: 23.13 dB against 21.26. They are of two kinds, but within one it is no different: dead codes to drawn or to worst served
#    places, 115.7 and 45.9 in use, and the same PSNR; LFQ with entropies or without, 95.0 and 35.9, and the more even one is worse. Perplexity tells you that a
#    codebook is *sick* (15 of 256); of two healthy ones it does not choose the better.
# 3. Five equal a trained codebook, which needs a fifth of the bits for it; seven come within .3 dB of the network's own best.
#
# The decoder that forgives does forgive: with half of the tokens wrong it loses 2.05 dB where the plain one loses 2.64, and gives away .06 dB when they are
# right. FD is lower in all three lines, but of one seed: repeat it before you believe it. The authors' claim, that pFD foretells the quality of generated
# pictures better than rFD, is not tested here: we swapped tokens ourselves, and generated none.
#
# To try: `Robust` on FSQ, whose neighbours need no table of distances; `nano_ar.train` on `nano_tok.export(model, data)` of the plain and of the
# robust tokenizer: which one draws better? Read on: SimVQ (arXiv:2411.02038), which moves all codes at once through one matrix, so that none is left
# behind; lucidrains' vector-quantize-pytorch (number 205 of its tracker: how many codes die with and without restart).
