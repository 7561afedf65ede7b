"""The broker's decisions as a pure state machine: events and a clock reading in, actions out."""
