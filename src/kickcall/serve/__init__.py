"""`kickcall serve`: the same as `kickcall top`, as a page."""
