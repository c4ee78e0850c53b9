"""Checks of lesson 41. Oracles: string search, a table kept in dictionaries, loops in float64, truncated models, enumeration."""

import math

import torch
import torch.nn.functional as F

import nano_spec
from lessons.checks import close, exercise, need


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- prompt lookup ----------------------------------------------------------------------------------------------------


def first_place(text, gamma, longest):
    for n in range(min(longest, len(text) - 1), 0, -1):
        for i in range(len(text) - n):
            if text[i : i + n] == text[-n:]:
                return text[i + n : i + n + gamma]
    return []


@exercise(
    ("the first place", first_place),
    ("the shortest match", "range(min(longest, len(text) - 1), 0, -1)", "range(1, min(longest, len(text) - 1) + 1)"),
    ("one token more than gamma", "text[i + n:i + n + gamma]", "text[i + n:i + n + gamma + 1]"),
    ("the match itself comes back", "return text[i + n:i + n + gamma]", "return text[i:i + gamma]"),
    ("finds the end itself", "range(len(text) - n - 1, -1, -1)", "range(len(text) - n, -1, -1)"),
    ("place 0 is never looked at", "range(len(text) - n - 1, -1, -1)", "range(len(text) - n - 1, 0, -1)"),
    ("no overlap allowed", "range(len(text) - n - 1, -1, -1)", "range(len(text) - 2 * n, -1, -1)"),
    ("one token is not enough", "len(text) - 1), 0, -1)", "len(text) - 1), 1, -1)"),
    ("only full length", "if text[i:i + n] == text[-n:]:", "if text[i:i + n] == text[-n:] and i + n + gamma <= len(text):"),
)
def check_lookup(lookup):
    rng = torch.Generator().manual_seed(0)
    cases = [([1, 2, 3, 9, 1, 2, 3, 4, 5, 1, 2, 3], 2, 3), ([5], 3, 2), ([1, 2, 3], 2, 3), ([7, 7, 7], 2, 4), ([4, 1, 4], 3, 1)]
    cases += [(torch.randint(3, (n,), generator=rng).tolist(), 3, 4) for n in (5, 9, 17, 30) for _ in range(5)]
    for text, gamma, longest in cases:
        word, truth = "".join(map(str, text)), []
        for n in range(longest, 0, -1):
            if n < len(text):
                place = word[:-1].rfind(word[-n:])  # a match that ends before the last token
                if place >= 0:
                    truth = text[place + n : place + n + gamma]
                    break
        ours = lookup(list(text), gamma, longest)
        need(list(ours) == truth, f"text {text}, gamma {gamma}, longest {longest}: {list(ours)}, wanted {truth}")


# --- token recycling --------------------------------------------------------------------------------------------------


@exercise(
    ("only what was kept", "zip([text[start - 1], *self.draft], p)", "zip(text[start - 1:], p)"),
    ("one place too late", "[text[start - 1], *self.draft]", "[text[start], *self.draft]"),
    ("written behind the guess after it", "[text[start - 1], *self.draft]", "self.draft"),
    ("all guesses from one row", "            last = dice.choose(q[-1])\n            self.draft.append(last)", "            self.draft.append(dice.choose(q[-1]))"),
    ("the favourite", "dice.choose(q[-1])", "int(q[-1].argmax())"),
    ("q is a view that update overwrites", "self.table[last].clone()", "self.table[last]"),
    ("one guess too few", "range(gamma)", "range(gamma - 1)"),
    ("averaged with the old row", "self.table[token] = said", "self.table[token] = (said + self.table[token]) / 2"),
)
def check_Recycling(Recycling):
    for V, gamma, rounds in ((2, 1, 3), (3, 2, 6), (7, 4, 30)):
        ours, table, text = Recycling(V), {v: [1 / V] * V for v in range(V)}, [0]
        rng = nano_spec.rng_at(V)
        for _ in range(rounds):
            dice = nano_spec.Dice(rng)
            draft, q = ours.propose(list(text), gamma, dice)
            case = f"vocabulary {V}, gamma {gamma}, text {text}"
            need(len(draft) == len(q) == gamma, f"{case}: {gamma} guesses and as many q, not {len(draft)} and {len(q)}")
            draft, old = list(draft), [torch.as_tensor(one).clone() for one in q]
            for i, v in enumerate([text[-1], *draft[:-1]]):
                close(q[i], torch.tensor(table[v], dtype=torch.float64), f"{case}, draft {draft}: q of guess {i}", 1e-12)
            p = torch.rand(gamma + 1, V, generator=rng, dtype=torch.float64)
            p = p / p.sum(1, keepdim=True)
            kept = int(torch.randint(gamma + 1, (), generator=rng))
            start, text = len(text), text + draft[:kept] + [int(p[kept].argmin())]
            for v, row in zip([text[start - 1], *draft], p.tolist()):
                table[v] = row
            ours.update(list(text), start, p)
            need(all(torch.equal(a, b) for a, b in zip(q, old)), "update has changed a q that propose had given: a row is a view, clone it")

    def decode(dice):
        drafter = Recycling(3)
        drafter.table[:] = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
        return tuple(drafter.propose([0], 2, dice)[0])

    law, q = nano_spec.enumerate_outcomes(decode), (0.7, 0.2, 0.1)
    for (a, b) in ((0, 0), (2, 1)):
        need(abs(law.get((a, b), 0) - q[a] * q[b]) < 1e-12, f"all rows (.7, .2, .1): guesses {a}, {b} come with {law.get((a, b), 0):.3f}, wanted {q[a] * q[b]:.3f}")


