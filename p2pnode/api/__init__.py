"""The control API: HTTP over a Unix socket that only the owner can open, and the client for it. Imports layers 0 to 11."""
