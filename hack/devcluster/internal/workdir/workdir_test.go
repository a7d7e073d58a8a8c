package workdir

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestTemporaryDirectoryGoesAway(t *testing.T) {
	parent := t.TempDir()
	dir, err := Open("", parent)
	if err != nil {
		t.Fatal(err)
	}
	if !dir.Temporary || !strings.HasPrefix(filepath.Base(dir.Path), Prefix) || filepath.Dir(dir.Path) != parent {
		t.Errorf("got %+v", dir)
	}
	if readPid(dir.Path) != os.Getpid() {
		t.Errorf("the pid file holds %d", readPid(dir.Path))
	}
	if err := dir.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(dir.Path); !os.IsNotExist(err) {
		t.Errorf("still there after Close: %v", err)
	}
}

func TestNamedDirectoryStaysAndIsHeldOnce(t *testing.T) {
	path := filepath.Join(t.TempDir(), "kept")
	dir, err := Open(path, "")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Open(path, ""); err == nil || !strings.Contains(err.Error(), "in use by another devcluster") {
		t.Errorf("a second cluster in the same directory: error %v", err)
	}
	if err := dir.Close(); err != nil {
		t.Fatal(err)
	}
	again, err := Open(path, "")
	if err != nil {
		t.Fatalf("after Close: %v", err)
	}
	_ = again.Close()
}

func TestTooLongPath(t *testing.T) {
	_, err := Open(filepath.Join(t.TempDir(), strings.Repeat("x", maxPath)), "")
	if err == nil || !strings.Contains(err.Error(), "too long") {
		t.Errorf("error %v", err)
	}
}

func TestRemoveStale(t *testing.T) {
	parent := t.TempDir()
	make := func(name, pid string, age time.Duration) string {
		t.Helper()
		path := filepath.Join(parent, name)
		if err := os.Mkdir(path, 0o700); err != nil {
			t.Fatal(err)
		}
		if pid != "" {
			if err := os.WriteFile(filepath.Join(path, pidFile), []byte(pid), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		then := time.Now().Add(-age)
		if err := os.Chtimes(path, then, then); err != nil {
			t.Fatal(err)
		}
		return path
	}
	dead := make(Prefix+"dead", "999999999\n", 0)
	abandoned := make(Prefix+"abandoned", "", 2*startGrace)
	make(Prefix+"starting", "", 0)
	make("something-else", "999999999\n", 2*startGrace)
	if err := os.Symlink(dead, filepath.Join(parent, Prefix+"link")); err != nil {
		t.Fatal(err)
	}
	live, err := Open("", parent)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = live.Close() }()

	stubborn := make(Prefix+"stubborn", "999999998\n", 0)
	var cleaned []string
	got, err := RemoveStale(parent, func(path string) error {
		cleaned = append(cleaned, path)
		if path == stubborn {
			return errors.New("still busy")
		}
		return nil
	})
	if err == nil || !strings.Contains(err.Error(), stubborn) || !strings.Contains(err.Error(), "still busy") {
		t.Errorf("error %v", err)
	}
	slices.Sort(cleaned)
	if want := []string{abandoned, dead, stubborn}; !slices.Equal(cleaned, want) {
		t.Errorf("cleaned up %v, want %v", cleaned, want)
	}
	slices.Sort(got)
	if want := []string{abandoned, dead}; !slices.Equal(got, want) {
		t.Errorf("removed %v, want %v", got, want)
	}
	for _, kept := range []string{live.Path, stubborn, filepath.Join(parent, Prefix+"starting"), filepath.Join(parent, "something-else")} {
		if _, err := os.Stat(kept); err != nil {
			t.Errorf("%s should have stayed: %v", kept, err)
		}
	}
}

func TestHolder(t *testing.T) {
	path := filepath.Join(t.TempDir(), "d")
	if pid := Holder(path); pid != 0 {
		t.Errorf("a directory that is not there is held by %d", pid)
	}
	dir, err := Open(path, "")
	if err != nil {
		t.Fatal(err)
	}
	if pid := Holder(path); pid != os.Getpid() {
		t.Errorf("held by %d, want %d", pid, os.Getpid())
	}
	if err := dir.Close(); err != nil {
		t.Fatal(err)
	}
	if pid := Holder(path); pid != 0 {
		t.Errorf("after the end it is held by %d", pid)
	}
}
