"""nano_var: draw images scale by scale, and train the tokenizer that this needs.

An image becomes a latent, and the latent four small maps of tokens, coarse to fine. Each map codes what the
coarser ones have left over; their sum is decoded. A transformer draws one map per call: 4 calls, not 64.

    32 x 32 image        8 x 8 latent f      f  =  up(r1)  +  up(r2)  +  up(r3)  +  up(r4)  +  what is lost
    +--------+ encoder  +-----------+              +---+     +---+     +---+     +---+
    |   /|   |  ----->  | 8 numbers |              |1x1|     |2x2|     |4x4|     |8x8|    r: tokens, 0 .. 511;
    |    |   |          | in each   |              +---+     +---+     +---+     +---+    up: their codes,
    |   _|_  |  <-----  | cell      |                                                     enlarged to 8 x 8
    +--------+ decoder  +-----------+    transformer, one call per map:

        reads      class           f1 as 2x2           f2 as 4x4           f3 as 8x8       f1 = up(r1)
                     |                 |                   |                   |           f2 = f1 + up(r2)
                     v                 v                   v                   v           f3 = f2 + up(r3)
        predicts    r1, 1 token       r2, 4 tokens        r3, 16 tokens       r4, 64; f3 + up(r4) is decoded

A token has a slot in the transformer; a slot sees all slots of its own map and of the coarser ones. No slot
reads a token of its own map: given the coarser ones, a map's tokens are drawn independently of each other.
That is the price of few calls:

    p(tokens | class) = p(r1 | class) p(r2 | class, r1) p(r3 | class, r1, r2) p(r4 | class, r1, r2, r3)
    and p(rk | ...) = the product over its cells of p(token | ...)

The parts of the file:

    pyramid      latents to maps of tokens and back: quantizing what is left over
    tokenizer    encoder and decoder around the pyramid
    transformer  all maps in one pass, with a mask; or one map after the other, with a cache
    sampling     one call per map; guidance; why the last map is drawn from its likeliest tokens only
    training     first the tokenizer, then, on tokens that are made once, the transformer
    the rest     data, judging what was drawn, pictures, settings

The recipe is VAR's (Tian et al. 2024, arXiv:2404.02905), small enough for two CPU cores and four minutes. The
authors published no training code for their tokenizer; here it is a page. Ours are running means
as codes, rotary positions, relu^2 and Muon; there is no adversarial and no perceptual loss.

Letters in comments: B images in a batch, K = 4 maps, map k has s x s cells ("side" s), L = 85 tokens of an
image, V codes of C numbers, d the transformer's width, H heads, D = d / H, N any number. Blocks between
`# --- shared: NAME` and `# --- end shared` stand word for word in other scripts too: read them once.

    python nano_var.py                      train both, draw 2,000 images, judge, paint: all goes to out/var
    python nano_var.py --data mnist --out out/var_mnist    the same with handwritten digits (11 MB, once)
    python nano_var.py sample --guidance 3   draw from the trained model
    python nano_var.py train --resume       go on after Ctrl-C or a power cut; bit for bit on a CPU
    python nano_var.py --preset gpu         wider, deeper, longer, for one small GPU
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

# ----- pyramid: a latent as four maps of tokens -------------------------------------------------------------
SIDE = 8                                                # of the latent: cells lie 4 pixels apart
SCALES = (1, 2, 4, 8)                                   # sides of the maps, coarse to fine


def area(x, side):
    """Means over the cells of a coarser grid, in reading order: (B, C, 8, 8) -> (B, side^2, C)."""
    return F.adaptive_avg_pool2d(x, side).flatten(2).mT


def split_maps(x, scales=SCALES):
    """(B, L, ...) -> K pieces (B, s^2, ...), one a map; for 1, 2, 4, 8 they begin at slots 0, 1, 5, 21."""
    return x.split([s * s for s in scales], dim=1)


class Pyramid(nn.Module):
    """The multi-scale quantizer (VAR, algorithms 1 and 2): one codebook for all maps.

        total = 0                                       what the maps so far say about the latent f
        for each side s:
            r     = nearest code of area(f - total, s)  the tokens of this map: what is left over, s x s cells
            h     = bicubic(codes[r], 8)                    from s x s back to 8 x 8 cells
            total = total + (h + phi_s(h)) / 2              half of it repaired by phi; s = 8: h itself

    Why what is left over, and not f itself at four sizes? So no map repeats what a coarser one has said, and
    each mends the errors of those before. Codes are then long and short (on glyphs the numbers in codes of
    the 1 x 1 map have root mean square .30, of the 2 x 2 map .06). So, unlike VAR's, they share no length.

    phi is a 3 x 3 convolution that repairs what enlarging has blurred. VAR shares four of them among its ten
    maps; here each map has its own, and the last has none: it is not enlarged.
    """

    def __init__(self, scales, codebook_size, code_dim):
        super().__init__()
        self.scales = scales
        # Codes are running means of the vectors that choose them (van den Oord et al. 2017, appendix A.1),
        # moved by `update`. VAR moves them by gradients; such codebooks easily collapse (see nano_tok.py).
        self.codes = nn.Buffer(torch.zeros(codebook_size, code_dim))    # (V, C)
        self.count = nn.Buffer(torch.zeros(codebook_size))              # weight of what chose it
        self.total = nn.Buffer(torch.zeros(codebook_size, code_dim))    # their sum; code = total / count
        self.phi = nn.ModuleDict({str(s): nn.Conv2d(code_dim, code_dim, 3, padding=1) for s in scales[:-1]})
        for conv in self.phi.values():
            nn.init.dirac_(conv.weight)                 # the identity, to begin with
            nn.init.zeros_(conv.bias)

    def grow(self, tokens, side):
        """Tokens of one map (B, s^2) -> what it says about the latent: (B, C, 8, 8)."""
        h = F.embedding(tokens, self.codes).mT.unflatten(2, (side, side))       # (B, C, s, s)
        if side == SIDE:
            return h
        h = F.interpolate(h, SIDE, mode="bicubic")      # (B, C, 8, 8)
        return (h + self.phi[str(side)](h)) / 2         # half of it as it is, half repaired: as in VAR

    def nearest(self, z, k):
        """Vectors (B, N, C) of map k -> tokens (B, N). All maps choose alike; lesson 32 makes use of k."""
        return kernels.nearest_code(z.flatten(0, 1), self.codes).view(z.shape[:2])

    def encode(self, f):
        """f (B, C, 8, 8) -> tokens (B, L), the K sums after each map, the vectors that were coded (B, L, C).

        The trap: what is left over is f less the sum of the *rounded* maps, so that a finer map can mend what
        a coarser one got wrong. So maps are coded one after the other.
        """
        total, tokens, sums, vectors = torch.zeros_like(f), [], [], []
        for k, side in enumerate(self.scales):
            vectors.append(area(f - total.detach(), side))      # (B, s^2, C)
            tokens.append(self.nearest(vectors[-1], k))         # (B, s^2)
            total = total + self.grow(tokens[-1], side)         # (B, C, 8, 8)
            sums.append(total)
        return torch.cat(tokens, 1), sums, torch.cat(vectors, 1)

    def decode(self, tokens):
        """Tokens (B, L) -> inputs (B, L, C) of the transformer, and the K sums (B, C, 8, 8) after each map.

        The last sum is what the image decoder paints; the others are previews. The input of map k is the sum
        of the maps before it, seen in s x s cells; zeros for the first. It lies cell on cell with the tokens
        to predict, and does not depend on them: no shift by one slot, which a GPT needs.
        """
        total = self.codes.new_zeros(len(tokens), self.codes.shape[1], SIDE, SIDE)
        inputs, sums = [], []
        for side, part in zip(self.scales, split_maps(tokens, self.scales)):
            inputs.append(area(total, side))
            total = total + self.grow(part, side)
            sums.append(total)
        return torch.cat(inputs, 1), sums

    def forward(self, f, rng, maps=None):
        """Training: f -> sum of the first `maps`, with a gradient for f; the pyramid's loss. Moves the codes.

        pull moves every partial sum towards f, which trains phi. commit moves f towards all sums, as in VAR,
        so that latents stay near codes and coarse maps leave little over; its weight 0.25 is VQ-VAE's.
        """
        tokens, sums, vectors = self.encode(f.detach())
        pull = sum(F.mse_loss(s, f.detach()) for s in sums) / len(sums)
        commit = sum(F.mse_loss(f, s.detach()) for s in sums) / len(sums)
        if self.training:
            self.update(gather(vectors), gather(tokens), rng)   # of the whole batch
        # Straight through: choosing a code has no gradient, so f gets that of the sum, as if this were f in
        # the cells of its last map. Not seen + (sum - seen).detach(): phi gets the decoder's gradient too.
        k = (maps or len(sums)) - 1
        seen = F.interpolate(F.adaptive_avg_pool2d(f, self.scales[k]), SIDE, mode="bicubic")    # all maps: f
        return sums[k] + (seen - seen.detach()), pull + 0.25 * commit

    @torch.no_grad()
    def update(self, vectors, tokens, rng, decay=0.95, restart=0.05):
        """code = mean of the vectors (B, L, C) that chose it, the last 1 / (1 - 0.95) = 20 steps or so.

        A code whose count falls below 5 % of its fair share counts as dead: nearly nobody's nearest, it would
        not move again. It starts anew as one of the vectors that are coded badly now. So the codebook begins,
        too: at first all codes are 0, one of them takes every vector, and the other 511 are dead.
        """
        # A vector of map k weighs 1 / s^2. Else the last map, with 64 of 85 vectors, would own the codebook.
        weight = torch.cat([torch.full((s * s,), 1 / s**2) for s in self.scales]).to(vectors)
        weight, z, index = weight.repeat(len(vectors)), vectors.flatten(0, 1), tokens.flatten()  # B * L each
        hits = torch.bincount(index, weight, len(self.codes))                                    # (V,)
        sums = torch.zeros_like(self.codes).index_add_(0, index, z * weight[:, None])            # (V, C)
        self.count.lerp_(hits, 1 - decay)                               # count <- 0.95 count + 0.05 hits
        self.total.lerp_(sums, 1 - decay)
        fair = weight.sum().item() / len(self.codes)
        dead = (self.count < restart * fair).nonzero()[:, 0]
        if len(dead):
            error = weight * (z - self.codes[index]).square().sum(-1) + 1e-12     # not all 0, for multinomial
            again = len(dead) > len(z)                  # more codes than vectors: some are drawn twice
            chosen = torch.multinomial(error.cpu(), len(dead), again, generator=rng).to(z.device)
            self.count[dead], self.total[dead] = fair, z[chosen] * fair     # as if it had its fair share
        self.codes.copy_(self.total / self.count[:, None])


# ----- tokenizer: pixels to latents and back ----------------------------------------------------------------
def norm(x):
    """Mean 0, variance 1 over the last axis, without a learned gain: the next matrix can hold that."""
    return F.layer_norm(x, x.shape[-1:])


class Residual(nn.Module):
    """x + conv(relu(conv(relu(x)))), 3 x 3 cells each; the second starts at 0: no change at first."""

    def __init__(self, width):
        super().__init__()
        # kept as matrices (out, in * 9), which Muon wants; 2 / inputs is the variance that relu needs
        self.first = nn.Parameter(torch.randn(width, width * 9) * (2 / (width * 9)) ** 0.5)
        self.second = nn.Parameter(torch.zeros(width, width * 9))

    def forward(self, x):
        """(B, width, 8, 8) -> the same shape."""
        y = F.conv2d(F.relu(x), self.first.unflatten(1, (-1, 3, 3)), padding=1)
        return x + F.conv2d(F.relu(y), self.second.unflatten(1, (-1, 3, 3)), padding=1)


class Tokenizer(nn.Module):
    """Image -> latent -> tokens -> latent -> image. Images here are floats (B, 32, 32) from 0 to 1."""

    def __init__(self, scales, codebook_size, code_dim, width):
        super().__init__()
        self.stem = nn.Conv2d(1, width, 8, stride=4, padding=2)         # 8 x 8 pixels, 4 apart, make a cell
        self.encoder, self.decoder = Residual(width), Residual(width)
        self.to_code, self.from_code = nn.Linear(width, code_dim), nn.Linear(code_dim, width)
        self.pyramid = Pyramid(scales, codebook_size, code_dim)
        self.paint = nn.ConvTranspose2d(width, 1, 8, stride=4, padding=2)  # patches that overlap: no seams

    def latents(self, images):
        """(B, 32, 32) -> f (B, C, 8, 8). norm: f is made of numbers of one size, however large the stem's."""
        x = self.encoder(self.stem(images[:, None])).flatten(2).mT      # (B, 64, width)
        return self.to_code(norm(x)).mT.unflatten(2, (SIDE, SIDE)).float()

    def picture(self, f):
        """f (B, C, 8, 8) -> images (B, 32, 32) from 0 to 1.

        The sigmoid is for the edges of strokes. Black and white then ask for a sum of patches that is low or
        high enough, whatever its value: patches need not fit to the last digit, and blur less. Without it,
        glyphs of seed 1 come back at 27.3 dB instead of 28.5, and the tokenizer's gFD is 4.6, not 3.5.
        """
        x = self.from_code(f.flatten(2).mT).mT.unflatten(2, (SIDE, SIDE))
        return torch.sigmoid(self.paint(F.relu(self.decoder(x)))[:, 0].float())

    def forward(self, images, rng, maps=None):
        """Training: images -> the same through the tokens of the first maps, and the pyramid's loss."""
        f = self.latents(images)
        with torch.autocast(images.device.type, enabled=False):         # in 16 bits distances are too coarse
            q, extra = self.pyramid(f, rng, maps)
        return self.picture(q), extra


