"""The sweeper process: judges the connection table, and kills what is to be killed.

- `sweeper`: the loop: sweep, condemn, confirm
- `condemner`: many kills at once
- `cases`: what is known of each, and what follows; pure
- `older`: connections that are older than the guard
"""
