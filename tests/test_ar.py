"""nano_ar against oracles: enumeration of whole models, slow twins, closed forms, and a kill in the middle of a write."""

import doctest
import gzip
import itertools
import json
import math
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

import kernels
import nano_ar
from nano_ar import Config, GPT, UserError, generate, make_order

ROOT = pathlib.Path(__file__).parent.parent
TINY = "--data toy.npz --dim 16 --depth 1 --heads 2 --codebook 16 --batch 8 --samples 20 --device cpu".split()
ORDERS = ("raster", "diag")


@pytest.fixture(scope="module", autouse=True)
def toy_file(tmp_path_factory):
    """400 glyphs in a file of the user's own: the runs below take a second each."""
    TINY[1] = str(tmp_path_factory.mktemp("data") / "toy.npz")
    images, labels = nano_ar.glyphs(400, 0)
    np.savez(TINY[1], images=images, labels=labels)


def tiny_model(rows=2, columns=2, vocabulary=3, kind="raster", seed=0, dim=16, depth=2):
    """A GPT in float64 whose zero-initialised layers are made random, so that nothing is hidden by zeros."""
    torch.manual_seed(seed)
    model = GPT(vocabulary, 2, make_order(rows, columns, kind), dim, depth, 2)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return model.double().eval()


def run(argv, capsys):
    """The command line in this process -> (exit code, stdout, stderr)"""
    code = nano_ar.cli(lambda: nano_ar.main(argv))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# --- the model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ORDERS)
@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (3, 5), (8, 8)])
def test_cached_logits_equal_uncached(kind, shape):
    model = tiny_model(*shape, vocabulary=7, kind=kind)
    tokens, labels = torch.randint(7, (3, shape[0] * shape[1])), torch.tensor([0, 1, 2])
    cache = model.new_cache(3)
    with torch.no_grad():
        stepped = torch.cat([model.step(tokens, labels, g, cache) for g in range(len(model.order.groups))], 1)
        torch.testing.assert_close(stepped, model(tokens, labels), atol=1e-10, rtol=0)


@pytest.mark.parametrize("kind", ORDERS)
def test_causality(kind):
    """A changed token changes no logits of its own group or of earlier ones, and does change the group after it."""
    model = tiny_model(3, 4, vocabulary=5, kind=kind)
    tokens, labels = torch.randint(5, (1, 12)), torch.tensor([1])
    before = model(tokens, labels)
    for group, (_, start, end) in enumerate(model.order.steps):
        changed = tokens.clone()
        changed[:, end - 1] = (changed[:, end - 1] + 1) % 5
        after = model(changed, labels)
        torch.testing.assert_close(after[:, :end], before[:, :end], atol=1e-12, rtol=0)
        if end < 12:
            following = model.order.steps[group + 1]
            assert (after[:, following[1]:following[2]] - before[:, following[1]:following[2]]).abs().max() > 1e-4


@pytest.mark.parametrize("kind", ORDERS)
def test_probabilities_of_all_images_sum_to_one(kind):
    """The chain rule, enumerated: 3^4 images of 2 x 2 tokens, per class and for the class "none"."""
    model = tiny_model(kind=kind)
    images = torch.tensor(list(itertools.product(range(3), repeat=4)))
    for label in range(3):
        nats = [nano_ar.nats_per_image(model, image[None], torch.tensor([label])) for image in images]
        assert math.isclose(sum(math.exp(-n) for n in nats), 1, abs_tol=1e-12)


