"""Model rows and what a full cache gives up."""

import pytest

from p2pnode.ids import MODEL, id_text
from p2pnode.store import models
from p2pnode.store.database import memory
from p2pnode.store.models import ModelRow


@pytest.fixture
def connection():
    connection = memory()
    for number in range(1, 5):
        models.save_model(
            connection, ModelRow(bytes([number]) * 32, f"model-{number}", number * 100, b"", number, number, int(number == 1))
        )
    yield connection
    connection.close()


def test_models_are_found_by_name_and_id(connection):
    row = models.get_model(connection, bytes([2]) * 32)
    assert models.find_models(connection, "model-2") == [row]
    assert models.find_models(connection, id_text(MODEL, row.id)[:10]) == [row]
    with pytest.raises(ValueError, match="character"):
        models.find_models(connection, "no such!")


def test_use_and_update_keep_the_first_addition(connection):
    models.use_model(connection, bytes([2]) * 32, 50)
    models.use_model(connection, bytes([2]) * 32, 40)
    models.set_model_facts(connection, bytes([2]) * 32, b"facts")
    models.save_model(connection, ModelRow(bytes([3]) * 32, "new", 1, b"", 99, 1))
    assert [row.name for row in models.list_models(connection)] == ["model-2", "model-4", "new", "model-1"]
    assert models.get_model(connection, bytes([3]) * 32).added_ms == 3
    assert models.get_model(connection, bytes([2]) * 32).facts == b"facts"


def test_the_longest_unused_go_first_and_pinned_ones_never(connection):
    assert models.models_size(connection) == 1000
    assert models.models_to_evict(connection, 1000) == []
    assert [row.size_bytes for row in models.models_to_evict(connection, 790)] == [200, 300]
    assert [row.size_bytes for row in models.models_to_evict(connection, 0)] == [200, 300, 400]
    assert models.remove_model(connection, bytes([4]) * 32)
    assert not models.remove_model(connection, bytes([4]) * 32)
