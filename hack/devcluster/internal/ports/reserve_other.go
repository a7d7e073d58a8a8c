//go:build !linux

package ports

import (
	"fmt"
	"net"
)

// reserve only finds a port that is free now. What shared binding means
// differs between systems; a lost race is answered by another attempt.
func reserve(port int) (Reservation, error) {
	listener, err := net.Listen("tcp4", fmt.Sprintf("127.0.0.1:%d", port))
	if err != nil {
		return Reservation{}, err
	}
	number := listener.Addr().(*net.TCPAddr).Port
	return Reservation{Port: number}, listener.Close()
}
