"""Checks of lesson 43. Oracles: every way the dice can fall, the chain rule along an order, integrals on a grid."""

import math

import torch

import nano_spec
from lessons.checks import close, exercise, need


# --- any subset ----------------------------------------------------------------------------------------------------------


class Table:
    """A random law for each place and each set of known tokens. Counts its calls, and what they ask."""

    def __init__(self, vocab, seed=0):
        self.vocab, self.seed, self.calls, self.memory = vocab, seed, 0, {}

    def law(self, known, place):
        key = (place, *(number for pair in sorted(known) for number in pair))
        if key not in self.memory:
            weights = torch.rand(self.vocab, generator=nano_spec.rng_at(self.seed, *key), dtype=torch.double) ** 2 + 0.01
            self.memory[key] = weights / weights.sum()
        return self.memory[key]

    def apart(self, known, places):
        self.calls += 1
        return torch.stack([self.law(known, place) for place in places])

    def chain(self, known, places, tokens):
        self.calls += 1
        pairs = list(zip(places, tokens))
        return torch.stack([self.law([*known, *pairs[:i]], place) for i, place in enumerate(places)])


def assd(model, known, places, k, dice):
    """What the cells of the lesson use: the two calls around the rule of Algorithm 1."""
    done, calls = [], 0
    while len(done) < len(places):
        here, ahead = [*known, *zip(places, done)], places[len(done):len(done) + k]
        q, calls = model.apart(here, ahead), calls + 1
        guesses = [dice.choose(row) for row in q]
        if len(guesses) > 1:
            p, calls = model.chain(here, ahead, guesses), calls + 1
            guesses = nano_spec.accept(guesses, q, torch.cat([p, p[-1:]]), dice)[:len(ahead)]  # no token beyond
        done += guesses
    return done, calls


KNOWN = [(5, 1)]  # what decoder and truth know before


def along(order, vocab, known=KNOWN, seed=0):
    """The chain rule along an order: {tokens: probability}."""
    table = Table(vocab, seed)
    return nano_spec.chain_rule(lambda past: table.law([*known, *zip(order, past)], order[len(past)]), [], len(order))


def decoder(assd, vocab, order, k, known=KNOWN, seed=0):
    table = Table(vocab, seed)

    def decode(dice):
        tokens, calls = assd(table, list(known), list(order), k, dice)
        return tuple(tokens), calls

    return decode


def marginal(outcomes):
    tokens = {}
    for (row, _), chance in outcomes.items():
        tokens[row] = tokens.get(row, 0.0) + chance
    return tokens


@exercise(
    ("apart alone", "stays = dice.coin(min(1.0, float(p[i][x] / q[i][x])))", "stays = True"),
    ("refused: drawn from p", "nano_spec.residual(p[i], q[i])", "p[i]"),
    ("later guesses live on", "            if not stays:\n                break\n", ""),
    ("a check of one place alone", "if len(some) == 1:", "if False:"),
    ("only the last place is unchecked", "if len(some) == 1:", "if len(left) == 1:"),
    ("a refused place is left open", "            known.append((some[i], x if stays else dice.choose(nano_spec.residual(p[i], q[i]))))\n            if not stays:\n                break\n",
     "            if not stays:\n                break\n            known.append((some[i], x))\n"),
    ("what was known comes back, too", "known[before:]], calls", "known], calls"),
    ("the check is free", "        p = model.chain(known, some, draft)\n        calls += 1\n", "        p = model.chain(known, some, draft)\n"),
    ("more than k guesses", "some = left[:k]", "some = left"),
    ("one by one", "some = left[:k]", "some = left[:1]"),
)
def check_assd(assd):
    for vocab, order, k, known in ((2, (4,), 2, KNOWN), (3, (1, 0), 2, []), (2, (0, 1, 2), 1, KNOWN), (2, (2, 0, 1), 2, KNOWN),
                                   (2, (3, 1, 0), 3, [(2, 0), (7, 1)])):
        table, asked = Table(vocab), []

        def decode(dice):
            before = table.calls
            tokens, calls = assd(table, list(known), list(order), k, dice)
            asked.append((table.calls - before, calls, len(tokens)))
            return tuple(tokens)

        where = f"order {order}, k = {k}, {len(known)} known"
        distance = nano_spec.total_variation(nano_spec.enumerate_outcomes(decode), along(order, vocab, known))
        need(all(n == len(order) for _, _, n in asked), f"{where}: {len(order)} tokens wanted, for the places asked alone")
        need(distance < 1e-12, f"{where}: total variation {distance:.3f} to the chain rule along the order")
        need(all(true == said for true, said, _ in asked), f"{where}: the calls reported are not those that were made")
        most = max(true for true, _, _ in asked)
        need(most <= len(order), f"{where}: {most} calls for {len(order)} tokens: what is checked when only one place is left?")
    table = Table(2)
    for k in (1, 2, 3):
        sizes = []
        table.apart = lambda known, places: sizes.append(len(places)) or Table.apart(table, known, places)
        assd(table, [], [0, 1, 2, 3, 4, 6], k, nano_spec.Dice(nano_spec.rng_at(0)))
        need(sizes[0] == k, f"the first round asks for k = {k} places, not {sizes[0]}")


