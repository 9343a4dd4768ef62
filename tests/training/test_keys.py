from itertools import product

from dualnn.training.keys import step_key


def test_keys_differ_in_every_argument_and_fit_63_bits():
    keys = {step_key(*arguments) for arguments in product(range(-2, 8), range(50), range(4))}
    assert len(keys) == 10 * 50 * 4
    assert all(0 <= key < 2**63 for key in keys)


def test_keys_are_those_of_earlier_releases():
    # A checkpoint of an earlier release must go on with the same directions.
    assert step_key(0, 0) == 1279368494785126216 and step_key(7, 919, 3) == 3872922928877319768


def test_neighbouring_keys_share_no_pattern():
    # Each of the 63 bits is set in about half of the keys: 1000 draws, 6 standard deviations.
    keys = [step_key(0, batch) for batch in range(1000)]
    for bit in range(63):
        assert abs(sum(key >> bit & 1 for key in keys) - 500) < 6 * 1000**0.5 / 2
