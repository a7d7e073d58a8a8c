//go:build integration

package integration

import (
	"bufio"
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// binary is the devcluster to test: DEVCLUSTER_BIN, or what ensure.sh builds.
func binary(t *testing.T) string {
	t.Helper()
	if path := os.Getenv("DEVCLUSTER_BIN"); path != "" {
		return path
	}
	build := exec.Command("../ensure.sh")
	build.Stderr = os.Stderr
	out, err := build.Output()
	if err != nil {
		t.Fatalf("ensure.sh: %v", err)
	}
	return strings.TrimSpace(string(out))
}

type cluster struct {
	t      *testing.T
	binary string
	up     *exec.Cmd
	stderr *bytes.Buffer
	dir    string
	pids   []int
}

// start runs 'devcluster up' until it is ready.
func start(t *testing.T, args ...string) *cluster {
	t.Helper()
	c := &cluster{t: t, binary: binary(t), stderr: new(bytes.Buffer)}
	c.up = exec.Command(c.binary, append([]string{"up"}, args...)...)
	c.up.Stderr = c.stderr
	// A process group of its own, so that a test can press Ctrl-C on it.
	c.up.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	stdout, err := c.up.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.up.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.up.Process.Kill() })
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		_ = c.up.Wait()
		t.Fatalf("no kubeconfig: %v\n%s", err, c.stderr)
	}
	c.dir = filepath.Dir(strings.TrimSpace(line))
	c.pids = []int{c.up.Process.Pid}
	for _, line := range strings.Split(strings.TrimSpace(c.run("ctl", "--dir", c.dir, "status")), "\n") {
		fields := strings.Fields(line)
		if len(fields) != 3 || fields[1] != "running" {
			t.Errorf("status %q", line)
			continue
		}
		pid, _ := strconv.Atoi(fields[2])
		c.pids = append(c.pids, pid)
	}
	return c
}

func (c *cluster) try(args ...string) (string, error) {
	out, err := exec.Command(c.binary, args...).CombinedOutput()
	return string(out), err
}

func (c *cluster) run(args ...string) string {
	c.t.Helper()
	out, err := c.try(args...)
	if err != nil {
		c.t.Fatalf("devcluster %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

func (c *cluster) kubectl(args ...string) []string {
	return append([]string{"exec", "kubectl", "--kubeconfig", filepath.Join(c.dir, "kubeconfig")}, args...)
}

// alive tells whether the process runs. Orphans may stay zombies for a while,
// until process 1 gets round to them.
func alive(pid int) bool {
	if errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) {
		return false
	}
	status, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
	return err != nil || !bytes.Contains(status, []byte("State:\tZ"))
}

// gone checks that no process of the cluster is left.
func (c *cluster) gone() {
	c.t.Helper()
	deadline := time.Now().Add(3 * time.Second)
	for _, pid := range c.pids {
		for alive(pid) {
			if time.Now().After(deadline) {
				c.t.Errorf("process %d is left", pid)
				break
			}
			time.Sleep(20 * time.Millisecond)
		}
	}
}

func TestUpAndDown(t *testing.T) {
	c := start(t)
	if out := c.run(c.kubectl("get", "namespaces")...); !strings.Contains(out, "default") {
		t.Errorf("namespaces: %s", out)
	}

	// The namespace controller works.
	c.run(c.kubectl("create", "namespace", "short-lived")...)
	c.run(c.kubectl("delete", "namespace", "short-lived", "--timeout=60s")...)

	// An outage on request: not a crash, same address and data afterwards.
	c.run(c.kubectl("create", "configmap", "kept", "--from-literal=a=b")...)
	c.run("ctl", "--dir", c.dir, "stop", "kube-apiserver")
	if out, err := c.try(c.kubectl("get", "namespaces")...); err == nil || !strings.Contains(out, "refused") {
		t.Errorf("the API server should be away: %v\n%s", err, out)
	}
	out := c.run("ctl", "--dir", c.dir, "start", "kube-apiserver")
	if !strings.Contains(out, "kube-apiserver running ") {
		t.Errorf("after start: %s", out)
	}
	c.run(c.kubectl("get", "configmap", "kept")...)

	out = c.run("ctl", "--dir", c.dir, "restart", "kube-controller-manager")
	if strings.Contains(out, " "+strconv.Itoa(c.pids[3])+"\n") {
		t.Errorf("not restarted: %s", out)
	}

	audit, err := os.ReadFile(filepath.Join(c.dir, "audit.log"))
	if err != nil || !bytes.Contains(audit, []byte(`"name":"kept"`)) {
		t.Errorf("the audit log lacks the config map: %v", err)
	}

	begin := time.Now()
	_ = c.up.Process.Signal(syscall.SIGTERM)
	c.removed()
	if took := time.Since(begin); took > 3*time.Second {
		t.Errorf("shutdown took %s", took)
	}
}

func TestKilledAndResumedInNamedDirectory(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "kept")
	c := start(t, "--dir", dir)
	c.run(c.kubectl("create", "configmap", "kept", "--from-literal=a=b")...)
	before, err := os.ReadFile(filepath.Join(dir, "kubeconfig"))
	if err != nil {
		t.Fatal(err)
	}
	_ = c.up.Process.Kill()
	_ = c.up.Wait()
	c.gone()

	c = start(t, "--dir", dir)
	c.run(c.kubectl("get", "configmap", "kept")...)
	after, err := os.ReadFile(filepath.Join(dir, "kubeconfig"))
	if err != nil || !bytes.Equal(before, after) {
		t.Errorf("the kubeconfig changed (%v)", err)
	}
	_ = c.up.Process.Signal(syscall.SIGTERM)
	if err := c.up.Wait(); err != nil {
		t.Errorf("exit: %v\n%s", err, c.stderr)
	}
	c.gone()
}

// removed checks that 'up' has ended as somebody wished, and that nothing is left.
func (c *cluster) removed() {
	c.t.Helper()
	if err := c.up.Wait(); err != nil {
		c.t.Errorf("exit: %v\n%s", err, c.stderr)
	}
	c.gone()
	if _, err := os.Stat(c.dir); !os.IsNotExist(err) {
		c.t.Errorf("%s is left: %v", c.dir, err)
	}
}

func TestCtrlC(t *testing.T) {
	c := start(t, "--controller-manager=false")
	// A terminal sends it to everybody in the foreground.
	_ = syscall.Kill(-c.up.Process.Pid, syscall.SIGINT)
	c.removed()
	if strings.Contains(c.stderr.String(), "unexpectedly") {
		t.Errorf("a component ended before it was told to:\n%s", c.stderr)
	}
}

func TestEndsWithWhomItWatches(t *testing.T) {
	watched := exec.Command("sleep", "600")
	if err := watched.Start(); err != nil {
		t.Fatal(err)
	}
	c := start(t, "--controller-manager=false", "--parent-pid="+strconv.Itoa(watched.Process.Pid))
	_ = watched.Process.Kill()
	_ = watched.Wait()
	c.removed()
}

func TestCrashIsReported(t *testing.T) {
	c := start(t, "--controller-manager=false")
	_ = syscall.Kill(c.pids[1], syscall.SIGKILL) // etcd
	err := c.up.Wait()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 1 {
		t.Errorf("exit: %v", err)
	}
	if !strings.Contains(c.stderr.String(), "etcd ended unexpectedly (signal: killed)") {
		t.Errorf("stderr:\n%s", c.stderr)
	}
	c.gone()
}
