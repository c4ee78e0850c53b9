"""nano_tok: byte pair encoding against a direct implementation, quantizers against closed forms, the program end to end on 60 images."""

import collections
import doctest
import json
import math
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import nano_ar
import nano_tok as nt


# --- text -----------------------------------------------------------------------------------------------------------


def merge(ids, pair, new):
    """[1, 2, 3, 1, 2], (1, 2), 4 -> [4, 3, 4]"""
    out, i = [], 0
    while i < len(ids):
        if tuple(ids[i:i + 2]) == pair:
            out.append(new)
            i += 2
        else:
            out.append(ids[i])
            i += 1
    return out


def direct_train(text, vocab, split):
    """Byte pair encoding by its definition: count all pairs anew before every merge."""
    chunks, merges = [list(c) for c in nt.re.findall(nt.SPLIT[split], text)], []
    while len(merges) < vocab - 256:
        counts = collections.Counter(pair for chunk in chunks for pair in zip(chunk, chunk[1:]))
        if not counts or max(counts.values()) < 2:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        chunks = [merge(chunk, best, 256 + len(merges)) for chunk in chunks]
        merges.append(best)
    return merges


def direct_encode(text, merges, split):
    """Chunk by chunk: as long as there is one, apply the oldest merge that fits."""
    rank = {pair: i for i, pair in enumerate(merges)}
    out = []
    for chunk in nt.re.findall(nt.SPLIT[split], text):
        ids = list(chunk)
        while pairs := [p for p in zip(ids, ids[1:]) if p in rank]:
            best = min(pairs, key=rank.get)
            ids = merge(ids, best, 256 + rank[best])
        out += ids
    return out


def random_text(seed):
    rng = np.random.default_rng(seed)
    alphabet = [b"a", b"ab ", b"aab \n\n  1a"][seed % 3]  # the first makes long runs of one letter: overlapping pairs
    return bytes(rng.choice(list(alphabet), size=int(rng.integers(50, 600))).astype(np.uint8))


@pytest.mark.parametrize("split", ["words", "none"])
@pytest.mark.parametrize("seed", range(12))
def test_bpe_equals_the_direct_implementation(seed, split):
    text = random_text(seed)
    merges = nt.train_bpe(text, 290, split)
    assert merges == direct_train(text, 290, split)
    other = random_text(seed + 100)
    bpe = nt.BPE(merges, split)
    for sample in (text, other, text[7:] + other, b"", b"a"):
        assert bpe.encode(sample) == direct_encode(sample, merges, split)
        assert bpe.decode(bpe.encode(sample)) == sample


def test_bpe_of_real_text_equals_the_direct_implementation():
    text = nt.load_text("pydoc", False)[:60_000]
    assert nt.train_bpe(text, 400) == direct_train(text, 400, "words")


def test_bpe_worked_example_of_wikipedia():
    """aaabdaaabac: aa -> Z gives ZabdZabac, ab -> Y gives ZYdZYac, ZY -> X gives XdXac (en.wikipedia.org/wiki/Byte_pair_encoding)."""
    Z, Y, X = 256, 257, 258
    merges = nt.train_bpe(b"aaabdaaabac", 259, "none")
    assert merges == [(97, 97), (97, 98), (Z, Y)]
    assert nt.BPE(merges, "none").encode("aaabdaaabac") == [X, 100, X, 97, 99]


@pytest.mark.parametrize("split", ["words", "none"])
def test_bpe_round_trip_of_any_bytes(split):
    rng = np.random.default_rng(0)
    bpe = nt.BPE(nt.train_bpe(nt.load_text("pydoc", False)[:50_000], 600, split), split)
    for n in (0, 1, 2, 17, 1000):
        for sample in (rng.integers(0, 256, n, dtype=np.uint8).tobytes(), rng.choice(list(b" \n\t\x00a\xff'1"), n).astype(np.uint8).tobytes()):
            assert b"".join(nt.re.findall(nt.SPLIT[split], sample)) == sample
            assert bpe.decode(bpe.encode(sample)) == sample
    assert bpe.decode(bpe.encode("naïve 漢字 🙂")).decode() == "naïve 漢字 🙂"


