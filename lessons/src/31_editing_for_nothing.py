# %% [markdown]
# # 31 Editing for nothing
#
# A next-scale model (`nano_var`; its first docstring says how it works) is trained to draw whole pictures. At sampling time we may put our own tokens in place of some that it has drawn. That one
# line gives in-painting, out-painting, super-resolution and a change of class, without a step of training. It also gives results that are
# better than they should be, because tokens know more than they seem to.
#
# **Guess first, and write your numbers down.**
#
# 1. The lower half of a digit is hidden. A judge that sees the upper half alone names four digits in ten. We keep the tokens of
#    the upper half, and let the model complete the picture *without telling it the class*. How many digits will the judge name now? And
#    how many, if we also keep the 21 tokens of the maps 1x1, 2x2 and 4x4 of the whole picture?
# 2. A digit is shrunk to 8 x 8 pixels. Bicubic interpolation enlarges it; or our model draws the last map. Which of the two comes closer
#    to the original, in PSNR?

# %%
import sys, torch, torch.nn.functional as F, matplotlib.pyplot as plt
sys.path[:0] = ["..", "../.."]  # the repository, seen from lessons/ and from lessons/solutions/
import nano_var
from lessons.checks import band, lesson_31 as check, put, steps
torch.manual_seed(0)

# %% [markdown]
# A small tokenizer and a small transformer, trained by the script's own functions: about a minute on one core. Then a judge, which reads digits.

