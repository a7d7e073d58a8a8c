// Package ports picks loopback TCP ports for programs that must be told their
// port before they start.
//
// Between picking a port and the program binding it, and again while a program
// is stopped on purpose, another process could take the port. Where the system
// allows, a Reservation therefore holds the port bound without listening, and
// the program shares it (SO_REUSEPORT): nobody else can get it, and while the
// program is down, connections are refused as they should be.
package ports

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"os"
)

// Reservation is a port kept for one program.
type Reservation struct {
	Port int
	// Shared says that the port stays held, so that the program has to bind
	// it with SO_REUSEPORT.
	Shared bool

	release func()
}

// Reserve takes the preferred port when it is free, otherwise any other.
// Preferred 0 means any.
func Reserve(preferred int) (Reservation, error) {
	if preferred != 0 {
		if reservation, err := reserve(preferred); err == nil {
			return reservation, nil
		}
	}
	reservation, err := reserve(0)
	if err != nil {
		return Reservation{}, fmt.Errorf("no free port on 127.0.0.1: %w", err)
	}
	return reservation, nil
}

// Release gives the port up.
func (r Reservation) Release() {
	if r.release != nil {
		r.release()
	}
}

// Set is the reservations of a cluster by purpose.
type Set map[string]Reservation

// ReserveAll reserves one port for each purpose. The file remembers them, so
// that a cluster in a kept directory comes back on the ports it had. With
// fresh true, remembered ports are not tried.
func ReserveAll(file string, fresh bool, purposes ...string) (Set, error) {
	remembered := map[string]int{}
	if !fresh {
		var err error
		if remembered, err = read(file); err != nil {
			return nil, err
		}
	}
	set := Set{}
	numbers := map[string]int{}
	for _, purpose := range purposes {
		reservation, err := Reserve(remembered[purpose])
		if err != nil {
			set.Release()
			return nil, err
		}
		set[purpose] = reservation
		numbers[purpose] = reservation.Port
	}
	if err := write(file, numbers); err != nil {
		set.Release()
		return nil, err
	}
	return set, nil
}

// Listen listens on the port that the file remembers for the purpose, or on
// another when that is taken, and remembers it.
func Listen(file, purpose string) (net.Listener, error) {
	remembered, err := read(file)
	if err != nil {
		return nil, err
	}
	listener, err := net.Listen("tcp4", fmt.Sprintf("127.0.0.1:%d", remembered[purpose]))
	if err != nil {
		if listener, err = net.Listen("tcp4", "127.0.0.1:0"); err != nil {
			return nil, err
		}
	}
	numbers := map[string]int{}
	maps.Copy(numbers, remembered)
	numbers[purpose] = listener.Addr().(*net.TCPAddr).Port
	if err := write(file, numbers); err != nil {
		_ = listener.Close()
		return nil, err
	}
	return listener, nil
}

// Release gives all ports up.
func (s Set) Release() {
	for _, reservation := range s {
		reservation.Release()
	}
}

func write(file string, numbers map[string]int) error {
	content, err := json.Marshal(numbers)
	if err != nil {
		return err
	}
	return os.WriteFile(file, append(content, '\n'), 0o600)
}

func read(file string) (map[string]int, error) {
	content, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	numbers := map[string]int{}
	if err := json.Unmarshal(content, &numbers); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return numbers, nil
}
