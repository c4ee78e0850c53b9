"""nano_var against oracles: a quantizer in plain loops, masks by definition, enumerated models, slow twins.

What nano_var shares word for word with nano_ar (data, judge, Muon, chance) is tested in test_ar.py.
"""
import itertools
import json
import math
import pathlib
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import kernels
import nano_var
from nano_var import SCALES, VAR, Pyramid, Tokenizer, area, generate, split_maps

FOLDER = pathlib.Path(nano_var.__file__).parent
TINY = ("--data toy.npz --width 8 --codebook 16 --code-dim 4 --dim 32 --depth 1 --batch 8 --samples 20 "
        "--device cpu").split()
PYRAMIDS = torch.tensor(list(itertools.product(range(2), repeat=5)))  # all 32 of the maps 1x1, 2x2, two codes


@pytest.fixture(scope="module", autouse=True)
def toy_file(tmp_path_factory):
    TINY[1] = str(tmp_path_factory.mktemp("data") / "toy.npz")
    images, labels = nano_var.glyphs(400, 0)                     # so that each run below takes a second or two
    np.savez(TINY[1], images=images, labels=labels)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def tiny_pyramid(scales=SCALES, size=16, dim=4):
    """In float64, with random codes and random phi."""
    torch.manual_seed(0)
    pyramid = Pyramid(scales, size, dim)
    for p in (pyramid.codes, *pyramid.parameters()):
        nn.init.normal_(p, std=0.3)
    return pyramid.double().eval().requires_grad_(False)


def tiny_model(scales=SCALES, size=16, dim=4):
    """A VAR of three classes in float64, random where layers start at zero: zeros hide errors."""
    torch.manual_seed(1)
    model = VAR(size, dim, 3, scales, dim=16, depth=2, heads=2)
    for p in model.parameters():
        nn.init.normal_(p, std=0.4)
    return model.double().eval().requires_grad_(False)


def stopped(argv, capsys):
    """Run a command that must end as a user's mistake -> what it says."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        nano_var.run_as_program(lambda: nano_var.main(argv))
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("nano_var: ") and said.count("\n") == 1, (argv, said)
    return said


# --- pyramid ---------------------------------------------------------------------------------------------
def slow_encode(f, pyramid):
    """VAR's algorithm 1, one image and one cell at a time: f (C, 8, 8) -> tokens, sum."""
    rest, total, tokens = f.clone(), torch.zeros_like(f), []
    for s in SCALES:
        h, step = torch.zeros(len(f), s, s, dtype=f.dtype), 8 // s
        for i, j in itertools.product(range(s), range(s)):
            mean = rest[:, i * step:(i + 1) * step, j * step:(j + 1) * step].mean((1, 2))
            tokens.append(min(range(16), key=lambda v: (pyramid.codes[v] - mean).square().sum().item()))
            h[:, i, j] = pyramid.codes[tokens[-1]]
        if s < 8:
            phi, h = pyramid.phi[str(s)], F.interpolate(h[None], 8, mode="bicubic")
            h = (0.5 * h + 0.5 * F.conv2d(h, phi.weight, phi.bias, padding=1))[0]
        total, rest = total + h, rest - h
    return tokens, total


def test_encode_against_plain_loops_and_decode_is_its_inverse():
    pyramid, f = tiny_pyramid(), torch.randn(3, 4, 8, 8, dtype=torch.float64, generator=seeded(0))
    tokens, sums, vectors = pyramid.encode(f)
    for b in range(3):
        slow_tokens, slow_sum = slow_encode(f[b], pyramid)
        assert tokens[b].tolist() == slow_tokens
        torch.testing.assert_close(sums[-1][b], slow_sum, atol=1e-12, rtol=0)
    inputs, again = pyramid.decode(tokens)
    for one, other in zip(sums, again, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)
    for k, part in enumerate(split_maps(vectors)):              # what was coded: f less the sums before
        torch.testing.assert_close(part, area(f - sums[k - 1] if k else f, SCALES[k]), atol=1e-12, rtol=0)
    assert vectors.shape == inputs.shape == (3, 85, 4)


