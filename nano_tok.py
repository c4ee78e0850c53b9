"""nano_tok: turn text and pictures into short sequences of integers, the tokens that the other scripts model.

Text is cut into pieces that occur often (byte pair encoding). A picture goes through a small network that is
trained to give it back through a bottleneck of integers:

    32 x 32 image        latents z           index             code vectors q        image again
    +--------+ encoder  +-----------+      +-----------+      +-----------+ decoder +--------+
    |   /|   | -------> | 8x8 cells | ---> | 7 0 12 .. | ---> | 8x8 cells | ------> |   /|   |
    |   _|_  | convolu- | C numbers | near-| integers  | look | C numbers | convolu-|   _|_  |
    +--------+ tions    +-----------+ est  +-----------+ up   +-----------+ tions   +--------+
                              ^              (stored, modelled)     |
                              +----- gradient, "straight through" --+

    loss = mean (image - rebuilt)^2 / variance of the pixels  +  mean (z - constant q)^2, not for fsq

The step from z to an integer has no gradient. So z is handed the gradient of q, as if q were z; the second
term keeps this small lie true, by pulling z to its q. The parts of the file:

    text         byte pair encoding in its plainest form
    quantizers   vectors to integers and back, three ways behind one interface, the dict QUANTIZERS:
                 vq    one codebook, each code the mean of the vectors that choose it (VQ-VAE)
                 rvq   several codebooks, each codes what those before left over (SoundStream)
                 fsq   no codebook: each number rounded to a few levels (Mentzer et al.)
    model        the two networks. With --queries K they meet in K tokens for the whole picture, not in one
                 token a cell; the first are the most important: every prefix decodes (TiTok, One-D-Piece)
    training     one loop; Muon and AdamW
    the rest     data, the health report, export to nano_ar, pictures, settings

Papers: BPE (Sennrich et al. 2016, arXiv:1508.07909). VQ-VAE (van den Oord et al. 2017, arXiv:1711.00937).
SoundStream (Zeghidour et al. 2021, arXiv:2107.03312). FSQ (Mentzer et al. 2023, arXiv:2309.15505). TiTok
(Yu et al. 2024, arXiv:2406.07550). One-D-Piece (Miwa et al. 2025, arXiv:2501.10064). Left out: adversarial
and perceptual losses. They need a second, trained network, and the texture that they invent would hide what
the quantizer itself loses.

Letters in comments: B images in a batch; T places in one, 64 cells or K, of D tokens each; C numbers in a
vector (`code_dim`); V codes in a codebook; D codebooks (rvq: `depth`; else 1); W channels (`width`); H heads;
L levels of a number in fsq; N, M any numbers. Blocks from
`# --- shared: NAME` to `# --- end shared` stand word for word in other scripts too: read them once.

    python nano_tok.py                      text, then images: all goes to out/tok
    python nano_tok.py --quantizer rvq --out out/rvq             twice the tokens, more detail
    python nano_tok.py --queries 16 --code-dim 4 --out out/1d    16 ordered tokens for the whole picture
    python nano_tok.py --data mnist --out out/mnist              handwritten digits (downloads 11 MB once)
    python nano_tok.py bpe --text book.txt --vocab 4096          byte pairs of your own file
    python nano_tok.py train --resume       go on from the last report (there are five); bit for bit on a CPU
    python nano_tok.py --preset gpu         a wider, deeper model, for one small GPU
"""
import argparse, functools, gzip, hashlib, io, itertools, json, math
import os, pathlib, re, sys, time, urllib.request, warnings, zipfile
from collections import Counter, defaultdict
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tqdm

import kernels

# ----- text: byte pair encoding -----------------------------------------------------------------------------
# Tokens 0..255 are the bytes, so that any file can be written; merge number i makes token 256 + i. A merge
# stays inside a chunk: a run of letters, of digits, or of other signs, each with the one space before it; or
# white space. Without chunks the frequent "e t" and "s, a" would become tokens, and "dog", "dog.", "dog!"
# would share none. Bytes from 128 on (every letter outside ASCII, in UTF-8) count as letters. Of white space
# before a word \s+(?!\S) takes all but the last: if that is a space, the word has it.
CHUNKS = rb" ?[A-Za-z\x80-\xff]+| ?[0-9]+| ?[^\sA-Za-z0-9\x80-\xff]+|\s+(?!\S)|\s+"


def merge(ids, pair, new):
    """Replace `pair` in a list of tokens, from the left: [1, 2, 3, 1, 2], (1, 2), 4 -> [4, 3, 4]."""
    out = []
    for i in ids:
        if out and (out[-1], i) == pair:
            out[-1] = new                               # `new` is not in `pair`: aaa gives aa, a
        else:
            out.append(i)
    return out


