"""One run on the driver of topics: walks the timeline of a case over a `TopicSwarm` and gives what was measured."""

import resource
from collections.abc import Callable
from typing import Any, Final

from p2pnode.discovery.gossip.topics import topic
from p2pnode.sim.chance import seeded
from p2pnode.sim.measures import Measures
from p2pnode.sim.scenario import Case, Step
from p2pnode.sim.topic_swarm import TopicSwarm
from p2pnode.sim.trace import Trace

POPULAR: Final = topic("popular")
RARE: Final = topic("rare")
# A search that found nobody ends when its slowest ask is given up.
_SEARCH_SECONDS: Final = 30.0
_PROGRESS_STEPS: Final = 20


def run_topics(
    case: Case, seed: int, measures: Measures, trace: Trace, on_progress: Callable[[float, float], None] | None = None
) -> str:
    """Run a case; gives the digest. The steps are those of `scenario.STEPS_OF_TOPICS`."""
    run = _TopicRun(case, seed, measures, trace)
    for step in case.steps:
        run.swarm.schedule(step.at, lambda step=step: run.take(step))  # type: ignore[misc]
    for number in range(1, _PROGRESS_STEPS + 1):
        run.swarm.run(case.seconds / _PROGRESS_STEPS)
        if on_progress is not None:
            on_progress(number / _PROGRESS_STEPS * case.seconds, case.seconds)
    run.end()
    digest = trace.digest()
    trace.close()
    return digest


class _TopicRun:
    """The nodes of one run, who of them advertises, and the steps of the timeline."""

    def __init__(self, case: Case, seed: int, measures: Measures, trace: Trace) -> None:
        self.swarm = TopicSwarm(case.options.nodes, seed)
        self._seconds = case.seconds
        self._measures = measures
        self._trace = trace
        self._chance = seeded(seed, "topic experiment")
        self._began = self.swarm.now
        self._rare: list[int] = []

    def take(self, step: Step) -> None:
        """Do one step of the timeline."""
        parameters = step.parameters
        self._measures.marks.append((step.at, step.do))
        if step.do == "advertise":
            self._advertise(parameters["fraction"], parameters["rare"])
        elif step.do == "kill":
            self._kill(parameters["fraction"])
        else:
            for number in range(parameters["count"]):
                self.swarm.schedule(parameters["over"] * number / parameters["count"], self._search)

    def _advertise(self, fraction: float, rare: int) -> None:
        everybody = range(len(self.swarm.nodes))
        for index in self._chance.sample(everybody, round(fraction * len(everybody))):
            self.swarm.publish(index, [POPULAR])
        self._rare = self._chance.sample(everybody, min(rare, len(everybody)))
        for index in self._rare:
            self.swarm.publish(index, [POPULAR, RARE])

    def _kill(self, fraction: float) -> None:
        """Take power from nodes, but from none that advertises under the rare topic: its offers are what is counted."""
        others = [index for index in range(len(self.swarm.nodes)) if index not in self._rare]
        for index in self._chance.sample(others, round(fraction * len(others))):
            self.swarm.nodes[index].is_up = False
            self._note("x", index)

    def _search(self) -> None:
        up = [node.index for node in self.swarm.nodes if node.is_up]
        index = self._chance.choice(up)
        keys = self.swarm.begin_search(index, [POPULAR]), self.swarm.begin_search(index, [RARE])
        self.swarm.schedule(_SEARCH_SECONDS, lambda: self._searched(*keys))

    def _searched(self, popular: tuple[int, int], rare: tuple[int, int]) -> None:
        found = [
            {item.publisher for item in self.swarm.found[key].items} if key in self.swarm.found else set()
            for key in (popular, rare)
        ]
        sought = {self.swarm.nodes[index].contact.node_id for index in self._rare}
        share = len(found[1] & sought) / max(1, len(sought))
        self._measures.popular_offers_found.add(len(found[0]))
        self._measures.rare_offers_found.add(share)
        self._measures.over_time("rare_offers_found").add(self.swarm.now - self._began, share)
        self._note("s", popular[0], f"{len(found[0])}/{len(found[1])}")

    def end(self) -> None:
        """Take the figures of the whole run."""
        sent = [node.sent_bytes for node in self.swarm.nodes]
        self._measures.bytes_per_node_second.add(sum(sent) / len(sent) / self._seconds)
        self._measures.busiest_bytes_per_second.add(max(sent) / self._seconds)
        self._measures.adverts_held.add(max(self.swarm.load().values()))
        self._measures.violations += [f"node {node.index} broke the protocol" for node in self.swarm.nodes if node.violations]
        usage = resource.getrusage(resource.RUSAGE_SELF)
        self._measures.cpu_seconds.add(usage.ru_utime + usage.ru_stime)
        self._measures.memory_mb.add(usage.ru_maxrss / 1024)
        for node in self.swarm.nodes:
            self._note("s", node.index, f"sent {node.sent_bytes}")

    def _note(self, kind: str, index: int, what: Any = "-") -> None:
        self._trace.add(self.swarm.now - self._began, kind, str(index), what=str(what))