def test_inputs_depend_on_coarser_maps_alone():
    pyramid, tokens = tiny_pyramid(), torch.randint(16, (2, 85), generator=seeded(0))
    inputs, sums = pyramid.decode(tokens)
    parts = split_maps(inputs)
    assert not parts[0].any()
    for k, first in enumerate([0, 1, 5, 21]):
        changed = tokens.clone()
        changed[:, first:] = (changed[:, first:] + 1) % 16      # map k and all finer ones
        after = split_maps(pyramid.decode(changed)[0])
        assert all(a.equal(b) for a, b in zip(parts[:k + 1], after))
        assert k == 3 or not parts[k + 1].equal(after[k + 1])
    for side, part, before in zip(SCALES[1:], parts[1:], sums):
        torch.testing.assert_close(part, F.interpolate(before, side, mode="area").flatten(2).mT)


def test_one_map_is_plain_vector_quantization():
    """Nearest codes, VQ-VAE's commitment loss, the gradient straight through, running means of the cells."""
    pyramid = Pyramid((8,), 16, 4).double()
    f = torch.randn(6, 4, 8, 8, dtype=torch.float64, generator=seeded(0)).requires_grad_()
    cells = f.detach().permute(0, 2, 3, 1).reshape(-1, 4)
    pyramid.codes.copy_(cells[:16])
    pyramid.count.fill_(1)
    pyramid.total.copy_(pyramid.codes)
    codes, nearest = pyramid.codes.clone(), torch.cdist(cells, cells[:16]).argmin(1)
    q, loss = pyramid(f, seeded(0))
    want = codes[nearest].view(6, 8, 8, 4).permute(0, 3, 1, 2)
    torch.testing.assert_close(q.detach(), want)
    torch.testing.assert_close(loss.detach(), 1.25 * (f.detach() - want).square().mean())
    weights = torch.randn_like(q)
    gradient, = torch.autograd.grad((q * weights).sum(), f, retain_graph=True)
    torch.testing.assert_close(gradient, weights)
    torch.testing.assert_close(torch.autograd.grad(loss, f)[0], 0.25 * 2 * (f.detach() - want) / f.numel())
    hits = torch.bincount(nearest, minlength=16) / 64            # a cell of the 8 x 8 map weighs 1/64
    sums = torch.zeros_like(codes).index_add_(0, nearest, cells) / 64
    assert (0.95 + 0.05 * hits > 0.05 * 6 / 16).all()            # nobody is dead: all codes are running means
    torch.testing.assert_close(pyramid.codes, (0.95 * codes + 0.05 * sums) / (0.95 + 0.05 * hits)[:, None])


@pytest.mark.parametrize("maps", [1, 2, 3, None])
def test_loss_of_all_sums_and_the_gradient_of_a_preview(maps):
    """In eval mode, in float64: 1.25 of the mean error; a preview's gradient reaches f through its coarse cells."""
    pyramid = tiny_pyramid()
    f = torch.randn(2, 4, 8, 8, dtype=torch.float64, generator=seeded(0)).requires_grad_()
    q, loss = pyramid(f, None, maps)
    sums, weights = pyramid.encode(f.detach())[1], torch.randn(2, 4, 8, 8, dtype=torch.float64, generator=seeded(1))
    torch.testing.assert_close(q.detach(), sums[(maps or 4) - 1])
    error = sum((f.detach() - s).square().mean() for s in sums) / 4
    torch.testing.assert_close(loss.detach(), 1.25 * error)
    pulled = 0.25 * 2 * sum(f.detach() - s for s in sums) / 4 / f.numel()    # phi has no gradient here
    torch.testing.assert_close(torch.autograd.grad(loss, f, retain_graph=True)[0], pulled)
    got, = torch.autograd.grad((q * weights).sum(), f)
    side, wanted = SCALES[(maps or 4) - 1], torch.zeros(2, 4, 8, 8, dtype=torch.float64)
    for i, j in itertools.product(range(side), range(side)):     # one coarse cell at a time
        one, width = torch.zeros(2, 4, side, side, dtype=torch.float64), 8 // side
        one[:, :, i, j] = 1
        share = (F.interpolate(one, 8, mode="bicubic") * weights).sum((2, 3)) / width**2
        wanted[:, :, i * width:(i + 1) * width, j * width:(j + 1) * width] = share[..., None, None]
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("scales, previews", [(SCALES, [1, 2, 3, 1]), ((8,), 4 * [None]), ((2, 8), 4 * [1])])
def test_every_fourth_step_of_the_tokenizer_is_a_preview(scales, previews, monkeypatch):
    seen, true_forward = [], Tokenizer.forward
    monkeypatch.setattr(Tokenizer, "forward", lambda *a: seen.append(a[-1]) or true_forward(*a))
    images = nano_var.glyphs(40, 0)[0]
    config = SimpleNamespace(seed=0, tok_steps=17, tok_lr=0.02, codebook=16)
    data = SimpleNamespace(train_images=images, test_images=images)
    nano_var.train_tokenizer(config, Tokenizer(scales, 16, 4, 8), data)
    assert seen[3::4] == previews and len(seen) == 17
    assert [maps for i, maps in enumerate(seen) if i % 4 != 3] == 13 * [None]


