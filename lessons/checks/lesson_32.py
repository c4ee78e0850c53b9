"""Checks of lesson 32. Oracles: tokens chosen again in float64 with given wrong ones, laws of random numbers, maps
coded cell by cell, a model built for the list of sizes, waves fitted by least squares, prices code by code, a cache."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

import kernels
import nano_var
from lessons.checks import close, exercise, need


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def toy(cls, scales, V=16, C=4):
    """A pyramid with random codes, in float64."""
    torch.manual_seed(0)
    pyramid = cls(scales, V, C)
    for p in (pyramid.codes, *pyramid.parameters()):
        nn.init.normal_(p, std=0.5)
    return pyramid.double().eval().requires_grad_(False)


def toy_model(scales, V=16, C=4, dim=16, depth=2, seed=1):
    torch.manual_seed(seed)
    model = nano_var.VAR(V, C, 3, scales, dim, depth, 2).double().eval().requires_grad_(False)
    for p in model.parameters():
        p.add_(0.3 * torch.randn(p.shape, generator=seeded(seed), dtype=torch.float64))  # no zeros left in it
    return model


def means(x, side):
    """Means over the cells of a side x side grid, cell by cell; cells overlap where side does not divide 8."""
    cells = []
    for i in range(side):
        for j in range(side):
            block = x[:, :, i * 8 // side:-(-(i + 1) * 8 // side), j * 8 // side:-(-(j + 1) * 8 // side)]
            cells.append(block.mean((2, 3)))
    return torch.stack(cells, 1)  # (B, s^2, C)


def choose(z, codes):
    """The nearest code of each vector by all distances: (B, N, C) -> (B, N)."""
    return (z[:, :, None] - codes).square().sum(-1).argmin(-1)


def enlarge(tokens, codes, side):
    return F.interpolate(codes[tokens].mT.unflatten(2, (side, side)), 8, mode="bicubic")


# --- the slow twins -----------------------------------------------------------------------------------------------


def correct_slowly(f, pyramid, share, rng):
    """Wrong tokens are drawn first, for all maps; then the maps are coded one after the other."""
    V, sizes = len(pyramid.codes), [s * s for s in pyramid.scales]
    hit = torch.bernoulli(torch.full((len(f), sum(sizes)), float(share)), generator=rng).bool()
    other = torch.randint(V - 1, hit.shape, generator=rng)
    fed, targets, sums = [], [], []
    for side, where, new in zip(pyramid.scales, hit.split(sizes, 1), other.split(sizes, 1)):
        z = nano_var.area(f - sum(sums), side) if sums else nano_var.area(f, side)
        targets.append(pyramid.nearest(z, len(targets)))
        wrong = new + (new >= targets[-1])  # any code but the right one
        fed.append(targets[-1].where(~where, wrong))
        sums.append(pyramid.grow(fed[-1], side))
    return torch.cat(fed, 1), torch.cat(targets, 1)


class AbsoluteSlowly(nano_var.Pyramid):
    """Every map codes the whole latent; what counts is the last map that was drawn."""

    def __init__(self, scales, codebook_size, code_dim):
        super().__init__(scales, codebook_size, code_dim)
        self.phi = nn.ModuleDict()

    def grow(self, tokens, side):
        return enlarge(tokens, self.codes, side) if side < 8 else self.codes[tokens].mT.unflatten(2, (8, 8))

    def encode(self, f):
        vectors = [nano_var.area(f, side) for side in self.scales]
        tokens = [self.nearest(z, k) for k, z in enumerate(vectors)]
        sums = [self.grow(t, side) for t, side in zip(tokens, self.scales)]
        return torch.cat(tokens, 1), sums, torch.cat(vectors, 1)

    def decode(self, tokens):
        parts = nano_var.split_maps(tokens, self.scales)
        sums = [self.grow(t, side) for t, side in zip(parts, self.scales)]
        before = [torch.zeros_like(sums[0]), *sums[:-1]]
        return torch.cat([nano_var.area(x, side) for x, side in zip(before, self.scales)], 1), sums


def relist_slowly(model, scales):
    """The tables of a new, tiny model that was built for this list."""
    dim = model.place.shape[1]
    with torch.random.fork_rng(devices=[]):
        fresh = nano_var.VAR(2, 1, 1, tuple(scales), dim, 1, model.blocks[0].heads)
    model.scales, model.length, model.cos, model.sin = fresh.scales, fresh.length, fresh.cos, fresh.sin
    model.level = nn.Parameter(torch.zeros(len(scales), dim), requires_grad=False)
    return model


def waves(side, points):
    """The `side` slowest cosines along a line, at `points` equal cells: (points, side)."""
    t = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    return torch.cos(math.pi * t[:, None] * torch.arange(side))


def lowpass_slowly(x, side):
    """Fit the side x side slowest waves by least squares, read the fit at the centres of the coarse cells."""
    line = (waves(side, side) @ torch.linalg.pinv(waves(side, 8))).to(x)  # (s, 8)
    return torch.einsum("ui,vj,bcij->buvc", line, line, x).flatten(1, 2)


def prices_slowly(z, codes, weight):
    """Code by code: the error without prices, then twice the shares with prices."""
    distance = torch.stack([(z - c).square().sum(-1) for c in codes], 1)  # (N, V)
    D = distance.amin(1).mean()
    price = torch.zeros(len(codes), dtype=z.dtype)
    for _ in range(2):
        chosen = (distance + price).argmin(1)
        counts = torch.stack([(chosen == v).sum() for v in range(len(codes))]) + 0.05
        price = weight * D * (counts.sum().log() - counts.log()).to(z)
    return price


def refine_slowly(big, small, pyramid, labels, rng, top_p):
    """The small model reads the coarse maps one after the other, with a cache."""
    coarse = nano_var.generate(big, pyramid, labels, rng)
    cache, total, start = small.new_cache(len(labels)), 0, 0
    for side in small.scales[:-1]:
        here = torch.zeros(len(labels), pyramid.codes.shape[1], 8, 8).to(pyramid.codes) + total
        small(nano_var.area(here, side), labels, cache, start)
        total = here + pyramid.grow(coarse[:, start:start + side * side], side)
        start += side * side
    logits = small(nano_var.area(total, small.scales[-1]), labels, cache, start)
    return torch.cat([coarse, kernels.sample(logits, 1.0, top_p=top_p, generator=rng)], 1)


# --- the checks ---------------------------------------------------------------------------------------------------


@exercise(
    ("the model is to repeat the wrong tokens", "targets.append(right)", "targets.append(given)"),
    ("later maps do not see what went wrong", "pyramid.grow(given, side)", "pyramid.grow(right, side)"),
    ("the whole latent is coded", "f - total", "f"),
    ("a code may be replaced by itself", "torch.randint(1, V,", "torch.randint(0, V,"),
    ("always by its neighbour", "torch.randint(1, V,", "torch.randint(1, 2,"),
    ("all cells of a map or none", "torch.rand(right.shape, generator=rng)", "torch.rand(len(f), 1, generator=rng)"),
    ("the same cells in all images", "torch.rand(right.shape, generator=rng)", "torch.rand(1, right.shape[1], generator=rng)"),
    ("share of those that stay", "< share", "> share"),
    ("swapped", "return torch.cat(fed, 1), torch.cat(targets, 1)", "return torch.cat(targets, 1), torch.cat(fed, 1)"),
    ("only the first map goes wrong", "< share", "< share * (k == 0)"),
)
def check_correct(correct):
    for scales, B, share in (((8,), 1, 0.5), ((2, 8), 3, 0.3), ((1, 2, 4, 8), 5, 0.2), ((1, 2, 4, 8), 2, 0.0)):
        pyramid = toy(nano_var.Pyramid, scales)
        f = torch.randn(B, 4, 8, 8, generator=seeded(1), dtype=torch.float64)
        fed, targets = correct(f, pyramid, share, seeded(2))
        L = sum(s * s for s in scales)
        need(fed.shape == targets.shape == (B, L), f"shapes {tuple(fed.shape)}, {tuple(targets.shape)}, wanted {(B, L)} twice")
        total, case = torch.zeros_like(f), f"scales {scales}, share {share}"
        for k, (side, given) in enumerate(zip(scales, nano_var.split_maps(fed, scales))):
            start = sum(s * s for s in scales[:k])
            ours = targets[:, start:start + side * side]
            close(ours, choose(means(f - total, side), pyramid.codes), f"{case}: targets of map {k}, given the wrong tokens before it")
            total = total + pyramid.grow(given, side)
        if share == 0:
            close(fed, pyramid.encode(f)[0], "share 0: the tokens of encode")
    for V, share in ((2, 0.3), (5, 0.8), (16, 1.0)):  # 25,600 tokens: rates within four standard errors
        pyramid, f = toy(nano_var.Pyramid, (1, 2, 8), V), torch.randn(400, 4, 8, 8, generator=seeded(3), dtype=torch.float64)
        fed, targets = correct(f, pyramid, share, seeded(4))
        wrong, bound = (fed != targets)[:, 5:].double(), 4 * (share * (1 - share) / 25600) ** 0.5 + 1e-9
        need(abs(wrong.mean() - share) <= bound, f"{V} codes: {wrong.mean():.3f} of the tokens are wrong, wanted {share}")
        coarse = (fed != targets)[:, 1:5].double().mean().item()
        need(abs(coarse - share) <= 4 * (share * (1 - share) / 1600) ** 0.5 + 1e-9, f"2 x 2 map: {coarse:.3f} wrong, wanted {share}")
        for count, what in ((wrong.sum(1), "images"), (wrong.sum(0), "cells")):
            n = 25600 / len(count)
            need(count.var() <= 2 * n * share * (1 - share) + 1e-9, f"the number of wrong tokens differs too much between {what}: not independent")
        shift = ((fed - targets) % V)[:, 5:][wrong.bool()]
        shares = torch.bincount(shift, minlength=V)[1:] / len(shift)
        bound = 5 * (1 / (V - 1) / len(shift)) ** 0.5
        need((shares - 1 / (V - 1)).abs().max() <= bound, f"{V} codes: a wrong token must be any other code, all alike")


@exercise(
    ("residuals after all", "nano_var.area(f, side)", "nano_var.area(f - (sums[-1] if sums else 0), side)"),
    ("sums add up in decode", "total = self.grow(part, side)", "total = total + self.grow(part, side)"),
    ("a map reads itself", "inputs.append(nano_var.area(total, side))\n            total = self.grow(part, side)",
     "total = self.grow(part, side)\n            inputs.append(nano_var.area(total, side))"),
    ("coded at full size", "sums.append(self.grow(tokens[-1], side))", "sums.append(f)"),
    ("the first map begins with a code", "self.codes.new_zeros(B, C, 8, 8)", "self.codes[0][:, None, None].expand(B, -1, 8, 8)"),
    ("all maps read the first", "inputs.append(nano_var.area(total, side))", "inputs.append(nano_var.area((sums or [total])[0], side))"),
    ("sums one map late", "sums.append(total)", "sums.append(total if not inputs[1:] else self.grow(tokens[:, :1], 1))"),
)
def check_Absolute(Absolute):
    for scales, B in (((8,), 1), ((1, 3, 8), 3), ((1, 2, 4, 8), 2), ((1, 5, 6, 7, 8), 2)):
        pyramid, L = toy(Absolute, scales), sum(s * s for s in scales)
        f = torch.randn(B, 4, 8, 8, generator=seeded(1), dtype=torch.float64)
        tokens, sums, vectors = pyramid.encode(f)
        need(tokens.shape == (B, L) and len(sums) == len(scales), f"scales {scales}: {tuple(tokens.shape)} tokens, {len(sums)} sums")
        z = torch.cat([means(f, s) for s in scales], 1)
        close(vectors, z, f"scales {scales}: every map codes f itself, seen in s x s cells")
        close(tokens, choose(z, pyramid.codes), f"scales {scales}: the nearest codes")
        truth = [enlarge(t, pyramid.codes, s) if s < 8 else pyramid.codes[t].mT.unflatten(2, (8, 8))
                 for t, s in zip(nano_var.split_maps(tokens, scales), scales)]
        inputs, again = pyramid.decode(tokens)
        for k in range(len(scales)):
            close(sums[k], truth[k], f"scales {scales}: encode, after map {k} that map alone counts")
            close(again[k], truth[k], f"scales {scales}: decode, after map {k} that map alone counts")
        before = [torch.zeros(B, 4, 8, 8, dtype=torch.float64), *truth[:-1]]
        close(inputs, torch.cat([means(x, s) for x, s in zip(before, scales)], 1), f"scales {scales}: inputs, zeros first, then the map before")
    other = torch.where(torch.arange(L) < L - 64, 15 - tokens, tokens)
    close(pyramid.decode(other)[1][-1], again[-1], "other coarse tokens: the last map holds all, nothing may change")


@exercise(
    ("a cache of the old length", "model.length = tuple(scales), sum(s * s for s in scales)", "model.length = tuple(scales), model.length"),
    ("cells counted, not measured", "nano_var.places(s) for s", "torch.cartesian_prod(torch.arange(s), torch.arange(s)).float() for s"),
    ("levels that learn", "requires_grad=False", "requires_grad=True"),
    ("cosines and sines swapped", "model.cos, model.sin =", "model.sin, model.cos ="),
    ("turned for one head of the whole width", "dim // heads", "dim"),
    ("the old levels cut off", "torch.zeros(len(scales), dim)", "torch.cat([model.level, model.level, model.level])[:len(scales)].clone()"),
    ("the old tables", "model.cos, model.sin =", "cos, sin ="),
    ("a new place for every cell", "return model", "model.place = nn.Parameter(torch.zeros_like(model.place))\n    return model"),
)
def check_relist(relist):
    labels, old = torch.tensor([0, 2]), (1, 2, 4, 8)
    for scales in ((8,), (1, 3, 8), (1, 2, 3, 4, 6, 8), (2, 5, 7, 8), old):
        model, fresh = toy_model(old), toy_model(scales)
        kept = {name: value.clone() for name, value in model.state_dict().items() if name != "level"}
        head, L = model.head.weight, sum(s * s for s in scales)
        ours = relist(model, scales)
        need(ours is model and ours.head.weight is head, "set the model itself and return it: the same weights, not a copy")
        need(tuple(ours.scales) == scales and ours.length == L, f"{scales}: scales {ours.scales}, length {ours.length}, wanted {L}")
        for name, value in kept.items():
            close(ours.state_dict()[name], value, f"{scales}: the weights of {name} must stay")
        table = nano_var.rope_table(torch.cat([nano_var.places(s) for s in scales]), 8)
        need(ours.cos.shape == (L, 4) and ours.sin.shape == (L, 4), f"{scales}: tables {tuple(ours.cos.shape)}, wanted {(L, 4)}")
        close(ours.cos, table[0], f"{scales}: cosines"), close(ours.sin, table[1], f"{scales}: sines")
        need(tuple(ours.level.shape) == (len(scales), 16), f"{scales}: a row of zeros in level for each map")
        need(not ours.level.requires_grad, f"{scales}: a gradient would move level, which the next list throws away")
        fresh.load_state_dict(kept, strict=False)
        nn.init.zeros_(fresh.level)
        x = torch.randn(2, L, 4, generator=seeded(2), dtype=torch.float64)
        close(ours(x, labels), fresh(x, labels), f"{scales}: logits of a model built for this list, with the same weights and no level")
        drawn = nano_var.generate(ours, toy(AbsoluteSlowly, scales), labels, seeded())
        need(drawn.shape == (2, L), f"{scales}: {tuple(drawn.shape)} tokens drawn, wanted {(2, L)}")
    close(relist(relist(model, (1, 8)), old)(x, labels), fresh(x, labels), "to another list and back")


@exercise(
    ("means", "return slow.flatten(2).mT", "return nano_var.area(x, side)"),
    ("a constant changes", "* side / 8", "* 1.0"),
    ("only along one direction", "slow = U.T @ x @ U", "slow = nn.functional.adaptive_avg_pool2d(U.T @ x, side) * (8 / side) ** 0.5"),
    ("the fastest waves", "cosines(8)[:side]", "cosines(8)[-side:]"),
    ("the waves' strengths, not the fit", "slow.flatten(2).mT", "(cosines(side) @ slow @ cosines(side).T).flatten(2).mT"),
    ("columns before rows", "slow.flatten(2).mT", "slow.mT.flatten(2).mT"),
    ("all waves, every few cells", "slow.flatten(2).mT", "x[:, :, ::max(1, 8 // side), ::max(1, 8 // side)][:, :, :side, :side].flatten(2).mT"),
)
def check_lowpass(lowpass):
    for B, C, side in ((1, 1, 1), (2, 3, 2), (2, 3, 3), (3, 4, 4), (1, 8, 5), (2, 2, 8)):
        x = torch.randn(B, C, 8, 8, generator=seeded(side), dtype=torch.float64)
        ours = lowpass(x.float(), side)
        grid = torch.einsum("iu,jv->ijuv", waves(side, 8), waves(side, 8)).reshape(64, -1)  # each wave in 64 cells
        strength = torch.linalg.lstsq(grid, x.reshape(B * C, 64).mT).solution  # (s^2, B C)
        small = torch.einsum("iu,jv->ijuv", waves(side, side), waves(side, side)).reshape(side**2, -1)
        truth = (small @ strength).mT.reshape(B, C, -1).mT
        close(ours, truth, f"{B} x {C} channels, side {side}: least squares, read at the coarse centres", 1e-4)
        close(lowpass(torch.full((1, 1, 8, 8), 3.0), side), torch.full((1, side**2, 1), 3.0), f"side {side}: a constant stays", 1e-4)
    close(lowpass(x.float(), 8), x.flatten(2).mT, "side 8: nothing is lost", 1e-4)


@exercise(
    ("rare codes are cheap", "-torch.log", "torch.log"),
    ("one round", "range(2)", "range(1)"),
    ("shares from the nearest codes alone", "(distance + price)", "(distance)"),
    ("D grows with the prices", "price = weight * D", "D = distance.gather(1, chosen[:, None]).mean()\n        price = weight * D"),
    ("the error is forgotten", "weight * D", "weight"),
    ("distances not squared", ".square()", ".sqrt()"),
    ("bits", "torch.log(", "torch.log2("),
    ("an unused code costs infinitely much", "+ 0.05", "+ 0.0"),
    ("all errors, not the smallest", "distance.amin(1).mean()", "distance.mean()"),
)
def check_prices(prices):
    for N, V, C, weight in ((1, 1, 1, 1.0), (7, 3, 2, 0.5), (400, 16, 4, 0.7), (300, 40, 8, 2.0)):
        z, codes = torch.randn(N, C, generator=seeded(N)), 1.3 * torch.randn(V, C, generator=seeded(V))
        close(prices(z, codes, weight), prices_slowly(z.double(), codes.double(), weight), f"{N} vectors, {V} codes, weight {weight}", 1e-4)
    close(prices(z, codes, 0.0), torch.zeros(V), "weight 0: all codes are free")
    line = torch.tensor([0.0] * 9 + [1.1])[:, None]  # nine vectors on code 0, one near code 1
    price = prices(line, torch.tensor([[0.0], [1.0]]), 1.0)
    close(price, 0.001 * torch.tensor([math.log(10.1 / 9.05), math.log(10.1 / 1.05)]), "the worked number: D = 0.001, shares 9 and 1 of 10", 1e-3)


@exercise(
    ("the small model sees no coarse maps", "pyramid.decode(F.pad(coarse, (0, 64)))", "pyramid.decode(F.pad(0 * coarse, (0, 64)))"),
    ("coarse tokens at the end", "F.pad(coarse, (0, 64))", "F.pad(coarse, (64, 0))"),
    ("the wrong slots", "[:, -64:]", "[:, :64]"),
    ("all from the small model", "torch.cat([coarse, last], 1)", "torch.cat([small(inputs, labels)[:, :-64].argmax(-1), last], 1)"),
    ("no cut", "top_p=top_p", "top_p=1.0"),
    ("no mask: all read at once into a cache", "small(inputs, labels)", "small(inputs, labels, small.new_cache(len(labels)), 0)"),
    ("the likeliest token", "last = kernels.sample(logits, 1.0, top_p=top_p, generator=rng)", "last = logits.argmax(-1)"),
    ("coarse maps cut too", "nano_var.generate(big, pyramid, labels, rng)", "nano_var.generate(big, pyramid, labels, rng, top_p=[top_p] * 3)"),
)
def check_refine(refine):
    for scales, B, top_p in (((1, 8), 1, 1.0), ((1, 2, 4, 8), 5, 0.5), ((1, 2, 4, 8), 3, 0.05)):
        pyramid, labels = toy(nano_var.Pyramid, scales), torch.arange(B) % 3
        big, small = toy_model(scales[:-1]), toy_model(scales, dim=8, depth=1, seed=2)
        ours = refine(big, small, pyramid, labels, seeded(3), top_p)
        L = sum(s * s for s in scales)
        need(ours.shape == (B, L), f"scales {scales}: {tuple(ours.shape)} tokens, wanted {(B, L)}")
        truth = refine_slowly(big, small, pyramid, labels, seeded(3), top_p)
        close(ours[:, :-64], truth[:, :-64], f"scales {scales}: the coarse maps, drawn by the big model from all tokens")
        close(ours, truth, f"scales {scales}, top_p {top_p}: the last map, drawn by the small model that reads map after map")
    whole = toy_model(scales)
    part = toy_model(scales[:-1])
    part.load_state_dict({k: v[:3] if k == "level" else v for k, v in whole.state_dict().items()})
    plain = nano_var.generate(whole, pyramid, labels, seeded(3), top_p=(1, 1, 1, 0.5))
    close(refine(part, whole, pyramid, labels, seeded(3), 0.5), plain, "both models with the same weights: the tokens of generate")