def test_words_keep_merges_inside_a_word_and_none_does_not():
    text = b"to be or not to be " * 20
    spaces = lambda split: [t for t in nt.BPE(nt.train_bpe(text, 300, split), split).bytes[256:] if b" " in t[1:]]
    assert not spaces("words") and spaces("none")


def test_special_tokens_are_refused_in_plain_text_unless_allowed(tmp_path):
    bpe = nt.BPE([(97, 98)], special=("<|end|>", "<|pad|>"))
    with pytest.raises(nt.UserError, match="end"):
        bpe.encode("ab<|end|>ab")
    assert bpe.encode("ab<|pad|>ab<|end|>", allow_special=True) == [256, 258, 256, 257]
    assert bpe.decode([256, 258, 257]) == b"ab<|pad|><|end|>"
    bpe.save(tmp_path / "v.json")
    again = nt.BPE.load(tmp_path / "v.json")
    assert (again.merges, again.split, again.special, again.bytes) == (bpe.merges, bpe.split, bpe.special, bpe.bytes)


@pytest.mark.parametrize("content", ["", "{}", '{"merges": [[97, 300]], "split": "words", "special": []}',
                                     '{"merges": [[97, 98]], "split": "letters", "special": []}'])
def test_a_broken_vocabulary_is_one_clear_error(tmp_path, content):
    (tmp_path / "v.json").write_text(content, encoding="utf-8")
    with pytest.raises(nt.UserError, match="v.json"):
        nt.BPE.load(tmp_path / "v.json")


# --- quantizers -----------------------------------------------------------------------------------------------------


def test_worked_examples_of_the_docstrings():
    names = ["train_bpe", "apply_merges", "BPE", "straight_through", "residual_quantize", "fsq_bound", "fsq_index", "lfq_index", "keep_prefix",
             "usage", "psnr"]
    finder, runner, tried = doctest.DocTestFinder(), doctest.DocTestRunner(), 0
    for name in names:
        for test in finder.find(getattr(nt, name), name, nt, globs=vars(nt)):
            tried += runner.run(test).attempted
    assert runner.failures == 0 and tried >= 10


@pytest.mark.parametrize("levels", [[2], [3], [4, 3], [8, 6, 5], [7, 5, 5]])
def test_fsq_index_and_digits_are_inverse_and_every_level_can_be_reached(levels):
    levels = torch.tensor(levels)
    index = torch.arange(math.prod(levels.tolist()))
    digits = nt.fsq_digits(index, levels)
    assert torch.equal(nt.fsq_index(digits, levels), index) and len(digits.unique(dim=0)) == len(index)
    sweep = torch.linspace(-12, 12, 4001)[:, None].expand(-1, len(levels))
    rounded = nt.fsq_bound(sweep, levels).round()
    assert [len(c.unique()) for c in rounded.T] == levels.tolist()
    assert torch.equal(rounded.min(0).values, digits.min(0).values.float()) and torch.equal(rounded.max(0).values, digits.max(0).values.float())
    fsq = nt.FSQ(levels.tolist())
    q, chosen, _ = fsq(torch.randn(3, 5, len(levels)) * 2)
    torch.testing.assert_close(fsq.lookup(chosen), q)


def test_lfq_index_and_code_are_inverse_and_the_code_is_the_nearest():
    index = torch.arange(64)
    assert torch.equal(nt.lfq_index(nt.lfq_code(index, 6)), index)
    lfq, z = nt.LFQ(6), torch.randn(4, 7, 6)
    q, chosen, _ = lfq(z)
    assert torch.equal(chosen[..., 0].flatten(), torch.cdist(z.flatten(0, 1), lfq.codes[0]).argmin(1))
    torch.testing.assert_close(q, z.sign())


