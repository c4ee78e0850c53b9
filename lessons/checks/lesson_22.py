"""Checks of lesson 22. Oracles: the cached sampler and an enumerated law, singular values in float64, loops over cells,
a server simulated call by call from the requests' side."""

import torch

import nano_ar
from lessons.checks import close, exercise, need


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def some_model(V, rows, columns):
    """A GPT with weights that are not at their start, where all logits are 0."""
    rng = torch.Generator().manual_seed(V)
    model = nano_ar.GPT(V, 3, rows, columns, 32, 2, 1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=rng) * (3.0 if name == "head.weight" else 1.0) / p.shape[-1] ** 0.5)
        model.slot.mul_(3)
    return model


# --- drawing without a cache ------------------------------------------------------------------------------------------


@exercise(
    ("one row too late", "model(tokens, labels)[:, t]", "model(tokens, labels)[:, min(t + 1, model.length - 1)]"),
    ("always the last row", "model(tokens, labels)[:, t]", "model(tokens, labels)[:, -1]"),
    ("nothing is fed back", "model(tokens, labels)", "model(torch.zeros_like(tokens), labels)"),
    ("written one place too early", "tokens[:, t] = ", "tokens[:, t - 1] = "),
    ("the class is forgotten", "model(tokens, labels)", "model(tokens, torch.full_like(labels, model.null))"),
    ("the most probable token", "kernels.sample(logits, generator=rng)", "logits.argmax(-1)"),
    ("torch's own random numbers", "generator=rng", "generator=torch.Generator().manual_seed(0)"),
    ("the last token is missing", "range(model.length)", "range(model.length - 1)"),
)
def check_without_cache(without_cache):
    for V, rows, columns, B in ((5, 1, 1, 3), (7, 2, 3, 1), (30, 4, 4, 6)):
        model, labels = some_model(V, rows, columns), torch.arange(B) % 3
        truth = nano_ar.generate(model, labels, torch.Generator().manual_seed(B))
        ours = without_cache(model, labels, torch.Generator().manual_seed(B))
        need(ours.shape == truth.shape, f"shape {tuple(ours.shape)}, wanted {tuple(truth.shape)}")
        wrong = (ours != truth).nonzero()
        where = wrong[0].tolist() if len(wrong) else None
        need(where is None, f"a {rows} x {columns} grid: with the same rng, token {where} differs from the cached sampler's")


# --- odd polynomials --------------------------------------------------------------------------------------------------


def odd_by_svd(X, coefficients):
    U, S, Vh = torch.linalg.svd(X.double(), full_matrices=False)
    values = []
    for s in S.tolist():
        values.append(sum(a * s ** (2 * k + 1) for k, a in enumerate(coefficients)))
    return U @ torch.diag(torch.tensor(values, dtype=torch.double)) @ Vh


@exercise(
    ("powers of the entries", "X @ X.mT @ power", "X * X * power"),
    ("not transposed", "power = X @ X.mT @ power", "power = (X @ power if X.shape[0] == X.shape[1] else power)"),
    ("the power before last", "power = X @ X.mT @ power", "power = X @ X.mT @ X"),
    ("the power doubles", "power = X @ X.mT @ power", "power = power @ power.mT @ power"),
    ("starts at the cube", "power, total = X,", "power, total = X @ X.mT @ X,"),
    ("coefficients from the highest", "for a in coefficients", "for a in coefficients[::-1]"),
    ("a constant added", "torch.zeros_like(X)", "torch.ones_like(X)"),
    ("the last coefficient left out", "for a in coefficients", "for a in coefficients[:-1]"),
)
def check_odd_polynomial(odd_polynomial):
    close(odd_polynomial(torch.tensor([[2.0]]), (1.0, 1.0)), torch.tensor([[10.0]]), "2 + 2^3")
    for m, n, coefficients in ((1, 1, (0.5,)), (3, 5, (1.5, -0.5)), (7, 4, (3.4445, -4.7750, 2.0315)), (16, 16, (2, -1.5, 0.5, -0.1, 0.01))):
        X = normal(m, n)
        X = X / X.norm()
        close(odd_polynomial(X, coefficients), odd_by_svd(X, coefficients), f"X {m} x {n}, coefficients {coefficients}", 1e-4)


# --- squares of cells -------------------------------------------------------------------------------------------------


