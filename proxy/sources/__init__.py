"""Where objects come from: each module turns one sort of input into events."""
