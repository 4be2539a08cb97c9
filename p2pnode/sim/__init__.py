"""The simulated world: virtual time and an in-memory network behind the same Protocols as the real machine. Imports any layer below 11."""
