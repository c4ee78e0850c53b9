"""Checks of lesson 20. Oracles: slow loops over cells, all small pictures enumerated, networks in float64."""

import itertools
import math
from types import SimpleNamespace

import torch

from lessons.checks import close, exercise, need

GRIDS = ((1, 1), (1, 6), (5, 1), (2, 3), (3, 5), (4, 4), (8, 8))


def integers(V, *shape, seed=0):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


def diagonal_order(rows, columns):
    """Walk along the anti-diagonals, cell by cell: cells, groups, and for each token its two sources with shares."""
    cells, groups, slot = [], [], {}
    sources, weights = [[], []], [[], []]
    for distance in range(rows + columns - 1):
        count = 0
        for i in range(rows):
            j = distance - i
            if not 0 <= j < columns:
                continue
            found = [slot.get((i, j - 1)), slot.get((i - 1, j))]  # left, above
            shares = [float(place is not None) for place in found]
            if not cells:
                found, shares = [0, 0], [1.0, 1.0]
            for k in range(2):
                sources[k].append(found[k] if found[k] is not None else found[1 - k])
                weights[k].append(shares[k] / sum(shares))
            cells.append(i * columns + j)
            slot[i, j] = len(cells)
            count += 1
        groups.append(count)
    return SimpleNamespace(cells=torch.tensor(cells), groups=groups, sources=[torch.tensor(s) for s in sources],
                           weights=torch.tensor(weights))


def mixed(cells):
    """Any order, one token a group."""
    L = len(cells)
    return SimpleNamespace(cells=cells, groups=[1] * L, sources=[torch.arange(L)], weights=torch.ones(1, L))


# --- exercises --------------------------------------------------------------------------------------------------------


@exercise(
    ("the other diagonals", "cell // columns + cell % columns", "cell // columns - cell % columns + columns - 1"),
    ("when each cell is drawn, not which cell", "distance.argsort(stable=True)", "distance.argsort(stable=True).argsort()"),
    ("the lower cell first", "cells = distance.argsort(stable=True)",
     "cells = (distance * len(cell) - cell).argsort()"),
    ("rows and columns mixed up", "cell // columns + cell % columns", "cell // rows + cell % rows"),
    ("raster order", "distance.argsort(stable=True)", "cell"),
    ("the longer of row and column", "cell // columns + cell % columns", "torch.maximum(cell // columns, cell % columns)"),
    ("groups of the rows", "distance.bincount()", "(cell // columns).bincount()"),
    ("where each group ends", "distance.bincount()", "distance.bincount().cumsum(0)"),
)
def check_diagonal(diagonal):
    for rows, columns in GRIDS:
        truth, ours = diagonal_order(rows, columns), diagonal(rows, columns)
        need(isinstance(ours, tuple) and len(ours) == 2, "return cells and groups")
        close(ours[0], truth.cells, f"cells of {rows} x {columns}")
        close(ours[1], truth.groups, f"sizes of the groups of {rows} x {columns}")


@exercise(
    ("the number of the token, not its slot", "torch.arange(rows * columns) + 1", "torch.arange(rows * columns)"),
    ("slots of raster order", "slot[cells] =", "slot[:] ="),
    ("order and its inverse mixed up", "slot[cells] =", "slot[cells.argsort()] ="),
    ("left and above exchanged", "return left, above,", "return above, left,"),
    ("the end of the row above counts as left", "cells % columns > 0", "cells > 0"),
    ("both shares 1", "weights / weights.sum(0)", "weights"),
    ("shares exchanged", "[has_left, has_above]", "[has_above, has_left]"),
    ("always one half", "weights / weights.sum(0)", "torch.full_like(weights, 0.5)"),
    ("the first cell by the right head alone", "weights[:, 0] = 1.0", "weights[0, 0] = 1.0"),
    ("the neighbour on the right", "slot[cells - 1]", "slot[(cells + 1) % len(cells)]"),
)
def check_neighbours(neighbours):
    for rows, columns in GRIDS:
        truth = diagonal_order(rows, columns)
        ours = neighbours(rows, columns, truth.cells)
        need(isinstance(ours, tuple) and len(ours) == 3, "return left, above and weights")
        for name, a, b in zip(("left", "above", "weights"), ours, (*truth.sources, truth.weights)):
            close(a, b, f"{name} of {rows} x {columns}")


