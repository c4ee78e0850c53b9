"""nano_spec: the proofs by enumeration, and what enumeration cannot see: caches in float32, training, the command line."""

import doctest
import functools
import itertools
import json
import math
import pathlib
import statistics
import sys

import pytest
import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import kernels
import nano_spec as ns

torch.set_num_threads(1)
CASES = ns.cases()
TRUTH = functools.cache(lambda name: CASES[name][1]())
distinct = functools.partial(ns.select, replace=False)


def laws(vocab, seed):
    return ns.Table(vocab, 2 * seed).law(()), ns.Table(vocab, 2 * seed + 1).law(())


def tiny(seed=0, vocab=11, dim=16, depth=3, dtype=torch.float32):
    return ns.tiny_gpt(seed, vocab, dim, depth).to(dtype)


# ---------------------------------------------------------------------------------------------------------------------
# exactness
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_output_law_is_exact(name):
    law = ns.law_of(CASES[name][0])
    assert abs(sum(law.values()) - 1) < 1e-12
    assert abs(sum(TRUTH(name).values()) - 1) < 1e-12
    assert ns.total_variation(law, TRUTH(name)) < 1e-12


@pytest.mark.parametrize("what, case, old, new", ns.MUTANTS, ids=[m[0] for m in ns.MUTANTS])
def test_every_mutant_is_caught(what, case, old, new):
    assert ns.run_mutant(old, new, case) > 1e-4


def test_enumeration_on_a_law_known_by_hand():
    assert ns.law_of(lambda rng: rng.bern(0.25) and rng.bern(0.5)) == {False: 0.875, True: 0.125}
    two = ns.law_of(lambda rng: (rng.choice([0.5, 0.0, 0.5]), rng.choice([0.25, 0.75])))
    assert two == {(0, 0): 0.125, (0, 1): 0.375, (2, 0): 0.125, (2, 1): 0.375}


@pytest.mark.parametrize("name", ["residual", "select", "law_of", "frechet_distance"])
def test_worked_examples(name):
    for test in doctest.DocTestFinder().find(getattr(ns, name), name, globs=vars(ns).copy()):
        assert doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test).failed == 0


def test_table_refuses_a_stale_cache():
    table = ns.Table(3)
    table.laws([0, 1, 2])
    table.length = 2
    with pytest.raises(AssertionError):
        table.laws([0, 2, 2])


@pytest.mark.parametrize("seed", range(5))
def test_acceptance_is_the_closed_form(seed):
    p, q = laws(6, seed)
    assert ns.acceptance(p, q, 1, "drawn", ns.select) == pytest.approx(float(torch.minimum(p, q).sum()), abs=1e-12)


def test_measured_acceptance_agrees_with_the_closed_form_within_two_percent():
    log, rng = [], ns.Rng(0)
    for seed in range(60):
        target = ns.Table(8, seed)
        ns.speculate(target, ns.ChainDraft(ns.Table(8, 1000 + seed)), [0], rng, 60, 4, ns.watched(ns.select, log))
    closed, taken = statistics.fmean(a for _, _, a, _ in log), statistics.fmean(hit for *_, hit in log)
    assert len(log) > 3000 and abs(closed - taken) < 0.02


def test_degenerate_laws():
    rng, p, one = ns.Rng(0), torch.tensor([0.2, 0.5, 0.3]), torch.eye(3)
    assert all(ns.select(p, p, [x], rng) == x for x in [0, 1, 2] * 50)  # p == q: accepted always
    assert all(ns.select(one[0], one[1], [1], rng) == 0 for _ in range(50))  # disjoint: the other law, no nan
    assert all(ns.select(one[2], one[2], [2], rng) == 2 for _ in range(50))
    assert all(ns.select(one[1], None, [1, 0], rng) == 1 for _ in range(50))
    assert ns.select_kseq(one[0], one[1], [1, 1], rng) == 0
    assert torch.equal(ns.residual(p, p), p)  # rounding refused at p == q: fall back to p
    for n in (1, 2, 3):  # the same through enumeration, for every way to draft
        for how, select in (("drawn", ns.select), ("distinct", distinct), ("top", ns.select), ("drawn", ns.select_kseq)):
            assert ns.acceptance(p.double(), p.double(), n, how, select) == pytest.approx(
                1.0 if how != "top" else float(p.sort(descending=True).values[:n].sum()), abs=1e-6)


