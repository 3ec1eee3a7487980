#!/bin/sh
# Runs the tests that need root on a KVM host: here if this machine is one, else in a KVM host of
# the lab's, booted for them and taken down after. scripts/kvm-tests.sh [PYTEST-ARGUMENT...]
set -eu
cd "$(dirname "$0")/.."
PY=.venv/bin/python

here='
import sys
sys.path.insert(0, "tests")
from kvm_zoo import missing
sys.exit(missing() and f"kvm-tests: this machine has not {missing()}: a KVM host of the lab will do")
'
# What is booted in the host ends with it: nothing but the tests runs there.
if $PY -c "$here"; then
    exec $PY -m pytest tests/kvm --ignore tests/kvm/test_vfio.py "$@"
fi
# The host has no network: what it inserts into kernels is built before.
$PY tests/kernel_module.py
lab() {
    command=$1
    shift
    .venv/bin/kickcall lab host "$command" --name kvm-tests "$@"
}
if [ -z "${KICKCALL_WRITE_DOCS:-}" ]; then
    # One test has a device given to a guest, for which a host needs more than others have.
    [ $# -gt 0 ] ||
        lab run --assignable -- $PY -m pytest -p no:cacheprovider tests/kvm/test_vfio.py
    lab run -- $PY -m pytest -p no:cacheprovider tests/kvm --ignore tests/kvm/test_vfio.py "$@"
    exit
fi
# Pages that tests write are in the folder that is shared with the host, and end with it.
trap 'lab down' EXIT
lab up
lab run -- $PY -m pytest -p no:cacheprovider tests/kvm --ignore tests/kvm/test_vfio.py "$@"
lab run -- sh -c 'echo "$KICKCALL_LAB_SHARED"' | while read -r shared; do
    cp "$shared"/docs/* docs/
done