def test_entropies_against_the_definition():
    z, codes = torch.randn(5, 3, dtype=torch.double), torch.randn(4, 3, dtype=torch.double)
    p = torch.stack([torch.softmax(torch.stack([-((v - c) ** 2).sum() / 0.7 for c in codes]), 0) for v in z])
    each, overall = nt.entropies(z, codes, 0.7)
    torch.testing.assert_close(each, torch.special.entr(p).sum(1).mean())
    torch.testing.assert_close(overall, torch.special.entr(p.mean(0)).sum())


def test_straight_through_gradient_by_hand():
    """d/dz of (w . q + beta mean |z - c|^2) is w + 2 beta (z - c) / number of elements; the codes get none."""
    vq = nt.VectorQuantizer(4, 2, commitment=0.25).eval()
    vq.codes.copy_(torch.tensor([[[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]]))
    z = torch.tensor([[[0.9, 0.2], [0.1, 0.3]]], requires_grad=True)
    w = torch.tensor([[[3.0, -1.0], [2.0, 5.0]]])
    q, index, loss = vq(z)
    assert index.flatten().tolist() == [1, 0] and q.tolist() == [[[1.0, 0.0], [0.0, 0.0]]]
    ((w * q).sum() + loss).backward()
    c = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    torch.testing.assert_close(z.grad, w + 2 * 0.25 * (z.detach() - c) / 4)
    torch.testing.assert_close(loss.detach(), 0.25 * (z.detach() - c).square().mean())


def test_learned_codebook_gets_the_gradient_of_the_codebook_loss():
    vq = nt.VectorQuantizer(3, 2, learned=True)
    z = torch.randn(2, 4, 2)
    _, index, loss = vq(z, None)
    loss.backward()
    by_hand = torch.zeros(3, 2)
    for v, i in zip(z.flatten(0, 1), index.flatten()):
        by_hand[i] += 2 * (vq.codes[0, i] - v).detach() / z.numel()
    torch.testing.assert_close(vq.codes.grad[0], by_hand)


def test_running_means_against_a_float64_loop():
    torch.manual_seed(0)
    vq = nt.VectorQuantizer(4, 3, decay=0.9, restart=0)
    g = torch.Generator().manual_seed(0)
    vq(torch.randn(2, 16, 3), g)
    count, total = vq.count[0].double().clone(), vq.total[0].double().clone()
    for _ in range(3):
        z = torch.randn(2, 16, 3)
        codes = vq.codes[0].double().clone()
        vq(z, g)
        number, sums = torch.zeros(4, dtype=torch.double), torch.zeros(4, 3, dtype=torch.double)
        for v in z.double().flatten(0, 1):
            i = (v - codes).square().sum(1).argmin()
            number[i] += 1
            sums[i] += v
        count, total = 0.9 * count + 0.1 * number, 0.9 * total + 0.1 * sums
        torch.testing.assert_close(vq.codes[0].double(), total / count[:, None], rtol=1e-4, atol=1e-5)


def test_residual_quantizer_equals_a_loop_and_depth_one_is_plain_vq():
    torch.manual_seed(0)
    z, codes = torch.randn(50, 3), torch.randn(3, 8, 3)
    index, sums = nt.residual_quantize(z, codes)
    rest = z.clone()
    for d in range(3):
        nearest = (rest[:, None] - codes[d]).square().sum(-1).argmin(1)
        assert torch.equal(index[:, d], nearest)
        rest = rest - codes[d][nearest]
        torch.testing.assert_close(sums[d], z - rest)
    plain, residual = nt.VectorQuantizer(8, 3).eval(), nt.VectorQuantizer(8, 3, depth=1).eval()
    plain.codes.copy_(codes[:1]), residual.codes.copy_(codes[:1])
    for a, b in zip(plain(z[None]), residual(z[None])):
        assert torch.equal(a, b)
    q, index, loss = plain(z[None])
    direct = codes[0][torch.cdist(z, codes[0]).argmin(1)]
    torch.testing.assert_close(q[0], direct)
    torch.testing.assert_close(loss, 0.25 * (z - direct).square().mean())


def test_every_codebook_of_rvq_lowers_the_error():
    g = torch.Generator().manual_seed(0)
    rvq, z = nt.VectorQuantizer(16, 4, depth=4), torch.randn(8, 64, 4, generator=g)
    for _ in range(20):
        rvq(z, g)
    _, sums = nt.residual_quantize(z.flatten(0, 1), rvq.codes)
    errors = [float((z.flatten(0, 1) - s).square().mean()) for s in sums]
    assert all(later < 0.7 * earlier for earlier, later in zip([1.0, *errors], errors))


def test_a_collapsed_codebook_is_seen_and_restart_revives_it():
    g = torch.Generator().manual_seed(0)
    z = torch.randn(4, 256, 2, generator=g)

    def run(restart):
        vq = nt.VectorQuantizer(32, 2, restart=restart)
        vq.codes.copy_(torch.full_like(vq.codes, 50.0))  # all codes in one far corner
        vq.count.fill_(32.0), vq.total.copy_(vq.codes * 32)
        vq.codes[0, 0] = 0
        vq.total[0, 0] = 0
        for _ in range(200):
            index = vq(z, g)[1]
        return nt.usage(index, 32)[0]

    assert run(restart=0.0) <= 2 / 32
    assert run(restart=0.05) == 1.0


def test_report_says_collapsed_and_what_to_do(capsys):
    m = dict(bits_per_image=512, codebook_size=256, usage_per_codebook=[0.1], perplexity_per_codebook=[9.0], rpsnr=20.0, mean_image_psnr=12.0, rfd=5.0,
             gfd_floor=1.0, pfd=6.0, tokens_per_image=64, prefix_psnr={"1": 20.0}, usage=0.1, seconds=1, train_seconds=1, peak_memory_mb=1)
    nt.print_report(m)
    assert "COLLAPSED: 90 %" in capsys.readouterr().out
    nt.print_report(m | {"usage": 0.95})
    assert "COLLAPSED" not in capsys.readouterr().out


def test_kmeans_finds_separated_clusters():
    g = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    points = centres.repeat_interleave(50, 0) + 0.1 * torch.randn(200, 2, generator=g)
    means = nt.kmeans(points, 4, g)
    assert (torch.cdist(centres, means).min(1).values < 0.1).all()


def test_kmeans_of_fewer_points_than_means():
    assert nt.kmeans(torch.zeros(3, 2), 8, torch.Generator().manual_seed(0)).shape == (8, 2)


def test_perturb_swaps_only_for_near_codes():
    g = torch.Generator().manual_seed(0)
    codes, index = torch.arange(20.0)[:, None], torch.randint(20, (50, 30), generator=g)
    assert torch.equal(nt.perturb(index, codes, 0.0, g), index)
    swapped = nt.perturb(index, codes, 1.0, g, swap=1.0, near=0.1)  # the 2 nearest of 20
    assert ((swapped != index) & ((swapped - index).abs() <= 2)).all()
    half = (nt.perturb(index, codes, 0.5, g, swap=1.0) != index).any(1).float().mean()
    assert 0.2 < half < 0.8


def test_usage_and_psnr_closed_forms():
    assert nt.usage(torch.tensor([3, 3, 3]), 4) == (0.25, 1.0)
    share, perplexity = nt.usage(torch.arange(7), 7)
    assert share == 1.0 and abs(perplexity - 7) < 1e-9
    a = torch.zeros(2, 4, 4, dtype=torch.uint8)
    assert abs(nt.psnr(a, a + 51) - 20 * math.log10(5)) < 1e-5


# --- the whole tokenizer ----------------------------------------------------------------------------------------------


def tiny(**changes):
    base = dict(width=16, codebook=16, tokens=4, code_dim=4)
    return nt.complete_config(nt.Config(**{f.name: f.default for f in nt.dataclasses.fields(nt.Config)} | base | changes), "all")


KINDS = [dict(quantizer=q, layout=l) for q in ("vq", "rvq", "fsq", "lfq") for l in ("grid", "1d")] + [dict(quantizer="vq", layout="1d", mixer="dense")]


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: "-".join(k.values()))
def test_training_forward_equals_encode_then_decode(kind):
    torch.manual_seed(0)
    model = nt.Tokenizer(tiny(**kind))
    images = torch.rand(6, 32, 32)
    model(images, torch.Generator().manual_seed(0))  # starts the codebook
    model.eval()
    tokens = model.encode(images)
    assert tokens.shape == (6, math.prod(model.grid)) and 0 <= tokens.min() and tokens.max() < model.size * model.depth
    q, index, _ = model.quantizer(model.latents(images))
    torch.testing.assert_close(model.paint_codes(q).clamp(0, 1), model.decode(tokens))
    last = model.decode(tokens, max(nt.prefixes(model)))
    torch.testing.assert_close(last, model.decode(tokens))


