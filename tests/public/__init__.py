"""Through the public door, with the real broker and real workers: what the specification, the issue and the design promise."""
