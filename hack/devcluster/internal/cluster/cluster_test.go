package cluster

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"geminibatch.dev/devcluster/internal/assets"
	"geminibatch.dev/devcluster/internal/node"
	"geminibatch.dev/devcluster/internal/workdir"
)

// config makes a configuration in which etcd is the given shell script.
func config(t *testing.T, etcd string) (cfg Config, messages *[]string) {
	t.Helper()
	programs := t.TempDir()
	script := "#!/bin/sh\n" + etcd + "\n"
	if err := os.WriteFile(filepath.Join(programs, "etcd"), []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	dir, err := workdir.Open("", os.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = dir.Close() })
	messages = new([]string)
	return Config{
		Dir:     dir,
		Assets:  assets.Finder{Dir: programs, Self: "/nonexistent"},
		Timeout: 10 * time.Second,
		Progress: func(format string, args ...any) {
			*messages = append(*messages, fmt.Sprintf(format, args...))
		},
	}, messages
}

func TestStartTriesOtherPortsThreeTimes(t *testing.T) {
	cfg, messages := config(t, `echo "$*" >>"$0.calls"; echo "listen tcp: bind: address already in use"; exit 1`)
	_, err := Start(context.Background(), cfg)
	if err == nil || !strings.Contains(err.Error(), "gave up after 3 attempts: etcd ended unexpectedly (exit status 1)") {
		t.Fatalf("error %v", err)
	}
	content, err := os.ReadFile(filepath.Join(cfg.Assets.Dir, "etcd.calls"))
	if err != nil {
		t.Fatal(err)
	}
	calls := map[string]bool{}
	for _, call := range strings.Split(strings.TrimSpace(string(content)), "\n") {
		calls[call] = true
	}
	if len(calls) != 3 || len(*messages) != 3 {
		t.Errorf("calls %v, messages %q; want three with different ports", calls, *messages)
	}
}

func TestStartReportsOtherFailuresAtOnce(t *testing.T) {
	cfg, messages := config(t, `echo "disk on fire"; exit 7`)
	_, err := Start(context.Background(), cfg)
	if err == nil || !strings.Contains(err.Error(), "etcd ended unexpectedly (exit status 7)") ||
		!strings.Contains(err.Error(), "etcd.log:\ndisk on fire") {
		t.Errorf("error %v", err)
	}
	if len(*messages) != 0 {
		t.Errorf("messages %q", *messages)
	}
}

func TestStartGivesUpAfterTimeout(t *testing.T) {
	cfg, _ := config(t, `echo "thinking"; exec sleep 60`)
	cfg.Timeout = 300 * time.Millisecond
	_, err := Start(context.Background(), cfg)
	if err == nil || !strings.Contains(err.Error(), "etcd is not ready after 300ms") || !strings.Contains(err.Error(), "thinking") {
		t.Errorf("error %v", err)
	}
}

func TestStartEndsWithItsContext(t *testing.T) {
	cfg, _ := config(t, `exec sleep 60`)
	ctx, cancel := context.WithCancelCause(context.Background())
	why := fmt.Errorf("enough")
	time.AfterFunc(200*time.Millisecond, func() { cancel(why) })
	if _, err := Start(ctx, cfg); err != why {
		t.Errorf("error %v", err)
	}
}

func TestAPIServerArguments(t *testing.T) {
	cfg, _ := config(t, "")
	cfg.Audit, cfg.ControllerManager = true, false
	e, err := newEnvironment(cfg, false)
	if err != nil {
		t.Fatal(err)
	}
	defer e.ports.Release()
	args := " " + strings.Join(e.kubeAPIServer().args, " ") + " "
	for _, want := range []string{
		" --authorization-mode=RBAC ", " --audit-log-mode=blocking ",
		" --audit-log-path=" + cfg.Dir.File("audit.log") + " ",
		" --disable-admission-plugins=ServiceAccount ",
	} {
		if !strings.Contains(args, want) {
			t.Errorf("%q is missing in %s", want, args)
		}
	}
	if n := len(e.components()); n != 2 {
		t.Errorf("%d components without the controller manager, want 2", n)
	}
}

func TestNodeConfiguration(t *testing.T) {
	cfg, _ := config(t, "")
	cfg.ControllerManager = true
	cfg.Node = &NodeConfig{Programs: node.Programs{Containerd: "/usr/bin/containerd", CNI: "/usr/lib/cni"}}
	e, err := newEnvironment(cfg, false)
	if err != nil {
		t.Fatal(err)
	}
	defer e.ports.Release()
	if args := strings.Join(e.kubeAPIServer().args, " "); !strings.Contains(args, "--authorization-mode=Node,RBAC") ||
		strings.Contains(args, "--bind-address=127.0.0.1") {
		t.Errorf("API server: %s", args)
	}
	for file, want := range map[string]string{
		containerdConfigFile: `bin_dir = "/usr/lib/cni"`,
		cniConfigFile:        `[[{"subnet": "10.244.0.0/16"}]]`,
		kubeletConfigFile:    "containerRuntimeEndpoint: unix://" + cfg.Dir.File("containerd.sock") + "\n",
		proxyConfigFile:      "hostnameOverride: devcluster\n",
		corefile:             "kubeconfig " + cfg.Dir.File("coredns.kubeconfig") + "\n",
	} {
		content, err := os.ReadFile(cfg.Dir.File(file))
		if err != nil || !strings.Contains(string(content), want) || strings.Contains(string(content), "<no value>") {
			t.Errorf("%s: %v; want %q in\n%s", file, err, want, content)
		}
	}
	var names []string
	for _, component := range e.components() {
		names = append(names, component.name)
	}
	want := "etcd kube-apiserver kube-controller-manager kube-scheduler coredns containerd kubelet kube-proxy"
	if got := strings.Join(names, " "); got != want {
		t.Errorf("components %s, want %s", got, want)
	}
}
