"""`why`: from counters and states to sentences that say what stands in the way of work, and what to do."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from p2pnode.metrics import Metrics
from p2pnode.node.config import NodeConfig
from p2pnode.reasons import Reason
from p2pnode.units import format_credits

_ADVICE: Mapping[str, str] = {
    Reason.PRICE.value: "lower it with `p2pnode config set provide.price`",
    Reason.BUSY.value: "the queue was full; lend more with `p2pnode config set provide.cpus`",
    Reason.PAUSED.value: "take work again with `p2pnode resume`",
    Reason.DRAINING.value: "take work again with `p2pnode resume`",
    Reason.SANDBOX_LEVEL.value: "accept the level this kernel reaches with `p2pnode config set provide.sandbox_level_min`",
    Reason.DENIED.value: "change who is allowed with `p2pnode config set provide.clients_allow`",
    Reason.MODEL_DENIED.value: "change what is allowed with `p2pnode config set provide.models_allow`",
    Reason.CREDIT.value: "clients without credit were refused; `p2pnode config set credit.slice_amount` allows more",
    Reason.DISK.value: "free some with `p2pnode clean` or `p2pnode config set provide.disk`",
    Reason.MEMORY.value: "lend more with `p2pnode config set provide.memory`",
    Reason.NOT_SELLING.value: "sell with `p2pnode config set provide.enabled true`",
}
REFUSALS_SHOWN_MAX = 8


def explain(
    status: Mapping[str, Any], metrics: Metrics, obstacles: Sequence[tuple[Reason, int, str]], config: NodeConfig
) -> dict[str, Any]:
    """Give {state, sentences, refusals, refused, obstacles}: most important first.

    obstacles: the work layer's answer: reason, how often it refused for it, a sentence.
    """
    refusals = _commonest(metrics.labels("refusals_total"))
    refused = _commonest(metrics.labels("refused_total"))
    sentences = [
        *_state_sentences(status, config),
        *(f"{text}{_advice(reason.value)}" for reason, _, text in obstacles),
        *_peer_sentences(status["discovery"]),
    ]
    if metrics.total("calls_total") == 0 and not sentences:
        price = format_credits(config.provide.price)
        sentences.append(f"nobody has asked for work yet; this node asks {price} credits per 10^12 operations")
    sentences += [f"refused {count} requests: {reason}{_advice(reason)}" for reason, count in refusals.items()]
    return {
        "state": status["state"],
        "sentences": list(dict.fromkeys(sentences)),
        "refusals": refusals,
        "refused": refused,
        "obstacles": [{"reason": reason.value, "count": count, "text": text} for reason, count, text in obstacles],
    }


def _state_sentences(status: Mapping[str, Any], config: NodeConfig) -> Iterable[str]:
    if not config.provide.enabled:
        yield f"this node only buys{_advice(Reason.NOT_SELLING.value)}"
    elif status["state"] in {reason.value for reason in Reason}:
        yield f"no new work: {status['state']}{_advice(status['state'])}"


def _peer_sentences(discovery: Mapping[str, Any]) -> Iterable[str]:
    if discovery["duplicate_identity"]:
        yield "another node uses this identity; give one of them a new one (`p2pnode identity show` says where it is)"
    if discovery["peers_connected"] == 0:
        known = discovery["peers_known"]
        yield f"no peer is connected ({known} known); see `p2pnode net peers`"
        mdns = discovery["mdns"]
        if mdns["state"] == "not-working":
            yield f"the local network cannot be searched: {mdns['reason']}; {mdns['advice']}"


def _commonest(counts: Mapping[str, float]) -> dict[str, int]:
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:REFUSALS_SHOWN_MAX]
    return {reason: int(count) for reason, count in ranked}


def _advice(reason: str) -> str:
    return f"; {_ADVICE[reason]}" if reason in _ADVICE else ""
