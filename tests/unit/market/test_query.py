"""The language of searches: what it finds, what it says of what it does not find, and how it names a mistake."""

import re
import time
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pnode.errors import QueryError
from p2pnode.ids import MODEL, NODE, id_text
from p2pnode.market.listings import Listed
from p2pnode.market.query import DEFAULT_FILTER, SHOWN, Search
from p2pnode.market.query_fields import FIELDS, STRANGER, Sort
from p2pnode.market.query_language import CLAUSES_MAX, DEPTH_MAX, KEYWORDS, QUERY_CHARACTERS_MAX, parse
from p2pnode.wire.messages.gossip import Listing

NOW = 1_790_000_000_000
DOCS = Path(__file__).parents[3] / "docs" / "reference" / "offer-queries.md"


def listed(name, **about):
    about = {"sequence": 1, "expires_ms": NOW + 600_000, **about}
    return Listed(name.encode().ljust(32, b"\0"), Listing(**about))


BIG = listed(
    "big", price=500, cores=32, memory_mib=128 << 10, gpus=("NVIDIA RTX 4090", "NVIDIA RTX 4090"), gpu_memory_mib=2 * 24_564,
    engines=("CPU", "CUDA"), sandbox="gpu", region=("eu", "de"), classes=("fast", "exact"), models=(b"modelabc",), model_count=1,
    addresses=("80.1.2.3:9470",), gigaops=2000,
)  # fmt: skip
SMALL = listed("small", price=100, call_price=2_000_000, cores=4, memory_mib=8 << 10, region=("US",), addresses=("10.0.0.1:1",))
FREE = listed("free", price=0, cores=2, memory_mib=2 << 10, sandbox="reduced:no-landlock", version=9)
ALL = (BIG, SMALL, FREE)
KNOWN = {
    BIG.provider: {"reliability": 0.99, "latency": 0.02, "calls": 50, "new": False, "rating": 12.5, "linked": True},
    SMALL.provider: {"reliability": 0.5, "latency": 2.0, "calls": 4, "new": False, "suspected": True},
}


def find(query, order="", offers=ALL, **options):
    options.setdefault("use_default", False)
    search = Search(query, order, use_default=options.pop("use_default"))
    return search.run(offers, lambda peer: KNOWN.get(peer, {}), NOW, **options)


def names(query, order="provider", **options):
    return [found.listed.provider.rstrip(b"\0").decode() for found in find(query, order, **options).found]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("", "big free small"),
        ("price<=0.1", "free small"),
        ("price=0.5", "big"),
        ("price!=0.5", "free small"),
        ("price==0.5", "big"),
        ("call_price>=2", "small"),
        ("cores>2 cores<32", "small"),
        ("cores>2 and cores<32", "small"),
        ("cores<3 or cores>30", "big free"),
        ("cores<3 or cores>30 price>0", "big free"),
        ("(cores<3 or cores>30) price>0", "big"),
        ("not cores<3", "big small"),
        ("not not cores<3", "free"),
        ("not (cores<3 or region=us)", "big"),
        ("memory>=8", "big small"),
        ("memory>=8GB", "big small"),
        ("memory>=9g", "big"),
        ("vram>=24", "big"),
        ("vram>=26", ""),
        ("vram_total>=48 gpus=2", "big"),
        ("gpu=4090", "big"),
        ("gpu='nvidia rtx 4090'", "big"),
        ("gpu!=4090", "free small"),
        ("engine=cuda", "big"),
        ("engine in (cuda, cpu)", "big free small"),
        ("engine=cu", ""),
        ("region=EU", "big"),
        ("region in (us,fr)", "small"),
        ("REGION IN (us) AND cores>1", "small"),
        ("class=exact", "big"),
        ("sandbox=reduced:no-landlock", "free"),
        ("sandbox in (full, gpu)", "big small"),
        ("speed>=1000", "big"),
        ("models>0", "big"),
        ("reach=public", "big"),
        ("reach in (private, none)", "free small"),
        ("compatible", "big small"),
        ("compatible=no", "free"),
        ("version=9", "free"),
        ("expires>5min", "big free small"),
        ("expires>1h", ""),
        ("cuda", "big"),
        ("'rtx 40'", "big"),
        ("us", "small"),
        ("cuda 4090", "big"),
        ("cuda or us", "big small"),
        # What this node knows.
        ("reliability>0.97", "big"),
        ("reliability>=50%", "big small"),
        ("latency<50ms", "big"),
        ("latency<3", "big small"),
        ("calls>0", "big small"),
        ("calls=0", "free"),
        ("rating>10", "big"),
        ("new", "free"),
        ("not new", "big small"),
        ("linked", "big"),
        ("suspected", "small"),
        ("suspected=false", "big free"),
        ("banned", ""),
        # What is not known compares with nothing.
        ("reliability<2%", ""),
        ("reliability!=0.5", "big"),
        ("not reliability>=0.5", "free"),
        ("reliability=unknown", "free"),
        ("reliability!=unknown", "big small"),
        ("rating in (12.5, unknown)", "big free small"),
    ],
)
def test_a_query_finds(query, expected):
    assert " ".join(names(query)) == expected


