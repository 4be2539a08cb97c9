"""Models held on this machine: name, size and last use, which decide what a full cache gives up first."""

import sqlite3
from dataclasses import astuple, dataclass

from p2pnode.ids import MODEL, id_range
from p2pnode.store.database import columns, placeholders


@dataclass(frozen=True, slots=True)
class ModelRow:
    """One model. origin: node id of the peer it was fetched from, empty when added by file. pinned: 1 keeps it for ever.

    facts: what the work layer has found out about it, in its own encoding; empty when nothing yet.
    """

    id: bytes
    name: str
    size_bytes: int
    origin: bytes
    added_ms: int
    last_used_ms: int
    pinned: int = 0
    facts: bytes = b""


def save_model(connection: sqlite3.Connection, row: ModelRow) -> None:
    """Keep a model; for a known id, name, size, pin and facts are replaced and the first addition's time stays."""
    connection.execute(
        f"""INSERT INTO models ({columns(ModelRow)}) VALUES ({placeholders(ModelRow)})
            ON CONFLICT (id) DO UPDATE SET name = excluded.name, size_bytes = excluded.size_bytes,
            last_used_ms = max(last_used_ms, excluded.last_used_ms), pinned = excluded.pinned, facts = excluded.facts""",
        astuple(row),
    )


def get_model(connection: sqlite3.Connection, model_id: bytes) -> ModelRow | None:
    """Give a model by id."""
    row = connection.execute(f"SELECT {columns(ModelRow)} FROM models WHERE id = ?", (model_id,)).fetchone()
    return None if row is None else ModelRow(*row)


def find_models(connection: sqlite3.Connection, typed: str, limit: int = 10) -> list[ModelRow]:
    """Give models with exactly this name or an id text that starts so. Raises ValueError when it can be neither."""
    named = connection.execute(f"SELECT {columns(ModelRow)} FROM models WHERE name = ? ORDER BY id LIMIT ?", (typed, limit))
    if rows := [ModelRow(*row) for row in named]:
        return rows
    by_id = connection.execute(
        f"SELECT {columns(ModelRow)} FROM models WHERE id BETWEEN ? AND ? ORDER BY id LIMIT ?", (*id_range(MODEL, typed), limit)
    )
    return [ModelRow(*row) for row in by_id]


def list_models(connection: sqlite3.Connection) -> list[ModelRow]:
    """Give every model, last used first."""
    rows = connection.execute(f"SELECT {columns(ModelRow)} FROM models ORDER BY last_used_ms DESC, id")
    return [ModelRow(*row) for row in rows]


def use_model(connection: sqlite3.Connection, model_id: bytes, now_ms: int) -> None:
    """Note that a model was used."""
    connection.execute("UPDATE models SET last_used_ms = max(last_used_ms, ?) WHERE id = ?", (now_ms, model_id))


def set_model_facts(connection: sqlite3.Connection, model_id: bytes, facts: bytes) -> None:
    """Keep what the work layer has found out about a model."""
    connection.execute("UPDATE models SET facts = ? WHERE id = ?", (facts, model_id))


def remove_model(connection: sqlite3.Connection, model_id: bytes) -> bool:
    """Forget a model. Gives False when it was unknown."""
    return connection.execute("DELETE FROM models WHERE id = ?", (model_id,)).rowcount == 1


def models_size(connection: sqlite3.Connection) -> int:
    """Give the bytes of all models together."""
    return int(connection.execute("SELECT coalesce(sum(size_bytes), 0) FROM models").fetchone()[0])


def models_to_evict(connection: sqlite3.Connection, size_bytes_max: int) -> list[ModelRow]:
    """Give the models to remove, longest unused first, so that the rest fits; pinned ones are never among them."""
    excess = models_size(connection) - size_bytes_max
    chosen: list[ModelRow] = []
    for row in reversed(list_models(connection)):
        if excess <= 0:
            break
        if not row.pinned:
            chosen.append(row)
            excess -= row.size_bytes
    return chosen
