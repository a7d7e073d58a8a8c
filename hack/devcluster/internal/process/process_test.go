package process

import (
	"context"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func start(t *testing.T, log, script string) *Process {
	t.Helper()
	process, err := Start(Spec{Path: "/bin/sh", Args: []string{"sh", "-c", script}, Log: log})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { process.Stop(0) })
	return process
}

func TestExitStatusAndLogTailOfThisRun(t *testing.T) {
	log := filepath.Join(t.TempDir(), "log")
	<-start(t, log, "echo from an earlier run").Done()
	process := start(t, log, "echo one; echo two; echo three; exit 3")
	<-process.Done()
	if process.ExitStatus() != "exit status 3" || process.Stopping() {
		t.Errorf("status %q, stopping %v", process.ExitStatus(), process.Stopping())
	}
	if got := process.LogTail(2); got != "two\nthree" {
		t.Errorf("tail %q", got)
	}
	if got := process.LogTail(9); got != "one\ntwo\nthree" {
		t.Errorf("whole log %q", got)
	}
}

func TestStopKillsAfterGrace(t *testing.T) {
	log := filepath.Join(t.TempDir(), "log")
	process := start(t, log, "trap '' TERM; echo ready; while :; do sleep 0.05; done")
	for !strings.Contains(process.LogTail(1), "ready") {
		time.Sleep(5 * time.Millisecond)
	}
	process.Stop(100 * time.Millisecond)
	if process.ExitStatus() != "signal: killed" || !process.Stopping() {
		t.Errorf("status %q, stopping %v", process.ExitStatus(), process.Stopping())
	}
}

func TestStopEndsAPausedProcess(t *testing.T) {
	process := start(t, filepath.Join(t.TempDir(), "log"), "exec sleep 60")
	if err := process.Pause(); err != nil {
		t.Fatal(err)
	}
	process.Stop(5 * time.Second)
	if process.ExitStatus() != "signal: terminated" {
		t.Errorf("status %q", process.ExitStatus())
	}
}

func TestWatchPID(t *testing.T) {
	other := exec.Command("sleep", "60")
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	gone := make(chan string, 1)
	if err := WatchPID(context.Background(), other.Process.Pid, func(reason string) { gone <- reason }); err != nil {
		t.Fatal(err)
	}
	select {
	case reason := <-gone:
		t.Fatalf("reported too early: %s", reason)
	case <-time.After(2 * parentPollInterval):
	}
	_ = other.Process.Kill() // a zombie from here on: nobody has waited for it
	select {
	case <-gone:
	case <-time.After(5 * time.Second):
		t.Error("the end of the process was not noticed")
	}
	_ = other.Wait()

	if err := WatchPID(context.Background(), other.Process.Pid, func(string) {}); err == nil {
		t.Error("a process that does not exist was accepted")
	}
}
