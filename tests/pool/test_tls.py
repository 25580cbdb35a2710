"""TLS: each way in which two ends do not fit is one clear error at once, and nothing goes on without TLS unasked."""

from __future__ import annotations

import contextlib
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from certificates import Authority, settings
from millpond.pool import agent, broker, handshake, lease, sessions, tls, transport, wire
from millpond.pool.errors import AuthenticationError, ConnectionLost, PoolError, TlsError, WireError
from millpond.settings import PoolSettings, SettingsError
from pool.relay import Relay
from pool.test_breaks import COUNT, start, step, through
from pool_site import TOKEN, BrokerProcess, HostProcess, wait_for
from worker_site import PEER_TOKEN, WorkerProcess, Workers
from worker_site import TOKEN as LEASE_TOKEN
from worker_site import run as run_on_device

TORCH = "2.13.0"
NOTHING = tls.Files()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("certificates")


@pytest.fixture(scope="module")
def authority(folder: Path) -> Authority:
    return Authority(folder)


@pytest.fixture(scope="module")
def pool(authority: Authority) -> tls.Files:
    return authority.issue("pool", "127.0.0.1", "pool.example")


@pytest.fixture(scope="module")
def client(authority: Authority) -> tls.Files:
    return authority.issue("client", "ann")


@pytest.fixture(scope="module")
def stranger(folder: Path) -> tls.Files:
    """What an authority that nobody trusts has signed."""
    return Authority(folder, "strangers").issue("stranger", "127.0.0.1")


class Listening:
    """A listener that greets as a worker does, one caller after another; `refused` is why it turned callers away."""

    def __init__(self, security: tls.Listener | None, timeout_s: float = 10) -> None:
        self.listener = transport.listen("127.0.0.1", 0)
        self.port = self.listener.getsockname()[1]
        self.refused: list[Exception] = []
        self._security, self._timeout_s = security, timeout_s
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            try:
                connection, _ = transport.accept(
                    sock,
                    TOKEN,
                    TORCH,
                    sends="from-worker",
                    receives="to-worker",
                    security=self._security,
                    timeout_s=self._timeout_s,
                )
                connection.close()
            except (PoolError, OSError) as error:
                self.refused.append(error)

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self._thread.join()


@contextlib.contextmanager
def listening(files: tls.Files, timeout_s: float = 10) -> Iterator[Listening]:
    started = Listening(tls.listener(files), timeout_s)
    try:
        yield started
    finally:
        started.close()


def call(port: int, files: tls.Files, name: str = "", timeout_s: float = 10) -> None:
    """Connect, greet, and hang up."""
    greet(port, tls.caller(settings(files, tls_name=name)), timeout_s)


def greet(port: int, security: tls.Caller | None, timeout_s: float = 10) -> None:
    connection, _ = transport.connect(
        "127.0.0.1",
        port,
        TOKEN,
        TORCH,
        sends="to-worker",
        receives="from-worker",
        security=security,
        timeout_s=timeout_s,
    )
    connection.close()


def only(files: tls.Files, *kinds: str) -> tls.Files:
    return tls.Files(**{kind: path for kind, path in vars(files).items() if kind in kinds})


# --- two ends that fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "pool.example"])
def test_one_name_of_the_certificate_is_enough(pool, name):
    with listening(only(pool, "cert", "key")) as listener:
        call(listener.port, only(pool, "ca"), name)
    assert listener.refused == []


def test_both_ends_show_certificates(pool, client):
    with listening(pool) as listener:
        call(listener.port, client)
    assert listener.refused == []


def test_nothing_older_than_tls_13_is_spoken(pool):
    with listening(only(pool, "cert", "key")) as listener:
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.load_verify_locations(pool.ca)
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        with (
            socket.create_connection(("127.0.0.1", listener.port), 10) as sock,
            pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"),
        ):
            old.wrap_socket(sock, server_hostname="127.0.0.1")


# --- two ends that do not --------------------------------------------------------------------------------------------


