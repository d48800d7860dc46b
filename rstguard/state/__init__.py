"""What outlives the guard.

- `waiting`: what is to be written; noting it waits for nothing
- `history`: the policies that were in force, and what there is to go back to
- `database`: the SQLite file, opened, checked, set aside if damaged
- `rows`: what a row may hold; what it cannot is dropped and told
- `writing`: changes written in the order in which they were noted
- `store`: bans, offences, large sources and policies in it; waits for the disk
- `record`: the guard's use of all this from its event loop
"""
