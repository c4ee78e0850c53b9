"""nano_var against oracles: a slow quantizer in plain loops, brute-force masks, whole enumerations, slow twins, and killed runs."""

import doctest
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
import torch.nn.functional as F

import kernels
import nano_var
from nano_var import VAR, Known, Pyramid, Tokenizer, UserError, area, generate, parse_scales, split_maps

ROOT = pathlib.Path(__file__).parent.parent
TINY = ("--data toy.npz --width 8 --codebook 16 --code-dim 4 --dim 16 --depth 1 --heads 2 --tok-batch 8 --batch 8 --samples 20 "
        "--device cpu").split()
SCALES = [1, 2, 4, 8]


@pytest.fixture(scope="module", autouse=True)
def toy_file(tmp_path_factory):
    """400 glyphs in a file of the user's own: the runs below take a second each."""
    TINY[1] = str(tmp_path_factory.mktemp("data") / "toy.npz")
    images, labels = nano_var.glyphs(400, 0)
    np.savez(TINY[1], images=images, labels=labels)


def tiny_pyramid(scales=SCALES, size=16, dim=4, absolute=False, seed=0):
    """A quantizer in float64 with random codes and random phi."""
    torch.manual_seed(seed)
    pyramid = Pyramid(scales, size, dim, absolute)
    pyramid.codes.normal_()
    for p in pyramid.parameters():
        torch.nn.init.normal_(p, std=0.3)
    pyramid.count.fill_(1)
    return pyramid.double().eval()


def tiny_model(scales=SCALES, parallel=True, markov=False, size=16, dim=4, seed=1, adaln=False, refiner=False):
    """A generator in float64 whose zero-initialised layers are made random, so that nothing is hidden by zeros."""
    torch.manual_seed(seed)
    model = VAR(size, dim, 3, scales, parallel, markov, 16, 2, 2, adaln)
    if refiner:
        model.refiner = VAR(size, dim, 3, scales, parallel, markov, 8, 1, 2, adaln)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return model.double().eval()


MODELS = {"scales": {}, "markov": dict(markov=True), "tokens": dict(parallel=False), "raster": dict(scales=[8], parallel=False),
          "block": dict(adaln=True)}


def run(argv, capsys):
    """The command line in this process -> (exit code, stdout, stderr)"""
    code = nano_var.cli(lambda: nano_var.main(argv))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# --- the quantizer --------------------------------------------------------------------------------------------------


@torch.no_grad()
def slow_encode(f, codes, scales, phi):
    """VAR's algorithm 1, one image and one cell at a time -> tokens, sum. f (C, 8, 8)"""
    rest, total, tokens = f.clone(), torch.zeros_like(f), []
    for s in scales:
        grid, step = torch.zeros(f.shape[0], s, s, dtype=f.dtype), 8 // s
        for i, j in itertools.product(range(s), range(s)):
            mean = rest[:, i * step:(i + 1) * step, j * step:(j + 1) * step].mean((1, 2))
            index = min(range(len(codes)), key=lambda v: (codes[v] - mean).square().sum().item())
            tokens.append(index)
            grid[:, i, j] = codes[index]
        h = grid
        if s < 8:
            h = F.interpolate(grid[None], 8, mode="bicubic")[0]
            h = 0.5 * h + 0.5 * F.conv2d(h[None], *phi[s], padding=1)[0]
        total, rest = total + h, rest - h
    return tokens, total


def test_encode_against_plain_loops():
    pyramid, f = tiny_pyramid(), torch.randn(3, 4, 8, 8, dtype=torch.float64)
    phi = {int(s): (conv.weight, conv.bias) for s, conv in pyramid.phi.items()}
    tokens, fed, sums, _ = pyramid.encode(f)
    for b in range(3):
        slow_tokens, slow_sum = slow_encode(f[b], pyramid.codes, SCALES, phi)
        assert tokens[b].tolist() == slow_tokens == fed[b].tolist()
        torch.testing.assert_close(sums[-1][b], slow_sum)


def test_slices_and_mask_by_definition():
    side = [s for s in SCALES for _ in range(s * s)]
    assert len(side) == 85 and [m.shape[1] for m in split_maps(torch.zeros(1, 85), SCALES)] == [1, 4, 16, 64]
    full = [[q >= k for k in side] for q in side]
    own = [[q == k for k in side] for q in side]
    order = [[j <= i for j in range(85)] for i in range(85)]
    for name, want in {"scales": full, "markov": own, "tokens": order}.items():
        assert tiny_model(**MODELS[name]).mask(SCALES).dense().squeeze().tolist() == want
    shares = [np.mean(full), np.mean(own)]
    assert [round(s, 2) for s in shares] == [0.8, 0.6]  # of the pairs that attention without a mask would look at


