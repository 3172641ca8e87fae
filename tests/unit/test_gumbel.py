"""The sampling noise: the published generator, the right law, uncorrelated streams."""

import math

import torch

from megaopd.rollout.hf import _signed, _splitmix64, gumbel


def test_splitmix64_gives_the_published_sequence():
    """The first outputs for the seed 1234567, as the reference implementation prints them."""
    gamma = 0x9E3779B97F4A7C15
    states = torch.tensor([_signed(1234567 + gamma * (i + 1)) for i in range(3)])
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [x % (1 << 64) for x in _splitmix64(states).tolist()] == expected


def test_moments_of_the_gumbel_law():
    noise = gumbel(torch.arange(2000), step=3, vocab=500)
    assert noise.shape == (2000, 500) and bool(noise.isfinite().all())
    assert abs(float(noise.mean()) - 0.577216) < 0.01
    assert abs(float(noise.var()) - math.pi**2 / 6) < 0.02


def test_neighbouring_streams_are_uncorrelated():
    seeds = torch.arange(2000)
    streams = [gumbel(seeds, 1, 50), gumbel(seeds, 2, 50), gumbel(seeds + 1, 1, 50)]
    streams.append(gumbel(seeds, 1, 51)[:, 1:])
    correlation = torch.corrcoef(torch.stack([s.flatten() for s in streams]))
    assert float((correlation - torch.eye(4)).abs().max()) < 0.02


def test_a_row_depends_on_its_own_seed_alone():
    many, one = gumbel(torch.tensor([5, 6, 7]), 4, 9), gumbel(torch.tensor([6]), 4, 9)
    assert torch.equal(many[1:2], one)
