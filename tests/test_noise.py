import hashlib

import numpy as np
import pytest
import torch

from repkit.noise import NOISE_VERSION, SHARED, batch_noise, noise_like

DIGESTS = [hashlib.sha256(bytes([index])).digest() for index in range(64)]
SHAPE = (3, 4, 5)


def draw(**changes):
    given = {"seed": 0, "digest": b"an image", "t": 261, "draw": 0} | changes
    return noise_like(SHAPE, **given)


def test_golden_values():
    golden = [-1.0987458229, -1.3169770240, -0.1056085005, -0.6297339798, 0.8973203897, 0.4324891269]
    found = noise_like((2, 3), seed=0, digest=b"an image", t=261, draw=0)
    assert found.dtype == torch.float32 and found.shape == (2, 3)
    np.testing.assert_allclose(found.flatten().numpy(), golden, rtol=1e-7)


def test_golden_hash_of_a_larger_draw():
    found = noise_like((4, 64, 64), seed=7, digest=bytes(range(32)), t=0.26, draw=3).numpy().astype("<f4")
    golden = "0e5735c212c1679bb29ecac7b93626a705f2cc71854ae66cf88fbe1310f813e2"
    assert (NOISE_VERSION, hashlib.sha256(found.tobytes()).hexdigest()) == (1, golden)


@pytest.mark.parametrize("batch", [1, 7, 64])
@pytest.mark.parametrize("threads", [1, 2])
def test_noise_does_not_depend_on_batch_order_or_threads(batch, threads):
    alone = torch.stack([noise_like(SHAPE, seed=3, digest=digest, t=50, draw=1) for digest in DIGESTS])
    torch.set_num_threads(threads)
    try:
        parts = [
            batch_noise(SHAPE, seed=3, digests=DIGESTS[start : start + batch], t=50, draw=1)
            for start in reversed(range(0, 64, batch))
        ]
    finally:
        torch.set_num_threads(1)
    assert torch.equal(torch.cat(parts[::-1]), alone)
    backwards = batch_noise(SHAPE, seed=3, digests=DIGESTS[::-1], t=50, draw=1)
    assert torch.equal(backwards.flip(0), alone)


@pytest.mark.parametrize("change", [{"seed": 1}, {"seed": -1}, {"t": 262}, {"t": 261.5}, {"draw": 1}, {"digest": b"x"}])
def test_each_part_of_the_key_matters(change):
    assert (draw(**change) - draw()).abs().min() > 0


def test_an_integer_time_and_the_same_float_are_one():
    assert torch.equal(draw(t=261), draw(t=261.0))


def test_equal_digests_share_their_noise():
    shared = batch_noise(SHAPE, seed=0, digests=[SHARED] * 3, t=1, draw=0)
    assert torch.equal(shared[0], shared[1]) and torch.equal(shared[0], shared[2])


def test_the_global_generators_are_neither_read_nor_moved():
    torch.manual_seed(5)
    before, expected = torch.get_rng_state(), draw()
    np.random.seed(9)
    torch.manual_seed(6)
    assert torch.equal(draw(), expected)
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_large_draw_is_standard_normal():
    values = noise_like((1_000_000,), seed=0, digest=b"", t=0, draw=0).double()
    moments = [(values**power).mean().item() for power in (1, 2, 3, 4)]
    np.testing.assert_allclose(moments, [0, 1, 0, 3], atol=0.05)
    pairs = (values[:-1] * values[1:]).mean().item()
    assert abs(pairs) < 0.005


def test_images_are_independent_of_each_other():
    noise = batch_noise((2000,), seed=0, digests=DIGESTS[:8], t=10, draw=0).double()
    correlation = np.corrcoef(noise.numpy())
    assert np.abs(correlation - np.eye(8)).max() < 0.1
