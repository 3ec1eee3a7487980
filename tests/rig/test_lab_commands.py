"""Do `kickcall lab up, ls, console, break, down` do on a real machine what their help says?"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from kickcall.cli.lab import app
from kickcall.errors import LabError, UsageError
from kickcall.lab.machine import LabMachine
from witness import until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from typer.testing import Result

pytestmark = pytest.mark.rig

NAME = f"cli-{os.getpid()}"


def lab(*arguments: str) -> Result:
    """Run a command as the shell would; errors of kickcall are main's to print."""
    result = CliRunner().invoke(app, arguments)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def up() -> Iterator[dict[str, Any]]:
    devices = ("virtio-blk,iothread=on,queues=2", "vhost-user-blk,disk=file,id=vub0")
    result = lab("up", NAME, "--json", *(f"--device={device}" for device in devices))
    try:
        yield json.loads(result.stdout)
    finally:
        lab("down", NAME)


def test_up_tells_programs_where_everything_is(up: dict[str, Any]) -> None:
    machine = LabMachine.find(NAME)
    assert up == {
        "name": NAME,
        "pid": machine.pid,
        "running": True,
        "qemu": "system",
        "qmp": [str(machine.qmp_path)],
        "folder": str(machine.folder),
        "devices": [
            {
                "id": "blk0",
                "kind": "virtio-blk",
                "pci": "0000:00:02.0",
                "queues": 2,
                "relay": False,
            },
            {
                "id": "vub0",
                "kind": "vhost-user-blk",
                "pci": "0000:00:03.0",
                "queues": 1,
                "relay": True,
            },
        ],
    }


def test_ls_lists_it_for_people_and_programs(up: dict[str, Any]) -> None:
    assert NAME in lab("ls").stdout
    assert up in json.loads(lab("ls", "--json").stdout)


def test_console_prints_the_output_and_exits_with_the_commands_status(up: dict[str, Any]) -> None:
    result = lab("console", NAME, "--", "echo", "one;", "echo", "two", ">&2;", "exit", "7")
    assert (result.stdout, result.exit_code) == ("one\ntwo\n", 7)


def test_break_hangs_a_read_that_console_still_answers_beside(up: dict[str, Any]) -> None:
    machine = LabMachine.find(NAME)
    rows = json.loads(
        lab("break", NAME, "vub0", "--queue=0", "--drop=kick", "--count=1", "--json").stdout
    )
    (kicks,) = (row for row in rows if (row["queue"], row["event"]) == (0, "kick"))
    assert kicks["pending"] == 1
    read = f"dd if={machine.disk('vub0')} of=/dev/null bs=4k count=1 iflag=direct"
    with pytest.raises(LabError, match="still running in the guest after 1 s: dd"):
        lab("console", NAME, "--timeout=1", "--", read)
    assert lab("console", NAME, "--", "echo here").stdout == "here\n"

    def is_lost() -> bool:
        rows = json.loads(lab("break", NAME, "vub0", "--json").stdout)
        (kicks,) = (row for row in rows if (row["queue"], row["event"]) == (0, "kick"))
        return (kicks["dropped"], kicks["pending"]) == (1, 0)

    until(is_lost, "the guest kicks, and the relay loses it")
    assert "dropped" in lab("break", NAME, "vub0").stdout


def test_console_can_leave_a_command_behind(up: dict[str, Any]) -> None:
    assert lab("console", NAME, "--detach", "--", "sleep 321").stdout == ""
    # It is on its way: between fork and exec its name is still another's.
    until(lambda: "sleep 321" in lab("console", NAME, "--", "ps").stdout, "the command runs")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("up", "NAME"), "called NAME is up: kickcall lab down NAME"),
        (("up", "vm-x", "--device=virtio-blk,packed=2"), "must be on or off"),
        (("console", "no-such-vm", "--", "true"), "no lab machine is called no-such-vm"),
        (("break", "NAME", "blk0", "--drop=kick"), "blk0 of lab machine .* has no relay"),
        (("down", "no-such-vm"), "no lab machine is called no-such-vm"),
    ],
)
def test_what_cannot_be_done_is_one_plain_sentence(
    up: dict[str, Any], arguments: tuple[str, ...], complaint: str
) -> None:
    words = (NAME if word == "NAME" else word for word in arguments)
    with pytest.raises(LabError, match=complaint.replace("NAME", NAME)) as raised:
        lab(*words)
    assert "\n" not in str(raised.value)


def test_down_needs_a_name_or_all() -> None:
    with pytest.raises(UsageError, match="--all"):
        lab("down")
