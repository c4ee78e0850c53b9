"""nano_ar: draw images one token at a time, as a language model writes text.

An image becomes a grid of tokens, the grid a sequence; a small GPT learns p(token | class, tokens before).

    32 x 32 image       8 x 8 tokens              GPT, one call per token                  new image
    +--------+  4 x 4  +-----------+         slot      0     1    2  ...  63
    |   /|   | patches | 0 0 7 ... | raster  reads   class  t0   t1  ...  t62    draw t0, feed it back,
    |    |   | ------> | 0 3 9 ... | ----->            |     |    |        |     draw t1, ... 64 calls,
    |   _|_  | nearest | ...       | order             v     v    v        v     then paste 64 patches
    +--------+ codeword+-----------+         predicts  t0    t1   t2 ...  t63
                                             (each slot sees itself and all before it)

By the chain rule this is a probability distribution over all grids of tokens, with nothing approximated:

    p(tokens | class) = p(t0 | class) p(t1 | class, t0) ... p(t63 | class, t0 .. t62)

So the loss of one image, -log p, is a sum of 64 cross-entropies. In nats it can be compared with any other
model of the same tokens; with a model of other tokens (another codebook, other patches) it cannot. The parts
of the file:

    tokens      k-means on 4 x 4 patches: the simplest codebook that works (learned ones: nano_tok.py)
    model       a GPT with the class in its first slot and positions in two dimensions; the loss
    sampling    cache of keys and values; classifier-free guidance; the rest of a half-given image
    training    cross-entropy, the class hidden in a tenth of the images; Muon and AdamW
    the rest    data, judging what was drawn, pictures, settings

The recipe is LlamaGen's (Sun et al. 2024, arXiv:2406.06525), small enough for two CPU cores and two minutes.
As there: a class token, raster order, rotary positions per axis (Su et al. 2021, arXiv:2104.09864), the class
hidden at times, and guidance (Ho & Salimans 2022, arXiv:2207.12598). Ours, and explained where they stand:
k-means tokens, a vector per slot, normalised queries and keys, relu^2, and Muon (Jordan et al. 2024,
kellerjordan.github.io/posts/muon).

Letters in comments: B images in a batch, L = 64 tokens of an image, V codewords, C the model's width (`dim`),
H heads, D = C / H numbers per head, N any number of images or slots. Blocks between `# --- shared: NAME` and
`# --- end shared` stand word for word in other scripts too: read them once.

    python nano_ar.py                       train, draw 2,000 images, judge them, paint: all goes to out/ar
    python nano_ar.py --data mnist --out out/mnist    the same with handwritten digits (downloads 11 MB once)
    python nano_ar.py sample --guidance 3   draw from the trained model
    python nano_ar.py complete              four lower halves for each of ten upper halves
    python nano_ar.py train --resume        go on after Ctrl-C or a power cut; bit for bit on a CPU
    python nano_ar.py --preset gpu          a wider, deeper model, for one small GPU
"""
import argparse, functools, gzip, hashlib, io, itertools, json, math
import os, pathlib, sys, time, timeit, urllib.request, warnings, zipfile
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tqdm

import kernels

# ----- tokens: an image as 64 integers ----------------------------------------------------------------------
SIDE, PATCH = 8, 4  # an image is SIDE x SIDE patches of PATCH x PATCH pixels


def to_patches(images):
    """Cut images (N, 32, 32) into patches (N, 64, 16): patches, and the pixels in them, in reading order."""
    cut = images.view(-1, SIDE, PATCH, SIDE, PATCH)     # (N, patch row, row in it, patch column, column)
    return cut.transpose(2, 3).reshape(-1, SIDE * SIDE, PATCH * PATCH)  # from (N, 8, 8, 4, 4)


def from_patches(patches):
    """The inverse of `to_patches`: (N, 64, 16) -> (N, 32, 32)."""
    cut = patches.view(-1, SIDE, SIDE, PATCH, PATCH)
    return cut.transpose(2, 3).reshape(-1, SIDE * PATCH, SIDE * PATCH)


def kmeans(points, k, rng, rounds=20):
    """Lloyd's algorithm: points (N, d) -> codebook (k, d) whose mean squared distance to them is small.

    Two steps that can only lower this error: every point picks its nearest codeword, every codeword moves to
    the mean of its points. After 20 rounds they hardly move. The start is k *distinct* points: most patches
    of a digit are the same black one, and of equal codewords only one would ever get points. Fewer distinct
    points than k give a smaller codebook.
    """
    distinct = points.unique(dim=0)
    codebook = distinct[torch.randperm(len(distinct), generator=rng)[:k]]
    for _ in range(rounds):
        nearest = kernels.nearest_code(points, codebook)                      # (N,) integers below k
        counts = torch.bincount(nearest, minlength=len(codebook))[:, None]    # (k, 1) points of each codeword
        sums = torch.zeros_like(codebook).index_add_(0, nearest, points)      # (k, d), sum of its points
        codebook = torch.where(counts > 0, sums / counts.clamp(min=1), codebook)  # no points: stay in place
    return codebook


def fit_codebook(images, k, rng):
    """uint8 images (N, 32, 32) -> codebook float (k, 16): the k typical patches, in grey levels 0..255."""
    patches = to_patches(images).flatten(0, 1)                   # (N * 64, 16)
    some = torch.randperm(len(patches), generator=rng)[:100_000]  # about 200 for each of 512 means are enough
    return kmeans(patches[some].float(), k, rng)


def encode(images, codebook):
    """uint8 images (N, 32, 32) -> tokens (N, 64): the number of the codeword nearest to each patch."""
    return kernels.nearest_code(to_patches(images).flatten(0, 1).float(), codebook).view(len(images), -1)


def decode(tokens, codebook):
    """Tokens (N, 64) -> uint8 images (N, 32, 32): paste the codewords. What is lost stays lost."""
    return from_patches(codebook[tokens].round().byte())


