-- Records that this node itself publishes in the hash table. One row a salt; what is held for others is memory only.
CREATE TABLE own_records (
    salt BLOB PRIMARY KEY CHECK (length(salt) <= 64),
    value BLOB NOT NULL CHECK (length(value) <= 1000),
    life_ms INTEGER NOT NULL CHECK (life_ms > 0),
    sequence INTEGER NOT NULL CHECK (sequence >= 1),
    expires_ms INTEGER NOT NULL,
    envelope BLOB NOT NULL,
    stored_ms INTEGER NOT NULL DEFAULT 0,
    acks INTEGER NOT NULL DEFAULT 0 CHECK (acks >= 0),
    asked INTEGER NOT NULL DEFAULT 0 CHECK (asked >= acks)
) STRICT;
