"""Checks of lesson 00. Oracles: Python floats, dictionaries of counts, all sequences enumerated."""

import itertools
import math

import torch

from lessons.checks import close, exercise, need


def laws(*shape, seed=0):
    """Random probabilities: positive, and summing to 1 over the last axis."""
    p = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.02
    return p / p.sum(-1, keepdim=True)


def integers(V, *shape, seed=0):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


@exercise(
    ("averaged over the tokens", "moves.sum(1)", "moves.mean(1)"),
    ("the first token forgotten", "-(start + moves.sum(1))", "-moves.sum(1)"),
    ("the table read the wrong way round", "then[tokens[:, :-1], tokens[:, 1:]]", "then[tokens[:, 1:], tokens[:, :-1]]"),
    ("the sign", "return -(start", "return (start"),
    ("bits instead of nats", "tokens[:, 1:]].log()", "tokens[:, 1:]].log2()"),
    ("one number for all pictures", "moves.sum(1)", "moves.sum()"),
    ("p(same token | token)", "then[tokens[:, :-1], tokens[:, 1:]]", "then[tokens[:, 1:], tokens[:, 1:]]"),
    ("probabilities added", ", tokens[:, 1:]].log()", ", tokens[:, 1:]]"),
)
def check_sequence_nats(sequence_nats):
    for V, N, L in ((2, 3, 4), (3, 1, 2), (5, 4, 1), (64, 6, 64)):
        first, then, tokens = laws(V), laws(V, V, seed=1), integers(V, N, L, seed=2)
        truth = []
        for row in tokens.tolist():
            nats = -math.log(first[row[0]])
            for a, b in zip(row, row[1:]):
                nats -= math.log(then[a, b])
            truth.append(nats)
        close(sequence_nats(first, then, tokens), truth, f"V = {V}, {N} sequences of {L}", 1e-4)
    every = torch.tensor(list(itertools.product(range(3), repeat=4)))
    total = (-sequence_nats(laws(3), laws(3, 3, seed=1), every)).exp().sum()
    close(total, 1.0, "the probabilities of all 81 sequences of 4 tokens of 3 kinds must sum to 1", 1e-4)


def assigned(tokens, V, add):
    """What `counts[a, b] += 1` does: a pair that occurs twice is counted once."""
    first, then = torch.full((V,), float(add)), torch.full((V, V), float(add))
    first[tokens[:, 0]] += 1
    then[tokens[:, :-1], tokens[:, 1:]] += 1
    return first / first.sum(), then / then.sum(1, keepdim=True)


@exercise(
    ("a pair that occurs twice counted once", assigned),
    ("pairs across two pictures", "(V, V) + add", "(V, V) + add + torch.bincount("
     "tokens[:-1, -1] * V + tokens[1:, 0], minlength=V * V).view(V, V)"),
    ("the table transposed", ".view(V, V) + add", ".view(V, V).T + add"),
    ("columns sum to 1, not rows", "then.sum(1, keepdim=True)", "then.sum(0, keepdim=True)"),
    ("the whole table sums to 1", "then / then.sum(1, keepdim=True)", "then / then.sum()"),
    ("nothing added", "(V, V) + add", "(V, V) + 1e-9"),
    ("added after dividing", "then / then.sum(1, keepdim=True)", "(then - add) / (then - add).sum(1, keepdim=True).clamp(min=1) + add"),
    ("all tokens counted as first", "torch.bincount(tokens[:, 0], minlength=V)", "torch.bincount(tokens.flatten(), minlength=V)"),
    ("the last pair forgotten", "tokens[:, :-1] * V + tokens[:, 1:]", "tokens[:, :-2] * V + tokens[:, 1:-1]"),
)
def check_count_bigram(count_bigram):
    for V, N, L, add in ((2, 1, 4, 1), (3, 7, 5, 0.5), (6, 2, 3, 0.05), (16, 40, 9, 0.1)):
        tokens = torch.tensor([[0, 0, 0, 1]]) if L == 4 else integers(V, N, L)
        first, then = [add] * V, [[add] * V for _ in range(V)]
        for row in tokens.tolist():
            first[row[0]] += 1
            for a, b in zip(row, row[1:]):
                then[a][b] += 1
        ours = count_bigram(tokens, V, add)
        need(isinstance(ours, tuple) and len(ours) == 2, "return the two tables first and then")
        case = f"V = {V}, {N} pictures of {L} tokens, add = {add}"
        close(ours[0], [count / sum(first) for count in first], f"first, {case}")
        close(ours[1], [[count / sum(row) for count in row] for row in then], f"then, {case}")


