"""A Netfilter-based RST firewall and DoS guard for Linux gateways."""

__version__ = "0.1.0"
