"""Neighbours that are programs, the real ones."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

from tests.neighbours.trial import PLAIN, PROTECTED, Neighbour, Place

PORTS: Final = f"{PROTECTED}-{PLAIN}"


def write(place: Place, name: str, text: str) -> Path:
    """Write a file of a program's, and return its path."""
    file = place.directory / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return file


ZONE: Final = f"""<?xml version="1.0" encoding="utf-8"?>
<zone><interface name="out"/><interface name="in"/><forward/>
<port port="{PORTS}" protocol="tcp"/><port port="{PORTS}" protocol="udp"/></zone>
"""


def _firewall_cmd(place: Place, *words: str) -> str:
    return place.run(
        "gateway", "env", f"DBUS_SYSTEM_BUS_ADDRESS={_bus(place)}", "firewall-cmd", *words
    )


def _bus(place: Place) -> str:
    return f"unix:path={place.directory}/bus"


def firewalld(place: Place, backend: str = "nftables") -> None:
    """firewalld, on a bus of its own."""
    write(place, "firewalld/firewalld.conf",
          f"DefaultZone=public\nFirewallBackend={backend}\nIPv6_rpfilter=yes\n")  # fmt: skip
    write(place, "firewalld/zones/public.xml", ZONE)
    place.start(
        "gateway", "dbus-daemon", "--session", "--nofork", f"--address={_bus(place)}", log="bus.out"
    )
    place.wait_file("bus")
    place.start(
        "gateway", "env", f"DBUS_SYSTEM_BUS_ADDRESS={_bus(place)}",
        "firewalld", "--nofork", "--nopid",
        "--system-config", str(place.directory / "firewalld"),
        "--log-file", str(place.directory / "firewalld.log"), log="firewalld.out",
    )  # fmt: skip
    place.until(lambda: "running" in _firewall_cmd(place, "--state"))


def firewalld_by_iptables(place: Place) -> None:
    """firewalld, with its iptables back end."""
    firewalld(place, "iptables")


def firewalld_again(place: Place) -> None:
    """It is told to load its rules again."""
    _firewall_cmd(place, "--reload")


def _ufw(place: Place, *words: str) -> None:
    """Run ufw with a configuration of its own in place of this machine's."""
    own = place.directory / "ufw"
    if not own.exists():
        shutil.copytree("/etc/ufw", own / "etc")
        shutil.copy("/etc/default/ufw", own / "default")
    script = f"mount --bind {own}/etc /etc/ufw && mount --bind {own}/default /etc/default/ufw"
    place.run("gateway", "sh", "-c", f"{script} && ufw --force {' '.join(words)}")


def ufw(place: Place) -> None:
    """ufw, which forwards only what it is told to."""
    for protocol in ("tcp", "udp"):
        _ufw(place, "route", "allow", "proto", protocol, "from", "any", "to", "any",
             "port", PORTS.replace("-", ":"))  # fmt: skip
    _ufw(place, "enable")


def ufw_again(place: Place) -> None:
    """It is told to load its rules again."""
    _ufw(place, "reload")


JAIL: Final = """
[others]
enabled = true
backend = polling
filter = others
logpath = WATCHED
maxretry = 1
action = iptables-multiport[name=others, port="8000:9000", chain=FORWARD]
"""


def fail2ban(place: Place) -> None:
    """fail2ban with a jail that acts by iptables."""
    own = place.directory
    write(place, "f2b/filter.d/others.conf", "[Definition]\nfailregex = ^bad <HOST>$\n")
    shutil.copytree("/etc/fail2ban/action.d", own / "f2b" / "action.d")
    write(
        place,
        "f2b/fail2ban.conf",
        f"[Definition]\nallowipv6 = auto\ndbfile = None\nlogtarget = {own}/f2b.log\n",
    )
    write(place, "f2b/jail.conf", JAIL.replace("WATCHED", str(write(place, "f2b.watched", ""))))
    place.start("gateway", "fail2ban-server", "-xf", "-c", f"{own}/f2b", "-s", f"{own}/f2b.sock",
                "-p", f"{own}/f2b.pid", "start", log="f2b.out")  # fmt: skip
    place.until(lambda: "others" in place.run("gateway", "fail2ban-client", "-s", f"{own}/f2b.sock",
                                              "status"))  # fmt: skip


def fail2ban_bans(place: Place) -> None:
    """It bans an address, and for that makes its chain at the head of the others."""
    place.run("gateway", "fail2ban-client", "-s", f"{place.directory}/f2b.sock",
              "set", "others", "banip", "192.0.2.66")  # fmt: skip
    place.until(lambda: "192.0.2.66" in place.run("gateway", "iptables", "-S"))


CONNTRACKD: Final = """
Sync {
  Mode FTFW { DisableExternalCache no }
  UDP { IPv4_address 10.76.0.MINE
        IPv4_Destination_Address 10.76.0.FAR
        Port 3780
        Interface sync
        Checksum on }
}
General {
  HashSize 32768
  HashLimit 131072
  LockFile DIRECTORY/HOST.lock
  UNIX { Path DIRECTORY/HOST.ctl }
  NetlinkBufferSize 2097152
  NetlinkBufferSizeMaxGrowth 8388608
}
"""


def conntrackd(place: Place) -> None:
    """conntrackd tells all connections to a second gateway, and takes in those of that one."""
    place.join(("gateway", "sync"), ("other", "sync"))
    for host, mine, far in (("gateway", 1, 2), ("other", 2, 1)):
        place.ip(host, f"address add 10.76.0.{mine}/24 dev sync", "link set sync up")
        place.both(host, "-A INPUT -m conntrack --ctstate NEW")
        text = CONNTRACKD.replace("MINE", str(mine)).replace("FAR", str(far))
        text = text.replace("DIRECTORY", str(place.directory)).replace("HOST", host)
        file = write(place, f"{host}.conf", text)
        place.start(host, "conntrackd", "-C", str(file), log=f"{host}.out")
        place.wait_file(f"{host}.ctl")


def conntrackd_again(place: Place) -> None:
    """It sends all, and takes in what it has, as scripts of a failover have it do."""
    file = str(place.directory / "gateway.conf")
    for word in ("-n", "-B", "-s"):
        place.run("gateway", "conntrackd", "-C", file, word)


NEIGHBOURS: dict[str, Neighbour] = {
    "firewalld": Neighbour(
        firewalld, firewalld_again, restored=True, needs=("firewalld", "dbus-daemon")
    ),
    "firewalld by iptables, later": Neighbour(
        after=firewalld_by_iptables, restored=True, needs=("firewalld", "dbus-daemon")
    ),
    "ufw": Neighbour(ufw, ufw_again, needs=("ufw",)),
    "ufw, later": Neighbour(after=ufw, needs=("ufw",)),
    "fail2ban": Neighbour(fail2ban, fail2ban_bans, restored=True, needs=("fail2ban-server",)),
    "conntrackd": Neighbour(conntrackd, meanwhile=conntrackd_again, needs=("conntrackd",)),
}