def test_ids_are_named_by_their_beginning():
    text = id_text(NODE, BIG.provider)
    assert names(f"provider={text}") == names(f"provider={text[:12]}") == names(f"provider={text[5:11]}") == ["big"]
    assert names(f"provider!={text}") == ["free", "small"]
    model = id_text(MODEL, b"modelabc" + bytes(24))
    assert names(f"model={model[:17]}") == ["big"]
    assert names("model=zzz") == []


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("price", "free small big"),
        ("-price", "big small free"),
        ("reliability", "small big free"),
        ("-reliability", "big small free"),
        ("reach,-price", "free small big"),
        ("compatible, -cores", "free big small"),
        ("", "free small big"),
    ],
)
def test_an_order_puts_the_unknown_last_both_ways(order, expected):
    assert " ".join(names("", order)) == expected


def test_the_safe_filter_keeps_away_what_is_risky_and_is_written_in_the_language():
    assert names("", use_default=True) == ["big"]
    assert names(DEFAULT_FILTER) == ["big"]
    assert names("cores<3", use_default=True) == []


def test_an_explanation_says_which_condition_excluded_whom():
    answer = find("cores>3 region=eu or us", use_default=True, explain=True)
    told = {each.source: (each.is_default, each.excluded, each.alone) for each in answer.exclusions}
    assert (answer.seen, answer.fitting) == (3, 1)
    assert told["cores>3 region=eu or us"] == (False, 1, 0), "`or` binds looser: it is one condition"
    answer = find("cores>3 region=eu", use_default=True, explain=True)
    told = {each.source: (each.is_default, each.excluded, each.alone) for each in answer.exclusions}
    assert told["cores>3"] == (False, 1, 0)
    assert told["region=eu"] == (False, 1, 0), "small is suspected, too"
    assert told["not suspected"] == (True, 0, 0)
    assert sum(excluded for _, excluded, _ in told.values()) == answer.seen - answer.fitting
    alone = find("reliability>0.9", explain=True, offers=(BIG, SMALL))
    assert [(each.source, each.alone) for each in alone.exclusions] == [("reliability>0.9", 1)]
    assert alone.sources["reliability"] == "own"
    assert alone.sources["price"] == "offer"


def test_values_are_those_named_and_those_always_shown():
    (found,) = find("vram>=24 latency<1").found
    assert list(found.values)[:3] == ["vram", "latency", "price"]
    assert set(SHOWN) <= set(found.values)
    assert found.values["vram"] == pytest.approx(25.757, abs=0.001)
    assert found.values["price"] == 0.5
    assert len(find("", limit=2).found) == 2
    assert find("", limit=2).fitting == 3


