"""The sweeper process: judges the connection table, and kills what is to be killed.

- `sweeper`: the loop, turn by turn, and what the supervisor says
- `sweeping`: the table is read, judged, and what follows is carried out
- `admitting`: connections are counted as they begin
- `ending`: whatever is to end is found, condemned and confirmed
- `targets`: which connections end with a block or a verdict
- `kills`: what an administrator asked for, and what became of it
- `condemner`: many kills at once
- `cases`: what is known of each, and what follows; pure
- `older`: connections that are older than the guard
"""
