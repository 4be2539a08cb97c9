"""What the hash table holds: signed records and provider notices, and what checking them may cost. Pure."""
