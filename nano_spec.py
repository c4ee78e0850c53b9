"""nano_spec: guess ahead with something cheap, check all guesses in one call, draw from the model exactly.

A language model writes one token per call, and a call on five tokens takes hardly longer than a call on one.
So a *drafter* guesses gamma tokens, one after the other; the model that we want the text of, the *target*,
reads all of them in one call. A guess that suits it stays. At the first that does not, the target writes a
token of its own, and so it does when all stay: at least one token per call, at most gamma + 1.

    text so far     the drafter guesses,    one call of the target    from left to right
                    and tells from what     tells what it would say
                                            at each place
    t h e _         c ~ q1                  p1 after "the_"           keep c with probability
                      a ~ q2                p2 after "the_c"          min(1, p1(c) / q1(c)), and go on; else
                        t ~ q3              p3 after "the_ca"         draw from max(p1 - q1, 0), scaled to
                                            p4 after "the_cat"        the sum 1, instead, and stop

This is speculative decoding, Algorithm 1 of Leviathan et al. 2022 (arXiv:2211.17192; Chen et al. 2023,
arXiv:2302.01318, found it too), and here it is the function `accept`. What comes out has *exactly* the
distribution that the target alone has, whatever the drafter does: a bad drafter costs time, never quality.
Three drafters, from dear to free:

    small GPT    one block where the target has 16, trained beside it (both papers: a separate small model)
    n-grams      counts of what followed the last few bytes; they go on counting what is written
                 (the idea is ADED's, arXiv:2407.12021, which builds trees from it)
    Jacobi       what the target itself, in its last call, said about the places after a refused guess
                 (speculative Jacobi decoding, arXiv:2410.01699)

"Exactly" is proved, not claimed: `prove` runs these very functions on tiny models for *every* way the random
numbers can fall, adds up the probabilities, and compares with the chain rule. Then it breaks the functions,
one line at a time, and shows that each break is noticed. And `bench` measures what it all gains beside
ordinary decoding, and whether acceptance and the cost of a call explain it.

Letters in comments: V tokens of the vocabulary (256: bytes), g guesses in a draft (gamma at most), tau tokens
per target call, alpha the probability that a guess is kept; B texts in a batch, N tokens of one call, C the
width of a model, H heads, D = C / H, S places in a cache. Blocks between `# --- shared: NAME` and `# --- end
shared` stand word for word in other scripts too: read them once.

    python nano_spec.py                       train, write, prove, measure: everything goes to out/spec
    python nano_spec.py prove                 the proof on tiny models alone: seconds, nothing is written
    python nano_spec.py --data book.txt       the same with a text of yours
    python nano_spec.py sample --prompt "The import" --gamma 4     go on from a prompt, draw trace.png
    python nano_spec.py bench --temperature 0.7    measure again, from the checkpoint
    python nano_spec.py train --resume        go on after Ctrl-C or a power cut; bit for bit on a CPU
"""
import argparse, contextlib, copy, inspect, io, json, math, os
import pathlib, sys, textwrap, time, timeit, zipfile
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tqdm

import kernels


# ----- the idea: guess, check, keep the distribution --------------------------------------------------------
class Dice:
    """All chance in decoding goes through these two calls: so the proof can try every way they may fall."""

    def __init__(self, rng):
        self.rng = rng                                  # a torch.Generator

    def choose(self, p):
        """Draw a token from the distribution p (V,): the first at which the running sum of p passes u."""
        running = p.cumsum(0)
        u = torch.rand((), dtype=torch.float64, generator=self.rng)
        return int(torch.searchsorted(running, u * running[-1], right=True))  # right: u = 0 skips p = 0

    def coin(self, a):
        """True with probability a. u lies in [0, 1): a = 0 never comes true, a = 1 always does."""
        return float(torch.rand((), dtype=torch.float64, generator=self.rng)) < a


def residual(p, q):
    """max(p - q, 0), scaled to the sum 1: (V,) from two (V,). What p has more of than q.

    For p = [.5, .3, .2], q = [.7, .2, .1]: max(p - q, 0) = [0, .1, .1], so [0, .5, .5].
    """
    more = (p - q).clamp(min=0)
    total = more.sum()
    return more / total if total > 0 else p             # 0: p = q, refused by rounding alone


def accept(draft, q, p, dice):
    """The heart. g guesses, the q[i] (V,) each was drawn from, p (g + 1, V) -> 1 .. g + 1 tokens from p.

    Why the first token has the distribution p exactly, with p = p[0] and q = q[0]. It is x

        by way of a guess that stays    with q(x) min(1, p(x) / q(x))  =  min(q(x), p(x)),
        by way of a guess refused       with r max(p(x) - q(x), 0) / sum max(p - q, 0),

    where r is the probability that a guess, whatever it is, is refused: 1 - sum min(q, p) = sum max(p - q,
    0), since p sums to 1. So the second line is max(p(x) - q(x), 0), and the two together are p(x). For the p
    and q of `residual`: guess 0 stays with .5 / .7, any other always: alpha = .5 + .2 + .1 = .8, and the
    missing .2 go to 1 and 2.

    The second token is looked at only if the first guess stayed; then p[1] is the distribution after just
    this guess, and the same holds, and so on. After a refusal all later guesses must go, however good:
    they were made, and p was computed, for a text that does not exist.
    """
    new = []
    for i, x in enumerate(draft):
        # a guess that p likes more than q did always stays; one that q overrates stays with p / q. q is never
        # 0 here: x was drawn from it. (q may be of another temperature than p. The trap: it must be what x
        # was really drawn from. With q rounded, or of the place before, nothing is exact.)
        if dice.coin(min(1.0, float(p[i][x] / q[i][x]))):
            new.append(x)
        else:
            new.append(dice.choose(residual(p[i], q[i])))        # not from p: x had its chance already
            break
    else:                                               # no break: all g stayed, and p has one row more
        new.append(dice.choose(p[len(draft)]))
    return new


def plain(target, prompt, n, dice):
    """Ordinary decoding with a cache, one token per call -> prompt and n tokens. The yardstick of all."""
    text = list(prompt)
    while len(text) < len(prompt) + n:
        p = target.distributions(text)                  # (1, V)
        text.append(dice.choose(p[0]))
    return text


def speculate(target, drafter, prompt, n, gamma, dice):
    """Speculative decoding -> the text, prompt and n tokens; and how many of them each target call gave.

    target:  .distributions(text, draft) -> p (g + 1, V), see `Stream`
    drafter: .propose(text, gamma, dice) -> draft, q: up to gamma guesses, and what each was drawn from
             .update(text, start, p): text[start:] was written last; p[i] belongs to place start + i
    """
    text, given = list(prompt), []
    while (left := len(prompt) + n - len(text)) > 0:
        start = len(text)
        draft, q = drafter.propose(text, min(gamma, left - 1), dice)  # one token is always the target's own
        p = target.distributions(text, draft)
        text += accept(draft, q, p, dice)
        # The rollback. The target has read all guesses, so keys and values of refused ones lie in its cache;
        # the next call overwrites them. It has not yet read the last token: hence one less.
        target.length = len(text) - 1
        drafter.update(text, start, p)
        given.append(len(text) - start)
    return text, given


