"""nano_ar against oracles: enumerated models, slow twins, closed forms."""
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import pathlib
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn

import nano_ar
from nano_ar import GPT, generate, load_images

FOLDER = pathlib.Path(nano_ar.__file__).parent
TINY = "--data toy.npz --dim 32 --depth 1 --codebook 16 --batch 8 --samples 20 --device cpu".split()
IMAGES = torch.tensor(list(itertools.product(range(3), repeat=4)))  # all 81 images of 2 x 2 tokens out of 3


@pytest.fixture(scope="module", autouse=True)
def toy_file(tmp_path_factory):
    TINY[1] = str(tmp_path_factory.mktemp("data") / "toy.npz")
    images, labels = nano_ar.glyphs(400, 0)                      # so that each run below takes a second or two
    np.savez(TINY[1], images=images, labels=labels)


def tiny_model(rows=2, columns=2, V=3):
    """A GPT of two classes in float64, with random numbers where layers start at zero: zeros hide errors."""
    torch.manual_seed(0)
    model = GPT(V, 2, rows, columns, dim=16, depth=2, heads=2)
    for p in model.parameters():
        nn.init.normal_(p, std=0.4)
    return model.double().requires_grad_(False)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def stopped(argv, capsys):
    """Run a command that must end as a user's mistake -> what it says."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        nano_ar.run_as_program(lambda: nano_ar.main(argv))
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("nano_ar: ") and said.count("\n") == 1, (argv, said)
    return said


# --- model and sampling ----------------------------------------------------------------------------------
def test_what_is_drawn_follows_from_the_seed_alone():
    model, config = tiny_model(), SimpleNamespace(seed=3, guidance=1.5, temperature=1.0, top_p=1.0)
    drawn = []
    for other in (1, 2):
        torch.manual_seed(other)                                 # the global generator must have no say
        drawn.append(nano_ar.draw(config, model, torch.arange(60) % 2, lambda tokens: tokens))
    config.seed = 4
    assert torch.equal(*drawn) and not torch.equal(drawn[0], nano_ar.draw(config, model, torch.arange(60) % 2, torch.clone))


def test_the_judge_sees_pixels_from_0_to_1():
    torch.manual_seed(0)
    judge, images = nano_ar.make_judge(10).eval(), nano_ar.glyphs(7, 0)[0]
    with torch.no_grad():
        truth = judge[:-1](images.float()[:, None] / 255)
    assert torch.allclose(nano_ar.look(judge, images)[0], truth.double(), atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (3, 5), (8, 8)])
def test_cached_logits_equal_uncached(shape):
    model, L = tiny_model(*shape, V=7), shape[0] * shape[1]
    tokens, labels = torch.randint(7, (3, L)), torch.tensor([0, 1, 2])
    cache, x, stepped = model.new_cache(3), model.label(labels)[:, None], []
    for t in range(L):
        stepped.append(model.step(x, t, cache))
        x = model.token(tokens[:, t:t + 1])
    torch.testing.assert_close(torch.cat(stepped, 1), model(tokens, labels), atol=1e-10, rtol=0)


def test_causality():
    """A changed token changes no logits of its own slot or before it, but does change those right after it."""
    model = tiny_model(3, 4, V=5)
    tokens, labels = torch.randint(5, (1, 12)), torch.tensor([1])
    before = model(tokens, labels)
    assert (model(tokens, labels - 1) - before)[:, 0].abs().max() > 1e-4  # the class reaches slot 0
    for t in range(12):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % 5
        difference = (model(changed, labels) - before).abs().amax((0, 2))
        assert difference[:t + 1].max() < 1e-12 and (t == 11 or difference[t + 1] > 1e-4)


def test_probabilities_of_all_images_sum_to_one_and_the_first_loss_is_log_v():
    """The chain rule, enumerated, for both classes and for the class "none"."""
    model = tiny_model()
    for labels in torch.arange(3).repeat_interleave(81).split(81):
        log_p = model(IMAGES, labels).log_softmax(-1).gather(-1, IMAGES[..., None]).sum((1, 2))
        assert math.isclose(log_p.exp().sum(), 1, abs_tol=1e-12)
        nats = [nano_ar.nats_per_image(model, IMAGES[i:i + 1], labels[:1]) for i in range(81)]
        torch.testing.assert_close(-log_p, torch.tensor(nats).double(), atol=1e-5, rtol=0)  # in 32 bits
    nats = nano_ar.nats_per_image(GPT(50, 10, 4, 4, 16, 2, 2), torch.randint(50, (5, 16)), torch.arange(5))
    assert math.isclose(nats, 16 * math.log(50), rel_tol=1e-5)   # the first loss of a new model is log V


def law_of(model, guidance, temperature, top_p):
    """Exact probabilities of the 81 images of class 1: slow and literal."""
    labels = torch.ones(81, dtype=torch.long)
    a, b = model(IMAGES, labels), model(IMAGES, labels + 1)      # with the class, and without
    p = ((b + guidance * (a - b)) / temperature).softmax(-1)     # (81, 4, 3)
    for row in p.flatten(0, 1):
        mass = 0.0
        for token in row.argsort(descending=True):
            before, mass = mass, mass + row[token].item()
            row[token] *= before < top_p                         # else the likelier ones are enough
    return (p / p.sum(-1, keepdim=True)).gather(-1, IMAGES[..., None]).prod(1)[:, 0]


@pytest.mark.parametrize("how", [(1, 1, 1), (1.7, 1, 1), (0, 1, 1), (1.7, 0.6, 1), (1.7, 1.3, 0.8)])
def test_samples_follow_the_enumerated_law(how):
    """20,000 draws with guidance, temperature, top-p. Chi-square of 81 cells: 99.9 % lie below 125."""
    model, n = tiny_model(), 20_000
    law, drawn = law_of(model, *how), generate(model, torch.ones(n, dtype=torch.long), seeded(1), *how)
    counts, common = torch.bincount(drawn @ torch.tensor([27, 9, 3, 1]), minlength=81), law * n > 3
    assert counts[law == 0].sum() == 0 and ((law == 0).any() or how[2] == 1)
    assert ((counts - law * n)[common] ** 2 / (law * n)[common]).sum() < 125


def test_given_tokens_stay_and_greedy_sampling_is_argmax():
    model, labels = tiny_model(4, 4, V=5), torch.tensor([0, 1, 0])
    greedy = generate(model, labels, None, temperature=0)
    assert greedy.equal(model(greedy, labels).argmax(-1))
    given = torch.full((3, 16), -1)
    given[:, :8] = torch.randint(5, (3, 8), generator=seeded(0))
    drawn = generate(model, labels, seeded(3), guidance=2.0, given=given)
    assert drawn[:, :8].equal(given[:, :8]) and drawn.min() >= 0
    assert not drawn.equal(generate(model, labels, seeded(4), guidance=2.0, given=given))
    greedy = generate(model, labels, None, temperature=0, given=given)
    assert greedy[:, 8:].equal(model(greedy, labels).argmax(-1)[:, 8:])  # it goes on from what was given


def test_rope():
    cos, sin = nano_ar.rope_table(torch.tensor([[0.0, 0.0], [math.pi / 2, 0.0], [0.0, math.pi / 2]]), 4)
    turned = nano_ar.rotate(torch.tensor([[1.0, 1.0, 0.0, 0.0]] * 3), cos, sin)  # pairs: 0 and 2, 1 and 3
    # not at all; the row turns the first pair; the column turns the second
    torch.testing.assert_close(turned, torch.tensor([[1.0, 1, 0, 0], [0.0, 1, 1, 0], [1.0, 0, 0, 1]]))
    cos, sin = nano_ar.rope_table(torch.tensor([[1.0, 0.0]]), 8)
    torch.testing.assert_close(torch.atan2(sin, cos)[0], torch.tensor([1.0, 0.1, 0.0, 0.0]))  # base 100
    q, k = torch.randn(2, 1, 16, generator=seeded(0))
    table = nano_ar.rope_table(torch.tensor([[0, 0], [2, 1], [3, 4], [5, 5]]), 16)
    scores = nano_ar.rotate(q, *table) @ nano_ar.rotate(k, *table).mT
    torch.testing.assert_close(scores[1, 0], scores[3, 2])       # both (2, 1) apart
    assert not torch.isclose(scores[1, 0], scores[0, 1])


# --- tokens ---------------------------------------------------------------------------------------------
def test_kmeans_is_lloyds_algorithm_from_distinct_points():
    """Against a loop in float64 from the same start; many points are equal, as black patches are."""
    points, errors = torch.cat([torch.zeros(300, 2), torch.randn(200, 2, generator=seeded(0))]), []
    slow = nano_ar.kmeans(points, 12, seeded(1), rounds=0).double()
    for rounds in range(1, 9):
        distance, nearest = torch.cdist(points.double(), slow).min(1)
        errors.append(distance.square().mean())
        slow = torch.stack([points[nearest == k].double().mean(0) for k in range(12)])
        fast = nano_ar.kmeans(points, 12, seeded(1), rounds)
        torch.testing.assert_close(fast.double(), slow, atol=1e-5, rtol=0)
    assert all(b <= a for a, b in zip(errors, errors[1:])) and errors[-1] < 0.9 * errors[0]
    points = torch.cat([torch.zeros(1000, 1), torch.tensor([[1.0], [2.0], [50.0], [51.0]])])
    for seed in range(10):
        codebook = nano_ar.kmeans(points, 5, seeded(seed), rounds=5)
        assert sorted(codebook.flatten().tolist()) == [0, 1, 2, 50, 51]
    assert nano_ar.kmeans(points, 9, seeded(0)).shape == (5, 1)  # fewer distinct points than codewords


def test_patches_and_codebook_round_trip():
    images = nano_ar.glyphs(40, 0)[0]
    patches = nano_ar.to_patches(images)
    assert patches.shape == (40, 64, 16) and nano_ar.from_patches(patches).equal(images)
    assert patches[1, 34].equal(images[1, 16:20, 8:12].flatten())  # patch 34 is row 4, column 2
    codebook, tokens = torch.randint(256, (32, 16)).float(), torch.randint(32, (5, 64))
    assert nano_ar.encode(nano_ar.decode(tokens, codebook), codebook).equal(tokens)  # a picture of codewords
    fitted = nano_ar.fit_codebook(images, 32, seeded(0))
    slow = torch.cdist(patches.double(), fitted.double()).argmin(-1)
    assert fitted.shape == (32, 16) and (slow == nano_ar.encode(images, fitted)).double().mean() > 0.999


# --- data -----------------------------------------------------------------------------------------------
def test_glyphs_are_deterministic():
    (a, labels_a), (b, labels_b), (c, _) = (nano_ar.glyphs(30, seed) for seed in (0, 0, 1))
    assert a.equal(b) and labels_a.equal(labels_b) and not a.equal(c)
    assert a.shape == (30, 32, 32) and a.dtype == torch.uint8 and a.flatten(1).amax(1).min() > 150
    assert a[:, [0, -1]].float().mean() < 2                      # digits are not cut off at the border


def idx(array):
    return b"\0\0\x08" + bytes([array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()


def test_files_are_read_padded_and_split(tmp_path, monkeypatch):
    """IDX and .npz are split 9:1, by the seed; MNIST's four files keep their own split."""
    monkeypatch.setenv("NANO_DATA", str(tmp_path))
    images = np.random.default_rng(0).integers(0, 256, (50, 28, 28), dtype=np.uint8)
    labels, padded = np.arange(50, dtype=np.uint8) % 3, np.pad(images, ((0, 0), (2, 2), (2, 2)))
    parts = images[:30], labels[:30], images[30:], labels[30:]
    for name, array in zip(nano_ar.IDX_FILES, parts):
        (tmp_path / name).write_bytes(gzip.compress(idx(array)))
        (tmp_path / name).with_suffix("").write_bytes(idx(array))
    np.savez(tmp_path / "a.npz", images=images[:30], labels=labels[:30])
    for read, wanted in zip(load_images("mnist", 5), (padded[:30], labels[:30], padded[30:], labels[30:])):
        assert read.tolist() == wanted.tolist()
    pairs = {x.tobytes(): y for x, y in zip(padded[:30], labels)}
    for name in ("a.npz", nano_ar.IDX_FILES[0], nano_ar.IDX_FILES[0][:-3]):
        x, y, test_x, test_y = load_images(str(tmp_path / name), 0)
        assert x.shape == (27, 32, 32) and test_x.shape == (3, 32, 32) and y.dtype == torch.int64
        assert pairs == {x.numpy().tobytes(): y for x, y in zip([*x, *test_x], [*y, *test_y])}
        assert load_images(str(tmp_path / name), 0)[2].equal(test_x)
        assert not load_images(str(tmp_path / name), 1)[2].equal(test_x)