# %%
flags = f"--codebook 256 --width 32 --dim 96 --depth 2 --tok-steps {steps(250)} --steps {steps(200)} --precision fp32"
config = nano_var.read_settings(flags.split())[1]
pictures, digits = nano_var.glyphs(steps(4500, 160), 0)
(test, images), (asked, labels) = (part.tensor_split([len(part) // 9]) for part in (pictures, digits))
data = nano_var.SimpleNamespace(train_images=images, train_labels=labels, test_images=test, test_labels=asked, classes=10)
tokenizer, model = nano_var.build(config, 10, torch.device("cpu"))
nano_var.train_tokenizer(config, tokenizer, data)
nano_var.add_tokens(data, tokenizer.eval().requires_grad_(False))
pyramid = tokenizer.pyramid

# %%
history = nano_var.train(config, model, pyramid, data)
judge = nano_var.train_judge(images, labels, 10, "cpu", 0, epochs=3)

# %% [markdown]
# 120 test pictures, with which all that follows is measured, and small tools. Guidance (lesson 21) pushes towards the class; at 1 it is off.

# %%
x, y = test[:120], asked[:120]
nobody = torch.full_like(y, model.null)  # the class "none"

def latents(pictures):
    return tokenizer.latents(pictures / 255)  # (B, C, 8, 8)

def fill(labels, change=None, guidance=1.5, seed=0):
    """Draw pictures for these labels, with a hook -> uint8 (B, 32, 32)."""
    rng, top_p = torch.Generator().manual_seed(seed), [1, 1, 1, config.last_top_p]
    return nano_var.decode(nano_var.generate(model, pyramid, labels, rng, guidance, 1.0, top_p, change), tokenizer)

def read(pictures, labels):
    """The share of pictures in which the judge reads these labels."""
    return (nano_var.look(judge, pictures)[1] == labels).double().mean().item()

def show(**rows):
    """Rows of ten pictures, named at the left."""
    figure, axes = plt.subplots(len(rows), 1, figsize=(6, 0.62 * len(rows)), layout="constrained")
    for axis, (name, row) in zip(axes, rows.items()):
        axis.imshow(torch.cat(list(row[:10]), 1), cmap="gray", vmin=0, vmax=255)
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(name.replace("_", " "), rotation=0, ha="right", va="center")
    plt.show()

print(f"the judge reads {read(x, y):.1%} of the originals, {read(nano_var.decode(data.test_tokens[:120], tokenizer), y):.1%} "
      f"after the tokenizer, {read(fill(y), y):.1%} of digits drawn freely")

# %% [markdown]
# ## What is known
#
# A picture has pixels, the model has cells: 1, 4, 16 and 64 of them in its four maps, which cover the picture four times. A cell of an $s\times s$ map
# stands for $32/s \times 32/s$ pixels. We may fix its token only if we know **all** of them. If one pixel of it is hidden, the token says
# something about that pixel, and must be drawn.
#
# Worked: the lower half is hidden. Known are 0 of 1 cells, 2 of 4, 8 of 16, 32 of 64. With a hole of 8 x 24 pixels in the middle they are
# 0 of 1, 0 of 4, 8 of 16, 52 of 64: the two coarsest maps are lost at once.
#
# **Exercise 1.** `known_cells(mask, side)`: mask (n, n) boolean, True where a pixel is known, `side` divides n -> boolean (side * side,), in
# reading order. *Hint:* a view with four axes.

# %%
def known_cells(mask, side):
    """Which cells of a side x side map have no hidden pixel."""
    # SOLUTION (about 3 lines, 8 minutes)
    step = len(mask) // side
    blocks = mask.reshape(side, step, side, step)
    return blocks.all(3).all(1).flatten()
    # END


check.check_known_cells(known_cells)

# %%
def region(rows, columns):
    mask = torch.ones(32, 32, dtype=torch.bool)
    mask[slice(*rows), slice(*columns)] = False
    return mask

hole, lower = region((12, 20), (4, 28)), region((16, 32), (0, 32))
for name, mask in (("hole", hole), ("lower half", lower)):
    counts = [check.cells_slowly(mask, s).sum().item() for s in nano_var.SCALES]
    print(f"{name} hidden: known are {counts} of [1, 4, 16, 64] cells")

# %% [markdown]
# Here and below, `check.cells_slowly` and the like are the slow twins with which your function is examined; so the notebook runs whether or not
# you have written yours.
#
# ## The hook
#
# `generate` draws map $k$, then asks `change(k, total, drawn)` for the tokens to take. `total` is the sum $\hat f_{k-1}$ of the maps so far. In a
# known cell we take the token that brings this sum closest to the latent $f$ of the given picture, coded anew:
#
# $$r_k=\begin{cases}\mathrm{nearest}_k\big(\mathrm{area}(f-\hat f_{k-1},\,s_k)\big)&\text{in known cells}\\ \text{as drawn}&\text{elsewhere}\end{cases}$$
#
# Why not simply copy the tokens that the tokenizer gives for the picture? A token says what is *left over* after the coarser maps. The picture's own
# 1 x 1 token is not the one that was drawn here, so something else is left over. Worked, with plain numbers: $f=10$; the picture's own coarse map says 8,
# so its fine token says 2. Here the drawn coarse map says 5. Copied, the sum is 7; coded anew, the fine token says 5, and the sum is 10.
#
# **Exercise 2.** `keep(f, known, pyramid)`: f (B, C, 8, 8), known a list of K boolean (s^2,) -> a function `change(k, total, drawn)`, where drawn and
# what it gives are (B, s^2). *Hint:* `pyramid.nearest(vectors, k)` and `nano_var.area`.

# %%
def keep(f, known, pyramid):
    """A hook that keeps f in the known cells."""
    # SOLUTION (about 5 lines, 12 minutes)
    def change(k, total, drawn):
        left = nano_var.area(f - total, pyramid.scales[k])  # (B, s^2, C)
        return torch.where(known[k], pyramid.nearest(left, k), drawn)

    return change
    # END


check.check_keep(keep)

# %% [markdown]
# All four edits are this one function. What differs is the mask, the label, and what $f$ was made from: the hidden pixels are black before the encoder
# sees them (`x * mask`), or they would leak. Two fillings of the hole (in-painting), and two completions of the upper half (out-painting):

# %%
def cells(mask):
    return [check.cells_slowly(mask, s) for s in nano_var.SCALES]

def honest(mask):
    return check.keep_slowly(latents(x * mask), cells(mask), pyramid)

grey = torch.full_like(x, 90)
filled, completed = fill(y, honest(hole)), fill(y, honest(lower))
show(given=torch.where(hole, x, grey), filled=filled, again=fill(y, honest(hole), seed=1), original=x)
show(given=torch.where(lower, x, grey), completed=completed, again=fill(y, honest(lower), seed=1), original=x)

# %% [markdown]
# And how much worse is copying? PSNR over the known pixels alone:

# %%
def psnr_in(a, b, mask):
    return nano_var.psnr(a[:, mask], b[:, mask])

own = nano_var.split_maps(nano_var.encode(x * hole, tokenizer))
copied = fill(y, lambda k, total, drawn: torch.where(cells(hole)[k], own[k], drawn))
print(f"known pixels: copied {psnr_in(copied, x, hole):.1f} dB, coded anew {psnr_in(filled, x, hole):.1f} dB; hidden: "
      f"{psnr_in(filled, x, ~hole):.1f} dB")

# %% [markdown]
# The hidden pixels are far from the original. That is no fault: there are many ways to go on, and PSNR asks for one of them. The known pixels
# are not exact either: they passed through the tokenizer. Who wants them exact pastes them over the result, and sees a seam.
#
# ## What leaks
#
# A demonstration that keeps tokens of the *whole* picture looks wonderful. Is it in-painting? Test it: change what is hidden. No kept token may notice.
#
# **Exercise 3.** `leaks(encode, images, mask, known)`: encode makes uint8 (N, 32, 32) into tokens (N, 85); mask (32, 32) True where known; known: a list of
# boolean (s^2,), one for each map -> a list of four numbers: of the tokens in known cells of map k, the share that changes when the hidden pixels
# of each picture are replaced by those of the picture before it (the first takes the last's). A map without known cells leaks 0.
# *Worked:* an encoder that sees its own cell alone leaks [0, 0, 0, 0] with the lower half hidden.

# %%
def leaks(encode, images, mask, known):
    """How much do kept tokens know about hidden pixels?"""
    # SOLUTION (about 7 lines, 12 minutes)
    other = torch.where(mask, images, images.roll(1, 0))
    moved = encode(images) != encode(other)  # (N, 85)
    shares = []
    for piece, where in zip(nano_var.split_maps(moved), known):
        kept = piece[:, where]
        shares.append(kept.double().mean().item() if kept.numel() else 0.0)
    return shares
    # END


check.check_leaks(leaks)

# %%
def whole(pictures):
    return nano_var.encode(pictures, tokenizer)

def blackened(pictures):
    return nano_var.encode(pictures * lower, tokenizer)

everywhere = [torch.ones_like(c) for c in cells(lower)]
for name, encode, known in (("all cells of each map", whole, everywhere), ("known cells alone", whole, cells(lower)),
                            ("known cells, hidden pixels black", blackened, cells(lower))):
    print(f"{name:33}", [f"{share:.0%}" for share in check.leaks_slowly(encode, x, lower, known)])

# %% [markdown]
# Three different leaks. **Coarse tokens summarise**: a cell that covers known and hidden pixels speaks of both, so most tokens of the coarse maps change.
# But of the tokens in **known cells** 65 to 77 % change as well, in two ways. The encoder's convolutions look over the border of a cell. And **residual
# maps overlap**: a fine token codes what the coarse ones have left over, and those were coded from the whole picture, enlarged smoothly across the border.
# Black pixels before the encoder close all three: the last line must be zeros, whatever the model.
#
# How much does a leak tell? We complete the upper half without a class, and let the judge name the digit. All coarse maps up to a size are kept
# whole, the finer ones only where they are known:

# %%
def leaky(mask, maps):
    """Keep the first `maps` maps of the whole picture, and known cells of the finer ones."""
    known = [c | (k < maps) for k, c in enumerate(cells(mask))]
    return check.keep_slowly(latents(x), known, pyramid)

print(f"upper half alone: {read(x * lower, y):.0%} read as the original's class")
print(f"honest completion, no class given: {read(fill(nobody, honest(lower), 1.0), y):.0%}")
stolen = [fill(nobody, leaky(lower, maps), 1.0) for maps in range(4)]
for maps, pictures in enumerate(stolen):
    print(f"{maps} maps of the whole picture kept: {read(pictures, y):.0%}, hidden pixels {psnr_in(pictures, x, ~lower):.1f} dB")

# %%
show(given=torch.where(lower, x, grey), honest=fill(nobody, honest(lower), 1.0), leaky=stolen[3], original=x)

# %% [markdown]
# Completed honestly, the digits are read no better than the given half: 42 % both times. The model cannot know what nobody told it; it invents a digit that
# fits. With the 21 coarse tokens of the whole picture kept, 72 % are read. That is no skill of the model. It was told.
#
# With 120 pictures the standard error of such a share is $\sqrt{0.5\cdot0.5/120}\approx 4.6$ points: neighbouring lines may not differ, the ends do.
#
# ## Where is the class?
#
# Another class in the same hand: keep the first maps of a picture, and draw the others with another label. How many maps may be kept before the old class
# comes through?

# %%
new, f = (y + 1) % 10, latents(x)

def first(maps):
    return [torch.full((s * s,), k < maps) for k, s in enumerate(nano_var.SCALES)]

changed = [fill(new, check.keep_slowly(f, first(maps), pyramid), guidance=3.0) for maps in range(4)]
for maps, pictures in enumerate(changed):
    print(f"{maps} maps kept: {read(pictures, new):.0%} read as the new class, {read(pictures, y):.0%} as the old one, "
          f"{nano_var.psnr(pictures, x):.1f} dB to the old picture")
show(original=x, two_maps_kept=changed[2], three_kept=changed[3])

# %% [markdown]
# The 1 x 1 and the 2 x 2 map can be kept for nothing: five points are noise. With 4 x 4 the new class loses 28 points, and the old digit comes through.
# Look at the second row: bright digits stay bright, faint ones faint. That is what five tokens hold. The tokenizer was told that its first maps alone should
# look like the picture; that they hold brightness and not the class follows from what averages over large cells can say.
#
# ## Super-resolution
#
# Eight pixels a side are enough for a 4 x 4 map. Enlarge them smoothly, encode, keep three maps, draw the last.

# %%
small = F.avg_pool2d(x[:, None].float(), 4)  # (120, 1, 8, 8)
low = F.interpolate(small, 32, mode="bicubic")[:, 0].clamp(0, 255).round().byte()
sharpen = check.keep_slowly(latents(low), first(3), pyramid)
tried = {"bicubic": low, "right class": fill(y, sharpen), "no class": fill(nobody, sharpen, 1.0), "wrong class": fill(new, sharpen)}
for name, pictures in tried.items():
    again = F.avg_pool2d(pictures[:, None].float(), 4)
    print(f"{name:11} {nano_var.psnr(pictures, x):.1f} dB, shrunk again {nano_var.psnr(again, small):.1f} dB; read as the original's "
          f"class {read(pictures, y):.0%}, as the wrong one {read(pictures, new):.0%}")
show(low=low, right_class=tried["right class"], wrong_class=tried["wrong class"], original=x)

# %% [markdown]
# Bicubic interpolation wins in PSNR: a blur is near to *all* sharp pictures that are possible, a sharp picture is near to one of them, and mostly not
# to yours. The judge reads more, 72 % against 53 %, only when the model was told the right class; without a class it reads *less* than in the blur. And the last line
# is the warning: with a wrong class the same pixels are sharpened towards the wrong digit in nearly half of the cases. What the model adds is not
# information about the picture; it comes from the training set and the label.
# It does not even keep the small picture: shrunk again, the blur has 27.6 dB, the drawing 19.3. The last map may change means as it likes.
#
# ## Keeping is not conditioning
#
# Look at the filled holes again. Some strokes do not meet. When the first map is drawn, the model has seen nothing of the picture: no coarse cell was known.
# It chooses *some* digit of the class, and the kept tokens come later and contradict. What we want is
#
# $$p(\text{free}\mid\text{kept})\ \propto\ \prod_{t\ \text{free}}p(r_t\mid\text{coarser})\ \prod_{t\ \text{kept}}p(r_t\mid\text{coarser}),$$
#
# and what we draw from is the first product alone. The second is the missing weight. So: draw M fillings, and choose one with probability
#
# $$w_i=\frac{e^{-c_i}}{\sum_j e^{-c_j}},\qquad c_i=\sum_{t\ \text{kept}}-\log p(r_t\mid\text{coarser}),$$
#
# self-normalised importance sampling. It is exact as M grows, if the free tokens are drawn from the model itself. With guidance and the
# cut last map, as here, it is a reasonable score and no more.
#
# Worked: costs 400 and 400 + log 3 give weights 3/4 and 1/4.
#
# **Exercise 4.** `weights(cost, kept)`: cost (M, B, L) in nats, of M fillings for each of B pictures, kept (L,) boolean -> weights (M, B).
# *Hint:* what is $e^{-400}$ in float32?

# %%
def weights(cost, kept):
    """How probable is each of the M fillings, given the kept tokens?"""
    # SOLUTION (about 2 lines, 8 minutes)
    total = cost[..., kept].sum(-1)  # (M, B)
    return (-total).softmax(0)
    # END


check.check_weights(weights)

# %% [markdown]
# ## In the script's place
#
# Your weights in a `generate` that draws eight fillings where the script draws one. It takes the likeliest; with weights as uneven as these, drawing by them would hardly differ.

# %%
once, kept, M = nano_var.generate, torch.cat(cells(hole)), steps(8)

def eight(model, pyramid, labels, rng, guidance, temperature, top_p, change):
    """`generate`, with the most probable of M fillings for each label."""
    many = labels.repeat(M)
    tokens = once(model, pyramid, many, rng, guidance, temperature, top_p, change)
    with torch.no_grad():
        cost = nano_var.nats(model, pyramid, tokens, many).view(M, len(labels), -1)
    w = weights(cost, kept)
    best, total = w.argmax(0), cost[..., kept].sum(-1)
    print(f"kept tokens: {total[0].mean():.0f} nats in the first filling, {total.amin(0).mean():.0f} in the best, "
          f"{total.amax(0).mean():.0f} in the worst; by their weights {1 / w.square().sum(0).mean():.2f} of {M} fillings count")
    return tokens.view(M, len(labels), -1)[best, torch.arange(len(labels))]

print(f"one filling: {read(filled, y):.1%} read as the class asked for")
with put(nano_var, "generate", eight):
    change = check.keep_slowly(latents(x * hole).repeat(M, 1, 1, 1), cells(hole), pyramid)
    band("likeliest of eight, share read right:", read(fill(y, change), y), 0.5, 0.85)

# %% [markdown]
# ## What did not work
#
# Eight fillings are far too few for an exact answer. The costs differ by tens of nats, so one filling has nearly all the weight: it is no sample of the
# conditional law. It fits the kept tokens better, by the nats printed above; but not more of the 120 pictures are read right: the difference is less than the noise of such a count. To weigh after *each* map, drop bad beginnings and copy good ones (a particle filter) would spend the calls better. Lesson 33 goes there.
#
# The model is small, and trained for a minute: of its free digits the judge reads about six in ten. All shares here are to be compared with that.
#
# We also looked for the encoder's own leak in the completed pictures, by keeping known cells of the whole picture (0 maps above). The leak test
# sees it clearly; the judge does not: 42 % both times. A leak need not be visible to be there.
#
# ## Where to read on
#
# * `nano_var.generate`, where `change` is called; `Pyramid.encode`, on errors that finer maps can mend.
# * Tian et al. 2024, arXiv:2404.02905, on zero-shot tasks: in-painting, out-painting and class-conditional editing by teacher-forced tokens outside the
#   mask, with no training. Ask of such pictures where the forced tokens come from.
# * Importance sampling that resamples on the way: Doucet and Johansen 2009, *A tutorial on particle filtering and smoothing*.