@pytest.mark.parametrize("seed, k", itertools.product(range(8), (2, 3)))
def test_kseq_between_its_bounds(seed, k):
    p, q = laws(5, seed)
    rho, beta = ns.kseq_factor(p, q, k), lambda rho: float(torch.minimum(q, p / rho).sum())
    assert 1 - (1 - beta(rho)) ** k <= rho * beta(rho) + 1e-12 and 1 <= rho <= k
    accepted, best = ns.acceptance(p, q, k, "drawn", ns.select_kseq), ns.optimal_acceptance(p, q, k)
    assert (1 - (1 - 1 / k) ** k) * best <= accepted <= best + 1e-9
    assert ns.acceptance(p, q, k, "drawn", ns.select) <= best + 1e-9
    assert ns.kseq_factor(p, q, 1) == 1.0
    short = 0.8 * rho  # below the root the law of the refused case would be negative
    if short >= 1:
        taken = torch.minimum(q, p / short)
        assert float((p - taken * (1 - (1 - beta(short)) ** k) / beta(short)).min()) < 0


@pytest.mark.parametrize("seed", range(6))
def test_optimal_acceptance_against_all_subsets(seed):
    p, q = laws(5, seed)
    for n in (1, 2, 3):
        subsets = (list(h) for size in range(6) for h in itertools.combinations(range(5), size))
        brute = min(float(p[h].sum() + 1 - q[h].sum() ** n) for h in subsets)
        assert ns.optimal_acceptance(p, q, n) == pytest.approx(brute, abs=1e-12)
    assert ns.optimal_acceptance(p, q, 1) == pytest.approx(float(torch.minimum(p, q).sum()), abs=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# relaxations and their price
# ---------------------------------------------------------------------------------------------------------------------

NEAR = torch.tensor([[0, 1, 2], [1, 0, 3], [2, 4, 0], [3, 4, 1], [4, 3, 2]])
RELAXED = {"lenience": functools.partial(ns.lenience, factor=0.4), "gsd": functools.partial(ns.grouped, near=NEAR[:, :2]),
           "lantern": functools.partial(ns.lantern, near=NEAR, delta=0.3)}


@pytest.mark.parametrize("name", RELAXED)
def test_closed_form_of_a_relaxation_equals_its_enumeration(name):
    for seed in range(5):
        p, q = laws(5, seed)
        relax = RELAXED[name]
        if name == "lenience":
            run = lambda rng: ns.select(p, q, [rng.choice(q)], rng, relax=relax)
        else:  # these index tables with the token
            run = lambda rng: ns.select(p, q, [rng.choice(q)], rng, relax=lambda p, q, x: relax(p, q, torch.tensor(x)))
        law, _ = ns.selected_law(p, q, relax)
        enumerated = ns.law_of(run)
        assert max(abs(float(law[x]) - enumerated.get(x, 0.0)) for x in range(5)) < 1e-12


def test_price_of_lenience_is_the_acceptance_gained():
    for seed in range(30):
        p, q = laws(7, seed)
        paid, gained = ns.price([p], [q], functools.partial(ns.lenience, factor=0.5))
        assert paid == pytest.approx(gained, abs=1e-12)
    assert ns.price([p], [q], ns.exact) == pytest.approx((0.0, 0.0), abs=1e-12)


@pytest.mark.parametrize("delta", [0.05, 0.2, 0.5, 0.9])
def test_lantern_against_a_slow_twin(delta):
    for seed, x in itertools.product(range(5), range(5)):
        p, q = laws(5, seed)
        slow, taken = p.clone(), 0.0
        for near in NEAR[x, 1:].tolist():  # the longest run of nearest codes whose mass stays within delta
            if taken + float(p[near]) > delta:
                break
            taken, slow[near] = taken + float(p[near]), 0.0
        slow[x] += taken
        ratio, law = ns.lantern(p, q, torch.tensor(x), NEAR, delta)
        assert torch.allclose(law, slow, atol=1e-12) and float(ratio) == pytest.approx(float(slow[x] / q[x]))


def test_relaxations_with_nothing_to_relax_are_exact_and_accept_more_with_more():
    p, q = laws(5, 3)
    assert ns.price([p], [q], functools.partial(ns.grouped, near=NEAR[:, :1])) == pytest.approx((0, 0), abs=1e-12)
    assert ns.price([p], [q], functools.partial(ns.lantern, near=NEAR, delta=0.0)) == pytest.approx((0, 0), abs=1e-12)
    gained = [ns.price([p], [q], functools.partial(ns.lantern, near=NEAR, delta=d))[1] for d in (0.0, 0.1, 0.3, 0.6, 1.0)]
    assert gained == sorted(gained) and gained[-1] > gained[0]


# ---------------------------------------------------------------------------------------------------------------------
# the real model: masks, caches, greedy decoding in float32
# ---------------------------------------------------------------------------------------------------------------------


def all_drafters(net, small, vocab=11):
    uniform = torch.full((vocab,), 1.0 / vocab)
    heads = ns.Medusa(16, 3).requires_grad_(False)
    ngram = ns.NGram(vocab, [1, 2, 3, 1, 2, 4, 1, 2, 3, 5, 6])
    cold = dict(temperature=0)
    return {
        "chain": lambda t: ns.ChainDraft(ns.Stream(small, 64, **cold)),
        "tree": lambda t: ns.TreeDraft(ns.Stream(small, 64, **cold), (3, 2, 1, 1), "top"),
        "self-exit": lambda t: ns.ChainDraft(ns.Stream(net, 64, 1, **cold)),
        "heads": lambda t: ns.ChainDraft(ns.Heads(t, heads)),
        "n-gram": lambda t: ns.ChainDraft(ngram),
        "n-gram tree": lambda t: ns.TreeDraft(ngram, (3, 2, 1), "top"),
        "lookup": lambda t: ns.Lookup(),
        "recycling": lambda t: ns.TreeDraft(ns.Recycle(vocab), (3, 2), "top"),
        "jacobi": lambda t: ns.ChainDraft(ns.Jacobi(lambda n: uniform)),
    }


@pytest.mark.parametrize("name", all_drafters(None, None))
def test_greedy_equals_greedy_bit_for_bit(name):
    net, small = tiny(0), tiny(1, depth=1)
    for prompt in ([1, 2, 3], [7], [4, 4, 1, 2]):
        expected = ns.plain(ns.Stream(net, 64, temperature=0), prompt, ns.Rng(0), 24).tokens
        target = ns.Stream(net, 64, temperature=0)
        out = ns.speculate(target, all_drafters(net, small)[name](target), prompt, ns.Rng(0), 24, 4)
        assert out.tokens == expected
        assert out.calls <= 24


def test_jacobi_reaches_the_greedy_fixed_point():
    net = tiny(3, vocab=5)
    for start in range(5):
        target = ns.Stream(net, 64, temperature=0)
        out = ns.speculate(target, ns.ChainDraft(ns.Jacobi(lambda n: torch.full((5,), 0.2))), [start], ns.Rng(0), 8, 8)
        assert out.calls <= 8 and out.tokens == ns.plain(ns.Stream(net, 64, temperature=0), [start], ns.Rng(0), 8).tokens


@pytest.mark.parametrize("name", all_drafters(None, None))
def test_cache_after_every_rollback_equals_a_fresh_prefill(name):
    net, small = tiny(0, dtype=torch.float64), tiny(1, depth=1, dtype=torch.float64)
    target, checked = ns.Stream(net, 64), []

    def keep(base, path, original=target.keep):
        original(base, path)
        tokens = [*text, *path]
        assert target.length == len(tokens) - 1
        fresh = ns.Stream(net, 64)
        fresh.laws(tokens[:-1])
        assert torch.allclose(target.kv[..., :target.length, :], fresh.kv[..., :target.length, :], atol=1e-12)
        text.extend(path)
        checked.append(len(path))

    text = [1, 2, 3]
    target.keep = keep
    drafter = all_drafters(net, small)[name]
    if name == "heads":
        drafter = lambda t: ns.ChainDraft(ns.Heads(t, ns.Medusa(16, 3).double().requires_grad_(False)))
    out = ns.speculate(target, drafter(target), list(text), ns.Rng(5), 30, 4)
    assert sum(checked) == 30 and out.blocks == checked and text == out.tokens


def test_all_accepted_and_the_draft_cache_is_one_token_short():
    net = tiny(0, dtype=torch.float64)
    fed, draft = [], ns.Stream(net, 64)
    laws = draft.laws
    draft.laws = lambda out, paths=(): (fed.append(len(out) - draft.length), laws(out, paths))[1]
    out = ns.speculate(ns.Stream(net, 64), ns.ChainDraft(draft), [1], ns.Rng(0), 25, 4)
    assert out.blocks == [5] * 5  # draft == target: gamma accepted, one bonus, every time
    assert fed[4::4] == [2] * 4 and out.tau == 5  # after a full acceptance it is fed two tokens


def test_stop_token_inside_an_accepted_block():
    net = tiny(0, dtype=torch.float64)
    free = ns.speculate(ns.Stream(net, 64), ns.ChainDraft(ns.Stream(net, 64)), [1], ns.Rng(0), 25, 4)
    stop = free.tokens[3]  # in the middle of the first block of five
    target = ns.Stream(net, 64)
    out = ns.speculate(target, ns.ChainDraft(ns.Stream(net, 64)), [1], ns.Rng(0), 25, 4, stop=stop)
    assert out.tokens == free.tokens[:free.tokens.index(stop, 1) + 1] and out.done
    assert sum(out.blocks) == len(out.tokens) - 1 and target.length == len(out.tokens) - 1
    assert ns.plain(ns.Stream(net, 64), [1], ns.Rng(0), 0).tokens == [1]


def test_tree_mask_equals_the_one_of_the_kernels_and_causality_holds():
    stream = ns.Stream(tiny(0), 64)
    stream.length, paths = 2, [(1,), (1, 2), (1, 2, 3), (1, 4), (5,), (5, 1)]
    stream.paths = [(), *paths]
    parents = [-1, 0, 1, 2, 3, 2, 1, 6]
    assert torch.equal(stream.mask(2, 8), kernels.tree(parents, prefix=2).dense()[0, 0])
    stream.paths = [(), (1,), (1, 2)]
    assert torch.equal(stream.mask(1, 3), torch.ones(3, 5, dtype=torch.bool).tril(2))


def test_tree_rows_equal_separate_forwards():
    net = tiny(0, dtype=torch.float64)
    paths = sorted({(1,), (1, 2), (3,), (3, 1), (3, 2), (3, 2, 5)})
    found = ns.Stream(net, 64).laws([4, 2, 7], paths)
    for path in [(), *paths]:
        assert torch.allclose(found[path], ns.Stream(net, 64).laws([4, 2, 7, *path])[()], atol=1e-12)


def test_greedy_batch_equals_single_rows():
    net, small = tiny(0), tiny(1, depth=1)
    prompts = torch.tensor([[1, 2], [3, 4], [9, 9]])
    single = [ns.plain(ns.Stream(net, 64, temperature=0), row, ns.Rng(0), 20).tokens for row in prompts.tolist()]
    for drafter in (ns.ChainBatch(small, 3, 64, temperature=0), ns.JacobiBatch(torch.full((40, 11), 1 / 11), 3)):
        tokens, calls = ns.speculate_batch(net, drafter, prompts, ns.Rng(0), 20, 3, temperature=0)
        assert tokens.tolist() == single and bool((calls <= 20).all())
    tokens, calls = ns.speculate_batch(net, ns.JacobiBatch(torch.full((40, 11), 1 / 11), 3), prompts, ns.Rng(0), 20, 0, temperature=0)
    assert tokens.tolist() == single and calls.tolist() == [20] * 3


# ---------------------------------------------------------------------------------------------------------------------
# laws, drafters
# ---------------------------------------------------------------------------------------------------------------------


def test_warp():
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()
    assert ns.warp(logits, temperature=0).tolist() == [1, 0, 0, 0]
    assert torch.allclose(ns.warp(logits), logits.exp())
    assert torch.allclose(ns.warp(logits, temperature=0.5), logits.exp() ** 2 / (logits.exp() ** 2).sum())
    assert torch.allclose(ns.warp(logits, top_k=2), torch.tensor([2 / 3, 1 / 3, 0, 0]))
    assert torch.allclose(ns.warp(logits, top_p=0.6), torch.tensor([2 / 3, 1 / 3, 0, 0]))


def test_truncated_target_never_emits_what_it_excludes():
    net, small = tiny(0), tiny(1, depth=1)
    target = ns.Stream(net, 128, top_k=2)
    out = ns.speculate(target, ns.ChainDraft(ns.Stream(small, 128)), [1], ns.Rng(0), 60, 3)  # the draft is not truncated
    for i in range(1, len(out.tokens)):
        assert ns.Stream(net, 128, top_k=2).laws(out.tokens[:i])[()][out.tokens[i]] > 0


@pytest.mark.parametrize("batch", [False, True])
def test_rng_draws_from_the_law(batch):
    p, n = torch.tensor([0.5, 0.0, 0.3, 0.2]), 20000
    rng = ns.Rng(1)
    drawn = rng.choice(p.expand(n, -1)) if batch else torch.tensor([rng.choice(p) for _ in range(n)])
    counts = torch.bincount(drawn, minlength=4).double()
    assert counts[1] == 0
    chi_square = float(((counts - n * p) ** 2 / (n * p))[[0, 2, 3]].sum())
    assert chi_square < 18.4  # p-value 1e-4 at two degrees of freedom
    assert not rng.bern(0.0) and rng.bern(1.0) and ns.Rng(7).choice(p) == ns.Rng(7).choice(p)


def test_a_uniform_of_exactly_zero_draws_nothing_impossible(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.zeros((), dtype=torch.float64))
    assert ns.Rng().choice(torch.tensor([0.0, 0.0, 1.0])) == 2 and not ns.Rng().bern(0.0)


def test_ngram_against_a_slow_twin():
    data, k = [1, 2, 3, 1, 2, 4, 1, 2, 3], 5.0
    model = ns.NGram(6, data, order=3, k=k)

    def slow(context, x, n):
        if n == 1:
            pairs = [(a, b) for a, b in zip(data, data[1:]) if a == context[-1]]
            return (sum(b == x for _, b in pairs) + 1 / 6) / (len(pairs) + 1)
        after = [data[i] for i in range(n, len(data)) if data[i - n:i] == context[-n:]]
        return (after.count(x) + k * slow(context, x, n - 1)) / (len(after) + k)
    for context in ([2, 3, 1], [9 - 4, 1, 2], [3, 1, 2]):
        law = model.law(context)
        assert float(law.sum()) == pytest.approx(1, abs=1e-6)
        assert [float(v) for v in law] == pytest.approx([slow(context, x, 3) for x in range(6)], abs=1e-6)
    before = model.law([1, 2, 3])[5]
    model.update([1, 2, 3, 5], 3, {})  # learns online
    assert model.law([1, 2, 3])[5] > before


def test_lookup_takes_the_most_recent_longest_match():
    out = [1, 2, 3, 9, 1, 2, 3, 4, 5, 1, 2, 3]
    assert ns.Lookup(3).propose(out, 2, None) == {(): (None, [4]), (4,): (None, [5])}
    assert ns.Lookup(3).propose([1, 2, 3], 2, None) == {}
    assert ns.Lookup(3).propose(out, 0, None) == {}


def test_a_draft_with_another_vocabulary_is_refused():
    with pytest.raises(ns.UserError, match="one tokenizer"):
        ns.speculate(ns.Table(3), ns.ChainDraft(ns.Table(4)), [0], ns.Rng(0), 3)


def test_images_survive_patching():
    images = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    patches = ns.patches_of(images)
    assert torch.equal(patches[0, 9], images[0, 4:8, 4:8].flatten().float())
    assert torch.equal(ns.images_of(torch.arange(192).view(3, 64), patches.flatten(0, 1)), images)


# ---------------------------------------------------------------------------------------------------------------------
# training, resume, command line
# ---------------------------------------------------------------------------------------------------------------------

TINY = ["--dim", "16", "--depth", "2", "--heads", "2", "--draft-dim", "16", "--exit", "1", "--medusa", "2", "--block", "32", "--batch", "2",
        "--steps", "6", "--draft-steps", "4", "--head-steps", "3", "--new", "8", "--prompts", "1", "--repeats", "1", "--device", "cpu"]


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("".join(f"line {i} of a book that counts its lines.\n" for i in range(400)), encoding="utf-8")
    return path


class Stopping:
    """Stands in for Interrupt: asks to stop from the n-th look on (two looks a step)."""

    def __init__(self, n):
        self.n = n

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    @property
    def asked(self):
        self.n -= 1
        return self.n <= 0


@pytest.mark.parametrize("looks", [5, 15])  # in the middle of the target, and of the draft
def test_resume_is_bit_identical(book, tmp_path, monkeypatch, looks):
    run = lambda out, *more: ns.main(["train", "--data", str(book), "--out", str(tmp_path / out), *TINY, *more])
    run("straight")
    with monkeypatch.context() as patch:
        patch.setattr(ns, "Interrupt", lambda: Stopping(looks))
        with pytest.raises(KeyboardInterrupt, match="resume"):
            run("broken")
    run("broken", "--resume")
    a, b = (ns.load_checkpoint(tmp_path / out / "best.pt") for out in ("straight", "broken"))
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"]) and a["nats"] == b["nats"]


def test_text_from_end_to_end(book, tmp_path, monkeypatch):
    monkeypatch.setattr(ns, "verify", lambda out: {"tv": {"GPT: chain": 0.0}})  # tested above
    metrics = ns.main(["--data", str(book), "--out", str(tmp_path / "run"), *TINY])
    assert metrics == json.loads((tmp_path / "run" / "metrics.json").read_text())
    rows = metrics["methods"]
    assert {"name", "task", "exact", "gamma", "alpha", "tau", "calls_per_token", "speedup", "predicted_speedup", "tv"} <= set(rows[0])
    assert all(1 <= r["tau"] <= r["gamma"] + 1 and r["tau"] * r["calls_per_token"] == pytest.approx(1) for r in rows)
    assert [r["exact"] for r in rows].count(False) == len({r["gamma"] for r in rows})
    for name in ("bench.png", "trace.png", "best.pt", "last.pt"):
        assert (tmp_path / "run" / name).stat().st_size > 1000
    assert ns.main(["sample", "--prompt", "line 7", "--out", str(tmp_path / "run")])["seed"] == 0
    with pytest.raises(ns.UserError, match="positions of the model"):
        ns.main(["sample", "--new", "5000", "--out", str(tmp_path / "run")])


def test_images_from_end_to_end(tmp_path, monkeypatch):
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (300,), generator=g)
    images = (torch.rand(300, 32, 32, generator=g) * 40).byte()
    for i, label in enumerate(labels):
        images[i, 8 * label:8 * label + 8] = 200
    import numpy as np
    np.savez(tmp_path / "set.npz", images=images.numpy(), labels=labels.numpy())
    monkeypatch.setattr(ns, "verify", lambda out: {"tv": {}})
    metrics = ns.main(["--task", "image", "--data", str(tmp_path / "set.npz"), "--out", str(tmp_path / "run"), "--codebook", "16", "--window", "4",
                       "--samples", "40", "--device", "cpu", *TINY[:12], "--batch", "2", "--steps", "4", "--draft-steps", "2"])
    rows = {r["name"]: r for r in metrics["methods"]}
    assert rows["plain"]["calls_per_image"] == 64 and rows["plain"]["exact"] and not rows["GSD, 4 codes"]["exact"]
    assert all(64 / 5 <= r["calls_per_image"] <= 64 for r in rows.values())
    assert (tmp_path / "run" / "images.png").exists()


