"""Checks of lesson 11. Oracles: gradients by hand, float64 loops, cells of a Gaussian summed up on a fine grid."""

import math

import torch
from lessons.checks import close, exercise, need


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def nearest(v, codes):
    """One vector, V codes, plain floats -> the number of the nearest code."""
    distance = [sum((a - b) ** 2 for a, b in zip(v, c)) for c in codes]
    return distance.index(min(distance))


# --- a codebook trained by gradient ---------------------------------------------------------------------------------


@exercise(
    ("straight-through forgotten: no gradient for z", "return z + (e - z).detach(),", "return e.detach(),"),
    ("the decoder's gradient goes to the codes", "return z + (e - z).detach(),", "return e,"),
    ("to the codes, too", "return z + (e - z).detach(),", "return z + e - z.detach(),"),
    ("not rounded", "return z + (e - z).detach(),", "return z,"),
    ("vectors pulled by the codes' term", "F.mse_loss(e, z.detach())", "F.mse_loss(e, z)"),
    ("codes pulled by the commitment", "F.mse_loss(z, e.detach())", "F.mse_loss(z, e)"),
    ("beta on the other term", "F.mse_loss(e, z.detach()) + beta * F", "beta * F.mse_loss(e, z.detach()) + F"),
    ("no commitment", " + beta * F.mse_loss(z, e.detach())", ""),
    ("codes have no loss", "F.mse_loss(e, z.detach()) + beta", "beta"),
    ("a sum, not a mean", "F.mse_loss(e, z.detach()) + beta * F.mse_loss(z, e.detach())",
     "(F.mse_loss(e, z.detach()) + beta * F.mse_loss(z, e.detach())) * z.numel()"),
)
def check_textbook(textbook):
    for N, V, C, beta in ((1, 1, 1, 1.0), (5, 3, 2, 0.25), (40, 7, 3, 2.0)):
        z, codes, w = normal(N, C).requires_grad_(), normal(V, C, seed=1).requires_grad_(), normal(N, C, seed=2)
        q, index, loss = textbook(z, codes, beta)
        case, chosen = f"{N} vectors, {V} codes", [nearest(v, codes.tolist()) for v in z.tolist()]
        need(index.shape == (N,) and index.tolist() == chosen, f"{case}: index {index.tolist()[:8]}, wanted {chosen[:8]}")
        vectors, table = z.detach().double(), codes.detach().double()
        gradient, code_gradient, square = w.double(), torch.zeros(V, C, dtype=torch.double), 0.0
        for n, i in enumerate(chosen):
            away = vectors[n] - table[i]
            square += float((away**2).sum()) / (N * C)
            gradient[n] += 2 * beta * away / (N * C)
            code_gradient[i] -= 2 * away / (N * C)
        close(q, table[chosen], f"{case}: q must be the chosen codes")
        close(loss, (1 + beta) * square, f"{case}: loss")
        need(torch.is_tensor(loss) and (q.requires_grad and loss.requires_grad), f"{case}: q and the loss need a gradient")
        ours = torch.autograd.grad((w * q).sum() + loss, (z, codes), allow_unused=True)
        need(ours[0] is not None and ours[1] is not None, f"{case}: z and the codes must both get a gradient")
        close(ours[0], gradient, f"{case}: gradient of z, the decoder's and the commitment's")
        close(ours[1], code_gradient, f"{case}: gradient of the codes, from the first term alone")


# --- running means and restart --------------------------------------------------------------------------------------


