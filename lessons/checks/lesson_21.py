"""Checks of lesson 21. Oracles: loops over numbers in float64, closed forms, an Adam written out with plain floats."""

import math

import torch

from lessons.checks import close, exercise, need


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- the law that is drawn from ---------------------------------------------------------------------------------------


def law_by_loops(conditional, unconditional, scale, temperature, top_p):
    """One row, number by number."""
    logits = [(u + scale * (c - u)) / temperature for c, u in zip(conditional, unconditional)]
    largest = max(logits)
    weights = [math.exp(x - largest) for x in logits]
    p = [w / sum(weights) for w in weights]
    kept, mass = [0.0] * len(p), 0.0
    for j in sorted(range(len(p)), key=p.__getitem__, reverse=True):
        if mass >= top_p:
            break
        kept[j] = p[j]
        mass += p[j]
    return [x / sum(kept) for x in kept]


def guided_probabilities(conditional, unconditional, scale, temperature, top_p):
    """Wrong: guidance on probabilities instead of logits."""
    p, q = conditional.softmax(-1), unconditional.softmax(-1)
    p = (q + scale * (p - q)).clamp(min=1e-9) ** (1 / temperature)
    first, order = (p / p.sum(-1, keepdim=True)).sort(-1, descending=True)
    kept = torch.where(first.cumsum(-1) - first < top_p, first, 0.0)
    kept = torch.zeros_like(p).scatter(-1, order, kept)
    return kept / kept.sum(-1, keepdim=True)


def nucleus_first(conditional, unconditional, scale, temperature, top_p):
    """Wrong: the nucleus of the untempered law."""
    p = (unconditional + scale * (conditional - unconditional)).softmax(-1)
    first, order = p.sort(-1, descending=True)
    kept = torch.where(first.cumsum(-1) - first < top_p, first, 0.0)
    kept = torch.zeros_like(p).scatter(-1, order, kept) ** (1 / temperature)
    return kept / kept.sum(-1, keepdim=True)


@exercise(
    ("guided the wrong way", "(conditional - unconditional)", "(unconditional - conditional)"),
    ("scale 1 is not the plain model", "unconditional + scale *", "conditional + scale *"),
    ("multiplied by the temperature", "/ temperature", "* temperature"),
    ("the token that crosses top_p is cut", "before < top_p", "before + ranked < top_p"),
    ("the least probable tokens kept", ", descending=True", ""),
    ("not put back in place", "torch.zeros_like(p).scatter(-1, order, kept)", "kept"),
    ("put back by the wrong index", ".scatter(-1, order, kept)", ".scatter(-1, order.argsort(-1).argsort(-1).flip(-1), kept)"),
    ("the kept mass is not 1", "kept / kept.sum(-1, keepdim=True)", "kept"),
    ("guidance on probabilities", guided_probabilities),
    ("nucleus before the temperature", nucleus_first),
)
def check_law(law):
    for shape, scale, temperature, top_p in (((1, 1), 1.0, 1.0, 1.0), ((2, 5), 1.0, 1.0, 0.7), ((3, 7), 2.5, 0.7, 0.9),
                                             ((2, 3, 50), 1.25, 1.4, 0.8), ((4, 9), 0.5, 1.0, 0.3)):
        c, u = normal(*shape), normal(*shape, seed=1)
        rows = zip(c.double().view(-1, shape[-1]).tolist(), u.double().view(-1, shape[-1]).tolist())
        truth = torch.tensor([law_by_loops(*row, scale, temperature, top_p) for row in rows], dtype=torch.double)
        case = f"logits {shape}, scale {scale}, temperature {temperature}, top_p {top_p}"
        close(law(c, u, scale, temperature, top_p), truth.view(shape), case)
    p = law(torch.tensor([0.5, 0.3, 0.2]).log(), torch.zeros(3), 1.0, 1.0, 0.6)
    close(p, torch.tensor([0.625, 0.375, 0.0]), "the worked example, (.5, .3, .2) with top_p .6")


# --- the settings that nothing beats ----------------------------------------------------------------------------------