def visible(m, k):
    row, column = torch.arange(m + k)[:, None], torch.arange(m + k)[None]
    return (column <= row) & ((column < m) | (column == row))


@exercise(
    ("plain causal", "    mask[m:, m:] = torch.eye(k).bool()\n", ""),
    ("copies see each other", "torch.eye(k).bool()", "torch.ones(k, k).bool()"),
    ("copies do not see themselves", "torch.eye(k).bool()", "torch.zeros(k, k).bool()"),
    ("later slots visible", ".tril()", ""),
    ("copies begin one slot early", "mask[m:, m:] = torch.eye(k).bool()", "mask[m - 1:, m - 1:] = torch.eye(k + 1).bool()"),
    ("transposed", "return mask", "return mask.T"),
    ("hidden, not visible", "return mask", "return ~mask"),
    ("copies see themselves alone", "mask[m:, m:] = torch.eye(k).bool()", "mask[m:] = torch.eye(m + k).bool()[m:]"),
)
def check_visible(visible):
    for m, k in ((1, 1), (2, 2), (3, 1), (1, 4), (5, 3)):
        rows = []
        for i in range(m + k):
            rows.append([j <= i and (i < m or j < m or j == i) for j in range(m + k)])
        ours = visible(m, k)
        need(ours.shape == (m + k, m + k), f"visible({m}, {k}): shape {tuple(ours.shape)}, wanted {(m + k, m + k)}")
        need(ours.tolist() == rows, f"visible({m}, {k}): {ours.int().tolist()}, wanted {[[int(x) for x in row] for row in rows]}")


# --- any density ---------------------------------------------------------------------------------------------------------------


class Density:
    """A piecewise constant density on the unit cells 0, 1, .., so that its cells can be counted."""

    def __init__(self, weights):
        self.weights = torch.tensor(weights, dtype=torch.double) / sum(weights)

    def sample(self, n, rng):
        cell = torch.multinomial(self.weights, n, replacement=True, generator=rng)
        return cell + torch.rand(n, generator=rng, dtype=torch.double) * 0.999

    def density(self, x):
        return self.weights[x.long()]


def speculative(p, q, n, rng):
    """For the cells of the lesson: with all tries of a draw in a loop over draws that are left."""
    x, kept = torch.empty(n, dtype=torch.double), torch.zeros(n, dtype=torch.bool)
    guess = q.sample(n, rng)
    stays = torch.rand(n, generator=rng, dtype=torch.double) < p.density(guess) / q.density(guess)
    x[stays], kept[stays] = guess[stays], True
    while (~stays).any():
        left = (~stays).nonzero()[:, 0]
        y = p.sample(len(left), rng)
        taken = torch.rand(len(left), generator=rng, dtype=torch.double) < 1 - q.density(y) / p.density(y)
        x[left[taken]], stays[left[taken]] = y[taken], True
    return x, kept