def train_bpe(text, vocab):
    """bytes -> merges, a list of pairs: as often as asked, the pair that now occurs most becomes a token.

    Of equally frequent pairs the smallest. Each different chunk is kept once, with its number of occurrences:
    "the" may stand a thousand times in a text, it is merged once. Pairs are counted once, and then only the
    chunks that hold the merged pair are counted again. It ends early when no pair occurs twice.

    >>> train_bpe(b"aaabdaaabac", 258)    # aa becomes 256; of ab and (256, a), two each, ab is smaller
    [(97, 97), (97, 98)]
    """
    occurs = Counter(re.findall(CHUNKS, text))
    chunks, weight = [list(chunk) for chunk in occurs], list(occurs.values())
    counts, where = Counter(), defaultdict(set)         # pair -> how often, pair -> in which chunks

    def count(c, sign):
        """Add all pairs of chunk c to the counts (sign 1), or take them out (-1)."""
        for pair in zip(chunks[c], chunks[c][1:]):
            counts[pair] += sign * weight[c]
            where[pair].add(c)                          # a chunk that loses the pair stays: harmless

    for c in range(len(chunks)):
        count(c, 1)
    merges = []
    while len(merges) < vocab - 256 and counts:
        most = max(counts.values())
        if most < 2:
            break
        best = min(pair for pair, n in counts.items() if n == most)
        for c in where.pop(best):
            count(c, -1)
            chunks[c] = merge(chunks[c], best, 256 + len(merges))
            count(c, 1)
        del counts[best]                                # 0 by now
        merges.append(best)
    return merges


class BPE:
    """Text <-> tokens, by a list of merges."""

    def __init__(self, merges):
        self.rank = {tuple(pair): i for i, pair in enumerate(merges)}
        self.bytes = [bytes([i]) for i in range(256)]   # what each token stands for
        for left, right in merges:
            self.bytes.append(self.bytes[left] + self.bytes[right])
        self.known = {}                                 # chunk -> tokens: text repeats its words

    def encode_chunk(self, chunk):
        """One chunk -> tokens: of the merges that fit, always the one learned first.

        Not the longest token that fits: merges are applied in the order in which training made them, so that
        a word comes out here as it did there.
        """
        if chunk not in self.known:
            ids = list(chunk)
            while pairs := [pair for pair in zip(ids, ids[1:]) if pair in self.rank]:
                first = min(pairs, key=self.rank.get)
                ids = merge(ids, first, 256 + self.rank[first])
            self.known[chunk] = ids
        return self.known[chunk]

    def encode(self, text):
        """bytes -> list of tokens."""
        return [token for chunk in re.findall(CHUNKS, text) for token in self.encode_chunk(chunk)]

    def decode(self, ids):
        """Tokens -> bytes. One may end within a letter of UTF-8: join all, and only then call .decode()."""
        return b"".join(self.bytes[i] for i in ids)


# ----- quantizers: vectors to integers and back -------------------------------------------------------------
def straight_through(z, q):
    """The value of q with the gradient of z.

    A step function has slope 0 wherever it has one. Bengio et al. (2013, arXiv:1308.3432) pretend that it is
    1. In torch: add to z a difference that counts as a constant.
    """
    return z + (q - z).detach()


def draw_badly_coded(error, n, rng):
    """Draw n of N points, in proportion to the squared error of each (N,) -> indices (n,).

    Where the error is largest, a new code helps most. If all points were equally likely, most new codes would
    fall where most points are, and on MNIST most cells are black: many codes for one shade. (k-means++ starts
    like this, but draws one by one, and looks again after each: Arthur & Vassilvitskii 2007.)
    """
    # all 0 when each point has a code of its own; nan in a run that diverges, which its report will tell.
    # On the CPU, where rng lives
    weights = error.float().cpu().nan_to_num(nan=0, posinf=0) + 1e-12
    return torch.multinomial(weights, n, replacement=n > len(weights), generator=rng).to(error.device)


def residual_quantize(z, codes):
    """z (N, C), codes (D, V, C) -> index (N, D) and partial sums (D, N, C), the last of them what z becomes.

    Codebook d codes what those before it left over. D = 1 is plain vector quantization.
    Example, C = 1: codebooks {0, 4} and {0, 1}, z = 5.2: 4, rest 1.2, then 1 -> index 1, 1; sums 4, 5
    """
    index, sums, q = [], [], torch.zeros_like(z)
    for codebook in codes:
        index.append(kernels.nearest_code(z - q, codebook))      # (N,)
        q = q + codebook[index[-1]]
        sums.append(q)
    return torch.stack(index, dim=1), torch.stack(sums)


