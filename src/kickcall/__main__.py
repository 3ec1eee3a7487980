"""`python -m kickcall`: the command line, where the script is not on the PATH."""

from kickcall.cli.main import run

run()
