"""What the guard tells of itself: counters and events."""
