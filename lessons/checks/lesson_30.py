"""Checks of lesson 30. Oracles: masks by two loops and by kernels.py, pairs counted in masks, laws enumerated cell by cell,
nuclei built token by token, the training pass of a network for its cached run."""

import itertools

import torch

import kernels
import nano_var
from lessons.checks import close, exercise, need


def counts(scales):
    return [s * s for s in scales]


MASKS = {
    "tokens": lambda scales: kernels.causal(sum(counts(scales))),
    "scales": lambda scales: kernels.scales(counts(scales)),
    "markov": lambda scales: kernels.markov(counts(scales)),
}


@exercise(
    ("rows and columns swapped", "row == column if kind == \"markov\" else row >= column",
     "row == column if kind == \"markov\" else row <= column"),
    ("a map does not see itself", "row >= column", "row > column"),
    ("Markov sees the map before, too", "row == column if", "(row == column) | (row == column + 1) if"),
    ("Markov is VAR's mask", "row == column if kind == \"markov\" else row >= column", "row >= column"),
    ("sides counted instead of cells", "s * s for s in scales", "s for s in scales"),
    ("tokens see their whole map", "    if kind == \"tokens\":\n        number = torch.arange(len(number))\n", ""),
    ("Markov tokens see themselves alone", "if kind == \"tokens\":", "if kind != \"scales\":"),
    ("0 and 1 instead of boolean", "return row == column if kind == \"markov\" else row >= column",
     "return (row == column if kind == \"markov\" else row >= column).int()"),
)
def check_mask(mask):
    for scales in ((1,), (1, 2), (3, 1, 2), (1, 2, 4, 8), (8,)):
        number = [k for k, s in enumerate(scales) for _ in range(s * s)]
        L = len(number)
        rules = {"tokens": lambda i, j: j <= i, "scales": lambda i, j: number[j] <= number[i],
                 "markov": lambda i, j: number[j] == number[i]}
        for kind, rule in rules.items():
            truth, ours = [[rule(i, j) for j in range(L)] for i in range(L)], mask(kind, scales)
            case = f"{kind}, scales {scales}"
            need(torch.is_tensor(ours) and ours.dtype == torch.bool, f"{case}: return a boolean tensor")
            close(ours, truth, f"{case} (row: who looks)")
            need(ours.equal(MASKS[kind](scales).dense()[0, 0]), f"{case}: not the mask of kernels.py")


def work_slowly(kind, scales, cached):
    """Counted in the mask, call by call."""
    seen, sizes = MASKS[kind](scales).dense()[0, 0], [1] * sum(counts(scales)) if kind == "tokens" else counts(scales)
    slots = pairs = start = 0
    for n in sizes:
        first = start if cached or kind == "markov" else 0
        slots += start + n - first
        pairs += seen[first:start + n].sum().item()
        start += n
    return len(sizes), slots, pairs


@exercise(
    ("Markov attends to what it cannot see", "n * (n if kind == \"markov\" else seen)", "n * seen"),
    ("a new slot does not see its own map", "        seen += n\n        new", "        new = n * seen\n        seen += n\n        ignored"),
    ("without cache every pair, no mask", "else so_far", "else seen * seen"),
    ("without cache only the new pairs", "pairs += new if cached or kind == \"markov\" else so_far", "pairs += new"),
    ("without cache only the new slots", "slots += n if cached or kind == \"markov\" else seen", "slots += n"),
    ("Markov computes older maps again", "slots += n if cached or kind == \"markov\" else seen", "slots += n if cached else seen"),
    ("Markov's pairs of older maps again", "pairs += new if cached or kind == \"markov\" else so_far", "pairs += new if cached else so_far"),
    ("tokens map by map", "sizes = [1] * sum(sizes)", "sizes = sizes"),
    ("one call a cell in every factorisation", "    if kind == \"tokens\":\n        sizes", "    if True:\n        sizes"),
    ("cells, not sides, are given", "[s * s for s in scales]", "list(scales)"),
)
def check_work(work):
    for scales in ((1,), (1, 2), (2, 3, 1), (8,), (1, 2, 4, 8), (1, 2, 3, 4, 6, 8)):
        for kind, cached in itertools.product(MASKS, (True, False)):
            ours, truth = work(kind, scales, cached), work_slowly(kind, scales, cached)
            need(len(ours) == 3, "return calls, slots, pairs")
            for what, a, b in zip(("calls", "slots", "pairs"), ours, truth):
                need(a == b, f"{kind}, scales {scales}, cache {cached}: {a} {what}, wanted {b}")


