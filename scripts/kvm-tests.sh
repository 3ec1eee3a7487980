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
    exec $PY -m pytest tests/kvm "$@"
fi
exec .venv/bin/kickcall lab host run --name kvm-tests -- \
    $PY -m pytest -p no:cacheprovider tests/kvm "$@"