@exercise(
    ("multiplied by log 2", "nats / math.log(2)", "nats * math.log(2)"),
    ("2 to the nats", "math.exp(nats / L)", "2 ** (nats / L)"),
    ("perplexity of the picture", "math.exp(nats / L)", "math.exp(min(nats, 500))"),
    ("e to the bits", "math.exp(nats / L)", "math.exp(bits / L)"),
    ("nats per token", "bits / L", "nats / L"),
    ("log 10", "math.log(2)", "math.log(10)"),
)
def check_units(units):
    for V, L in ((2, 64), (64, 64), (256, 1), (10, 7)):
        ours = units(L * math.log(V), L)
        need(isinstance(ours, tuple) and len(ours) == 3, "return three numbers: bits per picture, bits per token, perplexity")
        truth = (L * math.log2(V), math.log2(V), V)
        for name, a, b in zip(("bits per picture", "bits per token", "perplexity"), ours, truth):
            close(float(a), float(b), f"{name} of guessing among {V} kinds, {L} tokens")


@exercise(
    ("the most probable token", "tokens = torch.cat([tokens, torch.multinomial(p, 1, generator=rng)], dim=1)",
     "tokens = torch.cat([tokens, p.argmax(1, keepdim=True)], dim=1)"),
    ("always what follows the first token", "tokens[:, -1]", "tokens[:, 0]"),
    ("nothing remembered", "then[tokens[:, -1]]", "first.expand(N, -1)"),
    ("the table transposed", "then[tokens[:, -1]]", "then.T[tokens[:, -1]]"),
    ("one token too many", "range(L - 1)", "range(L)"),
    ("all sequences alike", "return tokens", "return tokens[:1].expand(N, -1)"),
    ("the law of the whole batch mixed", "p = then[tokens[:, -1]]", "p = then[tokens[:, -1]].mean(0).expand(N, -1)"),
    ("the first token at random", "first.expand(N, -1), 1", "torch.ones_like(first).expand(N, -1), 1"),
)
def check_draw(draw):
    for V, N, L in ((2, 3, 5), (7, 1, 1), (4, 6, 3)):
        drawn = draw(laws(V), laws(V, V, seed=1), N, L, torch.Generator().manual_seed(0))
        need(tuple(drawn.shape) == (N, L), f"shape {tuple(drawn.shape)}, wanted {(N, L)}")
        need(0 <= int(drawn.min()) and int(drawn.max()) < V, f"tokens must be in 0 .. {V - 1}")
    first, then, N = laws(3, seed=4) ** 2, laws(3, 3, seed=5) ** 3, 20_000
    first, then = first / first.sum(), then / then.sum(1, keepdim=True)
    drawn = draw(first, then, N, 4, torch.Generator().manual_seed(1))
    counts, chi2 = torch.bincount(drawn @ torch.tensor([27, 9, 3, 1]), minlength=81).tolist(), 0.0
    for number, (a, b, c, d) in enumerate(itertools.product(range(3), repeat=4)):
        expected = N * float(first[a] * then[a, b] * then[b, c] * then[c, d])
        chi2 += (counts[number] - expected) ** 2 / max(expected, 1)
    need(chi2 < 150, f"20,000 sequences do not follow first[a] then[a, b] then[b, c] then[c, d]: chi-square {chi2:.0f}, wanted below 150")


def softmax_first(logits, temperature=1.0, top_k=0, top_p=1.0):
    """Cut, but what is kept never divided by its sum."""
    p, place = (logits / temperature).softmax(0).sort(descending=True)
    rank = torch.arange(len(p))
    p = torch.where((p.cumsum(0) - p < top_p) & (rank < (top_k or len(p))), p, 0.0)
    return torch.zeros_like(p).index_copy(0, place, p)


def nucleus_first(logits, temperature=1.0, top_k=0, top_p=1.0):
    """Top-p before top-k: the mass is that of all tokens."""
    p, place = (logits / temperature).softmax(0).sort(descending=True)
    rank = torch.arange(len(p))
    p = torch.where((p.cumsum(0) - p < top_p) & (rank < (top_k or len(p))), p, 0.0)
    return torch.zeros_like(p).index_copy(0, place, p / p.sum())