def test_codes_weigh_all_maps_the_same():
    """All vectors on one of two codes: the pull of a map does not depend on how many cells it has."""
    pyramid = Pyramid((1, 8), 2, 1)
    vectors = torch.cat([torch.full((4, 1, 1), 3.0), torch.full((4, 64, 1), 5.0)], 1)
    pyramid.count.fill_(4)
    pyramid.update(vectors, torch.zeros(4, 65, dtype=torch.long), seeded(0))
    wanted = 0.05 * 4 * (3 + 5) / (0.95 * 4 + 0.05 * 8)
    assert math.isclose(pyramid.codes[0, 0], wanted, rel_tol=1e-6)


def test_all_codes_are_dead_at_first_and_restarts_fill_the_codebook():
    """64 codes for one cloud of points: all in use soon. Then one fits all, the others lie far away: again."""
    pyramid, rng = Pyramid((8,), 64, 4).train(), seeded(0)
    points = torch.randn(4096, 4, generator=rng)

    def fit(steps):
        for _ in range(steps):
            f = points[torch.randint(4096, (16, 64), generator=rng)].mT.unflatten(2, (8, 8))
            pyramid(f, rng)
        return nano_var.usage(kernels.nearest_code(points, pyramid.codes), 64)

    share, perplexity = fit(60)
    assert share > 0.95 and perplexity > 40
    pyramid.codes[1:] = pyramid.total[1:] = 1e3
    assert nano_var.usage(kernels.nearest_code(points, pyramid.codes), 64) == (1 / 64, 1)
    share, perplexity = fit(100)
    assert share > 0.95 and perplexity > 40


# --- tokenizer -------------------------------------------------------------------------------------------
def test_tokens_give_the_same_image_as_the_training_pass():
    torch.manual_seed(0)
    tokenizer, images = Tokenizer(SCALES, 16, 4, 8), nano_var.glyphs(30, 0)[0]
    with torch.no_grad():
        tokenizer(images / 255, seeded(0))                       # fills the codebook
        rebuilt, _ = tokenizer.eval()(images / 255, None)
    tokens = nano_var.encode(images, tokenizer)
    painted = nano_var.decode(tokens, tokenizer)
    torch.testing.assert_close(painted, (255 * rebuilt).round().byte(), atol=1, rtol=0)
    assert tokens.shape == (30, 85) and not nano_var.decode(tokens, tokenizer, 1).equal(painted)
    other = tokens.clone()
    other[:, 5:] = 0                                             # a preview of two maps does not see the others
    assert nano_var.decode(other, tokenizer, 2).equal(nano_var.decode(tokens, tokenizer, 2))


def test_every_weight_of_the_tokenizer_gets_a_gradient_and_an_optimizer():
    torch.manual_seed(0)
    tokenizer = Tokenizer(SCALES, 16, 4, 8)
    nn.init.normal_(tokenizer.encoder.second)                    # zeros would stop the gradient of `first`
    nn.init.normal_(tokenizer.decoder.second)
    for _ in range(2):                                           # all codes are 0 in the first pass
        rebuilt, extra = tokenizer(torch.rand(32, 32, 32), seeded(0))
    (rebuilt.square().mean() + extra).backward()
    assert all(p.grad.abs().sum() > 0 for p in tokenizer.parameters())
    config = SimpleNamespace(tok_lr=0.1)
    muon, adam = (o.param_groups[0]["params"] for o in nano_var.tokenizer_optimizers(tokenizer, config, torch.float32))
    assert sorted(map(id, muon + adam)) == sorted(map(id, tokenizer.parameters()))
    assert {p.shape for p in muon} == {(8, 72)}


