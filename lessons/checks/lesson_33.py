"""Checks of lesson 33. Oracles: every tuple of draws, candidates one by one, every random path of a small particle filter."""

import itertools
import math

import torch

import nano_var
from lessons.checks import close, exercise, need


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def best_law_slowly(p, score, N):
    """All len(p) ** N ways to draw N times: the first of the best wins."""
    law = [0.0] * len(p)
    for drawn in itertools.product(range(len(p)), repeat=N):
        winner = max(drawn, key=lambda i: score[i].item())  # max keeps the first of equals
        law[winner] += math.prod(p[i].item() for i in drawn)
    return torch.tensor(law, dtype=torch.float64)


def as_density(p, score, N):
    """N p F^(N-1): right for a density, wrong for a law with lumps."""
    F = torch.stack([p[score <= s].sum() for s in score])
    law = N * p * F ** (N - 1)
    return law / law.sum()


def as_power(p, score, N):
    law = p * (score - score.min() + 1) ** (N - 1)
    return law / law.sum()


@exercise(
    ("the worst of N", "score < score[:, None]", "score > score[:, None]"),
    ("equal scores each get all of their lump", "p / level * (", "("),
    ("equal scores shared evenly", "p / level * (", "(1 / same.sum(1)) * ("),
    ("one draw too few", "below ** N)", "below ** N) / (below + level)"),
    ("those below forgotten", "(below + level) ** N - below ** N", "level ** N"),
    ("each takes the part just below its own rank", "(below + level) ** N - below ** N", "(below + p) ** N - below ** N"),
    ("the formula of a density", as_density),
    ("scores taken for weights", as_power),
)
def check_best_law(best_law):
    for seed, (n, N) in enumerate(((1, 3), (4, 1), (3, 2), (5, 4), (7, 3))):
        p = torch.rand(n, generator=seeded(seed), dtype=torch.float64) + 0.1
        p, score = p / p.sum(), torch.randn(n, generator=seeded(seed), dtype=torch.float64)
        close(best_law(p, score, N), best_law_slowly(p, score, N), f"{n} pictures with different scores, best of {N}")
        equal = torch.arange(n) % 2 + 0.5
        close(best_law(p, equal, N), best_law_slowly(p, equal, N), f"{n} pictures, several with equal scores, best of {N}")
    p, score = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([1.0, 2.0, 3.0])
    close(best_law(p, score, 2), torch.tensor([0.25, 0.39, 0.36]), "the worked example")


def prune_slowly(scores, keep):
    """One picture, one stage, one candidate at a time."""
    winners = []
    for stages in scores.permute(2, 0, 1).tolist():
        alive = range(len(stages[0]))
        for stage, n in zip(stages, keep):
            alive = sorted(alive, key=stage.__getitem__, reverse=True)[:n]
        winners.append(alive[0])
    return torch.tensor(winners)


@exercise(
    ("the dead come back", "score.masked_fill(~alive, -torch.inf)", "score"),
    ("the worst are kept", "score.masked_fill(~alive, -torch.inf)", "(-score).masked_fill(~alive, -torch.inf)"),
    ("one ranking for all pictures", "score.masked_fill(~alive, -torch.inf)", "score.mean(1, keepdim=True).expand_as(score).masked_fill(~alive, -torch.inf)"),
    ("only the last stage counts", "zip(scores, keep)", "zip(scores[-1:], keep[-1:])"),
    ("the last scores are used before they exist", "zip(scores, keep)", "zip([scores[-1]] * len(keep), keep)"),
    ("all scores so far summed", "zip(scores, keep)", "zip(scores.cumsum(0), keep)"),
    ("the first of the survivors, not the best", "zip(scores, keep)", "zip(scores[:-1], keep)"),
    ("the place among the survivors", "alive.long().argmax(0)", "score.topk(1, 0).indices[0] % keep[0]"),
)
def check_prune(prune):
    for seed, (M, B, keep) in enumerate(((1, 1, [1, 1]), (5, 3, [3, 1]), (8, 4, [6, 3, 1]), (9, 7, [9, 5, 2, 1]))):
        scores = torch.randn(len(keep), M, B, generator=seeded(seed))
        ours = prune(scores.clone(), keep)
        close(ours, prune_slowly(scores, keep), f"{M} candidates for each of {B} pictures, keep {keep}: who is left")
    far = torch.full((2, 4, 1), -1000.0)
    far[0, 2], far[1, 2], far[1, 0] = -900.0, -2000.0, -5.0
    close(prune(far, [1, 1]), torch.tensor([2]), "candidate 2 alone survives the first stage, however bad it gets")


