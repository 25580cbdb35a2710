"""The scheduler decides alone: every case here is a list of events with their times."""

import random

import pytest

from millpond.pool.errors import LeaseError
from millpond.pool.scheduler import KEEP_PAST, MAX_PARTS, MAX_PENDING, Device, Scheduler, Start, Stop, Wait, recall

GIB = 2**30


def pool(*sizes: int, **options: float) -> Scheduler:
    devices = [Device(i, f"GPU {i}", f"cuda:{i}", size * GIB) for i, size in enumerate(sizes or (8,))]
    return Scheduler(devices, **{"grace_s": 8.0, **options})


def started(decisions) -> list[str]:
    return [decision.lease.id for decision in decisions if isinstance(decision, Start)]


def stopped(decisions) -> list[str]:
    return [decision.lease.id for decision in decisions if isinstance(decision, Stop)]


def activate(scheduler: Scheduler, now: float, lease: str) -> None:
    assert scheduler.workers_started(now, lease)


def test_a_free_device_is_granted_at_once():
    scheduler = pool()
    assert started(scheduler.request(0, "a", "ann")) == ["a"]
    assert scheduler.leases["a"].state == "granted"
    activate(scheduler, 1, "a")
    assert scheduler.leases["a"].state == "active"
    assert scheduler.leases["a"].memory_bytes == 8 * GIB
    assert scheduler.free_bytes(scheduler.devices[0]) == 0


def test_parts_share_a_device_up_to_its_memory():
    scheduler = pool(8)
    assert started(scheduler.request(0, "a", "ann", part_bytes=3 * GIB)) == ["a"]
    assert started(scheduler.request(0, "b", "bob", part_bytes=5 * GIB)) == ["b"]
    assert not started(scheduler.request(0, "c", "cid", part_bytes=1, wait_s=9))


def test_a_whole_device_is_never_shared():
    scheduler = pool(8)
    scheduler.request(0, "a", "ann", part_bytes=GIB)
    assert not started(scheduler.request(0, "b", "bob", wait_s=9))
    scheduler.end(1, "a", "released", "")
    assert started(scheduler.workers_gone(1, "a")) == ["b"]


def test_parts_fill_the_fullest_device_so_that_others_stay_whole():
    scheduler = pool(8, 8)
    scheduler.request(0, "a", "ann", part_bytes=2 * GIB)
    scheduler.request(0, "b", "bob", part_bytes=2 * GIB)
    assert scheduler.leases["b"].devices == scheduler.leases["a"].devices
    assert started(scheduler.request(0, "c", "cid")) == ["c"]


def test_several_devices_are_distinct():
    scheduler = pool(8, 8, 8)
    scheduler.request(0, "a", "ann", count=2, part_bytes=GIB)
    assert len(set(scheduler.leases["a"].devices)) == 2


def test_a_device_stays_taken_until_the_workers_are_gone():
    scheduler = pool()
    scheduler.request(0, "a", "ann")
    scheduler.request(0, "b", "bob", wait_s=99)
    assert stopped(scheduler.end(1, "a", "released", "")) == ["a"]
    assert scheduler.leases["b"].state == "pending"
    assert started(scheduler.workers_gone(2, "a")) == ["b"]


def test_a_host_that_is_out_of_reach_keeps_what_it_has_and_is_given_nothing_until_it_is_back():
    scheduler = Scheduler([Device(0, "GPU", "cuda:0", 8 * GIB, "near")], grace_s=8.0)
    scheduler.host_joined(0, [Device(1, "GPU", "cuda:0", 8 * GIB, "far")])
    assert started(scheduler.request(0, "a", "ann", part_bytes=GIB)) == ["a"]
    assert started(scheduler.request(0, "b", "bob")) == ["b"]
    activate(scheduler, 0, "b")
    scheduler.host_away("far")
    assert scheduler.leases["b"].is_live
    scheduler.end(1, "b", "released", "")
    scheduler.workers_gone(1, "b")
    assert not started(scheduler.request(2, "c", "cid", wait_s=9))
    assert "out of reach now: host far" in scheduler.leases["c"].reason
    assert started(scheduler.host_back(3, "far")) == ["c"]


def test_nobody_passes_the_one_who_waits_longest():
    scheduler = pool(8)
    scheduler.request(0, "a", "ann", part_bytes=4 * GIB)
    scheduler.request(1, "whole", "bob", wait_s=99)
    assert not started(scheduler.request(2, "small", "cid", part_bytes=GIB, wait_s=99))
    assert scheduler.leases["small"].reason == "1 lease(s) wait before this one"
    scheduler.end(3, "a", "released", "")
    assert started(scheduler.workers_gone(3, "a")) == ["whole"]


