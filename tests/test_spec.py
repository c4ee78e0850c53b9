"""nano_spec against oracles: the enumeration and its mutants, and what enumeration cannot see (float32, training, commands)."""
import json
import math
import pathlib
from types import SimpleNamespace

import pytest
import torch

import kernels
import nano_spec
from nano_spec import (GPT, Dice, Jacobi, ModelDrafter, NGrams, StaleCache, Stream, Table, Watch, accept,
                       enumerate_outcomes, plain, residual, rng_at, speculate, tiny_gpt, total_variation)

FOLDER = pathlib.Path(nano_spec.__file__).parent
CASES = nano_spec.cases()
TINY = ("--data book.txt --dim 32 --depth 2 --draft-dim 32 --context 64 --batch 4 --new 12 --prompts 1 --repeats 1 "
        "--device cpu").split()


@pytest.fixture(scope="module", autouse=True)
def book(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "book.txt"
    path.write_text("".join(f"line {i} of a book that counts its lines.\n" for i in range(200)), encoding="utf-8")
    TINY[1] = str(path)


def dice(seed=0):
    return Dice(torch.Generator().manual_seed(seed))


def stopped(argv, capsys):
    """Run a command that must end as a user's mistake -> what it says."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        nano_spec.run_as_program(lambda: nano_spec.main(argv))
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("nano_spec: ") and said.count("\n") == 1, (argv, said)
    return said


# --- the proof -------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def proof():
    return nano_spec.prove(CASES, nano_spec.MUTANTS)


@pytest.mark.parametrize("name", CASES)
def test_the_law_of_every_decoder_is_exact(name, proof):
    assert proof[0][name] < 1e-12 and abs(sum(CASES[name][1]().values()) - 1) < 1e-12


@pytest.mark.parametrize("name", nano_spec.MUTANTS)
def test_every_mutant_is_caught(name, proof):
    assert proof[1][name] > 1e-4


def test_the_truth_runs_nothing_that_decodes(monkeypatch):
    """All truths are the same when everything that decoders call is gone; they share the layers and Table.law alone."""
    before = {name: truth() for name, (_, truth) in CASES.items()}
    for owner in (Dice, nano_spec.Replay, Stream, ModelDrafter, NGrams, Jacobi):
        for method in [name for name, value in vars(owner).items() if callable(value)]:
            monkeypatch.setattr(owner, method, None)
    monkeypatch.setattr(Table, "distributions", None)
    monkeypatch.setattr(GPT, "new_cache", None)
    for name in ("accept", "residual", "plain", "speculate", "warp"):
        monkeypatch.setattr(nano_spec, name, None)
    for name in ("decode_attention", "truncate", "sample", "verify"):
        monkeypatch.setattr(kernels, name, None)
    assert {name: truth() for name, (_, truth) in CASES.items()} == before
    with pytest.raises(TypeError):
        CASES["model"][0](None)


def test_prove_counts_no_crash_as_caught_and_leaves_everything_as_it_was(capsys):
    code, one = accept.__code__, {"model": CASES["model"]}
    with pytest.raises(ZeroDivisionError):
        nano_spec.prove(one, {"crash": (accept, "new = []", "new = [1 / 0]", "model")})
    for old in ("no such piece", "p"):                           # absent, and there many times
        with pytest.raises(ValueError, match="not once"):
            nano_spec.prove(one, {"x": (accept, old, "0", "model")})
    same = nano_spec.prove(one, {"nothing": (accept, "new = []", "new = list()", "model")})
    assert same[1]["nothing"] < 1e-12 and accept.__code__ is code


def test_enumeration_and_chain_rule_on_laws_known_by_hand():
    assert enumerate_outcomes(lambda d: d.coin(0.25) and d.coin(0.5)) == {False: 0.875, True: 0.125}
    two = enumerate_outcomes(lambda d: (d.choose([0.5, 0.0, 0.5]), d.choose([0.25, 0.75])))
    assert two == {(0, 0): 0.125, (0, 1): 0.375, (2, 0): 0.125, (2, 1): 0.375}
    assert nano_spec.chain_rule(lambda text: [0.25, 0.75] if text[-1] else [1, 0], [1], 2) == {
        (0, 0): 0.25, (1, 0): 0.1875, (1, 1): 0.5625}
    assert total_variation({0: 0.5, 1: 0.5}, {1: 1.0}) == 0.5


def test_a_stale_cache_is_noticed():
    for length in (2, 3):                                        # rows of another text; nothing left to read
        table = Table(3)
        table.distributions([0, 1, 2])
        table.length = length
        with pytest.raises(StaleCache):
            table.distributions([0, 2, 2])


def test_the_true_law_is_the_softmax_of_the_training_forward():
    model = tiny_gpt(4)
    wanted = model(torch.tensor([[0, 2, 1]]))[0, -1].div(0.7).softmax(-1)
    assert torch.allclose(nano_spec.truth_of(model, 0.7)([0, 2, 1]), wanted, atol=1e-15)
    cut = nano_spec.truth_of(model, 0.7, top_k=2)([0, 2, 1])
    wanted[wanted.argmin()] = 0                                  # of three, the two likeliest stay
    assert torch.allclose(cut, wanted / wanted.sum(), atol=1e-15)


# --- the rule --------------------------------------------------------------------------------------------
def laws(seed, V=6):
    return Table(V, 2 * seed).law([0]), Table(V, 2 * seed + 1).law([0])


def test_degenerate_laws():
    p, one = torch.tensor([0.2, 0.5, 0.3]).double(), torch.eye(3).double()
    assert all(accept([x], [p], torch.stack([p, one[0]]), dice(x)) == [x, 0] for x in range(3))  # p == q: always kept
    assert all(accept([1], [one[1]], one[:2], dice(i)) == [0] for i in range(9))  # disjoint: never, and no nan
    assert accept([], [], one[2:], dice()) == [2]
    assert residual(p, p).equal(p) and residual(one[0], p).equal(one[0])
    assert torch.allclose(residual(torch.tensor([.5, .3, .2]), torch.tensor([.7, .2, .1])), torch.tensor([0, .5, .5]))


@pytest.mark.parametrize("seed", range(5))
def test_acceptance_is_the_overlap(seed):
    p, q = laws(seed)

    def kept(d):
        return len(accept([d.choose(q)], [q], torch.stack([p, p]), d)) == 2
    assert enumerate_outcomes(kept)[True] == pytest.approx(float(torch.minimum(p, q).sum()), abs=1e-12)


class Given(Dice):
    """Coins with the given uniforms; a choice by the exponential race, as in kernels.verify."""

    def __init__(self, uniforms, noise):
        self.uniforms, self.noise = iter(uniforms.tolist()), noise

    def coin(self, a):
        return next(self.uniforms) < a

    def choose(self, p):
        return int((p / self.noise).argmax())


def test_accept_equals_the_operation_of_kernels():
    rng = torch.Generator().manual_seed(0)
    for g in (0, 1, 4):
        p, q = (torch.rand(50, n, 5, generator=rng).double() ** 3 for n in (g + 1, g))
        p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
        draft = torch.multinomial(q.flatten(0, 1), 1, generator=rng).view(50, g) if g else torch.zeros(50, 0).long()
        uniforms = torch.rand(50, g, generator=rng, dtype=torch.float64)
        noise = torch.empty(50, 5).exponential_(generator=rng)
        tokens, kept = kernels.verify(p, q, draft, uniforms, noise)
        for row in range(50):
            ours = accept(draft[row].tolist(), list(q[row]), p[row], Given(uniforms[row], noise[row]))
            assert ours == tokens[row, :kept[row] + 1].tolist()


def test_dice_draw_from_the_law():
    p, n, d = torch.tensor([0.5, 0.0, 0.3, 0.2]).double(), 20000, dice(1)
    counts = torch.bincount(torch.tensor([d.choose(p) for _ in range(n)]), minlength=4)
    assert counts[1] == 0 and not d.coin(0.0) and d.coin(1.0)
    assert float(((counts - n * p) ** 2 / (n * p))[[0, 2, 3]].sum()) < 18.4  # chi-square, 2 degrees: p-value 1e-4
    assert abs(sum(d.coin(0.3) for _ in range(n)) / n - 0.3) < 4 * math.sqrt(0.21 / n)


def test_a_uniform_of_exactly_zero_draws_nothing_impossible(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.zeros((), dtype=torch.float64))
    assert dice().choose(torch.tensor([0.0, 0.0, 1.0])) == 2 and not dice().coin(0.0)


# --- model, cache, greedy --------------------------------------------------------------------------------
def drafters(net, small, **settings):
    V = net.vocab
    known = NGrams(V).fit([1, 2, 3, 1, 2, 4, 1, 2, 3, 5, 6])
    return {"model": lambda: ModelDrafter(Stream(small, 64, **settings)), "n-grams": lambda: NGrams(V, known=known),
            "Jacobi": lambda: Jacobi(torch.full((V,), 1 / V).double()), "itself": lambda: ModelDrafter(Stream(net, 64, **settings))}


NET, SMALL = tiny_gpt(0, 11, 16, 3), tiny_gpt(1, 11, 16, 1)


def test_causality_and_the_training_forward_equals_the_cached_one():
    text = torch.randint(11, (1, 20), generator=rng_at(1))
    logits, changed = NET(text), text.clone()
    changed[0, 12:] = 0
    assert NET(changed)[0, :12].equal(logits[0, :12]) and not NET(changed)[0, 12].equal(logits[0, 12])
    stream = Stream(NET, 20)
    found = [stream.distributions(text[0, :5].tolist(), text[0, 5:9].tolist())]
    stream.length = 7                                            # two of the four drafts were kept
    found.append(stream.distributions(text[0, :9].tolist(), text[0, 9:].tolist()))
    assert (torch.cat(found) - torch.cat([logits[0, 4:9], logits[0, 8:]]).softmax(-1)).abs().max() < 1e-14


@pytest.mark.parametrize("name", drafters(NET, SMALL))
def test_after_every_rollback_the_cache_equals_a_fresh_one(name):
    target, checked, text = Stream(NET, 64), [], [1, 2, 3]
    drafter = drafters(NET, SMALL)[name]()

    def update(now, start, p, original=drafter.update):
        fresh = Stream(NET, 64)
        fresh.distributions(now[:-1])
        assert target.length == len(now) - 1 == fresh.length
        assert torch.allclose(target.cache[..., :fresh.length, :], fresh.cache[..., :fresh.length, :], atol=1e-12)
        checked.append(len(now) - start)
        original(now, start, p)
    drafter.update = update
    text, given = speculate(target, drafter, [1, 2, 3], 30, 4, dice(5))
    assert given == checked and sum(given) == 30 and len(text) == 33 and text[:3] == [1, 2, 3]


@pytest.mark.parametrize("name", drafters(NET, SMALL))
def test_greedy_text_is_the_greedy_text(name):
    """In float64 token for token. In float32 many rows at once round otherwise than one: only a near tie may differ."""
    for net, small in ((NET, SMALL), (tiny_gpt(0, 11, 16, 3).float(), tiny_gpt(1, 11, 16, 1).float())):
        for prompt in ([1, 2, 3], [7]):
            wanted = plain(Stream(net, 64, temperature=0), prompt, 24, dice())
            text, given = speculate(Stream(net, 64, temperature=0), drafters(net, small, temperature=0)[name](), prompt, 24, 4, dice())
            assert len(given) <= 24 and len(text) == len(wanted)
            first = next((i for i in range(len(text)) if text[i] != wanted[i]), None)
            if first is not None:
                top = net(torch.tensor([wanted[:first]]))[0, -1].topk(2).values
                assert net is not NET and top[0] - top[1] < 1e-4


def test_a_draft_equal_to_the_target_is_always_kept_and_its_cache_is_one_token_short():
    draft, fed = Stream(NET, 64), []
    original = draft.distributions

    def distributions(text, guesses=()):
        fed.append(len(text) - draft.length)
        return original(text, guesses)
    draft.distributions = distributions
    _, given = speculate(Stream(NET, 64), ModelDrafter(draft), [1], 25, 4, dice())
    assert given == [5] * 5 and fed[4::4] == [2] * 4             # nobody has fed it the last guess and the bonus


def test_no_token_beyond_the_end_and_none_for_nothing():
    for n in (0, 1, 2, 7):
        text, given = speculate(Stream(NET, 64), NGrams(11), [1, 2], n, 4, dice())
        assert len(text) == 2 + n and sum(given) == n
        assert len(plain(Stream(NET, 64), [1, 2], n, dice())) == 2 + n
    with pytest.raises(ValueError, match="positions"):
        Stream(NET, 65)


def test_warp_comes_before_everything():
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()
    assert nano_spec.warp(logits, temperature=0).tolist() == [1, 0, 0, 0]
    assert torch.allclose(nano_spec.warp(logits, 0.5), logits.exp().double() ** 2 / (logits.exp().double() ** 2).sum())
    for settings in (dict(top_k=2), dict(top_p=0.6)):
        assert torch.allclose(nano_spec.warp(logits, **settings), torch.tensor([2 / 3, 1 / 3, 0, 0]).double())
    text, _ = speculate(Stream(NET, 64, top_k=2), ModelDrafter(Stream(SMALL, 64)), [1], 40, 3, dice())  # draft: not cut
    assert all(nano_spec.truth_of(NET, top_k=2)(text[:i])[text[i]] > 0 for i in range(1, 41))


# --- drafters --------------------------------------------------------------------------------------------
def test_ngrams_against_a_slow_twin():
    data = [1, 2, 3, 1, 2, 4, 1, 2, 3]

    def slow(context, x):
        if len(context) == 1:
            pairs = [b for a, b in zip(data, data[1:]) if a == context[-1]]
            return (pairs.count(x) + 1 / 6) / (len(pairs) + 1)
        after = [data[i] for i in range(len(context), len(data)) if data[i - len(context):i] == context]
        kinds = 4 * len(set(after))
        shorter = slow(context[1:], x)
        return (after.count(x) + kinds * shorter) / (len(after) + kinds) if after else shorter
    model = NGrams(6, 3).fit(data)
    for context in ([2, 3, 1], [5, 1, 2], [3, 1, 2], [0, 0, 0], [4]):
        assert model.distribution(context).tolist() == pytest.approx([slow(context, x) for x in range(6)], abs=1e-12)


def test_ngrams_learn_what_is_written_and_leave_the_known_alone():
    known = NGrams(7, 3).fit([1, 2, 3, 1, 2, 4])
    before, fresh = json.dumps(str(known.counts)), NGrams(7, 3, known)
    text = [1, 2, 5]
    for new in ([6], [1, 2, 5, 6], [3]):                         # as calls give them
        text = text + new
        fresh.update(text, len(text) - len(new), None)
    slow = {}
    for n in (2, 3):
        for i in range(max(n, 3), len(text)):
            slow.setdefault(tuple(text[i - n:i]), []).append(text[i])
    assert {c: sorted(f) for c, f in slow.items()} == {
        c: sorted(x for x, k in f.items() for _ in range(k)) for c, f in fresh.counts.items()}
    assert json.dumps(str(known.counts)) == before
    assert fresh.distribution([1, 2, 5])[6] > known.distribution([1, 2, 5])[6]


def test_jacobi_guesses_from_the_last_call():
    flat, p = torch.full((3,), 1 / 3), torch.eye(3).double()
    jacobi = Jacobi(flat)
    jacobi.update([0, 0, 1], 2, p)                               # p[0] was for position 2, now written
    draft, q = jacobi.propose([0, 0, 1], 3, dice())
    assert draft[:2] == [1, 2] and q[0].equal(p[1]) and q[1].equal(p[2]) and q[2] is flat
    calls = len(speculate(Stream(NET, 64, temperature=0), Jacobi(torch.full((11,), 1 / 11)), [1], 8, 8, dice())[1])
    assert calls <= 8


# --- prediction ------------------------------------------------------------------------------------------
def test_expected_tokens():
    assert nano_spec.expected_tokens([]) == 1 and nano_spec.expected_tokens([1.0] * 4) == 5
    assert nano_spec.expected_tokens([0.8] * 3) == pytest.approx((1 - 0.8 ** 4) / (1 - 0.8))  # eq. 1 of the paper
    assert nano_spec.expected_tokens([0.5, 0.2]) == pytest.approx(1.6)


def test_watched_acceptance_predicts_the_tokens_per_call():
    """By place it predicts what a count finds; acceptance at the first place alone, as in eq. 1, need not."""
    watch, given = Watch(None, 3), []
    for seed in range(300):
        watch.drafter = ModelDrafter(Table(4, seed + 500))
        given += speculate(Table(4, seed), watch, [0], 4, 3, dice(seed))[1]
    assert watch.calls == len(given) and nano_spec.expected_tokens(watch.alphas()) > 1.5
    kept = sum(count - 1 for count in given)
    assert sum(watch.overlap) == pytest.approx(kept, rel=0.1)


def test_watch_counts_the_places_looked_at():
    p, q = laws(0)
    watch = Watch(SimpleNamespace(propose=lambda *_: ([1, 2], [q, p]), update=lambda *_: None), 3)
    for new in ([1, 2, 0], [1, 5], [4]):                         # both kept, one kept, none kept
        watch.propose([0], 2, None)
        watch.update([0, *new], 1, torch.stack([p, q, p]))
    overlap = float(torch.minimum(p, q).sum())
    assert watch.looks == [3, 2, 0] and watch.alphas() == pytest.approx([overlap, overlap, 0.0]) and watch.calls == 3


# --- training, commands ----------------------------------------------------------------------------------
def test_the_first_loss_is_log_v_and_both_models_learn():
    torch.manual_seed(0)
    tokens = torch.randint(5, (8, 17), generator=rng_at(3))
    models = torch.nn.ModuleDict({"target": GPT(5, 16, 32, 2, 1), "draft": GPT(5, 16, 32, 1, 1)})
    for model in models.values():
        assert nano_spec.loss_of(model, tokens).item() == pytest.approx(math.log(5), abs=1e-6)
    config = SimpleNamespace(steps=60, batch=8, lr=0.02, seed=0)
    history = nano_spec.train(config, models, SimpleNamespace(train=tokens, test=tokens))
    assert [h["step"] for h in history] == [20, 40, 60] and history[-1]["target"] < 0.8 and history[-1]["draft"] < 1.4
    for name, model in models.items():
        wanted = -model(tokens[:, :-1]).log_softmax(-1).gather(-1, tokens[:, 1:, None]).mean()
        assert history[-1][name] == pytest.approx(wanted.item(), abs=1e-6)


def test_windows_and_text(capsys):
    assert nano_spec.windows(torch.arange(10), 3, 2).tolist() == [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7], [6, 7, 8, 9]]
    train, test = nano_spec.load_text(TINY[1])
    whole = pathlib.Path(TINY[1]).read_bytes()
    assert bytes(train.tolist()) + bytes(test.tolist()) == whole and len(train) == len(whole) * 9 // 10


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:                  # the proof has its own tests above
        patch.setattr(nano_spec, "cases", lambda: {})
        patch.setattr(nano_spec, "MUTANTS", {})
        return out, nano_spec.main(["--steps", "3", "--out", str(out), *TINY])


def test_main_writes_everything(finished):
    out, metrics = finished
    assert {path.name for path in out.iterdir()} == {"last.pt", "trace.png", "metrics.json"}
    assert json.loads((out / "metrics.json").read_text()) == metrics
    assert metrics["device"] == "cpu" and metrics["seed"] == 0 and metrics["seconds"] > 0
    assert len(metrics["methods"]) == 4 * len(nano_spec.GAMMAS)
    for m in metrics["methods"]:
        assert m["exact"] and 1 <= m["tau"] <= m["gamma"] + 1 and len(m["alphas"]) == m["gamma"]
        assert all(math.isfinite(m[name]) for name in ("alpha", "speedup", "predicted_speedup", "predicted_tau"))
        assert m["tv"] < 1e-12                                   # the trained models, 256 bytes, top-k 2
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    nano_spec.main(["sample", "--out", str(out), "--device", "cpu", "--prompt", "line 7", "--gamma", "2"])
    assert torch.get_num_threads() == 2                          # one while it wrote
    torch.set_num_threads(threads)


def test_usual_mistakes_cost_one_line_and_nothing_else(finished, tmp_path, capsys):
    before = {path: path.read_bytes() for path in finished[0].iterdir()}
    (tmp_path / "short.txt").write_text("too short")
    for said, argv in {"--gama": ["--gama=3"], "multiples of 32": ["--dim", "48"], "missing.txt": ["--data", "missing.txt"],
                       "less than": ["--data", str(tmp_path / "short.txt")], "--context 64": ["--context", "64"],
                       "--dim 64": ["--resume", "--dim", "64"], "exceed --context": ["sample", "--prompt", "x" * 200],
                       "train first": ["bench", "--out", str(tmp_path / "new")]}.items():
        assert said in stopped(["--out", str(finished[0]), *argv], capsys), argv
    assert before == {path: path.read_bytes() for path in finished[0].iterdir()}
