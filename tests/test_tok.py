"""nano_tok against oracles: pairs counted anew, slow twins in float64, closed forms."""
import collections
import doctest
import json
import math
import pathlib
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn

import nano_ar
import nano_tok
from nano_tok import BPE, FSQ, Queries, Reader, Residual, VectorQuantizer, decode, encode, train_bpe

FOLDER = pathlib.Path(nano_tok.__file__).parent
TINY = "--data toy.npz --width 16 --codebook 16 --batch 8 --device cpu --vocab 300".split()


@pytest.fixture(scope="module", autouse=True)
def toy_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    TINY[1] = str(folder / "toy.npz")
    images, labels = nano_tok.glyphs(100, 0)
    np.savez(TINY[1], images=images, labels=labels)
    (folder / "toy.txt").write_bytes(b"to be or not to be, that is the question. " * 20)
    TINY[10:] = ["--text", str(folder / "toy.txt")]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def stopped(argv, capsys):
    """Run a command that must end as a user's mistake -> what it says."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        nano_tok.run_as_program(lambda: nano_tok.main(argv))
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("nano_tok: ") and said.count("\n") == 1, (argv, said)
    return said


# --- text ------------------------------------------------------------------------------------------------
def slow_merge(ids, pair, new):
    out, i = [], 0
    while i < len(ids):
        fits = tuple(ids[i:i + 2]) == pair
        out.append(new if fits else ids[i])
        i += 2 if fits else 1
    return out


def slow_train(text, vocab):
    """Byte pair encoding by its definition: all chunks, and all pairs counted anew before every merge."""
    chunks, merges = [list(chunk) for chunk in re.findall(nano_tok.CHUNKS, text)], []
    while len(merges) < vocab - 256:
        counts = collections.Counter(pair for chunk in chunks for pair in zip(chunk, chunk[1:]))
        if not counts or max(counts.values()) < 2:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        chunks = [slow_merge(chunk, best, 256 + len(merges)) for chunk in chunks]
        merges.append(best)
    return merges


def slow_encode(text, merges):
    """Every merge in the order in which it was learned, over every chunk."""
    out = []
    for chunk in re.findall(nano_tok.CHUNKS, text):
        ids = list(chunk)
        for i, pair in enumerate(merges):
            ids = slow_merge(ids, pair, 256 + i)
        out += ids
    return out


@pytest.mark.parametrize("chunks", [nano_tok.CHUNKS, rb"(?s:.+)"])
def test_bpe_equals_its_definition(chunks, monkeypatch):
    """On random texts of three alphabets, one with long runs of a letter (overlaps), and on a text of 10 KB."""
    monkeypatch.setattr(nano_tok, "CHUNKS", chunks)
    for seed in range(9):
        rng = np.random.default_rng(seed)
        alphabet = [b"a", b"ab ", b"aab \n\n  1a"][seed % 3]
        text, other = (bytes(rng.choice(list(alphabet), int(rng.integers(50, 600))).tolist()) for _ in range(2))
        merges = train_bpe(text, 290)
        assert merges == slow_train(text, 290)
        for sample in (text, other, text[7:] + other, b"", b"a"):
            assert BPE(merges).encode(sample) == slow_encode(sample, merges)
            assert BPE(merges).decode(BPE(merges).encode(sample)) == sample
    text = nano_tok.load_text("pydoc")[:10_000]
    assert train_bpe(text, 300) == slow_train(text, 300)


def test_worked_examples():
    """aaabdaaabac: aa is Z, ab is Y, ZY is X gives XdXac (en.wikipedia.org/wiki/Byte_pair_encoding)."""
    X, Y, Z = 258, 257, 256
    assert train_bpe(b"aaabdaaabac", 300) == [(97, 97), (97, 98), (Z, Y)]
    assert BPE([(97, 97), (97, 98), (Z, Y)]).encode(b"aaabdaaabac") == [X, 100, X, 97, 99]
    # the merge learned first, not the longest token that fits: a bc, and not ab c
    assert BPE([(98, 99), (97, 98), (97, 256)]).encode(b"abc ab") == [258, 32, 257]
    runner = doctest.DocTestRunner()
    for test in doctest.DocTestFinder().find(nano_tok, globs=vars(nano_tok)):
        runner.run(test)
    assert runner.failures == 0 and runner.tries >= 1


def test_bpe_gives_back_any_bytes_and_keeps_merges_inside_chunks():
    rng, text = np.random.default_rng(0), nano_tok.load_text("pydoc")[:30_000]
    bpe = BPE(train_bpe(text, 500))
    assert len(bpe.bytes) == 500 and len(bpe.encode(text)) < 0.6 * len(text)
    for n in (0, 1, 2, 17, 1000):
        for alphabet in (range(256), list(b" \n\t\0a\xff'1")):
            sample = bytes(rng.choice(alphabet, n).tolist())
            assert b"".join(re.findall(nano_tok.CHUNKS, sample)) == sample
            assert bpe.decode(bpe.encode(sample)) == sample
    assert bpe.decode(bpe.encode("naïve 漢字 🙂".encode())).decode() == "naïve 漢字 🙂"
    assert all(re.fullmatch(nano_tok.CHUNKS, token) for token in bpe.bytes)
    assert re.findall(nano_tok.CHUNKS, b"I'm 42 years, ok") == [b"I", b"'", b"m", b" 42", b" years", b",", b" ok"]


# --- quantizers ------------------------------------------------------------------------------------------
def test_straight_through_gradient_by_hand():
    """d/dz of w . q + mean |z - c|^2 is w + 2 (z - c) / numbers in z."""
    vq = VectorQuantizer(4, 2).eval()
    vq.codes.copy_(torch.tensor([[[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]]))
    z, w = torch.tensor([[[0.9, 0.2], [0.1, 0.3]]], requires_grad=True), torch.tensor([[[3.0, -1.0], [2.0, 5.0]]])
    q, index, loss = vq(z)
    c = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    assert index.tolist() == [[[1], [0]]] and q.equal(c)
    ((w * q).sum() + loss).backward()
    torch.testing.assert_close(z.grad, w + 2 * (z.detach() - c) / 4)
    torch.testing.assert_close(loss.detach(), (z.detach() - c).square().mean())


def test_residual_quantizer_equals_a_loop():
    z, codes = torch.randn(50, 3, generator=seeded(0)), torch.randn(3, 8, 3, generator=seeded(1))
    index, sums = nano_tok.residual_quantize(z, codes)
    rest = z.clone()
    for d in range(3):
        nearest = (rest[:, None] - codes[d]).square().sum(-1).argmin(1)
        assert index[:, d].equal(nearest)
        rest = rest - codes[d][nearest]
        torch.testing.assert_close(sums[d], z - rest)
    rvq = VectorQuantizer(8, 3, depth=3).eval()
    rvq.codes.copy_(codes)
    q, index, loss = rvq(z.view(10, 5, 3))
    torch.testing.assert_close(q, (z - rest).view(10, 5, 3))
    torch.testing.assert_close(rvq.lookup(index), q)
    torch.testing.assert_close(loss, (z - sums).square().mean())  # over all partial sums
    example = nano_tok.residual_quantize(torch.tensor([[5.2]]), torch.tensor([[[0.0], [4.0]], [[0.0], [1.0]]]))
    assert example[0].tolist() == [[1, 1]] and example[1].flatten().tolist() == [4, 5]


def test_running_means_against_a_float64_loop():
    vq, rng = VectorQuantizer(4, 3, depth=2, decay=0.9, restart=0), seeded(0)
    vq(torch.randn(2, 16, 3, generator=rng), rng)
    count, total = vq.count.double(), vq.total.double()
    for _ in range(3):
        z, codes = torch.randn(2, 16, 3, generator=rng), vq.codes.double()
        vq(z, rng)
        number, sums = torch.zeros(2, 4).double(), torch.zeros(2, 4, 3).double()
        for v in z.double().flatten(0, 1):
            for d in range(2):
                i = (v - codes[d]).square().sum(1).argmin()
                number[d, i] += 1
                sums[d, i] += v
                v = v - codes[d, i]
        count, total = 0.9 * count + 0.1 * number, 0.9 * total + 0.1 * sums
        torch.testing.assert_close(vq.codes.double(), total / count[..., None], rtol=1e-4, atol=1e-5)


def test_a_fresh_codebook_is_not_declared_dead():
    """All codes start with a fair count, on different vectors; the first update restarts none that is used."""
    vq, z = VectorQuantizer(64, 2, depth=2), torch.randn(4, 256, 2, generator=seeded(0))
    vq.start(z.flatten(0, 1), seeded(1))
    start = vq.codes.clone()
    assert (vq.count == 1024 / 64).all() and len(start[0].unique(dim=0)) == 64
    torch.testing.assert_close(vq.total, start * 16)
    index = nano_tok.residual_quantize(z.flatten(0, 1), start)[0]
    number = torch.bincount(index[:, 0], minlength=64)
    vq(z, seeded(2))
    # count is now .95 * 16 + .05 * number: no code can have fallen below a twentieth of 16
    torch.testing.assert_close(vq.count[0], 0.95 * 16 + 0.05 * number)
    # vectors far apart get codes of their own, however many lie in one place
    z = torch.cat([torch.zeros(900, 2), 10 * torch.randn(100, 2, generator=seeded(3))])
    vq = VectorQuantizer(32, 2)
    vq.start(z, seeded(4))
    assert (vq.codes[0].norm(dim=1) > 1).sum() > 24


def test_a_collapsed_codebook_is_revived_by_restarts():
    z = torch.randn(4, 256, 2, generator=seeded(0))

    def share_used(restart):
        vq, rng = VectorQuantizer(32, 2, restart=restart), seeded(1)
        vq.codes.fill_(50.0)                                     # all in one far corner, but for one
        vq.codes[0, 0] = 0
        vq.count.fill_(32.0)
        vq.total.copy_(vq.codes * 32)
        for _ in range(100):
            index = vq(z, rng)[1]
        return nano_tok.usage(index, 32)[0]

    assert share_used(restart=0.0) <= 2 / 32 and share_used(restart=0.05) == 1


def test_badly_coded_points_are_drawn_in_proportion_to_their_error():
    distance, counts = torch.tensor([0.0, 1.0, 2.0, 5.0]), torch.zeros(4)
    for seed in range(2000):
        counts[nano_tok.draw_badly_coded(distance, 1, seeded(seed))] += 1
    assert counts[0] == 0 and (counts / 2000 - distance / 8).abs().max() < 0.04  # 3.5 standard deviations
    assert sorted(nano_tok.draw_badly_coded(torch.ones(5), 5, seeded(0)).tolist()) == [0, 1, 2, 3, 4]
    assert len(nano_tok.draw_badly_coded(torch.zeros(3), 8, seeded(0))) == 8


def test_every_codebook_of_rvq_lowers_the_error():
    rvq, z, rng = VectorQuantizer(16, 4, depth=4), torch.randn(8, 64, 4, generator=seeded(0)), seeded(1)
    for _ in range(20):
        rvq(z, rng)
    _, sums = nano_tok.residual_quantize(z.flatten(0, 1), rvq.codes)
    errors = [1.0, *((z.flatten(0, 1) - q).square().mean().item() for q in sums)]
    assert all(after < 0.7 * before for before, after in zip(errors, errors[1:]))


@pytest.mark.parametrize("levels", [[3], [4, 3], [8, 6, 5], [7, 5, 5]])
def test_fsq_reaches_every_level_and_its_index_is_a_number_of_mixed_base(levels):
    fsq = FSQ(levels)
    assert (fsq.size, fsq.dim, fsq.depth) == (math.prod(levels), len(levels), 1)
    sweep = torch.linspace(-40, 40, 8001)[:, None].expand(-1, len(levels))
    rounded = fsq.bound(sweep).round()
    for c, L in enumerate(levels):
        assert rounded[:, c].unique().tolist() == list(range(-(L // 2), L - L // 2))
    assert fsq.bound(torch.zeros(len(levels))).abs().max() < 1e-6  # the shift of even L leaves 0 at 0
    codes = fsq.lookup(torch.arange(fsq.size)[:, None])
    for i, code in enumerate(codes):
        by_hand = [(i // math.prod(levels[:c]) % L - L // 2) / (L // 2) for c, L in enumerate(levels)]
        torch.testing.assert_close(code, torch.tensor(by_hand))
    z = torch.randn(3, 50, len(levels), generator=seeded(0)).requires_grad_()
    q, index, loss = fsq(z)
    torch.testing.assert_close(fsq.lookup(index), q)
    assert loss == 0 and (z.detach() * q.detach()).sum() > 0
    q.sum().backward()                                           # the slope of bound, as if nothing was rounded
    x = z.detach().requires_grad_()
    (fsq.bound(x) / torch.tensor([L // 2 for L in levels])).sum().backward()
    torch.testing.assert_close(z.grad, x.grad)


def test_usage_and_psnr_closed_forms():
    assert nano_tok.usage(torch.tensor([3, 3, 3]), 4) == (0.25, 1.0)
    share, perplexity = nano_tok.usage(torch.tensor([0, 0, 1, 1, 2, 3]), 8)  # p = 1/3, 1/3, 1/6, 1/6
    assert share == 0.5 and math.isclose(perplexity, 3 ** (2 / 3) * 6 ** (1 / 3), rel_tol=1e-9)
    black = torch.zeros(2, 32, 32, dtype=torch.uint8)
    assert math.isclose(nano_tok.psnr(black, black + 51), 20 * math.log10(5), rel_tol=1e-5)


# --- model -----------------------------------------------------------------------------------------------
KINDS = [("vq", 0), ("rvq", 0), ("fsq", 0), ("vq", 4), ("rvq", 4), ("fsq", 4)]


def tiny(quantizer="vq", queries=0):
    """A small tokenizer with random numbers where layers start at zero: zeros hide errors."""
    argv = f"--width 16 --codebook 16 --quantizer {quantizer} --queries {queries}".split()
    model = nano_tok.build(nano_tok.read_settings(argv)[1])
    for p in model.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.2)
    return model


def noise(n, seed=0):
    return torch.randint(256, (n, 32, 32), generator=seeded(seed), dtype=torch.uint8)


@pytest.mark.parametrize("kind", KINDS)
def test_the_training_forward_is_encode_then_decode(kind):
    model, images = tiny(*kind), noise(6)
    model(images / 255, seeded(0))                               # starts the codebook
    model.eval().nested = False
    tokens = encode(images, model)
    T, D, V = kind[1] or 64, model.quantizer.depth, model.quantizer.size
    assert tokens.shape == (6, T * D) and 0 <= tokens.min() and tokens.max() < D * V
    assert (tokens // V).equal(torch.arange(T * D).expand(6, -1) % D)    # codebook d: from d V on
    rebuilt, index, _ = model(images / 255, None)
    assert index.equal((tokens % V).view(6, T, D)) and len(index.unique()) > 1
    assert (rebuilt.clamp(0, 1) * 255 - decode(tokens, model)).abs().max() < 0.51
    assert decode(tokens, model, nano_tok.prefixes(model)[-1]).equal(decode(tokens, model))


@pytest.mark.parametrize("queries, over", [(0, (0, 1)), (4, 0)])
def test_latents_have_mean_0_and_variance_1(queries, over):
    """Over all cells of a batch; with queries for each token by itself. In use an image does not see the others."""
    model, images = tiny("fsq", queries), nano_tok.glyphs(40, 0)[0] / 255
    for _ in range(200):                                         # until the running averages have forgotten 0 and 1
        z = model.latents(images).detach()
    torch.testing.assert_close(z.mean(over), torch.zeros_like(z.mean(over)), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.var(over, correction=0), torch.ones_like(z.mean(over)), atol=0.1, rtol=0)
    model.eval()
    torch.testing.assert_close(model.latents(images[:2]), model.latents(images)[:2])
    torch.testing.assert_close(model.latents(images), z, atol=0.1, rtol=0)


@pytest.mark.parametrize("quantizer", ["vq", "fsq"])
def test_every_prefix_of_queries_decodes_and_ignores_the_tail(quantizer):
    model = tiny(quantizer, 4).eval()
    if quantizer == "vq":
        nn.init.normal_(model.quantizer.codes)
    tokens, pictures = torch.randint(model.quantizer.size, (3, 4), generator=seeded(0)), []
    assert nano_tok.prefixes(model) == [1, 2, 4] and nano_tok.prefixes(tiny("vq", 6)) == [1, 2, 4, 6]
    for n in (1, 2, 3, 4):
        other = tokens.clone()
        other[:, n:] = torch.randint(model.quantizer.size, other[:, n:].shape, generator=seeded(n))
        pictures.append(decode(tokens, model, n))
        assert pictures[-1].equal(decode(other, model, n))
    assert all(not a.equal(b) for a, b in zip(pictures, pictures[1:]))


def test_a_prefix_of_rvq_is_the_sum_of_the_first_codebooks():
    model = tiny("rvq").eval()
    nn.init.normal_(model.quantizer.codes)
    index = torch.randint(16, (2, 64, 2), generator=seeded(0))
    tokens = (index + torch.tensor([0, 16])).flatten(1)
    for n, q in ((1, model.quantizer.codes[0][index[..., 0]]), (2, model.quantizer.lookup(index))):
        assert decode(tokens, model, n).equal((model.rebuild(q).clamp(0, 1) * 255).round().byte())
    assert nano_tok.prefixes(model) == [1, 2]


def test_lengths_in_nested_dropout(monkeypatch):
    """Three images in four keep all 4 tokens, the others 1 .. 4, and the tail reaches the decoder as zeros."""
    kept, true = [], nano_tok.keep_prefix
    monkeypatch.setattr(nano_tok, "keep_prefix", lambda x, keep: kept.append(keep) or true(x, keep))
    model = tiny("fsq", 4)
    for seed in range(10):
        model(torch.zeros(160, 32, 32), seeded(seed))
    share = torch.bincount(torch.cat(kept), minlength=5) / 1600
    assert share[0] == 0 and (share[1:4] - 1 / 16).abs().max() < 0.025 and abs(share[4] - 13 / 16) < 0.04
    q = true(torch.ones(2, 3, 5), torch.tensor([1, 3]))
    assert q.sum((1, 2)).tolist() == [5, 15] and (q[0, 0] == 1).all()
    average = torch.zeros(1, 4, model.quantizer.dim)             # an average token is there: not as one that is cut
    assert not torch.allclose(model.rebuild(average), model.rebuild(average, torch.tensor([1])))


def test_attention_of_a_reader_equals_a_loop_in_float64():
    torch.manual_seed(0)
    reader = Reader(32).double()
    x, memory, rows = torch.randn(2, 5, 32).double(), torch.randn(2, 3, 32).double(), []
    for queries, inputs in zip(x, memory):
        k, v = reader.kv(nano_tok.norm(inputs)).chunk(2, -1)
        for query in queries:
            q, parts = reader.q(nano_tok.norm(query)), []
            for head in (slice(0, 16), slice(16, 32)):
                scores = torch.stack([nano_tok.norm(q[head]) @ nano_tok.norm(k[j, head]) / 2 for j in range(3)])
                parts.append(scores.softmax(0) @ v[:, head])
            rows.append(query + reader.proj(torch.cat(parts)))
    torch.testing.assert_close(reader(x, memory).flatten(0, 1), torch.stack(rows))  # the mlp starts as zero


def test_queries_read_a_set_and_no_query_reads_another():
    """Inputs swapped with their places change nothing; an output is the same whichever queries stand beside it."""
    torch.manual_seed(0)
    queries, other, x = Queries(6, 4, 16, blocks=2), Queries(6, 2, 16, blocks=2), torch.randn(2, 6, 16)
    for block in queries.blocks:
        nn.init.normal_(block.down.weight, std=0.1)
    y, order = queries(x), torch.tensor([3, 1, 5, 0, 2, 4])
    assert y.shape == (2, 4, 16) and not torch.allclose(y[0], y[1])
    changed = {"places": queries.places[order], "queries": queries.queries[[3, 1]]}
    other.load_state_dict(queries.state_dict() | changed)
    torch.testing.assert_close(other(x[:, order]), y[:, [3, 1]])
    assert not torch.allclose(queries(x[:, order]), y, atol=1e-3)  # but it does matter where an input stands


def test_a_residual_block_is_the_identity_at_first_and_two_convolutions_then():
    torch.manual_seed(0)
    block, x = Residual(16), torch.randn(2, 16, 8, 8)
    assert block(x).equal(x)
    nn.init.normal_(block.second)
    first, second = (nn.Conv2d(16, 16, 3, padding=1, bias=False) for _ in range(2))
    first.weight.data, second.weight.data = block.first.view(16, 16, 3, 3), block.second.view(16, 16, 3, 3)
    torch.testing.assert_close(block(x), x + second(first(x.relu()).relu()))


# --- training --------------------------------------------------------------------------------------------
def settings(**changed):
    return SimpleNamespace(**{"seed": 0, "lr": 0.02, "steps": 100, "batch": 8, **changed})


def few_images(n=8):
    images, labels = nano_tok.glyphs(n, 0)
    return SimpleNamespace(train_images=images, train_labels=labels, test_images=images, test_labels=labels,
                           classes=10)


@pytest.mark.parametrize("kind", [("vq", 0), ("fsq", 0), ("vq", 4)])
def test_learns_eight_images(kind):
    """The whole path learns: 512 bits, 506 and 16 bits for each of eight images."""
    model, data = tiny(*kind), few_images()
    before = nano_tok.psnr(data.train_images.float().mean(0).expand(8, -1, -1), data.train_images)
    history = nano_tok.train(settings(), model.eval(), data)   # train sets the mode itself
    assert [entry["step"] for entry in history] == [20, 40, 60, 80, 100] and not model.training
    assert history[-1]["rpsnr"] > before + 3, (before, history)
    assert history[-1]["error"] < 0.3 < history[0]["error"]


def test_what_a_training_step_moves(tmp_path):
    """Each parameter has one optimizer, Muon those of the blocks; the codes have none; rates fall to 0 on a line."""
    for kind in (("rvq", 0), ("vq", 4)):
        model = tiny(*kind)
        optimizers = nano_tok.make_optimizers(model, settings(), torch.float32)
        muon, adam = (optimizer.param_groups[0]["params"] for optimizer in optimizers)
        inside = {name for name, p in model.named_parameters() if any(p is q for q in muon)}
        assert inside == {name for name, _ in model.named_parameters() if re.search(r"coder\.0|blocks", name)}
        assert sorted(id(p) for p in muon + adam) == sorted(id(p) for p in model.parameters())
        assert not any("quantizer" in name for name, _ in model.named_parameters())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    nano_tok.train(settings(lr=1e-3, steps=10), model, few_images(), path=tmp_path / "a.pt")
    assert not [name for name, value in model.state_dict().items() if value.equal(before[name])]
    rates = [saved["param_groups"][0]["lr"] for saved in torch.load(tmp_path / "a.pt")["optimizers"]]
    torch.testing.assert_close(rates, [1e-4, 0.5e-4], rtol=1e-9, atol=0)


# --- settings, main, export ------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    return out, nano_tok.main(["--steps", "3", "--queries", "4", "--out", str(out), *TINY])


def test_main_writes_everything(trained):
    out, metrics = trained
    assert {path.name for path in out.iterdir()} == {"last.pt", "tokens.npz", "bpe.json", "metrics.json",
                                                     "reconstructions.png"}
    assert json.loads((out / "metrics.json").read_text()) == metrics
    names = """seconds params seed rpsnr usage perplexity bits_per_image tokens_per_image mean_image_psnr
        images_per_second bpe_vocab bpe_train_seconds bpe_mb_per_second bpe_bytes_per_token""".split()
    assert all(math.isfinite(metrics[name]) for name in names) and metrics["device"] == "cpu"
    assert (metrics["bits_per_image"], metrics["tokens_per_image"]) == (16, 4)
    assert list(metrics["prefix_psnr"]) == ["1", "2", "4"] and metrics["prefix_psnr"]["4"] == metrics["rpsnr"]


def test_eval_and_a_second_run_give_the_same_metrics(trained, tmp_path):
    again = nano_tok.main(["--steps", "3", "--queries", "4", "--out", str(tmp_path), *TINY])
    (tmp_path / "tokens.npz").unlink()
    alone = nano_tok.main(["eval", "--out", str(tmp_path), "--device", "cpu"])
    assert set(again) - set(alone) == {"images_per_second", *(name for name in again if name.startswith("bpe"))}
    for name in set(alone) - {"seconds"}:
        assert alone[name] == again[name] == trained[1][name], name
    first, second = (np.load(folder / "tokens.npz") for folder in (trained[0], tmp_path))
    assert all(first[name].tolist() == second[name].tolist() for name in first)


@pytest.mark.parametrize("kind", [("rvq", 0), ("fsq", 4)])
def test_nano_ar_takes_the_tokens(kind):
    """Two steps of its training, four images drawn and decoded; the arrays are those of encode."""
    model, data = tiny(*kind), few_images(16)
    model(data.train_images / 255, seeded(0))
    tokens = nano_tok.export(model.eval(), data)
    assert tokens.train_tokens.equal(encode(data.train_images, model)) and tokens.classes == 10
    assert tokens.decode(tokens.test_tokens).equal(decode(tokens.test_tokens, model))
    assert tokens.rows * tokens.columns == tokens.train_tokens.shape[1]
    assert tokens.train_tokens.max() < tokens.codebook_size == model.quantizer.depth * model.quantizer.size
    gpt = nano_ar.GPT(tokens.codebook_size, 10, tokens.rows, tokens.columns, 32, 1, 1)
    config = settings(steps=2, guidance=1.0, temperature=1.0, top_p=1.0)
    history = nano_ar.train(config, gpt, tokens)
    assert history[0]["test"] < gpt.length * math.log(tokens.codebook_size) * 1.1
    assert nano_ar.draw(config, gpt, torch.arange(4), tokens.decode).shape == (4, 32, 32)


def test_tokens_npz_holds_the_export(trained):
    model = nano_tok.build(SimpleNamespace(**torch.load(trained[0] / "last.pt")["config"]))
    model.load_state_dict(torch.load(trained[0] / "last.pt")["model"])
    data = nano_tok.load_data(SimpleNamespace(data=TINY[1], seed=0))
    tokens, written = nano_tok.export(model.eval(), data), np.load(trained[0] / "tokens.npz")
    for name in written:
        assert torch.as_tensor(getattr(tokens, name)).tolist() == written[name].tolist(), name
    assert set(written) == set(vars(tokens)) - {"train_images", "test_images", "decode", "classes"}


def test_flags_are_accepted_where_they_have_an_effect(tmp_path):
    """test_fuzz.py has the others, which are refused. bpe reads the same flags, and costs no training."""
    (tmp_path / "a.txt").write_text("to be or not to be, that is the question")
    for flags in ("vq --codebook 16 --code-dim 4", "rvq --codebook 16 --code-dim 4 --depth 3", "fsq --levels 3,3"):
        argv = ["bpe", "--text", str(tmp_path / "a.txt"), "--out", str(tmp_path / "--depth"), "--quantizer", *flags.split()]
        assert nano_tok.main(argv)["bpe_vocab"] > 256


def test_a_notebook_adds_a_quantizer_by_one_line(tmp_path, monkeypatch):
    class Signs(nn.Module):
        size, dim, depth = 16, 4, 1

        def forward(self, z, rng=None):
            index = ((z > 0) << torch.arange(4)).sum(-1, keepdim=True)
            return nano_tok.straight_through(z, self.lookup(index)), index, z.new_zeros(())

        def lookup(self, index):
            return (index >> torch.arange(4) & 1) * 2.0 - 1

    monkeypatch.setitem(nano_tok.QUANTIZERS, "signs", lambda config: Signs())
    metrics = nano_tok.main(["--quantizer", "signs", "--steps", "2", "--out", str(tmp_path), *TINY])
    assert metrics["bits_per_image"] == 256 and (tmp_path / "codes.png").exists()


def test_bpe_alone_needs_no_checkpoint_and_takes_any_file(tmp_path, capsys):
    (tmp_path / "t").write_bytes(b"caf\xe9 " * 50)               # not UTF-8
    metrics = nano_tok.main(["bpe", "--text", str(tmp_path / "t"), "--vocab", "300", "--out", str(tmp_path / "o")])
    assert metrics["bpe_vocab"] < 300                            # five bytes do not have that many merges
    merges = json.loads((tmp_path / "o" / "bpe.json").read_text())
    assert [tuple(pair) for pair in merges] == train_bpe((b"caf\xe9 " * 50)[:225], 300)
    assert [path.name for path in (tmp_path / "o").iterdir()] == ["bpe.json"]


def test_usual_mistakes_cost_one_line_and_nothing_else(trained, tmp_path, capsys):
    before = {path: path.read_bytes() for path in trained[0].iterdir()}
    (tmp_path / "last.pt").write_bytes(before[trained[0] / "last.pt"][:1000])
    for said, argv in {"--quantiser": ["--quantiser=vq"], "lr nan": ["--lr", "nan"], "vq, rvq": ["--quantizer", "pq"],
                       "multiple of 16": ["--width", "20"], "--levels 8,2": ["--quantizer", "fsq", "--levels", "8,2"],
                       "--levels has": ["--levels", "8,6"], "missing.npz": ["--data", "missing.npz"],
                       "missing.txt": ["--text", "missing.txt"], "--vocab 100": ["--vocab", "100"],
                       "--codebook 32": ["--resume", "--codebook", "32"],
                       "train first": ["eval", "--out", str(tmp_path / "new")],
                       "is broken": ["eval", "--out", str(tmp_path)]}.items():
        part = ["bpe"] if "txt" in said or "vocab" in said else []
        assert said in stopped([*part, "--out", str(trained[0]), *argv], capsys), argv
    assert before == {path: path.read_bytes() for path in trained[0].iterdir()}
    command = [sys.executable, "nano_tok.py", "--steps", "x"]    # as a user starts it
    ended = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stdout == "" and ended.stderr.count("\n") == 1
