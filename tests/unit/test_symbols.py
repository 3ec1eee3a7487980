"""Is the exact layout read from debug symbols, found as a debugger finds them, and never trusted?

The programs here are compiled with structs of QEMU's names and members; the expected offsets are
the compiler's own, printed by the program.
"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from kickcall.vmm import symbols
from kickcall.vmm.layout import Layout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.skipif(
    not (shutil.which("gcc") and shutil.which("objcopy")),
    reason="needs gcc and binutils: scripts/setup.sh rigs",
)

NOTIFIER = "int rfd; int wfd; bool initialized;"
VRING = "unsigned int num, num_default, align; void *more; hwaddr desc, avail, used; void *caches;"
QUEUE = """
    VRing vring; void *used_elems; uint16_t positions[9]; uint16_t queue_index; char pad[40];
    VirtIODevice *vdev; EventNotifier guest_notifier; EventNotifier host_notifier; bool enabled;
"""
PROGRAM = """
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <unistd.h>
typedef uint64_t hwaddr;
typedef struct VirtIODevice VirtIODevice;
typedef struct VirtQueue VirtQueue;
struct EventNotifier { %(notifier)s };
typedef struct EventNotifier EventNotifier;
typedef struct VRing { %(vring)s } VRing;
struct VirtQueue { %(queue)s };
struct VirtIODevice { char parent[512]; VirtQueue *vq; };
static VirtIODevice device;
static VirtQueue queue;
int main(void) {
    device.vq = &queue;
    queue.vdev = &device;
    printf("%%zu %%zu %%zu %%zu %%zu %%zu %%zu\\n", sizeof(VirtQueue),
           offsetof(VirtQueue, vring) + offsetof(VRing, desc), offsetof(VirtQueue, vdev),
           offsetof(VirtQueue, queue_index), sizeof(EventNotifier), offsetof(VirtIODevice, vq),
           offsetof(VirtQueue, host_notifier));
    fflush(stdout);
    return getchar() == 'x' && queue.vdev->vq != device.vq;
}
"""


@dataclass(frozen=True)
class Build:
    """A program, and what its compiler says of its structs."""

    binary: Path
    layout: Layout
    kick: int


@pytest.fixture
def compiled(tmp_path: Path) -> Callable[..., Build]:
    def build(
        notifier: str = NOTIFIER, vring: str = VRING, queue: str = QUEUE, *, debug: str = "-g"
    ) -> Build:
        source, binary = tmp_path / "qemu.c", tmp_path / "qemu"
        source.write_text(PROGRAM % {"notifier": notifier, "vring": vring, "queue": queue})
        subprocess.run(
            ["gcc", debug, "-Wl,--build-id=sha1", "-o", binary, source], check=True, timeout=60
        )
        said = subprocess.run([binary], input="", capture_output=True, text=True, check=True)
        stride, desc, owner, index, size, owner_vq, kick = map(int, said.stdout.split())
        layout = Layout(stride, desc, owner, index, size, owner_vq, source="symbols")
        return Build(binary, layout, kick)

    return build


@pytest.fixture
def running() -> Iterator[Callable[[Path], int]]:
    started: list[subprocess.Popen[bytes]] = []

    def run(binary: Path) -> int:
        process = subprocess.Popen([binary], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout is not None
        process.stdout.readline()
        return process.pid

    yield run
    for process in started:
        process.communicate(b"\n")


@pytest.fixture
def no_debug_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder in the place of /usr/lib/debug."""
    root = tmp_path / "debug"
    root.mkdir()
    monkeypatch.setattr(symbols, "_DEBUG_ROOTS", (root,))
    return root


def build_id(binary: Path) -> str:
    notes = subprocess.run(["readelf", "-n", binary], capture_output=True, text=True, check=True)
    return notes.stdout.split("Build ID:")[1].split()[0]


def split_off(binary: Path, root: Path) -> Path:
    """Move the symbols into a file of their own, where a distribution puts it."""
    identity = build_id(binary)
    debug = root / ".build-id" / identity[:2] / f"{identity[2:]}.debug"
    debug.parent.mkdir(parents=True)
    subprocess.run(["objcopy", "--only-keep-debug", binary, debug], check=True)
    subprocess.run(["objcopy", "--strip-all", binary], check=True)
    return debug


def test_the_layout_is_the_compilers(compiled: Callable[..., Build]) -> None:
    build = compiled()
    layout = symbols.read_layout(build.binary)
    assert layout == build.layout
    assert layout is not None
    assert layout.kick == build.kick


@pytest.mark.parametrize("version", ["-gdwarf-4", "-gdwarf-5"])
def test_both_dwarf_versions_are_read(compiled: Callable[..., Build], version: str) -> None:
    build = compiled(debug=version)
    assert symbols.read_layout(build.binary) == build.layout


