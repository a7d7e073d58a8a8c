// Package cluster runs the components of one cluster, the control plane and
// perhaps a node: starts them in order, waits until they are ready, notices when one dies, and stops, starts
// and pauses single ones on request.
package cluster

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"geminibatch.dev/devcluster/internal/access"
	"geminibatch.dev/devcluster/internal/assets"
	"geminibatch.dev/devcluster/internal/control"
	"geminibatch.dev/devcluster/internal/process"
	"geminibatch.dev/devcluster/internal/workdir"
)

// startAttempts bounds how often the cluster is started anew because another
// process took one of its ports.
const startAttempts = 3

// Config says what to run.
type Config struct {
	Dir               *workdir.Dir
	Assets            assets.Finder
	Audit             bool
	ControllerManager bool
	// Node is nil for a cluster that runs no pods.
	Node *NodeConfig
	// Timeout bounds how long one component may take to become ready.
	Timeout time.Duration
	// Progress takes short messages for people.
	Progress func(format string, args ...any)
}

// Cluster is a running cluster.
type Cluster struct {
	cfg Config
	env *environment

	// operation is held while a component is being started or stopped.
	operation sync.Mutex

	// members stays as it is once the cluster is made; mu guards what is in
	// them, and failure.
	members []*member
	mu      sync.Mutex
	failure *Failure
	failed  chan struct{} // closed once failure is set
}

// Start brings a cluster up. When it returns without an error, the cluster is
// ready and its kubeconfig is written.
func Start(ctx context.Context, cfg Config) (*Cluster, error) {
	var failure *Failure
	for attempt := 1; attempt <= startAttempts; attempt++ {
		cluster, err := start(ctx, cfg, attempt > 1)
		if err == nil {
			return cluster, nil
		}
		if !errors.As(err, &failure) || !failure.portTaken() {
			return nil, err
		}
		cfg.Progress("another process took a port of %s, attempt %d of %d", failure.Component, attempt, startAttempts)
	}
	return nil, fmt.Errorf("gave up after %d attempts: %w", startAttempts, failure)
}

func start(ctx context.Context, cfg Config, freshPorts bool) (*Cluster, error) {
	env, err := newEnvironment(cfg, freshPorts)
	if err != nil {
		return nil, err
	}
	c := &Cluster{cfg: cfg, env: env, failed: make(chan struct{})}
	for _, component := range env.components() {
		c.members = append(c.members, &member{component: component, state: control.Stopped})
	}
	for _, m := range c.members {
		if err := c.startMember(ctx, m); err != nil {
			c.Shutdown()
			return nil, err
		}
		cfg.Progress("%s ready", m.name)
	}
	if err := env.writeKubeconfig(c.Kubeconfig(), access.Admin); err != nil {
		c.Shutdown()
		return nil, err
	}
	return c, nil
}

// Kubeconfig is the path of the administrator's kubeconfig.
func (c *Cluster) Kubeconfig() string { return c.env.dir.File(KubeconfigFile) }

// Failed is closed when a component died by itself; Failure says which.
func (c *Cluster) Failed() <-chan struct{} { return c.failed }

// Failure returns what closed Failed.
func (c *Cluster) Failure() *Failure {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.failure
}

// Shutdown ends all components and gives the ports up. The context given to
// Operate should be done by then: a start under way is waited for. In a
// temporary directory there is nothing worth an orderly end.
func (c *Cluster) Shutdown() {
	c.operation.Lock()
	defer c.operation.Unlock()
	var all sync.WaitGroup
	for _, m := range slices.Backward(c.members) {
		p := c.processOf(m)
		if p == nil {
			continue
		}
		if !c.env.dir.Temporary && m.name == "etcd" {
			all.Wait() // nobody writes any more
			p.Stop(m.grace)
			continue
		}
		all.Go(func() { p.Stop(0) })
	}
	all.Wait()
	c.env.ports.Release()
}

// startMember starts a component and waits until it is ready. If it does not
// get there, it is stopped again.
func (c *Cluster) startMember(ctx context.Context, m *member) error {
	program := assets.Program{Path: m.path, Arg0: m.path}
	if m.path == "" {
		var err error
		if program, err = c.cfg.Assets.Find(m.name); err != nil {
			return err
		}
	}
	log := c.env.dir.File(m.name + ".log")
	p, err := process.Start(process.Spec{
		Path: program.Path,
		Args: append([]string{program.Arg0}, m.args...),
		Log:  log,
	})
	if err != nil {
		return err
	}
	c.set(m, control.Starting, p)
	if err := c.waitReady(ctx, m, p, log); err != nil {
		p.Stop(0)
		c.set(m, control.Stopped, nil)
		return err
	}
	c.set(m, control.Running, p)
	go c.watch(m, p, log)
	return nil
}

func (c *Cluster) waitReady(ctx context.Context, m *member, p *process.Process, log string) error {
	timeout := time.NewTimer(c.cfg.Timeout)
	defer timeout.Stop()
	ticker := time.NewTicker(probeInterval)
	defer ticker.Stop()
	last := errors.New("not asked yet")
	for {
		select {
		case <-p.Done():
			return newFailure(m.name, log, p)
		case <-c.failed: // a component this one needs
			return c.Failure()
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-timeout.C:
			return fmt.Errorf("%s is not ready after %s (%w); the end of %s:\n%s", m.name, c.cfg.Timeout, last, log, p.LogTail(tailLines))
		case <-ticker.C:
			if last = m.ready(ctx); last == nil {
				return nil
			}
		}
	}
}

// watch waits for the end of a process and reports it unless it was asked for.
func (c *Cluster) watch(m *member, p *process.Process, log string) {
	<-p.Done()
	if p.Stopping() {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	m.state = control.Stopped
	if c.failure == nil {
		c.failure = newFailure(m.name, log, p)
		close(c.failed)
	}
}

func (c *Cluster) set(m *member, state control.State, p *process.Process) {
	c.mu.Lock()
	defer c.mu.Unlock()
	m.state, m.process = state, p
}

func (c *Cluster) processOf(m *member) *process.Process {
	c.mu.Lock()
	defer c.mu.Unlock()
	return m.process
}
