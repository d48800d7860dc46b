"""What outlives the guard.

- `waiting`: what is to be written; noting it waits for nothing
- `history`: the policies that were in force, and what there is to go back to
- `database`: the SQLite file, opened, checked, set aside if damaged
- `writing`: how rows are written: one transaction for all that waits
- `store`: bans, offences and policies in it; waits for the disk
- `record`: the guard's use of all this from its event loop
"""
