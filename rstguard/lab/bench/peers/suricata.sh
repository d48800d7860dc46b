#!/bin/sh
# What comes to the server's web port goes through Suricata; without it, it passes.
set -eu
for t in iptables ip6tables; do
  $t -w -A FORWARD -i eth0 -p tcp --dport 80 -j NFQUEUE --queue-balance 0:1 --queue-bypass
done
