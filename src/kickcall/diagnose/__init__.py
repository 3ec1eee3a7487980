"""States in, verdict out. Pure: no clock, no I/O."""
