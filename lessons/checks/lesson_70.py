"""Checks of lesson 70. Oracles: autograd on the whole batch in float64, a ring whose messages are sets of names, torch's counter
of operations on the real GPT, the tensors that the real optimizers hold."""

import types
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import nano_ar
from lessons.checks import close, exercise, need


@exercise(
    ("a mean of means", "n / sum(sizes) * g", "g / len(sizes)"),
    ("the sum", "n / sum(sizes) * g", "g"),
    ("not divided", "n / sum(sizes) * g", "n * g"),
    ("divided by the number of parts", "n / sum(sizes) * g", "n / len(sizes) * g"),
    ("the last part is missing", "zip(gradients, sizes)", "zip(gradients[:-1], sizes)"),
)
def check_average(average):
    for sizes, d in (((3,), 1), ((2, 6), 3), ((5, 5, 1), 4), ((1, 2, 3, 10), 7)):
        rng = torch.Generator().manual_seed(d)
        x, y = (torch.randn(sum(sizes), n, generator=rng, dtype=torch.double) for n in (d, 1))
        w, gradients = torch.zeros(d, 1, dtype=torch.double, requires_grad=True), []
        for part, target in zip(x.split(sizes), y.split(sizes)):
            gradients += torch.autograd.grad(F.mse_loss(part @ w, target), w)
        truth = torch.autograd.grad(F.mse_loss(x @ w, y), w)[0]
        close(average(gradients, list(sizes)), truth, f"parts of {sizes} images: not the gradient of the whole batch", 1e-9)


@exercise(
    ("the same chunk in every round", "(w - t) % N", "w % N"),
    ("the chunk of the round", "(w - t) % N", "t % N"),
    ("against the ring", "(w - t) % N", "(w + t) % N"),
    ("one round is missing", "range(2 * (N - 1))", "range(2 * N - 3)"),
    ("sums only", "range(2 * (N - 1))", "range(N - 1)"),
    ("one round too many", "range(2 * (N - 1))", "range(2 * N - 1)"),
    ("negative numbers", "(w - t) % N", "w - t"),
)
def check_schedule(schedule):
    for N in (1, 2, 3, 4, 7):
        rounds = [list(row) for row in schedule(N)]
        need(len(rounds) == 2 * (N - 1), f"{N} workers: {len(rounds)} rounds, wanted {2 * (N - 1)}")
        held = [[[w] for _ in range(N)] for w in range(N)]          # whose numbers are in the sum of chunk c at worker w
        for t, row in enumerate(rounds):
            need(len(row) == N and all(0 <= c < N for c in row), f"{N} workers, round {t}: wanted {N} chunks from 0 to {N - 1}")
            sent = [(w, c, list(held[w][c])) for w, c in enumerate(row)]
            for w, c, names in sent:
                right = (w + 1) % N
                held[right][c] = held[right][c] + names if t < N - 1 else names
        for w in range(N):
            for c in range(N):
                need(sorted(held[w][c]) == list(range(N)), f"{N} workers: in the end chunk {c} of worker {w} sums {sorted(held[w][c])}")


def plain_attention(q, k, v, mask=None, scale=None):
    scores = q @ k.mT / q.shape[-1] ** 0.5
    return (scores + torch.full(scores.shape[-2:], -1e9).triu(1)).softmax(-1) @ v