def test_download_is_verified_and_never_half_done(tmp_path, monkeypatch):
    monkeypatch.setenv("NANO_DATA", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: io.BytesIO(b"hello"))
    place, path = ("f", "a.gz", "https://example.org/"), tmp_path / "f" / "a.gz"
    with pytest.raises(OSError, match="damaged"):
        nano_ar.fetch(*place, "sha256:" + "0" * 64)
    good = "md5:" + hashlib.md5(b"hello").hexdigest()
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(os, "replace", None)                       # a power cut after the bytes, before the name
        nano_ar.fetch(*place, good)
    assert not path.exists() and nano_ar.fetch(*place, good) == path and path.read_bytes() == b"hello"
    monkeypatch.setattr("urllib.request.urlopen", None)          # a second download would fail
    assert nano_ar.fetch(*place, good) == path and list(path.parent.iterdir()) == [path]


# --- evaluation -----------------------------------------------------------------------------------------
def test_frechet_distance_and_psnr_closed_forms():
    a = torch.randn(400, 2, generator=seeded(0), dtype=torch.float64) + 3
    assert abs(nano_ar.frechet_distance(a, a)) < 1e-9
    b = a @ torch.tensor([[1.0, 2.0], [0.0, 1.0]], dtype=torch.float64)
    A, B = torch.cov(a.mT), torch.cov(b.mT)                      # they do not commute, but are 2 x 2:
    cross = ((A @ B).trace() + 2 * torch.linalg.det(A @ B).sqrt()).sqrt()  # tr M^1/2 = (tr M + 2 det^1/2 M)^1/2
    wanted = (a.mean(0) - b.mean(0)).square().sum() + A.trace() + B.trace() - 2 * cross
    assert math.isclose(nano_ar.frechet_distance(a, b), wanted, rel_tol=1e-9)
    black = torch.zeros(3, 32, 32, dtype=torch.uint8)
    assert math.isclose(nano_ar.psnr(black, black + 51), 20 * math.log10(5), rel_tol=1e-5)


