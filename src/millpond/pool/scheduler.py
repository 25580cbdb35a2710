"""Who gets which device, and when. Pure: events in, decisions out; time is an argument.

pending → granted → active → released | expired | preempted | failed. First come, first served: nobody passes the
one who waits longest, so nobody starves. A device stays taken until its lease's workers are known to be gone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from millpond.pool.errors import LeaseError
from millpond.pool.wire import CLOSED_S

State = Literal["pending", "granted", "active", "released", "expired", "preempted", "failed"]
End = Literal["released", "expired", "preempted", "failed"]
LIVE = frozenset({"pending", "granted", "active"})

MAX_PENDING = 128
"""Leases that may wait at a time."""
MAX_PARTS = 32
"""Leases that may share one device."""
LEFT = "its client ended without giving it back"
KEEP_PAST = 256
"""Ended leases that are remembered."""


@dataclass(frozen=True)
class Device:
    """A device that the pool lends: `torch_name` is what its worker calls it (`cpu`, `cuda:1`)."""

    index: int
    name: str
    torch_name: str
    memory_bytes: int
    host: str = ""
    """Name of the machine that it is in."""
    jobs: bool = False
    """Whether that machine runs jobs."""


@dataclass(kw_only=True)
class Lease:
    """A lease, live or past. Times are seconds of the caller's clock."""

    id: str
    owner: str
    count: int
    part_bytes: int
    """Memory wanted of each device; 0: the whole device."""
    created: float
    changed: float
    wait_s: float
    heard: float
    worked: float
    left: float | None = None
    """When its client's connection closed; None while there is one, or silence."""
    state: State = "pending"
    reason: str = ""
    devices: tuple[Device, ...] = ()
    job: bool = False
    """Whether it is for a job, which runs on one device of a host that runs jobs."""

    @property
    def is_live(self) -> bool:
        """Return whether the lease has not ended."""
        return self.state in LIVE

    def bytes_on(self, device: Device) -> int:
        """Return the memory that this lease takes of a device when it is placed there."""
        return self.part_bytes or device.memory_bytes

    @property
    def memory_bytes(self) -> int:
        """Return the memory that this lease has, over all its devices."""
        return sum(self.bytes_on(device) for device in self.devices)


@dataclass(frozen=True)
class Wait:
    """Tell the client that its lease is pending, and why (`Lease.reason`)."""

    lease: Lease


@dataclass(frozen=True)
class Start:
    """Start a worker on each of the lease's devices, then call `workers_started`, or `end` if one fails."""

    lease: Lease


@dataclass(frozen=True)
class Stop:
    """The lease is over: tell the client, end its workers, then call `workers_gone`."""

    lease: Lease


Decision = Wait | Start | Stop