def test_notifiers_without_a_flag_are_8_bytes(compiled: Callable[..., Build]) -> None:
    build = compiled(notifier="int rfd; int wfd;")
    layout = symbols.read_layout(build.binary)
    assert layout == build.layout
    assert layout is not None
    assert layout.notifier_size == 8


@pytest.mark.parametrize(
    ("what", "changed"),
    [
        ("notifier", "int wfd; int rfd; bool initialized;"),
        ("notifier", "int rfd; int wfd; int refs; bool initialized;"),
        ("vring", VRING.replace("num, num_default", "num_default, num")),
        ("vring", VRING.replace("desc, avail, used", "desc, used, avail")),
        ("queue", "bool first; " + QUEUE),
        (
            "queue",
            QUEUE.replace("guest_n", "x_n").replace("host_n", "guest_n").replace("x_n", "host_n"),
        ),
        ("queue", QUEUE.replace("EventNotifier host", "char gap[8]; EventNotifier host")),
    ],
)
def test_an_order_that_no_qemu_had_is_not_described_wrongly(
    compiled: Callable[..., Build], what: str, changed: str
) -> None:
    assert symbols.read_layout(compiled(**{what: changed}).binary) is None


def test_a_program_without_qemus_types_has_no_layout(tmp_path: Path) -> None:
    source, binary = tmp_path / "other.c", tmp_path / "other"
    source.write_text("struct VirtQueue { int x; } q; int main(void) { return q.x; }")
    subprocess.run(["gcc", "-g", "-o", binary, source], check=True)
    assert symbols.read_layout(binary) is None


@pytest.mark.parametrize("content", [b"", b"\x7fELF", b"\x7fELF" + bytes(4096), b"text"])
def test_a_file_that_is_no_symbol_file_has_no_layout(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.debug"
    path.write_bytes(content)
    assert symbols.read_layout(path) is None


def test_a_symbol_file_that_is_cut_short_has_no_layout(
    compiled: Callable[..., Build], tmp_path: Path
) -> None:
    whole = compiled().binary.read_bytes()
    cut = tmp_path / "cut.debug"
    cut.write_bytes(whole[: len(whole) // 2])
    assert symbols.read_layout(cut) is None


def test_a_file_that_is_gone_has_no_layout(tmp_path: Path) -> None:
    assert symbols.read_layout(tmp_path / "gone.debug") is None


def test_nothing_is_said_on_stderr(
    compiled: Callable[..., Build], capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    symbols.read_layout(compiled().binary)
    symbols.read_layout(tmp_path / "gone.debug")
    assert capfd.readouterr().err == ""


def test_the_build_id_is_the_one_that_the_linker_wrote(
    compiled: Callable[..., Build], running: Callable[[Path], int]
) -> None:
    binary = compiled().binary
    assert symbols.build_id(running(binary)) == build_id(binary)


def test_a_binary_without_a_build_id_has_none(
    compiled: Callable[..., Build], running: Callable[[Path], int]
) -> None:
    binary = compiled().binary
    subprocess.run(["objcopy", "--remove-section", ".note.gnu.build-id", binary], check=True)
    assert symbols.build_id(running(binary)) is None


def test_separate_symbols_are_found_by_build_id(
    compiled: Callable[..., Build], running: Callable[[Path], int], no_debug_root: Path
) -> None:
    build = compiled()
    debug = split_off(build.binary, no_debug_root)
    pid = running(build.binary)
    assert symbols.debug_file(pid) == debug
    assert symbols.virtqueue_layout(pid) == build.layout


def test_symbols_of_another_build_are_not_taken(
    compiled: Callable[..., Build], running: Callable[[Path], int], no_debug_root: Path
) -> None:
    split_off(compiled().binary, no_debug_root)
    other = compiled(queue="char larger[64]; " + QUEUE)
    subprocess.run(["objcopy", "--strip-all", other.binary], check=True)
    pid = running(other.binary)
    assert symbols.debug_file(pid) is None
    assert symbols.virtqueue_layout(pid) is None


def test_symbols_in_the_binary_itself_are_used(
    compiled: Callable[..., Build], running: Callable[[Path], int], no_debug_root: Path
) -> None:
    build = compiled()
    assert symbols.virtqueue_layout(running(build.binary)) == build.layout


def test_without_symbols_there_is_no_layout(
    compiled: Callable[..., Build], running: Callable[[Path], int], no_debug_root: Path
) -> None:
    binary = compiled().binary
    subprocess.run(["objcopy", "--strip-all", binary], check=True)
    pid = running(binary)
    assert symbols.debug_file(pid) is None
    assert symbols.virtqueue_layout(pid) is None


def test_without_drgn_there_is_no_layout_and_no_error(
    compiled: Callable[..., Build],
    running: Callable[[Path], int],
    no_debug_root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pid = running(compiled().binary)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert symbols.virtqueue_layout(pid) is None


def test_a_process_that_is_gone_has_no_symbols() -> None:
    assert symbols.build_id(2**22 + 1) is None
    assert symbols.debug_file(2**22 + 1) is None
