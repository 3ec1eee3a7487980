"""The RFC's command on a QMP socket, for any QMP client."""
