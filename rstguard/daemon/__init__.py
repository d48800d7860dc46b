"""The processes of the guard: supervisor, worker, sweeper, and the control socket."""