# --- Medusa -----------------------------------------------------------------------------------------------------------


@exercise(
    ("the next token itself", "tokens[:, 1 + j:]", "tokens[:, j:]"),
    ("one place too far", "tokens[:, 1 + j:]", "tokens[:, 2 + j:]"),
    ("all heads guess the same place", "tokens[:, 1 + j:]", "tokens[:, 2:]"),
    ("the last places, not the first", "one[:, :goal.shape[1]]", "one[:, -goal.shape[1]:]"),
    ("heads count from 0 in the decay", "decay ** j", "decay ** (j - 1)"),
    ("decay times j", "decay ** j", "decay * j"),
    ("no decay", "decay ** j * ", ""),
    ("a head with no place left", "        if goal.shape[1]:\n            loss", "        if True:\n            loss"),
)
def check_medusa_loss(medusa_loss):
    for k, B, N, V, decay in ((1, 1, 2, 3, 1.0), (2, 2, 3, 5, 0.8), (3, 1, 3, 4, 0.5), (4, 3, 9, 11, 0.8)):
        logits = normal(k, B, N, V, seed=k)
        tokens = torch.randint(V, (B, N + 1), generator=torch.Generator().manual_seed(N))
        truth = 0.0
        for j in range(1, k + 1):
            losses = []
            for b in range(B):
                for i in range(N):
                    if i + 1 + j <= N:
                        row = logits[j - 1, b, i].tolist()
                        losses.append(math.log(sum(map(math.exp, row))) - row[tokens[b, i + 1 + j]])
            truth += decay**j * sum(losses) / len(losses) if losses else 0.0
        close(medusa_loss(logits, tokens, decay), torch.tensor(truth), f"{k} heads, {B} x {N} places, {V} tokens, decay {decay}")


# --- adapters that only masks see -------------------------------------------------------------------------------------


@exercise(
    ("always on", "torch.where(gate[:, None], base + more, base)", "base + more"),
    ("off at the masks", "base + more, base)", "base, base + more)"),
    ("the gate multiplies", "torch.where(gate[:, None], base + more, base)", "base + gate[:, None] * more"),
    ("in place of W", "base + more, base)", "more, base)"),
    ("A and W merged", "base = F.linear(x, weight)", "base = x @ (weight + B @ A).mT - x @ (B @ A).mT"),
    ("only A", "F.linear(F.linear(x, A), B)", "F.linear(F.linear(x, A), torch.ones_like(B))"),
    ("subtracted", "base + more", "base - more"),
)
def check_gated(gated):
    for lead, N, C, M, r in (((), 1, 1, 1, 1), ((2,), 3, 5, 7, 2), ((3, 2), 6, 8, 4, 3)):
        x, W, A, B = normal(*lead, N, C), normal(M, C, seed=1), normal(r, C, seed=2), normal(M, r, seed=3)
        for gate in (torch.arange(N) >= N - 1, torch.arange(N) < 0, torch.arange(N) % 2 == 1):
            ours, base = gated(x, W, A, B, gate), F.linear(x, W)
            case = f"x {(*lead, N, C)}, gate {gate.tolist()}"
            need(ours.shape == base.shape, f"{case}: shape {tuple(ours.shape)}, wanted {tuple(base.shape)}")
            need(torch.equal(ours[..., ~gate, :], base[..., ~gate, :]), f"{case}: where the gate is off the bits differ from F.linear(x, weight)")
            full = x.double() @ (W.double() + B.double() @ A.double()).T
            close(ours[..., gate, :], full[..., gate, :], f"{case}: where the gate is on", 1e-4)
    x, W, A, B = torch.full((2, 4), 1e30), normal(3, 4), torch.full((2, 4), 1e20), normal(3, 2)
    ours = gated(x, W, A, B, torch.tensor([False, True]))
    need(torch.equal(ours[0], F.linear(x, W)[0]), "B A x is infinite, the gate is off, and the result is not W x: 0 times infinity?")