def test_attention_of_a_block_equals_a_loop_in_float64():
    torch.manual_seed(0)
    block, x, memory = nt.Block(32).double(), torch.randn(2, 5, 32, dtype=torch.double), torch.randn(2, 3, 32, dtype=torch.double)
    rows = []
    for queries, inputs in zip(x, memory):
        k, v = block.kv(nt.norm(inputs)).chunk(2, -1)
        for query in queries:
            q, parts = block.q(nt.norm(query)), []
            for head in (slice(0, 16), slice(16, 32)):
                scores = torch.stack([nt.norm(q[head]) @ nt.norm(k[j, head]) / 2 for j in range(3)])
                parts.append(sum(w * v[j, head] for j, w in enumerate(torch.softmax(scores, 0))))
            rows.append(query + block.proj(torch.cat(parts)))
    torch.testing.assert_close(block(x, memory).flatten(0, 1), torch.stack(rows))  # the mlp starts as zero


def test_queries_read_a_set_of_inputs_and_no_query_reads_another():
    """Inputs swapped together with their places change nothing; an output is the same whichever other queries stand beside it."""
    torch.manual_seed(0)
    queries, x = nt.Queries(6, 4, 16, blocks=2), torch.randn(2, 6, 16)
    for block in queries.blocks:
        nt.nn.init.normal_(block.down.weight, std=0.1)
    y, order = queries(x), torch.tensor([3, 1, 5, 0, 2, 4])
    assert y.shape == (2, 4, 16) and not torch.allclose(y[0], y[1])
    other = nt.Queries(6, 2, 16, blocks=2)
    other.load_state_dict(queries.state_dict() | {"input_places": queries.input_places[order], "queries": queries.queries[[3, 1]]})
    torch.testing.assert_close(other(x[:, order]), y[:, [3, 1]])
    assert not torch.allclose(queries(x[:, order]), y, atol=1e-3)  # but it does matter where an input stands