def systematic_slowly(w, u, n):
    """Walk along the line from 0 to 1; pick up a candidate at (0 + u) / n, (1 + u) / n ..."""
    chosen, i, edge = [], 0, w[0].item()
    for j in range(n):
        while (j + u) / n >= edge and i < len(w) - 1:
            i += 1
            edge += w[i].item()
        chosen.append(i)
    return torch.tensor(chosen)


def independent(w, u, n):
    return torch.multinomial(w, n, True, generator=seeded(int(u * 1e6)))


def rounded(w, u, n):
    """Whole parts first, what is left to the likeliest."""
    counts = (w * n).floor().long()
    counts[w.argmax()] += n - counts.sum()
    return torch.arange(len(w)).repeat_interleave(counts)


@exercise(
    ("drawn independently: unbiased, but counts jump", independent),
    ("rounded: the small never live", rounded),
    ("no chance in it", "torch.arange(n) + u", "torch.arange(n) + 0.5"),
    ("u not divided by n", "(torch.arange(n) + u) / n", "(torch.arange(n) / n + u) % 1"),
    ("weights not summed up", "w.cumsum(0)", "w"),
    ("as many as there were", "(torch.arange(n) + u) / n", "(torch.arange(len(w)) + u) / len(w)"),
    ("one beyond the last", ".clamp(max=len(w) - 1)", ""),
    ("one too far", "(torch.arange(n) + u) / n", "(torch.arange(1, n + 1) + u) / n"),
)
def check_systematic(systematic):
    for parts, n in (((1,), 1), ((1, 3, 0, 4), 4), ((2, 5, 1), 7), ((3, 1, 1, 1, 2, 8), 3)):
        total = sum(parts)
        w, counts = torch.tensor(parts).double() / total, []
        for j in range(total):  # counts change only where n * edge - u is whole: at multiples of 1 / total
            ours = torch.as_tensor(systematic(w, (j + 0.5) / total, n))
            need(ours.shape == (n,), f"weights {parts}: shape {tuple(ours.shape)}, wanted ({n},)")
            need(bool(((0 <= ours) & (ours < len(w))).all()), f"weights {parts}: an index outside 0 .. {len(w) - 1}")
            counts.append(torch.bincount(ours, minlength=len(w)).double())
        counts = torch.stack(counts)
        need(bool(((counts - n * w).abs() < 1).all()), f"weights {parts}, n = {n}: a count is 1 or more away from n w")
        close(counts.mean(0), n * w, f"weights {parts}, n = {n}: mean count over all u is n w, exactly")
    close(systematic(torch.tensor([0.5, 0.3, 0.2]).double(), 0.5, 4), torch.tensor([0, 0, 1, 2]), "the worked example")
    w = torch.full((10,), 0.1, dtype=torch.float64) - 1e-9  # as rounding may leave it: a sum just below 1
    close(systematic(w, 1 - 1e-10, 1), torch.tensor([9]), "a point beyond the last edge belongs to the last candidate")


class Tape:
    """Chance that is replayed: `every` runs a program once for each way in which its choices can fall."""

    def __init__(self, choices):
        self.choices, self.place, self.probability, self.open = choices, 0, 1.0, []

    def choose(self, p):
        if self.place == len(self.choices):
            self.choices.append(0)
        i = self.choices[self.place]
        self.open.append(len(p))
        self.place += 1
        self.probability *= float(p[i])
        return i


