"""Does a real guest take commands, whatever else it is doing?"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest

from kickcall.errors import LabError
from kickcall.lab import guest
from kickcall.lab.spec import MachineSpec, VirtioBlk
from witness import until

if TYPE_CHECKING:
    from conftest import BootMachine
    from kickcall.lab.machine import LabMachine

pytestmark = pytest.mark.rig


def test_a_command_returns_its_output_errors_included_and_its_status(
    mixed_machine: LabMachine,
) -> None:
    assert mixed_machine.guest.run("echo out; echo err >&2; exit 3") == (3, "out\nerr\n")
    assert mixed_machine.guest.run("true") == (0, "")


def test_quotes_pipes_and_many_lines_reach_the_guest_as_they_are(mixed_machine: LabMachine) -> None:
    command = """for word in 'a  b' "c"; do
        echo "$word"
    done | sort -r"""
    assert mixed_machine.guest.run(command).output == "c\na  b\n"


def test_output_of_many_kilobytes_arrives_whole(mixed_machine: LabMachine) -> None:
    status, output = mixed_machine.guest.run("seq 1 20000")
    assert status == 0
    assert output.split() == [str(number) for number in range(1, 20001)]


def test_a_command_that_hangs_blocks_no_other(mixed_machine: LabMachine) -> None:
    hung = mixed_machine.guest.start("sleep 1000")
    assert mixed_machine.guest.run("echo here").output == "here\n"
    assert not hung.done
    # Only a command that has begun can be killed.
    begun = f"test -s /run/agent/{hung.id}/pid"
    until(lambda: mixed_machine.guest.run(begun).status == 0, "the command begins")
    hung.kill()
    assert hung.wait().status != 0


def test_waiting_ends_with_an_error_that_names_the_command(mixed_machine: LabMachine) -> None:
    hung = mixed_machine.guest.start("sleep 999")
    with pytest.raises(LabError, match=r"still running in the guest after 0\.2 s: sleep 999"):
        hung.wait(timeout=0.2)
    hung.kill()


def test_threads_share_the_channel_without_mixing_replies(mixed_machine: LabMachine) -> None:
    outputs: dict[int, list[str]] = {}

    def ask(number: int) -> None:
        runs = [mixed_machine.guest.run(f"echo {number}; sleep 0.0{number}") for _ in range(5)]
        outputs[number] = [run.output for run in runs]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outputs == {number: [f"{number}\n"] * 5 for number in range(6)}


def test_no_request_is_lost_while_commands_start_and_end(
    mixed_machine: LabMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A lost request is repeated after so long, and not before.
    monkeypatch.setattr(guest, "_REPEAT_AFTER", 20.0)
    background = [mixed_machine.guest.start(f"sleep 0.{number:02}") for number in range(30)]
    took = []
    for _ in range(60):
        before = time.monotonic()
        mixed_machine.guest.run("true")
        took.append(time.monotonic() - before)
    assert max(took) < 20.0
    for command in background:
        assert command.wait(60).status == 0


def test_another_process_may_ask_the_same_guest(mixed_machine: LabMachine) -> None:
    hung = mixed_machine.guest.start("sleep 1000")
    script = (
        "from kickcall.lab.machine import LabMachine\n"
        f"print(LabMachine.find({mixed_machine.name!r}).guest.run('hostname').output)\n"
    )
    others = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert [other.communicate(timeout=30)[0] for other in others] == ["lab\n\n"] * 3
    hung.kill()


def test_a_paused_machine_is_an_error_and_not_a_hang(boot_machine: BootMachine) -> None:
    machine = boot_machine(MachineSpec())
    machine.qmp("stop")
    with pytest.raises(LabError, match="paused"):
        machine.guest.boot_id(timeout=0.5)
    machine.qmp("cont")
    assert machine.guest.run("echo again").output == "again\n"


def test_a_reboot_is_waited_for_and_ends_the_commands_before_it(boot_machine: BootMachine) -> None:
    machine = boot_machine(MachineSpec(devices=(VirtioBlk(),)))
    before = machine.guest.boot_id()
    old = machine.guest.start("sleep 1000")
    machine.guest.reboot()
    assert machine.guest.boot_id() != before
    assert machine.guest.run("echo up").output == "up\n"
    with pytest.raises(LabError, match="rebooted while it ran: sleep 1000"):
        old.wait(timeout=5)