def test_every_matrix_of_a_block_belongs_to_muon_and_nothing_else_does():
    for kind in (dict(), dict(layout="1d"), dict(layout="1d", mixer="dense")):
        model = nt.Tokenizer(tiny(**kind))
        muon, adam = ({id(p) for p in o.param_groups[0]["params"]} for o in nt.make_optimizers(model, tiny(**kind), torch.float32))
        for name, p in model.named_parameters():
            inside = any(part in name for part in (".0.", "blocks.", "gather.first", "gather.second", "gather.narrow", "gather.widen",
                                                   "scatter.first", "scatter.second", "scatter.narrow", "scatter.widen"))
            assert (id(p) in muon) == inside and (id(p) in adam) != inside, name


@pytest.mark.parametrize("mixer", ["queries", "dense"])
@pytest.mark.parametrize("quantizer", ["vq", "fsq"])
def test_every_prefix_decodes_and_ignores_the_tail(quantizer, mixer):
    torch.manual_seed(0)
    model = nt.Tokenizer(tiny(layout="1d", quantizer=quantizer, mixer=mixer)).eval()
    nt.nn.init.normal_(model.quantizer.codes) if quantizer == "vq" else None
    tokens = torch.randint(model.size, (3, 4))
    pictures = []
    for n in range(1, 5):
        other = tokens.clone()
        other[:, n:] = torch.randint(model.size, other[:, n:].shape)
        pictures.append(model.decode(tokens, n))
        assert torch.equal(pictures[-1], model.decode(other, n))
    assert all(not torch.equal(a, b) for a, b in zip(pictures, pictures[1:]))