def every(program):
    """-> (probability, result) of all random paths of program(tape)."""
    choices = []
    while True:
        tape = Tape(choices)
        result = program(tape)
        yield tape.probability, result
        while choices and choices[-1] + 1 == tape.open[len(choices) - 1]:
            choices.pop()
        if not choices:
            return
        choices[-1] += 1


P = torch.tensor([[0.7, 0.3], [0.4, 0.6], [0.5, 0.5]], dtype=torch.float64)  # p(bit 1) after none, an even, an odd number
LEVEL = torch.tensor([0.3, 1.0, -0.5, 0.8, 0.1, -1.2, 0.6, 0.4, 1.5, -0.7, 0.2, 0.9, -0.1, 0.5, 0.7]).double()


def node(x):
    """Bits of a beginning (n,) -> the number of its node in a binary tree, root 0."""
    place = 0
    for bit in x.tolist():
        place = 2 * place + 1 + int(bit)
    return place


def bits(x):
    return P[0] if len(x) == 0 else P[1 + int(x[-1])]


def by_value(grow, score, resample, strengths, M):
    """Each stage weighs by the whole score: after K stages a score has counted K times."""
    x, log_z = torch.zeros(M, 0, dtype=torch.long), torch.tensor(0.0).double()
    for k, strength in enumerate(strengths):
        x = grow(k, x)
        w = (strength * score(k, x)).exp()
        log_z, x = log_z + w.mean().log(), x[resample(w / w.sum())]
    return x, log_z


def by_gain(grow, score, resample, strengths, M):
    """The rule of exercise 4, in plain weights."""
    x, old, log_z = torch.zeros(M, 0, dtype=torch.long), torch.ones(M).double(), 0.0
    for k, strength in enumerate(strengths):
        x = grow(k, x)
        new = (strength * score(k, x)).exp()
        w = new / old
        chosen = resample(w / w.sum())
        x, old, log_z = x[chosen], new[chosen], log_z + w.mean().log()
    return x, log_z


def level(k, x):
    """Scores of beginnings (M, k + 1) of the tree."""
    return torch.stack([LEVEL[node(row)] for row in x])


def tilted(K, strength):
    """p(x) exp(strength * score) of all 2^K ends of the tree, not normalised; x in binary order."""
    mass = []
    for x in itertools.product((0, 1), repeat=K):
        x = torch.tensor(x)
        law = math.prod(bits(x[:k])[x[k]].item() for k in range(K))
        mass.append(law * math.exp(strength * LEVEL[node(x)].item()))
    return torch.tensor(mass).double()


def simulate(rule, strengths, M, seed=0):
    """A rule with M particles on the tree -> the law of its ends (2^K,), and its Z."""
    rng, K = seeded(seed), len(strengths)

    def grow(k, x):
        p = torch.stack([bits(row) for row in x])
        return torch.cat([x, torch.multinomial(p, 1, generator=rng)], 1)

    def resample(w):
        return systematic_slowly(w, torch.rand(1, generator=rng).item(), M)

    x, log_z = rule(grow, level, resample, strengths, M)
    place = (x * 2 ** torch.arange(K - 1, -1, -1)).sum(1)
    return torch.bincount(place, minlength=2**K).double() / M, math.exp(float(log_z))


