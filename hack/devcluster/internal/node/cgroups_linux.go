package node

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const cgroupRoot = "/sys/fs/cgroup"

// CgroupRoot is the cgroup that all pods of a cluster are in, for kubelet.
func CgroupRoot(dir string) string { return "/" + cgroupName(dir) }

// hierarchies lists where cgroups are made: one place with cgroup v2, one for
// each controller with v1.
func hierarchies() ([]string, error) {
	if isV2() {
		return []string{cgroupRoot}, nil
	}
	entries, err := os.ReadDir(cgroupRoot)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	var found []string
	for _, entry := range entries {
		path := filepath.Join(cgroupRoot, entry.Name())
		// Links are second names ("cpu" for "cpu,cpuacct"). "unified" is a v2
		// hierarchy without controllers, which systemd and runc use.
		if entry.IsDir() && isCgroup(path) {
			found = append(found, path)
		}
	}
	return found, nil
}

func isV2() bool { return fsType(cgroupRoot) == unix.CGROUP2_SUPER_MAGIC }

func isCgroup(path string) bool {
	kind := fsType(path)
	return kind == unix.CGROUP_SUPER_MAGIC || kind == unix.CGROUP2_SUPER_MAGIC
}

func fsType(path string) int64 {
	var stat unix.Statfs_t
	if unix.Statfs(path, &stat) != nil {
		return 0
	}
	return int64(stat.Type)
}

// makeCgroups makes the cgroup in every hierarchy: kubelet expects it there.
func makeCgroups(name string) error {
	places, err := hierarchies()
	if err != nil {
		return err
	}
	if len(places) == 0 {
		return fmt.Errorf("none are mounted in %s", cgroupRoot)
	}
	if isV2() {
		if err := enableControllers(); err != nil {
			return err
		}
	}
	for _, place := range places {
		path := filepath.Join(place, name)
		if err := os.Mkdir(path, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		// With v1 a new cpuset is empty, and nothing could run in it.
		for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
			content, err := os.ReadFile(filepath.Join(place, file))
			if err != nil {
				continue // another controller, or v2, where it is inherited
			}
			if err := os.WriteFile(filepath.Join(path, file), content, 0o644); err != nil {
				return err
			}
		}
	}
	return nil
}

// enableControllers lets the root's children use every controller, which v2 asks
// for. systemd does the same for most of them; it is not taken back.
func enableControllers() error {
	content, err := os.ReadFile(filepath.Join(cgroupRoot, "cgroup.controllers"))
	if err != nil {
		return err
	}
	for _, controller := range strings.Fields(string(content)) {
		file := filepath.Join(cgroupRoot, "cgroup.subtree_control")
		if err := os.WriteFile(file, []byte("+"+controller), 0o644); err != nil {
			return fmt.Errorf("cgroup controller %s: %w", controller, err)
		}
	}
	return nil
}

// removeCgroups removes the cgroup everywhere. Processes in it are of containers
// whose end the kernel has not finished; they are killed to be sure.
func removeCgroups(name string) error {
	places, err := hierarchies()
	if err != nil {
		return err
	}
	for _, place := range places {
		if err := removeCgroup(filepath.Join(place, name)); err != nil {
			return err
		}
	}
	return nil
}

func removeCgroup(path string) error {
	var dirs []string
	err := filepath.WalkDir(path, func(path string, entry fs.DirEntry, err error) error {
		if err == nil && entry.IsDir() {
			dirs = append(dirs, path)
		}
		return err
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	deadline := time.Now().Add(endTimeout)
	for _, dir := range slices.Backward(dirs) {
		for {
			err := syscall.Rmdir(dir)
			if err == nil || errors.Is(err, fs.ErrNotExist) {
				break
			}
			if !errors.Is(err, syscall.EBUSY) || time.Now().After(deadline) {
				return fmt.Errorf("cannot remove the cgroup %s: %w", dir, err)
			}
			killProcesses(dir)
			time.Sleep(endInterval)
		}
	}
	return nil
}

func killProcesses(cgroup string) {
	content, _ := os.ReadFile(filepath.Join(cgroup, "cgroup.procs"))
	for _, line := range strings.Fields(string(content)) {
		if pid, err := strconv.Atoi(line); err == nil && pid > 0 {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
	}
}