@exercise(
    ("the own group hidden", ">= group", "> group"),
    ("transposed", "group[:, None] >= group", "group[:, None] <= group"),
    ("token by token", "group[:, None] >= group", "torch.ones(len(group), len(group)).tril().bool()"),
    ("tokens without the class", "F.pad(group[:-1], (1, 0))", "group"),
    ("the class hidden from itself", ">= group", ">= group.clamp(min=1)"),
    ("the class in the first group", "(torch.tensor(groups)) + 1", "(torch.tensor(groups))"),
    ("only the own group", ">= group", "== group"),
    ("as 0 and 1, not bool", "group[:, None] >= group", "(group[:, None] >= group).float()"),
)
def check_visible(visible):
    for groups in ([1], [1, 1, 1], [1, 2, 2, 1], [2, 3], diagonal_order(3, 5).groups, diagonal_order(8, 8).groups):
        number = [-1]
        for g, size in enumerate(groups):
            number += [g] * size
        L = len(number) - 1
        truth = [[number[j] <= number[i] for j in range(L)] for i in range(L)]
        ours = visible(groups)
        need(torch.is_tensor(ours) and ours.dtype == torch.bool, "return a bool tensor")
        close(ours, truth, f"groups {groups}")


def mutual_information(joint):
    """Entropies instead of a quotient."""
    def entropy(p):
        return -torch.xlogy(p, p).sum()

    return (entropy(joint.sum(0)) + entropy(joint.sum(1)) - entropy(joint)).item()


@exercise(
    ("in bits", "torch.xlogy(joint, joint).sum() - torch.xlogy(joint, apart).sum()",
     "torch.xlogy(joint / apart, joint / apart).mul(apart).nansum() / 0.6931"),
    ("the other way round", "torch.xlogy(joint, joint).sum() - torch.xlogy(joint, apart).sum()",
     "torch.xlogy(apart, apart).sum() - torch.xlogy(apart, joint).sum()"),
    ("0 log 0 is nan", "torch.xlogy(joint, joint).sum()", "(joint * joint.log()).sum()"),
    ("entropy of the pair", "torch.xlogy(joint, joint).sum() - torch.xlogy(joint, apart).sum()",
     "-torch.xlogy(joint, joint).sum()"),
    ("only one marginal", "joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)",
     "joint.sum(1, keepdim=True).expand_as(joint)"),
    ("the same marginal twice", "joint.sum(0, keepdim=True)", "joint.sum(1)"),
    ("averaged over the pairs", "torch.xlogy(joint, joint).sum() - torch.xlogy(joint, apart).sum()",
     "(torch.xlogy(joint, joint) - torch.xlogy(joint, apart)).mean()"),
)
def check_price(price):
    close(price(torch.tensor([[0.5, 0.0], [0.0, 0.5]])), math.log(2), "always equal, two kinds")
    close(price(torch.tensor([[1.0]])), 0.0, "one kind")
    close(price(torch.full((3, 3), 1 / 9)), 0.0, "independent tokens cost nothing")
    for V in (2, 3, 7, 64):
        joint = torch.rand(V, V, generator=torch.Generator().manual_seed(V)).square()
        joint = torch.where(joint < 0.1, 0.0, joint)
        joint[0, 0] += 0.1
        p = (joint / joint.sum()).tolist()
        truth = 0.0
        for a, b in itertools.product(range(V), repeat=2):
            if p[a][b]:
                truth += p[a][b] * math.log(p[a][b] / sum(p[a]) / sum(row[b] for row in p))
        close(price(torch.tensor(p)), truth, f"V = {V}, some pairs never occur", 1e-4)


def mixture(nats):
    """Mean of probabilities in float64, relative to the most probable order."""
    nats = nats.double()
    best = nats.min(0).values
    return best - (best - nats).exp().mean(0).log()


