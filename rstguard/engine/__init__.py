"""The pure decision engine: no clock, no I/O, no logging, standard library only."""