class VectorQuantizer(nn.Module):
    """vq and rvq: codes that are running means. The interface of all quantizers stands at QUANTIZERS.

    Why not train codes by gradient? A code that is nobody's nearest gets none, so it never moves: most of the
    codebook dies in the first steps (lesson 11). Means need no learning rate, and the dead are born again.
    """

    def __init__(self, size, dim, depth=1, decay=0.95, restart=0.05, commitment=1.0):
        super().__init__()
        self.size, self.dim, self.depth = size, dim, depth
        self.decay, self.restart, self.commitment = decay, restart, commitment
        self.codes = nn.Buffer(torch.zeros(depth, size, dim))   # buffers: saved with the model, not trained
        self.count = nn.Buffer(torch.zeros(depth, size))        # vectors of each code, averaged over steps
        self.total = nn.Buffer(torch.zeros(depth, size, dim))   # their sum, likewise: codes = total / count

    def forward(self, z, rng=None):
        """z (B, T, C) -> q (B, T, C), index (B, T, D), loss. In training the codes move, too."""
        points = z.detach().flatten(0, 1)                        # (N, C), N = B T
        if self.training and not self.count.any():               # the very first batch: no codes yet
            self.start(points, rng)
        index, sums = residual_quantize(points, self.codes)
        if self.training:
            self.update(points, index, sums, rng)
        # z is pulled to every partial sum (D, B, T, C), so that few codebooks already say most of it (Lee et
        # al. 2022, arXiv:2203.01941). Only z moves: codes have no gradient
        loss = self.commitment * (z - sums.view(-1, *z.shape)).square().mean()
        return straight_through(z, sums[-1].view_as(z)), index.view(*z.shape[:2], -1), loss

    def lookup(self, index):
        """index (B, T, D) -> q (B, T, C), the sum of the chosen codes. Fewer than D: the first codebooks."""
        return sum(codebook[i] for codebook, i in zip(self.codes, index.unbind(-1)))

    @torch.no_grad()
    def start(self, points, rng):
        """The first codes are vectors of the first batch, the unusual ones preferred; `update` moves them on.

        (k-means on that batch would give a better codebook, but for a network that has learned nothing yet.)
        """
        for d, codebook in enumerate(self.codes):
            unusual = (points - points.mean(0)).square().sum(-1)          # (N,), from the mean: no codes yet
            codebook.copy_(points[draw_badly_coded(unusual, self.size, rng)])
            # as if each had had its fair share of vectors so far: with count 1 it would pass for dead at once
            self.count[d] = len(points) / self.size
            self.total[d] = codebook * self.count[d, :, None]
            points = points - codebook[kernels.nearest_code(points, codebook)]  # what is left for the next

    @torch.no_grad()
    def update(self, points, index, sums, rng):
        """codes = mean of their vectors, old ones forgotten (VQ-VAE, appendix A.1); the dead start anew.

        With n vectors in this batch choosing a code, s their sum, g = decay = 0.95 (a memory of 1 / (1 - g) =
        20 steps):  count <- g count + (1 - g) n,  total <- g total + (1 - g) s,  code = total / count
        """
        fair = len(points) / self.size
        for d, codebook in enumerate(self.codes):
            rest = (points - sums[d - 1]) if d else points       # what this codebook had to code: (N, C)
            number = torch.bincount(index[:, d], minlength=self.size).float()
            self.count[d].lerp_(number, 1 - self.decay)
            self.total[d].lerp_(torch.zeros_like(codebook).index_add_(0, index[:, d], rest), 1 - self.decay)
            dead = (self.count[d] < self.restart * fair).nonzero()[:, 0]
            if len(dead):                                        # they start anew as vectors coded badly
                error = (points - sums[d]).square().sum(-1)      # (N,) after this codebook
                fresh = rest[draw_badly_coded(error, len(dead), rng)]
                self.count[d, dead], self.total[d, dead] = fair, fresh * fair
            codebook.copy_(self.total[d] / self.count[d, :, None])


