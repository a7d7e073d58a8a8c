//go:build integration && node

package integration

import (
	"encoding/json"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

const testpodImage = "devcluster-testpod:1"

// testpodArchive builds the image that the tests run.
func testpodArchive(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	program, archive := filepath.Join(dir, "testpod"), filepath.Join(dir, "testpod.tar")
	for _, args := range [][]string{
		{"build", "-trimpath", "-o", program, "./testpod"},
		{"run", "../mkimage", "--out", archive, "--program", program, "--name", testpodImage},
	} {
		command := exec.Command("go", args...)
		command.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := command.CombinedOutput(); err != nil {
			t.Fatalf("go %v: %v\n%s", args, err, out)
		}
	}
	return archive
}

// startNode runs 'devcluster up --node' until it is ready.
func startNode(t *testing.T, args ...string) *cluster {
	t.Helper()
	c := start(t, append([]string{"--node"}, args...)...)
	t.Cleanup(func() { c.run("down", "--dir", c.dir) }) // after a failure it still runs
	// The process ids that 'status' tells are those inside.
	c.pids = append([]int{c.up.Process.Pid}, c.inside()...)
	if len(c.pids) < 10 { // supervisor, process 1, node-run, eight components
		t.Errorf("only the processes %v", c.pids)
	}
	return c
}

// inside lists the processes in the cluster's namespace, by their ids out here.
func (c *cluster) inside() []int {
	c.t.Helper()
	content, err := os.ReadFile(filepath.Join(c.dir, "node.json"))
	if err != nil {
		c.t.Fatal(err)
	}
	var marker struct{ PID int }
	if err := json.Unmarshal(content, &marker); err != nil {
		c.t.Fatal(err)
	}
	namespace, err := os.Readlink("/proc/" + strconv.Itoa(marker.PID) + "/ns/pid")
	if err != nil {
		c.t.Fatal(err)
	}
	return processesIn(namespace)
}

// processesIn lists the processes of a namespace, of pods as well.
func processesIn(namespace string) []int {
	var pids []int
	for _, path := range matches("/proc/[0-9]*/ns/pid") {
		// Containers have namespaces of their own below that of the node.
		pid, _ := strconv.Atoi(strings.Split(path, "/")[2])
		for at := pid; at > 1; at = parentOf(at) {
			if link, err := os.Readlink("/proc/" + strconv.Itoa(at) + "/ns/pid"); err == nil && link == namespace {
				pids = append(pids, pid)
				break
			}
		}
	}
	return pids
}

func parentOf(pid int) int {
	content, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
	if err != nil {
		return 0
	}
	_, rest, _ := strings.Cut(string(content), "\nPPid:")
	line, _, _ := strings.Cut(rest, "\n")
	parent, _ := strconv.Atoi(strings.TrimSpace(line))
	return parent
}

func matches(pattern string) []string {
	found, _ := filepath.Glob(pattern)
	return found
}

// machine is what a node must leave as it is, also while it runs.
type machine struct {
	mounts, firewall string
	settings         map[string]string
	places           map[string][]string
}

func (m machine) equal(other machine) bool {
	return m.mounts == other.mounts && m.firewall == other.firewall && maps.Equal(m.settings, other.settings) &&
		maps.EqualFunc(m.places, other.places, slices.Equal)
}

func look(t *testing.T) machine {
	t.Helper()
	read := func(path string) string {
		content, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return string(content)
	}
	m := machine{mounts: read("/proc/self/mountinfo"), settings: map[string]string{}, places: map[string][]string{}}
	for _, name := range []string{"vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops",
		"kernel/keys/root_maxkeys", "kernel/keys/root_maxbytes", "kernel/hostname", "net/ipv4/ip_forward"} {
		m.settings[name] = read("/proc/sys/" + name)
	}
	for _, place := range []string{"/run/*", "/run/lock/*", "/var/lib/*", "/var/log/*", "/etc/*", "/opt/*", "/usr/libexec/*", "/sys/class/net/*", "/run/netns/*"} {
		m.places[place] = matches(place)
	}
	for _, command := range []string{"iptables", "ip6tables"} {
		for _, table := range []string{"filter", "nat", "mangle"} {
			list := exec.Command(command, "--table", table, "--list-rules")
			list.Env = append(os.Environ(), "PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin")
			out, err := list.CombinedOutput()
			if err != nil {
				t.Fatalf("%s: %v\n%s", list, err, out)
			}
			m.firewall += string(out)
		}
	}
	return m
}

// cgroups lists those of clusters and pods, in every hierarchy. There are others
// that come and go meanwhile, of whatever else runs on the machine.
func cgroups(t *testing.T) []string {
	t.Helper()
	var dirs []string
	err := filepath.WalkDir("/sys/fs/cgroup", func(path string, entry os.DirEntry, err error) error {
		if err == nil && entry.IsDir() && slices.ContainsFunc([]string{"gbo-", "kubepods", "k8s.io", "containerd", "devcluster"}, func(name string) bool {
			return strings.Contains(path, name)
		}) {
			dirs = append(dirs, path)
		}
		return nil // one may go while we look
	})
	if err != nil {
		t.Fatal(err)
	}
	return dirs
}

func (c *cluster) k(args ...string) string {
	c.t.Helper()
	return c.run(c.kubectl(args...)...)
}

func (c *cluster) expect(wanted string, args ...string) {
	c.t.Helper()
	if out := c.k(args...); !strings.Contains(out, wanted) {
		c.t.Errorf("%s: got %q, want %q", strings.Join(args, " "), out, wanted)
	}
}

// eventually calls kubectl until it succeeds.
func (c *cluster) eventually(args ...string) {
	c.t.Helper()
	deadline := time.Now().Add(60 * time.Second)
	for {
		out, err := c.try(c.kubectl(args...)...)
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			c.t.Fatalf("kubectl %s: %v\n%s", strings.Join(args, " "), err, out)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// runPods loads the image and waits until the Deployment is available.
func (c *cluster) runPods(archive string) {
	c.t.Helper()
	c.run("image", "load", "--dir", c.dir, archive)
	c.k("apply", "-f", "testpod/pod.yaml")
	c.k("--namespace=pods", "rollout", "status", "deployment/hello", "--timeout=120s")
}

// checkPods asks what pods ask of a cluster.
func (c *cluster) checkPods() {
	c.t.Helper()
	const hello = "deployment/hello"
	c.expect("serving as user 65532", "--namespace=pods", "logs", hello)
	service := strings.TrimSpace(c.k("--namespace=pods", "get", "service", "hello", "-o", "jsonpath={.spec.clusterIP}"))
	c.expect(service+"\n", "--namespace=pods", "exec", hello, "--", "/testpod", "lookup", "hello")
	c.expect(service+"\n", "--namespace=pods", "exec", hello, "--", "/testpod", "lookup", "hello.pods.svc.cluster.local")
	// Both pods are behind the Service, so each asks itself and the other one.
	pods := strings.Fields(c.k("--namespace=pods", "get", "pods", "-o", "jsonpath={.items[*].metadata.name}"))
	if len(pods) != 2 {
		c.t.Fatalf("pods %v, want 2", pods)
	}
	answered := map[string]bool{}
	for try := 0; len(answered) < len(pods) && try < 50; try++ { // at random: 50 times the same one does not happen
		out := c.k("--namespace=pods", "exec", pods[0], "--", "/testpod", "get", "http://hello/")
		answered[strings.TrimSpace(strings.TrimPrefix(out, "Defaulted"))] = true
	}
	for _, pod := range pods {
		if !answered["hello from "+pod] {
			c.t.Errorf("%s did not answer; answers: %v", pod, slices.Collect(maps.Keys(answered)))
		}
	}
	c.expect(`"name":"kube-root-ca.crt"`, "--namespace=pods", "exec", hello, "--", "/testpod", "apiserver")
	if out, err := c.try(c.kubectl("--namespace=pods", "exec", hello, "--", "/testpod", "lookup", "nowhere.example")...); err == nil || !strings.Contains(out, "no such host") {
		c.t.Errorf("a name outside the cluster: %v, %s", err, out)
	}
	c.expect("hello from", "get", "--raw", "/api/v1/namespaces/pods/services/hello:80/proxy/")
}

func TestNodeRunsPodsAndLeavesNothing(t *testing.T) {
	archive := testpodArchive(t)
	before, cgroupsBefore := look(t), cgroups(t)
	temp := t.TempDir()
	t.Setenv("TMPDIR", temp)

	c := startNode(t)
	c.runPods(archive)
	c.checkPods()
	if during := look(t); !during.equal(before) {
		t.Errorf("the machine changed; before:\n%+v\nwhile the node runs:\n%+v", before, during)
	}

	// Another one at the same time is nobody's business.
	other := startNode(t)
	other.expect("devcluster", "get", "nodes", "--no-headers")
	if out := other.k("get", "namespaces"); strings.Contains(out, "pods") {
		t.Errorf("the second cluster has the first one's namespaces:\n%s", out)
	}

	// Its components obey, and pods survive them.
	c.run("ctl", "--dir", c.dir, "restart", "containerd")
	c.run("ctl", "--dir", c.dir, "restart", "kubelet")
	c.eventually("--namespace=pods", "logs", "deployment/hello") // until kubelet has found its pods again
	c.checkPods()

	c.pids = append([]int{c.up.Process.Pid}, c.inside()...) // with those of the pods
	c.run("down", "--dir", c.dir)
	c.removed()
	other.expect("devcluster", "get", "nodes", "--no-headers")
	_ = other.up.Process.Signal(syscall.SIGINT)
	other.removed()

	if after := look(t); !after.equal(before) {
		t.Errorf("the machine changed; before:\n%+v\nafter:\n%+v", before, after)
	}
	if after := cgroups(t); !slices.Equal(after, cgroupsBefore) {
		t.Errorf("cgroups before: %v\nafter: %v", cgroupsBefore, after)
	}
	if left := matches(filepath.Join(temp, "*")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

func TestKilledNode(t *testing.T) {
	archive := testpodArchive(t)
	before, cgroupsBefore := look(t), cgroups(t)
	dir := filepath.Join(t.TempDir(), "kept")

	c := startNode(t, "--dir", dir)
	c.runPods(archive)
	kill := func() {
		t.Helper()
		c.pids = append([]int{c.up.Process.Pid}, c.inside()...)
		_ = c.up.Process.Kill()
		_ = c.up.Wait()
		c.gone() // by the kernel's doing alone
	}
	kill()
	if slices.Equal(cgroups(t), cgroupsBefore) {
		t.Error("no cgroups are left, so this test does not show that they are removed")
	}
	c.run("down", "--dir", dir)
	if after := cgroups(t); !slices.Equal(after, cgroupsBefore) {
		t.Errorf("cgroups before: %v\nafter: %v", cgroupsBefore, after)
	}
	if after := look(t); !after.equal(before) {
		t.Errorf("the machine changed; before:\n%+v\nafter:\n%+v", before, after)
	}

	// Like a reboot: image and Deployment are there, the pods start again.
	c = startNode(t, "--dir", dir)
	c.k("--namespace=pods", "wait", "pods", "--for=condition=Ready=false", "--all", "--timeout=60s")
	c.k("--namespace=pods", "rollout", "status", "deployment/hello", "--timeout=120s")
	c.checkPods()
	kill()

	// The next one cleans up too.
	c = start(t, "--dir", dir)
	if after := cgroups(t); !slices.Equal(after, cgroupsBefore) {
		t.Errorf("cgroups before: %v\nafter: %v", cgroupsBefore, after)
	}
	c.run("down", "--dir", dir)
	if err := c.up.Wait(); err != nil {
		t.Errorf("exit: %v\n%s", err, c.stderr)
	}
	c.gone()
	if _, err := os.Stat(filepath.Join(dir, "etcd")); err != nil {
		t.Errorf("the data of a named directory should stay: %v", err)
	}
}

func TestNodeSaysWhatIsMissing(t *testing.T) {
	before := matches("/tmp/gbo-devcluster-*")
	fails := func(up *exec.Cmd, wanted ...string) {
		t.Helper()
		out, err := up.CombinedOutput()
		if up.ProcessState.ExitCode() != 1 {
			t.Errorf("exit: %v", err)
		}
		for _, text := range wanted {
			if !strings.Contains(string(out), text) {
				t.Errorf("%q is missing in:\n%s", text, out)
			}
		}
	}
	program := binary(t)

	without := exec.Command(program, "up", "--node")
	without.Env = append(os.Environ(), "PATH=/nonexistent")
	fails(without, "containerd, ", "ctr", "apt-get install --no-install-recommends containerd")

	// Somebody else must be able to execute it: the cache may be ours alone.
	copied := filepath.Join("/tmp", "devcluster-test-"+strconv.Itoa(os.Getpid()))
	content, err := os.ReadFile(program)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(copied, content, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.Remove(copied) })
	nobody := exec.Command(copied, "up", "--node")
	nobody.Dir, nobody.Env = "/", []string{"PATH=" + os.Getenv("PATH")}
	nobody.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	fails(nobody, "run it as root")

	if left := matches("/tmp/gbo-devcluster-*"); len(left) > len(before) {
		t.Errorf("left: %v; before: %v", left, before)
	}
}

func TestNodeComponentThatDies(t *testing.T) {
	cgroupsBefore := cgroups(t)
	c := startNode(t)
	for _, pid := range c.inside() {
		if command, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cmdline"); err == nil && strings.HasPrefix(string(command), "kubelet\x00") {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
	}
	err := c.up.Wait()
	if err == nil || c.up.ProcessState.ExitCode() != 1 {
		t.Errorf("exit: %v", err)
	}
	if !strings.Contains(c.stderr.String(), "kubelet ended unexpectedly (signal: killed)") {
		t.Errorf("stderr:\n%s", c.stderr)
	}
	c.gone()
	if after := cgroups(t); !slices.Equal(after, cgroupsBefore) {
		t.Errorf("cgroups before: %v\nafter: %v", cgroupsBefore, after)
	}
}