@pytest.mark.parametrize("args, message", [
    (["--data", "nowhere.txt"], "nowhere.txt"),
    (["--dim", "30"], "multiples"),
    (["--gamma", "0"], "--gamma"),
    (["--task", "sound"], "task"),
    (["bench", "--out", "EMPTY"], "train first"),
])
def test_user_errors_are_one_line(args, message, tmp_path, monkeypatch, capsys):
    args = [str(tmp_path / "empty") if a == "EMPTY" else a for a in args]
    if "--out" not in args:
        args = ["train", *args, "--out", str(tmp_path / "o")] if args[0] != "bench" else args
    monkeypatch.setattr(sys, "argv", ["nano_spec.py", *args])
    assert ns.cli(ns.main) == 2
    error = capsys.readouterr().err
    assert error.startswith("nano_spec: error: ") and error.count("\n") == 1 and message in error


def test_a_loss_that_is_not_finite_stops_the_run(book, tmp_path, monkeypatch):
    monkeypatch.setattr(ns, "loss_of", lambda *_: torch.tensor(math.nan, requires_grad=True))
    with pytest.raises(ns.UserError, match="nan"):
        ns.main(["train", "--data", str(book), "--out", str(tmp_path / "o"), *TINY])
    assert not (tmp_path / "o" / "best.pt").exists()


def test_binary_data_is_refused(tmp_path):
    (tmp_path / "x.bin").write_bytes(bytes(range(256)) * 40)
    with pytest.raises(ns.UserError, match="UTF-8"):
        ns.load_text(str(tmp_path / "x.bin"))
