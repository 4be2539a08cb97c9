"""The language of searches for offers: from text to a tree. `query_fields` says what words mean, `query` what comes of it.

    query    = [ either ] ;
    either   = both , { "or" , both } ;
    both     = inverse , { [ "and" ] , inverse } ;
    inverse  = "not" , inverse | "(" , either , ")" | clause ;
    clause   = word , operator , value
             | word , "in" , "(" , value , { "," , value } , ")"
             | word ;
    operator = "=" | "==" | "!=" | "<" | "<=" | ">" | ">=" ;
    value    = word | quoted ;
    word     = character , { character } ;
    quoted   = "'" , { any but "'" } , "'" | '"' , { any but '"' } , '"' ;

A character is anything but white space, quotes, parentheses, comma, `=`, `!`, `<` and `>`. `and`, `or`, `not` and `in` are
keywords in any case; quoted they are values. Two conditions side by side are joined by `and`, which binds tighter than `or`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Final

from p2pnode.errors import QueryError

QUERY_CHARACTERS_MAX: Final = 1000
DEPTH_MAX: Final = 32
CLAUSES_MAX: Final = 100
KEYWORDS: Final = ("and", "or", "not", "in")
OPERATORS: Final = ("=", "!=", "<", "<=", ">", ">=")


class _Sort(Enum):
    WORD = "a word"
    QUOTED = "a quoted text"
    OPERATOR = "an operator"
    OPEN = "`(`"
    CLOSE = "`)`"
    COMMA = "`,`"
    END = "the end"


_PATTERN: Final = re.compile(
    r"""(?P<SPACE>\s+)|(?P<QUOTED>'[^']*'|"[^"]*")|(?P<OPERATOR>==|!=|<=|>=|=|<|>)
        |(?P<OPEN>\()|(?P<CLOSE>\))|(?P<COMMA>,)|(?P<WORD>[^\s()<>=!,'"]+)""",
    re.VERBOSE,
)


@dataclass(frozen=True, slots=True)
class _Token:
    sort: _Sort
    text: str
    position: int

    def is_keyword(self, *words: str) -> bool:
        return self.sort is _Sort.WORD and self.text.lower() in words


@dataclass(frozen=True, slots=True)
class Value:
    """A literal as typed, without quotes. position: where it stands in the query."""

    text: str
    position: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """`field operator value`, or with `in` several values. position: of the field."""

    field: str
    operator: str
    values: tuple[Value, ...]
    position: int
    source: str


@dataclass(frozen=True, slots=True)
class Word:
    """A bare word: a flag, or text to be found."""

    text: str
    position: int
    source: str


@dataclass(frozen=True, slots=True)
class Not:
    """The opposite of what is in it."""

    inner: "Node"
    source: str


@dataclass(frozen=True, slots=True)
class All:
    """Every one of these."""

    parts: tuple["Node", ...]
    source: str


@dataclass(frozen=True, slots=True)
class Any:
    """At least one of these."""

    parts: tuple["Node", ...]
    source: str


Node = Comparison | Word | Not | All | Any


def parse(query: str) -> Node:
    """Give the tree of a query; an empty one is an `All` of nothing, which everything fits. Raises QueryError."""
    if len(query) > QUERY_CHARACTERS_MAX:
        raise QueryError.at(query[:40] + "…", 0, f"a search has at most {QUERY_CHARACTERS_MAX} characters")
    return _Parser(query).whole()


def conditions(node: Node) -> tuple[Node, ...]:
    """Give the conditions that must all hold: the parts of an `All`, else the node itself."""
    return node.parts if isinstance(node, All) else (node,)


def _tokens(query: str) -> Iterator[_Token]:
    position = 0
    while position < len(query):
        match = _PATTERN.match(query, position)
        if match is None:
            problem = "this quote is never closed" if query[position] in "'\"" else f"{query[position]!r} means nothing here"
            if query[position] == "!":
                problem = "write `!=` for unequal and `not` for the opposite"
            raise QueryError.at(query, position, problem)
        name = str(match.lastgroup)
        if name != "SPACE":
            yield _Token(_Sort[name], match.group(), position)
        position = match.end()
    yield _Token(_Sort.END, "", len(query))


class _Parser:
    def __init__(self, query: str) -> None:
        self._query = query
        self._tokens = list(_tokens(query))
        self._at = 0
        self._depth = 0
        self._clauses = 0

    def whole(self) -> Node:
        if self._is(_Sort.END):
            return All((), "")
        tree = self._either()
        if not self._is(_Sort.END):
            raise self._wrong("no `(` belongs to this" if self._is(_Sort.CLOSE) else "nothing can follow here")
        return tree

    @property
    def _now(self) -> _Token:
        return self._tokens[self._at]

    def _is(self, sort: _Sort) -> bool:
        return self._now.sort is sort

    def _next(self) -> _Token:
        token = self._now
        self._at += 1
        return token

    def _wrong(self, problem: str, token: _Token | None = None) -> QueryError:
        return QueryError.at(self._query, (token or self._now).position, problem)

    def _source(self, start: int) -> str:
        last = self._tokens[self._at - 1]
        return self._query[start : last.position + len(last.text)]

    def _either(self) -> Node:
        start = self._now.position
        parts = [self._both()]
        while self._now.is_keyword("or"):
            self._next()
            parts.append(self._both())
        return parts[0] if len(parts) == 1 else Any(tuple(parts), self._source(start))

    def _both(self) -> Node:
        start = self._now.position
        parts = [self._inverse()]
        while True:
            if self._now.is_keyword("and"):
                self._next()
            elif self._now.sort in (_Sort.END, _Sort.CLOSE) or self._now.is_keyword("or"):
                break
            parts.append(self._inverse())
        return parts[0] if len(parts) == 1 else All(tuple(parts), self._source(start))

    def _inverse(self) -> Node:
        self._depth += 1
        if self._depth > DEPTH_MAX:
            raise self._wrong(f"more than {DEPTH_MAX} conditions in each other")
        try:
            start = self._now.position
            if self._now.is_keyword("not"):
                self._next()
                inner = self._inverse()
                return Not(inner, self._source(start))
            if self._is(_Sort.OPEN):
                opened = self._next()
                inner = self._either()
                if not self._is(_Sort.CLOSE):
                    raise self._wrong("this `(` is never closed", opened)
                self._next()
                return inner
            return self._clause()
        finally:
            self._depth -= 1

    def _clause(self) -> Node:
        self._clauses += 1
        if self._clauses > CLAUSES_MAX:
            raise self._wrong(f"more than {CLAUSES_MAX} conditions")
        start = self._now
        if start.sort is _Sort.QUOTED:
            self._next()
            return Word(start.text[1:-1], start.position, start.text)
        if start.sort is not _Sort.WORD or start.is_keyword(*KEYWORDS):
            raise self._wrong(f"a condition is missing before {start.sort.value if not start.text else f'`{start.text}`'}")
        self._next()
        if self._is(_Sort.OPERATOR):
            operator = self._next()
            values = (self._value(f"a value is missing after `{operator.text}`"),)
            name = "=" if operator.text == "==" else operator.text
            return Comparison(start.text, name, values, start.position, self._source(start.position))
        if self._now.is_keyword("in"):
            return self._membership(start)
        return Word(start.text, start.position, start.text)

    def _membership(self, start: _Token) -> Node:
        self._next()
        if not self._is(_Sort.OPEN):
            raise self._wrong("`in` is followed by values in parentheses: region in (eu, us)")
        opened = self._next()
        values = [self._value("a value is missing")]
        while self._is(_Sort.COMMA):
            self._next()
            values.append(self._value("a value is missing after `,`"))
        if not self._is(_Sort.CLOSE):
            raise (
                self._wrong("this `(` is never closed", opened) if self._is(_Sort.END) else self._wrong("`,` or `)` belongs here")
            )
        self._next()
        return Comparison(start.text, "in", tuple(values), start.position, self._source(start.position))

    def _value(self, missing: str) -> Value:
        token = self._now
        if token.sort is _Sort.QUOTED:
            self._next()
            return Value(token.text[1:-1], token.position)
        if token.sort is not _Sort.WORD or token.is_keyword("and", "or"):
            raise self._wrong(missing)
        self._next()
        return Value(token.text, token.position)