def test_tokenizer_learns(tmp_path):
    """60 steps on 400 glyphs: above 15 dB, and most codes are in use; what `train_tokenizer` reports is so."""
    images = nano_var.glyphs(400, 0)[0]
    config = SimpleNamespace(seed=0, tok_steps=60, tok_lr=0.02, codebook=64)
    data = SimpleNamespace(train_images=images[:360], test_images=images[360:])
    torch.manual_seed(0)
    tokenizer = Tokenizer(SCALES, 64, 8, 16)
    history = nano_var.train_tokenizer(config, tokenizer, data, path=tmp_path / "a.pt")
    assert [entry["step"] for entry in history] == [15, 30, 45, 60]
    tokens = nano_var.encode(data.test_images, tokenizer.eval())
    measured = nano_var.psnr(nano_var.decode(tokens, tokenizer), data.test_images)
    assert measured == history[-1]["psnr"] > 15 and history[-1]["error"] < history[0]["error"]
    assert history[-1]["usage"] == nano_var.usage(tokens, 64)[0] and history[-1]["usage"] > 0.5
    rates = [saved["param_groups"][0]["lr"] for saved in torch.load(tmp_path / "a.pt")["optimizers"]]
    torch.testing.assert_close(rates, [0.02 / 60, 0.01 / 60], rtol=1e-9, atol=0)


# --- transformer and sampling ------------------------------------------------------------------------------
def test_masked_logits_equal_cached_logits(monkeypatch):
    """The training pass with its mask = sampling with its cache, fed the same tokens: each map, each cell."""
    model, pyramid, seen = tiny_model(), tiny_pyramid(), []
    truth, labels = torch.randint(16, (3, 85), generator=seeded(0)), torch.tensor([0, 1, 2])
    monkeypatch.setattr(kernels, "sample", lambda logits, *_, **__: seen.append(logits))
    forced = generate(model, pyramid, labels, None, change=lambda k, *_: split_maps(truth)[k])
    assert forced.equal(truth) and len(seen) == 4                # four calls for an image
    logits = model(pyramid.decode(truth)[0], labels)
    torch.testing.assert_close(torch.cat(seen, 1), logits, atol=1e-10, rtol=0)


def test_what_a_logit_depends_on():
    """A changed token of map k moves logits of later maps alone, and the class moves all."""
    model, pyramid = tiny_model(), tiny_pyramid()
    tokens, labels = torch.randint(16, (1, 85), generator=seeded(0)), torch.tensor([1])
    side = torch.tensor([s for s in SCALES for _ in range(s * s)])
    before = model(pyramid.decode(tokens)[0], labels)
    assert (model(pyramid.decode(tokens)[0], labels - 1) - before).abs().amax(-1).min() > 1e-4
    for t in (0, 3, 12, 42, 84):
        changed = tokens.clone()
        changed[0, t] = (tokens[0, t] + 1) % 16
        moved = (model(pyramid.decode(changed)[0], labels) - before).abs().amax((0, 2))
        assert moved[side <= side[t]].max() < 1e-12
        assert side[t] == 8 or moved[side > side[t]].max() > 1e-4
    nn.init.zeros_(model.condition.weight)                      # without AdaLN the class still enters at slot 0
    nn.init.zeros_(model.final.weight)
    apart = model(pyramid.decode(tokens)[0], labels) - model(pyramid.decode(tokens)[0], labels - 1)
    assert apart[:, 0].abs().max() > 1e-4


def law_of(model, pyramid, guidance, temperature, last_top_p):
    """Exact probabilities of the 32 pyramids of class 1: slow and literal."""
    inputs, labels = pyramid.decode(PYRAMIDS)[0], torch.ones(32, dtype=torch.long)
    a, b = model(inputs, labels), model(inputs, labels + 2)     # with the class, and as class "none"
    mixed = torch.cat([a[:, :1], b[:, 1:] + guidance * (a - b)[:, 1:]], 1)  # no guidance at the first map
    p = (mixed / temperature).softmax(-1)                       # (32, 5, 2)
    for row in itertools.chain(*p[:, 1:]):
        if row.max() >= last_top_p:                             # the likelier of the two is enough
            row[row.argmin()] = 0
    return (p / p.sum(-1, keepdim=True)).gather(-1, PYRAMIDS[..., None]).prod(1)[:, 0]


