"""Hashes, keys, signatures, the Noise handshake and Merkle trees. Imports layer 0 only; no I/O, randomness is an argument."""
