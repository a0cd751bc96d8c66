"""Random states that depend on numbers alone, such as a seed and a place, so that any part can be made without those before."""

import numpy as np
import torch


def rng_of(*numbers: int) -> torch.Generator:
    """A random state that depends on all the numbers; on the CPU: the same draws on every device."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> 1))