def residual_of_q(p, q, n, rng):
    """Wrong: the residual proposed from q, where it has little or no mass."""
    x = q.sample(n, rng)
    kept = torch.rand(n, generator=rng, dtype=x.dtype) * q.density(x) < p.density(x)
    return torch.where(kept, x, q.sample(n, rng)), kept


@exercise(
    ("all guesses stay", "kept = torch.rand(n, generator=rng, dtype=x.dtype) * q.density(x) < p.density(x)", "kept = torch.ones(n, dtype=torch.bool)"),
    ("p and q exchanged", "* q.density(x) < p.density(x)", "* p.density(x) < q.density(x)"),
    ("refused: drawn from p", "done = u * p.density(y) < p.density(y) - q.density(y)", "done = u > -1"),
    ("residual proposed from q", residual_of_q),
    ("only one try", "todo = todo[~done]", "todo = todo[:0]"),
    ("the absolute difference", "p.density(y) - q.density(y)", "(p.density(y) - q.density(y)).abs()"),
    ("kept with probability p", "* q.density(x) < p.density(x)", "< p.density(x)"),
    ("one u for all", "u = torch.rand(len(todo), generator=rng, dtype=x.dtype)", "u = 0.0"),
    ("refusals reported as kept", "return x, kept", "return x, ~kept"),
)
def check_speculative(speculative):
    for seed, (a, b) in enumerate((([1.0], [1.0]), ([1.0, 3.0], [3.0, 1.0]), ([1.0, 2.0, 3.0, 1.0], [4.0, 1.0, 1.0, 2.0]),
                                   ([5.0, 1.0, 0.0, 2.0, 2.0], [1.0, 1.0, 3.0, 1.0, 2.0]))):
        p, q, n = Density(a), Density(b), 20_000
        x, kept = speculative(p, q, n, torch.Generator().manual_seed(seed))
        need(x.shape == (n,) and kept.shape == (n,), f"n = {n} draws: shapes {tuple(x.shape)}, {tuple(kept.shape)}")
        need(x.isfinite().all() and (p.density(x) > 0).all(), "a draw where p is 0")
        alpha = float(torch.minimum(p.weights, q.weights).sum())
        share = float(kept.double().mean())
        noise = 4.5 * math.sqrt(0.25 / n)
        need(abs(share - alpha) < noise, f"p {a}, q {b}: {share:.3f} of the guesses stay, wanted sum min(p, q) = {alpha:.3f}")
        found = torch.bincount(x.long(), minlength=len(a)) / n
        worst = float((found - p.weights).abs().max())
        need(worst < noise, f"p {a}, q {b}: a cell is off by {worst:.3f}; noise would be {noise:.3f}")
        inside = (x - x.floor()).double().mean() / 0.999
        need(abs(float(inside) - 0.5) < noise, "inside a cell the draws are not uniform")
    few = speculative(Density([1.0, 2.0]), Density([2.0, 1.0]), 1, torch.Generator().manual_seed(1))
    need(few[0].shape == (1,), "n = 1 must work, too")


def ks(x, cdf):
    values = cdf(torch.sort(x)[0]).tolist()
    n = len(values)
    return torch.tensor(max(max(v - i / n, (i + 1) / n - v) for i, v in enumerate(values)))