@exercise(
    ("6 N alone", "+ 12 * L * C * depth", ""),
    ("attention of the forward pass alone", "12 * L * C", "4 * L * C"),
    ("one of the two products of attention", "12 * L * C", "6 * L * C"),
    ("attention once", "12 * L * C * depth", "12 * L * C"),
    ("the forward pass alone", "6 * weights", "2 * weights"),
    ("the embedding counted as a product", "+ C * V", "+ 2 * C * V"),
    ("the head forgotten", " + C * V", ""),
    ("a square of the width forgotten", "12 * C * C", "8 * C * C"),
)
def check_flops_per_token(flops_per_token):
    for V, rows, C, depth in ((7, 3, 32, 1), (50, 4, 64, 3), (200, 8, 96, 2)):
        model, L = nano_ar.GPT(V, 10, rows, rows, C, depth, C // 32), rows * rows
        tokens, labels = torch.zeros(2, L, dtype=torch.long), torch.zeros(2, dtype=torch.long)
        with patch.object(nano_ar.kernels, "attention", plain_attention), FlopCounterMode(display=False) as counter:
            nano_ar.loss_of(model, tokens, labels).backward()
        close(float(flops_per_token(V, L, C, depth)), counter.get_total_flops() / (2 * L), f"V {V}, L {L}, C {C}, depth {depth}", 1e-6)


@exercise(
    ("two numbers for Muon", "4 * inside + 8 * outside", "8 * inside + 8 * outside"),
    ("one for AdamW", "4 * inside + 8 * outside", "4 * inside + 4 * outside"),
    ("no gradients", "weights = gradients = 4 * (inside + outside)", "weights, gradients = 4 * (inside + outside), 0"),
    ("everything is divided", "if stage > place", "if stage > 0"),
    ("weights first", "enumerate((optimizer, gradients, weights))", "enumerate((weights, gradients, optimizer))"),
    ("never divided", "/ N if stage > place", "/ 1 if stage > place"),
    ("16 bits", "= 4 * (inside", "= 2 * (inside"),
)
def check_state_bytes(state_bytes):
    for V, C, depth, N in ((7, 32, 1, 1), (50, 64, 3, 4), (90, 96, 2, 10)):
        model = nano_ar.GPT(V, 10, 4, 4, C, depth, C // 32)
        optimizers = nano_ar.make_optimizers(model, types.SimpleNamespace(lr=0.01), torch.float32)
        nano_ar.loss_of(model, torch.zeros(2, 16, dtype=torch.long), torch.zeros(2, dtype=torch.long)).backward()
        for optimizer in optimizers:
            optimizer.step()
        kinds = [sum(x.nbytes for o in optimizers for s in o.state.values() for x in s.values() if x.numel() > 1)]
        kinds += [sum(p.grad.nbytes for p in model.parameters()), sum(p.nbytes for p in model.parameters())]
        inside = sum(p.numel() for p in model.blocks.parameters())
        outside = sum(p.numel() for p in model.parameters()) - inside
        for stage in range(4):
            truth = sum(kinds[:stage]) / N + sum(kinds[stage:])
            close(float(state_bytes(inside, outside, N, stage)), truth, f"{inside} and {outside} weights, {N} devices, stage {stage}", 1e-6)


def keep_all(model, tokens, labels):
    """A wrong solution: nothing is passed back before the caller does, so that all activations stay."""
    parts = zip(tokens.split(16), labels.split(16))
    return sum(nano_ar.loss_of(model, t, y) * len(t) for t, y in parts) / len(tokens)


@exercise(
    ("every part counts as much as the whole", "* len(t) / len(tokens)", ""),
    ("equal weights for unequal parts", "* len(t) / len(tokens)", "/ len(tokens.split(16))"),
    ("the loss of the last part alone", "whole = whole + loss.detach()", "whole = loss.detach()"),
    ("the last part is lost", "return whole + loss - loss.detach()", "return whole + 0 * loss"),
    ("the last part twice", "return whole + loss - loss.detach()", "return whole + 2 * loss - 2 * loss.detach()"),
    ("labels of the first part", "labels.split(16)", "labels.roll(1).split(16)"),
    ("the whole batch at once", nano_ar.loss_of),
    ("in parts, but all activations kept", keep_all),
)
def check_in_parts(in_parts):
    for B, V in ((3, 5), (16, 9), (40, 20)):
        torch.manual_seed(B)
        model = nano_ar.GPT(V, 3, 2, 3, 32, 1, 1)
        torch.nn.init.normal_(model.head.weight, std=0.3)
        tokens, labels = torch.randint(V, (B, 6)), torch.arange(B) % 3
        truth = F.cross_entropy(model(tokens, labels).flatten(0, 1), tokens.flatten())
        wanted = torch.autograd.grad(truth, list(model.parameters()), allow_unused=True)
        sizes = []
        counted = model.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
        ours = in_parts(model, tokens, labels)
        counted.remove()
        need(max(sizes, default=0) <= 16, f"batch {B}: parts of {sizes} images, wanted at most 16")
        need(B <= 16 or model.head.weight.grad is not None, f"batch {B}: no part called backward: the activations of all are kept")
        close(ours, truth, f"batch {B}: the loss", 1e-4)
        ours.backward()
        for (name, p), g in zip(model.named_parameters(), wanted):
            if g is not None:
                need(p.grad is not None, f"batch {B}: {name} got no gradient")
                close(p.grad, g, f"batch {B}: the gradient of {name}", 1e-4)
        with torch.no_grad():
            close(in_parts(model, tokens, labels), truth, f"batch {B}, without gradients", 1e-4)