@torch.no_grad()
def encode(images, tokenizer):
    """uint8 images (N, 32, 32) -> tokens (N, L) on the CPU."""
    device, tokens = tokenizer.pyramid.codes.device, []
    for part in images.split(500):
        f = tokenizer.latents(part.to(device) / 255)
        tokens.append(tokenizer.pyramid.encode(f)[0].cpu())
    return torch.cat(tokens)


@torch.no_grad()
def decode(tokens, tokenizer, maps=None):
    """Tokens (N, L) -> uint8 images (N, 32, 32) on the CPU. maps: how many maps to sum up; None: all."""
    device, images = tokenizer.pyramid.codes.device, []
    for part in tokens.split(500):
        _, sums = tokenizer.pyramid.decode(part.to(device))
        painted = tokenizer.picture(sums[(maps or len(sums)) - 1])
        images.append((255 * painted).round().byte().cpu())
    return torch.cat(images)


# ----- transformer: all tokens of a map at once -------------------------------------------------------------
def places(side):
    """Centres of the cells of a map, measured in cells of the 8 x 8 map: (s^2, 2) of (row, column).

    So all maps share one picture: the cells of a 2 x 2 map lie at (1.5, 1.5), (1.5, 5.5), (5.5, 1.5) ...,
    each in the middle of the 16 fine cells that it covers.
    """
    centres = (torch.arange(side) + 0.5) * SIDE / side - 0.5
    return torch.cartesian_prod(centres, centres)


