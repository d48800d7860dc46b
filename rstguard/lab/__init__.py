"""Attackers, clients, gateway and server in network namespaces."""


class LabError(Exception):
    """The lab cannot run; the text says what is wrong and what to do about it."""
