"""This Linux host: processes, eventfds, other processes' memory. Knows no QEMU."""
