"""Which kernel is looked at: this host's, live, or a crashed one's in a vmcore?

Types come from BTF and addresses from kallsyms, both of which a distribution's kernel carries with
it (CONFIG_DEBUG_INFO_BTF, CONFIG_KALLSYMS_ALL): live they are files, and in a vmcore they lie in
its memory, where VMCOREINFO says (Linux 6.0, f09bddbd8661 "vmcoreinfo: add kallsyms_num_syms
symbol"). So no debug symbols are needed. Where the kernel has no BTF they are used instead.
"""

from __future__ import annotations

import importlib.util
import os
import struct
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kickcall.errors import KernelViewError, PrivilegeError
from kickcall.host.btf import Types, kernel_types

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import drgn

MODULES = ("kvm", "vhost", "vhost_net", "vhost_scsi", "vhost_vsock")
"""The modules whose structures are looked at. One may be built in, or not be loaded."""
LIST_MAX = 65536
"""Entries of a kernel list that we follow: one that has more is damaged, or changed under us."""
_BTF_MAX = 64 << 20
_SYMBOLS_MAX = 1 << 20
_ELF_SYMBOL = struct.Struct("<IBBHQQ")
"""Elf64_Sym: name, info, other, section, value, size (ELF-64 object file format, 1.5)."""

_VARIABLES = {
    "init_pid_ns": "struct pid_namespace",
    "init_task": "struct task_struct",
    "modules": "struct list_head",
    "btf_modules": "struct list_head",
}
"""The kernel's variables that are asked for: kallsyms has their addresses and no types."""
_CONSTANTS = {"PIDTYPE_PID": "enum pid_type"}
"""Enumerators that drgn's own code asks for by name, and the enum that has them."""


@dataclass(slots=True)
class Kernel:
    """A kernel that can be read."""

    program: drgn.Program
    release: str
    live: bool
    types_from: str
    """`BTF` or `debug symbols`."""
    _module_names: dict[str, dict[int, str]] = field(default_factory=dict)

    def variable(self, name: str) -> Any:
        """Return the kernel's variable `name`, one of those above."""
        return self.program[name]

    def function(self, address: int) -> str:
        """Return the name of the function at `address`, or the address in hexadecimal."""
        try:
            return str(self.program.symbol(address).name)
        except LookupError:
            pass
        for module in MODULES:
            if (name := self._symbols_of(module).get(address)) is not None:
                return name
        return hex(address)

    def module_variable(self, module: str, name: str) -> int:
        """Return the address of a variable of `module`, which may be built in."""
        try:
            return int(self.program.symbol(name).address)
        except LookupError:
            pass
        for address, known in self._symbols_of(module).items():
            if known == name:
                return address
        raise KernelViewError(f"Linux {self.release} has no {name}: is the module {module} loaded?")

    def _symbols_of(self, module: str) -> dict[int, str]:
        """Return a module's symbols, from the table that the kernel keeps for kallsyms."""
        if module not in self._module_names:
            self._module_names[module] = self._read_symbols(module)
        return self._module_names[module]

    def _read_symbols(self, module: str) -> dict[int, str]:
        from drgn.helpers.linux.list import list_for_each_entry

        loaded = list_for_each_entry(
            "struct module", self.variable("modules").address_of_(), "list"
        )
        for one in bounded(loaded, "loaded modules"):
            if one.name.string_().decode(errors="replace") != module:
                continue
            table = one.kallsyms
            count = min(int(table.num_symtab), _SYMBOLS_MAX)
            raw = self.program.read(table.symtab.value_(), count * _ELF_SYMBOL.size)
            entries = list(_ELF_SYMBOL.iter_unpack(raw))
            names = self.program.read(table.strtab.value_(), max(entry[0] for entry in entries))
            found = {}
            for name, _, _, _, value, _ in entries:
                end = names.find(b"\0", name)
                if name and end > 0:
                    found[value] = names[name:end].decode(errors="replace")
            return found
        return {}


