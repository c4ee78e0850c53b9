"""Checks of lesson 42. Oracles: every way the dice can fall, laws by loops over numbers, the chain rule."""

import itertools

import torch

import nano_spec
from lessons.checks import close, exercise, need


def laws(vocab, seed):
    """Two random laws (vocab,) in float64."""
    p, q = torch.rand(2, vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.double) ** 2 + 0.01
    return p / p.sum(), q / q.sum()


# --- what the cells of the lesson use when an exercise is unwritten -----------------------------------------------------


class Places(nano_spec.Jacobi):
    """The script's drafter; a law for each cell where it has one for all."""

    def propose(self, text, gamma, dice):
        draft = []
        for n in range(len(text), len(text) + gamma):
            self.unseen_here = self.unseen[n - 1]
            draft.append(self.memory.get(n, self.unseen_here))
        return [dice.choose(law) for law in draft], draft


def grouped(p, q, x, near, ranks=7, gap=0.15, far=0.5):
    order = p.argsort(-1, descending=True)
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(p.shape[-1]).expand(p.shape))
    own, here = p.gather(-1, x[..., None]), rank.gather(-1, x[..., None])
    outside = ((rank - here).abs() > ranks) | ((p - own).abs() >= gap) | (near[x] >= far)
    return p.masked_fill(outside, 0).sum(-1) / q.masked_fill(outside, 0).sum(-1), p


def lantern(p, q, x, nearest, delta):
    mass = p.gather(-1, nearest[x])
    mass = mass.masked_fill(mass.cumsum(-1) > delta, 0)
    change = torch.zeros_like(p).scatter_(-1, nearest[x], -mass)
    change = change.scatter_(-1, x[..., None], mass.sum(-1, keepdim=True))
    target = (p + change).clamp(min=0)
    return target.gather(-1, x[..., None])[..., 0] / q.gather(-1, x[..., None])[..., 0], target


def outcome(p, q, rule):
    """Law of the token and acceptance of one guess, rows at once."""
    V = len(p)
    ratio, target = rule(p.repeat(V, 1), q.repeat(V, 1), torch.arange(V))
    chance = torch.where(q > 0, ratio.nan_to_num(0).clamp(max=1), 1.0)
    rest = (target - q).clamp(min=0)
    total = rest.sum(1, keepdim=True)
    rest = torch.where(total > 0, rest / total.clamp(min=1e-30), target)
    return q * chance + (q * (1 - chance)) @ rest, float((q * chance).sum())


def total_variation(p, q, rule):
    return float((outcome(p, q, rule)[0] - p).abs().sum() / 2)


def acceptance(p, q, rule):
    return outcome(p, q, rule)[1]


class Rows:
    """Dice for tensors, whose single decisions are those of another pair of dice."""

    def __init__(self, dice):
        self.dice = dice

    def choose(self, p):
        flat = p.reshape(-1, p.shape[-1])
        return torch.tensor([self.dice.choose(row) for row in flat], dtype=torch.long).view(p.shape[:-1])

    def coin(self, a):
        return torch.tensor([self.dice.coin(float(x)) for x in a.flatten()], dtype=torch.bool).view(a.shape)


def tiny_case(parallel, B, cells, gamma, rule):
    """`parallel` on a table of two tokens -> decode(dice), the law of all pictures by the chain rule."""
    table = nano_spec.Table(2)

    def law(tokens, rows):
        return torch.stack([torch.stack([table.law([7, *row[:i]]) for i in range(cells)]) for row in tokens.tolist()])

    def decode(dice):
        prior = torch.full((cells, 2), 0.5, dtype=torch.double)
        tokens, _ = parallel(law, B, gamma, Rows(dice), rule, prior)
        return tuple(map(tuple, tokens.tolist()))

    one = nano_spec.chain_rule(table.law, [7], cells)
    truth = {}
    for pictures in itertools.product(one, repeat=B):
        truth[pictures] = 1.0
        for picture in pictures:
            truth[pictures] *= one[picture]
    return decode, truth


# --- speculative Jacobi decoding with a prior per cell ------------------------------------------------------------------


class First:
    """Dice that take the likeliest, and note what they were asked."""

    def __init__(self):
        self.asked = []

    def choose(self, p):
        self.asked.append(p)
        return int(p.argmax())


