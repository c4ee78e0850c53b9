"""Checks of lesson 53. Oracles: numbers and dates written out by the check itself and read back, series of known season, an
augmented least squares, and the scan as a sum over all earlier tokens."""

import datetime
import math

import numpy as np
import torch

from lessons.checks import close, exercise, need


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- numbers ----------------------------------------------------------------------------------------------------------


def written(value, style):
    """A number as text: point 1234.5, thousands 1,234.5, comma 1234,5, german 1.234,5."""
    text = f"{value:,.2f}" if style in ("thousands", "german") else f"{value:.2f}"
    return text.translate(str.maketrans(",.", ".,")) if style in ("comma", "german") else text


@exercise(
    ("every cell decides for itself", "comma = commas > points", "comma = False"),
    ("the comma always is decimal", "comma = commas > points", "comma = True"),
    ("one comma is enough", "comma = commas > points", "comma = any(',' in cell for cell in cells)"),
    ("points between thousands stay", '.replace(".", "").replace(",", ".")', '.replace(",", ".")'),
    ("commas between thousands stay", 'else cell.replace(",", "")', "else cell"),
    ("groups of thousands count as decimal commas", "and not re.fullmatch(THOUSANDS, cell)", ""),
    ("text ends the reading", "except ValueError:\n            numbers.append(math.nan)", "except ValueError:\n            break"),
    ("missing is 0", "numbers.append(math.nan)", "numbers.append(0.0)"),
    ("infinity is a measurement", "if math.isfinite(value) else math.nan", ""),
)
def check_to_numbers(to_numbers):
    values = [0.5, -3.25, 12.75, 1234.5, 98765.25, 1000000.0, 7.0]
    for style in ("point", "thousands", "comma", "german"):
        for some in (values[:1], values[:3], values[3:], values):
            cells = [written(v, style) for v in some]
            close(torch.tensor(to_numbers(cells), dtype=torch.float64), torch.tensor(some, dtype=torch.float64), f"{cells}", 1e-12)
    for cells, truth in ((["1,234", "2,500.5", "3"], [1234, 2500.5, 3]), (["1,234", "0,5", "12,75"], [1.234, 0.5, 12.75]),
                         (["1,234", "5,678"], [1234, 5678]), (["7", "-8", "1e3"], [7, -8, 1000])):
        close(torch.tensor(to_numbers(cells), dtype=torch.float64), torch.tensor(truth, dtype=torch.float64), f"{cells}", 1e-12)
    for cells in (["1.5", "n/a", "", "inf", "rain", "2.5"], ["1,5", "n/a", "", "-inf", "NaN", "2,5"]):
        ours = to_numbers(cells)
        need(len(ours) == 6, f"{cells}: {len(ours)} numbers for 6 cells")
        need(ours[0] == 1.5 and ours[5] == 2.5, f"{cells}: {ours[0]} and {ours[5]}, wanted 1.5 and 2.5")
        need(all(math.isnan(v) for v in ours[1:5]), f"{cells}: text, nothing and infinity are missing values, not {ours[1:5]}")


# --- dates ------------------------------------------------------------------------------------------------------------


def first_that_reads(cells, forms):
    """Wrong: the first format without an error wins."""
    for form in forms:
        try:
            [datetime.datetime.strptime(cell, form) for cell in cells]
        except ValueError:
            continue
        return form
    return ""


@exercise(
    ("the first that reads wins", first_that_reads),
    ("the last of equals", "> best", ">= best"),
    ("one broken cell spoils a format", "0.9 * len(cells)", "1.0 * len(cells)"),
    ("half of the cells is enough", "0.9 * len(cells)", "0.4 * len(cells)"),
    ("the number of distances, not of the usual one", ".most_common(1)[0][1]", ".most_common()[-1][1]"),
    ("rows not in order", "sorted(set(dates))", "list(dict.fromkeys(dates))"),
    ("a doubled row is a distance of 0", "sorted(set(dates))", "sorted(dates)"),
    ("no answer where nothing reads", 'found, best = "", 0', "found, best = forms[0], 0"),
)
def check_find_form(find_form):
    forms = ["%m/%d/%Y", "%d/%m/%Y", "%Y-%m-%d", "%d/%m/%Y %H:%M", "%m/%d/%Y %H:%M", "%d.%m.%Y"]

    def text(start, step, n, form):
        return [(start + k * step).strftime(form) for k in range(n)]

    day, march = datetime.timedelta(days=1), datetime.datetime(2021, 3, 1)
    for order in (forms, forms[::-1]):
        for form in forms:
            step = datetime.timedelta(hours=1) if "%H" in form else day
            for n in (12, 61):
                cells = text(march, step, n, form)
                if n == 12 and "%H" in form:  # twelve hours of 1 March, or of 3 January: nothing can tell
                    need(find_form(cells, order) == next(f for f in order if "%H" in f and "/" in f), f"{n} hours of one day: of equals the first")
                else:
                    need(find_form(cells, order) == form, f"{cells[0]}, {cells[1]}, ... ({n} rows): {find_form(cells, order)!r}, wanted {form!r}")
        days = text(march, day, 12, "%d/%m/%Y")
        for cells, what in ((3 * days, "each day three times"), (days[:4] + days[6:], "two days missing")):
            need(find_form(cells, order) == "%d/%m/%Y", f"twelve days, {what}: {find_form(cells, order)!r}, wanted '%d/%m/%Y'")
        for seed in range(30):
            cells = [days[i] for i in torch.randperm(12, generator=torch.Generator().manual_seed(seed)).tolist()]
            need(find_form(cells, order) == "%d/%m/%Y", f"{cells}: {find_form(cells, order)!r}; are the rows in the order of time?")
        broken = text(march, day, 30, "%d/%m/%Y") + ["total", ""]
        need(find_form(broken, order) == "%d/%m/%Y", "two cells of 32 are no dates: nine of ten are enough")
    half = text(march, day, 12, "%d/%m/%Y") + text(datetime.datetime(2021, 3, 13), day, 6, "%d/%m/%Y")
    need(find_form(half, ["%m/%d/%Y"]) == "", "%m/%d/%Y reads only twelve of eighteen: no format")
    need(find_form(["rain", "sun", "rain"], forms) == "", "no format reads the column: ''")