@pytest.mark.parametrize("kind,cached,guidance", [("raster", True, 1.0), ("raster", False, 1.7), ("raster", True, 1.7), ("diag", True, 1.7)])
def test_samples_follow_the_enumerated_law(kind, cached, guidance):
    """20,000 draws against the exact law of guided sampling, by chi-square (81 cells, 99.9 % quantile about 125)."""
    model = tiny_model(kind=kind)
    images = torch.tensor(list(itertools.product(range(3), repeat=4)))
    ordered, label = images[:, model.order.cells], torch.ones(81, dtype=torch.long)
    with torch.no_grad():
        logits = nano_ar.guide(model(ordered, label), model(ordered, torch.full_like(label, model.null)), guidance)
        law = logits.log_softmax(-1).gather(-1, ordered[..., None]).sum((1, 2)).exp()
    n = 20_000
    drawn = generate(model, torch.ones(n, dtype=torch.long), torch.Generator().manual_seed(1), guidance=guidance, cached=cached)
    counts = torch.bincount(drawn @ torch.tensor([27, 9, 3, 1]), minlength=81)
    common = law * n > 3
    chi2 = ((counts - law * n)[common] ** 2 / (law * n)[common]).sum()
    assert chi2 < 130, chi2


@pytest.mark.parametrize("kind", ORDERS)
def test_given_tokens_stay_and_the_rest_is_free(kind):
    model = tiny_model(4, 4, vocabulary=5, kind=kind)
    given = torch.full((6, 16), -1)
    given[:, :8] = torch.randint(5, (6, 8))
    g = lambda: torch.Generator().manual_seed(3)
    drawn = generate(model, torch.zeros(6, dtype=torch.long), g(), given=given)
    assert drawn[:, :8].equal(given[:, :8]) and drawn.min() >= 0
    assert generate(model, torch.zeros(6, dtype=torch.long), g(), given=drawn).equal(drawn)


def test_greedy_sampling_is_argmax_and_guidance_one_is_plain():
    model, labels = tiny_model(3, 3, vocabulary=6), torch.tensor([0, 1])
    greedy = generate(model, labels, None, temperature=0)
    assert greedy.equal(generate(model, labels, torch.Generator().manual_seed(0), top_k=1))
    with torch.no_grad():
        assert greedy.equal(model(greedy, labels).argmax(-1))
    a, b = (generate(model, labels, torch.Generator().manual_seed(5), guidance=s) for s in (1.0, 1.0 + 1e-9))
    assert a.equal(b)


def test_rope():
    r = nano_ar.rope_rotations(torch.tensor([[0.0, 0.0], [math.pi / 2, 0.0], [0.0, math.pi / 2]]), 4)
    x = torch.tensor([1.0, 0.0, 1.0, 0.0])
    torch.testing.assert_close(nano_ar.rotate(x, r[1]), torch.tensor([0.0, 1.0, 1.0, 0.0]))  # the row turns the first pair
    torch.testing.assert_close(nano_ar.rotate(x, r[2]), torch.tensor([1.0, 0.0, 0.0, 1.0]))  # the column turns the second
    torch.manual_seed(0)
    q, k = torch.randn(2, 16)
    places = torch.tensor([[0, 0], [2, 1], [3, 4], [5, 5]])
    r = nano_ar.rope_rotations(places, 16)
    score = lambda i, j: nano_ar.rotate(q, r[i]) @ nano_ar.rotate(k, r[j])
    torch.testing.assert_close(score(1, 0), score(3, 2))  # both (2, 1) apart
    assert not torch.isclose(score(1, 0), score(0, 1))
    torch.testing.assert_close(nano_ar.rotate(q, r[0]), q)  # the class token, at (0, 0), keeps its query and key


def test_the_first_loss_is_log_v():
    model = GPT(50, 10, make_order(4, 4, "diag"), 16, 2, 2)
    nats = nano_ar.nats_per_image(model, torch.randint(50, (5, 16)), torch.zeros(5, dtype=torch.long))
    assert math.isclose(nats, 16 * math.log(50), rel_tol=1e-5)


@pytest.mark.parametrize("rows,columns", [(1, 1), (1, 6), (5, 1), (4, 4), (3, 5)])
def test_diag_order(rows, columns):
    order = make_order(rows, columns, "diag")
    assert sorted(order.cells.tolist()) == list(range(rows * columns))
    assert len(order.groups) == rows + columns - 1 and sum(order.groups) == rows * columns
    torch.testing.assert_close(sum(order.weights), torch.ones(rows * columns))
    for t in range(1, rows * columns):
        row, column = order.places[t].tolist()
        for (dr, dc), slots, weight in zip(((0, 1), (1, 0)), order.sources, order.weights):
            if weight[t]:  # the source is the cell on the left, or above
                assert order.places[slots[t] - 1].tolist() == [row - dr, column - dc]


