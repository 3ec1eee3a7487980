"""A driver and a device that follow the virtio specification, to judge the judge by."""