@exercise(
    ("means without restart", "count[lost], total[lost] = fair, fair * fresh", "pass"),
    ("old and new weights swapped", "decay * count + (1 - decay) * number", "(1 - decay) * count + decay * number"),
    ("the sum has no memory", "total = decay * total + (1 - decay) * sums", "total = sums"),
    ("dead below a number, not a share of the fair one", "count < dead * fair", "count < dead"),
    ("dead by this batch alone", "(count < dead", "(number < dead"),
    ("born on the best served", "error.topk(len(lost))", "error.topk(len(lost), largest=False)"),
    ("born, but dead again at once", "count[lost], total[lost] = fair, fair * fresh", "total[lost] = count[lost, None] * fresh"),
    ("total without its count", "fair, fair * fresh", "fair, fresh"),
    ("born on the first vectors", "points[error.topk(len(lost)).indices]", "points[:len(lost)]"),
    ("the mean of this batch", "return total / count[:, None]", "return sums / number[:, None].clamp(min=1)"),
)
def check_renew(renew):
    ours = renew(torch.tensor([[0.0], [9.0]]), torch.tensor([1.0, 0.05]), torch.tensor([[0.0], [0.45]]),
                 torch.tensor([[1.0], [3.0]]), torch.tensor([0, 0]), 0.5, 0.1)
    close(ours[0], torch.tensor([[4 / 3], [3.0]]), "the worked example, codes")
    for N, V, C, decay, dead in ((3, 2, 1, 0.5, 0.1), (50, 7, 2, 0.9, 0.3), (200, 32, 4, 0.95, 0.05), (60, 9, 3, 0.8, 0.0)):
        points, codes = normal(N, C, seed=N), normal(V, C, seed=1) * 2
        count = torch.rand(V, generator=torch.Generator().manual_seed(2)) * 0.4 + 0.05
        index = torch.tensor([nearest(v, codes.tolist()) for v in points.tolist()])
        total, given = codes * count[:, None], None
        given = [t.clone() for t in (codes, count, total, points)]
        ours = renew(codes, count, total, points, index, decay, dead)
        need(all(torch.equal(a, b) for a, b in zip(given, (codes, count, total, points))), "leave the given tensors as they are")
        number, sums, away = [0.0] * V, [[0.0] * C for _ in range(V)], []
        for n, i in enumerate(index.tolist()):
            number[i] += 1
            sums[i] = [s + x for s, x in zip(sums[i], points[n].tolist())]
            away.append(sum((x - c) ** 2 for x, c in zip(points[n].tolist(), codes[i].tolist())))
        worst, truth = sorted(range(N), key=away.__getitem__, reverse=True), []
        for v in range(V):
            c = decay * float(count[v]) + (1 - decay) * number[v]
            t = [decay * a + (1 - decay) * b for a, b in zip(total[v].tolist(), sums[v])]
            if c < dead * N / V:
                c = N / V
                t = [c * x for x in points[worst.pop(0)].tolist()]
            truth.append(([x / c for x in t], c, t))
        for name, mine, column in zip(("codes", "counts", "totals"), ours, range(3)):
            close(mine, torch.tensor([row[column] for row in truth]), f"{N} points, {V} codes, decay {decay}: {name}", 1e-4)


# --- entropies --------------------------------------------------------------------------------------------------------


def entropies_with_nan_gradients(z, codes, temperature):
    """Wrong: the values are right, the gradient at a probability of 0 is infinite."""
    p = (-(z[:, None] - codes).square().sum(-1) / temperature).softmax(1)
    return torch.special.entr(p).sum(1).mean(), torch.special.entr(p.mean(0)).sum()


@exercise(
    ("multiplied by the temperature", "-distance / temperature", "-distance * temperature"),
    ("the farthest code is likeliest", "(-distance / temperature)", "(distance / temperature)"),
    ("distance not squared", ".square().sum(-1)", ".square().sum(-1).sqrt()"),
    ("softmax over the vectors", "log_softmax(1)", "log_softmax(0)"),
    ("a sum over vectors", ".sum(1).mean()", ".sum()"),
    ("sign", "each = -(p", "each = (p"),
    ("entropy of the mean is not the mean of entropies", "p.mean(0)", "p[0]"),
    ("in bits", ".log()).sum()", ".log2()).sum()"),
    ("the gradient at probability 0", entropies_with_nan_gradients),
    ("swapped", lambda z, codes, temperature: entropies_with_nan_gradients(z, codes, temperature)[::-1]),
)
def check_entropies(entropies):
    for N, V, C, temperature in ((1, 2, 1, 1.0), (5, 4, 3, 0.7), (30, 16, 4, 2.0)):
        z, codes, mean, total = normal(N, C).double(), normal(V, C, seed=1).double(), [0.0] * V, 0.0
        for v in z.tolist():
            weights = [math.exp(-sum((a - b) ** 2 for a, b in zip(v, c)) / temperature) for c in codes.tolist()]
            p = [w / sum(weights) for w in weights]
            total -= sum(x * math.log(x) for x in p) / N
            mean = [m + x / N for m, x in zip(mean, p)]
        each, together = entropies(z, codes, temperature)
        close(each, total, f"{N} vectors, {V} codes, temperature {temperature}: mean entropy of each")
        close(together, -sum(m * math.log(m) for m in mean), f"{N} vectors, {V} codes: entropy of the mean law")
    z = torch.tensor([[-90.0], [90.0]], requires_grad=True)
    each, together = entropies(z, torch.tensor([[-1.0], [1.0], [-500.0]]), 1.0)
    close(torch.stack([each, together]), torch.tensor([0.0, math.log(2)]), "two vectors, far apart")
    gradient, = torch.autograd.grad(each - together, z)
    need(bool(gradient.isfinite().all()), f"a code with probability 0: the gradient of z is {gradient.flatten().tolist()}")


