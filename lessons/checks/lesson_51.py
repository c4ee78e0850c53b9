"""Checks of lesson 51. Oracles: the map that was hidden, padding and pooling, Lagrange's system, loops over batches, columns and patches; in float64."""

import torch
import torch.nn.functional as F

from lessons.checks import close, exercise, need


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@exercise(
    ("the constant counted in every row", "return answers - constant, constant", "return answers, constant"),
    ("no constant", "return answers - constant, constant", "return answers - constant, 0 * constant"),
    ("transposed", "return answers - constant, constant", "return (answers - constant).T, constant"),
    ("the constant added", "answers - constant,", "answers + constant,"),
    ("zero is not a history of ones", "f(torch.zeros(", "f(torch.ones("),
    ("steps in place of unit histories", "torch.eye(length)", "torch.ones(length, length).triu()"),
    ("the oldest value last", "torch.eye(length)", "torch.eye(length).flip(0)"),
    ("the first unit history for all", "torch.eye(length)", "torch.eye(length)[:1].expand(length, length)"),
)
def check_as_matrix(as_matrix):
    for length, ahead in ((1, 1), (5, 2), (4, 4), (12, 7)):
        E, c = normal(length, ahead, seed=length), normal(ahead, seed=9)

        def f(x):
            need(x.ndim == 3 and x.shape[1:] == (1, length), f"f was called with shape {tuple(x.shape)}, wanted (B, 1, {length})")
            return x @ E + c

        found, constant = as_matrix(f, length)
        close(constant, c, f"{length} to {ahead} steps, the constant")
        close(found, E, f"{length} to {ahead} steps, the matrix")
    found, constant = as_matrix(lambda x: x[..., -1:] + 0 * x[..., :1], 3)
    close(found, torch.tensor([[0.0], [0.0], [1.0]]), "repeat the last value")