def test_an_expired_certificate_is_refused(authority, pool):
    with (
        listening(only(authority.issue("expired", "127.0.0.1", days=-1), "cert", "key")) as listener,
        pytest.raises(TlsError, match=r"not valid at this time: certificate has expired.*renew it"),
    ):
        call(listener.port, only(pool, "ca"))


def test_a_certificate_of_another_authority_is_refused(pool, stranger):
    with (
        listening(only(stranger, "cert", "key")) as listener,
        pytest.raises(TlsError, match="not signed by an authority in MILLPOND_POOL_TLS_CA"),
    ):
        call(listener.port, only(pool, "ca"))


def test_a_certificate_for_another_name_is_refused(pool, client):
    makes_nobody_the_pool = only(client, "cert", "key")
    for shown, name in ((only(pool, "cert", "key"), "other.example"), (makes_nobody_the_pool, "127.0.0.1")):
        with (
            listening(shown) as listener,
            pytest.raises(TlsError, match=rf"is not for '{name}'.*MILLPOND_POOL_TLS_NAME"),
        ):
            call(listener.port, only(pool, "ca"), name)


def test_a_client_without_a_certificate_is_refused_where_one_is_asked(pool):
    with listening(pool) as listener, pytest.raises(TlsError, match="Set MILLPOND_POOL_TLS_CERT and"):
        call(listener.port, only(pool, "ca"))
    assert "did not return a certificate" in str(listener.refused[0])


def test_a_client_with_a_certificate_of_another_authority_is_refused(pool, stranger):
    shown = tls.Files(stranger.cert, stranger.key, pool.ca)
    with listening(pool) as listener, pytest.raises(TlsError, match="does not accept the certificate"):
        call(listener.port, shown)
    assert "certificate verify failed" in str(listener.refused[0])


@pytest.mark.parametrize(("ours_s", "theirs_s", "said"), [(0.1, 10, r"within 0\.1 s"), (10, 0.1, "did not greet")])
def test_a_plain_client_at_a_port_of_tls_is_told_what_to_set(pool, ours_s, theirs_s, said):
    """Whichever of the two gives up first."""
    with (
        listening(only(pool, "cert", "key"), timeout_s=theirs_s) as listener,
        pytest.raises(ConnectionLost, match=f"{said}.*set MILLPOND_POOL_TLS_CA"),
    ):
        call(listener.port, NOTHING, timeout_s=ours_s)


def test_a_client_of_tls_at_a_plain_port_is_told_so_at_once(pool):
    started = time.monotonic()
    with listening(NOTHING) as listener, pytest.raises(TlsError, match="answers without TLS"):
        call(listener.port, only(pool, "ca"), timeout_s=60)
    assert time.monotonic() - started < 30
    assert isinstance(listener.refused[0], (WireError, ConnectionLost))


def test_a_port_that_says_nothing_is_not_waited_for_longer_than_allowed(pool):
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pytest.raises(ConnectionLost, match=r"did not answer the greeting within 0\.1 s"),
    ):
        call(silent.getsockname()[1], only(pool, "ca"), timeout_s=0.1)


def test_a_caller_who_says_nothing_is_not_waited_for_longer_than_allowed(pool):
    with (
        listening(only(pool, "cert", "key"), timeout_s=0.1) as listener,
        socket.create_connection(("127.0.0.1", listener.port), 10) as sock,
    ):
        assert sock.recv(1) == b""
    assert isinstance(listener.refused[0], TimeoutError)


# --- the proofs are bound to the certificate -------------------------------------------------------------------------


def test_a_greeting_passed_on_under_another_certificate_is_worth_nothing():
    opening = handshake.challenge()
    hello = handshake.answer(opening, TOKEN, TORCH, channel=b"the certificate in between")
    for own in (b"the pool's", b""):
        with pytest.raises(AuthenticationError):
            handshake.admit(opening, hello, TOKEN, TORCH, channel=own)