@pytest.mark.parametrize("how", [(1, 1, 1), (2.5, 1, 1), (0, 1, 1), (1.7, 0.6, 1), (1.7, 0.6, 0.7)])
def test_samples_follow_the_enumerated_law(how, monkeypatch):
    """10,000 draws of the maps 1x1 and 2x2. Chi-square of 32 cells: 99.9 % lie below 61.1."""
    monkeypatch.setattr(nano_var, "SIDE", 2)
    model, pyramid, n = tiny_model((1, 2), 2), tiny_pyramid((1, 2), 2), 10_000
    law, labels = law_of(model, pyramid, *how), torch.ones(n, dtype=torch.long)
    assert math.isclose(law.sum(), 1, abs_tol=1e-9)              # so no logit has seen its own map
    drawn = generate(model, pyramid, labels, seeded(1), how[0], how[1], (1, how[2]))
    counts, common = torch.bincount(drawn @ torch.tensor([16, 8, 4, 2, 1]), minlength=32), law * n > 3
    assert counts[law == 0].sum() == 0 and ((law == 0).any() or how[2] == 1)
    assert ((counts - law * n)[common] ** 2 / (law * n)[common]).sum() < 61.1


def test_top_p_is_a_number_for_each_map_and_greedy_is_argmax():
    model, pyramid, labels = tiny_model(), tiny_pyramid(), torch.tensor([0, 1])
    greedy = generate(model, pyramid, labels, None, temperature=0)
    assert greedy.equal(model(pyramid.decode(greedy)[0], labels).argmax(-1))
    drawn = generate(model, pyramid, labels, seeded(0), top_p=(1, 1, 1e-9, 1e-9))
    best = split_maps(model(pyramid.decode(drawn)[0], labels).argmax(-1))
    maps = split_maps(drawn)
    assert [m.equal(b) for m, b in zip(maps, best)][1:] == [False, True, True]
    free = generate(model, pyramid, labels, seeded(0))           # the same numbers: the same maps where not cut
    assert [m.equal(f) for m, f in zip(maps, split_maps(free))] == [True, True, False, False]


def test_change_is_told_the_sum_and_its_tokens_are_kept():
    """An edit codes anew what is left over; all cells changed: the tokens of f; none: as without."""
    model, pyramid, labels = tiny_model(), tiny_pyramid(), torch.tensor([0, 1])
    f = torch.randn(2, 4, 8, 8, dtype=torch.float64, generator=seeded(0))

    def keep(cells):
        def change(k, total, drawn):
            kept = pyramid.nearest(area(f - total, SCALES[k]), k)
            return torch.where(split_maps(cells[None])[k], kept, drawn)
        return generate(model, pyramid, labels, seeded(1), 1.5, change=change)

    assert keep(torch.ones(85, dtype=bool)).equal(pyramid.encode(f)[0])
    assert keep(torch.zeros(85, dtype=bool)).equal(generate(model, pyramid, labels, seeded(1), 1.5))


def test_draw_cuts_only_the_last_map(monkeypatch):
    seen, true_sample = [], kernels.sample
    monkeypatch.setattr(kernels, "sample", lambda *a, top_p, **k: seen.append(top_p) or true_sample(*a, **k))
    config = SimpleNamespace(seed=0, guidance=1.0, temperature=1.0, last_top_p=0.3)
    drawn = nano_var.draw(config, tiny_model(), tiny_pyramid(), torch.arange(101) % 3)
    assert seen == [1, 1, 1, 0.3] * 2 and drawn.shape == (101, 85)


def test_the_first_loss_is_log_v_and_blocks_start_as_the_identity():
    model = VAR(16, 4, 3, SCALES, 32, 2, 1)
    tokens, labels = torch.randint(16, (2, 85)), torch.tensor([0, 1])
    pyramid = tiny_pyramid().float()
    loss = nano_var.nats(model, pyramid, tokens, labels)
    torch.testing.assert_close(loss, torch.full((2, 85), math.log(16)))
    x = torch.randn(2, 85, 32)
    assert model.blocks[0](x, model.cos, model.sin, torch.zeros(2, 192), kernels.causal(85)).equal(x)