@exercise(
    ("text position n is cell n", "self.prior[n - 1]", "self.prior[n]"),
    ("the likeliest guess, not a drawn one", "dice.choose(law) for law", "int(law.argmax()) for law"),
    ("drawn from the prior, q says otherwise", "[dice.choose(law) for law in q], q", "[dice.choose(self.prior[n - 1]) for n in places], q"),
    ("memory one place late", "start + i: law", "start + i + 1: law"),
    ("memory of the window, not of the place", "start + i: law", "i: law"),
    ("nothing is remembered", "self.memory = {start + i: law for i, law in enumerate(p)}", "pass"),
    ("old calls are remembered", "self.memory = {start", "self.memory |= {start"),
    ("one guess too few", "len(text) + gamma)", "len(text) + gamma - 1)"),
)
def check_Places(Places):
    for V, cells, gamma, start in ((2, 3, 1, 1), (3, 6, 2, 3), (5, 9, 4, 2)):
        prior = torch.stack([laws(V, n)[0] for n in range(cells)])
        p = torch.stack([laws(V, n)[1] for n in range(gamma + 1)])
        guesser, dice = Places(prior), First()
        draft, q = guesser.propose([0], gamma, dice)
        need(len(draft) == len(q) == gamma, f"{gamma} guesses wanted, {len(draft)} came, with {len(q)} laws")
        close(torch.stack(list(q)), prior[:gamma], "before any call the first guess is for cell 0, its law row 0 of the prior")
        guesser.update([0] * (start + 2), start, torch.stack([laws(V, 50 + n)[1] for n in range(gamma + 1)]))
        guesser.update([0] * (start + 2), start, p[:2])
        dice.asked.clear()
        draft, q = guesser.propose([0] * (start + 1), gamma, dice)
        truth = torch.cat([p[1:2], prior[start + 1:start + gamma]])[:gamma]
        close(torch.stack(list(q)), truth, f"after update(text, {start}, two laws): position {start + 1} has the second, later ones the prior")
        need(len(dice.asked) == gamma, "each guess is drawn by dice.choose: one that is not drawn from q makes all inexact")
        close(torch.stack(dice.asked), truth, "the laws that dice.choose was asked with must be those that q reports")
    prior = torch.stack([laws(2, n)[0] for n in range(4)])
    decode, truth = nano_spec.case(lambda: nano_spec.Table(2), lambda: Places(prior), nano_spec.Table(2).law)
    distance = nano_spec.total_variation(nano_spec.enumerate_outcomes(decode), truth())
    need(distance < 1e-12, f"every way of the dice, three tokens: total variation {distance:.3f} to the chain rule")


# --- two relaxations -----------------------------------------------------------------------------------------------------


def ratio_by_loops(p, q, x, near, ranks, gap, far):
    order = sorted(range(len(p)), key=lambda y: -p[y])
    place = order.index(x)
    mates = [y for y in order[max(0, place - ranks):place + ranks + 1] if abs(p[y] - p[x]) < gap and near[x][y] < far]
    return sum(p[y] for y in mates) / sum(q[y] for y in mates)


