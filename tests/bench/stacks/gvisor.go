// An echo server on gVisor's netstack: what comes goes back; "!" aborts, "?" is answered by the
// number of open connections.   gvisor TUN ADDRESS PORT
package main

import (
	"fmt"
	"log"
	"net"
	"os"
	"strconv"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/link/fdbased"
	"gvisor.dev/gvisor/pkg/tcpip/link/tun"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

var opened atomic.Int32

func serve(endpoint tcpip.Endpoint, queue *waiter.Queue) {
	opened.Add(1)
	defer opened.Add(-1)
	event, channel := waiter.NewChannelEntry(waiter.ReadableEvents | waiter.EventHUp | waiter.EventErr)
	queue.EventRegister(&event)
	defer queue.EventUnregister(&event)
	for {
		var buffer writer
		_, err := endpoint.Read(&buffer, tcpip.ReadOptions{})
		if _, wait := err.(*tcpip.ErrWouldBlock); wait {
			<-channel
			continue
		}
		if err != nil {
			endpoint.Close()
			return
		}
		if len(buffer) == 0 {
			continue
		}
		switch buffer[0] {
		case '!':
			endpoint.Abort()
			return
		case '?':
			buffer = []byte(fmt.Sprintf("%d\n", opened.Load()))
		}
		endpoint.Write(&reader{buffer}, tcpip.WriteOptions{})
	}
}

type writer []byte

func (w *writer) Write(p []byte) (int, error) { *w = append(*w, p...); return len(p), nil }

type reader struct{ data []byte }

func (r *reader) Len() int { return len(r.data) }
func (r *reader) Read(p []byte) (int, error) {
	n := copy(p, r.data)
	r.data = r.data[n:]
	return n, nil
}

func main() {
	fd, err := tun.Open(os.Args[1])
	if err != nil {
		log.Fatal(err)
	}
	link, err := fdbased.New(&fdbased.Options{FDs: []int{fd}, MTU: 1500})
	if err != nil {
		log.Fatal(err)
	}
	s := stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol},
	})
	// As runsc sets it (runsc/boot/loader.go).
	sack := tcpip.TCPSACKEnabled(true)
	s.SetTransportProtocolOption(tcp.ProtocolNumber, &sack)
	if err := s.CreateNIC(1, link); err != nil {
		log.Fatal(err)
	}
	address := tcpip.Address(net.ParseIP(os.Args[2]).To4())
	s.AddProtocolAddress(1, tcpip.ProtocolAddress{Protocol: ipv4.ProtocolNumber,
		AddressWithPrefix: address.WithPrefix()}, stack.AddressProperties{})
	s.SetRouteTable([]tcpip.Route{{Destination: header.IPv4EmptySubnet, NIC: 1}})
	var queue waiter.Queue
	listener, failed := s.NewEndpoint(tcp.ProtocolNumber, ipv4.ProtocolNumber, &queue)
	if failed != nil {
		log.Fatal(failed)
	}
	port, _ := strconv.Atoi(os.Args[3])
	listener.Bind(tcpip.FullAddress{Port: uint16(port)})
	listener.Listen(100)
	fmt.Println("ready")
	event, channel := waiter.NewChannelEntry(waiter.ReadableEvents)
	queue.EventRegister(&event)
	for {
		endpoint, its, err := listener.Accept(nil)
		if err == nil {
			go serve(endpoint, its)
			continue
		}
		select {
		case <-channel:
		case <-time.After(time.Second):
		}
	}
}
