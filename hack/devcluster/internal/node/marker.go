package node

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"geminibatch.dev/devcluster/internal/process"
)

// marker is kept in the cluster's directory as long as there may be something
// of its node outside of it.
type marker struct {
	// PID and Start identify process 1 of the namespaces, as seen from outside.
	PID   int    `json:"pid"`
	Start string `json:"start"`
	// Boot tells the machine's runs apart: nothing survives its end.
	Boot string `json:"boot"`
}

func newMarker(pid int) (marker, error) {
	start, alive := process.Identity(pid)
	if !alive {
		return marker{}, errors.New("the node ended at once")
	}
	return marker{PID: pid, Start: start, Boot: bootID()}, nil
}

func (m marker) write(dir string) error {
	content, err := json.Marshal(m)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, markerFile), content, 0o600)
}

// alive tells whether process 1 still is, or has not yet taken the others with
// it: until all of them are gone, it is neither gone nor a zombie.
func (m marker) alive() bool {
	start, alive := process.Identity(m.PID)
	return alive && start == m.Start && bootID() == m.Boot
}

func bootID() string {
	content, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return string(content)
}

// cgroupName is the directory of a cluster's cgroup in every hierarchy.
func cgroupName(dir string) string {
	sum := sha256.Sum256([]byte(dir))
	return "gbo-devcluster-" + hex.EncodeToString(sum[:6])
}

const (
	endTimeout  = 30 * time.Second
	endInterval = 10 * time.Millisecond
)

// CleanUp ends and removes what a node left outside of the cluster's directory,
// which must not be in use. Where there never was a node it does nothing.
func CleanUp(dir string) error {
	path := filepath.Join(dir, markerFile)
	content, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var m marker
	if err := json.Unmarshal(content, &m); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	deadline := time.Now().Add(endTimeout)
	for m.alive() {
		_ = syscall.Kill(m.PID, syscall.SIGKILL)
		if time.Now().After(deadline) {
			return fmt.Errorf("process %d, the node of %s, does not end within %s", m.PID, dir, endTimeout)
		}
		time.Sleep(endInterval)
	}
	if err := removeCgroups(cgroupName(dir)); err != nil {
		return err
	}
	return os.Remove(path)
}
