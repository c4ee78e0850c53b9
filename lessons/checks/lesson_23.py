"""Checks of lesson 23. Oracles: enumeration, pixel loops, and a coder in one unbounded integer that never carries."""

import bz2
import gzip
import io
import itertools
import lzma
import math
import random
from fractions import Fraction

import numpy as np
import torch
from PIL import Image

import nano_ar
from lessons.checks import close, exercise, need

FULL, LEAST = 1 << 64, 1 << 56


def random_law(rng, V, bits):
    """V sizes with the sum 2^bits; every second one is very uneven."""
    if rng.random() < 0.5:
        return [(1 << bits) - V + 1] + [1] * (V - 1)
    cuts = sorted(rng.sample(range(1, 1 << bits), V - 1))
    return [b - a for a, b in zip([0, *cuts], [*cuts, 1 << bits])]


def whole_number(tokens, laws, bits):
    """The interval after all tokens as (low, range, length) in units of 2^-length: one number that only grows longer."""
    low, size, length = 0, FULL, 64
    for token, law in zip(tokens, laws):
        unit = size >> bits
        low, size = low + unit * sum(law[:token]), unit * law[token]
        while size < LEAST:
            low, size, length = low << 8, size << 8, length + 8
    return low, size, length


def shortest(low, size, length):
    """Fewest bytes whose number, with zeros behind, is in the interval, found by trying."""
    for n in range(length // 8 + 1):
        unit = 1 << (length - 8 * n)
        last = (low + size - 1) // unit  # with ones behind it instead of zeros it is outside, unless n is all there is
        if last * unit >= low:
            return last.to_bytes(n, "big")


def messages():
    """(what, tokens, laws, bits): nothing, one token, many, a chain of 255s with a carry, hardly any room for a token."""
    yield "no token", [], [], 16
    yield "one token", [1], [[100, 56, 100]], 8
    for seed, (length, V, bits) in enumerate([(5, 2, 3), (60, 7, 16), (50, 5, 8), (40, 300, 24), (30, 3, 32)]):
        rng = random.Random(seed)
        laws = [random_law(rng, V, bits) for _ in range(length)]
        yield f"{length} tokens, {bits} bits", [rng.randrange(V) for _ in range(length)], laws, bits
    half = [(1 << 15) - 1, 2, (1 << 15) - 1]  # the middle lies across 1/2: 0.7FFFFF..., and nobody knows whether it carries
    for last in (0, 2):
        yield f"20 times the middle token, then token {last}", [1] * 20 + [last], [half] * 21, 16
    yield "the last token of a law, again and again", [3] * 40, [[1, 1, 1, (1 << 16) - 3]] * 40, 16


@exercise(
    ("the end of the token for its start", "sum(sizes[:token])", "sum(sizes[:token + 1])"),
    ("the width is narrowed first", "        low += width * Fraction(sum(sizes[:token]), sum(sizes))\n        width *= Fraction(sizes[token], sum(sizes))\n",
     "        width *= Fraction(sizes[token], sum(sizes))\n        low += width * Fraction(sum(sizes[:token]), sum(sizes))\n"),
    ("low moves as if the interval were whole", "low += width * Fraction", "low += Fraction"),
    ("floating point", "Fraction(sizes[token], sum(sizes))", "(sizes[token] / sum(sizes))"),
    ("the first law for all", "sizes in zip(tokens, laws):", "sizes in zip(tokens, laws[:1] * len(tokens)):"),
    ("every token as wide as any other", "Fraction(sizes[token], sum(sizes))", "Fraction(1, len(sizes))"),
)
def check_interval(interval):
    many = [[1, 2], [3, 1, 1], [5], [1, 9]]
    for laws in ([], [[3, 1]], [[2, 1, 1], [1, 1, 2]], many):
        edge = Fraction(0)
        for tokens in itertools.product(*(range(len(law)) for law in laws)):  # in the order of a dictionary
            low, width = interval(list(tokens), laws)
            probability = math.prod(Fraction(law[token], sum(law)) for token, law in zip(tokens, laws))
            need(width == probability, f"{tokens} under {laws}: width {width}, wanted its probability {probability}")
            need(low == edge, f"{tokens} under {laws}: begins at {low}, but the one before it ends at {edge}")
            edge += probability
    low, width = interval([1] * 200, [[1, 2]] * 200)
    need(width == Fraction(2, 3) ** 200 and low + width == 1, "200 tokens: not exact; is there a float in it?")


@exercise(
    ("tokens of size 0", "1 + (p.double() * ((1 << bits) - V)).long()", "(p.double() * (1 << bits)).long()"),
    ("rounded, and the sum left to chance", "return sizes.scatter_add(-1, sizes.argmax(-1, keepdim=True), left)",
     "return (p.double() * (1 << bits)).round().long().clamp(min=1)"),
    ("nothing set aside for the ones", "((1 << bits) - V)", "(1 << bits)"),
    ("what is left goes to the last token", "sizes.argmax(-1, keepdim=True)", "torch.full_like(left, V - 1)"),
    ("what is left is thrown away", "return sizes.scatter_add(-1, sizes.argmax(-1, keepdim=True), left)", "return sizes"),
    ("floats are returned", "left)", "left).double()"),
)
def check_quantise(quantise):
    rng = torch.Generator().manual_seed(0)
    cases = [(torch.ones(1), 8), (torch.full((4, 512), 1 / 512), 10), (torch.eye(5), 16)]
    for shape, bits, sharp in (((3, 7), 12, 1), ((2, 4, 512), 16, 4), ((6, 256), 24, 20)):
        cases.append((torch.softmax(sharp * torch.randn(shape, generator=rng).double(), -1), bits))
    for p, bits in cases:
        sizes, case, V = quantise(p, bits), f"{tuple(p.shape)}, {bits} bits", p.shape[-1]
        need(sizes.shape == p.shape, f"{case}: shape {tuple(sizes.shape)}")
        need(sizes.dtype == torch.int64, f"{case}: {sizes.dtype}, wanted int64; float sums are rounded")
        need(bool((sizes >= 1).all()), f"{case}: a token has size {sizes.min()}: it can never be written")
        for row in sizes.view(-1, V).tolist():
            need(sum(row) == 1 << bits, f"{case}: a law has the sum {sum(row)}, wanted {1 << bits}")
        for law, row in zip(p.view(-1, V), sizes.view(-1, V)):
            by_p = law.argsort(stable=True)
            need(bool((row[by_p].diff()[law[by_p].diff() > 0] >= 0).all()), f"{case}: a likelier token got fewer places")
            lost = (law.double() * (law.double() / row * (1 << bits)).clamp(min=1e-300).log2()).sum().item()
            most = -math.log2(1 - V / (1 << bits)) + 1e-5
            need(lost <= most, f"{case}: costs {lost:.4f} bits a token, may cost {most:.4f}")


@exercise(
    ("the carry is lost", "            self.out[i] += 1\n", ""),
    ("the carry stops at a 255", "            while self.out[i] == 255:\n                self.out[i] = 0\n                i -= 1\n            self.out[i] += 1\n",
     "            self.out[i] = (self.out[i] + 1) % 256\n"),
    ("255s stay 255", "self.out[i] = 0", "pass"),
    ("at most one byte a token", "while self.range < LEAST:", "if self.range < LEAST:"),
    ("start is not scaled", "self.low += unit * start", "self.low += start"),
    ("low keeps the byte that was written", "(self.low << 8) % FULL", "self.low << 8"),
    ("not flushed", "self.out + bytes([self.low >> 56])", "self.out"),
    ("rounded down, below low", "largest = self.low + self.range - 1", "largest = self.low"),
    ("always one byte more", "drop = 64 if largest >> 64 << 64 >= self.low else 56", "drop = 56"),
    ("the range keeps what low has passed", "self.range = unit * size", "self.range -= unit * start"),
)
def check_Encoder(Encoder):
    for what, tokens, laws, bits in messages():
        encoder = Encoder()
        try:
            for token, law in zip(tokens, laws):
                encoder.put(sum(law[:token]), law[token], bits)
            file = encoder.finish()
        except (ValueError, IndexError, OverflowError) as error:
            need(False, f"{what}: {error}. Is low below 2^64 and range above 0 after each token?")
        low, size, length = whole_number(tokens, laws, bits)
        number, least = Fraction(int.from_bytes(file, "big"), 256 ** len(file)), shortest(low, size, length)
        inside = low <= number * 2**length < low + size
        need(inside, f"{what}: {file[:8].hex(' ')}... is not in the interval, {least[:8].hex(' ')}... would be")
        need(len(file) <= len(least), f"{what}: {len(file)} bytes, {len(least)} are enough")


@exercise(
    ("a place on the edge goes to the token before", "bisect_right(cumulative, place)", "bisect_left(cumulative, place)"),
    ("low is not taken off", "        self.code -= unit * cumulative[token]\n", ""),
    ("the range is not narrowed", "self.range = unit * (cumulative[token + 1] - cumulative[token])", "self.range = unit * cumulative[-1]"),
    ("at most one byte a token", "while self.range < LEAST:", "if self.range < LEAST:"),
    ("ones behind the end of the file", "else 0", "else 255"),
    ("the same byte again and again", "self.range << 8, self.place + 1", "self.range << 8, self.place"),
    ("the first bytes back to front", '"big"', '"little"'),
    ("a float in the place", "self.code // unit", "int(self.code / (self.range / (1 << bits)))"),
    ("starts one byte early", "self.file, self.place, self.range = file, 8, FULL", "self.file, self.place, self.range = file, 7, FULL"),
)
def check_Decoder(Decoder):
    for what, tokens, laws, bits in messages():
        low, size, length = whole_number(tokens, laws, bits)
        lowest = low.to_bytes(length // 8, "big").rstrip(b"\0")  # the first number of the interval is as good as any
        for file in (shortest(low, size, length), lowest):
            decoder = Decoder(file)
            for i, (token, law) in enumerate(zip(tokens, laws)):
                got = decoder.get([0, *itertools.accumulate(law)], bits)
                need(got == token, f"{what}, {len(file)} bytes: token {i} is {got}, wanted {token}")


@exercise(
    ("rounded down", ".round().long()", ".long()"),
    ("as many levels as numbers up to `levels`", "(levels - 1)", "levels"),
    ("256 instead of 255", "/ 255", "/ 256"),
    ("every second pixel instead of the mean", "F.avg_pool2d(images[:, None].float(), 32 // size)",
     "images[:, None, ::32 // size, ::32 // size].float()"),
    ("column by column", ".flatten(1)", ".mT.flatten(1)"),
    ("still a picture", ".flatten(1)", ".squeeze(1)"),
    ("no integers", ".round().long()", ".round()"),
)
def check_pixel_tokens(pixel_tokens):
    rng = torch.Generator().manual_seed(0)
    for n, size, levels in ((1, 8, 2), (3, 16, 16), (2, 32, 256), (2, 16, 5)):
        images, case = torch.randint(256, (n, 32, 32), generator=rng, dtype=torch.uint8), f"{n} images to {size}, {levels} levels"
        tokens, side = pixel_tokens(images, size, levels), 32 // size
        need(tokens.dtype == torch.int64, f"{case}: {tokens.dtype}, wanted int64")
        need(tokens.shape == (n, size * size), f"{case}: shape {tuple(tokens.shape)}, wanted {(n, size * size)}")
        for i, y, x in itertools.product(range(n), range(size), range(size)):
            square = images[i, y * side:(y + 1) * side, x * side:(x + 1) * side].flatten().tolist()
            exact = sum(square) / len(square) * (levels - 1) / 255
            got = tokens[i, y * size + x].item()
            need(abs(got - exact) < 0.5001, f"{case}: row {y}, column {x} is {got}, wanted {exact:.3f} rounded")
        kept = torch.randint(levels, (n, size * size), generator=rng)  # what has only these levels comes back
        grey = (kept / (levels - 1) * 255).round().byte().view(n, size, size)
        again = pixel_tokens(grey.repeat_interleave(side, 1).repeat_interleave(side, 2), size, levels)
        need(again.equal(kept), f"{case}: a picture of {levels} grey levels does not keep them")


def drive(run, labels, tokens):
    """All that a run yields when it is sent the label and then the tokens."""
    seen = [next(run)]
    try:
        seen.append(run.send(labels[:, None]))
        for t in range(tokens.shape[1]):
            seen.append(run.send(tokens[:, t:t + 1]))
    except StopIteration:
        return seen, t + 1 if len(seen) > 1 else 0
    return seen, None


@exercise(
    ("one class too many", "torch.zeros(B, 1, model.null)", "torch.zeros(B, 1, model.null + 1)"),
    ("the class is not looked at", "model.label(label)", "model.label(torch.full_like(label, model.null))"),
    ("every call is the first", "model.step(x, t, cache)", "model.step(x, 0, cache)"),
    ("the cache is thrown away", "model.step(x, t, cache)", "model.step(x, t, model.new_cache(B))"),
    ("what was sent is not read", "x = model.token(token)", "x = x"),
    ("one token too few", "range(model.length)", "range(model.length - 1)"),
    ("a row of laws instead of (B, 1, V)", "model.step(x, t, cache)", "model.step(x, t, cache)[:, 0]"),
    ("all rows read the first row's token", "x = model.token(token)", "x = model.token(token[:1].expand(B, 1))"),
)
@torch.no_grad()
def check_raster(raster):
    for B, V, classes, rows, columns in ((1, 3, 2, 2, 1), (2, 5, 3, 2, 3), (4, 6, 10, 3, 3)):
        with torch.random.fork_rng():
            torch.manual_seed(B)
            model = nano_ar.GPT(V, classes, rows, columns, 32, 2, 1)
            for p in model.parameters():
                torch.nn.init.normal_(p, std=0.3)  # the blocks and the head start at 0: no mistake would show
            labels, tokens = torch.randint(classes, (B,)), torch.randint(V, (B, rows * columns))
        seen, ended = drive(raster(model, B), labels, tokens)
        case, L = f"{B} images of {rows} x {columns} tokens", rows * columns
        need(ended == L, f"{case}: it must end when it was sent the class and {L} tokens, not after {ended} tokens")
        close(seen[0].softmax(-1), torch.full((B, 1, classes), 1 / classes), f"{case}: the law of the class")
        truth = model(tokens, labels)  # the training pass, all slots at once
        for t in range(L):
            close(seen[t + 1], truth[:, t:t + 1], f"{case}: logits of token {t}", 1e-3)


# --- the rivals: no exercise, but each in its best form ---------------------------------------------------------------


def picture_bytes(pixels, kind):
    """uint8 (h, w) as a PNG or lossless WebP file -> its length. PNG: grey, or a palette of 4 bits where that is less."""

    def length(image, **how):
        file = io.BytesIO()
        image.save(file, kind, **how)
        return len(file.getvalue())

    if kind == "WEBP":
        return length(Image.fromarray(pixels).convert("RGB"), lossless=True, quality=100, method=6)
    grey, number = np.unique(pixels, return_inverse=True)
    best = length(Image.fromarray(pixels), optimize=True)
    if len(grey) <= 16:
        image = Image.fromarray(number.reshape(pixels.shape).astype(np.uint8), "P")
        image.putpalette(np.repeat(grey, 3).tolist())
        best = min(best, length(image, bits=4, optimize=True))
    return best


def rivals(pictures, tokens):
    """Bytes of n images, n a multiple of 10: {name: (each in its own file, all in one)}.

    pictures: uint8 (n, h, w), for PNG and WebP; together they are a sheet of 10 columns. tokens (n, L), for the others:
    one byte a token or, where all are below 16, two tokens a byte if that gives a smaller file.
    """
    pictures, codes, (n, h, w) = pictures.numpy(), tokens.byte().numpy(), pictures.shape
    sheet = pictures.reshape(n // 10, 10, h, w).swapaxes(1, 2).reshape(n // 10 * h, 10 * w)
    sizes = {}
    for kind in ("PNG", "WEBP"):
        sizes[kind] = sum(picture_bytes(picture, kind) for picture in pictures), picture_bytes(sheet, kind)
    forms = [codes] if codes.max() > 15 else [codes, codes[:, ::2] * 16 + codes[:, 1::2]]
    for name, squeeze in (("gzip", gzip.compress), ("bz2", bz2.compress), ("lzma", lzma.compress)):
        alone = min(sum(len(squeeze(row.tobytes())) for row in form) for form in forms)
        sizes[name] = alone, min(len(squeeze(form.tobytes())) for form in forms)
    return sizes
