#!/bin/sh
# A hand-written ruleset with the kernel's own means: ipset, hashlimit, connlimit and SYNPROXY.
# The SYNPROXY rules and sysctls are those of iptables-extensions(8); the hash tables have room for
# a quarter of a million sources.
set -eu
sysctl -qw net.netfilter.nf_conntrack_tcp_loose=0 net.ipv4.tcp_syncookies=1 net.ipv4.tcp_timestamps=1
ipset create banned4 hash:ip timeout 600 maxelem 262144
ipset create banned6 hash:ip family inet6 timeout 600 maxelem 262144
for family in 4 6; do
  case $family in 4) t=iptables net=24 ip=32 ;; 6) t=ip6tables net=48 ip=64 ;; esac
  syn="-i eth0 -p tcp --dport 80 --syn"
  size="--hashlimit-htable-size 65536 --hashlimit-htable-max 262144 --hashlimit-htable-expire 10000"
  $t -w -t raw -A PREROUTING -i eth0 -m set --match-set banned$family src -j DROP
  $t -w -t raw -N toofast
  $t -w -t raw -A toofast -j SET --add-set banned$family src --exist
  $t -w -t raw -A toofast -j DROP
  $t -w -t raw -A PREROUTING $syn -m hashlimit --hashlimit-name syn$family --hashlimit-mode srcip \
    --hashlimit-srcmask $ip --hashlimit-above 50/sec --hashlimit-burst 100 $size -j toofast
  $t -w -t raw -A PREROUTING $syn -m hashlimit --hashlimit-name net$family --hashlimit-mode srcip \
    --hashlimit-srcmask $net --hashlimit-above 300/sec --hashlimit-burst 300 $size -j DROP
  $t -w -t raw -A PREROUTING $syn -j CT --notrack
  $t -w -A FORWARD -i eth0 -p tcp --dport 80 -m conntrack --ctstate INVALID,UNTRACKED \
    -j SYNPROXY --sack-perm --timestamp --wscale 7 --mss 1460
  $t -w -A FORWARD -m conntrack --ctstate INVALID -j DROP
  $t -w -A FORWARD -i eth0 -p tcp --dport 80 -m conntrack --ctstate NEW \
    -m connlimit --connlimit-above 100 --connlimit-mask $ip -j REJECT --reject-with tcp-reset
done
