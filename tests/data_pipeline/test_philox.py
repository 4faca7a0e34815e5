import numpy as np
import pytest

from data_pipeline.philox import philox, shuffled, uniform


@pytest.mark.parametrize(
    ("seed", "counter", "expected"),
    [
        (0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (2**64 - 1, (2**32 - 1,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            0x299F31D0A4093822,
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers_of_its_authors(seed, counter, expected):
    assert tuple(philox(seed, *counter).tolist()) == expected


def test_a_seed_outside_64_bits_is_refused_and_uniform_numbers_are_below_1():
    with pytest.raises(ValueError, match="seed"):
        philox(-1, 0)
    lowest, highest = uniform(np.array([0, 2**32 - 1], np.uint32))
    assert lowest == 0
    assert highest < 1


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 17, 64, 1000, 4097])
def test_a_shuffle_by_positions_is_a_permutation_and_does_not_depend_on_what_is_asked_together(n):
    whole = shuffled(np.arange(n), n, 5, 1, 2, 3)
    assert sorted(whole.tolist()) == list(range(n))
    assert [int(shuffled(np.array([i]), n, 5, 1, 2, 3)[0]) for i in range(min(n, 20))] == whole[:20].tolist()


def test_a_shuffle_by_positions_looks_random():
    n, draws = 300, 400
    tables = np.stack([shuffled(np.arange(n), n, 9, 3, i, 0) for i in range(draws)])
    # Where an element goes is uniform over the positions: chi-squared with 9 degrees of freedom per element.
    counts = np.stack([np.bincount(column // 30, minlength=10) for column in tables.T])
    chi = ((counts - draws / 10) ** 2 / (draws / 10)).sum(1)
    assert abs(chi.mean() - 9) < 0.75
    # Neighbours do not stay neighbours, and half of all pairs change their order.
    assert (np.abs(np.diff(tables)) == 1).mean() < 0.01
    assert abs((np.diff(tables) > 0).mean() - 0.5) < 0.01