@exercise(
    ("mean of the nats", "torch.tensor(float(len(nats))).log() - (-nats).logsumexp(0)", "nats.mean(0)"),
    ("the best order", "torch.tensor(float(len(nats))).log() - (-nats).logsumexp(0)", "nats.min(0).values"),
    ("sum of the probabilities", "torch.tensor(float(len(nats))).log() - (-nats)", "-(-nats)"),
    ("the sign inside", "torch.tensor(float(len(nats))).log() - (-nats).logsumexp(0)",
     "nats.logsumexp(0) - torch.tensor(float(len(nats))).log()"),
    ("over the pictures", "torch.tensor(float(len(nats))).log() - (-nats).logsumexp(0)",
     "torch.tensor(float(nats.shape[1])).log() - (-nats).logsumexp(1)"),
    ("underflow", "torch.tensor(float(len(nats))).log() - (-nats).logsumexp(0)", "-(-nats).exp().mean(0).log()"),
    ("one number", "(-nats).logsumexp(0)", "(-nats).logsumexp(0).mean()"),
)
def check_mixture_nats(mixture_nats):
    close(mixture_nats(torch.tensor([[0.5], [0.25]]).log().neg()), [-math.log(3 / 8)], "1/2 and 1/4")
    for K, N, size in ((1, 3, 1), (4, 1, 5), (3, 7, 40), (8, 5, 900)):
        nats = size * (1 + torch.rand(K, N, generator=torch.Generator().manual_seed(K)) / 50)
        close(mixture_nats(nats), mixture(nats).float(), f"{K} orders, {N} pictures of about {size} nats")


class Law:
    """Stands for a network: the logits of a group are a fixed function of all that was read before, and of the class."""

    def __init__(self, order, V, classes=2):
        L = len(order.cells)
        self.order, self.length, self.null, self.V, rng = order, L, classes, V, torch.Generator().manual_seed(L)
        self.classes, self.words = torch.randn(classes + 1, 4, generator=rng), torch.randn(V, 4, generator=rng)
        self.weight = torch.randn(L, L, 4, V, generator=rng) * 2 / math.sqrt(L)  # slot, token, what is read, logit

    def label(self, labels):
        return self.classes[labels]

    def token(self, tokens):
        return self.words[tokens]

    def new_cache(self, B):
        return [B]

    def step(self, x, g, cache):
        need(g == len(cache) - 1, f"model.step was called for group {g}, wanted group {len(cache) - 1}")
        need(x.shape[0] == cache[0], f"the cache was made for a batch of {cache[0]}, x has {x.shape[0]}")
        size = self.order.groups[g - 1] if g else 1
        need(x.shape[1] == size, f"group {g} must read the {size} slots of the group before, not {x.shape[1]}")
        cache.append(x)
        start, end = sum(self.order.groups[:g]), sum(self.order.groups[:g + 1])
        return self.logits(torch.cat(cache[1:], 1), start, end)

    def logits(self, read, start, end):
        """read (B, slots, 4) -> (B, end - start, V)"""
        return torch.einsum("bsc,stcv->btv", read, self.weight[:read.shape[1], start:end])

    def probabilities(self, tokens, labels, guidance=1.0, temperature=1.0):
        """(N, L) in raster order -> the law of each token (N, L, V), in the order of drawing, by one loop over tokens."""
        ordered, rows, seen = tokens[:, self.order.cells], [], 0
        for size in self.order.groups:
            for t in range(seen, seen + size):
                both = []
                for c in (labels, torch.full_like(labels, self.null)):
                    read = torch.cat([self.classes[c][:, None], self.words[ordered[:, :seen]]], 1)
                    both.append(self.logits(read, t, t + 1)[:, 0])
                rows.append(((both[1] + guidance * (both[0] - both[1])) / temperature).softmax(-1))
            seen += size
        return torch.stack(rows, 1)


