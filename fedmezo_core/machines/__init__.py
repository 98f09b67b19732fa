"""What decides: pure state machines. No clock, socket, disk, thread or entropy."""