# --- rules on logits ------------------------------------------------------------------------------------------------


def test_truncation_worked_examples():
    p = torch.tensor([0.4, 0.3, 0.2, 0.1])
    keep = lambda **how: kernels.truncate(p.log(), **how).isfinite().tolist()
    assert keep(top_k=2) == [True, True, False, False]
    assert keep(top_p=0.39) == [True, False, False, False]
    assert keep(top_p=0.5) == [True, True, False, False]
    assert keep(top_k=3, top_p=0.5) == [True, True, False, False]  # on the renormalised rest: 4/9 < 0.5
    assert keep(top_p=1e-9) == [True, False, False, False]  # one always stays


# --- tokens ---------------------------------------------------------------------------------------------------------


def test_patches_round_trip():
    images = torch.randint(256, (3, 32, 32), dtype=torch.uint8)
    patches = nano_ar.to_patches(images)
    assert patches[1, 9].tolist() == images[1, 4:8, 4:8].flatten().tolist()  # patch 9 = row 1, column 1
    assert nano_ar.from_patches(patches, (8, 8)).equal(images)


def test_kmeans_is_lloyds_algorithm():
    g = torch.Generator().manual_seed(0)
    points = torch.cat([torch.zeros(300, 2), torch.randn(200, 2, generator=g)])  # many equal points, like black patches
    error = lambda c: float(kernels.nearest_code(points, c, return_distance=True)[1].mean())
    errors = [error(nano_ar.kmeans(points, 12, torch.Generator().manual_seed(1), rounds=r)) for r in range(8)]
    assert all(b <= a + 1e-6 for a, b in zip(errors, errors[1:])) and errors[-1] < 0.9 * errors[0]
    codebook = nano_ar.kmeans(points, 12, torch.Generator().manual_seed(1), rounds=60)
    nearest = torch.cdist(points, codebook).argmin(1)
    means = torch.stack([points[nearest == k].mean(0) for k in range(12)])  # nan if a code were unused
    torch.testing.assert_close(codebook, means, atol=1e-5, rtol=0)


def test_kmeans_starts_from_distinct_points():
    points = torch.cat([torch.zeros(1000, 1), torch.tensor([[1.0], [2.0], [50.0], [51.0]])])
    for seed in range(10):
        nearest = kernels.nearest_code(points, nano_ar.kmeans(points, 5, torch.Generator().manual_seed(seed), rounds=5))
        assert sorted(nearest.unique().tolist()) == list(range(5))


def toy_images(n=40, seed=0):
    images, labels = nano_ar.glyphs(2 * n, seed)
    return nano_ar.Images("toy", images[:n], labels[:n], images[n:], labels[n:])


def test_codebook_round_trip():
    data = toy_images()
    g = torch.Generator().manual_seed(0)
    codebook = nano_ar.kmeans(nano_ar.to_patches(data.train).flatten(0, 1).float(), 32, g)
    tokens = nano_ar.patch_tokens(data, codebook, torch.device("cpu"))
    rebuilt = tokens.decode(tokens.test)
    again = nano_ar.patch_tokens(nano_ar.Images("", rebuilt, data.test_labels, rebuilt, data.test_labels), codebook.round(), torch.device("cpu"))
    assert again.decode(again.test).equal(rebuilt)  # a picture made of codewords is its own nearest picture
    slow = torch.cdist(nano_ar.to_patches(data.test).double(), codebook.double()).argmin(-1)
    assert (slow == tokens.test).double().mean() > 0.999


def test_pixel_tokens_are_exact():
    levels = torch.randint(16, (4, 8, 8))
    images = (levels.float() / 15 * 255).round().byte().repeat_interleave(4, 1).repeat_interleave(4, 2)
    data = nano_ar.Images("", images, torch.zeros(4, dtype=torch.long), images, torch.zeros(4, dtype=torch.long))
    tokens = nano_ar.pixel_tokens(data, 8, 16)
    assert tokens.test.equal(levels.flatten(1)) and tokens.decode(tokens.test).equal(images)


