package cli

import (
	"bytes"
	"runtime/debug"
	"testing"
	"time"

	"geminibatch.dev/devcluster/internal/control"
)

func TestParseUp(t *testing.T) {
	defaults := upOptions{audit: true, controllerManager: true, watchParent: true, timeout: 2 * time.Minute}
	got, _, goOn := parseUp(nil)
	if !goOn || got != defaults {
		t.Errorf("no flags: %+v", got)
	}

	got, _, goOn = parseUp([]string{"--dir", "x", "--audit=false", "--controller-manager=false", "--watch-parent=false", "--parent-pid=7", "--timeout=5s"})
	want := upOptions{dir: "x", parentPID: 7, timeout: 5 * time.Second}
	if !goOn || got != want {
		t.Errorf("all flags: %+v, want %+v", got, want)
	}

	if got, _, goOn = parseUp([]string{"--node"}); !goOn || !got.node {
		t.Errorf("--node: %+v", got)
	}

	for _, args := range [][]string{{"--node", "--controller-manager=false"}, {"extra"}, {"--unknown"}, {"--timeout=0"}, {"--parent-pid=-1"}, {"--audit", "false"}} {
		if _, code, goOn := parseUp(args); goOn || code != exitUsage {
			t.Errorf("%v: code %d, go on %v; want a usage error", args, code, goOn)
		}
	}
}

func TestParseCtl(t *testing.T) {
	dir, request, _, goOn := parseCtl([]string{"--dir", "d", "stop", "kube-apiserver"})
	if want := (control.Request{Command: control.Stop, Component: "kube-apiserver"}); !goOn || dir != "d" || request != want {
		t.Errorf("got %q, %+v", dir, request)
	}
	if _, request, _, goOn = parseCtl([]string{"--dir=d", "status"}); !goOn || request.Command != control.ListStatus {
		t.Errorf("status: %+v", request)
	}
	for _, args := range [][]string{
		{}, {"status"}, {"--dir=d"}, {"--dir=d", "stop"}, {"--dir=d", "explode", "etcd"},
		{"--dir=d", "status", "etcd"}, {"--dir=d", "stop", "etcd", "more"},
	} {
		if _, _, code, goOn := parseCtl(args); goOn || code != exitUsage {
			t.Errorf("%v: code %d, go on %v; want a usage error", args, code, goOn)
		}
	}
}

// ran is what a built-in program panics with, since it must not return.
type ran struct {
	name string
	args int
}

func TestDispatch(t *testing.T) {
	t.Setenv("KUBEBUILDER_ASSETS", "")
	programs := Programs{
		Names: []string{"etcd", "kubectl"},
		Run:   func(name string, args []string) { panic(ran{name, len(args)}) },
	}
	run := func(argv ...string) (code int, program any) {
		defer func() { program = recover() }()
		return Main(argv, programs), nil
	}
	if _, program := run("/some/where/etcd", "--version"); program != (ran{"etcd", 1}) {
		t.Errorf("by symbolic link: %v", program)
	}
	if _, program := run("devcluster", "exec", "kubectl", "get", "ns"); program != (ran{"kubectl", 2}) {
		t.Errorf("by exec: %v", program)
	}
	for _, argv := range [][]string{{"devcluster"}, {"devcluster", "nonsense"}, {"devcluster", "down", "x"}, {"devcluster", "image"},
		{"devcluster", "image", "save"}, {"devcluster", "image", "load", "x.tar"}, {"devcluster", "image", "load", "--dir", "x"}, {"devcluster", "node-run"}, {"devcluster", "exec"}, {"devcluster", "exec", "nonsense"}} {
		if code, program := run(argv...); code != exitUsage || program != nil {
			t.Errorf("%v: code %d, program %v; want a usage error", argv, code, program)
		}
	}
	for _, argv := range [][]string{{"devcluster", "--help"}, {"devcluster", "up", "--help"}, {"devcluster", "ctl", "-h"}, {"devcluster", "down", "-h"}, {"devcluster", "image", "-h"}} {
		if code, program := run(argv...); code != exitOK || program != nil {
			t.Errorf("%v: code %d, program %v; want help", argv, code, program)
		}
	}
}

func TestVersions(t *testing.T) {
	var out bytes.Buffer
	printVersions(&out, &debug.BuildInfo{GoVersion: "go1.2", Deps: []*debug.Module{
		{Path: "k8s.io/kubernetes", Version: "v1.0.0"},
		{Path: "other", Version: "v9"},
		{Path: "go.etcd.io/etcd/server/v3", Version: "v3.0.0"},
	}})
	if want := "kubernetes v1.0.0\netcd v3.0.0\ngo go1.2\n"; out.String() != want {
		t.Errorf("got %q", out.String())
	}
}
