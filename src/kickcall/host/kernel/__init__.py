"""The kernel's own structures, read with drgn: live, or from a crashed host's vmcore."""
