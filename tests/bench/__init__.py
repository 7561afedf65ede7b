"""Tests of the measurements themselves: that what they print is what was measured, and that they leave nothing running."""
