"""Checks of lesson 61. Oracles: softmax over the union, prefix by prefix in float64; a sort; a loop over one chain."""

import contextlib
import math
from unittest import mock

import torch

import kernels
from lessons.checks import close, exercise, need


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def summary(scores, values):
    """(m, u, w) of a set in float64, key by key."""
    m = max(scores.tolist(), default=-math.inf)
    weights = [math.exp(s - m) for s in scores.tolist()]
    w = torch.zeros(values.shape[-1], dtype=torch.float64)
    for weight, v in zip(weights, values):
        w += weight * v.double()
    return torch.tensor(m, dtype=torch.float64), torch.tensor(sum(weights), dtype=torch.float64), w


EMPTY = torch.tensor(-math.inf).double(), torch.tensor(0.0).double(), torch.zeros(3).double()


@exercise(
    ("sums added as they are", "u1 * x + u2 * y", "u1 + u2"),
    ("w not rescaled", "w1 * x[..., None] + w2 * y[..., None]", "w1 + w2"),
    ("the first set's maximum", "torch.maximum(m1, m2)", "m1"),
    ("the maxima added", "torch.maximum(m1, m2)", "m1 + m2"),
    ("-inf minus -inf", "torch.where(m == -torch.inf, 0.0, m)", "m"),
    ("the factors exchanged", "w1 * x[..., None] + w2 * y[..., None]", "w1 * y[..., None] + w2 * x[..., None]"),
    ("rescaled the wrong way round", "torch.exp(m1 - shift)", "torch.exp(shift - m1)"),
    ("the shift returned as the maximum", "return m,", "return shift,"),
)
def check_merge(merge):
    s, v = 4 * normal(12).double(), normal(12, 3, seed=1).double()
    for a, b in ((1, 1), (1, 4), (5, 2), (3, 9)):
        ours = merge(summary(s[:a], v[:a]), summary(s[a:a + b], v[a:a + b]))
        need(len(ours) == 3, "return the three parts m, u, w")
        for name, x, y in zip("muw", ours, summary(s[:a + b], v[:a + b])):
            close(x, y, f"{name} of the union of {a} and {b} keys", 1e-9)
    far = summary(torch.tensor([900.0]), v[:1]), summary(torch.tensor([-900.0]), v[1:2])
    for x, y in zip(merge(*far), far[0]):
        close(x, y, "scores of 900 and -900: nothing may overflow", 1e-9)
    one = summary(s[:2], v[:2])
    for pair, wanted, what in (((one, EMPTY), one, "the empty set on the right"), ((EMPTY, one), one, "on the left"),
                               ((EMPTY, EMPTY), EMPTY, "two empty sets")):
        for x, y in zip(merge(*pair), wanted):
            close(x, y, f"{what} must change nothing", 1e-9)
    rows = [[torch.stack(x) for x in zip(summary(s[k:k + 2], v[k:k + 2]), summary(s[k + 1:k + 4], v[k + 1:k + 4]))] for k in (0, 6)]
    both = merge(*rows)
    for k in range(2):
        for x, y in zip(both, merge(*[[x[k] for x in part] for part in rows])):
            close(x[k], y, "a batch of two summaries", 1e-9)


@exercise(
    ("the mean of the parts", "weight = torch.exp(lse - shift)", "weight = torch.ones_like(lse)"),
    ("weighted by the logarithm", "torch.exp(lse - shift)", "lse"),
    ("the exponential overflows", "torch.exp(lse - shift)", "torch.exp(lse)"),
    ("-inf minus -inf", "torch.where(m == -torch.inf, 0.0, m)", "m"),
    ("never divided", " / torch.where(total == 0, 1.0, total)[:, None]", ""),
    ("0 / 0 where nothing is seen", "torch.where(total == 0, 1.0, total)", "total"),
    ("the heads mixed", "total = weight.sum(0)", "total = weight.sum(0).mean().expand(lse.shape[1])"),
    ("one maximum for all heads", "m = lse.amax(0)", "m = lse.amax().expand(lse.shape[1])"),
)
def check_combine(combine):
    ours = combine(torch.tensor([[[4.0]], [[8.0]]]), torch.tensor([[0.0], [math.log(3)]]))
    close(ours, [[7.0]], "outputs 4 and 8 with lse 0 and log 3")
    for parts, heads, d in ((1, 1, 2), (3, 2, 5), (8, 4, 16)):
        o, lse, truth = torch.zeros(parts, heads, d), torch.full((parts, heads), -math.inf), torch.zeros(heads, d)
        for h in range(heads):
            scores, values = 3 * normal(parts * 4, seed=h) + 150 * h, normal(parts * 4, d, seed=9)
            truth[h] = torch.softmax(scores.double(), 0) @ values.double()
            for c in range(parts):
                chunk = slice(4 * c, 4 * c + 4)
                o[c, h] = torch.softmax(scores[chunk], 0) @ values[chunk]
                lse[c, h] = torch.logsumexp(scores[chunk], 0)
        close(combine(o, lse), truth, f"{parts} parts, {heads} heads", 1e-4)
        more, none = torch.cat([o, torch.zeros(1, heads, d)]), torch.full((1, heads), -math.inf)
        close(combine(more, torch.cat([lse, none])), truth, "a part without keys (o = 0, lse = -inf) must not count", 1e-4)
    close(combine(torch.zeros(2, 1, 3), torch.full((2, 1), -math.inf)), torch.zeros(1, 3), "no keys at all give 0")


