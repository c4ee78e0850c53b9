"""coder: tokens on disk in as many bits as a model's loss says, and every token back.

Any model that predicts can drive it: pixels, image tokens, scales of a pyramid, text, quantised series. It
comes as a run: a generator that yields logits (B, n, V) for the next n tokens of each of B rows, and is then
sent these tokens (B, n). n and V may change from call to call. A run that knows nothing of a text of bytes:

    def uniform(length):
        for _ in range(length):
            tokens = yield torch.zeros(1, 1, 256)       # one row, one token, 256 equal logits

    files = compress(uniform(5), torch.tensor([[104, 101, 108, 108, 111]]))     # one file, b"hello"
    tokens = decompress(uniform(5), files)              # (1, 5), what went in

One generator serves both directions, so encoder and decoder make the same calls in the same batch shape. The
last bit of a logit depends on that; and where one bit differs, all that follows is noise (lesson 23).

A law is a list of integer sizes, one a token, none 0, with the sum 2^bits. Token s owns the places
cumulative[s] .. cumulative[s + 1] - 1.
"""
import bisect

import torch

BITS = 24  # at most 32: a unit then still has 24 bits, so the remainder of a range is below 2^-24 of it
FULL, LEAST = 1 << 64, 1 << 56  # a range starts at FULL and is kept at LEAST or above, byte by byte


def quantise(p, bits=BITS):
    """Probabilities (..., V) -> int64 sizes (..., V), each at least 1, with the sum 2^bits exactly.

    Everyone gets 1, since a token of size 0 cannot be written, and its share of the 2^bits - V others,
    rounded down. The largest takes what is left, at most V. So 2^-bits V of the uniform law are mixed in.
    """
    V = p.shape[-1]
    sizes = 1 + (p.double() * ((1 << bits) - V)).long()
    left = (1 << bits) - sizes.sum(-1, keepdim=True)    # of integers, so exact: 0 .. V
    return sizes.scatter_add(-1, sizes.argmax(-1, keepdim=True), left)


class Encoder:
    """A range coder. The file is a number in [0, 1) in base 256; a token narrows the interval it lies in.

    out: bytes that are settled, but for a carry. low, range: what is left, in units of the 8th byte behind.
    """

    def __init__(self):
        self.low, self.range, self.out = 0, FULL, bytearray()

    def put(self, start, size, bits=BITS):
        """Narrow the interval to the places start .. start + size - 1 of 2^bits."""
        unit = self.range >> bits
        self.low += unit * start
        self.range = unit * size
        self.carry()
        while self.range < LEAST:                       # the first byte of low is settled: make room behind
            self.out.append(self.low >> 56)
            self.low = (self.low << 8) % FULL
            self.range <<= 8

    def carry(self):
        """Where low has outgrown 8 bytes, add 1 to those before, as in 4999 + 1: 255 becomes 0, passes on."""
        if self.low >= FULL:
            self.low -= FULL
            i = len(self.out) - 1
            while self.out[i] == 255:
                self.out[i] = 0
                i -= 1
            self.out[i] += 1

    def finish(self):
        """-> the file: the fewest bytes that lie in the interval. Readers supply the zeros behind them."""
        largest = self.low + self.range - 1
        drop = 64 if largest >> 64 << 64 >= self.low else 56    # range >= 2^56: one more byte is enough
        self.low = largest >> drop << drop
        self.carry()
        return bytes(self.out + bytes([self.low >> 56])).rstrip(b"\0")


class Decoder:
    """Reads what an Encoder wrote. code: how far the file's number is from low; so nothing has to carry."""

    def __init__(self, file):
        self.file, self.place, self.range = file, 8, FULL
        self.code = int.from_bytes(file[:8].ljust(8, b"\0"), "big")

    def get(self, cumulative, bits=BITS):
        """The law of the next token, as V + 1 integers from 0 to 2^bits -> the token."""
        unit = self.range >> bits
        place = min(self.code // unit, (1 << bits) - 1)  # too large only in a file that other laws wrote
        token = bisect.bisect_right(cumulative, place) - 1  # the last that starts at this place or before
        self.code -= unit * cumulative[token]
        self.range = unit * (cumulative[token + 1] - cumulative[token])
        while self.range < LEAST:
            byte = self.file[self.place] if self.place < len(self.file) else 0
            self.code, self.range, self.place = self.code << 8 | byte, self.range << 8, self.place + 1
        return token


def ask(run, part, bits):
    """Send a run the tokens it waits for (at first None) -> its next laws (B, n, V + 1), at its end None."""
    try:
        logits = run.send(part)
    except StopIteration:
        return None
    sizes = quantise(torch.softmax(logits.double().cpu(), dim=-1), bits)
    return torch.nn.functional.pad(sizes.cumsum(-1), (1, 0)).tolist()  # integers: no sum is ever rounded


@torch.no_grad()
def compress(run, tokens, files=1, bits=BITS):
    """A run, and the tokens (B, L) that it will be sent -> list of files; row b goes to file b % files."""
    encoders, part, done = [Encoder() for _ in range(files)], None, 0
    while (laws := ask(run, part, bits)) is not None:
        part = tokens[:, done:done + len(laws[0])]      # (B, n)
        done += len(laws[0])
        for b, row in enumerate(part.tolist()):
            for token, cumulative in zip(row, laws[b], strict=True):
                encoders[b % files].put(cumulative[token], cumulative[token + 1] - cumulative[token], bits)
    return [encoder.finish() for encoder in encoders]


@torch.no_grad()
def decompress(run, files, bits=BITS, device="cpu"):
    """The same run, started afresh, and the files -> tokens (B, L)."""
    decoders, parts = [Decoder(file) for file in files], [None]
    while (laws := ask(run, parts[-1], bits)) is not None:
        rows = []
        for b, row in enumerate(laws):
            rows.append([decoders[b % len(files)].get(law, bits) for law in row])
        parts.append(torch.tensor(rows, device=device))  # (B, n)
    return torch.cat(parts[1:], dim=1)


def raster(model, B):
    """The run of a nano_ar.GPT over B images: their classes (B, 1), all equally likely, then their tokens.

    The cached step of sampling, in place of the training pass: a decoder has nothing to train on.
    """
    label = yield torch.zeros(B, 1, model.null, device=model.slot.device)
    cache, x = model.new_cache(B), model.label(label)        # x (B, 1, C)
    for t in range(model.length):
        token = yield model.step(x, t, cache)                # (B, 1, V)
        x = model.token(token)


def pixel_tokens(images, size, levels):
    """uint8 (N, 32, 32) -> tokens (N, size^2): grey levels 0 .. levels - 1 of the image at size x size.

    Scaling and rounding lose something. From there on nothing is lost, so the bits of a pixel are exact.
    """
    small = torch.nn.functional.avg_pool2d(images[:, None].float(), 32 // size).flatten(1)
    return (small / 255 * (levels - 1)).round().long()