# ----- the model: a GPT that can be rolled back -------------------------------------------------------------
def rope_table(length, head_dim, base=10_000.0):
    """Rotary positions (arXiv:2104.09864) -> cosines and sines, (length, D/2) each.

    Numbers j and j + D/2 of a query are a point in the plane, turned by an angle proportional to the place;
    keys likewise. A score then depends on how far apart the two are. The speeds fall from 1 radian a place
    towards 1 / base: fast ones tell neighbours apart, slow ones the beginning from the end.
    """
    speed = base ** -(torch.arange(head_dim // 2) / (head_dim // 2))     # (D/2,)
    angle = torch.arange(length)[:, None] * speed                        # (length, D/2)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turn the points (x_j, x_{j + D/2}) of x (B, H, N, D) by the table's angles, each (N, D/2)."""
    a, b = x.chunk(2, dim=-1)                           # the two coordinates of all points: (B, H, N, D/2)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def norm(x):
    """Mean 0, variance 1 over the last axis, without a learned gain: the next matrix can hold that."""
    return F.layer_norm(x, x.shape[-1:])


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): corrections to a stream x that runs through."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)
        self.up = nn.Linear(dim, 4 * dim, bias=False)
        self.down = nn.Linear(4 * dim, dim, bias=False)
        nn.init.zeros_(self.proj.weight)                # at first a block changes nothing: 16 in a row then
        nn.init.zeros_(self.down.weight)                # train without warm-up

    def attend(self, q, k, v, cache, start):
        """q, k, v (B, H, N, D) of the places start .. start + N - 1 -> (B, H, N, D).

        cache (2, B, H, S, D): keys and values of the places before. They stay right whatever comes after,
        because no place looks ahead; so only the new ones are computed, and written where refused guesses
        may lie. Row i then sees places 0 .. start + i: the cache, and the new ones up to itself.
        """
        N = q.shape[2]
        if cache is None:                               # training: all places at once
            return kernels.attention(q, k, v, kernels.causal(N))
        cache[0, :, :, start:start + N] = k
        cache[1, :, :, start:start + N] = v
        return kernels.decode_attention(q, cache[0], cache[1], start + N)

    def forward(self, x, cos, sin, cache=None, start=0):
        """x (B, N, C), and the angles (N, D/2) of its places -> (B, N, C)."""
        B, N, C = x.shape
        qkv = self.qkv(norm(x)).view(B, N, 3, self.heads, C // self.heads)  # (B, N, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)            # heads before places: (B, H, N, D) each
        # norm gives q and k the length sqrt(D): scores stay within sqrt(D), 5.7 at D = 32, training calm
        # (.to: under autocast norm computes in 32 bits, and matrix products want the 16 of v)
        q, k = rotate(norm(q), cos, sin).to(v.dtype), rotate(norm(k), cos, sin).to(v.dtype)
        y = self.attend(q, k, v, cache, start)
        x = x + self.proj(y.transpose(1, 2).reshape(B, N, C))               # heads side by side again
        return x + self.down(F.relu(self.up(norm(x))).square())             # relu^2: cheaper than gelu


class GPT(nn.Module):
    """p(next token | tokens up to here), for all places of a call at once. Target and draft differ in size.

    The target is deep and thin, 16 blocks of width 64. On a CPU at this size a block takes much the same time
    whatever its width, so a draft of one block (of width 128) is up to 16 times cheaper; the head, `warp` and
    the dice cost both the same, and `bench` measures what is left. Large models are slow because of their
    weights, which must all be read from memory for each call, for one token or for ten.
    """

    def __init__(self, vocab, length, dim, depth, heads):
        super().__init__()
        self.vocab, self.length = vocab, length         # length: of the longest text, in tokens
        self.token = nn.Embedding(vocab, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.head = nn.Linear(dim, vocab, bias=False)
        nn.init.zeros_(self.head.weight)                # all logits 0: the first loss is log 256 = 5.55 nats
        cos, sin = rope_table(length, dim // heads)
        self.register_buffer("cos", cos, persistent=False)  # follows .to(device); computed, so never saved
        self.register_buffer("sin", sin, persistent=False)

    def new_cache(self, size, B=1):
        """Room for the keys and values of `size` tokens: (depth, 2, B, H, size, D)."""
        heads, dim = self.blocks[0].heads, self.token.embedding_dim
        return self.token.weight.new_zeros(len(self.blocks), 2, B, heads, size, dim // heads)

    def hidden(self, tokens, cache=None, start=0):
        """tokens (B, N) at the places start .. start + N - 1 -> the stream (B, N, C) after the last block."""
        x = norm(self.token(tokens))
        places = slice(start, start + tokens.shape[1])
        cos, sin = self.cos[places], self.sin[places]
        for i, block in enumerate(self.blocks):
            x = block(x, cos, sin, None if cache is None else cache[i], start)
        return x

    def forward(self, tokens, cache=None, start=0):
        """tokens (B, N) -> logits (B, N, V); row i has seen the tokens up to i and what the cache holds."""
        return self.head(norm(self.hidden(tokens, cache, start)))


def warp(logits, temperature=1.0, top_k=0, top_p=1.0):
    """Logits (.., V) -> distributions (.., V).

    Temperature and truncation come *before* anything is guessed or checked, for the target: it is the warped
    distribution that we want to draw from exactly. The drafter may do as it likes, but it does best to
    imitate. Temperature 0, greedy decoding, is a distribution with one 1: nothing below treats it specially.
    Always in 64 bits and on the CPU (256 numbers): a ratio of two rounded numbers near 0 is no probability.
    """
    logits = logits.cpu().double()
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).double()
    return kernels.truncate(logits / temperature, top_k, top_p).softmax(-1)


class Stream:
    """One text being written by a GPT: a cache of S = `size` places, the first `length` of which hold."""

    def __init__(self, model, size, temperature=1.0, top_k=0, top_p=1.0):
        if size > model.length:
            raise ValueError(f"{size} tokens are more than the {model.length} positions of the model")
        self.model, self.vocab, self.length = model, model.vocab, 0
        self.cache = model.new_cache(size)
        self.settings = dict(temperature=temperature, top_k=top_k, top_p=top_p)

    @torch.inference_mode()
    def distributions(self, text, draft=()):
        """-> p (g + 1, V) of the place after the text, after its first guess, .., after all g of them.

        Only what the cache does not hold is read: first the whole prompt; later the last token of the text,
        and the guesses. (It may be two tokens of the text: always feeding just the last one would be a bug.)
        """
        new = [*text[self.length:], *draft]
        tokens = torch.tensor([new], device=self.cache.device)           # (1, N)
        logits = self.model(tokens, self.cache, self.length)[0]          # (N, V)
        self.length += len(new)
        return warp(logits[-len(draft) - 1:], **self.settings)


# ----- drafters: anything that guesses and tells from what --------------------------------------------------
class ModelDrafter:
    """Guesses of a smaller model, anything that has `distributions` and `length`: g calls for g guesses."""

    def __init__(self, model):
        self.model = model

    def propose(self, text, gamma, dice):
        # Its own rollback, as of the target in `speculate`: at most all but the last token of the text are
        # read. (Of its own guesses it never read the last. If all stayed, it now lacks two tokens, not one.)
        self.model.length = min(self.model.length, len(text) - 1)
        draft, q = [], []
        for _ in range(gamma):
            q.append(self.model.distributions(text + draft)[0])
            draft.append(dice.choose(q[-1]))            # drawn, not the likeliest: q must be true
        return draft, q

    def update(self, text, start, p):
        """Nothing to learn: weights and cache do all."""


class NGrams:
    """What came after the last n tokens, n = order .. 2, so far? Microseconds a guess, no training.

    If c(x) of the `total` counts after the last n tokens are x, and k different tokens are among them:

        q_n(x) = (c(x) + 4 k q_{n-1}(x)) / (total + 4 k)

    Three times a and once b (total 4, k = 2): 4/12 of the weight stay here, 8/12 go to the shorter context;
    after 300 a and nothing else 300/304 stay. n = 1 is a table of pairs, which has no zeros. Witten & Bell
    (1991) have 1 for 4; but a small network is less sure than counts are, and q should be like p, not like
    the text. Of the factors 1 to 6 and the orders 3 to 6, 4 and 4 gave about the best acceptance.
    """

    def __init__(self, vocab, order=4, known=None):
        self.vocab, self.order, self.counts = vocab, order, {}
        # `known`: NGrams of a long text, shared by all and never written to. `counts` are this text's own.
        self.known = known.counts if known else {}
        self.pairs = known.pairs if known else torch.full((vocab, vocab), 1 / vocab, dtype=torch.float64)

    def fit(self, text):
        """Count a long text once -> self."""
        self.learn(text)
        first, second = torch.tensor(text[:-1]), torch.tensor(text[1:])
        pairs = torch.bincount(first * self.vocab + second, minlength=self.vocab ** 2)
        pairs = pairs.view(self.vocab, self.vocab).double() + 1 / self.vocab      # no pair is impossible
        self.pairs = pairs / pairs.sum(1, keepdim=True)                 # (V, V): a row for each last token
        return self

    def learn(self, text, start=0):
        """Count the tokens text[start:], each after the n before it."""
        for n in range(2, self.order + 1):
            for i in range(max(start, n), len(text)):
                followers = self.counts.setdefault(tuple(text[i - n:i]), {})
                followers[text[i]] = followers.get(text[i], 0) + 1

    def distribution(self, text):
        """-> q (V,): from the longest context down, each gets what weight the longer ones left."""
        q, weight = {}, 1.0
        for n in range(min(self.order, len(text)), 1, -1):
            context = tuple(text[-n:])
            followers = self.known.get(context, {})
            own = self.counts.get(context)
            if own:                                     # seldom: so the sum of two dicts is affordable
                followers = {x: followers.get(x, 0) + own.get(x, 0) for x in {**followers, **own}}
            if followers:
                doubt = 4 * len(followers)
                share = weight / (sum(followers.values()) + doubt)
                for x, count in followers.items():
                    q[x] = q.get(x, 0.0) + share * count
                weight = share * doubt
        law = self.pairs[text[-1]] * weight
        law[list(q)] += torch.tensor(list(q.values()), dtype=torch.float64)
        return law

    def propose(self, text, gamma, dice):
        draft, q, recent = [], [], text[-self.order:]
        for _ in range(gamma):
            q.append(self.distribution(recent + draft))
            draft.append(dice.choose(q[-1]))
        return draft, q

    def update(self, text, start, p):
        recent = text[max(0, start - self.order):]      # the new tokens and what precedes them
        self.learn(recent, len(recent) - (len(text) - start))


class Jacobi:
    """Guesses for nothing: the target's last call has said something about the next places already.

    If guess 3 of 6 was refused, the call has still computed p4 .. p7, for a text that went on otherwise.
    Wrong, but not without sense, and any q is legal as long as the guess is really drawn from it. At
    temperature 0 this is Jacobi's iteration for the fixed point of greedy decoding (arXiv:2305.10427). Its
    weakness: if all guesses stayed, no call has looked further, and all q are `unseen`, byte frequencies.
    """

    def __init__(self, unseen):
        self.unseen, self.memory = unseen, {}           # unseen (V,): q of places that no call has reached

    def propose(self, text, gamma, dice):
        q = [self.memory.get(len(text) + i, self.unseen) for i in range(gamma)]
        return [dice.choose(one) for one in q], q

    def update(self, text, start, p):
        self.memory = {start + i: one for i, one in enumerate(p)}


# ----- the proof: every way the dice can fall ---------------------------------------------------------------
# A decoder is a program whose only chance is in `dice`. On a model of three tokens, writing three of them,
# the dice can fall in some hundred ways. So we run the program, the very functions above, once for each way
# and add up the probabilities: no formula about it that could be wrong, no sample that could be too small.
# The truth is the chain rule, and shares with the decoders nothing but the model asked: Table.law, or the
# layers of a GPT, which it runs without cache, `Stream` or `warp`, as training does. What this cannot see is
# Dice itself (the tests draw from it a lot), and rounding in 32 bits.
class Replay:
    """In place of Dice: falls as prescribed, then takes the first possible way, and notes the others."""

    def __init__(self, prescribed=()):
        self.prescribed, self.fallen, self.probability, self.others = prescribed, [], 1.0, []

    def choose(self, p):
        p = p.tolist() if torch.is_tensor(p) else p
        if len(self.fallen) < len(self.prescribed):
            x = self.prescribed[len(self.fallen)]
        else:
            x, *rest = [i for i, probability in enumerate(p) if probability > 0]
            self.others += [(*self.fallen, other) for other in rest]  # to be run later
        self.fallen.append(x)
        self.probability *= p[x]
        return x

    def coin(self, a):
        return self.choose([1 - a, a]) == 1


def enumerate_outcomes(decode):
    """The exact distribution of what decode(dice) returns: {outcome: probability}.

    `dice.coin(.25) and dice.coin(.5)` gives {False: .875, True: .125} in three runs: the first coin false;
    true, then false; both true.
    """
    distribution, todo = {}, [()]
    while todo:
        dice = Replay(todo.pop())
        outcome = decode(dice)
        distribution[outcome] = distribution.get(outcome, 0.0) + dice.probability
        todo += dice.others
    return distribution


def chain_rule(law, prompt, n):
    """The truth: {n tokens: p(x1 | prompt) p(x2 | prompt, x1) ..}. law(text) -> (V,) of the next token."""
    joint = {(): 1.0}
    for _ in range(n):
        longer = {}
        for past, probability in joint.items():
            for x, p in enumerate(law([*prompt, *past])):
                if p > 0:
                    longer[(*past, x)] = probability * float(p)
        joint = longer
    return joint


def total_variation(a, b):
    """Half the sum of |a - b| over all outcomes: by how much the probability of any event can differ."""
    return sum(abs(a.get(outcome, 0.0) - b.get(outcome, 0.0)) for outcome in {*a, *b}) / 2


class StaleCache(Exception):
    """A model was asked to go on from cached places of another text."""


class Table:
    """A language model to enumerate: after every text a random distribution that depends on the whole text.

    In its cache, where Stream has keys and values, it keeps the texts they stand for, and looks at them. So
    a wrong rollback is found even in a drafter, where it only spoils the guesses and no output shows it.
    """

    def __init__(self, vocab, seed=0, zeros=False):
        self.vocab, self.seed, self.zeros, self.length, self.cache = vocab, seed, zeros, 0, []

    def law(self, text):
        rng = rng_at(self.seed, len(text), *text)
        weights = torch.rand(self.vocab, generator=rng, dtype=torch.float64) ** 2
        if self.zeros:
            weights[weights.argmin()] = 0
        return weights / weights.sum()

    def distributions(self, text, draft=()):
        whole = [*text, *draft]
        rows = [tuple(whole[:i + 1]) for i in range(len(whole))]
        if self.length >= len(text) or self.cache[:self.length] != rows[:self.length]:
            raise StaleCache(f"{self.length} places, not all of them of this text")
        self.cache, self.length = rows, len(rows)
        return torch.stack([self.law(whole[:len(text) + i]) for i in range(len(draft) + 1)])


def tiny_gpt(seed, vocab=3, dim=8, depth=2):
    """A GPT of the real kind with random weights, in 64 bits."""
    model, rng = GPT(vocab, 64, dim, depth, 2).double(), rng_at(seed)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=rng, dtype=torch.float64) * 0.6
    return model.requires_grad_(False)


def truth_of(model, temperature=1.0, top_k=0):
    """law(text) of a GPT as in training: e^(logit / temperature), of these the k largest, over their sum."""
    def law(text):
        weights = (model(torch.tensor([text]))[0, -1].detach().double() / temperature).exp()
        if top_k:
            weights[weights.argsort()[:-top_k]] = 0
        return weights / weights.sum()
    return law


def case(target, drafter, law, n=3, gamma=2, prompt=(0,)):
    """-> decode, truth. target() and drafter() make new ones: no run may find what another has learned."""
    def decode(dice):
        text, _ = speculate(target(), drafter(), prompt, n, gamma, dice)
        return tuple(text[len(prompt):])
    return decode, lambda: chain_rule(law, prompt, n)


def cases():
    """What is proved: {name: (decode(dice) -> outcome, truth() -> {outcome: probability})}."""
    def table(drafter, vocab=3, zeros=False, **more):
        return case(lambda: Table(vocab, 0, zeros), drafter, Table(vocab, 0, zeros).law, **more)

    def gpt(drafter, **warped):
        return case(lambda: Stream(net, 8, **warped), drafter, truth_of(net, **warped))
    net, small, flat = tiny_gpt(0), tiny_gpt(1, depth=1), torch.full((3,), 1 / 3, dtype=torch.float64)
    known, law = NGrams(3).fit([0, 1, 2, 0, 1, 0, 2, 0]), Table(3).law
    return {
        "plain": (lambda dice: tuple(plain(Table(3), [0], 3, dice)[1:]), lambda: chain_rule(law, [0], 3)),
        "model": table(lambda: ModelDrafter(Table(3, 1))),
        "model, gamma 3": table(lambda: ModelDrafter(Table(2, 1)), 2, n=4, gamma=3),
        "model, draft = target": table(lambda: ModelDrafter(Table(3))),           # all stay: cache too short
        "model, zeros": table(lambda: ModelDrafter(Table(3, 1, zeros=True)), zeros=True),  # p or q or both 0
        "n-grams": table(lambda: NGrams(2), 2, n=4),                               # q changes as it learns
        "Jacobi": table(lambda: Jacobi(flat)),                                     # q is of the call before
        # below: attention, rotary places, cache and rollback of the real GPT, against the forward of training
        "GPT, draft GPT": gpt(lambda: ModelDrafter(Stream(small, 8))),
        "GPT, n-grams": gpt(lambda: NGrams(3, known=known)),
        "GPT, Jacobi": gpt(lambda: Jacobi(flat)),
        "GPT, top-k": gpt(lambda: ModelDrafter(Stream(small, 8, top_k=2)), top_k=2),
        "GPT, cooler than its draft": gpt(lambda: ModelDrafter(Stream(small, 8)), temperature=0.5),
    }


def trained_cases(config, models, data):
    """The same for the trained models, in 64 bits; top-k 2, so that few enough texts are possible."""
    target, draft = (copy.deepcopy(models[name]).double().cpu() for name in ("target", "draft"))
    law, prompt = truth_of(target, top_k=2), data.test_text[:8]

    def trained(drafter, n, gamma):
        return case(lambda: Stream(target, 16, top_k=2), drafter, law, n, gamma, prompt)
    return {"trained, draft GPT": trained(lambda: ModelDrafter(Stream(draft, 16, top_k=2)), 3, 2),
            "trained, n-grams": trained(lambda: NGrams(256, known=data.ngrams), 2, 1),  # any of 256 guesses
            "trained, Jacobi": trained(lambda: Jacobi(data.unigram), 2, 1)}


# A proof that cannot fail proves nothing. So each mutant breaks one piece of one function, as programmers do,
# and the named case must notice. (function, piece of its source, what to write instead, case)
MUTANTS = {
    "every guess is kept": (accept, "if dice.coin(min(1.0, float(p[i][x] / q[i][x]))):", "if True:", "model"),
    "kept with p, not p / q": (accept, "p[i][x] / q[i][x]", "p[i][x]", "model"),
    "refused: drawn from p": (accept, "residual(p[i], q[i])", "p[i]", "model"),
    "refused: q of another place": (accept, "residual(p[i], q[i])", "residual(p[i], q[i - 1])", "model"),
    "refused: later guesses live on": (accept, "break\n", "continue\n", "model"),
    "all kept: a token from q": (accept, "dice.choose(p[len(draft)])", "dice.choose((q or p)[-1])", "model"),
    "residual not cut at 0": (residual, "(p - q).clamp(min=0)", "(p - q).abs()", "model"),
    "residual plus a little": (residual, "(p - q).clamp(min=0)", "(p - q).clamp(min=1e-3)", "model, zeros"),
    "a token is lost": (speculate, "accept(draft, q, p, dice)", "accept(draft, q, p, dice)[-2:]", "model"),
    "target remembers refused guesses": (speculate, "= len(text) - 1", "= start + len(draft)", "model"),
    "drafter remembers them": (ModelDrafter.propose, "min(self.model.length, len(text) - 1)",
                               "self.model.length", "model"),
    "guess is the argmax": (ModelDrafter.propose, "dice.choose(q[-1])", "int(q[-1].argmax())", "model"),
    "guess flatter than its q": (NGrams.propose, "dice.choose(q[-1])",
                                "dice.choose(residual(q[-1], q[-1] ** 2))", "GPT, n-grams"),
    "guess from an older q": (Jacobi.propose, "dice.choose(one)", "dice.choose(self.unseen)", "Jacobi"),
    "cache: all places are place 0": (GPT.hidden, "slice(start, start + tokens.shape[1])",
                                      "slice(tokens.shape[1])", "GPT, draft GPT"),
    "cache: guesses see later ones": (Block.attend, "start + N)\n", "start + N, causal=False)\n",
                                      "GPT, draft GPT"),
    "top-k forgotten": (warp, "kernels.truncate(logits / temperature, top_k, top_p)",
                        "(logits / temperature)", "GPT, top-k"),
    "temperature forgotten": (warp, "kernels.truncate(logits / temperature,", "kernels.truncate(logits,",
                              "GPT, cooler than its draft"),
}


@contextlib.contextmanager
def mutated(function, old, new):
    """`with mutated(f, old, new):` in here f runs with one piece of its source replaced, whoever calls it.

    The edited source is compiled, and its code put into the function object that all names refer to. So it
    works for methods (NGrams.propose) and in a notebook too; not for functions that are decorated, or made
    inside functions.
    """
    source = textwrap.dedent(inspect.getsource(function))
    if source.count(old) != 1:
        raise ValueError(f"{old!r} occurs {source.count(old)} times in {function.__name__}, not once")
    names, original = {}, function.__code__
    exec(compile(source.replace(old, new), "mutant", "exec"), function.__globals__, names)
    function.__code__ = names[function.__name__].__code__
    try:
        yield
    finally:
        function.__code__ = original


def prove(cases, mutants):
    """Enumerate all cases, then all mutants -> two dicts of total variations; infinity: StaleCache.

    Both arguments may be yours. A mutant that ends in any other error than StaleCache ends the proof: a
    program that crashes was not caught lying.
    """
    distance, truths, caught = {}, {}, {}
    for name, (decode, truth) in cases.items():
        truths[name] = truth()                          # now: mutants may break what it calls
        distance[name] = total_variation(enumerate_outcomes(decode), truths[name])
        print(f"  {name:34} {distance[name]:8.1e}")
    for name, (function, old, new, where) in mutants.items():
        with mutated(function, old, new):
            try:
                caught[name] = total_variation(enumerate_outcomes(cases[where][0]), truths[where])
            except StaleCache:
                caught[name] = math.inf
        print(f"  {name:34} {caught[name]:8.3f}   seen in {where!r}")
    return distance, caught


# ----- training ---------------------------------------------------------------------------------------------
def loss_of(model, tokens):
    """tokens (B, N + 1) -> -log p(token | tokens before it) in nats, the mean over N places of each row."""
    logits = model(tokens[:, :-1]).float()              # (B, N, V): row i reads token i, and predicts i + 1
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def train(config, models, data, dtype=torch.float32, path=None, state=None):
    """Fit all models, side by side, to the rows of data.train (M, N + 1) -> history of losses on data.test.

    models: a ModuleDict. The draft is not taught to imitate the target: that both read the same text is
    enough. path: where the state is kept; None: nowhere. state: what an earlier call has kept; training goes
    on from there. Test rows choose nothing: the rate falls to 0, and the last step is the model.
    """
    device, optimizers = next(models.parameters()).device, make_optimizers(models, config, dtype)
    first, history, _ = resume(state, "models", models, optimizers) if state else (0, [], 0.0)
    every = -(-config.steps // 3)                       # a third, rounded up
    bar = tqdm.trange(first, config.steps, desc="train", disable=None, leave=False)
    for step in bar:
        tokens = data.train[batch_at(step, len(data.train), config.batch, config.seed)].to(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = sum(loss_of(model, tokens) for model in models.values())   # they share no weight
        loss.backward()
        for optimizer, lr in zip(optimizers, (config.lr, config.lr / 4)):
            optimizer.param_groups[0]["lr"] = lr * (1 - step / config.steps)  # a straight line to 0
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % every == 0 or step + 1 == config.steps:
            if not math.isfinite(loss.item()):          # stop before it is saved: the old state is good
                fail(f"the loss is {loss.item()} at step {step + 1}: lower --lr, or use --precision fp32")
            with torch.no_grad():
                nats = {name: loss_of(model, data.test.to(device)).item() for name, model in models.items()}
            shown = ", ".join(f"{name} {value:.3f}" for name, value in nats.items())
            bar.write(f"step {step + 1:5}   nats per token of the test part: {shown}")
            history = history + [{"step": step + 1, **nats}]
            if path:
                save(path, {"config": vars(config), "step": step + 1, "models": models.state_dict(),
                            "optimizers": [o.state_dict() for o in optimizers], "history": history})
    return history


def make_optimizers(models, config, dtype):
    """Muon for matrices inside the blocks; AdamW, at a quarter of its rate, for embeddings and heads.

    AdamW alone, at .004, left this deep target .23 nats per byte worse after the same 400 steps.
    """
    inside, outside = [], []
    for model in models.values():
        inside += model.blocks.parameters()
        outside += [model.token.weight, model.head.weight]
    return [Muon(inside, config.lr, dtype=dtype),
            torch.optim.AdamW(outside, config.lr / 4, betas=(0.9, 0.95), weight_decay=0.0, fused=True)]


# --- shared: muon
def orthogonalize(G, dtype=torch.float32):
    """G (m, n) -> nearly U V^T of its singular value decomposition U S V^T: all directions equally strong.

    Newton-Schulz: (X X^T)^k X = U S^(2k+1) V^T, so an odd polynomial a x + b x^3 + c x^5 of a matrix acts on
    its singular values alone, and takes nothing but matrix products. Five rounds of this one, whose
    coefficients were found by search (Jordan et al. 2024), bring all values above about 0.0015 of the norm
    |G| (root of the sum of squares) into 0.68 .. 1.20: small ones rise fast, and exactly 1 is not needed.
    """
    tall = G.shape[0] > G.shape[1]
    X = G.mT if tall else G                                      # X X^T on the short side: smaller products
    X = (X / (X.norm() + 1e-7)).to(dtype)                        # no singular value exceeds 1; G may be 0
    for _ in range(5):
        A = X @ X.mT
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X      # a X + b (X X^T) X + c (X X^T)^2 X
    return (X.mT if tall else X).to(G.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum whose update of each weight matrix is orthogonalised (Jordan et al. 2024).

    Few directions dominate the gradient of a matrix; this moves all of them at one speed, the rare ones too.
    Only for matrices inside the blocks. A row of a token embedding, or of the layer that gives the logits,
    belongs to one token, and most have no gradient in a step: to equalise directions would move them, too.
    dtype is that of the products (torch.optim.Muon always takes bf16: on a CPU that emulates it, 20 times
    slower).
    """

    def __init__(self, params, lr, momentum=0.95, dtype=torch.float32):
        super().__init__(params, dict(lr=lr, momentum=momentum))
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:                      # not part of this loss
                    continue
                velocity = self.state[p].setdefault("velocity", torch.zeros_like(p))
                velocity.lerp_(p.grad, 1 - group["momentum"])             # v <- 0.95 v + 0.05 g
                ahead = p.grad.lerp(velocity, group["momentum"])          # Nesterov: 0.05 g + 0.95 v
                # U V^T keeps the length of an input; spread over more outputs than inputs, each number would
                # move less, so tall matrices get a longer step
                scale = max(1, p.shape[0] / p.shape[1]) ** 0.5
                p.sub_(orthogonalize(ahead, self.dtype), alpha=group["lr"] * scale)
# --- end shared


# --- shared: chance
BATCHES, HIDING, SAMPLING, CODEBOOK = range(4)  # what random numbers are for: each use has its own stream


def rng_at(*numbers, device="cpu"):
    """Random numbers that follow from (seed, use, step) alone, so no random state need be saved to resume."""
    mixed = np.random.SeedSequence(numbers).generate_state(1, np.uint64)  # a sum would mix up 1, 2 and 2, 1
    return torch.Generator(device).manual_seed(int(mixed[0] >> 1))  # 63 bits: positive


def batch_at(step, N, batch, seed):
    """Which of N images step number `step` takes -> (batch,) indices, or N where that is less.

    An epoch is N // batch steps through one permutation: no image comes twice, and the rest, fewer than a
    batch, sits out until the next permutation.
    """
    epoch, i = divmod(step, max(1, N // batch))
    return torch.randperm(N, generator=rng_at(seed, BATCHES, epoch))[i * batch:(i + 1) * batch]
# --- end shared


# ----- data: bytes of a text --------------------------------------------------------------------------------
def load_text(name):
    """"pydoc", the help topics inside every CPython, or a file -> bytes of its first 9/10, of the rest."""
    if name == "pydoc":
        from pydoc_data.topics import topics
        content = "\n".join(topics[key] for key in sorted(topics)).encode()  # half a million bytes
    else:
        try:
            content = pathlib.Path(name).read_bytes()
        except OSError as error:
            fail(f"--data {name}: {error.strerror}; give pydoc, or the path of a text file")
    tokens = torch.tensor(list(content))
    return tokens[:len(tokens) * 9 // 10], tokens[len(tokens) * 9 // 10:]


def windows(tokens, length, stride):
    """tokens (M,) -> rows (.., length + 1) that begin every `stride` tokens: a view, nothing is copied."""
    return tokens.unfold(0, length + 1, stride)


def load_data(config):
    """Rows to train and test on, the test text, and what the drafters without weights know beforehand."""
    train_text, test_text = load_text(config.data)
    if len(test_text) <= config.context:
        fail(f"--data {config.data}: a tenth is {len(test_text)} bytes, less than --context {config.context}")
    return SimpleNamespace(
        train=windows(train_text, config.context, 32),
        test=windows(test_text, config.context, 4 * config.context), test_text=test_text.tolist(),
        ngrams=NGrams(256).fit(train_text.tolist()),
        unigram=torch.bincount(train_text, minlength=256).double() / len(train_text))


# ----- how fast, and why ------------------------------------------------------------------------------------
class Watch:
    """Around a drafter: notes, place by place, how well its guesses suit the target, and what they cost.

    Place i is looked at only if all guesses before it stayed. Then alpha = sum_x min(p, q) is the probability
    that guess i stays: its mean over looks says the same as counting those that stayed, with less noise.
    """

    def __init__(self, drafter, gamma):
        self.drafter, self.seconds, self.calls = drafter, 0.0, 0
        self.overlap, self.looks = [0.0] * gamma, [0] * gamma

    def propose(self, text, gamma, dice):
        begun = time.perf_counter()
        draft, self.q = self.drafter.propose(text, gamma, dice)
        self.seconds += time.perf_counter() - begun
        return draft, self.q

    def update(self, text, start, p):
        for i in range(min(len(self.q), len(text) - start)):     # the guesses kept, and the one refused
            self.overlap[i] += float(torch.minimum(p[i], self.q[i]).sum())
            self.looks[i] += 1
        begun = time.perf_counter()
        self.drafter.update(text, start, p)
        self.seconds, self.calls = self.seconds + time.perf_counter() - begun, self.calls + 1

    def alphas(self):
        """Mean alpha of each place, 0 where none was ever looked at."""
        return [total / max(1, looks) for total, looks in zip(self.overlap, self.looks)]


def expected_tokens(alphas):
    """tau = 1 + a1 + a1 a2 + a1 a2 a3 + ..: the target's own token, and guess i if it and all before it stay.

    With all alphas equal this is eq. 1 of Leviathan et al., (1 - alpha^(gamma + 1)) / (1 - alpha). On a text
    they are not: where some guesses have stayed, inside a word say, the next is easier.
    """
    tau, reached = 1.0, 1.0
    for alpha in alphas:
        reached *= alpha
        tau += reached
    return tau


def call_costs(config, model, sizes):
    """Seconds t(k) of a target call on k new tokens in mid-text, with all decisions, for the k in sizes."""
    target, dice, costs = new_stream(config, model), Dice(rng_at(config.seed)), []
    text, even = [32] * (config.context // 2), torch.full((max(sizes), 256), 1 / 256)
    target.distributions(text)
    for k in sizes:
        def call():
            target.length = len(text) - 1
            target.distributions(text, [32] * (k - 1))
            accept([32] * (k - 1), even, even, dice)    # p = q: every guess stays
        costs.append(float(np.median(timeit.repeat(call, number=1, repeat=30))))
    return costs


def timed(config, model, drafter, prompt, gamma, *chance):
    """Go on from one prompt -> seconds, target calls. drafter None: plain decoding."""
    target, dice = new_stream(config, model), Dice(rng_at(config.seed, SAMPLING, *chance))
    begun, calls = time.perf_counter(), config.new
    if drafter is None:
        plain(target, prompt, config.new, dice)
    else:
        calls = len(speculate(target, drafter, prompt, config.new, gamma, dice)[1])
    return time.perf_counter() - begun, calls


def race(config, model, drafters, prompts, repeat):
    """All prompts by all drafters and gammas -> {(name, gamma): sums of plain seconds, seconds, calls}.

    Plain decoding runs again beside each gamma: a computer's speed drifts, ratios of neighbours do not. And
    a memory is never shared between two rows of the table, or the later would profit from the earlier.
    """
    total, current = {}, {}
    for i, prompt in enumerate(prompts):
        for gamma in GAMMAS:
            usual, _ = timed(config, model, None, prompt, 0, repeat, i)
            for name, (make, kept) in drafters.items():
                if i == 0 or not kept:
                    current[name, gamma] = make()
                ours = timed(config, model, current[name, gamma], prompt, gamma, repeat, i)
                total[name, gamma] = total.get((name, gamma), 0) + np.array([usual, *ours])
    return total


def predict(config, model, make, kept, gamma, prompts):
    """What acceptance and costs predict; both measured in a run of its own, with other random numbers.

        speed-up = tau t(1) / (t_draft + t(gamma + 1))        tau from the alphas, by `expected_tokens`

    That is Leviathan et al., theorem 3.8, without their assumption that a longer call costs the same.
    """
    watch = Watch(make(), gamma)
    for i, prompt in enumerate(prompts):
        if not kept:
            watch.drafter = make()
        timed(config, model, watch, prompt, gamma, 1000, i)
    one, more = call_costs(config, model, (1, gamma + 1))
    drafting, tau = watch.seconds / watch.calls, expected_tokens(watch.alphas())
    return {"alpha": watch.alphas()[0], "alphas": watch.alphas(), "predicted_tau": tau,
            "draft_cost": drafting / one, "predicted_speedup": tau * one / (drafting + more)}


def bench(config, models, data, tv):
    """All drafters at all gammas beside plain decoding -> methods, a list of dicts; call costs."""
    def small():
        return ModelDrafter(new_stream(config, models["draft"]))

    def ngrams():
        return NGrams(256, known=data.ngrams)
    # name: how to make one; whether one goes on from prompt to prompt
    drafters = {"draft GPT": (small, False), "n-grams": (ngrams, False),
                "n-grams, memory kept": (ngrams, True), "Jacobi": (lambda: Jacobi(data.unigram), False)}
    model, every = models["target"], len(data.test_text) // config.prompts
    prompts = [data.test_text[i * every:i * every + PROMPT] for i in range(config.prompts)]
    costs = call_costs(config, model, range(1, max(GAMMAS) + 2))
    bar = tqdm.trange(config.repeats, desc="bench", disable=None, leave=False)
    races, methods = [race(config, model, drafters, prompts, repeat) for repeat in bar], []
    for name, gamma in races[0]:
        speedups = [float(total[name, gamma][0] / total[name, gamma][1]) for total in races]
        calls = sum(total[name, gamma][2] for total in races)
        methods.append({"name": name, "task": "text", "exact": True, "gamma": gamma,
                        "tau": float(config.new * len(prompts) * len(races) / calls),
                        "speedup": float(np.mean(speedups)), "speedups": speedups,
                        "tv": tv.get("trained, " + name.removesuffix(", memory kept")),
                        **predict(config, model, *drafters[name], gamma, prompts)})
    return methods, costs


def print_bench(methods, costs):
    units = "  ".join(f"{k}: {cost / costs[0]:.2f}" for k, cost in enumerate(costs, 1))
    print(f"a target call on 1 token takes {1000 * costs[0]:.2f} ms; on k tokens, in units of that: {units}\n"
          "drafter               gamma  alpha by place    tau predicted   speed-up (of repeats)  predicted")
    for m in methods:
        places = " ".join(f"{alpha:.2f}" for alpha in m["alphas"][:3])
        spread = f"({min(m['speedups']):.2f} to {max(m['speedups']):.2f})"
        print(f"{m['name']:21} {m['gamma']:5}  {places:15} {m['tau']:5.2f} {m['predicted_tau']:9.2f} "
              f"{m['speedup']:10.2f} {spread:15} {m['predicted_speedup']:7.2f}")


# ----- picture ----------------------------------------------------------------------------------------------
def draw_trace(path, text, prompt, given, width=64):
    """trace.png: who chose each byte? The first `prompt` bytes were given; `given`: bytes of each call."""
    from matplotlib.figure import Figure
    colours = ["#d9d9d9"] * prompt
    for count in given:
        colours += ["#b7e4b0"] * (count - 1) + ["#f4b183"]       # the last of a call is the target's own
    lines = -(-len(text) // width)                               # rounded up
    figure = Figure(figsize=(9, 0.6 + 0.25 * lines), layout="constrained")
    axis = figure.subplots()
    for i, (token, colour) in enumerate(zip(text, colours)):
        y, x = divmod(i, width)
        axis.fill([x, x + 1, x + 1, x], [y, y, y + 1, y + 1], color=colour)
        shown = chr(token) if 32 < token < 127 else "\u00b7"     # blanks, line ends and others as dots
        axis.text(x + 0.5, y + 0.5, shown, family="monospace", fontsize=8, ha="center", va="center",
                  parse_math=False)
    axis.set(xlim=(0, width), ylim=(lines, 0))
    axis.set_title(f"grey: given; green: guessed and kept; orange: the target's own. "
                   f"{sum(given) / len(given):.2f} bytes per target call", fontsize=9)
    axis.axis("off")
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


# ----- settings and main ------------------------------------------------------------------------------------
NAME, PARTS = "nano_spec", ("train", "sample", "prove", "bench")
PROMPT, GAMMAS = 32, (2, 4, 8, 12)  # bench: bytes of a prompt; most guesses per call
FLAGS = {  # name: default, what is allowed (names, or the least number), help
    "data": ("pydoc", None, "pydoc, the help topics inside every CPython, or a text file"),
    "out": ("out/spec", None, "folder for checkpoint, picture and metrics.json"),
    "preset": ("cpu", ("cpu", "gpu"), "other defaults; gpu: for an 8 GB card and half an hour"),
    "seed": (0, 0, "of the weights, the batches and the samples"),
    "device": ("auto", ("auto", "cpu", "cuda", "mps"), "where to compute"),
    "precision": ("fp32", ("auto", "fp32", "bf16"), "of products in training; so narrow, bf16 gains nothing"),
    "resume": (False, None, "go on from the last report, kept in OUT/last.pt"),
    "dim": (64, 32, "width of the target, a multiple of 32: a head has 32 numbers"),
    "depth": (16, 1, "blocks of the target"),
    "draft_dim": (128, 32, "width of the draft GPT, which has one block; a multiple of 32"),
    "context": (128, 40, "longest text, in bytes"),
    "steps": (400, 1, "optimizer steps; the learning rate falls to 0 over them, so none can be added"),
    "batch": (16, 1, "rows of `context` bytes per step"),
    "lr": (0.02, 0, "learning rate of Muon; AdamW takes a quarter of it"),
    "new": (96, 1, "bytes to write after a prompt"),
    "prompt": ("", None, "sample: text to go on from; without it, a piece of the test part"),
    "gamma": (6, 0, "sample: most guesses per call"),
    "temperature": (1.0, 0, "divides the logits; 0 takes the most probable byte"),
    "top_k": (0, 0, "keep the k most probable bytes; 0 keeps all"),
    "top_p": (1.0, 0.001, "keep the most probable bytes up to this mass; 1 keeps all"),
    "prompts": (6, 1, "bench: pieces of the test part to go on from"),
    "repeats": (3, 1, "bench: repetitions with other random numbers"),
}
PRESETS = {"cpu": {}, "gpu": dict(dim=512, depth=24, draft_dim=256, context=512, steps=400, batch=8,
                                  lr=0.01, new=384, precision="auto")}
FREE = {"new", "prompt", "gamma", "temperature", "top_k", "top_p", "prompts", "repeats"}


# --- shared: settings
LOCAL = {"out", "device", "precision", "resume"}  # of this run alone: never taken from a checkpoint


def fail(message):
    """What is wrong, where, and what to do, in one line on stderr; exit code 2."""
    print(f"{NAME}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def read_settings(argv=None):
    """The command line -> part, config, checkpoint (empty unless resumed or sampled from).

    Each setting comes from the first that has it: the flags given now, the checkpoint, the preset, the
    defaults. Only those in FREE and LOCAL may be given otherwise than the checkpoint has them: the others
    have shaped its weights.
    """
    parser = argparse.ArgumentParser(prog=NAME, description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail                                 # argparse would print the usage first: many lines
    parser.add_argument("part", nargs="?", default="all", choices=("all", *PARTS), help="what to do")
    for name, (default, _, text) in FLAGS.items():
        kind = {"action": "store_true"} if default is False else {"type": type(default)}
        kind |= {"default": argparse.SUPPRESS, "help": f"{text} [{default}]"}
        parser.add_argument("--" + name.replace("_", "-"), **kind)
    given = vars(parser.parse_args(argv))               # SUPPRESS: this holds only what was really given
    if any(value in ([], "--") for value in given.values()):     # what argparse makes of --out=--
        fail("-- is no value: give the flag another")
    part, defaults = given.pop("part"), {name: default for name, (default, _, _) in FLAGS.items()}
    needed = "resume" in given or part not in ("all", "train")
    state = load(pathlib.Path(given.get("out", defaults["out"]), "last.pt")) if needed else {}
    saved = {name: value for name, value in state.get("config", {}).items() if name in FLAGS.keys() - LOCAL}
    for name, value in {**saved, **given}.items():
        allowed, flag = FLAGS[name][1], f"--{name.replace('_', '-')} {value}"
        if type(value) is not type(defaults[name]):     # only one from a checkpoint can be
            fail(f"{flag}: the checkpoint has this, of another type; train again, or choose another --out")
        if isinstance(allowed, tuple) and value not in allowed:
            fail(f"{flag}: choose one of {', '.join(allowed)}")
        if isinstance(allowed, (int, float)) and not allowed <= value < 1e9:  # so written, nan fails, too
            fail(f"{flag}: must be a number from {allowed} on, below a billion")
        if name not in FREE and saved.get(name, value) != value:
            fail(f"{flag}: the checkpoint has {saved[name]}; drop the flag, or choose another --out")
    preset = PRESETS[{**defaults, **saved, **given}["preset"]]
    return part, SimpleNamespace(**{**defaults, **preset, **saved, **given}), state


def pick_device(name, precision):
    """-> device, dtype of matrix products in training: bf16 only where the hardware multiplies it fast."""
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = next(k for k in has if has[k]) if name == "auto" else name
    if not has[kind]:
        fail(f"--device {name}: this torch sees no such device; use --device cpu")
    if kind == "cuda":
        fast = torch.cuda.get_device_capability() >= (8, 0)
    else:                                               # without this unit a CPU is 15 x slower in bf16
        fast = kind == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False)
    bf16 = fast if precision == "auto" else precision == "bf16"
    return torch.device(kind), torch.bfloat16 if bf16 else torch.float32
# --- end shared


# --- shared: checkpoint
def write(path, content):
    """Write bytes so that `path` is always all of the old file or all of the new one."""
    part = path.with_suffix(".part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())                     # on the disk before it has the name: power may fail
        os.replace(part, path)                                   # atomic
    finally:
        part.unlink(missing_ok=True)                             # half a file is of no use


def save(path, state):
    """Keep tensors and plain types; by way of the memory, for torch would hide that a disk is full."""
    content = io.BytesIO()
    torch.save({"script": NAME, **state}, content)
    write(path, content.getbuffer())


def load(path):
    """-> the dict that `save` wrote, on the CPU. weights_only: nothing in the file is executed.

    The zip archive has a checksum of each part, which torch.load ignores: of 200 files with one bit turned it
    gave 187 back, with a wrong weight. A zip may unpack to far more than its size; ours is not compressed.
    """
    try:
        with zipfile.ZipFile(path) as file:
            size = sum(part.file_size for part in file.infolist())
            if size > path.stat().st_size or file.testzip():
                raise ValueError("a bit has changed, or a zip bomb")
        state = torch.load(path, map_location="cpu", weights_only=True)
        kinds = {"config": dict, "step": int, "history": list, "optimizers": list}
        if state.get("script") != NAME or any(type(state[key]) is not kinds[key] for key in kinds):
            raise ValueError("written by another script")
    except FileNotFoundError:
        fail(f"there is no checkpoint {path}: train first, or point --out at the folder of a run")
    except Exception:                                            # torch reports broken files by many types
        fail(f"{path} is broken, or not a checkpoint of {NAME}: train again, or choose another --out")
    return state


def resume(state, name, network, optimizers=()):
    """Put what `save` has kept of them back in its places -> first step, history, seconds so far."""
    try:
        network.load_state_dict(state[name])
        for i, optimizer in enumerate(optimizers):
            optimizer.load_state_dict(state["optimizers"][i])
            for weight, memory in optimizer.state.items():       # their shapes torch does not compare
                assert all(x.shape in ((), weight.shape) for x in memory.values()), "running means"
        return state["step"], state["history"], float(state.get("seconds", 0))
    except Exception as error:                                   # of another version, or changed by hand
        fail(f"this checkpoint fits another network ({str(error)[:99]}): train again, or change --out")


def run_as_program(main):
    """Call main(). Being stopped, no memory, or a file that cannot be used, ends in one line."""
    try:
        main()
    except KeyboardInterrupt:
        fail("stopped; the same command with --resume goes on from the last report, if there was one")
    except OSError as error:
        fail(f"cannot use {error.filename or 'a file'} ({error.strerror}): make room, or another --out")
    except (MemoryError, RuntimeError) as error:                 # torch has no type of its own for it
        if isinstance(error, RuntimeError) and not any(w in str(error) for w in ("allocate", "overflow")):
            raise
        fail("this needs more memory than there is: choose smaller sizes, or a smaller batch")
# --- end shared


def new_stream(config, model):
    """A new text, of at most `config.context` bytes, with temperature, top-k and top-p of the config."""
    return Stream(model, config.context, config.temperature, config.top_k, config.top_p)


def make_models(config):
    torch.manual_seed(config.seed)                      # for the weights
    target = GPT(256, config.context, config.dim, config.depth, config.dim // 32)
    draft = GPT(256, config.context, config.draft_dim, 1, config.draft_dim // 32)
    return nn.ModuleDict({"target": target, "draft": draft})


def sample(config, models, data, path):
    """Go on from a prompt with n-grams as the drafter; print the text, draw who chose what."""
    third = len(data.test_text) // 3
    prompt = list(config.prompt.encode()) or data.test_text[max(0, third - PROMPT):third]
    if len(prompt) + config.new > config.context:
        fail(f"--prompt: {len(prompt)} bytes and --new {config.new} exceed --context {config.context}")
    target, dice = new_stream(config, models["target"]), Dice(rng_at(config.seed, SAMPLING))
    drafter = NGrams(256, known=data.ngrams)
    text, given = speculate(target, drafter, prompt, config.new, config.gamma, dice)
    print(bytes(text).decode("utf-8", "replace"))
    draw_trace(path, text, len(prompt), given)


def check(cases):
    """Prove, and end in an error if the proof fails -> {case: total variation}."""
    distance, caught = prove(cases, MUTANTS)
    missed = [name for name, value in caught.items() if value < 1e-6]
    worst = max(distance.values(), default=0)
    print(f"{len(distance)} decoders: total variation at most {worst:.1e}; "
          f"{len(caught) - len(missed)} of {len(caught)} mutants caught")
    if missed or worst > 1e-12:
        fail(f"the proof failed: total variation {worst:.1e}, not caught: {', '.join(missed) or 'none'}")
    return distance


@contextlib.contextmanager
def one_thread():
    """For small calls one after the other: a second thread costs more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def main(argv=None):
    """Do what the command line says -> the metrics; a full run and `bench` write them to OUT/metrics.json."""
    if (sys.argv[1:] if argv is None else argv) == ["prove"]:
        return {"tv": check(cases())}                   # needs no data and no checkpoint
    begun, (part, config, state) = time.time(), read_settings(argv)
    if config.dim % 32 or config.draft_dim % 32 or config.top_p > 1:
        fail(f"--dim {config.dim}, --draft-dim {config.draft_dim} must be multiples of 32, --top-p at most 1")
    if part in ("all", "bench") and PROMPT + config.new > config.context:
        fail(f"--new {config.new}: after {PROMPT} bytes of a prompt more than --context {config.context}")
    device, dtype = pick_device(config.device, config.precision)
    out = pathlib.Path(config.out)
    out.mkdir(parents=True, exist_ok=True)              # now: a wrong --out must not cost the whole run
    data, models = load_data(config), make_models(config).to(device)
    params = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    metrics = {"device": str(device), "seed": config.seed, "params": params["target"], "tv": {}}
    print(f"{NAME}: target {params['target']:,} weights, draft {params['draft']:,}, on {device}; "
          f"kernels: {kernels.path(models['target'].cos).name}")
    if part in ("all", "train"):
        train(config, models, data, dtype, out / "last.pt", state)
        state = load(out / "last.pt")
    resume(state, "models", models)
    models.requires_grad_(False)
    with one_thread():
        if part in ("all", "sample"):
            sample(config, models, data, out / "trace.png")
        if part in ("all", "prove"):
            metrics["tv"] = check(cases() | trained_cases(config, models, data))
        if part in ("all", "bench"):
            metrics["methods"], costs = bench(config, models, data, metrics["tv"])
            print_bench(metrics["methods"], costs)
            metrics |= {"costs": costs, "history": state["history"], "seconds": time.time() - begun}
            write(out / "metrics.json", json.dumps(metrics, indent=1).encode())
            print(f"total {metrics['seconds']:.0f} s")
    return metrics


if __name__ == "__main__":
    run_as_program(main)
