"""How a running guard is asked: the control socket and its commands, the web page.

- `protocol`: the socket: one JSON request a line, one answer a line
- `lines`: requests and answers as bytes; strangers' text made plain
- `crowd`: who is connected, bounded
- `commands`: what can be asked
- `ban_import`, `explain`, `nearest`: those that take more than a few lines
- `web`: the page and the metrics
"""
