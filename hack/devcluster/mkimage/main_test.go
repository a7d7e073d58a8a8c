package main

import (
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
)

// The test itself is a static program, when it is built without cgo.
func TestRun(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := architecture(self); err != nil {
		t.Fatalf("%v: run the tests with CGO_ENABLED=0", err)
	}
	out := filepath.Join(t.TempDir(), "sub", "image.tar")
	needed := []string{"--out", out, "--program", self, "--name", "x:1"}
	if err := run(append(needed, "--label", "a=b", "--max-mb", "500")); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(out); err != nil || info.Size() < 1000 {
		t.Errorf("the archive: %v, %v", info, err)
	}

	err = run(append(needed, "--max-mb", "0.5"))
	if err == nil || !strings.Contains(err.Error(), "more than the") {
		t.Errorf("too large: error %v", err)
	}
	if _, err := os.Stat(out); !os.IsNotExist(err) {
		t.Errorf("an archive that is too large was left: %v", err)
	}
	for _, wrong := range [][]string{{}, needed[:4], append(needed, "extra"), append(needed, "--label", "a"), append(needed, "--program", os.DevNull)} {
		if run(wrong) == nil {
			t.Errorf("%q was accepted", wrong)
		}
	}
}

func TestArchitecture(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if got, err := architecture(self); err != nil || got != runtime.GOARCH {
		t.Errorf("got %q, %v; want %s", got, err, runtime.GOARCH)
	}
	shell, err := filepath.EvalSymlinks("/bin/sh")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := architecture(shell); err == nil || !strings.Contains(err.Error(), "is not a static program") {
		t.Errorf("%s: error %v", shell, err)
	}
}