@exercise(
    ("must be better in everything", "(costs[None] < costs[:, None]).any(-1)", "(costs[None] < costs[:, None]).all(-1)"),
    ("better in one thing is enough", "(costs[None] <= costs[:, None]).all(-1)", "(costs[None] <= costs[:, None]).any(-1)"),
    ("equals beat each other", "return ~(no_worse & better).any(1)", "return ~(no_worse & ~torch.eye(len(costs)).bool()).any(1)"),
    ("everything beats itself", "return ~(no_worse & better).any(1)", "return ~no_worse.any(1)"),
    ("those that beat nothing", ".any(1)", ".any(0)"),
    ("the beaten ones", "return ~(", "return ("),
    ("larger is better", lambda costs: ~((costs[None] >= costs[:, None]).all(-1) & (costs[None] > costs[:, None]).any(-1)).any(1)),
    ("best in one thing", lambda costs: (costs == costs.amin(0)).any(1)),
)
def check_front(front):
    cases = [torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 1.0], [1.0, 2.0], [3.0, 3.0]]),
             torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, 2.0]])]
    cases += [torch.randint(4, (n, k), generator=torch.Generator().manual_seed(n)).float() for n, k in ((7, 2), (12, 3), (30, 3))]
    for costs in cases:
        rows, truth = costs.tolist(), []
        for a in rows:
            beaten = False
            for b in rows:
                beaten |= all(y <= x for x, y in zip(a, b)) and any(y < x for x, y in zip(a, b))
            truth.append(not beaten)
        ours = front(costs)
        need(ours.shape == (len(costs),), f"one answer for each of {len(costs)} settings, not shape {tuple(ours.shape)}")
        need(ours.tolist() == truth, f"costs {rows if len(rows) < 8 else costs.shape}: {ours.tolist()}, wanted {truth}")


# --- condition contrastive alignment ----------------------------------------------------------------------------------


def log_sigmoid(x):
    """In plain floats; for x far below 0 it is x."""
    return -math.log1p(math.exp(-x)) if x > -30 else x - math.log1p(math.exp(x))


@exercise(
    ("lambda weighs the true pairs", "(F.logsigmoid(gap).mean() + lam * F", "(lam * F.logsigmoid(gap).mean() + F"),
    ("wrong pairs are praised too", "F.logsigmoid(-wrong_gap)", "F.logsigmoid(wrong_gap)"),
    ("1 - log sigma is not log (1 - sigma)", "F.logsigmoid(-wrong_gap)", "(1 - F.logsigmoid(wrong_gap))"),
    ("maximised", "return -(", "return ("),
    ("the true pairs' reference forgotten", "(log_p - log_p_ref)", "log_p"),
    ("beta outside", "return -(", "return -beta * ("),
    ("beta on the true pairs alone", "beta * (wrong - wrong_ref)", "(wrong - wrong_ref)"),
    ("log of a sigmoid that is 0", "F.logsigmoid(gap)", "gap.sigmoid().log()"),
    ("summed over the batch", "F.logsigmoid(gap).mean()", "F.logsigmoid(gap).sum()"),
    ("the loss of DPO", lambda a, b, c, d, beta, lam: -torch.nn.functional.logsigmoid(beta * (a - b - c + d)).mean()),
)
def check_cca_loss(cca_loss):
    for B, beta, lam, size in ((1, 1.0, 1.0, 1), (3, 0.1, 2.0, 5), (64, 0.02, 10.0, 50), (5, 1.0, 0.5, 900)):
        a, b, c, d = (size * normal(B, seed=seed) for seed in range(4))
        numbers = list(zip(*(x.double().tolist() for x in (a, b, c, d))))
        truth = -sum(log_sigmoid(beta * (w - x)) + lam * log_sigmoid(-beta * (y - z)) for w, x, y, z in numbers) / B
        hint = " (infinite? take logsigmoid)" if size > 100 else ""
        close(cca_loss(a, b, c, d, beta, lam), torch.tensor(truth, dtype=torch.double), f"{B} pairs, beta {beta}, lambda {lam}{hint}")
    # three images, two classes, each drawn as often as the law says: the gap of the closed form must be a minimum
    counts, beta, lam = torch.tensor([[4, 1, 1], [1, 2, 3]]), 0.5, 2.0
    p = counts.double() / counts.sum()
    best = (p / p.sum(1, keepdim=True) / (lam * p.sum(0))).log() / beta
    table = best.clone().requires_grad_()
    true = torch.repeat_interleave(table.flatten(), counts.flatten())
    chance = 24 * p.sum(1, keepdim=True) * p.sum(0)  # images beside classes drawn without looking at them
    wrong = torch.repeat_interleave(table.flatten(), chance.round().long().flatten())
    cca_loss(true, 0 * true, wrong, 0 * wrong, beta, lam).backward()
    close(table.grad, torch.zeros(2, 3), "the slope at gap = log(p(x|c) / (lambda p(x))) / beta", 1e-6)