def test_a_worker_accepts_the_one_certificate_of_its_peer_and_no_other_of_the_authority(pool, client):
    shown = tls.listener(only(pool, "cert", "key"))
    assert shown is not None
    with listening(only(pool, "cert", "key")) as listener:
        greet(listener.port, tls.of_peer(shown.channel))
    assert listener.refused == []
    for other in (shown.channel, b""):
        with (
            listening(only(client, "cert", "key")) as listener,
            pytest.raises(TlsError, match="another certificate than the one that the broker says"),
        ):
            greet(listener.port, tls.of_peer(other))


# --- files that cannot be used ---------------------------------------------------------------------------------------


def test_files_that_cannot_be_used_are_named(pool, client, stranger, tmp_path):
    gone, nonsense = str(tmp_path / "gone.pem"), tmp_path / "nonsense.pem"
    nonsense.write_text("nonsense")
    for files, said in [
        (tls.Files(gone, gone), r"gone\.pem.*No such file"),
        (tls.Files(str(nonsense), client.key), r"nonsense\.pem.*MILLPOND_POOL_TLS_CERT"),
        (tls.Files(pool.cert, client.key), "KEY_VALUES_MISMATCH.*belong together"),
        (tls.Files(pool.cert, pool.key, str(nonsense)), r"authorities in .*nonsense\.pem"),
        (only(pool, "ca"), "MILLPOND_POOL_TLS_CERT is not set"),
        (only(pool, "key"), "MILLPOND_POOL_TLS_CERT is not set"),
    ]:
        with pytest.raises(SettingsError, match=said):
            tls.listener(files)
    for files in (only(pool, "cert", "key"), tls.Files()):
        with pytest.raises(SettingsError, match="MILLPOND_POOL_TLS_CA is not set"):
            tls.caller(settings(files, tls_name="pool"))
    with pytest.raises(SettingsError, match="without MILLPOND_POOL_TLS_CERT"):
        tls.caller(settings(only(pool, "key", "ca")))


def test_an_encrypted_key_is_not_asked_for_at_a_terminal(pool, tmp_path):
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_pem_private_key(Path(pool.key).read_bytes(), None)
    encrypted = tmp_path / "encrypted.key"
    encrypted.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    with pytest.raises(SettingsError, match="openssl pkey"):
        tls.listener(tls.Files(pool.cert, str(encrypted)))


# --- the broker ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def secured(pool, tmp_path_factory) -> Iterator[BrokerProcess]:
    """A broker that asks for certificates."""
    started = BrokerProcess(tmp_path_factory.mktemp("pool") / "pool", "serves:8", **pool.environment())
    yield started
    started.close()


def to(secured: BrokerProcess, files: tls.Files) -> PoolSettings:
    return settings(files, address=secured.address, token=TOKEN)


def test_a_broker_lends_over_tls(secured, client):
    with lease.Lease.acquire(to(secured, client), "ann") as taken:
        assert taken.keep() == ""
        assert [device.free_bytes for device in lease.get_status(to(secured, client)).devices] == [0]
    wait_for(lambda: not secured.workers())


def test_a_broker_says_no_at_once_and_writes_down_why(secured, pool, client, stranger):
    with pytest.raises(ConnectionLost, match="Set MILLPOND_POOL_TLS_CERT and"):
        lease.get_status(to(secured, only(pool, "ca")))
    with pytest.raises(ConnectionLost, match="does not accept the certificate"):
        lease.get_status(to(secured, tls.Files(stranger.cert, stranger.key, pool.ca)))
    with pytest.raises(TlsError, match="not signed by an authority"):
        lease.get_status(to(secured, stranger))
    with pytest.raises(AuthenticationError, match="the token is wrong"):  # a certificate does not replace it
        lease.get_status(settings(client, address=secured.address, token="guess"))
    for why in ("peer did not return a certificate", "certificate verify failed", "the token is wrong"):
        wait_for(lambda why=why: why in secured.log.read_text())
    assert "Traceback" not in secured.log.read_text()
    assert lease.get_status(to(secured, client)).devices