def test_one_who_gives_up_lets_the_next_in():
    scheduler = pool(8)
    scheduler.request(0, "a", "ann", part_bytes=4 * GIB)
    scheduler.request(1, "whole", "bob", wait_s=5)
    scheduler.request(2, "small", "cid", part_bytes=GIB, wait_s=99)
    decisions = scheduler.tick(6)
    assert stopped(decisions) == ["whole"]
    assert started(decisions) == ["small"]
    assert scheduler.leases["whole"].state == "expired"
    assert "no device was free within 5 s" in scheduler.leases["whole"].reason
    assert "ann" in scheduler.leases["whole"].reason


def test_without_waiting_a_busy_pool_ends_the_request_at_once():
    scheduler = pool()
    scheduler.request(0, "a", "ann")
    decisions = scheduler.request(0, "b", "bob")
    assert stopped(decisions) == ["b"]
    assert not any(isinstance(decision, Wait) for decision in decisions)
    assert scheduler.leases["b"].state == "expired"


def test_who_waits_is_told_why_once():
    scheduler = pool()
    scheduler.request(0, "a", "ann")
    (told,) = scheduler.request(0, "b", "bob", wait_s=99)
    assert isinstance(told, Wait)
    assert told.lease.reason == "held: device 0 by ann"
    assert scheduler.tick(1) == []


def test_a_silent_client_loses_its_lease():
    scheduler = pool()
    scheduler.request(0, "a", "ann")
    activate(scheduler, 0, "a")
    scheduler.client_heard(5, "a")
    assert scheduler.tick(13) == []
    assert stopped(scheduler.tick(13.1)) == ["a"]
    assert scheduler.leases["a"].state == "expired"


def test_an_idle_lease_expires_and_a_working_one_does_not():
    scheduler = pool(8, idle_limit_s=10, grace_s=1e9)
    scheduler.request(0, "a", "ann")
    activate(scheduler, 0, "a")
    scheduler.worked(5, "a")
    scheduler.worked(4, "a")
    assert scheduler.tick(15) == []
    assert stopped(scheduler.tick(15.1)) == ["a"]


def test_without_an_idle_limit_no_lease_expires():
    scheduler = pool(8, grace_s=1e9)
    scheduler.request(0, "a", "ann")
    activate(scheduler, 0, "a")
    assert scheduler.tick(1e6) == []


def test_an_ended_lease_keeps_its_first_reason():
    scheduler = pool()
    scheduler.request(0, "a", "ann")
    scheduler.end(1, "a", "failed", "the worker was killed")
    assert scheduler.end(2, "a", "released", "") == []
    assert (scheduler.leases["a"].state, scheduler.leases["a"].reason) == ("failed", "the worker was killed")
    assert not scheduler.workers_started(3, "a")


@pytest.mark.parametrize(("count", "part_bytes"), [(3, 0), (1, 9 * GIB), (2, 5 * GIB)])
def test_what_the_pool_can_never_give_is_refused(count, part_bytes):
    scheduler = pool(8, 4)
    with pytest.raises(LeaseError, match="can never lend"):
        scheduler.request(0, "a", "ann", count=count, part_bytes=part_bytes)
    assert scheduler.leases == {}


def test_the_queue_is_bounded():
    scheduler = pool()
    for number in range(MAX_PENDING + 1):
        scheduler.request(0, str(number), "ann", wait_s=99)
    with pytest.raises(LeaseError, match="wait already"):
        scheduler.request(0, "one more", "ann", wait_s=99)


def test_the_parts_of_a_device_are_bounded():
    scheduler = pool(8)
    for number in range(MAX_PARTS):
        scheduler.request(0, str(number), "ann", part_bytes=1)
    assert not started(scheduler.request(0, "one more", "ann", part_bytes=1, wait_s=9))


def test_the_past_is_bounded():
    scheduler = pool()
    for number in range(KEEP_PAST + 10):
        scheduler.request(number, str(number), "ann")
        scheduler.end(number, str(number), "released", "")
        scheduler.workers_gone(number, str(number))
    assert len(scheduler.leases) == KEEP_PAST
    assert "9" not in scheduler.leases


def test_after_a_restart_what_lived_has_failed():
    scheduler = pool(8, 8)
    scheduler.request(0, "a", "ann")
    scheduler.request(0, "b", "bob")
    scheduler.end(1, "b", "released", "done")
    recalled = recall(scheduler.leases.values(), 9)
    assert (recalled["a"].state, recalled["a"].reason) == ("failed", "the broker ended")
    assert (recalled["b"].state, recalled["b"].changed) == ("released", 1)


