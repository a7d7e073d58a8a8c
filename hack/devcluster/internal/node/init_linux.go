package node

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// lifelineFD is the file descriptor of the pipe in 'node-init'.
const lifelineFD = 4

// Init is 'node-init': process 1 inside the namespaces. It does not return
// unless it fails.
func Init(args []string) error {
	if len(args) < 3 || os.Getpid() != 1 {
		return errors.New("node-init is called by 'devcluster up --node' only")
	}
	dir, serviceRange, runArgs := args[0], args[1], args[2:]
	syscall.CloseOnExec(lifelineFD)
	lifeline := os.NewFile(lifelineFD, "lifeline")
	if _, err := lifeline.Read(make([]byte, 1)); err != nil {
		return fmt.Errorf("whoever started this node is gone: %w", err)
	}
	go func() {
		_, _ = lifeline.Read(make([]byte, 1)) // returns when the other end is closed
		os.Exit(1)
	}()

	if err := makeCgroups(cgroupName(dir)); err != nil {
		return fmt.Errorf("cannot make cgroups: %w", err)
	}
	if err := mountAll(filepath.Join(dir, filesDir)); err != nil {
		return err
	}
	if err := configureNetwork(serviceRange); err != nil {
		return fmt.Errorf("cannot set up the network inside: %w", err)
	}
	if err := unix.Sethostname([]byte(hostname)); err != nil {
		return err
	}
	if err := os.Setenv("TMPDIR", tempDir); err != nil {
		return err
	}
	return runAndReap(runArgs)
}

// runAndReap runs the program and buries it and every orphan, as is the duty of
// process 1. It ends with the exit code of the program.
func runAndReap(args []string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	child, err := os.StartProcess(self, append([]string{"devcluster"}, args...), &os.ProcAttr{
		Files: []*os.File{os.Stdin, os.Stdout, os.Stderr, os.NewFile(ListenerFD, "listener")},
	})
	if err != nil {
		return err
	}
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	go func() {
		for received := range signals {
			_ = syscall.Kill(child.Pid, received.(syscall.Signal))
		}
	}()
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, 0, nil)
		switch {
		case errors.Is(err, syscall.EINTR):
		case err != nil:
			return fmt.Errorf("waiting for children: %w", err)
		case pid == child.Pid && status.Exited():
			os.Exit(status.ExitStatus())
		case pid == child.Pid:
			return fmt.Errorf("node-run ended by %s", status.Signal())
		}
	}
}
