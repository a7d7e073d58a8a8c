// Package workdir owns the directory a cluster lives in: a temporary one that
// goes away with the cluster, or one the user names and keeps.
//
// A running cluster holds a lock on the pid file of its directory. The lock
// ends with the process however it dies, so a directory left behind is told
// apart from one in use without trusting a process id that may be reused.
package workdir

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const (
	// Prefix starts the name of every temporary cluster directory.
	Prefix = "gbo-devcluster-"

	pidFile = "devcluster.pid"

	// maxPath keeps room for the control socket: the kernel allows about
	// 104 bytes for the path of a unix socket.
	maxPath = 88

	// startGrace is how long a new directory may be without its pid.
	startGrace = time.Minute
)

// Dir is a cluster directory this process holds.
type Dir struct {
	Path      string
	Temporary bool
	lock      *os.File
}

// Open takes the named directory, creating it when needed, or makes a
// temporary one under parent when path is empty.
func Open(path, parent string) (*Dir, error) {
	dir := &Dir{Path: path, Temporary: path == ""}
	if err := dir.create(parent); err != nil {
		return nil, err
	}
	if err := dir.acquire(); err != nil {
		if dir.Temporary {
			_ = os.RemoveAll(dir.Path)
		}
		return nil, err
	}
	return dir, nil
}

// Adopt takes a directory that the process above us holds, and closes.
func Adopt(path string, temporary bool) *Dir {
	return &Dir{Path: path, Temporary: temporary}
}

func (d *Dir) create(parent string) (err error) {
	if d.Temporary {
		if parent, err = filepath.Abs(parent); err != nil {
			return err
		}
		if err = checkLength(filepath.Join(parent, Prefix+"0123456789")); err != nil {
			return err
		}
		d.Path, err = os.MkdirTemp(parent, Prefix)
		return err
	}
	if d.Path, err = filepath.Abs(d.Path); err != nil {
		return err
	}
	if err = checkLength(d.Path); err != nil {
		return err
	}
	return os.MkdirAll(d.Path, 0o700)
}

func checkLength(path string) error {
	if len(path) > maxPath {
		return fmt.Errorf("the directory path %s is too long for a unix socket inside it (%d bytes, at most %d): name a shorter one with --dir or TMPDIR",
			path, len(path), maxPath)
	}
	return nil
}

func (d *Dir) acquire() error {
	file, err := os.OpenFile(filepath.Join(d.Path, pidFile), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	if err := tryLock(file); err != nil {
		pid := readPid(d.Path)
		_ = file.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return fmt.Errorf("%s is in use by another devcluster (pid %d)", d.Path, pid)
		}
		return fmt.Errorf("cannot lock %s: %w", file.Name(), err)
	}
	// The pid goes in only under the lock: whoever reads one may rely on it.
	if err := file.Truncate(0); err != nil {
		_ = file.Close()
		return err
	}
	if _, err := fmt.Fprintf(file, "%d\n", os.Getpid()); err != nil {
		_ = file.Close()
		return err
	}
	d.lock = file
	return nil
}

// File joins a name to the directory.
func (d *Dir) File(name ...string) string {
	return filepath.Join(append([]string{d.Path}, name...)...)
}

// Close gives the directory up and removes it when it is temporary.
func (d *Dir) Close() error {
	var err error
	if d.Temporary {
		err = os.RemoveAll(d.Path)
	} else {
		_ = d.lock.Truncate(0)
	}
	_ = d.lock.Close()
	return err
}

// RemoveStale removes the temporary directories under parent whose cluster is
// gone, and returns their paths and what went wrong. Directories of other users,
// directories in use and directories just being set up stay. cleanUp is called
// with each directory first; one that it fails for stays.
func RemoveStale(parent string, cleanUp func(path string) error) (removed []string, err error) {
	paths, _ := filepath.Glob(filepath.Join(parent, Prefix+"*"))
	for _, path := range paths {
		if !isStale(path) {
			continue
		}
		failure := cleanUp(path)
		if failure == nil {
			failure = os.RemoveAll(path)
		}
		if failure != nil {
			err = errors.Join(err, fmt.Errorf("%s is left by a cluster that is gone: %w", path, failure))
			continue
		}
		removed = append(removed, path)
	}
	return removed, err
}

// Holder returns the process that runs a cluster in the directory, 0 when
// nobody does.
func Holder(path string) int {
	file, err := os.Open(filepath.Join(path, pidFile))
	if err != nil {
		return 0
	}
	defer func() { _ = file.Close() }()
	if tryLock(file) == nil {
		return 0
	}
	return readPid(path)
}

func isStale(path string) bool {
	info, err := os.Lstat(path)
	if err != nil || !info.IsDir() || !ownedByUs(info) {
		return false
	}
	if readPid(path) == 0 {
		return time.Since(info.ModTime()) > startGrace
	}
	file, err := os.Open(filepath.Join(path, pidFile))
	if err != nil {
		return false
	}
	defer func() { _ = file.Close() }()
	return tryLock(file) == nil
}

func ownedByUs(info os.FileInfo) bool {
	stat, ok := info.Sys().(*syscall.Stat_t)
	return ok && int(stat.Uid) == os.Getuid()
}

func tryLock(file *os.File) error {
	return syscall.Flock(int(file.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
}

// readPid returns 0 when the directory has no pid yet.
func readPid(dir string) int {
	content, err := os.ReadFile(filepath.Join(dir, pidFile))
	if err != nil {
		return 0
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(content)))
	if err != nil {
		return 0
	}
	return pid
}
