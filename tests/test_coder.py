"""The coder of the course: the oracles of lesson 23, and runs of many tokens a call, as later lessons drive it."""

import math

import pytest
import torch

from lessons import coder
from lessons.checks import lesson_23


@pytest.mark.parametrize("name", ["quantise", "Encoder", "Decoder", "pixel_tokens", "raster"])
def test_the_part_stands_the_examination_of_the_lesson(name):
    getattr(lesson_23, f"check_{name}").check(getattr(coder, name))  # raises Wrong


def pyramid(B, seed):
    """A run of 1, 4, 9 tokens a call, each scale with its own vocabulary; the laws depend on all that was sent."""
    rng, heard = torch.Generator().manual_seed(seed), torch.zeros(B, 1, 1)
    for n, V in ((1, 5), (4, 300), (9, 2)):
        logits = 3 * torch.randn(1, n, V, generator=rng)
        tokens = yield logits * torch.cos(heard)
        heard = heard + tokens.sum(1).view(B, 1, 1)


def draw(B, seed):
    """Tokens (B, 14) that the pyramid may meet."""
    rng = torch.Generator().manual_seed(seed + 100)
    return torch.cat([torch.randint(V, (B, n), generator=rng) for n, V in ((1, 5), (4, 300), (9, 2))], 1)


@pytest.mark.parametrize("B, files, bits", [(1, 1, 24), (3, 1, 16), (6, 6, 12), (6, 2, 32)])
def test_runs_of_many_tokens_a_call(B, files, bits):
    tokens = draw(B, bits)
    written = coder.compress(pyramid(B, bits), tokens, files=files, bits=bits)
    assert len(written) == files
    assert coder.decompress(pyramid(B, bits), written, bits=bits).equal(tokens)
    information, run, done = 0.0, pyramid(B, bits), 0  # -log2 of the rounded laws, in floats
    part = None
    for n, V in ((1, 5), (4, 300), (9, 2)):
        sizes = coder.quantise(run.send(part).softmax(-1), bits)
        part = tokens[:, done:done + n]
        information -= (sizes.gather(2, part[..., None]).double() / 2**bits).log2().sum().item()
        done += n
    length = sum(map(len, written))
    assert information / 8 - 1e-6 < length + files and length <= math.ceil(information / 8) + files


def test_another_run_reads_other_tokens():
    tokens = draw(4, 0)
    assert not coder.decompress(pyramid(4, 1), coder.compress(pyramid(4, 0), tokens)).equal(tokens)


def test_a_file_cut_short_or_foreign_reads_as_something():
    assert coder.decompress(pyramid(2, 0), [b""]).shape == (2, 14)
    assert coder.decompress(pyramid(2, 0), [b"\xff" * 40]).shape == (2, 14)