@dataclass
class Scheduler:
    """The leases of one pool."""

    devices: Sequence[Device]
    grace_s: float
    idle_limit_s: float = 0.0
    leases: dict[str, Lease] = field(default_factory=dict)
    _holders: dict[str, Lease] = field(default_factory=dict)
    """Leases whose devices are taken: live ones, and ended ones whose workers are not gone yet."""
    _away: set[str] = field(default_factory=set)
    """Hosts that cannot be reached now; they keep what they have, and are given nothing."""

    def host_joined(self, now: float, devices: Sequence[Device]) -> list[Decision]:
        """Lend the devices of one more host too."""
        self.devices = sorted([*self.devices, *devices], key=lambda device: device.index)
        return self._place(now)

    def host_lost(self, now: float, host: str) -> list[Decision]:
        """Lend a host's devices no more; the leases on them end when their workers do (`end`)."""
        self.devices = [device for device in self.devices if device.host != host]
        self._away.discard(host)
        return self._place(now)

    def host_away(self, host: str) -> None:
        """Give a host nothing until it is back: its connection broke."""
        self._away.add(host)

    def host_back(self, now: float, host: str) -> list[Decision]:
        """Note that a host can be reached again."""
        self._away.discard(host)
        return self._place(now)

    def request(
        self,
        now: float,
        lease_id: str,
        owner: str,
        count: int = 1,
        part_bytes: int = 0,
        wait_s: float = 0.0,
        *,
        job: bool = False,
    ) -> list[Decision]:
        """Ask for `count` devices, whole or `part_bytes` of each, to be had within `wait_s`; for a `job`, or for torch.

        Raises:
            LeaseError: this pool can never give it, or too many wait already.
        """
        if not self.devices:
            raise LeaseError("This pool has no devices now: no host has joined it, or all have left. Try again later.")
        if job and count > 1:
            raise LeaseError("A job runs on one device. Ask for one.")
        if job and not any(device.jobs for device in self.devices):
            raise LeaseError(
                "No host of this pool runs jobs. On a GPU host start Ray, and set MILLPOND_POOL_RAY_ADDRESS for "
                "millpond pool serve or join there."
            )
        fitting = [device for device in self.devices if device.memory_bytes >= part_bytes and (device.jobs or not job)]
        if len(fitting) < count:
            offered = ", ".join(f"{device.index}: {gib(device.memory_bytes)}" for device in self.devices)
            asked = f"{count} device(s)" + (f" with {gib(part_bytes)} each" if part_bytes else "")
            asked += " for a job" if job else ""
            raise LeaseError(f"This pool can never lend {asked}: its devices are {offered}. Ask for less.")
        if sum(lease.state == "pending" for lease in self.leases.values()) >= MAX_PENDING:
            raise LeaseError(f"{MAX_PENDING} leases wait already. Try again later.")
        lease = Lease(
            id=lease_id,
            owner=owner,
            count=count,
            part_bytes=part_bytes,
            created=now,
            changed=now,
            wait_s=wait_s,
            heard=now,
            worked=now,
            job=job,
        )
        self.leases[lease_id] = lease
        decisions = self._place(now)
        if lease.state == "pending" and wait_s <= 0:
            return [*(d for d in decisions if d.lease is not lease), *self._give_up(now, lease)]
        return decisions

    def workers_started(self, now: float, lease_id: str) -> bool:
        """Return whether the lease now is active; False: it ended while its workers started."""
        lease = self.leases.get(lease_id)
        if lease is None or lease.state != "granted":
            return False
        self._change(now, lease, "active", "")
        lease.worked = now
        return True

    def client_heard(self, now: float, lease_id: str) -> None:
        """Note a sign of life of a lease's client."""
        if lease_id in self.leases:
            self.leases[lease_id].heard = now
            self.leases[lease_id].left = None

    def client_left(self, now: float, lease_id: str) -> list[Decision]:
        """Note that a lease's client has closed its connection: it has ended, or something between has, and mends."""
        lease = self.leases.get(lease_id)
        if lease is None or lease.state != "active":  # only who was granted something can come back for it
            return self.end(now, lease_id, "failed", LEFT)
        lease.left = now
        return []

    def worked(self, at: float, lease_id: str) -> None:
        """Note when a lease last did some work."""
        if lease_id in self.leases:
            self.leases[lease_id].worked = max(at, self.leases[lease_id].worked)

    def end(self, now: float, lease_id: str, state: End, reason: str) -> list[Decision]:
        """End a lease; one that has ended keeps its first state and reason."""
        lease = self.leases.get(lease_id)
        if lease is None or not lease.is_live:
            return []
        self._change(now, lease, state, reason)
        return [Stop(lease), *self._place(now)]

    def workers_gone(self, now: float, lease_id: str) -> list[Decision]:
        """Give the devices of an ended lease to those who wait."""
        self._holders.pop(lease_id, None)
        return self._place(now)

    def tick(self, now: float) -> list[Decision]:
        """End what has waited, been silent or been idle for too long."""
        decisions: list[Decision] = []
        for lease in [lease for lease in self.leases.values() if lease.is_live]:
            if lease.left is not None and now - lease.left > min(CLOSED_S, self.grace_s):
                decisions += self.end(now, lease.id, "failed", LEFT)
            elif now - lease.heard > self.grace_s:
                silent = f"nothing was heard of its client for {now - lease.heard:.0f} s"
                decisions += self.end(now, lease.id, "expired", silent)
            elif lease.state == "pending" and now - lease.created >= lease.wait_s:
                decisions += self._give_up(now, lease)
            elif lease.state == "active" and 0 < self.idle_limit_s < now - lease.worked:
                idle = f"it was idle for {now - lease.worked:.0f} s; the pool allows {self.idle_limit_s:g} s"
                decisions += self.end(now, lease.id, "expired", idle)
        return decisions

    def free_bytes(self, device: Device) -> int:
        """Return how much memory of a device is not lent."""
        return device.memory_bytes - sum(lease.bytes_on(device) for lease in self._on(device))

    def _on(self, device: Device) -> list[Lease]:
        return [lease for lease in self._holders.values() if device in lease.devices]

    def _place(self, now: float) -> list[Decision]:
        """Grant to those who wait, in order, until one does not fit; tell the others what they wait for."""
        decisions: list[Decision] = []
        ahead = 0
        for lease in [lease for lease in self.leases.values() if lease.state == "pending"]:
            if not ahead and (chosen := self._choose(lease)):
                lease.devices = chosen
                self._holders[lease.id] = lease
                self._change(now, lease, "granted", "")
                decisions.append(Start(lease))
                continue
            reason = f"{ahead} lease(s) wait before this one" if ahead else self._obstacle()
            ahead += 1
            if reason != lease.reason:
                lease.reason = reason
                decisions.append(Wait(lease))
        return decisions

    def _choose(self, lease: Lease) -> tuple[Device, ...]:
        """Return devices for a lease, of one host if possible; () if too few fit.

        The fullest that fit come first, so that empty ones stay whole.
        """
        fitting = [
            device
            for device in self.devices
            if device.host not in self._away
            and (device.jobs or not lease.job)
            and self.free_bytes(device) >= lease.bytes_on(device)
            and len(self._on(device)) < MAX_PARTS
        ]
        fitting.sort(key=lambda device: (self.free_bytes(device), device.index))
        of_host: dict[str, list[Device]] = {}
        for device in fitting:
            of_host.setdefault(device.host, []).append(device)
        together = next((devices for devices in of_host.values() if len(devices) >= lease.count), fitting)
        chosen = together[: lease.count]
        return tuple(sorted(chosen, key=lambda device: device.index)) if len(chosen) == lease.count else ()

    def _obstacle(self) -> str:
        holders = {device.index: [lease.owner for lease in self._on(device)] for device in self.devices}
        held = [f"device {index} by {', '.join(owners)}" for index, owners in holders.items() if owners]
        held += [f"out of reach now: host {host}" for host in sorted(self._away)]
        return f"held: {'; '.join(held)}"[:1000] if held else "a host has left the pool, and too few devices remain"

    def _give_up(self, now: float, lease: Lease) -> list[Decision]:
        return self.end(now, lease.id, "expired", f"no device was free within {lease.wait_s:g} s ({lease.reason})")

    def _change(self, now: float, lease: Lease, state: State, reason: str) -> None:
        lease.state, lease.reason, lease.changed = state, reason, now
        if not lease.is_live:
            past = [known for known in self.leases.values() if not known.is_live]
            for oldest in sorted(past, key=lambda known: known.changed)[:-KEEP_PAST]:
                del self.leases[oldest.id]


def recall(records: Iterable[Lease], now: float) -> dict[str, Lease]:
    """Return the leases of a pool that ended, as its successor knows them: what lived then has failed."""
    return {
        lease.id: dataclasses.replace(lease, state="failed", reason="the broker ended", changed=now)
        if lease.is_live
        else lease
        for lease in records
    }


def gib(size: int) -> str:
    """Return a size in bytes for people."""
    return f"{size / 2**30:.3g} GiB"
