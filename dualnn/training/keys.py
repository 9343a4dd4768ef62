"""One number per training step, from which all random directions of that step follow."""

_MASK = (1 << 64) - 1


def _splitmix64(state: int) -> int:
    """The finaliser of SplitMix64: a bijection of 64-bit numbers in which every input bit moves every output bit."""
    state = (state + 0x9E3779B97F4A7C15) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)


def step_key(seed: int, batch: int, rank: int = 0) -> int:
    r"""Mix seed, batch counter and rank into a key.

    With :math:`h` the SplitMix64 mixing function,

    .. math:: \mathrm{key} = h(h(h(\mathrm{seed}) \oplus \mathrm{batch}) \oplus \mathrm{rank}) \bmod 2^{63}.

    Nothing is stored and no random generator is touched: a resumed run, which knows its batch counter, finds the
    same directions again, and shuffling and dropout are those of a run without a signal. The key has 63 bits, so
    that `torch.Generator.manual_seed` takes it as it is.

    Args:
        seed: The run's seed (any integer).
        batch: Batches seen since the run began, over all epochs and resumptions.
        rank: The process, where there are several.

    Reference:
        Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.

    Example:
        >>> step_key(0, 0) == step_key(0, 0), step_key(0, 0) == step_key(0, 1)
        (True, False)
    """
    return _splitmix64(_splitmix64(_splitmix64(seed & _MASK) ^ batch) ^ rank) >> 1