@exercise(
    ("the distance grows by one", "step *= 2", "step += 1"),
    ("one round too few", "while step < len(s)", "while 2 * step < len(s)"),
    ("starts with distance two", "step = 1", "step = 2"),
    ("a key weighs nothing", "torch.ones_like(s)", "torch.zeros_like(s)"),
    ("suffixes instead of prefixes", "[torch.cat([x[:step], y])", "[torch.cat([y, x[-step:]])"),
    ("never divided", "kernels.finish(state)[0]", "state[2]"),
    ("merged with itself", "[x[:-step] for x in state]", "[x[step:] for x in state]"),
    ("one key after the other", lambda s, v: torch.stack([kernels.scan_attention(s[:k + 1], v[:k + 1])[k] for k in range(len(s))])),
)
def check_scan(scan):
    for n, d in ((1, 1), (2, 3), (7, 3), (8, 4), (33, 16)):
        s, v, calls = 3 * normal(n), normal(n, d, seed=1), []

        def counted(a, b, merge=kernels.merge):
            calls.append(1)
            return merge(a, b)

        with mock.patch.object(kernels, "merge", counted):
            ours = scan(s, v)
        truth = torch.stack([torch.softmax(s[:j + 1].double(), 0) @ v[:j + 1].double() for j in range(n)])
        close(ours, truth, f"{n} keys: row j is attention over keys 0 to j", 1e-4)
        rounds = math.ceil(math.log2(n))
        need(len(calls) == rounds, f"{n} keys: kernels.merge was called {len(calls)} times, wanted {rounds} rounds")


def without_the_one_that_crosses(p, top_p):
    ordered, place = p.sort(descending=True)
    keep = ordered.cumsum(0) <= top_p * p.sum()
    return torch.zeros_like(p).scatter(0, place, torch.where(keep, ordered, 0.0))


def first_of_the_tied(p, top_p):
    ordered, place = p.sort(descending=True, stable=True)
    keep = ordered.cumsum(0) - ordered < top_p * p.sum()
    return torch.zeros_like(p).scatter(0, place, torch.where(keep, ordered, 0.0))


def by_a_sort(p, top_p):
    """Right values."""
    ordered = p.sort(descending=True).values
    kept = int((ordered.cumsum(0) - ordered < top_p * p.sum()).sum())
    return torch.where(p >= ordered[kept - 1], p, 0.0)


@contextlib.contextmanager
def no_sort():
    def refuse(*args, **kwargs):
        need(False, "no sort and no topk: halve an interval of integers")

    with contextlib.ExitStack() as stack:
        for place in (torch, torch.Tensor):
            for name in ("sort", "argsort", "topk", "kthvalue"):
                stack.enter_context(mock.patch.object(place, name, refuse))
        yield


@exercise(
    ("a sort", by_a_sort),
    ("the weights do not sum to 1", "top_p * p.sum()", "top_p"),
    ("the token that crosses is dropped", without_the_one_that_crosses),
    ("one of two tied tokens", first_of_the_tied),
    ("rounded down: the last step is never made", "(lo + hi + 1) // 2", "(lo + hi) // 2"),
    ("too few rounds", "range(31)", "range(16)"),
    ("more than enough asked for", ">= need", "> need"),
    ("the threshold itself dropped", "torch.where(bits >= lo, p, 0.0)", "torch.where(bits > lo, p, 0.0)"),
    ("the least likely kept", "torch.where(bits >= lo, p, 0.0)", "torch.where(bits <= lo, p, 0.0)"),
    ("halves of the value, not of the bits", lambda p, top_p: halves_of_the_value(p, top_p)),
)
def check_nucleus(nucleus):
    rng = torch.Generator().manual_seed(0)
    cases = [([8.0], 0.5), ([4.0, 2.0, 1.0, 1.0], 0.75), ([4.0, 2.0, 1.0, 1.0], 0.8), ([1.0, 1.0, 1.0], 0.5), ([0.0, 0.0, 2.0], 1.0)]
    cases += [([1.0, 1.0 + 2**-23, 0.5], 0.3), ([2.0**-30, 2.0**-31, 2.0**-32], 0.5)]
    cases += [(torch.randint(0, 64, (n,), generator=rng).tolist(), p) for n, p in ((5, 0.5), (100, 0.875), (1000, 0.25))]
    for weights, top_p in cases:
        kept = [0.0] * len(weights)
        for k, weight in enumerate(weights):  # sums of a few binary digits are exact, whatever their order
            likelier = sum(other for other in weights if other > weight)
            kept[k] = weight if likelier < top_p * sum(weights) else 0.0
        what = str(weights) if len(weights) < 6 else f"{len(weights)} weights"
        close(nucleus(torch.tensor(weights, dtype=torch.float32), top_p), kept, f"{what}, top_p {top_p}")
    spread = torch.tensor([1.0, 2.0**-22, 2.0**-23])
    close(nucleus(spread, 1 - 2**-23), [1.0, 2.0**-22, 0.0], "a threshold of 2^-22 beside a weight of 1", 1e-9)
    with no_sort():
        close(nucleus(torch.tensor([4.0, 2.0, 1.0, 1.0]), 0.75), [4.0, 2.0, 0.0, 0.0], "the worked example")


