"""Checks of lesson 40. Two exercises are proofs: they are examined by decoders, right and wrong. Oracles of the others:
loops over plain floats, all subsets, a grid of every allowed rho, and the law p itself by enumeration."""

import itertools

import torch

import nano_spec
from lessons.checks import close, exercise, need


def floats(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def pairs():
    """Distributions to try: one token, two, three, with zeros in p, in q, in both, equal, disjoint, five tokens."""
    yield from ((floats(1.0), floats(1.0)), (floats(0.9, 0.1), floats(0.3, 0.7)))
    yield from ((floats(0.5, 0.3, 0.2), floats(0.2, 0.2, 0.6)), (floats(0.6, 0.4, 0.0), floats(0.1, 0.3, 0.6)))
    yield from ((floats(0.2, 0.5, 0.3), floats(0.5, 0.5, 0.0)), (floats(0.0, 1.0), floats(1.0, 0.0)))
    yield floats(0.2, 0.8), floats(0.2, 0.8)


def outcomes(rule, p, q, k, distinct=False):
    """Enumerate k guesses and the rule -> law of the token as a list, probability that it is one of the guesses."""

    def decode(dice):
        left, guesses = q.clone(), []
        for _ in range(k):
            if left.sum() > 0:
                guesses.append(dice.choose(left / left.sum()))
            if distinct:
                left[guesses[-1]] = 0
        y = rule(p.clone(), q.clone(), guesses, dice)
        return y, y in guesses

    joint = nano_spec.enumerate_outcomes(decode)
    law = [sum(chance for (y, _), chance in joint.items() if y == x) for x in range(len(p))]
    return law, sum(chance for (_, hit), chance in joint.items() if hit)


# --- the first exam: decoders that a proof must tell apart ------------------------------------------------------------


def cut(p, q):
    """norm(max(p - q, 0)) written anew; p where that is all zero."""
    more = torch.where(p > q, p - q, torch.zeros_like(p))
    return more / more.sum() if more.sum() > 0 else p


def exact_rule(p, q, guesses, dice):
    for x in guesses:
        if dice.coin(min(1.0, float(p[x]) / float(q[x]))):
            return x
        p = cut(p, q)
    return dice.choose(p)


def slow_rule(p, q, guesses, dice):
    return dice.choose(p)  # looks at no guess: slow, and exact


def first_guess(p, q, guesses, dice):
    return guesses[0]


def no_coin(p, q, guesses, dice):
    return next((x for x in guesses if p[x] >= q[x]), None) or dice.choose(cut(p, q))


def from_p(p, q, guesses, dice):
    for x in guesses:
        if dice.coin(min(1.0, float(p[x]) / float(q[x]))):
            return x
    return dice.choose(p)


def all_against_p(p, q, guesses, dice):
    for x in guesses:
        if dice.coin(min(1.0, float(p[x]) / float(q[x]))):
            return x
    return dice.choose(cut(p, q))


def two_counted(p, q, guesses, dice):
    for i, x in enumerate(guesses):
        if dice.coin(min(1.0, float(p[x]) / float(q[x]))):
            return x
        p = cut(p, q) if i < 2 else p
    return dice.choose(p)


def not_cut(p, q, guesses, dice):
    for x in guesses:
        if dice.coin(min(1.0, float(p[x]) / float(q[x]))):
            return x
        p = (p - q).abs() / (p - q).abs().sum() if (p - q).abs().sum() > 0 else p
    return dice.choose(p)


def equal_dropped(p, q, guesses, dice):
    return exact_rule(p, q, list(dict.fromkeys(guesses)), dice)


def best_first(p, q, guesses, dice):
    return exact_rule(p, q, sorted(guesses, key=lambda x: -float(p[x])), dice)


def struck_out(p, q, guesses, dice):
    for x in guesses:
        if q[x] > 0 and dice.coin(min(1.0, float(p[x]) / float(q[x]))):
            return x
        p, q = cut(p, q), q.clone()
        q[x] = 0
        q = q / q.sum() if q.sum() > 0 else q
    return dice.choose(p)


def smoothed(p, q, guesses, dice):
    p = torch.where(p == 0, 1e-3, p)
    return exact_rule(p / p.sum(), q, guesses, dice)


WRONG_RULES = {
    "the first guess is taken": first_guess, "kept if p >= q, without a coin": no_coin, "all refused: drawn from p": from_p,
    "every guess tested against the same p": all_against_p, "only two guesses are subtracted": two_counted,
    "the residual is not cut at 0": not_cut, "equal guesses are dropped": equal_dropped, "likely guesses first": best_first,
    "refused guesses struck out of q, but drawn from all of it": struck_out, "zeros of p smoothed": smoothed,
}


def grade(prove, right, wrong, what):
    """prove(decoder) must be 0 for every right one, and not for any wrong one."""
    for name, decoder in right.items():
        value = float(prove(decoder))
        need(abs(value) < 1e-12, f"your exam refuses an exact {what}, {name}: {value:.2g} instead of 0")
    passed = [name for name, decoder in wrong.items() if not float(prove(decoder)) > 1e-6]
    need(not passed, f"your exam catches {len(wrong) - len(passed)} of {len(wrong)} wrong {what}s; these passed: {'; '.join(passed)}")


def sampled_exam(rule):
    """Wrong: a histogram of 300 draws in place of an enumeration."""
    p, q, dice = floats(0.5, 0.3, 0.2), floats(0.2, 0.2, 0.6), nano_spec.Dice(nano_spec.rng_at(0))
    drawn = torch.tensor([rule(p, q, [dice.choose(q), dice.choose(q)], dice) for _ in range(300)])
    return float((torch.bincount(drawn, minlength=3) / 300 - p).abs().sum()) / 2


@exercise(
    ("one guess is enough", "for k in (1, 2, 3):", "for k in (1,):"),
    ("two guesses are enough", "for k in (1, 2, 3):", "for k in (1, 2):"),
    ("no zero in p", ", ([0.6, 0.4, 0.0], [0.1, 0.3, 0.6])", ","),
    ("q equals p", "for law in (p, q))", "for law in (p, p))"),
    ("the last case counts", "worst = max(worst, nano_spec.total_variation(law, truth))", "worst = nano_spec.total_variation(law, dict(truth)) * (k == 1)"),
    ("signs cancel", "nano_spec.total_variation(law, truth)", "abs(sum(law.values()) - sum(truth.values())) * (abs(sum(law.values()) - 1) > 1e-9)"),
    ("guesses not drawn from q", "[dice.choose(q) for _ in range(k)]", "[x % 3 for x in range(k)]"),
    ("all guesses equal", "[dice.choose(q) for _ in range(k)]", "[dice.choose(q)] * k"),
    ("compared with q", "dict(enumerate(p.tolist()))", "dict(enumerate(q.tolist()))"),
    ("a histogram", sampled_exam),
)
def check_exam(exam):
    grade(exam, {"recursive rejection": exact_rule, "that never looks at its guesses": slow_rule}, WRONG_RULES, "rule")


# --- recursive rejection ----------------------------------------------------------------------------------------------


def accepted_by_loops(p, q, k, distinct):
    """Probability that some guess stays, in plain floats: follow every sequence of refusals."""
    if k == 0 or sum(q) <= 0:
        return 0.0
    q = [b / sum(q) for b in q]
    kept = [min(a, b) for a, b in zip(p, q)]
    left = [max(a - b, 0.0) for a, b in zip(p, q)]
    total = sum(kept)
    if sum(left) <= 1e-15:
        return total
    left = [a / sum(left) for a in left]
    for x, (b, m) in enumerate(zip(q, kept)):
        if b > m:  # guess x was refused
            rest = [0.0 if i == x and distinct else c for i, c in enumerate(q)]
            total += (b - m) * accepted_by_loops(left, rest, k - 1, distinct)
    return total


@exercise(
    ("p stays p", "        p = nano_spec.residual(p, q)\n", ""),
    ("always as without replacement", "if distinct:", "if guesses:"),
    ("never struck out", "if distinct:", "if not guesses:"),
    ("not scaled back to 1", "            q = q / q.sum()\n", ""),
    ("struck out before the residual", "        p = nano_spec.residual(p, q)\n        if distinct:\n", "        p = nano_spec.residual(p, q.index_fill(0, torch.tensor(x), 0.0))\n        if distinct:\n"),
    ("ratio upside down", "p[x] / q[x]", "q[x] / p[x]"),
    ("the residual is what q has more", "nano_spec.residual(p, q)", "nano_spec.residual(q, p)"),
    ("no coin", "dice.coin(min(1.0, float(p[x] / q[x])))", "p[x] >= q[x]"),
    ("looks at no guess", lambda p, q, guesses, dice, distinct=False: dice.choose(p)),
    ("one guess only", "for x in guesses:", "for x in guesses[:1]:"),
)
def check_recursive(recursive):
    for p, q in pairs():
        for k, distinct in ((0, False), (1, False), (2, False), (3, False), (2, True), (3, True)):
            def rule(p, q, guesses, dice):
                return recursive(p, q, guesses, dice, distinct)
            law, hit = outcomes(rule, p, q, k, distinct)
            case = f"p {p.tolist()}, q {q.tolist()}, {k} guesses{', distinct' if distinct else ''}"
            close(floats(*law), p, f"{case}: law of the token", 1e-9)
            need(hit > accepted_by_loops(p.tolist(), q.tolist(), k, distinct) - 1e-9,
                 f"{case}: kept {hit:.4f}, wanted {accepted_by_loops(p.tolist(), q.tolist(), k, distinct):.4f}: is every guess tested?")
    given = floats(0.2, 0.2, 0.6)
    recursive(floats(0.5, 0.3, 0.2), given, [2, 1], nano_spec.Dice(nano_spec.rng_at(0)), True)
    need(given.tolist() == [0.2, 0.2, 0.6], "the q that was passed in has changed: work on a copy")


# --- K-SEQ ------------------------------------------------------------------------------------------------------------


def kseq_on_a_grid(p, q, k, points=4000):
    """The best acceptance over all allowed rho on a grid of [1, k], in plain floats."""
    best = 0.0
    for j in range(points + 1):
        rho = 1 + (k - 1) * j / points
        beta = sum(min(b, a / rho) for a, b in zip(p, q))
        a = 1 - (1 - beta) ** k
        if a <= rho * beta + 1e-12:
            best = max(best, a)
            break  # acceptance falls with rho
    return best


@exercise(
    ("rho is always 1", "low, high = 1.0, float(max(k, 1))", "low, high = 1.0, 1.0"),
    ("rho is always k", "range(40)", "range(0)"),
    ("the end that is not allowed", "kept = torch.minimum(q, p / high)", "kept = torch.minimum(q, p / (0.9 * high))"),
    ("halvings the wrong way", "<= rho * beta", "> rho * beta"),
    ("the residual of one guess", "kept * (1 - (1 - beta) ** k) / beta", "kept"),
    ("all refused: from p", "return dice.choose(nano_spec.residual(p, kept * (1 - (1 - beta) ** k) / beta))", "return dice.choose(p)"),
    ("tested as if rho were 1", "dice.coin(float(kept[x] / q[x]))", "dice.coin(min(1.0, float(p[x] / q[x])))"),
    ("rho multiplies", "kept = torch.minimum(q, p / high)", "kept = torch.minimum(q, p * high)"),
    ("looks at no guess", lambda p, q, guesses, dice: dice.choose(p)),
    ("recursive rejection", exact_rule),
)
def check_kseq(kseq):
    for p, q in pairs():
        for k in (0, 1, 2, 3):
            case = f"p {p.tolist()}, q {q.tolist()}, {k} guesses"
            law, hit = outcomes(kseq, p, q, k)
            close(floats(*law), p, f"{case}: law of the token", 1e-6)
            kept = kseq_on_a_grid(p.tolist(), q.tolist(), k) if k else 0.0
            need(hit > kept - 2e-3, f"{case}: accepted {hit:.4f}, the smallest allowed rho gives {kept:.4f}")
    # a guess must stay with kept / q: the probability of the first guess at p = (.5, .5), q = (1, 0), rho = 1.7071
    law = nano_spec.enumerate_outcomes(lambda dice: (len(dice.fallen), kseq(floats(0.5, 0.5), floats(1.0, 0.0), [0, 0], dice), len(dice.fallen)))
    first = sum(chance for (_, x, coins), chance in law.items() if x == 0 and coins == 1)
    close(floats(first), floats(0.5 / 1.7071), "p (.5, .5), q (1, 0): the first of two guesses stays", 1e-3)


# --- the bound --------------------------------------------------------------------------------------------------------


@exercise(
    ("sorted the other way", ".argsort(descending=True)", ".argsort()"),
    ("sorted by q", "(q / p).nan_to_num(0.0, posinf=torch.inf)", "q"),
    ("sets of one token at most", "(P + 1 - Q ** n).min()", "(P + 1 - Q ** n)[:2].min()"),
    ("the largest", ".min()", ".max()"),
    ("one guess", "Q ** n", "Q"),
    ("a guess outside H, always", "P + 1 - Q ** n", "P + (1 - Q) ** n"),
    ("the mean over q", lambda p, q, n: float(1 - (1 - torch.minimum(p, q).sum()) ** n)),
    ("n times one guess", lambda p, q, n: min(1.0, n * float(torch.minimum(p, q).sum()))),
)
def check_best(best):
    rng = torch.Generator().manual_seed(0)
    cases = list(pairs())
    for V in (3, 5, 7):
        p, q = torch.rand(2, V, generator=rng, dtype=torch.float64) ** 2
        cases.append((p / p.sum(), q / q.sum()))
    for p, q in cases:
        for n in (1, 2, 5):
            truth = 2.0
            for size in range(len(p) + 1):
                for H in itertools.combinations(range(len(p)), size):
                    truth = min(truth, sum(float(p[x]) for x in H) + 1 - sum(float(q[x]) for x in H) ** n)
            case = f"p {[round(x, 3) for x in p.tolist()]}, q {[round(x, 3) for x in q.tolist()]}, n = {n}"
            close(floats(best(p, q, n)), floats(truth), f"{case}: the smallest over all {2 ** len(p)} sets", 1e-9)


# --- the second exam --------------------------------------------------------------------------------------------------


def children(parents, node):
    return [i for i in range(1, len(parents)) if parents[i] == node]


def walker(p_of=None, q_of=None, go_on=None, last=None):
    """A walk with one part exchanged: whose p, whose q, where to go on, what to write in the end."""

    def walk(p, q, tokens, parents, rule, dice):
        node, new, path = 0, [], []
        while True:
            path.append(node)
            below = children(parents, node)
            law = q[q_of(node, parents) if q_of else node] if below else None
            x = rule(p[p_of(node, parents) if p_of else node], law, [tokens[i] for i in below], dice)
            new.append(x)
            found = go_on(x, below, tokens) if go_on else [i for i in below if tokens[i] == x]
            if not found:
                return (last(new) if last else new), path
            node = found[0]

    return walk


def parent_of(node, parents):
    return max(parents[node], 0)


def sibling_of(node, parents):
    others = [i for i in children(parents, parents[node]) if i != node] if node else []
    return others[0] if others else node


def no_bonus(p, q, tokens, parents, rule, dice):
    """Exact, though slower: stops at a leaf without drawing there."""
    new, path = walker()(p, q, tokens, parents, rule, dice)
    return (new[:-1] if len(new) > 1 and not children(parents, path[-1]) else new), path


WRONG_WALKS = {
    "reads the p of the parent": walker(p_of=parent_of), "reads the p of a sibling": walker(p_of=sibling_of),
    "tests against the q of the root": walker(q_of=lambda node, parents: 0),
    "goes on below a refused guess": walker(go_on=lambda x, below, tokens: below[:1]),
    "goes on below the last child": walker(go_on=lambda x, below, tokens: below[-1:] if x in [tokens[i] for i in below] else []),
    "loses the token that was not guessed": walker(last=lambda new: new[:-1] or new),
    "writes the last token twice": walker(last=lambda new: new + new[-1:]),
    "keeps only the guesses of the first level": walker(last=lambda new: new[:1] + new[2:]),
}


@exercise(
    ("the first token alone", "return tuple(text[1:1 + n])", "return tuple(text[1:2])"),
    ("two tokens", "worst, n = nano_spec.Table(2), nano_spec.Table(2, 1), 0.0, 3", "worst, n = nano_spec.Table(2), nano_spec.Table(2, 1), 0.0, 1"),
    ("only chains", "((2, 1), (1, 2))", "((1, 1),)"),
    ("one level", "((2, 1), (1, 2))", "((2,), (1,))"),
    ("the draft is the target", "nano_spec.Table(2, 1)", "nano_spec.Table(2)"),
    ("what comes after is not drawn", "dice.choose(target.law(text))", "0"),
    ("guesses from the target", "draft_tree(Grown(draft),", "draft_tree(Grown(target),"),
    ("looked at by the draft", "p = Grown(target).look", "p = Grown(draft).look"),
    ("the last case counts", "worst = max(worst, nano_spec.total_variation(law, truth))", "worst = nano_spec.total_variation(law, truth) * (widths == (9,))"),
)
def check_exam_tree(exam_tree):
    right = {"from the root down": walker(), "that draws nothing at a leaf": no_bonus}
    grade(lambda walk: exam_tree(walk, exact_rule), right, WRONG_WALKS, "walk")
