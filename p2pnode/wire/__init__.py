"""Bytes on the wire: strict msgpack, registered messages, signed envelopes, tensors. Imports layers 0 and 1 only; no I/O."""
