"""What can go wrong, as an admin at 3 a.m. meets it: one tree, one plain sentence each."""


class KickcallError(Exception):
    """Root of the tree. The message says what was tried, on what, and what to do next.

    The command line prints the message on one line and exits with `exit_code`
    (0 done, 1 something is wrong with the machine, 2 usage, 3 could not do it).
    """

    exit_code = 3


class UsageError(KickcallError):
    """The request itself makes no sense: a word that is no event, a number that is none."""

    exit_code = 2


class MachineNotFoundError(KickcallError):
    """No running QEMU has that name or pid, or several share the name."""


class NotAVmmError(KickcallError):
    """The process exists and is no QEMU."""


class MachineGoneError(KickcallError):
    """The VMM process ended since it was attached."""


class PrivilegeError(KickcallError):
    """The kernel refused: kickcall needs root or CAP_SYS_PTRACE over the VMM process."""


class MonitorError(KickcallError):
    """The QMP monitor could not be used."""


class MonitorBusyError(MonitorError):
    """Somebody else holds the monitor: the socket accepts, and no greeting comes."""


class MonitorGoneError(MonitorError):
    """No such socket, or nobody listens on it, or it went away while we asked."""


class MonitorTimeoutError(MonitorError):
    """The monitor greeted us, then did not answer in time: QEMU's main loop is stuck."""


class QmpCommandError(MonitorError):
    """QEMU answered a command with an error. `qmp_class` is QMP's own error class."""

    def __init__(self, message: str, qmp_class: str = "GenericError") -> None:
        super().__init__(message)
        self.qmp_class = qmp_class


class DeviceNotFoundError(KickcallError):
    """The machine has no such device, or several match."""


class QueueNotFoundError(KickcallError):
    """The device has no queue of that number."""


class QueueNotReadyError(KickcallError):
    """The driver never set this queue up, or reset it, or the machine is paused."""


class EventNotSupportedError(KickcallError):
    """This device has no such event, or not by the way that was asked for."""


class MapError(KickcallError):
    """The notifiers of a queue could not be proved, so nothing is offered to write to."""


class StaleMapError(MapError):
    """The machine changed since it was mapped (reboot, reset, unplug): nothing was written."""


class CounterFullError(KickcallError):
    """The eventfd's count is at its maximum: a write would block, so none was made."""


class StubError(KickcallError):
    """The gdb stub did not do what was asked, or the write through it did not come about."""


class StubBusyError(StubError):
    """The machine's gdb stub is a debugger's, or QEMU opens none, or it may not be paused now."""


class KernelViewError(KickcallError):
    """The kernel's own structures could not be read; the message says what is missing for it."""


class LabError(KickcallError):
    """A lab machine could not be built, booted or asked; the message names what is missing."""
