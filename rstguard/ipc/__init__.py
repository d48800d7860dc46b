"""What the processes of a guard share: their channel, their messages, how a child begins.

- `channel`: one datagram for each message, never blocking
- `messages`: what is said
- `requests`: what is asked of a guard from outside, and how it is refused
- `entry`: how a worker or sweeper begins and ends
- `measuring`: what both keep while limits are learned
"""