def cut_first(logits, temperature=1.0, top_k=0, top_p=1.0):
    """The temperature after top-k and top-p, not before."""
    p = nucleus_first(logits, 1.0, top_k, 1.0)
    q = p if top_p == 1 else nucleus_first(p.log(), 1.0, 0, top_p)
    q = q ** (1 / temperature)
    return q / q.sum()


@exercise(
    ("multiplied by the temperature", "logits / temperature", "logits * temperature"),
    ("never divided by the sum", softmax_first),
    ("top-p before top-k", nucleus_first),
    ("the token that crosses the line dropped", "before < top_p", "before + p <= top_p"),
    ("one token too many", "before < top_p", "before - p.roll(1) < top_p"),
    ("the mass of the token itself", "before < top_p", "p < top_p"),
    ("not put back in their places", "torch.zeros_like(p).index_copy(0, place, p)", "p"),
    ("top-k keeps k + 1", "min(top_k, len(logits))", "min(top_k + 1, len(logits))"),
    ("the least probable kept", "sort(descending=True)", "sort()"),
    ("temperature after the cut", cut_first),
)
def check_sharpen(sharpen):
    p = torch.tensor([0.4, 0.3, 0.2, 0.1])
    cases = [(p.log(), 0.5, 0, 1.0), (p.log(), 1.0, 2, 1.0), (p.log(), 1.0, 0, 0.5), (p.log(), 1.0, 3, 0.5), (p.log(), 1.0, 0, 0.39)]
    for V, seed in ((1, 0), (5, 1), (7, 2), (64, 3)):
        logits = 2 * torch.randn(V, generator=torch.Generator().manual_seed(seed))
        cases += [(logits, T, k, q) for T in (0.6, 1.0, 1.7) for k in (0, 3) for q in (0.3, 0.62, 0.9, 1.0)]
    for logits, T, top_k, top_p in cases:
        weight = [math.exp(float(x) / T - float(logits.max()) / T) for x in logits]
        order = sorted(range(len(weight)), key=weight.__getitem__, reverse=True)[:top_k or None]
        mass, kept, total = 0.0, [], sum(weight[i] for i in order)
        for i in order:
            if mass < top_p * total:
                kept.append(i)
            mass += weight[i]
        truth = torch.zeros(len(weight), dtype=torch.float64)
        for i in kept:
            truth[i] = weight[i] / sum(weight[j] for j in kept)
        close(sharpen(logits, T, top_k, top_p), truth, f"V = {len(weight)}, temperature {T}, top_k {top_k}, top_p {top_p}", 1e-4)


@exercise(
    ("shifted once more", "log_p.gather(-1, tokens[..., None])", "log_p[:, :-1].gather(-1, tokens[:, 1:, None])"),
    ("summed over the tokens", "-picked.mean()", "-picked.sum(1).mean()"),
    ("no softmax", "logits - logits.logsumexp(-1, keepdim=True)", "logits"),
    ("softmax over the places", "logits.logsumexp(-1, keepdim=True)", "logits.logsumexp(1, keepdim=True)"),
    ("the sign", "return -picked", "return picked"),
    ("one number a picture", "picked.mean()", "picked.mean((1, 2))"),
    ("the mean probability", "-picked.mean()", "-picked.exp().mean().log()"),
    ("softmax twice", "model(tokens, labels).float()", "model(tokens, labels).float().softmax(-1)"),
    ("the labels forgotten", "model(tokens, labels)", "model(tokens, torch.zeros_like(labels))"),
    ("detached from the network", "return -picked.mean()", "return torch.tensor(-picked.mean().item())"),
)
def check_loss_of(loss_of):
    for V, B, L in ((2, 1, 1), (3, 2, 5), (64, 4, 16)):
        table = 3 * torch.randn(11, L, V, generator=torch.Generator().manual_seed(V))
        table.requires_grad_()
        tokens, labels = integers(V, B, L), integers(10, B, seed=1) + 1
        loss = loss_of(lambda tokens, labels: table[labels], tokens, labels)
        truth = 0.0
        for b in range(B):
            for t in range(L):
                row = table[labels[b], t].tolist()
                truth += math.log(sum(math.exp(x) for x in row)) - row[tokens[b, t]]
        close(loss, truth / (B * L), f"V = {V}, {B} pictures of {L} tokens", 1e-4)
        need(loss.requires_grad, "no gradient reaches the network: return a tensor, without .item() or .detach()")
    huge = torch.tensor([[[1000.0, 0.0]]])
    close(loss_of(lambda tokens, labels: huge, torch.tensor([[1]]), torch.tensor([0])), 1000.0, "logits (1000, 0), token 1")