def test_callers_who_never_finish_the_handshake_keep_nobody_out(secured, client):
    with contextlib.ExitStack() as held:
        for number in range(3 * broker.MAX_GREETING):
            sock = held.enter_context(secured.raw())
            if number % 2:
                sock.sendall(b"\x16\x03\x01\x02\x00\x01")  # the beginning of a client's hello
        assert lease.get_status(to(secured, client)).devices


def test_a_worker_gets_paths_by_its_orders_alone(secured, client):
    with lease.Lease.acquire(to(secured, client), "ann"):
        (process,) = secured.workers()
        assert b"MILLPOND_POOL_TLS" not in Path(f"/proc/{process.pid}/environ").read_bytes()
        assert not any(".key" in word for word in process.cmdline())
    wait_for(lambda: not secured.workers())


def test_a_lease_over_tls_outlives_a_break(secured, client):
    relay = Relay(secured.port)
    with lease.Lease.acquire(settings(client, address=f"127.0.0.1:{relay.port}", token=TOKEN), "ann") as taken:
        before = taken.connection
        relay.cut()
        wait_for(lambda: taken.keep() == "" and taken.connection is not before and taken.connection.is_open)
        assert secured_state(secured, client, taken) == "active"
        assert taken.keep() == ""
    assert secured_state(secured, client, taken) == "released"
    relay.down()
    wait_for(lambda: not secured.workers())


def secured_state(secured: BrokerProcess, client: tls.Files, taken: lease.Lease) -> str:
    status = lease.get_status(to(secured, client))
    return next(known.state for known in status.leases if known.lease == taken.granted.lease)


# --- hosts that join -------------------------------------------------------------------------------------------------


def test_a_host_joins_over_tls_with_a_certificate_of_its_own(secured, authority, client):
    own = authority.issue("gpu-2", "gpu-2.example")
    host = HostProcess(
        secured, "gpu-2", "serves:16", wait=False, **own.environment(), MILLPOND_POOL_TLS_NAME="pool.example"
    )
    try:
        wait_for(lambda: len(lease.get_status(to(secured, client)).devices) == 2)
        with lease.Lease.acquire(to(secured, client), "ann", devices=2):
            (process,) = host.workers()
            assert b"MILLPOND_POOL_TLS" not in Path(f"/proc/{process.pid}/environ").read_bytes()
    finally:
        host.close()
    wait_for(lambda: not secured.workers())
    assert "Traceback" not in host.log.read_text()


def test_a_host_that_has_no_certificate_for_its_workers_does_not_join(client):
    with pytest.raises(SettingsError, match=r"set without MILLPOND_POOL_TLS_CERT.*need a certificate"):
        agent.join(settings(only(client, "ca")), "gpu-2", devices=[])


def test_the_broker_says_whether_workers_ask_for_certificates(pool):
    assert tls.listener(pool.for_workers(asks_certificate=True)).asks
    assert not tls.listener(pool.for_workers(asks_certificate=False)).asks


