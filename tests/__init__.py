"""The promises of the design, each proved by a test that cites its number."""