def test_diversity_groups_by_the_class_seen(monkeypatch):
    features = torch.tensor([[0.0], [2.0], [10.0], [14.0], [99.0]])
    assert nano_ar.spread(features, torch.tensor([0, 0, 1, 1, 2])) == 3  # (2 + 4) / 2; one alone counts nothing
    # class 0 lies at 0 and 1, class 1 at 10 and 11; one of each was asked for as the other
    images, labels = torch.tensor([[0.0, 0], [1, 0], [10, 0], [11, 0]]), torch.tensor([0, 1, 0, 1])
    monkeypatch.setattr(nano_ar, "look", lambda _, images: (images, (images[:, 0] > 5).long()))
    metrics = nano_ar.image_metrics(None, images, labels, images)
    assert metrics["diversity"] == 1 and metrics["class_accuracy"] == 0.5 and abs(metrics["gfd"]) < 1e-5


def test_judge_tells_an_upright_from_a_level_bar():
    images, labels = torch.zeros(40, 32, 32, dtype=torch.uint8), torch.arange(40) % 2
    images[labels == 0, 8:24, 14:18], images[labels == 1, 14:18, 8:24] = 255, 255
    judge = nano_ar.train_judge(images, labels, 2, torch.device("cpu"), seed=0)
    features, seen = nano_ar.look(judge, images)
    assert features.shape == (40, 64) and features.dtype == torch.float64 and seen.equal(labels)


