"""The broker: a pure core that decides, a shell that does I/O, scalers that make worker processes."""
