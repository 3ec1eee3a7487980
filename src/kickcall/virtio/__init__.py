"""Virtqueues as the virtio specification states them. Pure: bytes in, values out."""
