"""The worker process: reads one queue, gives each packet its verdict.

- `worker`: the loop: judge, give verdicts, carry out
- `search`: who is nearest to which limit, a step at a time
"""