@exercise(
    ("left in the order of drawing", "torch.cat(groups, 1)[:, cells.argsort()]", "torch.cat(groups, 1)"),
    ("order and its inverse mixed up", "[:, cells.argsort()]", "[:, cells]"),
    ("kept tokens looked up in the order of drawing", "given[:, group] >= 0, given[:, group]",
     "given[:, sum(model.order.groups[:g]):][:, :len(group)] >= 0, given[:, sum(model.order.groups[:g]):][:, :len(group)]"),
    ("kept tokens returned, drawn ones read", "x = model.token(tokens.repeat(2, 1) if guided else tokens)",
     "drawn = kernels.sample(logits, temperature, top_p=top_p, generator=rng); "
     "x = model.token(drawn.repeat(2, 1) if guided else drawn)"),
    ("the two models exchanged", "guide(logits[:B], logits[B:], guidance)", "guide(logits[B:], logits[:B], guidance)"),
    ("guided only with itself", "torch.full_like(labels, model.null)", "labels"),
    ("no temperature", "kernels.sample(logits, temperature,", "kernels.sample(logits, 1.0,"),
    ("no nucleus", "top_p=top_p", "top_p=1.0"),
    ("other random numbers each time", "generator=rng", "generator=None"),
    ("one token for the whole group", "generator=rng)", "generator=rng)[:, :1].expand(-1, len(group))"),
)
def check_generate(generate):
    def rng(seed=0):
        return torch.Generator().manual_seed(seed)

    for rows, columns in ((1, 1), (2, 3), (3, 4), (5, 2)):
        law, labels = Law(diagonal_order(rows, columns), 5), torch.tensor([0, 1, 1])
        case = f"grid {rows} x {columns}"
        for guidance in (1.0, 1.7):
            greedy = generate(law, labels, rng(), guidance=guidance, temperature=0)
            need(tuple(greedy.shape) == (3, rows * columns), f"{case}: shape {tuple(greedy.shape)}")
            best = law.probabilities(greedy, labels, guidance).argmax(-1)
            close(greedy[:, law.order.cells], best, f"{case}, guidance {guidance}: temperature 0 must take the likeliest")
        close(generate(law, labels, rng(), top_p=1e-6), generate(law, labels, rng(), temperature=0),
              f"{case}: a tiny nucleus holds the likeliest token alone")
        drawn = generate(law, labels, rng(1))
        close(generate(law, labels, rng(1)), drawn, f"{case}: the same rng, the same tokens")
        given = torch.where(integers(2, 3, rows * columns) > 0, drawn, -1)
        kept = generate(law, labels, rng(2), temperature=0, given=given)
        close(kept[given >= 0], given[given >= 0], f"{case}: given tokens must stay where they are")
        best = law.probabilities(kept, labels).argmax(-1)
        free = given[:, law.order.cells] < 0
        close(kept[:, law.order.cells][free], best[free], f"{case}: the free tokens must have read the given ones")
    order, N, guidance, T = diagonal_order(2, 2), 20_000, 1.7, 1.5
    law, every = Law(order, 3), torch.tensor(list(itertools.product(range(3), repeat=4)))
    p = law.probabilities(every, torch.ones(81, dtype=torch.long), guidance, T)
    p = p.gather(-1, every[:, order.cells][..., None]).prod(1)[:, 0].double()
    drawn = generate(law, torch.ones(N, dtype=torch.long), rng(3), guidance=guidance, temperature=T)
    counts = torch.bincount(drawn @ torch.tensor([27, 9, 3, 1]), minlength=81)
    common = p * N > 3
    chi2 = ((counts - p * N)[common].square() / (p * N)[common]).sum().item()
    need(chi2 < 140, f"20,000 pictures of 2 x 2 do not follow the law: chi-square {chi2:.0f}, wanted below 140")


# --- the networks of the lesson, examined before they are trained -----------------------------------------------------


def randomized(model, seed=0):
    """In float64, no weight zero: nothing hides behind a zero-initialised layer."""
    rng = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=rng) * 0.4
    return model.double().eval()


def sum_over_pictures(model):
    """Probabilities of all 3^4 pictures of 2 x 2 tokens of 3 kinds, added up, for each class and for "none"."""
    every = torch.tensor(list(itertools.product(range(3), repeat=4)))
    sums = []
    for c in range(3):
        log_p = model(every, torch.full((81,), c)).log_softmax(-1).gather(-1, every[..., None]).sum((1, 2))
        sums.append(log_p.exp().sum().item())
    return sums


@torch.no_grad()
def stepped(model, order, tokens, labels):
    """Logits (B, L, V) in raster order from the cached path."""
    cache, pieces, x, start = model.new_cache(len(labels)), [], model.label(labels)[:, None], 0
    for g, size in enumerate(order.groups):
        pieces.append(model.step(x, g, cache))
        x = model.token(tokens[:, order.cells[start:start + size]])
        start += size
    logits = torch.empty_like(torch.cat(pieces, 1))
    logits[:, order.cells] = torch.cat(pieces, 1)
    return logits


