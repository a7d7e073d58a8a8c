//go:build !linux

package node

import "errors"

var errUnsupported = errors.New("a node needs Linux: its namespaces and cgroups")

func supported() error { return errUnsupported }

func removeCgroups(string) error { return nil }

// Sandbox is a running node.
type Sandbox struct{}

// Start always fails here.
func Start(Spec) (*Sandbox, error) { return nil, errUnsupported }

// Done never happens.
func (s *Sandbox) Done() <-chan struct{} { return nil }

// Stop does nothing.
func (s *Sandbox) Stop() {}

// Err is nil.
func (s *Sandbox) Err() error { return nil }

// Init always fails here.
func Init([]string) error { return errUnsupported }
