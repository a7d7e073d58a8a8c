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
	content, err := json.Marshal(numbers)
	if err == nil {
		err = os.WriteFile(file, append(content, '\n'), 0o600)
	}
	if err != nil {
		set.Release()
		return nil, err
	}
	return set, nil
}

// Release gives all ports up.
func (s Set) Release() {
	for _, reservation := range s {
		reservation.Release()
	}
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