def law_slowly(joint, groups):
    """One picture after the other; a conditional law is a quotient of two sums over a dictionary."""
    p = {x: joint[x].item() for x in itertools.product(*(range(n) for n in joint.shape))}

    def mass(known):
        return sum(value for x, value in p.items() if all(x[i] == v for i, v in known.items()))

    q = torch.zeros_like(joint)
    for x in p:
        product, known = 1.0, {}
        for group in groups:
            below = mass(known)
            for i in group:
                product *= mass({**known, i: x[i]}) / below if below else 0.0
            known |= {i: x[i] for i in group}
        q[x] = product
    return q


@exercise(
    ("nothing is conditioned on", "marginal([*before, cell]) / marginal(before).clamp(min=1e-30)", "marginal([cell])"),
    ("no group sees another", "        before = before + group\n", ""),
    ("cells of a group see each other", ".clamp(min=1e-30)\n        before = before + group\n",
     ".clamp(min=1e-30)\n            before = before + [cell]\n"),
    ("the law of the group, not of its cells", "            q = q * marginal([*before, cell]) / marginal(before).clamp(min=1e-30)\n",
     "            pass\n        q = q * marginal([*before, *group]) / marginal(before).clamp(min=1e-30)\n"),
    ("nan where the past cannot occur", ".clamp(min=1e-30)", ""),
    ("only the last group is remembered", "before = before + group", "before = group"),
    ("not divided by the past", " / marginal(before).clamp(min=1e-30)", ""),
    ("joint itself", "    return q\n", "    return joint\n"),
    ("the list of groups is changed", "before = before + group", "group += before; before = group"),
)
def check_drawn_law(drawn_law):
    def rng(seed):
        return torch.Generator().manual_seed(seed)

    equal = torch.tensor([[0.5, 0.0], [0.0, 0.5]]).double()
    close(drawn_law(equal, [[0], [1]]), equal, "two equal cells, one by one: the chain rule is exact")
    close(drawn_law(equal, [[0, 1]]), torch.full((2, 2), 0.25), "two equal cells at once")
    cases = [((3,), [[0]]), ((2, 2, 2, 2), [[0], [1, 2, 3]]), ((2, 2, 2, 2), [[3, 0], [2, 1]]), ((2, 2, 2), [[2], [0], [1]]),
             ((4, 2, 3), [[1], [0, 2]]), ((2, 3, 2), [[0, 1, 2]]), ((3, 2, 2, 2), [[0], [1, 2], [3]])]
    for seed, (shape, groups) in enumerate(cases):
        joint = torch.rand(shape, generator=rng(seed), dtype=torch.float64)
        joint = torch.where(torch.rand(shape, generator=rng(seed + 50)) < 0.4, 0.0, joint)
        joint[(0,) * len(shape)] += 0.1
        joint[-1] *= 0.0 if seed % 2 and shape[0] > 1 else 1.0  # a first cell that cannot have its last value
        joint /= joint.sum()
        given = [list(group) for group in groups]
        ours, case = drawn_law(joint.clone(), given), f"axes {shape}, groups {groups}"
        need(given == groups, f"{case}: the list of groups was changed")
        close(ours, law_slowly(joint, groups), case, 1e-9)
        close(ours.sum(), 1.0, f"{case}: the sum of q", 1e-9)


def outside_slowly(logits, tokens, p):
    """Nuclei token by token, from the likeliest on, until they hold p."""
    law = logits.double().softmax(-1).flatten(0, -2).tolist()
    missed = left = 0.0
    for row, token in zip(law, tokens.flatten().tolist()):
        kept, mass = set(), 0.0
        for v in sorted(range(len(row)), key=lambda v: -row[v]):
            if mass >= p:
                break
            kept.add(v)
            mass += row[v]
        missed += token not in kept
        left += 1 - mass
    return missed / len(law), left / len(law)


