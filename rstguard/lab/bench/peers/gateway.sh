#!/bin/sh
# Hand-written rules for a gateway in front of several services: those of iptables.sh, for two ports of every
# address, and against scans. Who asks for a port that is usually a scanner's, or too fast for ports of any
# kind, is banned for ten minutes. Each of these can be done in another's name.
set -eu
sysctl -qw net.netfilter.nf_conntrack_tcp_loose=0 net.ipv4.tcp_syncookies=1 net.ipv4.tcp_timestamps=1
ipset create banned4 hash:ip timeout 600 maxelem 262144
ipset create banned6 hash:ip family inet6 timeout 600 maxelem 262144
for family in 4 6; do
  case $family in 4) t=iptables net=24 ip=32 ;; 6) t=ip6tables net=48 ip=64 ;; esac
  syn="-i eth0 -p tcp --syn"
  served="-i eth0 -p tcp -m multiport --dports 80,443"
  size="--hashlimit-htable-size 65536 --hashlimit-htable-max 262144 --hashlimit-htable-expire 10000"
  $t -w -t raw -N ban
  $t -w -t raw -A ban -j SET --add-set banned$family src --exist
  $t -w -t raw -A ban -j DROP
  $t -w -t raw -A PREROUTING -i eth0 -m set --match-set banned$family src -j DROP
  $t -w -t raw -A PREROUTING $syn -m multiport --dports 23,135,139,445,1433,3389,5900 -j ban
  $t -w -t raw -A PREROUTING $syn -m hashlimit --hashlimit-name syn$family --hashlimit-mode srcip \
    --hashlimit-srcmask $ip --hashlimit-above 50/sec --hashlimit-burst 100 $size -j ban
  $t -w -t raw -A PREROUTING $syn -m hashlimit --hashlimit-name net$family --hashlimit-mode srcip \
    --hashlimit-srcmask $net --hashlimit-above 300/sec --hashlimit-burst 300 $size -j DROP
  $t -w -t raw -A PREROUTING $served --syn -j CT --notrack
  $t -w -A FORWARD $served -m conntrack --ctstate INVALID,UNTRACKED \
    -j SYNPROXY --sack-perm --wscale 7 --mss 1460
  $t -w -A FORWARD -m conntrack --ctstate INVALID -j DROP
  $t -w -A FORWARD $served -m conntrack --ctstate NEW \
    -m connlimit --connlimit-above 100 --connlimit-mask $ip -j REJECT --reject-with tcp-reset
done
