"""Is the lab's KVM host one: its own kernel and KVM, this machine's files, and no trace after?"""

from __future__ import annotations

import io
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kickcall.errors import LabError
from kickcall.lab.host import LabHost, boot_host
from kickcall.lab.machine import LabMachine, lab_folder

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

pytestmark = [pytest.mark.rig, pytest.mark.timeout(300)]

NAME = "host-of-tests"


@pytest.fixture(scope="module")
def host() -> Iterator[LabHost]:
    """A KVM host, shared by the tests of this file."""
    with boot_host(NAME, memory_mib=2048, timeout=200) as booted:
        yield booted


def run(host: LabHost, command: Sequence[str], cwd: Path | None = None) -> tuple[int, str, str]:
    """Run a program in the host and return its status, its output and its errors."""
    out, err = io.BytesIO(), io.BytesIO()
    status = host.run(command, cwd=cwd, stdout=out, stderr=err)
    return status, out.getvalue().decode(), err.getvalue().decode()


def test_it_has_kvm_and_vhost_and_what_observes_them(host: LabHost) -> None:
    places = ["/dev/kvm", "/dev/vhost-scsi", "/dev/vhost-net", "/dev/vhost-vsock", "/dev/net/tun"]
    places += ["/sys/kernel/tracing/kprobe_events", "/sys/kernel/config/target", "/proc/kcore"]
    assert run(host, ["ls", "-d", *places]) == (0, "\n".join(sorted(places)) + "\n", "")
    program = "from kickcall.lab.qemu import usable_kvm; print(usable_kvm())"
    assert run(host, [sys.executable, "-c", program]) == (0, "True\n", "")
    assert host.run(["/run/lab/bin/modprobe", "dm_mod"]) == 0


def test_a_command_gets_its_words_its_folder_and_its_environment(
    host: LabHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KICKCALL_WORD", "two words, $HOME and 'quotes'")
    program = "import os, sys; print(os.environ['KICKCALL_WORD'], os.getcwd(), sys.argv[1:])"
    here = Path(__file__).parent
    words = ["a  b", "$c", "'d'", "*"]
    status, output, _ = run(host, [sys.executable, "-c", program, *words], cwd=here)
    assert status == 0
    assert output == f"two words, $HOME and 'quotes' {here} {words}\n"


def test_output_errors_and_status_are_told_apart(host: LabHost) -> None:
    assert run(host, ["sh", "-c", "echo out; echo err >&2; exit 7"]) == (7, "out\n", "err\n")
    status, _, errors = run(host, ["no-such-program"])
    assert status == 127
    assert "no-such-program" in errors
    with pytest.raises(LabError, match=r"could not run it: .*no/such/folder"):
        run(host, ["true"], cwd=Path("/no/such/folder"))


class Seen(io.RawIOBase):
    """Where output goes; makes a file when its first piece came."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def write(self, data: object) -> int:
        self.file.touch()
        return len(data)  # type: ignore[arg-type]


def test_output_is_seen_while_the_command_runs_and_several_run_at_once(host: LabHost) -> None:
    waiting = threading.Thread(target=run, args=(host, ["sleep", "3"]))
    waiting.start()
    # It goes on until what it said has been seen here.
    program = (
        'echo first; for _ in $(seq 600); do [ -e "$KICKCALL_LAB_SHARED/seen" ] && exit; '
        "sleep 0.1; done; exit 1"
    )
    seen = Seen(host.shared / "seen")
    assert host.run(["sh", "-c", program], stdout=seen) == 0  # type: ignore[arg-type]
    waiting.join()


def test_files_that_change_here_are_seen_there_by_the_next_command(
    host: LabHost, tmp_path: Path
) -> None:
    file = tmp_path / "seen"
    for text in ("one\n", "two\n"):
        file.write_text(text)
        assert run(host, ["cat", str(file)]) == (0, text, "")
    # What is written there is not seen here.
    host.run(["sh", "-c", f"echo three >{file}"])
    assert file.read_text() == "two\n"


def test_the_shared_folder_is_written_for_good(host: LabHost) -> None:
    status, _, errors = run(host, ["sh", "-c", 'echo kept >"$KICKCALL_LAB_SHARED/report"'])
    assert (status, errors) == (0, "")
    assert (host.shared / "report").read_text() == "kept\n"


def test_an_interrupted_command_is_interrupted_there(host: LabHost) -> None:
    program = (
        "import time\ntry:\n print('started', flush=True)\n time.sleep(60)\n"
        "except KeyboardInterrupt: print('interrupted', flush=True)"
    )
    # Whoever runs the tests in the background has SIGINT ignored, and what he starts as well.
    command = ["/usr/bin/env", "--default-signal=INT", sys.executable, "-m", "kickcall"]
    command += ["lab", "host", "run", "--name", NAME, "--"]
    client = subprocess.Popen(
        [*command, sys.executable, "-c", program], stdout=subprocess.PIPE, text=True
    )
    assert client.stdout is not None
    assert client.stdout.readline() == "started\n"
    client.send_signal(signal.SIGINT)
    assert client.stdout.read() == "interrupted\n"
    assert client.wait(30) == 130


def test_nothing_is_left_of_a_host_that_was_booted_for_one_command() -> None:
    command = [sys.executable, "-m", "kickcall", "lab", "host", "run", "--name", "host-for-once"]
    done = subprocess.run(
        [*command, "--memory", "1024", "--", "sh", "-c", "hostname; exit 3"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (3, "lab-host\n"), done.stderr
    assert "booting the KVM host host-for-once" in done.stderr
    assert not [one for one in lab_folder().iterdir() if "host-for-once" in one.name]
    with pytest.raises(LabError, match="no lab machine is called host-for-once"):
        LabMachine.find("host-for-once")