def rope_table(places, head_dim, base=100.0):
    """2-D rotary positions (Su et al. 2021): places (N, 2) -> cosines and sines, (N, D/2) each.

    Numbers j and j + D/2 of a query are a point in the plane. D/4 of these points are turned by an angle
    proportional to the row, D/4 by one proportional to the column, at speeds from 1 radian a cell down; the
    keys likewise. A product q.k then knows how far apart two cells are, whatever maps they belong to.
    """
    quarter = head_dim // 4
    speed = base ** -(torch.arange(quarter) / quarter)  # (D/4,)
    angle = torch.cat([places[:, :1] * speed, places[:, 1:] * speed], dim=1)    # (N, D/2): rows, columns
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turn the points (x_j, x_{j + D/2}) of x (B, H, N, D) by the table's angles, each (N, D/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Block(nn.Module):
    """x + (1 + gate1) attention(norm(x)), then x + (1 + gate2) mlp(norm(x)), both steered by the class.

    Adaptive layer norm (AdaLN, Peebles & Xie 2022, arXiv:2212.09748): norm(x) is stretched and shifted by
    numbers that come from the class, so it speaks at every depth and in every slot; nano_ar says it once, in
    slot 0. One matrix makes these numbers for all blocks (VAR's shared form); offset is each block's own.
    """

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)
        self.up = nn.Linear(dim, 4 * dim, bias=False)
        self.down = nn.Linear(4 * dim, dim, bias=False)
        self.sharpness = nn.Parameter(torch.full((heads, 1, 1), math.log(4.0)))  # its logarithm
        self.offset = nn.Parameter(torch.zeros(6 * dim))
        nn.init.zeros_(self.proj.weight)                # a new block changes nothing
        nn.init.zeros_(self.down.weight)

    def forward(self, x, cos, sin, condition, mask=None, cache=None, start=0):
        """x (B, N, d), slots start .. start + N - 1; condition (B, 6 d) from the class -> (B, N, d).

        Training passes all slots and a mask. Sampling passes one map, and what this layer has kept: a cache
        (2, B, H, L, D) with keys and values of the coarser maps. No mask then: a map sees itself and these.
        """
        B, N, d = x.shape
        steered = (condition + self.offset)[:, None]                    # (B, 1, 6 d)
        gate1, gate2, scale1, scale2, shift1, shift2 = steered.chunk(6, -1)     # (B, 1, d) each
        qkv = self.qkv(norm(x) * (1 + scale1) + shift1).view(B, N, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)            # heads before slots: (B, H, N, D) each
        # Cosine attention: q and k have length 1, so a score is a cosine times the head's sharpness, 4 at
        # first and 100 at most. Lengths without bound would grow in training, till all weight is on one slot.
        q = F.normalize(rotate(q, cos, sin), dim=-1) * self.sharpness.clamp(max=math.log(100)).exp()
        q, k = q.to(v.dtype), F.normalize(rotate(k, cos, sin), dim=-1).to(v.dtype)
        if cache is None:
            y = kernels.attention(q, k, v, mask, scale=1.0)             # (B, H, N, D)
        else:
            cache[0, :, :, start:start + N] = k
            cache[1, :, :, start:start + N] = v
            y = kernels.decode_attention(q, cache[0], cache[1], start + N, scale=1.0, causal=False)
        # 1 + gate, as proj and down begin at 0, so that a block adds nothing yet. (VAR: gate, begun near 0.)
        x = x + (1 + gate1) * self.proj(y.transpose(1, 2).reshape(B, N, d))
        y = F.relu(self.up(norm(x) * (1 + scale2) + shift2)).square()   # relu^2: cheaper than gelu
        return x + (1 + gate2) * self.down(y)