class ToyDecoder(torch.nn.Module):
    def forward(self, tokens):
        return (tokens.float() / 7).view(-1, 4, 4).repeat_interleave(8, 1).repeat_interleave(8, 2)


def write_token_folder(folder):
    data = toy_images()
    tokens = lambda images: (torch.nn.functional.avg_pool2d(images[:, None].float(), 8).flatten(1) / 255 * 7).round().long()
    folder.mkdir()
    np.savez_compressed(folder / "tokens.npz", train_tokens=tokens(data.train), test_tokens=tokens(data.test), train_labels=data.train_labels,
                        test_labels=data.test_labels, train_images=data.train, test_images=data.test, grid=np.array([4, 4]), codebook_size=8)
    batch = torch.export.Dim("batch", min=1, max=1 << 20)
    program = torch.export.export(ToyDecoder(), (torch.zeros(2, 16, dtype=torch.long),), dynamic_shapes=({0: batch},))
    torch.export.save(program, folder / "decoder.pt2")


def test_token_folder(tmp_path, capsys):
    write_token_folder(tmp_path / "tok")
    data, tokens = nano_ar.read_token_folder(tmp_path / "tok")
    torch.testing.assert_close(tokens.decode(tokens.test), (ToyDecoder()(tokens.test) * 255).round().byte())
    metrics = nano_ar.main(["--tokens", str(tmp_path / "tok"), "--out", str(tmp_path / "out"), "--steps", "2", *TINY])
    assert metrics["tokens_per_image"] == 16 and math.isfinite(metrics["gfd"])
    (tmp_path / "tok" / "decoder.pt2").write_bytes(b"nothing")
    code, _, err = run(["--tokens", str(tmp_path / "tok"), "--out", str(tmp_path / "out2"), *TINY], capsys)
    assert code == 2 and err.count("\n") == 1 and "export it again" in err


# --- data -----------------------------------------------------------------------------------------------------------


def test_glyphs_are_deterministic_and_disjoint():
    (a, la), (b, lb), (c, _) = nano_ar.glyphs(30, 0), nano_ar.glyphs(30, 0), nano_ar.glyphs(30, 1)
    assert a.equal(b) and la.equal(lb) and not a.equal(c)
    assert a.shape == (30, 32, 32) and a.dtype == torch.uint8 and (a.flatten(1).max(1).values > 150).all()
    assert a[:, 0].float().mean() < 2  # digits are not cut off at the border


def idx(array):
    return b"\0\0\x08" + bytes([array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


@pytest.fixture
def idx_file(tmp_path):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (30, 28, 28), dtype=np.uint8), rng.integers(0, 3, 30).astype(np.uint8)
    (tmp_path / "x-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
    (tmp_path / "x-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    return tmp_path / "x-images-idx3-ubyte.gz", images, labels


def test_idx_file_is_padded_and_split(idx_file):
    path, images, labels = idx_file
    data = nano_ar.load_images(str(path), seed=0)
    assert data.train.shape == (27, 32, 32) and data.test.shape == (3, 32, 32) and data.classes == 3
    together, all_labels = torch.cat([data.train, data.test]), torch.cat([data.train_labels, data.test_labels])
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2)))
    matched = {bytes(p.numpy()): int(y) for p, y in zip(together, all_labels)}
    assert matched == {p.tobytes(): int(y) for p, y in zip(padded, labels)}
    assert nano_ar.load_images(str(path), seed=0).test.equal(data.test)


