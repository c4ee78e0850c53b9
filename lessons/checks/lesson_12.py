"""Checks of lesson 12. Oracles: float64 loops, sums of eigenvalues, all distributions of tokens one by one, counted draws."""

import itertools
from types import SimpleNamespace

import torch
from lessons.checks import close, exercise, need


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def errors_of_prefixes(x, encoder, decoder):
    """Mean squared error of each prefix, one length after the other -> list of K numbers."""
    found = []
    for k in range(1, encoder.shape[1] + 1):
        copy = (x @ encoder[:, :k]) @ decoder[:k]
        found.append(((x - copy) ** 2).sum() / len(x))
    return found


# --- the linear case --------------------------------------------------------------------------------------------------


@exercise(
    ("only the whole", "return (p * error).sum()", "return error[-1]"),
    ("all lengths alike", "(p * error).sum()", "error.mean()"),
    ("a sum over lengths", "(p * error).sum()", "error.sum()"),
    ("one length too short", "(p * error).sum()", "(p[1:] * error[:-1]).sum() + p[0] * x.square().sum(1).mean()"),
    ("each number alone, not the prefix", ".cumsum(1)", ""),
    ("the last numbers, not the first", ".cumsum(1)", ".flip(1).cumsum(1)"),
    ("mean over pixels", ".square().sum(2).mean(0)", ".square().mean((0, 2))"),
    ("sum over pictures", ".square().sum(2).mean(0)", ".square().sum((0, 2))"),
    ("the error of the mean picture", "return (p * error).sum()", "return (x - torch.einsum('k,nkp->np', p, partial)).square().sum(1).mean()"),
    ("no gradient for the encoder", "z = x @ encoder", "z = x @ encoder.detach()"),
)
def check_nested_loss(nested_loss):
    one, eye = torch.tensor([[3.0, 4.0]]), torch.eye(2)
    close(nested_loss(one, eye, eye, torch.tensor([0.25, 0.75])), 4.0, "the worked example")
    for N, P, K in ((1, 3, 1), (5, 4, 3), (40, 9, 6)):
        x, encoder, decoder = normal(N, P), normal(P, K, seed=1).requires_grad_(), normal(K, P, seed=2).requires_grad_()
        p = torch.rand(K, generator=torch.Generator().manual_seed(3), dtype=torch.double)
        p = p / p.sum()
        truth = sum(a * b for a, b in zip(p.tolist(), errors_of_prefixes(x, encoder, decoder)))
        case = f"{N} pictures of {P} pixels, {K} numbers"
        ours = nested_loss(x, encoder, decoder, p)
        close(ours, truth, case)
        need(ours.requires_grad, f"{case}: the loss needs a gradient")
        wanted = torch.autograd.grad(truth, (encoder, decoder))
        found = torch.autograd.grad(ours, (encoder, decoder), allow_unused=True)
        for name, a, b in zip(("encoder", "decoder"), found, wanted):
            need(a is not None, f"{case}: the {name} gets no gradient")
            close(a, b, f"{case}: gradient of the {name}")


def ascending(x, K):
    """Wrong: eigh sorts upwards, so these are the directions that matter least."""
    vectors = torch.linalg.eigh(x.T @ x)[1][:, :K]
    return vectors, vectors.T


def backwards(x, K):
    """Wrong: the right K directions, the most important one last."""
    vectors = torch.linalg.eigh(x.T @ x)[1][:, -K:]
    return vectors, vectors.T


def rows_of_eigh(x, K):
    """Wrong: the vectors of eigh are columns."""
    vectors = torch.linalg.eigh(x.T @ x)[1].flip(1)
    return vectors[:K].T, vectors[:K]


def turned(x, K):
    """Wrong: as good as can be with all K numbers, and without order."""
    turn = torch.linalg.qr(normal(K, K, seed=5).to(x.dtype))[0]
    directions = turn @ torch.linalg.svd(x, full_matrices=False).Vh[:K]
    return directions.T, directions


def whitened(x, K):
    """Wrong: numbers of variance 1 that the decoder does not scale back."""
    _, s, Vh = torch.linalg.svd(x, full_matrices=False)
    return Vh[:K].T / s[:K] * len(x) ** 0.5, Vh[:K]