# --- exits ------------------------------------------------------------------------------------------------------------


@exercise(
    ("summed", "return total / len(exits)", "return total"),
    ("divided by all blocks", "return total / len(exits)", "return total / len(model.blocks)"),
    ("depth counts from 0", "enumerate(model.blocks, 1)", "enumerate(model.blocks)"),
    ("the stream is not normed", "model.head(nano_spec.norm(x))", "model.head(x)"),
    ("the token itself", "tokens[:, 1:].flatten()", "tokens[:, :-1].flatten()"),
    ("places forgotten", "block(x, model.cos[:N], model.sin[:N])", "block(x, model.cos[:1], model.sin[:1])"),
    ("only the last exit", "total = total + F", "total = len(exits) * F"),
    ("cuts the stream", "            logits = model.head(nano_spec.norm(x))", "            x = x.detach()\n            logits = model.head(nano_spec.norm(x))"),
    ("embedding not normed", "nano_spec.norm(model.token(tokens[:, :-1]))", "model.token(tokens[:, :-1])"),
)
def check_exits_loss(exits_loss):
    for depth, exits, B, N in ((1, (1,), 1, 1), (2, (1, 2), 2, 5), (3, (1, 3), 3, 4), (3, (2,), 1, 7)):
        model = nano_spec.tiny_gpt(depth, vocab=5, depth=depth).requires_grad_(True)
        tokens = torch.randint(5, (B, N + 1), generator=torch.Generator().manual_seed(N))
        truth = 0.0
        for d in exits:
            whole = model.blocks
            model.blocks = whole[:d]
            logits = model(tokens[:, :-1])
            model.blocks = whole
            truth = truth + F.nll_loss(logits.log_softmax(-1).flatten(0, 1), tokens[:, 1:].flatten()) / len(exits)
        case = f"{depth} blocks, exits {exits}, tokens {(B, N + 1)}"
        ours = exits_loss(model, tokens, exits)
        close(ours, truth, case, 1e-9)
        weight = model.blocks[0].up.weight
        slope = torch.autograd.grad(ours, weight, allow_unused=True)[0]
        need(slope is not None, f"{case}: no gradient reaches the first block: was the stream detached?")
        close(slope, torch.autograd.grad(truth, weight)[0], f"{case}: gradient in the first block", 1e-9)


def judges_the_token(laws, threshold, dice):
    for depth, law in enumerate(laws, 1):
        q = law()
        x = dice.choose(q)
        if q[x] >= threshold or depth == len(laws):
            return x, q, depth


@exercise(
    ("judges the token drawn", judges_the_token),
    ("always the deepest", "q.max() >= threshold or ", ""),
    ("always the first", "q.max() >= threshold", "True"),
    ("unsure is sure", "q.max() >= threshold", "q.max() < threshold"),
    ("the favourite", "dice.choose(q)", "int(q.argmax())"),
    ("more than the threshold", "q.max() >= threshold", "q.max() > threshold"),
    ("q of the first exit", "return dice.choose(q), q, depth", "return dice.choose(q), laws[0](), depth"),
    ("all exits are asked", "    for depth, law", "    [law() for law in laws]\n    for depth, law"),
    ("the least probability", "q.max()", "q.min()"),
)
def check_sorted_guess(sorted_guess):
    some = [[0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.25, 0.25, 0.5]]
    for rows, threshold, depth in (([some[0]], 0.9, 1), (some, 0.5, 1), (some[:2], 0.6, 2), (some, 0.8, 2), (some, 0.9, 3), (some[::-1], 0.7, 2)):
        asked = []

        def law_of(i):
            def law():
                asked.append(i)
                return torch.tensor(rows[i], dtype=torch.float64)
            return law

        def decode(dice):
            asked.clear()
            x, q, d = sorted_guess([law_of(i) for i in range(len(rows))], threshold, dice)
            return x, tuple(q.tolist()), d, tuple(asked)

        case = f"exits {rows}, threshold {threshold}"
        law = nano_spec.enumerate_outcomes(decode)
        for (x, q, d, calls), chance in law.items():
            need(d == depth, f"{case}: depth {d}, wanted {depth}")
            need(q == tuple(rows[depth - 1]), f"{case}: q {q} is not that of exit {depth}")
            need(calls == tuple(range(depth)), f"{case}: exits {[i + 1 for i in calls]} were asked, wanted 1 to {depth}, each once")
        for x, wanted in enumerate(rows[depth - 1]):
            found = sum(chance for (y, *_), chance in law.items() if y == x)
            need(abs(found - wanted) < 1e-12, f"{case}: token {x} comes with {found:.3f}, its q says {wanted}")
