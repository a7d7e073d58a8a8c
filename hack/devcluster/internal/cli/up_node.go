package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"geminibatch.dev/devcluster/internal/assets"
	"geminibatch.dev/devcluster/internal/cluster"
	"geminibatch.dev/devcluster/internal/image"
	"geminibatch.dev/devcluster/internal/node"
	"geminibatch.dev/devcluster/internal/workdir"
)

const (
	pauseArchive = "pause.tar"
	// pauseProgram is built beside this binary.
	pauseProgram = "pause"
)

// nodeRunOptions is what 'up --node' tells 'node-run'.
type nodeRunOptions struct {
	Dir       string
	Temporary bool
	Audit     bool
	Timeout   time.Duration
	Programs  node.Programs
	Begin     time.Time
}

// runWithNode runs a cluster with a node, from the outside: it makes the
// namespaces, in which 'node-run' does the rest, and cleans up.
func runWithNode(ctx context.Context, _ context.CancelCauseFunc, options upOptions, progress func(string, ...any)) (err error) {
	begin := time.Now()
	programs, err := node.Find()
	if err != nil {
		return err
	}
	if err := checkPaths(options.dir); err != nil {
		return err
	}
	dir, err := openDir(options, progress)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dir.Close()) }()
	if err := writePauseImage(dir.File(pauseArchive)); err != nil {
		return fmt.Errorf("cannot make the pause image: %w", err)
	}
	listener, err := cluster.ListenOutside(dir)
	if err != nil {
		return err
	}
	defer func() { _ = listener.Close() }()
	encoded, err := json.Marshal(nodeRunOptions{
		Dir: dir.Path, Temporary: dir.Temporary, Audit: options.audit, Timeout: options.timeout, Programs: programs, Begin: begin,
	})
	if err != nil {
		return err
	}
	sandbox, err := node.Start(node.Spec{
		Dir:          dir.Path,
		Args:         []string{"node-run", string(encoded)},
		Listener:     listener.(*net.TCPListener),
		ServiceRange: cluster.ServiceRange,
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, node.CleanUp(dir.Path)) }()
	select {
	case <-ctx.Done():
		sandbox.Stop()
		return context.Cause(ctx)
	case <-sandbox.Done():
		return sandbox.Err()
	}
}

// checkPaths sees that what is needed inside can be seen there.
func checkPaths(dir string) error {
	finder, err := assets.FromEnv()
	if err != nil {
		return err
	}
	paths := map[string]string{"this binary": finder.Self, "the directory for temporary files (TMPDIR)": os.TempDir()}
	if dir != "" {
		paths = map[string]string{"this binary": finder.Self, "the cluster's directory": dir}
	}
	if finder.Dir != "" {
		paths[assets.EnvVar] = finder.Dir
	}
	return node.CheckPaths(paths)
}

// writePauseImage makes the one image that every pod needs.
func writePauseImage(file string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	if self, err = filepath.EvalSymlinks(self); err != nil {
		return err
	}
	return image.Image{
		Name:         cluster.PauseImage,
		Architecture: runtime.GOARCH,
		Files:        map[string]string{"/pause": filepath.Join(filepath.Dir(self), pauseProgram)},
		Entrypoint:   []string{"/pause"},
		User:         "65535:65535",
	}.WriteFile(file)
}

// nodeRun runs the components inside the namespaces.
func nodeRun(args []string) int {
	var options nodeRunOptions
	if len(args) != 1 || json.Unmarshal([]byte(args[0]), &options) != nil {
		return usageError("node-run is called by 'devcluster up --node' only")
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	onSignal(func(reason string) { cancel(errRequested{reason}) })

	file := os.NewFile(node.ListenerFD, "listener")
	listener, err := net.FileListener(file)
	if err != nil {
		return failed(err)
	}
	_ = file.Close() // it was copied
	dir := workdir.Adopt(options.Dir, options.Temporary)
	go node.Forward(listener, listener.Addr().String())

	err = runComponents(ctx, cancel, cluster.Config{
		Dir:               dir,
		Audit:             options.Audit,
		ControllerManager: true,
		Node:              &cluster.NodeConfig{Programs: options.Programs, PauseImage: dir.File(pauseArchive)},
		Timeout:           options.Timeout,
		Progress:          newProgress(os.Stderr, options.Begin),
	})
	var requested errRequested
	if errors.As(err, &requested) {
		return exitOK // whoever asked tells it
	}
	return failed(err)
}