@exercise(
    ("a score counts anew at every stage", by_value),
    ("the newest strength for the newest gain alone", "now = strength * score(k, x)\n        gain = now - before", "now = score(k, x)\n        gain = strength * (now - before)"),
    ("the old scores stay where they were", "now[index]", "now"),
    ("the particles stay where they were", "x[index], now[index]", "x, now[index]"),
    ("the strength forgotten", "strength * score(k, x)", "score(k, x)"),
    ("the sign", "now - before", "before - now"),
    ("a sum in place of the mean", " - math.log(M)", ""),
    ("the mean of the logarithms", "gain.logsumexp(0) - math.log(M)", "gain.mean()"),
    ("only the last stage's estimate", "log_z + gain", "gain"),
    ("resampled evenly", "gain.softmax(0)", "torch.full_like(gain, 1 / M)"),
)
def check_particles(particles):
    for M, strengths in ((1, (0.0, 1.0, 2.0)), (3, (1.0,)), (2, (0.5, 1.5)), (2, (1.5, 1.5))):
        K = len(strengths)

        def program(tape):
            def grow(k, x):
                new = [tape.choose(bits(row)) for row in x]
                return torch.cat([x, torch.tensor(new)[:, None]], 1)

            def resample(w):
                return torch.tensor([tape.choose(w) for _ in range(M)])

            return particles(grow, level, resample, strengths, M)

        paths, truth = list(itertools.product((0, 1), repeat=K)), tilted(K, strengths[-1])
        ours, mass = dict.fromkeys(paths, 0.0), 0.0
        for probability, (x, log_z) in every(program):
            need(x.shape == (M, K), f"{M} particles, {K} stages: shape {tuple(x.shape)}, wanted ({M}, {K})")
            z = probability * math.exp(float(log_z))
            mass += z
            for row in x.tolist():
                ours[tuple(row)] += z / M
        case = f"{M} particles, {K} stages, all random paths"
        close(mass, truth.sum(), f"{case}: the expectation of Z")
        close([ours[x] for x in paths], truth, f"{case}: the expectation of Z times the share of each end")


@exercise(
    ("the half without a class stays", "torch.cat([index, index + len(total)])", "torch.cat([index, torch.arange(len(total), 2 * len(total))[:len(index)]])"),
    ("the half with the class twice", "index + len(total)", "index"),
    ("the halves interleaved", "torch.cat([index, index + len(total)])", "torch.stack([index, index + len(total)], 1).flatten()"),
    ("the cache stays", "cache[:, :, rows]", "cache[:, :, :len(rows)]"),
    ("the sum stays", "total[index]", "total[:len(index)]"),
    ("the tokens stay", "tokens[index]", "tokens[:len(index)]"),
    ("shuffled the other way round", "total[index]", "total[index.argsort().argsort()]"),
)
def check_pick(pick):
    torch.manual_seed(0)
    pyramid = nano_var.Pyramid((1, 2, 4, 8), 16, 4).double().eval()
    model = nano_var.VAR(16, 4, 3, (1, 2, 4, 8), 32, 2, 2).double().eval()
    for p in (pyramid.codes, *pyramid.parameters(), *model.parameters()):
        torch.nn.init.normal_(p, std=0.3)
    with torch.no_grad():
        for seed, (B, n, guided) in enumerate(((1, 1, False), (4, 4, False), (3, 2, True), (5, 5, True), (4, 8, True))):
            full = torch.randint(16, (B, 85), generator=seeded(seed))
            index = torch.randint(B, (n,), generator=seeded(seed + 10)) if seed else torch.zeros(1, dtype=torch.long)
            label = torch.tensor([seed % 3])
            inputs, sums = pyramid.decode(full)
            asked = torch.cat([label.expand(B), torch.full((B,), model.null)]) if guided else label.expand(B)
            cache = model.new_cache(len(asked))
            for k, (start, end) in enumerate(((0, 1), (1, 5))):
                piece = inputs[:, start:end]
                model(piece.repeat(2, 1, 1) if guided else piece, asked, cache, start)
            case = f"{B} candidates, {n} picked{', guided' if guided else ''}"
            kept, total, tokens = pick(cache.clone(), sums[1].clone(), full[:, :5].clone(), index, guided)
            close(tokens, full[index, :5], f"{case}: tokens")
            close(total, sums[1][index], f"{case}: the sum of the maps")
            need(kept.shape[2] == n * (1 + guided), f"{case}: the cache has {kept.shape[2]} rows, wanted {n * (1 + guided)}")
            area = nano_var.area(total, 4)
            asked = torch.cat([label.expand(n), torch.full((n,), model.null)]) if guided else label.expand(n)
            ours = model(area.repeat(2, 1, 1) if guided else area, asked, kept.clone(), 5)
            again = inputs[index].repeat(1 + guided, 1, 1)
            truth = model(again, asked)[:, 5:21]  # all at once, with the mask and no cache
            close(ours, truth, f"{case}: what the model says about the next map")