def test_over_any_history_no_device_is_lent_twice():
    draw = random.Random(7)
    scheduler = pool(8, 4, 16)
    now, stopping = 0.0, []
    for step in range(3000):
        now += draw.random()
        event = draw.random()
        live = [lease.id for lease in scheduler.leases.values() if lease.is_live]
        if event < 0.4:
            count, part = draw.choice([(1, 0), (2, 0), (1, 2 * GIB), (3, 3 * GIB), (1, 12 * GIB)])
            decisions = scheduler.request(now, str(step), "ann", count, part, wait_s=draw.choice([0, 20]))
        elif event < 0.6 and live:
            decisions = scheduler.end(now, draw.choice(live), "released", "")
        elif event < 0.9 and stopping:
            decisions = scheduler.workers_gone(now, stopping.pop(draw.randrange(len(stopping))))
        else:
            for lease in live[:-1]:
                scheduler.client_heard(now, lease)
            decisions = scheduler.tick(now)
        stopping += stopped(decisions)
        for device in scheduler.devices:
            assert 0 <= scheduler.free_bytes(device) <= device.memory_bytes
            holders = [lease for lease in scheduler.leases.values() if lease.is_live and device in lease.devices]
            assert sum(lease.bytes_on(device) for lease in holders) <= device.memory_bytes
    for lease in [lease.id for lease in scheduler.leases.values() if lease.is_live]:
        stopping += stopped(scheduler.end(now, lease, "released", ""))
    while stopping:
        stopping += stopped(scheduler.workers_gone(now, stopping.pop()))
        for lease in [lease.id for lease in scheduler.leases.values() if lease.is_live]:
            stopping += stopped(scheduler.end(now, lease, "released", ""))
    assert all(scheduler.free_bytes(device) == device.memory_bytes for device in scheduler.devices)


def two_hosts(*sizes: tuple[str, int]) -> Scheduler:
    devices = [Device(i, "GPU", f"cuda:{i}", size * GIB, host) for i, (host, size) in enumerate(sizes)]
    return Scheduler(devices, grace_s=8.0)


def test_a_lease_of_several_devices_stays_on_one_host_if_it_can():
    scheduler = two_hosts(("one", 8), ("other", 8), ("other", 8))
    scheduler.request(0, "a", "ann", count=2)
    assert {device.host for device in scheduler.leases["a"].devices} == {"other"}
    scheduler = two_hosts(("one", 8), ("other", 8))
    scheduler.request(0, "a", "ann", count=2)
    assert {device.host for device in scheduler.leases["a"].devices} == {"one", "other"}


def test_a_pool_that_no_host_has_joined_says_so():
    with pytest.raises(LeaseError, match="no host has joined"):
        Scheduler([], 8.0).request(0, "a", "ann")


def test_a_host_that_joins_serves_who_waits():
    scheduler = two_hosts(("one", 8))
    scheduler.request(0, "a", "ann")
    scheduler.request(0, "b", "bob", wait_s=9)
    assert started(scheduler.host_joined(1, [Device(1, "GPU", "cuda:0", 8 * GIB, "other")])) == ["b"]
    assert [device.index for device in scheduler.leases["b"].devices] == [1]


def test_a_lost_host_lends_no_more_and_its_leases_end_with_their_workers():
    scheduler = two_hosts(("one", 8), ("other", 8))
    scheduler.request(0, "a", "ann")
    scheduler.request(0, "b", "bob")
    activate(scheduler, 0, "b")
    scheduler.host_lost(1, "other")
    assert [device.host for device in scheduler.devices] == ["one"]
    assert scheduler.leases["b"].state == "active"
    assert stopped(scheduler.end(1, "b", "failed", "its host is lost")) == ["b"]
    scheduler.workers_gone(1, "b")
    scheduler.host_joined(2, [Device(1, "GPU", "cuda:0", 8 * GIB, "other")])
    assert [scheduler.free_bytes(device) for device in scheduler.devices] == [0, 8 * GIB]
    with pytest.raises(LeaseError, match="can never lend 3 device"):
        scheduler.request(3, "c", "cid", count=3)
    scheduler.request(3, "c", "cid", count=2, wait_s=99)
    scheduler.end(4, "a", "released", "")
    scheduler.host_lost(4, "other")
    scheduler.workers_gone(4, "a")
    assert scheduler.leases["c"].reason == "a host has left the pool, and too few devices remain"


def test_a_job_has_one_device_and_that_of_a_host_that_runs_jobs():
    scheduler = pool(8, 8)
    with pytest.raises(LeaseError, match=r"No host of this pool runs jobs.*MILLPOND_POOL_RAY_ADDRESS"):
        scheduler.request(0, "a", "ann", job=True)
    scheduler.host_joined(1, [Device(2, "GPU 2", "cuda:0", 4 * GIB, "gpu-2", jobs=True)])
    with pytest.raises(LeaseError, match="A job runs on one device"):
        scheduler.request(2, "a", "ann", 2, job=True)
    with pytest.raises(LeaseError, match=r"never lend 1 device\(s\) with 5 GiB each for a job"):
        scheduler.request(2, "a", "ann", part_bytes=5 * GIB, job=True)
    assert started(scheduler.request(3, "a", "ann", job=True)) == ["a"]
    assert [device.index for device in scheduler.leases["a"].devices] == [2]
    assert not started(scheduler.request(4, "b", "bob", job=True, wait_s=9))
    scheduler.end(5, "a", "released", "")
    assert started(scheduler.workers_gone(5, "a")) == ["b"]
