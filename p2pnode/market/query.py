"""Searching offers: a query compiled once, run over every listing, with an account of who was left out and why.

The conditions that must all hold are tried one by one, those over what an offer says before those over what this node knows, so
that most offers cost a comparison of two numbers. A comparison with something unknown is false, `!=` too; only `= unknown` and
`!= unknown` speak of that. `not` turns the outcome round, whatever made it.
"""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Final

from p2pnode.errors import QueryError
from p2pnode.market.listings import Listed
from p2pnode.market.query_fields import FIELDS, SEARCHED, STRANGER, UNKNOWN, Field, Sort, Source, shown
from p2pnode.market.query_language import All as AllOf
from p2pnode.market.query_language import Any as AnyOf
from p2pnode.market.query_language import Comparison, Node, Not, Value, Word, conditions, parse

DEFAULT_FILTER: Final = "not suspected not banned compatible sandbox in (full, gpu, simulated) (new or reliability>=0.8)"
DEFAULT_ORDER: Final = "price"
# What is shown of every offer, beside the fields that the query and the order name.
SHOWN: Final = ("price", "call_price", "cores", "memory", "gpu", "vram", "sandbox", "region", "reliability", "latency")
LIMIT_MAX: Final = 10_000
# Gives what this node knows of a peer: field name -> value; a name that is missing is as for a stranger.
Fields = Callable[[bytes], Mapping[str, Any]]
Test = Callable[["Row"], bool]

_COMPARE: Final = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


class Row:
    """One listing under search; what this node knows of its provider is looked up when it is first asked for."""

    __slots__ = ("_fields", "_own", "listed", "now_ms")

    def __init__(self, listed: Listed, fields: Fields, now_ms: int) -> None:
        self.listed = listed
        self.now_ms = now_ms
        self._fields = fields
        self._own: Mapping[str, Any] | None = None

    def own(self, name: str) -> Any:
        """Give what this node knows of the provider, None when it is unknown."""
        if self._own is None:
            self._own = self._fields(self.listed.provider)
        value = self._own.get(name)
        return STRANGER.get(name) if value is None else value


def reader(known: Field) -> Callable[[Row], Any]:
    """Give the function that reads a field's value, None when it is unknown."""
    get, name = known.get, known.name
    if get is None:
        return lambda row: row.own(name)
    return lambda row: get(row.listed, row.now_ms)


@dataclass(frozen=True, slots=True)
class Condition:
    """One of the conditions that must all hold. source: as typed; is_default: of the safe filter."""

    source: str
    test: Test
    is_default: bool
    needs_own: bool


@dataclass(frozen=True, slots=True)
class Exclusion:
    """What a condition did. excluded: offers it was the first to exclude; alone: offers that only it excluded."""

    source: str
    is_default: bool
    excluded: int
    alone: int