def test_unigram_is_the_table_of_frequencies():
    """A slow twin that counts anew for each token of each test image: classes 0 and 1, 4 cells, 3 tokens."""
    tokens, labels = torch.randint(3, (30, 4), generator=seeded(0)), torch.arange(30) % 3 // 2
    data = SimpleNamespace(train_tokens=tokens[:24], train_labels=labels[:24], test_tokens=tokens[24:],
                           test_labels=labels[24:], classes=2, codebook_size=3)
    nats = 0.0
    for image, label in zip(data.test_tokens, data.test_labels):
        same = data.train_tokens[data.train_labels == label]
        for cell in range(4):
            nats -= math.log(((same[:, cell] == image[cell]).sum() + 0.05) / (len(same) + 3 * 0.05))
    assert math.isclose(nano_ar.unigram_nats(data), nats / 6, rel_tol=1e-5)


def test_nats_do_not_depend_on_the_batch():
    model, tokens, labels = tiny_model(V=5), torch.randint(5, (260, 4)), torch.arange(260) % 2
    one = np.mean([nano_ar.nats_per_image(model, tokens[i:i + 1], labels[i:i + 1]) for i in range(260)])
    assert math.isclose(nano_ar.nats_per_image(model, tokens, labels), one, rel_tol=1e-6)


