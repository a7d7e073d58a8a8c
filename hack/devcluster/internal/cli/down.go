package cli

import (
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"geminibatch.dev/devcluster/internal/node"
	"geminibatch.dev/devcluster/internal/workdir"
)

const downUsage = `Usage: devcluster down [flags]

With --dir, ends the cluster that runs in this directory and returns when it has
ended. In any case removes what clusters that were killed have left: processes,
cgroups and temporary directories. The directory named stays.
`

const (
	downTimeout  = 30 * time.Second
	downInterval = 20 * time.Millisecond
)

func down(args []string) int {
	var dir string
	flags := newFlags("down", downUsage)
	flags.StringVar(&dir, "dir", "", "the cluster's `directory`")
	if code, goOn := parse(flags, args); !goOn {
		return code
	}
	if flags.NArg() > 0 {
		return usageError("'down' takes no argument %q", flags.Arg(0))
	}
	if dir != "" {
		if err := endCluster(dir); err != nil {
			return failed(err)
		}
	}
	removed, err := workdir.RemoveStale(os.TempDir(), node.CleanUp)
	for _, path := range removed {
		fmt.Fprintf(os.Stderr, "devcluster: removed %s, left behind by a cluster that is gone\n", path)
	}
	if err != nil {
		return failed(err)
	}
	return exitOK
}

// endCluster ends the cluster in the directory, and cleans up after one that was
// killed.
func endCluster(dir string) error {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return err
	}
	if _, err := os.Stat(dir); os.IsNotExist(err) {
		return nil // a temporary one that has ended
	}
	if pid := workdir.Holder(dir); pid != 0 {
		if err := syscall.Kill(pid, syscall.SIGTERM); err != nil {
			return fmt.Errorf("cannot end process %d, which runs the cluster in %s: %w", pid, dir, err)
		}
		deadline := time.Now().Add(downTimeout)
		for workdir.Holder(dir) == pid {
			if time.Now().After(deadline) {
				return fmt.Errorf("process %d, which runs the cluster in %s, does not end within %s", pid, dir, downTimeout)
			}
			time.Sleep(downInterval)
		}
	}
	return node.CleanUp(dir)
}
