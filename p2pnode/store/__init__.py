"""Layer 3: durable rows. SQL as plain functions of a connection, typed rows, numbered migrations. Imports layers 0 to 2."""
