"""Log lines: one JSON object each, or short lines without control characters."""

import io
import json
import logging

import pytest

from p2pnode.errors import ConfigError
from p2pnode.node.logs import configure_logs


@pytest.fixture
def log_stream():
    stream = io.StringIO()
    yield stream
    logging.getLogger("p2pnode").handlers.clear()
    logging.getLogger("p2pnode").propagate = True


def test_json_lines_carry_level_text_and_extra_fields(log_stream):
    configure_logs("info", as_json=True, stream=log_stream)
    logging.getLogger("p2pnode.test").info("hello %s", "world", extra={"peer": "abc"})
    logging.getLogger("p2pnode.test").debug("not shown")
    (line,) = log_stream.getvalue().splitlines()
    told = json.loads(line)
    assert (told["level"], told["text"], told["peer"], told["logger"]) == ("info", "hello world", "abc", "p2pnode.test")
    assert told["time"].endswith("+00:00")


def test_plain_lines_escape_what_a_peer_could_send_to_a_terminal(log_stream):
    configure_logs("info", stream=log_stream)
    logging.getLogger("p2pnode.test").warning("name \x1b[2J\nfake line")
    (line,) = log_stream.getvalue().splitlines()
    assert "warning name \\x1b[2J\\nfake line" in line


def test_an_error_shows_its_traceback(log_stream):
    configure_logs("info", as_json=True, stream=log_stream)
    try:
        raise ValueError("inner")
    except ValueError as error:
        logging.getLogger("p2pnode.test").error("outer", exc_info=error)
    assert "ValueError: inner" in json.loads(log_stream.getvalue())["error"]


def test_configuring_twice_does_not_double_lines(log_stream):
    configure_logs("info", stream=log_stream)
    configure_logs("info", stream=log_stream)
    logging.getLogger("p2pnode.test").info("once")
    assert log_stream.getvalue().count("once") == 1


def test_an_unknown_level_is_named():
    with pytest.raises(ConfigError, match="loud"):
        configure_logs("loud")
