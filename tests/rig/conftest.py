"""Which machine do the tests of the core share? One with every kind of device, on each QEMU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from fault_matrix import is_impossible, summarize
from kickcall.attached import attach
from kickcall.lab.boot import boot
from witness import watch_queues
from zoo import QEMUS, zoo_spec

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kickcall.attached import AttachedMachine
    from kickcall.lab.image import GuestImage
    from kickcall.lab.machine import LabMachine


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    impossible = [item for item in items if is_impossible(item) or is_not_yet(item)]
    config.hook.pytest_deselected(items=impossible)
    items[:] = [item for item in items if item not in impossible]


def is_not_yet(item: pytest.Item) -> bool:
    """Tell whether a test is of a device that its QEMU does not have: igb came with 8.0."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return parameters.get("machine") == "system" and "igb" in item.name


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    summarize(terminalreporter)


@pytest.fixture(scope="session", params=QEMUS)
def zoo(request: pytest.FixtureRequest, guest_image_built: GuestImage) -> Iterator[LabMachine]:
    """A machine with all of `ZOO`, on each QEMU in turn. Leave it as you found it.

    QEMU tells in its log which queue of which device it was made to look at.
    """
    with boot(zoo_spec(request.param)) as machine:
        watch_queues(machine)
        yield machine


@pytest.fixture
def attached(zoo: LabMachine) -> Iterator[AttachedMachine]:
    with attach(zoo.name, timeout=20) as machine:
        yield machine