def test_rvq_prefix_is_the_sum_of_the_first_codebooks():
    torch.manual_seed(0)
    model = nt.Tokenizer(tiny(quantizer="rvq", depth=3)).eval()
    nt.nn.init.normal_(model.quantizer.codes)
    index = torch.randint(16, (2, 64, 3))
    tokens = (index + torch.arange(3) * 16).flatten(1)
    torch.testing.assert_close(model.decode(tokens, 2), model.paint_codes(model.quantizer.codes[0][index[..., 0]] + model.quantizer.codes[1][index[..., 1]]).clamp(0, 1))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """60 pictures of bright bars, three classes: enough to learn from in a few steps"""
    rng = np.random.default_rng(0)
    pictures, labels = np.zeros((60, 28, 28), np.uint8), np.arange(60) % 3
    for picture, label in zip(pictures, labels):
        at = int(rng.integers(4, 20))
        picture[:, at:at + 4] = 255 if label == 0 else 0
        picture[at:at + 4] = np.maximum(picture[at:at + 4], 200 if label == 1 else 60)
    path = tmp_path_factory.mktemp("data") / "bars.npz"
    np.savez(path, images=pictures, labels=labels)
    return str(path)


def arguments(images, out, *more):
    return ["--data", images, "--out", str(out), "--width", "16", "--codebook", "16", "--steps", "8", "--batch", "8", "--eval-every", "4",
            "--precision", "fp32", "--device", "cpu", "--samples", "10", *more]


def test_main_end_to_end_export_and_files(images, tmp_path):
    from PIL import Image
    out = tmp_path / "run"
    metrics = nt.main(arguments(images, out, "--layout", "1d", "--tokens", "4"))
    for name in ("usage", "perplexity", "rpsnr", "rfd", "pfd", "gfd_floor", "bits_per_image", "seconds", "peak_memory_mb", "params"):
        assert math.isfinite(metrics[name]), name
    assert metrics["bits_per_image"] == 16 and list(metrics["prefix_psnr"]) == ["1", "2", "4"]
    assert json.loads((out / "metrics.json").read_text())["rpsnr"] == metrics["rpsnr"]
    for name in ("reconstructions", "detail", "codes", "rate_distortion"):
        assert (out / f"{name}.png").stat().st_size > 5000

    state = nt.load_checkpoint(out / "best.pt")  # what nano_ar reads gives the pictures that our own decoder gives
    model = nt.Tokenizer(nt.Config(**state["config"]))
    model.load_state_dict(state["model"])
    data = nt.load_images(images, 0)
    exported = np.load(out / "tokens.npz")
    tokens = torch.from_numpy(exported["test_tokens"]).long().view(len(data.test), 4)
    assert torch.equal(tokens, nt.tokenize(model.eval(), data.test).view(-1, 4))

    Image.fromarray(data.test[0].numpy()).save(tmp_path / "bar.png")
    nt.main(["encode", "--out", str(out), "--input", str(tmp_path / "bar.png")])
    written = json.loads((out / "bar.tokens.json").read_text())
    assert written["tokens"] == tokens[0].tolist()
    nt.main(["decode", "--out", str(out), "--input", str(out / "bar.tokens.json")])
    assert torch.equal(torch.from_numpy(np.array(Image.open(out / "bar.png"))), nt.rebuild(model, nt.tokenize(model, data.test[:1]))[0])
    (out / "bar.tokens.json").write_text('{"tokens": [1, 2, 3, 16]}')
    with pytest.raises(nt.UserError, match="4 integers from 0 to 15"):
        nt.main(["decode", "--out", str(out), "--input", str(out / "bar.tokens.json")])