# ----- model: a GPT over the tokens of one image ------------------------------------------------------------
def rope_table(places, head_dim, base=100.0):
    """2-D rotary positions: places (N, 2) of (row, column) -> cosines and sines, (N, D/2) each.

    Take numbers j and j + D/2 of a query as a point in the plane, D/2 points in all. Turn points 0 .. D/4 - 1
    by an angle proportional to the row and the others by one proportional to the column; do the same to the
    keys. The dot product of two points turned by angles a and b depends on a - b only. So as far as rotation
    goes, a score q.k knows how many rows and columns apart two cells are, and not where they are.

    Each axis has D/4 speeds, from 1 radian a cell (tells neighbours apart) down to .018 (the same all over
    the image). Text uses base 10,000 for thousands of places; 100 suits axes of some tens of cells.
    """
    quarter = head_dim // 4                                      # points for each of the two axes
    speed = base ** -(torch.arange(quarter) / quarter)           # (D/4,); D = 32: 1, .56, .32, ... .018
    angle = torch.cat([places[:, :1] * speed,                    # (N, D/4) turned by rows
                       places[:, 1:] * speed], dim=1)            # (N, D/4) turned by columns
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turn the points (x_j, x_{j + D/2}) of x (B, H, N, D) by the table's angles, each (N, D/2)."""
    a, b = x.chunk(2, dim=-1)                           # the two coordinates of all points: (B, H, N, D/2)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def norm(x):
    """Mean 0, variance 1 over the last axis, without the usual learned gain: the next matrix can hold that.

    (Not so for q and k, which no matrix follows; there the fixed size is what is wanted, see `Block`.)
    """
    return F.layer_norm(x, x.shape[-1:])


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): corrections to a stream x that runs through.

    `proj` and `down`, the last matrices of the two, start at 0, and so does the head: at first a block
    changes nothing, and depth cannot disturb the first steps (so no warm-up). Step 1 moves the head alone;
    then gradients reach the stream, and step 2 moves proj, down and the embeddings; step 3 moves everything.
    """

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)
        self.up = nn.Linear(dim, 4 * dim, bias=False)
        self.down = nn.Linear(4 * dim, dim, bias=False)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.down.weight)

    def forward(self, x, cos, sin, mask=None, cache=None, start=0):
        """x (B, N, C), the slots start .. start + N - 1 -> (B, N, C).

        Training passes all slots and a mask. Sampling passes one new slot, and what this layer has kept: a
        cache (2, B, H, L, D) with keys and values of the slots before. They cannot change any more: no slot
        looks ahead.
        """
        B, N, C = x.shape
        qkv = self.qkv(norm(x)).view(B, N, 3, self.heads, C // self.heads)  # (B, N, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)            # heads before slots, for attention: (B, H, N, D) each
        # norm gives q and k the length sqrt(D), so scores q.k / sqrt(D) stay within +- sqrt(D), 5.7 at D =
        # 32. Without it they grow as training goes on: large steps diverge, and 16-bit scores get too coarse.
        # (.to: under autocast norm computes in 32 bits, and matrix products want the 16 of v.)
        q, k = rotate(norm(q), cos, sin).to(v.dtype), rotate(norm(k), cos, sin).to(v.dtype)
        if cache is None:
            y = kernels.attention(q, k, v, mask)                 # (B, H, N, D)
        else:
            cache[0, :, :, start:start + N] = k
            cache[1, :, :, start:start + N] = v
            # causal or not is the same for one new slot: what the cache holds is all that it may see
            y = kernels.decode_attention(q, cache[0], cache[1], start + N, causal=False)
        x = x + self.proj(y.transpose(1, 2).reshape(B, N, C))    # heads side by side again
        return x + self.down(F.relu(self.up(norm(x))).square())  # relu^2: cheaper than gelu


class GPT(nn.Module):
    """p(token t | class, tokens before t) for all t at once: slot t has read just these."""

    def __init__(self, codebook_size, classes, rows, columns, dim, depth, heads):
        super().__init__()
        self.length = rows * columns
        self.null = classes                             # one more class, "none", for p(tokens): see `guide`
        self.token = nn.Embedding(codebook_size, dim)
        self.label = nn.Embedding(classes + 1, dim)
        # Slot t reads token t - 1 and must predict token t. Rotation is told the cell that it reads; this
        # vector, added to the stream, tells which cell it must predict. Absolute places come in here.
        self.slot = nn.Parameter(torch.randn(self.length, dim) * 0.02)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.head = nn.Linear(dim, codebook_size, bias=False)
        nn.init.zeros_(self.head.weight)                # all logits 0: the first loss is log 512 = 6.24 nats
        cells = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))  # (L, 2): (0, 0), (0, 1), ...
        # the class at (0, 0), the cells from (1, 1) on; the last cell is never read, nothing comes after it
        places = torch.cat([torch.zeros(1, 2), cells + 1])[:self.length]
        cos, sin = rope_table(places, dim // heads)
        self.register_buffer("cos", cos, persistent=False)  # follows .to(device); computed, so never saved
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, tokens, labels):
        """Training: tokens (B, L), labels (B,) -> logits (B, L, V); row t saw class and tokens before t.

        Every slot reads the true tokens, not those that the model would have drawn (teacher forcing): so one
        call learns 64 predictions. The mask is the trap. Without it slot t could look at slot t + 1, which
        reads the token that slot t must predict: the loss goes towards 0, and what is drawn is noise.
        """
        x = torch.cat([self.label(labels)[:, None], self.token(tokens[:, :-1])], dim=1)  # shifted by one slot
        x = x + self.slot                               # (B, L, C)
        for block in self.blocks:
            x = block(x, self.cos, self.sin, kernels.causal(self.length))
        return self.head(norm(x))

    def new_cache(self, B):
        """Room for all keys and values: (depth, 2, B, H, L, D); 256 KB a row by default."""
        heads = self.blocks[0].heads
        return self.slot.new_zeros(len(self.blocks), 2, B, heads, self.length, self.slot.shape[1] // heads)

    def step(self, x, t, cache):
        """Sampling: x (B, 1, C), what slot t reads -> logits (B, 1, V) of token t; the cache grows."""
        x = x + self.slot[t]
        for block, layer in zip(self.blocks, cache):
            x = block(x, self.cos[t:t + 1], self.sin[t:t + 1], cache=layer, start=t)
        return self.head(norm(x))


def loss_of(model, tokens, labels):
    """-log p(tokens | label) in nats per token: -log softmax(logits)[token], averaged over tokens (B, L)."""
    logits = model(tokens, labels).float()                       # (B, L, V); the softmax always in 32 bits
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


# ----- sampling ---------------------------------------------------------------------------------------------
def guide(conditional, unconditional, scale):
    """Classifier-free guidance on logits (Ho & Salimans 2022, eq. 6; their w is scale - 1). 1: plain model.

    In probabilities of token t, up to a constant:

        p(t | class) * (p(t | class) / p(t)) ** (scale - 1)

    A token twice as likely with the class as without gains a factor 2 at scale 2 and 4 at scale 3: images
    show their class more clearly, and vary less.
    """
    return unconditional + scale * (conditional - unconditional)


@torch.no_grad()
def generate(model, labels, rng, guidance=1.0, temperature=1.0, top_p=1.0, given=None):
    """Draw one image for each label (B,) -> tokens (B, L). given: (B, L) tokens to keep, -1 where free.

    Each of the L calls reads one new slot and takes the older ones from the cache. Without a cache call t + 1
    would compute t + 1 slots: 1 + 2 + ... + 64 = 2,080 instead of 64. A kept token tells what comes *after*
    it in raster order and nothing that comes before: a lower half can be drawn for an upper one, not the
    reverse. temperature divides the logits; top_p < 1 draws among the likeliest tokens of that mass only.
    """
    B, guided = len(labels), guidance != 1
    if guided:                                          # ask twice in one batch: with the class, and without
        labels = torch.cat([labels, torch.full_like(labels, model.null)])
    cache, tokens = model.new_cache(len(labels)), []
    x = model.label(labels)[:, None]                             # slot 0 reads the class: (B or 2B, 1, C)
    for t in range(model.length):
        logits = model.step(x, t, cache)                         # (B or 2B, 1, V)
        if guided:
            logits = guide(logits[:B], logits[B:], guidance)     # (B, 1, V)
        token = kernels.sample(logits, temperature, top_p=top_p, generator=rng)  # (B, 1)
        if given is not None:
            token = torch.where(given[:, t:t + 1] >= 0, given[:, t:t + 1], token)
        tokens.append(token)
        x = model.token(token.repeat(2, 1) if guided else token)  # slot t + 1 reads it: (B or 2B, 1, C)
    return torch.cat(tokens, dim=1)


def draw(config, model, labels, decode, given=None):
    """`generate` with settings and seed of the config, 250 at a time -> uint8 images (N, 32, 32) on the CPU.

    decode: from tokens (N, L) to images, such as data.decode of `load_data`, or that of another tokenizer.
    """
    device, images = model.slot.device, []
    rng = rng_at(config.seed, SAMPLING, device=device)
    for i in tqdm.trange(0, len(labels), 250, desc="draw", disable=None, leave=False):
        kept = None if given is None else given[i:i + 250].to(device)
        tokens = generate(model, labels[i:i + 250].to(device), rng, config.guidance, config.temperature,
                          config.top_p, kept)
        images.append(decode(tokens.cpu()))
    return torch.cat(images)


# ----- training ---------------------------------------------------------------------------------------------
def train(config, model, data, dtype=torch.float32, path=None, state=None, **extra):
    """Fit the model to data.train_tokens -> history, a list of {step, train, test} in nats per image.

    train: mean since the last report, the class hidden in a tenth of the images; test: at that step, none
    hidden. data: as from `load_data`. dtype: of matrix products. path: where the state is kept, with `extra`;
    None: nowhere. state: what an earlier call has kept; training goes on from there. Test images choose
    nothing: the learning rate falls to 0, and the last step is the model.
    """
    device, optimizers = model.slot.device, make_optimizers(model, config, dtype)
    first, history, seconds = resume(state, "model", model, optimizers) if state else (0, [], 0.0)
    network = parallel(model)                           # alone: the model itself
    every, losses, begun = max(1, config.steps // 5), [], time.time() - seconds
    bar = tqdm.trange(first, config.steps, desc="train", disable=RANK > 0 or None, leave=False)
    for step in bar:
        chosen = batch_at(step, len(data.train_tokens), config.batch, config.seed)
        # in a tenth of the images the class is hidden: one network learns p(tokens | class) and p(tokens)
        hidden = torch.rand(len(chosen), generator=rng_at(config.seed, HIDING, step)) < 0.1
        labels = data.train_labels[chosen].masked_fill(hidden, model.null)
        chosen, labels = my_part(chosen), my_part(labels)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = loss_of(network, data.train_tokens[chosen].to(device), labels.to(device))
        loss.backward()
        for optimizer, lr in zip(optimizers, (config.lr, config.lr / 2)):
            optimizer.param_groups[0]["lr"] = lr * (1 - step / config.steps)  # a straight line to 0
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())                    # not .item(): every reading would wait for the GPU
        if (step + 1) % every == 0 or step + 1 == config.steps:
            mean = gather(torch.stack(losses)).mean().item() * model.length
            if not math.isfinite(mean):                 # stop before it is saved: the old state is good
                fail(f"the loss is {mean} at step {step + 1}: lower --lr, or use --precision fp32")
            test = nats_per_image(model, data.test_tokens, data.test_labels)
            bar.write(f"step {step + 1:5}   train {mean:6.1f}   test {test:6.1f} nats per image")
            history, losses = history + [{"step": step + 1, "train": mean, "test": test}], []
            if path and RANK == 0:
                save(path, {"config": vars(config), "step": step + 1, "history": history,
                            "model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers],
                            "seconds": time.time() - begun, **extra})
    return history


def make_optimizers(model, config, dtype):
    """Muon for matrices inside the blocks; AdamW, at half its rate, for embeddings, slot vectors and head."""
    outside = [model.token.weight, model.label.weight, model.slot, model.head.weight]
    # beta 0.95 averages squares over 1 / (1 - 0.95) = 20 steps; the usual 0.999 takes 1,000
    return [Muon(model.blocks.parameters(), config.lr, dtype=dtype),
            torch.optim.AdamW(outside, config.lr / 2, betas=(0.9, 0.95), weight_decay=0.0, fused=True)]


# --- shared: muon
def orthogonalize(G, dtype=torch.float32):
    """G (m, n) -> nearly U V^T of its singular value decomposition U S V^T: all directions equally strong.

    Newton-Schulz: (X X^T)^k X = U S^(2k+1) V^T, so an odd polynomial a x + b x^3 + c x^5 of a matrix acts on
    its singular values alone, and takes nothing but matrix products. Five rounds of this one, whose
    coefficients were found by search (Jordan et al. 2024), bring all values above about 0.0015 of the norm
    |G| (root of the sum of squares) into 0.68 .. 1.20: small ones rise fast, and exactly 1 is not needed.
    """
    tall = G.shape[0] > G.shape[1]
    X = G.mT if tall else G                                      # X X^T on the short side: smaller products
    X = (X / (X.norm() + 1e-7)).to(dtype)                        # no singular value exceeds 1; G may be 0
    for _ in range(5):
        A = X @ X.mT
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X      # a X + b (X X^T) X + c (X X^T)^2 X
    return (X.mT if tall else X).to(G.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum whose update of each weight matrix is orthogonalised (Jordan et al. 2024).

    Few directions dominate the gradient of a matrix; this moves all of them at one speed, the rare ones too.
    Only for matrices inside the blocks. A row of a token embedding, or of the layer that gives the logits,
    belongs to one token, and most have no gradient in a step: to equalise directions would move them, too.
    dtype is that of the products (torch.optim.Muon always takes bf16: on a CPU that emulates it, 20 times
    slower).
    """

    def __init__(self, params, lr, momentum=0.95, dtype=torch.float32):
        super().__init__(params, dict(lr=lr, momentum=momentum))
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:                      # not part of this loss
                    continue
                velocity = self.state[p].setdefault("velocity", torch.zeros_like(p))
                velocity.lerp_(p.grad, 1 - group["momentum"])             # v <- 0.95 v + 0.05 g
                ahead = p.grad.lerp(velocity, group["momentum"])          # Nesterov: 0.05 g + 0.95 v
                # U V^T keeps the length of an input; spread over more outputs than inputs, each number would
                # move less, so tall matrices get a longer step
                scale = max(1, p.shape[0] / p.shape[1]) ** 0.5
                p.sub_(orthogonalize(ahead, self.dtype), alpha=group["lr"] * scale)
