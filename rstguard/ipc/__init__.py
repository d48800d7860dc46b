"""What the processes of a guard share: their channel, their messages, how a child begins and ends.

- `messages`: what is said, `ToChild` and `FromChild`
- `values`: what values a child's messages may hold
- `codec`: a child's messages as bytes, checked when they are read
- `channel`: one datagram for each message, never blocking
- `requests`: what is asked of a guard from outside, and how it is refused
- `entry`: how a worker or sweeper begins and ends
- `ending`: how one ends that made a mistake
- `measuring`: what both keep while limits are learned
"""