@exercise(
    ("below the jumps alone", "torch.maximum(F - step, step + 1 / n - F)", "(F - step)"),
    ("above the jumps alone", "torch.maximum(F - step, step + 1 / n - F)", "(step + 1 / n - F)"),
    ("not sorted", "x.sort().values", "x"),
    ("the mean distance", ".max()", ".mean()"),
    ("steps begin at 1", "step = torch.arange(n) / n", "step = torch.arange(1, n + 1) / n"),
    ("the density of steps is n - 1", "torch.arange(n) / n", "torch.arange(n) / max(1, n - 1)"),
    ("sorted downwards", "x.sort().values", "x.sort(descending=True).values"),
)
def check_ks(ks):
    def uniform(x):
        return x.clamp(0, 1)

    def bent(x):
        return x.clamp(0, 1) ** 3

    for n, cdf in ((1, uniform), (2, bent), (7, uniform), (100, bent), (333, uniform)):
        x = torch.rand(n, generator=torch.Generator().manual_seed(n), dtype=torch.double)
        truth = 0.0
        for at in x.tolist():  # the largest distance lies at a jump, on one of its sides
            F = float(cdf(torch.tensor(at, dtype=torch.double)))
            below, upto = int((x < at).sum()) / n, int((x <= at).sum()) / n
            truth = max(truth, abs(F - below), abs(F - upto))
        close(ks(x, cdf), torch.tensor(truth), f"{n} samples")
    close(ks(torch.tensor([0.3]), uniform), torch.tensor(0.7), "one sample, F = .3")


# --- the router ------------------------------------------------------------------------------------------------------------------


@exercise(
    ("asks where the small model is sure", "> THETA", "<= THETA"),
    ("the entropy of the large one", "torch.special.entr(q[i])", "torch.special.entr(p[i])"),
    ("the router's token from q", "dice.choose(p[i])", "dice.choose(q[i])"),
    ("goes on behind a routed place", "return new + [dice.choose(p[i])]", "x = dice.choose(p[i])"),
    ("the guess is checked", "torch.special.entr(q[i]).sum() > THETA", "not dice.coin(min(1.0, float(p[i][x] / q[i][x])))"),
    ("no token when all stay", "return new + [dice.choose(p[len(draft)])]", "return new"),
    ("bits for nats", "torch.special.entr(q[i]).sum() > THETA", "torch.special.entr(q[i]).sum() / 0.6931 > THETA"),
    ("0 times infinity", "torch.special.entr(q[i]).sum() > THETA", "not -(q[i] * q[i].log()).sum() <= THETA"),
    ("the mean, not the sum", "torch.special.entr(q[i]).sum()", "torch.special.entr(q[i]).mean()"),
)
def check_accept_routed(accept_routed):
    def peaked(V, top):
        q = torch.full((V,), (1 - top) / (V - 1), dtype=torch.double)
        q[V // 2] = top
        return q

    tops = {"sure": 0.9, "unsure": 0.1, "between": 0.6, "certain": 1.0}
    for V, g, kinds in ((6, 0, ()), (9, 1, ("unsure",)), (9, 2, ("between", "unsure")), (7, 3, ("certain", "sure", "between")), (9, 3, ("sure", "unsure", "certain"))):
        q = [peaked(V, tops[kind]) for kind in kinds]
        p = torch.stack([torch.rand(V, generator=torch.Generator().manual_seed(i), dtype=torch.double) for i in range(g + 1)])
        p = p / p.sum(1, keepdim=True)
        draft = [(V // 2 if kind == "certain" else i) % V for i, kind in enumerate(kinds)]
        stop, truth = g, {}
        for i in reversed(range(g)):
            entropy = sum(-x * math.log(x) for x in q[i].tolist() if x > 0)
            stop = i if entropy > 1.5 else stop
        for y in range(V):
            truth[(*draft[:stop], y)] = float(p[stop][y])
        found = nano_spec.enumerate_outcomes(lambda dice: tuple(accept_routed(list(draft), q, p, dice)))
        need(nano_spec.total_variation(found, truth) < 1e-12,
             f"guesses {kinds or 'none'}: {stop} stay and the next token comes from p[{stop}]; got {len(next(iter(found)))} tokens or another law")
