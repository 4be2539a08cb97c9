"""Who is in a simulated network and how they come and go: joins, churn, kills, restarts, flapping. Works on any driver."""

from collections.abc import Callable, Iterable
from typing import Final

from p2pnode.sim.census import Census
from p2pnode.sim.chance import Random, exponential, seeded, weibull
from p2pnode.sim.driver import Driver, NodeOptions
from p2pnode.sim.scenario import Options

# Each newcomer knows so many of the entry points.
ENTRY_POINTS_KNOWN: Final = 3
# A node counts for the measures of tables once it has been up for so long.
SETTLED_SECONDS: Final = 300.0
# Nodes become servers by themselves, so the list of servers is made anew after so long.
CENSUS_SECONDS: Final = 5.0
# Sessions drawn to choose one by its length: enough that the choice has the distribution of a running session.
RESIDUAL_DRAWS: Final = 200


class Population:
    """The nodes of one experiment. entry: those that newcomers know; publishers, readers: without churn, half of `stable` each.

    on_change: called with a node's number whenever it comes up or goes down.
    """

    def __init__(self, driver: Driver, options: Options, on_change: Callable[[int], None]) -> None:
        self.driver = driver
        self.options = options
        self.entry: list[int] = []
        self.publishers: list[int] = []
        self.readers: list[int] = []
        self.honest: list[int] = []
        self.up_since: dict[int, float] = {}
        self._on_change = on_change
        self._chance = seeded(driver.seed, "population")
        self._churn_chance = seeded(driver.seed, "churn")
        self._kept: dict[int, None] = {}
        self._churn = 0
        self._down: dict[int, None] = {}
        self._census = Census()
        self._census_until = 0.0
        self._is_changed = True

    # --- who is there -------------------------------------------------------------------------------------------------

    def live(self) -> list[int]:
        """Give the honest nodes that are up, in the order in which they came up."""
        return list(self.up_since)

    def settled(self) -> list[int]:
        """Give those that have been up for five minutes."""
        return self.up_for(SETTLED_SECONDS)

    def up_for(self, seconds: float) -> list[int]:
        """Give those that have been up for so long."""
        newest = self.driver.now - seconds
        return [index for index, since in self.up_since.items() if since <= newest]

    def live_readers(self) -> list[int]:
        """Give the readers that are up."""
        return [index for index in self.readers if index in self.up_since]

    def census(self) -> Census:
        """Give the true set of live honest servers, at most some seconds old as far as roles go."""
        if self._is_changed or self.driver.now >= self._census_until:
            driver = self.driver
            self._census.refill((driver.contact(index).node_id, index) for index in self.up_since if driver.is_server(index))
            self._is_changed, self._census_until = False, driver.now + CENSUS_SECONDS
        return self._census

    # --- coming -------------------------------------------------------------------------------------------------------

    def build(self) -> float:
        """Let the first nodes join one after the other; gives the virtual time until the last one has begun to."""
        options = self.options
        spacing = 0.0 if options.tables == "oracle" else options.join_seconds
        for number in range(options.nodes):
            self._soon(number * spacing, lambda number=number: self._add_first(number))  # type: ignore[misc]
        return options.nodes * spacing

    def grow(self, target: int, over: float) -> None:
        """Let nodes join until there are so many, evenly over a time."""
        missing = target - len(self.up_since)
        for number in range(max(0, missing)):
            self._soon(over * (number + 1) / missing, self.add)

    def add(self) -> int:
        """Let one new node join."""
        return self._enter(self._drawn_options(self._chance.random() < self.options.reachable))

    def _add_first(self, number: int) -> None:
        is_entry = number < self.options.entry_points
        is_reachable = is_entry or self._chance.random() < self.options.reachable
        index = self._enter(self._drawn_options(is_reachable))
        if is_entry:
            self.entry.append(index)
        stable_number = number - self.options.entry_points
        if 0 <= stable_number < self.options.stable:
            (self.readers if stable_number % 2 else self.publishers).append(index)
        if is_entry or stable_number < self.options.stable:
            self._kept[index] = None

    def _drawn_options(self, is_reachable: bool) -> NodeOptions:
        options, chance = self.options, self._chance
        known = [index for index in self.entry if self.driver.is_up(index)] or self.entry
        chosen = known if len(known) <= ENTRY_POINTS_KNOWN else chance.sample(known, ENTRY_POINTS_KNOWN)
        return NodeOptions(
            entry_points=tuple(chosen),
            is_reachable=is_reachable,
            offer_bytes=options.offer_bytes,
            is_slow=chance.random() < options.slow,
            skew_seconds=(2 * chance.random() - 1) * options.skew_seconds,
        )

    def _enter(self, options: NodeOptions) -> int:
        index = self.driver.add_node(options)
        self.honest.append(index)
        self._came_up(index)
        return index

    # --- going --------------------------------------------------------------------------------------------------------

    def kill(self, share: float, *, keep_stable: bool = True) -> list[int]:
        """Cut the power of this share of all live nodes at once; those that publish and read stay, so that they can tell."""
        victims = self._drawn(share, keep_stable)
        for index in victims:
            self.driver.crash(index)
            self._went_down(index)
        return victims

    def leave(self, share: float) -> list[int]:
        """Stop this share of the live nodes in order."""
        leavers = self._drawn(share, True)
        for index in leavers:
            self.driver.leave(index)
            self._went_down(index)
        return leavers

    def crash(self, indices: Iterable[int]) -> None:
        """Cut the power of these nodes."""
        for index in indices:
            if index in self.up_since:
                self.driver.crash(index)
                self._went_down(index)

    def restart(self, share: float) -> None:
        """Switch on this share of those that are down."""
        down = list(self._down)
        for index in self._chance.sample(down, round(share * len(down))):
            self._restart(index)

    def flap(self, share: float, times: int, every: float) -> None:
        """Let this share of the nodes go down and come up again, so many times, half of each period down."""
        for index in self._drawn(share, True):
            offset = self._chance.random() * every
            for number in range(times):
                self._soon(offset + number * every, lambda index=index: self.crash([index]))  # type: ignore[misc]
                self._soon(offset + (number + 0.5) * every, lambda index=index: self._restart(index))  # type: ignore[misc]

    def lose_entry_points(self) -> None:
        """Cut the power of the nodes that newcomers know."""
        self.crash(list(self.entry))

    def groups(self, shares: Iterable[float]) -> list[list[int]]:
        """Divide all live nodes by chance into groups of these shares; the rest joins the last."""
        nodes = self.live()
        self._chance.shuffle(nodes)
        groups: list[list[int]] = []
        start = 0.0
        for share in shares:
            groups.append(nodes[round(start * len(nodes)) : round((start + share) * len(nodes))])
            start += share
        groups[-1] += nodes[round(start * len(nodes)) :]
        return groups

    # --- churn --------------------------------------------------------------------------------------------------------

    def churn(self, model: str) -> None:
        """Let sessions end by a model from now on; `none` ends churn. Stable nodes and entry points stay."""
        self._churn += 1
        if model == "none":
            return
        for index in list(self.up_since):
            if index not in self._kept:
                self._soon(self._session(model, is_running=True), self._departure(index, model))

    def _session(self, model: str, *, is_running: bool = False) -> float:
        mean = self.options.session_minutes * 60.0
        if model == "exponential":
            return exponential(self._churn_chance, mean)
        shape = self.options.weibull_shape
        if not is_running:
            return weibull(self._churn_chance, mean, shape)
        # Looking at a random moment one meets long sessions more often, each at a random point of its length.
        lengths = [weibull(self._churn_chance, mean, shape) for _ in range(RESIDUAL_DRAWS)]
        return self._churn_chance.choices(lengths, lengths)[0] * self._churn_chance.random()

    def _departure(self, index: int, model: str) -> Callable[[], None]:
        generation = self._churn
        since = self.up_since.get(index)

        def depart() -> None:
            if generation != self._churn or self.up_since.get(index) != since or index in self._kept:
                return
            self.driver.crash(index)
            self._went_down(index)
            self._soon(self.options.absence_seconds, lambda: self._replace(index, model, generation))

        return depart

    def _replace(self, index: int, model: str, generation: int) -> None:
        if generation != self._churn:
            return
        if self._churn_chance.random() < self.options.returning:
            self._restart(index)
            successor = index
        else:
            self._down.pop(index, None)
            successor = self.add()
        self._soon(self._session(model), self._departure(successor, model))

    # --- inside -------------------------------------------------------------------------------------------------------

    def _restart(self, index: int) -> None:
        if index not in self.up_since:
            self.driver.restart(index)
            self._came_up(index)

    def _came_up(self, index: int) -> None:
        self.up_since[index] = self.driver.now
        self._down.pop(index, None)
        self._is_changed = True
        self._on_change(index)

    def _went_down(self, index: int) -> None:
        del self.up_since[index]
        self._down[index] = None
        self._is_changed = True
        self._on_change(index)

    def _drawn(self, share: float, keep_stable: bool) -> list[int]:
        candidates = [index for index in self.up_since if not (keep_stable and index in self._kept)]
        return self._chance.sample(candidates, min(len(candidates), round(share * len(self.up_since))))

    def _soon(self, delay: float, action: Callable[[], object]) -> None:
        self.driver.schedule(delay, lambda: (action(), None)[1])


def drawn_reader(population: Population, chance: Random) -> int | None:
    """Give a reader that is up, or None."""
    readers = population.live_readers()
    return chance.choice(readers) if readers else None
