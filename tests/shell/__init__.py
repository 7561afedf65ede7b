"""The broker's process: sockets, signals, settings, processes. Real ones."""
