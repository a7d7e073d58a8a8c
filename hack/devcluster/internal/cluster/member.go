package cluster

import (
	"context"
	"fmt"
	"strings"
	"time"

	"geminibatch.dev/devcluster/internal/control"
	"geminibatch.dev/devcluster/internal/process"
)

// How long a component may take to end in an orderly way.
const (
	etcdGrace              = 1500 * time.Millisecond
	apiServerGrace         = time.Second
	controllerManagerGrace = 500 * time.Millisecond
)

const (
	probeInterval = 50 * time.Millisecond
	tailLines     = 20
)

// component says how one program of the cluster is run.
type component struct {
	name string
	// path is a program of this machine, for one that is not built in.
	path  string
	args  []string
	grace time.Duration
	// ready fails until the component does its work.
	ready func(context.Context) error
}

// member is a component in a running cluster. The cluster's lock guards it.
type member struct {
	component
	state   control.State
	process *process.Process
}

// Failure tells that a component ended without being asked to.
type Failure struct {
	Component string
	Status    string
	Log       string
	Tail      string
}

func (f *Failure) Error() string {
	text := fmt.Sprintf("%s ended unexpectedly (%s)", f.Component, f.Status)
	if f.Tail == "" {
		return text + "; its log is empty"
	}
	return fmt.Sprintf("%s; the end of %s:\n%s", text, f.Log, f.Tail)
}

// portTaken tells whether another process was quicker to bind a port.
func (f *Failure) portTaken() bool {
	return strings.Contains(f.Tail, "address already in use")
}

func newFailure(name, log string, p *process.Process) *Failure {
	return &Failure{Component: name, Status: p.ExitStatus(), Log: log, Tail: p.LogTail(tailLines)}
}