@exercise(
    ("four tokens in a row, no square", "    cut = cut.transpose(2, 3)", "    cut = x.reshape(len(x), rows // s, columns // s, s, s, -1)"),
    ("rows and cells mixed up", "x.reshape(len(x), rows // s, s, columns // s, s, -1)", "x.reshape(len(x), s, rows // s, s, columns // s, -1)"),
    ("column by column inside", "cut.transpose(2, 3)", "cut.transpose(2, 3).transpose(3, 4)"),
    ("slots column by column", "cut.transpose(2, 3)", "cut.transpose(2, 3).transpose(1, 2)"),
    ("numbers of a vector before cells", "cut.transpose(2, 3)", "cut.transpose(2, 3).flatten(3, 4).transpose(3, 4)"),
    ("rows taken for columns", "rows // s, s, columns // s, s, -1", "columns // s, s, rows // s, s, -1"),
    ("not a square but a mean", lambda x, rows, columns, s: x.view(len(x), rows // s, s, columns // s, s, -1).mean((2, 4)).flatten(1, 2)),
)
def check_fuse(fuse):
    for B, rows, columns, s, C in ((1, 2, 4, 2, 1), (2, 3, 3, 3, 2), (3, 4, 2, 1, 5), (2, 6, 4, 2, 3), (1, 6, 9, 3, 2)):
        x, truth = normal(B, rows * columns, C), []
        for R in range(rows // s):
            for K in range(columns // s):
                cells = [(R * s + i) * columns + K * s + j for i in range(s) for j in range(s)]
                truth.append(torch.cat([x[:, cell] for cell in cells], -1))
        close(fuse(x, rows, columns, s), torch.stack(truth, 1), f"a {rows} x {columns} grid of {C} numbers, squares of {s} x {s}")


# --- serving ----------------------------------------------------------------------------------------------------------


def serve_by_requests(arrivals, lengths, slots):
    """Each request takes the place that becomes free first: no clock, no queue."""
    free, done = [0] * slots, []
    for begin, length in zip(arrivals, lengths):
        place = free.index(min(free))
        free[place] = max(begin, free[place]) + length
        done.append(free[place])
    return done


def static(arrivals, lengths, slots):
    """Wrong: no newcomer until all are done."""
    done, now, first = [], 0, 0
    while first < len(arrivals):
        now = max(now, arrivals[first])
        group = [i for i in range(first, min(first + slots, len(arrivals))) if arrivals[i] <= now]
        done += [now + lengths[i] for i in group]
        now, first = max(done[i] for i in group), group[-1] + 1
    return done


@exercise(
    ("one too many", "len(active) < slots", "len(active) <= slots"),
    ("starts before it arrives", " and arrivals[waiting[0]] <= now", ""),
    ("a call too late", "arrivals[waiting[0]] <= now", "arrivals[waiting[0]] < now"),
    ("last come, first served", "active.append(waiting.pop(0))", "active.insert(0, waiting.pop(0)); waiting[:slots] = waiting[:slots][::-1]"),
    ("one newcomer a call", "while waiting and len(active)", "if waiting and len(active)"),
    ("finished before its last call", "done[i] = now", "done[i] = now - 1"),
    ("only the first of the batch advances", "for i in active:", "for i in active[:1]:"),
    ("arrivals and lengths added", lambda arrivals, lengths, slots: [a + n for a, n in zip(arrivals, lengths)]),
    ("static batching", static),
)
def check_serve(serve):
    need(list(serve([0, 0, 1], [3, 1, 2], 2)) == [3, 1, 3], "the worked example gives [3, 1, 3]")
    for n, slots, spread in ((1, 1, 1), (5, 1, 3), (9, 2, 6), (40, 8, 60), (60, 3, 400)):
        rng = torch.Generator().manual_seed(n)
        arrivals = torch.randint(spread, (n,), generator=rng).sort().values.tolist()
        lengths = torch.randint(1, 9, (n,), generator=rng).tolist()
        ours, truth = list(serve(list(arrivals), list(lengths), slots)), serve_by_requests(arrivals, lengths, slots)
        need(len(ours) == n, f"{n} requests, but {len(ours)} times")
        for i in range(n):
            need(ours[i] == truth[i], f"{n} requests, {slots} slots: number {i} (arrives {arrivals[i]}, needs {lengths[i]}) "
                                      f"is done at {ours[i]}, wanted {truth[i]}")


# --- the last exercise ------------------------------------------------------------------------------------------------


@exercise(
    ("not divided by the norm", "(G / (G.norm() + 1e-7))", "G"),
    ("five rounds", "range(20)", "range(5)"),
    ("cube of the entries", "(X @ X.mT @ X)", "X**3"),
    ("the sign of the cube", "1.5 * X - 0.5", "1.5 * X + 0.5"),
    ("the slope at 0", "1.5 * X - 0.5", "1.0 * X - 0.5"),
    ("0 / 0", "(G.norm() + 1e-7)", "G.norm()"),
    ("every column by its own norm", "G.norm()", "G.norm(dim=0)"),
    ("in the dtype of the products", "X.to(G.dtype)", "X"),
    ("products in float32 all the same", "(G / (G.norm() + 1e-7)).to(dtype)", "G / (G.norm() + 1e-7)"),
)
def check_polar(polar):
    for m, n in ((1, 1), (3, 5), (12, 4), (30, 30)):
        U, _, Vh = torch.linalg.svd(normal(m, n).double(), full_matrices=False)
        S = torch.linspace(5, 0.5, min(m, n)).double()
        close(polar((U @ torch.diag(S) @ Vh).float()), U @ Vh, f"{m} x {n}, singular values 5 .. 0.5: wanted U V^T", 1e-4)
    close(polar(torch.zeros(3, 2)), torch.zeros(3, 2), "a gradient of zeros")
    tiny = torch.diag(torch.tensor([1.0, 1e-4]))
    small = 1e-4
    for _ in range(20):
        small = 1.5 * small - 0.5 * small**3
    close(polar(tiny)[1, 1], small, "a singular value of 0.0001 of the norm after 20 rounds", 1e-3)
    half = polar(normal(8, 8), torch.bfloat16)
    need(half.dtype == torch.float32, f"G is float32, so the result is, too; yours is {half.dtype}")
    error = (half - polar(normal(8, 8))).abs().max()
    need(1e-5 < error < 0.3, f"with dtype bfloat16 the products should differ a little from float32's; they do by {error:.2g}")
