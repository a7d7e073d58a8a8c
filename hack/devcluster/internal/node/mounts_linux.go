package node

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

const tempDir = "/run/tmp"

// kernelSettings are what kubelet sets for the whole machine unless it finds
// them set. It is shown these instead of the machine's.
var kernelSettings = map[string]int{
	"vm/overcommit_memory":      1,
	"vm/panic_on_oom":           0,
	"kernel/panic":              10,
	"kernel/panic_on_oops":      1,
	"kernel/keys/root_maxkeys":  1000000,
	"kernel/keys/root_maxbytes": 25000000,
}

// mountAll makes the file system of the node. All of it is in a mount namespace
// of our own; nothing is written outside of the directory.
func mountAll(files string) error {
	steps := []struct {
		what string
		do   func() error
	}{
		// From here on nothing that we mount is seen outside.
		{"cut the mounts off", func() error { return unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "") }},
		// Containers take over mounts that are made later; pods ask for it.
		{"share the mounts inside", func() error { return unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, "") }},
		{"mount /proc", func() error {
			return unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "")
		}},
		{"mount /run", func() error {
			if err := unix.Mount("run", "/run", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=755"); err != nil {
				return err
			}
			return os.Mkdir(tempDir, 0o700)
		}},
		{"mount /var/lib", func() error { return bindOver(filepath.Join(files, "lib"), "/var/lib") }},
		{"mount /var/log", func() error { return bindOver(filepath.Join(files, "log"), "/var/log") }},
		{"hide kernel settings", func() error { return hideKernelSettings(filepath.Join(files, "sysctl")) }},
	}
	for _, step := range steps {
		if err := step.do(); err != nil {
			return fmt.Errorf("cannot %s inside the node: %w", step.what, err)
		}
	}
	return nil
}

// bindOver shows the directory, made if need be, in place of another.
func bindOver(dir, place string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	return unix.Mount(dir, place, "", unix.MS_BIND, "")
}

func hideKernelSettings(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for name, value := range kernelSettings {
		file := filepath.Join(dir, filepath.Base(name))
		if err := os.WriteFile(file, []byte(strconv.Itoa(value)+"\n"), 0o644); err != nil {
			return err
		}
		if err := unix.Mount(file, filepath.Join("/proc/sys", name), "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}
