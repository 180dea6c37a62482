"""The registry alone: fairness, leases, quotas, lost workers, transitions; and flow control and tickets, which have clocks, too."""

from __future__ import annotations

import random

import pytest

from longtake.errors import LongtakeError
from longtake.runtime.serve.auth import Door, tokens_from_file
from longtake.runtime.serve.flow import MediaClock, Rate, flow_for
from longtake.runtime.serve.grants import Grant
from longtake.runtime.serve.registry import ACTIVE, ENDED, PAUSED, QUEUED, TRANSITIONS, QuotaError, Registry


def registry(slots: int = 1, **limits: int) -> Registry:
    made = Registry(**limits)
    made.register("w", slots, 0, 0.0)
    return made


def test_a_place_is_given_and_given_back() -> None:
    one = registry()
    first, second = one.ask("a", "s1", "live", 0.0), one.ask("b", "s2", "live", 1.0)
    assert one.place(2.0) == [Grant("s1", "w", 1)] and one.place(2.0) == []
    queue = one.position("s2")
    assert queue is not None and queue.position == 0 and one.position("s1") is None
    one.release("s1", first.number)
    assert one.place(3.0) == [Grant("s2", "w", 1)]
    one.release("s2", second.number)
    assert not one.entries and one.load() == 0


def test_a_wait_is_estimated_by_how_long_places_were_held() -> None:
    one = registry(slots=2)
    for number in range(5):
        one.ask(f"u{number}", f"s{number}", "live", 0.0)
    one.place(10.0)
    queue = one.position("s2")
    assert queue is not None and queue.estimate_s is None
    one.release("s0", one.entries["s0"].number, 30.0)
    assert [one.position(f"s{n}").estimate_s for n in (2, 3, 4)] == [10.0, 20.0, 30.0]  # type: ignore[union-attr]
    one.place(30.0)
    one.release("s1", one.entries["s1"].number, 60.0)
    assert one.held_s == pytest.approx(0.7 * 20 + 0.3 * 50)


def test_users_take_turns() -> None:
    one = registry(user_jobs=9)
    asked = [("a", f"a{i}") for i in range(4)] + [("b", "b0"), ("c", "c0")]
    entries = {session: one.ask(user, session, "video", float(i)) for i, (user, session) in enumerate(asked)}
    order = []
    while grants := one.place(0.0):
        order.append(grants[0].session)
        one.release(grants[0].session, entries[grants[0].session].number)
        if len(order) == 1:  # while a's first runs, b and c come before a's second
            continue
    assert order[0] == "a0" and set(order) == {session for _, session in asked}
    two = registry(slots=2, user_jobs=9)
    for i, (user, session) in enumerate(asked):
        two.ask(user, session, "video", float(i))
    assert {grant.session for grant in two.place(0.0)} == {"a0", "b0"}


def test_live_sessions_go_before_jobs_and_moved_ones_before_all() -> None:
    one = registry(user_jobs=9, user_sessions=9)
    running = one.ask("a", "run", "video", 0.0)
    one.place(0.0)
    one.ask("a", "job", "video", 1.0)
    one.ask("b", "live", "live", 2.0)
    one.ask("b", "moved", "video", 3.0, moved=True)
    assert [one.position(s).position for s in ("moved", "live", "job")] == [0, 1, 2]  # type: ignore[union-attr]
    one.release("run", running.number)
    assert one.place(4.0)[0].session == "moved"


def test_a_lost_worker_gives_back_its_sessions_with_new_leases() -> None:
    one = registry(slots=2, user_sessions=2)
    one.ask("a", "s1", "live", 0.0, epoch=4)
    one.ask("a", "s2", "live", 0.0)
    assert {grant.epoch for grant in one.place(0.0)} == {5, 1}
    one.register("v", 2, 0, 1.0)
    assert sorted(one.lost("w", 2.0)) == ["s1", "s2"]
    grants = {grant.session: grant for grant in one.place(3.0)}
    assert grants["s1"] == Grant("s1", "v", 6) and grants["s2"].epoch == 2
    assert one.holds("s1", 6) and not one.holds("s1", 5)
    assert one.expired(100.0) == ["v"]


def test_whoever_asks_later_has_the_session() -> None:
    one = registry(slots=2)
    first = one.ask("a", "s", "live", 0.0)
    one.place(0.0)
    second = one.ask("a", "s", "live", 1.0)
    assert not one.is_asked("s", first.number) and one.place(1.0)[0].epoch == 2
    one.release("s", first.number)  # the older connection goes: that is no business of the newer one's
    assert one.is_asked("s", second.number)


def test_a_newer_deployment_gets_what_comes() -> None:
    one = registry(slots=5)
    one.register("new", 1, 1, 0.0)
    one.ask("a", "s", "live", 0.0)
    assert one.place(0.0)[0].worker == "new" and one.stale("w") and not one.stale("new")


def test_a_registry_that_died_is_filled_by_the_workers() -> None:
    one = registry()
    one.adopt(Grant("s", "w", 7), "a", "live", 0.0)
    one.ask("b", "t", "live", 1.0)
    assert one.place(1.0) == [] and one.holds("s", 7)
    one.adopt(Grant("s", "w", 6), "a", "live", 2.0)
    assert one.holds("s", 7)


