"""The worker process: reads one queue, gives each packet its verdict.

- `worker`: the loop, turn by turn, and what the supervisor says
- `judging`: packets in, verdicts out
- `acting`: what decisions ask for besides
- `reporting`: what is told of it
- `search`: who is nearest to which limit, a step at a time
"""
