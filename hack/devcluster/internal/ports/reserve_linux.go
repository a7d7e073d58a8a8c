package ports

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// reserve holds a port with a socket that is bound but does not listen.
//
// Two sockets are needed. The guard listens without sharing, which fails when
// anybody else holds the port, be it like this, but not for what connections of
// an earlier run left in TIME_WAIT. Under its cover the holder binds the port
// for sharing, and the guard goes away.
func reserve(port int) (Reservation, error) {
	guard, err := bound(port, unix.SO_REUSEADDR)
	if err != nil {
		return Reservation{}, err
	}
	defer func() { _ = unix.Close(guard) }()
	if err := unix.Listen(guard, 1); err != nil {
		return Reservation{}, err
	}
	number, err := portOf(guard)
	if err != nil {
		return Reservation{}, err
	}
	if err := unix.SetsockoptInt(guard, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1); err != nil {
		return Reservation{}, err
	}
	holder, err := bound(number, unix.SO_REUSEADDR, unix.SO_REUSEPORT)
	if err != nil {
		return Reservation{}, err
	}
	// A holder that kept this option would not be in the way of other listeners.
	if err := unix.SetsockoptInt(holder, unix.SOL_SOCKET, unix.SO_REUSEADDR, 0); err != nil {
		_ = unix.Close(holder)
		return Reservation{}, err
	}
	return Reservation{Port: number, Shared: true, release: func() { _ = unix.Close(holder) }}, nil
}

// bound makes a TCP socket with the options and binds it on loopback.
func bound(port int, options ...int) (fd int, err error) {
	fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	for _, option := range options {
		if err == nil {
			err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, option, 1)
		}
	}
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrInet4{Port: port, Addr: [4]byte{127, 0, 0, 1}})
	}
	if err != nil {
		_ = unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

func portOf(fd int) (int, error) {
	address, err := unix.Getsockname(fd)
	if err != nil {
		return 0, err
	}
	inet, ok := address.(*unix.SockaddrInet4)
	if !ok {
		return 0, fmt.Errorf("unexpected socket address %T", address)
	}
	return inet.Port, nil
}