def distances(V, seed=0):
    points = torch.rand(V, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    return torch.cdist(points, points)


@exercise(
    ("the codes, not their ranks", "rank = p.argsort(-1, descending=True).argsort(-1)", "rank = torch.arange(p.shape[-1]).expand(p.shape)"),
    ("sorted once only", ".argsort(-1)\n", "\n"),
    ("ranks in q", "rank = p.argsort", "rank = q.argsort"),
    ("only more probable codes", ").abs() <= ranks", ") <= ranks"),
    ("no gap of probabilities", "< gap)", "< 9)"),
    ("far codes are mates", "(near[x] < far)", "(near[x] >= 0)"),
    ("the ratio upside down", "(p * mate).sum(-1) / (q * mate).sum(-1)", "(q * mate).sum(-1) / (p * mate).sum(-1)"),
    ("q of the guess alone", "(q * mate).sum(-1)", "at(q, x)"),
    ("any of the three is enough", "mate = mate & (near[x] < far)", "mate = mate | (near[x] < far)"),
)
def check_grouped(grouped):
    cases = [(4, (), 7, 0.15, 9.0), (7, (3,), 2, 0.1, 0.6), (12, (2, 5), 3, 0.05, 0.5), (30, (4, 3), 7, 0.15, 0.5), (9, (2,), 0, 1.0, 9.0)]
    for V, shape, ranks, gap, far in cases:
        n = max(1, torch.Size(shape).numel())
        rows = [laws(V, 100 * V + i) for i in range(n)]
        p, q = torch.stack([a for a, _ in rows]), torch.stack([b for _, b in rows])
        x, near = torch.arange(n) % V, distances(V)
        truth = [ratio_by_loops(*r, near.tolist(), ranks, gap, far) for r in zip(p.tolist(), q.tolist(), x.tolist())]
        ratio, law = grouped(p.view(*shape, V), q.view(*shape, V), x.view(shape), near, ranks, gap, far)
        close(ratio, torch.tensor(truth).view(shape), f"p {tuple(shape) + (V,)}, ranks {ranks}, gap {gap}, far {far}: ratio")
        close(law, p.view(*shape, V), "the law behind the residual is p itself")
    p, q = torch.tensor([0.4, 0.35, 0.15, 0.1]), torch.tensor([0.7, 0.1, 0.1, 0.1])
    close(grouped(p, q, torch.tensor(0), torch.zeros(4, 4))[0], torch.tensor(0.9375), "the worked example")


@exercise(
    ("skips what does not fit", lambda p, q, x, nearest, delta: lantern_skipping(p, q, x, nearest, delta)),
    ("borrowed from nobody", "p.scatter_add(-1, others, -taken)", "p"),
    ("lent, not given", "borrowed = borrowed.scatter_add(-1, x[..., None], taken.sum(-1, keepdim=True))", "borrowed = borrowed"),
    ("each code below delta", "mass.cumsum(-1) <= delta", "mass <= delta"),
    ("the neighbours of code 0", "others = nearest[x]", "others = nearest[x * 0]"),
    ("the residual of p", "return at(borrowed, x) / at(q, x), borrowed", "return at(borrowed, x) / at(q, x), p"),
    ("the ratio of p", "at(borrowed, x) / at(q, x)", "at(p, x) / at(q, x)"),
    ("one neighbour too many", "mass.cumsum(-1) <= delta", "mass.cumsum(-1) - mass <= delta"),
)
def check_lantern(lantern):
    for V, shape, delta in ((4, (), 0.3), (5, (3,), 0.0), (6, (2, 4), 0.2), (20, (5,), 0.5), (7, (7,), 0.9)):
        n = max(1, torch.Size(shape).numel())
        rows = [laws(V, 200 * V + i) for i in range(n)]
        p, q = torch.stack([a for a, _ in rows]), torch.stack([b for _, b in rows])
        x, nearest = torch.arange(n) % V, distances(V).argsort(1)[:, 1:]
        truth = []
        for row, code in zip(p.tolist(), x.tolist()):
            slow, taken = list(row), 0.0
            for y in nearest[code].tolist():
                if taken + row[y] > delta:
                    break
                taken, slow[y] = taken + row[y], 0.0
            slow[code] += taken
            truth.append(slow)
        truth = torch.tensor(truth, dtype=torch.double)
        ratio, law = lantern(p.view(*shape, V), q.view(*shape, V), x.view(shape), nearest, delta)
        close(law, truth.view(*shape, V), f"p {tuple(shape) + (V,)}, delta {delta}: the target of this decision")
        wanted = truth[torch.arange(n), x] / q[torch.arange(n), x]
        close(ratio, wanted.view(shape), f"p {tuple(shape) + (V,)}, delta {delta}: ratio")
    law = lantern(torch.tensor([0.5, 0.2, 0.2, 0.1]), torch.full((4,), 0.25), torch.tensor(0), torch.tensor([[2, 1, 3]]), 0.3)[1]
    close(law, torch.tensor([0.7, 0.2, 0.0, 0.1]), "the worked example")


def lantern_skipping(p, q, x, nearest, delta):
    """Wrong: goes on behind the first code that does not fit."""
    near, P, X = nearest[x].reshape(-1, nearest.shape[1]), p.reshape(-1, p.shape[-1]).clone(), x.reshape(-1)
    for row, code, others in zip(P, X.tolist(), near.tolist()):
        taken = 0.0
        for y in others:
            if taken + float(row[y]) <= delta:
                taken += float(row[y])
                row[y] = 0.0
        row[code] += taken
    P = P.view(p.shape)
    return P.gather(-1, x[..., None])[..., 0] / q.gather(-1, x[..., None])[..., 0], P


# --- what comes out --------------------------------------------------------------------------------------------------------


def rules_to_try(V):
    near, nearest = distances(V), distances(V).argsort(1)[:, 1:]

    def exact(p, q, x):
        return p.gather(-1, x[..., None])[..., 0] / q.gather(-1, x[..., None])[..., 0], p

    return {"exact": exact, "lenience": lambda p, q, x: (exact(p, 0.4 * q, x)[0], p),
            "GSD": lambda p, q, x: grouped(p, q, x, near), "LANTERN": lambda p, q, x: lantern(p, q, x, nearest, 0.3)}


@exercise(
    ("all refused share one residual", "drafted + rest.sum(0)", "drafted + (1 - drafted.sum()) * residual(p, q)"),
    ("columns for rows", "rest.sum(0)", "rest.sum(1)"),
    ("accepted more than once", "ratio.clamp(max=1)", "ratio"),
    ("the refused are lost", "drafted + rest.sum(0)", "drafted"),
    ("a refused guess draws from its target", "residual(target, Q)", "target"),
    ("the residual of p", "residual(target, Q)", "residual(P, Q)"),
    ("acceptance without q", "drafted.sum()", "ratio.clamp(max=1).mean()"),
    ("0 times infinity", "torch.where(q > 0, q * ratio.clamp(max=1), 0.0)", "(q * ratio).clamp(max=q)"),
)
def check_output_law(output_law):
    for V, seed in ((2, 0), (3, 1), (5, 2), (8, 3)):
        p, q = laws(V, seed)
        if V == 8:
            q[2] = 0  # a code that is never guessed; p / q is then infinite
            q = q / q.sum()
        for name, rule in rules_to_try(V).items():
            def one(dice):
                x = dice.choose(q)
                ratio, target = rule(p, q, torch.tensor(x))
                if dice.coin(min(1.0, float(ratio))):
                    return x, True
                return dice.choose(nano_spec.residual(target, q)), False
            outcomes = nano_spec.enumerate_outcomes(one)
            truth, accepted = torch.zeros(V, dtype=torch.double), 0.0
            for (x, kept), chance in outcomes.items():
                truth[x] += chance
                accepted += chance * kept
            law, share = output_law(p, q, rule)
            close(law, truth, f"{name}, {V} codes: the law of the token")
            close(share, torch.tensor(accepted), f"{name}, {V} codes: the acceptance")


# --- local rejection ---------------------------------------------------------------------------------------------------------


def local_law(q, law, columns, radius):
    """{(tokens, calls): probability}: sums over drafts and refusals, no dice."""
    L, V, found = len(q), len(q[0]), {}
    for draft in itertools.product(range(V), repeat=L):
        p = [law(list(draft[:i])) for i in range(L)]
        for refused in itertools.product((False, True), repeat=L):
            chance = 1.0
            for i, x in enumerate(draft):
                a = min(1.0, float(p[i][x] / q[i][x]))
                chance *= float(q[i][x]) * (1 - a if refused[i] else a)
            if chance == 0:
                continue
            sums, calls = {(): chance}, 1
            for i in range(L):
                r, c = divmod(i, columns)
                touched = any(refused[j] and abs(j // columns - r) <= radius and abs(j % columns - c) <= radius for j in range(i))
                calls += touched
                longer = {}
                for past, mass in sums.items():
                    if touched:
                        here = law(list(past))
                    elif refused[i]:
                        more = (p[i] - q[i]).clamp(min=0)
                        here = more / more.sum()
                    else:
                        here = [float(x == draft[i]) for x in range(V)]
                    for x in range(V):
                        if float(here[x]) > 0:
                            longer[(*past, x)] = mass * float(here[x])
                sums = longer
            for tokens, mass in sums.items():
                found[tokens, calls] = found.get((tokens, calls), 0.0) + mass
    return found


def grid(V, L, seed=0):
    """A remembered table of laws after every text, and one draft law for each cell."""
    table, memory = nano_spec.Table(V, seed), {}

    def law(tokens):
        key = tuple(tokens)
        if key not in memory:
            memory[key] = table.law([9, *key])
        return memory[key]

    return law, [laws(V, 10 * seed + i)[1] for i in range(L)]


def price_of_locality(rows, columns, radius):
    """-> total variation of the whole picture, mean calls; from the sums above."""
    law, q = grid(2, rows * columns)
    found, pictures, calls = local_law(q, law, columns, radius), {}, 0.0
    for (tokens, n), chance in found.items():
        pictures[tokens] = pictures.get(tokens, 0.0) + chance
        calls += n * chance
    return nano_spec.total_variation(pictures, nano_spec.chain_rule(law, [], rows * columns)), calls


@exercise(
    ("everything after a refusal is kept", "max(rows[j], aside[j]) <= radius", "False"),
    ("everything after a refusal is redrawn", "max(rows[j], aside[j]) <= radius", "True"),
    ("rows or columns", "max(rows[j], aside[j])", "min(rows[j], aside[j])"),
    ("scored by the old tokens", "law(new[:i])", "p[i]"),
    ("the refused one drawn from p", "nano_spec.residual(p[i], q[i])", "p[i]"),
    ("all are accepted", "not dice.coin(min(1.0, float(p[i][x] / q[i][x])))", "False"),
    ("a residual costs a call", "elif refused[i]:\n", "elif refused[i]:\n            calls += 1\n"),
    ("the first call is free", "list(draft), 1", "list(draft), 0"),
    ("rows and columns swapped", "abs(i % columns - j % columns)", "abs(i - j)"),
)
def check_local(local):
    for V, rows, columns, radius in ((2, 1, 1, 0), (3, 1, 2, 1), (2, 1, 3, 1), (2, 2, 2, 0), (2, 2, 2, 1), (2, 2, 2, 9)):
        law, q = grid(V, rows * columns, seed=rows)

        def decode(dice):
            draft = [dice.choose(one) for one in q]
            new, calls = local(draft, q, law, columns, radius, dice)
            return tuple(new), calls

        distance = nano_spec.total_variation(nano_spec.enumerate_outcomes(decode), local_law(q, law, columns, radius))
        where = f"{rows} x {columns} cells, radius {radius}"
        need(distance < 1e-9, f"{where}: pictures and calls are distributed otherwise than the two rules say, total variation {distance:.3f}")


# --- the last exercise ---------------------------------------------------------------------------------------------------------


@exercise(
    ("the exact rule", "0.5 * q[i][x]", "q[i][x]"),
    ("stricter, not milder", "p[i][x] / (0.5 * q[i][x])", "0.5 * p[i][x] / q[i][x]"),
    ("goes on after a refusal", "return new + [dice.choose(nano_spec.residual(p[i], q[i]))]", "x = dice.choose(nano_spec.residual(p[i], q[i]))"),
    ("refused: drawn from p", "nano_spec.residual(p[i], q[i])", "p[i]"),
    ("the residual of the milder q", "residual(p[i], q[i])", "residual(p[i], 0.5 * q[i])"),
    ("no token when all stay", "return new + [dice.choose(p[len(draft)])]", "return new"),
    ("the last token from q", "dice.choose(p[len(draft)])", "dice.choose(q[-1] if q else p[0])"),
    ("q of the place before", "(0.5 * q[i][x])", "(0.5 * q[i - 1][x])"),
)
def check_accept_lenient(accept_lenient):
    for V, g in ((2, 0), (3, 1), (4, 1), (3, 2)):
        p, q = torch.stack([laws(V, i)[0] for i in range(g + 1)]), [laws(V, 30 + i)[1] for i in range(g)]
        truth = {}

        def add(tokens, chance):
            truth[tokens] = truth.get(tokens, 0.0) + chance

        for draft in itertools.product(range(V), repeat=g):
            alive = 1.0
            for one, x in zip(q, draft):
                alive *= float(one[x])
            for i, x in enumerate(draft):
                stay = min(1.0, float(p[i][x] / q[i][x]) * 2)
                more = (p[i] - q[i]).clamp(min=0)
                for y in range(V):
                    add((*draft[:i], y), alive * (1 - stay) * float(more[y] / more.sum()))
                alive *= stay
            for y in range(V):
                add((*draft, y), alive * float(p[g][y]))

        def decode(dice):
            return tuple(accept_lenient([dice.choose(one) for one in q], q, p, dice))

        distance = nano_spec.total_variation(nano_spec.enumerate_outcomes(decode), truth)
        need(distance < 1e-12, f"{V} codes, {g} guesses: the tokens are distributed otherwise, total variation {distance:.3f}")
