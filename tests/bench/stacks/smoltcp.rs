// An echo server on smoltcp: what comes goes back; "!" aborts, "?" is answered by the number of
// open connections.   smoltcp TUN ADDRESS HOST PORT
use smoltcp::iface::{Config, Interface, SocketSet};
use smoltcp::phy::{wait, Medium, TunTapInterface};
use smoltcp::socket::tcp;
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::{HardwareAddress, IpCidr, Ipv4Address};
use std::os::unix::io::AsRawFd;

const SOCKETS: usize = 40;

fn main() {
    let words: Vec<String> = std::env::args().collect();
    let mut device = TunTapInterface::new(&words[1], Medium::Ip).unwrap();
    let fd = device.as_raw_fd();
    let address: Ipv4Address = words[2].parse().unwrap();
    let host: Ipv4Address = words[3].parse().unwrap();
    let port: u16 = words[4].parse().unwrap();
    let mut config = Config::new(HardwareAddress::Ip);
    config.random_seed = std::process::id() as u64;
    let mut interface = Interface::new(config, &mut device, Instant::now());
    interface.update_ip_addrs(|all| all.push(IpCidr::new(address.into(), 24)).unwrap());
    interface.routes_mut().add_default_ipv4_route(host).unwrap();
    let mut sockets = SocketSet::new(vec![]);
    let buffer = || tcp::SocketBuffer::new(vec![0; 65535]);
    let handles: Vec<_> = (0..SOCKETS)
        .map(|_| sockets.add(tcp::Socket::new(buffer(), buffer())))
        .collect();
    println!("ready");
    loop {
        let now = Instant::now();
        interface.poll(now, &mut device, &mut sockets);
        let open = handles.iter().filter(|h| sockets.get::<tcp::Socket>(**h).may_send()).count();
        for handle in &handles {
            let socket = sockets.get_mut::<tcp::Socket>(*handle);
            if !socket.is_open() {
                socket.listen(port).unwrap();
            }
            if socket.can_recv() {
                let mut data = [0; 100];
                let size = socket.recv_slice(&mut data).unwrap();
                match data[0] {
                    b'!' => socket.abort(),
                    b'?' => drop(socket.send_slice(format!("{open}\n").as_bytes())),
                    _ => drop(socket.send_slice(&data[..size])),
                }
            } else if socket.may_send() && !socket.may_recv() {
                socket.close();
            }
        }
        let pause = interface.poll_delay(now, &sockets).unwrap_or(Duration::from_millis(100));
        wait(fd, Some(pause.min(Duration::from_millis(100)))).unwrap();
    }
}
