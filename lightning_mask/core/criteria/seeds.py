"""Seeds that depend on a name."""

import hashlib


def named_seed(seed: int, name: str) -> int:
    """Return a 63-bit seed that differs from tensor to tensor and from seed to seed, the same on every machine."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big") >> 1