# --- training -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 24)])
def test_orthogonalize_against_svd(shape):
    """The same singular vectors, and values within 0.68 .. 1.20, for all from 0.0015 of the norm on."""
    random = torch.randn(*shape, generator=seeded(0), dtype=torch.float64)
    U, _, Vh = torch.linalg.svd(random, full_matrices=False)
    for low in (-2.8, -2, -1, -0.2):
        S = torch.logspace(low, 0, 8, dtype=torch.float64)
        S[0] = 0.0015 * S.norm()
        X = nano_ar.orthogonalize(7 * (U * S) @ Vh, dtype=torch.float64)  # 7: its size does not matter
        inside = U.mT @ X @ Vh.mT
        assert (inside - inside.diag().diag()).abs().max() < 1e-9
        assert 0.675 < inside.diag().min() and inside.diag().max() < 1.205


@pytest.mark.parametrize("shape,scale", [((8, 4), 2**0.5), ((4, 8), 1)])  # (rows / columns)^1/2, or 1
def test_muon_steps(shape, scale):
    p, (g1, g2) = nn.Parameter(torch.zeros(shape)), torch.randn(2, *shape, generator=seeded(0))
    optimizer = nano_ar.Muon([p], lr=0.1)
    p.grad = g1.clone()
    optimizer.step()
    torch.testing.assert_close(p.data, -0.1 * scale * nano_ar.orthogonalize(g1))
    before, p.grad = p.data.clone(), g2.clone()
    optimizer.step()
    ahead = 0.05 * g2 + 0.95 * (0.95 * 0.05 * g1 + 0.05 * g2)    # v <- 0.95 v + 0.05 g, twice
    torch.testing.assert_close(p.data - before, -0.1 * scale * nano_ar.orthogonalize(ahead))


