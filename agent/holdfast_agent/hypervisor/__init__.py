"""QEMU from outside: QMP, command lines, guest memory's place, device state, standbys."""
