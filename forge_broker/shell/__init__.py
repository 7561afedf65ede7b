"""The only part of the broker with sockets, a clock, a loop and logs."""
