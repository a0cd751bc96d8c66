"""Random states that depend on numbers alone, such as a seed and a place, so that any part can be made without those before."""

import numpy as np
import torch


def rng_of(*numbers: int) -> torch.Generator:
    """A random state that depends on all the numbers; on the CPU: the same draws on every device."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> 1))


def on_host(rng: torch.Generator) -> torch.Generator:
    """A random state for what decides shapes, which a device would have to be waited for: `rng`, if it is the host's.

    Else one that depends on the seed of `rng` alone: the same each time.
    """
    return rng if rng.device.type == "cpu" else torch.Generator().manual_seed(rng.initial_seed())