def test_quotas() -> None:
    one = Registry(user_sessions=1, user_jobs=2, queue=3)
    one.ask("a", "s", "live", 0.0)
    one.ask("a", "s", "live", 0.0)  # its own again
    with pytest.raises(QuotaError) as error:
        one.ask("a", "t", "live", 0.0)
    assert error.value.code == "quota"
    one.ask("a", "j", "video", 0.0)
    one.ask("b", "u", "live", 0.0)
    with pytest.raises(QuotaError) as error:
        one.ask("c", "v", "live", 0.0)
    assert error.value.code == "queue_full"


def test_transitions_are_a_table() -> None:
    one = registry()
    one.ask("a", "s", "live", 0.0)
    with pytest.raises(LongtakeError, match="cannot do that"):
        one.moves("s", PAUSED)
    one.place(0.0)
    one.moves("s", ACTIVE)
    one.moves("s", PAUSED)
    assert all(after in TRANSITIONS for many in TRANSITIONS.values() for after in many)
    assert all(TRANSITIONS[state] == (QUEUED,) for state in ENDED)


def test_no_order_of_calls_breaks_it() -> None:
    """Random calls: never more sessions on a worker than places, epochs only grow, whoever waits has a position."""
    chance, one, epochs, numbers = random.Random(3), Registry(user_sessions=99, user_jobs=99, queue=999), {}, {}
    for step in range(3000):
        what, session = chance.randrange(6), f"s{chance.randrange(20)}"
        if what == 0:
            one.register(f"w{chance.randrange(3)}", chance.randrange(1, 3), 0, step)
        elif what == 1:
            one.lost(f"w{chance.randrange(3)}", step)
        elif what == 2:
            numbers[session] = one.ask(
                f"u{chance.randrange(4)}", session, chance.choice(("live", "video")), step
            ).number
        elif what == 3 and session in numbers:
            one.release(session, numbers[session])
        for grant in one.place(step):
            assert grant.epoch > epochs.get(grant.session, 0)
            epochs[grant.session] = grant.epoch
        for worker, place in one.workers.items():
            running = [e for e in one.entries.values() if e.grant and e.grant.worker == worker]
            assert len(running) <= max(place.slots, 2)
        for entry in one.entries.values():
            assert (one.position(entry.session) is not None) == (entry.state == QUEUED)


def test_flow() -> None:
    assert flow_for(None, None, 8, endless=False).ahead is None
    assert flow_for("ack", 3, 8, endless=True).ahead == 3
    for mode, window, endless in (
        (None, None, True),
        ("free", None, True),
        ("ack", 0, False),
        ("ack", 9, False),
        ("x", 1, False),
    ):
        with pytest.raises(LongtakeError):
            flow_for(mode, window, 8, endless)


def test_the_media_clock_waits_for_what_is_late() -> None:
    now = [0.0]
    clock = MediaClock(24, lambda: now[0])
    assert clock.shown() == -1
    clock.arrived(24)
    clock.arrived(24)
    assert clock.shown() == 0
    now[0] = 1.5
    assert clock.shown() == 1
    now[0] = 60.0
    assert clock.shown() == 1
    clock.arrived(24)
    assert clock.shown() == 2
    now[0] = 60.9
    clock.arrived(24)
    assert clock.shown() == 2
    now[0] = 61.1
    assert clock.shown() == 3


def test_messages_have_a_rate() -> None:
    now = [0.0]
    rate = Rate(10.0, 20, lambda: now[0])
    assert sum(rate.allows() for _ in range(100)) == 20
    now[0] = 1.0
    assert sum(rate.allows() for _ in range(100)) == 10


def test_tickets_and_tokens(tmp_path: object) -> None:
    from pathlib import Path

    file = Path(str(tmp_path)) / "tokens"
    file.write_text("# users\nanna:0123456789abcdef\n\nabcdefghijklmnopq\n")
    door = Door(b"secret", tokens_from_file(file), ("example.org",), ("https://video.example.org",))
    assert door.user("Bearer 0123456789abcdef") == "anna" and door.user("bearer abcdefghijklmnopq").startswith("user-")  # type: ignore[union-attr]
    for wrong in (None, "", "Bearer", "Bearer x", "Basic 0123456789abcdef", "Bearer 0123456789abcdeF", "Bearer \ud800"):
        assert door.user(wrong) is None
    ticket = door.ticket("anna", now=100.0)
    assert door.user(None, ticket, now=150.0) == "anna" and door.user(None, ticket, now=161.0) is None
    for wrong in (ticket[:-2] + "AA", "", "x", ticket.upper(), "%%%"):
        assert door.user(None, wrong, now=150.0) is None
    assert Door(b"other", door.tokens).user(None, ticket, now=150.0) is None
    for host in ("localhost:8000", "127.0.0.1", "[::1]:80", "192.168.1.4:8000", "example.org", "video.example.org"):
        assert door.knows_host(host)
    for host in (None, "", "evil.example", "localhost.evil.example", "a b", "[::1"):
        assert not door.knows_host(host)
    assert door.knows_origin(None, "x") and door.knows_origin("https://video.example.org", "x")
    assert door.knows_origin("http://localhost:8000", "localhost:8000")
    for origin in ("http://localhost:8001", "https://evil.example", "null", "http://[", "file://localhost:8000"):
        assert not door.knows_origin(origin, "localhost:8000")
    for bad in ("", "short", "an na:0123456789abcdef", "# nothing"):
        file.write_text(bad)
        with pytest.raises(LongtakeError):
            tokens_from_file(file)
