package cluster

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"geminibatch.dev/devcluster/internal/control"
)

// Status tells the state of every component, in the order of starting.
func (c *Cluster) Status() []control.Status {
	c.mu.Lock()
	defer c.mu.Unlock()
	var list []control.Status
	for _, m := range c.members {
		status := control.Status{Name: m.name, State: m.state}
		if m.process != nil {
			status.PID = m.process.PID()
		}
		list = append(list, status)
	}
	return list
}

// Operate carries out a command on one component. Stopping what is stopped and
// starting what runs are no errors.
func (c *Cluster) Operate(ctx context.Context, command control.Command, name string) error {
	c.operation.Lock()
	defer c.operation.Unlock()
	if ctx.Err() != nil {
		return errors.New("the cluster is shutting down")
	}
	m, err := c.member(name)
	if err != nil {
		return err
	}
	switch command {
	case control.Stop:
		c.stopMember(m)
		return nil
	case control.Start:
		return c.startStopped(ctx, m)
	case control.Restart:
		c.stopMember(m)
		return c.startStopped(ctx, m)
	case control.Pause:
		return c.signal(m, control.Running, control.Paused)
	case control.Resume:
		return c.signal(m, control.Paused, control.Running)
	default:
		return fmt.Errorf("unknown command %q", command)
	}
}

func (c *Cluster) member(name string) (*member, error) {
	var names []string
	for _, m := range c.members {
		if m.name == name {
			return m, nil
		}
		names = append(names, m.name)
	}
	return nil, fmt.Errorf("no component %q in this cluster: it has %s", name, strings.Join(names, ", "))
}

func (c *Cluster) stopMember(m *member) {
	if p := c.processOf(m); p != nil {
		p.Stop(m.grace)
		c.set(m, control.Stopped, nil)
		c.cfg.Progress("%s stopped on request", m.name)
	}
}

func (c *Cluster) startStopped(ctx context.Context, m *member) error {
	c.mu.Lock()
	state := m.state
	c.mu.Unlock()
	switch state {
	case control.Running:
		return nil
	case control.Paused:
		return fmt.Errorf("%s is paused: resume it", m.name)
	}
	if err := c.startMember(ctx, m); err != nil {
		return err
	}
	c.cfg.Progress("%s started on request", m.name)
	return nil
}

// signal pauses or resumes a component. One already in the wanted state is
// left alone.
func (c *Cluster) signal(m *member, from, to control.State) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if m.state == to {
		return nil
	}
	if m.state != from {
		return fmt.Errorf("%s is %s", m.name, m.state)
	}
	act := m.process.Pause
	if to == control.Running {
		act = m.process.Resume
	}
	if err := act(); err != nil {
		return fmt.Errorf("%s: %w", m.name, err)
	}
	m.state = to
	c.cfg.Progress("%s is now %s on request", m.name, to)
	return nil
}
