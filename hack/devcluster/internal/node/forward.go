package node

import (
	"io"
	"net"
	"sync"
)

// Forward passes connections on to the address until the listener is closed.
// The listener is a socket of the machine's network, which stays one inside the
// namespaces: this is how the API server is reached from outside.
func Forward(listener net.Listener, address string) {
	for {
		outside, err := listener.Accept()
		if err != nil {
			return
		}
		go forward(outside.(*net.TCPConn), address)
	}
}

func forward(outside *net.TCPConn, address string) {
	defer func() { _ = outside.Close() }()
	dialed, err := net.Dial("tcp4", address)
	if err != nil {
		_ = outside.SetLinger(0) // as near to "connection refused" as it gets
		return
	}
	inside := dialed.(*net.TCPConn)
	defer func() { _ = inside.Close() }()
	var both sync.WaitGroup
	for _, pair := range [][2]*net.TCPConn{{outside, inside}, {inside, outside}} {
		both.Go(func() {
			_, _ = io.Copy(pair[0], pair[1])
			_ = pair[0].CloseWrite()
		})
	}
	both.Wait()
}
