package charttest

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

const (
	root  = "../.."
	chart = root + "/charts/gemini-batch-operator"
	// The namespace of the release.
	namespace = "gemini-system"
	// How long a process may take to become ready.
	patience = time.Minute
)

// What `make chart` hands over.
var helmBin, kubectlBin, operatorBin, simulatorBin, kubeconfig string

func TestMain(m *testing.M) {
	code, err := withCluster(m.Run)
	if err != nil {
		fmt.Fprintln(os.Stderr, "tests/chart:", err)
		os.Exit(1)
	}
	os.Exit(code)
}

// withCluster runs a control plane with all definitions that the chart's objects need.
func withCluster(run func() int) (code int, err error) {
	var devcluster string
	for name, to := range map[string]*string{
		"GBO_HELM": &helmBin, "GBO_DEVCLUSTER": &devcluster, "GBO_OPERATOR": &operatorBin, "GBO_SIMULATOR": &simulatorBin,
	} {
		if *to = os.Getenv(name); *to == "" {
			return 1, fmt.Errorf("%s is not set: run `make chart`", name)
		}
	}
	kubectlBin = filepath.Join(filepath.Dir(devcluster), "kubectl")
	cluster := exec.Command(devcluster, "up", "--audit=false")
	cluster.Stderr = io.Discard
	out, err := cluster.StdoutPipe()
	if err != nil {
		return 1, err
	}
	if err := cluster.Start(); err != nil {
		return 1, err
	}
	defer func() { err = errors.Join(err, stop(cluster)) }()
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		return 1, fmt.Errorf("devcluster did not start: %w", err)
	}
	kubeconfig = strings.TrimSpace(line)
	if err := installDefinitions(); err != nil {
		return 1, err
	}
	// The others are those of values/scoped.yaml.
	for _, name := range []string{namespace, "team-a", "team-b"} {
		if _, err := output(kubectl("create", "namespace", name)); err != nil {
			return 1, err
		}
	}
	// Pods that are not restricted, of whatever object, are answered with a warning.
	if _, err := output(kubectl("label", "namespace", namespace, "pod-security.kubernetes.io/warn=restricted")); err != nil {
		return 1, err
	}
	return run(), nil
}

// stop ends a process as an administrator would, and waits.
func stop(process *exec.Cmd) error {
	if err := process.Process.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	return process.Wait()
}

// module is a Go module that holds CustomResourceDefinitions as files.
type module struct {
	name, version string
	// As go.sum has it: what is applied is what was looked at.
	sum   string
	files []string
}

var modules = []module{
	{
		"sigs.k8s.io/gateway-api", "v1.4.0", "h1:ZwlNM6zOHq0h3WUX2gfByPs2yAEsy/EenYJB78jpQfQ=",
		[]string{"config/crd/standard/gateway.networking.k8s.io_httproutes.yaml"},
	},
	{
		"github.com/cert-manager/cert-manager", "v1.19.1", "h1:Txh8L/nLWTDcb7ZnXuXbTe15BxQnLbLirXmbNk0fGgY=",
		[]string{"deploy/crds/cert-manager.io_certificates.yaml"},
	},
	{
		"github.com/prometheus-operator/prometheus-operator", "v0.85.0", "h1:M5xLCLEoaW2IJfnuCwFzzpL+jSVQu3KGT84Pye+fW8s=",
		[]string{
			"example/prometheus-operator-crd/monitoring.coreos.com_servicemonitors.yaml",
			"example/prometheus-operator-crd/monitoring.coreos.com_podmonitors.yaml",
			"example/prometheus-operator-crd/monitoring.coreos.com_prometheusrules.yaml",
		},
	},
}

func installDefinitions() error {
	files := []string{root + "/crds/geminibatchjobs.yaml"}
	for _, m := range modules {
		download := exec.Command("go", "mod", "download", "-json", m.name+"@"+m.version)
		download.Dir = os.TempDir() // outside this module: it is not a dependency
		out, err := output(download)
		if err != nil {
			return err
		}
		var got struct{ Dir, Sum string }
		if err := json.Unmarshal(out, &got); err != nil {
			return err
		}
		if got.Sum != m.sum {
			return fmt.Errorf("%s@%s has the hash %s, not %s", m.name, m.version, got.Sum, m.sum)
		}
		for _, file := range m.files {
			files = append(files, filepath.Join(got.Dir, file))
		}
	}
	args := []string{"apply", "--server-side"}
	for _, file := range files {
		args = append(args, "-f", file)
	}
	if _, err := output(kubectl(args...)); err != nil {
		return err
	}
	wait := []string{"wait", "--for=condition=Established", "--timeout=60s"}
	for _, file := range files {
		wait = append(wait, "-f", file)
	}
	_, err := output(kubectl(wait...))
	return err
}

func kubectl(args ...string) *exec.Cmd {
	return exec.Command(kubectlBin, append([]string{"--kubeconfig", kubeconfig}, args...)...)
}

func helm(args ...string) *exec.Cmd { return exec.Command(helmBin, args...) }

// output runs a command; an error holds what it said.
func output(command *exec.Cmd) ([]byte, error) {
	var stderr strings.Builder
	command.Stderr = &stderr
	out, err := command.Output()
	if err != nil {
		return out, fmt.Errorf("%s: %w\n%s", strings.Join(command.Args, " "), err, stderr.String())
	}
	return out, nil
}

// template renders the chart.
func template(t *testing.T, args ...string) string {
	t.Helper()
	out, err := output(helm(append([]string{"template", "gbo", chart, "--namespace", namespace}, args...)...))
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

// start runs a program until the test ends, and returns when the URL answers with 200.
func start(t *testing.T, url, program string, args ...string) {
	t.Helper()
	process := exec.Command(program, args...)
	process.Env = append(os.Environ(), "KUBECONFIG="+kubeconfig)
	var log strings.Builder
	process.Stderr = &log
	if err := process.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := stop(process); err != nil || t.Failed() {
			t.Logf("%s: %v\n%s", program, err, log.String())
		}
	})
	eventually(t, url, func(string) bool { return true })
}

// eventually asks until it gets 200 and an answer that satisfies, and returns that.
func eventually(t *testing.T, url string, satisfies func(string) bool) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var last string
	for ; ctx.Err() == nil; time.Sleep(100 * time.Millisecond) {
		text, ok := get(ctx, url)
		if ok && satisfies(text) {
			return text
		}
		last = text
	}
	t.Fatalf("%s did not become as it should:\n%s", url, last)
	return ""
}

func get(ctx context.Context, url string) (string, bool) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return "", false
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return "", false
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	return string(body), err == nil && response.StatusCode == http.StatusOK
}

func freeAddress(t *testing.T) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	return listener.Addr().String()
}
