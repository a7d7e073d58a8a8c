package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"geminibatch.dev/devcluster/internal/assets"
	"geminibatch.dev/devcluster/internal/cluster"
	"geminibatch.dev/devcluster/internal/control"
	"geminibatch.dev/devcluster/internal/node"
	"geminibatch.dev/devcluster/internal/process"
	"geminibatch.dev/devcluster/internal/workdir"
)

const upUsage = `Usage: devcluster up [flags]

Starts etcd, kube-apiserver and kube-controller-manager on free ports of
127.0.0.1, waits until they are ready, prints the path of an administrator's
kubeconfig on stdout, and runs until SIGINT, SIGTERM, SIGHUP or the death of its
parent process. Exit code 0 after such a request, 1 when a component failed, 2
for wrong usage.

With --node also kube-scheduler, containerd, kubelet, kube-proxy and CoreDNS: a
cluster that runs pods, in namespaces of its own. That needs root, containerd and
some more programs of the machine, and says which.

Without --dir, everything is in a temporary directory that goes away at the end.
`

// upOptions is the command line of 'devcluster up'.
type upOptions struct {
	dir               string
	audit             bool
	controllerManager bool
	node              bool
	watchParent       bool
	parentPID         int
	timeout           time.Duration
}

func parseUp(args []string) (options upOptions, code int, goOn bool) {
	flags := newFlags("up", upUsage)
	flags.StringVar(&options.dir, "dir", "", "keep the cluster in this `directory`, and take up again what is there")
	flags.BoolVar(&options.audit, "audit", true, "log requests to audit.log in the directory")
	flags.BoolVar(&options.controllerManager, "controller-manager", true,
		"run kube-controller-manager; without it nothing deletes namespaces, collects garbage or makes service accounts")
	flags.BoolVar(&options.node, "node", false, "also run a node for pods; needs root")
	flags.BoolVar(&options.watchParent, "watch-parent", true, "stop when the parent process dies")
	flags.IntVar(&options.parentPID, "parent-pid", 0, "stop when the process with this `pid` dies, instead of the parent")
	flags.DurationVar(&options.timeout, "timeout", 2*time.Minute, "how long one component may take to become ready")
	if code, goOn = parse(flags, args); !goOn {
		return options, code, false
	}
	switch {
	case flags.NArg() > 0:
		return options, usageError("'up' takes no argument %q", flags.Arg(0)), false
	case options.timeout <= 0:
		return options, usageError("--timeout must be more than nothing"), false
	case options.node && !options.controllerManager:
		return options, usageError("--node needs the controller manager: pods have service accounts"), false
	case options.parentPID < 0:
		return options, usageError("--parent-pid must be a process id"), false
	}
	return options, exitOK, true
}

// errRequested is why a context ended when somebody asked for the end.
type errRequested struct{ reason string }

func (e errRequested) Error() string { return e.reason }

func up(args []string) int {
	options, code, goOn := parseUp(args)
	if !goOn {
		return code
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	request := func(reason string) { cancel(errRequested{reason}) }
	onSignal(request)
	if err := watch(ctx, options, request); err != nil {
		return failed(err)
	}

	progress := newProgress(os.Stderr, time.Now())
	run := runAlone
	if options.node {
		run = runWithNode
	}
	return ended(run(ctx, cancel, options, progress), progress)
}

// ended tells why a cluster ended and returns the exit code.
func ended(err error, progress func(string, ...any)) int {
	var requested errRequested
	if errors.As(err, &requested) {
		progress("stopped: %s", requested.reason)
		return exitOK
	}
	return failed(err)
}

func onSignal(request func(reason string)) {
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	go func() {
		received := <-signals
		name := received.String()
		if number, ok := received.(syscall.Signal); ok {
			name = unix.SignalName(number)
		}
		request(name)
	}()
	// When the reader of our output dies, writing must not kill us before the
	// directory is cleaned up. (Ignoring the signal would be inherited.)
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)
}

func watch(ctx context.Context, options upOptions, gone func(string)) error {
	switch {
	case options.parentPID != 0:
		return process.WatchPID(ctx, options.parentPID, gone)
	case options.watchParent:
		process.WatchParent(ctx, gone)
	}
	return nil
}

// runAlone runs a control plane from its start to its end. The error says why it
// ended; it is errRequested when that was wanted.
func runAlone(ctx context.Context, cancel context.CancelCauseFunc, options upOptions, progress func(string, ...any)) (err error) {
	dir, err := openDir(options, progress)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dir.Close()) }()
	return runComponents(ctx, cancel, cluster.Config{
		Dir:               dir,
		Audit:             options.audit,
		ControllerManager: options.controllerManager,
		Timeout:           options.timeout,
		Progress:          progress,
	})
}

// openDir takes the cluster's directory, and removes what clusters that are gone
// left there and in temporary ones.
func openDir(options upOptions, progress func(string, ...any)) (*workdir.Dir, error) {
	removed, err := workdir.RemoveStale(os.TempDir(), node.CleanUp)
	for _, path := range removed {
		progress("removed %s, left behind by a cluster that is gone", path)
	}
	if err != nil {
		progress("%v", err)
	}
	dir, err := workdir.Open(options.dir, os.TempDir())
	if err != nil {
		return nil, err
	}
	if err := node.CleanUp(dir.Path); err != nil {
		return nil, errors.Join(err, dir.Close())
	}
	progress("starting in %s", dir.Path)
	return dir, nil
}

// runComponents runs the components until the context ends or one of them dies.
func runComponents(ctx context.Context, cancel context.CancelCauseFunc, config cluster.Config) (err error) {
	if config.Assets, err = assets.FromEnv(); err != nil {
		return err
	}
	if config.Assets.Dir != "" {
		config.Progress("%s=%s: programs found there take precedence", assets.EnvVar, config.Assets.Dir)
	}
	c, err := cluster.Start(ctx, config)
	if err != nil {
		return err
	}
	defer c.Shutdown()
	closeSocket, err := control.Serve(ctx, config.Dir.File(cluster.SocketFile), c)
	if err != nil {
		return err
	}
	defer closeSocket()
	if _, err := fmt.Println(c.Kubeconfig()); err != nil {
		return fmt.Errorf("cannot tell the kubeconfig: %w", err)
	}
	config.Progress("cluster ready")

	select {
	case <-ctx.Done():
	case <-c.Failed():
		cancel(c.Failure()) // also ends commands under way
	}
	return context.Cause(ctx)
}

// newProgress makes a function that writes short lines with the time since the
// start.
func newProgress(to *os.File, begin time.Time) func(format string, args ...any) {
	return func(format string, args ...any) {
		line := strings.TrimSuffix(fmt.Sprintf(format, args...), "\n")
		_, _ = fmt.Fprintf(to, "devcluster: %s %.1fs\n", line, time.Since(begin).Seconds())
	}
}
