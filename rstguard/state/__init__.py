"""What outlives the guard.

- `store`: the file: bans, offences, policies, in SQLite
- `record`: the guard's use of it
"""
