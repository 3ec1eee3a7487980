"""DeviceClass and its registry: one file per kind of device."""
