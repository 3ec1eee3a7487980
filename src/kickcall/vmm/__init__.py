"""QEMU: finding it, its monitor, its memory map, where it keeps its notifiers."""