# --- rounding after training ------------------------------------------------------------------------------------------


def middle_levels(bits):
    """Wrong: the median of a cell, not its mean."""
    n, law = 2**bits, torch.distributions.Normal(0.0, 1.0)
    return law.icdf(torch.arange(1, n) / n), law.icdf((torch.arange(n) + 0.5) / n)


def even_levels(bits):
    """Wrong: cells of equal width from -3 to 3."""
    n = 2**bits
    return torch.linspace(-3, 3, n + 1)[1:-1], (torch.arange(n) + 0.5) * 6 / n - 3


@exercise(
    ("the medians of the cells", middle_levels),
    ("cells of equal width", even_levels),
    ("not divided by the mass of the cell", "n * (density", "(density"),
    ("sign", "(density[:-1] - density[1:])", "(density[1:] - density[:-1])"),
    ("the outer edges are kept", "edges[1:-1]", "edges"),
    ("log density", "normal.log_prob(edges).exp()", "normal.log_prob(edges).nan_to_num(0, 0, 0)"),
    ("probabilities, not edges", "return edges[1:-1]", "return normal.cdf(edges[1:-1])"),
    ("2 b cells, not 2^b", "2**bits", "2 * bits"),
)
def check_levels(levels):
    x = torch.linspace(-9, 9, 360001, dtype=torch.double)
    weight = torch.exp(-x**2 / 2)
    mass = weight.cumsum(0) / weight.sum()
    for bits in (1, 2, 3, 5):
        edges, values = levels(bits)
        n, cell = 2**bits, (mass * 2**bits).clamp(max=2**bits - 1e-9).long()  # in which of n cells of equal mass x lies
        means = torch.zeros(n, dtype=torch.double).index_add_(0, cell, x * weight)
        means /= torch.zeros(n, dtype=torch.double).index_add_(0, cell, weight)
        borders = torch.stack([x[cell >= i][0] for i in range(1, n)])
        close(edges, borders, f"{bits} bits: the edges between {n} cells", 3e-4)
        close(values, means, f"{bits} bits: the means of {n} cells", 3e-4)


# --- perturbed tokens -------------------------------------------------------------------------------------------------


@exercise(
    ("two equal codes: not itself at rank 0", "distance.fill_diagonal_(-1)", "pass"),
    ("the farthest", "distance.argsort(1)", "distance.argsort(1, descending=True)"),
    ("one too far", "[index, rank]", "[index, (rank + 1) % len(codes)]"),
    ("one too near", "[index, rank]", "[index, (rank - 1).clamp(min=0)]"),
    ("index and rank swapped", "[index, rank]", "[rank, index]"),
    ("always the nearest", "[index, rank]", "[index, rank.clamp(max=1)]"),
    ("neighbours by number", lambda index, codes, rank: (index + rank) % len(codes)),
    ("the code whose distance is rank-th, not its place", "distance.argsort(1)", "distance.argsort(1).argsort(1)"),
)
def check_perturb(perturb):
    line = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    ours = perturb(torch.tensor([1, 1, 1, 1]), line, torch.arange(4))
    need(ours.tolist() == [1, 0, 2, 3], f"codes 0, 1, 3, 7, token 1, ranks 0 to 3: {ours.tolist()}, wanted [1, 0, 2, 3]")
    for V, C, shape, twins in ((3, 1, (4,), False), (9, 2, (5, 6), True), (20, 3, (2, 3, 7), True)):
        codes = normal(V, C)
        if twins:
            codes[V - 1] = codes[0]
        rng = torch.Generator().manual_seed(V)
        index, rank = (torch.randint(V, shape, generator=rng) for _ in range(2))
        index.view(-1)[:2], rank.view(-1)[:2] = V - 1, 0
        ours = perturb(index.clone(), codes, rank)
        need(ours.shape == shape, f"shape {tuple(ours.shape)}, wanted {shape}")
        for i, k, o in zip(index.flatten().tolist(), rank.flatten().tolist(), ours.flatten().tolist()):
            far = [math.dist(codes[i].tolist(), c) for c in codes.tolist()]
            if k == 0:
                need(o == i, f"{V} codes{', two of them equal' * twins}: rank 0 must leave token {i}, gave {o}")
                continue
            others = sorted(d for v, d in enumerate(far) if v != i)
            need(o != i and math.isclose(far[o], others[k - 1], abs_tol=1e-5),
                 f"{V} codes, token {i}, rank {k}: {o}, at distance {far[o]:.3f}, wanted distance {others[k - 1]:.3f}")