@exercise(
    ("the average not taken off", " - M) @ season", ") @ season"),
    ("zeros beyond the ends", "+= 1 / kernel", "+= (0 <= i < length) / kernel"),
    ("transposed", "M[min(max(i, 0), length - 1), j]", "M[j, min(max(i, 0), length - 1)]"),
    ("the average of the past alone", "range(j - kernel // 2, j + kernel // 2 + 1)", "range(j - kernel + 1, j + 1)"),
    ("the edge counted once", "+= 1 / kernel", "= 1 / kernel"),
    ("trend and season exchanged", "- M) @ season + M @ trend", "- M) @ trend + M @ season"),
    ("the trend taken off", "+ M @ trend", "- M @ trend"),
    ("one place short", "j + kernel // 2 + 1", "j + kernel // 2"),
    ("no average at all", "+ M @ trend", "+ trend"),
)
def check_one_matrix(one_matrix):
    for length, ahead, kernel in ((3, 1, 3), (7, 2, 5), (30, 4, 25), (4, 3, 9)):
        season, trend = normal(length, ahead, seed=length).double(), normal(length, ahead, seed=1).double()
        unit = torch.eye(length, dtype=torch.float64)[:, None]
        mean = F.avg_pool1d(F.pad(unit, (kernel // 2, kernel // 2), mode="replicate"), kernel, 1)
        wanted = ((unit - mean) @ season + mean @ trend)[:, 0]
        close(one_matrix(season, trend, kernel), wanted, f"length {length}, kernel {kernel}")


def plain_least_squares(X, Y):
    return torch.linalg.lstsq(X, Y).solution


def divided_by_the_sum(X, Y):
    E = torch.linalg.lstsq(X, Y).solution
    return E / E.sum(0)


def shifted_to_the_sum(X, Y):
    E = torch.linalg.lstsq(X, Y).solution
    return E + (1 - E.sum(0)) / len(E)


@exercise(
    ("plain least squares", plain_least_squares),
    ("solved first, divided by the sum later", divided_by_the_sum),
    ("solved first, made to sum to 1 later", shifted_to_the_sum),
    ("the last value left in Y", "Y - last)", "Y)"),
    ("the last value left in X", "X[:, :-1] - last", "X[:, :-1]"),
    ("sums to 0", "1 - free.sum(0, keepdim=True)", "-free.sum(0, keepdim=True)"),
    ("the last value gets 1", "1 - free.sum(0, keepdim=True)", "torch.ones_like(free[:1])"),
    ("the weight of the last in front", "torch.cat([free, weight_of_last])", "torch.cat([weight_of_last, free])"),
)
def check_follow_level(follow_level):
    X, Y = torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([[1.0], [0.0]])
    close(follow_level(X, Y), torch.tensor([[0.0], [1.0]]), "the worked example")
    for n, length, ahead in ((9, 2, 1), (40, 5, 3), (200, 12, 4)):
        X = normal(n, length, seed=n).double().cumsum(1) + 3
        Y = normal(n, ahead, seed=n + 1).double() + X[:, -2:-1]
        system = torch.zeros(length + 1, length + 1, dtype=torch.float64)  # Lagrange: gradient + multiplier = 0, and the sums are 1
        system[:length, :length], system[length, :length], system[:length, length] = X.T @ X, 1, 1
        right = torch.cat([X.T @ Y, torch.ones(1, ahead, dtype=torch.float64)])
        E = follow_level(X, Y)
        close(E, torch.linalg.solve(system, right)[:length], f"{n} windows of {length} steps, {ahead} ahead", 1e-6)
        close(torch.full((1, length), 7.0, dtype=torch.float64) @ E, torch.full((1, ahead), 7.0), "a history of sevens")


def mean_of_means(errors, batch, drop_last):
    parts = [part for part in errors.split(batch) if len(part) == batch or not drop_last]
    return sum(map(len, parts)), float(sum(part.square().mean() for part in parts) / len(parts))


@exercise(
    ("the mean of the batches' means", mean_of_means),
    ("always dropped", " if drop_last else len(errors)", ""),
    ("never dropped", "len(errors) - len(errors) % batch if", "len(errors) if"),
    ("a full last batch dropped too", "len(errors) - len(errors) % batch if", "(len(errors) - 1) // batch * batch if"),
    ("the first windows dropped", "errors[:count]", "errors[len(errors) - count:]"),
    ("absolute errors", "kept.square()", "kept.abs()"),
    ("divided by all windows", "kept.square().mean()", "kept.square().sum() / errors.numel()"),
    ("numbers counted, not windows", "return count,", "return kept.numel(),"),
    ("batches counted, not windows", "return count,", "return -(-count // batch),"),
)
def check_scored(scored):
    cases = [(torch.tensor([[1.0], [1.0], [3.0]]), 2)]
    cases += [(normal(n, h, seed=n) * torch.arange(1.0, n + 1)[:, None], batch) for n, h, batch in ((10, 2, 5), (11, 3, 4), (23, 1, 8), (5, 2, 1))]
    for errors, batch in cases:
        for drop_last in (False, True):
            count, total, seen = 0, 0.0, 0
            for first in range(0, len(errors), batch):
                rows = errors[first:first + batch].double().tolist()
                if drop_last and len(rows) < batch:
                    continue
                count += len(rows)
                for row in rows:
                    total, seen = total + sum(e * e for e in row), seen + len(row)
            ours, mse = scored(errors, batch, drop_last)
            case = f"{len(errors)} windows, batch {batch}, drop_last {drop_last}"
            need(ours == count, f"{case}: {ours} windows count, wanted {count}")
            close(mse, total / seen, case)


@exercise(
    ("the weights sum to 1 over the queries", "torch.softmax(similar, -1)", "torch.softmax(similar, -2)"),
    ("not divided by the root of D", " / Wq.shape[1] ** 0.5", ""),
    ("divided by the root of L", "Wq.shape[1] ** 0.5", "Wq.shape[0] ** 0.5"),
    ("query and key exchanged", "q @ k.mT", "k @ q.mT"),
    ("keys for values", "return weights @ v", "return weights @ k"),
    ("columns see those before them", "similar = q @ k.mT", "similar = torch.ones(x.shape[1], x.shape[1]).tril().log() + q @ k.mT"),
    ("all columns weigh the same", "torch.softmax(similar, -1)", "torch.softmax(0 * similar, -1)"),
    ("no softmax", "torch.softmax(similar, -1)", "similar"),
    ("no column sees itself", "torch.softmax(similar, -1)", "torch.softmax(similar - 1e9 * torch.eye(x.shape[1]), -1)"),
)
def check_across(across):
    for B, C, length, D in ((1, 1, 3, 2), (2, 3, 5, 4), (3, 7, 16, 8)):
        x = normal(B, C, length, seed=C)
        maps = [normal(length, D, seed=seed) / 2 for seed in (1, 2, 3)]
        q, k, v = (x.double() @ m.double() for m in maps)
        wanted = torch.zeros(B, C, D, dtype=torch.float64)
        for b in range(B):
            for i in range(C):
                sizes = torch.stack([((q[b, i] * k[b, j]).sum() / D**0.5).exp() for j in range(C)])
                for j in range(C):
                    wanted[b, i] += sizes[j] / sizes.sum() * v[b, j]
        close(across(x, *maps), wanted, f"{C} columns of {length} steps, width {D}", 1e-4)


@exercise(
    ("the first gate turned round", "e = a * g + (1 - a) * t", "e = a * t + (1 - a) * g"),
    ("the second gate turned round", "o = b * e + (1 - b) * c", "o = b * c + (1 - b) * e"),
    ("a sum in place of a gate", "e = a * g + (1 - a) * t", "e = g + t"),
    ("no logistic function", "torch.sigmoid(self.w1(g) + self.w2(t))", "self.w1(g) + self.w2(t)"),
    ("the second gate reads g", "self.w3(e)", "self.w3(g)"),
    ("patches without a place", " + self.place", ""),
    ("patches look at other columns", "self.inner(patches)", "self.inner(patches.transpose(0, 1)).transpose(0, 1)"),
    ("the deviation does not come back", " * spread + level", " + level"),
    ("the embedding reads raw values", "self.embed(z)", "self.embed(x)"),
    ("the blocks read g, not the mixture", "c = e\n", "c = g\n"),
)
def check_Gateformer(Gateformer):
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for B, C, lookback, chunk, layers in ((1, 1, 24, 1, 1), (2, 3, 96, 24, 1), (3, 5, 48, 7, 2)):
            net, x = Gateformer(lookback, chunk, 8, layers), 3 * normal(B, C, lookback, seed=C) + 5
            for parameter in net.parameters():
                parameter.copy_(torch.randn_like(parameter) / 2)
            case = f"{C} columns of {lookback} steps, {layers} blocks"
            rows = []
            for b in range(B):  # one window, one column, one patch at a time
                known = []
                for c in range(C):
                    z = (x[b, c] - x[b, c].mean()) / (x[b, c].var(correction=0) + 1e-5).sqrt()
                    tokens = [net.patch(z[p:p + 24]) + net.place[p // 24] for p in range(0, lookback, 24)]
                    t = net.join(torch.cat(list(net.inner(torch.stack(tokens)[None])[0])))
                    g = net.embed(z)
                    share = 1 / (1 + (-net.w1(g) - net.w2(t)).exp())
                    known.append(t + share * (g - t))
                told = torch.stack(known)[None]
                for block in net.blocks:
                    told = block(told)
                for c in range(C):
                    share = 1 / (1 + (-net.w3(known[c]) - net.w4(told[0, c])).exp())
                    out = net.head(told[0, c] + share * (known[c] - told[0, c]))
                    rows.append(out * (x[b, c].var(correction=0) + 1e-5).sqrt() + x[b, c].mean())
            made = net(x)
            close(made, torch.stack(rows).view(B, C, chunk), case, 1e-3)
            turned = torch.arange(C).roll(1)
            close(net(x[:, turned]), made[:, turned], f"{case}, exchanged: the forecasts must be exchanged and nothing else", 1e-3)