@exercise(
    ("one token too few", "law.cumsum(-1) - law < p", "law.cumsum(-1) < p"),
    ("the unlikeliest tokens", "descending=True", "descending=False"),
    ("the share inside", "1 - inside.double().mean()", "inside.double().mean()"),
    ("the mass inside", "(law * ~kept)", "(law * kept)"),
    ("1 - p is what the model expects", "(law * ~kept).sum(-1).mean().item()", "1 - p"),
    ("logits taken for probabilities", "logits.double().softmax(-1)", "logits.double()"),
    ("place and token mixed up", "order.argsort(-1).gather", "order.gather"),
    ("all tokens likelier than p", "law.cumsum(-1) - law < p", "law > p"),
)
def check_outside(outside):
    rng = torch.Generator().manual_seed(0)
    sure = torch.tensor([[[0.6, 0.3, 0.1]]]).log()
    close(torch.tensor(outside(sure, torch.tensor([[0]]), 0.5)), [0.0, 0.4], "law .6, .3, .1, token 0, p = .5")
    close(torch.tensor(outside(sure, torch.tensor([[2]]), 0.7)), [1.0, 0.1], "law .6, .3, .1, token 2, p = .7")
    for shape in ((1, 1, 2), (3, 5, 7), (20, 16, 30)):
        logits = 2 * torch.randn(shape, generator=rng)
        tokens = kernels.sample(logits, generator=rng)
        for p in (0.3, 0.5, 0.9, 0.99):
            ours = outside(logits, tokens, p)
            need(len(ours) == 2, "return two shares: seen and expected")
            truth = outside_slowly(logits, tokens, p)
            for what, a, b in zip(("seen", "expected by the model"), ours, truth):
                close(a, b, f"logits {shape}, p = {p}: share outside, {what}", 1e-4)


# --- networks: an untrained one whose layers all speak, and the lesson's own -------------------------------------------


def loud(network, seed=0):
    """In float64, no weight zero: nothing hides behind a zero-initialised layer."""
    rng = torch.Generator().manual_seed(seed)
    for p in network.parameters():
        p.data = torch.randn(p.shape, generator=rng) * 0.4
    return network.double().eval().requires_grad_(False)


