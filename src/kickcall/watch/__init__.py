"""The daemon: sample, judge, heal, journal."""
