// Package process runs the components as child processes that cannot outlive
// this one, and watches the parent this process itself belongs to.
package process

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

// Spec describes a child process.
type Spec struct {
	// Path is executed with Args, of which the first is its name.
	Path string
	Args []string
	// Log is the file its output is appended to. Without one, the child has our
	// own stdout and stderr.
	Log string
	// Files become its file descriptors 3, 4 and so on.
	Files []*os.File
	// Configure changes how the child is made, on systems that can.
	Configure func(*syscall.SysProcAttr)
}

// Process is a started child.
type Process struct {
	cmd      *exec.Cmd
	log      string
	logStart int64
	done     chan struct{}
	stopping atomic.Bool
}

// Start starts a child.
func Start(spec Spec) (*Process, error) {
	process := &Process{
		cmd: &exec.Cmd{
			Path:       spec.Path,
			Args:       spec.Args,
			Env:        environment(),
			Stdout:     os.Stdout,
			Stderr:     os.Stderr,
			ExtraFiles: spec.Files,
			// A group of its own: Ctrl-C in a terminal reaches only us,
			// and we take the children down in order.
			SysProcAttr: &syscall.SysProcAttr{Setpgid: true},
		},
		log:  spec.Log,
		done: make(chan struct{}),
	}
	if spec.Log != "" {
		log, err := os.OpenFile(spec.Log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
		if err != nil {
			return nil, err
		}
		defer func() { _ = log.Close() }()
		info, err := log.Stat()
		if err != nil {
			return nil, err
		}
		process.cmd.Stdout, process.cmd.Stderr, process.logStart = log, log, info.Size()
	}
	dieWithParent(process.cmd.SysProcAttr)
	if spec.Configure != nil {
		spec.Configure(process.cmd.SysProcAttr)
	}
	if err := spawn(process.cmd); err != nil {
		return nil, fmt.Errorf("cannot start %s: %w", spec.Path, err)
	}
	go func() {
		_ = process.cmd.Wait()
		close(process.done)
	}()
	return process, nil
}

// environment is ours without what would change how etcd is set up.
func environment() []string {
	var kept []string
	for _, entry := range os.Environ() {
		if !strings.HasPrefix(entry, "ETCD_") {
			kept = append(kept, entry)
		}
	}
	return kept
}

// PID is the process id.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Stopping says whether the end of the process was asked for.
func (p *Process) Stopping() bool { return p.stopping.Load() }

// ExitStatus tells how the process ended; call it after Done.
func (p *Process) ExitStatus() string { return p.cmd.ProcessState.String() }

// Succeeded tells whether it ended with exit code 0; call it after Done.
func (p *Process) Succeeded() bool { return p.cmd.ProcessState.Success() }

// Stop asks the process to end, makes it end after the grace period, and
// returns when it has. Without a grace period it is killed at once.
func (p *Process) Stop(grace time.Duration) {
	p.stopping.Store(true)
	if grace > 0 {
		_ = p.cmd.Process.Signal(syscall.SIGTERM)
		_ = p.cmd.Process.Signal(syscall.SIGCONT) // it may be paused
		select {
		case <-p.done:
			return
		case <-time.After(grace):
		}
	}
	_ = p.cmd.Process.Kill()
	<-p.done
}

// Pause freezes the process where it is.
func (p *Process) Pause() error { return p.cmd.Process.Signal(syscall.SIGSTOP) }

// Resume continues a paused process.
func (p *Process) Resume() error { return p.cmd.Process.Signal(syscall.SIGCONT) }

// LogTail returns the last lines this process wrote.
func (p *Process) LogTail(lines int) string {
	const most = 64 << 10
	file, err := os.Open(p.log)
	if err != nil {
		return ""
	}
	defer func() { _ = file.Close() }()
	info, err := file.Stat()
	if err != nil {
		return ""
	}
	start := max(p.logStart, info.Size()-most)
	content := make([]byte, max(0, info.Size()-start))
	n, _ := file.ReadAt(content, start)
	all := strings.Split(strings.TrimRight(string(content[:n]), "\n"), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}