@exercise(
    ("the least important directions", ascending),
    ("the most important one last", backwards),
    ("rows of eigh", rows_of_eigh),
    ("turned within the best K", turned),
    ("scaled, and not scaled back", whitened),
    ("data moved to mean 0", "torch.linalg.svd(x, ", "torch.linalg.svd(x - x.mean(0), "),
    ("the first K pixels", "torch.linalg.svd(x, full_matrices=False).Vh[:K]", "torch.eye(x.shape[1], dtype=x.dtype)[:K]"),
    ("the K pictures that are longest", "torch.linalg.svd(x, full_matrices=False).Vh[:K]",
     "torch.nn.functional.normalize(x[x.square().sum(1).argsort(descending=True)], dim=1)[:K]"),
)
def check_in_order(in_order):
    for N, P, K in ((4, 2, 2), (30, 5, 3), (200, 24, 7)):
        if N == 4:
            x = torch.tensor([[2.0, 0], [-2, 0], [0, 1], [0, -1]]).double()
        else:  # pixels that depend on one another, of different strength, with a mean that is not 0
            x = normal(N, P) @ normal(P, P, seed=1) * torch.linspace(1, 3, P, dtype=torch.double) + 2 * normal(P, seed=2)
        encoder, decoder = in_order(x, K)
        need(encoder.shape == (P, K) and decoder.shape == (K, P), f"shapes {tuple(encoder.shape)}, {tuple(decoder.shape)}, wanted {(P, K)}, {(K, P)}")
        strength = torch.linalg.eigvalsh(x.T @ x / N).flip(0)
        for k, error in enumerate(errors_of_prefixes(x, encoder, decoder), 1):
            least = strength[k:].sum().item()
            close(error / strength.sum(), least / strength.sum(), f"{N} pictures of {P} pixels, the first {k} of {K} numbers: share of the error", 1e-7)


# --- when to stop -----------------------------------------------------------------------------------------------------


def bisection(errors, limit):
    """Wrong: as if errors never rose."""
    low, high = torch.ones(len(errors)).long(), torch.full((len(errors),), errors.shape[1])
    for _ in range(errors.shape[1]):
        middle = (low + high) // 2
        good = errors.gather(1, middle[:, None] - 1)[:, 0] <= limit
        low, high = torch.where(good, low, (middle + 1).minimum(high)), torch.where(good, middle, high)
    return low


@exercise(
    ("1 where nothing is good enough", "    good[:, -1] = True\n", ""),
    ("numbered from 0", ".argmax(1) + 1", ".argmax(1)"),
    ("below, not at most", "errors <= limit", "errors < limit"),
    ("counts those above the limit", lambda errors, limit: ((errors > limit).sum(1) + 1).clamp(max=errors.shape[1])),
    ("after the last one above the limit",
     lambda errors, limit: ((errors > limit) * torch.arange(1, errors.shape[1] + 1)).amax(1).add(1).clamp(max=errors.shape[1])),
    ("a bisection", bisection),
    ("the best prefix", "good.int().argmax(1)", "errors.argmin(1)"),
    ("the longest good one", "good.int().argmax(1) + 1", "(good * torch.arange(1, errors.shape[1] + 1)).amax(1)"),
    ("K + 1 where nothing is good enough", lambda errors, limit: (errors <= limit).int().cummax(1)[0].logical_not().sum(1) + 1),
)
def check_halt(halt):
    worked = torch.tensor([[5.0, 3.0, 4.0, 2.0]])
    for limit, wanted in ((3.0, 2), (2.5, 4), (1.0, 4), (9.0, 1)):
        need(halt(worked.clone(), limit).tolist() == [wanted], f"errors 5, 3, 4, 2, limit {limit}: {halt(worked.clone(), limit).tolist()}, wanted [{wanted}]")
    for N, K in ((1, 1), (6, 5), (50, 16)):
        errors = torch.randint(10, (N, K), generator=torch.Generator().manual_seed(N)).float() + torch.arange(K, 0, -1)
        before = torch.full((N,), K + 1)
        for limit in (1.0, 4.0, 7.0, 11.0, 30.0):
            truth = [next((k for k, e in enumerate(row, 1) if e <= limit), K) for row in errors.tolist()]
            ours = halt(errors.clone(), limit)
            need(ours.shape == (N,) and not ours.is_floating_point(), f"shape {tuple(ours.shape)}, {ours.dtype}: wanted N integers")
            need(ours.tolist() == truth, f"{N} pictures, {K} prefixes, limit {limit}: {ours.tolist()[:6]}, wanted {truth[:6]}")
            need(bool((ours <= before).all()), f"limit {limit}: a wider limit must not make a prefix longer")
            before = ours


def first_that_does_not_pay(errors, price):
    """Wrong: stops at the first token that gains less than its price."""
    pays = -errors.diff(dim=1) > price
    return pays.int().cumprod(1).sum(1) + 1