def toy_pyramid(scales, V, kind=nano_var.Pyramid):
    """Random codes and repairs; a last map smaller than 8 x 8 is enlarged, too."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        pyramid = kind(scales, V, 4)
        for s in scales:
            if s < nano_var.SIDE:
                pyramid.phi[str(s)] = torch.nn.Conv2d(4, 4, 3, padding=1)
        pyramid = loud(pyramid)
        pyramid.codes.copy_(torch.randn(V, 4, generator=torch.Generator().manual_seed(2)))
    return pyramid


def drive(run, tokens):
    """All that a run yields when it is sent these tokens (B, L), and whether it ends when it has them all."""
    seen, done = [next(run)], 0
    while True:
        n = seen[-1].shape[1]
        try:
            seen.append(run.send(tokens[:, done:done + n]))
        except StopIteration:
            return torch.cat(seen, 1), [part.shape[1] for part in seen], done + n
        done += n
        if done >= tokens.shape[1]:
            return torch.cat(seen, 1), [part.shape[1] for part in seen], None


@exercise(
    ("the cache is thrown away", "cache, start)", "model.new_cache(len(labels)), start)"),
    ("every call is the first", "cache, start)", "cache, 0)"),
    ("only the map before, not the sum", "start = total + pyramid.grow(", "start = pyramid.grow("),
    ("coarse maps are never added", "total + pyramid.grow(tokens, side), start", "total, start"),
    ("the first label for all", "model(nano_var.area(total, side), labels,", "model(nano_var.area(total, side), labels[:1].expand(len(labels)),"),
    ("the last map is forgotten", "for side in pyramid.scales:", "for side in pyramid.scales[:-1] or pyramid.scales[:0]:"),
    ("cells counted as sides", "start + side * side", "start + side"),
    ("probabilities instead of logits", "yield model(nano_var.area(total, side), labels, cache, start)",
     "yield model(nano_var.area(total, side), labels, cache, start).softmax(-1)"),
    ("always 1 x 1 inputs", "nano_var.area(total, side)", "nano_var.area(total, 1).expand(-1, side * side, -1)"),
)
@torch.no_grad()
def check_by_maps(by_maps):
    for B, V, scales in ((1, 3, (1, 2)), (2, 5, (1, 2, 4)), (3, 7, (1, 2, 3, 8)), (2, 4, (8,))):
        with torch.random.fork_rng():
            torch.manual_seed(B)
            model = loud(nano_var.VAR(V, 4, 3, scales, 32, 2, 1))
        pyramid, L = toy_pyramid(scales, V), sum(counts(scales))
        rng = torch.Generator().manual_seed(B)
        labels, tokens = torch.arange(B), torch.randint(V, (B, L), generator=rng)
        case = f"{B} pictures, scales {scales}"
        try:
            ours, sizes, ended = drive(by_maps(model, pyramid, labels), tokens)
        except NotImplementedError:
            raise  # unwritten
        except (RuntimeError, StopIteration) as error:
            need(False, f"{case}: {(str(error).splitlines() or ['it yields nothing'])[0]}")
        need(sizes == counts(scales), f"{case}: calls of {sizes} tokens, wanted {counts(scales)}")
        need(ended == L, f"{case}: it must end when it was sent the last map")
        truth = model(pyramid.decode(tokens)[0], labels)  # the training pass, all maps under the mask
        close(ours, truth, f"{case}: logits differ from those of the training pass", 1e-8)


@torch.no_grad()
def map_run(model, pyramid, labels):
    """The run of exercise 5 without a cache or a running sum: each call makes the whole training pass, and uses one map of it."""
    tokens = torch.zeros(len(labels), model.length, dtype=torch.long)
    start = 0
    for n in counts(pyramid.scales):
        part = yield model(pyramid.decode(tokens)[0], labels)[:, start:start + n]
        tokens = torch.cat([tokens[:, :start], part, tokens[:, start + n:]], 1)
        start += n


@torch.no_grad()
def examine(Factored, Telling, one_by_one):
    """The oracles for the lesson's network in all factorisations, printed; raises if one fails."""
    shift, leaked, used, sums = 0.0, 0.0, [], []
    for kind, scales in (("tokens", (1, 2, 3)), ("tokens", (3,)), ("scales", (1, 2, 3)), ("markov", (1, 2, 3))):
        model = loud(Factored(kind, 5, 4, scales, 32, 2))
        pyramid = toy_pyramid(scales, 5, Telling if kind == "tokens" else nano_var.Pyramid)
        rng, L = torch.Generator().manual_seed(3), sum(counts(scales))
        labels, tokens = torch.tensor([0, 7]), torch.randint(5, (2, L), generator=rng)
        whole = model(pyramid.decode(tokens)[0], labels)
        if kind == "tokens":
            cached = drive(one_by_one(model, pyramid, labels), tokens)[0]
        else:
            seen, maps = [], nano_var.split_maps(tokens, scales)
            real = model.forward

            def watched(*arguments):
                seen.append(real(*arguments))
                return seen[-1]

            model.forward = watched
            nano_var.generate(model, pyramid, labels, rng, change=lambda k, total, drawn: maps[k])
            model.forward, cached = real, torch.cat(seen, 1)
        shift = max(shift, (cached - whole).abs().max().item())
        number = list(range(L)) if kind == "tokens" else [k for k, s in enumerate(scales) for _ in range(s * s)]
        for t in range(L):
            other = tokens.clone()
            other[:, t] = (other[:, t] + 1) % 5
            moved = (model(pyramid.decode(other)[0], labels) - whole).abs().amax((0, 2))
            later = torch.tensor([i > number[t] for i in number])
            leaked = max(leaked, moved[~later].max().item())
            if later.any():
                used.append(moved[later].max().item())
    every = torch.tensor(list(itertools.product(range(2), repeat=5)))
    for kind in MASKS:
        model, label = loud(Factored(kind, 2, 4, (1, 2), 32, 2)), torch.full((32,), 3)
        pyramid = toy_pyramid((1, 2), 2, Telling if kind == "tokens" else nano_var.Pyramid)
        sums.append((-nano_var.nats(model, pyramid, every, label).double().sum(1)).exp().sum().item())
    print(f"cached and uncached logits differ by at most {shift:.0e}")
    print(f"a token changes logits of its own group and earlier ones by {leaked:.0e}, later ones by {min(used):.0e} or more")
    print(f"the probabilities of all 32 pictures of (1, 2) cells sum to {min(sums):.6f} .. {max(sums):.6f}")
    need(shift < 1e-9, "cached and uncached logits differ")
    need(leaked < 1e-12, "a logit depends on a token that is drawn with it or after it")
    need(min(used) > 1e-6, "no later logit reads a token")
    need(max(abs(total - 1) for total in sums) < 1e-5, "the probabilities do not sum to 1")
