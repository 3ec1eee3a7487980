"""Real machines to break on purpose."""