@dataclass(frozen=True, slots=True)
class Found:
    """One offer that fits. values: field -> value, of the fields that query and order name, then of those always shown."""

    listed: Listed
    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a search found, best first; how many there were in all and how many fit; why the others did not."""

    found: tuple[Found, ...]
    seen: int
    fitting: int
    exclusions: tuple[Exclusion, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict)


class Search:
    """A compiled search, to be run as often as wanted. Raises QueryError for a query or an order that cannot be read."""

    def __init__(self, query: str, order: str = "", *, use_default: bool = True) -> None:
        self.names: dict[str, None] = {}
        typed = [self._condition(query, node, False) for node in conditions(parse(query))]
        default = [self._condition(DEFAULT_FILTER, node, True) for node in conditions(parse(DEFAULT_FILTER))]
        # Stable: in the order typed, but what costs a look at our own books comes last.
        self.conditions = sorted([*typed, *default] if use_default else typed, key=lambda each: each.needs_own)
        self.order = _read_order(order or DEFAULT_ORDER)
        self.names.update(dict.fromkeys((*(known.name for known, _ in self.order), *SHOWN)))

    def run(self, listed: Iterable[Listed], fields: Fields, now_ms: int, *, limit: int = 50, explain: bool = False) -> Answer:
        """Give the offers that fit, in order. explain: also try each condition on what an earlier one excluded."""
        tests = [condition.test for condition in self.conditions]
        excluded, alone = [0] * len(tests), [0] * len(tests)
        fitting: list[Row] = []
        seen = 0
        for each in listed:
            seen += 1
            row = Row(each, fields, now_ms)
            for index, test in enumerate(tests):
                if not test(row):
                    excluded[index] += 1
                    if explain and all(other(row) for other in tests[index + 1 :]):
                        alone[index] += 1
                    break
            else:
                fitting.append(row)
        self._sort(fitting)
        exclusions = tuple(
            Exclusion(condition.source, condition.is_default, excluded[index], alone[index])
            for index, condition in enumerate(self.conditions)
        )
        found = tuple(self._found(row) for row in fitting[: min(limit, LIMIT_MAX)])
        sources = {name: FIELDS[name].source.value for name in self.names}
        return Answer(found, seen, len(fitting), exclusions if explain else (), sources)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _sort(self, rows: list[Row]) -> None:
        rows.sort(key=lambda row: row.listed.provider)
        for known, is_descending in reversed(self.order):
            value_of = reader(known)
            valued = [(value_of(row), row) for row in rows]
            with_value = [pair for pair in valued if pair[0] is not None]
            with_value.sort(key=lambda pair: pair[0], reverse=is_descending)
            # Unknown comes last whichever way the order runs.
            rows[:] = [row for _, row in with_value] + [row for value, row in valued if value is None]

    def _found(self, row: Row) -> Found:
        return Found(row.listed, {name: shown(name, reader(FIELDS[name])(row)) for name in self.names})

    def _condition(self, query: str, node: Node, is_default: bool) -> Condition:
        names: dict[str, None] = {}
        test = _compile(query, node, names)
        if not is_default:
            self.names.update(names)
        return Condition(node.source, test, is_default, any(FIELDS[name].source is not Source.OFFER for name in names))


def _compile(query: str, node: Node, names: dict[str, None]) -> Test:
    match node:
        case AllOf(parts):
            every = [_compile(query, part, names) for part in parts]
            return lambda row: all(test(row) for test in every)
        case AnyOf(parts):
            some = [_compile(query, part, names) for part in parts]
            return lambda row: any(test(row) for test in some)
        case Not(inner):
            test = _compile(query, inner, names)
            return lambda row: not test(row)
        case Word():
            return _word(query, node, names)
        case Comparison():
            return _comparison(query, node, names)


def _word(query: str, node: Word, names: dict[str, None]) -> Test:
    text = node.text.lower()
    known = FIELDS.get(text)
    if known is not None and node.source == node.text:
        names[text] = None
        if known.sort is not Sort.FLAG:
            raise QueryError.at(query, node.position, f"`{text}` needs a comparison, such as {_example(known)}")
        flag = reader(known)
        return lambda row: flag(row) is True
    near = get_close_matches(text, FIELDS, 1, 0.8) if node.source == node.text else []
    if near:
        raise QueryError.at(
            query, node.position, f"there is no field `{node.text}`; did you mean `{near[0]}`? Quote it to find text"
        )
    searched = [reader(FIELDS[name]) for name in SEARCHED]

    def test(row: Row) -> bool:
        for value_of in searched:
            value = value_of(row)
            if any(text in item for item in ((value,) if isinstance(value, str) else value)):
                return True
        return False

    return test


def _comparison(query: str, node: Comparison, names: dict[str, None]) -> Test:
    known = _field(query, node.field, node.position)
    names[known.name] = None
    if node.operator in _COMPARE:
        if known.sort is not Sort.NUMBER:
            raise QueryError.at(query, node.position, f"`{known.name}` has no greater and smaller; use =, != or in")
        wanted = _read(query, known, node.values[0])
        if wanted is None:
            raise QueryError.at(query, node.values[0].position, "only = and != go with `unknown`")
        return _ordered(known, _COMPARE[node.operator], wanted)
    matches = [_equality(known, _read(query, known, value)) for value in node.values]
    value_of, match = reader(known), matches[0]
    if node.operator == "!=":
        is_unknown = _read(query, known, node.values[0]) is None

        def unequal(row: Row) -> bool:
            value = value_of(row)
            return not match(value) and (is_unknown or value is not None)

        return unequal
    if len(matches) == 1:
        return lambda row: match(value_of(row))
    return lambda row: any(match(value_of(row)) for match in matches)


def _ordered(known: Field, compare: Callable[[Any, Any], bool], wanted: float) -> Test:
    get = known.get
    if get is not None:
        # What an offer says is never unknown; this is the way that ten thousand offers go.
        return lambda row: compare(get(row.listed, row.now_ms), wanted)
    name = known.name

    def ordered(row: Row) -> bool:
        value = row.own(name)
        return value is not None and compare(value, wanted)

    return ordered


def _equality(known: Field, wanted: Any) -> Callable[[Any], bool]:
    """Give the test of a field's value against one literal. wanted: None for `unknown`."""
    if wanted is None:
        return lambda value: value is None
    if known.sort is Sort.ID:
        low, high = wanted
        return lambda value: any(low <= item <= high for item in value or ())
    if known.sort is Sort.TEXTS and known.is_part:
        return lambda value: any(wanted in item for item in value or ())
    if known.sort is Sort.TEXTS:
        return lambda value: wanted in (value or ())
    return lambda value: value is not None and bool(value == wanted)


def _read(query: str, known: Field, value: Value) -> Any:
    if value.text.lower() == UNKNOWN:
        return None
    try:
        return known.read(value.text)
    except ValueError as error:
        raise QueryError.at(query, value.position, f"{known.name}: {error}") from None


def _field(query: str, name: str, position: int) -> Field:
    known = FIELDS.get(name.lower())
    if known is not None:
        return known
    near = get_close_matches(name.lower(), FIELDS, 1, 0.5)
    hint = f"; did you mean `{near[0]}`?" if near else "; `p2pnode offers fields` lists them"
    raise QueryError.at(query, position, f"there is no field `{name}`{hint}")


def _read_order(order: str) -> Sequence[tuple[Field, bool]]:
    """Give (field, is descending) for `price,-reliability`."""
    found = []
    position = 0
    for part in order.split(","):
        name = part.strip()
        at = position + len(part) - len(part.lstrip())
        if not name:
            raise QueryError.at(order, at, "a field is missing")
        is_descending = name.startswith("-")
        known = _field(order, name.lstrip("+-"), at)
        if known.sort in (Sort.TEXTS, Sort.ID) and known.name != "provider":
            raise QueryError.at(order, at, f"`{known.name}` has no order")
        found.append((known, is_descending))
        position += len(part) + 1
    return tuple(found)


def _example(known: Field) -> str:
    return {Sort.NUMBER: f"{known.name}>=1", Sort.TEXTS: f"{known.name}=name"}.get(known.sort, f"{known.name}=value")