def test_attention_starts_as_softmax_of_four_times_the_cosine_and_ignores_lengths():
    torch.manual_seed(0)
    block, x = nano_var.Block(16, 2).double(), torch.randn(1, 5, 16, dtype=torch.float64)
    block.proj.weight.data = torch.eye(16, dtype=torch.float64)
    still = nano_var.rope_table(torch.zeros(5, 2, dtype=torch.float64), 8)  # all at one place: nothing turns
    got = block(x, *still, torch.zeros(1, 96, dtype=torch.float64), kernels.causal(5)) - x
    q, k, v = (nano_var.norm(x) @ block.qkv.weight.mT)[0].view(5, 3, 2, 8).permute(1, 2, 0, 3)
    cosine = F.cosine_similarity(q[:, :, None], k[:, None], dim=-1)
    cosine = cosine.masked_fill(~torch.ones(5, 5).tril().bool(), -math.inf)
    wanted = ((4 * cosine).softmax(-1) @ v).transpose(0, 1).flatten(1)
    torch.testing.assert_close(got[0], wanted, atol=1e-6, rtol=0)
    with torch.no_grad():
        block.qkv.weight[:32] *= 7                               # q and k
    again = block(x, *still, torch.zeros(1, 96, dtype=torch.float64), kernels.causal(5)) - x
    torch.testing.assert_close(again, got)


def test_all_maps_share_one_picture():
    """A coarse cell lies in the middle of its fine ones; a score knows how far apart two cells are."""
    centres = [nano_var.places(s) for s in SCALES]
    assert centres[3].view(8, 8, 2)[2, 5].tolist() == [2, 5] and centres[0].tolist() == [[3.5, 3.5]]
    for coarse, fine, side in zip(centres, centres[1:], SCALES):
        assert coarse.equal(fine.view(side, 2, side, 2, 2).mean((1, 3)).flatten(0, 1))
    q, k = torch.randn(2, 1, 16, generator=seeded(0))
    table = nano_var.rope_table(torch.tensor([[1.5, 1.5], [3.0, 0.0], [4.5, 2.5], [6.0, 1.0], [0.0, 3.0]]), 16)
    scores = nano_var.rotate(q, *table) @ nano_var.rotate(k, *table).mT
    torch.testing.assert_close(scores[0, 1], scores[2, 3])
    assert not torch.isclose(scores[0, 1], scores[0, 4])


# --- training of the transformer, evaluation ----------------------------------------------------------------
def eight_images(**changed):
    data = SimpleNamespace(train_tokens=torch.randint(16, (8, 85), generator=seeded(0)), train_labels=torch.arange(8))
    data.test_tokens, data.test_labels = data.train_tokens, data.train_labels
    config = SimpleNamespace(**{"seed": 0, "lr": 0.02, "steps": 120, "batch": 8, **changed})
    torch.manual_seed(0)
    return config, VAR(16, 4, 8, SCALES, 32, 2, 1), tiny_pyramid().float(), data


def test_overfits_eight_images():
    """The whole path learns: eight pyramids, then greedy sampling returns them exactly."""
    config, model, pyramid, data = eight_images()
    history = nano_var.train(config, model, pyramid, data)
    assert [entry["step"] for entry in history] == [24, 48, 72, 96, 120] and history[-1]["test"] < 0.5
    assert generate(model, pyramid, data.train_labels, None, temperature=0).equal(data.train_tokens)


def test_what_a_training_step_sees_and_moves(tmp_path):
    """A tenth of the classes is hidden; each parameter has one optimizer; rates fall to 0 on a line."""
    (config, model, pyramid, data), seen = eight_images(lr=1e-4, steps=100), []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs) if torch.is_grad_enabled() else None)
    nano_var.train(config, model, pyramid, data, path=tmp_path / "a.pt")
    inputs, labels = (torch.cat(column) for column in zip(*seen))
    hidden = labels == model.null
    assert len(labels) == 800 and 0.065 < hidden.double().mean() < 0.135
    assert pyramid.decode(data.train_tokens)[0][labels[~hidden]].equal(inputs[~hidden])
    muon, adam = (o.param_groups[0]["params"] for o in nano_var.make_optimizers(model, config, torch.float32))
    assert all(p.ndim == 2 for p in muon) and len(muon) == 2 * 4
    assert sorted(map(id, muon + adam)) == sorted(map(id, model.parameters()))
    rates = [saved["param_groups"][0]["lr"] for saved in torch.load(tmp_path / "a.pt")["optimizers"]]
    torch.testing.assert_close(rates, [1e-4 / 100, 0.25e-4 / 100], rtol=1e-9, atol=0)


