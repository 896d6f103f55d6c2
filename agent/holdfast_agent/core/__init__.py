"""Pure machines: events in, ordered actions out, time as a number given by the caller."""