@torch.no_grad()
def leak(model, order, V):
    """Largest change of a logit through a token of its own or a later group; smallest in the group that follows."""
    L = len(order.cells)
    tokens, label, start, worst, least = integers(V, 1, L), torch.tensor([1]), 0, 0.0, math.inf
    before = model(tokens, label)
    for g, size in enumerate(order.groups):
        end = start + size
        changed = tokens.clone()
        last = order.cells[end - 1]
        changed[:, last] = (changed[:, last] + 1) % V
        difference = (model(changed, label) - before)[:, order.cells].abs()
        worst = max(worst, difference[:, :end].max().item())
        if end < L:
            least = min(least, difference[:, end:end + order.groups[g + 1]].max().item())
        start = end
    return worst, least


def examine(make, orders):
    """The oracles for a network in several orders, printed; raises if one fails. make(order, V, rows, columns, dim)."""
    shift, leaked, used, sums = 0.0, 0.0, math.inf, []
    for rows, columns in ((1, 1), (2, 2), (3, 5), (8, 8)):
        for order in orders(rows, columns):
            model = randomized(make(order, 7, rows, columns))
            tokens, labels = integers(7, 3, rows * columns), torch.tensor([0, 1, 2])
            with torch.no_grad():
                whole = model(tokens, labels)
            shift = max(shift, (stepped(model, order, tokens, labels) - whole).abs().max().item())
            if rows * columns > 1:
                worst, least = leak(model, order, 7)
                leaked, used = max(leaked, worst), min(used, least)
    for order in orders(2, 2):
        with torch.no_grad():
            sums += sum_over_pictures(randomized(make(order, 3, 2, 2)))
    print(f"cached and uncached logits differ by at most {shift:.0e}")
    print(f"a token changes logits of its own group and earlier ones by {leaked:.0e}, of the next by {used:.0e} or more")
    print(f"the probabilities of all 81 pictures sum to {min(sums):.12f} .. {max(sums):.12f}")
    need(shift < 1e-9, "cached and uncached logits differ")
    need(leaked < 1e-12, "a logit depends on a token that is drawn with it or after it")
    need(used > 1e-6, "the group that follows does not read a token")
    need(max(abs(total - 1) for total in sums) < 1e-9, "the probabilities do not sum to 1")


def shuffles(rows, columns):
    L = rows * columns
    return [mixed(torch.arange(L)), mixed(torch.randperm(L, generator=torch.Generator().manual_seed(L)))]


def examine_model(OrderGPT):
    for how in ({}, {"branch": 1, "gate": True}):
        print(f"settings {how}" if how else "plain")
        examine(lambda order, V, rows, columns: OrderGPT(order, V, 2, rows, columns, 16, 2, 2, **how),
                lambda rows, columns: shuffles(rows, columns) + [diagonal_order(rows, columns)])
    model = OrderGPT(diagonal_order(4, 4), 50, 10, 4, 4, 16, 2, 2)
    loss = torch.nn.functional.cross_entropy(model(integers(50, 5, 16), integers(10, 5)).flatten(0, 1),
                                             integers(50, 80)).item()
    print(f"untrained: {loss:.4f} nats a token; log 50 = {math.log(50):.4f}")
    need(abs(loss - math.log(50)) < 1e-4, "an untrained model must guess")


def examine_any_order(AnyOrderGPT):
    import nano_ar

    def make(order, V, rows, columns):
        model = AnyOrderGPT(V, 2, rows, columns, 16, 2, 2)
        model.cells = order.cells
        return model

    examine(make, shuffles)
    ours, script = make(mixed(torch.arange(15)), 7, 3, 5), nano_ar.GPT(7, 2, 3, 5, 16, 2, 2)
    script.load_state_dict(randomized(ours).state_dict())
    tokens, labels = integers(7, 3, 15), torch.tensor([0, 1, 2])
    difference = (ours(tokens, labels) - script.double()(tokens, labels)).abs().max().item()
    print(f"in raster order it is nano_ar.GPT: logits differ by {difference:.0e}")
    need(difference < 1e-5, "in raster order it must be the script's own model")
    ours.cells = None
    twice = [ours(tokens, labels) for _ in range(2)]
    need(not torch.equal(*twice), "without cells the order must be another one each time")
