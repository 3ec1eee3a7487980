"""What is handed to a QEMU or kernel developer after a stall: one file, with no secret in it."""
