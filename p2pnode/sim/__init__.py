"""The simulated world: virtual time and an in-memory network behind the real machine's Protocols. Imports layers below 11."""
