"""The messages, one module per layer that speaks them. Numbers and field names are never reused."""