class VAR(nn.Module):
    """p(tokens of a map | class, coarser maps). Slot t predicts token t and reads the sum of coarser maps."""

    def __init__(self, codebook_size, code_dim, classes, scales, dim, depth, heads):
        super().__init__()
        self.scales, self.length = scales, sum(s * s for s in scales)
        self.null = classes                             # one more class, "none", for p(tokens): see `guide`
        self.label = nn.Embedding(classes + 1, dim)
        self.word = nn.Linear(code_dim, dim)            # what the coarser maps say in this cell
        self.place = nn.Parameter(torch.randn(1, dim, SIDE, SIDE) * 0.02)  # where; coarser maps: its means
        self.level = nn.Parameter(torch.randn(len(scales), dim) * 0.02)    # which map
        self.condition = nn.Linear(dim, 6 * dim, bias=False)            # AdaLN of all blocks
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.final = nn.Linear(dim, 2 * dim, bias=False)                # AdaLN of the last norm
        self.head = nn.Linear(dim, codebook_size, bias=False)
        for layer in (self.condition, self.final, self.head):
            nn.init.zeros_(layer.weight)                # all logits 0: the first loss is log 512 = 6.24 nats
        cos, sin = rope_table(torch.cat([places(s) for s in scales]), dim // heads)
        self.register_buffer("cos", cos, persistent=False)  # follows .to(device); computed, so never saved
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, inputs, labels, cache=None, start=0):
        """inputs (B, N, C) of slots start .. start + N - 1, labels (B,) -> logits (B, N, V) of these slots.

        Training: all L slots and no cache. The mask lets a slot see its own map and all coarser ones. Its own
        map may be seen whole, since inputs hold no token of it: that is why a map can be drawn in one call.
        """
        end, label = start + inputs.shape[1], self.label(labels)        # (B, d)
        slots = torch.cat([area(self.place, s)[0] + level for s, level in zip(self.scales, self.level)])
        x = self.word(inputs) + slots[start:end]                        # (B, N, d)
        if start == 0:                                  # slot 0, the 1 x 1 map, reads 0: give it the class
            x = torch.cat([x[:, :1] + label[:, None], x[:, 1:]], 1)
        mask = kernels.scales([s * s for s in self.scales]) if cache is None else None
        label = F.silu(label)
        condition = self.condition(label)               # (B, 6 d)
        for i, block in enumerate(self.blocks):
            kept = None if cache is None else cache[i]  # (2, B, H, L, D)
            x = block(x, self.cos[start:end], self.sin[start:end], condition, mask, kept, start)
        scale, shift = self.final(label)[:, None].chunk(2, -1)
        return self.head(norm(x) * (1 + scale) + shift)

    def new_cache(self, B):
        """Room for all keys and values: (depth, 2, B, H, L, D); 340 KB an image by default."""
        heads, dim = self.blocks[0].heads, self.place.shape[1]
        return self.place.new_zeros(len(self.blocks), 2, B, heads, self.length, dim // heads)


def nats(model, pyramid, tokens, labels):
    """-log p of each token (B, L), given its class and the *true* coarser maps (teacher forcing)."""
    with torch.autocast(tokens.device.type, enabled=False):     # in 32 bits, as in sampling
        inputs, _ = pyramid.decode(tokens)              # (B, L, C)
    logits = model(inputs, labels).float()              # (B, L, V); the softmax always in 32 bits
    return F.cross_entropy(logits.mT, tokens, reduction="none")


# ----- sampling ---------------------------------------------------------------------------------------------
def guide(conditional, unconditional, scale):
    """Classifier-free guidance on logits (Ho & Salimans 2022, eq. 6; their w is scale - 1). 1: plain model.

    A token twice as likely with the class as without gets 2 times its p(token | class) at scale 2, 4 at 3.
    """
    return unconditional + scale * (conditional - unconditional)


@torch.no_grad()
def generate(model, pyramid, labels, rng, guidance=1.0, temperature=1.0, top_p=None, change=None):
    """Draw one image for each label (B,) -> tokens (B, L): one call per map.

    top_p: K numbers; map k is drawn from its likeliest tokens of mass top_p[k]. None: from all of them.
    Guidance grows from 1 (none) at the first map to its full value at the last, as in VAR.

    change(k, total, drawn): may give other tokens (B, s^2) for map k than those drawn. It is told the sum
    (B, C, 8, 8) of the maps before. With it one keeps a part of an image, or swaps its class: lesson 31.
    """
    B, K, guided = len(labels), len(model.scales), guidance != 1
    if guided:                                          # ask twice in one batch: with the class, and without
        labels = torch.cat([labels, torch.full_like(labels, model.null)])
    cache, tokens, start = model.new_cache(len(labels)), [], 0
    total = pyramid.codes.new_zeros(B, pyramid.codes.shape[1], SIDE, SIDE)
    for k, side in enumerate(model.scales):
        inputs = area(total, side)                      # what the coarser maps say: (B, s^2, C)
        logits = model(inputs.repeat(2, 1, 1) if guided else inputs, labels, cache, start)
        if guided:
            strength = 1 + (guidance - 1) * (k / (K - 1) if K > 1 else 1)
            logits = guide(logits[:B], logits[B:], strength)            # (B, s^2, V)
        drawn = kernels.sample(logits, temperature, top_p=top_p[k] if top_p else 1.0, generator=rng)
        if change is not None:
            drawn = change(k, total, drawn)
        tokens.append(drawn)                            # (B, s^2), all cells at once
        total, start = total + pyramid.grow(drawn, side), start + side * side
    return torch.cat(tokens, dim=1)


def draw(config, model, pyramid, labels, change=None):
    """`generate` with settings and seed of the config, 100 at a time -> tokens (N, L) on the CPU.

    Why 100? Measured on a CPU, 250 at a time take more than twice the memory, and a third longer each.

    Only the last map is cut, to its likeliest tokens that hold half of the probability (tail.png shows it
    whole and cut). Not that its probabilities were wrong: of 500 glyphs not trained on, the true token lies
    outside the likeliest ones of mass .9 in 8 % of the cells. But cells are drawn without seeing each other.
    A rare token is fine where its neighbours know of it; here they do not: strokes get ragged, and no call
    comes after to mend them. The likeliest tokens follow from the same coarse maps, so they go together.
    (Not the whole reason: in lesson 30 a model that draws cell after cell gains from the cut, too, if less.)
    The coarse maps stay whole: they decide the hand that the digit is written in; a cut would cost variety.
    """
    device, tokens = model.place.device, []
    rng = rng_at(config.seed, SAMPLING, device=device)
    top_p = [1.0] * (len(model.scales) - 1) + [config.last_top_p]
    for part in tqdm.tqdm(labels.split(100), desc="draw", disable=None, leave=False):
        tokens.append(generate(model, pyramid, part.to(device), rng, config.guidance, config.temperature,
                               top_p, change).cpu())
    return torch.cat(tokens)


# ----- training ---------------------------------------------------------------------------------------------
def train_tokenizer(config, tokenizer, data, dtype=torch.float32, path=None, state=None):
    """Fit the tokenizer to data.train_images -> history, a list of {step, error, psnr, usage}.

    Loss: squared error of the pixels, as a share of their variance (1: no better than a grey image), plus the
    loss of the pyramid. As a share, so that both weigh the same for dark and for bright data. VAR adds a
    perceptual and an adversarial loss, which want pretrained networks; for digits of 32 pixels this will do.

    Every fourth step paints a preview, from the first map, the first two or three in turn; its error weighs a
    tenth (in the history, too). So coarse maps learn to say what they can about the image. They are drawn
    first, and what they have settled, the 64 cells of the last map, which do not see each other, cannot get
    wrong. On glyphs of seed 1 the first three maps alone give 17.0 dB instead of 13.3, all four 28.1 instead
    of 28.5, the transformer needs 231 nats instead of 254, and gFD against fresh glyphs is 5.4, not 8.0.

    dtype, path, state as in `train`. Test images are looked at, and choose nothing.
    """
    device, optimizers = tokenizer.pyramid.codes.device, tokenizer_optimizers(tokenizer, config, dtype)
    first, history, seconds = resume(state, "tokenizer", tokenizer, optimizers) if state else (0, [], 0.0)
    variance, network = (data.train_images / 255).var(), parallel(tokenizer)
    K = len(tokenizer.pyramid.scales)
    every, losses, begun = max(1, config.tok_steps // 4), [], time.time() - seconds
    bar = tqdm.trange(first, config.tok_steps, desc="tokenizer", disable=RANK > 0 or None, leave=False)
    for step in bar:
        chosen = my_part(batch_at(step, len(data.train_images), 128, config.seed))
        images = data.train_images[chosen].to(device) / 255
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            maps = 1 + step // 4 % (K - 1) if step % 4 == 3 and K > 1 else None     # of a preview; None: all
            rebuilt, extra = network.train()(images, rng_at(config.seed, CODEBOOK, step), maps)
        error = F.mse_loss(rebuilt, images) / variance * (0.1 if maps else 1)
        descend(error + extra, optimizers, (config.tok_lr, config.tok_lr / 2), 1 - step / config.tok_steps)
        losses.append(error.detach())                   # not .item(): every reading would wait for the GPU
        if (step + 1) % every == 0 or step + 1 == config.tok_steps:
            mean, some = mean_of(losses, step), data.test_images[:1000]
            tokens = encode(some, tokenizer.eval())
            entry = {"step": step + 1, "error": mean, "psnr": psnr(decode(tokens, tokenizer), some),
                     "usage": usage(tokens, config.codebook)[0]}
            bar.write(f"tokenizer {step + 1:5}   error {mean:.4f} of variance   test {entry['psnr']:.1f} dB")
            history, losses = history + [entry], []
            if path and RANK == 0:
                save(path, {"config": vars(config), "step": step + 1, "history": history,
                            "tokenizer": tokenizer.state_dict(), "seconds": time.time() - begun,
                            "optimizers": [o.state_dict() for o in optimizers]})
    return history


def train(config, model, pyramid, data, dtype=torch.float32, path=None, state=None, **extra):
    """Fit the transformer to data.train_tokens -> history, a list of {step, train, test} in nats per image.

    train: mean since the last report, the class hidden in a tenth of the images; test: at that step, none
    hidden. dtype: of matrix products. path: where the state is kept, with `extra`; None: nowhere. state: what
    an earlier call has kept; training goes on from there.
    """
    device, optimizers = model.place.device, make_optimizers(model, config, dtype)
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
            loss = nats(network, pyramid, data.train_tokens[chosen].to(device), labels.to(device)).mean()
        descend(loss, optimizers, (config.lr, config.lr / 4), 1 - step / config.steps)
        losses.append(loss.detach())
        if (step + 1) % every == 0 or step + 1 == config.steps:
            mean = mean_of(losses, step) * model.length
            test = sum(nats_per_map(model, pyramid, data.test_tokens, data.test_labels))
            bar.write(f"step {step + 1:5}   train {mean:6.1f}   test {test:6.1f} nats per image")
            history, losses = history + [{"step": step + 1, "train": mean, "test": test}], []
            if path and RANK == 0:
                save(path, {"config": vars(config), "step": step + 1, "history": history,
                            "model": model.state_dict(), "seconds": time.time() - begun,
                            "optimizers": [o.state_dict() for o in optimizers], **extra})
    return history


def descend(loss, optimizers, rates, share):
    """One step of both optimizers; share: of the learning rates, on a straight line from 1 to 0."""
    loss.backward()
    for optimizer, lr in zip(optimizers, rates):
        optimizer.param_groups[0]["lr"] = lr * share
        optimizer.step()
        optimizer.zero_grad()


def mean_of(losses, step):
    """Their mean as a number. Not finite: stop before it is saved, so that the old state stays good."""
    mean = gather(torch.stack(losses)).mean().item()
    if not math.isfinite(mean):
        fail(f"the loss is {mean} at step {step + 1}: lower --lr and --tok-lr, or use --precision fp32")
    return mean


def tokenizer_optimizers(tokenizer, config, dtype):
    """Muon for the kernels of the two residual layers, AdamW at half its rate for the layers around them."""
    muon = [*tokenizer.encoder.parameters(), *tokenizer.decoder.parameters()]
    outer = (tokenizer.stem, tokenizer.to_code, tokenizer.pyramid, tokenizer.from_code, tokenizer.paint)
    adam = [p for layer in outer for p in layer.parameters()]
    # beta 0.95 averages squares over 1 / (1 - 0.95) = 20 steps; the usual 0.999 takes 1,000
    return [Muon(muon, config.tok_lr, dtype=dtype),
            torch.optim.AdamW(adam, config.tok_lr / 2, betas=(0.9, 0.95), weight_decay=0.0, fused=True)]


def make_optimizers(model, config, dtype):
    """Muon for matrices inside the blocks; AdamW, at a quarter of its rate, for all else."""
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    vectors = [p for p in model.blocks.parameters() if p.ndim != 2]     # sharpness and offset
    outer = (model.label, model.word, model.condition, model.final, model.head)
    others = [p for layer in outer for p in layer.parameters()]
    return [Muon(matrices, config.lr, dtype=dtype),
            torch.optim.AdamW([*vectors, *others, model.place, model.level], config.lr / 4, betas=(0.9, 0.95),
                              weight_decay=0.0, fused=True)]


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
def nats_per_map(model, pyramid, tokens, labels):
    """-log p(map | class, coarser maps) in nats, means over N images -> K numbers."""
    device, sums = model.place.device, torch.zeros(len(model.scales), dtype=torch.float64)
    for part, label in zip(tokens.split(250), labels.split(250)):
        loss = nats(model, pyramid, part.to(device), label.to(device))  # (250, L)
        sums += torch.stack([m.double().sum().cpu() for m in split_maps(loss, model.scales)])
    return (sums / len(tokens)).tolist()


def unigram_nats(data):
    """The baseline: each slot draws its token from how often training images *of that class* have it there.

    It is told the class, as the transformer is. Counts start at a twentieth: no token may have probability 0.
    """
    L = data.train_tokens.shape[1]
    counts = torch.full((data.classes, L, data.codebook_size), 0.05)
    for tokens, label in zip(data.train_tokens, data.train_labels):
        counts[label, torch.arange(L), tokens] += 1
    log_p = torch.log(counts / counts.sum(-1, keepdim=True))            # (classes, L, V)
    return -log_p[data.test_labels[:, None], torch.arange(L), data.test_tokens].sum(1).mean().item()


def usage(tokens, codebook_size):
    """Tokens -> share of the codes that occur; perplexity exp(entropy), as of so many equal codes."""
    p = torch.bincount(tokens.flatten(), minlength=codebook_size).double() / tokens.numel()
    return (p > 0).double().mean().item(), torch.special.entr(p).sum().exp().item()


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


def evaluate(config, model, tokenizer, data, samples, labels):
    """Judge samples uint8 (N, 32, 32), drawn for labels (N,) -> the metrics, plain numbers.

    Three distances come from one function with one N, so they can be compared: gfd of the samples; gfd_floor
    of real images, those of training; rfd ("r" for reconstructed) of these through the tokenizer alone. The
    judge was trained on these, so a true floor may be a little lower. Lists have a number for each map;
    rpsnr_per_map is that of the sum so far.
    """
    N, device, pyramid = len(samples), model.place.device, tokenizer.pyramid
    judge = train_judge(data.train_images, data.train_labels, data.classes, device, config.seed)
    real, train_labels = data.test_images[:N], data.train_labels[:N]
    floor = image_metrics(judge, data.train_images[:N], train_labels, real)
    tokenizer_alone = image_metrics(judge, decode(data.train_tokens[:N], tokenizer), train_labels, real)
    sums = [decode(data.test_tokens, tokenizer, k + 1) for k in range(len(SCALES))]
    previews = [psnr(images, data.test_images) for images in sums]
    per_map = nats_per_map(model, pyramid, data.test_tokens, data.test_labels)
    share, perplexity = usage(data.test_tokens, data.codebook_size)

    def time_of(B):
        asked = labels[:1].repeat(B).to(device)
        top_p = [1.0] * (len(SCALES) - 1) + [config.last_top_p]
        run = functools.partial(generate, model, pyramid, asked, None, config.guidance, top_p=top_p)
        return milliseconds(lambda: decode(run(), tokenizer)) / B

    return image_metrics(judge, samples, labels, real) | {
        "gfd_floor": floor["gfd"], "rfd": tokenizer_alone["gfd"],
        "rpsnr": previews[-1], "rpsnr_per_map": previews, "usage": share, "perplexity": perplexity,
        "perplexity_per_map": [usage(m, data.codebook_size)[1] for m in split_maps(data.test_tokens)],
        "val_nats_per_image": sum(per_map), "nats_per_map": per_map,
        "unigram_nats_per_image": unigram_nats(data), "calls_per_image": len(SCALES),
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


def draw_pictures(config, model, tokenizer, out, tokens, labels, data):
    """samples.png, nearest.png (is a sample a copy?), maps.png (how it grows), tail.png (why it is cut)."""
    samples, chosen = decode(tokens, tokenizer), by_class(labels, 8)    # (8, columns)
    save_images(out / "samples.png", samples[chosen], "drawn by the model, one column per class")
    some, pool = samples[chosen[:4]], data.train_images                 # (4, columns, 32, 32)
    near = kernels.nearest_code(some.flatten(0, 1).flatten(1).float(), pool.flatten(1).float())
    pairs = torch.stack([some, pool[near].view_as(some)], dim=1).flatten(0, 1)
    save_images(out / "nearest.png", pairs, "odd rows drawn, even rows the nearest of training")
    one = tokens[chosen[0]]                                             # one image a class: (columns, L)
    grown = torch.stack([decode(one, tokenizer, k + 1) for k in range(len(SCALES))])
    save_images(out / "maps.png", grown, "drawn images after the maps 1x1, 2x2, 4x4, 8x8")
    # the same random numbers make the same coarse maps; only the last map differs
    asked, both = labels[chosen[:3]].flatten(), []
    for last_top_p in (1.0, config.last_top_p):
        cut = SimpleNamespace(**{**vars(config), "last_top_p": last_top_p})
        both.append(decode(draw(cut, model, tokenizer.pyramid, asked), tokenizer))
    both = torch.cat(both).view(-1, chosen.shape[1], 32, 32)
    save_images(out / "tail.png", both, "last map from all tokens: 3 rows; from the likeliest: 3")


# ----- settings and main ------------------------------------------------------------------------------------
NAME, PARTS = "nano_var", ("train", "sample", "eval")
FLAGS = {  # name: default, what is allowed (names, or the least number), help
    "data": ("glyphs", None, "glyphs, glyphs-200k, mnist, fashion-mnist, an IDX file or an .npz"),
    "out": ("out/var", None, "folder for checkpoint, pictures, samples.npz and metrics.json"),
    "preset": ("cpu", ("cpu", "gpu"), "other defaults; gpu: for an 8 GB card and half an hour"),
    "seed": (0, 0, "of the data, the weights and the samples"),
    "device": ("auto", ("auto", "cpu", "cuda", "mps"), "where to compute"),
    "precision": ("auto", ("auto", "fp32", "bf16"), "of products in training; auto: bf16 where it is fast"),
    "resume": (False, None, "go on from the last report, kept in OUT/last.pt"),
    "codebook": (512, 2, "number of codes, shared by all maps"),
    "code_dim": (8, 1, "numbers in a code"),
    "width": (64, 8, "channels of the tokenizer's convolutions"),
    "tok_steps": (800, 1, "steps of the tokenizer, 128 images each; the learning rate falls to 0 over them"),
    "tok_lr": (0.02, 0, "its learning rate of Muon; AdamW takes half of it"),
    "dim": (128, 32, "width of the transformer, a multiple of 32: a head has 32 numbers"),
    "depth": (4, 1, "number of its blocks"),
    "steps": (900, 1, "its steps; the learning rate falls to 0 over them, so none can be added"),
    "batch": (32, 1, "images per step of the transformer"),
    "lr": (0.04, 0, "its learning rate of Muon; AdamW takes a quarter of it"),
    "samples": (2000, 10, "images to draw"),
    "guidance": (1.5, 0, "classifier-free guidance at the last map, rising from 1; 1: the plain model"),
    "temperature": (1.0, 0, "divides the logits; 0 takes the most probable token"),
    "last_top_p": (0.5, 0.001, "draw the last map from its likeliest tokens of this mass; 1: from all"),
}
PRESETS = {"cpu": {}, "gpu": dict(data="glyphs-200k", code_dim=16, width=128, tok_steps=6000,
                                  tok_lr=0.01, dim=384, depth=8, steps=4000, batch=256, lr=0.02,
                                  samples=10000)}
FREE = {"samples", "guidance", "temperature", "last_top_p"}  # may differ from the checkpoint's


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


def load_data(config):
    """Images and labels in one namespace; `add_tokens` adds the tokens once there is a tokenizer."""
    names = ("train_images", "train_labels", "test_images", "test_labels")
    data = SimpleNamespace(**dict(zip(names, load_images(config.data, config.seed))))
    data.classes = int(max(data.train_labels.max(), data.test_labels.max())) + 1
    return data


def add_tokens(data, tokenizer):
    """The tokenizer does not change any more, so all images are encoded once, for all steps to come."""
    data.codebook_size = len(tokenizer.pyramid.codes)
    data.train_tokens = encode(data.train_images, tokenizer)            # (N, L)
    data.test_tokens = encode(data.test_images, tokenizer)


def build(config, classes, device):
    """-> Tokenizer and VAR with the sizes of the config, their weights from its seed."""
    torch.manual_seed(config.seed)
    tokenizer = Tokenizer(SCALES, config.codebook, config.code_dim, config.width).to(device)
    model = VAR(config.codebook, config.code_dim, classes, SCALES, config.dim, config.depth, config.dim // 32)
    return tokenizer, model.to(device)


def train_both(config, tokenizer, model, data, dtype, path, state):
    """First the tokenizer, then the transformer on its tokens; or what is missing of them -> last state."""
    history = state.get("tokenizer_history")            # it is kept from the transformer's first report on
    if history is None:                                 # the tokenizer is not finished, or not begun
        history, state = train_tokenizer(config, tokenizer, data, dtype, path, state), None
    else:
        resume(state, "tokenizer", tokenizer)
    add_tokens(data, tokenizer.eval().requires_grad_(False))
    extra = {"tokenizer": tokenizer.state_dict(), "tokenizer_history": history}
    train(config, model, tokenizer.pyramid, data, dtype, path, state, **extra)
    return load(path) if RANK == 0 else {}


def main(argv=None):
    """Do what the command line says -> the metrics; a full run and `eval` write them to OUT/metrics.json."""
    begun, (part, config, state) = time.time(), read_settings(argv)
    if config.dim % 32 or config.last_top_p > 1:
        fail(f"--dim {config.dim} must be a multiple of 32, --last-top-p {config.last_top_p} at most 1")
    if part in ("sample", "eval") and "tokenizer_history" not in state:
        fail(f"the run in {config.out} stopped before the transformer began: finish it by train --resume")
    device, dtype = pick_device(config.device, config.precision)
    meet(device)
    out = pathlib.Path(config.out)
    out.mkdir(parents=True, exist_ok=True)              # now: a wrong --out must not cost the whole run
    data = load_data(config)
    tokenizer, model = build(config, data.classes, device)
    params = [sum(p.numel() for p in network.parameters()) for network in (tokenizer, model)]
    path = kernels.path(model.place)
    print(f"{NAME}: {len(data.train_images):,} training images, {params[0]:,} + {params[1]:,} weights, "
          f"on {device}, products in {str(dtype)[6:]}; kernels: {path.name} ({path.reason})")
    metrics = {"device": str(device), "seed": config.seed, "params": sum(params)}
    if part in ("all", "train"):
        state = train_both(config, tokenizer, model, data, dtype, out / "last.pt", state)
        if RANK:
            return metrics                              # number 0 alone draws and judges
        metrics["tokens_per_second"] = config.steps * config.batch * model.length / state["seconds"]
    else:
        resume(state, "tokenizer", tokenizer)
        add_tokens(data, tokenizer.eval().requires_grad_(False))
    resume(state, "model", model)
    if part in ("all", "sample", "eval"):               # classes as frequent as in the test set
        labels = data.test_labels[torch.arange(config.samples) % len(data.test_labels)]
        tokens = draw(config, model, tokenizer.pyramid, labels)
        samples = decode(tokens, tokenizer)
        packed = io.BytesIO()
        np.savez_compressed(packed, images=samples.numpy(), labels=labels.numpy())
        write(out / "samples.npz", packed.getbuffer())
        draw_pictures(config, model, tokenizer, out, tokens, labels, data)
    if part in ("all", "eval"):
        metrics |= evaluate(config, model, tokenizer, data, samples, labels)
        metrics |= {"history": state["history"], "tokenizer_history": state["tokenizer_history"]}
        metrics["seconds"] = time.time() - begun
        write(out / "metrics.json", json.dumps(metrics, indent=1).encode())
        print_summary(SimpleNamespace(**metrics))
    return metrics


def print_summary(m):
    def row(values, form):
        return "".join(f"{value:>9{form}}" for value in values)
    print(f"""
map            1 x 1    2 x 2    4 x 4    8 x 8
PSNR, dB   {row(m.rpsnr_per_map, ".1f")}    of the sum so far
perplexity {row(m.perplexity_per_map, ".0f")}    of all {m.perplexity:.0f}; {m.usage:.0%} of the codes in use
nats       {row(m.nats_per_map, ".1f")}    in all {m.val_nats_per_image:.1f}
           from class and slot alone {m.unigram_nats_per_image:.1f}
quality    gFD {m.gfd:.2f}; real images {m.gfd_floor:.2f}; tokenizer alone {m.rfd:.2f}
           {m.class_accuracy:.1%} read as the class asked for; diversity {m.diversity:.2f} (real images: 1)
speed      {m.ms_per_image_b1:.0f} ms for one image alone, {m.ms_per_image_b64:.1f} ms in a batch of 64
total      {m.seconds:.0f} s""")


if __name__ == "__main__":
    run_as_program(main)