def test_npz_and_folder(tmp_path, idx_file):
    from PIL import Image
    _, images, labels = idx_file
    np.savez(tmp_path / "a.npz", images=images, labels=labels)
    assert nano_ar.load_images(str(tmp_path / "a.npz")).train.shape == (27, 32, 32)
    for i, image in enumerate(images):
        folder = tmp_path / "pictures" / f"class{labels[i]}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.pad(image, 2)).save(folder / f"{i}.png")
    data = nano_ar.load_images(str(tmp_path / "pictures"))
    assert data.train.shape == (27, 32, 32)
    assert sorted(torch.cat([data.train_labels, data.test_labels]).tolist()) == sorted(labels.tolist())


def test_download_is_verified_and_never_half_done(tmp_path, monkeypatch):
    import hashlib
    import io
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NANO_DATA", raising=False)
    good = "md5:" + hashlib.md5(b"hello").hexdigest()
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: io.BytesIO(b"half a file"))
    with pytest.raises(UserError, match="put f.gz into data/"):
        nano_ar.find_file("f.gz", "https://example.org/f.gz", good)
    assert list((tmp_path / "data").iterdir()) == []
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: io.BytesIO(b"hello"))
    assert nano_ar.find_file("f.gz", "https://example.org/f.gz", good).read_bytes() == b"hello"

    def offline(*a, **k):
        raise OSError("offline")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    assert nano_ar.find_file("f.gz", "", good).exists()  # the second time no download is tried
    with pytest.raises(UserError, match="built-in data need no download"):
        nano_ar.load_images("mnist")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "g").write_bytes(b"unpacked")
    monkeypatch.setenv("NANO_DATA", str(tmp_path / "elsewhere"))
    assert nano_ar.find_file("g.gz", "", good).read_bytes() == b"unpacked"


# --- metrics --------------------------------------------------------------------------------------------------------


def test_frechet_distance_closed_forms():
    g = torch.Generator().manual_seed(0)
    a = torch.randn(400, 5, generator=g, dtype=torch.float64)
    assert abs(nano_ar.frechet_distance(a, a)) < 1e-9
    scale = torch.tensor([2.0, 1.0, 0.5, 3.0, 1.0], dtype=torch.float64)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(a.mT)), (a - a.mean(0)).mT, upper=False).mT  # covariance exactly I
    expected = (scale - 1).square().sum() + 25  # commuting covariances: sum of (s_a - s_b)^2, plus the means
    shift = torch.tensor([3.0, 4.0, 0, 0, 0], dtype=torch.float64)
    assert math.isclose(nano_ar.frechet_distance(white, white * scale + shift), expected, rel_tol=1e-9)


def test_diversity_and_nearest():
    features = torch.tensor([[0.0], [2.0], [10.0], [14.0], [99.0]], dtype=torch.float64)
    assert nano_ar.diversity(features, torch.tensor([0, 0, 1, 1, 2])) == 3.0
    pool = torch.randint(256, (50, 32, 32), dtype=torch.uint8)
    assert nano_ar.nearest_images(pool[[7, 3]], pool).tolist() == [7, 3]


def test_unigram_is_the_table_of_frequencies():
    order = make_order(1, 2, "raster")
    train = torch.tensor([[0, 1], [0, 1], [0, 0], [1, 1]])
    model = nano_ar.Unigram(train, 2, order)
    p = (3 + 0.5) / 5 * (3 + 0.5) / 5  # cell 0 is 0 in 3 of 4, cell 1 is 1 in 3 of 4; half a count is added everywhere
    assert math.isclose(nano_ar.nats_per_image(model, torch.tensor([[0, 1]]), torch.tensor([0])), -math.log(p), rel_tol=1e-6)


def test_nats_do_not_depend_on_the_batch(monkeypatch):
    model = tiny_model(vocabulary=5)
    tokens, labels = torch.randint(5, (260, 4)), torch.randint(2, (260,))
    one = np.mean([nano_ar.nats_per_image(model, t[None], y[None]) for t, y in zip(tokens, labels)])
    assert math.isclose(nano_ar.nats_per_image(model, tokens, labels), one, rel_tol=1e-12)  # 250 + a rest of 10