@pytest.mark.slow
@pytest.mark.parametrize("asks", [False, True])
def test_devices_of_two_hosts_copy_over_tls(authority, client, tmp_path, asks):
    """Each host with a certificate of its own; a name that is in both."""
    first, second = (authority.issue(name, "gpu-pool", f"{name}.example") for name in ("first", "second"))
    files = first if asks else only(first, "cert", "key")
    named = {"MILLPOND_POOL_TLS_NAME": "gpu-pool"}
    served = BrokerProcess(tmp_path / "pool", MILLPOND_POOL_MEMORY="1GiB", **files.environment())
    host = HostProcess(served, "gpu-2", wait=False, **second.environment(), **named)
    shown = client if asks else only(client, "ca")
    try:
        there = settings(shown, address=served.address, token=TOKEN, tls_name="gpu-pool")
        wait_for(lambda: len(lease.get_status(there).devices) == 2, 60)
        program = (
            "import torch; there = torch.arange(3_000_000).to('cuda:0').to('cuda:1')\n"
            "print(torch.equal(there.cpu(), torch.arange(3_000_000)))"
        )
        done = subprocess.run(
            [sys.executable, "-m", "millpond", "pool", "run", "-n", "2", "--", sys.executable, "-c", program],
            env={**without_tls(served.environ), **shown.environment(), **named},
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr + served.log.read_text()
    finally:
        host.close()
        served.close()


def without_tls(environ: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in environ.items() if "_TLS_" not in name}


@pytest.mark.slow
def test_a_copy_between_two_devices_runs_over_tls(pool, client, tmp_path):
    """And nothing else is spoken between them: a peer that knows the token but no TLS is not greeted."""
    workers = Workers(log=tmp_path / "worker", files=pool)
    try:
        certificates = {worker.first_report.certificate for worker in workers.each}
        assert certificates == {tls.listener(pool).channel}
        port = workers.each[1].first_report.peer_port
        with pytest.raises(ConnectionLost, match="If the pool speaks TLS"):
            transport.connect(
                "127.0.0.1", port, PEER_TOKEN, TORCH, sends="to-peer", receives="from-peer", timeout_s=0.5
            )
        program = (
            "import torch; there = torch.arange(3_000_000).to('cuda:0').to('cuda:1')\n"
            "print(torch.equal(there.cpu(), torch.arange(3_000_000)))"
        )
        environ = {**workers.environment(), **client.environment(), "MILLPOND_POOL_TLS_NAME": "pool.example"}
        done = run_on_device(program, environ, 60)
        assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
    finally:
        workers.close()


# --- the network breaks ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_session_over_tls_goes_on_after_its_connection_broke(pool, client, tmp_path):
    started = WorkerProcess(log=tmp_path / "worker.log", files=pool)
    relay = Relay(started.port)
    try:
        with start(COUNT, {**through(relay, started), **client.environment()}) as process:
            assert process.stdout is not None
            shown = [process.stdout.readline()]
            for _ in range(4):
                relay.cut()
                shown.append(step(process))
            relay.cut()
            rest, errors = process.communicate("\n", timeout=60)
        assert [float(line) for line in shown] == [0, 1, 3, 6, 10], errors
        assert rest == "torch.Size([300000]) 10.0\n", errors
        assert "is back after" in errors
    finally:
        relay.down()
        started.close()


@pytest.mark.slow
def test_callers_of_a_worker_who_never_finish_the_handshake_keep_nobody_out(pool, client, tmp_path):
    started = WorkerProcess(log=tmp_path / "worker.log", files=pool)
    try:
        with contextlib.ExitStack() as held:
            for _ in range(2 * sessions.MAX_GREETING):
                held.enter_context(socket.create_connection(("127.0.0.1", started.port), 10))
            connection, _ = transport.connect(
                "127.0.0.1",
                started.port,
                LEASE_TOKEN,
                TORCH,
                sends="to-worker",
                receives="from-worker",
                security=tls.caller(settings(client)),
            )
            with connection:
                connection.send(wire.Attach(bytes(16)))
                connection.send(wire.Batch([wire.Synchronize()]))
                assert connection.receive(30)[0] == wire.Done()
    finally:
        started.close()
    assert "Traceback" not in started.log.read_text()


@pytest.mark.slow
def test_a_program_computes_over_tls_wherever_it_goes(pool, client, tmp_path):
    """The real broker and worker; names of files are relative, and the program changes its directory."""
    served = BrokerProcess(tmp_path / "pool", MILLPOND_POOL_MEMORY="1GiB", **pool.environment())
    try:
        program = (
            "import os, torch; os.chdir('/'); x = torch.arange(9_000_000.0).cuda()\n"
            "assert torch.equal((x * 2).cpu(), torch.arange(9_000_000.0) * 2); print('equal')"
        )
        relative = {name: str(Path(path).name) for name, path in client.environment().items()}
        done = subprocess.run(
            [sys.executable, "-m", "millpond", "pool", "run", "--", sys.executable, "-c", program],
            env={**served.environ, **relative},
            cwd=Path(client.cert).parent,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert (done.returncode, done.stdout) == (0, "equal\n"), done.stderr
        assert "Traceback" not in served.log.read_text()
    finally:
        served.close()