def bounded(entries: Iterator[Any], what: str) -> Iterator[Any]:
    """Yield what a walk through a kernel list finds. Raises KernelViewError if it does not end."""
    for count, entry in enumerate(entries):
        if count == LIST_MAX:
            raise KernelViewError(f"the kernel's list of {what} does not end: try again")
        yield entry


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn whatever drgn says when it cannot read `what` into a KernelViewError."""
    import drgn

    try:
        yield
    except drgn.FaultError as exc:
        raise KernelViewError(f"{what} could not be read: {_first_line(exc)}") from exc
    except (LookupError, AttributeError, TypeError, ValueError, OSError) as exc:
        raise KernelViewError(
            f"{what} could not be read, as this kernel has it otherwise: {_first_line(exc)}"
        ) from exc


def open_live() -> Kernel:
    """Open the running kernel, by /proc/kcore.

    Raises KernelViewError that says what to install, PrivilegeError where we are not root.
    """
    drgn = _drgn()
    if os.geteuid() != 0:
        raise PrivilegeError("the kernel's view reads /proc/kcore, which only root may: use sudo")
    program = drgn.Program()
    try:
        program.set_kernel()
    except FileNotFoundError as exc:
        raise KernelViewError(
            "this kernel shows no /proc/kcore (CONFIG_PROC_KCORE): its structures cannot be read"
        ) from exc
    except OSError as exc:
        raise PrivilegeError(
            f"/proc/kcore: {exc.strerror or exc} (a locked-down kernel, or a container?)"
        ) from exc
    release = os.uname().release
    try:
        types, modules = kernel_types(), [kernel_types(module) for module in MODULES]
    except KernelViewError:
        with_symbols(program, (), release)
        return Kernel(program, release, True, "debug symbols")
    _use_kallsyms(program, release, live=True)
    _use_btf(program, types, modules)
    return Kernel(program, release, True, "BTF")


def open_vmcore(path: Path, symbols: Sequence[Path] = ()) -> Kernel:
    """Open a crashed host's memory: a kdump, or an ELF file as QEMU's dump-guest-memory writes.

    `symbols` are files with debug symbols (vmlinux, and modules); without them the types and
    addresses come from the vmcore's own memory. Raises KernelViewError.
    """
    drgn = _drgn()
    program = drgn.Program()
    try:
        program.set_core_dump(path)
    except Exception as exc:  # drgn raises bare Exceptions where the file is malformed
        raise KernelViewError(
            f"{path} could not be opened as a vmcore: {_first_line(exc)}"
        ) from exc
    if not program.flags & drgn.ProgramFlags.IS_LINUX_KERNEL:
        raise KernelViewError(
            f"{path} is no vmcore: it has no VMCOREINFO (for QEMU's dump-guest-memory the machine "
            "needs -device vmcoreinfo)"
        )
    release = _release(program)
    if symbols:
        with_symbols(program, symbols, release)
        return Kernel(program, release, False, "debug symbols")
    try:
        _use_kallsyms(program, release, live=False)
        with reading(f"the BTF in {path}"):
            start, stop = (program.symbol(f"__{edge}_BTF").address for edge in ("start", "stop"))
            if not 0 < stop - start <= _BTF_MAX:
                raise KernelViewError(f"{path}: the kernel's BTF has {stop - start} bytes")
            types = Types(program.read(start, stop - start), source=f"the BTF in {path}")
        known = _use_btf(program, types, [])
        known.extend(_modules_in_memory(program, types))
    except KernelViewError as exc:
        try:
            with_symbols(program, (), release)
        except KernelViewError as missing:
            raise KernelViewError(f"{exc}; {missing}") from exc
        return Kernel(program, release, False, "debug symbols")
    return Kernel(program, release, False, "BTF")


def with_symbols(program: drgn.Program, symbols: Sequence[Path], release: str) -> None:
    """Give the program debug symbols: `symbols`, or those that are installed here."""
    import drgn

    try:
        if symbols:
            program.load_debug_info([os.fspath(path) for path in symbols])
        else:
            program.load_debug_info(None, True)
        program.type("struct eventfd_ctx")
    except (drgn.MissingDebugInfoError, LookupError, OSError, ValueError) as exc:
        raise KernelViewError(
            f"Linux {release} needs its debug symbols, which were not found: install them (Debian: "
            f"linux-image-{release}-dbg), or name vmlinux and its modules with --symbols"
        ) from exc


def _drgn() -> Any:
    if importlib.util.find_spec("drgn") is None:
        raise KernelViewError(
            "the kernel's view needs drgn, which is not installed: pip install 'kickcall[kernel]'"
        )
    import drgn

    return drgn


def _release(program: drgn.Program) -> str:
    import drgn

    try:
        said: bytes = program["VMCOREINFO"].string_()
        for line in said.decode(errors="replace").splitlines():
            if line.startswith("OSRELEASE="):
                return line.removeprefix("OSRELEASE=")
    except (LookupError, drgn.FaultError):
        pass
    return "(release unknown)"


def _use_kallsyms(program: drgn.Program, release: str, *, live: bool) -> None:
    from drgn.helpers.linux.kallsyms import load_vmlinux_kallsyms

    try:
        program.register_symbol_finder("kallsyms", load_vmlinux_kallsyms(program), enable_index=0)
        if program.symbol("init_pid_ns").address:
            return
    except (LookupError, ValueError, OSError):
        pass
    raise KernelViewError(
        "/proc/kallsyms hides the kernel's addresses: sysctl kernel.kptr_restrict=1 shows them to "
        "root (0 and 1 do; it also needs CONFIG_KALLSYMS_ALL)"
        if live
        else f"the vmcore of Linux {release} does not say where its kallsyms are (6.0 and newer do)"
    )


def _use_btf(program: drgn.Program, kernel: Types, modules: Sequence[Types]) -> list[Types]:
    """Let drgn ask BTF; return the list of modules' types, to which more may be added."""
    import drgn

    from kickcall.host.kernel.types import BtfTypes

    finder = BtfTypes(program, kernel, modules)
    program.register_type_finder("btf", finder.find, enable_index=0)

    def find(
        of: drgn.Program, name: str, flags: drgn.FindObjectFlags, _file: str | None
    ) -> drgn.Object | None:
        if flags & drgn.FindObjectFlags.VARIABLE and name in _VARIABLES:
            return drgn.Object(of, _VARIABLES[name], address=of.symbol(name).address)
        if flags & drgn.FindObjectFlags.CONSTANT and name in _CONSTANTS:
            values = kernel.enum(_CONSTANTS[name].removeprefix("enum ")).values
            return drgn.Object(of, _CONSTANTS[name], value=values[name])
        return None

    program.register_object_finder("kallsyms", find, enable_index=0)
    return finder.modules


def _modules_in_memory(program: drgn.Program, kernel: Types) -> list[Types]:
    """Return the types of our modules as the kernel keeps them (kernel/bpf/btf.c, btf_modules)."""
    from drgn.helpers.linux.list import list_for_each_entry

    found = []
    with reading("the types of the vmcore's modules"):
        loaded = list_for_each_entry(
            "struct btf_module", program["btf_modules"].address_of_(), "list"
        )
        for one in bounded(loaded, "modules' types"):
            name = one.btf.name.string_().decode(errors="replace")
            size = int(one.btf.data_size)
            if name in MODULES and 0 < size <= _BTF_MAX:
                blob = program.read(one.btf.data.value_(), size)
                found.append(Types(blob, kernel, f"the BTF of module {name}"))
    return found


def _first_line(exc: BaseException) -> str:
    return (str(exc).splitlines() or [type(exc).__name__])[0]