# --- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 24)])
def test_orthogonalize_against_svd(shape):
    torch.manual_seed(0)
    G = torch.randn(3, *shape, dtype=torch.float64)
    U, S, V = torch.linalg.svd(G, full_matrices=False)
    X = nano_ar.orthogonalize(G, dtype=torch.float64).double()
    assert (torch.linalg.svdvals(X) - 1)[S / S.max() > 0.05].abs().max() < 0.35
    inside = U.mT @ X @ V.mT  # the same singular vectors: nothing but the diagonal
    assert (inside - torch.diag_embed(inside.diagonal(dim1=-2, dim2=-1))).abs().max() < 1e-5
    torch.testing.assert_close(X[1], nano_ar.orthogonalize(G[1], dtype=torch.float64).double())


def test_muon_steps():
    p, (g1, g2) = torch.nn.Parameter(torch.zeros(8, 4)), torch.randn(2, 8, 4)
    optimizer, tall = nano_ar.Muon([p], lr=0.1), 2**0.5  # sqrt(rows / columns)
    p.grad = g1
    optimizer.step()
    torch.testing.assert_close(p.data, -0.1 * tall * nano_ar.orthogonalize(g1))
    before, p.grad = p.data.clone(), g2
    optimizer.step()
    velocity = 0.95 * 0.05 * g1 + 0.05 * g2  # two rounds of v <- 0.95 v + 0.05 g
    torch.testing.assert_close(p.data - before, -0.1 * tall * nano_ar.orthogonalize(0.05 * g2 + 0.95 * velocity))


def test_batches_visit_every_image_once_an_epoch():
    seen = torch.cat([nano_ar.batch_indices(step, 4, 10, seed=3) for step in range(5)])  # 20 = two epochs, one batch spans both
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10)) and not seen[:10].equal(seen[10:])


def test_overfits_eight_images():
    """The whole path learns: eight images, then greedy sampling returns them exactly."""
    torch.manual_seed(0)
    model = GPT(16, 8, make_order(4, 4, "diag"), 32, 2, 2)
    config = Config(lr=0.02, lr_adam=0.01, steps=150, label_dropout=0.0)
    run_ = nano_ar.Run(config, model, torch.float32)
    x, labels = torch.randint(16, (8, 16)), torch.arange(8)
    for _ in range(150):
        loss = nano_ar.train_step(run_, x[:, model.order.cells], labels, model, torch.float32)
    assert loss < 0.01 and generate(model, labels, None, temperature=0).equal(x)


def weights(folder, name="last.pt"):
    return torch.load(folder / name, weights_only=True)


