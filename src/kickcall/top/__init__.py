"""`kickcall top`: all machines, devices and queues in a terminal, worst first."""