def test_batches_and_all_chance_follow_from_seed_and_step():
    epochs = [torch.cat([nano_ar.batch_at(step, 10, 4, 3) for step in (i, i + 1)]) for i in (0, 2)]
    assert all(len(epoch.unique()) == 8 for epoch in epochs) and not epochs[0].equal(epochs[1])
    whole = torch.cat([nano_ar.batch_at(step, 12, 4, 3) for step in (3, 4, 5)])
    assert sorted(whole.tolist()) == list(range(12))             # each image once an epoch, whatever else is drawn
    assert not nano_ar.batch_at(3, 12, 4, 4).equal(whole[:4])    # another seed, another order
    assert len(nano_ar.batch_at(7, 5, 64, 0).unique()) == 5      # fewer images than a batch: all of them
    seeds = {nano_ar.rng_at(*numbers).initial_seed() for numbers in itertools.product(range(4), repeat=3)}
    assert len(seeds) == 64                                      # (1, 2, 0) is not (2, 1, 0)


def eight_images(**changed):
    tokens, labels = torch.randint(16, (8, 16), generator=seeded(0)), torch.arange(8)
    torch.manual_seed(0)
    data = SimpleNamespace(train_tokens=tokens, train_labels=labels, test_tokens=tokens, test_labels=labels)
    config = SimpleNamespace(**{"seed": 0, "lr": 0.02, "steps": 150, "batch": 8, **changed})
    return config, GPT(16, 8, 4, 4, dim=32, depth=2, heads=2), data


def test_overfits_eight_images():
    """The whole path learns: eight images, then greedy sampling returns them exactly."""
    config, model, data = eight_images()
    history = nano_ar.train(config, model, data)
    assert [entry["step"] for entry in history] == [30, 60, 90, 120, 150] and history[-1]["test"] < 0.2
    assert generate(model, data.train_labels, None, temperature=0).equal(data.train_tokens)


def test_what_a_training_step_sees_and_moves(tmp_path):
    """A tenth of the classes is hidden; each parameter has one optimizer; rates fall to 0 on a line."""
    (config, model, data), seen = eight_images(lr=1e-4, steps=200), []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs) if torch.is_grad_enabled() else None)
    nano_ar.train(config, model, data, path=tmp_path / "a.pt")
    tokens, labels = (torch.cat(column) for column in zip(*seen))
    hidden = labels == model.null
    assert len(labels) == 1600 and 0.075 < hidden.double().mean() < 0.125
    assert data.train_tokens[labels[~hidden]].equal(tokens[~hidden])  # the others go with their own images
    muon, adam = (o.param_groups[0]["params"] for o in nano_ar.make_optimizers(model, config, torch.float32))
    assert list(map(id, muon)) == list(map(id, model.blocks.parameters()))
    assert sorted(id(p) for p in muon + adam) == sorted(id(p) for p in model.parameters())
    rates = [saved["param_groups"][0]["lr"] for saved in torch.load(tmp_path / "a.pt")["optimizers"]]
    torch.testing.assert_close(rates, [1e-4 / 200, 0.5e-4 / 200], rtol=1e-9, atol=0)


# --- settings and main ----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    return out, nano_ar.main(["--steps", "3", "--out", str(out), *TINY])


def test_main_writes_everything(trained):
    out, metrics = trained
    assert {path.name for path in out.iterdir()} == {"last.pt", "samples.npz", "samples.png", "nearest.png",
                                                     "completions.png", "metrics.json"}
    assert json.loads((out / "metrics.json").read_text()) == metrics
    names = """seconds params seed tokens_per_second val_nats_per_image unigram_nats_per_image rpsnr rfd gfd
        gfd_floor class_accuracy diversity calls_per_image ms_per_image_b1 ms_per_image_b64""".split()
    assert all(math.isfinite(metrics[name]) for name in names) and metrics["device"] == "cpu"
    assert metrics["calls_per_image"] == 64 and metrics["gfd_floor"] < metrics["gfd"]
    samples = np.load(out / "samples.npz")
    assert samples["images"].shape == (20, 32, 32) and samples["images"].dtype == np.uint8
    assert samples["labels"].tolist() == load_images(TINY[1], 0)[3][:20].tolist()  # as in the test set
    assert nano_ar.by_class(torch.tensor([0, 3, 0, 3, 3, 5]), 2).tolist() == [[0, 1, 5]]  # one 5: one row


