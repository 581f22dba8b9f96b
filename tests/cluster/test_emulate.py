"""Emulated hosts reach each other through shaped links, and leave nothing behind however they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.emulate import EmulatedNetwork
from cluster.errors import EmulationError

pytestmark = pytest.mark.netns

REPOSITORY = Path(__file__).parents[2]

# Rank 1 sends argv[1] bytes to rank 0, which prints the seconds from the first to the last of them.
TRANSFER = """
import os, socket, sys, time
address, size = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), int(sys.argv[1])
if os.environ["RANK"] == "0":
    with socket.create_server(address) as server:
        connection, _ = server.accept()
        started, got = time.monotonic(), 0
        while chunk := connection.recv(1 << 16):
            got += len(chunk)
        assert got == size, got
        print(time.monotonic() - started)
else:
    for _ in range(5000):
        try:
            connection = socket.create_connection(address, timeout=180)
            break
        except ConnectionRefusedError:
            time.sleep(0.02)
    connection.sendall(bytes(size))
    connection.close()
"""


def transfer(size_bytes: int) -> list[str]:
    return [sys.executable, "-c", TRANSFER, str(size_bytes)]


def emulate(*arguments: str, rate: str = "1gbit") -> subprocess.Popen[str]:
    """The command line as a process, with its output in pipes."""
    return subprocess.Popen(
        [sys.executable, "-m", "cluster.emulate", "--rate", rate, *arguments],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # tests may run under nohup
    )


def namespaces_of(pid: int) -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return [line.split()[0] for line in listed.splitlines() if line.startswith(f"edl-{pid}-")]


def wait_until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


# -------------------------------------------------------------------- links
def test_the_kernel_counts_what_a_host_sends() -> None:
    with EmulatedNetwork(hosts=2, rate="1gbit") as network:
        before = network.tx_bytes(1), network.rx_bytes(0)
        assert network.run(transfer(2_000_000), quiet=True).exit_code == 0
        sent, received = network.tx_bytes(1) - before[0], network.rx_bytes(0) - before[1]
    # Payload and headers: at most 66 bytes on every 1,448, and the handshakes.
    assert 2_000_000 < sent < 2_120_000
    assert sent == pytest.approx(received, abs=2_000)


def test_no_byte_travels_faster_than_the_rate() -> None:
    with EmulatedNetwork(hosts=2, rate="20mbit") as network:
        slow = float(network.run(transfer(1_000_000), quiet=True).output[0])
        network.set_rate("none")
        assert slow > 0.35  # 0.4 s of bits, less what is on its way when the receiver's clock starts
        # A busy machine may be slow too, but not every time.
        assert any(float(network.run(transfer(1_000_000), quiet=True).output[0]) < slow for _ in range(5))


def test_a_cut_host_is_unreachable_until_it_is_restored() -> None:
    connect = [
        sys.executable,
        "-c",
        "import os, socket; os.environ['RANK'] == '0' or "
        "socket.create_connection((os.environ['MASTER_ADDR'], 9), timeout=1)",
    ]
    with EmulatedNetwork(hosts=2) as network:
        network.cut(1)
        assert "TimeoutError" in network.run(connect, quiet=True).output[1]
        network.restore(1)
        assert "ConnectionRefusedError" in network.run(connect, quiet=True).output[1]


# -------------------------------------------------------------------- commands
def test_workers_get_the_variables_of_torchrun() -> None:
    names = [
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "NODE_RANK",
        "GLOO_SOCKET_IFNAME",
        "MINE",
    ]
    script = f"import os; print(*(os.environ[name] for name in {names}))"
    with EmulatedNetwork(hosts=2) as network:
        run = network.run(
            [sys.executable, "-c", script], workers_per_host=2, environment={"MINE": "x"}, quiet=True
        )
    assert [line.split() for line in run.output] == [
        ["0", "4", "0", "2", "0", "eth0", "x"],
        ["1", "4", "1", "2", "0", "eth0", "x"],
        ["2", "4", "0", "2", "1", "eth0", "x"],
        ["3", "4", "1", "2", "1", "eth0", "x"],
    ]


def test_output_is_marked_with_its_host_and_stays_on_its_stream() -> None:
    process = emulate("--", "sh", "-c", "echo to out $RANK; echo to err $RANK >&2")
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0
    assert sorted(out.splitlines()) == ["[h0] to out 0", "[h1] to out 1"]
    own = [
        line for line in err.splitlines() if not line.startswith("cluster.emulate: ")
    ]  # another test's leftovers
    assert sorted(own) == ["[h0] to err 0", "[h1] to err 1"]


def test_the_first_failure_ends_the_others_and_is_the_exit_code() -> None:
    process = emulate("--hosts", "3", "--", "sh", "-c", "[ $RANK = 1 ] && exit 7; exec sleep 300")
    process.communicate(timeout=180)  # less than the others would sleep
    assert process.returncode == 7
    assert namespaces_of(process.pid) == []


def test_a_time_out_ends_all_hosts() -> None:
    with EmulatedNetwork(hosts=2) as network:
        run = network.run(["sleep", "300"], timeout_seconds=0.2, quiet=True)
    assert run.exit_code == 124
    assert run.exit_codes == (128 + signal.SIGTERM,) * 2


def test_counts_are_written_as_json(tmp_path: Path) -> None:
    file = tmp_path / "counts.json"
    process = emulate("--json", str(file), "--", *transfer(500_000))
    process.communicate(timeout=180)
    report = json.loads(file.read_text())
    assert (report["exit_code"], report["rate"]) == (0, "1gbit")
    sender = report["hosts"][1]
    assert sender["tx_bytes"] == sender["after"]["tx_bytes"] - sender["before"]["tx_bytes"] > 500_000
    assert sender["exit_codes"] == [0]


def test_an_unknown_command_is_named() -> None:
    with EmulatedNetwork(hosts=1) as network, pytest.raises(EmulationError, match="no-such-program"):
        network.run(["no-such-program"])


# -------------------------------------------------------------------- ends
def test_nothing_is_left_after_a_normal_end() -> None:
    process = emulate("--", "sh", "-c", "setsid sleep 300 >/dev/null 2>&1 & echo $!")
    out, _ = process.communicate(timeout=180)
    assert process.returncode == 0
    assert namespaces_of(process.pid) == []
    assert not any(is_running(int(line.split()[1])) for line in out.splitlines())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_nothing_is_left_after_a_signal(number: signal.Signals) -> None:
    process = emulate("--", "sh", "-c", "echo $$; exec sleep 300")
    assert process.stdout is not None
    pids = [int(process.stdout.readline().split()[1]) for _ in range(2)]
    assert len(namespaces_of(process.pid)) == 3
    process.send_signal(number)
    process.communicate(timeout=180)
    assert process.returncode == 128 + number
    assert namespaces_of(process.pid) == []
    assert not any(map(is_running, pids))


def test_a_worker_that_ignores_signals_is_killed() -> None:
    with EmulatedNetwork(hosts=2) as network:
        script = "[ $RANK = 1 ] && sleep 0.3 && exit 3; trap '' TERM; while :; do sleep 1; done"
        run = network.run(["sh", "-c", script], grace_seconds=0.5, quiet=True)
    assert run.exit_codes == (128 + signal.SIGKILL, 3)


def test_nothing_is_left_after_an_exception_in_the_block() -> None:
    with pytest.raises(RuntimeError, match="mine"), EmulatedNetwork(hosts=2):
        assert len(namespaces_of(os.getpid())) == 3
        raise RuntimeError("mine")
    assert namespaces_of(os.getpid()) == []


@pytest.mark.xdist_group("leftovers")  # another cleaner would be faster
def test_clean_removes_what_a_killed_run_has_left_and_nothing_else() -> None:
    killed, alive = (emulate("--", "sh", "-c", "echo $$; exec sleep 300") for _ in range(2))
    try:
        assert killed.stdout is not None and alive.stdout is not None
        pids = [int(killed.stdout.readline().split()[1]) for _ in range(2)]
        alive.stdout.readline()
        killed.kill()
        killed.wait()
        assert len(namespaces_of(killed.pid)) == 3
        assert all(map(is_running, pids))
        assert emulate("--clean").wait(timeout=180) == 0
        assert namespaces_of(killed.pid) == []
        wait_until(lambda: not any(map(is_running, pids)), "the killed run's workers to end")
        assert len(namespaces_of(alive.pid)) == 3
    finally:
        alive.terminate()
        alive.communicate(timeout=180)
    assert namespaces_of(alive.pid) == []


def test_two_networks_at_once_do_not_meet() -> None:
    first, second = (emulate("--", *transfer(200_000)) for _ in range(2))
    assert [process.communicate(timeout=180) and process.returncode for process in (first, second)] == [0, 0]
    with EmulatedNetwork(hosts=2) as one, EmulatedNetwork(hosts=2) as other:
        assert one.run(transfer(200_000), quiet=True).exit_code == 0
        assert one.tx_bytes(1) > 200_000
        assert other.tx_bytes(1) == 0
