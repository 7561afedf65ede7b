"""The simulator: a real core in a virtual world."""