def test_same_seed_same_metrics_and_parts_take_the_model_from_the_checkpoint(trained, tmp_path):
    again = nano_ar.main(["--steps", "3", "--out", str(tmp_path), *TINY])
    (tmp_path / "samples.npz").unlink()
    for part in ("sample", "complete", "eval"):
        alone = nano_ar.main([part, "--out", str(tmp_path), "--device", "cpu"])
    assert alone.keys() == again.keys() - {"tokens_per_second"}
    for name in alone.keys() - {"seconds", "ms_per_image_b1", "ms_per_image_b64"}:
        assert again[name] == trained[1][name] == alone[name], name
    first, second = (np.load(folder / "samples.npz")["images"] for folder in (trained[0], tmp_path))
    assert first.tobytes() == second.tobytes()


def test_a_flag_wins_over_the_checkpoint_that_over_the_preset_that_over_the_default(tmp_path, capsys):
    _, config, _ = nano_ar.read_settings(["--preset", "gpu", "--batch", "32"])
    wanted = {**nano_ar.PRESETS["gpu"], "batch": 32, "guidance": nano_ar.FLAGS["guidance"][0]}
    assert wanted.items() <= vars(config).items() and (config.dim, config.steps) == (384, 4000)
    small = "--dim 32 --depth 1 --codebook 16 --batch 8 --steps 2".split()
    out = ["--out", str(tmp_path), "--device", "cpu"]
    nano_ar.main(["train", "--preset", "gpu", "--data", TINY[1], *small, *out])
    assert torch.load(tmp_path / "last.pt")["config"]["lr"] == 0.02 and torch.load(tmp_path / "last.pt")["step"] == 2
    _, config, _ = nano_ar.read_settings(["sample", "--guidance", "3", "--dim", "32", *out])
    assert (config.lr, config.dim, config.samples, config.guidance) == (0.02, 32, 10000, 3)
    for flag in ("--dim 128", "--preset cpu"):                   # defaults, but given, and not what was trained
        assert flag in stopped(["train", "--resume", *flag.split(), *out], capsys)


def test_usual_mistakes_cost_one_line_and_nothing_else(trained, tmp_path, capsys):
    before, cut = {path: path.read_bytes() for path in trained[0].iterdir()}, tmp_path / "cut-images-idx3"
    cut.write_bytes(idx(np.zeros((30, 28, 28), np.uint8))[:-5])
    (tmp_path / "last.pt").write_bytes(before[trained[0] / "last.pt"][:1000])
    for said, argv in {"--ordr": ["--ordr=diag"], "--lr nan": ["--lr", "nan"], "multiple of 32": ["--dim", "48"],
                       "missing.npz": ["--data", "missing.npz"], "cut-images": ["--data", str(cut)],
                       "cannot use": ["--out", str(cut / "x")], "--dim 64": ["--resume", "--dim", "64"],
                       "train first": ["eval", "--out", str(tmp_path / "new")],
                       "is broken": ["sample", "--out", str(tmp_path)]}.items():
        assert said in stopped(["--out", str(trained[0]), *argv], capsys), argv
    assert before == {path: path.read_bytes() for path in trained[0].iterdir()}
    command = [sys.executable, "nano_ar.py", "--steps", "x"]     # as a user starts it
    ended = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stdout == "" and ended.stderr.count("\n") == 1
