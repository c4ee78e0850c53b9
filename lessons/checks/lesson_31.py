"""Checks of lesson 31. Oracles: masks and codes cell by cell, an encoder whose reach is known, an enumerated law."""

import itertools
import math

import torch

import nano_var
from lessons.checks import close, exercise, need


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def cells_slowly(mask, side):
    """Pixel by pixel: a cell is known until one of its pixels is found hidden."""
    known, step = torch.ones(side * side, dtype=torch.bool), len(mask) // side
    for row, column in itertools.product(range(len(mask)), repeat=2):
        if not mask[row, column]:
            known[row // step * side + column // step] = False
    return known


def keep_slowly(f, known, pyramid):
    """The hook of exercise 2, one cell after the other."""

    def change(k, total, drawn):
        side, chosen = pyramid.scales[k], drawn.clone()
        step = nano_var.SIDE // side
        for j in known[k].nonzero()[:, 0].tolist():
            row, column = j // side * step, j % side * step
            block = (f - total)[:, :, row:row + step, column:column + step]
            z = block.mean((2, 3))  # (B, C)
            chosen[:, j] = (z[:, None] - pyramid.codes).square().sum(-1).argmin(-1)  # of (B, V) distances
        return chosen

    return change


def leaks_slowly(encode, images, mask, known):
    """The count of exercise 3, token by token."""
    other = images.clone()
    for i in range(len(images)):
        other[i][~mask] = images[i - 1][~mask]
    before, after = encode(images).tolist(), encode(other).tolist()
    shares, start = [], 0
    for where in known:
        changed = count = 0
        for j in where.nonzero()[:, 0].tolist():
            count += len(before)
            changed += sum(a[start + j] != b[start + j] for a, b in zip(before, after))
        shares.append(changed / max(count, 1))
        start += len(where)
    return shares


@exercise(
    ("one known pixel is enough", "blocks.all(3).all(1)", "blocks.any(3).any(1)"),
    ("known and hidden swapped", "blocks.all(3).all(1)", "~blocks.all(3).all(1)"),
    ("most pixels are enough", "blocks.all(3).all(1)", "(blocks.float().mean((1, 3)) > 0.5)"),
    ("the corner stands for the cell", "blocks.all(3).all(1)", "blocks[:, 0, :, 0]"),
    ("rows and columns swapped", "blocks.all(3).all(1)", "blocks.all(3).all(1).T"),
    ("pixels of different cells mixed", "mask.reshape(side, step, side, step)", "mask.reshape(step, side, step, side).transpose(0, 1).transpose(2, 3)"),
    ("only whole columns looked at", "blocks.all(3).all(1)", "blocks.all(3).any(1)"),
)
def check_known_cells(known_cells):
    for n, side in ((1, 1), (6, 3), (5, 5), (32, 1), (32, 4), (32, 8)):
        for seed, share in ((0, 0.02), (1, 0.1), (2, 0.0), (3, 1.0)):
            mask = torch.rand(n, n, generator=seeded(seed)) >= share
            case = f"{n} x {n} pixels, side {side}, {(~mask).sum()} hidden"
            close(known_cells(mask, side), cells_slowly(mask, side), f"{case}: a cell is known if all its pixels are")
    mask = torch.ones(32, 32, dtype=torch.bool)
    mask[9, 30] = False
    close(known_cells(mask, 4), torch.arange(16) != 7, "pixel in row 9, column 30 hidden: cell 7 of the 4 x 4 map")


def toy_pyramid(scales):
    """Random codes and phi, in float64."""
    torch.manual_seed(0)
    pyramid = nano_var.Pyramid(scales, 16, 4)
    for p in (pyramid.codes, *pyramid.parameters()):
        torch.nn.init.normal_(p, std=0.5)
    return pyramid.double().eval().requires_grad_(False)


def copies(f, known, pyramid):
    tokens = nano_var.split_maps(pyramid.encode(f)[0], pyramid.scales)
    return lambda k, total, drawn: torch.where(known[k], tokens[k], drawn)


@exercise(
    ("f itself is coded, not what is left over", "f - total", "f"),
    ("the sign", "f - total", "total - f"),
    ("kept and drawn swapped", "pyramid.nearest(left, k), drawn)", "drawn, pyramid.nearest(left, k))"),
    ("everything kept", "torch.where(known[k], pyramid.nearest(left, k), drawn)", "pyramid.nearest(left, k)"),
    ("nothing kept", "torch.where(known[k], pyramid.nearest(left, k), drawn)", "drawn"),
    ("the picture's own tokens copied", copies),
    ("the first picture's tokens for all", "pyramid.nearest(left, k), drawn)", "pyramid.nearest(left, k)[:1], drawn)"),
)
def check_keep(keep):
    for scales, B in (((8,), 1), ((2, 8), 3), ((1, 2, 4, 8), 2)):
        pyramid, rng = toy_pyramid(scales), seeded(1)
        f = torch.randn(B, 4, 8, 8, generator=rng, dtype=torch.float64)
        known = [torch.rand(s * s, generator=rng) < 0.5 for s in scales]
        change, total = keep(f, known, pyramid), torch.zeros_like(f)
        for k, side in enumerate(scales):
            drawn = torch.randint(16, (B, side * side), generator=rng)
            ours, truth = change(k, total, drawn.clone()), keep_slowly(f, known, pyramid)(k, total, drawn)
            need(ours.shape == drawn.shape, f"scales {scales}, map {k}: shape {tuple(ours.shape)}, wanted {tuple(drawn.shape)}")
            close(ours[:, ~known[k]], drawn[:, ~known[k]], f"scales {scales}, map {k}: unknown cells stay as drawn")
            close(ours[:, known[k]], truth[:, known[k]], f"scales {scales}, map {k}: code what is left over now, f - total")
            total = total + pyramid.grow(truth, side)
    torch.manual_seed(1)
    model = nano_var.VAR(16, 4, 3, (1, 2, 4, 8), 16, 1, 2).double().eval()
    everything, labels = [torch.ones(s * s, dtype=torch.bool) for s in scales], torch.tensor([0, 2])
    given = nano_var.generate(model, pyramid, labels, seeded(), change=keep(f, everything, pyramid))
    close(given, pyramid.encode(f)[0], "all cells known: the tokens of f itself")
    coarse = [torch.full((s * s,), s <= 4) for s in scales]  # super-resolution: 21 tokens given, 64 drawn
    given = nano_var.generate(model, pyramid, labels, seeded(), change=keep(f, coarse, pyramid))
    close(given[:, :21], pyramid.encode(f)[0][:, :21], "three maps known: their tokens are those of f")
    need(not given[:, 21:].equal(pyramid.encode(f)[0][:, 21:]), "three maps known: the last is to be drawn")
    nothing = [~where for where in everything]
    free = nano_var.generate(model, pyramid, labels, seeded(), change=keep(f, nothing, pyramid))
    close(free, nano_var.generate(model, pyramid, labels, seeded()), "no cell known: as without the hook")


def reaching(reach):
    """An encoder that sees its cell and `reach` pixels around it: the token is their sum."""

    def encode(images):
        tokens = []
        for side in nano_var.SCALES:
            step = 32 // side
            for row, column in itertools.product(range(0, 32, step), repeat=2):
                top, left = max(row - reach, 0), max(column - reach, 0)
                block = images[:, top:row + step + reach, left:column + step + reach]
                tokens.append(block.long().sum((1, 2)))
        return torch.stack(tokens, 1)

    return encode


@exercise(
    ("known pixels replaced", "torch.where(mask, images, images.roll(1, 0))", "torch.where(mask, images.roll(1, 0), images)"),
    ("everything replaced", "torch.where(mask, images, images.roll(1, 0))", "images.roll(1, 0)"),
    ("black pixels in their place", "torch.where(mask, images, images.roll(1, 0))", "images * mask"),
    ("shifted within the picture", "images.roll(1, 0)", "images.roll(1, 1)"),
    ("what stays the same", "!=", "=="),
    ("hidden cells counted too", "piece[:, where]", "piece"),
    ("hidden cells instead", "piece[:, where]", "piece[:, ~where]"),
    ("nan for a map without known cells", "kept.double().mean().item() if kept.numel() else 0.0", "kept.double().mean().item()"),
    ("a picture counts once", "kept.double().mean()", "kept.any(1).double().mean()"),
)
def check_leaks(leaks):
    images = torch.tensor([0, 0, 0, 7, 7], dtype=torch.uint8)[:, None, None].repeat(1, 32, 32)
    images[1, 3:29, 3:29] = 1  # differs from its neighbours, but not everywhere
    for seed, reach in ((0, 0), (1, 1), (2, 5), (3, 9)):
        mask = torch.ones(32, 32, dtype=torch.bool)
        row, column = torch.randint(20, (2,), generator=seeded(seed)).tolist()
        mask[row:row + 7, column:column + 11] = False
        known, truth = [cells_slowly(mask, s) for s in nano_var.SCALES], []
        for side, where in zip(nano_var.SCALES, known):
            step, changed = 32 // side, 0.0
            for j in where.nonzero()[:, 0].tolist():
                r, c = j // side * step, j % side * step
                seen = torch.zeros(32, 32, dtype=torch.bool)
                seen[max(r - reach, 0):r + step + reach, max(c - reach, 0):c + step + reach] = True
                for i in range(5):  # values only rise or only fall from one picture to the next: sums cannot cancel
                    changed += bool((images[i] != images[i - 1])[seen & ~mask].any())
            truth.append(changed / max(1, 5 * int(where.sum())))
        ours = leaks(reaching(reach), images.clone(), mask, known)
        need(len(ours) == 4, f"{len(ours)} numbers, wanted one for each of the four maps")
        close(torch.tensor(ours), torch.tensor(truth), f"an encoder that looks {reach} pixels over the border of its cell")


@exercise(
    ("free tokens weigh too", "cost[..., kept]", "cost"),
    ("free tokens alone", "cost[..., kept]", "cost[..., ~kept]"),
    ("the sign", "(-total).softmax(0)", "total.softmax(0)"),
    ("normalised over the pictures", "(-total).softmax(0)", "(-total).softmax(1)"),
    ("the mean instead of the sum", ".sum(-1)", ".mean(-1)"),
    ("e^-400 is 0, and 0 / 0 no number", "(-total).softmax(0)", "(-total).exp() / (-total).exp().sum(0)"),
    ("not normalised", "(-total).softmax(0)", "(total.amin(0) - total).exp()"),
    ("costs taken for weights", "(-total).softmax(0)", "(1 / total) / (1 / total).sum(0)"),
)
def check_weights(weights):
    for M, B, L in ((1, 1, 1), (5, 3, 7), (8, 2, 85)):
        cost, kept = 3 * torch.rand(M, B, L, generator=seeded()), torch.arange(L) % 3 == 0
        truth = torch.zeros(M, B)
        for b in range(B):
            p = [math.exp(-sum(cost[i, b, t].item() for t in range(L) if t % 3 == 0)) for i in range(M)]
            truth[:, b] = torch.tensor([value / sum(p) for value in p])
        close(weights(cost, kept), truth, f"{M} fillings, {B} pictures, {L} tokens", 1e-4)
    far = torch.tensor([400.0, 400.0 + math.log(3)])[:, None, None]
    close(weights(far, torch.tensor([True])), torch.tensor([[0.75], [0.25]]), "costs 400 and 400 + log 3", 1e-4)
    # The law of three bits a, b, c with b kept at 1. Each filling (a, c) is there as often as the model alone
    # would draw it, in 16 draws: then the weights must add up to p(a, c | b = 1).
    p_a, p_b, p_c = {0: 3 / 4, 1: 1 / 4}, {0: 1 / 8, 1: 5 / 8}, {0: 1 / 2, 1: 1 / 4}  # p(a), p(b = 1 | a), p(c = 1 | a)
    fillings = []
    for a, c in itertools.product((0, 1), repeat=2):
        law = p_c[a] if c else 1 - p_c[a]
        fillings += [(a, c, law)] * round(16 * p_a[a] * law)
    cost = torch.tensor([[[-math.log(p_a[a]), -math.log(p_b[a]), -math.log(law)]] for a, c, law in fillings])
    w = weights(cost, torch.tensor([False, True, False]))[:, 0]
    joint = {(a, c): p_a[a] * p_b[a] * (p_c[a] if c else 1 - p_c[a]) for a, c in itertools.product((0, 1), repeat=2)}
    for a, c in joint:
        ours = sum(value for value, (i, j, _) in zip(w.tolist(), fillings) if (i, j) == (a, c))
        close(ours, joint[a, c] / sum(joint.values()), f"p(a = {a}, c = {c} | b = 1) of an enumerated law", 1e-4)
