"""The hash table: routing table, lookups, upkeep, storing, this node's own records; and the service that drives them."""
