"""What a policy would have done to a capture: the guard's own engine, fed in capture time."""
