"""Traces: lines, digest, file, and where a replay leaves the recorded run."""

from p2pnode.sim.trace import LEGEND, Divergence, Trace, recorded_lines


def filled(trace: Trace, count: int = 1200, odd: int = -1) -> Trace:
    for index in range(count):
        trace.add(index / 10, "q", "alice", "bob", f"FindNode {index if index != odd else -1}")
    return trace


def test_equal_events_have_equal_digests_and_one_change_shows() -> None:
    assert filled(Trace()).digest() == filled(Trace()).digest()
    assert filled(Trace()).digest() != filled(Trace(), odd=700).digest()
    trace = filled(Trace())
    assert trace.digest() == trace.digest()


def test_the_file_holds_legend_lines_and_digest(tmp_path) -> None:
    path = tmp_path / "trace.txt"
    trace = Trace(file=path)
    trace.head(["world of two"])
    filled(trace, 3)
    trace.close()
    lines = path.read_text().splitlines()
    assert lines[0] == "# world of two"
    assert all(any(line.startswith(f"# {kind} ") for line in lines) for kind in LEGEND)
    assert lines[-1] == f"# digest {trace.digest()} of 3 lines"
    assert list(recorded_lines(path))[1] == "0.100000 q alice bob FindNode 1"


def test_a_replay_names_the_first_line_that_differs() -> None:
    lines = [f"{index / 10:.6f} q alice bob FindNode {index}" for index in range(1200)]
    same = filled(Trace(recorded=lines))
    same.close()
    assert same.divergence is None
    other = filled(Trace(recorded=lines), odd=700)
    other.close()
    assert other.divergence == Divergence(701, "70.000000 q alice bob FindNode 700", "70.000000 q alice bob FindNode -1")
    short = filled(Trace(recorded=lines), count=1199)
    short.close()
    assert short.divergence == Divergence(1200, lines[-1], "")
    longer = filled(Trace(recorded=lines[:-1]))
    longer.close()
    assert longer.divergence == Divergence(1200, "", lines[-1])


def test_levels() -> None:
    events = filled(Trace("events"))
    events.add(1.0, "x", "alice")
    events.digest()
    assert events.count == 1
    off = filled(Trace("off"))
    off.digest()
    assert off.count == 0


def test_the_last_lines_stay_in_memory() -> None:
    trace = filled(Trace(keep=5))
    trace.digest()
    assert [line.split()[-1] for line in trace.last] == ["1195", "1196", "1197", "1198", "1199"]
