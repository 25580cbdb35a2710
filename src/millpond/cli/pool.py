"""`millpond pool`: offer hosts' devices, run a program on one, look at the pool."""

from __future__ import annotations

import typer

app = typer.Typer(no_args_is_help=True)

SHOWN_PAST = 10
"""Ended leases that `status` shows; `--json` shows all."""
JSON = typer.Option(False, "--json", help="Machine output.")


@app.command()
def serve(
    bind: str | None = typer.Option(None, "--bind", help="Address to listen on; anything but loopback needs a token."),
    port: int | None = typer.Option(None, "--port", min=0, max=65_535, help="Port to listen on; 0 picks a free one."),
    memory: str | None = typer.Option(None, "--memory", help="Memory that a CPU device offers, such as 8GiB."),
    no_devices: bool = typer.Option(False, "--no-devices", help="Offer only the devices of hosts that join."),
) -> None:
    """Offer this host's GPUs, or its CPU where it has none, and those of hosts that join."""
    import logging

    from millpond import settings
    from millpond.pool import broker

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    loaded = settings.load(settings.PoolSettings, bind=bind, port=port, memory=memory)
    broker.serve(loaded, devices=[] if no_devices else None)


@app.command()
def join(
    address: str | None = typer.Argument(
        None, help="The broker, host:port; default: MILLPOND_POOL_ADDRESS.", metavar="[ADDRESS]"
    ),
    name: str | None = typer.Option(None, "--name", help="What the pool calls this host; default: its own name."),
    memory: str | None = typer.Option(None, "--memory", help="Memory that a CPU device offers, such as 8GiB."),
) -> None:
    """Offer this host's devices to the broker at ADDRESS, for as long as this runs."""
    import logging
    import socket

    from millpond import settings
    from millpond.pool import agent

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    loaded = settings.load(settings.PoolSettings, address=address, memory=memory)
    agent.join(loaded, (name or socket.gethostname())[:64])


@app.command(context_settings={"allow_interspersed_args": False})
def run(
    command: list[str] = typer.Argument(help="The command and its arguments.", metavar="COMMAND"),
    devices: int = typer.Option(1, "-n", "--devices", min=1, max=1024, help="Devices to lease."),
    memory: str = typer.Option("", "--memory", help="Part of each device, such as 4GiB; default: whole devices."),
    wait: float = typer.Option(3600.0, "--wait", min=0, max=1e7, help="Seconds to wait for a free device; 0: do not."),
) -> None:
    """Run COMMAND with a leased device; its exit code is COMMAND's."""
    from rich.console import Console

    from millpond import settings
    from millpond.pool import launcher, monitor
    from millpond.pool.lease import Lease
    from millpond.process import die_with_parent

    if not launcher.outlives_parent():
        die_with_parent()
    memory_bytes = monitor.parse_size(memory, "--memory") if memory else 0
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    try:
        launcher.check_command(command)
        with console.status("taking a lease…") as shown:
            waited_for = ""

            def show(lease: str, reason: str) -> None:
                nonlocal waited_for
                shown.update(f"{lease} waits ({reason})")
                if reason != waited_for and not console.is_terminal:
                    console.print(f"millpond pool: {lease} waits ({reason})")
                waited_for = reason

            lease = Lease.acquire(
                settings.load(settings.PoolSettings),
                launcher.owner(),
                devices=devices,
                memory_bytes=memory_bytes,
                wait_s=wait,
                on_wait=lambda waiting: show(waiting.lease, waiting.reason),
            )
        with lease:
            code = launcher.run(command, lease)
    except launcher.CommandUnusable as error:
        console.print(f"error: {error}")
        code = error.exit_code
    raise typer.Exit(code)


@app.command()
def status(as_json: bool = JSON) -> None:
    """Show the pool's devices, and who has them."""
    from millpond import settings
    from millpond.pool.lease import get_status

    found = get_status(settings.load(settings.PoolSettings))
    if as_json:
        import msgspec

        typer.echo(msgspec.json.format(msgspec.json.encode(found)).decode())
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from millpond.pool.scheduler import LIVE, gib

    console = Console(highlight=False)
    if not console.is_terminal:  # a file or a pipe has no edge
        console.width = 200
    devices = Table("device", "host", "name", "memory", "free", title="devices", title_justify="left", box=None)
    for device in found.devices:
        memory, free = gib(device.memory_bytes), gib(device.free_bytes)
        devices.add_row(str(device.index), Text(device.host), Text(device.name), memory, free)
    console.print(devices)
    leases = Table(title="leases", title_justify="left", box=None)
    for column in ("lease", "owner", "state", "on", "used", "of", "since"):
        leases.add_column(column, no_wrap=True)
    leases.add_column("why", overflow="fold")
    live = [lease for lease in found.leases if lease.state in LIVE]
    past = [lease for lease in found.leases if lease.state not in LIVE]
    for lease in [*live, *past[:SHOWN_PAST]]:
        on = ",".join(map(str, lease.devices))
        used = gib(lease.used_bytes) if lease.used_bytes else ""
        memory = gib(lease.memory_bytes) if lease.memory_bytes else ""
        why = "" if lease.state == "released" else lease.reason
        leases.add_row(lease.lease, Text(lease.owner), lease.state, on, used, memory, _ago(lease.changed), Text(why))
    console.print(leases if found.leases else "no leases yet")


def _ago(date: str) -> str:
    from datetime import UTC, datetime

    seconds = (datetime.now(UTC) - datetime.fromisoformat(date)).total_seconds()
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