def halves_of_the_value(p, top_p):
    lo, hi, need = 0.0, float(p.max()), top_p * p.sum()
    for _ in range(20):
        mid = (lo + hi) / 2
        lo, hi = (mid, hi) if p[p >= mid].sum() >= need else (lo, mid)
    return torch.where(p >= lo, p, 0.0)


def one_chain(p, q, drafts, uniforms, noise):
    """A loop over one chain, in float64: what Algorithm 1 of arXiv:2211.17192 says."""
    p, q, noise = p.double().tolist(), q.double().tolist(), noise.double().tolist()
    tokens = []
    for t, token in enumerate(drafts.tolist()):
        if float(uniforms[t]) * q[t][token] < p[t][token]:
            tokens.append(token)
            continue
        law = [max(a - b, 0.0) for a, b in zip(p[t], q[t])]
        law = law if sum(law) > 0 else p[t]
        break
    else:
        law = p[len(drafts)]
    arrival = [e / a if a > 0 else math.inf for a, e in zip(law, noise)]
    n = len(tokens)
    return tokens + [arrival.index(min(arrival))] + [-1] * (len(drafts) - n), n


@exercise(
    ("redrawn from p, not from the residual", "residual = (p_next - q_next).clamp(min=0)", "residual = p_next"),
    ("a later draft accepted after a refusal", ".cumprod(1).sum(1)", ".sum(1)"),
    ("the residual not cut at 0", ".clamp(min=0)", ".abs()"),
    ("a token of probability 0 accepted", "uniforms * q < p", "uniforms * q <= p"),
    ("the ratio upside down", "uniforms * q < p", "uniforms * p < q"),
    ("the residual of the first place", "p_next = p_target[row, n]", "p_next = p_target[row, 0 * n]"),
    ("no way out of an empty residual", "torch.where(residual.sum(1, keepdim=True) > 0, residual, p_next)", "residual"),
    ("refused drafts left in", "torch.where(at < n[:, None], drafts_and_room, -1)", "drafts_and_room"),
    ("all drafts accepted: no bonus token", "tokens[row, n] = (residual", "tokens[row, n.clamp(max=g - 1)] = (residual"),
    ("the slowest wins the race", "(residual / noise).argmax(1)", "(residual * noise).argmax(1)"),
)
def check_verify(verify):
    for batch, g, vocabulary in ((1, 1, 2), (40, 2, 3), (64, 4, 17)):
        p = (2 * normal(batch, g + 1, vocabulary)).softmax(-1)
        q = (2 * normal(batch, g, vocabulary, seed=1)).softmax(-1)
        rng = torch.Generator().manual_seed(2)
        drafts = torch.multinomial(q.flatten(0, 1), 1, generator=rng).view(batch, g)
        uniforms, noise = torch.rand(batch, g, generator=rng), torch.rand(batch, vocabulary, generator=rng) + 0.01
        compare(verify, p, q, drafts, uniforms, noise, f"batch {batch}, {g} drafts, {vocabulary} tokens")
    half, ends = torch.tensor([[[0.5, 0.5]]]), torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    one, zero = torch.ones(1, 2), torch.zeros(1, 1)
    drafted = torch.ones(1, 1, dtype=torch.long)
    compare(verify, ends, half, drafted, zero, one, "u = 0 and p(draft) = 0: must be refused")
    equal = torch.cat([half, half], 1)
    compare(verify, equal, half, drafted, zero + 0.99, one, "p = q: must be accepted, with a bonus token")
    almost = equal - 1e-3  # p rounded below q everywhere: refused, and nothing is left of p - q
    compare(verify, almost, half, drafted, zero + 0.9999, torch.tensor([[2.0, 1.0]]), "an empty residual: draw from p")


def compare(verify, p, q, drafts, uniforms, noise, what):
    tokens, n = verify(p, q, drafts, uniforms, noise)
    chains = [one_chain(*chain) for chain in zip(p, q, drafts, uniforms, noise)]
    close(n, [length for _, length in chains], f"{what}: number accepted")
    close(tokens, [row for row, _ in chains], f"{what}: tokens")