@pytest.mark.parametrize(
    ("query", "position", "problem"),
    [
        ("vrm>=8", 0, "there is no field `vrm`; did you mean `vram`?"),
        ("cores>2 prize<1", 8, "did you mean `price`?"),
        ("reliabilty", 0, "did you mean `reliability`?"),
        ("zzzzzz=1", 0, "`p2pnode offers fields` lists them"),
        ("price<", 6, "a value is missing after `<`"),
        ("price<<2", 6, "a value is missing after `<`"),
        ("price", 0, "`price` needs a comparison"),
        ("price>abc", 6, "'abc' is not a number"),
        ("price>nan", 6, "not a number"),
        ("memory>=8XB", 8, "not a size"),
        ("latency<2years", 8, "unknown unit"),
        ("reliability>2", 12, "between 0 and 100%"),
        ("new=perhaps", 4, "neither true nor false"),
        ("gpu>3", 0, "no greater and smaller"),
        ("price<unknown", 6, "only = and !="),
        ("model=8", 6, "has a character that no model id contains"),
        ("(cores>2", 0, "this `(` is never closed"),
        ("cores>2)", 7, "no `(` belongs to this"),
        ("region in eu", 10, "values in parentheses"),
        ("region in (eu", 10, "this `(` is never closed"),
        ("region in (eu us)", 14, "`,` or `)` belongs here"),
        ("region in (eu,)", 14, "a value is missing after `,`"),
        ("not", 3, "a condition is missing before the end"),
        ("cores>2 or", 10, "a condition is missing before the end"),
        ("and cores>2", 0, "a condition is missing before `and`"),
        ("cores>2, price<1", 7, "a condition is missing before `,`"),
        ("gpu='rtx", 4, "this quote is never closed"),
        ("! new", 0, "write `!=` for unequal and `not` for the opposite"),
        ("(" * (DEPTH_MAX + 1) + "new" + ")" * (DEPTH_MAX + 1), DEPTH_MAX, "conditions in each other"),
        ("not " * (DEPTH_MAX + 1) + "new", 4 * DEPTH_MAX, "conditions in each other"),
        ("us " * (CLAUSES_MAX + 1), 3 * CLAUSES_MAX, "conditions"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_place(query, position, problem):
    with pytest.raises(QueryError) as error:
        Search(query)
    text, shown, caret, _ = str(error.value).split("\n")
    assert problem in text
    assert shown == f"  {query}"
    assert caret.index("^") - 2 == position


@pytest.mark.parametrize(("order", "problem"), [("prize", "did you mean"), ("gpu", "has no order"), ("price,,cores", "missing")])
def test_an_order_that_cannot_be_read(order, problem):
    with pytest.raises(QueryError, match=problem):
        Search("", order)


def test_a_query_is_bounded():
    with pytest.raises(QueryError, match="at most"):
        Search("x" * (QUERY_CHARACTERS_MAX + 1))


@given(st.text(alphabet="abpricegpunotinor ()<>=!,'\"0189.%", max_size=60))
def test_any_text_is_found_or_refused(query):
    with suppress(QueryError):
        assert find(query).seen == len(ALL)


@given(st.recursive(
    st.sampled_from(["cores>3", "region=eu", "new", "cuda", "reliability>0.9", "price in (0.5, 0.1)"]),
    lambda inner: st.one_of(
        st.builds("not ({})".format, inner),
        st.builds("({}) or ({})".format, inner, inner),
        st.builds("({}) ({})".format, inner, inner),
    ),
    max_leaves=8,
))  # fmt: skip
def test_not_or_and_follow_the_laws_of_logic(query):
    everybody = set(names(""))
    assert set(names(f"not ({query})")) == everybody - set(names(query))
    assert names(f"not (not ({query}))") == names(query)
    assert set(names(f"({query}) or new")) == set(names(query)) | set(names("new"))
    assert set(names(f"({query}) and new")) == set(names(query)) & set(names("new"))


@pytest.mark.slow
def test_ten_thousand_offers_are_searched_in_a_blink():
    random = Random(1)
    offers = [
        Listed(random.randbytes(32), Listing(
            1, NOW + 10**6, ("80.2.3.4:1",), random.randrange(64), random.randrange(64_000),
            random.choice([(), ("NVIDIA RTX 3090",)]), random.choice([0, 24_564]), region=(random.choice(["eu", "us"]),),
            price=random.randrange(1000),
        )) for _ in range(10_000)
    ]  # fmt: skip
    own = {offer.provider: {"reliability": random.random(), "new": False} for offer in offers}
    search = Search("vram>=8 price<0.2 reliability>0.97 region=eu", "price,-reliability")
    times = []
    for _ in range(5):
        started = time.perf_counter()
        answer = search.run(offers, own.__getitem__, NOW, explain=True)
        times.append(time.process_time() - started)
    assert 0 < answer.fitting < 200
    assert min(times) < 0.05


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_shows_the_table_of_fields():
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| ([^|]*) \| (\w+) \| ([^|]+) \|$", DOCS.read_text(), re.M)
    expected = [(each.name, each.sort.value, each.unit, each.source.value, each.meaning) for each in FIELDS.values()]
    assert [tuple(cell.strip() for cell in row) for row in rows] == expected


def test_the_page_shows_grammar_and_filter_as_they_are():
    import p2pnode.market.query_language as language

    page = DOCS.read_text()
    grammar = [line.strip() for line in (language.__doc__ or "").splitlines() if re.match(r"\s+(\w+ +=|\|)", line)]
    assert len(grammar) > 8
    shown = [line.strip() for line in page.splitlines()]
    assert [line for line in grammar if line not in shown] == []
    assert f"`{DEFAULT_FILTER}`" in page
    assert all(f"`{word}`" in page for word in KEYWORDS)


def test_every_example_of_the_page_can_be_read():
    examples = re.findall(r"p2pnode offers search '([^']+)'", DOCS.read_text())
    assert len(examples) >= 4
    for example in examples:
        parse(example)
        Search(example)


def test_own_fields_have_a_value_for_strangers_or_are_unknown():
    for known in FIELDS.values():
        if known.get is None and known.sort is Sort.FLAG:
            assert known.name in STRANGER