# --- end shared


# --- shared: chance
BATCHES, HIDING, SAMPLING, CODEBOOK = range(4)  # what random numbers are for: each use has its own stream


def rng_at(*numbers, device="cpu"):
    """Random numbers that follow from (seed, use, step) alone, so no random state need be saved to resume."""
    mixed = np.random.SeedSequence(numbers).generate_state(1, np.uint64)  # a sum would mix up 1, 2 and 2, 1
    return torch.Generator(device).manual_seed(int(mixed[0] >> 1))  # 63 bits: positive


def batch_at(step, N, batch, seed):
    """Which of N images step number `step` takes -> (batch,) indices, or N where that is less.

    An epoch is N // batch steps through one permutation: no image comes twice, and the rest, fewer than a
    batch, sits out until the next permutation.
    """
    epoch, i = divmod(step, max(1, N // batch))
    return torch.randperm(N, generator=rng_at(seed, BATCHES, epoch))[i * batch:(i + 1) * batch]
# --- end shared


# --- shared: processes
# `torchrun --nproc_per_node=4 nano_x.py` runs this program four times, as number 0 to 3. All hold the same
# weights, and each takes a quarter of every batch. While `backward` runs, gradients are averaged over all of
# them, and so are what one process would get from the whole batch: the same training, in less time.
RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def meet(device):
    """Connect the processes; each gets a GPU of its own, and only number 0 speaks."""
    if PROCESSES > 1:
        here, gpu = int(os.environ["LOCAL_RANK"]), device.type == "cuda"    # its number on this machine
        if gpu and here >= torch.cuda.device_count():
            fail(f"process {here} finds no GPU of its own: lower --nproc_per_node, or use --device cpu")
        if gpu:
            torch.cuda.set_device(here)
        torch.distributed.init_process_group("nccl" if gpu else "gloo")
        sys.stdout = sys.stdout if RANK == 0 else open(os.devnull, "w")


def parallel(network):
    """-> what to call in training. `network` still holds the weights, so a checkpoint knows no N."""
    return nn.parallel.DistributedDataParallel(network) if PROCESSES > 1 else network


def my_part(x):
    """A whole batch (B, ...) -> the (B / N, ...) of this process, where N processes are."""
    if len(x) % PROCESSES:                              # a mean of means needs equal parts
        fail(f"{len(x)} images do not divide by {PROCESSES} processes: change --nproc_per_node or --batch")
    return x.chunk(PROCESSES)[RANK]


def gather(x):
    """The parts (n, ...) of all processes, in order -> (N n, ...), the same in each of them."""
    parts = [torch.empty_like(x) for _ in range(PROCESSES)] if PROCESSES > 1 else [x]
    if PROCESSES > 1:
        torch.distributed.all_gather(parts, x.contiguous())
    return torch.cat(parts)
# --- end shared


# ----- data -------------------------------------------------------------------------------------------------
# --- shared: fetch
def fetch(folder, name, url, checksum):
    """Path of a data file: in $NANO_DATA or data/, else downloaded there, checked, only then given its name.

    checksum: "md5:..." or "sha256:...". A file that lies there already is the user's own and is not checked.
    """
    path = pathlib.Path(os.environ.get("NANO_DATA", "data"), folder, name)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        content = urllib.request.urlopen(url + name, timeout=30).read()
        kind, digest = checksum.split(":")
        if hashlib.new(kind, content).hexdigest() != digest:
            raise OSError(f"what came from {url}{name} is damaged")
        write(path, content)
    return path
# --- end shared


# --- shared: images
FONTS = """DejaVuSans DejaVuSans-Bold DejaVuSans-Oblique DejaVuSans-BoldOblique DejaVuSansMono
    DejaVuSansMono-Bold DejaVuSansMono-Oblique DejaVuSansMono-BoldOblique DejaVuSerif DejaVuSerif-Bold
    DejaVuSerif-Italic DejaVuSerif-BoldItalic STIXGeneral STIXGeneralBol STIXGeneralItalic STIXGeneralBolIta
    cmr10 cmb10 cmss10 cmtt10"""  # matplotlib ships them, so they are the same on every machine


def glyph_masters(size):
    """Each digit in 20 fonts and 4 stroke widths, drawn large -> uint8 (10, 80, size, size)."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont
    folder, drawn = pathlib.Path(matplotlib.get_data_path(), "fonts", "ttf"), []
    for digit, name, stroke in itertools.product("0123456789", FONTS.split(), range(4)):
        font = ImageFont.truetype(str(folder / f"{name}.ttf"), int(size * 0.68))
        picture = Image.new("L", (size, size))                   # black
        ImageDraw.Draw(picture).text((size / 2, size / 2), digit, 255, font, anchor="mm", stroke_width=stroke)
        drawn.append(np.asarray(picture))
    return torch.from_numpy(np.stack(drawn)).view(10, -1, size, size)


def glyphs(n, seed):
    """n digits in random font, stroke, slant, size, place and contrast -> uint8 (n, 32, 32), labels (n,)."""
    masters, rng = glyph_masters(96), torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (n,), generator=rng)
    kind = torch.randint(masters.shape[1], (n,), generator=rng)  # font and stroke width

    def uniform(low, high):
        return torch.rand(n, generator=rng) * (high - low) + low

    angle, shear, contrast = uniform(-0.2, 0.2), uniform(-0.2, 0.2), uniform(0.8, 1.0)
    scale, stretch = uniform(0.72, 1.0), uniform(0.85, 1.15)
    # rows of the map from output pixel (x, y, 1) to the place in the master, so that scale < 1 enlarges
    to_x = torch.stack([stretch * scale * angle.cos(), scale * (shear - angle.sin()), uniform(-0.1, 0.1)], 1)
    to_y = torch.stack([stretch * scale * angle.sin(), scale * angle.cos(), uniform(-0.1, 0.1)], 1)
    images = torch.empty(n, 32, 32, dtype=torch.uint8)
    for i in torch.arange(n).split(1000):
        grid = F.affine_grid(torch.stack([to_x[i], to_y[i]], 1), (len(i), 1, 64, 64), align_corners=False)
        fine = F.grid_sample(masters[labels[i], kind[i]][:, None].float(), grid, align_corners=False)
        small = F.avg_pool2d(fine, 2)[:, 0]                      # (1000, 32, 32): smooth edges
        images[i] = (small * contrast[i, None, None]).round().byte()
    return images, labels


GLYPHS = {"glyphs": 20_000, "glyphs-200k": 200_000}  # to train on; a large model copies what is few
IDX_FILES = ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz",
             "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz")
IMAGE_SETS = {  # name: folder, address, MD5 sums of the four files as their publishers give them
    "mnist": ("", "https://ossci-datasets.s3.amazonaws.com/mnist/", "f68b3c2dcbeaaa9fbdd348bbdeb94873 "
              "d53e105ee54ea40749a09fcbcd1e9432 9fb629c4189551a2d022fa330f9573f3 "
              "ec29112dd5afa0611ce80d1b7f02629c"),
    "fashion-mnist": ("fashion-mnist", "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
                      "8d4fb7e6c68d591d4c3dfef9ec88bf0d 25c81989df183df01b3e8a0aad5dffbe "
                      "bef4ecab320f06d8554ea6380940ec79 bb300cfdad3c16e7a12a480ee83cd310"),
}


def check_size(size, path):
    """Refuse what would unpack to more than 128 MB and than the file itself, before it fills the memory.

    A gzip or a zip of a megabyte can hold a thousand; MNIST unpacks to 47.
    """
    if size > max(2**27, path.stat().st_size):
        raise ValueError(f"{path.name} would be {size:,} bytes: damaged; if it is not, unpack it first")


def read_idx(path):
    """MNIST's format: 0, 0, 8 for bytes, rank r, r sizes as big-endian uint32, the bytes -> uint8 array."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        start = file.read(4)
        if start[:3] != b"\0\0\x08" or len(start) < 4:
            raise ValueError(f"{path.name} is no IDX file of bytes")
        sizes = file.read(4 * start[3])
        shape = [int.from_bytes(sizes[i:i + 4], "big") for i in range(0, 4 * start[3], 4)]
        check_size(math.prod(shape), path)
        raw = file.read(math.prod(shape) + 1)           # one more: at the end gzip compares its checksum
    if len(sizes) != 4 * start[3] or len(raw) != math.prod(shape):
        raise ValueError(f"{path.name} is cut, or longer than its header says: {shape}")
    return np.frombuffer(raw, np.uint8).reshape(shape)


def read_pair(path):
    """An .npz with `images` and `labels`, or an IDX file with its labels beside it -> both arrays."""
    if path.suffix == ".npz":
        with zipfile.ZipFile(path) as archive:
            check_size(sum(part.file_size for part in archive.infolist()), path)
        with np.load(path, allow_pickle=False) as file, warnings.catch_warnings():
            warnings.simplefilter("error")              # numpy warns of odd headers: refused, in one line
            return np.asarray(file["images"]), np.asarray(file["labels"])
    if "images-idx3" not in path.name:
        raise ValueError("not glyphs, mnist, fashion-mnist, an .npz, or a file like x-images-idx3-ubyte.gz")
    return read_idx(path), read_idx(path.with_name(path.name.replace("images-idx3", "labels-idx1")))


def as_tensors(images, labels):
    """Check, and pad 28 x 28 to 32 x 32 -> uint8 (N, 32, 32), int64 (N,)."""
    if images.dtype != np.uint8 or images.shape[1:] not in ((28, 28), (32, 32)) or len(images) < 20:
        raise ValueError(f"needs 20 images or more, uint8, 28 x 28 or 32 x 32: {images.dtype} {images.shape}")
    whole = labels.shape == images.shape[:1] and labels.dtype.kind in "iu"
    if not whole or labels.min() < 0 or labels.max() > 999:
        raise ValueError(f"needs {len(images)} labels, one an image, 0..999: {labels.dtype} {labels.shape}")
    pad = (32 - images.shape[1]) // 2
    padded = np.pad(images, ((0, 0), (pad, pad), (pad, pad)))
    return torch.from_numpy(padded), torch.from_numpy(labels.astype(np.int64))


def load_images(data, seed):
    """-> images uint8 (N, 32, 32), labels (N,), test images, test labels. One file is split 9:1 by seed."""
    if data in GLYPHS:
        return *glyphs(GLYPHS[data], 2 * seed), *glyphs(2000, 2 * seed + 1)
    try:
        if data in IMAGE_SETS:
            folder, url, sums = IMAGE_SETS[data]
            paths = [fetch(folder, name, url, "md5:" + md5) for name, md5 in zip(IDX_FILES, sums.split())]
            x, y, test_x, test_y = (read_idx(path) for path in paths)
            return *as_tensors(x, y), *as_tensors(test_x, test_y)
        images, labels = as_tensors(*read_pair(pathlib.Path(data)))
    except Exception as error:                                   # missing, empty, cut, foreign: many types
        fail(f"--data {data}: {str(error) or repr(error)}; give another file, or --data glyphs")
    mixed = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    test, train = mixed[:len(images) // 10], mixed[len(images) // 10:]
    if (images[train] == images[train[0]]).all():
        fail(f"--data {data}: all images are equal, there is nothing to learn; give another file")
    return images[train], labels[train], images[test], labels[test]
# --- end shared


# ----- evaluation -------------------------------------------------------------------------------------------
@torch.no_grad()
def nats_per_image(model, tokens, labels):
    """-log p(tokens | label) in nats, a mean over tokens (N, L), labels (N,); in 32 bits."""
    total = 0.0
    for part, label in zip(tokens.split(250), labels.split(250)):
        total += loss_of(model, part.to(model.slot.device), label.to(model.slot.device)).item() * part.numel()
    return total / len(tokens)


def unigram_nats(data):
    """The baseline: each cell draws its token from how often training images *of that class* have it there.

    It is told the class, as the GPT is: what the GPT gains over it is what the tokens of an image tell about
    each other. Counts start at a twentieth: no token may have probability 0, and much more would blur them.
    """
    L = data.train_tokens.shape[1]
    counts = torch.full((data.classes, L, data.codebook_size), 0.05)
    for token, label in zip(data.train_tokens, data.train_labels):
        counts[label, torch.arange(L), token] += 1
    log_p = torch.log(counts / counts.sum(-1, keepdim=True))     # (classes, L, V)
    return -log_p[data.test_labels[:, None], torch.arange(L), data.test_tokens].sum(1).mean().item()


# --- shared: judge
def make_judge(classes):
    """A small classifier; its 64 last features are the space in which sets of images are compared."""
    def halve(i, o):                                             # height and width: 32, 16, 8, 4
        conv = nn.Conv2d(i, o, 3, stride=2, padding=1, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(o), nn.ReLU())
    return nn.Sequential(halve(1, 16), halve(16, 32), halve(32, 64), nn.Flatten(),
                         nn.Linear(64 * 4 * 4, 64), nn.ReLU(), nn.Linear(64, classes))


def train_judge(images, labels, classes, device, seed, epochs=4):
    """Fit it to uint8 images (N, 32, 32), each batch moved by up to 2 pixels: place should not matter."""
    torch.manual_seed(seed)                                      # for the weights
    rng, judge = torch.Generator().manual_seed(seed), make_judge(classes).to(device)
    steps, optimizer = max(epochs * len(images) // 128, 50), torch.optim.AdamW(judge.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in tqdm.trange(steps, desc="judge", disable=None, leave=False):
        i = torch.randint(len(images), (128,), generator=rng)
        shift = torch.randint(-2, 3, (2,), generator=rng).tolist()
        batch = torch.roll(images[i], shift, (1, 2))[:, None] / 255  # (128, 1, 32, 32)
        F.cross_entropy(judge(batch.to(device)), labels[i].to(device)).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return judge.eval()


@torch.no_grad()
def look(judge, images):
    """What the judge sees in uint8 (N, 32, 32) -> features float64 (N, 64), classes (N,), both on the CPU."""
    device, body = judge[-1].weight.device, judge[:-1]           # all but the last layer
    features = torch.cat([body(part.to(device)[:, None] / 255) for part in images.split(500)])
    return features.double().cpu(), judge[-1](features).argmax(-1).cpu()


def frechet_distance(a, b):
    """Of two sets of features (N, 64), (M, 64), taken as Gaussians (Heusel et al. 2017, eq. 6).

    |mean_a - mean_b|^2 + tr(A + B - 2 (AB)^1/2) with the covariances A, B. Small sets look further apart than
    they are, by an amount that falls as 1/N: compare only values of the same N and the same reference.
    """
    A, B = torch.cov(a.mT), torch.cov(b.mT)
    # tr (AB)^1/2: the sum of the roots of AB's eigenvalues, real and >= 0 for covariances, up to rounding
    cross = torch.linalg.eigvals(A @ B).real.clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + A.trace() + B.trace() - 2 * cross)


def spread(features, classes):
    """Mean distance between two images of one class, averaged over the classes that have two."""
    groups = [features[classes == c] for c in classes.unique()]
    return np.mean([torch.pdist(group).mean() for group in groups if len(group) > 1])


def image_metrics(judge, images, labels, real):
    """Images and the classes asked for, against real images -> three figures.

    gfd: Fréchet distance, "g" for generated. class_accuracy: share in which the judge sees the class asked
    for. diversity: distance of two images of a class, relative to real ones (1), grouped by the class *seen*:
    grouped by the class asked for, a mistaken 7 among the 1s would count as variety.
    """
    features, seen = look(judge, images)
    real_features, real_seen = look(judge, real)
    return {"gfd": frechet_distance(features, real_features),
            "class_accuracy": (seen == labels).double().mean().item(),
            "diversity": float(spread(features, seen) / spread(real_features, real_seen))}


def psnr(a, b):
    """Peak signal-to-noise ratio of uint8 images in dB: 10 log10 of 255^2 over the mean squared error."""
    return -10 * torch.log10(((a.float() - b.float()) / 255).square().mean()).item()


def milliseconds(function):
    """Median of five calls after one to warm up. The function must wait for its result, as .cpu() does."""
    return 1000 * float(np.median(timeit.repeat(function, number=1, repeat=6)[1:]))
# --- end shared


def evaluate(config, model, data, samples, labels):
    """Judge samples uint8 (N, 32, 32), drawn for labels (N,) -> the metrics, plain numbers.

    Three distances come from one function with one N, so they can be compared: gfd of the samples; gfd_floor
    of real images, those of training; rfd ("r" for reconstructed) of these through the tokenizer alone. The
    judge was trained on these, so a true floor may be a little lower.
    """
    N, device = len(samples), model.slot.device
    judge = train_judge(data.train_images, data.train_labels, data.classes, device, config.seed)
    real, train_labels = data.test_images[:N], data.train_labels[:N]
    floor = image_metrics(judge, data.train_images[:N], train_labels, real)
    tokenizer_alone = image_metrics(judge, data.decode(data.train_tokens[:N]), train_labels, real)

    def time_of(B):
        asked = labels[:1].repeat(B).to(device)
        return milliseconds(lambda: generate(model, asked, None, config.guidance).cpu()) / B

    return image_metrics(judge, samples, labels, real) | {
        "gfd_floor": floor["gfd"], "rfd": tokenizer_alone["gfd"],
        "rpsnr": psnr(data.decode(data.test_tokens), data.test_images),
        "val_nats_per_image": nats_per_image(model, data.test_tokens, data.test_labels),
        "unigram_nats_per_image": unigram_nats(data), "calls_per_image": model.length,
        "ms_per_image_b1": time_of(1), "ms_per_image_b64": time_of(64)}


# ----- pictures ---------------------------------------------------------------------------------------------
# --- shared: figures
def save_images(path, images, what):
    """uint8 images (rows, columns, 32, 32) side by side in one PNG file, twice as large."""
    from PIL import Image
    lined = F.pad(images, (0, 1, 0, 1), value=96)                # a grey line right of and below each image
    sheet = lined.transpose(1, 2).flatten(2, 3).flatten(0, 1)    # (rows * 33, columns * 33)
    Image.fromarray(sheet.repeat_interleave(2, 0).repeat_interleave(2, 1).numpy()).save(path)
    print(f"wrote {path}: {what}")


def by_class(labels, rows):
    """Which of N labelled images to show -> indices (rows, columns), a column for each of ten classes."""
    columns = [(labels == c).nonzero()[:rows, 0] for c in labels.unique()[:10]]
    shortest = min(len(column) for column in columns)            # a rare class may have fewer than `rows`
    return torch.stack([column[:shortest] for column in columns], dim=1)
# --- end shared


def draw_samples(out, samples, labels, pool):
    """samples.png: a column per class. nearest.png: under each sample its nearest training image: a copy?"""
    shown = samples[by_class(labels, 8)]                         # (8, columns, 32, 32)
    save_images(out / "samples.png", shown, "drawn by the model, one column per class")
    some = shown[:4].flatten(0, 1)
    near = pool[kernels.nearest_code(some.flatten(1).float(), pool.flatten(1).float())]  # by squared distance
    pairs = torch.stack([shown[:4], near.view_as(shown[:4])], dim=1)  # (4, 2, columns, 32, 32)
    save_images(out / "nearest.png", pairs.flatten(0, 1), "odd rows drawn, even rows the nearest of training")


def complete(config, model, data, out):
    """completions.png: upper halves of test images, four lower halves drawn for each, and the originals."""
    chosen = by_class(data.test_labels, 1)[0]                    # one image per class: (columns,)
    given = data.test_tokens[chosen].repeat(4, 1)                # (4 * columns, L)
    given[:, model.length // 2:] = -1                   # the first half of the raster is the upper half
    drawn = draw(config, model, data.test_labels[chosen].repeat(4), data.decode, given)
    halves = data.test_images[chosen].clone()
    halves[:, 16:] = 64
    rows = torch.cat([halves, drawn, data.test_images[chosen]]).unflatten(0, (6, -1))
    save_images(out / "completions.png", rows, "first row given, then four drawn, last row the original")


# ----- settings and main ------------------------------------------------------------------------------------
NAME, PARTS = "nano_ar", ("train", "sample", "eval", "complete")
FLAGS = {  # name: default, what is allowed (names, or the least number), help
    "data": ("glyphs", None, "glyphs, glyphs-200k, mnist, fashion-mnist, an IDX file or an .npz"),
    "out": ("out/ar", None, "folder for checkpoint, pictures, samples.npz and metrics.json"),
    "preset": ("cpu", ("cpu", "gpu"), "other defaults; gpu: for an 8 GB card and half an hour"),
    "seed": (0, 0, "of the data, the weights and the samples"),
    "device": ("auto", ("auto", "cpu", "cuda", "mps"), "where to compute"),
    "precision": ("auto", ("auto", "fp32", "bf16"), "of products in training; auto: bf16 where it is fast"),
    "resume": (False, None, "go on from the last report, kept in OUT/last.pt"),
    "codebook": (512, 2, "number of codewords"),
    "dim": (128, 32, "width of the model, a multiple of 32: a head has 32 numbers"),
    "depth": (4, 1, "number of blocks"),
    "steps": (500, 1, "optimizer steps; the learning rate falls to 0 over them, so none can be added"),
    "batch": (64, 1, "images per step"),
    "lr": (0.04, 0, "learning rate of Muon; AdamW takes half of it"),
    "samples": (2000, 10, "images to draw"),
    "guidance": (1.25, 0, "classifier-free guidance; 1: the plain model"),
    "temperature": (1.0, 0, "divides the logits; 0 takes the most probable token"),
    "top_p": (1.0, 0.001, "keep the most probable tokens up to this mass; 1 keeps all"),
}
PRESETS = {"cpu": {}, "gpu": dict(data="glyphs-200k", codebook=1024, dim=384, depth=8, steps=4000,
                                  batch=256, lr=0.02, samples=10000)}
FREE = {"samples", "guidance", "temperature", "top_p"}  # may differ from the checkpoint's


# --- shared: settings
LOCAL = {"out", "device", "precision", "resume"}  # of this run alone: never taken from a checkpoint


def fail(message):
    """What is wrong, where, and what to do, in one line on stderr; exit code 2."""
    print(f"{NAME}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def read_settings(argv=None):
    """The command line -> part, config, checkpoint (empty unless resumed or sampled from).

    Each setting comes from the first that has it: the flags given now, the checkpoint, the preset, the
    defaults. Only those in FREE and LOCAL may be given otherwise than the checkpoint has them: the others
    have shaped its weights.
    """
    parser = argparse.ArgumentParser(prog=NAME, description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail                                 # argparse would print the usage first: many lines
    parser.add_argument("part", nargs="?", default="all", choices=("all", *PARTS), help="what to do")
    for name, (default, _, text) in FLAGS.items():
        kind = {"action": "store_true"} if default is False else {"type": type(default)}
        kind |= {"default": argparse.SUPPRESS, "help": f"{text} [{default}]"}
        parser.add_argument("--" + name.replace("_", "-"), **kind)
    given = vars(parser.parse_args(argv))               # SUPPRESS: this holds only what was really given
    if any(value in ([], "--") for value in given.values()):     # what argparse makes of --out=--
        fail("-- is no value: give the flag another")
    part, defaults = given.pop("part"), {name: default for name, (default, _, _) in FLAGS.items()}
    needed = "resume" in given or part not in ("all", "train")
    state = load(pathlib.Path(given.get("out", defaults["out"]), "last.pt")) if needed else {}
    saved = {name: value for name, value in state.get("config", {}).items() if name in FLAGS.keys() - LOCAL}
    for name, value in {**saved, **given}.items():
        allowed, flag = FLAGS[name][1], f"--{name.replace('_', '-')} {value}"
        if type(value) is not type(defaults[name]):     # only one from a checkpoint can be
            fail(f"{flag}: the checkpoint has this, of another type; train again, or choose another --out")
        if isinstance(allowed, tuple) and value not in allowed:
            fail(f"{flag}: choose one of {', '.join(allowed)}")
        if isinstance(allowed, (int, float)) and not allowed <= value < 1e9:  # so written, nan fails, too
            fail(f"{flag}: must be a number from {allowed} on, below a billion")
        if name not in FREE and saved.get(name, value) != value:
            fail(f"{flag}: the checkpoint has {saved[name]}; drop the flag, or choose another --out")
    preset = PRESETS[{**defaults, **saved, **given}["preset"]]
    return part, SimpleNamespace(**{**defaults, **preset, **saved, **given}), state


def pick_device(name, precision):
    """-> device, dtype of matrix products in training: bf16 only where the hardware multiplies it fast."""
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = next(k for k in has if has[k]) if name == "auto" else name
    if not has[kind]:
        fail(f"--device {name}: this torch sees no such device; use --device cpu")
    if kind == "cuda":
        fast = torch.cuda.get_device_capability() >= (8, 0)
    else:                                               # without this unit a CPU is 15 x slower in bf16
        fast = kind == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False)
    bf16 = fast if precision == "auto" else precision == "bf16"
    return torch.device(kind), torch.bfloat16 if bf16 else torch.float32
# --- end shared


# --- shared: checkpoint
def write(path, content):
    """Write bytes so that `path` is always all of the old file or all of the new one."""
    part = path.with_suffix(".part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())                     # on the disk before it has the name: power may fail
        os.replace(part, path)                                   # atomic
    finally:
        part.unlink(missing_ok=True)                             # half a file is of no use


def save(path, state):
    """Keep tensors and plain types; by way of the memory, for torch would hide that a disk is full."""
    content = io.BytesIO()
    torch.save({"script": NAME, **state}, content)
    write(path, content.getbuffer())


def load(path):
    """-> the dict that `save` wrote, on the CPU. weights_only: nothing in the file is executed.

    The zip archive has a checksum of each part, which torch.load ignores: of 200 files with one bit turned it
    gave 187 back, with a wrong weight. A zip may unpack to far more than its size; ours is not compressed.
    """
    try:
        with zipfile.ZipFile(path) as file:
            size = sum(part.file_size for part in file.infolist())
            if size > path.stat().st_size or file.testzip():
                raise ValueError("a bit has changed, or a zip bomb")
        state = torch.load(path, map_location="cpu", weights_only=True)
        kinds = {"config": dict, "step": int, "history": list, "optimizers": list}
        if state.get("script") != NAME or any(type(state[key]) is not kinds[key] for key in kinds):
            raise ValueError("written by another script")
    except FileNotFoundError:
        fail(f"there is no checkpoint {path}: train first, or point --out at the folder of a run")
    except Exception:                                            # torch reports broken files by many types
        fail(f"{path} is broken, or not a checkpoint of {NAME}: train again, or choose another --out")
    return state


def resume(state, name, network, optimizers=()):
    """Put what `save` has kept of them back in its places -> first step, history, seconds so far."""
    try:
        network.load_state_dict(state[name])
        for i, optimizer in enumerate(optimizers):
            optimizer.load_state_dict(state["optimizers"][i])
            for weight, memory in optimizer.state.items():       # their shapes torch does not compare
                assert all(x.shape in ((), weight.shape) for x in memory.values()), "running means"
        return state["step"], state["history"], float(state.get("seconds", 0))
    except Exception as error:                                   # of another version, or changed by hand
        fail(f"this checkpoint fits another network ({str(error)[:99]}): train again, or change --out")


def run_as_program(main):
    """Call main(). Being stopped, no memory, or a file that cannot be used, ends in one line."""
    try:
        main()
    except KeyboardInterrupt:
        fail("stopped; the same command with --resume goes on from the last report, if there was one")
    except OSError as error:
        fail(f"cannot use {error.filename or 'a file'} ({error.strerror}): make room, or another --out")
    except (MemoryError, RuntimeError) as error:                 # torch has no type of its own for it
        if isinstance(error, RuntimeError) and not any(w in str(error) for w in ("allocate", "overflow")):
            raise
        fail("this needs more memory than there is: choose smaller sizes, or a smaller batch")
# --- end shared


def load_data(config, codebook=None):
    """Images, their tokens and the way back, in one namespace. The codebook is fitted unless one is given."""
    names = ("train_images", "train_labels", "test_images", "test_labels")
    data = SimpleNamespace(**dict(zip(names, load_images(config.data, config.seed))))
    if codebook is None:
        codebook = fit_codebook(data.train_images, config.codebook, rng_at(config.seed, CODEBOOK))
    if getattr(codebook, "shape", [])[1:] != (PATCH**2,):
        fail("the codebook of this checkpoint has another shape: train again, or choose another --out")
    data.codebook, data.codebook_size = codebook, len(codebook)
    data.train_tokens = encode(data.train_images, codebook)      # (N, 64)
    data.test_tokens = encode(data.test_images, codebook)
    data.decode = functools.partial(decode, codebook=codebook)   # tokens (N, 64) -> uint8 images (N, 32, 32)
    data.classes = int(max(data.train_labels.max(), data.test_labels.max())) + 1
    return data


def main(argv=None):
    """Do what the command line says -> the metrics; a full run and `eval` write them to OUT/metrics.json."""
    begun, (part, config, state) = time.time(), read_settings(argv)
    if config.dim % 32 or config.top_p > 1:
        fail(f"--dim {config.dim} must be a multiple of 32 (a head), --top-p {config.top_p} at most 1")
    device, dtype = pick_device(config.device, config.precision)
    meet(device)
    out = pathlib.Path(config.out)
    out.mkdir(parents=True, exist_ok=True)              # now: a wrong --out must not cost the whole run
    data = load_data(config, state.get("codebook"))
    torch.manual_seed(config.seed)                      # for the weights
    heads = config.dim // 32
    model = GPT(data.codebook_size, data.classes, SIDE, SIDE, config.dim, config.depth, heads).to(device)
    params = sum(p.numel() for p in model.parameters())
    print(f"{NAME}: {len(data.train_images):,} training images, {params:,} weights, on {device}, products in "
          f"{str(dtype)[6:]}; kernels: {kernels.path(model.slot).name} ({kernels.path(model.slot).reason})")
    metrics = {"device": str(device), "seed": config.seed, "params": params}
    if part in ("all", "train"):
        train(config, model, data, dtype, out / "last.pt", state, codebook=data.codebook)
        if RANK:
            return metrics                              # number 0 alone draws and judges
        state = load(out / "last.pt")
        metrics["tokens_per_second"] = config.steps * config.batch * model.length / state["seconds"]
    resume(state, "model", model)
    if part in ("all", "sample", "eval"):               # classes as frequent as in the test set
        labels = data.test_labels[torch.arange(config.samples) % len(data.test_labels)]
        samples = draw(config, model, labels, data.decode)
        packed = io.BytesIO()
        np.savez_compressed(packed, images=samples.numpy(), labels=labels.numpy())
        write(out / "samples.npz", packed.getbuffer())
        draw_samples(out, samples, labels, data.train_images)
    if part in ("all", "complete"):
        complete(config, model, data, out)
    if part in ("all", "eval"):
        metrics |= evaluate(config, model, data, samples, labels) | {"history": state["history"]}
        metrics["seconds"] = time.time() - begun
        write(out / "metrics.json", json.dumps(metrics, indent=1).encode())
        print_summary(SimpleNamespace(**metrics))
    return metrics


def print_summary(m):
    print(f"""
likelihood   {m.val_nats_per_image:.1f} nats an image; from class and cell {m.unigram_nats_per_image:.1f}
quality      gFD {m.gfd:.2f}; real images {m.gfd_floor:.2f}; tokenizer alone {m.rfd:.2f} ({m.rpsnr:.1f} dB)
             {m.class_accuracy:.1%} read as the class asked for; diversity {m.diversity:.2f} (real images: 1)
speed        {m.ms_per_image_b1:.0f} ms for one image alone, {m.ms_per_image_b64:.1f} ms in a batch of 64
total        {m.seconds:.0f} s""")


if __name__ == "__main__":
    run_as_program(main)
