"""Pictures of what diagnose says: the path and the ring, for terminals, pages and reports. Pure."""