class FSQ(nn.Module):
    """Finite scalar quantization: every number of z rounded to a few levels (Mentzer et al. 2023).

    All combinations of levels are the codebook: 8, 6, 5 give 240 codes of 3 numbers. Nothing to start, to
    move or to restart, and no second loss. The price: codes stand on a grid, wherever the vectors are.
    """

    def __init__(self, levels):
        super().__init__()
        self.size, self.dim, self.depth = math.prod(levels), len(levels), 1
        self.levels = nn.Buffer(torch.tensor(levels))            # (C,)
        self.place = nn.Buffer(self.levels.cumprod(0) // self.levels)  # (C,) 1, 8, 48: worth of each digit

    def bound(self, z):
        """Squash z so that rounding gives levels[c] integers in number c (their appendix A).

        Odd L: -(L - 1) / 2 .. (L - 1) / 2, by (L - 1) / 2 tanh z. Even L: -L / 2 .. L / 2 - 1, by moving the
        curve half a step down, and z by as much as keeps 0 at 0: atanh, the inverse of tanh, says how much.
        L = 6: 2.5 tanh - .5 runs from -3 to 2, six integers; 0 is met at tanh = .2, so z moves by atanh .2.
        (Their code has tan where the inverse is atanh. The factor 1.001 lets z reach the outermost level.)
        """
        half = (self.levels - 1) * 1.001 / 2
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0)
        return torch.tanh(z + torch.atanh(offset / half)) * half - offset

    def forward(self, z, rng=None):
        """z (B, T, C) -> q in -1 .. 1 of the same shape, index (B, T, 1), loss 0."""
        bounded = self.bound(z)
        digits = bounded.round()
        index = ((digits.long() + self.levels // 2) * self.place).sum(-1, keepdim=True)
        return straight_through(bounded, digits) / (self.levels // 2), index, z.new_zeros(())

    def lookup(self, index):
        """index (B, T, 1) -> q (B, T, C): the digits of a number whose place c has the base levels[c].

        Example: levels 4, 3: index 9 = 1 + 4 * 2, digits 1, 2, less half of the levels -1, 1 -> q -1/2, 1
        """
        return (index // self.place % self.levels - self.levels // 2) / (self.levels // 2)


# A quantizer is a module with `size` V, `dim` C, `depth` D and two functions:
#   quantizer(z, rng=None) -> q, index, loss    z (B, T, C); q the same shape, for the decoder, with the
#                                               gradient of z; index (B, T, D), integers 0 .. V - 1; a scalar
#   quantizer.lookup(index) -> q                the same q, from the integers alone
# Add one of your own: QUANTIZERS["mine"] = a function of the settings; then --quantizer mine.
QUANTIZERS = {
    # with K tokens a weaker pull of z to its code: the same PSNR, and tokens that nano_ar foresees better
    # (60 nats an image, not 70, on MNIST)
    "vq": lambda config: VectorQuantizer(config.codebook, config.code_dim,
                                         commitment=0.25 if config.queries else 1.0),
    "rvq": lambda config: VectorQuantizer(config.codebook, config.code_dim, config.depth),
    "fsq": lambda config: FSQ([int(number) for number in config.levels.split(",")]),
}


# ----- model: an encoder, a bottleneck, a decoder -----------------------------------------------------------
def norm(x):
    """Mean 0, variance 1 over the last axis, without a learned gain."""
    return F.layer_norm(x, x.shape[-1:])


class Residual(nn.Module):
    """x + conv(relu(conv(relu(x)))) with 3 x 3 kernels: x (B, W, 8, 8), W channels -> the same shape.

    The second kernel starts at 0, so the block changes nothing at first. A kernel is kept as the matrix that
    it is, from the 9 W numbers around a cell to the W numbers of the new one: that is what Muon wants.
    """

    def __init__(self, width):
        super().__init__()
        self.first = nn.Parameter(torch.randn(width, width * 9) * (2 / (width * 9)) ** 0.5)
        self.second = nn.Parameter(torch.zeros(width, width * 9))

    def forward(self, x):
        x_new = x
        for kernel in (self.first, self.second):
            x_new = F.conv2d(F.relu(x_new), kernel.unflatten(1, (-1, 3, 3)), padding=1)
        return x + x_new


class Reader(nn.Module):
    """x + attention(norm(x), norm(memory)), then x + mlp(norm(x)): x (B, N, W) reads memory (B, M, W)."""

    def __init__(self, width):
        super().__init__()
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(width, 2 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)
        nn.init.zeros_(self.down.weight)                # but not proj: queries must read something at once

    def forward(self, x, memory):
        q = self.q(norm(x)).unflatten(2, (-1, 16)).transpose(1, 2)        # heads of 16: (B, H, N, 16)
        kv = self.kv(norm(memory)).unflatten(2, (2, -1, 16))             # (B, M, 2, H, 16)
        k, v = kv.permute(2, 0, 3, 1, 4)                                  # (B, H, M, 16) each
        # norm over the 16 numbers of a head: |q| = |k| = 4, so a score q k / 2 reaches 8, twice the usual
        # 16 / sqrt 16 = 4: queries can single a cell out sooner. (.to: norm gives 32 bits, v may have 16.)
        y = kernels.attention(norm(q).to(v.dtype), norm(k).to(v.dtype), v, scale=0.5)
        x = x + self.proj(y.transpose(1, 2).flatten(2))
        return x + self.down(F.relu(self.up(norm(x))).square())


class Queries(nn.Module):
    """x (B, inputs, W) -> (B, outputs, W): learned queries read the inputs, and what they have read goes on.

    As in TiTok. In the encoder K queries read 64 cells; in the decoder 64 queries, its "mask tokens", read K
    tokens. (In TiTok inputs and queries all see one another, in every layer; here convolutions mix the cells,
    and the queries only read.)
    """

    def __init__(self, inputs, outputs, width, blocks):
        super().__init__()
        self.places = nn.Parameter(torch.randn(inputs, width))   # where an input stands: attention sees a set
        self.queries = nn.Parameter(torch.randn(outputs, width))
        self.blocks = nn.ModuleList(Reader(width) for _ in range(blocks))

    def forward(self, x):
        memory = norm(x) + self.places                           # (B, inputs, W)
        x = self.queries.expand(len(x), -1, -1)                  # the same questions for every image
        for block in self.blocks:
            x = block(x, memory)
        return norm(x)


def keep_prefix(x, keep):
    """x (B, T, W), keep (B,) -> x with only the first keep[b] tokens; the rest are 0, and say nothing."""
    kept = torch.arange(x.shape[1], device=x.device) < keep[:, None]      # (B, T)
    return x * kept[..., None]


class Tokenizer(nn.Module):
    """Encoder, quantizer, decoder. queries: K tokens for an image; 0: one for each of its 64 cells.

    The networks are small on purpose: one layer that looks at 8 x 8 pixels, a residual block that lets each
    cell see its neighbours, and the mirror image of both. 1,024 pixels become 64 C numbers (512 at C = 8, no
    great saving), and then 64 integers of 8 bits: the compression is in the rounding.
    """

    def __init__(self, quantizer, width=64, blocks=1, queries=0):
        super().__init__()
        self.quantizer, self.queries = quantizer, queries
        self.nested = queries > 0                       # ordered tokens; lesson 12 switches it off
        self.stem = nn.Conv2d(1, width, 8, stride=4, padding=2)  # a cell sees 8 x 8 pixels, moved by 4
        self.encoder = nn.Sequential(*[Residual(width) for _ in range(blocks)])
        self.gather, self.scatter = nn.Identity(), nn.Identity()
        if queries:
            self.gather = Queries(64, queries, width, blocks + 1)
            self.scatter = Queries(queries, 64, width, blocks + 1)
        # C is small: V = 256 points in W = 64 dimensions are about equally far apart; nearest says little
        self.to_code = nn.Linear(width, quantizer.dim)
        self.scale = nn.BatchNorm1d(quantizer.dim * (queries or 1), affine=False)
        self.from_code = nn.Linear(quantizer.dim, width)
        self.decoder = nn.Sequential(*[Residual(width) for _ in range(blocks)])
        self.paint = nn.ConvTranspose2d(width, 1, 8, stride=4, padding=2)  # patches of 8 x 8 that overlap

    def latents(self, images):
        """float (B, 32, 32) in 0 .. 1 -> z (B, T, C), each number of mean 0 and variance 1 over a batch.

        Why fix it: FSQ's levels lie at fixed places, and a commitment to codes 0.1 away is another loss than
        one to codes 10 away. With queries each of the K tokens has C means and variances of its own. With C
        for all, a token kept to its own region of the codebook, 39 of 256 codes in effective use (MNIST); so
        it makes use of 196.
        """
        cells = norm(self.encoder(self.stem(images[:, None])).flatten(2).mT)  # (B, W, 8, 8) to (B, 64, W)
        z = self.to_code(self.gather(cells)).float()                          # (B, T, C)
        return self.scale(z.reshape(-1, self.scale.num_features)).view_as(z)  # as (B 64, C), or (B, K C)

    def rebuild(self, q, keep=None):
        """q (B, T, C) -> float images (B, 32, 32), not yet limited to 0 .. 1. keep (B,): lengths of prefixes.

        Not q itself is cut: 0 is its mean, and a missing token would look like an average one.
        """
        tokens = self.from_code(q)                               # (B, T, W)
        cells = self.scatter(tokens if keep is None else keep_prefix(tokens, keep))  # (B, 64, W)
        return self.paint(F.relu(self.decoder(cells.mT.unflatten(2, (8, 8)))))[:, 0].float()

    def forward(self, images, rng):
        """Training: float (B, 32, 32) -> rebuilt images, index (B, T, D), the quantizer's loss.

        Nested dropout (Rippel et al. 2014, arXiv:1402.0915) orders the K tokens. A quarter of the images keep
        a random number of their first tokens; the first is always there, so it must say what matters most.
        (One-D-Piece draws one length for a whole batch; a length for each image is less noisy.)
        """
        z = self.latents(images)
        with torch.autocast(images.device.type, enabled=False):  # distances between codes need all 32 bits
            q, index, loss = self.quantizer(z, rng)
        if not self.nested:
            return self.rebuild(q), index, loss
        # one of 1 .. 4 K, where more than K means K: one image in four keeps fewer
        keep = torch.randint(1, 4 * self.queries + 1, (len(q),), generator=rng).clamp(max=self.queries)
        return self.rebuild(q, keep.to(q.device)), index, loss


@torch.no_grad()
def encode(images, model):
    """uint8 images (N, 32, 32) -> tokens (N, T * D), on the CPU. Codebook d has the integers from d V on.

    Call model.eval() first, as `train` does at its end: else codes move, and `scale` uses this batch's mean.
    """
    quantizer, tokens, device = model.quantizer, [], model.stem.weight.device
    for part in images.split(500):
        index = quantizer(model.latents(part.to(device) / 255))[1]                     # (500, T, D)
        # 3 in the first codebook and 3 in the second mean different things, so they are different tokens
        offset = quantizer.size * torch.arange(quantizer.depth, device=device)         # 0, V, 2 V, ...
        tokens.append((index + offset).flatten(1).cpu())
    return torch.cat(tokens)


@torch.no_grad()
def decode(tokens, model, keep=None):
    """tokens (N, T * D) -> uint8 images (N, 32, 32), on the CPU. keep: only so many queries, or codebooks."""
    quantizer, images, device = model.quantizer, [], model.stem.weight.device
    for part in tokens.split(500):
        index = part.to(device).unflatten(1, (-1, quantizer.depth)) % quantizer.size  # (500, T, D)
        q = quantizer.lookup(index if model.queries else index[..., :keep])
        lengths = torch.full((len(q),), keep, device=device) if model.queries and keep else None
        images.append((model.rebuild(q, lengths).clamp(0, 1) * 255).round().byte().cpu())
    return torch.cat(images)


# ----- training ---------------------------------------------------------------------------------------------
def train(config, model, data, dtype=torch.float32, path=None, state=None):
    """Fit the model to data.train_images -> history, a list of {step, error, rpsnr, usage, perplexity}.

    The loss is that of this file's docstring: what the picture lost, and what keeps z near q; no labels.
    Encoder and decoder learn by gradient, the codes of vq and rvq by their own rule.

    error: mean of |image - rebuilt|^2 / variance since the last report; the others on the test images, which
    choose nothing: the learning rate falls to 0, and the last step is the model. dtype: of matrix products.
    path: where the state is kept; None: nowhere. state: what an earlier call has kept, to go on from there.
    """
    device, optimizers = model.stem.weight.device, make_optimizers(model, config, dtype)
    first, history, seconds = resume(state, "model", model, optimizers) if state else (0, [], 0.0)
    # so an image of nothing but the mean grey has error 1, and the commitment weighs the same on any data
    variance = (data.train_images / 255).var().item()
    model.train()                                       # the mode in which the codes move, too
    every, losses, begun = max(1, config.steps // 5), [], time.time() - seconds
    bar = tqdm.trange(first, config.steps, desc="train", disable=None, leave=False)
    for step in bar:
        chosen = batch_at(step, len(data.train_images), config.batch, config.seed)
        images = data.train_images[chosen].to(device) / 255
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            rebuilt, _, commitment = model(images, rng_at(config.seed, CODEBOOK, step))
        error = F.mse_loss(rebuilt, images) / variance
        (error + commitment).backward()
        for optimizer, lr in zip(optimizers, (config.lr, config.lr / 2)):
            optimizer.param_groups[0]["lr"] = lr * (1 - step / config.steps)  # a straight line to 0
            optimizer.step()
            optimizer.zero_grad()
        losses.append(error.detach())
        if (step + 1) % every == 0 or step + 1 == config.steps:
            mean = torch.stack(losses).mean().item()
            if not math.isfinite(mean):                 # stop before it is saved: the old state is good
                fail(f"the loss is {mean} at step {step + 1}: lower --lr, or use --precision fp32")
            report = health(model.eval(), data.test_images)
            model.train()
            bar.write(f"step {step + 1:5}   error {mean:.4f}   test {report['rpsnr']:.2f} dB, "
                      f"{report['usage']:.0%} of the codes in use, perplexity {report['perplexity']:.0f}")
            history, losses = history + [{"step": step + 1, "error": mean, **report}], []
            if path:
                save(path, {"config": vars(config), "step": step + 1, "history": history,
                            "model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers],
                            "seconds": time.time() - begun})
    model.eval()
    return history


BLOCKS = (Residual, Reader)  # modules whose parameters are all matrices, from features to features: for Muon


def make_optimizers(model, config, dtype):
    """Muon for the matrices inside the blocks; AdamW, at half its rate, for all else.

    All else is the layers that touch pixels and code vectors (few inputs or outputs, each with a scale of its
    own), biases, places and queries. The codes are in neither: they are buffers, moved by `update`.
    """
    inside = [p for module in model.modules() if isinstance(module, BLOCKS) for p in module.parameters()]
    taken = {id(p) for p in inside}
    outside = [p for p in model.parameters() if id(p) not in taken]
    return [Muon(inside, config.lr, dtype=dtype),
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


def load_data(config):
    """Images and labels in one namespace, named as in nano_ar."""
    names = ("train_images", "train_labels", "test_images", "test_labels")
    data = SimpleNamespace(**dict(zip(names, load_images(config.data, config.seed))))
    data.classes = int(max(data.train_labels.max(), data.test_labels.max())) + 1
    return data


def load_text(name):
    """`pydoc`, the help topics inside every Python, or a file -> bytes."""
    if name == "pydoc":
        from pydoc_data.topics import topics
        return "\n".join(topics[key] for key in sorted(topics)).encode()
    try:
        text = pathlib.Path(name).read_bytes()
    except OSError as error:
        fail(f"--text {name}: {error.strerror}; give a file, or pydoc")
    if len(text) < 20:
        fail(f"--text {name}: {len(text)} bytes are too few to learn from; give a longer file, or pydoc")
    return text


# ----- evaluation: is the tokenizer healthy? ----------------------------------------------------------------
def psnr(a, b):
    """Peak signal-to-noise ratio of uint8 images in dB: 10 log10 of 255^2 over the mean squared error."""
    return -10 * torch.log10(((a.float() - b.float()) / 255).square().mean()).item()


def usage(index, size):
    """Integers below `size` -> share of them that occurs; perplexity, how many are in effective use.

    Perplexity is exp(entropy): k equally frequent codes have k, and rare ones beside them change it little.
    Over *all* test images: in one batch some codes are always missing, and a healthy codebook looks sick.
    """
    p = torch.bincount(index.flatten(), minlength=size).double() / index.numel()
    return (p > 0).double().mean().item(), torch.special.entr(p).sum().exp().item()  # entr: -p log p


def health(model, images):
    """uint8 images (N, 32, 32) -> PSNR; usage and perplexity of the worst codebook, all T places pooled."""
    tokens, quantizer = encode(images, model), model.quantizer
    each = [usage(index, quantizer.size) for index in (tokens % quantizer.size).view(-1, quantizer.depth).T]
    return {"rpsnr": psnr(decode(tokens, model), images), "usage": min(share for share, _ in each),
            "perplexity": min(perplexity for _, perplexity in each)}


def prefixes(model):
    """What a prefix may be: 1, 2, 4, ... K queries, or 1 .. D codebooks."""
    if not model.queries:
        return list(range(1, model.quantizer.depth + 1))
    return sorted({model.queries, *(2**i for i in range(model.queries.bit_length()))})


def evaluate(model, data):
    """`health` on the test images, and what is needed to judge it -> the metrics, plain numbers.

    bits_per_image: T * D * log2 V, what it takes to write the tokens down. A model of the tokens needs fewer
    (nano_ar's nats / log 2): codes are not equally frequent, and what is near tells about what is next.
    """
    tokens, quantizer = encode(data.test_images, model), model.quantizer
    mean_image = data.train_images.float().mean(0)               # what 0 bits can show
    return health(model, data.test_images) | {
        "tokens_per_image": tokens.shape[1], "bits_per_image": tokens.shape[1] * math.log2(quantizer.size),
        "mean_image_psnr": psnr(mean_image.expand(len(tokens), -1, -1), data.test_images),
        "prefix_psnr": {str(n): psnr(decode(tokens, model, n), data.test_images) for n in prefixes(model)}}


def export(model, data):
    """A namespace that nano_ar.train, draw and evaluate take in place of nano_ar.load_data's.

    tokens = export(model, data)
    gpt = nano_ar.GPT(tokens.codebook_size, tokens.classes, tokens.rows, tokens.columns, 128, 4, 4)
    nano_ar.train(config, gpt, tokens)

    The tokens are arrays (N, L) of integers, L = rows * columns; `decode` is a function from such arrays to
    uint8 images. Nothing else of a tokenizer is known to the generator: that is what makes them exchangeable.
    """
    depth, queries = model.quantizer.depth, model.queries
    return SimpleNamespace(
        **vars(data), decode=functools.partial(decode, model=model),
        codebook_size=depth * model.quantizer.size,
        rows=1 if queries else 8, columns=depth * (queries or 8),  # the D tokens of a cell stand side by side
        train_tokens=encode(data.train_images, model), test_tokens=encode(data.test_images, model))


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


def draw_reconstructions(out, model, data):
    """reconstructions.png: a test image per class, all prefixes of its tokens, twice the last error."""
    shown = data.test_images[by_class(data.test_labels, 1)[0]]   # (columns, 32, 32)
    rows = [shown] + [decode(encode(shown, model), model, n) for n in prefixes(model)]
    rows.append(((rows[-1].int() - shown.int()).abs() * 2).clamp(max=255).byte())
    save_images(out / "reconstructions.png", torch.stack(rows), "originals, prefixes "
                f"of {', '.join(map(str, prefixes(model)))}, error x 2")


def draw_codes(out, model, images):
    """codes.png: what a code of the first codebook stands for, frequent ones first. Only on the grid.

    It is the mean of the 8 x 8 pixels under all cells that chose it, those that the stem has read there. With
    queries there is no such place: a token speaks of the whole picture (lesson 12 shows what each changes).
    """
    quantizer = model.quantizer
    index = encode(images, model)[:, ::quantizer.depth].flatten()                      # (N * 64,)
    cells = F.unfold(images[:, None].float(), 8, stride=4, padding=2).mT.flatten(0, 1)  # (N * 64, 64)
    counts = torch.bincount(index, minlength=quantizer.size)
    means = torch.zeros(quantizer.size, 64).index_add_(0, index, cells) / counts[:, None].clamp(min=1)
    means = means[counts.argsort(descending=True)].round().byte()
    full_rows = means[:quantizer.size // 16 * 16].view(-1, 16, 8, 8)  # a sheet has no half rows
    if len(full_rows):
        save_images(out / "codes.png", full_rows, "what the codes stand for, by frequency")


# ----- settings and main ------------------------------------------------------------------------------------
NAME, PARTS = "nano_tok", ("train", "eval", "bpe")
FLAGS = {  # name: default, what is allowed (names, or the least number), help
    "data": ("glyphs", None, "glyphs, glyphs-200k, mnist, fashion-mnist, an IDX file or an .npz"),
    "text": ("pydoc", None, "pydoc, or any file, for byte pairs"),
    "out": ("out/tok", None, "folder for checkpoint, pictures, tokens.npz, bpe.json and metrics.json"),
    "preset": ("cpu", ("cpu", "gpu"), "other defaults; gpu: for an 8 GB card and half an hour"),
    "seed": (0, 0, "of the data, the weights and the training"),
    "device": ("auto", ("auto", "cpu", "cuda", "mps"), "where to compute"),
    "precision": ("auto", ("auto", "fp32", "bf16"), "of products in training; auto: bf16 where it is fast"),
    "resume": (False, None, "go on from the last report, kept in OUT/last.pt"),
    "vocab": (1024, 256, "entries of the text vocabulary, the 256 bytes included"),
    "quantizer": ("vq", None, "vq, rvq or fsq: how vectors become integers"),
    "codebook": (256, 2, "vq, rvq: codes in a codebook"),
    "code_dim": (8, 1, "vq, rvq: numbers in a code vector"),
    "depth": (2, 1, "rvq: codebooks, that is, tokens for each cell"),
    "levels": ("8,6,5", None, "fsq: levels of each number, 3 or more; their product is the number of codes"),
    "queries": (0, 0, "K ordered tokens for the whole image; 0: a token for each of 64 cells"),
    "width": (64, 16, "channels of the networks, a multiple of 16: a head has 16 numbers"),
    "blocks": (1, 1, "residual blocks in the encoder and in the decoder"),
    "steps": (1000, 1, "optimizer steps; the learning rate falls to 0 over them, so none can be added"),
    "batch": (128, 2, "images per step"),
    "lr": (0.02, 0, "learning rate of Muon; AdamW takes half of it"),
}
PRESETS = {"cpu": {}, "gpu": dict(data="glyphs-200k", width=256, blocks=4, steps=10000, batch=256, lr=0.005)}
FREE = {"text", "vocab"}  # may differ from the checkpoint's
UNUSED = {"vq": {"--depth", "--levels"}, "rvq": {"--levels"}, "fsq": {"--depth", "--codebook", "--code-dim"}}


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


def run_bpe(config, out):
    """Byte pairs of nine tenths of a text, tested on the last -> metrics.

    OUT/bpe.json gets the merges: BPE(json.load(open(path))) reads them back.
    """
    text = load_text(config.text)
    cut, clock = len(text) * 9 // 10, [time.perf_counter()]
    bpe = BPE(train_bpe(text[:cut], config.vocab))
    clock.append(time.perf_counter())
    train_tokens, tokens = bpe.encode(text[:cut]), bpe.encode(text[cut:])
    clock.append(time.perf_counter())
    write(out / "bpe.json", json.dumps(list(bpe.rank)).encode())
    longest = sorted(bpe.bytes, key=len)[-6:]
    print(f"bpe: {len(text) / 1e6:.2f} MB, {len(bpe.bytes)} entries in {clock[1] - clock[0]:.2f} s; encodes "
          f"{len(text) / 1e6 / (clock[2] - clock[1]):.1f} MB/s\n     {cut / len(train_tokens):.2f} bytes per "
          f"token, {(len(text) - cut) / len(tokens):.2f} on the unseen tenth; longest: "
          f"{', '.join(repr(token.decode('utf-8', 'replace')) for token in longest)}")
    return {"bpe_vocab": len(bpe.bytes), "bpe_train_seconds": clock[1] - clock[0],
            "bpe_mb_per_second": len(text) / 1e6 / (clock[2] - clock[1]),
            "bpe_bytes_per_token": (len(text) - cut) / len(tokens)}


def build(config):
    """Settings -> an untrained Tokenizer. To read one back: build, then load_state_dict(state["model"])."""
    if config.quantizer not in QUANTIZERS:
        fail(f"--quantizer {config.quantizer}: choose one of {', '.join(QUANTIZERS)}")
    if not all(number.isdecimal() and int(number) >= 3 for number in config.levels.split(",")):
        fail(f"--levels {config.levels}: must be integers from 3 on with commas between, as in 8,6,5")
    if config.width % 16:
        fail(f"--width {config.width}: must be a multiple of 16 (a head)")
    torch.manual_seed(config.seed)                      # for the weights
    return Tokenizer(QUANTIZERS[config.quantizer](config), config.width, config.blocks, config.queries)


def main(argv=None):
    """Do what the command line says -> the metrics; a full run and `eval` write them to OUT/metrics.json."""
    begun, words = time.time(), sys.argv[1:] if argv is None else list(argv)
    # bpe needs no checkpoint: read its flags as those of a full run. (`--text bpe` is not the word bpe)
    bpe = [i for i, word in enumerate(words) if word == "bpe" and not words[max(0, i - 1)].startswith("--")]
    part, config, state = read_settings([word for i, word in enumerate(words) if i not in bpe])
    for flag in UNUSED.get(config.quantizer, set()) & {word.split("=")[0] for word in words}:
        fail(f"{flag} has no effect on --quantizer {config.quantizer}: drop it, or choose another quantizer")
    out = pathlib.Path(config.out)
    out.mkdir(parents=True, exist_ok=True)              # now: a wrong --out must not cost the whole run
    if bpe or part == "bpe":
        return run_bpe(config, out)
    device, dtype = pick_device(config.device, config.precision)
    model, data = build(config).to(device), load_data(config)
    params = sum(p.numel() for p in model.parameters())
    print(f"{NAME}: {len(data.train_images):,} training images, {params:,} weights, on {device}, products in "
          f"{str(dtype)[6:]}; kernels: {kernels.path(model.stem.weight).name}")
    metrics = {"device": str(device), "seed": config.seed, "params": params}
    if part == "all":
        metrics |= run_bpe(config, out)
    if part in ("all", "train"):
        train(config, model, data, dtype, out / "last.pt", state)
        state = load(out / "last.pt")
        metrics["images_per_second"] = config.steps * config.batch / state["seconds"]
    resume(state, "model", model)
    if part in ("all", "eval"):
        tokens, plain = export(model.eval(), data), {}
        for name in ("train_tokens", "train_labels", "test_tokens", "test_labels"):
            plain[name] = getattr(tokens, name).int().numpy()
        packed = io.BytesIO()
        np.savez_compressed(packed, **plain, rows=tokens.rows, columns=tokens.columns,
                            codebook_size=tokens.codebook_size)
        write(out / "tokens.npz", packed.getbuffer())
        draw_reconstructions(out, model, data)
        if not config.queries:
            draw_codes(out, model, data.test_images)
        metrics |= evaluate(model, data) | {"history": state["history"], "seconds": time.time() - begun}
        write(out / "metrics.json", json.dumps(metrics, indent=1).encode())
        print_summary(SimpleNamespace(**metrics), model.quantizer.size)
    return metrics


def print_summary(m, size):
    healthy = m.perplexity > size / 5
    sick = "" if healthy else "\n             COLLAPSED: fewer codes (--codebook, --levels), or a lower --lr"
    print(f"""
size         {m.tokens_per_image} tokens, {m.bits_per_image:.0f} bits an image; pixels: 8,192 bits
quality      {m.rpsnr:.2f} dB; the mean image alone {m.mean_image_psnr:.2f} dB
prefixes     {', '.join(f'{n}: {value:.2f}' for n, value in m.prefix_psnr.items())} dB
codes        {m.usage:.1%} of {size} in use, perplexity {m.perplexity:.0f} (healthy: above a fifth){sick}
total        {m.seconds:.0f} s""")


if __name__ == "__main__":
    run_as_program(main)