@pytest.mark.parametrize("absolute", [False, True])
def test_tokens_give_the_same_image_as_the_training_pass(absolute):
    torch.manual_seed(0)
    tokenizer = Tokenizer(SCALES, 16, 4, 8, 1, absolute)
    tokenizer(torch.rand(64, 32, 32), torch.Generator().manual_seed(0))  # k-means start
    tokenizer.eval()
    images = torch.rand(5, 32, 32)
    with torch.no_grad():
        rebuilt, tokens, _ = tokenizer(images, None)
        scales = [8] if absolute else SCALES
        again = tokenizer.decode(tokenizer.pyramid.sums(tokens, scales)[-1])
        torch.testing.assert_close(rebuilt, again, atol=1e-5, rtol=0)
        coded = tokenizer.pyramid.encode(tokenizer.latents(images), scales)[0]
    assert coded.equal(tokens)
    painted = nano_var.paint(tokenizer, tokens, scales)
    torch.testing.assert_close(painted, (rebuilt.clamp(0, 1) * 255).round().byte(), atol=1, rtol=0)


def test_one_map_is_plain_vector_quantization():
    """--scales 8: nearest codes, VQ-VAE's commitment loss, gradient passed straight through, running means of the cells."""
    torch.manual_seed(0)
    pyramid = Pyramid([8], 16, 4).double()
    f = torch.randn(6, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    pyramid.start(f.detach(), torch.Generator().manual_seed(0))
    codes, count, total = pyramid.codes.clone(), pyramid.count.clone(), pyramid.total.clone()
    q, tokens, loss = pyramid(f, torch.Generator().manual_seed(0))
    cells = f.detach().permute(0, 2, 3, 1).reshape(-1, 4)
    nearest = torch.cdist(cells, codes).argmin(1)
    assert tokens.flatten().equal(nearest)
    want = codes[nearest].view(6, 8, 8, 4).permute(0, 3, 1, 2)
    torch.testing.assert_close(q.detach(), want)
    torch.testing.assert_close(loss.detach(), 1.25 * (f.detach() - want).square().mean())  # the first 1 has no parameter to move
    weights = torch.randn_like(q)
    (q * weights).sum().backward(retain_graph=True)
    torch.testing.assert_close(f.grad, weights)
    f.grad = None
    loss.backward()
    torch.testing.assert_close(f.grad, 0.25 * 2 * (f.detach() - want) / f.numel())
    hits = torch.bincount(nearest, minlength=16) / 64  # a cell of the 8 x 8 map weighs 1/64
    summed = torch.zeros_like(codes).index_add_(0, nearest, cells) / 64
    assert (0.95 * count + 0.05 * hits > 0.05 * 6 / 16).all()  # nobody dead: the next line holds for every code
    torch.testing.assert_close(pyramid.codes, (0.95 * total + 0.05 * summed) / (0.95 * count + 0.05 * hits)[:, None])


def test_codes_weigh_all_maps_the_same():
    """Two codes, all vectors of a map on one of them: the pull of a map does not depend on how many cells it has."""
    pyramid = Pyramid([1, 8], 2, 1)
    z = torch.cat([torch.full((4, 1, 1), 3.0), torch.full((4, 64, 1), 5.0)], 1)
    pyramid.count.fill_(4), pyramid.total.fill_(0)
    pyramid.update(z, torch.zeros(4, 65, dtype=torch.long), [1, 8], torch.Generator())
    assert pyramid.codes[0, 0].item() == pytest.approx(0.05 * 4 * (3 + 5) / (0.95 * 4 + 0.05 * 8))


def test_phi_gets_a_gradient_from_the_image():
    torch.manual_seed(0)
    tokenizer = Tokenizer(SCALES, 16, 4, 8, 1)
    rebuilt, _, _ = tokenizer(torch.rand(32, 32, 32), torch.Generator().manual_seed(0))
    rebuilt.square().sum().backward()
    assert all(conv.weight.grad.abs().sum() > 0 for conv in tokenizer.pyramid.phi.values())
    assert tokenizer.stem.weight.grad.abs().sum() > 0


def test_a_collapsed_codebook_is_reported_and_restart_revives_it():
    torch.manual_seed(0)
    tokenizer = Tokenizer(SCALES, 64, 4, 8, 1).train()
    images = torch.cat([nano_var.glyphs(64, 3)[0]])
    x, rng = images.float() / 255, torch.Generator().manual_seed(0)
    tokenizer(x, rng)
    pyramid = tokenizer.pyramid
    pyramid.codes[1:] = pyramid.total[1:] = 1e3  # one code near the data, all others out of reach
    f = nano_var.latents(tokenizer, images, torch.device("cpu"))
    sick = nano_var.tokenizer_metrics(tokenizer, images, f)
    assert sick["usage"] < 0.05 and sick["perplexity"] < 2 and max(sick["usage_per_map"]) < 0.05
    for _ in range(150):
        with torch.no_grad():
            tokenizer(x, rng)
    healed = nano_var.tokenizer_metrics(tokenizer, images, f)
    assert healed["usage"] > 0.9 and healed["perplexity"] > 20


def test_kmeans_start_gives_every_map_its_share():
    pyramid = Pyramid(SCALES, 32, 4)
    f = torch.randn(64, 4, 8, 8)
    pyramid.start(f, torch.Generator().manual_seed(0))
    first = area(f, 1).flatten(0, 1)
    mine = kernels.nearest_code(first, pyramid.codes[:8])
    means = torch.stack([first[mine == v].mean(0) for v in range(8)])
    assert (pyramid.codes[:8] - means).abs().max() < 0.5 * first.std()  # near a fixed point of Lloyd's algorithm
    error = lambda codes: float((first - codes[kernels.nearest_code(first, codes)]).square().mean())
    assert error(pyramid.codes[:8]) < 0.6 * first.var()


def test_kmeans_start_codes_what_the_maps_before_left_over():
    """Constant latents: the first map says all, so the later shares must be zero (phi starts as the identity)."""
    pyramid, value = Pyramid([1, 2, 8], 12, 4), torch.tensor([1.0, -2.0, 3.0, 0.5])
    pyramid.start(value.view(1, 4, 1, 1).expand(20, 4, 8, 8), torch.Generator().manual_seed(0))
    torch.testing.assert_close(pyramid.codes, torch.cat([value.expand(4, 4), torch.zeros(8, 4)]), atol=1e-5, rtol=0)


# --- teacher forcing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("absolute", [False, True])
def test_inputs_depend_on_coarser_maps_alone(absolute):
    pyramid = tiny_pyramid(absolute=absolute)
    tokens = torch.randint(16, (2, 85))
    inputs = split_maps(pyramid.inputs(tokens), SCALES)
    for k, first in enumerate([0, 1, 5, 21]):
        changed = tokens.clone()
        changed[:, first:] = (changed[:, first:] + 1 + torch.randint(15, changed[:, first:].shape)) % 16
        after = split_maps(pyramid.inputs(changed), SCALES)
        assert all(a.equal(b) for a, b in zip(inputs[:k + 1], after))
        assert k == 3 or (inputs[k + 1] != after[k + 1]).any()
    sums = pyramid.sums(tokens)
    for s, part, before in zip(SCALES[1:], inputs[1:], sums):
        torch.testing.assert_close(part, F.interpolate(before, s, mode="area").flatten(2).mT)


@pytest.mark.parametrize("name", MODELS)
def test_what_a_logit_depends_on(name):
    """A changed token of map k moves logits of later maps alone; in token order, logits of later tokens alone."""
    model, scales = tiny_model(**MODELS[name]), MODELS[name].get("scales", SCALES)
    pyramid, length = tiny_pyramid(scales), sum(s * s for s in scales)
    tokens, labels = torch.randint(16, (1, length)), torch.tensor([1])
    side = [s for s in scales for _ in range(s * s)]
    with torch.no_grad():
        logits = model(pyramid.inputs(tokens), tokens, labels)
        for t in (0, 3, length // 2, length - 1):
            changed = tokens.clone()
            changed[0, t] = (tokens[0, t] + 1) % 16
            moved = (model(pyramid.inputs(changed), changed, labels) != logits).any(-1)[0].tolist()
            later = [side[i] > side[t] if model.parallel else i > t for i in range(length)]
            assert not any(m and not x for m, x in zip(moved, later))
            assert any(moved) == any(later)


@pytest.mark.parametrize("refiner", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_masked_logits_equal_cached_logits(name, refiner, monkeypatch):
    """Training pass with the mask = sampling with the cache, fed with the same tokens: every map, every cell."""
    if refiner and not MODELS[name].get("parallel", True):
        pytest.skip("refiners need parallel maps")
    scales = MODELS[name].get("scales", SCALES)
    model, pyramid = tiny_model(**MODELS[name], refiner=refiner), tiny_pyramid(scales)
    truth, labels, seen = torch.randint(16, (3, sum(s * s for s in scales))), torch.tensor([0, 1, 2]), []

    def forced(logits, *_):
        first = sum(x.shape[1] for x in seen)
        seen.append(logits)
        return truth[:, first:first + logits.shape[1]]

    monkeypatch.setattr(kernels, "sample", forced)
    assert generate(model, pyramid, labels, None).equal(truth)
    with torch.no_grad():
        logits = model(pyramid.inputs(truth), truth, labels)
        if refiner:
            logits[:, -64:] = model.refiner(pyramid.inputs(truth), truth, labels)[:, -64:]
    torch.testing.assert_close(torch.cat(seen, 1), logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_cached_sampling_equals_the_slow_twin(name):
    scales = MODELS[name].get("scales", SCALES)
    model, pyramid, labels = tiny_model(**MODELS[name]), tiny_pyramid(scales), torch.tensor([0, 2])
    draws = [generate(model, pyramid, labels, torch.Generator().manual_seed(4), 1.7, cached=cached) for cached in (True, False)]
    assert draws[0].equal(draws[1])


def test_probabilities_of_all_pyramids_sum_to_one():
    """A model over maps 1x1 and 2x2 with 2 codes has 32 outcomes, whose probabilities are normalised only if no logit sees its own map."""
    model = tiny_model([1, 2], size=2)
    inputs_of = tiny_pyramid(size=2).inputs
    every = torch.tensor(list(itertools.product(range(2), repeat=5)))
    with torch.no_grad():
        logits = model(inputs_of(every, [1, 2]), every, torch.zeros(32, dtype=torch.long))
    log_p = logits.log_softmax(-1).gather(-1, every[..., None]).sum((1, 2))
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_samples_follow_the_enumerated_law(guidance, monkeypatch):
    """20,000 draws of maps 1x1 and 2x2 against the 32 probabilities, guidance ramp included (Pearson's chi-square)."""
    model, pyramid = tiny_model([1, 2], size=2), tiny_pyramid(size=2)
    every, labels = torch.tensor(list(itertools.product(range(2), repeat=5))), torch.ones(32, dtype=torch.long)
    with torch.no_grad():
        with_class, without = (model(pyramid.inputs(every, [1, 2]), every, y) for y in (labels, labels * 0 + model.null))
    mixed = torch.cat([with_class[:, :1], without[:, 1:] + guidance * (with_class - without)[:, 1:]], 1)  # none on the first map
    p = mixed.log_softmax(-1).gather(-1, every[..., None]).sum((1, 2)).exp()
    tokens = generate(model, pyramid, labels[:1].repeat(20000), torch.Generator().manual_seed(0), guidance)
    counts = torch.bincount((tokens * torch.tensor([16, 8, 4, 2, 1])).sum(1), minlength=32)
    assert ((counts - 20000 * p).square() / (20000 * p)).sum() < 61.1  # the 99.9 % point of chi-square with 31 degrees of freedom


def test_guidance_ramp_and_truncation():
    assert nano_var.guidance_ramp(3.0, 4) == pytest.approx([1, 5 / 3, 7 / 3, 3])
    assert nano_var.guidance_ramp(1.0, 4) == [1] * 4 and nano_var.guidance_ramp(3.0, 1) == [3.0]
    model, pyramid, labels = tiny_model(), tiny_pyramid(), torch.tensor([0, 1])
    g = lambda: torch.Generator().manual_seed(0)
    argmax = generate(model, pyramid, labels, None, temperature=0)
    assert generate(model, pyramid, labels, g(), top_k=1).equal(argmax)
    assert generate(model, pyramid, labels, g(), top_p=1e-9).equal(argmax)  # top-p keeps at least one token
    mixed = generate(model, pyramid, labels, g(), top_k=[1, 0, 1, 1])
    assert mixed[:, 0].equal(argmax[:, 0])
    with torch.no_grad():
        for k in (2, 3):  # maps 3 and 4 are greedy, given what was drawn before
            logits = model(pyramid.inputs(mixed), mixed, labels)
            assert split_maps(logits.argmax(-1), SCALES)[k].equal(split_maps(mixed, SCALES)[k])


@pytest.mark.parametrize("name, calls", [("scales", 4), ("markov", 4), ("tokens", 85), ("raster", 64), ("refiner", 5)])
def test_calls_per_image(name, calls, monkeypatch):
    kind = MODELS.get(name, dict(refiner=True))
    model, count = tiny_model(**kind), []
    original = VAR.run
    monkeypatch.setattr(VAR, "run", lambda self, *a, **k: (count.append(1), original(self, *a, **k))[1])
    generate(model, tiny_pyramid(model.scales), torch.tensor([0]), None, guidance=2.0)
    assert len(count) == calls == nano_var.calls_per_image(model, model.scales)


def test_known_cells_keep_their_codes():
    model, pyramid = tiny_model(), tiny_pyramid()
    f = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    nothing = {s: torch.zeros(s, s, dtype=torch.bool) for s in SCALES}
    everything = {s: ~m for s, m in nothing.items()}
    labels, g = torch.tensor([0, 1]), lambda: torch.Generator().manual_seed(0)
    assert generate(model, pyramid, labels, g(), known=Known(f, everything)).equal(pyramid.encode(f)[0])
    assert generate(model, pyramid, labels, g(), known=Known(f, nothing)).equal(generate(model, pyramid, labels, g()))
    left = {s: torch.arange(s)[None].expand(s, s) < s / 2 for s in SCALES} | {1: nothing[1]}
    tokens = generate(model, pyramid, labels, g(), known=Known(f, left))
    sums = [torch.zeros_like(f), *pyramid.sums(tokens)]
    for k, (s, index) in enumerate(zip(SCALES, split_maps(tokens, SCALES))):
        best = torch.cdist(area(f - sums[k], s), pyramid.codes).argmin(-1)  # the code for what is left over *now*
        assert (index == best)[:, left[s].flatten()].all()


def test_disturbed_inputs_keep_true_targets():
    pyramid, f, g = tiny_pyramid(), torch.randn(40, 4, 8, 8, dtype=torch.float64), torch.Generator().manual_seed(0)
    tokens, fed, sums, _ = pyramid.encode(f, noise=0.3, generator=g)
    assert 0.25 < (tokens != fed).double().mean() < 0.35
    clean = pyramid.encode(f)[0]
    assert split_maps(tokens, SCALES)[0].equal(split_maps(clean, SCALES)[0]) and not tokens.equal(clean)
    before = [torch.zeros_like(f), *pyramid.sums(fed)]
    for k, (s, index) in enumerate(zip(SCALES, split_maps(tokens, SCALES))):
        assert index.equal(torch.cdist(area(f - before[k], s), pyramid.codes).argmin(-1))  # what the wrong tokens left over
    distance = torch.cdist(pyramid.codes, pyramid.codes).fill_diagonal_(math.inf)
    swapped = tokens != fed
    assert fed[swapped].equal(distance.argmin(-1)[tokens[swapped]])  # a tenth of 16 codes: the one nearest


def test_absolute_targets_take_any_list_of_maps():
    model, pyramid = tiny_model(), tiny_pyramid(absolute=True)
    f = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    for scales in ([1, 2, 3, 4, 6, 8], [8], [1, 5, 8]):
        tokens = generate(model, pyramid, torch.tensor([0, 1]), torch.Generator().manual_seed(0), 1.5, scales=scales)
        assert tokens.shape == (2, sum(s * s for s in scales))
        last = split_maps(tokens, scales)[-1]
        assert pyramid.sums(tokens, scales)[-1].equal(pyramid.sums(last, [8])[-1])  # the last map is the whole picture
    coded = pyramid.encode(f, [3, 8])[0]
    assert coded[:, :9].equal(torch.cdist(area(f, 3), pyramid.codes).argmin(-1))


def test_overfits_eight_images(monkeypatch):
    """The whole path learns: eight pyramids to zero cross-entropy, then greedy sampling returns them exactly."""
    monkeypatch.setattr(nano_var, "batch_indices", lambda *a: torch.arange(8))
    config = nano_var.complete_config(nano_var.Config(codebook=16, code_dim=4, width=8, dim=32, depth=2, heads=2, lr=0.02,
                                                      lr_adam=0.01, label_dropout=0.0))
    torch.manual_seed(0)
    run_ = nano_var.Run(config, 8, torch.device("cpu"), torch.float32)
    pyramid, f = run_.tokenizer.pyramid, torch.randn(8, 4, 8, 8)
    pyramid.start(f, torch.Generator().manual_seed(0))
    run_.enter("generator"), run_.tokenizer.eval()
    for _ in range(150):
        loss, shown = nano_var.generator_loss(run_, f, torch.arange(8), run_.generator)
        run_.update(loss, 150)
    assert shown < 0.01
    assert generate(run_.generator, pyramid, torch.arange(8), None, temperature=0).equal(pyramid.encode(f)[0])


def test_the_first_loss_is_log_v_and_blocks_start_as_the_identity():
    model = VAR(16, 4, 3, SCALES, True, False, 16, 2, 2)
    tokens = torch.randint(16, (2, 85))
    assert not model(torch.randn(2, 85, 4), tokens, torch.tensor([0, 1])).any()
    x = torch.randn(2, 5, 16)
    assert model.blocks[0](x, model.places([1, 2])[1], torch.zeros(2, 96), None).equal(x)


def test_cosine_attention_ignores_lengths():
    model = tiny_model()
    tokens, labels = torch.randint(16, (2, 85)), torch.tensor([0, 1])
    inputs = tiny_pyramid().inputs(tokens)
    with torch.no_grad():
        before = model(inputs, tokens, labels)
        for block in model.blocks:
            block.qkv.weight[:32] *= 7  # q and k
        torch.testing.assert_close(model(inputs, tokens, labels), before)


def test_attention_starts_as_softmax_of_four_times_the_cosine():
    torch.manual_seed(0)
    block, x = nano_var.Block(16, 2, False).double(), torch.randn(1, 5, 16, dtype=torch.float64)
    block.proj.weight.data = torch.eye(16, dtype=torch.float64)
    places = nano_var.rope_rotations(torch.zeros(5, 2), 8)  # all at one place: nothing is turned
    got = block(x, places, torch.zeros(1, 96, dtype=torch.float64), None, kernels.causal(5)) - x
    q, k, v = (nano_var.norm(x) @ block.qkv.weight.mT)[0].view(5, 3, 2, 8).permute(1, 2, 0, 3)
    cosine = F.cosine_similarity(q[:, :, None], k[:, None], dim=-1).masked_fill(~torch.ones(5, 5).tril().bool(), -math.inf)
    torch.testing.assert_close(got[0], ((4 * cosine).softmax(-1) @ v).transpose(0, 1).flatten(1), atol=1e-6, rtol=0)


# --- evaluation and data -------------------------------------------------------------------------------------------


def test_nats_per_map_and_unigram():
    model, pyramid = tiny_model(), tiny_pyramid()
    f, labels = torch.randn(300, 4, 8, 8, dtype=torch.float64), torch.randint(3, (300,))
    tokens = pyramid.encode(f)[0]
    with torch.no_grad():
        log_p = model(pyramid.inputs(tokens), tokens, labels).log_softmax(-1)
    want = [-m.sum() / 300 for m in split_maps(log_p.gather(-1, tokens[..., None])[..., 0], SCALES)]
    torch.testing.assert_close(nano_var.nats_per_map(model, pyramid, f, labels), torch.stack(want))
    train, test = torch.tensor([[0, 1], [0, 1], [0, 0]]), torch.tensor([[0, 1], [1, 1]])
    p = [[3.5 / 4, 0.5 / 4], [1.5 / 4, 2.5 / 4]]  # counts and half a count, of each slot
    assert nano_var.unigram_nats(train, test, 2) == pytest.approx(-math.log(p[0][0] * p[1][1] * p[0][1] * p[1][1]) / 2)


def test_batches_visit_every_image_once_an_epoch():
    seen = torch.cat([nano_var.batch_indices(step, 7, 30, 0) for step in range(30)])
    assert all(epoch.sort().values.equal(torch.arange(30)) for epoch in seen.split(30))


def test_rotary_positions_share_one_picture():
    """Cells of different maps that lie at the same place have the same phase; scores depend on differences of places alone."""
    centres = [nano_var.cell_centres(s) for s in SCALES]
    assert centres[3].view(8, 8, 2)[2, 5].tolist() == [2, 5]
    for coarse, fine in zip(centres, centres[1:]):
        side = int(len(fine) ** 0.5)
        assert coarse.equal(fine.view(side // 2, 2, side // 2, 2, 2).mean((1, 3)).flatten(0, 1))
    q, k = torch.randn(2, 8, dtype=torch.float64)
    score = lambda a, b: (nano_var.rotate(q, nano_var.rope_rotations(torch.tensor([a]), 8)) * nano_var.rotate(k, nano_var.rope_rotations(torch.tensor([b]), 8))).sum()
    torch.testing.assert_close(score([1.5, 1.5], [3.0, 0.0]), score([4.5, 2.5], [6.0, 1.0]))
    assert abs(score([1.5, 1.5], [3.0, 0.0]) - score([1.5, 1.5], [0.0, 3.0])) > 1e-3


def test_random_lists_of_maps():
    g = torch.Generator().manual_seed(0)
    lists = [nano_var.random_scales(g) for _ in range(400)]
    assert all(s[0] == 1 and s[-1] == 8 and s == sorted(set(s)) for s in lists)
    assert all(0.3 < np.mean([side in s for s in lists]) < 0.5 for side in range(2, 8))


# --- runs -----------------------------------------------------------------------------------------------------------


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
import os, signal, sys, torch, nano_var
saves, true_save = [], torch.save
def save(state, file):
    saves.append(1)
    if len(saves) == {at}:
        import io
        whole = io.BytesIO()
        true_save(state, whole)
        file.write(whole.getvalue()[:len(whole.getvalue()) // 2])
        file.flush()
        os.kill(os.getpid(), signal.{signal})
        file.seek(0), file.truncate()  # reached after SIGTERM only, which waits for the end of the step
    true_save(state, file)
torch.save = save
sys.exit(nano_var.cli(lambda: nano_var.main(sys.argv[1:])))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def same_threads():
    """Sums depend on how many threads share them: bit-identical means with the same number."""
    return os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}


# saves: last.pt at tokenizer steps 3, 6; then best.pt, last.pt at generator steps 3, 6
@pytest.mark.parametrize("at, stage", [(2, "tokenizer"), (5, "generator")])
@pytest.mark.parametrize("extra", [[], ["--noise", "0.2", "--refiner", "8"]], ids=["plain", "noise"])
def test_resume_is_bit_identical_even_after_a_kill_in_the_middle_of_a_write(tmp_path, at, stage, extra):
    flags = ["train", "--tok-steps", "6", "--steps", "6", "--eval-every", "3", *extra, *TINY]
    nano_var.main([*flags, "--out", str(tmp_path / "straight")])
    killed = subprocess.run([sys.executable, "-c", KILLER.format(at=at, signal="SIGKILL"), *flags, "--out", str(tmp_path / "killed")],
                            cwd=ROOT, capture_output=True, env=same_threads())
    assert killed.returncode == -signal.SIGKILL
    assert (weights(tmp_path / "killed")["stage"], weights(tmp_path / "killed")["step"]) == (stage, 3)  # the old file, whole
    nano_var.main(["train", "--resume", "--device", "cpu", "--out", str(tmp_path / "killed")])  # flags come from the checkpoint
    a, b = weights(tmp_path / "straight"), weights(tmp_path / "killed")
    for key in ("model", "optimizers", "stage", "step", "run_rng", "rng", "best"):
        assert_same(a[key], b[key])


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_sigterm_saves_at_a_step_boundary_and_says_how_to_resume(tmp_path):
    flags = ["train", "--tok-steps", "4", "--steps", "4", "--eval-every", "2", *TINY]
    stopped = subprocess.run([sys.executable, "-c", KILLER.format(at=1, signal="SIGTERM"), *flags, "--out", str(tmp_path / "a")],
                             cwd=ROOT, capture_output=True, text=True, env=same_threads())
    assert stopped.returncode == 130 and "--resume" in stopped.stderr and "Traceback" not in stopped.stderr
    assert weights(tmp_path / "a")["stage"] == "tokenizer"
    nano_var.main([*flags, "--resume", "--out", str(tmp_path / "a")])
    nano_var.main([*flags, "--out", str(tmp_path / "b")])
    assert_same(weights(tmp_path / "b")["model"], weights(tmp_path / "a")["model"])


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path, capsys, monkeypatch):
    flags = ["train", "--tok-steps", "2", "--steps", "4", "--eval-every", "2", "--out", str(tmp_path), *TINY]
    nano_var.main(flags)
    before = (tmp_path / "best.pt").read_bytes()
    monkeypatch.setattr(VAR, "forward", lambda self, x, t, y, s=None: torch.full((*t.shape, 16), math.nan))
    code, _, err = run(flags, capsys)
    assert code == 2 and "generator is nan at step 0" in err and err.count("\n") == 1
    assert (tmp_path / "best.pt").read_bytes() == before


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One tiny run of everything -> its folder, its metrics"""
    out = tmp_path_factory.mktemp("run") / "out"
    return out, nano_var.main(["--tok-steps", "4", "--steps", "4", "--eval-every", "2", "--out", str(out), *TINY])


def test_main_writes_everything(trained):
    out, metrics = trained
    pictures = {"samples.png", "nearest.png", "maps.png", "training.png", "inpainting.png", "outpainting.png", "editing.png",
                "superresolution.png"}
    assert {p.name for p in out.iterdir()} == pictures | {"samples.npz", "metrics.json", "last.pt", "best.pt"}
    assert json.loads((out / "metrics.json").read_text()) == metrics
    asked = ("seconds", "peak_memory_mb", "device", "params", "seed", "tokens_per_second", "val_nats_per_image", "bits_per_image", "rpsnr", "rfd",
             "gfd", "gfd_floor", "class_accuracy", "diversity", "usage", "perplexity", "calls_per_image", "ms_per_image_b1", "ms_per_image_b64")
    assert set(asked) <= set(metrics) and metrics["calls_per_image"] == 4 and metrics["tokens_per_image"] == 85
    assert sum(metrics["nats_per_map"]) == pytest.approx(metrics["val_nats_per_image"])
    with np.load(out / "samples.npz") as file:
        assert file["images"].shape == (20, 32, 32) and file["tokens"].shape == (20, 85)


@pytest.mark.parametrize("part", ["sample", "eval", "edit"])
def test_parts_take_the_model_from_the_checkpoint(trained, part):
    metrics = nano_var.main([part, "--out", str(trained[0]), "--samples", "20", "--device", "cpu"])
    if part == "eval":
        same = [k for k in trained[1] if not k.startswith(("ms_", "seconds", "peak", "tokens_per_second"))]
        assert {k: metrics[k] for k in same} == {k: trained[1][k] for k in same}


OPTIONS = {"raster": ["--order", "raster"], "tokens": ["--order", "tokens", "--scales", "2,8"], "markov": ["--mask", "markov"],
           "absolute": ["--targets", "absolute", "--sample-scales", "1,2,3,8", "--top-k", "0,8,8,4"],
           "all": ["--refiner", "8", "--noise", "0.1", "--adaln", "block", "--top-p", "1,1,0.9,0.8"]}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_run_from_end_to_end(name, tmp_path):
    metrics = nano_var.main(["--tok-steps", "3", "--steps", "3", "--out", str(tmp_path), *OPTIONS[name], *TINY])
    assert math.isfinite(metrics["gfd"]) and (tmp_path / "superresolution.png").exists()
    assert metrics["calls_per_image"] == {"raster": 64, "tokens": 68, "markov": 4, "absolute": 4, "all": 5}[name]


def test_a_borrowed_tokenizer_is_not_trained_again(trained, tmp_path):
    at = TINY.index("--width")
    flags = TINY[:at] + TINY[at + 2:]  # without --width 8: the sizes come from the file
    nano_var.main(["train", "--tokenizer", str(trained[0] / "best.pt"), "--mask", "markov", "--steps", "2", "--out", str(tmp_path), *flags])
    assert_same(weights(tmp_path)["model"]["tokenizer"], weights(trained[0])["model"]["tokenizer"])
    assert weights(tmp_path)["config"]["width"] == 8


def test_compare(tmp_path, capsys):
    flags = ["compare", "--seeds", "2", "--tok-steps", "2", "--steps", "2", "--out", str(tmp_path), *TINY]
    results = nano_var.main(flags)
    table = capsys.readouterr().out
    assert set(results) == {"raster", "tokens", "scales", "markov"} and [m["calls_per_image"] for m in results["scales"]] == [4, 4]
    assert (tmp_path / "compare.png").exists() and json.loads((tmp_path / "compare.json").read_text()) == results
    gfd = [m["sweep"][1]["gfd"] for m in results["tokens"]]  # guidance 1.5
    text = f"{np.mean(gfd):.2f} ± {abs(gfd[0] - gfd[1]) / 2:.2f}"  # of two values: s = |a - b| / sqrt 2, over sqrt 2
    assert text in table
    assert results["scales"][0]["sweep"][1]["gfd"] == results["scales"][0]["gfd"]  # guidance 1.5 is the default
    shared = [weights(tmp_path / f"{name}-1")["model"]["tokenizer"] for name in ("tokens", "scales", "markov")]
    assert_same(shared[0], shared[1]), assert_same(shared[0], shared[2])
    assert nano_var.main([*flags, "--resume"]) == results  # nothing is trained twice
    assert ", seed 1" not in capsys.readouterr().out


def test_bench_reports_every_variant():
    result = nano_var.main(["bench", *TINY[2:]])
    assert [result[name]["calls_per_image"] for name in ("raster", "tokens", "scales", "markov")] == [64, 85, 4, 4]


def test_user_errors(trained, tmp_path, capsys):
    out = str(trained[0])
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "best.pt").write_bytes((trained[0] / "best.pt").read_bytes()[:1000])
    half = weights(trained[0])
    torch.save(half | {"stage": "tokenizer"}, tmp_path / "half.pt")
    torch.save({"config": {}, "model": {}}, tmp_path / "foreign.pt")
    o = ["--out", str(tmp_path / "o")]
    cases = [
        ("invalid choice: 'zigzag'", ["--order", "zigzag"]), ("there is no part 'smaple'", ["smaple"]), ("unrecognized arguments: --ordr", ["--ordr", "x"]),
        ("must rise strictly", ["--scales", "1,4,2,8"]), ("must rise strictly", ["--scales", "1,2,4"]), ("must rise strictly", ["--scales", "0,8"]),
        ("separated by commas", ["--scales", "1;2"]), ("--lr must lie", ["--lr", "nan"]), ("3 numbers, but there are 4 maps", ["--top-k", "1,2,3"]),
        ("p must be above 0", ["--top-p", "1.5"]), ("p must be above 0", ["--top-p", "nan"]), ("p must be above 0", ["--top-p", "0"]), ("k must be 0", ["--top-k", "-1"]), ("multiple of 4 times the 4 heads", ["--dim", "30"]),
        ("multiple of 4 times the 4 heads", ["--refiner", "30"]), ("--mask markov: it needs", ["--mask", "markov", "--order", "tokens"]),
        ("--refiner: it needs", ["--refiner", "16", "--scales", "8"]), ("--noise", ["--noise", "0.1", "--targets", "absolute"]),
        ("--sample-scales: it needs", ["--sample-scales", "1,8"]), ("must rise strictly", ["--sample-scales", "1,9", "--targets", "absolute"]),
        ("--targets absolute: it needs", ["--targets", "absolute", "--order", "tokens"]), ("no such file or folder", ["--data", "missing", *o]),
        ("no checkpoint", ["sample", "--out", str(tmp_path / "new")]), ("is no checkpoint", ["sample", "--out", str(tmp_path / "broken")]),
        ("was made with --dim 16", ["--resume", "--out", out, "--dim", "64"]), ("no checkpoint", ["--tokenizer", str(tmp_path / "none.pt"), *o]),
        ("not finished", ["--tokenizer", str(tmp_path / "half.pt"), *o]), ("not a checkpoint of nano_var", ["--tokenizer", str(tmp_path / "foreign.pt"), *o]),
        ("was made with --codebook 16", ["--tokenizer", f"{out}/best.pt", "--codebook", "64", *o]),
    ]
    before = {p: p.read_bytes() for p in trained[0].iterdir()}
    for message, argv in cases:
        code, _, err = run(argv, capsys)
        assert code == 2 and message in err and err.count("\n") == 1, (argv, err)
    assert before == {p: p.read_bytes() for p in trained[0].iterdir()}
    with pytest.raises(UserError):
        parse_scales("8,8")


def test_the_program_itself():
    """As a user starts it: exit codes, one line on stderr, and an import that prints nothing and needs no device."""
    python = lambda *argv: subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True)
    wrong = python("nano_var.py", "--steps", "x")
    assert wrong.returncode == 2 and wrong.stderr.startswith("nano_var: error: ") and wrong.stderr.count("\n") == 1 and wrong.stdout == ""
    silent = python("-c", "import nano_var, sys; assert 'matplotlib' not in sys.modules")
    assert (silent.returncode, silent.stdout, silent.stderr) == (0, "", "")


def test_check_exits_with_one(trained):
    with pytest.raises(SystemExit, match="check failed: class_accuracy"):
        nano_var.main(["eval", "--out", str(trained[0]), "--samples", "20", "--device", "cpu", "--check"])


def test_docstring_examples():
    assert doctest.testmod(nano_var, extraglobs={"torch": torch}).failed == 0