@pytest.mark.parametrize("more", [[], ["--layout", "1d", "--tokens", "4", "--perturb", "0.5"]])
def test_resume_is_exact(images, tmp_path, more, monkeypatch):
    nt.main(["train", *arguments(images, tmp_path / "whole", *more)])
    calls, update = [], nt.Progress.update

    def stop_at_five(self, *args, **values):
        calls.append(1)
        if len(calls) == 5:
            signal.raise_signal(signal.SIGINT)
        update(self, *args, **values)

    monkeypatch.setattr(nt.Progress, "update", stop_at_five)
    with pytest.raises(KeyboardInterrupt, match="step 5"):
        nt.main(["train", *arguments(images, tmp_path / "parts", *more)])
    monkeypatch.setattr(nt.Progress, "update", update)
    nt.main(["train", *arguments(images, tmp_path / "parts", *more), "--resume"])
    whole, parts = (nt.load_checkpoint(tmp_path / name / "last.pt")["model"] for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_codecs_spend_more_for_less_error():
    images = nt.glyphs(20, 0)[0]
    for kind in ("JPEG", "WEBP"):
        curve = nt.codec_curve(images, kind, (5, 50, 90))
        assert all(0 < inner < whole for whole, inner, _ in curve)
        assert all(a < b for i in range(3) for a, b in zip([c[i] for c in curve], [c[i] for c in curve][1:]))


@pytest.mark.parametrize("argv, words", [
    (["--quantizer", "lfq", "--codebook", "100"], "power of two"),
    (["--quantizer", "fsq", "--levels", "8,1"], "--levels 8,1"),
    (["--quantizer", "rvq", "--cosine"], "--cosine"),
    (["--quantizer", "fsq", "--learned-codebook"], "no codebook"),
    (["--width", "20"], "multiple of 16"),
    (["--steps", "0"], "--steps must lie between"),
    (["--colour", "red"], "--colour"),
    (["--data", "missing.npz"], "missing.npz"),
    (["encode", "--input", "x.png"], "no checkpoint"),
    (["bpe", "--data", "missing.txt"], "missing.txt"),
    (["bpe", "--vocab", "100"], "--vocab"),
])
def test_user_errors_are_one_readable_line(argv, words, tmp_path):
    with pytest.raises(nt.UserError, match=words) as error:
        nt.main([*argv, "--out", str(tmp_path / "out")])
    assert "\n" not in str(error.value)


def test_text_that_is_not_utf8_needs_bytes(tmp_path):
    (tmp_path / "t.txt").write_bytes(b"caf\xe9 " * 50)
    with pytest.raises(nt.UserError, match="byte 3 is not UTF-8"):
        nt.main(["bpe", "--data", str(tmp_path / "t.txt"), "--out", str(tmp_path / "o")])
    metrics = nt.main(["bpe", "--data", str(tmp_path / "t.txt"), "--out", str(tmp_path / "o"), "--bytes", "--vocab", "300"])
    assert metrics["bpe_vocab"] < 300  # five different bytes do not have that many merges


def test_command_line_exits_with_2_and_one_line(tmp_path):
    done = subprocess.run([sys.executable, nt.__file__, "--levels", "x", "--out", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("nano_tok: error: --levels x") and done.stderr.count("\n") == 1