def assert_same(a, b):
    if isinstance(a, torch.Tensor):
        assert a.equal(b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for k in a:
            assert_same(a[k], b[k])
    elif isinstance(a, (list, tuple)):
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


KILLER = """
import os, signal, sys, torch, nano_ar
saves, true_save = [], torch.save
def save(state, file):
    saves.append(1)
    if len(saves) == 4:  # best.pt and last.pt at step 3, best.pt at step 6; the fourth is last.pt, cut in the middle
        import io
        whole = io.BytesIO()
        true_save(state, whole)
        file.write(whole.getvalue()[:len(whole.getvalue()) // 2])
        file.flush()
        os.kill(os.getpid(), signal.{signal})
        file.seek(0), file.truncate()  # reached after SIGTERM only, which waits for the end of the step
    true_save(state, file)
torch.save = save
sys.exit(nano_ar.cli(lambda: nano_ar.main(sys.argv[1:])))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_resume_is_bit_identical_even_after_a_kill_in_the_middle_of_a_write(tmp_path):
    flags = ["train", "--steps", "9", "--eval-every", "3", *TINY]
    nano_ar.main([*flags, "--out", str(tmp_path / "straight")])
    killed = subprocess.run([sys.executable, "-c", KILLER.format(signal="SIGKILL"), *flags, "--out", str(tmp_path / "killed")],
                            cwd=ROOT, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert weights(tmp_path / "killed")["step"] == 3  # the old file, whole
    nano_ar.main(["train", "--resume", "--device", "cpu", "--out", str(tmp_path / "killed")])  # flags come from the checkpoint
    a, b = weights(tmp_path / "straight"), weights(tmp_path / "killed")
    for key in ("model", "optimizers", "step", "label_rng", "rng", "best"):
        assert_same(a[key], b[key])


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_sigterm_saves_at_a_step_boundary_and_says_how_to_resume(tmp_path):
    flags = ["train", "--steps", "9", "--eval-every", "3", *TINY]
    stopped = subprocess.run([sys.executable, "-c", KILLER.format(signal="SIGTERM"), *flags, "--out", str(tmp_path / "a")],
                             cwd=ROOT, capture_output=True, text=True)
    assert stopped.returncode == 130 and "--resume" in stopped.stderr and "Traceback" not in stopped.stderr
    state = weights(tmp_path / "a")
    assert 6 <= state["step"] < 9
    nano_ar.main([*flags, "--resume", "--out", str(tmp_path / "a")])
    nano_ar.main([*flags, "--out", str(tmp_path / "b")])
    assert_same(weights(tmp_path / "b")["model"], weights(tmp_path / "a")["model"])


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path, capsys, monkeypatch):
    out = str(tmp_path)
    nano_ar.main(["train", "--steps", "4", "--eval-every", "2", "--out", out, *TINY])
    before = (tmp_path / "last.pt").read_bytes()
    monkeypatch.setattr(nano_ar.GPT, "forward", lambda self, t, y: torch.full((*t.shape, 16), math.nan))
    code, _, err = run(["train", "--steps", "4", "--eval-every", "2", "--out", out, *TINY], capsys)
    assert code == 2 and "the loss is nan at step 0" in err and (tmp_path / "last.pt").read_bytes() == before


# --- the command line -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    metrics = nano_ar.main(["--steps", "3", "--out", str(out), *TINY])
    return out, metrics


def test_main_writes_everything(trained):
    out, metrics = trained
    names = {p.name for p in out.iterdir()}
    assert names == {"last.pt", "best.pt", "samples.npz", "samples.png", "nearest.png", "completions.png", "loss.png", "metrics.json"}
    saved = json.loads((out / "metrics.json").read_text())
    assert saved == json.loads(json.dumps(metrics))
    assert {"seconds", "peak_memory_mb", "device", "params", "seed", "tokens_per_second", "val_nats_per_image", "bits_per_image", "rpsnr", "rfd",
            "gfd", "gfd_floor", "class_accuracy", "diversity", "calls_per_image", "ms_per_image_b1", "ms_per_image_b64"} <= saved.keys()
    samples = np.load(out / "samples.npz")
    assert samples["images"].shape == (20, 32, 32) and samples["images"].dtype == np.uint8 and samples["labels"].shape == (20,)


@pytest.mark.parametrize("part", ["sample", "complete", "eval"])
def test_parts_take_the_model_from_the_checkpoint(trained, part, capsys):
    code, _, err = run([part, "--out", str(trained[0]), "--samples", "20", "--device", "cpu"], capsys)
    assert (code, err) == (0, "")


def test_same_seed_same_metrics(trained, tmp_path):
    again = nano_ar.main(["--steps", "3", "--out", str(tmp_path), *TINY])
    same = ("val_nats_per_image", "gfd", "class_accuracy", "diversity", "rfd", "gfd_floor")
    assert {k: again[k] for k in same} == {k: trained[1][k] for k in same}


def test_user_errors(trained, idx_file, tmp_path, capsys):
    out, path = str(trained[0]), idx_file[0]
    cut = tmp_path / "cut-images-idx3-ubyte"
    cut.write_bytes(idx(np.zeros((30, 28, 28), np.uint8))[:-5])
    (tmp_path / "cut.gz").write_bytes(path.read_bytes()[:-9])
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "no-images-idx3-ubyte").write_bytes(idx(np.zeros((30, 28, 28), np.uint8)))
    np.savez(tmp_path / "shape.npz", images=np.zeros((30, 20, 20), np.uint8))
    np.savez(tmp_path / "float.npz", images=np.zeros((30, 32, 32)))
    np.savez(tmp_path / "labels.npz", images=np.zeros((30, 32, 32), np.uint8), labels=np.zeros(7, int))
    np.savez(tmp_path / "names.npz", pictures=np.zeros((30, 32, 32), np.uint8))
    np.savez(tmp_path / "few.npz", images=np.zeros((9, 32, 32), np.uint8))
    (tmp_path / "nothing").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "best.pt").write_bytes((trained[0] / "best.pt").read_bytes()[:1000])
    (tmp_path / "foreign").mkdir()
    torch.save({"a": 1}, tmp_path / "foreign" / "best.pt")
    data = lambda name: ["--data", str(tmp_path / name), "--out", str(tmp_path / "o")]
    cases = {
        "invalid choice: 'zigzag'": ["--order", "zigzag"], "there is no part 'smaple'": ["smaple"], "unrecognized arguments: --ordr": ["--ordr", "diag"], "invalid int": ["--steps", "many"],
        "--steps must lie between 1": ["--steps", "0"], "--top-p must lie": ["--top-p", "1.5"], "--lr must lie": ["--lr", "nan"],
        "multiple of 4 times": ["--dim", "30", "--heads", "4"], "no such file or folder": data("missing"), "not a complete IDX": data("cut-images-idx3-ubyte"),
        "end-of-stream": data("cut.gz"), "--data": data("empty.npz"), "labels are missing": data("no-images-idx3-ubyte"), "(30, 20, 20)": data("shape.npz"),
        "float64": data("float.npz"), "one label >= 0 per image": data("labels.npz"), "images is not a file": data("names.npz"), "too few": data("few.npz"),
        "no PNG or JPEG": data("nothing"), "tokens.npz": ["--tokens", str(tmp_path), "--out", str(tmp_path / "o")],
        "cannot write there": ["--out", str(tmp_path / "file" / "x")], "no checkpoint": ["sample", "--out", str(tmp_path / "new")],
        "is no checkpoint of this script": ["sample", "--out", str(tmp_path / "broken")], "(KeyError)": ["eval", "--out", str(tmp_path / "foreign")],
        "was made with --dim 16": ["--resume", "--out", out, "--dim", "64"], "bench takes": ["bench", "--tokens", "somewhere"],
    }
    if not torch.cuda.is_available():
        cases["sees no such device"] = ["--device", "cuda"]
    before = {p: p.read_bytes() for p in trained[0].iterdir()}
    for message, argv in cases.items():
        code, _, err = run(argv, capsys)
        assert code == 2 and message in err and err.count("\n") == 1 and err.startswith(pathlib.Path(sys.argv[0]).stem), (argv, err)
    assert before == {p: p.read_bytes() for p in trained[0].iterdir()}


def test_the_program_itself(tmp_path):
    """As a user starts it: exit codes, one line on stderr, and an import that prints nothing and needs no device."""
    python = lambda *argv: subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True)
    wrong = python("nano_ar.py", "--steps", "x")
    assert wrong.returncode == 2 and wrong.stderr.startswith("nano_ar: error: ") and wrong.stderr.count("\n") == 1 and wrong.stdout == ""
    silent = python("-c", "import nano_ar, sys; assert 'matplotlib' not in sys.modules")
    assert (silent.returncode, silent.stdout, silent.stderr) == (0, "", "")


def test_check_exits_with_one(trained):
    with pytest.raises(SystemExit, match="check failed: class_accuracy") as stop:
        nano_ar.main(["eval", "--out", str(trained[0]), "--samples", "20", "--device", "cpu", "--check"])
    assert stop.value.code not in (0, None)  # a text: Python prints it and exits with 1


def test_bench_reports_speed():
    metrics = nano_ar.main(["bench", "--tokens", "pixels", "--size", "8", "--batch", "2", *TINY[:6], "--device", "cpu"])
    assert metrics["tokens_per_second"] > 0 and metrics["cache_speedup"] > 0


def test_docstring_examples():
    assert doctest.testmod(nano_ar, extraglobs={"torch": torch}).failed == 0
