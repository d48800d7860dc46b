#!/bin/bash
# Runs as a service of a container's own systemd, before and after a reboot; $R is rstguard.
# What it says goes to /result, which test_systemd.py reads.
exec >>/result 2>&1

say() { echo "$1: $2"; }
show() { systemctl show rstguard -p "$1" --value; }
nice_of() { ps -o ni= -p "$1" | tr -d ' '; }
now() { date +%s%N; }

# Prints after how many milliseconds something holds; gives up after a minute.
until_it() {
  local began
  began=$(now)
  for _ in $(seq 600); do
    if "$@"; then
      echo $((($(now) - began) / 1000000))
      return
    fi
    sleep 0.1
  done
  echo never
}

serves() { $R status >/dev/null 2>&1; }
children() { pgrep -P "$(show MainPID)" -f "rstguard.$1"; }
is_second() { show StatusText | grep -q second; }
serves_anew() { [ "$(show NRestarts)" -gt "$before" ] && serves; }
worker_gone() { [ ! -e "/proc/$worker" ] && serves; }

# Prints the seconds that the ban has left.
ban() {
  $R ban list --json | python3 -c '
import json, sys
print(*(row["remaining_s"] for row in json.load(sys.stdin) if row["source"] == "198.51.100.7"))'
}

first_boot() {
  $R install --interface eth0 >/dev/null
  systemctl start rstguard
  say started "$(systemctl is-active rstguard)"
  say status "$(show StatusText)"
  say exposure "$(systemd-analyze security rstguard | tail -1)"
  say supervisor-nice "$(nice_of "$(show MainPID)")"
  say may-raise "$(grep -c 'Max nice priority *30' "/proc/$(show MainPID)/limits")"
  for worker in $(children worker); do say worker-nice "$(nice_of "$worker")"; done
  say supervisor-user "$(ps -o user= -p "$(show MainPID)")"
  for child in $(children worker) $(children sweeper); do
    say user "$(ps -o user:20= -p "$child")"
    say filtered "$(grep -c '^Seccomp:.2$' "/proc/$child/status")"
  done
  $R ban add 198.51.100.7 --for 1h >/dev/null

  sed -i 's/name: first/name: second/' /etc/rstguard/policy.yaml
  systemctl reload rstguard
  say reloaded $?
  until_it is_second >/dev/null
  say status "$(show StatusText)"
  cp /etc/rstguard/policy.yaml /good
  echo 'rules: [' >>/etc/rstguard/policy.yaml
  systemctl reload rstguard 2>/dev/null
  say bad-reload $?
  cp /good /etc/rstguard/policy.yaml
  sleep 1 # the ban is on the disk by then

  before=$(show NRestarts)
  kill -9 "$(show MainPID)"
  say ms-after-crash "$(until_it serves_anew)"
  say crashed "$(systemctl is-active rstguard)"
  before=$(show NRestarts)
  systemctl kill -s KILL rstguard
  say ms-after-kill-of-all "$(until_it serves_anew)"
  say killed "$(systemctl is-active rstguard)"
  say left-after-kills "$(ban)"

  worker=$(children worker | head -1)
  kill -STOP "$worker"
  say ms-of-hung-worker "$(until_it worker_gone)"
  say hung-worker "$(systemctl is-active rstguard)"
  systemctl enable rstguard 2>/dev/null
  systemctl poweroff # it is started again from outside
}

second_boot() {
  say ms-after-reboot "$(until_it serves)"
  say left-after-reboot "$(ban)"
  systemctl stop rstguard
  say stopped "$(show Result)"
  say rules "$(iptables-save | grep -c rstguard)"
  say journal "$(journalctl -u rstguard RSTGUARD_KIND=ban --no-pager -o cat | tail -1)"
  $R uninstall --purge >/dev/null
  left=$(ls /etc/rstguard /var/lib/rstguard /etc/systemd/system/rstguard.service 2>/dev/null)
  say uninstalled "$(echo -n "$left" | wc -l) files left"
  systemctl poweroff
}

ip link add eth0 type veth peer name eth0-far # what the first policy guards
ip link set eth0 up
if [ -e /good ]; then second_boot; else first_boot; fi