@exercise(
    ("stops at the first token that does not pay", first_that_does_not_pay),
    ("counts the tokens that pay", lambda errors, price: (-errors.diff(dim=1) > price).sum(1) + 1),
    ("numbered from 0", "cost.argmin(1) + 1", "cost.argmin(1)"),
    ("tokens are free", "errors + price * torch.arange(1, errors.shape[1] + 1)", "errors"),
    ("tokens are a gain", "errors + price", "errors - price"),
    ("dearer and dearer", "torch.arange(1, errors.shape[1] + 1)", "torch.arange(1, errors.shape[1] + 1) ** 2"),
    ("one length for all", "cost.argmin(1) + 1", "cost.mean(0).argmin().expand(len(errors)) + 1"),
    ("of equals the longest", "cost.argmin(1) + 1", "cost.shape[1] - cost.flip(1).argmin(1)"),
    ("the error limited by the price", lambda errors, price: (errors > price).int().cumprod(1).sum(1).add(1).clamp(max=errors.shape[1])),
)
def check_allot(allot):
    ours = allot(torch.tensor([[9.0, 8.0, 3.0, 2.0]]), 2.0)
    need(ours.tolist() == [3], f"errors 9, 8, 3, 2, price 2: {ours.tolist()}, wanted [3]")
    for N, K in ((1, 5), (3, 4), (4, 6), (60, 16)):
        errors = torch.randint(20, (N, K), generator=torch.Generator().manual_seed(K)).sort(1, descending=True).values.float()
        for price in (0.5, 1.0, 3.0, 30.0):
            ours = allot(errors.clone(), price)
            need(ours.shape == (N,) and not ours.is_floating_point(), f"shape {tuple(ours.shape)}, {ours.dtype}: wanted N integers")
            need(bool((ours >= 1).all() and (ours <= K).all()), f"lengths {ours.tolist()[:6]} are not all in 1 .. {K}")
            case, costs = f"{N} pictures, {K} prefixes, price {price}", [[e + price * k for k, e in enumerate(row, 1)] for row in errors.tolist()]
            truth = [row.index(min(row)) + 1 for row in costs]
            need(ours.tolist() == truth, f"{case}: {ours.tolist()[:6]}, wanted {truth[:6]} (of equally good ones the shorter)")
            if K**N > 1500:
                continue
            spent, lost = sum(ours.tolist()), sum(errors[n, k - 1].item() for n, k in enumerate(ours.tolist()))
            least = min(sum(errors[n, k - 1].item() for n, k in enumerate(every))
                        for every in itertools.product(range(1, K + 1), repeat=N) if sum(every) <= spent)
            need(lost <= least, f"{case}: {spent} tokens lose {lost}, another distribution of them only {least}")


# --- tail drop --------------------------------------------------------------------------------------------------------


class Recorder(SimpleNamespace):
    """Stands for a Tokenizer: says what it was asked for."""

    def latents(self, images):
        return ("z of", images)

    def quantizer(self, z, rng=None):
        need(z == ("z of", "images"), "the quantizer must get self.latents(images)")
        need(rng is self.rng, "the quantizer must get rng")
        return self.q, "index", "loss"

    def rebuild(self, q, keep=None):
        need(q is self.q, "rebuild must get q as the quantizer gave it: it carries the gradient")
        self.keep = [self.queries] * len(q) if keep is None else torch.as_tensor(keep).expand(len(q)).tolist()
        return "images"


@exercise(
    ("a length for each image", "(1,), generator", "(len(q),), generator"),
    ("never all tokens", "self.queries + 1", "max(2, self.queries)"),
    ("no token at all", "torch.randint(1, ", "torch.randint(0, "),
    ("always all", "self.rebuild(q, keep)", "self.rebuild(q)"),
    ("three in four whole", "torch.randint(1, self.queries + 1, (1,), generator=rng)",
     "torch.randint(1, 4 * self.queries + 1, (1,), generator=rng).clamp(max=self.queries)"),
    ("powers of two", "torch.randint(1, self.queries + 1, (1,), generator=rng)",
     "(2 ** torch.randint(0, self.queries.bit_length(), (1,), generator=rng)).clamp(max=self.queries)"),
    ("not drawn from rng", "(1,), generator=rng)", "(1,))"),
    ("the same length always", "(1,), generator=rng)", "(1,), generator=torch.Generator().manual_seed(0))"),
    ("no loss for the quantizer", "keep), index, loss", "keep), index, 0.0"),
    ("rounded without a gradient", "self.rebuild(q, keep)", "self.rebuild(q.detach(), keep)"),
)
def check_forward(forward):
    for K, B in ((1, 2), (4, 3), (7, 5)):
        rng, counts = torch.Generator().manual_seed(K), [0] * (K + 1)
        model = Recorder(queries=K, q=torch.zeros(B, K, 2), rng=rng)
        for _ in range(200 * K):
            result = forward(model, "images", rng)
            need(result == ("images", "index", "loss"), f"returned {result}, wanted rebuilt images, index, loss")
            need(len(set(model.keep)) == 1, f"one length for the whole batch, not {model.keep}")
            need(1 <= model.keep[0] <= K, f"length {model.keep[0]} is not in 1 .. {K}")
            counts[model.keep[0]] += 1
        # 200 expected, standard deviation at most 14
        need(all(130 < n < 270 for n in counts[1:]), f"K = {K}: lengths 1 .. {K} came {counts[1:]} times, wanted about 200 each")
        twice = []
        for _ in range(2):
            rng.manual_seed(1)
            twice.append([(forward(model, "images", rng), model.keep[0])[1] for _ in range(20)])
        need(twice[0] == twice[1], "the same rng must give the same lengths")
