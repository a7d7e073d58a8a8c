package node

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"geminibatch.dev/devcluster/internal/process"
)

func supported() error { return nil }

// stopGrace is how long the components may take to end in an orderly way.
const stopGrace = 10 * time.Second

// Sandbox is a running node, seen from outside.
type Sandbox struct {
	process *process.Process
	// lifeline is a pipe that process 1 reads: it ends when we do, should the
	// signal that the kernel sends it then get lost.
	lifeline *os.File
}

// Start makes the namespaces and starts 'node-init' as their process 1.
func Start(spec Spec) (*Sandbox, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	listener, err := spec.Listener.File()
	if err != nil {
		return nil, err
	}
	defer func() { _ = listener.Close() }()
	reader, writer, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer func() { _ = reader.Close() }()
	p, err := process.Start(process.Spec{
		Path:  self,
		Args:  append([]string{"devcluster", "node-init", spec.Dir, spec.ServiceRange}, spec.Args...),
		Files: []*os.File{listener, reader}, // ListenerFD and lifelineFD
		Configure: func(attr *syscall.SysProcAttr) {
			attr.Cloneflags = syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWNET |
				syscall.CLONE_NEWUTS | syscall.CLONE_NEWIPC
		},
	})
	if err != nil {
		_ = writer.Close()
		if errors.Is(err, syscall.EPERM) {
			err = fmt.Errorf("%w: making namespaces is not allowed here (in a container it must be a privileged one)", err)
		}
		return nil, err
	}
	s := &Sandbox{process: p, lifeline: writer}
	if err := s.release(spec.Dir); err != nil {
		s.kill()
		return nil, err
	}
	return s, nil
}

// release lets process 1 go on, once it is written down.
func (s *Sandbox) release(dir string) error {
	if err := os.MkdirAll(filepath.Join(dir, filesDir), 0o700); err != nil {
		return err
	}
	m, err := newMarker(s.process.PID())
	if err != nil {
		return err
	}
	if err := m.write(dir); err != nil {
		return err
	}
	_, err = s.lifeline.Write([]byte{1})
	return err
}

// Done is closed when everything inside has ended.
func (s *Sandbox) Done() <-chan struct{} { return s.process.Done() }

// Err says how it ended when that was not with success; call it after Done.
func (s *Sandbox) Err() error {
	if s.process.Succeeded() {
		return nil
	}
	return fmt.Errorf("the cluster ended (%s); see above", s.process.ExitStatus())
}

// Stop ends everything inside and returns when it has ended.
func (s *Sandbox) Stop() {
	s.process.Stop(stopGrace)
	_ = s.lifeline.Close()
}

func (s *Sandbox) kill() {
	s.process.Stop(0)
	_ = s.lifeline.Close()
}