# --- the season -------------------------------------------------------------------------------------------------------


def correlogram(x, width):
    """The same by plain sums; x (T,)."""
    padded = np.pad(x, width // 2, mode="edge")
    rest = x - np.array([padded[t : t + width].mean() for t in range(len(x))])
    rest = rest - rest.mean()
    r = np.array([(rest[: len(x) - k] * rest[k:]).sum() for k in range(width + 1)])
    return torch.tensor(r / r[0])


def by_loops(r, least):
    last = 2 * (len(r) - 1) // 3
    broad = []
    for k in range(2, last):
        near = [float(r[j]) for j in range(k // 2, k + k // 2 + 1)]
        if float(r[k]) >= least and float(r[k]) >= max(near):
            broad.append(k)
    top = max([float(r[k]) for k in broad], default=0)
    for k in broad:
        if float(r[k]) >= 0.8 * top:
            return k
    return 1


@exercise(
    ("the highest", lambda r, least=0.2: 1 + int(r[1:].argmax())),
    ("the first peak", lambda r, least=0.2: next((k for k in range(2, len(r) - 1) if r[k - 1] < r[k] > r[k + 1] and r[k] > least), 1)),
    ("any peak is broad", "r[k // 2 : k + k // 2 + 1].max()", "r[k - 1 : k + 2].max()"),
    ("noise is a season", "r[k] >= least and", ""),
    ("the highest of the broad peaks", "if r[k] >= 0.8 * highest", "if r[k] >= highest"),
    ("the first of the broad peaks", "if r[k] >= 0.8 * highest", "if True"),
    ("looks to the left only", "k + k // 2 + 1].max()", "k + 1].max()"),
    ("looks to the right only", "r[k // 2 :", "r[k :"),
    ("no season is 0", "return 1", "return 0"),
)
def check_find_season(find_season):
    rng, cases = np.random.default_rng(0), []
    for rows, period in ((600, 24), (150, 12), (400, 7)):
        wave = np.sin(2 * np.pi * np.arange(rows) / period) + 0.3 * rng.normal(size=rows) + 0.01 * np.arange(rows)
        cases.append((f"a wave of {period} on a slope", wave, period))
    hour = np.arange(1500)
    week = np.sin(2 * np.pi * hour / 24) * np.where(hour // 24 % 7 < 5, 1, 0.5) + 0.2 * rng.normal(size=1500)
    cases.append(("a day that is weaker at weekends", week, 24))
    twice = np.sin(2 * np.pi * hour / 12) + 0.8 * np.sin(2 * np.pi * hour / 24) + 0.2 * rng.normal(size=1500)
    cases.append(("two peaks a day, one of them larger", twice, 24))
    cases += [("noise", rng.normal(size=500), 1), ("a random walk", rng.normal(size=500).cumsum(), 1)]
    for name, x, period in cases:
        r = correlogram(x, min(len(x) // 4, 500) // 2 * 2 + 1)
        ours = find_season(r)
        need(ours == period, f"{name}: season {ours}, wanted {period}")
    for seed in range(12):  # and by the letter, on correlograms that no series has
        r = torch.rand(31, generator=torch.Generator().manual_seed(seed))
        r[0], r[1] = 1, 0.1
        for least in (0.2, 0.7, 1.1):
            need(find_season(r, least) == by_loops(r, least), f"r = torch.rand(31), seed {seed}, least {least}: {find_season(r, least)}, "
                 f"wanted {by_loops(r, least)}")


# --- a head on a frozen trunk -----------------------------------------------------------------------------------------


@exercise(
    ("no penalty", "+ ridge * torch.eye(X.shape[1]).to(X)", "+ 1e-9 * torch.eye(X.shape[1]).to(X)"),
    ("the penalty grows with N", "ridge * torch.eye", "ridge * len(X) * torch.eye"),
    ("features not centred", "X = features - features.mean(0)", "X = features"),
    ("no constant", "targets.mean(0) - features.mean(0) @ weight", "0 * targets.mean(0)"),
    ("the constant is the mean", "targets.mean(0) - features.mean(0) @ weight", "targets.mean(0)"),
    ("squared penalty", "ridge * torch.eye", "ridge**2 * torch.eye"),
    ("the constant is penalised", lambda X, Y, ridge: (lambda Z: (lambda W: (W[:-1], W[-1]))(torch.linalg.solve(Z.T @ Z + ridge * torch.eye(Z.shape[1]).to(Z), Z.T @ Y)))(torch.cat([X, torch.ones_like(X[:, :1])], 1))),
)
def check_fit_head(fit_head):
    for N, width, S, ridge in ((5, 1, 1, 0.5), (7, 3, 2, 2.0), (40, 9, 24, 0.1), (6, 10, 3, 3.0)):
        X, Y = normal(N, width) + 2, normal(N, S, seed=1) - 3
        weight, constant = fit_head(X, Y, ridge)
        # least squares with `width` more rows, sqrt(ridge) w = 0, and a column of ones that these rows do not touch
        top = torch.cat([X, torch.ones(N, 1).double()], 1)
        below = torch.cat([math.sqrt(ridge) * torch.eye(width).double(), torch.zeros(width, 1).double()], 1)
        truth = torch.linalg.lstsq(torch.cat([top, below]), torch.cat([Y, torch.zeros(width, S).double()])).solution
        close(weight, truth[:-1], f"weight of {N} rows, {width} features, {S} targets, ridge {ridge}", 1e-7)
        close(constant, truth[-1], f"constant of {N} rows, {width} features, {S} targets, ridge {ridge}", 1e-7)


# --- the selective scan -----------------------------------------------------------------------------------------------


def as_a_sum(x, delta, A, B, C, D):
    """y_i = D x_i + sum over j <= i of C_i . exp(A (delta_{j+1} + ... + delta_i)) delta_j B_j x_j, in loops of floats."""
    batch, N, width = x.shape
    y = torch.zeros(batch, N, width, dtype=torch.float64)
    for b in range(batch):
        for i in range(N):
            for w in range(width):
                total = float(D[w] * x[b, i, w])
                for j in range(i + 1):
                    passed = float(delta[b, j + 1 : i + 1, w].sum())
                    for s in range(A.shape[1]):
                        echo = math.exp(float(A[w, s]) * passed) * float(delta[b, j, w] * B[b, j, s] * x[b, j, w])
                        total += float(C[b, i, s]) * echo
                y[b, i, w] = total
    return y


@exercise(
    ("the state is forgotten", "decay * h + new", "new"),
    ("no decay", "decay * h + new", "h + new"),
    ("the new input decays at once", "decay * h + new", "decay * (h + new)"),
    ("read before it is written", "h = decay * h + new\n        y = (h * C[:, i, None]).sum(-1)", "y = (h * C[:, i, None]).sum(-1) if i else 0 * x[:, 0]\n        h = decay * h + new"),
    ("the input without its delta", "delta[:, i, :, None] * B[:, i, None]", "B[:, i, None]"),
    ("D forgotten", "y + D * x[:, i]", "y"),
    ("not selective: the first B for all", "* B[:, i, None]", "* B[:, 0, None]"),
    ("not selective: the last C for all", "* C[:, i, None]", "* C[:, -1, None]"),
    ("1 + delta A in place of its exponential", "(delta[:, i, :, None] * A).exp()", "(1 + delta[:, i, :, None] * A)"),
    ("one decay for the whole width", "(delta[:, i, :, None] * A).exp()", "(delta[:, i, :, None] * A).exp().mean(1, keepdim=True)"),
)
def check_selective_scan(selective_scan):
    for batch, N, width, S in ((1, 1, 1, 1), (2, 3, 2, 1), (2, 7, 3, 4), (3, 5, 1, 2)):
        x, B, C, D = normal(batch, N, width), normal(batch, N, S, seed=1), normal(batch, N, S, seed=2), normal(width, seed=3)
        delta, A = normal(batch, N, width, seed=4).exp(), -normal(width, S, seed=5).exp()
        ours = selective_scan(x, delta, A, B, C, D)
        close(ours, as_a_sum(x, delta, A, B, C, D), f"{batch} x {N} tokens of width {width}, state {S}", 1e-9)
    ones = torch.ones(1, 3, 1).double()
    halves = selective_scan(torch.tensor([[[8.0], [0.0], [0.0]]]).double(), ones, -math.log(2) * torch.ones(1, 1).double(), ones, ones, torch.zeros(1).double())
    close(halves, torch.tensor([[[8.0], [4.0], [2.0]]]), "the worked example: 8, then a half of it each step", 1e-9)
