"""The process that holds RSTs back until the end that they name was asked.

- `asker`: its loop, and what it says to the supervisor
- `carrying`: what was decided, done: verdicts, repaired entries, counts
"""