def test_nats_per_map_unigram_and_usage():
    model, pyramid = tiny_model(), tiny_pyramid()
    tokens, labels = torch.randint(16, (260, 85), generator=seeded(0)), torch.arange(260) % 3
    log_p = model(pyramid.decode(tokens)[0], labels).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    wanted = [-m.sum().item() / 260 for m in split_maps(log_p)]
    assert np.allclose(nano_var.nats_per_map(model, pyramid, tokens, labels), wanted, rtol=1e-6)
    tokens, labels = torch.randint(3, (30, 4), generator=seeded(0)), torch.arange(30) % 3 // 2
    data = SimpleNamespace(train_tokens=tokens[:24], train_labels=labels[:24], test_tokens=tokens[24:],
                           test_labels=labels[24:], classes=2, codebook_size=3)
    nats = 0.0
    for image, label in zip(data.test_tokens, data.test_labels):
        same = data.train_tokens[data.train_labels == label]
        for slot in range(4):
            nats -= math.log(((same[:, slot] == image[slot]).sum() + 0.05) / (len(same) + 3 * 0.05))
    assert math.isclose(nano_var.unigram_nats(data), nats / 6, rel_tol=1e-5)
    share, perplexity = nano_var.usage(torch.tensor([[0, 0], [3, 3]]), 4)
    assert share == 0.5 and math.isclose(perplexity, 2)


# --- runs --------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    return out, nano_var.main(["--tok-steps", "3", "--steps", "3", "--out", str(out), *TINY])


def test_main_writes_everything(trained):
    out, metrics = trained
    assert {path.name for path in out.iterdir()} == {"last.pt", "samples.npz", "samples.png", "nearest.png",
                                                     "maps.png", "tail.png", "metrics.json"}
    assert json.loads((out / "metrics.json").read_text()) == metrics
    names = """seconds params seed tokens_per_second val_nats_per_image unigram_nats_per_image rpsnr rfd gfd
        gfd_floor class_accuracy diversity usage perplexity calls_per_image ms_per_image_b1 ms_per_image_b64"""
    assert all(math.isfinite(metrics[name]) for name in names.split()) and metrics["device"] == "cpu"
    assert metrics["calls_per_image"] == 4 and metrics["rpsnr"] == metrics["rpsnr_per_map"][-1]
    assert math.isclose(sum(metrics["nats_per_map"]), metrics["val_nats_per_image"])
    samples = np.load(out / "samples.npz")
    assert samples["images"].shape == (20, 32, 32) and samples["images"].dtype == np.uint8
    assert samples["labels"].tolist() == nano_var.load_images(TINY[1], 0)[3][:20].tolist()  # as in the test set


def test_eval_takes_the_models_from_the_checkpoint(trained, tmp_path):
    for name in ("last.pt", "metrics.json"):
        (tmp_path / name).write_bytes((trained[0] / name).read_bytes())
    alone = nano_var.main(["eval", "--out", str(tmp_path), "--device", "cpu"])
    for name in alone.keys() - {"seconds", "ms_per_image_b1", "ms_per_image_b64"}:
        assert trained[1][name] == alone[name], name
    first, second = (np.load(folder / "samples.npz")["images"] for folder in (trained[0], tmp_path))
    assert first.tobytes() == second.tobytes()


def test_usual_mistakes_cost_one_line_and_nothing_else(trained, tmp_path, capsys):
    before = {path: path.read_bytes() for path in trained[0].iterdir()}
    (tmp_path / "last.pt").write_bytes(before[trained[0] / "last.pt"][:1000])
    for said, argv in {"--ordr": ["--ordr=diag"], "--lr nan": ["--lr", "nan"], "multiple of 32": ["--dim", "48"],
                       "missing.npz": ["--data", "missing.npz"], "--codebook 64": ["--resume", "--codebook", "64"],
                       "train first": ["eval", "--out", str(tmp_path / "new")],
                       "is broken": ["sample", "--out", str(tmp_path)]}.items():
        assert said in stopped(["--out", str(trained[0]), *argv], capsys), argv
    assert before == {path: path.read_bytes() for path in trained[0].iterdir()}
    command = [sys.executable, "nano_var.py", "--steps", "x"]    # as a user starts it
    ended = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stdout == "" and ended.stderr.count("\n") == 1