# --- one row of a table -----------------------------------------------------------------------------------------------


def adam_by_hand(slope, x, steps, lr):
    """Adam (Kingma & Ba 2015, Algorithm 1) on a list of floats."""
    m, v = [0.0] * len(x), [0.0] * len(x)
    for t in range(1, steps + 1):
        for i, g in enumerate(slope(x)):
            m[i], v[i] = 0.9 * m[i] + 0.1 * g, 0.999 * v[i] + 0.001 * g * g
        x = [a - lr * (b / (1 - 0.9**t)) / (math.sqrt(c / (1 - 0.999**t)) + 1e-8) for a, b, c in zip(x, m, v)]
    return x


def learn_table(loss_of, table, row, steps, lr):
    """Wrong: every row is learned."""
    table = table.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([table], lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(table).backward()
        optimizer.step()
    return table.detach()


@exercise(
    ("gradients pile up", "        optimizer.zero_grad()\n", ""),
    ("weight decay", "torch.optim.Adam([vector], lr)", "torch.optim.AdamW([vector], lr, weight_decay=0.1)"),
    ("uphill", "loss_of(whole).backward()", "(-loss_of(whole)).backward()"),
    ("one step too few", "range(steps)", "range(steps - 1)"),
    ("another optimizer", "torch.optim.Adam([vector], lr)", "torch.optim.SGD([vector], lr)"),
    ("another row", "    whole = table.clone()\n    whole[row] = vector.detach()", "    whole = table.clone()\n    whole[row - 1] = vector.detach()"),
    ("the table itself is overwritten", "    whole = table.clone()\n    whole[row] = vector.detach()", "    whole = table\n    whole[row] = vector.detach()"),
    ("nothing learned comes back", "    whole = table.clone()\n    whole[row] = vector.detach()", "    whole = table.clone()"),
    ("all rows are learned", learn_table),
)
def check_learn_row(learn_row):
    for rows, width, row, steps, lr in ((2, 1, 0, 1, 0.1), (3, 5, 2, 4, 0.3), (11, 4, 9, 25, 0.05)):
        table, goal = normal(rows, width), normal(width, seed=7)
        untouched = table.clone()

        def loss_of(t):  # every other row pulls, too: a table that learns them all would show it
            return ((t[row] - goal) ** 2 * torch.arange(1, width + 1)).sum() + (t**2).sum()

        ours = learn_row(loss_of, table, row, steps, lr)
        need(torch.equal(table, untouched), "the table that was passed in has changed: work on a copy")
        need(ours.shape == table.shape, f"the whole table comes back, {tuple(table.shape)}, not {tuple(ours.shape)}")
        rest = torch.arange(rows) != row
        need(torch.equal(ours[rest], table[rest]), "another row than the new one has changed")
        aim = goal.double().tolist()
        truth = adam_by_hand(lambda x: [2 * (a - b) * (i + 1) + 2 * a for i, (a, b) in enumerate(zip(x, aim))],
                             table[row].double().tolist(), steps, lr)
        close(ours[row], torch.tensor(truth, dtype=torch.double), f"row {row} after {steps} steps of Adam at {lr}", 1e-4)


# --- erasing ----------------------------------------------------------------------------------------------------------


@exercise(
    ("the divergence the other way round", "(target.exp() * (target - log_p))", "(log_p.exp() * (log_p - target))"),
    ("averaged over all tokens", "far.sum().clamp(min=1)", "far.numel()"),
    ("the near tokens", "kl > threshold", "kl < threshold"),
    ("0 / 0 where nothing is far", ".clamp(min=1)", ""),
    ("no threshold", "kl > threshold", "kl > -1"),
    ("mean over the vocabulary", "(target - log_p)).sum(-1)", "(target - log_p)).mean(-1)"),
    ("the goal learns, too", "target_logits.detach()", "target_logits"),
    ("cross-entropy", "(target - log_p)", "(-log_p)"),
)
def check_erase_loss(erase_loss):
    for shape, threshold in (((1, 1, 2), 0.0), ((2, 3, 5), 0.4), ((4, 16, 7), 0.8), ((2, 3, 5), 99.0)):
        ours, goal = normal(*shape).requires_grad_(), normal(*shape, seed=1).requires_grad_()
        far = []
        for a, b in zip(ours.double().view(-1, shape[-1]).tolist(), goal.double().view(-1, shape[-1]).tolist()):
            log_a, log_b = math.log(sum(map(math.exp, a))), math.log(sum(map(math.exp, b)))
            kl = sum(math.exp(y - log_b) * ((y - log_b) - (x - log_a)) for x, y in zip(a, b))
            far += [kl] if kl > threshold else []
        truth = torch.tensor(sum(far) / max(1, len(far)), dtype=torch.double)
        loss = erase_loss(ours, goal, threshold)
        close(loss, truth, f"logits {shape}, threshold {threshold}, {len(far)} tokens above it")
        loss.backward()
        need(goal.grad is None or not goal.grad.any(), "the old model is the goal: no gradient may reach it")
        need(ours.grad.isfinite().all(), "a gradient is not finite: 0 / 0?")


# --- the last exercise ------------------------------------------------------------------------------------------------


def plausible_loops(c, u, scale, alpha):
    largest = max(c)
    return [b + scale * (a - b) if math.exp(a - largest) >= alpha else -math.inf for a, b in zip(c, u)]


@exercise(
    ("a difference of logits, not a ratio", "+ math.log(alpha)", "- alpha"),
    ("the implausible ones kept", "conditional < floor", "conditional >= floor"),
    ("plausible without the class", "conditional.amax(-1, keepdim=True)", "unconditional.amax(-1, keepdim=True)"),
    ("one floor for all rows", "conditional.amax(-1, keepdim=True)", "conditional.amax()"),
    ("measured after guidance", "conditional < floor", "guided < floor"),
    ("probability 0 is not logit 0", "-math.inf", "0.0"),
    ("not guided", "unconditional + scale * (conditional - unconditional)", "conditional + 0 * scale"),
    ("scale 1 is not the plain model", "unconditional + scale *", "conditional + scale *"),
)
def check_guide_plausible(guide_plausible):
    for shape, scale, alpha in (((1, 1), 3.0, 0.1), ((2, 1, 5), 2.0, 0.3), ((3, 8), 1.0, 0.05), ((4, 1, 40), 4.0, 0.2)):
        c, u = 2 * normal(*shape) - 3, 2 * normal(*shape, seed=1) + 3
        ours = guide_plausible(c, u, scale, alpha)
        rows = zip(c.double().view(-1, shape[-1]).tolist(), u.double().view(-1, shape[-1]).tolist())
        truth = torch.tensor([plausible_loops(*row, scale, alpha) for row in rows], dtype=torch.double).view(shape)
        need(ours.shape == truth.shape, f"shape {tuple(ours.shape)}, wanted {tuple(truth.shape)}")
        ours, truth = ours.softmax(-1), truth.softmax(-1)
        close(ours, truth, f"probabilities of logits {shape} at scale {scale}, alpha {alpha}")
