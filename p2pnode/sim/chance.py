"""Seeded randomness for experiments: draws depend on the seed and a name, so that one more draw elsewhere changes nothing."""

import hashlib
import math
import random  # noqa: TID251 - seeded: a simulation must give the same run again

Random = random.Random


def seeded(seed: int, name: str) -> Random:
    """Give a generator of its own for one purpose."""
    return Random(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest())


def exponential(chance: Random, mean: float) -> float:
    """Give a memoryless duration."""
    return chance.expovariate(1.0 / mean)


def weibull(chance: Random, mean: float, shape: float) -> float:
    """Give a duration with a heavy tail for shape < 1: most are short, few very long.

    Measured sessions of peer-to-peer nodes fit shapes of 0.34 to 0.59 (Stutzbach & Rejaie, IMC 2006).
    """
    return chance.weibullvariate(mean / math.gamma(1.0 + 1.0 / shape), shape)
