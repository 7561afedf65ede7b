"""The broker's core, module by module, spoken to by hand-made peers under a clock that the tests turn."""
